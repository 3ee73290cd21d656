"""The parent's side of an agent that runs elsewhere, in a container or a pod.

    order ─► job pending ─► running ─► its agent connects ─► PREPARE ─► READY ─► as any agent
                 └─────────────┴──────────────┴── ended: why, in words

Beyond what `runtime.agents` does: what its processes print arrives here and goes to this process's
own streams; silence for too long is taken for the end of its node; and when it is gone its job is
asked for the reason, so that whoever waits for one of its processes is told.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiber.backends.base import BLAMELESS, JobState, JobStatus
from fiber.config import config
from fiber.runtime.agents import (
    DIAL,
    ENDING,
    EXITED,
    OUTPUT,
    PING,
    PREPARE,
    Agent,
    Child,
    standard_streams,
)
from fiber.runtime.link import Link
from fiber.runtime.logs import INFO, WARNING, log
from fiber.runtime.loop import Event, Loop, Timer
from fiber.runtime.orders import REFUSED, Held
from fiber.wire.framing import Frame

if TYPE_CHECKING:
    from fiber.runtime.endpoint import Endpoint

__all__ = ["BEAT", "SILENCE", "RemoteAgent"]

BEAT = 5.0
"""Seconds between two signs of life."""

SILENCE = 25.0
"""Seconds without one after which the other side is taken for dead."""

_DIAGNOSIS = 6.0  # seconds in which the manager should have heard of a job's end
_REMINDER = 30.0  # seconds between two reports on jobs that wait
_CHANGES = 3.0  # seconds between two that differ
_RETRY = 0.05  # seconds between looks at a stream that takes nothing

Order = Callable[[str, Callable[[JobStatus, str], object]], Held]
"""Has a job started whose agent will show a token; returns what holds it."""


class RemoteAgent(Agent):
    """See the module. All methods within the loop.

    Attributes:
        status: what the manager last said of its job.
        settled: to be set when it is ready, or has failed.
        on_ending: called when it was asked to end, and starts no more processes.
        kept: whether it stays when its last process has ended.
        on_ready: called with its place, the gateway of that, and what asks it for a stream.
        on_gone: called when it has ended, or failed.
    """

    elsewhere = True

    def __init__(self, loop: Loop, kind: str) -> None:
        super().__init__(loop, f"the {kind}")
        self._kind = kind
        self.status = JobStatus(JobState.PENDING)
        self.kept = False
        self.settled: Event | None = None
        self.on_ending: Callable[[], object] = lambda: None
        self.on_ready: Callable[..., object] = lambda *facts: None
        self.on_gone: Callable[[], object] = lambda: None
        self._held: Held | None = None
        self._endpoint: Endpoint | None = None
        self._token = ""
        self._heard = 0.0
        self._lost_at: float | None = None
        self._served = False  # it was ready once
        self._deadline: Timer | None = None
        self._beat: Timer | None = None
        self._closing = False
        self._leaves = False  # by itself: what its manager says of that is worth telling
        self._last: Frame | None = None  # the end of its process, to be told after that
        self._outlets = {1: _Outlet(loop, 0), 2: _Outlet(loop, 1)}

    def begin(self, order: Order, endpoint: Endpoint, preparation: Mapping[str, Any]) -> None:
        """Have its job started; it will connect to `endpoint`, and be told `preparation`."""
        self._endpoint = endpoint
        self._token = os.urandom(16).hex()
        data = pickle.dumps(preparation)
        endpoint.expect(self._token, lambda link, hello: self._arrived(link, hello, data))
        if config.queue_timeout is not None:
            self._fail_in(config.queue_timeout, "waited too long in the queue (queue_timeout)")
        self._held = order(self._token, self._job_changed)

    def _fail_in(self, seconds: float, reason: str) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

        def fail() -> None:
            why = self.status.message or self.status.reason
            self._fail(f"{reason}, {seconds:g} seconds{': ' + why if why else ''}")

        self._deadline = self._loop.call_later(seconds, fail)

    def _arrived(self, link: Link, hello: dict[str, Any], preparation: bytes) -> None:
        self._link = link
        self.place = hello["place"]
        link.on_frame, link.on_lost = self._on_frame, self._on_lost
        link.post(PREPARE, preparation)
        self._heard = monotonic()
        self._beat = self._loop.call_later(BEAT, self._beats)

    def _beats(self) -> None:
        """Give a sign of life, and see whether there was one."""
        assert self._link is not None
        if self._link.lost or self.error is not None:
            return
        if not self.ready.is_set:
            self._heard = monotonic()  # to load the program may take long, and has its own limit
        if monotonic() - self._heard > SILENCE:
            self._link.drain()  # we may have been the ones who slept
        if monotonic() - self._heard > SILENCE:
            self.status = self.status._replace(state=JobState.ENDED, reason="NodeLost")
            self._fail(f"has given no sign of life for {SILENCE:g} seconds: its node is lost")
            return
        self._link.post(PING, b"")
        self._beat = self._loop.call_later(BEAT, self._beats)

    def _job_changed(self, status: JobStatus, job: str) -> None:
        self._named(job)
        before, self.status = self.status, status
        if self.error is not None:
            return
        if status.state is JobState.ENDED:
            if self._link is not None and not self._link.lost:
                self._link.drain()  # the last that its processes had to say
            if self._link is None or self._link.lost or self._lost_at is not None:
                self._explain()
            else:
                self._loop.call_later(1.0, self._explain)
        elif status.state is JobState.RUNNING and before.state is JobState.PENDING:
            if not self.ready.is_set:
                self._fail_in(config.start_timeout, "was not ready in time (start_timeout)")
        elif status.state is JobState.PENDING and status.reason:
            self._report(status)

    def _named(self, job: str) -> None:
        """Its manager calls it so now: Slurm gives a step its number when it begins."""
        if job:
            self.where = self.name = f"{self._kind} {job}"

    def _report(self, status: JobStatus) -> None:
        """Tell people what a job waits for, when that is new and now and then.

        Many wait for the same, and each is told how many they are: one report is enough.
        """
        text, when = _reports.get(status.reason, ("", -_REMINDER))
        report = status.message or status.reason
        if monotonic() - when > (_REMINDER if report == text else _CHANGES):
            _reports[status.reason] = (report, monotonic())
            log(WARNING if status.reason not in ("Pulling", "Creating") else INFO, "%s", report)

    def _on_frame(self, frame: Frame) -> None:
        self._heard = monotonic()
        if frame.kind == PING:
            return
        if frame.kind == OUTPUT:
            fd, data = pickle.loads(frame.body)
            self._outlets[fd].write(data)
            return
        if frame.kind == EXITED and self.ending:
            child = self._excuse(*pickle.loads(frame.body)[:2])
            if child is not None and not self.kept:  # nothing is left of it but to be told why
                self._last, self._leaves = frame, True
                return
        super()._on_frame(frame)
        if frame.kind == ENDING:
            self.on_ending()
        elif frame.kind == EXITED and not self.kept and not self._children:
            self.dismiss()

    def _excuse(self, key: int, code: int) -> Child | None:
        """A process has ended while its job is being ended: return it if that was not its doing.

        Slurm sends SIGTERM to every process of a step.
        """
        child = self._children.get(key)
        if child is None or code != -signal.SIGTERM or child.pid in self.told:
            return None
        child.blameless = True
        return child

    def _on_ready(self, facts: dict[str, Any]) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        if self._held is not None:
            self._named(self._held.name())  # its processes may end before its status is told
        self.on_ready(self.place, facts["gateway"], self.dial)
        if facts["report"] and facts["error"] is None:  # an error has it at its end
            _warn_once(facts["report"])
        super()._on_ready(facts)
        self._served = self.error is None
        if self.settled is not None:
            self.settled.set()

    def _on_lost(self) -> None:
        """Its link is gone: what the manager says of its job is the reason."""
        self._lost_at = monotonic()
        if self.status.state is JobState.ENDED:
            self._explain()
        else:
            if self._held is not None:
                self._held.ask()
            self._loop.call_later(_DIAGNOSIS, self._explain)

    def _explain(self) -> None:
        if self.error is not None:
            return
        status = self.status
        if status.reason == REFUSED:
            self._fail(f"cannot be started: {status.message}")
            return
        phase = "" if self.ready.is_set else " before it was ready"
        if status.state is not JobState.ENDED:
            self._fail(f"closed its connection{phase}, and nobody knows why")
            return
        words = status.message.removeprefix("The ")
        if not phase and words.startswith(f"{self.name} "):  # it names the job, as we do
            self._fail(words.removeprefix(f"{self.name} "))
            return
        parts = [status.message or status.reason]
        if not any(parts) and status.exit_code is not None:
            parts = [f"exit code {status.exit_code}"]
        node = f" on node {status.node}" if status.node else ""
        reason = ": ".join(filter(None, [f"{node} ended{phase}".strip(), *parts]))
        self._fail(reason)

    @property
    def blameless(self) -> bool:
        """Whether its end had nothing to do with what it did.

        Of what a job did itself the manager hears at once; where it knows nothing, as of a node
        that was switched off, that was not the job.
        """
        vanished = self._served and self._lost_at is not None
        unknown = vanished and self.status.state is not JobState.ENDED
        return self.status.reason in BLAMELESS or unknown

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes."""
        for child in list(self._children.values()):
            child.signal(number)

    def dial(self, token: str, path: str) -> None:
        """Have it bring a stream to a socket of its place: somebody will show `token`."""
        self._post(DIAL, (token, path))

    def _fail(self, error: str) -> None:
        told = self._leaves or (self._children and self.ready.is_set)
        if self.error is None and told and not self._closing:
            log(WARNING, "%s %s", self.name, error)
        if self._last is not None:
            super()._on_frame(self._last)
        if self._endpoint is not None:
            self._endpoint.forget(self._token)
        for timer in (self._deadline, self._beat):
            if timer is not None:
                timer.cancel()
        super()._fail(error)
        if self.settled is not None:
            self.settled.set()
        self.on_gone()
        held, self._held = self._held, None
        if held is not None:
            held.end()

    def dismiss(self) -> None:
        """Let it end, for nobody needs it.

        One that was asked to end by others, by its manager perhaps, is doing so: it is not
        forgotten before it is known why.
        """
        if self.ending and self._link is not None and not self._link.lost:
            self._leaves = True
        else:
            self.close()

    def close(self) -> None:
        self._closing = True
        super().close()

    def collect(self) -> None:
        """Its job is collected with all others, by who keeps them."""


