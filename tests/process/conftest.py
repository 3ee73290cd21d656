"""Waiting for what another process does, with a deadline."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest
from tests.waiting import until


@pytest.fixture
def gone() -> Callable[[int], None]:
    """`gone(pid)` waits until there is no such process any more."""

    def wait(pid: int) -> None:
        until(lambda: not psutil.pid_exists(pid), f"the end of process {pid}")

    return wait
