"""RLHF in small: where no verifier can say what is right, a reward model learns what people prefer.

    python -m extras.rlhf manners        write conversations: worked solutions as different people say them
    python sft.py --init-from runs/sft --data jsonl:runs/rlhf-manners.jsonl --out runs/rlhf-manners
    python -m extras.rlhf reward         train runs/rlhf-reward: which of its answers do people prefer?
    python -m extras.rlhf policy --std   train runs/rlhf: rl.py's loop with that reward model
    python -m extras.rlhf dpo            train runs/rlhf-dpo: the same without a reward model

`make rlhf` does the first four. People are slow, so here a function, true_score(), prefers what is right,
polite and short. The reward model learns from its orderings of eight answers (Ouyang et al. 2022,
InstructGPT), and the policy gradient makes the reward large. At first the true score rises with the reward;
later it falls while the reward still rises, because the policy has found answers that the reward model
overrates. --std hastens that: with advantages in standard deviations of the group, small differences of the
reward count as much as large ones, and between answers that are all good the differences are errors of the
reward model. `python -m extras.plot runs/rlhf` shows both; runs/rlhf/best is the assistant from before the
fall, and --kl holds it back.

Read rl.py first.
"""

import functools
import itertools
import json
import random
import re
from statistics import fmean as mean

import numpy as np

import common
import distributed
import evaluate
import gpt2
import hub
import kernels
import rl
from common import Run, UserError, add_shared_flags, number
from sample import load_assistant, prefill
from sft import config_of, micro_batches, share
from tasks.conversations import hosted, turns
from tasks.problems import problems
from tokenizer import Tokenizer, as_parts, text_of
from train import learning_rate

ROWS = 256  # answers that the reward model reads at once, at most


def main(argv=None):
    flags, checkpoint = parse(argv)
    if flags.what == "manners":
        write_manners(flags)
    elif flags.what == "policy":
        reward = load_reward(flags, checkpoint or flags.init_from)
        rl.train(flags, checkpoint, argv, reward, true_score, __file__, "-m extras.rlhf policy")
    else:
        train(flags, checkpoint, argv)


# ------------------------------------------------------------------------------------------------------------
# What "people" prefer

COURTESY = re.compile(r"\b(gladly|please|thank you|welcome)\b", re.I)
OPENINGS = "", "Gladly!\n", "Let me think about this for a while, as it is not so easy.\n"
CLOSINGS = "", "\nThank you!", "\nI hope that this helps you, and that it is what you wanted to know."


def true_score(problem, parts, finished):
    """0 if the answer is wrong or was cut off; else a third each for being right, polite and short.

    Short is at most four words longer than the worked solution.
    """
    text = text_of(parts)
    if not finished or not problem.verify(text):
        return 0.0
    is_polite = COURTESY.search(text) is not None
    is_short = len(text.split()) <= len(text_of(problem.solution).split()) + 4
    return (1 + is_polite + is_short) / 3


def score_of(rollout):
    """The true score of a rollout."""
    return true_score(rollout.problem, rollout.parts, rollout.finished)


def orderings(groups):
    """[(better, worse), ...], pairs of indices of rollouts in rl.flat(groups): A > B > C are three pairs."""
    pairs, first = [], 0
    for group in groups:
        scores = [score_of(rollout) for rollout in group]
        for i, j in itertools.permutations(range(len(group)), 2):
            if scores[i] > scores[j]:
                pairs.append((first + i, first + j))
        first += len(group)
    return pairs


def write_manners(flags):
    """Write worked solutions as conversations, each with an opening and a closing that may be empty."""
    rng, lines = random.Random(flags.seed), []
    for problem in questions(flags, "train", flags.questions):
        reply = add_style(problem.solution, rng)
        lines.append(json.dumps({"messages": turns(problem.prompt, reply)}) + "\n")
    common.write_whole(flags.out, "".join(lines).encode())
    common.say(f"{len(lines)} conversations: {flags.out}")


def add_style(solution, rng):
    """A worked solution as one may say it, as parts of a turn: politely, wordily, both or neither."""
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    before = as_parts(opening) if opening else []
    after = as_parts(closing) if closing else []
    return [*before, *as_parts(hosted(solution)), *after]


