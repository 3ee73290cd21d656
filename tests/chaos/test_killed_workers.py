"""Workers are killed at random, several a second, while 100,000 items run: nobody notices."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

import fiber

ITEMS = 100_000
KILLS = 8  # fewer would mean that the run was too short to say anything


# Lambdas travel by value. A function of this module would have each new worker import pytest, which
# takes so long that several kills hit its first item.
tiny = lambda i: i * 3 + 1  # noqa: E731


def _vary() -> Callable[[int], int]:
    from time import sleep

    def vary(i: int) -> int:
        """Take 0 to 1 ms: most items nothing, every fourth up to one millisecond."""
        if i % 4 == 0:
            sleep(i % 1000 / 1e6)
        return i * 3 + 1

    return vary


vary = _vary()

EXPECTED = [i * 3 + 1 for i in range(ITEMS)]


def of_map(pool: Any, func: Callable[[int], int]) -> list[int]:
    return pool.map(func, range(ITEMS))


def of_imap(pool: Any, func: Callable[[int], int]) -> list[int]:
    return list(pool.imap(func, range(ITEMS)))


def of_imap_unordered(pool: Any, func: Callable[[int], int]) -> list[int]:
    return sorted(pool.imap_unordered(func, range(ITEMS)))


CALLS = pytest.mark.parametrize("call", [of_map, of_imap, of_imap_unordered])


@CALLS
def test_killed_workers_cost_no_result(
    call: Callable[..., list[int]], killer: Callable[..., Any]
) -> None:
    # Random kills may well hit one item several times, which is what `retries` is for.
    with fiber.Pool(4, retries=20) as pool, killer(pool) as k:
        assert call(pool, vary) == EXPECTED
        stats = pool.stats()
    assert len(k.kills) >= KILLS
    assert stats.died >= len(k.kills) // 2
    assert stats.failed == 0


@CALLS
def test_frozen_and_then_killed_workers_cost_no_result(
    call: Callable[..., list[int]], killer: Callable[..., Any]
) -> None:
    with fiber.Pool(4, retries=20) as pool, killer(pool, freeze=0.1) as k:
        assert call(pool, vary) == EXPECTED
    assert len(k.kills) >= KILLS


@CALLS
def test_tiny_items_survive_with_the_default_number_of_retries(
    call: Callable[..., list[int]], killer: Callable[..., Any]
) -> None:
    kills = 0
    deadline = time.monotonic() + 60
    with fiber.Pool(4) as pool:
        while kills < KILLS and time.monotonic() < deadline:
            with killer(pool, every=0.05) as k:
                assert call(pool, tiny) == EXPECTED
            kills += len(k.kills)
    assert kills >= KILLS


def test_single_calls_survive_too(killer: Callable[..., Any]) -> None:
    with fiber.Pool(4, retries=20) as pool, killer(pool, every=0.1) as k:
        results = [pool.apply_async(vary, (i,)) for i in range(3_000)]
        assert [result.get(60) for result in results] == EXPECTED[:3_000]
        i = 0
        while len(k.kills) < KILLS:
            assert pool.apply(vary, (i,)) == EXPECTED[i]
            i += 1


def test_all_workers_killed_at_once_again_and_again() -> None:
    with fiber.Pool(4, retries=20) as pool:
        results = pool.imap(vary, range(20_000))
        seen = []
        for _ in range(10):
            seen += itertools.islice(results, 500)
            for pid in pool.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert seen + list(results) == EXPECTED[:20_000]
