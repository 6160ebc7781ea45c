"""What the scripts share: flags, one-line errors, the progress line, whole files, and a run's directory.

Nothing here is about language models. Read it last, or never: every script uses these few functions.
hub.py fetches files.
"""

import argparse
import contextlib
import errno
import fcntl
import glob
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# Errors of the system where a file cannot be written and another place may help. ENOENT is not among them: a
# script says itself which file is missing, and anywhere else ENOENT is a bug of ours.
NO_PLACE = ["EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG", "EFBIG"]

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line break

# With several ranks the number of a pipe that holds one byte: the rank that reads it may say why all end.
error_pipe = None


class UserError(Exception):
    """Something that the user can put right. The message is one line: what is wrong, and the remedy."""

    status = 2  # the exit status of a script that ends with this error


def run(main):
    """Call main() as a script does: a user's error is one line on standard error, exit status 2.

    Bytes of standard input that are no text, and letters that the terminal's encoding lacks, are replaced.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if a caller has put something else in its place
            stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        say_why(f"error: {error}")
        sys.exit(error.status)
    except KeyboardInterrupt:
        say_why("\ninterrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stderr.close()
        sys.exit(141)
    except MemoryError as error:
        what = str(error).partition(" with shape")[0]
        say_why(f"error: not enough memory{f': {what}' if what else ''}; ask for less at once")
        sys.exit(2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and errno.errorcode.get(error.errno) not in NO_PLACE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        remedy = "free some space" if full else "choose another place"
        say_why(f"error: {error.strerror}{where}; {remedy} and run the same command again")
        sys.exit(2)


def say_why(text):
    """Tell the person why the script ends. Of several ranks only the first that comes here does."""
    if error_pipe is None or os.read(error_pipe, 1):
        say(text)


@contextlib.contextmanager
def ctrl_c_waits():
    """Put off Ctrl-C until the end of a `with`; processes that are started within it never get it.

    A terminal sends it to all processes of a command. Only the first of them acts on it, and ends the others.
    """
    came = []

    def note(*_):
        came.append(True)

    handler = signal.signal(signal.SIGINT, note)  # a thread that does not block the signal may get it
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # new processes inherit what is blocked
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and N and X for numbers."""

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", super()._get_default_metavar_for_optional(action))

    def _get_help_string(self, action):
        silent = action.default is False or action.default in (None, "", argparse.SUPPRESS, [])
        return action.help if silent else f"{action.help or ''} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse as our scripts want it: defaults in --help, no abbreviations, errors in one line."""

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
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} must be at most {high}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} must be greater than {above}")
        return value

    parse.metavar = "N" if kind is int else "X"  # in --help
    return parse


def say(text):
    """Print something that is not the script's result: on standard error."""
    progress_line_gone = "\r\033[K" if sys.stderr.isatty() else ""
    print(progress_line_gone + text, file=sys.stderr, flush=True)


def printable(text):
    """The text without the control characters that move a terminal's cursor or set its clipboard."""
    return CONTROL.sub("\ufffd", text)


