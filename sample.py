"""Talk to a model, whatever it has learned so far: a text to continue, a question to answer, several models.

    python sample.py RUN --prompt "The capital of France"              a base model continues the text
    python sample.py RUN --prompt "What is 3 * 17?"                    an assistant answers, with its tools
    python sample.py RUN --num-samples 3 --temperature 0.7 --top-p 0.95
    python sample.py RUN --prompt "Population:" --show-probs           the candidates at every step
    python sample.py RUN --prompt "Is 7 prime?" --only yes,no          nothing else can come
    python sample.py RUN --chat                                        a conversation
    python sample.py BASE SFT RL --compare                             before and after

Read generate.py first, which writes the texts; chat.py, what an assistant sees; and talk.py after.
"""

import itertools
import json
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np

import chat
import talk
import tasks.problems as tasks
from common import Parser, UserError, number, run
from extras import constrain, serve
from generate import SEED, generate, load
from kernels.sampling import filtered_probabilities

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
    words = "talk with it on a web page; PORT is 8000, or 0 for any that is free"
    add("--serve", metavar="PORT", type=number(int, 0, 65535), nargs="?", const=8000, help=words)
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
        return talk.chat(model, tokenizer, **whole)
    if flags.serve is not None:
        return serve.serve(model, tokenizer, str(checkpoint), flags.serve, **whole)

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
    words = {row.index: chat.text_of(chat.parts(tokenizer, row.ids)) for row in completions}
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
        host = chat.Host(tokenizer, talk.TOOLS)
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        ids = [chat.prompt(tokenizer, turns) if turns[0]["content"] else [tokenizer.eot] for turns in asked]
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
