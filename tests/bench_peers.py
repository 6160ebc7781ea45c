"""The other side of bench.py: what a user would run instead, in PyTorch and transformers.

    python tests/bench_peers.py step-4x64      measures once for every line on standard input

bench.py starts this file in another Python, because the project itself needs neither of the two. The GPT is
nanoGPT's in our own words: eager, fused qkv, PyTorch's attention, AdamW with decay on matrices only.
"""

import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

if hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


class Block(nn.Module):
    def __init__(self, C, NH, bias):
        super().__init__()
        self.NH = NH
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.qkv, self.att_proj = nn.Linear(C, 3 * C, bias), nn.Linear(C, C, bias)
        self.fc, self.mlp_proj = nn.Linear(C, 4 * C, bias), nn.Linear(4 * C, C, bias)

    def forward(self, x):  # (B, T, C)
        qkv = self.qkv(self.ln_1(x)).unflatten(2, (3, self.NH, -1))  # (B, T, 3, NH, HS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, NH, T, HS) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, NH, T, HS)
        x = x + self.att_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, L, NH, C, T, V, bias=True):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block(C, NH, bias) for _ in range(L))
        self.ln_f = nn.LayerNorm(C, bias=bias)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * L) if "_proj" in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens, targets):  # (B, T) both -> the mean loss
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        logits = self.ln_f(x) @ self.wte.weight.T  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def optimizer(self, lr, beta2):
        matrices = [p for p in self.parameters() if p.dim() == 2]
        vectors = [p for p in self.parameters() if p.dim() == 1]
        groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2))

    def step(self, optimizer, tokens, targets):
        self(tokens, targets).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def training(L, NH, C, V, B, T, n=1, bias=True):
    """A function that trains for n steps and returns the seconds of one."""
    torch.manual_seed(0)
    model = GPT(L, NH, C, T, V, bias)
    optimizer, tokens = model.optimizer(1e-4, 0.95), torch.randint(V, (B, T + 1))

    def measure():
        start = time.perf_counter()
        for _ in range(n):
            model.step(optimizer, tokens[:, :-1], tokens[:, 1:])
        return (time.perf_counter() - start) / n

    return measure


def resident(measure):
    """Two steps, and the most memory that this process ever had, in GB."""
    measure(), measure()
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )


def decoding(B, prompt=16, new=48, draw=False, V=50257, **sizes):
    """A function that continues B prompts, greedily or by drawing, and returns tokens a second."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415  only this row needs it

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, bos_token_id=V - 1, eos_token_id=V - 1, **sizes)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(V, (B, prompt))
    how = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=V - 1)
    how |= dict(do_sample=True, top_k=0) if draw else dict(do_sample=False)

    def measure():
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **how)
        assert out.shape == (B, prompt + new)
        return B * new / (time.perf_counter() - start)

    return measure


def shakespeare(folder, limit):
    """nanoGPT's CPU recipe on characters for `limit` seconds; bits per byte of the validation text.

    4 layers of 128, 12 x 64 characters, no biases, lr 1e-3 to 1e-4 by half a cosine, 100 steps of warm-up,
    beta2 0.99. The cosine follows the clock, so that it ends when the time does.
    """
    text, val_text = ((Path(folder) / f"{split}.txt").read_text("utf-8") for split in ("train", "val"))
    letters = sorted(set(text + val_text))
    ids = {letter: i for i, letter in enumerate(letters)}
    train, val = (torch.tensor([ids[c] for c in part]) for part in (text, val_text))
    B, T = 12, 64
    torch.manual_seed(1337)
    model = GPT(4, 4, 128, T, len(letters), bias=False)
    optimizer = model.optimizer(1e-3, 0.99)

    def batch():
        starts = torch.randint(len(train) - T, (B,))
        windows = torch.stack([train[i : i + T + 1] for i in starts])  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    for _ in range(2):  # warm
        model(*batch()).backward()
        optimizer.zero_grad(set_to_none=True)
    steps, start = 0, time.perf_counter()
    while (progress := (time.perf_counter() - start) / limit) < 1:
        lr = min(1e-3 * (steps + 1) / 100, 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.step(optimizer, *batch())
        steps += 1
    seconds = time.perf_counter() - start

    n = (len(val) - 1) // T
    inputs, targets = val[: n * T].view(n, T), val[1 : n * T + 1].view(n, T)
    with torch.inference_mode():
        nats = sum(float(model(x, y)) * y.numel() for x, y in zip(inputs.split(96), targets.split(96)))
    print(f"nanoGPT's recipe: {steps} steps in {seconds:.1f} s", file=sys.stderr)
    return nats / math.log(2) / len(val_text[1 : n * T + 1].encode())


def main(row, folder="", limit="100"):
    d12 = dict(L=12, NH=12, C=768, V=50257)
    if row == "versions":
        versions = f"PyTorch {torch.__version__}"
        try:
            from importlib.metadata import version  # noqa: PLC0415

            versions += f", transformers {version('transformers')}"
        except ImportError:
            pass
        measure = lambda: versions
    elif row == "step-4x64":
        measure = training(**d12, B=4, T=64)
    elif row == "step-1x1024":
        measure = training(**d12, B=1, T=1024)
    elif row == "nano":
        seconds = training(L=4, NH=4, C=128, V=84, B=12, T=64, n=20, bias=False)
        measure = lambda: 12 * 64 / seconds()
    elif row in ("decode-1", "decode-8"):
        measure = decoding(int(row[-1]))
    elif row == "sample-64":
        sizes = dict(n_layer=4, n_head=4, n_embd=128, n_positions=256)
        measure = decoding(64, prompt=32, new=64, draw=True, V=1024, **sizes)
    elif row == "shakespeare":
        measure = lambda: shakespeare(folder, float(limit))
    elif row == "memory":
        measure = lambda: resident(training(**d12, B=1, T=1024))
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
