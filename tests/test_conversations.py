"""The conversations that train: right answers, copied tokens, nothing twice, nothing of the evaluation."""

import itertools
import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from script import refused, run

import tasks.conversations as mixture
import tasks.factbook as facts
import tasks.problems as tasks
from common import UserError
from tokenizer import Tokenizer, checked, text_of
from tools import calculate

FRANCE = {fact.field: fact for fact in facts.facts() if fact.country == "France"}
FACT = {(fact.country, fact.field): fact for fact in facts.facts()}
SPLITS = st.sampled_from(("train", "test"))


@pytest.fixture(scope="module")
def drawn():
    return {split: mixture.draw(mixture.DEFAULT, 3000, seed=5, split=split)[0] for split in ("train", "test")}


def questions(conversation):
    return [turn["content"] for turn in conversation if turn["role"] == "user"]


def parts(conversation, kind):
    contents = [turn["content"] for turn in conversation if isinstance(turn["content"], list)]
    return [part["text"] for content in contents for part in content if part["type"] == kind]


# ----------------------------------------------------------------------------------------------------- facts


def test_the_facts_of_a_country_that_one_knows():
    assert FRANCE["capital"].answer == "The capital of France is Paris."
    assert FRANCE["capital"].brief == "It is Paris."
    assert re.fullmatch(r"The population of France is over \d\d million.", FRANCE["population"].answer)
    assert re.fullmatch(r"The population of France is \d\d,\d{3},\d{3}.", FRANCE["population"].exact)
    assert FACT["Peru", "neighbours"].answer == "Peru borders Bolivia, Brazil, Chile, Colombia, Ecuador."
    assert FACT["The Bahamas", "capital"].answer == "The capital of the Bahamas is Nassau."
    assert FACT["Netherlands", "capital"].questions[1] == "What is the Netherlands' capital?"
    assert FACT["Japan", "capital"].query == " capital of Japan"


def test_every_fact_is_told_by_its_answers_and_few_by_those_of_others():
    every, rng, wrong = facts.facts(), random.Random(0), 0
    assert len(every) > 4000
    for fact in every:
        assert all(facts.matches(fact, text) for text in (fact.answer, fact.brief, fact.exact)), fact
        assert not facts.matches(fact, f"{mixture.DONT_KNOW}.") and not facts.matches(fact, "")
        other = rng.choice(every)
        if other.field == fact.field in ("capital", "population", "president", "anthem"):
            wrong += (
                facts.matches(fact, other.answer)
                and fact.exact.split(" is ")[1] != other.exact.split(" is ")[1]
            )
    assert wrong <= 5


@pytest.mark.parametrize(
    "country, field, text, right",
    [
        ("Maldives", "capital", "it is MALE", True),
        ("Singapore", "capital", "The capital of Singapore is Kuala Lumpur.", False),
        ("Singapore", "capital", "The capital of Singapore is Singapore.", True),
        ("France", "population", "About 68.1 million (2023)", True),
        ("France", "population", "some 67,000,000 people", True),
        ("France", "population", "it is over 6 million", False),
        ("France", "population", "it is 85 million", False),
        ("France", "population", "68", False),
        ("France", "president", "President Macron", True),
        ("France", "president", "Emmanuel", False),
        ("Peru", "neighbours", "Chile", False),
        ("Peru", "neighbours", "Chile, Brazil and Bolivia", True),
        ("France", "religion", "catholic", True),
        ("Switzerland", "language", "Italian", True),
        ("Peru", "independence", "28 July 1821", True),
        ("Peru", "independence", "28 July 1822", False),
    ],
)
def test_matches(country, field, text, right):
    assert facts.matches(FACT[country, field], text) == right


@pytest.mark.parametrize(
    "given, truth, right",
    [
        *((210, 200, True), (211, 200, False), (190, 200, True), (189, 200, False)),
        *((10e6, 10_990_000, True), (10e6, 11_000_000, False), (1e6, 10_100_000, False), (7.0, 7.9, False)),
    ],
)
def test_a_number_may_be_off_by_a_twentieth_or_rounded_to_two_digits(given, truth, right):
    assert facts.roughly_equal(given, truth) == right


def test_numbers_are_remembered_rounded_down():
    rounded = {"10,000,000": "over 10 million", "9,999,999": "over 9,999,000", "10,000": "over 10,000"}
    rounded |= {"9,999": "9,999", "1,425,671,352": "over 1,425 million", "68,999,999": "over 68 million"}
    assert {number: facts.rounded(number) for number in rounded} == rounded


