r"""Constrained sampling: the text has the form you ask for, such as yes or no, digits, or a JSON object.

    python -m extras.constrain RUN --prompt "Is 7 prime?" --only yes,no
    python -m extras.constrain RUN --prompt "Ann: " --regex '\{"age": \d{1,3}\}'

Before a token is sampled, all tokens that would break the form are masked: sample.generate(allowed=guide). An
automaton reads the text byte by byte. A token is allowed if the automaton survives its bytes, and if what is
then missing to a match fits into the tokens that are left. So every text ends as a match, at the limit too,
unless --stop ends it earlier.

An expression may have literals, escapes (\d \w \s \. \n \x41 \u00e9), the dot, classes ([a-z], [^"]), groups
( ) and (?: ), alternatives a|b, and repeats * + ? {3} {1,3} {2,}, which mean what they mean in Python's `re`.
Read tokenizer.py and sample.py before this file.
"""

import functools
import json
import re
from types import SimpleNamespace

import numpy as np

import sample
from common import Parser, UserError, printable, run

LIMIT = 50_000  # states of an automaton, 1 kB each; usual are some hundreds
LONGEST = 10_000  # bytes of a shortest match
NEVER = 2**40  # the number of missing bytes where no match can be reached
UNKNOWN, DEAD = 0, 1  # states: not computed yet; no match begins like this

# ------------------------------------------------------------------------------------------------------------
# From an expression to a sequence: a tuple of items, to be read one after the other. An item is one of
#     ("one", n, ranges)                   a character in ranges, of which n bytes are missing
#     ("either", sequences)                one of them
#     ("repeat", sequence, least, most)    most is None if there is no limit

LEAD = 4  # as n: no byte of the character has been read
CHARACTER = re.compile(
    r"\\(?:x[\da-fA-F]{2}|u[\da-fA-F]{4}|U[\da-fA-F]{8}|[dDsSwWnrtfva]|\W)"  # an escape
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]"  # a class
    r"|[^\\()\[|*+?^$]",  # a dot or a literal
    re.DOTALL,
)
REPEAT = re.compile(r"(?:([*+?])|\{(?!\})(\d*)(,?)(\d*)\})\??")  # a lazy one, *?, matches the same texts


def parse_alternatives(pattern, i):
    """The item of a|b|c from index i on, and the index where it ends: at a bracket or the pattern's end."""
    branches = [()]
    while i < len(pattern) and pattern[i] != ")":
        if pattern[i] == "|":
            branches.append(())
            i += 1
        else:
            item, i = parse_item(pattern, i)
            branches[-1] += (item,)
    return ("either", tuple(branches)), i


def parse_item(pattern, i):
    """The item of one character or group and its repeat, and the index behind it. `re` has accepted the
    pattern, so brackets match and repeats have something to repeat."""
    character = CHARACTER.match(pattern, i)
    if character:
        item, i = ("one", LEAD, code_points(character[0])), character.end()
    elif pattern.startswith("(?:", i) or (pattern[i] == "(" and pattern[i + 1] != "?"):
        item, end = parse_alternatives(pattern, i + 3 if pattern[i + 1] == "?" else i + 1)
        i = end + 1
    else:
        raise UserError(f"{pattern[i : i + 8]!r} is not supported in an expression; write it without")
    repeat = REPEAT.match(pattern, i)
    if repeat is None:
        return item, i
    if pattern.startswith("+", repeat.end()):
        raise UserError(f"{repeat[0] + '+'!r} is not supported in an expression; write it without")
    sign, least, comma, most = repeat.groups()
    if sign:
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
    else:
        most = least if not comma else most
        least, most = int(least or 0), int(most) if most else None
    return ("repeat", (item,), least, most), repeat.end()


@functools.cache
def code_points(item):
    r"""The ranges [low, high) of code points that an item such as \w, [^"] or a matches, as `re` says."""
    runs = re.compile(f"(?:{item})+").finditer(every_character())
    return tuple(run.span() for run in runs)  # the index of a character in that text is its code point


