"""The connection to an engine: requests to it, and the one stream of what happens there.

    requests: create, start, kill, remove ──►┌────────┐
                                             │ engine │
    events of our label ◄── thread ◄─────────└────────┘
         │
         └──► Container.hear, `changed` ──► who waits

The stream is opened before the first container is made, and asks for what was buffered too, so that
no event is missed. When it breaks, the engine is away: it is tried again until it answers, and then
what was missed is looked up, as far as the engine still knows it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fiber.backends.docker import janitor
from fiber.backends.docker.container import Container
from fiber.backends.docker.tails import Tails
from fiber.errors import StartError

__all__ = ["Engine", "each"]

T = TypeVar("T")

LABEL = "fiber.master"
_AT_ONCE = 8  # requests; the engine itself works on few at a time
_END_COMES_LATE = 2.0  # seconds, from a removal's answer to the event of the end
_LOOK_AGAIN = 0.02  # seconds
_SWEEP = 15.0  # seconds, for the engine to remove what is left at the end
_PAUSES = (0.1, 2.0)  # seconds, between attempts to reach an engine that is away


class Engine:
    """One connection, from the first request of a session to its end."""

    def __init__(self, docker: Any) -> None:
        self.errors = docker.errors
        self.failures = (docker.errors.DockerException, OSError)
        """What the SDK raises, the errors of requests included."""
        client: Any = None
        try:
            client = docker.from_env()
            about = client.api.info()
        except self.failures as error:
            if client is not None:
                client.close()
            raise StartError(
                f"The Docker engine does not answer: {words(error)}. Is Docker running, may this "
                "user use its socket (/var/run/docker.sock), and is DOCKER_HOST right?"
            ) from error
        self.client = client
        self.api = client.api
        self.label = f"{LABEL}={uuid.uuid4().hex}"
        self.node = "" if self.api.base_url.startswith("http+docker://localhost") else about["Name"]
        self.changed = threading.Condition()
        self.away = ""
        """Why the engine does not answer; empty if it does."""
        self.tails = Tails()
        self._containers: dict[str, Container] = {}
        self._doomed: set[str] = set()
        """Containers that are to be removed as soon as the engine answers."""
        self._closing = threading.Event()
        self._stream: Any = None
        self._janitor: subprocess.Popen[bytes] | None = None
        self._followed = threading.Event()
        self._thread = threading.Thread(
            target=self._follow, name="fiber-docker-events", daemon=True
        )
        self._thread.start()
        self._followed.wait()

    # Containers

    def prepare(self) -> None:
        """Have a janitor before the first container is made."""
        program = [sys.executable, "-S", "-E", janitor.__file__]
        with self.changed:
            if self._janitor is None and sys.executable:
                self._janitor = subprocess.Popen(
                    [*program, self.label, str(os.getpid()), *sys.path],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )

    def attach(self, container: Container) -> None:
        """Read what `container` writes from now on."""
        streams = {"stdout": 1, "stderr": 1, "stream": 1}
        self.tails.add(self.api.attach_socket(container.key, streams), container.tail)

    def start(self, container: Container) -> None:
        """Start `container`, which was created, and listen to what happens to it."""
        with self.changed:
            self._containers[container.key] = container
        self.api.start(container.key)
        with self.changed:
            container.start()

    def signal(self, container: Container, name: str) -> None:
        """Send a signal to the command in `container`, unless it has ended."""
        with self.changed:
            if container.ended:
                return
            container.ours = True
        with contextlib.suppress(*self.failures):  # it has ended, or the engine is away
            self.api.kill(container.key, name)

    def remove(self, container: Container) -> None:
        """End `container` at once and remove it; wait for the end to be known."""
        with self.changed:
            container.ours = True
        if not self._remove(container.key):
            return
        with self.changed:
            self.changed.wait_for(lambda: container.ended, _END_COMES_LATE)
            container.killed()
            self._containers.pop(container.key, None)
            self.changed.notify_all()

    def discard(self, key: str) -> None:
        """Remove a container that nobody was told of."""
        with self.changed:
            self._containers.pop(key, None)
        self._remove(key)

    def _remove(self, key: str) -> bool:
        try:
            self.api.remove_container(key, force=True, v=True)
        except self.failures as error:
            if getattr(error, "status_code", None) not in (404, 409):  # it is gone, or about to be
                with self.changed:
                    self._doomed.add(key)
                return False
        return True

    # What happens

    def _follow(self) -> None:
        pause = _PAUSES[0]
        while not self._closing.is_set():
            why = "it closed the connection"
            try:
                stream = self.api.events(since=0, filters=self._ours(), decode=True)
                try:
                    self._listen(stream)
                finally:
                    stream._response.close()
                pause = _PAUSES[0]
            except (*self.failures, ValueError, self.errors.StreamParseError) as error:
                why = words(error)
            with self.changed:
                self._stream = None
                self.away = f"The Docker engine does not answer: {why}."
                self.changed.notify_all()
            self._followed.set()
            self._closing.wait(pause)
            pause = min(2 * pause, _PAUSES[1])

    def _listen(self, stream: Any) -> None:
        with self.changed:
            self._stream = stream
        if self._closing.is_set():
            return
        if self._followed.is_set():
            self._catch_up()
        with self.changed:
            self.away = ""
            self.changed.notify_all()
        self._followed.set()
        for event in stream:
            self._hear(event)

    def _hear(self, event: dict[str, Any]) -> None:
        actor = event.get("Actor") or {}
        with self.changed:
            container = self._containers.get(actor.get("ID", ""))
            if container is not None:
                before = container.ended
                container.hear(event["Action"], actor.get("Attributes") or {}, time.monotonic())
                if container.ended and not before:
                    self._containers.pop(container.key)
                self.changed.notify_all()

    def _catch_up(self) -> None:
        """Look at what is there after nobody listened; what the engine remembers follows."""
        there = {entry["Id"]: entry for entry in self._list()}
        with self.changed:
            containers = list(self._containers.values())
            doomed, self._doomed = self._doomed, set()
        for key in doomed & there.keys():
            self._remove(key)
        for container in containers:
            state = there.get(container.key, {}).get("State")
            if state == "running" and container.tail.ended.is_set():
                with contextlib.suppress(*self.failures):
                    self.attach(container)
            elif state in ("exited", "dead"):
                self._look_at(container)
            elif state is None:
                with self.changed:
                    container.miss(time.monotonic())

    def _look_at(self, container: Container) -> None:
        try:
            found = self.api.inspect_container(container.key)["State"]
        except self.errors.NotFound:
            found = None
        now = time.monotonic()
        with self.changed:
            if found is None:
                container.miss(now)
                return
            if found["OOMKilled"]:
                container.hear("oom", {}, now)
            container.hear("die", {"exitCode": str(found["ExitCode"])}, now)

    def _list(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.api.containers(all=True, filters={"label": self.label})
        return found

    def _ours(self) -> dict[str, Any]:
        return {"label": self.label, "type": "container"}

    # The end

    def close(self) -> None:
        """Remove all that is left of us, and close everything."""
        gone = self._sweep()
        with self.changed:
            for container in self._containers.values():
                container.killed()
            self._containers.clear()
            self.changed.notify_all()
        self._closing.set()
        with self.changed:
            stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(Exception):
                stream.close()  # the thread that reads from it sees its end
        self._thread.join()
        self.tails.close()
        self.client.close()
        self._dismiss(gone)

    def _sweep(self) -> bool:
        deadline = time.monotonic() + _SWEEP
        with contextlib.suppress(*self.failures):
            while left := [entry["Id"] for entry in self._list()]:
                if time.monotonic() > deadline:
                    return False
                each(self._remove, left)
                time.sleep(_LOOK_AGAIN)  # the engine answers before they are gone
            return True
        return False

    def _dismiss(self, gone: bool) -> None:
        process, self._janitor = self._janitor, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            if gone:
                process.stdin.write(b"\0")
            process.stdin.close()
        if gone:
            process.wait()
        else:
            process.returncode = 0  # it goes on without us, until the engine answers


def each(action: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Call `action` with each of `items`, some at a time; return its results in their order.

    Raises:
        the first exception, when all that had begun have ended; what had not begun is left out.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    todo = iter(range(len(items)))
    lock = threading.Lock()

    def work() -> None:
        while not errors:
            with lock:
                number = next(todo, None)
            if number is None:
                return
            try:
                results[number] = action(items[number])
            except BaseException as error:
                errors.append(error)

    threads = []
    for _ in range(min(_AT_ONCE, len(items)) - 1):
        thread = threading.Thread(target=work, name="fiber-docker-request", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is about to end: this thread does it all
            break
        threads.append(thread)
    work()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(items))]


def words(error: BaseException) -> str:
    """Return what went wrong, in the words of the engine or the system if there are any."""
    found = getattr(error, "explanation", None) or _of_system(error) or error
    return str(found).strip().rstrip(".")


def _of_system(error: object) -> str | None:
    # Around an OSError there are one of urllib3, one of requests, and sometimes one of the SDK.
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if not isinstance(error, BaseException):
        return None
    inner = (_of_system(part) for part in (*error.args, error.__cause__))
    return next(filter(None, inner), None)
