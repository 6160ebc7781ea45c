"""Our side of bench_gpu.py: times every kernel and every rung of it, and trains.

bench_gpu.py starts this file once for each section and reads one JSON object a line, so that a section that
breaks the card's context, or hangs, takes nothing with it. Each kernel is checked against cpu.py first, at
the size that is timed; where that would take too long, in its first and last rows.
"""

import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

BEGAN, SETTINGS = time.monotonic(), json.loads(sys.argv[2])
if SETTINGS["emulator"]:
    import emulator

    emulator.install()

import gpt2  # noqa: E402  CuPy, or what stands in for it, is in place now
import kernels  # noqa: E402
from console import UserError  # noqa: E402
from kernels import cpu  # noqa: E402

try:
    ops = kernels.load("cuda")
except ImportError as error:
    sys.exit(f"there is no GPU to measure ({error}); --emulator tries the script without one")
xp, cdiv = ops.xp, ops.cdiv
B, T, C, NH, V, R = (SETTINGS[name] for name in ("B", "T", "C", "NH", "V", "R"))
N, P, RUNGS = B * T, SETTINGS["parameters"], not SETTINGS["quick"]
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
ROTATE = 0 if SETTINGS["emulator"] else 256 << 20  # bytes that calls in turn must touch: several times the L2
SECONDS = 0 if SETTINGS["emulator"] else 0.15  # of measuring, for each row; a slow kernel runs once more
LAST = BEGAN + 0.8 * SETTINGS.get("seconds", math.inf)  # no row begins after that
TOLERANCE = 0.02  # ‖ours − reference‖ / ‖reference‖: a few roundings of bfloat16

# ------------------------------------------------------------------------------------------------------------
# Arrays, checks, the clock

rng = np.random.default_rng(0)
normals = rng.standard_normal(1 << (14 if SETTINGS["emulator"] else 23), np.float32)
pools = {name: ops.to_device(array.astype(name)) for name, array in ((F32, normals), (BF16, normals))}
pools["positive"] = ops.to_device(normals**2)


def copy(to, source):
    stream = xp.cuda.get_current_stream().ptr
    xp.cuda.runtime.memcpyAsync(to.data.ptr, source.data.ptr, to.nbytes, 3, stream)  # device to device


