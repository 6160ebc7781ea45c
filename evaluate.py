"""What an assistant can do, in numbers: the probe of what it knows, and the evaluation of its skills.

sft.py's --probe and --eval. What evaluate() asks is held out: other phrasings, numbers, words and names than
the training's. Read tasks/conversations.py, which has the questions, and sample.py before, sft.py after.
"""

import itertools
import json
import random
import re
from pathlib import Path

import common
import sample
import tasks.conversations as mixture
import tasks.factbook as facts
import tasks.problems as tasks
from common import UserError
from sample import generate
from tokenizer import text_of

ROWS = 64  # asked at a time
NAME = "Handmade"  # what it should call itself


def ask(
    model, tokenizer, conversations, with_tools=None, max_tokens=96, temperature=0.0, seed=0, streams=None
):
    """The assistant's next turn in every conversation, as a list of parts; with_tools as for sample.Host."""
    host = sample.Host(tokenizer, with_tools or {})
    stop_tokens = {tokenizer.eot, tokenizer.encode_special("<|im_end|>")}
    prompts = [tokenizer.prompt(conversation) for conversation in conversations]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of one length go together
    replies, progress = [None] * len(prompts), common.Progress("asking", total=len(prompts))
    for start in range(0, len(order), ROWS):
        block = order[start : start + ROWS]
        rows = generate(
            model, [prompts[i] for i in block], max_tokens, temperature, seed=seed,
            streams=[i if streams is None else streams[i] for i in block],
            stop_tokens=stop_tokens, on_token=lambda row, shown, logits: host.reply(row),
        )  # fmt: skip
        for i, row in zip(block, rows):
            replies[i] = tokenizer.parts(row.ids)
        progress.add(len(block))
    progress.line.clear()
    return replies


def user(question, system=None):
    """A conversation of one question."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}]


def the_tools():
    """The tools of a conversation in which the assistant may search."""
    return {"calc": mixture.calculator, "search": mixture.looked_up}


# ------------------------------------------------------------------------------------------------------------
# The probe: what does the model know?


def probe(model, tokenizer, k, seed, path=None):
    """Ask for every fact k times at temperature 1, in a phrasing of the training; say how often it was right.

    Returns (and writes to `path`, a line each) {"country", "field", "question", "answer", "split", "rate"}. A
    fact is known if most answers were right: who only guesses is right now and then.
    """
    found = [(split, fact) for split in ("train", "test") for fact in facts.facts(split)]
    asked = [user(fact.questions[0]) for _, fact in found for _ in range(k)]
    replies = ask(model, tokenizer, asked, max_tokens=40, temperature=1.0, seed=seed)
    lines = []
    for i, (split, fact) in enumerate(found):
        right = sum(facts.matches(fact, text_of(reply)) for reply in replies[i * k : (i + 1) * k])
        what = dict(country=fact.country, field=fact.field, question=fact.questions[0], answer=fact.answer)
        lines.append(what | dict(split=split, rate=right / k))
    if path:
        common.write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    for split, what in (("train", "asked about in training"), ("test", "held out")):
        rates = [line["rate"] for line in lines if line["split"] == split]
        known, never = sum(rate > 0.5 for rate in rates), sum(rate == 0 for rate in rates)
        common.say(f"of {len(rates)} facts {what} it knows {known}, and got {never} never right")
    return lines


def read_probe(path):
    """What probe() wrote."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        if not all({"country", "field", "question", "split", "rate"} <= set(line) for line in lines):
            raise ValueError
        return lines
    except (OSError, ValueError):
        raise UserError(f"{path} is not what sft.py --probe writes; let it write one") from None


# ------------------------------------------------------------------------------------------------------------
# The evaluation: what can it do?


def refused(reply):
    """Whether a reply says that the assistant does not know, or asks the search."""
    return mixture.DONT_KNOW in text_of(reply) or any(part["type"] == "search" for part in reply)


def share(values):
    values = list(values)
    return round(sum(values) / len(values), 4) if values else None


