"""The attention kernels against float64 NumPy: every version, odd sizes, both storage types, decoding.

Read kernels/attention.cu before: its launch table is what `forward` and `backward` below follow. Outputs are
full of NaN before each launch, and what lies beyond the used part of a KV cache stays so.

Accuracy: float32 within 1e-5 of the norm. bf16: the reference is computed in float64 on the bf16-rounded
inputs, and the error may be twice that of a naive implementation which rounds what the kernels round.
In the emulator, or on a GPU where there is one (tests/card.py).
"""

import functools
import sys

import card
import numpy as np
import pytest
from ml_dtypes import bfloat16

cuda = card.cuda()
cupy, gpu = cuda.xp, sys.modules[cuda.launch.__module__]
LENGTHS = (1, 3, 33, 64, 65, 100, 130, 200)
STORAGE = {"float32": "float", "bfloat16": "bf16"}

# ----------------------------------------------------------------------------------------------------- arrays


def rounded(x):
    """The nearest bf16, as float64."""
    return x.astype(bfloat16).astype(np.float64)


def exact(x):
    return x


def to_device(x, dtype):
    """A device array; bf16 goes as its 16 bits."""
    return cupy.asarray(x.astype(bfloat16).view(np.uint16) if dtype == "bfloat16" else x.astype(np.float32))


def to_host(x, dtype):
    """The same as float64."""
    return (x.get().view(bfloat16) if dtype == "bfloat16" else x.get()).astype(np.float64)


def poisoned(shape, dtype):
    return to_device(np.full(shape, np.nan), dtype)


# -------------------------------------------------------------------------------------------------- reference


def reference(qkv, dout, NH, r=exact):
    """(out, lse, dqkv) in float64; r rounds where the kernels store bf16: P, out, dS, dqkv."""
    B, T, C = dout.shape
    HS = C // NH
    q, k, v = qkv.reshape(B, T, 3, NH, HS).transpose(2, 0, 3, 1, 4)  # (B, NH, T, HS) each
    dy = dout.reshape(B, T, NH, HS).transpose(0, 2, 1, 3)  # (B, NH, T, HS)
    s = q @ k.swapaxes(2, 3) / np.sqrt(HS)  # (B, NH, T, T)
    s = np.where(np.tri(T, dtype=bool), s, -np.inf)
    m = s.max(-1, keepdims=True)
    lse = m + np.log(np.exp(s - m).sum(-1, keepdims=True))  # (B, NH, T, 1)
    p = np.exp(s - lse)
    out = r(r(p) @ v)
    dv = r(p).swapaxes(2, 3) @ dy
    ds = r(p * (dy @ v.swapaxes(2, 3) - (out * dy).sum(-1, keepdims=True)))
    dq, dk = ds @ k / np.sqrt(HS), ds.swapaxes(2, 3) @ q / np.sqrt(HS)
    dqkv = r(np.stack([dq, dk, dv])).transpose(1, 3, 0, 2, 4).reshape(B, T, 3 * C)
    return out.transpose(0, 2, 1, 3).reshape(B, T, C), lse[..., 0], dqkv


def inputs(B, T, NH, HS, dtype, scale=1.0):
    rng = np.random.default_rng(T * 1000 + HS + NH)
    qkv, dout = rng.normal(0, scale, (B, T, 3 * NH * HS)), rng.normal(0, 1, (B, T, NH * HS))
    if dtype == "bfloat16":
        return rounded(qkv), rounded(dout)
    return qkv.astype(np.float32).astype(np.float64), dout.astype(np.float32).astype(np.float64)


def error(x, y):
    """The distance from y, in units of y's norm."""
    assert np.isfinite(x).all()
    return np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30)


def assert_close(x, y, naive, dtype):
    assert error(x, y) <= (1e-5 if dtype == "float32" else max(2 * error(naive, y), 1e-4))


# --------------------------------------------------------------------------------------------------- launches


