"""Pretraining held to its promises: which tokens a step sees, what it does with them, and that nothing that
happens to a run (a NaN, Ctrl-C, another micro-batch, a full disk, bad input) changes or costs the result."""

import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import kill_runs
import numpy as np
import pytest
import safetensors.numpy
import script
import test_distributed
from hypothesis import given
from hypothesis import strategies as st

import common
import data
import gpt2
import hub
import rl
import sft
import train
from common import Run, UserError
from distributed import World
from extras import plot
from kernels import cpu
from tokenizer import Tokenizer
from train import DataLoader, Windows, learning_rate, validation_batches

ROOT = Path(train.__file__).parent
TINY = "--n-layer 2 --n-head 2 --n-embd 32 --seq-len 16 --total-batch-tokens 64 --steps 20 --warmup-steps 2"
TINY += " --eval-tokens 256 --sample-tokens 8 --eval-every 99 --sample-every 99 --save-every 0 --device cpu"
TINY = TINY.split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A data directory of some 20,000 bytes of made-up text, in 40 documents and several shards."""
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    words = ["the", "model", "reads", "a", "text", "and", "writes", "another", "token", "after", "it"]
    texts = (" ".join(rng.choice(words, 100)) + ".\n" for _ in range(40))
    (place / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [
        "--tokenizer",
        "bytes",
        "--val-fraction",
        "0.1",
        "--shard-tokens",
        "7000",
        "--document-chars",
        "2000",
    ]
    done = script.run(data.main, "text", place / "text.jsonl", "--out", place / "shards", *flags)
    assert done.status == 0, done.err
    return place / "shards"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No time goes into measuring the machine, and Ctrl-C works in pytest again after a run."""
    monkeypatch.setattr(train, "measured_flops", lambda *_: 1e11)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    yield
    for name, handler in before.items():
        signal.signal(name, handler)


@pytest.fixture
def start(shards, tmp_path):
    """start(run, *flags): train on the shards; a run's name is a folder in tmp_path."""
    return lambda run, *flags: script.run(
        train.main, "--data", shards, *TINY, "--out", tmp_path / run, *map(str, flags)
    )


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The run that others are compared with: 20 steps, nothing happened; its checkpoints 10 and 20."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = script.run(train.main, "--data", shards, *TINY, "--out", out, "--save-every", "10")
    assert done.status == 0, done.err
    return out


def events(run, kind):
    return [event for event in common.read_log(run) if event["event"] == kind]


def losses_of(run):
    steps = events(run, "step")
    assert [event["step"] for event in steps] == list(range(1, len(steps) + 1))
    return [event["loss"] for event in steps]


