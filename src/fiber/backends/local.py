"""The local backend: a job is a process of this machine."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from fiber.backends.base import Job, JobSpec, JobState, JobStatus
from fiber.errors import StartError

__all__ = ["LocalBackend", "LocalJob"]


class LocalJob:
    """A process of this machine."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    @property
    def id(self) -> str:
        """Its process ID."""
        return str(self.process.pid)


class LocalBackend:
    """Starts jobs as processes; their standard streams are those of the caller."""

    name = "local"

    def submit(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Start a process for each spec."""
        return [self._start(spec) for spec in specs]

    def _start(self, spec: JobSpec) -> Job:
        # A Ctrl-C while the interpreter starts would make it print a traceback of its own; the
        # agent unblocks it when it has said what it does with it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                list(spec.command), env=dict(spec.environment), stdin=subprocess.DEVNULL
            )
        except OSError as error:
            raise StartError(
                f"{spec.name} cannot be started with {spec.command[0]}: {error.strerror}"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return LocalJob(process)

    def status(self, job: Job) -> JobStatus:
        """Return whether the process runs, and its exit code once it does not."""
        code = _process(job).poll()
        if code is None:
            return JobStatus(JobState.RUNNING)
        return JobStatus(JobState.ENDED, exit_code=code)

    def terminate(self, job: Job) -> None:
        """Send SIGTERM."""
        _process(job).terminate()

    def kill(self, job: Job) -> None:
        """Send SIGKILL and collect the process."""
        process = _process(job)
        process.kill()
        process.wait()


def _process(job: Job) -> subprocess.Popen[bytes]:
    assert isinstance(job, LocalJob)
    return job.process
