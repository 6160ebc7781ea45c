"""How does the loss fall with parameters and tokens, and what is the best model for a budget?

Needs shards/factbook (make train). 6 minutes on two cores.

Fifteen models, five widths by three budgets of tokens, give the law L(N, D) = E + A / N^alpha + B / D^beta
for N parameters and D tokens (Hoffmann et al. 2022, equation 2). It says what a larger model will reach
before that is trained, and which N and D are best for C = 6 N D FLOP.

What it found is in README.md.
"""

import matplotlib.pyplot as plt
import numpy as np

import common
import gpt2
from common import count
from experiments import report

WIDTHS, STEPS, LARGER = (8, 16, 24, 32, 48), (100, 250, 625), (64, 1250)  # LARGER is predicted
LAYERS, B, T = 2, 64, 16  # 1,024 tokens a step
HOFFMANN = (1.69, 406.4, 410.7, 0.34, 0.28)  # E, A, B, alpha, beta of their approach 3, on text of the web
DOLLARS, PRICE, H100 = 600, 2.0, 3600 * 4e14  # a budget; an hour of a card, and its FLOP at 40% utilization
GPT3 = 3.14e23  # FLOP (Brown et al. 2020, appendix D)


def main(argv=None):
    flags = parser().parse_args(argv)
    widths, steps, larger = ((8, 16), (2, 4, 8), (24, 9)) if flags.quick else (WIDTHS, STEPS, LARGER)
    sizes = [(width, n) for width in widths for n in steps] + [larger]
    jobs = [(*size, seed, flags.quick) for size in sizes for seed in range(flags.seeds)]
    results = report.on_all_cores(train, jobs[::-1], flags.quick)[::-1]  # what takes longest begins first
    runs = np.array(results).reshape(len(sizes), flags.seeds, 3).swapaxes(0, 1)  # N, D and the loss
    laws = np.array([fit_law(*one[:-1].T) for one in runs])  # (seeds, 5); without LARGER
    rows = []
    for n, d, *losses in np.concatenate([runs[0, :, :2], runs[..., 2].T], axis=1).tolist():
        rows.append([count(n), count(d), f"{6 * n * d:.1e}", losses, loss_of(laws, n, d).tolist()])
    rows[-1][0] += ", not fitted"
    report.print_table(["N", "D", "FLOP", "loss, nats a token", "loss, by the law"], rows, ".3f")
    report.print_table(["E", "A", "B", "alpha", "beta"], [laws.T.tolist()], ".3g")
    print_budgets(laws, 6 * n * d)
    draw(flags, runs, laws, len(steps))


def train(width, n_steps, seed, quick):
    """Train a model of this width; return its N, its D and its loss on held-out text in nats a token."""
    tokenizer, text, held_out = report.read_text(quick)
    config = gpt2.GPT2Config(LAYERS, width // 8, width, T, tokenizer.vocab_size)
    batches = report.random_batches(text, B, T, np.random.default_rng(seed))
    model = report.fit(gpt2.GPT2(config, seed=seed), batches, n_steps, lr=0.04 / width**0.5)
    loss, _ = report.held_out_loss(model, tokenizer, held_out, T, 2_000 if quick else 100_000)
    return config.n_params() - T * width, n_steps * B * T, loss  # without wpe, which multiplies nothing


def fit_law(N, D, L, delta=1e-3):
    """The law with the least Huber loss of log L (n,), as in the paper: E, A, B, alpha, beta.

    For given exponents, of which a grid is tried, the other three follow from least squares. A run whose
    residual r is beyond delta gets the weight delta / |r|; repeated, that comes to the least Huber loss. No
    part of a loss is negative: a constant that would be is 0.
    """
    exponents = np.linspace(0.1, 1.5, 57)
    grid = np.stack(np.meshgrid(exponents, exponents), 2).reshape(-1, 2)  # (G, 2) alpha and beta
    ones = np.ones((len(grid), len(L)))
    terms = np.stack([ones, N ** -grid[:, :1], D ** -grid[:, 1:]], axis=2)  # (G, n, 3)
    scale = terms.max(axis=1, keepdims=True)  # (G, 1, 3): N^-alpha is very small
    columns, weights = terms / scale / L[:, None], ones  # columns @ constants = 1
    for _ in range(10):
        root = np.sqrt(weights)[..., None]  # (G, n, 1)
        constants = np.linalg.pinv(columns * root) @ root  # (G, 3, 1)
        columns = np.where(constants.swapaxes(1, 2) < 0, 0.0, columns)  # of a column of zeros it is 0
        constants = np.maximum(constants, 0)
        r = np.abs(np.log(np.maximum((columns @ constants)[..., 0], 1e-9)))  # (G, n)
        weights = delta / np.maximum(r, delta)
    huber = np.where(r < delta, r**2 / 2, delta * (r - delta / 2)).sum(axis=1)
    best = huber.argmin()
    return *(constants[best, :, 0] / scale[best, 0]), *grid[best]


def loss_of(laws, N, D):
    E, A, B, alpha, beta = np.transpose(laws)
    return E + A * N**-alpha + B * D**-beta


def print_budgets(laws, C):
    """The best N and D for C FLOP by our laws, for DOLLARS by Hoffmann's; and what GPT-3 takes."""
    rows = []
    for name, FLOP, some in (("here", C, laws), (f"${DOLLARS}", DOLLARS / PRICE * H100, [HOFFMANN])):
        _, A, B, alpha, beta = np.transpose(some)
        n = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (FLOP / 6) ** (beta / (alpha + beta))
        d = FLOP / 6 / n  # at this n the derivative of the loss along 6 N D = FLOP is 0
        rows.append([name, f"{FLOP:.1e}", n.tolist(), d.tolist(), (d / n).tolist()])
    report.print_table(["budget", "FLOP", "best N", "best D", "D / N"], rows, ".2g")
    days = GPT3 / (256 * 60e12) / 86400  # 60 TFLOP/s as in the lecture
    print(f"GPT-3: {GPT3} FLOP on 256 H100 of 60 TFLOP/s: {days:.1f} days without idle time")
    print(f"at 70% utilization {days / 0.7:.0f} days, ${256 * days / 0.7 * 24 * PRICE / 1e6:.2f}M")


def draw(flags, runs, laws, n_budgets):
    """The loss over the compute: points for the runs, bands for the laws of all seeds."""
    figure, axes = plt.subplots(figsize=(9, 4.2))
    tokens = np.geomspace(runs[..., 1].min() / 2, runs[..., 1].max())  # (50,)
    for i in range(0, runs.shape[1], n_budgets):
        N, D, losses = np.moveaxis(runs[:, i : i + n_budgets], 2, 0)  # (seeds, budgets) each; 1 for LARGER
        n, color, larger = N[0, 0], plt.cm.viridis(i / runs.shape[1]), N.shape[1] == 1
        label = f"{count(n)} parameters" + ", not fitted" * larger
        axes.scatter(6 * N * D, losses, marker="*" if larger else "o", color=color, label=label)
        curves = [loss_of(law, n, tokens) for law in laws]  # (50,) each
        axes.fill_between(6 * n * tokens, np.min(curves, 0), np.max(curves, 0), color=color, alpha=0.4)
    axes.set(xscale="log", xlabel="FLOP, 6 N D", ylabel="loss, nats per held-out token")
    axes.legend(fontsize=8)
    report.save_figure(figure, [axes], flags, "scaling_law")


def parser():
    return report.make_parser("scaling_law", __doc__)


if __name__ == "__main__":
    common.run(main)
