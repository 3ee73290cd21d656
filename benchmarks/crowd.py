"""A backend whose workers are simulated: thousands of them in a few processes.

    master ─ SPAWN, SIGNAL ─► agent ─ orders ─► holders, each with a share of the workers
           ◄─ STARTED, EXITED ─┘    ◄─ ended ──┘
           ◄───── the pool's protocol, a connection for each worker ─────► holders

To the master it is a backend like others, named by an entry point (see `simulation`): its job is
an agent that says of every worker that it has forked it. A worker connects, proves itself and
answers batches as `fiber.pool.worker` does, but runs nothing: an item that is a float is a task
that takes so many seconds, any other takes none. As a real one it gives back what waits behind a
long task, and reports on its way.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import pickle
import resource
import select
import signal
import sys
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate, count
from multiprocessing import get_context
from multiprocessing.connection import Connection

from fiber.backends.base import Job, JobSpec
from fiber.backends.local import LocalBackend
from fiber.pool import protocol
from fiber.runtime import folders
from fiber.runtime.agents import BYE, EXITED, READY, SIGNAL, SPAWN, STARTED
from fiber.runtime.endpoint import HELLO
from fiber.wire.channel import Channel, connect
from fiber.wire.framing import Frame
from fiber.wire.pickling import loads

HOLDERS = 4
PATIENCE = 60.0  # seconds to connect: thousands do at the same time
FIRST_PID = 1 << 23  # of those that are none; the system's end before it
LONGEST_PAUSE = 1.0  # seconds between two reports of a worker on a long batch


class CrowdBackend(LocalBackend):
    """Starts the crowd where the local backend would start its agent."""

    name = "crowd"

    def submit(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Start a crowd for each spec."""
        command = [sys.executable, "-m", "benchmarks.crowd"]
        return super().submit([spec._replace(command=command) for spec in specs])


def raise_limit() -> int:
    """Let this process open as many files as it may; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


# The agent --------------------------------------------------------------------------------------


def main() -> None:
    """Run the agent; the environment says for whom."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_limit()
    address, token, folder = (
        os.environ.pop(f"FIBER_INTERNAL_{name}") for name in ("ADDRESS", "TOKEN", "SESSION")
    )
    with open(os.path.join(folder, folders.SECRET_FILE), "rb") as file:
        secret = file.read()
    lines: list[Connection] = []
    processes = []
    context = get_context("fork")
    for _ in range(HOLDERS):
        ours, theirs = context.Pipe()
        held = [*lines, ours]  # what a holder shall not keep open: it ends with the agent
        process = context.Process(target=hold, args=(theirs, secret, held), daemon=True)
        process.start()
        theirs.close()
        lines.append(ours)
        processes.append(process)
    channel = connect(address, secret, PATIENCE)
    channel.send(HELLO, pickle.dumps({"token": token, "pid": os.getpid()}))
    with contextlib.suppress(EOFError, ConnectionError):
        serve(channel, lines)
    for process in processes:
        process.kill()


def serve(channel: Channel, lines: list[Connection]) -> None:
    """Answer the master until it is gone."""
    while not channel.read():
        pass  # PREPARE: there is no program to load
    channel.takes_fds = True
    channel.send(READY, pickle.dumps({"names": frozenset(), "error": None}))
    alive: set[int] = set()
    poll = select.poll()
    for fd in (channel.fileno(), *(line.fileno() for line in lines)):
        poll.register(fd, select.POLLIN)
    by_fd = {line.fileno(): line for line in lines}
    while True:
        for fd, _ in poll.poll():
            if fd in by_fd:
                key = by_fd[fd].recv()
                if key in alive:
                    alive.discard(key)
                    channel.post(EXITED, pickle.dumps((key, 0, "", None)))
                continue
            for frame in channel.read():
                if frame.kind == BYE:
                    return
                key, fact = pickle.loads(frame.body)
                line = lines[key % len(lines)]
                if frame.kind == SPAWN:
                    for number in channel.take_fds(fact["fds"]):
                        os.close(number)  # where it would print
                    process = loads(*pickle.loads(fact["process"]))
                    line.send((key, process._address, process._token))
                    alive.add(key)
                    channel.post(STARTED, pickle.dumps((key, FIRST_PID + key)))
                elif frame.kind == SIGNAL and key in alive:
                    alive.discard(key)
                    line.send((key, None, None))
                    channel.post(EXITED, pickle.dumps((key, -fact, "", None)))
        channel.flush()


# The holders ------------------------------------------------------------------------------------


class Batch:
    """A batch that a worker has."""

    def __init__(self, frame: Frame) -> None:
        head = protocol.BatchHead._make(protocol.BATCH_HEAD.unpack_from(frame.body))
        data = memoryview(frame.body)[protocol.BATCH_HEAD.size + head.function_size :]
        items = loads(data, frame.buffers[head.function_buffers :])
        self.id = head.batch
        self.overtime = head.hold / 1000
        self.lengths = [item if type(item) is float else 0.0 for item in items]
        self.ends: list[float] = []  # when each item will be done
        self.sent = 0
        self.began = 0.0
        self.slow = False  # that it takes long was said

    def begin(self, now: float) -> None:
        self.began = now
        self.ends = [now + end for end in accumulate(self.lengths)]


