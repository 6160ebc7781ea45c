"""What is in the data: a page of text and a picture, to be looked at before anything is trained on it.

    python data.py inspect shards/factbook        shards
    python data.py inspect texts/ notes.md        text files, and folders of them
    python data.py inspect my.jsonl               conversations, in files as sft.py reads them

Documents are read one at a time, and what is remembered of them is bounded, so data of any size can be looked
at. Of large data every n-th document is looked into. It is chosen by a hash of its text, so that a sample has
all copies of a document or none of them. Read data.py and tokenizer.py before this file.
"""

import itertools
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

import matplotlib.pyplot as plt
import numpy as np

import common
import data
from cleaning import formats, rules
from cleaning.duplicates import hash64, paragraphs
from common import UserError, count, size
from extras import plot
from tasks.conversations import parsed
from tokenizer import Tokenizer, as_parts, transcript, utf8, visible

SHARD_TOKENS, TEXT_BYTES = 100_000_000, 100_000_000  # of larger data a sample of this size is looked into
BATCH_TOKENS, BATCH_BYTES = 1 << 20, 1 << 22  # of a shard or of texts, looked at together
LONGEST = 1 << 24  # characters or tokens: a longer document is cut
KEYS = 1_000_000  # different texts that are counted, some 200 bytes of memory each
SAMPLE = 1000  # random documents, for languages and picture; ten of them are printed
SOURCES = 10_000  # sources that are counted one by one; documents of any other belong to "others"
PARAGRAPH = 40  # bytes: a shorter paragraph is a title or an item of a list, and not compared
LETTERS = string.ascii_letters.encode() + string.whitespace.encode() + bytes(range(128, 256))


def show(flags):
    """What `data.py inspect` does: print the page and draw the picture."""
    first, name = Path(flags.paths[0]), ", ".join(flags.paths)
    if first.is_dir() and any(first.glob("*_*_*.bin")):
        if len(flags.paths) > 1:
            raise UserError(f"{first} has shards; look at them alone, without {flags.paths[1]}")
        look, batches, progress = open_shards(first, flags.seed)
    elif first.suffix == ".bin":
        raise UserError(f"{first} is a shard; name its folder, {first.parent}, which has the tokenizer")
    else:
        look, batches, progress = open_files(flags)
    for documents, n_read in batches:
        look.add(documents)
        progress.add(n_read)
    if not look.lengths:
        bad = f": {look.first_bad}" if look.n_bad else ""
        raise UserError(f"there is no document in {name}{bad}; give other files")
    progress.done()
    look.finish()
    print(common.printable(page(name, look)))
    out = Path(flags.out or (first / "inspect.png" if first.is_dir() else f"{first}.png"))
    if out.suffix not in (".png", ".pdf", ".svg"):
        out = Path(f"{out}.png")
    draw(name, look, out)
    common.say(f"the picture: {out}")


# ------------------------------------------------------------------------------------------------------------
# Reading. open_shards() and open_files() return a Look, what it is to be shown, in batches of (Documents, how
# much was read for them), and the Progress that counts that.


@dataclass
class Document:
    """A document as it was read: the tokens of a shard, or a text."""

    source: str
    key: int  # a hash of its content
    text: bytes = None  # None: not decoded yet
    ids: object = None  # (n,) token ids, an array or a list; None: not encoded yet
    turns: list = None  # of a conversation


def open_shards(directory, seed):
    """Begin to look at the shards of a directory, its training and its validation split."""
    tokenizer = Tokenizer.load(directory)
    splits = [split for split in ("train", "val") if any(directory.glob(f"*_{split}_*.bin"))]
    splits = {split: shards_there(directory, split) for split in splits}
    n_tokens = sum(len(shard) for shards in splits.values() for shard in shards)
    look = Look(tokenizer, "document", n_tokens / SHARD_TOKENS, seed)
    if (directory / "meta.json").exists():
        look.meta = data.meta(directory)
    batches = (from_shards(split, shards, tokenizer) for split, shards in splits.items())
    return look, itertools.chain.from_iterable(batches), common.Progress("looking", n_tokens, " tokens")


