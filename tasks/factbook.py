"""Facts of the World Factbook with questions about them: what the assistant learns, and what examines it.

all_facts() has one for every country and field, in the words of texts.jsonl; matches() says whether
an answer tells it. A fifth of them, drawn by their name, is never asked about in training. Read factbook.py,
which has the paragraphs, before this file and tasks/conversations.py, which makes conversations of the facts,
after it.
"""

import functools
import hashlib
import json
import random
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import data
from common import UserError

# What a paragraph is called, and where in it the value stands, after "Capital of France: ".
NAME, PERSON = r"([A-Z][a-z]+(?: [A-Z][a-z]+)*)", r"([A-Z][^(;,]+?)(?= \(since)"
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
NUMBERS = ("population", "area", "coastline", "life expectancy")


@dataclass(frozen=True)
class Fact:
    country: str
    field: str
    questions: tuple  # the phrasings that train
    held_out: tuple  # and those that test
    follow: tuple  # questions after another one about the country
    answer: str  # from memory: "The population of France is over 68 million."
    brief: str  # "It is over 68 million."
    found: str  # copied from what search() finds: "The population of France is 68,512,806."
    query: str  # " population of France"
    accepted: tuple  # what may be said for it, as plain() writes it
    needed: int  # how many of these must be said

    def ask(self, rng, split):
        """A question for it; one in three of those that train is put in another of many ways."""
        question = rng.choice(self.questions if split == "train" else self.held_out)
        asked = re.fullmatch(r"What is (.+)\?", question)
        reworded = asked and split == "train" and rng.random() < 0.6
        return phrase(rng, split, "ask for").format(asked[1]) if reworded else question


@functools.cache
def texts(kind):
    """The lines of texts.jsonl that have this key: "field", "source" or "template"."""
    lines = (Path(__file__).parent / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if kind in row]


def digest(*words):
    """A number that depends on the words alone, on every machine: it parts what trains from what tests."""
    return int.from_bytes(hashlib.blake2b("|".join(words).encode(), digest_size=6).digest(), "big")


def held_out(*words):
    return digest(*words) % 5 == 0


@functools.cache
def all_facts():
    wordings, found = {row["field"]: row for row in texts("field")}, []
    for name, sections in data.countries():
        c = f"the {name.removeprefix('The ')}" if re.match(data.THE, name) else name
        country = {"c": c, "C": c[0].upper() + c[1:], "s": c + ("'" if c.endswith("s") else "'s")}
        for field, (title, pattern) in FIELDS.items():
            content = next((fields[title] for fields in sections.values() if title in fields), {})
            paragraph = data.field_text(name, title, content).split("\n")[0].partition(": ")[2]
            match = re.match(pattern, paragraph)
            value = match and match[1].strip()
            if value and field == "neighbours":  # 'Andorra 55 km; Belgium 556 km' -> 'Andorra, Belgium'
                value = ", ".join(re.sub(r" (\d| \().*", "", part.strip()) for part in value.split(";"))
            if not value or len(value) > 60 or name in ("World", "European Union"):
                continue
            row = wordings[field]
            train, test = (
                tuple(text.format(**country) for text in row[kind]) for kind in ("ask", "held_out")
            )
            brief = re.sub(r"^(The .*\{c\}|\{C\})", "It", row["answer"]).replace("People from {c}", "They")
            shown = (
                f"the {value}"
                if value.startswith(("Middle East", "Caribbean", "Central America and"))
                else value
            )
            known = rounded(value) if field == "population" else shown
            answers = [text.format(v=known, **country) for text in (row["answer"], brief)]
            query = f" {title.lower().replace('(s)', '')} of {c}"
            accepted = tuple(dict.fromkeys(plain(text) for text in other_names(field, value, paragraph)))
            needed = (len(accepted) + 1) // 2 if field == "neighbours" else 1
            follow, looked_up = tuple(row["follow"]), row["answer"].format(v=shown, **country)
            found.append(Fact(name, field, train, test, follow, *answers, looked_up, query, accepted, needed))
    return found


def rounded(number):
    """68,512,806 -> 'over 68 million': what one can remember, in figures that stand in the text."""
    groups = number.split(",")
    if len(groups) > 2 and int(number.replace(",", "")) >= 10**7:
        return f"over {','.join(groups[:-2])} million"
    return f"over {','.join(groups[:-1])},000" if int(number.replace(",", "")) >= 10**4 else number


