"""Attempts: what a model does with problems, how probable it was, how much of it was right.

    python rl.py --eval runs/rl --task word --level 1-4     prints what evaluate() finds

rl.py learns from attempts, extras/rlhf.py has them judged. Read tasks/problems.py (problems, verifiers),
sample.py and batches.py first.
"""

import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import batches
import common
import distributed
import gpt2
import kernels
import tasks.conversations as mixture
import tasks.problems as tasks
from common import UserError
from sample import Host, generate
from tokenizer import Tokenizer, text_of, visible

ROWS = 256  # attempts in a batch, at most


@dataclass
class Attempt:
    """What the model did with a problem once."""

    problem: tasks.Problem
    said: list  # the ids of its reply
    parts: list  # the same as parts of a turn, see sample.py
    tokens: np.ndarray  # (T,) int32, prompt and reply
    drawn: np.ndarray  # (T,) bool: the model chose it, as the end token; not the prompt, not a tool's output
    logprobs: np.ndarray  # (T,) of what was drawn, when it was drawn; else 0
    correct: float  # says the verifier
    reward: float  # what training is after: the same, or what a reward model says
    advantage: float = 0.0


def sample(model, tokenizer, problems, each, max_tokens, seed, first=0, temperature=1.0):
    """A group of `each` attempts at every problem, sampled in one batch, in which a prompt is read once.

    Tokens are drawn from exactly the distribution that training scores: temperature 1, nothing filtered. The
    random numbers depend on the seed and on the attempt's number, counted from `first`. What was cut off is
    wrong, whatever it says: half an answer may be right by accident.
    """
    ends = {tokenizer.eot, tokenizer.encode_special("<|im_end|>")}
    host = Host(tokenizer, {"calc": mixture.calculator, "search": mixture.looked_up})
    prompts = [ids for problem in problems for ids in [prompt_of(tokenizer, problem)] * each]
    rows, found = [], []
    for i in range(0, len(prompts), ROWS):
        rows += generate(
            model, prompts[i : i + ROWS], max_tokens, temperature, seed=seed, stop_tokens=ends,
            streams=range(first + i, first + len(prompts)), on_token=lambda row, *_: host.reply(row),
        )  # fmt: skip
    for i, row in enumerate(rows):
        problem, parts = problems[i // each], tokenizer.parts(row.ids)
        correct = float(row.finish == "stop" and problem.verify(text_of(parts)))
        tokens, n = np.array(row.prompt + row.ids, np.int32), len(row.ids)
        drawn, logprobs = np.zeros(len(tokens), bool), np.zeros(len(tokens))  # (T,)
        drawn[-n:], logprobs[-n:] = np.logical_not(row.forced), row.logprobs
        found.append(Attempt(problem, row.ids, parts, tokens, drawn, logprobs, correct, correct))
    return [found[i : i + each] for i in range(0, len(found), each)]


def prompt_of(tokenizer, problem):
    return tokenizer.prompt(mixture.turns(problem.prompt))


def fitting(model, tokenizer, problems):
    """Those of some problems whose prompts leave room for an answer; UserError if not one of 100 does."""
    fits, room = False, model.config.n_positions
    for i, problem in enumerate(problems):
        if len(prompt_of(tokenizer, problem)) < room:
            fits = True
            yield problem
        elif i >= 100 and not fits:
            break
    if not fits:
        what = f"the prompts of {problem.task} fill the model's context of {room} tokens"
        raise UserError(f"{what}; lower --level, or train a model with more --n-positions")


def shared_out(team, problems, each, max_tokens, seed, first=0, temperature=1.0):
    """sample() by all processes: the same ones, as an attempt's number gives its random numbers."""
    cuts = [len(problems) * i // team.size for i in range(team.size + 1)]
    shares = [
        (problems[a:b], each, max_tokens, seed, first + a * each, temperature)
        for a, b in itertools.pairwise(cuts)
    ]
    return list(itertools.chain(*team.run("sample", [share for share in shares if share[0]])))


def log_probabilities(model, some, most):
    """For each attempt log p of every token given those before it, (T,), 0 for the first."""
    order = sorted(range(len(some)), key=lambda i: len(some[i].tokens))  # as micro_batches() will have them
    rows, found = [(some[i].tokens, some[i].drawn) for i in order], []
    for tokens, targets, _ in batches.micro_batches(rows, most, model.config.n_positions):
        found += list(-model.ops.to_host(model.losses(tokens, targets)))
    found = dict(zip(order, found))
    return [np.append(0.0, found[i][: len(a.tokens) - 1]) for i, a in enumerate(some)]


def mean(values):
    return float(np.mean(list(values)))


def pass_at_k(n, correct, k):
    """The chance that one of k attempts is right, if `correct` of n were; unbiased (Chen et al. 2021)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(group):
    """1.0 if the answer that most attempts give, the first of equals, is right."""
    texts = [text_of(attempt.parts) for attempt in group]
    votes = tasks.votes(texts, group[0].problem.prompt)
    return group[0].problem.verify(texts[votes[0][0]]) if votes else 0.0


def evaluate(team, tokenizer, mix, flags, judge):
    """[{what: measure}] on test problems of each (task, level): pass@1 is greedy, the rest of --k samples,
    which judge(groups) may add its own to. No problem comes twice: easy levels may have fewer than asked."""
    results, line, k = [], common.Line(), flags.k
    for task, level in mix:
        line.show(f"evaluating {task}, level {level}")
        stream = fitting(team.model, tokenizer, tasks.problems(task, "test", level, flags.seed))
        different = {}
        for problem in itertools.islice(stream, 20 * flags.eval_problems):
            different.setdefault((problem.prompt, problem.answer), problem)
            if len(different) == flags.eval_problems:
                break
        problems = list(different.values())
        ask = lambda each, t, some=problems: shared_out(team, some, each, flags.max_tokens, flags.seed, 0, t)
        greedy, groups = [group[0] for group in ask(1, 0.0)], ask(k, 1.0)
        right = [sum(attempt.correct > 0 for attempt in group) for group in groups]
        found = {"task": task, "level": level, "problems": len(problems)}
        found |= {"pass@1": mean([a.correct for a in greedy]), "sampled": mean(right) / k}
        found |= {
            f"pass@{n}": mean([pass_at_k(k, c, n) for c in right]) for n in range(2, k + 1) if k % n < 1
        }
        found |= {f"vote@{k}": mean([*map(majority, groups)]), "length": mean([len(a.said) for a in greedy])}
        found |= {"sampled length": mean([len(a.said) for group in groups for a in group])}
        results.append(found | judge(groups))
    line.clear()
    return results


def table(results):
    """Results as lines: one for each task and level."""
    forms = {"length": ".1f", "sampled length": ".1f", "reward": ".2f"}  # the others are shares
    form = lambda name, value: f"{value:{forms.get(name, '.1%')}}" if isinstance(value, float) else str(value)
    cells = [list(results[0]), *([form(n, v) for n, v in row.items()] for row in results)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for row in cells)


def show(tokenizer, group):
    """A problem, its answer and the attempts: green (or +) what is right, red (or -) what is wrong; before
    it the reward, if that is another."""
    lines = [f"{group[0].problem.prompt}  ({group[0].problem.answer})"]
    for attempt in group:
        text = visible(b"".join(map(tokenizer.token_bytes, attempt.said)))
        text = text if attempt.reward == attempt.correct else f"{attempt.reward:.2f} {text}"
        colour, sign = ("\033[32m", "+") if attempt.correct > 0 else ("\033[31m", "-")
        lines.append(f"{colour}{text}\033[0m" if common.colour() else f"{sign} {text}")
    return "\n".join(lines)


def export(path, groups, run, step):
    """Append the right attempts, each text once, as conversations for sft.py: a line each."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for one in (one for g in groups for one in {tuple(a.said): a for a in g if a.correct > 0}.values()):
            said = [{"type": part["type"], "text": part["text"]} for part in one.parts]
            messages = mixture.turns(one.problem.prompt, said if len(said) > 1 else text_of(said))
            file.write(json.dumps({"messages": messages, "run": Path(run).name, "step": step}) + "\n")


def forget(path, run, step):
    """Take out of PATH what a run exported after its checkpoint, before it was killed: it comes again."""
    if not Path(path).exists():
        return
    lines = Path(path).read_bytes().splitlines(keepends=True)
    origin = re.compile(rb'"run": %b, "step": (\d+)}\n' % re.escape(json.dumps(Path(run).name).encode()))
    later = lambda line: (found := origin.search(line)) and int(found[1]) > step
    whole = (line for line in lines if line.endswith(b"\n"))
    common.write_whole(path, b"".join(line for line in whole if not later(line)))


def shares(spec, level):
    """{(task, level): share} of --task and --level; "word=2,arithmetic" at "1-3" are six."""
    found, span = {}, re.fullmatch(r"(\d\d?)(?:-(\d\d?))?", level or "")
    for name, share in re.findall(r"([^,]+?)(?:=(\d+\.?\d*))?(?:,|$)", spec):
        levels = range(int(span[1]), int(span[2] or span[1]) + 1) if span else tasks.TASKS.get(name, [None])
        for n in levels:
            tasks.problems(name, level=n)  # complains if there is no such task or level
            found[name, n] = float(share or 1) / len(levels)
    if not found or not all(found.values()) or (level and not span):
        raise UserError(
            f"--task {spec}, --level {level or 'all'}: shares as in word=2,spelling=1, levels as in 1-3"
        )
    return found


def load(directory, flags):
    """Model and tokenizer of a run or checkpoint that can talk."""
    tokenizer = Tokenizer.load(checkpoint := common.newest_checkpoint(directory))
    tokenizer.prompt([])  # complains if the model cannot talk
    if (checkpoint / "state.json").is_file() and "stage" not in common.read_state(checkpoint):
        raise UserError(
            f"{checkpoint} is no assistant yet: make one of it with sft.py --init-from {directory}"
        )
    return gpt2.GPT2.from_pretrained(checkpoint, *kernels.choose(flags.device, flags.dtype)), tokenizer


def make_team(model, tokenizer):
    """Processes that can do their shares of sample() and batches.accumulate()."""
    some = lambda model, share: sample(model, tokenizer, *share)
    return distributed.Workers(model, {"accumulate": batches.share_of_rows, "sample": some})
