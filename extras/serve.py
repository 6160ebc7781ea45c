"""A web page to talk with a model, for this machine alone: http.server, one HTML file, no other library.

    python -m extras.serve RUN                     then open the address that it prints

The browser keeps the conversation and sends all of it with every question. The answer comes back as
server-sent events while it is generated. Any page that is open in the same browser can send requests to
127.0.0.1, so the server answers only those whose Host header names this machine and whose Origin header, if
there is one, names this server. Read sample.py (Assistant) before this file, chat.html (the page) after it.
"""

import base64
import contextlib
import hashlib
import html
import http.server
import json
import re
import select
import socket
import socketserver
import threading
from pathlib import Path

from common import Parser, UserError, add_shared_flags, number, run, say
from sample import Assistant, is_assistant, load
from tokenizer import checked, visible
from tools import TOOLS

LONGEST = 1 << 18  # bytes of a request, a hundred contexts of GPT-2
QUEUE = 16  # questions taken at a time: one is answered, the others wait
PAGE = Path(__file__).with_name("chat.html")


class Refused(Exception):
    """A request that gets an error in place of an answer: Refused(HTTP status, reason)."""


class Server(http.server.ThreadingHTTPServer):
    """A thread for every connection, and one answer at a time: generate() needs the model for itself."""

    request_queue_size = 64  # connections that the system holds until a thread takes them
    server_bind = socketserver.TCPServer.server_bind  # http.server's own version looks our name up in the DNS

    def __init__(self, assistant, name="a model", port=0):
        self.assistant = assistant
        self.model_lock = threading.Lock()
        self.queue = threading.BoundedSemaphore(QUEUE)
        page = PAGE.read_text(encoding="utf-8").replace("{{model}}", html.escape(name))
        self.page, self.policy = page.encode(), content_security_policy(page)
        super().__init__(("127.0.0.1", port), Handler)


def content_security_policy(page):
    """The Content-Security-Policy header. It allows the page's own script and style, identified by their
    hashes, and connections to this server, nothing else; and it forbids to turn any text into HTML."""
    hashes = []
    for tag in ("script", "style"):
        block = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        hashes.append(base64.b64encode(hashlib.sha256(block.encode()).digest()).decode())
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


