"""A job of this backend, whichever way it runs, and what is known of it.

    batch, steps ─► told ─► Job.status ◄─ backend: status, wait

All of it is read and changed under the lock of the life it belongs to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

from fiber.backends.base import JobState, JobStatus
from fiber.backends.slurm.options import Needs

__all__ = ["WORTH_TELLING", "New", "SlurmJob", "tail"]

New = Callable[[Needs, int, Any], "list[SlurmJob]"]
"""Makes so many jobs that need the same, and are at home somewhere, with numbers in a row."""

WORTH_TELLING = 5.0
"""Seconds that a job may wait before anybody is told what for."""

_READ = 32 * 1024  # bytes from the end of a log


class SlurmJob:
    """See the module.

    Attributes:
        key: its number among the jobs of this process.
        needs: what it asked for.
        id: what Slurm calls it, as far as is known.
        status: how it is.
        log: the path of what it writes; empty as long as it is not known.
        unwanted: whether it was killed.
        home: the `Batch` or `Step` that it is of.
    """

    def __init__(self, key: int, needs: Needs, home: Any) -> None:
        self.key = key
        self.needs = needs
        self.id = f"{key} of this program"
        self.status = JobStatus(JobState.PENDING)
        self.log = ""
        self.unwanted = False
        self.home = home

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return self.status.state is JobState.ENDED

    def told(self, status: JobStatus) -> bool:
        """It is so now; what has ended stays so. Return whether that is new."""
        if self.ended or status == self.status:
            return False
        if status.state is JobState.ENDED and not status.node:
            status = status._replace(node=self.status.node)
        self.status = status
        return True

    def killed(self) -> None:
        """It is of no use to anybody any more."""
        self.unwanted = True
        self.told(JobStatus(JobState.ENDED, -9, "Killed", message="was killed"))

    def tidy(self, keep: bool) -> None:
        """Remove its log if there is nothing in it, or nothing that went wrong."""
        status = self.status
        failed = self.ended and not self.unwanted and status.exit_code != 0
        failed = failed or (self.ended and status.reason not in ("", "Killed", "Released"))
        if self.log:
            with contextlib.suppress(OSError):
                if os.path.getsize(self.log) == 0 or not (keep or failed):
                    os.unlink(self.log)


def tail(path: str, lines: int) -> str:
    """Return the last lines of a file, empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _READ))
            data = file.read()
    except OSError:
        return ""
    return "\n".join(data.decode(errors="replace").splitlines()[-lines:])
