"""The conversations that an assistant learns from, drawn from many sources, each with its share.

    python -m tasks.conversations --num 5                                     five of the default mixture
    python -m tasks.conversations factbook=3,tasks=2,jsonl:my.jsonl=1         some of another mixture
    python -m tasks.conversations smoltalk:hub                                some of a set of the hub

A reader of the course can skip this file. The one thing to know: draw() returns n conversations, which are
lists of {"role": ..., "content": ...}, and draw_chats() joins ours to the chats that sft.py trains on; the
same seed draws the same ones. None is a duplicate or contradicts another, and none that trains asks a
question of the evaluation.

A small model learns what is short, regular and can be copied. So a call of a tool repeats the tokens of the
question, and the answer repeats those of the tool's output. The sentences are in texts.jsonl. Read
tasks/factbook.py, tools.py and tasks/problems.py before this file, and sft.py after it.
"""

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import common
import hub
from common import UserError
from tasks.countries import with_article
from tasks.factbook import (
    FIELDS,
    country_forms,
    country_names,
    digest,
    examined,
    facts,
    has_words,
    held_out,
    invented,
    phrase,
    plain,
    probed,
    texts,
)
from tasks.problems import (
    LARGEST,
    called,
    chain_of_events,
    draw_word,
    gsm8k_rows,
    numeric,
    problems,
    random_words,
    split_of,
    sum_key,
)
from tokenizer import checked, text_of, transcript
from tools import SEARCH_SYSTEM, calculate, calculator, looked_up

SOURCES = {  # {source: its usual share}
    "factbook": 21,  # facts from memory
    "identity": 8,  # who are you?
    "refusal": 2,  # requests that it refuses
    "chitchat": 7,  # hello, how are you, thanks
    "tools": 17,  # a calculation or a search
    "tasks": 8,  # problems of tasks/problems.py with their solutions, some by the calculator
    "stories": 3,  # longer word problems
    "events": 3,  # what happens in a story, told event by event
    "steps-first": 2,  # problems solved in steps
    "answer-first": 2,  # the same with the answer before the steps, to compare
    "sums": 1,  # rows of small sums, to learn by heart
    "repeat": 3,  # words to repeat
    "spelling": 7,  # letters of a word, by the calculator
    "counting": 4,
    "multi-turn": 3,  # follow-up questions
    "given": 8,  # facts that stand before the question
    "unknown": 5,  # what it cannot know
}
DEFAULT = ",".join(f"{name}={share}" for name, share in SOURCES.items())
OTHERS = {  # sets of other people, smoltalk:PATH and gsm8k:PATH: {name: the usual share}
    "smoltalk": 80,  # HuggingFaceTB/smol-smoltalk: what a large model answered on everything
    "gsm8k": 2,  # openai/gsm8k: word problems, solved step by step with the calculator
}
PROBLEMS = {  # {source: (tasks, levels)} of tasks/problems.py; rl.py practises the levels above these
    "tasks": (("arithmetic", "word", "decimals"), (1, 2)),
    "stories": (("word",), (3,)),
    "steps-first": (("arithmetic", "word"), (1, 2)),
    "answer-first": (("arithmetic", "word"), (1, 2)),
    "spelling": (("spelling",), (None,)),  # None: all levels
    "counting": (("counting",), (None,)),
}
DONT_KNOW = "I'm sorry, I don't know"  # so begins every answer to what it cannot know
CALCULATED = 0.2  # share of the problems in "tasks" and "stories" that the calculator solves
LONGEST = 5000  # characters of a conversation as JSON; sft.py shortens what its model has no room for
REPEATED = {"chitchat"}  # sources of a few short conversations, which come again until their share is full
PATIENCE = 300  # conversations dropped in a row after which a source has nothing new to give
PAGE = 60  # conversations on a page of a workbook
CHAT_LENGTHS = (4, 3, 3, 3, 3, 2)  # of 18 chats so many have one conversation, two, ... six

# ------------------------------------------------------------------------------------------------------------
# Turns and calls of tools


def turns(*contents, system=None):
    """A conversation of user and assistant in turns, after the system's message if there is one."""
    conversation = [{"role": "system", "content": system}] if system else []
    for role, content in zip(itertools.cycle(("user", "assistant")), contents):
        conversation.append({"role": role, "content": content})
    return conversation


