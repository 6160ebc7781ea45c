"""Constrained output: whatever a model prefers, the text has the form asked for; nothing else is forbidden.

The masks are held to two other implementations: re.fullmatch, and the regex package, which knows if a text
is the beginning of a match.
"""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import regex as partial_regex
import script
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import gpt2
import sample
from common import UserError
from extras import constrain
from extras.constrain import Guide, choices, regex
from tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
TEXT = 'yes no maybe the cat is 12 the cat is 345 {"name": "Zoë", "age": 77} élan Zürich 東京 naïve 🙂 ' * 5
BPE = Tokenizer.train([TEXT], 325)  # with tokens of several characters, and of one and a half
EITHER = pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
PERSON = r'\{"name": "[^"\\]{1,12}", "age": \d{1,3}\}'


def walk(tokenizer, automaton, max_tokens, rng):
    return wander(Guide(tokenizer, automaton, tokenizer.eot, max_tokens), rng)


def wander(guide, rng):
    """A text of tokens drawn blindly among the allowed ones; the end, where allowed, is one of them."""
    tokenizer, completion = guide.tokenizer, SimpleNamespace(ids=[])
    while len(completion.ids) < guide.max_tokens:
        mask = guide(completion)
        assert mask.shape == (tokenizer.vocab_size,) and mask.dtype == bool and mask.any()
        token = int(rng.choice(np.flatnonzero(mask)))
        if token == tokenizer.eot:
            break
        completion.ids.append(token)
    return b"".join(map(tokenizer.token_bytes, completion.ids)).decode()  # strictly: whole characters only


def texts(tokenizer, automaton, max_tokens):
    """Every text that the guide lets pass, with all ways to write it: {tuple of tokens}."""
    guide, found, todo = Guide(tokenizer, automaton, tokenizer.eot, max_tokens), set(), [()]
    while todo:
        ids = todo.pop()
        mask = guide(SimpleNamespace(ids=list(ids))) if len(ids) < max_tokens else []
        if len(ids) == max_tokens or mask[tokenizer.eot]:
            found.add(ids)
        todo += [(*ids, int(token)) for token in np.flatnonzero(mask) if token != tokenizer.eot]
    return found


def spellings(tokenizer, text, most):
    """All ways to write bytes with at most so many tokens, by trying them."""
    if not text:
        return {()}
    tokens = [text[:n] for n in range(1, len(text) + 1) if most and text[:n] in tokenizer.ranks]
    rest = {token: spellings(tokenizer, text[len(token) :], most - 1) for token in tokens}
    return {(tokenizer.ranks[token], *others) for token in tokens for others in rest[token]}


# ------------------------------------------------------------------------------------------------------------
# What is allowed is right


ATOMS = [
    "a",
    "b",
    "é",
    "東",
    "🙂",
    ".",
    r"\d",
    r"\w",
    r"\W",
    "[ \n]",
    "[a-c]",
    "[^a]",
    "[à-ÿ🙂]",
    r"[^\w ]",
    r"[\]x]",
]
ATOMS += [r"\.", r"\n", r"\x41", r"\u00e9", "[]a]", "{", "}", "]"]
patterns = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{1,3}", "{2,}", "{,2}", "*?", "{2}?"])).map(
            lambda two: f"({two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)


