"""The measures are those that the replies deserve: assistants whose answers are known are evaluated."""

import itertools
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import script
from test_sample import BYTES, Fake, reciting, spell

import common
import evaluate
import gpt2
import sample
import tasks.conversations as mixture
import tasks.factbook as facts
import tools
from common import UserError
from tasks.conversations import turns
from tasks.problems import Problem
from tokenizer import Tokenizer, text_of

WORDS = {
    " plus ": " + ",
    " minus ": " - ",
    " times ": " * ",
    " x ": " * ",
    " × ": " * ",
    " divided by ": " / ",
}


@pytest.fixture
def sit(monkeypatch):
    """sit(answer): the results of an assistant that answers a conversation with answer(its last text)."""

    def with_(answer, **settings):
        def ask(model, tokenizer, conversations, *_, **__):
            return [answer(conversation) for conversation in conversations]

        monkeypatch.setattr(evaluate, "ask", ask)
        return evaluate.evaluate(None, None, n=12, **settings)

    return with_


def said(text):
    return [dict(type="text", text=text)]


def known(split, n):
    return [dict(country=f.country, field=f.field, split=split, rate=1.0) for f in facts.facts(split)[:n]]


def remembered(conversation):
    """What a perfect memory says, and nothing on anything else."""
    by_question = {q: fact.answer for fact in facts.all_facts() for q in (*fact.questions, *fact.held_out)}
    return said(by_question.get(conversation[-1]["content"], "Who knows?"))


def calculated(conversation):
    """A call of the calculator with the expression in the question, copied right."""
    text = conversation[-1]["content"]
    for word, sign in WORDS.items():
        text = text.replace(word, sign)
    call = (
        " " + re.search(r"[\d.]*\d(\s*[-+*/]\s*[\d.]*\d)+", text)[0]
        if re.search(r"\d\s*[-+*/]", text)
        else " 1 + 1"
    )
    return mixture.calculated(call)


def test_who_never_knows_is_right_about_nothing(sit):
    results = sit(lambda _: said(mixture.DONT_KNOW + "."), known=known("train", 20) + known("test", 5))
    assert results["known facts"] == dict(n=20, right=0, refused=1)
    assert results["known facts, held out"] == dict(n=5, right=0, refused=1)
    assert results["invented names"] == dict(n=12, refused=1)
    assert results["search"] == dict(n=12, searched=0, right=0)
    assert results["calculator"] == dict(n=12, called=0, copied=0, right=0)
    for name in ("counting", "spelling", "given facts", "by turn", "arithmetic, level 2", "word, level 1"):
        assert all(value == 0 for what, value in results[name].items() if what != "n")


def test_who_remembers_everything_is_right_without_searching(sit):
    results = sit(remembered, known=known("train", 20))
    assert results["known facts"] == dict(n=20, right=1, refused=0)
    assert results["search"]["right"] == 1
    assert results["search"]["searched"] == 0
    assert results["invented names"]["refused"] == 0


def test_small_talk_is_right_if_the_answer_belongs_to_the_question(sit):
    rows = [row for row in facts.texts("source") if row["source"] == "chitchat"]
    answers = {question: row["answer"][-1] for row in rows for question in row["held_out"]}
    reply = lambda conversation: said(answers.get(conversation[-1]["content"], "Well."))
    assert sit(reply)["small talk"] == dict(n=12, right=1)
    assert sit(lambda _: said("Good. What would you like to know?"))["small talk"]["right"] < 0.3


def test_who_reads_the_prompt_knows_what_is_stated_there(sit):
    def read(conversation):
        return said(" ".join(str(turn["content"]) for turn in conversation if turn["role"] == "user"))

    results = sit(read)
    assert results["given facts"] == dict(n=12, right=1)


