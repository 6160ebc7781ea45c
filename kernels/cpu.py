"""The operations of reference.py, fast on a CPU: blocks that fit the cache, all cores, flash attention.

Read reference.py first: it has the mathematics, the shapes and the order of the functions. A docstring here
says only what is done differently and why. Read threads.py beside this file: `by_rows` and `parallel` share
the blocks of an operation out over the threads, `scratch` is memory that a thread uses again for every block.

Three things make NumPy fast here. A block of rows stays in the cache while several passes go over it, so most
operations work in place (`out=`, `*=`). The BLAS library computes sums too, as products with a vector of
ones. And what follows a matrix product, such as the bias or GELU, is done on each tile of it at once.
"""

import functools

import numpy as np

from kernels import threads
from kernels.reference import (  # noqa: F401  constants, and what a device offers besides fast operations
    BATCH_TOKENS,
    DTYPES,
    EPSILON,
    LOGITS,
    ROUND_TO_EIGHTHS,
    SHARE,
    A,
    K,
    assign,
    elapsed,
    empty,
    now,
    plan_update,
    read_later,
    replay,
    synchronize,
    to_device,
    to_host,
    zeros,
)
from kernels.sampling import sample  # noqa: F401  one of the operations
from kernels.threads import by_rows, free_memory, parallel, pieces, scratch, tiles  # noqa: F401


def column_sums(x):
    """(..., n, C) -> (..., C); vector times matrix is faster than np.sum."""
    return np.ones(x.shape[-2], x.dtype) @ x


def flat(array):
    """(..., C) as rows (N, C); never a copy, because what is written there must arrive."""
    assert array.flags.c_contiguous
    return array.reshape(-1, array.shape[-1])


# ------------------------------------------------------------------------------------------------------------
# Encoder


def encoder_forward(out, tokens, wte, wpe, offsets=None):
    """np.take writes into out; mode="clip" because the default would go through a buffer."""
    T = tokens.shape[1]
    np.take(wte, tokens, axis=0, out=out, mode="clip")  # (B, T, C)
    if offsets is None:
        out += wpe[:T]
    else:
        position = offsets[:, None] + np.arange(T)  # (B, T)
        out += wpe[np.minimum(position, len(wpe) - 1)]


def encoder_backward(dwte, dwpe, dout, tokens):
    """Sorting brings the rows of one token together: each row of dwte is summed once, always in one order."""
    ids = tokens.reshape(-1)  # (N,)
    order = np.argsort(ids, kind="stable")  # (N,)
    unique, starts = np.unique(ids[order], return_index=True)  # (n,) each
    dwte[unique] += np.add.reduceat(flat(dout)[order], starts, axis=0)  # (n, C)
    dwpe[: tokens.shape[1]] += dout.sum(axis=0)  # (T, C)


def take_rows(out, inp, rows):
    np.take(inp, rows, axis=0, out=out, mode="clip")


