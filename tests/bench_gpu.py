"""Speed on a GPU beside PyTorch, every kernel and every rung of it: the second half of `make gpu-check`.

    python tests/bench_gpu.py                     prints what --write puts into kernels/RESULTS.md
    python tests/bench_gpu.py --only attention    a section of it
    python tests/bench_gpu.py --quick --emulator  without a GPU, tiny: shows that it runs, measures nothing

Each section is a process of bench_gpu_ours.py, and then one of bench_gpu_peers.py where a Python has torch:
one that crashes, or takes too long, leaves the others' results, and all end after five minutes, with the slow
rungs last. The ceilings are measured on the same card in the same run; kernels are timed by events, replayed
from a graph, on arrays that take turns.
"""

import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import bench
import numpy as np

import console  # isort: skip  (bench.py says where it is)

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "kernels" / "RESULTS.md"
KERNELS = ("matmul", "attention", "bandwidth", "decoding")
SECTIONS = ("ceilings", *KERNELS, "training", "curve")
# Seconds that a section may take, ours and the peer's: a half more than is expected of an H200 where a row is
# one or two seconds (0.5 NVRTC, the reference on the host, 0.2 the clock) and a process starts in four: 28
# rows of matmul, then 8, 25 and 9. BUDGET is for all sections; the peer gets what ours will not need.
LIMITS = dict(ceilings=(15, 20), matmul=(55, 20), attention=(37, 15), bandwidth=(48, 20), decoding=(28, 15))
LIMITS |= dict(training=(60, 80), curve=(35, 45))
BUDGET, LEAST = 300, 5  # of gpu-check's 480; and what is too little to begin with
PEAKS = {"H200": 989.5, "H100": 989.5, "A100": 312}  # TFLOP/s, bf16 without sparsity; datasheets, SXM

D12 = dict(B=16, T=1024, C=768, NH=12, L=12, V=50304, parameters=124_475_904, copy_bytes=1 << 30)
D12 |= dict(R=5336, batches=[16, 64, 4, 32, 8], steps=20, curve_steps=200)  # R: rows of a chunk of logits
QUICK = dict(batches=[16, 64], curve_steps=50)
TINY = dict(B=2, T=32, C=128, NH=2, L=1, V=256, parameters=4096, copy_bytes=1 << 16)
TINY |= dict(R=48, batches=[2], steps=1, curve_steps=3)


# ------------------------------------------------------------------------------------------------------------
# The measurements


def ours(section, settings, folder=""):
    """The command for a section of ours."""
    return [sys.executable, HERE / "bench_gpu_ours.py", section, json.dumps(settings), str(folder)]


