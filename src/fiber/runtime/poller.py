"""Waiting for sockets, with a little patience before sleeping.

To put a processor to sleep and wake it again takes tens of microseconds, on virtual machines often
hundreds: longer than a short task. So who waits looks again and again for a moment before it
sleeps; but only while its last wait was that short, and never on a machine with one processor.
"""

from __future__ import annotations

import functools
import os
import select
import selectors
from collections.abc import Callable
from time import perf_counter
from typing import Any

from fiber.resources import cpu_count

__all__ = ["READ", "WRITE", "Patience", "Poller", "Ready"]

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

Handler = Callable[[int], Any]

Ready = tuple[int, Handler, int]
"""A descriptor, its handler, and what it is ready for."""

_SECONDS = 100e-6  # of looking before sleeping
_LONGEST = 86400.0  # seconds: epoll counts milliseconds in an int, and who waits asks again
_EVENTS = 256  # that one call returns at the most


@functools.cache  # it reads files; a process that is forked has it from the agent
def _several() -> bool:
    """Whether there is another processor, that of the peer."""
    return cpu_count() > 1


class Patience:
    """Decides whether it is worth while to look before sleeping."""

    def __init__(self) -> None:
        self._several = _several()
        self._began = 0.0
        self.looks = False
        """Whether to look first in the next wait."""

    def begin(self) -> None:
        """A wait begins."""
        self._began = perf_counter()

    def lasts(self) -> bool:
        """Whether to look once more."""
        return perf_counter() - self._began < _SECONDS

    def end(self) -> None:
        """The wait is over."""
        self.looks = self._several and perf_counter() - self._began < _SECONDS


_give_way: Callable[[], object] = getattr(os, "sched_yield", lambda: None)


class Poller:
    """Calls back for descriptors that are ready; epoll itself where there is one.

    `selectors` costs several microseconds a call on top of it, and a round trip has one.
    """

    def __init__(self) -> None:
        self._patience = Patience()
        self._handlers: dict[int, Handler] = {}
        self._epoll: Any = select.epoll() if hasattr(select, "epoll") else None
        self._selector = None if self._epoll else selectors.DefaultSelector()

    def register(self, fd: int, events: int, handler: Handler) -> None:
        """Have `handler(events)` returned when `fd` is ready for any of `events`."""
        if self._selector is not None:
            self._selector.register(fd, events)
        else:
            self._epoll.register(fd, _to_epoll(events))
        self._handlers[fd] = handler

    def modify(self, fd: int, events: int) -> None:
        """Change what `fd` is watched for."""
        if self._selector is not None:
            self._selector.modify(fd, events)
        else:
            self._epoll.modify(fd, _to_epoll(events))

    def unregister(self, fd: int) -> None:
        """Watch `fd` no more."""
        del self._handlers[fd]
        if self._selector is not None:
            self._selector.unregister(fd)
        else:
            self._epoll.unregister(fd)

    def wait(self, timeout: float | None) -> list[Ready]:
        """Return what is ready, after `timeout` seconds at the most."""
        if timeout is not None:
            if timeout <= _SECONDS:
                return self._poll(timeout)
            timeout = min(timeout, _LONGEST)
        patience = self._patience
        patience.begin()
        ready: list[Ready] = []
        if patience.looks:
            while not (ready := self._poll(0)) and patience.lasts():
                _give_way()  # where processors are few, the peer may wait for this one
        if not ready:
            ready = self._poll(timeout)
        patience.end()
        return ready

    def _poll(self, timeout: float | None) -> list[Ready]:
        # A descriptor may be unregistered by another thread while this one waits.
        handlers = self._handlers
        if self._selector is not None:
            keys = self._selector.select(timeout)
            return [
                (key.fd, handlers[key.fd], events) for key, events in keys if key.fd in handlers
            ]
        return [
            (fd, handlers[fd], _from_epoll(events))
            for fd, events in self._epoll.poll(timeout, _EVENTS)
            if fd in handlers
        ]

    def calls(self, fd: int, handler: Handler) -> bool:
        """Whether `handler` is still the one for `fd`."""
        return self._handlers.get(fd) is handler

    def descriptors(self) -> list[int]:
        """Return what is watched."""
        return list(self._handlers)

    def close(self) -> None:
        """Close it."""
        if self._selector is not None:
            self._selector.close()
        else:
            self._epoll.close()


def _to_epoll(events: int) -> int:
    return (select.EPOLLIN if events & READ else 0) | (select.EPOLLOUT if events & WRITE else 0)


def _from_epoll(events: int) -> int:
    """As selectors: an error or a hang-up shows as both, so that whoever looks finds it."""
    read = READ if events & ~select.EPOLLOUT else 0
    return read | (WRITE if events & ~select.EPOLLIN else 0)
