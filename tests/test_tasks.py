"""Problems: solutions are right, computed a second time; answers that are wrong, or only look right, get 0;
what trains never tests."""

import json
import re
import sys
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest
import script
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.problems as tasks
from common import UserError
from tasks.factbook import facts, texts, word_list
from tasks.problems import Problem, problems
from tokenizer import text_of
from tools import calculate

LEVELS = [(name, level) for name, levels in tasks.TASKS.items() for level in levels]


def some(name, level=None, n=150, split="train", **more):
    return list(islice(problems(name, split, level, **more), n))


def words_of(solution):
    """What the assistant says, without its calls."""
    return solution if isinstance(solution, str) else text_of(solution)


def sums(text):
    """Every 'left = right' of a worked solution."""
    return re.findall(r"(\d[\d +*/-]*) = (\d+)", text)


# ------------------------------------------------------------------------------------------------------------
# What is generated


@pytest.mark.parametrize("name, level", LEVELS)
def test_every_solution_is_right_and_every_prompt_is_not(name, level):
    for problem in some(name, level) + some(name, level, split="test"):
        assert (problem.task, problem.level) == (name, level)
        said = words_of(problem.solution)
        assert said.splitlines()[-1] in (f"Answer: {problem.answer}", f'Answer: "{problem.answer}"')
        assert problem.verify(said) == 1.0, problem
        assert problem.verify(words_of(problem.answer_first().solution)) == 1.0, problem
        for text in (problem.prompt, f"Answer: {problem.prompt}", f"{said}\nAnswer: {problem.prompt}"):
            assert problem.verify(text) == 0.0, (problem, text)
        assert problem.verify(problem.answer) == 0.0  # not marked
        assert problem.prompt[0].isupper() or problem.prompt[0].isdigit()
        assert name != "word" or not re.search(r"\ba [aeiou]|\ban [^aeiou]", problem.prompt), problem.prompt
        assert not re.search(r"[{}#|]|\b[A-E]\b|\$\D", problem.prompt), problem.prompt


@pytest.mark.parametrize("name", tasks.TASKS)
def test_train_and_test_are_disjoint(name):
    train, test = (some(name, n=400, split=split) for split in ("train", "test"))
    assert {tasks.split_of(p.key) for p in train} == {"train"}
    assert {tasks.split_of(p.key) for p in test} == {"test"}
    assert not {p.prompt for p in train} & {p.prompt for p in test}


def test_a_fifth_is_for_testing_and_stays_there():
    assert 0.18 < sum(tasks.split_of(str(n)) == "test" for n in range(5000)) / 5000 < 0.22
    held_out = [n for n in range(40) if tasks.split_of(f"{n} + {n}") == "test"]
    assert held_out == [4, 7, 13, 14, 16, 18, 19, 27, 38]
    assert all(tasks.split_of(key) == "test" for key in tasks.LECTURE)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_seed_draws_the_problems(name):
    assert some(name, n=20, seed=1) == some(name, n=20, seed=1) != some(name, n=20, seed=2)
    assert {p.level for p in some(name, n=60)} == set(tasks.TASKS[name])


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_wording_occurs(name):
    wordings = tasks.WORDINGS[name]
    assert len(set(wordings)) == len(wordings) >= 5
    prompts = [problem.prompt for problem in some(name, n=200)]
    for wording in wordings:
        begins, *_, ends = re.split(r"{\w+}", wording)
        form = re.compile(re.escape(begins) + ".*" + re.escape(ends), re.IGNORECASE | re.DOTALL)
        assert any(form.fullmatch(prompt) for prompt in prompts), wording


