"""`Ring`: processes that know their place among the others, as in MPI or `torch.distributed`.

    Ring.run ─► N members ─► each announces an address ─► initializer(ring) ─► func(rank, size)
       ▲                                                                            │
       └──────── the exception of the first that fails; the others are ended ◄──────┘

A member is told its rank, the number of members, and an address of rank 0 at which a library can
let them meet; there is a barrier for all. What they say to each other is their own matter: through
queues and pipes of Fiber, or a library such as PyTorch.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from queue import Empty
from threading import BrokenBarrierError
from typing import Any, NamedTuple

from fiber import connection
from fiber.context import FiberContext, get_context
from fiber.errors import PeerDied, RingBroken
from fiber.process import Process
from fiber.queues import Queue
from fiber.resources import Resources, meta_of
from fiber.runtime import session
from fiber.runtime.refs import Ref, lookup, serve
from fiber.served.meeting import ServedMeeting
from fiber.synchronize import Barrier
from fiber.wire import exceptions

__all__ = ["Ring", "RingMember", "RingNode"]

_AFTERMATH = 0.3  # seconds in which the failures are heard that one failure brings about
_GRACE = 5.0  # seconds that a member has to end once it is asked to


class RingNode(NamedTuple):
    """A member, as the others see it.

    Attributes:
        rank: its number, from 0.
        connected: whether it has announced itself: always true.
        ip: of the machine that it runs on.
        port: one that was free there when it announced itself.
    """

    rank: int
    connected: bool
    ip: str
    port: int


class RingMember:
    """The ring as one of its members sees it; what the initializer is given.

    Attributes:
        rank: of this member, from 0.
        size: how many members there are.
    """

    def __init__(self, rank: int, size: int, meeting: Ref, barrier: Barrier) -> None:
        self.rank = rank
        self.size = size
        self._meeting = meeting
        self._barrier = barrier
        self._members: list[RingNode] = []

    @property
    def members(self) -> Sequence[RingNode]:
        """All members, by rank; waits until all have come.

        Raises:
            PeerDied: one of them died before it came.
        """
        if not self._members:
            found = self._meeting.call("meet")
            self._members = [RingNode(rank, True, *address) for rank, address in enumerate(found)]
        return self._members

    @property
    def address(self) -> tuple[str, int]:
        """Host and port where a library can let the members meet: free on rank 0's machine."""
        first = self.members[0]
        return first.ip, first.port

    def barrier(self, timeout: float | None = None) -> int:
        """Wait until all members are here.

        Args:
            timeout: seconds to wait at the most.

        Raises:
            BrokenBarrierError: one has died, or time ran out.
        """
        return self._barrier.wait(timeout)


