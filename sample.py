"""From a model to text: probabilities, a biased coin, append, repeat.

    python sample.py RUN --prompt "The capital of France"
    python sample.py RUN --num-samples 3 --temperature 0.7 --top-p 0.95
    python sample.py RUN --prompt "Population:" --show-probs

generate() is the loop, for a batch of prompts in different states; rl.py uses it too. release() decides what
of a text may be shown, main() is the command line. Read kernels/sampling.py first, where the coin is thrown.
"""

import json
import sys
from pathlib import Path

import numpy as np

import gpt2
import kernels
import runs
from console import Parser, UserError, number, run
from kernels.sampling import filtered_probabilities
from tokenizer import Tokenizer

SEED = 42  # without --seed: a repeated command repeats its text


# ------------------------------------------------------------------------------------------------------------
# The loop


class Completion:
    """What a prompt has become: a row of the batch, first while it grows and then as the result."""

    def __init__(self, index, prompt, stream, characters):
        self.index, self.prompt, self.stream = index, prompt, stream
        self.characters = characters  # the tokenizer's decoder for this row: whole characters only
        self.ids = []  # the tokens drawn; a stop token is the last of them
        self.logprobs = []  # of each, under exactly the distribution that it was drawn from
        self.full_logprobs = []  # of each, under the model's own: the full softmax at temperature 1
        self.text = ""  # what may be shown: without a stop token or a stop text
        self.held = ""  # the end of the text as long as it may be the beginning of a stop text
        self.finish = None  # "stop", "length" (max_tokens) or "context" (the model's n_positions)

    @property
    def position(self):
        """How many tokens stand before the next one: also the counter of the row's next random number."""
        return len(self.prompt) + len(self.ids)

    @property
    def mean_logprob(self):
        """How probable the model finds this text, per token: fair between short texts and long ones."""
        return sum(self.full_logprobs) / len(self.full_logprobs)

    def take(self, token, logprob, full_logprob, stop_tokens, stop_texts, max_tokens, n_positions):
        """Append a token, see whether it is the last, and return the text that may now be shown."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.full_logprobs.append(full_logprob)
        if token in stop_tokens:
            self.finish = "stop"
        elif len(self.ids) == max_tokens:
            self.finish = "length"
        elif self.position > n_positions:  # the model cannot read this token any more
            self.finish = "context"
        if self.characters is None:
            return ""
        if token not in stop_tokens:
            self.held += self.characters.push(token)
        if self.finish:
            self.held += self.characters.flush()
        shown, self.held, stopped = release(self.held, stop_texts, last=self.finish is not None)
        if stopped:
            self.finish = "stop"
        self.text += shown
        return shown


def release(text, stop_texts, last):
    """Split text into what may be shown and what is held back; and say whether a stop text came.

    Whatever could still grow into a stop text is held back, unless this is the `last` of the text. The stop
    text that is complete first counts, so the result does not depend on the pieces in which the text arrives.
    """
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stop_texts if stop in text]
    if found:
        return text[: min(found)[1]], "", True
    lengths = [n for stop in stop_texts for n in range(1, len(stop)) if text.endswith(stop[:n])]
    keep = len(text) - (0 if last else max(lengths, default=0))
    return text[:keep], text[keep:], False


def generate(
    model, prompts, max_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=SEED,
    stop_tokens=(), stop_texts=(), tokenizer=None, streams=None, on_token=None,
):  # fmt: skip
    """Continue every prompt (a list of token ids, at least one) and return a Completion for each, in order.

    A row's random numbers depend on the seed, on its stream (its number in the batch, unless `streams` says
    otherwise) and on the position alone: finished rows are dropped from the batch, and equal prompts are read
    once, without changing anybody's samples. With a tokenizer the completions have text, and stop_texts work.
    on_token(completion, shown, logits) is called after every token, with the text that may now be shown and
    the row's logits (V,) on the device.
    """
    n_positions = model.config.n_positions
    longest = max(map(len, prompts))
    if longest > n_positions:
        raise UserError(
            f"the prompt has {longest} tokens and this model reads at most {n_positions}; shorten the prompt"
        )
    if min(map(len, prompts)) == 0:
        raise ValueError("a prompt needs at least one token; documents begin with the end-of-text token")
    if stop_texts and tokenizer is None:
        raise ValueError("stop_texts need a tokenizer")
    ops = model.ops
    rows = [
        Completion(i, list(prompt), i if streams is None else streams[i], tokenizer and tokenizer.stream())
        for i, prompt in enumerate(prompts)
    ]

    # The prompts: each different one is read once, padded on the right, and copied to the rows that share it.
    different = list(dict.fromkeys(map(tuple, prompts)))
    lengths = np.array([len(prompt) for prompt in different], np.int32)  # (B',)
    tokens = np.zeros((len(different), longest), np.int32)  # (B', T)
    for row, prompt in zip(tokens, different):
        row[: len(prompt)] = prompt
    cache = model.new_cache(len(different), min(longest + max_tokens - 1, n_positions))
    logits = model.decode(tokens, cache, lengths)  # (B', V)
    place = {prompt: i for i, prompt in enumerate(different)}
    if len(different) < len(rows):
        copies = [place[tuple(prompt)] for prompt in prompts]
        cache.select(copies)
        shared, logits = logits, ops.empty((len(rows), logits.shape[1]), logits.dtype)
        ops.take_rows(logits, shared, ops.to_device(np.array(copies, np.int32)))  # (B, V)

    active = rows
    while True:
        drawn, logprobs = ops.empty(len(active), np.int32), ops.empty((2, len(active)), logits.dtype)
        at = np.array([(row.stream, row.position) for row in active], np.int64).T  # (2, B)
        ops.sample(drawn, logits, seed, *ops.to_device(at), temperature, top_k, top_p, min_p, logprobs)
        drawn, logprobs = ops.to_host(drawn), ops.to_host(logprobs)  # (B,), (2, B)
        if not np.isfinite(logprobs).all():
            raise UserError(
                "the model's outputs are not finite numbers: its training diverged, take an older one"
            )

        for i, row in enumerate(active):
            one = int(drawn[i]), float(logprobs[0, i]), float(logprobs[1, i])
            shown = row.take(*one, stop_tokens, stop_texts, max_tokens, n_positions)
            if on_token:
                on_token(row, shown, logits[i])

        going = [i for i, row in enumerate(active) if row.finish is None]
        if not going:
            return rows
        if len(going) < len(active):
            cache.select(going)
            active, drawn = [active[i] for i in going], drawn[going]
        logits = model.decode(drawn[:, None], cache)  # (B, V)


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    flags = Parser(prog="sample.py", description="Continue a text with a model.")
    flags.add_argument("directory", metavar="DIR", help="a run (its newest checkpoint) or a checkpoint")

    add = flags.add_argument_group("prompt").add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", default="", help="the text to continue; none: a new document")
    add(
        "--prompt-file",
        metavar="PATH",
        help="a file with it, - is standard input; a final newline is dropped",
    )

    add = flags.add_argument_group("how much").add_argument
    add("--num-samples", metavar="N", type=number(int, low=1), default=1, help="texts to write")
    add(
        "--max-tokens", metavar="N", type=number(int, low=1), default=200, help="the longest that each may be"
    )
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")
    words = "write N for each text shown, and show the one with the highest mean log-probability"
    add("--best-of", metavar="N", type=number(int, low=1), default=1, help=words)

    add = flags.add_argument_group("which tokens").add_argument
    words = "below 1: safer, above 1: wilder, 0: always the most probable token"
    add("--temperature", metavar="X", type=number(float, low=0, high=1e6), default=0.8, help=words)
    words = "only the N most probable tokens; 0: all"
    add("--top-k", metavar="N", type=number(int, low=0), default=0, help=words)
    words = "only the most probable tokens that together have probability X"
    add("--top-p", metavar="X", type=number(float, above=0, high=1), default=1.0, help=words)
    words = "only tokens at least X times as probable as the most probable one"
    add("--min-p", metavar="X", type=number(float, low=0, high=1), default=0.0, help=words)
    words = "the same seed writes the same text"
    add("--seed", metavar="N", type=number(int, low=0, high=2**63 - 1), default=SEED, help=words)

    add = flags.add_argument_group("output").add_argument
    add("--show-probs", action="store_true", help="the candidates at every step, as a table")
    add("--json", action="store_true", help="one JSON object, for programs")

    add = flags.add_argument_group("machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the weights; bfloat16: cuda only",
    )
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    if "" in flags.stop:
        raise UserError("--stop needs a text that is not empty")
    prompt = flags.prompt if flags.prompt_file is None else read_prompt(flags.prompt_file)
    checkpoint = runs.newest_checkpoint(flags.directory)
    tokenizer = Tokenizer.load(checkpoint)
    model = gpt2.GPT2.from_pretrained(checkpoint, *kernels.choose(flags.device, flags.dtype))
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{checkpoint}: tokenizer.json has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; put the tokenizer there that the model was trained with"
        )
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop

    streaming = flags.num_samples * flags.best_of == 1 and not (flags.json or flags.show_probs)
    settings = {name: getattr(flags, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    candidates = {}  # the number of a completion -> for each of its tokens, most_probable()

    def on_token(completion, shown, logits):
        if streaming:
            print(shown, end="", flush=True)
        if flags.show_probs:
            candidates.setdefault(completion.index, []).append(most_probable(model, logits, settings))

    if streaming:
        print(prompt, end="", flush=True)
    prompts = [[tokenizer.eot, *tokenizer.encode(prompt)]]  # documents begin like this in training
    completions = generate(
        model, prompts * (flags.num_samples * flags.best_of), flags.max_tokens, **settings, seed=flags.seed,
        stop_tokens={tokenizer.eot}, stop_texts=flags.stop, tokenizer=tokenizer, on_token=on_token,
    )  # fmt: skip
    groups = [completions[i : i + flags.best_of] for i in range(0, len(completions), flags.best_of)]
    best = [max(group, key=lambda completion: completion.mean_logprob) for group in groups]

    if flags.json:
        print(json.dumps(report(flags, checkpoint, prompt, best, candidates), ensure_ascii=False))
    elif streaming:
        print()
    else:
        for i, completion in enumerate(best):
            print("" if i == 0 else f"\n{'-' * 40}\n", prompt, completion.text, sep="")
            if flags.best_of > 1:
                print(f"[mean log-probability {completion.mean_logprob:.3f}, the best of {flags.best_of}]")
            if flags.show_probs:
                print(*table(completion, candidates[completion.index], tokenizer), sep="\n")
    if any(completion.finish == "context" for completion in best):
        full = f"the model's context of {model.config.n_positions} tokens is full"
        print(f"note: the text ends here because {full}; a shorter prompt leaves more room", file=sys.stderr)


def read_prompt(path):
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {error.strerror}; give the path of a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: byte {error.start} is not UTF-8; save it as UTF-8") from None


def most_probable(model, logits, settings, n=5):
    """The n most probable tokens of the distribution that is sampled: [(token, probability), ...].

    Temperature 0 leaves nothing to look at, so there it is the model's own distribution.
    """
    logits = model.ops.to_host(logits)[None]  # (1, V)
    probabilities = filtered_probabilities(logits, **settings if settings["temperature"] else {})[0]  # (V,)
    best = np.argsort(-probabilities, kind="stable")[:n]
    return [(int(token), float(probabilities[token])) for token in best if probabilities[token] > 0]


def table(completion, steps, tokenizer):
    """Lines with the candidates of every step; * marks the token that was drawn."""
    lines = ["", "step  the most probable tokens; * was drawn, and stands last if it is none of them"]
    for step, (token, logprob, candidates) in enumerate(zip(completion.ids, completion.logprobs, steps), 1):
        drawn = [] if token in dict(candidates) else [(token, np.exp(logprob))]
        cells = [
            f"{'*' if other == token else ' '}{visible(tokenizer.token_bytes(other)):<14} {p:5.3f}"
            for other, p in candidates + drawn
        ]
        lines.append(f"{step:4}  {'  '.join(cells)}")
    return lines


def visible(token):
    """A token's bytes in quotes, so that spaces, newlines and halves of characters can be seen."""
    try:
        return json.dumps(token.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return str(token)[1:]


def report(flags, checkpoint, prompt, completions, candidates):
    """What --json prints."""
    names = ["num_samples", "best_of", "max_tokens", "temperature", "top_k", "top_p", "min_p", "stop", "seed"]
    fields = ["text", "finish", "ids", "logprobs", "full_logprobs", "mean_logprob"]
    samples = [{name: getattr(completion, name) for name in fields} for completion in completions]
    for sample, completion in zip(samples, completions):
        if flags.show_probs:
            sample["candidates"] = candidates[completion.index]
    settings = {name: getattr(flags, name) for name in names}
    return {"checkpoint": str(checkpoint), "prompt": prompt, "settings": settings, "samples": samples}


if __name__ == "__main__":
    run(main)