def test_arithmetic_is_worked_out_in_columns():
    for level in (1, 2, 3, 4):
        ops = Counter()
        for problem in some("arithmetic", level, 400):
            a, op, b = re.search(r"(\d+) ([-+*]) (\d+)", problem.prompt).groups()
            truth = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
            assert problem.answer == str(truth) and truth >= 0
            assert len(a) == level and len(b) <= level
            steps = sums(problem.solution)
            carried = len(re.findall("carry", problem.solution)) if op == "*" else 0  # a step of their own
            assert len(steps) == level + carried and all(calculate(left) == right for left, right in steps)
            if level > 1:
                lines = problem.solution.split(". ")
                below = " ".join(b.zfill(level)) if op != "*" else b
                assert lines[0] == f"{' '.join(a)} {op} {below}"
                assert lines[-1] == f"So {' '.join(problem.answer)}.\nAnswer: {problem.answer}"
            # What is carried is used in the next step, as its third number or, in a product, its second sum.
            carries = re.findall(r"(?:carry|borrow) (\d)", problem.solution)
            used = [left for left, _ in steps if left.count(" ") == 4 or (op == "*" and "+" in left)]
            assert carries == [left.split()[-1] for left in used], problem.solution
            ops[op] += 1
        assert set(ops) == set("+-*") and min(ops.values()) > 80


@pytest.mark.parametrize(
    "upper, op, lower, steps, digits",
    [
        ("47", "+", "38", "7 + 8 = 15, carry 1. 4 + 3 + 1 = 8", "85"),
        ("99", "+", "01", "9 + 1 = 10, carry 1. 9 + 0 + 1 = 10", "100"),
        ("52", "-", "08", "12 - 8 = 4, borrow 1. 5 - 0 - 1 = 4", "44"),
        ("500", "-", "499", "10 - 9 = 1, borrow 1. 10 - 9 - 1 = 0, borrow 1. 5 - 4 - 1 = 0", "001"),
        ("99", "*", "9", "9 * 9 = 81, carry 8. 9 * 9 = 81, 81 + 8 = 89", "891"),
        ("25", "*", "2", "5 * 2 = 10, carry 1. 2 * 2 = 4, 4 + 1 = 5", "50"),
    ],
)
def test_columns_by_hand(upper, op, lower, steps, digits):
    assert tasks.columns(upper, op, lower) == (steps.split(". "), digits)


def test_a_sum_has_one_key_whatever_comes_first():
    assert tasks.sum_key(47, "+", 38) == tasks.sum_key(38, "+", 47) == "38 + 47"
    assert tasks.sum_key(9, "*", 3) == "3 * 9"
    assert tasks.sum_key(9, "-", 3) == "9 - 3" and tasks.sum_key(9, "/", 3) == "9 / 3"


def test_the_numbers_of_a_level_reach_its_bounds():
    for level, low, high in ((1, 0, 9), (2, 10, 99)):
        found = [re.search(r"(\d+) [-+*] (\d+)", p.prompt).groups() for p in some("arithmetic", level, 3000)]
        assert (min(int(a) for a, _ in found), max(int(a) for a, _ in found)) == (low, high)
        assert (min(int(b) for _, b in found), max(int(b) for _, b in found)) == (0, high)
    for level, largest in ((1, 20), (2, 20), (3, 99), (4, 99)):
        drawn = some("word", level, 2000)
        given = {int(number) for p in drawn for number in re.findall(r"\d+", p.prompt)}
        results = {int(right) for p in drawn for _, right in sums(p.solution)}
        assert (min(given), max(given)) == (2, largest) and (min(results), max(results)) == (1, largest)
        assert 10 in given
    numbers = {number for p in some("countdown", 3, 300) for number in re.findall(r"\d+", p.answer)}
    assert {int(number) for number in numbers} == set(range(2, 13))
    dots = some("counting", 4, 1000) + some("counting", 4, 1000, split="test")
    assert {len(p.key) for p in dots} == set(range(3, 41))
    for level, digits, wholes in ((1, {1}, 10), (2, {1, 2}, 10), (3, {2, 3}, 10), (4, {1, 3}, 100)):
        pairs = [re.findall(r"(\d+)\.(\d+)", p.prompt) for p in some("decimals", level, 1500)]
        assert {len(after) for pair in pairs for _, after in pair} == digits
        assert {int(whole) for pair in pairs for whole, _ in pair} == set(range(wholes))