def test_what_is_asked_later_is_asked_after_answers_of_its_own(sit):
    n_users = set()

    def forgetful(conversation):
        """Right at the first turn alone."""
        n = sum(turn["role"] == "user" for turn in conversation)
        n_users.add(n)
        assert [turn["role"] for turn in conversation[-2 * n + 1 :]][::2] == ["user"] * n
        content = conversation[-1]["content"]
        if n > 1:
            return said("Good is 4081.")
        if re.search(r"\d\s*([-+*/]|plus|minus|times|x|×|divided)", content):
            return calculated(conversation)
        asked = re.search(r"how many (\w)", content.lower())
        return said(f"Handmade. Answer: {asked and 'who knows'}")

    row = sit(forgetful)["by turn"]
    assert row["n"] == 12 and row["turn_1"] >= 8 / 12 and row["turn_2"] == row["turn_3"] == row["turn_5"] == 0
    assert n_users == {1, 2, 3, 4, 5}


def test_a_search_counts_as_a_refusal_of_what_nobody_knows(sit):
    reply = [dict(type="search", text=" x"), dict(type="output", text=" nothing found"), *said("Nobody.")]
    results = sit(lambda _: reply)
    assert results["invented names"]["refused"] == 1
    assert results["search"] == dict(n=12, searched=1, right=0)
    assert "known facts" not in results


def test_with_100_questions_all_of_a_limited_kind_are_asked():
    answers = lambda questions, **_: [said("?") for _ in questions]
    both = [fact for fact in facts.facts() if fact.field in ("capital", "population")]
    assert evaluate.search(answers, random.Random(0), 100)["n"] == len(both) > 100
    assert evaluate.search(answers, random.Random(0), 99)["n"] == 99
    assert evaluate.identity(answers, random.Random(0), 100)["n"] == 40
    assert evaluate.identity(answers, random.Random(0), 39)["n"] == 39


def test_the_calculator_must_be_called_asked_the_question_and_copied(sit):
    assert sit(calculated)["calculator"] == dict(n=12, called=1, copied=1, right=1)
    other = lambda _: mixture.calculated(" 123456 + 1")
    assert sit(other)["calculator"] == dict(n=12, called=1, copied=1, right=0)
    wrong = lambda c: [*calculated(c)[:2], *said("It is what it is.")]
    assert sit(wrong)["calculator"] == dict(n=12, called=1, copied=0, right=0)
    turn = itertools.count()
    cut_off = lambda c: calculated(c)[: (3, 1, 0)[next(turn) % 3]]  # every third reply is complete
    answers = lambda questions: [cut_off(turns(question)) for question in questions]
    third = dict(n=12, called=1 / 3, copied=1, right=1 / 3)  # copied is a share of the calls
    assert evaluate.calculator(answers, random.Random(0), 12) == third
    malformed = lambda _: mixture.called("calc", " 1 +", f" {tools.calculate('1 +')}", "It is 2.")
    assert sit(malformed)["calculator"]["called"] == 0


def test_the_probe_counts_right_answers_and_its_file_comes_back(monkeypatch, tmp_path):
    some = {fact.questions[0]: fact.answer for fact in facts.facts()[::7]}
    calls = iter(range(10**6))

    def ask(model, tokenizer, conversations, **_):  # what it knows, it knows twice of three times
        questions = [conversation[-1]["content"] for conversation in conversations]
        return [said(some.get(q, "?") if next(calls) % 3 else "?") for q in questions]

    monkeypatch.setattr(evaluate, "ask", ask)
    lines = evaluate.probe(None, None, 3, 0, tmp_path / "known.jsonl")
    assert len(lines) == len(facts.facts())
    assert {line["rate"] for line in lines} == {0, 2 / 3}
    assert sum(line["rate"] > 0.5 for line in lines) == len(some)
    assert evaluate.read_probe(tmp_path / "known.jsonl") == lines
    assert len(facts.probed(tmp_path / "known.jsonl")) == len(lines) - len(some)


def test_the_probe_says_how_many_facts_are_known(monkeypatch, capsys):
    """Of two replies to each question: the first three facts of the training have both right, the others one,
    and of those held out nothing is right."""
    asked = {fact.questions[0]: i for i, fact in enumerate(facts.facts("train"))}
    answers = {fact.questions[0]: fact.answer for fact in facts.facts("train")}

    def ask(model, tokenizer, conversations, **_):
        questions = [conversation[-1]["content"] for conversation in conversations]
        right = [q in asked and (asked[q] < 3 or i % 2 == 0) for i, q in enumerate(questions)]
        return [said(answers[q] if yes else "?") for q, yes in zip(questions, right)]

    monkeypatch.setattr(evaluate, "ask", ask)
    evaluate.probe(None, None, 2, 0)
    train, test = len(facts.facts("train")), len(facts.facts("test"))
    assert capsys.readouterr().err.splitlines() == [
        f"of {train} facts asked about in training the model knows 3, and 0 were never right",
        f"of {test} facts held out the model knows 0, and {test} were never right",
    ]


