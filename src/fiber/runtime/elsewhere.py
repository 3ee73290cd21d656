"""The agent of a job that runs elsewhere: in a container or a pod, on a stock Python image.

    bootstrap ─► main ─► a place of its own ─► connects to its owner ─► PREPARE ─► imports ─► serves
                                                                              └ from the master

It is as any agent (see `runtime.agent`), but that it shares no files with its owner. So it makes a
place of its own, with a gateway; the program's modules come from the master; what processes print
is sent to their parent, and is in the job's log as well; and it takes silence for the end of its
owner.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterable
from time import monotonic
from typing import Any, NoReturn

from fiber.backends.base import SECRET_FILE
from fiber.code import bootstrap, packages
from fiber.code.finder import Client as CodeClient
from fiber.code.finder import Finder
from fiber.errors import AuthenticationError
from fiber.resources import thread_environment
from fiber.runtime import folders, memory
from fiber.runtime import main as main_module
from fiber.runtime.agent import Agent, Client
from fiber.runtime.agents import DIAL, OUTPUT, PING
from fiber.runtime.endpoint import HELLO, Endpoint
from fiber.runtime.gateway import Gateway, connect_here
from fiber.runtime.link import Link
from fiber.runtime.reach import Network, Reach
from fiber.runtime.remote import BEAT, SILENCE
from fiber.runtime.streams import Stream
from fiber.wire.channel import Channel
from fiber.wire.framing import Frame
from fiber.wire.tls import server_context

__all__ = ["main"]

_CONNECT_TIMEOUT = 30.0  # seconds
_DIAL_TIMEOUT = 5.0  # seconds that a connection to the master may take


def main(sock: Any) -> NoReturn:
    """Run an agent; the environment says for whom.

    Args:
        sock: the connection to the master by which Fiber itself came.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):  # they are pipes, and the user is to see each line
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    take = os.environ.pop
    owner, token = take("FIBER_INTERNAL_ADDRESS"), take("FIBER_INTERNAL_TOKEN")
    master = tuple(take("FIBER_INTERNAL_MASTER").split())
    certificate = take("FIBER_INTERNAL_CERTIFICATE").encode()
    network = Network(master, take("FIBER_INTERNAL_HOME"), certificate)
    take("FIBER_INTERNAL_CODE", None)
    memory.heed(take(memory.RECORD, ""))
    with open(take(SECRET_FILE), "rb") as file:
        secret = file.read()
    sock.close()  # Fiber is here; for what else is needed there is another when it is
    reach = Reach(network, secret)
    try:
        channel = reach.channel(owner, _CONNECT_TIMEOUT)
    except OSError as error:
        print(f"fiber: the agent cannot reach its owner at {owner}: {error}", file=sys.stderr)
        os._exit(1)
    # Not before: who is killed while it looks for a master that is gone shall leave nothing.
    home = os.path.dirname(network.address.removeprefix("unix:"))
    folder, _ = folders.make(secret, folders.session_of(home))
    channel.send(HELLO, pickle.dumps({"token": token, "pid": os.getpid(), "place": folder}))
    frames: list[Frame] = []
    while not frames:
        try:
            frames = channel.read()
        except (EOFError, OSError):
            _farewell(folder, reach)
    # What else has come are signs of life.
    preparation = pickle.loads(frames[0].body)
    AgentElsewhere(channel, folder, secret, preparation, reach).run()


