"""clean.py: every rule, every step, every format; the same output for any number of processes; bad input."""

import functools
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import script
from hypothesis import example, given, settings
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

import clean
import data
from cleaning import duplicates, formats, processes, rules
from cleaning.counts import Counts
from common import UserError
from tokenizer import Tokenizer

HOUSE = Path(__file__).parent.parent
NO_EVALUATION = np.zeros(0, np.uint64)
DE = "Der schnelle braune Fuchs springt über den faulen Hund, während die Kinder im großen Garten spielen. "


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def letters(n, first=0):
    """n different words of five letters."""
    alphabet = "bcdfghjklmnpqrst"
    words = itertools.product(alphabet, repeat=5)
    return ["".join(word) for word in itertools.islice(words, first, first + n)]


NOUNS = (
    "baker sailor sister king town river harbour school bread morning winter garden window letter market "
    "doctor teacher mountain village question answer picture summer kitchen island station evening forest "
    "painter captain neighbour library language history journey number machine weather engine bridge"
)
VERBS = "found lost saw sold painted carried forgot wanted visited watched opened described built repaired"
ADJECTIVES = "old small quiet famous broken yellow distant cheap heavy narrow clever tired modern early"


def prose(seed, n_lines=6):
    """Different English for every seed, which breaks no rule: a paragraph a line."""
    rng = random.Random(seed)

    def thing():
        parts = ("the", "a", "my", "this"), ADJECTIVES.split(), NOUNS.split()
        return " ".join(map(rng.choice, parts))

    def sentence():
        joined = rng.choice(("because", "when", "and", "but", "although", "before"))
        first = f"{thing()} {rng.choice(VERBS.split())} {thing()} of {thing()}"
        text = f"{first}, {joined} {thing()} {rng.choice(VERBS.split())} {thing()} with {thing()}."
        return text[0].upper() + text[1:]

    return "\n".join(f"{sentence()} {sentence()}" for _ in range(n_lines))


def page(text, head=""):
    paragraphs = "".join(f"<p>{line}</p>\n" for line in text.split("\n"))
    menu = "<nav><ul><li><a href='/'>Home</a></li><li><a href='/b'>Log in</a></li></ul></nav>"
    return (
        f"<html><head><title>T</title>{head}</head><body>{menu}<article>{paragraphs}</article></body></html>"
    )


def write_lines(path, rows):
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(command):
    done = script.run(data.main, *f"text --processes 1 {command} --tokenizer bytes --out out".split())
    assert done.status == 0, done.err
    return done


def kept(out="out"):
    """The texts in the shards, sorted."""
    tokenizer, texts = Tokenizer.load(out), []
    for split in ("train", "val"):
        stream = np.concatenate(data.shards(out, split))
        starts = np.flatnonzero(stream == tokenizer.eot)
        texts += [tokenizer.decode(part[1:].tolist()) for part in np.split(stream, starts[1:])]
    return sorted(texts)


def cleaning():
    return data.meta("out")["sources"][0]["cleaning"]


def dropped(step):
    return {rule: n.get("documents", 0) for rule, n in cleaning()["steps"][step]["dropped"].items()}


# ------------------------------------------------------------------------------------------- rules


def repeated(n, n_words):
    """n_words words, the last n of which are the first n."""
    words = letters(n_words - n)
    return " ".join(words + words[:n])


def by_limit(n, times, limit):
    """Two texts in which n * times words of as few as may be, and of one less, are of repeated n-grams."""
    smallest = math.ceil(n * times / limit)
    return smallest, smallest - 1


def marked(mark, n_marked, n=10):
    """n lines, of which the first n_marked end in a mark."""
    return "\n".join(" ".join(letters(6, 6 * i)) + mark * (i < n_marked) for i in range(n))


def copies(n_copies, n, gap):
    """n parts of one length of which n_copies are repetitions."""
    parts = [" ".join(letters(6, 6 * i)) for i in range(n - n_copies)]
    return gap.join(parts + parts[:1] * n_copies)


def longer_first(text, gap):
    """The text with a long first part, so that repetitions are a small share of the characters."""
    return " ".join(letters(300, 1000)) + gap + text


GOPHER_CASES = {  # (what passes, what does not), as near to the threshold as it can be
    "words": (" ".join(letters(50)), " ".join(letters(49))),
    "mean-word-length": ("abc " * 50, "abc " * 49 + "ab"),
    "hashes-per-word": ("#" * 5 + " ".join(letters(50)), "#" * 6 + " ".join(letters(50))),
    "ellipses-per-word": ("… " * 5 + " ".join(letters(45)), "..." * 3 + "…" * 3 + " ".join(letters(50))),
    "bullet-lines": ("- one\n" * 9 + "two", "• one\n" * 10),
    "ellipsis-lines": (marked("...", 3), marked("…", 4)),
    "words-with-a-letter": ("1 2 a3 b c d e f g h", "1 2 3 b c d e f g h"),
    "stop-words": ("nothing but The and of", "nothing but the the the"),
    "duplicate-lines": (longer_first(copies(3, 9, "\n"), "\n"), longer_first(copies(4, 9, "\n"), "\n")),
    "duplicate-paragraphs": (
        longer_first(copies(3, 9, "\n\n"), "\n\n"),
        longer_first(copies(4, 9, "\n\n"), "\n\n"),
    ),
    "characters-of-duplicate-lines": (copies(2, 10, "\n"), copies(3, 10, "\n")),
    "characters-of-duplicate-paragraphs": (copies(2, 10, "\n\n"), copies(3, 10, "\n\n")),
}
for _n, (_rule, (_, _limit)) in zip((2, 3, 4, 5, 6, 7, 8, 9, 10), list(rules.GOPHER_REPETITION.items())[4:]):
    _times = 2 if _n <= 4 else 1  # top: all its occurrences count; duplicate: those after the first
    GOPHER_CASES[_rule] = tuple(repeated(_n, n_words) for n_words in by_limit(_n, _times, _limit))

