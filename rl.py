"""Reinforcement learning: the model practises problems whose answers can be checked, and gets better.

    python rl.py --init-from runs/sft --out runs/rl --task word --level 2     practise, and watch it improve
    python rl.py --out runs/rl --resume                                       go on after Ctrl-C, bit for bit
    python evaluate.py runs/rl --task word                                    a table of what it can do

Of every problem the model samples a group of rollouts, and a verifier says which are right. Rollouts that did
better than the mean of their group become more probable, the others less. The loss is that of train.py with
other weights: advantage / tokens of the step on the tokens that the model sampled, 0 on the prompt and on the
outputs of tools. That is the policy gradient, exactly (REINFORCE with the group's mean as the baseline; GRPO,
Shao et al. 2024, without its KL term unless --kl is given).

Read sft.py first, which has the data loader for rows of all lengths, and sample.py, which samples. train()
takes any reward function: extras/rlhf.py gives it a reward model.
"""

import itertools
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

import numpy as np

import common
import distributed
import evaluate
import gpt2
import hub
import kernels
from common import Run, UserError, add_shared_flags, number, write_whole
from sample import load_assistant
from sft import ON_GPU, config_of, micro_batches, recipe_name, share
from tasks.conversations import turns
from tasks.problems import Problem, problems
from tokenizer import text_of, transcript, visible
from tools import TOOLS
from train import describe_recipes, learning_rate, use_recipe

SAMPLED_AT_ONCE = 256  # rollouts in a batch, at most
CHECK_EVERY = 20  # steps between two comparisons of the probabilities of sampling and of training
DRIFT = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.2}  # how far they may be apart: rounding, no more


@dataclass
class Rollout:
    """One attempt of the model at a problem; T tokens with the prompt."""

    problem: Problem
    parts: list  # the reply, as parts of a turn: text, calls, outputs of tools
    tokens: np.ndarray  # (T,) int32, prompt and completion
    sampled: np.ndarray  # (T,) bool: the model chose this token; not the prompt, not a tool's output
    logprobs: np.ndarray  # (T,) log p of the sampled tokens when they were sampled, else 0
    length: int  # tokens of the completion
    finished: bool  # it ended with a stop token, and was not cut off
    correct: float  # 1 if the verifier finds the answer right
    reward: float = 0.0  # what training makes large
    advantage: float = 0.0  # the reward compared with the rest of the group


def main(argv=None):
    flags, checkpoint = parse(argv)
    train(flags, checkpoint, argv)


def verified(rollouts):
    """The reward of every rollout: 1 if its answer is right."""
    return [rollout.correct for rollout in rollouts]


def train(flags, checkpoint, argv, reward=verified, score=None, script=__file__, command="rl.py"):
    """The loop: rollouts, rewards, advantages, an update.

    reward(rollouts) returns a number for each. score(problem, parts, finished), if given, is measured beside
    the reward, and the checkpoint with the best score on test problems is kept. Other ranks are started with
    `script`; `command` is what a user types to resume the run.
    """
    run = Run(command, flags, checkpoint, stage="rl")
    config = config_of(flags, checkpoint)
    device, flags.dtype = kernels.choose(flags.device, flags.dtype, on_gpu=ON_GPU[recipe_name(config)])
    flags.ranks = distributed.choose_ranks(flags.ranks, config.n_params(), device, flags.prompts)
    world = distributed.start(flags.ranks, script, argv)

    # The model, the same on every rank, and the problems
    model, tokenizer = load_assistant(checkpoint or flags.init_from, flags)
    reference = load_reference(flags)  # the model of the beginning
    stream = ProblemStream(flags, model, tokenizer, run.state.get("problems", 0))
    model.share(world)
    optimizer = gpt2.AdamW(model, weight_decay=0.0, world=world)
    run.begin(world, model, optimizer, tokenizer, flags.steps, stage="rl")
    if flags.export and checkpoint and run.is_first:
        remove_later_exports(flags.export, run.directory.name, run.start)
    if run.start == 0 and flags.eval_every:
        evaluate_policy(run, 0, score)

    for step in run.steps():
        began = time.perf_counter()
        groups, kept = collect(model, tokenizer, stream, step, flags, reward, world)
        measures = describe(groups, score, time.perf_counter() - began)
        if step == run.start or (step + 1) % CHECK_EVERY == 0:
            check_log_probabilities(model, groups, flags, world)
        if reference:  # None if it is gone
            measures["kl"] = divergence(reference, [group[0] for group in groups], flags, world)

        lr = learning_rate(step, flags.steps, flags.lr, flags.warmup_steps, flags.final_lr)
        reference_logprobs = log_probabilities(reference, kept, flags, world) if flags.kl else None
        for epoch in range(flags.epochs if kept else 0):
            rows = policy_gradient_rows(model, kept, reference_logprobs, epoch, flags, world)
            for tokens, targets, weights in micro_batches(rows, flags.batch_tokens, config.n_positions):
                model.forward(tokens, targets, weights)  # (B, T) each
                model.backward()
            world.all_reduce(model.sums)
            optimizer.step(lr, flags.grad_clip, *run.limits(step))
        n_tokens = sum(rollout.length for rollout in flat(groups))
        run.report(step, lr, n_tokens, progress_text(measures), updated=bool(kept), **measures)

        done = step + 1
        run.also_saved["problems"] = stream.n_taken
        if flags.export and run.is_first:
            export(flags.export, groups, run.directory.name, done)
        if flags.show_every and done % flags.show_every == 0:
            group = next((group for group in groups if has_signal(group)), groups[0])
            run.say(f"step {done}: {show(tokenizer, group)}\n")
        if run.is_due(done, flags.eval_every):
            evaluate_policy(run, done, score)

    best = run.directory / "best"
    hint = f"; {best} has the highest score" if best.exists() else ""
    place = run.checkpoint_path(flags.steps)
    run.say(f"done: {place}{hint}; talk to it: python sample.py {run.directory} --chat")


