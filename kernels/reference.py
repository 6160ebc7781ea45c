"""Every operation of GPT-2 in plain NumPy, forward and backward. Read this file first, and gpt2.py next.

Each backward function stands under its forward function, takes the same arrays with a `d` in front of their
gradients, and restates the line that it differentiates. There are no threads, no blocks and no scratch memory
here: one line of mathematics is one line of NumPy. cpu.py and cuda.py define the same functions, fast, and
are tested against this file. device="reference" runs a whole model on it. The network, from top to bottom:

    tokens (B, T)
      encoder                  x = wte[tokens] + wpe[0 .. T - 1]       (B, T, C)   the residual stream
      in each of the L layers:
        layernorm              ln_1 = layernorm(x)                     (B, T, C)
        matmul                 qkv = ln_1 @ weight + bias              (B, T, 3C)
        attention              att = softmax(q k^T / sqrt(HS)) v       (B, T, C)
        matmul_residual        x = x + att @ weight + bias             (B, T, C)
        layernorm              ln_2 = layernorm(x)                     (B, T, C)
        matmul_gelu            act = gelu(ln_2 @ weight + bias)        (B, T, 4C)
        matmul_residual        x = x + act @ weight + bias             (B, T, C)
      layernorm                ln_f = layernorm(x)                     (B, T, C)
      matmul                   logits = ln_f @ wte.T                   (B, T, Vp)
      classifier               losses = -log softmax(logits)[targets]  (B, T)

Outputs come first in the arguments and are allocated by the caller. Gradients of parameters accumulate (+=),
so that a large batch can be processed in several micro-batches. Gradients of activations are overwritten,
except in layernorm_backward, which adds to the gradient of the residual stream.

A numeric gradient proves a backward function: move one input by h and see how much the output moves. With
arrays dx, plus and minus of the shape of x, in float64:

    x, dout, h = np.random.randn(2, 3), np.random.randn(2, 3), 1e-5
    gelu_backward(dx, dout, x)
    x[1, 2] += h;      gelu_forward(plus, x)
    x[1, 2] -= 2 * h;  gelu_forward(minus, x)
    assert abs(((plus - minus) * dout).sum() / (2 * h) - dx[1, 2]) < 1e-8

  B batch   T time   C channels   NH heads   HS head size = C / NH   V vocabulary   Vp V padded to a multiple
  of 128   N rows = B * T   L layers   P positions
"""

import time

import numpy as np

# sampling.py is plain NumPy already, without threads or blocks: a second copy of it would explain nothing.
from kernels.sampling import sample  # noqa: F401  one of the operations

# ------------------------------------------------------------------------------------------------------------
# Encoder: each token and its position become one vector


def encoder_forward(out, tokens, wte, wpe, offsets=None):
    """out (B, T, C) = wte[tokens] + wpe[position], for tokens (B, T) int32, wte (Vp, C) and wpe (P, C).

    The position is t in training. In decoding, row b continues at offsets[b]; the padding behind a short row
    may run past the last position, where any vector will do.
    """
    position = np.arange(tokens.shape[1])  # (T,)
    if offsets is not None:
        position = np.minimum(offsets[:, None] + position, len(wpe) - 1)  # (B, T)
    out[...] = wte[tokens] + wpe[position]  # (B, T, C)


def encoder_backward(dwte, dwpe, dout, tokens):
    """Add to dwte (Vp, C) and dwpe (P, C) the gradients of out = wte[tokens] + wpe[t], dout (B, T, C)."""
    np.add.at(dwte, tokens, dout)  # dwte[tokens[b, t]] += dout[b, t], also where a token occurs twice
    dwpe[: tokens.shape[1]] += dout.sum(axis=0)  # (T, C)


def take_rows(out, inp, rows):
    """out (n, C) = inp (N, C)[rows (n,)]; the rows of inp may be a slice of longer rows."""
    out[...] = inp[rows]  # (n, C)


# ------------------------------------------------------------------------------------------------------------
# Layernorm (Ba et al. 2016): every row gets mean 0 and variance 1, and is then scaled and shifted

