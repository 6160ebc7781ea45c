"""Every experiment runs in small: it prints a table, with the spread over seeds, and draws one figure."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import script
from test_cli import ROOT, SCRIPTS, module, options

import common
import sft
from experiments import collapse, report, scaling_law, test_time
from gpt2 import GPT2, AdamW, GPT2Config
from kernels.sampling import filtered_probabilities
from tasks.conversations import turns
from tasks.problems import problems
from tokenizer import Tokenizer

EXPERIMENTS = [name for name in SCRIPTS if name.startswith("experiments.")]


@pytest.fixture(scope="module")
def assistant(tmp_path_factory):
    """A run of sft.py that has learned to say a number, now and then the right one."""
    tokenizer = Tokenizer.bytes()
    model = GPT2(GPT2Config(1, 2, 32, 256, tokenizer.vocab_size))
    stories = problems("word", level=2)
    taught = [turns(next(stories).prompt, f"Answer: {i % 12 + 1}") for i in range(1280)]
    rows, _ = sft.prepare(tokenizer, taught, longest=257)
    batches = (list(sft.micro_batches(sft.weighted(rows[i::160]), 4096, 256)) for i in range(160))
    report.fit(model, batches, 160, lr=2e-2)
    run = tmp_path_factory.mktemp("assistant")
    common.save_checkpoint(run, 1, model, tokenizer, AdamW(model), keep=1, stage="sft", flags={})
    return run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_prints_a_table_and_draws_a_figure(name, assistant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what make train has made is not here, and the test sees what is left here
    has_model = any(action.dest == "init_from" for action in options(name))
    model = ["--init-from", assistant] if has_model else []
    done = script.run(module(name).main, "--quick", "--seeds", 2, "--out", "figures", *model)
    assert done.status == 0, done.err
    assert re.search(r"^\| -+ \|", done.out, re.M), "no table"
    assert "nan" not in done.out
    figure = tmp_path / "figures" / f"{name.removeprefix('experiments.')}.png"
    assert figure.stat().st_size > 5_000 and f"figures/{figure.name}" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]
    assert "with 2 seeds" in done.err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_short_and_its_figure_is_small(name):
    short = name.removeprefix("experiments.")
    assert len((ROOT / "experiments" / f"{short}.py").read_text().splitlines()) <= 120
    assert (ROOT / "figures" / "experiments" / f"{short}.png").stat().st_size < 100_000
    assert re.search(r"\d minutes on two cores", module(name).__doc__), "how long does it take?"


def test_the_scaling_law_is_found_where_losses_follow_one():
    N, D = np.repeat([2e4, 4e4, 8e4, 2e5], 4), np.tile([1e5, 3e5, 1e6, 3e6], 4)  # (16,) each
    law = 1.7, 40.0, 900.0, 0.3, 0.5
    L = scaling_law.loss_of(law, N, D)
    assert np.allclose(scaling_law.fit_law(N, D, L), law, rtol=1e-6)
    L[3] *= 1.5  # one run that went wrong counts for little
    assert np.allclose(scaling_law.fit_law(N, D, L), law, rtol=1e-3)


def test_no_constant_of_the_scaling_law_is_negative():
    N, D = np.repeat([2e4, 8e4, 2e5], 3), np.tile([1e5, 3e5, 1e6], 3)  # (9,) each
    E, A, B, *exponents = scaling_law.fit_law(N, D, 3 - 1e4 / N)  # rises with N, and does not know D
    assert min(E, A, B, *exponents) >= 0 and abs(E + B * 3e5 ** -exponents[1] - 2.8) < 0.3


def test_a_text_without_an_answer_has_no_vote():
    problem = next(problems("word", level=1))
    texts = ["Well.", "Who knows?", f"Answer: {problem.answer}", "No idea."]
    group = [
        SimpleNamespace(
            problem=problem,
            parts=[{"type": "text", "text": text}],
            correct=problem.verify(text),
            logprobs=np.array([-float(i)]),
            sampled=np.array([1]),
        )
        for i, text in enumerate(texts)
    ]
    judge = SimpleNamespace(values=lambda rollouts: np.array([one.correct for one in rollouts]))
    verifier, reward, vote, likeliest = test_time.choose(group, judge, repeats=20, seed=0)  # for N = 1, 2, 4
    assert verifier[-1] == reward[-1] == vote[-1] == 1 and likeliest[-1] == 0
    assert 0 < vote[0] < 1  # one answer, mostly none
    silent = [one for one in group if not one.correct]
    assert not test_time.choose(silent, judge, repeats=2, seed=0)[2].any()


def test_soft_targets_are_the_teachers_distribution():
    teacher = GPT2(GPT2Config(1, 1, 8, collapse.T, vocab_size=12))
    teacher.set("wte.weight", np.random.default_rng(0).standard_normal((12, 8)))  # far from uniform
    rng = np.random.default_rng(1)
    corpus = rng.integers(0, 12, (3, collapse.T + 1))
    [(tokens, _)] = next(collapse.hard_targets(corpus, rng))
    shares, repeats = np.zeros((12, *tokens.shape)), 200  # (V, B, T)
    batches = collapse.soft_targets(itertools.repeat([(tokens, None)]), teacher, rng)
    for batch in itertools.islice(batches, repeats):
        assert np.allclose(sum(weights for _, _, weights in batch), 1 / tokens.size)
        for _, targets, weights in batch:
            np.add.at(shares, (targets, *np.indices(tokens.shape)), weights / repeats)
    expected = filtered_probabilities(teacher.logits(tokens).reshape(-1, 12)).T.reshape(shares.shape)
    assert np.abs(shares * tokens.size - expected).max() < 0.1