def test_a_file_that_is_no_probe_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"country": "France"}\n')
    for path in (tmp_path / "bad.jsonl", tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match="is not what"):
            evaluate.read_probe(path)


def test_a_fact_that_is_right_in_half_of_the_replies_is_not_known(sit):
    lines = known("train", 20)
    for line in lines[:5]:
        line["rate"] = 0.5
    results = sit(remembered, known=lines)
    assert results["known facts"]["n"] == 15


def test_the_table_shows_measures_and_bars():
    results = {"search": dict(n=470, searched=1.0, right=0.7), "word, level 1": dict(n=9, steps_first=0)}
    results["known facts"] = dict(n=3, right=0.8, refused=0.1)
    table = evaluate.table(results)
    assert "search                       470  searched 100%, right 70% (>= 70%)" in table
    assert "known facts                    3  right 80% (>= 80%), refused 10% (<= 15%)" in table
    assert evaluate.line(results) == "evaluation: search 100%, word, level 1 0%, known facts 80%"


# ------------------------------------------------------------------------------------------------------------
# Asking


def test_asked_in_batches_the_replies_come_in_order(monkeypatch):
    """A model's replies do not depend on their company, and each goes to its question."""
    monkeypatch.setattr(evaluate, "ROWS", 3)
    tokenizer = Tokenizer.bytes()
    model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=99, vocab_size=266), seed=3)
    asked = [turns("?" * n) for n in (7, 1, 5, 3, 9, 2, 8)]
    settings = dict(max_tokens=6, temperature=1.0, seed=5)
    together = evaluate.ask(model, tokenizer, asked, **settings)
    alone = []
    for i, one in enumerate(asked):
        arguments = [tokenizer.prompt(one)], None, 6, 1.0, 5, [i], evaluate.ALONE, 1
        [[ids, *_]] = evaluate.sample_replies(model, tokenizer, *arguments)
        alone.append(tokenizer.parts(ids))
    assert together == alone
    assert len({text_of(reply) for reply in together}) > 1


class Ranks:
    """Ranks one after the other: the first round collects what each gathers, the second returns it to all."""

    def __init__(self, size):
        self.size, self.board = size, {}

    def run(self, function, n):
        """[function(world) of rank 0, of rank 1, ...], where n conversations are asked."""
        for _ in range(2):
            results = []
            for rank in range(self.size):
                gather = lambda mine, rank=rank: self.gather(rank, mine, n)
                results.append(function(SimpleNamespace(rank=rank, size=self.size, gather=gather)))
        return results

    def gather(self, rank, mine, n):
        self.board[rank] = json.loads(json.dumps(mine))  # only JSON travels
        assert len(mine) == len(range(rank, n, self.size)), "each rank asks its own"
        blank = [[[[], [], [], False]] * len(range(r, n, self.size)) for r in range(self.size)]
        return [self.board.get(other, blank[other]) for other in range(self.size)]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_the_number_of_ranks_changes_no_reply(size):
    config = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=99, vocab_size=266)
    model, asked = gpt2.GPT2(config, seed=3), [turns("?" * n) for n in (7, 1, 5, 3, 9)]
    settings = dict(max_tokens=6, temperature=1.0, seed=5)
    on_rank = lambda world: evaluate.ask(model, BYTES, asked, world=world, **settings)
    alone = evaluate.ask(model, BYTES, asked, **settings)
    assert Ranks(size).run(on_rank, len(asked)) == [alone] * size
    assert len({text_of(reply) for reply in alone}) > 1


