"""How the scripts talk to a person: flags, errors, progress. Nothing here is about language models.

Read it last, or never; every script uses these few functions and nothing else for talking.
"""

import argparse
import errno
import math
import os
import sys
import time

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
