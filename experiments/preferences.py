"""A reward model of people's comparisons; a policy that fools it; what fooled it as a comparison; and again.

Needs runs/rlhf-manners (make rlhf). 8 minutes on two cores. --comparisons FILE takes comparisons of your
own, as comparisons.py describes them; without it true_score() of extras/rlhf.py compares worked solutions in
two manners, some of the losers with the wrong answer. In each round a new reward model learns all
comparisons, and the assistant of the beginning practises the prompts against it. The exploits, flawed
answers of the highest reward, join the comparisons and lose to both answers of the file. Only our own
prompts have a true score: with a FILE of others it is 0, and you read the exploits.

Found (three rounds, three seeds): there is always another exploit, as the lecture says. The true score goes
from 0.60 to 0.98, 0.94 and 0.99 in a round's 25 steps and back to 0.80, 0.87 and 0.77 (0.42 to 0.98); the
third reward model is fooled no later than the first. Its patches cost something: 98% of the held-out pairs
are in order in the first round, 91% in the third.
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

MEASURES = "held-out pairs in order", "true score at first", "best", "last"


def main(argv=None):
    flags = parser().parse_args(argv)
    size = dict(comparisons=400, rounds=3, fit=20, pairs=24, steps=25, prompts=8)
    if flags.quick:
        size = dict(comparisons=16, rounds=2, fit=1, pairs=4, steps=2, prompts=2)
    path = flags.comparisons or Path(flags.out or "runs/experiments") / "comparisons.jsonl"
    if flags.comparisons is None:
        comparisons.write_example(path, rlhf.questions(settings(0), "train", size["comparisons"]))
    comparisons.read(path)  # a bad line should show before the work
    jobs = [(seed, flags.init_from, path, size) for seed in range(flags.seeds)]
    seeds = on_all_cores(play_rounds, jobs, flags.quick)  # of each a list with a dict for every round

    figure, axes = plt.subplots(figsize=(9, 3.4))
    rows, steps = [], range(1, size["steps"] + 1)
    for number, results in enumerate(zip(*seeds), 1):  # those of a round
        common.say(f"round {number}, an exploit: {results[0]['exploit']!r}")
        rows.append([number, *([result[name] for result in results] for name in MEASURES)])
        draw_spread(axes, steps, [smoothed(result["scores"], 5) for result in results], f"round {number}")
    print_table(["round", *MEASURES], rows)
    axes.set(xlabel="step", ylabel="true score, mean of 5 steps")
    axes.legend()
    save_figure(figure, [axes], flags, "preferences")


def settings(seed):
    """The flags of rl.py, of which its functions read some."""
    flags = rl.parser().parse_args(["--task", "decimals", "--level", "1-2", "--max-tokens", "64", "--std"])
    flags.seed, flags.attempts, flags.batch_tokens = seed, 8, 8192
    return flags


def play_rounds(seed, init_from, path, size):
    """Rounds of a reward model, a policy, and its exploits as comparisons; a dict of measures for each."""
    flags, compared, results = settings(seed), comparisons.read(path), []
    random.Random(seed).shuffle(compared)
    held_out, compared = compared[: len(compared) // 8], compared[len(compared) // 8 :]
    of_file = {prompt: (winner, loser) for prompt, winner, loser in compared}
    ours = {problem.prompt: problem for problem in rlhf.questions(settings(0), "train", size["comparisons"])}
    problems = [ours.get(prompt, Problem("", prompt, "", answer="")) for prompt in of_file]
    for _ in range(size["rounds"]):
        judge = rlhf.RewardModel(*load_assistant(init_from, flags), test_groups=[])
        fit_reward(judge, comparisons.pairs(judge.tokenizer, compared), size["fit"], seed, size["pairs"])
        scores, exploits = practise(judge, problems, init_from, flags, size)
        in_order = comparisons.share_in_order(judge, comparisons.pairs(judge.tokenizer, held_out))
        result = dict(zip(MEASURES, (in_order, scores[0], max(scores), scores[-1])))
        results.append({**result, "scores": scores, "exploit": exploits and text_of(exploits[-1].parts)})
        for exploit in exploits:
            prompt, text = exploit.problem.prompt, text_of(exploit.parts)
            compared += [(prompt, better, text) for better in of_file[prompt]]
    return results


def practise(judge, problems, init_from, flags, size):
    """The policy gradient against a reward model: the true score at every step, and the exploits of the last
    five, of each group the flawed answer of the highest reward."""
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
            for group in groups:
                flawed = [rollout for rollout in group if rlhf.score_of(rollout) < 1]
                exploits += sorted(flawed, key=attrgetter("reward"))[-1:]
    return scores, sorted(exploits, key=attrgetter("reward"))


def parser():
    flags = make_parser("preferences", __doc__, init_from="runs/rlhf-manners")
    group = flags.add_argument_group("what people prefer")
    group.add_argument("--comparisons", metavar="FILE", help="a file; one of our own is written if not given")
    return flags


if __name__ == "__main__":
    common.run(main)
