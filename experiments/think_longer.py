"""Does a model learn to think longer? Practice without a calculator, with room for long answers.

Needs runs/sft (make sft). 2 minutes on two cores.

In the lecture's figure, from DeepSeek-R1, accuracy and the length of the answers grow together: the model
finds out that checking and trying again help. Here the assistant practises sums and stories, whose steps it
has learned to write down. A call of the calculator is answered by an error, and an answer may be 160 tokens
long, four times what a worked solution takes. The loop is rl.py's in a few lines, to be changed.

What it found is in README.md.
"""

import numpy as np
from matplotlib import pyplot as plt

import common
import gpt2
import rl
from experiments.report import ALONE, draw_spread, make_parser, on_all_cores, print_table, save_figure
from experiments.updates import learn
from sample import load_assistant

MEASURES = "right", "tokens", "tokens of right answers", "tokens of wrong answers", "cut off", "calls"


def main(argv=None):
    flags = parser().parse_args(argv)
    size = dict(steps=4, prompts=2, window=2) if flags.quick else dict(steps=100, prompts=8, window=10)
    jobs = [(seed, flags.init_from, size) for seed in range(flags.seeds)]
    seeds = on_all_cores(practise, jobs, flags.quick)  # of each {measure: [a mean for every window]}

    rows = [[name, *([seed[name][i] for seed in seeds] for i in (0, -1))] for name in MEASURES]
    print_table(["", f"first {size['window']} steps", f"last {size['window']} steps"], rows)
    rows = [[number, *(f"{seed[name][-1]:.2f}" for name in MEASURES)] for number, seed in enumerate(seeds)]
    print_table(["last steps of seed", *MEASURES], rows)
    steps = range(size["window"], size["steps"] + 1, size["window"])
    figure, all_axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, name in zip(all_axes, MEASURES):
        draw_spread(axes, steps, [seed[name] for seed in seeds], name)
        axes.set_xlabel("step")
        axes.set_ylabel({"right": "share of right answers", "tokens": "tokens in an answer"}[name])
        axes.set_ylim(bottom=0)
    save_figure(figure, all_axes, flags, "think_longer")


def practise(seed, init_from, size):
    """Reinforcement learning without tools: {measure: [its mean in every window of steps]}."""
    flags = rl.parser().parse_args(["--task", "word,arithmetic", "--level", "1-2", "--max-tokens", "160"])
    flags.seed, flags.attempts, flags.batch_tokens = seed, 8, 8192
    model, tokenizer = load_assistant(init_from, flags)
    stream = rl.ProblemStream(flags, model, tokenizer)
    optimizer = gpt2.AdamW(model, weight_decay=0.0)
    measures, rollouts = {name: [] for name in MEASURES}, []  # rollouts: those of the window
    for step in range(size["steps"]):
        asked = stream.take(size["prompts"])
        groups = rl.sample_rollouts(model, tokenizer, asked, flags, step << 32, ALONE, tools={})
        for rollout in rl.flat(groups):
            rollout.reward = rollout.correct
        learn(model, optimizer, groups, flags, lr=3e-4)
        rollouts += rl.flat(groups)
        if (step + 1) % size["window"] == 0:
            for name, value in zip(MEASURES, measure(rollouts), strict=True):
                measures[name].append(value)
            rollouts = []
    return measures


def measure(rollouts):
    """MEASURES of some rollouts, all of them means: 0 is the mean length of no answers."""
    right = np.array([rollout.correct > 0 for rollout in rollouts])  # (N,)
    length = np.array([rollout.length for rollout in rollouts])  # (N,)
    lengths = [float(length[these].mean()) if these.any() else 0.0 for these in (right, ~right)]
    cut_off = [not rollout.finished for rollout in rollouts]
    called = [any(part["type"] == "calc" for part in rollout.parts) for rollout in rollouts]
    return [
        float(right.mean()),
        float(length.mean()),
        *lengths,
        float(np.mean(cut_off)),
        float(np.mean(called)),
    ]


def parser():
    return make_parser("think_longer", __doc__, init_from="runs/sft")


if __name__ == "__main__":
    common.run(main)
