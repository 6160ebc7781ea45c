"""A web page to talk with a model, for this machine alone: http.server, one HTML file, no other library.

    python -m extras.serve RUN                     then open the address that it prints

The browser keeps the conversation and sends all of it with every question; the answer comes back, while it
is made, as server-sent events. Only the page that this server has sent may ask: any other that is open in
the same browser can reach 127.0.0.1 too, so a request must tell the right origin, and the right name for us.
Read sample.py first, which answers, and chat.html after, the page.
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

from common import Parser, UserError, number, run, say
from sample import TOOLS, Assistant, is_assistant, load
from tasks.conversations import checked
from tokenizer import visible

LONGEST = 1 << 18  # bytes of a request: a hundred contexts of GPT-2
WAITING = 16  # answers asked for at a time; one is made, the others wait in line
PAGE = Path(__file__).with_name("chat.html")


class Refused(Exception):
    """A request that is not answered: Refused(status, why)."""


class Server(http.server.ThreadingHTTPServer):
    """A thread for every connection, and one answer at a time: generate() has the model to itself."""

    request_queue_size = 64  # connections that the system holds until a thread takes them
    server_bind = socketserver.TCPServer.server_bind  # http.server's asks the network for our name

    def __init__(self, assistant, name="a model", port=0):
        self.assistant, self.model = assistant, threading.Lock()
        self.places = threading.BoundedSemaphore(WAITING)
        page = PAGE.read_text(encoding="utf-8").replace("{{model}}", html.escape(name))
        self.page, self.policy = page.encode(), policy(page)
        super().__init__(("127.0.0.1", port), Handler)
        self.hosts = {f"{host}:{self.server_address[1]}" for host in ("127.0.0.1", "localhost")}
        self.hosts |= {host.removesuffix(":80") for host in self.hosts}  # which no browser writes


def policy(page):
    """The Content-Security-Policy: no script and no style but the page's own, known by their hashes; no
    address but ours; and never a text that is read as HTML, whatever the script should try."""
    blocks = [re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1].encode() for tag in ("script", "style")]
    script, style = (base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks)
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


class Handler(http.server.BaseHTTPRequestHandler):
    """GET / is the page; POST /answer and POST /tokens take {"messages": [...]}, as sample.py reads them."""

    timeout = 30  # seconds for a client to send or take the next bytes
    server_version, sys_version = "gpt2", ""
    error_message_format, error_content_type = "%(message)s\n", "text/plain"  # http.server's own refusals

    log_message = lambda *_: None  # the terminal stays quiet

    def handle(self):
        with contextlib.suppress(ConnectionError):  # whoever goes away is not worth a traceback
            super().handle()

    def do_GET(self):
        try:
            if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
                raise Refused(403, "this server is known as 127.0.0.1 and localhost only")  # DNS rebinding
            if self.headers.get("Origin") not in (None, *(f"http://{host}" for host in self.server.hosts)):
                raise Refused(403, "only this server's own page may ask")
            asked = f"{self.command} {self.path}"
            if asked == "GET /":
                self.send(200, "text/html; charset=utf-8", self.server.page)
            elif asked not in ("POST /answer", "POST /tokens"):
                raise Refused(404, "there are only GET /, POST /answer and POST /tokens")
            else:
                conversation = self.conversation()
                if not self.server.places.acquire(blocking=False):
                    raise Refused(503, "too many questions at once; try again in a few seconds")
                try:
                    (self.answer if self.path == "/answer" else self.tokens)(conversation)
                finally:
                    self.server.places.release()
        except Refused as refused:
            self.send(refused.args[0], "application/json", json.dumps({"error": refused.args[1]}).encode())

    do_POST = do_GET

    def conversation(self):
        if self.headers.get_content_type() != "application/json":  # the form of a foreign page cannot be that
            raise Refused(415, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refused(411, "say how long the request is")
        if int(length) > LONGEST:
            self.rfile.read(min(int(length), 16 * LONGEST))  # who is still sending would not hear us
            raise Refused(413, f"the conversation has more than {LONGEST} bytes; begin a new one")
        try:
            request = json.loads(self.rfile.read(int(length)))
            return checked(request.get("messages") if isinstance(request, dict) else None, False)
        except (ValueError, RecursionError, UserError) as error:
            raise Refused(400, str(error)) from None

    def send(self, status, kind, body=None):
        """The head of a response, and its body unless that is to be streamed; the connection ends with it."""
        headers = {"Content-Type": kind, "Content-Security-Policy": self.server.policy}
        headers |= {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        headers |= {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
        headers |= {"Content-Length": len(body)} if body is not None else {}
        headers |= {"Retry-After": 5} if status == 503 else {}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body or b"")

    def tokens(self, conversation):
        """The conversation as the model reads it, for every token: text, id, 1 if special, and its mask."""
        tokenizer, rows = self.server.assistant.tokenizer, []
        for id, said in zip(*tokenizer.render(conversation)):
            rows.append((visible(tokenizer.token_bytes(id)), id, int(id >= tokenizer.eot), said))
        self.send(200, "application/json", json.dumps({"tokens": rows}).encode())

    def answer(self, conversation):
        """The answer as server-sent events, one JSON object each; the last is {"end": true} or an error."""
        if not conversation or conversation[-1]["role"] != "user":
            raise Refused(400, "the last message must be the user's")
        self.send(200, "text/event-stream")
        with self.server.model:
            self.show([])  # who has left the queue meanwhile?
            try:
                self.server.assistant.answer(conversation, self.show)
                self.show([{"end": True}])
            except UserError as error:
                self.show([{"error": str(error)}])

    def show(self, events):
        """Send events. Raises where nobody listens any more, which ends the answer: after every token."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionError
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())


def serve(model, tokenizer, name, port=8000, **settings):
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
    add("--port", metavar="N", type=number(int, low=0, high=65535), default=8000, help="0: any that is free")
    add = flags.add_argument_group("answers").add_argument
    words = "0: always the most probable token; higher: wilder"
    add("--temperature", metavar="X", type=number(float, low=0, high=1e6), default=0.3, help=words)
    add("--max-tokens", metavar="N", type=number(int, low=1), default=256, help="the longest answer")
    add("--no-search", action="store_true", help="without looking into the Factbook, and fetching it")
    add = flags.add_argument_group("machine").add_argument
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
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
