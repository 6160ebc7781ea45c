"""Your own text, cleaned as the web is cleaned before a language model reads it.

    python data.py text pages/ crawl.warc.gz --clean                    all steps that need no file of yours
    python data.py text pages/ --clean --no-c4 --language de            in German, without C4's rules
    python data.py text notes/ --near-duplicates --personal-data drop   two steps alone

The steps are after FineWeb's (Penedo et al. 2024), which Karpathy's lecture shows, with the differences named
below. Each is a flag, and they come in this order, the cheapest first, except that the language is found
before the rules that assume one:

    blocklist         drops what comes from the domains in a file, and from their sub-domains
    exact duplicates  drops a document whose words, or a page whose bytes, came before
    extraction        takes the main text out of a page, by trafilatura
    language          drops what scores less than --min-share for the language
    gopher            drops what breaks a rule of Gopher (Rae et al. 2021) for quality or repetition
    c4                drops the lines and pages that break a rule of C4 (Raffel et al. 2020)
    decontamination   drops what shares a 13-gram of words with evaluation files
    personal data     masks e-mail addresses, some telephone numbers and the like, or drops their documents
    near duplicates   drops a document like one before: Jaccard similarity of 0.8 of their word 5-grams
    paragraphs        drops a paragraph that stood before, in this document or in an earlier one

Up to personal data a step looks at one document alone, and several processes share that work. What compares
a document with those before it is done in the main process, in the order of the documents. So the result is
the same for any number of processes. All this comes before the split into training and validation, which is
data.py's. Your files are only read, and what --train-also names is not cleaned.

The score of a language is the probability that fastText's classifier lid.176 gives it for the whole document,
as in FineWeb, which keeps what scores 0.65 for English. For a page in two languages that is roughly the share
of each. Words are what white space and punctuation separate. Chinese, Japanese and Thai do not separate them:
for these only the steps that count no words are of use.

FineWeb differs from this. It leaves out C4's rule of terminal punctuation, which drops many lines (as
--skip-rules c4:terminal-punctuation does here), and has quality rules of its own. It finds near duplicates by
14 bands of 8 hashes, not 20 of 6. It has no steps for exact duplicates, decontamination and paragraphs.

Of the papers' rules these are left out, and this stands for them:

    C4's removal of spans of three sentences that occur twice     paragraphs
    C4's language filter (langdetect, 0.99)                       language
    C4's list of bad words                                        --bad-words, with a list of yours
    Gopher's removal of documents that are alike                  near duplicates
    Gopher's SafeSearch filter, which is Google's own             nothing

C4's list of bad words drops much that is harmless, and FineWeb does without.

Read formats.py before this file.
"""

import argparse
import contextlib
import functools
import json
import os
import re
from dataclasses import dataclass
from operator import attrgetter
from urllib.parse import urlsplit

import numpy as np

import common
from cleaning import duplicates, formats, rules
from cleaning.counts import Counts
from cleaning.duplicates import EVALUATION_NGRAM, hash64, hashes_of, ngrams, paragraphs, words_of
from cleaning.processes import in_order
from common import UserError

# ------------------------------------------------------------------------------------------------------------
# The pipeline

PRESET = {  # what --clean sets, unless another flag says otherwise
    "web": True,
    "language": "en",
    "gopher": True,
    "c4": True,
    "personal_data": "mask",
    "near_duplicates": True,
    "repeated_paragraphs": True,
}
FILES = ("blocklist", "bad_words", "decontaminate")  # flags that name files
MIN_SHARE = 0.65
BATCH_BYTES, BATCH_DOCUMENTS = 1 << 19, 256  # what a process cleans at a time


