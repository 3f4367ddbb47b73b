"""A real HTTP server of a folder, which can fail as servers do."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileServer(ThreadingHTTPServer):
    """Serves the files of a folder, with ranges of bytes; `url` is its address.

    Attributes:
        requests: Method and path of each request, with its range.
        failures: How the next GET requests fail: a status, "truncated" (half of the bytes), or "slow".
        has_ranges: Whether requests for a part of a file get that part, or all of it.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self.failures: list[int | str] = []
        self.has_ranges = True

    def handle_error(self, *args: Any) -> None:
        """Silence: clients close connections."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: Any) -> None:
        """Silence."""

    def _answer(self, with_body: bool) -> None:
        wanted = self.headers.get("Range", "") if self.server.has_ranges else ""
        self.server.requests.append(f"{self.command} {self.path} {wanted}".strip())
        failure = self.server.failures.pop(0) if with_body and self.server.failures else None
        path = self.server.folder / self.path.lstrip("/").partition("?")[0]
        if isinstance(failure, int) or not path.is_file():
            self.send_response(failure if isinstance(failure, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, status = path.read_bytes(), path.stat()
        whole = len(content)
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = (int(first), min(int(last or whole), whole - 1)) if first else (whole - int(last), whole - 1)
            content = content[start : end + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", formatdate(status.st_mtime, usegmt=True))
        self.send_header("ETag", f'"{status.st_mtime_ns}-{status.st_size}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
        self.end_headers()
        if with_body:
            self._send(content, failure)

    def _send(self, content: bytes, failure: object) -> None:
        if failure == "truncated":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        if failure == "slow":
            for start in range(0, len(content), max(1, len(content) // 5)):
                self.wfile.write(content[start : start + max(1, len(content) // 5)])
                time.sleep(0.05)
            return
        self.wfile.write(content)


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """A running server of a folder."""
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
