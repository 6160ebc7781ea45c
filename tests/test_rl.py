"""RL held to its mathematics: gradients against finite differences in float64, advantages, clipping and KL
against numbers worked out by hand; then to what it makes of a model that can say two things."""

import itertools
import json
import math
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import script
from hypothesis import given, settings
from hypothesis import strategies as st

import attempts
import batches
import common
import distributed
import gpt2
import rl
import tasks.problems as tasks
from common import UserError
from tasks.conversations import read
from tokenizer import Tokenizer, text_of

BYTES = Tokenizer.bytes()
END = BYTES.encode_special("<|im_end|>")
CONFIG = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=BYTES.vocab_size)
MOST = 512


@dataclass
class Choice:
    """A problem with one right text: a bandit with as many arms as the model knows replies."""

    prompt: str = "?"
    answer: str = "a"
    task: str = "choice"
    level: int = 1

    def verify(self, text):
        return float(text == self.answer)


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
        batches.accumulate(model, rows, MOST)
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


def sampled(model, each=8, n=2, seed=1, **settings):
    return attempts.sample(model, BYTES, [Choice()] * n, each, 12, seed, **settings)


def flags(**changed):
    """The flags of a run, as learn() takes them."""
    found = rl.parser().parse_args(["--batch-tokens", str(MOST)])
    vars(found).update(changed)
    return found


def log_p(model, attempt):
    """log p of the attempt's tokens, straight from the definition: (T,), 0 for the first."""
    logits = model.logits(attempt.tokens[None, :-1])[0]  # (T - 1, V)
    scores = logits - logits.max(-1, keepdims=True)
    all_of_them = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return np.append(0.0, all_of_them[np.arange(len(logits)), attempt.tokens[1:]])


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
        attempts.Attempt(Choice(), [1] * n, [], np.zeros(n, np.int32), np.ones(n, bool), np.zeros(n), r, r)
        for r, n in zip(rewards, lengths)
    ]


def test_groups_without_signal_teach_nothing():
    assert rl.choose(of_rewards(0, 0, 0), "grpo") == rl.choose(of_rewards(1, 1, 1), "grpo") == []
    assert rl.choose(of_rewards(0, 0, 0), "best-of") == []
    assert [a.advantage for a in rl.choose(of_rewards(1, 0), "grpo")] == [0.5, -0.5]


def test_best_of_imitates_the_shortest_right_attempt():
    group = of_rewards(0, 1, 1, 1, lengths=(1, 5, 3, 3))
    assert rl.choose(group, "best-of") == [group[2]] and group[2].advantage == 1
    group = of_rewards(1, 1, lengths=(9, 3))
    group[0].reward = 7.0  # somebody likes the first better
    assert rl.choose(group, "best-of")[0] is group[0]
    group[1].reward, group[1].correct = 9.0, 0.0  # and the second most of all, but it is wrong
    assert rl.choose(group, "best-of")[0] is group[0]


def test_pass_at_k_by_hand_and_by_counting():
    assert attempts.pass_at_k(4, 0, 2) == 0 and attempts.pass_at_k(4, 4, 1) == 1
    assert attempts.pass_at_k(4, 1, 2) == 0.5 and attempts.pass_at_k(5, 2, 1) == pytest.approx(0.4)
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert attempts.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_majority_votes():
    def said(*texts):
        group = of_rewards(*(float(text.endswith(" 9")) for text in texts), lengths=[3] * len(texts))
        for attempt, text in zip(group, texts):
            attempt.parts = [{"type": "text", "text": text}]
            attempt.problem = tasks.Problem("word", "How many apples?", "", "9")
        return group

    assert attempts.majority(said("Answer: 9", "Answer: 8", "Answer: 9")) == 1
    assert attempts.majority(said("Answer: 9", "Answer: 8", "Answer: 8")) == 0
    assert (
        attempts.majority(said("no idea", "nor I", "2 + 7 makes 9. Answer: 9")) == 1
    )  # who does not answer does not vote
    assert attempts.majority(said("Answer: 8", "Answer: 9")) == 0  # of equals the first
    assert attempts.majority(said("no idea", "none")) == 0
    cut_off, *others = said("Answer: 9", "Answer: 8", "Answer: 9 apples", "Answer: 9.0")
    cut_off.correct = 0.0  # it votes, too
    assert attempts.majority([cut_off, *others]) == 1


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


