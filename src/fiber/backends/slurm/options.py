"""What is asked of Slurm for a job: from its spec and the configuration to options.

    @fiber.meta, cpu_per_job, mem_per_job ─► Needs ─┬─► sbatch: of one task on one node
    slurm_partition, slurm_account, ...  ───────────┴─► srun: of as many tasks as there are jobs

`slurm_options` comes last and so has the last word. What nobody asked for is left to Slurm and to
the variables that its users set.
"""

from __future__ import annotations

from typing import NamedTuple

from fiber.backends.base import JobSpec
from fiber.backends.slurm.commands import arguments
from fiber.config import config

__all__ = ["WARNING_SIGNAL", "Needs", "batch", "needs", "step"]

WARNING_SIGNAL = 23
"""SIGURG. Slurm sends it to every process of a job or step; who does not know it ignores it."""
_WARNING = 30  # seconds before its time is up that a job is told


class Needs(NamedTuple):
    """What all processes of a job need together.

    Attributes:
        cpus: how many.
        memory: in MB, None if it was not asked for.
        gpus: how many.
    """

    cpus: int
    memory: int | None
    gpus: int


def needs(spec: JobSpec) -> Needs:
    """Return what the processes of a job need together."""
    wanted, times = spec.resources, spec.processes
    memory = wanted.memory or config.mem_per_job
    return Needs(
        (wanted.cpu or config.cpu_per_job) * times,
        memory * times if memory is not None else None,
        (wanted.gpu or 0) * times,
    )


def batch(name: str, wanted: Needs, log: str, count: int) -> list[str]:
    """Return the options of `sbatch` for `count` jobs that need the same."""
    options: list[tuple[str, object]] = [
        ("parsable", ""),
        ("job-name", name),
        ("nodes", 1),
        ("ntasks", 1),
        ("cpus-per-task", wanted.cpus),
        ("mem", f"{wanted.memory}M" if wanted.memory is not None else None),
        ("gres", f"gpu:{wanted.gpus}" if wanted.gpus else None),
        ("array", f"0-{count - 1}" if count > 1 else None),
        ("input", "/dev/null"),
        ("output", log),
        ("open-mode", "append"),
        # Fiber starts another job in its place, and who had its tasks is told at once.
        ("no-requeue", ""),
        ("signal", f"B:{WARNING_SIGNAL}@{_WARNING}"),
        *_of_allocation(),
    ]
    return [*arguments(options), *config.slurm_options]


def step(name: str, wanted: Needs, count: int, allocation: str, *, overlap: bool) -> list[str]:
    """Return the options of `srun` for a step of `count` jobs that need the same.

    Args:
        name: of the step, and of the allocation if it gets one.
        wanted: what each needs.
        count: how many.
        allocation: that it is a step of; empty for one of its own.
        overlap: whether it shares CPUs with other steps.
    """
    each = -(-wanted.memory // wanted.cpus) if wanted.memory is not None else None
    options: list[tuple[str, object]] = [
        ("job-name", name),
        ("ntasks", count),
        ("cpus-per-task", wanted.cpus),
        ("mem-per-cpu", f"{each}M" if each is not None else None),
        ("gpus-per-task", wanted.gpus or None),
        ("kill-on-bad-exit", 0),
        ("wait", 0),
        ("mpi", "none"),
        ("no-kill", ""),
    ]
    if allocation:
        options += [("exact", ""), ("overlap", "" if overlap else None)]
    else:
        options += [("signal", f"{WARNING_SIGNAL}@{_WARNING}"), *_of_allocation()]
    return [*arguments(options), *config.slurm_options]


def _of_allocation() -> list[tuple[str, object]]:
    return [
        ("partition", config.slurm_partition),
        ("account", config.slurm_account),
        ("qos", config.slurm_qos),
        ("time", config.slurm_time),
        ("constraint", config.slurm_constraint),
    ]