THREE = "One sentence is here. Is this another one? “Here is the third!”"
C4_CASES = {
    "lorem-ipsum": ("The text is Latin, lorem and ipsum.", "The text is Lorem Ipsum, and so on."),
    "curly-bracket": ("A (round) bracket is no code.", "A {curly} bracket is code."),
    "bad-words": ("This is a class of words.", "This is an ASS of words."),
    "sentences": (THREE, THREE.replace("third!", "third")),
}
C4_LINE_CASES = {
    "terminal-punctuation": ("He said “this is the end of it.”", "a line that ends in nothing"),
    "short-line": ("Five words are a line.", "Four are not enough."),
    "javascript": ("You need a script for this page.", "Please enable JavaScript for this page."),
    "policy": ("These are the terms of our trade.", "These are our Terms of Use for you."),
}


def verdict(text, rule, bad_words=None):
    """What a Cleaner with one rule leaves of a text, None if it drops it; and the rules that it names."""
    others = [other for other in rules.RULES if other != rule]
    steps = {rule.partition(":")[0]: True} | ({"bad_words": bad_words} if bad_words else {})
    counts = Counts()
    left = clean.Cleaner(steps, 0.65, others, NO_EVALUATION).clean(formats.Document("x", text), counts)
    return left and left.text, [rule for _, rule in counts.dropped]


def test_every_rule_is_tested():
    named = [f"gopher:{rule}" for rule in GOPHER_CASES]
    named += [f"c4:{rule}" for rule in (*C4_CASES, *C4_LINE_CASES, "citation")]
    assert sorted(named) == sorted(rules.RULES)


@pytest.mark.parametrize("rule", GOPHER_CASES)
def test_gopher(rule):
    good, bad = GOPHER_CASES[rule]
    assert verdict(good, f"gopher:{rule}") == (good, [])
    assert verdict(bad, f"gopher:{rule}") == (None, [rule])


def test_gopher_drops_very_long_documents():
    assert verdict("word " * 100_000, "gopher:words")[0] and not verdict("word " * 100_001, "gopher:words")[0]


@pytest.mark.parametrize("rule", C4_CASES)
def test_c4_drops_pages(rule, tmp_path):
    good, bad = C4_CASES[rule]
    bad_words = tmp_path / "bad.txt"
    bad_words.write_text("# a list\nass\ndonkey's Tail\n")
    bad_words = bad_words if rule == "bad-words" else None
    assert verdict(good, f"c4:{rule}", bad_words) == (good, [])
    assert verdict(bad, f"c4:{rule}", bad_words) == (None, [rule])
    if bad_words:
        assert verdict("A tail, or the donkey's.", f"c4:{rule}", bad_words)[0]
        assert not verdict("This is the donkey's tail.", f"c4:{rule}", bad_words)[0]


@pytest.mark.parametrize("gap", ["\n", "\n\n"])
@pytest.mark.parametrize("rule", C4_LINE_CASES)
def test_c4_cuts_lines(rule, gap):
    good, bad = C4_LINE_CASES[rule]
    assert verdict(gap.join([good, bad, good]), f"c4:{rule}") == (gap.join([good, good]), [rule])
    assert verdict(gap.join([good, good]), f"c4:{rule}") == (gap.join([good, good]), [])


def test_a_document_that_c4_cuts_whole_is_dropped():
    assert verdict("Not one\nline ends", "c4:terminal-punctuation") == (None, ["no line left"])


def test_c4_cuts_citations():
    assert verdict("So [1] it is [citation needed].", "c4:citation") == ("So it is.", ["citation"])
    assert verdict("So a[i] is [it].", "c4:citation") == ("So a[i] is [it].", [])


def test_c4_judges_lines_without_their_citations():
    cited = "A line that ends in a marker.[1]\nOne, two, three, four.[citation needed]"
    asked = ["c4:terminal-punctuation", "c4:short-line", "c4:citation"]
    cut = [("citation", "[1]"), ("short-line", "One, two, three, four.[citation needed]")]
    assert rules.c4(cited, [], asked, ()) == ("A line that ends in a marker.", None, cut)


def test_wrapped_lines_of_a_paragraph_stay_together():
    text = (
        "A paragraph that is wrapped\ninto two lines of text.\n\nThe second one is\nwrapped as well. Short."
    )
    assert verdict(text, "c4:terminal-punctuation") == (text, [])


WRAPPED = "Two lines make\nthis paragraph."
LONG = (
    "A paragraph in one line, as they are in pages of the web, is longer than the lines of text that wraps."
)


@pytest.mark.parametrize(
    "parts",
    [
        ["One line.\n", "Another.\n", "A third."],
        [f"{WRAPPED}\n\n", f"{WRAPPED}\n \t\n\n", f"  {WRAPPED}\n"],
        ["Title.\n\n", "Please enable JavaScript for this page.\n", f"{LONG}\n", f"{LONG}\n\n\n", LONG],
        [""],
    ],
)
def test_paragraphs(parts):
    assert duplicates.paragraphs("".join(parts)) == parts


