"""A page on 127.0.0.1 that follows a run as it goes.

The standard library's server is enough and adds no dependency: one page, one stream of server-sent events and a few
files, for readers on this machine. It listens on the loopback address alone, answers only requests that name it
(another site's page cannot reach it under a name of its own), only reads, and only files that a report consists of.
"""

import json
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from deltatune.comparing.follow import Follower
from deltatune.errors import UserError

HOST = "127.0.0.1"
_EVERY = 0.5
"""Seconds between two looks at the folder."""
_FILES = re.compile(r"report\.html|results\.(csv|parquet|md)|plots/[\w-]+\.(svg|png)")
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


class WatchServer(ThreadingHTTPServer):
    """Serves the page of one run folder. `port` 0 takes a free one; `url` says which."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        Follower(folder)  # refuses what is no run
        self.folder = folder
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise UserError(f"port {port} cannot be used: {error.strerror}", "choose another with --port") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}:
            self._send(403, b"this page is for its own machine\n", "text/plain")
        elif self.path == "/":
            self._send(200, Path(__file__).with_name("watch.html").read_bytes(), _TYPES[".html"])
        elif self.path == "/events":
            self._stream()
        elif _FILES.fullmatch(self.path[1:]) and (file := self.server.folder / self.path[1:]).is_file():
            self._send(200, file.read_bytes(), _TYPES.get(file.suffix, "application/octet-stream"))
        else:
            self._send(404, b"there is no such page\n", "text/plain")

    def _send(self, code: int, content: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def _stream(self) -> None:
        """Tells what is new, until the reader goes away; a comment now and then finds out whether it has."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        follower, told = Follower(self.server.folder), ""
        try:
            while True:
                now = json.dumps(follower.snapshot(), allow_nan=False)
                self.wfile.write(b": still here\n\n" if now == told else f"data: {now}\n\n".encode())
                self.wfile.flush()
                told = now
                time.sleep(_EVERY)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Says nothing: the terminal belongs to who started this."""
