"""Tables of others: parquet and JSON lines, smol-smoltalk and GSM8K as conversations and as problems.

All files here are small ones of the same form as the hub's.
"""

import itertools
import json
import sys
import tracemalloc

import fake_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import script

import common
import data
import gpt2
import hub
import rl
import sft
import tasks.conversations as mixture
import train
from common import UserError
from tasks.problems import problems
from tokenizer import Tokenizer, text_of

MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
NATALIA = (
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many altogether?",
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72",
)
ROUNDED = (
    "Three friends share a dollar, and one finds 20 dollars. How much has he?",
    "Each has 1/3 = $<<1/3=.33>>.33.\nHe has $.33 + $20 = $<<.33+20=20.33>>20.33.\n#### 20.33",
)


def talk(*texts, system=None):
    """Messages as smol-smoltalk has them, the content before the role."""
    return [
        {"content": turn["content"], "role": turn["role"]} for turn in mixture.turns(*texts, system=system)
    ]


def write_talks(path, talks, **settings):
    path.parent.mkdir(exist_ok=True)
    columns = {"messages": pa.array(talks, MESSAGES), "source": ["x"] * len(talks)}
    pq.write_table(pa.table(columns), path, **settings)
    return path


def write_gsm8k(path, rows):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(question=q, answer=a) for q, a in rows]), path)
    return path


# ------------------------------------------------------------------------------------------------------------
# Reading