# ------------------------------------------------------------------------------------------------------------
# Rollouts


def sample_rollouts(model, tokenizer, some_problems, flags, first_stream, world, tools=TOOLS):
    """A group of --attempts rollouts of every problem, [[Rollout, ...], ...], on every rank all of them.

    Each rank samples its part. Tokens are sampled from exactly the distribution that training scores:
    temperature 1, no filter. Their random numbers depend on the seed and on the number of the rollout,
    counted from first_stream, so the number of ranks changes nothing.
    """
    G = flags.attempts
    asked = [problem for problem in some_problems for _ in range(G)]
    prompts = [evaluate.prompt_of(tokenizer, problem) for problem in asked]
    streams = range(first_stream, first_stream + len(asked))
    results = evaluate.sample_replies(
        model, tokenizer, prompts, tools, flags.max_tokens, 1.0, flags.seed, streams, world, SAMPLED_AT_ONCE
    )
    triples = zip(asked, prompts, results)
    rollouts = [make_rollout(tokenizer, problem, prompt, *result) for problem, prompt, result in triples]
    return [rollouts[start : start + G] for start in range(0, len(rollouts), G)]


def make_rollout(tokenizer, problem, prompt, ids, forced, logprobs, finished):
    """A Rollout from what was sampled after a prompt. One that was cut off is wrong, whatever it says: half
    an answer may be right by accident."""
    parts, n = tokenizer.parts(ids), len(prompt)
    tokens = np.array(prompt + ids, np.int32)  # (T,)
    sampled, all_logprobs = np.zeros(len(tokens), bool), np.zeros(len(tokens))  # (T,) each
    sampled[n:], all_logprobs[n:] = np.logical_not(forced), logprobs
    correct = float(finished and problem.verify(text_of(parts)))
    return Rollout(problem, parts, tokens, sampled, all_logprobs, len(ids), finished, correct)


def flat(groups):
    """The rollouts of all groups, one behind the other."""
    return [rollout for group in groups for rollout in group]


class ProblemStream:
    """Endless problems to train on: of each (task, level) by its share, the same for the same seed.

    n_taken, how many were taken so far, is saved in a checkpoint, and a resumed run goes on behind them.
    """

    def __init__(self, flags, model, tokenizer, n_taken=0):
        shares = evaluate.parse_tasks(flags.task, flags.level)
        for task, level in shares:  # UserError now, not during the run, if prompts fill the context
            next(evaluate.fitting(model, tokenizer, problems(task, level=level)))
        self.stream = evaluate.fitting(model, tokenizer, self._mixture(shares, flags.seed))
        self.n_taken = 0
        self.take(n_taken)

    def _mixture(self, shares, seed):
        rng, chances = np.random.default_rng(seed), np.array(list(shares.values())) / sum(shares.values())
        sources = [problems(task, split="train", level=level, seed=seed) for task, level in shares]
        while True:
            yield next(sources[rng.choice(len(sources), p=chances)])

    def take(self, n):
        """The next n problems."""
        self.n_taken += n
        return list(itertools.islice(self.stream, n))


