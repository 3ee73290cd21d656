"""What tests of shared memory share: waiting with a deadline, a look at the session's files."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from fiber.runtime import folders, session

DEADLINE = 20.0
NAME = re.compile(r"\.(held|ticket)-")


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
def files() -> Callable[[], set[int]]:
    """`files()` returns the inodes of the files that this session has for shared memory."""

    def look() -> set[int]:
        found = set()
        folder = session.folder()
        for place in (folder, folders.memory_folder(folder)):
            if os.path.isdir(place):
                with os.scandir(place) as entries:
                    found |= {e.inode() for e in entries if NAME.search(e.name)}
        return found

    return look