def same_bits(one, other):
    """Whether two checkpoints hold the same parameters and moments, to the bit."""
    names = ("model.safetensors", "optimizer.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def loads(checkpoint):
    """Load all that a checkpoint has; return its step."""
    model = gpt2.GPT2.from_pretrained(checkpoint)
    gpt2.AdamW(model).load(checkpoint / "optimizer.safetensors")
    Tokenizer.load(checkpoint)
    assert np.isfinite(model.flat_params).all()
    return common.read_state(checkpoint)["step"]


# ------------------------------------------------------------------------------------------------------------
# Data loader


def counting(*lengths):
    """Shards whose tokens tell where they are: shard k holds 10,000 k, 10,000 k + 1, …"""
    return [np.arange(n, dtype=np.uint16) + 10_000 * k for k, n in enumerate(lengths)]


def window(windows, i):
    """Window i, (T + 1,) tokens."""
    shard, start = windows.locate(i)
    return shard[start : start + windows.T + 1]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    T=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_an_epoch_shows_each_window_once_and_no_token_twice(lengths, T, seed):
    if max(lengths) <= T:
        lengths.append(T + 1)
    windows = Windows(counting(*lengths), T, seed)
    assert windows.n_windows == sum(max(1, n // T - 1) for n in lengths if n > T)
    rows = np.stack([window(windows, i) for i in range(3 * windows.n_windows)])
    assert rows.shape[1] == T + 1
    assert (np.diff(rows.astype(int), axis=1) == 1).all(), "a window crosses a border"
    for epoch in np.split(rows, 3):
        inputs = epoch[:, :-1].ravel()
        assert len(np.unique(inputs)) == len(inputs), "a token came twice in an epoch"


def test_epochs_differ_in_order_and_offset_and_seeds_in_both():
    shards, n = counting(500), 61
    assert Windows(shards, 8, 0).n_windows == n
    starts = {int(window(Windows(shards, 8, seed), n * e)[0]) for seed in range(5) for e in range(5)}
    assert len(starts) > 15
    windows = Windows(shards, 8, 0)
    epochs = [[window(windows, i)[0] for i in range(e * n, e * n + n)] for e in range(4)]
    assert len({int(min(epoch)) for epoch in epochs}) > 1, "all epochs begin at the same offset"
    assert all(epoch != sorted(epoch) for epoch in epochs)


def test_an_epoch_walks_shard_by_shard_in_an_order_of_its_own():
    windows = Windows(counting(100, 60, 80), 5, 7)
    orders, first_tokens = set(), {}
    for epoch in range(8):
        rows = [window(windows, epoch * windows.n_windows + i) for i in range(windows.n_windows)]
        shards = [int(row[0]) // 10_000 for row in rows]
        walked = [shard for shard, _ in itertools.groupby(shards)]
        assert sorted(walked) == [0, 1, 2], "an epoch comes back to a shard"
        orders.add(tuple(walked))
        for k in range(3):
            first_tokens.setdefault(k, set()).add(min(int(r[0]) for r, s in zip(rows, shards) if s == k))
    assert len(orders) > 2
    assert all(len(offsets) > 1 for offsets in first_tokens.values()), "a shard has one offset in all epochs"
    alike = Windows(counting(100, 100), 5, 7)
    starts = [int(window(alike, i)[0]) for i in range(alike.n_windows)]
    one, other = ([start % 10_000 for start in starts if start // 10_000 == k] for k in range(2))
    assert sorted(one) != one != other, "shards of one length are shuffled alike"


def loader_of(shards, seed=3, **flags):
    settings = dict(
        seq_len=8, short_len=8, short_part=0.0, steps=100, total_batch_tokens=96, batch_size=12, seed=seed
    )
    return DataLoader(shards, SimpleNamespace(**{**settings, "overfit_batch": False, **flags}))


def batch_of(loader, step, size=1):
    """(tokens, targets, weights) of a step by all ranks, in the order of the rows."""
    parts = []
    for rank in range(size):
        micro_batches = loader.micro_batches(step, SimpleNamespace(rank=rank, size=size))
        parts.append([np.concatenate(arrays) for arrays in zip(*micro_batches)])
    whole = []
    for arrays in zip(*parts):
        rows = np.empty((sum(map(len, arrays)), arrays[0].shape[1]), arrays[0].dtype)
        for rank, array in enumerate(arrays):
            rows[rank::size] = array
        whole.append(rows)
    return whole


def test_a_batch_depends_on_seed_and_step_and_not_on_who_asks():
    shards = counting(300, 5, 90)
    tokens, targets, weights = batch_of(loader_of(shards), 5)
    assert tokens.shape == targets.shape == weights.shape == (12, 8)
    assert tokens.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(targets, tokens + 1)
    assert weights.sum() == pytest.approx(1) and (weights == 1 / 96).all()
    used = loader_of(shards)
    for step in (9, 0, 400, 5):  # in any order: a resumed run begins anywhere
        batch_of(used, step)
    np.testing.assert_array_equal(batch_of(used, 5)[0], tokens)
    for size, B in itertools.product((1, 2, 3, 4), (1, 2, 3)):  # each of another process
        again = batch_of(loader_of(shards, batch_size=B), 5, size)
        for one, other in zip(again, (tokens, targets, weights)):
            np.testing.assert_array_equal(one, other)
    assert not np.array_equal(batch_of(loader_of(shards, seed=4), 5)[0], tokens)
    assert not np.array_equal(batch_of(loader_of(shards), 6)[0], tokens)


def test_a_micro_batch_has_as_many_tokens_however_long_its_rows():
    loader = loader_of(counting(300), short_len=2, short_part=0.03, batch_size=3)
    world = SimpleNamespace(rank=1, size=2)
    assert [t.shape for t, _, _ in loader.micro_batches(2, world)] == [(12, 2), (12, 2)]
    assert [t.shape for t, _, _ in loader.micro_batches(3, world)] == [(3, 8), (3, 8)]
    assert [loader.row_length(step) for step in (0, 2, 3, 99)] == [2, 2, 8, 8]


def test_steps_follow_one_another_through_the_epochs():
    loader = loader_of(counting(100), seq_len=4, short_len=4, total_batch_tokens=20, batch_size=5)
    windows = loader.windows[4]
    assert windows.n_windows % 5, "the epoch ends with a step, so nothing is tested"
    stream = np.concatenate([batch_of(loader, step)[0] for step in range(20)])
    np.testing.assert_array_equal(stream, [window(windows, i)[:-1] for i in range(100)])
    few = loader_of(counting(5), seq_len=4, short_len=4, total_batch_tokens=12, batch_size=3)
    np.testing.assert_array_equal(batch_of(few, 0)[0], [[0, 1, 2, 3]] * 3)  # one window, three times a step


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match=r"the text has 16 tokens, --seq-len 16 needs 17; add text"):
        Windows(counting(16), 16, 0)
    with pytest.raises(UserError, match=r"the text is in 2 shards of at most 16 tokens, .*--shard-tokens"):
        Windows(counting(3, 16), 16, 0)
    assert Windows(counting(3, 17), 16, 0).n_windows == 1
    with pytest.raises(UserError, match="validation text has 16 tokens, --seq-len 16 needs 17; add text"):
        validation(counting(16), 16, 2, 100)
    with pytest.raises(UserError, match="validation text is in 2 shards of at most 16 tokens"):
        validation(counting(3, 16), 16, 2, 100)


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def validation(shards, T, B, n_tokens):
    return validation_batches(shards, T, SimpleNamespace(batch_size=B, seq_len=T, eval_tokens=n_tokens))


def test_evaluation_reads_the_text_in_order_and_no_token_twice():
    pairs = validation(counting(11, 3, 9), 4, 2, 10**6)
    tokens = np.concatenate([tokens for tokens, _ in pairs])
    targets = np.concatenate([targets for _, targets in pairs])
    assert [len(tokens) for tokens, _ in pairs] == [2, 2]
    expected = np.array(
        [[0, 1, 2, 3], [4, 5, 6, 7], [20000, 20001, 20002, 20003], [20004, 20005, 20006, 20007]]
    )
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(targets, expected + 1)
    assert sum(t.size for t, _ in validation(counting(1000), 4, 3, 40)) == 40
    assert sum(t.size for t, _ in validation(counting(1000), 4, 3, 1)) == 4  # at least one window


def test_bits_per_byte_by_hand():
    class Model:
        ops = gpt2.kernels.load("cpu")

        def losses(self, tokens, targets):  # ln 2 for even targets, 3 ln 2 for odd ones
            return (math.log(2) * (1 + 2 * (targets % 2))).astype(np.float32)

    lengths = np.array([0, 1, 2, 4], np.int32)  # bytes of tokens 0 (a special one) to 3
    batches = [(None, np.array([[1, 2], [3, 0]])), (None, np.array([[2, 2]]))]
    loss, bits = train.evaluate(Model(), batches, lengths, World(0, 1))
    assert loss == pytest.approx(math.log(2) * (3 + 1 + 3 + 1 + 1 + 1) / 6, rel=1e-6)
    assert bits == pytest.approx((3 + 1 + 3 + 1 + 1 + 1) / (1 + 2 + 4 + 0 + 2 + 2), rel=1e-6)
    gathered = []  # a rank of two has every other batch, and both have the sums
    world = SimpleNamespace(rank=1, size=2, gather=lambda sums: gathered.append(sums) or [[1.0, 1, 1], sums])
    loss, bits = train.evaluate(Model(), batches, lengths, world)
    assert gathered == [[pytest.approx(2 * math.log(2)), 2, 4]]
    assert loss == pytest.approx((1 + 2 * math.log(2)) / 3)
    assert bits == pytest.approx((1 + 2 * math.log(2)) / math.log(2) / 5)


def test_evaluation_in_a_run_is_that_of_its_checkpoint(whole, shards):
    *_, final = events(whole, "eval")
    model = gpt2.GPT2.from_pretrained(whole / "step_000020")
    batches = validation(data.shards(shards, "val"), 16, 3, 256)
    nats = np.concatenate([model.losses(*pair).ravel() for pair in batches])
    assert len(nats) == 256
    assert final["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    text = np.concatenate([s[1:] for s in data.shards(shards, "val")])[:256]
    n_bytes = int((text < 256).sum())  # of the byte tokenizer: each a byte, but for the special ones
    assert final["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / n_bytes, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# What one update does


def test_the_first_update_is_shown_and_changes_nothing(start, shards, whole, tmp_path, monkeypatch):
    """Its numbers are those of the models before and after it; a run that goes on says nothing."""
    done = start("run", "--save-every", 1, "--keep", 20)
    words = (
        r'^step 1, one update: "(.*)" after "(.*)" (.*)% -> (.*)%, the others (.*)% -> (.*)%; (\d+) of 16 '
    )
    said = re.search(words, done.err, re.M).groups()
    [event] = events(tmp_path / "run", "update")
    assert said[:2] == (event["right"], event["context"])
    shares = [event["before"], event["after"], 1 - event["before"], 1 - event["after"]]
    assert [float(number) / 100 for number in said[2:6]] == pytest.approx(shares, abs=1e-6)
    loader = DataLoader(data.shards(shards, "train"), train.parse(TINY)[0])
    loader.flags.batch_size = 4
    rows = next(loader.micro_batches(0, SimpleNamespace(rank=0, size=1)))
    after = gpt2.GPT2.from_pretrained(tmp_path / "run" / "step_000001")
    before = gpt2.GPT2(after.config, seed=42)
    one, two = (np.exp(-model.losses(rows[0][:1], rows[1][:1])[0]) for model in (before, after))
    i = int(np.argsort(two / one)[len(one) // 2])
    assert (event["before"], event["after"]) == pytest.approx((one[i], two[i]), rel=1e-5)
    assert event["more_probable"] == (two > one).sum() > event["of"] / 2 == 8
    assert int(said[6]) == event["more_probable"]

    assert same_bits(tmp_path / "run" / "step_000020", whole / "step_000020")
    monkeypatch.setattr(train, "right_tokens", lambda *_: None)
    monkeypatch.setattr(train, "report_first_update", lambda *_: None)
    start("other")
    assert same_bits(tmp_path / "run" / "step_000020", tmp_path / "other" / "step_000020")
    monkeypatch.undo()
    assert "one update" not in start("run", "--resume", "--steps", 22).err


# ------------------------------------------------------------------------------------------------------------
# The learning rate, and steps to leave out


def test_learning_rate_goes_up_in_a_line_and_down_in_a_cosine():
    rates = [learning_rate(step, 110, 2.0, 10, 0.1) for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)  # never 0: no step is wasted
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down
    assert all(b < a for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert learning_rate(110, 110, 2.0, 10, 0.1) == learning_rate(999, 110, 2.0, 10, 0.1) == 0.2
    assert learning_rate(0, 100, 2.0, 0, 0.0) == 2.0  # no warm-up
    assert learning_rate(100, 100, 2.0, 0, 0.0) == 0.0
    assert learning_rate(4, 10, 2.0, 10, 0.0) == learning_rate(4, 5, 2.0, 10, 0.0) == 1.0  # all warm-up
    assert (
        learning_rate(10, 10, 2.0, 10, 0.5) == 2.0
    )  # the warm-up ends with the run: nothing is divided by 0
    assert {learning_rate(step, 9, 2.0, 0, 1.0) for step in range(9)} == {2.0}


class Trouble:
    """Makes the n-th updates of a run bad, and watches what the optimizer does with every one.

    For runs with --batch-size 1, whose steps have 4 micro-batches.
    """

    def __init__(self, monkeypatch, loss=(), gradient=(), factor=math.nan):
        self.passes, self.changed, self.sums = -2, [], []  # two warm passes, of one micro-batch each
        forward, backward, step = gpt2.GPT2.forward, gpt2.GPT2.backward, gpt2.AdamW.step

        def bad_forward(model, *args):
            forward(model, *args)
            self.passes += 1
            if self.passes > 0 and self.passes % 4 == 0 and self.passes // 4 in loss:
                model.loss *= factor

        def bad_backward(model):
            backward(model)
            if self.passes > 0 and self.passes % 4 == 0 and self.passes // 4 in gradient:
                model.flat_grads[7] = factor

        def watched(optimizer, *args):
            before = self._state(optimizer)
            norm = step(optimizer, *args)
            after = self._state(optimizer)
            self.changed.append([not np.array_equal(a, b) for a, b in zip(before, after)])
            self.sums.append(np.abs(optimizer.model.sums).max())
            return norm

        monkeypatch.setattr(gpt2.GPT2, "forward", bad_forward)
        monkeypatch.setattr(gpt2.GPT2, "backward", bad_backward)
        monkeypatch.setattr(gpt2.AdamW, "step", watched)

    def _state(self, optimizer):
        return [a.copy() for a in (optimizer.model.flat_params, optimizer.m, optimizer.v, optimizer.steps)]


def values_of(pairs):
    """Losses or norms as a checkpoint has them, without their steps."""
    return [value for _, value in pairs]


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_left_out(start, tmp_path, monkeypatch, where, factor):
    trouble = Trouble(monkeypatch, **{where: (1, 7)}, factor=factor)
    done = start("run", "--batch-size", 1)
    assert done.status == 0, done.err
    assert [not any(changed) for changed in trouble.changed] == [n in (1, 7) for n in range(1, 21)]
    assert all(all(changed) for n, changed in enumerate(trouble.changed, 1) if n not in (1, 7))
    assert trouble.sums == [0] * 20, "gradients or loss of the left-out step stay for the next"
    assert [e["step"] for e in events(tmp_path / "run", "step") if e["skipped"]] == [1, 7]
    assert len(re.findall(r"^step (1|7)/20 .* SKIPPED$", done.err, re.M)) == 2
    assert done.err.count("SKIPPED") == 2 and "2 steps left out" in done.err
    state = common.read_state(tmp_path / "run" / "step_000020")
    assert state["skipped"] == 2
    assert [step for step, _ in state["losses"]] == [n for n in range(20) if n not in (0, 6)]
    assert np.isfinite(values_of(state["losses"] + state["norms"])).all()
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert loads(tmp_path / "run" / "step_000020") == 20


@pytest.mark.parametrize("where, value", [("loss", 40.0), ("gradient", 1000.0)])
def test_an_outlier_is_left_out_and_the_next_step_is_not(start, tmp_path, monkeypatch, where, value):
    trouble = Trouble(monkeypatch, **{where: (36, 38)}, factor=value)
    assert start("run", "--batch-size", 1, "--steps", 40, "--outlier-z", 6).status == 0
    assert [n for n, changed in enumerate(trouble.changed, 1) if not any(changed)] == [36, 38]
    steps = events(tmp_path / "run", "step")
    z = {e["step"]: e[f"{'loss' if where == 'loss' else 'norm'}_z"] for e in steps}
    assert z[36] > 6 and z[38] > 6 and abs(z[37]) < 6 and abs(z[39]) < 6
    state = common.read_state(tmp_path / "run" / "step_000040")
    assert max(values_of(state["losses"])) < 10 and max(values_of(state["norms"])) < 100


def test_ten_bad_steps_in_a_row_end_the_run_and_nine_do_not(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Trouble(patch, loss=range(6, 99))
        done = start("run", "--batch-size", 1, "--save-every", 5)
    assert done.status == 2 and "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: 10 steps in a row") and "--lr" in last and "--resume" in last
    assert len(losses_of(tmp_path / "run")) == 15
    assert loads(hub.find_checkpoint(tmp_path / "run")) == 10  # with the parameters of step 5
    assert start("run", "--resume", "--lr", 1e-4).status == 0, "the advice of the message does not work"

    with monkeypatch.context() as patch:
        Trouble(patch, loss=[*range(2, 11), *range(12, 20)])
        assert start("nine", "--batch-size", 1).status == 0


class Limits:
    """What the optimizer is told in every step: the norm and the loss above which it leaves the step out."""

    def __init__(self, monkeypatch):
        self.given = []
        step = gpt2.AdamW.step

        def watched(optimizer, lr, max_norm, *limits):
            self.given.append(limits)
            return step(optimizer, lr, max_norm, *limits)

        monkeypatch.setattr(gpt2.AdamW, "step", watched)


def test_limits_follow_from_the_steps_before_the_last_also_after_a_resume(start, tmp_path, monkeypatch):
    """Steps that were left out are no part of what later ones are held to."""
    flags = ("--steps", 60, "--save-every", 45, "--batch-size", 1)
    with monkeypatch.context() as patch:
        Trouble(patch, loss=(36, 45, 50), factor=40.0)
        limits = Limits(patch)
        assert start("run", *flags).status == 0
    steps = events(tmp_path / "run", "step")
    assert [event["step"] for event in steps if event["skipped"]] == [36, 45, 50]
    for i, (event, told) in enumerate(zip(steps, limits.given)):
        taken = [e for e in steps[: max(0, i - 1)] if not e["skipped"]]
        for name, limit in zip(("norm", "loss"), told):
            values = [e[name] for e in taken]
            expected = np.mean(values) + 7 * np.std(values) if len(values) >= 32 else math.inf
            assert limit == pytest.approx(expected, rel=1e-6), (i, name)
        assert event["skipped"] == (event["norm"] > told[0] or event["loss"] > told[1])
    undisturbed = limits.given[45:]
    shutil.rmtree(tmp_path / "run" / "step_000060")
    with monkeypatch.context() as patch:
        Trouble(patch, loss=(5,), factor=40.0)
        limits = Limits(patch)
        assert start("run", "--resume", *flags).status == 0
    assert limits.given == undisturbed
    again = events(tmp_path / "run", "step")
    for name in ("loss", "norm", "skipped", "loss_z", "norm_z", "lr"):
        assert [event[name] for event in again] == [event[name] for event in steps]


def test_the_last_short_rows_are_compared_with_short_ones_in_the_log_too(start, tmp_path):
    flags = ("--n-positions", 16, "--short-len", 4, "--short-part", 0.6, "--steps", 60)
    assert start("run", *flags).status == 0
    steps = events(tmp_path / "run", "step")
    before = [event["loss"] for event in steps[:34]]  # step 36 is the last short one; 35 does not count yet
    assert steps[35]["loss_z"] == pytest.approx((steps[35]["loss"] - np.mean(before)) / np.std(before))
    assert steps[36]["loss_z"] == 0, "the first long rows have nothing to be compared with"


def test_a_step_whose_norm_and_loss_are_its_limits_is_taken(start, tmp_path, whole, monkeypatch):
    """By the device and by the log alike; with a lower limit, by one bit, it is left out."""
    values = {event["step"]: (event["norm"], event["loss"]) for event in events(whole, "step")}
    below = [float(np.nextafter(np.float32(value), np.float32(0))) for value in values[5]]
    for n, limits in enumerate([values[5], (below[0], values[5][1]), (values[5][0], below[1])]):
        limits_of = lambda run, step, since=0, at=limits: at if step == 4 else (math.inf, math.inf)
        monkeypatch.setattr(Run, "limits", limits_of)
        assert start(f"run{n}").status == 0
        assert [e["skipped"] for e in events(tmp_path / f"run{n}", "step")] == [
            n > 0 and step == 5 for step in range(1, 21)
        ]
        same = same_bits(tmp_path / f"run{n}" / "step_000020", whole / "step_000020")
        assert same == (n == 0)


# ------------------------------------------------------------------------------------------------------------
# The loop


def test_an_untrained_model_knows_nothing_and_one_batch_can_be_learned_by_heart(start, tmp_path):
    flags = "--overfit-batch --batch-size 2 --total-batch-tokens 32 --steps 200 --lr 1e-2 --weight-decay 0"
    assert start("run", *flags.split()).status == 0
    losses = losses_of(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(Tokenizer.bytes().vocab_size), abs=0.1)
    assert losses[-1] < 0.01


def test_one_batch_can_be_learned_for_ever(start, tmp_path):
    """The same batch would be as far out again if a step were left out: ten in a row, and the end."""
    flags = "--overfit-batch --n-layer 1 --total-batch-tokens 16 --steps 80 --lr 0.3 --final-lr 1 --beta2 0.5"
    done = start("run", *flags.split())
    assert done.status == 0 and "SKIPPED" not in done.err, done.err.splitlines()[-1]
    losses = losses_of(tmp_path / "run")
    assert max(losses[32:]) > 7 * min(losses[:32]), "no step was far out, so nothing was tested"


def test_training_learns(whole):
    losses = losses_of(whole)
    assert losses[-1] < losses[0] - 1


def test_micro_batches_add_up(start, tmp_path, whole):
    for rows in (1, 2, 4):
        assert start(f"run{rows}", "--batch-size", rows).status == 0
    reference = losses_of(tmp_path / "run4")
    for rows in (1, 2):
        np.testing.assert_allclose(losses_of(tmp_path / f"run{rows}"), reference, rtol=1e-5)
    assert losses_of(whole) == reference  # 4 is what fits, so nobody had to say it


def test_the_same_seed_gives_the_same_bits_and_another_does_not(start, tmp_path, whole):
    assert start("again").status == start("other", "--seed", 1).status == 0
    assert losses_of(tmp_path / "again") == losses_of(whole)
    assert same_bits(tmp_path / "again" / "step_000020", whole / "step_000020")
    assert losses_of(tmp_path / "other")[0] != losses_of(whole)[0]


def test_the_log_and_the_plain_lines_say_all_of_a_step(start, tmp_path):
    done = start("run", "--dollars-per-hour", 36000, "--steps", 5, "--sample-every", 2, "--eval-every", 3)
    lines = [line for line in done.err.splitlines() if line.startswith("step") and "|" in line]
    assert [line.split(" |")[0] for line in lines] == [f"step {n}/5" for n in range(1, 6)]
    for word in ("loss", "(z ", "norm", "lr", "ms", "tok/s", "% of a matmul's rate", "left"):
        assert all(word in line for line in lines), word
    assert re.search(r"^time .*, \$\d+\.\d\d: ", done.out, re.M)
    for what in ("model", "data", "training", "compute", "memory", "time"):
        assert re.search(rf"^{what} ", done.out, re.M), what
    kinds = [(e["event"], e["step"]) for e in common.read_log(tmp_path / "run")]
    steps = [("step", n) for n in range(1, 6)]
    ends = [("checkpoint", 5), ("eval", 5), ("sample", 5)]
    assert kinds == [("start", 0), steps[0], ("update", 1), steps[1], ("sample", 2), steps[2], ("eval", 3),
                     steps[3], ("sample", 4), steps[4], *ends]  # fmt: skip
    samples = [e["text"] for e in events(tmp_path / "run", "sample")]
    assert all(f"a sample:\n{common.printable(text)}" in done.err for text in samples)
    final = events(tmp_path / "run", "eval")[-1]
    assert f"validation loss {final['loss']:.4f}, {final['bits_per_byte']:.4f} bits per byte" in done.err
    fields = {"loss", "loss_z", "norm", "norm_z", "lr", "seconds", "speed", "utilization", "skipped"}
    assert fields < set(events(tmp_path / "run", "step")[0])


def test_a_terminal_shows_one_line_drawn_over(shards, tmp_path, monkeypatch):
    termios, fcntl = pytest.importorskip("termios"), pytest.importorskip("fcntl")
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, np.array([24, 60, 0, 0], np.uint16).tobytes())
    seen = []
    reader = threading.Thread(target=lambda: seen.extend(iter(lambda: read(master), b"")), daemon=True)

    def read(handle):
        try:
            return os.read(handle, 4096)
        except OSError:  # the other end is closed
            return b""

    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        train.main(["--data", str(shards), *TINY, "--out", str(tmp_path / "run"), "--steps", "60"])
    reader.join(10)
    os.close(master)
    drawn = [text for text in b"".join(seen).decode().split("\r\x1b[K") if text.startswith("step")]
    lines = [text for text in drawn if "|" in text]
    assert 1 <= len(lines) < 60, "the line is drawn too often, or never"
    assert all("\n" not in text and len(text) < 60 for text in lines), "a line that wraps stays for ever"
    assert any("validation loss" in text for text in drawn)


def test_the_checkpoint_is_written_before_the_evaluation(start, tmp_path, monkeypatch):
    """An evaluation that dies must not cost the steps before it (PEERS, 6)."""

    def out_of_memory(*_):
        raise MemoryError

    monkeypatch.setattr(train, "evaluate", out_of_memory)
    done = start("run", "--steps", 6, "--save-every", 3, "--eval-every", 3)
    assert done.status == 2 and done.err.splitlines()[-1].startswith("error: not enough memory")
    assert loads(hub.find_checkpoint(tmp_path / "run")) == 3


def test_only_the_newest_checkpoints_are_kept(start, tmp_path):
    assert start("run", "--save-every", 3, "--keep", 3).status == 0
    assert [d.name for d in common.checkpoints(tmp_path / "run")] == [
        "step_000015",
        "step_000018",
        "step_000020",
    ]
    wanted = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "run" / "step_000018").iterdir()} == wanted
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"log.jsonl", "lock"} == {
        d.name for d in common.checkpoints(tmp_path / "run")
    }


def test_presets_are_not_changed_by_a_run(start):
    assert start("run", "--steps", 1).status == 0
    assert gpt2.PRESETS["tiny"]["n_embd"] != 32


# ------------------------------------------------------------------------------------------------------------
# Stop and go on


class Killed(BaseException):
    """What nothing catches: the process is gone."""


def test_a_killed_run_goes_on_bit_for_bit(start, tmp_path, whole, monkeypatch):
    step = gpt2.AdamW.step

    def mortal(optimizer, *args):
        if optimizer.steps == 14:
            raise Killed
        return step(optimizer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(gpt2.AdamW, "step", mortal)
        with pytest.raises(Killed):
            start("run", "--save-every", 10)
    assert len(losses_of(tmp_path / "run")) == 13
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"event": "step", "step": 14, "lo')  # cut off in the middle of a word
    done = script.run(train.main, "--out", tmp_path / "run", "--resume")  # the flags are remembered
    assert done.status == 0, done.err
    assert losses_of(tmp_path / "run") == losses_of(whole)
    for name in ("step_000010", "step_000020"):
        assert same_bits(tmp_path / "run" / name, whole / name)
    state, expected = (common.read_state(run / "step_000020") for run in (tmp_path / "run", whole))
    assert all(state[name] == expected[name] for name in ("step", "skipped", "losses", "norms"))
    done = script.run(train.main, "--out", tmp_path / "run", "--resume")
    assert script.refused(done, "has all its 20 steps", "--steps", "sample.py")


def test_a_run_goes_on_with_another_micro_batch_and_elsewhere(start, tmp_path, whole, monkeypatch):
    assert start("first", "--steps", 10).status == 0  # another schedule, so not the same losses; then:
    (tmp_path / "here").mkdir()
    os.rename(tmp_path / "first", tmp_path / "here" / "moved")
    run = tmp_path / "here" / "moved"
    for rows, place in ((4, tmp_path / "four"), (2, tmp_path / "two")):
        shutil.copytree(run, place)
        done = script.run(train.main, "--out", place, "--resume", "--steps", 20, "--batch-size", rows)
        assert done.status == 0, done.err
        assert loads(place / "step_000020") == 20
    assert not (tmp_path / "first").exists()
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "four"), rtol=1e-5)
    assert common.read_state(tmp_path / "two" / "step_000020")["flags"]["batch_size"] == 2
    monkeypatch.chdir(tmp_path)  # in a run that was moved to the default place, --resume stays there
    (tmp_path / "runs").mkdir()
    os.rename(tmp_path / "two", tmp_path / "runs" / "factbook")
    assert script.run(train.main, "--resume", "--steps", 22).status == 0
    assert loads(tmp_path / "runs" / "factbook" / "step_000022") == 22


def test_a_run_goes_on_with_the_script_that_made_it(whole, start, tmp_path):
    for name, main in (("sft.py", sft.main), ("rl.py", rl.main)):
        done = script.run(main, "--out", whole, "--resume")
        words = f"is a run of train.py, not of {name}", f"python train.py --out {whole} --resume"
        assert script.refused(done, *words)
    shutil.copytree(whole, tmp_path / "assistant")
    state = common.read_state(whole / "step_000020") | {"script": "sft.py", "flags": {}}
    (tmp_path / "assistant" / "step_000020" / "state.json").write_text(json.dumps(state))
    assert script.refused(start("assistant", "--resume"), "python sft.py")


def test_a_run_begins_with_short_rows_and_goes_on_bit_for_bit(start, tmp_path, monkeypatch):
    short = ("--n-positions", 16, "--short-len", 4, "--short-part", 0.3)
    assert start("whole", *short, "--save-every", 5, "--keep", 4).status == 0
    assert start("four", "--n-positions", 16, "--seq-len", 4).status == 0
    losses, others = losses_of(tmp_path / "whole"), losses_of(tmp_path / "four")
    assert losses[:6] == others[:6] and losses[6] != others[6]
    asked, limits = [], Run.limits

    def watched(run, step, since):
        asked.append(since)
        return limits(run, step, since)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "limits", watched)
        assert start("since", *short).status == 0
    assert asked[::2] == [0] * 6 + [6] * 14, "losses of long rows are compared with those of short ones"
    assert asked[1::2] == asked[::2], "the log has other limits than the device"
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "limits", watched)
        assert start("since", "--resume", "--steps", 30).status == 0
    assert asked == [6] * 20, "long rows became short again with more steps"
    for step in (5, 10):  # before the rows grow longer and after
        place = tmp_path / f"from{step}"
        (place).mkdir()
        shutil.copytree(tmp_path / "whole" / f"step_{step:06}", place / f"step_{step:06}")
        shutil.copy(tmp_path / "whole" / "log.jsonl", place)
        assert script.run(train.main, "--out", place, "--resume").status == 0
        assert losses_of(place) == losses
        assert same_bits(place / "step_000020", tmp_path / "whole" / "step_000020")


SLOW = """
import signal, sys, time, gpt2, train, common
signal.signal(signal.SIGINT, signal.default_int_handler)  # also below a shell's `&`, which ignores Ctrl-C
step, seconds = gpt2.AdamW.step, float(sys.argv.pop(1))
gpt2.AdamW.step = lambda *args: (time.sleep(seconds), step(*args))[1]
common.run(train.main)
"""


def slow(seconds, *flags):
    """train.py in a process of its own, whose steps last."""
    command = [sys.executable, "-c", SLOW, str(seconds), *map(str, flags)]
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=script.environment(), **pipes)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(shards, tmp_path, whole):
    run = tmp_path / "a run"
    process = slow(0.05, "--data", shards, *TINY, "--out", run, "--ranks", 1)
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(30) == 130, said
    assert "finishing this step" in said and "Traceback" not in said
    after, command = re.search(r"^stopped after step (\d+); go on with: (.*)$", said, re.M).groups()
    assert 3 <= int(after) < 20 and loads(hub.find_checkpoint(run)) == int(after) == len(losses_of(run))
    python, name, *flags = shlex.split(command)
    assert (python, name) == ("python", "train.py")
    done = script.run(train.main, *flags)
    assert done.status == 0, done.err
    assert losses_of(run) == losses_of(whole)
    assert same_bits(run / "step_000020", whole / "step_000020")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_stops_at_once(shards, tmp_path, ranks):
    process = slow(60, "--data", shards, *TINY, "--out", tmp_path / "run", "--ranks", ranks)
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)  # until the loop has begun
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "once more to stop at once" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(10) == 130 and said.strip() == "interrupted"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "log.jsonl"}