def collect(model, tokenizer, stream, step, flags, reward, world):
    """The groups of rollouts of a step, and the rollouts to learn from.

    With --fill N, groups without a signal are replaced, up to N times, until --prompts groups have one.
    """
    groups, kept, n_with_signal = [], [], 0
    for again in range(1 + flags.fill):
        some_problems = stream.take(flags.prompts - n_with_signal)
        first_stream = (step << 32) + (again << 24)  # random numbers that no other step has
        new_groups = sample_rollouts(model, tokenizer, some_problems, flags, first_stream, world)
        rollouts = flat(new_groups)
        for rollout, value in zip(rollouts, reward(rollouts)):
            rollout.reward = float(value)
        for group in new_groups:
            kept += set_advantages(group, flags.method, flags.std)
        groups += new_groups
        n_with_signal = sum(has_signal(group) for group in groups)
        if n_with_signal == flags.prompts:
            break
    return groups, kept


# ------------------------------------------------------------------------------------------------------------
# Advantages and weights: the policy gradient


def set_advantages(group, method, std=False):
    """Set the advantages of a group's rollouts; return those to learn from, none if the group has no signal.

    grpo takes all, unless all are equally good. best-of imitates the best right one, of equals the shortest.
    """
    if method == "best-of":
        right = [rollout for rollout in group if rollout.correct > 0]
        right.sort(key=lambda rollout: (-rollout.reward, rollout.length))
        for rollout in right[:1]:
            rollout.advantage = 1.0
        return right[:1]
    for rollout, advantage in zip(group, advantages([rollout.reward for rollout in group], std)):
        rollout.advantage = float(advantage)
    return group if has_signal(group) else []


def has_signal(group):
    """Whether there is something to learn from a group: not if all rollouts are equally good."""
    return any(rollout.advantage for rollout in group)


def advantages(rewards, std=False):
    """(G,): how much better than the mean of its group each reward is; with std, in standard deviations."""
    if min(rewards) == max(rewards):  # exactly 0, where the difference to a rounded mean might not be
        return np.zeros(len(rewards))
    return (np.array(rewards) - np.mean(rewards)) / (np.std(rewards) if std else 1)


def policy_gradient_rows(model, kept, reference_logprobs, epoch, flags, world):
    """This rank's [(tokens, weights)], one for each rollout: what micro_batches() takes.

    Weights are divided by the number of tokens sampled in all rollouts of all ranks, so a token counts the
    same in every rollout and micro-batch. From the second epoch on the model has changed, and log p is
    computed anew. With --kl, reference_logprobs are log p under the model of the beginning.
    """
    n_sampled = sum(int(rollout.sampled.sum()) for rollout in kept)
    old = [rollout.logprobs for rollout in kept]
    now = log_probabilities(model, kept, flags, world) if epoch else old
    if flags.method == "best-of":  # an imitated rollout has the ratio 1
        old = now
    reference = reference_logprobs or [None] * len(kept)
    rows = []
    for rollout, *logprobs in zip(kept, now, old, reference):
        weights = token_weights(rollout.advantage, *logprobs, flags.clip, flags.kl)  # (T,)
        rows.append((rollout.tokens, weights * rollout.sampled / n_sampled))
    return share(rows, world)


def token_weights(advantage, now, old, reference=None, clip=0.2, kl=0.0):
    """The weights w (T,) with which w * (-log p) has the gradient of the objective.

    now, old and reference (T,) are log p of the tokens under the model, under the model that sampled them,
    and under the model of the beginning. With ratio = exp(now - old) and d = reference - now the loss is

        -min(ratio A, clip(ratio, 1 - c, 1 + c) A)  +  kl (exp(d) - d - 1)

    The first term is PPO's (Schulman et al. 2017), the second k3, an estimate of the KL divergence (Schulman
    2020). The derivative by `now` is -A ratio, or 0 where the clipped product is smaller, plus
    kl (1 - exp(d)). That of w * (-log p) is -w, so

        w = A ratio [not clipped]  +  kl (exp(d) - 1)

    In the first epoch the ratio is 1 and, without --kl, w = A.
    """
    ratio = np.exp(now - old)  # (T,)
    clipped = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip  # (T,)
    weights = np.where(clipped, 0.0, advantage * ratio)  # (T,)
    return weights if reference is None else weights + kl * np.expm1(reference - now)


