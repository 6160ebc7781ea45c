"""What the assistant may call: a calculator, and a search over local texts.

    python tools.py "3*17"                           also '"strawberry".count("r")' and '"ubiquitous"[::3]'
    python tools.py --search "capital of France"     in the Factbook; --texts PATH: in .txt, .md, .jsonl files

A model writes the input of both, so they are harmless by construction. calculate() never runs the
expression: it parses it and computes numbers, comparisons, and four things about texts: their length, how
often they contain another, a letter, a slice. Time, memory and the size of numbers are bounded. Search only
counts words. TOOLS has both for an assistant. Read data.py before this file and sample.py after it.
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
from tasks import countries

# ------------------------------------------------------------------------------------------------------------
# The calculator

MAX_LENGTH = 200  # characters of an expression or a query
MAX_DEPTH = 100  # levels of a syntax tree: the sum of 100 digits has 100
MAX_VALUE = 10**50  # of a number
MAX_POWER_BITS = 5000  # of a power, before it is rounded

# All that Python's parser gets to see: texts in quotes without escapes, `.count(`, `len(`, numbers and
# operators.
ALLOWED = r"""("[^"\\\n]*"|'[^'\\\n]*'|\.count\(|len\(|(?<=[\d.])[eE_](?=[-+\d])|[\d.+\-*/%()<>=!\[\]: ])*"""

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: Fraction,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def calculate(expression):
    """The value of an expression, as a person writes it, or "error: " and the reason. Never an exception."""
    if len(expression) > MAX_LENGTH:
        return "error: too long"
    rest = expression[re.match(ALLOWED, expression, re.ASCII).end() :]
    if rest:
        return f"error: cannot read {re.match('[a-zA-Z_]{1,20}|.', rest, re.DOTALL)[0]!a}"
    try:
        return written(evaluate(ast.parse(expression.strip(), mode="eval").body))
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: too large"
    except IndexError:
        return "error: no such letter"
    except TypeError:
        return "error: a wrong kind of value"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: not an expression"


def evaluate(node, depth=1):
    """The value of a syntax tree: an int, a Fraction, a bool or a str; None if the node is None.

    A Fraction is exact: 0.1 is one tenth, so 0.1 + 0.2 == 0.3. SyntaxError for any node that is not listed
    here.
    """
    if node is None:  # a part of a slice that is left out
        return None
    if depth > MAX_DEPTH:
        raise RecursionError
    depth += 1  # of the nodes below
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.Constant(int(value) | float(value)):
            return bounded(value)
        case ast.UnaryOp(ast.USub(), value):
            return -evaluate(value, depth)
        case ast.BinOp(left, sign, right) if type(sign) in ARITHMETIC:
            return arithmetic(type(sign), evaluate(left, depth), evaluate(right, depth))
        case ast.Compare(first, signs, others):
            values = [evaluate(value, depth) for value in (first, *others)]
            pairs = zip(signs, itertools.pairwise(values))  # 1 < 2 < 3 is 1 < 2 and 2 < 3
            return all(COMPARISONS[type(sign)](left, right) for sign, (left, right) in pairs)
        case ast.Call(ast.Name("len"), [text], []):
            return len(evaluate(text, depth))
        case ast.Call(ast.Attribute(text, "count"), [part], []):
            return str.count(evaluate(text, depth), evaluate(part, depth))
        case ast.Subscript(text, ast.Slice(start, stop, step)):
            text, start, stop, step = (evaluate(part, depth) for part in (text, start, stop, step))
            return text[start:stop:step]
        case ast.Subscript(text, index):
            return evaluate(text, depth)[evaluate(index, depth)]
    raise SyntaxError


def arithmetic(sign, left, right):
    """left sign right, for numbers only. OverflowError for a power that would take long to compute."""
    if isinstance(left, str) or isinstance(right, str):  # "a" * 10**9 and "%999999999d" % 1 fill the memory
        raise TypeError
    if sign is ast.Pow:
        numerator, denominator = left.as_integer_ratio()
        if abs(right) * (numerator.bit_length() + denominator.bit_length()) > MAX_POWER_BITS:
            raise OverflowError
    return bounded(ARITHMETIC[sign](left, right))


def bounded(value):
    """A number as an int or a Fraction of bounded size. A float (a literal, a root) becomes its decimal."""
    if abs(value) >= MAX_VALUE:
        raise OverflowError
    value = Fraction(repr(value) if isinstance(value, float) else value)
    if value.denominator >= MAX_VALUE:
        value = Fraction(repr(float(value)))
    return int(value) if value.denominator == 1 else value


def written(value):
    """A value as text: true, false, a text, an int, or a decimal with four digits: 0.3333, 3.333e-05."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Fraction):
        return f"{float(round(value, 4)):.15g}" if abs(value) > 0.01 else f"{float(value):.4g}"
    return str(value)


# ------------------------------------------------------------------------------------------------------------
# The search ranks passages by BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009).
# The constants are those that found the right field of the Factbook most often.

K1 = 1.2  # the smaller, the sooner repeats of a word in a passage count no more
B = 0.3  # how much longer passages are held back: 0 not at all, 1 in proportion to their length
TITLE_WEIGHT = 35.0  # shared by the words of a title, so that "Sudan: Capital" beats "South Sudan: Capital"
RARE = 0.01  # a word that this share of the passages has, or less, must be in what is found
STOP_WORDS = """
    a about an and are at be can did do does find for from give has have how i in is it many me much of on or
    please s search show tell that the their there to was were what when where which who why
