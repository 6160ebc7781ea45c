"""kernels/cuda.py against kernels/cpu.py: every operation, in float32 and bfloat16, at every size.

The cases are test_kernels.py's, and more. The reference is cpu.py in float64 on the same inputs, rounded to
the storage type. In the emulator, or on a GPU where there is one (tests/card.py); each operation runs twice
and must give the same bits. How near they must be in bfloat16 says test_operation.
"""

import re
import sys
import threading
from types import SimpleNamespace

import card
import numpy as np
import pytest
import test_kernels as reference
from test_kernels import CASES, Memory, case, drawn, forward, gradients, tokens

from common import UserError
from kernels import cpu
from kernels.sampling import filtered_probabilities

cuda = card.cuda()
gpu = sys.modules[cuda.launch.__module__]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}  # of the largest element: bfloat16 has 8 bits


def wide_cases():
    """What the kernels treat differently: 16-byte rows, tiles, long sums, heads for the tensor cores."""
    for shape in [(2, 5, 64), (1, 9, 768), (1, 5, 1600), (1, 3, 1800)]:
        at, C = "x".join(map(str, shape)), shape[-1:]
        yield case(reference.layernorm, "inp weight bias", at, inp=shape, weight=C, bias=C)
    for B, T, I, O in [(2, 5, 64, 192), (2, 65, 128, 72), (3, 700, 32, 40)]:
        sizes, at = dict(inp=(B, T, I), weight=(I, O), bias=(O,)), f"{B}x{T}x{I}x{O}"
        yield case(reference.matmul, "weight bias", at, **sizes)
        yield case(reference.matmul_transposed, "wte", at, inp=(B, T, I), wte=(O, I))
        yield case(reference.matmul_gelu, "weight bias", at, **sizes)
        yield case(reference.matmul_of_gelu, "weight bias", at, **sizes)
        yield case(reference.matmul_residual, "weight bias", at, **sizes, branch=(B, T, O))
    sizes = dict(inp=(1, 3, 2056), weight=(2056, 40), bias=(40,), branch=(1, 3, 40))  # two blocks share K
    yield case(reference.matmul_residual, "weight bias", "1x3x2056x40", **sizes)
    for B, T, NH, HS in [(2, 130, 2, 64), (1, 70, 2, 128), (1, 65, 1, 100)]:
        yield case(reference.attention, "", f"{B}x{T}x{NH}x{HS}", qkv=(B, T, 3 * NH * HS), n_head=NH)
    yield case(reference.encoder, "wte wpe", "2x300x64", tokens=tokens(2, 300, 9), wte=(9, 64), wpe=(300, 64))
    targets = tokens(1, 5, 1000)[0]
    yield case(reference.classifier, "", "5x1000", logits=(5, 1024), targets=targets, vocab_size=1000)


def rounded(array, dtype):
    return array.astype(dtype).astype(float)


def rms(array):
    return np.sqrt(np.square(array).mean())


class Naive(Memory):
    """cpu.py in float64, where each operation leaves in bfloat16 what the kernels leave in bfloat16."""

    def __init__(self):
        self.stored = []
        super().__init__("cpu", "float64")
        self.ops = self

    def put(self, values, wide=False):
        view = super().put(values, wide)
        if values.dtype.kind == "f" and not wide:
            self.stored.append(view)
        return view

    def matmul_gelu_forward(self, out, pre, inp, weight, bias):
        self.matmul_forward(pre, inp, weight, bias)
        self.gelu_forward(out, pre)

    def __getattr__(self, name):
        def operation(*arguments):
            result = getattr(cpu, name)(*arguments)
            for view in self.stored:
                view[...] = rounded(view, cuda.DTYPES["bfloat16"])
            return result

        return operation


def run(case, memory, x, storage):
    """All that an operation writes: {name: array on the host}."""
    rng = np.random.default_rng(5)
    outputs, backward = forward(case, memory, x)
    results = {name: memory.ops.to_host(array) for name, array in outputs.items()}
    dout = rng.standard_normal(outputs["out"].shape)
    dout = rounded(dout, np.float32 if case.operation is reference.classifier else storage)
    slopes = gradients(case, memory, x, dout, backward, rng)
    return results | {f"d{name}": array for name, array in slopes.items()}


