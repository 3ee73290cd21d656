"""Waiting for what another process does, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

DEADLINE = 20.0


@pytest.fixture
def until() -> Callable[..., Any]:
    """`until(condition)` returns the first true value of `condition()`, or fails after 20 s."""

    def wait(condition: Callable[[], Any], what: str = "") -> Any:
        deadline = time.monotonic() + DEADLINE
        while not (value := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"{DEADLINE:g} s went by without {what or condition}")
            time.sleep(0.01)
        return value

    return wait


@pytest.fixture
def gone(until: Callable[..., Any]) -> Callable[[int], None]:
    """`gone(pid)` waits until there is no such process any more."""

    def wait(pid: int) -> None:
        until(lambda: not psutil.pid_exists(pid), f"the end of process {pid}")

    return wait
