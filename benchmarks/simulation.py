"""The measurement of what a master can carry: a real one, and workers that are simulated.

Pool ─► scheduler, crew, loop ─► agent of the backend "crowd" ─► connections (see `crowd`)
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import tasks
from benchmarks.crowd import raise_limit
from benchmarks.measure import QUICK, clock, descendants, memory_of, processor_time, rate

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from benchmarks.measure import Adapter, Figures

LENGTHS = {"1s": 1.0, "100ms": 0.1}
SPARE = 200  # descriptors of the master that are no workers'
LOOK_AGAIN = 0.01  # seconds
TICKS = os.sysconf("SC_CLK_TCK")


def simulation(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Connect as many workers as `case` says, and give them tasks of several lengths."""
    workers = int(case)
    rounds = 5 if seconds > QUICK else 1
    if raise_limit() < workers + SPARE:
        sys.exit(f"{workers} workers need as many open files and {SPARE}: raise ulimit -Hn")
    import fiber
    from fiber.pool import crew
    from fiber.runtime.limits import make_room

    # The crowd's agent has no open files for each worker, as a real one has.
    crew.make_room = lambda workers, here, agent: make_room(workers, here, here)

    with tempfile.TemporaryDirectory(prefix="fiber-benchmark-") as folder:
        _announce(Path(folder))
        context = fiber.get_context("crowd")
        before = memory_of(os.getpid())["uss"]
        start = clock()
        with context.Pool(workers) as pool:
            while pool.stats().ready < workers:
                time.sleep(LOOK_AGAIN)
            yield f"{case}-ready", clock() - start
            memory = memory_of(os.getpid())["uss"] - before
            yield f"{case}-memory", memory * 1024 / workers
            crowd = descendants(os.getpid())
            for name, length in LENGTHS.items():
                length = length if seconds > QUICK else length / 10
                took, cpu, _ = _timed(partial(_sleeps, pool, length), workers * rounds)
                speed = workers * rounds / took
                yield f"{case}-{name}", speed
                yield f"{case}-{name}-share", speed * length / workers
                yield f"{case}-{name}-cpu", cpu * took / (workers * rounds) * 1e6
            figures = (0.0, 0.0, 0.0)

            def run(count: int) -> int:
                nonlocal figures
                crowd_before = _processor_time(crowd)
                took, cpu, done = _timed(partial(_empty, pool), count)
                figures = cpu, (_processor_time(crowd) - crowd_before) / took, took / count
                return done

            yield f"{case}-empty", rate(run, seconds)
            yield f"{case}-empty-cpu", figures[0] * figures[2] * 1e6
            yield f"{case}-master", figures[0]
            yield f"{case}-crowd", figures[1]


def _announce(folder: Path) -> None:
    """Have the backend found as those of other packages are: by an entry point."""
    info = folder / "crowd-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crowd\nVersion: 0\n")
    entry = "crowd = benchmarks.crowd:CrowdBackend"
    (info / "entry_points.txt").write_text(f"[fiber.backends]\n{entry}\n")
    sys.path.append(str(folder))


def _sleeps(pool: Any, length: float, count: int) -> int:
    return len(pool.map(tasks.sleep, [length] * count, chunksize=1))


def _empty(pool: Any, count: int) -> int:
    return len(pool.map(tasks.nothing, range(count), chunksize=1))


def _timed(run: Callable[[int], int], count: int) -> tuple[float, float, int]:
    """The seconds of a run, the master's share of a core meanwhile, and what it did."""
    cpu, start = processor_time(), clock()
    done = run(count)
    took = clock() - start
    return took, (processor_time() - cpu) / took, done


def _processor_time(pids: list[int]) -> float:
    """Processor time that these processes have used until now, s."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


MEASURES: dict[str, Callable[[str, Adapter, float], Figures]] = {"simulation": simulation}