class Worker:
    """A simulated worker."""

    def __init__(self, key: int, channel: Channel) -> None:
        self.key = key
        self.channel = channel
        self.batch: Batch | None = None
        self.waiting: deque[Batch] = deque()

    def report(self, batch: int, done: int, returned: int, seconds: float) -> None:
        errors: dict[int, object] = {}
        body = (batch, returned, seconds, [None] * done, None, None, errors)
        self.channel.send(protocol.RESULTS, pickle.dumps(body, 5))


class Holder:
    """Holds the connections of its workers, in one thread; timers say what happens when."""

    def __init__(self, line: Connection, secret: bytes) -> None:
        self._line = line
        self._secret = secret
        self._workers: dict[int, Worker] = {}  # by descriptor
        self._descriptors: dict[int, int] = {}  # of a key
        self._timers: list[tuple[float, int, Worker, Batch, float]] = []
        self._numbers = count()
        self._poll = select.epoll()
        self._poll.register(line.fileno(), select.EPOLLIN)

    def run(self) -> None:
        while True:
            timeout = None
            if self._timers:
                timeout = max(0.0, self._timers[0][0] - time.monotonic())
            for fd, _ in self._poll.poll(timeout):
                if fd == self._line.fileno():
                    self._order(*self._line.recv())
                elif fd in self._workers:
                    self._read(self._workers[fd])
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                _, _, worker, batch, pause = heapq.heappop(self._timers)
                if worker.batch is batch:
                    self._look(worker, batch, now, pause)

    def _order(self, key: int, address: str | None, token: str | None) -> None:
        if address is None:
            self._drop(key)
            return
        channel = connect(address, self._secret, PATIENCE)
        channel.send(HELLO, pickle.dumps({"token": token}))
        fd = channel.fileno()
        self._workers[fd] = Worker(key, channel)
        self._descriptors[key] = fd
        self._poll.register(fd, select.EPOLLIN)

    def _drop(self, key: int) -> None:
        fd = self._descriptors.pop(key, None)
        if fd is not None:
            worker = self._workers.pop(fd)
            worker.batch = None
            self._poll.unregister(fd)
            worker.channel.close()

    def _read(self, worker: Worker) -> None:
        try:
            for frame in worker.channel.read():
                if frame.kind == protocol.BATCH:
                    worker.waiting.append(Batch(frame))
                    if worker.batch is None:
                        self._begin(worker, time.monotonic())
                elif frame.kind == protocol.INITIALIZE:
                    worker.channel.send(protocol.UP, pickle.dumps(None))
                elif frame.kind == protocol.STOP:
                    raise EOFError
        except (EOFError, ConnectionError):
            self._drop(worker.key)
            self._line.send(worker.key)

    def _begin(self, worker: Worker, now: float) -> None:
        """Do the batches that take no time, and begin the first that does."""
        worker.batch = None
        while worker.waiting:
            batch = worker.waiting.popleft()
            batch.begin(now)
            if batch.ends[-1] > now:
                worker.batch = batch
                self._set_timer(worker, batch, now, batch.overtime)
                return
            worker.report(batch.id, len(batch.ends), 0, 1e-6 * len(batch.ends))

    def _set_timer(self, worker: Worker, batch: Batch, now: float, pause: float) -> None:
        when = min(batch.ends[-1], now + pause)
        heapq.heappush(self._timers, (when, next(self._numbers), worker, batch, pause))

    def _look(self, worker: Worker, batch: Batch, now: float, pause: float) -> None:
        """A batch is done; or it takes long, and the worker does what its keeper would do."""
        done = bisect_right(batch.ends, now)
        new = done - batch.sent
        if done == len(batch.ends):
            worker.report(batch.id, new, 0, now - batch.began)
            self._begin(worker, now)
            return
        returned = len(batch.ends) - done - 1
        del batch.ends[done + 1 :]
        if new or returned or not batch.slow:
            batch.slow = True
            worker.report(batch.id, new, returned, 0.0)
        if new:
            batch.sent, batch.began = done, now
        while worker.waiting:
            behind = worker.waiting.popleft()
            worker.report(behind.id, 0, len(behind.lengths), 0.0)
        self._set_timer(worker, batch, now, min(2 * pause, LONGEST_PAUSE))


def hold(line: Connection, secret: bytes, others: list[Connection]) -> None:
    """Run a holder until the agent is gone."""
    for other in others:
        other.close()
    with contextlib.suppress(EOFError, ConnectionError):
        Holder(line, secret).run()


if __name__ == "__main__":
    main()
