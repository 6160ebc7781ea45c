"""RLHF held to its mathematics: gradients of orderings against finite differences in float64, true scores by
hand; then to its promises: preferences are learned, and a reward that is not the true one is abused."""

import itertools
import json
import math
import signal
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import script
from hypothesis import given
from hypothesis import strategies as st

import attempts
import batches
import common
import extras.rlhf as reward
import gpt2
import rl
import tasks.conversations as mixture
import tasks.problems as tasks
from tasks.conversations import read
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


def attempt(said, answer="a", ended=True, correct=None):
    """What somebody might have said."""
    problem, ids = Letter(answer), [*BYTES.encode(said), *[END] * ended]
    prompt = BYTES.prompt(mixture.turns(problem.prompt))
    correct = problem.verify(said) * ended if correct is None else correct
    drawn = np.arange(len(prompt) + len(ids)) >= len(prompt)
    parts = [{"type": "text", "text": said}]
    return attempts.Attempt(
        problem, ids, parts, np.array(prompt + ids, np.int32), drawn, np.zeros(len(drawn)), correct, correct
    )


def flags(what, *more):
    found = reward.parser().parse_args([what, *map(str, more)])
    for name, value in zip(("questions", "steps", "lr"), reward.STAGES[what][2:]):
        setattr(found, name, getattr(found, name) or value)
    return found


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
    problem = tasks.Problem("decimals", "4.7 or 2.9?", f"{STEPS}\nAnswer: 4.7", "4.7")
    one = attempt(text, correct=problem.verify(text))
    one.problem = problem
    assert reward.true_score(one) == pytest.approx(score)
    one.correct = 0.0  # cut off, for instance
    assert reward.true_score(one) == 0


def test_the_words_of_tools_do_not_count():
    one = attempt("", correct=1.0)
    one.parts = [dict(type="calc", text="please"), dict(type="output", text=" 1 2 3 4 5 6 7 8 9")]
    assert reward.true_score(one) == pytest.approx(2 / 3)
    one.problem = tasks.Problem("x", "?", [*one.parts, dict(type="text", text="6")], "6")
    one.parts = [dict(type="text", text="1 2 3 4 6")]
    assert reward.true_score(one) == pytest.approx(2 / 3)
    one.parts = [dict(type="text", text="1 2 3 4 5 6")]
    assert reward.true_score(one) == pytest.approx(1 / 3)


def test_manners_are_of_all_kinds_and_every_answer_is_right(tmp_path):
    path = tmp_path / "new" / "manners.jsonl"
    task = ("--task", "decimals,counting", "--level", "1-2", "--questions", 300, "--seed", 3)
    done = script.run(reward.main, "manners", "--out", path, *task)
    assert done.status == 0, done.err
    talks, skipped = read(path)
    problems = list(reward.questions(flags("manners", *task), "train", 300))
    assert len(talks) == 300 and not skipped
    scores, kinds = Counter(), Counter()
    for (question, said), problem in zip(talks, problems):
        assert question["content"] == problem.prompt
        text = text_of(said["content"])
        one = attempt("", correct=problem.verify(text))
        one.problem, one.parts = problem, said["content"]
        scores[round(3 * reward.true_score(one))] += 1
        opening = next(words for words in reversed(reward.OPENINGS) if text.startswith(words))
        kinds[opening, next(words for words in reversed(reward.CLOSINGS) if text.endswith(words))] += 1
        calls = [part for part in said["content"] if part["type"] != "text"]
        assert (problem.task == "counting") == bool(calls)
    assert scores[0] == 0 and min(scores[n] for n in (1, 2, 3)) > 20
    assert set(kinds) == set(itertools.product(reward.OPENINGS, reward.CLOSINGS))
    assert script.refused(script.run(reward.main, "manners", "--out", path), "exists", "--out")


# ------------------------------------------------------------------------------------------------------------
# Orderings


