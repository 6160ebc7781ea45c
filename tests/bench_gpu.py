"""Speed on a GPU beside PyTorch: every kernel, decoding, training. The second half of `make gpu-check`.

    python tests/bench_gpu.py                     prints what --write puts into kernels/RESULTS.md
    python tests/bench_gpu.py --only attention    a section of it
    python tests/bench_gpu.py --seconds 120       as much of every section as two minutes have room for
    python tests/bench_gpu.py --emulator          without a GPU, tiny: shows that it runs, measures nothing

Two processes measure: bench_gpu_ours.py and, in a Python that has torch, bench_gpu_peers.py. This file lists
the rows and asks both sides in turns, ours, torch, ours, torch, because temperature and power move the card's
clock: medians of the rounds are shown, and the ratio's least and largest round. A process that crashes or
hangs costs its row and is started again. The results are written after every row.
"""

import datetime
import json
import math
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import bench
import numpy as np

import common  # isort: skip  (bench.py says where it is)

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "kernels" / "RESULTS.md"
# Seconds that each section is expected to take on an H200, torch's side and its compiler included.
NEEDS = dict(ceilings=4, matmul=55, attention=10, bandwidth=30, decoding=14, training=85, steps=6, start=15)
NEEDS |= dict(curve=30, versions=40)
KERNELS = ("ceilings", "matmul", "attention", "bandwidth", "decoding", "versions")  # sections of one table
BUDGET = 290  # seconds for all of them; settings have the `limit` of one answer, but for torch.compile
BY_HAND = "\n## By hand\n"  # in RESULTS.md: what stands from here on was written by a person, and stays
COMPILING, LEAST = 45, 3  # what torch.compile takes; and too little to begin a row with
PEAKS = {"H200": 989.5, "H100": 989.5, "A100": 312}  # TFLOP/s, bf16 without sparsity; datasheets, SXM

NOTES = {  # what a reader of a section's table must know
    "matmul": "dX and dW are the gradients of the product before them. torch's dW is rounded to bf16, ours "
    "is added to float32. A fused row has no peer: its time is shown as a multiple of the plain row's.",
    "attention": "torch's is the faster of SDPA's backends cuDNN and FlashAttention. FLOP are those of the "
    "half of the scores that causality leaves.",
    "bandwidth": "The rate is of the fewest bytes that must be moved, the share of the measured copy.",
    "decoding": "The logits of a step of decoding are waited for, because the next token depends on them.",
    "training": "The two sides take turns, and each gives its activations' memory back after its turn.",
}
TARGETS = {  # what is held to what: at least or at most, what must be reached, and the aim
    "124M matmuls, cuBLAS's time over ours, geometric mean": ("≥", 1.0, 1.1),
    "124M matmuls, the least": ("≥", 0.9, 0.9),
    "1558M matmuls, cuBLAS's time over ours, geometric mean": ("≥", 0.95, 1.05),
    "attention forward, the best SDPA's time over ours": ("≥", 0.95, 1.05),
    "attention backward, the best SDPA's time over ours": ("≥", 1.25, 1.5),
    "bandwidth kernels, the least share of the copy": ("≥", 0.85, 0.85),
    "encoder backward, share of the copy": ("≥", 0.5, 0.5),
    "decode attention of 64 × 1024 on an H200, µs": ("≤", 60, 60),
    "d12 training, tok/s over torch.compile's": ("≥", 1.1, 1.25),
    "d12 training, thousand tok/s": ("≥", {"H200": 580, "H100": 550}, {"H200": 660, "H100": 620}),
    "tiny training, ms a step": ("≤", 2, 1),
    "decoding one sequence, µs a step": ("≤", 250, 150),
    "decoding 64 sequences, µs a step": ("≤", 800, 500),
    "first step with no kernel compiled, s": ("≤", 15, 6),
}

