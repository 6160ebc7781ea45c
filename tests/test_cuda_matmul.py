"""Every version, tile, orientation and epilogue of kernels/matmul.cu against NumPy in float64.

Sizes are odd on purpose, outputs hold NaN before each launch, and every launch is made twice and must give
the same bits. Operands are rounded to their storage type first: what is measured is the kernel alone. In
the emulator, or on a GPU where there is one (tests/card.py).
"""

import card
import numpy as np
import pytest
import test_cuda_elementwise as elementwise
from test_cuda_elementwise import BF16, F32, NAMES, cdiv, random

cuda = card.cuda()

# As in matmul.cu's table: BM, BN, BK, then WM, WN, STAGES of bf16 or TM, TN of float.
BF16_TILES = [
    (128, 256, 64, 64, 64, 3),
    (128, 128, 64, 64, 64, 3),
    (128, 128, 32, 64, 64, 4),  # more stages than the next, and otherwise the same
    (128, 128, 32, 64, 64, 3),
    (64, 64, 64, 32, 32, 3),
]
FLOAT_TILES = [(128, 128, 8, 8, 8), (64, 64, 16, 4, 4)]
ALIGNED_SIZES = [(8, 8, 8), (72, 136, 40), (129, 104, 200), (264, 264, 136)]  # rows of A need not be aligned
ODD_SIZES = [(1, 1, 1), (7, 33, 65), (100, 129, 7), (65, 1, 100), (130, 70, 133), (20, 64, 5)]

# Epilogue, A_T, B_T and the type of the output (None: that of the operands), as cuda.py uses them.
LOGITS = ("STORE", False, True, F32)
USES = [
    ("STORE", False, False, None),
    ("BIAS", False, False, None),
    ("BIAS_GELU", False, False, None),
    ("BIAS_RESIDUAL", False, False, None),
    ("STORE", False, True, None),
    LOGITS,
    ("GELU_GRAD", False, True, None),
    ("STORE", True, False, F32),
    ("ACCUMULATE", True, False, F32),
]


def use_name(use):
    epilogue, a_t, b_t, dtype = use
    return epilogue + "-A_T" * a_t + "-B_T" * b_t + "-float" * (dtype is not None)


def launch(name, grid, block, arguments, shared=0):
    elementwise.launch("matmul.cu", name, grid, block, *arguments, shared=shared)


def misaligned(array):
    return elementwise.device(array, 1)


def device(array):
    return None if array is None else elementwise.device(array)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_grad(x):
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * (1 + np.tanh(u)) + 0.5 * x / np.cosh(u) ** 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def check(result, expected):
    """HOPPER.md's rule for the whole, and a bound for each element, so that one wrong element cannot hide."""
    exact = result.dtype == np.float32
    x, y = result.astype(np.float64), expected
    assert np.isfinite(x).all()
    assert 1 - 2 * np.sum(x * y) / np.sum(x * x + y * y) < (1e-10 if exact else 1e-5)
    assert np.all(np.abs(x - y) <= (1e-5 if exact else 2**-7) * (1 + np.abs(y)))


