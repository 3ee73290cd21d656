"""Steps: what is asked for in one call is one `srun`, each of whose tasks keeps a job.

    submit ─┬─ a keeper that is free ◄─ "start" ─ srun's standard input: heard by all tasks
            └─ srun -n N ─► N keepers, in this allocation or in one of its own
    keepers ─ "here", "started", "ended" ─► srun's standard output ─► thread ─► SlurmJob
    srun's standard error ─► why it waits, why a task or all of it has ended

So hundreds of workers cost one wait in the queue and one call, and one that has to be replaced
costs none. One thread reads from all of them.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fiber.backends.base import JobSpec, JobState, JobStatus
from fiber.backends.slurm import commands, detect, options, srun, states
from fiber.backends.slurm.jobs import WORTH_TELLING, New, SlurmJob
from fiber.backends.slurm.options import Needs
from fiber.backends.slurm.shared import Shared
from fiber.backends.slurm.srun import Described, Slot, Step, cpus, numbers, of_task
from fiber.errors import StartError

__all__ = ["Steps"]

_IDLE = 3.0  # seconds for which a step stays whose keepers have nothing to keep
_LOOK = 1.0  # seconds
_END = 3.0  # seconds that keepers have to end when their input does
_OUTAGE = 120.0  # seconds for which a controller is asked again that was there before
_AGAIN = 1.0  # seconds
_WORDS = 16 * 1024  # of srun's standard error, that are kept
_VERDICT = 4.0  # seconds in which squeue should say how an allocation has ended


class Steps:
    """See the module.

    Args:
        name: of steps and allocations.
        shared: the folder for what keepers have to know.
        folder: for the logs of jobs.
        lock: of all that is known of jobs.
        allocation: that we are in; empty if each step gets one of its own.
        started: called with the process of each srun.
        hurry: called when squeue should be asked.
    """

    def __init__(
        self,
        name: str,
        shared: Shared,
        folder: str,
        lock: threading.Condition,
        allocation: str,
        started: Callable[[int], object],
        hurry: Callable[[], object],
    ) -> None:
        self._name = name
        self._shared = shared
        self._folder = folder
        self._lock = lock
        self._allocation = allocation
        self._started = started
        self._hurry = hurry
        self._steps: list[Step] = []
        self._slots: dict[int, tuple[Step, Slot]] = {}  # by the numbers of their jobs
        self._selector = selectors.DefaultSelector()
        self._bell, self._ring = os.pipe()
        os.set_blocking(self._ring, False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._later: list[tuple[float, Step]] = []
        self.answered = False
        """Whether Slurm has given us an allocation, or room in one."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fiber-slurm-steps", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether squeue can tell nothing of interest: no allocation of ours waits or has ended."""
        return not any(step.own and (not step.here or step.doubted) for step in self._steps)

    # Jobs

    def submit(self, specs: Sequence[JobSpec], new: New) -> list[SlurmJob]:
        """Have jobs started for specs that need the same; `new` makes what stands for them."""
        wanted = options.needs(specs[0])
        rest = list(specs)
        with self._lock:
            jobs = self._reuse(rest, wanted, new)
        del rest[: len(jobs)]
        try:
            while rest:
                with self._lock:
                    count, overlap = self._room(len(rest), wanted)
                    jobs += self._start(rest[:count], wanted, new, overlap)
                del rest[:count]
        except BaseException:
            self.kill(jobs)
            raise
        return jobs

    def _reuse(self, specs: Sequence[JobSpec], wanted: Needs, new: New) -> list[SlurmJob]:
        free = [
            (step, number)
            for step in self._steps
            if step.needs == wanted and step.over is None and not step.closing
            for number, slot in enumerate(step.slots)
            if slot.node and slot.job is None and not slot.dead
        ][: len(specs)]
        if not free:
            return []
        jobs = new(wanted, len(free), self)
        path = self._describe(specs[: len(free)], jobs)
        for place, (job, (step, number)) in enumerate(zip(jobs, free, strict=True)):
            slot = step.slots[number]
            slot.job = job
            step.idle_since = None
            self._slots[job.key] = step, slot
            self._named(step, number, job)
            step.tell(number, "start", job.key, os.path.basename(path), place)
        return jobs

    def _describe(self, specs: Sequence[JobSpec], jobs: Sequence[SlurmJob]) -> str:
        log = os.path.join(self._folder, "fiber-%j-%k.log")
        return self._shared.describe(specs, log, jobs[0].needs.memory, jobs[0].key)

    def _room(self, count: int, wanted: Needs) -> tuple[int, bool]:
        """Return how many tasks the next step has, and whether it shares CPUs with others.

        As many as are free have CPUs for themselves. The others share, for they may well be what
        the first ones wait for, as a manager is.
        """
        if not self._allocation:
            return count, False
        nodes = cpus(os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
        most = sum(cpus // wanted.cpus for cpus in nodes)
        if not nodes:
            return count, detect.in_step()
        if not most:
            raise StartError(
                f"A process asks for {wanted.cpus} CPUs, and no node of this allocation has more "
                f"than {max(nodes)} of them: ask for less with @fiber.meta(cpu=...) or "
                "cpu_per_job, or for a larger allocation."
            )
        used = sum(
            step.needs.cpus * sum(not slot.dead for slot in step.slots)
            for step in self._steps
            if step.over is None
        )
        free = most - -(-used // wanted.cpus)
        if detect.in_step() or free <= 0:
            return min(count, most), True
        return min(count, free), False

    def _start(
        self, specs: Sequence[JobSpec], wanted: Needs, new: New, overlap: bool
    ) -> list[SlurmJob]:
        jobs = new(wanted, len(specs), self)
        self._launch(Described(self._describe(specs, jobs), jobs, 0), overlap)
        return jobs

    def _launch(self, described: Described, overlap: bool, since: float | None = None) -> None:
        """Start an srun for jobs that are described in a file, from a place in it on."""
        path, jobs, place = described
        wanted = jobs[0].needs
        command = [
            "srun",
            *options.step(self._name, wanted, len(jobs), self._allocation, overlap=overlap),
            *self._shared.keeper("keep", path, str(place), str(jobs[0].key)),
        ]
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=commands.step_environment(self._allocation),
                start_new_session=True,  # a Ctrl-C is for the program
            )
        except FileNotFoundError as error:
            raise commands.missing("srun") from error
        self._started(process.pid)
        step = Step(process, wanted, described, own=not self._allocation)
        step.overlap = overlap
        step.since = step.since if since is None else since
        step.allocation = self._allocation
        self._steps.append(step)
        for job, slot in zip(jobs, step.slots, strict=True):
            self._slots[job.key] = step, slot
        for pipe_end in (process.stdout, process.stderr):
            assert pipe_end is not None
            os.set_blocking(pipe_end.fileno(), False)
            self._selector.register(pipe_end, selectors.EVENT_READ, step)
        self._wake()
        self._hurry()

    def terminate(self, jobs: Sequence[SlurmJob]) -> None:
        """Send SIGTERM to the commands; those that wait are killed."""
        self._signal(jobs, signal.SIGTERM)

    def kill(self, jobs: Sequence[SlurmJob]) -> None:
        """End them at once."""
        self._signal(jobs, signal.SIGKILL)

    def _signal(self, jobs: Sequence[SlurmJob], number: int) -> None:
        with self._lock:
            for job in jobs:
                if job.ended or job.key not in self._slots:
                    continue
                step, slot = self._slots[job.key]
                if job.status.state is JobState.RUNNING:
                    step.tell(step.slots.index(slot), "signal", job.key, number)
                if number == signal.SIGKILL or job.status.state is not JobState.RUNNING:
                    job.killed()
            for step in self._steps:
                if not step.here and all(slot.job is None or slot.job.ended for slot in step.slots):
                    step.close()
            self._lock.notify_all()

    # What keepers and srun say

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select(_LOOK):
                if key.fileobj == self._bell:
                    os.read(self._bell, 4096)
                else:
                    self._read(key)
            with self._lock:
                self._look()

    def _read(self, key: selectors.SelectorKey) -> None:
        step: Step = key.data
        pipe: Any = key.fileobj
        try:
            data = os.read(key.fd, 1 << 16)
        except BlockingIOError:
            return
        with self._lock:
            if not data:
                self._selector.unregister(pipe)
                pipe.close()
                del step.buffers[pipe]
                if not step.buffers:
                    step.process.wait()
                    self._has_ended(step)
            else:
                *lines, step.buffers[pipe] = (step.buffers[pipe] + data).split(b"\n")
                for line in lines:
                    text = line.decode(errors="replace")
                    if pipe is step.process.stdout:
                        self._heard(step, text.split("\t"))
                    else:
                        self._complained(step, text)
            self._lock.notify_all()

    def _heard(self, step: Step, words: list[str]) -> None:
        """A keeper says something."""
        words = [*words, "", ""][:5]
        if not words[0].isdecimal() or int(words[0]) >= len(step.slots):
            return  # what something else has printed, such as a node's start-up script
        number = int(words[0])
        slot = step.slots[number]
        if words[1] == "here":
            self.answered = True
            step.allocation, step.number, slot.node = words[2], words[3], words[4] or "?"
            if slot.job is not None:
                self._named(step, number, slot.job)
            return
        key = int(words[2]) if words[2].isdecimal() else 0
        job = slot.job
        if job is None or job.key != key:
            return
        if words[1] == "started":
            error = words[4]
            if error:
                job.told(JobStatus(JobState.ENDED, 127, "NoCommand", slot.node, error))
            elif job.unwanted:
                step.tell(number, "signal", key, int(signal.SIGKILL))
            job.told(JobStatus(JobState.RUNNING, None, "", slot.node))
        elif words[1] == "ended" and words[3].isdecimal():
            code = os.waitstatus_to_exitcode(int(words[3]))
            if words[4] == "OOMKilled":
                end = JobStatus(JobState.ENDED, code, "OOMKilled", "", states.oom(job.needs))
            elif code < 0:
                end = JobStatus(JobState.ENDED, code, "Signal", "", f"was ended by signal {-code}")
            elif code:
                end = JobStatus(JobState.ENDED, code, "Error", "", f"exit code {code}")
            else:
                end = JobStatus(JobState.ENDED, 0)
            if words[4] == "Leaving":
                slot.left = time.monotonic(), end
                self._settle(step)
                return
            slot.job = None
            del self._slots[key]
            job.told(end)

    def _end(self, step: Step) -> JobStatus | None:
        """Return how Slurm has ended a step, if it has and is known to have."""
        how = states.of_step(step.said, step.needs)
        if step.own and (step.over is not None or (how is not None and how.reason == "Deleted")):
            # The allocation may have been taken by another, which squeue knows in a moment.
            if step.verdict is not None:
                return step.verdict
            step.doubted = step.doubted or time.monotonic()
            self._hurry()
            return how if time.monotonic() - step.doubted > _VERDICT else None
        return how

    def _settle(self, step: Step) -> None:
        """Say how jobs have ended that Slurm sent SIGTERM, as soon as it has said why."""
        if not any(slot.left is not None and not slot.dead for slot in step.slots):
            return
        how = self._end(step)
        for slot in step.slots:
            if slot.left is not None and not slot.dead:
                since, end = slot.left
                if how is not None or time.monotonic() - since > _VERDICT:
                    self._lose(slot, how or end)

    def _named(self, step: Step, number: int, job: SlurmJob) -> None:
        job.id = f"{step.allocation}.{step.number}/{number}"
        job.log = os.path.join(self._folder, f"fiber-{step.allocation}-{job.key}.log")

    def _complained(self, step: Step, line: str) -> None:
        """Srun, or Slurm's daemon on a node, says something."""
        step.said = (step.said + line + "\n")[-_WORDS:]
        self._settle(step)
        queued = srun.QUEUED.match(line)
        if queued:
            step.allocation, self.answered = queued[1], True
        busy = srun.BUSY.match(line)
        if busy:
            waiting = [slot.job for slot in step.slots if slot.job and not slot.job.ended]
            message = f"{len(waiting)} tasks wait for resources of Slurm job {step.allocation}"
            waits = JobStatus(JobState.PENDING, None, "Resources", "", f"{message}: {busy[1]}")
            for job in waiting:
                job.told(waits)
        node = srun.NODE.match(line)
        if node:
            lost = JobStatus(JobState.ENDED, None, "NodeLost", node[1], "its node failed")
            for slot in step.slots:
                if slot.node == node[1]:
                    self._lose(slot, lost)
        tasks = srun.TASKS.match(line)
        if tasks:
            for number in numbers(tasks[2]):
                if number < len(step.slots):
                    slot = step.slots[number]
                    if slot.left is None:
                        slot.left = time.monotonic(), of_task(tasks[3], step)
            self._settle(step)

    def _lose(self, slot: Slot, how: JobStatus) -> None:
        slot.dead = True
        if slot.job is not None:
            slot.job.told(how._replace(node=slot.node))
            self._slots.pop(slot.job.key, None)
            slot.job = None

    def _has_ended(self, step: Step) -> None:
        """Srun has ended; how, its last words say, or squeue will."""
        step.over = time.monotonic()
        if step.process.stdin is not None:
            with contextlib.suppress(OSError):
                step.process.stdin.close()
        silent = not step.here and commands.is_silence(step.said)
        how = None
        if silent and not step.closing and self._tries_again(step):
            return
        if step.closing:
            how = JobStatus(JobState.ENDED, None, "Killed", message="was ended with its step")
        elif silent:
            words = commands.plain("\n".join(step.said.splitlines()[-2:]))
            message = f"Slurm's controller does not answer: {words}. See `scontrol ping`."
            how = JobStatus(JobState.ENDED, None, "Refused", message=message)
        elif not step.here and "srun: error: Unable to" in step.said:
            if srun.TOO_LARGE in step.said and len(step.slots) > 1:
                self._halve(step)
                return
            words = commands.plain("\n".join(step.said.splitlines()[-4:]))
            message = (
                f"Slurm does not start it: {words}. See the settings that begin with slurm_, and "
                "cpu_per_job and mem_per_job."
            )
            how = JobStatus(JobState.ENDED, None, "Refused", message=message)
        if how is not None:
            self._bury(step, how)
        else:
            self._try_to_bury(step)

    def _try_to_bury(self, step: Step) -> None:
        """Srun has ended: say how its jobs have, when that is known or will not be any more."""
        assert step.over is not None
        how = self._end(step)
        if how is not None or not step.own or time.monotonic() - step.over > _VERDICT:
            self._bury(step, how)

    def _tries_again(self, step: Step) -> bool:
        """The controller was away: start it anew in a moment, if it has been there before."""
        now = time.monotonic()
        if not self.answered or now - step.since > _OUTAGE:
            return False
        self._steps.remove(step)
        for slot in step.slots:
            if slot.job is not None:
                message = "Slurm's controller does not answer"
                slot.job.told(JobStatus(JobState.PENDING, None, "Unreachable", "", message))
        self._later.append((now + _AGAIN, step))
        return True

    def _halve(self, step: Step) -> None:
        """No allocation can be so large: two of half the size, one after the other, may do."""
        for slot in step.slots:
            slot.job = None
        if step.over is None:
            step.close()
        else:
            self._steps.remove(step)
        path, jobs, place = step.described
        middle = len(jobs) // 2
        self._launch(Described(path, jobs[:middle], place), False)
        self._launch(Described(path, jobs[middle:], place + middle), False)

    def _bury(self, step: Step, how: JobStatus | None) -> None:
        if how is None:
            words = commands.plain("\n".join(step.said.splitlines()[-4:]))
            code = step.process.returncode
            message = f"its srun ended with exit code {code}" + (f": {words}" if words else "")
            how = JobStatus(JobState.ENDED, None, "StepEnded", message=message)
        for slot in step.slots:
            self._lose(slot, how)
        self._steps.remove(step)
        self._lock.notify_all()

    def update(self, rows: Sequence[states.Row]) -> bool:
        """Take what squeue says. Under the lock; return whether it is new."""
        found = {row.key: row for row in rows}
        new = False
        for step in list(self._steps):
            row = found.get(step.allocation)
            if row is None and step.own and not step.allocation and len(rows) == 1:
                row = rows[0]
            ended = states.verdict(row, step.needs) if row is not None and row.over else None
            if ended is not None and ended.reason not in ("", "Error", "Signal"):
                step.verdict = ended
            if step.over is not None:
                self._try_to_bury(step)
                new = True
            elif row is not None and not step.here:
                status = states.status(row, step.needs)
                waits_long = time.monotonic() - step.since > WORTH_TELLING
                if status.state is JobState.PENDING and status.reason and waits_long:
                    waiting = [slot.job for slot in step.slots if slot.job and not slot.job.ended]
                    message = states.waits(row.key, status.reason, 1, 1)
                    if len(waiting) > 1:
                        message += f" ({len(waiting)} Fiber jobs in it)"
                    for job in waiting:
                        new = job.told(status._replace(message=message)) or new
                elif status.reason == "Unschedulable" and len(step.slots) > 1 and not step.closing:
                    self._halve(step)
                elif status.reason == "Unschedulable":
                    for slot in step.slots:
                        self._lose(slot, status)
                    step.close()
                    new = True
        return new

    def _look(self) -> None:
        """Let steps end that have nothing to do, and start those that could not be."""
        now = time.monotonic()
        for when, step in list(self._later):
            if when <= now:
                self._later.remove((when, step))
                if any(slot.job is not None and not slot.job.ended for slot in step.slots):
                    self._launch(step.described, step.overlap, step.since)
        for step in list(self._steps):
            self._settle(step)
            if step.over is not None:
                self._try_to_bury(step)
            if step.over is not None or step.closing or any(slot.job for slot in step.slots):
                step.idle_since = None
            elif step.idle_since is None:
                step.idle_since = now
            elif now - step.idle_since > _IDLE:
                step.close()

    # The end

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._ring, b"\0")

    def close(self) -> None:
        """End all steps."""
        with self._lock:
            steps = list(self._steps)
            for step in steps:
                step.close()
            for step in steps:
                for slot in step.slots:
                    if slot.job is not None:
                        slot.job.killed()
            self._lock.wait_for(lambda: all(step.over is not None for step in steps), _END)
            late = [step for step in steps if step.over is None]
        for step in late:
            with contextlib.suppress(ProcessLookupError):
                step.process.terminate()
        self._closed = True
        self._wake()
        self._thread.join()
        for step in late:
            try:
                step.process.wait(_END)
            except subprocess.TimeoutExpired:
                step.process.kill()
                step.process.wait()
            for pipe in list(step.buffers):
                assert pipe is not None
                pipe.close()
        self._selector.close()
        os.close(self._bell)
        os.close(self._ring)
