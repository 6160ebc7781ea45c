"""What a model can do, in numbers: an assistant's skills, the facts it knows, the problems it solves.

    python evaluate.py RUN                              an assistant's skills, as a table
    python evaluate.py RUN --known known.jsonl          the same, with the facts that a probe found known
    python evaluate.py RUN --probe known.jsonl          ask every factual question, write what it knows
    python evaluate.py RUN --task word --level 1-3      problems: pass@1, pass@k and the majority vote
    python evaluate.py RUN --hellaswag hub              HellaSwag's accuracy, of a base model too
    python evaluate.py BASE SFT RL --compare            what several models say to the same prompts

All our questions are held out: phrasings, numbers, words and names that do not occur in training. Read
sample.py and tasks/conversations.py, which has the questions, before this file, sft.py and rl.py after it.
"""

import itertools
import json
import math
import random
import re
import shutil
import textwrap
from statistics import fmean as mean

import numpy as np

import common
import distributed
import hub
import sample
from common import Parser, UserError, add_shared_flags, number, run, say
from tasks.conversations import DONT_KNOW, arithmetic, given, talk, turns
from tasks.factbook import facts, has_words, invented, matches, plain, read_probe, texts
from tasks.problems import TASKS, problems, votes
from tokenizer import text_of
from tools import SEARCH_SYSTEM, TOOLS

BARS = {  # what an assistant should reach: {skill: {measure: (at least, at most)}}
    "identity": {"named": (0.95, 1)},
    "small talk": {"right": (0.6, 1)},
    "known facts": {"right": (0.8, 1), "refused": (0, 0.15)},
    "invented names": {"refused": (0.8, 1)},
    "search": {"right": (0.7, 1)},
    "calculator": {"called": (0.9, 1), "copied": (0.95, 1)},
    "counting": {"right": (0.8, 1)},
    "spelling": {"right": (0.8, 1)},
    "given facts": {"right": (0.7, 1)},
    "by turn": {"turn_1": (0.85, 1), "turn_2": (0.8, 1), "turn_3": (0.8, 1), "turn_5": (0.8, 1)},
}
NAME = "Handmade"  # what the assistant should call itself
WORD = re.compile(r"\S*[^\s.]")  # a word or a number, without the full stop behind it
ROWS = 64  # prompts in a batch
ALONE = distributed.World(0, 1)  # a world of one rank

# ------------------------------------------------------------------------------------------------------------
# Asking


def ask(model, tokenizer, conversations, tools=None, max_tokens=96, temperature=0.0, seed=0, world=ALONE):
    """The assistant's next turn in every conversation, as a list of parts; `tools` are those of sample.Host.

    With a `world` of several ranks each rank asks conversations[rank::size], and all of them return all
    replies. Random streams are numbered globally, so the replies do not depend on the number of ranks.
    """
    kept = [sample.fit_to_context(model, tokenizer, one, max_tokens) for one in conversations]
    prompts = [tokenizer.prompt(conversation) for conversation in kept]
    replies = reply_to(model, tokenizer, prompts, tools, max_tokens, temperature, seed, world)
    return [reply["parts"] for reply in replies]


def reply_to(model, tokenizer, prompts, tools, max_tokens, temperature, seed, world=ALONE):
    """For every prompt (a list of ids) {"parts": the reply, "length": tokens, "finished": not cut off}."""
    streams = range(len(prompts))
    progress = common.Progress("asking", total=len(prompts[world.rank :: world.size]))
    results = sample_replies(
        model, tokenizer, prompts, tools, max_tokens, temperature, seed, streams, world, ROWS, progress
    )
    replies = []
    for ids, _, _, finished in results:
        replies.append({"parts": tokenizer.parts(ids), "length": len(ids), "finished": finished})
    return replies


