"""Our side of bench.py: every row of its table is measured here, and for the peer in bench_peers.py.

bench.py starts this file for one row; each line on standard input asks for one measurement. Random weights do
for speed: a step takes as long whatever it learns.
"""

import inspect
import json
import platform
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

import common
import data
import distributed
import gpt2
import sample
import train

ROOT = Path(__file__).resolve().parent.parent
D12 = gpt2.GPT2Config()
SMALL = gpt2.GPT2Config(n_layer=4, n_head=4, n_embd=128, n_positions=256, vocab_size=1024)
VOCABULARY = "1024"
RECIPE = """
    --n-layer 2 --n-head 3 --n-embd 96 --seq-len 64 --total-batch-tokens 512 --lr 4e-3 --final-lr 0
    --warmup-steps 50 --beta2 0.95 --eval-every 1000000 --sample-every 0 --save-every 0 --eval-tokens 1000000
"""


def start_ranks(config, rows):
    """The ranks that a script starts for a model of this size: for a small one, one a core."""
    ranks = distributed.choose_ranks(None, config.n_params(), "cpu", rows)
    return distributed.start(ranks, __file__, sys.argv[1:])


def training(config, B, T, world, n=1):
    """A function that trains for n steps, as train.py does, and returns the seconds of one."""
    model = gpt2.GPT2(config)
    model.share(world)
    optimizer = gpt2.AdamW(model, world=world)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(B, T + 1))
    mine = tokens[world.rank :: world.size]
    weights = np.full((len(mine), T), 1 / (B * T))

    def measure():
        start = time.perf_counter()
        for _ in range(n):
            model.forward(mine[:, :-1], mine[:, 1:], weights)
            model.backward()
            world.all_reduce(model.sums)
            optimizer.step(1e-4)
        return (time.perf_counter() - start) / n

    return measure


def resident(measure):
    """The most memory that this process ever had, in GB, after two steps."""
    measure(), measure()
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    )


def decoding(B, prompt=16, new=48):
    """A function that continues B prompts greedily and returns tokens a second, reading them included."""
    model = gpt2.GPT2(D12)
    prompts = np.random.default_rng(0).integers(50257, size=(B, prompt)).tolist()

    def measure():
        start = time.perf_counter()
        completions = sample.generate(model, prompts, new, temperature=0)
        assert all(len(completion.ids) == new for completion in completions)
        return B * new / (time.perf_counter() - start)

    return measure


def sampling(B, world, prompt=32, new=64):
    """A function that samples B continuations as rl.py does, by all ranks, and returns tokens a second."""
    model = gpt2.GPT2(SMALL)
    prompts = np.random.default_rng(0).integers(SMALL.vocab_size, size=(B, prompt)).tolist()

    def measure():
        start = time.perf_counter()
        completions = sample.generate(model, prompts[world.rank :: world.size], new, temperature=1.0, seed=1)
        lengths = world.gather([len(completion.ids) for completion in completions])
        assert sum(map(sum, lengths)) == B * new
        return B * new / (time.perf_counter() - start)

    return measure


# ------------------------------------------------------------------------------------------------------------
# Quality for time


def shakespeare(folder, limit):
    """Train for at most `limit` seconds with train.py; return bits per byte of the last tenth of the text.

    A short run tells how many steps there is time for; a run that takes longer does not count. The clock runs
    from the beginning of the first step to the end of the last, with everything between them: train.py shows
    a line after each.
    """
    for split in ("train", "val"):  # for the peer
        text = "".join(text for side, text in data.shakespeare() if side == split)
        (folder / f"{split}.txt").write_text(text, "utf-8")
    make = ["data.py", "shakespeare", "--vocab-size", VOCABULARY, "--out", folder / "shards"]
    subprocess.run([sys.executable, *make], check=True, stdout=sys.stderr, cwd=ROOT)
    seconds, _ = train_by_clock(folder, "trial", steps := 200)
    for name in ("first", "second", "third"):  # again with fewer steps if something else slowed it down
        seconds, bits = train_by_clock(folder, name, steps := max(100, int(steps * 0.96 * limit / seconds)))
        if seconds <= limit:
            return bits
    return None