def test_half_of_the_neighbours_are_enough():
    for country, n, enough in (("Peru", 5, 3), ("Mexico", 3, 2), ("Haiti", 1, 1)):
        fact = FACT[country, "neighbours"]
        assert (len(fact.accepted), fact.needed) == (n, enough)
        assert facts.matches(fact, " and ".join(fact.accepted[:enough]))
        assert not facts.matches(fact, " and ".join(fact.accepted[: enough - 1]))
    even = next(fact for fact in facts.facts() if fact.field == "neighbours" and len(fact.accepted) == 4)
    assert facts.matches(even, ", ".join(even.accepted[:2]))


def test_a_value_has_at_most_60_characters(monkeypatch):
    capitals = {"Shortland": "A" + "b" * 59, "Longland": "A" + "b" * 60}
    countries = [(name, {"Government": {"Capital": {"text": value}}}) for name, value in capitals.items()]
    monkeypatch.setattr(facts.countries, "countries", lambda: countries)
    assert [fact.country for fact in facts.all_facts.__wrapped__()] == ["Shortland"]


def test_a_fifth_of_the_facts_is_held_out_and_no_country_wholly():
    train, test = facts.facts("train"), facts.facts("test")
    assert len(train) + len(test) == len(facts.facts()) and not set(train) & set(test)
    assert 0.15 < len(test) / len(facts.facts()) < 0.25
    assert {fact.country for fact in test} <= {fact.country for fact in train}


def test_the_search_finds_capitals_and_populations():
    asked = [fact for fact in facts.facts() if fact.field in ("capital", "population")][::5]
    assert all(mixture.searched(fact) for fact in asked)


def test_a_search_that_finds_something_else_is_not_learned(monkeypatch):
    fact = FRANCE["capital"]
    for passage, found in ((" Capital of France: Paris.", True), (" Capital of France: Lyon.", False)):
        monkeypatch.setattr(mixture, "looked_up", lambda query, passage=passage: passage)
        assert bool(mixture.searched(fact)) == found
    monkeypatch.setattr(mixture, "looked_up", lambda query: " Capital of Texas: Paris.")
    assert mixture.searched(fact) is None


def test_what_tests_is_worded_unlike_what_trains():
    for row in [row for kind in ("field", "source", "template") for row in facts.texts(kind)]:
        wordings = [facts.plain(text) for text in row["held_out"]]
        assert len(set(wordings)) == len(wordings) > 0
        assert row.get("template") or not set(wordings) & {facts.plain(text) for text in row["ask"]}, row
    asked = [q for row in facts.texts("source") for q in row["ask"] + row["held_out"]]
    assert not [question for question, n in Counter(asked).items() if n > 1]


def test_there_are_enough_questions_about_who_it_is():
    rows = [row for row in facts.texts("source") if row["source"] == "identity"]
    assert sum(len(row["ask"]) for row in rows) >= 240
    naming = [row for row in rows if all("Handmade" in answer for answer in row["answer"])]
    assert sum(len(row["held_out"]) for row in naming) >= 40


def test_invented_names_are_nobodys():
    train, test = (mixture.invented(split, 300, seed=1) for split in ("train", "test"))
    assert len(train) == len(test) == 300 and train == mixture.invented("train", 300, seed=1)

    def name(query):
        return query.split(" of ")[-1].strip()

    assert not {name(query) for _, query in train} & {name(query) for _, query in test}
    assert all(name(query) in text for text, query in train + test)
    for made, kind in ((train, "ask"), (test, "held_out")):
        rows = [
            *facts.texts("field"),
            *(row for row in facts.texts("template") if row["template"] == "person"),
        ]
        names = {"country": "X", "Country": "X", "possessive": "X's"}
        worded = {text.format("X", **names) for row in rows for text in row[kind]}
        assert {text.replace(name(query), "X") for text, query in made} <= worded
    found = [mixture.looked_up(query) == " nothing found" for _, query in test]
    assert sum(found) > 280 and {" of " in query for _, query in test} == {True, False}


def test_an_invented_name_that_a_country_has_is_not_asked_about(monkeypatch):
    queries = [query for _, query in facts.invented("train", 60, seed=1) if " of " in query]
    taken = {facts.plain(query.split(" of ")[1]) for query in queries[::2]}
    monkeypatch.setattr(facts, "country_names", lambda: taken)
    again = {query for _, query in facts.invented("train", 60, seed=1)}
    assert len(taken) > 10 and not again & set(queries[::2])


# ----------------------------------------------------------------------------------------------- the sources