@given(st.text("ab \n", max_size=60), st.sampled_from([1, 100]))
def test_paragraphs_are_the_text(text, factor):
    text = text.replace("a", "a" * factor)
    parts = duplicates.paragraphs(text)
    assert "".join(parts) == text and all(part.strip() for part in parts[1:-1])


def test_blank_lines_and_titles_save_no_paragraph(here):
    """Paragraphs are the same whatever is between them, and a line of a page is judged alone."""
    rows = ["Title.\n\n" + C4_LINE_CASES["javascript"][1] + f"\n{prose(1)}"]
    wrapped = [textwrap.fill(prose(i), 72) for i in (2, 3)]
    rows += [f"{wrapped[0]}\n\n\n{WRAPPED}", f"{wrapped[1]}\n\n{WRAPPED}\n".replace("\n", "\r\n")]
    write_lines("a.jsonl", [{"text": row} for row in rows])
    run("a.jsonl --c4 --repeated-paragraphs")
    assert kept() == sorted([prose(1), rows[1], wrapped[1]])


def test_prose_passes_all_rules():
    steps = {"gopher": True, "c4": True, "language": "en"}
    cleaner, counts = clean.Cleaner(steps, 0.65, [], NO_EVALUATION), Counts()
    for seed in range(20):
        text = prose(seed)
        assert cleaner.clean(formats.Document("x", text), counts).text == text
    assert not counts.dropped


# ------------------------------------------------------------------------------------------- language


def test_a_language_is_kept_by_its_score():
    english, german = rules.Language("en"), rules.Language("de")
    assert english.score(prose(1)) > 0.8 and german.score(DE * 3) > 0.9
    scores = [english.score(prose(1, n_lines=n) + "\n" + DE * (12 - 2 * n)) for n in range(1, 7)]
    assert scores == sorted(scores) and scores[0] < 0.3 and scores[-1] > 0.65
    with pytest.raises(UserError, match=r"--language xx is none of af, als, am,.* en, .*zh$"):
        rules.Language("xx")


def test_stop_words_are_asked_of_english_alone(here):
    write_lines(
        "a.jsonl", [{"text": prose(i)} for i in range(3)] + [{"text": DE * 5 + str(i)} for i in range(3)]
    )
    run("a.jsonl --language de --gopher --skip-rules gopher:duplicate-lines " + " ".join(SOME_REPETITION))
    assert dropped("language") == {"de below 0.65": 3} and len(kept()) == 3
    os.rename("out", "german")
    run("a.jsonl --language any --gopher --skip-rules gopher:duplicate-lines " + " ".join(SOME_REPETITION))
    assert len(kept()) == 6


SOME_REPETITION = [f"gopher:{rule}" for rule in list(rules.GOPHER_REPETITION)[4:]]


# ------------------------------------------------------------------------------------------- personal data


@given(st.text("0123456789", min_size=12, max_size=18))
@example("7992739871")  # the example in everybody's article
def test_luhn(digits):
    """One check digit makes a number valid; another digit anywhere makes it invalid."""
    valid = [digits + check for check in "0123456789" if rules.passes_luhn(digits + check)]
    assert len(valid) == 1
    for i, digit in enumerate(valid[0]):
        wrong = str((int(digit) + 1) % 10)
        assert not rules.passes_luhn(valid[0][:i] + wrong + valid[0][i + 1 :])


def with_check_digit(digits):
    return next(digits + check for check in "0123456789" if rules.passes_luhn(digits + check))


words = st.text("abcdefghijk", min_size=1, max_size=8)
PERSONAL = st.one_of(
    st.tuples(st.just("email"), st.builds("{}.{}+x@{}.example.org".format, words, words, words)),
    st.tuples(
        st.just("card"),
        st.from_regex(r"[2-6][0-9]{14}", fullmatch=True)
        .map(with_check_digit)
        .flatmap(lambda n: st.sampled_from([n, " ".join([n[:4], n[4:8], n[8:12], n[12:]])])),
    ),
    st.tuples(st.just("ssn"), st.from_regex(r"[1-5][0-9]{2}-[1-9][0-9]-[1-9][0-9]{3}", fullmatch=True)),
    st.tuples(st.just("ip"), st.builds("8.{}.{}.{}".format, *[st.integers(0, 255)] * 3)),
    st.tuples(st.just("ip"), st.builds("2a00:{:x}::{:x}".format, *[st.integers(1, 65535)] * 2)),
    st.tuples(st.just("phone"), st.from_regex(r"\+[1-9][0-9] [0-9]{3} [0-9]{4,6}", fullmatch=True)),
    st.tuples(st.just("phone"), st.from_regex(r"00[1-9][0-9] [0-9]{2} [0-9]{4,7}", fullmatch=True)),
    st.tuples(st.just("phone"), st.from_regex(r"\([2-9][0-9]{2}\) [2-9][0-9]{2}-[0-9]{4}", fullmatch=True)),
    st.tuples(
        st.just("phone"),
        st.from_regex(r"(1[ -])?[2-9][0-9]{2}[ .-][2-9][0-9]{2}[ .-][0-9]{4}", fullmatch=True),
    ),
)


@settings(max_examples=40)
@given(st.lists(st.tuples(words, PERSONAL), max_size=5), st.sampled_from([" ", ", ", "\n", " ("]))
def test_personal_data_is_masked(items, gap):
    text = gap.join(f"{word} {value}" for word, (_, value) in items)
    masked, found = rules.mask_personal_data(text)
    assert masked == gap.join(f"{word} [{kind}]" for word, (kind, _) in items)
    assert found.total() == len(items)


