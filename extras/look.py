"""What is in the data: a page of text and a picture, to be looked at before anything is trained on it.

    python data.py inspect shards/factbook        shards
    python data.py inspect texts/ notes.md        text files, and folders of them
    python data.py inspect my.jsonl               conversations, in files as sft.py reads them

Documents are read one at a time, and what is remembered of them is bounded, so data of any size can be looked
at. Of large data every n-th document is looked into. It is chosen by a hash of its text, so that a sample has
all copies of a document or none of them. Read data.py and tokenizer.py before this file.
"""

import hashlib
import json
import random
import string
import textwrap
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import common
import data
from cleaning import formats, rules
from common import UserError, count, size
from extras import plot
from tasks.conversations import parsed
from tokenizer import Tokenizer, as_parts, transcript, utf8, visible

SHARD_TOKENS, TEXT_BYTES = 100_000_000, 100_000_000  # of larger data so much is looked into
BATCH_BYTES = 1 << 22  # of texts that are encoded together
LONGEST = 1 << 24  # characters or tokens: a longer document is cut
KEYS = 1_000_000  # texts of which it is remembered how often they came, some 200 bytes each
SAMPLE, SHOWN = 1000, 10  # documents at random: whose language is found out, and that are printed
MANY = 20  # files: of more the sources are their folders
SOURCES = 10_000  # of more the rest is one source
BEGINNING = 2000  # bytes: so much of a document of the sample is kept
ENOUGH = 100  # bytes: of shorter documents repetition and letters say little
PARAGRAPH = 40  # bytes: what is shorter is a title, or an item of a list
UNCLEAR = 0.2  # a language of less confidence is none
LETTERS = string.ascii_letters.encode() + string.whitespace.encode() + bytes(range(128, 256))


def show(flags):
    """What `data.py inspect` does: print the page, or its facts as JSON, and draw the picture."""
    first = Path(flags.paths[0])
    if has_shards(first):
        if len(flags.paths) > 1:
            raise UserError(f"{first} has shards; look at them alone, without {flags.paths[1]}")
        look = look_at_shards(first, flags.seed)
    elif first.suffix == ".bin":
        raise UserError(f"{first} is a shard; name its folder, {first.parent}, which has the tokenizer")
    else:
        tokenizer = "gpt2" if flags.tokenizer == "bpe" else flags.tokenizer  # nothing is learned here
        files = data.text_files(flags.paths, otherwise=", or what data.py text makes of it")
        look = look_at_files(files, Tokenizer.named(tokenizer), flags.seed)
    if not look.lengths:
        bad = f": {look.bad[0]}" if look.bad else ""
        raise UserError(f"there is no document in {', '.join(flags.paths)}{bad}; give other files")
    facts, name = look.facts(), ", ".join(flags.paths)
    out = Path(flags.out or (first / "inspect.png" if first.is_dir() else f"{first}.png"))
    if flags.json:
        print(json.dumps({"paths": flags.paths, **facts, "picture": str(out)}, ensure_ascii=False))
    else:
        print(common.printable(page(name, facts)))
    draw(name, look, facts, out)
    common.say(f"the picture: {out}")


# ------------------------------------------------------------------------------------------------------------
# Reading


def has_shards(path, split="*"):
    """Whether a path is a directory with shards, of this split if one is named."""
    return path.is_dir() and any(path.glob(f"*_{split}_*.bin"))


@dataclass
class Document:
    source: str
    text: bytes
    key: int  # a hash of its text
    ids: object = None  # (n,) token ids, an array or a list; None: not encoded yet
    turns: list = None  # of a conversation

    def is_empty(self):
        has_tokens = self.ids is not None and len(self.ids) > 0  # those of shards have no text unless wanted
        return not has_tokens and not self.text.strip()


