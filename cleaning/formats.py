"""Files become documents: plain text, JSON lines, web pages and web archives, each of them also as .gz.

    .txt .md              one document a file; a text of over 262,144 characters becomes several
    .jsonl                one document a line, {"text": "…"}; its address, if it has one, under "url"
    .html .htm .xhtml     one page a file; trafilatura takes the main text out of the markup
    .warc .wet            an archive of the web, as Common Crawl's: one page a record, or its text

The encoding of a file is found out, not assumed. Damage is named, with its file and record, and counted, and
what follows it is read. Memory holds the document in hand only. data.py, which is read before this file,
needs pieces() and json_rows(); the others are for clean.py, which is read next.
"""

import codecs
import contextlib
import gzip
import io
import json
import logging
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import common
from common import UserError
from tokenizer import utf8

LONGEST_LINE = 1 << 26  # characters; a .jsonl file with a longer line is not a list of documents
TEXT = (".txt", ".md", ".jsonl")
WEB = (".html", ".htm", ".xhtml", ".warc", ".wet")  # these need requirements-clean.txt

# Common Crawl cuts pages off at 5 MiB. The time of trafilatura grows with the square of the length: on one
# core of an EPYC 1 MB takes 0.8 seconds, 5 MB take 8 and 20 MB 193.
LARGEST_PAGE = 5 << 20  # bytes

# Text files, which may be larger than memory, are cut so that Gopher's limit of 100,000 words drops none for
# its length. data.py cuts again what is kept, by --document-chars.
LONGEST_TEXT = 1 << 18  # characters


@dataclass
class Document:
    """A document as it was found."""

    where: str  # its file, and the line or record in it
    content: str | bytes  # bytes for a page, whose encoding is not known yet
    url: str = ""
    is_page: bool = False
    charset: str | None = None  # what a server said of a page


def in_batches(documents, content_of, size, most=None):
    """Yield the documents in lists of about `size` characters or bytes of content, of `most` documents."""
    batch, n = [], 0
    for document in documents:
        batch.append(document)
        n += len(content_of(document))
        if n >= size or len(batch) == most:
            yield batch
            batch, n = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def extra(what):
    """With this, an import of what requirements-clean.txt has: UserError if it is not installed."""
    try:
        yield
    except ImportError as error:
        remedy = "python -m pip install -r requirements-clean.txt"
        raise UserError(f"{what} needs {error.name or error}; install it: {remedy}") from None


def require(paths):
    """UserError, before the work begins, if something is not installed that reading these files may need."""
    pages = [path for path in paths if suffix_of(path) in WEB]
    with extra(pages[0] if pages else "cleaning"):
        import charset_normalizer  # noqa: F401, PLC0415

        if pages:
            import trafilatura  # noqa: F401, PLC0415
            import warcio  # noqa: F401, PLC0415


def suffix_of(path):
    """The suffix that says what is in a file, in small letters: .html for page.HTML.gz."""
    path = Path(path)
    return (Path(path.stem) if is_gzip(path) else path).suffix.lower()


def is_gzip(path):
    return Path(path).suffix.lower() == ".gz"


def read_text(path):
    """The text of a small file; UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"{path}: {reason}; give a text file") from None


# ------------------------------------------------------------------------------------------------------------
# Text files


def pieces(file, longest):
    """Yield an open file's text as one document, or cut into several of at most `longest` characters."""
    text = ""
    while block := file.read(longest):
        text += block
        while len(text) > longest:
            end = end_of_piece(text, longest)
            yield text[:end]
            text = text[end:]
    yield text


def end_of_piece(text, longest):
    """Where to cut: at the last blank line among the first `longest` characters; else at a line, or a space.

    A piece is never shorter than half of that: if it would be, it is cut after exactly `longest` characters.
    """
    for gap in ("\n\n", "\n", " "):
        end = text.rfind(gap, 0, longest) + len(gap)
        if end > longest // 2:
            return end
    return longest


def large_pieces(file):
    """Yield an open file's text as a document, or in pieces long enough for each to be judged as one.

    A rest shorter than half of LONGEST_TEXT, which only the last piece can be, goes with the piece before it.
    """
    before = ""
    for piece in pieces(file, LONGEST_TEXT):
        if before and len(piece) >= LONGEST_TEXT // 2:
            yield before
            before = ""
        before += piece
    yield before