@pytest.mark.parametrize(
    "number", ["1 (800) 555-1234", "(415) 555 2671", "0049(30)1234567", "+1 415 555 2671"]
)
def test_telephone_numbers_are_masked(number):
    assert rules.mask_personal_data(f"Call {number}.")[0] == "Call [phone]."


@given(st.text("0123456789 +-.:@()abf\n"))
def test_masked_text_has_nothing_to_mask(text):
    masked, _ = rules.mask_personal_data(text)
    assert rules.mask_personal_data(masked) == (masked, {})


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1 192.168.0.7 10.1.2.3 ::1 fe80::1 at 12:30:45, std::vector, version 1.2.3, 1.2.3.4.5",
        "00123456789012 0.0049 30 1234567 1 234 567 890 2024 555 1234 030 1234567 01 23 45 67 89",
        "in rows: 234 567 2024 345 and 1200 345 678 2024",
        "1234567890123456 4111111111111112 2024-05-06 2001-2024 000-12-3456 666-12-3456 123-00-4567",
        "@decorator a@b me@localhost 3.14159265358979 +1 555 1,234,567.89 555-1234 ISBN 978-3-16-148410-0",
    ],
)
def test_what_is_no_personal_data_stays(text):
    assert rules.mask_personal_data(text) == (text, {})


def test_hostile_texts_take_no_time():
    """Of a long row of characters that an expression may try from every place."""
    began = time.monotonic()
    for row in ("a", "1", "1 ", "-", "a.", ":", "[", "{", "[1", "@", "+1", "001 ", "234 "):
        rules.mask_personal_data(row * 100_000)
        rules.gopher_quality(row * 100_000, [])
        rules.c4(row * 100_000, [], rules.RULES, ())
    formats.canonical_url(b"<link rel=canonical " * 3000)
    formats.main_text(
        formats.Document("x", page(f"<pre>a{' ' * 100_000}b</pre>").encode(), is_page=True), Counts()
    )
    assert time.monotonic() - began < 10


# ------------------------------------------------------------------------------------------- duplicates


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 40), max_size=5), st.integers(0, 99)), max_size=40),
    st.integers(1, 9),
)
@settings(max_examples=30)
def test_hash_table_is_a_dict(puts, newest):
    table, expected = duplicates.HashTable(), {}
    table.NEWEST = newest  # so that most entries are merged
    for keys, number in puts:
        table.put(np.array(keys, np.uint64), number)
        for key in keys:
            expected.setdefault(key, number)
        everything = np.arange(41, dtype=np.uint64)
        assert table.get(everything) == [expected.get(key) for key in range(41)]


def test_minhash_finds_what_is_alike():
    """Documents of 400 words of which some are others: found if alike in 0.88 of their word
    5-grams or more, and passed over below 0.70."""
    alike, found, vocabulary = {}, {}, letters(900)
    for seed, n_other in itertools.product(range(12), (1, 3, 4, 10, 16, 20, 24)):
        rng = random.Random(seed)
        first = [rng.choice(vocabulary) for _ in range(400)]
        second = list(first)
        for i in rng.sample(range(400), n_other):
            second[i] = "other"
        sets = [{tuple(words[i : i + 5]) for i in range(396)} for words in (first, second)]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        index = duplicates.DuplicateIndex()
        both = [
            clean.Cleaned("x", "", *duplicates.minhash(duplicates.hashes_of(words)))
            for words in (first, second)
        ]
        assert not index.is_near(both[0])
        alike[seed, n_other], found[seed, n_other] = jaccard, index.is_near(both[1])
    above = [found[key] for key in alike if alike[key] > 0.88]
    below = [found[key] for key in alike if alike[key] < 0.70]
    assert len(above) > 20 and all(above)
    assert len(below) > 20 and not any(below)


def test_near_duplicates_and_paragraphs(here):
    texts = [prose(i, n_lines=9) for i in range(4)]
    near = texts[2].replace(" of ", " from ", 1)
    boilerplate = "All rights to this text are reserved by its author."
    rows = [
        texts[0],
        f"{texts[1]}\n{boilerplate}",
        texts[2],
        near,
        f"{texts[3]}\n{boilerplate}\nShort line.",
        boilerplate,
    ]
    write_lines("a.jsonl", [{"text": text} for text in rows])
    run("a.jsonl --near-duplicates --repeated-paragraphs")
    assert kept() == sorted([texts[0], f"{texts[1]}\n{boilerplate}", texts[2], f"{texts[3]}\nShort line."])
    assert dropped("near duplicates") == {"similarity 0.8 or more": 1}
    assert cleaning()["steps"]["paragraphs"]["dropped"]["stood before"]["parts"] == 2
    assert dropped("paragraphs")["nothing else in the document"] == 1


@pytest.mark.parametrize("name", ["test.txt", "test.jsonl"])
def test_decontamination(here, name):
    test = prose(77).split("\n")[0]
    Path("test.txt").write_text(test)
    write_lines("test.jsonl", [{"question": test, "answers": [{"text": "short"}]}, {"question": "too short"}])
    words = test.split()
    other = " ".join(letters(40))
    texts = {n: f"{other} {' '.join(words[2 : 2 + n]).upper()}, {other}!" for n in (12, 13)}
    write_lines("a.jsonl", [{"text": text} for text in [*texts.values(), prose(1)]])
    done = run(f"a.jsonl --decontaminate {name}")
    assert kept() == sorted([texts[12], prose(1)])
    assert dropped("decontamination") == {"13-gram of an evaluation file": 1}
    assert ("of fewer than 13 words, which cannot be looked for: 1\n" in done.err) == (name == "test.jsonl")