def test_a_long_inner_dimension_is_shared_by_several_blocks(monkeypatch):
    grids, new = [], lambda *shape: cuda.zeros(shape, cuda.DTYPES["bfloat16"])
    monkeypatch.setattr(cuda, "launch", lambda file, kernel, grid, *arguments, **settings: grids.append(grid))
    cuda.matmul_residual_forward(new(3, 40), new(3, 2056), new(2056, 40), new(40), new(3, 40))
    cuda.matmul_residual_forward(new(17, 40), new(17, 2056), new(2056, 40), new(40), new(17, 40))
    assert [grid[2] for grid in grids] == [2, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [*CASES, *wide_cases()])
def test_operation(case, dtype):
    """Float32: every element to 1e-5. bfloat16: products, of more than a number, to 1 - 2 sum(xy) / sum(x^2 +
    y^2) < 1e-5; all else is at most twice as far out as the naive way, or 1e-5 where that leaves float32."""
    storage = cuda.DTYPES[dtype]
    x = drawn(case, np.random.default_rng(4))
    for name, value in vars(x).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            setattr(x, name, rounded(value, storage))
    memories = Memory("cuda", dtype), Memory("cuda", dtype), Memory("cpu", "float64"), Naive()
    first, second, wanted, naive = (run(case, memory, x, storage) for memory in memories)
    assert first.keys() == second.keys() == wanted.keys()
    for name in wanted:
        assert first[name].tobytes() == second[name].tobytes(), f"{name} differs from run to run"
        got, want = first[name].astype(float), wanted[name].astype(float)
        # Without variance, in rows of one channel, layernorm's slope is 1 / sqrt(1e-5), and its errors too.
        slope = np.abs(wanted["rstd"]).max() if name[0] == "d" and "rstd" in wanted else 1
        error, most = np.abs(got - want), 1e-5 * max(np.abs(want).max(), slope, 1)
        if dtype == "float32":
            error = error.max()
        elif "matmul" in case.operation.__name__ and want.size > 1:
            error, most = (error**2).sum() / max((got**2 + want**2).sum(), 1e-30), 1e-5
        else:
            error, most = rms(error), max(2 * rms(naive[name] - want), most)
        assert error <= most, f"{name}: off by {error:.3g}, at most {most:.3g} is right"


def on_both(operation, *arrays, outputs=1):
    """operation(ops, *arrays) with cuda in float32 and cpu in float64: what the first arrays then hold."""
    there = [cuda.to_device(a.astype(np.float32) if a.dtype == float else a) for a in arrays]
    here = [array.copy() for array in arrays]
    operation(cuda, *there)
    operation(cpu, *here)
    return [(cuda.to_host(array), wanted) for array, wanted in zip(there[:outputs], here)]