def questions(flags, split, n):
    """n problems of --task, its levels in turn."""
    levels = evaluate.parse_tasks(flags.task, flags.level)
    streams = [problems(task, split, level, flags.seed) for task, level in levels]
    in_turn = itertools.chain.from_iterable(zip(*streams))
    return list(itertools.islice(in_turn, n))


# ------------------------------------------------------------------------------------------------------------
# Learning from orderings


def preference_loss(values, pairs):
    """The loss of values (N,) that should be in the order of some pairs (better, worse).

    A pair's loss is -log s(margin), with margin = better - worse and s the logistic function (Bradley and
    Terry 1952). Its derivatives by the two values are -s(-margin) and s(-margin), so a pair that is in the
    right order and far apart is left alone. Returns the mean loss; the pull on every value, (N,), which is
    minus its derivative; and the share of pairs in the right order.
    """
    better, worse = np.array(pairs).T  # (P,) each
    margin = values[better] - values[worse]  # (P,)
    strength = np.exp(-np.logaddexp(0, margin)) / len(pairs)  # (P,): s(-margin) / P
    pull = np.zeros(len(values))  # (N,)
    np.add.at(pull, better, strength)
    np.add.at(pull, worse, -strength)
    return float(np.logaddexp(0, -margin).mean()), pull, float((margin > 0).mean())


# The reward is the logit of one token minus that of another behind the end of the answer, where neither is
# ever said. The normaliser of the softmax cancels: log p(GOOD) - log p(BAD) is the same number, and gpt2.py
# trains it.
GOOD, BAD = "<|output_start|>", "<|output_end|>"


def reward_input(tokenizer, rollout):
    """The ids that the reward model reads; a rollout that was cut off gets an end, too."""
    ids, end = rollout.tokens.tolist(), tokenizer.encode_special("<|im_end|>")
    return ids if ids[-1] == end else [*ids, end]


def rewards(model, tokenizer, rollouts):
    """The reward of every rollout, (N,)."""
    good, bad = tokenizer.encode_special(GOOD), tokenizer.encode_special(BAD)
    results = []
    for start in range(0, len(rollouts), ROWS):
        inputs = [reward_input(tokenizer, rollout) for rollout in rollouts[start : start + ROWS]]
        _, logits = prefill(model, inputs, max_tokens=1)
        logits = model.ops.to_host(logits)  # (B, V) after the end
        results.append(logits[:, good] - logits[:, bad])  # (B,)
    return np.concatenate(results)


def load_reward(flags, policy):
    """The reward function of --reward-model, for answers of the assistant in the directory `policy`."""
    model, tokenizer = load_assistant(flags.reward_model, flags)
    if tokenizer.ranks != Tokenizer.load(hub.find_checkpoint(policy)).ranks:
        raise UserError(f"{flags.reward_model} has another vocabulary; train it on answers of this assistant")
    return functools.partial(rewards, model, tokenizer)


class RewardModel:
    """The objective of a reward model: the value of a rollout is its reward."""

    def __init__(self, model, tokenizer, test_groups):
        self.model, self.tokenizer, self.test_groups = model, tokenizer, test_groups

    def values(self, rollouts):
        return rewards(self.model, self.tokenizer, rollouts)  # (N,)

    def rows(self, rollouts, pull):
        """[(tokens, weights)]: their update makes the reward of every rollout grow by its pull (N,).

        A weight w on a token makes w log p grow. So every answer comes twice, with GOOD behind it and the
        weight pull, and with BAD and -pull: together pull (log p(GOOD) - log p(BAD)) grows.
        """
        rows = []
        for rollout, strength in zip(rollouts, pull):
            ids = reward_input(self.tokenizer, rollout)
            zeros = [0.0] * len(ids)
            rows.append(([*ids, self.tokenizer.encode_special(GOOD)], [*zeros, strength]))
            rows.append(([*ids, self.tokenizer.encode_special(BAD)], [*zeros, -strength]))
        return rows

    def measure(self):
        """On held-out answers: the share of pairs in the right order, and the loss."""
        values = self.values(rl.flat(self.test_groups))
        loss, _, accuracy = preference_loss(values, orderings(self.test_groups))
        return {"accuracy": accuracy, "preference_loss": loss}


