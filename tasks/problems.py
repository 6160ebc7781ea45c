"""Problems whose answers can be checked: a prompt, a worked solution, the answer, and a verifier.

    python -m tasks.problems                            the names of the tasks and their levels
    python -m tasks.problems word --level 2 --num 5     five problems; also gsm8k:PATH and reasoning_gym:NAME

A reader of the course can skip this file. The one thing to know: problems() draws problems without end, and
problem.verify(text) is 1.0 or 0.0. sft.py learns from the solutions, rl.py takes the verdicts as rewards.

The seed decides which problems are drawn. Whether a problem is for training or for testing depends on a hash
of its content alone, never on the seed. Solutions take small steps, because a model computes a fixed amount
per token, but sees the tokens before it. Wordings, stories and lists of words stand in texts.jsonl. Read
tools.py and tasks/factbook.py before this file, and tasks/conversations.py after it.
"""

import functools
import itertools
import json
import operator
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import common
import hub
from common import UserError, number
from tasks import countries
from tasks.factbook import all_facts, held_out, plain, texts, word_list
from tokenizer import as_parts, transcript
from tools import calculate

TASKS = {  # {name: levels}, and what a level says
    "arithmetic": (1, 2, 3, 4),  # digits of the larger number
    "word": (1, 2, 3, 4),  # steps
    "countdown": (1, 2, 3, 4),  # operations
    "counting": (1, 2, 3, 4),  # 1 to 3: length of the word; 4: a row of dots
    "spelling": (1, 2, 3, 4),  # length of the word
    "decimals": (1, 2, 3, 4),  # digits after the point; 4: whole parts up to 99
    "factbook": (1, 2, 3),  # short names, longer names, numbers
}
# {task: ["What is {expression}? Show the steps.", ...]}
WORDINGS = {row["task"]: row["wordings"] for row in texts("task")}
# The keys of the lecture's own examples, which are always for testing.
LECTURE = {
    "strawberry",
    "ubiquitous",
    "9.11 9.9",
    "2 * 2 = 4, 13 - 4 = 9, 9 / 3 = 3",
    "23 - 20 = 3, 3 + 6 = 9",
}


@dataclass
class Problem:
    task: str
    prompt: str
    solution: str | list  # a text, or parts as in tokenizer.py; it ends with "Answer: " and the answer
    answer: str
    level: int = 1
    key: str = ""  # the content without its wording; it decides whether the problem trains or tests
    score: Callable | None = None  # a library's own judgement of the text after "Answer:"

    def verify(self, text):
        """1.0 if the last answer that the text marks with "Answer:" is right, else 0.0."""
        line = marked(text)
        if not line:
            return 0.0
        expected = numeric(self.answer)
        if self.task == "countdown":
            right = reaches(line, self.answer)
        elif expected is not None:
            given = numeric(line, self.prompt)
            margin = expected / 100 if self.task == "factbook" else 0
            right = given is not None and abs(given - expected) <= margin
        elif self.score is not None:
            right = self.score(MARK.split(text)[-1])
        else:
            right = letters(line) == letters(self.answer)
        return float(right)

    def answer_first(self):
        """The same problem with the answer before the steps: the wrong order, to compare with."""
        *calls, last = as_parts(self.solution)
        steps, _, answer = last["text"].rpartition("Answer: ")
        text = f"Answer: {answer}\n{steps}".strip()
        solution = [{"type": "text", "text": text}, *calls] if calls else text
        return replace(self, prompt=f"{self.prompt} Answer first.", solution=solution)


def problems(name, split="train", level=None, seed=0):
    """Problems of a task without end: of one level or of all, in all wordings.

    `name` is a task, gsm8k:PATH or reasoning_gym:NAME. UserError at once for an unknown name or level and for
    a bad file.
    """
    kind, _, rest = name.partition(":")
    if rest and kind == "reasoning_gym" and level is not None:
        raise UserError(f"{name} has no levels; leave --level out")
    if rest and kind in ("gsm8k", "reasoning_gym"):
        stream = gsm8k(rest, split, level, seed) if kind == "gsm8k" else gym(rest, split, seed)
        return itertools.chain([next(stream)], stream)  # draw the first one now, so that errors show now
    if name not in TASKS:
        known = ", ".join([*TASKS, "gsm8k:PATH", "reasoning_gym:NAME"])
        raise UserError(f"there is no task {name!r}; choose from {known}")
    if level is not None and level not in TASKS[name]:
        raise UserError(f"{name} has no level {level}; choose from {', '.join(map(str, TASKS[name]))}")
    return generate(name, split, TASKS[name] if level is None else [level], seed)


