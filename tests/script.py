"""Run a script's main() in this process as the shell would run the script; and a tree's files, to compare."""

import contextlib
import io
import os
from pathlib import Path
from types import SimpleNamespace

import common


def run(main, *argv):
    """The exit status of main(argv), and what it wrote: .status, .out, .err."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            common.run(lambda: main([str(arg) for arg in argv]))
        except SystemExit as end:
            status = end.code or 0
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def environment(**more):
    """For a script in a process of its own, which may start ranks as it does in a shell."""
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | more


def refused(done, *words):
    """Assert that the script ended as bad input must end it: status 2 and one line that has these words."""
    assert done.status == 2, done
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    for word in words:
        assert word in done.err, (word, done.err)
    return True


def tree(directory):
    """{path: bytes} of all files below a directory, and the directories themselves."""
    found = sorted(Path(directory).rglob("*"))
    return {str(path.relative_to(directory)): path.is_file() and path.read_bytes() for path in found}
