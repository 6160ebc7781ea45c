"""Facts of the World Factbook, the questions that ask for them, and a check of the answers.

A reader of the course can skip this file. The one thing to know: a Fact is one value of one country, such as
the capital of France, with its questions and answers. A fifth of the facts is held out: no conversation that
trains asks about them.

The sentences come from texts.jsonl. Read data.py first, which extracts the Factbook's paragraphs, and
tasks/conversations.py next, which makes conversations of the facts.
"""

import functools
import hashlib
import json
import random
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from common import UserError
from tasks import countries


@dataclass(frozen=True)
class Fact:
    """One value of one country, with the sentences that ask for it and state it."""

    country: str  # "France"
    field: str  # "population"
    questions: tuple  # wordings for training: "What is the population of France?"
    held_out: tuple  # wordings for evaluation
    follow_ups: tuple  # questions that leave the country out: "And its population?"
    answer: str  # from memory, numbers rounded: "The population of France is over 68 million."
    brief: str  # "It is over 68 million."
    exact: str  # copied from what a search finds: "The population of France is 68,512,806."
    query: str  # what to search for: " population of France"
    accepted: tuple  # values that count as right, as plain() writes them
    needed: int  # how many of them an answer must name

    def ask(self, rng, split):
        """A question for the fact, in a wording of the split.

        In training, three fifths of the questions "What is ...?" are asked in yet another way, such as
        "Could you tell me ...?".
        """
        question = rng.choice(self.questions if split == "train" else self.held_out)
        subject = re.fullmatch(r"What is (.+)\?", question)
        if subject and split == "train" and rng.random() < 0.6:
            return phrase(rng, split, "ask for").format(subject[1])
        return question


# {field: (title of the Factbook's paragraph, regular expression whose first group is the value)}.
#
# The expression is matched where the paragraph's text begins, after "Capital of France: ". (?!...) at its
# beginning rejects a paragraph that begins so, (?=...) at its end is what must follow the value. Example: of
# "Capital of France: Paris. Geographic coordinates: 48 52 N, ..." the value is "Paris", because the value of
# "capital" ends before a full stop that a capital letter follows.
NAME = r"([A-Z][a-z]+(?: [A-Z][a-z]+)*)"
PERSON = r"([A-Z][^(;,]+?)(?= \(since)"
FIELDS = {
    "capital": ("Capital", r"(?!Time|Note)([A-Z].+?)(?=\. [A-Z]| \(|;|,|\.$)"),
    "population": ("Population", r"(\d[\d,]*)(?= |\.)"),
    "area": ("Area", r"(\d[\d,.]* sq km)"),
    "language": ("Languages", NAME),
    "currency": ("Exchange rates", r"Currency: ([A-Za-z ]+?)(?= \([A-Z]{3}\) per)"),
    "religion": ("Religions", NAME),
    "independence": ("Independence", r"(\d\d? [A-Z]\w+ \d{4}|\d{4})\b"),
    "continent": ("Map references", r"(?!Political)([A-Z][\w ]+)(?=\.$)"),
    "location": ("Location", NAME + "(?=,)"),
    "neighbours": ("Land boundaries", r".*Border countries(?: \(\d+\))?: (.+? km)(?=\.)"),
    "government": ("Government type", r"(?!formerly)([a-z][a-z -]+[a-z])(?= ?[;.,(])"),
    "internet code": ("Internet country code", r"(\.[a-z]{2})\b"),
    "highest point": ("Elevation", r"Highest point: ([A-Z][^\d(,;:]+?)(?= \(|,| \d|;)"),
    "president": ("Executive branch", f"Chief of state: President {PERSON}"),
    "prime minister": ("Executive branch", f".*?Head of government: Prime Minister {PERSON}"),
    "holiday": ("National holiday", r"([^;(:]+?, \d\d? [A-Z][a-z]+)(?= |\.)"),
    "coastline": ("Coastline", r"(\d[\d,.]* km)\b"),
    "anthem": ("National anthem(s)", r'Title: ["“]([^"”]+?),?["”]'),
    "nationality": ("Nationality", r".*?Adjective: (?!none)([^;,(.]+?)(?= \(|[;,.])"),
    "life expectancy": ("Life expectancy at birth", r"Total population: (\d[\d.]* years)"),
    "climate": ("Climate", r"([a-z][^;,(.:]+?)(?=[;,.(])"),
}
NUMBERS = ("population", "area", "coastline", "life expectancy")  # fields whose value is a number
LONGEST_VALUE = 60  # characters; a longer value is a sentence and cannot be learned as a name