def product(operands, tile, sizes, use, slices=1):
    """Launch matmul_float or matmul_bf16 as `use` says and hold the output (M, N) against NumPy."""
    (M, N, K), (epilogue, a_t, b_t, out_dtype) = sizes, use
    out_dtype = out_dtype or operands
    a, b = random(1, (M, K), operands, K**-0.5), random(2, (K, N), operands)  # outputs of size 1
    bias, extra = random(3, N, out_dtype), random(4, (M, N), out_dtype)
    before = random(5, (M, N), np.float32)

    BM, BN, BK = tile[:3]
    if operands == F32:
        name = f"matmul_float<{epilogue}, "
        threads, shared = BM * BN // (tile[3] * tile[4]), 0
    else:
        name = f"matmul_bf16<{NAMES[out_dtype]}, {epilogue}, "
        threads, shared = BM * BN // (tile[3] * tile[4]) * 32, tile[5] * (BM + BN) * BK * 2
    name += ", ".join(str(flag).lower() for flag in (a_t, b_t)) + f", {', '.join(map(str, tile))}>"
    k_slice = cdiv(cdiv(K, slices), BK) * BK

    results = []
    for _ in range(2):
        out = card.empty((slices, M, N), out_dtype)  # NaN
        out_extra = card.empty((M, N), out_dtype) if epilogue == "BIAS_GELU" else device(extra)
        if epilogue == "ACCUMULATE":
            out = device(before[None])
        arguments = (out, out_extra, device(bias), device(a.T if a_t else a), device(b.T if b_t else b))
        sizes = tuple(np.int32(size) for size in (M, N, K, k_slice))
        launch(name, (cdiv(M, BM) * cdiv(N, BN), 1, slices), (threads,), arguments + sizes, shared)
        if slices > 1:
            total, size = device(before), M * N
            arguments = total, out, np.uint64(size), np.uint64(size), np.int32(slices)
            launch("add_partials", (cdiv(size, 1024),), (256,), arguments)
            out = total
        results.append((out.get().reshape(M, N), out_extra.get()))
    hold(results, use, a, b, bias, extra, before, slices)


def hold(results, use, a, b, bias, extra, before, slices=1):
    """Two runs gave the same bits, and these are the product with its epilogue: results are (out, extra)."""
    epilogue = use[0]
    assert results[0][0].tobytes() == results[1][0].tobytes()
    assert results[0][1].tobytes() == results[1][1].tobytes()
    result, result_extra = results[0]
    expected = a.astype(np.float64) @ b.astype(np.float64)
    if epilogue.startswith("BIAS"):
        expected += bias.astype(np.float64)
    if epilogue == "BIAS_GELU":
        check(result_extra, expected)
        expected = gelu(result_extra.astype(np.float64))
    elif epilogue == "BIAS_RESIDUAL":
        expected += extra.astype(np.float64)
    elif epilogue == "GELU_GRAD":
        expected *= gelu_grad(extra.astype(np.float64))
    elif epilogue == "ACCUMULATE" or slices > 1:
        expected += before
    check(result, expected)


def hopper(tile, sizes, use, monkeypatch, slices=1, multiprocessors=4):
    """As product(), by matmul_hopper.cu; few multiprocessors have many tiles each."""
    if cuda.CAPABILITY != 90:
        pytest.skip("matmul_hopper.cu needs a card of compute capability 9.0")
    (M, N, K), (epilogue, a_t, b_t, out_dtype) = sizes, use
    a, b = random(1, (M, K), BF16, K**-0.5), random(2, (K, N), BF16)  # outputs of size 1
    bias, extra = random(3, N, BF16), random(4, (M, N), BF16)
    before = random(5, (M, N), np.float32)
    monkeypatch.setattr(cuda, "SMS", multiprocessors)
    monkeypatch.setattr(cuda, "KERNEL_OVERRIDES", {"matmul": tile, "slices": slices})
    cuda._hopper_choice.cache_clear()
    results = []
    for _ in range(2):
        out = device(before) if epilogue == "ACCUMULATE" else card.empty((M, N), out_dtype or BF16)
        uses_extra = epilogue in ("BIAS_GELU", "BIAS_RESIDUAL", "GELU_GRAD")
        out_extra = card.empty((M, N), BF16) if epilogue == "BIAS_GELU" else device(extra)
        stored = device(a.T if a_t else a), device(b.T if b_t else b)
        fused = (out_extra if uses_extra else None), (device(bias) if "BIAS" in epilogue else None)
        cuda._product(out, *stored, a_t, b_t, epilogue, M, N, K, *fused)
        results.append((out.get(), out_extra.get()))
    hold(results, use, a, b, bias, extra, before)