def digest(content):
    """A 64-bit hash of bytes: the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def look_at_shards(directory, seed):
    """Look at the shards of a directory, its training and its validation split."""
    tokenizer = Tokenizer.load(directory)
    splits = [split for split in ("train", "val") if has_shards(directory, split)]
    splits = {split: shards_there(directory, split) for split in splits}
    n_tokens = sum(len(shard) for shards in splits.values() for shard in shards)
    look = Look(tokenizer, "document", n_tokens / SHARD_TOKENS, seed)
    if (directory / "meta.json").exists():
        look.meta = data.meta(directory)
    words = np.array([tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)], object)  # (V,)
    progress = common.Progress("looking", n_tokens, " tokens")
    for split, shards in splits.items():
        for pieces, n_read in token_pieces(shards, tokenizer):
            documents = []
            for ids in pieces:
                key = digest(ids.tobytes())
                text = b"".join(words[ids]) if look.wants(key) else b""
                documents.append(Document(split, text, key, ids))
            look.add(documents)
            progress.add(n_read)
    if look.lengths:
        progress.done()
    return look


def shards_there(directory, split):
    """The shards of a split, without those that are still being downloaded."""
    shards = data.shards(directory, split)
    there = [shard for shard in shards if not isinstance(shard, data.LateShard)]
    if len(there) < len(shards):
        what = f"{len(shards) - len(there)} of {len(shards)} {split} shards are"
        common.say(f"note: {what} not here yet, and left out")
    return there


def token_pieces(shards, tokenizer, block_tokens=1 << 20):
    """Yield (the documents of a block as arrays of ids, how many tokens were read), without <|endoftext|>.

    A document may begin in one shard and end in the next.
    """
    left = np.zeros(0, np.uint16)  # the document that is not complete yet
    for shard in shards:
        for start in range(0, len(shard), block_tokens):
            block = shard[start : start + block_tokens]
            if block.max() >= tokenizer.vocab_size:
                what = f"{shard.filename} has token {block.max()}"
                raise UserError(f"{what}, but the vocabulary ends at {tokenizer.vocab_size - 1}")
            tokens = np.concatenate([left, block])
            *pieces, left = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
            if len(left) > LONGEST:
                pieces, left = [*pieces, left], left[:0]
            yield [ids[ids != tokenizer.eot] for ids in pieces if len(ids)], len(block)
    if len(left):
        yield [left[left != tokenizer.eot]], 0


def look_at_files(paths, tokenizer, seed):
    """Look at text files; or at conversations, if the first file has some."""
    n_bytes = sum(path.stat().st_size for path in paths)
    unit = "conversation" if has_conversations(paths[0]) else "document"
    look = Look(tokenizer.with_chat_tokens(), unit, n_bytes / TEXT_BYTES, seed)
    progress = common.Progress("looking", n_bytes, form=size)
    for path in paths:
        source = path.name if len(paths) <= MANY else str(path.parent)
        documents = conversations(path, source, look.bad) if look.talk else texts(path, source)
        for batch in formats.in_batches(documents, attrgetter("text"), BATCH_BYTES):
            look.add(batch)
            progress.add(sum(len(document.text) for document in batch))
    if look.lengths:
        progress.done()
    return look


def texts(path, source):
    """Yield the documents of a text file."""
    for _, text in data.read_texts([path], LONGEST):
        content = utf8(text)
        yield Document(source, content, digest(b" ".join(content.split())))


def has_conversations(path):
    """Whether the first line of a file is a conversation: {"messages": [...]}, or the list alone."""
    if path.suffix.lower() != ".jsonl":
        return False
    with open(path, "rb") as file:
        try:
            row = json.loads(next((line for line in file if line.strip()), b""))
        except (ValueError, RecursionError):
            return False
    return isinstance(row, list) or (isinstance(row, dict) and "messages" in row)


def conversations(path, source, bad):
    """Yield the conversations of a file; why sft.py would refuse a line is appended to `bad`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                turns, named = parsed(line)
            except UserError as error:
                is_shown = len(bad) < 3  # the others are only counted
                bad.append(f"{path}, line {number}: {error}" if is_shown else "")
                continue
            content = utf8("\n".join(f"{turn['role']}: {transcript(turn['content'])}" for turn in turns))
            where = named if isinstance(named, str) else source
            yield Document(where, content, digest(content), turns=turns)


# ------------------------------------------------------------------------------------------------------------
# Looking

EXTREMES = {  # what documents are highest in, and how the value is written
    "longest": "{:,.0f} tokens",
    "shortest": "{:,.0f} tokens",
    "most repetitive": "{:.0%} of its size when compressed",
    "fewest letters": "{:.0%} other signs",
}


