"""Jobs that squeue has forgotten: the accounting is asked, if there is one. Without a cluster."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fiber.backends.base import JobSpec, JobState
from fiber.backends.slurm import batch
from fiber.backends.slurm.batch import Batch
from fiber.backends.slurm.jobs import SlurmJob
from fiber.backends.slurm.shared import Shared
from fiber.config import config
from fiber.resources import Resources


@pytest.fixture
def forgotten(
    clean_environ: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], list[SlurmJob]]:
    """Have three jobs forgotten at once by a Slurm whose sacct is what is given."""
    monkeypatch.setattr(batch, "_FORGOTTEN", 0.0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    config.slurm_folder = str(tmp_path / "shared")

    def forgotten(sacct: str) -> list[SlurmJob]:
        for name, script in {"sbatch": "echo 17", "sacct": sacct}.items():
            (tmp_path / name).write_text(
                f"#!/bin/sh\necho $* >>{tmp_path}/called-{name}\n{script}\n"
            )
            (tmp_path / name).chmod(0o755)
        shared = Shared()
        home = Batch("fiber-x", shared, str(tmp_path), threading.Condition(), lambda: False)
        specs = [JobSpec("a job", ["true"], {}, Resources())] * 3
        jobs = home.submit(
            specs, lambda needs, count, home: [SlurmJob(i, needs, home) for i in range(count)]
        )
        home.update([])
        home.finish()
        assert home.idle
        shared.remove()
        return jobs

    return forgotten


def test_the_accounting_says_how_they_ended(
    forgotten: Callable[[str], list[SlurmJob]], tmp_path: Path
) -> None:
    jobs = forgotten("echo '17_0|COMPLETED|0:0|node1\n17_1|NODE_FAIL|0:0|node2\n17_2|FAILED|3:0|n'")
    found = [job.status[:3] for job in jobs]
    ended = JobState.ENDED
    assert found == [(ended, 0, ""), (ended, None, "NodeLost"), (ended, 3, "Error")]
    (call,) = (tmp_path / "called-sacct").read_text().splitlines()  # one for all
    assert "--jobs=17_0,17_1,17_2 --name=fiber-x" in call


@pytest.mark.parametrize(
    "sacct", ["echo Slurm accounting storage is disabled >&2; exit 1", "echo '17_0|RUNNING|0:0|n'"]
)
def test_without_accounting_nobody_knows(
    forgotten: Callable[[str], list[SlurmJob]], sacct: str
) -> None:
    for job in forgotten(sacct):
        assert job.status[:3] == (JobState.ENDED, None, "Forgotten")
        assert "knows nothing of it any more" in job.status.message
