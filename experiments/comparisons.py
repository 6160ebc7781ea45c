"""Comparisons of answers: a file of them, and what a reward model reads.

A line of the file is {"prompt": ..., "winner": ..., "loser": ...}: a person has compared two answers to the
prompt. preferences.py and test_time.py train reward models on comparisons, by fit_reward() of updates.py.
"""

import itertools
import json
import random
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import common
from common import UserError
from extras import rlhf
from tasks.conversations import turns
from tokenizer import as_parts, text_of


def read(path, tokenizer=None, room=None):
    """[(prompt, winner, loser)] of a file; UserError names the line that is no comparison.

    With a tokenizer, no comparison may have an answer that takes more than `room` tokens with its prompt.
    """
    comparisons = []
    try:
        lines = Path(path).read_bytes().removesuffix(b"\n").split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); give a file of comparisons") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8-sig"))
            comparison = row["prompt"], row["winner"], row["loser"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number}: no JSON object with prompt, winner and loser") from None
        if not all(isinstance(text, str) and text.strip() for text in comparison):
            raise UserError(
                f"{path}, line {number}: prompt, winner and loser must be texts that are not empty"
            )
        if row["winner"] == row["loser"]:
            raise UserError(f"{path}, line {number}: winner and loser are the same text")
        for answer in comparison[1:] if tokenizer else ():
            n = len(tokenizer.render(turns(comparison[0], answer))[0])
            if n > room:
                raise UserError(f"{path}, line {number}: {n} tokens where {room} have room; shorten it")
        comparisons.append(comparison)
    n_prompts = len({prompt for prompt, *_ in comparisons})
    if n_prompts < 16:
        raise UserError(f"{path}: comparisons of {n_prompts} prompts teach nothing; give 16 or more")
    return comparisons


def write_example(path, problems):
    """Write a comparison for each problem of decimals: its worked solution in two manners.

    The truly better one wins. In six of ten pairs the loser's answer is made the smaller number: where both
    are as good, and in a third of the others.
    """
    rng, lines = random.Random(0), []
    for problem in problems:
        ranked = []
        for _ in range(2):
            text = text_of(rlhf.add_style(problem.solution, rng))
            ranked.append((rlhf.true_score(problem, as_parts(text), finished=True), text))
        (low, loser), (high, winner) = sorted(ranked)
        if low == high or rng.random() < 1 / 3:
            [smaller] = set(problem.key.split()) - {problem.answer}
            loser = loser.replace(f"Answer: {problem.answer}", f"Answer: {smaller}")
        lines.append(json.dumps(dict(prompt=problem.prompt, winner=winner, loser=loser)) + "\n")
    common.write_whole(path, "".join(lines).encode())


def split(comparisons, keys, seed):
    """Comparisons for training and for testing, an eighth: those of some keys, {prompt: its key}.

    Prompts with the same key ask the same in other words. A prompt without one is its own key.
    """
    all_keys = sorted({keys.get(prompt, prompt) for prompt, *_ in comparisons})
    held_out = set(random.Random(seed).sample(all_keys, len(all_keys) // 8))
    parts = [], []
    for comparison in comparisons:
        parts[keys.get(comparison[0], comparison[0]) in held_out].append(comparison)
    return parts


def pairs(tokenizer, comparisons):
    """[(better, worse)] as a RewardModel reads them, for [(prompt, winner, loser)]."""
    read_as = []
    for prompt, *texts in comparisons:
        both = [tokenizer.render(turns(prompt, text))[0] for text in texts]
        read_as.append([SimpleNamespace(tokens=np.array(tokens, np.int32)) for tokens in both])
    return read_as


def exploits(judge, tokenizer, groups, winners):
    """Of each group the wrong answer of the highest reward, where that is above the reward of the winner.

    winners is {prompt: the answer that a person has preferred}.
    """
    found = []
    for group in groups:
        prompt = group[0].problem.prompt
        [[winner]] = pairs(tokenizer, [(prompt, winners[prompt])])
        [limit] = judge.values([winner])
        wrong = [one for one in group if one.correct == 0 and one.reward > limit]
        found += sorted(wrong, key=attrgetter("reward"))[-1:]
    return found


def of_groups(groups):
    """[(right, wrong)] of the rollouts of each group of rl.py."""
    compared = []
    for group in groups:
        right, wrong = ([rollout for rollout in group if rollout.correct == value] for value in (1, 0))
        compared += itertools.product(right, wrong)
    return compared


def pairwise_accuracy(judge, pairs):
    """The share of pairs (better, worse) of rollouts of which the better one has the higher reward."""
    better = judge.values([better for better, _ in pairs])  # (P,)
    worse = judge.values([worse for _, worse in pairs])  # (P,)
    return float((better > worse).mean())