def test_tools_answer_and_a_reply_that_is_cut_off_says_so():
    ids = spell("calc_start", "3*17", "calc_end", "output_start", " 51", "output_end", " 51.", "im_end")
    prompt = BYTES.prompt(turns("3*17?"))
    model = Fake(reciting(ids, len(prompt)))
    [reply] = evaluate.ask(model, BYTES, [turns("3*17?")], tools.TOOLS)
    assert [part["text"] for part in reply] == ["3*17", " 51", " 51."]
    whole, cut_off = (
        evaluate.reply_to(model, BYTES, [prompt], tools.TOOLS, max_tokens, 0.0, 0)[0]
        for max_tokens in (len(ids), len(ids) - 1)
    )
    assert (whole["finished"], whole["length"]) == (True, len(ids))
    assert (cut_off["finished"], cut_off["length"]) == (False, len(ids) - 1)
    [reply] = evaluate.ask(model, BYTES, [turns("3*17?")])
    assert "no calc here" in reply[1]["text"]


# ------------------------------------------------------------------------------------------------------------
# Problems


def test_tasks_and_levels_become_shares():
    parse = evaluate.parse_tasks
    assert parse("word", "2") == {("word", 2): 1}
    assert parse("word=3,decimals", "1-2") == {
        ("word", 1): 1.5, ("word", 2): 1.5, ("decimals", 1): 0.5, ("decimals", 2): 0.5}  # fmt: skip
    assert list(parse("factbook", None)) == [("factbook", 1), ("factbook", 2), ("factbook", 3)]
    for spec, level, words in (
        ("nonsense", None, "no task 'nonsense'"),
        ("word=0", None, "--task word=0"),
        ("", None, "--task"),
        ("word", "7", "no level 7"),
        ("word", "2-1", "--level 2-1"),
        ("word", "easy", "--level easy"),
    ):
        with pytest.raises(UserError, match=words):
            parse(spec, level)


def test_pass_at_k_by_hand_and_by_counting():
    pass_at_k = evaluate.pass_at_k
    assert pass_at_k(4, 0, 2) == 0 and pass_at_k(4, 4, 1) == 1
    assert pass_at_k(4, 1, 2) == 0.5 and pass_at_k(5, 2, 1) == pytest.approx(0.4)
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    "texts, right",
    [
        (["Answer: 9", "Answer: 8", "Answer: 9"], 1),
        (["Answer: 9", "Answer: 8", "Answer: 8"], 0),
        (["no idea", "nor I", "2 + 7 makes 9. Answer: 9"], 1),  # who does not answer does not vote
        (["Answer: 8", "Answer: 9"], 0),  # of equals the first
        (["no idea", "none"], 0),
        (["Answer: 8", "Answer: 9 apples", "Answer: 9.0"], 1),
    ],
)
def test_the_majority_votes(texts, right):
    problem = Problem("word", "How many apples?", "", "9")
    assert evaluate.majority(problem, [said(text) for text in texts]) == right


@pytest.fixture
def sums(monkeypatch):
    """Two problems, 1+1? and 2+2?, again and again, and one that is too long; how long is in the argument."""

    def problems(task, split="train", level=None, seed=0):
        assert split == "test"
        two = [Problem("sum", f"{n}+{n}?", "", str(2 * n)) for n in (1, 2)]
        return itertools.cycle([Problem("sum", "long " * 99, "", "1"), *two] if task == "sum" else two[:1])

    monkeypatch.setattr(evaluate, "problems", problems)