# ------------------------------------------------------------------------------------------- formats

LATIN = "Das Mädchen im Café fühlt sich größer als die Bäume. " * 20
RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 20


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (LATIN.encode(), LATIN),
        (LATIN.encode("utf-8-sig"), LATIN),
        (LATIN.encode("utf-16"), LATIN),
        (LATIN.encode("utf-32"), LATIN),
        (LATIN.encode("utf-16-le"), LATIN),
        (LATIN.encode("utf-16-be"), LATIN),
        (LATIN.encode("cp1252"), LATIN),
        (b"ASCII " * 20_000 + LATIN.encode("cp1252"), "ASCII " * 20_000 + LATIN),
        (RUSSIAN.encode("koi8-r"), RUSSIAN),
        (RUSSIAN.encode("cp1251"), RUSSIAN),
        (LATIN.encode() + b"\xff\xfe", LATIN + "\ufffd\ufffd"),
        ("Ende\ufffd".encode(), "Ende\ufffd"),
    ],
)
def test_encodings_of_texts(here, content, text):
    Path("a.txt").write_bytes(content)
    Path("b.txt.gz").write_bytes(gzip.compress(content))
    read = [document.content for document in formats.Reader().documents(["a.txt", "b.txt.gz"])]
    assert read == [text, text]


@pytest.mark.parametrize(
    ("head", "encoding", "charset"),
    [
        ("<meta charset=utf-8>", "utf-8", None),
        ("<meta charset='iso-8859-1'>", "utf-8", None),  # it says so, but it is not
        ("<meta charset='iso-8859-1'>", "cp1252", None),
        ("<meta http-equiv='Content-Type' content='text/html; charset=windows-1252'>", "cp1252", None),
        ("", "cp1252", "ISO-8859-1"),
        ("<meta charset='no-such-thing'>", "cp1252", None),
        ("", "utf-16", None),
    ],
)
def test_encodings_of_pages(head, encoding, charset):
    text = page(LATIN + "“Zitat”", head)
    assert formats.decode_page(text.encode(encoding), charset)[0] == text


def test_main_text_of_a_page():
    text = prose(5).replace(" with ", "\n   with ")
    markup = page(text.replace("\n   with", " with"), "<script>var x = {}</script>").replace(
        " with ", "\n   with "
    )
    for declared in ("", '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html>\n'):
        document = formats.Document("x", (declared + markup).encode(), is_page=True)
        assert formats.main_text(document, Counts()) == (prose(5), None)
    for empty in (b"", b"<", b"<html><body></body></html>", b"\x00\xff" * 50, b"<div>" * 5000):
        document = formats.Document("x", empty, is_page=True)
        assert formats.main_text(document, Counts())[0] == ""


def test_a_page_of_200_megabytes_is_named_and_passed_over(here):
    Path("large.html").write_text(page(prose(1)))
    os.truncate("large.html", 200_000_000)
    Path("a.html").write_text(page(prose(2)))
    Path("b.html").write_text(page(prose(3)))
    done = run("large.html a.html b.html --show-dropped")
    assert kept() == sorted([prose(2), prose(3)])
    assert dropped("extraction")["larger than 5.24 MB"] == 1 and "large.html: <html>" in done.out


def test_very_long_texts_are_cut(here, monkeypatch):
    """Rows only if the steps would take much memory for them; no piece is too short to be judged."""
    monkeypatch.setattr(formats, "LARGEST_PAGE", 500)
    monkeypatch.setattr(formats, "LONGEST_TEXT", 200)
    text = prose(1, n_lines=9)
    Path("a.txt").write_text(text)
    write_lines("a.jsonl", [{"text": text, "url": "x"}, {"text": "short"}, {"text": text[:400]}])
    found = list(formats.Reader().documents(["a.txt", "a.jsonl"]))
    assert "".join(document.content for document in found) == text + text + "short" + text[:400]
    pieces = [document.content for document in found]
    rows = [document.content for document in found if document.where == "a.jsonl, line 1"]
    assert pieces[: len(rows)] == rows and pieces[-2:] == ["short", text[:400]]
    assert len(rows) > 5 and all(100 <= len(piece) < 300 for piece in rows)


def test_a_text_file_is_judged_whole(here):
    """Its end is too short for Gopher to be a document of its own, whatever --document-chars says."""
    text = prose(1, n_lines=12)
    Path("a.txt").write_text(text)
    run(f"a.txt --gopher --document-chars {len(text) - 20}")
    assert sum(map(len, kept())) == len(text)


def warc(texts, compress=True):
    """[(record, its bytes), ...] of an archive: of each text a page, and things that are no page."""
    records = []
    for i, (kind, text) in enumerate(texts):
        buffer = io.BytesIO()
        writer = WARCWriter(buffer, gzip=compress)
        headers = [("Content-Type", "image/png" if kind == "image" else "text/html; charset=ISO-8859-1")]
        http = StatusAndHeaders("404 Gone" if kind == "gone" else "200 OK", headers, protocol="HTTP/1.1")
        content = io.BytesIO(page(text).encode("cp1252"))
        url = f"https://www{i}.example.org/{i}"
        if kind == "warcinfo":
            writer.write_record(writer.create_warcinfo_record("x.warc", {"software": "ours"}))
        else:
            same = {"WARC-Record-ID": f"<urn:uuid:{i}>", "WARC-Date": "2026-01-01T00:00:00Z"}  # in every run
            record = writer.create_warc_record(
                url, "response", payload=content, warc_headers_dict=same, http_headers=http
            )
            writer.write_record(record)
        records.append(buffer.getvalue())
    return records