def test_three_answers_are_three_pairs():
    a, b, c, d = (attempt(text) for text in ("Gladly! a", "a", "1 2 3 4 5 a", "no"))
    assert reward.orderings([[b, a, c]]) == [(0, 2), (1, 0), (1, 2)]
    assert len(reward.orderings([[a, b, c, d]])) == 6
    assert reward.orderings([[a, a], [b, b, b]]) == []
    assert reward.orderings([[a, a], [b, d, b], [d, c]]) == [(2, 3), (4, 3), (6, 5)]


@given(st.lists(st.sampled_from(["Gladly! a", "a", "1 2 3 4 5 a", "no"]), min_size=1, max_size=8))
def test_pairs_are_all_that_differ_the_better_first(texts):
    some = [attempt(text) for text in texts]
    scores, pairs = [reward.true_score(one) for one in some], reward.orderings([some])
    ties = sum(n * (n - 1) // 2 for n in Counter(texts).values())
    assert len(pairs) == len(set(pairs)) == len(some) * (len(some) - 1) // 2 - ties
    assert all(scores[i] > scores[j] for i, j in pairs)


def test_preferred_by_hand():
    loss, pull, right = reward.preferred(np.zeros(3), [(0, 1), (0, 2)])
    assert loss == pytest.approx(math.log(2)) and right == 0  # a tie is no success
    np.testing.assert_allclose(pull, [0.5, -0.25, -0.25])
    loss, pull, right = reward.preferred(np.array([math.log(3), 0.0]), [(0, 1)])
    assert loss == pytest.approx(math.log(4 / 3)) and right == 1
    np.testing.assert_allclose(pull, [0.25, -0.25])
    loss, pull, right = reward.preferred(np.array([1000.0, 0.0, 2000.0]), [(0, 1), (0, 2)])
    assert loss == pytest.approx(500) and right == 0.5
    np.testing.assert_allclose(pull, [0.5, 0, -0.5])


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.data())
def test_the_pull_is_minus_the_derivative(values, data):
    n = len(values)
    pair = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda p: p[0] != p[1])
    pairs, values = data.draw(st.lists(pair, min_size=1, max_size=9)), np.array(values)
    pull = reward.preferred(values, pairs)[1]
    for i, e in enumerate(np.eye(n) * 1e-5):
        slope = (reward.preferred(values + e, pairs)[0] - reward.preferred(values - e, pairs)[0]) / 2e-5
        assert pull[i] == pytest.approx(-slope, abs=1e-8)


# ------------------------------------------------------------------------------------------------------------
# The reward model and DPO: gradients

TEXTS = ("Gladly! a", "a", "1 2 3 4 5 a", "no", "a", "b a")


def tiny(seed=3, dtype="float64"):
    model = gpt2.GPT2(CONFIG, dtype=dtype, seed=seed)
    model.flat_params *= 3  # far from symmetry, where mistakes could cancel
    return model


def groups_of_three():
    some = [attempt(text) for text in TEXTS]
    some[2].drawn[-5:-3] = False  # as if a tool had said it
    return [some[:3], some[3:]]


def log_probs(model, tokens):
    """(T, V): log p of every token after tokens[: t + 1], from the definition."""
    z = model.logits(np.array([tokens]))[0]
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def slope(model, objective, direction, eps=3e-6):
    begin, values = model.flat_params.copy(), []
    for sign in (1, -1):
        model.flat_params[:] = begin + sign * eps * direction
        values.append(objective())
    model.flat_params[:] = begin
    return (values[0] - values[1]) / (2 * eps)


def same_as_slopes(model, objective, gradient):
    rng = np.random.default_rng(0)
    for _ in range(4):
        direction = rng.normal(size=model.flat_params.shape) * (model.flat_params != 0)
        expected = slope(model, objective, direction)
        assert gradient @ direction == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert abs(expected) > 1e-4


