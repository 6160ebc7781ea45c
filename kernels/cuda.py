"""The operations of reference.py, same names, same arguments, on an NVIDIA GPU: each launches our kernels.

Read reference.py first: what every operation computes, and the letters for the sizes, stand there. Read
gpu.py for check and launch, and the .cu file beside the function that launches it: the table at its top has
each kernel's grid, block and workspace, and this file follows the tables. What is decided here is which of a
file's kernels runs, and with what tile: by sizes, by alignment and by what the card has.

S is the storage type, "float" or "bf16", of all arrays that are marked with it.
"""

import collections
import functools

import ml_dtypes
import numpy as np

from common import UserError
from kernels.gpu import (  # noqa: F401  among these is what reference.py defines at its end
    CAPABILITY,
    DEVICE,
    HERE,
    NAMES,
    SHARED,
    SMS,
    WIDTH,
    aligned,
    assign,
    card_name,
    cdiv,
    check,
    elapsed,
    empty,
    free_memory,
    head_map,
    launch,
    load,
    now,
    read_later,
    replay,
    scratch,
    synchronize,
    tensor_map,
    to_device,
    to_host,
    xp,
    zeros,
)

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
if CAPABILITY < 80:
    del DTYPES["bfloat16"]  # its tensor cores came with sm_80
LOGITS = 8192 * 50304  # elements of a chunk of logits: 8,192 rows of GPT-2's, 0.8 gigabytes of bf16
ROUND_TO_EIGHTHS = True  # whether GPT2._weighted_targets rounds the number of tokens up
BATCH_TOKENS, SHARE = 1 << 17, 0.9  # the default micro-batch: at most these tokens, this share of free memory
# A benchmark or a test writes here what is to run instead of what would be chosen below. "matmul": a tile of
# matmul.cu or a name of HOPPER_TILES; "slices": in how many slices to cut the inner dimension of dweight's
# product; "attention": "portable" or "flash".
KERNEL_OVERRIDES = {}


# ------------------------------------------------------------------------------------------------------------
# Encoder


def encoder_forward(out, tokens, wte, wpe, offsets=None):
    what = "encoder_forward: out S B T C, tokens int B T, wte S V C, wpe S P C, offsets? int B"
    n = check(what, out, tokens, wte, wpe, offsets)
    arguments = out, tokens, wte, wpe, offsets, n.B * n.T, n.T, n.C, n.P
    if aligned(out, wte, wpe):
        launch("encoder", f"encoder_forward<{n.S}>", cdiv(n.B * n.T, 8), 256, *arguments)
    else:
        launch("encoder", f"encoder_forward_naive<{n.S}>", cdiv(n.B * n.T * n.C, 256), 256, *arguments)


@functools.cache
def _chunk_count():
    """A counter (1,) int32 of token_groups. encoder_backward's kernels leave it zero."""
    return zeros(1, np.int32)


