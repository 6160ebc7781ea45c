"""Several processes clean, and the results come in the order of the documents.

Read clean.py before this file.
"""

import contextlib
import itertools
import multiprocessing
import traceback
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import common
from common import UserError


def in_order(batches, make_cleaner, processes):
    """Yield what the cleaner's clean_batch() makes of each batch, in their order, in several processes.

    Each process has a cleaner, the result of make_cleaner(). Few batches are under way at a time, so that
    memory does not hold the text.
    """
    batches = iter(batches)
    first = list(itertools.islice(batches, processes))  # so that none is started that gets no batch
    batches = itertools.chain(first, batches)
    if len(first) < 2:
        yield from map(make_cleaner().clean_batch, batches)
        return
    context = multiprocessing.get_context("spawn")  # not fork: this process has threads
    workers, pipes = [], []
    try:
        resource_tracker.ensure_running()  # it unblocks Ctrl-C when it starts
        with common.ctrl_c_waits():
            for _ in first:
                pipe, theirs = context.Pipe()
                worker = context.Process(target=work, args=(theirs, make_cleaner), daemon=True)
                worker.start()
                workers.append(worker)
                theirs.close()
                pipes.append(pipe)
        yield from share_out(batches, pipes)
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def share_out(batches, pipes):
    """Send every batch to a process that waits for one; yield their results in the order of the batches."""
    idle, under_way, results = list(pipes), {}, {}  # under_way: {pipe: number of its batch}
    n_sent, n_yielded, is_over = 0, 0, False
    while not is_over or n_yielded < n_sent:
        while idle and not is_over and n_sent - n_yielded < 4 * len(pipes):
            batch = next(batches, None)
            is_over = batch is None
            if not is_over:
                pipe = idle.pop()
                with unless_killed():
                    pipe.send(batch)
                under_way[pipe], n_sent = n_sent, n_sent + 1
        if n_yielded in results:
            yield results.pop(n_yielded)
            n_yielded += 1
        elif under_way:
            for pipe in wait(under_way):
                with unless_killed():
                    result = pipe.recv()
                if isinstance(result, Exception):
                    raise result
                results[under_way.pop(pipe)] = result
                idle.append(pipe)
        elif n_yielded < n_sent:
            raise RuntimeError(f"the result of batch {n_yielded} is lost")


@contextlib.contextmanager
def unless_killed():
    """A `with` in which a pipe is used: UserError if the process at its other end is gone."""
    try:
        yield
    except (EOFError, OSError):
        remedy = "free some memory, or give fewer --processes"
        raise UserError(
            f"a process that cleaned was killed, perhaps because memory is full; {remedy}"
        ) from None


def work(pipe, make_cleaner):
    """What a process does: clean the batches that come through the pipe, until its other end is closed."""
    cleaner = make_cleaner()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            batch = pipe.recv()
            try:
                result = cleaner.clean_batch(batch)
            except (UserError, MemoryError) as error:
                result = error
            except Exception:
                result = RuntimeError(traceback.format_exc())  # which an exception loses on its way
            pipe.send(result)
