"""How many workers share a task of Slurm, without a cluster."""

from __future__ import annotations

import pytest

from fiber.backends.slurm import sharing
from fiber.backends.slurm.sharing import Node

LARGE = [Node(64, 256_000), Node(128, 512_000)]


@pytest.mark.parametrize(
    ("workers", "each"), [(1, 1), (15, 1), (16, 2), (24, 3), (50, 5), (80, 10), (200, 10), (208, 8)]
)
def test_a_pool_has_eight_tasks_at_least_and_ten_workers_a_task_at_most(
    workers: int, each: int
) -> None:
    assert sharing.split(workers, 1, 0, LARGE) == each


@pytest.mark.parametrize("workers", range(80, 400, 7))
def test_little_more_is_asked_for_than_is_needed(workers: int) -> None:
    each = sharing.split(workers, 1, 0, LARGE)
    assert -workers % each <= workers // 20


@pytest.mark.parametrize(
    ("cpu", "memory", "nodes", "each"),
    [
        (16, 0, LARGE, 4),
        (1, 64_000, LARGE, 4),
        (100, 0, LARGE, 1),
        (1, 0, [Node(2, 4000)], 2),
        (1, 0, [], 1),
    ],
)
def test_a_task_fits_on_each_node(cpu: int, memory: int, nodes: list[Node], each: int) -> None:
    assert sharing.split(200, cpu, memory, nodes) == each


def test_what_sinfo_says_is_read() -> None:
    told = "main*|64|256000\nmain*|16+|64000+\nhigh|2|4000\nsomething else\n"
    assert sharing.parse(told, False) == [Node(64, 256_000), Node(16, 64_000)]
    assert sharing.parse(told, True)[2:] == [Node(2, 4000)]
    assert sharing.parse("", True) == []