def log_probabilities(model, rollouts, flags, world):
    """For each rollout log p of every token given those before it, (T,), 0 for the first; by all ranks."""
    mine = sorted(range(world.rank, len(rollouts), world.size), key=lambda i: -len(rollouts[i].tokens))
    rows = [(rollouts[i].tokens, np.ones(len(rollouts[i].tokens))) for i in mine]
    losses = []  # in the order of `mine`, the longest first
    for tokens, targets, _ in micro_batches(rows, flags.batch_tokens, model.config.n_positions):
        losses.extend(model.ops.to_host(model.losses(tokens, targets)))  # (T,) each, with padding
    logprobs = [(-row[: len(rollouts[i].tokens) - 1]).tolist() for i, row in zip(mine, losses)]
    by_number = {}
    for numbers, values in world.gather([mine, logprobs]):
        by_number.update(zip(numbers, values))
    return [np.array([0.0, *by_number[i]]) for i in range(len(rollouts))]


def log_ratios(model, rollouts, flags, world):
    """(n,): of all sampled tokens, log p under the model minus log p when the token was sampled."""
    pairs = zip(log_probabilities(model, rollouts, flags, world), rollouts)
    return np.concatenate([(logprobs - rollout.logprobs)[rollout.sampled] for logprobs, rollout in pairs])


def divergence(reference, rollouts, flags, world):
    """The KL divergence from the reference in nats a token, by k3, on the sampled tokens of some rollouts."""
    d = log_ratios(reference, rollouts, flags, world)  # (n,)
    return float((np.expm1(d) - d).mean())


def check_log_probabilities(model, groups, flags, world):
    """UserError if the log-probabilities stored at sampling are not those that training finds."""
    drift = np.abs(log_ratios(model, flat(groups), flags, world)).max()
    if not drift <= DRIFT[model.dtype]:  # also if it is not a number
        raise UserError(f"sampling and training differ by {drift:.2g} in log-probabilities; report this bug")


# ------------------------------------------------------------------------------------------------------------
# Measures, evaluation, what a person sees


def describe(groups, score, seconds):
    """Measures of a step's rollouts: means over them; the entropy in nats a token; the share of groups
    with a signal; sampled tokens a second, as the sampling took so many seconds."""
    rollouts = flat(groups)
    n_with_signal = sum(has_signal(group) for group in groups)
    n_sampled = sum(int(rollout.sampled.sum()) for rollout in rollouts)
    measures = {
        "reward": mean(rollout.reward for rollout in rollouts),
        "correct": mean(rollout.correct for rollout in rollouts),
        "length": mean(rollout.length for rollout in rollouts),
        "entropy": -sum(rollout.logprobs.sum() for rollout in rollouts) / n_sampled,
        "signal": n_with_signal / len(groups),
        "without_signal": len(groups) - n_with_signal,
        "sampling": n_sampled / seconds,
    }
    if score:
        measures["score"] = mean(score(one.problem, one.parts, one.finished) for one in rollouts)
    return measures


def progress_text(measures):
    """The measures of a step for the progress line."""
    parts = [
        f"reward {measures['reward']:.3f}",
        f"pass@1 {measures['correct']:.1%}",
        f"signal {measures['signal']:.0%}",
        f"length {measures['length']:.1f}",
        f"entropy {measures['entropy']:.3f}",
        f"sampling {measures['sampling']:.0f} tok/s",
    ]
    if "kl" in measures:
        parts.insert(-1, f"KL {measures['kl']:.4f}")
    if "score" in measures:
        parts.insert(1, f"score {measures['score']:.3f}")
    return " | ".join(parts)


