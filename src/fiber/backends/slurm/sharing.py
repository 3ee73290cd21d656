"""How many workers of a pool share a task of an allocation, where the user did not say.

    sinfo: CPUs and memory of the nodes ─► Node ─► split ─► workers per task: 1 to 10

A task is an interpreter that imports Fiber and the program; the workers that it forks cost next to
nothing. But all of them must fit on one node, and Slurm's memory limit is for all of them together.
So a pool has at least eight tasks, each of which is small enough to find room soon.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from fiber.backends.slurm import commands
from fiber.config import config
from fiber.errors import StartError
from fiber.resources import Resources

__all__ = ["Node", "parse", "share", "split"]

_MOST = 10  # workers of a task
_TASKS = 8  # at least: what takes one away takes an eighth of the workers, at most
_TIMEOUT = 5.0  # seconds; nobody shall wait for what is no more than a convenience


class Node(NamedTuple):
    """What a node of the partition has: CPUs, and memory in MB."""

    cpus: int
    memory: int


def share(resources: Resources, workers: int) -> int:
    """Return how many of `workers` should share a task."""
    if workers < 2 * _TASKS or resources.gpu:  # each GPU is bound to a task
        return 1
    partition = _partition()
    which = [f"--partition={partition}"] if partition else []
    try:
        told = commands.run(
            "sinfo", "--noheader", "--exact", "--format=%P|%c|%m", *which, timeout=_TIMEOUT
        )
    except (commands.Away, commands.Refused, StartError):  # to start them will fail, and say why
        return 1
    cpu = resources.cpu or config.cpu_per_job
    memory = resources.memory or config.mem_per_job or 0
    return split(workers, cpu, memory, parse(told, bool(partition)))


def _partition() -> str:
    """Return where jobs will go, as far as that can be known; empty for Slurm's default."""
    found = commands.step_environment("").get("SLURM_PARTITION", "")
    found = config.slurm_partition or found
    given = iter(config.slurm_options)
    for option in given:
        match = re.fullmatch(r"(?:-p|--partition=)(.+)", option)
        if match:
            found = match[1]
        elif option in ("-p", "--partition"):
            found = next(given, "")
    return found


def parse(text: str, chosen: bool) -> list[Node]:
    """Return what sinfo says of nodes: of all, if a partition was chosen, or of the default one."""
    nodes = []
    for line in text.splitlines():
        partition, *sizes = line.strip().split("|")
        if len(sizes) == 2 and (chosen or partition.endswith("*")):
            # Nodes that differ may still be on one line, as "16+".
            cpus, memory = (re.match(r"\d*", size.strip())[0] for size in sizes)  # type: ignore[index]
            nodes.append(Node(int(cpus or 0), int(memory or 0)))
    return nodes


def split(workers: int, cpu: int, memory: int, nodes: Sequence[Node]) -> int:
    """Return how many of `workers` share a task that fits on each of `nodes`.

    Args:
        workers: of the pool.
        cpu: CPUs of each.
        memory: of each, in MB; 0 if none was asked for.
        nodes: that there are.
    """
    most = min(_MOST, workers // _TASKS, *(node.cpus // cpu for node in nodes))
    if memory:
        most = min(most, *(node.memory // memory for node in nodes))
    if most < 2 or not nodes:
        return 1
    # What divides them well: the last task asks for as much as the others.
    return min(range(most // 2 + 1, most + 1), key=lambda each: (-workers % each, -each))
