"""Problems whose answers can be checked: a prompt, a worked solution, the answer, and a verifier.

    python -m tasks.problems                            what there is
    python -m tasks.problems word --level 2 --num 5     a few; also gsm8k:PATH and reasoning_gym:NAME

sft.py learns from the solutions, rl.py rewards attempts that verify() finds right. A seed draws the problems;
a hash of its content alone says whether one is for training or for testing. Solutions take small steps: one
token cannot think for long, but it sees those before it. Read tools.py and tasks/factbook.py before,
tasks/conversations.py after.
"""

import functools
import itertools
import json
import operator
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import common
import data
from common import UserError
from tasks.factbook import all_facts, held_out, plain
from tools import calculate

# {name: levels}. A level counts digits, steps, operations, letters (counting's last: dots), decimals.
TASKS = dict.fromkeys(["arithmetic", "word", "countdown", "counting", "spelling", "decimals"], (1, 2, 3, 4))
TASKS |= {"factbook": (1, 2, 3)}  # short names, longer ones, numbers
# Problem.phrasing counts these. A word in quotes stands so in the tool call too, another one with its space:
# then its tokens are the same in both places and can be copied.
WORDINGS = {
    "arithmetic": "Work out {q} step by step.|Calculate {q} in steps.|What is {q}? Show the steps."
    "|Do {q} in columns.|Step by step, what is {q}?|Show your work for {q}.",
    "word": "{facts}: {ask}?|{facts}. {ask}?|If {facts}, {ask}?|{ask} if {facts}?|{facts}. Question: {ask}?",
    "countdown": "Make {target} from {given}.|Use {given} to make {target}.|With {given}, reach {target}."
    "|Reach {target} with each of {given} at most once.|How do you get {target} out of {given}?",
    "counting": "How many {what} in {where}?|How many {what} are there in {where}?"
    '|How many "{what}" are in "{where}"?|How many {what} does {where} have?'
    "|In {where}, how many {what}?|Count the {what} in {where}, please.",
    "spelling": "What is {what} of {where}?|Write {what} of {where}.|Give me {what} of {where}."
    "|Tell me {what} of {where}.|What is {what} of the word {where}?|Print {what} of {where}.",
    "decimals": "{a} or {b}, which is larger?|Which is larger, {a} or {b}?|Is {a} or {b} the larger number?"
    "|Which number is bigger, {a} or {b}?|Tell me the larger of {a} and {b}.",
    "factbook": "What is the {what}?|Tell me the {what}.|Name the {what}.|I need the {what}."
    "|Do you know the {what}?",
}
WORDINGS = {task: wordings.split("|") for task, wordings in WORDINGS.items()}
# The lecture's examples are always for testing.
LECTURE = {"strawberry", "ubiquitous", "9.11 9.9"}
LECTURE |= {"2 * 2 = 4, 13 - 4 = 9, 9 / 3 = 3", "23 - 20 = 3, 3 + 6 = 9"}


@dataclass
class Problem:
    task: str
    prompt: str
    solution: str | list  # a text, or parts as in sample.py; it ends with "Answer: " and the answer
    answer: str
    level: int = 1
    phrasing: int = 0
    key: str = ""  # the content, however it is worded
    score: Callable | None = None  # of a marked answer, where a library knows better

    def verify(self, text):
        """1.0 if the last marked answer in what the assistant wrote is right, else 0.0."""
        line, value = marked(text), numeric(self.answer)
        if not line:
            return 0.0
        if self.task == "countdown":
            return float(reaches(line, self.answer))
        if value is None:
            right = self.score(MARK.split(text)[-1]) if self.score else spelt(line) == spelt(self.answer)
            return float(right)
        found, margin = numeric(line, self.prompt), value / 100 if self.task == "factbook" else 0
        return float(found is not None and abs(found - value) <= margin)

    def answer_first(self):
        """The solution as it should not be: the answer at once, then the steps."""
        *before, said = [self.solution] if isinstance(self.solution, str) else self.solution
        steps, _, answer = (said["text"] if before else said).rpartition("Answer: ")
        said = f"Answer: {answer}\n{steps}".strip()
        return [{"type": "text", "text": said}, *before] if before else said