def facts(split="all"):
    """The facts that "train", those that are held out to "test" (a fifth), or "all" of them."""
    wanted = {"train": (False,), "test": (True,), "all": (False, True)}[split]
    return [fact for fact in all_facts() if held_out(fact.country, fact.field) in wanted]


@functools.cache
def all_facts():
    """Every country's facts, as far as the Factbook has a short value for them, in its order."""
    wordings = {row["field"]: row for row in texts("field")}
    result = []
    for country, sections in countries.countries():
        if country in ("World", "European Union"):
            continue
        for field, (title, pattern) in FIELDS.items():
            content = next((fields[title] for fields in sections.values() if title in fields), {})
            paragraph = countries.field_text(country, title, content).split("\n")[0].partition(": ")[2]
            match = re.match(pattern, paragraph)
            if not match:
                continue
            value = match[1].strip()
            if field == "neighbours":  # 'Andorra 55 km; Belgium 556 km' -> 'Andorra, Belgium'
                value = ", ".join(re.sub(r" (\d| \().*", "", part.strip()) for part in value.split(";"))
            if len(value) <= LONGEST_VALUE:
                result.append(make_fact(country, field, value, paragraph, wordings[field]))
    return result


def make_fact(country, field, value, paragraph, wording):
    """The Fact that `country` has this `value`, in the sentences of `wording`, a line of texts.jsonl."""
    names = country_forms(country)
    with_article = value.startswith(("Middle East", "Caribbean", "Central America and"))
    exact = f"the {value}" if with_article else value
    remembered = rounded(value) if field == "population" else exact
    title = FIELDS[field][0].lower().replace("(s)", "")
    accepted = tuple(dict.fromkeys(plain(text) for text in accepted_values(field, value, paragraph)))
    return Fact(
        country=country,
        field=field,
        questions=tuple(text.format(**names) for text in wording["ask"]),
        held_out=tuple(text.format(**names) for text in wording["held_out"]),
        follow_ups=tuple(wording["follow"]),
        answer=wording["answer"].format(value=remembered, **names),
        brief=wording["brief"].format(value=remembered),
        exact=wording["answer"].format(value=exact, **names),
        query=f" {title} of {names['country']}",
        accepted=accepted,
        needed=(len(accepted) + 1) // 2 if field == "neighbours" else 1,  # at least half of the neighbours
    )


def country_forms(name):
    """What stands in the sentences of texts.jsonl for {country}, {Country} and {possessive}:

    'the Netherlands', 'The Netherlands' at the beginning of a sentence, "the Netherlands'".
    """
    name = countries.with_article(name)
    possessive = name + ("'" if name.endswith("s") else "'s")
    return {"country": name, "Country": name[0].upper() + name[1:], "possessive": possessive}


def rounded(number):
    """A number that can be remembered, rounded down: '68,512,806' -> 'over 68 million'."""
    value = int(number.replace(",", ""))
    if value >= 10**7:
        return f"over {value // 10**6:,} million"
    return f"over {value // 1000:,},000" if value >= 10**4 else number


def accepted_values(field, value, paragraph):
    """The value, and others that are as good: every official language, a surname, a date without its name."""
    if field == "neighbours":
        return value.split(", ")
    others = []
    if field == "language":
        others = re.findall(NAME + r" \(official", paragraph)
    elif field in ("president", "prime minister"):  # surnames stand in capitals: 'Emmanuel MACRON'
        others = [" ".join(re.findall(r"\b[^\Wa-z\d_]{2,}\b", value)) or value]
    elif field == "currency":
        others = [value.removesuffix("s")]
    elif field == "religion":  # 'Roman Catholic'
        others = [value.split("Roman ")[-1]]
    elif field == "holiday":  # 'Independence Day, 28 July'
        others = [value.split(", ")[-1]]
    elif field == "highest point":  # 'Uhuru Peak on Kilimanjaro'
        others = value.split(" on ")
    elif field == "nationality":  # 'Swiss or Helvetian'
        others = value.split(" or ")
    return [value, *others]


# ------------------------------------------------------------------------------------------------------------
# Is an answer right? Does the model know the fact?


def matches(fact, text):
    """Whether a text states the fact. Capitals and accents do not matter, numbers may be a little off."""
    if fact.field in NUMBERS:
        truth, given = first_number(fact.exact), first_number(text)
        return given is not None and roughly_equal(given, truth)
    country, words = plain(fact.country), plain(text)
    # In "The capital of Panama is" the name of the country is no answer. It is removed where it could be one.
    without_country = re.sub(rf"\b(of|in|from) (the )?{country}\b", "", words)
    named = [has_words(without_country if name in country else words, name) for name in fact.accepted]
    return sum(named) >= fact.needed


