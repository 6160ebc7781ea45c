"""Finetuning held to its promises: what is trained is what the assistant says and nothing else, every step
has a target, a run goes on as if nothing had happened, and the exam counts what it says it counts."""

import json
import re

import numpy as np
import pytest
import script

import common
import evaluate
import gpt2
import sft
from tokenizer import Tokenizer, text_of

CONFIG = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=266)
SMALL = (
    "--batch-size 4 --epochs 2 --examples 24 --eval-every 0 --exam-every 0 --save-every 0 --warmup-steps 1"
)
SMALL += " --device cpu --batch-tokens 128"


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def place(tmp_path):
    """A folder with a base model of bytes, base, and thirty-odd conversations, sample.jsonl."""
    gpt2.GPT2(CONFIG).save_pretrained(tmp_path / "base")
    Tokenizer.bytes().save(tmp_path / "base")
    lines = [{"messages": talk(f"{a}, {b}?", f"{a}.")} for a in range(6) for b in range(6)]
    (tmp_path / "sample.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def arguments(place, out="run", *more):
    spec = f"jsonl:{place / 'sample.jsonl'}=1"
    return ["--init-from", place / "base", "--out", place / out, "--data", spec, *SMALL.split(), *more]


# ------------------------------------------------------------------------------------------------------------
# What is trained


def test_weights_are_the_mask_and_add_up_to_one():
    tokenizer = Tokenizer.bytes()
    rows, _ = sft.prepare(tokenizer, [talk("2+2", "4"), talk("Who are you?", "Handmade.")], 99)
    weights = sft.weighted(rows)
    assert sum(w.sum() for _, w in weights) == pytest.approx(1)
    end = tokenizer.encode_special("<|im_end|>")
    said = [tokenizer.decode(np.array(tokens)[w > 0]) for tokens, w in weights]
    assert said == ["4<|im_end|>", "Handmade.<|im_end|>"]
    assert all(tokens[-1] == end for tokens, _ in weights)
    assert {round(float(x), 9) for _, w in weights for x in w} == {
        0.0,
        round(1 / 12, 9),
    }  # 4, Handmade., ends


def test_what_is_too_long_loses_turns_at_the_end_or_is_left_out():
    tokenizer = Tokenizer.bytes()
    two = talk("a", "b") + talk("c" * 40, "d")
    rows, counts = sft.prepare(tokenizer, [two, talk("e" * 60, "f"), talk("g", "h")], 40)
    assert counts == {"shortened": 1, "left out": 1}
    assert [list(tokens) for tokens, _ in rows] == [
        tokenizer.render(talk("a", "b"))[0],
        tokenizer.render(talk("g", "h"))[0],
    ]
    assert all(mask.any() for _, mask in rows)


def test_shown_as_one_stream_with_the_targets_between_brackets(capsys):
    content = [
        dict(type="calc", text="2+2"),
        dict(type="output", text=" 4"),
        dict(type="text", text="It is 4."),
    ]
    sft.show(Tokenizer.bytes(), [talk("2+2?", content)])
    stream = "<|endoftext|><|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>"
    stream += "[<|calc_start|>2+2<|calc_end|>]<|output_start|> 4<|output_end|>[It is 4.<|im_end|>]"
    assert capsys.readouterr().out == stream + "\n(41 tokens, 14 of them targets)\n\n"


# ------------------------------------------------------------------------------------------------------------
# The loop


def test_it_learns_the_conversations(place):
    argv = arguments(place, "run", "--epochs", "15", "--lr", "1e-2")
    done = script.run(sft.main, *argv)
    assert done.status == 0, done.err
    losses = [event["loss"] for event in common.read_log(place / "run") if event["event"] == "step"]
    assert losses[0] > 4  # about ln 266 at first
    assert np.mean(losses[-6:]) < 0.7  # a digit of six, the full stop, the end: ln 6 / 3 = 0.6 by guessing
    checkpoint = common.newest_checkpoint(place / "run")
    assert common.read_state(checkpoint)["stage"] == "sft"
    model, tokenizer = gpt2.GPT2.from_pretrained(checkpoint), Tokenizer.load(checkpoint)
    replies = evaluate.ask(
        model, tokenizer, [evaluate.user(f"{a}, {b}?") for a in range(6) for b in range(6)]
    )
    assert all(re.fullmatch("[0-5][.]", text_of(reply)) for reply in replies)


def test_stopped_and_resumed_it_ends_with_the_same_bits(place, monkeypatch):
    assert script.run(sft.main, *arguments(place, "whole")).status == 0

    class Asked(common.Interrupt):  # Ctrl-C, after the third step
        steps = 0

        @property
        def asked(self):
            Asked.steps += 1
            return Asked.steps == 3

        @asked.setter
        def asked(self, value):
            pass

    monkeypatch.setattr(common, "Interrupt", Asked)
    done = script.run(sft.main, *arguments(place, "parts"))
    assert done.status == 130
    assert "stopped after step 3" in done.err
    assert "--resume" in done.err
    monkeypatch.undo()
    assert script.run(sft.main, "--out", place / "parts", "--resume").status == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = (common.newest_checkpoint(place / run) / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    events = [[e for e in common.read_log(place / run) if e["event"] == "step"] for run in ("whole", "parts")]
    assert [e["loss"] for e in events[0]] == [e["loss"] for e in events[1]]


def test_losses_that_are_no_numbers_change_nothing_and_end_the_run(place):
    model = gpt2.GPT2(CONFIG)
    model.params["ln_f.weight"][0] = np.nan
    model.save_pretrained(place / "base")
    done = script.run(sft.main, *arguments(place, "run", "--epochs", "4"))
    assert done.status == 2
    assert "10 steps in a row" in done.err.splitlines()[-1]
    assert "--lr" in done.err.splitlines()[-1]
    assert not common.checkpoints(place / "run")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "nonsense"], ["nonsense"]),
        (["--data", "jsonl:nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--init-from", "nowhere"], ["nowhere"]),
        (["--batch-size", "1000"], ["--batch-size 1000"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--lr", "nan"], ["--lr"]),
        (["--resume"], ["nothing to resume"]),
        (["--eval", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_written(place, more, words):
    before = script.tree(place)
    assert script.refused(script.run(sft.main, *arguments(place, "run", *more)), *words)
    assert script.tree(place) == before


def test_a_run_that_exists_is_not_overwritten(place):
    (place / "run").mkdir()
    (place / "run" / "mine").write_text("x")
    assert script.refused(script.run(sft.main, *arguments(place)), "exists", "--out")


def test_a_bad_line_is_named_or_skipped_on_demand(place):
    with open(place / "sample.jsonl", "a") as file:
        file.write('{"messages": 3}\n')
    assert script.refused(script.run(sft.main, *arguments(place)), "sample.jsonl", "line 37")
    assert script.run(sft.main, *arguments(place, "run", "--skip-bad")).status == 0
