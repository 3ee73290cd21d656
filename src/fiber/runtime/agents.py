"""The parent's side of an agent: starts processes through it and hears how they end.

    Agent.spawn ─► SPAWN ─► the agent forks ─► STARTED ─► Child.started
                                           └─► EXITED ──► Child.ended, exitcode, stderr

An agent is either a job that this process submitted, or, in a process that was itself forked by an
agent, that very agent, reached by the socket that both inherited.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiber.backends.base import Backend, Job, JobSpec, JobState
from fiber.errors import StartError
from fiber.runtime.link import Link
from fiber.runtime.logs import DEBUG, WARNING, log
from fiber.runtime.loop import Event, Loop, Timer
from fiber.wire.channel import Channel
from fiber.wire.framing import Frame

if TYPE_CHECKING:
    from fiber.runtime.endpoint import Endpoint

__all__ = [
    "BYE",
    "DIAL",
    "ENDING",
    "EXITED",
    "FAILED",
    "HEED",
    "OUTPUT",
    "PING",
    "PREPARE",
    "READY",
    "SIGNAL",
    "SPAWN",
    "STARTED",
    "TOLD",
    "Agent",
    "Child",
]

PREPARE, SPAWN, SIGNAL, BYE, READY, STARTED, FAILED, EXITED, ENDING, TOLD = range(2, 12)
"""Kinds of frames between a parent (the first four) and an agent (the others)."""

OUTPUT, PING, DIAL = range(12, 15)
"""More of them for an agent that is elsewhere: what a process printed, a sign of life (both ways),
and the parent's wish for a stream to a socket there."""

HEED = 15
"""From a process that the agent forked: it takes part in the session, and wants to be TOLD."""

_LOOK_AGAIN = 0.05  # seconds between looks at a job whose agent has not connected yet


class Child:
    """A process that was started through an agent.

    Attributes:
        name: of the process, for messages.
        pid: its real process ID, once it has started.
        exitcode: None while it runs; negative for a signal, as in multiprocessing.
        stderr: the last lines of its standard error, if they were captured, once it has ended.
        error: why it did not start, or what ended it with its agent.
        blameless: whether its end had nothing to do with what it did.
        started, ended: set when it has, or never will.
        on_ended: called within the loop when it has ended.
        handed: objects of our home that it was given when it was started.
    """

    def __init__(self, agent: Agent, key: int, name: str) -> None:
        self.agent = agent
        self.key = key
        self.name = name
        self.pid: int | None = None
        self.exitcode: int | None = None
        self.stderr = ""
        self.error: str | None = None
        self.blameless = False
        self.started = Event()
        self.ended = Event()
        self.on_ended: Callable[[], object] | None = None
        self.handed: set[int] = set()

    def signal(self, signum: int) -> None:
        """Send it a signal, through its agent; nothing happens if it has ended."""
        if not self.ended.is_set:
            if self.pid is not None:
                self.agent.told.add(self.pid)
            self.agent._post(SIGNAL, (self.key, signum))

    def _end(self, exitcode: int | None, stderr: str = "", error: str | None = None) -> None:
        if self.ended.is_set:
            return
        log(DEBUG, "process %s has ended: exit code %s %s", self.name, exitcode, error or "")
        self.exitcode, self.stderr, self.error = exitcode, stderr, error
        self.started.set()
        self.ended.set()
        on_ended, self.on_ended = self.on_ended, None
        if on_ended is not None:
            on_ended()


