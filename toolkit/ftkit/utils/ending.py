"""End with what was started: processes that measure, folders on devices.

with when_asked_to_end(leave): ...
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

# By which a scheduler, torchrun or a terminal that is closed asks to end
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def when_asked_to_end(action: Any) -> Iterator[None]:
    """What these signals do within the block; where they are ignored (nohup), or outside of the main
    thread, no more than before."""
    former = {}
    with suppress(ValueError):
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                former[number] = signal.signal(number, action)
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def leave(number: int, _: object) -> None:
    """End this process as an exception, so that the blocks it is in tidy up."""
    for each in ENDING:  # they may come twice, from a scheduler and from torchrun
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)