def test_the_results_of_steps_are_whole_and_bounded():
    assert tasks.whole(98, "+", 1) == 99 and tasks.whole(98, "+", 2) is None
    assert tasks.whole(5, "-", 4) == 1 and tasks.whole(5, "-", 5) is None
    assert tasks.whole(8, "/", 2) == 4 and tasks.whole(7, "/", 2) is None
    steps = ["A + b", "last * c", "first + last"]
    expected = ["10 + 2 = 12", "12 * 3 = 36", "12 + 36 = 48"]
    assert tasks.worked_out(steps, {"A": 10, "b": 2, "c": 3}, 48) == expected
    assert tasks.worked_out(steps, {"A": 10, "b": 2, "c": 3}, 47) is None


def test_word_problems_are_worked_out_step_by_step():
    for level in (1, 2, 3, 4):
        for problem in some("word", level, 300):
            steps = sums(problem.solution)
            assert len(steps) == level and all(calculate(left) == right for left, right in steps)
            assert steps[-1][1] == problem.answer and 0 < int(problem.answer) < 100
            asked, made = Counter(re.findall(r"\d+", problem.prompt)), []
            for left, right in steps:  # every number comes from the question, once, or from a step
                for number in re.findall(r"\d+", left):
                    assert number in asked + Counter(made)
                    if asked[number]:
                        asked[number] -= 1
                    else:
                        made.remove(number)
                made.append(right)
            assert not +asked, (problem, asked)  # and all of them are needed


def test_every_second_story_is_a_chain_whose_steps_name_their_events():
    more = {"finds", "buys", "gets"}
    for level in (1, 2, 3, 4):
        chains, signs = [p for p in some("word", level, 300) if p.solution.count(": ") > 1], Counter()
        assert 100 < len(chains) < 200
        for problem in chains:
            steps = problem.solution.split("\n")[0].removeprefix("So ").removesuffix(".").split(", then ")
            told = [step.partition(": ")[0] for step in steps]
            assert f"{', '.join(told[:-1])} and {told[-1]}" in problem.prompt and len(told) == level
            value = re.search(r"\d+", problem.prompt)[0]
            for event, step in zip(told, steps):
                number, sign = re.search(r"\d+", event)[0], "+" if event.split()[0] in more else "-"
                left, value = f"{value} {sign} {number}", calculate(f"{value} {sign} {number}")
                assert step == f"{event}: {left} = {value}"
                signs[sign] += 1
        assert min(signs["+"], signs["-"]) > 30


def test_the_examples_of_the_lecture_are_among_those_for_testing():
    emily = "Emily buys 3 apples and 2 oranges, each orange is $2, the total is $13: what does an apple cost?"
    row = next(row for row in texts("story") if "each {orange} is" in row["story"])
    assert row["steps"] == ["b * c", "D - last", "last / a"]
    words = tasks.KEY_WORDS | {"a": 3, "b": 2, "c": 2, "D": 13}
    facts, question = (row[key].format(**words) for key in ("story", "question"))
    assert tasks.WORDINGS["word"][0].format(facts=facts, question=question) == emily
    assert tasks.split_of("2 * 2 = 4, 13 - 4 = 9, 9 / 3 = 3") == "test"
    assert {"strawberry", "ubiquitous"} & {p.key for p in some("spelling", 3, 8000, "test")}
    ours = Problem("word", emily, "", "3", 3)
    assert ours.verify("So 2 * 2 = 4, then 13 - 4 = 9, then 9 / 3 = 3.\nAnswer: $3") == 1.0


def test_countdown_uses_what_is_given():
    for level in (1, 2, 3, 4):
        for problem in some("countdown", level, 200):
            numbers = re.findall(r"\d+", problem.prompt)
            target = problem.key.split(": ")[1]
            numbers.remove(target)
            assert (
                Counter(numbers) == Counter(re.findall(r"\d+", problem.answer)) and len(numbers) == level + 1
            )
            assert calculate(problem.answer) == target and target not in numbers
            assert len(sums(problem.solution)) == level
            assert level > 1 or re.fullmatch(r"\d+ [-+*/] \d+", problem.answer)
            assert all(calculate(left) == right for left, right in sums(problem.solution))