class Look:
    """What is known of the documents that were added. `unit` is what one of them is called."""

    def __init__(self, tokenizer, unit, times_too_large, seed):
        self.tokenizer, self.unit = tokenizer, unit
        self.every = max(1, round(times_too_large))
        self.rng = random.Random(seed)
        self.n_documents = self.n_empty = self.n_damaged = self.n_with_nul = 0
        self.lengths = array("Q")  # tokens of each document looked into
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)  # (V,) how often each token is there
        self.sources = {}  # {source: Counter of documents, bytes, tokens}
        self.copies, self.paragraphs = Repeats(), Repeats()
        self.extremes = {kind: Highest(3) for kind in EXTREMES}
        self.sample = []  # SAMPLE documents at random: (beginning, (compressed(), non_letters()) or None)
        self.talk = ConversationStats() if unit == "conversation" else None
        self.bad, self.meta = [], {}

    def wants(self, key):
        """Whether the document of this hash is looked into."""
        return key % self.every == 0

    def add(self, documents):
        """Count some documents, and look into those that are wanted."""
        self.n_documents += len(documents)
        filled = [document for document in documents if not document.is_empty()]
        self.n_empty += len(documents) - len(filled)
        for document in filled:
            self.copies.add(document.key, document.text)
        wanted = [document for document in filled if self.wants(document.key)]
        plain = [document for document in wanted if document.ids is None and document.turns is None]
        all_ids = self.tokenizer.encode_batch([document.text.decode() for document in plain])
        for document, ids in zip(plain, all_ids):
            document.ids = ids
        for document in wanted:
            if document.turns:
                document.ids = self.talk.add(document.turns, self.tokenizer)
            self.look_into(document)
        if wanted:
            ids = np.concatenate([document.ids for document in wanted]).astype(np.int64)
            self.counts += np.bincount(ids, minlength=len(self.counts))

    def look_into(self, document):
        text, key, n_tokens, n_before = document.text, document.key, len(document.ids), len(self.lengths)
        self.lengths.append(n_tokens)
        self.n_damaged += b"\xef\xbf\xbd" in text
        self.n_with_nul += b"\0" in text
        is_new = document.source not in self.sources
        source = "others" if is_new and len(self.sources) >= SOURCES else document.source
        self.sources.setdefault(source, Counter()).update(documents=1, bytes=len(text), tokens=n_tokens)
        for paragraph in paragraphs(text):
            self.paragraphs.add(digest(paragraph), paragraph)

        values, measures = {"longest": n_tokens, "shortest": -n_tokens}, None
        if len(text) >= ENOUGH:
            measures = compressed(text), non_letters(text)
            values |= {"most repetitive": -measures[0], "fewest letters": measures[1]}
        for kind, value in values.items():
            self.extremes[kind].add(value, key, text)

        if n_before < SAMPLE:
            self.sample.append((text[:BEGINNING], measures))
        elif (place := self.rng.randrange(n_before + 1)) < SAMPLE:  # so that all have the same chance
            self.sample[place] = text[:BEGINNING], measures

    def facts(self):
        """All that is known, as JSON can hold it."""
        lengths, n_bytes = np.array(self.lengths), sum(n["bytes"] for n in self.sources.values())
        n_tokens, names = int(self.counts.sum()), ("shortest", "10%", "median", "90%", "longest")
        quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf").tolist()
        frequent = [int(id) for id in np.argsort(-self.counts, kind="stable")[:20] if self.counts[id]]
        words = [visible(self.tokenizer.token_bytes(id)) for id in frequent]
        self.rng.shuffle(self.sample)
        return {
            "unit": self.unit,
            "documents": self.n_documents,
            "looked_into": len(lengths),
            "every": self.every,
            "bytes": n_bytes,
            "tokens": n_tokens,
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            "lengths": dict(zip(names, quantiles)) | {"mean": float(lengths.mean())},
            "histogram": histogram(lengths),
            "frequent_tokens": [(word, self.counts[id] / n_tokens) for word, id in zip(words, frequent)],
            "tokens_used": int((self.counts > 0).sum()),
            "sources": dict(sorted(self.sources.items(), key=lambda item: -item[1]["bytes"])),
            "meta": {
                name: self.meta[name] for name in ("sources", "left_out", "dropped") if name in self.meta
            },
            "languages": languages([text for text, _ in self.sample]),
            "empty": self.n_empty,
            "with_replacement_characters": self.n_damaged,
            "with_nul": self.n_with_nul,
            "bad_lines": {"n": len(self.bad), "first": self.bad[:3]},
            "duplicates": self.copies.facts(),
            "paragraphs": self.paragraphs.facts(),
            "talk": self.talk and self.talk.facts(),
            "extremes": {kind: highest.facts() for kind, highest in self.extremes.items()},
            "random": [beginning(text, 600) for text, _ in self.sample[:SHOWN]],
        }