def train_by_clock(folder, name, steps):
    """Run train.py: (the seconds that its steps took, bits per byte after the last)."""
    where = ["--data", folder / "shards", "--out", folder / name, "--steps", str(steps)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    shown = []  # when the line of each step came
    with subprocess.Popen([sys.executable, "train.py", *where, *RECIPE.split()], **pipes) as process:
        for line in process.stderr:
            if re.match(r"step \d+/\d+ \|", line):
                shown.append(time.perf_counter())
    if process.returncode:
        raise SystemExit(f"train.py ended with status {process.returncode}: {line}")
    events = common.read_log(folder / name)
    first = next(event for event in events if event["event"] == "step")
    bits = next(event["bits_per_byte"] for event in events if event["event"] == "eval")
    seconds = shown[-1] - shown[0] + first["seconds"]
    print(f"{bits:.3f} bits per byte after {steps} steps in {seconds:.1f} s", file=sys.stderr)
    return seconds, bits


# ------------------------------------------------------------------------------------------------------------
# Where the time goes


# What an operation reads and writes besides; every other array it only reads or only writes.
IN_PLACE = {"layernorm_backward": ("dinp", "dweight", "dbias"), "classifier": ("logits",)}
IN_PLACE |= dict.fromkeys(("matmul_backward", "matmul_gelu_backward"), ("dweight", "dbias"))
IN_PLACE |= {"adamw": ("params", "grads", "m", "v")}


def cost(name, arguments):
    """(label, FLOP, the fewest bytes to be moved) of an operation with these arguments, {name: value}."""
    label, flops = name, 0
    arrays = {key: x for key, x in arguments.items() if isinstance(getattr(x, "nbytes", None), int)}
    moved = sum(x.nbytes for x in arrays.values())
    moved += sum(x.nbytes for key, x in arrays.items() if key in IN_PLACE.get(name, ()))
    if name.startswith("matmul"):
        (out,) = (arguments[key] for key in ("out", "dout") if key in arguments)  # (..., out)
        rows, weight = out.size // out.shape[-1], arguments["weight"]
        flops = 2 * rows * weight.size * (2 if "backward" in name else 1)
        label = f"{name} {weight.shape[0]} to {weight.shape[1]}"
    elif name.startswith("attention"):  # causality leaves half of 2 products forward, of 5 backward
        B, T, width = arguments["qkv"].shape
        flops = B * T * T * width // 3 * (5 if "backward" in name else 2)
    elif name == "encoder_forward":  # of wte only the tokens' rows
        moved += min(0, arguments["out"].nbytes - arguments["wte"].nbytes)
    elif name == "encoder_backward":  # of dwte only the tokens' rows, at most one a token; read and written
        rows = min(len(arguments["dwte"]), arguments["tokens"].size)
        width = arguments["dwte"].nbytes // len(arguments["dwte"])
        moved += 2 * rows * width - arguments["dwte"].nbytes + arguments["dwpe"].nbytes
    return label, flops, moved


class Timed:
    """The operations of a device, with a stopwatch on every call."""

    def __init__(self, ops):
        self.ops, self.seconds, self.calls, self.flops = ops, Counter(), Counter(), Counter()

    def __getattr__(self, name):
        function = getattr(self.ops, name)
        if not inspect.isfunction(function):
            return function

        def timed(*values):
            start = time.perf_counter()
            result = function(*values)
            self.ops.synchronize()
            seconds = time.perf_counter() - start
            label, flops, _ = cost(name, dict(zip(inspect.signature(function).parameters, values)))
            for counter, value in ((self.seconds, seconds), (self.calls, 1), (self.flops, flops)):
                counter[label] += value
            return result

        return timed


def profile(B, T, steps):
    """Print each operation's share of a 124M step, and what it computes a second."""
    model = gpt2.GPT2(D12)
    optimizer, tokens = gpt2.AdamW(model), np.random.default_rng(0).integers(50257, size=(B, T + 1))
    peak, ops = train.measured_flops(model.ops, model.type), model.ops
    for step in range(1 + steps):
        if step == 1:  # the first was to warm up
            model.ops, start = Timed(ops), time.perf_counter()
        model.forward(tokens[:, :-1], tokens[:, 1:])
        model.backward()
        optimizer.step(1e-4)
    total, timed = time.perf_counter() - start, model.ops
    timed.seconds["everything else"] = total - sum(timed.seconds.values())
    what = f"124M, {B} × {T} tokens: {total / steps:.2f} s a step"
    print(f"\n{what}; a matmul of 1024³ has {peak / 1e9:.0f} GFLOP/s")
    print(f"{'operation':36}{'calls':>6}{'ms':>10}{'share':>8}{'GFLOP/s':>10}{'of peak':>9}")
    for label, seconds in timed.seconds.most_common():
        if seconds < 0.0005 * total:
            break
        speed = timed.flops[label] / seconds
        line = f"{label:36}{timed.calls[label] // steps:6}{seconds / steps * 1e3:10.1f}{seconds / total:8.1%}"
        print(line + (f"{speed / 1e9:10.0f}{speed / peak:9.0%}" if speed else ""))


# ------------------------------------------------------------------------------------------------------------


def requests(world):
    """Yield on every rank whenever rank 0 reads a line from standard input, until there are no more."""
    while True:
        asked = bool(sys.stdin.readline()) if world.rank == 0 else None
        if not world.gather(asked)[0]:
            return
        yield


def main(row, folder, limit):
    nano, world = gpt2.GPT2Config(4, 4, 128, 64, 84), distributed.World(0, 1)
    if row == "versions":
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        versions = (
            f"Python {platform.python_version()}, NumPy {np.__version__}, {blas['name']} {blas['version']}"
        )
        measure = lambda: versions
    elif row == "step-4x64":
        measure = training(D12, 4, 64, world)
    elif row == "step-1x1024":
        measure = training(D12, 1, 1024, world)
    elif row == "nano":
        world = start_ranks(nano, 12)
        seconds = training(nano, 12, 64, world, n=20)
        measure = lambda: 12 * 64 / seconds()
    elif row in ("decode-1", "decode-8"):
        measure = decoding(int(row[-1]))
    elif row == "sample-64":
        world = start_ranks(SMALL, 64)
        measure = sampling(64, world)
    elif row == "shakespeare":
        measure = lambda: shakespeare(Path(folder), float(limit))
    elif row == "memory":
        measure = lambda: resident(training(D12, 1, 1024, world))
    for _ in requests(world):
        value = measure()
        if world.rank == 0:
            print(json.dumps(value), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "profile":
        profile(4, 64, steps=3)
        profile(1, 1024, steps=1)
    else:
        main(*sys.argv[1:])
