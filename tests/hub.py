"""A small server that speaks the Hugging Face hub's way of serving files, and its faults."""

from __future__ import annotations

import hashlib
import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Served:
    """A file, and what goes wrong with it."""

    content: bytes
    sha256: str = ""  # as the server tells it; empty: the true one
    type: str = "application/octet-stream"
    cut_at: int | None = None  # the first answer ends here, without a word
    short_by: int = 0  # bytes that every answer lacks of the length it tells
    ranges: list[str | None] = field(default_factory=list)  # asked for, in order


class Hub(http.server.ThreadingHTTPServer):
    """Serves ``files`` by ``REPOSITORY/FILE``; other paths are its plain files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Served] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_args: object) -> None: ...  # a cut connection is meant


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        file = self.server.files.get(re.sub(r"/resolve/[^/]+/", "/", path))
        if file is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Error-Message", "Entry not found")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, start = file.content, 0
        asked = self.headers.get("Range")
        if body:
            file.ranges.append(asked)
        if asked:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if asked else 200)
        digest = file.sha256 or hashlib.sha256(content).hexdigest()
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", file.type)
        self.send_header("Content-Length", str(len(content) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        end = len(content) - file.short_by
        if file.cut_at is not None:
            end, file.cut_at = file.cut_at, None
        self.wfile.write(content[start:end])
        self.wfile.flush()
        self.close_connection = True


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub on this machine."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