D12 = dict(rounds=5, limit=60, B=64, T=1024, V=50304, parameters=124_475_904, square=8192, copied=1 << 30)
D12 |= dict(d12=dict(L=12, NH=12, C=768, T=1024, V=50304), tiny=dict(L=4, NH=4, C=128, T=64, V=1024))
D12 |= dict(models={"124M": (768, 65536), "1558M": (1600, 65536)})  # channels, and rows of the products
D12 |= dict(wide=dict(B=16, T=1024, NH=16, HS=128), batches=(64, 32, 16), decoded=(64, 1), context=450)
D12 |= dict(first=4, curve=dict(B=16, steps=200), tiny_batch=16)  # tiny: 1,024 tokens, train.py's step
TINY = D12 | dict(rounds=1, limit=1200, B=2, T=32, V=256, parameters=4096, square=64, copied=1 << 16)
TINY |= dict(d12=dict(L=1, NH=2, C=128, T=32, V=256), tiny=dict(L=1, NH=2, C=32, T=16, V=256))
TINY |= dict(models={"124M": (128, 64)}, wide=dict(B=1, T=32, NH=1, HS=128), batches=(2,), decoded=(2,))
TINY |= dict(context=4, first=1, curve=dict(B=2, steps=3), tiny_batch=2)


# ------------------------------------------------------------------------------------------------------------
# The rows of each section. `kind` names the function that measures it, in bench_gpu_ours.py and, for a row
# with a peer, in bench_gpu_peers.py as well.


def row(kind, work=None, peer=True, **sizes):
    return dict(kind=kind, work=work or kind.replace("_", " "), peer=peer, sizes=sizes)


def ceilings(s, card):
    n = s["square"]
    return [row("copy", "copy", n_bytes=s["copied"]), row("matmul", "matmul", M=n, N=n, K=n)]