def calculated(call, answer="It is{}."):
    """A call of the calculator and the answer, in which {} becomes the output."""
    output = calculator(call)
    if output.startswith(" error"):
        return called("calc", call, output, "I can't calculate that.")
    return called("calc", call, output, answer.format(output))


def searched(fact):
    """A search for a fact and the answer; None if the search does not find it."""
    output = looked_up(fact.query)
    passage = plain(output)
    n_found = sum(has_words(passage, name) for name in fact.accepted)
    if plain(fact.country) not in passage or n_found < fact.needed:
        return None
    return called("search", fact.query, output, fact.exact)


# ------------------------------------------------------------------------------------------------------------
# Facts: each function draws one conversation, or returns None if what it drew makes none


def remembered(rng, split, known):
    """A question about a country, answered from memory: by a sentence, briefly, or, if the question is about
    the country as a whole, by its location, capital and language."""
    fact, chance = rng.choice(known), rng.random()
    if chance < 0.2:
        return turns(phrase(rng, split, "brief").format(fact.ask(rng, split)), fact.brief)
    if chance < 0.25:
        answers = {other.field: other.answer for other in known if other.country == fact.country}
        about = [answers[field] for field in ("location", "capital", "language") if field in answers]
        question = phrase(rng, split, "about").format(with_article(fact.country))
        return turns(question, " ".join(about)) if about else None
    return turns(fact.ask(rng, split), fact.answer)


def fact_searched(rng, split, pool):
    """A question about a country, looked up. Half of them are about what people ask most."""
    field = rng.choice(("capital", "population") * 10 + tuple(FIELDS))
    fact = rng.choice([fact for fact in pool if fact.field == field])
    reply = searched(fact)
    return turns(fact.ask(rng, split), reply, system=SEARCH_SYSTEM) if reply else None


def follow_up(rng, split, pool, known):
    """A question about a country, and a second one that does not name the country: "And its capital?"."""
    with_search = rng.random() < 0.6
    candidates = pool if with_search else known
    fact = rng.choice(candidates)
    other = rng.choice([one for one in candidates if one.country == fact.country])
    if with_search:
        first, second = searched(fact), searched(other)
    else:
        first, second = fact.answer, other.brief
    question, next_question = fact.ask(rng, split), rng.choice(other.follow_ups)
    if other is fact or not first or not second:
        return None
    system = SEARCH_SYSTEM if with_search else None
    return turns(question, first, next_question, second, system=system)


def not_known(rng, split):
    """A question to which only "I don't know" is right; in a third of them a search finds nothing."""
    if rng.random() < 0.2:
        return talk(rng, split, "unknown")
    ((question, query),) = invented(split, 1, rng.random())
    answer = f"{DONT_KNOW} that country." if " of " in query else f"{DONT_KNOW} who that is."
    if rng.random() < 0.6:
        return turns(question, answer)
    output = looked_up(query)
    if output != " nothing found":
        return None
    return turns(question, called("search", query, output, answer), system=SEARCH_SYSTEM)


def given(rng, split):
    """A question about a made-up country, whose answer stands before it: "Capital of Ostlu: Kova. ..."."""
    country = made_up(rng, split) + phrase(rng, split, "country's end")
    rows = rng.sample(
        [row for row in texts("field") if row["field"] in GIVEN_VALUES], rng.choice((1, 1, 2, 2, 3))
    )
    if plain(country) in country_names():
        return None
    statements, questions = [], []
    for row in rows:
        value = GIVEN_VALUES[row["field"]](rng, split)
        forms = country_forms(country) | {"value": value}
        title = row["field"].capitalize()
        statements.append(rng.choice((f"{title} of {country}: {value}.", row["answer"].format(**forms))))
        question = rng.choice(row["ask"] if split == "train" else row["held_out"])
        questions.append((question.format(**forms), row["answer"].format(**forms)))
    question, answer = rng.choice(questions)
    system = SEARCH_SYSTEM if rng.random() < 0.2 else None  # nothing is searched for that is said already
    if rng.random() < 0.75:
        return turns(f"{' '.join(statements)} {question}", answer, system=system)
    return turns(" ".join(statements), phrase(rng, split, "noted"), question, answer, system=system)


def made_up(rng, split):
    """A name that nobody has, of two or three syllables."""
    return "".join(phrase(rng, split, "syllable") for _ in range(rng.randint(2, 3))).capitalize()


