"""The exam gives the marks that were earned: assistants made by hand, whose answers are known, sit it."""

import re

import pytest
import script

import evaluate
import gpt2
import sft
import tasks.conversations as mixture
import tasks.factbook as facts
import tools
from common import UserError
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
    for name in ("counting", "spelling", "arithmetic, level 2", "word, level 1"):
        assert all(value == 0 for what, value in results[name].items() if what != "n")


def test_who_remembers_everything_is_right_without_searching(sit):
    results = sit(remembered, known=known("train", 20))
    assert results["known facts"] == dict(n=20, right=1, refused=0)
    assert results["search"]["right"] == 1
    assert results["search"]["searched"] == 0
    assert results["invented names"]["refused"] == 0


def test_a_search_counts_as_a_refusal_of_what_nobody_knows(sit):
    reply = [dict(type="search", text=" x"), dict(type="output", text=" nothing found"), *said("Nobody.")]
    results = sit(lambda _: reply)
    assert results["invented names"]["refused"] == 1
    assert results["search"] == dict(n=12, searched=1, right=0)
    assert "known facts" not in results


def test_the_calculator_must_be_called_asked_the_question_and_copied(sit):
    assert sit(calculated)["calculator"] == dict(n=12, called=1, copied=1, right=1)
    other = lambda _: mixture.calculated(" 123456 + 1")
    assert sit(other)["calculator"] == dict(n=12, called=1, copied=1, right=0)
    wrong = lambda c: [*calculated(c)[:2], *said("It is what it is.")]
    assert sit(wrong)["calculator"] == dict(n=12, called=1, copied=0, right=0)
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


def test_a_file_that_is_no_probe_is_refused(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"country": "France"}\n')
    for path in (tmp_path / "bad.jsonl", tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match="is not what"):
            evaluate.read_probe(path)


def test_the_table_shows_measures_and_bars(capsys):
    results = {"search": dict(n=470, searched=1.0, right=0.7), "word, level 1": dict(n=9, steps_first=None)}
    evaluate.table(results)
    table = capsys.readouterr().out
    assert "search                       470  searched 100%, right 70% (>= 70%)" in table
    evaluate.table(results, as_json=True)
    assert '"right": 0.7' in capsys.readouterr().out
    assert evaluate.line(results) == "exam: search 100%"


def test_asked_in_batches_the_replies_come_in_order(monkeypatch):
    """A model's replies do not depend on their company, and each goes to its question."""
    monkeypatch.setattr(evaluate, "ROWS", 3)
    tokenizer = Tokenizer.bytes()
    model = gpt2.GPT2(gpt2.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=99, vocab_size=266), seed=3)
    asked = [evaluate.user("?" * n) for n in (7, 1, 5, 3, 9, 2, 8)]
    settings = dict(max_tokens=6, temperature=1.0, seed=5)
    together = evaluate.ask(model, tokenizer, asked, **settings)
    alone = [evaluate.ask(model, tokenizer, [one], streams=[i], **settings)[0] for i, one in enumerate(asked)]
    assert together == alone
    assert len({text_of(reply) for reply in together}) > 1


def test_eval_of_a_base_model_without_chat_tokens_is_one_line(tmp_path):
    assert script.refused(script.run(sft.main, "--eval", tmp_path), str(tmp_path))
