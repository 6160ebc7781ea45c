"""Sampling held to its definitions, and generate() to what it promises: with a model whose probabilities we
choose, where everything is exact; with a small GPT-2; and from the command line."""

import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import script
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import common
import gpt2
import kernels
import sample
import tasks.problems as tasks
from common import UserError
from extras import choose
from kernels import sampling
from sample import Completion, beam_search, generate, release
from tokenizer import Tokenizer

PLAIN = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def draw(logits, seed=1, streams=None, counters=None, **filters):
    """Token and both log-probabilities for every row of logits (B, V)."""
    B = len(logits)
    out, logprobs = np.empty(B, np.int32), np.empty((2, B))
    streams = np.arange(B) if streams is None else streams
    counters = np.zeros(B, np.int64) if counters is None else counters
    sampling.sample(out, logits, seed, streams, counters, **{**PLAIN, **filters}, logprobs=logprobs)
    return out, logprobs


def chi_square(drawn, probabilities):
    """The statistic of drawn tokens (n,) against probabilities (V,), and what chance exceeds once in 1000."""
    possible = probabilities > 0
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert counts[~possible].sum() == 0, "a token of probability 0 was drawn"
    expected = probabilities[possible] * len(drawn)
    df = possible.sum() - 1
    limit = df * (1 - 2 / (9 * df) + 3.0902 * math.sqrt(2 / (9 * df))) ** 3  # Wilson and Hilferty, 1931
    return ((counts[possible] - expected) ** 2 / expected).sum(), limit


# ------------------------------------------------------------------------------------------------------------
# The coin


@pytest.mark.parametrize(
    "counter_and_key, words",
    [  # the known answers of Random123, kat_vectors, philox4x32 with 10 rounds
        ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter_and_key, words):
    numbers = [np.array([int(word, 16)], np.uint64) for word in counter_and_key.split()]
    assert [f"{int(word[0]):08x}" for word in sampling.philox(*numbers)] == words.split()


def test_uniform_is_a_function_of_seed_stream_and_counter():
    n = 20_000
    u = sampling.uniform(7, np.arange(n), np.zeros(n, np.int64))
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) > 0.999 * n
    statistic, limit = chi_square((u * 50).astype(int), np.full(50, 1 / 50))
    assert statistic < limit
    along = sampling.uniform(7, 3, np.arange(n))  # one stream, position after position
    statistic, limit = chi_square((along * 50).astype(int), np.full(50, 1 / 50))
    assert statistic < limit
    assert abs(np.corrcoef(along[1:], along[:-1])[0, 1]) < 0.03
    assert sampling.uniform(7, [5], [0]) == u[5]
    different = [(7, 5, 1), (8, 5, 0), (7, 5 + 2**32, 0), (7 + 2**32, 5, 0), (7, 5, 2**32), (2**63, 5, 0)]
    assert len({float(sampling.uniform(*key)) for key in different} | {u[5]}) == len(different) + 1


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.499, 1), (0.5, 3), (1 - 2.0**-32, 3)])
def test_the_ends_of_the_coin_draw_no_impossible_token(monkeypatch, u, token):
    monkeypatch.setattr(sampling, "uniform", lambda *_: np.array([u]))
    assert draw(np.array([[-np.inf, 1, -np.inf, 1, -np.inf]]))[0] == token


# ------------------------------------------------------------------------------------------------------------
# The distribution


@pytest.mark.parametrize(
    "temperature, expected", [(1, [0.27, 0.73]), (0.5, [0.12, 0.88]), (0.1, [0, 1]), (0, [0, 1])]
)
def test_temperature_on_the_worked_example(temperature, expected):
    probabilities = sampling.filtered_probabilities(np.array([[1, 2]], np.float32), temperature)
    np.testing.assert_allclose(probabilities, [expected], atol=0.005)


def test_extreme_temperatures():
    logits = np.array([[1, 3, 3, 2]], np.float32)
    np.testing.assert_array_equal(sampling.filtered_probabilities(logits, 0), [[0, 1, 0, 0]])  # lowest id
    np.testing.assert_array_equal(sampling.filtered_probabilities(logits, 1e-300), [[0, 0.5, 0.5, 0]])
    np.testing.assert_allclose(sampling.filtered_probabilities(logits, 1e6), [[0.25] * 4], atol=1e-5)
    np.testing.assert_allclose(
        sampling.filtered_probabilities(logits + 1e4), sampling.filtered_probabilities(logits)
    )


@pytest.mark.parametrize(
    "filters, kept",
    [  # probabilities .4 .2 .2 .1 .1
        (dict(top_k=1), [0]),
        (dict(top_k=2), [0, 1, 2]),  # the second and the third are equals: both stay
        (dict(top_k=99), [0, 1, 2, 3, 4]),
        (dict(top_p=0.39), [0]),
        (dict(top_p=0.41), [0, 1, 2]),
        (dict(top_p=0.85), [0, 1, 2, 3, 4]),
        (dict(min_p=0.49), [0, 1, 2]),
        (dict(min_p=0.51), [0]),
        (dict(min_p=1), [0]),
        (dict(top_k=3, top_p=0.49), [0]),  # top-p counts what top-k has left: .5 .25 .25
        (dict(top_k=3, top_p=0.51), [0, 1, 2]),
        (dict(temperature=2, top_p=0.39), [0, 1, 2]),  # .28 .2 .2 .14 .14 (temperature comes first)
    ],
)
def test_filters_on_an_example_with_ties(filters, kept):
    p = np.array([0.4, 0.2, 0.2, 0.1, 0.1])
    probabilities = sampling.filtered_probabilities(np.log(p)[None].astype(np.float32), **filters)[0]
    assert np.flatnonzero(probabilities).tolist() == kept
    shares = p ** (1 / filters.get("temperature", 1))
    np.testing.assert_allclose(probabilities[kept], shares[kept] / shares[kept].sum(), rtol=1e-6)