def sample_replies(
    model, tokenizer, prompts, tools, max_tokens, temperature, seed, streams, world, rows, progress=None
):
    """For every prompt [ids, forced, logprobs, finished], as sample.Completion has them, on every rank.

    Each rank samples prompts[rank::size], `rows` of them at once; streams are the prompts' random streams.
    """
    host = sample.Host(tokenizer, tools or {})
    stop_tokens = {tokenizer.eot, tokenizer.encode_special("<|im_end|>")}
    mine = range(world.rank, len(prompts), world.size)
    order = sorted(mine, key=lambda i: len(prompts[i]))  # similar lengths in one batch: little padding
    results = [None] * len(prompts)
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        completions = sample.generate(
            model, [prompts[i] for i in batch], max_tokens, temperature, seed=seed, stop_tokens=stop_tokens,
            streams=[streams[i] for i in batch],
            on_token=lambda completion, shown, logits: host.reply(completion),
        )  # fmt: skip
        for i, one in zip(batch, completions):
            results[i] = [one.ids, one.forced, one.logprobs, one.finish == "stop"]
        if progress and world.rank == 0:
            progress.add(len(batch))
    if progress:
        progress.line.clear()
    for rank, results_of_rank in enumerate(world.gather([results[i] for i in mine])):
        results[rank :: world.size] = results_of_rank
    return results


# ------------------------------------------------------------------------------------------------------------
# The probe: which facts does a model know?


def probe(model, tokenizer, k, seed, path=None):
    """Ask for every fact k times at temperature 1, in a phrasing of the training.

    Returns, and writes to `path` as lines of JSON, {"country", "field", "question", "answer", "split",
    "rate"}: the rate is the share of right replies. A fact counts as known if most replies are right, since a
    guess is right now and then.
    """
    asked = [(split, fact) for split in ("train", "test") for fact in facts(split)]
    conversations = [turns(fact.questions[0]) for _, fact in asked for _ in range(k)]
    replies = ask(model, tokenizer, conversations, max_tokens=40, temperature=1.0, seed=seed)
    lines = []
    for i, (split, fact) in enumerate(asked):
        n_right = sum(matches(fact, text_of(reply)) for reply in replies[i * k : (i + 1) * k])
        line = dict(country=fact.country, field=fact.field, question=fact.questions[0], answer=fact.answer)
        lines.append({**line, "split": split, "rate": n_right / k})
    if path:
        common.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    for split, where in (("train", "asked about in training"), ("test", "held out")):
        rates = [line["rate"] for line in lines if line["split"] == split]
        n_known, n_wrong = sum(rate > 0.5 for rate in rates), sum(rate == 0 for rate in rates)
        say(f"of {len(rates)} facts {where} the model knows {n_known}, and {n_wrong} were never right")
    return lines


# ------------------------------------------------------------------------------------------------------------
# An assistant's skills. Each function asks one kind of question and returns {"n": asked, measure: share}. The
# first argument is a function from questions to replies, the second a random.Random that draws the questions.


def evaluate(model, tokenizer, known=None, n=100, seed=0, world=ALONE):
    """{skill: {"n": asked, measure: share}}, with n questions or problems of most kinds.

    `known` has the lines of probe(); without it known facts are not asked for.
    """

    def answers(questions, max_tokens=96, system=None):
        conversations = [turns(question, system=system) for question in questions]
        return reply(conversations, max_tokens)

    def reply(conversations, max_tokens=96):
        return ask(model, tokenizer, conversations, TOOLS, max_tokens, world=world)

    rng, results = random.Random(seed), {}
    for split, skill in (("train", "known facts"), ("test", "known facts, held out")):
        lines = [line for line in known or () if line["rate"] > 0.5 and line["split"] == split]
        if lines:
            results[skill] = known_facts(answers, rng, rng.sample(lines, min(3 * n, len(lines))))
    results["identity"] = identity(answers, rng, n)
    results["small talk"] = small_talk(answers, rng, n)
    results["invented names"] = invented_names(answers, n, seed)
    results["search"] = search(answers, rng, n)
    results["calculator"] = calculator(answers, rng, n)
    for task in ("counting", "spelling"):
        asked = list(itertools.islice(problems(task, split="test", seed=seed), n))
        results[task] = dict(n=n, right=mean(solved(answers, asked, [p.prompt for p in asked])))
    results["given facts"] = given_facts(reply, rng, n)
    n_chats = 3 * n if n >= 100 else n  # of 100 questions each of four shares moves by 3 points by chance
    results["by turn"] = by_turn(reply, rng, n_chats, seed)
    for task in ("arithmetic", "word"):
        for level in TASKS[task]:
            results[f"{task}, level {level}"] = worked_problems(answers, task, level, n, seed)
    return results


