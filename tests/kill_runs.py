"""Kill training runs at random moments, and see that nothing is lost:  python tests/kill_runs.py 100

Every run has two ranks, and is stopped or killed in one of WAYS after a random time. All ranks must have
ended 5 seconds later, with one line that says why. What --resume makes of the run must have the same bits as
a run that nobody disturbed. A run without a checkpoint begins anew, as its message says.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = """
    --n-layer 2 --n-head 2 --n-embd 64 --seq-len 32 --total-batch-tokens 256 --steps 120 --warmup-steps 5
    --eval-tokens 512 --eval-every 30 --sample-tokens 8 --sample-every 0 --save-every 8 --device cpu --ranks 2
"""
FLAGS = FLAGS.split()
RANK_0, RANK_1, ALL = "rank 0", "rank 1", "all ranks"
WAYS = [  # signal, to whom, exit status of rank 0
    (signal.SIGTERM, ALL, 143),
    (signal.SIGTERM, RANK_1, 143),
    (signal.SIGINT, ALL, 130),
    (signal.SIGKILL, RANK_1, 1),
    (signal.SIGKILL, RANK_0, -9),
    (signal.SIGTERM, RANK_0, 143),
]


def make_shards(place):
    """A data directory of made-up text."""
    rng, words = random.Random(0), ["a", "model", "reads", "the", "text", "and", "writes", "another"]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=100))}) for _ in range(40)]
    (place / "text.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, ROOT / "data.py", "text", place / "text.jsonl", "--out", place / "shards"]
    subprocess.run(
        [*command, "--tokenizer", "bytes", "--val-fraction", "0.1"], check=True, capture_output=True
    )
    return place / "shards"


def start(*flags):
    """train.py in a process group of its own, which may start ranks."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, ROOT / "train.py", *map(str, flags)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen(command, env=environment, **pipes)


def finish(*flags):
    """Run train.py to its end."""
    process = start(*flags)
    err = process.communicate()[1]
    assert process.returncode == 0, err


def undisturbed(place):
    """(shards, the last checkpoint of a run that nobody disturbs, seconds that its loop took)."""
    shards = make_shards(place)
    finish("--data", shards, *FLAGS, "--out", place / "undisturbed")
    events = (place / "undisturbed" / "log.jsonl").read_text().splitlines()
    seconds = sum(json.loads(line).get("seconds", 0) for line in events)
    return shards, place / "undisturbed" / "step_000120", seconds


def ranks_of(process):
    """The process ids of rank 0 and rank 1."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [process.pid, *map(int, children)]


def alive(pid):
    """Whether a process still runs: one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(run, shards, way, seconds):
    """Start a run and end it in this way, `seconds` after its loop has begun.

    Returns (status, seconds until all ranks had ended, the lines that are no progress, steps in its log).
    """
    name, whom, _ = way
    process = start("--data", shards, *FLAGS, "--out", run)
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and b'"step"' in log.read_bytes()):
        time.sleep(0.005)
    pids = ranks_of(process)
    time.sleep(seconds)
    began = time.monotonic()
    try:
        if whom == ALL:
            os.killpg(process.pid, name)
        else:
            os.kill(pids[whom == RANK_1], name)
    except ProcessLookupError:  # it has ended by itself
        pass
    err = process.communicate(timeout=60)[1]
    while any(map(alive, pids)):
        assert time.monotonic() - began < 60, "a rank is left behind"
        time.sleep(0.01)
    took = time.monotonic() - began
    lines = [line for line in err.splitlines() if line and not line.startswith("step ")]
    return process.returncode, took, lines, log.read_text().count('"event": "step"')


def check(way, status, took, lines):
    """AssertionError unless a run ended as it must."""
    name, whom, expected = way
    if any(line.startswith("done: ") for line in lines):  # the signal came in the last step, or later
        assert status in (0, expected, -name), (status, lines)  # -name: after Python's own end
        return
    assert took < 5, f"{took:.1f} s until all ranks had ended"
    assert status == expected, (status, lines)
    if name == signal.SIGKILL:
        killed = f"error: {whom} was killed; the last checkpoint stands, go on with --resume"
        assert lines == [killed], lines
        return
    notice = [] if whom == RANK_1 else ["finishing this step; once more to stop at once"]
    assert lines[:-1] == notice and lines[-1].startswith("stopped after step "), lines


def go_on(run, shards):
    """Resume the run to its end, or begin it anew if it has no checkpoint; return its last checkpoint."""
    if (run / "step_000120").exists():  # the signal came too late
        return run / "step_000120"
    if any(run.glob("step_*")):
        finish("--out", run, "--resume")
    else:
        shutil.rmtree(run)
        finish("--data", shards, *FLAGS, "--out", run)
    return run / "step_000120"


def check_same_bits(one, other):
    """AssertionError unless two checkpoints have the same parameters and moments."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("n", type=int, help="how many runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags = parser.parse_args()
    rng, rows, failed = random.Random(flags.seed), collections.defaultdict(list), 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shards, whole, loop_seconds = undisturbed(place)
        for i in range(flags.n):
            way, run = WAYS[i % len(WAYS)], place / "run"
            status, took, lines, steps = kill(run, shards, way, rng.uniform(0, loop_seconds))
            rows[way].append((took, steps))
            try:
                check(way, status, took, lines)
                check_same_bits(go_on(run, shards), whole)
            except AssertionError as error:
                failed += 1
                print(f"{i}: {way[0].name} to {way[1]} after step {steps}: {error}", flush=True)
            shutil.rmtree(run)
    print(f"{'signal':8} {'to':10} {'runs':>5} {'steps done':>12} {'longest end':>12}")
    for (name, whom, _), ends in rows.items():
        steps = [step for _, step in ends]
        span = f"{min(steps)} to {max(steps)}"
        print(f"{name.name:8} {whom:10} {len(ends):5} {span:>12} {max(took for took, _ in ends):10.2f} s")
    print(f"{flags.n - failed} of {flags.n} ended in time with one line, and went on to the same bits")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
