"""Our side of bench_gpu.py: every kernel, decoding and training, a function for each kind of row.

bench_gpu.py starts this file, and serve() answers it. Each kernel is checked against cpu.py before it is
timed, at the size that is timed; where that would take too long, in its first and last rows. Calls are timed
by events around a graph of one call for each of several sets of arrays, 256 MB or more together.
"""

import contextlib
import dataclasses
import functools
import gc
import inspect
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from bench_gpu import serve

EMULATOR = sys.argv[1] == "emulator"
if EMULATOR:
    import emulator

    emulator.install()

import gpt2  # noqa: E402  CuPy, or what stands in for it, is in place now
import kernels  # noqa: E402
from kernels import cpu  # noqa: E402

try:
    ops = kernels.load("cuda")
    from kernels import gpu
except ImportError as error:
    sys.exit(f"there is no GPU to measure ({error}): --emulator tries the script without one")
xp, cdiv = ops.xp, ops.cdiv
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
ROTATE = 0 if EMULATOR else 256 << 20  # bytes that calls in turn touch at least: several times the L2 cache
ROUND = 0 if EMULATOR else 0.025  # seconds of a round
TOLERANCE = 0.02  # ‖ours − reference‖ / ‖reference‖: a few roundings of bfloat16

# Versions that cuda.py would not choose: {kind of row: {name: what cuda.KERNEL_OVERRIDES is to hold}}.
# EARLIER, at the end of this file, has those that are launched here.
TILES = [(128, 256, 64, 64, 64, 3), (128, 128, 64, 64, 64, 3), (64, 64, 64, 32, 32, 3)]  # matmul.cu's
MATMULS = {f"mma.sync {' '.join(map(str, tile))}": {"matmul": tile} for tile in TILES}
MATMULS |= {f"Hopper, {name}": {"matmul": name} for name in ops.HOPPER_TILES}
ATTENTION = {"mma.sync": {"attention": "portable"}, "flash, no tensor cores": {"attention": "flash"}}
FORCED = {"matmul": MATMULS, "matmul_dw": MATMULS}
FORCED |= {"attention_forward": ATTENTION, "attention_backward": ATTENTION}


# ------------------------------------------------------------------------------------------------------------
# Arrays, checks, the clock

rng = np.random.default_rng(0)
normals = rng.standard_normal(1 << (14 if EMULATOR else 23), np.float32)
pools = {name: ops.to_device(array.astype(name)) for name, array in ((F32, normals), (BF16, normals))}
pools["positive"] = ops.to_device(normals**2)


