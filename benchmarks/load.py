"""The program that a soak watches: `python -m benchmarks.load SECONDS WORKERS`.

    threads, each in a loop:  small tasks │ arrays as arguments │ arrays as results │ streams, some
                              dropped halfway │ one array for many tasks │ SIGKILL for a worker
    standard output:          a line of JSON now and then, and one at each step of the end

All results are compared with what they should be. What is not right ends the program at once.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

import fiber
from benchmarks import tasks

RETRIES = 100  # it is chance that kills, and it may well hit an item several times
SMALL, STREAMED, CARRIED, CONSTANT_USES = 20_000, 4000, 8, 20
CONSTANT = 4_000_000  # numbers of 8 bytes
KILL_EVERY = 2.0  # seconds, on average
TELL_EVERY = 5.0
SETTLE = 3.0  # seconds of silence before a step of the end is told

done: Counter[str] = Counter()


def small(pool: Any) -> None:
    """Empty tasks, in batches as large as the scheduler likes."""
    assert pool.map(tasks.nothing, range(SMALL)) == [None] * SMALL


def arguments(pool: Any) -> None:
    """Arrays of 8 MB as arguments."""
    start = done["arguments"]
    arrays = [np.arange(tasks.LARGE, dtype=np.float64) + start + i for i in range(CARRIED)]
    wanted = [tasks.reduce(array) for array in arrays]
    assert pool.map(tasks.reduce, arrays, chunksize=1) == wanted


def results(pool: Any) -> None:
    """Arrays of 8 MB as results; some are kept while the next ones come."""
    start = done["results"]
    numbers = range(start, start + CARRIED)
    kept = []
    for number, array in zip(numbers, pool.imap(tasks.made, numbers), strict=True):
        kept.append((number, array))
        for wanted, old in kept[-3:]:
            assert (old[:: tasks.PAGE] == wanted).all()


def stream(pool: Any) -> None:
    """A stream of small and middling items; every other one is dropped halfway."""
    items = ((n, bytes(n % 7 * 20_000)) for n in range(STREAMED))
    found = 0
    for size in pool.imap_unordered(size_of, items):
        found += size
        if done["stream"] % 2 and found > 10_000_000:
            return
    assert found == sum(n % 7 * 20_000 for n in range(STREAMED))


def size_of(item: tuple[int, bytes]) -> int:
    """The size of the second part."""
    return len(item[1])


def constant(pool: Any) -> None:
    """One array for many tasks, as a plain argument and by a handle."""
    array = np.arange(CONSTANT, dtype=np.float64) + done["constant"]
    wanted = [tasks.reduce(array) + n for n in range(CONSTANT_USES)]
    for source in (array, fiber.put(array)):
        items = [(source, n) for n in range(CONSTANT_USES)]
        assert pool.map(tasks.use, items) == wanted


def kill(pool: Any) -> None:
    """End a worker, and wait a while."""
    pids = pool.pids()
    if pids:
        try:
            os.kill(random.choice(pids), signal.SIGKILL)
        except ProcessLookupError:
            return
    time.sleep(random.uniform(0, 2 * KILL_EVERY))


ACTS: tuple[Callable[[Any], None], ...] = (
    small,
    arguments,
    results,
    stream,
    constant,
    kill,
)


def tell(step: str) -> None:
    """Say where the program is, and what was done."""
    print(json.dumps({"step": step, "done": dict(done)}), flush=True)


def main(seconds: float, workers: int) -> None:
    """Run the load for so many seconds, and end step by step."""
    faulthandler.register(signal.SIGUSR1)
    end = time.monotonic() + seconds

    def repeat(act: Callable[[Any], None]) -> None:
        try:
            while time.monotonic() < end:
                act(pool)
                done[act.__name__] += 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)

    with fiber.Pool(workers, retries=RETRIES) as pool:
        threads = [threading.Thread(target=repeat, args=(act,)) for act in ACTS]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                tell("load")
                thread.join(TELL_EVERY)
        gc.collect()
        time.sleep(SETTLE)
        tell("idle")
        time.sleep(SETTLE)
        pool.close()
        pool.join()
    time.sleep(SETTLE)
    tell("closed")
    time.sleep(SETTLE)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
