"""A server for tests of downloads: it holds files made there, and can be slow, cut off, or know nothing of ranges."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class WeightServer:
    """Files by path; each setting of a list is for one request, in their order."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True  # whether it can send a part of a file
    length: bool = True  # whether it reports the length of a file
    endless: bool = False  # whether it sends the file again and again
    part: int = 1 << 16  # bytes sent at once
    tag: str = '"1"'
    cuts: list[int] = field(default_factory=list)  # close after so many bytes of the body
    stalls: list[int] = field(default_factory=list)  # be silent after so many bytes
    statuses: list[int] = field(default_factory=list)  # answer this instead of a file
    pause_s: float = 0.0  # after each part
    url: str = ""
    requests: list[tuple[str, int]] = field(default_factory=list)  # path, first byte
    num_bytes: int = 0  # sent in all
    closing: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    state: WeightServer

    def do_GET(self) -> None:
        state = self.state
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        state.requests.append((self.path, start))
        if state.statuses and (status := state.statuses.pop(0)) != 200:
            self.send_error(status)
            return
        if self.path not in state.files:
            self.send_error(404)
            return
        body = state.files[self.path]
        cut = state.cuts.pop(0) if state.cuts else len(body)
        stall = state.stalls.pop(0) if state.stalls else len(body)
        start = start if state.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if state.length:
            self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", state.tag)
        self.end_headers()
        self._send(body[start:], cut, stall)

    def _send(self, body: bytes, cut: int, stall: int) -> None:
        state = self.state
        end = min(cut, stall, len(body))
        try:
            for begin in itertools.count(0, state.part) if state.endless else range(0, end, state.part):
                part = body[begin % end : min(begin % end + state.part, end)]
                self.wfile.write(part)
                state.num_bytes += len(part)
                time.sleep(state.pause_s)
            if end == stall < len(body):
                state.closing.wait(20)
        except OSError:  # the client has disconnected
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(**settings: object) -> Iterator[WeightServer]:
    state = WeightServer(**settings)  # type: ignore[arg-type]
    handler = type("Handler", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield state
        finally:
            state.closing.set()
            server.shutdown()
            thread.join()
