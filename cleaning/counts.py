"""What every step of clean.py took in and dropped, for its table and for meta.json."""

from collections import Counter

import common

STEPS = ["blocklist", "exact duplicates", "extraction", "language", "gopher", "c4"]  # in their order
STEPS += ["decontamination", "personal data", "near duplicates", "paragraphs", "kept"]


def n_bytes(content):
    return len(content) if isinstance(content, bytes) else len(content.encode())


class Counts:
    """What came to each step, and what was dropped or cut there, by which rule, with examples."""

    EXAMPLES = 3

    def __init__(self):
        self.steps = {}  # {step: Counter(documents=…, bytes=…)}
        self.dropped = {}  # {(step, rule): Counter(documents=…, parts=…, bytes=…)}
        self.examples = {}  # {(step, rule): [(where, the beginning), ...]}
        self.encodings = Counter()  # of pages
        self.without_address = 0  # documents that came to the blocklist so

    def enter(self, step, content):
        """A document, or what is left of it, comes to a step."""
        self.steps.setdefault(step, Counter()).update(documents=1, bytes=n_bytes(content))

    def drop(self, step, rule, document, content):
        """A document is dropped."""
        self._count(step, rule, dict(documents=1, bytes=n_bytes(content)), document, content)

    def cut(self, step, rule, document=None, part="", n_bytes_cut=None, n_parts=1):
        """A part of a document is dropped or changed, and the document goes on."""
        size = n_bytes(part) if n_bytes_cut is None else n_bytes_cut
        self._count(step, rule, dict(parts=n_parts, bytes=size), document, part)

    def _count(self, step, rule, amounts, document, content):
        self.dropped.setdefault((step, rule), Counter()).update(amounts)
        examples = self.examples.setdefault((step, rule), [])
        if content and len(examples) < self.EXAMPLES:
            if isinstance(content, bytes):
                content = content[:500].decode("utf-8", "replace")
            examples.append((document.where, " ".join(content[:500].split())[:200]))

    def add(self, other):
        """Add the counts of documents that come later."""
        for step, counter in other.steps.items():
            self.steps.setdefault(step, Counter()).update(counter)
        for key, counter in other.dropped.items():
            self.dropped.setdefault(key, Counter()).update(counter)
            self.examples[key] = (self.examples.get(key, []) + other.examples[key])[: self.EXAMPLES]
        self.encodings += other.encodings

    def rules(self, step):
        """[(rule, Counter), ...] of a step, what dropped most first."""
        found = [(rule, counter) for (at, rule), counter in self.dropped.items() if at == step]
        return sorted(found, key=lambda item: (-item[1]["bytes"], item[0]))

    def table(self):
        """The table for the person: what came to each step, and below it what each rule dropped."""
        rows = [f"{'step, and what it dropped':<44}{'documents':>12}{'parts':>12}{'bytes':>12}"]
        for step in STEPS:
            if step not in self.steps:
                continue
            n = self.steps[step]
            rows.append(f"{step:<44}{n['documents']:>12,}{'':>12}{common.size(n['bytes']):>12}")
            for rule, n in self.rules(step):
                documents, parts = (f"−{n[unit]:,}" if n[unit] else "" for unit in ("documents", "parts"))
                size = f"−{common.size(n['bytes'])}" if n["bytes"] else ""
                rows.append(f"    {rule:<40}{documents:>12}{parts:>12}{size:>12}")
        return "\n".join(rows)

    def shown(self):
        """The examples of what was dropped, for the person."""
        rows = []
        for step in STEPS:
            for rule, _ in self.rules(step):
                rows += ["", f"{step}, {rule}:"] if self.examples[step, rule] else []
                rows += [
                    common.printable(f"    {where}: {text}") for where, text in self.examples[step, rule]
                ]
        return "\n".join(rows)

    def worst(self):
        """What dropped the most documents, in words."""
        if not self.dropped:
            return "there is no document"
        (step, rule), n = max(self.dropped.items(), key=lambda item: item[1]["documents"])
        return f"{step} ({rule}) dropped {n['documents']} of {self.steps[step]['documents']} documents"

    def as_json(self):
        return {
            step: self.steps[step] | {"dropped": dict(self.rules(step))}
            for step in STEPS
            if step in self.steps
        }