def shards_there(directory, split):
    """The shards of a split, without those that are still being downloaded."""
    shards = data.shards(directory, split)
    there = [shard for shard in shards if not isinstance(shard, data.LateShard)]
    if len(there) < len(shards):
        what = f"{len(shards) - len(there)} of {len(shards)} {split} shards are"
        common.say(f"note: {what} not here yet, and left out")
    return there


def from_shards(split, shards, tokenizer):
    """Yield the documents of a split. One may begin in one shard and end in the next."""
    left = np.zeros(0, np.uint16)  # the document that is not complete yet
    for shard in shards:
        for start in range(0, len(shard), BATCH_TOKENS):
            block = shard[start : start + BATCH_TOKENS]
            if block.max() >= tokenizer.vocab_size:
                what = f"{shard.filename} has token {block.max()}"
                raise UserError(f"{what}, but the vocabulary ends at {tokenizer.vocab_size - 1}")
            tokens = np.concatenate([left, block])
            *pieces, left = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
            if len(left) > LONGEST:
                pieces, left = [*pieces, left], left[:0]
            yield shard_documents(split, pieces, tokenizer), len(block)
    yield shard_documents(split, [left], tokenizer), 0


def shard_documents(split, pieces, tokenizer):
    """Documents of the arrays of tokens that begin at each <|endoftext|>, which is left out."""
    all_ids = [ids[ids != tokenizer.eot] for ids in pieces if len(ids)]
    return [Document(split, hash64(ids.tobytes()), ids=ids) for ids in all_ids]


def open_files(flags):
    """Begin to look at text files; or at conversations, if the first file has some."""
    paths = data.text_files(flags.paths, otherwise=", or what data.py text makes of it")
    tokenizer = Tokenizer.named("gpt2" if flags.tokenizer == "bpe" else flags.tokenizer)  # none is learned
    n_bytes = sum(path.stat().st_size for path in paths)
    unit = "conversation" if has_conversations(paths[0]) else "document"
    look = Look(tokenizer.with_chat_tokens(), unit, n_bytes / TEXT_BYTES, flags.seed)
    return look, from_files(paths, look), common.Progress("looking", n_bytes, form=size)


def from_files(paths, look):
    """Yield the documents or conversations in files, in batches."""
    for path in paths:
        source = path.name if len(paths) <= 20 else str(path.parent)  # few enough for the page
        documents = conversations(path, source, look) if look.talk else texts(path, source)
        for batch in formats.in_batches(documents, attrgetter("text"), BATCH_BYTES):
            yield batch, sum(len(document.text) for document in batch)


def texts(path, source):
    """Yield the documents of a text file."""
    for _, text in data.read_texts([path], LONGEST):
        content = utf8(text)
        yield Document(source, hash64(b" ".join(content.split())), content)


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


