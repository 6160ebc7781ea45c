"""Processes that share a model: the gradient is the one of one process, parameters are seen at once, errors
come through, and nobody is left behind."""

import os
import sys
import time

import numpy as np
import pytest

import batches
import distributed
import gpt2
from common import UserError

CONFIG = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, vocab_size=50)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork as Linux has it")


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 40, n)
    return [
        (rng.integers(0, 50, m), np.where(rng.random(m) < 0.5, 0, rng.standard_normal(m))) for m in lengths
    ]


@pytest.fixture
def team():
    made = []

    def make(size, **functions):
        model = gpt2.GPT2(CONFIG, dtype="float64")
        made.append(distributed.Workers(model, {"accumulate": batches.share_of_rows} | functions, size))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 2, 17])
def test_the_gradient_is_that_of_one_process(team, size, n):
    alone = gpt2.GPT2(CONFIG, dtype="float64")
    expected = batches.accumulate(alone, rows(n), 100)
    together = team(size)
    for _ in range(2):  # the second time nothing may be left of the first
        assert batches.gradient(together, rows(n), 100) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        np.testing.assert_allclose(together.model.flat_grads, alone.flat_grads, atol=1e-13)
        together.model.flat_grads.fill(0)


def test_an_update_is_seen_by_all(team):
    together, alone = team(3), gpt2.GPT2(CONFIG, dtype="float64")
    optimizers = [gpt2.AdamW(model) for model in (together.model, alone)]
    for step in range(3):
        batch = rows(9, step)
        here, there = batches.gradient(together, batch, 100), batches.accumulate(alone, batch, 100)
        assert here == pytest.approx(there, rel=1e-9)
        for optimizer in optimizers:
            optimizer.step(1e-2)
    np.testing.assert_allclose(together.model.flat_params, alone.flat_params, atol=1e-12)


def test_an_error_in_another_process_is_raised_here_and_work_goes_on(team):
    def fail(model, share):
        if share:
            raise ValueError(f"share {share}")
        return share

    together = team(3, fail=fail)
    with pytest.raises(ValueError, match="share 2"):
        together.run("fail", [0, 0, 2])
    with pytest.raises(ValueError, match="share 1"):
        together.run("fail", [1, 0, 0])
    assert together.run("fail", [0, 0, 0]) == [0, 0, 0]
    assert together.run("fail", []) == []


def test_others_end_with_the_first(team):
    together = team(3, pid=lambda model, share: os.getpid())
    pids = together.run("pid", [0, 0, 0])
    assert pids[0] == os.getpid()
    assert len(set(pids)) == 3
    together.close()
    for _ in range(200):
        ended = [
            (open(f"/proc/{pid}/stat").read().split()[2] if os.path.exists(f"/proc/{pid}") else "Z")
            for pid in pids[1:]
        ]
        if ended == ["Z", "Z"]:
            return
        time.sleep(0.05)
    pytest.fail(f"still there: {ended}")


def test_a_process_that_was_killed_is_said(team):
    together = team(2, die=lambda model, share: share and os.kill(os.getpid(), 9))
    with pytest.raises(UserError, match="killed"):
        together.run("die", [0, 1])


def test_large_models_have_threads_instead(monkeypatch):
    monkeypatch.setattr(distributed, "SMALL", 10)
    assert distributed.Workers(gpt2.GPT2(CONFIG), {}, 2).size == 1
