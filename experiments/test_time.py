"""More answers instead of a larger model: what it is worth to choose one of N answers.

Needs runs/sft (make sft). 3 minutes on two cores.

The assistant answers stories of two and three steps 128 times each, and every N is a subset of these answers.
One of N is chosen by a majority vote, by mean log-probability, by a reward model (the assistant, trained on
which of its answers to other stories were right), or by a verifier, which knows the answer: that is pass@N.

What it found is in README.md.
"""

import itertools
from collections import Counter
from statistics import fmean

import numpy as np
from matplotlib import pyplot as plt

import common
import evaluate
import rl
import sample
from experiments import comparisons
from experiments.report import ALONE, draw_spread, make_parser, on_all_cores, print_table, save_figure
from experiments.updates import fit_reward
from extras import rlhf
from tasks.problems import problems, votes
from tokenizer import text_of

METHODS = "verifier (pass@N)", "reward model", "majority vote", "log-probability", "beam search"


def main(argv=None):
    flags = parser().parse_args(argv)
    size = dict(problems=16, n=128, train=48, fit=20, pairs=24, beams=16, repeats=50)
    if flags.quick:
        size = dict(problems=2, n=8, train=8, fit=1, pairs=4, beams=2, repeats=4)
    jobs = [(seed, flags.init_from, size) for seed in range(flags.seeds)]
    seeds = on_all_cores(measure, jobs, flags.quick)  # of each {method: [share of right answers for every N]}

    figure, axes = plt.subplots(figsize=(9, 4))
    counts, rows = powers_of_two(size["n"]), []
    for method in METHODS:
        columns = list(zip(*(seed[method] for seed in seeds)))  # for every N those of all seeds
        rows.append([method, *map(list, columns), *[""] * (len(counts) - len(columns))])
        draw_spread(axes, counts[: len(columns)], [seed[method] for seed in seeds], method)
    print_table(["N", *map(str, counts)], rows)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, counts)
    axes.set(xlabel="N: answers to choose from; of beam search the beams", ylabel="share of right answers")
    axes.legend()
    save_figure(figure, [axes], flags, "test_time")


def powers_of_two(most):
    return [2**i for i in range(most.bit_length())]


def measure(seed, init_from, size):
    """{method: [share of right answers for N = 1, 2, 4, ...]} for the problems and answers of this seed."""
    flags = rl.parser().parse_args(["--max-tokens", "96"])
    flags.seed, flags.attempts = seed, 8
    judge = rlhf.RewardModel(*sample.load_assistant(init_from, flags), test_groups=[])
    practised = stories("train", size["train"], seed)
    groups = rl.sample_rollouts(judge.model, judge.tokenizer, practised, flags, 1 << 32, ALONE)
    fit_reward(judge, comparisons.of_groups(groups), size["fit"], seed, size["pairs"])

    model, tokenizer = sample.load_assistant(init_from, flags)
    asked, flags.attempts = stories("test", size["problems"], seed), size["n"]
    groups = rl.sample_rollouts(model, tokenizer, asked, flags, 0, ALONE)  # n answers to each
    shares = np.array([choose(group, judge, size["repeats"], seed) for group in groups])  # (problems, 4, Ns)
    right = dict(zip(METHODS, shares.mean(axis=0).tolist()))
    right["beam search"] = []
    for n in powers_of_two(size["beams"]):
        found = []
        for problem in asked:
            best, *_ = sample.complete(model, tokenizer, [problem.prompt], True, n_beams=n, max_tokens=96)
            found.append(best.finish == "stop" and problem.verify(text_of(tokenizer.parts(best.ids))))
        right["beam search"].append(fmean(found))
    return right


def stories(split, n, seed):
    """n problems of two and three steps."""
    both = zip(*(problems("word", split, level, seed) for level in (2, 3)))
    return list(itertools.islice(itertools.chain.from_iterable(both), n))


def choose(group, judge, repeats, seed):
    """How often each method but beam search chooses a right one of N answers: [[share for every N], ...]."""
    right = np.array([one.correct for one in group])  # (n,)
    rewards = judge.values(group)  # (n,)
    logprobs = np.array([one.logprobs.sum() / one.sampled.sum() for one in group])  # (n,) means
    answers = np.full(len(group), -1)  # (n,) equal numbers for equal answers, -1 for a text without one
    for number, indices in enumerate(votes([text_of(one.parts) for one in group], group[0].problem.prompt)):
        answers[indices] = number
    rng, shares = np.random.default_rng(seed), []
    for n in powers_of_two(len(group)):
        found = []  # whether the reward model's, the vote's and the most probable answer are right
        for _ in range(repeats):
            some = rng.permutation(len(group))[:n]  # (N,)
            votes_for = Counter(number for number in answers[some].tolist() if number >= 0)
            elected = [
                number for number, _ in votes_for.most_common(1)
            ]  # of equals the first; none of no votes
            vote = right[answers == elected[0]][0] if elected else 0.0
            found.append([right[some[rewards[some].argmax()]], vote, right[some[logprobs[some].argmax()]]])
        shares.append([evaluate.pass_at_k(len(group), int(right.sum()), n), *np.mean(found, axis=0)])
    return np.transpose(shares)


def parser():
    return make_parser("test_time", __doc__, init_from="runs/sft")


if __name__ == "__main__":
    common.run(main)
