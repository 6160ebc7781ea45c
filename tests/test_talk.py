"""Talking: what is streamed is what was said, tools and history work, Ctrl-C keeps the conversation; with a
model that says what the test wants (speaker), and with random weights. test_serve.py uses the speaker too."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import script
from hypothesis import given
from hypothesis import strategies as st
from test_sample import Fake

import gpt2
import sample
import tasks.conversations as mixture
import tools
from common import UserError
from tasks.conversations import read
from tokenizer import Tokenizer, checked

BYTES = Tokenizer.bytes()
SPECIAL = BYTES.special_tokens
ANSWER = [
    {"type": "text", "text": "So: "},
    {"type": "calc", "text": "3*17"},
    {"type": "output", "text": "51"},
    {"type": "text", "text": "It is 51 \N{GRINNING FACE}."},
]
TOOLS = {
    "calc": {"3*17": "51", "1/0": "error: division by zero"}.get,
    "search": lambda query: f"about {query}",
}


CAPITALS = {"France": "Paris", "Peru": "Lima", "Fiji": "Suva", "Chad": "N'Djamena"}


def user(text):
    return {"role": "user", "content": text}


def ids_of(content):
    """What the assistant's tokens for a content are, with its <|im_end|>."""
    return BYTES.render([{"role": "assistant", "content": content}])[0][12:]


def speaker(answer, n_positions=512, before=lambda: None):
    """A model that answers the last question, a text, with answer(question): a content, or a list of ids.
    `before` is called before every token."""
    header = BYTES.prompt([])[1:]

    def logits(text):
        before()
        starts = [i + len(header) for i in range(len(text)) if text[i : i + len(header)] == header]
        question = BYTES.decode(text[: starts[-1]]).rpartition("<|im_start|>user<|im_sep|>")[2]
        wanted = answer(question.partition("<|im_end|>")[0])
        wanted = wanted if isinstance(wanted, list) and isinstance(wanted[0], int) else ids_of(wanted)
        said = len(text) - starts[-1]
        assert text[starts[-1] :] == wanted[:said]
        best = wanted[said] if said < len(wanted) else SPECIAL["<|im_end|>"]
        return np.where(np.arange(BYTES.vocab_size) == best, 50.0, 0.0)

    return Fake(logits, n_positions=n_positions)


def assistant(model, tools=TOOLS, **settings):
    return sample.Assistant(model, BYTES, tools, **{"temperature": 0.0, **settings})


def random_model(n_positions=128):
    config = gpt2.GPT2Config(
        n_layer=1, n_head=2, n_embd=32, n_positions=n_positions, vocab_size=BYTES.vocab_size
    )
    return gpt2.GPT2(config, seed=3)


def folded(events):
    """The parts that a listener makes of events, as chat.html does."""
    found = []
    for event in events:
        if "text" in event:
            if not found or found[-1][0] != "text":
                found.append(["text", ""])
            found[-1][1] += event["text"]
        elif "note" not in event:
            found.append([event.get("tool", "output"), event.get("call", event.get("output"))])
    return found


def pairs(content):
    return [[part["type"], part["text"]] for part in content]


# ------------------------------------------------------------------------------------------------------------
# Answers


@given(st.lists(st.sampled_from([*b"ab\xe2\x82\xac\xff ", *SPECIAL.values()]), max_size=30))
def test_what_is_streamed_is_what_was_said(ids):
    """Whatever the tokens: halves of characters, calls without end or beginning, tokens that mean nothing."""
    seen, events = sample.AnswerEvents(), []
    for n in range(1, len(ids) + 1):
        events += seen.new(BYTES.parts(ids[:n]))
    now = folded(events)
    events += seen.new(BYTES.parts(ids), complete=True)
    assert folded(events) == pairs(BYTES.parts(ids))
    assert {} not in events and {"text": ""} not in events
    for kind, text in now:  # nothing that was shown has been taken back, and little is held back
        assert any(kind == other and whole.startswith(text) for other, whole in folded(events))


def test_an_answer_with_a_tool_streams_piece_by_piece():
    events, batches = [], []

    def show(news):
        batches.append(news)
        events.extend(news)

    content = assistant(speaker(lambda question: ANSWER)).answer([user("3 * 17?")], show)
    assert content == ANSWER
    assert folded(events) == pairs(ANSWER)
    assert events[:4] == [{"text": letter} for letter in "So: "]
    assert {"tool": "calc", "call": "3*17"} in events and {"output": "51"} in events
    assert {"text": "\N{GRINNING FACE}"} in events  # its four tokens came as one character
    assert len(batches) == len(ids_of(ANSWER)) + 1 and all("note" not in event for event in events)


