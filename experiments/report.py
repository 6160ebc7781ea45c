"""What the experiments share: their flags, the cores, a table with the spread over seeds, one figure each.

An experiment is a script with a parser() and a main(), which ends with print_table() and save_figure().
"""

import concurrent.futures
import multiprocessing
import time
from pathlib import Path
from statistics import fmean

import common
from common import number
from distributed import World
from extras import plot
from kernels import threads

ALONE = World(0, 1)  # a world of one rank, for functions of the course that want one
BEGAN = time.monotonic()


def make_parser(name, description):
    """The parser of an experiment, with the flags that all of them have."""
    flags = common.Parser(prog=f"python -m experiments.{name}", description=description)
    group = flags.add_argument_group("how much")
    group.add_argument("--quick", action="store_true", help="the same in seconds, too small to find anything")
    what = "how often all is repeated, with other random numbers"
    group.add_argument("--seeds", type=number(int, low=1), default=3, metavar="N", help=what)
    group = flags.add_argument_group("output")
    what = "where the figure goes; figures/experiments, with --quick runs/experiments"
    group.add_argument("--out", metavar="DIR", help=what)
    return flags


def on_all_cores(work, jobs, quick=False):
    """[work(*job) for job in jobs], each in a process with one thread, as many at once as there are cores.

    For small models that is faster than one process with several threads. work is a function of a module.
    If quick, all jobs run here, one after the other, because starting a process takes a second.
    """
    if quick:
        return [work(*job) for job in jobs]
    results, progress = [None] * len(jobs), common.Progress(work.__name__, total=len(jobs))
    cores, context = threads.thread_count(), multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(cores, context, use_one_thread) as processes:
        index_of = {processes.submit(work, *job): i for i, job in enumerate(jobs)}
        for done in concurrent.futures.as_completed(index_of):
            results[index_of[done]] = done.result()
            progress.add(1)
    progress.done()
    return results


def use_one_thread():
    threads.THREADS = 1


def spread(values, form=".2f"):
    """The mean of a measure over the seeds, and its range: "0.52 (0.48 to 0.55)"."""
    mean, low, high = (f"{value:{form}}" for value in (fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def print_table(heads, rows, form=".2f"):
    """Print rows of cells as a Markdown table; a cell that is a list has the values of all seeds."""
    cells = [heads]
    for row in rows:
        cells.append([spread(cell, form) if isinstance(cell, list) else str(cell) for cell in row])
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")
    print()


def draw_spread(axes, x, seeds, label, **style):
    """Draw the mean of curves, one a seed, as a line, and their range as a band."""
    columns = list(zip(*seeds))
    [line] = axes.plot(x, [fmean(column) for column in columns], "o-", markersize=4, label=label, **style)
    low, high = [min(column) for column in columns], [max(column) for column in columns]
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def save_figure(figure, all_axes, flags, name):
    """Write NAME.png, print where, and how long the experiment took."""
    directory = flags.out or ("runs/experiments" if flags.quick else "figures/experiments")
    plot.save(figure, all_axes, Path(directory) / f"{name}.png")
    common.say(f"took {common.duration(time.monotonic() - BEGAN)} with {flags.seeds} seeds")
