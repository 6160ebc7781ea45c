"""What the assistant learns from: conversations of many kinds, each kind a source with its share.

    python -m tasks.conversations --num 5                                     some of the default mixture
    python -m tasks.conversations factbook=3,tasks=2,jsonl:my.jsonl=1         some of another one

draw() makes n conversations, by share, the same for the same seed, without duplicates, contradictions and the
questions of the evaluation. A small model learns what is short, regular and can be copied: a call repeats the
tokens of the question, an answer those of the tool's output. The texts that no template makes stand in
texts.jsonl. Read tasks/factbook.py, tools.py, tasks/problems.py and sample.py before, sft.py after
this file.
"""

import functools
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import common
import tasks.problems as tasks
import tools
from common import UserError
from tasks.factbook import FIELDS, digest, examined, facts, held_out, invented, phrase, plain, probed, texts
from tokenizer import CALLS, ROLES, text_of

SOURCES = {"factbook": 17, "identity": 9, "refusal": 2, "chitchat": 3, "tools": 20}  # shares, in percent
SOURCES |= {"tasks": 10, "stories": 4, "events": 3, "steps-first": 2, "answer-first": 2, "sums": 1}
SOURCES |= {"repeat": 4, "spelling": 8, "counting": 5, "multi-turn": 4, "unknown": 6}
DEFAULT = ",".join(f"{name}={share}" for name, share in SOURCES.items())
SEARCH_SYSTEM = "You can search."  # with it the assistant looks facts up, without it it has its memory
DONT_KNOW = "I'm sorry, I don't know"  # so begins every answer to what it cannot know
TASKS = {"tasks": ("arithmetic", "word", "decimals"), "stories": ("word",)}
TASKS |= {"steps-first": ("arithmetic", "word"), "answer-first": ("arithmetic", "word")}  # the same problems
TASKS |= {"spelling": ("spelling",), "counting": ("counting",)}  # what these take from tasks/problems.py
LEVELS = dict.fromkeys(("tasks", "steps-first", "answer-first"), (1, 2)) | {"stories": (3,)}  # 4: for rl.py
CALCULATED = 0.2  # share of the worked problems that the calculator solves
LONGEST = 5000  # characters of a conversation as JSON; sft.py cuts what its model has no room for
PAGE = 60  # conversations on a page of a workbook
PASSAGE = 16  # words of what a search finds

# ----------------------------------------------------------------------------------- turns, and tools at work
# A tool's output begins with a space: its words are then the tokens that they are in a sentence, and the
# answer can copy them. So can a call copy the question's: " 23 * 47", " capital of Peru".


def calculator(call):
    return f" {tools.calculate(call)}"


@functools.lru_cache(1 << 15)
def looked_up(query):
    return f" {tools.Search.factbook().lookup(query, budget=PASSAGE)}"


def turns(*contents, system=None):
    """A conversation: the user and the assistant by turns, after the system's message if there is one."""
    roles = itertools.cycle(("user", "assistant"))
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": role, "content": content} for role, content in zip(roles, contents)]


def called(kind, call, output, answer):
    """The assistant's parts: a call, what the tool says, an answer."""
    return [dict(type=kind, text=call), dict(type="output", text=output), dict(type="text", text=answer)]


def calculated(call, answer="It is{}."):
    output = calculator(call)
    failed = output.startswith(" error")
    return called("calc", call, output, "I can't calculate that." if failed else answer.format(output))


def searched(fact):
    """The parts that look a fact up; None if the search does not find it."""
    output = looked_up(fact.query)
    told = f" {plain(output)} "
    finds = plain(fact.country) in told and sum(f" {n} " in told for n in fact.accepted) >= fact.needed
    return called("search", fact.query, output, fact.exact) if finds else None


# ------------------------------------------------------------------------------------------------ the sources
# Each function makes one conversation, or None where chance drew what cannot be had.

SIGNS = {"+": (" + ", "+", " plus "), "-": (" - ", "-", " minus "), "/": (" / ", "/", " divided by ")}
SIGNS |= {"*": (" * ", "*", " times ", " x ", " × ")}


