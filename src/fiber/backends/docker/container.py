"""A container: what was heard of it, and what that says about the job.

    start, kill, oom, die, destroy ──► Container.hear ──► JobStatus

What the engine tells of an end is spread over events: who sent a signal, that memory ran out, the
exit code. A container that is removed by `docker rm -f` is told as one that was killed by `docker
kill`, since all of ours are removed at their end; so both have one reason.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping

from fiber.backends.base import JobState, JobStatus
from fiber.backends.docker.tails import Tail

__all__ = ["Container"]

_COMES_LATE = 1.0  # seconds, until what was not heard will not be heard any more
_NOT_FOUND = 127  # what a shell, docker-init and the engine say when there is no such command


class Container:
    """A job. Its methods are called with the engine's lock held."""

    def __init__(
        self, name: str, key: str, image: str, program: str, limit: str, node: str, tail: Tail
    ) -> None:
        self.name = name
        self.key = key
        """The ID that the engine gave it."""
        self.tail = tail
        self.ours = False
        """Whether this process asked it to end."""
        self._image = image
        self._program = program
        self._limit = limit
        self._node = node
        self._out_of_memory = False
        self._signalled = False
        self._died: int | None = None
        self._undecided_since: float | None = None
        self._status = JobStatus(JobState.PENDING, node=node)

    @property
    def id(self) -> str:
        """Its name, which the engine takes for an ID as well."""
        return self.name

    @property
    def ended(self) -> bool:
        """Whether it has, and the status says why."""
        return self._status.state is JobState.ENDED

    @property
    def undecided(self) -> bool:
        """Whether it is there no more, and an event may still tell why."""
        return self._undecided_since is not None and not self.ended

    def status(self, now: float) -> JobStatus:
        """Return how it is."""
        since = self._undecided_since
        if since is not None and not self.ended and now - since > _COMES_LATE:
            self._decide()
        if self._out_of_memory and not self.ended:
            return self._status._replace(reason="OOMKilled", message=self._about_memory())
        return self._status

    def start(self) -> None:
        """It has been started."""
        if not self.ended:
            self._status = self._status._replace(state=JobState.RUNNING)

    def hear(self, action: str, attributes: Mapping[str, str], now: float) -> None:
        """Take note of an event."""
        if self.ended:
            return
        if action == "start":
            self.start()
        elif action == "oom":
            self._out_of_memory = True
            if self._died is not None:
                self._decide()
        elif action == "kill":
            asked = {"9", "15", "SIGKILL", "SIGTERM", "KILL", "TERM"}
            self._signalled |= attributes.get("signal", "") in asked
        elif action == "die":
            with contextlib.suppress(ValueError):
                self._died = int(attributes.get("exitCode", ""))
            killed = self._died == 128 + signal.SIGKILL
            if not killed or not self._limit or self._signalled or self._out_of_memory:
                self._decide()
            else:
                self._undecided_since = now
        elif action == "destroy":
            self._decide()

    def killed(self) -> None:
        """It was removed at our request, and nothing was heard of its end."""
        if not self.ended:
            self._status = JobStatus(JobState.ENDED, -signal.SIGKILL, node=self._node)

    def miss(self, now: float) -> None:
        """It is not there any more, and nothing was heard of its end yet."""
        if not self.undecided:
            self._undecided_since = now

    def _decide(self) -> None:
        code = self._died
        if code is None:
            why = f"The container {self.name} is gone, and the engine does not say how it ended."
            self._status = JobStatus(JobState.ENDED, None, "NodeLost", self._node, why)
            return
        exit_code = 128 - code if 128 < code <= 128 + 64 else code
        reason, message = self._why(code)
        self._status = JobStatus(JobState.ENDED, exit_code, reason, self._node, message)

    def _why(self, code: int) -> tuple[str, str]:
        which = f"The container {self.name}"
        if self.ours or code == 0:
            return ("", "")
        if self._signalled:
            return "Deleted", (
                f"{which} was ended by somebody, with docker kill, docker stop, docker rm -f or "
                "the like, or because the engine was stopped."
            )
        if code == 128 + signal.SIGKILL and self._out_of_memory:
            return "OOMKilled", self._about_memory()
        if code == 128 + signal.SIGKILL:
            return "Killed", f"{which} was ended by SIGKILL, which the engine had not sent."
        if code == _NOT_FOUND:
            return "Error", (
                f"{which} ended with exit code {code}, as it does where a command is not found: is "
                f"{self._program} in the image {self._image}? The setting image names another."
            )
        if 128 < code <= 128 + 64:
            number = code - 128
            name = signal.Signals(number).name if number in _SIGNALS else f"signal {number}"
            return "Error", f"{which} was ended by {name}."
        return "Error", f"{which} ended with exit code {code}."

    def _about_memory(self) -> str:
        return (
            f"A process in the container {self.name} was killed because its memory limit, "
            f"{self._limit or 'that of the machine'}, was reached. Give it more with "
            "@fiber.meta(memory=...) or the setting mem_per_job."
        )


_SIGNALS = {int(number) for number in signal.Signals}