def colour():
    """Whether standard output is a terminal that may be coloured (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def count(n, units=("T", "B", "M", "k", "")):
    """1234567 -> '1.23M'."""
    for scale, unit in zip((1e12, 1e9, 1e6, 1e3), units):
        if abs(n) >= scale:
            return f"{n / scale:.3g}{unit}" if abs(n) < 999.5 * scale else f"{n / scale:.0f}{unit}"
    return f"{n:.3g}{units[-1]}" if isinstance(n, float) else f"{n}{units[-1]}"


def size(n_bytes):
    """Bytes as a person reads them: '4.9 MB', powers of ten."""
    return count(n_bytes, (" TB", " GB", " MB", " kB", " B"))


def duration(seconds):
    """Seconds as a person reads them: '8.2s', '4m05s', '2h03m', '9d04h'."""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class Line:
    """A status line: redrawn in place on a terminal, one plain line every `every` seconds elsewhere."""

    def __init__(self, every=5.0):
        self.redraw = sys.stderr.isatty()
        self.every = 0.1 if self.redraw else every
        self.shown = -1e9  # when something was last written, seconds

    def show(self, text):
        now = time.monotonic()
        if now - self.shown < self.every:
            return
        self.shown = now
        if self.redraw:  # a line that wraps could not be drawn over
            width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            sys.stderr.write(f"\r\033[K{text[: width - 1]}")
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def clear(self, text=None):
        """Erase the line, and leave `text` in its place if there is one."""
        if self.redraw:
            sys.stderr.write("\r\033[K")
        if text is not None:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Progress:
    """A line that says how far, how fast, how long still: add(n) after n units of work, done() at the end."""

    def __init__(self, what, total=None, unit="", form=count):
        self.what, self.total, self.unit, self.form = what, total, unit, form
        self.done_so_far, self.start, self.line = 0, time.monotonic(), Line()
        if not self.line.redraw:
            self.line.shown = self.start  # short work prints no plain lines

    def add(self, n):
        self.done_so_far += n
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done_so_far / seconds
        total = f" of {self.form(self.total)}" if self.total else ""
        text = f"{self.what}: {self.form(self.done_so_far)}{total}, {self.form(rate)}{self.unit}/s"
        if self.total and self.done_so_far:
            seconds_left = max(self.total - self.done_so_far, 0) / max(rate, 1e-9)
            text += f", {duration(seconds_left)} left"
        self.line.show(text)

    def done(self):
        seconds = time.monotonic() - self.start
        self.line.clear(f"{self.what}: {self.form(self.done_so_far)} in {duration(seconds)}")


# ------------------------------------------------------------------------------------------------------------
# Files that are whole or not there


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
    before = place.with_name(f".{place.name}.before.{os.getpid()}.part")
    for left_over in place.parent.glob(f".{glob.escape(place.name)}.*.part"):
        if not _alive(left_over.name.split(".")[-2]):
            shutil.rmtree(left_over, ignore_errors=True)  # its process was killed
    try:
        beside.mkdir(parents=True)  # in here, so that Ctrl-C removes it from its first moment on
        yield beside
        for path in (*beside.iterdir(), beside):
            _flush(path)
        if place.exists():
            os.replace(place, before)  # for a moment there is no `place`, but never half of one
        os.replace(beside, place)
        _flush(place.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _alive(pid):
    """Whether another process has this number; True if we are not allowed to ask."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except OSError:
        return True
    return int(pid) != os.getpid()


