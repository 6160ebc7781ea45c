"""PyTorch's side of bench_gpu.py: cuBLAS, SDPA, and the rest as torch has it; then training and a loss curve.

bench_gpu.py starts this file in a Python that has torch, and serve() answers it. KINDS has what of torch does
the same as our kernel, on arrays of its own. Without a GPU it runs all the same, on the CPU: so it is tested.
The GPT is bench_peers.py's, compiled, under autocast to bfloat16, with the fused AdamW, a vocabulary padded
as ours is, and SDPA's backend left to torch.
"""

import functools
import gc
import re
import sys
import time
from pathlib import Path

import bench_peers
import numpy as np
import torch
import torch.nn.functional as F
from bench_gpu import serve
from torch.nn.attention import SDPBackend, sdpa_kernel

EMULATOR, CUDA = sys.argv[1] == "emulator", torch.cuda.is_available()
DEVICE, BF16, F32 = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16, torch.float32
ROTATE = 256 << 20 if CUDA else 0  # bytes that calls in turn touch at least: several times the L2 cache
ROUND = 0.025 if CUDA else 0  # seconds of a round
BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
RENAMED = [("^h", "blocks"), ("attn.c_attn", "qkv"), ("attn.c_proj", "att_proj"), ("mlp.c_fc", "fc")]
RENAMED += [("mlp.c_proj", "mlp_proj")]


def normal(*shape, dtype=BF16, grad=False):
    return torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(grad)


def integers(high, *shape):
    return torch.randint(high, shape, device=DEVICE)


