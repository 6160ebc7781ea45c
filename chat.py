"""The chat format: a conversation as one flat stream of tokens, and tools that answer in the middle of it.

    <|endoftext|><|im_start|>user<|im_sep|>What is 3 * 17?<|im_end|><|im_start|>assistant<|im_sep|>
    <|calc_start|>3*17<|calc_end|><|output_start|>51<|output_end|>It is 51.<|im_end|>

A conversation is a list of {"role": "system" | "user" | "assistant", "content": ...}; a content is a text or
a list of parts {"type": "text" | "calc" | "search" | "output", "text": ...}. The assistant says texts, calls
of the calculator and searches; the host pastes the outputs in. Read tokenizer.py first, where the special
tokens are, and sft.py, which learns from conversations, after.
"""

import json
from pathlib import Path

from common import UserError

ROLES = ("system", "user", "assistant")
CALLS = ("search", "calc")  # the kinds of parts that call a tool, which answers with an "output"


def render(tokenizer, conversation):
    """The tokens of a conversation, and its mask, as long: 1 where a token is for the assistant to say, that
    is its words, its calls and its <|im_end|>; 0 on headers, users, system messages and outputs of tools."""
    tokens, mask = [tokenizer.eot], [0]
    for turn in conversation:
        for ids, said in _pieces(tokenizer, turn):
            tokens += ids
            mask += [said] * len(ids)
    return tokens, mask


def prompt(tokenizer, conversation):
    """The tokens after which the assistant speaks."""
    return render(tokenizer, conversation)[0] + _header(tokenizer, "assistant")


def fit(tokenizer, conversation, room):
    """The conversation without its oldest turns, as many of them as do not fit `room` tokens.

    What counts are the tokens of the prompt, or of the whole if the assistant has the last word. System
    messages and the last user turn (with the answer to it) always stay; UserError if they are too long.
    """
    lengths = [sum(len(ids) for ids, _ in _pieces(tokenizer, turn)) for turn in conversation]
    around = 1 if conversation[-1]["role"] == "assistant" else len(prompt(tokenizer, []))
    kept = range(len(conversation))
    for first in (0, *(i for i in kept if conversation[i]["role"] == "user")):  # answers go with questions
        kept = [i for i in kept if i >= first or conversation[i]["role"] == "system"]
        needed = around + sum(lengths[i] for i in kept)
        if needed <= room:
            return [conversation[i] for i in kept]
    raise UserError(f"the last turn takes {needed} tokens and there is room for {room}; shorten it")


def _pieces(tokenizer, turn):
    """A turn as [(ids, 1 if the assistant has to say them, else 0), ...].

    Every part is encoded for itself, with nothing added and nothing taken away: what a model has said, taken
    apart by parts(), becomes the same ids again.
    """
    role, content = turn["role"], turn["content"]
    said = int(role == "assistant")
    pieces = [(_header(tokenizer, role), 0)]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part["type"]
        if kind != "text" and not said:
            raise UserError(f"a {role} turn has a part of type {kind!r}; only the assistant calls tools")
        ids = (said and part.get("ids")) or _part(tokenizer, kind, part["text"])
        pieces.append((ids, int(said and kind != "output")))
    return [*pieces, ([tokenizer.encode_special("<|im_end|>")], said)]


def _header(tokenizer, role):
    if "<|im_start|>" not in tokenizer.special_tokens:
        raise UserError("this model has no chat tokens; make an assistant of it with sft.py first")
    special = tokenizer.encode_special
    return [special("<|im_start|>"), *tokenizer.encode(role), special("<|im_sep|>")]


def _part(tokenizer, kind, text):
    ids = tokenizer.encode(text)
    if kind == "text":
        return ids
    start, end = map(tokenizer.encode_special, (f"<|{kind}_start|>", f"<|{kind}_end|>"))
    return [start, *ids, end]


# ------------------------------------------------------------------------------------------------------------
# From tokens to a conversation