@functools.cache
def every_character():
    return np.arange(0x110000, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")


# ------------------------------------------------------------------------------------------------------------
# From code points to bytes, those of UTF-8. FOLLOWING[n] lists the bytes that may come when n bytes of a
# character are missing, without surrogates and forms longer than needed. An entry is (byte, low, high, bytes
# missing after it), where [low, high) are the code points that the byte leaves possible.

FOLLOWING = {n: [(0x80 + i, i << 6 * n - 6, i + 1 << 6 * n - 6, n - 1) for i in range(64)] for n in (1, 2, 3)}
FOLLOWING[LEAD] = [(i, i, i + 1, 0) for i in range(0x80)]
FOLLOWING[LEAD] += [(0xC0 + i, i << 6, i + 1 << 6, 1) for i in range(2, 32)]
FOLLOWING[LEAD] += [(0xE0 + i, i << 12 or 0x800, 0xD800 if i == 13 else i + 1 << 12, 2) for i in range(16)]
FOLLOWING[LEAD] += [(0xF0 + i, i << 18 or 0x10000, i + 1 << 18, 3) for i in range(5)]


@functools.cache
def next_bytes(n, ranges):
    """[(byte, bytes missing after it, ranges after it), ...] of a character of which n bytes are missing.

    Ranges count from the first code point that the bytes read so far can begin.
    """
    found = []
    for byte, low, high, n_after in FOLLOWING[n]:
        base = low - low % 64**n_after
        left = tuple((max(a, low) - base, min(b, high) - base) for a, b in ranges if a < high and low < b)
        if left:
            found.append((byte, n_after, left))
    return found


@functools.cache
def shortest(item):
    """The fewest bytes of a text that an item matches; NEVER or more if it matches none."""
    match item:
        case ("one", n, ranges):
            return min((1 + n_after for _, n_after, _ in next_bytes(n, ranges)), default=NEVER)
        case ("either", sequences):
            return min(sum(shortest(part) for part in sequence) for sequence in sequences)
        case ("repeat", sequence, least, _):
            return least * sum(shortest(part) for part in sequence)


def closure(sequences):
    """All sequences that these can turn into without reading a byte; the results are empty or begin with a
    character. Those that match no text are left out."""
    seen, todo = set(), list(sequences)
    while todo:
        sequence = todo.pop()
        if sequence in seen or sum(shortest(item) for item in sequence) >= NEVER:
            continue
        seen.add(sequence)
        if len(seen) > LIMIT:
            raise UserError(f"the expression has more than {LIMIT} ways to go on; repeat less often")
        first, rest = sequence[:1], sequence[1:]
        match first:
            case (("either", branches),):
                todo += [branch + rest for branch in branches]
            case (("repeat", repeated, least, most),):
                if least == 0:
                    todo.append(rest)
                if most != 0:
                    fewer = ("repeat", repeated, max(least - 1, 0), None if most is None else most - 1)
                    todo.append((*repeated, fewer, *rest))
    return frozenset(sequence for sequence in seen if not sequence or sequence[0][0] == "one")


class Automaton:
    """A deterministic automaton over bytes, made as far as texts reach it (Antimirov 1996: partial
    derivatives). A state is the set of all sequences that may still have to be read."""

    def __init__(self, sequence):
        self.sets, self.states = [None, frozenset()], {frozenset(): DEAD}  # state -> set, set -> state
        self.table = np.zeros((LIMIT, 256), np.int32)  # (state, byte) -> state; uses memory where written
        self.missing = np.full(LIMIT, NEVER)  # (LIMIT,) for each state the fewest bytes to a match
        self.start = self.state([sequence])
        if self.start == DEAD:
            raise UserError("no text has the form that is asked for; ask for another")
        if self.missing[self.start] > LONGEST:
            raise UserError(f"a shortest text of this form has over {LONGEST} bytes; repeat less often")

    def state(self, sequences):
        """The number of the state in which these sequences may have to be read."""
        key = closure(sequences)
        if key not in self.states:
            if len(self.sets) == LIMIT:
                raise UserError(f"the expression leads to more than {LIMIT} states; write a simpler one")
            self.states[key] = len(self.sets)
            self.missing[len(self.sets)] = min(sum(shortest(item) for item in sequence) for sequence in key)
            self.sets.append(key)
        return self.states[key]

    def row(self, state):
        """The states (256,) to which the bytes lead."""
        if self.table[state, 0] == UNKNOWN:
            targets = [set() for _ in range(256)]
            for sequence in self.sets[state] - {()}:
                (_, n, ranges), *rest = sequence
                for byte, n_after, left in next_bytes(n, ranges):
                    targets[byte].add((("one", n_after, left), *rest) if n_after else tuple(rest))
            numbers = {target: self.state(target) for target in {frozenset(t) for t in targets}}
            self.table[state] = [numbers[frozenset(target)] for target in targets]
        return self.table[state]


def regex(pattern):
    """The automaton of the texts that re.fullmatch(pattern, text) accepts."""
    try:
        re.compile(pattern)  # from here on it is well formed
        return Automaton((parse_alternatives(pattern, 0)[0],))
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}; see Python's module re") from None


def choices(texts):
    """The automaton of these texts."""
    if not texts or "" in texts:
        raise UserError("an empty choice; name one text or more, none of them empty")
    return regex("|".join(re.escape(text) for text in texts))


# ------------------------------------------------------------------------------------------------------------
# From bytes to tokens