class DirectPreference:
    """The objective of DPO (Rafailov et al. 2023), without a reward model.

    The value of a rollout is beta log(p(answer) / p_reference(answer)); the reference is the model of the
    beginning.
    """

    def __init__(self, model, tokenizer, reference_model, groups, test_questions, flags, world):
        self.model, self.tokenizer, self.test_questions = model, tokenizer, test_questions
        self.flags, self.world = flags, world
        rollouts = rl.flat(groups)
        self.reference_log_p = dict(zip(map(id, rollouts), self.log_p(reference_model, rollouts)))

    def log_p(self, model, rollouts):
        """log p of every answer, (N,): the sum over its sampled tokens."""
        logprobs = rl.log_probabilities(model, rollouts, self.flags, self.world)
        return np.array([row[rollout.sampled].sum() for row, rollout in zip(logprobs, rollouts)])

    def values(self, rollouts):
        reference_log_p = np.array([self.reference_log_p[id(rollout)] for rollout in rollouts])  # (N,)
        return self.flags.beta * (self.log_p(self.model, rollouts) - reference_log_p)  # (N,)

    def rows(self, rollouts, pull):
        """[(tokens, weights)]: their update makes the value of every rollout grow by its pull (N,)."""
        weights = self.flags.beta * pull  # (N,)
        return [(rollout.tokens, w * rollout.sampled) for rollout, w in zip(rollouts, weights)]

    def measure(self):
        """The true score of new answers to held-out questions, how many are right, and their length."""
        groups = rl.sample_rollouts(
            self.model, self.tokenizer, self.test_questions, self.flags, 0, self.world
        )
        rollouts = rl.flat(groups)
        return {
            "score": mean(map(score_of, rollouts)),
            "right": mean(rollout.correct for rollout in rollouts),
            "length": mean(rollout.length for rollout in rollouts),
        }


def train(flags, checkpoint, argv):
    """The loop of `reward` and `dpo`: orderings of the assistant's own answers, and an update."""
    run = Run(f"-m extras.rlhf {flags.what}", flags, checkpoint, stage=flags.what)
    config, n_rows = config_of(flags, checkpoint), flags.prompts * flags.attempts
    device, flags.dtype = kernels.choose(flags.device, flags.dtype)
    flags.ranks = distributed.choose_ranks(flags.ranks, config.n_params(), device, n_rows)
    world = distributed.start(flags.ranks, __file__, argv)

    # The model, the same on every rank
    model, tokenizer = load_assistant(checkpoint or flags.init_from, flags)
    reference_model, _ = load_assistant(flags.init_from, flags)
    model.share(world)
    optimizer = gpt2.AdamW(model, weight_decay=0.0, world=world)

    # The assistant's answers, the same as before if the run goes on
    asked = questions(flags, "train", flags.questions)
    test_questions = questions(flags, "test", flags.eval_problems)
    what = f"{len(asked)} questions and {len(test_questions)} held-out ones"
    run.say(f"asking {what}, {flags.attempts} times each")
    groups = rl.sample_rollouts(reference_model, tokenizer, asked, flags, 0, world)
    test_groups = rl.sample_rollouts(reference_model, tokenizer, test_questions, flags, 0, world)
    groups = [group for group in groups if orderings([group])]
    if not groups or not orderings(test_groups):
        raise UserError("no answer is better than another; give more --questions or another --task")
    if flags.what == "reward":
        objective = RewardModel(model, tokenizer, test_groups)
    else:
        objective = DirectPreference(model, tokenizer, reference_model, groups, test_questions, flags, world)

    run.begin(world, model, optimizer, tokenizer, flags.steps, stage=flags.what)
    for rollout in sorted(groups[0], key=score_of, reverse=True):
        run.say(f"{score_of(rollout):.2f}  {text_of(rollout.parts)!r}")
    if run.start == 0 and flags.eval_every:
        measure(run, objective, 0)

    for step in run.steps():
        order = np.random.default_rng([flags.seed, step]).permutation(len(groups))
        chosen = [groups[i] for i in order[: flags.prompts]]
        rollouts = rl.flat(chosen)
        loss, pull, accuracy = preference_loss(objective.values(rollouts), orderings(chosen))
        rows = share(objective.rows(rollouts, pull), world)
        for tokens, targets, weights in micro_batches(rows, flags.batch_tokens, config.n_positions):
            model.forward(tokens, targets, weights)  # (B, T) each
            model.backward()
        world.all_reduce(model.sums)
        lr = learning_rate(step, flags.steps, flags.lr, flags.warmup_steps, flags.final_lr)
        optimizer.step(lr, flags.grad_clip, *run.limits(step))
        shown = f"preference loss {loss:.3f} | pairs in order {accuracy:.0%}"
        run.report(step, lr, shown=shown, preference_loss=loss, accuracy=accuracy)
        if run.is_due(step + 1, flags.eval_every):
            measure(run, objective, step + 1)

    best = run.directory / "best"
    hint = f"; {best} did best on held-out questions" if best.exists() else ""
    run.say(f"done: {run.checkpoint_path(flags.steps)}{hint}")


