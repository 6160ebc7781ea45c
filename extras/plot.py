"""Draw one or several runs, from their log.jsonl, to a PNG: losses, or what rl.py got right.

python -m extras.plot runs/factbook runs/other --out both.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import common


def parser():
    flags = common.Parser(prog="python -m extras.plot", description=__doc__)
    flags.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    flags.add_argument("--out", metavar="PNG", help="where to; plot.png in the first run if not given")
    return flags


def curves(events):
    """What a run has to draw: above [(name, steps, values), ...] and a title, below (steps, values), a title.

    Pretraining and finetuning: losses, and the learning rate below. Practice: the share of right answers, and
    their length below. Against a reward model: the true score, and what the reward model says below.
    """
    steps, evals = ([e for e in events if e["event"] == kind] for kind in ("step", "eval"))
    above, below = ("correct", "length") if steps and "correct" in steps[0] else ("loss", "lr")
    if evals and "score" in evals[0]:
        above, below = "score", "reward"
    pick = lambda some, name: ([e["step"] for e in some if name in e], [e[name] for e in some if name in e])
    lines = [("training", *pick(steps, above)), ("held out", *pick(evals, above))]
    titles = dict(correct="share of right answers", loss="loss, nats a token", score="true score")
    titles |= dict(length="tokens in an answer", lr="learning rate", reward="reward model's score")
    return lines, titles[above], pick(steps, below), titles[below]


def main(argv=None):
    flags = parser().parse_args(argv)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1))
    for i, run in enumerate(flags.runs):
        (training, held_out), above, (x, y), below = curves(common.read_log(run))
        if not (training[1] or held_out[1] or x):
            raise common.UserError(f"{run} has no steps to draw yet")
        name, color = Path(run).name, f"C{i}"
        top.plot(*training[1:], color=color, alpha=0.4, linewidth=0.8, label=f"{name}, {training[0]}")
        top.plot(*held_out[1:], "o-", color=color, markersize=3, label=f"{name}, {held_out[0]}")
        bottom.plot(x, y, color=color)
    top.set_ylabel(above)
    top.legend()
    bottom.set_ylabel(below)
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    out = Path(flags.out or Path(flags.runs[0]) / "plot.png")
    figure.savefig(out, dpi=120)
    print(out)


if __name__ == "__main__":
    common.run(main)