@pytest.mark.parametrize("use", USES, ids=use_name)
@pytest.mark.parametrize("operands", [F32, BF16], ids=NAMES.get)
def test_naive(operands, use):
    """Every epilogue at every size, and where no array begins on a 16-byte boundary."""
    epilogue, a_t, b_t, out_dtype = use
    out_dtype = out_dtype or operands
    for M, N, K in ODD_SIZES:
        a, b = random(1, (M, K), operands, K**-0.5), random(2, (K, N), operands)
        bias, extra = random(3, N, out_dtype), random(4, (M, N), out_dtype)
        before, results = random(5, (M, N), np.float32), []
        for _ in range(2):
            out = (
                misaligned(before)
                if epilogue == "ACCUMULATE"
                else misaligned(np.full((M, N), np.nan, out_dtype))
            )
            out_extra = misaligned(np.full((M, N), np.nan, out_dtype) if epilogue == "BIAS_GELU" else extra)
            stored = misaligned(a.T if a_t else a), misaligned(b.T if b_t else b)
            flags = f"{str(a_t).lower()}, {str(b_t).lower()}"
            name = f"matmul_naive<{NAMES[operands]}, {NAMES[out_dtype]}, {epilogue}, {flags}>"
            arguments = out, out_extra, misaligned(bias), *stored, *map(np.int32, (M, N, K))
            launch(name, (cdiv(M, 8) * cdiv(N, 32),), (32, 8), arguments)
            results.append((out.get(), out_extra.get()))
        hold(results, use, a, b, bias, extra, before)


@pytest.mark.parametrize("use", [use for use in USES if use != LOGITS], ids=use_name)
@pytest.mark.parametrize("tile", FLOAT_TILES, ids=lambda tile: "x".join(map(str, tile)))
def test_float(tile, use):
    for sizes in [(8, 4, 8), (132, 140, 36), (260, 68, 12)]:
        product(F32, tile, sizes, use)


def wanted(use, sizes):
    """Sizes that are aligned for this use: A stored (K, M) needs aligned M as well."""
    M, N, K = sizes
    return (cdiv(M, 8) * 8 if use[1] else M, N, K)


@pytest.mark.parametrize("use", USES, ids=use_name)
@pytest.mark.parametrize("tile", BF16_TILES, ids=lambda tile: "x".join(map(str, tile)))
def test_bf16(tile, use):
    if tile[-1] == 4 and use not in (USES[0], LOGITS, USES[-1]):
        return  # one of each orientation is enough: compiling takes time
    for sizes in ALIGNED_SIZES:
        product(BF16, tile, wanted(use, sizes), use)


@pytest.mark.parametrize("use", [use for use in USES if not use[1]], ids=use_name)
@pytest.mark.parametrize(
    "MI, BN, stages, slices",
    [(1, 16, 6, 1), (1, 16, 2, 1), (1, 16, 2, 3), (2, 16, 4, 1), (2, 32, 3, 1), (4, 16, 2, 1), (4, 32, 2, 1)],
)
def test_skinny(MI, BN, stages, slices, use):
    """Few rows: a K that no warp needs to share, one that all share, and one that passes the ring twice; rows
    for one block, and for two."""
    epilogue, _, b_t, out_dtype = use
    out_dtype = out_dtype or BF16
    more = 0 if slices > 1 else 5  # rows of a second block
    finished = device(np.zeros(3, np.uint32))  # the launches leave it zero
    for M, N, K in [(1, 8, 8), (16 * MI - 3, 40, 72), (16 * MI + more, 24, 2 * 8 * 64 * slices + 520)]:
        a, b = random(1, (M, K), BF16, K**-0.5), random(2, (K, N), BF16)
        bias, extra = random(3, N, out_dtype), random(4, (M, N), out_dtype)
        results = []
        for _ in range(2):
            out = card.empty((M, N), out_dtype)
            out_extra = card.empty((M, N), out_dtype) if epilogue == "BIAS_GELU" else device(extra)
            partial = card.empty((cdiv(N, BN), slices, 16 * MI, BN), F32)
            arguments = out, out_extra, device(bias), device(a), device(b.T if b_t else b), partial, finished
            name = f"matmul_skinny<{NAMES[out_dtype]}, {epilogue}, {str(b_t).lower()}, {MI}, {BN}, {stages}>"
            sizes = tuple(map(np.int32, (M, N, K)))
            grid, shared = (cdiv(N, BN), cdiv(M, 16 * MI), slices), stages * (16 * MI + BN) * 1024
            launch(name, grid, (256,), arguments + sizes, shared)
            results.append((out.get(), out_extra.get()))
        hold(results, use, a, b, bias, extra, None)
        assert not finished.get().any()