def test_a_table_is_parquet_or_json_lines(tmp_path):
    rows = [dict(a=i, b=f"text {i}", c=None) for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    for name, what in (("t.parquet", "row"), ("t.jsonl", "line")):
        found = list(hub.read_table(tmp_path / name, ("b", "a")))
        assert [where for where, _ in found] == [f"{tmp_path / name}, {what} {n}" for n in range(1, 6)]
        assert [row for _, row in found] == [dict(b=f"text {i}", a=i) for i in range(5)]


def test_what_is_wrong_with_a_table_is_one_line(tmp_path, monkeypatch):
    pq.write_table(pa.Table.from_pylist([dict(a=1)]), tmp_path / "t.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    half = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(half[: len(half) // 2])
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"b": 1}\n')
    for name, column, words in (
        ("none.parquet", "a", "none.parquet: No such file"),
        ("text.parquet", "a", "text.parquet: damaged, or no parquet"),
        ("half.parquet", "a", "half.parquet: damaged, or no parquet"),
        ("t.parquet", "b", "t.parquet has no column 'b'"),
        ("t.jsonl", "a", "t.jsonl, line 2 is no JSON object with a"),
        ("none.jsonl", "a", "none.jsonl: No such file"),
    ):
        with pytest.raises(UserError, match=words):
            list(hub.read_table(tmp_path / name, (column,)))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet")
    with pytest.raises(UserError, match=r"t\.parquet is parquet.* pip install -r requirements-hub\.txt"):
        list(hub.read_table(tmp_path / "t.parquet", ("a",)))


def test_the_files_of_a_split(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "README.md"):
        (tmp_path / name).touch()
    names = lambda split: [file.name for file in hub.table_files("smoltalk", tmp_path, split)[0]]
    assert len(names("train")) == len(names("test")) == 2  # each file has rows of both
    (tmp_path / "test-00000-of-00001.parquet").touch()
    assert names("test") == ["test-00000-of-00001.parquet"] and len(names("train")) == 2
    assert hub.table_files("smoltalk", tmp_path / "x.parquet", "test") == ([tmp_path / "x.parquet"], False)


def test_a_table_of_the_hub_is_fetched_once(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="requirements-hub.txt is not installed")
    monkeypatch.setenv("HANDMADE_CACHE", str(tmp_path / "cache"))
    content = write_gsm8k(tmp_path / "test.parquet", [NATALIA]).read_bytes()
    with fake_hub.FakeHub() as server:
        server.repositories["datasets/openai/gsm8k"] = {"main/test-00000-of-00001.parquet": content}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert not hub.is_fetched("gsm8k", "test")
        assert [problem.answer for problem in problems("gsm8k:hub", "test")] == ["72"]
        with pytest.raises(UserError, match=r"openai/gsm8k has no main/train-00000-of-00001\.parquet"):
            problems("gsm8k:hub", "train")
    assert hub.is_fetched("gsm8k", "test") and not hub.is_fetched("gsm8k", "train")
    assert [problem.answer for problem in problems("gsm8k:hub", "test")] == ["72"]  # the hub is gone


# ------------------------------------------------------------------------------------------------------------
# smol-smoltalk


def test_smoltalk_becomes_conversations(tmp_path):
    talks = [talk(f"How are you, {i}?", f"Fine, {i}.", system="Be kind." * (i % 2)) for i in range(60)]
    long = " ".join(f"word{i}" for i in range(2000)) + " one two three four five" * 3
    talks.append(talk("Tell me a lot.", long))
    path = write_talks(tmp_path / "smol.parquet", talks, row_group_size=10)
    spec = f"smoltalk:{path}=1"
    train_set, dropped = mixture.draw(spec, 100, seed=1)
    test_set, _ = mixture.draw(spec, 100, seed=1, split="test")
    assert dropped == {} and 0 < len(test_set) < 15 and len(train_set) + len(test_set) == 61
    kept = [(text_of(c[-1]["content"]), c[0]["role"]) for c in train_set + test_set]
    assert (long, "user") in kept  # what its makers let pass is neither too long nor repeats itself
    assert {(f"Fine, {i}.", "system" if i % 2 else "user") for i in range(60)} < set(kept)
    assert mixture.draw(spec, 100, seed=1) == (train_set, {}) != mixture.draw(spec, 100, seed=2)
    orders = [[c[-1]["content"] for c in mixture.conversations(spec[:-2], seed=seed)] for seed in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_smoltalk_with_files_of_its_own_for_testing(tmp_path):
    write_talks(tmp_path / "train-0.parquet", [talk(f"{i}?", f"{i}.") for i in range(20)])
    write_talks(tmp_path / "test-0.parquet", [talk(f"{i}?", f"{i}.") for i in range(20, 25)])
    found = [mixture.draw(f"smoltalk:{tmp_path}", 99, split=split)[0] for split in ("train", "test")]
    assert [len(conversations) for conversations in found] == [20, 5]


def test_a_bad_row_of_smoltalk_is_named_or_skipped_on_demand(tmp_path):
    talks = [talk("a?", "a."), talk("b?", "b."), talk("c?", ""), talk("d?", "d.")]
    spec = f"smoltalk:{write_talks(tmp_path / 't.parquet', talks, row_group_size=2)}"
    with pytest.raises(UserError, match=r"t\.parquet, row 3: message 2 \(assistant\) is empty"):
        mixture.draw(spec, 9)
    kept, dropped = mixture.draw(spec, 9, skip_bad=True)
    held_out, _ = mixture.draw(spec, 9, split="test", skip_bad=True)
    assert len(kept) + len(held_out) == 3 and dropped == {"bad lines": 1}


def test_where_smoltalk_contradicts_ours_ours_is_right(tmp_path):
    ours, _ = mixture.draw("identity", 200)
    asked = [c[0]["content"] for c in ours if len(c) == 2]  # without a system turn
    path = write_talks(tmp_path / "t.parquet", [talk(question, "I am SmolLM.") for question in asked])
    kept, dropped = mixture.draw(f"smoltalk:{path}=1,identity=4", 1000)
    theirs = {c[0]["content"] for c in kept if c[-1]["content"] == "I am SmolLM."}
    ours = {c[0]["content"] for c in kept if c[-1]["content"] != "I am SmolLM."}
    assert dropped["contradicting others"] > 20 and not theirs & ours


def test_a_large_set_is_never_in_memory(tmp_path):
    """6 MB of conversations: read and sieved within 3 MB, the texts of one batch and the digests of all."""
    with pq.ParquetWriter(tmp_path / "t.parquet", pa.schema([("messages", MESSAGES)])) as writer:
        for start in range(0, 1200, 60):
            talks = [talk(f"{i}?", f"{i} is a number. " * 250) for i in range(start, start + 60)]
            writer.write_table(pa.table({"messages": pa.array(talks, MESSAGES)}))
    mixture.examined()  # is kept in memory
    tracemalloc.start()
    n_read = sum(1 for _ in mixture.draw_each(f"smoltalk:{tmp_path / 't.parquet'}", 1200, mixture.Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_read > 1000 and peak < 3e6, f"{peak} bytes"


# ------------------------------------------------------------------------------------------------------------
# GSM8K


def test_annotations_become_calls_of_the_calculator(tmp_path):
    path = write_gsm8k(tmp_path / "train-0.parquet", [NATALIA, ROUNDED])
    write_gsm8k(tmp_path / "test-0.parquet", [("How many?", "One.\n#### 1,000")])
    kept, dropped = mixture.draw(f"gsm8k:{path.parent}", 9)
    replies = {turns[0]["content"]: turns[1]["content"] for turns in kept}
    call = lambda expression, output: [dict(type="calc", text=expression), dict(type="output", text=output)]
    text = lambda words: dict(type="text", text=words)
    assert replies[NATALIA[0]] == [
        text("Natalia sold 48/2 ="), *call(" 48/2", " 24"),
        text(" 24 clips in May.\nNatalia sold 48+24 ="), *call(" 48+24", " 72"),
        text(" 72 clips altogether.\nAnswer: 72"),
    ]  # fmt: skip
    assert replies[ROUNDED[0]] == [  # a third is not .33, so this call is left out
        text("Each has 1/3 = $.33.\nHe has $.33 + $20 = $"), *call(" .33+20", " 20.33"),
        text("20.33.\nAnswer: 20.33"),
    ]  # fmt: skip
    assert dropped == {"of GSM8K without the calls whose results differ": 1}
    solutions = {problem.prompt: problem for problem in itertools.islice(problems(f"gsm8k:{tmp_path}"), 4)}
    for question, reply in replies.items():
        assert text_of(reply) == solutions[question].solution
        assert solutions[question].verify(text_of(reply)) == 1
    [held_out] = problems(f"gsm8k:{tmp_path}", "test")
    assert (held_out.answer, held_out.level) == ("1000", 1)


def test_a_bad_row_of_gsm8k_is_named(tmp_path):
    path = write_gsm8k(tmp_path / "g.parquet", [NATALIA, ("How many?", "One")])
    with pytest.raises(UserError, match=r"g\.parquet, row 2 is not "):
        problems(f"gsm8k:{path}")


# ------------------------------------------------------------------------------------------------------------
# The scripts

SFT = "--batch-size 4 --epochs 1 --examples 40 --eval-every 5 --exam-every 0 --device cpu"
RL = "--steps 1 --prompts 2 --attempts 2 --max-tokens 4 --eval-problems 1 --k 2 --device cpu"
TRAIN = "--data shards --n-layer 1 --n-head 1 --n-embd 8 --seq-len 64 --total-batch-tokens 64 --steps 4"
TRAIN += " --eval-every 0 --sample-every 0 --save-every 0 --device cpu"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base model of bytes and the tables, in the working directory."""
    monkeypatch.chdir(tmp_path)
    gpt2.GPT2(gpt2.GPT2Config(1, 2, 32, n_positions=400, vocab_size=266)).save_pretrained(tmp_path / "base")
    Tokenizer.bytes().save(tmp_path / "base")
    write_talks(tmp_path / "smol.parquet", [talk(f"Say {i}!", f"{i}.") for i in range(40)])
    write_gsm8k(tmp_path / "gsm8k" / "train.parquet", [NATALIA, ROUNDED])
    write_gsm8k(tmp_path / "gsm8k" / "test.parquet", [NATALIA])
    return tmp_path


def test_an_assistant_learns_from_tables_and_practises_gsm8k(place):
    spec = "smoltalk:smol.parquet=9,gsm8k:gsm8k=1,identity=1"
    done = script.run(sft.main, "--init-from", "base", "--out", "sft", "--data", spec, *SFT.split())
    assert done.status == 0, done.err
    assert "1 of GSM8K without the calls whose results differ" in done.out
    done = script.run(rl.main, "--init-from", "sft", "--out", "rl", "--task", "gsm8k:gsm8k", *RL.split())
    assert done.status == 0, done.err
    assert "gsm8k:gsm8k" in done.err


def test_hellaswag_while_training(place, monkeypatch):
    monkeypatch.setattr(train, "measured_flops", lambda *_: 1e11)
    monkeypatch.setenv("HANDMADE_CACHE", str(place / "cache"))
    (place / "text.txt").write_text("A text of some words. " * 400)
    (place / "more.txt").write_text("Another text of words. " * 40)
    flags = ["--tokenizer", "bytes", "--val-fraction", "0.1"]
    assert script.run(data.main, "text", "text.txt", "more.txt", "--out", "shards", *flags).status == 0
    argv = TRAIN.split()
    file = hub.cache() / "Rowan" / "hellaswag" / "data" / "validation-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    rows = [dict(ctx="A dog", endings=["runs.", "sings.", "is", "x"], label=str(i % 4)) for i in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    done = script.run(train.main, "--out", "off", *argv)  # off by default: it is no d12 on a GPU
    assert done.status == 0 and "HellaSwag" not in done.err
    done = script.run(train.main, "--out", "run", *argv, "--hellaswag-every", 2)
    assert done.status == 0, done.err
    logged = [event for event in common.read_log("run") if event["event"] == "hellaswag"]
    assert [(event["step"], event["n"], event["acc"]) for event in logged] == [(2, 8, 0.25), (4, 8, 0.25)]
    assert "step 4: HellaSwag: acc_norm 0.2500 ± 0.1531" in done.err


@pytest.mark.parametrize("main, recipes", [(sft.main, sft.RECIPES), (rl.main, rl.RECIPES)])
def test_the_recipe_follows_from_the_size_of_the_base(place, monkeypatch, main, recipes):
    """A base of more than 17M parameters takes the settings of d12, and what is given stays."""
    module = sys.modules[main.__module__]
    config = json.loads((place / "base" / "config.json").read_text()) | {"n_positions": 600_000}
    (place / "large").mkdir()
    (place / "large" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(module, "Run", lambda *_, **__: pytest.fail("it got as far as the run"))
    monkeypatch.setattr(rl, "check_flags", lambda *_: None)
    for base, size in (("base", "tiny"), ("large", "d12")):
        flags, _ = module.parse(["--init-from", base, "--out", "run", "--lr", "0.5"])
        wanted = recipes[size] | {"lr": 0.5}
        assert {name: getattr(flags, name) for name in wanted} == wanted
    shown = script.run(main, "--help").out
    assert "0 to 3%" in shown and "gsm8k:hub" in shown
