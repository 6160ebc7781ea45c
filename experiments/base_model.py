"""What does a base model do by its prompt alone, and what does it know by heart?

Needs runs/factbook and shards/factbook (make train). 4 minutes on two cores. README.md says what it found.

After lines like "Peru - 1,279,996 sq km" a base model may go on with the next country's area, and in a
dialogue it may answer as the assistant: the examples are in the prompt (in-context learning, Brown et al.
2020). Then a small model learns the Factbook, in which passages of held-out text are planted, and writes on
from their first tokens.
"""

import random
import re

import matplotlib.pyplot as plt
import numpy as np

import common
import gpt2
import sample
from experiments import report
from tasks.factbook import facts, matches

# How an answer of a kind begins; a population has no unit behind the number.
KINDS = {"area": r"\d[\d,.]* (million )?sq km", "population": r"\d[\d,.]*(\d{3}| million)(?![\d,]| \w)"}
KINDS["life expectancy"] = r"\d[\d.]* years"
PROMPTS = {  # how a prompt begins, a question, and its answer
    "list": ("", "{country} -", " {value}\n"),
    "assistant": ("A helpful assistant answers.\n\n", "Q: {question}\nA:", " {value}\n"),
}
MEASURES = ("right kind", "copied", "right")  # copied: the answer is that of an example
EXAMPLES, ASKED, ROOM = range(7), 60, 18  # examples in a prompt; questions of each kind; tokens of an answer
SEEN, PASSAGES, START = (0, 1, 4, 16, 64, 256), 8, 16  # times; passages of each; given tokens
LAYERS, WIDTH, STEPS, B, T, LR = 4, 64, 800, 16, 64, 6e-3


def main(argv=None):
    flags = parser().parse_args(argv)
    jobs = [(seed, flags.init_from, flags.quick) for seed in range(flags.seeds)]
    asked = np.array(report.on_all_cores(ask, jobs, flags.quick))  # (seeds, prompts, examples, measures)
    learned = np.array(report.on_all_cores(memorise, jobs, flags.quick))  # (seeds, 2, SEEN)
    rows = [[k, *asked[:, :, k].reshape(len(jobs), -1).T.tolist()] for k in EXAMPLES]
    heads = [f"{name}: {what}" for name in PROMPTS for what in MEASURES]
    report.print_table(["examples", *heads], rows, ".0%")
    rows = [[n, *learned[:, :, i].T.tolist()] for i, n in enumerate(SEEN)]
    verbatim = f"tokens written verbatim, of {T + 1 - START}"
    report.print_table(["times seen", "nats a token", verbatim], rows, ".1f")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for i, name in enumerate(PROMPTS):
        for j, what in enumerate(MEASURES):
            style = dict(label=f"{name}: {what}", color=f"C{i}", linestyle=["-", "--", ":"][j])
            report.draw_spread(left, EXAMPLES, asked[:, i, :, j], **style)
    left.set(xlabel="examples in the prompt", ylabel="share of answers", ylim=(-0.03, 1))
    left.legend(fontsize=8)
    report.draw_spread(right, range(len(SEEN)), learned[:, 1], "")
    right.set(xlabel="times seen", ylabel=verbatim, xticks=range(len(SEEN)), xticklabels=SEEN)
    report.save_figure(figure, (left, right), flags, "base_model")


def ask(seed, base, quick):
    """The shares of answers that MEASURES names, by prompt and number of examples."""
    model, tokenizer = report.load_base(base)
    pools = {field: [fact for fact in facts() if fact.field == field] for field in KINDS}
    rng, shares = random.Random(seed), []
    for beginning, question, answer in PROMPTS.values():
        for n in EXAMPLES:
            prompts, asked, checked = [], [], []
            for field in list(KINDS) * (1 if quick else ASKED):
                *examples, fact = rng.sample(pools[field], n + 1)
                text = beginning + "".join((question + answer).format(**words(one)) for one in examples)
                ids = [tokenizer.eot, *tokenizer.encode(text + question.format(**words(fact)))]
                prompts.append(ids[ROOM - model.config.n_positions :])  # 1 of 500 loses its first token
                asked.append((fact, {words(one)["value"] for one in examples}))
            texts = sample.generate(model, prompts, ROOM, 0.0, tokenizer=tokenizer, stop_texts=["\n"])
            for text, (fact, seen) in zip((one.text.strip() for one in texts), asked):
                is_of_kind = re.match(KINDS[fact.field], text) is not None
                checked.append([is_of_kind, text in seen, bool(matches(fact, text))])
            shares.append(np.mean(checked, axis=0))
    return np.reshape(shares, (len(PROMPTS), len(EXAMPLES), len(MEASURES)))


def words(fact):
    """What the placeholders of a prompt become: "The area of Peru is 1,285,216 sq km." has a value."""
    value = fact.exact.rpartition(" is ")[2].rstrip(".")
    return dict(country=fact.country, question=fact.questions[0], value=value)


def memorise(seed, _, quick):
    """Train on text with planted passages; by SEEN: their loss, and how many tokens are repeated."""
    rng, n_steps = np.random.default_rng(seed), 4 if quick else STEPS
    tokenizer, text, held_out = report.read_text(quick)
    starts = rng.choice(len(held_out) // (T + 1) - 1, len(SEEN) * PASSAGES, replace=False) * (T + 1)
    passages = np.stack([held_out[i : i + T + 1] for i in starts]).astype(np.int32)  # (6 * PASSAGES, T + 1)
    planted = passages[np.repeat(np.arange(len(passages)), np.repeat(SEEN, PASSAGES))]  # (n, T + 1)
    places = rng.choice(n_steps * B, len(planted), replace=quick)  # (n,) of all rows of the training
    model = gpt2.GPT2(gpt2.GPT2Config(LAYERS, WIDTH // 16, WIDTH, T, tokenizer.vocab_size), seed=seed)
    report.fit(model, with_passages(text, planted, places, rng), n_steps, LR)

    losses = model.losses(passages[:, :-1], passages[:, 1:])  # (6 * PASSAGES, T)
    prompts = passages[:, :START].tolist()
    written = np.array([one.ids for one in sample.generate(model, prompts, T + 1 - START, 0.0)])
    same = np.cumprod(written == passages[:, START:], axis=1)  # 1 until the first other token
    return [each.reshape(len(SEEN), PASSAGES, -1).sum(axis=2).mean(axis=1) for each in (losses / T, same)]


def with_passages(text, planted, places, rng):
    """Batches of text for report.fit(), in which the rows at `places` are the planted passages."""
    for step, [(tokens, targets)] in enumerate(report.random_batches(text, B, T, rng)):
        for i in np.flatnonzero(places // B == step):
            tokens[places[i] % B], targets[places[i] % B] = planted[i, :-1], planted[i, 1:]
        yield [(tokens, targets)]


def parser():
    return report.make_parser("base_model", __doc__, init_from="runs/factbook")


if __name__ == "__main__":
    common.run(main)
