"""Finetuning held to its promises: what is trained is what the assistant says and nothing else, every step
has a target, no row sees another, and a run goes on as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import script
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import evaluate
import gpt2
import hub
import sft
from tasks.conversations import turns
from tokenizer import Tokenizer, text_of

CONFIG = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=266)
SMALL = (
    "--batch-size 4 --epochs 2 --examples 24 --eval-every 0 --exam-every 0 --save-every 0 --warmup-steps 1"
)
SMALL += " --device cpu --batch-tokens 128"
ONE = SimpleNamespace(rank=0, size=1)  # a world of one rank


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a base model of bytes, base, and thirty-odd conversations, sample.jsonl.

    It is the working directory: the order of the conversations depends on the name of their file.
    """
    monkeypatch.chdir(tmp_path)
    gpt2.GPT2(CONFIG).save_pretrained(tmp_path / "base")
    Tokenizer.bytes().save(tmp_path / "base")
    lines = [{"messages": talk(f"{a}, {b}?", f"{a}.")} for a in range(6) for b in range(6)]
    (tmp_path / "sample.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def arguments(place, out="run", *more):
    data = ["--data", "jsonl:sample.jsonl=1"]
    return ["--init-from", place / "base", "--out", place / out, *data, *SMALL.split(), *more]


def step_losses(run):
    return [event["loss"] for event in common.read_log(run) if event["event"] == "step"]


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
    assert counts == {"shortened": 1, sft.TOO_LONG: 1}
    assert [list(tokens) for tokens, _ in rows] == [
        tokenizer.render(talk("a", "b"))[0],
        tokenizer.render(talk("g", "h"))[0],
    ]
    assert all(mask.any() for _, mask in rows)
    length = len(tokenizer.render(talk("a", "b"))[0])
    assert [len(sft.prepare(tokenizer, [talk("a", "b")], n)[0]) for n in (length, length - 1)] == [1, 0]


def test_what_is_trained_on_and_what_is_held_out(monkeypatch):
    asked, tokenizer = [], Tokenizer.bytes()
    conversations = [talk("a", "b"), talk("c", "d"), talk("e", "much longer")]

    def draw_chats(spec, n, dropped, seed, split, skip_bad, n_tokens, longest):
        asked.append((spec, n, seed, split, skip_bad))
        assert n_tokens(conversations[0]) + 1 == longest + 1 == len(tokenizer.render(conversations[0])[0])
        yield from conversations
        dropped["bad lines"] = 2

    monkeypatch.setattr(sft, "draw_chats", draw_chats)
    settings = SimpleNamespace(
        data="tasks=1", known="known.jsonl", examples=9, seed=5, skip_bad=True, batch_size=2
    )
    length = len(tokenizer.render(talk("a", "b"))[0])
    rows, held_out, left_out = sft.load_conversations(settings, tokenizer, length - 1)
    spec = "tasks=1,unknown:known.jsonl=2"
    assert asked == [(spec, 9, 5, "train", True), (spec, 600, 5, "test", True)]
    assert len(rows) == len(held_out) == 2  # of as many tokens as the model has positions, and a target
    assert left_out == {"bad lines": 2, "shortened": 0, sft.TOO_LONG: 1}
    settings.batch_size = 3  # that they are too few has a reason
    with pytest.raises(common.UserError, match=f"2 .* fewer than --batch-size 3; .* 1 {sft.TOO_LONG}"):
        sft.load_conversations(settings, tokenizer, length - 1)


CONTENT = [
    dict(type="calc", text="2+2"),
    dict(type="output", text=" 4"),
    dict(type="text", text="It is 4."),
]


def test_shown_as_one_stream_with_the_targets_between_brackets(place):
    (place / "sample.jsonl").write_text(json.dumps({"messages": talk("2+2?", CONTENT)}) + "\n")
    before = script.tree(place)
    done = script.run(sft.main, *arguments(place), "--show", 1)
    stream = "<|endoftext|><|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>"
    stream += "[<|calc_start|>2+2<|calc_end|>]<|output_start|> 4<|output_end|>[It is 4.<|im_end|>]"
    assert done.out == stream + "\n(41 tokens, 14 of them targets)\n\n"
    assert script.tree(place) == before


def test_on_a_terminal_the_targets_are_bright(monkeypatch):
    monkeypatch.setattr(common, "colour", lambda: True)
    tokenizer = Tokenizer.bytes()
    text = sft.marked(tokenizer, *tokenizer.render(talk("a", "b")))
    assert text.endswith("<|im_sep|>\033[1;32mb<|im_end|>\033[0m") and text.count("\033") == 2


# ------------------------------------------------------------------------------------------------------------
# Data loader: rows of different lengths as micro-batches

ROWS = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, vocab_size=50)
LENGTHS = [5, 9, 30, 7, 12, 2, 22, 41]


