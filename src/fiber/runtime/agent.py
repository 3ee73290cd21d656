"""The agent: the program of a job, a warm template that forks processes on request.

    client ─ SPAWN ─► fork ─► child.run        SIGCHLD ─► waitpid ─► EXITED ─► client
                        └─► STARTED ─► client  stderr of the child ─► that of the user, and a tail

It has imported Fiber and the user's main module once and stays single-threaded, so that a fork
costs milliseconds and shares memory. When the main module leaves threads behind, or the system does
not fork safely (macOS), it starts fresh interpreters instead.

Its clients are the process that submitted the job and each process that it started itself, which
may want children of its own. When a client is gone, what it had started is killed; when the first
client is gone, so is the session, and the agent ends with all that is left of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from fiber.runtime import child as child_process
from fiber.runtime import folders
from fiber.runtime import main as main_module
from fiber.runtime.agents import (
    BYE,
    DIAL,
    ENDING,
    EXITED,
    FAILED,
    HEED,
    PING,
    PREPARE,
    READY,
    SIGNAL,
    SPAWN,
    STARTED,
    TOLD,
)
from fiber.runtime.endpoint import HELLO
from fiber.runtime.link import Link
from fiber.runtime.loop import Event, Loop
from fiber.runtime.poller import READ
from fiber.runtime.streams import Stream
from fiber.wire.channel import Channel, connect
from fiber.wire.framing import Frame

__all__ = ["Agent", "Client", "main"]

_CONNECT_TIMEOUT = 30.0  # seconds
_LAST_WORDS = 1.0  # seconds that a process has to end by itself when its parent has died
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
_DESCRIPTORS = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
_ROOM = 64  # descriptors that may go along with a process before some lie among our own


def main() -> NoReturn:
    """Run an agent; the environment says for whom."""
    address = os.environ.pop("FIBER_INTERNAL_ADDRESS")
    token = os.environ.pop("FIBER_INTERNAL_TOKEN")
    folder = os.environ.pop("FIBER_INTERNAL_SESSION")
    # A Ctrl-C is for the user's processes. It was blocked while this interpreter started.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        with open(os.path.join(folder, folders.SECRET_FILE), "rb") as file:
            secret = file.read()
        channel = connect(address, secret, _CONNECT_TIMEOUT)
    except OSError as error:
        if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
            _leave(folder)  # the session ended before we could take part
        print(f"fiber: the agent cannot reach its master at {address}: {error}", file=sys.stderr)
        os._exit(1)
    channel.send(HELLO, pickle.dumps({"token": token, "pid": os.getpid()}))
    frames: list[Frame] = []
    while not frames:
        try:
            frames = channel.read()
        except (EOFError, OSError):
            _leave(folder)
    assert [frame.kind for frame in frames] == [PREPARE]
    channel.takes_fds = True
    Agent(channel, folder, secret, pickle.loads(frames[0].body)).run()


class Agent:
    """Serves its clients until the first of them is gone; see `runtime.elsewhere` for another."""

    def __init__(
        self, channel: Channel, folder: str, secret: bytes, preparation: dict[str, Any]
    ) -> None:
        self.folder = folder
        self.secret = secret
        self.preparation = preparation
        self.names: frozenset[str] = frozenset()
        self.forks = False
        self.loop = Loop(background=False)
        self.processes: dict[int, Process] = {}  # by process ID
        self.clients: set[Client] = set()
        self.heeding: set[Client] = set()  # those who are told of signals
        self.streams: set[Stream] = set()
        self._channel = channel
        self._handlers: dict[int, Any] = {}
        self._asked_to_end = False
        self._leaving = False
        self._limit = (0, 0)  # of open files, as the children shall have it
        self._floor = self._top = 0  # between the two the descriptors are ours, and no child's
        self._loaded = False  # what children need
        self._pid = os.getpid()

    def run(self) -> NoReturn:
        """Load the main module, then serve."""
        error = None
        try:
            self.names = self.load()
        except BaseException:
            error = self.explain(traceback.format_exc())
        child_process.flush()  # or each child would print it again
        self._take_signals()
        self._limit = _raise_limit()
        self.forks = sys.platform != "darwin" and _thread_count() == 1
        child_process.prepare(self.preparation["modules"])
        highest = max(map(int, os.listdir(_DESCRIPTORS)))
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._floor = self._top = highest + max(1, min(_ROOM, (most - highest) // 4))
        gc.collect()
        gc.freeze()
        with self.loop:
            wake_read, wake_write = os.pipe()
            os.set_blocking(wake_read, False)
            os.set_blocking(wake_write, False)
            signal.signal(signal.SIGCHLD, lambda signum, frame: None)
            signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
            self.loop.register(wake_read, READ, lambda events: self._reap(wake_read))
            self.wake_fds = (wake_read, wake_write)
            first = Client(self, self._channel)
            facts = {"names": self.names, "error": error, **self.begin(first)}
            first.link.post(READY, pickle.dumps(facts))
            self.loop.call_later(0, folders.sweep)
        never = Event()
        while True:
            self.loop.wait(never)

    def load(self) -> frozenset[str]:
        """Load the main module, as the preparation says; return its names."""
        preparation = self.preparation
        sys.path[:] = preparation["sys_path"]
        sys.argv[:] = preparation["argv"]
        with contextlib.suppress(OSError):  # a folder that is gone
            os.chdir(preparation["cwd"])
        return main_module.load(preparation["main"])

    def explain(self, error: str) -> str:
        """Return what there is to say of an `error` of the main module."""
        return error

    def begin(self, first: Client) -> dict[str, Any]:
        """The first client is there: return what else it wants to know. Within the loop."""
        return {}

    def leave(self) -> NoReturn:
        """End, for the master has gone without a word, or all has been said."""
        _leave(self.folder)

    def _take_signals(self) -> None:
        """Set aside the handlers that the main module installed: they are for the children."""
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)

        def on_term(*_: object) -> None:
            self._asked_to_end = True
            self.loop.call_soon(self._leave_soon)

        signal.signal(signal.SIGTERM, on_term)

    def _leave_soon(self) -> None:
        """SIGTERM, perhaps for all of the program: start no more, and stay while there are some.

        The master may want to hear how they end; if it is gone, its end will be noticed.
        """
        if not self._leaving:
            self._leaving = True
            for client in self.clients:
                client.link.post(ENDING, pickle.dumps(None))
                client.link.flush()
        if not self.processes:
            for client in self.clients:
                client.link.flush()  # how the last process has ended may not be sent yet
                client.link.channel.deliver(_LAST_WORDS)
                client.link.close()
            self.leave()

    def tell(self, process: Process) -> None:
        """It is about to be sent a signal: let those who heed know that its end may be meant."""
        process.told = True
        for client in self.heeding:
            client.link.post(TOLD, pickle.dumps((0, process.pid)))
            client.link.flush()

    def heed(self, client: Client) -> None:
        """A client, which may serve others, wants to know whose end is meant."""
        self.heeding.add(client)
        for process in self.processes.values():
            if process.told:
                client.link.post(TOLD, pickle.dumps((0, process.pid)))

    def lost(self, client: Client) -> None:
        """A client is gone: kill what it started; with the first client all is over."""
        self.clients.discard(client)
        self.heeding.discard(client)
        if not client.first:
            if client.processes:
                # They may want to find out, and to say a last word.
                seconds = 0.0 if client.dismissed else _LAST_WORDS
                self.loop.call_later(seconds, client.kill_processes)
        else:
            for process in list(self.processes.values()):
                process.signal(signal.SIGKILL)
            for stream in list(self.streams):
                stream.tail()  # passes on what is there
            if client.dismissed:
                self.go()
            self.leave()

    def go(self) -> NoReturn:
        """End, for the first client has said good-bye."""
        os._exit(0)

    def heard(self, client: Client) -> None:
        """A client gave a sign of life."""

    def on_remote_frame(self, client: Client, frame: Frame) -> None:
        """A client sent what is of use only elsewhere."""

    def spawn(self, client: Client, key: int, request: dict[str, Any], fds: list[int]) -> None:
        """Start a process for `client`; `fds`: standard output and error, and what goes along."""
        if self._leaving:
            for fd in fds:
                os.close(fd)
            client.link.post(FAILED, pickle.dumps((key, "the agent was asked to end by SIGTERM")))
            return
        ours: socket.socket | None = None
        streams: list[Stream] = []
        if not fds:
            fds, streams = self.outputs(client, request)
        with contextlib.ExitStack() as stack:
            for fd in fds:
                stack.callback(os.close, fd)
            try:
                ours, theirs = socket.socketpair()
                stack.enter_context(theirs)
                ours = socket.socket(fileno=self.lift(ours.detach()))
                if request["capture_stderr"] and not streams:
                    read_end, write_end = os.pipe()
                    stack.callback(os.close, write_end)
                    read_end, target = self.lift(read_end), self.duplicate(fds[1])
                    streams = [Stream(self.loop, read_end, target, self.streams)]
                    fds = [fds[0], write_end, *fds[2:]]
                if self.forks:
                    self._load_for_children(request["by_value"])
                    # What comes before the child has its own handlers waits until it has them.
                    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                    stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
                    pid = os.fork()
                    if pid == 0:
                        ours.close()
                        self._be_child(request, theirs, fds)
                else:
                    finding = self.find_fiber()
                    pid = child_process.start_fresh(
                        finding, self.facts(), request, ours, theirs, fds
                    )
            except OSError as error:
                if ours is not None:
                    ours.close()
                reason = f"it cannot be started: {error.strerror}"
                client.link.post(FAILED, pickle.dumps((key, reason)))
                return
        self.processes[pid] = client.processes[key] = Process(pid, client, key, streams)
        Client(self, Channel(ours, takes_fds=True))
        client.link.post(STARTED, pickle.dumps((key, pid)))

    def _load_for_children(self, by_value: bool) -> None:
        """Load what each child would have to load for itself, in time and memory of its own."""
        if not self._loaded:
            self._loaded = True
            from multiprocessing import util  # noqa: F401  it loads subprocess

            gc.freeze()
        if by_value and "cloudpickle" not in sys.modules:
            # For the first function; a worker that is killed while it loads it seems to be the
            # victim of its first item.
            with contextlib.suppress(ImportError):
                import cloudpickle  # noqa: F401

                gc.freeze()

    def duplicate(self, fd: int) -> int:
        """Return a duplicate that lies where ours are."""
        ours = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, self._floor)
        self._top = max(self._top, ours + 1)
        return ours

    def lift(self, fd: int) -> int:
        """Move a descriptor to where ours are, so that a child closes them all at one stroke."""
        try:
            return self.duplicate(fd)
        finally:
            os.close(fd)

    def outputs(self, client: Client, request: dict[str, Any]) -> tuple[list[int], list[Stream]]:
        """Complete a request that came without descriptors.

        Returns:
            Standard output and error for the process, and the streams that what it writes comes
            out of, that of standard error last.
        """
        raise AssertionError

    def diagnose(self, code: int) -> str | None:
        """Return why a process ended with `code`, if there is more to say of it."""
        return None

    def _be_child(self, request: dict[str, Any], upstream: socket.socket, fds: list[int]) -> None:
        """In the child: let go of what is the agent's and run; does not return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            for fd in self.wake_fds:
                os.close(fd)
            for client in self.clients:
                if client.first:
                    client.link.channel.close()
                else:
                    for (
                        fd
                    ) in client.link.channel.fds:  # for another child, whose frame is on its way
                        os.close(fd)
            # Of hundreds of processes there are thousands. What belongs to them in memory stays
            # as it is: this process ends without coming back to it.
            keep = sorted(fd for fd in (upstream.fileno(), *fds) if fd >= self._floor)
            for low, high in zip(
                [self._floor, *[fd + 1 for fd in keep]], [*keep, self._top], strict=True
            ):
                os.closerange(low, high)
            self.abandon()
            self.loop.abandon()
            code = child_process.run(self.facts(), request, upstream, fds[:2], fds[2:])
        except BaseException:
            traceback.print_exc()
        finally:
            child_process.flush()
            os._exit(code)

    def abandon(self) -> None:
        """In the child: close what else is the agent's."""

    def find_fiber(self) -> str:
        """Return the program by which another interpreter finds Fiber."""
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        return f"import sys; sys.path = [*filter(None, sys.path), {package!r}]"

    def facts(self) -> dict[str, Any]:
        """Return what a process needs to know of its session."""
        return {
            "folder": self.folder,
            "secret": self.secret,
            "names": self.names,
            "key": self.preparation["key"],
            "main": self.preparation["main"],
            "modules": self.preparation["modules"],
            "agent": self._pid,
            "limit": self._limit,
        }

    def _reap(self, wake: int) -> None:
        os.read(wake, 4096)
        if self._asked_to_end and self.processes:
            self._leave_soon()  # so that who hears of their ends has heard of this before
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self.processes.pop(pid, None)
            if process is not None:
                process.client.processes.pop(process.key, None)
                tail = "".join([stream.tail() for stream in process.streams][-1:])
                code = os.waitstatus_to_exitcode(status)
                facts = (process.key, code, tail, self.diagnose(code))
                process.client.link.post(EXITED, pickle.dumps(facts))
            if self._leaving and not self.processes:
                self.loop.call_soon(self._leave_soon)  # when that has been sent


