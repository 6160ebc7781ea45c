"""The kernels bound by memory, against NumPy: layernorm, gelu, encoder, classifier, norm, adamw, sample.

The reference is kernels/cpu.py in float64, on operands rounded to their storage type. Every launch follows
the table at the top of its .cu file. Outputs and workspaces hold NaN before a launch, sizes are odd on
purpose, first versions get misaligned arrays too, and everything is computed twice and must give the same
bits. test_cuda.py tests that cuda.py launches a first version where rows are not aligned. In the emulator, or
on a GPU where there is one (tests/card.py).
"""

import card
import ml_dtypes
import numpy as np
import pytest

from kernels import cpu, sampling

cuda = card.cuda()
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
NAMES = {F32: "float", BF16: "bf16"}
CHANNELS = [1, 7, 33, 48, 768, 1000]
both_dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=NAMES.get)
VERSIONS = [("_naive", 1), ("", 0)]  # of a kernel's name, and how far its arrays are from a 16-byte boundary
both_versions = pytest.mark.parametrize("version, shift", VERSIONS, ids=["naive", "fast"])


def cdiv(a, b):
    return -(-a // b)


def launch(file, name, grid, block, *arguments, shared=0):
    """Python's ints and floats go as C's int and float, arrays and None as pointers."""
    cuda.launch(file.removesuffix(".cu"), name, grid, block, *arguments, shared=shared)


def device(array, shift=0):
    """The array in device memory, `shift` elements behind a 16-byte boundary."""
    flat = np.concatenate([np.zeros(shift, array.dtype), array.reshape(-1)])
    return cuda.to_device(flat)[shift:].reshape(array.shape)


def empty(shape, dtype, shift=0):
    """Device memory full of NaN."""
    return card.empty(int(np.prod(shape)) + shift, dtype)[shift:].reshape(shape)


def random(seed, shape, dtype, scale=1.0, shift=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale + shift).astype(dtype)


def rows_are_aligned(C, dtype):
    return C * dtype.itemsize % 16 == 0


def wide(*arrays):
    return [np.array(array, np.float64) for array in arrays]


def twice(compute):
    """compute() returns device arrays; their bits must be the same each time. Returns them as host arrays."""
    first, second = ([array.get() for array in compute()] for _ in range(2))
    assert [array.tobytes() for array in first] == [array.tobytes() for array in second]
    return first


def check(result, expected, terms=0.0):
    """Every element is right to twice the rounding of bf16, or to 1e-5, and to 1e-6 of the largest term.

    Twice the rounding is stricter than HOPPER.md's twice the error of a naive bf16 implementation. `terms` is
    the size of what cancels on the way, if that is larger than the results.
    """
    relative = 1e-5 if result.dtype == F32 else 2**-8
    result = result.astype(np.float64)
    assert result.shape == expected.shape
    bound = relative * np.abs(expected) + 1e-6 * max(terms, np.abs(expected).max()) + 1e-30
    np.testing.assert_array_less(np.abs(result - expected), bound)


# ------------------------------------------------------------------------------------------------------------
# gelu.cu


@both_dtypes
@both_versions
def test_gelu_and_residual(dtype, version, shift):
    for n in 1, 7, 4095, 4096, 9001:
        x, y = random(1, n, dtype, 3), random(2, n, dtype)
        block = cdiv(n, 256) if version else cdiv(n, 256 * 2 * (16 // dtype.itemsize))

        def compute(name, *inputs, n=n, grid=block):
            def run():
                out, arrays = empty(n, dtype, shift), [device(array, shift) for array in inputs]
                launch("gelu.cu", f"{name}{version}<{NAMES[dtype]}>", grid, 256, out, *arrays, n)
                return [out]

            return twice(run)[0]

        x64, y64 = wide(x[None], y[None])
        expected = np.empty((1, n))
        cpu.gelu_forward(expected, x64)
        check(compute("gelu_forward", x), expected[0])
        cpu.gelu_backward(expected, y64, x64)
        check(compute("gelu_backward", y, x), expected[0])
        check(compute("residual_forward", x, y), (x64 + y64)[0])


def test_gelu_far_out():
    """gelu(x) is x far to the right and 0 far to the left, and its slope 1 and 0; nothing overflows."""
    x = np.array([-1e4, -100, -20, 20, 100, 1e4], np.float32)
    out, slope = empty(6, F32), empty(6, F32)
    launch("gelu.cu", "gelu_forward<float>", 1, 256, out, device(x), 6)
    launch("gelu.cu", "gelu_backward<float>", 1, 256, slope, device(np.ones_like(x)), device(x), 6)
    np.testing.assert_array_equal(np.abs(out.get()), np.maximum(x, 0))
    np.testing.assert_array_equal(np.abs(slope.get()), x > 0)


def test_residual_in_place():
    x, y = random(1, 5000, F32), random(2, 5000, F32)
    out = device(x)
    launch("gelu.cu", "residual_forward<float>", cdiv(5000, 2048), 256, out, out, device(y), 5000)
    np.testing.assert_array_equal(out.get(), x + y)


# ------------------------------------------------------------------------------------------------------------
# layernorm.cu


def layernorm_operands(dtype, N, C):
    """inp, weight, bias; the mean is not 0, so that a careless variance would show."""
    return random(1, (N, C), dtype, 2, 5), random(2, C, dtype, 0.5, 1), random(3, C, dtype)


def largest_term(inp, rstd):
    """Of inp * rstd - mean * rstd, for a row of one channel 316 times what is left of it."""
    return np.abs(inp.astype(np.float64)).max() * rstd.max()


def vectors(C, dtype):
    return cdiv(C, 32 * (16 // dtype.itemsize))


def forward_reference(inp, weight, bias):
    out, mean, rstd = np.empty(inp.shape), np.empty(len(inp)), np.empty(len(inp))
    cpu.layernorm_forward(out, mean, rstd, *wide(inp, weight, bias))
    return out, mean, rstd


@both_dtypes
@pytest.mark.parametrize("C", [*CHANNELS, 1600, 2100])
def test_layernorm_forward(dtype, C):
    N, T = 13, NAMES[dtype]
    operands = layernorm_operands(dtype, N, C)
    expected = forward_reference(*operands)
    versions = [(f"layernorm_forward_rows<{T}>", cdiv(N, 4), 1)]
    if rows_are_aligned(C, dtype) and C <= 1600:
        versions += [(f"layernorm_forward<{T}, {vectors(C, dtype)}>", grid, 0) for grid in (1, 2, cdiv(N, 4))]
    for name, grid, shift in versions:

        def compute(name=name, grid=grid, shift=shift):
            out, mean, rstd = empty((N, C), dtype, shift), empty(N, F32), empty(N, F32)
            inputs = [device(array, shift) for array in operands]
            launch("layernorm.cu", name, grid, 128, out, mean, rstd, *inputs, N, C)
            return out, mean, rstd

        for result, reference in zip(twice(compute), expected):
            check(result, reference, largest_term(operands[0], expected[2]))


@both_dtypes
@pytest.mark.parametrize("C", [*CHANNELS, 1280])
def test_layernorm_backward(dtype, C):
    N, T = 61, NAMES[dtype]
    inp, weight, bias = layernorm_operands(dtype, N, C)
    dout, dinp = random(5, (N, C), dtype), random(6, (N, C), dtype)
    dweight, dbias = random(7, C, F32), random(8, C, F32)
    _, mean, rstd = (array.astype(np.float32) for array in forward_reference(inp, weight, bias))
    expected = wide(dinp, dweight, dbias)
    cpu.layernorm_backward(*expected, *wide(dout, inp, weight, mean, rstd))

    versions = [(f"_rows<{T}>", 0, 1)]
    versions += [(f"<{T}, {vectors(C, dtype)}>", 8 * C, 0)] if rows_are_aligned(C, dtype) else []
    for name, shared, shift in versions:
        for grid in 1, 3, cdiv(N, 4):

            def compute(name=name, shared=shared, shift=shift, grid=grid):
                dx, dw, db = device(dinp, shift), device(dweight), device(dbias)
                partials = empty((grid, 2, C), F32)
                inputs = [device(array, shift) for array in (dout, inp, weight)] + [
                    device(mean),
                    device(rstd),
                ]
                rows = f"layernorm_backward{name}", grid, 128, dx, partials, *inputs, N, C
                launch("layernorm.cu", *rows, shared=shared)
                reduce = "layernorm_backward_reduce", cdiv(2 * C, 32), 1024, dw, db, partials, grid, C
                launch("layernorm.cu", *reduce)
                return dx, dw, db

            for result, reference in zip(twice(compute), expected):
                check(result, reference, largest_term(inp, rstd))


# ------------------------------------------------------------------------------------------------------------
# encoder.cu


@both_dtypes
@pytest.mark.parametrize("C", CHANNELS)
def test_encoder_forward(dtype, C):
    B, T, V, P = 3, 5, 50, 12
    tokens = np.random.default_rng(1).integers(0, V, (B, T), np.int32)
    wte, wpe = random(2, (V, C), dtype), random(3, (P, C), dtype)
    for offsets in None, np.array([0, 4, 11], np.int32):  # the last row runs over the end of wpe
        expected = np.empty((B, T, C))
        cpu.encoder_forward(expected, tokens, *wide(wte, wpe), offsets)
        for version, shift in VERSIONS if rows_are_aligned(C, dtype) else VERSIONS[:1]:
            threads = B * T * (C if version else 32)

            def compute(version=version, shift=shift, threads=threads, offsets=offsets):
                out = empty((B, T, C), dtype, shift)
                name = f"encoder_forward{version}<{NAMES[dtype]}>"
                inputs = [device(tokens), device(wte, shift), device(wpe, shift)]
                inputs += [None if offsets is None else device(offsets)]
                launch("encoder.cu", name, cdiv(threads, 256), 256, out, *inputs, B * T, T, C, P)
                return [out]

            check(twice(compute)[0], expected)


def text(kind, N, V):
    """N tokens: one repeated, all different, as frequent as in a text, or in groups of every kind: 1, 31, 32
    and 63 rows are one chunk, 64, 65, 95, 96 and 97 two and three."""
    lengths = {0: 1, 3: 31, 4: 32, 7: 63, 8: 64, 20: 65, 55: 95, 56: 96, 30: 97}
    rng = np.random.default_rng(1)
    if kind == "repeated":
        return np.full(N, V - 1, np.int32)
    if kind == "different":
        return rng.permutation(V)[:N].astype(np.int32)
    if kind == "zipf":
        return np.minimum(rng.zipf(1.3, N) - 1, V - 1).astype(np.int32)
    assert sum(lengths.values()) == N
    return rng.permutation(np.repeat(list(lengths), list(lengths.values()))).astype(np.int32)


def token_groups(tokens, V, bits):
    """order, chunks (n, 4) and groups (slots, 2) on the device, and the counter of chunks."""
    N, keys = tokens.size, cdiv(V, 1 << bits)
    order, count = empty(N, np.int32), device(np.zeros(1, np.int32))
    chunks, groups = empty((min(N, V + N // 32), 4), np.int32), empty((cdiv(N, 32), 2), np.int32)
    arguments = order, chunks, count, groups, device(tokens), N, V, bits
    launch("encoder.cu", "token_groups", 1 << bits, 1024, *arguments, shared=4 * 33 * keys)
    return order, chunks, groups, count


@pytest.mark.parametrize("kind", ["repeated", "different", "zipf", "groups"])
@pytest.mark.parametrize("V, bits", [(600, 0), (600, 6), (60, 2), (50257, 7)])
def test_token_groups(kind, V, bits):
    N = 544 if kind == "groups" else min(V, 1500)
    tokens = text(kind, N, V)

    def compute():
        order, chunks, groups, count = token_groups(tokens, V, bits)
        n = int(count.get()[0])
        found = chunks.get()[:n]
        groups = groups.get()
        groups[groups[:, 1] == 0, 0] = 0  # nobody reads that
        return order, device(found[found[:, 1].argsort()]), device(groups)

    order, chunks, groups = twice(compute)
    ordered = tokens[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))  # of the groups in order
    for first, last in zip(starts, [*starts[1:], N]):  # each has the rows of a token, ascending
        assert np.array_equal(order[first:last], np.flatnonzero(tokens == ordered[first]))
    assert sorted(ordered[starts]) == sorted(set(tokens.tolist()))
    expected, joined = [], np.zeros((cdiv(N, 32), 2), int)
    for first, last in zip(starts, [*starts[1:], N]):
        pieces, slot = max(1, (last - first) // 32), cdiv(first, 32)
        ends = [*range(first + 32, first + 32 * pieces, 32), last]
        for i, end in enumerate(ends):
            expected.append([ordered[first], first + 32 * i, end, slot + i if pieces > 1 else -1])
        if pieces > 1:
            joined[slot] = ordered[first], pieces
    assert np.array_equal(chunks, expected)
    assert np.array_equal(groups, joined)


@both_dtypes
@pytest.mark.parametrize("C", CHANNELS)
@pytest.mark.parametrize("kind", ["groups", "zipf"])
def test_encoder_backward(dtype, C, kind):
    B, T, V, S = 4, 136, 57, NAMES[dtype]
    N = B * T
    tokens = text(kind, N, V)
    dout, dwte, dwpe = random(2, (B, T, C), dtype), random(3, (V, C), F32), random(4, (T + 1, C), F32)
    expected = wide(dwte, dwpe)
    cpu.encoder_backward(*expected, wide(dout)[0], tokens.reshape(B, T))
    ids, dy = device(tokens), device(dout)

    def naive():
        dwte_there, dwpe_there, grid = device(dwte), device(dwpe), (V, cdiv(C, 256))
        launch("encoder.cu", f"encoder_backward_naive<{S}>", grid, 256, dwte_there, dy, ids, N, C)
        name, grid = f"encoder_backward_wpe_naive<{S}>", cdiv(T * C, 256)
        launch("encoder.cu", name, grid, 256, dwpe_there, dy, B, T, C)
        return dwte_there, dwpe_there

    def grouped(blocks):
        totals = device(dwte), device(dwpe)
        partials, (order, chunks, groups, count) = empty((cdiv(N, 32), C), F32), token_groups(tokens, V, 3)
        arguments = *totals, partials, dy, order, chunks, count, B, T, C
        launch("encoder.cu", f"encoder_backward<{S}, 16, 4>", blocks, 256, *arguments)
        grid = cdiv(cdiv(N, 32), 8), cdiv(C, 128)
        arguments = totals[0], partials, groups, count, N, C
        launch("encoder.cu", "encoder_backward_join", grid, 256, *arguments)
        assert count.get()[0] == 0  # ready for the next batch
        return totals

    for result, reference in zip(twice(naive), expected):
        check(result, reference)
    if not rows_are_aligned(C, dtype):
        return
    results = twice(lambda: grouped(9))
    for result, reference in zip(results, expected):
        check(result, reference)
    for result, other in zip(results, twice(lambda: grouped(3))):  # nor do the bits depend on the grid
        np.testing.assert_array_equal(result, other)


@pytest.mark.parametrize("kind", ["repeated", "different", "zipf"])
def test_encoder_backward_of_any_text(kind):
    """As cuda.py launches it; in one repeated token all rows are of one group."""
    B, T, V, C = 5, 512, 3000, 16
    tokens, dout = text(kind, B * T, V).reshape(B, T), random(2, (B, T, C), BF16)
    expected = np.zeros((V, C)), np.zeros((T, C))
    cpu.encoder_backward(*expected, wide(dout)[0], tokens)

    def compute():
        totals = cuda.zeros((V, C)), cuda.zeros((T, C))
        cuda.encoder_backward(*totals, device(dout), device(tokens))
        return totals

    for result, reference in zip(twice(compute), expected):
        check(result, reference, terms=50 if kind == "repeated" else 0)


# ------------------------------------------------------------------------------------------------------------
# classifier.cu


@both_dtypes
@pytest.mark.parametrize(
    "V, Vp", [(50, 50), (50, 128), (257, 264), (257, 384), (1000, 1001), (1000, 1024), (1, 8), (5, 5)]
)
def test_classifier(dtype, V, Vp):
    N, T = 5, NAMES[dtype]
    logits = random(1, (N, Vp), dtype, 4)
    logits[1] += 60  # far from 0, where exp alone would overflow
    logits[2, : V // 2] = -np.inf  # masked tokens
    targets = np.random.default_rng(2).integers(V // 2, V, N).astype(np.int32)
    weights = np.array([0.2, 0, -1.5, 1e-5, 1], np.float32)  # an ignored token, a negative advantage
    losses, dlogits = np.empty(N), wide(logits)[0]
    cpu.classifier(losses, dlogits, targets, weights, V)
    poisoned = logits.copy()
    poisoned[:, V:] = 1e4  # what padding holds must not matter
    inputs = device(targets), device(weights)

    size = 16 // dtype.itemsize
    versions = [(f"classifier_naive<{T}>", cdiv(N, 128), 128, (N, V, Vp), 0)]
    for block in (32, 768) if Vp % size == 0 else ():
        versions.append((f"classifier_twice<{T}>", N, block, (V, Vp), 0))
        versions.append((f"classifier<{T}>", N, block, (V, Vp), Vp * dtype.itemsize))
    for name, grid, block, sizes, shared in versions:

        def compute(name=name, grid=grid, block=block, sizes=sizes, shared=shared):
            result, z = empty(N, F32), device(poisoned)
            launch("classifier.cu", name, grid, block, result, z, *inputs, *sizes, shared=shared)
            return result, z

        result, dz = twice(compute)
        check(result, losses)
        assert not dz[:, V:].any()
        for row in range(N):
            check(dz[row], dlogits[row])

    versions = [(f"cross_entropy_naive<{T}>", cdiv(N, 128), 128, (N, V, Vp))]
    versions += [(f"cross_entropy<{T}>", N, 1024, (V, Vp))] if Vp % size == 0 else []
    for name, grid, block, sizes in versions:

        def evaluate(name=name, grid=grid, block=block, sizes=sizes):
            result, z = empty(N, F32), device(poisoned)
            launch("classifier.cu", name, grid, block, result, z, inputs[0], *sizes)
            return result, z

        result, z = twice(evaluate)
        check(result, losses)
        np.testing.assert_array_equal(z, poisoned)


def test_target_outside_the_vocabulary():
    targets, weights = device(np.array([-1, 50, 2**31 - 1, 3], np.int32)), device(np.ones(4, np.float32))
    logits = random(1, (4, 64), F32)
    for name, grid, sizes, shared in [
        ("classifier_naive<float>", 1, (4, 50, 64), 0),
        ("classifier_twice<float>", 4, (50, 64), 0),
        ("classifier<float>", 4, (50, 64), 256),
    ]:
        losses = empty(4, F32)
        inputs = device(logits), targets, weights, *sizes
        launch("classifier.cu", name, grid, 128, losses, *inputs, shared=shared)
        np.testing.assert_array_equal(np.isnan(losses.get()), [True, True, True, False])
    for name, grid, sizes in (
        ("cross_entropy_naive<float>", 1, (4, 50, 64)),
        ("cross_entropy<float>", 4, (50, 64)),
    ):
        losses = empty(4, F32)
        launch("classifier.cu", name, grid, 128, losses, device(logits), targets, *sizes)
        np.testing.assert_array_equal(np.isnan(losses.get()), [True, True, True, False])


@pytest.mark.parametrize("n", [1, 31, 1024, 9001])
def test_weighted_sum(n):
    values, weights, before = random(1, n, F32), random(2, n, F32), random(3, 1, F32)

    def compute():
        total = device(before)
        launch("classifier.cu", "weighted_sum", 1, 1024, total, device(values), device(weights), n)
        return [total]

    expected = before + np.dot(*wide(values, weights))
    check(twice(compute)[0], expected, terms=np.abs(values * weights).sum())


# ------------------------------------------------------------------------------------------------------------
# norm.cu


@pytest.mark.parametrize("n", [1, 7, 1000, 100_003])
def test_global_norm(n):
    def naive():
        norm = empty(1, F32)
        launch("norm.cu", "global_norm_naive", 1, 1024, norm, device(grads, 1), n)
        return [norm]

    def staged(blocks=16):  # the table says 1024, which would be mostly idle here
        norm, partials, n4 = empty(1, F32), empty(blocks, F32), cdiv(n, 4) * 4
        launch("norm.cu", "square_sums", blocks, 256, partials, device(np.resize(grads, n4)), n4)
        launch("norm.cu", "global_norm_finish", 1, 1024, norm, partials, blocks)
        return [norm]

    grads = random(1, n, F32)
    check(twice(naive)[0], np.linalg.norm(wide(grads)[0])[None])
    check(twice(staged)[0], np.linalg.norm(wide(np.resize(grads, cdiv(n, 4) * 4))[0])[None])


def test_plan_update():
    """The same on the third step: what is taken and what is left out, at the limits and beyond them."""
    inf, nan, largest = np.inf, np.nan, np.finfo(np.float32).max
    for norm, loss, max_norm, norm_limit, loss_limit, clip in [
        (4, 3, 1, inf, inf, 0.25),
        (0.5, -3, 1, inf, inf, 1),
        (1, 3, 1, inf, inf, 1),
        (0, 0, 1, inf, inf, 1),
        (largest, -largest, 1e30, inf, inf, 1e30 / largest),
        (10, 3, 5, 10, 3, 0.5),
        (np.nextafter(np.float32(10), 11), 3, 5, 10, inf, -1),
        (10, np.nextafter(np.float32(3), 4), 5, inf, 3, -1),
        *[(bad, 3, 1, inf, inf, -1) for bad in (inf, nan)],
        *[(4, bad, 1, inf, inf, -1) for bad in (inf, -inf, nan)],
        (4, 3, 1, -1, inf, -1),
    ]:
        update, steps = empty(4, F32), device(np.array([2], np.int32))
        settings = device(np.array([6e-4, max_norm, norm_limit, loss_limit], np.float32))
        ones = device(np.array([norm], np.float32)), device(np.array([loss], np.float32))
        betas = np.float64(0.9), np.float64(0.999)
        launch("norm.cu", "plan_update", 1, 32, update, steps, *ones, settings, *betas)
        taken = 3 if clip >= 0 else 2
        assert steps.get().tolist() == [taken]
        wanted = np.array([clip, 6e-4, 1 - 0.9**taken, 1 - 0.999**taken])
        np.testing.assert_allclose(update.get(), wanted.astype(np.float32), rtol=2e-7)


# ------------------------------------------------------------------------------------------------------------
# adamw.cu


@both_versions
@pytest.mark.parametrize("n", [1, 7, 2048, 5003])
@pytest.mark.parametrize("with_copy", [False, True])
def test_adamw(version, shift, n, with_copy):
    """Four steps; the last is left out, but fills the copy and clears the gradients; a clip of 0 is none."""
    lr, *rates = 0.01, 0.9, 0.95, 1e-8, 0.1  # betas, eps, weight decay
    params, grads = random(1, n, F32), [random(2 + step, n, F32, 0.1) for step in range(4)]
    clips, expected = [0.3, 1.0, 0.0, -1.0], wide(params, np.zeros(n), np.zeros(n))
    updates = [np.array([clips[t - 1], lr, 1 - 0.9**t, 1 - 0.95**t]) for t in (1, 2, 3, 4)]
    for step in range(4):
        p, m, v = expected
        cpu.adamw(p, wide(grads[step])[0], m, v, updates[step], *rates)

    def compute():
        p, m, v = device(params, shift), device(np.zeros(n, F32), shift), device(np.zeros(n, F32), shift)
        for step in range(4):
            copy = empty(n, BF16, shift) if with_copy else None
            g, update = device(grads[step], shift), device(updates[step].astype(F32))
            grid = cdiv(n, 256 * (1 if version else 8))
            launch("adamw.cu", f"adamw{version}", grid, 256, p, g, m, v, copy, update, *rates, n)
            assert not g.get().any()
        return (p, m, v, copy) if with_copy else (p, m, v)

    p, m, v, *copy = twice(compute)
    for result, reference in zip((p, m, v), expected):
        check(result, reference)
    if with_copy:
        np.testing.assert_array_equal(copy[0], p.astype(BF16))


# ------------------------------------------------------------------------------------------------------------
# sample.cu

FILTERS = [  # temperature, top_k, top_p, min_p
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 20, 1.0, 0.0),
    (1.0, 5000, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1.3, 0, 1.0, 0.05),
    (0.8, 40, 0.8, 0.02),
    (1e-30, 0, 1.0, 0.0),
    (100.0, 3, 0.999, 0.0),
]


def draw(logits, V, filters, streams, counters, version="", seed=42, block=64):
    """Tokens and log-probabilities of the rows of logits (B, stride) from the device."""
    B, stride = logits.shape
    T = NAMES[logits.dtype]

    def compute():
        out, logprobs = empty(B, np.int32), empty((2, B), F32)
        workspace = [empty((B, V), F32)] if version else []
        counts = device(np.int64(streams)), device(np.int64(counters))
        arrays = out, logprobs, device(logits), *workspace, np.uint64(seed), *counts
        launch("sample.cu", f"sample{version}<{T}>", B, block, *arrays, *filters, V, stride)
        return out, logprobs

    return twice(compute)


@both_dtypes
@pytest.mark.parametrize("V, stride", [(1, 1), (50, 50), (257, 384), (1000, 1024)])
@pytest.mark.parametrize("version", ["_naive", ""])
def test_sample_draws_what_the_cpu_draws(dtype, V, stride, version):
    """The same token from the same coin, or one whose step in the sum ends within rounding of the coin."""
    B, seed = 8, 2**40 + 7
    logits = random(1, (B, stride), dtype, 3)  # in bf16 many tie
    logits[0, : V // 2] = -np.inf
    logits[1, 0] = -0.0
    logits[:, V:] = 1e4
    streams, counters = np.arange(B) + 2**33, 1000 * np.arange(B)[::-1]
    coin = sampling.uniform(seed, streams, counters)
    for filters in FILTERS:
        if filters[1] >= V > 1 and version:
            continue
        tokens, logprobs = draw(logits, V, filters, streams, counters, version, seed)
        z = wide(logits[:, :V])[0]
        probabilities = sampling.filtered_probabilities(z, *filters)
        expected, expected_logprobs = np.empty(B, np.int32), np.empty((2, B))
        sampling.sample(expected, z, seed, streams, counters, *filters, logprobs=expected_logprobs)
        same = tokens == expected
        for row in np.flatnonzero(~same):
            assert probabilities[row, tokens[row]] > 0
            border = probabilities[row, : min(tokens[row], expected[row]) + 1].sum()
            assert abs(border - coin[row]) < 1e-5
        assert same.sum() >= B - 1
        np.testing.assert_allclose(logprobs[:, same], expected_logprobs[:, same], atol=2e-5, rtol=1e-5)


def test_sample_thresholds():
    """Where every filter cuts, exactly: ties at a threshold all stay, and what is cut is never drawn."""
    logits = np.log(np.float32([0.4, 0.2, 0.2, 0.1, 0.05, 0.05]))
    logits[2] = logits[1]
    cases = [
        ((1.0, 2, 1.0, 0.0), {0, 1, 2}),
        ((1.0, 4, 1.0, 0.0), {0, 1, 2, 3}),
        ((1.0, 0, 0.5, 0.0), {0, 1, 2}),
        ((1.0, 0, 0.39, 0.0), {0}),
        ((1.0, 0, 0.85, 0.0), {0, 1, 2, 3}),
        ((1.0, 0, 1.0, 0.2), {0, 1, 2, 3}),
        ((1.0, 3, 0.6, 0.0), {0, 1, 2}),  # after top-k the first holds half of what is left
        ((1.0, 3, 0.45, 0.0), {0}),
    ]
    B = 64
    for filters, kept in cases:
        for version in "", "_naive":
            tokens, _ = draw(
                np.tile(logits, (B, 1)), 6, filters, np.arange(B), np.zeros(B), version, block=32
            )
            assert set(tokens.tolist()) == kept, (filters, version)


def test_sample_frequencies():
    """4096 draws from a known distribution: chi-squared, 9 degrees of freedom, exceeds 30 once in 2000."""
    logits, B = random(3, (1, 10), F32), 4096
    tokens, _ = draw(np.tile(logits, (B, 1)), 10, (1.0, 0, 1.0, 0.0), np.arange(B), np.full(B, 5), block=32)
    expected = B * sampling.filtered_probabilities(wide(logits)[0])[0]
    assert ((np.bincount(tokens, minlength=10) - expected) ** 2 / expected).sum() < 30


def test_sample_argmax_and_hopeless_rows():
    logits = np.full((4, 40), -np.inf, np.float32)
    logits[0, [7, 30]] = 2.0  # equal: the lower id
    logits[1, 39] = -3.0
    logits[2] = np.nan
    for filters in (0.0, 0, 1.0, 0.0), (1e-35, 0, 1.0, 0.0):
        tokens, _ = draw(logits, 40, filters, np.arange(4), np.arange(4))
        assert tokens[:2].tolist() == [7, 39]
        assert all(0 <= token < 40 for token in tokens)  # an all-masked or NaN row: some token, no crash
    tokens, _ = draw(logits, 40, (1.0, 5, 0.9, 0.1), np.arange(4), np.arange(4))
    assert tokens[0] in (7, 30) and tokens[1] == 39 and all(0 <= token < 40 for token in tokens)