@pytest.mark.parametrize("name", ["counting", "spelling"])
def test_the_tool_gets_the_word_as_the_question_writes_it(name):
    for problem in some(name, n=600):
        call, output, _ = problem.solution
        assert [part["type"] for part in problem.solution] == ["calc", "output", "text"]
        assert calculate(call["text"]) == output["text"] == problem.answer
        word = problem.key
        quoted = f'"{word}"' in problem.prompt
        assert call["text"].startswith(f'"{word}"' if quoted else f'" {word}"')
        assert quoted or f" {word}" in problem.prompt
        if name == "counting" and word[0] != ".":
            letter = call["text"][-3]
            assert problem.answer == str(word.count(letter))
            assert letter in re.findall(r"\b\w\b", problem.prompt)
        elif name == "counting":
            assert problem.answer == str(len(word)) == str(max(map(len, re.findall(r"\.+", problem.prompt))))
        elif "reverse" in problem.prompt:
            assert problem.answer == word[::-1]
        else:
            ordinal = re.search(r"(\w+) letter", problem.prompt)[1]
            n = 1 + word_list("ordinals").index(ordinal)
            assert problem.answer == (word[::n] if "every" in problem.prompt else word[n - 1])


def test_a_palindrome_is_not_reversed(monkeypatch):
    monkeypatch.setattr(tasks, "draw_word", lambda rng, level: "level")
    drawn = some("spelling", n=60, split=tasks.split_of("level"))
    assert not any("reverse" in p.prompt for p in drawn)


def test_words_have_the_length_of_their_level():
    for level in (1, 2, 3, 4):
        sizes = {len(p.key) for p in some("spelling", level, 300)}
        assert sizes == {3 * level, 3 * level + 1, 3 * level + 2}
        assert all(re.fullmatch("[a-z]+", p.key) for p in some("spelling", level, 300))
    assert sum(map(len, tasks.words().values())) > 4000
    assert "strawberry" in tasks.words()[10] and "nbsp" not in tasks.words()[4]


def test_decimals_are_compared_right():
    for level in (1, 2, 3, 4):
        for problem in some("decimals", level, 300):
            a, b = re.findall(r"\d+\.\d+", problem.prompt)
            assert Fraction(a) != Fraction(b) and problem.answer == max(a, b, key=Fraction)
            more, less = map(int, re.search(r": (\d+) is more than (\d+)\.", problem.solution).groups())
            assert more > less
            padded = re.match(r"Take (\S+) and (\S+):", problem.solution).groups()
            assert [Fraction(x) for x in padded] == [Fraction(a), Fraction(b)]
            assert len({len(x.split(".")[1]) for x in padded}) == 1
            other = min(a, b, key=Fraction)
            assert problem.verify(f"Answer: {other}") == 0.0


def test_facts_have_their_split_and_their_answer():
    capitals = {p.key: p.answer for p in some("factbook", 1, 3000) + some("factbook", 1, 1500, "test")}
    assert capitals["France|capital"] == "Paris" and capitals["Germany|internet code"] == ".de"
    test = {f"{fact.country}|{fact.field}" for fact in facts("test")}
    assert {p.key for p in some("factbook", n=500, split="test")} <= test
    assert not {p.key for p in some("factbook", n=500)} & test


# ------------------------------------------------------------------------------------------------------------
# What is right, and what is not

NINE = Problem("word", "Emily has 3 apples and 2 oranges. How many pieces, at most 20?", "", "9", 1)
BIG = Problem("arithmetic", "Work out 617 * 2 step by step.", "", "1234", 3)
TENTH = Problem("decimals", "Which is larger, 9.11 or 9.9?", "", "9.9", 2)
HALF = Problem("decimals", "Which is larger, 0.45 or 0.5?", "", "0.5", 2)
LETTERS = Problem("spelling", "Write every third letter of ubiquitous.", "", "uqts", 3)
PARIS = Problem("factbook", "What is the capital of France?", "", "Paris", 1)
VALLEY = Problem("factbook", "What is the capital of Anguilla?", "", "The Valley", 1)
BOGOTA = Problem("factbook", "What is the capital of Colombia?", "", "Bogotá", 1)
PEOPLE = Problem("factbook", "What is the population of France?", "", "68,512,806", 3)
AREA = Problem("factbook", "What is the area of Libya?", "", "1,759,540 sq km", 3)
HUNDRED = Problem("factbook", "What is the life expectancy in France?", "", "100 years", 3)
POWER = Problem("countdown", "Make 9 from 3, 12 and 2.", "", "3 + (12 / 2)", 2)
TWO = Problem("countdown", "Make 32 from 3, 4 and 5.", "", "(3 + 5) * 4", 2)


