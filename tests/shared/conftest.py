"""What tests of shared memory share: a look at the session's files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest

from fiber.runtime import folders, session

NAME = re.compile(r"\.(held|ticket)-")


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