def conversations(path, source, look):
    """Yield the conversations of a file; the lines that sft.py would refuse are counted in `look`."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                turns, named = parsed(line)
            except UserError as error:
                look.n_bad += 1
                look.first_bad = look.first_bad or f"{path}, line {number}: {error}"
                continue
            content = utf8("\n".join(f"{turn['role']}: {transcript(turn['content'])}" for turn in turns))
            where = named if isinstance(named, str) else source
            yield Document(where, hash64(content), content, turns=turns)


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
        self.tokenizer, self.unit, self.meta = tokenizer, unit, {}
        ids = range(tokenizer.vocab_size)
        self.words = np.array([tokenizer.token_bytes(id) for id in ids], object)  # (V,)
        self.every = max(1, round(times_too_large))
        self.rng = random.Random(seed)
        self.n_documents = self.n_empty = self.n_bad = 0
        self.first_bad = ""  # what is wrong with the first bad line
        # Of the documents looked into:
        self.n_bytes = self.n_tokens = self.n_damaged = self.n_with_nul = 0
        self.lengths = array("Q")  # tokens of each
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)  # (V,) how often each token is there
        self.sources = {}  # {source: Counter of documents, bytes, tokens}
        self.copies, self.paragraphs = Repeats(KEYS), Repeats(KEYS)
        self.extremes = {kind: [] for kind in EXTREMES}  # {kind: [(value, key, beginning), ...]}
        self.sample = []  # SAMPLE at random: (beginning, (compressed(), non_letters()) or None)
        self.talk = ConversationStats() if unit == "conversation" else None
        self.languages, self.frequent = None, []  # {language: share}, [(token, share), ...], by finish()

    def add(self, documents):
        """Count some documents, and look into every n-th of them."""
        self.n_documents += len(documents)
        filled = []
        for document in documents:
            content = document.ids if document.text is None else document.text.strip()
            if len(content):
                filled.append(document)
        self.n_empty += len(documents) - len(filled)
        wanted = [document for document in filled if document.key % self.every == 0]
        self.complete(wanted)
        for document in filled:
            self.copies.add(document.key, document.text or b"")
        for document in wanted:
            self.look_into(document)
        if wanted:
            ids = np.concatenate([document.ids for document in wanted]).astype(np.int64)
            self.counts += np.bincount(ids, minlength=len(self.counts))

    def complete(self, documents):
        """Give documents the text or the tokens that they do not have yet."""
        plain = []
        for document in documents:
            if document.text is None:
                document.text = b"".join(self.words[document.ids])
            elif document.turns:
                document.ids = self.talk.add(document.turns, self.tokenizer)
            else:
                plain.append(document)
        all_ids = self.tokenizer.encode_batch([document.text.decode() for document in plain])
        for document, ids in zip(plain, all_ids):
            document.ids = ids

    def look_into(self, document):
        """Count what is in a document."""
        text, n_tokens = document.text, len(document.ids)
        self.n_bytes += len(text)
        self.n_tokens += n_tokens
        self.n_damaged += b"\xef\xbf\xbd" in text
        self.n_with_nul += b"\0" in text
        self.lengths.append(n_tokens)
        is_new = document.source not in self.sources
        source = "others" if is_new and len(self.sources) >= SOURCES else document.source
        self.sources.setdefault(source, Counter()).update(documents=1, bytes=len(text), tokens=n_tokens)
        for part in paragraphs(text.decode("utf-8", "ignore")):
            paragraph = part.strip().encode()
            if len(paragraph) >= PARAGRAPH:
                self.paragraphs.add(hash64(paragraph), paragraph)

        values, measures = {"longest": n_tokens, "shortest": -n_tokens}, None
        if len(text) >= 100:  # of less repetition and letters say little
            measures = compressed(text), non_letters(text)
            values |= {"most repetitive": -measures[0], "fewest letters": measures[1]}
        for kind, value in values.items():
            keep_highest(self.extremes[kind], value, document)

        kept = text[:2000], measures
        if len(self.lengths) <= SAMPLE:
            self.sample.append(kept)
        elif (place := self.rng.randrange(len(self.lengths))) < SAMPLE:  # so that all have the same chance
            self.sample[place] = kept

    def finish(self):
        """Order what was found, once all documents are added."""
        self.sources = dict(sorted(self.sources.items(), key=lambda item: -item[1]["bytes"]))
        self.rng.shuffle(self.sample)
        self.languages = languages([text for text, _ in self.sample])
        frequent = [id for id in np.argsort(-self.counts, kind="stable")[:20] if self.counts[id]]
        self.frequent = [(f'"{visible(self.words[id])}"', self.counts[id] / self.n_tokens) for id in frequent]


def keep_highest(best, value, document):
    """Add a document to the three of the highest values, [(value, key, beginning), ...], if it is one."""
    is_full = len(best) == 3
    if (is_full and value <= best[-1][0]) or document.key in [key for _, key, _ in best]:
        return
    best.append((value, document.key, beginning(document.text, 300)))
    best.sort(key=lambda entry: -entry[0])  # of equal values the first document stays
    del best[3:]


def compressed(text):
    """The size that zlib leaves of a text, as a share: small if it repeats itself."""
    return len(zlib.compress(text, 1)) / len(text)


def non_letters(text):
    """The share of bytes that are neither letters, of any language, nor white space."""
    return len(text.translate(None, LETTERS)) / len(text)


def languages(texts):
    """{language: share of the texts}; None if what finds them out is not installed."""
    try:
        classifier, found = rules.Language("en"), Counter()
    except UserError:  # it is not installed
        return None
    for text in texts:
        language, confidence = classifier.most_probable(text.decode("utf-8", "ignore"))
        found[language if confidence >= 0.2 else "unclear"] += 1
    return {language: n / len(texts) for language, n in found.most_common()}


def beginning(text, n_bytes):
    r"""The first bytes of a text, in one line: a line break is \n. If the text goes on, ... stands there."""
    whole = text[:n_bytes].decode("utf-8", "ignore").encode()  # without a part of a character at the end
    return visible(whole) + " ..." * (len(text) > n_bytes)


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


class Repeats(Bounded):
    """How often each text came: {hash: [how often, the beginning of the text if it came twice]}."""

    def add(self, key, text):
        entry = self.entry(key, [0, b""])
        if entry:
            entry[0] += 1
            if entry[0] == 2:
                entry[1] = text[:200]  # b"" of a shard's document that is not looked into

    def repeated(self):
        """[[how often, the beginning], ...] of the texts that came more than once, most frequent first."""
        return sorted((entry for entry in self.values() if entry[0] > 1), reverse=True)

    def copies(self):
        """How many texts had come before, and which share of all they are: (number, share)."""
        n_texts = sum(times for times, _ in self.values())
        return n_texts - len(self), (n_texts - len(self)) / max(1, n_texts)


class ConversationStats:
    """What only conversations have: turns, system messages, calls, and questions with several answers."""

    def __init__(self):
        self.n_targets = self.n_with_calls = 0
        self.user_turns, self.systems = Counter(), Counter()
        # {hash of all that was said before an answer: (what was said last, {answer: how often})}
        self.questions = Bounded(KEYS // 10)

    def add(self, turns, tokenizer):
        """Add a conversation; return its tokens, as sft.py trains on them."""
        ids, mask = tokenizer.render(turns)
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
                entry = self.questions.entry(hash64(utf8(before)), (last[:200], Counter()))
                if entry:
                    entry[1][words[:200]] += 1
            normalised = words.lower().rstrip("?.!")  # "who are you" asks the same as "Who are you?"
            before, last = f"{before}{turn['role']} {normalised}\n", words
        return ids[1:]

    def several_answers(self):
        """[(question, {answer: how often}), ...] with more than one answer, most answers first."""
        questions = [entry for entry in self.questions.values() if len(entry[1]) > 1]
        return sorted(questions, key=lambda entry: -len(entry[1]))


# ------------------------------------------------------------------------------------------------------------
# The page

WIDTH = 110
NO_BREAK = "\N{NO-BREAK SPACE}"  # between a token and its share


def page(name, look):
    """The text of the page: what was found, most important first."""
    unit, n_looked, n_tokens, n_bytes = look.unit, len(look.lengths), look.n_tokens, look.n_bytes
    looked = f"{n_looked:,} looked into have " if look.every > 1 else ""
    tokens = "  ".join(f"{token} {percent(share)}".replace(" ", NO_BREAK) for token, share in look.frequent)
    used = f"{np.count_nonzero(look.counts):,} of {len(look.counts):,} tokens are used"
    spoken = "unknown; to find them out: pip install -r requirements-clean.txt"
    if look.languages is not None:
        shares = ", ".join(f"{language} {percent(share)}" for language, share in look.languages.items())
        spoken = f"{shares} (of {len(look.sample):,} {unit}s)"
    copies = [*copy_lines(f"{unit}s", look.copies), *copy_lines("paragraphs", look.paragraphs)]
    parts = [
        f"{name}: {look.n_documents:,} {unit}s",
        f"  {looked}{size(n_bytes)} of text, {count(n_tokens)} tokens of {look.tokenizer.kind}; "
        f"{n_tokens / n_bytes:.3f} tokens a byte, {n_bytes / n_tokens:.2f} bytes a token",
        *(f"  ! {text}" for text in findings(look)),
        section(f"tokens in a {unit}", length_lines(look.lengths)),
        section("most frequent tokens", [tokens, used], most=3),
        section("sources", source_lines(look)),
        section("languages", [spoken]),
        section("copies", copies),
    ]
    if look.talk:
        parts.append(section("turns and answers", talk_lines(look)))
    for kind, form in EXTREMES.items():
        if look.extremes[kind]:
            lines = [f"{form.format(abs(value))}: {text}" for value, _, text in look.extremes[kind]]
            parts.append(section(kind, lines))
    lines = [f"{i}. {beginning(text, 600)}" for i, (text, _) in enumerate(look.sample[:10], 1)]
    parts.append(section(f"{len(lines)} of {n_looked:,} {unit}s, at random", lines, most=3))
    return "\n".join(parts)


def section(title, texts, most=2):
    """A title, and below it texts of at most so many lines each."""
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="      ", max_lines=most)
    wrap.placeholder = " ..."
    return "\n".join(["", title, *(wrap.fill(text) for text in texts)])


def sample_of(every):
    """What the page says behind a number that was counted in a sample."""
    return f" (a sample of 1 of {every})" if every > 1 else ""


def percent(share):
    """A share as a person reads it: 42%, 4.2%, 0.42%."""
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{100 * share:.2g}%"


def findings(look):
    """Yield what a person should look at first."""
    units, longest = f"{look.unit}s", max(look.lengths)
    for what, texts, usual in ((units, look.copies, 0), ("paragraphs", look.paragraphs, 0.02)):
        _, share = texts.copies()
        if share > usual:
            yield f"{percent(share)} of the {what} are copies of others"
    if longest > 0.05 * look.n_tokens and len(look.lengths) > 20:
        yield f"the longest {look.unit} has {percent(longest / look.n_tokens)} of all tokens"
    if look.languages and max(look.languages.values()) < 0.9:
        yield f"only {percent(max(look.languages.values()))} of the {units} are in one language"
    if look.n_empty:
        yield f"empty {units}: {look.n_empty:,}"
    if look.n_damaged:
        yield f"{units} with U+FFFD, bytes that were no text: {look.n_damaged:,}"
    if look.n_with_nul:
        yield f"{units} with NUL characters, no text or in another encoding: {look.n_with_nul:,}"
    if look.n_bad:
        yield f"bad lines: {look.n_bad:,}; the first is {look.first_bad}"
    if look.talk and look.talk.several_answers():
        yield f"questions with several answers: {len(look.talk.several_answers()):,}"


def length_lines(lengths):
    """The quantiles of lengths, and their histogram, in which each row has about twice the length."""
    low, median, high = np.quantile(lengths, [0.1, 0.5, 0.9], method="inverted_cdf")
    averages = f"median {median:,.0f}, mean {np.mean(lengths):,.0f}"
    yield f"{averages}; a tenth up to {low:,.0f}, a tenth from {high:,.0f} on"
    numbers = Counter(length.bit_length() for length in lengths)
    for n_bits in range(min(numbers), max(numbers) + 1):
        low, high, number = (1 << n_bits) // 2, (1 << n_bits) - 1, numbers[n_bits]
        yield f"{low:>10,} to {high:<10,} {number:>9,} {'#' * round(60 * number / max(numbers.values()))}"


def source_lines(look):
    """The eight largest sources; where the data is from, and what was left out, as meta.json says."""
    largest, others = list(look.sources.items())[:8], list(look.sources.items())[8:]
    for name, n in largest:
        share = percent(n["bytes"] / look.n_bytes)
        yield f"{share:>6}  {name}: {n['documents']:,} {look.unit}s, {count(n['tokens'])} tokens"
    if others:
        rest = sum(n["bytes"] for _, n in others)
        yield f"{percent(rest / look.n_bytes):>6}  {len(others)} others"
    for source in look.meta.get("sources", []):
        shown = [key for key in source if "sha256" not in key and key != "cleaning"]
        yield "from " + ", ".join(f"{key} {source[key]}" for key in shown)
        for step, came in source.get("cleaning", {}).get("steps", {}).items():
            dropped = [(rule, n["bytes"]) for rule, n in came["dropped"].items() if n["bytes"]]
            amounts = [f"{came['documents']:,} documents", size(came["bytes"])]
            amounts += [f"−{size(n_bytes)} by {rule}" for rule, n_bytes in dropped]
            yield f"cleaning, {step}: {', '.join(amounts)}"
    for what in ("left_out", "dropped"):
        if look.meta.get(what):
            yield f"{what.replace('_', ' ')} before: {json.dumps(look.meta[what])}"


def copy_lines(what, texts):
    """How many of the texts in a Repeats are copies of others, and the three that came most often."""
    n_copies, share = texts.copies()
    repeated = texts.repeated()
    of = f"{len(texts) + n_copies:,} {what}{sample_of(texts.every)}"
    if repeated:
        yield f"{n_copies:,} ({percent(share)}) of {of} are copies of {len(repeated):,} others"
    else:
        yield f"no copies among {of}"
    for times, text in [entry for entry in repeated if entry[1]][:3]:
        yield f"{times:>7,} x  {beginning(text, 150)}"


def talk_lines(look):
    """What only conversations have."""
    talk, n_looked = look.talk, len(look.lengths)
    turns = ", ".join(f"{n}: {times:,}" for n, times in sorted(talk.user_turns.items()))
    yield f"turns of the user: {turns}"
    systems = "; ".join(f"{times:,} x {visible(utf8(text))}" for text, times in talk.systems.most_common(3))
    yield f"{percent(talk.systems.total() / n_looked)} have a system message {systems}"
    calls, targets = percent(talk.n_with_calls / n_looked), percent(talk.n_targets / look.n_tokens)
    yield f"{calls} call tools; {targets} of the tokens are targets"
    several = talk.several_answers()
    n_again = sum(answers.total() > 1 for _, answers in talk.questions.values())
    different = f"{len(talk.questions):,} different questions{sample_of(talk.questions.every)}"
    yield f"{different}; {n_again:,} came more than once, {len(several):,} have several answers"
    for question, answers in several[:5]:
        some = " | ".join(f"{times} x {visible(utf8(text))}" for text, times in answers.most_common(3))
        yield f"{visible(utf8(question))} -> {some}"


# ------------------------------------------------------------------------------------------------------------
# The picture


def draw(name, look, out):
    """Lengths, frequent tokens, sources, languages, and where the outliers are."""
    rows = [["lengths", "lengths", "tokens"], ["sources", "languages", "outliers"]]
    figure, axes = plt.subplot_mosaic(rows, figsize=(14, 8))
    unit = look.unit

    axes["lengths"].hist(np.log2(np.maximum(look.lengths, 1)), bins=60)
    ticks = range(0, max(look.lengths).bit_length() + 1, 2)
    axes["lengths"].set_xticks(ticks, [f"{1 << n:,}" for n in ticks], rotation=45)
    axes["lengths"].set(title=f"tokens in a {unit}", ylabel=f"{unit}s")

    shares = [(source, n["bytes"] / look.n_bytes) for source, n in look.sources.items()]
    bars(axes["tokens"], "most frequent tokens", look.frequent)
    bars(axes["sources"], "bytes by source", shares, most=10)
    bars(axes["languages"], "languages", list((look.languages or {}).items()), most=10)

    measures = [measures for _, measures in look.sample if measures]
    x, y = [100 * others for _, others in measures], [100 * packed for packed, _ in measures]
    axes["outliers"].scatter(x, y, s=4)
    axes["outliers"].set(title=f"{len(measures):,} {unit}s at random", xlabel="% signs other than letters")
    axes["outliers"].set_ylabel("% of its size when compressed")

    figure.suptitle(f"{name}: {look.n_documents:,} {unit}s, {count(look.n_tokens)} tokens")
    plot.write(figure, axes.values(), out)


def bars(axes, title, shares, most=20):
    """Horizontal bars of the first [(name, share), ...]; the others are one bar."""
    rows = shares[:most]
    if shares[most:]:
        rows.append(("others", sum(share for _, share in shares[most:])))
    names = [name[:24].replace("$", r"\$") for name, _ in rows]  # between two $ stands mathematics
    axes.barh(range(len(rows)), [100 * share for _, share in rows])
    axes.set_yticks(range(len(rows)), names, fontsize=7 if len(rows) > 12 else 9)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="%")