def parts(tokenizer, ids):
    """What the assistant has said, as the list of parts of its turn, without the token that ended it.

    A part that would not become the ids it came from keeps them, under "ids": letters in unusual pieces, half
    a character, a call without an end, any other special token (which is text, by its name).
    """
    special = {id: name for name, id in tokenizer.special_tokens.items()}
    if ids and special.get(ids[-1]) in ("<|im_end|>", "<|endoftext|>"):
        ids = ids[:-1]
    found, i = [], 0
    while i < len(ids):
        kind = special.get(ids[i], "")[2:].removesuffix("_start|>")
        after = next((j for j in range(i + 1, len(ids)) if ids[j] in special), len(ids))  # of plain tokens
        if kind in (*CALLS, "output"):
            end = after + (ids[after : after + 1] == [tokenizer.encode_special(f"<|{kind}_end|>")])
            text = tokenizer.decode(ids[i + 1 : after])
        else:
            if found and found[-1]["type"] == "text":  # this one begins with a token that means nothing here
                i -= len(found.pop()["ids"])
            kind, end, text = "text", after, tokenizer.decode(ids[i:after])
        found.append({"type": kind, "text": text, "ids": ids[i:end]})
        i = end
    for part in found:
        if part["ids"] == _part(tokenizer, part["type"], part["text"]):
            del part["ids"]
    return found


def text_of(content):
    """The assistant's words, without calls and outputs."""
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


class Host:
    """Runs the tools that the assistant calls: {"calc": function of a text to a text, "search": the same}.

    For generate():  on_token=lambda row, shown, logits: host.reply(row)
    """

    def __init__(self, tokenizer, tools):
        self.tokenizer, self.tools = tokenizer, tools
        self.ends = {tokenizer.special_tokens.get(f"<|{kind}_end|>"): kind for kind in CALLS}

    def reply(self, completion):
        """The ids to append: the output of a tool if the completion's last token ends a call, else None."""
        kind = self.ends.get(completion.ids[-1])
        if kind is None:
            return None
        call = parts(self.tokenizer, completion.ids)[-1]
        tool = self.tools.get(kind, lambda _: f"error: no {kind} here")
        output = tool(call["text"]) if call["type"] == kind else "error: this call has no beginning"
        return _part(self.tokenizer, "output", output)


# ------------------------------------------------------------------------------------------------------------
# Conversations in files


def read(path, skip_bad=False):
    """The conversations of a JSONL file, and how many bad lines were skipped: (conversations, skipped).

    A line is {"messages": [...]}, as OpenAI and Hugging Face write it, or the bare list. Without skip_bad a
    bad line is a UserError: which one, and why.
    """
    conversations, skipped = [], 0
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a file of conversations") from None
    for number, line in ((number, line) for number, line in enumerate(lines, 1) if line.strip()):
        try:
            found = json.loads(line)
            conversations.append(checked(found.get("messages") if isinstance(found, dict) else found, True))
        except (UserError, ValueError, RecursionError) as error:
            reason = error if isinstance(error, UserError) else f"no JSON ({getattr(error, 'msg', error)})"
            if not skip_bad:
                raise UserError(f"{path}, line {number}: {reason}; correct it or skip bad lines") from None
            skipped += 1
    if not conversations:
        raise UserError(f'{path} has no conversation; every line should be {{"messages": [...]}}')
    return conversations, skipped


def checked(messages, training=False):
    """Messages from outside as a conversation that has nothing else in it; UserError says what is wrong.
    Empty ones are left out; for training only the system's may be empty, and the assistant must speak."""
    if not isinstance(messages, list):
        raise UserError('there is no list of "messages"')
    conversation = []
    for i, message in enumerate(messages, 1):
        role, content = map(message.get, ("role", "content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise UserError(f"message {i} has the role {role!r}, which is none of {', '.join(ROLES)}")
        kinds = ("text", *CALLS, "output") if role == "assistant" else ("text",)
        found = [{"type": "text", "text": content}] if isinstance(content, str) else content
        try:
            found = [{"type": part["type"], "text": part["text"]} for part in found]
            sound = all(part["type"] in kinds and isinstance(part["text"], str) for part in found)
        except (TypeError, KeyError):
            sound = False
        if not sound:
            what = f"a text or a list of parts, each with a text and a type: {' or '.join(kinds)}"
            raise UserError(f"the content of message {i} ({role}) is not {what}")
        if any(part["text"].strip() for part in found):
            conversation.append({"role": role, "content": content if isinstance(content, str) else found})
        elif training and role != "system":
            raise UserError(f"message {i} ({role}) is empty")
    if training and "assistant" not in [turn["role"] for turn in conversation]:
        raise UserError("the assistant never speaks")
    return conversation
