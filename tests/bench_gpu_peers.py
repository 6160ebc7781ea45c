"""PyTorch's side of bench_gpu.py: cuBLAS, SDPA, and the rest as torch has it; then training and a loss curve.

bench_gpu.py starts this file once for each section, in a Python that has torch, and reads one JSON object a
line. Without a GPU it runs all the same, on the CPU: so it is tested. The GPT is bench_peers.py's, compiled,
under autocast to bfloat16, with the fused AdamW and a vocabulary padded as ours is.
"""

import itertools
import json
import re
import statistics
import sys
import time
from pathlib import Path

import bench_peers
import numpy as np
import torch
import torch.nn.functional as F

BEGAN, SETTINGS = time.monotonic(), json.loads(sys.argv[2])
LAST = BEGAN + 0.8 * SETTINGS["seconds"]  # no row begins after that
B, T, C, NH, V, R = (SETTINGS[name] for name in ("B", "T", "C", "NH", "V", "R"))
N, P = B * T, SETTINGS["parameters"]
CUDA = torch.cuda.is_available()
DEVICE, BF16 = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16
ROTATE = 256 << 20 if CUDA else 0  # bytes that calls in turn must touch: several times the L2 cache
SECONDS = 0.15 if CUDA else 0
RENAMED = [("^h", "blocks"), ("attn.c_attn", "qkv"), ("attn.c_proj", "att_proj"), ("mlp.c_fc", "fc")]
RENAMED += [("mlp.c_proj", "mlp_proj")]


def normal(*shape, dtype=BF16, grad=False):
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(grad)


def integers(high, *shape):
    return torch.randint(high, shape, device=DEVICE)


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def elapsed(work, repeats):
    """Seconds of each of `repeats` calls."""
    if not CUDA:
        times = [time.perf_counter()]
        for _ in range(repeats):
            work()
            times.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def say(**row):
    print(json.dumps(row), flush=True)