WARC = [
    ("warcinfo", ""),
    ("page", prose(1) + "\nDas Café heißt so und nicht anders."),
    ("image", "x"),
    ("gone", "x"),
]
WARC += [("page", prose(i)) for i in (2, 3, 4)]


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "one-member.warc.gz"])
def test_archives(here, name):
    records = b"".join(warc(WARC, compress=name == "a.warc.gz"))
    Path(name).write_bytes(gzip.compress(records) if name.startswith("one") else records)
    Path("blocked.txt").write_text("# bad ones\n0.0.0.0 www4.example.org\nwww9.example.org\n")
    run(f"{name} --blocklist blocked.txt")
    assert kept() == sorted([WARC[1][1], prose(3), prose(4)])
    assert cleaning()["records that are no pages"] == {"warcinfo": 1, "image/png": 1, "status 404": 1}
    assert dropped("blocklist") == {"blocked domain": 1}


def test_the_text_of_archives(here):
    """Common Crawl's .wet files hold the text of the pages instead of the pages."""
    with open("a.warc.wet.gz", "wb") as file:
        writer = WARCWriter(file)
        for i in (1, 2):
            content = io.BytesIO((prose(i) + "\nÉté.").encode())
            writer.write_record(
                writer.create_warc_record("http://example.org", "conversion", payload=content)
            )
    run("a.warc.wet.gz")
    assert kept() == sorted(prose(i) + "\nÉté." for i in (1, 2))


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("harm", ["header", "middle", "cut"])
def test_damaged_records_cost_no_other_record(here, compress, harm):
    records = warc(WARC, compress)
    whole, bad = [prose(2), prose(3), prose(4)], bytearray(records[5])
    if harm == "cut":  # the file ends within its last record
        records[6] = records[6][: len(records[6]) // 2]
        whole.remove(prose(4))
    else:
        place = 2 if harm == "header" else len(bad) // 2
        bad[place : place + 4] = b"\xff\xff\xff\xff"
        records[5] = bytes(bad)
        whole.remove(prose(3))
    Path("a.warc.gz" if compress else "a.warc").write_bytes(b"".join(records))
    reader = formats.Reader()
    texts = [
        formats.main_text(document, Counts())[0] for document in reader.documents(list(Path().glob("a*")))
    ]
    if harm == "middle" and not compress:  # nothing can tell
        assert texts[0] == WARC[1][1] and len(texts) == 4 and not reader.damaged
    else:
        assert texts == [WARC[1][1], *whole]
        assert reader.damaged == {"records of archives": 1}


@pytest.mark.parametrize("harm", ["early", "middle", "cut"])
def test_an_archive_that_is_one_member_ends_at_its_damage(here, harm):
    """What comes before the damage is read, but for a page or two. Wrong bytes gzip may find much later."""
    records = warc([("page", prose(i, n_lines=60)) for i in range(40)], compress=False)
    content = bytearray(gzip.compress(b"".join(records)))
    sure, place = (3, len(content) // 8) if harm == "early" else (18, len(content) // 2)
    content[place : place + 400] = b"\xff" * 400
    assert formats.is_single_member(io.BytesIO(content))
    Path("a.warc.gz").write_bytes(content[:place] if harm == "cut" else content)
    reader = formats.Reader()
    texts = [formats.main_text(document, Counts())[0] for document in reader.documents(["a.warc.gz"])]
    assert texts[:sure] == [prose(i, n_lines=60) for i in range(sure)]
    assert harm != "cut" or len(texts) <= 20
    assert reader.damaged["compressed files"] == 1


@settings(max_examples=60)
@given(
    st.sampled_from(["plain", "members", "one member"]),
    st.integers(0, 5),
    st.floats(0, 1),
    st.integers(0, 300),
    st.binary(max_size=50),
)
def test_any_damage_of_an_archive_is_survived(tmp_path_factory, kind, bad, place, n, new):
    """n bytes of a record are replaced by others: the other records are read, or the damage is counted.

    If the archive is one member of gzip, those before the damage are read.
    """
    records = warc(WARC[4:] * 2, kind == "members")
    if kind == "one member":
        content = gzip.compress(b"".join(records))
        part = len(content) // 6 + 1
        records = [content[i : i + part] for i in range(0, len(content), part)]
    start = int(place * len(records[bad]))
    records[bad] = records[bad][:start] + new + records[bad][start + n :]
    path = tmp_path_factory.mktemp("archive") / ("a.warc" if kind == "plain" else "a.warc.gz")
    path.write_bytes(b"".join(records))
    reader = formats.Reader()
    n_read = len(list(reader.documents([path])))
    assert (n_read >= 4 or kind == "one member") and (n_read >= 5 or reader.damaged)


def test_damaged_record_is_named(here):
    records = warc(WARC)
    Path("a.warc.gz").write_bytes(b"".join([*records[:5], b"rubbish" * 9, *records[6:]]))
    done = run("a.warc.gz")
    assert "note: a.warc.gz, record 6 is damaged; going on behind it\n" in done.err
    assert cleaning()["damaged"] == {"records of archives": 1} and len(kept()) == 3
    assert "records that are no pages: warcinfo (1), image/png (1), status 404 (1)\n" in done.out
    assert "damaged: records of archives (1)\n" in done.out


def test_an_archive_without_pages_says_what_it_has(here):
    Path("a.warc.gz").write_bytes(b"".join(warc([("gone", "x")] * 3)))
    done = script.run(data.main, "text", "a.warc.gz", "--processes", "1", "--out", "out")
    words = "there is no document; records that are no pages: status 404 (3); give other files"
    assert done.status == 2 and words in done.err.splitlines()[-1]


def test_what_is_shown_names_standard_input_and_moves_no_cursor(here, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"too short")))
    Path("b\x1b[2J.txt").write_text("short, too")
    write_lines("c.jsonl", [{"text": prose(i)} for i in range(2)])
    done = run("- . --gopher --show-dropped")
    assert "    standard input: too short\n" in done.out and "    b\ufffd[2J.txt: short, too\n" in done.out