@functools.cache
def module(file):
    names = []
    for storage in ("float", "bf16"):
        if file == "attention.cu":
            names += [f"attention_scores<{storage}>", f"attention_values<{storage}>"]
            names += [f"attention_forward_flash<{storage}, {HP}>" for HP in (64, 128)]
        elif file == "attention_backward.cu":
            names += [f"attention_backward_{kind}<{storage}>" for kind in ("scores", "sums", "prepare")]
            names += [
                f"attention_backward_flash<{storage}, {HP}, {own}>" for own in OWNERS for HP in (64, 128)
            ]
        else:
            names += [f"attention_{kind}<{storage}>" for kind in ("append", "decode_naive")]
            names += [f"attention_decode<{storage}, {HP}>" for HP in (64, 128)]
    if file == "attention.cu":
        names += ["attention_softmax", "attention_forward_tensor<64>", "attention_forward_tensor<128>"]
    elif file == "attention_backward.cu":
        names += [f"attention_backward_tensor<{HS}, {own}>" for own in OWNERS for HS in (64, 128)]
    code, options = (cuda.HERE / file).read_text(), gpu._options()
    return cupy.RawModule(code=code, options=options, name_expressions=names)


OWNERS = ("KEYS", "QUERIES")
WIDTH = {"float": 4, "bf16": 8}


def launch(file, name, grid, block, *arguments, shared=0):
    kernel = module(file).get_function(name)
    kernel.max_dynamic_shared_size_bytes = max(shared, kernel.max_dynamic_shared_size_bytes)
    plain = {int: np.int32, type(None): lambda _: np.uint64(0)}
    arguments = tuple(plain.get(type(a), lambda a: a)(a) for a in arguments)
    kernel(grid, (block,), arguments, shared_mem=shared)