def other_names(field, value, paragraph):
    """The value and what is as good: every official language, the surname, the date without its name."""
    if field == "neighbours":
        return value.split(", ")
    if field == "language":
        return [value, *re.findall(NAME + r" \(official", paragraph)]
    if field in ("president", "prime minister"):
        return [value, " ".join(re.findall(r"\b[^\Wa-z\d_]{2,}\b", value)) or value]
    if field == "currency":
        return [value, value.removesuffix("s")]
    if field in ("holiday", "religion"):  # 'Independence Day, 28 July', 'Roman Catholic'
        return [value, value.split({"holiday": ", ", "religion": "Roman "}[field])[-1]]
    return [value, *value.split({"highest point": " on ", "nationality": " or "}.get(field, "\n"))]


def facts(split="all"):
    """The facts: of countries and fields that "train", of those held out to "test" (a fifth), or "all"."""
    wanted = {"train": (False,), "test": (True,), "all": (False, True)}[split]
    return [fact for fact in all_facts() if held_out(fact.country, fact.field) in wanted]


def plain(text):
    """Words without capitals, accents and signs: "Côte d'Ivoire" -> 'cote d ivoire'."""
    text = unicodedata.normalize("NFKD", text).casefold()
    return " ".join(re.findall(r"\w+", "".join(c for c in text if not unicodedata.combining(c))))


def matches(fact, text):
    """Whether a text tells the fact: a number to 5 % or in two figures, a name up to capitals and accents."""
    if fact.field in NUMBERS:
        scales = {"thousand": 1e3, "million": 1e6, "billion": 1e9}
        figures = [re.search(r"(\d[\d,]*(?:\.\d+)?)(?: (\w+))?", words) for words in (fact.found, text)]
        if not figures[1]:
            return False
        truth, said = (float(f[1].replace(",", "")) * scales.get(f[2], 1) for f in figures)
        alike = len(str(int(truth))) == len(str(int(said))) > 1 and str(truth)[:2] == str(said)[:2]
        return alike or abs(truth - said) <= 0.05 * truth
    country, words = plain(fact.country), plain(text)
    rest = re.sub(
        rf"\b(of|in|from) (the )?{country}\b", "", words
    )  # "The capital of Panama is": not yet a match
    told = [f" {name} " in f" {rest if name in country else words} " for name in fact.accepted]
    return sum(told) >= fact.needed


def probed(path):
    """The (country, field) that sft.py --probe found unknown: right in at most half of the attempts."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        return {(line["country"], line["field"]) for line in lines if line["rate"] <= 0.5}
    except OSError as error:
        raise UserError(f"unknown:{path}: {error.strerror}; write it with sft.py --probe") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"unknown:{path} is not what sft.py --probe writes; let it write one") from None


@functools.cache
def examined():
    """The questions of the evaluation, as plain() writes them."""
    found = [row["held_out"] for row in texts("source")] + [fact.held_out for fact in all_facts()]
    found += [fact.questions for fact in facts("test")]
    return {plain(question) for questions in found for question in questions}


# --------------------------------------------------------------------------------------------- and inventions


def phrase(rng, split, template):
    """One of the wordings of a template in texts.jsonl: those that train, or those that test."""
    row = next(row for row in texts("template") if row["template"] == template)
    return rng.choice(row["ask"] if split == "train" else row["held_out"])


@functools.cache
def names():
    """All countries, as plain() writes them."""
    return {plain(name) for name, _ in data.countries()}


def invented(split, n, seed):
    """n questions about people and countries that are not, and what to search for: [(text, query), ...]."""
    rng, found = random.Random(f"{seed} {split}"), {}
    usual = ("capital", "population", "area", "language", "currency", "location")
    rows = [row for row in texts("field") if row["field"] in usual]
    while len(found) < n:
        root = "".join(phrase(rng, split, "syllable") for _ in range(rng.choice((2, 2, 3)))).capitalize()
        country, row = root + phrase(rng, split, "country's end"), rng.choice(rows)
        if rng.random() < 0.5:
            person = f"{phrase(rng, split, 'first name')} {root}"
            found[phrase(rng, split, "person").format(person)] = f" {person}"
        elif plain(country) not in names():
            text = rng.choice(row["ask"] if split == "train" else row["held_out"])
            title = FIELDS[row["field"]][0].lower()
            found[text.format(c=country, C=country, s=f"{country}'s")] = f" {title} of {country}"
    return list(found.items())