def first_number(text):
    """The first number of a text, None if there is none: 'over 68 million' -> 68000000.0."""
    match = re.search(r"(\d[\d,]*(?:\.\d+)?)(?: (\w+))?", text)
    if match is None:
        return None
    scale = {"thousand": 1e3, "million": 1e6, "billion": 1e9}.get(match[2], 1)
    return float(match[1].replace(",", "")) * scale


def roughly_equal(given, truth):
    """Whether a number is right to 5 %, or has the first two digits of the right one and as many digits.

    The digits are for rounded numbers: "over 10 million" is right for 10,900,000.
    """
    if abs(truth - given) <= 0.05 * truth:
        return True
    as_long = len(str(int(truth))) == len(str(int(given))) > 1
    return as_long and str(truth)[:2] == str(given)[:2]


def plain(text):
    """The words of a text without capitals, accents and punctuation: "Côte d'Ivoire" -> 'cote d ivoire'."""
    letters = unicodedata.normalize("NFKD", text).casefold()
    if not letters.isascii():  # an accent is a character of its own now
        letters = "".join(c for c in letters if not unicodedata.combining(c))
    return " ".join(re.findall(r"\w+", letters))


def has_words(text, words):
    """Whether a text has these words one after the other, both as plain() writes them."""
    return f" {words} " in f" {text} "


def read_probe(path):
    """The lines that evaluate.py --probe wrote."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        for line in lines:
            if not {"country", "field", "split"} <= set(line) or not 0 <= line["rate"] <= 1:
                raise ValueError
        return lines
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what evaluate.py --probe writes; let it write one") from None


def probed(path):
    """The (country, field) pairs that a model does not know: at most half of its answers were right."""
    return {(line["country"], line["field"]) for line in read_probe(path) if line["rate"] <= 0.5}


# ------------------------------------------------------------------------------------------------------------
# The texts, and what of them is for testing


@functools.cache
def texts(kind):
    """The lines of texts.jsonl that have the key `kind`.

    "field": sentences about a fact. "source": questions and answers of a conversation. "template": phrases
    that conversations are made of. "task": wordings of a problem. "story", "event": word problems. "list":
    words. Under "ask" stands what trains, under "held_out" what tests.
    """
    lines = (Path(__file__).parent / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if kind in row]


def word_list(name):
    """The words of a list in texts.jsonl: "names", "fruits" or "ordinals"."""
    return next(row["words"] for row in texts("list") if row["list"] == name)


def phrase(rng, split, template):
    """One of the phrases of a template in texts.jsonl, such as "brief": "{} Answer briefly."."""
    row = next(row for row in texts("template") if row["template"] == template)
    return rng.choice(row["ask"] if split == "train" else row["held_out"])


def digest(*words):
    """A number that depends on the words alone and is the same on every machine."""
    return int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=6).digest(), "big")


def held_out(*words):
    """Whether these words are for testing only. A fifth of all are."""
    return digest(*words) % 5 == 0


@functools.cache
def examined():
    """Every question that the evaluation may ask, as plain() writes it."""
    groups = [row["held_out"] for row in texts("source")]
    groups += [fact.held_out for fact in all_facts()]
    groups += [fact.questions for fact in facts("test")]
    return {plain(question) for group in groups for question in group}


@functools.cache
def country_names():
    """The names of all countries, as plain() writes them."""
    return {plain(name) for name, _ in countries.countries()}


def invented(split, n, seed):
    """n questions about people and countries that do not exist: [(question, search query), ...]."""
    rng = random.Random(f"{seed} {split}")
    fields = ("capital", "population", "area", "language", "currency", "location")
    rows = [row for row in texts("field") if row["field"] in fields]
    queries = {}  # {question: query}
    while len(queries) < n:
        syllables = [phrase(rng, split, "syllable") for _ in range(rng.choice((2, 2, 3)))]
        surname = "".join(syllables).capitalize()
        country = surname + phrase(rng, split, "country's end")
        row = rng.choice(rows)
        if rng.random() < 0.5:
            person = f"{phrase(rng, split, 'first name')} {surname}"
            queries[phrase(rng, split, "person").format(person)] = f" {person}"
        elif plain(country) not in country_names():
            question = rng.choice(row["ask"] if split == "train" else row["held_out"])
            title = FIELDS[row["field"]][0].lower()
            queries[question.format(**country_forms(country))] = f" {title} of {country}"
    return list(queries.items())