"""
STOP_WORDS = frozenset(STOP_WORDS.split())
SENTENCE_END = r"[.?!][\")]*(?=\s|$)|(?=\n)|$"
WORD_END = r"(?=\s)"


def words(text):
    """The words to compare, without stop words, capitals, accents and plural endings.

    "The Côte d'Ivoire's exports" -> ["cote", "d", "ivoire", "export"]
    """
    if not text.isascii():
        text = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
    text = re.sub(r"(?<=\w\w[^\Wsui])s\b", "", text.lower())
    return [word for word in re.findall(r"\w+", text) if word not in STOP_WORDS]


class Search:
    """An index of N passages, [(title, text), ...]."""

    def __init__(self, passages):
        self.passages = list(passages)
        lengths = [len(text) for _, text in self.passages]  # (N,) characters
        mean_length = 1 + sum(lengths) / max(len(lengths), 1)
        weights = defaultdict(dict)  # {word: {index of a passage: weight of the word in it}}
        for i, (title, text) in enumerate(self.passages):
            heading = words(title)
            length = 1 - B + B * lengths[i] / mean_length
            for word, n in Counter(heading + words(text)).items():
                in_title = TITLE_WEIGHT / len(heading) if word in heading else 0
                weights[word][i] = n / length + in_title
        self.index = {}  # {word: ((n,) indices of the passages that have it, (n,) its weights there)}
        for word, in_passage in weights.items():
            self.index[word] = np.array([*in_passage]), np.array([*in_passage.values()])

    @classmethod
    @functools.cache
    def factbook(cls):
        """Every field of every country: ("France: Capital", "Capital of France: Paris. Geographic …")."""
        titles = {}  # {text: title}: some texts are in two sections
        for name, sections in countries.countries():
            for fields in sections.values():
                for field, content in fields.items():
                    if field not in countries.CONTACTS:
                        titles.setdefault(countries.field_text(name, field, content), f"{name}: {field}")
        return cls((title, text) for text, title in titles.items() if text)

    @classmethod
    def load(cls, path="factbook"):
        """The Factbook, or the paragraphs of the user's files, each with the file's name as its title."""
        if path == "factbook":
            return cls.factbook()
        passages = []
        for file in data.text_files([path]):
            for _, text in data.read_texts([file], 1 << 16):
                paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text)]
                passages += [(file.stem, paragraph) for paragraph in paragraphs if paragraph]
        return cls(passages)

    def find(self, query, n=1):
        """The n best passages, best first; fewer if fewer have enough of the query's words.

        A passage must have more than half of the words, and all that are rare or names. So nothing is found
        about the "capital of Zubrovia". A name has a capital letter, and is not the query's first word.
        """
        is_name = {}  # {word of the query: whether it is a name}
        for i, word in enumerate(re.findall(r"[\w\u0300-\u036f]+", query[:MAX_LENGTH])):
            for form in words(word):
                is_name[form] = i > 0 and word[0].isupper()
        N = len(self.passages)
        scores = np.zeros(N)  # (N,)
        found = np.zeros(N)  # (N,) how many of the query's words the passage has
        missing = np.zeros(N)  # (N,) how many it lacks of those that it must have
        for word, name in is_name.items():
            at, weights = self.index.get(word, ([], np.zeros(0)))
            rarity = np.log(1 + (N - len(at) + 0.5) / (len(at) + 0.5))
            scores[at] += rarity * weights / (weights + K1)
            found[at] += 1
            if name or len(at) <= RARE * N:
                missing += 1
                missing[at] -= 1
        best = np.flatnonzero((missing == 0) & (2 * found > len(is_name)))
        best = best[np.argsort(-scores[best], kind="stable")]
        return [self.passages[i] for i in best[:n]]

    def lookup(self, query, budget=64):
        """The beginning of the best passage in at most `budget` words, whole sentences if one fits."""
        for _, text in self.find(query):
            for end in (SENTENCE_END, WORD_END):
                beginning = within(budget, text, end)
                if beginning:
                    return beginning.rstrip(" ,;:(")
        return "nothing found"


def within(budget, text, end):
    """The longest beginning of a text that stops at the pattern `end` and has at most `budget` words."""
    ends = [0, *(match.end() for match in re.finditer(end, text))]  # 0 fits every budget
    n = bisect.bisect(ends, budget, key=lambda end: len(text[:end].split()))
    return text[: ends[n - 1]]


# ------------------------------------------------------------------------------------------------------------
# What the host of an assistant runs. A tool's output begins with a space: then its words are the same tokens
# as in the middle of a sentence, and the answer can copy them. For the same reason calls do: " 23 * 47".

SEARCH_SYSTEM = "You can search."  # with this system message the assistant searches, without it it remembers
PASSAGE = 16  # words of what a search finds


def calculator(call):
    """The output of a call of the calculator: " 81"."""
    return f" {calculate(call)}"


@functools.lru_cache(1 << 15)
def looked_up(query):
    """The output of a search of the Factbook: " Capital of France: Paris."."""
    return f" {Search.factbook().lookup(query, budget=PASSAGE)}"


TOOLS = {"calc": calculator, "search": looked_up}  # the training conversations have their outputs, too


# ------------------------------------------------------------------------------------------------------------
# The command line


def parser():
    flags = common.Parser(prog="tools.py", description="Calculate or search, as the assistant may.")
    flags.add_argument("expression", nargs="?", help="to calculate")
    flags.add_argument("--search", metavar="QUERY", help="search for this instead of calculating")
    where = "what to search: factbook, or a .txt, .md or .jsonl file, or a folder of them"
    flags.add_argument("--texts", default="factbook", metavar="PATH", help=where)
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    if (flags.expression is None) == (flags.search is None):
        raise common.UserError('give an expression, "3*17", or a query, --search "capital of France"')
    if flags.search is None:
        print(calculate(flags.expression))
    else:
        print(Search.load(flags.texts).lookup(flags.search))


if __name__ == "__main__":
    common.run(main)