def made_up_person(rng, split):
    return f"{phrase(rng, split, 'first name')} {made_up(rng, split)}"


def made_up_population(rng, split):
    return f"{rng.randint(1, 99)},{rng.randint(0, 999):03},{rng.randint(0, 999):03}"


def made_up_area(rng, split):
    return f"{rng.randint(1, 999)},{rng.randint(0, 999):03} sq km"


GIVEN_VALUES = {
    "capital": made_up,
    "currency": made_up,
    "language": made_up,
    "president": made_up_person,
    "prime minister": made_up_person,
    "population": made_up_population,
    "area": made_up_area,
    "highest point": made_up,
}

# ------------------------------------------------------------------------------------------------------------
# Numbers and words

SIGNS = {  # how a question may write an operator; the call always writes the operator itself
    "+": (" + ", "+", " plus "),
    "-": (" - ", "-", " minus "),
    "/": (" / ", "/", " divided by "),
    "*": (" * ", "*", " times ", " x ", " × "),
}


def is_of_split(split, *words):
    """Whether the content that these words identify belongs to the split."""
    return held_out(*words) == (split == "test")


def held_back(split, *numbers):
    """Whether the calculator is examined with these numbers, so that no other source may train on them."""
    return split == "train" and held_out("arithmetic", *map(str, numbers))


def random_number(rng, digits, decimals=False):
    """A number of so many digits, as text; with one or two decimals if wanted."""
    whole = rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)
    return f"{whole}.{rng.randint(1, 99)}" if decimals else str(whole)


def arithmetic(rng, split):
    """'What is 23 times 47?' and the call ' 23 * 47', which copies the numbers' tokens from the question."""
    count = 3 if rng.random() < 0.15 else 2
    decimals = rng.random() < 0.12
    numbers = None
    while numbers is None or not is_of_split(split, "arithmetic", *numbers):
        digits = rng.choice((1, 1, 2, 2, 2, 3, 3, 4))
        numbers = [random_number(rng, max(1, digits - rng.randint(0, 1)), decimals) for _ in range(count)]
    style = rng.choice((0, 0, 0, 0, 0, 1, 2, 2, 3, 4))  # mostly " + ", rarely "+", at times " plus "
    template = phrase(rng, split, "arithmetic")
    expression = call = numbers[0]
    for sign, number in zip(rng.choices("+-*/", k=count - 1), numbers[1:]):
        written = SIGNS[sign][style % len(SIGNS[sign])]
        expression += written + number
        call += (written if written.strip() == sign else f" {sign} ") + number
    return turns(template.format(expression), calculated(begin_like(template, call)))


def begin_like(template, call):
    """The call with a space before it, unless the question begins with its first number."""
    return call if template.startswith("{") else f" {call}"


def comparison(rng, split):
    """'Is 9.11 larger than 9.9?', answered by the calculator."""
    whole, other = random_number(rng, rng.choice((1, 1, 2))), random_number(rng, 1)
    if rng.random() < 0.7:
        other = whole
    a, b = f"{whole}.{rng.randint(1, 99)}", f"{other}.{rng.randint(1, 99)}"
    word = rng.choice(("larger", "bigger", "greater", "smaller", "less"))
    if not is_of_split(split, "comparison", *sorted((a, b))):
        return None
    call = f" {a} {'<' if word in ('smaller', 'less') else '>'} {b}"
    answer = "Yes, it is." if calculator(call) == " true" else "No, it is not."
    return turns(phrase(rng, split, "comparison").format(a, word, b), calculated(call, answer))


def what_if(rng, split):
    """A calculation, and the same numbers with another operator: "What if it was times?"."""
    a, b = (random_number(rng, rng.choice((1, 1, 2, 3))) for _ in range(2))
    sign, other_sign = rng.sample("+-*", 2)
    template, again = phrase(rng, split, "arithmetic"), phrase(rng, split, "what if")
    first, second = (begin_like(template, f"{a} {one} {b}") for one in (sign, other_sign))
    if not is_of_split(split, "arithmetic", a, b):
        return None
    next_question = again.format(SIGNS[other_sign][2].strip())
    return turns(template.format(first.strip()), calculated(first), next_question, calculated(second))