def remembered(rng, split, pool, known):
    """A question about a country, answered from memory: in a sentence, briefly, or with all that is known."""
    fact, chance = rng.choice(known), rng.random()
    if chance < 0.2:
        return turns(phrase(rng, split, "brief").format(fact.ask(rng, split)), fact.brief)
    if chance < 0.25:
        about = {f.field: f.answer for f in known if f.country == fact.country}
        told = [about[field] for field in ("location", "capital", "language") if field in about]
        question = phrase(rng, split, "about").format(fact.query.split(" of ", 1)[1])
        return turns(question, " ".join(told)) if told else None
    return turns(fact.ask(rng, split), fact.answer)


def looking_up(rng, split, pool, *_):
    """A question about a country, looked up; half of them about what people ask most."""
    field = rng.choice((*("capital", "population") * 10, *FIELDS))
    fact = rng.choice([fact for fact in pool if fact.field == field] or pool)
    found = searched(fact)
    return found and turns(fact.ask(rng, split), found, system=SEARCH_SYSTEM)


def number(rng, digits, point=False):
    whole = rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
    return f"{whole}.{rng.randint(1, 99)}" if point else str(whole)


def arithmetic(rng, split, *_):
    """'What is 23 times 47?' and the call ' 23 * 47': the numbers' own tokens, whatever the operator was."""
    numbers, count, point = [], 2 + (rng.random() < 0.15), rng.random() < 0.12
    while not numbers or held_out("arithmetic", *numbers) != (split == "test"):
        digits = rng.choice((1, 1, 2, 2, 2, 3, 3, 4))
        numbers = [number(rng, max(1, digits - rng.randint(0, 1)), point) for _ in range(count)]
    style, template = rng.choice((0, 0, 0, 0, 0, 1, 2, 2, 3, 4)), phrase(rng, split, "arithmetic")
    signs = rng.choices("+-*/", k=count - 1)
    written = [SIGNS[sign][style % len(SIGNS[sign])] for sign in signs]
    meant = [w if w.strip() == sign else f" {sign} " for w, sign in zip(written, signs)]
    text, call = ("".join(a + b for a, b in zip(numbers, [*between, ""])) for between in (written, meant))
    return turns(template.format(text), calculated(call if template[0] == "{" else f" {call}"))


def asked_later(split, *numbers):
    """Whether these train elsewhere, although the calculator is examined with them."""
    return split == "train" and held_out("arithmetic", *map(str, numbers))


def comparison(rng, split, *_):
    """'Is 9.11 larger than 9.9?': the calculator knows."""
    whole, other = number(rng, rng.choice((1, 1, 2))), number(rng, 1)
    a, b = (f"{w}.{rng.randint(1, 99)}" for w in (whole, whole if rng.random() < 0.7 else other))
    word = rng.choice(("larger", "bigger", "greater", "smaller", "less"))
    if held_out("comparison", *sorted((a, b))) != (split == "test"):
        return None
    call = f" {a} {'<' if word in ('smaller', 'less') else '>'} {b}"
    answer = "Yes, it is." if calculator(call) == " true" else "No, it is not."
    return turns(phrase(rng, split, "comparison").format(a, word, b), calculated(call, answer))


def repeated(rng, split, pool, *_):
    """'Repeat: ...' words, names and numbers: copying what was said is half of using a tool."""
    words = (tasks.draw_word(rng, rng.choice((1, 2, 3))) for _ in itertools.count())
    word = next(word for word in words if tasks.split_of(word) == split)  # not those that it is to spell
    name = rng.choice(pool).query.split(" of ", 1)[1]
    made = "".join(phrase(rng, split, "syllable") for _ in range(rng.choice((2, 3)))).capitalize()
    some = word, word, name, made, number(rng, rng.randint(1, 5))
    text = (
        " ".join(rng.choices(some, k=rng.randint(1, 3))) if rng.random() < 0.85 else "." * rng.randint(3, 40)
    )
    said = turns(phrase(rng, split, "repeat").format(text), f"You said {text}")
    return said if held_out("repeat", text) == (split == "test") else None