class AgentElsewhere(Agent):
    """See the module.

    Args:
        channel: to its owner.
        folder: its place.
        secret: of the session.
        preparation: what the owner has told it.
        reach: the way to other places.
    """

    def __init__(
        self,
        channel: Channel,
        folder: str,
        secret: bytes,
        preparation: dict[str, Any],
        reach: Reach,
    ) -> None:
        super().__init__(channel, folder, secret, preparation)
        self._reach = reach
        self._heard = 0.0
        self._first: Client | None = None
        self._differences: list[Any] = []
        self._kills = memory.kills()
        self._host = str(channel.sock.getsockname()[0])
        self._registration: Link | None = None

    def load(self) -> frozenset[str]:
        """Load the main module, which comes from the master as all that is the project's."""
        preparation = self.preparation
        sys.argv[:] = preparation["argv"]
        preparation["key"] = ("local", 0)
        # Numerical libraries count their threads when they are imported, and start them.
        os.environ.update(thread_environment(preparation["cpu"], os.environ))
        self._differences = packages.compare(preparation["packages"])
        return _load(self._reach, preparation["tops"], preparation["main"])

    def explain(self, error: str) -> str:
        """Add to an error what the image lacks."""
        return f"{error}\n{self._report()}" if self._differences else error

    def _report(self) -> str:
        return packages.table(self._differences, self.preparation["image"])

    def begin(self, first: Client) -> dict[str, Any]:
        """Open the gateway, and begin to give signs of life."""
        self._first = first
        self._endpoint = Endpoint(self.loop, os.path.join(self.folder, "agent.sock"), self.secret)
        certificate = self._reach.network.certificate
        port = self._endpoint.listen(server_context(certificate, self.preparation["tls_key"]))
        self._gateway = Gateway(self.loop, self._endpoint, self.folder)
        self._heard = monotonic()
        self.loop.call_later(BEAT, self._beats)
        host = f"[{self._host}]" if ":" in self._host else self._host
        gateway = [f"{host}:{port}"]
        if not self.preparation["owned_by_master"]:
            self._register(gateway)
        report = self._report() if self._differences else ""
        return {"gateway": gateway, "report": report}

    def _register(self, gateway: list[str]) -> None:
        """Tell the master of this place, whose owner is another process."""
        network = self._reach.network
        channel = self._reach.channel(network.address, _DIAL_TIMEOUT)
        hello = {"service": "places", "place": self.folder, "gateway": gateway}
        channel.send(HELLO, pickle.dumps(hello))
        self._registration = Link(self.loop, channel, self._on_dial, lambda: None)

    def _on_dial(self, frame: Frame) -> None:
        if frame.kind == DIAL:
            self._dial(*pickle.loads(frame.body))

    def _beats(self) -> None:
        """Give a sign of life, and see whether there was one."""
        assert self._first is not None
        link = self._first.link
        if monotonic() - self._heard > SILENCE:
            link.drain()  # we may have been the ones who slept
        if monotonic() - self._heard > SILENCE:
            print("fiber: the agent ends, for its owner is silent", file=sys.stderr)
            self.lost(self._first)
        link.post(PING, b"")
        self.loop.call_later(BEAT, self._beats)

    def heard(self, client: Client) -> None:
        """A frame has come from `client`."""
        if client is self._first:
            self._heard = monotonic()

    def on_remote_frame(self, client: Client, frame: Frame) -> None:
        """A sign of life, or the wish for a stream."""
        if frame.kind == DIAL:
            self._dial(*pickle.loads(frame.body))

    def _dial(self, token: str, path: str) -> None:
        """Bring the master a stream to a socket of this place."""
        # A connection to the master takes milliseconds, in which nothing else is served.
        network = self._reach.network
        try:
            channel = self._reach.channel(network.address, _DIAL_TIMEOUT)
        except OSError as error:
            print(f"fiber: the agent cannot call its master back: {error}", file=sys.stderr)
            return
        try:
            stream = connect_here(path, self.folder)
        except OSError as error:
            reason = (error.errno, error.strerror)
            channel.send(HELLO, pickle.dumps({"token": token, "error": reason}))
            channel.close()
            return
        channel.send(HELLO, pickle.dumps({"token": token}))
        self._gateway.carry(channel.sock, stream)

    def outputs(self, client: Client, request: dict[str, Any]) -> tuple[list[int], list[Stream]]:
        """Give a process pipes, and what of its surroundings only this place knows."""
        environment = dict(os.environ)
        environment.update(thread_environment(request["cpu"], environment))
        request["environment"] = {**environment, **request["environment"]}
        request["sys_path"] = list(sys.path)
        request["cwd"] = os.getcwd()
        request["parent"] = 0
        fds, streams = [], []
        for fd in (1, 2):
            read_end, write_end = os.pipe()
            fds.append(write_end)

            def also(data: bytes, fd: int = fd) -> None:
                client.link.post(OUTPUT, pickle.dumps((fd, data)))
                client.link.flush()

            ends = self.lift(read_end), self.duplicate(fd)
            streams.append(Stream(self.loop, *ends, self.streams, also))
        return fds, streams

    def diagnose(self, code: int) -> str | None:
        """Tell of a process that was killed because the memory is used up."""
        before, self._kills = self._kills, memory.kills()
        if code != -signal.SIGKILL or self._kills == before:
            return None
        most = memory.limit()
        limit = f" of {most} MB" if most is not None else ""
        return (
            f"was OOMKilled: it used more memory than its limit{limit}; "
            "ask for more with @fiber.meta(memory=...) or mem_per_job"
        )

    def abandon(self) -> None:
        """In a child: close what is the agent's."""
        self._endpoint.abandon()
        self._gateway.abandon()
        if self._registration is not None:
            self._registration.channel.close()

    def find_fiber(self) -> str:
        """Where Fiber came from the master, another interpreter finds it in a file."""
        fiber: Any = sys.modules["fiber"].__spec__.loader  # type: ignore[union-attr]
        if not hasattr(fiber, "data"):
            return super().find_fiber()
        path = os.path.join(self.folder, "fiber.bundle")
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.write(fiber.data)
        return (
            f"import sys; names = {{'__name__': 'bootstrap'}}; exec({bootstrap.text()!r}, names)\n"
            f"with open({path!r}, 'rb') as file:\n"
            f"    sys.meta_path.insert(0, names['Bundle'](file.read(), {fiber.hash!r}))"
        )

    def facts(self) -> dict[str, Any]:
        """Return what a process needs to know of its session."""
        elsewhere = {
            "network": self._reach.network,
            "host": self._host,
            "tls_key": self.preparation["tls_key"],
            "program": self.preparation["main"],
        }
        return {**super().facts(), "tops": self.preparation["tops"], "elsewhere": elsewhere}

    def leave(self) -> NoReturn:
        """End, and leave nothing of this job with its manager, for the master cannot see to it.

        Unless the end was asked for: then the master is there, and goes on with other jobs.
        """
        if self._leaving:
            self.go()
        _farewell(self.folder, self._reach)

    def go(self) -> NoReturn:
        """End, for the owner has said good-bye."""
        folders.remove(self.folder)
        os._exit(0)


