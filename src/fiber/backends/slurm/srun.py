"""One srun: its tasks, each of which keeps a job, and what it says.

    Steps ─ tell, close ─► srun ─► standard input of all keepers
    Steps ◄─ said, over, verdict ─ srun, squeue

The words of srun are read here; what follows from them is in `steps`.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import NamedTuple

from fiber.backends.base import JobState, JobStatus
from fiber.backends.slurm import commands, states
from fiber.backends.slurm.jobs import SlurmJob
from fiber.backends.slurm.options import Needs

__all__ = ["Described", "Slot", "Step", "cpus", "numbers", "of_task"]

TOO_LARGE = "Requested node configuration is not available"
TASKS = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+)$")
NODE = re.compile(r"^srun: error: Node failure on (\S+)")
BUSY = re.compile(r"^srun: (?:error: )?Job \d+ step creation temporarily disabled.*?\((.*)\)")
QUEUED = re.compile(r"^srun: job (\d+) queued and waiting for resources")


class Slot:
    """A task of a step.

    Attributes:
        job: that it keeps; None if it is free.
        node: that it is on; empty as long as it is not there.
        dead: whether there is no keeper any more.
        left: when and how its job ended as Slurm sent it SIGTERM, until it is known why.
    """

    def __init__(self, job: SlurmJob) -> None:
        self.job: SlurmJob | None = job
        self.node = ""
        self.dead = False
        self.left: tuple[float, JobStatus] | None = None


class Described(NamedTuple):
    """Jobs that a file in the shared folder describes, from a place in it on."""

    path: str
    jobs: Sequence[SlurmJob]
    place: int


class Step:
    """One srun. All of it under the lock.

    Attributes:
        needs: of each task.
        described: what it was begun with.
        slots: its tasks.
        allocation: the job that it is a step of, as far as is known.
        own: whether the allocation is its own.
        said: the end of srun's standard error.
        over: when srun has ended; None while it has not.
        since: when it was first tried.
        doubted: when squeue was first wanted to say how its allocation has ended.
        verdict: what it said.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], needs: Needs, described: Described, own: bool
    ) -> None:
        self.process = process
        self.needs = needs
        self.described = described
        self.slots = [Slot(job) for job in described.jobs]
        self.allocation = ""
        self.number = ""
        self.own = own
        self.said = ""
        self.over: float | None = None
        self.overlap = False
        self.since = time.monotonic()
        self.closing = False
        self.doubted = 0.0
        self.verdict: JobStatus | None = None
        self.buffers = {process.stdout: b"", process.stderr: b""}
        self.idle_since: float | None = None

    @property
    def here(self) -> bool:
        """Whether its tasks have begun."""
        return any(slot.node for slot in self.slots)

    def tell(self, *words: object) -> None:
        """Say something to the keepers, who listen as soon as they are there."""
        assert self.process.stdin is not None
        line = "\t".join(map(str, words)) + "\n"
        with contextlib.suppress(OSError, ValueError):  # it has ended, and that will be noticed
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()

    def close(self) -> None:
        """Let the keepers end, and srun with them."""
        self.closing = True
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if not self.here:  # nobody reads that yet
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)


def cpus(text: str) -> list[int]:
    """Return the CPUs of each node, of what Slurm says as "2(x3),1"."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            found += [int(match[1])] * int(match[2] or 1)
    return found


def numbers(text: str) -> list[int]:
    """Return the numbers of a list such as "0-2,5"."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            found += range(int(first), int(last if last.isdecimal() else first) + 1)
    return found


def of_task(words: str, step: Step) -> JobStatus:
    """Return how a task has ended, in the words of srun."""
    if "Out Of Memory" in words:
        return JobStatus(JobState.ENDED, None, "OOMKilled", message=states.oom(step.needs))
    if "Killed" in words:
        return JobStatus(JobState.ENDED, -9, "Signal", message="its keeper was killed")
    said = [line for line in step.said.splitlines() if not TASKS.match(line)]
    why = commands.plain("\n".join(said[-2:]))
    message = f"its keeper ended: {words}" + (f": {why}" if why else "")
    return JobStatus(JobState.ENDED, None, "KeeperEnded", message=message)