def evaluate_policy(run, done, score):
    """Evaluate on test problems; keep the checkpoint with the best score, if there is a score."""
    flags = run.flags
    tested = evaluate.parse_tasks(flags.task, flags.eval_level or flags.level)
    results = evaluate.evaluate_problems(
        run.model, run.tokenizer, tested, flags.eval_problems, flags.k, flags.max_tokens, flags.seed,
        score, run.world,
    )  # fmt: skip
    run.say(f"step {done}, on test problems:\n{evaluate.problem_table(results)}")
    practised = evaluate.parse_tasks(flags.task, flags.level)
    rows = [row for row in results if (row["task"], row["level"]) in practised] or results
    means = {"correct": mean(row["pass@1"] for row in rows), "length": mean(row["length"] for row in rows)}
    if score:
        means["score"] = mean(row["score"] for row in rows)
        keep_if_best(run, done, "score", means["score"])
    run.log("eval", step=done, **means, results=results)


def keep_if_best(run, done, name, value):
    """Write the checkpoint `best` if no evaluation before had as high a value, called `name` in the log."""
    if not run.is_first:
        return
    before = [event[name] for event in common.read_log(run.directory) if event["event"] == "eval"]
    if value > max(before, default=-np.inf):
        state = dict(stage=run.stage, script=run.script, flags=vars(run.flags))
        models = run.model, run.tokenizer, run.optimizer
        common.save_checkpoint(run.directory / "best", done, *models, keep=1, **state)


def show(tokenizer, group):
    """A problem, its answer and the rollouts: green (or +) is right, red (or -) is wrong. A reward that is
    not simply 1 for right and 0 for wrong stands before its rollout."""
    lines = [f"{group[0].problem.prompt}  ({group[0].problem.answer})"]
    for rollout in group:
        text = text_of_rollout(tokenizer, rollout)
        if rollout.reward != rollout.correct:
            text = f"{rollout.reward:.2f} {text}"
        color, sign = ("\033[32m", "+") if rollout.correct > 0 else ("\033[31m", "-")
        lines.append(f"{color}{text}\033[0m" if common.colour() else f"{sign} {text}")
    return "\n".join(lines)


def text_of_rollout(tokenizer, rollout):
    """The reply with its calls and outputs, "[calc 3 * 4 -> 12] Answer: 12<|im_end|>", on one line."""
    end = tokenizer.decode(rollout.tokens[-1:].tolist()) if rollout.finished else ""
    return visible((transcript(rollout.parts) + end).encode())


