"""A local page to label collected pictures, one key a class.

with labelling(Path("collected"), pictures, classes) as url: ...

It listens on 127.0.0.1 only, answers only requests that name this machine, and takes labels only
from its own page. Every label is written to review.csv at once.
"""

from __future__ import annotations

import json
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from ftkit.field.review import FOLDER, TABLE, Picture, read_labels, write_table
from ftkit.report.pictures import for_browser
from ftkit.utils.local_server import HOSTS, listening, names_this_machine
from ftkit_export.bundle.enroll import FORBIDDEN
from ftkit_export.runtime.errors import FtkitError

PAGE = Path(__file__).parent / "label_page.html"
SCRIPT = Path(__file__).parent / "label_page.js"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
LONGEST = 10_000  # bytes of a request


class _Labels:
    """The pictures, and the labels given to them."""

    def __init__(self, collected: Path, pictures: Sequence[Picture], classes: Sequence[str]):
        self.collected = collected
        self.pictures = pictures
        self.classes = list(classes)
        self.table = collected / FOLDER / TABLE
        self._given = read_labels(self.table)
        self._lock = threading.Lock()

    def told(self) -> dict[str, Any]:
        """For the page."""
        return {
            "classes": self.classes,
            "pictures": [
                {
                    "path": picture.path,
                    "suggested": picture.suggested,
                    "probability": picture.probability,
                    "why": picture.why,
                    "alike": len(picture.alike),
                    "label": self._given.get(f"../{picture.path}", ""),
                }
                for picture in self.pictures
            ],
        }

    def give(self, number: int, shown: str, label: str) -> None:
        """Label a picture, or take its label back with "". shown: its path, as the page has it, which may
        be of an earlier review. Raises ValueError for nonsense."""
        unfit = any(unicodedata.category(letter) in FORBIDDEN for letter in label)
        if not 0 <= number < len(self.pictures) or len(label) > 200 or unfit:
            raise ValueError(label)
        if self.pictures[number].path != shown:
            raise ValueError(shown)
        path = f"../{shown}"
        with self._lock:
            self._given.pop(path, None)
            if label:
                self._given[path] = label
                if label not in self.classes:
                    self.classes.append(label)
            write_table(self.table, self.pictures, self._given)


class _Handler(BaseHTTPRequestHandler):
    """Serves the page and the pictures of one review; takes labels."""

    def __init__(self, *args: Any, labels: _Labels, **more: Any):
        self._labels = labels
        super().__init__(*args, **more)

    def do_GET(self) -> None:
        """The page, its script, its data, or a picture by its number."""
        if not names_this_machine(self.headers):
            self.send_error(403)
        elif self.path == "/":
            self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/label_page.js":
            self._send(SCRIPT.read_bytes(), "text/javascript")
        elif self.path == "/pictures.json":
            self._send(json.dumps(self._labels.told()).encode(), "application/json")
        elif self.path == "/favicon.ico":
            self._send(b"", "image/x-icon")
        else:
            self._send_picture()

    def _send_picture(self) -> None:
        name = self.path.removeprefix("/picture/")
        pictures = self._labels.pictures
        if not name.isdecimal() or int(name) >= len(pictures):
            self.send_error(404)
            return
        try:
            self._send(*for_browser(self._labels.collected / pictures[int(name)].path))
        except (OSError, FtkitError):
            self.send_error(404)

    def do_POST(self) -> None:
        """A label: {"number": 0, "path": "doubtful/1.png", "label": "ok"}."""
        length = self.headers.get("Content-Length", "")
        origin = self.headers.get("Origin", "")
        own = origin in [f"http://{host}:{self.server.server_port}" for host in HOSTS]  # type: ignore[attr-defined]
        if not names_this_machine(self.headers) or not own:
            self.send_error(403)
            return
        if self.path != "/label" or not length.isdecimal() or int(length) > LONGEST:
            self.send_error(404)
            return
        try:
            told = json.loads(self.rfile.read(int(length)))
            self._labels.give(int(told["number"]), str(told["path"]), str(told["label"]).strip())
        except (ValueError, KeyError, TypeError):
            self.send_error(400)
            return
        except (OSError, FtkitError) as error:
            self.send_error(500, str(error)[:80])
            return
        self._send(b"{}", "application/json")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal is left to the user."""


@contextmanager
def labelling(
    collected: Path, pictures: Sequence[Picture], classes: Sequence[str], port: int = 0
) -> Iterator[str]:
    """Serve the page while the block runs; yields its address. port 0: any free one.

    Raises FtkitError when the port is taken.
    """
    labels = _Labels(collected, pictures, classes)
    with listening(partial(_Handler, labels=labels), port) as number:
        yield f"http://127.0.0.1:{number}/"
