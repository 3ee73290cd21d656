"""The slurm backend on a real cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.backends.slurm_cluster import jobs, probe, slurm, until

from fiber.backends.base import Backend
from fiber.backends.slurm import SlurmBackend
from fiber.config import config
from fiber.testing import BackendConformance


@pytest.fixture(autouse=True)
def cluster(
    engine: Callable[..., None],
    clean_environ: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[None]:
    engine("slurm", probe)
    monkeypatch.chdir(tmp_path)
    config.slurm_folder = str(tmp_path / "shared")
    yield
    until(lambda: not jobs(), "no job of Fiber left")
    assert not os.listdir(tmp_path / "shared") if (tmp_path / "shared").exists() else True


@pytest.fixture
def backend(cluster: None) -> Iterator[Backend]:
    backend = SlurmBackend()
    yield backend
    backend.close()


class Conformance(BackendConformance):
    patience = 40.0

    @pytest.fixture
    def backend(self, cluster: None) -> Iterator[Backend]:
        backend = SlurmBackend()
        yield backend
        backend.close()


class TestBatch(Conformance):
    """From a login node."""


class TestPool(Conformance):
    """Tasks of an allocation for all."""

    @pytest.fixture(autouse=True)
    def mode(self, cluster: None) -> None:
        config.slurm_mode = "pool"


class TestStep(Conformance):
    """In an allocation."""

    @pytest.fixture(autouse=True)
    def mode(self, cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        options = ["--ntasks=4", "--cpus-per-task=1", "--parsable", "--job-name=around"]
        job = slurm("sbatch", *options, "--output=/dev/null", "--wrap=sleep 600").strip()
        until(lambda: slurm("squeue", "-h", "-j", job, "-o%T").strip() == "RUNNING", "it runs")
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", slurm("squeue", "-h", "-j", job, "-o%C"))
        yield
        slurm("scancel", job)