MOMENTS = {  # what the script does when the signal comes, and for the how-manieth time
    "forward": (gpt2.GPT2, "forward", 2 + 4 * 6),
    "all_reduce": (World, "all_reduce", 7),
    "update": (gpt2.AdamW, "step", 7),
    "report": (Run, "report", 7),
    "evaluation": (train, "evaluate", 1),
    "save": (common, "save_checkpoint", 1),
    "last step": (gpt2.AdamW, "step", 20),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_of_a_step_leaves_a_checkpoint(start, tmp_path, monkeypatch, moment, name):
    owner, method, nth = MOMENTS[moment]
    function, calls = getattr(owner, method), itertools.count(1)

    def interrupted(*args, **settings):
        if next(calls) == nth:
            signal.raise_signal(name)
        return function(*args, **settings)

    monkeypatch.setattr(owner, method, interrupted)
    done = start("run", "--batch-size", 1, "--save-every", 5, "--eval-every", 5)
    newest = loads(hub.find_checkpoint(tmp_path / "run"))
    if moment == "last step":  # which needs nothing to go on
        assert done.status == 0 and "go on with" not in done.err and "done: " in done.err and newest == 20
        return
    assert done.status == 128 + name
    assert newest == int(re.search(r"stopped after step (\d+)", done.err).group(1)) < 9
    assert newest == len(losses_of(tmp_path / "run"))


@pytest.mark.parametrize("nth", [1, 3, 22])  # micro-batches of steps 1, 1 and 6
def test_a_stop_request_ends_a_long_step_at_a_micro_batch(start, tmp_path, monkeypatch, nth):
    """The state before the step is saved, and the run goes on from there bit for bit; --save-every 0."""
    assert start("whole", "--batch-size", 1).status == 0
    forward, calls = gpt2.GPT2.forward, itertools.count(-1)  # two micro-batches are measured before

    def interrupted(*args):
        if next(calls) == nth:
            signal.raise_signal(signal.SIGTERM)
        return forward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(common, "LONG_STEP", 0)
        patch.setattr(gpt2.GPT2, "forward", interrupted)
        done = start("run", "--batch-size", 1)
    step = (nth - 1) // 4
    assert done.status == 143 and f"stopped after step {step}; go on with" in done.err
    assert common.read_state(hub.find_checkpoint(tmp_path / "run"))["step"] == step
    assert next(calls) == nth + 1, "micro-batches were computed after the signal"
    assert script.run(train.main, "--out", tmp_path / "run", "--resume").status == 0
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "whole")
    assert same_bits(tmp_path / "run" / "step_000020", tmp_path / "whole" / "step_000020")