def ceil_div(a, b):
    return -(-a // b)


def float_tile(HS):
    """HP, rows of a tile, bytes of a tile, bytes of the scores: FloatTile of attention.cuh."""
    HP = 64 if HS <= 64 else 128
    rows = (64 if HP == 64 else 32) // (1 if cuda.CAPABILITY >= 80 else 2)
    return HP, rows, 4 * rows * (HP + 4), 4 * rows * (rows + 4)


def forward(version, qkv, NH, dtype):
    """(out, lse) on the device."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    HS, storage, file = C // NH, STORAGE[dtype], "attention.cu"
    out, lse = poisoned((B, T, C), dtype), poisoned((B, NH, T), "float32")
    if version == "hopper":
        cuda.attention_forward(out.view(bfloat16), lse, qkv.view(bfloat16), NH)
    elif version == "naive":
        scores = poisoned((B, NH, T, T), "float32")
        grid = (ceil_div(T, 256), T, B * NH)
        launch(file, f"attention_scores<{storage}>", grid, 256, scores, qkv, T, NH, HS)
        launch(file, "attention_softmax", (ceil_div(T, 8), B * NH), 256, scores, lse, T)
        grid = (ceil_div(C, 256), T, B)
        launch(file, f"attention_values<{storage}>", grid, 256, out, scores, qkv, T, NH, HS)
    elif version == "flash":
        HP, rows, tile, scores = float_tile(HS)
        grid, name = (NH, ceil_div(T, rows), B), f"attention_forward_flash<{storage}, {HP}>"
        launch(file, name, grid, 256, out, lse, qkv, T, NH, HS, shared=3 * tile + scores)
    else:
        queries = 128 if HS == 64 else 64
        grid, shared = (NH, ceil_div(T, queries), B), 2 * HS * (queries + 4 * 64)
        launch(file, f"attention_forward_tensor<{HS}>", grid, 128, out, lse, qkv, T, NH, shared=shared)
    return out, lse


def backward(version, dout, out, lse, qkv, NH, dtype):
    """dqkv on the device."""
    B, T, C = dout.shape
    HS, storage, file = C // NH, STORAGE[dtype], "attention_backward.cu"
    Tp = ceil_div(T, 64) * 64
    dqkv, rows = poisoned((B, T, 3 * C), dtype), poisoned((B, NH, Tp, 2), "float32")
    if version == "hopper":
        cuda.attention_backward(*(x.view(bfloat16) for x in (dqkv, dout, out)), lse, qkv.view(bfloat16), NH)
        return dqkv
    if version == "naive":
        p, ds = (poisoned((B, NH, T, T), "float32") for _ in range(2))
        arguments, grid = (p, ds, dout, out, lse, qkv, T, NH, HS), (ceil_div(T, 256), T, B * NH)
        launch(file, f"attention_backward_scores<{storage}>", grid, 256, *arguments)
        arguments, grid = (dqkv, p, ds, dout, qkv, T, NH, HS), (ceil_div(C, 256), T, B)
        launch(file, f"attention_backward_sums<{storage}>", grid, 256, *arguments)
        return dqkv
    grid, name = (ceil_div(B * Tp * NH, 32),), f"attention_backward_prepare<{storage}>"
    launch(file, name, grid, 256, rows, dout, out, lse, B, T, Tp, NH, HS)
    for own in OWNERS:
        if version == "flash":
            HP, tile_rows, tile, scores = float_tile(HS)
            grid, name = (NH, ceil_div(T, tile_rows), B), f"attention_backward_flash<{storage}, {HP}, {own}>"
            launch(file, name, grid, 256, dqkv, dout, qkv, rows, T, NH, HS, shared=4 * tile + scores)
        else:
            step = 64 if HS == 64 else 16 if own == "KEYS" else 32
            shared = 2 * HS * (2 * 64 + 4 * step) + (16 * step if own == "KEYS" else 0)
            grid, name = (NH, ceil_div(T, 64), B), f"attention_backward_tensor<{HS}, {own}>"
            launch(file, name, grid, 128, dqkv, dout, qkv, rows, T, NH, shared=shared)
    return dqkv


# --------------------------------------------------------------------------------------- forward and backward

VERSIONS = [
    *[("naive", "float32", HS) for HS in (16, 20)],
    *[("naive", "bfloat16", HS) for HS in (16, 20)],
    *[("flash", "float32", HS) for HS in (16, 20, 64, 128)],
    *[("flash", "bfloat16", HS) for HS in (20, 128)],
    *[("tensor", "bfloat16", HS) for HS in (64, 128)],
    *[("hopper", "bfloat16", HS) for HS in (64, 128)],
]


@pytest.fixture(autouse=True)
def _few_multiprocessors(monkeypatch, request):
    """attention_hopper.cu's blocks stay for tile after tile: with three of them each has several."""
    if "hopper" in request.node.name:
        if cuda.CAPABILITY != 90:
            pytest.skip("attention_hopper.cu needs a card of compute capability 9.0")
        monkeypatch.setattr(cuda, "SMS", 3)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(("version", "dtype", "HS"), VERSIONS)
def test_attention(version, dtype, HS, T, B=None, NH=None):
    NH = NH or 1 + (LENGTHS.index(T) if T in LENGTHS else T) % 3
    B = B or (2 if NH < 3 and T <= 130 else 1)
    qkv, dout = inputs(B, T, NH, HS, dtype)
    out, lse, dqkv = reference(qkv, dout, NH)
    naive_out, _, naive_dqkv = reference(qkv, dout, NH, rounded if dtype == "bfloat16" else exact)
    qkv_device, dout_device = to_device(qkv, dtype), to_device(dout, dtype)
    got_out, got_lse = forward(version, qkv_device, NH, dtype)
    assert_close(to_host(got_out, dtype), out, naive_out, dtype)
    assert np.abs(got_lse.get() - lse).max() < 1e-5
    got = to_host(backward(version, dout_device, got_out, got_lse, qkv_device, NH, dtype), dtype)
    for third in range(3):  # dq, dk, dv: each on its own, for their norms differ
        part = np.s_[..., third * NH * HS : (third + 1) * NH * HS]
        assert (
            error(got[part], dqkv[part])
            <= (1e-5 if dtype == "float32" else max(2 * error(naive_dqkv[part], dqkv[part]), 1e-4))
            or np.abs(dqkv[part]).max() < 1e-12
        )  # T = 1: softmax of one score is constant, dq and dk are 0


@pytest.mark.parametrize(("HS", "T"), [(64, 700), (128, 333)])
def test_hopper_rings_wrap(HS, T):
    """More blocks of keys and queries than there are buffers, and the last ones cut short."""
    test_attention("hopper", "bfloat16", HS, T)


@pytest.mark.parametrize(("T", "B", "orders"), [(33, 4, "1"), (392, 5, "569")])
def test_hopper_many_heads(T, B, orders, monkeypatch):
    """Tiles of one block of keys, where only the buffers of queries hold the producer back; and consumers
    beyond T, which skip block after block: a warp that misses one shows in some of the emulator's orders."""
    for order in orders:
        monkeypatch.setenv("EMULATOR_ORDER", order)
        test_attention("hopper", "bfloat16", 64, T, B, NH=3)


THREE = [("naive", "float32", 20), ("flash", "float32", 20), ("tensor", "bfloat16", 64)]
THREE += [("hopper", "bfloat16", HS) for HS in (64, 128)]


@pytest.mark.parametrize(("version", "dtype", "HS"), THREE)
def test_twice_the_same_bits(version, dtype, HS):
    qkv, dout = (to_device(x, dtype) for x in inputs(2, 100, 2, HS, dtype))
    runs = []
    for _ in range(2):
        out, lse = forward(version, qkv, 2, dtype)
        runs.append([x.get().tobytes() for x in (out, lse, backward(version, dout, out, lse, qkv, 2, dtype))])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("version", "dtype", "HS"), THREE)
