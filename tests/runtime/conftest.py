"""A session that works, and a pickle that must not be loaded while strangers send it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.runtime.strangers import Bomb, Live, looked_up

import fiber


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that must never be loaded."""
    proof = tmp_path / "unpickled"
    looked_up.clear()
    data = pickle.dumps(Bomb(proof))
    yield data
    assert not proof.exists(), "what a stranger sent was unpickled"
    assert not [name for name in looked_up if name.endswith(".mkdir")]
    pickle.loads(data)
    os.rmdir(proof)  # so it would have worked


@pytest.fixture
def live(bomb: bytes, caplog: pytest.LogCaptureFixture) -> Iterator[Live]:
    """A session with a pool that works until the end of the test."""
    with fiber.Pool(2) as pool:
        live = Live(pool)
        yield live
        live.end()