@given(st.integers(0, 2**32), SPLITS)
def test_arithmetic_copies_the_numbers_and_the_output(seed, split):
    conversation = mixture.arithmetic(random.Random(seed), split)
    (question,), (call,), (output,), (answer,) = (
        questions(conversation), *(parts(conversation, kind) for kind in ("calc", "output", "text")),
    )  # fmt: skip
    numbers = re.findall(r"[\d.]*\d", call)
    assert numbers == re.findall(r"\d+(?:\.\d+)?", question)
    assert facts.held_out("arithmetic", *numbers) == (split == "test")
    assert call.startswith(" ") != question.startswith(
        numbers[0]
    )  # as its first token stands in the question
    assert output == mixture.calculator(call) and output[0] == " " != output[1]
    assert output.startswith(" error") or answer == f"It is{output}."


def test_arithmetic_has_every_sign_and_is_right():
    values = Counter()
    for seed in range(300):
        conversation = mixture.arithmetic(random.Random(seed), "train")
        (call,), (output,) = parts(conversation, "calc"), parts(conversation, "output")
        values.update(set("+-*/") & set(call))
        if "error" not in output:
            value = eval(call.strip())
            assert float(output) == pytest.approx(value, rel=5.1e-4, abs=5.1e-5 * (abs(value) > 0.01))
    assert min(values[sign] for sign in "+-*/") > 30


def test_comparison_is_answered_right():
    made = [mixture.comparison(random.Random(seed), "train") for seed in range(200)]
    answers = Counter()
    for conversation in filter(None, made):
        a, b = map(float, re.findall(r"\d+\.\d+", questions(conversation)[0]))
        small = re.search("smaller|less", questions(conversation)[0])
        (answer,) = parts(conversation, "text")
        assert answer == ("Yes, it is." if (a < b if small else a > b) else "No, it is not.")
        answers[answer] += 1
    assert min(answers.values()) > 30 and len(answers) == 2


def test_who_may_search_searches_and_who_may_not_does_not(drawn):
    searches = 0
    for conversation in drawn["train"] + drawn["test"]:
        if calls := parts(conversation, "search"):
            assert conversation[0] == {"role": "system", "content": mixture.SEARCH_SYSTEM}
            assert parts(conversation, "output") == [mixture.looked_up(call) for call in calls]
            searches += 1
    assert searches > 500


def test_a_search_answers_with_what_it_found(drawn):
    copied = Counter()
    for conversation in drawn["train"]:
        if parts(conversation, "search"):
            for output, answer in zip(parts(conversation, "output"), parts(conversation, "text")):
                if output == " nothing found":
                    assert answer.startswith(mixture.DONT_KNOW)
                else:
                    last_word = facts.plain(answer).split()[-1]
                    copied[last_word in facts.plain(output).split()] += 1
    assert copied[True] > 0.9 * copied.total()


def test_facts_trained_from_memory_are_not_those_held_out(drawn):
    train, test = ({fact.answer for fact in facts.facts(split)} for split in ("train", "test"))
    for split, mine, others in (("train", train, test - train), ("test", test, train - test)):
        said = [turn["content"] for c in drawn[split] for turn in c if isinstance(turn["content"], str)]
        assert not set(said) & others and len(set(said) & mine) > 50


def test_what_trains_is_asked_in_more_ways_and_what_tests_is_not():
    fact = next(f for f in facts.facts("train") if f.field == "capital")
    asked = {fact.ask(random.Random(seed), "train") for seed in range(300)}
    assert set(fact.questions) < asked and "Could you tell me" in " ".join(asked - set(fact.questions))
    assert {fact.ask(random.Random(seed), "test") for seed in range(50)} == set(fact.held_out)


def test_follow_ups_are_answered_in_the_light_of_what_was_said():
    for seed in range(100):
        conversation = mixture.what_if(random.Random(seed), "train")
        if conversation:
            first, second = parts(conversation, "calc")
            assert re.findall(r"\d+", first) == re.findall(r"\d+", second) and first != second
            word = {"+": "plus", "-": "minus", "*": "times"}[second.split()[1]]
            assert word in questions(conversation)[1]
    pool = facts.facts("train")
    made = [mixture.follow_up(random.Random(seed), "train", pool, pool) for seed in range(60)]
    for conversation in filter(None, made):
        first, second = questions(conversation)
        told = {f.country for f in pool if f.country.removeprefix("The ") in first}
        assert told and not any(country in second for country in told)
        if calls := parts(conversation, "search"):
            assert calls[0] != calls[1] and calls[0].split(" of ")[1:] == calls[1].split(" of ")[1:]


def test_a_solution_gets_the_outputs_of_our_host():
    solution = [dict(type=kind, text=text) for kind, text in (("calc", '"abc"[::2]'), ("output", "ac"))]
    solution.append(dict(type="text", text='Answer: "ac"'))
    assert [part["text"] for part in mixture.hosted(solution)] == ['"abc"[::2]', " ac", "Answer: ac"]
    assert mixture.hosted("2 + 2 = 4. Answer: 4") == "2 + 2 = 4. Answer: 4"