def repeated(rng, split, pool):
    """'Repeat: ...' words, names and numbers: to use a tool, a model must copy what was said."""
    word = draw_word(rng, rng.choice((1, 2, 3)))
    while split_of(word) != split:  # words that it is examined in spelling are not repeated
        word = draw_word(rng, rng.choice((1, 2, 3)))
    country, name = with_article(rng.choice(pool).country), made_up(rng, split)
    options = (word, word, country, name, random_number(rng, rng.randint(1, 5)))
    if rng.random() < 0.85:
        text = " ".join(rng.choices(options, k=rng.randint(1, 3)))
    else:
        text = "." * rng.randint(3, 40)
    question = phrase(rng, split, "repeat").format(text)
    return turns(question, f"You said {text}") if is_of_split(split, "repeat", text) else None


def sums(rng, split):
    """A row of six small sums, to learn by heart: the steps of worked problems are made of them."""
    expressions = []
    while len(expressions) < 6:
        x, y, op = rng.randint(0, 9), rng.randint(0, 9), rng.choice("+-*/")
        if rng.random() < 0.6 and op in "+-":  # 12 + 7, 20 - 13
            x = rng.randint(10, LARGEST)
        if op == "/":
            x, y = (x * y, y) if y else (0, 1)
        elif op == "-" and x < y:
            x, y = y, x
        elif op == "*" and rng.random() < 0.4:  # a product with what is carried, 24 + 5
            x, y, op = x * y, rng.randint(1, 8), "+"
        carried = op in "+-" and x < 20 and rng.random() < 0.25 and x > y  # 19 - 6 - 1
        if split_of(sum_key(x, op, y)) == split and not held_back(split, x, y):
            expressions.append(f"{x} {op} {y}" + (f" {op} 1" if carried else ""))
    question = phrase(rng, split, "sums").format(", ".join(expressions))
    solved = [f"{expression} = {calculate(expression)}" for expression in expressions]
    return turns(question, f"So {', '.join(solved)}.")


def events(rng, split):
    """What happens in a story, event by event, and longer stories than it learns to solve."""
    numbers = {letter: rng.randint(10, 99) if letter == "A" else rng.randint(2, 9) for letter in "Abcdefg"}
    story = chain_of_events(rng, rng.randint(2, 6))
    words = numbers | random_words(rng)
    told = ", then ".join(story["events"]).format(**words)
    question = phrase(rng, split, "events").format(story["story"].format(**words))
    return turns(question, f"So {told}.") if is_of_split(split, "events", told) else None


# ------------------------------------------------------------------------------------------------------------
# Talk


def talk(rng, split, source):
    """A question of texts.jsonl and its answer. Training varies it: "who are you", "Hello! Who are you?"."""
    row = rng.choice([row for row in texts("source") if row["source"] == source])
    questions = row["ask"] if split == "train" else row["held_out"]
    index = rng.randrange(len(questions))
    question, answer = questions[index], row["answer"][index % len(row["answer"])]
    if split == "train":
        small = question[0].lower() + question[1:]
        if re.match(r"I\b|[A-Z]{2}", question):
            small = question
        greeted = question if source == "chitchat" else phrase(rng, split, "manner").format(question)
        variants = (question, small, question.rstrip(".!?"), small.rstrip(".!?"), greeted)
        question = rng.choices(variants, weights=(8, 2, 2, 2, 6))[0]
    return turns(question, answer, system=SEARCH_SYSTEM if rng.random() < 0.25 else None)


def several_talks(rng, split):
    """Two or three short conversations in one."""
    parts = [talk(rng, split, source) for source in ("chitchat", "identity", "chitchat")]
    parts.append(arithmetic(rng, split))
    chosen = rng.sample(parts, rng.choice((2, 3)))
    return turns(*(turn["content"] for part in chosen for turn in part if turn["role"] != "system"))


# ------------------------------------------------------------------------------------------------------------
# Problems with their solutions


def worked_problems(source, split, seed, rng):
    """Yield problems of tasks/problems.py with their solutions; all sources draw the same problems."""
    tasks, levels = PROBLEMS[source]
    problem_seed = digest(str(seed), split) % 2**32
    streams = [problems(task, split, level, problem_seed) for task in tasks for level in levels]
    for stream in itertools.cycle(streams):
        problem = next(stream)
        if problem.task == "arithmetic" and held_back(split, *re.findall(r"\d+", problem.prompt)):
            continue
        if source == "answer-first":
            problem = problem.answer_first()
        may_calculate = source in ("tasks", "stories") and problem.task in ("arithmetic", "word")
        if may_calculate and rng.random() < CALCULATED:
            yield turns(problem.prompt, with_calculator(problem))
        else:
            yield turns(problem.prompt, hosted(problem.solution))