class Agent:
    """A link to an agent. All methods within the loop, save `names`.

    What runs elsewhere is a `RemoteAgent` (see `runtime.remote`).

    Attributes:
        ready: set when processes can be started, or the agent has failed.
        error: why it failed.
        ending: it was asked to end, by SIGTERM, and starts no more processes.
        names: what the main module has that it loaded.
        place: the folder of its processes' sockets, "" until it is known.
        settings: what is configured otherwise in its processes.
        where: the container or pod that it runs in, for messages; "" if it is on this machine.
        on_exited: called with each process that has ended, and its exit code, before its `ended`
            is set.
    """

    elsewhere = False

    def __init__(self, loop: Loop, name: str, place: str = "") -> None:
        self.name = name
        self.place = place
        self.where = ""
        self.settings: dict[str, Any] = {}
        self.ready = Event()
        self.error: str | None = None
        self.ending = False
        self.names: frozenset[str] = frozenset()
        self.job: Job | None = None
        self.backend: Backend | None = None
        self._loop = loop
        self._link: Link | None = None
        self._children: dict[int, Child] = {}
        self.on_exited: Callable[[Child, int | None], object] | None = None
        self.told: set[int] = set()  # processes that were sent a signal, and so may well end
        self._early: list[tuple[int, object, Any]] = []  # posts from before it was ready
        self._keys = 0
        self._timer: Timer | None = None

    @classmethod
    def inherited(cls, loop: Loop, channel: Channel, names: frozenset[str], place: str) -> Agent:
        """Return the link to the agent that forked this process."""
        agent = cls(loop, "the agent", place)
        agent._link = Link(loop, channel, agent._on_frame, agent._on_lost)
        agent._link.post(HEED, b"")
        agent.names = names
        agent.ready.set()
        return agent

    @classmethod
    def failed(cls, loop: Loop, error: str) -> Agent:
        """Return an agent that cannot start anything, for the reason given."""
        agent = cls(loop, "no agent")
        agent.error = error
        agent.ready.set()
        return agent

    def submit(
        self,
        backend: Backend,
        spec: JobSpec,
        endpoint: Endpoint,
        preparation: Mapping[str, Any],
        timeout: float,
    ) -> None:
        """Submit the job in which the agent runs; it will connect to `endpoint`."""
        token = os.urandom(16).hex()
        environment = {**spec.environment, "FIBER_INTERNAL_TOKEN": token}
        self.backend = backend
        deadline = monotonic() + timeout

        def arrived(link: Link, hello: dict[str, Any]) -> None:
            self._link = link
            link.on_frame, link.on_lost = self._on_frame, self._on_lost
            link.post(PREPARE, pickle.dumps(preparation))

        def look() -> None:
            """See whether the job ended, or time ran out, before the agent was ready."""
            assert self.job is not None
            (status,) = backend.status([self.job])
            if status.state is JobState.ENDED:
                phase = "before it connected" if self._link is None else "while it loaded __main__"
                detail = " ".join(filter(None, [status.reason, status.message]))
                code = status.exit_code if status.exit_code is not None else "unknown"
                self._fail(f"ended {phase}, exit code {code}{': ' + detail if detail else ''}")
            elif monotonic() > deadline:
                backend.kill([self.job])
                self._fail(f"was not ready after {timeout:g} seconds (start_timeout)")
            else:
                self._timer = self._loop.call_later(_LOOK_AGAIN, look)
                return
            endpoint.forget(token)

        endpoint.expect(token, arrived)
        try:
            self.job = backend.submit([spec._replace(environment=environment)])[0]
        except StartError as error:
            endpoint.forget(token)
            self._fail(str(error))
            return
        self._timer = self._loop.call_later(_LOOK_AGAIN, look)

    @property
    def usable(self) -> bool:
        """Whether processes can be started through it, now or soon."""
        return self.error is None and not self.ending

    @property
    def takes_fds(self) -> bool:
        """Whether file descriptors can go along with a process: whether it is on this machine."""
        return not self.elsewhere

    @property
    def busy(self) -> int:
        """How many of its processes have not ended."""
        return len(self._children)

    def spawn(self, name: str, request: Mapping[str, Any], fds: Any = ()) -> Child:
        """Have a process started, as soon as the agent is ready."""
        self._keys += 1
        child = Child(self, self._keys, name)
        if self.error is not None:
            child._end(None, error=self.error)
        else:
            self._children[child.key] = child
            self._post(SPAWN, (child.key, {**request, "name": name, "fds": len(fds)}), fds)
        return child

    def was_told_to_end(self, pid: int) -> bool:
        """Whether the process, one of its, was sent a signal by us or by another of the session."""
        return pid in self.told

    def _post(self, kind: int, body: object, fds: Any = ()) -> None:
        if not self.ready.is_set:
            self._early.append((kind, body, fds))
        elif self._link is not None:
            self._link.post(kind, pickle.dumps(body), (), fds)

    def _on_frame(self, frame: Frame) -> None:
        body = pickle.loads(frame.body)
        if frame.kind == READY:
            self._on_ready(body)
            return
        if frame.kind == ENDING:
            self.ending = True
            return
        key, *facts = body
        if frame.kind == TOLD:
            self.told.add(facts[0])
            return
        child = self._children.get(key)
        if child is None:
            return
        if frame.kind == STARTED:
            (child.pid,) = facts
            log(DEBUG, "process %s has started: process ID %d", child.name, child.pid)
            child.started.set()
        elif frame.kind == FAILED:
            del self._children[key]
            child._end(None, error=facts[0])
        elif frame.kind == EXITED:
            if self.on_exited is not None and child.pid is not None:
                self.on_exited(child, facts[0])
            del self._children[key]
            if facts[2] is not None:  # nobody would know from the exit code
                who = f"{child.name} (process {child.pid} in {self.where})"
                log(WARNING, "%s %s", who, facts[2])
            child._end(*facts)

    def _on_ready(self, facts: dict[str, Any]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.names, error = facts["names"], facts["error"]
        if error is not None:
            self._fail(f"could not load the program's main module:\n{error}")
            return
        log(DEBUG, "%s is ready, with %d names of __main__", self.name, len(self.names))
        self.ready.set()
        early, self._early = self._early, []
        for post in early:
            self._post(*post)

    @property
    def blameless(self) -> bool:
        """Whether its end had nothing to do with what it did."""
        return False

    def _on_lost(self) -> None:
        if not self.ready.is_set:
            return  # its job will tell why: see `look` in `submit`
        self._fail("ended unexpectedly")

    def _reap(self) -> None:
        """Collect the job as soon as it has ended, so that nobody sees a zombie."""
        if self.job is None or self.backend is None:
            return
        if self._job_state() is not JobState.ENDED:
            self._loop.call_later(_LOOK_AGAIN, self._reap)

    def _job_state(self) -> JobState:
        assert self.job is not None
        assert self.backend is not None
        return self.backend.status([self.job])[0].state

    def _fail(self, error: str) -> None:
        """It is gone, and with it all that it started."""
        if self._timer is not None:
            self._timer.cancel()
        if self.error is not None:
            return
        self.error = f"{self.name} {error}"
        log(DEBUG, "%s", self.error)
        if self._link is not None:
            # Told, the agent need not find out whether this process is gone.
            self._link.post(BYE, b"")
            self._link.flush()
            self._link.close()
        self.ready.set()
        self._early.clear()
        if not self._loop.closed:
            self._reap()
        children, self._children = self._children, {}
        for child in children.values():
            child.blameless = self.blameless
            child._end(-9, error=self.error)

    def close(self) -> None:
        """Let it end with all that it started; kill it if it is not ready: it has nothing yet."""
        starting = not self.ready.is_set
        self._fail("was closed")
        if starting and self.job is not None and self.backend is not None:
            self.backend.kill([self.job])

    def collect(self) -> None:
        """Wait, outside the loop, until its job has ended; kill it if that takes too long."""
        if self.job is None or self.backend is None:
            return
        deadline = monotonic() + 3
        pause = 0.001
        while self._job_state() is not JobState.ENDED:
            if monotonic() > deadline:
                self.backend.kill([self.job])
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.02)


_null: list[int] = []


def standard_streams() -> list[int]:
    """Return the descriptors of this process's standard output and error, as a child shall use."""
    return [fd if _is_open(fd) else _null_device() for fd in (1, 2)]


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _null_device() -> int:
    """Return a descriptor for what a closed stream is replaced with; opened once."""
    if not _null:
        _null.append(os.open(os.devnull, os.O_WRONLY))
    return _null[0]