def test_the_next_answer_has_read_the_whole_conversation():
    model = speaker(lambda question: ANSWER)
    conversation = [{"role": "system", "content": "Be short."}, user("3 * 17?")]
    content = assistant(model).answer(conversation, lambda events: None)
    conversation += [{"role": "assistant", "content": content}, user("again")]
    assistant(model).answer(conversation, lambda events: None)
    read = BYTES.decode(model.cache.rows[0])
    assert "<|im_sep|>Be short.<|im_end|>" in read
    assert "<|calc_start|>3*17<|calc_end|><|output_start|>51<|output_end|>It is 51" in read


def test_a_tool_that_is_not_there_is_an_output():
    ids = [SPECIAL["<|search_start|>"], ord("x"), SPECIAL["<|search_end|>"]]
    output = sample.Host(BYTES, {}).reply(SimpleNamespace(ids=ids))
    content = BYTES.parts([*ids, *output])
    assert pairs(content)[1][1].startswith("error: ")
    events = []
    got = assistant(speaker(lambda question: content), tools={}).answer([user("?")], events.extend)
    assert pairs(got) == folded(events) == pairs(content)


def test_the_model_invents_no_output_and_no_turn():
    """It would like to say what only the host may write; the next best token comes in its place."""
    hosts = [SPECIAL[f"<|{name}|>"] for name in ("output_start", "output_end", "im_start", "im_sep")]
    order = [*hosts, ord("a")]
    model = Fake(lambda text: np.array([60.0 - order.index(i) if i in order else 0 for i in range(266)]))
    content = assistant(model, max_tokens=5).answer([user("?")], lambda events: None)
    assert content == [{"type": "text", "text": "aaaaa"}]


def test_old_turns_make_room_and_the_person_is_told_once():
    model = speaker(lambda question: "yes, yes", n_positions=200)
    conversation, noted = [{"role": "system", "content": "SYSTEM"}], []
    for i in range(12):
        conversation.append(user(f"question {i:2} of many"))
        events = []
        content = assistant(model).answer(conversation, events.extend)
        conversation.append({"role": "assistant", "content": content})
        noted += [(i, event["note"]) for event in events if "note" in event]
        read = BYTES.decode(model.cache.rows[0])
        assert (
            "SYSTEM" in read
            and f"question {i:2} of many" in read
            and pairs(content) == [["text", "yes, yes"]]
        )
    assert "question  0" not in read and "question 10" in read
    [(i, note)] = noted
    assert i > 0 and note == "the oldest messages no longer fit the model's context"


def test_a_question_that_is_too_long_is_an_error():
    with pytest.raises(UserError, match="shorten"):
        assistant(speaker(lambda question: "x", n_positions=100)).answer([user("long " * 30)], print)


@pytest.mark.parametrize("max_tokens, room", [(256, 60), (10, 80)])
def test_the_prompt_has_the_room_that_the_answer_leaves(max_tokens, room):
    """An answer gets --max-tokens, or a third of a small context."""
    talker = assistant(speaker(lambda question: "x", n_positions=90), max_tokens=max_tokens)
    question = "?" * (room - len(BYTES.prompt([user("")])))
    assert talker.answer([user(question)], lambda events: None)
    frame = len(BYTES.prompt([]))
    words = f"takes {room + 1 - frame} tokens and there is room for {room - frame}"
    with pytest.raises(UserError, match=words):
        talker.answer([user(question + "?")], lambda events: None)


def test_an_answer_without_end_is_cut_off_and_says_so():
    for settings, n_positions, note in (({"max_tokens": 7}, 512, "--max-tokens"), ({}, 64, "context")):
        events = []
        model = speaker(lambda question: "x" * 300, n_positions=n_positions)
        content = assistant(model, **settings).answer([user("?")], events.extend)
        assert note in events[-1]["note"] and pairs(content) == folded(events)
        assert settings == {} or content[0]["text"] == "x" * 7


def test_a_call_that_never_closes_ends_at_the_limit_and_is_not_run():
    run, events = [], []
    tools = {"calc": lambda call: run.append(call) or " 1"}
    model = speaker(lambda question: [SPECIAL["<|calc_start|>"], *b"1 + " * 50])
    content = assistant(model, tools, max_tokens=30).answer([user("?")], events.extend)
    assert "--max-tokens" in events[-1]["note"] and run == []
    assert not any(part["type"] == "output" for part in content)


