"""The chat format, held to masks written out by hand; and what no conversation may do: smuggle in a special
token, lose an id that the model said, or leave a tool without an answer."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenizer
from common import UserError
from sample import Host
from tasks.conversations import read
from tokenizer import CHAT_TOKENS, EOT, Tokenizer, checked, text_of

BYTES = Tokenizer.bytes()
# A vocabulary with some words of several letters, so that a text can be cut in more than one way.
WORDS = Tokenizer.train(["user", "assistant", "hel", "hello", " + 2", " hello", "3 * 17", "calc"], 289)
SPECIAL = [EOT, *CHAT_TOKENS]


def user(text):
    return {"role": "user", "content": text}


def assistant(*content):
    """An assistant's turn: a text, or parts as (type, text)."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "assistant", "content": content[0]}
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in content]}


def system(text):
    return {"role": "system", "content": text}


# ------------------------------------------------------------------------------------------------------------
# Golden masks

E, S, P, I = EOT, "<|im_start|>", "<|im_sep|>", "<|im_end|>"
CALC, END_CALC, SEARCH, END_SEARCH = "<|calc_start|>", "<|calc_end|>", "<|search_start|>", "<|search_end|>"
OUT, END_OUT = "<|output_start|>", "<|output_end|>"


def letters(text, mask):
    """Shorthand for a text of which every letter is a token with this mask."""
    return [(letter, mask) for letter in text]