class Ring:
    """Processes that run `func(rank, size)`, each with a rank of its own.

    Args:
        processes: how many members.
        func: what each runs; `@fiber.meta` of it says what each needs.
        initializer: called before it in each, as `initializer(ring, *initargs)`, with a
            `RingMember`.
        initargs: more arguments of the initializer.
        context: of a backend; the configured one by default.
    """

    def __init__(
        self,
        processes: int,
        func: Callable[[int, int], Any],
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] | None = (),
        *,
        context: FiberContext | None = None,
    ) -> None:
        if processes < 1:
            raise ValueError(f"a ring has 1 process or more, not {processes}")
        for name, value in (("func", func), ("initializer", initializer)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be a callable, not {value!r}")
        self.size = processes
        self._func = func
        self._initializer = initializer
        self._initargs = tuple(initargs or ())
        self._backend = (context or get_context()).backend

    def run(self) -> None:
        """Start the members, and wait until all have ended.

        Raises:
            RingBroken: a member failed; it names the first, whose exception is its cause. All
                members have ended then.
            StartError: a member could not be started.
        """
        meeting = serve(Ref, ServedMeeting, self.size)
        barrier = Barrier(self.size)
        reports = Queue()
        place = (meeting.address, meeting.id)
        members = [
            _Member(self, rank, place, barrier, reports, self._backend) for rank in range(self.size)
        ]
        try:
            for member in members:
                member.start()
            failed = self._watch(members)
        finally:
            _end(members)
        if failed:
            raise _first_failure(members, failed, reports)

    def _watch(self, members: list[_Member]) -> list[_Member]:
        """Wait until all have ended well, or one has not; return those that have not."""
        running = list(members)
        failed: list[_Member] = []
        deadline: float | None = None
        while running and (deadline is None or time.monotonic() < deadline):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            connection.wait([member.sentinel for member in running], left)
            for member in list(running):
                if member.exitcode is not None:
                    running.remove(member)
                    if member.exitcode != 0:
                        failed.append(member)
                        deadline = deadline or time.monotonic() + _AFTERMATH
        return failed


class _Member(Process):
    """The process of a member."""

    def __init__(
        self,
        ring: Ring,
        rank: int,
        meeting: tuple[str, int],
        barrier: Barrier,
        reports: Queue,
        backend: str | None,
    ) -> None:
        super().__init__(name=f"RingMember-{rank}")
        self.rank = rank
        self._size = ring.size
        self._meeting = meeting
        self._barrier = barrier
        self._reports = reports
        self._work = (ring._func, ring._initializer, ring._initargs)
        self._backend = backend

    def _resources(self) -> Resources:
        return meta_of(self._work[0])

    def run(self) -> None:
        func, initializer, initargs = self._work
        try:
            meeting = lookup(Ref, *self._meeting)
            meeting.call("announce", self.rank, _free_address())
            ring = RingMember(self.rank, self._size, meeting, self._barrier)
            if initializer is not None:
                initializer(ring, *initargs)
            func(self.rank, self._size)
        except SystemExit as error:
            if error.code not in (None, 0):
                self._report(error)
        except BaseException as error:
            self._report(error)

    def _report(self, error: BaseException) -> None:
        """Tell the ring of a failure; its traceback is printed there, once."""
        with contextlib.suppress(PeerDied):
            self._reports.put((self.rank, time.time(), exceptions.encode(error)))
        sys.exit(1)


def _end(members: list[_Member]) -> None:
    """End whoever runs."""
    started = [member for member in members if member.pid is not None]
    for member in started:
        if member.is_alive():
            member.terminate()
    deadline = time.monotonic() + _GRACE
    for member in started:
        member.join(max(0.0, deadline - time.monotonic()))
        if member.is_alive():
            member.kill()
            member.join()


def _first_failure(members: list[_Member], failed: list[_Member], reports: Queue) -> RingBroken:
    """Return the error that names who failed first.

    A member that was killed could tell nothing, and others may have failed of its end; who failed
    at the barrier failed for another. Of the others, the clock tells.
    """
    errors: dict[int, tuple[float, BaseException]] = {}
    with contextlib.suppress(Empty):
        while True:
            rank, when, encoded = reports.get_nowait()
            errors[rank] = (when, exceptions.decode(encoded))

    def order(member: _Member) -> tuple[int, float]:
        if member.rank not in errors:
            return 0, 0.0
        when, error = errors[member.rank]
        return (2 if isinstance(error, (BrokenBarrierError, PeerDied)) else 1), when

    first = min(failed, key=order)
    others = len(members) - 1
    rest = f"; the other {others} {'has' if others == 1 else 'have'} ended" if others else ""
    if first.rank in errors:
        error = errors[first.rank][1]
        told = RingBroken(
            f"member {first.rank} of the ring failed: {type(error).__name__}: {error}{rest}",
            first.rank,
            first.exitcode,
        )
        told.__cause__ = error
        return told
    code = first.exitcode
    how = f"was ended by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    return RingBroken(
        f"member {first.rank} of the ring (process {first.pid}) {how}{rest}", first.rank, code
    )


def _free_address() -> tuple[str, int]:
    """Return an address of this machine, as the other members reach it, and a free port."""
    host = session.host() or "127.0.0.1"  # where there is no other place, all are on this machine
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, 0))
        return host, sock.getsockname()[1]