def test_a_compressed_file_that_is_cut_off(here):
    """What comes before the damage is read: half of a text of 170 kB, of a small one, and of a page."""
    lines = [f"line {i} of a text\n" for i in range(9999)]
    texts = {
        "a.txt.gz": "".join(lines),
        "small.txt.gz": "".join(lines[:900]),
        "c.html.gz": page(prose(1, 90)),
    }
    for name, text in texts.items():
        content = gzip.compress(text.encode())
        Path(name).write_bytes(content[: len(content) // 2])
    found = {document.where: document.content for document in formats.Reader().documents(texts)}
    for name, text in texts.items():
        content = found[name] if isinstance(found[name], bytes) else found[name].encode()
        assert len(text) // 3 < len(content) < len(text) and text.encode().startswith(content)
    Path("b.txt").write_text("another text")
    done = run("a.txt.gz b.txt")
    assert done.err.count("note: a.txt.gz is damaged; what comes before the damage is read") == 1
    assert any(text.startswith("line 0 of a text\nline 1 of a text") for text in kept())


def test_a_compressed_file_with_wrong_bytes(here):
    lines = "".join(f"{i} {prose(i, 1)}\n" for i in range(999))
    content = bytearray(gzip.compress(lines.encode()))
    half = len(content) // 2
    content[half : half + 4] = b"\xff\xff\xff\xff"
    Path("a.txt.gz").write_bytes(content)
    (document,) = formats.Reader().documents(["a.txt.gz"])
    assert len(document.content) > len(lines) // 3


def test_an_address_is_found_in_pages_and_rows(here):
    link = '<link href="http://ads.example.net/x" rel="canonical">'
    Path("a.html").write_text(page(prose(1), link))
    rows = [("https://example.net:80/x", 2), ("http://notexample.net/", 3), ("http://[bad", 4), (None, 5)]
    write_lines("b.jsonl", [{"text": prose(i), "url": url} for url, i in rows])
    Path("blocked.txt").write_text("example.net # and below\n")
    done = run("a.html b.jsonl --blocklist blocked.txt")
    assert "note: 1 documents have no address" in done.err
    assert kept() == sorted([prose(3), prose(4), prose(5)])


def test_web_files_in_folders_are_read_if_asked(here):
    (here / "in").mkdir()
    Path("in/a.txt").write_text(prose(1))
    Path("in/b.md").write_text(prose(2))
    Path("in/c.HTM").write_text(page(prose(3)))
    Path("in/d.txt.gz").write_bytes(gzip.compress(prose(4).encode()))
    Path("in/e.pdf.gz").write_bytes(gzip.compress(b"no text"))
    Path("in/gone.html").symlink_to("nowhere")
    run("in")
    assert kept() == sorted([prose(1), prose(2)]) and "cleaning" not in data.meta("out")["sources"][0]
    assert (
        script.run(data.main, *["text", "in", "--web", "--tokenizer", "bytes", "--out", "out2"]).status == 0
    )
    assert kept("out2") == sorted(prose(i) for i in (1, 2, 3, 4))


# ------------------------------------------------------------------------------------------- the whole


def test_the_same_output_for_any_number_of_processes(here, monkeypatch):
    """Of pages, lines and archives, with duplicates that lie in other batches; originals are untouched."""
    (here / "in").mkdir()
    rng = random.Random(8)
    write_lines(
        "in/a.jsonl", [{"text": prose(rng.randrange(80)) + f"\n{DE * (i % 5 == 0)}"} for i in range(160)]
    )
    for i in range(12):
        Path(f"in/{i}.html").write_text(page(prose(i + 70) + f"\nWrite to me{i % 3}@example.org about it."))
    Path("in/x.warc.gz").write_bytes(b"".join(warc(WARC)))
    before = script.tree(here / "in")
    outputs = []
    for n_processes in (1, 2, 3):
        monkeypatch.setattr(clean, "BATCH_DOCUMENTS", 10 * n_processes)
        done = run(f"in --clean --show-dropped --processes {n_processes}")
        outputs.append((done.out, script.tree("out")))
        os.rename("out", f"out{n_processes}")
    assert outputs[0] == outputs[1] == outputs[2]
    os.rename("out1", "out")
    steps = cleaning()["steps"]
    assert list(steps) == [
        *("exact duplicates", "extraction", "language", "gopher", "c4", "personal data"),
        *("near duplicates", "paragraphs", "kept"),
    ]
    assert steps["exact duplicates"]["documents"] == 160 + 12 + 4 and steps["kept"]["documents"] < 120
    assert "[email]" in "".join(kept()) and "example.org" not in "".join(kept())
    assert script.tree(here / "in") == before
    left = 160 + 12 + 4
    for name, step in steps.items():  # every document is kept, or dropped by a rule
        assert step["documents"] == (16 if name == "extraction" else left)
        left -= sum(n.get("documents", 0) for n in step["dropped"].values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--blocklist all.txt",
            "cleaning leaves nothing: blocklist (blocked domain) dropped 2 of 2 documents",
        ),
        ("--blocklist bad.txt", "bad.txt, line 2 is no domain such as example.org"),
        ("--blocklist adblock.txt", "adblock.txt, line 1 is no domain such as example.org"),
        ("--blocklist empty.txt", "empty.txt lists nothing"),
        ("--blocklist missing.txt", "missing.txt: No such file"),
        ("--language xx", "--language xx is none of"),
        ("--gopher --skip-rules c4:nothing", "--skip-rules c4:nothing is none of gopher:words, "),
        ("--decontaminate broken.jsonl", "broken.jsonl, line 2 is no JSON"),
        ("--personal-data hide", "--personal-data"),
        ("--min-share 2", "--min-share"),
        ("--gopher", "cleaning leaves nothing: gopher (words) dropped 2 of 2 documents"),
        ("--min-share 0.9", "--min-share does nothing without --language"),
        ("--clean --language any --min-share 0.9", "--min-share does nothing without --language"),
        ("--near-duplicates --skip-rules x", "--skip-rules does nothing without --gopher or --c4"),
        ("--show-dropped", "--show-dropped does nothing without --clean"),
    ],
)
def test_user_errors(here, flags, words):
    write_lines("a.jsonl", [{"text": f"document {i}", "url": "http://a.example.org"} for i in range(2)])
    Path("all.txt").write_text("org")
    Path("bad.txt").write_text("example.org\nhttp://example.org/x\n")
    Path("adblock.txt").write_text("||ads.example.org^\n")
    Path("empty.txt").write_text("# nothing\n")
    Path("broken.jsonl").write_text('{"a": "b"}\n{"a": \n')
    before = script.tree(here)
    done = script.run(data.main, *f"text a.jsonl {flags} --processes 1 --out out".split())
    assert done.status == 2 and done.err.splitlines()[-1].startswith("error: ") and words in done.err
    assert "Traceback" not in done.err and script.tree(here) == before