_reports: dict[str, tuple[str, float]] = {}
"""By the reason for which jobs wait: what was last said of it, and when."""

_told: set[str] = set()


def _warn_once(report: str) -> None:
    """Log what is the same for all jobs of an image once."""
    if report not in _told:
        _told.add(report)
        log(WARNING, "%s", report)


class _Outlet:
    """One of this process's standard streams, for what others print; it never blocks the loop."""

    def __init__(self, loop: Loop, place: int) -> None:
        self._loop = loop
        self._place = place
        self._pending: deque[bytes] = deque()
        self._waits = False

    def write(self, data: bytes) -> None:
        """Write it after what is pending."""
        self._pending.append(data)
        if not self._waits:
            self._pass_on()

    def _pass_on(self) -> None:
        self._waits = False
        fd = standard_streams()[self._place]
        takes = select.poll()
        takes.register(fd, select.POLLOUT)
        while self._pending:
            if not takes.poll(0):
                self._waits = True
                self._loop.call_later(_RETRY, self._pass_on)
                return
            piece = self._pending.popleft()
            try:
                count = os.write(fd, piece[:4096])  # PIPE_BUF: what a writable pipe takes at once
            except OSError:
                continue  # nobody reads it any more
            if count < len(piece):
                self._pending.appendleft(piece[count:])