def normal(*shape, dtype=BF16, pool=None):
    """A device array of random numbers: never time zeros, they take less power."""
    out, pool = ops.empty(shape, dtype), pools[pool or dtype]
    flat, start = out.reshape(-1), 0
    while start < out.size:
        begin = int(rng.integers(len(pool) // 2)) // 64 * 64  # no two arrays alike
        piece = flat[start : start + len(pool) - begin]
        copy(piece, pool[begin : begin + len(piece)])
        start += len(piece)
    return out


def empty(*shape, dtype=BF16):
    return ops.empty(shape, dtype)


def integers(high, *shape, low=0, dtype=np.int32):
    return ops.to_device(rng.integers(low, high, shape, dtype))


def host(array, n=None):
    """On the host in float32, ids as they are: all of it, or its first n rows and its last n."""
    if n is None or len(array) <= 2 * n:
        found = ops.to_host(array)
    else:
        found = np.concatenate([ops.to_host(array[:n]), ops.to_host(array[len(array) - n :])])
    return found.astype(np.float32) if found.dtype in (F32, BF16) else found


def checked(call, arrays, marks, reference, n):
    """Call once and return the largest relative error of the outputs; an error beyond TOLERANCE is raised.

    marks has a letter for each array: o output, x input and output, r input, all three by rows, of which the
    first n and the last n are compared; w input that every row needs; - accumulated, not looked at.
    """
    on_host = [
        np.zeros(array.shape, np.float32) if mark == "-" else host(array, n if mark in "oxr" else None)
        for array, mark in zip(arrays, marks)
    ]
    for array, mark in zip(arrays, marks):
        if mark == "o":  # poison, a NaN in every type
            xp.cuda.runtime.memsetAsync(array.data.ptr, 255, array.nbytes, xp.cuda.get_current_stream().ptr)
    call(*arrays)
    reference(*on_host)
    errors = []
    for array, mark, want in zip(arrays, marks, on_host):
        if mark in "ox":
            got = host(array, n)
            if got.dtype == F32:
                scale = max(float(np.linalg.norm(want)), 1e-30)
                errors.append(float(np.linalg.norm(got - want)) / scale)
            else:
                errors.append(float(np.mean(got != want)))
    error = max(errors) if all(map(math.isfinite, errors)) else math.nan
    if not error < TOLERANCE:
        raise AssertionError(f"wrong: relative error {error:.2g}")
    return error


def seconds(call, sets):
    """Median seconds of a call, by events around replays of a graph of one call for each set of arrays."""

    def every():
        for arrays in sets:
            call(*arrays)

    play = ops.captured(every)
    play(), play()  # runs, records
    events = [xp.cuda.Event(), xp.cuda.Event()]
    events[0].record(), play(), events[1].record(), events[1].synchronize()
    once = xp.cuda.get_elapsed_time(*events) / 1e3
    repeats = min(200, max(3 if once < SECONDS else 1, int(SECONDS / max(once, 1e-6))))
    for _ in range(repeats // 3):  # until the clocks have settled
        play()
    events = [xp.cuda.Event() for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        play()
        event.record()
    events[-1].synchronize()
    times = [xp.cuda.get_elapsed_time(*pair) for pair in itertools.pairwise(events)]
    return statistics.median(times) / 1e3 / len(sets)


def say(**row):
    print(json.dumps(row), flush=True)


launched = []  # names of kernels, since it was cleared


def launch(file, kernel, *arguments, **options):
    launched.append(kernel)
    plain_launch(file, kernel, *arguments, **options)


plain_launch, ops.launch = ops.launch, launch


later = []  # the rows of slower rungs: they wait until what training uses has been measured


def row(work, rung, *arguments, **numbers):
    """Measure a rung, see measured(): now, if it is the chosen one."""
    if rung == "chosen":
        measured(work, rung, *arguments, **numbers)
    else:
        later.append((work, rung, *arguments, numbers))


def measured(work, rung, marks, make, call, reference, *, flops=0, moved=None, n=16, force=None):
    """Check and time one kernel. moved: the fewest bytes, by default all arrays once, x twice."""
    if time.monotonic() > LAST:
        return say(work=work, rung=rung, skipped="no time was left")
    try:
        ops.RUNGS.update(force or {})
        sets = [make()]
        n_bytes = sum(array.nbytes for array in sets[0])
        if moved is None:
            moved = n_bytes + sum(array.nbytes for array, mark in zip(sets[0], marks) if mark in "x-")
        launched.clear()
        error, kernel = checked(call, sets[0], marks, reference, n), launched[0]
        sets += [make() for _ in range(min(39, ROTATE // n_bytes))]
        numbers = dict(seconds=seconds(call, sets), flops=flops, moved=moved, error=error)
        say(work=work, rung=rung, kernel=kernel, **numbers)
    except Exception as failure:  # the next row may work
        say(work=work, rung=rung, failed=f"{type(failure).__name__}: {failure}"[:300])
    finally:
        ops.RUNGS.clear()
        sets = None
        xp.get_default_memory_pool().free_all_blocks()


def both(name, *constants):
    """An operation's call on the GPU and its reference."""
    return (lambda *a: getattr(ops, name)(*a, *constants)), (lambda *a: getattr(cpu, name)(*a, *constants))


# ------------------------------------------------------------------------------------------------------------
# The kernels


def card():
    device = xp.cuda.runtime.getDeviceProperties(0)
    about = {"card": device["name"].decode(), "memory": ops.DEVICE.mem_info[1], "sms": ops.SMS}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout
        driver = found.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    about["driver"] = driver or f"CUDA {xp.cuda.runtime.driverGetVersion()}"
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, CuPy {xp.__version__}"
    say(work="card", capability=ops.CAPABILITY, versions=versions, **about)


def ceilings():
    n = SETTINGS["copy_bytes"]
    to, source = empty(n // 4, dtype=F32), normal(n // 4, dtype=F32)
    say(work="copy", rung="cudaMemcpyAsync", seconds=seconds(copy, [(to, source)]), flops=0, moved=2 * n)


TILES = [(128, 256, 64, 64, 64, 3), (128, 128, 64, 64, 64, 3), (128, 128, 32, 64, 64, 4)]
TILES += [(128, 128, 32, 64, 64, 3), (64, 64, 64, 32, 32, 3)]  # matmul.cu's
EDGE = np.r_[0:16, -16:0]  # the rows of dweight that are compared


def matmul():
    product("qkv", C, 3 * C, "orww", both("matmul_forward"), rungs=RUNGS)
    product("proj", C, C, "orwwr", both("matmul_residual_forward"))
    product("fc", C, 4 * C, "oorww", both("matmul_gelu_forward"))
    product("fc2", 4 * C, C, "orwwr", both("matmul_residual_forward"))

    shapes = dict(dpre=(N, 4 * C), dw=(4 * C, C), db=(C,), dout=(N, C), act=(N, 4 * C), w=(4 * C, C))
    shapes["pre"] = N, 4 * C
    new = {"dpre": empty, "dw": lambda *shape: ops.zeros(shape), "db": lambda *shape: ops.zeros(shape)}
    make = lambda: tuple(new.get(name, normal)(*shape) for name, shape in shapes.items())
    fused = both("matmul_gelu_backward")
    row("matmul fc2 dX GELU', dW, db", "chosen", "o--rrwr", make, *fused, flops=4 * N * 4 * C * C)

    flops = 2 * R * C * V
    make = lambda: (empty(R, V), normal(R, C), normal(V, C))
    calls = [lambda out, inp, wte, m=m: m.matmul_forward(out, inp, wte.T, None) for m in (ops, cpu)]
    row("matmul logits", "chosen", "orw", make, *calls, flops=flops)
    make = lambda: (empty(R, C), normal(R, V), normal(V, C))
    calls = [lambda dinp, dout, wte, m=m: m.matmul_forward(dinp, dout, wte, None) for m in (ops, cpu)]
    row("matmul logits dX", "chosen", "orw", make, *calls, flops=flops)
    make = lambda: (ops.zeros((V, C)), normal(R, V), normal(R, C), normal(V, C))
    gradient = lambda dw, dout, inp, w: ops.matmul_backward(None, dw.T, None, dout, inp, w.T)
    row("matmul logits dW", "chosen", "xwww", make, gradient, weight_gradient, flops=flops)


def product(name, K, O, marks, forward, rungs=False):
    """The three products of a layer: out (N, O) = inp (N, K) @ weight (K, O) with what is fused to it."""
    work, dX, dW = f"matmul {name}", f"matmul {name} dX", f"matmul {name} dW"
    shapes = [(N, O)] * marks.count("o") + [(N, K), (K, O), (O,), (N, O)]
    make = lambda dtype=BF16: tuple(normal(*s, dtype=dtype) for s, _ in zip(shapes, marks))
    flops = 2 * N * K * O
    row(work, "chosen", marks, make, *forward, flops=flops)
    # dX = dout @ weight.T is what matmul_backward launches for it, but alone
    gradients = lambda: (empty(N, K), normal(N, O), normal(K, O))
    calls = [lambda dinp, dout, w, m=m: m.matmul_forward(dinp, dout, w.T, None) for m in (ops, cpu)]
    row(dX, "chosen", "orw", gradients, *calls, flops=flops)
    accumulated = lambda: (ops.zeros((K, O)), normal(N, K), normal(N, O), normal(K, O))
    gradient = lambda dw, inp, dout, w: ops.matmul_backward(None, dw, None, dout, inp, w)
    row(dW, "chosen", "xwww", accumulated, gradient, weight_gradient, flops=flops)
    if rungs:
        for tile in TILES:
            rung, force = " ".join(map(str, tile)), {"matmul": tile}
            row(work, rung, marks, make, *forward, flops=flops, force=force)
            row(dW, rung, "xwww", accumulated, gradient, weight_gradient, flops=flops, force=force)
        row(work, "float32", marks, lambda: make(F32), *forward, flops=flops)
        kernel, grid = "matmul_naive<bf16, false, false>", (cdiv(O, 32), cdiv(N, 8))
        naive = lambda *a: launch("matmul", kernel, grid, (32, 8), *a, N, O, K)
        row(work, "naive", marks, make, naive, forward[1], flops=flops)


def weight_gradient(dw, inp, dout, _):
    dw += inp[:, EDGE].T @ dout


def attention():
    def inputs(dtype=BF16):
        return empty(B, T, C, dtype=dtype), empty(B, NH, T, dtype=F32), normal(B, T, 3 * C, dtype=dtype)

    def gradients(dtype=BF16):
        out, lse, qkv = inputs(dtype)
        ops.attention_forward(out, lse, qkv, NH)
        return empty(B, T, 3 * C, dtype=dtype), normal(B, T, C, dtype=dtype), out, lse, qkv

    size = T, NH, C // NH

    def naive(out, lse, qkv):
        launch("attention", "attention_scores<bf16>", (cdiv(T, 256), T, B * NH), 256, scores, qkv, *size)
        launch("attention", "attention_softmax", (cdiv(T, 8), B * NH), 256, scores, lse, T)
        launch("attention", "attention_values<bf16>", (cdiv(C, 256), T, B), 256, out, scores, qkv, *size)

    def naive_backward(dqkv, dout, out, lse, qkv):
        arguments, grid = (scores, ds, dout, out, lse, qkv, *size), (cdiv(T, 256), T, B * NH)
        launch("attention_backward", "attention_backward_scores<bf16>", grid, 256, *arguments)
        arguments, grid = (dqkv, scores, ds, dout, qkv, *size), (cdiv(C, 256), T, B)
        launch("attention_backward", "attention_backward_sums<bf16>", grid, 256, *arguments)

    forward, backward = both("attention_forward", NH), both("attention_backward", NH)
    for work, marks, make, calls, products in (
        ("attention forward", "oor", inputs, forward, 2),
        ("attention backward", "orrrr", gradients, backward, 5),
    ):
        flops = products * B * T * T * C  # 2 products forward, 5 backward, of which causality leaves half
        row(work, "chosen", marks, make, *calls, flops=flops, n=1)
        if RUNGS:
            flash = dict(flops=flops, n=1, force={"attention": "flash"})
            row(work, "flash, no tensor cores", marks, make, *calls, **flash)
            row(work, "flash, float32", marks, lambda make=make: make(F32), *calls, **flash)
    if RUNGS:
        scores, ds = (empty(B, NH, T, T, dtype=F32) for _ in range(2))
        flops = B * T * T * C
        row("attention forward", "naive", "oor", inputs, naive, forward[1], flops=2 * flops, n=1)
        slow = naive_backward, backward[1]
        row("attention backward", "naive", "orrrr", gradients, *slow, flops=5 * flops, n=1)


def bandwidth():
    f32 = lambda *shape: empty(*shape, dtype=F32)
    weights = lambda: (normal(C), normal(C))

    make = lambda: (empty(N, C), f32(N), f32(N), normal(N, C), *weights())
    calls = both("layernorm_forward")
    row("layernorm forward", "chosen", "ooorww", make, *calls)
    if RUNGS:
        for rung, grid in (("rows", cdiv(N, 4)), ("naive", cdiv(N, 128))):
            kernel = f"layernorm_forward_{rung}<bf16>"
            one = lambda *a, kernel=kernel, grid=grid: launch("layernorm", kernel, grid, 128, *a, N, C)
            row("layernorm forward", rung, "ooorww", make, one, calls[1])
    make = lambda: (empty(N, C), empty(N, C), f32(N), f32(N), normal(N, C), normal(N, C), *weights())
    row("residual + layernorm forward", "chosen", "oooorrww", make, *both("residual_layernorm_forward"))

    def make():
        arrays = f32(N), f32(N), normal(N, C)
        ops.layernorm_forward(empty(N, C), *arrays, *weights())
        return normal(N, C), ops.zeros(C), ops.zeros(C), normal(N, C), arrays[2], normal(C), *arrays[:2]

    calls = both("layernorm_backward")
    row("layernorm backward", "chosen", "xxxwwwww", make, *calls, n=N)
    if RUNGS:
        kernel, grid = "layernorm_backward_naive<bf16>", cdiv(max(N, C), 128)
        naive = lambda *a, kernel=kernel, grid=grid: launch("layernorm", kernel, grid, 128, *a, N, C)
        row("layernorm backward", "naive", "xxxwwwww", make, naive, calls[1], n=N)

    for name, marks in (("gelu_forward", "or"), ("gelu_backward", "orr"), ("residual_forward", "orr")):
        make = lambda marks=marks: tuple(normal(N, 4 * C) for _ in marks)
        calls, grid, work = both(name), cdiv(N * 4 * C, 256), name.replace("_", " ")
        row(work, "chosen", marks, make, *calls)
        if RUNGS:
            kernel = f"{name}_naive<bf16>"
            naive = lambda *a, kernel=kernel, grid=grid: launch("gelu", kernel, grid, 256, *a, N * 4 * C)
            row(work, "naive", marks, make, naive, calls[1])

    tokens = lambda: integers(V, B, T)
    make = lambda: (empty(B, T, C), tokens(), normal(V, C), normal(T, C))
    calls = both("encoder_forward")
    row("encoder forward", "chosen", "orww", make, *calls, moved=4 * N * C, n=1)
    if RUNGS:
        kernel, grid = "encoder_forward_naive<bf16>", cdiv(N * C, 256)
        naive = lambda *a, kernel=kernel, grid=grid: launch(
            "encoder", kernel, grid, 256, *a, None, N, T, C, T
        )
        row("encoder forward", "naive", "orww", make, naive, calls[1], moved=4 * N * C, n=1)
    make = lambda: (ops.zeros((V, C)), ops.zeros((T, C)), normal(B, T, C), tokens())
    used = V * (1 - (1 - 1 / V) ** N)  # rows of wte that N random tokens name
    moved = int(2 * N * C + 8 * (used + T) * C)
    calls = both("encoder_backward")
    row("encoder backward", "chosen", "xxww", make, *calls, moved=moved, n=V)
    if RUNGS:

        def naive(dwte, dwpe, dout, ids):
            grid, arguments = cdiv(T * C, 256), (dwpe, dout, B, T, C)
            launch("encoder", "encoder_backward_wpe_naive<bf16>", grid, 256, *arguments)
            grid, arguments = (cdiv(C, 256), V), (dwte, dout, ids, N, C)
            launch("encoder", "encoder_backward_naive<bf16>", grid, 256, *arguments)

        row("encoder backward", "naive", "xxww", make, naive, calls[1], moved=moved, n=V)

    make = lambda: (f32(R), normal(R, V), integers(V - 47, R), normal(R, dtype=F32))
    calls = both("classifier", V - 47)
    row("classifier", "chosen", "oxrr", make, *calls)
    if RUNGS:
        twice = lambda *a: launch("classifier", "classifier_twice<bf16>", R, 1024, *a, V - 47, V)
        row("classifier", "row read twice", "oxrr", make, twice, calls[1])
        grid, size = cdiv(R, 128), (R, V - 47, V)
        naive = lambda *a: launch("classifier", "classifier_naive<bf16>", grid, 128, *a, *size)
        row("classifier", "naive", "oxrr", make, naive, calls[1])
    make = lambda: (f32(R), normal(R, V), integers(V - 47, R))
    row("cross entropy", "chosen", "orr", make, *both("cross_entropy", V - 47))

    def make():
        values = (normal(P, dtype=F32), normal(P, dtype=F32), normal(P, dtype=F32))
        return *values, normal(P, dtype=F32, pool="positive"), ops.to_device(np.ones(1, np.float32)), empty(P)

    numbers, step = (1e-3, 0.9, 0.95, 1e-8, 0.1), 10
    update = lambda m: lambda p, g, m1, m2, scale, out: m.adamw(p, g, m1, m2, scale, *numbers, step, out)
    row("AdamW", "chosen", "xxxxwo", make, update(ops), update(cpu), n=4096)
    if RUNGS:
        root = math.sqrt(1 - 0.95**step)
        scalars = 0.9, 0.95, 1 - 1e-4, 1e-3 * root / (1 - 0.9**step), 1e-8 * root
        naive = lambda p, g, m, v, scale, out: launch(
            "adamw", "adamw_naive", cdiv(P, 256), 256, p, g, m, v, out, scale, *scalars, P
        )
        row("AdamW", "naive", "xxxxwo", make, naive, update(cpu), n=4096)
    make = lambda: (f32(1), normal(P, dtype=F32))
    row("global norm", "chosen", "ow", make, *both("global_norm"))
    if RUNGS:
        naive = lambda norm, grads: launch("norm", "global_norm_naive", 1, 1024, norm, grads, P)
        row("global norm", "naive", "ow", make, naive, both("global_norm")[1])


def decoding():
    size = 1, NH, C // NH, T

    def append(qkv, keys, values, lengths):
        grid = cdiv(C, 256), 1, len(qkv)
        launch("decode", "attention_append<bf16>", grid, 256, keys, values, qkv, lengths, *size)
        return grid

    def one_split(out, *cache):
        append(*cache)
        kernel = f"attention_decode<bf16, {64 if C // NH <= 64 else 128}, 8>"
        launch("decode", kernel, (NH, 1, len(out)), 128, out, None, *cache, *size, 1)

    def naive(out, *cache):
        launch("decode", "attention_decode_naive<bf16>", append(*cache), 256, out, *cache, *size)

    for rows in (64, 1) if not SETTINGS["emulator"] else (2,):
        cache = rows, NH, T, C // NH
        make = lambda rows=rows, cache=cache: (
            empty(rows, 1, C),
            *(normal(rows, 1, 3 * C), normal(*cache), normal(*cache)),
            ops.to_device(np.full(rows, T - 1, np.int32)),
        )
        moved = rows * T * C * 4
        work = f"decode attention, {rows} × {T}"
        calls = both("attention_decode")
        row(work, "chosen", "orxxr", make, *calls, moved=moved, n=1)
        if RUNGS and rows * NH < ops.SMS:  # the chosen one splits
            row(work, "one split", "orxxr", make, one_split, calls[1], moved=moved, n=1)
        if RUNGS:
            row(work, "naive", "orxxr", make, naive, calls[1], moved=moved, n=1)
        make = lambda rows=rows: (
            empty(rows, dtype=np.int32),
            normal(rows, V, dtype=F32),
            *(integers(1 << 40, rows, dtype=np.int64) for _ in range(2)),
        )
        for what, filters in (("", (1.0,)), (", top-k 50, top-p 0.9", (0.8, 50, 0.9))):
            calls = [
                lambda out, z, streams, counters, f=filters, m=m: m.sample(out, z, 7, streams, counters, *f)
                for m in (ops, cpu)
            ]
            row(f"sample, {rows} × {V}{what}", "chosen", "orrr", make, *calls, moved=rows * V * 4)


# ------------------------------------------------------------------------------------------------------------
# Training


def config():
    return gpt2.GPT2Config(SETTINGS["L"], NH, C, T, V)


def training():
    """Tokens a second as train.py gets them: batches from the host, and of each step the loss is read while
    its backward pass runs, the norm while the next step does."""
    model, steps = gpt2.GPT2(config(), "cuda", "bfloat16"), SETTINGS["steps"]
    optimizer, per_token = gpt2.AdamW(model), model.config.flops_per_token(T)
    for rows in SETTINGS["batches"]:
        weights = ops.to_device(np.full(rows * T, 1 / (rows * T), np.float32)).reshape(rows, T)
        blocks, norm = [rng.integers(V, size=(rows, T + 1)) for _ in range(3 + steps)], None
        try:
            for i, batch in enumerate(model.prefetch((block[:, :-1], block[:, 1:]) for block in blocks)):
                if i == 3:  # those were to warm up
                    ops.synchronize()
                    start = time.perf_counter()
                loss = ops.read_later(model.forward(*batch, weights))
                model.backward()
                if norm:
                    norm()
                loss()
                norm = optimizer.update(1e-4)
            ops.synchronize()
            rate = steps * rows * T / (time.perf_counter() - start)
            say(work="training", batch=rows, rate=rate, flops_per_token=per_token)
        except (UserError, MemoryError) as failure:
            say(work="training", batch=rows, failed=str(failure)[:200])
    profile(model, optimizer, rng.integers(V, size=(B, T + 1)))


def profile(model, optimizer, block):
    """Where the time of one step goes, each operation waited for: bench_ours.py's stopwatch."""
    from bench_ours import Timed  # noqa: PLC0415  it imports the whole project, only this needs that

    model.ops = timed = Timed(ops)
    model.forward(block[:, :-1], block[:, 1:])
    model.backward()
    optimizer.step(1e-4)
    for label, spent in timed.seconds.most_common(16):
        say(work="profile", label=label, calls=timed.calls[label], seconds=spent, flops=timed.flops[label])


def curve(folder):
    """Losses on the batches of folder, from weights that are left there for the peer."""
    model = gpt2.GPT2(config(), "cuda", "bfloat16")
    weights = {name: ops.to_host(model.master[name]) for name in model.config.shapes()}
    np.savez(folder / "weights.npz", **weights)
    optimizer, losses = gpt2.AdamW(model), []
    for step, block in enumerate(np.load(folder / "batches.npy")):
        losses.append(ops.read_later(model.forward(block[:, :-1], block[:, 1:])))
        model.backward()
        optimizer.step(6e-4 * min(1, (step + 1) / 20))
    say(work="curve", losses=[float(read().mean(dtype=np.float64)) for read in losses])


if __name__ == "__main__":
    section = sys.argv[1]
    globals()[section](*([Path(sys.argv[3])] if section == "curve" else []))
    for *arguments, numbers in later:
        measured(*arguments, **numbers)