@pytest.mark.usefixtures("sums")
def test_measures_of_problems_by_hand(monkeypatch):
    """Of 1+1? one sample of four is right, of 2+2? three; a reply that was cut off is wrong."""
    asked = []
    samples = iter([*"2345", *"4446"])

    def reply_to(model, tokenizer, prompts, tools, max_tokens, temperature, seed, world=None):
        asked.append((len(prompts), max_tokens, temperature, seed))
        if temperature == 0:
            replies = [("2", True), ("4", False)]
        else:
            replies = [(text, True) for text in samples]
        return [
            dict(parts=said(f"Answer: {text}"), finished=finished, length=int(text))
            for text, finished in replies
        ]

    monkeypatch.setattr(evaluate, "reply_to", reply_to)
    model = SimpleNamespace(config=SimpleNamespace(n_positions=64))
    score = lambda problem, parts, finished: float(len(text_of(parts)) == 9) + finished
    [row] = evaluate.evaluate_problems(model, BYTES, {("sum", 3): 1.0}, 5, 4, 30, 7, score)
    assert asked == [(2, 30, 0.0, 7), (8, 30, 1.0, 7)]
    assert row == {
        "task": "sum", "level": 3, "problems": 2, "pass@1": 0.5, "sampled": 0.5, "pass@2": 0.75, "pass@4": 1,
        "vote@4": 1.0, "length": 3.0, "sampled length": 4.0, "score": 2.0,
    }  # fmt: skip
    table = evaluate.problem_table([row]).splitlines()
    assert table[0].split()[-1] == "score" and table[1].split()[:4] == ["sum", "3", "2", "50.0%"]
    assert table[1].split()[-3:] == ["3.0", "4.0", "200.0%"] and len(table[0]) == len(table[1])


@pytest.mark.usefixtures("sums")
def test_problems_are_sampled_from_the_model():
    """It says 2 with probability 0.6, else 3; greedily always 2."""
    prompt = BYTES.prompt(turns("1+1?"))
    words = [*b"Answer: ", None, BYTES.encode_special("<|im_end|>")]

    def logits(text):
        out, token = np.full(266, -50.0), words[len(text) - len(prompt)]
        if token is None:
            out[[ord("2"), ord("3")]] = np.log([0.6, 0.4])
        else:
            out[token] = 0
        return out

    ask = lambda **more: evaluate.evaluate_problems(Fake(logits), BYTES, {("one", 1): 1}, 9, 8, 12, 3, **more)
    [row] = ask()
    assert (row["problems"], row["pass@1"], row["length"], row["pass@8"]) == (1, 1, 10, 1)
    assert 0 < row["sampled"] < 1 and row["sampled"] * 8 == int(row["sampled"] * 8)
    assert ask(score=lambda *_: 0.25)[0] == {**row, "score": 0.25}


@pytest.mark.usefixtures("sums")
def test_problems_that_leave_no_room_for_a_reply():
    model = SimpleNamespace(config=SimpleNamespace(n_positions=len(BYTES.prompt(turns("1+1?")))))
    with pytest.raises(UserError, match=r"prompts of sum fill the model's context of .*lower --level"):
        evaluate.distinct_problems(model, BYTES, "sum", 1, 5, 0)
    model.config.n_positions += 1
    assert [p.prompt for p in evaluate.distinct_problems(model, BYTES, "sum", 1, 5, 0)] == ["1+1?", "2+2?"]
    assert [p.prompt for p in evaluate.distinct_problems(model, BYTES, "sum", 1, 1, 0)] == ["1+1?"]


# ------------------------------------------------------------------------------------------------------------
# HellaSwag (its losses are compared with those of transformers in test_golden.py)

ITEM = dict(ctx="A cat sits. It", endings=["purrs.", "barks and barks.", "flies.", "is"], label="0")