RIGHT = [  # (problem, answers that are right)
    (NINE, ["9", "$9", "9.", "**9**", "9 ", " 9!", "9 apples", "9 dollars", "$9.00", "9 pieces."]),
    (NINE, ["09", "9.0", "`9`", "9 apple", "9$", "'9'", "$ 9"]),
    (BIG, ["1234", "1,234", "1,234.", "$1,234.00", "**1,234**"]),
    (TENTH, ["9.9", "9.90", "09.9", "9.9.", "**9.9**"]),
    (HALF, ["0.5", ".5", "0.50", ".50.", "00.5"]),
    (LETTERS, ["uqts", "UQTS", '"uqts"', "'uqts'.", "u q t s", "u-q-t-s", "**uqts**"]),
    (PARIS, ["Paris", "paris", "PARIS.", "**Paris**", '"Paris"', " Paris!"]),
    (VALLEY, ["The Valley", "the valley.", "Valley"]),
    (BOGOTA, ["Bogotá", "Bogota", "bogota."]),
    (PEOPLE, ["68,512,806", "68512806", "68,500,000", "68,512,806 people"]),
    (AREA, ["1,759,540 sq km", "1759540", "1,760,000 square km"]),
    (HUNDRED, ["99", "101", "101.0"]),  # right to 1 %
    (TWO, ["(3 + 5) * 4", "4*(5+3)", "(3 + 5) * 4 = 32", "(3+5)×4.", "**4 * (3 + 5)**"]),
]


@pytest.mark.parametrize("problem, answer", [(p, answer) for p, answers in RIGHT for answer in answers])
@pytest.mark.parametrize(
    "mark", ["Answer: {}", "So it is 7.\n**Answer:** {}", "answer : {}", "Final Answer:{}\nBye."]
)
def test_form_is_forgiven(problem, answer, mark):
    assert problem.verify(mark.format(answer)) == 1.0


LISTS = "1 or 2 or 9|9 or 3|3 4 9|9 3|3, 9|9, 3|9/3|9 and 3|9; 3|{9}|[3, 9]|1-9|1 to 9|3..9|9 or|9 (or 3)"
LISTS += "|9 three|nine|9 or three|9 apples or 3|9 3 apples|9,3|3,9|,9|9 or ten|not 9|any|=9|4 + 5|9 = 9|9\t3"
LISTS += "|9\x0b3|9\u20283|-9|--9|9e0|0x9|_9e|९|1,9|0,9|9%9|$|$$9|.|- 9|9 apples 3|9 oranges apples apples"
LISTS += "|answer 9|9 answer|Answer 9|between 3 and 9|9 pieces at"


@pytest.mark.parametrize("text", LISTS.split("|"))
def test_no_list_of_numbers_is_an_answer(text):
    assert NINE.verify(f"Answer: {text}") == 0.0
    assert NINE.verify(f"Answer: 9\nAnswer: {text}") == 0.0