def compressed(text):
    """The size that zlib leaves of a text, as a share: small if it repeats itself."""
    return len(zlib.compress(text, 1)) / len(text)


def non_letters(text):
    """The share of bytes that are neither letters, of any language, nor white space."""
    return len(text.translate(None, LETTERS)) / len(text)


def paragraphs(text):
    """The paragraphs of a text as bytes, without short ones.

    Blank lines separate them. A text whose lines are long has a paragraph in each.
    """
    are_lines_short = len(text) < 100 * (text.count(b"\n") + 1)
    pieces = text.split(b"\n\n" if are_lines_short and b"\n\n" in text else b"\n")
    return [piece for piece in map(bytes.strip, pieces) if len(piece) >= PARAGRAPH]


def histogram(lengths):
    """[(low, high, how many lengths are from low to high), ...]; each high is about twice its low."""
    edges = [0, *(1 << n for n in range(int(lengths.max()).bit_length() + 1))]
    numbers = np.histogram(lengths, edges)[0].tolist()
    first = next(i for i, n in enumerate(numbers) if n)
    return [(edges[i], edges[i + 1] - 1, numbers[i]) for i in range(first, len(numbers))]


def languages(texts):
    """{language: share of the texts}; None if what finds them out is not installed."""
    try:
        classifier, found = rules.Language("en"), Counter()
    except UserError:  # it is not installed
        return None
    for text in texts:
        language, confidence = classifier.most_probable(text.decode("utf-8", "ignore"))
        found[language if confidence >= UNCLEAR else "unclear"] += 1
    return {language: n / len(texts) for language, n in found.most_common()}


def beginning(text, n_bytes):
    """The first bytes of a text as a str, with ... if it goes on."""
    return text[:n_bytes].decode("utf-8", "ignore") + " ..." * (len(text) > n_bytes)


