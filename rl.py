"""Reinforcement learning: the model practises problems whose answers can be checked, and gets better.

    python rl.py --init-from runs/sft --out runs/rl --task word --level 2       practise, and watch it improve
    python rl.py --out runs/rl --resume                                         after Ctrl-C, bit for bit
    python rl.py --eval runs/rl --task word                                     a table of what it can do

Of many attempts at a problem the verifier says which are right. What they did better than their group's mean
becomes more probable, what they did worse less. The loss is train.py's with other weights: advantage / tokens
of the step on what the model chose, 0 on the prompt and on what tools said. That is the policy gradient,
exactly. Read attempts.py first; this is the last stage.

With --reward model a reward model judges instead, see extras/rlhf.py: there the reward is not the truth.
"""

import itertools
import json
import shlex
import time
from pathlib import Path

import numpy as np

import attempts
import batches
import common
import extras.rlhf as reward
import gpt2
import tasks.problems as tasks
from attempts import log_probabilities, mean
from common import UserError, duration, number
from train import learning_rate

CHECK_EVERY = 20  # steps between two comparisons of the probabilities of sampling and of training
DRIFT = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.2}  # how far they may be apart: rounding, no more


def practice(mix, seed):
    """Endless problems to train on, each of a (task, level) drawn by share: the same for the same seed."""
    rng, chances = np.random.default_rng(seed), np.array(list(mix.values())) / sum(mix.values())
    sources = [tasks.problems(name, split="train", level=level, seed=seed) for name, level in mix]
    while True:
        yield next(sources[rng.choice(len(sources), p=chances)])


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

    Weights are divided by the number of tokens drawn in all of these: no attempt counts more by being short
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


def gather(team, judge, problems, step, flags):
    """A step's groups of attempts, those to learn from, and how many groups these are of: of --prompts, or
    with --fill of more, until so many have a signal."""
    groups, kept, n_kept = [], [], 0
    for again in range(1 + flags.fill):
        some = list(itertools.islice(problems, flags.prompts - n_kept))
        first = (step << 32) + (again << 24)  # where these attempts are counted from: nobody else's numbers
        new = attempts.shared_out(team, some, flags.attempts, flags.max_tokens, flags.seed, first)
        judge(new)
        chosen = [choose(group, flags.method, flags.std) for group in new]
        groups, kept, n_kept = groups + new, sum(chosen, kept), n_kept + sum(map(bool, chosen))
        if n_kept == flags.prompts:
            break
    return groups, kept, n_kept


def described(groups, n_kept, flags):
    """What a step's attempts are like: means, entropy in nats a token, how many groups had a signal."""
    every = list(itertools.chain(*groups))
    found = dict(reward=mean(a.reward for a in every), correct=mean(a.correct for a in every))
    found |= dict(length=mean(len(a.said) for a in every))
    found["entropy"] = -mean(a.logprobs.sum() for a in every) / mean(a.drawn.sum() for a in every)
    if flags.reward == "model":
        found["score"] = mean(map(reward.true_score, every))
    return found | dict(signal=n_kept / len(groups), without_signal=len(groups) - n_kept)


# ----------------------------------------------------------------------------------------- the command line


def parser():
    flags = common.Parser(prog="rl.py", description=__doc__)
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
    words = "what is made large: the verifier's word, or the opinion of a reward model"
    add("--reward", choices=("verifier", "model"), default="verifier", help=words)
    add("--reward-model", default="runs/rlhf-reward", metavar="RUN", help="made by extras.rlhf train")
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


def main(argv=None):
    flags, checkpoint = parser().parse_args(argv), None
    if flags.resume:  # with the flags of the run's newest checkpoint, unless given anew
        checkpoint, before = common.to_resume(flags.out)
        again = parser()
        again.set_defaults(**before)
        flags = again.parse_args(argv)
    mix, tested = (
        attempts.shares(flags.task, level) for level in (flags.level, flags.eval_level or flags.level)
    )
    if flags.eval:
        model, tokenizer = attempts.load(flags.eval, flags)
        team, judge = attempts.make_team(model, tokenizer), reward.judge(flags, tokenizer)
        results = attempts.evaluate(team, tokenizer, tested, flags, judge)
        found = {"run": flags.eval, "results": results}
        return print(json.dumps(found) if flags.json else attempts.table(results))
    if flags.reward == "model" and flags.method == "best-of":
        raise UserError("--method best-of imitates right attempts, and --reward model knows none; choose one")
    if flags.attempts == 1 and flags.method == "grpo":
        raise UserError("--attempts 1 has nothing to compare with; give 2 or more, or --method best-of")
    if not checkpoint:
        common.require_new(flags.out)
        flags.init_from = str(common.newest_checkpoint(flags.init_from))  # --kl needs this one to the end
    train(flags, checkpoint, mix, tested)


