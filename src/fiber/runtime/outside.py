"""What the master does for the processes of its session that run elsewhere.

    order ─► Jobs of a backend ─► job ─► bootstrap ─► endpoint: "code" ─► Fiber and the program
                                                          └► a token ─► `RemoteAgent`
    processes elsewhere ─► endpoint: "gateway" ─► sockets of all places
                        ─► endpoint: "jobs" ───► order, for processes that start others

It is made when the first process elsewhere is asked for: then the endpoint listens for TCP, with a
certificate that is this session's alone.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from fiber.backends import registry
from fiber.backends.base import Backend, JobSpec, JobStatus
from fiber.code import bootstrap, bundle
from fiber.code.project import Project
from fiber.code.server import Server
from fiber.config import config
from fiber.resources import Resources
from fiber.runtime.agents import DIAL
from fiber.runtime.gateway import Gateway, Refused
from fiber.runtime.jobs import Jobs, Ticket
from fiber.runtime.link import Link
from fiber.runtime.logs import DEBUG, ERROR, log
from fiber.runtime.loop import Event
from fiber.runtime.orders import ASK, JOBS, STATUS, STOP, Held, Needs, Told
from fiber.runtime.reach import authenticated, open_directly
from fiber.wire.channel import Channel
from fiber.wire.framing import Frame
from fiber.wire.tls import client_context, make_certificate, server_context

if TYPE_CHECKING:
    from fiber.runtime.session import Session

__all__ = ["Outside"]

_DIRECT = 3.0  # seconds in which a gateway must answer that can be reached directly
_FRESH = 2.0  # seconds for which an answer to "where do jobs reach us" holds
_CALLBACK = 10.0  # seconds that an agent has to bring a stream


class Place:
    """A folder of this session on another host.

    Attributes:
        gateway: where it can be reached, as HOST:PORT.
        dial: asks its agent for a stream: called with a token and a path.
        indirect: whether we found that it cannot be reached directly.
    """

    def __init__(self, gateway: Sequence[str], dial: Callable[[str, str], object]) -> None:
        self.gateway = tuple(gateway)
        self.dial = dial
        self.indirect = False


class Outside:
    """See the module. Within the loop, save `stream`, `channel` and `collect`.

    Args:
        session: the master's.

    Raises:
        StartError: the certificate cannot be made; the message says why.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.loop = session.loop
        self.places: dict[str, Place] = {}
        self.certificate, self.key = make_certificate()
        self._client_context = client_context(self.certificate)
        self._jobs: dict[str, Jobs] = {}
        self._addresses: dict[
            str, tuple[Sequence[str], float]
        ] = {}  # by backend; when it was asked
        self._program = bootstrap.text()
        self.project = Project()
        self._server = Server(self.project)
        self._links: set[Link] = set()
        endpoint = session.endpoint
        host, port = _configured()
        self._host = host
        self.port = endpoint.listen(server_context(self.certificate, self.key), port)
        folder = os.path.dirname(endpoint.address.removeprefix("unix:"))
        self._gateway = Gateway(self.loop, endpoint, folder, self._where, self._bring)
        endpoint.serve("code", self._serve_code)
        endpoint.serve(JOBS, self._serve_jobs)
        endpoint.serve("places", self._serve_place)

    # Jobs

    def order(
        self, backend: str, name: str, needs: Needs, token: str, owner: str, told: Told
    ) -> Held:
        """Have a job started whose agent shows `token` at `owner`; return what holds it."""
        jobs = self._jobs.get(backend)
        if jobs is None:
            jobs = self._jobs[backend] = Jobs(self.loop, lambda: registry.get(backend))

        def make(found: Backend) -> JobSpec:
            return self._spec(found, name, needs, token, owner)

        def called() -> str:
            return ticket.job.id if ticket.job is not None else ""

        ticket: Ticket = jobs.submit(make, lambda status: told(status, called()))
        return Held(lambda: jobs.kill(ticket), lambda: jobs.ask(ticket), called)

    def _spec(self, backend: Backend, name: str, needs: Needs, token: str, owner: str) -> JobSpec:
        """Describe a job; in the thread that submits it."""
        addresses = self._reached_at(backend)
        return JobSpec(
            name=name,
            command=[*backend.python, "-c", self._program],
            environment={
                "FIBER_INTERNAL_MASTER": " ".join(addresses),
                "FIBER_INTERNAL_HOME": self.session.endpoint.address,
                "FIBER_INTERNAL_CERTIFICATE": self.certificate.decode(),
                "FIBER_INTERNAL_CODE": bundle.content_hash(),
                "FIBER_INTERNAL_ADDRESS": owner,
                "FIBER_INTERNAL_TOKEN": token,
            },
            resources=needs[0],
            processes=needs[1],
            session=_label(self.session.folder),
            secret=self.session.secret,
        )

    def _reached_at(self, backend: Backend) -> Sequence[str]:
        """Return where its jobs reach this process: that may change, if there is a relay."""
        addresses, asked = self._addresses.get(backend.name, ((), -_FRESH))
        if monotonic() - asked < _FRESH:
            return addresses
        if self._host:
            addresses = [f"{self._host}:{self.port}"]
        else:
            addresses = list(backend.addresses(self.port))
        if not asked > 0:
            # Made once, and here: within the loop, for the first job, it would hold up all else.
            bundle.bundle(importlib.util.MAGIC_NUMBER)
            log(DEBUG, "%s jobs reach this process at %s", backend.name, ", ".join(addresses))
        self._addresses[backend.name] = (addresses, monotonic())
        return addresses

    def _serve_code(self, link: Link, hello: dict[str, Any]) -> None:
        def answer(frame: Frame) -> None:
            link.post(*self._server.answer(frame.kind, bytes(frame.body)))

        link.on_frame, link.on_lost = answer, lambda: self._links.discard(link)
        self._links.add(link)

    def _serve_jobs(self, link: Link, hello: dict[str, Any]) -> None:
        """A process elsewhere wants to start others: do it for as long as it lives."""
        orders: dict[int, Held] = {}

        def on_frame(frame: Frame) -> None:
            try:
                number, *facts = pickle.loads(frame.body)
                if frame.kind in (STOP, ASK):
                    held = orders.get(number)
                    if held is not None and frame.kind == ASK:
                        held.ask()
                    elif held is not None:
                        orders.pop(number).end()
                    return
                backend, name, (asked, processes), token, owner = facts
                needs = (Resources(*asked), int(processes))
            except Exception as error:  # no process of a session sends such a thing
                log(ERROR, "a connection is closed, for what came is no order of a job: %r", error)
                link.close()
                on_lost()
                return

            def told(status: JobStatus, job: str) -> None:
                link.post(STATUS, pickle.dumps((number, status, job)))

            orders[number] = self.order(backend, name, needs, token, owner, told)

        def on_lost() -> None:
            self._links.discard(link)
            for held in orders.values():
                held.end()

        link.on_frame, link.on_lost = on_frame, on_lost
        self._links.add(link)

    # Places

    def place_is_there(
        self, folder: str, gateway: Sequence[str], dial: Callable[[str, str], object]
    ) -> None:
        """A place can be reached from now on."""
        place = self.places[folder] = Place(gateway, dial)
        place.indirect = any(other.indirect for other in self.places.values())

    def place_is_gone(self, folder: str) -> None:
        """It cannot any more."""
        self.places.pop(folder, None)

    def _serve_place(self, link: Link, hello: dict[str, Any]) -> None:
        folder, gateway = str(hello["place"]), [str(host) for host in hello["gateway"]]

        def on_lost() -> None:
            self.place_is_gone(folder)
            self._links.discard(link)

        link.on_frame, link.on_lost = lambda frame: None, on_lost
        self._links.add(link)
        dial = lambda token, path: link.post(DIAL, pickle.dumps((token, path)))  # noqa: E731
        self.place_is_there(folder, gateway, dial)

    def _where(self, folder: str) -> Sequence[str]:
        place = self.places.get(folder)
        return place.gateway if place is not None else ()

    def _bring(self, path: str, take: Callable[[Any], object]) -> None:
        """Have the agent of the place call back with a stream to `path`."""
        place = self.places.get(os.path.dirname(path))
        if place is None:
            take(FileNotFoundError(2, "the place of that process is gone"))
            return
        token = os.urandom(16).hex()

        def arrived(link: Link, hello: dict[str, Any]) -> None:
            late.cancel()
            if "error" in hello:
                link.close()
                take(Refused(*hello["error"]))
            else:
                take(link.release())

        def give_up() -> None:
            self.session.endpoint.forget(token)
            take(TimeoutError(110, f"its agent did not call back in {_CALLBACK:g} seconds"))

        late = self.loop.call_later(_CALLBACK, give_up)
        self.session.endpoint.expect(token, arrived)
        place.dial(token, path)

    def stream(self, path: str, timeout: float) -> Any:
        """Return a stream, blocking, to a socket in another place; raises OSError."""
        place = self.places.get(os.path.dirname(path))
        if place is None:
            raise FileNotFoundError(2, "the place of that process is gone")
        deadline = monotonic() + timeout
        if not place.indirect:
            context, secret = self._client_context, self.session.secret
            try:
                return open_directly(place.gateway, path, secret, context, min(timeout, _DIRECT))
            except Refused:
                raise
            except OSError as error:
                log(DEBUG, "%s cannot be reached, so it calls back: %s", place.gateway, error)
                for other in self.places.values():
                    other.indirect = True
        found: list[Any] = []
        done = Event()

        def take(stream: Any) -> None:
            found.append(stream)
            done.set()

        with self.loop:
            self._bring(path, take)
        if not self.loop.wait(done, deadline - monotonic()):
            raise TimeoutError(110, "its agent did not call back in time")
        if isinstance(found[0], OSError):
            raise found[0]
        found[0].settimeout(None)
        return found[0]

    def channel(self, address: str, timeout: float) -> Channel:
        """Connect to a listener in another place; raises OSError and AuthenticationError."""
        deadline = monotonic() + timeout
        sock = self.stream(address.removeprefix("unix:"), timeout)
        return authenticated(sock, self.session.secret, deadline)

    # The end

    def close(self) -> None:
        """Close what is open to processes elsewhere."""
        for link in list(self._links):
            link.close()
        self._gateway.close()

    def collect(self) -> None:
        """End the jobs that are left; have the managers forget the session. Not in the loop."""
        for name, jobs in self._jobs.items():
            jobs.close()
            registry.forget(name)


def _configured() -> tuple[str, int]:
    """Return host and port at which the configuration says that we can be reached; "" and 0."""
    if config.address is None:
        return "", 0
    host, colon, port = config.address.rpartition(":")
    if colon and port.isdecimal() and not config.address.endswith("]"):
        return host, int(port)
    return config.address, 0


def _label(folder: str) -> str:
    """Return what tells the session in `folder` from others: process ID and random part."""
    return "-".join(os.path.basename(folder).split("-")[-2:])