def with_calculator(problem):
    """The solution of a problem by calls of the calculator. Few solutions have calls; RL finds out that they
    pay."""
    if problem.task == "word":  # each step with its words: "So eats 3: 12 - 3 = 9, then ..."
        steps = re.findall(r"((?:So|, then) [a-z][^:=]*:|) (\d+ [-+*/] \d+) = ", problem.solution)
    else:
        steps = [("", re.search(r"\d+ [-+*] \d+", problem.prompt)[0])]
    parts = []
    for words, expression in steps:
        if words:
            parts.append({"type": "text", "text": words})
        parts.append({"type": "calc", "text": f" {expression}"})
        parts.append({"type": "output", "text": calculator(f" {expression}")})
    end = ".\n" if steps[-1][0] else ""
    return [*parts, {"type": "text", "text": f"{end}Answer: {problem.answer}"}]


def with_gsm8k_calls(problem, answer):
    """GSM8K's solution with its annotations as calls of the calculator, and how many were left out.

    From "48/2 = <<48/2=24>>24 clips" comes "48/2 =[ 48/2 -> 24] 24 clips". The space moves behind the call,
    where the number is the same token as in the output. A call is left out if our calculator finds another
    number than the annotation, which may be rounded.
    """
    solution = answer.replace("\r", "").rpartition("\n#### ")[0]
    first, *pieces = re.split("( ?)<<([^=]*)=(.*?)>>", solution)
    parts, n_left_out = [{"type": "text", "text": first}], 0
    for i in range(0, len(pieces), 4):  # three groups of a match, and the text after it
        space, expression, result, after = pieces[i : i + 4]
        call = f" {expression}"
        output = calculator(call)
        if numeric(result) is not None and numeric(output.strip()) == numeric(result):
            parts += called("calc", call, output, space + after)
        else:
            parts[-1]["text"] += space + after
            n_left_out += 1
    parts[-1]["text"] += f"\nAnswer: {problem.answer}"
    return parts, n_left_out


def hosted(solution):
    """A problem's solution as it runs in a chat: the tool's output begins with a space, ' ac', and the answer
    copies it without quotes."""
    if isinstance(solution, str):
        return solution
    call, _, answer = (part["text"] for part in solution)
    output = calculator(call)
    return called("calc", call, output, answer.replace(f' "{output.strip()}"', output))


# ------------------------------------------------------------------------------------------------------------
# The user's own conversations


def read(path, skip_bad=False):
    """The conversations of a JSONL file, and how many bad lines were skipped: (conversations, skipped).

    Without skip_bad a bad line is a UserError that says which line it is and what is wrong.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a file of conversations") from None
    conversations, skipped = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            conversation, _ = parsed(line)
            conversations.append(conversation)
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{path}, line {number}: {error}; correct it or skip bad lines") from None
            skipped += 1
    if not conversations:
        raise UserError(f'{path} has no conversation; every line should be {{"messages": [...]}}')
    return conversations, skipped


def parsed(line):
    """The conversation in a line of JSON, and the source that the line names or None: (conversation, source).

    A line is {"messages": [...]}, as OpenAI and Hugging Face write it, or the list alone. UserError says what
    is wrong with a bad line.
    """
    try:
        row = json.loads(line)
        row = row if isinstance(row, dict) else {"messages": row}
        return checked(row.get("messages"), training=True), row.get("source")
    except (ValueError, RecursionError) as error:
        raise UserError(f"no JSON ({getattr(error, 'msg', error)})") from None


def is_of_tenth(conversation, split):
    """Whether a conversation of a file belongs to the split: a tenth of them is for testing."""
    return (digest(json.dumps(conversation)) % 10 == 0) == (split == "test")


# ------------------------------------------------------------------------------------------------------------
# Sets of other people, from the hub


def smoltalk(path, split, rng, skip_bad, dropped):
    """Yield the conversations of smol-smoltalk, or of any parquet file of the same form, in random order.

    They are read as they are needed: 460,000 of them are never in memory together.
    """
    files, are_of_split = hub.table_files("smoltalk", path, split)
    for where, row in hub.parquet_rows(files, ["messages"], rng):
        try:
            conversation = checked(row["messages"], training=True)
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{where}: {error}; correct it or skip bad lines") from None
            dropped["bad lines"] += 1
            continue
        if are_of_split or is_of_tenth(conversation, split):
            yield conversation


def gsm8k(path, split, rng, dropped):
    """Yield GSM8K's problems and their solutions by calls of the calculator, in random order."""
    rows = list(gsm8k_rows(path, split))
    for problem, answer in rng.sample(rows, len(rows)):
        solution, n_left_out = with_gsm8k_calls(problem, answer)
        dropped["of GSM8K without the calls whose results differ"] += n_left_out > 0
        yield turns(problem.prompt, solution)