def test_large_scores(version, dtype, HS):
    """Scores beyond 88: exp overflows without the maximum, and late maxima rescale what came before."""
    qkv, dout = inputs(1, 150, 1, HS, dtype, scale=6.0)
    qkv[:, :, HS : 2 * HS] *= np.linspace(0.25, 2, 150)[None, :, None]  # later keys are longer
    if dtype == "bfloat16":
        qkv = rounded(qkv)
    out, lse, dqkv = reference(qkv, dout, 1)
    naive_out, _, naive_dqkv = reference(qkv, dout, 1, rounded if dtype == "bfloat16" else exact)
    assert np.abs(lse).max() > 150
    qkv_device, dout_device = to_device(qkv, dtype), to_device(dout, dtype)
    got_out, got_lse = forward(version, qkv_device, 1, dtype)
    got_dqkv = to_host(backward(version, dout_device, got_out, got_lse, qkv_device, 1, dtype), dtype)
    tolerance = 2e-4 if dtype == "float32" else 0  # float32 scores of this size are known to 1e-5
    assert error(to_host(got_out, dtype), out) <= max(2 * error(naive_out, out), tolerance)
    assert np.abs(got_lse.get() / lse - 1).max() < 1e-5
    assert error(got_dqkv, dqkv) <= max(2 * error(naive_dqkv, dqkv), tolerance)


@pytest.mark.parametrize(
    ("version", "dtype", "HS"),
    [("flash", "float32", 16), ("tensor", "bfloat16", 64), ("hopper", "bfloat16", 64)],
)
def test_the_future_does_not_matter(version, dtype, HS):
    """What comes after a token changes none of its bits."""
    qkv, _ = inputs(1, 130, 1, HS, dtype)
    before = forward(version, to_device(qkv, dtype), 1, dtype)[0].get()
    qkv[:, 70:] = 1e3
    after = forward(version, to_device(qkv, dtype), 1, dtype)[0].get()
    assert before[:, :70].tobytes() == after[:, :70].tobytes()
    assert before[:, 70:].tobytes() != after[:, 70:].tobytes()


# ----------------------------------------------------------------------------------------------------- decode