def by_definition(logits, temperature, top_k, top_p, min_p):
    """The four definitions, word for word and slowly; and how close a token came to a threshold."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    kept = [i for i in range(len(logits)) if top_k == 0 or sum(x > logits[i] for x in logits) < top_k]
    total = math.fsum(weights[i] for i in kept)
    above = {i: math.fsum(weights[j] for j in kept if weights[j] > weights[i]) / total for i in kept}
    close = [abs(above[i] - top_p) for i in kept]
    if top_p < 1:
        kept = [i for i in kept if above[i] < top_p]
    close += [abs(weights[i] - min_p) for i in kept]
    kept = [i for i in kept if weights[i] >= min_p]
    total = math.fsum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))], min(close)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=12),  # a coarse grid makes ties
    st.floats(0.05, 5),
    st.integers(0, 14),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_filters_against_their_definitions(logits, temperature, top_k, top_p, min_p):
    expected, close = by_definition(logits, temperature, top_k, top_p, min_p)
    assume(close > 1e-9)
    rows = np.array([logits, logits[::-1]], np.float32)  # (2, V): a row does not depend on its neighbours
    probabilities = sampling.filtered_probabilities(rows, temperature, top_k, top_p, min_p)
    np.testing.assert_allclose(probabilities, [expected, expected[::-1]], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "filters",
    [
        {},
        dict(temperature=0.6),
        dict(top_k=5),
        dict(top_p=0.7),
        dict(min_p=0.2),
        dict(temperature=1.5, top_k=9, top_p=0.9),
    ],
)
def test_frequencies_are_the_probabilities(filters):
    logits = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32) * 1.5
    probabilities = sampling.filtered_probabilities(logits, **filters)[0]
    drawn, logprobs = draw(np.repeat(logits, 20_000, axis=0), seed=3, **filters)
    statistic, limit = chi_square(drawn, probabilities)
    assert statistic < limit
    np.testing.assert_allclose(np.exp(logprobs[0]), probabilities[drawn], rtol=1e-12)
    full = np.exp(logits[0].astype(np.float64)) / np.exp(logits[0].astype(np.float64)).sum()
    np.testing.assert_allclose(np.exp(logprobs[1]), full[drawn], rtol=1e-12)


def test_an_improbable_token_has_a_finite_log_probability():
    _, logprobs = draw(np.array([[0, -2000]] * 50, np.float32), temperature=1e6)
    assert np.isfinite(logprobs).all() and logprobs[1].min() == -2000


# ------------------------------------------------------------------------------------------------------------
# generate(), with a model that says what we want


class Fake:
    """A model whose logits are any function of the tokens so far; exactly the same in every batch."""

    ops = kernels.load("cpu")

    def __init__(self, logits, vocab_size=266, n_positions=64):
        self.function = logits
        self.config = gpt2.GPT2Config(vocab_size=vocab_size, n_positions=n_positions)
        self.calls = []  # the shape of the tokens in every call of decode

    def new_cache(self, batch, length):
        self.cache = FakeCache([[] for _ in range(batch)], length)
        return self.cache

    def decode(self, tokens, cache, lengths=None):
        self.calls.append(np.shape(tokens))
        for i, (text, row) in enumerate(zip(cache.rows, tokens, strict=True)):
            text.extend(int(token) for token in (row if lengths is None else row[: lengths[i]]))
            assert len(text) <= cache.length
        return np.array([self.function(text) for text in cache.rows], np.float32)


class FakeCache:
    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def select(self, rows):
        self.rows = [list(self.rows[i]) for i in rows]

    def restart(self, rows):
        for i in rows:
            self.rows[i] = []


def hashed(text):
    """Logits that depend on every token of the text, over 11 tokens."""
    return np.random.default_rng(text).normal(size=11) * 2


def reciting(ids, prompt_length=1, vocab_size=266):
    """A function for Fake that says ids, one after the other, then 0 for ever."""

    def logits(text):
        at = len(text) - prompt_length
        return np.where(np.arange(vocab_size) == (ids[at] if at < len(ids) else 0), 50.0, 0.0)

    return logits


def test_probability_of_a_sentence():
    """P("I love food") = .2 * .1 * .3 = .006, and a third of the logarithm to compare with other lengths."""
    START, I, LOVE, FOOD = 3, 0, 1, 2
    after = {(START,): [0.2, 0.3, 0.5], (START, I): [0.4, 0.1, 0.5], (START, I, LOVE): [0.3, 0.4, 0.3]}
    model = Fake(lambda text: np.log([*after.get(tuple(text), [1 / 3] * 3), 1e-30]), vocab_size=4)
    rows = generate(model, [[START]] * 20_000, 3, seed=5)
    found = [row for row in rows if row.ids == [I, LOVE, FOOD]]
    assert len(found) == pytest.approx(0.006 * 20_000, abs=3.3 * math.sqrt(0.006 * 20_000))
    assert math.exp(sum(found[0].logprobs)) == pytest.approx(0.006)
    assert found[0].mean_logprob == pytest.approx(math.log(0.006) / 3)


def test_mean_log_probability_is_fair_to_long_texts():
    short, long = Completion(0, [0], 0, None), Completion(1, [0], 1, None)
    short.full_logprobs, long.full_logprobs = [math.log(0.1)], [math.log(0.5)] * 6
    short.forced, long.forced = [False], [False] * 6
    assert sum(short.full_logprobs) > sum(long.full_logprobs)
    assert short.mean_logprob < long.mean_logprob


def test_finished_rows_leave_the_batch_and_nobody_else_notices():
    prompts = [[1], [1, 2, 3], [4, 5], [1], [6] * 9, [4, 5]]
    model = Fake(hashed, vocab_size=11)
    together = generate(model, prompts, 30, seed=9, stop_tokens={0, 7})
    alone = [
        generate(Fake(hashed, vocab_size=11), [prompt], 30, seed=9, stop_tokens={0, 7}, streams=[i])[0]
        for i, prompt in enumerate(prompts)
    ]
    assert [row.ids for row in together] == [row.ids for row in alone]
    assert [row.logprobs for row in together] == [row.logprobs for row in alone]
    assert [row.finish for row in together] == [row.finish for row in alone]
    assert together[0].ids != together[3].ids, "equal prompts have streams of their own"
    assert model.calls[0] == (4, 9), "each different prompt is read once, padded to the longest"
    lengths = [len(row.ids) for row in together]
    assert len(set(lengths)) > 2
    sizes = [6]  # of the batch: finished rows stay until they are half of it
    for step in range(1, max(lengths)):
        unfinished = sum(n > step for n in lengths)
        sizes.append(unfinished if 2 * unfinished <= sizes[-1] else sizes[-1])
    assert model.calls[1:] == [(size, 1) for size in sizes[1:]]
    backwards = generate(model, prompts[::-1], 30, seed=9, stop_tokens={0, 7}, streams=range(5, -1, -1))
    assert [row.ids for row in backwards[::-1]] == [row.ids for row in together]


def test_a_text_interrupted_and_taken_up_again_goes_on_as_if_nothing_had_been():
    (whole,) = generate(Fake(hashed, 11), [[1, 2]], 20, seed=3, streams=[8])
    (rest,) = generate(Fake(hashed, 11), [[1, 2, *whole.ids[:7]]], 13, seed=3, streams=[8])
    assert rest.ids == whole.ids[7:]


def test_the_seed_repeats_the_text_and_another_seed_does_not():
    one, same, other = (generate(Fake(hashed, 11), [[1], [2]], 20, seed=seed) for seed in (1, 1, 2))
    assert [row.ids for row in one] == [row.ids for row in same] != [row.ids for row in other]


def test_log_probabilities_are_of_the_two_distributions():
    filters = dict(temperature=0.7, top_k=6, top_p=0.9, min_p=0.05)
    for row in generate(Fake(hashed, 11), [[1], [2, 3]], 15, **filters, seed=3):
        text = list(row.prompt)
        for token, logprob, full in zip(row.ids, row.logprobs, row.full_logprobs, strict=True):
            logits = hashed(text)[None].astype(np.float32)
            assert math.exp(logprob) == pytest.approx(
                sampling.filtered_probabilities(logits, **filters)[0, token]
            )
            assert math.exp(full) == pytest.approx(sampling.filtered_probabilities(logits)[0, token])
            text.append(token)


@pytest.mark.parametrize(
    "prompt_length, max_tokens, finish, n, capacity",
    [
        (3, 4, "length", 4, 6),  # the last token drawn is never read, so it needs no place in the cache
        (3, 1, "length", 1, 3),
        (3, 8, "length", 8, 10),
        (3, 9, "context", 8, 10),
        (10, 5, "context", 1, 10),  # a full context still predicts one token
        (10, 1, "length", 1, 10),
    ],
)
def test_length_and_context(prompt_length, max_tokens, finish, n, capacity):
    model = Fake(hashed, 11, n_positions=10)
    (row,) = generate(model, [[1] * prompt_length], max_tokens)
    assert (row.finish, len(row.ids), model.cache.length) == (finish, n, capacity)


def test_rows_of_different_lengths_reach_the_context_each_in_its_time():
    rows = generate(Fake(hashed, 11, n_positions=10), [[1] * 3, [1] * 10, [2] * 7], 20)
    assert [(row.finish, len(row.ids)) for row in rows] == [("context", 8), ("context", 1), ("context", 4)]


def test_a_prompt_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match=r"11 tokens.*at most 10.*shorten"):
        generate(Fake(hashed, 11, n_positions=10), [[1], [1] * 11], 5)


def test_outputs_that_are_no_numbers_are_refused():
    for bad in (np.nan, np.inf):
        for temperature in (0, 1):
            with pytest.raises(UserError, match="diverged"):
                generate(
                    Fake(lambda _, bad=bad: np.array([0, bad, 1.0]), 3), [[1]], 5, temperature=temperature
                )


# ------------------------------------------------------------------------------------------------------------
# Tokens that the host puts there, and tokens that may not come


def after_7(row, shown, logits):
    """A tool that answers every 7 that was drawn with 3, 7, 5 and, in rows of odd streams, 8."""
    if row.ids[-1] == 7 and not row.forced[-1]:
        return [3, 7, 5] + [8] * (row.stream % 2)
    return None


def drawn_again(row, **filters):
    """The log-probabilities of a completion's tokens, computed one by one from what the model read before."""
    text, logprobs = list(row.prompt), []
    for token, forced in zip(row.ids, row.forced, strict=True):
        p = sampling.filtered_probabilities(hashed(text)[None].astype(np.float32), **filters)[0, token]
        logprobs.append(0.0 if forced else pytest.approx(math.log(p)))
        text.append(token)
    return logprobs