def problems(name, split="train", level=None, seed=0, phrasings=None):
    """Problems of a task without end: of one level or of all, in all wordings or those with these numbers.

    Those of a GSM8K file come once for testing, and again and again for training.
    """
    kind, _, rest = name.partition(":")
    if rest and kind == "reasoning_gym" and level is not None:
        raise UserError(f"{name} has no levels; leave --level out")
    if rest and kind in ("gsm8k", "reasoning_gym"):
        found = gsm8k(Path(rest), split, level, seed) if kind == "gsm8k" else gym(rest, split, seed)
        return itertools.chain([next(found)], found)  # begin now: what is wrong should show now
    if name not in TASKS:
        every = ", ".join([*TASKS, "gsm8k:PATH", "reasoning_gym:NAME"])
        raise UserError(f"there is no task {name!r}; choose from {every}")
    if level not in (None, *TASKS[name]):
        raise UserError(f"{name} has no level {level}; choose from {', '.join(map(str, TASKS[name]))}")
    wordings = range(len(WORDINGS[name])) if phrasings is None else sorted(phrasings)
    if not set() < set(wordings) <= set(range(len(WORDINGS[name]))):
        raise UserError(f"{name} has no phrasings {wordings}; choose from 0 to {len(WORDINGS[name]) - 1}")
    return made(name, split, TASKS[name] if level is None else [level], seed, wordings)


def made(name, split, levels, seed, wordings):
    make = {"arithmetic": arithmetic, "word": story, "countdown": countdown, "counting": counting}
    make |= {"spelling": spelling, "decimals": decimals, "factbook": fact}
    rng = random.Random(f"{name} {split} {seed}")
    while True:
        level, phrasing = rng.choice(levels), rng.choice(wordings)
        key, prompt, solution, answer = make[name](rng, level, WORDINGS[name][phrasing])
        if split_of(key) == split:
            prompt = re.sub(r"(^|[.?] )[a-z]", lambda start: start[0].upper(), prompt)
            yield Problem(name, prompt, solution, answer, level, phrasing, key)


def split_of(key):
    """A fifth of all contents is for testing, the same fifth on every machine."""
    return "test" if key in LECTURE or held_out(key) else "train"


# ------------------------------------ is it right? generous about form, strict about there being one answer

MARK = re.compile(r"\banswer\b[*_ ]*:", re.I)
NUMBER = re.compile(r"(-?)\$? ?((?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?) ?[$%]?((?: ?\b[a-z]+){0,2})", re.A)
UNITS = set(re.findall(r"\w+", "dollar people children year letter time dot sq square km"))
TIMES = set(re.findall(r"\w+", "dozen hundred thousand million billion"))  # behind these it is another number


def marked(text):
    """The line after the last "Answer:", without what only decorates it; None if there is none."""
    if not (found := MARK.split(text)[1:]):
        return None
    return found[-1].strip(" *_").partition("\n")[0].strip(" *_`\"'").rstrip(" .!*_`\"'")


def numeric(line, prompt=""):
    """The number that is all of a line but its unit: '$1,234.50' or '9 apples', if the prompt has apples."""
    found = NUMBER.fullmatch(line.lower()) if len(line) < 100 else None
    units = UNITS | {word.rstrip("s") for word in re.findall("[a-z]+s", prompt.lower())} - TIMES
    known = found and {unit.rstrip("s") for unit in found[3].split()} <= units
    if not known or not found[2] or ("%" in line and not re.search("%|percent", prompt)):
        return None
    return Fraction(found[1] + found[2].replace(",", ""))


def votes(texts, prompt=""):
    """For each answer the numbers of the texts that give it, the most frequent first; 9, 9.0, $9 are one."""
    found = {}
    for i, text in enumerate(texts):
        if answer := marked(text):
            value = numeric(answer, prompt)
            word = answer if re.search(r"\d", answer) else spelt(answer) or answer  # 3 + 5 is not 3 * 5
            found.setdefault(word if value is None else value, []).append(i)
    return sorted(found.values(), key=len, reverse=True)


def spelt(line):
    """A name or a spelling without capitals, accents, signs and spaces."""
    return plain(line).removeprefix("the ").replace(" ", "")


def reaches(line, answer):
    """Whether an expression has the value of `answer`, and uses each of the numbers there at most once."""
    expression, *value = line.translate(str.maketrans("×xX·÷−", "****/-")).split("=")
    used, given = (Counter(re.findall(r"\d+", side)) for side in (expression, answer))
    allowed = re.fullmatch(r"(?!.*(\*\*|//))[0-9+\-*/() ]+", expression) and used <= given and len(value) < 2
    return bool(allowed) and len({*map(calculate, (expression, answer, *value))}) == 1