HACKS = ["", "9", "Answer:", "Answer: 9\nAnswer:", "9\nAnswer:\n", "Answer: 9 Answer: 3", "The answer is 9"]
HACKS += ["Answer: 9\nNo.\nAnswer: 3", "Answer: 3 \n9", "Answers: 9", "Answer: " + "9" * 5000, "Answer 9"]
HACKS += ["Answer: " + " ".join(map(str, range(100))), "\n".join(f"{n}?" for n in range(20)) + "\nAnswer:"]
HACKS += ["Answer: 9 cents", "Answer: 9%", "Answer: $9 %", "Answer: 9 dozens", "Answer: 9 thousand"]
# Other values, two values, other numbers than 3, 4 and 5 or one of them twice, and other operators.
EXPRESSIONS = """32|4 * 8|32 = 32|3 + 5 * 4|5 * 4 + 3 * 4|2 ** 5|64 // 2|(3 + 5) * 4 or 4 * 8
(3 + 5) * 4, 4 * 8|(3 + 5) * 4 = 33|(3 + 5) * 4 = 32 = 32|(3 + 5) * 4 =|= 32|(3 + 5) * 4)|3, 4 and 5
(3 + 5) * 4 + 0|__import__('os')|35 - 3|3 5 - 3|9**9**9**9**9|error: not an expression|32 = (3 + 5) * 4
4 * len('12345678')|(03 + 05) * 04|1e1 * 3 + 2|(3 + 5) * 4 == 32|3 + 5|(3 + 5) * 4 * 4 / 4|4 ** 5 // 32"""
WRONG = [  # (problem, answers that are wrong, although they look right or contain what is)
    (BIG, ["12,34", "1 234 5", "1,2,3,4", "1 2 3 4"]),
    (TENTH, ["9.11 or 9.9", "9.9 > 9.11", "9.9, 9.11", "9,9", "9.9.9", "9 . 9"]),
    (LETTERS, ["ubiquitous", "uqts or uiuu", "uqts, ubi", "-", "letter"]),
    (PARIS, ["Paris or London", "London, Paris", "Paris, Rome", "Pari", "!", "the capital of France"]),
    (PARIS, ["London\nParis", "P or a or r or i or s"]),
    (PEOPLE, ["68,512,806 or 5", "70,000,000", "68", "many", "6, 8", "people"]),
    (AREA, ["1,759,540 or 2 sq km", "1,800,000 sq km", "sq km", "1 759 540"]),
    (HUNDRED, ["98.9", "101.1"]),
    (TWO, [*re.split(r"[|\n]", EXPRESSIONS), "(" * 900, "(3 + 5) * 4\nAnswer: 4 * 8"]),
    (POWER, ["3 ** 2", "3 + 12 // 2"]),
]


@pytest.mark.parametrize("problem, answer", [(p, answer) for p, answers in WRONG for answer in answers])
def test_attempted_hacks_score_nothing(problem, answer):
    assert problem.verify(f"Answer: {answer}") == 0.0


@pytest.mark.parametrize("text", HACKS)
def test_without_one_marked_answer_at_the_end_nothing_is_scored(text):
    assert NINE.verify(text) == 0.0 and TWO.verify("(3 + 5) * 4 = 32") == 0.0


@settings(max_examples=300)
@given(st.text())
def test_any_text_gets_a_verdict(text):
    for problem in (NINE, TENTH, LETTERS, PARIS, PEOPLE, TWO):
        assert problem.verify(text) in (0.0, 1.0)
        assert problem.verify(f"Answer: {text}\nAnswer: 3") == 0.0


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, 200), min_size=2, max_size=5),
    st.sampled_from([" ", ", ", " or ", "; ", "/", " and ", "|", " - "]),
)
def test_several_numbers_are_never_an_answer(numbers, between):
    listed = between.join(map(str, numbers))
    for n in set(numbers):
        problem = Problem("word", "How many apples or pears and plums?", "", str(n), 1)
        assert problem.verify(f"Answer: {listed}") == 0.0


@settings(max_examples=200)
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_a_number_is_right_however_it_is_written_and_no_other_is(n, other):
    problem = Problem("arithmetic", "", "", str(n), 1)
    for text in (f"{n}", f"{n:,}", f"${n:,}.", f"0{n}", f"{n}.0", f"**{n}**", f"{n} dollars"):
        assert problem.verify(f"Answer: {text}") == 1.0
        assert problem.verify(f"Answer: {text}\nAnswer: {other}") == float(n == other)
        assert Problem("arithmetic", "", "", str(other), 1).verify(f"Answer: {text}") == float(n == other)


def test_what_others_read_of_an_answer():
    assert tasks.marked("no") is None and tasks.marked("Answer: **$9.**\nBye") == "$9"
    assert tasks.numeric("9 apples", "3 apples") == tasks.numeric("$9.00") == 9
    assert tasks.numeric("9 apples", "3 pears") is None and tasks.numeric("") is None
    assert tasks.numeric("9" * 99) == int("9" * 99) and tasks.numeric("9" * 100) is None