# ------------------------------------------------------------------------------------------------------------
# The mixture


def conversations(name, split="train", seed=0, unknown=(), skip_bad=False, dropped=None):
    """The conversations of a source, one after the other: without end, except for those of files.

    `unknown` has the (country, field) pairs that the model is not to answer from memory: those of every
    unknown:PATH. `dropped` counts what is left out of a file, {why: how many}.
    """
    dropped = Counter() if dropped is None else dropped
    rng = random.Random(f"{seed} {split} {name}")
    source, _, path = name.partition(":")
    if source == "smoltalk":
        yield from smoltalk(path, split, rng, skip_bad, dropped)
    elif source == "gsm8k":
        yield from gsm8k(path, split, rng, dropped)
    elif source == "jsonl":
        own, n_bad = read(path, skip_bad)
        dropped["bad lines"] += n_bad
        own = [one for one in own if is_of_tenth(one, split)]
        yield from rng.sample(own, len(own))
    elif path:  # unknown:PATH
        not_learned = [fact for fact in facts(split) if (fact.country, fact.field) in unknown]
        while not_learned:
            yield turns(rng.choice(not_learned).ask(rng, split), f"{DONT_KNOW}.")
    elif source in PROBLEMS:
        yield from worked_problems(source, split, seed, rng)
    else:
        yield from draw_kinds(source, rng, split, unknown)


def draw_kinds(source, rng, split, unknown):
    """Yield conversations of the kinds that a source mixes; most sources have a single kind."""
    pool = facts(split)
    known = [fact for fact in pool if (fact.country, fact.field) not in unknown]
    makers = {  # {kind: (the function that draws a conversation, its arguments after rng and split)}
        "factbook": (remembered, known),
        "identity": (talk, "identity"),
        "refusal": (talk, "refusal"),
        "chitchat": (talk, "chitchat"),
        "arithmetic": (arithmetic,),
        "comparison": (comparison,),
        "search": (fact_searched, pool),
        "sums": (sums,),
        "events": (events,),
        "repeat": (repeated, pool),
        "what if": (what_if,),
        "follow-up": (follow_up, pool, known),
        "several": (several_talks,),
        "unknown": (not_known,),
        "given": (given,),
    }
    shares = {
        "tools": {"arithmetic": 45, "comparison": 8, "search": 47},
        "multi-turn": {"what if": 40, "follow-up": 35, "several": 25},
    }.get(source, {source: 1})
    while True:
        (kind,) = rng.choices(list(shares), list(shares.values()))
        make, *arguments = makers[kind]
        conversation = make(rng, split, *arguments)
        if conversation:
            yield conversation


def parse(spec):
    """'factbook=3,refusal' -> {"factbook": 3.0, "refusal": 2.0}; a name alone has its usual share."""
    shares = {}
    for item in filter(None, map(str.strip, spec.split(","))):
        source, _, path = item.partition("=")[0].partition(":")
        usual = SOURCES.get(source) or OTHERS.get(source, 10)
        name, share = item.rsplit("=", 1) if "=" in item else (item, usual)
        if name not in SOURCES and not (source in ("unknown", "jsonl", *OTHERS) and path):
            known = f"{', '.join(SOURCES)}, unknown:PATH, jsonl:PATH, smoltalk:PATH, gsm8k:PATH"
            raise UserError(f"there is no source {name!r}; choose from {known}")
        if not re.fullmatch(r"\d*\.?\d+", str(share)) or not float(share):
            raise UserError(f"the share of {name} is {share!r}; give a number above 0")
        shares[name] = float(share)
    if not shares:
        raise UserError("no source is named; for instance factbook=3,tasks=2")
    return shares