def clock(make, call, replay):
    """A function that measures a round: the seconds of one call, queued ahead of the GPU, or in a graph."""
    sets = [make()]
    n_bytes = sum(x.numel() * x.element_size() for x in sets[0])
    sets += [make() for _ in range(min(127, -(-ROTATE // n_bytes)))]

    def every():
        for arrays in sets:
            call(*arrays)

    every()
    play = every
    if replay and CUDA:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            every()
        play = graph.replay

    def measure(repeats):
        if not CUDA:
            start = time.perf_counter()
            for _ in range(repeats):
                play()
            return (time.perf_counter() - start) / repeats
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        play()  # the GPU is at work before the clock starts
        start.record()
        for _ in range(repeats):
            play()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    measure(1)
    repeats = min(200, max(1, int(ROUND / max(measure(1), 1e-6))))
    return lambda: measure(repeats) / len(sets)


def gradient(out, dout, *inputs):
    """The gradients of out = f(inputs), given out's; as often as one likes."""
    torch.autograd.grad(out, [x for x in inputs if x.requires_grad], dout, retain_graph=True)


# ------------------------------------------------------------------------------------------------------------
# The kernels


def attend(backend, q, k, v):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def heads(B, T, NH, HS, grad=False):
    """q, k and v (B, NH, T, HS), as they lie in what one product made."""
    qkv = normal(B, T, 3, NH, HS)
    return [part.transpose(1, 2).requires_grad_(grad) for part in qkv.unbind(2)]


def attended(backend, **sizes):
    """What attention's gradient takes."""
    qkv = heads(**sizes, grad=True)
    out = attend(backend, *qkv)
    return out, torch.randn_like(out), *qkv


def norm(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b)


def normed(B, T, C):
    """What layernorm's gradient takes."""
    inputs = normal(B * T, C, grad=True), normal(C, grad=True), normal(C, grad=True)
    return norm(*inputs), normal(B * T, C), *inputs


def optimized(P):
    parameter, grad = normal(P, dtype=F32, grad=True), normal(P, dtype=F32)
    parameter.grad = grad
    parameter.optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
    return (parameter,)


def random(*shapes, dtype=BF16):
    """A function that makes a set of arrays of these shapes."""
    return lambda: [normal(*shape, dtype=dtype) for shape in shapes]


aten = torch.ops.aten
# Of each kind of row, given its sizes: what makes a set of arrays, and the call. Weights are (out, in) here.
KINDS = {
    "copy": lambda n_bytes: (random((n_bytes // 4,), (n_bytes // 4,), dtype=F32), torch.Tensor.copy_),
    "matmul": lambda M, N, K: (random((M, K), (N, K), (N,)), F.linear),
    "matmul_dx": lambda M, N, K: (
        random((M, K), (M, N), (N, K)),
        lambda dx, dout, w: torch.mm(dout, w, out=dx),
    ),
    "matmul_dw": lambda M, N, K: (
        random((N, K), (M, N), (M, K)),
        lambda dw, dout, x: torch.mm(dout.T, x, out=dw),
    ),
    "head": lambda M, N, K: (random((M, N), (M, K), (N, K)), lambda out, x, w: torch.mm(x, w.T, out=out)),
    "layernorm_forward": lambda B, T, C: (random((B * T, C), (C,), (C,)), norm),
    "layernorm_backward": lambda **sizes: (functools.partial(normed, **sizes), gradient),
    "gelu_forward": lambda B, T, C: (random((B * T, C)), functools.partial(F.gelu, approximate="tanh")),
    "gelu_backward": lambda B, T, C: (
        random((B * T, C), (B * T, C)),
        functools.partial(aten.gelu_backward, approximate="tanh"),
    ),
    "residual_forward": lambda B, T, C: (random((B * T, C), (B * T, C)), torch.add),
    "encoder_forward": lambda B, T, C, V: (
        lambda: (integers(V, B, T), normal(V, C), normal(T, C)),
        lambda tokens, wte, wpe: F.embedding(tokens, wte) + wpe,
    ),
    "encoder_backward": lambda B, T, C, V: (
        lambda: (normal(B, T, C), integers(V, B, T)),
        lambda dout, tokens: aten.embedding_dense_backward(dout, tokens, V, -1, False),
    ),
    "classifier": lambda M, V: (
        lambda: (normal(M, V, grad=True), integers(V, M)),
        lambda logits, targets: torch.autograd.grad(F.cross_entropy(logits, targets), logits),
    ),
    "cross_entropy": lambda M, V: (lambda: (normal(M, V), integers(V, M)), F.cross_entropy),
    "adamw": lambda P: (lambda: optimized(P), lambda parameter: parameter.optimizer.step()),
    "global_norm": lambda P: (random((P,), dtype=F32), torch.linalg.vector_norm),
    "sample": lambda B, V: (random((B, V), dtype=F32), lambda z: torch.multinomial(F.softmax(z, 1), 1)),
}
KINDS |= {"head_dx": KINDS["matmul_dx"], "head_dw": KINDS["matmul_dw"]}  # dW in bf16: ours adds to float32
# The same for a backend of SDPA.
ATTENTION = {
    "attention_forward": lambda backend, **sizes: (
        functools.partial(heads, **sizes),
        functools.partial(attend, backend),
    ),
    "attention_backward": lambda backend, **sizes: (functools.partial(attended, backend, **sizes), gradient),
    "attention_decode": lambda backend, B, T, NH, HS: (
        random((B, NH, 1, HS), (B, NH, T, HS), (B, NH, T, HS)),
        functools.partial(attend, backend),
    ),
}


# ------------------------------------------------------------------------------------------------------------
# Training


def trainer(L, NH, C, T, V, weights=None, compiled=CUDA):
    """(a function that trains on a batch and returns the loss, the optimizer)."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = bench_peers.GPT(L, NH, C, T, V)
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
    run = torch.compile(model, dynamic=False) if compiled else model

    def step(tokens, targets):
        with torch.autocast(DEVICE.type, BF16):
            loss = run(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, optimizer


trained = functools.cache(trainer)  # the compiler looks at each size of batch anew, but the model is one


def training(B, dtype, **sizes):
    """The timer of a step; the batch is on the GPU."""
    (step, _), V, T = trained(**sizes), sizes["V"], sizes["T"]
    n = min(100, max(6, (6 << 16) // (B * T))) if CUDA else 1  # of a round, as many as ours

    def measure():
        tokens = integers(V, B, T + 1)
        for _ in range(2):
            step(tokens[:, :-1], tokens[:, 1:])
        settle(free=False)
        start = time.perf_counter()
        for _ in range(n):
            step(tokens[:, :-1], tokens[:, 1:])
        settle(free=False)
        spent = (time.perf_counter() - start) / n
        settle(free=True)  # the other side needs the memory
        return spent

    measure()  # compiles
    return measure


def curve(B, steps, folder, **sizes):
    """Losses on the batches of folder, from the weights that ours began with. Compiling would take longer."""

    def measure():
        step, optimizer = trainer(**sizes, weights=np.load(Path(folder) / "weights.npz"), compiled=False)
        losses = []
        for i, block in enumerate(np.load(Path(folder) / "batches.npy")):
            for group in optimizer.param_groups:
                group["lr"] = 6e-4 * min(1, (i + 1) / 20)
            block = torch.from_numpy(block.astype(np.int64)).to(DEVICE)  # noqa: PLW2901
            losses.append(step(block[:, :-1], block[:, 1:]))
        return [float(loss) for loss in losses]

    return measure


# ------------------------------------------------------------------------------------------------------------


def open_row(kind, sizes, version):
    if kind == "card":
        return dict(torch=f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}"), {}
    if kind in ("training", "curve"):
        return {}, {"torch": globals()[kind](**sizes)}
    if kind not in ATTENTION:
        return {}, {"torch": clock(*KINDS[kind](**sizes), replay=False)}
    timers, failures = {}, []
    for name, backend in BACKENDS.items():
        try:
            timers[name] = clock(*ATTENTION[kind](backend, **sizes), replay=kind == "attention_decode")
        except Exception as failure:  # the other backend may be there
            failures.append(f"{name}: {type(failure).__name__}: {failure}"[:300])
            settle(free=True)
    return dict(failures=failures), timers


def settle(free):
    if CUDA and free:
        gc.collect()
        torch.cuda.empty_cache()
    if CUDA:
        torch.cuda.synchronize()


if __name__ == "__main__":
    if not CUDA and not EMULATOR:
        sys.exit("this torch has no CUDA")
    serve(open_row, settle)
