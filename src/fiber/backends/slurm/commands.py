"""Slurm's commands: how they are run, and what it means that one failed.

    run("squeue", ...) ─► environment without what other jobs left in it ─► output
                                                      └─► Refused: no, and why
                                                      └─► Away: nobody said anything

Variables of the kind SLURM_* that a job finds are options of the commands that it runs: a step of
a job inside of another job would be one of as many tasks and as much memory as that one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

from fiber.backends.slurm import detect
from fiber.errors import StartError

__all__ = [
    "KILL",
    "MOMENT",
    "PATIENCE",
    "Away",
    "Refused",
    "environment",
    "run",
    "step_environment",
]

KILL = ("--state=RUNNING", "--batch", "--signal=USR2")
"""Options of scancel by which the keepers of batch jobs end what they run: see `keeper`.

For a job that waits scancel would try again for a minute.
"""
MOMENT = 5.0
"""Seconds that this may take; what follows it ends the job in any case."""

PATIENCE = 45.0  # seconds: they wait by themselves for half a minute when the controller is away

_KEPT = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"})
"""What says which cluster it is, and who we are."""

_NOT_OURS = frozenset(
    {
        "SBATCH_ARRAY_INX",
        "SBATCH_CPU_BIND",
        "SBATCH_CPU_BIND_LIST",
        "SBATCH_CPU_BIND_TYPE",
        "SBATCH_CPU_BIND_VERBOSE",
        "SBATCH_MEM_BIND",
        "SBATCH_MEM_BIND_LIST",
        "SBATCH_MEM_BIND_TYPE",
        "SBATCH_MEM_BIND_VERBOSE",
        "SBATCH_WAIT",
    }
)
"""What Slurm tells a job about itself, or what would make another job of ours."""

_INPUTS = (
    "ACCOUNT",
    "CONSTRAINT",
    "EXCLUSIVE",
    "HINT",
    "NETWORK",
    "PARTITION",
    "QOS",
    "RESERVATION",
    "TIMELIMIT",
    "WCKEY",
)
"""What users set for all that they run, as SBATCH_ and for srun as SLURM_."""

_SILENCE = (
    "unable to contact slurm controller",
    "socket timed out",
    "connection refused",
    "connection timed out",
    "unable to establish controller machine",
    "zero bytes were transmitted",
    "slurm backup controller in standby",
    "communication connection failure",
    "transport endpoint",
    "resource temporarily unavailable",
)


class Away(Exception):
    """The controller does not answer."""


class Refused(Exception):
    """The command failed; its words are the argument."""


def environment() -> dict[str, str]:
    """Return the environment for `sbatch` and the commands that ask."""
    return {
        name: value
        for name, value in os.environ.items()
        if (not name.startswith(("SLURM_", "SRUN_")) or name in _KEPT) and name not in _NOT_OURS
    }


def step_environment(allocation: str) -> dict[str, str]:
    """Return the environment for `srun`; `allocation`: the job that it is a step of, if any.

    What the user has set for batch jobs holds for an allocation of our own as well.
    """
    found = environment()
    if allocation:
        return {**found, "SLURM_JOB_ID": allocation}
    outside = not detect.in_allocation()
    for name in _INPUTS:
        value = os.environ.get(f"SLURM_{name}") if outside else None
        value = value or found.get(f"SBATCH_{name}")
        if value:
            found[f"SLURM_{name}"] = value
    return found


def run(*command: str, text: str | None = None, timeout: float = PATIENCE) -> str:
    """Run a command of Slurm; return what it wrote to its standard output.

    Args:
        command: its name and arguments.
        text: for its standard input.
        timeout: seconds that it may take.

    Raises:
        Away: the controller does not answer.
        Refused: it failed in another way.
        StartError: there is no such command.
    """
    try:
        ended = subprocess.run(
            command,
            check=False,
            input=text if text is not None else "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment(),
            start_new_session=True,  # a Ctrl-C is for the program
        )
    except FileNotFoundError as error:
        raise missing(command[0]) from error
    except subprocess.TimeoutExpired as error:
        raise Away(f"{command[0]} took longer than {timeout:g} seconds") from error
    if ended.returncode == 0:
        return ended.stdout
    told = ended.stderr.strip() or f"{command[0]} ended with exit code {ended.returncode}"
    if is_silence(told):
        raise Away(told)
    raise Refused(told)


def is_silence(told: str) -> bool:
    """Whether the words of a command mean that the controller was not there."""
    lower = told.lower()
    return any(words in lower for words in _SILENCE)


def plain(told: str) -> str:
    """Return the words of a command without its name before each line."""
    lines = []
    for line in told.splitlines():
        for prefix in ("sbatch: ", "srun: ", "scancel: ", "squeue: ", "error: "):
            line = line.removeprefix(prefix)
        if line.strip():
            lines.append(line.strip())
    return "; ".join(dict.fromkeys(lines))


def missing(command: str) -> StartError:
    """Return the error for a command that is not there."""
    return StartError(
        f"The command {command!r} of Slurm is not on this machine, or not on the PATH: run the "
        "program on a login node or in a job of the cluster, or load the module that has Slurm."
    )


def arguments(options: Sequence[tuple[str, object]]) -> list[str]:
    """Return options as arguments, without those that are None."""
    return [
        f"--{name}={value}" if value != "" else f"--{name}"
        for name, value in options
        if value is not None
    ]
