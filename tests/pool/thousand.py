"""A program with a thousand workers, for `test_thousand_workers`; its functions are in `__main__`.

So they are in the memory that the workers share, as a user's are, and need not be imported by each.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fiber

PATIENCE = 240  # seconds for each step; many times what it takes


def pass_and_tell(gate: str) -> int:
    """Return the process, once the gate, a FIFO, is opened; it is waited for without looking."""
    os.close(os.open(gate, os.O_RDONLY))
    return os.getpid()


def nap_and_return(x: int) -> int:
    time.sleep(0.001)
    return x


def wait_until(pool: fiber.Pool, condition: Callable[[fiber.pool.PoolStats], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition(pool.stats()):
        if time.monotonic() > deadline:
            sys.exit(f"still {pool.stats()} after {PATIENCE} seconds")
        time.sleep(0.05)


def private_memory(pid: int) -> int:
    """Return the bytes that a process has for itself alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def main(workers: int, victims: int, gate: str) -> dict[str, object]:
    # As many as most systems allow a program that does not ask for more.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    os.mkfifo(gate)
    with fiber.Pool(workers) as pool:
        wait_until(pool, lambda stats: stats.ready == workers)
        pids = pool.pids()

        # All at once, for none comes to its end before each has begun.
        result = pool.map_async(pass_and_tell, [gate] * workers, chunksize=1)
        wait_until(pool, lambda stats: stats.running == workers)
        with open(gate, "w"):
            wait_until(pool, lambda stats: stats.running == 0)
        took_part = result.get(PATIENCE)
        memory = sorted(map(private_memory, pids))

        # Many of them die at once in the midst of a map.
        numbers = range(20 * workers)
        result = pool.map_async(nap_and_return, numbers)
        wait_until(pool, lambda stats: stats.done > 2 * workers)
        for pid in random.Random(6).sample(pids, victims):
            os.kill(pid, signal.SIGKILL)
        right = result.get(PATIENCE) == list(numbers)
        wait_until(pool, lambda stats: stats.ready == workers)
        return {
            "pids": sorted(pids),
            "took_part": sorted(took_part),
            "memory": memory,
            "right": right,
            "after": sorted(pool.pids()),
            **pool.stats()._asdict(),
        }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
