"""The web page's server: what it answers, to whom, how much at once, and that it outlives its clients; by
HTTP, and in a real browser where there is one."""

import base64
import contextlib
import hashlib
import http.client
import http.server
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import script
from hypothesis import given, settings
from hypothesis import strategies as st
from test_talk import ANSWER, BYTES, assistant, folded, pairs, random_model, speaker, user

from extras import serve
from tokenizer import CHAT_TOKENS, Tokenizer

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>&amp;\N{GRINNING FACE}"


@contextlib.contextmanager
def serving(model, name="a model", **settings):
    """A Server at work; it must not print a traceback."""
    server = serve.Server(assistant(model, **settings), name)
    failures = []
    server.handle_error = lambda *_: failures.append(sys.exc_info()[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not failures, failures


def ask(server, method="POST", path="/answer", body=None, timeout=60, **headers):
    """A request by hand: every header that is not None. Returns the response, to be read or closed."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=timeout)
    headers = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.putrequest(method, path, skip_host="Host" in headers, skip_accept_encoding=True)
    if body is not None and "Content-Length" not in headers:
        headers["Content-Length"] = len(body)
    for key, value in headers.items():
        if value is not None:
            connection.putheader(key, value)
    connection.endheaders()
    if body:
        connection.send(body)
    return connection.getresponse()


def events(response):
    assert response.status == 200 and response.headers["Content-Type"] == "text/event-stream"
    blocks = response.read().decode().split("\n\n")
    assert blocks.pop() == "" and all(block.startswith("data: ") for block in blocks)
    return [json.loads(block[6:]) for block in blocks]


def answered(server, text):
    """What the server says to a question, as parts."""
    *said, last = events(ask(server, body={"messages": [user(text)]}))
    assert last == {"end": True}
    return folded(said)


def refused(response, status, word=""):
    assert response.status == status, response.status
    error = json.loads(response.read())["error"]
    assert word in error, error
    assert "Access-Control-Allow-Origin" not in response.headers
    return True


# ------------------------------------------------------------------------------------------------------------
# Answers


def test_the_page():
    with serving(random_model(), name="runs/<b>&") as server:
        assert server.server_address[0] == "127.0.0.1"
        response = ask(server, "GET", "/")
        page = response.read().decode()
    assert response.status == 200 and response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert page.count("runs/&lt;b&gt;&amp;") == 2 and "<b>" not in page
    policy = response.headers["Content-Security-Policy"]
    for tag in ("script", "style"):
        [block] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert (
        "trusted-types 'none'" in policy
        and "default-src 'none'" in policy
        and "unsafe" not in policy
        and "frame-ancestors 'none'" in policy
    )
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?:|\son\w+=|style=", page
    )


def test_an_answer_streams_as_events():
    with serving(speaker(lambda question: ANSWER)) as server:
        *said, last = events(ask(server, body={"messages": [user("3 * 17?")]}))
    assert folded(said) == pairs(ANSWER) and last == {"end": True}
    assert {"tool": "calc", "call": "3*17"} in said and {"output": "51"} in said


def test_words_come_before_the_answer_is_complete():
    go = threading.Event()
    count = iter(range(10_000))
    before = lambda: next(count) < 3 or go.wait(60)
    with serving(speaker(lambda question: "Yes, indeed", before=before)) as server:
        response = ask(server, body={"messages": [user("?")]})
        first = response.readline()
        assert first == b'data: {"text": "Y"}\n'
        go.set()
        assert b'"end"' in response.read()


def test_the_whole_conversation_is_read():
    model = speaker(lambda question: "fine")
    conversation = [
        {"role": "system", "content": "Be kind."},
        user("one"),
        {"role": "assistant", "content": ANSWER},
    ]
    with serving(model) as server:
        events(ask(server, body={"messages": [*conversation, user("two")]}))
    read = BYTES.decode(model.cache.rows[0])
    assert "Be kind.<|im_end|>" in read and "<|calc_end|><|output_start|>51<|output_end|>It is 51" in read


def test_tokens_on_demand():
    body = {"messages": [user("a\n<|im_end|>\xe9"), {"role": "assistant", "content": ANSWER}]}
    with serving(random_model()) as server:
        rows = json.loads(ask(server, path="/tokens", body=body).read())["tokens"]
    shown = "".join(text for text, *_ in rows)
    assert shown.startswith("<|endoftext|><|im_start|>user<|im_sep|>a\\n<|im_end|>\\xc3\\xa9<|im_end|>")
    assert "".join(text for text, id, special, said in rows if special).count("<|im_end|>") == 2
    said = "".join(text for text, id, special, said in rows if said)
    assert said == "So: <|calc_start|>3*17<|calc_end|>It is 51 \\xf0\\x9f\\x98\\x80.<|im_end|>"
    assert all(special == (id >= 256) for _, id, special, _ in rows)


def test_random_weights_answer_too():
    with serving(random_model(), max_tokens=20) as server:
        assert events(ask(server, body={"messages": [user("hello")]}))[-1] == {"end": True}


def test_an_error_of_the_model_is_an_event():
    with serving(speaker(lambda question: "x", n_positions=64)) as server:
        [only] = events(ask(server, body={"messages": [user("long " * 30)]}))
        assert "shorten" in only["error"]
        assert answered(server, "short") == [["text", "x"]]


# ------------------------------------------------------------------------------------------------------------
# Who may ask, and what


@pytest.fixture(scope="module")
def quiet():
    """A server whose model is never asked."""

    def before():
        raise AssertionError("the model was asked")

    with serving(speaker(lambda question: "x", before=before)) as server:
        yield server


QUESTION = {"messages": [user("?")]}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil", "localhost:x", "", None, "[::1]:{port}"]
)
@pytest.mark.parametrize("path", ["/", "/answer", "/tokens"])
def test_another_name_is_refused(quiet, host, path):
    """A foreign page whose name has come to mean 127.0.0.1 (DNS rebinding) still gives that name away."""
    host = host and host.format(port=quiet.server_address[1])
    method, body = ("GET", None) if path == "/" else ("POST", QUESTION)
    assert refused(ask(quiet, method, path, body, Host=host), 403, "127.0.0.1")


def test_two_names_are_refused(quiet):
    port = quiet.server_address[1]
    with socket.create_connection(quiet.server_address) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nHost: evil.example\r\n\r\n".encode())
        assert b" 403 " in client.makefile("rb").readline()


ORIGINS = [
    "null",
    "http://evil.example",
    "https://127.0.0.1:{port}",
    "http://localhost:1",
    "http://127.0.0.1",
    "",
]


@pytest.mark.parametrize("origin", [*ORIGINS, "http://127.0.0.1:{port}.evil.example"])
@pytest.mark.parametrize("path", ["/", "/answer", "/tokens"])
def test_another_origin_is_refused(quiet, origin, path):
    method, body = ("GET", None) if path == "/" else ("POST", QUESTION)
    origin = origin.format(port=quiet.server_address[1])
    assert refused(ask(quiet, method, path, body, Origin=origin), 403, "own page")


def test_our_own_names_and_origins_are_served():
    with serving(speaker(lambda question: "x")) as server:
        port = server.server_address[1]
        for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost:9000", "127.0.0.1"):  # ssh -L
            for origin in (None, f"http://{host}"):
                assert ask(server, "GET", "/", Host=host, Origin=origin).status == 200
                assert events(ask(server, body=QUESTION, Host=host, Origin=origin))[-1] == {"end": True}


def test_a_browser_gets_no_leave_to_ask_from_elsewhere(quiet):
    for method in ("OPTIONS", "PUT", "DELETE", "TRACE"):
        response = ask(quiet, method, "/answer", Origin="http://evil.example")
        assert response.status == 501 and "Access-Control-Allow-Origin" not in response.headers


BAD = [
    (b"", "Expecting value"),
    (b"{", "Expecting"),
    (b"\xff\xfe", ""),
    (b"[" * 100_000, "recursion"),
    (b"[]", "messages"),
    (b'"messages"', "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": []}, "last message"),
    ({"messages": [{"role": "user", "content": " "}]}, "last message"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "last message"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "calc", "text": "1"}]}]}, "message 1"),
    ({"messages": [{"role": "user", "content": 5}]}, "message 1"),
]


@pytest.mark.parametrize("body, word", BAD)
def test_what_is_no_conversation_is_refused(quiet, body, word):
    assert refused(ask(quiet, body=body), 400, word)


def test_requests_of_another_kind_are_refused(quiet):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        assert refused(ask(quiet, body=QUESTION, Content_Type=kind), 415, "json")
    for length in (None, "", "many", "-1", "1e3", "\xb2", "9" * 5000):
        assert refused(ask(quiet, Content_Length=length), 411)
    assert refused(ask(quiet, Content_Length=None, Transfer_Encoding="chunked"), 411)
    for method, path in (
        ("GET", "/answer"),
        ("POST", "/"),
        ("GET", "/serve.py"),
        ("GET", "/../serve.py"),
    ):
        assert refused(ask(quiet, method, path, None if method == "GET" else QUESTION), 404)


def test_a_system_message_that_is_too_long_is_named(quiet):
    long = {"role": "system", "content": "x" * 10_000}
    (event,) = events(ask(quiet, body={"messages": [long, user("?")]}))
    assert "system message takes 10009 tokens" in event["error"]
    assert "shorten the system message" in event["error"] or "shorten both" in event["error"]


def test_a_request_that_is_too_large_is_refused(quiet, monkeypatch):
    monkeypatch.setattr(serve, "LONGEST", 20_000)
    body = json.dumps({"messages": [user("x" * serve.LONGEST)]}).encode()
    assert refused(ask(quiet, body=body), 413, "begin a new conversation, or shorten")
    monkeypatch.setattr(
        serve, "LONGEST", 1_000_000
    )  # what is still on its way is taken, or nobody would hear
    assert refused(ask(quiet, body=b"x" * 15_000_000), 413, "begin a new conversation, or shorten")
    monkeypatch.setattr(serve, "LONGEST", 20_000)
    fits = json.dumps({"messages": [user("x" * (serve.LONGEST - 60))]}).encode()
    assert serve.LONGEST - 20 < len(fits) <= serve.LONGEST
    assert ask(quiet, path="/tokens", body=fits).status == 200


def test_a_client_that_does_not_finish_is_dropped(monkeypatch, quiet):
    assert 5 <= serve.Handler.timeout <= 60
    monkeypatch.setattr(serve.Handler, "timeout", 0.1)
    start = f"POST /answer HTTP/1.1\r\nHost: 127.0.0.1:{quiet.server_address[1]}\r\n"
    for rest in ("", "Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"):
        with socket.create_connection(quiet.server_address, timeout=60) as client:
            client.sendall((start + rest).encode())
            assert client.recv(100) == b""


@settings(max_examples=60)
@given(st.binary(max_size=200) | st.text("GETPOS /answer HTTP/1.0:\r\n", max_size=60).map(str.encode))
def test_noise_does_not_hurt(quiet, noise):
    with contextlib.suppress(ConnectionError), socket.create_connection(quiet.server_address) as client:
        client.sendall(noise)
        client.shutdown(socket.SHUT_WR)
        assert b" 200 " not in client.makefile("rb").readline()
    assert ask(quiet, "GET", "/").status == 200


spelled = st.lists(
    st.sampled_from(["<|endoftext|>", *CHAT_TOKENS, "a", "\n", "\ud800", "<script>", "\0"]), max_size=8
)


@settings(max_examples=50)
@given(spelled.map("".join), spelled.map("".join))
def test_no_text_smuggles_in_a_special_token(quiet, asked, system):
    body = {"messages": [{"role": "system", "content": f"s{system}"}, user(f"u{asked}")]}
    rows = json.loads(ask(quiet, path="/tokens", body=body).read())["tokens"]
    turn = ["<|im_start|>", "<|im_sep|>", "<|im_end|>"]
    assert [text for text, _, special, _ in rows if special] == ["<|endoftext|>", *turn, *turn]


# ------------------------------------------------------------------------------------------------------------
# How many, how long


def slow(seconds=0.005):
    """A model that echoes the question, slowly, and a list with how many tokens it has made so far; it
    asserts that nobody else asks it meanwhile."""
    made, inside = [0], threading.Lock()

    def before():
        assert inside.acquire(blocking=False), "two answers at a time"
        time.sleep(seconds)
        made[0] += 1
        inside.release()

    def answer(question):
        words, dots = f"Q: {question}", "." * (400 if "long" in question else 0)
        call = [{"type": "text", "text": "Q"}, {"type": "calc", "text": dots}]
        return call if "call" in question else words + dots

    return speaker(answer, n_positions=1000, before=before), made


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ten_at_once():
    model, _ = slow(0.001)
    found = {}
    with serving(model) as server:

        def one(i):
            found[i] = answered(server, f"number {i}")

        threads = [threading.Thread(target=one, args=(i,)) for i in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: [["text", f"Q: number {i}"]] for i in range(10)}


def test_more_than_the_queue_holds_is_told_to_come_back(monkeypatch):
    monkeypatch.setattr(serve, "QUEUE", 3)
    go = threading.Event()
    model = speaker(lambda question: "x", before=lambda: go.wait(60))
    with serving(model) as server:
        held = [ask(server, body=QUESTION) for _ in range(3)]  # these have their headers, and wait
        late = ask(server, body=QUESTION)
        assert late.headers["Retry-After"] and refused(late, 503, "try again")
        assert ask(server, "GET", "/").status == 200  # the page can still be had
        go.set()
        assert [events(response)[-1] for response in held] == [{"end": True}] * 3
        until(lambda: server.queue._value == 3)
        assert answered(server, "?") == [["text", "x"]]


@pytest.mark.parametrize("question", ["long", "long call"])  # nothing is sent while a call is written
def test_an_answer_ends_when_its_reader_goes_away(question):
    model, made = slow()
    with serving(model, max_tokens=400) as server:
        response = ask(server, body={"messages": [user(question)]})
        response.readline()
        response.close()
        until(lambda: server.queue._value == serve.QUEUE)
        assert made[0] < 200
        assert answered(server, "next") == [["text", "Q: next"]]


def test_nobody_is_answered_who_left_the_queue():
    with serving(slow()[0]) as server:
        first = ask(server, body={"messages": [user("long")]})
        first.readline()
        second = ask(server, body={"messages": [user("long")]})
        second.close()
        first.read()
        until(lambda: server.queue._value == serve.QUEUE)
        assert server.assistant.n_answers == 1


def test_a_reader_who_never_reads_does_not_hold_the_others(monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.2)
    with serving(speaker(lambda question: "x")) as server:
        flood = lambda conversation, show: [show([{"text": "x" * 100_000}]) for _ in range(1000)]
        monkeypatch.setattr(server.assistant, "answer", flood)
        stuck = ask(server, body=QUESTION)
        until(lambda: server.queue._value == serve.QUEUE)
        monkeypatch.undo()
        assert answered(server, "?") == [["text", "x"]]
        stuck.close()


# ------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "step_000001"
    place.mkdir()
    random_model().save_pretrained(place)
    BYTES.save(place)
    (place / "state.json").write_text('{"step": 1, "stage": "sft"}')
    return place


def test_the_script_serves_until_ctrl_c(checkpoint):
    command = [
        sys.executable,
        "-m",
        "extras.serve",
        checkpoint.parent,
        "--port",
        "0",
        "--no-search",
        "--max-tokens",
        "5",
    ]
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # it may be ignored, and so in the child
    root = Path(serve.__file__).parents[1]
    child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        line = child.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+) ", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/answer", json.dumps(QUESTION), {"Content-Type": "application/json"})
        assert '{"end": true}' in connection.getresponse().read().decode()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0 and errors == ""
    finally:
        child.kill()
        child.communicate()


def test_what_the_person_can_put_right_is_one_line(checkpoint, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = script.run(serve.main, checkpoint, "--port", port, "--no-search")
        assert script.refused(done, f"port {port}", "choose another")
    base = Tokenizer("bytes", BYTES.ranks, chat=False)
    monkeypatch.setattr(serve, "load", lambda directory, flags: (random_model(), base, checkpoint))
    done = script.run(serve.main, checkpoint)
    assert done.status == 2 and "error: a base model" in done.err and "make sft" in done.err
    monkeypatch.undo()
    assert script.refused(script.run(serve.main, tmp_path), "no checkpoint")
    assert script.refused(script.run(serve.main, checkpoint, "--port", "65536"), "--port")


def test_the_flags_reach_the_answers(checkpoint, monkeypatch):
    got = {}
    monkeypatch.setattr(serve, "serve", lambda *args, **settings: got.update(settings, args=args))
    serve.main([str(checkpoint), "--temperature", "0", "--max-tokens", "9", "--port", "77"])
    assert got["temperature"] == 0 and got["max_tokens"] == 9 and got["args"][2:] == (str(checkpoint), 77)
    assert set(got["tools"]) == {"calc", "search"}
    serve.main([str(checkpoint), "--no-search"])
    assert set(got["tools"]) == {"calc"}


def test_a_base_model_is_served_with_a_word_of_warning(checkpoint, monkeypatch):
    monkeypatch.setattr(serve, "serve", lambda *args, **settings: None)
    assert script.run(serve.main, checkpoint).err == ""
    (checkpoint / "state.json").write_text('{"step": 1}')
    done = script.run(serve.main, checkpoint)
    assert done.status == 0 and "make sft" in done.err


# ------------------------------------------------------------------------------------------------------------
# In a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def chromium():
    """The system's Chromium, driven by Playwright, in which the name evil.test means this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: see requirements-dev.txt")
    paths = [path for path in map(shutil.which, BROWSERS) if path]
    if not paths:
        names = ", ".join(BROWSERS)
        pytest.skip(f"no browser: none of {names} is on the PATH (on Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=paths[0], args=["--host-resolver-rules=MAP evil.test 127.0.0.1"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    """A page, and in page.complaints what it logs: errors, and what its policy has blocked."""
    page = chromium.new_page(viewport={"width": 800, "height": 900})
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    page.close()


def visit(page, server):
    page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
    assert page.evaluate("document.activeElement.id") == "text"


def say(page, text):
    """Type a message and Enter."""
    page.locator("#text").focus()
    page.keyboard.insert_text(text)
    page.keyboard.press("Enter")


def wait_for_text(page, text):
    page.get_by_text(text).last.wait_for()


def finished(page):
    page.locator("#send").wait_for()  # it comes back when the answer is complete


def test_a_conversation_in_a_browser(page):
    """Typed and clicked. A script in the question, the call, the output and the answer is only text."""
    evil = [{"type": "calc", "text": EVIL}, {"type": "output", "text": EVIL}, {"type": "text", "text": EVIL}]
    model = speaker(lambda question: ANSWER if "17" in question else evil, n_positions=4000)
    tools = {"calc": lambda call: {"3*17": "51"}.get(call, EVIL)}
    with serving(model, name="runs/sft", tools=tools) as server:
        visit(page, server)
        assert page.text_content("h1") == "runs/sft"
        say(page, "What is 3 * 17?")
        wait_for_text(page, "It is 51")
        finished(page)
        assert page.text_content(".call") == "calc 3*17 → 51"
        assert page.text_content(".assistant") == "So: calc 3*17 → 51It is 51 \N{GRINNING FACE}."

        say(page, EVIL)
        page.locator(".assistant").nth(1).wait_for()
        finished(page)
        turns = page.locator("article").all_text_contents()
        assert turns[2] == EVIL and turns[3] == f"calc {EVIL} → {EVIL}{EVIL}"
        assert page.locator("article script, article img").count() == 0
        read = BYTES.decode(model.cache.rows[0])  # the second question came with the first and its answer
        assert "<|calc_start|>3*17<|calc_end|><|output_start|>51<|output_end|>It is 51" in read

        page.click("#see")
        page.locator("#tokens span").nth(100).wait_for()
        shown = "".join(page.locator("#tokens span").all_text_contents())
        assert shown.startswith("<|endoftext|><|im_start|>user<|im_sep|>What is 3 * 17?<|im_end|>")
        assert "<script>" in shown
        targets = "".join(page.locator("#tokens .target").all_text_contents())
        assert targets.startswith("So: <|calc_start|>3*17<|calc_end|>It is 51")
        assert page.locator("#tokens .special").count() == shown.count("<|")

        page.click("#reset")
        page.locator("#tokens span").nth(1).wait_for(state="detached")
        assert page.locator("#tokens span").count() == 1
        assert page.locator("article").count() == 0
        assert page.evaluate("typeof window.hacked") == "undefined" and page.complaints == []


def test_the_policy_stops_a_script_that_got_into_the_page(page, quiet):
    """Were the page's own script tricked, nothing could be read as HTML, and no other script would run."""
    visit(page, quiet)
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    violated = page.evaluate("""() => new Promise(resolve => {
        document.addEventListener("securitypolicyviolation", event => resolve(event.violatedDirective));
        const script = document.createElement("script");
        script.append("window.hacked = 1");
        document.head.append(script);
    })""")
    assert violated in ("script-src-elem", "require-trusted-types-for")
    assert page.evaluate("typeof window.hacked") == "undefined"


def test_stop_in_a_browser_ends_the_answer_and_keeps_what_was_said(page):
    model, made = slow()
    with serving(model) as server:
        visit(page, server)
        say(page, "a long one")
        wait_for_text(page, "Q: a long one...")
        page.click("#stop")
        page.locator(".note", has_text="stopped").wait_for()
        until(lambda: server.queue._value == serve.QUEUE)
        assert made[0] < 400
        say(page, "next")
        wait_for_text(page, "Q: next")
        assert "<|im_sep|>Q: a long one..." in BYTES.decode(model.cache.rows[0])


def test_stop_in_a_browser_while_a_tool_answers(page):
    """The page has shown the call; a call without its output is not for the model to read."""
    content = [
        {"type": "text", "text": "Hm"},
        {"type": "calc", "text": "7"},
        {"type": "output", "text": "9" * 400},
    ]
    answer = lambda question: content if question == "?" else "x"
    model = speaker(answer, 1000, before=lambda: time.sleep(0.005))
    with serving(model, tools={"calc": lambda call: "9" * 400}, max_tokens=500) as server:
        visit(page, server)
        say(page, "?")
        page.locator(".call", has_text="calc 7").wait_for()
        page.click("#stop")
        say(page, "next")
        page.locator(".words").nth(1).wait_for()
        assert "<|im_sep|>Hm<|im_end|>" in BYTES.decode(model.cache.rows[0])


def test_events_that_come_byte_by_byte(page, monkeypatch):
    def send_events(handler, events):
        for event in events:
            for byte in f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode():
                handler.wfile.write(bytes([byte]))
                time.sleep(0.001)

    monkeypatch.setattr(serve.Handler, "send_events", send_events)
    with serving(speaker(lambda question: "\N{EURO SIGN} or \N{GRINNING FACE}")) as server:
        visit(page, server)
        say(page, "?")
        wait_for_text(page, "\N{EURO SIGN} or \N{GRINNING FACE}")
        finished(page)
        assert page.locator(".error").count() == 0


def test_errors_in_a_browser_are_shown(page, monkeypatch):
    with serving(speaker(lambda question: "x", n_positions=64)) as server:
        visit(page, server)
        say(page, "long " * 30)
        page.locator(".error", has_text="shorten").wait_for()
        monkeypatch.setattr(serve, "LONGEST", 10)
        page.fill("#text", "")
        say(page, "hello")
        page.locator(".error", has_text="begin a new conversation").wait_for()
        assert page.input_value("#text") == "hello"  # to be sent again


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A page of somebody else's."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<p>hello")

    def log_message(self, *_):
        pass


def test_another_page_in_the_same_browser_gets_nothing(page, quiet):
    port = quiet.server_address[1]
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        page.goto(f"http://evil.test:{other.server_address[1]}/")
        attempt = """([url, type, mode]) => fetch(url, {
            method: "POST", headers: {"Content-Type": type}, mode,
            body: JSON.stringify({messages: [{role: "user", content: "?"}]})
        }).then(response => response.text(), error => "failed")"""
        for kind, mode in (("application/json", "cors"), ("text/plain", "cors"), ("text/plain", "no-cors")):
            url = f"http://127.0.0.1:{port}/answer"
            assert page.evaluate(attempt, [url, kind, mode]) in ("failed", "")
        page.goto(f"http://evil.test:{port}/")  # the name has come to mean our server
        wait_for_text(page, "known as 127.0.0.1")
    finally:
        other.shutdown()
        other.server_close()