def generate(name, split, levels, seed):
    make = {
        "arithmetic": arithmetic,
        "word": word_problem,
        "countdown": countdown,
        "counting": counting,
        "spelling": spelling,
        "decimals": decimals,
        "factbook": factbook_question,
    }[name]
    rng = random.Random(f"{name} {split} {seed}")
    while True:
        level, wording = rng.choice(levels), rng.choice(WORDINGS[name])
        key, prompt, solution, answer = make(rng, level, wording)
        if split_of(key) == split:
            prompt = re.sub(r"(^|[.?] )[a-z]", lambda start: start[0].upper(), prompt)  # as sentences begin
            yield Problem(name, prompt, solution, answer, level, key)


def split_of(key):
    """A fifth of all contents is for testing, the same fifth on every machine."""
    return "test" if key in LECTURE or held_out(key) else "train"


# ------------------------------------------------------------------------------------------------------------
# Is an answer right? The form is forgiven; two answers at once are always wrong, so that a list cannot win.

MARK = re.compile(r"\banswer\b[*_ ]*:|^####|\\boxed\{(?=[^{}]*\})", re.IGNORECASE | re.MULTILINE)
NUMBER = re.compile(
    r"""(-?)\$?[ ]?                                 # sign, dollar
        ((?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?)      # 1,234 or 1234, and .5
        [ ]?[$%]?
        ((?:[ ]?\b[a-z]+){0,2})                     # a unit of at most two words
    """,
    re.ASCII | re.VERBOSE,
)
UNITS = {"dollar", "people", "children", "year", "letter", "time", "dot", "sq", "square", "km"}
MULTIPLIERS = {"dozen", "hundred", "thousand", "million", "billion"}  # "9 dozen" is another number than 9


def marked(text):
    """The line after the last "Answer:", without decoration such as ** and quotes; None if there is none.

    "#### 9", as in GSM8K, and "\\boxed{9}" mark an answer, too.
    """
    marks = list(MARK.finditer(text))
    if not marks:
        return None
    line = text[marks[-1].end() :].strip(" *_\n").partition("\n")[0]
    if marks[-1][0].endswith("{"):
        line = line.partition("}")[0]
    return line.strip(" *_`\"'").rstrip(" .!*_`\"'")


def numeric(line, prompt=""):
    """The number that a line is, as a Fraction; None if the line is anything else.

    '$1,234.50' is one, and so is '9 apples' if the prompt speaks of apples.
    """
    line = line.lower().replace("\u2212", "-")  # the minus sign of typesetters
    match = NUMBER.fullmatch(line) if len(line) < 100 else None
    if match is None or not match[2]:
        return None
    if "%" in line and not re.search("%|percent", prompt):
        return None
    plurals = {word.rstrip("s") for word in re.findall("[a-z]+s", prompt.lower())}
    if not {word.rstrip("s") for word in match[3].split()} <= UNITS | (plurals - MULTIPLIERS):
        return None
    return Fraction(match[1] + match[2].replace(",", ""))


def letters(line):
    """A name or a spelling without capitals, accents, punctuation and spaces."""
    return plain(line).removeprefix("the ").replace(" ", "")


def reaches(line, answer):
    """Whether an expression has the value of `answer` and uses each of its numbers at most once."""
    line = line.translate(str.maketrans("×xX·÷−", "****/-"))
    expression, *value = line.split("=")  # it may state its value: "(3 + 5) * 4 = 32"
    if len(value) > 1 or not re.fullmatch(r"(?!.*(\*\*|//))[0-9+\-*/() ]+", expression):
        return False
    if not Counter(re.findall(r"\d+", expression)) <= Counter(re.findall(r"\d+", answer)):
        return False
    return all(calculate(other) == calculate(answer) for other in (expression, *value))


