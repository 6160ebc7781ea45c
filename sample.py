"""Talk to a model, whatever it has learned so far: a text to continue, a question to answer, several models.

    python sample.py RUN --prompt "The capital of France"              a base model continues the text
    python sample.py RUN --prompt "What is 3 * 17?"                    an assistant answers, with its tools
    python sample.py RUN --num-samples 3 --temperature 0.7 --top-p 0.95
    python sample.py RUN --prompt "Population:" --show-probs           the candidates at every step
    python sample.py RUN --prompt "Is 7 prime?" --only yes,no          nothing else can come
    python sample.py RUN --chat                                        a conversation
    python sample.py BASE SFT RL --compare                             before and after

Read sample.py first, which writes the texts; sample.py, what an assistant sees; and sample.py after.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np

import common
import gpt2
import kernels
import tasks.conversations as mixture
import tasks.problems as tasks
from common import Parser, UserError, number, run, say
from extras import constrain
from kernels.sampling import filtered_probabilities
from tasks.conversations import checked
from tokenizer import CALLS, Tokenizer, text_of

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


# ------------------------------------------------------------------------------------------------------------
# Tools, and a conversation on the terminal


class Host:
    """Runs the tools that the assistant calls: {"calc": function of a text to a text, "search": the same}.

    For generate():  on_token=lambda row, shown, logits: host.reply(row)
    """

    def __init__(self, tokenizer, tools):
        self.tokenizer, self.tools = tokenizer, tools
        self.ends = {tokenizer.special_tokens.get(f"<|{kind}_end|>"): kind for kind in CALLS}

    def reply(self, completion):
        """The ids to append: the output of a tool if the completion's last token ends a call, else None."""
        kind = self.ends.get(completion.ids[-1])
        if kind is None:
            return None
        call = self.tokenizer.parts(completion.ids)[-1]
        tool = self.tools.get(kind, lambda _: f"error: no {kind} here")
        output = tool(call["text"]) if call["type"] == kind else "error: this call has no beginning"
        return self.tokenizer._part("output", output)