# ------------------------------------------------------------------------------------------------------------
# Layernorm


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    """Four passes over each block of rows while it is in the cache; out holds inp - mean, then norm."""
    C = inp.shape[-1]
    out, inp, mean, rstd = flat(out), flat(inp), mean.reshape(-1), rstd.reshape(-1)
    ones = np.ones(C, inp.dtype)  # (C,)

    def body(rows):
        y = out[rows]  # (n, C)
        mean[rows] = (inp[rows] @ ones) / C  # (n,)
        np.subtract(inp[rows], mean[rows, None], out=y)
        variance = np.vecdot(y, y) / C  # (n,)
        rstd[rows] = 1 / np.sqrt(variance + EPSILON)
        y *= rstd[rows, None]
        y *= weight
        y += bias

    by_rows(body, len(inp), C)


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    """The sums over rows and over channels are BLAS products; each block has its own sums for dweight and
    dbias, which are added up in order afterwards, so the bits do not depend on the number of threads."""
    C = inp.shape[-1]
    dinp, dout, inp, mean, rstd = flat(dinp), flat(dout), flat(inp), mean.reshape(-1), rstd.reshape(-1)
    blocks = pieces(len(inp), max(1, threads.GRAIN // C))
    dweights = np.empty((len(blocks), C), dweight.dtype)
    dbiases = np.empty((len(blocks), C), dbias.dtype)

    def body(i, rows):
        dy, r = dout[rows], rstd[rows]  # (n, C), (n,)
        centred = np.subtract(inp[rows], mean[rows, None], out=scratch(0, dy.shape, dy.dtype))  # norm / rstd
        dnorm = np.multiply(dy, centred, out=scratch(1, dy.shape, dy.dtype))  # for now dout * norm / rstd
        dweights[i] = r @ dnorm
        dbiases[i] = column_sums(dy)
        mean_dnorm_norm = (dnorm @ weight) * r / C  # (n,)
        mean_dnorm = (dy @ weight) / C  # (n,)
        np.multiply(dy, weight, out=dnorm)  # (n, C)
        centred *= (mean_dnorm_norm * r)[:, None]  # norm * mean(dnorm * norm)
        dnorm -= centred
        dnorm -= mean_dnorm[:, None]
        dnorm *= r[:, None]
        dinp[rows] += dnorm

    parallel(body, enumerate(blocks))
    dweight += dweights.sum(axis=0)
    dbias += dbiases.sum(axis=0)


# ------------------------------------------------------------------------------------------------------------
# GELU and the residual connection

TINY = 1e-20  # vanishes beside any other number, and makes (0 + TINY) / (0 + 2 TINY) = 1/2 of 0 / 0


def _gelu(out, x):
    """out = gelu(x) for one block, in place."""
    np.multiply(x, x, out=out)
    out *= K * A
    out += K
    out *= x  # K (x + A x^3)
    np.tanh(out, out=out)
    out += 1
    out *= x
    out *= 0.5


def _gelu_backward(dx, dout, x, act):
    """dx = dout * gelu'(x) for one block, where act = gelu(x). dx may be dout.

    tanh costs more than everything else, and act has it already: gate = (1 + tanh) / 2 = act / x. So
    gelu'(x) = gate + x gate (1 - gate) 2 K (1 + 3 A x^2) = gate (1 + (x - act) (2 K + 6 K A x^2)).
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
    np.multiply(dout, slope, out=dx)


def gelu_forward(out, inp):
    out, inp = flat(out), flat(inp)

    def body(rows):
        _gelu(out[rows], inp[rows])

    by_rows(body, *inp.shape)


def gelu_backward(dinp, dout, inp):
    dinp, dout, inp = flat(dinp), flat(dout), flat(inp)
    act = np.empty_like(inp)  # (N, C)
    gelu_forward(act, inp)

    def body(rows):
        _gelu_backward(dinp[rows], dout[rows], inp[rows], act[rows])

    by_rows(body, *inp.shape)


def residual_forward(out, inp1, inp2):
    out, inp1, inp2 = flat(out), flat(inp1), flat(inp2)

    def body(rows):
        np.add(inp1[rows], inp2[rows], out=out[rows])

    by_rows(body, *inp1.shape)


# ------------------------------------------------------------------------------------------------------------
# Matmul: a list of tasks, each of which computes one tile of a product. A task is (body, rows, columns), with
# slices, and `_run` calls body(rows, columns). Backward puts its two products into one list, so that no
# thread waits between them.

UNPACKED = 800_000  # multiplications that OpenBLAS does without first copying ("packing") the operands


def _run(tasks):
    def call(body, rows, columns):
        body(rows, columns)

    parallel(call, tasks)


def _product(out, inp, weight, epilogue=None):
    """The tasks for out (N, O) = inp (N, I) @ weight (I, O).

    epilogue(rows, columns), if given, finishes each tile, in blocks that are still in the cache. With 2 to 8
    rows, as in decoding, a tile is cut so narrow that BLAS does not pack it, which takes half the time.
    """
    N, I = inp.shape
    narrow = UNPACKED // (N * I) // 16 * 16  # columns
    few_rows = 2 <= N <= 8 and narrow >= 64  # narrower products are not worth the calls

    def body(rows, columns):
        width = columns.stop - columns.start
        step = narrow if few_rows else width
        for start in range(columns.start, columns.stop, step):
            part = slice(start, min(start + step, columns.stop))
            np.matmul(inp[rows], weight[:, part], out=out[rows, part])
        if epilogue:
            block = max(1, threads.GRAIN // width)
            for start in range(rows.start, rows.stop, block):
                epilogue(slice(start, min(start + block, rows.stop)), columns)

    return [(body, *tile) for tile in tiles(*out.shape)]


def matmul_forward(out, inp, weight, bias):
    out, inp = flat(out), flat(inp)

    def add_bias(rows, columns):
        out[rows, columns] += bias[columns]

    _run(_product(out, inp, weight, None if bias is None else add_bias))


def matmul_gelu_forward(out, pre, inp, weight, bias):
    out, pre, inp = flat(out), flat(pre), flat(inp)

    def add_bias_and_gelu(rows, columns):
        pre[rows, columns] += bias[columns]
        _gelu(out[rows, columns], pre[rows, columns])

    _run(_product(pre, inp, weight, add_bias_and_gelu))


def matmul_residual_forward(out, inp, weight, bias, residual):
    out, inp, residual = flat(out), flat(inp), flat(residual)

    def add_bias_and_residual(rows, columns):
        out[rows, columns] += bias[columns]
        out[rows, columns] += residual[rows, columns]

    _run(_product(out, inp, weight, add_bias_and_residual))


def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    dout, inp = flat(dout), flat(inp)
    tasks = [] if dinp is None else _product(flat(dinp), dout, weight.T)
    _run(tasks + _parameter_gradients(dweight, dbias, dout, inp))


def matmul_gelu_backward(dpre, dweight, dbias, dout, act, weight, pre):
    dpre, dout, act, pre = flat(dpre), flat(dout), flat(act), flat(pre)

    def backward_through_gelu(rows, columns):
        tile = dpre[rows, columns]
        _gelu_backward(tile, tile, pre[rows, columns], act[rows, columns])

    tasks = _product(dpre, dout, weight.T, backward_through_gelu)
    _run(tasks + _parameter_gradients(dweight, dbias, dout, act))


def _parameter_gradients(dweight, dbias, dout, inp):
    """The tasks for dweight (I, O) += inp.T @ dout and dbias (O,) += the column sums of dout (N, O)."""
    left, right = inp, dout
    if not dweight.flags.c_contiguous:  # the classifier's weight is wte.T: compute dweight.T = dout.T @ inp
        dweight, left, right = dweight.T, dout, inp

    def add_product(rows, columns):
        shape = rows.stop - rows.start, columns.stop - columns.start
        product = scratch(0, shape, dweight.dtype)
        dweight[rows, columns] += np.matmul(left[:, rows].T, right[:, columns], out=product)

    def add_column_sums(rows, columns):
        dbias[columns] += column_sums(dout[rows, columns])

    tasks = []
    if dbias is not None:
        tasks.append((add_column_sums, slice(0, len(dout)), slice(0, dout.shape[1])))
    return tasks + [(add_product, *tile) for tile in tiles(*dweight.shape)]


# ------------------------------------------------------------------------------------------------------------
# Attention: flash attention, so no (T, T) matrix exists. The scores lie transposed, keys m by queries n,
# because NumPy reduces faster over the rows of a block than within them.

BLOCK = 128  # keys and queries of a block
SCORES = 1 << 17  # scores of a block, over several sequences and heads: 512 KB in float32, for the L2 cache


def _heads(packed, n, n_head):
    """View packed (B, T, n C) as n arrays (B, NH, T, HS): the heads are read and written where they are."""
    B, T, width = packed.shape
    return packed.reshape(B, T, n, n_head, width // (n * n_head)).transpose(2, 0, 3, 1, 4)


def _head_blocks(B, NH, area):
    """Cut B sequences and NH heads into [(slice of B, slice of NH)] of about SCORES scores, `area` a head."""
    heads = min(NH, max(1, SCORES // area))
    sequences = min(max(1, SCORES // (area * heads)), -(-B // threads.THREADS))
    return [(b, h) for b in pieces(B, sequences) for h in pieces(NH, heads)]


@functools.cache
def _causal_mask(n):
    """(n, n) keys and queries, to be added on the diagonal: -inf where the key is later, else 0."""
    return np.tril(np.full((n, n), -np.inf, np.float32), -1)


def _scores(out, keys, queries, on_diagonal):
    """out (b, h, m, n) = keys (b, h, m, HS) @ queries (b, h, HS, n), masked in the blocks on the diagonal."""
    np.matmul(keys, queries, out=out)
    if on_diagonal:
        out += _causal_mask(out.shape[3])
    return out


def _transposed(array, scale):
    """(b, h, n, HS) -> (b, h, HS, n), scaled: a copy, which BLAS multiplies faster than a transposed view."""
    return np.multiply(array.swapaxes(2, 3), scale, order="C")


def attention_forward(out, lse, qkv, n_head):
    """Online softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022).

    For each block of queries, walk the blocks of keys with a running maximum m and a running sum l of
    exp(s - m), and rescale what has been summed whenever m grows. All that backward needs is
    lse = m + log(l): the probabilities are exp(s - lse).

         keys j  0  1  2  3
    queries i 0  D              D  on the diagonal: computed first, with the causal mask
              1  x  D           x  every query sees every key: no mask
              2  x  x  D           above the diagonal: skipped
              3  x  x  x  D
    """
    B, T, C = out.shape
    q, k, v = _heads(qkv, 3, n_head)  # (B, NH, T, HS) each
    (out,) = _heads(out, 1, n_head)  # (B, NH, T, HS)
    scale = (C // n_head) ** -0.5

    def scores(keys, queries, on_diagonal):
        """Scores (b, h, m, n) that lie as (b, m, h, n): with the heads side by side, sums are faster."""
        b, h, m, n = *keys.shape[:3], queries.shape[3]
        return _scores(scratch(0, (b, m, h, n), qkv.dtype).swapaxes(1, 2), keys, queries, on_diagonal)

    def body(b, h):
        for i in pieces(T, BLOCK):  # n queries
            qi = _transposed(q[b, h, i], scale)  # (b, h, HS, n)
            s = scores(k[b, h, i], qi, on_diagonal=True)  # (b, h, m, n)
            m = s.max(axis=2, keepdims=True)  # (b, h, 1, n)
            s -= m
            np.exp(s, out=s)
            l = column_sums(s)[:, :, None]  # (b, h, 1, n)
            mixed = s.swapaxes(2, 3) @ v[b, h, i]  # (b, h, n, HS), the sum of exp(s - m) * v so far
            for j in pieces(i.start, BLOCK):
                s = scores(k[b, h, j], qi, on_diagonal=False)  # (b, h, m, n)
                new_m = np.maximum(m, s.max(axis=2, keepdims=True))  # (b, h, 1, n)
                s -= new_m
                np.exp(s, out=s)
                rescale = np.exp(m - new_m)  # (b, h, 1, n)
                l = l * rescale + column_sums(s)[:, :, None]
                mixed *= rescale.swapaxes(2, 3)
                mixed += s.swapaxes(2, 3) @ v[b, h, j]
                m = new_m
            np.divide(mixed, l.swapaxes(2, 3), out=out[b, h, i])
            lse[b, h, i] = (m + np.log(l))[:, :, 0]

    parallel(body, _head_blocks(B, n_head, min(T, BLOCK) ** 2))


def attention_backward(dqkv, dout, out, lse, qkv, n_head):
    """The probabilities are computed again, block by block, from the scores and lse. sum(dp * p), over all
    keys, would need a pass of its own; with out = p v and dp = dout v^T it is sum(dout * out), over HS."""
    B, T, C = out.shape
    q, k, v = _heads(qkv, 3, n_head)  # (B, NH, T, HS) each
    dq, dk, dv = _heads(dqkv, 3, n_head)  # (B, NH, T, HS) each
    (out,), (dout,) = _heads(out, 1, n_head), _heads(dout, 1, n_head)  # (B, NH, T, HS)
    scale = (C // n_head) ** -0.5

    def body(b, h):
        qs, do = _transposed(q[b, h], scale), _transposed(dout[b, h], scale)  # (b, h, HS, T)
        rowsum = np.vecdot(dout[b, h], out[b, h]) * scale  # (b, h, T), sum(dp * p), with the scale of ds
        for j in pieces(T, BLOCK):  # m keys
            kj, vj = k[b, h, j], v[b, h, j]  # (b, h, m, HS)
            for i in pieces(T, BLOCK)[j.start // BLOCK :]:  # n queries, in the keys' own block and after it
                shape = (*kj.shape[:3], i.stop - i.start)  # (b, h, m, n), of p^T and ds^T
                p = _scores(scratch(0, shape, qkv.dtype), kj, qs[..., i], on_diagonal=i == j)
                p -= lse[b, h, None, i]
                np.exp(p, out=p)
                ds = np.matmul(vj, do[..., i], out=scratch(1, shape, qkv.dtype))  # dp, scaled
                ds -= rowsum[:, :, None, i]
                ds *= p
                _add_product(dv[b, h, j], p, dout[b, h, i], first=i == j)
                _add_product(dk[b, h, j], ds, q[b, h, i], first=i == j)
                _add_product(dq[b, h, i], ds.swapaxes(2, 3), kj, first=j.start == 0)

    parallel(body, _head_blocks(B, n_head, min(T, BLOCK) ** 2))


def _add_product(out, left, right, first):
    """out += left @ right, or out = left @ right for the first one, because out is overwritten."""
    if first:
        np.matmul(left, right, out=out)
    else:
        out += left @ right


def attention_decode(out, qkv, keys, values, lengths, empty_cache=False):
    """Several rows and heads at once, so up to the longest row's keys, with a mask for the shorter rows."""
    B, T, C = out.shape
    NH, Tmax = keys.shape[1:3]
    assert lengths.max() + T <= Tmax
    q, k, v = _heads(qkv, 3, NH)  # (B, NH, T, HS) each
    (out,) = _heads(out, 1, NH)  # (B, NH, T, HS)
    positions = lengths[:, None] + np.arange(T)  # (B, T), of the new tokens
    keys[np.arange(B)[:, None], :, positions] = k.swapaxes(1, 2)  # (B, T, NH, HS)
    values[np.arange(B)[:, None], :, positions] = v.swapaxes(1, 2)
    scale = (C // NH) ** -0.5

    def body(b, h):
        for i in pieces(T, BLOCK):  # n queries
            seen = positions[b, i].max() + 1  # keys that any of these queries sees
            s = (q[b, h, i] * scale) @ keys[b, h, :seen].swapaxes(2, 3)  # (b, h, n, seen)
            hidden = np.arange(seen) > positions[b, i, None]  # (b, n, seen)
            if hidden.any():
                np.copyto(s, -np.inf, where=hidden[:, None])
            s -= s.max(axis=3, keepdims=True)
            np.exp(s, out=s)
            s /= s.sum(axis=3, keepdims=True)
            np.matmul(s, values[b, h, :seen], out=out[b, h, i])

    parallel(body, _head_blocks(B, NH, min(T, BLOCK) * int(lengths.max() + T)))


# ------------------------------------------------------------------------------------------------------------
# Classifier


def _losses(losses, logits, targets):
    """Fill losses (n,); logits (n, V) become exp(logits - max) in place, whose row sums (n,) are returned."""
    picked = np.arange(len(logits)), targets
    logits -= logits.max(axis=1, keepdims=True)
    target = logits[picked]  # (n,)
    total = np.exp(logits, out=logits).sum(axis=1)  # (n,)
    losses[:] = np.log(total) - target
    return total


def cross_entropy(losses, logits, targets, vocab_size):
    """logits are scratch memory: there is no second array of their size."""

    def body(rows):
        _losses(losses[rows], logits[rows, :vocab_size], targets[rows])

    by_rows(body, *logits.shape)


def classifier(losses, logits, targets, weights, vocab_size):
    def body(rows):
        z, w = logits[rows, :vocab_size], weights[rows]  # (n, V), (n,)
        total = _losses(losses[rows], z, targets[rows])
        z *= (w / total)[:, None]
        z[np.arange(len(z)), targets[rows]] -= w
        logits[rows, vocab_size:] = 0

    by_rows(body, *logits.shape)


def weighted_sum(total, values, weights):
    """One BLAS call on one thread: the order of the sum is always the same."""
    total += np.dot(values, weights)


# ------------------------------------------------------------------------------------------------------------
# Optimizer. plan_update is reference.py's: it computes four numbers


def global_norm(norm, grads):
    """The sums of squares of blocks are added up in order, in float64."""
    blocks = pieces(len(grads), threads.TILE)
    squares = np.empty(len(blocks))

    def body(i, block):
        squares[i] = np.dot(grads[block], grads[block])

    parallel(body, enumerate(blocks))
    norm[0] = np.sqrt(squares.sum())


def adamw(params, grads, m, v, update, beta1, beta2, eps, weight_decay, copy=None):
    """In blocks that stay in the cache, with the gradients as scratch memory, since they are cleared anyway.

    Multiplying numerator and denominator of the update by sqrt(correction2) saves the pass that divides v:
    m / correction1 / (sqrt(v / correction2) + eps) = m / (sqrt(v) + eps root) * root / correction1.
    """
    clip, lr, correction1, correction2 = map(float, update)
    root = correction2**0.5

    def body(block):
        p, g, m1, v1 = params[block], grads[block], m[block], v[block]  # (n,) each
        if clip >= 0:
            g *= clip * (1 - beta1)  # (1 - beta1) g
            m1 *= beta1
            m1 += g
            g *= g
            g *= (1 - beta2) / (1 - beta1) ** 2  # (1 - beta2) g^2
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