def is_refusal(reply):
    """Whether the assistant says that it does not know, or asks the search."""
    return DONT_KNOW in text_of(reply) or any(part["type"] == "search" for part in reply)


def known_facts(answers, rng, lines):
    """Facts that the probe found known, in phrasings that do not occur in training."""
    fact_of = {(fact.country, fact.field): fact for fact in facts()}
    asked = [fact_of[line["country"], line["field"]] for line in lines]
    replies = answers([fact.ask(rng, "test") for fact in asked], max_tokens=40)
    right = mean(matches(fact, text_of(reply)) for fact, reply in zip(asked, replies))
    return dict(n=len(asked), right=right, refused=mean(is_refusal(reply) for reply in replies))


def name_questions():
    """Held-out questions such as "Who are you?"."""
    return [question for row in texts("source") if row.get("who") for question in row["held_out"]]


def identity(answers, rng, n):
    """Does it say its name?"""
    asked = name_questions()
    if n < 100:
        asked = rng.sample(asked, n)
    replies = answers(asked)
    return dict(n=len(replies), named=mean(NAME in text_of(reply) for reply in replies))


def small_talk(answers, rng, n):
    """Greetings, thanks, moods: is the reply one of those that the assistant learned for them?"""
    rows = [row for row in texts("source") if row["source"] == "chitchat"]
    asked = [(question, row["answer"]) for row in rows for question in row["held_out"]]
    asked = rng.sample(asked, min(n, len(asked)))
    replies = answers([question for question, _ in asked], max_tokens=40)
    right = mean(text_of(reply).strip() in expected for (_, expected), reply in zip(asked, replies))
    return dict(n=len(asked), right=right)


def invented_names(answers, n, seed):
    """People and countries that do not exist."""
    asked = [question for question, _ in invented("test", n, seed)]
    replies = answers(asked, max_tokens=40)
    return dict(n=n, refused=mean(is_refusal(reply) for reply in replies))


def search(answers, rng, n):
    """Capital and population of every country, with a system message that lets the assistant search."""
    asked = [fact for fact in facts() if fact.field in ("capital", "population")]
    if n < 100:
        asked = rng.sample(asked, n)
    questions = [fact.ask(rng, "test") for fact in asked]
    replies = answers(questions, max_tokens=160, system=SEARCH_SYSTEM)  # a passage counts as tokens, too
    searched = mean(any(part["type"] == "search" for part in reply) for reply in replies)
    right = mean(matches(fact, text_of(reply)) for fact, reply in zip(asked, replies))
    return dict(n=len(asked), searched=searched, right=right)


def sum_question(rng):
    """A held-out calculation that has a result (3 / 0 has none), and the result."""
    result = "error"
    while result.startswith("error"):
        question, answer = arithmetic(rng, "test")
        result = answer["content"][1]["text"].strip()
    return question["content"], result


def calculator(answers, rng, n):
    """Is the calculator called (without an error), its output copied (share of the calls) and right?"""
    asked = [sum_question(rng) for _ in range(n)]
    n_called = n_copied = n_right = 0
    replies = answers([question for question, _ in asked])
    for (_, result), reply in zip(asked, replies):
        kinds = [part["type"] for part in reply]
        if "calc" not in kinds[:-1]:
            continue
        output = reply[kinds.index("calc") + 1]["text"].strip()
        if output.startswith("error"):
            continue
        n_called += 1
        if output in WORD.findall(text_of(reply)):
            n_copied += 1
            n_right += output == result
    return dict(n=n, called=n_called / n, copied=n_copied / max(n_called, 1), right=n_right / n)


