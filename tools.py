"""What the assistant may call: a calculator, and a search over local texts. Harmless by construction.

    python tools.py "3*17"                           also '"strawberry".count("r")' and '"ubiquitous"[::3]'
    python tools.py --search "capital of France"     in the Factbook; --texts PATH: in .txt, .md, .jsonl files

A model writes the questions, and they can do no harm: calculate() walks a syntax tree of numbers and four
things about texts, Search counts words. Read data.py before this file and sample.py after it.
"""

import ast
import bisect
import functools
import itertools
import operator
import re
import unicodedata
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np

import common
import data

LONGEST, DEEPEST = 200, 100  # characters of a question; levels of its syntax tree: 100 added digits have 100
LARGEST, POWER_BITS = 10**50, 5000  # of a number; bits of a power before it is rounded
# All that Python's parser gets to see: texts in quotes, two names, numbers and signs; no escapes, no braces.
WRITTEN = r"""("[^"\\\n]*"|'[^'\\\n]*'|\.count\(|len\(|(?<=[\d.])[eE_](?=[-+\d])|[\d.+\-*/%()<>=!\[\]: ])*"""
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: Fraction}
OPERATORS |= {ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}
OPERATORS |= {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
OPERATORS |= {ast.Eq: operator.eq, ast.NotEq: operator.ne}
REASONS = {ZeroDivisionError: "division by zero", OverflowError: "too large", IndexError: "no such letter"}
REASONS |= {TypeError: "a wrong kind of value"}
REASONS |= dict.fromkeys([SyntaxError, ValueError, RecursionError, MemoryError], "not an expression")


def calculate(expression):
    """The value of an expression, as a person writes it; or "error: " and the reason. Never an exception."""
    if len(expression) > LONGEST:
        return "error: too long"
    if rest := expression[re.match(WRITTEN, expression, re.ASCII).end() :]:
        return f"error: cannot read {re.match('[a-zA-Z_]{1,20}|.', rest, re.DOTALL)[0]!a}"
    try:
        value = walk(ast.parse(expression.strip(), mode="eval").body, 1)
    except tuple(REASONS) as error:
        return "error: " + next(REASONS[kind] for kind in REASONS if isinstance(error, kind))
    if isinstance(value, Fraction):  # four digits behind the point, or behind its zeros: 0.3333, 3.333e-05
        return f"{float(round(value, 4)):.15g}" if abs(value) > 0.01 else f"{float(value):.4g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def walk(node, depth):
    """The value of a node: an int, a Fraction (0.1 is a tenth, so 0.1 + 0.2 == 0.3), a bool or a str."""
    if depth > DEEPEST:
        raise RecursionError
    of = lambda child: child and walk(child, depth + 1)
    match node:
        case ast.Constant(str(value)):
            return value
        case ast.Constant(int(value) | float(value)):
            return bounded(value)
        case ast.UnaryOp(ast.USub(), value):
            return -of(value)
        case ast.BinOp(left, sign, right) if type(sign) in OPERATORS:
            left, right = of(left), of(right)
            if isinstance(left, str) or isinstance(right, str):  # "a" * 10**9, "%999999999d" % 1
                raise TypeError
            bits = sum(map(int.bit_length, left.as_integer_ratio()))
            if isinstance(sign, ast.Pow) and abs(right) * bits > POWER_BITS:
                raise OverflowError
            return bounded(OPERATORS[type(sign)](left, right))
        case ast.Compare(left, signs, others):
            pairs = itertools.pairwise([of(value) for value in (left, *others)])
            return all(OPERATORS[type(sign)](*pair) for sign, pair in zip(signs, pairs))
        case ast.Call(ast.Name("len"), [text], []):
            return len(of(text))
        case ast.Call(ast.Attribute(text, "count"), [part], []):
            return str.count(of(text), of(part))
        case ast.Subscript(text, ast.Slice(start, stop, step)):
            return of(text)[of(start) : of(stop) : of(step)]
        case ast.Subscript(text, index):
            return of(text)[of(index)]
    raise SyntaxError


def bounded(value):
    """The value as an int or a Fraction of bounded length; a float (a literal, a root) is what it shows."""
    if abs(value) >= LARGEST:
        raise OverflowError
    value = Fraction(repr(value) if isinstance(value, float) else value)
    value = value if value.denominator < LARGEST else Fraction(repr(float(value)))
    return int(value) if value.denominator == 1 else value


# BM25 (Robertson and Zaragoza, 2009). K1: how soon a repeated word counts no more. B: how much its length is
# held against a text. TITLE: what a title's words share, so "Sudan: Capital" beats "South Sudan: Capital". Of
# the values tried these found the right field of the Factbook most often. RARE: a word that only so few
# passages have must be there, and so must a name: no other capital answers "capital of Zubrovia".
K1, B, TITLE, RARE = 1.2, 0.3, 35.0, 0.01
SMALL = " a about an and are at be can did do does find for from give has have how i in is it many me much "
SMALL += "of on or please s search show tell that the their there to was were what when where which who why "
SENTENCE, WORD = r"[.?!][\")]*(?=\s|$)|(?=\n)|$", r"(?=\s)"  # where one ends


def words(text):
    """The Côte d'Ivoire's exports -> cote d ivoire export: no small words, capitals, accents or plurals."""
    if not text.isascii():
        text = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
    text = re.sub(r"(?<=\w\w[^\Wsui])s\b", "", text.lower())
    return [word for word in re.findall(r"\w+", text) if f" {word} " not in SMALL]


class Search:
    """An index of N passages, [(title, text), ...]."""

    def __init__(self, passages):
        self.passages, index = list(passages), defaultdict(dict)  # {word: {passage: its weight there}}
        mean = 1 + sum(len(text) for _, text in self.passages) / (len(self.passages) or 1)  # characters
        for i, (title, text) in enumerate(self.passages):
            heading, length = words(title), 1 - B + B * len(text) / mean
            for word, n in Counter(heading + words(text)).items():
                index[word][i] = n / length + (TITLE / len(heading) if word in heading else 0)
        self.index = {word: (np.array([*at]), np.array([*at.values()])) for word, at in index.items()}

    @classmethod
    @functools.cache
    def factbook(cls):
        """Every field of every country: ("France: Capital", "Capital of France: Paris. Geographic …")."""
        passages = {}  # {text: title}, as some texts stand in two sections
        for name, sections in data.countries():
            for field, content in itertools.chain(*(fields.items() for fields in sections.values())):
                if field not in data.CONTACTS:
                    passages.setdefault(data.field_text(name, field, content), f"{name}: {field}")
        return cls((title, text) for text, title in passages.items() if text)

    @classmethod
    def load(cls, path="factbook"):
        """The Factbook, or the paragraphs of the user's files, whose title is the file's name."""
        if path == "factbook":
            return cls.factbook()
        parts = []
        for file in data.text_files([path]):
            for _, text in data.read_texts([file], 1 << 16):
                parts += [(file.stem, part.strip()) for part in re.split(r"\n\s*\n", text)]
        return cls(part for part in parts if part[1])

    def find(self, query, n=1):
        """The best n passages, in order, of those with its names, its rare words and most of its words."""
        asked = {}  # {word: whether it is a name: it has a capital letter, and not because the query begins}
        for i, word in enumerate(re.findall(r"[\w\u0300-\u036f]+", query[:LONGEST])):
            asked |= dict.fromkeys(words(word), i > 0 and word[0].isupper())
        points, have, lack = np.zeros((3, len(self.passages)))  # (N,) each: of its words
        for word, is_name in asked.items():
            at, weights = self.index.get(word, ([], np.zeros(0)))  # (n,) the passages that have the word
            rarity = np.log(1 + (len(points) - len(at) + 0.5) / (len(at) + 0.5))
            points[at] += rarity * weights / (weights + K1)
            have[at] += 1
            if is_name or len(at) <= RARE * len(points):
                lack += 1
                lack[at] -= 1
        best = np.flatnonzero((lack == 0) & (2 * have > len(asked)))
        return [self.passages[i] for i in best[np.argsort(-points[best], kind="stable")[:n]]]

    def lookup(self, query, encode=str.split, budget=64):
        """The best passage's first sentences, or else words, within a budget of tokens (or words)."""
        for _, text in self.find(query):
            for end in (SENTENCE, WORD):
                ends = [0, *(match.end() for match in re.finditer(end, text))]
                fit = bisect.bisect(ends, budget, key=lambda end, text=text: len(encode(text[:end])))
                if fit > 1:
                    return text[: ends[fit - 1]].rstrip(" ,;:(")
        return "nothing found"


def parser():
    flags = common.Parser(prog="tools.py", description="Calculate or search, as the assistant may.")
    flags.add_argument("expression", nargs="?", help="to calculate")
    flags.add_argument("--search", metavar="QUERY", help="to find, instead")
    flags.add_argument("--texts", default="factbook", metavar="PATH", help="in .txt, .md, .jsonl files")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    if (flags.expression is None) == (flags.search is None):
        raise common.UserError('give an expression, "3*17", or a query, --search "capital of France"')
    tool = calculate if flags.search is None else Search.load(flags.texts).lookup
    print(tool(flags.expression or flags.search or ""))


if __name__ == "__main__":
    common.run(main)