def test_answer_first():
    first = Problem("word", "Add.", "So 3 + 4 = 7.\nAnswer: 7", "7").answer_first()
    assert first == Problem("word", "Add. Answer first.", "Answer: 7\nSo 3 + 4 = 7.", "7")
    parts = some("counting", 1, 1)[0]
    first = parts.answer_first().solution
    assert first[0]["type"] == "text" and first[0]["text"].startswith(f"Answer: {parts.answer}\nThat makes")
    assert first[1:] == parts.solution[:-1]
    spelt = some("spelling", 1, 1)[0]
    assert spelt.answer_first().solution[0] == {"type": "text", "text": f'Answer: "{spelt.answer}"'}


# ------------------------------------------------------------------------------------------------------------
# Other people's problems, and mistakes


def lines(n, start=0):
    """GSM8K's lines, of one to three steps."""
    result = []
    for i in range(start, start + n):
        steps = "\n".join(f"{i} + {k} = <<{i}+{k}={i + k}>>{i + k} eggs" for k in range(i % 3 + 1))
        result.append(json.dumps({"question": f"How many eggs, {i}?", "answer": f"{steps}\n#### {i:,}"}))
    return result


def test_gsm8k(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("\n".join(lines(100, 990)) + "\n\n", encoding="utf-8")
    test = list(problems(f"gsm8k:{path}", "test"))
    train = some(f"gsm8k:{path}", n=300)
    assert len(train) == 300  # more than there are: again and again
    assert 0 < len(test) < 50 and len({p.key for p in test} | {p.key for p in train}) == 100
    assert not {p.key for p in test} & {p.key for p in train}
    assert all(p.verify(p.solution) == 1.0 and "<<" not in p.solution for p in train + test)
    p = next(p for p in train if p.answer == "1000")
    assert p.solution == "1000 + 0 = 1000 eggs\n1000 + 1 = 1001 eggs\nAnswer: 1000" and p.level == 2
    assert p.verify("Answer: 1,000 eggs") == 1.0 and p.verify("Answer: 1001") == 0.0
    assert {p.level for p in problems(f"gsm8k:{path}", "test", level=3)} == {3}
    assert some(f"gsm8k:{path}", n=9, seed=1) != some(f"gsm8k:{path}", n=9, seed=2)


def test_gsm8k_with_its_own_split(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(lines(20)), encoding="utf-8")
    (tmp_path / "test.jsonl").write_text("\n".join(lines(10, 20)), encoding="utf-8")
    assert len({p.key for p in some(f"gsm8k:{tmp_path}", n=60)}) == 20
    assert {p.answer for p in problems(f"gsm8k:{tmp_path}", "test")} == {str(n) for n in range(20, 30)}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "7",
        '{"question": "a"}',
        '{"question": "", "answer": "b\\n#### 1"}',
        '{"question": "a", "answer": "1"}',
        '{"question": "a", "answer": "b\\n#### one"}',
        '{"question": 1, "answer": "b\\n#### 1"}',
        '{"question": "a", "answer": 3}',
        "",
    ],
)
def test_a_bad_line_of_gsm8k_is_named(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*lines(2), line, *lines(1)]), encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 3 "):
        problems(f"gsm8k:{path}")


def test_a_gsm8k_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    (tmp_path / "few").write_text(lines(1)[0], encoding="utf-8")
    for path, words in (("none", "No such file"), ("latin", "UTF-8"), ("few", "no problem for")):
        with pytest.raises(UserError, match=words):
            problems(f"gsm8k:{tmp_path / path}", level=9 if path == "few" else None)
    with pytest.raises(UserError, match=r"train\.jsonl"):
        problems(f"gsm8k:{tmp_path}")


def test_mistakes_are_told():
    for name, words in (("sums", "arithmetic, word, countdown"), ("gsm8k", "gsm8k:PATH"), ("", "_gym:NAME")):
        with pytest.raises(UserError, match=words):
            problems(name)
    with pytest.raises(UserError, match="no level 5; choose from 1, 2, 3, 4"):
        problems("word", level=5)


def test_without_reasoning_gym_its_tasks_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not there
    with pytest.raises(UserError, match="pip install reasoning-gym=="):
        problems("reasoning_gym:chain_sum")


