"""Averages arrays around a ring of processes, where each only talks to the next.

Each array is cut into as many pieces as there are processes. In the first lap a piece collects what
every process has of it; in the second the finished pieces go around:

    rank 0 ──► rank 1 ──► rank 2 ──► rank 3
       ▲                                │
       └────────────────────────────────┘

So however many processes there are, each sends less than twice its array, and none has to hold all.
This is the all-reduce that averages gradients in distributed training (see ring_torch.py).

    python examples/ring_average.py --processes 4 --size 4000000
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fiber

Vector = NDArray[np.float64]

inboxes: list[Any] = []  # one queue for each member; its left neighbour puts, it gets
reports: Any = None


def connect(ring: Any, queues: list[Any], results: Any) -> None:
    """Prepare a member: keep the queues, and wait until all are here."""
    global inboxes, reports
    inboxes, reports = queues, results
    ring.barrier()


def own_array(seed: int, size: int, rank: int) -> Vector:
    """The numbers that this member brings."""
    return np.random.default_rng((seed, rank)).normal(loc=rank, size=size)


def average(array: Vector, rank: int, members: int) -> None:
    """Replace the array by the average of all members' arrays."""
    pieces = np.array_split(array, members)  # views: what changes them changes the array
    inbox, next_inbox = inboxes[rank], inboxes[(rank + 1) % members]

    for step in range(members - 1):
        next_inbox.put(pieces[(rank - step) % members])
        pieces[(rank - step - 1) % members] += inbox.get()
    pieces[(rank + 1) % members] /= members  # this one has been everywhere

    for step in range(members - 1):
        next_inbox.put(pieces[(rank - step + 1) % members])
        pieces[(rank - step) % members][:] = inbox.get()


def member(seed: int, size: int, rank: int, members: int) -> None:
    """What each process of the ring does; the ring adds the last two arguments."""
    array = own_array(seed, size, rank)
    before = float(array.mean())
    started = time.perf_counter()
    average(array, rank, members)
    seconds = time.perf_counter() - started

    expected = sum(own_array(seed, size, other) for other in range(members)) / members
    error = float(np.abs(array - expected).max())
    reports.put((rank, before, float(array.mean()), error, seconds))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ring; the exit code is 0 if every member has the average."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=4, help="members (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=1_000_000, help="numbers in an array (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same numbers")
    options = parser.parse_args(argv)
    if options.processes < 1 or options.size < 1:
        parser.error("--processes and --size must be at least 1.")

    queues = [fiber.Queue() for _ in range(options.processes)]
    results = fiber.Queue()
    work = partial(member, options.seed, options.size)
    fiber.Ring(options.processes, work, initializer=connect, initargs=(queues, results)).run()

    print("rank   mean before   mean after   largest error   seconds")
    worst = 0.0
    for rank, before, after, error, seconds in sorted(results.get() for _ in queues):
        print(f"{rank:4} {before:13.4f} {after:12.4f} {error:15.1e} {seconds:9.2f}")
        worst = max(worst, error)
    if worst > 1e-9:
        print("The members do not have the average.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
