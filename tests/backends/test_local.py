"""The local backend on its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fiber.backends.base import Backend
from fiber.backends.local import LocalBackend
from fiber.testing import BackendConformance


class TestLocal(BackendConformance):
    patience = 20.0
    has_logs = False
    close_ends_jobs = False

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = LocalBackend()
        yield backend
        backend.close()
