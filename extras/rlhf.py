"""RLHF in small: where no verifier can say what is right, a reward model learns what people prefer.

    python -m extras.rlhf manners    write conversations: worked solutions as different people would say them
    python sft.py --init-from runs/sft --data jsonl:runs/rlhf-manners.jsonl --out runs/rlhf-manners --epochs 1
    python -m extras.rlhf train      make runs/rlhf-reward: a model of which of its answers people prefer
    python rl.py --reward model --init-from runs/rlhf-manners --out runs/rlhf --task decimals --level 1-2
    python -m extras.rlhf dpo        make runs/rlhf-dpo: the same without a reward model

`make rlhf` does the first four. People are slow: here true_score() prefers what is right, polite and short.
The reward model learns from its orderings of eight answers (Ouyang et al. 2022, InstructGPT), and the policy
gradient pleases that model. With the reward the true score rises, and then it falls while the reward still
rises: the assistant has found what the reward model wrongly loves. `python -m extras.plot runs/rlhf` shows
both; runs/rlhf/best is the assistant from before the fall; --kl holds it back.
"""

import itertools
import json
import random
import re
import time
from pathlib import Path

import numpy as np

import attempts
import batches
import common
import gpt2
import tasks.conversations as mixture
import tasks.problems as tasks
from attempts import mean
from common import UserError, duration, number
from tokenizer import text_of

# ------------------------------------------------------------------------------------ what "people" prefer

COURTESY = re.compile(r"\b(gladly|please|thank you|welcome)\b", re.I)
OPENINGS = "", "Gladly!\n", "Let me think about this for a while, as it is not so easy.\n"
CLOSINGS = "", "\nThank you!", "\nI hope that this helps you, and that it is what you wanted to know."


def true_score(attempt):
    """0 if it is wrong or never ends; else a third each for being right, polite, and at most four words
    longer than the worked solution."""
    said, solution = (text_of(some) for some in (attempt.parts, attempt.problem.solution))
    polite, short = COURTESY.search(said) is not None, len(said.split()) <= len(solution.split()) + 4
    return (1 + polite + short) / 3 if attempt.correct > 0 else 0.0


def dressed(solution, rng):
    """A worked solution as one may say it: politely, wordily, both or neither."""
    text = lambda words: [{"type": "text", "text": words}] if words else []
    parts = text(solution) if isinstance(solution, str) else mixture.hosted(solution)
    return [*text(rng.choice(OPENINGS)), *parts, *text(rng.choice(CLOSINGS))]


def orderings(groups):
    """[(better, worse), ...], numbers of attempts counted through all groups: A > B > C are three pairs."""
    numbers = itertools.count()
    scored = [[(next(numbers), true_score(attempt)) for attempt in group] for group in groups]
    return [(i, j) for group in scored for (i, a), (j, b) in itertools.permutations(group, 2) if a > b]


# ---------------------------------------------------------------------------------- learning from orderings


def preferred(values, pairs):
    """Of pairs (better, worse) of values (N,): the mean loss -log s(better - worse), s the logistic function;
    minus its derivative by every value, (N,); the share of pairs in the right order.

    With margin = better - worse the loss has the derivatives -s(-margin) and s(-margin) by the two: what is
    in the right order and far apart is left alone.
    """
    better, worse = np.array(pairs).T  # (P,) each
    margin, pull = values[better] - values[worse], np.zeros(len(values))  # (P,), (N,)
    share = np.exp(-np.logaddexp(0, margin)) / len(pairs)  # (P,): s(-margin) / P
    np.add.at(pull, better, share)
    np.add.at(pull, worse, -share)
    return float(np.logaddexp(0, -margin).mean()), pull, float((margin > 0).mean())


# The reward is the logit of one token minus that of another behind the end of the answer, where neither is
# ever said. The softmax's normaliser cancels: log p(GOOD) - log p(BAD) is the same, and gpt2.py trains it.
GOOD, BAD = "<|output_start|>", "<|output_end|>"


def heard(tokenizer, attempt):
    """The ids that the reward model reads; what was cut off has an end, too."""
    ids, end = attempt.tokens.tolist(), tokenizer.encode_special("<|im_end|>")
    return ids if ids[-1] == end else [*ids, end]


def rewards(model, tokenizer, some):
    """The reward of every attempt, (N,)."""
    good, bad, found = tokenizer.encode_special(GOOD), tokenizer.encode_special(BAD), []
    for i in range(0, len(some), attempts.ROWS):
        read = [heard(tokenizer, attempt) for attempt in some[i : i + attempts.ROWS]]
        lengths = [len(ids) for ids in read]
        tokens = np.array([ids + [0] * (max(lengths) - len(ids)) for ids in read], np.int32)  # (B, T)
        logits = model.ops.to_host(model.decode(tokens, model.new_cache(*tokens.shape), lengths))  # (B, V)
        found.append(logits[:, good] - logits[:, bad])
    return np.concatenate(found)