def decode_cases():
    """(dtype, head size, version, splits); the fast version reads keys 16 bytes at a time."""
    for dtype, head_sizes in (("float32", (7, 20, 64, 128)), ("bfloat16", (20, 24, 64, 128))):
        for HS in head_sizes:
            yield dtype, HS, "naive", 1
            if HS % WIDTH[STORAGE[dtype]] == 0:
                yield from ((dtype, HS, "fast", splits) for splits in (1, 3, 8))


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize(("dtype", "HS", "version", "splits"), list(decode_cases()))
def test_decode(dtype, HS, T, version, splits):
    """Rows of different lengths, the first one empty, the last one filling its cache; unused cache is NaN."""
    NH, Tmax, storage = 2, 300, STORAGE[dtype]
    lengths = np.array([0, 37, Tmax - T], np.int32)
    B, C = len(lengths), NH * HS
    total = int(lengths.max()) + T
    qkv, _ = inputs(B, total, NH, HS, dtype)  # row b's whole history; its last T tokens are new
    keys, values = np.full((2, B, NH, Tmax, HS), np.nan)
    new = np.empty((B, T, 3 * C))
    expected, naive = np.empty((B, T, C)), np.empty((B, T, C))
    for b, length in enumerate(lengths):
        heads = qkv[b].reshape(total, 3, NH, HS).transpose(1, 2, 0, 3)  # (3, NH, total, HS)
        keys[b, :, :length], values[b, :, :length] = heads[1, :, :length], heads[2, :, :length]
        new[b] = qkv[b, length : length + T]
        row, no_gradient = qkv[None, b, : length + T], np.zeros((1, length + T, C))
        expected[b] = reference(row, no_gradient, NH)[0][0, length:]
        naive[b] = reference(row, no_gradient, NH, rounded)[0][0, length:]
    k_device, v_device, qkv_device = (to_device(x, dtype) for x in (keys, values, new))
    out, lengths_device = poisoned((B, T, C), dtype), cupy.asarray(lengths)
    grid, name = (ceil_div(C, 256), T, B), f"attention_append<{storage}>"
    if version == "naive" or T > 1:  # else the fast one appends by itself
        append = k_device, v_device, qkv_device, lengths_device, T, NH, HS, Tmax
        launch("decode.cu", name, grid, 256, *append)
    arguments = qkv_device, k_device, v_device, lengths_device, T, NH, HS, Tmax
    if version == "naive":
        launch("decode.cu", f"attention_decode_naive<{storage}>", grid, 256, out, *arguments)
    else:
        partial = finished = None
        if splits > 1:
            partial = poisoned((B, T, NH, splits, HS + 2), "float32")
            finished = cupy.zeros((B, T, NH), np.uint32)
        name = f"attention_decode<{storage}, {64 if HS <= 64 else 128}>"
        for _ in range(2):  # the second launch finds the counters as the first one left them
            launch("decode.cu", name, (NH * splits, T, B), 128, out, partial, finished, *arguments, splits)
        assert finished is None or not finished.get().any()
    assert_close(to_host(out, dtype), expected, naive, dtype)
    for b, length in enumerate(lengths):  # old positions kept, new ones written, the rest untouched
        heads = new[b].reshape(T, 3, NH, HS).transpose(1, 2, 0, 3)
        keys[b, :, length : length + T], values[b, :, length : length + T] = heads[1], heads[2]
    assert np.array_equal(to_host(k_device, dtype), keys, equal_nan=True)
    assert np.array_equal(to_host(v_device, dtype), values, equal_nan=True)
    assert np.array_equal(lengths_device.get(), lengths)


@pytest.mark.parametrize("naive", [True, False])
def test_decode_beyond_the_cache(naive):
    """Padding tokens of a row may lie beyond its cache: they are dropped, and nothing else is written.

    Scores reach 400, where exp overflows without the maximum.
    """
    NH, HS, T, Tmax = 1, 16, 4, 8
    qkv, _ = inputs(1, T, NH, HS, "float32", scale=20.0)
    keys, values = poisoned((1, NH, Tmax, HS), "float32"), poisoned((1, NH, Tmax, HS), "float32")
    keys.fill(0)
    values.fill(0)
    lengths, out = cupy.asarray(np.array([6], np.int32)), poisoned((1, T, NH * HS), "float32")
    qkv_device = to_device(qkv, "float32")
    launch(
        "decode.cu",
        "attention_append<float>",
        (1, T, 1),
        256,
        keys,
        values,
        qkv_device,
        lengths,
        T,
        NH,
        HS,
        Tmax,
    )
    arguments = qkv_device, keys, values, lengths, T, NH, HS, Tmax
    if naive:
        launch("decode.cu", "attention_decode_naive<float>", (1, T, 1), 256, out, *arguments)
    else:
        launch("decode.cu", "attention_decode<float, 64>", (NH, T, 1), 128, out, None, None, *arguments, 1)
    assert np.array_equal(keys.get()[0, 0, 6:], qkv[0, :2, HS : 2 * HS].astype(np.float32))
    assert np.isfinite(out.get()).all()