def test_a_unit_of_the_question_is_forgiven():
    cents = tasks.Problem("gsm8k", "How many cents are left, and how many percent?", "", "9")
    assert cents.verify("Answer: 9 cents") == cents.verify("Answer: 9%") == 1.0
    dozens = tasks.Problem("gsm8k", "How many dozens?", "", "9")
    assert dozens.verify("Answer: 9 dozens") == 0.0  # it may be 108


@pytest.mark.parametrize("task", ["arithmetic", "word"])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_no_answer_is_right_often(task, level):
    """Whoever always says the same is right less often than every sixth time, of long problems every 20th."""
    answers = Counter(p.answer for p in some(task, level=level, n=2000))
    assert answers.most_common(1)[0][1] / 2000 < (1 / 6 if level <= 2 else 1 / 20)


def test_a_score_of_the_gym_is_full_or_nothing():
    class Dataset:
        """Gives every answer the same score."""

        def __init__(self, score):
            self.score = score

        def score_answer(self, answer, entry):
            return 1 / self.score if answer == "divide" else self.score

    full, most = Dataset(1.0), Dataset(0.99)
    entry = {"answer": "a"}
    assert tasks.gym_score(full, entry, "a" * 1000) and not tasks.gym_score(full, entry, "a" * 1001)
    assert not tasks.gym_score(most, entry, "a") and not tasks.gym_score(Dataset(0), entry, "divide")
    assert not tasks.gym_score(full, entry, "__a") and not tasks.gym_score(full, entry, "a or b")
    assert tasks.gym_score(full, {"answer": "a or b"}, "a or b")


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError, match="no levels"):
        problems("reasoning_gym:chain_sum", level=2)
    for name in ("chain_sum", "knights_knaves", "spell_backward"):
        train, test = some(f"reasoning_gym:{name}", n=60), some(f"reasoning_gym:{name}", n=20, split="test")
        assert not {p.prompt for p in train} & {p.prompt for p in test}
        for p in train + test:
            assert p.task == f"reasoning_gym:{name}" and p.verify(p.solution) == 1.0
            for text in (f"Answer: {p.answer} or 1 or 2", p.prompt, "Answer: ?"):
                assert p.verify(text) == 0.0
    with pytest.raises(UserError, match="not registered"):
        problems("reasoning_gym:nothing_such")


def test_the_pin_in_the_message_is_that_of_the_tests():
    source = Path(tasks.__file__)
    (pin,) = set(re.findall(r"reasoning-gym==[\d.]+", source.read_text(encoding="utf-8")))
    assert pin in (source.parents[1] / "requirements-gym.txt").read_text(encoding="utf-8")


def test_the_command_line():
    done = script.run(tasks.main, "word", "--level", 2, "--num", 3, "--split", "test")
    assert done.status == 0 and done.out.count("Answer: ") == 3 and len(re.findall(" = ", done.out)) == 6
    first = script.run(tasks.main, "word", "--level", 2, "--num", 3, "--split", "test", "--answer-first")
    assert re.search(r"Answer: \d+\nSo ", first.out) and first.out != done.out
    assert '.count("' in script.run(tasks.main, "counting").out
    assert all(name in script.run(tasks.main).out for name in tasks.TASKS)
    assert script.refused(script.run(tasks.main, "sums"), "sums", "arithmetic")
    assert script.refused(script.run(tasks.main, "word", "--level", 9), "level 9")
    assert script.refused(script.run(tasks.main, "word", "--num", 0), "--num")


@pytest.mark.parametrize(
    "text, right",
    [
        ("Answer:\n9", 1),
        ("So it is 9.\n#### 9", 1),
        ("It is \\boxed{9}.", 1),
        ("It is \\boxed{9} and not \\boxed{8}.", 0),
        ("Answer: 8 #### 9", 0),  # a mark of GSM8K's begins a line
        ("\\boxed{9", 0),
        ("Answer:\n\n", 0),
    ],
)
def test_an_answer_may_be_marked_as_others_mark_it(text, right):
    assert tasks.Problem("word", "How many?", "", "9").verify(text) == right


def test_a_minus_of_typesetters_is_a_minus():
    problem = tasks.Problem("arithmetic", "What is 2 - 5?", "", "-3")
    assert problem.verify("Answer: \u22123") == 1 and problem.verify("Answer: 3") == 0