# ------------------------------------------ the tasks: key, prompt, solution and answer of one problem each


def arithmetic(rng, level, wording):
    """Numbers of `level` digits, in columns as at school; their digits first, since tokens hide them:

    4 7 + 3 8. 7 + 8 = 15, carry 1. 4 + 3 + 1 = 8. So 8 5.
    """
    op, least = rng.choice("+-*"), 10 ** (level - 1) if level > 1 else 0
    a, b = rng.randrange(least, 10**level), rng.randrange(rng.choice((least, least, 0)), 10**level)
    a, b = {"+": (a, b), "-": (max(a, b), min(a, b)), "*": (a, b % 10)}[op]
    key = key_of(a, op, b)
    above, below = str(a), str(b) if op == "*" else str(b).zfill(len(str(a)))
    sign, word = ("-", "borrow") if op == "-" else ("+", "carry")
    steps, carry, digits = [], 0, ""
    for place in reversed(range(len(above))):
        x, y = int(above[place]), b if op == "*" else int(below[place])
        x += 10 if op == "-" and x < y + carry else 0
        step = f"{x} {op} {y}" + (f" {sign} {carry}" if carry else "")
        value = calculate(step)
        if op == "*" and carry:  # two steps, and each of them a sum that one can know by heart
            step = f"{x} * {y} = {x * y}, {x * y} + {carry}"
        carry = (x if op == "-" else int(value)) // 10 if place else 0
        digits = (value[-1] if place else value) + digits
        steps.append(f"{step} = {value}" + (f", {word} {carry}" if carry else ""))
    answer = str(int(digits))
    if level > 1:
        steps = [f"{' '.join(above)} {op} {' '.join(below)}", *steps, f"So {' '.join(answer)}"]
    return key, wording.format(q=f"{a} {op} {b}"), f"{'. '.join(steps)}.\nAnswer: {answer}", answer


def key_of(a, op, b):
    """The same for a + b and b + a."""
    return f"{a} {op} {b}" if op in "-/" else f"{min(a, b)} {op} {max(a, b)}"


# Facts, question, steps. A small letter becomes a number below 10, a capital one below 100; # is the result
# of the step before, #1 of the first. Names and fruits change, too.
STORIES = """\
Emily has A apples and buys b more|how many apples are there now|A+b
Emily had A apples and ate b|how many apples are left|A-b
Emily has a bags of b apples|how many apples are there|a*b
Emily shares A apples among b children|how many does each child get|A/b
Emily buys a apples at $b each|what is the total|a*b
Emily pays $A for b apples|what does an apple cost|A/b
Emily had A apples, B were used and c bought|how many apples are there now|A-B, #+c
Emily buys a apples at $b each and pays with $C|how many dollars come back|a*b, C-#
Emily buys a apples and b oranges, each piece costs $c|what is the total|a+b, #*c
Emily has a bags of b apples and eats c|how many apples are left|a*b, #-c
Emily has a bags of b apples and finds C more|how many apples are there now|a*b, #+C
Emily puts A apples and B oranges in c bags|how many are in each bag|A+B, #/c
Emily has A apples, eats b and shares the rest among c children|how many does each child get|A-b, #/c
Emily buys a apples and b oranges, each orange is $c, the total is $D|what does an apple cost|b*c, D-#, #/a
Emily buys a apples at $b each and c oranges at $d each|what is the total|a*b, c*d, #1+#
Emily has A apples, buys b bags of c and eats d|how many apples are left|b*c, A+#, #-d
Emily sells a apples and b oranges at $c each and pays $D|how many dollars are left|a+b, #*c, #-D
Emily has $A, buys b apples at $c each and shares the rest among d children|what does each get|b*c, A-#, #/d
Emily buys a apples at $b each, c oranges at $d each and pays with $E|what comes back|a*b, c*d, #1+#, E-#
Emily pays $D for a apples at $b each and c oranges, $e comes back|what is an orange|a*b, D-e, #-#1, #/c
Emily has a bags of b apples and c bags of d oranges, e are bad|how many are good|a*b, c*d, #1+#, #-e
Emily has A apples, eats b, finds c bags of d, shares all with e children|how many each|A-b, c*d, #1+#, #/e"""
# Every second story is a chain of these, in any order. Its steps name the events: who sees how far it is in a
# story can follow a longer one than any before.
EVENTS = {"finds {} more": "+", "buys {} more": "+", "gets {}": "+"}
EVENTS |= {"eats {}": "-", "loses {}": "-", "gives {} away": "-", "sells {}": "-"}
# The largest number in a story of one or two steps: few enough sums for a small model to know them all. In
# the longer ones, which want a calculator, every fifth answer would be 1, and practice finds that out.
LARGEST = 20
NAMES = re.findall(r"\w+", "Emily Tom Anna Ben Maria Omar Sara Ali Mary Lucy Nora Mia Ivan Leo Rosa Noah")
FRUITS = re.findall(
    r"\w+", "apple orange pear melon lemon banana plum mango kiwi fig lime date peanut carrot"
)


