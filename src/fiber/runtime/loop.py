"""The loop: all socket I/O of a process, done by one thread at a time.

    sockets, timers, calls ─► turn ─► handlers ─► state of pools and processes, events set
                               ▲
            the leader: a thread that waits for an event, or else the background thread

Whoever waits for an event leads: it polls the sockets and runs the handlers, so that a round trip
costs two context switches and not four. When several threads wait, one leads and the others
sleep until their event is set or the leadership falls to them. When nobody waits, a background
thread leads.

One lock guards everything that handlers touch; it is free only while the leader polls. Code from
outside comes in by `with loop:`, which takes the lock, puts off signal handlers (KeyboardInterrupt
must not tear a message in two) and sends what was posted when it leaves. Finalizers, which may run
anywhere, use `call_soon`.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

from fiber.runtime.poller import READ, Poller, Ready
from fiber.runtime.signals import Deferral

if TYPE_CHECKING:
    from fiber.runtime.link import Link

__all__ = ["Event", "Loop", "Timer"]


_DOZE = 0.0005  # seconds after which the background thread takes over from threads that left


class _Sleeper:
    """A thread that waits while another leads."""

    __slots__ = ("_lock", "_woken")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._woken = False

    def sleep(self, timeout: float | None) -> None:
        # Beyond Python's own limit, some centuries, is an error; who waits asks again.
        self._lock.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # a signal handler was faster
                self._lock.release()


class Event:
    """As `threading.Event`, but who waits for it, by `Loop.wait`, drives the loop.

    Set within the loop only.
    """

    __slots__ = ("_leads", "_sleepers", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._leads: Loop | None = None  # the loop that is led by a thread that waits for this
        self._sleepers: list[_Sleeper] = []

    def set(self) -> None:
        """Set it and wake all that wait for it."""
        self.is_set = True
        for sleeper in self._sleepers:
            sleeper.wake()
        if self._leads is not None and self._leads._polling:
            self._leads._kick()  # set by another thread than the one that leads


class Timer:
    """A call at a point in time; `cancel` takes it back."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], object]) -> None:
        self.when = when
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        """Let it pass without a call."""
        self.call = None


