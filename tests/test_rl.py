"""RL held to its mathematics: gradients against finite differences in float64, advantages, clipping and KL
against numbers worked out by hand; then to what it makes of a model that can say two things."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import script
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import distributed
import evaluate
import gpt2
import hub
import rl
import sample
import sft
from common import UserError
from tasks.conversations import read
from tokenizer import Tokenizer, text_of

BYTES = Tokenizer.bytes()
END = BYTES.encode_special("<|im_end|>")
CONFIG = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=BYTES.vocab_size)
MOST = 512
ONE = distributed.World(0, 1)  # a world of one rank


@dataclass
class Choice:
    """A problem with one right text: a bandit with as many arms as the model knows replies."""

    prompt: str = "?"
    answer: str = "a"
    task: str = "choice"
    level: int = 1

    def verify(self, text):
        return float(text == self.answer)


def accumulate(model, rows, most=MOST):
    """Add the gradient of the sum of weights * losses over rows (tokens, weights) to model.grads."""
    for tokens, targets, weights in sft.micro_batches(rows, most, model.config.n_positions):
        model.forward(tokens, targets, weights)
        model.backward()


def model_that_says(replies, dtype="float64", prompt="?", steps=60):
    """A model taught to give each of these replies (parts of a turn) with the same probability."""
    model = gpt2.GPT2(CONFIG, dtype=dtype, seed=3)
    rows = []
    for reply in replies:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        tokens, mask = BYTES.render(turns)
        rows.append((tokens, np.array(mask) / sum(mask) / len(replies)))
    optimizer = gpt2.AdamW(model, weight_decay=0)
    for step in range(steps):
        accumulate(model, rows)
        optimizer.step(1e-2 * (1 - step / steps))
    return model


@pytest.fixture(scope="module")
def taught():
    return model_that_says(["a", "b"])


def clone(model):
    other = gpt2.GPT2(model.config, dtype=model.dtype, seed=None)
    other.flat_params[:] = model.flat_params
    return other


@pytest.fixture
def two_armed(taught):
    return clone(taught)


def flags(**changed):
    """The flags of a run."""
    settings = rl.parser().parse_args(["--batch-tokens", str(MOST)])
    rl.use_recipe(settings, rl.RECIPES["tiny"])
    vars(settings).update(changed)
    return settings


def sampled(model, each=8, problems=None, first=0, world=ONE, **changed):
    """Groups of rollouts, whose reward is the verifier's."""
    settings = flags(**{**dict(attempts=each, max_tokens=12, seed=1), **changed})
    problems = [Choice(), Choice()] if problems is None else problems
    groups = rl.sample_rollouts(model, BYTES, problems, settings, first, world)
    for rollout in rl.flat(groups):
        rollout.reward = rollout.correct
    return groups


def log_p(model, rollout):
    """log p of the rollout's tokens, straight from the definition: (T,), 0 for the first."""
    logits = model.logits(rollout.tokens[None, :-1])[0]  # (T - 1, V)
    scores = logits - logits.max(-1, keepdims=True)
    all_of_them = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return np.append(0.0, all_of_them[np.arange(len(logits)), rollout.tokens[1:]])


# ------------------------------------------------------------------------------------------------------------
# Advantages, ratios, KL: by hand


def test_advantages_by_hand():
    np.testing.assert_allclose(rl.advantages([1, 0, 0, 0]), [0.75, -0.25, -0.25, -0.25])
    np.testing.assert_allclose(rl.advantages([1, 0, 0, 1], std=True), [1, -1, -1, 1])
    np.testing.assert_allclose(
        rl.advantages([1, 0, 0, 0], std=True), np.array([3, -1, -1, -1]) / math.sqrt(3)
    )
    np.testing.assert_allclose(rl.advantages([2.0, 5.0, 8.0]), [-3, 0, 3])


@given(st.lists(st.integers(-50, 50).map(lambda n: n / 10), min_size=2, max_size=9), st.booleans())
def test_advantages_sum_to_nothing_and_equal_rewards_have_exactly_none(rewards, std):
    assert abs(rl.advantages(rewards, std).sum()) < 1e-9 * max(1, np.abs(rl.advantages(rewards, std)).max())
    assert (rl.advantages([rewards[0]] * 7, std) == 0).all()
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(rl.advantages(rewards, std)[order]) >= 0).all()


def test_token_weights_by_hand():
    old = np.log([0.5, 0.5, 0.5, 0.5])
    now = np.log([0.5, 0.55, 0.65, 0.35])  # ratios 1, 1.1, 1.3, 0.7
    np.testing.assert_allclose(rl.token_weights(2.0, now, old, clip=0.2), [2, 2.2, 0, 1.4])
    np.testing.assert_allclose(rl.token_weights(-2.0, now, old, clip=0.2), [-2, -2.2, -2.6, 0])
    np.testing.assert_allclose(rl.token_weights(-2.0, now, old, clip=0.5), [-2, -2.2, -2.6, -1.4])
    begun = np.log([0.5, 0.11, 1.3, 0.35])  # reference / now: 1, 0.2, 2, 1
    plain = rl.token_weights(2.0, now, old, clip=0.2)
    held = rl.token_weights(2.0, now, old, begun, clip=0.2, kl=0.1)
    np.testing.assert_allclose(held - plain, [0, -0.08, 0.1, 0], atol=1e-12)


@given(
    st.floats(-3, 3),
    st.floats(-3, 0),
    st.floats(-3, 0),
    st.floats(-3, 0),
    st.floats(0.05, 0.5),
    st.floats(0, 1),
)
def test_token_weights_are_the_derivative_of_the_objective(A, now, old, begun, clip, kl):
    def loss(x):
        ratio, d = math.exp(x - old), begun - x
        return -min(ratio * A, min(max(ratio, 1 - clip), 1 + clip) * A) + kl * (math.exp(d) - d - 1)

    if any(abs(math.exp(now - old) - edge) < 1e-4 for edge in (1 - clip, 1 + clip)):
        return  # a kink has no derivative
    slope = (loss(now + 1e-6) - loss(now - 1e-6)) / 2e-6
    found = rl.token_weights(A, np.array([now]), np.array([old]), np.array([begun]), clip, kl)[0]
    assert -found == pytest.approx(slope, abs=1e-6, rel=1e-6)