def test_forced_tokens_follow_what_asked_for_them_and_the_model_reads_them():
    rows = generate(Fake(hashed, 11), [[1], [2, 3], [4]] * 4, 40, temperature=0.8, seed=2, on_token=after_7)
    asked = 0
    for row in rows:
        i = 0
        while i < len(row.ids):
            assert not row.forced[i]
            if row.ids[i] == 7:
                answer = after_7(SimpleNamespace(ids=[7], forced=[False], stream=row.stream), None, None)
                n = min(len(answer), 40 - i - 1)
                assert row.ids[i + 1 : i + 1 + n] == answer[:n]
                assert row.forced[i + 1 : i + 1 + n] == [True] * n
                i, asked = i + n, asked + 1
            i += 1
        assert len(row.ids) == 40 and row.finish == "length"
        assert row.logprobs == drawn_again(row, temperature=0.8)
        assert row.full_logprobs == drawn_again(row)
        assert row.mean_logprob == pytest.approx(sum(row.full_logprobs) / row.forced.count(False))
    assert asked > 12


def test_a_batch_with_tools_at_work_says_what_each_row_says_alone():
    prompts, rules = [[1], [1, 2, 3], [4, 5], [1], [6] * 9, [4, 5]], dict(seed=9, stop_tokens={0})
    together = generate(Fake(hashed, 11), prompts, 30, on_token=after_7, **rules)
    for i, row in enumerate(together):
        [alone] = generate(Fake(hashed, 11), [prompts[i]], 30, on_token=after_7, streams=[i], **rules)
        for name in ("ids", "forced", "logprobs", "full_logprobs", "finish"):
            assert getattr(alone, name) == getattr(row, name)
    assert len({len(row.ids) for row in together}) > 2 and sum(sum(row.forced) for row in together) > 5
    silent = generate(Fake(hashed, 11), prompts, 30, **rules)
    for row, other in zip(together, silent):  # up to its first call a row is what it would be without tools
        same = row.forced.index(True) if True in row.forced else len(row.ids)
        assert row.ids[:same] == other.ids[:same]
        assert same < len(row.ids) or row.ids == other.ids
    assert any(True not in row.forced for row in together) and any(True in row.forced for row in together)


def test_forced_tokens_stop_nothing():
    force = lambda row, shown, logits: [7, 0, 5] if len(row.ids) == 1 else None
    [row] = generate(Fake(hashed, 11), [[1]], 5, on_token=force, stop_tokens={0, 7, 5}, seed=3)
    [first] = generate(Fake(hashed, 11), [[1]], 1, seed=3)
    assert first.ids[0] not in {0, 7, 5}
    assert row.ids[:4] == [*first.ids, 7, 0, 5] and len(row.ids) == 5