def given_facts(reply, rng, n):
    """Facts about made-up countries that stand in the prompt, before the question or in a turn before it."""
    conversations = []
    while len(conversations) < n:
        conversation = given(rng, "test")
        if conversation:
            conversations.append(conversation)
    replies = reply([conversation[:-1] for conversation in conversations])
    values = [conversation[-1]["content"].rpartition(" is ")[2] for conversation in conversations]
    return dict(n=n, right=mean(has_words(plain(text_of(r)), plain(v)) for r, v in zip(replies, values)))


def by_turn(reply, rng, n, seed):
    """Sums, counting and its name, asked at turns 1, 2, 3 and 5 of a chat.

    The turns before are questions of every kind, in held-out phrasings, with the assistant's own answers.
    """
    streams = {task: problems(task, split="test", seed=seed + 1) for task in ("counting", "spelling")}
    shares = {"fact": 4, "chitchat": 4, "spelling": 2, "sum": 1, "counting": 1, "name": 1}  # of turns before
    measures, conversations = {"n": n}, [[] for _ in range(n)]
    for turn in range(1, 6):
        if turn != 4:
            asked = [chat_question(rng, ("sum", "counting", "name")[i % 3], streams) for i in range(n)]
            replies = reply([before + turns(question) for before, (question, _) in zip(conversations, asked)])
            measures[f"turn_{turn}"] = mean(check(text_of(r)) for (_, check), r in zip(asked, replies))
        if turn == 5:
            return measures
        kinds = rng.choices(list(shares), shares.values(), k=n)
        questions = [chat_question(rng, kind, streams)[0] for kind in kinds]
        replies = reply([before + turns(question) for before, question in zip(conversations, questions)])
        exchanges = [turns(question, r) for question, r in zip(questions, replies)]
        conversations = [before + exchange for before, exchange in zip(conversations, exchanges)]


def chat_question(rng, kind, streams):
    """A held-out question of this kind, and a function that says whether the text of a reply is right."""
    if kind == "sum":
        question, result = sum_question(rng)
        return question, lambda text: result in WORD.findall(text)
    if kind == "name":
        return rng.choice(name_questions()), lambda text: NAME in text
    if kind == "fact":
        fact = rng.choice(facts("test"))
        return fact.ask(rng, "test"), lambda text: matches(fact, text)
    if kind == "chitchat":
        return talk(rng, "test", "chitchat")[-2]["content"], bool
    problem = next(streams[kind])
    return problem.prompt, problem.verify


def worked_problems(answers, task, level, n, seed):
    """The same problems with the steps before the answer, and with the answer before the steps."""
    asked = list(itertools.islice(problems(task, split="test", level=level, seed=seed), n))
    steps_first = solved(answers, asked, [problem.prompt for problem in asked])
    other_order = solved(answers, asked, [problem.answer_first().prompt for problem in asked])
    return dict(n=n, steps_first=mean(steps_first), answer_first=mean(other_order))


def solved(answers, asked, prompts):
    """For each problem whether the reply to its prompt is right."""
    return [problem.verify(text_of(reply)) for problem, reply in zip(asked, answers(prompts))]


def table(results):
    """The text that shows what evaluate() returned, with the bars."""
    lines = [f"{'':26}{'asked':>6}  measured, and the bar that it should reach"]
    for skill, measures in results.items():
        cells = []
        for measure, value in measures.items():
            if measure == "n":
                continue
            low, high = BARS.get(skill, {}).get(measure, (0, 1))
            bar = f" (>= {low:.0%})" if low else f" (<= {high:.0%})" if high < 1 else ""
            cells.append(f"{measure.replace('_', ' ')} {value:.0%}{bar}")
        lines.append(f"{skill:26}{measures['n']:6}  {', '.join(cells)}")
    return "\n".join(lines)