def add_flags(parser):
    """Add the flags of this file to data.py's."""
    group = parser.add_argument_group("cleaning, for text; clean.py says what the steps do")
    add = group.add_argument
    switch = functools.partial(add, action=argparse.BooleanOptionalAction, default=None)
    add("--clean", action="store_true", help="every step that needs no file; --no-c4 leaves one out")
    switch("--web", help="in folders, read .html, .htm, .xhtml, .warc and .gz, too")
    add("--blocklist", metavar="FILE", help="drop what comes from these domains, one a line")
    add("--language", metavar="CODE", help="drop other languages: a code, such as en, or any")
    share = common.number(float, low=0, high=1)
    add("--min-share", type=share, default=MIN_SHARE, metavar="X", help="lowest score for --language")
    switch("--gopher", help="drop what breaks a rule of quality or repetition; its stop words are English")
    switch("--c4", help="drop the lines and pages that C4's rules drop; they are made for English")
    add("--bad-words", metavar="FILE", help="drop pages that have one of these words, one a line")
    words = "rules of --gopher and --c4 to leave out, such as gopher:stop-words or c4:curly-bracket"
    add("--skip-rules", nargs="+", default=[], metavar="RULE", help=words)
    words = "drop what shares a 13-gram with these evaluation files: text, or JSON lines"
    add("--decontaminate", nargs="+", default=[], metavar="FILE", help=words)
    words = (
        "e-mail and IP addresses, card and US social security numbers, telephone numbers that begin with + "
    )
    words += "or 00 or are written as in North America"
    add("--personal-data", choices=("keep", "mask", "drop"), help=words)
    switch("--near-duplicates", help="drop documents that are nearly one before")
    switch("--repeated-paragraphs", help="drop paragraphs that stood before")
    add("--show-dropped", action="store_true", help="print three examples of what each rule dropped")
    n = common.number(int, low=1)
    add("--processes", type=n, default=cores(), metavar="N", help="processes that clean")


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def steps_asked(flags):
    """The flags of the steps that are asked for, {name: value}; --clean stands for those of PRESET."""
    asked = {name: getattr(flags, name) for name in [*PRESET, *FILES]}
    if flags.clean:
        asked |= {name: value for name, value in PRESET.items() if asked[name] is None}
    off = {"language": "any", "personal_data": "keep"}
    return {name: value for name, value in asked.items() if value and value != off.get(name)}


def is_needed(paths, flags):
    """Whether data.py cannot read the files as they are: they are no plain text, or a step is asked for.

    UserError if a flag is for a step that is not asked for.
    """
    steps = steps_asked(flags)
    others = [path for path in paths if formats.is_gzip(path) or formats.suffix_of(path) in formats.WEB]
    has_rules = "gopher" in steps or "c4" in steps
    for flag, is_given, has_effect, needed in (
        ("--min-share", flags.min_share != MIN_SHARE, "language" in steps, "--language"),
        ("--skip-rules", flags.skip_rules, has_rules, "--gopher or --c4"),
        ("--show-dropped", flags.show_dropped, steps or others, "--clean or one of its steps"),
    ):
        if is_given and not has_effect:
            raise UserError(f"{flag} does nothing without {needed}; add that, or leave {flag} out")
    return bool(others or steps)