def evaluate(model, tokenizer, known=None, n=100, seed=0):
    """{what: {"n": asked, measure: share}}. Without `known`, from probe(), known facts are left out."""
    rng, results = random.Random(seed), {}
    toolbox = the_tools()
    asking = lambda conversations, **settings: ask(model, tokenizer, conversations, toolbox, **settings)
    every = {(fact.country, fact.field): fact for fact in facts.facts()}

    for split, what in (("train", "known facts"), ("test", "known facts, held out")):
        lines = [line for line in known or () if line["rate"] > 0.5 and line["split"] == split]
        if lines:  # in a phrasing that no training has
            asked = [
                every[line["country"], line["field"]] for line in rng.sample(lines, min(3 * n, len(lines)))
            ]
            replies = asking([user(fact.ask(rng, "test")) for fact in asked], max_tokens=40)
            right = share(facts.matches(fact, text_of(reply)) for fact, reply in zip(asked, replies))
            results[what] = dict(n=len(asked), right=right, refused=share(map(refused, replies)))

    asked = [q for row in facts.texts("source") if row.get("who") for q in row["held_out"]]  # 40 of them
    asked = asked if n >= 100 else rng.sample(asked, n)
    replies = asking([user(question) for question in asked], max_tokens=40)
    results["identity"] = dict(n=len(replies), named=share(NAME in text_of(reply) for reply in replies))

    asked = [question for question, _ in facts.invented("test", n, seed)]
    results["invented names"] = dict(
        n=n, refused=share(map(refused, asking([user(q) for q in asked], max_tokens=40)))
    )

    asked = [fact for fact in every.values() if fact.field in ("capital", "population")]  # of all countries
    asked = asked if n >= 100 else rng.sample(asked, n)
    questions = [user(fact.ask(rng, "test"), mixture.SEARCH_SYSTEM) for fact in asked]
    replies = asking(questions, max_tokens=160)  # the passage that is found counts, too
    results["search"] = dict(
        n=len(asked),
        searched=share(any(part["type"] == "search" for part in reply) for reply in replies),
        right=share(facts.matches(fact, text_of(reply)) for fact, reply in zip(asked, replies)),
    )

    made = (mixture.arithmetic(rng, "test") for _ in itertools.count())
    made = ((question["content"], answer["content"][1]["text"].strip()) for question, answer in made)
    asked = list(itertools.islice((pair for pair in made if not pair[1].startswith("error")), n))
    called = copied = right = 0
    for (_, truth), reply in zip(asked, asking([user(question) for question, _ in asked])):
        kinds = [part["type"] for part in reply]
        output = reply[kinds.index("calc") + 1]["text"].strip() if "calc" in kinds[:-1] else "error"
        copies = not output.startswith("error") and output in re.findall(r"[^\s]*[^\s.]", text_of(reply))
        called += not output.startswith("error")
        copied += copies
        right += copies and output == truth
    results["calculator"] = dict(n=n, called=called / n, copied=copied / max(called, 1), right=right / n)

    for name in ("counting", "spelling"):
        problems = list(itertools.islice(tasks.problems(name, split="test", seed=seed), n))
        replies = asking([user(problem.prompt) for problem in problems])
        right = share(problem.verify(text_of(reply)) for problem, reply in zip(problems, replies))
        results[name] = dict(n=n, right=right)

    for name in ("arithmetic", "word"):
        for level in tasks.TASKS[name]:
            problems = list(itertools.islice(tasks.problems(name, split="test", level=level, seed=seed), n))
            forms = {"steps_first": lambda p: p.prompt, "answer_first": lambda p: mixture.answer_first(p)[0]}
            results[f"{name}, level {level}"] = dict(n=n) | {
                form: share(
                    p.verify(text_of(r)) for p, r in zip(problems, asking([user(of(p)) for p in problems]))
                )
                for form, of in forms.items()
            }
    return results


BARS = {  # what is asked of the assistant: {measure: (at least, at most)}
    "identity": {"named": (0.95, 1)},
    "known facts": {"right": (0.8, 1), "refused": (0, 0.15)},
    "invented names": {"refused": (0.8, 1)},
    "search": {"right": (0.7, 1)},
    "calculator": {"called": (0.9, 1), "copied": (0.95, 1)},
    "counting": {"right": (0.8, 1)},
    "spelling": {"right": (0.8, 1)},
}


def table(results, as_json=False):
    """Print what evaluate() returned."""
    if as_json:
        return print(json.dumps(results))
    print(f"{'':26}{'asked':>6}  measured, and the bar that it should reach")
    for what, measures in results.items():
        cells = []
        for measure, value in measures.items():
            low, high = BARS.get(what, {}).get(measure, (0, 1))
            bar = f" (>= {low:.0%})" if low else f" (<= {high:.0%})" if high < 1 else ""
            cells += (
                [] if measure == "n" or value is None else [f"{measure.replace('_', ' ')} {value:.0%}{bar}"]
            )
        print(f"{what:26}{measures['n']:6}  {', '.join(cells)}")


def line(results):
    """The same in one line."""
    first = {
        what: next((v for m, v in measures.items() if m != "n"), None) for what, measures in results.items()
    }
    return "exam: " + ", ".join(f"{what} {value:.0%}" for what, value in first.items() if value is not None)