def json_rows(file, name):
    """Yield (where, row) of an open .jsonl file's lines; row["text"] is a str, "" for a blank line."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line.rstrip("\n")) > LONGEST_LINE:
            limit = common.count(LONGEST_LINE)
            raise UserError(f"{where} has over {limit} characters; cut the document into several lines")
        try:
            row = json.loads(line) if line.strip() else {"text": ""}
            row["text"] = utf8(row["text"]).decode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(f'{where} is not of the form {{"text": "…"}}; correct or delete it') from None
        yield where, row


# ------------------------------------------------------------------------------------------------------------
# Encodings

BOMS = {  # the longest first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
META = re.compile(rb"<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*[\"']?([\w-]+)", re.I)
SAMPLE = 1 << 16  # bytes that charset-normalizer sees of a file: what is around letters that are no ASCII
NOT_ASCII = re.compile(rb"[^\n]{0,80}[\x80-\xff]+[^\n]{0,80}")


def encoding_of(blocks):
    """The encoding of the text that these bytes are, given as an iterable of blocks.

    A byte order mark decides. Else it is UTF-8 if all of it is, or if more of its letters than not are: then
    it is damaged, and a few become U+FFFD. Else charset-normalizer guesses.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    marked, sample, valid, invalid = None, b"", 0, 0  # letters that are no ASCII, and what is no letter
    for block in blocks:
        if marked is None:
            marked = byte_order(block)
            if marked:
                return marked
        if block.isascii():
            continue
        text = decoder.decode(block)
        here = text.count("\ufffd") - block.count("\ufffd".encode())
        invalid += here
        valid += len(text) - len(text.encode("ascii", "ignore")) - here
        if here and len(sample) < SAMPLE:
            sample += b"\n".join(NOT_ASCII.findall(block))[:SAMPLE]
    if invalid <= valid:
        return "utf-8"
    import charset_normalizer  # noqa: PLC0415  an extra, see require()

    guess = charset_normalizer.from_bytes(sample).best()
    return guess.encoding if guess else "utf-8"


def byte_order(block):
    """The encoding that the first bytes of a text reveal, "" if none."""
    for bom, encoding in BOMS.items():
        if block.startswith(bom):
            return encoding
    for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if block[start::2].count(0) > len(block) // 4:  # every other byte of ASCII is 0
            return encoding
    return ""


def decode_page(content, charset):
    """The text of a page and its encoding.

    Many pages in UTF-8 say that they are something else, and hardly any other text is valid UTF-8 by
    accident. So what a page says, in its <meta> or by its server, counts only if it is not UTF-8.
    """
    encoding = byte_order(content)
    if not encoding and b"\x1b" not in content and decodes(content, "utf-8"):  # escapes: ISO-2022-JP
        encoding = "utf-8"
    if not encoding:
        meta = META.search(content[:4096])
        named = (charset or (meta and meta[1].decode("ascii", "replace")) or "").lower()
        if named in ("iso-8859-1", "latin-1", "latin1", "ascii", "us-ascii"):
            named = "cp1252"  # as all browsers read it
        encoding = named if decodes(content, named) else encoding_of([content])
    return content.decode(encoding, "replace"), encoding


def decodes(content, encoding):
    """Whether bytes are text in an encoding, given by its name; not if Python does not know it."""
    try:
        content.decode(encoding)
        return True
    except (UnicodeError, LookupError):
        return False


# ------------------------------------------------------------------------------------------------------------
# Reading

GZIP_MEMBER, WARC_RECORD = re.compile(rb"\x1f\x8b\x08"), re.compile(rb"(?<=\n)WARC/1\.[01]\r\n")
LINK = re.compile(rb"<link\b[^<>]*>", re.I)
CANONICAL = re.compile(rb"\brel\s*=\s*[\"']?canonical\b", re.I)
HREF = re.compile(rb"\bhref\s*=\s*[\"']?([^\"'\s>]+)", re.I)