class Recorder:
    """Takes the place of the optimizer: keeps the gradients of each epoch, moves the model by `moves`."""

    def __init__(self, model, moves=()):
        self.model, self.gradients, self.moves = model, [], list(moves)

    def step(self, lr, max_norm, limit):
        self.gradients.append(self.model.flat_grads.copy())
        self.model.flat_grads.fill(0)
        if self.moves:
            self.model.flat_params += self.moves.pop(0)
        return 1.0


def kept_of(groups, std=False):
    rewards = np.random.default_rng(5).normal(size=(len(groups), len(groups[0])))
    for group, values in zip(groups, rewards):
        for attempt, reward in zip(group, values):
            attempt.reward = float(reward)
    return [attempt for group in groups for attempt in rl.choose(group, "grpo", std)]


@pytest.mark.parametrize("std", [False, True])
def test_the_gradient_is_that_of_the_sum_of_advantage_times_log_p(two_armed, std):
    model = two_armed
    kept = kept_of(sampled(model, each=5), std)
    n = sum(attempt.drawn.sum() for attempt in kept)

    def objective():  # to be made large
        return sum(attempt.advantage * log_p(model, attempt)[attempt.drawn].sum() for attempt in kept) / n

    watched, rng = Recorder(model), np.random.default_rng(0)
    rl.learn(model, watched, kept, 1e-3, flags())
    for _ in range(4):
        direction = rng.normal(size=model.flat_params.shape)
        direction[np.abs(model.flat_params) == 0] = 0  # the padding of the buffers
        expected = -slope(model, objective, direction)
        assert watched.gradients[0] @ direction == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_the_gradient_of_the_second_epoch_is_that_of_the_clipped_objective_and_of_k3(two_armed, taught):
    model, kl, clip = two_armed, 0.3, 0.05
    rng = np.random.default_rng(1)
    kept = kept_of(sampled(model, each=6))
    reference = clone(taught)
    reference.flat_params += (
        0.02 * rng.normal(size=reference.flat_params.shape) * (reference.flat_params != 0)
    )
    move = 0.05 * rng.normal(size=model.flat_params.shape) * (model.flat_params != 0)
    watched = Recorder(model, [move])
    k3 = rl.learn(model, watched, kept, 1e-3, flags(epochs=2, kl=kl, clip=clip), reference)["kl"]
    n, clipped = sum(attempt.drawn.sum() for attempt in kept), []

    def objective():
        total = 0.0
        for attempt in kept:
            now, begun = (log_p(m, attempt)[attempt.drawn] for m in (model, reference))
            ratio, d, A = np.exp(now - attempt.logprobs[attempt.drawn]), begun - now, attempt.advantage
            bounded = np.clip(ratio, 1 - clip, 1 + clip)
            clipped.extend(bounded * A < ratio * A)
            total += (-np.minimum(ratio * A, bounded * A) + kl * (np.exp(d) - d - 1)).sum()
        return total / n

    for _ in range(3):
        direction = rng.normal(size=model.flat_params.shape) * (model.flat_params != 0)
        expected = slope(model, objective, direction)
        assert watched.gradients[1] @ direction == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert 0 < sum(clipped) < len(clipped), "nothing, or everything, was clipped: the test tests nothing"
    assert k3 > 0


