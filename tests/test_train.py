"""Pretraining held to its promises: which tokens a step sees, what it does with them, and that nothing that
happens to a run (a NaN, Ctrl-C, another micro-batch, a full disk, bad input) changes or costs the result."""

import errno
import itertools
import json
import math
import os
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

import numpy as np
import pytest
import script
from hypothesis import given
from hypothesis import strategies as st

import common
import data
import gpt2
import train
from common import UserError
from extras import plot
from kernels import cpu
from tokenizer import Tokenizer
from train import Outliers, Windows, evaluation_batches, learning_rate

ROOT = Path(train.__file__).parent
TINY = "--n-layer 2 --n-head 2 --n-embd 32 --seq-len 16 --total-batch-tokens 64 --steps 20 --warmup-steps 2"
TINY += " --eval-tokens 256 --sample-tokens 8 --eval-every 0 --sample-every 0 --save-every 0 --device cpu"
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
    monkeypatch.setattr(train, "measured_peak", lambda *_: 1e11)
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
# Batches


def counting(*lengths):
    """Shards whose tokens tell where they are: shard k holds 10,000 k, 10,000 k + 1, …"""
    return [np.arange(n, dtype=np.uint16) + 10_000 * k for k, n in enumerate(lengths)]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    T=st.integers(1, 9),
    rows=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_an_epoch_shows_each_window_once_and_no_token_twice(lengths, T, rows, seed):
    if max(lengths) <= T:
        lengths.append(T + 1)
    batches = Windows(counting(*lengths), T, rows, seed)
    assert batches.n_windows == sum(max(1, n // T - 1) for n in lengths if n > T)
    assert batches.n_tokens == sum(n for n in lengths if n > T)
    windows = np.stack([batches._window(i) for i in range(3 * batches.n_windows)])
    assert windows.shape[1] == T + 1
    assert (np.diff(windows.astype(int), axis=1) == 1).all(), "a window crosses a border"
    for epoch in np.split(windows, 3):
        inputs = epoch[:, :-1].ravel()
        assert len(np.unique(inputs)) == len(inputs), "a token came twice in an epoch"


def test_epochs_differ_in_order_and_offset_and_seeds_in_both():
    shards, first = counting(500), lambda seed, epoch: Windows(shards, 8, 1, seed)._window(61 * epoch)
    assert Windows(shards, 8, 1, 0).n_windows == 61
    starts = {int(first(seed, epoch)[0]) for seed in range(5) for epoch in range(5)}
    assert len(starts) > 15
    epochs = [[Windows(shards, 8, 1, 0)._window(i)[0] for i in range(e * 61, e * 61 + 61)] for e in range(4)]
    assert len({int(min(epoch)) for epoch in epochs}) > 1, "all epochs begin at the same offset"
    assert all(epoch != sorted(epoch) for epoch in epochs)


def test_a_batch_depends_on_seed_and_step_and_not_on_who_asks():
    make = lambda seed=3: Windows(counting(300, 5, 90), 7, 12, seed)
    tokens, targets = make().batch(5)
    assert tokens.shape == targets.shape == (12, 7)
    assert tokens.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    used = make()
    for step in (9, 0, 400, 5):  # in any order: a resumed run begins anywhere
        used.batch(step)
    np.testing.assert_array_equal(used.batch(5)[0], tokens)
    for micro in (1, 2, 3, 4, 6):
        other = make()  # of another process
        parts = [other.batch(5, first, micro)[0] for first in reversed(range(0, 12, micro))]
        np.testing.assert_array_equal(np.concatenate(parts[::-1]), tokens)
    assert not np.array_equal(make(4).batch(5)[0], tokens)
    assert not np.array_equal(make().batch(6)[0], tokens)


def test_steps_follow_one_another_through_the_epochs():
    batches = Windows(counting(100), 4, 5, 0)
    stream = np.concatenate([batches.batch(step)[0] for step in range(20)])
    np.testing.assert_array_equal(stream, [batches._window(i)[:-1] for i in range(100)])
    few = Windows(counting(5), 4, 3, 0)  # one window, three times a step
    np.testing.assert_array_equal(few.batch(0)[0], [[0, 1, 2, 3]] * 3)


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(UserError, match=r"16 tokens, --seq-len 16 needs 17"):
        Windows(counting(3, 16), 16, 1, 0)
    assert Windows(counting(3, 17), 16, 1, 0).n_windows == 1
    with pytest.raises(UserError, match="validation text is shorter than --seq-len 16"):
        list(evaluation_batches(counting(16), 16, 2, 100))


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_reads_the_text_in_order_and_no_token_twice():
    pairs = list(evaluation_batches(counting(11, 3, 9), 4, 2, 10**6))
    tokens = np.concatenate([tokens for tokens, _ in pairs])
    targets = np.concatenate([targets for _, targets in pairs])
    assert [len(tokens) for tokens, _ in pairs] == [2, 2]
    expected = np.array(
        [[0, 1, 2, 3], [4, 5, 6, 7], [20000, 20001, 20002, 20003], [20004, 20005, 20006, 20007]]
    )
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(targets, expected + 1)
    assert sum(t.size for t, _ in evaluation_batches(counting(1000), 4, 3, 40)) == 40
    assert sum(t.size for t, _ in evaluation_batches(counting(1000), 4, 3, 1)) == 4  # at least one window


def test_bits_per_byte_by_hand():
    class Model:
        ops, prefetch = gpt2.kernels.load("cpu"), staticmethod(iter)

        def losses(self, tokens, targets):  # ln 2 for even targets, 3 ln 2 for odd ones
            return (math.log(2) * (1 + 2 * (targets % 2))).astype(np.float32)

    lengths = np.array([0, 1, 2, 4], np.int32)  # bytes of tokens 0 (a special one) to 3
    batches = [(None, np.array([[1, 2], [3, 0]])), (None, np.array([[2, 2]]))]
    loss, bits = train.evaluate(Model(), batches, lengths)
    assert loss == pytest.approx(math.log(2) * (3 + 1 + 3 + 1 + 1 + 1) / 6, rel=1e-6)
    assert bits == pytest.approx((3 + 1 + 3 + 1 + 1 + 1) / (1 + 2 + 4 + 0 + 2 + 2), rel=1e-6)


def test_evaluation_in_a_run_is_that_of_its_checkpoint(whole, shards):
    (final,) = events(whole, "eval")
    model = gpt2.GPT2.from_pretrained(whole / "step_000020")
    batches = evaluation_batches(data.shards(shards, "val"), 16, 3, 256)
    nats = np.concatenate([model.losses(*pair).ravel() for pair in batches])
    assert len(nats) == 256
    assert final["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    text = np.concatenate([s[1:] for s in data.shards(shards, "val")])[:256]
    n_bytes = int((text < 256).sum())  # of the byte tokenizer: each a byte, but for the special ones
    assert final["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / n_bytes, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The learning rate, and steps to leave out


def test_learning_rate_goes_up_in_a_line_and_down_in_a_cosine():
    rates = [learning_rate(step, 110, 2.0, 10, 0.1) for step in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 0.2)  # never 0: no step is wasted
    assert rates[10] == max(rates) == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 / 2))  # half way down
    assert all(b < a for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.2, abs=1e-3)
    assert learning_rate(110, 110, 2.0, 10, 0.1) == learning_rate(999, 110, 2.0, 10, 0.1) == 0.2
    assert learning_rate(0, 100, 2.0, 0, 0.0) == 2.0  # no warm-up
    assert learning_rate(100, 100, 2.0, 0, 0.0) == 0.0
    assert learning_rate(4, 10, 2.0, 10, 0.0) == learning_rate(4, 5, 2.0, 10, 0.0) == 1.0  # all warm-up


def test_outliers_are_counted_against_a_window_they_never_enter():
    values = list(np.random.default_rng(0).normal(5, 0.1, 100))
    window = Outliers(7, values)
    assert window.limit() == pytest.approx(np.mean(values) + 7 * np.std(values))
    assert window.z(5.5) == pytest.approx((5.5 - np.mean(values)) / np.std(values))
    for bad in (math.nan, math.inf, -math.inf, 7.0):  # llm.c's window is poisoned by the first (PEERS, 1)
        assert not window.accepts(bad)
    assert list(window.values) == values
    assert window.accepts(5.1) and window.accepts(1.0)  # far below is good news
    assert list(window.values) == [*values, 5.1, 1.0]
    assert window.accepts(5.0) and math.isfinite(window.limit())


def test_outliers_need_something_to_compare_with_and_can_be_off():
    young = Outliers(7, [1.0] * 31)
    assert young.limit() == math.inf and young.z(99.0) == 0 and not young.accepts(math.nan)
    assert young.accepts(99.0)
    off = Outliers(0, [1.0] * 100)
    assert off.accepts(99.0) and not off.accepts(math.nan)
    long = Outliers(7)
    assert all(long.accepts(1.0) for _ in range(500)) and len(long.values) == 128
    assert not long.accepts(1.1) and long.accepts(1.0)  # a constant past has no deviation to divide by


class Trouble:
    """Makes the n-th updates of a run bad, and watches what the optimizer does with every one."""

    def __init__(self, monkeypatch, loss=(), gradient=(), factor=math.nan):
        self.passes, self.changed, self.grads = -2, [], []  # two warm passes, of one micro-batch each
        forward, backward, step = gpt2.GPT2.forward, gpt2.GPT2.backward, gpt2.AdamW.update

        def bad_forward(model, *args):
            losses = forward(model, *args)
            self.passes += 1
            return losses * factor if (self.passes - 1) // 4 + 1 in loss and self.passes > 0 else losses

        def bad_backward(model):
            backward(model)
            if (self.passes - 1) // 4 + 1 in gradient and self.passes > 0:
                model.flat_grads[7] = factor

        def watched(optimizer, *args):
            state = lambda: [a.copy() for a in (optimizer.model.flat_params, optimizer.m, optimizer.v)]
            before = state()
            norm = step(optimizer, *args)  # a function: the norm is read later
            self.changed.append([not np.array_equal(a, b) for a, b in zip(before, state())])
            self.grads.append(np.abs(optimizer.model.flat_grads).max())
            return norm

        monkeypatch.setattr(gpt2.GPT2, "forward", bad_forward)
        monkeypatch.setattr(gpt2.GPT2, "backward", bad_backward)
        monkeypatch.setattr(gpt2.AdamW, "update", watched)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_step_that_is_no_number_is_left_out(start, tmp_path, monkeypatch, where, factor):
    trouble = Trouble(monkeypatch, **{where: (1, 7)}, factor=factor)
    done = start("run", "--batch-size", 1)
    assert done.status == 0, done.err
    assert [not any(changed) for changed in trouble.changed] == [n in (1, 7) for n in range(1, 21)]
    assert all(all(changed) for n, changed in enumerate(trouble.changed, 1) if n not in (1, 7))
    assert trouble.grads == [0] * 20, "gradients of the left-out step stay for the next"
    assert [e["step"] for e in events(tmp_path / "run", "step") if e["skipped"]] == [1, 7]
    assert len(re.findall(r"^step (1|7)/20 .* SKIPPED$", done.err, re.M)) == 2
    assert done.err.count("SKIPPED") == 2 and "2 steps left out" in done.err
    state = common.read_state(tmp_path / "run" / "step_000020")
    assert state["skipped"] == 2
    assert np.isfinite(state["losses"] + state["norms"]).all()
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
    assert max(state["losses"]) < 10 and max(state["norms"]) < 100


def test_ten_bad_steps_in_a_row_end_the_run_and_nine_do_not(start, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Trouble(patch, loss=range(6, 99))
        done = start("run", "--batch-size", 1, "--save-every", 5)
    assert done.status == 2 and "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("error: 10 steps in a row") and "--lr" in last and "--resume" in last
    assert len(losses_of(tmp_path / "run")) == 15
    assert loads(common.newest_checkpoint(tmp_path / "run")) == 10  # with the parameters of step 5
    assert start("run", "--resume", "--lr", 1e-4).status == 0, "the advice of the message does not work"

    with monkeypatch.context() as patch:
        Trouble(patch, loss=[*range(2, 11), *range(12, 20)])
        assert start("nine", "--batch-size", 1).status == 0


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
    for word in ("loss", "(z ", "norm", "lr", "ms", "tok/s", "% of peak", "left"):
        assert all(word in line for line in lines), word
    assert re.search(r"^time .*, \$\d+\.\d\d: ", done.out, re.M)
    for what in ("model", "data", "training", "compute", "memory", "time"):
        assert re.search(rf"^{what} ", done.out, re.M), what
    kinds = [(e["event"], e["step"]) for e in common.read_log(tmp_path / "run")]
    steps = [("step", n) for n in range(1, 6)]
    ends = [("checkpoint", 5), ("eval", 5), ("sample", 5)]
    assert kinds == [("start", 0), *steps[:2], ("sample", 2), steps[2], ("eval", 3), steps[3], ("sample", 4),
                     steps[4], *ends]  # fmt: skip
    samples = [e["text"] for e in events(tmp_path / "run", "sample")]
    assert all(f"a sample:\n{text}" in done.err for text in samples)
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
    with pytest.raises(MemoryError):
        start("run", "--steps", 6, "--save-every", 3, "--eval-every", 3)
    assert loads(common.newest_checkpoint(tmp_path / "run")) == 3


def test_only_the_newest_checkpoints_are_kept(start, tmp_path):
    assert start("run", "--save-every", 3, "--keep", 3).status == 0
    assert [d.name for d in common.checkpoints(tmp_path / "run")] == [
        "step_000015",
        "step_000018",
        "step_000020",
    ]
    wanted = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "run" / "step_000018").iterdir()} == wanted
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"log.jsonl"} == {
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
    step = gpt2.AdamW.update

    def mortal(optimizer, *args):
        if optimizer.steps == 13:
            raise Killed
        return step(optimizer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(gpt2.AdamW, "update", mortal)
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


def test_a_run_begins_with_short_rows_and_goes_on_bit_for_bit(start, tmp_path, monkeypatch):
    short = ("--n-positions", 16, "--short-len", 4, "--short-steps", 6)
    assert start("whole", *short, "--save-every", 5, "--keep", 4).status == 0
    assert start("four", "--n-positions", 16, "--seq-len", 4).status == 0
    losses, others = losses_of(tmp_path / "whole"), losses_of(tmp_path / "four")
    assert losses[:6] == others[:6] and losses[6] != others[6]
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
step, seconds = gpt2.AdamW.update, float(sys.argv.pop(1))
gpt2.AdamW.update = lambda *args: (time.sleep(seconds), step(*args))[1]
common.run(train.main)
"""


def slow(seconds, *flags):
    """train.py in a process of its own, whose steps last."""
    command = [sys.executable, "-c", SLOW, str(seconds), *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(shards, tmp_path, whole):
    run = tmp_path / "a run"
    process = slow(0.05, "--data", shards, *TINY, "--out", run)
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(30) == 130, said
    assert "finishing this step" in said and "Traceback" not in said
    after, command = re.search(r"^stopped after step (\d+); go on with: (.*)$", said, re.M).groups()
    assert 3 <= int(after) < 20 and loads(common.newest_checkpoint(run)) == int(after) == len(losses_of(run))
    python, name, *flags = shlex.split(command)
    assert (python, name) == ("python", "train.py")
    done = script.run(train.main, *flags)
    assert done.status == 0, done.err
    assert losses_of(run) == losses_of(whole)
    assert same_bits(run / "step_000020", whole / "step_000020")


def test_a_second_ctrl_c_stops_at_once(shards, tmp_path):
    process = slow(60, "--data", shards, *TINY, "--out", tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    for line in process.stderr:
        if "once more to stop at once" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(10) == 130 and "interrupted" in said and "Traceback" not in said
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.jsonl"}


def test_ctrl_c_at_any_moment_of_a_step_leaves_a_checkpoint(start, tmp_path, monkeypatch):
    """Also between two looks at the flag, and in the last step, which needs nothing to go on."""

    class Late(common.Interrupt):
        looks = -1

        @property
        def asked(self):
            self.looks += 1
            return self.looks > self.wait

        @asked.setter
        def asked(self, value):
            pass

    for Late.wait in range(4):
        with monkeypatch.context() as patch:
            patch.setattr(common, "Interrupt", Late)
            done = start(f"run{Late.wait}")
        assert done.status == 130
        assert loads(common.newest_checkpoint(tmp_path / f"run{Late.wait}")) == int(
            re.search(r"stopped after step (\d+)", done.err).group(1)
        )
    Late.wait = -1
    monkeypatch.setattr(common, "Interrupt", Late)
    done = start("last", "--steps", 1)
    assert done.status == 0 and "go on with" not in done.err and "done: " in done.err


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
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.jsonl", "step_000004"}
    assert script.tree(tmp_path / "run" / "step_000004") == before
    assert loads(common.newest_checkpoint(tmp_path / "run")) == 4
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
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.jsonl", "step_000004"}
    assert loads(common.newest_checkpoint(tmp_path / "run")) == 4


# ------------------------------------------------------------------------------------------------------------
# Begin with other weights


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


DAMAGE = {
    "no train shard": (lambda train, _: [path.unlink() for path in train], "no *_train_*.bin", "data.py"),
    "no val shard": (lambda _, d: [p.unlink() for p in d.glob("*_val_*")], "no *_val_*.bin", "data.py"),
    "truncated": (lambda train, _: os.truncate(train[-1], 3000), "truncated", "again"),
    "empty file": (lambda train, _: os.truncate(train[0], 0), "truncated", "again"),
    "no tokens": (lambda train, _: shorten(train[:1], 0), "truncated"),
    "wrong magic": (lambda train, _: overwrite(train[0], 0, [20240801], "<i4"), "20240801", "no shard"),
    "wrong version": (lambda train, _: overwrite(train[0], 4, [7], "<i4"), "version 7"),
    "token": (lambda train, _: overwrite(train[1], 1030, [266], "<u2"), "token 266", "ends at 265", "02.bin"),
    "no tokenizer": (lambda _, d: (d / "tokenizer.json").unlink(), "no tokenizer", "data.py"),
    "short text": (lambda train, _: shorten(train, 16), "16 tokens", "--seq-len 16 needs 17", "add text"),
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


def test_too_little_memory_is_said_before_any_is_taken(start, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "free_memory", lambda: 10**5)
    monkeypatch.setattr(gpt2, "GPT2", lambda *_: pytest.fail("allocated"))
    assert script.refused(start("run"), "100 kB are free", "--batch-size", "--model")
    assert not (tmp_path / "run").exists()


def test_the_micro_batch_is_what_memory_allows():
    config = gpt2.GPT2Config(12, 12, 768, 1024, 50257)
    needs = lambda B: sum(config.memory(B, 1024).values())
    assert train.fit(512, needs, 8, 1e15) == 8
    assert train.fit(512, needs, 8, needs(4)) == 4
    assert train.fit(6, needs, 8, needs(5)) == 3
    assert (
        train.fit(7, needs, 8, needs(6)) == train.fit(512, needs, 8, 1) == train.fit(512, needs, 1, 1e15) == 1
    )


def test_some_memory_is_free():
    free = cpu.free_memory()
    assert free is None or 10**7 < free < 10**14


# ------------------------------------------------------------------------------------------------------------
# The plot


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
    log = common.Log(tmp_path)
    log.write("start", step=0, stage="rl")
    log.write("eval", step=0, correct=0.25, length=30.0, results=[])
    for step in (1, 2):
        log.write("step", step=step, correct=step / 4, length=20.0, loss=0.1, lr=1e-3)
    (training, held_out), above, below, title = plot.curves(common.read_log(tmp_path))
    assert (above, title) == ("share of right answers", "tokens in an answer")
    assert training[1:] == ([1, 2], [0.25, 0.5])
    assert held_out[1:] == ([0], [0.25])
    assert below == ([1, 2], [20.0, 20.0])
    assert script.run(plot.main, tmp_path).status == 0
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_run_that_pleases_a_reward_model_is_drawn_beside_the_truth(tmp_path):
    log = common.Log(tmp_path)
    for step in (0, 2):
        log.write("eval", step=step, score=0.5 - step / 10, reward=step * 1.0)
    log.write("step", step=1, reward=0.7, loss=0.1, lr=1e-3)
    lines, above, below, title = plot.curves(common.read_log(tmp_path))
    assert (above, title) == ("true score", "reward model's score")
    assert lines[1][1:] == ([0, 2], [0.5, 0.3])
    assert below == ([1], [0.7])
    assert script.run(plot.main, tmp_path).status == 0
