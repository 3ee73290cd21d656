"""The protocol between Fiber and whatever starts its jobs.

    JobSpec ─► Backend.submit ─► Job ─► status, terminate, kill ─► JobStatus

A job is what the backend's manager runs: a process of this machine, a container, a pod. In it runs
Fiber's agent, which forks the processes that the user started. A backend knows commands,
environments and resources; it knows no socket, no pool and no pickle.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from fiber.resources import Resources

__all__ = ["Backend", "Job", "JobSpec", "JobState", "JobStatus"]


class JobState(enum.Enum):
    """Where a job is in its life."""

    PENDING = "pending"
    """Accepted by the manager, not running yet."""
    RUNNING = "running"
    """Its command has been started."""
    ENDED = "ended"
    """It will not run again: finished, failed, or taken away; the status says which."""
    UNKNOWN = "unknown"
    """The manager does not answer; the job may well be running."""


class JobStatus(NamedTuple):
    """What the manager says about a job.

    Attributes:
        state: where it is.
        exit_code: of its command, negative for a signal; None while it runs or if nobody knows.
        reason: one word for why it is there (`OOMKilled`, `Unschedulable`), empty if there is none.
        node: the machine that it runs on.
        message: a sentence for people, perhaps with the last lines of its log.
    """

    state: JobState
    exit_code: int | None = None
    reason: str = ""
    node: str = ""
    message: str = ""


class JobSpec(NamedTuple):
    """What to run.

    Attributes:
        name: for people, need not be unique.
        command: program and arguments; nothing secret.
        environment: the whole environment of the command.
        resources: what it asks for.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    resources: Resources


class Job(Protocol):
    """A job that was submitted."""

    @property
    def id(self) -> str:
        """What the manager calls it."""


class Backend(Protocol):
    """Starts jobs and says how they are. Calls return quickly; none waits for a job."""

    name: str

    def submit(self, specs: Sequence[JobSpec]) -> Sequence[Job]:
        """Start a job for each spec, in one call; raises `StartError` if they cannot be."""

    def status(self, job: Job) -> JobStatus:
        """Return how `job` is now."""

    def terminate(self, job: Job) -> None:
        """Ask `job` to end; one that has ended is left alone."""

    def kill(self, job: Job) -> None:
        """End `job` at once; one that has ended is left alone."""