def normal(*shape, dtype=BF16, pool=None):
    """A device array of random numbers: never time zeros, they take less power."""
    out, pool = ops.empty(shape, dtype), pools[pool or dtype]
    flat, start = out.reshape(-1), 0
    while start < out.size:
        begin = int(rng.integers(len(pool) // 2)) // 64 * 64  # no two arrays alike
        piece = flat[start : start + len(pool) - begin]
        ops.assign(piece, pool[begin : begin + len(piece)])
        start += len(piece)
    return out


def empty(*shape, dtype=BF16):
    return ops.empty(shape, dtype)


def zeros(*shape):
    return ops.zeros(shape)


def integers(high, *shape, dtype=np.int32):
    return ops.to_device(rng.integers(high, size=shape, dtype=dtype))


def edges(length, n):
    """The first n numbers below `length`, and the last n."""
    return np.r_[0:n, length - n : length] if length > 2 * n else np.arange(length)


def host(array, mark, n):
    """On the host in float32, ids as they are: all of it; or, by its mark, the first n and the last n of its
    rows (o, x, r), of its columns (c), or of both (k)."""
    if mark in "oxrk" and len(array) > 2 * n:
        found = np.concatenate([ops.to_host(array[:n]), ops.to_host(array[len(array) - n :])])
    else:
        found = ops.to_host(array)
    if mark in "ck":
        found = found[:, edges(found.shape[1], n)]
    if found.dtype == BF16:  # ten times faster than astype: its bits are the upper half of a float's
        return (found.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return found


def checked(call, arrays, marks, reference, n):
    """Call once and return the largest relative error of the outputs; an error beyond TOLERANCE is raised.

    marks has a letter for each array: o output, x input and output, r input, of which the first n and the
    last n rows are compared; k input and output, of which rows and columns are; c input of which the columns
    are needed; w input that every row needs; - accumulated, not looked at.
    """
    on_host = [
        np.zeros(array.shape, np.float32) if mark == "-" else host(array, mark, n)
        for array, mark in zip(arrays, marks)
    ]
    for array, mark in zip(arrays, marks):
        if mark == "o":  # poison, a NaN in every type
            xp.cuda.runtime.memsetAsync(array.data.ptr, 255, array.nbytes, xp.cuda.get_current_stream().ptr)
    call(*arrays)
    reference(*on_host)
    errors = []
    for array, mark, want in zip(arrays, marks, on_host):
        if mark in "oxk":
            got = host(array, mark, n)
            if got.dtype == F32:
                scale = max(float(np.linalg.norm(want)), 1e-30)
                errors.append(float(np.linalg.norm(got - want)) / scale)
            else:
                errors.append(float(np.mean(got != want)))
    error = max(errors) if all(map(math.isfinite, errors)) else math.nan
    if not error < TOLERANCE:
        raise AssertionError(f"wrong: relative error {error:.2g}")
    return error


def clock(call, sets):
    """A function that measures a round: the seconds of one call."""

    def every():
        for arrays in sets:
            call(*arrays)

    play = functools.partial(ops.replay, {}, every)
    play(), play()  # runs, records

    def measure(repeats):
        play()  # the GPU is at work before the clock starts
        start = ops.now()
        for _ in range(repeats):
            play()
        return ops.elapsed(start, ops.now()) / repeats

    repeats = min(200, max(1, int(ROUND / max(measure(1), 1e-6))))
    return lambda: measure(repeats) / len(sets)


@dataclasses.dataclass
class Kernel:
    """A row: what to launch on which arrays, and what it must compute. See checked() for marks and n."""

    marks: str
    make: Callable  # a new set of arrays
    call: Callable
    reference: Callable
    flops: float = 0
    moved: float = 0  # the fewest bytes; by default all arrays once, and twice what is input and output
    n: int = 16
    rotated: bool = True  # several sets take turns

    def open(self):
        """(what is to be said of the row, its timer)"""
        sets = [self.make()]
        n_bytes = sum(array.nbytes for array in sets[0])
        again = sum(array.nbytes for array, mark in zip(sets[0], self.marks) if mark in "xk-")
        kernels_of_call.clear()
        error = checked(self.call, sets[0], self.marks, self.reference, self.n)
        names = list(dict.fromkeys(kernels_of_call))
        names = [name.partition("<")[0] for name in names] if len(names) > 1 else names
        about = dict(kernel=" + ".join(names), error=error)
        about |= dict(flops=self.flops, moved=self.moved or n_bytes + again)
        if self.rotated:
            sets += [self.make() for _ in range(min(127, cdiv(ROTATE, n_bytes)))]
        return about, dict(ours=clock(self.call, sets))


kernels_of_call = []  # the names that were launched since it was cleared
trace = None  # or a list, of (kernel, event before it, event after it)
plain_launch = ops.launch


def launch(file, kernel, *arguments, **options):
    kernels_of_call.append(kernel)
    if trace is None:
        return plain_launch(file, kernel, *arguments, **options)
    start = ops.now()
    plain_launch(file, kernel, *arguments, **options)
    trace.append((kernel, start, ops.now()))


ops.launch = launch


def launched(file, kernel, grid, block, *numbers):
    """A call that launches a kernel on the row's arrays and these numbers."""
    return lambda *arrays: launch(file, kernel, grid, block, *arrays, *numbers)


def both(name, *constants):
    """An operation's call on the GPU and its reference."""
    return (lambda *a: getattr(ops, name)(*a, *constants)), (lambda *a: getattr(cpu, name)(*a, *constants))


# ------------------------------------------------------------------------------------------------------------
# Ceilings and matmul

COPY = """
extern "C" __global__ void copy(uint4* to, const uint4* from, int n) {  // a block a piece, a thread 4 loads
    const int first = blockIdx.x * blockDim.x * 4 + threadIdx.x;
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) if (first + i * blockDim.x < n) x[i] = from[first + i * blockDim.x];
#pragma unroll
    for (int i = 0; i < 4; i++) if (first + i * blockDim.x < n) to[first + i * blockDim.x] = x[i];
}
"""


def copy(n_bytes):
    function, n = xp.RawModule(code=COPY).get_function("copy"), n_bytes // 16

    def call(to, source):
        return function((cdiv(n, 2048),), (512,), (to, source, np.int32(n)))

    def make():
        return empty(n_bytes // 4, dtype=F32), normal(n_bytes // 4, dtype=F32)

    about, timers = Kernel("or", make, call, np.copyto).open()
    return about, timers | dict(cudaMemcpyAsync=clock(ops.assign, [make() for _ in range(4)]))


def matmul(M, N, K):

    def make():
        return empty(M, N), normal(M, K), normal(K, N), normal(N)

    return Kernel("orww", make, *both("matmul_forward"), flops=2 * M * N * K)


def matmul_residual(M, N, K):

    def make():
        return empty(M, N), normal(M, K), normal(K, N), normal(N), normal(M, N)

    return Kernel("orwwr", make, *both("matmul_residual_forward"), flops=2 * M * N * K)


def matmul_gelu(M, N, K):

    def make():
        return empty(M, N), empty(M, N), normal(M, K), normal(K, N), normal(N)

    return Kernel("oorww", make, *both("matmul_gelu_forward"), flops=2 * M * N * K)


def matmul_dx(M, N, K):
    """dinp (M, K) = dout @ weight.T: what matmul_backward launches for it, alone."""

    def make():
        return empty(M, K), normal(M, N), normal(K, N)

    calls = [lambda dinp, dout, w, m=m: m.matmul_forward(dinp, dout, w.T, None) for m in (ops, cpu)]
    return Kernel("orw", make, *calls, flops=2 * M * N * K)


def matmul_dw(M, N, K):
    """dweight (K, N) += inp.T @ dout, in float32."""

    def make():
        return zeros(K, N), normal(M, K), normal(M, N), normal(K, N)

    def call(dw, inp, dout, w):
        return ops.matmul_backward(None, dw, None, dout, inp, w)

    moved = 8 * K * N + 2 * M * (K + N)
    return Kernel("kccw", make, call, weight_gradient, flops=2 * M * N * K, moved=moved)


def weight_gradient(dw, inp, dout, _):
    dw += inp.T @ dout


def matmul_gelu_backward(M, N, K):
    """dpre (M, K) = (dout @ weight.T) gelu'(pre), dweight and dbias: all of the second layer's backward."""

    def make():
        pre, act = normal(M, K), empty(M, K)
        ops.gelu_forward(act, pre)
        return empty(M, K), zeros(K, N), zeros(N), normal(M, N), act, normal(K, N), pre

    return Kernel("o--rrwr", make, *both("matmul_gelu_backward"), flops=4 * M * N * K)


def head(M, N, K):
    return matmul_dx(M, K, N)  # wte (V, C) lies as the weight of a dX does


def head_dx(M, N, K):

    def make():
        return empty(M, K), normal(M, N), normal(N, K)

    calls = [lambda dinp, dout, wte, m=m: m.matmul_forward(dinp, dout, wte, None) for m in (ops, cpu)]
    return Kernel("orw", make, *calls, flops=2 * M * N * K)


def head_dw(M, N, K):

    def make():
        return zeros(N, K), normal(M, N), normal(M, K), normal(N, K)

    def call(dw, dout, inp, w):
        return ops.matmul_backward(None, dw.T, None, dout, inp, w.T)

    moved = 8 * K * N + 2 * M * (K + N)
    return Kernel("kccw", make, call, weight_gradient, flops=2 * M * N * K, moved=moved)


# ------------------------------------------------------------------------------------------------------------
# Attention


def attention_arrays(B, T, NH, HS):
    return empty(B, T, NH * HS), empty(B, NH, T, dtype=F32), normal(B, T, 3 * NH * HS)


def attention_forward(B, T, NH, HS):
    """Two products, of which causality leaves half."""

    def make():
        return attention_arrays(B, T, NH, HS)

    return Kernel("oor", make, *both("attention_forward", NH), flops=2 * B * T * T * NH * HS, n=1)


def attention_backward(B, T, NH, HS):
    """Five products, of which causality leaves half."""

    def make():
        out, lse, qkv = attention_arrays(B, T, NH, HS)
        ops.attention_forward(out, lse, qkv, NH)
        return empty(B, T, 3 * NH * HS), normal(B, T, NH * HS), out, lse, qkv

    return Kernel("orrrr", make, *both("attention_backward", NH), flops=5 * B * T * T * NH * HS, n=1)


def naive_attention(B, T, NH, HS):
    scores, size = empty(B, NH, T, T, dtype=F32), (T, NH, HS)

    def call(out, lse, qkv):
        launch("attention", "attention_scores<bf16>", (cdiv(T, 256), T, B * NH), 256, scores, qkv, *size)
        launch("attention", "attention_softmax", (cdiv(T, 8), B * NH), 256, scores, lse, T)
        launch(
            "attention", "attention_values<bf16>", (cdiv(NH * HS, 256), T, B), 256, out, scores, qkv, *size
        )

    return call


def naive_attention_backward(B, T, NH, HS):
    (scores, ds), size = (empty(B, NH, T, T, dtype=F32) for _ in range(2)), (T, NH, HS)

    def call(dqkv, dout, out, lse, qkv):
        arguments, grid = (scores, ds, dout, out, lse, qkv, *size), (cdiv(T, 256), T, B * NH)
        launch("attention_backward", "attention_backward_scores<bf16>", grid, 256, *arguments)
        arguments, grid = (dqkv, scores, ds, dout, qkv, *size), (cdiv(NH * HS, 256), T, B)
        launch("attention_backward", "attention_backward_sums<bf16>", grid, 256, *arguments)

    return call


# ------------------------------------------------------------------------------------------------------------
# Bandwidth


def statistics(N):
    return empty(N, dtype=F32), empty(N, dtype=F32)  # mean and rstd


def layernorm_forward(B, T, C):

    def make():
        return empty(B * T, C), *statistics(B * T), normal(B * T, C), normal(C), normal(C)

    return Kernel("ooorww", make, *both("layernorm_forward"))


def layernorm_backward(B, T, C):
    def make():
        arrays = *statistics(B * T), normal(B * T, C)
        ops.layernorm_forward(empty(B * T, C), *arrays, normal(C), normal(C))
        gradients = normal(B * T, C), zeros(C), zeros(C), normal(B * T, C)
        return *gradients, arrays[2], normal(C), *arrays[:2]

    return Kernel("xxxwwwww", make, *both("layernorm_backward"), n=B * T)


def elementwise(name, marks, B, T, C):
    return Kernel(marks, lambda: tuple(normal(B * T, C) for _ in marks), *both(name))


gelu_forward = functools.partial(elementwise, "gelu_forward", "or")
gelu_backward = functools.partial(elementwise, "gelu_backward", "orr")
residual_forward = functools.partial(elementwise, "residual_forward", "orr")


def encoder_forward(B, T, C, V):

    def make():
        return empty(B, T, C), integers(V, B, T), normal(V, C), normal(T, C)

    return Kernel("orww", make, *both("encoder_forward"), moved=4 * B * T * C, n=1)


def encoder_backward(B, T, C, V):

    def make():
        return zeros(V, C), zeros(T, C), normal(B, T, C), integers(V, B, T)

    used = V * (1 - (1 - 1 / V) ** (B * T))  # rows of wte that so many random tokens name
    moved = int(2 * B * T * C + 8 * (used + T) * C)

    def reference(dwte, dwpe, dout, ids, n=16):  # of the first n and the last n tokens and positions
        for row, token in enumerate(edges(V, n)):
            dwte[row] += dout[ids == token].sum(0)
        dwpe += dout[:, edges(T, n)].sum(0)

    return Kernel("xxww", make, both("encoder_backward")[0], reference, moved=moved)


def naive_encoder_backward(B, T, C, V):
    def call(dwte, dwpe, dout, ids):
        grid, arguments = cdiv(T * C, 256), (dwpe, dout, B, T, C)
        launch("encoder", "encoder_backward_wpe_naive<bf16>", grid, 256, *arguments)
        grid, arguments = (V, cdiv(C, 256)), (dwte, dout, ids, B * T, C)
        launch("encoder", "encoder_backward_naive<bf16>", grid, 256, *arguments)

    return call


def classifier(M, V):

    def make():
        return empty(M, dtype=F32), normal(M, V), integers(V - 47, M), normal(M, dtype=F32)

    return Kernel("oxrr", make, *both("classifier", V - 47))  # 47 of the rows of GPT-2's wte are padding


def cross_entropy(M, V):

    def make():
        return empty(M, dtype=F32), normal(M, V), integers(V - 47, M)

    return Kernel("orr", make, *both("cross_entropy", V - 47))


def adamw(P):
    def make():
        values = [normal(P, dtype=F32, pool=pool) for pool in (None, None, None, "positive")]
        return *values, ops.to_device(np.array(UPDATE, np.float32)), empty(P)

    def update(module, params, grads, m, v, update, copy):
        module.adamw(params, grads, m, v, update, *ADAMW, copy)

    return Kernel("xxxxwo", make, functools.partial(update, ops), functools.partial(update, cpu), n=4096)


ADAMW = 0.9, 0.95, 1e-8, 0.1  # betas, eps, weight decay
UPDATE = 1.0, 1e-3, 1 - 0.9**10, 1 - 0.95**10  # clip, learning rate, bias corrections of step 10


def global_norm(P):
    return Kernel("ow", lambda: (empty(1, dtype=F32), normal(P, dtype=F32)), *both("global_norm"))


# ------------------------------------------------------------------------------------------------------------
# Decoding


def attention_decode(B, T, NH, HS):
    """Attention of one token a sequence, the T-th, and its key and value into the cache."""

    def make():
        cache = normal(B, NH, T, HS), normal(B, NH, T, HS)
        return (
            empty(B, 1, NH * HS),
            normal(B, 1, 3 * NH * HS),
            *cache,
            ops.to_device(np.full(B, T - 1, np.int32)),
        )

    return Kernel("orxxr", make, *both("attention_decode"), moved=4 * B * T * NH * HS, n=1)


def naive_decode(B, T, NH, HS):
    size, grid = (1, NH, HS, T), (cdiv(NH * HS, 256), 1, B)

    def call(out, qkv, keys, values, lengths):
        launch("decode", "attention_append<bf16>", grid, 256, keys, values, qkv, lengths, *size)
        arguments = out, qkv, keys, values, lengths, *size
        launch("decode", "attention_decode_naive<bf16>", grid, 256, *arguments)

    return call


def sample(B, V, top_k=0, top_p=1.0):

    def ids():
        return integers(1 << 40, B, dtype=np.int64)

    def make():
        return empty(B, dtype=np.int32), normal(B, V, dtype=F32), ids(), ids()

    filters = 0.8 if top_k else 1.0, top_k, top_p

    def draw(module, out, logits, streams, counters):
        module.sample(out, logits, 7, streams, counters, *filters)

    return Kernel("orrr", make, functools.partial(draw, ops), functools.partial(draw, cpu), moved=4 * B * V)


def decode(B, context, overlap, **sizes):
    """A step through model.decode, waited for as who reads the token does, a little beyond the context.

    overlap: whether its kernels begin before the ones before them have ended.
    """
    model, _ = trained("bfloat16", **sizes)
    cache = model.new_cache(B, sizes["T"])
    model.decode(rng.integers(sizes["V"], size=(B, context)), cache)
    token, n = rng.integers(sizes["V"], size=(B, 1)), 1 if EMULATOR else 20

    def measure():
        if overlap != gpu.OVERLAP:
            gpu.OVERLAP = overlap
            model.recordings.clear()
            for _ in range(2):  # run and recorded
                model.decode(token, cache)
        start = time.perf_counter()
        for _ in range(n):
            model.decode(token, cache)
            ops.synchronize()
        return (time.perf_counter() - start) / n

    read = model.flat_params.nbytes + 4 * B * context * sizes["L"] * sizes["C"]
    return dict(flops=0, moved=read), dict(ours=measure)


# ------------------------------------------------------------------------------------------------------------
# Training


@functools.cache
def trained(dtype, L, NH, C, T, V):
    """A model and its optimizer. They stay until the end, only their activations are given back."""
    model = gpt2.GPT2(gpt2.GPT2Config(L, NH, C, T, V), "cuda", dtype)
    return model, gpt2.AdamW(model)


def training(B, dtype, **sizes):
    """Seconds of a step as train.py takes it: batches from the host; loss and norm of a step are read while
    the next one is computed."""
    (model, optimizer), T, V = trained(dtype, **sizes), sizes["T"], sizes["V"]
    n = 1 if EMULATOR else min(100, max(6, (6 << 16) // (B * T)))  # of a round: six of 64 × 1024
    weights = np.full((B, T), 1 / (B * T), np.float32)

    def measure():
        blocks, pending = [rng.integers(V, size=(B, T + 1)) for _ in range(2 + n)], []
        for i, block in enumerate(blocks):
            if i == 2:  # those were to warm up
                ops.synchronize()
                start = time.perf_counter()
            model.forward(block[:, :-1], block[:, 1:], weights)
            model.backward()
            optimizer.step(1e-4)
            for read in pending:
                read()
            pending = [ops.read_later(optimizer.loss), ops.read_later(optimizer.norm)]
        ops.synchronize()
        spent = (time.perf_counter() - start) / n
        give_back(model)  # the other side needs the memory
        return spent

    return dict(flops=model.config.flops_per_token(T) * B * T), dict(ours=measure)


def give_back(model):
    for kept in (model.buffers, model.views, model.recordings):
        kept.clear()
    settle(free=True)


def first_step(B, **sizes):
    one_step(*trained("bfloat16", **sizes), rng.integers(sizes["V"], size=(B, sizes["T"] + 1)))
    ops.synchronize()
    return {}, {}


def one_step(model, optimizer, block):
    model.forward(block[:, :-1], block[:, 1:])
    model.backward()
    return optimizer.step(1e-4)


class Traced:
    """The operations; each call's label and cost are kept with the launches it made, in `calls`."""

    def __init__(self, cost):
        self.cost, self.calls = cost, []  # (label, FLOP, bytes, launches)

    def replay(self, recordings, function, *arguments, overlap=False):
        """Without recording: there are events around every launch."""
        function(*(ops.to_device(x) if isinstance(x, np.ndarray) else x for x in arguments))

    def __getattr__(self, name):
        function = getattr(ops, name)
        if not inspect.isfunction(function):
            return function

        def traced(*values, **named):
            global trace  # noqa: PLW0603
            trace = []
            try:
                return function(*values, **named)
            finally:
                arguments = dict(zip(inspect.signature(function).parameters, values)) | named
                if trace:
                    self.calls.append((*self.cost(name, arguments), trace))
                trace = None

        return traced


def steps(B, **sizes):
    """A step, and where its time goes: the operations, and the kernels of each, by events around launches."""
    from bench_ours import cost  # noqa: PLC0415  it imports the whole project, only this needs that

    model, optimizer = trained("bfloat16", **sizes)
    block, n = rng.integers(sizes["V"], size=(B, sizes["T"] + 1)), 1 if EMULATOR else 3

    def seconds():
        start = ops.now()
        for _ in range(n):
            one_step(model, optimizer, block)
        return ops.elapsed(start, ops.now()) / n

    def measure():
        seconds()  # warm
        step, operations = seconds(), {}
        model.ops = traced = Traced(cost)
        try:
            seconds()
        finally:
            model.ops = ops
        for label, flops, moved, launches in traced.calls:
            found = operations.setdefault(label, dict(calls=0, seconds=0, flops=0, moved=0, kernels={}))
            for key, value in dict(calls=1, flops=flops, moved=moved).items():
                found[key] += value / n
            for kernel, start, end in launches:
                spent = ops.elapsed(start, end) / n
                found["seconds"] += spent
                calls, before = found["kernels"].get(kernel, (0, 0))
                found["kernels"][kernel] = calls + 1 / n, before + spent
        give_back(model)
        for label, found in operations.items():
            kernels = [(name, round(calls), spent) for name, (calls, spent) in found["kernels"].items()]
            found |= dict(label=label, calls=round(found["calls"]), kernels=kernels)
        return dict(step=step, operations=list(operations.values()))

    return {}, dict(ours=measure)


def curve(B, steps, folder, **sizes):
    """Losses on the batches of folder, from weights that are left there for the peer."""
    (L, NH, C, T, V), folder = (sizes[name] for name in ("L", "NH", "C", "T", "V")), Path(folder)
    model = gpt2.GPT2(gpt2.GPT2Config(L, NH, C, T, V), "cuda", "bfloat16")
    weights = {name: ops.to_host(model.master[name]) for name in model.config.shapes()}
    np.savez(folder / "weights.npz", **weights)
    optimizer, batches = gpt2.AdamW(model), np.load(folder / "batches.npy")

    def measure():
        losses = []
        for step, block in enumerate(batches):
            losses.append(ops.read_later(model.forward(block[:, :-1], block[:, 1:])))
            model.backward()
            optimizer.step(6e-4 * min(1, (step + 1) / 20))
        return [float(read()[0]) for read in losses]

    return {}, dict(ours=measure)


# ------------------------------------------------------------------------------------------------------------


def naive_adamw(P):
    grid = cdiv(P, 256), 256
    return lambda p, g, m, v, update, out: launch(
        "adamw", "adamw_naive", *grid, p, g, m, v, out, update, *ADAMW, P
    )


def naive_elementwise(name):
    name = f"{name}_naive<bf16>"
    return lambda B, T, C: launched("gelu", name, cdiv(B * T * C, 256), 256, B * T * C)


def naive_matmul(M, N, K):
    def call(out, inp, weight, bias):
        arguments = cdiv(M, 8) * cdiv(N, 32), (32, 8), out, None, bias, inp, weight, M, N, K
        launch("matmul", "matmul_naive<bf16, bf16, BIAS, false, false>", *arguments)

    return call


def rows_layernorm(B, T, C):
    return launched("layernorm", "layernorm_forward_rows<bf16>", cdiv(B * T, 4), 128, B * T, C)


def rows_layernorm_backward(B, T, C):
    blocks = min(3 * ops.SMS, cdiv(B * T, 4))
    partials = empty(blocks, 2 * C, dtype=F32)

    def call(dinp, dweight, dbias, *inputs):
        arguments = dinp, partials, *inputs, B * T, C
        launch("layernorm", "layernorm_backward_rows<bf16>", blocks, 128, *arguments)
        arguments = dweight, dbias, partials, blocks, C
        launch("layernorm", "layernorm_backward_reduce", cdiv(2 * C, 32), 1024, *arguments)

    return call


def hopper_simple(stages):
    """The first two versions of matmul_hopper.cu: a warpgroup that waits for every stage, or loads ahead."""

    def make(M, N, K):
        def call(out, inp, weight, bias):
            maps = ops.tensor_map(inp, 128), ops.tensor_map(weight, 64)
            arguments = cdiv(M, 128) * cdiv(N, 128), 128, *maps, out, bias, M, N, K
            launch("matmul_hopper", name, *arguments, shared=stages * 32776)

        return call

    name = f"matmul_hopper_simple<false, false, {stages}>"
    return make


# Each makes, of the sizes of a row, a call that takes the row's arrays.
EARLIER = {
    "matmul": {"naive": naive_matmul},
    "attention_forward": {"naive": naive_attention},
    "attention_backward": {"naive": naive_attention_backward},
    "layernorm_forward": {"rows": rows_layernorm},
    "layernorm_backward": {"rows": rows_layernorm_backward},
    "encoder_forward": {
        "naive": lambda B, T, C, V: launched(
            "encoder", "encoder_forward_naive<bf16>", cdiv(B * T * C, 256), 256, None, B * T, T, C, T
        )
    },
    "encoder_backward": {"naive": naive_encoder_backward},
    "classifier": {
        "row read twice": lambda M, V: launched("classifier", "classifier_twice<bf16>", M, 1024, V - 47, V),
        "naive": lambda M, V: launched(
            "classifier", "classifier_naive<bf16>", cdiv(M, 128), 128, M, V - 47, V
        ),
    },
    "adamw": {"naive": naive_adamw},
    "global_norm": {"naive": lambda P: launched("norm", "global_norm_naive", 1, 1024, P)},
    "attention_decode": {"naive": naive_decode},
}
if ops.CAPABILITY == 90:
    simple = {f"Hopper, one warpgroup, {stages} stages": hopper_simple(stages) for stages in (1, 2, 4)}
    EARLIER["matmul"] |= simple
EARLIER |= {
    kind: {"naive": naive_elementwise(kind)} for kind in ("gelu_forward", "gelu_backward", "residual_forward")
}


def card():
    device = xp.cuda.runtime.getDeviceProperties(0)
    about = {"card": device["name"].decode(), "memory": ops.DEVICE.mem_info[1], "sms": ops.SMS}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    driver = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
        driver = found.split("\n")[0]
    about["driver"] = driver or f"CUDA {xp.cuda.runtime.driverGetVersion()}"
    about["ours"] = f"Python {platform.python_version()}, NumPy {np.__version__}, CuPy {xp.__version__}"
    about |= dict(capability=ops.CAPABILITY, logits=ops.LOGITS)
    versions = {kind: [*FORCED.get(kind, ()), *EARLIER.get(kind, ())] for kind in FORCED | EARLIER}
    return about | dict(versions=versions), {}


def open_row(kind, sizes, version):
    ops.KERNEL_OVERRIDES.update(FORCED.get(kind, {}).get(version, {}))
    try:
        found = globals()[kind](**sizes)
        if not isinstance(found, Kernel):
            return found
        if version in EARLIER.get(kind, ()):
            found.call, found.rotated = EARLIER[kind][version](**sizes), False  # slow: one set is enough
        return found.open()
    finally:
        ops.KERNEL_OVERRIDES.clear()


def settle(free):
    if free:
        gc.collect()
        xp.get_default_memory_pool().free_all_blocks()
    ops.synchronize()


if __name__ == "__main__":
    serve(open_row, settle)