def test_a_stop_that_is_drawn_stops_whatever_a_tool_answers():
    model = Fake(reciting([7], vocab_size=11), 11)
    rules = dict(stop_tokens={7}, temperature=0)
    [row] = generate(model, [[1]], 9, **rules, on_token=lambda *_: [1, 2])
    assert (row.ids, row.forced, row.finish) == ([7], [False], "stop")


@pytest.mark.parametrize("max_tokens, finish, n", [(6, "length", 6), (30, "context", 8)])
def test_forced_tokens_count(max_tokens, finish, n):
    model = Fake(hashed, 11, n_positions=10)
    [row] = generate(model, [[1] * 3], max_tokens, on_token=lambda *_: [4] * 50)
    assert (row.finish, len(row.ids), row.ids[1:]) == (finish, n, [4] * (n - 1))


def test_what_is_asked_for_while_tokens_wait_comes_after_them():
    answers = {1: [1, 2, 3], 2: [4], 3: [5]}
    given = {n: list(ids) for n, ids in answers.items()}
    [row] = generate(Fake(hashed, 11), [[1]], 9, on_token=lambda row, *_: given.get(len(row.ids)))
    assert row.ids[1:6] == [1, 2, 3, 4, 5] and row.forced == [False] + [True] * 5 + [False] * 3
    assert given == answers, "the host's list is its own"


def odd_or_even(row):
    """Even tokens only in row 0, odd ones in row 1, anything in row 2."""
    return None if row.index == 2 else np.arange(11) % 2 == row.index


@pytest.mark.parametrize("filters", [dict(temperature=0), {}, dict(temperature=0.7, top_k=3, top_p=0.9)])
def test_only_allowed_tokens_are_drawn(filters):
    rows = generate(Fake(hashed, 11), [[1]] * 3, 25, seed=4, allowed=odd_or_even, **filters)
    free = generate(Fake(hashed, 11), [[1]] * 3, 25, seed=4, **filters)
    assert [{token % 2 for token in row.ids} for row in rows[:2]] == [{0}, {1}]
    assert rows[2].ids == free[2].ids != rows[1].ids
    for row in rows:
        text = list(row.prompt)
        for token, logprob in zip(row.ids, row.logprobs):
            logits = hashed(text)[None].astype(np.float32)
            if row.index < 2:
                logits[:, 1 - row.index :: 2] = -np.inf
            p = sampling.filtered_probabilities(logits, **filters)[0, token]
            assert logprob == pytest.approx(math.log(p))
            text.append(token)


def test_what_is_forced_need_not_be_allowed():
    asked = []

    def allowed(row):
        asked.append(len(row.ids))
        return np.arange(11) == 7

    [row] = generate(Fake(hashed, 11), [[1]], 9, on_token=after_7, allowed=allowed)
    assert row.ids == [7, 3, 7, 5, 7, 3, 7, 5, 7] and asked == [0, 4, 8]


def test_nothing_allowed_is_an_error():
    with pytest.raises(ValueError, match="no token"):
        generate(Fake(hashed, 11), [[1]], 9, allowed=lambda row: np.zeros(11, bool))


# ------------------------------------------------------------------------------------------------------------
# Text: stop rules and whole characters

BYTES = Tokenizer.bytes()


def recite(text, **rules):
    """generate() on a model that says this text byte by byte; (row, the pieces that were shown)."""
    ids = text if isinstance(text, list) else BYTES.encode(text)
    pieces = []
    rules = dict(max_tokens=len(ids), temperature=0) | rules
    on_token = lambda row, shown, logits: pieces.append(shown)
    (row,) = generate(Fake(reciting(ids)), [[BYTES.eot]], tokenizer=BYTES, on_token=on_token, **rules)
    assert "".join(pieces) == row.text
    return row, pieces


def test_stop_token_ends_the_text_and_is_the_last_of_the_ids():
    row, _ = recite([*b"Yes.", BYTES.eot, *b"No."], stop_tokens={BYTES.eot})
    assert (row.text, row.finish, row.ids) == ("Yes.", "stop", [*b"Yes.", BYTES.eot])
    assert len(row.logprobs) == len(row.full_logprobs) == 5


def test_stop_text_across_tokens_is_never_shown_in_part():
    row, pieces = recite("One.\n\nUser: two", stop_texts=["\n\nUser:"])
    assert (row.text, row.finish) == ("One.", "stop")
    assert bytes(row.ids) == b"One.\n\nUser:"
    assert pieces == ["O", "n", "e", "."] + [""] * 7


def test_a_stop_text_that_does_not_come_is_shown_after_all():
    row, pieces = recite("a ##b ###c #", stop_texts=["####"])
    assert (row.text, row.finish) == ("a ##b ###c #", "length")
    assert pieces == ["a", " ", "", "", "##b", " ", "", "", "", "###c", " ", "#"]


def test_a_stop_token_lets_go_of_the_text_that_was_held_back():
    row, _ = recite([*b"one #", BYTES.eot], stop_tokens={BYTES.eot}, stop_texts=["##"])
    assert (row.text, row.finish) == ("one #", "stop")


def test_characters_come_whole():
    text = "Zürich 🙂!"
    row, pieces = recite(text)
    assert row.text == text
    assert [piece for piece in pieces if piece] == list(text)
    row, pieces = recite(BYTES.encode(text)[:-2])  # the last character stays broken
    assert row.text == "Zürich \ufffd" == BYTES.decode(row.ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 265), min_size=1))
def test_any_tokens_are_shown_as_they_are_decoded(ids):
    row = Completion(0, [0], 0, BYTES)
    shown = [row.append(id, 0.0, 0.0, (), (), len(ids), 10**6) for id in ids]
    assert "".join(shown) == row.text == BYTES.decode(ids)


def test_forced_text_is_shown_and_stops_nothing():
    answer, pieces = "é##\n".encode(), []

    def on_token(row, shown, logits):
        pieces.append(shown)
        return [*answer] if row.ids == [*b"a?"] else None

    model = Fake(reciting([*b"a?", *answer, *b"b##c"]))
    rules = dict(temperature=0, stop_texts=["##"], tokenizer=BYTES)
    [row] = generate(model, [[BYTES.eot]], 20, **rules, on_token=on_token)
    assert (row.text, row.finish) == ("a?é##\nb", "stop")
    assert pieces == ["a", "?", "", "é", "#", "#", "\n", "b", "", ""]


def test_what_was_held_back_is_let_go_before_forced_text():
    force = lambda row, *_: [*b"##"] if row.ids == [*b"a#"] else None
    rules = dict(temperature=0, stop_texts=["####"], tokenizer=BYTES, on_token=force)
    [row] = generate(Fake(reciting([*b"a####b"])), [[BYTES.eot]], 6, **rules)
    assert row.text == "a####b"


