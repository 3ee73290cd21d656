"""Waiting for what another process, a container or a cluster does: always with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest


def until(
    condition: Callable[[], Any], what: str | Callable[[], str] = "", *, patience: float = 20.0
) -> Any:
    """Return the first true value of `condition()`; the test fails if that takes too long.

    Args:
        condition: asked again and again, at first after milliseconds.
        what: is to be true, in words, or returns them when it did not come true.
        patience: in seconds.
    """
    deadline = time.monotonic() + patience
    pause = 0.002
    while not (found := condition()):
        if time.monotonic() > deadline:
            words = what if isinstance(what, str) else what()
            pytest.fail(f"after {patience:g} s still not: {words or condition}")
        time.sleep(pause)
        pause = min(1.5 * pause, 0.05)
    return found