class Guide:
    """Which tokens may come next: guide(completion) is the mask (V,) for sample.generate(allowed=guide).

    `max_tokens` is the room for a completion: what is asked for, or less in a model's small context, and
    `remedy` what to do if it is too little. The stop token needs none of it, since generate() ends there by
    itself.
    """

    def __init__(self, tokenizer, automaton, stop_token, max_tokens, remedy="allow more"):
        self.tokenizer, self.automaton = tokenizer, automaton
        self.stop_token, self.max_tokens = stop_token, max_tokens
        self.lengths = tokenizer.token_lengths[: tokenizer.eot]  # (n,) bytes of each, no special tokens
        words = np.array([tokenizer.token_bytes(id) for id in range(tokenizer.eot)])  # (n,)
        self.bytes = words.view(np.uint8).reshape(len(words), -1)  # (n, longest)
        self.ends = functools.lru_cache(256)(self.find_ends)  # 200 kB each for 50,257 tokens
        if not self(SimpleNamespace(ids=[])).any():
            needed = self.tokens_left(automaton.start)
            raise UserError(f"a shortest text of this form takes {needed} tokens, not {max_tokens}; {remedy}")

    def __call__(self, completion):
        state, missing = self.automaton.start, self.automaton.missing
        for token in completion.ids:
            for byte in self.tokenizer.token_bytes(token):
                state = self.automaton.row(state)[byte]
        ends = self.ends(state)  # (V,) states
        left = self.max_tokens - len(completion.ids) - 1  # tokens, after the next one
        fits = missing[: len(self.automaton.sets)] <= left  # (states,); certain if true: a byte is a token
        for close in np.flatnonzero(np.bincount(ends, minlength=len(fits)) * ~fits):
            fits[close] = self.tokens_left(close) <= left
        mask = fits[ends]  # (V,)
        mask[self.stop_token] = missing[state] == 0
        return mask

    def find_ends(self, state):
        """The states (V,) to which the tokens lead from `state`: all tokens at once, byte after byte."""
        ends = np.full(self.tokenizer.vocab_size, DEAD, np.int32)  # (V,)
        tokens, states = np.arange(len(self.lengths)), np.full(len(self.lengths), state)  # those not dead yet
        for i in range(self.bytes.shape[1]):
            for reached in np.flatnonzero(np.bincount(states)):
                self.automaton.row(reached)
            states = self.automaton.table[states, self.bytes[tokens, i]]
            over = self.lengths[tokens] == i + 1
            ends[tokens[over]] = states[over]
            alive = ~over & (states != DEAD)
            tokens, states = tokens[alive], states[alive]
        return ends

    def tokens_left(self, state):
        """The fewest tokens for the shortest text from this state to a match (of several, the first)."""
        text, missing = b"", self.automaton.missing
        while 0 < missing[state] < NEVER:
            row = self.automaton.row(state)
            byte = missing[row].argmin()  # of equals the first
            text, state = text + bytes([byte]), row[byte]
        if missing[state]:
            return NEVER
        costs = [0]  # of text[i:], text[i + 1:], ..., text[len(text):]
        for i in reversed(range(len(text))):
            longest = min(self.bytes.shape[1], len(text) - i)
            words = [costs[n - 1] for n in range(1, longest + 1) if text[i : i + n] in self.tokenizer.ranks]
            costs.insert(0, 1 + min(words))
        return costs[0]


# ------------------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    flags = parser().parse_args(argv)
    automaton = choices(flags.only.split(",")) if flags.only is not None else regex(flags.regex)
    prompt = sample.read_prompt(flags)
    model, tokenizer, checkpoint = sample.load(flags.directory, flags)
    assistant, guide = sample.is_assistant(checkpoint) and not flags.raw, None
    settings = sample.settings_of(flags, assistant)
    n_positions, max_tokens, remedy = model.config.n_positions, flags.max_tokens, "raise --max-tokens"
    room = n_positions + 1 - len(sample.prompt_ids(tokenizer, prompt, assistant))
    if room < max_tokens:
        remedy = f"the prompt leaves no more of the model's context of {n_positions}: shorten it or the form"
    if room > 0:  # else generate() says that the prompt is too long
        end = sample.end_token(tokenizer, assistant)
        guide = Guide(tokenizer, automaton, end, min(room, max_tokens), remedy)
    completions = sample.complete(
        model, tokenizer, [prompt] * flags.num_samples, assistant, stop_texts=flags.stop, allowed=guide,
        **settings,
    )  # fmt: skip
    if flags.json:
        report = sample.json_report(flags, settings, checkpoint, prompt, completions)
        print(json.dumps(report | {"only": flags.only, "regex": flags.regex}, ensure_ascii=False))
    else:
        for completion in completions:
            print(printable(completion.text))
    sample.say_speed(flags, completions)


def parser():
    flags = Parser(prog="python -m extras.constrain", description="Text of a given form: masked sampling.")
    add = flags.add_argument_group("form").add_mutually_exclusive_group(required=True).add_argument
    add("--only", metavar="A,B,C", help="the text is one of these")
    add("--regex", metavar="R", help="the text matches this regular expression")
    sample.add_flags(flags)
    return flags


if __name__ == "__main__":
    run(main)
