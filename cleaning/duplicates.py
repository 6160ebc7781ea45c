"""What texts have in common: n-grams of words, paragraphs, and whole documents, exactly or nearly.

Texts are compared by hashes of their words. Read clean.py before this file.
"""

import functools
import hashlib
import json
import re
import zlib
from pathlib import Path

import numpy as np

import common
from cleaning import formats
from common import UserError


def words_of(text):
    """The words of a text without case and punctuation, a list."""
    return re.findall(r"\w+", text.lower())


LONG_LINE = 100  # characters: text is wrapped into shorter lines
BLANK_LINE, LINE_BREAK = r"(\n\s*\n)", r"(\n(?:\s*\n)?)"


def paragraphs(text):
    """The paragraphs of a text, each with the line breaks behind it: joined, they are the text.

    If most of the text is in long lines, each line is a paragraph. Otherwise its paragraphs are wrapped into
    short lines, and blank lines separate them; if there is no blank line, each line is a paragraph, too.
    """
    n_in_long_lines = sum(len(line) for line in text.split("\n") if len(line) > LONG_LINE)
    is_wrapped = n_in_long_lines <= len(text) // 2 and re.search(BLANK_LINE, text)
    parts = re.split(BLANK_LINE if is_wrapped else LINE_BREAK, text)
    return [part + gap for part, gap in zip(parts[::2], [*parts[1::2], ""])]


# ------------------------------------------------------------------------------------------------------------
# Hashes: of paragraphs, of n-grams, and of whole documents by MinHash

EVALUATION_NGRAM = 13  # words, as GPT-3 (Brown et al. 2020, appendix C)
SHINGLE = 5  # words
JACCARD = 0.8

# Documents of similarity s share one of B bands of R hashes with probability 1 - (1 - s^R)^B: 0.998 for 0.8,
# 0.27 for 0.5. The share of equal hashes of all then estimates s; for 0.8 its standard deviation is 0.037.
N_BANDS, ROWS = 20, 6
_random = np.random.default_rng(8)
FACTORS = _random.integers(0, 2**32, N_BANDS * ROWS, np.uint32) | np.uint32(1)
SUMMANDS = _random.integers(0, 2**32, N_BANDS * ROWS, np.uint32)
MIX = _random.integers(0, 2**64, 16, np.uint64) | np.uint64(1)


