"""What the experiments share: flags, text, a small training loop, the cores, a table, one figure each.

An experiment is a script with a parser() and a main(), which ends with print_table() and save_figure().
"""

import functools
import multiprocessing
import signal
import time
from multiprocessing import resource_tracker
from pathlib import Path
from statistics import fmean

import numpy as np

import common
import data
import gpt2
import hub
from common import add_shared_flags, number
from distributed import World
from extras import plot
from kernels import threads
from tokenizer import Tokenizer
from train import evaluate, learning_rate

ALONE = World(0, 1)  # a world of one rank, for functions of the course that want one
BEGAN = time.monotonic()


def make_parser(name, description, init_from=None):
    """The parser of an experiment, with the flags of all, and with --init-from if that has a default."""
    flags = common.Parser(prog=f"python -m experiments.{name}", description=description)
    group = flags.add_argument_group("how much")
    group.add_argument("--quick", action="store_true", help="the same in seconds, too small to find anything")
    what = "how often all is repeated, with other random numbers"
    group.add_argument("--seeds", type=number(int, low=1), default=3, metavar="N", help=what)
    if init_from:
        add_shared_flags(flags.add_argument_group("model"), "init-from", init_from=init_from)
    group = flags.add_argument_group("output")
    what = "where the figure goes; figures/experiments, with --quick runs/experiments"
    group.add_argument("--out", metavar="DIR", help=what)
    return flags


def read_text(quick, directory="shards/factbook"):
    """A tokenizer, and the tokens (n,) of the training text and of the held-out text.

    That is the World Factbook, which `make train` has prepared; if quick, bytes of this repository's files.
    """
    if quick:
        files = sorted(Path(common.__file__).parent.glob("*.py"))
        tokens = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
        return Tokenizer.bytes(), *np.split(tokens, [-20_000])
    splits = (np.concatenate(data.shards(directory, split)) for split in ("train", "val"))
    return Tokenizer.load(directory), *splits


def load_base(name):
    """A base model (a run, a checkpoint or a hub name) with the chat tokens, and its tokenizer."""
    checkpoint = hub.find_checkpoint(name)
    base = Tokenizer.load(checkpoint)
    tokenizer = base.with_chat_tokens()
    sizes = dict(own_tokens=base.vocab_size, vocab_size=tokenizer.vocab_size)
    return gpt2.GPT2.from_pretrained(checkpoint, **sizes), tokenizer


def random_batches(tokens, B, T, rng):
    """Yield batches without end, for fit(): a micro-batch of B windows of T tokens, and their targets."""
    while True:
        starts = rng.integers(len(tokens) - T, size=B)
        block = np.stack([tokens[i : i + T + 1] for i in starts]).astype(np.int32)  # (B, T + 1)
        yield [(block[:, :-1], block[:, 1:])]


def fit(model, batches, n_steps, lr, final_lr=0.0):
    """train.py's loop: an update for each of n_steps batches; return the model.

    A batch is a list of micro-batches (tokens, targets) or (tokens, targets, weights), (B, T) each.
    """
    optimizer = gpt2.AdamW(model)
    for step, micro_batches in zip(range(n_steps), batches):
        for arrays in micro_batches:
            model.forward(*arrays)
            model.backward()
        optimizer.step(learning_rate(step, n_steps, lr, n_steps // 10, final_lr))
    return model


def held_out_loss(model, tokenizer, text, T, most=50_000, rows=32):
    """Nats a token and bits a byte on the first `most` tokens of held-out text, in windows of T."""
    n = min(most, len(text) - 1) // T
    inputs, targets = (text[i : i + n * T].reshape(n, T).astype(np.int32) for i in (0, 1))  # (n, T) each
    batches = [(inputs[i : i + rows], targets[i : i + rows]) for i in range(0, n, rows)]
    return evaluate(model, batches, tokenizer.token_lengths, ALONE)


def on_all_cores(work, jobs, quick=False):
    """[work(*job) for job in jobs], each in a process with one thread, as many at once as there are cores.

    For small models that is faster than one process with several threads. work is a function of a module.
    If quick, all jobs run here, one after the other, because starting a process takes a second.
    """
    if quick:
        return [work(*job) for job in jobs]
    results, progress = [], common.Progress(work.__name__, total=len(jobs))
    resource_tracker.ensure_running()  # it unblocks Ctrl-C when it starts
    with common.ctrl_c_waits():
        pool = multiprocessing.get_context("spawn").Pool(threads.thread_count(), begin_worker)
    with pool:
        for result in pool.imap(functools.partial(call, work), jobs):
            results.append(result)
            progress.add(1)
    progress.done()
    return results


def begin_worker():
    """Ctrl-C is for the process that started this one, and then ends both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threads.THREADS = 1


def call(work, job):
    return work(*job)


def spread(values, form=".2f"):
    """The mean of a measure over the seeds, and its range: "0.52 (0.48 to 0.55)"."""
    mean, low, high = (f"{value:{form}}" for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def print_table(heads, rows, form=".2f"):
    """Print rows of cells as a Markdown table; a cell that is a list has the values of all seeds."""
    cells = [list(map(str, heads))]
    for row in rows:
        cells.append([spread(cell, form) if isinstance(cell, list) else str(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print()


def draw_spread(axes, x, seeds, label="", **style):
    """Draw the mean of curves, one a seed, as a line, and their range as a band."""
    columns = list(zip(*seeds))
    [line] = axes.plot(
        x, [fmean(column) for column in columns], marker="o", markersize=4, label=label, **style
    )
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def save_figure(figure, all_axes, flags, name):
    """Write NAME.png, print where, and how long the experiment took."""
    directory = flags.out or ("runs/experiments" if flags.quick else "figures/experiments")
    plot.save(figure, all_axes, Path(directory) / f"{name}.png")
    common.say(f"took {common.duration(time.monotonic() - BEGAN)} with {flags.seeds} seeds")
