"""The crew: the workers of a pool, from their start to their end.

    recruit ─► process starts ─► connects ─► initializer ─► up ─► frames ─► down
                                                             └────────┬───────┘
                                                                      ▼
                                                                    Foreman (`pool.master`)

A worker is down when its process has ended and all that it still sent has been read. The crew
starts another in its place as long as the foreman has work. When workers keep ending before they
are up, it takes its time while others work, and gives up if there are none. All of it runs within
the session's loop.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
from collections.abc import Callable, Container
from typing import Any, NamedTuple, Protocol

from fiber.config import config
from fiber.errors import PoolBroken
from fiber.pool import protocol
from fiber.pool.berths import Berths
from fiber.pool.marks import Marks
from fiber.pool.workerprocess import WorkerProcess
from fiber.process import Process, gpus_of, pickle_process
from fiber.resources import Resources, cpu_count
from fiber.runtime import main, session
from fiber.runtime.agents import Agent, Child
from fiber.runtime.limits import make_room
from fiber.runtime.link import Link
from fiber.runtime.logs import DEBUG, INFO, WARNING, log
from fiber.runtime.loop import Event, Timer
from fiber.wire import exceptions
from fiber.wire.framing import Frame
from fiber.wire.pickling import Packed, dumps, loads

__all__ = ["Crew", "Foreman", "Settings", "Worker"]

_AT_ONCE = 32  # workers that start on this machine at the same time, if not more processors can
_BOOT_FAILURES = 3  # workers in a row that ended before they were up, with none up: it is broken
_BOOT_KILLS = 10  # if the last was ended by SIGKILL, which may come from anywhere
_REST = 0.1  # seconds, at first, before yet another is started while others are up
_DOUBLINGS = 7  # of that
_TERMINATE_GRACE = 0.5  # seconds between SIGTERM and SIGKILL
_CLOSE_GRACE = 5.0  # seconds that a worker has to end after it closed its channel
_TAIL_LINES = 20


class Settings(NamedTuple):
    """What a pool was asked for.

    Attributes:
        processes: how many workers, at the most.
        least: how many at the least; as many, or fewer if the pool is elastic.
    """

    backend: str
    processes: int
    least: int
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]
    maxtasksperchild: int | None
    retries: int | None
    timeout: float | None


class Worker:
    """A worker.

    Attributes:
        id: its number.
        child: its process, as the agent has it.
        process: the same, as `active_children` shows it.
        link: to it, once it has connected.
        mark: the place of its mark, if it has one.
        latest: the last batch that it was sent.
        unmarked: the last before it was told to mark what it is at.
        up: whether it takes batches.
        stopping: whether it was asked to end.
    """

    def __init__(self, id: int, child: Child, process: Process) -> None:
        self.id = id
        self.child = child
        self.process = process
        self.link: Link | None = None
        self.mark: int | None = None
        self.latest = 0
        self.unmarked = 0
        self.up = False
        self.stopping = False
        self.knows: set[int] = set()
        """Calls whose functions it has."""
        self.item_timer: Timer | None = None
        """What ends it when its item takes too long."""
        self._timers: list[Timer] = []

    def post(self, kind: int, body: bytes, buffers: Any = ()) -> None:
        """Send it a frame, if it has connected."""
        if self.link is not None:
            self.link.post(kind, body, buffers)

    def kill(self) -> None:
        """End it now."""
        self.child.signal(signal.SIGKILL)

    def set_timer(self, timer: Timer) -> None:
        """Have `timer` cancelled when the worker is up, or ends."""
        self._timers.append(timer)

    def cancel_timers(self) -> None:
        """Cancel what was to happen to it."""
        for timer in self._timers:
            timer.cancel()
        self.cancel_item_timer()
        self._timers.clear()

    def cancel_item_timer(self) -> None:
        """Its item is done in time."""
        if self.item_timer is not None:
            self.item_timer.cancel()

    def describe_end(self) -> str:
        """Say how it ended."""
        child = self.child
        where = f" in {child.agent.where}" if child.agent.where else ""
        who = child.name if child.pid is None else f"{child.name} (process {child.pid}{where})"
        if child.error is None:
            return f"{who} {_describe_exit(child.exitcode)}"
        return f"{who} {child.error}" if child.error.startswith("was ") else f"{who}: {child.error}"

    def last_words(self) -> str:
        """Return what it last wrote to its standard error, as an addition to a message."""
        lines = _tell(self.child.stderr)
        if not lines:
            return ""
        return "\nThe last lines that it wrote:\n" + "\n".join(f"    {line}" for line in lines)


class Foreman(Protocol):
    """Who has work for a crew."""

    @property
    def has_work(self) -> bool:
        """Whether workers are needed."""

    def worker_up(self, worker: Worker) -> None:
        """A worker is ready."""

    def worker_sent(self, worker: Worker, frame: Frame) -> None:
        """A worker that is up sent a frame."""

    def worker_lost(self, worker: Worker) -> None:
        """A worker hung up, or was asked to end; it takes no more and will be down soon."""

    def worker_down(self, worker: Worker) -> None:
        """A worker that was up has ended, and all that it sent was told."""

    def crew_failed(self, error: BaseException) -> None:
        """There can be no workers; `error` says why."""


class Crew:
    """Keeps as many workers as its target says.

    Args:
        settings: of the pool.
        resources: of each worker.
        foreman: who has work for them.

    Attributes:
        workers: those whose processes have not ended, by number.
        target: how many there should be.
        died: how many ended without being asked to.
        gone: set when it was dismissed and the last worker has ended.

    Raises:
        StartError: no process can be started; the message says why.
        SerializationError: the initializer cannot be sent to the workers.
    """

    def __init__(self, settings: Settings, resources: Resources, foreman: Foreman) -> None:
        self.settings = settings
        self.workers: dict[int, Worker] = {}
        # One shows that there can be workers, before anything is asked of them.
        self.target = max(settings.least, 1)
        self.died = 0
        self.gone = Event()
        self._session = session.current()
        self._resources = resources
        self._foreman = foreman
        self._numbers = 0
        self._boot_failures = 0
        self._resting = False
        self._dismissed = False
        self._active = 0  # workers that were not asked to end
        self._coming: set[int] = set()  # workers here that have not connected
        self._at_once = _AT_ONCE
        if settings.processes > _AT_ONCE:
            self._at_once = max(_AT_ONCE, 4 * cpu_count())
        self._cpu = resources.cpu or config.cpu_per_job
        near = not self._session.agency.is_elsewhere(settings.backend)
        make_room(settings.processes, 1 if near else 2, 3 if near else 0)
        self._berths = Berths(
            self._session, settings.backend, resources, self.target, self._agent_ends
        )
        self._marks: Marks | None = None  # from the first death on
        self._initialization = Packed(b"", ())
        if settings.initializer is not None:
            pair = (settings.initializer, settings.initargs)
            self._initialization = dumps(pair, self.known_names)

    @property
    def known_names(self) -> Container[str] | None:
        """What `wire.pickling.dumps` has to know of the workers' main module."""
        return main.missing(self._berths.names)

    def recruit(self) -> None:
        """Start workers until there are enough.

        Those on this machine are started a few at a time: hundreds at once would but wait for the
        processors, and the first would be ready as late as the last.
        """
        while self._needs_more():
            self._start()

    def _needs_more(self) -> bool:
        if self._active >= self.target or len(self._coming) >= self._at_once:
            return False
        if self._dismissed and not self._foreman.has_work:
            return False
        return not (self._resting and self._some_are_up)

    @property
    def elsewhere(self) -> bool:
        """Whether the workers are apart from this process."""
        return self._berths.elsewhere

    @property
    def up(self) -> int:
        """How many workers take batches."""
        return sum(worker.up and not worker.stopping for worker in self.workers.values())

    @property
    def coming(self) -> bool:
        """Whether processes on this machine are just being started."""
        return bool(self._coming)

    def fitting(self, target: int) -> int:
        """Return how many workers fill the jobs that `target` of them take."""
        return self._berths.filled(target)

    def resize(self, target: int) -> None:
        """Have `target` workers; if there are more, it is for others to say who ends."""
        self.target = target
        self.recruit()

    def call_off(self, most: int) -> None:
        """Give up jobs elsewhere that have not begun, and `most` workers with them, as they fit."""
        crews: dict[Agent, list[Worker]] = {}
        for worker in self.workers.values():
            agent = worker.child.agent
            if agent.elsewhere and not agent.ready.is_set:
                crews.setdefault(agent, []).append(worker)
        for agent, workers in crews.items():
            if len(workers) <= most:
                most -= len(workers)
                self.target -= sum(not worker.stopping for worker in workers)
                for worker in workers:
                    self._write_off(worker)
                agent.close()

    def retire(self, worker: Worker) -> None:
        """Ask it to end when it has done what it has."""
        self._write_off(worker)
        worker.post(protocol.STOP, b"")

    def _write_off(self, worker: Worker) -> None:
        """It is to end, and another may take its place."""
        if not worker.stopping:
            worker.stopping = True
            self._active -= 1

    @property
    def _some_are_up(self) -> bool:
        return any(worker.up and not worker.stopping for worker in self.workers.values())

    def _boots_fail(self, last: Worker) -> None:
        """Workers keep ending before they are up: take time if others are, or else give up."""
        failures = self._boot_failures
        why = (
            f"{failures} workers in a row ended before they were ready; the last: "
            f"{last.describe_end()}{last.last_words()}"
        )
        killed = last.child.exitcode == -signal.SIGKILL and last.child.pid is not None
        if self._some_are_up:
            if not self._resting:
                self._resting = True
                seconds = _REST * 2 ** min(failures - _BOOT_FAILURES, _DOUBLINGS)
                log(WARNING, "%s\nThe next one is started in %.1f seconds.", why, seconds)
                self._session.loop.call_later(seconds, self._go_on)
        elif failures >= (_BOOT_KILLS if killed else _BOOT_FAILURES):
            self._boot_failures = 0
            self._foreman.crew_failed(PoolBroken(why))

    def _go_on(self) -> None:
        self._resting = False
        self.recruit()

    def _start(self) -> None:
        self._numbers += 1
        number, token = self._numbers, os.urandom(16).hex()
        endpoint = self._session.endpoint
        agent = self._berths.take()
        process = WorkerProcess(number, endpoint.address, token)
        child = self._session.agency.spawn(
            agent,
            process.name,
            pickle_process(process, self, self._berths.names),
            cpu=self._cpu,
            extra_environment={} if agent.elsewhere else gpus_of(self._resources),
            capture_stderr=True,
            ignore_interrupt=True,
        )
        worker = self.workers[number] = Worker(number, child, process)
        self._active += 1
        if not agent.elsewhere:
            self._coming.add(number)
        endpoint.expect(token, lambda link, hello: self._arrived(worker, link))

        def ended() -> None:
            endpoint.forget(token)
            process.release()
            self._ended(worker)

        if child.ended.is_set:
            ended()
            return
        child.on_ended = ended
        process.adopt(child)
        if not agent.elsewhere:  # where a job may wait in a queue, its agent has a limit of its own
            self._limit_start(worker)

    def _limit_start(self, worker: Worker) -> None:
        late = self._session.loop.call_later(config.start_timeout, lambda: self._too_late(worker))
        worker.set_timer(late)

    def _agent_ends(self, agent: Agent) -> None:
        """A job elsewhere is being ended: its workers finish what they have, others take over."""
        for worker in list(self.workers.values()):
            if worker.child.agent is agent and not worker.stopping:
                self._foreman.worker_lost(worker)  # what came after STOP would not be read
                self.retire(worker)
        self.recruit()

    def _too_late(self, worker: Worker) -> None:
        if worker.link is None:
            log(WARNING, "%s did not connect in time and is ended", worker.child.name)
            worker.kill()

    def _arrived(self, worker: Worker, link: Link) -> None:
        worker.link = link
        link.on_frame = lambda frame: self._on_frame(worker, frame)
        link.on_lost = lambda: self._on_lost(worker)
        self._give_mark(worker)
        worker.post(protocol.INITIALIZE, *self._initialization[:2])
        if worker.stopping:
            worker.post(protocol.STOP, b"")
        self._coming.discard(worker.id)
        self.recruit()

    def _have_marks(self) -> None:
        """From now on, have the workers mark what they are at."""
        if self._marks is None:
            try:
                self._marks = Marks(self._session.folder)
            except OSError as error:
                log(DEBUG, "workers cannot mark what they are at: %s", error)
            for worker in self.workers.values():
                self._give_mark(worker)

    def _give_mark(self, worker: Worker) -> None:
        near = not worker.child.agent.elsewhere
        if self._marks is not None and worker.link is not None and near:
            worker.mark = self._marks.take()
            if worker.mark is not None:
                worker.unmarked = worker.latest
                worker.post(protocol.MARKS, pickle.dumps((self._marks.path, worker.mark)))

    def _take_mark(self, worker: Worker) -> None:
        if self._marks is not None and worker.mark is not None:
            self._marks.give_back(worker.mark)
            worker.mark = None

    def is_innocent(self, worker: Worker, batch: int) -> bool:
        """Whether a worker that has died is known not to have been at an item of this batch.

        Or whether its job was taken away, be it in the midst of an item: that is not to blame.
        """
        if worker.child.blameless:
            return True
        if self._marks is None or worker.mark is None:
            return False
        mark = self._marks.read(worker.mark)
        # Who has not even read that it shall mark has begun nothing that was sent after that.
        return mark != batch if mark else batch > worker.unmarked

    def was_at(self, worker: Worker, batch: int) -> bool:
        """Whether a worker that has died is known to have been at an item of this batch."""
        known = self._marks is not None and worker.mark is not None
        return known and self._marks.read(worker.mark) == batch  # type: ignore[union-attr,arg-type]

    def _on_frame(self, worker: Worker, frame: Frame) -> None:
        if frame.kind == protocol.UP:
            log(DEBUG, "%s is up", worker.child.name)
            if worker.stopping:  # it was told to end while it started
                return
            worker.cancel_timers()
            worker.up = True
            self._boot_failures = 0
            self._foreman.worker_up(worker)
        elif frame.kind == protocol.INITIALIZER_FAILED:
            self._write_off(worker)
            self._foreman.crew_failed(exceptions.decode(loads(frame.body)))
        elif frame.kind == protocol.UNMARKED:
            self._take_mark(worker)
        else:
            self._foreman.worker_sent(worker, frame)

    def _on_lost(self, worker: Worker) -> None:
        """It hung up; its end will be told, unless only its channel is gone."""
        self._foreman.worker_lost(worker)
        worker.set_timer(self._session.loop.call_later(_CLOSE_GRACE, worker.kill))

    def _ended(self, worker: Worker) -> None:
        """Its process is gone: read what it still sent, then it is down."""
        if worker.link is not None:
            worker.link.drain()
            worker.link.close()
        worker.cancel_timers()
        if not worker.stopping:
            self.died += 1
            log(INFO, "%s", worker.describe_end())
            if worker.up:
                self._boot_failures = 0
            elif not worker.child.blameless:
                self._boot_failures += 1
        if worker.up:
            worker.up = False
            if not worker.stopping:
                self._have_marks()
            self._foreman.worker_down(worker)
        self._take_mark(worker)
        del self.workers[worker.id]
        self._coming.discard(worker.id)
        if not worker.stopping:
            self._active -= 1
        agent = worker.child.agent
        self._berths.leave(agent)
        if agent.ending and not worker.stopping and not agent.elsewhere:
            self._foreman.crew_failed(
                PoolBroken(f"{worker.describe_end()}; their agent was asked to end by SIGTERM")
            )
        if self._boot_failures >= _BOOT_FAILURES and not worker.stopping:
            self._boots_fail(worker)
        self.recruit()
        self._berths.trim()
        self._tell_if_gone()

    def dismiss(self) -> None:
        """Let the workers end when there is no more work; call it again when that changes."""
        self._dismissed = True
        if not self._foreman.has_work:
            for worker in list(self.workers.values()):
                if not worker.stopping:
                    self.retire(worker)
                    self._call_off(worker)
        self._tell_if_gone()

    def terminate(self) -> None:
        """End all workers now."""
        self._dismissed = True
        for worker in list(self.workers.values()):
            self._write_off(worker)
            self._call_off(worker)
            if not worker.child.ended.is_set:
                worker.child.signal(signal.SIGTERM)
                worker.set_timer(self._session.loop.call_later(_TERMINATE_GRACE, worker.kill))
        self._tell_if_gone()

    def _call_off(self, worker: Worker) -> None:
        """End a worker whose job has not begun: it may wait for long, and hears nothing."""
        agent = worker.child.agent
        if agent.elsewhere and not agent.ready.is_set:
            agent.close()

    def _tell_if_gone(self) -> None:
        if self._dismissed and not self.workers:
            self.gone.set()
            self._berths.close()
            if self._marks is not None:
                self._marks.close()
                self._marks = None


_FRAME = re.compile(r'  File ".*/(fiber/(pool|runtime|process)|multiprocessing/process).*", line')


def _tell(stderr: str) -> list[str]:
    """Return the last lines of a dead worker, without those that are of no use to its user."""
    lines: list[str] = []
    times, ours = 1, False
    for line in stderr.splitlines():
        if _FRAME.match(line) or line.startswith(('  File "<', "Extension modules:")):
            ours = True
            continue
        if ours and line.startswith("    "):  # the source of such a line
            continue
        ours = False
        if lines and line == lines[-1]:
            times += 1
            continue
        if times > 1:
            lines.append(f"  [{times - 1} more of these]")
            times = 1
        lines.append(line)
    if times > 1:
        lines.append(f"  [{times - 1} more of these]")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines[-_TAIL_LINES:]


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None:
        return "ended, nobody knows how"
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        return f"was ended by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was ended by signal {-exitcode}"