def test_kl_is_none_at_the_beginning_and_its_estimate_is_that_of_the_definition(two_armed, taught):
    kept = kept_of(sampled(two_armed))
    weightless = flags(kl=1.0)
    assert rl.learn(two_armed, Recorder(two_armed), kept, 1e-3, weightless, taught)["kl"] == pytest.approx(
        0, abs=1e-12
    )
    other = clone(taught)
    other.flat_params *= 1.02
    d = np.concatenate([(log_p(other, a) - log_p(two_armed, a))[a.drawn] for a in kept])
    found = rl.learn(two_armed, Recorder(two_armed), kept, 1e-3, weightless, other)["kl"]
    assert found == pytest.approx((np.exp(d) - d - 1).mean(), rel=1e-9) and found > 0


def test_what_is_imitated_has_the_weights_of_sft(two_armed):
    groups = sampled(two_armed)
    kept = [attempt for group in groups for attempt in rl.choose(group, "best-of")]
    n = sum(attempt.drawn.sum() for attempt in kept)
    watched = Recorder(two_armed, [0.01, 0.0])
    before = clone(two_armed)
    rl.learn(two_armed, watched, kept, 1e-3, flags(method="best-of", epochs=2))
    for model, found in zip((before, two_armed), watched.gradients):
        rows = [(attempt.tokens, attempt.drawn / n) for attempt in kept]
        model.flat_grads.fill(0)
        batches.accumulate(model, rows, MOST)
        np.testing.assert_allclose(found, model.flat_grads, atol=1e-12)