def of_rewards(*rewards, lengths=(3, 3, 3, 3)):
    return [
        rl.Rollout(Choice(), [], np.zeros(n, np.int32), np.ones(n, bool), np.zeros(n), n, True, r, r)
        for r, n in zip(rewards, lengths)
    ]


def test_groups_without_signal_teach_nothing():
    assert (
        rl.set_advantages(of_rewards(0, 0, 0), "grpo") == rl.set_advantages(of_rewards(1, 1, 1), "grpo") == []
    )
    assert rl.set_advantages(of_rewards(0, 0, 0), "best-of") == []
    assert [a.advantage for a in rl.set_advantages(of_rewards(1, 0), "grpo")] == [0.5, -0.5]


def test_best_of_imitates_the_shortest_right_rollout():
    group = of_rewards(0, 1, 1, 1, lengths=(1, 5, 3, 3))
    assert rl.set_advantages(group, "best-of") == [group[2]] and group[2].advantage == 1
    group = of_rewards(1, 1, lengths=(9, 3))
    group[0].reward = 7.0  # somebody likes the first better
    assert rl.set_advantages(group, "best-of")[0] is group[0]
    group[1].reward, group[1].correct = 9.0, 0.0  # and the second most of all, but it is wrong
    assert rl.set_advantages(group, "best-of")[0] is group[0]


# ------------------------------------------------------------------------------------------------------------
# The gradient


def slope(model, objective, direction, eps=1e-5):
    """The derivative of objective() when all parameters move in a direction, by central differences."""
    begin, values = model.flat_params.copy(), []
    for sign in (1, -1):
        model.flat_params[:] = begin + sign * eps * direction
        values.append(objective())
    model.flat_params[:] = begin
    return (values[0] - values[1]) / (2 * eps)


def gradient(model, kept, epoch=0, reference=None, **changed):
    """The gradient of an update with these rollouts, as train() accumulates it."""
    settings = flags(**changed)
    first = rl.log_probabilities(reference, kept, settings, ONE) if settings.kl else None
    rows = rl.policy_gradient_rows(model, kept, first, epoch, settings, ONE)
    model.sums.fill(0)
    accumulate(model, rows, settings.batch_tokens)
    found = model.flat_grads.copy()
    model.sums.fill(0)
    return found


def kept_of(groups, std=False):
    rewards = np.random.default_rng(5).normal(size=(len(groups), len(groups[0])))
    for group, values in zip(groups, rewards):
        for rollout, reward in zip(group, values):
            rollout.reward = float(reward)
    return [rollout for group in groups for rollout in rl.set_advantages(group, "grpo", std)]


def n_sampled(kept):
    return sum(rollout.sampled.sum() for rollout in kept)


@pytest.mark.parametrize("std", [False, True])
def test_the_gradient_is_that_of_the_sum_of_advantage_times_log_p(two_armed, std):
    model = two_armed
    kept = kept_of(sampled(model, each=5), std)

    def objective():  # to be made large
        total = sum(rollout.advantage * log_p(model, rollout)[rollout.sampled].sum() for rollout in kept)
        return total / n_sampled(kept)

    found, rng = gradient(model, kept), np.random.default_rng(0)
    for _ in range(4):
        direction = rng.normal(size=model.flat_params.shape)
        direction[np.abs(model.flat_params) == 0] = 0  # the padding of the buffers
        expected = -slope(model, objective, direction)
        assert found @ direction == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_the_gradient_of_the_second_epoch_is_that_of_the_clipped_objective_and_of_k3(two_armed, taught):
    model, kl, clip = two_armed, 0.3, 0.05
    rng = np.random.default_rng(1)
    kept = kept_of(sampled(model, each=6))
    reference = clone(taught)
    reference.flat_params += (
        0.02 * rng.normal(size=reference.flat_params.shape) * (reference.flat_params != 0)
    )
    model.flat_params += 0.05 * rng.normal(size=model.flat_params.shape) * (model.flat_params != 0)
    found = gradient(model, kept, epoch=1, reference=reference, kl=kl, clip=clip)
    n, clipped = n_sampled(kept), []

    def objective():
        total = 0.0
        for rollout in kept:
            now, first = (log_p(m, rollout)[rollout.sampled] for m in (model, reference))
            ratio, d, A = np.exp(now - rollout.logprobs[rollout.sampled]), first - now, rollout.advantage
            bounded = np.clip(ratio, 1 - clip, 1 + clip)
            clipped.extend(bounded * A < ratio * A)
            total += (-np.minimum(ratio * A, bounded * A) + kl * (np.exp(d) - d - 1)).sum()
        return total / n

    for _ in range(3):
        direction = rng.normal(size=model.flat_params.shape) * (model.flat_params != 0)
        expected = slope(model, objective, direction)
        assert found @ direction == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert 0 < sum(clipped) < len(clipped), "nothing, or everything, was clipped: the test tests nothing"


def test_kl_is_none_at_the_beginning_and_its_estimate_is_that_of_the_definition(two_armed, taught):
    kept = kept_of(sampled(two_armed))
    assert rl.divergence(taught, kept, flags(), ONE) == pytest.approx(0, abs=1e-12)
    other = clone(taught)
    other.flat_params *= 1.02
    d = np.concatenate([(log_p(other, r) - log_p(two_armed, r))[r.sampled] for r in kept])
    found = rl.divergence(other, kept, flags(), ONE)
    assert found == pytest.approx((np.exp(d) - d - 1).mean(), rel=1e-9) and found > 0