EPSILON = 1e-5  # GPT-2's layer_norm_epsilon


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """out = (inp - mean) * rstd * weight + bias; out, inp (..., C), mean, rstd (...), weight, bias (C,).

    rstd = 1 / sqrt(variance + EPSILON) is the reciprocal of a row's standard deviation.
    """
    mean[...] = inp.mean(axis=-1)  # (...)
    variance = ((inp - mean[..., None]) ** 2).mean(axis=-1)  # (...)
    rstd[...] = 1 / np.sqrt(variance + EPSILON)  # (...)
    norm = (inp - mean[..., None]) * rstd[..., None]  # (..., C)
    out[...] = norm * weight + bias  # (..., C)


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add to dinp (..., C), dweight (C,) and dbias (C,) the gradients of layernorm_forward.

    With norm = (inp - mean) * rstd and dnorm = dout * weight, the mean and the variance each feed all C
    channels, so each takes back its share:  dinp = rstd * (dnorm - mean(dnorm) - norm * mean(dnorm * norm)).
    """
    norm = (inp - mean[..., None]) * rstd[..., None]  # (..., C), as in the forward pass
    dnorm = dout * weight  # (..., C)
    dweight += as_rows(dout * norm).sum(axis=0)  # (C,)
    dbias += as_rows(dout).sum(axis=0)  # (C,)
    mean_dnorm = dnorm.mean(axis=-1, keepdims=True)  # (..., 1)
    mean_dnorm_norm = (dnorm * norm).mean(axis=-1, keepdims=True)  # (..., 1)
    dinp += rstd[..., None] * (dnorm - mean_dnorm - norm * mean_dnorm_norm)  # (..., C)


def as_rows(array):
    """(..., C) as a matrix of N rows, (N, C)."""
    return array.reshape(-1, array.shape[-1])  # (N, C)


# ------------------------------------------------------------------------------------------------------------
# GELU in its tanh form (Hendrycks and Gimpel 2016), and the residual connection

K, A = (2 / np.pi) ** 0.5, 0.044715


def gelu_forward(out, inp):
    """out = inp / 2 * (1 + tanh(K (inp + A inp^3))), both (..., C)."""
    out[...] = 0.5 * inp * (1 + np.tanh(K * (inp + A * inp**3)))  # (..., C)


def gelu_backward(dinp, dout, inp):
    """dinp = dout * gelu'(inp), all (..., C), where out = gelu(inp); tanh'(u) = 1 - tanh(u)^2."""
    tanh = np.tanh(K * (inp + A * inp**3))  # (..., C), as in the forward pass
    slope = (1 - tanh**2) * K * (1 + 3 * A * inp**2)  # (..., C), of tanh(K (inp + A inp^3))
    dinp[...] = dout * (0.5 * (1 + tanh) + 0.5 * inp * slope)  # (..., C)


def residual_forward(out, inp1, inp2):
    """out = inp1 + inp2, all (..., C). Both gradients are dout itself, so no backward function is needed."""
    out[...] = inp1 + inp2  # (..., C)


# ------------------------------------------------------------------------------------------------------------
# Matmul: nearly all of the arithmetic. I input channels, O output channels


def matmul_forward(out, inp, weight, bias):
    """out (..., O) = inp (..., I) @ weight (I, O) + bias (O,), or without a bias if that is None."""
    out[...] = inp @ weight  # (..., O)
    if bias is not None:
        out += bias  # (..., O)


def matmul_gelu_forward(out, pre, inp, weight, bias):
    """pre (..., O) = inp (..., I) @ weight (I, O) + bias (O,), kept for backward, and out = gelu(pre)."""
    matmul_forward(pre, inp, weight, bias)  # (..., O)
    gelu_forward(out, pre)  # (..., O)


def matmul_residual_forward(out, inp, weight, bias, residual):
    """out (..., O) = residual (..., O) + inp (..., I) @ weight (I, O) + bias (O,). out is not residual."""
    out[...] = residual + inp @ weight + bias  # (..., O)


def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    """The gradients of out = inp @ weight + bias, for dout (..., O); dinp and dbias may be None.

    dinp (..., I) is overwritten; dweight (I, O) and dbias (O,) accumulate the sum over all rows.
    """
    if dinp is not None:
        dinp[...] = dout @ weight.T  # (..., I)
    dweight += as_rows(inp).T @ as_rows(dout)  # (I, O)
    if dbias is not None:
        dbias += as_rows(dout).sum(axis=0)  # (O,)


def matmul_gelu_backward(dpre, dweight, dbias, dout, act, weight, pre):
    """The gradients of out = act @ weight + bias with act = gelu(pre) (..., I), down to dpre (..., I)."""
    matmul_backward(dpre, dweight, dbias, dout, act, weight)  # (..., I), for now the gradient of act
    gelu_backward(dpre, dpre, pre)  # (..., I)


# ------------------------------------------------------------------------------------------------------------
# Attention: every head mixes the values of the positions up to its own


def split_heads(array, n_head):
    """(B, T, C) -> (B, NH, T, HS): each head has its own HS channels."""
    B, T, C = array.shape
    return array.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)


def merge_heads(array):
    """(B, NH, T, HS) -> (B, T, C)."""
    B, NH, T, HS = array.shape
    return array.swapaxes(1, 2).reshape(B, T, NH * HS)


def causal_scores(q, k):
    """q (..., T, HS) and k (..., S, HS), of which q are the last T positions -> scores (..., T, S).

    A position sees itself and what comes before it; a later one gets the score -inf, so no probability:

                        key 0  1  2  3
          query 0           s  -  -  -
                1           s  s  -  -
                2           s  s  s  -
                3           s  s  s  s
    """
    T, S, HS = q.shape[-2], k.shape[-2], k.shape[-1]
    scores = q @ k.swapaxes(-2, -1) / HS**0.5  # (..., T, S)
    seen = np.tri(T, S, S - T, dtype=bool)  # (T, S): key <= query's position
    return np.where(seen, scores, -np.inf)  # (..., T, S)


def log_sum_exp(x):
    """log(sum(exp(x))) over the last axis, which is kept; without the maximum, exp would overflow."""
    highest = x.max(axis=-1, keepdims=True)  # (..., 1)
    return highest + np.log(np.exp(x - highest).sum(axis=-1, keepdims=True))  # (..., 1)


def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))  # (..., n)
    return powers / powers.sum(axis=-1, keepdims=True)  # (..., n)


def attention_forward(out, lse, qkv, n_head):
    """out (B, T, C) = softmax(q k^T / sqrt(HS)) v for every head, from qkv (B, T, 3C), q, k and v in a row.

    lse (B, NH, T), the log of the softmax's denominator, is for backward.
    """
    q, k, v = (split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))  # (B, NH, T, HS) each
    scores = causal_scores(q, k)  # (B, NH, T, T)
    probabilities = softmax(scores)  # (B, NH, T, T)
    out[...] = merge_heads(probabilities @ v)  # (B, T, C)
    lse[...] = log_sum_exp(scores)[..., 0]  # (B, NH, T)


def attention_backward(dqkv, dout, out, lse, qkv, n_head):
    """dqkv (B, T, 3C), overwritten, from dout (B, T, C) and what attention_forward left.

    With out = p v, p = softmax(s) and s = q k^T / sqrt(HS): in a row of softmax every score lowers all other
    probabilities, so  ds = p * (dp - sum(dp * p)).  The sum is also sum(dout * out), which is why the faster
    versions take out.
    """
    q, k, v = (split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))  # (B, NH, T, HS) each
    dout = split_heads(dout, n_head)  # (B, NH, T, HS)
    p = np.exp(causal_scores(q, k) - lse[..., None])  # (B, NH, T, T), the probabilities
    dp = dout @ v.swapaxes(2, 3)  # (B, NH, T, T)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))  # (B, NH, T, T)
    scale = q.shape[-1] ** -0.5  # 1 / sqrt(HS)
    dq = ds @ k * scale  # (B, NH, T, HS)
    dk = ds.swapaxes(2, 3) @ q * scale  # (B, NH, T, HS)
    dv = p.swapaxes(2, 3) @ dout  # (B, NH, T, HS)
    dqkv[...] = np.concatenate([merge_heads(dq), merge_heads(dk), merge_heads(dv)], axis=-1)  # (B, T, 3C)


def attention_decode(out, qkv, keys, values, lengths, empty_cache=False):
    """Attention of T new tokens a row, out (B, T, C) from qkv (B, T, 3C), to a cache of earlier ones.

    Row b has lengths[b] tokens in keys and values (B, NH, Tmax, HS). The new keys and values are written
    behind them, and new token t sees the positions 0 .. lengths[b] + t. empty_cache is a hint that all
    lengths are 0, which a GPU cannot see without waiting.
    """
    T, n_head = qkv.shape[1], keys.shape[1]
    q, k, v = (split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))  # (B, NH, T, HS) each
    for b, start in enumerate(lengths):
        keys[b, :, start : start + T] = k[b]  # (NH, T, HS)
        values[b, :, start : start + T] = v[b]  # (NH, T, HS)
        probabilities = softmax(causal_scores(q[b], keys[b, :, : start + T]))  # (NH, T, start + T)
        mixed = probabilities @ values[b, :, : start + T]  # (NH, T, HS)
        out[b] = merge_heads(mixed[None])[0]  # (T, C)


# ------------------------------------------------------------------------------------------------------------
# Classifier: the one loss of all three stages


def cross_entropy(losses, logits, targets, vocab_size):
    """losses (N,) = -log softmax(logits (N, Vp))[targets (N,)] over vocab_size columns.

    The faster versions use logits as scratch memory, so what they hold afterwards is not defined.
    """
    scores = logits[:, :vocab_size]  # (N, V)
    scores = scores - scores.max(axis=1, keepdims=True)  # (N, V): the same softmax, and smaller numbers
    losses[...] = log_sum_exp(scores)[:, 0] - scores[np.arange(len(targets)), targets]  # (N,)


def classifier(losses, logits, targets, weights, vocab_size):
    """cross_entropy, and logits (N, Vp) become the gradient of sum(weights * losses), weights (N,), in place.

    d loss / d logits = softmax(logits) - onehot(target). The padding never gets probability or gradient.
    """
    cross_entropy(losses, logits, targets, vocab_size)
    dlogits = softmax(logits[:, :vocab_size])  # (N, V)
    dlogits[np.arange(len(targets)), targets] -= 1  # (N,)
    logits[:, :vocab_size] = weights[:, None] * dlogits  # (N, V)
    logits[:, vocab_size:] = 0  # (N, Vp - V)


def weighted_sum(total, values, weights):
    """total (1,) += sum(values * weights), both (N,): the objective, added up over the micro-batches."""
    total += (values * weights).sum()  # (1,)


# ------------------------------------------------------------------------------------------------------------
# Optimizer: over the flat buffers (n,) that hold all parameters


def global_norm(norm, grads):
    """norm (1,) = sqrt(sum(grads^2)), the length of the whole gradient (n,)."""
    norm[...] = np.sqrt((grads**2).sum())  # (1,)


def plan_update(update, steps, norm, loss, settings, beta1, beta2):
    """Decide on the device whether and how adamw updates, so that the host need not wait for norm and loss.

    settings (4,) = [lr, max_norm, norm_limit, loss_limit]; limits may be inf. The step is left out if norm
    (1,) or loss (1,) is not finite or above its limit; otherwise steps (1,) int32 counts it.

    update (4,) = [clip, lr, 1 - beta1^steps, 1 - beta2^steps]: clip scales the gradients down to max_norm, or
    is -1 if the step is left out; the last two correct the bias of moments that began at 0.
    """
    lr, max_norm, norm_limit, loss_limit = map(float, settings)
    norm, loss = float(norm[0]), float(loss[0])
    finite = np.isfinite(norm) and np.isfinite(loss)
    if finite and norm <= norm_limit and loss <= loss_limit:
        steps += 1  # (1,)
        clip = max_norm / norm if norm > max_norm else 1
    else:
        clip = -1
    n = int(steps[0])
    update[...] = clip, lr, 1 - beta1**n, 1 - beta2**n  # (4,)


def adamw(params, grads, m, v, update, beta1, beta2, eps, weight_decay, copy=None):
    """One AdamW step (Loshchilov and Hutter 2019) over params, grads, m and v, all (n,); then clears grads.

    update (4,) is plan_update's: a clip below 0 leaves params, m and v as they are. copy (n,), if given,
    gets params in its own type.
    """
    clip, lr, correction1, correction2 = update
    if clip >= 0:
        g = clip * grads  # (n,)
        m[...] = beta1 * m + (1 - beta1) * g  # (n,), a running mean of the gradient
        v[...] = beta2 * v + (1 - beta2) * g**2  # (n,), and of its square
        direction = (m / correction1) / (np.sqrt(v / correction2) + eps)  # (n,)
        params -= lr * (direction + weight_decay * params)  # (n,)
    grads.fill(0)
    if copy is not None:
        copy[...] = params  # (n,)


# ------------------------------------------------------------------------------------------------------------
# What a device offers besides operations; cpu.py takes it from here

DTYPES = {"float32": np.float32, "float64": np.float64}
LOGITS = 1 << 22  # elements of a chunk of logits, 17 MB in float32
ROUND_TO_EIGHTHS = False  # whether GPT2._weighted_targets rounds the number of tokens up
BATCH_TOKENS, SHARE = 8192, 0.5  # the default micro-batch: at most these tokens, this share of free memory


def zeros(shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def empty(shape, dtype=np.float32):
    return np.empty(shape, dtype)


def to_device(array):
    return np.asarray(array)


def assign(out, array):
    out[...] = array


def to_host(array):
    return np.asarray(array)


def read_later(array):
    """Start a copy to the host, and call the result to wait for it. Here the copy is made at once."""
    copy = array.copy()
    return lambda: copy


def synchronize():
    """Wait until all operations called so far have been computed. Here they always have."""


def now():
    """A mark behind the operations called so far, for elapsed()."""
    return time.perf_counter()


def elapsed(start, end):
    """Seconds from one mark of now() to another."""
    return end - start


def free_memory():
    """Bytes that programs can still allocate, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def replay(recordings, function, *arguments, overlap=False):
    """function(*arguments). A GPU records what it launches, and replays that the next time (gpu.py)."""
    function(*arguments)