def random_rows(lengths, seed=0):
    """Rows of these lengths, about half of whose weights are 0."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 50, n), np.where(rng.random(n) < 0.5, 0, rng.standard_normal(n))) for n in lengths
    ]


@settings(deadline=None)
@given(st.lists(st.integers(2, 61), min_size=1, max_size=30), st.integers(1, 300))
def test_every_target_is_there_once(lengths, most):
    rows = [(np.arange(100 * i, 100 * i + n), np.arange(n) + 0.5) for i, n in enumerate(lengths)]
    seen, n_positions = [], 60
    for tokens, targets, weights in sft.micro_batches(rows, most, n_positions):
        B, T = tokens.shape
        assert B == 1 or most >= B * T
        assert T % 8 == 0 or n_positions == T
        for b in range(B):
            n = int((weights[b] > 0).sum())
            np.testing.assert_array_equal(targets[b, :n], tokens[b, 0] + 1 + np.arange(n))
            np.testing.assert_array_equal(tokens[b, :n], tokens[b, 0] + np.arange(n))
            np.testing.assert_array_equal(weights[b, :n], np.arange(n) + 1.5)
            assert not weights[b, n:].any()
            seen.append((int(tokens[b, 0]) // 100, n + 1))
        assert seen[-B][1] - 1 > T - 8, "more than the longest row needs"
    assert sorted(seen) == list(enumerate(lengths))
    assert [n for _, n in seen] == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    "lengths, most, shapes",
    [
        ([8, 8, 72], 10**6, [(3, 72)]),  # two rows with 64 tokens of padding each: 128, as much as a pass
        ([8, 8, 73], 10**6, [(1, 80), (2, 8)]),  # 72 each: more than one more pass
        ([8, 72], 10**6, [(2, 72)]),  # a single row is worth no pass of its own
        ([8] * 9 + [32], 10**6, [(1, 32), (9, 8)]),
        ([64] * 5, 128, [(2, 64), (2, 64), (1, 64)]),  # full
        ([64] * 5, 127, [(1, 64)] * 5),
        ([96], 64, [(1, 96)]),  # a row that is larger than a micro-batch should be
    ],
)
def test_a_micro_batch_ends_where_it_is_full_or_padding_costs_more_than_a_pass(lengths, most, shapes):
    assert sft.PASS_COST == 128
    rows = [(np.zeros(n + 1, int), np.ones(n + 1)) for n in lengths]
    assert [tokens.shape for tokens, _, _ in sft.micro_batches(rows, most, 1000)] == shapes


def accumulate(model, rows, most):
    """The sum of weights * losses, and in model.grads its gradient."""
    for tokens, targets, weights in sft.micro_batches(rows, most, model.config.n_positions):
        model.forward(tokens, targets, weights)
        model.backward()
    return float(model.loss[0])


@pytest.mark.parametrize("most", [1, 64, 10**6])
def test_rows_in_company_have_the_loss_and_gradient_they_have_alone(most):
    model, rows = gpt2.GPT2(ROWS, dtype="float64"), random_rows(LENGTHS)
    together = accumulate(model, rows, most)
    gradient = model.flat_grads.copy()
    model.sums.fill(0)
    for tokens, weights in rows:
        if not weights[1:].any():  # forward() wants a target
            continue
        model.forward(tokens[None, :-1], tokens[None, 1:], weights[None, 1:])  # (1, T)
        model.backward()
    assert together == pytest.approx(float(model.loss[0]), rel=1e-12)
    np.testing.assert_allclose(gradient, model.flat_grads, atol=1e-12 * abs(gradient).max())


def test_rows_without_a_weight_are_left_alone():
    rows = [(np.arange(9), np.zeros(9)), (np.arange(4), np.array([1.0, 0, 0, 0]))]
    assert list(sft.micro_batches(rows, 100, 40)) == []


def loader(n=11, **changed):
    """A loader of n rows; row i begins with token i."""
    rows = [(np.array([i, *range(i % 5 + 1)]), np.arange(i % 5 + 2) > 0) for i in range(n)]
    flags = dict(batch_size=4, epochs=3, seed=5, batch_tokens=16)
    return sft.DataLoader(rows, SimpleNamespace(**{**flags, **changed}), 40)


def test_an_epoch_has_every_conversation_once_in_an_order_of_its_own():
    loaded = loader(12)
    assert loaded.n_steps == 9
    steps = [[int(tokens[0]) for tokens, _ in loaded.rows(step)] for step in range(9)]
    epochs = [[*steps[i], *steps[i + 1], *steps[i + 2]] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [[int(tokens[0]) for tokens, _ in loader(12).rows(step)] for step in range(9)] == steps
    assert [[int(t[0]) for t, _ in loader(12, seed=6).rows(step)] for step in range(9)] != steps
    loaded = loader(11)  # three rows do not fill a batch
    assert loaded.n_steps == 6
    assert len({int(tokens[0]) for step in range(2) for tokens, _ in loaded.rows(step)}) == 8
    counts = [loaded.n_tokens(step) for step in range(6)]
    assert counts == [sum(len(tokens) for tokens, _ in loaded.rows(step)) for step in range(6)]
    assert len(set(counts)) > 1
    assert loader(4).n_steps == 3  # just a batch


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_a_step_and_its_normaliser(size):
    loaded, total, seen = loader(12), 0.0, []
    for rank in range(size):
        world = SimpleNamespace(rank=rank, size=size)
        mine = list(loaded.micro_batches(1, world))
        assert sum(len(tokens) for tokens, _, _ in mine) == 4 / size
        seen += [int(tokens[0]) for batch in mine for tokens in batch[0]]
        total += sum(weights.sum() for _, _, weights in mine)
    assert sorted(seen) == sorted(int(tokens[0]) for tokens, _ in loaded.rows(1))
    assert total == pytest.approx(1)


def test_ranks_have_equally_long_rows():
    rows = [(np.zeros(n), None) for n in (9, 1, 7, 3, 5, 8, 2, 6)]
    shares = [sft.share(rows, SimpleNamespace(rank=rank, size=2)) for rank in (0, 1)]
    assert [[len(tokens) for tokens, _ in mine] for mine in shares] == [[1, 3, 6, 8], [2, 5, 7, 9]]


def test_the_held_out_loss_is_the_mean_over_targets(place):
    model, tokenizer = gpt2.GPT2(CONFIG, dtype="float64"), Tokenizer.bytes()
    rows, _ = sft.prepare(tokenizer, [talk("2+2", "4"), talk("Who are you?", "Handmade.")], 99)
    expected = []
    for tokens, mask in rows:
        losses = model.losses(tokens[None, :-1], tokens[None, 1:])[0]  # (T,)
        expected.extend(losses[mask[1:]])
    world = SimpleNamespace(rank=0, size=1, gather=lambda value: [value])
    for most in (1, 10**6):
        assert sft.held_out_loss(model, rows, most, world) == pytest.approx(np.mean(expected))


# ------------------------------------------------------------------------------------------------------------
# The loop


def test_it_learns_the_conversations(place):
    argv = arguments(place, "run", "--epochs", "15", "--lr", "1e-2", "--eval-every", "50")
    done = script.run(sft.main, *argv)
    assert done.status == 0, done.err
    losses = step_losses(place / "run")
    assert len(losses) == 90
    lrs = [event["lr"] for event in common.read_log(place / "run") if event["event"] == "step"]
    assert lrs[0] == 1e-2 and lrs[45] == pytest.approx(1e-2 * 0.5 * (1 + np.cos(np.pi * 44 / 89)))
    assert losses[0] > 4  # about ln 266 at first
    assert np.mean(losses[-6:]) < 0.7  # a digit of six, the full stop, the end: ln 6 / 3 = 0.6 by guessing
    checkpoint = hub.find_checkpoint(place / "run")
    assert common.read_state(checkpoint)["stage"] == "sft"
    model, tokenizer = gpt2.GPT2.from_pretrained(checkpoint), Tokenizer.load(checkpoint)
    replies = evaluate.ask(model, tokenizer, [turns(f"{a}, {b}?") for a in range(6) for b in range(6)])
    assert all(re.fullmatch("[0-5][.]", text_of(reply)) for reply in replies)
    evals = [event for event in common.read_log(place / "run") if event["event"] == "eval"]
    assert [event["step"] for event in evals] == [50, 90]
    assert evals[1]["loss"] < 0.7
    assert f"step 90: loss on held-out conversations {evals[1]['loss']:.4f}" in done.err
    assert "24 conversations" in done.out and "90 steps of 4 conversations, each seen 15 times" in done.out
    assert "left out or shortened: nothing" in done.out
    for words in ("step 90/90 | loss ", "norm", "lr", "tok/s", "left", "step_000090; talk to it"):
        assert words in done.err


def test_an_update_has_the_settings_of_the_flags(place, monkeypatch):
    step, seen = gpt2.AdamW.step, []

    def watched(optimizer, lr, max_norm, *limits):
        seen.append((optimizer.weight_decay, max_norm))
        return step(optimizer, lr, max_norm, *limits)

    monkeypatch.setattr(gpt2.AdamW, "step", watched)
    more = ("--weight-decay", "0.3", "--grad-clip", "0.7")
    assert script.run(sft.main, *arguments(place, "run", *more)).status == 0
    assert seen == [(0.3, 0.7)] * 12


def test_conversations_for_just_one_batch_are_enough(place):
    done = script.run(sft.main, *arguments(place, "run", "--batch-size", "24", "--epochs", "1"))
    assert done.status == 0, done.err
    assert len(step_losses(place / "run")) == 1


def test_a_short_examination_on_the_way(place, monkeypatch):
    asked = []
    results = {"identity": {"n": 20, "named": 0.5}}
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **settings: asked.append(settings) or results)
    done = script.run(sft.main, *arguments(place, "run", "--exam-every", "6"))
    assert done.status == 0, done.err
    exams = [event for event in common.read_log(place / "run") if event["event"] == "exam"]
    assert [(event["step"], event["results"]) for event in exams] == [(6, results)]  # not after the last step
    assert asked[0]["n"] == 20 and "identity 50%" in done.err


def test_stopped_and_resumed_it_ends_with_the_same_bits(place, monkeypatch):
    assert script.run(sft.main, *arguments(place, "whole")).status == 0
    step, calls = gpt2.AdamW.step, []

    def pressed(*args, **settings):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C, during the third step
        return step(*args, **settings)

    monkeypatch.setattr(gpt2.AdamW, "step", pressed)
    done = script.run(sft.main, *arguments(place, "parts"))
    assert done.status == 130
    assert "stopped after step 3;" in done.err
    assert f"python sft.py --out {place / 'parts'} --resume" in done.err
    monkeypatch.setattr(gpt2.AdamW, "step", step)
    assert script.run(sft.main, "--out", place / "parts", "--resume").status == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = (hub.find_checkpoint(place / run) / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    assert len(step_losses(place / "whole")) == 12
    assert step_losses(place / "whole") == step_losses(place / "parts")


def test_a_run_of_the_previous_version_goes_on(place):
    """Its state had other flags, too, and nothing about losses."""
    assert script.run(sft.main, *arguments(place, "run", "--save-every", "5", "--keep", "9")).status == 0
    state = common.read_state(place / "run" / "step_000005")
    old = dict(probe=None, eval=None, to="known.jsonl", k=3, json=False, dtype="float32")
    flags = {name: value for name, value in state["flags"].items() if name != "ranks"} | old
    (place / "run" / "step_000005" / "state.json").write_text(
        json.dumps(dict(step=5, stage="sft", skipped=0, flags=flags))
    )
    whole = (place / "run" / "step_000012" / "model.safetensors").read_bytes()
    for step in ("step_000010", "step_000012"):
        (place / "run" / step).rename(place / step)
    done = script.run(sft.main, "--out", place / "run", "--resume")
    assert done.status == 0, done.err
    assert (place / "run" / "step_000012" / "model.safetensors").read_bytes() == whole


def run_with_two_ranks(argv):
    """sft.py as a shell starts it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(Path(sft.__file__)), *map(str, argv), "--ranks", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory as Linux has it")