def hash64(content):
    """64 bits of BLAKE2 of bytes, an int."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@functools.lru_cache(1 << 16)
def hash_word(word):
    return zlib.crc32(word.encode("utf-8", "replace"))


def hashes_of(words):
    """A hash of each word, (len(words),) uint64."""
    return np.fromiter(map(hash_word, words), np.uint64, len(words))


def ngrams(hashes, n):
    """Hashes of all n-grams, from those of the words: (len(hashes) - n + 1,) uint64, or (0,)."""
    n_grams = max(len(hashes) - n + 1, 0)
    grams = np.zeros(n_grams, np.uint64)
    for i in range(n):
        grams = extend_ngrams(grams, hashes[i : i + n_grams], i + 1)
    return grams


def extend_ngrams(grams, hashes, n):
    """Hashes of n-grams, (k,) uint64, from those of their first n - 1 words and of their last word."""
    grams = (grams ^ hashes) * MIX[n]  # modulo 2^64
    return grams ^ (grams >> np.uint64(32))


def minhash(hashes):
    """A document's band hashes, of which similar documents share at least one, and its signature.

    MinHash (Broder 1997): documents are compared by the sets of their word 5-grams. With probability s, the
    Jaccard similarity of two sets, a random function takes its minimum over both sets at the same 5-gram. The
    signature is the lowest 8 bits of N_BANDS * ROWS such minima, enough to estimate s (Li & König 2010). The
    shapes are (N_BANDS,) uint64 and (N_BANDS * ROWS,) uint8.
    """
    shingles = ngrams(hashes, min(SHINGLE, max(len(hashes), 1)))
    shingles = (np.unique(shingles) >> np.uint64(32)).astype(np.uint32)  # (n,)
    minima = np.full(N_BANDS * ROWS, 2**32 - 1, np.uint32)
    for i in range(0, len(shingles), 512):  # 246 KB at a time, which a cache holds
        values = FACTORS[:, None] * shingles[i : i + 512] + SUMMANDS[:, None]  # modulo 2^32
        np.minimum(minima, values.min(axis=1), out=minima)
    bands = np.arange(N_BANDS, dtype=np.uint64)
    for row in minima.reshape(N_BANDS, ROWS).T:  # (N_BANDS,)
        bands = (bands ^ row) * MIX[0]
        bands ^= bands >> np.uint64(29)
    return bands, minima.astype(np.uint8)


def find(keys, known):
    """For each key its place in the sorted array `known`, -1 if it is not there."""
    if not len(known):
        return np.full(len(keys), -1)
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[places] == keys, places, -1)


def read_evaluation_files(paths):
    """The hashes of all 13-grams in evaluation files, sorted. An item is a line of JSON, or a text file."""
    found, n_short = [np.zeros(0, np.uint64)], 0
    for path in paths:
        text = formats.read_text(path)
        if Path(path).suffix == ".jsonl":
            lines = [
                (f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()
            ]
            items = [strings_of(where, line) for where, line in lines]
        else:
            items = [text]
        hashes = [ngrams(hashes_of(words_of(item)), EVALUATION_NGRAM) for item in items]
        n_short += sum(len(grams) == 0 for grams in hashes)
        found += hashes
    if n_short:
        what = f"evaluation items of fewer than {EVALUATION_NGRAM} words, which cannot be looked for"
        common.say(f"note: {what}: {n_short}")
    return np.unique(np.concatenate(found))


def strings_of(where, line):
    """All strings in a line of JSON, one behind the other."""
    try:
        waiting, strings = [json.loads(line)], []
    except (ValueError, RecursionError):
        raise UserError(f"{where} is no JSON; correct or delete it") from None
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, (list, dict)):
            waiting = [*(value.values() if isinstance(value, dict) else value), *waiting]
    return " ".join(strings)


# ------------------------------------------------------------------------------------------------------------
# Comparing with what came before


class HashTable:
    """A dict of 64-bit hashes in 12 bytes an entry: the first number that was put at a hash stays.

    Most entries are a sorted array. The newest are a dict, which is merged into it before it becomes large.
    """

    NEWEST = 1 << 20

    def __init__(self):
        self.keys, self.numbers = np.zeros(0, np.uint64), np.zeros(0, np.uint32)
        self.newest = {}

    def get(self, keys):
        """The numbers at these hashes, (n,) uint64; a list, None where nothing was put."""
        places = find(keys, self.keys)
        numbers = self.numbers[places].tolist() if len(self.keys) else [None] * len(keys)
        return [
            number if place >= 0 else self.newest.get(key)
            for key, place, number in zip(keys.tolist(), places.tolist(), numbers)
        ]

    def put(self, keys, number):
        """Put a number at these hashes."""
        for key, there in zip(keys.tolist(), self.get(keys)):
            if there is None:
                self.newest[key] = number
        if len(self.newest) >= self.NEWEST:
            new = np.fromiter(self.newest, np.uint64, len(self.newest))
            order = np.argsort(new)
            places = np.searchsorted(self.keys, new[order])
            numbers = np.fromiter(self.newest.values(), np.uint32, len(new))
            self.keys = np.insert(self.keys, places, new[order])
            self.numbers = np.insert(self.numbers, places, numbers[order])
            self.newest = {}


class DuplicateIndex:
    """What was kept so far, to find near duplicates and repeated paragraphs.

    It takes about 360 bytes a document, and 12 for each of its paragraphs.
    """

    BLOCK = 1 << 14

    def __init__(self):
        self.bands, self.paragraphs = HashTable(), HashTable()
        self.signatures, self.n_documents = [], 0  # [(BLOCK, N_BANDS * ROWS) uint8, ...]

    def without_repeats(self, document, counts):
        """What is left of a Cleaned, its text; "" if it is dropped."""
        text = document.text
        if document.bands is not None:
            counts.enter("near duplicates", text)
            if self.is_near(document):
                counts.drop("near duplicates", f"similarity {JACCARD} or more", document, text)
                return ""
        if document.paragraphs is not None:
            counts.enter("paragraphs", text)
            text = self.new_paragraphs(document, counts)
        return text

    def is_near(self, document):
        """Whether a document is nearly one before; if it is not, later ones are compared with it."""
        for number in {number for number in self.bands.get(document.bands) if number is not None}:
            signature = self.signatures[number // self.BLOCK][number % self.BLOCK]
            equal = np.count_nonzero(signature == document.signature) / len(signature)
            if (equal - 1 / 256) / (1 - 1 / 256) >= JACCARD:  # 8 bits are equal by chance once in 256 times
                return True
        if self.n_documents % self.BLOCK == 0:
            self.signatures.append(np.zeros((self.BLOCK, N_BANDS * ROWS), np.uint8))
        self.signatures[-1][self.n_documents % self.BLOCK] = document.signature
        self.bands.put(document.bands, self.n_documents)
        self.n_documents += 1
        return False

    def new_paragraphs(self, document, counts):
        """The text of a document without its paragraphs that stood before; "" if no long one is left."""
        text, keys = document.text, document.paragraphs.tolist()
        before = self.paragraphs.get(document.paragraphs)
        left, new = [], set()  # new: the hashes of long paragraphs that are left
        for paragraph, key, number in zip(paragraphs(text), keys, before):
            if key and (number is not None or key in new):
                counts.cut("paragraphs", "stood before", document, paragraph)
                continue
            left.append(paragraph)
            if key:
                new.add(key)
        self.paragraphs.put(np.array(sorted(new), np.uint64), 0)
        rest = "".join(left)
        if not new and len(left) < len(keys):
            counts.drop("paragraphs", "nothing else in the document", document, rest)
            return ""
        return rest.rstrip() if len(left) < len(keys) else text


def is_long(paragraph):
    """Whether a paragraph is compared with others: shorter ones are headings, which many documents share."""
    return len(paragraph.split()) >= 5
