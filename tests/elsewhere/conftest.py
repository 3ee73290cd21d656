"""What the tests elsewhere share: the site, once for each that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.elsewhere.sites import SITES, Site


@pytest.fixture(params=SITES)
def site(
    request: pytest.FixtureRequest,
    engine: Callable[..., None],
    clean_environ: None,
    tmp_path: Path,
) -> Iterator[Site]:
    """Where processes run; nothing of a program may be left there after the test."""
    kind = SITES[request.param]
    engine(kind.backend, kind.probe)
    site = kind(tmp_path)
    yield site
    try:
        site.close()
        site.leaves_nothing()
    finally:
        site.forget()