def matmul(s, card):
    """The products of GPT-2's layers and head: alone, and fused with what follows them in the model."""
    rows, fused = [], dict(proj="residual", fc="GELU", fcproj="residual")
    for model, (C, M) in s["models"].items():
        for name, K, N in ("qkv", C, 3 * C), ("proj", C, C), ("fc", C, 4 * C), ("fcproj", 4 * C, C):
            work, sizes = f"{model} {name}", dict(M=M, N=N, K=K)
            rows.append(row("matmul", work, **sizes))
            if name in fused:
                kind = f"matmul_{fused[name].lower()}"
                rows.append(row(kind, f"{work} + {fused[name]}", peer=False, **sizes))
            rows += [row("matmul_dx", f"{work} dX", **sizes), row("matmul_dw", f"{work} dW", **sizes)]
        rows.append(row("matmul_gelu_backward", f"{work} dX GELU', dW, db", peer=False, **sizes))
        sizes = dict(M=min(M, card["logits"] // s["V"]), N=s["V"], K=C)  # M: the rows of a chunk of logits
        rows += [row("head", f"{model} head", **sizes), row("head_dx", f"{model} head dX", **sizes)]
        rows.append(row("head_dw", f"{model} head dW", **sizes))
    return rows


def attention(s, card):
    NH, C = s["d12"]["NH"], s["d12"]["C"]
    sizes = dict(B=s["B"], T=s["T"], NH=NH, HS=C // NH), s["wide"]
    return [row(kind, **size) for size in sizes for kind in ("attention_forward", "attention_backward")]


def bandwidth(s, card):
    B, T, V, C = s["B"], s["T"], s["V"], s["d12"]["C"]
    kinds = "layernorm_forward", "layernorm_backward"
    rows = [row(kind, B=B, T=T, C=C) for kind in kinds]
    rows += [row(k, B=B, T=T, C=4 * C) for k in ("gelu_forward", "gelu_backward", "residual_forward")]
    rows += [row(kind, B=B, T=T, C=C, V=V) for kind in ("encoder_forward", "encoder_backward")]
    M = min(B * T, card["logits"] // V)
    rows += [row(kind, M=M, V=V) for kind in ("classifier", "cross_entropy")]
    return [*rows, row("adamw", P=s["parameters"]), row("global_norm", P=s["parameters"])]


def decoding(s, card):
    NH, C, rows = s["d12"]["NH"], s["d12"]["C"], []
    for B in s["decoded"]:
        rows += [row("attention_decode", B=B, T=s["T"], NH=NH, HS=C // NH), row("sample", B=B, V=s["V"])]
        rows.append(row("sample", "sample, filtered", peer=False, B=B, V=s["V"], top_k=50, top_p=0.9))
        sizes = dict(B=B, context=s["context"], **s["d12"])
        for work, overlap in ("a step of decoding d12", True), ("without overlapping launches", False):
            rows.append(row("decode", work, peer=False, overlap=overlap, **sizes))
    return rows


def training(s, card):
    rows = [row("training", "d12", B=B, dtype="bfloat16", **s["d12"]) for B in s["batches"]]
    return [*rows, row("training", "tiny", peer=False, B=s["tiny_batch"], dtype="float32", **s["tiny"])]


def versions(s, card):
    """The first row of a kind once more, for each version of it that ours can be made to run."""
    first = {row["kind"]: row for row in bandwidth(s, card)[::-1] + decoding(s, card)[::-1]}
    first |= {row["kind"]: row for row in attention(s, card)[::-1] + matmul(s, card)[::-1]}
    named = [(kind, name) for kind, names in card["versions"].items() for name in names]
    return [first[kind] | dict(peer=False, version=name) for kind, name in named]


SECTIONS = dict(ceilings=ceilings, matmul=matmul, attention=attention, bandwidth=bandwidth, decoding=decoding)
SECTIONS |= {
    "training": training,
    "steps": lambda s, card: [row("steps", peer=False, B=max(s["batches"]), **s["d12"])],
    "start": lambda s, card: [row("first_step", peer=False, B=s["first"], **s["d12"])],
    "curve": lambda s, card: [row("curve", **s["curve"], folder=s["folder"], **s["d12"])],
    "versions": versions,
}


# ------------------------------------------------------------------------------------------------------------
# Two processes that measure in turns


def serve(open_row, settle):
    """What both processes do: open a row, time it, close it, as standard input asks, an answer a line.

    open_row(kind, sizes, version) makes the arrays and returns what is to be said of the row and its timers,
    {name: function that returns what one round measured}. settle(free) waits for the GPU, and frees memory
    that nobody uses any more if asked to; an exception means that the GPU's context is lost.
    """
    timers = {}
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        try:
            if request["do"] == "time":
                answer["value"] = timers[request["name"]]()
            else:
                timers = {}
                settle(free=True)
            if request["do"] == "open":
                answer, timers = open_row(request["kind"], request["sizes"], request["version"])
                answer["timers"] = list(timers)
        except Exception as failure:  # the next row may work
            answer, timers = dict(failed=f"{type(failure).__name__}: {failure}"[:300]), {}
        if "failed" in answer:
            try:
                settle(free=True)
            except Exception:
                answer["lost"] = True
        print(json.dumps(answer), flush=True)


class Side:
    """One of the two processes, started when it is asked for something and has not been, or has died."""

    def __init__(self, command, environment=None):
        self.command, self.environment, self.process = command, environment, None

    def ask(self, **request):
        if self.process is None:
            self.log, self.lines = tempfile.TemporaryFile(), queue.SimpleQueue()
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
            self.process = subprocess.Popen(self.command, **pipes, env=self.environment)
            threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended: answer() says how

    @staticmethod
    def _read(process, lines):
        for line in process.stdout:
            if line.startswith("{") and line.endswith("}\n"):  # compilers print on it, too
                lines.put(json.loads(line))

    def answer(self, limit):
        """The answer to what was asked; {"failed": why} if there is none within so many seconds."""
        end, answer, why = time.monotonic() + limit, None, ""
        while answer is None and not why:
            try:
                answer = self.lines.get(timeout=min(1, max(0.1, end - time.monotonic())))
            except queue.Empty:
                if self.process.poll() is not None:
                    why = f"it ended with status {self.process.returncode}"
                elif time.monotonic() > end:
                    why = f"no answer within {limit:.0f} s"
        if why:
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").strip().splitlines()
            answer = dict(failed=": ".join([why, *said[-1:]]), lost=True)
        if "lost" in answer:
            self.end()
        return answer

    def end(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def compare(row, settings, ours, theirs, due, until):
    """A row with what both sides measured, in turns; whatever it costs, all is over at `until`.

    Adds about, what our side says of the row; ours, a value for each round; peers, {name: values}; wrong and
    notes, what failed on our side and on the peer's. Where torch must compile first, it does not begin so
    late that it would not be done at `due`.
    """
    result = row | dict(about={}, ours=[], peers={}, wrong=[], notes=[])
    sides, compiles = [ours], row["kind"] == "training"
    if row["peer"] and theirs and compiles and due - time.monotonic() < COMPILING:
        result["notes"].append("no time was left for torch to compile")
    elif row["peer"] and theirs:
        sides.append(theirs)
    for side in sides:
        side.ask(do="open", kind=row["kind"], sizes=row["sizes"], version=row.get("version"))
    named = []
    for side in sides:
        left = until - time.monotonic()
        about = side.answer(left if compiles else min(settings["limit"], left))
        result["about" if side is ours else "about_peer"] = about
        failures = result["wrong" if side is ours else "notes"]
        failures += [about["failed"]] if "failed" in about else about.get("failures", [])
        named += [(side, name) for name in about.get("timers", ())]
    rounds = 1 if row["kind"] in ("steps", "curve") else settings["rounds"]
    warm = rounds > 1 and not compiles  # a round that does not count; training warms up by itself
    for turn in range(-warm, rounds):
        for side, name in list(named):
            side.ask(do="time", name=name)
            answer = side.answer(min(settings["limit"], until - time.monotonic()))
            if "failed" in answer:
                named = [pair for pair in named if pair[0] is not side]  # its arrays are gone
                result["wrong" if side is ours else "notes"].append(f"{name}: {answer['failed']}")
            elif turn >= 0:
                values = result["ours"] if name == "ours" else result["peers"].setdefault(name, [])
                values.append(answer["value"])
    for side in sides:
        if side.process:
            side.ask(do="close")
            side.answer(settings["limit"])
    return result


def first_step(row, settings, command, until):
    """The row with the seconds from a process's start to the end of its first step: no kernel is compiled."""
    environment = bench.OUR_PATH | {"CUPY_CACHE_DIR": str(Path(settings["folder"]) / "cupy")}
    side, began = Side(command, environment), time.monotonic()
    side.ask(do="open", kind=row["kind"], sizes=row["sizes"], version=None)
    about = side.answer(min(settings["limit"], until - began))
    spent = time.monotonic() - began
    side.end()
    failed = [about["failed"]] if "failed" in about else []
    return row | dict(about=about, ours=[] if failed else [spent], peers={}, wrong=failed, notes=[])


def text_batches(B, T, steps):
    """(steps, B, T + 1) bytes of our own source files, in random windows: text, always at hand."""
    files = sorted([*HERE.parent.glob("*.py"), *HERE.parent.glob("kernels/*.*"), *HERE.glob("*.py")])
    text = b"".join(path.read_bytes() for path in files if path != RESULTS)
    starts = np.random.default_rng(0).integers(len(text) - T - 1, size=(steps, B, 1))
    return np.frombuffer(text, np.uint8)[starts + np.arange(T + 1)].astype(np.int32)


# ------------------------------------------------------------------------------------------------------------
# The report


def table(head, rows, text=(0,)):
    """A Markdown table that reads well as it is; these columns are text, the others are numbers."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    sides = [str.ljust if i in text else str.rjust for i in range(len(head))]
    lines = [" | ".join(side(cell, w) for side, cell, w in zip(sides, row, widths)) for row in cells]
    rule = "|".join("-" * (w + 2) if i in text else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:]), ""])


def seconds(row):
    """The median of ours, or None."""
    return statistics.median(row["ours"]) if row["ours"] else None


def spread(values):
    """The least and the largest of some seconds, in µs."""
    return f"{min(values) * 1e6:.1f}–{max(values) * 1e6:.1f} µs" if len(values) > 1 else ""


def peer(row):
    """(name, median seconds) of the fastest peer, or (None, None)."""
    medians = {name: statistics.median(values) for name, values in row["peers"].items() if values}
    best = min(medians, key=medians.get, default=None)
    return best, medians.get(best)


def ratios(row):
    """The fastest peer's time over ours: median, least and largest of the rounds; None without a peer."""
    name, _ = peer(row)
    both = [theirs / ours for ours, theirs in zip(row["ours"], row["peers"].get(name, ()))]
    return (statistics.median(both), min(both), max(both)) if both else None


class Report:
    """What was measured, {section: rows}, and how it reads."""

    def __init__(self, card):
        self.card, self.rows, self.spent = card, {}, {}  # rows and seconds of each section
        self.peak = next((peak for name, peak in PEAKS.items() if name in card["card"]), None)  # TFLOP/s

    def of(self, section, kind=None, **sizes):
        """The rows of a section that were measured: those of a kind, and of these sizes."""
        return [
            row
            for row in self.rows.get(section, ())
            if row["ours"] and kind in (None, row["kind"]) and sizes.items() <= row["sizes"].items()
        ]

    # -- what the shares are of

    def copy(self):
        """(bytes/s, name) of the fastest copy, read and written."""
        rates = [
            (row["about"]["moved"] / statistics.median(values), name)
            for row in self.of("ceilings", "copy")
            for name, values in {"our kernel": row["ours"], **row["peers"]}.items()
            if values
        ]
        return max(rates, default=(None, ""))

    def product(self):
        """FLOP/s of the faster large matmul, ours or cuBLAS's."""
        for row in self.of("ceilings", "matmul"):
            return row["about"]["flops"] / min(filter(None, (seconds(row), peer(row)[1])))
        return None

    # -- sections

    def kernels(self, section):
        """A line for every kernel. The share is of the datasheet's matrix peak, or of the measured copy."""
        rows, plain, peak = [], {}, (self.peak or 0) * 1e12 or self.product()
        for row in self.rows[section]:
            sizes = " ".join(f"{name} {value:,}" for name, value in row["sizes"].items())
            work = f"{row['work']}: {row['version']}" if "version" in row else row["work"]
            spent, about = seconds(row), row["about"]
            if spent is None:
                rows.append((work, sizes, "failed" if row["wrong"] else "no time", *[""] * 7))
                continue
            rate, top = (about["flops"] or about["moved"]) / spent, peak if about["flops"] else self.copy()[0]
            shown = f"{rate / 1e12:.0f} TFLOP/s" if about["flops"] else f"{rate / 1e9:.0f} GB/s"
            share = f"{rate / top:.0%}" if top else ""
            beside, (name, theirs), ratio = ["", "", spread(row["ours"])], peer(row), ratios(row)
            if theirs:
                named = "" if name == "torch" else f"{name} "
                beside = f"{named}{theirs * 1e6:.1f}", f"{ratio[0]:.2f}", f"{ratio[1]:.2f}–{ratio[2]:.2f}"
            elif row["work"].partition(" + ")[0] in plain and "version" not in row:
                beside[1] = f"plain × {spent / plain[row['work'].partition(' + ')[0]]:.2f}"
            plain[row["work"]] = spent
            error = "" if about.get("error") is None else f"{about['error']:.1e}"
            about = about.get("kernel", "")
            rows.append((work, sizes, f"{spent * 1e6:.1f}", shown, share, *beside, error, about))
        head = "work", "sizes", "µs", "rate", "share", "torch µs", "torch / ours", "rounds", "error", "kernel"
        return table(head, rows, text=(0, 1, 9))

    def ceilings(self):
        text = self.kernels("ceilings")
        rate, name = self.copy()
        if rate:
            text += f"\nThe copy that shares are of: {rate / 1e9:.0f} GB/s, read and written, by {name}. "
        if self.product():
            text += f"The matmul that floors are of: {self.product() / 1e12:.0f} TFLOP/s"
            text += f"; the datasheet says {self.peak}.\n" if self.peak else ".\n"
        return text

    def training(self):
        rows = []
        for row in self.rows["training"]:
            B, T = row["sizes"]["B"], row["sizes"]["T"]
            work, spent, theirs, ratio = f"{row['work']}, {B} × {T}", seconds(row), peer(row)[1], ratios(row)
            if not spent:
                rows.append((work, "failed" if row["wrong"] else "no time", *[""] * 5))
                continue
            share = row["about"]["flops"] / spent / 1e12 / self.peak if self.peak else None
            rows.append(
                (work, f"{spent * 1e3:.2f}", f"{B * T / spent:,.0f}", f"{share:.1%}" if share else "")
            )
            if theirs:
                rates = f"{B * T / theirs:,.0f}", f"{ratio[0]:.2f}", f"{ratio[1]:.2f}–{ratio[2]:.2f}"
            rows[-1] += rates if theirs else ("", "", "")
        head = "model and batch", "ms a step", "tok/s", "MFU (datasheet)", "torch.compile tok/s"
        return table((*head, "ours / torch", "rounds"), rows)

    def steps(self):
        """Where the time of a training step goes: operations, their kernels, and what each could not beat."""
        if not self.of("steps"):
            return "Not measured.\n"
        row, ((copied, _), product) = self.of("steps")[0], (self.copy(), self.product())
        (found,), rows = row["ours"], []
        step, left = found["step"], found["step"]
        for part in sorted(found["operations"], key=lambda part: -part["seconds"]):
            spent, left = part["seconds"], left - part["seconds"]
            floor = max(part["flops"] / product, part["moved"] / copied) if product and copied else None
            bound = [f"{floor * 1e3:.2f}", f"{(spent - floor) * 1e3:.2f}"] if floor else ["", ""]
            rows.append((part["label"], part["calls"], f"{spent * 1e3:.2f}", f"{spent / step:.1%}", *bound))
            if len(part["kernels"]) > 1:
                for name, calls, spent in part["kernels"]:
                    rows.append((f"· {name}", calls, f"{spent * 1e3:.2f}", f"{spent / step:.1%}", "", ""))
        rows.append(("not accounted: launches, gaps", "", f"{left * 1e3:.2f}", f"{left / step:.1%}", "", ""))
        rows.append(("the step", "", f"{step * 1e3:.2f}", "100.0%", "", ""))
        text = (
            f"A step of d12, {row['sizes']['B']} × {row['sizes']['T']}, by events around every launch. The "
        )
        text += "floor is the larger of FLOP over the matmul's rate and bytes over the copy's.\n\n"
        return text + table(("operation", "calls", "ms", "share", "floor ms", "gap ms"), rows)

    def start(self):
        """Of a process, from its start to the end of a step of d12, with an empty cache of kernels."""
        (row,) = self.rows["start"]
        text = f"{row['ours'][0]:.1f} s" if row["ours"] else "not measured"
        return f"First step of d12 in bf16, {row['sizes']['B']} × {row['sizes']['T']}, a process: {text}.\n"

    def curve(self):
        """Losses on the same batches, from the same weights."""
        if not self.of("curve"):
            return "Not measured.\n"
        (row,) = self.of("curve")
        columns = [row["ours"][0], *(losses for (losses,) in row["peers"].values())]
        n = len(columns[0])
        picked = sorted({*range(0, n, max(1, n // 10)), n - 1})
        rows = [(step + 1, *(f"{losses[step]:.4f}" for losses in columns)) for step in picked]
        text = table(("step", "ours", "torch")[: 1 + len(columns)], rows)
        if len(columns) > 1:
            apart = np.abs(np.subtract(*columns))
            text += f"\nApart by {apart.mean():.4f} in the mean, {apart.max():.4f} at most, "
            text += f"{apart[-n // 4 :].mean():.4f} in the last quarter.\n"
        return text

    # -- targets

    def found(self):
        """{target: (value, of which row)} for what was measured."""
        found = {}
        for model in ("124M", "1558M"):
            of = {row["work"]: ratios(row)[0] for row in self.of("matmul") if ratios(row)}
            of = {work: ratio for work, ratio in of.items() if work.startswith(f"{model} ")}
            if of:
                worst, mean = min(of, key=of.get), math.exp(sum(map(math.log, of.values())) / len(of))
                found[f"{model} matmuls, cuBLAS's time over ours, geometric mean"] = mean, f"of {len(of)}"
                found[f"{model} matmuls, the least"] = of[worst], worst
        for kind in ("forward", "backward"):
            for row in self.of("attention", f"attention_{kind}")[:1]:
                if ratios(row):
                    found[f"attention {kind}, the best SDPA's time over ours"] = ratios(row)[0], peer(row)[0]
        if self.copy()[0]:
            shares = {
                r["work"]: r["about"]["moved"] / seconds(r) / self.copy()[0] for r in self.of("bandwidth")
            }
            if "encoder backward" in shares:
                found["encoder backward, share of the copy"] = shares.pop("encoder backward"), ""
            if shares:
                worst = min(shares, key=shares.get)
                found["bandwidth kernels, the least share of the copy"] = shares[worst], worst
        for row in self.of("decoding", "attention_decode", B=64) if "H200" in self.card["card"] else ():
            found["decode attention of 64 × 1024 on an H200, µs"] = seconds(row) * 1e6, ""
        for B, what in ((1, "one sequence"), (64, "64 sequences")):
            for row in self.of("decoding", "decode", B=B, overlap=True):
                found[f"decoding {what}, µs a step"] = seconds(row) * 1e6, ""
        rates = {}
        for row in self.of("training"):
            tokens = row["sizes"]["B"] * row["sizes"]["T"]
            if row["work"] == "tiny":
                found["tiny training, ms a step"] = seconds(row) * 1e3, ""
            else:
                rates.setdefault("ours", {})[row["sizes"]["B"]] = tokens / seconds(row)
                if peer(row)[1]:
                    rates.setdefault("torch", {})[row["sizes"]["B"]] = tokens / peer(row)[1]
        if rates:
            best = {side: max(of, key=of.get) for side, of in rates.items()}
            where = f"micro-batch {best['ours']}"
            found["d12 training, thousand tok/s"] = rates["ours"][best["ours"]] / 1e3, where
            if "torch" in rates:
                ratio = rates["ours"][best["ours"]] / rates["torch"][best["torch"]]
                found["d12 training, tok/s over torch.compile's"] = ratio, f"{where}, torch's {best['torch']}"
        for row in self.of("start"):
            found["first step with no kernel compiled, s"] = row["ours"][0], ""
        return found

    def targets(self):
        rows, found = [], self.found()
        for what, (relation, *bounds) in TARGETS.items():
            must, aim = (
                next((value for name, value in bound.items() if name in self.card["card"]), None)
                if isinstance(bound, dict)
                else bound
                for bound in bounds
            )
            value, where = found.get(what, (None, ""))
            verdict = "not measured" if value is None else ""
            if value is not None and must is not None:
                sign = 1 if relation == "≥" else -1
                if sign * value >= sign * aim:
                    verdict = "aim reached"
                else:
                    verdict = "pass" if sign * value >= sign * must else "below"
            held = ["", ""] if must is None else [f"{relation} {must:g}", f"{relation} {aim:g}"]
            rows.append((what, "" if value is None else f"{value:.4g}", *held, verdict, where))
        return table(("target", "measured", "must", "aim", "verdict", "where"), rows, text=(0, 4, 5))

    # -- the page

    def section(self, name):
        try:
            text = self.kernels(name) if name in KERNELS[1:] else getattr(self, name)()
        except Exception as error:  # the measurements count, and --out keeps them
            text = f"This section cannot be shown: {type(error).__name__}: {error}\n"
        spent = f"\nMeasured in {self.spent[name]:.0f} s.\n" if name in self.spent else ""
        note = f"{NOTES[name]}\n\n" if name in NOTES else ""
        return f"## {name.capitalize()}\n\n{note}{text}{spent}"

    def failures(self, which):
        """What failed on our side ("wrong") or on torch's ("notes")."""
        return [
            f"{section}, {row['work']} {row.get('version', '')}: {why}"
            for section, rows in self.rows.items()
            for row in rows
            for why in row[which]
        ]

    def about(self):
        return {
            name: value for name, value in self.card.items() if name not in ("logits", "versions", "timers")
        }

    def whole(self):
        """The page."""
        text = "# Measured on a GPU\n\nBy `python tests/bench_gpu.py --write`; bench_gpu.py says how.\n\n"
        text += "\n".join(f"- {name}: {value}" for name, value in self.about().items())
        text += f"\n\n## Targets\n\n{self.targets()}\n"
        text += "\n".join(self.section(name) for name in self.rows)
        said = self.failures("wrong") + self.failures("notes")
        if said:
            text += "\n## What failed, or had no time\n\n" + "\n".join(f"- {line}" for line in said) + "\n"
        return text

    def write(self, flags):
        if flags.out or flags.write:
            path = Path(flags.out or RESULTS)
            _, marker, by_hand = (path.read_text("utf-8") if path.exists() else "").partition(BY_HAND)
            path.write_text(self.whole() + marker + by_hand, "utf-8")
        if flags.out:
            Path(flags.out).with_suffix(".json").write_text(json.dumps(self.rows, indent=1), "utf-8")


# ------------------------------------------------------------------------------------------------------------


def share(section, later, left):
    """Seconds of `left` for a section: all that the later ones do not need, or its part of too few."""
    rest = sum(NEEDS[name] for name in later)
    return max(left - rest, left * NEEDS[section] / (NEEDS[section] + rest))


def parser():
    flags = common.Parser(prog="bench_gpu.py", description=__doc__)
    flags.add_argument("--only", metavar="SECTION,...", help=f"of {', '.join(SECTIONS)}")
    limit = common.number(float, above=0)
    flags.add_argument("--seconds", type=limit, default=BUDGET, metavar="N", help="for all of it")
    words = "a Python with torch; if not given this one, or $PEER_PYTHON"
    flags.add_argument("--peer-python", metavar="PATH", help=words)
    flags.add_argument("--write", action="store_true", help="write kernels/RESULTS.md")
    words = "write this file instead, and every round into another that ends in .json"
    flags.add_argument("--out", metavar="FILE", help=words)
    flags.add_argument("--emulator", action="store_true", help="tiny sizes on the CPU: a test of this script")
    return flags


def main(argv=None):
    began, flags = time.monotonic(), parser().parse_args(argv)
    sections = flags.only.split(",") if flags.only else list(SECTIONS)
    for section in sections:
        if section not in SECTIONS:
            raise common.UserError(f"--only {section}: no such section; choose from {', '.join(SECTIONS)}")
    if flags.write and flags.emulator:
        raise common.UserError("--write is for what a GPU measured; leave out --emulator, or use --out")
    if "ceilings" not in sections:
        sections = ["ceilings", *sections]  # shares and floors are of them
    settings, until = (TINY, began + 1e6) if flags.emulator else (D12, began + flags.seconds)

    def script(side):
        return [HERE / f"bench_gpu_{side}.py", "emulator" if flags.emulator else "gpu"]

    about = dict(do="open", kind="card", sizes={}, version=None)
    sides = [Side([sys.executable, *script("ours")], bench.OUR_PATH)]
    try:
        sides[0].ask(**about)
        python = None if flags.emulator and not flags.peer_python else bench.peer_python(flags.peer_python)
        if python:
            sides.append(Side([python, *script("peers")]))
            sides[1].ask(**about)
        card, *torch = (side.answer(settings["limit"]) for side in sides)
        if "failed" in card:
            raise common.UserError(card["failed"].partition(": ")[2] or card["failed"])
        card["memory"] = common.size(card["memory"])
        card["date"] = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
        card["torch"] = torch[0].get("torch", torch[0].get("failed")) if torch else "none, see --peer-python"
        theirs = sides[1] if torch and "torch" in torch[0] else None
        report = Report(card)
        print(*(f"{name:12}{value}" for name, value in report.about().items()), sep="\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            measure(report, sections, settings | dict(folder=folder), sides[0], theirs, until, flags)
    finally:
        for side in sides:
            side.end()
    print(f"\n## Targets\n\n{report.targets()}")
    wrong, notes = report.failures("wrong"), report.failures("notes")
    if wrong or notes:
        common.say("\n".join(["failed, or had no time:", *wrong, *notes]))
    if wrong:
        sys.exit(1)


def measure(report, sections, settings, ours, theirs, until, flags):
    """Measure the rows of the sections. The report is written after each row, printed after each section."""
    batches = text_batches(**settings["curve"], T=settings["T"])
    np.save(Path(settings["folder"]) / "batches.npy", batches)
    for i, section in enumerate(sections):
        began = time.monotonic()
        due = until - LEAST
        if section != "ceilings":  # what the others are shares of is measured in any case
            due = min(due, began + share(section, sections[i + 1 :], until - began))
        report.rows[section] = []
        for row in SECTIONS[section](settings, report.card):
            if time.monotonic() > due:
                nothing = dict(about={}, ours=[], peers={}, wrong=[], notes=["no time was left"])
                report.rows[section].append(row | nothing)
            elif row["kind"] == "first_step":
                report.rows[section].append(first_step(row, settings, ours.command, until))
            else:
                report.rows[section].append(compare(row, settings, ours, theirs, due, until))
            report.write(flags)
        report.spent[section] = time.monotonic() - began
        report.write(flags)
        print(f"\n{report.section(section)}", end="", flush=True)


if __name__ == "__main__":
    common.run(main)
