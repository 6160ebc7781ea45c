"""A hub on localhost that answers as the Hugging Face hub does, and fails when it is told to.

The answers are those of the hub as huggingface_hub 2.4 and 0.36 ask for them. Files whose names end in .bin
or .safetensors are large ones (LFS): their checksum is a sha256, and the hub redirects to a second server,
which is the CDN on another port. Small files have git's sha1, and the hub sends them itself. Lists come in
pages. What goes wrong with the next requests for a file, for the commit of a revision, for the list of files:

    hub.faults["a_train_000001.bin"] = ["cut", 503]
    hub.faults["revision"] = [429, 429]
    hub.faults["tree"] = ["html"]

    404, 429, 503 ...   the hub answers with this status
    "cut"               the connection ends in the middle, as if the server had been restarted
    "reset"             the same, and the client finds the connection reset
    "stall"             half of the file comes, and then nothing until hub.go_on is set
    "slow"              the file comes in ten pieces, one every 50 ms
    "wrong"             as many bytes, of which one is another
    "short"             fewer bytes, said to be all
    "whole"             the answer to a Range is the whole file
    "html"              a page, as a hotel's network sends it
"""

import collections
import hashlib
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
PAGE = 3  # files in a page of a list


class FakeHub:
    """The two servers, from `with FakeHub() as hub` on; hub.url is what HF_ENDPOINT must be."""

    def __init__(self):
        self.repositories = {}  # {"datasets/owner/name" or "models/owner/name": {path: bytes}}
        self.faults = collections.defaultdict(list)
        self.requests = []  # (what was asked for, the first byte wanted) of every GET
        self.go_on = threading.Event()

    def __enter__(self):
        self.servers = []
        for handler in (HubHandler, CdnHandler):
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.daemon_threads, server.fake = True, self
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            self.servers.append(server)
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        return self

    def __exit__(self, *error):
        self.go_on.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fault(self, name):
        return self.faults[name].pop(0) if self.faults[name] else None

    def asked(self, name):
        """The first bytes that the requests for a file wanted."""
        return [start for what, start in self.requests if what == name]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *message):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        headers = {"Content-Length": len(content), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()


def is_large(path):
    return path.endswith((".bin", ".safetensors"))


def checksum(path, content):
    """What the hub names: a sha256, or what git calls a blob."""
    if is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def damaged(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def entry(path, content):
    """A file in the list of a repository."""
    large = {"oid": checksum(path, content), "size": len(content), "pointerSize": 134}
    lfs = {"lfs": large} if is_large(path) else {}
    oid = "0" * 40 if is_large(path) else checksum(path, content)
    return {"type": "file", "path": path, "size": len(content), "oid": oid, **lfs}


class HubHandler(Handler):
    def do_GET(self):
        fake, address = self.server.fake, urlsplit(self.path)
        parts = address.path.strip("/").split("/")
        is_api = parts[0] == "api"
        if is_api:
            parts = parts[1:]
        elif parts[0] != "datasets":
            parts = ["models", *parts]
        name, (action, revision, *rest) = "/".join(parts[:3]), parts[3:]
        path = "/".join(rest)
        fault = None
        if is_api or not is_large(path) or isinstance((fake.faults[path] or [None])[0], int):
            fault = fake.fault(action if is_api else path)
        if is_api and self.command == "GET":
            fake.requests.append((action, 0))
        if fault == "html":
            return self.answer(200, b"<html>Welcome. Room number?</html>", Content_Type="text/html")
        if isinstance(fault, int):
            return self.answer(fault, b"{}")
        if name not in fake.repositories:
            return self.answer(404, X_Error_Code="RepoNotFound")
        files = fake.repositories[name]
        if revision not in ("main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if action == "revision":
            siblings = [{"rfilename": path} for path in files]
            about = {"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        if action == "tree":
            start = int(parse_qs(address.query).get("start", ["0"])[0])
            page = [entry(path, files[path]) for path in sorted(files)[start : start + PAGE]]
            headers = {"Content_Type": "application/json"}
            if start + PAGE < len(files):
                headers["Link"] = f'<{fake.url}{address.path}?start={start + PAGE}>; rel="next"'
            return self.answer(200, json.dumps(page).encode(), **headers)
        if path not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        about = {"X_Repo_Commit": COMMIT, "ETag": f'"{checksum(path, files[path])}"'}
        if not is_large(path):
            fake.requests.append((path, 0))
            return self.answer(200, damaged(files[path]) if fault == "wrong" else files[path], **about)
        about |= {"X_Linked_Size": len(files[path]), "X_Linked_Etag": about["ETag"]}
        self.answer(302, Location=f"{fake.cdn}/{name}/{path}", **about)


class CdnHandler(Handler):
    def do_GET(self):
        fake = self.server.fake
        kind, owner, repository, path = self.path.strip("/").split("/", 3)
        content = fake.repositories[f"{kind}/{owner}/{repository}"][path]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        fake.requests.append((path, start))
        fault = fake.fault(path)
        if fault == "wrong":
            content = damaged(content)
        elif fault == "short":
            content = content[:-2]
        elif fault == "whole":
            start = 0
        if start > len(content):
            return self.answer(416)
        body = content[start:]
        headers = {"Content-Length": len(body), "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        try:
            self.send(body, fault)
        except OSError:  # the client was killed
            self.close_connection = True

    def send(self, body, fault):
        if fault == "slow":
            piece = len(body) // 10 + 1
            for start in range(0, len(body), piece):
                self.wfile.write(body[start : start + piece])
                self.wfile.flush()
                time.sleep(0.05)
        elif fault in ("cut", "reset", "stall"):
            self.close_connection = True
            self.wfile.write(body[: len(body) // 2])
            if fault == "stall":
                self.server.fake.go_on.wait(60)
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        else:
            self.wfile.write(body)