def write_items(path, *rows):
    """The rows as JSON lines, or as parquet if the name says so."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["items.jsonl", "items.parquet"])
def test_hellaswag_is_read_from_both_formats(tmp_path, name):
    path = write_items(tmp_path / name, {**ITEM, "ind": 4}, {**ITEM, "label": "3"})
    items = evaluate.read_hellaswag(path, BYTES, 99)
    assert [label for _, _, label in items] == [0, 3]
    assert BYTES.decode(items[0][0]) == "A cat sits. It"
    assert [BYTES.decode(ending) for ending in items[0][1]] == [
        " purrs.",
        " barks and barks.",
        " flies.",
        " is",
    ]


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(label=""), "row 3 has the label ''"),
        (dict(label="4"), "row 3 has the label '4'"),
        (dict(endings=["a", "b", "c"]), "row 3 has not four texts"),
        (dict(endings=None), "row 3 has not four texts"),
        (dict(ctx=None), "row 3 has no text as its ctx"),
        (dict(ctx="x" * 90), "row 3 has 107 tokens, and the model has a context of 99"),
    ],
)
def test_a_bad_row_of_hellaswag_is_named(tmp_path, bad, words):
    path = write_items(tmp_path / "items.parquet", ITEM, ITEM, {**ITEM, **bad})
    with pytest.raises(UserError, match=words):
        evaluate.read_hellaswag(path, BYTES, 99)
    just_fits = {**ITEM, "ctx": "x" * 83}  # 100 tokens: the last one is no input
    path = write_items(tmp_path / "items.parquet", just_fits)
    [item] = evaluate.read_hellaswag(path, BYTES, 99)
    model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=99, vocab_size=266), seed=3)
    assert evaluate.hellaswag(model, [item])["n"] == 1


def test_the_number_of_ranks_and_the_company_of_a_row_change_nothing(tmp_path, monkeypatch):
    golden = Path(__file__).parent / "golden" / "hellaswag.jsonl"
    items = evaluate.read_hellaswag(golden, BYTES, 200)
    config = gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=200, vocab_size=266)
    model = gpt2.GPT2(config, dtype="float64", seed=3)
    losses, results = evaluate.ending_losses(model, items), evaluate.hellaswag(model, items)
    p = results["acc"]
    assert results["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 10)) and results["n"] == 10
    for size in (3, 11):  # one rank has nothing to do
        counts = []
        world = lambda rank, size=size: SimpleNamespace(rank=rank, size=size, gather=lambda n: [n])
        for rank in range(size):
            counts.append(evaluate.hellaswag(model, items, world(rank)))
        for name in ("acc", "acc_norm"):
            assert sum(one[name] for one in counts) == pytest.approx(results[name])
    monkeypatch.setattr(evaluate, "ROWS", 1)
    np.testing.assert_allclose(evaluate.ending_losses(model, items), losses, rtol=1e-12)


def test_hellaswag_by_the_command(tmp_path):
    path = write_items(tmp_path / "items.jsonl", ITEM, ITEM)
    model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=99, vocab_size=266), seed=3)
    model.save_pretrained(tmp_path / "model")
    BYTES.save(tmp_path / "model")
    found = json.loads(run(tmp_path / "model", "--hellaswag", path, "--json"))
    assert found["n"] == 2 and found["acc"] in (0, 1) and found["acc_stderr"] == 0
    shown = run(tmp_path / "model", "--hellaswag", path)
    assert shown.startswith(f"HellaSwag: acc_norm {found['acc_norm']:.4f} ± 0.0000") and "of 2 items" in shown
    assert script.refused(script.run(evaluate.main, tmp_path / "model", "--hellaswag", "none"), "none", "ctx")


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def runs(monkeypatch):
    """Two models that sample.load() knows by name: base says "plain", sft answers "one two ... six"."""
    answers = {"base": [*b"plain", BYTES.eot], "sft": spell("one two three four five six", "im_end")}
    answers["long"] = [*b"x" * 400]

    def load(directory, flags):
        prompt = BYTES.prompt(turns("_")) if directory == "sft" else [BYTES.eot, ord("_")]
        return Fake(reciting(answers[directory], len(prompt)), n_positions=500), BYTES, directory

    monkeypatch.setattr(sample, "load", load)
    monkeypatch.setattr(sample, "is_assistant", lambda checkpoint: checkpoint == "sft")
    monkeypatch.setattr(sample, "load_assistant", lambda directory, flags: load(directory, flags)[:2])


def run(*argv):
    done = script.run(evaluate.main, *argv)
    assert done.status == 0, done.err
    return done.out


@pytest.mark.usefixtures("runs")
def test_models_beside_each_other(monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")  # two columns of twenty
    flags = ["--compare", "--prompt", "_"]
    lines = run("base", "sft", *flags).splitlines()
    assert lines[:4] == ["=" * 40, "_", "", f"{'base':20}  sft"]
    assert lines[4] == f"{'-' * 20}  {'-' * 20}" and all(len(line) <= 44 for line in lines)
    assert lines[5:] == [f"{'plain':20}  one two three four", f"{'':20}  five six", ""]
    texts = {"base": ["plain"], "sft": ["one two three four five six"]}
    assert json.loads(run("base", "sft", *flags, "--json")) == {"prompts": ["_"], "texts": texts}
    assert json.loads(run("sft", *flags, "--json", "--max-tokens", 3))["texts"] == {"sft": ["one"]}
    assert run("sft", *flags, "--prompt", "_").count("=" * 40) == 2
    assert json.loads(run("long", *flags, "--json"))["texts"] == {"long": ["x" * 200]}


@pytest.mark.usefixtures("runs")
def test_what_the_flags_ask_for(monkeypatch, tmp_path):
    calls = []

    def recorded(name, result):
        def call(model, tokenizer, *arguments):
            calls.append((name, *arguments))
            return result

        return call

    lines, skills = known("train", 3), {"search": dict(n=3, right=0.5)}
    monkeypatch.setattr(evaluate, "probe", recorded("probe", lines))
    monkeypatch.setattr(evaluate, "evaluate", recorded("evaluate", skills))
    monkeypatch.setattr(
        evaluate, "evaluate_problems", recorded("problems", [{"task": "word", "pass@1": 0.5}])
    )
    assert run("sft") == evaluate.table(skills) + "\n"
    assert calls == [("probe", 3, 42, None), ("evaluate", lines)]
    calls.clear()
    assert run("sft", "--probe", tmp_path / "p", "--k", 5, "--seed", 1) == ""
    assert calls == [("probe", 5, 1, str(tmp_path / "p"))]
    (tmp_path / "known").write_text("".join(json.dumps({**line, "question": "?"}) + "\n" for line in lines))
    assert run("sft", "--probe", tmp_path / "p", "--known", tmp_path / "known") == ""
    assert calls[1:] == [("probe", 3, 42, str(tmp_path / "p"))], "a probe is made, whatever is known"
    calls.clear()
    assert json.loads(run("sft", "--known", tmp_path / "known", "--json")) == skills
    assert calls == [("evaluate", [{**line, "question": "?"} for line in lines])]
    calls.clear()
    assert "50.0%" in run("sft", "--task", "word", "--level", 2)
    flags = ["--k", 4, "--problems", 9, "--max-tokens", 7, "--seed", 1, "--json"]
    assert json.loads(run("sft", "--task", "word", *flags))["run"] == "sft"
    assert calls[0] == ("problems", {("word", 2): 1.0}, 64, 8, 96, 42)
    assert calls[1] == ("problems", dict.fromkeys([("word", n) for n in (1, 2, 3, 4)], 0.25), 9, 4, 7, 1)


@pytest.mark.usefixtures("runs")
def test_what_the_person_can_put_right_is_one_line(tmp_path):
    for flags, words in (
        (["base", "sft"], "--compare"),
        (["sft", "--task", "x"], "no task 'x'"),
        (["sft", "--task", "word", "--level", "9"], "no level 9"),
        (["sft", "--known", tmp_path / "none"], "is not what evaluate.py --probe writes"),
        (["sft", "--probe", "x", "--task", "word"], "not allowed with"),
    ):
        assert script.refused(script.run(evaluate.main, *flags), words)


def test_only_an_assistant_is_evaluated(tmp_path, monkeypatch):
    model = gpt2.GPT2(gpt2.GPT2Config(1, 1, 4, n_positions=9, vocab_size=266))
    common.save_checkpoint(tmp_path / "run", 1, model, BYTES, gpt2.AdamW(model), 1)
    refused = script.run(evaluate.main, tmp_path / "run")
    assert script.refused(refused, "no assistant yet", f"sft.py --init-from {tmp_path / 'run'}")
    (tmp_path / "run" / "step_000001" / "state.json").unlink()  # as from Hugging Face: nobody knows
    flags = SimpleNamespace(device="cpu", dtype="float32")
    assert sample.load_assistant(tmp_path / "run", flags)[1].vocab_size == 266
    base = Tokenizer("bytes", BYTES.ranks, chat=False)
    monkeypatch.setattr(Tokenizer, "load", lambda path: base)
    gpt2.GPT2(gpt2.GPT2Config(1, 1, 4, n_positions=9, vocab_size=257)).save_pretrained(tmp_path / "base")
    assert script.refused(script.run(evaluate.main, tmp_path / "base"), "no chat tokens")
    assert script.refused(script.run(evaluate.main, tmp_path / "nowhere"), "nowhere")
