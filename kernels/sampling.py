"""From logits to a token: which tokens may be drawn, with what probability; random numbers.

These are counter-based (Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011): a random number is a pure function of (seed, stream, counter), with no state to carry. A row of the
batch has its own stream and counts its positions, so its samples do not depend on who else is in the batch,
nor on the device. Read kernels/reference.py first, which has the model's other operations, and sample.py
after.
"""

import numpy as np

WORD = np.uint64(0xFFFFFFFF)  # a 32-bit word is kept in a uint64, so that products and carries have room
HALF = np.uint64(32)
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)  # the paper's constants
WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)  # the golden ratio, and sqrt(3) - 1


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: a counter of four words and a key of two (arrays of uint64) -> four random words."""
    for _ in range(10):
        product0, product1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> HALF) ^ c1 ^ k0,
            product1 & WORD,
            (product0 >> HALF) ^ c3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def uniform(seed, streams, counters):
    """One number in [0, 1) for every (stream, counter) under this seed: (B,) float64, 32 random bits each."""
    seed = np.uint64(seed)
    streams, counters = np.asarray(streams).astype(np.uint64), np.asarray(counters).astype(np.uint64)
    words = philox(
        counters & WORD, counters >> HALF, streams & WORD, streams >> HALF, seed & WORD, seed >> HALF
    )
    return words[0] * 2.0**-32


def filtered_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution that is sampled: logits (B, V) -> probabilities (B, V) float64, rows summing to 1.

    In this order, each working on what the one before has left; tokens that tie at a threshold all stay:
      temperature  divides the logits; 0 puts everything on the largest (the lowest id of equals)
      top_k        keeps the k most probable tokens                                                  0: all
      top_p        keeps a token if the strictly more probable ones hold less than top_p together      1: all
      min_p        keeps the tokens at least min_p times as probable as the most probable              0: all
    """
    if temperature == 0:
        probabilities = np.zeros(logits.shape)  # (B, V)
        probabilities[np.arange(len(logits)), logits.argmax(-1)] = 1
        return probabilities

    scores = logits.astype(np.float64)  # (B, V), a copy
    if 0 < top_k < scores.shape[-1]:
        kth = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]  # (B, 1), the k-th largest logit
        scores[logits < kth] = -np.inf
    # A temperature of 1e-300 leaves one token, as it should. NaN and infinite logits end as NaN, to be seen.
    with np.errstate(over="ignore", invalid="ignore"):
        scores -= scores.max(-1, keepdims=True)
        scores /= temperature
    weights = np.exp(scores, out=scores)  # (B, V), not normalised: the most probable token has exactly 1

    if top_p < 1:
        ranked = np.sort(weights, axis=-1)[:, ::-1]  # (B, V), falling
        upto = ranked.cumsum(-1)  # (B, V), what a rank and all above it hold
        n_kept = 1 + (upto[:, :-1] < top_p * upto[:, -1:]).sum(-1, keepdims=True)  # (B, 1)
        weights[weights < np.take_along_axis(ranked, n_kept - 1, -1)] = 0
    if min_p > 0:
        weights[weights < min_p] = 0
    weights /= weights.sum(-1, keepdims=True)
    return weights


def sample(
    out, logits, seed, streams, counters, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=None
):
    """Draw out (B,) int32 from logits (B, V): the first token whose running sum passes a uniform number.

    logprobs (2, B) float64, if given: the log-probabilities of the drawn tokens, [0] under exactly the
    distribution that was sampled, [1] under the model's own (the full softmax at temperature 1).
    """
    probabilities = filtered_probabilities(logits, temperature, top_k, top_p, min_p)  # (B, V)
    cdf = probabilities.cumsum(-1)  # (B, V), in the order of the vocabulary
    threshold = uniform(seed, streams, counters)[:, None] * cdf[:, -1:]  # (B, 1), below cdf[:, -1]
    out[:] = (cdf <= threshold).sum(-1)  # a token of probability 0 adds no step to the sum: never drawn
    if logprobs is None:
        return

    rows = np.arange(len(out))
    logprobs[0] = np.log(probabilities[rows, out])
    if temperature == 1 and top_k == 0 and top_p == 1 and min_p == 0:
        logprobs[1] = logprobs[0]
    else:
        with np.errstate(invalid="ignore"):
            scores = logits - logits.max(-1, keepdims=True).astype(np.float64)  # (B, V)
        logprobs[1] = scores[rows, out] - np.log(np.exp(scores).sum(-1))
