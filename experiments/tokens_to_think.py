"""Does a model need tokens to think? The same problems with the steps before the answer, and behind it.

Needs runs/factbook (make train). 9 minutes on two cores.

A model computes a fixed amount for each token. An answer that comes first must be found by one pass through
the layers; an answer that comes last can be read off the steps before it, each of which is easy. Both models
here begin as the same base model and learn from the same problems of one and two steps:

    steps first     So eats 6: 19 - 6 = 13, then sells 9: 13 - 9 = 4.    answer first    Answer: 4
                    Answer: 4                                                            So eats 6: ...

What it found is in README.md.
"""

import itertools

import matplotlib.pyplot as plt
import numpy as np

import common
import evaluate
import sft
from experiments import report
from tasks.conversations import turns
from tasks.problems import problems
from tokenizer import text_of

LEVELS, TESTED = (1, 2), (1, 2, 3)  # steps of the stories in training and in the test
ORDERS = ("steps first", "answer first")
PROBLEMS, ASKED, BATCH, LR = 8000, 100, 8, 3e-3  # BATCH and LR are those of `make sft`
QUICK = 24, 2


def main(argv=None):
    flags = parser().parse_args(argv)
    jobs = [(order, seed, flags.init_from, flags.quick) for order in ORDERS for seed in range(flags.seeds)]
    results = np.array(report.on_all_cores(train_and_ask, jobs, flags.quick))
    right = dict(zip(ORDERS, results.reshape(len(ORDERS), flags.seeds, len(TESTED))))  # (seeds, levels) each
    rows = []
    for i, level in enumerate(TESTED):
        rows.append([f"{level}", *(right[order][:, i].tolist() for order in ORDERS)])
    rows[-1][0] += ", more than in training"
    report.print_table(["steps", *(f"right, {order}" for order in ORDERS)], rows, ".0%")

    figure, axes = plt.subplots(figsize=(9, 3.4))
    for order in ORDERS:
        report.draw_spread(axes, TESTED, right[order], order)
    axes.axvline(max(LEVELS) + 0.5, color="0.6", linestyle=":", label="more steps than in training")
    axes.set(xlabel="steps that the story takes", ylabel="share of right answers", xticks=TESTED, ylim=(0, 1))
    axes.legend()
    report.save_figure(figure, [axes], flags, "tokens_to_think")


def train_and_ask(order, seed, base, quick):
    """Finetune the base model on solutions in this order; return the share of right answers by level."""
    n_problems, n_asked = QUICK if quick else (PROBLEMS, ASKED)
    model, tokenizer = report.load_base(base)
    groups = zip(*(stream(order, "train", level, seed) for level in LEVELS))
    taught = itertools.islice(groups, n_problems // len(LEVELS))
    conversations = [turns(problem.prompt, problem.solution) for group in taught for problem in group]
    rows, _ = sft.prepare(tokenizer, conversations, model.config.n_positions + 1)
    report.fit(model, batches(model, rows), len(rows) // BATCH, LR)

    shares = []
    for level in TESTED:
        asked = list(itertools.islice(stream(order, "test", level, seed), n_asked))
        replies = evaluate.ask(model, tokenizer, [turns(problem.prompt) for problem in asked])
        n_right = sum(problem.verify(text_of(reply)) for problem, reply in zip(asked, replies))
        shares.append(n_right / n_asked)
    return shares


def stream(order, split, level, seed):
    """Stories of a split and a level without end, the same for both orders."""
    for problem in problems("word", split, level, seed):
        yield problem.answer_first() if order == "answer first" else problem


def batches(model, rows):
    """Yield batches for report.fit(), of BATCH rows (tokens, mask) each; the loss is on the solutions."""
    for i in range(0, len(rows), BATCH):
        weighted = sft.weighted(rows[i : i + BATCH])
        yield list(sft.micro_batches(weighted, 8192, model.config.n_positions))


def parser():
    return report.make_parser("tokens_to_think", __doc__, init_from="runs/factbook")


if __name__ == "__main__":
    common.run(main)