GOLDEN = {
    "nothing": ([], [(E, 0)]),
    "one question and its answer": (
        [user("Hi"), assistant("Yo!")],
        [
            *[(E, 0), (S, 0), *letters("user", 0), (P, 0), ("H", 0), ("i", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), ("Y", 1), ("o", 1), ("!", 1), (I, 1)],
        ],
    ),
    "a system message": (
        [system("Be brief"), user("A?"), assistant("B")],
        [
            *[(E, 0), (S, 0), *letters("system", 0), (P, 0), *letters("Be brief", 0), (I, 0)],
            *[(S, 0), *letters("user", 0), (P, 0), ("A", 0), ("?", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), ("B", 1), (I, 1)],
        ],
    ),
    "several turns": (
        [user("2+2"), assistant("4"), user("2*2"), assistant("4")],
        [
            *[(E, 0), (S, 0), *letters("user", 0), (P, 0), ("2", 0), ("+", 0), ("2", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), ("4", 1), (I, 1)],
            *[(S, 0), *letters("user", 0), (P, 0), ("2", 0), ("*", 0), ("2", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), ("4", 1), (I, 1)],
        ],
    ),
    "a call of the calculator and its output": (
        [user("?"), assistant(("calc", "3*17"), ("output", "51"), ("text", "51."))],
        [
            *[(E, 0), (S, 0), *letters("user", 0), (P, 0), ("?", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0)],
            *[(CALC, 1), ("3", 1), ("*", 1), ("1", 1), ("7", 1), (END_CALC, 1)],
            *[(OUT, 0), ("5", 0), ("1", 0), (END_OUT, 0), ("5", 1), ("1", 1), (".", 1), (I, 1)],
        ],
    ),
    "a search in the middle of words": (
        [user("?"), assistant(("text", "So "), ("search", "Oz"), ("output", "no"), ("text", " no"))],
        [
            *[(E, 0), (S, 0), *letters("user", 0), (P, 0), ("?", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), ("S", 1), ("o", 1), (" ", 1)],
            *[(SEARCH, 1), ("O", 1), ("z", 1), (END_SEARCH, 1), (OUT, 0), ("n", 0), ("o", 0), (END_OUT, 0)],
            *[(" ", 1), ("n", 1), ("o", 1), (I, 1)],
        ],
    ),
    "two calls and nothing more to say": (
        [assistant(("calc", "1"), ("output", "1"), ("calc", ""), ("output", ""))],
        [
            *[(E, 0), (S, 0), *letters("assistant", 0), (P, 0)],
            *[(CALC, 1), ("1", 1), (END_CALC, 1), (OUT, 0), ("1", 0), (END_OUT, 0)],
            *[(CALC, 1), (END_CALC, 1), (OUT, 0), (END_OUT, 0), (I, 1)],
        ],
    ),
    "an empty answer": (
        [user("?"), assistant("")],
        [
            *[(E, 0), (S, 0), *letters("user", 0), (P, 0), ("?", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), (I, 1)],
        ],
    ),
    "a question without an answer": (
        [user("?")],
        [(E, 0), (S, 0), *letters("user", 0), (P, 0), ("?", 0), (I, 0)],
    ),
    "a user who types special tokens": (
        [user("<|im_end|>"), assistant("<|calc_start|>")],
        [
            *[(E, 0), (S, 0), *letters("user", 0), (P, 0), *letters("<|im_end|>", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), *letters("<|calc_start|>", 1), (I, 1)],
        ],
    ),
    "white space stays": (
        [user(" a\n"), assistant("\n b ")],
        [
            *[(E, 0), (S, 0), *letters("user", 0), (P, 0), (" ", 0), ("a", 0), ("\n", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), ("\n", 1), (" ", 1), ("b", 1), (" ", 1), (I, 1)],
        ],
    ),
    "parts of a user": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [(E, 0), (S, 0), *letters("user", 0), (P, 0), ("a", 0), ("b", 0), (I, 0)],
    ),
    "truncated: the oldest turns gone, the system message kept": (
        [
            *BYTES.fit([system("S"), user("1"), assistant("2"), user("3")], 1 + 10 + 8 + 11),
            assistant("4"),
        ],
        [
            *[(E, 0), (S, 0), *letters("system", 0), (P, 0), ("S", 0), (I, 0)],
            *[(S, 0), *letters("user", 0), (P, 0), ("3", 0), (I, 0)],
            *[(S, 0), *letters("assistant", 0), (P, 0), ("4", 1), (I, 1)],
        ],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(name):
    conversation, golden = GOLDEN[name]
    tokens, mask = BYTES.render(conversation)
    id_of = lambda text: BYTES.special_tokens[text] if len(text) > 1 else ord(text)
    assert list(zip(tokens, mask, strict=True)) == [(id_of(text), said) for text, said in golden]


def test_tokens_of_several_letters():
    """The same with a vocabulary that merges: a part is encoded for itself, not glued to its neighbour."""
    tokens, mask = WORDS.render(
        [user("hello"), assistant(("text", "hel"), ("text", "lo"), ("calc", "2 + 2"))]
    )
    names = {id: name for name, id in WORDS.special_tokens.items()}
    shown = [(names.get(id) or WORDS.decode([id]), said) for id, said in zip(tokens, mask, strict=True)]
    assert shown == [
        *[(E, 0), (S, 0), ("user", 0), (P, 0), ("hello", 0), (I, 0)],
        *[(S, 0), ("assistant", 0), (P, 0), ("hel", 1), ("lo", 1)],
        *[(CALC, 1), ("2", 1), (" +", 1), (" 2", 1), (END_CALC, 1), (I, 1)],
    ]


# ------------------------------------------------------------------------------------------------------------
# What users type

pieces = st.sampled_from([*SPECIAL, "<|", "|>", "<", ">", " ", "\n", "é", "calc", "hello"])
spelled = st.lists(pieces | st.text(max_size=3), max_size=5).map("".join)


@given(spelled, st.sampled_from(["system", "user", "assistant"]), st.sampled_from([BYTES, WORDS]))
def test_no_text_becomes_a_special_token(text, role, tokenizer):
    tokens, _ = tokenizer.render([{"role": role, "content": text}])
    special = [id for id in tokens if id >= tokenizer.eot]
    assert special == [tokenizer.special_tokens[name] for name in (E, S, P, I)]
    inside = tokens[tokens.index(special[2]) + 1 : -1]
    assert inside == tokenizer.encode(text)


@given(spelled, spelled)
def test_no_call_nor_output_has_another_special_token_inside(call, output):
    tokens, mask = BYTES.render([assistant(("search", call), ("output", output))])
    names = [E, S, P, SEARCH, END_SEARCH, OUT, END_OUT, I]
    assert [id for id in tokens if id >= BYTES.eot] == [BYTES.special_tokens[name] for name in names]
    assert sum(mask) == len(BYTES.encode(call)) + 3


def test_ids_are_for_the_assistant_alone():
    smuggled = {"type": "text", "text": "a", "ids": [BYTES.special_tokens[I]]}
    assert BYTES.render([{"role": "user", "content": [smuggled]}]) == BYTES.render([user("a")])


@pytest.mark.parametrize("kind", ["calc", "search", "output"])
@pytest.mark.parametrize("role", ["user", "system"])
def test_only_the_assistant_calls_tools(role, kind):
    with pytest.raises(UserError, match=f"a {role} turn has a part of type '{kind}'"):
        BYTES.render([{"role": role, "content": [{"type": kind, "text": "1"}]}])


def test_a_model_without_chat_tokens_is_refused():
    base = Tokenizer("bytes", BYTES.ranks, chat=False)
    for call in (base.prompt, base.render, lambda turns: base.fit(turns, 9)):
        with pytest.raises(UserError, match=r"no chat tokens; .*sft\.py"):
            call([user("a")])


# ------------------------------------------------------------------------------------------------------------
# From tokens back to parts


def reply_ids(tokenizer, turn):
    """The ids that a model says for this turn."""
    return tokenizer.render([turn])[0][len(tokenizer.prompt([])) :]


def shown(part):
    """A part as decode() shows its tokens."""
    kind, text = part["type"], part["text"]
    return text if kind == "text" else f"<|{kind}_start|>{text}<|{kind}_end|>"


@given(st.lists(st.integers(0, WORDS.vocab_size - 1)), st.booleans())
def test_what_a_model_said_is_rendered_to_the_ids_it_said(ids, ends):
    end = WORDS.special_tokens[I]
    ids = [id for id in ids if id not in (WORDS.eot, end)]
    parts = WORDS.parts(ids + [end] * ends)
    again = reply_ids(WORDS, {"role": "assistant", "content": json.loads(json.dumps(parts))})
    assert again == [*ids, end]
    if not any("ids" in part for part in parts):
        assert "".join(map(shown, parts)) == WORDS.decode(ids)


some_parts = st.lists(st.tuples(st.sampled_from(["text", "calc", "search", "output"]), spelled), max_size=5)


@given(some_parts, st.sampled_from([BYTES, WORDS]))
def test_parts_of_a_rendered_turn_are_the_parts_that_were_rendered(content, tokenizer):
    alone = []  # without empty texts, and without one text after another: nothing would tell them apart
    for kind, text in content:
        if kind != "text" or (text and not (alone and alone[-1][0] == "text")):
            alone.append((kind, text))
    found = tokenizer.parts(reply_ids(tokenizer, assistant(*alone)))
    assert found == [{"type": kind, "text": text} for kind, text in alone]


def spell(*tokens):
    """Ids from texts and names of special tokens."""
    ids = []
    for text in tokens:
        ids += [BYTES.special_tokens[text]] if text in SPECIAL else text.encode()
    return ids


@pytest.mark.parametrize(
    "ids, expected",
    [
        (spell("Hi", I), [("text", "Hi")]),
        (spell("Hi", EOT), [("text", "Hi")]),
        (spell("Hi"), [("text", "Hi")]),
        (spell(), []),
        (spell(I), []),
        (spell(CALC, "1+", I), [("calc", "1+", spell(CALC, "1+"))]),  # never closed
        (spell(CALC, "1+"), [("calc", "1+", spell(CALC, "1+"))]),
        (spell("a", CALC), [("text", "a"), ("calc", "", spell(CALC))]),
        (spell(CALC, "1", END_CALC, END_SEARCH, "2"), [("calc", "1"), ("text", END_SEARCH + "2", ...)]),
        (spell(CALC, "1", END_SEARCH), [("calc", "1", spell(CALC, "1")), ("text", END_SEARCH, ...)]),
        (spell(CALC, "1", SEARCH, "2", END_SEARCH), [("calc", "1", spell(CALC, "1")), ("search", "2")]),
        (spell("a", END_CALC, "b", P, S), [("text", f"a{END_CALC}b{P}{S}", ...)]),
        (spell("a", I, "b", I), [("text", f"a{I}b", spell("a", I, "b"))]),
        ([0xC3, *spell(I)], [("text", "\ufffd", [0xC3])]),
    ],
)  # fmt: skip
def test_parts_of_what_no_conversation_has(ids, expected):
    """A third entry: the ids that the part keeps; `...` for any."""
    found = BYTES.parts(ids)
    assert [(part["type"], part["text"]) for part in found] == [entry[:2] for entry in expected]
    for part, (_, _, *kept) in zip(found, expected):
        assert ("ids" in part) == bool(kept)
        assert kept in ([], [...]) or part["ids"] == kept[0]


def test_words_in_unusual_pieces_keep_their_ids():
    ids = [*b"hello"]
    assert WORDS.encode("hello") != ids
    assert WORDS.parts(ids) == [{"type": "text", "text": "hello", "ids": ids}]
    call = [WORDS.special_tokens[CALC], *b"3 * 17", WORDS.special_tokens[END_CALC]]
    assert WORDS.parts(call) == [{"type": "calc", "text": "3 * 17", "ids": call}]


def test_text_of_is_the_words():
    turn = assistant(("text", "It "), ("calc", "1+1"), ("output", "2"), ("text", "is 2"), ("search", "x"))
    assert text_of(turn["content"]) == "It is 2"
    assert text_of("plain") == "plain" and text_of([]) == ""


# ------------------------------------------------------------------------------------------------------------
# A context that is too small

turn = st.tuples(st.sampled_from(["user", "assistant", "system"]), st.integers(0, 9))
turns = st.lists(turn.map(lambda one: {"role": one[0], "content": "x" * one[1]}), min_size=1, max_size=9)


@given(turns, st.integers(0, 150))
def test_fit_drops_the_oldest_turns_and_no_more_than_needed(conversation, room):
    starts = [0, *(i for i, turn in enumerate(conversation) if turn["role"] == "user")]
    for start in starts:
        kept = [turn for i, turn in enumerate(conversation) if i >= start or turn["role"] == "system"]
        if len(BYTES.prompt(kept)) <= room:
            assert BYTES.fit(conversation, room) == kept
            return
    with pytest.raises(UserError) as caught:
        BYTES.fit(conversation, room)
    parts = [turn for turn in kept if turn["role"] == "system"], [t for t in kept if t["role"] != "system"]
    frame = len(BYTES.prompt([]))
    n_system, n_last = (len(BYTES.prompt(part)) - frame for part in parts)
    words = [f"the system message takes {n_system} tokens"] * (n_system > 0)
    words += [f"last message {'' if n_system else 'takes '}{n_last}"] * (n_last > 0)
    words += [f"there is room for {room - frame}", "shorten"]
    assert all(word in str(caught.value) for word in words), (words, caught.value)


@pytest.mark.parametrize(
    "n_system, n_last, why",
    [
        (90, 0, "the system message takes 90 tokens and there is room for 60; shorten it"),
        (0, 90, "the last message takes 90 tokens and there is room for 60; shorten it"),
        (90, 9, "room for 60 together; shorten the system message to 51 tokens"),
        (9, 90, "room for 60 together; shorten the last message to 51 tokens"),
        (70, 61, "room for 60 together; shorten both"),
    ],
)
def test_the_message_that_is_too_long_is_the_one_that_is_blamed(n_system, n_last, why):
    assert tokenizer.what_is_too_long(n_system, n_last, 60).endswith(why)


def test_fit_keeps_the_system_message_and_the_last_question():
    conversation = [system("s"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert BYTES.fit(conversation, 1000) == conversation
    shortest = [system("s"), user("e")]
    assert BYTES.fit(conversation, len(BYTES.prompt(shortest))) == shortest
    with pytest.raises(UserError, match="shorten the system message to 9 tokens"):
        BYTES.fit(conversation, len(BYTES.prompt(shortest)) - 1)


# ------------------------------------------------------------------------------------------------------------
# Tools


def answer(*tokens, tools=None):
    """What the host says to a reply so far, as text."""
    tools = {"calc": lambda text: f"[{text}]", "search": lambda text: f"({text})"} if tools is None else tools
    ids = Host(BYTES, tools).reply(SimpleNamespace(ids=spell(*tokens)))
    return ids if ids is None else BYTES.decode(ids)


@pytest.mark.parametrize(
    "tokens, output",
    [
        (["Hm ", CALC, "3*17", END_CALC], "[3*17]"),
        ([SEARCH, " Paris ", END_SEARCH], "( Paris )"),
        ([CALC, END_CALC], "[]"),
        ([CALC, "1", END_CALC, OUT, "1", END_OUT, "so ", CALC, "2", END_CALC], "[2]"),
        ([CALC, "1", CALC, "2", END_CALC], "[2]"),  # the innermost
        ([END_CALC], "error: this call has no beginning"),
        (["1", END_CALC], "error: this call has no beginning"),
        ([SEARCH, "1", END_CALC], "error: this call has no beginning"),
        ([CALC, "1", END_CALC, "2", END_CALC], "error: this call has no beginning"),
        ([CALC, "1", P, "2", END_CALC], "error: this call has no beginning"),
    ],
)
def test_the_host_answers_a_call(tokens, output):
    assert answer(*tokens) == f"{OUT}{output}{END_OUT}"


@pytest.mark.parametrize("tokens", [["a"], [CALC], [CALC, "1"], [OUT], [END_OUT], [I], [EOT], [CALC, "1", I]])
def test_the_host_is_silent_otherwise(tokens):
    assert answer(*tokens) is None


def test_a_tool_that_is_not_there():
    assert answer(SEARCH, "x", END_SEARCH, tools={"calc": str}) == f"{OUT}error: no search here{END_OUT}"


def test_an_output_cannot_speak_in_special_tokens():
    ids = Host(BYTES, {"calc": lambda _: f"{END_OUT}{I}"}).reply(SimpleNamespace(ids=spell(CALC, END_CALC)))
    assert [id for id in ids if id >= BYTES.eot] == spell(OUT, END_OUT)


# ------------------------------------------------------------------------------------------------------------
# Files

GOOD = [user("Hi"), assistant("Yo")]


def lines(tmp_path, *some):
    """A JSONL file of these lines: bytes as they are, else as JSON."""
    path = tmp_path / "some.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in some)
    )
    return path


def test_read_openai_and_hugging_face(tmp_path):
    openai = {"messages": [{"role": "system", "content": ""}, *GOOD[:1], {**GOOD[1], "weight": 1}]}
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "Hi", "annotations": []}]}, GOOD[1]]
    called = [user("3*17"), assistant(("calc", "3*17"), ("output", "51"), ("text", "51"))]
    path = lines(
        tmp_path, openai, b"", {"prompt": "x", "messages": in_parts}, GOOD, b" \r", {"messages": called}
    )
    assert read(path) == (
        [GOOD, [{**GOOD[0], "content": [{"type": "text", "text": "Hi"}]}, GOOD[1]], GOOD, called],
        0,
    )
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")  # as Windows saves it
    assert read(path) == ([GOOD], 0)


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"messages": [', "no JSON (Expecting value)"),
        (b"hello", "no JSON (Expecting value)"),
        (b'["\xff"]', "no JSON ('utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "no JSON (maximum recursion depth"),
        (b"9" * 5000, "no JSON (Exceeds the limit"),
        (b"3", 'there is no list of "messages"'),
        ({"conversations": GOOD}, 'there is no list of "messages"'),
        ({"messages": {"role": "user"}}, 'there is no list of "messages"'),
        ([], "the assistant never speaks"),
        ([user("a")], "the assistant never speaks"),
        (["a"], "message 1 has the role None, which is none of system, user, assistant"),
        ([*GOOD, {"role": "tool", "content": "x"}], "message 3 has the role 'tool'"),
        ([{"role": ["user"], "content": "x"}], "message 1 has the role ['user']"),
        ([{"role": "user"}, GOOD[1]], "the content of message 1 (user) is not a text or a list of parts"),
        ([user(None), GOOD[1]], "the content of message 1 (user)"),
        ([user({"type": "text", "text": "a"}), GOOD[1]], "the content of message 1 (user)"),
        ([user([{"type": "text"}]), GOOD[1]], "the content of message 1 (user)"),
        ([user([{"type": "text", "text": 3}]), GOOD[1]], "the content of message 1 (user)"),
        ([user(["a"]), GOOD[1]], "the content of message 1 (user)"),
        ([user([{"type": "image_url", "text": "x"}]), GOOD[1]], "the content of message 1 (user)"),
        ([user([{"type": "calc", "text": "1"}]), GOOD[1]], "the content of message 1 (user)"),
        ([user([{"type": ["text"], "text": "1"}]), GOOD[1]], "the content of message 1 (user)"),
        ([user("a"), assistant(("image", "b"))], "the content of message 2 (assistant)"),
        ([user(" \n"), GOOD[1]], "message 1 (user) is empty"),
        ([user("a"), assistant("")], "message 2 (assistant) is empty"),
        ([user("a"), assistant()], "message 2 (assistant) is empty"),
    ],
)
def test_a_bad_line_is_named_or_skipped(tmp_path, line, reason):
    path = lines(tmp_path, GOOD, b"", line, GOOD)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 3: {reason}")
    assert "\n" not in str(caught.value)
    assert read(path, skip_bad=True) == ([GOOD, GOOD], 1)


keys = st.sampled_from(["role", "content", "type", "text"])
some_json = st.recursive(
    st.none() | st.integers() | st.sampled_from(["user", "assistant", "text", "calc"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)
message = st.fixed_dictionaries({"role": some_json, "content": some_json})


@given(some_json | st.lists(message, max_size=3))
def test_any_json_is_taken_or_refused(value):
    try:
        conversation = checked(value)
    except UserError:
        return
    BYTES.render(conversation)


def test_read_says_that_there_is_nothing(tmp_path):
    for path in (lines(tmp_path), lines(tmp_path, b"x")):
        with pytest.raises(UserError, match="has no conversation"):
            read(path, skip_bad=True)
    with pytest.raises(UserError, match=r"missing\.jsonl: No such file"):
        read(tmp_path / "missing.jsonl")


def test_checked_leaves_nothing_else_in(tmp_path):
    extra = [{"role": "user", "content": "a", "name": "x"}, assistant(""), user("b")]
    assert checked(extra) == [user("a"), user("b")]  # not for training: an answer may be missing
    smuggled = {"type": "text", "text": "a", "ids": [BYTES.eot]}
    assert checked([{"role": "assistant", "content": [smuggled]}]) == [assistant(("text", "a"))]


def test_what_is_rendered_is_the_example_in_the_file():
    """The example above ROLES in tokenizer.py is true."""
    example = [user("What is 3 * 17?"), assistant(("calc", "3*17"), ("output", "51"), ("text", "It is 51."))]
    shown = BYTES.decode(BYTES.render(example)[0])
    lines = Path(tokenizer.__file__).read_text(encoding="utf-8").split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("#   <|endoftext|>"))
    assert shown == "".join(line.removeprefix("#").strip() for line in lines[first : first + 2])


def test_a_message_of_weight_0_is_read_and_not_learned():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "no", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "yes", "weight": 1},
    ]
    tokenizer = Tokenizer.bytes()
    tokens, mask = tokenizer.render(checked(messages, training=True))
    assert tokenizer.decode([token for token, m in zip(tokens, mask) if m]) == "yes<|im_end|>"
    assert "no<|im_end|>" in tokenizer.decode(tokens)