def operations(storage):
    """(operation, arguments, which of them its kernels read or write 16 bytes at a time)."""
    new, ints = cuda.zeros, cuda.zeros((2, 5), np.int32)
    x, w, wte, matrix = (new(shape, storage) for shape in [(2, 5, 64), 64, (9, 64), (64, 64)])
    statistics, dw, dwte, dmatrix = new((2, 5)), new(64), new((9, 64)), new((64, 64))
    yield "encoder_forward", [x, ints, wte, wte], [0, 2, 3]
    yield "encoder_backward", [dwte, dwte, x, ints], [0, 1, 2]
    yield "take_rows", [new((5, 64), storage), wte, ints[0]], [0, 1]
    yield "layernorm_forward", [x, statistics, statistics, x, w, w], [0, 3, 4, 5]
    yield "layernorm_backward", [x, dw, dw, x, x, w, statistics, statistics], [0, 3, 4, 5]
    yield "gelu_forward", [x, x], [0, 1]
    yield "gelu_backward", [x, x, x], [0, 1, 2]
    yield "residual_forward", [x, x, x], [0, 1, 2]
    yield "matmul_forward", [x, x, matrix, w], [0, 1, 2, 3]
    yield "matmul_gelu_forward", [x, x, x, matrix, w], [0, 1, 2, 3, 4]
    yield "matmul_residual_forward", [x, x, matrix, w, x], [0, 1, 2, 3, 4]
    yield "matmul_backward", [x, dmatrix, dw, x, x, matrix], [0, 1, 2, 3, 4, 5]
    yield "matmul_gelu_backward", [x, dmatrix, dw, x, x, matrix, x], [0, 1, 2, 3, 4, 5, 6]
    token, qkv, cache = (new(shape, storage) for shape in [(2, 1, 64), (2, 1, 192), (2, 2, 7, 32)])
    yield "attention_decode", [token, qkv, cache, cache, new(2, np.int32)], [0, 1, 2, 3]
    yield "cross_entropy", [new(9), wte, new(9, np.int32), 60], [1]
    yield "classifier", [new(9), wte, new(9, np.int32), new(9), 60], [1]
    yield "global_norm", [new(1), dw], [1]
    copy = new(64, cuda.DTYPES["bfloat16"])
    yield "adamw", [dw, dw, dw, dw, new(4), 0.9, 0.95, 1e-8, 0.1, copy], [0, 1, 2, 3, 9]


def first_versions(kernels):
    return [bool(re.search(r"_naive|layernorm_\w+_rows", kernel)) for kernel in kernels]


@pytest.mark.parametrize("S", ["float32", "bfloat16"])
def test_first_versions_run_where_an_array_is_not_aligned(S, monkeypatch):
    """Each array in turn begins one element behind a 16-byte boundary; without that no first version runs."""
    kernels = []
    monkeypatch.setattr(cuda, "launch", lambda file, kernel, *arguments, **shared: kernels.append(kernel))
    for operation, arguments, places in operations(cuda.DTYPES[S]):
        getattr(cuda, operation)(*arguments)
        assert not any(first_versions(kernels)), kernels
        for place in places:
            kernels.clear()
            array = arguments[place]
            shifted = cuda.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
            getattr(cuda, operation)(*arguments[:place], shifted, *arguments[place + 1 :])
            assert any(first_versions(kernels)), (operation, place, kernels)
        kernels.clear()


def test_attention_wants_whole_arrays():
    qkv, out, lse = (
        cuda.zeros(2 * 192 + 1)[1:].reshape(1, 2, 192),
        cuda.zeros((1, 2, 64)),
        cuda.zeros((1, 1, 2)),
    )
    with pytest.raises(ValueError, match="does not begin on a 16-byte boundary"):
        cuda.attention_forward(out, lse, qkv, 1)


@pytest.mark.parametrize("S", ["float32", "bfloat16"])
@pytest.mark.parametrize("C", [60, 63])
def test_first_versions_run_where_rows_are_not_aligned(S, C, monkeypatch):
    """60 channels are a multiple of 16 bytes in float32, and not in bfloat16; 63 in neither."""
    kernels, storage = [], cuda.DTYPES[S]
    monkeypatch.setattr(cuda, "launch", lambda file, kernel, *arguments, **shared: kernels.append(kernel))
    new, aligned = (lambda *shape: cuda.zeros(shape, storage)), C * storage.itemsize % 16 == 0
    statistics, tokens = cuda.zeros((2, 5)), cuda.zeros((2, 5), np.int32)
    cuda.encoder_forward(new(2, 5, C), tokens, new(9, C), new(5, C))
    cuda.layernorm_forward(new(2, 5, C), statistics, statistics, new(2, 5, C), new(C), new(C))
    cuda.matmul_forward(new(2, 5, 64), new(2, 5, C), new(C, 64), new(64))  # the inner dimension
    cuda.matmul_forward(new(2, 5, C), new(2, 5, 64), new(64, C), None)
    cuda.matmul_forward(cuda.zeros((2, 5, C)), new(2, 5, 64), new(C, 64).T, None)  # as decoding's logits
    cuda.take_rows(
        new(2, C - 3), new(9, C)[:, : C - 3], cuda.zeros(2, np.int32)
    )  # nor if the rows' stride is
    cuda.classifier(cuda.zeros(3), new(3, C), cuda.zeros(3, np.int32), cuda.zeros(3), 50)
    assert first_versions(kernels) == [not aligned] * 5 + [True, not aligned], kernels


