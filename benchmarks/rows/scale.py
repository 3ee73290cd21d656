"""The rows of many workers; the measurements are in `measure`, `scale`, `evolution`, `simulation`.

Peers that start an interpreter for each worker are left out where that would be hundreds of them on
a machine of two cores, and minutes.
"""

from __future__ import annotations

from benchmarks.rows.base import Case, Metric, Panel, Row, single

_FORKING = ("fiber", "multiprocessing", "concurrent.futures")
_LIGHT = (*_FORKING, "loky")
_EVOLVING = ("fiber", "multiprocessing", "loky")

_LENGTHS = {"1s": 1.0, "100ms": 0.1, "10ms": 0.01, "1ms": 0.001}
_TITLES = {"1s": "1 s", "100ms": "100 ms", "10ms": "10 ms", "1ms": "1 ms"}
EVOLVERS = (2, 8, 32, 64, 128, 256)
SIMULATED = (100, 1000, 10_000)


def sleep(workers: int, lengths: tuple[str, ...], title: str, text: str, **more: object) -> Row:
    """The sleep test with so many workers."""
    name = "sleep" if workers == 5 else f"sleep-{workers}"
    overhead = tuple((_LENGTHS[key], key) for key in lengths)
    return Row(
        name,
        title,
        f"{text} Total time over the ideal of 1 s: less is better, and 1.00 is perfect. The floor "
        f"is {workers:,} plain processes that each sleep their share in a loop; *x floor* is the "
        "ratio to it.",
        tuple(single(key, _TITLES[key], "", quick=key in ("10ms", "1ms")) for key in lengths),
        floor="the sleeps alone",
        against_floor=True,
        panels=(Panel("length of a task, s", "total time over the ideal", overhead),),
        **more,  # type: ignore[arg-type]
    )


SLEEP = sleep(
    5,
    ("1s", "100ms", "10ms", "1ms"),
    "The sleep test of the Fiber paper",
    "5, 50, 500 and 5,000 tasks that sleep 1 s, 100 ms, 10 ms and 1 ms on 5 workers, chunksize=1 "
    "where the peer has one.",
)


def _evolving(workers: int) -> Case:
    return Case(
        str(workers),
        (
            Metric(str(workers), "50 generations", "s"),
            Metric(f"{workers}-ideal", "over the ideal", "", ratio=False),
            Metric(f"{workers}-cpu", "CPU of the master", "s"),
        ),
        title=f"{workers} workers",
        quick=workers in (2, 8),
        peers=_EVOLVING if workers <= 64 else _EVOLVING[:-1],
    )


def _simulated(workers: int) -> Case:
    return Case(
        str(workers),
        tuple(
            Metric(
                f"{workers}-{key}",
                title,
                unit,
                ratio=False,
                more=key.endswith("share"),
            )
            for key, title, unit in (
                ("ready", "until all are ready", "s"),
                ("memory", "memory of the master for each", "kB"),
                ("1s", "tasks of 1 s", "tasks/s"),
                ("1s-share", "of the ideal", ""),
                ("1s-cpu", "CPU a task", "µs"),
                ("100ms", "tasks of 100 ms", "tasks/s"),
                ("100ms-share", "of the ideal", ""),
                ("100ms-cpu", "CPU a task", "µs"),
                ("empty", "empty tasks", "tasks/s"),
                ("empty-cpu", "CPU a task", "µs"),
                ("master", "master busy in these, of one core", ""),
                ("crowd", "crowd busy in these", ""),
            )
        ),
        quick=workers == SIMULATED[0],
        title=f"{workers:,} workers",
    )


SCALE = (
    Row(
        "thousand",
        "A thousand workers",
        "1,024 workers on this machine: seconds until all are up, for the peer that tells, "
        "and until as many tasks run at the same time, memory "
        "of a worker, cost of an empty task of a `map` with chunksize=1 (with 2 workers, with "
        "1,024 in the first call of its size and in those after it, and the ratio of these to 2; "
        "and the master's processor time in it), and seconds to close: less is better.",
        (
            Case(
                "thousand",
                (
                    Metric("up", "all up", "s"),
                    Metric("ready", "all at work", "s"),
                    Metric("uss", "a worker, private", "MB"),
                    Metric("pss", "a worker, PSS", "MB", ratio=False),
                    Metric("few", "a task, 2 workers", "µs"),
                    Metric("many-first", "a task, 1,024 workers, first call", "µs"),
                    Metric("many", "a task, 1,024 workers", "µs"),
                    Metric("times", "their ratio", "", ratio=False),
                    Metric("few-cpu", "master's CPU, 2 workers", "µs", ratio=False),
                    Metric("many-cpu", "master's CPU, 1,024 workers", "µs", ratio=False),
                    Metric("close", "close", "s"),
                ),
            ),
        ),
        peers=_FORKING,
        tall=True,
        seconds=2.0,
        deadline=180.0,
    ),
    sleep(
        64,
        ("1s", "100ms", "10ms", "1ms"),
        "The sleep test with 64 workers",
        "64, 640, 6,400 and 64,000 tasks on 64 workers.",
        peers=_LIGHT,
    ),
    sleep(
        1024,
        ("1s", "100ms", "10ms"),
        "The sleep test with 1,024 workers",
        "1,024, 10,240 and 102,400 tasks on 1,024 workers. A million tasks of 1 ms are more than "
        "two cores can wake.",
        peers=_FORKING,
        deadline=180.0,
    ),
    Row(
        "evolution",
        "Evolution strategies as in the Fiber paper",
        "A population of 2,048 for 50 generations, from 2 to 256 workers, chunksize=1. The "
        "simulator is a stand-in that sleeps for 2.5 to 7.5 ms; the ideal is the sum of that over "
        "the number of workers. Where 50 generations would take more than some seconds, they are "
        "extrapolated from the first ones (three at least). Less is better. *CPU of the master* is "
        "its processor time in the 50 generations, its own part of the strategy included.",
        tuple(_evolving(workers) for workers in EVOLVERS),
        peers=_EVOLVING,
        tall=True,
        seconds=6.0,
        panels=(
            Panel("workers", "50 generations, s", tuple((n, str(n)) for n in EVOLVERS)),
            Panel("workers", "CPU of the master, s", tuple((n, f"{n}-cpu") for n in EVOLVERS)),
        ),
    ),
    Row(
        "simulation",
        "Ten thousand simulated workers",
        "What a master can carry. It is a real one: Pool, scheduler, crew, loop, Unix sockets, "
        "handshakes. Its workers are simulated: a crowd of processes holds their connections, "
        "speaks the pool's protocol and only waits as long as the tasks would take. `map` with "
        "chunksize=1; the ideal is workers over the length of a task. Where the master's CPU is "
        "near one core, it is the limit; the rest of the machine is the crowd's. *CPU a task* "
        "is the master's.",
        tuple(_simulated(workers) for workers in SIMULATED),
        peers=("fiber",),
        tall=True,
        seconds=3.0,
        deadline=300.0,
        panels=(
            Panel("workers", "tasks of 1 s, tasks/s", tuple((n, f"{n}-1s") for n in SIMULATED)),
            Panel("workers", "empty tasks, tasks/s", tuple((n, f"{n}-empty") for n in SIMULATED)),
            Panel(
                "workers",
                "master's CPU a task of 1 s, µs",
                tuple((n, f"{n}-1s-cpu") for n in SIMULATED),
            ),
            Panel("workers", "until all are ready, s", tuple((n, f"{n}-ready") for n in SIMULATED)),
        ),
    ),
)
