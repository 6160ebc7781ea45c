r"""Output of a given form: digits, yes or no, a JSON object. Tokens that would break the form are masked.

    guide = Guide(tokenizer, regex(r'{"age": \d{1,3}}'), stop_token=tokenizer.eot, max_tokens=20)
    sample.generate(model, prompts, max_tokens=20, allowed=guide, stop_tokens={tokenizer.eot}, ...)

An automaton reads the text byte by byte and knows in which places of the expression it may have arrived. A
token is allowed if its bytes lead on from there, and if what is then missing fits into the tokens left: every
text ends as a match, at the limit too. Read tokenizer.py first, and sample.py, which draws the tokens.
"""

import functools
import re
from types import SimpleNamespace

import numpy as np

from common import UserError

try:
    from re import _compiler, _parser
except ImportError:  # Python 3.10
    import sre_compile as _compiler
    import sre_parse as _parser

LIMIT = 50_000  # parts of an expression; and states, 1 kB each: what people write has some hundreds
NEVER = 2**40  # so many bytes are missing where nothing leads to a match
UNKNOWN, DEAD = 0, 1  # states: not computed yet; no match begins like this
END = 0  # the place after the expression

# UTF-8: which code points [low, high) a byte may say, and how many of them the next bytes still tell apart;
# for a character's first byte (no surrogate, nothing that a shorter one says), then for the bytes after it.
WHOLE = 0x110000
SAYS = {WHOLE: [(i, i, i + 1, 1) for i in range(128)]}
SAYS[WHOLE] += [(0xC0 + i, i << 6, (i + 1) << 6, 64) for i in range(2, 32)]
SAYS[WHOLE] += [(0xE0 + i, i << 12 or 0x800, 0xD800 if i == 13 else (i + 1) << 12, 64**2) for i in range(16)]
SAYS[WHOLE] += [(0xF0 + i, i << 18 or 0x10000, (i + 1) << 18, 64**3) for i in range(5)]
SAYS |= {64 * n: [(128 + i, i * n, (i + 1) * n, n) for i in range(64)] for n in (1, 64, 64**2)}


def choices(texts):
    """The automaton of these texts."""
    if not texts or "" in texts:
        raise UserError("an empty choice; name one text or more, none of them empty")
    return regex("|".join(map(re.escape, texts)))


def regex(pattern):
    """The automaton of the texts that re.fullmatch(pattern, text) accepts."""
    try:
        tree = _parser.parse(pattern)
        return Automaton(tree, tree.state.flags)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}; see Python's module re") from None


@functools.cache
def code_points(op, value, flags):
    r"""The ranges [low, high) of what an item of an expression matches, such as \w, [^"] or a letter."""
    if op is _parser.LITERAL and not flags & re.IGNORECASE:
        return ((value, value + 1),)
    state = _parser.State()
    state.flags, state.str = flags, ""
    runs = _parser.MAX_REPEAT, (1, _parser.MAXREPEAT, _parser.SubPattern(state, [(op, value)]))
    runs = _compiler.compile(_parser.SubPattern(state, [runs])).finditer(every_character())
    return tuple(run.span() for run in runs)  # `re` has said it; a character's place is its code point