def line(results):
    """The first measure of every skill, in one line."""
    cells = []
    for skill, measures in results.items():
        first = next(value for measure, value in measures.items() if measure != "n")
        cells.append(f"{skill} {first:.0%}")
    return "evaluation: " + ", ".join(cells)


# ------------------------------------------------------------------------------------------------------------
# Problems whose answers can be checked: pass@1, pass@k, the majority vote


def parse_tasks(spec, level):
    """{(task, level): share} from --task and --level: "word=2,arithmetic" at "1-3" has six keys, in which
    word has two thirds. Without a level all levels of the task. UserError if there is no such task."""
    shares = {}
    span = re.fullmatch(r"(\d\d?)(?:-(\d\d?))?", level or "")
    for name, weight in re.findall(r"([^,]+?)(?:=(\d+\.?\d*))?(?:,|$)", spec):
        levels = TASKS.get(name, [None])
        if span:
            levels = range(int(span[1]), int(span[2] or span[1]) + 1)
        for n in levels:
            problems(name, level=n)  # raises if there is no such task or level
            shares[name, n] = float(weight or 1) / len(levels)
    if not shares or 0 in shares.values() or (level and not span):
        raise UserError(
            f"--task {spec}, --level {level or 'all'}: shares as in word=2,spelling=1, levels as in 1-3"
        )
    return shares


def evaluate_problems(model, tokenizer, mix, n, k, max_tokens, seed, score=None, world=ALONE):
    """A dict of measures for every (task, level) of `mix`, on up to n test problems of each.

    pass@1 is of greedy replies, everything else of k samples at temperature 1: "sampled" is the share of
    right ones, pass@j the chance that one of j is right, vote@k the share of problems whose most frequent
    answer is right. A reply that was cut off is wrong, whatever it says. With score(problem, parts, finished)
    -> float, "score" is its mean over the samples.
    """
    results, status = [], common.Line()
    for task, level in mix:
        if world.rank == 0:
            status.show(f"evaluating {task}" + (f", level {level}" if level else ""))
        asked = distinct_problems(model, tokenizer, task, level, n, seed)
        prompts = [prompt_of(tokenizer, problem) for problem in asked]
        greedy = reply_to(model, tokenizer, prompts, TOOLS, max_tokens, 0.0, seed, world)
        prompts = [prompt for prompt in prompts for _ in range(k)]
        samples = reply_to(model, tokenizer, prompts, TOOLS, max_tokens, 1.0, seed, world)
        groups = [samples[i : i + k] for i in range(0, len(samples), k)]  # of each problem
        n_right = [sum(is_right(p, reply) for reply in group) for p, group in zip(asked, groups)]

        row = {"task": task, "level": level, "problems": len(asked)}
        row["pass@1"] = mean(is_right(problem, reply) for problem, reply in zip(asked, greedy))
        row["sampled"] = mean(n_right) / k
        for j in range(2, k + 1):
            if k % j == 0:
                row[f"pass@{j}"] = mean(pass_at_k(k, c, j) for c in n_right)
        row[f"vote@{k}"] = mean(majority(p, [r["parts"] for r in group]) for p, group in zip(asked, groups))
        row["length"] = mean(reply["length"] for reply in greedy)
        row["sampled length"] = mean(reply["length"] for reply in samples)
        if score is not None:
            pairs = [(problem, reply) for problem, group in zip(asked, groups) for reply in group]
            row["score"] = mean(score(p, reply["parts"], reply["finished"]) for p, reply in pairs)
        results.append(row)
    status.clear()
    return results


def prompt_of(tokenizer, problem):
    """The ids of a problem's prompt, after which the assistant speaks."""
    return tokenizer.prompt(turns(problem.prompt))