def sums(rng, split, *_):
    """A row of small sums, to be known by heart: those that the steps of worked problems are made of."""
    made = []
    while len(made) < 6:
        x, y, op = rng.randint(0, 9), rng.randint(0, 9), rng.choice("+-*/")
        if rng.random() < 0.6:  # larger ones: 12 + 7, 19 - 6 - 1, 20 - 13; 24 + 5 after a product
            x = rng.randint(10, tasks.LARGEST) if op in "+-" else x
        if op == "/":
            x, y = (x * y, y) if y else (0, 1)
        elif op == "-" and x < y:
            x, y = y, x
        elif op == "*" and rng.random() < 0.4:
            x, y, op = x * y, rng.randint(1, 8), "+"
        more = f" {op} 1" if op in "+-" and x < 20 and rng.random() < 0.25 and x > y else ""
        if tasks.split_of(tasks.sum_key(x, op, y)) == split and not asked_later(split, x, y):
            step = f"{x} {op} {y}{more}"
            made.append((step, f"{step} = {tools.calculate(step)}"))
    asked, told = (", ".join(words) for words in zip(*made))
    return turns(phrase(rng, split, "sums").format(asked), f"So {told}.")


def events(rng, split, *_):
    """What happens in a story, one event after the other: longer ones than those that it learns to solve."""
    numbers = {x: rng.randint(10, 99) if x == "A" else rng.randint(2, 9) for x in "Abcdefg"}
    story = tasks.chain_of_events(rng, rng.randint(2, 6))
    words = numbers | tasks.random_words(rng)
    said = ", then ".join(story["events"]).format(**words)
    facts = story["story"].format(**words)
    made = turns(phrase(rng, split, "events").format(facts), f"So {said}.")
    return made if held_out("events", said) == (split == "test") else None


def what_if(rng, split, *_):
    """'2 + 2?' and then 'What if it was times?'"""
    numbers, signs = [number(rng, rng.choice((1, 1, 2, 3))) for _ in "ab"], rng.sample("+-*", 2)
    template, again = phrase(rng, split, "arithmetic"), phrase(rng, split, "what if")
    first, second = (f"{'' if template[0] == '{' else ' '}{numbers[0]} {s} {numbers[1]}" for s in signs)
    again = again.format(SIGNS[signs[1]][2].strip())
    made = turns(template.format(first.strip()), calculated(first), again, calculated(second))
    return made if held_out("arithmetic", *numbers) == (split == "test") else None


def and_its(rng, split, pool, known):
    """A question about a country and another one that does not name it, looked up or from memory."""
    search = rng.random() < 0.6
    fact = rng.choice(pool if search else known)
    other = rng.choice([f for f in (pool if search else known) if f.country == fact.country])
    answers = [searched(fact), searched(other)] if search else [fact.answer, other.brief]
    contents = fact.ask(rng, split), answers[0], rng.choice(other.follow_ups), answers[1]
    made = turns(*contents, system=SEARCH_SYSTEM if search else None)
    return made if other is not fact and all(answers) else None


def talk(rng, split, *_, source):
    """A question and its answer of texts.jsonl; in training, asked in one manner or another."""
    row = rng.choice([row for row in texts("source") if row["source"] == source])
    questions = row["ask"] if split == "train" else row["held_out"]
    which = rng.randrange(len(questions))
    text, answer = questions[which], row["answer"][which % len(row["answer"])]
    if split == "train":
        small = text if re.match(r"I\b|[A-Z]{2}", text) else text[0].lower() + text[1:]
        manner = text if source == "chitchat" else phrase(rng, split, "manner").format(text)
        written = (text, small, text.rstrip(".!?"), small.rstrip(".!?"), manner)
        text = rng.choices(written, (8, 2, 2, 2, 6))[0]
    return turns(text, answer, system=SEARCH_SYSTEM if rng.random() < 0.25 else None)


def talks(rng, split, *_):
    """Two or three small conversations in one."""
    parts = [talk(rng, split, source=source) for source in ("chitchat", "identity", "chitchat")]
    parts = rng.sample([*parts, arithmetic(rng, split)], rng.choice((2, 3)))
    return turns(*(turn["content"] for part in parts for turn in part if turn["role"] != "system"))