def run(command, limit, environment=None):
    """The objects that a process printed, a line each, and what went wrong, or None."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=out, stderr=log, env=environment)
        try:
            status = process.wait(limit)
            why = None if status == 0 else f"status {status}"
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit} s"
        finally:
            process.kill()
            process.wait()
        out.seek(0), log.seek(0)
        rows = [json.loads(line) for line in out if line.startswith(b"{") and line.endswith(b"}\n")]
        said = log.read().decode(errors="replace").strip().splitlines()
    return rows, why and ": ".join([why, *said[-1:]])


def measure(section, settings, peer, folder, until, later=()):
    """The rows of a section, ours and the peer's, and what went wrong, ours and the peer's.

    All is over at time.monotonic() == until, and the peer in time for ours of the sections that come later.
    """
    rows, wrong, slow = ([], []), ([], []), 20 if settings["emulator"] else 1
    reserve = 0, sum(LIMITS[name][0] for name in later)
    if section == "curve":
        np.save(folder / "batches.npy", text_batches(settings["curve_steps"], settings["B"], settings["T"]))
    for side, python, environment in ((0, sys.executable, bench.OUR_PATH), (1, peer, None)):
        if not python:
            continue
        script, what = HERE / f"bench_gpu_{('ours', 'peers')[side]}.py", ("", "peer, ")[side]
        limit = min(LIMITS[section][side] * slow, until - reserve[side] - time.monotonic())
        if limit < LEAST:
            wrong[side].append(f"{what}{section}: no time was left")
            continue
        arguments = section, json.dumps(settings | dict(seconds=limit)), str(folder)
        found, why = run([python, script, *arguments], limit, environment)
        rows[side].extend(found)
        wrong[side].extend([f"{what}{section}: {why}"] if why else [])
        for row in found:
            if "failed" in row:
                which = row.get("rung") or row.get("batch") or ""
                wrong[side].append(f"{what}{row['work']} {which}: {row['failed']}")
            elif "skipped" in row:  # one rung less in the table
                wrong[1].append(f"{what}{row['work']} {row.get('rung', '')}: {row['skipped']}")
    return *rows, *wrong


def text_batches(steps, B, T):
    """(steps, B, T + 1) bytes of our own source files, in random windows: text, always at hand."""
    files = sorted([*HERE.parent.glob("*.py"), *HERE.parent.glob("kernels/*.*"), *HERE.glob("*.py")])
    text = b"".join(path.read_bytes() for path in files if path != RESULTS)
    starts = np.random.default_rng(0).integers(len(text) - T - 1, size=(steps, B, 1))
    return np.frombuffer(text, np.uint8)[starts + np.arange(T + 1)].astype(np.int32)


# ------------------------------------------------------------------------------------------------------------
# The report


def table(head, rows):
    """A Markdown table that reads well as it is; the first column is text, the others are numbers."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in cells
    ]
    rule = "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:]), ""])