def votes(texts, prompt=""):
    """A list for each answer, of the indices of the texts that give it, the most frequent answer first.

    9, 9.0 and $9 are one answer. A text that marks no answer has no vote.
    """
    voters = {}  # {answer: indices}
    for i, text in enumerate(texts):
        line = marked(text)
        if not line:
            continue
        answer = numeric(line, prompt)
        if answer is None:  # an expression as it is: without its signs, 3 + 5 would be 3 * 5
            answer = line if re.search(r"\d", line) else letters(line) or line
        voters.setdefault(answer, []).append(i)
    return sorted(voters.values(), key=len, reverse=True)


# ------------------------------------------------------------------------------------------------------------
# The tasks. Each function draws one problem: (key, prompt, solution, answer).


def arithmetic(rng, level, wording):
    """The sum, difference or product of numbers of `level` digits, worked out in columns as at school.

    The solution spells the digits first, because a token may hide them:
    4 7 + 3 8. 7 + 8 = 15, carry 1. 4 + 3 + 1 = 8. So 8 5.
    """
    op = rng.choice("+-*")
    least = 10 ** (level - 1) if level > 1 else 0
    a = rng.randrange(least, 10**level)
    b = rng.randrange(rng.choice((least, least, 0)), 10**level)  # a third may have fewer digits
    if op == "-":
        a, b = max(a, b), min(a, b)
    elif op == "*":
        b %= 10
    upper = str(a)
    lower = str(b) if op == "*" else str(b).zfill(len(upper))
    steps, digits = columns(upper, op, lower)
    answer = str(int(digits))
    if level > 1:
        steps = [f"{' '.join(upper)} {op} {' '.join(lower)}", *steps, f"So {' '.join(answer)}"]
    prompt = wording.format(expression=f"{a} {op} {b}")
    return sum_key(a, op, b), prompt, f"{'. '.join(steps)}.\nAnswer: {answer}", answer


def columns(upper, op, lower):
    """The steps of column arithmetic, from the last digit to the first, and the digits of the result.

    `lower` has as many digits as `upper`; in a product it is one digit.
    """
    steps, digits, carry = [], "", 0
    for i in reversed(range(len(upper))):
        x, y = int(upper[i]), int(lower if op == "*" else lower[i])
        if op == "+":
            step, value = f"{x} + {y}", x + y + carry
            step += f" + {carry}" if carry else ""
            carry = value // 10
        elif op == "-":
            borrow = int(x < y + carry)
            x += 10 * borrow
            step, value = f"{x} - {y}", x - y - carry
            step += f" - {carry}" if carry else ""
            carry = borrow
        else:
            step, value = f"{x} * {y}", x * y + carry
            step += f" = {x * y}, {x * y} + {carry}" if carry else ""  # two steps that one can know by heart
            carry = value // 10
        if i == 0:  # the first column is written out: nothing is carried beyond it
            carry = 0
        digits = (str(value % 10) if i else str(value)) + digits
        word = "borrow" if op == "-" else "carry"
        steps.append(f"{step} = {value}" + (f", {word} {carry}" if carry else ""))
    return steps, digits


def sum_key(a, op, b):
    """The key of a op b; a + b and b + a have the same."""
    return f"{a} {op} {b}" if op in "-/" else f"{min(a, b)} {op} {max(a, b)}"


# A word problem is a line of texts.jsonl, for instance
#
#   story     {name} buys {a} {apples} at ${b} each and pays with ${C}
#   question  how many dollars come back
#   steps     a * b, C - last
#
# {a} to {e} become numbers from 2 to 9, {A} to {E} larger ones; "last" is the result of the step before,
# "first" that of the first step. With a = 3, b = 4 and C = 20 the solution is
# "So 3 * 4 = 12, then 20 - 12 = 8."
#
# Every second story is instead a chain of events, such as "eats {n}", in any order, and its steps name them:
# a model that sees how far it is in a story can follow a longer one than it has seen before.

# The largest number in a story of one or two steps: so few sums that a small model can know all of them.
# Longer stories go to 99; within 20, a fifth of their answers would be 1, and RL would learn to answer 1.
LARGEST = 20