LONG = """
import os, sys, time, common, distributed, gpt2, train
sys.path[:0], train.__file__ = [os.getcwd()], sys.argv[0]  # the other rank runs this script too
backward, calls, common.LONG_STEP = gpt2.GPT2.backward, [], 0

def slow_backward(model):
    calls.append(1)
    time.sleep(0.5 if len(calls) > 2 else 0)  # a step has 64 micro-batches
    backward(model)

gpt2.GPT2.backward = slow_backward
common.run(train.main)
"""


def test_ranks_end_a_long_step_together(shards, tmp_path):
    """SIGTERM to the one that is not first; the step would take half a minute."""
    path, run = tmp_path / "long.py", tmp_path / "run"
    path.write_text(LONG)
    flags = (
        "--data",
        shards,
        *TINY,
        "--out",
        run,
        "--batch-size",
        1,
        "--total-batch-tokens",
        2048,
        "--ranks",
        2,
    )
    environment = script.environment(PYTHONPATH=str(ROOT))
    pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    process = subprocess.Popen([sys.executable, path, *map(str, flags)], env=environment, **pipes)
    while not (run / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(kill_runs.ranks_of(process)[1], signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait(30) == 143 and "stopped after step 0; go on" in said, said
    assert time.monotonic() - began < 10
    assert loads(run / "step_000000") == 0


def test_another_process_leaves_a_run_alone_that_is_under_way(shards, tmp_path, whole):
    """Whether it begins anew or resumes; and the run goes on undisturbed."""
    run = tmp_path / "run"
    flags = ("--data", shards, *TINY, "--out", run, "--save-every", 10)
    process = slow(0.2, *flags, "--ranks", 1)
    while not common.checkpoints(run) and process.poll() is None:
        time.sleep(0.02)
    for more in ((), ("--resume",), ("--resume", "--steps", 40)):
        before = (run / "log.jsonl").read_bytes()
        assert script.refused(script.run(train.main, *flags, *more), "another process", "stop it first")
        assert (run / "log.jsonl").read_bytes().startswith(before)
    assert process.poll() is None, "it ended too soon to test anything"
    process.communicate()
    assert process.returncode == 0
    assert losses_of(run) == losses_of(whole)
    assert same_bits(run / "step_000020", whole / "step_000020")
    assert script.refused(script.run(train.main, *flags, "--resume"), "has all its 20 steps")


# ------------------------------------------------------------------------------------------------------------
# Ranks


@pytest.fixture(scope="module")
def two_ranks(shards, tmp_path_factory):
    """The run `whole` by two ranks, a row in a micro-batch."""
    return train_by_ranks(2, shards, tmp_path_factory.mktemp("ranks") / "run", "--batch-size", 1)


def in_processes(*flags):
    """Run train.py in a process of its own, which may start others: .status, .out, .err."""
    command = [sys.executable, "train.py", *map(str, flags)]
    where = dict(cwd=ROOT, env=script.environment())
    done = subprocess.run(command, **where, capture_output=True, text=True, check=False)
    return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


def train_by_ranks(n, shards, out, *flags):
    """A run of n ranks that ends well; return its directory."""
    done = in_processes("--data", shards, *TINY, "--out", out, "--save-every", 10, "--ranks", n, *flags)
    assert done.status == 0, done.err
    assert f"on {n} ranks" in done.out
    assert done.err.count("step 7/20 |") == done.err.count("done: ") == 1, "more than one rank speaks"
    return out


def test_two_ranks_train_as_one_does_to_rounding_and_twice_to_the_bit(shards, tmp_path, whole, two_ranks):
    for name in ("loss", "norm", "lr"):
        one, other = ([e[name] for e in events(run, "step")] for run in (whole, two_ranks))
        np.testing.assert_allclose(other, one, rtol=1e-5)
    for name in ("loss", "bits_per_byte"):
        assert events(two_ranks, "eval")[-1][name] == pytest.approx(events(whole, "eval")[-1][name], rel=1e-5)
    assert events(two_ranks, "start")[0]["ranks"] == 2
    again = train_by_ranks(2, shards, tmp_path / "again", "--batch-size", 1)
    assert losses_of(again) == losses_of(two_ranks)
    assert same_bits(again / "step_000020", two_ranks / "step_000020")


def test_any_number_of_ranks_gives_the_same_losses(shards, tmp_path, whole, two_ranks, capsys):
    """To 1e-5 over 20 steps, and checkpoints of the same form; and so does a run that changes the number."""
    four = train_by_ranks(4, shards, tmp_path / "four")
    (tmp_path / "changing").mkdir()
    changing = tmp_path / "changing"
    shutil.copytree(two_ranks / "step_000010", changing / "step_000010")
    shutil.copy(two_ranks / "log.jsonl", changing)
    done = in_processes("--out", changing, "--resume", "--ranks", 4)
    assert done.status == 0 and "on 4 ranks" in done.out, done.err
    runs = {"1 rank": whole, "2 ranks": two_ranks, "4 ranks": four, "2, then 4": changing}
    one = np.array(losses_of(whole))
    rows = []
    for name, run in runs.items():
        losses = np.array(losses_of(run))
        np.testing.assert_allclose(losses, one, rtol=1e-5)
        rows.append(
            f"{name:10} {losses[0]:.6f} {losses[-1]:.6f}  apart by {np.abs(losses - one).max():.1e} at most"
        )
        for file in ("model.safetensors", "optimizer.safetensors"):
            loaded, expected = (safetensors.numpy.load_file(r / "step_000020" / file) for r in (run, whole))
            assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in expected.items()}
    with capsys.disabled():
        print("\n\nlosses of steps 1 and 20", *rows, sep="\n")


def test_zero_changes_nothing_where_ranks_share_memory(shards, tmp_path, two_ranks):
    zero = train_by_ranks(2, shards, tmp_path / "zero", "--batch-size", 1, "--zero", 1)
    assert losses_of(zero) == losses_of(two_ranks)
    assert same_bits(zero / "step_000020", two_ranks / "step_000020")


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_ranks_of_a_launcher_train_as_those_that_a_script_starts(shards, tmp_path, two_ranks, launcher):
    flags = ("--data", shards, *TINY, "--out", tmp_path / "run", "--save-every", 10, "--batch-size", 1)
    at, processes = test_distributed.port(), []
    for rank in range(2):
        environment = script.environment(**test_distributed.variables(launcher, rank, 2, at))
        command = [sys.executable, "train.py", *map(str, flags)]
        pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "on 2 ranks" in said[0][0] and said[1] == ("", "")
    assert same_bits(tmp_path / "run" / "step_000020", two_ranks / "step_000020")


def test_utilization_is_of_all_gpus():
    ops = SimpleNamespace(card_name=lambda: "NVIDIA H100 80GB HBM3")
    model = SimpleNamespace(device="cuda", dtype="bfloat16", ops=ops)
    assert train.peak_flops(model, SimpleNamespace(size=8)) == (8 * 989.5e12, "MFU")


ON_GPUS = (
    test_distributed.EMULATOR
    + """
import train, common
train.measured_flops = lambda *_: 1e11
common.run(train.main)
"""
)


def test_a_run_on_two_gpus_goes_on_with_one(shards, tmp_path):
    """In the emulator, with a NCCL made of sockets; --zero 1 leaves the files as they are."""
    path, run = tmp_path / "gpus.py", tmp_path / "run"
    path.write_text(ON_GPUS)
    sizes = "--n-layer 1 --n-head 2 --n-embd 32 --seq-len 16 --total-batch-tokens 64 --batch-size 2"
    rare = "--eval-every 3 --eval-tokens 64 --sample-every 0 --save-every 2 --warmup-steps 1 --lr 1e-2"

    def go(size, *flags):
        at, processes = test_distributed.port(), []
        for rank in range(size):
            told = test_distributed.variables("torchrun", rank, size, at)
            environment = script.environment(PYTHONPATH=str(ROOT), **told)
            pipes = dict(stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            command = [sys.executable, path, "--out", run, "--device", "cuda", *map(str, flags)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
        said = [process.communicate(timeout=300) for process in processes]
        assert all(process.returncode == 0 for process in processes), said
        return said[0]

    out, _ = go(2, "--data", shards, *sizes.split(), *rare.split(), "--steps", 4, "--zero", 1)
    assert "on 2 ranks" in out and " a rank: parameters" in out
    once = losses_of(run)
    assert once[-1] < once[0] and loads(run / "step_000004") == 4
    shutil.rmtree(run / "step_000004")
    go(1, "--resume", "--ranks", 1)
    np.testing.assert_allclose(losses_of(run), once, rtol=2e-3)


def test_the_loss_of_a_step_is_the_mean_over_all_of_its_tokens(shards, whole, two_ranks):
    (start,) = events(whole, "start")
    loader = DataLoader(data.shards(shards, "train"), SimpleNamespace(**start["flags"]))
    tokens, targets, _ = batch_of(loader, 0)
    assert tokens.shape == (4, 16)
    model = gpt2.GPT2(gpt2.read_config(whole / "step_000020"))
    expected = model.losses(tokens, targets).mean()
    assert losses_of(whole)[0] == pytest.approx(expected, rel=1e-6)
    assert losses_of(two_ranks)[0] == pytest.approx(expected, rel=1e-6)


def test_a_run_of_one_rank_goes_on_with_two(tmp_path, whole):
    """Also one of the time when there was no --ranks, whose micro-batch is more than the rows of a rank."""
    run = tmp_path / "run"
    shutil.copytree(whole / "step_000010", run / "step_000010")
    shutil.copy(whole / "log.jsonl", run)
    state = common.read_state(run / "step_000010")
    assert state["flags"].pop("ranks") is None and state["flags"]["batch_size"] == 4
    (run / "step_000010" / "state.json").write_text(json.dumps(state))
    assert script.refused(in_processes("--out", run, "--resume", "--ranks", 3), "--ranks 3", "1, 2, 4 do")
    done = in_processes("--out", run, "--resume", "--ranks", 2)
    assert done.status == 0 and "on 2 ranks" in done.out, done.err
    np.testing.assert_allclose(losses_of(run), losses_of(whole), rtol=1e-5)
    assert common.read_state(run / "step_000020")["flags"]["batch_size"] == 2


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_what_all_ranks_cannot_read_is_said_once(tmp_path, two_ranks, name):
    place = tmp_path / "run"
    shutil.copytree(two_ranks / "step_000020", place / "step_000020")
    content = (place / "step_000020" / name).read_bytes()
    (place / "step_000020" / name).write_bytes(content[: len(content) // 2])
    assert script.refused(in_processes("--out", place, "--resume", "--steps", 22), name)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Shards, the last checkpoint of a run that nobody disturbs, and how long it took."""
    return kill_runs.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("n", range(5))
def test_a_run_that_is_killed_ends_with_one_line_and_goes_on_bit_for_bit(tmp_path, undisturbed, n):
    """make test kills five; python tests/kill_runs.py as many as you like."""
    shards, whole, seconds = undisturbed
    way, moment = kill_runs.WAYS[n], random.Random(n).uniform(0, seconds)
    status, took, lines, _ = kill_runs.kill(tmp_path / "run", shards, way, moment)
    kill_runs.check(way, status, took, lines)
    kill_runs.check_same_bits(kill_runs.go_on(tmp_path / "run", shards), whole)


# ------------------------------------------------------------------------------------------------------------
# A full disk


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6])
def test_a_disk_that_fills_up_while_saving_costs_only_that_checkpoint(start, tmp_path, monkeypatch, nth):
    fsync, calls = os.fsync, iter(range(1, 1000))
    assert start("run", "--steps", 4).status == 0
    before = script.tree(tmp_path / "run" / "step_000004")
    monkeypatch.setattr(os, "fsync", lambda handle: full_disk() if next(calls) == nth + 1 else fsync(handle))
    done = start("run", "--resume", "--steps", 8)  # the first fsync is that of the shortened log
    assert done.status == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith("error: No space left on device")
    assert "free some space" in done.err.splitlines()[-1]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "log.jsonl", "step_000004"}
    assert script.tree(tmp_path / "run" / "step_000004") == before
    assert loads(hub.find_checkpoint(tmp_path / "run")) == 4
    monkeypatch.undo()
    assert start("run", "--resume", "--steps", 8).status == 0, "the same command does not work again"


def test_a_file_that_cannot_grow_costs_only_that_checkpoint(start, tmp_path):
    assert start("run", "--steps", 4).status == 0
    largest = (tmp_path / "run" / "step_000004" / "model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, limits[1]))
    try:
        done = start("run", "--resume", "--steps", 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.status == 2 and done.err.splitlines()[-1].startswith("error: File too large")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "log.jsonl", "step_000004"}
    assert loads(hub.find_checkpoint(tmp_path / "run")) == 4


def test_a_disk_that_is_nearly_full_is_noticed_in_time(start, tmp_path, monkeypatch):
    """At the start, and after a checkpoint, when the next one would not fit."""
    free = iter([10**9, 10**9, 10**4, 10**9])  # at the start, after steps 5, 10 and 15
    disk = lambda _: SimpleNamespace(free=next(free, 10**4))
    monkeypatch.setattr(shutil, "disk_usage", disk)
    done = start("run", "--save-every", 5)
    assert done.status == 0
    warnings = [line for line in done.err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 2 and all("10 kB are free" in w and "free some space" in w for w in warnings)
    n_bytes = sum(path.stat().st_size for path in (tmp_path / "run" / "step_000020").iterdir())
    assert f"the next checkpoint takes {common.size(n_bytes)}, and" in warnings[-1]
    at_start = start("other", "--steps", 1).err
    assert at_start.count("warning:") == 2


# ------------------------------------------------------------------------------------------------------------
# Begin with other weights


def test_the_number_of_ranks_that_was_not_given_may_change(start, tmp_path, monkeypatch):
    assert start("run", "--steps", 2).status == 0
    assert start("other", "--steps", 2, "--ranks", 1).status == 0
    saved = [
        common.read_state(hub.find_checkpoint(tmp_path / run))["flags"]["ranks"] for run in ("run", "other")
    ]
    assert saved == [None, 1]


def test_init_from_begins_with_the_weights_of_a_checkpoint(start, tmp_path, whole):
    for i, source in enumerate((whole, whole / "step_000020")):
        assert start(f"run{i}", "--init-from", source, "--steps", 2, "--lr", 1e-9).status == 0
        one = gpt2.GPT2.from_pretrained(tmp_path / f"run{i}/step_000002")
        other = gpt2.GPT2.from_pretrained(whole / "step_000020")
        np.testing.assert_allclose(one.flat_params, other.flat_params, atol=1e-6)
        assert losses_of(tmp_path / f"run{i}")[0] < losses_of(whole)[0] - 1
    assert start("run0", "--resume", "--steps", 3).status == 0


def test_a_checkpoint_of_another_shape_is_refused(shards, tmp_path, whole):
    go = lambda *flags: script.run(train.main, "--data", shards, *flags)
    before = script.tree(whole)
    new = ("--out", tmp_path / "new", "--seq-len", 16, "--total-batch-tokens", 64, "--init-from", whole)
    on = ("--out", whole, "--resume", "--steps", 30)
    assert script.refused(go(*new, "--n-layer", 3), "n_layer 2", "--n-layer 3")
    assert script.refused(go(*new, "--n-positions", 99), "n_positions 16", "--n-positions 99")
    assert script.refused(go(*on, "--n-embd", 64), "n_embd 32", "--n-embd 64")
    assert script.refused(go(*on, "--model", "d12"), "tiny", "--model d12")
    assert script.refused(go(*new, "--seq-len", 32), "--seq-len 32", "context of 16")
    model = gpt2.GPT2(gpt2.GPT2Config(1, 2, 16, 16, vocab_size=300))
    model.save_pretrained(tmp_path / "other")
    other = go(*new, "--init-from", tmp_path / "other")
    assert script.refused(other, "300 tokens", str(Tokenizer.bytes().vocab_size), "--data")
    copy = shutil.copytree(whole / "step_000020", tmp_path / "copy")  # as many tokens, but other ones
    tokenizer = Tokenizer("bpe", {bytes([byte]): 255 - byte for byte in reversed(range(256))})
    tokenizer.save(copy)
    other = go(*new, "--init-from", copy)
    assert script.refused(other, "another vocabulary", f"data.py --tokenizer {copy / 'tokenizer.json'}")
    assert script.tree(whole) == before and not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------------
# Bad input


def copy_of(shards, place, change):
    """A copy of the shards with something wrong: change(train paths, directory)."""
    place.mkdir()
    for name, content in script.tree(shards).items():
        (place / name).write_bytes(content)
    change(sorted(place.glob("*_train_*")), place)
    return place


def overwrite(path, at, values, dtype):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(np.array(values, dtype).tobytes())


def shorten(paths, n_tokens):
    for path in paths:
        os.truncate(path, 1024 + 2 * n_tokens)
        overwrite(path, 8, [n_tokens], "<i4")


def link_to_nothing(path):
    link = path.with_suffix(".link")
    link.symlink_to("gone")
    return link


DAMAGE = {
    "no train shard": (lambda train, _: [path.unlink() for path in train], "no *_train_*.bin", "data.py"),
    "no val shard": (lambda _, d: [p.unlink() for p in d.glob("*_val_*")], "no *_val_*.bin", "data.py"),
    "truncated": (lambda train, _: os.truncate(train[-1], 3000), "truncated", "again"),
    "empty file": (lambda train, _: os.truncate(train[0], 0), "truncated", "again"),
    "no tokens": (lambda train, _: shorten(train[:1], 0), "truncated"),
    "broken link": (lambda train, _: os.replace(link_to_nothing(train[0]), train[0]), "01.bin is a link"),
    "wrong magic": (lambda train, _: overwrite(train[0], 0, [20240801], "<i4"), "20240801", "no shard"),
    "wrong version": (lambda train, _: overwrite(train[0], 4, [7], "<i4"), "version 7"),
    "token": (lambda train, _: overwrite(train[1], 1030, [266], "<u2"), "token 266", "ends at 265", "02.bin"),
    "no tokenizer": (lambda _, d: (d / "tokenizer.json").unlink(), "no tokenizer", "data.py"),
    "short text": (lambda train, _: shorten(train, 1), "--seq-len 16 needs 17", "add text"),
    "small shards": (lambda train, _: shorten(train, 16), "at most 16 tokens", "--shard-tokens"),
    "short validation": (lambda _, d: shorten(d.glob("*_val_*"), 16), "validation text", "add text"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_data_is_one_clear_line(shards, tmp_path, what):
    change, *words = DAMAGE[what]
    place = copy_of(shards, tmp_path / "damaged", change)
    done = script.run(train.main, "--data", place, *TINY, "--out", tmp_path / "run")
    assert script.refused(done, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--data missing", ("missing", "data.py")),
        ("--batch-size 0", ("--batch-size", "at least 1")),
        ("--batch-size 3", ("--batch-size 3", "does not divide the 4 rows")),
        ("--total-batch-tokens 65", ("--total-batch-tokens 65", "no multiple of --seq-len 16")),
        ("--total-batch-tokens 8", ("--total-batch-tokens 8", "no multiple of --seq-len 16")),
        ("--short-len 5", ("--seq-len 16", "no multiple of --short-len 5")),
        ("--n-positions 8", ("--seq-len 16", "context of 8")),
        ("--model d13", ("--model", "d13", "d12")),
        ("--n-head 3", ("n_embd 32", "n_head 3")),
        ("--steps 0", ("--steps", "at least 1")),
        ("--steps 1.5e0", ("--steps", "whole number")),
        ("--lr 0", ("--lr", "greater than 0")),
        ("--lr nan", ("--lr", "not a number")),
        ("--grad-clip inf", ("--grad-clip", "not a number")),
        ("--steps 1" + 400 * "0", ("--steps", "not a whole number")),
        ("--final-lr 2", ("--final-lr", "at most 1")),
        ("--device tpu", ("--device", "cuda")),
        ("--dtype int8", ("--dtype", "float32")),
        ("--dtype bfloat16", ("bfloat16", "cpu")),
        ("--lern 1", ("--lern", "--help")),
        ("--init-from missing", ("missing", "no checkpoint")),
        ("--init-from .", ("no checkpoint", "step_")),
        ("--resume", ("nothing to resume", "without --resume")),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_bad_flag_is_one_clear_line(start, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert script.refused(start("run", *flags.split()), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_is_not_touched(start, tmp_path, whole):
    before = script.tree(whole)
    assert script.refused(start(whole), "exists", "--resume", "--out")
    assert script.tree(whole) == before
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.jsonl").write_text("{}\n")
    for flags in ((), ("--resume",)):  # a run that ended before its first checkpoint: both say what to do
        assert script.refused(start("log", *flags), "has no checkpoint")
    assert (tmp_path / "log" / "log.jsonl").read_text() == "{}\n"
    (tmp_path / "file").write_text("x")
    assert script.refused(start("file"), "file exists", "--out")
    assert script.refused(start("file/run"), "Not a directory", "another place")
    (tmp_path / "empty").mkdir()
    assert start("empty", "--steps", 1).status == 0


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "model.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, whole, name):
    place = tmp_path / "run" / "step_000020"
    place.mkdir(parents=True)
    for path in (whole / "step_000020").iterdir():
        content = path.read_bytes()
        (place / path.name).write_bytes(content[: len(content) // 2] if path.name == name else content)
    assert script.refused(script.run(train.main, "--out", tmp_path / "run", "--resume", "--steps", 22), name)


# ------------------------------------------------------------------------------------------------------------
# Time and money


def test_hours_set_the_number_of_steps_and_a_resumed_run_keeps_it(shards, tmp_path, monkeypatch):
    flags = [flag for flag in TINY if flag not in ("--steps", "20")]

    def go(run, *more):
        return script.run(train.main, "--data", shards, *flags, "--out", tmp_path / run, *more)

    measured = {16: 0.5}
    monkeypatch.setattr(train, "measure_steps", lambda *_: measured)
    assert go("run", "--hours", 5.2 / 3600, "--save-every", 5).status == 0
    assert len(losses_of(tmp_path / "run")) == 10  # of half a second each, and evaluations
    assert events(tmp_path / "run", "step")[-1]["lr"] == pytest.approx(learning_rate(9, 10, 3e-3, 2, 0.0))
    shutil.rmtree(tmp_path / "run" / "step_000010")
    measured[16] = 5.0  # the machine is slower now: the schedule stays what it was
    for more in ((), ("--hours", 5.2 / 3600)):
        again = go("run", "--resume", *more)
        assert again.status == 0, again.err
        assert len(losses_of(tmp_path / "run")) == 10
        shutil.rmtree(tmp_path / "run" / "step_000010")
    other = go("run", "--resume", "--hours", 7)
    assert script.refused(other, "has its 10 steps", "--steps")
    assert go("money", "--dollars", 12, "--dollars-per-hour", 7200).status == 0
    assert len(losses_of(tmp_path / "money")) == 1
    assert script.refused(go("new", "--hours", 1e-9), "one step takes", "--hours")


def test_a_whole_step_is_measured_for_hours_and_changes_nothing(shards):
    tokenizer, flags = Tokenizer.load(shards), train.parse(["--data", str(shards), *TINY])[0]
    flags.batch_size, flags.hours, flags.dtype = 2, 1.0, "float32"
    config = train.model_config(flags, tokenizer, None)
    model = train.make_model(None, config, "cpu", flags)
    optimizer, before = gpt2.AdamW(model), model.flat_params.copy()
    loader = DataLoader(data.shards(shards, "train"), flags)
    times = train.measure_steps(model, optimizer, loader, flags, World(0, 1))
    assert times.keys() == {16} and times[16] > 0
    assert np.array_equal(model.flat_params, before)
    assert not (model.sums.any() or optimizer.m.any() or optimizer.v.any() or optimizer.steps.any())


def test_steps_in_an_hour_by_hand():
    settings = dict(
        short_len=4, short_part=0.5, seq_len=16, eval_every=0, eval_tokens=30, total_batch_tokens=10
    )
    flags, times = SimpleNamespace(**settings), {4: 1.0, 16: 7.0}
    assert [train.run_seconds(steps, flags, times) for steps in (2, 100)] == [8, 400], "half of each length"
    for wanted, steps in ((4, 1), (7.9, 1), (8, 2), (399, 99), (400, 100), (3600, 900)):
        assert train.steps_in(wanted / 3600, flags, times) == steps
    flags.eval_every = 5  # 30 tokens every 5 steps are 6 of 10 tokens a step, at a third of the price
    assert train.run_seconds(100, flags, times) == pytest.approx(480)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--hours 1", ("--hours", "leave out --steps 20")),
        ("--dollars 1", ("--dollars-per-hour",)),
        ("--hours 0", ("--hours", "greater than 0")),
        ("--zero 2", ("--zero", "invalid choice")),
    ],
)
def test_bad_words_about_time_and_money_are_one_clear_line(start, tmp_path, flags, words):
    assert script.refused(start("run", *flags.split()), *words)
    assert list(tmp_path.iterdir()) == []


def test_what_others_reached_is_said_before_a_run(start):
    assert "none has published" in start("run", "--steps", 1).out
    d12 = train.parse(["--model", "d12"])[0]
    assert train.published(d12, "fineweb").startswith("validation loss 3.27 to 3.29, HellaSwag 29.5 to 30")
    d12.steps = 4000
    assert train.published(d12, "fineweb").endswith("after 18,865 steps")
    d12.lr = 1e-3
    assert "none has published" in train.published(d12, "fineweb")
    assert "none has published" in train.published(train.parse(["--model", "d36"])[0], "fineweb")


# ------------------------------------------------------------------------------------------------------------
# Memory


def test_too_little_memory_is_said_before_any_is_taken(start, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "free_memory", lambda: 10**5)
    monkeypatch.setattr(gpt2, "GPT2", lambda *_: pytest.fail("allocated"))
    assert script.refused(start("run"), "100 kB are free", "--batch-size", "--model")
    assert not (tmp_path / "run").exists()


def test_the_micro_batch_is_what_memory_allows():
    config = gpt2.GPT2Config(12, 12, 768, 1024, 50257)

    def chosen(rows, free, ranks=1, at_once=8 * 1024, batch_size=None, world=World(0, 1), zero=None):  # noqa: B008
        flags = SimpleNamespace(seq_len=1024, total_batch_tokens=rows * 1024, ranks=ranks, dtype="float32")
        flags.recompute, flags.batch_size, flags.resume, flags.zero = False, batch_size, False, zero
        ops = SimpleNamespace(free_memory=lambda: free, BATCH_TOKENS=at_once, SHARE=1.0, LOGITS=1 << 22)
        memory = train.choose_batch_size(flags, config, ops, world, one_memory=zero is None)
        return flags.batch_size, sum(memory.values())

    needs = {B: chosen(B, 1e15, batch_size=B)[1] for B in range(1, 9)}
    assert chosen(512, 1e15) == (8, needs[8])
    assert chosen(512, needs[4]) == (4, needs[4])
    assert chosen(512, needs[4] - 1)[0] == 2
    assert chosen(6, needs[5])[0] == 3  # 4 rows would fit, but do not divide 6
    assert chosen(7, needs[6])[0] == chosen(512, 1e15, at_once=1024)[0] == 1
    assert chosen(6, 1e15, ranks=2)[0] == 3  # a rank has 3 rows of the 6
    rank_0_says = SimpleNamespace(gather=lambda free: [needs[4], free])
    assert chosen(512, 1e15, world=rank_0_says)[0] == 4
    assert chosen(512, needs[4], ranks=2)[0] < 4  # and each has activations
    assert chosen(512, needs[4], ranks=2, zero=0)[0] == 4  # unless each has a GPU of its own
    moments = 8 * config.n_params()
    assert chosen(512, 1e15, ranks=2, zero=1, batch_size=4)[1] == needs[4] - moments / 2
    with pytest.raises(UserError, match=r"GB are free; lower --batch-size 1, use --recompute"):
        chosen(512, needs[1] - 1)


def test_some_memory_is_free():
    free = cpu.free_memory()
    assert free is None or 10**7 < free < 10**14


# ------------------------------------------------------------------------------------------------------------
# The plot


def write_log(run, *events):
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_plot_draws_one_run_and_two(tmp_path, whole, start, monkeypatch):
    with monkeypatch.context() as patch:
        Trouble(patch, loss=(2,))
        assert start("nan", "--batch-size", 1, "--steps", 4).status == 0  # with a loss that is no number
    for n, names in enumerate(([whole], [whole, tmp_path / "nan"], [tmp_path / "nan"])):
        done = script.run(plot.main, *names, "--out", tmp_path / f"{n}.png")
        assert done.status == 0 and done.out.strip() == str(tmp_path / f"{n}.png")
        assert (tmp_path / f"{n}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    done = script.run(plot.main, tmp_path / "nan")
    assert (tmp_path / "nan" / "plot.png").stat().st_size > 5000


def test_the_figures_of_kernels_come_from_the_results_on_the_card(tmp_path):
    """And say their numbers: a table whose columns moved would be drawn wrong, or not at all."""
    versions = {row[0]: plot.rate(row[3]) for row in plot.table("Versions")}
    assert 1 < versions["124M qkv: naive"] < versions["124M qkv: Hopper, pingpong"] < 990
    plot.draw_matmul(tmp_path / "matmul.png")
    plot.draw_step(tmp_path / "step.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    assert script.refused(script.run(plot.main), "--figures")


def test_plot_says_what_is_no_run(tmp_path):
    assert script.refused(script.run(plot.main, tmp_path / "missing"), "missing", "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"event": "start", "step": 0}\n')
    assert script.refused(script.run(plot.main, tmp_path), "no steps")


def test_console_line_is_plain_where_there_is_no_terminal(capsys):
    line = common.Line(every=0)
    line.show("one")
    line.show("two")
    line.clear("three")
    assert capsys.readouterr().err == "one\ntwo\nthree\n"


def test_a_run_of_practice_is_drawn_by_what_it_got_right(tmp_path):
    write_log(
        tmp_path,
        dict(event="start", step=0, stage="rl"),
        dict(event="eval", step=0, correct=0.25, length=30.0, results=[]),
        dict(event="step", step=1, correct=0.25, length=20.0, loss=0.1, lr=1e-3),
        dict(event="step", step=2, correct=0.5, length=20.0, loss=0.1, lr=1e-3),
    )
    events = common.read_log(tmp_path)
    assert plot.curves_of(events) == ("correct", "length")
    assert plot.points(events, "step", "correct") == ([1, 2], [0.25, 0.5])
    assert plot.points(events, "eval", "correct") == ([0], [0.25])
    assert script.run(plot.main, tmp_path).status == 0
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_run_that_pleases_a_reward_model_is_drawn_beside_the_truth(tmp_path):
    write_log(
        tmp_path,
        dict(event="eval", step=0, score=0.5, reward=0.0),
        dict(event="eval", step=2, score=0.3, reward=2.0),
        dict(event="step", step=1, reward=0.7, loss=0.1, lr=1e-3),
    )
    events = common.read_log(tmp_path)
    assert plot.curves_of(events) == ("score", "reward")
    assert plot.points(events, "eval", "score") == ([0, 2], [0.5, 0.3])
    assert plot.points(events, "step", "reward") == ([1], [0.7])
    assert script.run(plot.main, tmp_path).status == 0
