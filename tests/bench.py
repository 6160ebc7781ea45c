"""Speed, memory and quality beside PyTorch: what `make bench` prints.

    python tests/bench.py                       the whole table: ten minutes, 10 GB of memory with a peer
    python tests/bench.py --only nano,decode-1  some rows of it
    python tests/bench.py --profile             where the time of a 124M step goes, operation by operation

Every row has two processes of its own, bench_ours.py and, in a Python that has torch, bench_peers.py. They
take turns, ours, peer, ours, peer, so that whatever else the machine does hits both; medians are shown.
"""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402

ROWS = {  # name: (work, unit, turns, what is held to the target, how, the target)
    "step-4x64": ("training step, 124M, 4 × 64 tokens, fp32", "s", 7, "ratio", "≤", 1.0),
    "step-1x1024": ("training step, 124M, 1 × 1024", "s", 3, "ratio", "≤", 1.0),
    "nano": ("nanoGPT's CPU recipe (4 layers, 128 wide, 12 × 64)", "tok/s", 9, "ratio", "≥", 1.2),
    "decode-1": ("decoding, 124M, one sequence", "tok/s", 5, "ratio", "≥", 1.2),
    "decode-8": ("decoding, 124M, eight", "tok/s", 5, "ratio", "≥", 1.2),
    "sample-64": ("sampling, 4 layers, 128 wide, 64 rows", "tok/s", 5, "ratio", "≥", 1.2),
    "shakespeare": ("Shakespeare, 100 s of training", "bits/byte", 1, "ours", "≤", 2.4),
    "memory": ("resident memory of the step of 1 × 1024", "GB", 1, "ours", "≤", 4.5),
}
OURS, OUR_PATH = [sys.executable, HERE / "bench_ours.py"], {**os.environ, "PYTHONPATH": str(HERE.parent)}
LAYOUT = "{:52}{:>16}{:>16}{:>8}   {:16}{}"


class Side:
    """A process that measures when asked. Where it cannot, `why` says so."""

    def __init__(self, command, environment=None):
        self.values, self.why, self.log = [], "", tempfile.TemporaryFile("w+", errors="replace")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.process = command and subprocess.Popen(command, **pipes, env=environment)

    def ask(self):
        """Measure once more."""
        if not self.process:
            return
        time.sleep(0.3)  # until the other side's threads no longer spin, waiting for work
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            self.values.append(json.loads(self.process.stdout.readline()))
        except (OSError, ValueError):
            self.process.wait()
            self.why, self.process = (self.said() or ["it ended without a word"])[-1], None

    def said(self):
        self.log.seek(0)
        return [line.strip() for line in self.log if line.strip()]

    def end(self):
        if self.process:
            self.process.communicate()

    def median(self):
        known = [value for value in self.values if value is not None]
        return statistics.median(known) if known else None


def sides(row, peer, *arguments):
    """Our process for a row, and the peer's."""
    theirs = Side(peer and [peer, HERE / "bench_peers.py", row, *arguments])
    return Side([*OURS, row, *arguments], OUR_PATH), theirs


def compare(row, peer, limit, quick):
    """Let both sides of a row take turns; return what came out."""
    work, unit, turns, held, relation, target = ROWS[row]
    with tempfile.TemporaryDirectory() as folder:
        both = ours, theirs = sides(row, peer, folder, limit)
        for turn in range(1 + min(turns, 2 if quick else turns) if turns > 1 else 1):
            for side in both:
                side.ask()
            if turn == 0 and turns > 1:  # that was to warm up
                ours.values, theirs.values = [], []
        for name, side in (("ours", ours), ("peer", theirs)):
            side.end()
            note = side.why or (row == "shakespeare" and "".join(side.said()[-1:]))
            if note:
                common.say(f"({row}, {name}: {note})")
    result = dict(row=row, work=work, unit=unit, ours=ours.median(), peer=theirs.median(), ratio=None)
    if None not in (result["ours"], result["peer"]):
        result["ratio"] = result["ours"] / result["peer"]
    value = result[held]
    result["target"] = f"{relation} {target} {'× peer' if held == 'ratio' else unit}"
    result["passed"] = None if value is None else value <= target if relation == "≤" else value >= target
    if row == "shakespeare" and limit != "100":
        result |= dict(work=work.replace("100", limit), passed=None)  # the target is for 100 s
    return result | dict(every_ours=ours.values, every_peer=theirs.values)


def peer_python(given):
    """The Python that has torch: --peer-python, this one, or $PEER_PYTHON; None if there is none."""
    for python in [given] if given else [sys.executable, os.environ.get("PEER_PYTHON")]:
        try:
            if python and subprocess.call([python, "-c", "import torch"], stderr=subprocess.DEVNULL) == 0:
                return python
        except OSError as error:
            raise common.UserError(f"{python} cannot be run: {error.strerror}; name a Python") from None
    if given:
        raise common.UserError(f"{given} has no torch; name a Python that has it, or none")
    return None


def machine(peer):
    """What runs on what."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    busy = f", load {os.getloadavg()[0]:.1f} before we began" if hasattr(os, "getloadavg") else ""
    versions = []
    for side in sides("versions", peer, "", ""):
        side.ask()
        side.end()
        versions += side.values or [side.why or "not measured: no torch; see --peer-python"]
    return {
        "machine": f"{name}, {cores} cores{busy}; {platform.system()} {platform.release()}",
        "ours": versions[0],
        "peer": versions[1],
        "date": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    }


def shown(value, unit):
    if value is None:
        return "not measured"
    return f"{common.count(value) if unit == 'tok/s' else format(value, '.2f')} {unit}"


def parser():
    flags = common.Parser(prog="bench.py", description=__doc__)
    flags.add_argument("--only", metavar="ROW,...", help=f"of {', '.join(ROWS)}")
    words = "a Python with torch and transformers; if not given this one, or $PEER_PYTHON"
    flags.add_argument("--peer-python", metavar="PATH", help=words)
    flags.add_argument("--quick", action="store_true", help="two turns, 10 s of Shakespeare: a rough idea")
    flags.add_argument("--json", action="store_true", help="one JSON object, with every measurement")
    flags.add_argument("--profile", action="store_true", help="instead: where the time of a 124M step goes")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    rows = flags.only.split(",") if flags.only else list(ROWS)
    for row in rows:
        if row not in ROWS:
            raise common.UserError(f"--only {row}: there is no such row; choose from {', '.join(ROWS)}")
    if flags.profile:
        sys.exit(subprocess.call([*OURS, "profile"], env=OUR_PATH))
    peer, limit = peer_python(flags.peer_python), "10" if flags.quick else "100"
    about, results = machine(peer), []
    if not flags.json:
        print(*(f"{name:9}{value}" for name, value in about.items()), sep="\n", end="\n\n")
        print(LAYOUT.format("work", "ours", "peer", "ratio", "target", ""), flush=True)
    for row in rows:
        result = compare(row, peer, limit, flags.quick)
        results.append(result)
        if not flags.json:
            numbers = [shown(result[side], result["unit"]) for side in ("ours", "peer")]
            ratio = f"{result['ratio']:.2f}" if result["ratio"] else ""
            passed = {True: "pass", False: "below", None: ""}[result["passed"]]
            print(LAYOUT.format(result["work"], *numbers, ratio, result["target"], passed), flush=True)
    if flags.json:
        print(json.dumps(dict(machine=about, rows=results), indent=1))


if __name__ == "__main__":
    common.run(main)
