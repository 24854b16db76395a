"""A real S3 server on loopback (rclone serving a folder), and a proxy before it that breaks what networks break."""

import contextlib
import http.client
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "canaryaccesskey", "canary/secret+0123456789"

FAULTS = ("500", "503", "reset", "stall", "short", "truncated", "lost answer", "twice")
"""What the proxy does to a request; "stall" takes `STALL` seconds, so clients under test wait less."""
STALL = 1.5


@dataclass(frozen=True)
class S3Server:
    """A server process and the folder whose sub-folders are its buckets."""

    root: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serve_s3(root: Path) -> Iterator[S3Server]:
    """Starts the server and ends it. It checks signatures, as S3 does."""
    program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert program, "rclone is missing: install the extra `test`"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}"]
    # A short cache of folders, so that a test may change files behind the server's back; with none, rclone spins.
    command += ["--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--config", os.devnull, "--dir-cache-time", "200ms"]
    command += ["--vfs-cache-mode", "off", "--etag-hash", "", "--log-level", "ERROR"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port, server)
            yield S3Server(root, port)
        finally:
            server.terminate()


def _wait_for(port: int, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        assert server.poll() is None, "the S3 server ended"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError("the S3 server does not answer")


@dataclass
class FaultyProxy:
    """Stands before a server; a share of the requests, chosen by a seeded generator, goes wrong."""

    server: S3Server
    share: float = 0.2
    faults: Sequence[str] = FAULTS
    seed: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    """By method."""
    faulted: Counter[str] = field(default_factory=Counter)
    """By fault."""
    delay: float = 0.0
    """Seconds before each answer, as of a distant server."""

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """The proxy's URL while it runs."""
        chooser, lock, proxy = random.Random(self.seed), threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def answer(self) -> None:
                with lock:
                    proxy.requests[self.command] += 1
                    fault = chooser.choice(proxy.faults) if chooser.random() < proxy.share else ""
                    proxy.faulted[fault] += 1
                _answer(self, proxy, fault)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                pass  # the client went away: it had to

        with Quiet(("127.0.0.1", 0), Handler) as listener:
            thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.server_address[1]}"
            finally:
                listener.shutdown()
                thread.join()


def _answer(request: BaseHTTPRequestHandler, proxy: FaultyProxy, fault: str) -> None:
    body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
    time.sleep(proxy.delay)
    if fault == "stall":
        time.sleep(STALL)
    if fault in ("stall", "reset"):
        request.close_connection = True
        return
    if fault in ("500", "503"):
        code = "InternalError" if fault == "500" else "SlowDown"
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
        _send(request, int(fault), [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text)
        return
    for _ in range(2 if fault == "twice" and request.command == "PUT" else 1):
        status, headers, answer = _forward(request, body, proxy.server.port)
    if fault == "lost answer":
        request.close_connection = True
        return
    if request.command == "GET" and fault == "short":  # the connection breaks in the middle of the body
        _send(request, status, headers, answer[: len(answer) // 2])
        request.close_connection = True
        return
    if request.command == "GET" and fault == "truncated":  # less comes, and it looks complete
        answer = answer[: len(answer) // 2]
        headers = [(name, str(len(answer)) if name.lower() == "content-length" else value) for name, value in headers]
    _send(request, status, headers, answer)


def _forward(request: BaseHTTPRequestHandler, body: bytes, port: int) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():  # the Host too: it is signed
            if name.lower() != "connection":
                connection.putheader(name, value)
        connection.endheaders(body or None)
        response = connection.getresponse()
        answer = response.read()
        dropped = ("transfer-encoding", "connection", "content-length")
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in dropped]
        told = response.getheader("Content-Length") if request.command == "HEAD" else None
        return response.status, [*headers, ("Content-Length", told or str(len(answer)))], answer


def _send(request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
    request.send_response_only(status)
    for name, value in headers:
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD" and body:
        request.wfile.write(body)
