"""To talk with a model: answers that stream as they come, and the conversation on the terminal.

An Assistant answers a conversation; extras/serve.py uses it for the web page, chat() here for the terminal.
Read chat.py first: how a conversation becomes tokens, and how tools answer in the middle of it.
"""

import contextlib
import json
import os
import re
import sys

import numpy as np

import tasks.conversations as mixture
from chat import CALLS, Host, checked, fit, parts, prompt
from common import UserError, say
from generate import SEED, generate

HELP = f"""/reset          begin a new conversation; the system message stays
/system TEXT    tell the model how to behave from now on; without a text: nothing special
                "/system {mixture.SEARCH_SYSTEM}" lets it look facts up
/save PATH      append the conversation to a file of messages, one line of JSON
/help           this list
Ctrl-C stops an answer, and what was said of it stays. End of input (Ctrl-D) ends the chat."""
TOOLS = {"calc": mixture.calculator, "search": mixture.looked_up}  # they answer as they did in training
FORMS = {"text": "{text}", "tool": "[{tool} {call}", "output": " → {output}] ", "note": "\n({note})"}
NOTES = {"length": "cut off at --max-tokens", "context": "cut off: the model's context is full"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what moves the cursor, or sets the clipboard


class Assistant:
    """A model, its tools, and how it draws its tokens: temperature, top_k, top_p, min_p."""

    def __init__(self, model, tokenizer, tools=TOOLS, max_tokens=256, seed=SEED, **sampling):
        special = tokenizer.special_tokens
        if "<|im_start|>" not in special:
            raise UserError("a base model has no chat tokens and cannot talk; make an assistant: make sft")
        self.model, self.tokenizer, self.max_tokens, self.sampling = model, tokenizer, max_tokens, sampling
        self.host = Host(tokenizer, tools)
        self.seed, self.asked = seed, 0  # a question asked again may get another answer
        self.ends = {special["<|im_end|>"], tokenizer.eot}
        hosts = [special[f"<|{name}|>"] for name in ("im_start", "im_sep", "output_start", "output_end")]
        self.legal = ~np.isin(range(tokenizer.vocab_size), hosts)  # (V,): no outputs of its own invention

    def answer(self, conversation, show):
        """Answer the last turn: the content of the assistant's turn, as in chat.py; [] if it said nothing.

        show(events) is called after every token, with a list, often empty, of what there is to see:
        {"text": words}, {"tool": "calc" or "search", "call": text}, {"output": text}, {"note": what we say}.
        Ctrl-C ends the answer, and what was said of it stays, but for a call at its end without its output.
        """
        tokenizer, said, seen, note = self.tokenizer, [], Seen(), None
        n_positions = self.model.config.n_positions
        fitted = fit(tokenizer, conversation, n_positions - min(self.max_tokens, n_positions // 3))

        def on_token(completion, shown, logits):
            said[:] = completion.ids
            show(seen.news(parts(tokenizer, said)))
            return self.host.reply(completion)

        self.asked += 1
        with contextlib.suppress(KeyboardInterrupt):
            if forgotten := len(conversation) - len(fitted):
                show([{"note": f"the oldest {forgotten} messages no longer fit the model's context"}])
            [row] = generate(
                self.model, [prompt(tokenizer, fitted)], self.max_tokens, **self.sampling, seed=self.seed,
                streams=[self.asked], stop_tokens=self.ends, on_token=on_token, allowed=lambda _: self.legal,
            )  # fmt: skip
            note = NOTES.get(row.finish)
        content = parts(tokenizer, said)
        unfinished = lambda part: part["type"] in CALLS or (part["type"] == "output" and "ids" in part)
        while content and unfinished(content[-1]):
            content.pop()
        show(seen.news(content, last=True) + [{"note": note}] * bool(note))
        return content if any(part["text"].strip() for part in content) else []


class Seen:
    """What the person has seen of a growing answer: so many parts, and so many letters of the next."""

    parts = letters = 0

    def news(self, content, last=False):
        """The events since the last time. The last part can still grow: half a call or character waits."""
        events = []
        for part in content[self.parts :]:
            kind, text, growing = part["type"], part["text"], part is content[-1] and not last
            if kind == "text":
                text = text.rstrip("\ufffd") if growing else text
                events += [{"text": text[self.letters :]}] if text[self.letters :] else []
                self.letters = len(text) if growing else 0
            elif not growing:
                events.append({"output": text} if kind == "output" else {"tool": kind, "call": text})
            self.parts += not growing
        return events


def chat(model, tokenizer, **settings):
    """Talk on the terminal until the end of input. What is no terminal gets no prompts and no colours."""
    assistant, system, turns = Assistant(model, tokenizer, **settings), [], []
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if person := sys.stdin.isatty():
        say(HELP)
        with contextlib.suppress(ImportError):  # with it, input() can edit a line
            import readline  # noqa: F401, PLC0415

    def show(events):
        for event in events:
            said = {name: text if name == "text" else text.strip() for name, text in event.items()}
            text = CONTROL.sub("\ufffd", FORMS[next(iter(event))].format(**said))
            print(f"\033[2m{text}\033[0m" if colour and "text" not in event else text, end="", flush=True)

    while True:
        try:
            line = input("> " if person else "").strip()
            match line.split(maxsplit=1):
                case ["/help"]:
                    print(HELP)
                case ["/reset"]:
                    turns = []
                case ["/system", *text]:
                    system = [{"role": "system", "content": text[0]}] if text else []
                case ["/save", path]:
                    saved = json.dumps({"messages": checked(system + turns, True)}, ensure_ascii=False)
                    with open(os.path.expanduser(path), "a", encoding="utf-8", errors="replace") as file:
                        file.write(saved + "\n")
                case [word, *_] if word.startswith("/"):
                    raise UserError(f"{line} is no command; /help lists them")
                case [_, *_]:
                    question = {"role": "user", "content": line}
                    content = assistant.answer([*system, *turns, question], show)
                    turns += [question, {"role": "assistant", "content": content}] if content else []
                    print()
        except EOFError:
            return
        except KeyboardInterrupt:  # between answers: the line is forgotten
            if not person:
                raise
            say("  (end of input, Ctrl-D, ends the chat)")
        except BrokenPipeError:
            raise
        except (UserError, OSError) as error:
            say(f"error: {error}")
