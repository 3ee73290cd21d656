"""The Slurm backend: see the package.

    submit ─► specs that need the same ─┬─► Batch, from a login node
                                        └─► Steps, in an allocation; or with one of their own
    close ─► cancels all by its name; `janitor` does, if this process is killed

What a process has in Slurm is its *life*: it begins with the first use and ends with `close`. All
of it has one name, by which one question or one command is for all.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence

from fiber.backends.base import Job, JobSpec, JobState, JobStatus
from fiber.backends.slurm import commands, detect, network, options, shared, sharing, states
from fiber.backends.slurm.batch import Batch
from fiber.backends.slurm.jobs import SlurmJob, tail
from fiber.backends.slurm.options import Needs
from fiber.backends.slurm.poller import Poller
from fiber.backends.slurm.steps import Steps
from fiber.config import config
from fiber.errors import StartError
from fiber.resources import Resources

__all__ = ["SlurmBackend"]

_AWAY = 5.0  # seconds of silence after which nothing is known of what runs
_CLOSE = 15.0  # seconds to cancel what there is; after that it is the janitor's work


class SlurmBackend:
    """Starts jobs through Slurm."""

    name = "slurm"
    elsewhere = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: _Life | None = None
        _backends.add(self)

    @property
    def python(self) -> Sequence[str]:
        """The command that runs Python on a node: by default the one that runs here."""
        return shared.python()

    def share(self, resources: Resources, workers: int) -> int:
        """Return how many workers of a pool should share a job: several in the mode `pool`."""
        return sharing.share(resources, workers) if _mode() == "pool" else 1

    def submit(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Have jobs started: one call of Slurm for all that need the same."""
        return list(self._life(specs).submit(specs)) if specs else []

    def status(self, jobs: Sequence[Job]) -> list[JobStatus]:
        """Return what is known; Slurm is asked again soon."""
        return self._statuses([_ours(job) for job in jobs], hurry=True)

    def wait(self, jobs: Sequence[Job], timeout: float) -> list[JobStatus]:
        """Wait until one of the jobs has ended."""
        ours = [_ours(job) for job in jobs]
        life = self._current
        if life is not None:
            with life.lock:
                life.lock.wait_for(lambda: any(job.ended for job in ours), timeout)
        return self._statuses(ours, hurry=False)

    def _statuses(self, jobs: Sequence[SlurmJob], *, hurry: bool) -> list[JobStatus]:
        life = self._current
        if life is None:
            return [job.status for job in jobs]
        if hurry and not all(job.ended for job in jobs):
            life.poller.hurry()
        with life.lock:
            return [life.status(job) for job in jobs]

    def terminate(self, jobs: Sequence[Job]) -> None:
        """Send SIGTERM to the commands."""
        for home, ours in _by_home(jobs):
            home.terminate(ours)
        self._hurry()

    def kill(self, jobs: Sequence[Job]) -> None:
        """Kill the commands, and cancel what waits."""
        for home, ours in _by_home(jobs):
            home.kill(ours)
        life = self._current
        if life is not None:
            for job in jobs:
                _ours(job).tidy(life.keep_logs)

    def _hurry(self) -> None:
        life = self._current
        if life is not None:
            life.poller.hurry()

    def logs(self, job: Job, lines: int = 20) -> str:
        """Return the last lines of the job's log."""
        path = _ours(job).log
        return tail(path, lines) if path else ""

    def addresses(self, port: int) -> list[str]:
        """Return where jobs reach this machine."""
        return [f"{host}:{port}" for host in network.hosts()]

    def close(self) -> None:
        """End all jobs."""
        with self._lock:
            life, self._current = self._current, None
        if life is not None:
            life.close()

    def _life(self, specs: Sequence[JobSpec]) -> _Life:
        with self._lock:
            if self._current is None:
                self._current = _Life(specs[0].name)
            return self._current

    def _forget(self) -> None:
        """After `os.fork`, in the child: threads and jobs are the parent's."""
        self._lock = threading.Lock()
        life, self._current = self._current, None
        if life is not None:
            life.forget()