def load(facts: dict[str, Any]) -> frozenset[str]:
    """In a fresh interpreter: load the main module as an agent's `facts` say; return its names."""
    reach = Reach(facts["elsewhere"]["network"], facts["secret"])
    return _load(reach, facts["tops"], facts["main"])


def _load(reach: Reach, tops: Iterable[str], source: tuple[str, str, str] | None) -> frozenset[str]:
    def ask() -> Channel:
        channel = reach.channel(reach.network.address, _CONNECT_TIMEOUT)
        channel.send(HELLO, pickle.dumps({"service": "code"}))
        return channel

    sys.meta_path.insert(0, Finder(tops, CodeClient(ask).module))
    return frozenset() if source is None else main_module.load_source(*source)


def _farewell(folder: str, reach: Reach) -> NoReturn:
    folders.remove(folder)
    hook = os.environ.get("FIBER_INTERNAL_FAREWELL")
    if hook:
        module, _, name = hook.partition(":")
        import importlib

        getattr(importlib.import_module(module), name)(alone=not _answers(reach))
    os._exit(0)


def _answers(reach: Reach) -> bool:
    """Whether the master is there: only this job has lost its owner."""
    try:
        reach.channel(reach.network.address, _DIAL_TIMEOUT).close()
    except (OSError, AuthenticationError):
        return False
    return True