class Report:
    """What was measured, and how it reads."""

    def __init__(self, card, settings):
        self.card, self.settings, self.parts = card, settings, []
        self.failures, self.notes = [], []  # ours, which count; and the peer's
        self.peak = next((peak for name, peak in PEAKS.items() if name in card["card"]), None)  # TFLOP/s
        self.copy = self.cublas = None  # bytes/s and FLOP/s, measured
        self.targets = []  # (what, value as text, whether it passed)

    def add(self, section, ours, peers):
        """The text of a section."""
        text = getattr(self, section if section not in KERNELS else "kernels")(ours, peers)
        self.parts.append(f"## {section.capitalize()}\n\n{text}")
        return self.parts[-1]

    def ceilings(self, ours, peers):
        n, rows = next((row["n"] for row in peers if "n" in row), 0), []
        for row in ours + peers:
            if row["work"] == "copy" and "seconds" in row:
                self.copy = row["moved"] / row["seconds"]
                what = f"copy of {console.size(row['moved'] // 2)}, read and written"
                rows.append((what, f"{self.copy / 1e9:.0f} GB/s"))
            if row["work"] == "cuBLAS" and "seconds" in row:
                self.cublas = 2 * n**3 / row["seconds"]
                rows.append((f"cuBLAS, {n}³, bf16, random numbers", f"{self.cublas / 1e12:.0f} TFLOP/s"))
            if "versions" in row:
                self.card["peer"] = row["versions"]
        if self.peak:
            rows.append(("datasheet, bf16", f"{self.peak} TFLOP/s"))
        return table(("ceiling", "rate"), rows)

    def kernels(self, ours, peers):
        """Every kernel and rung. The share is of the matrix peak, or of the measured copy."""
        theirs = {row["work"]: row["seconds"] for row in peers if "seconds" in row}
        peak, rows, ratios, shares = (self.peak or 0) * 1e12 or self.cublas, [], {}, {}
        works = list(dict.fromkeys(row["work"] for row in ours))
        for row in sorted(ours, key=lambda row: works.index(row["work"])):  # the rungs were measured last
            work, rung, spent = row["work"], row["rung"], row.get("seconds")
            if spent is None:
                rows.append((work, rung, "failed" if "failed" in row else "skipped", "", "", "", "", ""))
                continue
            if rung == "chosen" and row["kernel"].startswith("matmul"):  # which tile: 128 128 64 64 64 3
                rung = "chosen: " + " ".join(re.findall(r"\b\d+\b", row["kernel"]))
            chosen = rung.startswith("chosen")
            rate, top = (row["flops"] or row["moved"]) / spent, peak if row["flops"] else self.copy
            shown = f"{rate / 1e12:.1f} TFLOP/s" if row["flops"] else f"{rate / 1e9:.0f} GB/s"
            peer, ratio = theirs.get(work), theirs[work] / spent if work in theirs else None
            beside = (f"{peer * 1e6:.1f}", f"{ratio:.2f}") if peer else ("", "")
            share, error = f"{rate / top:.0%}" if top else "", row["error"]
            error = "" if error is None else f"{error:.1e}"
            rows.append((work, rung, f"{spent * 1e6:.1f}", shown, share, *beside, error))
            if chosen and work.startswith("matmul") and ratio:
                ratios[work] = ratio
            elif chosen and work.startswith("attention"):
                goal = 200 if "forward" in work else 130
                self.target(f"{work} ≥ {goal} TFLOP/s", f"{rate / 1e12:.0f}", rate >= goal * 1e12)
            elif chosen and not row["flops"] and self.copy and "×" not in work:
                shares[work] = rate / self.copy
        for what, goal, found in (("cuBLAS", 0.6, ratios), ("the copy", 0.85, shares)):
            if found:
                worst = min(found, key=found.get)
                enough = sum(value >= goal for value in found.values())
                text = f"{enough} of {len(found)}; the least: {worst}, {found[worst]:.0%}"
                kind = "matmul" if found is ratios else "bandwidth kernels"
                self.target(f"{kind} ≥ {goal:.0%} of {what}", text, enough == len(found))
        head = "kernel", "rung", "µs", "rate", "share", "torch µs", "× torch", "error"
        return table(head, rows)

    def training(self, ours, peers):
        theirs = {row["batch"]: row for row in peers if row["work"] == "training"}
        T, rows, best = self.settings["T"], [], 0
        per_token = next((row["flops_per_token"] for row in ours if "flops_per_token" in row), 0)
        for row in sorted((row for row in ours if row["work"] == "training"), key=lambda row: row["batch"]):
            rate, peer = row.get("rate"), theirs.get(row["batch"], {}).get("rate")
            best = max(best, rate or 0)
            tops = (self.peak and self.peak * 1e12, self.cublas)
            shares = [f"{rate * per_token / top:.1%}" if rate and top else "" for top in tops]
            beside = (f"{peer:,.0f}", f"{rate / peer:.2f}" if rate else "") if peer else ("", "")
            rows.append((f"{row['batch']} × {T}", f"{rate:,.0f}" if rate else "failed", *shares, *beside))
        self.target("d12 ≥ 300,000 tok/s", f"{best:,.0f}", best >= 300_000)
        head = "batch", "tok/s", "MFU (datasheet)", "MFU (cuBLAS)", "torch tok/s", "× torch"
        text = table(head, rows)
        spent = [row for row in ours if row["work"] == "profile"]
        if spent:
            total = sum(row["seconds"] for row in spent)
            rate = lambda row: f"{row['flops'] / row['seconds'] / 1e12:.0f} TFLOP/s" if row["flops"] else ""
            parts = [
                (r["label"], r["calls"], f"{r['seconds'] * 1e3:.2f}", f"{r['seconds'] / total:.1%}", rate(r))
                for r in spent
            ]
            text += f"\nA step of {self.settings['B']} × {T}, each operation waited for:\n\n"
            text += table(("operation", "calls", "ms", "share", "rate"), parts)
        return text

    def curve(self, ours, peers):
        """Losses on the same batches, from the same weights."""
        (mine,), theirs = [r["losses"] for r in ours], [r["losses"] for r in peers][:1]
        steps = sorted({*range(0, len(mine), max(1, len(mine) // 10)), len(mine) - 1})
        columns = [mine, *theirs]
        rows = [(step + 1, *(f"{column[step]:.4f}" for column in columns)) for step in steps]
        text = table(("step", "ours", "torch")[: 1 + len(columns)], rows)
        if theirs:
            apart = np.abs(np.subtract(mine, theirs[0]))
            text += f"\nApart by {apart.mean():.4f} in the mean, {apart.max():.4f} at most, "
            text += f"{apart[-len(apart) // 4 :].mean():.4f} in the last quarter.\n"
        return text

    def target(self, what, value, passed):
        self.targets.append((what, value, "pass" if passed else "below"))

    def whole(self):
        """The page."""
        about = [f"- {name}: {value}" for name, value in self.card.items()]
        text = "# Measured on a GPU\n\nBy `python tests/bench_gpu.py --write`; bench_gpu.py says how.\n\n"
        text += "\n".join(about) + "\n\n## Targets\n\n"
        text += table(("target", "measured", "verdict"), self.targets) + "\n" + "\n".join(self.parts)
        if self.failures or self.notes:
            text += "\n## What failed\n\n" + "\n".join(f"- {x}" for x in self.failures + self.notes) + "\n"
        return text


# ------------------------------------------------------------------------------------------------------------


def parser():
    flags = console.Parser(prog="bench_gpu.py", description=__doc__)
    flags.add_argument("--only", metavar="SECTION,...", help=f"of {', '.join(SECTIONS)}")
    flags.add_argument("--quick", action="store_true", help="chosen rungs only, two batch sizes, 50 steps")
    words = "a Python with torch; if not given this one, or $PEER_PYTHON"
    flags.add_argument("--peer-python", metavar="PATH", help=words)
    flags.add_argument("--write", action="store_true", help="write kernels/RESULTS.md")
    flags.add_argument("--emulator", action="store_true", help="tiny sizes on the CPU: a test of this script")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    sections = flags.only.split(",") if flags.only else list(SECTIONS)
    for section in sections:
        if section not in SECTIONS:
            raise console.UserError(f"--only {section}: no such section; choose from {', '.join(SECTIONS)}")
    if flags.write and flags.emulator:
        raise console.UserError("--write is for what a GPU measured; leave out --emulator")
    settings = (TINY if flags.emulator else D12 | (QUICK if flags.quick else {})) | dict(quick=flags.quick)
    settings |= dict(emulator=flags.emulator, compile=not flags.emulator)
    (card, why), date = run(ours("card", settings), 60, bench.OUR_PATH), datetime.datetime.now().astimezone()
    if why:
        raise console.UserError(why.partition(": ")[2] or why)  # the last line that it said
    card = {name: value for name, value in card[0].items() if name != "work"}
    card |= dict(memory=console.size(card["memory"]), date=date.isoformat(" ", "minutes"))
    peer = None if flags.emulator and not flags.peer_python else bench.peer_python(flags.peer_python)
    report = Report(card, settings)
    print(*(f"{name:12}{value}" for name, value in card.items()), sep="\n", end="\n\n", flush=True)
    until = time.monotonic() + BUDGET * (20 if flags.emulator else 1)
    sections = sections if "ceilings" in sections else ["ceilings", *sections]
    with tempfile.TemporaryDirectory() as folder:
        for i, section in enumerate(sections):
            try:
                later = sections[i + 1 :]
                mine, theirs, failures, notes = measure(section, settings, peer, Path(folder), until, later)
                report.failures += failures
                report.notes += notes
                print(report.add(section, mine, theirs), flush=True)
            except Exception as error:  # the next section may work
                report.failures.append(f"{section}: {type(error).__name__}: {error}")
    print(table(("target", "measured", "verdict"), report.targets))
    if flags.write:
        RESULTS.write_text(report.whole(), "utf-8")
    if report.failures or report.notes:
        console.say("\n".join(["failed:", *report.failures, *report.notes]))
    if report.failures:
        sys.exit(1)


if __name__ == "__main__":
    console.run(main)