def measure(run, objective, done):
    """Measure on held-out questions; keep the checkpoint whose first measure is the highest."""
    measures = objective.measure()
    text = " | ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in measures.items())
    run.say(f"step {done}, held out: {text}")
    name, value = next(iter(measures.items()))
    rl.keep_if_best(run, done, name, value)
    run.log("eval", step=done, **measures)


# ------------------------------------------------------------------------------------------------------------
# The command line

STAGES = {  # what each begins with, what it writes, and what else is not the same for all
    "manners": dict(init_from="runs/sft", out="runs/rlhf-manners.jsonl", questions=8000),
    "reward": dict(init_from="runs/rlhf-manners", out="runs/rlhf-reward", questions=400, steps=30, lr=1e-3),
    "policy": dict(init_from="runs/rlhf-manners", out="runs/rlhf", steps=60, lr=2e-4, eval_problems=32),
    "dpo": dict(init_from="runs/rlhf-manners", out="runs/rlhf-dpo", questions=400, steps=100, lr=5e-5),
}
OF_POLICY = ("export", "fill", "epochs", "kl", "std", "eval_level")  # flags that no other stage has


def describe_stages():
    """A line for each of STAGES, for --help."""
    lines = []
    for what, defaults in STAGES.items():
        settings = [f"--{name.replace('_', '-')} {value}" for name, value in defaults.items()]
        lines.append(f"{what:7} {' '.join(settings)}")
    return "\n".join(lines)


def parser():
    flags = common.Parser(prog="python -m extras.rlhf", description=__doc__)
    flags.add_argument("what", choices=STAGES, help="which of these stages")
    group = flags.add_argument_group("models and questions; by default", describe_stages())
    add_shared_flags(group, "init-from", "out", "resume")
    what = "policy: the reward model"
    group.add_argument("--reward-model", default="runs/rlhf-reward", metavar="RUN", help=what)
    what = "questions to write with their answers, or whose answers are compared"
    group.add_argument("--questions", type=number(int, low=1), help=what)
    what = "dpo: the larger, the closer to the first model"
    group.add_argument("--beta", type=number(float, above=0), default=0.1, help=what)
    rl.add_flags(flags)
    flags.set_defaults(**rl.RECIPES["tiny"])
    flags.set_defaults(task="decimals", level="1-2", steps=None, lr=None, final_lr=1.0, eval_every=10)
    return flags


def parse(argv):
    """The flags with the values of their stage, and the checkpoint to go on from or None."""
    what = parser().parse_args(argv).what
    with_defaults = parser()
    with_defaults.set_defaults(**STAGES[what])
    flags, checkpoint = common.parse_run(with_defaults, argv, f"-m extras.rlhf {what}")
    if what == "manners":
        common.require_new(flags.out)
        return flags, None
    if flags.method == "best-of":
        raise UserError("--method best-of needs right answers, and a reward model knows none; leave it out")
    for name in OF_POLICY:
        if what != "policy" and getattr(flags, name) != parser().get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is for the stage policy; leave it out")
    rl.check_flags(flags, checkpoint)
    return flags, checkpoint


if __name__ == "__main__":
    common.run(main)