def export(path, groups, run, step):
    """Append the right rollouts, each text once, as conversations for sft.py: a line each."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for group in groups:
            distinct = {tuple(rollout.tokens.tolist()): rollout for rollout in group if rollout.correct > 0}
            for rollout in distinct.values():
                parts = [{"type": part["type"], "text": part["text"]} for part in rollout.parts]
                reply = parts if len(parts) > 1 else text_of(parts)
                line = {"messages": turns(rollout.problem.prompt, reply), "run": run, "step": step}
                file.write(json.dumps(line) + "\n")


def remove_later_exports(path, run, step):
    """Remove what a run exported after the step of its checkpoint, before it was killed: it comes again."""
    if not Path(path).exists():
        return
    origin = re.compile(rb'"run": %b, "step": (\d+)}\n' % re.escape(json.dumps(run).encode()))
    kept = []
    for line in Path(path).read_bytes().splitlines(keepends=True):
        match = origin.search(line)
        if line.endswith(b"\n") and not (match and int(match[1]) > step):
            kept.append(line)
    write_whole(path, b"".join(kept))


def load_reference(flags):
    """The model of the beginning, for the KL divergence; None if it is gone and --kl does not need it."""
    if flags.kl or Path(flags.init_from).exists():
        return load_assistant(flags.init_from, flags)[0]
    return None


# ------------------------------------------------------------------------------------------------------------
# The command line

# Defaults of the flags by the size of --init-from, as in sft.py. tiny was tried out here, d12 was not: it has
# nanochat's settings for GSM8K, one pass over its 7,473 problems at 5% of pretraining's learning rate.
RECIPES = {
    "tiny": dict(
        task="word", steps=200, prompts=16, attempts=8, max_tokens=96, batch_tokens=8192,
        lr=2e-4, final_lr=0.1, eval_every=100, eval_problems=64,
    ),
    "d12": dict(
        task="gsm8k:hub", steps=467, prompts=16, attempts=16, max_tokens=256, batch_tokens=16384,
        lr=3e-5, final_lr=0.0, eval_every=60, eval_problems=400,
    ),
}  # fmt: skip
EXPECTATION = """
What to expect of a model of GPT-2's size (d12, 124M parameters) on GSM8K: it begins at 0 to 3% and ends at 1
to 4% at the most, an estimate, since nobody has published such a run (nanochat's 561M parameters went from
4.6 to 7.6%). It learns the form of an answer and to use the calculator, hardly to reason. While 1% of the
rollouts are right, only 15% of the groups of sixteen have a right one, and the others teach nothing. Easier
problems (--task word) show more of what the method can do.
"""


def add_flags(flags, about_defaults=None):
    """Flags of rl.py that extras/rlhf.py has too. Those that RECIPES has are None if they are not given."""
    whole, every = number(int, low=1), number(int, low=0)
    add = flags.add_argument_group("problems and rollouts", about_defaults).add_argument
    what = "a task, or several with shares: word=2,arithmetic=1; also gsm8k:PATH"
    add("--task", metavar="SPEC", help=what)
    add("--level", metavar="N", help="how difficult: 2, or a range: 1-3; none: all levels")
    add("--prompts", type=whole, help="problems in a step")
    add("--attempts", type=whole, help="rollouts of each, its group")
    add("--max-tokens", type=whole, help="the longest that a rollout may be")
    add("--fill", type=every, default=0, help="replace groups without signal, up to N times")
    add("--export", metavar="PATH", help="append the right rollouts there, as conversations for sft.py")
    group = flags.add_argument_group("method and optimisation")
    add = group.add_argument
    add("--method", choices=("grpo", "best-of"), default="grpo", help="best-of imitates one right rollout")
    add("--std", action="store_true", help="advantages in standard deviations of the group")
    add("--epochs", type=whole, default=1, help="updates with the same rollouts")
    what = "PPO's clipping of the probability ratio, after the first epoch"
    add("--clip", type=number(float, above=0), default=0.2, help=what)
    what = "how strongly the KL divergence from the first model is held down"
    add("--kl", type=number(float, low=0), default=0.0, metavar="BETA", help=what)
    add("--steps", type=whole, help="rounds of rollouts and an update")
    names = "lr", "warmup-steps", "final-lr", "grad-clip", "batch-tokens"
    add_shared_flags(group, *names, warmup_steps=5, final_lr=None)
    group = flags.add_argument_group("evaluation and checkpoints (in steps; 0: never)")
    add = group.add_argument
    add("--show-every", type=every, default=50, help="steps between rollouts that are shown")
    what = "steps between evaluations; there is one before and one after all steps"
    add("--eval-every", type=every, help=what)
    add("--eval-level", metavar="N", help="levels for that; --level's if not given")
    add("--eval-problems", type=whole, help="test problems of each level")
    add("--k", type=whole, default=8, help="samples of each, for pass@k and the majority vote")
    add_shared_flags(group, "save-every", "keep", save_every=50)
    add_shared_flags(flags.add_argument_group("machine"), "ranks", "seed", "device", "dtype")


def parser():
    flags = common.Parser(prog="rl.py", description=__doc__, epilog=EXPECTATION)
    recipes = describe_recipes(RECIPES)
    group = flags.add_argument_group("model")
    add_shared_flags(group, "init-from", "out", "resume", init_from="runs/sft", out="runs/rl")
    add_flags(flags, f"by default, for a model of up to 17M parameters and for a larger one:\n{recipes}")
    return flags


def parse(argv):
    """The flags, and the checkpoint to go on from or None."""
    flags, checkpoint = common.parse_run(parser(), argv, "rl.py")
    use_recipe(flags, RECIPES[recipe_name(config_of(flags, checkpoint))])
    check_flags(flags, checkpoint)
    return flags, checkpoint


def check_flags(flags, checkpoint):
    """Complain about flags that do not go together; make --init-from the checkpoint that it names."""
    if flags.attempts == 1 and flags.method == "grpo":
        raise UserError("--attempts 1 has nothing to compare with; give 2 or more, or --method best-of")
    evaluate.parse_tasks(flags.task, flags.level)
    evaluate.parse_tasks(flags.task, flags.eval_level or flags.level)
    if not checkpoint:  # --kl needs this one to the end, even if its run goes on
        flags.init_from = str(hub.find_checkpoint(flags.init_from))


if __name__ == "__main__":
    common.run(main)