@EITHER
@settings(max_examples=60)
@given(pattern=patterns, max_tokens=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_every_walk_ends_in_a_match(tokenizer, pattern, max_tokens, seed):
    try:
        text = walk(tokenizer, regex(pattern), max_tokens, np.random.default_rng(seed))
    except UserError as error:
        assert "takes" in str(error)  # too few tokens for the shortest match
        assume(False)
    assert re.fullmatch(pattern, text)


@settings(max_examples=60)
@given(pattern=patterns, text=st.text("abcéß東🙂k1 ,", max_size=5))
def test_the_mask_is_exactly_the_beginnings_of_matches(pattern, text):
    guide = Guide(BPE, regex(pattern), BPE.eot, 1000)
    begun = lambda text: partial_regex.fullmatch(pattern, text, partial=True) is not None
    beginnings = [text[:n] for n in range(len(text) + 1) if begun(text[:n])]
    for beginning in beginnings:
        mask = guide(SimpleNamespace(ids=BPE.encode(beginning)))
        assert mask[BPE.eot] == bool(re.fullmatch(pattern, beginning))
        assert not mask[BPE.eot + 1 :].any()
        for id in range(BPE.eot):
            try:
                longer = beginning + BPE.token_bytes(id).decode()
            except UnicodeDecodeError:  # half a character: see the next test
                continue
            assert mask[id] == begun(longer), longer


BORDERS = [r"[\u007f-\u0080]", r"[\u07ff-\u0800]", r"[\ud7ff-\ue000]", r"[\uffff-\U00010000]", r"\U0010ffff"]


@pytest.mark.parametrize("item", [".", r"\w", r"\d", r"\W", "[^é]", "[à-é]", r"\s", r"[^\s]", *BORDERS])
def test_half_characters(item):
    """A beginning of a character is allowed if some character begins so; held to all 1.1 million of them."""
    every = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    after = {}  # a beginning of a character -> the bytes that may follow
    for character in map(str.encode, filter(re.compile(item).fullmatch, every)):
        for n in range(len(character)):
            after.setdefault(character[:n], set()).add(character[n])
    automaton = regex(item)
    some = list(after)[:: max(1, len(after) // 300)]
    for beginning in some:
        state = automaton.start
        for byte in beginning:
            state = automaton.row(state)[byte]
        assert set(np.flatnonzero(automaton.row(state) != constrain.DEAD)) == after[beginning], beginning


def test_json_digits_and_yes_or_no():
    rng = np.random.default_rng(1)
    for tokenizer in (BYTES, BPE):
        person, three, answer = (
            Guide(tokenizer, automaton, tokenizer.eot, 60)
            for automaton in (regex(PERSON), regex("[0-9]{3}"), choices(["yes", "no"]))
        )
        for _ in range(20):
            assert re.fullmatch(PERSON, wander(person, rng))
            assert re.fullmatch("[0-9]{3}", wander(three, rng))
        assert {wander(answer, rng) for _ in range(20)} == {"yes", "no"}


@EITHER
def test_choices_are_texts_and_not_expressions(tokenizer):
    wanted = ["Zürich", "東京", "東", "🙂", "a.b", "a|b", "(", "^", " the cat", "\n", "naïve\\d"]
    guide, rng = Guide(tokenizer, choices(wanted), tokenizer.eot, 20), np.random.default_rng(2)
    assert {wander(guide, rng) for _ in range(200)} == set(wanted)


def test_the_end_is_forced_where_nothing_else_is_left():
    guide = Guide(BPE, choices(["no", "not"]), BPE.eot, 10)
    allowed = lambda text: [int(id) for id in np.flatnonzero(guide(SimpleNamespace(ids=BPE.encode(text))))]
    assert allowed("not") == [BPE.eot]
    assert allowed("no") == [BPE.encode("t")[0], BPE.eot]
    assert BPE.eot not in allowed("n")


def test_special_tokens_are_no_text():
    """Their names are bytes that the expression accepts, but they are not these bytes."""
    guide = Guide(BPE, regex(".*"), BPE.special_tokens["<|im_end|>"], 10)
    mask = guide(SimpleNamespace(ids=[]))
    assert np.flatnonzero(mask[BPE.eot :]).tolist() == [BPE.special_tokens["<|im_end|>"] - BPE.eot]


# ------------------------------------------------------------------------------------------------------------
# The limit


@EITHER
@pytest.mark.parametrize("max_tokens", [2, 3, 4, 5, 7, 20])
def test_a_choice_is_possible_exactly_if_it_fits(tokenizer, max_tokens):
    """The first letters differ, so no choice hides another: the guide forbids nothing that fits."""
    wanted = ["no", "yes yes", "the cat is 12", "Zoë", "maybe"]
    expected = set().union(*(spellings(tokenizer, text.encode(), max_tokens) for text in wanted))
    assert texts(tokenizer, choices(wanted), max_tokens) == expected


def test_a_tight_limit_is_counted_in_tokens_and_not_in_bytes():
    text = "the cat is 12"
    fewest = min(map(len, spellings(BPE, text.encode(), 13)))
    assert fewest < len(text) / 2
    assert walk(BPE, choices([text]), fewest, np.random.default_rng(0)) == text
    with pytest.raises(UserError, match=f"takes {fewest} tokens, not {fewest - 1}; allow more"):
        Guide(BPE, choices([text]), BPE.eot, fewest - 1)


@pytest.mark.parametrize(
    "pattern, fewest",
    [(".", 1), ("[é東]", 2), ("東|🙂", 3), ("a{2,5}|bbb", 2), ("(a+b)*", 0), (r"(\w+,){3}x", 7)],
)
def test_the_bytes_of_the_shortest_match(pattern, fewest):
    automaton = regex(pattern)
    assert automaton.missing[automaton.start] == fewest


def test_a_longer_choice_of_fewer_tokens_fits_where_the_shortest_text_does_not():
    assert len(BPE.encode("qxz")) == 3 and len(BPE.encode(" the")) == 1
    assert texts(BPE, choices(["qxz", " the"]), 1) == {(BPE.encode(" the")[0],)}


@EITHER
def test_an_open_end_is_closed_in_time(tokenizer):
    rng = np.random.default_rng(3)
    pattern = r'\[("[\s\S]*",)+\]'
    for max_tokens in (8, 9, 12, 40):
        guide = Guide(tokenizer, regex(pattern), tokenizer.eot, max_tokens)
        for _ in range(5):
            assert re.fullmatch(pattern, wander(guide, rng))


# ------------------------------------------------------------------------------------------------------------
# A model, and the user


@pytest.mark.parametrize(
    "automaton, pattern",
    [
        (regex(r"\d{1,4}"), r"\d{1,4}"),
        (choices(["yes", "no"]), "yes|no"),
        (regex(PERSON), PERSON),
        (choices(["Zürich", "東京", "🙂"]), "Zürich|東京|🙂"),
    ],
    ids=["digits", "yes or no", "json", "utf-8"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_a_model_that_knows_nothing_writes_it(automaton, pattern, temperature):
    config = gpt2.GPT2Config(1, 2, 16, n_positions=64, vocab_size=BPE.vocab_size)
    model = gpt2.GPT2(config, seed=1)
    ended = set()
    for max_tokens in (26, 30):
        completions = sample.generate(
            model, [[BPE.eot]] * 6 + [BPE.encode("the cat")], max_tokens, temperature, seed=7,
            stop_tokens={BPE.eot}, tokenizer=BPE, allowed=Guide(BPE, automaton, BPE.eot, max_tokens),
        )  # fmt: skip
        for completion in completions:
            assert re.fullmatch(pattern, completion.text), completion.text
        ended |= {completion.finish for completion in completions}
    assert ended <= {"stop", "length"}


@pytest.mark.parametrize(
    "pattern, words",
    [
        (r"a(?=b)c", r"'\(\?=b\)c' is not supported in an expression; write it without"),
        (r"a(?<!b)", r"'\(\?<!b\)' is not"),
        (r"(?i)a", r"'\(\?i\)a' is not"),
        (r"(?P<name>a)", r"'\(\?P<name' is not"),
        (r"(a)\1", r"is not supported"),
        (r"^a", r"'\^a' is not"),
        (r"a$", r"'\$' is not"),
        (r"a\b", r"is not supported"),
        (r"\012", r"is not supported"),
        (r"\N{DIGIT ONE}", r"is not supported"),
        (r"(a)?(?(1)b|c)", r"'\(\?\(1\)b\|c' is not"),
        (r"a)", "'a\\)' is no regular expression: unbalanced"),
        (r"[b-a]", "bad character range"),
        ("(" * 5000 + ")" * 5000, "no regular expression"),
        ("a{99999999999}", "no regular expression"),
        ("(?:a{1000}){1000}", "over 10000 bytes; repeat less often"),
        ("(?:a?){60000}", "ways to go on; repeat less often"),
        ("(?:){4294967294}", "repeat less often"),
        (r"[^\s\S]", "no text has the form"),
        ("[\ud800-\udfff]", "no text has the form"),
        ("x\udcff", "no text has the form"),
    ],
)
def test_what_cannot_be_asked_for(pattern, words):
    with pytest.raises(UserError, match=words) as error:
        regex(pattern)
    assert "\n" not in str(error.value) and ";" in str(error.value)


@pytest.mark.skipif(not hasattr(re, "NOFLAG"), reason="Python 3.11 is the first that has them")
@pytest.mark.parametrize("pattern", ["(?>a|ab)c", "a*+b"])
def test_atomic_groups_are_refused(pattern):
    with pytest.raises(UserError, match=r"is not supported"):
        regex(pattern)


@pytest.mark.parametrize("wanted", [[], [""], ["yes", ""]])
def test_no_choice(wanted):
    with pytest.raises(UserError, match="an empty choice"):
        choices(wanted)


def test_an_expression_of_too_many_states_is_refused_and_not_endured(monkeypatch):
    monkeypatch.setattr(constrain, "LIMIT", 300)
    with pytest.raises(UserError, match="more than 300 states"):
        walk(BYTES, regex(".*a.{40}"), 400, np.random.default_rng(0))


def test_large_vocabularies_are_fast():
    """50,257 random tokens as long as GPT-2's. There is room for a busy machine."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlu ETAO0123456789,.:{}\"'\xc3\xa9\xe6\x9d\xb1", np.uint8)
    words = dict.fromkeys(bytes([byte]) for byte in range(256))
    while len(words) < 50_256:
        words[rng.choice(letters, min(2 + rng.geometric(0.2), 128)).tobytes()] = None
    tokenizer = Tokenizer("bpe", {word: id for id, word in enumerate(words)}, chat=False)
    assert tokenizer.vocab_size == 50_257
    for pattern in (PERSON, r".{0,200}", r"\w{1,30}"):
        automaton = regex(pattern)
        start = time.process_time()
        guide = Guide(tokenizer, automaton, tokenizer.eot, 100)  # it makes the first mask
        assert time.process_time() - start < 0.5
        start = time.process_time()
        for _ in range(10):
            guide(SimpleNamespace(ids=[]))
        assert time.process_time() - start < 10 * 0.02
        assert guide.ends.cache_info().misses == 1


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A base model and an assistant, both with random weights and a context of 48 tokens."""
    model = gpt2.GPT2(gpt2.GPT2Config(1, 2, 16, n_positions=48, vocab_size=BYTES.vocab_size), seed=1)
    places = [tmp_path_factory.mktemp(name) for name in ("base", "sft")]
    for place in places:
        model.save_pretrained(place)
        BYTES.save(place)
    (places[1] / "state.json").write_text('{"step": 1, "stage": "sft"}')
    return places


def written(*argv):
    done = script.run(constrain.main, *argv)
    assert done.status == 0, done.err
    return done.out


@pytest.mark.parametrize(
    "flag, value, form", [("--only", "yes,no", "yes|no"), ("--regex", "[a-c]{3,9}", None)]
)
def test_the_command_writes_the_form(checkpoints, flag, value, form):
    every, (base, sft) = set(), checkpoints
    for directory, prompt in ((base, "The"), (sft, "_"), (base, "x" * 44)):
        argv = [directory, flag, value, "--prompt", prompt, "--num-samples", 9, "--temperature", 1]
        samples = json.loads(written(*argv, "--json"))["samples"]
        texts = [one["text"] for one in samples]
        assert all(re.fullmatch(form or value, text) for text in texts)
        assert written(*argv).split("\n") == [*texts, ""]
        ends = {one["ids"][-1] for one in samples if one["finish"] == "stop"}
        assert ends <= {BYTES.encode_special("<|im_end|>") if directory == sft else BYTES.eot}
        every |= set(texts)
    assert len(every) > 1


def test_the_defaults_of_the_command(checkpoints):
    settings = lambda *argv: json.loads(written(*argv, "--only", "a", "--json"))["settings"]
    base, sft = checkpoints
    assert [settings(sft)["temperature"], settings(sft, "--num-samples", 2)["temperature"]] == [0.3, 0.8]
    assert settings(base)["temperature"] == 0.8 and settings(base, "--seed", 7)["seed"] == 7


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "yes,,no"], "an empty choice"),
        (["--regex", "("], "is no regular expression"),
        (["--regex", "a{300}"], "takes 300 tokens, not 48; the prompt leaves no more of the model's context"),
        (["--regex", "a{30}", "--prompt", "x" * 20], "takes 30 tokens, not 28; the prompt leaves no more"),
        (["--regex", "a{30}", "--max-tokens", "29"], "takes 30 tokens, not 29; raise --max-tokens"),
        (["--only", "a", "--regex", "b"], "not allowed with"),
        ([], "--only --regex"),
        (["--prompt", "x" * 60, "--only", "yes,no"], "the prompt has 61 tokens"),
    ],
)
def test_what_the_person_can_put_right_is_one_line(checkpoints, flags, words):
    assert script.refused(script.run(constrain.main, checkpoints[0], *flags), words)