class Loop:
    """See the module. All methods but `wait`, `poll`, `call_soon` and `close` need `with loop:`.

    Args:
        background: whether to have the background thread; without it something must always wait.
    """

    def __init__(self, *, background: bool = True) -> None:
        self._lock = threading.Lock()
        self._has_background = background
        self._poller = Poller()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poller.register(self._wake_read, READ, self._woken)
        self._calls: deque[Callable[[], object]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_ids = itertools.count()
        self._swept_at = 64  # how many timers there may be before the cancelled ones are dropped
        self._unsent: list[Link] = []
        self._deferral = Deferral(self._interrupt)
        self._holder: int | None = None  # identity of the thread that has the lock
        self._leader: int | None = None  # that of the one that leads
        self._background_leads = False
        self._yield = False  # it is to leave the lead to a thread that polls
        self._led = 0  # how often a waiting thread began to lead
        self._polling = False
        self._sleepers: deque[_Sleeper] = deque()  # who waits while another leads, oldest first
        self._main_sleeper: _Sleeper | None = None
        self._background: threading.Thread | None = None
        self._bell = threading.Lock()  # held; released to wake the background thread
        self._bell.acquire()
        self._parked = False
        self._failure: BaseException | None = None
        self._reason: BaseException = RuntimeError("Fiber's session was ended")
        self.closed = False
        self.pid = os.getpid()

    # From outside ------------------------------------------------------------------------------

    def __enter__(self) -> Loop:
        if self.held:
            raise RuntimeError(
                "Fiber was used by code that Fiber itself is running, such as a finalizer or a "
                "method that pickles"
            )
        self._deferral.enter()
        self._lock.acquire()
        self._holder = threading.get_ident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._flush()
            if self._parked and self._leader is None:
                self._parked = False
                self._bell.release()
        finally:
            self._holder = None
            self._lock.release()
            self._deferral.leave()

    @property
    def failed(self) -> bool:
        """Whether a defect has ended it."""
        return self._failure is not None

    @property
    def held(self) -> bool:
        """Whether this very thread is within the loop."""
        return self._holder == threading.get_ident()

    def wait(self, event: Event, timeout: float | None = None) -> bool:
        """Wait until `event` is set, at most `timeout` seconds; return whether it is set.

        Raises:
            RuntimeError: the loop was closed, or failed, so that nobody will set the event.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while not event.is_set:
            with self:
                self.wait_within(event, deadline)
            if deadline is not None and monotonic() >= deadline:
                break
        return event.is_set

    def wait_within(self, event: Event, deadline: float | None = None) -> None:
        """As `wait`, for a caller that is in `with loop:` already; may return early.

        It does so when a signal came: its handler runs, and raises perhaps, as the caller leaves.
        """
        try:
            while not event.is_set and not (self._deferral.pending and self._is_main()):
                if self._failure is not None:
                    raise RuntimeError("Fiber's I/O loop failed") from self._failure
                if self.closed:
                    raise self._reason
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    return
                if self._leader is None:
                    self._lead(event, deadline)
                else:
                    self._sleep(event, left)
        finally:
            self._hand_over()

    def poll(self) -> None:
        """Handle what has arrived, without waiting."""
        with self:
            if self._leader is None and not self.closed:
                self._leader = threading.get_ident()
                try:
                    self._turn(0)
                finally:
                    self._step_down()

    def poll_within(self) -> None:
        """As `poll`, for a caller that is in `with loop:` already and that comes often.

        The background thread leaves the loop to it: in a thread of Python that is busy, the other
        would have to wait for its turn, for milliseconds.
        """
        if self._leader is None and not self.closed:
            self._led += 1
            self._leader = threading.get_ident()
            try:
                self._turn(0)
            finally:
                self._step_down()
        elif self._background_leads:
            self._yield = True
            self._kick()

    def drain(self, link: Link) -> None:
        """Wait until all that was posted on `link` is on its way, or its peer is gone."""
        while not link.idle and not self.closed:
            with self:
                if not link.idle:
                    link.sent = Event()
                    self.wait_within(link.sent)

    def call_soon(self, call: Callable[[], object]) -> None:
        """Have `call` run within the loop, soon; from anywhere, finalizers included."""
        # No lock: it may be held by the very thread whose finalizer this is. While the background
        # thread is parked another leads, and rings for it when it leaves.
        self._calls.append(call)
        self._kick()

    def close(self, reason: BaseException | None = None) -> None:
        """End the loop; whoever waits gets `reason`, a RuntimeError if it is None."""
        with self:
            if self.closed:
                return
            self.closed = True
            self._reason = reason or self._reason
            for sleeper in self._sleepers:
                sleeper.wake()
            self._kick()
            if self._parked:
                self._parked = False
                self._bell.release()
        if self._background is not None:
            self._background.join(timeout=5)
        self._wait_for_leader()
        self.abandon()

    def _wait_for_leader(self) -> None:
        """After closing: give a thread that leads the time to notice."""
        deadline = monotonic() + 5
        while self._leader is not None and monotonic() < deadline:
            self._kick()
            time.sleep(0.001)

    def abandon(self) -> None:
        """Close the descriptors, and nothing else: after a fork, in the child."""
        self._poller.close()
        wake_read, wake_write = self._wake_read, self._wake_write
        self._wake_read = self._wake_write = -1  # a late kick shall not hit another's descriptor
        os.close(wake_read)
        os.close(wake_write)

    def forget(self) -> None:
        """After `os.fork`, in the child: let go of what is the parent's without disturbing it."""
        # The parent's peers must see its end whatever becomes of us, so our copies are closed.
        # Their numbers stay taken: objects that nobody closes have them. Nothing is unregistered,
        # for the epoll is the parent's as well.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in self._poller.descriptors():
            os.dup2(null, fd, inheritable=False)
        os.close(null)
        self._lock = threading.Lock()  # a thread that is not here may have held it
        self._holder = self._leader = None
        self.closed = True
        self.abandon()

    # Within the loop ---------------------------------------------------------------------------

    def register(self, fd: int, events: int, handler: Callable[[int], object]) -> None:
        """Have `handler(events)` called when `fd` is ready."""
        self._poller.register(fd, events, handler)
        if self._background is None and self._has_background:
            self._background = threading.Thread(
                target=self._run_background, name="fiber-io", daemon=True
            )
            self._background.start()

    def modify(self, fd: int, events: int) -> None:
        """Change what `fd` is watched for."""
        self._poller.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """Watch `fd` no more."""
        self._poller.unregister(fd)

    def call_at(self, when: float, call: Callable[[], object]) -> Timer:
        """Have `call` run at `when` (of `time.monotonic`)."""
        timer = Timer(when, call)
        if len(self._timers) > self._swept_at:  # those that were cancelled go, now and then
            self._timers = [entry for entry in self._timers if entry[2].call is not None]
            heapq.heapify(self._timers)
            self._swept_at = 2 * len(self._timers) + 64
        heapq.heappush(self._timers, (when, next(self._timer_ids), timer))
        if self._polling and self._timers[0][2] is timer:
            self._kick()
        return timer

    def call_later(self, seconds: float, call: Callable[[], object]) -> Timer:
        """Have `call` run in `seconds`."""
        return self.call_at(monotonic() + seconds, call)

    def run_calls(self) -> None:
        """Run what `call_soon` was given."""
        while self._calls:
            self._calls.popleft()()

    def send_soon(self, link: Link) -> None:
        """Have the outbox of `link` sent at the end of this turn."""
        self._unsent.append(link)

    # Leading -----------------------------------------------------------------------------------

    def _is_main(self) -> bool:
        return threading.get_ident() == threading.main_thread().ident

    def _lead(self, event: Event, deadline: float | None) -> None:
        self._leader = threading.get_ident()
        self._led += 1
        event._leads = self
        try:
            while not (event.is_set or self.closed or self._failure is not None):
                if self._deferral.pending and self._is_main():
                    break
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    break
                self._turn(left)
        finally:
            event._leads = None
            self._step_down()

    def _step_down(self) -> None:
        self._leader = None
        self._hand_over()

    def _hand_over(self) -> None:
        """See to it that somebody who waits leads; whoever wakes in vain hands over as well."""
        if self._leader is None and self._sleepers:
            self._sleepers[0].wake()

    def _sleep(self, event: Event, timeout: float | None) -> None:
        """Wait while another thread leads; the background thread yields to us."""
        sleeper = _Sleeper()
        self._sleepers.append(sleeper)
        event._sleepers.append(sleeper)
        if self._is_main():
            self._main_sleeper = sleeper
            if self._deferral.pending:
                sleeper.wake()
        if self._background_leads:
            self._kick()
        self._flush()
        self._holder = None
        self._lock.release()
        try:
            sleeper.sleep(timeout)
        finally:
            self._lock.acquire()
            self._holder = threading.get_ident()
            if self._main_sleeper is sleeper:
                self._main_sleeper = None
            self._sleepers.remove(sleeper)
            event._sleepers.remove(sleeper)

    def _turn(self, timeout: float | None) -> None:
        """Poll once, then handle what came, what is due and what was asked for, and send."""
        self._flush()
        if self._calls:
            timeout = 0
        elif self._timers:
            due = max(0.0, self._timers[0][0] - monotonic())
            timeout = due if timeout is None else min(timeout, due)
        try:
            for fd, handler, events in self._poll(timeout):
                # Another thread, or a handler before this one, may have unregistered it meanwhile.
                if self._poller.calls(fd, handler):
                    handler(events)
            self.run_calls()
            if self._timers:
                self._run_timers()
            self._flush()
        except BaseException as error:
            # A defect of a handler: nobody shall wait for what can no longer come.
            self._failure = error
            for sleeper in self._sleepers:
                sleeper.wake()
            raise

    def _poll(self, timeout: float | None) -> list[Ready]:
        """Wait until something is ready; this alone is done without the lock."""
        self._polling = True
        holder, self._holder = self._holder, None
        self._lock.release()
        try:
            return self._poller.wait(timeout)
        finally:
            self._lock.acquire()
            self._holder = holder
            self._polling = False

    def _run_timers(self) -> None:
        now = monotonic()
        while self._timers and self._timers[0][0] <= now:
            call = heapq.heappop(self._timers)[2].call
            if call is not None:
                call()

    def _flush(self) -> None:
        while self._unsent:
            self._unsent.pop().flush()

    def _run_background(self) -> None:
        seen = -1
        while True:
            with self:
                if self.closed or self._failure is not None:
                    return
                if self._leader is None and self._led == seen and not self._sleepers:
                    self._leader = threading.get_ident()
                    self._background_leads = True
                    try:
                        self._yield = False
                        while not self._is_wanted():
                            self._turn(None)
                    finally:
                        self._background_leads = False
                        self._step_down()
                elif self._leader is not None and self._led == seen:
                    self._parked = True  # a thread leads for long: it rings when it leaves
                seen = self._led
                parked = self._parked
            if parked:
                self._bell.acquire()
                seen = self._led
            self._bell.acquire(timeout=_DOZE)

    def _is_wanted(self) -> bool:
        """Whether the background thread is to leave the lead."""
        return bool(self._sleepers) or self.closed or self._yield

    # Waking ------------------------------------------------------------------------------------

    def _kick(self) -> None:
        """Make the leader return from its poll."""
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    def _woken(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _interrupt(self) -> None:
        """A signal was put off: wake the main thread, wherever it waits."""
        self._kick()
        if self._main_sleeper is not None:
            self._main_sleeper.wake()