def row(work, make, call):
    """Median seconds of call(*make()), over sets of arrays that take turns, queued ahead of the GPU."""
    if time.monotonic() > LAST:
        return
    try:
        sets = [make()]
        n_bytes = sum(x.numel() * x.element_size() for x in sets[0])
        sets += [make() for _ in range(min(39, ROTATE // n_bytes))]

        def every():
            for arrays in sets:
                call(*arrays)

        every()
        once = elapsed(every, 2)[-1]
        repeats = min(200, max(3, int(SECONDS / max(once, 1e-6))))
        elapsed(every, repeats // 3)  # until the clocks have settled
        say(work=work, seconds=statistics.median(elapsed(every, repeats)) / len(sets))
    except Exception as failure:  # the next row may work
        say(work=work, failed=f"{type(failure).__name__}: {failure}"[:300])
    finally:
        sets = None
        if CUDA:
            torch.cuda.empty_cache()


def gradient(out, *inputs):
    """The gradients of out = f(inputs), of which the last is out's own gradient; as often as one likes."""
    wanted = [x for x in inputs if x.requires_grad]
    torch.autograd.grad(out, wanted, inputs[-1], retain_graph=True)


# ------------------------------------------------------------------------------------------------------------
# The kernels


def ceilings():
    n = 8192 if CUDA else 64
    row("cuBLAS", lambda: (normal(n, n), normal(n, n), normal(n, n)), lambda a, b, c: torch.mm(a, b, out=c))
    say(work="versions", versions=f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}", n=n)


def matmul():
    for name, K, O in (("qkv", C, 3 * C), ("proj", C, C), ("fc", C, 4 * C), ("fc2", 4 * C, C)):
        make = lambda K=K, O=O: (normal(N, K), normal(O, K), normal(O))
        row(f"matmul {name}", make, F.linear)
        make = lambda K=K, O=O: (normal(N, O), normal(O, K))
        row(f"matmul {name} dX", make, torch.mm)
        make = lambda K=K, O=O: (normal(N, O), normal(N, K))
        row(f"matmul {name} dW", make, lambda dout, inp: torch.mm(dout.T, inp))
    row("matmul logits", lambda: (normal(R, C), normal(V, C)), F.linear)
    row("matmul logits dX", lambda: (normal(R, V), normal(V, C)), torch.mm)
    row("matmul logits dW", lambda: (normal(R, V), normal(R, C)), lambda z, x: torch.mm(z.T, x))


def heads(qkv):
    return (part.unflatten(2, (NH, -1)).transpose(1, 2) for part in qkv.chunk(3, 2))


def attention():
    mix = lambda qkv: F.scaled_dot_product_attention(*heads(qkv), is_causal=True).transpose(1, 2).flatten(2)
    row("attention forward", lambda: (normal(B, T, 3 * C),), mix)

    def make():
        qkv = normal(B, T, 3 * C, grad=True)
        return mix(qkv), qkv, normal(B, T, C)

    row("attention backward", make, gradient)


def bandwidth():
    norm = lambda x, w, b: F.layer_norm(x, (C,), w, b)
    weights = lambda grad=False: (normal(C, grad=grad), normal(C, grad=grad))
    row("layernorm forward", lambda: (normal(N, C), *weights()), norm)
    make = lambda: (normal(N, C), normal(N, C), *weights())
    row("residual + layernorm forward", make, lambda x, y, w, b: norm(x + y, w, b))

    def make():
        x, (w, b) = normal(N, C, grad=True), weights(True)
        return norm(x, w, b), x, w, b, normal(N, C)

    row("layernorm backward", make, gradient)
    row("gelu forward", lambda: (normal(N, 4 * C),), lambda x: F.gelu(x, approximate="tanh"))
    back = lambda dout, x: torch.ops.aten.gelu_backward(dout, x, approximate="tanh")
    row("gelu backward", lambda: (normal(N, 4 * C), normal(N, 4 * C)), back)
    row("residual forward", lambda: (normal(N, 4 * C), normal(N, 4 * C)), torch.add)

    make = lambda: (integers(V, B, T), normal(V, C), normal(T, C))
    row("encoder forward", make, lambda tokens, wte, wpe: F.embedding(tokens, wte) + wpe)
    back = lambda dout, tokens: torch.ops.aten.embedding_dense_backward(dout, tokens, V, -1, False)
    row("encoder backward", lambda: (normal(B, T, C), integers(V, B, T)), back)

    make = lambda: (normal(R, V, grad=True), integers(V, R))

    def classify(logits, targets):
        torch.autograd.grad(F.cross_entropy(logits, targets), logits)

    row("classifier", make, classify)
    row("cross entropy", make, lambda logits, targets: F.cross_entropy(logits.detach(), targets))

    parameter = normal(P, dtype=torch.float32, grad=True)
    parameter.grad = normal(P, dtype=torch.float32)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    row("AdamW", lambda: (parameter,), lambda _: optimizer.step())
    row("global norm", lambda: (parameter.grad,), torch.linalg.vector_norm)


def decoding():
    for rows in (64, 1) if CUDA else (2,):
        make = lambda rows=rows: (normal(rows, NH, 1, C // NH), *(normal(rows, NH, T, C // NH),) * 2)
        row(f"decode attention, {rows} × {T}", make, F.scaled_dot_product_attention)
        make = lambda rows=rows: (normal(rows, V, dtype=torch.float32),)
        row(f"sample, {rows} × {V}", make, lambda z: torch.multinomial(F.softmax(z, 1), 1))


# ------------------------------------------------------------------------------------------------------------
# Training


def trainer(weights=None):
    """(a function that trains on a batch and returns the loss, the optimizer)."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = bench_peers.GPT(SETTINGS["L"], NH, C, T, V)
    if weights is not None:
        names = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in weights.items():
                for ours, theirs in RENAMED:
                    name = re.sub(ours, theirs, name)  # noqa: PLW2901
                matrix = value.ndim == 2 and not name.startswith("w")  # Linear's are (out, in)
                names[name].copy_(torch.from_numpy(value.T if matrix else value))
    model.to(DEVICE)
    groups = model.optimizer(6e-4, 0.95).param_groups  # decay for matrices alone
    groups = [dict(params=group["params"], weight_decay=group["weight_decay"]) for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model, dynamic=False) if SETTINGS["compile"] else model

    def step(tokens, targets):
        with torch.autocast(DEVICE.type, BF16):
            loss = run(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, optimizer


def training():
    step, _ = trainer()
    slowest = 0  # seconds, nearly all of them the compiler's, which looks at each size anew
    for rows in SETTINGS["batches"]:
        began = time.monotonic()
        if began + slowest > BEGAN + SETTINGS["seconds"]:
            break
        try:
            tokens = integers(V, rows, T + 1)
            for _ in range(3):  # compile, warm up
                step(tokens[:, :-1], tokens[:, 1:])
            synchronize()
            start = time.perf_counter()
            for _ in range(SETTINGS["steps"]):
                step(tokens[:, :-1], tokens[:, 1:])
            synchronize()
            rate = SETTINGS["steps"] * rows * T / (time.perf_counter() - start)
            memory = torch.cuda.mem_get_info() if CUDA else (0, 0)
            say(work="training", batch=rows, rate=rate, memory=memory[1] - memory[0])
        except RuntimeError as failure:  # out of memory, for one
            say(work="training", batch=rows, failed=str(failure)[:200])
        slowest = max(slowest, time.monotonic() - began)
        if CUDA:
            torch.cuda.empty_cache()


def curve(folder):
    """Losses on the batches of folder, from the weights that ours began with."""
    step, optimizer = trainer(np.load(folder / "weights.npz"))
    losses = []
    for i, block in enumerate(np.load(folder / "batches.npy")):
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1, (i + 1) / 20)
        block = torch.from_numpy(block.astype(np.int64)).to(DEVICE)  # noqa: PLW2901
        losses.append(step(block[:, :-1], block[:, 1:]))
    say(work="curve", losses=[float(loss) for loss in losses])


if __name__ == "__main__":
    if not CUDA and not SETTINGS["emulator"]:
        sys.exit("this torch has no CUDA")
    section = sys.argv[1]
    globals()[section](*([Path(sys.argv[3])] if section == "curve" else []))