@pytest.mark.parametrize(
    "tokens, kept",
    [
        (2, [["text", "So"]]),
        (4, [["text", "So: "]]),
        (8, [["text", "So: "]]),  # in the middle of a call
        (10, [["text", "So: "]]),  # the call has no output yet
        (12, [["text", "So: "]]),  # half an output
        (14, pairs(ANSWER[:3])),
        (17, [*pairs(ANSWER[:3]), ["text", "It "]]),
        (0, []),
    ],
)
def test_what_was_said_when_ctrl_c_came_stays(tokens, kept):
    """And can be rendered: no call without its output."""
    left = [tokens]

    def before():
        left[0] -= 1
        if left[0] < -1:
            raise KeyboardInterrupt

    model = speaker(lambda question: ANSWER, before=before)
    left[0] = tokens - 1
    events = []
    content = assistant(model).answer([user("?")], events.extend)
    assert pairs(content) == kept
    assert checked([user("?"), {"role": "assistant", "content": content}]) if kept else content == []


def test_an_answer_of_nothing_is_none():
    for nothing in ([SPECIAL["<|im_end|>"]], [SPECIAL["<|endoftext|>"]], [ord(" "), ord("\n")]):
        assert (
            assistant(speaker(lambda question, ids=nothing: ids)).answer([user("?")], lambda events: None)
            == []
        )


def test_a_question_asked_again_may_get_another_answer_and_a_seed_repeats_them():
    def answers(seed):
        one = assistant(random_model(), temperature=1.0, max_tokens=8, seed=seed)
        return [one.answer([user("?")], lambda events: None) for _ in range(3)]

    first = answers(1)
    assert first[0] != first[1] != first[2] and first == answers(1) != answers(2)


def test_a_base_model_cannot_talk():
    base = Tokenizer("bytes", BYTES.ranks, chat=False)
    with pytest.raises(UserError, match="make sft"):
        sample.Assistant(random_model(), base, {})


def test_the_tools_are_those_of_the_training(monkeypatch):
    passages = [(country, f"The capital of {country} is {city}.") for country, city in CAPITALS.items()]
    passages = tools.Search(passages)
    monkeypatch.setattr(tools.Search, "factbook", lambda: passages)
    assert {"calc": mixture.calculator, "search": mixture.looked_up} == sample.TOOLS
    assert tools.TOOLS["calc"]("3*17") == " 51"
    assert "Paris" in tools.TOOLS["search"]("capital France")


# ------------------------------------------------------------------------------------------------------------
# The terminal


