"""A run's directory: log.jsonl, one object an event, and step_000500/, the model and all it takes to go on.

train.py, sft.py and rl.py write it, sample.py reads it. Read train.py first.
"""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import files
from common import UserError, say


class Log:
    """log.jsonl. Events after `step`, of a run that was cut off, are dropped: they will come again."""

    def __init__(self, run, step=0):
        path = Path(run) / "log.jsonl"
        for left_over in path.parent.glob(".*.part"):  # by a process that was killed while it saved
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        if path.exists():
            kept = [json.dumps(event) + "\n" for event in read_log(run) if event.get("step", 0) <= step]
            files.write_whole(path, "".join(kept).encode())
        self.file = open(path, "ab", buffering=0)  # every line is on its way at once

    def write(self, event, **values):
        """Append an event; a number that is none (NaN, infinity) becomes null, as JSON has no word for it."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        self.file.write(json.dumps({"event": event, **values}).encode() + b"\n")


def read_log(run):
    """The events of a run; a line that was cut off is left out."""
    try:
        lines = (Path(run) / "log.jsonl").read_bytes().splitlines()
    except OSError:
        raise UserError(f"{run} has no log.jsonl; name a run's directory") from None
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def checkpoints(run):
    """The checkpoints of a run, oldest first."""
    found = [d for d in Path(run).glob("step_*") if d.name[5:].isdecimal() and (d / "config.json").is_file()]
    return sorted(found, key=lambda d: int(d.name[5:]))


def newest_checkpoint(directory):
    """The directory itself if it is a checkpoint, else the newest of the run; UserError if there is none."""
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return directory
    if not checkpoints(directory):
        raise UserError(f"{directory} is no checkpoint and has none; name a run or a step_* directory in it")
    return checkpoints(directory)[-1]


def save_checkpoint(run, step, model, tokenizer, optimizer, keep, **state):
    """Write run/step_000500, whole or not at all; then remove all but the newest `keep`. Return its path."""
    place = Path(run) / f"step_{step:06d}"
    with files.whole_directory(place) as beside:
        model.save_pretrained(beside)
        tokenizer.save(beside)
        optimizer.save(beside / "optimizer.safetensors")
        files.write_whole(beside / "state.json", json.dumps({"step": step, **state}, indent=1).encode())
    for old in checkpoints(run)[:-keep]:
        gone = old.with_name(f".{old.name}.{os.getpid()}.part")  # not half there if we are stopped now
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)
    return place


def read_state(checkpoint):
    """state.json of a checkpoint: the step, and what else the run put there."""
    try:
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        remedy = "delete this checkpoint to go on from an older one"
        raise UserError(f"{checkpoint / 'state.json'} is missing or damaged; {remedy}") from None


def require_new(run):
    """UserError unless a new run may begin there: nothing is ever overwritten."""
    run = Path(run)
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        remedy = "go on with --resume" if checkpoints(run) else "it has no checkpoint: delete it"
        raise UserError(f"{run} exists; {remedy}, or choose another --out")


def to_resume(run):
    """The newest checkpoint of a run and the flags it was made with, except that the run may have moved."""
    if not checkpoints(run):
        raise UserError(f"nothing to resume: {run} has no checkpoint; start anew, without --resume")
    checkpoint = checkpoints(run)[-1]
    return checkpoint, read_state(checkpoint)["flags"] | {"out": str(run)}


class Interrupt:
    """Ctrl-C sets `asked`, for the loop to finish its step; a second one stops at once."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, name, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("\nfinishing this step; once more to stop at once")