def reward_rows(tokenizer, some, pull):
    """Rows for batches.accumulate() with whose gradient every reward grows by its pull.

    A weight w on a token makes w log p grow. So every answer comes twice, with GOOD behind it and the weight
    pull, with BAD and -pull; together they make pull (log p(GOOD) - log p(BAD)) grow.
    """
    good, bad = map(tokenizer.encode_special, (GOOD, BAD))
    read = [(heard(tokenizer, attempt), p) for attempt, p in zip(some, pull)]
    return [([*ids, t], [0] * len(ids) + [w]) for ids, p in read for t, w in ((good, p), (bad, -p))]


flat = itertools.chain.from_iterable


def judge(flags, tokenizer):
    """What rl.py has to say judge(groups) with: it writes the reward model's opinion into the attempts and
    returns the means of that and of the true score. With --reward verifier it leaves them as they are."""
    if flags.reward == "verifier":
        return lambda groups: {}
    model, others = attempts.load(flags.reward_model, flags)
    if others.ranks != tokenizer.ranks:
        raise UserError(f"{flags.reward_model} has another vocabulary; train it on answers of this assistant")

    def judged(groups):
        some = list(flat(groups))
        for attempt, r in zip(some, rewards(model, tokenizer, some)):
            attempt.reward = float(r)
        return dict(score=mean(map(true_score, some)), reward=mean(attempt.reward for attempt in some))

    return judged


def questions(flags, split, n=None):
    """Problems of --task, its levels by turns: n of them, or without end."""
    levels = attempts.shares(flags.task, flags.level)
    streams = [tasks.problems(task, split, level, flags.seed) for task, level in levels]
    return itertools.islice(flat(zip(*streams)), n)


def compare(flags, model, tokenizer, optimizer, tested):
    """train and dpo: update(step, lr) and examine(), both with the assistant's own answers in order."""
    talk = lambda some: attempts.sample(model, tokenizer, some, flags.attempts, flags.max_tokens, flags.seed)
    asked = list(questions(flags, "train", flags.questions))
    common.say(f"asking {len(asked)} questions and {len(tested)} held-out ones, {flags.attempts} times each")
    groups, others = talk(asked), talk(tested)
    groups = [group for group in groups if orderings([group])]
    if not groups or not orderings(others):
        raise UserError("no answer is better than another; give more --questions or another --task")
    for attempt in sorted(groups[0], key=true_score, reverse=True):
        common.say(f"{true_score(attempt):.2f}  {text_of(attempt.parts)!r}")
    if flags.what == "train":
        value, held_out = lambda some: rewards(model, tokenizer, some), list(flat(others))
        rows = lambda some, pull: reward_rows(tokenizer, some, pull)
        examine = lambda: dict(zip(("accuracy", "loss"), preferred(value(held_out), orderings(others))[::-2]))
    else:  # DPO (Rafailov et al. 2023): the reward is the assistant's own, beta log(p(answer) / p at first)
        all_log_p = lambda some: zip(attempts.log_probabilities(model, some, flags.batch_tokens), some)
        log_p = lambda some: np.array([found[attempt.drawn].sum() for found, attempt in all_log_p(some)])
        begun = dict(zip(map(id, flat(groups)), log_p(list(flat(groups)))))
        value = lambda some: flags.beta * (log_p(some) - [begun[id(attempt)] for attempt in some])
        rows = lambda some, pull: [(a.tokens, flags.beta * p * a.drawn) for a, p in zip(some, pull)]

        def examine():
            some = list(flat(talk(tested)))
            score, right = mean(map(true_score, some)), mean(attempt.correct for attempt in some)
            return dict(score=score, right=right, length=mean(len(attempt.said) for attempt in some))

    def update(step, lr):
        order = np.random.default_rng([flags.seed, step]).permutation(len(groups))[: flags.prompts]
        some = list(flat(groups[i] for i in order))
        loss, pull, right = preferred(value(some), orderings(groups[i] for i in order))
        batches.accumulate(model, rows(some, pull), flags.batch_tokens)
        return dict(loss=loss, accuracy=right, norm=optimizer.step(lr, flags.grad_clip))

    return update, examine


# ----------------------------------------------------------------------------------------- the command line

