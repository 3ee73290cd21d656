"""The protocol between Fiber and whatever starts its jobs.

    JobSpec ─► Backend.submit ─► Job ─► status, wait, logs ─► JobStatus
                                    └─► terminate, kill

A job is what the backend's manager runs: a process of this machine, a container, a pod. In it runs
Fiber's agent, which forks the processes that the user started. A backend knows commands,
environments and resources; it knows no pool and no pickle.

Every call takes many jobs, for a manager is asked once and not once for each. Calls may block while
the manager answers, so Fiber makes them from a thread of its own; they may come from several
threads at once.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from fiber.resources import Resources

__all__ = [
    "BLAMELESS",
    "SECRET_FILE",
    "Backend",
    "Job",
    "JobSpec",
    "JobState",
    "JobStatus",
    "Sharing",
    "share",
]

SECRET_FILE = "FIBER_INTERNAL_SECRET_FILE"
"""The variable by which a backend tells a job in which file its secret is."""

BLAMELESS = frozenset({"Deleted", "Evicted", "NodeLost", "Preempted", "Requeued", "Shutdown"})
"""Reasons for a job's end that its own work has nothing to do with: no task is charged for them."""


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
        node: the machine that it runs on, empty if there is no other than this one.
        message: a sentence for people that says more than the reason, and what to do.
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
        environment: variables of the command, added to those that it has anyway where it runs; on
            the local backend the whole environment. Nothing secret.
        resources: what each of its processes asks for.
        session: identifies the session that it belongs to, for labels; letters, digits and dashes.
        secret: what only the job may know; the backend puts it into a file that nobody else can
            read and names the file in the variable `SECRET_FILE`. Empty if there is none.
        processes: how many will share it, so that it asks for so many times as much.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    resources: Resources
    session: str = ""
    secret: bytes = b""
    processes: int = 1


class Job(Protocol):
    """A job that was submitted."""

    @property
    def id(self) -> str:
        """What the manager calls it: the name of a container or pod, a process ID."""


class Backend(Protocol):
    """Starts jobs and says how they are.

    Attributes:
        name: what configuration and contexts call it.
        elsewhere: whether its jobs run apart from this process, so that they see neither its files
            nor its sockets, and get Fiber, the program and the secret from its master.
        python: the command that runs Python in a job.
    """

    name: str
    elsewhere: bool
    python: Sequence[str]

    def submit(self, specs: Sequence[JobSpec]) -> Sequence[Job]:
        """Start a job for each spec, in one call, and return them in their order.

        What the manager refuses for now (a quota, an outage) is tried again: the job is pending
        until then, and its status says why.

        Raises:
            StartError: they cannot be started; the message says why and what to do. None of them
                is left behind.
        """

    def status(self, jobs: Sequence[Job]) -> Sequence[JobStatus]:
        """Return how `jobs` are, in their order, as far as is known now.

        A backend that asks its manager now and then has it asked anew soon: whoever calls this has
        reason to think that something has happened.
        """

    def wait(self, jobs: Sequence[Job], timeout: float) -> Sequence[JobStatus]:
        """Wait until one of `jobs` has ended, at most `timeout` seconds; return how they are."""

    def terminate(self, jobs: Sequence[Job]) -> None:
        """Ask `jobs` to end, as by SIGTERM; those that have ended are left alone."""

    def kill(self, jobs: Sequence[Job]) -> None:
        """End `jobs` at once, and remove what the manager keeps of them; none need be there.

        Their statuses can still be asked for.
        """

    def logs(self, job: Job, lines: int = 20) -> str:
        """Return the last lines that `job` wrote, empty if it wrote none or nobody knows."""

    def addresses(self, port: int) -> Sequence[str]:
        """Return where jobs reach what listens on `port` of this process, as HOST:PORT.

        Jobs try them in turn, so the best comes first. It may take seconds, and start what is
        needed for it.

        Raises:
            StartError: there is no way; the message says why and what to do.
        """

    def close(self) -> None:
        """The session has ended: remove all that the manager still has of it."""


@runtime_checkable
class Sharing(Protocol):
    """What a backend may have besides: it knows how many workers of a pool should share a job."""

    def share(self, resources: Resources, workers: int) -> int:
        """Return how many of `workers`, each with `resources`, should share a job.

        Asked where the user did not say. It may take a moment and raises nothing: 1 will always do.
        """


def share(backend: Backend, resources: Resources, workers: int) -> int:
    """Return how many workers of a pool should share a job of `backend`."""
    return backend.share(resources, workers) if isinstance(backend, Sharing) else 1