@pytest.mark.parametrize(
    "operands, tile", [(F32, FLOAT_TILES[1]), (BF16, BF16_TILES[1]), (BF16, BF16_TILES[4])], ids=str
)
@pytest.mark.parametrize("slices", [2, 3, 7])
def test_split_over_the_tokens(operands, tile, slices):
    """dweight in slices of K: a last slice that is short, or that has nothing left to do, included."""
    use = ("STORE", True, False, F32)
    for sizes in [(72, 136, 513), (128, 64, 70)]:
        product(operands, tile, sizes, use, slices)


@pytest.mark.parametrize("operands, tile", [(F32, FLOAT_TILES[1]), (BF16, BF16_TILES[4])], ids=str)
def test_every_tile_is_computed_once(operands, tile):
    """More rows of tiles than the 16 of a band, and a last band that is lower."""
    product(operands, tile, (64 * 18 + 8, 64 * 3 + 8, 16), USES[0])
    product(operands, tile, (64 * 16, 64 * 2, 16), USES[0])


# Not multiples of any tile, an M below a box, a K that ends within a stage; more tiles than blocks.
HOPPER_SIZES = [(8, 8, 8), (200, 328, 136), (520, 264, 72)]
HOPPER_USES = [use for use in USES if use[:3] != ("STORE", True, False)]  # those slices are ACCUMULATE's own


@pytest.mark.parametrize("use", HOPPER_USES, ids=use_name)
@pytest.mark.parametrize("tile", cuda.HOPPER_TILES)
def test_hopper(tile, use, monkeypatch):
    if tile != "pingpong" and use[0] not in ("BIAS_RESIDUAL", "ACCUMULATE") and use != LOGITS:
        return  # the other tiles differ in who multiplies what, not in the epilogues: compiling takes time
    for sizes in HOPPER_SIZES:
        hopper(tile, wanted(use, sizes), use, monkeypatch)


@pytest.mark.parametrize("tile", cuda.HOPPER_TILES)
@pytest.mark.parametrize("slices", [2, 3])
def test_hopper_split_over_the_tokens(tile, slices, monkeypatch):
    """Sums over K in slices of unequal length; rows of the partial sums are padded to 64."""
    for sizes in [(72, 264, 500), (136, 200, 264)]:
        hopper(tile, sizes, ("ACCUMULATE", True, False, F32), monkeypatch, slices)


@pytest.mark.parametrize("tile", ["pingpong", "wide"])
def test_hopper_pipeline_wraps(tile, monkeypatch):
    """Many tiles a block and more stages than the ring has, so that every barrier passes many phases. With
    tiles of one stage nothing but their turns keeps the consumers apart: half a warp that misses its own
    shows in some of the emulator's orders."""
    hopper(tile, (1300, 400, 704), ("BIAS_RESIDUAL", False, False, None), monkeypatch, multiprocessors=2)
    for order in "567":
        monkeypatch.setenv("EMULATOR_ORDER", order)
        hopper(tile, (3900, 200, 64), ("GELU_GRAD", False, True, None), monkeypatch, multiprocessors=2)


