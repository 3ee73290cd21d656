"""What the tests elsewhere share: the site, once for each that a test is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.elsewhere.kubernetes_sites import KUBERNETES_SITES
from tests.elsewhere.sites import SITES, Site
from tests.elsewhere.slurm_sites import SLURM_SITES

ALL_SITES = {**SITES, **KUBERNETES_SITES, **SLURM_SITES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = any("site" in mark.args for mark in metafunc.definition.iter_markers("parametrize"))
    if "site" in metafunc.fixturenames and not chosen:
        test = metafunc.function.__name__
        sites = [name for name, kind in ALL_SITES.items() if kind.only is None or test in kind.only]
        metafunc.parametrize("site", sites, indirect=True)


@pytest.fixture
def site(
    request: pytest.FixtureRequest,
    engine: Callable[..., None],
    clean_environ: None,
    tmp_path: Path,
) -> Iterator[Site]:
    """Where processes run; nothing of a program may be left there after the test."""
    kind = ALL_SITES[request.param]
    engine(kind.backend, kind.probe)
    site = kind(tmp_path)
    yield site
    try:
        site.close()
        site.leaves_nothing()
    finally:
        site.forget()