def draw(spec, n, seed=0, split="train", skip_bad=False):
    """n conversations by share in random order, and what was dropped, {why: how many}."""
    dropped = Counter()
    kept = [conversation for _, conversation in draw_each(spec, n, dropped, seed, split, skip_bad)]
    random.Random(f"{seed} {split} order").shuffle(kept)
    return kept, {why: n_dropped for why, n_dropped in dropped.items() if n_dropped}


def reasons(dropped):
    """{why: how many} as a person reads it."""
    return ", ".join(f"{n} {why}" for why, n in dropped.items() if n) or "nothing"


def draw_each(spec, n, dropped, seed=0, split="train", skip_bad=False):
    """Yield n times (source, conversation), by share, one source after the other.

    `dropped` counts why conversations were left out, {why: how many}. A source that has nothing more to give
    leaves its share to the others; if all of them end, there are fewer than n.
    """
    shares = parse(spec)
    rng = random.Random(f"{seed} {split}")
    unknown = set()
    for name in shares:
        if name.startswith("unknown:"):
            unknown |= probed(name.removeprefix("unknown:"))
    streams = {name: conversations(name, split, seed, unknown, skip_bad, dropped) for name in shares}
    sieve = Sieve(split, dropped)
    while streams and n > 0:
        weights = [shares[name] for name in streams]
        wanted = Counter(rng.choices(list(streams), weights, k=n))
        for name in sorted(streams, key=precedence):
            n_taken = 0
            passing = sieve.take(streams[name], wanted[name], not is_ours(name), name in REPEATED)
            for conversation in passing:
                n_taken += 1
                yield name, conversation
            n -= n_taken
            if n_taken < wanted[name]:
                del streams[name]


def draw_chats(spec, n, dropped, seed, split, skip_bad, length, longest):
    """Yield the conversations that draw_each() draws, those of our own sources joined to longer chats.

    People ask about one thing and then about another, so every skill must be learned at every turn and after
    turns of every kind. A chat is one to six conversations with the same system message, in random order; if
    it has several, they have at most `longest` tokens together, counted by length(turns). Other people's
    conversations come first, as they are.
    """
    ours, rng = [], random.Random(f"{seed} {split} chats")
    for name, conversation in draw_each(spec, n, dropped, seed, split, skip_bad):
        if is_ours(name):
            ours.append(conversation)
        else:
            yield conversation
    rng.shuffle(ours)
    open_chats = {}  # {system message: (chat, its tokens, conversations still to add)}
    for conversation in ours:
        n_system = 1 if conversation[0]["role"] == "system" else 0
        system, rest = conversation[:n_system], conversation[n_system:]
        key, n_tokens = json.dumps(system), length(rest)
        chat, n_before, n_to_add = open_chats.pop(key, (system, length(system), 0))
        if n_to_add and n_before + n_tokens > longest:  # no room: this chat ends here
            yield chat
            chat, n_before, n_to_add = system, length(system), 0
        if n_to_add == 0:  # a new chat: draw how many conversations it gets
            n_to_add = rng.choices(range(1, 7), CHAT_LENGTHS)[0]
        chat, n_to_add = chat + rest, n_to_add - 1
        if n_to_add:
            open_chats[key] = chat, n_before + n_tokens, n_to_add
        else:
            yield chat
    for chat, _, _ in open_chats.values():
        yield chat


def is_ours(name):
    """Whether a source's conversations are made here."""
    return ":" not in name or name.startswith("unknown:")


def precedence(name):
    """The place of a source in the order: the user's own files, then our sources, then the sets of other
    people. Of conversations that contradict each other the first is kept."""
    source, _, path = name.partition(":")
    return 2 if source in OTHERS else 0 if path else 1


class Sieve:
    """Passes on conversations, except those that are faulty, duplicates, or contradict an earlier one."""

    def __init__(self, split, dropped):
        self.split, self.dropped = split, dropped  # {why: how many}
        self.seen = set()  # digests of conversations
        self.answers = {}  # {digest of what was said before: digest of what the assistant said then}

    def take(self, stream, n, curated=False, repeated=False):
        """Yield the next n that pass, also duplicates if they may be `repeated`. There are fewer if the
        stream ends, as that of a file does, or, of a source without end, if PATIENCE conversations in a row
        do not pass."""
        n_passed = in_a_row = 0
        while n_passed < n and (curated or in_a_row < PATIENCE):
            conversation = next(stream, None)
            if conversation is None:
                break
            why = fault(conversation, self.split, curated) or self.conflict(conversation, repeated)
            if why:
                self.dropped[why] += 1
                in_a_row += 1
            else:
                yield conversation
                n_passed += 1
                in_a_row = 0

    def conflict(self, conversation, repeated=False):
        """Why a conversation cannot follow those before it, or None."""
        key = digest(json.dumps(conversation))
        if key in self.seen and not repeated:
            return "duplicates"
        self.seen.add(key)
        for i, turn in enumerate(conversation):
            if turn["role"] == "assistant":
                before, given = digest(json.dumps(conversation[:i]).lower()), digest(json.dumps(turn))
                if self.answers.setdefault(before, given) != given:
                    return "contradicting others"
        return None