def chain(rng, n):
    """A story of n events as in STORIES, its steps with their events: "eats b: A-b, finds c more: #+c"."""
    drawn = list(zip("A######", rng.choices([*EVENTS], k=n), "bcdefg"))
    events = [event.format(sign) for _, event, sign in drawn]
    steps = [f"{told}: {old}{EVENTS[event]}{sign}" for told, (old, event, sign) in zip(events, drawn)]
    facts = f"{', '.join(['Emily has A apples', *events[:-1]])} and {events[-1]}"
    return facts, "how many apples are there now", ", ".join(steps)


def filled(rng, named, *texts):
    """Texts of a story with names and fruits, and for its letters the numbers that `named` has."""
    named["Emily"] = rng.choice(NAMES)
    for old, new in zip(("apple", "orange"), rng.sample(FRUITS, 2)):
        named |= {old: new, f"{old}s": f"{new}s", f"an {old}": f"a{'n' * (new[0] in 'ao')} {new}"}
    signs = r"\b(an \w+|Emily|apples|oranges?|[a-gA-E])\b"
    return [re.sub(signs, lambda sign: named[sign[0]], text) for text in texts]


def story(rng, level, wording):
    """A word problem of `level` steps, with numbers that go well: every result is whole and not too large."""
    told = [line.split("|") for line in STORIES.split("\n") if line.count(",", line.rindex("|")) == level - 1]
    told_of, ask, formulas = chain(rng, level) if rng.random() < 0.5 else rng.choice(told)
    steps, largest = [], LARGEST if level <= 2 else 99
    while len(steps) < level:
        named = {x: str(rng.randint(2, 9) if x.islower() else rng.randint(10, largest)) for x in "abcdeABCDE"}
        steps, said = [], []
        for step in formulas.split(", "):
            event, _, formula = step.rpartition(": ")
            left, op, right = (named.get(sign, sign) for sign in re.findall(r"#1|\S", formula))
            if not (value := whole(left, op, right)) or int(value) > largest:
                break
            steps.append(f"{left} {op} {right} = {value}")
            said.append(f"{event}: {steps[-1]}" if event else steps[-1])
            named |= {"#": value, "#1": named.get("#1", value)}
    facts, ask, said = filled(rng, named, told_of, ask, ", then ".join(said))
    prompt = wording.format(facts=facts, ask=ask)
    key = ", ".join(steps)  # the same sums in another story may train: a sum never seen cannot be known
    key = key if key in LECTURE else f"{told_of}: {key}"
    return key, prompt, f"So {said}.\nAnswer: {value}", value


def whole(left, op, right):
    """The result if it is a whole number from 1 to 99, else None."""
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}
    value = operations[op](int(left), int(right))
    return str(value) if value.denominator == 1 and 0 < value < 100 else None


def countdown(rng, level, wording):
    """Reach a target with level + 1 numbers, each used at most once."""
    numbers, steps, value = [], [], None
    while len(steps) < level or value in numbers:
        numbers, steps = [str(rng.randint(2, 12)) for _ in range(level + 1)], []
        pool = [(number, number) for number in numbers]  # values, and how they came about
        while len(pool) > 1:
            (x, left), (y, right) = (pool.pop(rng.randrange(len(pool))) for _ in range(2))
            op = rng.choice("+-*/")
            if not (value := whole(x, op, y)):
                break
            steps.append(f"{x} {op} {y} = {value}")
            pool.append((value, f"({left} {op} {right})"))
    key, answer, last = f"{' '.join(sorted(numbers))}: {value}", pool[0][1][1:-1], numbers.pop()
    prompt = wording.format(target=value, given=f"{', '.join(numbers)} and {last}")
    return key, prompt, f"So {', then '.join(steps)}.\nAnswer: {answer}", answer