def word_problem(rng, level, wording):
    """A story whose question takes `level` steps. Every result is a whole number and not too large."""
    if rng.random() < 0.5:
        story = chain_of_events(rng, level)
    else:
        story = rng.choice([row for row in texts("story") if len(row["steps"]) == level])
    largest, steps = LARGEST if level <= 2 else 99, None
    while steps is None:
        numbers = {letter: rng.randint(2, 9) for letter in "abcde"}
        numbers |= {letter: rng.randint(10, largest) for letter in "ABCDE"}
        steps = worked_out(story["steps"], numbers, largest)
    words = numbers | random_words(rng)
    solution = steps
    if "events" in story:
        solution = [f"{event.format(**words)}: {step}" for event, step in zip(story["events"], steps)]
    answer = steps[-1].split(" = ")[1]
    question = story["question"].format(**words)
    prompt = wording.format(facts=story["story"].format(**words), question=question)
    # The same sums may train in one story and test in another: a sum that is never seen cannot be known.
    sums = ", ".join(steps)
    key = sums if sums in LECTURE else f"{story['story'].format(**KEY_WORDS)}: {sums}"
    return key, prompt, f"So {', then '.join(solution)}.\nAnswer: {answer}", answer


def chain_of_events(rng, n):
    """A story of n events, as in texts.jsonl; its "events" belong to the steps."""
    events, steps, before = [], [], "A"
    for letter, row in zip("bcdefg", rng.choices(texts("event"), k=n)):
        events.append(row["event"].replace("{n}", "{" + letter + "}"))
        steps.append(f"{before} {row['op']} {letter}")
        before = "last"
    story = f"{', '.join(['{name} has {A} {apples}', *events[:-1]])} and {events[-1]}"
    return {"story": story, "question": "how many {apples} are there now", "steps": steps, "events": events}


def worked_out(steps, numbers, largest):
    """Steps with numbers: ["A + b"] -> ["12 + 3 = 15"]. None if a result is not whole or is out of bounds."""
    values, result = dict(numbers), []
    for step in steps:
        left, op, right = step.split()
        value = whole(values[left], op, values[right])
        if value is None or value > largest:
            return None
        result.append(f"{values[left]} {op} {values[right]} = {value}")
        values["last"] = value
        values.setdefault("first", value)
    return result


def whole(left, op, right):
    """The result of left op right if it is a whole number from 1 to 99, else None."""
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}
    value = operations[op](left, right)
    return int(value) if value.denominator == 1 and 0 < value < 100 else None


def random_words(rng):
    """A name and two fruits for the placeholders of a story."""
    name = rng.choice(word_list("names"))
    return story_words(name, *rng.sample(word_list("fruits"), 2))


def story_words(name, apple, orange):
    words = {"name": name, "apples": f"{apple}s", "orange": orange, "oranges": f"{orange}s"}
    for placeholder, fruit in (("an_apple", apple), ("an_orange", orange)):
        words[placeholder] = f"an {fruit}" if fruit[0] in "ao" else f"a {fruit}"
    return words


KEY_WORDS = story_words("Emily", "apple", "orange") | {letter: letter for letter in "abcdefgABCDE"}


def countdown(rng, level, wording):
    """Reach a target with level + 1 numbers, each used at most once."""
    attempt = None
    while attempt is None:
        numbers = [rng.randint(2, 12) for _ in range(level + 1)]
        attempt = combine(rng, numbers)
    steps, target, answer = attempt
    given = [str(number) for number in numbers]
    prompt = wording.format(target=target, given=f"{', '.join(given[:-1])} and {given[-1]}")
    key = f"{' '.join(sorted(given))}: {target}"
    return key, prompt, f"So {', then '.join(steps)}.\nAnswer: {answer}", answer


def combine(rng, numbers):
    """Join the numbers by random operations: (steps, result, expression), or None if that goes wrong.

    It does if a result is not whole or not from 1 to 99, or if the last one is among the numbers already.
    """
    steps, pool = [], [(number, str(number)) for number in numbers]  # values with their expressions
    while len(pool) > 1:
        x, left = pool.pop(rng.randrange(len(pool)))
        y, right = pool.pop(rng.randrange(len(pool)))
        op = rng.choice("+-*/")
        value = whole(x, op, y)
        if value is None:
            return None
        steps.append(f"{x} {op} {y} = {value}")
        pool.append((value, f"({left} {op} {right})"))
    result, expression = pool[0]
    return None if result in numbers else (steps, result, expression[1:-1])


@functools.cache
def words():
    """{length: words} of the Factbook that occur at least three times, always in small letters."""
    text = json.dumps([list(sections.values()) for _, sections in countries.countries()], ensure_ascii=False)
    counts = Counter(re.findall(r"(?<![\w&<'’./\\=-])[a-z]{3,14}(?![\w;'’=>/-])", text))
    frequent = sorted({word for word, n in counts.items() if n >= 3} | {"strawberry", "ubiquitous"})
    return {length: [word for word in frequent if len(word) == length] for length in range(3, 15)}


