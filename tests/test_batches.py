"""Rows of different lengths: every row once, no row sees another, and weights go where they belong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batches
import gpt2

CONFIG = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=40, vocab_size=50)
LENGTHS = [5, 9, 30, 7, 12, 2, 22, 41]


def random_rows(lengths, seed=0):
    """Rows of these lengths, about half of whose weights are 0."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 50, n), np.where(rng.random(n) < 0.5, 0, rng.standard_normal(n))) for n in lengths
    ]


@settings(deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(1, 300), st.integers(1, 16))
def test_every_target_is_there_once(lengths, most, multiple):
    rows = [(np.arange(100 * i, 100 * i + n), np.arange(n) + 0.5) for i, n in enumerate(lengths)]
    seen = []
    room = 60  # of a model's context
    for tokens, targets, weights in batches.micro_batches(rows, most, room, multiple):
        B, T = tokens.shape
        assert B == 1 or most >= B * T
        assert T % multiple == 0 or room == T
        for b in range(B):
            n = int((weights[b] > 0).sum())
            np.testing.assert_array_equal(targets[b, :n], tokens[b, 0] + 1 + np.arange(n))
            np.testing.assert_array_equal(tokens[b, :n], tokens[b, 0] + np.arange(n))
            np.testing.assert_array_equal(weights[b, :n], np.arange(n) + 1.5)
            assert not weights[b, n:].any()
            seen.append((int(tokens[b, 0]) // 100, n + 1))
    assert sorted(seen) == list(enumerate(lengths))


def test_the_cuts_are_the_cheapest():
    """Against all ways to cut, for a few rows."""

    def cost(cuts, widths):
        return sum((j - i) * widths[j - 1] + batches.SETUP for i, j in zip([0, *cuts], [*cuts, len(widths)]))

    for lengths in ([9, 9, 9, 200], [20, 60, 100, 140, 180], [3, 200, 200], [50, 51, 52, 53, 54]):
        rows = [(np.zeros(n, int), np.ones(n)) for n in lengths]
        widths = [-(-(n - 1) // 8) * 8 for n in sorted(lengths)]
        n = len(lengths)
        ways = [[c for c in range(1, n) if mask >> c & 1] for mask in range(0, 2**n, 2)]
        work = sum(b.size + batches.SETUP for b, _, _ in batches.micro_batches(rows, 10**6, 250))
        assert work == min(cost(way, widths) for way in ways)


@pytest.mark.parametrize("most", [1, 64, 10**6])
def test_rows_in_company_have_the_loss_and_gradient_they_have_alone(most):
    model, rows = gpt2.GPT2(CONFIG, dtype="float64"), random_rows(LENGTHS)
    together = batches.accumulate(model, rows, most)
    gradient = model.flat_grads.copy()
    model.flat_grads.fill(0)
    alone = 0.0
    for tokens, weights in rows:
        losses = model.forward(tokens[None, :-1], tokens[None, 1:], weights[None, 1:])  # (1, T)
        model.backward()
        alone += float((losses * weights[1:]).sum())
    assert together == pytest.approx(alone, rel=1e-12)
    np.testing.assert_allclose(gradient, model.flat_grads, atol=1e-12 * abs(gradient).max())


def test_rows_without_a_weight_are_left_alone():
    model, rows = gpt2.GPT2(CONFIG), [(np.arange(9), np.zeros(9)), (np.arange(4), np.array([1.0, 0, 0, 0]))]
    assert batches.accumulate(model, rows, 100) == 0
    assert not model.flat_grads.any()