def test_the_normaliser_is_global(two_armed):
    """In whatever micro-batches the attempts are, the gradient is the same."""
    kept = kept_of(sampled(two_armed, each=5, n=3))
    whole, pieces = Recorder(two_armed), Recorder(two_armed)
    rl.learn(two_armed, whole, kept, 1e-3, flags(batch_tokens=4096))
    rl.learn(two_armed, pieces, kept, 1e-3, flags(batch_tokens=1))
    np.testing.assert_allclose(whole.gradients[0], pieces.gradients[0], atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Attempts


def test_stored_log_probabilities_are_those_of_the_definition(two_armed):
    for attempt in itertools.chain(*sampled(two_armed, each=4)):
        np.testing.assert_allclose(
            attempt.logprobs[attempt.drawn], log_p(two_armed, attempt)[attempt.drawn], atol=1e-9
        )
        assert (attempt.logprobs[~attempt.drawn] == 0).all()


def test_recomputed_log_probabilities_belong_to_their_attempts(two_armed):
    some = list(itertools.chain(*sampled(two_armed, each=6)))
    some = [some[i] for i in np.random.default_rng(1).permutation(len(some))]
    for most in (1, 64, 4096):
        for attempt, found in zip(some, attempts.log_probabilities(two_armed, some, most), strict=True):
            np.testing.assert_allclose(found, log_p(two_armed, attempt), atol=1e-9)


def test_a_drift_is_an_error(two_armed):
    some = sampled(two_armed)[0]
    rl.check(two_armed, some, MOST)
    some[3].logprobs[-1] += 0.9e-4
    rl.check(two_armed, some, MOST)
    some[3].logprobs[-1] += 0.2e-4
    with pytest.raises(UserError, match=r"0\.00011"):
        rl.check(two_armed, some, MOST)
    some[3].logprobs[-1] = math.nan
    with pytest.raises(UserError, match="nan"):
        rl.check(two_armed, some, MOST)


def test_the_end_token_is_trained_and_the_prompt_is_not(two_armed):
    prompt = BYTES.prompt([{"role": "user", "content": "?"}])
    for attempt in itertools.chain(*sampled(two_armed)):
        assert list(attempt.tokens) == prompt + attempt.said
        assert not attempt.drawn[: len(prompt)].any() and attempt.drawn[len(prompt) :].all()
        assert attempt.said[-1] == END and attempt.drawn[-1]


def test_what_is_cut_off_is_wrong(two_armed):
    [group] = attempts.sample(two_armed, BYTES, [Choice()], 16, 1, 1)  # no room for the end token
    assert {text_of(a.parts) for a in group} >= {"a"} and not any(a.correct for a in group)
    assert any(a.correct for a in sampled(two_armed)[0])


@pytest.fixture(scope="module")
def calculating():
    """Says "a", or asks the calculator, or asks it twice."""
    call = [{"type": "calc", "text": "3*4"}, {"type": "output", "text": " 12"}]
    return model_that_says(["a", [*call, {"type": "text", "text": "a"}], [*call, *call]], steps=150)


def test_outputs_of_tools_come_from_the_tool_and_have_no_weight(calculating):
    [group] = attempts.sample(calculating, BYTES, [Choice()], 24, 40, 1)
    output = BYTES._part("output", " 12")
    called = [a for a in group if any(part["type"] == "calc" and part["text"] == "3*4" for part in a.parts)]
    assert 0 < len(called) < len(group)
    for attempt in called:
        outputs = [part["text"] for part in attempt.parts if part["type"] == "output"]
        said, n = "".join(map(chr, (~attempt.drawn).astype(int) + ord("0"))), len(attempt.said)
        assert outputs in ([" 12"], [" 12", " 12"])
        forced = [token for token, drawn in zip(attempt.said, attempt.drawn[-n:]) if not drawn]
        assert forced == output * len(outputs), said
    for attempt in group:
        attempt.reward = len(attempt.said)
    rows, seen = [], batches.accumulate
    kept = rl.choose(group, "grpo")
    try:
        batches.accumulate = lambda model, given, most: rows.extend(given) or seen(model, given, most)
        rl.learn(calculating, Recorder(calculating), kept, 1e-3, flags())
    finally:
        batches.accumulate = seen
    n_drawn = sum(attempt.drawn.sum() for attempt in kept)
    for (_, weights), attempt in zip(rows, kept, strict=True):
        np.testing.assert_allclose(weights, attempt.drawn * attempt.advantage / n_drawn)
    np.testing.assert_array_equal(calculating.flat_grads, 0)


def test_a_batch_samples_what_each_attempt_would_alone(calculating):
    """Compaction, the shared reading of prompts and tools change nothing: one by one it is the same."""
    problems = [Choice(), Choice(prompt="?!"), Choice()]
    together = attempts.sample(calculating, BYTES, problems, 4, 30, 7, first=100)
    assert len({a.tokens.tobytes() for group in together for a in group}) >= 4
    for i, problem in enumerate(problems):
        for j in range(4):
            [[alone]] = attempts.sample(calculating, BYTES, [problem], 1, 30, 7, first=100 + 4 * i + j)
            np.testing.assert_array_equal(alone.tokens, together[i][j].tokens)
            np.testing.assert_array_equal(alone.drawn, together[i][j].drawn)
            np.testing.assert_allclose(alone.logprobs, together[i][j].logprobs, atol=1e-9)


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
        groups = sampled(model, each=8, n=2, first=step << 32)
        kept = [attempt for group in groups for attempt in rl.choose(group, settings.method)]
        for attempt in kept:
            attempt.advantage *= sign
        if kept:
            rl.learn(model, optimizer, kept, 5e-3, settings, reference)


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


def choices(name, split="train", level=None, seed=0):
    """In place of tasks.problems: which letter is right depends on how many came before."""
    if name not in ("choice", "other", "long", "some long"):
        raise UserError(f"there is no task {name}")
    if level not in (None, 1, 2):
        raise UserError(f"{name} has no level {level}")
    prompt = lambda i: "?" * 80 if name == "long" or (name == "some long" and i % 3) else "?"
    return (Choice(prompt(i), "ab"[(seed + i) % 2], name, level or 1) for i in itertools.count())


@pytest.fixture
def start(tmp_path, monkeypatch, taught_run):
    """start(out, *flags): a run of rl.py on the bandit."""
    monkeypatch.setattr(tasks, "problems", choices)
    monkeypatch.setattr(tasks, "TASKS", {"choice": (1, 2), "other": (1, 2), "long": (1,), "some long": (1,)})

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
    times = ("seconds", "sampling", "training", "flags")
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
    for e in steps:
        assert 0 <= e["correct"] == e["reward"] <= 1 and e["signal"] + e["without_signal"] / 2 == 1
        assert 1 < e["length"] < 4 and 0 < e["entropy"] < 2 and e["kl"] > -1e-6
        assert e["sampling"] > 0 and e["norm"] >= 0
    for e in evals:
        assert e["correct"] == pytest.approx(sum(r["pass@1"] for r in e["results"]) / len(e["results"]))
        assert [(r["task"], r["level"], r["problems"]) for r in e["results"]] == [
            ("choice", 1, 2),
            ("choice", 2, 2),
        ]
        for r in e["results"]:
            assert list(r)[3:] == [
                "pass@1",
                "sampled",
                "pass@2",
                "pass@4",
                "vote@4",
                "length",
                "sampled length",
            ]
            assert r["sampled"] <= r["pass@2"] <= r["pass@4"]
    for word in (
        "step 6/6",
        "reward",
        "pass@1",
        "signal",
        "length",
        "entropy",
        "tok/s",
        "left",
        "sampling",
        "training",
    ):
        assert word in done.err
    assert "KL" in done.err
    shown = done.out.split("step 3: ")[1].split("\n\n")[0].splitlines()
    assert (
        shown[0].startswith("?  (") and {line[:2] for line in shown[1:]} <= {"+ ", "- "} and len(shown) == 5
    )
    assert all(line.endswith("<|im_end|>") for line in shown[1:])


def test_attempts_are_green_and_red_on_a_terminal(two_armed, monkeypatch):
    group = sampled(two_armed)[0]
    monkeypatch.setattr(attempts.common, "colour", lambda: True)
    lines = attempts.show(BYTES, group).splitlines()[1:]
    for line, attempt in zip(lines, group, strict=True):
        assert line.startswith("\033[32m" if attempt.correct else "\033[31m") and line.endswith("\033[0m")


def stop_after(monkeypatch, step):
    """Send Ctrl-C while this step is under way."""
    learn, calls = attempts.sample, []

    def pressed(*args, **settings):
        calls.append(args)
        if (args[6] if len(args) > 6 else settings.get("first", 0)) >> 32 == step - 1 and step > 1:
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(attempts, "sample", learn)
        return learn(*args, **settings)

    monkeypatch.setattr(attempts, "sample", pressed)


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
    kinds = ("step", "eval")  # it was stopped before the evaluation that was due
    logs = [[e for e in without_times(tmp_path / name) if e["event"] in kinds] for name in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0]) == 9


