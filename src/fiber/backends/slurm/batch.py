"""Batch jobs: what is asked for in one call is one array for all that need the same.

    submit ─► description in the shared folder ─► sbatch --array ─► 17_0, 17_1, ...
    rows of squeue ─► update ─► SlurmJob ◄─ finish ◄─ sacct, for what squeue has forgotten
    terminate, kill ─► one scancel for all

The script becomes a keeper, which runs the command and passes on to it, and to nobody else, what
Slurm sends as a warning.
"""

from __future__ import annotations

import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence

from fiber.backends.base import JobSpec, JobState, JobStatus
from fiber.backends.slurm import commands, options, states
from fiber.backends.slurm.jobs import WORTH_TELLING, New, SlurmJob, tail
from fiber.backends.slurm.shared import Shared
from fiber.errors import StartError

__all__ = ["Batch"]

_OUTAGE = 120.0  # seconds that a controller may be away that was there before
_AGAIN = 1.0  # seconds
_FORGOTTEN = 15.0  # seconds after which Slurm should know of a job that it has accepted
_MOST = 500  # jobs of one array: sites allow a thousand, or less
_ARGUMENTS = 500  # jobs that one scancel is given
_ACCOUNTING = 10.0  # seconds that sacct may take


class Batch:
    """See the module.

    Args:
        name: of all jobs.
        shared: the folder for what they have to know.
        folder: for their logs.
        lock: of all that is known of jobs.
        closed: whether it is all over.
    """

    def __init__(
        self,
        name: str,
        shared: Shared,
        folder: str,
        lock: threading.Condition,
        closed: Callable[[], bool],
    ) -> None:
        self._name = name
        self._shared = shared
        self._folder = folder
        self._lock = lock
        self._closed = closed
        self._jobs: dict[str, SlurmJob] = {}  # by what squeue calls them; not those that ended
        self._since: dict[str, float] = {}
        self._doomed: list[str] = []
        self._forgotten: list[str] = []
        self.answered = False
        """Whether the controller has accepted anything."""

    @property
    def idle(self) -> bool:
        """Whether nothing is open."""
        return not self._jobs and not self._doomed

    def submit(self, specs: Sequence[JobSpec], new: New) -> list[SlurmJob]:
        """Have jobs started for specs that need the same; `new` makes what stands for them."""
        jobs: list[SlurmJob] = []
        try:
            for start in range(0, len(specs), _MOST):
                jobs += self._submit(specs[start : start + _MOST], new)
        except BaseException:
            self.kill(jobs)
            raise
        return jobs

    def _submit(self, specs: Sequence[JobSpec], new: New) -> list[SlurmJob]:
        wanted = options.needs(specs[0])
        count = len(specs)
        log = os.path.join(self._folder, "fiber-%A_%a.log" if count > 1 else "fiber-%j.log")
        command = self._shared.keeper("run", self._shared.describe(specs))
        script = f"#!/bin/sh\nexec {shlex.join(command)}\n"
        number = self._sbatch(options.batch(self._name, wanted, log, count), script)
        now = time.monotonic()
        with self._lock:
            jobs = new(wanted, count, self)
            for place, job in enumerate(jobs):
                job.id = f"{number}_{place}" if count > 1 else number
                job.log = log.replace("%A_%a", job.id).replace("%j", job.id)
                self._jobs[job.id] = job
                self._since[job.id] = now
        return jobs

    def _sbatch(self, arguments: list[str], script: str) -> str:
        deadline = time.monotonic() + _OUTAGE
        while True:
            try:
                told = commands.run("sbatch", *arguments, text=script)
            except commands.Refused as error:
                raise StartError(
                    f"Slurm does not accept the job: {commands.plain(str(error))}. See the "
                    "settings that begin with slurm_, and cpu_per_job and mem_per_job."
                ) from error
            except commands.Away as error:
                if time.monotonic() > deadline or self._closed() or not self.answered:
                    raise StartError(
                        f"Slurm's controller does not answer: {commands.plain(str(error))}. See "
                        "`scontrol ping`."
                    ) from error
                time.sleep(_AGAIN)
            else:
                self.answered = True
                return told.strip().partition(";")[0]  # JOB;CLUSTER where there are several

    def update(self, rows: Sequence[states.Row]) -> bool:
        """Take what squeue says, all that Slurm knows. Under the lock; return whether it is new."""
        found = {row.key: row for row in rows}
        waiting: dict[str, list[SlurmJob]] = {}
        new = False
        for key, job in list(self._jobs.items()):
            row = found.get(key)
            if row is None:
                if time.monotonic() - self._since[key] < _FORGOTTEN:
                    continue
                self._forgotten.append(key)
                continue
            status = states.status(row, job.needs, tail(job.log, 5) if row.over else "")
            if status.reason in ("Requeued", "Unschedulable"):
                self._doomed.append(key)
            if status.state is JobState.PENDING and status.reason:
                if time.monotonic() - self._since[key] < WORTH_TELLING:
                    continue
                waiting.setdefault(status.reason, []).append(job)
                continue
            new = self._tell(job, status) or new
        for reason, jobs in waiting.items():
            message = states.waits(jobs[0].id, reason, len(jobs), len(self._jobs))
            for job in jobs:
                new = job.told(JobStatus(JobState.PENDING, None, reason, "", message)) or new
        return new

    def _tell(self, job: SlurmJob, status: JobStatus) -> bool:
        """A job is so now: return whether that is new."""
        if status.state is JobState.ENDED and status.exit_code in (126, 127):
            said = tail(job.log, 1)
            status = status._replace(message=f"{status.message}: {said}" if said else said)
        new = job.told(status)
        if job.ended:
            self._forget(job)
        return new

    def finish(self) -> None:
        """Do what is left of an update, and takes a command. Not under the lock."""
        if self._doomed:
            self._cancel([])
        forgotten, self._forgotten = self._forgotten, []
        for some in _groups(forgotten):
            found = {row.key: row for row in self._accounted(some) if row.over}
            with self._lock:
                for key in some:
                    job = self._jobs.get(key)
                    if job is not None and key in found:
                        self._tell(job, states.verdict(found[key], job.needs, tail(job.log, 5)))
                    elif job is not None:
                        message = "has ended, and Slurm knows nothing of it any more"
                        self._tell(job, JobStatus(JobState.ENDED, None, "Forgotten", "", message))
                self._lock.notify_all()

    def _accounted(self, keys: Sequence[str]) -> list[states.Row]:
        """Return what Slurm's accounting says of jobs: nothing, where there is none."""
        which = (f"--jobs={','.join(keys)}", f"--name={self._name}")
        form = ("--noheader", "--parsable2", "--allocations", f"--format={states.ACCOUNTING}")
        try:
            return states.parse_accounting(
                commands.run("sacct", *form, *which, timeout=_ACCOUNTING)
            )
        except (commands.Away, commands.Refused, StartError):
            return []

    def _forget(self, job: SlurmJob) -> None:
        self._jobs.pop(job.id, None)
        self._since.pop(job.id, None)

    def terminate(self, jobs: Sequence[SlurmJob]) -> None:
        """Send SIGTERM to the commands; those that wait are cancelled."""
        with self._lock:
            waiting = [job.id for job in jobs if job.status.state is JobState.PENDING]
            running = [job.id for job in jobs if not job.ended and job.id not in waiting]
        for some in _groups(running):
            _try("scancel", "--batch", "--signal=TERM", *some)
        for some in _groups(waiting):
            _try("scancel", *some)

    def kill(self, jobs: Sequence[SlurmJob]) -> None:
        """End them at once."""
        with self._lock:
            todo = [job for job in jobs if not job.ended]
            for job in todo:
                job.killed()
                self._forget(job)
            self._lock.notify_all()
        if todo:
            self._cancel([job.id for job in todo])

    def _cancel(self, keys: Sequence[str]) -> None:
        """Have Slurm end jobs; later, if it does not answer."""
        with self._lock:
            todo, self._doomed = [*self._doomed, *keys], []
        for some in _groups(todo):
            _try("scancel", *commands.KILL, *some, timeout=commands.MOMENT)
            if not _try("scancel", *some):
                with self._lock:
                    self._doomed += some


def _groups(keys: Sequence[str]) -> list[Sequence[str]]:
    return [keys[start : start + _ARGUMENTS] for start in range(0, len(keys), _ARGUMENTS)]


def _try(*command: str, timeout: float = commands.PATIENCE) -> bool:
    """Run a command about jobs that may have ended; return whether Slurm was there."""
    try:
        commands.run(*command, timeout=timeout)
    except commands.Refused:
        pass
    except commands.Away:
        return False
    return True
