"""A reward model of people's comparisons; a policy that fools it; what fooled it as a comparison; and again.

Needs runs/rlhf-manners (make rlhf). 5 minutes on two cores. --comparisons FILE takes comparisons of your
own, as comparisons.py describes them; without it true_score() of extras/rlhf.py compares worked solutions in
two manners, six of ten losers with the wrong answer. In each round a new reward model learns all comparisons,
and the assistant of the beginning practises the prompts against it. An exploit is an answer that the reward
model prefers to the winner of the file, though it is wrong. It becomes a comparison, as the loser.
In a FILE with other prompts all answers count as wrong, there is no true score, and you read the exploits.

What it found is in README.md.
"""

import random
from operator import attrgetter
from pathlib import Path
from statistics import fmean

from matplotlib import pyplot as plt

import common
import gpt2
import rl
from experiments import comparisons
from experiments.report import ALONE, draw_spread, make_parser, on_all_cores, print_table, save_figure
from experiments.updates import fit_reward, learn
from extras import rlhf
from extras.plot import smoothed
from sample import load_assistant
from tasks.problems import Problem
from tokenizer import text_of

MEASURES = "pairwise accuracy", "true score at first", "best", "last", "exploits"


def main(argv=None):
    flags = parser().parse_args(argv)
    size = dict(comparisons=400, rounds=3, fit=20, pairs=24, steps=25, prompts=8)
    if flags.quick:
        size = dict(comparisons=24, rounds=2, fit=1, pairs=4, steps=2, prompts=2)
    path = flags.comparisons or Path(flags.out or "runs/experiments") / "comparisons.jsonl"
    if flags.comparisons is None:
        comparisons.write_example(path, rlhf.questions(settings(0), "train", size["comparisons"]))
    model, tokenizer = load_assistant(flags.init_from, settings(0))
    room = model.config.n_positions - 1  # without the token of the reward
    compared = comparisons.read(path, tokenizer, room)  # a bad line shows before the work
    jobs = [(seed, flags.init_from, compared, size) for seed in range(flags.seeds)]
    seeds = on_all_cores(play_rounds, jobs, flags.quick)  # of each a list with a dict for every round

    figure, axes = plt.subplots(figsize=(9, 3.4))
    rows, steps = [], range(1, size["steps"] + 1)
    for number, results in enumerate(zip(*seeds), 1):  # those of a round
        common.say(f"round {number}, an exploit: {results[0]['exploit']!r}")
        rows.append([number, *([result[name] for result in results] for name in MEASURES)])
        draw_spread(axes, steps, [result["scores"] for result in results], f"round {number}")
    print_table(["round", *MEASURES], rows)
    axes.set(xlabel="step", ylabel="true score, mean of 5 steps")
    axes.legend()
    save_figure(figure, [axes], flags, "preferences")


def settings(seed):
    """Flags of rl.py, for its functions."""
    flags = rl.parser().parse_args(["--task", "decimals", "--level", "1-2", "--max-tokens", "64", "--std"])
    flags.seed, flags.attempts, flags.batch_tokens = seed, 8, 8192
    return flags


def play_rounds(seed, init_from, compared, size):
    """Rounds of a reward model, a policy, and its exploits as comparisons; a dict of measures for each."""
    flags, results = settings(seed), []
    ours = {problem.prompt: problem for problem in rlhf.questions(settings(0), "train", size["comparisons"])}
    keys = {prompt: problem.key for prompt, problem in ours.items()}  # what is asked, in whichever words
    compared, held_out = comparisons.split(compared, keys, seed)
    winners, n_at_first = {prompt: winner for prompt, winner, _ in compared}, len(compared)
    asked = [ours.get(prompt) or Problem("", prompt, "", answer="") for prompt in winners]
    for _ in range(size["rounds"]):
        judge = rlhf.RewardModel(*load_assistant(init_from, flags), test_groups=[])
        pairs, n_updates = comparisons.pairs(judge.tokenizer, compared), size["fit"] * len(compared)
        fit_reward(judge, pairs, n_updates // n_at_first, seed, size["pairs"])
        scores, exploits = practise(judge, asked, winners, init_from, flags, size)
        accuracy = comparisons.pairwise_accuracy(judge, comparisons.pairs(judge.tokenizer, held_out))
        means = smoothed(scores, 5)
        result = dict(zip(MEASURES, (accuracy, scores[0], max(means), means[-1], len(exploits))))
        results.append({**result, "scores": means, "exploit": exploits and text_of(exploits[-1].parts)})
        for exploit in exploits:
            prompt = exploit.problem.prompt
            compared.append((prompt, winners[prompt], text_of(exploit.parts)))
    return results


def practise(judge, problems, winners, init_from, flags, size):
    """The policy gradient against a reward model: the true score at every step, and the exploits of the last
    five, by their reward."""
    model, tokenizer = load_assistant(init_from, flags)
    optimizer, scores, exploits = gpt2.AdamW(model, weight_decay=0.0), [], []
    for step in range(size["steps"]):
        some = random.Random(f"{flags.seed} {step}").choices(problems, k=size["prompts"])
        groups = rl.sample_rollouts(model, tokenizer, some, flags, step << 32, ALONE)
        rollouts = rl.flat(groups)
        for rollout, reward in zip(rollouts, judge.values(rollouts)):
            rollout.reward = float(reward)
        scores.append(fmean(rlhf.score_of(rollout) for rollout in rollouts))
        learn(model, optimizer, groups, flags, lr=3e-4)
        if step >= size["steps"] - 5:
            exploits += comparisons.exploits(judge, tokenizer, groups, winners)
    return scores, sorted(exploits, key=attrgetter("reward"))


def parser():
    flags = make_parser("preferences", __doc__, init_from="runs/rlhf-manners")
    group = flags.add_argument_group("what people prefer")
    group.add_argument("--comparisons", metavar="FILE", help="a file; one of our own is written if not given")
    return flags


if __name__ == "__main__":
    common.run(main)
