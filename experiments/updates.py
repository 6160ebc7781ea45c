"""Two updates that several experiments make: by the policy gradient, and of a reward model.

rl.py and extras/rlhf.py have the mathematics, and loops with logs, checkpoints and ranks around it.
"""

import numpy as np

import gpt2
import rl
from common import UserError
from experiments.report import ALONE
from extras import rlhf
from sft import micro_batches


def learn(model, optimizer, groups, flags, lr):
    """One update by the policy gradient, from the rewards of groups of rollouts."""
    kept = []
    for group in groups:
        kept += rl.set_advantages(group, "grpo", flags.std)
    if not kept:
        return
    rows = rl.policy_gradient_rows(model, kept, None, 0, flags, ALONE)
    for tokens, targets, weights in micro_batches(rows, flags.batch_tokens, model.config.n_positions):
        model.forward(tokens, targets, weights)  # (B, T) each
        model.backward()
    optimizer.step(lr, max_norm=1.0)


def fit_reward(judge, pairs, steps, seed, per_step):
    """Train a RewardModel on pairs (better, worse) of rollouts, per_step of them at a time."""
    if not pairs:
        raise UserError("no answer is better than another: there is nothing that a reward model could learn")
    model, optimizer = judge.model, gpt2.AdamW(judge.model, weight_decay=0.0)
    for step in range(steps):
        order = np.random.default_rng([seed, step]).permutation(len(pairs))[:per_step]
        rollouts = [rollout for i in order for rollout in pairs[i]]  # better, worse, better, ...
        numbers = [(i, i + 1) for i in range(0, len(rollouts), 2)]
        _, pull, _ = rlhf.preference_loss(judge.values(rollouts), numbers)  # (2 per_step,)
        rows = judge.rows(rollouts, pull)
        for tokens, targets, weights in micro_batches(rows, 8192, model.config.n_positions):
            model.forward(tokens, targets, weights)  # (B, T) each
            model.backward()
        optimizer.step(1e-3, max_norm=1.0)