def _flush(path):
    """Flush a file, or the entries of a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def lock_file(path):
    """Lock a file for this process until the returned file is closed; None if another process has it."""
    file = open(path, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError:
        file.close()
        return None


# ------------------------------------------------------------------------------------------------------------
# Flags that several scripts have

SHARED_FLAGS = {
    "init-from": dict(metavar="DIR", help="begin with the weights of this run, checkpoint or hub model"),
    "out": dict(metavar="RUN", help="directory of the run, a new one"),
    "resume": dict(action="store_true", help="go on from the newest checkpoint of RUN, with its flags"),
    "batch-tokens": dict(type=number(int, low=1), help="tokens of a micro-batch at most, padding included"),
    "lr": dict(type=number(float, above=0), help="highest learning rate"),
    "warmup-steps": dict(type=number(int, low=0), help="steps of linear warm-up to --lr"),
    "final-lr": dict(
        type=number(float, 0, 1), default=0.0, help="learning rate at the end, as a part of --lr"
    ),
    "weight-decay": dict(type=number(float, low=0), default=0.1, help="on matrices and embeddings"),
    "grad-clip": dict(type=number(float, above=0), default=1.0, help="largest norm of the gradient"),
    "save-every": dict(
        type=number(int, low=0), help="steps between checkpoints; there is always one at the end"
    ),
    "keep": dict(type=number(int, low=1), default=2, help="checkpoints to keep, the newest"),
    "ranks": dict(
        type=number(int, low=1), help="processes that share a step; one a GPU, or a core for a small model"
    ),
    "seed": dict(type=number(int, 0, 2**63), default=42, help="of all that is random"),
    "device": dict(
        choices=("auto", "cpu", "cuda", "reference"),
        default="auto",
        help="where to compute; auto: a GPU if any",
    ),
    "dtype": dict(
        choices=("auto", "float32", "float64", "bfloat16"), default="auto", help="type of the weights"
    ),
}


def add_shared_flags(group, *names, **defaults):
    """Add flags of SHARED_FLAGS to a group of a parser, with these defaults or those of the table."""
    for name in names:
        group.add_argument(f"--{name}", **SHARED_FLAGS[name])
    group.set_defaults(**defaults)


def parse_run(parser, argv, script):
    """The flags of a script that trains, and the checkpoint that it goes on from or None.

    With --resume the flags are those of the run's newest checkpoint, unless they are given anew. UserError if
    another script made that run.
    """
    flags = parser.parse_args(argv)
    if not flags.resume:
        return flags, None
    if not checkpoints(flags.out):
        raise UserError(f"nothing to resume: {flags.out} has no checkpoint; start anew, without --resume")
    if is_first_rank():
        lock(flags.out).close()  # another process that trains this run could remove what is read now
    checkpoint = checkpoints(flags.out)[-1]
    state, known = read_state(checkpoint), vars(flags)
    made_by = state.get("script", script)
    if made_by != script:
        command = f"python {made_by} --out {shlex.quote(str(flags.out))} --resume"
        raise UserError(f"{flags.out} is a run of {made_by}, not of {script}; go on with: {command}")
    before = {name: value for name, value in state["flags"].items() if name in known}
    before["out"] = flags.out  # the run may have moved
    parser.set_defaults(**before)
    return parser.parse_args(argv), checkpoint


# ------------------------------------------------------------------------------------------------------------
# A run's directory: log.jsonl, one object per event, and step_000500/, the model and all it takes to go on


def read_log(run):
    """The events of a run; a line that was cut off is left out."""
    try:
        lines = (Path(run) / "log.jsonl").read_bytes().splitlines()
    except OSError:
        raise UserError(f"{run} has no log.jsonl; name a run's directory") from None
    events = []
    for line in lines:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def checkpoints(run):
    """The checkpoints of a run, oldest first."""
    found = [d for d in Path(run).glob("step_*") if d.name[5:].isdecimal() and (d / "config.json").is_file()]
    return sorted(found, key=lambda place: int(place.name[5:]))


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
        gone = old.with_name(f".{old.name}.{os.getpid()}.part")  # renamed first: never half a checkpoint
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)
    return place


def read_state(checkpoint):
    """state.json of a checkpoint: the step, and what else the run put there."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if isinstance(state, dict):
            return state
        raise ValueError
    except (OSError, ValueError):
        remedy = "delete this checkpoint to go on from an older one"
        raise UserError(f"{checkpoint / 'state.json'} is missing or damaged; {remedy}") from None


def is_first_rank():
    """Whether this process is rank 0, which alone writes and prints (distributed.py)."""
    return os.environ.get("RANK", "0") == "0"


def lock(run):
    """Lock the run for this process until the returned file is closed; UserError if another one has it."""
    file = lock_file(Path(run) / "lock")
    if file is None:
        raise UserError(f"another process is training {run}; wait for it, or stop it first")
    return file


def require_new(run):
    """UserError unless a new run may begin there: nothing is ever overwritten."""
    run = Path(run)
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    if (run / "lock").exists():
        lock(run).close()
    remedy = "go on with --resume" if checkpoints(run) else "it has no checkpoint: delete it"
    raise UserError(f"{run} exists; {remedy}, or choose another --out")