def encoder_backward(dwte, dwpe, dout, tokens):
    what = "encoder_backward: dout S B T C, dwte float V C, dwpe float P C, tokens int B T"
    n = check(what, dout, dwte, dwpe, tokens)
    if n.T > n.P:
        raise ValueError(f"encoder_backward: dwpe has {n.P} positions, dout {n.T}")
    N = n.B * n.T
    if not aligned(dout, dwte, dwpe):
        grid, arguments = (n.V, cdiv(n.C, 256)), (dwte, dout, tokens, N, n.C)
        launch("encoder", f"encoder_backward_naive<{n.S}>", grid, 256, *arguments)
        grid, arguments = cdiv(n.T * n.C, 256), (dwpe, dout, n.B, n.T, n.C)
        return launch("encoder", f"encoder_backward_wpe_naive<{n.S}>", grid, 256, *arguments)
    slots, most = cdiv(N, 32), min(N, n.V + N // 32)
    wanted = (N, np.int32), (4 * most, np.int32), (2 * slots, np.int32), (slots * n.C, np.float32)
    order, chunks, groups, partials = scratch(*wanted)
    count = _chunk_count()
    bits = max((cdiv(n.V, 400) - 1).bit_length(), min(6, (N // 512).bit_length()))  # of the number of blocks
    arguments = order, chunks, count, groups, tokens, N, n.V, bits
    launch("encoder", "token_groups", 1 << bits, 1024, *arguments, shared=4 * 33 * cdiv(n.V, 1 << bits))
    arguments = dwte, dwpe, partials, dout, order, chunks, count, n.B, n.T, n.C
    launch("encoder", f"encoder_backward<{n.S}, 16, 4>", 4 * SMS, 256, *arguments)
    arguments = dwte, partials, groups, count, N, n.C
    launch("encoder", "encoder_backward_join", (cdiv(slots, 8), cdiv(n.C, 128)), 256, *arguments)


def take_rows(out, inp, rows):
    n = check("take_rows: out S R C, inp~ S M C, rows int R", out, inp, rows)
    arguments = out, inp, rows, n.C, inp.strides[0] // inp.itemsize
    if aligned(out, inp) and inp.strides[0] % 16 == 0:
        launch("gather", f"take_rows<{n.S}>", (n.R, cdiv(n.C, 256 * WIDTH[n.S])), 256, *arguments)
    else:
        launch("gather", f"take_rows_naive<{n.S}>", (n.R, cdiv(n.C, 256)), 256, *arguments)


# ------------------------------------------------------------------------------------------------------------
# Layernorm, GELU, residual


def layernorm_forward(out, mean, rstd, inp, weight, bias):
    what = "layernorm_forward: out S N C, mean float N, rstd float N, inp S N C, weight S C, bias S C"
    n = check(what, out, mean, rstd, inp, weight, bias)
    arguments = out, mean, rstd, inp, weight, bias, n.N, n.C
    vectors, blocks = cdiv(n.C, 32 * WIDTH[n.S]), cdiv(n.N, 4)  # 16 bytes for each lane of a warp
    if aligned(out, inp, weight, bias) and vectors <= {"bf16": 7, "float": 13}[n.S]:
        kernel = f"layernorm_forward<{n.S}, {vectors}>"
        launch("layernorm", kernel, min(5 * SMS, blocks), 128, *arguments, overlap=True)
    else:
        launch("layernorm", f"layernorm_forward_rows<{n.S}>", blocks, 128, *arguments)


def layernorm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd):
    what = (
        "layernorm_backward: dinp S N C, dweight float C, dbias float C, dout S N C, inp S N C, weight S C, "
        "mean float N, rstd float N"
    )
    n = check(what, dinp, dweight, dbias, dout, inp, weight, mean, rstd)
    blocks = min(3 * SMS, cdiv(n.N, 4))
    (partials,) = scratch((blocks * 2 * n.C, np.float32))
    arguments = dinp, partials, dout, inp, weight, mean, rstd, n.N, n.C
    vectors = cdiv(n.C, 32 * WIDTH[n.S])
    if aligned(dinp, dout, inp, weight) and vectors <= {"bf16": 7, "float": 10}[n.S]:
        kernel = f"layernorm_backward<{n.S}, {vectors}>"
        launch("layernorm", kernel, blocks, 128, *arguments, shared=8 * n.C)
    else:
        launch("layernorm", f"layernorm_backward_rows<{n.S}>", blocks, 128, *arguments)
    arguments = dweight, dbias, partials, blocks, n.C
    launch("layernorm", "layernorm_backward_reduce", cdiv(2 * n.C, 32), 1024, *arguments)


def _elementwise(kernel, n, *arrays):
    size = n.N * n.C
    if aligned(*arrays):
        launch("gelu", f"{kernel}<{n.S}>", cdiv(size, 512 * WIDTH[n.S]), 256, *arrays, size)
    else:
        launch("gelu", f"{kernel}_naive<{n.S}>", cdiv(size, 256), 256, *arrays, size)


def gelu_forward(out, inp):
    n = check("gelu_forward: out S N C, inp S N C", out, inp)
    _elementwise("gelu_forward", n, out, inp)


def gelu_backward(dinp, dout, inp):
    n = check("gelu_backward: dinp S N C, dout S N C, inp S N C", dinp, dout, inp)
    _elementwise("gelu_backward", n, dinp, dout, inp)


def residual_forward(out, inp1, inp2):
    n = check("residual_forward: out S N C, inp1 S N C, inp2 S N C", out, inp1, inp2)
    _elementwise("residual_forward", n, out, inp1, inp2)


# ------------------------------------------------------------------------------------------------------------
# Matmul: matmul.cu and matmul_hopper.cu say what the tiles are


def _tile(S, M, N, K, split):
    """BM, BN, BK, then how threads share them (matmul.cu's table). split: cutting K may give more blocks."""
    blocks = cdiv(M, 128) * cdiv(N, 128) * (cdiv(K, 512) if split else 1)
    if S == "float":
        return (128, 128, 8, 8, 8) if blocks >= SMS else (64, 64, 16, 4, 4)
    if blocks < SMS:
        return 64, 64, 64, 32, 32, 3
    if SHARED >= 200 * 1024:  # sm_90
        return (128, 256, 64, 64, 64, 3) if K >= 2048 and N > 128 else (128, 128, 64, 64, 64, 3)
    return (128, 128, 32, 64, 64, 4) if SHARED >= 160 * 1024 else (128, 128, 32, 64, 64, 3)


@functools.cache
def _slices(tile, M, N, K, shared):
    """In how many slices to cut K: full waves of blocks, weighed against the traffic of the partial sums."""
    BM, BN, BK = tile[:3]
    tiles, at_once = cdiv(M, BM) * cdiv(N, BN), SMS * (1 if shared > SHARED // 2 else 2)

    def seconds(slices, flops=5e14, bandwidth=3e12):  # an H100's; only the ratio counts
        computing = cdiv(tiles * slices, at_once) * at_once * 2 * BM * BN * cdiv(K, slices) / flops
        return computing + (2 * slices * M * N * 4 / bandwidth if slices > 1 else 0)

    return min(range(1, max(1, min(64, K // (8 * BK))) + 1), key=seconds)


@functools.cache
def _finished():
    """Counters (SMS,) uint32 of finished blocks that share a result. Every kernel leaves them zero."""
    return zeros(SMS, np.uint32)


def _skinny_tile(M, N, K):
    """matmul_skinny's MI, BN, stages and slices of K; None for many rows, or without room for two stages.

    Every block reads its rows whole, for BN columns. It takes half of 64 rows where that gives no more blocks
    than multiprocessors, and 32 columns where 16 would give more. With up to 16 rows several blocks share a
    long K, if there are few. There are as many stages as a slice of K fills and shared memory holds, of all
    blocks at once if possible.
    """
    if M > 64 or (M > 16 and N > 4096):
        return None
    rows = 16 if M <= 16 else 32 if M <= 32 or 2 * cdiv(N, 16) <= SMS else 64
    columns = 32 if M > 16 and cdiv(N, 16) > SMS else 16
    stage = (rows + columns) * 1024
    if 2 * stage > SHARED:
        return None
    blocks = cdiv(N, columns) * cdiv(M, rows)
    slices = max(1, min(3, 3 * SMS // 2 // blocks, K // 1024)) if M <= 16 else 1
    at_once = cdiv(blocks * slices, SMS)  # blocks on a multiprocessor, each with 1 KiB of CUDA's
    room = ((SHARED + 1024) // at_once - 1152) // stage
    stages = max(2, min(6, cdiv(K, 512 * slices), SHARED // stage, room))
    return rows // 16, columns, stages, slices


HopperTile = collections.namedtuple("HopperTile", "BM BN stages pingpong speed epilogue")
# speed: TFLOP/s of all multiprocessors while they multiply. epilogue: seconds of a tile's epilogue that no
# product hides. Both are fitted to timings on an H200, to rank the tiles, not to predict a time.
HOPPER_TILES = {
    "pingpong": HopperTile(128, 192, 4, True, 700, 0),
    "narrow": HopperTile(128, 192, 4, False, 708, 3e-6),
    "wide": HopperTile(128, 256, 4, False, 700, 1e-6),
}


@functools.cache
def _hopper_choice(M, N, K, split, forced):
    """(name of the tile, slices of K) with the shortest predicted time."""

    def seconds(name, slices):
        tile = HOPPER_TILES[name]
        rounds = cdiv(cdiv(M, tile.BM) * cdiv(N, tile.BN) * slices, SMS)
        alone = tile.pingpong and rounds == 1  # then the other consumer has no tile
        speed = tile.speed * 1e12 / SMS * (0.86 if alone else 1)  # fitted
        partials = 2 * slices * M * N * 4 / 1.5e12 if slices > 1 else 0  # written and read, at a fitted rate
        return rounds * (2 * tile.BM * tile.BN * K / slices / speed + tile.epilogue) + partials

    most = max(1, min(32, K // 1024)) if split else 1
    names = [forced] if forced else HOPPER_TILES
    return min(((name, s) for name in names for s in range(1, most + 1)), key=lambda choice: seconds(*choice))


def _hopper_product(out, a, b, a_t, b_t, epilogue, M, N, K, extra, bias, forced):
    """_product by matmul_hopper.cu, whose table says what the maps, the grid and the shared memory are."""
    name, slices = _hopper_choice(M, N, K, epilogue == "ACCUMULATE", forced)
    slices = KERNEL_OVERRIDES.get("slices", slices) if epilogue == "ACCUMULATE" else 1
    BM, BN, stages, pingpong, *_ = HOPPER_TILES[name]
    target, stride = out, cdiv(M, 64) * 64 * N
    if slices > 1:
        epilogue, (partials,) = "STORE", scratch((slices * stride, np.float32))
        target = partials.reshape(-1, N)
    rows = BM if pingpong else BM // 2  # of a tile, that one consumer computes
    each = 2 if epilogue == "BIAS_GELU" else 1  # boxes written for 64 x 64 outputs: extra is stored too
    boxes = rows // 64 * (BN * out.itemsize // 128) * each  # that a consumer writes of a tile
    fixed = stages * (BM + BN) * 128 + 8 * (2 * stages + 2) + 8 * BN  # stages, barriers, both consumers' bias
    most = (SHARED - fixed) // (2 * (8192 + 8))  # a box and its barrier, for two consumers
    # The largest ring that fits and divides the boxes, so that every tile begins with box 0.
    ring = next(r for r in (4, 3, 2) if r <= most and boxes % r == 0 and r % each == 0)
    flags = (str(flag).lower() for flag in (a_t, b_t, BM, BN, stages, pingpong, ring))
    kernel = f"matmul_hopper<{', '.join((NAMES[out.dtype], epilogue, *flags))}>"
    a_map, b_map = tensor_map(a, 64 if a_t else BM), tensor_map(b, BN if b_t else 64)
    target_map = tensor_map(target, 64)
    extra_map = target_map if extra is None else tensor_map(extra, 64)
    arguments = a_map, b_map, target_map, extra_map, bias, M, N, K, slices
    grid, shared = min(SMS, cdiv(M, BM) * cdiv(N, BN) * slices), fixed + 2 * ring * (8192 + 8)
    launch("matmul_hopper", kernel, grid, 384, *arguments, shared=shared)
    if slices > 1:
        _add_partials(out, partials, M * N, stride, slices)


def _product(out, a, b, a_t, b_t, epilogue, M, N, K, extra=None, bias=None):
    """out (M, N) = a (M, K) @ b (K, N) and the epilogue; a_t: a is stored as (K, M), b_t: b as (N, K)."""
    S, O = NAMES[a.dtype], NAMES[out.dtype]
    arguments = out, extra, bias, a, b, M, N, K
    flags = ", ".join(str(flag).lower() for flag in (a_t, b_t))
    if not (aligned(out, a, b, extra, bias) and N % WIDTH[S] == 0):
        kernel, grid = f"matmul_naive<{S}, {O}, {epilogue}, {flags}>", cdiv(M, 8) * cdiv(N, 32)
        return launch("matmul", kernel, grid, (32, 8), *arguments)
    wanted = KERNEL_OVERRIDES.get("matmul")
    forced = wanted if wanted in HOPPER_TILES else None
    large = M * N * K >= 1 << 27 and M >= 128 and not wanted  # else latency is what counts
    if CAPABILITY == 90 and S == "bf16" and (large or forced):
        a, b = a.reshape(-1, M if a_t else K), b.reshape(-1, K if b_t else N)
        out, extra = out.reshape(-1, N), None if extra is None else extra.reshape(-1, N)
        return _hopper_product(out, a, b, a_t, b_t, epilogue, M, N, K, extra, bias, forced)
    skinny = _skinny_tile(M, N, K) if S == "bf16" and not a_t and not wanted else None
    if skinny:
        MI, BN, stages, slices = skinny
        kernel = f"matmul_skinny<{O}, {epilogue}, {str(b_t).lower()}, {MI}, {BN}, {stages}>"
        grid, shared = (cdiv(N, BN), cdiv(M, 16 * MI), slices), stages * (16 * MI + BN) * 1024
        partial = finished = None
        if slices > 1:
            (partial,), finished = scratch((grid[0] * slices * 16 * MI * BN, np.float32)), _finished()
        arguments = out, extra, bias, a, b, partial, finished, M, N, K
        return launch("matmul", kernel, grid, 256, *arguments, shared=shared, overlap=True)
    tile = wanted or _tile(S, M, N, K, split=epilogue == "ACCUMULATE")
    BM, BN, BK, WM, WN, *stages = tile
    shared = stages[0] * (BM + BN) * BK * 2 if stages else 0
    threads = BM * BN // (WM * WN) * (32 if stages else 1)
    slices = 1
    if epilogue == "ACCUMULATE":
        slices = KERNEL_OVERRIDES.get("slices") or _slices(tile, M, N, K, shared)
    k_slice = cdiv(cdiv(K, slices), BK) * BK
    slices, target = cdiv(K, k_slice), out
    if slices > 1:
        epilogue, (target,) = "STORE", scratch((slices * M * N, np.float32))
    variant = f"{epilogue}, {flags}, {', '.join(map(str, tile))}"
    kernel = f"matmul_bf16<{O}, {variant}>" if stages else f"matmul_float<{variant}>"
    grid = cdiv(M, BM) * cdiv(N, BN), 1, slices
    launch("matmul", kernel, grid, threads, target, *arguments[1:], k_slice, shared=shared)
    if slices > 1:
        _add_partials(out, target, M * N, M * N, slices)


def _add_partials(out, partials, size, stride, slices):
    sizes = np.uint64(size), np.uint64(stride)
    launch("matmul", "add_partials", cdiv(size, 1024), 256, out, partials, *sizes, slices)


def _stored(weight):
    """weight as it is stored, and whether that is transposed: (in, out), or (V, C) where weight is wte.T."""
    return (weight, False) if weight.flags.c_contiguous else (weight.T, True)


def matmul_forward(out, inp, weight, bias):
    weight, transposed = _stored(weight)
    shape = "O I" if transposed else "I O"
    what = f"matmul_forward: inp S N I, weight S {shape}, bias? S O, out {'W' if bias is None else 'S'} N O"
    n = check(what, inp, weight, bias, out)
    epilogue = "STORE" if bias is None else "BIAS"
    _product(out, inp, weight, False, transposed, epilogue, n.N, n.O, n.I, bias=bias)


def matmul_gelu_forward(out, pre, inp, weight, bias):
    what = "matmul_gelu_forward: out S N O, pre S N O, inp S N I, weight S I O, bias S O"
    n = check(what, out, pre, inp, weight, bias)
    _product(out, inp, weight, False, False, "BIAS_GELU", n.N, n.O, n.I, pre, bias)


def matmul_residual_forward(out, inp, weight, bias, residual):
    what = "matmul_residual_forward: out S N O, inp S N I, weight S I O, bias S O, residual S N O"
    n = check(what, out, inp, weight, bias, residual)
    _product(out, inp, weight, False, False, "BIAS_RESIDUAL", n.N, n.O, n.I, residual, bias)


def matmul_backward(dinp, dweight, dbias, dout, inp, weight):
    (weight, transposed), (dweight, same) = _stored(weight), _stored(dweight)
    if same != transposed:
        raise ValueError("matmul_backward: weight and dweight must be stored the same way")
    shape = "O I" if transposed else "I O"
    what = (
        f"matmul_backward: dout S N O, inp S N I, dinp? S N I, dweight float {shape}, dbias? float O, "
        f"weight S {shape}"
    )
    n = check(what, dout, inp, dinp, dweight, dbias, weight)
    if dinp is not None:
        _product(dinp, dout, weight, False, not transposed, "STORE", n.N, n.I, n.O)
    if transposed:
        _product(dweight, dout, inp, True, False, "ACCUMULATE", n.O, n.I, n.N)
    else:
        _product(dweight, inp, dout, True, False, "ACCUMULATE", n.I, n.O, n.N)
    if dbias is not None:
        _bias_gradient(dbias, dout, n)


def matmul_gelu_backward(dpre, dweight, dbias, dout, act, weight, pre):
    what = (
        "matmul_gelu_backward: dpre S N I, dweight float I O, dbias float O, dout S N O, act S N I, "
        "weight S I O, pre S N I"
    )
    n = check(what, dpre, dweight, dbias, dout, act, weight, pre)
    _product(dpre, dout, weight, False, True, "GELU_GRAD", n.N, n.I, n.O, pre)
    _product(dweight, act, dout, True, False, "ACCUMULATE", n.I, n.O, n.N)
    _bias_gradient(dbias, dout, n)


def _bias_gradient(dbias, dout, n):
    if not aligned(dbias, dout):
        kernel = f"column_sums_naive<{n.S}>"
        return launch("matmul", kernel, cdiv(n.O, 256), 256, dbias, dout, n.N, n.O)
    blocks = cdiv(n.O, 32 * WIDTH[n.S])
    slices = max(1, min(cdiv(4 * SMS, blocks), n.N // 64))
    (partials,) = scratch((slices * n.O, np.float32))
    arguments = partials, dout, n.N, n.O, cdiv(n.N, slices)
    launch("matmul", f"column_partials<{n.S}>", (blocks, slices), 256, *arguments)
    _add_partials(dbias, partials, n.O, n.O, slices)


# ------------------------------------------------------------------------------------------------------------
# Attention


def _attention_version(n, n_head, *arrays):
    """(head size HS, HS rounded up to 64 or 128, whether the tensor cores compute)."""
    if n_head != n.H:
        raise ValueError(f"attention: lse is for {n.H} heads, not {n_head}")
    if n.C % n.H:
        raise ValueError(f"attention: {n.C} channels cannot be shared by {n.H} heads")
    HS = n.C // n.H
    if HS > 128:
        raise UserError(f"heads of {HS} channels are too wide for the GPU's kernels, at most 128; add heads")
    if any(array.data.ptr % 16 for array in arrays):
        raise ValueError("attention: an array does not begin on a 16-byte boundary")
    tensor = n.S == "bf16" and HS in (64, 128)
    return HS, 64 if HS <= 64 else 128, tensor and KERNEL_OVERRIDES.get("attention") != "flash"


def _on_hopper():
    """Whether attention_hopper.cu may run: its instructions exist on sm_90 alone."""
    return CAPABILITY == 90 and KERNEL_OVERRIDES.get("attention") != "portable"


def _float_tile(HP):
    """FloatTile of attention.cuh: its rows, the bytes of a tile of channels, and those of its scores."""
    rows = 4096 // HP if CAPABILITY >= 80 else 2048 // HP
    return rows, 4 * rows * (HP + 4), 4 * rows * (rows + 4)


def attention_forward(out, lse, qkv, n_head):
    n = check("attention_forward: out S B T C, lse float B H T, qkv S B T 3C", out, lse, qkv)
    HS, HP, tensor = _attention_version(n, n_head, out, qkv)
    if tensor and _on_hopper():  # QUERIES, KEYS and SHARED of attention_hopper.cu's Forward<HS>
        queries, keys, shared = (192, 128, 139360) if HS == 64 else (128, 128, 229472)
        maps = head_map(qkv, 3, n.H, queries), head_map(qkv, 3, n.H, keys), head_map(out, 1, n.H, 64)
        # A warpgroup of 128 threads for each 64 queries, and the producer's.
        grid, threads = min(SMS, n.B * n.H * cdiv(n.T, queries)), 2 * queries + 128
        arguments = *maps, lse, n.B, n.T, n.H
        kernel = f"attention_forward_hopper<{HS}>"
        return launch("attention_hopper", kernel, grid, threads, *arguments, shared=shared)
    if tensor:
        queries, shared = (128, 49152) if HS == 64 else (64, 81920)
        grid, kernel = (n.H, cdiv(n.T, queries), n.B), f"attention_forward_tensor<{HS}>"
        return launch("attention", kernel, grid, 128, out, lse, qkv, n.T, n.H, shared=shared)
    queries, tile, scores = _float_tile(HP)
    grid, kernel = (n.H, cdiv(n.T, queries), n.B), f"attention_forward_flash<{n.S}, {HP}>"
    launch("attention", kernel, grid, 256, out, lse, qkv, n.T, n.H, HS, shared=3 * tile + scores)


def attention_backward(dqkv, dout, out, lse, qkv, n_head):
    what = "attention_backward: dqkv S B T 3C, dout S B T C, out S B T C, lse float B H T, qkv S B T 3C"
    n = check(what, dqkv, dout, out, lse, qkv)
    HS, HP, tensor = _attention_version(n, n_head, dqkv, dout, out, qkv)
    hopper = tensor and _on_hopper()
    Tp = cdiv(n.T, 128) * 128 if hopper else cdiv(n.T, 64) * 64
    (rows,) = scratch((n.B * n.H * Tp * 2, np.float32))  # float2: lse and D of every query
    rows, file = rows.view(np.complex64), "attention_backward"
    arguments = rows, dout, out, lse, n.B, n.T, Tp, n.H, HS
    launch(file, f"attention_backward_prepare<{n.S}>", cdiv(n.B * Tp * n.H, 32), 256, *arguments)
    if hopper:
        grid = min(SMS, n.B * n.H * cdiv(n.T, 128))
        for owner, queries, keys, shared in (  # OWN or WALKED, and SHARED of Backward<HS, OWNER>
            ("KEYS", 128 if HS == 64 else 64, 128, {64: 149568, 128: 164912}),
            ("QUERIES", 128, 128 if HS == 64 else 64, {64: 147520, 128: 163888}),
        ):
            maps = (
                head_map(qkv, 3, n.H, keys),
                head_map(qkv, 3, n.H, queries),
                head_map(dout, 1, n.H, queries),
            )
            arguments = *maps, head_map(dqkv, 3, n.H, 64), rows, n.B, n.T, Tp, n.H
            kernel = f"attention_backward_hopper<{HS}, {owner}>"
            launch("attention_hopper", kernel, grid, 384, *arguments, shared=shared[HS])
        return
    arguments = dqkv, dout, qkv, rows, n.T, n.H
    for owner, tensor_shared in (("KEYS", {64: 50176, 128: 49408}), ("QUERIES", {64: 49152, 128: 65536})):
        if tensor:
            kernel, grid = f"attention_backward_tensor<{HS}, {owner}>", (n.H, cdiv(n.T, 64), n.B)
            launch(file, kernel, grid, 128, *arguments, shared=tensor_shared[HS])
        else:
            kernel = f"attention_backward_flash<{n.S}, {HP}, {owner}>"
            owned, tile, scores = _float_tile(HP)
            grid = n.H, cdiv(n.T, owned), n.B
            launch(file, kernel, grid, 256, *arguments, HS, shared=4 * tile + scores)


def attention_decode(out, qkv, keys, values, lengths, empty_cache=False):
    what = "attention_decode: out S B T C, qkv S B T 3C, keys S B H M D, values S B H M D, lengths int B"
    n = check(what, out, qkv, keys, values, lengths)
    HS, HP, _ = _attention_version(n, n.H)
    if HS != n.D:
        raise ValueError(f"attention_decode: {n.H} heads of {n.D} channels are not {n.C}")

    def append():
        arguments = keys, values, qkv, lengths, n.T, n.H, HS, n.M
        launch("decode", f"attention_append<{n.S}>", (cdiv(n.C, 256), n.T, n.B), 256, *arguments)

    if n.T > 1:
        append()
        if empty_cache:  # every token looks back at its own prompt alone
            (lse,) = scratch((n.B * n.H * n.T, np.float32))
            return attention_forward(out, lse.reshape(n.B, n.H, n.T), qkv, n.H)
    arguments = qkv, keys, values, lengths, n.T, n.H, HS, n.M
    if not aligned(out, qkv, keys, values):
        if n.T == 1:
            append()
        grid = cdiv(n.C, 256), n.T, n.B
        return launch("decode", f"attention_decode_naive<{n.S}>", grid, 256, out, *arguments)
    blocks = n.B * n.T * n.H
    splits = min(8, cdiv(n.M, 64)) if blocks < SMS else 1  # decode.cu has the measurements
    partial = finished = None
    if splits > 1:
        (partial,), finished = scratch((blocks * splits * (HS + 2), np.float32)), _finished()
    kernel, grid = f"attention_decode<{n.S}, {HP}>", (n.H * splits, n.T, n.B)
    launch("decode", kernel, grid, 128, out, partial, finished, *arguments, splits, overlap=True)


# ------------------------------------------------------------------------------------------------------------
# Classifier


def _threads(n, most):
    """Threads for a row of Vp logits: one for every 16 bytes, in whole warps, at most `most`."""
    return min(most, cdiv(n.P, 32 * WIDTH[n.S]) * 32)


def cross_entropy(losses, logits, targets, vocab_size):
    n = check("cross_entropy: losses float N, logits S N P, targets int N", losses, logits, targets)
    inputs, columns = (losses, logits, targets), (min(vocab_size, n.P), n.P)
    if aligned(logits):
        launch("classifier", f"cross_entropy<{n.S}>", n.N, _threads(n, 512), *inputs, *columns)
    else:
        kernel = f"cross_entropy_naive<{n.S}>"
        launch("classifier", kernel, cdiv(n.N, 128), 128, *inputs, n.N, *columns)


def classifier(losses, logits, targets, weights, vocab_size):
    what = "classifier: losses float N, logits S N P, targets int N, weights float N"
    n = check(what, losses, logits, targets, weights)
    inputs, columns = (losses, logits, targets, weights), (min(vocab_size, n.P), n.P)
    row = n.P * logits.itemsize  # bytes
    if not aligned(logits):
        kernel = f"classifier_naive<{n.S}>"
        launch("classifier", kernel, cdiv(n.N, 128), 128, *inputs, n.N, *columns)
    elif CAPABILITY >= 80 and row <= SHARED - 512:  # less the kernel's static shared memory
        kernel = f"classifier<{n.S}>"
        launch("classifier", kernel, n.N, _threads(n, 768), *inputs, *columns, shared=row)
    else:
        launch("classifier", f"classifier_twice<{n.S}>", n.N, _threads(n, 1024), *inputs, *columns)


def weighted_sum(total, values, weights):
    n = check("weighted_sum: total float 1, values float N, weights float N", total, values, weights)
    launch("classifier", "weighted_sum", 1, 1024, total, values, weights, n.N)


# ------------------------------------------------------------------------------------------------------------
# Optimizer


def global_norm(norm, grads):
    n = check("global_norm: norm float 1, grads float N", norm, grads)
    if not aligned(grads):
        return launch("norm", "global_norm_naive", 1, 1024, norm, grads, n.N)
    (partials,) = scratch((1024, np.float32))
    launch("norm", "square_sums", 1024, 256, partials, grads, n.N)
    launch("norm", "global_norm_finish", 1, 1024, norm, partials, 1024)


def plan_update(update, steps, norm, loss, settings, beta1, beta2):
    what = "plan_update: update float 4, steps int 1, norm float 1, loss float 1, settings float 4"
    check(what, update, steps, norm, loss, settings)
    arguments = update, steps, norm, loss, settings, np.float64(beta1), np.float64(beta2)
    launch("norm", "plan_update", 1, 32, *arguments)


def adamw(params, grads, m, v, update, beta1, beta2, eps, weight_decay, copy=None):
    what = "adamw: params float N, grads float N, m float N, v float N, update float 4, copy? bf16 N"
    n = check(what, params, grads, m, v, update, copy)
    numbers = float(beta1), float(beta2), float(eps), float(weight_decay)
    arguments = params, grads, m, v, copy, update, *numbers, n.N
    fast = aligned(params, grads, m, v, copy)
    launch("adamw", "adamw" if fast else "adamw_naive", cdiv(n.N, 2048 if fast else 256), 256, *arguments)


# ------------------------------------------------------------------------------------------------------------
# Sampling


def sample(
    out, logits, seed, streams, counters, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None
):
    what = "sample: out int B, logits~ S B V, streams long B, counters long B, logprobs? float 2 B"
    n = check(what, out, logits, streams, counters, logprobs)
    filters = float(temperature), min(int(top_k), n.V), float(top_p), float(min_p)
    arguments = out, logprobs, logits, np.uint64(seed), streams, counters, *filters, n.V
    launch("sample", f"sample<{n.S}>", n.B, 1024, *arguments, logits.strides[0] // logits.itemsize)