class Process:
    """A process that was started and has not ended."""

    def __init__(self, pid: int, client: Client, key: int, streams: list[Stream]) -> None:
        self.pid = pid
        self.client = client
        self.key = key
        self.streams = streams
        self.told = False  # it was sent a signal

    def signal(self, signum: int) -> None:
        # Not reaped yet, so that the process ID is still its own.
        os.kill(self.pid, signum)


class Client:
    """Somebody who has processes started."""

    def __init__(self, agent: Agent, channel: Channel) -> None:
        self.agent = agent
        self.first = not agent.clients
        self.dismissed = False  # it has said good-bye
        self.processes: dict[int, Process] = {}  # that it has started, by its keys for them
        self.link = Link(agent.loop, channel, self._on_frame, lambda: agent.lost(self))
        agent.clients.add(self)
        if self.first:
            agent.heeding.add(self)

    def _on_frame(self, frame: Frame) -> None:
        self.agent.heard(self)
        if frame.kind == BYE:
            self.dismissed = True
            self.agent.lost(self)
            return
        if frame.kind == HEED:
            self.agent.heed(self)
            return
        if frame.kind in (PING, DIAL):
            self.agent.on_remote_frame(self, frame)
            return
        key, fact = pickle.loads(frame.body)
        if frame.kind == SPAWN:
            fds = self.link.channel.take_fds(fact["fds"])
            if not fds and fact["fds"]:
                reason = "its agent has no file descriptors left (see ulimit -n)"
                self.link.post(FAILED, pickle.dumps((key, reason)))
                return
            self.agent.spawn(self, key, fact, fds)
        elif frame.kind == SIGNAL:
            process = self.processes.get(key)
            if process is not None:
                self.agent.tell(process)
                process.signal(fact)

    def kill_processes(self) -> None:
        """End what it has started."""
        for process in self.processes.values():
            process.signal(signal.SIGKILL)


def _leave(folder: str) -> NoReturn:
    """End; the session's folder goes as well if its master has gone without a word."""
    for _ in range(100):  # a dying process may close its socket a moment before it lets go of locks
        if not os.path.isdir(folder):
            break
        if folders.is_abandoned(folder):
            folders.remove(folder)
            break
        time.sleep(0.01)
    os._exit(0)


def _raise_limit() -> tuple[int, int]:
    """Let the agent open as many files as it may: three for each process. Return what was."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def _thread_count() -> int:
    """Return how many threads this process has, those of libraries included where that shows."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


if __name__ == "__main__":
    main()
