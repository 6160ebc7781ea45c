"""From logits to text: continue a prompt token by token, ask an assistant, talk with it on the terminal.

    python sample.py RUN --prompt "The capital of France"              a base model continues the text
    python sample.py RUN --prompt "What is 3 * 17?"                    an assistant answers, with its tools
    python sample.py RUN --num-samples 3 --temperature 0.7 --top-p 0.95
    python sample.py RUN --prompt "Population:" --show-probs           the candidates at every step
    python sample.py RUN --prompt "The" --speed                        also says how many tokens a second came
    python sample.py RUN --prompt "What is 3 * 17?" --beams 4          the most probable texts: beam search
    python sample.py RUN --chat                                        a conversation

Sampling alternates two steps: the model reads tokens and returns logits for the next one (all of the prompt
at once, the prefill; then one token at a time, a decode step), and one token is sampled from their softmax.
Read gpt2.py (the key-value cache) and kernels/sampling.py (temperature, top-k, top-p, min-p) before this
file, sft.py after it. In extras/, choose.py takes one of many samples by a vote or a verifier, constrain.py
gives a text its form, and serve.py is a web page to talk with a model.
"""

import codecs
import contextlib
import copy
import json
import operator
import os
import sys
import time
from pathlib import Path

import numpy as np

import common
import gpt2
import hub
import kernels
from common import Parser, UserError, add_shared_flags, number, run, say
from kernels.sampling import filtered_probabilities
from tokenizer import CALLS, Tokenizer, checked, visible
from tools import SEARCH_SYSTEM, TOOLS

SEED = 42  # the default of every function and flag here: the same command prints the same text


def generate(
    model, prompts, max_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=SEED,
    stop_tokens=(), stop_texts=(), tokenizer=None, streams=None, on_token=None, allowed=None,
):  # fmt: skip
    """Continue every prompt (a list of at least one token id); return a Completion for each, in order.

    A random number depends on the seed, on the row's stream (its index in `prompts`, unless `streams` gives
    another) and on the token's position, on nothing else. So a row gets the same tokens whichever rows share
    its batch, and finished rows are dropped from it when they are half of it. With a tokenizer the
    completions have text, and stop_texts end them.

    on_token(completion, shown, logits) is called after every token with the text that may now be shown and
    with the row's logits (V,) on the device. It may return a list of ids, the output of a tool for example.
    They become the row's next tokens in place of sampled ones, and none of them stops it.
    allowed(completion) is called before a token is sampled. It returns a mask (V,) of the tokens that may
    come, or None for all of them.

    UserError if a prompt is longer than the model's context, or if the logits are not finite.
    """
    ops, n_positions = model.ops, model.config.n_positions
    if stop_texts and tokenizer is None:
        raise ValueError("stop_texts need a tokenizer")
    streams = range(len(prompts)) if streams is None else streams
    rows = [Completion(i, list(prompt), streams[i], tokenizer) for i, prompt in enumerate(prompts)]

    began = time.perf_counter()
    batch = rows  # the rows of the cache; more than half of them are not finished
    cache, logits = prefill(model, prompts, max_tokens)  # logits (B, V)
    while True:
        if allowed:
            masks = [None if row.pending or row.finish else allowed(row) for row in batch]  # B masks (V,)
            logits = apply_masks(ops, logits, masks)  # (B, V)
        tokens, logprobs = sample_tokens(ops, logits, batch, seed, temperature, top_k, top_p, min_p)
        seconds = time.perf_counter() - began

        for i, row in enumerate(batch):
            if row.finish:
                continue
            shown = row.append(
                int(tokens[i]), float(logprobs[0, i]), float(logprobs[1, i]),
                stop_tokens, stop_texts, max_tokens, n_positions,
            )  # fmt: skip
            row.seconds.append(seconds)
            if on_token:
                row.pending += on_token(row, shown, logits[i]) or []

        unfinished = [i for i, row in enumerate(batch) if row.finish is None]
        if not unfinished:
            return rows
        if 2 * len(unfinished) <= len(batch):
            cache.select(unfinished)
            batch = [batch[i] for i in unfinished]
        # Finished rows stay in the batch, because a GPU has recorded a step of this size. Nobody reads them.
        cache.restart([i for i, row in enumerate(batch) if row.finish])
        logits = model.decode([row.ids[-1:] for row in batch], cache)  # (B, 1) -> (B, V): a decode step