def not_known(rng, split, *_):
    """A question that only "I don't know" answers, after a search in vain if there is one."""
    if rng.random() < 0.2:
        return talk(rng, split, source="unknown")
    ((text, query),) = invented(split, 1, rng.random())
    answer = f"{DONT_KNOW} that country." if " of " in query else f"{DONT_KNOW} who that is."
    if rng.random() < 0.6:
        return turns(text, answer)
    output = looked_up(query)
    found = called("search", query, output, answer)
    return turns(text, found, system=SEARCH_SYSTEM) if output == " nothing found" else None


def answer_first(problem):
    """A problem and the answer to it before the steps: to be compared, not followed."""
    return f"{problem.prompt} Answer first.", problem.answer_first()


def with_calculator(problem):
    """The same answer by calls of the calculator: rare here, for rl.py to find out that it pays."""
    steps, parts = [("", step) for step in re.findall(r"\d+ [-+*] \d+", problem.prompt)], []
    if problem.task == "word":  # its steps, and what they say of an event
        steps = re.findall(r"((?:So|, then) [a-z][^:=]*:|) (\d+ [-+*/] \d+) = ", problem.solution)
    for event, step in steps:
        parts += [("text", event), ("calc", f" {step}"), ("output", calculator(f" {step}"))]
    parts.append(("text", f"{'.' if event else ''}\nAnswer: {problem.answer}".strip()))
    return [dict(type=kind, text=text) for kind, text in parts if text]


def hosted(solution):
    """A solution with the output that the host will paste, and an answer that copies it, without quotes."""
    if isinstance(solution, str):
        return solution
    call, _, said = (part["text"] for part in solution)
    output = calculator(call)
    return called("calc", call, output, said.replace(f' "{output.strip()}"', output))


def read(path, skip_bad=False):
    """The conversations of a JSONL file, and how many bad lines were skipped: (conversations, skipped).

    A line is {"messages": [...]}, as OpenAI and Hugging Face write it, or the bare list. Without skip_bad a
    bad line is a UserError: which one, and why.
    """
    conversations, skipped = [], 0
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a file of conversations") from None
    for number, line in ((number, line) for number, line in enumerate(lines, 1) if line.strip()):
        try:
            found = json.loads(line)
            conversations.append(checked(found.get("messages") if isinstance(found, dict) else found, True))
        except (UserError, ValueError, RecursionError) as error:
            reason = error if isinstance(error, UserError) else f"no JSON ({getattr(error, 'msg', error)})"
            if not skip_bad:
                raise UserError(f"{path}, line {number}: {reason}; correct it or skip bad lines") from None
            skipped += 1
    if not conversations:
        raise UserError(f'{path} has no conversation; every line should be {{"messages": [...]}}')
    return conversations, skipped


