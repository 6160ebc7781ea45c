"""Draw runs from their log.jsonl, and the figures of the README.

python -m extras.plot runs/factbook runs/other --out both.png     losses, or what rl.py got right
python -m extras.plot --figures figures                           all figures of the README, from runs/ and
                                                                  kernels/RESULTS.md
"""

import re
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import common
import hub
from common import UserError
from tokenizer import Tokenizer, visible

RESULTS = Path(__file__).parents[1] / "kernels" / "RESULTS.md"


def main(argv=None):
    flags = parser().parse_args(argv)
    if bool(flags.figures) == bool(flags.runs):
        raise UserError("name runs to draw, or give --figures DIR")
    if flags.figures:
        draw_figures(Path(flags.figures))
    else:
        draw_runs(flags.runs, Path(flags.out or Path(flags.runs[0]) / "plot.png"))


# ------------------------------------------------------------------------------------------------------------
# Curves of runs


def draw_runs(runs, out):
    """One or several runs over each other: the main curve above, a second one below."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1))
    for i, run in enumerate(runs):
        events, name, color = common.read_log(run), Path(run).name, f"C{i}"
        above, below = curves_of(events)
        training, held_out = points(events, "step", above), points(events, "eval", above)
        second = points(events, "step", below)
        if not (training[0] or held_out[0] or second[0]):
            raise UserError(f"{run} has no steps to draw yet")
        top.plot(*training, color=color, alpha=0.4, linewidth=0.8, label=f"{name}, training")
        top.plot(*held_out, "o-", color=color, markersize=3, label=f"{name}, held out")
        bottom.plot(*second, color=color)
        top.set_ylabel(TITLES[above])
        bottom.set_ylabel(TITLES[below])
    top.legend()
    bottom.set_xlabel("step")
    save(figure, (top, bottom), out)


TITLES = {
    "correct": "share of right answers",
    "loss": "loss, nats per token",
    "score": "true score",
    "length": "tokens in an answer",
    "lr": "learning rate",
    "reward": "reward",
}


def curves_of(events):
    """Which measures of a run are drawn, above and below: of rlhf.py, of rl.py, of training with a loss."""
    evals = [event for event in events if event["event"] == "eval"]
    steps = [event for event in events if event["event"] == "step"]
    if evals and "score" in evals[0]:
        return "score", "reward"
    if steps and "correct" in steps[0]:
        return "correct", "length"
    return "loss", "lr"


def points(events, kind, name):
    """(steps, values) of a measure in the events of a kind."""
    found = [event for event in events if event["event"] == kind and event.get(name) is not None]
    return [event["step"] for event in found], [event[name] for event in found]


def smoothed(values, window=10):
    """The mean of each value and those before it, of at most `window` values."""
    blocks = (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))
    return [sum(block) / len(block) for block in blocks]


def save(figure, all_axes, out):
    """write(), and print where the figure is."""
    write(figure, all_axes, out)
    print(out)


def write(figure, all_axes, out):
    """Write a figure to the file `out`, with a grid behind its axes."""
    for axes in all_axes:
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------
# The figures of the README


def draw_figures(directory):
    """Draw all of them. What make train, sft, rl and rlhf write must be there."""
    runs = Path("runs")
    draw_pretraining(runs / "factbook", directory / "pretraining.png")
    draw_conversation(runs / "sft", directory / "conversation.png")
    draw_rl(runs / "rl", directory / "rl.png")
    draw_rlhf(runs / "rlhf", directory / "rlhf.png")
    draw_matmul(directory / "matmul.png")
    draw_step(directory / "step.png")


def draw_pretraining(run, out):
    """The loss, and what the model writes at three points of its training."""
    events = common.read_log(run)
    figure, (axes, below) = plt.subplots(2, 1, figsize=(9, 5), height_ratios=(3, 1))
    axes.plot(*points(events, "step", "loss"), color="C0", alpha=0.3, linewidth=0.5, label="training")
    axes.plot(*points(events, "eval", "loss"), "-", color="C0", label="held-out documents")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
    flags = next(event["flags"] for event in events if event["event"] == "start")
    rows = f"from here rows of {flags['seq_len']} tokens, not {flags['short_len']}"
    axes.text(flags["short_part"] * flags["steps"], 4.3, rows, fontsize=9)
    samples = [event for event in events if event["event"] == "sample"]
    shown = [samples[0], samples[len(samples) // 10 - 1], samples[-1]]
    lines = []
    for event in shown:
        axes.axvline(event["step"], color="0.6", linewidth=0.8, linestyle=":")
        text = " ".join(event["text"].split()).replace("$", r"\$")
        lines += [*textwrap.wrap(f"step {event['step']}:  {text}", 118)[:3], ""]
    below.text(0, 1, "\n".join(lines), va="top", family="monospace", fontsize=7.5)
    below.axis("off")
    save(figure, [axes], out)


def draw_conversation(run, out):
    """A conversation as the model reads it: one box for each token, green where the loss counts."""
    tokenizer = Tokenizer.load(hub.find_checkpoint(run))
    call = [
        {"type": "calc", "text": " 23 * 47"},
        {"type": "output", "text": " 1081"},
        {"type": "text", "text": "It is 1081."},
    ]
    turns = [{"role": "user", "content": "What is 23 * 47?"}, {"role": "assistant", "content": call}]
    tokens, mask = tokenizer.render(turns)
    figure, axes = plt.subplots(figsize=(9, 1.9))
    x, y, width_of_letter = 0.0, 0.0, 0.0105
    for token, is_target in zip(tokens, mask):
        text = visible(tokenizer.token_bytes(token)).replace(" ", "·")
        width = width_of_letter * (len(text) + 1.2) * (0.92 if len(text) > 8 else 1)
        if x + width > 1:
            x, y = 0.0, y - 1.0
        color = "#b7e1b0" if is_target else "#dddddd"
        box = {"boxstyle": "square,pad=0.25", "facecolor": color, "edgecolor": "white"}
        axes.text(x, y, text, family="monospace", fontsize=9, bbox=box, va="center")
        x += width
    axes.set_xlim(0, 1)
    axes.set_ylim(y - 0.7, 0.7)
    axes.axis("off")
    save(figure, [], out)


def draw_rl(run, out):
    """Right answers and their length, of the rollouts and on test problems."""
    events = common.read_log(run)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, name in ((left, "correct"), (right, "length")):
        steps, values = points(events, "step", name)
        axes.plot(steps, smoothed(values), color="C0", label="rollouts, mean of 10 steps")
        axes.plot(*points(events, "eval", name), "o-", color="C1", label="test problems, greedy")
        axes.set_xlabel("step")
        axes.set_ylabel(TITLES[name])
        axes.set_ylim(bottom=0)
    left.legend()
    save(figure, (left, right), out)


def draw_rlhf(run, out):
    """The reward that training sees, and the true score that it does not see."""
    events = common.read_log(run)
    figure, axes = plt.subplots(figsize=(9, 3.4))
    steps, rewards = points(events, "step", "reward")
    axes.plot(steps, smoothed(rewards, 5), color="C3", label="reward model (left)")
    axes.set_xlabel("step")
    axes.set_ylabel("reward", color="C3")
    other = axes.twinx()
    other.plot(*points(events, "eval", "score"), "o-", color="C2", label="true score, held out (right)")
    other.set_ylabel("true score", color="C2")
    other.set_ylim(0, 1)
    lines = [*axes.get_lines(), *other.get_lines()]
    axes.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)  # over no curve
    save(figure, [axes], out)


def table(section):
    """The rows of a table of RESULTS.md as lists of cells, without its head."""
    text = RESULTS.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def rate(cell):
    """The number of a cell such as '657 TFLOP/s'."""
    return float(re.match(r"[\d.,]+", cell)[0].replace(",", ""))


def draw_matmul(out):
    """The versions of the matrix product on the H200, and cuBLAS."""
    rows = {row[0]: row for row in table("Versions")}
    names = {
        "124M qkv: naive": "one thread an element",
        "124M qkv: mma.sync 64 64 64 32 32 3": "tensor cores (mma.sync), tiles of 64 x 64",
        "124M qkv: mma.sync 128 256 64 64 64 3": "tiles of 128 x 256",
        "124M qkv: Hopper, one warpgroup, 1 stages": "Hopper's wgmma and TMA, one stage",
        "124M qkv: Hopper, one warpgroup, 2 stages": "two stages: load while multiplying",
        "124M qkv: Hopper, narrow": "a producer, two consumers, persistent",
        "124M qkv: Hopper, pingpong": "consumers in turns: one multiplies, one stores",
    }
    rates = {words: rate(rows[name][3]) for name, words in names.items()}
    qkv = next(row for row in table("Matmul") if row[0] == "124M qkv")
    rates["cuBLAS"] = 2 * 65536 * 2304 * 768 / rate(qkv[5]) / 1e6
    figure, axes = plt.subplots(figsize=(9, 3.4))
    colors = ["C0"] * len(names) + ["0.6"]
    bars = axes.barh(list(rates), list(rates.values()), color=colors)
    axes.bar_label(bars, [f"{value:.0f}" for value in rates.values()], padding=3)
    axes.margins(x=0.08)
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s, bf16, 65,536 x 768 times 768 x 2,304, one H200")
    save(figure, [axes], out)


def draw_step(out):
    """Where a training step's time goes on the H200, beside the least that each operation could take."""
    names = {"matmul": "matrix products", "attention": "attention", "classifier": "loss (classifier)"}
    names |= {"layernorm": "layernorm", "": "other"}
    measured, floors = dict.fromkeys(names.values(), 0.0), dict.fromkeys(names.values(), 0.0)
    for row, _, milliseconds, _, floor, _ in table("Steps"):
        if row.startswith(("·", "not accounted", "the step")):
            continue
        kind = next(name for beginning, name in names.items() if row.startswith(beginning))
        measured[kind] += float(milliseconds)
        floors[kind] += float(floor or 0)
    figure, axes = plt.subplots(figsize=(9, 2.8))
    bars = axes.barh(list(measured), list(measured.values()), color="C0", label="measured")
    axes.barh(list(floors), list(floors.values()), color="C1", height=0.3, label="floor: FLOP or bytes")
    axes.bar_label(bars, [f"{value:.1f} ms" for value in measured.values()], padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel("ms of a step, GPT-2 124M, 64 x 1,024 tokens, bf16, one H200")
    axes.legend()
    save(figure, [axes], out)


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    flags = common.Parser(prog="python -m extras.plot", description=__doc__)
    flags.add_argument("runs", nargs="*", metavar="RUN", help="directories of runs")
    group = flags.add_argument_group("output")
    group.add_argument("--out", metavar="PNG", help="where to; plot.png in the first run if not given")
    what = "instead, draw the README's figures into DIR"
    group.add_argument("--figures", metavar="DIR", help=what)
    return flags


if __name__ == "__main__":
    common.run(main)