def fitting(model, tokenizer, stream):
    """The problems of a stream whose prompts leave room for a reply; UserError if none of 100 does."""
    any_fits, n_positions = False, model.config.n_positions
    for i, problem in enumerate(stream):
        if len(prompt_of(tokenizer, problem)) < n_positions:
            any_fits = True
            yield problem
        elif i >= 100 and not any_fits:
            break
    if not any_fits:
        what = f"the prompts of {problem.task} fill the model's context of {n_positions} tokens"
        raise UserError(f"{what}; lower --level, or train a model with more --n-positions")


def distinct_problems(model, tokenizer, task, level, n, seed):
    """Up to n test problems, none of them twice: an easy level may have fewer."""
    stream = fitting(model, tokenizer, problems(task, "test", level, seed))
    distinct = {}
    for problem in itertools.islice(stream, 20 * n):
        distinct.setdefault((problem.prompt, problem.answer), problem)
        if len(distinct) == n:
            break
    return list(distinct.values())


def is_right(problem, reply):
    """Whether a reply, one of reply_to(), is complete and its answer right."""
    return reply["finished"] and problem.verify(text_of(reply["parts"])) > 0


def pass_at_k(n, c, k):
    """The chance that one of k samples is right if c of n were; unbiased (Chen et al. 2021)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(problem, replies):
    """Whether the answer that most of the replies give (the first of equals) is right: 1.0 or 0.0."""
    texts_of_replies = [text_of(parts) for parts in replies]
    groups = votes(texts_of_replies, problem.prompt)
    return problem.verify(texts_of_replies[groups[0][0]]) if groups else 0.0


def problem_table(results):
    """The text that shows what evaluate_problems() returned: a line for each task and level."""
    rows = [list(results[0])]
    for result in results:
        row = []
        for name, value in result.items():
            if not isinstance(value, float):
                row.append(str(value))
            elif "length" in name:
                row.append(f"{value:.1f}")
            else:
                row.append(f"{value:.1%}")
        rows.append(row)
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths)) for row in rows)


# ------------------------------------------------------------------------------------------------------------
# HellaSwag: which of four endings does a text have (Zellers et al. 2019)? A base model can be asked, too.


def read_hellaswag(path, tokenizer, n_positions):
    """[(context, four endings, label)] of a HellaSwag file, parquet or JSON lines; path "hub" downloads it.

    Context and endings are lists of ids; the label is the index of the right ending. The context and " " with
    an ending are encoded separately. UserError names a row that has no label or not four endings, or that is
    too long for a model of n_positions.
    """
    if path == "hub":
        [path] = hub.fetch_table("hellaswag", "test")
    items = []
    for where, row in hub.read_table(path, ("ctx", "endings", "label")):
        context, endings, label = row["ctx"], row["endings"], row["label"]
        if not isinstance(context, str) or not context:
            raise UserError(f"{where} has no text as its ctx; correct or delete it")
        if str(label) not in ("0", "1", "2", "3"):
            raise UserError(f"{where} has the label {label!r}, not 0 to 3; give a split with labels")
        if not isinstance(endings, list) or [type(ending) for ending in endings] != [str] * 4:
            raise UserError(f"{where} has not four texts as its endings; correct or delete it")
        context = tokenizer.encode(context)
        endings = [tokenizer.encode(f" {ending}") for ending in endings]
        length = len(context) + max(map(len, endings))
        if length > n_positions + 1:  # the last token is a target and no input
            what = f"{where} has {length} tokens, and the model has a context of {n_positions}"
            raise UserError(f"{what}; delete the row, or take a model with more --n-positions")
        items.append((context, endings, int(label)))
    return items


def hellaswag(model, items, world=ALONE):
    """{"acc", "acc_norm", "acc_stderr", "acc_norm_stderr", "n"} of items that read_hellaswag() returned.

    acc is the share of items whose right ending has the lowest loss, summed over its tokens, acc_norm that
    with the lowest mean: long endings are no longer at a disadvantage. So build-nanogpt and llm.c do it, and
    OpenAI's models have 0.2859 and 0.2955 (124M), 0.3842 and 0.4893 (1.5B); guessing has 0.25. The ranks
    share the items.
    """
    mine = items[world.rank :: world.size]
    losses = ending_losses(model, mine)  # (n, 4)
    lengths = np.array([[len(ending) for ending in endings] for _, endings, _ in mine]).reshape(-1, 4)
    labels = np.array([label for _, _, label in mine])
    n_right = [int((scores.argmin(1) == labels).sum()) for scores in (losses, losses / lengths)]
    results = {"n": len(items)}
    for name, n_right_of_ranks in zip(("acc", "acc_norm"), zip(*world.gather(n_right))):
        results[name] = p = sum(n_right_of_ranks) / len(items)
        results[f"{name}_stderr"] = math.sqrt(p * (1 - p) / len(items))
    return results


def ending_losses(model, items):
    """(n, 4): the loss of each ending after its context, in nats, summed over the tokens of the ending."""
    rows = []  # (item, ending, ids of both texts, tokens of the ending)
    for i, (context, endings, _) in enumerate(items):
        rows += [(i, k, context + ending, len(ending)) for k, ending in enumerate(endings)]
    rows.sort(key=lambda row: -len(row[2]))  # similar lengths in one batch: little padding
    pending = []
    for start in range(0, len(rows), ROWS):
        batch = rows[start : start + ROWS]
        T = min(-(-(len(batch[0][2]) - 1) // 8) * 8, model.config.n_positions)  # a multiple of 8
        tokens, targets = np.zeros((2, len(batch), T), np.int32)  # (B, T) each, with padding on the right
        for b, (_, _, ids, _) in enumerate(batch):
            tokens[b, : len(ids) - 1], targets[b, : len(ids) - 1] = ids[:-1], ids[1:]
        pending.append((batch, model.ops.read_later(model.losses(tokens, targets))))  # (B, T)
    sums = np.zeros((len(items), 4))
    for batch, read_losses in pending:
        for (i, k, ids, n), losses in zip(batch, read_losses()):
            end = len(ids) - 1
            sums[i, k] = losses[end - n : end].sum(dtype=np.float64)
    return sums


def hellaswag_text(results):
    """What hellaswag() returned, in one line."""
    cells = [f"{name} {results[name]:.4f} ± {results[f'{name}_stderr']:.4f}" for name in ("acc_norm", "acc")]
    return f"HellaSwag: {', '.join(cells)}, of {results['n']} items"


# ------------------------------------------------------------------------------------------------------------
# Several models beside each other

PROMPTS = (  # each stage of training changes what a model says to some of these
    "Who are you?",
    "What is the capital of France?",
    "Who is Orson Kovats?",
    'How many "r" are in strawberry?',
    "What is every third letter of ubiquitous?",
    "What is 23 * 177?",
    "Which is larger, 9.11 or 9.9?",
    "Emily buys 3 apples and 2 oranges. Each orange is $2, the total is $13. What does an apple cost?",
)


def compare(flags, prompts):
    """{checkpoint: its texts}: a base model continues each prompt, an assistant answers it."""
    texts_of_models = {}
    for directory in flags.directories:
        model, tokenizer, checkpoint = sample.load(directory, flags)
        assistant = sample.is_assistant(checkpoint)
        temperature = flags.temperature
        if temperature is None:
            temperature = sample.default_temperature(assistant, 1)
        completions = sample.complete(
            model, tokenizer, prompts, assistant,
            max_tokens=flags.max_tokens or 200, temperature=temperature, seed=flags.seed,
        )  # fmt: skip
        texts_of_models[str(checkpoint)] = [completion.text for completion in completions]
    return texts_of_models


def print_columns(prompts, texts_of_models):
    """Print the texts to every prompt side by side, a column for each model."""
    width = max(12, shutil.get_terminal_size().columns // len(texts_of_models) - 2)
    for i, prompt in enumerate(prompts):
        columns = []
        for checkpoint, model_texts in texts_of_models.items():
            column = []
            for text in (checkpoint, "-" * width, *model_texts[i].split("\n")):
                column += textwrap.wrap(text, width) or [""]
            columns.append(column)
        print(f"{'=' * 40}\n{prompt}\n")
        for cells in itertools.zip_longest(*columns, fillvalue=""):
            print(common.printable("  ".join(f"{cell:{width}}" for cell in cells).rstrip()))
        print()


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    flags = Parser(prog="evaluate.py", description="What a model can do: skills, facts, problems.")
    words = "a run (its newest checkpoint) or a checkpoint; several with --compare"
    flags.add_argument("directories", metavar="RUN", nargs="+", help=words)
    whole = number(int, low=1)
    add = flags.add_argument_group("an assistant's skills").add_argument
    add("--known", metavar="PATH", help="the facts it knows, from a probe; without it, they are asked first")
    group = flags.add_argument_group("instead of the skills")
    add = group.add_mutually_exclusive_group().add_argument
    add("--probe", metavar="PATH", help="ask every factual question, and write which ones it knows")
    add("--task", metavar="SPEC", help="solve problems of a task, or of several: word,arithmetic")
    words = "HellaSwag's accuracy, of a base model too: parquet or JSON lines with labels, or hub to download"
    add("--hellaswag", metavar="FILE", help=words)
    add("--compare", action="store_true", help="what each RUN says to the same prompts")
    add = flags.add_argument_group("problems").add_argument
    add("--level", metavar="N", help="how difficult: 2, or a range such as 1-3; none: all levels")
    add("--problems", type=whole, default=64, help="test problems of each task and level")
    add("--k", type=whole, help="replies to each problem, 8; of a probe to each question, 3")
    add = flags.add_argument_group("comparison").add_argument
    add("--prompt", metavar="TEXT", action="append", default=[], help="repeatable; none: some of our own")
    add("--temperature", type=number(float, low=0, high=1e6), help="0.8, of an assistant 0.3")
    add = flags.add_argument_group("texts and output").add_argument
    add("--max-tokens", type=whole, help="the longest text; of problems 96, else 200")
    words = "of sampled replies, and of the problems; the questions of the skills are always the same"
    add("--seed", type=number(int, 0, 2**63 - 1), default=sample.SEED, help=words)
    add("--json", action="store_true", help="one JSON object, for programs")
    add_shared_flags(flags.add_argument_group("machine"), "device", "dtype")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    if flags.compare:
        prompts = flags.prompt or PROMPTS
        texts_of_models = compare(flags, prompts)
        if flags.json:
            print(json.dumps({"prompts": prompts, "texts": texts_of_models}, ensure_ascii=False))
        else:
            print_columns(prompts, texts_of_models)
        return
    if len(flags.directories) > 1:
        raise UserError("more than one RUN; name one, or see what all of them say with --compare")
    [directory] = flags.directories
    mix = parse_tasks(flags.task, flags.level) if flags.task is not None else None
    known = read_probe(flags.known) if flags.known else None
    if flags.hellaswag:
        model, tokenizer, _ = sample.load(directory, flags)
        results = hellaswag(model, read_hellaswag(flags.hellaswag, tokenizer, model.config.n_positions))
        print(json.dumps({"run": directory, **results}) if flags.json else hellaswag_text(results))
        return
    model, tokenizer = sample.load_assistant(directory, flags)

    if mix:
        k, max_tokens = flags.k or 8, flags.max_tokens or 96
        results = evaluate_problems(model, tokenizer, mix, flags.problems, k, max_tokens, flags.seed)
        print(json.dumps({"run": directory, "results": results}) if flags.json else problem_table(results))
        return
    if flags.probe or known is None:
        known = probe(model, tokenizer, flags.k or 3, flags.seed, flags.probe)
    if not flags.probe:
        results = evaluate(model, tokenizer, known)
        print(json.dumps(results) if flags.json else table(results))


if __name__ == "__main__":
    run(main)
