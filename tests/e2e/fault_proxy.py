"""A proxy in front of an S3 server that does to chosen requests what storage does on bad days.

It runs in threads of the test: what waits for an answer with Python's lock held must not come through it.
"""

import contextlib
import http.client
import os
import re
import socket
import socketserver
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import unquote, urlsplit

Kind = Literal[
    "slow_down",  # 503
    "internal_error",  # 500
    "denied",  # 403
    "changed",  # 412
    "archived",  # 403 InvalidObjectState: the object sleeps in an archive's storage class
    "missing",  # 404
    "reset",  # before a byte of the answer
    "cut",  # the connection is reset in mid-body
    "truncated",  # the connection ends in an orderly way in mid-body
    "trickle",  # the body comes a byte at a time
    "silence",  # no answer at all
    "lost_answer",  # the server has done it, and the connection is reset before its answer
]

_ANSWERS: dict[str, tuple[int, str]] = {
    "slow_down": (503, "SlowDown"),
    "internal_error": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
    "changed": (412, "PreconditionFailed"),
    "archived": (403, "InvalidObjectState"),
    "missing": (404, "NoSuchKey"),
}
SECONDS_PER_BYTE = 0.2


@dataclass(frozen=True)
class Fault:
    """What happens to requests of ``method`` in whose percent-decoded path and query ``path`` is found.

    ``times``: how often for each path; None is always. ``share``: of the paths, by their hash with ``seed``.
    """

    kind: Kind
    path: str
    method: str = "GET"
    times: int | None = None
    share: float = 1.0
    seed: int = 0

    def meets(self, method: str, path: str) -> bool:
        chosen = zlib.crc32(f"{self.seed} {path}".encode()) / 2**32 < self.share
        return chosen and method == self.method and re.search(self.path, path) is not None


class FaultProxy:
    """Forwards every request as it came, Host and all, for that is signed; ``faults`` are done to some."""

    def __init__(self, server_url: str) -> None:
        self._target = urlsplit(server_url).netloc
        self._faults: Sequence[Fault] = ()
        self._done: Counter[tuple[Fault, str]] = Counter()
        self._lock = threading.Lock()
        self._count: Counter[Fault] = Counter()
        self._connections: set[socket.socket] = set()
        self._server: _Server | None = None
        self._port = 0
        self._closed = threading.Event()
        # (method, percent-decoded path and query), as they came.
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @contextlib.contextmanager
    def faults(self, *faults: Fault) -> Iterator[Counter[Fault]]:
        """Do ``faults`` within the block, the first that meets; yields how often each was done."""
        done: Counter[Fault] = Counter()
        with self._lock:
            self._faults, self._done, self._count = faults, Counter(), done
        try:
            yield done
        finally:
            with self._lock:
                self._faults = ()

    def up(self) -> None:
        """Listen, on the same port as before."""
        assert self._server is None
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Be gone: open connections are reset, new ones refused."""
        assert self._server is not None
        server, self._server = self._server, None
        server.shutdown()
        server.server_close()
        for connection in list(self._connections):
            _reset(connection)

    def close(self) -> None:
        self._closed.set()
        self.down()

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                left = fault.times is None or self._done[fault, path] < fault.times
                if left and fault.meets(method, path):
                    self._done[fault, path] += 1
                    self._count[fault] += 1
                    return fault
        return None


@contextlib.contextmanager
def fault_proxy(server_url: str) -> Iterator[FaultProxy]:
    """A proxy in front of ``server_url`` until the block ends."""
    proxy = FaultProxy(server_url)
    proxy.up()
    try:
        yield proxy
    finally:
        proxy.close()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], proxy: FaultProxy) -> None:
        self.proxy = proxy
        super().__init__(address, _Handler)

    def handle_error(self, request, client_address) -> None:
        """A client that went away, or a connection that was reset on purpose, is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.proxy._connections.add(self.connection)
        if self.server.proxy._server is None:  # it went down while this one came in
            _reset(self.connection)

    def finish(self) -> None:
        self.server.proxy._connections.discard(self.connection)
        super().finish()

    def _handle(self) -> None:
        assert "Transfer-Encoding" not in self.headers, "no client here sends one"
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.proxy._fault(self.command, unquote(self.path))
        kind = fault.kind if fault else None
        if kind in _ANSWERS:
            status, code = _ANSWERS[kind]
            # S3 may repeat who asked.
            key_id = re.search("Credential=([^/]*)", self.headers.get("Authorization", ""))
            asked = f"refused to {key_id[1]}" if key_id else "refused"
            answer = f"<Error><Code>{code}</Code><Message>{asked}</Message></Error>"
            self._answer(status, [("Content-Type", "application/xml")], answer.encode())
        elif kind in ("silence", "reset"):
            self.server.proxy._closed.wait(60 if kind == "silence" else 0)
            self.close_connection = True
            _reset(self.connection)
        else:
            status, headers, data = self._forward(body)
            if kind == "lost_answer":
                self.close_connection = True
                _reset(self.connection)
            else:
                self._answer(status, headers, data, kind)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        with contextlib.closing(http.client.HTTPConnection(self.server.proxy._target, timeout=60)) as server:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, kind: Kind | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length", "0")
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "trickle":
            for byte in data:
                self.wfile.write(bytes([byte]))
                if self.server.proxy._closed.wait(SECONDS_PER_BYTE):
                    return
        elif kind in ("cut", "truncated"):
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            if kind == "cut":
                _reset(self.connection)
        else:
            self.wfile.write(data)


def _reset(connection: socket.socket) -> None:
    """End a connection with RST instead of FIN."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)  # wakes up the thread that reads here
        os.close(connection.detach())
