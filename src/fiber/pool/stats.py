"""How a pool is: what `Pool.stats` returns."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PoolStats"]


class PoolStats(NamedTuple):
    """A pool at one moment.

    Attributes:
        processes: workers that it should have, just now if it is elastic.
        ready: workers that are up.
        waiting: items that no worker has.
        running: items that workers have.
        done: items that have a result, or an exception of their own.
        failed: items that failed by a worker's death or a time-out.
        died: workers that ended without being asked to.
        seconds: spent in tasks by all workers together, without waits for a processor where known.
        minimum, maximum: what `processes` may be: the same if the pool is not elastic.
    """

    processes: int
    ready: int
    waiting: int
    running: int
    done: int
    failed: int
    died: int
    seconds: float
    minimum: int
    maximum: int