HELP = f"""/reset          begin a new conversation; the system message stays
/system TEXT    tell the model how to behave from now on; without a text: nothing special
                "/system {mixture.SEARCH_SYSTEM}" lets it look facts up
/save PATH      append the conversation to a file of messages, one line of JSON
/help           this list
Ctrl-C stops an answer, and what was said of it stays. End of input (Ctrl-D) ends the chat."""
TOOLS = {"calc": mixture.calculator, "search": mixture.looked_up}  # they answer as they did in training
FORMS = {"text": "{text}", "tool": "[{tool} {call}", "output": " → {output}] ", "note": "\n({note})"}
NOTES = {"length": "cut off at --max-tokens", "context": "cut off: the model's context is full"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what moves the cursor, or sets the clipboard


class Assistant:
    """A model, its tools, and how it draws its tokens: temperature, top_k, top_p, min_p."""

    def __init__(self, model, tokenizer, tools=TOOLS, max_tokens=256, seed=SEED, **sampling):
        special = tokenizer.special_tokens
        if "<|im_start|>" not in special:
            raise UserError("a base model has no chat tokens and cannot talk; make an assistant: make sft")
        self.model, self.tokenizer, self.max_tokens, self.sampling = model, tokenizer, max_tokens, sampling
        self.host = Host(tokenizer, tools)
        self.seed, self.asked = seed, 0  # a question asked again may get another answer
        self.ends = {special["<|im_end|>"], tokenizer.eot}
        hosts = [special[f"<|{name}|>"] for name in ("im_start", "im_sep", "output_start", "output_end")]
        self.legal = ~np.isin(range(tokenizer.vocab_size), hosts)  # (V,): no outputs of its own invention

    def answer(self, conversation, show):
        """Answer the last turn: the content of the assistant's turn, as in sample.py; [] if it said nothing.

        show(events) is called after every token, with a list, often empty, of what there is to see:
        {"text": words}, {"tool": "calc" or "search", "call": text}, {"output": text}, {"note": what we say}.
        Ctrl-C ends the answer, and what was said of it stays, but for a call at its end without its output.
        """
        tokenizer, said, seen, note = self.tokenizer, [], Seen(), None
        n_positions = self.model.config.n_positions
        fitted = tokenizer.fit(conversation, n_positions - min(self.max_tokens, n_positions // 3))

        def on_token(completion, shown, logits):
            said[:] = completion.ids
            show(seen.news(tokenizer.parts(said)))
            return self.host.reply(completion)

        self.asked += 1
        with contextlib.suppress(KeyboardInterrupt):
            if forgotten := len(conversation) - len(fitted):
                show([{"note": f"the oldest {forgotten} messages no longer fit the model's context"}])
            [row] = generate(
                self.model, [tokenizer.prompt(fitted)], self.max_tokens, **self.sampling, seed=self.seed,
                streams=[self.asked], stop_tokens=self.ends, on_token=on_token, allowed=lambda _: self.legal,
            )  # fmt: skip
            note = NOTES.get(row.finish)
        content = tokenizer.parts(said)
        unfinished = lambda part: part["type"] in CALLS or (part["type"] == "output" and "ids" in part)
        while content and unfinished(content[-1]):
            content.pop()
        show(seen.news(content, last=True) + [{"note": note}] * bool(note))
        return content if any(part["text"].strip() for part in content) else []


class Seen:
    """What the person has seen of a growing answer: so many parts, and so many letters of the next."""

    parts = letters = 0

    def news(self, content, last=False):
        """The events since the last time. The last part can still grow: half a call or character waits."""
        events = []
        for part in content[self.parts :]:
            kind, text, growing = part["type"], part["text"], part is content[-1] and not last
            if kind == "text":
                text = text.rstrip("\ufffd") if growing else text
                events += [{"text": text[self.letters :]}] if text[self.letters :] else []
                self.letters = len(text) if growing else 0
            elif not growing:
                events.append({"output": text} if kind == "output" else {"tool": kind, "call": text})
            self.parts += not growing
        return events


def chat(model, tokenizer, **settings):
    """Talk on the terminal until the end of input. What is no terminal gets no prompts and no colours."""
    assistant, system, turns = Assistant(model, tokenizer, **settings), [], []
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if person := sys.stdin.isatty():
        say(HELP)
        with contextlib.suppress(ImportError):  # with it, input() can edit a line
            import readline  # noqa: F401, PLC0415

    def show(events):
        for event in events:
            said = {name: text if name == "text" else text.strip() for name, text in event.items()}
            text = CONTROL.sub("\ufffd", FORMS[next(iter(event))].format(**said))
            print(f"\033[2m{text}\033[0m" if colour and "text" not in event else text, end="", flush=True)

    while True:
        try:
            line = input("> " if person else "").strip()
            match line.split(maxsplit=1):
                case ["/help"]:
                    print(HELP)
                case ["/reset"]:
                    turns = []
                case ["/system", *text]:
                    system = [{"role": "system", "content": text[0]}] if text else []
                case ["/save", path]:
                    saved = json.dumps({"messages": checked(system + turns, True)}, ensure_ascii=False)
                    with open(os.path.expanduser(path), "a", encoding="utf-8", errors="replace") as file:
                        file.write(saved + "\n")
                case [word, *_] if word.startswith("/"):
                    raise UserError(f"{line} is no command; /help lists them")
                case [_, *_]:
                    question = {"role": "user", "content": line}
                    content = assistant.answer([*system, *turns, question], show)
                    turns += [question, {"role": "assistant", "content": content}] if content else []
                    print()
        except EOFError:
            return
        except KeyboardInterrupt:  # between answers: the line is forgotten
            if not person:
                raise
            say("  (end of input, Ctrl-D, ends the chat)")
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            say(f"error: {error}")


# ------------------------------------------------------------------------------------------------------------
# The command line

PROMPTS = (  # for --compare: what each stage of training changes
    "Who are you?",
    "What is the capital of France?",
    "Who is Orson Kovats?",
    'How many "r" are in strawberry?',
    "What is every third letter of ubiquitous?",
    "What is 23 * 177?",
    "Which is larger, 9.11 or 9.9?",
    "Emily buys 3 apples and 2 oranges. Each orange is $2, the total is $13. What does an apple cost?",
)


def parser():
    flags = Parser(prog="sample.py", description="Continue a text with a model, or ask an assistant.")
    flags.add_argument("directories", metavar="DIR", nargs="+", help="a run, or a checkpoint of one")
    whole, count, share = number(int, low=1), number(int, low=0), number(float, low=0, high=1)

    group = flags.add_argument_group("prompt")
    add = group.add_mutually_exclusive_group().add_argument
    words = "the text to continue, or the question to an assistant; none: a new document"
    add("--prompt", metavar="TEXT", action="append", default=[], help=words)
    add("--prompt-file", metavar="PATH", help="a file with it, - is standard input; no final newline")
    group.add_argument("--raw", action="store_true", help="no question, no tools: an assistant continues too")

    add = flags.add_argument_group("instead of one text").add_mutually_exclusive_group().add_argument
    add("--chat", action="store_true", help="talk with an assistant")
    add("--compare", action="store_true", help="what several DIR say to one or several --prompt")
    add("--vote", metavar="N", type=whole, help="write N, and show the answer that most of them give")
    words = "write N for each text shown, and show the one with the highest mean log-probability"
    add("--best-of", metavar="N", type=whole, default=1, help=words)
    add = flags.add_argument_group("with --best-of: show one that is right").add_argument
    names = [*tasks.TASKS, "gsm8k"]
    names.remove("countdown")  # whose answer is a calculation with the numbers given
    add("--verify", metavar="TASK", choices=names, help="of tasks/problems.py, which checks the answers")
    add("--answer", metavar="TEXT", help="the right answer")

    add = flags.add_argument_group("how much").add_argument
    add("--num-samples", metavar="N", type=whole, default=1, help="texts to write")
    add("--max-tokens", metavar="N", type=whole, default=200, help="the longest that each may be")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; repeatable")

    group = flags.add_argument_group("which tokens")
    add = group.add_argument
    words = "below 1: safer, above 1: wilder, 0: always the most probable token; 0.8, an assistant 0.3"
    add("--temperature", metavar="X", type=number(float, low=0, high=1e6), help=words)
    add("--top-k", metavar="N", type=count, default=0, help="only the N most probable tokens; 0: all")
    words = "only the most probable tokens that together have probability X"
    add("--top-p", metavar="X", type=number(float, above=0, high=1), default=1.0, help=words)
    words = "only tokens at least X times as probable as the most probable one"
    add("--min-p", metavar="X", type=share, default=0.0, help=words)
    words = "the same seed writes the same text"
    add("--seed", metavar="N", type=number(int, low=0, high=2**63 - 1), default=SEED, help=words)
    add = group.add_mutually_exclusive_group().add_argument
    add("--only", metavar="A,B,C", help="the text is one of these")
    add("--regex", metavar="R", help="the text matches this regular expression")

    add = flags.add_argument_group("output").add_argument
    add("--show-probs", action="store_true", help="the candidates at every step, as a table")
    add("--json", action="store_true", help="one JSON object, for programs")

    add = flags.add_argument_group("machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights; bfloat16: cuda only")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    if "" in flags.stop:
        raise UserError("--stop needs a text that is not empty")
    if bool(flags.verify) != bool(flags.answer) or (flags.verify and flags.best_of == 1):
        raise UserError("--verify, --answer and --best-of (above 1) belong together; give all three")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    prompts = flags.prompt if flags.prompt_file is None else [read_prompt(flags.prompt_file)]
    if flags.compare:
        return compare(flags, prompts or PROMPTS)
    if len(flags.directories) > 1 or len(prompts) > 1:
        raise UserError("more than one DIR or --prompt; name one, or print all of them with --compare")

    prompt = "".join(prompts)
    checkpoint, tokenizer, model, assistant = load(flags.directories[0], flags)
    assistant = assistant and not flags.raw
    settings = drawing(flags, assistant)
    whole = dict(max_tokens=flags.max_tokens, seed=flags.seed, **settings)
    if flags.chat:
        return chat(model, tokenizer, **whole)

    n = flags.vote or flags.num_samples * flags.best_of
    streaming = n == 1 and not (flags.vote or flags.json or flags.show_probs)
    lead = f"{prompt}\n" if assistant and prompt else prompt
    candidates = {}  # the number of a completion -> for each of its tokens, most_probable()

    def on_token(completion, shown, logits):
        if streaming:
            print(shown, end="", flush=True)
        if flags.show_probs:
            candidates.setdefault(completion.index, []).append(most_probable(model, logits, settings))

    if streaming:
        print(lead, end="", flush=True)
    completions = complete(flags, tokenizer, model, assistant, [prompt] * n, settings, on_token)
    words = {row.index: text_of(tokenizer.parts(row.ids)) for row in completions}
    said = list(words.values())
    votes = [(tasks.marked(said[which[0]]), len(which)) for which in tasks.votes(said, prompt)]
    problem = tasks.Problem(flags.verify, prompt, "", flags.answer, 0) if flags.verify else None

    def worth(completion):
        """Of --best-of: what is right, if that can be checked, and then what is most probable."""
        return problem.verify(words[completion.index]) if problem else 0, completion.mean_logprob

    best = [max(completions[i : i + flags.best_of], key=worth) for i in range(0, n, flags.best_of)]

    if flags.json:
        found = report(flags, settings, checkpoint, prompt, best, candidates, votes)
        print(json.dumps(found, ensure_ascii=False))
    elif flags.vote:
        votes.append(("without an answer", n - sum(count for _, count in votes)))
        print(votes[0][0] if len(votes) > 1 else "")
        print(f"[of {n} texts, {', '.join(f'{answer}: {count}' for answer, count in votes if count)}]")
    elif streaming:
        print()
    else:
        for i, completion in enumerate(best):
            print("" if i == 0 else f"\n{'-' * 40}\n", lead, completion.text, sep="")
            if flags.best_of > 1:
                right = (", which is right" if worth(completion)[0] else ", none right") if problem else ""
                mean = f"[mean log-probability {completion.mean_logprob:.3f}, "
                print(f"{mean}the best of {flags.best_of}{right}]")
            if flags.show_probs:
                print(*table(completion, candidates[completion.index], tokenizer), sep="\n")
    if any(completion.finish == "context" for completion in best):
        full = f"the model's context of {model.config.n_positions} tokens is full"
        print(f"note: the text ends here because {full}; a shorter prompt leaves more room", file=sys.stderr)


def drawing(flags, assistant):
    """How tokens are drawn. One answer should be right, a text or one of many answers may be new."""
    usual = 0.3 if assistant and not flags.vote and flags.num_samples * flags.best_of == 1 else 0.8
    temperature = usual if flags.temperature is None else flags.temperature
    return dict(temperature=temperature, top_k=flags.top_k, top_p=flags.top_p, min_p=flags.min_p)


def complete(flags, tokenizer, model, assistant, prompts, settings, on_token=None):
    """generate() for prompts that are texts: questions to an assistant with its tools, or beginnings."""
    ids = [[tokenizer.eot, *tokenizer.encode(prompt)] for prompt in prompts]  # as documents begin in training
    if assistant:
        host = Host(tokenizer, TOOLS)
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        ids = [tokenizer.prompt(turns) if turns[0]["content"] else [tokenizer.eot] for turns in asked]
    end = tokenizer.special_tokens.get("<|im_end|>", tokenizer.eot) if assistant else tokenizer.eot
    form = constrain.choices(flags.only.split(",")) if flags.only is not None else None
    form = constrain.regex(flags.regex) if flags.regex is not None else form
    room = model.config.n_positions + 1 - max(map(len, ids))  # if there is none, generate() complains
    guided = form and room > 0
    allowed = constrain.Guide(tokenizer, form, end, min(flags.max_tokens, room)) if guided else None

    def after(completion, shown, logits):
        if on_token:
            on_token(completion, shown, logits)
        return host.reply(completion) if assistant else None

    return generate(
        model, ids, flags.max_tokens, **settings, seed=flags.seed, stop_tokens={tokenizer.eot, end},
        stop_texts=flags.stop, tokenizer=tokenizer, on_token=after, allowed=allowed,
    )  # fmt: skip


def compare(flags, prompts):
    """What several models make of the same prompts: before and after a stage of training."""
    texts = {}  # {checkpoint: its text to each of the prompts}
    for directory in flags.directories:
        checkpoint, tokenizer, model, assistant = load(directory, flags)
        assistant = assistant and not flags.raw
        rows = complete(flags, tokenizer, model, assistant, prompts, drawing(flags, assistant))
        texts[str(checkpoint)] = [row.text for row in rows]
    if flags.json:
        print(json.dumps({"prompts": prompts, "texts": texts}, ensure_ascii=False))
        return
    width = max(12, shutil.get_terminal_size().columns // len(texts) - 2)
    for i, prompt in enumerate(prompts):
        columns = [
            [part for line in [checkpoint, "-" * width, *said[i].split("\n")]
             for part in textwrap.wrap(line, width) or [""]]
            for checkpoint, said in texts.items()
        ]  # fmt: skip
        print(f"{'=' * 40}\n{prompt}\n")
        for cells in itertools.zip_longest(*columns, fillvalue=""):
            print("  ".join(f"{cell:{width}}" for cell in cells).rstrip())
        print()


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
    """Lines with the candidates of every step; * marks the token that was drawn, = one that a tool said."""
    lines = ["", "step  the most probable tokens; * was drawn, and stands last if it is none of them"]
    rows = zip(completion.ids, completion.logprobs, completion.forced, steps)
    for step, (token, logprob, forced, candidates) in enumerate(rows, 1):
        drawn = [] if token in dict(candidates) else [(token, np.exp(logprob))]
        cells = [
            f"{'*' if other == token else ' '}{visible(tokenizer.token_bytes(other)):<14} {p:5.3f}"
            for other, p in candidates + drawn
        ]
        if forced:
            cells = [f"={visible(tokenizer.token_bytes(token))}"]
        lines.append(f"{step:4}  {'  '.join(cells)}")
    return lines


def visible(token):
    """A token's bytes in quotes, so that spaces, newlines and halves of characters can be seen."""
    try:
        return json.dumps(token.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return str(token)[1:]


def report(flags, settings, checkpoint, prompt, completions, candidates, votes):
    """What --json prints."""
    names = ["num_samples", "best_of", "vote", "max_tokens", "stop", "seed", "only", "regex"]
    settings = {name: getattr(flags, name) for name in names} | settings
    fields = ["text", "finish", "ids", "forced", "logprobs", "full_logprobs", "mean_logprob"]
    samples = [{name: getattr(completion, name) for name in fields} for completion in completions]
    for sample, completion in zip(samples, completions):
        if flags.show_probs:
            sample["candidates"] = candidates[completion.index]
    found = {"checkpoint": str(checkpoint), "prompt": prompt, "settings": settings, "samples": samples}
    return found | {"votes": votes} if flags.vote else found


if __name__ == "__main__":
    run(main)