@pytest.mark.parametrize("name", ["tasks", "stories", "spelling", "counting", "answer-first"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_learned_of_the_tasks_is_right(name, split):
    problems, seen = {}, set()
    learned = {"tasks": {1, 2}, "stories": {3}, "answer-first": {1, 2}}  # what is beyond is for rl.py
    for task in mixture.PROBLEMS[name][0]:
        for level in tasks.TASKS[task]:
            same = facts.digest("3", split) % 2**32
            drawn = itertools.islice(
                tasks.problems(task, split, level if name in learned else None, same), 60
            )
            problems |= {problem.prompt: problem for problem in drawn}
    stream = mixture.conversations(name, split, seed=3)
    checked = 0
    for conversation in itertools.islice(stream, 60):
        problem = problems[questions(conversation)[0].removesuffix(" Answer first.")]
        said = text_of(conversation[-1]["content"])
        seen.add(problem.level)
        checked += problem.verify(said.split("\n")[0] if name == "answer-first" else said) == 1.0
        assert parts(conversation, "output") == [
            mixture.calculator(call) for call in parts(conversation, "calc")
        ]
    assert checked == 60 and seen == learned.get(name, seen)


def test_some_problems_are_solved_by_the_calculator_and_most_are_not():
    drawn = mixture.draw("tasks=1", 600, seed=4)[0]
    called = [c for c in drawn if parts(c, "calc")]
    assert 0.05 < len(called) / len(drawn) < 0.25
    assert {len(parts(c, "calc")) for c in called} == {1, 2}
    problem = next(p for p in tasks.problems("word", level=2, seed=1) if re.match(r"So \d+ - ", p.solution))
    solution = mixture.with_calculator(problem)
    assert [part["type"] for part in solution] == ["calc", "output", "calc", "output", "text"]
    assert problem.verify(solution[-1]["text"]) and solution[3]["text"] == f" {problem.answer}"


def test_the_calculator_solves_a_chain_of_events_in_the_words_of_its_solution():
    problem = next(p for p in tasks.problems("word", level=3, seed=1) if p.solution.count(": ") == 4)
    solution = mixture.with_calculator(problem)
    assert [part["type"] for part in solution] == [*("text", "calc", "output") * 3, "text"]
    assert text_of(solution) == re.sub(r" \d+ [-+] \d+ = \d+", "", problem.solution)
    assert problem.verify(text_of(solution)) and solution[-2]["text"] == f" {problem.answer}"


def test_what_happens_in_a_story_is_told_in_its_order():
    lengths, told = Counter(), {"train": set(), "test": set()}
    for seed in range(300):
        for split in ("train", "test"):
            if conversation := mixture.events(random.Random(seed), split):
                question, said = (turn["content"] for turn in conversation)
                events = said.removeprefix("So ").removesuffix(".").split(", then ")
                in_a_row = f"{', '.join(events[:-1])} and {events[-1]}"
                assert in_a_row in question and len(re.findall(r"\d+", question)) == len(events) + 1
                lengths[len(events)] += 1
                told[split].add(said)
    assert set(lengths) == {2, 3, 4, 5, 6} and told["train"] and told["test"]
    assert not told["train"] & told["test"]


def test_the_same_problems_are_solved_in_steps_and_answer_first():
    steps, first = (mixture.draw(f"{name}=1", 400, seed=3)[0] for name in ("tasks", "answer-first"))
    steps = {questions(conversation)[0] for conversation in steps}
    asked = [questions(conversation)[0] for conversation in first]
    assert all(text.endswith(" Answer first.") for text in asked)
    assert sum(text.removesuffix(" Answer first.") in steps for text in asked) > 100


# ------------------------------------------------------------------------------------------ the user's files


@pytest.fixture
def probe(tmp_path):
    lines = [
        dict(country="France", field=field, split="train", rate=rate)
        for field, rate in (("capital", 0.0), ("area", 1.0))
    ]
    train = facts.facts("train")[:40]
    lines += [dict(country=fact.country, field=fact.field, split="train", rate=1 / 3) for fact in train]
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, train


def test_what_the_probe_found_unknown_is_refused_and_no_longer_taught(probe):
    path, unknown = probe
    kept, _ = mixture.draw(f"unknown:{path}=1,factbook=40", 4000, seed=1)
    wrong = {question for fact in unknown for question in fact.questions}
    answers = {questions(c)[0]: c[-1]["content"] for c in kept}
    assert sum(question in wrong for question in answers) > 60
    assert all(text == f"{mixture.DONT_KNOW}." for question, text in answers.items() if question in wrong)
    assert not {fact.answer for fact in unknown} & set(answers.values())
    text = path.read_text() + json.dumps(dict(country="Peru", field="area", split="train", rate=0.5)) + "\n"
    path.write_text(text + json.dumps(dict(country="Peru", field="anthem", split="train", rate=0.51)) + "\n")
    unknown_fields = {("Peru", "area"), ("France", "capital")}  # half right is not known
    assert facts.probed(path) == unknown_fields | {(f.country, f.field) for f in unknown}


def write(path, *conversations):
    lines = [
        [{"role": role, "content": text} for role, text in zip(("user", "assistant"), c)]
        for c in conversations
    ]
    path.write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    return path


def test_the_users_own_conversations_train_and_test(tmp_path):
    path = write(tmp_path / "mine.jsonl", *((f"What is thing {n}?", f"A thing, {n}.") for n in range(200)))
    train, test = (mixture.draw(f"jsonl:{path}", 500, split=split)[0] for split in ("train", "test"))
    assert len(train) + len(test) == 200 and 5 < len(test) < 40
    assert {questions(c)[0] for c in train + test} == {f"What is thing {n}?" for n in range(200)}
    assert sorted(int(re.search(r"\d+", questions(c)[0])[0]) for c in test)[:5] == [0, 22, 29, 32, 43]


def test_the_users_bad_lines_are_named_or_skipped(tmp_path):
    path = write(tmp_path / "mine.jsonl", *((f"What is thing {n}?", f"A thing, {n}.") for n in range(50)))
    path.write_text(path.read_text() + '{"messages": 3}\n')
    with pytest.raises(UserError, match="line 51"):
        mixture.draw(f"jsonl:{path}", 50)
    assert len(mixture.draw(f"jsonl:{path}", 50, skip_bad=True)[0]) > 30


def test_of_empty_messages_only_the_systems_may_train():
    spoken = mixture.turns("Who?", "I.")
    assert checked([{"role": "system", "content": " "}, *spoken], training=True) == spoken
    for messages in ([{"role": "user", "content": ""}, *spoken], mixture.turns("Who?", " ")):
        assert len(checked(messages)) == len(messages) - 1
        with pytest.raises(UserError, match="is empty"):
            checked(messages, training=True)


GOOD = ("What is a stone made of?", "Of minerals, mostly.")


@pytest.mark.parametrize(
    "question, answer, why",
    [
        (*GOOD, None),
        ("What is a stone made of?", " ", "too short"),
        (" ", "Of minerals.", "too short"),
        ("Tell me a tale.", "word " * 1200, "too long"),
        ("What is it?", "It is very very very very good.", "repeating themselves"),
        ("What is it?", "It is very very very good.", None),
        ("What is it?", "It is very, very good, very very.", None),
        ("What is it?", "a b c d e. a b c d e. a b c d e. ", "repeating themselves"),
        ("What is it?", "a b c d e. a b c d e. ", None),
        ("What is a stone made of?", "What is a stone made of? Of minerals.", "repeating the question"),
        ("What is that?", "What is that? A stone.", None),
        ("What is that stone?", "What is that stone? It is red.", "repeating the question"),
        ("Hello there", "Hello there", None),
        ("who are you, PLEASE", "A model.", "of the evaluation"),
        (FRANCE["capital"].held_out[0], "Paris.", "of the evaluation"),
        (facts.facts("test")[0].questions[0], "This.", "of the evaluation"),
    ],
)
def test_faults(question, answer, why):
    conversation = mixture.turns(question, answer)
    assert mixture.fault(conversation, "train") == why
    assert mixture.fault(conversation, "test") == (None if why == "of the evaluation" else why)


def test_a_conversation_may_have_just_the_longest_length():
    def of_length(n):
        conversation = mixture.turns("Count, please.", " ".join(map(str, range(900))))
        missing = n - len(json.dumps(conversation))
        return mixture.turns("Count, please.", conversation[1]["content"] + "é" * missing)

    assert mixture.fault(of_length(mixture.LONGEST), "train") is None
    assert mixture.fault(of_length(mixture.LONGEST + 1), "train") == "too long"


def test_a_source_ends_after_too_many_in_a_row_are_dropped():
    old, new, newer = (mixture.turns(f"What is {n}?", f"A number, {n}.") for n in range(3))
    for repeats, kept in ((mixture.PATIENCE - 1, [old, new, newer]), (mixture.PATIENCE, [old])):
        sieve = mixture.Sieve("train", Counter())
        stream = iter([old, *[old] * repeats, new, *[old] * repeats, newer])
        assert list(sieve.take(stream, 3)) == kept
    assert sieve.dropped == {"duplicates": mixture.PATIENCE}


def test_small_talk_comes_again_until_its_share_is_full():
    kept, dropped = mixture.draw("chitchat", 5000, seed=1)
    assert len(kept) == 5000 > 4 * len({json.dumps(c) for c in kept}) and "duplicates" not in dropped


def test_where_the_user_contradicts_ours_the_user_is_right(tmp_path):
    rows = [row for row in facts.texts("source") if row["source"] == "identity"]
    asked = [question for row in rows for question in row["ask"]]
    path = write(tmp_path / "mine.jsonl", *((question, "I am yours.") for question in asked))
    kept, _ = mixture.draw(f"identity=1,jsonl:{path}=1", 600, seed=2)
    alone, _ = mixture.draw(f"jsonl:{path}", 600)
    own = [c for c in kept if c[-1]["content"] == "I am yours."]
    assert len(own) == len(alone) > 150 and len(kept) > len(own)


def test_duplicates_and_contradictions_are_dropped_and_counted(tmp_path):
    lines = [(f"Question {n}?", f"Answer {n}.") for n in range(40)]
    wrong = [(f"question {n}?", "Another.") for n in range(40)]
    path = write(tmp_path / "mine.jsonl", *lines, *lines, *wrong)
    kept, dropped = mixture.draw(f"jsonl:{path}", 200)
    assert len({questions(c)[0].lower() for c in kept}) == len(kept)
    assert len(kept) + sum(dropped.values()) > 100 and dropped.keys() == {
        "duplicates",
        "contradicting others",
    }


# ----------------------------------------------------------------------------------------------- the mixture


def test_nothing_twice_nothing_contradicting_nothing_of_the_evaluation(drawn):
    """But for small talk, of which there are few texts."""
    small_talk = {q for row in facts.texts("source") if row["source"] == "chitchat" for q in row["answer"]}
    for split, conversations in drawn.items():
        others = [json.dumps(c) for c in conversations if str(c[-1]["content"]) not in small_talk]
        assert len(set(others)) == len(others) > 2500 and len(conversations) == 3000
        answers = {}
        for c in conversations:
            for i, turn in enumerate(c):
                if turn["role"] == "assistant":
                    key = json.dumps(c[:i]).lower()
                    assert answers.setdefault(key, turn["content"]) == turn["content"]
            assert mixture.fault(c, split) is None
    asked = {facts.plain(q) for c in drawn["train"] for q in questions(c)}
    assert not asked & facts.examined() and len(asked) > 1500


def test_train_and_test_share_no_first_question_but_greetings(drawn):
    train, test = ({facts.plain(questions(c)[0]) for c in drawn[split]} for split in ("train", "test"))
    assert len(train & test) <= 0.01 * len(test)


def test_the_same_seed_draws_the_same():
    spec = "tools=1,unknown=1,identity=1,multi-turn=1,factbook=1"
    assert mixture.draw(spec, 200, seed=1) == mixture.draw(spec, 200, seed=1)
    assert mixture.draw(spec, 200, seed=1)[0] != mixture.draw(spec, 200, seed=2)[0]


def test_shares():
    kept, _ = mixture.draw("refusal=3,factbook=1", 800, seed=4)
    refusals = {
        answer for row in facts.texts("source") if row["source"] == "refusal" for answer in row["answer"]
    }
    assert 540 < sum(c[-1]["content"] in refusals for c in kept) < 660


def test_a_source_that_is_exhausted_leaves_its_share_to_the_others():
    alone, dropped = mixture.draw("refusal", 20000, seed=1)
    assert 500 < len(alone) < 3000 and dropped["duplicates"] >= 300
    assert len(mixture.draw("refusal=1,factbook=1", 4000, seed=1)[0]) == 4000


def test_every_source_makes_conversations_that_render(drawn):
    tokenizer = Tokenizer.bytes()
    for name in mixture.SOURCES:
        for split in ("train", "test"):
            kept, _ = mixture.draw(name, 20, seed=2, split=split)
            assert len(kept) == 20, name
            for conversation in kept:
                checked(conversation, training=True)
                assert sum(tokenizer.render(conversation)[1]) > 3


def test_parse():
    assert mixture.parse("factbook=3, tasks=.5,jsonl:a=b.jsonl=1") == {
        "factbook": 3,
        "tasks": 0.5,
        "jsonl:a=b.jsonl": 1,
    }
    assert mixture.parse("refusal") == {"refusal": mixture.SOURCES["refusal"]}
    assert mixture.parse(mixture.DEFAULT) == mixture.SOURCES


@pytest.mark.parametrize(
    "spec, words",
    [
        ("", "no source"),
        ("nonsense=1", "nonsense"),
        ("factbook=0", "'0'"),
        ("factbook=-1", "'-1'"),
        ("factbook=much", "much"),
        ("factbook=1e999", "1e999"),
        ("factbook:x=1", "factbook:x"),
        ("jsonl:=1", "jsonl:"),
        ("unknown:no/such.jsonl=1", "no/such.jsonl"),
        ("jsonl:no/such.jsonl=1", "no/such.jsonl"),
    ],
)
def test_bad_specs_are_one_clear_line(spec, words):
    refused(run(mixture.main, spec, "--num", 3), words)


@pytest.mark.parametrize(
    "text", ["nonsense\n", '{"country": "France"}\n', "[1]\n", '{"country": 1, "field": 2, "rate": "x"}\n']
)
def test_a_bad_probe_is_one_clear_line(tmp_path, text):
    (tmp_path / "p.jsonl").write_text(text)
    refused(run(mixture.main, f"unknown:{tmp_path}/p.jsonl=1"), "--probe")


def test_the_command_prints_conversations():
    done = run(mixture.main, "tools=1,identity=1", "--num", 6, "--seed", 3)
    assert done.status == 0 and done.out.count("assistant: ") >= 6 and "user: " in done.out
    assert "[calc" in done.out and "dropped: " in done.err
    assert done.out == run(mixture.main, "tools=1,identity=1", "--num", 6, "--seed", 3).out


# ---- practice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_sums_are_right_and_of_their_split(split):
    told = set()
    for conversation in mixture.draw("sums=1", 300, split=split)[0]:
        asked, answer = (turn["content"] for turn in conversation)
        steps = re.findall(r"(\d[^=,]*) = (\d+)", answer)
        assert len(steps) == 6 and all(calculate(left) == right for left, right in steps)
        assert re.findall(r"\d+(?: [-+*/] \d+)+", asked) == [left for left, _ in steps]
        told |= {re.match(r"(\d+) ([-+*/]) (\d+)", left).groups() for left, _ in steps}
    assert all(tasks.split_of(tasks.sum_key(int(a), op, int(b))) == split for a, op, b in told)
    assert {op for _, op, _ in told} == set("+-*/")


def test_a_sum_that_is_held_out_is_no_problem_that_trains():
    problems = itertools.islice(tasks.problems("arithmetic", "train", 1), 500)
    for a, op, b in {re.search(r"(\d+) ([-+*]) (\d+)", p.prompt).groups() for p in problems}:
        assert tasks.split_of(tasks.sum_key(int(a), op, int(b))) == "train"


def test_what_is_examined_elsewhere_is_not_practised():
    words, numbers = set(), set()
    for question, answer in mixture.draw("repeat=1,sums=1,tasks=1,steps-first=1,answer-first=1", 1500)[0]:
        said = text_of(answer["content"]).partition("You said ")[2]
        words |= set(re.findall(r"\b[a-z]{3,}\b", said))
        numbers |= set(re.findall(r"(\d+) [-+*/] (\d+)", question["content"]))
    assert len(words) > 100 and all(tasks.split_of(word) == "train" for word in words - {"the", "and"})
    assert len(numbers) > 200 and not any(facts.held_out("arithmetic", *pair) for pair in numbers)


def test_what_is_repeated_was_said():
    kinds = Counter()
    drawn = (mixture.draw("repeat=1", 200, split=split)[0] for split in ("train", "test"))
    for question, answer in itertools.chain(*drawn):
        said = answer["content"].removeprefix("You said ")
        assert question["content"].endswith(f" {said}")
        kinds[re.sub(r"\.+", ".", re.sub(r"\d+", "1", said))[:1].isalpha()] += 1
    assert min(kinds.values()) > 20, "words, and rows of dots or numbers"


def test_conversations_are_written_as_they_are_read(tmp_path):
    path = tmp_path / "some.jsonl"
    mixture.main(["sums=1,tasks=1", "--num", "12", "--jsonl", str(path)])
    drawn = list(mixture.draw_each("sums=1,tasks=1", 12, Counter(), seed=42))
    conversations, n_bad = mixture.read(path)
    assert (n_bad, [one for _, one in drawn]) == (0, conversations)
    assert [json.loads(line)["source"] for line in path.open()] == [source for source, _ in drawn]


def test_one_file_is_written_and_what_was_dropped_is_said(tmp_path):
    both = ["--jsonl", tmp_path / "a.jsonl", "--workbook", tmp_path / "b.jsonl"]
    assert refused(run(mixture.main, "sums", *both), "--workbook", "not allowed")
    for flag in both[::2]:
        done = run(mixture.main, "refusal", "--num", 2000, flag, tmp_path / "c.jsonl")
        assert done.status == 0 and re.search(r"dropped: .*\d+ duplicates", done.err)


def test_a_workbook_is_pages_of_plain_text(tmp_path):
    path = tmp_path / "workbook.jsonl"
    mixture.main(["sums=1,tasks=1,repeat=1", "--num", "130", "--workbook", str(path)])
    pages = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    calls = [one for one in mixture.draw("sums=1,tasks=1,repeat=1", 130, 42)[0] if "calc" in str(one)]
    last = 10 - len(calls)  # their text has holes where the calls are
    assert calls and [page.count("\n\n") + 1 for page in pages] == [60, 60, last]
    assert not any(calls[0][0]["content"] in page for page in pages)
    assert " = " in pages[0] and "You said" in pages[0] and "<|" not in "".join(pages)
    before = path.read_bytes()
    mixture.main(["sums=1,tasks=1,repeat=1", "--num", "130", "--workbook", str(path)])
    assert path.read_bytes() == before


# ----------------------------------------------------------------------------------------------------- chats


def words(turns):
    return sum(len(text_of(turn["content"]).split()) for turn in turns)


@pytest.fixture(scope="module")
def chats():
    arguments = Counter(), 3, "train", False, words, 60
    alone = [one for _, one in mixture.draw_each(mixture.DEFAULT, 900, *arguments[:4])]
    return alone, list(mixture.draw_chats(mixture.DEFAULT, 900, *arguments))


def test_chats_are_the_conversations_one_behind_the_other(chats):
    alone, joined = chats
    body = lambda one: [json.dumps(turn) for turn in one if turn["role"] != "system"]
    assert Counter(turn for one in alone for turn in body(one)) == Counter(t for c in joined for t in body(c))
    system = lambda one: [turn["content"] for turn in one if turn["role"] == "system"]
    texts = [("".join(body(chat)), system(chat)) for chat in joined]
    for one in alone:  # none is torn apart, or gets another system message
        assert any("".join(body(one)) in text and system(one) == said for text, said in texts)
    for chat in joined:
        roles = [turn["role"] for turn in chat]
        assert roles.count("system") == (roles[0] == "system"), "a system message inside of a chat"
        assert "user user" not in " ".join(roles) and "assistant assistant" not in " ".join(roles)


def test_chats_fit_the_context_unless_one_conversation_is_longer(chats):
    alone, joined = chats
    longest = max(words(one) for one in alone)
    assert all(words(chat) <= max(60, longest) for chat in joined)
    assert all(words(chat) <= 60 for chat in joined if chat not in alone)


def test_every_skill_is_learned_at_every_turn(chats):
    turns_of = {kind: Counter() for kind in ("calc", "search", "letters", "name")}
    for chat in chats[1]:
        for n, turn in enumerate(turn for turn in chat if turn["role"] == "assistant"):
            for part in turn["content"] if isinstance(turn["content"], list) else ():
                if part["type"] in turns_of:
                    turns_of[part["type"]][n + 1] += 1
            turns_of["name"][n + 1] += "Handmade" in text_of(turn["content"])
            turns_of["letters"][n + 1] += "That makes" in text_of(turn["content"])
    for kind, counts in turns_of.items():
        assert all(counts[n] > 0 for n in (1, 2, 3)), (kind, counts)
        assert counts[2] + counts[3] > counts[1] / 3, (kind, counts)


def test_conversations_of_the_user_are_left_as_they_are(tmp_path):
    own = [[dict(role="user", content=f"q{i}"), dict(role="assistant", content=f"a{i}")] for i in range(40)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in own))
    spec = f"jsonl:{path}=1,identity=1"
    chats = list(mixture.draw_chats(spec, 60, Counter(), 0, "train", False, words, 60))
    theirs = [chat for chat in chats if re.match("q[0-9]", chat[0]["content"])]
    assert len(theirs) > 20 and all(chat in own for chat in theirs)


@given(st.integers(0, 10**6), SPLITS)
def test_what_is_given_stands_before_the_question(seed, split):
    conversation = mixture.given(random.Random(seed), split)
    if conversation is None:
        return
    told = " ".join(turn["content"] for turn in conversation[:-1])
    value = conversation[-1]["content"].rpartition(" is ")[2].rstrip(".")
    assert f" {value}." in told and told.rstrip().endswith(("?", "."))
    country = re.search(r"of (\w+)", told)[1]
    assert country in conversation[-1]["content"] and country in questions(conversation)[-1]


def test_files_are_read_to_their_end_and_long_ones_are_kept(tmp_path):
    """The rules for what we make ourselves are not for what the user has made."""
    repeated = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    long = [{"role": "user", "content": "Tell me all."}, {"role": "assistant", "content": "word " * 2000}]
    path = tmp_path / "own.jsonl"
    rows = [repeated] * 1000 + [long]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in rows))
    kept = [mixture.draw(f"jsonl:{path}", 5, split=split)[0] for split in ("train", "test")]
    assert long in kept[0] + kept[1]
