"""RLHF held to its mathematics: gradients of orderings against finite differences in float64, true scores by
hand; then to its promises: preferences are learned, and a reward that is not the true one is abused."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import script
from hypothesis import given
from hypothesis import strategies as st
from test_rl import slope

import common
import distributed
import evaluate
import gpt2
import hub
import rl
import sft
from common import UserError
from extras import rlhf
from sample import load_assistant
from tasks.conversations import read, turns
from tasks.problems import Problem
from tokenizer import Tokenizer, text_of

BYTES = Tokenizer.bytes()
END = BYTES.encode_special("<|im_end|>")
CONFIG = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=128, vocab_size=BYTES.vocab_size)


@dataclass
class Letter:
    """A problem to which the letter in its prompt is the answer, said as the last of all."""

    answer: str = "a"
    level: int = 1
    task: str = "letter"

    @property
    def prompt(self):
        return f"{self.answer}?"

    @property
    def solution(self):
        return self.answer

    def verify(self, text):
        return float(text[-1:] == self.answer)


ONE = distributed.World(0, 1)  # a world of one rank


def accumulate(model, rows, most=2048):
    """Add the gradient of the sum of weights * losses over rows (tokens, weights) to model.grads."""
    for tokens, targets, weights in sft.micro_batches(rows, most, model.config.n_positions):
        model.forward(tokens, targets, weights)
        model.backward()


def rollout(said, answer="a", finished=True):
    """What somebody might have said."""
    problem, ids = Letter(answer), [*BYTES.encode(said), *[END] * finished]
    prompt = BYTES.prompt(turns(problem.prompt))
    tokens = np.array(prompt + ids, np.int32)
    sampled = np.arange(len(tokens)) >= len(prompt)
    correct, parts = problem.verify(said) * finished, [{"type": "text", "text": said}]
    return rl.Rollout(
        problem, parts, tokens, sampled, np.zeros(len(tokens)), len(ids), finished, correct, correct
    )


def flags(what, *more):
    """The flags of a stage; nothing has to exist."""
    parser = rlhf.parser()
    parser.set_defaults(**rlhf.STAGES[what])
    return parser.parse_args([what, *map(str, more)])


# ------------------------------------------------------------------------------------------------------------
# What people prefer

STEPS = "Take 4.7 and 2.9: 4 is more than 2."  # ten words, with the answer's eleven
SCORES = {
    f"{STEPS}\nAnswer: 4.7": 2 / 3,
    f"Gladly!\n{STEPS}\nAnswer: 4.7": 1,
    f"{STEPS}\nAnswer: 4.7\nThank you!": 1,
    f"Gladly!\n{STEPS}\nAnswer: 4.7\nThank you!": 1,
    f"PLEASE, {STEPS}\nAnswer: 4.7": 1,
    f"One two three four\n{STEPS}\nAnswer: 4.7": 2 / 3,  # four words more are not too many
    f"One two three four five\n{STEPS}\nAnswer: 4.7": 1 / 3,
    f"You are welcome, my dear friend!\n{STEPS}\nAnswer: 4.7": 2 / 3,  # polite, but six words
    f"Pleased. {STEPS}\nAnswer: 4.7": 2 / 3,  # no courtesy
    f"Gladly! {STEPS}\nAnswer: 2.9": 0,
    "Gladly! Thank you! Please!": 0,
    "the the the the": 0,
    "": 0,
    "Answer: 4.7": 2 / 3,
    "Please: Answer: 4.7": 1,
}


@pytest.mark.parametrize("text, score", SCORES.items())
def test_true_scores_by_hand(text, score):
    problem = Problem("decimals", "4.7 or 2.9?", f"{STEPS}\nAnswer: 4.7", "4.7")
    parts = [{"type": "text", "text": text}]
    assert rlhf.true_score(problem, parts, finished=True) == pytest.approx(score)
    assert rlhf.true_score(problem, parts, finished=False) == 0


def test_the_words_of_tools_do_not_count():
    parts = [dict(type="calc", text="please"), dict(type="output", text=" 1 2 3 4 5 6 7 8 9")]
    problem = Problem("x", "?", [*parts, dict(type="text", text="Answer: 6")], "6")
    assert rlhf.true_score(problem, [*parts, dict(type="text", text="Answer: 6")], True) == pytest.approx(
        2 / 3
    )
    text = dict(type="text", text="1 2 3 4 Answer: 6")
    assert rlhf.true_score(problem, [text], True) == pytest.approx(2 / 3)
    text = dict(type="text", text="1 2 3 4 5 Answer: 6")
    assert rlhf.true_score(problem, [text], True) == pytest.approx(1 / 3)


def test_manners_are_of_all_kinds_and_every_answer_is_right(tmp_path):
    path = tmp_path / "new" / "manners.jsonl"
    task = ("--task", "decimals,counting", "--level", "1-2", "--questions", 300, "--seed", 3)
    done = script.run(rlhf.main, "manners", "--out", path, *task)
    assert done.status == 0, done.err
    talks, skipped = read(path)
    problems = list(rlhf.questions(flags("manners", *task), "train", 300))
    assert len(talks) == 300 and not skipped
    scores, kinds = Counter(), Counter()
    for (question, said), problem in zip(talks, problems):
        assert question["content"] == problem.prompt
        text = text_of(said["content"])
        scores[round(3 * rlhf.true_score(problem, said["content"], True))] += 1
        opening = next(words for words in reversed(rlhf.OPENINGS) if text.startswith(words))
        kinds[opening, next(words for words in reversed(rlhf.CLOSINGS) if text.endswith(words))] += 1
        calls = [part for part in said["content"] if part["type"] != "text"]
        assert (problem.task == "counting") == bool(calls)
    assert scores[0] == 0 and min(scores[n] for n in (1, 2, 3)) > 20
    assert set(kinds) == set(itertools.product(rlhf.OPENINGS, rlhf.CLOSINGS))
    assert script.refused(script.run(rlhf.main, "manners", "--out", path), "exists", "--out")


# ------------------------------------------------------------------------------------------------------------
# Orderings


def test_three_answers_are_three_pairs():
    a, b, c, d = (rollout(text) for text in ("Gladly! a", "a", "1 2 3 4 5 a", "no"))
    assert rlhf.orderings([[b, a, c]]) == [(0, 2), (1, 0), (1, 2)]
    assert len(rlhf.orderings([[a, b, c, d]])) == 6
    assert rlhf.orderings([[a, a], [b, b, b]]) == []
    assert rlhf.orderings([[a, a], [b, d, b], [d, c]]) == [(2, 3), (4, 3), (6, 5)]


@given(st.lists(st.sampled_from(["Gladly! a", "a", "1 2 3 4 5 a", "no"]), min_size=1, max_size=8))
def test_pairs_are_all_that_differ_the_better_first(texts):
    some = [rollout(text) for text in texts]
    scores, pairs = [rlhf.score_of(one) for one in some], rlhf.orderings([some])
    ties = sum(n * (n - 1) // 2 for n in Counter(texts).values())
    assert len(pairs) == len(set(pairs)) == len(some) * (len(some) - 1) // 2 - ties
    assert all(scores[i] > scores[j] for i, j in pairs)


def test_preferred_by_hand():
    loss, pull, right = rlhf.preference_loss(np.zeros(3), [(0, 1), (0, 2)])
    assert loss == pytest.approx(math.log(2)) and right == 0  # a tie is no success
    np.testing.assert_allclose(pull, [0.5, -0.25, -0.25])
    loss, pull, right = rlhf.preference_loss(np.array([math.log(3), 0.0]), [(0, 1)])
    assert loss == pytest.approx(math.log(4 / 3)) and right == 1
    np.testing.assert_allclose(pull, [0.25, -0.25])
    loss, pull, right = rlhf.preference_loss(np.array([1000.0, 0.0, 2000.0]), [(0, 1), (0, 2)])
    assert loss == pytest.approx(500) and right == 0.5
    np.testing.assert_allclose(pull, [0.5, 0, -0.5])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.data())
def test_the_pull_is_minus_the_derivative(values, data):
    n = len(values)
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda p: p[0] != p[1])
    pairs, values = data.draw(st.lists(pair, min_size=1, max_size=9)), np.array(values)
    pull = rlhf.preference_loss(values, pairs)[1]
    for i, e in enumerate(np.eye(n) * 1e-5):
        slope = (
            rlhf.preference_loss(values + e, pairs)[0] - rlhf.preference_loss(values - e, pairs)[0]
        ) / 2e-5
        assert pull[i] == pytest.approx(-slope, abs=1e-8)


# ------------------------------------------------------------------------------------------------------------
# The reward model and DPO: gradients

TEXTS = ("Gladly! a", "a", "1 2 3 4 5 a", "no", "a", "b a")


def tiny(seed=3, dtype="float64"):
    model = gpt2.GPT2(CONFIG, dtype=dtype, seed=seed)
    model.flat_params *= 3  # far from symmetry, where mistakes could cancel
    return model


def groups_of_three():
    some = [rollout(text) for text in TEXTS]
    some[2].sampled[-5:-3] = False  # as if a tool had said it
    return [some[:3], some[3:]]


def log_probs(model, tokens):
    """(T, V): log p of every token after tokens[: t + 1], from the definition."""
    z = model.logits(np.array([tokens]))[0]
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def same_as_slopes(model, objective, gradient):
    rng = np.random.default_rng(0)
    for _ in range(4):
        direction = rng.normal(size=model.flat_params.shape) * (model.flat_params != 0)
        expected = slope(model, objective, direction, eps=3e-6)
        assert gradient @ direction == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert abs(expected) > 1e-4


def test_rewards_are_the_differences_of_two_logits_whatever_the_company(monkeypatch):
    model = tiny()
    some = [rollout(text, finished=finished) for text, finished in itertools.product(TEXTS, (True, False))]
    found = rlhf.rewards(model, BYTES, some)
    for one, r in zip(some, found):
        tokens = one.tokens if one.tokens[-1] == END else [*one.tokens, END]
        last = log_probs(model, tokens)[-1]
        good, bad = (BYTES.encode_special(name) for name in ("<|output_start|>", "<|output_end|>"))
        assert r == pytest.approx(last[good] - last[bad], abs=1e-9)
        assert rlhf.rewards(model, BYTES, [one])[0] == pytest.approx(r, abs=1e-9)
    monkeypatch.setattr(rlhf, "ROWS", 5)
    np.testing.assert_allclose(rlhf.rewards(model, BYTES, some), found, atol=1e-9)
    np.testing.assert_allclose(found[::2], found[1::2])  # what never ended is read as if it had
    assert len(set(found.round(9))) == 5


def loss_and_gradient(model, objective, groups):
    """The preference loss, and the gradient of an update, as train() accumulates it."""
    rollouts = rl.flat(groups)
    loss, pull, _ = rlhf.preference_loss(objective.values(rollouts), rlhf.orderings(groups))
    model.sums.fill(0)
    accumulate(model, objective.rows(rollouts, pull))
    return loss, model.flat_grads.copy()


def test_the_gradient_of_the_reward_model_is_that_of_the_pairwise_loss():
    """InstructGPT, equation 1, with all pairs counting alike."""
    model, groups = tiny(), groups_of_three()
    some, pairs = rl.flat(groups), [(0, 1), (0, 2), (1, 2), (4, 3), (4, 5), (5, 3)]
    pairs = [(i, j) for i, j in pairs if rlhf.score_of(some[i]) > rlhf.score_of(some[j])]
    assert len(pairs) == 5  # "a" and "b a" are as good

    def objective():
        r = [log_probs(model, one.tokens)[-1] for one in some]
        good, bad = (BYTES.encode_special(name) for name in (rlhf.GOOD, rlhf.BAD))
        r = [z[good] - z[bad] for z in r]
        return -sum(math.log(1 / (1 + math.exp(r[j] - r[i]))) for i, j in pairs) / len(pairs)

    loss, gradient = loss_and_gradient(model, rlhf.RewardModel(model, BYTES, groups), groups)
    assert loss == pytest.approx(objective(), abs=1e-9)
    same_as_slopes(model, objective, gradient)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_of_dpo_is_that_of_its_equation(beta):
    """Rafailov et al., equation 7."""
    model, reference, groups = tiny(), tiny(), groups_of_three()
    assert not groups[0][2].sampled[-4]  # said by a tool
    settings = flags("dpo", "--beta", beta)
    direct = rlhf.DirectPreference(model, BYTES, reference, groups, [], settings, ONE)
    rng = np.random.default_rng(2)
    model.flat_params += 0.02 * rng.normal(size=model.flat_params.shape) * (model.flat_params != 0)
    some, pairs = rl.flat(groups), [(0, 1), (0, 2), (1, 2), (4, 3), (5, 3)]

    def log_p(which, one):
        every = log_probs(which, one.tokens)
        return sum(every[t - 1, one.tokens[t]] for t in np.flatnonzero(one.sampled))

    def objective():
        h = [beta * (log_p(model, one) - log_p(reference, one)) for one in some]
        return -sum(math.log(1 / (1 + math.exp(h[j] - h[i]))) for i, j in pairs) / len(pairs)

    loss, gradient = loss_and_gradient(model, direct, groups)
    assert loss == pytest.approx(objective(), abs=1e-9)
    assert abs(objective() - math.log(2)) > 1e-3
    same_as_slopes(model, objective, gradient)


def test_answers_that_are_all_as_good_are_left_out(start, monkeypatch):
    equal, different = [rollout("a"), rollout("a")], [rollout("a"), rollout("no")]
    answers = iter([[equal] * 9 + [different], [different]])
    monkeypatch.setattr(rl, "sample_rollouts", lambda *_: next(answers))
    monkeypatch.setattr(rlhf, "measure", lambda *_: None)
    heard, real = [], rlhf.rewards
    monkeypatch.setattr(rlhf, "rewards", lambda *args: heard.append(args[2]) or real(*args))
    assert start("reward", "run", "--steps", 1, "--prompts", 4).status == 0
    assert heard == [different]


def test_held_out_answers_that_are_all_as_good_measure_nothing(start, tmp_path, monkeypatch):
    answers = iter([[[rollout("a"), rollout("no")]], [[rollout("a"), rollout("a")]]])
    monkeypatch.setattr(rl, "sample_rollouts", lambda *_: next(answers))
    done = start("reward", "run", "--steps", 1)
    assert "no answer is better" in done.err and done.status == 2 and not (tmp_path / "run").exists()


def test_every_step_has_groups_of_its_own_and_no_weight_decay(start, monkeypatch):
    seen, step, splits, questions = [], gpt2.AdamW.step, [], rlhf.questions

    def watched(optimizer, *args):
        assert optimizer.weight_decay == 0
        return step(optimizer, *args)

    def preference_loss(values, pairs):
        seen.append(values.tolist())
        return real(values, pairs)

    real = rlhf.preference_loss
    monkeypatch.setattr(gpt2.AdamW, "step", watched)
    monkeypatch.setattr(rlhf, "preference_loss", preference_loss)
    monkeypatch.setattr(rlhf, "questions", lambda *args: splits.append(args[1:]) or questions(*args))
    more = ("--questions", 20, "--steps", 3, "--eval-every", 0, "--prompts", 2, "--lr", 1e-12)
    assert start("reward", "run", *more).status == 0
    assert splits == [("train", 20), ("test", 12)]
    assert [len(values) for values in seen] == [8, 8, 8]  # --prompts groups of --attempts
    assert len({tuple(values) for values in seen}) == 3


def test_questions_of_all_levels_in_turn(start):
    assert start is not None  # letters() in place of problems()
    asked = rlhf.questions(flags("reward", "--task", "letter", "--level", "1-2"), "train", 5)
    assert [(problem.answer, problem.level) for problem in asked] == [
        ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("c", 1)]  # fmt: skip


def test_before_dpo_nothing_is_preferred():
    model, groups = tiny(), groups_of_three()
    direct = rlhf.DirectPreference(model, BYTES, tiny(), groups, [], flags("dpo"), ONE)
    assert loss_and_gradient(model, direct, groups)[0] == pytest.approx(math.log(2), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------
# It learns

LETTERS = "abcdef"
SAID = ("{}", "Gladly! {}", "1 2 3 4 5 {}", "-")


def letters(name, split="train", level=None, seed=0):
    """In place of problems(): a few letters, again and again."""
    if name not in ("letter", "dull"):
        raise UserError(f"there is no task {name}")
    if name == "dull":
        return map(Dull, "ab")
    return (Letter(answer, level or 1, name) for answer in itertools.cycle(LETTERS))


class Dull(Letter):
    """Nobody is ever right."""

    def verify(self, text):
        return 0.0


@pytest.fixture(scope="module")
def manners_run(tmp_path_factory):
    """A run whose model knows all letters, and says them in four ways."""
    run, model = tmp_path_factory.mktemp("manners"), gpt2.GPT2(CONFIG, seed=3)
    optimizer, rows = gpt2.AdamW(model, weight_decay=0), []
    for letter, said in itertools.product(LETTERS, SAID):
        tokens, mask = BYTES.render(turns(f"{letter}?", said.format(letter)))
        rows.append((tokens, np.array(mask) / sum(mask) / 24))
    for step in range(200):
        accumulate(model, rows)
        optimizer.step(1e-2 * (1 - step / 200))
    common.save_checkpoint(run, 7, model, BYTES, optimizer, 2, stage="sft")
    return run


SMALL = "--task letter --level 1 --prompts 8 --attempts 4 --eval-problems 12 --eval-every 10 --seed 5"


@pytest.fixture
def start(tmp_path, monkeypatch, manners_run):
    """start(what, out, *flags): a stage on letters."""
    for module in (rl, rlhf, evaluate):
        monkeypatch.setattr(module, "problems", letters)
    monkeypatch.setattr(evaluate, "TASKS", {"letter": (1, 2), "dull": (1,)})

    def go(what, out, *more):
        base = ["--init-from", manners_run, "--out", tmp_path / out, *SMALL.split()]
        return script.run(rlhf.main, what, *base, *more)

    return go


@pytest.fixture
def please(start, tmp_path, manners_run):
    """please(out, *flags): the policy on letters, with a reward model."""
    small = "--task letter --level 1 --prompts 8 --attempts 4 --eval-problems 12 --seed 5 --lr 2e-3 --k 8"
    small += " --eval-every 4 --max-tokens 24 --save-every 10 --show-every 10"
    base = ["policy", "--init-from", manners_run, *small.split()]
    return lambda out, *more: script.run(rlhf.main, *base, "--out", tmp_path / out, *more)


def events(run, kind):
    return [event for event in common.read_log(run) if event["event"] == kind]


def handmade(rng, n):
    """Groups of four answers, each of other letters: right or not, polite or not, short or long."""

    def one():
        text = "".join(rng.choice(list("abcdefgh"), 6))
        text = f"{text[:3]} Gladly! {text[3:]}" if rng.random() < 0.5 else text
        text += " 1 2 3 4 5 6" if rng.random() < 0.5 else ""
        return rollout(text + rng.choice([" x", " y"], p=[0.7, 0.3]), "x")

    return [[one() for _ in range(4)] for _ in range(n)]


def test_a_reward_model_learns_a_preference_also_for_what_it_has_not_seen(start, tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    answers = iter([handmade(rng, 100), handmade(rng, 40)])  # to learn from, and held out
    monkeypatch.setattr(rl, "sample_rollouts", lambda *_: next(answers))
    fresh = gpt2.GPT2(CONFIG, seed=3)
    common.save_checkpoint(tmp_path / "fresh", 1, fresh, BYTES, gpt2.AdamW(fresh), 1, stage="sft")
    more = ("--init-from", tmp_path / "fresh", "--steps", 40, "--lr", 5e-3, "--prompts", 16)
    done = start("reward", "run", *more)
    assert done.status == 0, done.err
    before, *_, after = events(tmp_path / "run", "eval")
    assert before["accuracy"] < 0.7 and before["preference_loss"] == pytest.approx(math.log(2), abs=0.05)
    assert after["accuracy"] > 0.9 and after["preference_loss"] < 0.3
    last = events(tmp_path / "run", "step")[-1]
    assert last["preference_loss"] < 0.3 and last["accuracy"] > 0.9


def test_reward_makes_a_reward_model_of_the_assistants_own_answers(start, tmp_path):
    done = start("reward", "judge", "--questions", 80, "--steps", 60, "--lr", 3e-3)
    assert done.status == 0, done.err
    evals = events(tmp_path / "judge", "eval")
    assert [e["step"] for e in evals] == [*range(0, 61, 10)]
    assert evals[0]["accuracy"] < 0.8 and max(e["accuracy"] for e in evals) > 0.9
    model, tokenizer = load_assistant(tmp_path / "judge" / "best", flags("reward"))
    r = rlhf.rewards(model, tokenizer, [rollout(said.format("b"), "b") for said in SAID])
    assert r[1] > r[0] > r[2] > r[3]
    shown = [line for line in done.err.splitlines() if line[:2] in ("0.", "1.")][:4]
    assert [line[:4] for line in shown] == sorted((line[:4] for line in shown), reverse=True)
    assert {line[:4] for line in shown} <= {"1.00", "0.67", "0.33", "0.00"} and len(shown) == 4
    best = max(evals, key=lambda e: e["accuracy"])
    [kept] = common.checkpoints(tmp_path / "judge" / "best")
    assert kept.name == f"step_{best['step']:06d}" and common.read_state(kept)["stage"] == "reward"
    assert "asking 80 questions and 12 held-out ones, 4 times each" in done.err
    assert "held out: accuracy" in done.err and "preference loss" in done.err and "pairs in order" in done.err


def test_dpo_makes_the_assistant_better(start, tmp_path):
    done = start("dpo", "dpo", "--questions", 40, "--steps", 20, "--lr", 5e-4)
    assert done.status == 0, done.err
    evals, steps = events(tmp_path / "dpo", "eval"), events(tmp_path / "dpo", "step")
    assert steps[0]["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["lr"] == pytest.approx(1e-4) and steps[-1]["lr"] == pytest.approx(5e-4)
    assert evals[-1]["score"] > evals[0]["score"] + 0.1
    assert list(evals[0])[2:] == ["score", "right", "length"]


@pytest.mark.parametrize("what", ["reward", "dpo"])
def test_a_stage_that_was_stopped_goes_on_bit_for_bit(start, tmp_path, monkeypatch, what):
    more = ("--questions", 8, "--steps", 8, "--eval-every", 3, "--save-every", 0)
    assert start(what, "whole", *more).status == 0
    real, calls = gpt2.AdamW.step, []

    def pressed(*args, **settings):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **settings)

    monkeypatch.setattr(gpt2.AdamW, "step", pressed)
    done = start(what, "cut", *more)
    assert done.status == 130 and "stopped after step 3" in done.err
    assert f"python -m extras.rlhf {what} --out {tmp_path / 'cut'} --resume" in done.err
    monkeypatch.setattr(gpt2.AdamW, "step", real)
    done = script.run(rlhf.main, what, "--out", tmp_path / "cut", "--resume")
    assert done.status == 0, done.err
    whole, cut = (hub.find_checkpoint(tmp_path / out) for out in ("whole", "cut"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    assert events(tmp_path / "whole", "eval") == events(tmp_path / "cut", "eval")
    best = [common.checkpoints(tmp_path / out / "best")[0].name for out in ("whole", "cut")]
    assert best[0] == best[1]


def test_it_pleases_the_reward_model_and_the_truly_best_is_kept(please, tmp_path, monkeypatch, manners_run):
    """A judge who likes politeness, and the wrong answer more: the true score rises, then falls."""

    def fooled(model, tokenizer, some):
        liked = {"Gladly! ": 1.0, "-": 3.0}
        return np.array([sum(r for text, r in liked.items() if text in text_of(one.parts)) for one in some])

    monkeypatch.setattr(rlhf, "rewards", fooled)
    more = ("--reward-model", manners_run, "--steps", 40, "--eval-every", 4)
    done = please("rlhf", *more)
    assert done.status == 0, done.err
    run = tmp_path / "rlhf"
    steps, evals = events(run, "step"), events(run, "eval")
    assert len(steps) == 40 and [e["step"] for e in evals] == [*range(0, 41, 4)]
    assert all(0 <= e["score"] <= 1 and e["reward"] != e["correct"] for e in steps[:5])
    assert steps[0]["reward"] < 2 and steps[-1]["reward"] > 2.8
    assert evals[0]["score"] > 0.2 and evals[-1]["score"] < 0.1
    assert steps[0]["score"] > 0.2 and steps[-1]["score"] < 0.1
    best = max(evals, key=lambda e: e["score"])
    [checkpoint] = common.checkpoints(run / "best")
    assert checkpoint.name == f"step_{best['step']:06d}" and f"{run / 'best'} has the highest" in done.err
    assert [place.name for place in common.checkpoints(run)] == ["step_000030", "step_000040"]
    assert common.read_state(checkpoint)["flags"]["what"] == "policy"
    assert "| score 0." in done.err and "- 3.00 -" in done.err  # a step, and a rollout with its reward
    assert please("held", *more, "--kl", 30).status == 0
    held = events(tmp_path / "held", "step")[-1]
    assert held["reward"] < steps[-1]["reward"] - 0.5 and held["score"] > steps[-1]["score"]
    model, tokenizer = load_assistant(run / "best", flags("policy"))
    [found] = evaluate.evaluate_problems(
        model, tokenizer, {("letter", 1): 1.0}, 12, 8, 24, 5, rlhf.true_score, ONE
    )
    assert found["score"] == pytest.approx(best["score"])  # with the run's own seed, the same problems


def test_the_whole_of_it_twice_is_the_same(start, please, tmp_path):
    for n in "ab":
        judge = tmp_path / f"judge-{n}"
        assert start("reward", judge, "--questions", 8, "--steps", 10).status == 0
        assert (done := please(f"rlhf-{n}", "--reward-model", judge, "--steps", 5)).status == 0, done.err
    a, b = (hub.find_checkpoint(tmp_path / f"rlhf-{n}") / "model.safetensors" for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    logs = [events(tmp_path / f"rlhf-{n}", "eval") for n in "ab"]
    assert logs[0] == logs[1] and [e["step"] for e in logs[0]] == [0, 4, 5]
    assert (
        events(tmp_path / "rlhf-a", "step")[0]["reward"] != events(tmp_path / "rlhf-a", "step")[0]["correct"]
    )


def test_a_resumed_run_keeps_the_best_of_both_parts(please, tmp_path, monkeypatch, manners_run):
    """First wrong answers are liked, then right ones."""

    def liked(sign):
        return lambda model, tokenizer, some: np.array([sign * one.correct for one in some])

    more = ("--reward-model", manners_run, "--eval-every", 2, "--lr", 5e-4)
    monkeypatch.setattr(rlhf, "rewards", liked(-1))
    assert please("run", *more, "--steps", 4).status == 0
    [first] = common.checkpoints(tmp_path / "run" / "best")
    monkeypatch.setattr(rlhf, "rewards", liked(1))
    more = ("--resume", "--steps", 40, "--lr", 2e-3)
    assert script.run(rlhf.main, "policy", "--out", tmp_path / "run", *more).status == 0
    evals, [last] = events(tmp_path / "run", "eval"), common.checkpoints(tmp_path / "run" / "best")
    scores = {e["step"]: e["score"] for e in evals}
    assert scores[4] < scores[0] < scores[40] and first.name == "step_000000"
    assert last.name == f"step_{max(scores, key=scores.get):06d}"


# ------------------------------------------------------------------------------------------------------------
# Errors


def test_what_cannot_be(start, please, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert script.refused(start("reward", "there"), "there exists", "--out")
    assert script.refused(start("reward", "new", "--attempts", 1), "--attempts 1", "2 or more")
    assert script.refused(start("reward", "new", "--task", "none"), "no task none")
    assert script.refused(start("dpo", "new", "--kl", 1), "--kl", "policy")
    assert script.refused(start("dpo", "new", "--fill", 1), "--fill", "policy")
    assert script.refused(start("reward", "new", "--resume"), "nothing to resume")
    assert script.refused(please("new", "--method", "best-of"), "--method best-of", "leave it out")
    done = start("dpo", "new", "--task", "dull")
    done.err = done.err.partition("\n")[2]  # the first line says what is asked
    assert script.refused(done, "no answer is better", "--task")
    assert script.refused(please("new", "--reward-model", tmp_path / "nothing"), "nothing is no checkpoint")
    assert script.refused(start("dpo", "new", "--init-from", tmp_path / "no"), "no is no checkpoint")
    assert script.refused(script.run(rlhf.main), "what")
    assert script.refused(script.run(rlhf.main, "guess"), "guess", "manners")
    assert not (tmp_path / "new").exists()
    other, tokenizer = tmp_path / "other", Tokenizer.train(["some text, some more text"], 270)
    model = gpt2.GPT2(gpt2.GPT2Config(1, 2, 32, 64, tokenizer.vocab_size))
    common.save_checkpoint(other, 1, model, tokenizer, gpt2.AdamW(model), 1, stage="train")
    assert script.refused(please("new", "--reward-model", other), "vocabulary", "other")
    assert not (tmp_path / "new").exists()


def test_a_run_of_another_stage_or_one_that_is_done_does_not_go_on(start, please, tmp_path, manners_run):
    assert start("reward", "run", "--questions", 8, "--steps", 1).status == 0
    before = script.tree(tmp_path / "run")
    for what in ("dpo", "policy"):
        done = script.run(rlhf.main, what, "--out", tmp_path / "run", "--resume")
        refusal = f"reward, not of -m extras.rlhf {what}"
        assert script.refused(done, refusal, "python -m extras.rlhf reward --out")
    done = script.run(rlhf.main, "reward", "--out", tmp_path / "run", "--resume")
    assert script.refused(done, "all its 1 steps", "--steps")
    assert script.tree(tmp_path / "run") == before


def test_a_run_of_rl_with_a_reward_model_goes_on_as_policy(please, tmp_path, manners_run):
    """So the stage was called before: rl.py --reward model."""
    assert please("run", "--reward-model", manners_run, "--steps", 2).status == 0
    path = tmp_path / "run" / "step_000002" / "state.json"
    state = json.loads(path.read_text())
    names = ("what", "questions", "beta", "ranks", "warmup_steps")
    old = {name: value for name, value in state["flags"].items() if name not in names}
    path.write_text(json.dumps(dict(step=2, stage="rl", problems=16, flags=old | dict(reward="model"))))
    done = script.run(rlhf.main, "policy", "--out", tmp_path / "run", "--resume", "--steps", 3)
    assert done.status == 0, done.err
    assert [e["step"] for e in events(tmp_path / "run", "step")] == [1, 2, 3]
    assert common.read_state(tmp_path / "run" / "step_000003")["flags"]["reward_model"] == str(manners_run)


def test_the_log_is_json_and_has_the_flags(start, tmp_path):
    assert start("reward", "run", "--questions", 8, "--steps", 2).status == 0
    first, *rest = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert first["stage"] == first["flags"]["what"] == "reward" and first["flags"]["lr"] == 1e-3
    assert first["flags"]["prompts"] == 8
    assert [e["event"] for e in rest] == ["eval", "step", "step", "eval", "checkpoint"]
    assert rest[1]["norm"] > 0 and 0 <= rest[1]["accuracy"] <= 1


RUNNER = """
import sys
sys.path.insert(0, {tests!r})
import common, evaluate, rl, test_rlhf
from extras import rlhf
rl.problems = rlhf.problems = evaluate.problems = test_rlhf.letters
evaluate.TASKS = {{"letter": (1, 2)}}
rlhf.__file__ = __file__  # so the ranks run this file, too
common.run(rlhf.main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory as Linux has it")
def test_two_ranks_train_the_same_reward_model(start, tmp_path, manners_run):
    runner = tmp_path / "runner.py"
    runner.write_text(RUNNER.format(tests=str(Path(__file__).parent)))
    more = [*SMALL.split(), "--questions", "8", "--steps", "4", "--device", "cpu", "--dtype", "float64"]
    assert start("reward", "one", *more).status == 0
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(Path(rl.__file__).parent)
    command = [sys.executable, runner, "reward", "--init-from", manners_run, "--out", tmp_path / "two", *more]
    command = [*map(str, command), "--ranks", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert common.read_log(tmp_path / "two")[0]["ranks"] == 2
    one, two = (gpt2.GPT2.from_pretrained(hub.find_checkpoint(tmp_path / out)) for out in ("one", "two"))
    np.testing.assert_allclose(one.flat_params, two.flat_params, atol=1e-6)
    losses = [[e["preference_loss"] for e in events(tmp_path / out, "step")] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