def clean(paths, flags, out, standard_input=None):
    """Clean the documents in the files into a new file `out`, JSON lines; return what meta.json says of it.

    Prints a table of what each step dropped. UserError if nothing is left. The path `standard_input` has what
    came from there.
    """
    steps = steps_asked(flags)
    blocked = read_blocklist(flags.blocklist) if flags.blocklist else set()
    evaluation = duplicates.read_evaluation_files(flags.decontaminate)
    skip = list(flags.skip_rules)
    if flags.language not in (None, "en"):
        skip.append("gopher:stop-words")  # they are English
    make_cleaner = functools.partial(Cleaner, steps, flags.min_share, skip, evaluation)
    formats.require(paths)
    make_cleaner()  # its errors come before anything is read, too
    counts, reader, index = Counts(), formats.Reader(standard_input), duplicates.DuplicateIndex()
    progress = common.Progress("cleaning", sum(path.stat().st_size for path in paths), form=common.size)
    documents = drop_blocked_and_exact(reader.documents(paths), blocked, counts)
    batches = formats.in_batches(documents, attrgetter("content"), BATCH_BYTES, BATCH_DOCUMENTS)
    with (
        open(out, "w", encoding="utf-8") as file,
        contextlib.closing(in_order(batches, make_cleaner, flags.processes)) as results,
    ):
        for cleaned, counts_of_batch in results:
            counts.add(counts_of_batch)
            for document in cleaned:
                text = index.without_repeats(document, counts)
                if text:
                    counts.enter("kept", text)
                    file.write(json.dumps({"text": text}) + "\n")
            progress.add(reader.bytes_read - progress.done_so_far)
    progress.add(reader.bytes_read - progress.done_so_far)
    progress.done()
    if counts.without_address:
        common.say(
            f"note: {counts.without_address:,} documents have no address that could be on the blocklist"
        )
    print("\n".join([counts.table(), *reader.passed_over()]))
    if flags.show_dropped:
        print(counts.shown())
    if "kept" not in counts.steps:
        reasons = "; ".join([counts.worst(), *reader.passed_over()])
        raise UserError(f"cleaning leaves nothing: {reasons}; give other files, or leave a step out")
    return {
        "flags": steps | {"min_share": flags.min_share, "skip_rules": skip},
        "steps": counts.as_json(),
        "encodings": reader.encodings + counts.encodings,
        "damaged": reader.damaged,
        "records that are no pages": reader.no_pages,
    }


def drop_blocked_and_exact(documents, blocked, counts):
    """Yield the documents that come from no blocked domain and that are not the same as one before."""
    seen = duplicates.HashTable()
    for document in documents:
        content = document.content
        if blocked:
            counts.enter("blocklist", content)
            counts.without_address += not document.url
            if is_blocked(document.url, blocked):
                counts.drop("blocklist", "blocked domain", document, content)
                continue
        counts.enter("exact duplicates", content)
        words = content if document.is_page else " ".join(content.split()).encode()
        key = np.array([hash64(words)], np.uint64)
        if words and seen.get(key)[0] is None:
            seen.put(key, 0)
            yield document
        else:
            counts.drop("exact duplicates", "same as one before" if words else "empty", document, content)


def read_blocklist(path):
    """The domains in a file, a set: one a line, or as in /etc/hosts behind an address; # begins a comment."""
    domains = set()
    for where, line in lines_of(path):
        name = line.split()[-1].lower().removeprefix("*.").strip(".")
        if len(line.split()) > 2 or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
            raise UserError(f"{where} is no domain such as example.org; correct or delete it")
        domains.add(name)
    return domains


def lines_of(path):
    """[(where, line), ...] of a file that lists things, without comments; UserError if it lists none."""
    lines = enumerate(formats.read_text(path).split("\n"), 1)
    found = [(f"{path}, line {n}", line.partition("#")[0].strip()) for n, line in lines]
    found = [(where, line) for where, line in found if line]
    if not found:
        raise UserError(f"{path} lists nothing; give a file with one entry a line")
    return found


def is_blocked(url, blocked):
    """Whether the domain of an address, or one that it is a sub-domain of, is blocked."""
    try:
        host = (urlsplit(url if "//" in url else f"//{url}").hostname or "").strip(".")
    except ValueError:  # no address
        return False
    labels = host.split(".")
    return any(".".join(labels[i:]) in blocked for i in range(len(labels)))


# ------------------------------------------------------------------------------------------------------------
# One document


@dataclass
class Cleaned:
    """What is left of a document, and the hashes with which it is compared with others."""

    where: str
    text: str
    bands: np.ndarray | None = None  # (N_BANDS,) uint64
    signature: np.ndarray | None = None  # (N_BANDS * ROWS,) uint8
    paragraphs: np.ndarray | None = None  # (n,) uint64, 0 for a short one