def checked(messages, training=False):
    """Messages from outside as a conversation that has nothing else in it; UserError says what is wrong.
    Empty ones are left out; for training only the system's may be empty, and the assistant must speak."""
    if not isinstance(messages, list):
        raise UserError('there is no list of "messages"')
    conversation = []
    for i, message in enumerate(messages, 1):
        role, content = map(message.get, ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise UserError(f"message {i} has the role {role!r}, which is none of {', '.join(ROLES)}")
        kinds = ("text", *CALLS, "output") if role == "assistant" else ("text",)
        found = [{"type": "text", "text": content}] if isinstance(content, str) else content
        try:
            found = [{"type": part["type"], "text": part["text"]} for part in found]
            sound = all(part["type"] in kinds and isinstance(part["text"], str) for part in found)
        except (TypeError, KeyError):
            sound = False
        if not sound:
            what = f"a text or a list of parts, each with a text and a type: {' or '.join(kinds)}"
            raise UserError(f"the content of message {i} ({role}) is not {what}")
        if any(part["text"].strip() for part in found):
            conversation.append({"role": role, "content": content if isinstance(content, str) else found})
        elif training and role != "system":
            raise UserError(f"message {i} ({role}) is empty")
    if training and "assistant" not in [turn["role"] for turn in conversation]:
        raise UserError("the assistant never speaks")
    return conversation


def conversations(name, split="train", seed=0, unknown=(), skip_bad=False):
    """The conversations of a source, one after the other: without end, but for jsonl:PATH.

    `unknown` has the (country, field) that the model is not to learn from memory.
    """
    rng, (kind, _, path) = random.Random(f"{seed} {split} {name}"), name.partition(":")
    pool = facts(split)
    known = [fact for fact in pool if (fact.country, fact.field) not in unknown]
    if kind == "jsonl":  # a tenth of the user's own tests
        own = read(path, skip_bad)[0]
        own = [c for c in own if (digest(json.dumps(c)) % 10 == 0) == (split == "test")]
        yield from rng.sample(own, len(own))
    elif path:  # what the model was found not to know
        wrong = probed(path)
        missing = [fact for fact in pool if (fact.country, fact.field) in wrong]
        while missing:
            yield turns(rng.choice(missing).ask(rng, split), f"{DONT_KNOW}.")
    elif kind in TASKS:
        same = digest(str(seed), split) % 2**32  # problems for all sources
        levels = LEVELS.get(kind, [None])
        streams = [tasks.problems(t, split, level, same) for t in TASKS[kind] for level in levels]
        for problem in map(next, itertools.cycle(streams)):
            if problem.task == "arithmetic" and asked_later(split, *re.findall(r"\d+", problem.prompt)):
                continue
            prompt, solution = answer_first(problem) if kind == "answer-first" else (problem.prompt, None)
            solution = hosted(solution or problem.solution)
            may = kind in ("tasks", "stories") and problem.task in ("arithmetic", "word")
            if may and rng.random() < CALCULATED:
                solution = with_calculator(problem)
            yield turns(prompt, solution)
    else:
        ways = {
            "factbook": {remembered: 1},
            "repeat": {repeated: 1},
            "sums": {sums: 1},
            "events": {events: 1},
            "unknown": {not_known: 1},
        }
        ways |= {"tools": {arithmetic: 45, comparison: 8, looking_up: 47}}
        ways |= {"multi-turn": {what_if: 40, and_its: 35, talks: 25}}
        chances = ways.get(kind) or {functools.partial(talk, source=kind): 1}
        while True:
            (make,) = rng.choices([*chances], [*chances.values()])
            if made := make(rng, split, pool, known):
                yield made


# ------------------------------------------------------------------------------------------------ the mixture


def parse(spec):
    """'factbook=3,tasks=2,jsonl:my.jsonl=1' -> {"factbook": 3.0, ...}; a name alone has its usual share."""
    shares = {}
    for item in filter(None, map(str.strip, spec.split(","))):
        name, share = item.rsplit("=", 1) if "=" in item else (item, SOURCES.get(item, 10))
        kind, _, path = name.partition(":")
        if name not in SOURCES and not (kind in ("unknown", "jsonl") and path):
            known = f"{', '.join(SOURCES)}, unknown:PATH, jsonl:PATH"
            raise UserError(f"there is no source {name!r}; choose from {known}")
        if not re.fullmatch(r"\d*\.?\d+", str(share)) or not float(share):
            raise UserError(f"the share of {name} is {share!r}; give a number above 0")
        shares[name] = float(share)
    if not shares:
        raise UserError("no source is named; for instance factbook=3,tasks=2")
    return shares


AGAIN = re.compile(r"(?<!\S)(\S+)( \1){3}(?!\S)|(?<!\S)((?:\S+ ){5}).*\3.*\3")  # one word, five words


def fault(conversation, split):
    """What is wrong with a conversation, or None."""
    words = [text_of(turn["content"]) for turn in conversation]
    if len(json.dumps(conversation, ensure_ascii=False)) > LONGEST:
        return "too long"
    for turn, text, before in zip(conversation, words, ["", *words]):
        if not text.strip():
            return "too short"
        if turn["role"] == "user" and split == "train" and plain(text) in examined():
            return "of the evaluation"
        if turn["role"] == "assistant":
            if AGAIN.search(f"{text} "):
                return "repeating themselves"
            if len(plain(before).split()) > 3 and f" {plain(before)} " in f" {plain(text)} ":
                return "repeating the question"
    return None


def draw(spec, n, seed=0, split="train", skip_bad=False):
    """n conversations by share, in random order, and what was dropped on the way, {why: how many}.

    A source that has no more to give leaves its share to the others; if none is left, there are fewer than n.
    """
    shares, rng = parse(spec), random.Random(f"{seed} {split}")
    unknown = set().union(*(probed(name.partition(":")[2]) for name in shares if name.startswith("unknown:")))
    streams = {name: conversations(name, split, seed, unknown, skip_bad) for name in shares}
    kept, dropped, seen, answers = [], Counter(), set(), {}
    while streams and len(kept) < n:
        wanted = Counter(rng.choices([*streams], [shares[name] for name in streams], k=n - len(kept)))
        for name in sorted(streams, key=lambda name: ":" not in name):  # the user's own have precedence
            in_vain = 0  # conversations dropped in a row
            while wanted[name] and in_vain < 300 and (conversation := next(streams[name], None)):
                why = fault(conversation, split) or objection(conversation, seen, answers)
                dropped[why] += 1
                in_vain = in_vain + 1 if why else 0
                if not why:
                    kept.append(conversation)
                    wanted[name] -= 1
            if wanted[name]:
                del streams[name]
    rng.shuffle(kept)
    del dropped[None]
    if skip_bad:
        dropped["bad lines"] = sum(read(n[6:], True)[1] for n in shares if n.startswith("jsonl:"))
    return kept, dict(dropped)


def objection(conversation, seen, answers):
    """Why a conversation does not go with those before it, or None; `seen` and `answers` remember it."""
    text = json.dumps(conversation)
    if text in seen:
        return "duplicates"
    seen.add(text)
    for i, turn in enumerate(conversation):
        question = json.dumps(conversation[:i]).lower()  # with all that was said before it
        if turn["role"] == "assistant" and answers.setdefault(question, turn["content"]) != turn["content"]:
            return "contradicting others"
    return None


# ------------------------------------------------------------------------------------------- the command line


def parser():
    flags = common.Parser(
        prog="python -m tasks.conversations", description="Print what an assistant learns from."
    )
    number = common.number
    add = flags.add_argument_group("what").add_argument
    words = "sources with their shares, as in factbook=3,tasks=2,jsonl:PATH=1"
    add("spec", nargs="?", default=DEFAULT, help=words)
    add("--split", choices=("train", "test"), default="train", help="test: the held-out ones")
    add = flags.add_argument_group("how many").add_argument
    add("--num", type=number(int, low=1), default=5, metavar="N", help="how many")
    add("--seed", type=number(int, low=0), default=42, metavar="N", help="which ones")
    add = flags.add_argument_group("output").add_argument
    words = "write them as pages of plain text instead: a workbook, for data.py --train-also"
    add("--workbook", metavar="PATH", help=words)
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    kept, dropped = draw(flags.spec, flags.num, flags.seed, flags.split)
    if flags.workbook:
        texts = ["\n".join(text_of(turn["content"]) for turn in conversation) for conversation in kept]
        pages = ("\n\n".join(texts[i : i + PAGE]) for i in range(0, len(texts), PAGE))
        lines = "".join(json.dumps({"text": page}) + "\n" for page in pages)
        return common.write_whole(Path(flags.workbook), lines.encode())
    for conversation in kept:
        for turn in conversation:
            parts = turn["content"]
            parts = [dict(type="text", text=parts)] if isinstance(parts, str) else parts
            shown = [p["text"] if p["type"] == "text" else f"[{p['type']}{p['text']}] " for p in parts]
            print(f"{turn['role']}: {''.join(shown)}")
        print()
    common.say(f"dropped: {', '.join(f'{n} {why}' for why, n in dropped.items()) or 'nothing'}")


if __name__ == "__main__":
    common.run(main)