def draw_word(rng, level):
    """A word of 3 to 5, 6 to 8, 9 to 11 or 12 to 14 letters. Every third is half one word, half another."""
    length = rng.randint(3 * level, 3 * level + 2)
    first, second = rng.choice(words()[length]), rng.choice(words()[length])
    return first[: length // 2] + second[length // 2 :] if rng.random() < 1 / 3 else first


def with_call(wording, word, what, operation, text):
    """A problem about a word. Its solution calls the calculator and repeats the output in `text`.

    The call writes the word as the question does: without a space before it if in quotes there, else with
    one. So its tokens are the same in both places and can be copied.
    """
    space = "" if '"{where}"' in wording else " "
    call = f'"{space}{word}"{operation}'
    output = calculate(call)
    solution = called("calc", call, output, text.format(output))
    return word, wording.format(what=what, where=word), solution, output


def called(kind, call, output, answer):
    """What the assistant says with a tool: its call ("calc" or "search"), the tool's output, the answer."""
    return [
        {"type": kind, "text": call},
        {"type": "output", "text": output},
        {"type": "text", "text": answer},
    ]


def counting(rng, level, wording):
    """How many r are in strawberry? At level 4: how many dots are in a row?"""
    if level == 4:
        word, what, letter = "." * rng.randint(3, 40), "dots", "."
    else:
        word = draw_word(rng, level)
        what = letter = rng.choice(word if rng.random() < 0.9 else "abcdefghijklmnopqrstuvwxyz")
    return with_call(wording, word, what, f'.count("{letter}")', "That makes {0}.\nAnswer: {0}")


def spelling(rng, level, wording):
    """The third letter, every third letter, or the reverse of a word. A model sees tokens, not letters."""
    word = draw_word(rng, level)
    ordinals = word_list("ordinals")
    n, step = rng.randrange(min(len(word), 10)), rng.randint(2, 4)
    questions = [  # the word's first letter has index 1, after the space that the call writes before it
        (f"the {ordinals[n]} letter", f"[{n + 1}]"),
        (f"every {ordinals[step - 1]} letter", f"[1::{step}]"),
    ]
    if word != word[::-1]:
        questions.append(("the reverse", "[:0:-1]"))
    what, operation = rng.choice(questions)
    return with_call(wording, word, what, operation, 'Answer: "{}"')  # in quotes, as tokenized in the output


def decimals(rng, level, wording):
    """Which is larger, 9.11 or 9.9? With two digits after the point in both, 90 is more than 11."""
    places = {1: (1, 1), 2: (1, 2), 3: (2, 3), 4: (1, 3)}[level]  # digits after the point, shuffled below
    limit = 100 if level == 4 else 10
    a = b = "0"
    while Fraction(a) == Fraction(b):
        if rng.random() < 0.7:
            wholes = [rng.randrange(limit)] * 2
        else:
            wholes = rng.sample(range(limit), 2)
        digits = rng.sample(places, 2)
        a, b = (f"{whole}.{rng.randrange(10**n):0{n}}" for whole, n in zip(wholes, digits))
    padded = {number: number.ljust(number.index(".") + 1 + places[1], "0") for number in (a, b)}
    low, high = sorted((a, b), key=Fraction)
    whole_low, after_low = padded[low].split(".")
    whole_high, after_high = padded[high].split(".")
    less, more = (after_low, after_high) if whole_low == whole_high else (whole_low, whole_high)
    solution = f"Take {padded[a]} and {padded[b]}: {more} is more than {less}.\nAnswer: {high}"
    return " ".join(sorted((a, b))), wording.format(a=a, b=b), solution, high


@functools.cache
def facts_of_level(level):
    fields = {
        1: ("capital", "internet code"),
        2: ("currency", "highest point", "holiday"),
        3: ("population", "area", "life expectancy"),
    }[level]
    return [fact for fact in all_facts() if fact.field in fields]


def factbook_question(rng, level, wording):
    """A question about a country. Its key makes its split that of tasks/factbook.py."""
    fact = rng.choice(facts_of_level(level))
    what, _, answer = fact.exact.removeprefix("The ").removesuffix(".").partition(" is ")
    prompt = wording.format(what=what)  # "capital of France"
    return f"{fact.country}|{fact.field}", prompt, f"{fact.exact}\nAnswer: {answer}", answer


# ------------------------------------------------------------------------------------------------------------
# Problems of others


def gsm8k(path, split, level, seed):
    """GSM8K's problems of a split and a level, once for "test" and again and again for "train"."""
    found = [problem for problem, _ in gsm8k_rows(path, split) if level in (None, problem.level)]
    if not found:
        what = f"no problem for {split}" + (f" of level {level}" if level else "")
        raise UserError(f"gsm8k:{path} has {what}; choose another level or file")
    rng = random.Random(f"{split} {seed}")
    yield from rng.sample(found, len(found))
    while split == "train":
        yield from rng.sample(found, len(found))


def gsm8k_rows(path, split):
    """Yield (problem, its answer as the file has it) of GSM8K's rows: JSON lines or parquet.

    A directory or the hub has a file for each split; of a single file, a fifth is for testing.
    """
    files, are_of_split = hub.table_files("gsm8k", path, split)
    for file in files:
        for where, row in hub.read_table(file, ("question", "answer")):
            try:
                problem = gsm8k_problem(row["question"], row["answer"])
            except (ValueError, TypeError, AttributeError):
                wanted = '{"question": "...", "answer": "...\\n#### 42"}'
                raise UserError(f"{where} is not {wanted}; correct or delete it") from None
            if are_of_split or split_of(problem.key) == split:
                yield problem, row["answer"]


def gsm8k_problem(question, answer):
    """The problem of a row. Its level is its number of steps; <<3+4=7>>, for a calculator, is removed."""
    question, solution = question.strip(), re.sub("<<.*?>>", "", answer)
    steps, _, number = solution.replace("\r", "").rpartition("\n#### ")
    number = number.strip().replace(",", "")
    if not question or not steps or numeric(number) is None:
        raise ValueError
    level = steps.count("\n") + 1
    return Problem("gsm8k", question, f"{steps}\nAnswer: {number}", number, level, key=question)


def gym(name, split, seed):
    """The problems of a dataset of reasoning_gym. Right is a score of 1; half right is wrong.

    Some of its scores let sympy evaluate the answer, which may run code. Train on others where that matters.
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
                score = functools.partial(gym_score, dataset, entry)
                task = f"reasoning_gym:{name}"
                yield Problem(task, question, f"Answer: {answer}", answer, key=question, score=score)


def gym_score(dataset, entry, given):
    """Whether the dataset gives an answer its full score. Some look for the right answer among several."""
    lists_answers = re.search(r"\bor\b", given) and " or " not in str(entry["answer"])
    if lists_answers or len(given) > 1000 or "__" in given:
        return False
    try:
        return dataset.score_answer(given.strip(), entry) >= 1
    except Exception:  # some fail on what is no answer at all
        return False


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    flags = common.Parser(
        prog="python -m tasks.problems", description="Show problems with their worked solutions."
    )
    add = flags.add_argument_group("task").add_argument
    add("name", nargs="?", help="a task, gsm8k:PATH or reasoning_gym:NAME; if left out, list the tasks")
    add = flags.add_argument_group("which problems").add_argument
    add("--level", type=number(int, low=1), help="difficulty; if left out, all levels mixed")
    add("--split", choices=["train", "test"], default="train", help="problems for training or for testing")
    add("--seed", type=number(int, low=0), default=42, help="seed of the random draw")
    add = flags.add_argument_group("output").add_argument
    add("--num", type=number(int, low=1), default=3, help="number of problems")
    add("--answer-first", action="store_true", help="show the answer before the steps")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    if flags.name is None:
        for name, levels in TASKS.items():
            print(f"{name:<12}levels {levels[0]} to {levels[-1]}")
        print("gsm8k:PATH  a file in the format of GSM8K\nreasoning_gym:NAME  a dataset of that library")
        return
    stream = problems(flags.name, flags.split, flags.level, flags.seed)
    if flags.answer_first:
        stream = (problem.answer_first() for problem in stream)
    for problem in itertools.islice(stream, flags.num):
        print(f"{problem.prompt}\n{transcript(problem.solution)}\n")


if __name__ == "__main__":
    common.run(main)
