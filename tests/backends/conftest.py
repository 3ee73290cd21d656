"""Engines for tests: those that are not there are skipped, unless they have to be there.

`FIBER_TEST_ENGINES` names those that must be, with commas between them: "docker,kubernetes".
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

# Read before the fixture that clears FIBER_ variables.
REQUIRED = {name for name in os.environ.get("FIBER_TEST_ENGINES", "").split(",") if name}


@pytest.fixture(scope="session")
def engine() -> Callable[[str, Callable[[], None]], None]:
    """`engine(name, probe)`: go on if `probe` raises nothing; else skip, or fail if it must be."""
    found: dict[str, str] = {}

    def require(name: str, probe: Callable[[], None]) -> None:
        if name not in found:
            try:
                probe()
                found[name] = ""
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
        if found[name] and name in REQUIRED:
            pytest.fail(f"FIBER_TEST_ENGINES asks for {name}: {found[name]}", pytrace=False)
        if found[name]:
            pytest.skip(f"no {name} answers here: {found[name]}")

    return require