def test_equal_rewards_leave_every_bit_of_the_parameters(start, tmp_path, taught_run, monkeypatch):
    monkeypatch.setattr(Choice, "verify", lambda self, text: 0.7)
    assert start("run", "--eval-every", 0, "--max-tokens", 30).status == 0
    before, after = (
        common.newest_checkpoint(d) / "model.safetensors" for d in (taught_run, tmp_path / "run")
    )
    assert before.read_bytes() == after.read_bytes()
    assert all(e["signal"] == 0 and e["without_signal"] == 2 for e in events(tmp_path / "run", "step"))


def test_a_run_learns(start, tmp_path, monkeypatch):
    monkeypatch.setattr(Choice, "verify", lambda self, text: float(text == "b"))
    assert start("run", "--steps", 24, "--eval-every", 24, "--lr", 1e-2, "--k", 32).status == 0
    first, last = events(tmp_path / "run", "eval")
    assert all(r["sampled"] > 0.9 and r["pass@1"] == 1 for r in last["results"])
    assert all(r["sampled"] < 0.9 for r in first["results"])


def test_fill_draws_again_and_no_more_than_it_may(start, tmp_path, monkeypatch):
    asked = []
    real = attempts.shared_out

    def watched(team, problems, each, *rest, **settings):
        asked.append((len(problems), rest[2]))
        return real(team, problems, each, *rest, **settings)

    monkeypatch.setattr(attempts, "shared_out", watched)
    monkeypatch.setattr(Choice, "verify", lambda self, text: 0.0)
    assert start("none", "--fill", 3, "--eval-every", 0, "--steps", 2).status == 0
    assert [n for n, _ in asked] == [2] * 8 and len({first for _, first in asked}) == 8
    assert events(tmp_path / "none", "step")[0]["without_signal"] == 8
    assert common.read_state(tmp_path / "none" / "step_000002")["problems"] == 16
    asked.clear()
    monkeypatch.setattr(Choice, "verify", lambda self, text: float(text == "a"))
    assert start("some", "--fill", 9, "--eval-every", 0, "--attempts", 6).status == 0
    for e in events(tmp_path / "some", "step"):
        groups = e["without_signal"] / (1 - e["signal"]) if e["signal"] < 1 else 2
        assert groups * e["signal"] == pytest.approx(2)  # as many with a signal as --prompts