def sample_tokens(ops, logits, rows, seed, *filters):
    """Sample a token for each row from logits (B, V). Return the tokens (B,) and log-probabilities (2, B):
    those of the tokens under the distribution that the filters leave, and under the model's own."""
    tokens = ops.empty(len(rows), np.int32)  # (B,)
    logprobs = ops.empty((2, len(rows)), logits.dtype)  # (2, B)
    counters = np.array([[row.stream for row in rows], [row.position for row in rows]], np.int64)  # (2, B)
    ops.sample(tokens, logits, seed, *ops.to_device(counters), *filters, logprobs)
    tokens, logprobs = ops.to_host(tokens), ops.to_host(logprobs)
    check_finite(logprobs)
    return tokens, logprobs


def check_finite(values):
    """UserError if not all outputs of the model are finite."""
    if not np.isfinite(values).all():
        raise UserError(
            "the model's outputs are not finite numbers: its training diverged, take an older one"
        )


def prefill(model, prompts, max_tokens):
    """Read the prompts in one forward pass; return the cache of all B rows and the logits (B, V).

    Prompts of different lengths are padded on the right. Equal prompts are read once, and their keys, values
    and logits copied to all rows that share them: many samples of one prompt cost one prefill.
    """
    distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))  # D prompts, in order
    lengths = np.array([len(prompt) for prompt in distinct], np.int32)  # (D,)
    longest, n_positions = int(lengths.max()), model.config.n_positions
    if longest > n_positions:
        raise UserError(
            f"the prompt has {longest} tokens and this model reads at most {n_positions}; shorten the prompt"
        )
    tokens = np.zeros((len(distinct), longest), np.int32)  # (D, T)
    for row, prompt in zip(tokens, distinct):
        row[: len(prompt)] = prompt
    capacity = min(longest + max_tokens - 1, n_positions)  # the last token is never read
    cache = model.new_cache(len(distinct), capacity)
    logits = model.decode(tokens, cache, lengths)  # (D, V)
    if len(distinct) == len(prompts):
        return cache, logits

    index_of = {prompt: i for i, prompt in enumerate(distinct)}
    indices = [index_of[tuple(prompt)] for prompt in prompts]
    cache.select(indices)
    logits_of_rows = model.ops.empty((len(prompts), logits.shape[1]), logits.dtype)  # (B, V)
    model.ops.take_rows(logits_of_rows, logits, model.ops.to_device(np.array(indices, np.int32)))
    return cache, logits_of_rows


def apply_masks(ops, logits, masks):
    """Set logits (B, V) to minus infinity where a row's mask (V,) is False; None leaves a row as it is."""
    logits = ops.to_host(logits)  # (B, V)
    for row, mask in zip(logits, masks):
        if mask is not None:
            if not mask.any():
                raise ValueError("allowed() leaves no token to sample")
            row[~mask] = -np.inf
    return ops.to_device(logits)


def beam_search(
    model, prompt, max_tokens, n_beams, stop_tokens=(), stop_texts=(), tokenizer=None, on_token=None
):
    """Search for the most probable continuations of a prompt; return up to n_beams Completions, best first.

    To take the most probable token at every step need not give the most probable text. Beam search keeps the
    best n_beams beginnings of texts, its beams. A step continues each of them with its n_beams most probable
    tokens; of all that this gives, and of the beams that have ended, it keeps the best n_beams.

    Their score is the mean log-probability of the tokens (Completion.mean_logprob). The sum, which is the
    log-probability of the text, falls with every token, and so would prefer short texts. One beam is greedy
    decoding, as generate() at temperature 0. The other arguments, and the errors, are generate()'s.
    """
    began = time.perf_counter()
    beams = [Completion(0, list(prompt), 0, tokenizer)]
    cache, logits = prefill(model, [prompt], max_tokens)  # a row for each beam that has not ended: (B, V)
    while True:
        growing = [beam for beam in beams if beam.finish is None]  # B beams
        candidates = [(beam.mean_logprob, beam, None, None, None) for beam in beams if beam.finish]
        logprobs = log_softmax(model.ops.to_host(logits))  # (B, V)
        check_finite(logprobs)
        seconds = time.perf_counter() - began
        for row, beam in enumerate(growing):
            for score, token in continuations(beam, logprobs[row], n_beams):
                candidates.append((score, beam, row, token, float(logprobs[row, token])))
        candidates.sort(key=operator.itemgetter(0), reverse=True)  # of equals the first stays the first

        beams, rows = [], []  # rows: for each beam that has not ended, the row of the cache that it continues
        for _, beam, row, token, logprob in candidates[:n_beams]:
            if beam.finish:
                beams.append(beam)
                continue
            longer = beam.copy()
            shown = longer.append(
                token, logprob, logprob, stop_tokens, stop_texts, max_tokens, model.config.n_positions
            )
            longer.seconds.append(seconds)
            if on_token:
                longer.pending += on_token(longer, shown, logits[row]) or []
            if longer.finish is None:
                rows.append(row)
            beams.append(longer)
        if not rows:
            return beams
        cache.select(rows)
        logits = model.decode([beam.ids[-1:] for beam in beams if beam.finish is None], cache)  # (B, V)