def test_what_is_imitated_has_the_weights_of_sft(two_armed):
    kept = [rollout for group in sampled(two_armed) for rollout in rl.set_advantages(group, "best-of")]
    for epoch in (0, 1):
        found = gradient(two_armed, kept, epoch, method="best-of")
        accumulate(two_armed, [(rollout.tokens, rollout.sampled / n_sampled(kept)) for rollout in kept])
        np.testing.assert_allclose(found, two_armed.flat_grads, atol=1e-12)
        two_armed.flat_params += 0.01


def test_the_normaliser_is_global(two_armed):
    """In whatever micro-batches the rollouts are, the gradient is the same."""
    kept = kept_of(sampled(two_armed, each=5, problems=[Choice()] * 3))
    whole, pieces = (gradient(two_armed, kept, batch_tokens=most) for most in (4096, 1))
    np.testing.assert_allclose(whole, pieces, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Rollouts


def test_stored_log_probabilities_are_those_of_the_definition(two_armed):
    for rollout in rl.flat(sampled(two_armed, each=4)):
        np.testing.assert_allclose(
            rollout.logprobs[rollout.sampled], log_p(two_armed, rollout)[rollout.sampled], atol=1e-9
        )
        assert (rollout.logprobs[~rollout.sampled] == 0).all()


def test_a_drift_is_an_error(two_armed):
    groups = sampled(two_armed)
    rl.check_log_probabilities(two_armed, groups, flags(), ONE)
    groups[0][3].logprobs[-1] += 0.9e-4
    rl.check_log_probabilities(two_armed, groups, flags(), ONE)
    groups[0][3].logprobs[-1] += 0.2e-4
    with pytest.raises(UserError, match=r"0\.00011"):
        rl.check_log_probabilities(two_armed, groups, flags(), ONE)
    groups[0][3].logprobs[-1] = math.nan
    with pytest.raises(UserError, match="nan"):
        rl.check_log_probabilities(two_armed, groups, flags(), ONE)


def test_the_end_token_is_trained_and_the_prompt_is_not(two_armed):
    prompt = BYTES.prompt([{"role": "user", "content": "?"}])
    for rollout in rl.flat(sampled(two_armed)):
        n = len(prompt)
        assert list(rollout.tokens[:n]) == prompt and len(rollout.tokens) == n + rollout.length
        assert not rollout.sampled[:n].any() and rollout.sampled[n:].all()
        assert rollout.tokens[-1] == END and rollout.finished


def test_what_is_cut_off_is_wrong(two_armed):
    [group] = sampled(two_armed, each=16, problems=[Choice()], max_tokens=1)  # no room for the end token
    assert {text_of(r.parts) for r in group} >= {"a"} and not any(r.correct or r.finished for r in group)
    assert any(r.correct for r in sampled(two_armed)[0])


@pytest.fixture(scope="module")
def calculating():
    """Says "a", or asks the calculator, or asks it twice."""
    call = [{"type": "calc", "text": "3*4"}, {"type": "output", "text": " 12"}]
    return model_that_says(["a", [*call, {"type": "text", "text": "a"}], [*call, *call]], steps=150)


def test_recomputed_log_probabilities_belong_to_their_rollouts(calculating):
    some = rl.flat(sampled(calculating, each=6, max_tokens=40))
    some = [some[i] for i in np.random.default_rng(1).permutation(len(some))]
    assert len({len(rollout.tokens) for rollout in some}) > 2
    for most in (1, 64, 4096):
        found = rl.log_probabilities(calculating, some, flags(batch_tokens=most), ONE)
        for rollout, logprobs in zip(some, found, strict=True):
            np.testing.assert_allclose(logprobs, log_p(calculating, rollout), atol=1e-9)


def test_outputs_of_tools_come_from_the_tool_and_have_no_weight(calculating):
    [group] = sampled(calculating, each=24, problems=[Choice()], max_tokens=40)
    output = BYTES._part("output", " 12")
    called = [r for r in group if any(part["type"] == "calc" and part["text"] == "3*4" for part in r.parts)]
    assert 0 < len(called) < len(group)
    for rollout in called:
        outputs = [part["text"] for part in rollout.parts if part["type"] == "output"]
        assert outputs in ([" 12"], [" 12", " 12"])
        completion, chosen = rollout.tokens[-rollout.length :], rollout.sampled[-rollout.length :]
        assert completion[~chosen].tolist() == output * len(outputs)
    for rollout in group:
        rollout.reward = rollout.length
    kept = rl.set_advantages(group, "grpo")
    for (tokens, weights), rollout in zip(
        rl.policy_gradient_rows(calculating, kept, None, 0, flags(), ONE),
        sorted(kept, key=lambda rollout: len(rollout.tokens)),
        strict=True,
    ):
        np.testing.assert_array_equal(tokens, rollout.tokens)
        np.testing.assert_allclose(weights, rollout.sampled * rollout.advantage / n_sampled(kept))


def test_a_batch_samples_what_each_rollout_would_alone(calculating, monkeypatch):
    """Compaction, the shared reading of prompts and tools change nothing: one by one it is the same."""
    problems = [Choice(), Choice(prompt="?!"), Choice()]
    settings = dict(max_tokens=30, seed=7)
    together = sampled(calculating, 4, problems, first=100, **settings)
    assert len({r.tokens.tobytes() for r in rl.flat(together)}) >= 4
    monkeypatch.setattr(rl, "SAMPLED_AT_ONCE", 5)
    in_batches = sampled(calculating, 4, problems, first=100, **settings)
    for i, problem in enumerate(problems):
        for j in range(4):
            [[alone]] = sampled(calculating, 1, [problem], first=100 + 4 * i + j, **settings)
            for other in (together[i][j], in_batches[i][j]):
                np.testing.assert_array_equal(alone.tokens, other.tokens)
                np.testing.assert_array_equal(alone.sampled, other.sampled)
                np.testing.assert_allclose(alone.logprobs, other.logprobs, atol=1e-9)


class Ranks:
    """Worlds of several ranks that are threads of this process: gather() meets at a barrier."""

    def __init__(self, size):
        self.size, self.values, self.barrier = size, [None] * size, threading.Barrier(size)

    def run(self, work):
        """[work(world of rank 0), work(world of rank 1), ...]"""
        results = [None] * self.size

        def of_rank(rank):
            def gather(value):
                self.values[rank] = json.loads(json.dumps(value))
                self.barrier.wait(30)
                values = list(self.values)
                self.barrier.wait(30)
                return values

            results[rank] = work(SimpleNamespace(rank=rank, size=self.size, gather=gather))

        threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_all_rollouts_and_its_rows(calculating, size):
    problems = [Choice() for _ in range(5)]
    settings = dict(max_tokens=30, seed=7)
    alone = rl.flat(sampled(calculating, 4, problems, first=100, **settings))
    assert len({tuple(r.tokens) for r in alone}) > 2

    def work(world):
        model = clone(calculating)  # threads must not share its buffers
        groups = sampled(model, 4, problems, first=100, world=world, **settings)
        kept = kept_of(groups)
        rows = rl.policy_gradient_rows(model, kept, None, 1, flags(), world)
        return groups, rows, rl.log_probabilities(model, rl.flat(groups), flags(), world)

    of_ranks = Ranks(size).run(work)
    for groups, _, logprobs in of_ranks:
        assert [len(group) for group in groups] == [4] * 5
        for rollout, expected, now in zip(rl.flat(groups), alone, logprobs, strict=True):
            np.testing.assert_array_equal(rollout.tokens, expected.tokens)
            np.testing.assert_array_equal(rollout.sampled, expected.sampled)
            np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-9)
            np.testing.assert_allclose(now, log_p(calculating, expected), atol=1e-9)
    rows = [row for _, rows, _ in of_ranks for row in rows]
    groups = [alone[i : i + 4] for i in range(0, 20, 4)]
    whole = rl.policy_gradient_rows(calculating, kept_of(groups), None, 1, flags(), ONE)
    assert len(rows) == len(whole)
    for tokens, weights in whole:
        assert any(np.array_equal(tokens, t) and np.allclose(weights, w, atol=1e-9) for t, w in rows)