@pytest.mark.parametrize("size", [2, 3])
def test_shared_out_the_attempts_are_the_same(calculating, size):
    problems = [Choice() for _ in range(5)]
    alone = attempts.sample(calculating, BYTES, problems, 4, 30, 7, first=100)
    work = {"sample": lambda model, share: attempts.sample(model, BYTES, *share)}
    team = distributed.Workers(calculating, work, size)
    together = attempts.shared_out(team, problems, 4, 30, 7, first=100)
    team.close()
    assert [[a.said for a in group] for group in together] == [[a.said for a in group] for group in alone]
    assert len({tuple(a.said) for group in alone for a in group}) > 2


def test_a_drift_ends_a_run(start, monkeypatch):
    real = attempts.generate

    def wrong(*args, **settings):
        rows = real(*args, **settings)
        rows[0].logprobs[0] += 0.01
        return rows

    monkeypatch.setattr(attempts, "generate", wrong)
    assert script.refused(start("run", "--eval-every", 0), "0.01", "sampling and training differ")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_gradient_that_is_no_number_ends_a_run_and_changes_nothing(
    start, tmp_path, taught_run, monkeypatch, broken
):
    def bad(model, rows, most):
        model.flat_grads.fill(1 if broken == "loss" else math.inf)
        return math.nan if broken == "loss" else 1.0

    seen = []
    monkeypatch.setattr(batches, "accumulate", bad)
    monkeypatch.setattr(rl.common, "save_checkpoint", lambda *args, **state: seen.append(args) or tmp_path)
    made = gpt2.GPT2.from_pretrained
    models = []
    monkeypatch.setattr(gpt2.GPT2, "from_pretrained", lambda *args: models.append(made(*args)) or models[-1])
    done = start("run", "--eval-every", 0, "--fill", 9)
    assert script.refused(last_line(done), "no number", "--lr") and not seen
    before = made(common.newest_checkpoint(taught_run))
    np.testing.assert_array_equal(models[0].flat_params, before.flat_params)


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
    [group] = attempts.sample(calculating, BYTES, [Choice()], 24, 40, 1)
    attempts.export(tmp_path / "x.jsonl", [group], "a run", 1)
    conversations, _ = read(tmp_path / "x.jsonl")
    right = {tuple(a.said): a for a in group if a.correct}
    assert len(right) == len(conversations) >= 2, "one with a call and one without"
    for conversation, attempt in zip(conversations, right.values()):
        tokens, mask = BYTES.render(conversation)
        np.testing.assert_array_equal(tokens, attempt.tokens)
        np.testing.assert_array_equal(np.array(mask, bool), attempt.drawn)


