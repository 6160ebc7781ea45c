"""Reinforcement learning: the model practises problems whose answers can be checked, and gets better.

    python rl.py --init-from runs/sft --out runs/rl --task word --level 2       practise, and watch it improve
    python rl.py --out runs/rl --resume                                         after Ctrl-C, bit for bit
    python rl.py --eval runs/rl --task word                                     a table of what it can do

Of many attempts at a problem the verifier says which are right. What they did better than their group's mean
becomes more probable, what they did worse less. The loss is train.py's with other weights: advantage / tokens
of the step on what the model chose, 0 on the prompt and on what tools said. That is the policy gradient,
exactly. Read tasks.py (problems and verifiers), generate.py and batches.py first; this is the last stage.
"""

import itertools
import json
import math
import re
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import batches
import chat
import console
import gpt2
import kernels
import mixture
import runs
import tasks
import workers
from console import UserError, duration, number
from generate import generate
from tokenizer import Tokenizer, visible
from train import learning_rate

ROWS = 256  # attempts in a batch, at most
CHECK_EVERY = 20  # steps between two comparisons of the probabilities of sampling and of training
DRIFT = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.2}  # how far they may be apart: rounding, no more


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


def practice(mix, seed):
    """Endless problems to train on, each of a (task, level) drawn by share: the same for the same seed."""
    rng, chances = np.random.default_rng(seed), np.array(list(mix.values())) / sum(mix.values())
    sources = [tasks.problems(name, split="train", level=level, seed=seed) for name, level in mix]
    while True:
        yield next(sources[rng.choice(len(sources), p=chances)])


@dataclass
class Attempt:
    """What the model did with a problem once."""

    problem: tasks.Problem
    said: list  # the ids of its reply
    parts: list  # the same as parts of a turn, see chat.py
    tokens: np.ndarray  # (T,) int32, prompt and reply
    drawn: np.ndarray  # (T,) bool: the model chose it, as the end token; not the prompt, not a tool's output
    logprobs: np.ndarray  # (T,) of what was drawn, when it was drawn; else 0
    correct: float  # says the verifier
    reward: float  # what training is after: the same
    advantage: float = 0.0