@pytest.mark.parametrize("a_t, b_t", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("stages", [1, 4])
def test_hopper_simple(a_t, b_t, stages):
    """The first two versions of the climb: one warpgroup, with and without loads ahead."""
    if cuda.CAPABILITY != 90:
        pytest.skip("matmul_hopper.cu needs a card of compute capability 9.0")
    for M, N, K in [(8, 8, 8), (200, 264, 456)]:
        a, b = random(1, (M, K), BF16, K**-0.5), random(2, (K, N), BF16)
        out, stored = card.empty((M, N), BF16), (device(a.T if a_t else a), device(b.T if b_t else b))
        bias = random(3, N, BF16)
        maps = [
            cuda.tensor_map(matrix, 64 if across else 128) for matrix, across in zip(stored, (a_t, not b_t))
        ]
        name = f"matmul_hopper_simple<{str(a_t).lower()}, {str(b_t).lower()}, {stages}>"
        grid = cdiv(M, 128) * cdiv(N, 128)
        sizes = device(bias), M, N, K
        cuda.launch("matmul_hopper", name, grid, 128, *maps, out, *sizes, shared=stages * 32776)
        check(out.get(), a.astype(np.float64) @ b.astype(np.float64) + bias.astype(np.float64))


@pytest.mark.parametrize("operands", [F32, BF16], ids=NAMES.get)
@pytest.mark.parametrize(
    "rows, N, slices", [(1, 1, 1), (7, 33, 2), (100, 129, 3), (65, 512, 4), (333, 264, 5)]
)
def test_bias_gradient(operands, rows, N, slices):
    dout, dbias = random(1, (rows, N), operands), random(2, N, np.float32)
    per_slice, columns, expected = (
        cdiv(rows, slices),
        512 // operands.itemsize,
        dout.astype(np.float64).sum(0),
    )

    def naive():
        total, sizes = misaligned(dbias), map(np.int32, (rows, N))
        arguments = total, misaligned(dout), *sizes
        launch(f"column_sums_naive<{NAMES[operands]}>", (cdiv(N, 256),), (256,), arguments)
        return total.get()

    def sliced():
        partials, total = card.empty((slices, N), np.float32), device(np.append(dbias, np.ones(4, F32)))
        arguments = partials, device(dout), *map(np.int32, (rows, N, per_slice))
        launch(f"column_partials<{NAMES[operands]}>", (cdiv(N, columns), slices), (256,), arguments)
        arguments = total, partials, np.uint64(N), np.uint64(N), np.int32(slices)
        launch("add_partials", (cdiv(N, 1024),), (256,), arguments)
        assert (total.get()[N:] == 1).all()  # what lies behind it stays
        return total.get()[:N]

    for compute in (naive, sliced) if N % 8 == 0 else (naive,):
        result = compute()
        assert result.tobytes() == compute().tobytes()
        check(result, dbias + expected)


def test_gelu_far_out():
    """gelu(x) and its slope at both ends: 0 and x, 0 and 1, and no NaN between them."""
    pre = np.array([[-1e4, -50.0, -6.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 6.0, 50.0, 1e4, 0.0]], np.float32)
    N, tile = pre.size, ", ".join(map(str, FLOAT_TILES[1]))
    one, out, copy = np.eye(1, 4, dtype=np.float32), card.empty((1, N), F32), card.empty((1, N), F32)
    one, sizes = device(one), tuple(map(np.int32, (1, N, 4, 16)))
    name = f"matmul_float<BIAS_GELU, false, false, {tile}>"
    nothing = device(np.zeros((4, N), np.float32))
    launch(name, (1,), (256,), (out, copy, device(pre[0]), one, nothing, *sizes))
    np.testing.assert_allclose(out.get(), gelu(pre.astype(np.float64)), rtol=1e-5, atol=1e-9)
    name = f"matmul_float<GELU_GRAD, false, true, {tile}>"
    ones, no_bias = device(np.ones((N, 4), np.float32)), device(None)
    launch(name, (1,), (256,), (out, device(pre), no_bias, one, ones, *sizes))
    with np.errstate(over="ignore"):
        expected = gelu_grad(pre.astype(np.float64))
    np.testing.assert_allclose(out.get(), expected, rtol=1e-5, atol=1e-7)
