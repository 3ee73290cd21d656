"""The rows of large data; the measurements are in `large`."""

from __future__ import annotations

from benchmarks.peers import SHARING
from benchmarks.rows.base import Case, Metric, Row

_ALL = ("fiber", "multiprocessing", "concurrent.futures", "loky", "joblib", "ray", "dask")
# It would put each of the hundred copies into the graph of the tasks; and it keeps a result as it
# is until it is fetched, so that the next task would change the array that it has at hand.
_WITHOUT_DASK = _ALL[:-1]


def _calls(name: str) -> tuple[Case, ...]:
    return (
        Case(name, (Metric("first", "first call", "GB/s"), Metric("warm", "later calls", "GB/s"))),
    )


def _twice(case: str, way: str) -> tuple[Metric, ...]:
    return (
        Metric(f"{case}-first", f"{way}, first", "s"),
        Metric(f"{case}-again", f"{way}, again", "s"),
    )


LARGE = (
    Row(
        "large-arguments",
        "Large arguments",
        "64 numpy arrays of 8 MB, new ones in each call, as arguments of `map` with chunksize=1, 2 "
        "warm workers, GB/s: more is better. A task reads one number of each page and returns the "
        "sum. joblib writes arrays into files that the workers map.",
        _calls("large-arguments"),
        peers=_ALL,
    ),
    Row(
        "large-results",
        "Large results",
        "The same as results: a task returns an array of 8 MB that it has at hand, and the main "
        "process reads one number of each page, GB/s: more is better.",
        _calls("large-results"),
        peers=_WITHOUT_DASK,
    ),
    Row(
        "constant",
        "One large array for many tasks",
        "One array of 256 MB for 100 tasks, on 2 workers, s: less is better. The tasks read one "
        "number of each page, or, *evaluated*, compare all numbers with those of a model. "
        "*Argument*: a plain argument of each task of a `map`; executors are told to make the "
        "chunks that multiprocessing makes. *Shared*: the peer's own way; `fiber.put`, "
        "multiprocessing's initializer under fork (whose first time begins with a new pool), "
        "`ray.put`, dask's `scatter`. *Again*: the same once more.",
        (
            Case("plain", _twice("plain", "argument"), peers=_WITHOUT_DASK),
            Case("shared", _twice("shared", "shared"), peers=SHARING),
            Case("evaluated", _twice("evaluated", "shared, evaluated"), peers=SHARING),
        ),
        peers=_ALL,
    ),
)
