"""From a prompt to a text: probabilities, a biased coin, append, repeat.

generate() is the loop, for a batch of prompts in different states: some rows end, others take in what a tool
says. release() decides what of a text may be shown; load() fetches a model to do it. Read kernels/sampling.py
first, where the coin is thrown; talk.py, sample.py and rl.py, which all use it, after.
"""

import numpy as np

import common
import gpt2
import kernels
from common import UserError
from tokenizer import Tokenizer

SEED = 42  # of who asks for none: what is repeated says the same


def load(directory, flags):
    """Checkpoint, tokenizer and model of a run; and whether it is an assistant: sft.py and rl.py say so.

    flags.device and flags.dtype say where it shall compute, and in which numbers.
    """
    checkpoint = common.newest_checkpoint(directory)
    tokenizer = Tokenizer.load(checkpoint)
    model = gpt2.GPT2.from_pretrained(checkpoint, *kernels.choose(flags.device, flags.dtype))
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{checkpoint}: tokenizer.json has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; put the tokenizer there that the model was trained with"
        )
    has_state = (checkpoint / "state.json").is_file()  # a directory of Hugging Face's has none
    return checkpoint, tokenizer, model, has_state and "stage" in common.read_state(checkpoint)


class Completion:
    """What a prompt has become: a row of the batch, first while it grows and then as the result."""

    def __init__(self, index, prompt, stream, characters):
        self.index, self.prompt, self.stream = index, prompt, stream
        self.characters = characters  # the tokenizer's decoder for this row: whole characters only
        self.ids = []  # the tokens, drawn or forced; a stop token is the last of them
        self.forced = []  # of each, whether on_token() put it there: the output of a tool
        self.pending = []  # tokens still to be forced
        self.logprobs = []  # of each, under exactly the distribution that it was drawn from; 0 if forced
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
        return sum(self.full_logprobs) / (len(self.full_logprobs) - sum(self.forced))

    def take(self, token, logprob, full_logprob, stop_tokens, stop_texts, max_tokens, n_positions):
        """Append a token, or the first pending one in its place; return the text that may now be shown."""
        forced = bool(self.pending)
        if forced:  # it stops nothing: what it says is not the model's
            token, logprob, full_logprob, stop_tokens, stop_texts = self.pending.pop(0), 0.0, 0.0, (), ()
        self.ids.append(token)
        self.forced.append(forced)
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
    stop_tokens=(), stop_texts=(), tokenizer=None, streams=None, on_token=None, allowed=None,
):  # fmt: skip
    """Continue every prompt (a list of token ids, at least one) and return a Completion for each, in order.

    A row's random numbers depend on the seed, on its stream (its number in the batch, unless `streams` says
    otherwise) and on the position alone: finished rows are dropped from the batch, and equal prompts are read
    once, without changing anybody's samples. With a tokenizer the completions have text, and stop_texts work.

    on_token(completion, shown, logits) is called after every token, with the text that may now be shown and
    the row's logits (V,) on the device. If it returns a list of ids, these follow in this row instead of what
    is drawn: they count as tokens of the completion, but none of them stops it.
    allowed(completion) is called before a token is drawn; it returns which tokens may be, (V,) of bool, or
    None for all of them.
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
        if allowed:
            logits = restricted(ops, logits, [None if row.pending else allowed(row) for row in active])
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
                row.pending += on_token(row, shown, logits[i]) or []

        going = [i for i, row in enumerate(active) if row.finish is None]
        if not going:
            return rows
        if len(going) < len(active):
            cache.select(going)
            active = [active[i] for i in going]
        logits = model.decode([row.ids[-1:] for row in active], cache)  # (B, V)


def restricted(ops, logits, masks):
    """Logits (B, V) of which every row keeps what its mask (V,) allows, or all if that is None."""
    logits = ops.to_host(logits)  # ours: decode() has made them for us
    for row, mask in zip(logits, masks):
        if mask is not None:
            if not mask.any():
                raise ValueError("allowed() leaves no token to draw")
            row[~mask] = -np.inf
    return ops.to_device(logits)