class Bounded(dict):
    """A dictionary by hashes that stays small: when it is full, every second key is forgotten for good."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.every = limit, 1  # keys are kept that `every` divides

    def entry(self, key, new):
        """What is kept under the key, at first `new`; None if such keys are not kept."""
        if key % self.every:
            return None
        if key not in self and len(self) >= self.limit:
            self.every *= 2
            for other in [other for other in self if other % self.every]:
                del self[other]
        return self.setdefault(key, new) if key % self.every == 0 else None


class Repeats:
    """How often each text came."""

    def __init__(self):
        self.times = Bounded(KEYS)  # {hash: [how often, the beginning of the text if it came twice]}

    def add(self, key, text):
        entry = self.times.entry(key, [0, b""])
        if entry:
            entry[0] += 1
            if entry[0] == 2:
                entry[1] = text[:200]  # b"" of a shard's document that is not looked into

    def facts(self):
        repeated = sorted((entry for entry in self.times.values() if entry[0] > 1), reverse=True)
        n_copies = sum(n - 1 for n, _ in repeated)
        return {
            "every": self.times.every,
            "compared": len(self.times) + n_copies,
            "copies": n_copies,
            "copied": len(repeated),
            "most": [(n, beginning(text, 150)) for n, text in repeated if text][:3],
        }


class Highest:
    """The n documents of the highest values, each once."""

    def __init__(self, n):
        self.n, self.best = n, []  # [(value, key, the beginning), ...]

    def add(self, value, key, text):
        if len(self.best) == self.n and value <= self.best[-1][0]:
            return
        if all(key != other for _, other, _ in self.best):
            self.best.append((value, key, beginning(text, 300)))
            self.best.sort(key=lambda entry: -entry[0])  # of equal values the first document stays
            del self.best[self.n :]

    def facts(self):
        return [(abs(value), text) for value, _, text in self.best]


class ConversationStats:
    """What only conversations have: turns, system messages, calls, and questions with several answers."""

    def __init__(self):
        self.n = self.n_targets = self.n_tokens = self.n_with_calls = 0
        self.user_turns, self.systems = Counter(), Counter()
        # {hash of all that was said before an answer: (what was said last, {answer: how often})}
        self.questions = Bounded(KEYS // 10)

    def add(self, turns, tokenizer):
        """Add a conversation; return its tokens, as sft.py trains on them."""
        ids, mask = tokenizer.render(turns)
        self.n += 1
        self.n_tokens += len(mask) - 1
        self.n_targets += sum(mask)
        self.user_turns[sum(turn["role"] == "user" for turn in turns)] += 1
        parts = [part for turn in turns for part in as_parts(turn["content"])]
        self.n_with_calls += any(part["type"] != "text" for part in parts)
        before = last = ""
        for turn in turns:
            words = " ".join(transcript(turn["content"]).split())
            if turn["role"] == "system" and (words[:200] in self.systems or len(self.systems) < 1000):
                self.systems[words[:200]] += 1
            if turn["role"] == "assistant":
                entry = self.questions.entry(digest(utf8(before)), (last[:200], Counter()))
                if entry:
                    entry[1][words[:200]] += 1
            before, last = f"{before}{turn['role']} {normalised(words)}\n", words
        return ids[1:]

    def facts(self):
        several = [(question, answers) for question, answers in self.questions.values() if len(answers) > 1]
        several.sort(key=lambda entry: -len(entry[1]))
        return {
            "user_turns": dict(sorted(self.user_turns.items())),
            "with_system": self.systems.total() / self.n,
            "systems": self.systems.most_common(3),
            "with_calls": self.n_with_calls / self.n,
            "targets": self.n_targets / self.n_tokens,
            "every": self.questions.every,
            "questions": len(self.questions),
            "asked_again": sum(answers.total() > 1 for _, answers in self.questions.values()),
            "several_answers": len(several),
            "examples": [(question, answers.most_common(3)) for question, answers in several[:5]],
        }


def normalised(question):
    """A form that a question shares with those that ask the same: "who are you" of "Who are you?"."""
    return question.lower().removesuffix("?").removesuffix(".").removesuffix("!")


# ------------------------------------------------------------------------------------------------------------
# The page

WIDTH = 110


def page(name, facts):
    """The facts as text, for a person to read in a minute or to look into for a quarter of an hour."""
    unit, per_byte = facts["unit"], facts["tokens"] / facts["bytes"]
    some = f"{facts['looked_into']:,} looked into have " if facts["every"] > 1 else ""
    parts = [
        f"{name}: {facts['documents']:,} {unit}s",
        f"  {some}{size(facts['bytes'])} of text, {count(facts['tokens'])} tokens of {facts['tokenizer']}; "
        f"{per_byte:.3f} tokens a byte, {1 / per_byte:.2f} bytes a token",
        *(f"  ! {text}" for text in findings(facts)),
        section(f"tokens in a {unit}", length_lines(facts)),
        section("most frequent tokens", token_lines(facts), most=3),
        section("sources", source_lines(facts)),
        section("languages", language_lines(facts)),
        section("copies", copy_lines(facts)),
    ]
    if facts["talk"]:
        parts.append(section("turns and answers", talk_lines(facts["talk"])))
    for kind, form in EXTREMES.items():
        lines = [f"{form.format(value)}: {flat(text)}" for value, text in facts["extremes"][kind]]
        if lines:
            parts.append(section(kind, lines))
    lines = [f"{i}. {flat(text)}" for i, text in enumerate(facts["random"], 1)]
    parts.append(section(f"{len(lines)} of {facts['looked_into']:,} {unit}s, at random", lines, most=3))
    return "\n".join(parts)


def section(title, texts, most=2):
    """A title, and below it texts of at most so many lines each."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="      ", max_lines=most)
    wrap.placeholder = " ..."
    return "\n".join(["", title, *(wrap.fill(text) for text in texts)])


