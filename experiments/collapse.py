"""What becomes of models that learn from what models wrote? And what does a student learn from a teacher?

Needs shards/factbook (make train). 5 minutes on two cores.

Generation 0 learns from real text, each later one anew from rows that the one before it has continued (model
collapse, Shumailov et al. 2024), or half from those and half from real rows. A student can also learn from
the teacher's probabilities (distillation, Hinton et al. 2015). The loss is a sum of weights * cross-entropy
with one target a token: so every row is there K times, with the teacher's K - 1 most probable tokens,
weighted by their probabilities, and with one drawn from the rest, weighted by what is left.

What it found is in README.md.
"""

import matplotlib.pyplot as plt
import numpy as np

import common
import gpt2
import sample
from experiments import report
from kernels.sampling import filtered_probabilities

GENERATIONS, ROWS, STEPS = 5, 800, 160  # ROWS of T + 1 tokens are a generation's text
QUICK = 1, 16, 2
LAYERS, WIDTH, B, T, LR = 2, 32, 16, 64, 6e-3
PROMPT, N, K = 8, 4, 4  # tokens of a row that a model continues; N-grams are counted
KINDS = ("own samples", "own, temperature 0.8", "half real text", "probabilities", "half the rows")


def main(argv=None):
    flags = parser().parse_args(argv)
    jobs = [(kind, seed, flags.quick) for kind in KINDS for seed in range(flags.seeds)]
    results = report.on_all_cores(descend, jobs, flags.quick)
    parts = (np.array(results[i : i + flags.seeds]) for i in range(0, len(jobs), flags.seeds))
    *chains, soft, few = parts  # (seeds, 2, generations) each
    figure, all_axes = plt.subplots(1, 2, figsize=(9, 3.6))
    measures = "bits per held-out byte", f"distinct {N}-grams it writes"
    for j, (axes, what) in enumerate(zip(all_axes, measures)):
        for kind, chain in zip(KINDS, chains):
            report.draw_spread(axes, range(chain.shape[2]), chain[:, j], kind)
        rows = [[i, *(each[:, j, i].tolist() for each in chains)] for i in range(chains[0].shape[2])]
        report.print_table(["generation", *(f"{what}: {kind}" for kind in KINDS[:-1])], rows, ".3f")
        axes.set(xlabel="generation", ylabel=what)
    names = "generation 0: teacher", "student of samples", "student of probabilities", KINDS[-1]
    bits = chains[0][:, 0, 0], chains[0][:, 0, 1], soft[:, 0, 1], few[:, 0, 0]
    report.print_table(["model", "bits per byte"], [[a, b.tolist()] for a, b in zip(names, bits)], ".3f")
    all_axes[0].plot([1] * flags.seeds, soft[:, 0, 1], "*", color="C3", label="student of probabilities")
    all_axes[0].legend(fontsize=8)
    report.save_figure(figure, all_axes, flags, "collapse")


def descend(kind, seed, quick):
    """For each generation: bits per held-out byte, and the share of distinct N-grams in what it writes."""
    generations, n_rows, n_steps = QUICK if quick else (GENERATIONS, ROWS, STEPS)
    rng = np.random.default_rng(seed)
    tokenizer, text, held_out = report.read_text(quick)
    starts = rng.integers(len(text) - T, size=n_rows)
    real = corpus = np.stack([text[i : i + T + 1] for i in starts]).astype(np.int32)  # (n_rows, T + 1)
    if kind == "half the rows":
        corpus = real[::2]
    model, bits, distinct = None, [], []
    for generation in range({"probabilities": 2, "half the rows": 1}.get(kind, generations + 1)):
        batches = hard_targets(corpus, rng)
        if model and kind == "probabilities":
            batches = soft_targets(batches, model, rng)
        config = gpt2.GPT2Config(LAYERS, WIDTH // 16, WIDTH, T, tokenizer.vocab_size)
        model = report.fit(gpt2.GPT2(config, seed=[seed, generation]), batches, n_steps, LR)
        bits.append(report.held_out_loss(model, tokenizer, held_out, T, 2_000 if quick else 50_000)[1])
        corpus = written(model, corpus, 0.8 if "0.8" in kind else 1.0, seed=100 * seed + generation + 1)
        distinct.append(share_of_distinct(corpus))
        if kind == "half real text":
            corpus[::2] = real[::2]
    return bits, distinct


def hard_targets(corpus, rng):
    """Yield batches of B random rows without end, for report.fit()."""
    while True:
        block = corpus[rng.integers(len(corpus), size=B)]  # (B, T + 1)
        yield [(block[:, :-1], block[:, 1:])]


def soft_targets(batches, teacher, rng):
    """The same rows K times, with the teacher's probabilities as weights of K targets for each token."""
    for [(tokens, _)] in batches:
        logits = teacher.logits(tokens)  # (B, T, V)
        p = filtered_probabilities(logits.reshape(B * T, -1), 1.0).reshape(logits.shape)
        top = np.argpartition(-p, K - 1)[..., : K - 1]  # (B, T, K - 1)
        p_top = np.take_along_axis(p, top, axis=-1)
        np.put_along_axis(p, top, 0, axis=-1)
        cumulative = p.cumsum(axis=-1)  # (B, T, V) of the rest
        left = cumulative[..., -1:]  # (B, T, 1)
        drawn = (cumulative <= rng.random(left.shape) * left).sum(axis=-1, keepdims=True)  # (B, T, 1)
        targets = np.moveaxis(np.concatenate([top, drawn], axis=-1), -1, 0)  # (K, B, T)
        weights = np.moveaxis(np.concatenate([p_top, left], axis=-1), -1, 0) / (B * T)  # (K, B, T)
        yield list(zip([tokens] * K, targets, weights))


def written(model, corpus, temperature, seed):
    """Rows like those of the corpus: their first PROMPT tokens, and how the model goes on."""
    prompts, rows = corpus[:, :PROMPT].tolist(), []
    for i in range(0, len(prompts), 400):
        settings = dict(temperature=temperature, seed=seed, streams=range(i, i + 400))
        texts = sample.generate(model, prompts[i : i + 400], T + 1 - PROMPT, **settings)
        rows += [[*text.prompt, *text.ids] for text in texts]
    return np.array(rows, np.int32)


def share_of_distinct(corpus):
    """The share of different ones among the N-grams of the rows without their prompts."""
    grams = np.lib.stride_tricks.sliding_window_view(corpus[:, PROMPT:], N, axis=1).reshape(-1, N)
    return len(np.unique(grams, axis=0)) / len(grams)


def parser():
    return report.make_parser("collapse", __doc__)


if __name__ == "__main__":
    common.run(main)
