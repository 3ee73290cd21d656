"""Estimate pi by throwing darts: how many random points of a square fall into its quarter circle?

`map` gives each worker its share; `imap_unordered` does the same work as a stream, and the estimate
can be watched while it gets better.

    python examples/pi.py --points 100000000
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import numpy as np

import fiber

POINTS_PER_TASK = 500_000  # some milliseconds of work, and memory that stays in the CPU's reach


def hits(task: tuple[int, int, int]) -> tuple[int, int]:
    """Throw darts; return how many were thrown and how many hit the quarter circle."""
    seed, number, points = task
    random = np.random.default_rng((seed, number))  # each task has a stream of its own
    x, y = random.random((2, points))
    return points, int(np.count_nonzero(x * x + y * y < 1.0))


def report(name: str, points: int, hit: int, seconds: float) -> None:
    """Print one estimate."""
    estimate = 4 * hit / points
    expected = 4 * math.sqrt(math.pi / 4 * (1 - math.pi / 4) / points)
    print(
        f"{name:<16} pi ≈ {estimate:.6f}   error {estimate - math.pi:+.6f} "
        f"(expected ±{expected:.6f})   {points / seconds / 1e6:.1f} million points/s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate pi both ways, from the same points; the exit code is 0 if both agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=100_000_000, help="default: %(default)s")
    parser.add_argument("--processes", type=int, help="default: one for each CPU")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same estimate")
    options = parser.parse_args(argv)
    if options.points < 1:
        parser.error("--points must be at least 1.")

    starts = range(0, options.points, POINTS_PER_TASK)
    tasks = [
        (options.seed, number, min(POINTS_PER_TASK, options.points - start))
        for number, start in enumerate(starts)
    ]
    with fiber.Pool(options.processes) as pool:
        started = time.perf_counter()
        hit_by_map = sum(hit for _, hit in pool.map(hits, tasks))
        report("map", options.points, hit_by_map, time.perf_counter() - started)

        started = time.perf_counter()
        points = hit = 0
        for done, result in enumerate(pool.imap_unordered(hits, tasks), start=1):
            points, hit = points + result[0], hit + result[1]
            if done % max(1, len(tasks) // 4) == 0 and done < len(tasks):
                report(
                    f"  after {done / len(tasks):.0%}", points, hit, time.perf_counter() - started
                )
        report("imap_unordered", points, hit, time.perf_counter() - started)

    if (points, hit) != (options.points, hit_by_map):
        print("map and imap_unordered counted different points.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
