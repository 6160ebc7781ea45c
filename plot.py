"""Draw the loss and the learning rate of one or several runs, from their log.jsonl, to a PNG.

python plot.py runs/factbook runs/other --out loss.png
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import console
import runs


def parser():
    flags = console.Parser(prog="plot.py", description=__doc__)
    flags.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs")
    flags.add_argument("--out", metavar="PNG", help="where to; loss.png in the first run if not given")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1))
    for i, run in enumerate(flags.runs):
        events, name, color = runs.read_log(run), Path(run).name, f"C{i}"
        steps = [e for e in events if e["event"] == "step"]
        if not steps:
            raise console.UserError(f"{run} has no steps to draw yet")
        evals = [e for e in events if e["event"] == "eval"]
        x, losses = [e["step"] for e in steps], [e["loss"] for e in steps]
        top.plot(x, losses, color=color, alpha=0.4, linewidth=0.8, label=f"{name}, training")
        x_eval, eval_losses = [e["step"] for e in evals], [e["loss"] for e in evals]
        top.plot(x_eval, eval_losses, "o-", color=color, markersize=3, label=f"{name}, validation")
        bottom.plot(x, [e["lr"] for e in steps], color=color)
    top.set_ylabel("loss, nats a token")
    top.legend()
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    out = Path(flags.out or Path(flags.runs[0]) / "loss.png")
    figure.savefig(out, dpi=120)
    print(out)


if __name__ == "__main__":
    console.run(main)