def train(flags, checkpoint, mix, tested):
    """The loop: attempts, rewards, advantages, an update, and a line to watch."""
    run, state = Path(flags.out), {}
    model, tokenizer = attempts.load(checkpoint or flags.init_from, flags)
    there = flags.kl or Path(flags.init_from).exists()  # a run that went on elsewhere may do without
    reference = attempts.load(flags.init_from, flags)[0] if there else None
    judge, team = reward.judge(flags, tokenizer), attempts.make_team(model, tokenizer)
    optimizer = gpt2.AdamW(model, weight_decay=0.0)
    if checkpoint:
        state = common.read_state(checkpoint)
        optimizer.load(checkpoint / "optimizer.safetensors")
    start, n_problems = state.get("step", 0), state.get("problems", 0)
    if start >= flags.steps:
        raise UserError(f"{run} has all its {flags.steps} steps; give more --steps, or another --out")
    for name, level in mix:  # what does not fit should show before there is a run
        next(attempts.fitting(model, tokenizer, tasks.problems(name, level=level)))
    problems = attempts.fitting(model, tokenizer, practice(mix, flags.seed))
    problems = itertools.islice(problems, n_problems, None)  # it goes on where it was
    run.mkdir(parents=True, exist_ok=True)
    log, line, interrupt = common.Log(run, start), common.Line(every=0), common.Interrupt()
    log.write("start", step=start, stage="rl", flags=vars(flags))

    def exam(step):
        results = attempts.evaluate(team, tokenizer, tested, flags, judge)
        line.clear(f"step {step}, on test problems:\n{attempts.table(results)}")
        names = [name for name in ("pass@1", "length", "score", "reward") if name in results[0]]
        practised = [row for row in results if (row["task"], row["level"]) in mix] or results
        means = {name: mean(row[name] for row in practised) for name in names}
        before = [event["score"] for event in common.read_log(run) if "results" in event and "score" in event]
        log.write("eval", step=step, correct=means.pop("pass@1"), **means, results=results)
        if means.get("score", -1) > max(before, default=-1):  # --reward model: before it is fooled
            common.save_checkpoint(
                run / "best", step, model, tokenizer, optimizer, 1, stage="rl", flags=vars(flags)
            )

    if flags.export and checkpoint:
        attempts.forget(flags.export, str(run), start)
    due = lambda step: flags.eval_every and (step in (0, flags.steps) or step % flags.eval_every == 0)
    if due(start) and not any(e["event"] == "eval" and e["step"] == start for e in common.read_log(run)):
        exam(start)
    loop_began = time.perf_counter()
    for step in range(start, flags.steps):
        began, done = time.perf_counter(), step + 1
        groups, kept, n_kept = gather(team, judge, problems, step, flags)
        n_problems, some = n_problems + len(groups), [group[0] for group in groups]
        if step == start or done % CHECK_EVERY == 0:
            check(model, list(itertools.chain(*groups)), flags.batch_tokens)
        sampled, lr = time.perf_counter(), learning_rate(step, flags.steps, flags.lr, 5, flags.final_lr)
        v = described(groups, n_kept, flags) | dict(lr=lr, loss=0, norm=0, kl=0)
        if kept:
            v |= learn(model, optimizer, kept, lr, flags, reference if flags.kl else None, team)
        now = time.perf_counter()
        if reference:
            before = log_probabilities(reference, some, flags.batch_tokens)
            v["kl"] = divergence(some, [attempt.logprobs for attempt in some], before)
        n_said, n_learned = (
            sum(len(a.said) for a in itertools.chain(*groups)),
            sum(len(a.tokens) for a in kept),
        )
        v |= dict(seconds=now - began, sampling=n_said / (sampled - began))
        v["training"] = flags.epochs * n_learned / (now - sampled)
        log.write("step", step=done, **v)
        left = duration((time.perf_counter() - loop_began) / (done - start) * (flags.steps - done))
        score = f"true score {v['score']:.3f} | " if "score" in v else ""
        line.show(
            f"step {done}/{flags.steps} | reward {v['reward']:.3f} | {score}pass@1 {v['correct']:.1%} | "
            f"signal {v['signal']:.0%} | length {v['length']:.1f} | entropy {v['entropy']:.3f} | "
            f"KL {v['kl']:.4f} | sampling {v['sampling']:.0f} tok/s | "
            f"training {v['training']:.0f} tok/s | {left} left"
        )  # fmt: skip
        if flags.export:
            attempts.export(flags.export, groups, run=str(run), step=done)
        if flags.show_every and done % flags.show_every == 0:
            line.clear()
            group = next((group for group in groups if group[0].advantage), groups[0])
            print(f"step {done}: {attempts.show(tokenizer, group)}\n", flush=True)
        last, stopping = done == flags.steps, interrupt.asked and done < flags.steps
        if last or stopping or (flags.save_every and done % flags.save_every == 0):
            state = dict(stage="rl", problems=n_problems, flags=vars(flags))
            place = common.save_checkpoint(run, done, model, tokenizer, optimizer, flags.keep, **state)
            log.write("checkpoint", step=done, path=place.name)
        if stopping:
            line.clear(
                f"stopped after step {done}; go on: python rl.py --out {shlex.quote(str(run))} --resume"
            )
            raise SystemExit(130)
        if due(done):
            exam(done)
    best = f"; {run / 'best'} has the highest true score" if (run / "best").exists() else ""
    line.clear(f"done: {place}{best}; talk to it: python sample.py {shlex.quote(str(run))} --chat")


if __name__ == "__main__":
    common.run(main)