pieces_of_text = st.lists(st.text("ab\n", max_size=4), max_size=8)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@settings(max_examples=300, deadline=None)
@given(pieces_of_text, stop_lists)
def test_stop_texts_do_not_depend_on_the_pieces(pieces, stops):
    shown, held, stopped = "", "", False
    for i, piece in enumerate([*pieces, ""]):
        new, held, stopped = release(held + piece, stops, last=i == len(pieces))
        shown += new
        if stopped:
            break
    text = "".join(pieces)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not stopped:
        assert shown == text
    else:  # it ends where the stop text that is complete first begins (of two such, the longer one)
        assert text.startswith(shown) and not any(stop in shown for stop in stops)
        assert len(shown) == min(ends) - max(len(s) for s in stops if text[: min(ends)].endswith(s))


def test_without_a_tokenizer_there_is_no_text():
    (row,) = generate(Fake(hashed, 11), [[1]], 3)
    assert row.text == "" and len(row.ids) == 3
    with pytest.raises(ValueError, match="tokenizer"):
        generate(Fake(hashed, 11), [[1]], 3, stop_texts=["x"])


# ------------------------------------------------------------------------------------------------------------
# Beam search


def all_texts(logits, prompt, stop, max_tokens):
    """[(mean log-probability, ids)] of every text that ends with `stop` or has max_tokens, the best first."""
    texts, beginnings = [], [((), 0.0)]
    while beginnings:
        ids, total = beginnings.pop()
        odds = sampling.filtered_probabilities(np.array([logits([*prompt, *ids])]))[0]
        for token, p in enumerate(odds):
            longer, log_p = (*ids, token), total + math.log(p)
            if token == stop or len(longer) == max_tokens:
                texts.append((log_p / len(longer), longer))
            else:
                beginnings.append((longer, log_p))
    return sorted(texts, reverse=True)


def hashed3(text):
    return hashed(text)[:3]


@pytest.mark.parametrize("prompt", [[1], [2, 1, 1]])
def test_beam_search_with_a_beam_for_every_text_is_exhaustive(prompt):
    expected = all_texts(hashed3, prompt, stop=0, max_tokens=5)
    found = beam_search(Fake(hashed3, 3), prompt, 5, n_beams=len(expected), stop_tokens={0})
    assert len(expected) == 63
    assert [tuple(beam.ids) for beam in found] == [ids for _, ids in expected]
    assert [beam.mean_logprob for beam in found] == pytest.approx([score for score, _ in expected])
    assert {beam.finish for beam in found} == {"stop", "length"}


def test_two_beams_find_what_one_misses():
    """Greedy decoding takes A, 0.6, and is then at a loss; B is followed by something certain."""
    A, B, C = 0, 1, 2
    after = {(3,): [0.6, 0.3, 0.1], (3, A): [0.34, 0.33, 0.33], (3, B): [0.01, 0.01, 0.98]}
    model = Fake(lambda text: np.log([*after[tuple(text)], 1e-30]), vocab_size=4)
    [greedy] = beam_search(model, [3], 2, n_beams=1)
    best, second = beam_search(model, [3], 2, n_beams=2)
    assert (greedy.ids, best.ids, second.ids) == ([A, A], [B, C], [A, A])
    assert math.exp(2 * best.mean_logprob) == pytest.approx(0.3 * 0.98)


def test_one_beam_is_greedy_decoding_with_tools_and_stops():
    for prompt in ([1], [1, 2, 3], [4, 5], [6] * 9):
        for rules in (dict(stop_tokens={0, 7}), dict(on_token=after_7), {}):
            [greedy] = generate(Fake(hashed, 11), [prompt], 30, temperature=0, **rules)
            [beam] = beam_search(Fake(hashed, 11), prompt, 30, n_beams=1, **rules)
            assert (beam.ids, beam.forced, beam.finish) == (greedy.ids, greedy.forced, greedy.finish)
            assert beam.full_logprobs == pytest.approx(greedy.full_logprobs)


def test_beams_share_no_text_and_no_output():
    """Each has its own ids, text and tool output, whatever beginning they share."""
    beams = beam_search(Fake(hashed, 11), [1, 2], 12, n_beams=5, on_token=after_7)
    assert len({tuple(beam.ids) for beam in beams}) == 5
    assert any(any(beam.forced) for beam in beams)
    for beam in beams:
        text, drawn = [1, 2], []
        for token, logprob, forced in zip(beam.ids, beam.full_logprobs, beam.forced, strict=True):
            odds = sampling.filtered_probabilities(hashed(text)[None])[0]
            assert logprob == pytest.approx(0 if forced else math.log(odds[token]))
            drawn += [] if forced else [logprob]
            text.append(token)
        assert beam.mean_logprob == pytest.approx(np.mean(drawn))
        assert len(beam.seconds) == len(beam.ids) and beam.seconds == sorted(beam.seconds)


def test_beam_search_without_room_or_numbers_is_refused():
    with pytest.raises(UserError, match=r"11 tokens.*at most 10"):
        beam_search(Fake(hashed, 11, n_positions=10), [1] * 11, 5, n_beams=2)
    with pytest.raises(UserError, match="not finite"):
        beam_search(Fake(lambda text: np.full(11, np.nan), 11), [1], 5, n_beams=2)


# ------------------------------------------------------------------------------------------------------------
# A real GPT-2, small and random


@pytest.fixture(scope="module")
def model():
    config = gpt2.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=48, vocab_size=BYTES.vocab_size)
    model = gpt2.GPT2(config, seed=1)
    for name in model.params:  # wilder than at the start of training, so that the context matters
        if name.endswith(".weight") and "ln" not in name:
            model.params[name][...] *= 6
    return model


