"""Serve pages to browsers of this machine.

with listening(handler, port=0) as number: ...
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ftkit_export.runtime.errors import FtkitError

HOSTS = ("127.0.0.1", "localhost")


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that is closed while it is sent is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def listening(handler: Callable[..., BaseHTTPRequestHandler], port: int) -> Iterator[int]:
    """Listen on 127.0.0.1 while the block runs; yields the port. port 0: any free one.

    handler: makes a request handler, as ThreadingHTTPServer calls it. Raises FtkitError when the
    port is taken.
    """
    try:
        server = _Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise FtkitError(
            f"--port {port}: expected a free port, found {error.strerror}. Try another"
        ) from None

    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def names_this_machine(headers: Any) -> bool:
    """Whether a request's Host is this machine: a page elsewhere may have its own name point here."""
    return headers.get("Host", "").split(":")[0] in HOSTS