def flat(text):
    r"""A text in one line: a line break is \n."""
    return visible(utf8(text))


def sample_of(every):
    """What the page says of things of which only every n-th is known."""
    return f" (a sample of 1 of {every})" if every > 1 else ""


def percent(share):
    """A share as a person reads it: 42%, 4.2%, 0.42%."""
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"


def findings(facts):
    """Yield what a person should look at first."""
    unit, longest, spoken = facts["unit"], facts["lengths"]["longest"], facts["languages"] or {"": 1}
    for key, what, usual in (("duplicates", f"{unit}s", 0), ("paragraphs", "paragraphs", 0.02)):
        share = facts[key]["copies"] / max(1, facts[key]["compared"])
        if share > usual:
            yield f"{percent(share)} of the {what} are copies of others"
    if longest > 0.05 * facts["tokens"] and facts["looked_into"] > 20:
        yield f"the longest {unit} has {percent(longest / facts['tokens'])} of all tokens"
    if max(spoken.values()) < 0.9:
        yield f"only {percent(max(spoken.values()))} of the {unit}s are in one language"
    if facts["empty"]:
        yield f"empty {unit}s: {facts['empty']:,}"
    if facts["with_replacement_characters"]:
        yield f"{unit}s with U+FFFD, bytes that were no text: {facts['with_replacement_characters']:,}"
    if facts["with_nul"]:
        yield f"{unit}s with NUL characters, no text or in another encoding: {facts['with_nul']:,}"
    if facts["bad_lines"]["n"]:
        yield f"bad lines: {facts['bad_lines']['n']:,}; the first is {facts['bad_lines']['first'][0]}"
    if facts["talk"] and facts["talk"]["several_answers"]:
        yield f"questions with several answers: {facts['talk']['several_answers']:,}"


def length_lines(facts):
    n = {name: f"{value:,.0f}" for name, value in facts["lengths"].items()}
    yield f"median {n['median']}, mean {n['mean']}; a tenth up to {n['10%']}, a tenth from {n['90%']} on"
    most = max(number for _, _, number in facts["histogram"])
    for low, high, number in facts["histogram"]:
        yield f"{low:>10,} to {high:<10,} {number:>9,} {'#' * round(60 * number / most)}"


def token_lines(facts):
    words = [f'"{word}" {percent(share)}' for word, share in facts["frequent_tokens"]]
    yield "  ".join(word.replace(" ", "\N{NO-BREAK SPACE}") for word in words)  # else lines would break there
    yield f"{facts['tokens_used']:,} of {facts['vocab_size']:,} tokens are used"


def source_lines(facts, most=8):
    sources = list(facts["sources"].items())
    for name, n in sources[:most]:
        share = percent(n["bytes"] / facts["bytes"])
        yield f"{share:>6}  {name}: {n['documents']:,} {facts['unit']}s, {count(n['tokens'])} tokens"
    if sources[most:]:
        rest = sum(n["bytes"] for _, n in sources[most:])
        yield f"{percent(rest / facts['bytes']):>6}  {len(sources) - most} others"
    for source in facts["meta"].get("sources", []):
        shown = [key for key in source if "sha256" not in key and key != "cleaning"]
        yield "from " + ", ".join(f"{key} {source[key]}" for key in shown)
        for step, came in source.get("cleaning", {}).get("steps", {}).items():
            rules = [(rule, lost["bytes"]) for rule, lost in came["dropped"].items() if lost["bytes"]]
            amounts = [f"{came['documents']:,} documents", size(came["bytes"])]
            amounts += [f"−{size(n_bytes)} by {rule}" for rule, n_bytes in rules]
            yield f"cleaning, {step}: {', '.join(amounts)}"
    for what in ("left_out", "dropped"):
        if facts["meta"].get(what):
            yield f"{what.replace('_', ' ')} before: {json.dumps(facts['meta'][what])}"