class Reader:
    """Reads files: `for document in reader.documents(paths)`. Then it knows what could not be read."""

    def __init__(self, standard_input=None):
        self.standard_input = standard_input  # the path of a file that was copied from there
        self.encodings = Counter()  # of the text files
        self.damaged = Counter()  # {what: how many}
        self.no_pages = Counter()  # records of archives that are something else: {what: how many}
        self.noted = set()
        self.bytes_read = 0  # of the files, in which a .gz is small

    def documents(self, paths):
        """Yield the Documents in the files, in their order."""
        for path in paths:
            with open(path, "rb") as raw:
                before = self.bytes_read
                for document in self._documents_of(path, raw):
                    self.bytes_read = before + raw.tell()
                    yield document
            self.bytes_read = before + os.path.getsize(path)

    def _documents_of(self, path, raw):
        suffix = suffix_of(path)
        if suffix in (".warc", ".wet"):
            yield from self._archive(path, raw)
            return
        file = self._decompressed(path, raw) if is_gzip(path) else raw
        if suffix in WEB:
            content = file.read(LARGEST_PAGE + 1)
            yield Document(str(path), content, canonical_url(content), is_page=True)
            return
        encoding = encoding_of(iter(lambda: file.read(1 << 20), b""))
        self.encodings[encoding] += 1
        file.seek(0)
        decoded = io.TextIOWrapper(file, encoding, errors="replace")
        if suffix != ".jsonl":
            for number, piece in enumerate(large_pieces(decoded), 1):
                name = "standard input" if path == self.standard_input else str(path)
                yield Document(f"{name}, part {number}" if number > 1 else name, piece)
            return
        for where, row in json_rows(decoded, path):
            url = row["url"] if isinstance(row.get("url"), str) else ""
            text = row["text"].replace("\r\n", "\n")  # as open() reads text files
            texts = [text]
            if len(text) > LARGEST_PAGE:  # the steps would take much memory for it
                texts = large_pieces(io.StringIO(text))
            for text in texts:
                yield Document(where, text, url)

    def _decompressed(self, path, raw):
        """An open .gz as a file of what it holds. If it is damaged, it ends where the damage is."""
        text = f"{path} is damaged; what comes before the damage is read"
        return io.BufferedReader(Decompressed(raw, lambda: self._note("compressed files", text)), 1 << 16)

    def _note(self, kind, text):
        """Count a damage, once, and tell the person, unless there have been many."""
        if text in self.noted:
            return
        self.noted.add(text)
        self.damaged[kind] += 1
        if self.damaged[kind] <= 5:
            more = "; further ones are counted only" * (self.damaged[kind] == 5)
            common.say(common.printable(f"note: {text}{more}"))

    def passed_over(self):
        """What in the files was not read, and how often, for the person: [line, ...]."""
        lines = []
        for what, counter in (("records that are no pages", self.no_pages), ("damaged", self.damaged)):
            commonest = counter.most_common(8)
            n_others = counter.total() - sum(n for _, n in commonest)
            kinds = [f"{kind} ({n:,})" for kind, n in [*commonest, ("others", n_others)] if n]
            if kinds:
                lines.append(common.printable(f"{what}: {', '.join(kinds)}"))
        return lines

    def _archive(self, path, raw):
        """Yield the pages in a WARC file. Behind a damaged record it goes on with the next whole one."""
        from warcio import archiveiterator  # noqa: PLC0415

        mark = GZIP_MEMBER if is_gzip(path) and not is_single_member(raw) else WARC_RECORD
        file = self._decompressed(path, raw) if is_gzip(path) and mark is WARC_RECORD else raw
        start, number = 0, 0
        while start is not None:
            file.seek(start)
            records, at = archiveiterator.ArchiveIterator(file), None  # at: where record `number` begins
            try:
                while True:
                    with contextlib.redirect_stderr(io.StringIO()):  # what it warns of we say ourselves
                        record = next(records, None)
                    if records.err_count:
                        raise ValueError("the record does not end where it says")
                    if record is None:
                        return
                    number, at = number + 1, records.offset
                    page = self._page(record, f"{path}, record {number}")
                    if page:
                        yield page
            except Exception:  # warcio has many for damaged records, AttributeError among them
                is_next = at is None or (records.offset > at and not records.err_count)
                number += is_next
                self._note("records of archives", f"{path}, record {number} is damaged; going on behind it")
                start = next_record(file, (records.offset if is_next else at) + 1, mark)

    def _page(self, record, where):
        """The Document of a record if it is a page as a server sent it, or a page's text, else None."""
        if not hasattr(record.raw_stream, "limit"):
            raise ValueError("the record does not say how long it is")
        http = record.http_headers
        kind = (http.get_header("content-type") or "").lower() if http else ""
        if record.rec_type == "conversion":  # of .wet
            what = ""
        elif record.rec_type != "response":
            what = record.rec_type
        elif not http:
            what = record.rec_headers.get_header("Content-Type") or "no HTTP"
        elif http.get_statuscode() != "200":
            what = f"status {http.get_statuscode()}"
        elif kind and "html" not in kind:
            what = kind.partition(";")[0].strip()
        else:
            what = ""
        if what:
            self.no_pages[what] += 1
            return None
        content = record.content_stream().read(LARGEST_PAGE + 1)
        if len(content) <= LARGEST_PAGE and record.raw_stream.limit:
            raise EOFError("the file ends within the record")
        if WARC_RECORD.search(content):
            raise ValueError("the record goes on into the next one")
        charset = re.search(r"charset=[\"']?([\w-]+)", kind)
        url = (record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>")
        if record.rec_type == "conversion":
            return Document(where, content.decode("utf-8", "replace").replace("\r\n", "\n"), url)
        return Document(where, content, url, is_page=True, charset=charset and charset[1])


class Decompressed(io.RawIOBase):
    """What an open .gz holds. If it is damaged, the file ends where the damage is, and damaged() is called.

    GzipFile.read(n) would lose up to n bytes before the damage. So it is asked for few bytes at a time.
    """

    def __init__(self, raw, damaged):
        self.file, self.damaged = gzip.GzipFile(fileobj=raw), damaged

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, place, whence=io.SEEK_SET):
        with self._up_to_damage():
            self.file.seek(place, whence)
        return self.file.tell()

    def readinto(self, buffer):
        block = b""
        with self._up_to_damage():
            block = self.file.read1(min(len(buffer), 1 << 13))
        buffer[: len(block)] = block
        return len(block)

    @contextlib.contextmanager
    def _up_to_damage(self):
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile):
            self.damaged()


