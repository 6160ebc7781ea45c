"""Every operation of GPT-2 in NumPy, forward and backward: the reference that the CUDA kernels are held to.

Read this before gpt2.py, which strings these functions together, and before the .cu files, which do the same
on a GPU. Each backward function stands under its forward function, takes the same arrays with a `d` for the
gradients, and restates the line that it differentiates. Outputs come first and are allocated by the caller.

  B batch   T time   C channels   NH heads   HS head size = C / NH   V vocabulary   Vp padded V   N = B * T
  rows

Gradients of parameters accumulate (+=), so that a large batch can be walked in pieces. Gradients of
activations are overwritten, except in layernorm_backward, which adds to the gradient of the residual stream.
"""

import functools
import time

import numpy as np

from kernels import threads
from kernels.sampling import sample  # noqa: F401  one of the operations
from kernels.threads import by_rows, parallel, pieces, scratch, tiles

xp = np  # the array library; cupy in cuda.py
DTYPES = {"float32": np.float32, "float64": np.float64}
LOGITS = 1 << 22  # elements of a chunk of logits
BATCH_TOKENS, SHARE = 8192, 0.5  # a micro-batch by default: at most these tokens, this part of the memory
SCORES = 1 << 17  # elements of a block of attention scores
BLOCK = 128  # rows and columns of a block of attention scores
FEW = 800_000  # multiplications that OpenBLAS does without packing the operands: with few rows, twice as fast