def test_gpt2_rows_of_different_lengths_against_the_full_forward_pass(model):
    prompts = [BYTES.encode(text) for text in ("The", "The capital of", "A", "The", "Who are you?")]
    rows = generate(model, prompts, 20, seed=4, stop_tokens=set(range(0, 266, 12)))
    assert len({len(row.ids) for row in rows}) > 2
    for row in rows:
        text = row.prompt + row.ids
        logits = model.logits(np.array([text[:-1]]))[0].astype(np.float64)  # (T, V)
        full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [full[len(row.prompt) - 1 + n, token] for n, token in enumerate(row.ids)]
        np.testing.assert_allclose(row.full_logprobs, expected, atol=1e-4)
        np.testing.assert_allclose(row.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("tool", [None, lambda row, *_: [*b" = 4"] if row.ids[-1] % 7 == 3 else None])
def test_gpt2_alone_and_in_a_batch_says_the_same(model, tool):
    prompts = [BYTES.encode(text) for text in ("The", "The capital of", "A", "The", "Who are you?")]
    rules = dict(temperature=0.9, top_p=0.95, seed=4, stop_tokens=set(range(0, 266, 12)), on_token=tool)
    together = generate(model, prompts, 40, **rules)
    assert bool(tool) == any(any(row.forced) for row in together)
    for i, row in enumerate(together):
        (alone,) = generate(model, [row.prompt], 40, **rules, streams=[i])
        assert (alone.ids, alone.forced, alone.finish) == (row.ids, row.forced, row.finish)
        np.testing.assert_allclose(alone.logprobs, row.logprobs, atol=1e-5)


def test_gpt2_beams_against_the_full_forward_pass(model):
    prompt = BYTES.encode("The capital of")
    beams = beam_search(model, prompt, 20, n_beams=4, stop_tokens=set(range(0, 266, 12)), tokenizer=BYTES)
    assert [beam.mean_logprob for beam in beams] == sorted((b.mean_logprob for b in beams), reverse=True)
    for beam in beams:
        logits = model.logits(np.array([[*prompt, *beam.ids[:-1]]]))[0].astype(np.float64)  # (T, V)
        full = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [full[len(prompt) - 1 + n, token] for n, token in enumerate(beam.ids)]
        np.testing.assert_allclose(beam.full_logprobs, expected, atol=1e-4)
        stopped = beam.finish == "stop"
        assert beam.text == BYTES.decode(beam.ids[: len(beam.ids) - stopped])


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    directory = run / "step_000010"
    model.save_pretrained(directory)
    BYTES.save(directory)
    return directory


def cli(capsys, *arguments):
    sample.main([str(argument) for argument in arguments])
    return capsys.readouterr()


def test_cli_shows_prompt_and_text_and_repeats_itself(checkpoint, capsys):
    flags = ["--prompt", "The", "--max-tokens", 20]
    first = cli(capsys, checkpoint, *flags).out
    assert first.startswith("The") and len(first) > 10
    assert cli(capsys, checkpoint.parent, *flags).out == first  # the run's newest checkpoint
    assert cli(capsys, checkpoint, *flags, "--seed", 1).out != first


def test_cli_json(checkpoint, capsys):
    flags = ["--num-samples", 3, "--max-tokens", 9, "--show-probs", "--top-k", 4]
    answer = json.loads(cli(capsys, checkpoint, "--json", *flags).out)
    assert answer["settings"]["seed"] == sample.SEED and answer["prompt"] == ""
    assert len(answer["samples"]) == 3
    for one in answer["samples"]:
        assert one["finish"] in ("length", "stop")
        assert BYTES.decode([id for id in one["ids"] if id != BYTES.eot]) == one["text"]
        assert one["mean_logprob"] == pytest.approx(sum(one["full_logprobs"]) / len(one["ids"]))
        for token, logprob, candidates in zip(one["ids"], one["logprobs"], one["candidates"], strict=True):
            assert dict(candidates)[token] == pytest.approx(math.exp(logprob))
            assert sum(p for _, p in candidates) == pytest.approx(1) and len(candidates) == 4
    text = cli(capsys, checkpoint, "--max-tokens", 9, "--top-k", 4).out
    assert text == answer["samples"][0]["text"] + "\n", "the first of several samples is the one made alone"


def clock(monkeypatch):
    """Let every look at the clock be a quarter of a second after the one before."""
    ticks = itertools.count()
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(ticks) / 4)


def test_cli_says_how_fast_the_tokens_came_if_a_person_may_want_it(checkpoint, capsys, monkeypatch):
    clock(monkeypatch)
    flags = [checkpoint, "--prompt", "The", "--max-tokens", 9, "--temperature", 0]
    text, asked = cli(capsys, *flags), cli(capsys, *flags, "--speed")
    words = "9 tokens: the first after 250 ms, then 4 a second\n"
    assert (text.err, asked.err, asked.out) == ("", words, text.out)
    assert cli(capsys, *flags[:3], "--max-tokens", 1, "--speed").err == "1 token: the first after 250 ms\n"
    answer = json.loads(cli(capsys, *flags, "--num-samples", 3, "--json").out)
    fast = dict(tokens=27, seconds=2.25, first_token_seconds=0.25, tokens_per_second=12.0)
    assert answer["speed"] == fast
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli(capsys, *flags).err.endswith(words)
    assert cli(capsys, *flags, "--json").err == ""


def test_cli_beams_are_the_most_probable_texts_the_best_first(checkpoint, capsys):
    flags = ["--prompt", "A", "--max-tokens", 7]
    greedy = cli(capsys, checkpoint, *flags, "--temperature", 0).out
    assert cli(capsys, checkpoint, *flags, "--beams", 1).out.startswith(greedy)
    answer = json.loads(cli(capsys, checkpoint, *flags, "--beams", 3, "--json").out)
    scores = [one["mean_logprob"] for one in answer["samples"]]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    assert answer["settings"]["n_beams"] == 3
    text = cli(capsys, checkpoint, *flags, "--beams", 3).out
    for one in answer["samples"]:
        shown = f"A{common.printable(one['text'])}"
        assert f"{shown}\n[mean log-probability {one['mean_logprob']:.3f}]" in text


def test_cli_show_probs_marks_the_drawn_token(checkpoint, capsys):
    out = cli(capsys, checkpoint, "--prompt", "A", "--max-tokens", 7, "--show-probs", "--temperature", 1).out
    rows = [line for line in out.splitlines() if line[:4].strip().isdigit()]
    assert len(rows) == 7
    for line in rows:
        assert line.count('*"') + line.count("*'") == 1
        shares = [float(cell) for cell in line.split() if cell.startswith("0.") and len(cell) == 5]
        assert len(shares) in (5, 6) and shares[:5] == sorted(shares[:5], reverse=True)


def test_cli_show_probs_at_temperature_0_shows_the_model(checkpoint, capsys):
    out = cli(capsys, checkpoint, "--json", "--max-tokens", 3, "--show-probs", "--temperature", 0).out
    (one,) = json.loads(out)["samples"]
    for token, full, candidates in zip(one["ids"], one["full_logprobs"], one["candidates"]):
        assert len(candidates) == 5 and candidates[0] == [token, pytest.approx(math.exp(full))]
    assert one["logprobs"] == [0, 0, 0]