def test_rewards_are_the_differences_of_two_logits_whatever_the_company():
    model = tiny()
    some = [attempt(text, ended=ended) for text, ended in itertools.product(TEXTS, (True, False))]
    found = reward.rewards(model, BYTES, some)
    for one, r in zip(some, found):
        tokens = one.tokens if one.tokens[-1] == END else [*one.tokens, END]
        last = log_probs(model, tokens)[-1]
        good, bad = (BYTES.encode_special(name) for name in ("<|output_start|>", "<|output_end|>"))
        assert r == pytest.approx(last[good] - last[bad], abs=1e-9)
        assert reward.rewards(model, BYTES, [one])[0] == pytest.approx(r, abs=1e-9)
    np.testing.assert_allclose(found[::2], found[1::2])  # what never ended is read as if it had
    assert len(set(found.round(9))) == 5


class Recorder:
    """Takes the place of the optimizer."""

    def __init__(self, model):
        self.model, self.lrs = model, []

    def step(self, lr, max_norm):
        self.lrs.append(lr)
        return 1.0


@pytest.fixture
def updates(monkeypatch):
    """updates(model, what, *flags): one update, with two groups; its gradient stays in the model."""

    def go(model, what, *more):
        groups = groups_of_three()
        monkeypatch.setattr(attempts, "sample", lambda *_: groups)
        monkeypatch.setattr(reward, "questions", lambda *_: iter([]))
        update, _ = reward.compare(flags(what, *more), model, BYTES, Recorder(model), [])
        return groups, update

    return go


def test_the_gradient_of_the_reward_model_is_that_of_the_pairwise_loss(updates):
    """InstructGPT, equation 1, with all pairs counting alike."""
    model = tiny()
    groups, update = updates(model, "train")
    some, pairs = [*groups[0], *groups[1]], [(0, 1), (0, 2), (1, 2), (4, 3), (4, 5), (5, 3)]
    pairs = [(i, j) for i, j in pairs if reward.true_score(some[i]) > reward.true_score(some[j])]
    assert len(pairs) == 5  # "a" and "b a" are as good

    def objective():
        r = [log_probs(model, one.tokens)[-1] for one in some]
        good, bad = (BYTES.encode_special(name) for name in (reward.GOOD, reward.BAD))
        r = [z[good] - z[bad] for z in r]
        return -sum(math.log(1 / (1 + math.exp(r[j] - r[i]))) for i, j in pairs) / len(pairs)

    assert update(0, 1e-3)["loss"] == pytest.approx(objective(), abs=1e-9)
    same_as_slopes(model, objective, model.flat_grads)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_gradient_of_dpo_is_that_of_its_equation(updates, beta):
    """Rafailov et al., equation 7."""
    model, reference = tiny(), tiny()
    groups, update = updates(model, "dpo", "--beta", beta)
    assert not groups[0][2].drawn[-4]  # said by a tool
    rng = np.random.default_rng(2)
    model.flat_params += 0.02 * rng.normal(size=model.flat_params.shape) * (model.flat_params != 0)
    some = [*groups[0], *groups[1]]
    pairs = [(0, 1), (0, 2), (1, 2), (4, 3), (5, 3)]

    def log_p(which, one):
        every = log_probs(which, one.tokens)
        return sum(every[t - 1, one.tokens[t]] for t in np.flatnonzero(one.drawn))

    def objective():
        h = [beta * (log_p(model, one) - log_p(reference, one)) for one in some]
        return -sum(math.log(1 / (1 + math.exp(h[j] - h[i]))) for i, j in pairs) / len(pairs)

    assert update(0, 1e-3)["loss"] == pytest.approx(objective(), abs=1e-9)
    assert abs(objective() - math.log(2)) > 1e-3
    same_as_slopes(model, objective, model.flat_grads)


def test_answers_that_are_all_as_good_are_left_out(monkeypatch):
    equal, different = [attempt("a"), attempt("a")], [attempt("a"), attempt("no")]
    drawn = iter([[equal] * 9 + [different], [different]])
    monkeypatch.setattr(attempts, "sample", lambda *_: next(drawn))
    monkeypatch.setattr(reward, "questions", lambda *_: iter([]))
    model, heard = tiny(), []
    real = reward.rewards
    monkeypatch.setattr(reward, "rewards", lambda *args: heard.append(args[2]) or real(*args))
    update, _ = reward.compare(flags("train", "--prompts", 4), model, BYTES, Recorder(model), [])
    update(0, 1e-3)
    assert heard == [different]