def test_two_ranks_train_the_same_model_and_twice_the_same_bits(place):
    more = ("--eval-every", "6", "--dtype", "float64")
    assert script.run(sft.main, *arguments(place, "one", *more)).status == 0
    for out in ("two", "again"):
        run_with_two_ranks(arguments(place, out, *more))
    one, two, again = (hub.find_checkpoint(place / out) for out in ("one", "two", "again"))
    assert (two / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    a, b = (gpt2.GPT2.from_pretrained(checkpoint).flat_params for checkpoint in (one, two))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert step_losses(place / "one") == pytest.approx(step_losses(place / "two"), abs=1e-7)
    assert common.read_log(place / "two")[0]["ranks"] == 2
    logs = [common.read_log(place / out) for out in ("one", "two")]
    evals = [[event["loss"] for event in log if event["event"] == "eval"] for log in logs]
    assert evals[0] == pytest.approx(evals[1], abs=1e-7) and len(evals[0]) == 2


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
        (["--known", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--ranks", "3"], ["--ranks 3 does not divide", "1, 2, 4 do"]),
        (["--lr", "nan"], ["--lr"]),
        (["--resume"], ["nothing to resume"]),
        (["--eval", "nowhere"], ["--eval"]),
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


def test_a_run_that_is_done_is_not_touched(place):
    assert script.run(sft.main, *arguments(place)).status == 0
    before = script.tree(place)
    done = script.run(sft.main, "--out", place / "run", "--resume")
    assert script.refused(done, "all its 12 steps", "--epochs", "sample.py")
    assert script.tree(place) == before


def test_a_bad_line_is_named_or_skipped_on_demand(place):
    with open(place / "sample.jsonl", "a") as file:
        file.write('{"messages": 3}\n')
    assert script.refused(script.run(sft.main, *arguments(place)), "sample.jsonl", "line 37")
    assert script.run(sft.main, *arguments(place, "run", "--skip-bad")).status == 0