class Handler(http.server.BaseHTTPRequestHandler):
    """GET / returns the page; POST /answer and POST /tokens take {"messages": [...]}, a conversation."""

    timeout = 30  # seconds for a client to send or take the next bytes
    server_version, sys_version = "gpt2", ""
    error_message_format, error_content_type = "%(message)s\n", "text/plain"  # http.server's own refusals

    def log_message(self, *_):
        """Nothing: the terminal stays quiet."""

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that goes away is no error
            super().handle()

    def do_GET(self):
        try:
            self.check_sender()
            match self.command, self.path:
                case "GET", "/":
                    self.send(200, "text/html; charset=utf-8", self.server.page)
                case "POST", "/answer":
                    self.in_queue(self.answer)
                case "POST", "/tokens":
                    self.in_queue(self.tokens)
                case _:
                    raise Refused(404, "there are only GET /, POST /answer and POST /tokens")
        except Refused as refused:
            status, reason = refused.args
            self.send(status, "application/json", json.dumps({"error": reason}).encode())

    do_POST = do_GET

    def check_sender(self):
        """Refuse requests of other pages. If one has made its own name mean 127.0.0.1 (DNS rebinding), the
        browser sends that name as Host; if it addresses this server directly, its name is in Origin. The port
        may be another one, as with ssh -L 9000:localhost:8000."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", hosts[0]):
            raise Refused(403, "this server is known as 127.0.0.1 and localhost only")
        if self.headers.get("Origin") not in (None, f"http://{hosts[0]}"):
            raise Refused(403, "only this server's own page may ask")

    def in_queue(self, respond):
        """Call respond() with the conversation of the request, unless too many requests wait already."""
        conversation = self.read_conversation()
        if not self.server.queue.acquire(blocking=False):
            raise Refused(503, "too many questions at once; try again in a few seconds")
        try:
            respond(conversation)
        finally:
            self.server.queue.release()

    def read_conversation(self):
        """The checked conversation of a request."""
        if self.headers.get_content_type() != "application/json":  # a form of a foreign page cannot send it
            raise Refused(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refused(411, "say how long the request is")
        if int(length) > LONGEST:
            self.rfile.read(min(int(length), 16 * LONGEST))  # a client reads only when it has sent everything
            what = f"the request, with system message and conversation, has more than {LONGEST} bytes"
            raise Refused(413, f"{what}; begin a new conversation, or shorten the message")
        try:
            request = json.loads(self.rfile.read(int(length)))
            return checked(request.get("messages") if isinstance(request, dict) else None, False)
        except (ValueError, RecursionError, UserError) as error:
            raise Refused(400, str(error)) from None

    def send(self, status, content_type, body=None):
        """Send headers and body; without a body the response is a stream. The connection ends with it."""
        headers = {
            "Content-Type": content_type,
            "Content-Security-Policy": self.server.policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        if body is not None:
            headers["Content-Length"] = len(body)
        if status == 503:
            headers["Retry-After"] = 5  # seconds
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body or b"")

    def tokens(self, conversation):
        """Send what the model reads of a conversation: (text, id, 1 if special, mask) of every token."""
        tokenizer, rows = self.server.assistant.tokenizer, []
        for id, mask in zip(*tokenizer.render(conversation)):
            rows.append((visible(tokenizer.token_bytes(id)), id, int(id >= tokenizer.eot), mask))
        self.send(200, "application/json", json.dumps({"tokens": rows}).encode())

    def answer(self, conversation):
        """Stream the answer as server-sent events, JSON objects; the last is {"end": true} or an error."""
        if not conversation or conversation[-1]["role"] != "user":
            raise Refused(400, "the last message must be the user's")
        self.send(200, "text/event-stream")
        with self.server.model_lock:
            self.send_events([])  # raises if the client has left while it waited
            try:
                self.server.assistant.answer(conversation, self.send_events)
                self.send_events([{"end": True}])
            except UserError as error:
                self.send_events([{"error": str(error)}])

    def send_events(self, events):
        """Send events. ConnectionError if the client is gone, which ends the answer after any token."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())


def serve(model, tokenizer, name, port, **settings):
    """Serve the page until Ctrl-C. `name` is what the page calls the model; settings are an Assistant's."""
    assistant = Assistant(model, tokenizer, **settings)
    try:
        server = Server(assistant, name, port)
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}; choose another, or 0: any that is free") from None
    print(f"http://127.0.0.1:{server.server_address[1]}  (Ctrl-C ends)", flush=True)
    with server, contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


def parser():
    flags = Parser(
        prog="python -m extras.serve", description="A web page to talk with a model, for this machine alone."
    )
    flags.add_argument("directory", metavar="RUN", help="a run (its newest checkpoint) or a checkpoint")
    add = flags.add_argument_group("page").add_argument
    add("--port", type=number(int, 0, 65535), default=8000, help="to listen on; 0: any free one")
    add = flags.add_argument_group("answers").add_argument
    words = "0: always the most probable token; higher: wilder"
    add("--temperature", type=number(float, low=0, high=1e6), default=0.3, help=words)
    add("--max-tokens", type=number(int, low=1), default=256, help="the longest answer")
    add("--no-search", action="store_true", help="no search, which would fetch the Factbook")
    add_shared_flags(flags.add_argument_group("machine"), "device")
    flags.set_defaults(dtype="float32")
    return flags


def main(argv=None):
    flags = parser().parse_args(argv)
    model, tokenizer, checkpoint = load(flags.directory, flags)
    if not is_assistant(checkpoint):
        say("note: this is a base model, which has not learned to answer; make an assistant of it: make sft")
    tools = {name: tool for name, tool in TOOLS.items() if name != "search" or not flags.no_search}
    settings = dict(tools=tools, temperature=flags.temperature, max_tokens=flags.max_tokens)
    serve(model, tokenizer, str(checkpoint), flags.port, **settings)


if __name__ == "__main__":
    run(main)
