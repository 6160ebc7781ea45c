"""Files that are whole or not there, and pinned packages, fetched once. Not about language models."""

import contextlib
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import UserError, say


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