def attempts(model, tokenizer, problems, each, max_tokens, seed, first=0, temperature=1.0):
    """A group of `each` attempts at every problem, sampled in one batch, in which a prompt is read once.

    Tokens are drawn from exactly the distribution that training scores: temperature 1, nothing filtered. The
    random numbers depend on the seed and on the attempt's number, counted from `first`. What was cut off is
    wrong, whatever it says: half an answer may be right by accident.
    """
    ends = {tokenizer.eot, tokenizer.encode_special("<|im_end|>")}
    host = chat.Host(tokenizer, {"calc": mixture.calculator, "search": mixture.looked_up})
    prompts = [ids for p in problems for ids in [chat.prompt(tokenizer, mixture.turns(p.prompt))] * each]
    if (longest := max(map(len, prompts))) >= model.config.n_positions:
        what = f"a prompt has {longest} tokens and fills the model's context of {model.config.n_positions}"
        raise UserError(f"{what}; lower --level, or train a model with more --n-positions")
    rows, found = [], []
    for i in range(0, len(prompts), ROWS):
        rows += generate(
            model, prompts[i : i + ROWS], max_tokens, temperature, seed=seed, stop_tokens=ends,
            streams=range(first + i, first + len(prompts)), on_token=lambda row, *_: host.reply(row),
        )  # fmt: skip
    for i, row in enumerate(rows):
        problem, parts = problems[i // each], chat.parts(tokenizer, row.ids)
        correct = float(row.finish == "stop" and problem.verify(chat.text_of(parts)))
        tokens, n = np.array(row.prompt + row.ids, np.int32), len(row.ids)
        drawn, logprobs = np.zeros(len(tokens), bool), np.zeros(len(tokens))  # (T,)
        drawn[-n:], logprobs[-n:] = np.logical_not(row.forced), row.logprobs
        found.append(Attempt(problem, row.ids, parts, tokens, drawn, logprobs, correct, correct))
    return [found[i : i + each] for i in range(0, len(found), each)]


def shared_out(team, problems, each, max_tokens, seed, first=0, temperature=1.0):
    """attempts() by all processes: the same ones, as an attempt's number gives its random numbers."""
    cuts = [len(problems) * i // team.size for i in range(team.size + 1)]
    shares = [
        (problems[a:b], each, max_tokens, seed, first + a * each, temperature)
        for a, b in itertools.pairwise(cuts)
    ]
    return list(itertools.chain(*team.run("attempts", [share for share in shares if share[0]])))


def advantages(rewards, std=False):
    """(G,): how much better than the mean of its group each reward is; with std, in standard deviations."""
    if min(rewards) == max(rewards):  # exactly 0, where the difference to a rounded mean might not be
        return np.zeros(len(rewards))
    return (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) if std else 1)


def choose(group, method, std=False):
    """The attempts of a group to learn from, with their advantages; none if it has no signal.

    grpo (Shao et al. 2024) takes all, unless all are equally good; best-of imitates the best right one, of
    equals the shortest.
    """
    if method == "best-of":
        right = [attempt for attempt in group if attempt.correct > 0]
        group = sorted(right, key=lambda attempt: (-attempt.reward, len(attempt.said)))[:1]
    values = advantages([a.reward for a in group], std) if method == "grpo" else [1.0] * len(group)
    for attempt, value in zip(group, values):
        attempt.advantage = float(value)
    return group if any(values) else []


def token_weights(advantage, now, old, reference=None, clip=0.2, kl=0.0):
    """The weights w (T,) with which w * (-log p) has the gradient of the objective.

    now, old and reference (T,) are log p of the tokens under the model, the one that drew them and the one of
    the beginning. With ratio = exp(now - old) and d = reference - now the loss is

        -min(ratio A, clip(ratio, 1 - c, 1 + c) A)  +  kl (exp(d) - d - 1)

    PPO's (Schulman et al. 2017) and k3, an estimate of the KL divergence (Schulman 2020). By log p the first
    has the derivative -A ratio, or 0 where the clipped product is smaller, the second kl (1 - exp(d)), and
    w * (-log p) has -w: so w = A ratio [not clipped] + kl (exp(d) - 1). In the first epoch ratio = 1, w = A.
    """
    ratio = np.exp(now - old)  # (T,)
    clipped = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip  # (T,): it has gone as far as it may
    weights = np.where(clipped, 0.0, advantage * ratio)
    return weights if reference is None else weights + kl * np.expm1(reference - now)


def log_probabilities(model, some, most):
    """For each attempt log p of every token given those before it, (T,), 0 for the first."""
    order = sorted(range(len(some)), key=lambda i: len(some[i].tokens))  # as micro_batches() will have them
    rows, found = [(some[i].tokens, some[i].drawn) for i in order], []
    for tokens, targets, _ in batches.micro_batches(rows, most):
        found += list(-model.ops.to_host(model.losses(tokens, targets)))
    found = dict(zip(order, found))
    return [np.append(0.0, found[i][: len(a.tokens) - 1]) for i, a in enumerate(some)]


def check(model, some, most):
    """UserError if the log-probabilities stored at sampling are not those that training finds."""
    pairs = zip(some, log_probabilities(model, some, most))
    drift = np.concatenate([np.abs(now - attempt.logprobs)[attempt.drawn] for attempt, now in pairs]).max()
    if not drift <= DRIFT[model.dtype]:  # also if it is no number
        raise UserError(f"sampling and training differ by {drift:.2g} in log-probabilities; report this bug")


def divergence(some, now, before):
    """The KL divergence from the model of the beginning in nats a token, by k3, on what was drawn."""
    d = np.concatenate([(b - n)[attempt.drawn] for attempt, n, b in zip(some, now, before)])
    return float((np.expm1(d) - d).mean())


def learn(model, optimizer, kept, lr, flags, reference=None, team=None):
    """Update the model with the kept attempts, --epochs times; return loss, gradient's norm and mean k3.

    Weights are divided by the number of tokens drawn in the whole step: no attempt counts more by being short
    or by its micro-batch. After the first epoch they need log p of the model as it has become: one more
    forward pass, before forward and backward. What best-of imitates has the ratio 1.
    """
    n_drawn, most, kl = sum(int(attempt.drawn.sum()) for attempt in kept), flags.batch_tokens, 0.0
    begun = log_probabilities(reference, kept, most) if reference else [None] * len(kept)
    for epoch in range(flags.epochs):
        log_p = log_probabilities(model, kept, most) if epoch else [attempt.logprobs for attempt in kept]
        if reference and not epoch:
            kl = divergence(kept, log_p, begun)
        old = log_p if flags.method == "best-of" else [attempt.logprobs for attempt in kept]
        rows = []
        for attempt, *log_ps in zip(kept, log_p, old, begun):
            weights = token_weights(attempt.advantage, *log_ps, flags.clip, flags.kl) * attempt.drawn  # (T,)
            rows.append((attempt.tokens, weights / n_drawn))
        loss = batches.gradient(team, rows, most) if team else batches.accumulate(model, rows, most)
        norm = optimizer.step(lr, 1.0, np.inf if np.isfinite(loss) else -1)  # -1: no update
        if not np.isfinite(loss + norm):
            raise UserError("the gradient is no number, nothing was updated; --resume with a lower --lr")
    return dict(loss=loss, norm=norm, kl=kl)


def pass_at_k(n, correct, k):
    """The chance that one of k attempts is right, if `correct` of n were; unbiased (Chen et al. 2021)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(group):
    """1.0 if the answer that most attempts give, the first of equals, is right."""
    answers = [tasks.marked(chat.text_of(attempt.parts)) for attempt in group]
    answers = [answer and (tasks.numeric(answer) or answer) for answer in answers]  # 9 is 9.0
    given = [answer for answer in answers if answer]
    return group[answers.index(max(given, key=given.count))].correct if given else 0.0


def evaluate(team, mix, flags):
    """[{what: measure}] on test problems of each (task, level): pass@1 is greedy, the rest of --k samples."""
    results, line, k, mean = [], console.Line(), flags.k, lambda values: float(np.mean(values))
    for task, level in mix:
        line.show(f"evaluating {task}, level {level}")
        problems = list(itertools.islice(tasks.problems(task, "test", level), flags.eval_problems))
        ask = lambda each, t, some=problems: shared_out(team, some, each, flags.max_tokens, 0, 0, t)
        greedy, groups = [group[0] for group in ask(1, 0.0)], ask(k, 1.0)
        right = [sum(attempt.correct > 0 for attempt in group) for group in groups]
        found = {"task": task, "level": level, "problems": len(problems)}
        found |= {"pass@1": mean([a.correct for a in greedy]), "sampled": mean(right) / k}
        found |= {
            f"pass@{n}": mean([pass_at_k(k, c, n) for c in right]) for n in range(2, k + 1) if k % n < 1
        }
        found |= {f"vote@{k}": mean([*map(majority, groups)]), "length": mean([len(a.said) for a in greedy])}
        results.append(found | {"sampled length": mean([len(a.said) for group in groups for a in group])})
    line.clear()
    return results


def table(results):
    """Results as lines: one for each task and level."""
    form = lambda n, v: str(v) if not isinstance(v, float) else f"{v:.1f}" if "length" in n else f"{v:.1%}"
    cells = [list(results[0]), *([form(n, v) for n, v in row.items()] for row in results)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths)) for row in cells)


def show(tokenizer, group):
    """A problem, its answer and the attempts: green (or +) what is right, red (or -) what is wrong."""
    lines = [f"{group[0].problem.prompt}  ({group[0].problem.answer})"]
    for attempt in group:
        text = visible(b"".join(map(tokenizer.token_bytes, attempt.said)))
        colour, sign = ("\033[32m", "+") if attempt.correct > 0 else ("\033[31m", "-")
        lines.append(f"{colour}{text}\033[0m" if console.colour() else f"{sign} {text}")
    return "\n".join(lines)


def export(path, groups):
    """Append the right attempts, each text once, as conversations for sft.py: a line each."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for one in (one for g in groups for one in {tuple(a.said): a for a in g if a.correct > 0}.values()):
            said = [{"type": part["type"], "text": part["text"]} for part in one.parts]
            messages = mixture.turns(one.problem.prompt, said if len(said) > 1 else chat.text_of(said))
            file.write(json.dumps({"messages": messages}) + "\n")


# ----------------------------------------------------------------------------------------- the command line


def parser():
    flags = console.Parser(prog="rl.py", description=__doc__)
    whole, every = number(int, low=1), number(int, low=0)
    add = flags.add_argument_group("model and problems").add_argument
    add("--init-from", default="runs/sft", metavar="DIR", help="the model to begin with: a run of sft.py")
    add("--out", default="runs/rl", metavar="RUN", help="the run's directory, a new one")
    add("--task", default="word", metavar="SPEC", help="a task, or several with shares: word=2,arithmetic=1")
    add("--level", metavar="N", help="how difficult: 2, or a range such as 1-3; all levels if not given")
    add("--export", metavar="PATH", help="write the right attempts there, as conversations for sft.py")
    add("--resume", action="store_true", help="go on from RUN's newest checkpoint, with its flags")
    add = flags.add_argument_group("attempts").add_argument
    add("--prompts", type=whole, default=16, metavar="P", help="problems in a step")
    add("--attempts", type=whole, default=8, metavar="G", help="attempts at each, its group")
    add("--max-tokens", type=whole, default=96, metavar="N", help="the longest that each may be")
    add("--fill", type=every, default=0, metavar="N", help="replace groups without signal, up to N times")
    add = flags.add_argument_group("method and optimisation").add_argument
    add("--method", choices=("grpo", "best-of"), default="grpo", help="best-of imitates one right attempt")
    add("--std", action="store_true", help="advantages in standard deviations of the group")
    add("--epochs", type=whole, default=1, metavar="N", help="updates with the same attempts")
    add("--clip", type=number(float, above=0), default=0.2, metavar="X", help="PPO's, after the first epoch")
    add("--kl", type=number(float, low=0), default=0.0, metavar="BETA", help="pull back to the first model")
    add("--steps", type=whole, default=200, metavar="N", help="rounds of attempts and an update")
    add("--lr", type=number(float, above=0), default=2e-4, metavar="X", help="highest learning rate")
    add("--final-lr", type=number(float, 0, 1), default=0.1, metavar="X", help="at the end, as a share of it")
    add("--batch-tokens", type=whole, default=8192, metavar="N", help="tokens of a micro-batch at most")
    add = flags.add_argument_group("evaluation and checkpoints (in steps; 0: never)").add_argument
    add("--show-every", type=every, default=50, metavar="N", help="show a problem and its attempts")
    add("--eval-every", type=every, default=100, metavar="N", help="evaluate, also before and after all")
    add("--eval-level", metavar="N", help="levels for that; --level's if not given")
    add("--eval-problems", type=whole, default=64, metavar="N", help="test problems of each level")
    add("--k", type=whole, default=8, metavar="N", help="samples of each, for pass@k and the majority vote")
    add("--save-every", type=every, default=50, metavar="N", help="write a checkpoint, and at the end")
    add("--keep", type=whole, default=2, metavar="N", help="checkpoints to keep, the newest")
    add = flags.add_argument_group("instead of training").add_argument
    add("--eval", metavar="RUN", help="what RUN can do, by task and level")
    add("--json", action="store_true", help="as one JSON object")
    add = flags.add_argument_group("machine").add_argument
    add("--seed", type=number(int, 0, 2**63), default=42, metavar="N", help="problems and attempts")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights; bfloat16: cuda only")
    return flags


def load(directory, flags):
    """Model and tokenizer of a run or checkpoint that can talk."""
    tokenizer = Tokenizer.load(checkpoint := runs.newest_checkpoint(directory))
    chat.prompt(tokenizer, [])  # complains if the model cannot talk
    return gpt2.GPT2.from_pretrained(checkpoint, *kernels.choose(flags.device, flags.dtype)), tokenizer


def make_team(model, tokenizer):
    attempt = lambda model, share: attempts(model, tokenizer, *share)
    return workers.Workers(model, {"accumulate": batches.share_of_rows, "attempts": attempt})


def main(argv=None):
    flags, checkpoint = parser().parse_args(argv), None
    if flags.resume:  # with the flags of the run's newest checkpoint, unless given anew
        checkpoint, before = runs.to_resume(flags.out)
        again = parser()
        again.set_defaults(**before)
        flags = again.parse_args(argv)
    mix, tested = (shares(flags.task, level) for level in (flags.level, flags.eval_level or flags.level))
    if flags.eval:
        results = evaluate(make_team(*load(flags.eval, flags)), tested, flags)
        return print(json.dumps({"run": flags.eval, "results": results}) if flags.json else table(results))
    if flags.attempts == 1 and flags.method == "grpo":
        raise UserError("--attempts 1 has nothing to compare with; give 2 or more, or --method best-of")
    if not checkpoint:
        runs.require_new(flags.out)
        flags.init_from = str(runs.newest_checkpoint(flags.init_from))  # --kl needs this one to the end
    train(flags, checkpoint, mix, tested)


def train(flags, checkpoint, mix, tested):
    """The loop: attempts, rewards, advantages, an update, and a line to watch."""
    run, state, spent = Path(flags.out), {}, 0.0
    model, tokenizer = load(checkpoint or flags.init_from, flags)
    reference = load(flags.init_from, flags)[0]
    team = make_team(model, tokenizer)
    optimizer = gpt2.AdamW(model, weight_decay=0.0)
    if checkpoint:
        state = runs.read_state(checkpoint)
        optimizer.load(checkpoint / "optimizer.safetensors")
    start, n_problems = state.get("step", 0), state.get("problems", 0)
    if start >= flags.steps:
        raise UserError(f"{run} has all its {flags.steps} steps; give more --steps, or another --out")
    problems = itertools.islice(practice(mix, flags.seed), n_problems, None)  # it goes on where it was
    run.mkdir(parents=True, exist_ok=True)
    log, line, interrupt = runs.Log(run, start), console.Line(every=0), runs.Interrupt()
    log.write("start", step=start, stage="rl", flags=vars(flags))

    def exam(step):
        results = evaluate(team, tested, flags)
        line.clear(f"step {step}, on test problems:\n{table(results)}")
        mean = {name: sum(row[name] for row in results) / len(results) for name in ("pass@1", "length")}
        log.write("eval", step=step, correct=mean["pass@1"], length=mean["length"], results=results)

    if flags.eval_every and not start:
        exam(0)
    for step in range(start, flags.steps):
        began, done, groups, kept, n_kept = time.perf_counter(), step + 1, [], [], 0
        for first in ((step << 32) + (again << 24) for again in range(1 + flags.fill)):  # nobody else's
            some = list(itertools.islice(problems, flags.prompts - n_kept))
            groups += shared_out(team, some, flags.attempts, flags.max_tokens, flags.seed, first)
            chosen = [choose(group, flags.method, flags.std) for group in groups[-len(some) :]]
            kept, n_kept = sum(chosen, kept), n_kept + sum(map(bool, chosen))
            if n_kept == flags.prompts:
                break
        n_problems, every = n_problems + len(groups), list(itertools.chain(*groups))
        if step == start or done % CHECK_EVERY == 0:
            check(model, every[:: flags.attempts], flags.batch_tokens)  # of each group one
        sampled, lr = time.perf_counter(), learning_rate(step, flags.steps, flags.lr, 5, flags.final_lr)
        learned = (
            learn(model, optimizer, kept, lr, flags, reference if flags.kl else None, team)
            if kept
            else dict(loss=0, norm=0)
        )
        now, mean = time.perf_counter(), lambda values: float(np.mean(list(values)))
        spent, length = spent + now - began, mean(len(a.said) for a in every)
        v = dict(reward=mean(a.reward for a in every), correct=mean(a.correct for a in every), length=length)
        v |= dict(signal=n_kept / len(groups), without_signal=len(groups) - n_kept, lr=lr, **learned)
        some = every[:: flags.attempts]  # of each group one
        before = log_probabilities(reference, some, flags.batch_tokens)
        v["kl"] = divergence(some, [attempt.logprobs for attempt in some], before)
        v["entropy"] = -mean(a.logprobs.sum() for a in every) / mean(a.drawn.sum() for a in every)
        v |= dict(seconds=now - began, sampling=length * len(every) / (sampled - began))
        v["training"] = flags.epochs * sum(len(a.tokens) for a in kept) / (now - sampled)
        log.write("step", step=done, **v)
        left = duration(spent / (done - start) * (flags.steps - done))
        line.show(
            f"step {done}/{flags.steps} | reward {v['reward']:.3f} | pass@1 {v['correct']:.1%} | "
            f"signal {v['signal']:.0%} | length {length:.1f} | entropy {v['entropy']:.3f} | "
            f"KL {v['kl']:.4f} | sampling {v['sampling']:.0f} tok/s | "
            f"training {v['training']:.0f} tok/s | {left} left"
        )  # fmt: skip
        if flags.export:
            export(flags.export, groups)
        if flags.show_every and done % flags.show_every == 0:
            line.clear()
            group = next((group for group in groups if group[0].advantage), groups[0])
            print(f"step {done}: {show(tokenizer, group)}\n", flush=True)
        last, stopping = done == flags.steps, interrupt.asked and done < flags.steps
        if last or stopping or (flags.save_every and done % flags.save_every == 0):
            state = dict(stage="rl", problems=n_problems, flags=vars(flags))
            place = runs.save_checkpoint(run, done, model, tokenizer, optimizer, flags.keep, **state)
            log.write("checkpoint", step=done, path=place.name)
        if stopping:
            line.clear(
                f"stopped after step {done}; go on: python rl.py --out {shlex.quote(str(run))} --resume"
            )
            raise SystemExit(130)
        if flags.eval_every and (last or done % flags.eval_every == 0):
            exam(done)
    line.clear(f"done: {place}; talk to it: python sample.py {shlex.quote(str(run))} --chat")


if __name__ == "__main__":
    console.run(main)