class _Life:
    """What this process has in Slurm.

    Args:
        name: of the program, for people.

    Raises:
        StartError: it cannot have anything; the message says why.
    """

    def __init__(self, name: str) -> None:
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-")[:40] or "program"
        self._name = f"fiber-{slug}-{os.urandom(4).hex()}"
        self.lock = threading.Condition()
        self._jobs: list[SlurmJob] = []
        self._keys = itertools.count(1)
        self._closed = False
        mode = _mode()
        if mode == "step" and not detect.in_allocation():
            raise StartError(
                "slurm_mode is 'step', which needs an allocation, and this process is in none: run "
                "it under `sbatch` or `salloc`, or set slurm_mode to 'auto', 'batch' or 'pool'."
            )
        folder = os.path.abspath(os.path.expanduser(config.slurm_log_folder or os.curdir))
        self.keep_logs = config.slurm_log_folder is not None
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise StartError(
                f"The folder {folder} for the logs of jobs cannot be made: {error.strerror}. Set "
                "slurm_log_folder to another one."
            ) from error
        self._shared = shared.Shared()
        try:
            self._janitor = _Janitor(self._name, self._shared.path)
        except OSError as error:
            self._shared.remove()
            raise StartError(
                f"The process that cleans up after this one cannot be started: {error.strerror}"
            ) from error
        self.poller = Poller(self._name, self._take, self._idle)
        self._home: Batch | Steps
        if mode == "batch":
            self._home = Batch(self._name, self._shared, folder, self.lock, lambda: self._closed)
        else:
            allocation = os.environ["SLURM_JOB_ID"] if mode == "step" else ""
            self._home = Steps(
                self._name,
                self._shared,
                folder,
                self.lock,
                allocation,
                self._janitor.remember,
                self.poller.hurry,
            )

    def submit(self, specs: Sequence[JobSpec]) -> list[SlurmJob]:
        groups: dict[Needs, list[int]] = {}
        for place, spec in enumerate(specs):
            groups.setdefault(options.needs(spec), []).append(place)
        jobs: dict[int, SlurmJob] = {}
        try:
            for places in groups.values():
                made = self._home.submit([specs[place] for place in places], self._new)
                jobs.update(zip(places, made, strict=True))
        except BaseException:
            self._home.kill(list(jobs.values()))
            raise
        self.poller.hurry()
        return [jobs[place] for place in range(len(specs))]

    def _new(self, needs: Needs, count: int, home: Batch | Steps) -> list[SlurmJob]:
        jobs = [SlurmJob(next(self._keys), needs, home) for _ in range(count)]
        self._jobs += jobs
        return jobs

    def status(self, job: SlurmJob) -> JobStatus:
        """Return how a job is. Under the lock."""
        away = self.poller.away
        blind = isinstance(self._home, Batch) and away and time.monotonic() - away[0] > _AWAY
        if job.ended or not blind or away is None:
            return job.status
        message = f"Slurm's controller does not answer: {away[1]}"
        return JobStatus(JobState.UNKNOWN, None, "Unreachable", job.status.node, message)

    def _idle(self) -> bool:
        return self._home.idle

    def _take(self, rows: list[states.Row] | None) -> bool:
        with self.lock:
            new = self._home.update(rows) if rows is not None else False
            self.lock.notify_all()
        if rows is not None and isinstance(self._home, Batch):
            self._home.finish()
        return new

    def close(self) -> None:
        self._closed = True
        with self.lock:
            mine = [job for job in self._jobs if not job.ended]
        if isinstance(self._home, Batch):
            self._home.kill(mine)
        else:
            self._home.close()
        clean = not self._home.answered or self._cancel()
        self.poller.close()
        for job in self._jobs:
            job.tidy(self.keep_logs)
        if clean:
            self._shared.remove()
            self._janitor.dismiss()
        else:
            self._janitor.leave()

    def _cancel(self) -> bool:
        """Cancel what is left; return whether that was possible."""
        which = (f"--user={os.getuid()}", f"--name={self._name}")
        try:
            with contextlib.suppress(commands.Refused, commands.Away):
                commands.run("scancel", *which, *commands.KILL, timeout=commands.MOMENT)
            with contextlib.suppress(commands.Refused):
                commands.run("scancel", *which, timeout=_CLOSE)
        except (commands.Away, StartError):
            return False
        return True

    def forget(self) -> None:
        self._janitor.leave()


def _mode() -> str:
    if config.slurm_mode != "auto":
        return config.slurm_mode
    return "step" if detect.in_allocation() else "batch"


class _Janitor:
    """The process that cleans up when this one is killed."""

    def __init__(self, name: str, folder: str) -> None:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "janitor.py")
        null = subprocess.DEVNULL
        # In a session of its own, that of Unix: a signal to the program's group is not for it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", path, name, folder, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=null,
            stderr=null,
            cwd="/",
            env=commands.environment(),
            start_new_session=True,
        )

    def remember(self, pid: int) -> None:
        """There is an srun to be ended, too."""
        self._say(f"step {pid}\n")

    def dismiss(self) -> None:
        """All is clean: end it."""
        self._say("bye\n")
        self._close()
        self._process.wait()

    def leave(self) -> None:
        """Let it do what this process, which ends, could not."""
        self._close()
        self._process.returncode = 0  # or there would be a warning that it still runs

    def _say(self, what: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(what.encode())
            self._process.stdin.flush()

    def _close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()


def _ours(job: Job) -> SlurmJob:
    assert isinstance(job, SlurmJob)
    return job


def _by_home(jobs: Sequence[Job]) -> list[tuple[Batch | Steps, list[SlurmJob]]]:
    found: dict[Batch | Steps, list[SlurmJob]] = {}
    for job in map(_ours, jobs):
        if not job.ended:
            found.setdefault(job.home, []).append(job)
    return list(found.items())


_backends: weakref.WeakSet[SlurmBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_backends):
        backend._forget()


os.register_at_fork(after_in_child=_after_fork)