WINDOW, MIN_WINDOW = 128, 32  # a loss is compared with those of so many steps before; and at least so many
LONG_STEP = 5  # seconds: a longer step is stopped between micro-batches; spot machines give half a minute


class Run:
    """A training run: its directory, where it goes on, what it reports, its checkpoints, and its end.

        run = Run("train.py", flags, checkpoint)
        run.begin(world, model, optimizer, tokenizer, steps)
        for step in run.steps():                # from where it stopped; saves checkpoints; ends on Ctrl-C
            ...                                 # forward, backward, all-reduce
            optimizer.step(lr, flags.grad_clip, *run.limits(step))
            run.report(step, lr)
            if run.is_due(step + 1, flags.eval_every):
                run.say(f"validation loss {...}")

    Every rank has one; only rank 0 writes and prints. Loss and norm of a step are read while the next one is
    computed, so that a GPU never waits for Python.
    """

    def __init__(self, script, flags, checkpoint=None, stage=None):
        self.script, self.flags, self.stage, self.directory = script, flags, stage, Path(flags.out)
        self.checkpoint = checkpoint
        self.is_first = is_first_rank()
        self.lock = None
        if self.is_first and checkpoint:
            self.lock = lock(self.directory)  # before anything is read that another process may change
        elif self.is_first:
            require_new(self.directory)

        # What a checkpoint keeps
        self.state = read_state(checkpoint) if checkpoint else {}
        self.start = self.state.get("step", 0)
        self.skipped = self.state.get("skipped", 0)  # steps that were left out
        self.losses = self.state.get("losses", [])  # of the last steps: [[step, value], ...]
        self.norms = self.state.get("norms", [])
        self.also_saved = {}  # what else a script needs to go on
        if "steps" in flags:
            self._require_steps_left(flags.steps, "--steps")

        # --ranks as it was given: with None a run that goes on chooses anew, perhaps on another machine.
        self.ranks = getattr(flags, "ranks", None)
        self.outlier_z = getattr(flags, "outlier_z", 0.0)
        self.since = 0  # the first step that others are compared with
        self.skipped_in_a_row = 0
        self.saved = self.start if checkpoint else None  # steps that are in the newest checkpoint
        self.step_seconds = 0.0  # what a step takes, if the script has measured it; the same on all ranks
        self.flops_per_token, self.peak, self.peak_is = 0.0, math.inf, ""
        self.pending = None  # the report of the last step, until it is read
        self.line = Line(every=0)

    def _require_steps_left(self, steps, flag):
        if self.start >= steps:
            remedy = f"give more {flag}, or see sample.py {self.directory}"
            raise UserError(f"{self.directory} has all its {steps} steps; {remedy}")

    def begin(self, world, model, optimizer, tokenizer, steps, **about):
        """Load the optimizer, and make the directory and its log; `about` goes to the log.

        steps is how many the whole run has.
        """
        self.world, self.model, self.optimizer, self.tokenizer = world, model, optimizer, tokenizer
        self.n_steps = steps
        self._require_steps_left(steps, "--epochs")
        if self.checkpoint:
            optimizer.load(self.checkpoint / "optimizer.safetensors")
        if self.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.lock = self.lock or lock(self.directory)
            for left_over in self.directory.glob(".*.part"):  # by a process that was killed while it saved
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            self._open_log()
            self._check_disk(12 * model.config.n_params())  # the weights and two moments of each, float32
        self.log("start", step=self.start, flags=vars(self.flags), ranks=world.size, **about)

    def _open_log(self):
        """Open log.jsonl, without the events after the checkpoint: their steps are done again."""
        path = self.directory / "log.jsonl"
        if path.exists():
            events = read_log(self.directory)
            kept = [event for event in events if event.get("step", 0) <= self.start]
            write_whole(path, "".join(json.dumps(event) + "\n" for event in kept).encode())
        self.file = open(path, "ab", buffering=0)  # every line is written at once

    # -- the loop ------------------------------------------------------------------------------------------

    def steps(self):
        """The numbers of the steps still to do; after each, a checkpoint if one is due or the run stops."""
        self.world.catch_signals()
        self.began = time.monotonic()
        for step in range(self.start, self.n_steps):
            self.step_began = self.model.ops.now()
            yield step
            done = step + 1
            if self.world.stop and done < self.n_steps:
                self._stop_after(done)
            self.save_if_due(done)

    def until_stopped(self, step, micro_batches):
        """The micro-batches of a step; a stop request ends a long step between two of them.

        What is saved then is the state before the step, because an update needs all of its micro-batches.
        """
        for i, micro_batch in enumerate(micro_batches):
            if i and self.step_seconds > LONG_STEP:
                self.model.ops.synchronize()  # else Python would be far ahead of a GPU
                self.world.barrier()
                if self.world.stop:
                    self._stop_after(step)
            yield micro_batch

    def _stop_after(self, done):
        """Save, say how to go on, and end the script."""
        self.save_if_due(done)
        command = f"python {self.script} --out {shlex.quote(str(self.directory))} --resume"
        self.say(f"stopped after step {done}; go on with: {command}")
        raise SystemExit(128 + self.world.stop)

    def save_if_due(self, done):
        """Write a checkpoint if one is due after `done` steps; there is always one if the run stops or ends.

        steps() does it after each step. Call it before anything that takes long or may fail: an evaluation
        that runs out of memory must not cost the steps before it.
        """
        due = self.world.stop or done == self.n_steps or self.is_due(done, self.flags.save_every)
        if due and done != self.saved:
            self.save(done)
            self.saved = done

    def is_due(self, done, every):
        """Whether after `done` steps something is due that happens every so many steps and at the end.

        0 steps mean never.
        """
        return every > 0 and (done % every == 0 or done == self.n_steps)

    def limits(self, step, since=0):
        """The norm and the loss above which a step is left out.

        That is --outlier-z standard deviations above the mean of the steps before, from step `since` on.
        """
        self.since = since
        if not self.outlier_z:
            return [math.inf, math.inf]
        before = [mean_and_deviation(values, since, step) for values in (self.norms, self.losses)]
        limits = [mean + self.outlier_z * deviation for mean, deviation in before]
        return np.array(limits, self.model.exact).tolist()  # rounded as the device rounds them

    def report(self, step, lr, tokens=0, shown="", updated=True, **values):
        """Show and log a step, as soon as the device has computed it: while the next one is under way.

        shown is text for the progress line, tokens how many were trained on; without an update
        (updated=False) there is neither loss nor norm. values go to the log.
        """
        ops = self.model.ops
        report = SimpleNamespace(step=step, lr=lr, tokens=tokens, shown=shown, values=values)
        report.loss = ops.read_later(self.optimizer.loss) if updated else None
        report.norm = ops.read_later(self.optimizer.norm) if updated else None
        report.since, report.limits = self.since, self.limits(step, self.since)
        report.began, report.ended = self.step_began, ops.now()
        report.seconds_so_far = time.monotonic() - self.began
        self.flush()
        self.pending = report

    def flush(self):
        """Finish the report that is pending: wait for its loss and norm, show and log them."""
        if self.pending is None:
            return
        report, self.pending = self.pending, None
        done, seconds = report.step + 1, self.model.ops.elapsed(report.began, report.ended)
        measures, parts = dict(lr=report.lr, seconds=seconds), [f"step {done}/{self.n_steps}"]
        if report.shown:
            parts.append(report.shown)
        if report.loss:
            norm, loss = float(report.norm()[0]), float(report.loss()[0])
            measures |= self._compare(report, norm, loss)
            for name in ("loss", "norm"):
                z = f" (z {measures[name + '_z']:+.1f})" if self.outlier_z else ""
                parts.append(f"{name} {measures[name]:.4f}{z}")
        parts += [f"lr {report.lr:.2e}", f"{seconds * 1e3:.0f} ms"]
        if report.tokens:
            measures["speed"] = report.tokens / seconds
            parts.append(f"{count(measures['speed'])} tok/s")
        if report.tokens and self.flops_per_token:
            measures["utilization"] = measures["speed"] * self.flops_per_token / self.peak
            parts.append(f"{measures['utilization']:.0%} {self.peak_is}")
        seconds_left = report.seconds_so_far / (done - self.start) * (self.n_steps - done)
        parts.append(f"{duration(seconds_left)} left")
        if measures.get("skipped"):
            parts.append("SKIPPED")
        self.log("step", step=done, **measures, **report.values)
        if self.is_first:
            self.line.show(" | ".join(parts))
        if self.skipped_in_a_row == 10:
            raise UserError(
                f"10 steps in a row had a loss or gradient that is no number or far out, last {loss:.4g} and "
                f"{norm:.4g}; nothing was updated with them. Lower --lr and --resume, or start anew"
            )

    def _compare(self, report, norm, loss):
        """Return what the log says of a step's norm and loss; keep them, if it was taken, for later steps."""
        limits = zip((norm, loss), report.limits)
        taken = all(math.isfinite(value) and value <= limit for value, limit in limits)  # as the device did
        self.skipped += not taken
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        measures = dict(loss=loss, norm=norm, skipped=not taken)
        if self.outlier_z:
            for name, value, values in (("loss", loss, self.losses), ("norm", norm, self.norms)):
                mean, deviation = mean_and_deviation(values, report.since, report.step)
                measures[name + "_z"] = (value - mean) / deviation
                if taken:
                    values.append([report.step, value])
                    del values[: -WINDOW - 1]
        return measures

    def save(self, done):
        """Write a checkpoint after `done` steps, and log it."""
        self.flush()
        self.optimizer.collect()
        if self.is_first:
            state = dict(skipped=self.skipped, losses=self.losses, norms=self.norms)
            state["flags"] = {**vars(self.flags), "ranks": self.ranks}
            state["script"] = self.script
            if self.stage:
                state["stage"] = self.stage
            state.update(self.also_saved)
            models = self.model, self.tokenizer, self.optimizer
            place = save_checkpoint(self.directory, done, *models, self.flags.keep, **state)
            self.log("checkpoint", step=done, path=place.name)
            self._check_disk(sum(path.stat().st_size for path in place.iterdir()))

    def _check_disk(self, needed):
        """Warn in time if the disk has no room for the next checkpoint, which takes `needed` bytes.

        Old checkpoints are removed when the new one is there, so there must be room for one more.
        """
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            what = f"the next checkpoint takes {size(needed)}, and {size(free)} are free"
            self.say(f"warning: {what} where {self.directory} is; free some space, or lower --keep")

    def checkpoint_path(self, done):
        return self.directory / f"step_{done:06d}"

    # -- what it says --------------------------------------------------------------------------------------

    def log(self, event, step, **values):
        """Append an event to log.jsonl; a number that is not finite becomes null, since JSON has none."""
        if not self.is_first:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        self.file.write(json.dumps({"event": event, "step": step, **values}).encode() + b"\n")

    def say(self, text):
        """Print a line, or several, that stay on the terminal (rank 0 does)."""
        self.flush()
        if self.is_first:
            self.line.clear(text)


def mean_and_deviation(values, since, step):
    """Of the values [[step, value], ...] of the last steps before `step`, from `since` on: their mean and
    standard deviation; 0 and infinity if they are too few.

    The step just before does not count: its loss is not read yet.
    """
    window = [value for at, value in values if since <= at <= step - 2][-WINDOW:]
    if len(window) < MIN_WINDOW:
        return 0.0, math.inf
    return float(np.mean(window)), max(float(np.std(window)), 1e-6)  # z divides by it: never 0