@pytest.mark.parametrize("id, shown", [(32, '" "'), (10, r'"\n"'), (0xE2, r'"\xe2"')])
def test_tokens_are_visible(id, shown):
    assert sample.quoted(BYTES, id) == shown


def test_cli_prompt_from_a_file_and_from_standard_input(checkpoint, capsys, tmp_path, monkeypatch):
    expected = cli(capsys, checkpoint, "--prompt", "Zürich\n is", "--max-tokens", 5).out
    (tmp_path / "prompt").write_bytes("Zürich\n is\n".encode())
    assert cli(capsys, checkpoint, "--prompt-file", tmp_path / "prompt", "--max-tokens", 5).out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Zürich\n is\r\n".encode())))
    assert cli(capsys, checkpoint, "--prompt-file", "-", "--max-tokens", 5).out == expected


def test_cli_stop_text(checkpoint, capsys):
    flags = [checkpoint, "--prompt", "The", "--max-tokens", 20]
    whole = cli(capsys, *flags).out[:-1]
    stop = whole[6:8]
    shown = cli(capsys, *flags, "--stop", stop, "--stop", "@@").out[:-1]
    assert shown == whole[: whole.index(stop, 3)]


def test_cli_says_that_the_context_is_full(checkpoint, capsys):
    assert "context of 48 tokens" in cli(capsys, checkpoint, "--max-tokens", 500, "--temperature", 1).err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--top-p", "2"], "--top-p: 2 must be at most 1"),
        (["--top-p", "0"], "--top-p: 0 must be greater than 0"),
        (["--temperature", "-1"], "--temperature: -1 must be at least 0"),
        (["--top-k", "-3"], "--top-k: -3 must be at least 0"),
        (["--min-p", "1.5"], "--min-p: 1.5 must be at most 1"),
        (["--max-tokens", "0"], "--max-tokens: 0 must be at least 1"),
        (["--seed", "-1"], "--seed: -1 must be at least 0"),
        (["--stop", ""], "--stop needs a text"),
        (["--beams", "0"], "--beams: 0 must be at least 1"),
        (["--beams", "2", "--temperature", "0.5"], "--beams samples nothing; leave out --temperature"),
        (["--beams", "2", "--num-samples", "3"], "leave out --num-samples"),
        (["--beams", "2", "--seed", "1"], "leave out --seed"),
        (["--beams", "2", "--chat"], "--beams writes texts for one prompt; leave out --chat"),
        (["--chat", "--prompt", "Hello"], "--chat asks for each message; leave out --prompt"),
        (["--chat", "--json"], "--chat writes each answer as it comes; leave out --json"),
        (["elsewhere"], "unrecognized arguments: elsewhere"),
        (["--prompt", "x" * 60], "61 tokens.*at most 48"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["--prompt-file", "no/such/file"], "--prompt-file no/such/file: No such file"),
    ],
)
def test_cli_bad_values_are_named(checkpoint, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        sample.main([str(checkpoint), *flags])
    assert "\n" not in str(caught.value)


def test_cli_a_prompt_that_is_no_text(checkpoint, tmp_path):
    (tmp_path / "prompt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="byte 2 is not UTF-8"):
        sample.main([str(checkpoint), "--prompt-file", str(tmp_path / "prompt")])


def test_cli_a_directory_that_is_no_checkpoint(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=str(directory)):
            sample.main([str(directory)])


def test_cli_a_tokenizer_of_another_model(checkpoint, model, tmp_path):
    model.save_pretrained(tmp_path)
    Tokenizer.train(["ab" * 50], 267).save(tmp_path)
    with pytest.raises(UserError, match="267 tokens and the model 266"):
        sample.main([str(tmp_path)])


def test_a_script_ends_with_one_line_and_status_2(checkpoint):
    script = Path(sample.__file__)
    done = subprocess.run(
        [sys.executable, script, checkpoint, "--top-p", "2"],
        capture_output=True,
        check=False,
        text=True,
        cwd=script.parent,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "--top-p" in done.stderr and done.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------
# The command line with an assistant

IM_END = BYTES.special_tokens["<|im_end|>"]


def spell(*pieces):
    """Ids of texts and of special tokens, which are named without their signs: calc_start."""
    special = {name.strip("<|>"): id for name, id in BYTES.special_tokens.items()}
    return [id for piece in pieces for id in ([special[piece]] if piece in special else piece.encode())]


CALLED = spell("So ", "calc_start", "3*17", "calc_end", "output_start", " 51", "output_end", " 51.", "im_end")


@pytest.fixture
def assistant(checkpoint, tmp_path, monkeypatch):
    """assistant({question: reply}) -> a checkpoint that has learned to chat. A reply is the ids to say, or a
    function from what was said so far to logits; to what is no question the model says "plain"."""

    def make(replies, stage="sft", name="step_000002"):
        shutil.copytree(checkpoint, tmp_path / name)
        state = {"step": 2} | ({"stage": stage} if stage else {})
        (tmp_path / name / "state.json").write_text(json.dumps(state))
        asked = [(BYTES.prompt([{"role": "user", "content": text}]), replies[text]) for text in replies]

        def logits(text):
            for header, reply in asked:
                if text[: len(header)] == header and callable(reply):
                    return reply(text[len(header) :])
                if text[: len(header)] == header:
                    return reciting(reply, len(header))(text)
            return reciting([*b"plain", BYTES.eot], 1 + text.count(ord("_")))(text)

        models[tmp_path / name] = Fake(logits, n_positions=150)
        return tmp_path / name

    models, load = {}, gpt2.GPT2.from_pretrained
    choose = lambda place, *rest, **more: models.get(place) or load(place, *rest, **more)
    monkeypatch.setattr(gpt2.GPT2, "from_pretrained", choose)
    return make


def test_cli_an_assistant_is_asked_and_gets_its_tools(assistant, capsys):
    run = assistant({"3*17?": CALLED})
    answer = "So <|calc_start|>3*17<|calc_end|><|output_start|> 51<|output_end|> 51."
    assert cli(capsys, run, "--prompt", "3*17?").out == f"3*17?\n{answer}\n"
    [one] = json.loads(cli(capsys, run, "--prompt", "3*17?", "--json").out)["samples"]
    assert (one["ids"], one["finish"], one["text"]) == (CALLED, "stop", answer)
    at = CALLED.index(*spell("output_start"))
    assert [i for i, forced in enumerate(one["forced"]) if forced] == list(range(at, at + 5))
    shown = cli(capsys, run, "--prompt", "3*17?", "--show-probs").out
    assert re.findall(r"(?m)^ *\d+  =(.*)", shown) == [
        '"<|output_start|>"', '" "', '"5"', '"1"', '"<|output_end|>"',
    ]  # fmt: skip


def test_cli_raw_and_nothing_are_no_question(assistant, capsys):
    run = assistant({"____": spell("Hm", "im_end")})
    assert cli(capsys, run, "--prompt", "____").out == "____\nHm\n"
    assert cli(capsys, run, "--prompt", "____", "--raw").out == "____plain\n"
    assert cli(capsys, run).out == "plain\n"
    base = assistant({"____": spell("Hm", "im_end")}, stage=None, name="base")
    assert cli(capsys, base, "--prompt", "____").out == "____plain\n"


def test_cli_how_wild_an_assistant_is(assistant, capsys):
    run = assistant({})
    asked = lambda *flags: json.loads(cli(capsys, run, "--json", *flags).out)["settings"]["temperature"]
    assert (asked(), asked("--raw"), asked("--temperature", 0.5)) == (0.3, 0.8, 0.5)
    assert asked("--num-samples", 2) == 0.8


def test_cli_chat_gets_the_model_and_the_settings(assistant, monkeypatch):
    calls, run = [], assistant({})
    monkeypatch.setattr(sample, "chat", lambda *a, **k: calls.append((a, k)))
    sample.main([str(run), "--chat", "--max-tokens", "7", "--top-k", "3"])
    [(talked, settings)] = calls
    filters = dict(top_p=1.0, min_p=0.0)
    assert settings == dict(
        temperature=0.3, top_k=3, max_tokens=7, seed=sample.SEED, tell_speed=False, **filters
    )
    assert isinstance(talked[0], Fake) and talked[1].vocab_size == 266 and len(talked) == 2


# ------------------------------------------------------------------------------------------------------------
# extras/choose.py: one of many


def saying(odds):
    """A reply for `assistant`: "Answer: " and a digit, drawn with these odds."""

    def logits(text):
        out, beginning = np.full(266, -50.0), spell("Answer: ")
        if len(text) == len(beginning):
            for digit, p in odds.items():
                out[ord(digit)] = math.log(p)
        else:
            out[[*beginning, 0, IM_END][min(len(text), 9)]] = 0
        return out

    return logits


def chosen(capsys, run, *flags):
    """What choose.py prints, and its report in JSON."""
    argv = [str(value) for value in (run, "--prompt", "2*2?", *flags)]
    choose.main(argv)
    text = capsys.readouterr().out
    choose.main([*argv, "--json"])
    return text, json.loads(capsys.readouterr().out)


def test_the_vote_takes_the_answer_that_most_texts_give(assistant, capsys):
    run = assistant({"2*2?": saying({"4": 0.6, "5": 0.4}), "no": spell("Hm", "im_end")})
    out, report = chosen(capsys, run, "--vote", "--num-samples", 40)
    texts = [one["text"] for one in report["samples"]]
    fours = texts.count("Answer: 4")
    assert 20 < fours < 40 == len(texts) and texts.count("Answer: 5") == 40 - fours
    assert report["votes"] == [["4", fours], ["5", 40 - fours]]
    assert report["chosen"] == texts.index("Answer: 4") and report["settings"]["temperature"] == 0.8
    assert out == f"4\n[of 40 texts, 4: {fours}, 5: {40 - fours}]\n"
    out, report = chosen(capsys, run, "--vote", "--num-samples", 3, "--prompt", "no")
    assert out == "\n[of 3 texts, without an answer: 3]\n" and report["chosen"] is None
    assert chosen(capsys, run, "--vote", "--num-samples", 1)[0].endswith(": 1]\n")


def test_what_counts_as_a_vote():
    texts = [
        "Answer: 8",
        "So 9.\nAnswer: 9.",
        "9",
        "Answer: **$9**\nYes",
        "Answer: 8. Answer: 9.0",
        "Answer: ",
    ]

    assert tasks.votes(texts) == [[1, 3, 4], [0]]  # 9 three times, 8 once
    assert tasks.votes(["Answer: 0", "Answer: no", "Answer: 0.0"]) == [[0, 2], [1]]
    assert tasks.votes(["Answer: 9 apples", "Answer: 9", "Answer: Bogotá"], "How many apples?") == [
        [0, 1],
        [2],
    ]
    assert tasks.votes(["Answer: UQTS", "Answer: uqts"]) == [[0, 1]]
    assert tasks.votes(["Answer: 3 + 5", "Answer: 3 * 5", "Answer: 3 + 5"]) == [[0, 2], [1]]
    assert tasks.votes([]) == tasks.votes(["x"]) == []


def test_the_best_is_the_most_probable(checkpoint, capsys):
    out, report = chosen(capsys, checkpoint, "--best", "--max-tokens", 12, "--temperature", 1)
    means = [one["mean_logprob"] for one in report["samples"]]
    assert len(means) == 16 and means[report["chosen"]] == max(means)
    text = report["samples"][report["chosen"]]["text"]
    assert out == f"2*2?{text}\n[mean log-probability {max(means):.3f}, the best of 16]\n"


def test_a_verifier_prefers_a_correct_text(assistant, capsys):
    run = assistant({"2*2?": saying({"4": 0.2, "5": 0.8})})
    flags = ["--num-samples", 20, "--verify", "arithmetic", "--answer"]
    out, report = chosen(capsys, run, *flags, 4)
    fours = [i for i, one in enumerate(report["samples"]) if one["text"] == "Answer: 4"]
    assert report["correct"] == fours and 0 < len(fours) < 10
    assert out.startswith("Answer: 4\n[") and out.endswith(f"the best of 20; {len(fours)} of them right]\n")
    out, report = chosen(capsys, run, *flags, 6)
    assert out.startswith("Answer: 5\n[") and "; 0 of them right]" in out and report["correct"] == []


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--vote --best --verify is required"),
        (["--vote", "--best"], "not allowed with"),
        (["--verify", "word"], "belong together"),
        (["--best", "--answer", "3"], "belong together"),
        (["--verify", "x", "--answer", "3"], "--verify: invalid choice: 'x'"),
        (["--verify", "countdown", "--answer", "3"], "--verify: invalid choice: 'countdown'"),
    ],
)
def test_choices_that_cannot_be_made_are_named(checkpoint, flags, words):
    script.refused(script.run(choose.main, checkpoint, *flags), words)
