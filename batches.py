"""Rows of different lengths as arrays: what sft.py and rl.py train on. Read train.py first, sft.py next.

A row is (tokens, weights), two lists of one length: what the model reads, and how much each token counts as
a target: weights[t] for predicting tokens[t] from those before it. The first token is predicted by none.

No row sees another: each has a line of its own, filled up with padding of weight 0 behind it, where causal
attention never looks. So the loss of a row is the same in whatever company (packing several into one line
would have no padding, but rows that see each other). Sorting the rows by length keeps the padding small.
"""

import numpy as np

SETUP = 96  # what a micro-batch costs before its first token, in tokens: measured, tiny model, 2 cores


def micro_batches(rows, most, room, multiple=8):
    """Yield (tokens, targets, weights), each (B, T) with B * T <= most where a row allows, for all rows.

    T is a multiple of 8, but for rows that need more than that of the `room`, the model's context.

    Which rows go together is chosen for the least work, by dynamic programming over the sorted lengths: a cut
    saves padding and costs SETUP.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    width = [min(-(-(len(tokens) - 1) // multiple) * multiple, room) for tokens, _ in rows]
    best = [(0, 0)]  # for the first j rows: (work, where the last micro-batch begins)
    for j in range(1, len(rows) + 1):
        T = width[j - 1]
        starts = range(max(0, j - max(1, most // T)), j)
        best.append(min((best[i][0] + (j - i) * T + SETUP, i) for i in starts))
    end, cuts = len(rows), []
    while end:
        cuts.append((best[end][1], end))
        end = best[end][1]
    for start, end in reversed(cuts):
        shape = end - start, width[end - 1]
        tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)  # (B, T)
        weights = np.zeros(shape)
        for b, (ids, worth) in enumerate(rows[start:end]):
            tokens[b, : len(ids) - 1] = ids[:-1]
            targets[b, : len(ids) - 1] = ids[1:]
            weights[b, : len(ids) - 1] = worth[1:]
        yield tokens, targets, weights


def accumulate(model, rows, most):
    """Add the gradient of sum(weights * losses) over all rows to model.grads, and return that sum."""
    rows, read = [(tokens, weights) for tokens, weights in rows if np.any(weights[1:])], []
    for tokens, targets, weights in micro_batches(rows, most, model.config.n_positions):
        losses = model.forward(tokens, targets, weights, sparse=True)  # (n,) where the weight is not 0
        read.append((model.ops.read_later(losses), weights[weights != 0]))
        model.backward()
    return sum((float(losses() @ weights) for losses, weights in read), 0.0)


def gradient(workers, rows, most):
    """accumulate() by all processes of distributed.Workers, made with {"accumulate": share_of_rows}."""
    rows = sorted(rows, key=lambda row: len(row[0]))  # dealt like cards, everybody has as much to do
    objective = sum(workers.run("accumulate", [(rows[i :: workers.size], most) for i in range(workers.size)]))
    workers.add_gradients()
    return objective


def share_of_rows(model, share):
    return accumulate(model, *share)