@functools.cache
def every_character():
    return np.arange(WHOLE, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


@functools.cache
def first_bytes(size, ranges):
    """How one of `size` code points may begin if it lies in `ranges`: [(byte, size and ranges left), ...]."""
    found = []
    for byte, low, high, part in SAYS[size]:
        base = low - low % part
        left = tuple((max(a, low) - base, min(b, high) - base) for a, b in ranges if a < high and low < b)
        found += [(byte, part, left)] if left else []
    return found


class Automaton:
    """First a graph of places, made from the expression as `re` parses it; then states, as texts reach them.

    A place is (size, ranges, next place), which reads a character or the rest of one, or a list of places,
    which is a fork and reads nothing. A state is the set of all places in which a text may be.
    """

    def __init__(self, tree, flags):
        self.places, self.numbers = [[]], {}  # number -> place, the first is END; and back
        self.distances = [0]  # place -> fewest bytes to END
        self.sets, self.states = [None, frozenset()], {frozenset(): DEAD}  # state -> set of places; and back
        self.table = np.zeros((LIMIT, 256), np.int32)  # state, byte -> state; takes memory only where written
        self.missing = np.full(LIMIT, NEVER)  # state -> bytes of the shortest text that makes it a match
        self.parts = 0
        self.start = self.state([self.build(tree, flags, END)])
        if self.start == DEAD:
            raise UserError("no text has the form that is asked for; ask for another")

    def build(self, tree, flags, after):
        """The place from which `tree` leads to the place `after`: built from its end, as this is there."""
        self.parts += 1
        if self.parts > LIMIT:
            raise UserError(f"the expression has more than {LIMIT} parts; repeat less often")
        for op, value in reversed(tree):
            if op in (_parser.LITERAL, _parser.NOT_LITERAL, _parser.ANY, _parser.IN):
                ranges = code_points(op, tuple(value) if op is _parser.IN else value, flags)
                after = self.character(WHOLE, ranges, after)
            elif op is _parser.BRANCH:
                after = self.fork([self.build(branch, flags, after) for branch in value[1]])
            elif op is _parser.SUBPATTERN:
                after = self.build(value[3], _compiler._combine_flags(flags, *value[1:3]), after)
            elif op in (_parser.MAX_REPEAT, _parser.MIN_REPEAT):
                (low, high, part), place = value, after
                if high is _parser.MAXREPEAT:  # a loop, and going round it never shortens the way
                    place, high = self.fork([after]), low
                    self.places[place].append(self.build(part, flags, place))
                for n in range(high, 0, -1):
                    begin = self.build(part, flags, place)
                    place = begin if n <= low else self.fork([after, begin])
                after = place
            else:
                names = {"AT": "an anchor (it says nothing new)", "GROUPREF": "a reference to a group"}
                name = names.get(str(op), "a look-around" if "ASSERT" in str(op) else str(op).lower())
                raise UserError(f"{name} is not supported in the expression; write it without")
        return after

    def fork(self, places):
        self.places.append(places)
        self.distances.append(min(self.distances[place] for place in places))
        return len(self.places) - 1

    def character(self, size, ranges, after):
        if size == 1:
            return after
        key = size, ranges, after
        if key not in self.numbers:
            self.numbers[key] = len(self.places)
            self.places.append(key)
            lengths = [1 + part.bit_length() // 6 for _, part, _ in first_bytes(size, ranges)]
            self.distances.append(min(lengths, default=NEVER) + self.distances[after])
        return self.numbers[key]

    def state(self, places):
        """The number of the state of a text that may be in any of these places."""
        found, todo = set(), list(places)
        while todo:
            place = todo.pop()
            if place not in found and self.distances[place] < NEVER:
                found.add(place)
                todo += self.places[place] if isinstance(self.places[place], list) else []
        key = frozenset(found)
        if key not in self.states:
            if len(self.sets) == LIMIT:
                raise UserError(f"the expression leads to more than {LIMIT} states; write a simpler one")
            self.states[key] = len(self.sets)
            self.missing[len(self.sets)] = min(self.distances[place] for place in key)
            self.sets.append(key)
        return self.states[key]

    def row(self, state):
        """The states (256,) to which the bytes lead."""
        if self.table[state, 0] == UNKNOWN:
            moves = [set() for _ in range(256)]
            for place in map(self.places.__getitem__, self.sets[state]):
                for byte, *rest in first_bytes(*place[:2]) if isinstance(place, tuple) else []:
                    moves[byte].add(self.character(*rest, place[2]))
            moves = list(map(frozenset, moves))
            states = {places: self.state(places) for places in set(moves)}
            self.table[state] = [states[places] for places in moves]
        return self.table[state]


class Guide:
    """Which tokens may come next: guide(completion) is the mask (V,) for sample.generate(allowed=guide).

    `max_tokens` is the room for a completion: what is asked for, or less in a model's small context. The stop
    token needs none of it, since generate() ends there by itself.
    """

    def __init__(self, tokenizer, automaton, stop_token, max_tokens):
        self.tokenizer, self.automaton = tokenizer, automaton
        self.stop_token, self.max_tokens = stop_token, max_tokens
        self.lengths = tokenizer.token_lengths[: tokenizer.eot]  # (n,) bytes of each, without special tokens
        words = np.array([tokenizer.token_bytes(id) for id in range(tokenizer.eot)])
        self.bytes = words.view(np.uint8).reshape(len(words), -1)  # (n, longest)
        self.ends = functools.lru_cache(256)(self.find_ends)  # 200 kB each for 50,257 tokens
        if not self(SimpleNamespace(ids=[])).any():
            needed = self.tokens_left(automaton.start)
            raise UserError(
                f"a shortest text of this form takes {needed} tokens, not {max_tokens}; allow more"
            )

    def __call__(self, completion):
        state, missing = self.automaton.start, self.automaton.missing
        for token in completion.ids:
            for byte in self.tokenizer.token_bytes(token):
                state = self.automaton.row(state)[byte]
        ends, left = self.ends(state), self.max_tokens - len(completion.ids) - 1  # (V,), after the next token
        fits = missing[: len(self.automaton.sets)] <= left  # of states; surely, as every byte is a token
        for close in np.flatnonzero(np.bincount(ends, minlength=len(fits)) * ~fits):
            fits[close] = self.tokens_left(close) <= left
        mask = fits[ends]  # (V,)
        mask[self.stop_token] = missing[state] == 0
        return mask

    def find_ends(self, state):
        """The states (V,) to which the tokens lead: all tokens at once, byte after byte."""
        ends = np.full(self.tokenizer.vocab_size, DEAD, np.int32)
        tokens, states = np.arange(len(self.lengths)), np.full(len(self.lengths), state)  # those not dead yet
        for i in range(self.bytes.shape[1]):
            for reached in np.flatnonzero(np.bincount(states)):
                self.automaton.row(reached)
            states = self.automaton.table[states, self.bytes[tokens, i]]
            over = self.lengths[tokens] == i + 1
            ends[tokens[over]] = states[over]
            going = ~over & (states != DEAD)
            tokens, states = tokens[going], states[going]
        return ends

    def tokens_left(self, state):
        """The fewest tokens that write the shortest text that makes it a match (of several, the first)."""
        text, costs, missing = b"", [0], self.automaton.missing
        while 0 < missing[state] < NEVER:
            row = self.automaton.row(state)
            byte = missing[
                row
            ].argmin()  # the first of the best: one byte on, the same way is again the first
            text, state = text + bytes([byte]), row[byte]
        for i in reversed(range(len(text))):  # costs: of text[i:], text[i + 1:], ..., text[len(text):]
            ends = zip(range(i + 1, i + 1 + self.bytes.shape[1]), costs)  # no token is longer
            words = [cost for n, cost in ends if text[i:n] in self.tokenizer.ranks]
            costs.insert(0, 1 + min(words))
        return NEVER if missing[state] else costs[0]
