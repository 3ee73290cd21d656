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

    While it is entered a wrapper stands in the place of each handler. Outside, it would just call
    the handler: so a handler that raises in the middle of `enter` or `leave`, before or after the
    one store that decides, leaves nothing in disorder.

    Args:
        notify: called, in the main thread and at any instruction, when a signal was put off.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self.pending: dict[int, FrameType | None] = {}
        self._active = False
        self._notify = notify
        self._handlers: dict[int, Any] = {}
        self._wrapper = self._on_signal  # one object, to know it again
        self._main = threading.main_thread().ident

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._active:
            self.pending[signum] = frame
            self._notify()
        else:
            self._handlers[signum](signum, frame)

    def enter(self) -> None:
        """Begin to put off, if this is the main thread."""
        if threading.get_ident() == self._main:
            for signum in _SIGNALS:
                handler = _getsignal(signum)
                if callable(handler) and handler is not self._wrapper:
                    self._handlers[signum] = handler
                    _setsignal(signum, self._wrapper)
            self._active = True

    def leave(self) -> None:
        """End it, and run the handlers that were put off; what they raise is raised here."""
        if threading.get_ident() == self._main:
            self._active = False
            try:
                for signum in _SIGNALS:
                    if _getsignal(signum) is self._wrapper:
                        _setsignal(signum, self._handlers[signum])
            finally:
                if self.pending:
                    self._run_pending()

    def _run_pending(self) -> None:
        while self.pending:
            signum, frame = self.pending.popitem()
            try:
                self._handlers[signum](signum, frame)
            finally:
                self._run_pending()
