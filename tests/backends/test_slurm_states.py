"""Slurm's words for how jobs are, without a cluster."""

from __future__ import annotations

import pytest

from fiber.backends.base import BLAMELESS, JobState
from fiber.backends.slurm import states
from fiber.backends.slurm.options import Needs

NEEDS = Needs(cpus=1, memory=500, gpus=0)


def row(state: str, reason: str = "None", code: int = 0, restarts: int = 0, more: str = "NULL"):
    (found,) = states.parse(f"7_1|9|{state}|{reason}|{code}|node3|{restarts}|{more}|\n")
    return found


def test_rows_are_read_and_what_is_none_is_left_out() -> None:
    text = "garbage\n4|4|PENDING|Priority|0||0|N/A|\n5_2|6|RUNNING|None|0|node[1-2]|0|N/A|\n"
    first, second = states.parse(text)
    assert first == ("4", "4", "PENDING", "Priority", 0, "", 0, False)
    assert second == ("5_2", "6", "RUNNING", "", 0, "node[1-2]", 0, False)


@pytest.mark.parametrize(
    ("state", "code", "exit_code", "reason"),
    [
        ("COMPLETED", 0, 0, ""),
        ("FAILED", 7 << 8, 7, "Error"),
        ("FAILED", 11 | 128, -11, "Signal"),
        ("CANCELLED", 15, -15, "Deleted"),
        ("TIMEOUT", 0, None, "TimeLimit"),
        ("OUT_OF_MEMORY", 9, -9, "OOMKilled"),
        ("PREEMPTED", 9, -9, "Preempted"),
        ("NODE_FAIL", 0, None, "NodeLost"),
    ],
)
def test_ends_are_told_apart(state: str, code: int, exit_code: int | None, reason: str) -> None:
    status = states.status(row(state, code=code), NEEDS)
    assert status.state is JobState.ENDED
    assert (status.exit_code, status.reason, status.node) == (exit_code, reason, "node3")
    assert (reason in BLAMELESS) == (reason in ("Deleted", "Preempted", "NodeLost"))
    assert status.message or reason == ""


def test_a_job_that_was_killed_for_its_memory_is_known_by_its_log() -> None:
    log = "slurmstepd: error: Exceeded job memory limit\nslurmstepd: error: *** JOB 9 CANCELLED"
    status = states.status(row("CANCELLED", code=9), NEEDS, log)
    assert status.reason == "OOMKilled"
    assert "its limit of 500 MB" in status.message
    # A program's own words are none of Slurm's.
    assert states.status(row("FAILED", code=256), NEEDS, "out of memory").reason == "Error"


@pytest.mark.parametrize("reason", ["Priority", "Resources", "JobHeldUser", "AssocGrpCpuLimit"])
def test_what_may_clear_is_waited_for(reason: str) -> None:
    status = states.status(row("PENDING", reason), NEEDS)
    assert (status.state, status.reason) == (JobState.PENDING, reason)


@pytest.mark.parametrize(
    ("reason", "setting"),
    [
        ("BadConstraints", "slurm_constraint"),
        ("AccountNotAllowed", "slurm_account"),
        ("PartitionTimeLimit", "slurm_time"),
        ("InvalidQOS", "slurm_qos"),
        ("AssocMaxCpuPerJobLimit", "one job"),
        ("QOSMaxWallDurationPerJobLimit", "one job"),
    ],
)
def test_what_never_clears_has_ended(reason: str, setting: str) -> None:
    status = states.status(row("PENDING", reason), NEEDS)
    assert (status.state, status.reason) == (JobState.ENDED, "Unschedulable")
    assert reason in status.message
    assert setting in status.message


def test_a_job_that_was_put_back_is_another_and_not_to_blame() -> None:
    for found in (row("PENDING", "BeginTime", restarts=1), row("REQUEUED", restarts=0)):
        status = states.status(found, NEEDS)
        assert (status.state, status.reason) == (JobState.ENDED, "Requeued")
        assert status.reason in BLAMELESS
    # The orphan of a node that failed may show up as running, once more.
    assert states.status(row("RUNNING", restarts=1), NEEDS).reason == "Requeued"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("slurmstepd-node1: error: *** STEP 5.0 ON node1 CANCELLED AT 2026-11-26T01:19:01 ***", 0),
        ("error: *** STEP 5.0 ON node1 CANCELLED AT 2026-11-26T01:19:01 DUE TO TIME LIMIT ***", 1),
        ("error: *** JOB 5 ON node1 CANCELLED AT 2026-11-26T01:19:01 DUE TO PREEMPTION ***", 2),
        ("error: *** STEP 5.0 ON n1 CANCELLED AT 2026-11-26T01:19:01 DUE TO NODE FAILURE", 3),
        ("srun: Job allocation 15 has been revoked", 0),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=5.0", 4),
        ("srun: error: node1: task 3: Exited with exit code 1", None),
    ],
)
def test_ends_of_steps_are_known_by_what_srun_says(said: str, reason: int | None) -> None:
    reasons = ("Deleted", "TimeLimit", "Preempted", "NodeLost", "OOMKilled")
    how = states.of_step(f"something before\n{said}\n", NEEDS)
    assert (how and how.reason) == (None if reason is None else reasons[reason])


def test_a_step_that_srun_gave_up_says_why() -> None:
    cancelled = "slurmstepd: error: *** STEP 5.0 ON node1 CANCELLED AT 2026-11-26T04:50:47 ***"
    task = "srun: error: node1: tasks 0-3: Terminated"
    plain = states.of_step(f"{cancelled}\n{task}\n", NEEDS)
    told = states.of_step(f"srun: error: Socket timed out\n{cancelled}\n{task}\n", NEEDS)
    assert plain is not None
    assert plain.message == "was cancelled (scancel, or an administrator)"
    assert told is not None
    assert told.message == f"{plain.message}: Socket timed out"


def test_many_that_wait_are_one_sentence() -> None:
    said = states.waits("12_0", "Priority", 8, 20)
    assert said == "8 of 20 Slurm jobs wait: Priority, others come first"
    assert states.waits("12", "Resources", 1, 1).startswith("Slurm job 12 waits: Resources")


# As sacct of Slurm 23.02 prints them with --parsable2.
ACCOUNTED = """\
17_0|COMPLETED|0:0|node1
17_1|FAILED|7:0|node1
17_2|FAILED|0:11|node[1-2]
18|CANCELLED by 1000|0:15|node2
19|OUT_OF_MEMORY|0:125|node3
20|NODE_FAIL|0:0|node4
21|TIMEOUT|0:0|node4
22|PREEMPTED|0:0|node4
23|RUNNING|0:0|node4
24|PENDING|0:0|None assigned

slurm_load_jobs error
"""


def test_what_the_accounting_says_of_forgotten_jobs_is_read() -> None:
    rows = {row.key: row for row in states.parse_accounting(ACCOUNTED)}
    assert [key for key, row in rows.items() if not row.over] == ["23", "24"]
    assert rows["24"].nodes == ""
    ends = [states.verdict(row, NEEDS) for row in rows.values() if row.over]
    assert [(end.exit_code, end.reason, end.node) for end in ends] == [
        (0, "", "node1"),
        (7, "Error", "node1"),
        (-11, "Signal", "node[1-2]"),
        (-15, "Deleted", "node2"),
        (None, "OOMKilled", "node3"),
        (None, "NodeLost", "node4"),
        (None, "TimeLimit", "node4"),
        (None, "Preempted", "node4"),
    ]