# ------------------------------------------------------------------------------------------------------------
# It learns


def p_of(model, text):
    """The probability of a reply that says this and ends."""
    prompt = BYTES.prompt([{"role": "user", "content": "?"}])
    tokens = np.array([*prompt, *BYTES.encode(text), END])
    losses = model.losses(tokens[None, :-1], tokens[None, 1:])[0]
    return math.exp(-losses[len(prompt) - 1 :].sum())


def practise(model, steps=15, sign=1, **changed):
    optimizer, settings = gpt2.AdamW(model, weight_decay=0.1), flags(**changed)
    reference = clone(model) if settings.kl else None
    for step in range(steps):
        groups = sampled(model, first=step << 32)
        kept = [rollout for group in groups for rollout in rl.set_advantages(group, settings.method)]
        for rollout in kept:
            rollout.advantage *= sign
        for epoch in range(settings.epochs if kept else 0):
            model.flat_grads[:] = gradient(model, kept, epoch, reference, **changed)
            optimizer.step(5e-3)


def test_the_bandit_has_two_arms(taught):
    assert p_of(taught, "a") == pytest.approx(0.5, abs=0.1) and p_of(taught, "b") == pytest.approx(
        0.5, abs=0.1
    )


@pytest.mark.parametrize("changed", [{}, dict(epochs=3), dict(kl=0.01), dict(method="best-of")])
def test_the_right_arm_is_learned(two_armed, changed):
    practise(two_armed, **changed)
    assert p_of(two_armed, "a") > 0.9 and p_of(two_armed, "b") < 0.1


def test_an_advantage_of_the_wrong_sign_unlearns_it(two_armed):
    practise(two_armed, sign=-1)
    assert p_of(two_armed, "a") < 0.1


def test_kl_holds_the_model_back(taught):
    free, held = clone(taught), clone(taught)
    practise(free)
    practise(held, kl=2.0)
    assert p_of(held, "a") < p_of(free, "a") - 0.1


# ------------------------------------------------------------------------------------------------------------
# Runs

SMALL = (
    "--prompts 2 --attempts 4 --steps 6 --max-tokens 6 --eval-every 3 --eval-problems 3 --k 4 --save-every 2 "
)
SMALL += "--show-every 3 --lr 3e-3 --seed 5"


TASKS = {"choice": (1, 2), "other": (1, 2), "long": (1,), "some long": (1,)}


def choices(name, split="train", level=None, seed=0):
    """In place of problems(): which letter is right depends on how many came before."""
    if name not in TASKS:
        raise UserError(f"there is no task {name}")
    if level not in (None, 1, 2):
        raise UserError(f"{name} has no level {level}")
    for i in itertools.count():
        is_long = name == "long" or (name == "some long" and i % 3)
        yield Choice("?" * 80 if is_long else "?", "ab"[(seed + i) % 2], name, level or 1)


def checked_choices(name, split="train", level=None, seed=0):
    """The same, and a task or level that does not exist is an error at once."""
    stream = choices(name, split, level, seed)
    return itertools.chain([next(stream)], stream)


@pytest.fixture
def start(tmp_path, monkeypatch, taught_run):
    """start(out, *flags): a run of rl.py on the bandit."""
    monkeypatch.setattr(rl, "problems", checked_choices)
    monkeypatch.setattr(evaluate, "problems", checked_choices)
    monkeypatch.setattr(evaluate, "TASKS", TASKS)

    def go(out, *more, base=SMALL):
        return script.run(
            rl.main,
            "--init-from",
            taught_run,
            "--out",
            tmp_path / out,
            "--task",
            "choice",
            *base.split(),
            *more,
        )

    return go