def test_before_dpo_nothing_is_preferred(updates):
    loss = updates(tiny(), "dpo")[1](0, 1e-3)["loss"]
    assert loss == pytest.approx(math.log(2), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------
# It learns

LETTERS = "abcdef"
SAID = ("{}", "Gladly! {}", "1 2 3 4 5 {}", "-")


def letters(name, split="train", level=None, seed=0):
    """In place of tasks.problems: a few letters, again and again."""
    if name not in ("letter", "dull"):
        raise reward.UserError(f"there is no task {name}")
    found = itertools.cycle(Letter(answer, level or 1, name) for answer in LETTERS)
    return map(Dull, "ab") if name == "dull" else found


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
        tokens, mask = BYTES.render(mixture.turns(f"{letter}?", said.format(letter)))
        rows.append((tokens, np.array(mask) / sum(mask) / 24))
    for step in range(200):
        batches.accumulate(model, rows, 2048)
        optimizer.step(1e-2 * (1 - step / 200))
    common.save_checkpoint(run, 7, model, BYTES, optimizer, 2, stage="sft")
    return run


SMALL = "--task letter --level 1 --prompts 8 --attempts 4 --eval-problems 12 --eval-every 10 --seed 5"


@pytest.fixture
def start(tmp_path, monkeypatch, manners_run):
    """start(what, out, *flags): a stage on letters."""
    monkeypatch.setattr(tasks, "problems", letters)
    monkeypatch.setattr(tasks, "TASKS", {"letter": (1, 2), "dull": (1,)})

    def go(what, out, *more):
        base = ["--init-from", manners_run, "--out", tmp_path / out, *SMALL.split()]
        return script.run(reward.main, what, *base, *more)

    return go


@pytest.fixture
def please(start, tmp_path, manners_run):
    """please(out, *flags): rl.py with a reward model, on letters."""
    small = "--task letter --level 1 --prompts 8 --attempts 4 --eval-problems 12 --seed 5 --lr 2e-3 --k 8"
    small += " --eval-every 4 --max-tokens 24 --save-every 10 --show-every 10 --reward model"
    base = ["--init-from", manners_run, *small.split()]
    return lambda out, *more: script.run(rl.main, *base, "--out", tmp_path / out, *more)


def events(run, kind):
    return [event for event in common.read_log(run) if event["event"] == kind]


def handmade(rng, n):
    """Groups of four answers, each of other letters: right or not, polite or not, short or long."""

    def one():
        text = "".join(rng.choice(list("abcdefgh"), 6))
        text = f"{text[:3]} Gladly! {text[3:]}" if rng.random() < 0.5 else text
        text += " 1 2 3 4 5 6" if rng.random() < 0.5 else ""
        return attempt(text + rng.choice([" x", " y"], p=[0.7, 0.3]), "x")

    return [[one() for _ in range(4)] for _ in range(n)]


def test_a_reward_model_learns_a_preference_also_for_what_it_has_not_seen(monkeypatch):
    rng = np.random.default_rng(4)
    drawn = iter([handmade(rng, 100), handmade(rng, 40)])  # to learn from, and held out
    monkeypatch.setattr(attempts, "sample", lambda *_: next(drawn))
    monkeypatch.setattr(reward, "questions", lambda *_: iter([]))
    model = gpt2.GPT2(CONFIG, seed=3)
    update, examine = reward.compare(flags("train"), model, BYTES, gpt2.AdamW(model, weight_decay=0), [])
    before = examine()
    for step in range(40):
        after = update(step, 5e-3)
    assert before["accuracy"] < 0.7 and before["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert examine()["accuracy"] > 0.9 and examine()["loss"] < 0.3 and after["loss"] < 0.3


def test_train_makes_a_reward_model_of_the_assistants_own_answers(start, tmp_path):
    done = start("train", "judge", "--questions", 80, "--steps", 60, "--lr", 3e-3)
    assert done.status == 0, done.err
    evals = events(tmp_path / "judge", "eval")
    assert [e["step"] for e in evals] == [*range(0, 61, 10)]
    assert evals[0]["accuracy"] < 0.8 and max(e["accuracy"] for e in evals) > 0.9
    model, tokenizer = attempts.load(tmp_path / "judge" / "best", flags("train"))
    r = reward.rewards(model, tokenizer, [attempt(said.format("b"), "b") for said in SAID])
    assert r[1] > r[0] > r[2] > r[3]
    shown = [line for line in done.err.splitlines() if line[:2] in ("0.", "1.")][:4]
    assert [line[:4] for line in shown] == sorted((line[:4] for line in shown), reverse=True)
    assert {line[:4] for line in shown} <= {"1.00", "0.67", "0.33", "0.00"} and len(shown) == 4


def test_dpo_makes_the_assistant_better(start, tmp_path):
    done = start("dpo", "dpo", "--questions", 40, "--steps", 20, "--lr", 5e-4)
    assert done.status == 0, done.err
    evals, steps = events(tmp_path / "dpo", "eval"), events(tmp_path / "dpo", "step")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert evals[-1]["score"] > evals[0]["score"] + 0.1
    assert "reward" not in evals[0]


def test_it_pleases_the_reward_model_and_the_truly_best_is_kept(please, tmp_path, monkeypatch, manners_run):
    """A judge who likes politeness, and the wrong answer more: the true score rises, then falls."""

    def fooled(model, tokenizer, some):
        liked = {"Gladly! ": 1.0, "-": 3.0}
        return np.array([sum(r for text, r in liked.items() if text in text_of(a.parts)) for a in some])

    monkeypatch.setattr(reward, "rewards", fooled)
    more = ("--reward-model", manners_run, "--steps", 40, "--eval-every", 4)
    done = please("rlhf", *more)
    assert done.status == 0, done.err
    run = tmp_path / "rlhf"
    steps, evals = events(run, "step"), events(run, "eval")
    assert len(steps) == 40 and [e["step"] for e in evals] == [*range(0, 41, 4)]
    assert all(0 <= e["score"] <= 1 and e["reward"] != e["correct"] for e in steps[:5])
    assert evals[0]["reward"] < 2 and evals[-1]["reward"] > 2.8
    assert evals[0]["score"] > 0.2 and evals[-1]["score"] < 0.1
    best = max(evals, key=lambda e: e["score"])
    [checkpoint] = common.checkpoints(run / "best")
    assert checkpoint.name == f"step_{best['step']:06d}" and f"{run / 'best'} has the highest" in done.err
    assert [place.name for place in common.checkpoints(run)] == ["step_000030", "step_000040"]
    assert common.read_state(checkpoint)["flags"]["reward"] == "model"
    assert (
        "true score 0." in done.err and " 3.00 -" in done.out
    )  # a step's line, and an attempt with its reward
    assert please("held", *more, "--kl", 30).status == 0
    held = events(tmp_path / "held", "eval")[-1]
    assert held["reward"] < evals[-1]["reward"] - 0.5 and held["score"] > evals[-1]["score"]
    asked = (
        "--eval",
        run / "best",
        "--seed",
        5,
        "--reward",
        "model",
        "--reward-model",
        manners_run,
        "--json",
    )
    done = script.run(
        rl.main, *asked, "--task", "letter", "--level", 1, "--eval-problems", 12, "--max-tokens", 24
    )
    [found] = json.loads(done.out)["results"]  # with the run's own seed, the same problems
    assert found["score"] == pytest.approx(best["score"]) and found["reward"] == pytest.approx(best["reward"])


def test_the_whole_of_it_twice_is_the_same(start, please, tmp_path):
    for n in "ab":
        judge = tmp_path / f"judge-{n}"
        assert start("train", judge, "--questions", 8, "--steps", 10).status == 0
        assert (done := please(f"rlhf-{n}", "--reward-model", judge, "--steps", 5)).status == 0, done.err
    a, b = (common.newest_checkpoint(tmp_path / f"rlhf-{n}") / "model.safetensors" for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    logs = [events(tmp_path / f"rlhf-{n}", "eval") for n in "ab"]
    assert logs[0] == logs[1] and [e["step"] for e in logs[0]] == [0, 4, 5]
    assert logs[0][0]["reward"] != logs[0][-1]["reward"]


def test_a_resumed_run_keeps_the_best_of_both_parts(please, tmp_path, monkeypatch, manners_run):
    """First wrong answers are liked, then right ones."""
    liked = lambda sign: lambda model, tokenizer, some: np.array([sign * a.correct for a in some])
    more = ("--reward-model", manners_run, "--eval-every", 2, "--lr", 5e-4)
    monkeypatch.setattr(reward, "rewards", liked(-1))
    assert please("run", *more, "--steps", 4).status == 0
    [first] = common.checkpoints(tmp_path / "run" / "best")
    monkeypatch.setattr(reward, "rewards", liked(1))
    assert script.run(rl.main, "--out", tmp_path / "run", "--resume", "--steps", 40, "--lr", 2e-3).status == 0
    evals, [last] = events(tmp_path / "run", "eval"), common.checkpoints(tmp_path / "run" / "best")
    scores = {e["step"]: e["score"] for e in evals}
    assert scores[4] < scores[0] < scores[40] and first.name == "step_000000"
    assert last.name == f"step_{max(scores, key=scores.get):06d}"


# ------------------------------------------------------------------------------------------------------------
# Errors


def test_what_cannot_be(start, please, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert script.refused(start("train", "there"), "there exists", "--out")
    assert script.refused(start("train", "new", "--attempts", 1), "--attempts", "at least 2")
    assert script.refused(start("train", "new", "--task", "none"), "no task none")
    done = start("dpo", "new", "--task", "dull")
    done.err = done.err.partition("\n")[2]  # the first line says what is asked
    assert script.refused(done, "no answer is better", "--task")
    assert script.refused(please("new", "--reward-model", tmp_path / "nothing"), "nothing is no checkpoint")
    assert script.refused(start("dpo", "new", "--init-from", tmp_path / "no"), "no is no checkpoint")
    assert script.refused(script.run(reward.main), "what")
    assert script.refused(script.run(reward.main, "guess"), "guess", "manners")
    assert not (tmp_path / "new").exists()
    other, tokenizer = tmp_path / "other", Tokenizer.train(["some text, some more text"], 270)
    model = gpt2.GPT2(gpt2.GPT2Config(1, 2, 32, 64, tokenizer.vocab_size))
    common.save_checkpoint(other, 1, model, tokenizer, gpt2.AdamW(model), 1, stage="train")
    assert script.refused(please("new", "--reward-model", other), "vocabulary", "other")
    assert not (tmp_path / "new").exists()


def test_ctrl_c_ends_it_and_says_so(start, tmp_path, monkeypatch):
    """Half a reward model should not be taken for a whole one: there is no checkpoint but the best."""
    real, calls = batches.accumulate, []

    def pressed(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(batches, "accumulate", pressed)
    before = signal.getsignal(signal.SIGINT)
    try:
        done = start("train", "cut", "--questions", 8, "--steps", 30)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.status == 130 and "stopped after step 3; delete" in done.err
    assert [e["step"] for e in events(tmp_path / "cut", "step")] == [1, 2, 3]
    assert not common.checkpoints(tmp_path / "cut") and common.checkpoints(tmp_path / "cut" / "best")


def test_the_log_is_json_and_has_the_flags(start, tmp_path):
    assert start("train", "run", "--questions", 8, "--steps", 2).status == 0
    first, *rest = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert first["stage"] == "train" and first["flags"]["lr"] == 1e-3 and first["flags"]["prompts"] == 8
    assert [e["event"] for e in rest] == ["eval", "step", "step", "eval"]
    assert rest[1]["norm"] > 0 and 0 <= rest[1]["accuracy"] <= 1
