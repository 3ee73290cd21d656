"""The backend in docs/backends.md is one: it passes the suite that the page speaks of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fiber.testing import BackendConformance

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backends.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code.partition("\nbackend = ")[0], str(PAGE), "exec"), names)
    return names


class TestPage(BackendConformance):
    patience = 20.0

    @pytest.fixture
    def backend(self, example: dict[str, Any]) -> Iterator[Any]:
        backend = example["NiceBackend"]()
        yield backend
        backend.close()