@pytest.fixture(scope="module")
def taught_run(tmp_path_factory):
    """A run of two checkpoints, in float32."""
    run, model = tmp_path_factory.mktemp("sft"), model_that_says(["a", "b"], "float32")
    common.save_checkpoint(run, 7, model, BYTES, gpt2.AdamW(model), 2, stage="sft")
    return run


def events(run, kind):
    return [event for event in common.read_log(run) if event["event"] == kind]


def without_times(run):
    """The log without what a clock says."""
    times = ("seconds", "speed", "sampling", "flags")
    log = [{k: v for k, v in event.items() if k not in times} for event in common.read_log(run)]
    return [event for event in log if event["event"] != "start"]


def test_a_run_says_writes_and_logs_what_it_does(start, tmp_path):
    done = start("run")
    assert done.status == 0, done.err
    run = tmp_path / "run"
    steps, evals = events(run, "step"), events(run, "eval")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6] and [e["step"] for e in evals] == [0, 3, 6]
    assert [p.name for p in common.checkpoints(run)] == ["step_000004", "step_000006"]
    state = common.read_state(run / "step_000006")
    assert state["stage"] == "rl" and state["problems"] == 12 and state["flags"]["task"] == "choice"
    assert any(e["signal"] for e in steps)
    for e in steps:
        assert 0 <= e["correct"] == e["reward"] <= 1 and e["signal"] + e["without_signal"] / 2 == 1
        assert 1 < e["length"] < 4 and 0 < e["entropy"] < 2 and e["kl"] > -1e-6
        assert e["sampling"] > 0 and ("norm" in e) == ("loss" in e) == (e["signal"] > 0) and "score" not in e
        assert e["speed"] * e["seconds"] == pytest.approx(8 * e["length"])
    for e in evals:
        assert e["correct"] == pytest.approx(sum(r["pass@1"] for r in e["results"]) / len(e["results"]))
        assert e["length"] == pytest.approx(sum(r["length"] for r in e["results"]) / len(e["results"]))
        assert [(r["task"], r["level"], r["problems"]) for r in e["results"]] == [
            ("choice", 1, 2),
            ("choice", 2, 2),
        ]
        for r in e["results"]:
            assert r["sampled"] <= r["pass@2"] <= r["pass@4"]
    for word in ("step 6/6", "reward", "pass@1", "signal", "length", "entropy", "KL", "tok/s", "left"):
        assert word in done.err
    assert "sampling" in done.err and f"{run / 'step_000006'}; talk to it" in done.err
    assert "step 3, on test problems:" in done.err and "score" not in done.err
    assert not (run / "best").exists()
    assert [n for n in range(1, 7) if f"step {n}: ?  (" in done.err] == [3, 6]
    shown = done.err.split("step 3: ")[1].split("\n\n")[0].splitlines()
    assert {line[:2] for line in shown[1:]} <= {"+ ", "- "} and len(shown) == 5
    assert all(line.endswith("<|im_end|>") for line in shown[1:])


def test_other_levels_may_be_evaluated_but_the_mean_is_that_of_what_is_practised(
    start, tmp_path, monkeypatch
):
    monkeypatch.setattr(Choice, "verify", lambda self, text: float(self.level == 2))
    small = ("--steps", 1, "--eval-every", 1)
    for out, level, tested, correct in (("two", "2", "1-2", 1.0), ("other", "2", "1", 0.0)):
        done = start(out, *small, "--level", level, "--eval-level", tested)
        assert done.status == 0, done.err
        for e in events(tmp_path / out, "eval"):
            assert "-".join(str(r["level"]) for r in e["results"]) == tested and e["correct"] == correct