def canonical_url(page):
    """The address that a page gives as its own, "" if it gives none."""
    for link in LINK.findall(page[: 1 << 16]):
        address = HREF.search(link)
        if address and CANONICAL.search(link):
            return address[1].decode("utf-8", "replace")
    return ""


def is_single_member(raw):
    """Whether an open .warc.gz is one member of gzip; warcio reads those that have one for every record."""
    decompressor, text = zlib.decompressobj(31), b""
    with contextlib.suppress(zlib.error):  # up to a damage
        for _ in range(64):
            text += decompressor.decompress(raw.read(1 << 10))
    raw.seek(0)
    return len(re.findall(rb"^WARC/\d", text, re.M)) > 1


def next_record(file, start, mark):
    """Where in an open file, from `start` on, the pattern `mark` first matches; None if nowhere."""
    file.seek(start)
    block = file.read(1 << 20)
    while block:
        found = mark.search(block)
        if found:
            return start + found.start()
        tail, rest = block[-16:], file.read(1 << 20)  # the mark may lie across two blocks
        if not rest:
            return None
        start += len(block) - len(tail)
        block = tail + rest
    return None


# ------------------------------------------------------------------------------------------------------------
# The main text of a page


def main_text(document, counts):
    """The main text of a page, a paragraph a line, and None; or "" and why it has none."""
    if len(document.content) > LARGEST_PAGE:
        return "", f"larger than {common.size(LARGEST_PAGE)}"
    import trafilatura  # noqa: PLC0415

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it has something to say of many pages
    page, encoding = decode_page(document.content, document.charset)
    counts.encodings[encoding] += 1
    page = re.sub(r"^\s*<\?xml[^>]*\?>", "", page)  # lxml refuses a text that names an encoding
    try:
        tree = trafilatura.load_html(page)
        if tree is None:
            return "", "no HTML"
        join_lines(tree)
        # With deduplicate=True it would compare with the pages that this process had before.
        text = trafilatura.extract(tree, fast=True, include_comments=False, deduplicate=False)
    except Exception:  # whatever a page does to the parser, the others are read
        return "", "trafilatura fails"
    lines = [line.strip() for line in (text or "").split("\n")]
    text = "\n".join(line for line in lines if line)
    return text, None if text else "no main text"


def join_lines(tree):
    """Make line breaks in a page spaces, as browsers do, but for <pre>: a paragraph becomes one line."""
    kept = {element for pre in tree.iter("pre", "textarea") for element in pre.iter()}
    for element in tree.iter():
        if element.text and element not in kept and isinstance(element.tag, str):
            element.text = re.sub(r"\s+", " ", element.text)
        if element.tail and (element not in kept or element.tag in ("pre", "textarea")):
            element.tail = re.sub(r"\s+", " ", element.tail)