@pytest.mark.usefixtures("start")
def test_eval_prints_a_table_or_json(taught_run):
    base = [
        "--eval",
        taught_run,
        "--task",
        "choice,other=2",
        "--eval-problems",
        5,
        "--k",
        8,
        "--max-tokens",
        5,
    ]
    done = script.run(rl.main, *base, "--json")
    assert done.status == 0, done.err
    report = json.loads(done.out)
    assert report["run"] == str(taught_run) and [(r["task"], r["level"]) for r in report["results"]] == [
        ("choice", 1), ("choice", 2), ("other", 1), ("other", 2)]  # fmt: skip
    for r in report["results"]:
        assert 0 < r["sampled"] < 1 and r["length"] == 2 and r["pass@8"] > r["sampled"]
    plain = script.run(rl.main, *base)
    lines = plain.out.splitlines()
    assert len(lines) == 5 and lines[0].split()[:4] == ["task", "level", "problems", "pass@1"]
    assert f"{report['results'][0]['pass@8']:.1%}" in lines[1]
    assert script.run(rl.main, *base, "--level", 2, "--json").out.count('"task"') == 2


# ------------------------------------------------------------------------------------------------------------
# What --task and --level mean, and errors


def test_shares(start):
    assert attempts.shares("choice", "2") == {("choice", 2): 1}
    assert attempts.shares("choice=3,other", "1-2") == {
        ("choice", 1): 1.5, ("choice", 2): 1.5, ("other", 1): 0.5, ("other", 2): 0.5}  # fmt: skip
    assert list(attempts.shares("choice", None)) == [("choice", 1), ("choice", 2)]
    drawn = list(itertools.islice(rl.practice(attempts.shares("choice=3,other", None), 1), 4000))
    assert sum(p.task == "choice" for p in drawn) == pytest.approx(3000, abs=120)
    assert sum(p.level == 1 for p in drawn) == pytest.approx(2000, abs=130)
    again = list(itertools.islice(rl.practice(attempts.shares("choice=3,other", None), 1), 50))
    assert again == drawn[:50]


@settings(max_examples=8)
@given(st.integers(1, 1000), st.integers(0, 20))
def test_problems_go_on_where_a_run_stopped(seed, n):
    mix = {("arithmetic", 1): 1.0, ("arithmetic", 2): 2.0}
    whole = [p.prompt for p in itertools.islice(rl.practice(mix, seed), n + 5)]
    assert [p.prompt for p in itertools.islice(rl.practice(mix, seed), n, n + 5)] == whole[n:]


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
        (["--reward", "model", "--method", "best-of"], ["--method best-of", "choose one"]),
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


def test_a_file_of_problems_that_are_all_too_long_is_refused(taught):
    """Also a short one, whose test problems come once."""
    with pytest.raises(UserError, match="prompts of long fill the model's context of 64"):
        list(attempts.fitting(taught, BYTES, [Choice("?" * 80, task="long")] * 5))


def test_a_base_model_is_refused(start, tmp_path):
    model = model_that_says(["a"], "float32", steps=1)
    common.save_checkpoint(tmp_path / "base", 7, model, BYTES, gpt2.AdamW(model), 2)
    assert script.refused(start("run", "--init-from", tmp_path / "base"), "no assistant yet", "sft.py")
    assert not (tmp_path / "run").exists()


def test_a_model_without_chat_tokens_is_refused(start, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Tokenizer, "load", lambda path: Tokenizer("bytes", BYTES.ranks, chat=False)
    )  # as GPT-2's
    done = start("run")
    assert script.refused(done, "no chat tokens", "sft.py") and not (tmp_path / "run").exists()


def test_a_run_that_exists_or_is_done_is_not_touched(start, tmp_path):
    assert start("run", "--eval-every", 0).status == 0
    before = script.tree(tmp_path / "run")
    assert script.refused(start("run"), "exists", "--resume")
    assert script.refused(
        script.run(rl.main, "--out", tmp_path / "run", "--resume"), "all its 6 steps", "--steps"
    )
    assert script.tree(tmp_path / "run") == before


def test_one_attempt_is_enough_to_imitate(start):
    assert start("run", "--attempts", 1, "--method", "best-of", "--eval-every", 0).status == 0