class Cleaner:
    """Takes documents through the steps that look at one document alone; every process has one."""

    def __init__(self, steps, min_share, skip, evaluation):
        self.steps, self.min_share = steps, min_share
        self.evaluation = evaluation  # hashes of the 13-grams of evaluation files, (n,) uint64, sorted
        unknown = [rule for rule in skip if rule not in rules.RULES]
        if unknown:
            raise UserError(f"--skip-rules {unknown[0]} is none of {', '.join(rules.RULES)}")
        language = steps.get("language")
        self.language = rules.Language(language) if language else None
        self.rules = [rule for rule in rules.RULES if rule not in skip and rule.partition(":")[0] in steps]
        bad_words = lines_of(steps["bad_words"]) if "bad_words" in steps else []
        self.bad_words = {" ".join(words_of(line)) for _, line in bad_words}

    def clean_batch(self, documents):
        """What is left of a list of Documents, [Cleaned, ...], and the Counts of what was dropped."""
        counts, cleaned = Counts(), []
        for document in documents:
            try:
                cleaned.append(self.clean(document, counts))
            except (UserError, MemoryError):
                raise
            except Exception as error:
                raise RuntimeError(f"{document.where} cannot be cleaned") from error
        return [document for document in cleaned if document], counts

    def clean(self, document, counts):
        """What is left of a Document, a Cleaned; None if it is dropped."""
        text, steps = document.content, self.steps
        if document.is_page:
            counts.enter("extraction", text)
            text, rule = formats.main_text(document, counts)
            if rule:
                return counts.drop("extraction", rule, document, document.content)
            markup = len(document.content) - len(text.encode())
            counts.cut("extraction", "markup, menus, boilerplate", n_bytes_cut=markup)
        if self.language:
            counts.enter("language", text)
            if self.language.score(text) < self.min_share:
                rule = f"{self.language.code} below {self.min_share:g}"
                return counts.drop("language", rule, document, text)
        words = words_of(text)  # [str, ...]
        if "gopher" in steps:
            counts.enter("gopher", text)
            rule = self.first_broken_rule(rules.GOPHER_QUALITY, rules.gopher_quality, text, words)
            rule = rule or self.first_broken_rule(
                rules.GOPHER_REPETITION, rules.gopher_repetition, text, words
            )
            if rule:
                return counts.drop("gopher", rule, document, text)
        if "c4" in steps or self.bad_words:
            counts.enter("c4", text)
            left, rule, cut = rules.c4(text, words, self.rules, self.bad_words)
            if rule:
                return counts.drop("c4", rule, document, text)
            for rule, line in cut:
                counts.cut("c4", rule, document, line)
            text, words = (left, words_of(left)) if left != text else (text, words)
        hashes = hashes_of(words)  # (n_words,)
        if len(self.evaluation):
            counts.enter("decontamination", text)
            if (duplicates.find(ngrams(hashes, EVALUATION_NGRAM), self.evaluation) >= 0).any():
                rule = f"{EVALUATION_NGRAM}-gram of an evaluation file"
                return counts.drop("decontamination", rule, document, text)
        if "personal_data" in steps:
            counts.enter("personal data", text)
            masked, found = rules.mask_personal_data(text)
            if found and steps["personal_data"] == "drop":
                return counts.drop("personal data", ", ".join(sorted(found)), document, text)
            for kind, n in found.items():
                counts.cut("personal data", f"{kind}, masked", n_parts=n)
            text = masked
        cleaned = Cleaned(document.where, text)
        if "near_duplicates" in steps:
            cleaned.bands, cleaned.signature = duplicates.minhash(hashes)
        if "repeated_paragraphs" in steps:
            parts = [part.strip() for part in paragraphs(text)]
            keys = [hash64(part.encode()) if duplicates.is_long(part) else 0 for part in parts]
            cleaned.paragraphs = np.array(keys, np.uint64)
        return cleaned

    def first_broken_rule(self, ranges, measure, text, words):
        """The first of the rules {rule: (low, high)} of Gopher that a document breaks, or None."""
        measures = measure(text, words)
        for rule, (low, high) in ranges.items():
            if f"gopher:{rule}" in self.rules and not low <= measures[rule] <= high:
                return rule
        return None