def test_the_checkpoint_with_the_highest_score_is_kept(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(common, "save_checkpoint", lambda *args, **state: saved.append((args[:2], state)))
    log = [
        dict(event="eval", step=0, score=0.2),
        dict(event="step", step=1),
        dict(event="eval", step=2, score=0.5),
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    about = dict(stage="rl", script="rl.py", flags=SimpleNamespace(seed=3))
    run = SimpleNamespace(directory=tmp_path, is_first=True, **about)
    run.model = run.tokenizer = run.optimizer = None
    rl.keep_if_best(run, 4, "score", 0.5)
    assert not saved
    rl.keep_if_best(run, 4, "score", 0.51)
    kept = dict(keep=1, stage="rl", script="rl.py", flags={"seed": 3})
    assert saved == [((tmp_path / "best", 4), kept)]
    run.is_first = False  # other ranks write nothing
    rl.keep_if_best(run, 4, "score", 0.6)
    assert len(saved) == 1


def test_log_probabilities_are_compared_at_the_beginning_and_now_and_then(start, tmp_path, monkeypatch):
    steps, compared, collect = [], [], rl.collect
    monkeypatch.setattr(rl, "CHECK_EVERY", 4)
    monkeypatch.setattr(rl, "collect", lambda *args: steps.append(args[3]) or collect(*args))
    monkeypatch.setattr(rl, "check_log_probabilities", lambda *_: compared.append(steps[-1]))
    assert start("run", "--eval-every", 0, "--steps", 5).status == 0
    assert compared == [0, 3]
    more = ("--resume", "--steps", 9)
    assert script.run(rl.main, "--out", tmp_path / "run", *more).status == 0
    assert compared == [0, 3, 5, 7]


def test_measures_of_a_step_by_hand():
    right, wrong = of_rewards(1, 0, 0, lengths=(2, 4, 6)), of_rewards(0, 0, 0)
    right[1].logprobs[:] = -0.5
    right[1].sampled[:1] = False  # a tool's output
    right[2].finished = False
    rl.set_advantages(right, "grpo")
    seen = []

    def score(problem, parts, finished):
        seen.append((problem, parts, finished))
        return float(finished)

    measures = rl.describe([right, wrong], score, 5.0)
    assert measures == pytest.approx(
        dict(reward=1 / 6, correct=1 / 6, length=21 / 6, entropy=2 / 20, signal=0.5, without_signal=1)
        | dict(sampling=4.0, score=5 / 6)
    )
    assert seen[0] == (right[0].problem, right[0].parts, True)
    text = rl.progress_text(measures | {"kl": 0.25})
    assert text.startswith("reward 0.167 | score 0.833 | pass@1 16.7%") and "| KL 0.2500 | sampling" in text
    assert "KL" not in rl.progress_text(measures), "of a model that is gone no divergence is known"


def test_rollouts_are_green_and_red_on_a_terminal(two_armed, monkeypatch):
    group = sampled(two_armed)[0]
    monkeypatch.setattr(common, "colour", lambda: True)
    lines = rl.show(BYTES, group).splitlines()[1:]
    for line, rollout in zip(lines, group, strict=True):
        assert line.startswith("\033[32m" if rollout.correct else "\033[31m") and line.endswith("\033[0m")


def test_a_rollout_is_shown_with_its_calls_and_its_end():
    [rollout] = of_rewards(1)
    rollout.parts = [
        dict(type="text", text="So\n"),
        dict(type="calc", text=" 3*4"),
        dict(type="output", text=" 12"),
        dict(type="text", text="12."),
    ]
    rollout.tokens[-1] = END
    rollout.problem.prompt = "3 times 4?"
    assert rl.show(BYTES, [rollout]) == "3 times 4?  (a)\n+ So\\n[calc 3*4 -> 12] 12.<|im_end|>"
    rollout.finished, rollout.correct, rollout.reward = False, 0.0, 0.25
    assert rl.show(BYTES, [rollout]).splitlines()[1] == "- 0.25 So\\n[calc 3*4 -> 12] 12."


def stop_after(monkeypatch, step):
    """Send Ctrl-C while this step is under way."""
    sample = rl.sample_rollouts

    def pressed(model, tokenizer, some_problems, settings, first_stream, world):
        if first_stream >> 32 == step - 1:
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(rl, "sample_rollouts", sample)
        return sample(model, tokenizer, some_problems, settings, first_stream, world)

    monkeypatch.setattr(rl, "sample_rollouts", pressed)


def test_ctrl_c_saves_and_a_resumed_run_goes_on_bit_for_bit(start, tmp_path, monkeypatch):
    extra = ["--epochs", 2, "--kl", 0.1, "--fill", 2, "--export"]
    assert start("whole", *extra, tmp_path / "whole.jsonl").status == 0
    stop_after(monkeypatch, 3)
    cut = start("cut", *extra, tmp_path / "cut.jsonl")
    assert cut.status == 130 and "stopped after step 3" in cut.err
    assert f"python rl.py --out {tmp_path / 'cut'} --resume" in cut.err
    assert [p.name for p in common.checkpoints(tmp_path / "cut")] == ["step_000002", "step_000003"]
    exported = (tmp_path / "cut.jsonl").read_text()
    killed = exported.splitlines()[-1].replace('"step": 3}', '"step": 4}')  # later than its last checkpoint
    (tmp_path / "cut.jsonl").write_text(f"{exported}{killed}\n{killed[:-9]}")
    assert script.run(rl.main, "--out", tmp_path / "cut", "--resume").status == 0
    a, b = (tmp_path / name / "step_000006" for name in ("whole", "cut"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    whole, cut = ((tmp_path / f"{name}.jsonl").read_text() for name in ("whole", "cut"))
    assert whole.replace('"whole"', '"cut"') == cut and cut.startswith(exported) and '"step": 6}' in cut
    kinds = ("step", "eval")
    logs = [[e for e in without_times(tmp_path / name) if e["event"] in kinds] for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 9


def test_the_loop_makes_these_updates_and_no_others(start, tmp_path, taught_run):
    """Two steps, written out."""
    more = ("--steps", 2, "--epochs", 2, "--kl", 0.2, "--clip", 0.01, "--std", "--batch-tokens", 64)
    assert start("run", *more, "--fill", 3, "--eval-every", 0).status == 0
    model, reference = (gpt2.GPT2.from_pretrained(hub.find_checkpoint(taught_run)) for _ in range(2))
    settings = flags(**common.read_state(tmp_path / "run" / "step_000002")["flags"])
    stream = rl.ProblemStream(settings, model, BYTES)
    optimizer = gpt2.AdamW(model, weight_decay=0.0)
    for step, lr in enumerate((0.2 * 3e-3, 0.4 * 3e-3)):  # five steps of warmup
        _, kept = rl.collect(model, BYTES, stream, step, settings, rl.verified, ONE)
        first = rl.log_probabilities(reference, kept, settings, ONE)
        for epoch in range(2):
            rows = rl.policy_gradient_rows(model, kept, first, epoch, settings, ONE)
            accumulate(model, rows, 64)
            optimizer.step(lr, 1.0)
    trained = gpt2.GPT2.from_pretrained(tmp_path / "run" / "step_000002")
    np.testing.assert_array_equal(trained.flat_params, model.flat_params)
    assert events(tmp_path / "run", "step")[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert events(tmp_path / "run", "step")[1]["kl"] > 1e-6


def test_the_reward_is_of_all_new_rollouts_at_once(two_armed, start):
    seen = []

    def reward(rollouts):
        seen.append(len(rollouts))
        return [rollout.length + i for i, rollout in enumerate(rollouts)]

    stream = rl.ProblemStream(flags(task="choice", level="1"), two_armed, BYTES)
    settings = flags(prompts=3, attempts=2, max_tokens=6)
    groups, kept = rl.collect(two_armed, BYTES, stream, 4, settings, reward, ONE)
    assert seen == [6] and stream.n_taken == 3
    rollouts = rl.flat(groups)
    assert [r.reward for r in rollouts] == [r.length + i for i, r in enumerate(rollouts)]
    expected = rl.sample_rollouts(two_armed, BYTES, [r[0].problem for r in groups], settings, 4 << 32, ONE)
    assert [r.tokens.tolist() for r in rollouts] == [r.tokens.tolist() for r in rl.flat(expected)]
    assert kept == rl.flat(group for group in groups if rl.has_signal(group))


RUNNER = """
import itertools, sys
sys.path.insert(0, {tests!r})
import evaluate, rl, test_rl
rl.problems = evaluate.problems = test_rl.checked_choices
evaluate.TASKS = test_rl.TASKS
flags, checkpoint = rl.parse(None)
rl.train(flags, checkpoint, None, script=__file__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory as Linux has it")
def test_two_ranks_train_the_same_model_and_twice_the_same_bits(start, tmp_path, taught_run):
    runner, root = tmp_path / "runner.py", str(Path(rl.__file__).parent)
    runner.write_text(RUNNER.format(tests=str(Path(__file__).parent)))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = root
    common_flags = [*SMALL.split(), "--epochs", "2", "--kl", "0.1", "--fill", "1"]
    common_flags += ["--device", "cpu", "--dtype", "float64"]
    assert start("one", *common_flags).status == 0
    for out in ("two", "again"):
        command = [sys.executable, runner, "--init-from", taught_run, "--out", tmp_path / out, "--ranks", 2]
        command += ["--task", "choice", *common_flags]
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two, again = (hub.find_checkpoint(tmp_path / out) for out in ("one", "two", "again"))
    assert (two / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    a, b = (gpt2.GPT2.from_pretrained(checkpoint).flat_params for checkpoint in (one, two))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert common.read_log(tmp_path / "two")[0]["ranks"] == 2
    measures = ("correct", "length", "entropy", "signal", "kl", "loss")
    logs = [[e for e in without_times(tmp_path / name) if e["event"] == "step"] for name in ("one", "two")]
    for e, other in zip(*logs, strict=True):
        assert [e.get(name) for name in measures] == pytest.approx([other.get(n) for n in measures], abs=1e-7)


def test_equal_rewards_leave_every_bit_of_the_parameters(start, tmp_path, taught_run, monkeypatch):
    monkeypatch.setattr(Choice, "verify", lambda self, text: 0.7)
    assert start("run", "--eval-every", 0, "--max-tokens", 30).status == 0
    before, after = (hub.find_checkpoint(d) / "model.safetensors" for d in (taught_run, tmp_path / "run"))
    assert before.read_bytes() == after.read_bytes()
    for e in events(tmp_path / "run", "step"):
        assert e["signal"] == 0 and e["without_signal"] == 2 and "loss" not in e


def test_a_run_learns(start, tmp_path, monkeypatch):
    monkeypatch.setattr(Choice, "verify", lambda self, text: float(text == "b"))
    assert start("run", "--steps", 24, "--eval-every", 24, "--lr", 1e-2, "--k", 32).status == 0
    first, last = events(tmp_path / "run", "eval")
    assert all(r["sampled"] > 0.9 and r["pass@1"] == 1 for r in last["results"])
    assert all(r["sampled"] < 0.9 for r in first["results"])


def test_fill_draws_again_and_no_more_than_it_may(start, tmp_path, monkeypatch):
    asked = []
    real = rl.sample_rollouts

    def watched(model, tokenizer, problems, settings, first_stream, world):
        asked.append((len(problems), first_stream))
        return real(model, tokenizer, problems, settings, first_stream, world)

    monkeypatch.setattr(rl, "sample_rollouts", watched)
    monkeypatch.setattr(Choice, "verify", lambda self, text: 0.0)
    assert start("none", "--fill", 3, "--eval-every", 0, "--steps", 2).status == 0
    assert [n for n, _ in asked] == [2] * 8 and len({first for _, first in asked}) == 8
    assert events(tmp_path / "none", "step")[0]["without_signal"] == 8
    assert common.read_state(tmp_path / "none" / "step_000002")["problems"] == 16
    asked.clear()
    monkeypatch.setattr(Choice, "verify", lambda self, text: float(text == "a"))
    assert start("some", "--fill", 9, "--eval-every", 0, "--attempts", 6).status == 0
    assert all(n > 0 for n, _ in asked)
    for e in events(tmp_path / "some", "step"):
        groups = e["without_signal"] / (1 - e["signal"]) if e["signal"] < 1 else 2
        assert groups * e["signal"] == pytest.approx(2)  # as many with a signal as --prompts


def test_a_drift_ends_a_run(start, monkeypatch):
    real = sample.generate

    def wrong(*args, **settings):
        rows = real(*args, **settings)
        rows[0].logprobs[0] += 0.01
        return rows

    monkeypatch.setattr(sample, "generate", wrong)
    assert script.refused(start("run", "--eval-every", 0), "0.01", "sampling and training differ")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_gradient_that_is_no_number_changes_nothing_and_ends_a_run(
    start, tmp_path, taught_run, monkeypatch, broken
):
    def bad(model):
        model.flat_grads.fill(1 if broken == "loss" else math.inf)
        model.loss.fill(math.nan if broken == "loss" else 1)
        model.pending = None

    monkeypatch.setattr(gpt2.GPT2, "backward", bad)
    done = start("run", "--eval-every", 0, "--fill", 9, "--steps", 30)
    assert script.refused(last_line(done), "10 steps in a row", "no number", "--lr")
    before, after = (
        gpt2.GPT2.from_pretrained(hub.find_checkpoint(d)) for d in (taught_run, tmp_path / "run")
    )
    np.testing.assert_array_equal(after.flat_params, before.flat_params)


def last_line(done):
    """The end of a run without the lines of its steps."""
    done.err = done.err.splitlines(keepends=True)[-1]
    return done


def test_the_export_is_what_sft_reads(start, tmp_path):
    path = tmp_path / "new" / "right.jsonl"
    assert start("run", "--export", path, "--method", "best-of").status == 0
    conversations, skipped = read(path)
    assert skipped == 0 and len(conversations) >= 6
    for question, answer in conversations:
        assert question == {"role": "user", "content": "?"} and answer["role"] == "assistant"
        assert answer["content"] in ("a", "b")
    before = path.read_text()
    assert start("again", "--export", path).status == 0
    assert path.read_text().startswith(before) and len(path.read_text()) > len(before)


def test_exported_calls_of_tools_are_the_same_tokens_again(calculating, tmp_path):
    [group] = sampled(calculating, each=24, problems=[Choice()], max_tokens=40)
    rl.export(tmp_path / "x.jsonl", [group], "a run", 1)
    conversations, _ = read(tmp_path / "x.jsonl")
    right = {tuple(rollout.tokens): rollout for rollout in group if rollout.correct}
    assert len(right) == len(conversations) >= 2, "one with a call and one without"
    for conversation, rollout in zip(conversations, right.values()):
        tokens, mask = BYTES.render(conversation)
        np.testing.assert_array_equal(tokens, rollout.tokens)
        np.testing.assert_array_equal(np.array(mask, bool), rollout.sampled)


# ------------------------------------------------------------------------------------------------------------
# What --task and --level mean, and errors


def taken(n, n_taken=0, **changed):
    """n problems of a stream that has given n_taken already."""
    model = SimpleNamespace(config=SimpleNamespace(n_positions=10**6))
    return rl.ProblemStream(flags(**changed), model, BYTES, n_taken).take(n)


@pytest.mark.usefixtures("start")
def test_problems_come_by_their_shares():
    drawn = taken(4000, task="choice=3,other", level=None, seed=1)
    assert sum(p.task == "choice" for p in drawn) == pytest.approx(3000, abs=120)
    assert sum(p.level == 1 for p in drawn) == pytest.approx(2000, abs=130)
    assert taken(50, task="choice=3,other", level=None, seed=1) == drawn[:50]
    assert taken(50, task="choice=3,other", level=None, seed=2) != drawn[:50]


@settings(max_examples=8)
@given(st.integers(1, 1000), st.integers(0, 20))
def test_problems_go_on_where_a_run_stopped(seed, n):
    mix = dict(task="arithmetic=2,word", level="1-2", seed=seed)
    whole = [problem.prompt for problem in taken(n + 5, **mix)]
    assert [problem.prompt for problem in taken(5, n_taken=n, **mix)] == whole[n:]


@pytest.mark.parametrize(
    "more, words",
    [
        (["--task", "nonsense"], ["there is no task nonsense"]),
        (["--task", "choice=0"], ["--task choice=0", "share"]),
        (["--level", "7"], ["no level 7"]),
        (["--level", "2-1"], ["--level 2-1", "1-3"]),
        (["--level", "easy"], ["--level easy", "1-3"]),
        (["--eval-level", "9"], ["no level 9"]),
        (["--attempts", "1"], ["--attempts 1", "best-of"]),
        (["--reward", "model"], ["--reward"]),
        (["--ranks", "3"], ["--ranks 3 does not divide", "1, 2 do"]),
        (["--task", "long", "--level", "1"], ["fill", "context of 64"]),
        (["--task", "long", "--level", "1", "--eval-every", "0"], ["fill", "context of 64"]),
        (["--init-from", "nowhere"], ["nowhere", "no checkpoint"]),
        (["--prompts", "0"], ["--prompts"]),
        (["--resume"], ["nothing to resume"]),
    ],
)
def test_bad_input_is_one_clear_line(start, tmp_path, more, words):
    assert script.refused(last_line(start("run", *more)), *words)
    assert not (tmp_path / "run").exists()


def test_problems_that_leave_no_room_for_an_answer_are_left_out(start, tmp_path):
    assert (done := start("run", "--task", "some long")).status == 0, done.err
    assert len(events(tmp_path / "run", "step")) == 6
    assert all(r["problems"] == 2 for e in events(tmp_path / "run", "eval") for r in e["results"])


def test_a_base_model_is_refused(start, tmp_path):
    model = model_that_says(["a"], "float32", steps=1)
    common.save_checkpoint(tmp_path / "base", 7, model, BYTES, gpt2.AdamW(model), 2)
    assert script.refused(start("run", "--init-from", tmp_path / "base"), "no assistant yet", "sft.py")
    assert not (tmp_path / "run").exists()


def test_a_model_without_chat_tokens_is_refused(start, tmp_path, monkeypatch):
    tokenizer = Tokenizer("bytes", BYTES.ranks, chat=False)  # as GPT-2's
    model = gpt2.GPT2(gpt2.GPT2Config(1, 2, 32, 64, tokenizer.vocab_size))
    common.save_checkpoint(tmp_path / "plain", 7, model, tokenizer, gpt2.AdamW(model), 2)
    monkeypatch.setattr(Tokenizer, "load", lambda path: tokenizer)
    done = start("run", "--init-from", tmp_path / "plain")
    assert script.refused(done, "no chat tokens", "sft.py") and not (tmp_path / "run").exists()


def test_a_run_that_exists_or_is_done_is_not_touched(start, tmp_path):
    assert start("run", "--eval-every", 0).status == 0
    before = script.tree(tmp_path / "run")
    assert script.refused(start("run"), "exists", "--resume")
    assert script.refused(
        script.run(rl.main, "--out", tmp_path / "run", "--resume"), "all its 6 steps", "--steps"
    )
    assert script.tree(tmp_path / "run") == before


def test_one_rollout_is_enough_to_imitate(start):
    assert start("run", "--attempts", 1, "--method", "best-of", "--eval-every", 0).status == 0