def language_lines(facts):
    if facts["languages"] is None:
        yield "unknown; to find them out: pip install -r requirements-clean.txt"
    else:
        shares = ", ".join(f"{language} {percent(share)}" for language, share in facts["languages"].items())
        yield f"{shares} (of {min(SAMPLE, facts['looked_into']):,} {facts['unit']}s)"


def copy_lines(facts):
    for what, copies in ((f"{facts['unit']}s", facts["duplicates"]), ("paragraphs", facts["paragraphs"])):
        share = percent(copies["copies"] / max(1, copies["compared"]))
        of = f"{copies['compared']:,} {what}{sample_of(copies['every'])}"
        if not copies["copies"]:
            yield f"no copies among {of}"
        else:
            yield f"{copies['copies']:,} ({share}) of {of} are copies of {copies['copied']:,} others"
        for n, text in copies["most"]:
            yield f"{n:>7,} x  {flat(text)}"


def talk_lines(talk):
    yield "turns of the user: " + ", ".join(f"{n}: {times:,}" for n, times in talk["user_turns"].items())
    systems = "; ".join(f"{times:,} x {flat(text)}" for text, times in talk["systems"])
    yield f"{percent(talk['with_system'])} have a system message {systems}"
    yield f"{percent(talk['with_calls'])} call tools; {percent(talk['targets'])} of the tokens are targets"
    different = f"{talk['questions']:,} different questions{sample_of(talk['every'])}"
    several = f"{talk['several_answers']:,} have several answers"
    yield f"{different}; {talk['asked_again']:,} came more than once, {several}"
    for question, answers in talk["examples"]:
        yield f"{flat(question)} -> " + " | ".join(f"{times} x {flat(text)}" for text, times in answers)


# ------------------------------------------------------------------------------------------------------------
# The picture


def draw(name, look, facts, out):
    """Lengths, frequent tokens, sources; copies, languages, and where the outliers are."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 8))
    (lengths, tokens, sources), (copies, spoken, outliers) = axes
    unit = facts["unit"]

    lengths.hist(np.log2(np.maximum(look.lengths, 1)), bins=60)
    ticks = range(0, int(max(look.lengths)).bit_length() + 1, 2)
    lengths.set_xticks(ticks, [f"{1 << n:,}" for n in ticks], rotation=45)
    lengths.set(title=f"tokens in a {unit}", ylabel=f"{unit}s")

    bars(tokens, "most frequent tokens", {f'"{word}"': share for word, share in facts["frequent_tokens"]})
    shares = {name: n["bytes"] / facts["bytes"] for name, n in facts["sources"].items()}
    bars(sources, "bytes by source", shares, most=10)
    bars(spoken, "languages", facts["languages"] or {}, most=10)

    for what, repeats in ((f"{unit}s", look.copies), ("paragraphs", look.paragraphs)):
        texts_of = Counter(n for n, _ in repeats.times.values()) or {1: 0}  # {how often: so many texts}
        times, n_texts = zip(*sorted(texts_of.items()))
        copies.loglog(times, n_texts, "o", markersize=3, label=what)
    copies.set(title="copies", xlabel="how often the same text is there", ylabel="texts")
    copies.legend()
    for axis in (copies.xaxis, copies.yaxis):
        axis.set_major_formatter("{x:,.0f}")

    measured = [measures for _, measures in look.sample if measures]
    x, y = [100 * others for _, others in measured], [100 * packed for packed, _ in measured]
    outliers.scatter(x, y, s=4)
    outliers.set(title=f"{len(measured):,} {unit}s at random", xlabel="% signs other than letters")
    outliers.set_ylabel("% of its size when compressed")

    figure.suptitle(f"{name}: {facts['documents']:,} {unit}s, {count(facts['tokens'])} tokens")
    plot.write(figure, axes.flat, out)


def bars(axes, title, shares, most=20):
    """Horizontal bars of the first shares; the others are one bar."""
    rows = list(shares.items())[:most]
    if len(shares) > most:
        rows.append(("others", sum(list(shares.values())[most:])))
    names = [name[:24].replace("$", r"\$") for name, _ in rows]  # between two $ stands mathematics
    axes.barh(range(len(rows)), [100 * share for _, share in rows])
    axes.set_yticks(range(len(rows)), names, fontsize=7 if len(rows) > 12 else 9)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="%")
