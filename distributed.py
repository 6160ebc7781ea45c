"""Processes beside this one that compute with the same parameters. Nothing here is about language models.

With a small model an operation takes a fraction of a millisecond, and waking a second thread for it takes a
tenth of one, sixty times a pass. So small models are not trained by threads but by processes: each takes its
share of a step's rows through the whole of forward and backward, alone on its core, and only the gradients
are added up. Linux only, for it forks; elsewhere, and for large models, there is just this process, with
threads. Read batches.py before and sft.py or rl.py after.
"""

import mmap
import multiprocessing
import os
import signal
import sys

import numpy as np

from common import UserError
from kernels import threads

SMALL = 1 << 24  # parameters: a larger model keeps both cores busy within every operation


def shared(n, dtype):
    """An array (n,) of zeros that forked processes share with this one."""
    dtype = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, max(1, n) * dtype.itemsize), dtype, count=n)


class Workers:
    """`size` processes, this one among them. Make them before anything starts a thread.

    functions: {name: function(model, share)}, what the others may be asked to do. Their model has this one's
    parameters, as they are at any time, and gradients of its own.
    """

    def __init__(self, model, functions, size=None):
        alone = sys.platform != "linux" or model.device != "cpu" or model.flat_params.size > SMALL
        self.model, self.functions = model, functions
        self.size = 1 if alone else size or threads.THREADS
        self.pipes, self.gradients = [], []  # of each other process: how to reach it, what it has added up
        if self.size == 1:
            return
        parameters = shared(model.flat_params.size, model.type)
        parameters[:] = model.flat_params
        model.use_buffers(parameters, model.flat_grads)
        context = multiprocessing.get_context("fork")
        for _ in range(self.size - 1):
            ours, theirs = context.Pipe()
            gradients = shared(model.flat_grads.size, model.exact)
            process = context.Process(target=self._serve, args=(theirs, ours, gradients), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.gradients.append(gradients)

    def _serve(self, pipe, parents, gradients):
        """In another process, on its own core: do what is asked until the pipe is closed."""
        threads.THREADS = 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in (*self.pipes, parents):  # the first process's ends: or nobody would see them closed
            other.close()
        self.model.use_buffers(self.model.flat_params, gradients)
        while True:
            try:
                name, share = pipe.recv()
            except EOFError:
                os._exit(0)
            try:
                pipe.send((self.functions[name](self.model, share), None))
            except BaseException as error:
                pipe.send((None, error))

    def run(self, name, shares):
        """[functions[name](model, share) for share in shares], one process each; at most `size` shares."""
        asked, before = self.pipes[: max(0, len(shares) - 1)], threads.THREADS
        for pipe, share in zip(asked, shares[1:]):
            pipe.send((name, share))
        try:
            threads.THREADS = before if self.size == 1 else 1
            results = [self.functions[name](self.model, share) for share in shares[:1]]
        finally:
            threads.THREADS = before
            try:
                answers = [pipe.recv() for pipe in asked]
            except EOFError:
                raise UserError(
                    "a helping process was killed, for want of memory perhaps; --resume"
                ) from None
        for result, error in answers:
            if error is not None:
                raise error
            results.append(result)
        return results

    def add_gradients(self):
        """Add what the others' gradients have come to, in their order, to the model's, and clear them."""
        for gradients in self.gradients:
            threads.by_rows(lambda rows, g=gradients: self._add(rows, g), len(gradients), 1)

    def _add(self, rows, gradients):
        self.model.flat_grads[rows] += gradients[rows]
        gradients[rows] = 0

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        self.pipes = []
