"""Slurm's words for how a job is, in Fiber's.

    a row of squeue or sacct ─► Row ─► status ─► JobStatus: state, exit code, reason, node, message

Slurm lets a job wait for ever that can never run: such a one has ended for us, and says why. A
pure part: it knows no command and no clock.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from fiber.backends.base import JobState, JobStatus
from fiber.backends.slurm.options import Needs

__all__ = [
    "ACCOUNTING",
    "FIELDS",
    "Row",
    "hopeless",
    "of_step",
    "oom",
    "parse",
    "parse_accounting",
    "status",
    "verdict",
    "waits",
]

FIELDS = "JobArrayID:|,JobID:|,State:|,Reason:|,exit_code:|,NodeList:|,RestartCnt:|,PreemptTime:|"
"""What squeue is asked for; see `parse`."""

ACCOUNTING = "JobID,State,ExitCode,NodeList"
"""What sacct is asked for; see `parse_accounting`."""

_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"})
_RUNNING = frozenset({"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})
_STARTING = frozenset({"CONFIGURING"})
_ENDING = frozenset({"COMPLETING", "POWER_UP_NODE"})

# Words of Slurm for a job that waits and always will, and what to do.
_HOPELESS = {
    "AccountNotAllowed": "the account may not use this partition: see slurm_account",
    "BadConstraints": "no node can be what the job asks for: see slurm_constraint, cpu and memory",
    "DependencyNeverSatisfied": "what it depends on has failed: see slurm_options",
    "InvalidAccount": "the account is not valid: see slurm_account",
    "InvalidQOS": "the QOS is not valid: see slurm_qos",
    "PartitionConfig": "no node of the partition can be what it asks for: see cpu and memory",
    "PartitionNodeLimit": "the partition has not so many nodes for a job: see slurm_partition",
    "PartitionTimeLimit": "the partition allows less time: see slurm_time",
    "QOSNotAllowed": "the QOS may not be used here: see slurm_qos",
    "QOSTimeLimit": "the QOS allows less time: see slurm_time",
    "ReservationDeleted": "its reservation is gone: see slurm_options",
}

# Of those that wait, what is worth saying besides the reason.
_HINTS = {
    "JobHeldAdmin": "an administrator holds it",
    "JobHeldUser": "it is held: `scontrol release` lets it go",
    "Licenses": "it waits for a license",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "Priority": "others come first",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved",
    "Resources": "it waits for free CPUs, memory or GPUs",
}


class Row(NamedTuple):
    """What squeue says of a job.

    Attributes:
        key: the job's number, with that of its place in an array.
        job: its own number.
        state: in Slurm's words.
        reason: for that; empty if there is none.
        code: of its end, as `os.wait` has it.
        nodes: that it has.
        restarts: how often it was requeued.
        preempted: whether its place was taken.
    """

    key: str
    job: str
    state: str
    reason: str
    code: int
    nodes: str
    restarts: int
    preempted: bool = False

    @property
    def over(self) -> bool:
        """Whether it has ended, or is about to because another has taken its place."""
        return self.preempted or self.state not in _WAITING | _RUNNING | _STARTING | _ENDING


def parse(text: str) -> list[Row]:
    """Return the rows of squeue's output for `FIELDS`."""
    rows = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) < 7:
            continue
        key, job, state, reason, code, nodes, restarts, preempted = [*fields, ""][:8]
        rows.append(
            Row(
                key,
                job,
                state,
                reason if reason not in ("None", "N/A") else "",
                int(code) if code.isdecimal() else 0,
                nodes if nodes not in ("None", "N/A") else "",
                int(restarts) if restarts.isdecimal() else 0,
                preempted[:1].isdecimal(),  # a time
            )
        )
    return rows


def parse_accounting(text: str) -> list[Row]:
    """Return the rows of sacct's output for `ACCOUNTING`, with a | between two fields."""
    rows = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) != 4 or not fields[1]:
            continue
        key, state, code, nodes = fields
        number, _, cause = code.partition(":")
        status = int(number) << 8 if number.isdecimal() else 0
        # What is above 64 is no signal: 0:125 is Slurm's for a job that used too much memory.
        if cause.isdecimal() and 0 < int(cause) <= 64:
            status = int(cause)
        word = state.split()[0]  # "CANCELLED by 1000"
        rows.append(Row(key, key, word, "", status, "" if " " in nodes else nodes, 0))
    return rows


def hopeless(reason: str) -> str:
    """Return what is to be said of a reason that never clears, empty if it may."""
    if reason in _HOPELESS:
        return _HOPELESS[reason]
    # AssocMaxCpuPerJobLimit, QOSMaxWallDurationPerJobLimit, QOSMinGRES: the job alone is too much,
    # or too little, whoever else runs.
    if "PerJob" in reason or reason.startswith("QOSMin"):
        return "it asks for more, or less, than its account or QOS allows for one job"
    return ""


