"""A small HTTP server that serves bytes, with ranges or without, and breaks off when told."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class FileServer:
    """`break_after` cuts each answer after so many bytes; `bytes_sent` counts what went out."""

    files: dict[str, bytes]
    ranges: bool = True
    break_after: int | None = None
    url: str = ""
    bytes_sent: int = 0
    seen_ranges: list[str | None] = field(default_factory=list)


@contextmanager
def serving(server: FileServer) -> Iterator[FileServer]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(server, self)

        def do_HEAD(self) -> None:
            _answer(server, self, body=False)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server.url = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


def _answer(
    server: FileServer, handler: http.server.BaseHTTPRequestHandler, *, body: bool = True
) -> None:
    content = server.files.get(handler.path)
    if content is None:
        handler.send_error(404)
        return
    wanted = handler.headers.get("Range") if server.ranges else None
    if body:
        server.seen_ranges.append(handler.headers.get("Range"))
    start, stop = _bounds(wanted, len(content))
    if start >= len(content):
        handler.send_response(416)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    handler.send_response(206 if wanted else 200)
    handler.send_header("Content-Type", _content_type(handler.path))
    handler.send_header("Content-Length", str(stop - start))
    if server.ranges:
        handler.send_header("Accept-Ranges", "bytes")
    if wanted:
        handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
    handler.end_headers()
    if body:
        sent = content[start:stop][: server.break_after]
        handler.wfile.write(sent)
        server.bytes_sent += len(sent)


def _content_type(path: str) -> str:
    return "text/html" if path.endswith("/") else "application/octet-stream"


def _bounds(wanted: str | None, size: int) -> tuple[int, int]:
    if wanted is None:
        return 0, size
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size