@pytest.mark.parametrize("n", [1, 1000, 5000])
@pytest.mark.parametrize("norm_limit", [np.inf, 1e-3])
def test_optimizer(n, norm_limit):
    """Three steps; a limit for the norm leaves out all of them or none, one for the loss the last."""
    rng = np.random.default_rng(n)
    arrays = [rng.standard_normal(n) for _ in range(3)] + [rng.random(n)]  # v is never negative
    losses, settings = np.array([[2.0], [2.0], [2.5]]), np.array([1e-2, 1.0, norm_limit, 2.0])

    def three_steps(ops, params, m, grads, v, norm, update, steps, losses, settings):
        first = grads.copy()
        for loss in losses:
            grads[...] = first
            ops.global_norm(norm, grads)
            ops.plan_update(update, steps, norm, loss, settings, 0.9, 0.95)
            ops.adamw(params, grads, m, v, update, 0.9, 0.95, 1e-8, 0.1)

    arrays += [np.zeros(1), np.zeros(4), np.zeros(1, np.int32), losses, settings]
    results = on_both(three_steps, *arrays, outputs=7)
    for got, wanted in results:
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-7)
    assert results[6][0].tolist() == [2 if norm_limit == np.inf else 0]


@pytest.mark.parametrize("n", [1, 31, 1025, 9000])
def test_weighted_sum(n):
    rng = np.random.default_rng(n)
    arrays = np.array([0.5]), rng.random(n), rng.random(n) / n
    ((got, wanted),) = on_both(lambda ops, *arrays: ops.weighted_sum(*arrays), *arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(
    "T, NH, HS, length", [(1, 2, 64, 90), (3, 3, 7, 20), (5, 1, 128, 16), (70, 2, 64, 90)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_decode(dtype, T, NH, HS, length, empty):
    rng, storage = np.random.default_rng(T), cuda.DTYPES[dtype]
    qkv, keys, values = (
        rounded(rng.standard_normal(shape), storage)
        for shape in [(3, T, 3 * NH * HS), (3, NH, length, HS), (3, NH, length, HS)]
    )
    lengths, out = np.array([0, length - T, 2], np.int32) * (not empty), np.full((3, T, NH * HS), np.nan)
    there = [cuda.to_device(array.astype(storage)) for array in (out, qkv, keys, values)]
    cuda.attention_decode(*there, cuda.to_device(lengths), empty)
    cpu.attention_decode(out, qkv, keys, values, lengths, empty)
    atol = TOLERANCE[dtype] * (1 + empty)  # tensor cores take the probabilities as bfloat16
    for got, wanted in zip(there, (out, qkv, keys, values)):
        np.testing.assert_allclose(cuda.to_host(got).astype(float), wanted, atol=atol)


@pytest.mark.parametrize("C", [1, 7, 64, 513])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_take_rows(dtype, C):
    inp = np.random.default_rng(C).standard_normal((9, C + 8)).astype(cuda.DTYPES[dtype])
    rows, out = np.array([8, 0, 3, 3], np.int32), cuda.empty((4, C), cuda.DTYPES[dtype])
    cuda.take_rows(out, cuda.to_device(inp)[:, :C], cuda.to_device(rows))
    assert np.array_equal(cuda.to_host(out), inp[rows, :C])


def test_take_rows_of_a_large_batch():
    """More rows than the second and third size of a grid may count: 64 sequences of 1024 tokens, and one."""
    rows = np.arange(65537, dtype=np.int32)[::-1].copy()
    inp, out = rows.astype(np.float32)[:, None], cuda.empty((len(rows), 1))
    cuda.take_rows(out, cuda.to_device(inp), cuda.to_device(rows))
    assert np.array_equal(cuda.to_host(out), inp[::-1])


def test_offsets_of_the_encoder():
    """While decoding, rows begin at positions of their own, and padding may run over the end."""
    rng, offsets = np.random.default_rng(1), np.array([0, 5, 9], np.int32)
    wte, wpe, out = rng.standard_normal((11, 6)), rng.standard_normal((10, 6)), np.zeros((3, 4, 6))

    def encode(ops, out, wte, wpe, tokens, offsets):
        ops.encoder_forward(out, tokens, wte, wpe, offsets)

    ((got, wanted),) = on_both(encode, out, wte, wpe, tokens(3, 4, 11), offsets)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, dict(temperature=0.7, top_k=5), dict(top_p=0.8), dict(min_p=0.2)])
def test_sample_draws_with_the_frequencies_of_the_cpu(settings):
    B, V = 200, 20
    row = np.random.default_rng(3).standard_normal((1, V)).astype(np.float32) * 2
    out, logprobs = cuda.empty(B, np.int32), cuda.empty((2, B))
    streams, counters = cuda.to_device(np.arange(B)), cuda.to_device(np.full(B, 7))
    logits = cuda.to_device(np.repeat(np.pad(row, ((0, 0), (0, 4))), B, 0))[:, :V]  # a view of padded rows
    cuda.sample(out, logits, 11, streams, counters, **settings, logprobs=logprobs)
    ids, logprobs = cuda.to_host(out), cuda.to_host(logprobs)
    wanted = filtered_probabilities(row, **settings)[0]
    spread = 4 * np.sqrt(wanted * (1 - wanted) / B) + 1e-12
    assert (np.abs(np.bincount(ids, minlength=V) / B - wanted) <= spread).all()
    np.testing.assert_allclose(logprobs[0], np.log(wanted[ids]), atol=1e-5)
    np.testing.assert_allclose(logprobs[1], np.log(filtered_probabilities(row)[0, ids]), atol=1e-5)


def test_to_device_does_not_wait():
    """Copies stay queued, each of what its array held then; its pinned memory is kept until it is done."""
    cuda.synchronize()
    cuda.to_device(np.zeros(1))  # which forgets the copies that are done
    array, copies, stream = np.empty((3, 70), np.int32), [], cuda.xp.cuda.Stream(non_blocking=True)
    with stream:
        for i in range(5):
            array.fill(i)
            copies.append(cuda.to_device(array))
            array.fill(-1)
        if cuda.xp.__version__ == "emulator":  # which does nothing before somebody waits
            assert [event.done for event, *_ in gpu._uploads][-5:] == [False] * 5
        for i, copy in enumerate(copies):
            assert (cuda.to_host(copy) == i).all()
        assert cuda.to_device(copies[0]) is copies[0]
        transposed = cuda.to_device(np.arange(6).reshape(2, 3).T)
        assert transposed.flags.c_contiguous and np.array_equal(
            cuda.to_host(transposed), np.arange(6).reshape(2, 3).T
        )
        cuda.to_device(np.zeros(1))
    assert len(gpu._uploads) <= 2  # what was done is forgotten


def test_memory_of_copies_that_are_done_serves_later_ones(monkeypatch):
    """Pinned memory is made once for copies of a size that follow each other, and not at all for the next."""
    cuda.synchronize()
    made, alloc = [], cuda.xp.cuda.alloc_pinned_memory
    monkeypatch.setattr(cuda.xp.cuda, "alloc_pinned_memory", lambda n: made.append(n) or alloc(n))
    for i in range(4):
        assert (cuda.to_host(cuda.to_device(np.full(1237, i, np.int16))) == i).all()
    assert len(made) <= 1


def test_assigning_is_of_equal_arrays():
    """From the host and from the card; where CuPy would convert, or assign to a copy, it is an error."""
    out, array = cuda.zeros((2, 3)), np.arange(6, dtype=np.float32).reshape(2, 3)
    for source in (array, cuda.to_device(array + 1)):
        cuda.assign(out, source)
        np.testing.assert_array_equal(cuda.to_host(out), cuda.to_host(source))
    for to, source in ((out, array[:1]), (out, array.astype(int)), (out[:, :2], array[:, :2])):
        with pytest.raises(ValueError, match="assign: "):
            cuda.assign(to, source)


def test_recordings():
    """A recording reads its arguments, and what other arrays hold when it is replayed."""
    out, inp, recordings = cuda.empty((1, 8)), cuda.zeros((1, 8)), {}

    def add(array, scale):
        for _ in range(scale):
            cuda.residual_forward(out, inp, array)

    for i in range(8):
        inp.fill(i)
        cuda.replay(recordings, add, np.full((1, 8), 2 * i, np.float32), 1 + i % 2)
        assert (cuda.to_host(out) == 3 * i).all()
    assert all(recording.graph for recording in recordings.values()) and len(recordings) == 2


def test_kernels_are_compiled_side_by_side_before_the_first_call(monkeypatch):
    """All that the function will launch, in other threads, and nothing of it is launched for that."""
    order, load = [], gpu.load
    x, loss = cuda.to_device(np.ones((1, 8), np.float32)), cuda.zeros(1)

    def logged_load(file, kernel, shared=0):
        main = threading.current_thread() is threading.main_thread()
        order.append(f"{'load' if main else 'compile'} {kernel}")
        return load(file, kernel, shared)

    def double_and_sum():
        order.append("call")
        cuda.residual_forward(x, x, x)
        cuda.weighted_sum(loss, x[0], x[0])

    monkeypatch.setattr(gpu, "load", logged_load)
    cuda.replay({}, double_and_sum)
    kernels = ["residual_forward<float>", "weighted_sum"]
    compiled = sorted(order[1:3])
    assert order[0] == order[3] == "call" and compiled == [f"compile {kernel}" for kernel in kernels]
    assert order[4:] == [f"load {kernel}" for kernel in kernels]
    assert cuda.to_host(x).sum() == 16 and cuda.to_host(loss) == 32


def test_few_recordings_are_kept(monkeypatch):
    monkeypatch.setattr(gpu, "RECORDINGS", 2)
    x, recordings, run = cuda.zeros((1, 8)), {}, []

    def double(n):
        run.append(n)
        cuda.residual_forward(x, x, x)

    for n in (1, 2, 1, 3, 1, 2):
        cuda.replay(recordings, double, n)
    assert run == [1, 1, 2, 1, 3, 2]  # the kernels of the first are looked for; it is run, recorded, replayed


def test_nothing_is_allocated_inside_of_a_recording():
    """Not even scratch memory that must grow; and the next recording may be made."""
    large = (0 if gpu._scratch.buffer is None else gpu._scratch.buffer.size) + 4096
    out = cuda.zeros(3, np.int32)
    for allocate in (
        lambda _: cuda.zeros(3),
        lambda _: cuda.assign(out, np.arange(3, dtype=np.int32)),  # pinned memory
        lambda n: cuda.scratch((n, np.uint8)),
    ):
        sizes, recordings = iter([1, 1, large]), {}
        cuda.replay(recordings, lambda allocate=allocate, sizes=sizes: allocate(next(sizes)))
        with pytest.raises(RuntimeError, match="would be allocated inside of a recording"):
            cuda.replay(recordings, lambda allocate=allocate, sizes=sizes: allocate(next(sizes)))
    x, recordings = cuda.zeros((1, 8)), {}

    def double():
        cuda.residual_forward(x, x, x)

    for _ in range(3):
        x.fill(1)
        cuda.replay(recordings, double)
    assert (cuda.to_host(x) == 2).all() and cuda.scratch((large, np.uint8))


def test_a_recording_follows_the_workspace():
    """When the workspace has grown, what used the old one is recorded anew."""
    norm, ones, recordings = cuda.empty(1), cuda.to_device(np.ones(16, np.float32)), {}
    for call in range(6):
        if call == 3:
            cuda.scratch((gpu._scratch.buffer.size + 4096, np.uint8))
        norm.fill(0)
        cuda.replay(recordings, cuda.global_norm, norm, ones)
        assert cuda.to_host(norm) == 4
    (recording,) = recordings.values()
    assert recording.graph and recording.workspace is gpu._scratch.buffer


def test_reading_later_is_reading_what_was_there():
    """Nobody waits before the values are wanted; until then what was asked for is not even begun."""
    array, stream, start = cuda.to_device(np.arange(3, dtype=np.float32)), cuda.xp.cuda.Stream(), cuda.now()
    cuda.synchronize()
    with stream:
        first = cuda.read_later(array)
        array.fill(9)
        second = cuda.read_later(array)
    assert first().tolist() == [0, 1, 2] and second().tolist() == [9, 9, 9]
    assert 0 <= cuda.elapsed(start, cuda.now()) < 60


def test_wrong_arguments_are_errors():
    new, wrong = cuda.zeros, pytest.raises(ValueError, match=r"layernorm_forward: weight is float32 \(4,\)")
    x, statistics, w = new((2, 3, 8)), new((2, 3)), new(8)
    cuda.layernorm_forward(x, statistics, statistics, x, w, w)
    with wrong:
        cuda.layernorm_forward(x, statistics, statistics, x, new(4), w)
    for out, mean, inp, weight in [
        (x, new((3, 3)), x, w),  # too many rows
        (x, statistics, new((2, 3, 8), cuda.DTYPES["bfloat16"]), w),  # another storage type
        (x, statistics, new((2, 3, 16))[:, :, ::2], w),  # holes between the elements
        (x, new((2, 3), np.int32), x, w),
        (new((0, 3, 8)), new((0, 3)), new((0, 3, 8)), w),  # nothing
    ]:
        with pytest.raises(ValueError, match="layernorm_forward"):
            cuda.layernorm_forward(out, mean, mean, inp, weight, w)
    with pytest.raises(TypeError, match="inp is ndarray, not an array on the GPU"):
        cuda.layernorm_forward(x, statistics, statistics, np.zeros((2, 3, 8)), w, w)
    with pytest.raises(ValueError, match="lse is for 3 heads"):
        cuda.attention_forward(new((1, 2, 6)), new((1, 3, 2)), new((1, 2, 18)), 2)
    with pytest.raises(ValueError, match="the same way"):
        cuda.matmul_backward(None, new((8, 3)).T, None, x, x[..., :3].copy(), new((3, 8)))


def test_more_elements_than_a_kernel_counts(monkeypatch):
    class Ghost(np.ndarray):
        device = property(lambda self: gpu.DEVICE)

    monkeypatch.setattr(gpu, "xp", SimpleNamespace(ndarray=Ghost))
    one = np.zeros((1, 1, 1), np.float32)
    large, largest = (np.broadcast_to(one, (1 << 20, n, 1)).view(Ghost) for n in (2048, 2047))
    with pytest.raises(UserError, match=r"out \(1048576, 2048, 1\) has 2,147,483,648 .*; lower --batch-size"):
        cuda.gelu_forward(large, large)
    with pytest.raises(ValueError, match="not contiguous"):  # as far as that it would do
        cuda.gelu_forward(largest, largest)


def test_what_a_kernel_was_allowed_it_stays_allowed():
    """CuPy gives the same function every time: what one launch asks for, the next must not take away."""
    for V in (500, 20, 500):
        logits, targets, losses = cuda.zeros((3, V + 4)), cuda.zeros(3, np.int32), cuda.empty(3)
        cuda.classifier(losses, logits, targets, cuda.zeros(3), V)
        np.testing.assert_allclose(cuda.to_host(losses), np.log(V), rtol=1e-6)


def test_a_kernel_that_does_not_compile(tmp_path, monkeypatch):
    (tmp_path / "broken.cu").write_text("__global__ void broken(int* out) {\n    out[0] = nothing;\n}\n")
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    with pytest.raises(UserError, match=r"kernels/broken.cu does not compile \(broken, sm_(.|\n)*nothing"):
        cuda.load("broken", "broken")