def continuations(beam, logprobs, n):
    """[(score, token)] of a beam's n most probable next tokens, whose log-probabilities are logprobs (V,).

    A beam whose next token is pending, as the output of a tool is, has this one continuation and its score.
    """
    if beam.pending:
        return [(beam.mean_logprob, beam.pending[0])]
    total, n_sampled = sum(beam.full_logprobs), len(beam.ids) - sum(beam.forced)
    tokens = np.argsort(-logprobs, kind="stable")[:n]  # (n,)
    return [((total + float(logprobs[token])) / (n_sampled + 1), int(token)) for token in tokens]


def log_softmax(logits):
    """log p (B, V) in float64 of logits (B, V)."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)  # (B, V)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))  # (B, V)


class Completion:
    """A prompt and the tokens that follow it: a row of the batch while it grows, then the result."""

    def __init__(self, index, prompt, stream, tokenizer):
        self.index, self.prompt, self.stream, self.tokenizer = index, prompt, stream, tokenizer
        # A token may end inside a character: the decoder holds its bytes back until that is complete.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.ids = []  # the tokens, sampled or forced; a stop token is the last of them
        self.forced = []  # for each token, whether it came from on_token() (the output of a tool)
        self.pending = []  # tokens from on_token() that are still to be appended
        self.logprobs = []  # of each token under the distribution it was sampled from; 0 if forced
        self.full_logprobs = []  # of each under the model's own, unfiltered softmax; 0 if forced
        self.seconds = []  # from the call of generate() until each token was there
        self.text = ""  # what may be shown: without the stop token or stop text
        self.held = ""  # the end of the text, held back while it could be the beginning of a stop text
        self.finish = None  # "stop", "length" (max_tokens) or "context" (the model's n_positions)

    @property
    def position(self):
        """The number of tokens before the next one; it is also the counter of the next random number."""
        return len(self.prompt) + len(self.ids)

    @property
    def mean_logprob(self):
        """The mean log-probability of the sampled tokens, which compares texts of different lengths."""
        return sum(self.full_logprobs) / (len(self.full_logprobs) - sum(self.forced))

    def copy(self):
        """A copy that grows independently of this one."""
        other = copy.copy(self)
        other.decoder = copy.copy(self.decoder)
        for name in ("ids", "forced", "pending", "logprobs", "full_logprobs", "seconds"):
            setattr(other, name, list(getattr(self, name)))
        return other

    def append(self, token, logprob, full_logprob, stop_tokens, stop_texts, max_tokens, n_positions):
        """Append the sampled token, or the first pending one instead; return the text that may be shown."""
        forced = bool(self.pending)
        if forced:  # the sampled token is discarded, and nothing that a tool writes stops the row
            token, logprob, full_logprob = self.pending.pop(0), 0.0, 0.0
            stop_tokens, stop_texts = (), ()
        self.ids.append(token)
        self.forced.append(forced)
        self.logprobs.append(logprob)
        self.full_logprobs.append(full_logprob)
        if token in stop_tokens:
            self.finish = "stop"
        elif len(self.ids) == max_tokens:
            self.finish = "length"
        elif self.position > n_positions:  # this token no longer fits the context, so nothing can follow it
            self.finish = "context"
        if self.tokenizer is None:
            return ""

        if token not in stop_tokens:
            self.held += self.decoder.decode(self.tokenizer.token_bytes(token))
        if self.finish:
            self.held += self.decoder.decode(b"", final=True)
        shown, self.held, stopped = release(self.held, stop_texts, last=self.finish is not None)
        if stopped:
            self.finish = "stop"
        self.text += shown
        return shown


def speed(completions):
    """The speed of generate(), a dict: tokens, seconds, seconds until the first token, and tokens per second
    after it (None if there are no others)."""
    tokens = sum(len(row.ids) for row in completions)
    first = min(row.seconds[0] for row in completions)
    seconds = max(row.seconds[-1] for row in completions)
    rate = (tokens - len(completions)) / (seconds - first) if seconds > first else None
    return dict(tokens=tokens, seconds=seconds, first_token_seconds=first, tokens_per_second=rate)


def speed_text(completions):
    """speed() as a person reads it: '63 tokens: the first after 12 ms, then 512 a second'."""
    measured = speed(completions)
    n, rate = measured["tokens"], measured["tokens_per_second"]
    text = f"{n} token{'s' * (n > 1)}: the first after {measured['first_token_seconds'] * 1e3:.3g} ms"
    return f"{text}, then {common.count(rate)} a second" if rate else text


def release(text, stop_texts, last):
    """Split text into what may be shown and what is held back; also return whether a stop text was found.

    If the text ends with the beginning of a stop text, this is held back, unless it is the `last` of the
    text. Of several stop texts the one that is complete first counts, so that the result does not depend on
    the pieces in which the text arrives.
    """
    matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in stop_texts if stop in text]
    if matches:  # (end, beginning) of each
        return text[: min(matches)[1]], "", True

    n_held = 0
    if not last:
        for stop in stop_texts:
            for n in range(1, len(stop)):
                if text.endswith(stop[:n]):
                    n_held = max(n_held, n)
    return text[: len(text) - n_held], text[len(text) - n_held :], False


# ------------------------------------------------------------------------------------------------------------
# Tools, and an assistant

NOTES = {"length": "cut off at --max-tokens", "context": "cut off: the model's context is full"}


class Host:
    """Runs the tools an assistant calls. `tools` has a function from text to text for "calc" and "search".

    Give generate() an on_token function that returns host.reply(completion).
    """

    def __init__(self, tokenizer, tools):
        self.tokenizer, self.tools = tokenizer, tools
        # {id of the token that ends a call: "calc" or "search"}; a base model has no such tokens
        self.kinds = {tokenizer.special_tokens.get(f"<|{kind}_end|>"): kind for kind in CALLS}

    def reply(self, completion):
        """The ids of the tool's output if the completion's last token ends a call, else None."""
        kind = self.kinds.get(completion.ids[-1])
        if kind is None:
            return None
        call = self.tokenizer.parts(completion.ids)[-1]
        if call["type"] != kind:
            output = "error: this call has no beginning"
        elif kind not in self.tools:
            output = f"error: no {kind} here"
        else:
            output = self.tools[kind](call["text"])
        special = self.tokenizer.special_tokens
        return [special["<|output_start|>"], *self.tokenizer.encode(output), special["<|output_end|>"]]


class Assistant:
    """A model that answers conversations, its tools and its sampling: temperature, top_k, top_p, min_p.

    With tell_speed every answer ends with a note of how fast it came.
    """

    def __init__(
        self, model, tokenizer, tools=TOOLS, max_tokens=256, seed=SEED, tell_speed=False, **sampling
    ):
        tokenizer.prompt([])  # raises if there are no chat tokens
        special = tokenizer.special_tokens
        self.model, self.tokenizer, self.max_tokens, self.sampling = model, tokenizer, max_tokens, sampling
        self.host = Host(tokenizer, tools)
        self.seed, self.tell_speed = seed, tell_speed
        self.n_answers = 0  # also the random stream of an answer: a repeated question may get another one
        self.stop_tokens = {special["<|im_end|>"], tokenizer.eot}
        # Only the host writes outputs and the headers of turns, so the model may not sample these tokens.
        forbidden = [special[f"<|{name}|>"] for name in ("im_start", "im_sep", "output_start", "output_end")]
        self.mask = ~np.isin(np.arange(tokenizer.vocab_size), forbidden)  # (V,)

    def fitting(self, conversation):
        """The conversation without its oldest turns, as few as possible, so that an answer fits, too."""
        return fit_to_context(self.model, self.tokenizer, conversation, self.max_tokens)

    def answer(self, conversation, show):
        """Answer the last turn. Returns the content of the assistant's turn, [] if there are no words in it.

        show(events) is called after every token with a list of events, often empty: {"text": words},
        {"tool": "calc" or "search", "call": text}, {"output": text}, {"note": a remark of this program}.
        Ctrl-C ends the answer and keeps what has been generated, except a call that has no output yet.
        """
        tokenizer = self.tokenizer
        kept = self.fitting(conversation)
        ids, events, notes = [], AnswerEvents(), []
        if len(kept) < len(conversation) and self.fitting(conversation[:-2]) == conversation[:-2]:
            notes.append({"note": "the oldest messages no longer fit the model's context"})

        def on_token(completion, shown, logits):
            ids[:] = completion.ids  # they outlive the completion when Ctrl-C ends it
            show(events.new(tokenizer.parts(ids)))
            return self.host.reply(completion)

        self.n_answers += 1
        with contextlib.suppress(KeyboardInterrupt):
            [completion] = generate(
                self.model, [tokenizer.prompt(kept)], self.max_tokens, **self.sampling, seed=self.seed,
                streams=[self.n_answers], stop_tokens=self.stop_tokens, on_token=on_token,
                allowed=lambda completion: self.mask,
            )  # fmt: skip
            if completion.finish in NOTES:
                notes.append({"note": NOTES[completion.finish]})
            if self.tell_speed:
                notes.append({"note": speed_text([completion])})

        content = tokenizer.parts(ids)
        while content and is_unfinished(content[-1]):
            content.pop()
        show(events.new(content, complete=True) + notes)
        return content if any(part["text"].strip() for part in content) else []


def fit_to_context(model, tokenizer, conversation, max_tokens):
    """The conversation without its oldest turns, as few as possible; UserError if it never fits.

    It leaves max_tokens of the model's context for the answer, or a third of a small context.
    """
    n_positions = model.config.n_positions
    return tokenizer.fit(conversation, n_positions - min(max_tokens, n_positions // 3))


def is_unfinished(part):
    """Whether the last part of a turn is a call, which has no output then, or half of an output."""
    return part["type"] in CALLS or (part["type"] == "output" and "ids" in part)


class AnswerEvents:
    """Turns a growing answer into events: remembers how much of it has been shown already."""

    def __init__(self):
        self.n_parts = 0  # parts that have been shown completely
        self.n_characters = 0  # characters of the next part, a text, that have been shown

    def new(self, content, complete=False):
        """The events since the last call. While the answer is not `complete` its last part may still grow:
        half a call or half a character waits."""
        events = []
        for i in range(self.n_parts, len(content)):
            kind, text = content[i]["type"], content[i]["text"]
            growing = i == len(content) - 1 and not complete
            if kind == "text":
                if growing:
                    text = text.rstrip("\ufffd")
                if len(text) > self.n_characters:
                    events.append({"text": text[self.n_characters :]})
                self.n_characters = len(text) if growing else 0
            elif not growing:
                events.append({"output": text} if kind == "output" else {"tool": kind, "call": text})
            if not growing:
                self.n_parts += 1
        return events


# ------------------------------------------------------------------------------------------------------------
# A conversation on the terminal

HELP = f"""/reset          begin a new conversation; the system message stays
/system TEXT    tell the model how to behave from now on; without a text: nothing special
                "/system {SEARCH_SYSTEM}" lets it look facts up