def zeros(shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def empty(shape, dtype=np.float32):
    return np.empty(shape, dtype)


def to_device(array):
    return np.asarray(array)


def to_host(array):
    return np.asarray(array)


def read_later(array):
    """A function that returns what the array holds now; a GPU goes on, and the function waits for it."""
    copy = array.copy()
    return lambda: copy


def synchronize():
    """Wait until everything asked for has been computed. Here it always has."""


def now():
    """The end of what has been asked for so far, for elapsed()."""
    return time.perf_counter()


def elapsed(start, end):
    """How long what was asked for between two now() took to compute."""
    return end - start


def free_memory():
    """Bytes that programs can still have, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def captured(function):
    """`function`, which uses the same arrays every time. A GPU would record it, and play the recording."""
    return function


def row_sums(x):
    """(n, C) -> (n,), by the BLAS library's matrix times vector, which is faster than np.sum."""
    return x @ np.ones(x.shape[1], x.dtype)


def column_sums(x):
    """(..., n, C) -> (..., C)."""
    return np.ones(x.shape[-2], x.dtype) @ x


def flat(array):
    """(..., C) as rows (N, C); never a copy, because what is written there must arrive."""
    assert array.flags.c_contiguous
    return array.reshape(-1, array.shape[-1])


# ------------------------------------------------------------------------------------------------------------
# Encoder: token and position become one vector


def encoder_forward(out, tokens, wte, wpe, offsets=None):
    """out (B, T, C) = wte[tokens] + wpe[position]; position is t, or offsets (B,) + t while decoding."""
    T = tokens.shape[1]
    np.take(
        wte, tokens, axis=0, out=out, mode="clip"
    )  # (B, T, C); "clip" because "raise" would buffer a copy
    if offsets is None:
        out += wpe[:T]
    else:
        position = offsets[:, None] + np.arange(T)  # (B, T); padding behind a short row may run over the end
        out += wpe[np.minimum(position, len(wpe) - 1)]


def encoder_backward(dwte, dwpe, dout, tokens):
    """Add to dwte (Vp, C) and dwpe (P, C) the gradients of out = wte[tokens] + wpe[t]; dout is (B, T, C).

    Sorting the tokens brings the rows of one token together, to be added up in order: every row of dwte has
    one writer, so the sum has one order.
    """
    ids = tokens.reshape(-1)  # (N,)
    order = np.argsort(ids, kind="stable")  # (N,)
    unique, starts = np.unique(ids[order], return_index=True)
    dwte[unique] += np.add.reduceat(flat(dout)[order], starts, axis=0)
    dwpe[: tokens.shape[1]] += dout.sum(axis=0)


def take_rows(out, inp, rows):
    """out (n, C) = inp (N, C)[rows (n,)]; the rows of inp may lie further apart than they are long."""
    np.take(inp, rows, axis=0, out=out, mode="clip")


# ------------------------------------------------------------------------------------------------------------
# Layernorm (Ba et al. 2016): every row to mean 0 and variance 1, then scaled and shifted

EPSILON = 1e-5  # GPT-2's


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """out = (inp - mean) * rstd * weight + bias; out, inp (..., C), mean, rstd (...), weight, bias (C,)."""
    C = inp.shape[-1]
    out, inp, mean, rstd = flat(out), flat(inp), mean.reshape(-1), rstd.reshape(-1)

    def body(rows):
        y = out[rows]  # (n, C), also the scratch space
        mean[rows] = row_sums(inp[rows]) / C
        np.subtract(inp[rows], mean[rows, None], out=y)
        variance = np.vecdot(y, y) / C  # (n,)
        rstd[rows] = 1 / np.sqrt(variance + EPSILON)
        y *= rstd[rows, None]
        y *= weight
        y += bias

    by_rows(body, len(inp), C)


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """Add to dinp (..., C), dweight (C,) and dbias (C,) the gradients of layernorm_forward.

    With norm = (inp - mean) * rstd and dnorm = dout * weight: mean and variance each feed all C channels, so
    each takes back its share:  dinp = rstd * (dnorm - mean(dnorm) - norm * mean(dnorm * norm)).
    """
    C = inp.shape[-1]
    dinp, dout, inp, mean, rstd = flat(dinp), flat(dout), flat(inp), mean.reshape(-1), rstd.reshape(-1)
    blocks = pieces(len(inp), max(1, threads.GRAIN // C))
    dweights = np.empty((len(blocks), C), dweight.dtype)  # each block's share, to be added up in order
    dbiases = np.empty((len(blocks), C), dbias.dtype)

    def body(i, rows):
        do = dout[rows]  # (n, C)
        x = np.subtract(inp[rows], mean[rows, None], out=scratch(0, do.shape, do.dtype))  # norm / rstd
        dnorm = np.multiply(do, x, out=scratch(1, do.shape, do.dtype))  # for now without weight, times x
        dweights[i], dbiases[i] = rstd[rows] @ dnorm, column_sums(do)
        shared = (dnorm @ weight) * rstd[rows] / C  # (n,) mean(dnorm * norm)
        np.multiply(do, weight, out=dnorm)  # (n, C)
        x *= (shared * rstd[rows])[:, None]  # norm * shared
        dnorm -= x
        dnorm -= ((do @ weight) / C)[:, None]  # mean(dnorm)
        dnorm *= rstd[rows, None]
        dinp[rows] += dnorm

    parallel(body, enumerate(blocks))
    dweight += dweights.sum(axis=0)
    dbias += dbiases.sum(axis=0)


# ------------------------------------------------------------------------------------------------------------
# GELU in its tanh form (Hendrycks and Gimpel 2016): gelu(x) = x/2 (1 + tanh(k (x + a x^3)))

K, A = 0.7978845608028654, 0.044715  # k = sqrt(2 / pi)
TINY = 1e-20  # lost beside any other number, but it makes 0 / 0 the 1/2 that it should be


def _gelu(out, x):
    """out = gelu(x), a block at a time."""
    np.multiply(x, x, out=out)
    out *= K * A
    out += K
    out *= x  # k (x + a x^3)
    np.tanh(out, out=out)
    out += 1
    out *= x
    out *= 0.5


def _times_gelu_derivative(out, dout, x, act):
    """out = dout * gelu'(x), a block at a time, with act = gelu(x) and the gate act / x = (1 + tanh)/2:

    gelu'(x) = gate + x gate (1 - gate) 2 k (1 + 3 a x^2) = gate (1 + (x - act) 2 k (1 + 3 a x^2))
    """
    slope, gate, other = (scratch(i, x.shape, x.dtype) for i in range(3))
    np.add(act, TINY, out=gate)
    gate /= np.add(x, 2 * TINY, out=other)
    np.multiply(x, x, out=slope)
    slope *= 6 * K * A
    slope += 2 * K
    slope *= np.subtract(x, act, out=other)
    slope += 1
    slope *= gate
    np.multiply(dout, slope, out=out)


def gelu_forward(out, inp):
    """out (..., C) = gelu(inp)."""
    out, inp = flat(out), flat(inp)
    by_rows(lambda rows: _gelu(out[rows], inp[rows]), *inp.shape)


def gelu_backward(dinp, dout, inp):
    """dinp (..., C) = dout * gelu'(inp), where out = gelu(inp)."""
    dinp, dout, inp = flat(dinp), flat(dout), flat(inp)
    act = np.empty_like(inp)
    gelu_forward(act, inp)
    by_rows(lambda rows: _times_gelu_derivative(dinp[rows], dout[rows], inp[rows], act[rows]), *inp.shape)


def residual_forward(out, inp1, inp2):
    """out = inp1 + inp2, all (..., C). Backward, both get dout as it is, so there is no function for it."""
    out, inp1, inp2 = flat(out), flat(inp1), flat(inp2)
    by_rows(lambda rows: np.add(inp1[rows], inp2[rows], out=out[rows]), *inp1.shape)


# ------------------------------------------------------------------------------------------------------------
# Matmul: where the time goes


def _product(out, inp, weight, finish=None):
    """Work for `parallel`, [(body, row slice, column slice)]: out (N, out) = inp (N, in) @ weight (in, out).

    finish(rows, columns) is called on every tile, in blocks still warm.
    """

    n, k = inp.shape
    narrow = FEW // (n * k) // 16 * 16 if 2 <= n <= 8 else 0  # columns at once, if that is worth the calls

    def body(rows, columns):
        step = narrow if narrow >= 64 else columns.stop - columns.start
        for start in range(columns.start, columns.stop, step):
            block = slice(start, min(start + step, columns.stop))
            np.matmul(inp[rows], weight[:, block], out=out[rows, block])
        if finish:
            for block in pieces(
                rows.stop - rows.start, max(1, threads.GRAIN // (columns.stop - columns.start))
            ):
                finish(slice(rows.start + block.start, rows.start + block.stop), columns)

    return [(body, *tile) for tile in tiles(*out.shape)]


def _run(work):
    parallel(lambda body, rows, columns: body(rows, columns), work)


def matmul_forward(out, inp, weight, bias):
    """out (..., out) = inp (..., in) @ weight (in, out) + bias (out,) or None."""
    out, inp = flat(out), flat(inp)

    def finish(rows, columns):
        if bias is not None:
            out[rows, columns] += bias[columns]

    _run(_product(out, inp, weight, finish))


def matmul_gelu_forward(out, pre, inp, weight, bias):
    """pre (..., out) = inp (..., in) @ weight + bias, which backward needs, and out = gelu(pre)."""
    out, pre, inp = flat(out), flat(pre), flat(inp)

    def finish(rows, columns):
        pre[rows, columns] += bias[columns]
        _gelu(out[rows, columns], pre[rows, columns])

    _run(_product(pre, inp, weight, finish))


def matmul_residual_forward(out, inp, weight, bias, residual):
    """out (..., out) = residual (..., out) + inp (..., in) @ weight + bias. out must not be residual."""
    out, inp, residual = flat(out), flat(inp), flat(residual)

    def finish(rows, columns):
        out[rows, columns] += bias[columns]
        out[rows, columns] += residual[rows, columns]

    _run(_product(out, inp, weight, finish))


def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    """The gradients of out = inp @ weight + bias.

    dinp (..., in) = dout (..., out) @ weight.T is overwritten; dweight (in, out) += inp.T @ dout; dbias
    (out,) += the sum of dout over the rows. dinp and dbias may be None.
    """
    dx = [] if dinp is None else _product(flat(dinp), flat(dout), weight.T)
    _run(dx + _parameter_gradients(dweight, dbias, flat(dout), flat(inp)))


def _parameter_gradients(dweight, dbias, dout, inp):
    """What `parallel` is to do for dweight += inp.T @ dout and dbias += the column sums of dout."""
    left, right = inp, dout
    if not dweight.flags.c_contiguous:  # the classifier's weight is wte.T: the transposed product then
        dweight, left, right = dweight.T, dout, inp

    def body(rows, columns):
        shape = rows.stop - rows.start, columns.stop - columns.start
        product = scratch(0, shape, dweight.dtype)
        dweight[rows, columns] += np.matmul(left[:, rows].T, right[:, columns], out=product)

    def bias(rows, columns):
        dbias[columns] += column_sums(dout[rows, columns])

    everywhere = slice(0, len(dout)), slice(0, dout.shape[1])
    biases = [] if dbias is None else [(bias, *everywhere)]
    return biases + [(body, *tile) for tile in tiles(*dweight.shape)]


def matmul_gelu_backward(dpre, dweight, dbias, dout, act, weight, pre):
    """The gradients of out = act @ weight + bias with act = gelu(pre), down to pre.

    dpre (..., in) = (dout @ weight.T) * gelu'(pre) is overwritten; dweight and dbias as in matmul_backward.
    """
    dpre, dout, act, pre = flat(dpre), flat(dout), flat(act), flat(pre)

    def finish(rows, columns):
        d = dpre[rows, columns]
        _times_gelu_derivative(d, d, pre[rows, columns], act[rows, columns])

    _run(_product(dpre, dout, weight.T, finish) + _parameter_gradients(dweight, dbias, dout, act))


# ------------------------------------------------------------------------------------------------------------
# Attention: softmax(q k^T / sqrt(HS)) v for every head, each position looking back only


def _heads(packed, n, n_head):
    """View packed (B, T, n C) as n arrays (B, NH, T, HS): the heads are read and written where they are."""
    B, T, width = packed.shape
    return packed.reshape(B, T, n, n_head, width // (n * n_head)).transpose(2, 0, 3, 1, 4)


def _shares(B, NH, area):
    """Cut B rows and NH heads into (row slice, head slice) pairs with about SCORES scores of `area` each."""
    heads = min(NH, max(1, SCORES // area))
    rows = max(1, SCORES // (area * heads))
    return [(b, h) for b in pieces(B, min(rows, -(-B // threads.THREADS))) for h in pieces(NH, heads)]


@functools.cache
def _causal(n):
    """(n, n) keys and queries: what is added on the diagonal, -inf where the key comes later."""
    return np.tril(np.full((n, n), -np.inf, np.float32), -1)


def _scores(queries, keys, diagonal, side_by_side=False):
    """Keys (b, h, m, HS) times queries (b, h, HS, n) -> (b, h, m, n): NumPy sums faster down than across.

    With the heads side by side in memory, (b, m, h, n), it is faster still, but the products are slower.
    """
    b, h, m, n = *keys.shape[:3], queries.shape[3]
    shape = (b, m, h, n) if side_by_side else (b, h, m, n)
    s = scratch(0, shape, queries.dtype)
    s = np.matmul(keys, queries, out=s.swapaxes(1, 2) if side_by_side else s)
    if diagonal:
        s += _causal(n)
    return s


def _upright(array, scale):
    """A copy of (b, h, n, HS), scaled, as (b, h, HS, n): BLAS takes it faster than a transposed view."""
    return np.multiply(array.swapaxes(2, 3), scale, order="C")


def attention_forward(out, lse, qkv, n_head):
    """out (B, T, C) = softmax(q k^T / sqrt(HS), no later positions) v, from packed qkv (B, T, 3C).

    Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022): walk the keys in blocks
    with a running maximum m and a running sum l, and rescale what has been added up whenever m grows. All
    that backward needs is lse (B, NH, T) = m + log(l): then softmax is exp(score - lse). The blocks above
    the diagonal are skipped.
    """
    B, T, C = out.shape
    q, k, v = _heads(qkv, 3, n_head)  # (B, NH, T, HS) each
    (out,) = _heads(out, 1, n_head)
    scale = (C // n_head) ** -0.5

    def body(b, h):
        for i in pieces(T, BLOCK):  # queries i, n of them; their own block of keys first
            qi = _upright(q[b, h, i], scale)  # (b, h, HS, n)
            s = _scores(qi, k[b, h, i], diagonal=True, side_by_side=True)  # (b, h, m, n)
            m = s.max(axis=2, keepdims=True)  # (b, h, 1, n)
            s -= m
            total = column_sums(np.exp(s, out=s))[:, :, None]  # l, (b, h, 1, n)
            mixed = s.swapaxes(2, 3) @ v[b, h, i]  # (b, h, n, HS), the values added up so far
            for j in pieces(i.start, BLOCK):  # then the blocks of keys before it
                s = _scores(qi, k[b, h, j], diagonal=False, side_by_side=True)
                higher = np.maximum(m, s.max(axis=2, keepdims=True))
                s -= higher
                np.exp(s, out=s)
                shrink = np.exp(m - higher)
                total = total * shrink + column_sums(s)[:, :, None]
                mixed *= shrink.swapaxes(2, 3)
                mixed += s.swapaxes(2, 3) @ v[b, h, j]
                m = higher
            np.divide(mixed, total.swapaxes(2, 3), out=out[b, h, i])
            lse[b, h, i] = (m + np.log(total))[:, :, 0]

    parallel(body, _shares(B, n_head, min(T, BLOCK) ** 2))


def _put(out, left, right, first):
    """out = left @ right, or, if it is not the first, out += left @ right."""
    if first:
        np.matmul(left, right, out=out)
    else:
        out += left @ right


def attention_backward(dqkv, dout, out, lse, qkv, n_head):
    """dqkv (B, T, 3C), overwritten, from dout (B, T, C) and what attention_forward left.

    With p = softmax(s), s = q k^T / sqrt(HS), out = p v:  dv = p^T dout,  dp = dout v^T,
    ds = p * (dp - rowsum(dp * p)), and rowsum(dp * p) = rowsum(dout * out);
    dq = ds k,  dk = ds^T q, both scaled.
    """
    B, T, C = out.shape
    q, k, v = _heads(qkv, 3, n_head)  # (B, NH, T, HS) each
    dq, dk, dv = _heads(dqkv, 3, n_head)
    (out,), (dout,) = _heads(out, 1, n_head), _heads(dout, 1, n_head)
    scale = (C // n_head) ** -0.5

    def body(b, h):
        qs, do = _upright(q[b, h], scale), _upright(dout[b, h], scale)  # (b, h, HS, T)
        rowsum = np.vecdot(dout[b, h], out[b, h]) * scale  # (b, h, T)
        for j in pieces(T, BLOCK):  # keys j, m of them
            kj, vj = k[b, h, j], v[b, h, j]  # (b, h, m, HS)
            for i in pieces(T, BLOCK)[j.start // BLOCK :]:  # queries i, at or after j, n of them
                p = _scores(qs[..., i], kj, diagonal=j == i)  # (b, h, m, n), as all here: p^T, ds^T
                p -= lse[b, h, None, i]
                np.exp(p, out=p)
                ds = np.matmul(vj, do[..., i], out=scratch(1, p.shape, p.dtype))  # dp, then ds, scaled
                ds -= rowsum[:, :, None, i]
                ds *= p
                _put(dv[b, h, j], p, dout[b, h, i], first=j == i)
                _put(dk[b, h, j], ds, q[b, h, i], first=j == i)
                _put(dq[b, h, i], ds.swapaxes(2, 3), kj, first=j.start == 0)

    parallel(body, _shares(B, n_head, min(T, BLOCK) ** 2))


def attention_decode(out, qkv, keys, values, lengths, empty_cache=False):
    """Attention of T new tokens a row, out (B, T, C) from qkv (B, T, 3C), to a cache of earlier ones.

    Row b has lengths[b] tokens in keys and values (B, NH, Tmax, HS). The new keys and values are written
    behind them, and query t sees positions 0 .. lengths[b] + t. Rows may have different lengths.
    empty_cache: they are all 0, as the host may know; on a GPU a prompt is ordinary causal attention then.
    """
    B, T, C = out.shape
    NH, Tmax = keys.shape[1:3]
    assert lengths.max() + T <= Tmax
    q, k, v = _heads(qkv, 3, NH)  # (B, NH, T, HS) each
    (out,) = _heads(out, 1, NH)
    last = lengths[:, None] + np.arange(T)  # (B, T): the position of every new token
    keys[np.arange(B)[:, None], :, last] = k.swapaxes(1, 2)
    values[np.arange(B)[:, None], :, last] = v.swapaxes(1, 2)
    scale = (C // NH) ** -0.5

    def body(b, h):
        for i in pieces(T, BLOCK):
            seen = last[b, i].max() + 1  # keys that any of these queries sees
            s = (q[b, h, i] * scale) @ keys[b, h, :seen].swapaxes(2, 3)  # (b, h, n, seen)
            hidden = np.arange(seen) > last[b, i, None]  # (b, n, seen)
            if hidden.any():
                np.copyto(s, -np.inf, where=hidden[:, None])
            s -= s.max(axis=3, keepdims=True)
            np.exp(s, out=s)
            s /= s.sum(axis=3, keepdims=True)
            np.matmul(s, values[b, h, :seen], out=out[b, h, i])

    parallel(body, _shares(B, NH, min(T, BLOCK) * int(lengths.max() + T)))


# ------------------------------------------------------------------------------------------------------------
# Classifier: the one loss of all three stages


def _losses(losses, logits, targets, rows, vocab_size):
    """Fill losses[rows]; return z = exp(logits - max) (n, V), in place, the targets in it, its row sums."""
    z = logits[rows, :vocab_size]
    picked = np.arange(len(z)), targets[rows]
    z -= z.max(axis=1, keepdims=True)
    target = z[picked]
    total = np.exp(z, out=z).sum(axis=1)
    losses[rows] = np.log(total) - target
    return z, picked, total


def cross_entropy(losses, logits, targets, vocab_size):
    """losses (N,) = -log softmax(logits (N, Vp))[targets (N,)], over vocab_size columns. Spoils logits."""
    by_rows(lambda rows: _losses(losses, logits, targets, rows, vocab_size), *logits.shape)


def classifier(losses, logits, targets, weights, vocab_size):
    """cross_entropy, and logits (N, Vp) become the gradient of sum(weights * losses) in place.

    d loss / d logits = softmax(logits) - onehot(target). The padding columns never get probability or
    gradient.
    """

    def body(rows):
        z, picked, total = _losses(losses, logits, targets, rows, vocab_size)
        z *= (weights[rows] / total)[:, None]
        z[picked] -= weights[rows]
        logits[rows, vocab_size:] = 0

    by_rows(body, *logits.shape)


def weighted_sum(total, values, weights):
    """total (1,) += sum of values (N,) * weights (N,)."""
    total += np.dot(values, weights)


# ------------------------------------------------------------------------------------------------------------
# Optimizer: over the flat buffers that hold all parameters


def global_norm(norm, grads):
    """norm (1,) = sqrt(sum of squares) of the flat gradients, block sums added up in order in float64."""
    blocks = pieces(len(grads), threads.TILE)
    squares = np.empty(len(blocks))

    def body(i, block):
        squares[i] = np.dot(grads[block], grads[block])

    parallel(body, enumerate(blocks))
    norm[0] = np.sqrt(squares.sum())


def plan_update(update, steps, norm, loss, settings, beta1, beta2):
    """update (4,) = [clip, lr, 1 - beta1^steps, 1 - beta2^steps]; steps (1,) += 1 if the step is taken.

    settings (4,) = [lr, max_norm, norm_limit, loss_limit]. clip = min(1, max_norm / norm), or -1 (leave the
    step out) if norm (1,) or loss (1,) is not finite or above its limit.
    """
    lr, max_norm, norm_limit, loss_limit = settings
    finite = np.isfinite(norm[0]) and np.isfinite(loss[0])
    taken = finite and norm[0] <= norm_limit and loss[0] <= loss_limit
    steps[0] += taken
    update[0] = min(1, max_norm / max(norm[0], 1e-30)) if taken else -1
    update[1:] = lr, 1 - beta1 ** int(steps[0]), 1 - beta2 ** int(steps[0])


def adamw(params, grads, m, v, update, beta1, beta2, eps, weight_decay, copy=None):
    """One AdamW step (Loshchilov and Hutter 2019) over flat arrays; then the gradients are cleared.

    update (4,) = [clip, lr, 1 - b1^steps, 1 - b2^steps] comes from plan_update. With g = clip * grads:
    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
    params -= lr * (m / (1 - b1^steps) / (sqrt(v / (1 - b2^steps)) + eps) + weight_decay * params)
    A negative clip leaves params, m and v as they are. copy, if given, gets the new params in its own type.
    """
    clip, lr, correction1, correction2 = (float(number) for number in update)
    root = correction2**0.5

    def body(block):
        p, g, m1, v1 = params[block], grads[block], m[block], v[block]
        if clip >= 0:
            g *= clip * (1 - beta1)  # (1 - b1) g
            m1 *= beta1
            m1 += g
            g *= g
            g *= (1 - beta2) / (1 - beta1) ** 2  # (1 - b2) g^2
            v1 *= beta2
            v1 += g
            np.sqrt(v1, out=g)
            g += eps * root
            np.divide(m1, g, out=g)
            g *= lr * root / correction1
            p *= 1 - lr * weight_decay
            p -= g
        g.fill(0)
        if copy is not None:
            copy[block] = p

    by_rows(body, len(params), 1)
