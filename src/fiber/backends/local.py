"""The local backend: a job is a process of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from fiber.backends.base import SECRET_FILE, Job, JobSpec, JobState, JobStatus
from fiber.errors import StartError

__all__ = ["LocalBackend", "LocalJob"]

_LOOK_AGAIN = 0.005  # seconds


class LocalJob:
    """A process of this machine."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.secret: str | None = None
        """Path of the file that its secret is in."""

    @property
    def id(self) -> str:
        """Its process ID."""
        return str(self.process.pid)


class LocalBackend:
    """Starts jobs as processes; their standard streams are those of the caller."""

    name = "local"
    elsewhere = False
    python: Sequence[str] = (sys.executable,)

    def submit(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Start a process for each spec."""
        jobs: list[Job] = []
        try:
            jobs.extend(self._start(spec) for spec in specs)
        except StartError:
            self.kill(jobs)
            raise
        return jobs

    def _start(self, spec: JobSpec) -> Job:
        environment = dict(spec.environment)
        secret = _write_secret(spec.secret) if spec.secret else None
        if secret is not None:
            environment[SECRET_FILE] = secret
        # A Ctrl-C while the interpreter starts would make it print a traceback of its own; the
        # agent unblocks it when it has said what it does with it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                list(spec.command), env=environment, stdin=subprocess.DEVNULL
            )
        except OSError as error:
            _remove(secret)
            raise StartError(
                f"{spec.name} cannot be started with {spec.command[0]}: {error.strerror}"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        job = LocalJob(process)
        job.secret = secret
        return job

    def status(self, jobs: Sequence[Job]) -> list[JobStatus]:
        """Return whether the processes run, and the exit codes of those that do not."""
        return [_status(job) for job in jobs]

    def wait(self, jobs: Sequence[Job], timeout: float) -> list[JobStatus]:
        """Wait until one of the processes has ended."""
        deadline = time.monotonic() + timeout
        while True:
            statuses = self.status(jobs)
            ended = any(status.state is JobState.ENDED for status in statuses)
            if ended or time.monotonic() >= deadline:
                return statuses
            time.sleep(_LOOK_AGAIN)

    def terminate(self, jobs: Sequence[Job]) -> None:
        """Send SIGTERM."""
        for job in jobs:
            _local(job).process.terminate()

    def kill(self, jobs: Sequence[Job]) -> None:
        """Send SIGKILL and collect the processes."""
        for job in jobs:
            _local(job).process.kill()
        for job in jobs:
            _local(job).process.wait()
            _status(job)

    def logs(self, job: Job, lines: int = 20) -> str:
        """Return nothing: what a process writes goes where the caller's output goes."""
        return ""

    def addresses(self, port: int) -> list[str]:
        """Return the loopback address."""
        return [f"127.0.0.1:{port}"]

    def close(self) -> None:
        """Do nothing: processes that have ended leave nothing."""


def _local(job: Job) -> LocalJob:
    assert isinstance(job, LocalJob)
    return job


def _status(job: Job) -> JobStatus:
    local = _local(job)
    code = local.process.poll()
    if code is None:
        return JobStatus(JobState.RUNNING)
    _remove(local.secret)
    local.secret = None
    return JobStatus(JobState.ENDED, exit_code=code)


def _write_secret(secret: bytes) -> str:
    import tempfile  # not needed to import Fiber, and slow

    fd, path = tempfile.mkstemp(prefix="fiber-secret-")  # for this user only
    with open(fd, "wb") as file:
        file.write(secret)
    return path


def _remove(path: str | None) -> None:
    if path is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
