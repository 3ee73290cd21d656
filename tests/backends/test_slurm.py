"""The slurm backend on a real cluster."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.backends.slurm_cluster import jobs, probe, slurm, until

from fiber.backends.base import Backend, JobSpec, JobState
from fiber.backends.slurm import SlurmBackend
from fiber.config import config
from fiber.errors import StartError
from fiber.resources import Resources
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
    assert not (tmp_path / "shared").exists() or not os.listdir(tmp_path / "shared")


class Conformance(BackendConformance):
    patience = 40.0

    @pytest.fixture
    def backend(self, cluster: None) -> Iterator[Backend]:
        backend = SlurmBackend()
        yield backend
        backend.close()


@pytest.fixture(params=["batch", "pool"])
def submit(
    cluster: None, request: pytest.FixtureRequest
) -> Iterator[Callable[..., dict[str, str]]]:
    """Have a job run, and return what Slurm says of it and what it says of itself."""
    config.slurm_mode = request.param
    backend = SlurmBackend()

    def submit(**resources: Any) -> dict[str, str]:
        source = "import json, os, time; print(json.dumps(dict(os.environ)), flush=True)"
        command = [*backend.python, "-c", f"{source}; time.sleep(60)"]
        spec = JobSpec("a job", command, {}, Resources(**resources))
        (job,) = backend.submit([spec])
        text = until(lambda: backend.logs(job), "it has written")
        told = json.loads(text)
        shown = slurm("scontrol", "show", "job", "--oneliner", told["SLURM_JOB_ID"])
        found = dict(part.split("=", 1) for part in shown.split() if "=" in part)
        backend.kill([job])
        return {**told, **found}

    yield submit
    backend.close()


Told = Callable[..., "dict[str, str]"]


def test_resources_are_those_of_the_job(submit: Told) -> None:
    told = submit(cpu=2, memory="500Mi", gpu=1)
    assert told["NumCPUs"] == "2"
    assert "mem=500M" in told["TRES"]
    assert re.fullmatch(r"\d", told["CUDA_VISIBLE_DEVICES"])


def test_what_is_not_asked_for_is_of_the_configuration(submit: Told) -> None:
    config.init(cpu_per_job=2, mem_per_job=300, slurm_partition="high", slurm_time="0:07:00")
    config.slurm_options = "--comment='two words' --nice=5"
    told = submit()
    assert (told["NumCPUs"], told["Partition"], told["TimeLimit"]) == ("2", "high", "00:07:00")
    assert "mem=300M" in told["TRES"]
    assert told["Nice"] == "5"


def test_the_variables_of_users_are_heeded(submit: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "high")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "9")
    told = submit()
    assert (told["Partition"], told["TimeLimit"]) == ("high", "00:09:00")


def test_what_slurm_tells_a_job_is_no_option_of_another(
    submit: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NTASKS": "7",
        "SLURM_MEM_PER_CPU": "300",
        "SLURM_MEM_PER_NODE": "300",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_PARTITION": "high",
        "SLURM_TIMELIMIT": "3",
        "SLURM_EXPORT_ENV": "NONE",
        "SBATCH_ARRAY_INX": "0-3",
    }.items():
        monkeypatch.setenv(name, value)
    told = submit(memory=200)
    assert told["SLURM_JOB_ID"] != "1"
    assert (told["NumCPUs"], told["NumTasks"]) == ("1", "1")
    assert (told["Partition"], told["TimeLimit"]) == ("main", "01:00:00")


def test_logs_of_jobs_that_failed_stay_where_the_user_is(cluster: None, tmp_path: Path) -> None:
    backend = SlurmBackend()
    programs = ("print('fine')", "raise SystemExit('wrong')")
    jobs = backend.submit(
        [JobSpec("a job", [*backend.python, "-c", code], {}, Resources()) for code in programs]
    )
    until(lambda: all(s.state is JobState.ENDED for s in backend.status(jobs)), "their ends")
    assert backend.logs(jobs[0]) == "fine"
    backend.close()
    (log,) = tmp_path.glob("*.log")
    assert log.name == f"fiber-{jobs[1].id}.log"
    assert log.read_text() == "wrong\n"


def test_logs_are_kept_where_they_are_wanted(cluster: None, tmp_path: Path) -> None:
    config.slurm_log_folder = str(tmp_path / "logs")
    backend = SlurmBackend()
    command = [*backend.python, "-c", "print('fine')"]
    (job,) = backend.submit([JobSpec("a job", command, {}, Resources())])
    until(lambda: backend.status([job])[0].state is JobState.ENDED, "its end")
    backend.close()
    assert (tmp_path / "logs" / f"fiber-{job.id}.log").read_text() == "fine\n"


def test_a_step_needs_an_allocation(cluster: None) -> None:
    config.slurm_mode = "step"
    with pytest.raises(StartError, match="in none: run it under `sbatch` or `salloc`"):
        SlurmBackend().submit([JobSpec("a job", ["true"], {}, Resources())])


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