def waits(job: str, reason: str, count: int, of: int) -> str:
    """Return the sentence on `count` jobs of `of` that wait for the same reason, `job` first."""
    which = f"{count} of {of} Slurm jobs wait" if of > 1 else f"Slurm job {job} waits"
    hint = _HINTS.get(reason, "")
    return f"{which}: {reason}" + (f", {hint}" if hint else "")


def status(row: Row, needs: Needs, log: str = "") -> JobStatus:
    """Return how a job is.

    Args:
        row: what squeue says.
        needs: what it asked for.
        log: the end of what it wrote, if it has ended.
    """
    if row.state in _WAITING or row.restarts:
        if row.restarts or row.state.startswith("REQUEUE"):
            return JobStatus(JobState.ENDED, None, "Requeued", row.nodes, _requeued(row))
        never = hopeless(row.reason)
        if never:
            message = f"it can never run ({row.reason}): {never}"
            return JobStatus(JobState.ENDED, None, "Unschedulable", "", message)
        return JobStatus(JobState.PENDING, None, row.reason)
    if row.state in _RUNNING or row.state in _STARTING:
        running = JobState.RUNNING if row.state in _RUNNING else JobState.PENDING
        return JobStatus(running, None, "", row.nodes)
    if row.state in _ENDING:
        return JobStatus(JobState.RUNNING, None, "", row.nodes)
    return verdict(row, needs, log)


def _requeued(row: Row) -> str:
    why = f" ({row.reason})" if row.reason else ""
    return f"was put back into the queue by Slurm{why}; another job takes its place"


def verdict(row: Row, needs: Needs, log: str = "") -> JobStatus:
    """Return how a job has ended."""
    code: int | None = os.waitstatus_to_exitcode(row.code)
    node = row.nodes

    def ended(reason: str, message: str) -> JobStatus:
        return JobStatus(JobState.ENDED, code or None, reason, node, message)

    if row.state == "COMPLETED" and not row.code:
        return JobStatus(JobState.ENDED, 0, "", node)
    if row.state == "OUT_OF_MEMORY" or ran_out_of_memory(log):
        return ended("OOMKilled", oom(needs))
    if row.state == "TIMEOUT":
        return ended("TimeLimit", TIME_LIMIT)
    if row.state == "DEADLINE":
        return ended("TimeLimit", "was ended by Slurm, for its deadline had come")
    if row.state == "PREEMPTED" or row.preempted:
        return ended("Preempted", "was preempted by Slurm for a job of higher priority")
    if row.state in ("NODE_FAIL", "BOOT_FAIL"):
        return ended("NodeLost", "was ended by Slurm, for its node failed")
    if row.state == "CANCELLED":
        return ended("Deleted", "was cancelled (scancel, or an administrator)")
    if code is not None and code < 0:
        return ended("Signal", f"was ended by signal {-code}")
    return ended("Error", f"exit code {code}")


TIME_LIMIT = "was ended by Slurm at its time limit: ask for more with slurm_time"


def oom(needs: Needs) -> str:
    """Return the sentence on a job that used too much memory."""
    limit = f" of {needs.memory} MB" if needs.memory is not None else ", the cluster's default"
    return (
        f"was OOMKilled: it used more memory than its limit{limit}; ask for more with "
        "@fiber.meta(memory=...) or mem_per_job"
    )


_ENDED_BY = re.compile(r"\*\*\* (?:STEP|JOB) \S+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?")
_ERROR = re.compile(r"^srun: error: (?!\S+: tasks? [\d,-]+: )(.+)$", re.MULTILINE)
_LOST = {
    "TIME LIMIT": ("TimeLimit", TIME_LIMIT),
    "PREEMPTION": ("Preempted", "was preempted by Slurm for a job of higher priority"),
    "NODE FAILURE": ("NodeLost", "was ended by Slurm, for its node failed"),
}


def of_step(said: str, needs: Needs) -> JobStatus | None:
    """Return how a step has ended, from what `srun` said; None if that tells nothing."""
    if ran_out_of_memory(said):
        return JobStatus(JobState.ENDED, None, "OOMKilled", message=oom(needs))
    found = _ENDED_BY.search(said)
    if found is not None:
        unnamed = ("Deleted", "was cancelled (scancel, or an administrator)")
        reason, message = _LOST.get((found[1] or "").strip(), unnamed)
        errors = _ERROR.findall(said)
        if reason == "Deleted" and errors:  # srun itself may have given it up
            message = f"{message}: {'; '.join(errors[-2:])}"
        return JobStatus(JobState.ENDED, None, reason, message=message)
    if "Job allocation" in said and "has been revoked" in said:
        return JobStatus(JobState.ENDED, None, "Deleted", message="was cancelled in the queue")
    return None


def ran_out_of_memory(log: str) -> bool:
    """Whether Slurm has written into a log that it ended the job for its memory."""
    lower = log.lower()
    return "slurmstepd" in lower and any(
        words in lower
        for words in (
            "exceeded memory limit",
            "exceeded job memory limit",
            "exceeded step memory limit",
            "oom-kill",
            "oom_kill",
            "out of memory",
            "out-of-memory",
        )
    )
