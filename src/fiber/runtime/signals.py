"""Keeps the handlers of signals out of code that must not be left half-way.

Python runs signal handlers in the main thread between any two instructions, and that for SIGINT
raises KeyboardInterrupt. While the main thread does the session's I/O, such an exception could lose
a message. So handlers are put off: the signal is noted, whoever waits is woken, and the handler
runs when the main thread leaves.
"""

from __future__ import annotations

import signal
import threading

# The module below `signal`: without its conversions to enums, a call takes 0.4 µs and not 5.
from _signal import getsignal as _getsignal  # type: ignore[import-not-found]
from _signal import signal as _setsignal
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Deferral"]

_SIGNALS = (int(signal.SIGINT), int(signal.SIGTERM), int(signal.SIGALRM))


class Deferral:
    """Puts off the Python handlers of SIGINT, SIGTERM and SIGALRM in the main thread.

    Args:
        notify: called, in the main thread and at any instruction, when a signal was put off.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self.pending: dict[int, FrameType | None] = {}
        self._notify = notify
        self._handlers: dict[int, Any] = {}
        self._main = threading.main_thread().ident

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.pending[signum] = frame
        self._notify()

    def enter(self) -> None:
        """Begin to put off, if this is the main thread."""
        if threading.get_ident() == self._main:
            for signum in _SIGNALS:
                handler = _getsignal(signum)
                if callable(handler):
                    self._handlers[signum] = handler
                    _setsignal(signum, self._note)

    def leave(self) -> None:
        """End it, and run the handlers that were put off; what they raise is raised here."""
        if self._handlers and threading.get_ident() == self._main:
            handlers, self._handlers = self._handlers, {}
            for signum, handler in handlers.items():
                _setsignal(signum, handler)
            if self.pending:
                pending, self.pending = self.pending, {}
                for signum, frame in pending.items():
                    handlers[signum](signum, frame)