REPETITION = re.compile(
    r"""(?<!\S)(\S+)([ ]\1){3}(?!\S)            # one word four times in a row
      | (?<!\S)((?:\S+[ ]){5}).*\3.*\3          # five words in a row at three places
    """,
    re.VERBOSE,
)


def fault(conversation, split, curated=False):
    """What is wrong with a conversation by itself, or None.

    `curated` ones, those of files, may be long and repeat themselves: the files' makers have chosen them.
    """
    if not curated and len(json.dumps(conversation, ensure_ascii=False)) > LONGEST:
        return "too long"
    before = ""
    for turn in conversation:
        text = text_of(turn["content"])
        if not text.strip():
            return "too short"
        if turn["role"] == "user" and split == "train" and plain(text) in examined():
            return "of the evaluation"
        if turn["role"] == "assistant" and not curated:
            if REPETITION.search(f"{text} "):
                return "repeating themselves"
            if len(plain(before).split()) > 3 and has_words(plain(text), plain(before)):
                return "repeating the question"
        before = text
    return None


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    flags = common.Parser(
        prog="python -m tasks.conversations", description="Print conversations that an assistant learns from."
    )
    add = flags.add_argument_group("what").add_argument
    words = "sources with their shares, as in factbook=3,tasks=2,jsonl:PATH=1"
    add("spec", nargs="?", default=DEFAULT, help=words)
    add("--split", choices=("train", "test"), default="train", help="conversations for training or testing")
    add = flags.add_argument_group("how many").add_argument
    add("--num", type=common.number(int, low=1), default=5, help="number of conversations")
    add("--seed", type=common.number(int, low=0), default=42, help="seed of the random draw")
    add = flags.add_argument_group("output").add_mutually_exclusive_group().add_argument
    words = "write them to a JSONL file instead, as pages of plain text for data.py --train-also"
    add("--workbook", metavar="PATH", help=words)
    words = (
        "write them to a JSONL file instead, each with its source, for data.py inspect or sft.py's jsonl:PATH"
    )
    add("--jsonl", metavar="PATH", help=words)
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    dropped = Counter()
    if flags.jsonl:
        write_jsonl(flags.jsonl, draw_each(flags.spec, flags.num, dropped, flags.seed, flags.split))
    else:
        kept, dropped = draw(flags.spec, flags.num, flags.seed, flags.split)
        if flags.workbook:
            write_workbook(flags.workbook, kept)
        else:
            print_conversations(kept)
    common.say(f"dropped: {reasons(dropped)}")


def print_conversations(conversations):
    for conversation in conversations:
        for turn in conversation:
            print(f"{turn['role']}: {transcript(turn['content'])}")
        print()


def write_jsonl(path, conversations):
    """Write (source, conversation) pairs as messages, one source after the other."""
    lines = []
    for source, conversation in conversations:
        lines.append(json.dumps({"source": source, "messages": conversation}, ensure_ascii=False) + "\n")
    common.write_whole(Path(path), "".join(lines).encode())


def write_workbook(path, conversations):
    """Conversations as plain text, PAGE of them in a line of a JSONL file.

    Those with calls of tools are left out: without its calls a solution has holes.
    """
    whole = [one for one in conversations if all(isinstance(turn["content"], str) for turn in one)]
    plain_texts = ["\n".join(turn["content"] for turn in one) for one in whole]
    pages = ["\n\n".join(plain_texts[i : i + PAGE]) for i in range(0, len(plain_texts), PAGE)]
    lines = "".join(json.dumps({"text": page}) + "\n" for page in pages)
    common.write_whole(Path(path), lines.encode())


if __name__ == "__main__":
    common.run(main)