/save PATH      append the conversation to a file of messages, one line of JSON
/help           this list
Ctrl-C stops an answer and keeps what was written. End of input (Ctrl-D) ends the chat."""


def chat(model, tokenizer, **settings):
    """Talk on the terminal until the end of input; from a pipe there are no prompts and no colours."""
    assistant, system, turns = Assistant(model, tokenizer, **settings), [], []
    interactive = sys.stdin.isatty()
    if interactive:
        say(HELP)
        with contextlib.suppress(ImportError):  # with it, input() can edit a line
            import readline  # noqa: F401, PLC0415

    while True:
        try:
            line = input("> " if interactive else "").strip()
            match line.split(maxsplit=1):
                case []:
                    continue
                case ["/help"]:
                    print(HELP)
                case ["/reset"]:
                    turns = []
                case ["/system", *text]:
                    asked = [{"role": "system", "content": text[0]}] if text else []
                    system = assistant.fitting(asked)
                case ["/save", path]:
                    saved = json.dumps({"messages": checked(system + turns, True)}, ensure_ascii=False)
                    with open(os.path.expanduser(path), "a", encoding="utf-8", errors="replace") as file:
                        file.write(saved + "\n")
                case [word, *_] if word.startswith("/"):
                    raise UserError(f"{line} is no command; /help lists them")
                case _:
                    question = {"role": "user", "content": line}
                    content = assistant.answer([*system, *turns, question], print_events)
                    if content:
                        turns += [question, {"role": "assistant", "content": content}]
                    print()
        except EOFError:
            return
        except KeyboardInterrupt:  # between two answers: forget the line
            if not interactive:
                raise
            say("  (end of input, Ctrl-D, ends the chat)")
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            say(f"error: {error}")


def print_events(events):
    """Print what Assistant.answer() shows; calls, outputs and notes are faint on a terminal with colours."""
    for event in events:
        match event:
            case {"tool": tool, "call": call}:
                text = f"[{tool} {call.strip()}"
            case {"output": output}:
                text = f" → {output.strip()}] "
            case {"note": note}:
                text = f"\n({note})"
            case {"text": text}:
                pass
        text = common.printable(text)
        faint = common.colour() and "text" not in event
        print(f"\033[2m{text}\033[0m" if faint else text, end="", flush=True)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def load(directory, flags):
    """Model and tokenizer of a run's newest checkpoint (or of a checkpoint), and the checkpoint's path.

    flags.device and flags.dtype say where the model computes and in which number format.
    """
    checkpoint = hub.find_checkpoint(directory)
    tokenizer = Tokenizer.load(checkpoint)
    device, dtype = kernels.choose(flags.device, flags.dtype)
    model = gpt2.GPT2.from_pretrained(checkpoint, device, dtype, own_tokens=tokenizer.vocab_size)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{checkpoint}: tokenizer.json has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; put the tokenizer there that the model was trained with"
        )
    return model, tokenizer, checkpoint


def is_assistant(checkpoint):
    """Whether sft.py or rl.py wrote the checkpoint; a directory from Hugging Face has no state.json."""
    return (checkpoint / "state.json").is_file() and "stage" in common.read_state(checkpoint)


def load_assistant(directory, flags):
    """Model and tokenizer of an assistant; UserError for a base model, which has not learned to chat."""
    model, tokenizer, checkpoint = load(directory, flags)
    tokenizer.prompt([])  # raises if there are no chat tokens
    if (checkpoint / "state.json").is_file() and not is_assistant(checkpoint):
        raise UserError(
            f"{checkpoint} is no assistant yet: make one of it with sft.py --init-from {directory}"
        )
    return model, tokenizer


# ------------------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    flags = parser().parse_args(argv)
    check_flags(flags)
    prompt = read_prompt(flags)
    model, tokenizer, checkpoint = load(flags.directory, flags)
    assistant = is_assistant(checkpoint) and not flags.raw
    settings = settings_of(flags, assistant)
    if flags.beams:
        settings = {"max_tokens": flags.max_tokens, "n_beams": flags.beams}
    if flags.chat:
        return chat(model, tokenizer, tell_speed=flags.speed, **settings)

    streaming = flags.num_samples == 1 and not (flags.json or flags.show_probs or flags.beams)
    heading = f"{prompt}\n" if assistant and prompt else prompt
    candidates = [[] for _ in range(flags.num_samples)]  # of each completion, for each token: most_probable()

    def on_token(completion, shown, logits):
        if streaming:
            print(common.printable(shown), end="", flush=True)
        if flags.show_probs:
            candidates[completion.index].append(most_probable(model, logits, settings))

    if streaming:
        print(heading, end="", flush=True)
    prompts = [prompt] * flags.num_samples
    completions = complete(model, tokenizer, prompts, assistant, on_token, stop_texts=flags.stop, **settings)
    if flags.json:
        report = json_report(flags, settings, checkpoint, prompt, completions)
        if flags.show_probs:
            for sample, steps in zip(report["samples"], candidates):
                sample["candidates"] = steps
        print(json.dumps(report, ensure_ascii=False))
    elif streaming:
        print()
    else:
        for i, completion in enumerate(completions):
            print("" if i == 0 else f"\n{'-' * 40}\n", heading, common.printable(completion.text), sep="")
            if flags.show_probs:
                print_candidates(completion, candidates[i], tokenizer)
            if flags.beams:
                print(f"[mean log-probability {completion.mean_logprob:.3f}]")
    if any(completion.finish == "context" for completion in completions):
        full = f"the model's context of {model.config.n_positions} tokens is full"
        say(f"note: the text ends here because {full}; a shorter prompt leaves more room")
    say_speed(flags, completions)


def parser():
    flags = Parser(prog="sample.py", description="Continue a text with a model, or ask an assistant.")
    add_flags(flags)
    add = flags.add_argument_group("instead of a text").add_argument
    add("--chat", action="store_true", help="talk with an assistant")
    add("--show-probs", action="store_true", help="the candidates at every step, as a table")
    what = "the most probable texts instead of samples, by beam search with N beams"
    add("--beams", type=number(int, low=1), metavar="N", help=what)
    return flags


def check_flags(flags):
    """UserError for flags that do not go with --beams or --chat."""
    if flags.beams:
        refuse(flags, "--beams writes texts for one prompt", "chat", "show_probs", "num_samples")
        refuse(flags, "--beams samples nothing", "temperature", "top_k", "top_p", "min_p", "seed")
    if flags.chat:
        refuse(flags, "--chat asks for each message", "prompt", "prompt_file")
        refuse(flags, "--chat gives one whole answer to a message", "raw", "num_samples", "stop")
        refuse(flags, "--chat writes each answer as it comes", "json", "show_probs")


def refuse(flags, why, *names):
    """UserError if one of the flags of these names is given."""
    defaults = parser().parse_args([flags.directory])
    for name in names:
        if getattr(flags, name) != getattr(defaults, name):
            raise UserError(f"{why}; leave out --{name.replace('_', '-')}")


def add_flags(flags, num_samples=1):
    """The flags of every command that writes texts: this one, extras/choose.py and extras/constrain.py."""
    flags.add_argument("directory", metavar="RUN", help="a run, a checkpoint, or openai-community/gpt2")
    group = flags.add_argument_group("prompt")
    add = group.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", default="", help="text to continue, or question; none: a new document")
    add("--prompt-file", metavar="PATH", help="a file with it, - is standard input; no final newline")
    group.add_argument("--raw", action="store_true", help="continue the text, even with an assistant")

    whole = number(int, low=1)
    add = flags.add_argument_group("how much").add_argument
    add("--num-samples", type=whole, default=num_samples, help="texts to write")
    add("--max-tokens", type=whole, default=200, help="the longest that each may be")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")

    add = flags.add_argument_group("sampling").add_argument
    words = "below 1: safer, above 1: wilder, 0: always the most probable token; 0.8, an assistant 0.3"
    add("--temperature", type=number(float, low=0, high=1e6), help=words)
    add("--top-k", type=number(int, low=0), default=0, help="only the N most probable; 0: all")
    words = "only the most probable tokens that together have probability X"
    add("--top-p", type=number(float, above=0, high=1), default=1.0, help=words)
    words = "only tokens at least X times as probable as the most probable one"
    add("--min-p", type=number(float, low=0, high=1), default=0.0, help=words)
    add("--seed", type=number(int, 0, 2**63 - 1), default=SEED, help="same seed, same text")

    group = flags.add_argument_group("output and machine")
    group.add_argument("--json", action="store_true", help="one JSON object, for programs")
    words = "say when the first token came and how many a second followed; on a terminal always"
    group.add_argument("--speed", action="store_true", help=words)
    add_shared_flags(group, "device", "dtype")


def read_prompt(flags):
    """The text of --prompt, or of --prompt-file without its final newline."""
    path = flags.prompt_file
    try:
        if path is None:
            return flags.prompt
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except OSError as error:
        raise UserError(f"--prompt-file {path}: {error.strerror}; give the path of a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {path}: byte {error.start} is not UTF-8; save it as UTF-8") from None


def settings_of(flags, assistant):
    """Keyword arguments of generate() from the flags, except stop_texts, which chat() does not take."""
    if "" in flags.stop:
        raise UserError("--stop needs a text that is not empty")
    temperature = flags.temperature
    if temperature is None:
        temperature = default_temperature(assistant, flags.num_samples)
    names = ("max_tokens", "top_k", "top_p", "min_p", "seed")
    return {"temperature": temperature} | {name: getattr(flags, name) for name in names}


def say_speed(flags, completions):
    """Say how fast the texts came, on standard error: with --speed, or to a person at a terminal."""
    if flags.speed or (sys.stderr.isatty() and not flags.json):
        say(speed_text(completions))


def default_temperature(assistant, n):
    """The temperature for n texts: low for the one answer of an assistant, higher where variety is wanted."""
    return 0.3 if assistant and n == 1 else 0.8


def complete(model, tokenizer, prompts, assistant, on_token=None, n_beams=None, **settings):
    """generate() for prompts that are texts: questions to an assistant with its tools, or beginnings of
    documents; beam_search() for a single prompt, if n_beams is given. `settings` are theirs."""
    host = Host(tokenizer, TOOLS)

    def after_token(completion, shown, logits):
        if on_token:
            on_token(completion, shown, logits)
        return host.reply(completion) if assistant else None

    ids = [prompt_ids(tokenizer, prompt, assistant) for prompt in prompts]
    stop_tokens = {tokenizer.eot, end_token(tokenizer, assistant)}
    settings |= dict(stop_tokens=stop_tokens, tokenizer=tokenizer, on_token=after_token)
    if n_beams:
        return beam_search(model, *ids, n_beams=n_beams, **settings)
    return generate(model, ids, **settings)


def prompt_ids(tokenizer, prompt, assistant):
    """The ids the model reads first: a question to an assistant, or the beginning of a document."""
    if assistant and prompt:
        return tokenizer.prompt([{"role": "user", "content": prompt}])
    return [tokenizer.eot, *tokenizer.encode(prompt)]  # documents begin with this token in training


def end_token(tokenizer, assistant):
    """The token that ends a text: the end of a turn or of a document."""
    return tokenizer.encode_special("<|im_end|>") if assistant else tokenizer.eot


def most_probable(model, logits, settings):
    """The five most probable tokens of the distribution that is sampled: [(token, probability), ...].

    At temperature 0, where it has only one token, the model's own distribution stands in for it.
    """
    names = ("temperature", "top_k", "top_p", "min_p")
    filters = {name: settings[name] for name in names} if settings["temperature"] > 0 else {}
    logits = model.ops.to_host(logits)[None]  # (1, V)
    probabilities = filtered_probabilities(logits, **filters)[0]  # (V,)
    order = np.argsort(-probabilities, kind="stable")[:5]  # (5,)
    return [(int(token), float(probabilities[token])) for token in order if probabilities[token] > 0]


def print_candidates(completion, steps, tokenizer):
    """Print the candidates of every step; * marks the token that was sampled, = one from a tool."""
    print("\nstep  the most probable tokens; * was sampled, and stands last if it is none of them")
    for i, candidates in enumerate(steps):
        token, cells = completion.ids[i], []
        if token not in dict(candidates):
            candidates.append((token, np.exp(completion.logprobs[i])))
        for other, p in candidates:
            mark = "*" if other == token else " "
            cells.append(f"{mark}{quoted(tokenizer, other):<14} {p:5.3f}")
        if completion.forced[i]:
            cells = [f"={quoted(tokenizer, token)}"]
        print(f"{i + 1:4}  {'  '.join(cells)}")


def quoted(tokenizer, token):
    """A token in quotes, so that spaces can be seen."""
    return f'"{visible(tokenizer.token_bytes(token))}"'


def json_report(flags, settings, checkpoint, prompt, completions):
    """What --json prints, as a dict."""
    names = ("text", "finish", "ids", "forced", "logprobs", "full_logprobs", "mean_logprob")
    samples = [{name: getattr(completion, name) for name in names} for completion in completions]
    settings = {"num_samples": flags.num_samples, "stop": flags.stop, **settings}
    about = dict(checkpoint=str(checkpoint), prompt=prompt, settings=settings, speed=speed(completions))
    return about | {"samples": samples}


if __name__ == "__main__":
    run(main)