def test_what_is_missing_is_named(here, monkeypatch):
    Path("a.html").write_text(page(prose(1)))
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    done = script.run(data.main, "text", "a.html", "--processes", "1", "--out", "out")
    assert "a.html needs trafilatura; install it: python -m pip install -r requirements-clean.txt" in done.err
    assert not Path("out").exists()
    for name in ("a.csv.gz", "a.csv"):
        Path(name).write_bytes(b"")
        assert script.refused(
            script.run(data.main, "text", name), f"cannot read {name}; give .txt, .md, .jsonl, "
        )
    done = script.run(data.main, "factbook", "--gopher", "--out", "out")
    assert script.refused(done, "only your own text is cleaned")


CLEANER = functools.partial(clean.Cleaner, {"gopher": True}, 0.65, [], NO_EVALUATION)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_an_error_names_the_document(n_processes):
    document = formats.Document("a.txt, part 3", content=5)  # which words_of() refuses
    with pytest.raises(RuntimeError) as error:
        list(processes.in_order([[document]] * 2, CLEANER, n_processes))
    said = "".join(traceback.format_exception(error.type, error.value, error.tb))
    assert "a.txt, part 3 cannot be cleaned" in said and "in words_of" in said


def test_an_error_of_reading_is_not_blamed_on_a_process():
    def broken():
        yield from [[], [], []]
        raise EOFError

    with pytest.raises(EOFError):
        list(processes.in_order(broken(), CLEANER, 2))


@pytest.mark.parametrize(("n_batches", "n_started"), [(0, 0), (1, 0), (2, 2), (9, 3)])
def test_no_process_is_started_that_gets_no_batch(n_batches, n_started):
    documents = [formats.Document(str(i), "short") for i in range(n_batches)]
    seen, results = [], processes.in_order([[document] for document in documents], CLEANER, 3)
    for _, counts in results:
        seen += counts.examples["gopher", "words"]
        assert len(multiprocessing.active_children()) == n_started
    assert seen == [(str(i), "short") for i in range(n_batches)]
    assert not multiprocessing.active_children()


def children_of(pid):
    """The processes that clean, of this one."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.parametrize("end", ["early ctrl-c", "ctrl-c", "killed worker"])
def test_processes_end_with_the_script(here, end):
    text = prose(1, n_lines=60)
    write_lines("big.jsonl", [{"text": f"{text} {i}"} for i in range(1500)])
    command = [sys.executable, HOUSE / "data.py", "text", "big.jsonl", "--gopher", "--processes", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(children := children_of(process.pid)) < (1 if end == "early ctrl-c" else 2):
        assert process.poll() is None
        time.sleep(0.002)
    if end == "killed worker":
        os.kill(children[0], signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
    _, said = process.communicate(timeout=60)
    assert process.returncode == (2 if end == "killed worker" else 130), said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "interrupted" or "a process that cleaned was killed" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert sorted(path.name for path in here.iterdir()) == ["big.jsonl", "shards"] and not list(
        here.glob("shards/*")
    )