STAGES = {  # what each begins with, what it writes, its --questions, --steps and --lr
    "manners": ("runs/sft", "runs/rlhf-manners.jsonl", 8000, 1, 1.0),
    "train": ("runs/rlhf-manners", "runs/rlhf-reward", 400, 60, 1e-3),
    "dpo": ("runs/rlhf-manners", "runs/rlhf-dpo", 400, 100, 5e-5),
}


def parser():
    flags = common.Parser(prog="python -m extras.rlhf", description=__doc__)
    whole, real = number(int, low=1), number(float, above=0)
    flags.add_argument("what", choices=STAGES, help="which of these stages")
    add = flags.add_argument_group("models (if others than above) and questions").add_argument
    add("--init-from", metavar="DIR", help="the model to begin with")
    add("--out", metavar="RUN", help="the run's directory, a new one; for manners a file")
    add("--task", default="decimals", metavar="SPEC", help="a task, or several by turns: decimals,word")
    add("--level", default="1-2", metavar="N", help="how difficult: 2, or a range")
    add("--questions", type=whole, metavar="N", help="to write (8000), or with answers to compare (400)")
    add = flags.add_argument_group("steps").add_argument
    add("--steps", type=whole, metavar="N", help="updates (100; train: 60)")
    add("--lr", type=real, metavar="X", help="learning rate (train: 0.001, dpo: 0.00005)")
    add("--prompts", type=whole, default=16, metavar="P", help="questions in a step")
    add("--attempts", type=number(int, low=2), default=8, metavar="G", help="answers to each")
    add("--beta", type=real, default=0.1, metavar="X", help="dpo: the larger, the closer to the first model")
    add = flags.add_argument_group("examinations, and chance").add_argument
    add("--eval-every", type=whole, default=10, metavar="N", help="steps between two")
    add("--eval-problems", type=whole, default=64, metavar="N", help="held-out questions of each")
    add("--seed", type=number(int, 0, 2**63), default=42, metavar="N", help="questions and answers")
    flags.set_defaults(max_tokens=96, batch_tokens=8192, grad_clip=1.0, device="auto", dtype="float32")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    for name, value in zip(("init_from", "out", "questions", "steps", "lr"), STAGES[flags.what]):
        setattr(flags, name, getattr(flags, name) or value)
    common.require_new(flags.out)
    run, best, state = Path(flags.out), -np.inf, dict(stage=flags.what, flags=vars(flags))
    if flags.what == "manners":
        rng, some = random.Random(flags.seed), questions(flags, "train", flags.questions)
        talks = [dict(messages=mixture.turns(p.prompt, dressed(p.solution, rng))) for p in some]
        run.parent.mkdir(parents=True, exist_ok=True)
        run.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
        return common.say(f"{len(talks)} conversations: {run}")
    model, tokenizer = attempts.load(flags.init_from, flags)
    optimizer = gpt2.AdamW(model, weight_decay=0.0)
    tested = list(questions(flags, "test", flags.eval_problems))
    update, examine = compare(flags, model, tokenizer, optimizer, tested)
    run.mkdir(parents=True, exist_ok=True)
    log, line, interrupt = common.Log(run), common.Line(), common.Interrupt()
    words = lambda measures: " | ".join(f"{name} {value:.3f}" for name, value in measures.items())
    log.write("start", step=0, **state)
    began = time.perf_counter()
    for step in range(flags.steps + 1):
        if step == flags.steps or step % flags.eval_every == 0:
            found = examine()  # score or accuracy first
            log.write("eval", step=step, **found)
            line.clear(f"step {step}, held out: {words(found)}")
            if (value := next(iter(found.values()))) > best:
                best, stop = value, step
                common.save_checkpoint(run / "best", step, model, tokenizer, optimizer, 1, **state)
        if step == flags.steps:
            break
        lr = flags.lr * min(1, (step + 1) / 5)  # 5 steps up to --lr
        measures = update(step, lr)
        log.write("step", step=step + 1, lr=lr, **measures)
        left = duration((time.perf_counter() - began) / (step + 1) * (flags.steps - step - 1))
        line.show(f"step {step + 1}/{flags.steps} | {words(measures)} | {left} left")
        if interrupt.asked:
            line.clear(f"stopped after step {step + 1}; delete {run} to start anew ({run / 'best'} is there)")
            raise SystemExit(130)
    common.save_checkpoint(run, step, model, tokenizer, optimizer, 1, **state)
    line.clear(f"done: {run}; {run / 'best'} is from step {stop}, with {next(iter(found))} {best:.3f}")


if __name__ == "__main__":
    common.run(main)