def typed(monkeypatch, model, *lines, **settings):
    """What chat() writes when these lines are its standard input: .out, .err."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    done = script.run(lambda argv: sample.chat(model, BYTES, tools=TOOLS, temperature=0.0, **settings))
    assert done.status == 0
    return done


def test_a_conversation_through_a_pipe(monkeypatch):
    done = typed(monkeypatch, speaker(lambda question: ANSWER), "3 * 17?", "", "   ", "  and again ")
    assert done.out == "So: [calc 3*17 → 51] It is 51 \N{GRINNING FACE}.\n" * 2 and done.err == ""


def test_a_chat_tells_its_speed_if_asked(monkeypatch):
    done = typed(monkeypatch, speaker(lambda question: "yes"), "?", tell_speed=True)
    assert re.fullmatch(r"yes\n\(4 tokens: the first after \S+ ms, then \S+ a second\)\n", done.out)


def test_reset_system_and_save(monkeypatch, tmp_path):
    model = speaker(lambda question: f"you said {question}")
    one, two = tmp_path / "one.jsonl", tmp_path / "two words.jsonl"
    lines = [
        "/system  Be kind. ",
        "a",
        f"/save {one}",
        "/reset",
        "b",
        f"/save {two}",
        "/system",
        "c",
        f"/save {one}",
    ]
    done = typed(monkeypatch, model, *lines)
    assert done.out.split("\n") == ["you said a", "you said b", "you said c", ""] and not done.err
    turn = lambda text: [
        user(text),
        {"role": "assistant", "content": [{"type": "text", "text": f"you said {text}"}]},
    ]
    first, second = read(one)[0]
    kind = {"role": "system", "content": "Be kind."}
    assert first == [kind, *turn("a")]
    assert second == [*turn("b"), *turn("c")]
    assert json.loads(two.read_text()) == {"messages": [kind, *turn("b")]}  # a new conversation, as kind
    assert "Be kind" not in BYTES.decode(model.cache.rows[0])  # the last answer was asked for without it


def test_mistakes_do_not_end_the_chat(monkeypatch, tmp_path):
    model = speaker(lambda question: "fine", n_positions=100)
    lines = [
        "/save x",
        f"/save {tmp_path}",
        "/save",
        "/rest",
        "long " * 40,
        "ok",
        f"/save {tmp_path}/no/where",
        "ok",
    ]
    done = typed(monkeypatch, model, *lines)
    assert done.out == "fine\nfine\n"
    errors = done.err.splitlines()
    assert len(errors) == 6 and all(error.startswith("error: ") for error in errors)
    for error, word in zip(errors, ["never speaks", "never speaks", "/save", "/rest", "shorten", "no/where"]):
        assert word in error
    assert not (tmp_path / "x").exists()


def test_a_system_message_that_is_too_long_is_blamed_itself_and_at_once(monkeypatch):
    """Not the question after it; and the one before it stays."""
    model = speaker(lambda question: "fine", n_positions=100)  # 67 for the prompt, 12 of them its frame
    done = typed(monkeypatch, model, "/system Be kind.", "/system " + "long " * 20, "?", "why " * 9)
    assert done.out == "fine\n" and "Be kind." in BYTES.decode(model.cache.rows[0])
    too_long, both = done.err.splitlines()
    assert too_long == "error: the system message takes 108 tokens and there is room for 55; shorten it"
    assert both == (
        "error: the system message takes 17 tokens and the last message 42, and there is room for 55 "
        "together; shorten the last message to 38 tokens"
    )


def test_help_names_every_command(monkeypatch):
    done = typed(monkeypatch, speaker(lambda question: "x"), "/help")
    assert [line.split()[0] for line in done.out.splitlines() if line[0] == "/"] == [
        "/reset",
        "/system",
        "/save",
        "/help",
    ]


def test_nothing_that_was_not_answered_is_remembered(monkeypatch, tmp_path):
    model = speaker(lambda question: "good" if question == "b" else [SPECIAL["<|im_end|>"]])
    typed(monkeypatch, model, "a", "b", "c", f"/save {tmp_path}/it")
    assert [turn["role"] for turn in read(tmp_path / "it")[0][0]] == ["user", "assistant"]


def test_a_model_cannot_steer_the_terminal(monkeypatch):
    evil = "\033]52;c;aGk=\007\033[2J\x9b31m\r\x08{text}"
    done = typed(monkeypatch, speaker(lambda question: evil), "?")
    assert done.out == "\ufffd]52;c;aGk=\ufffd\ufffd[2J\ufffd31m\ufffd\ufffd{text}\n"


def test_random_weights_talk_too(monkeypatch):
    done = typed(monkeypatch, random_model(), "hello", "you", "x" * 60, max_tokens=40)
    assert len(done.out.splitlines()) >= 3 and not done.err


TERMINAL = """
import fcntl, signal, sys, termios, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # who started the tests may have had it ignored
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # from now on Ctrl-C reaches this process
sys.path[:0] = {paths!r}
import sample, test_talk as t
answer = lambda question: t.ANSWER if question == "sum" else "z" * 400
sample.chat(t.speaker(answer, before=lambda: time.sleep(0.01)), t.BYTES, tools=t.TOOLS, temperature=0.0)
print("the end")
"""


def test_a_terminal_has_prompts_colours_and_ctrl_c():
    tests = Path(__file__).parent
    code = TERMINAL.format(paths=[str(tests.parent), str(tests)])
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {
        "TERM": "xterm"
    }
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    screen, read = "", 0

    def until(text, again=b""):
        nonlocal screen, read
        deadline = time.monotonic() + 120
        while text not in screen[read:]:
            assert time.monotonic() < deadline, screen
            os.write(ours, again)
            if select.select([ours], [], [], 1)[0]:
                screen += os.read(ours, 10_000).decode()
        read = screen.index(text, read) + len(text)

    try:
        until("> ")
        assert "/reset" in screen  # the help comes first
        os.write(ours, b"sum\n")
        until("It is 51")
        assert "\033[2m[calc 3*17\033[0m\033[2m → 51] \033[0mIt is 51" in screen
        until("> ")
        os.write(ours, b"more\n")
        until("zzzz")
        os.write(ours, b"\x03")
        until("> ")
        assert screen.count("z") < 300
        os.write(ours, b"forget this")
        until("forget this")
        until("Ctrl-D", again=b"\x03")  # the first may fall between two of readline's looks at the keyboard
        until("> ")
        os.write(ours, b"sum\n")
        until("It is 51")
        until("> ")
        os.write(ours, b"\x04")
        until("the end")
        assert child.wait(10) == 0
    finally:
        child.kill()
        child.wait()
        os.close(ours)