@functools.cache
def words():
    """Words of the Factbook that come often enough and in small letters only, by their length."""
    text = json.dumps([list(sections.values()) for _, sections in data.countries()], ensure_ascii=False)
    counts = Counter(re.findall(r"(?<![\w&<'’./\\=-])[a-z]{3,14}(?![\w;'’=>/-])", text))
    found = sorted({word for word, n in counts.items() if n >= 3} | {"strawberry", "ubiquitous"})
    return {size: [word for word in found if len(word) == size] for size in range(3, 15)}


def a_word(rng, level):
    """Of 3 to 5, 6 to 8, 9 to 11 or 12 to 14 letters; every third word is made up of two halves."""
    size = rng.randint(3 * level, 3 * level + 2)
    first, second = rng.choice(words()[size]), rng.choice(words()[size])
    return first[: size // 2] + second[size // 2 :] if rng.random() < 1 / 3 else first


def called(wording, word, what, operation, said):
    """A problem whose solution is a call of the calculator, its output, and words about it."""
    space = "" if '"{where}"' in wording else " "
    call = f'"{space}{word}"{operation}'
    output = calculate(call)
    parts = {"calc": call, "output": output, "text": said.format(output)}
    solution = [{"type": kind, "text": text} for kind, text in parts.items()]
    return word, wording.format(what=what, where=word), solution, output


def counting(rng, level, wording):
    """How many r in strawberry; at level 4, how many dots in a row."""
    if level == 4:
        word, what, sign = "." * rng.randint(3, 40), "dots", "."
    else:
        word = a_word(rng, level)
        what = sign = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
    return called(wording, word, what, f'.count("{sign}")', "That makes {0}.\nAnswer: {0}")


def spelling(rng, level, wording):
    """The third letter, every third letter, the reverse: what a model that sees tokens cannot know."""
    word, first = a_word(rng, level), 1  # behind the space
    nth = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    n, step = rng.randrange(min(len(word), 10)), rng.randint(2, 4)
    every, one = f"[{first}::{step}]", f"[{first + n}]"
    kinds = [(f"the {nth[n]} letter", one), (f"every {nth[step - 1]} letter", every)]
    kinds += [("the reverse", "[:0:-1]")] * (word != word[::-1])  # "level" is no task
    return called(wording, word, *rng.choice(kinds), 'Answer: "{}"')  # in quotes it has the output's tokens


def decimals(rng, level, wording):
    """9.11 or 9.9: with as many digits behind the point in both, 90 is more than 11."""
    places, most = {1: (1, 1), 2: (1, 2), 3: (2, 3), 4: (1, 3)}[level], 100 if level == 4 else 10
    pair = ["0", "0"]
    while Fraction(pair[0]) == Fraction(pair[1]):
        wholes = [rng.randrange(most)] * 2 if rng.random() < 0.7 else rng.sample(range(most), 2)
        pair = [f"{whole}.{rng.randrange(10**n):0{n}}" for whole, n in zip(wholes, rng.sample(places, 2))]
    padded = {x: x.ljust(x.index(".") + 1 + places[1], "0") for x in pair}
    low, high = sorted(pair, key=Fraction)
    side = padded[low].split(".")[0] == padded[high].split(".")[0]  # 0: before the point, 1: behind it
    less, more = (padded[x].split(".")[side] for x in (low, high))
    solution = f"Take {' and '.join(padded.values())}: {more} is more than {less}.\nAnswer: {high}"
    return " ".join(sorted(pair)), wording.format(a=pair[0], b=pair[1]), solution, high


@functools.cache
def known(level):
    fields = {1: ("capital", "internet code"), 2: ("currency", "highest point", "holiday")}
    fields[3] = ("population", "area", "life expectancy")
    return [fact for fact in all_facts() if fact.field in fields[level]]


def fact(rng, level, wording):
    """A question about a country; the split is that of tasks/factbook.py."""
    one = rng.choice(known(level))
    what, _, answer = one.exact[4:].removesuffix(".").partition(" is ")  # "The capital of France is Paris."
    return f"{one.country}|{one.field}", wording.format(what=what), f"{one.exact}\nAnswer: {answer}", answer


# ----------------------------------------------------------------------------------- other people's problems


def gsm8k(path, split, level, seed):
    """GSM8K's JSONL: of a directory train.jsonl or test.jsonl; of a file a fifth is for testing."""
    file, found = path / f"{split}.jsonl" if path.is_dir() else path, []
    try:
        lines = file.read_text(encoding="utf-8").strip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{file}: {reason}; give a file of GSM8K, or the directory with both") from None
    for n, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            question, solution = entry["question"].strip(), re.sub("<<.*?>>", "", entry["answer"])
            steps, _, answer = solution.replace("\r", "").rpartition("\n#### ")
            answer = answer.strip().replace(",", "")
            if not question or not steps or numeric(answer) is None:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            wanted = '{"question": "...", "answer": "...\\n#### 42"}'
            raise UserError(f"{file}, line {n} is not {wanted}; correct or delete the line") from None
        solution, n_steps = f"{steps}\nAnswer: {answer}", steps.count("\n") + 1
        if (path.is_dir() or split_of(question) == split) and level in (None, n_steps):
            found.append(Problem("gsm8k", question, solution, answer, n_steps, key=question))
    if not found:
        raise UserError(f"{file} has no problem for {split} of level {level}; choose another level or file")
    rng = random.Random(f"{split} {seed}")
    yield from rng.sample(found, len(found))
    while split == "train":
        yield from rng.sample(found, len(found))


def gym(name, split, seed):
    """A dataset of reasoning_gym, and its judgement: right is a score of 1, half right is wrong.

    Some of its judges have sympy evaluate the answer. Where that matters, train on others.
    """
    try:
        from reasoning_gym import create_dataset  # noqa: PLC0415 -- an extra
    except ImportError:
        remedy = "python -m pip install reasoning-gym==0.1.25"
        raise UserError(f"reasoning_gym:{name} needs a library; install it: {remedy}") from None
    rng = random.Random(f"{name} {split} {seed}")
    while True:
        try:
            dataset = create_dataset(name, seed=rng.randrange(2**31), size=50)
        except (ValueError, AssertionError, TypeError) as error:
            raise UserError(f"reasoning_gym:{name}: {error}; choose another of its datasets") from None
        for entry in dataset:
            question, answer = entry["question"], str(entry["answer"] or "")
            if split_of(question) == split:
                judge, task = functools.partial(judged, dataset, entry), f"reasoning_gym:{name}"
                yield Problem(task, question, f"Answer: {answer}", answer, 1, 0, question, judge)


def judged(dataset, entry, given):
    listed = re.search(r"\bor\b", given) and " or " not in str(entry["answer"])
    if listed or len(given) > 1000 or "__" in given:  # some judges look for the right answer among others
        return False
    try:
        return dataset.score_answer(given.strip(), entry) >= 1
    except Exception:  # and stumble over what is no answer at all
        return False


# ------------------------------------------------------------------------------------------- the command line


def parser():
    flags = common.Parser(
        prog="python -m tasks.problems", description="Show problems with their worked solutions."
    )
    count = functools.partial(common.number, int)
    add = flags.add_argument_group("task").add_argument
    add("name", nargs="?", help="a task; none: what there is")
    add = flags.add_argument_group("which problems").add_argument
    add("--level", metavar="N", type=count(low=1), help="how difficult; none: all levels mixed")
    add("--split", choices=["train", "test"], default="train", help="what they are for")
    add("--seed", metavar="N", type=count(low=0), default=42, help="the same seed draws the same problems")
    add = flags.add_argument_group("output").add_argument
    add("--num", metavar="N", type=count(low=1), default=3, help="how many")
    add("--answer-first", action="store_true", help="the answer before the steps")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    if flags.name is None:
        print(*(f"{name:<12}levels {levels[0]} to {levels[-1]}" for name, levels in TASKS.items()), sep="\n")
        print("gsm8k:PATH  a file of its problems\nreasoning_gym:NAME  a dataset of that library")
        return
    found = problems(flags.name, flags.split, flags.level, flags.seed)
    for problem in itertools.islice(found, flags.num):
        solution = problem.answer_first() if flags.answer_first else problem.solution
        if isinstance(solution, list):
            marks = {"calc": "[{}", "output": " -> {}] ", "text": "{}"}
            solution = "".join(marks[part["type"]].format(part["text"]) for part in solution)
        print(f"{problem.prompt}\n{solution}\n")


if __name__ == "__main__":
    common.run(main)
