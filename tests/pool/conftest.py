"""Fixtures of the pool's tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fiber


@pytest.fixture
def pool() -> Iterator[fiber.Pool]:
    with fiber.Pool(2) as pool:
        yield pool


@pytest.fixture(params=["fiber", "multiprocessing"])
def make_pool(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Make pools of Fiber and, for comparison, of multiprocessing; ended after the test."""
    pools: list[Any] = []
    context = multiprocessing.get_context("spawn")
    factory: Any = fiber.Pool if request.param == "fiber" else context.Pool

    def make(*args: Any, **kwargs: Any) -> Any:
        pools.append(factory(*args, **kwargs))
        return pools[-1]

    yield make
    while pools:
        pools[-1].terminate()
        pools.pop().join()


@pytest.fixture
def collect() -> Callable[..., tuple[list[Any], list[BaseException]]]:
    """Run a function on items in any of the pool's ways; return values and exceptions, in order."""
    return _collect


def _collect(
    pool: fiber.Pool,
    how: str,
    func: Callable[[Any], Any],
    items: Any,
    chunksize: int | None = None,
    **options: Any,
) -> tuple[list[Any], list[BaseException]]:
    values: list[Any] = []
    errors: list[BaseException] = []
    if how == "apply":
        pending = [pool.apply_async(func, (item,), **options) for item in items]
        for result in pending:
            try:
                values.append(result.get())
            except Exception as error:
                errors.append(error)
    elif how in ("map", "starmap"):
        if how == "starmap":
            items = [(item,) for item in items]
        run = getattr(pool, how)
        for outcome in run(func, items, chunksize, return_exceptions=True, **options):
            (errors if isinstance(outcome, BaseException) else values).append(outcome)
    else:
        results = getattr(pool, how)(func, items, chunksize, **options)
        while True:
            try:
                values.append(next(results))
            except StopIteration:
                break
            except Exception as error:
                errors.append(error)
        if how == "imap_unordered":
            values.sort()
    return values, errors
