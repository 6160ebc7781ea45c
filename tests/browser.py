"""A headless Chromium, driven through two pipes by its own protocol: no driver, no WebSocket, no library."""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
QUIET = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
)
# Chromium reads commands from file 3 and writes answers to file 4, each ended by a zero byte.
LAUNCH = "import os, sys; os.dup2(100, 3); os.dup2(101, 4); os.execv(sys.argv[1], sys.argv[1:])"


def find():
    """The path of a Chromium, or a skipped test that says what is missing."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(
            f"no browser: none of {', '.join(NAMES)} is on the PATH (on Debian: apt-get install chromium)"
        )
    return path


class Browser:
    """with Browser() as browser: browser.open(url); browser.js("expression")."""

    def __init__(self, *flags):
        path, self.profile = find(), tempfile.mkdtemp()
        (commands, self.output), (self.input, answers) = os.pipe(), os.pipe()
        for pipe, place in ((commands, 100), (answers, 101)):  # away from 3 and 4
            os.dup2(pipe, place)
            os.close(pipe)
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [path, "--headless", "--remote-debugging-pipe", f"--user-data-dir={self.profile}", *sandbox]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *command, *QUIET.split(), *flags, "about:blank"],
            pass_fds=(100, 101), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(100)
        os.close(101)
        self.buffer, self.last, self.session, self.logged = b"", 0, None, []

    def __enter__(self):
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=800, height=900, deviceScaleFactor=1, mobile=False
        )
        return self

    def __exit__(self, *_):
        for pipe in (self.output, self.input):
            os.close(pipe)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method, **parameters):
        """The result of a command; what the page logs meanwhile goes to self.logged."""
        self.last += 1
        message = {"id": self.last, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.output, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while True:
            while b"\0" not in self.buffer:
                ready = select.select([self.input], [], [], max(0, deadline - time.monotonic()))[0]
                assert ready, f"the browser is silent after {method}"
                piece = os.read(self.input, 1 << 20)
                assert piece, "the browser has ended"
                self.buffer += piece
            line, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self.last:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") == "Log.entryAdded":
                self.logged.append(answer["params"]["entry"]["text"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.logged.append(answer["params"]["exceptionDetails"]["exception"]["description"])

    def open(self, url):
        self.call("Page.navigate", url=url)
        self.wait(f"document.readyState == 'complete' && location.href == {url!r}")

    def js(self, expression):
        """The value of an expression, or of the promise that it is."""
        done = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True,
            allowUnsafeEvalBlockedByCSP=False,
        )  # fmt: skip
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, expression):
        deadline = time.monotonic() + 60
        while not self.js(expression):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.02)

    def type(self, text, enter=True):
        """As a keyboard does, into what has the focus."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp") if enter else ():
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13
            )

    def click(self, selector):
        """As a mouse does: whatever lies there gets it."""
        box = self.js(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self):
        """PNG, in base64."""
        return self.call("Page.captureScreenshot")["data"]
