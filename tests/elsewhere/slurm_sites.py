"""Sites of Slurm: its three ways to have processes.

slurm       a program on a login node, whose processes are batch jobs
slurm-pool  the same, whose processes are tasks of allocations that it asks for
slurm-step  a program in an allocation, which it finds, whose processes are steps
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import psutil
from tests.backends import slurm_cluster
from tests.elsewhere.sites import CORE, Site, until


class Slurm(Site):
    """Batch jobs of the cluster of this machine, from a login node.

    Its nodes are all this machine. So that they look like others, each job runs on a stock Python
    with a host name, shared memory and temporary files of its own.
    """

    name = backend = "slurm"
    kind = "Slurm job"
    image = "the Python of slurm jobs"
    mode = "batch"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.shared = folder / "shared"
        self.stock = self._python("stock", f"{sys.base_prefix}/bin/python3 -S")

    @staticmethod
    def probe() -> None:
        slurm_cluster.probe()

    def _python(self, name: str, command: str) -> str:
        path = self.folder / name
        host = "$SLURMD_NODENAME-$SLURM_JOB_ID-${SLURM_PROCID:-0}"
        alone = f"hostname {host}; for place in /dev/shm $TMPDIR; do mount -t tmpfs none $place"
        path.write_text(
            "#!/bin/sh\nunset PYTHONPATH\n"
            f'exec unshare --uts --mount sh -c \'{alone}; done; exec {command} "$@"\' sh "$@"\n'
        )
        path.chmod(0o755)
        return str(path)

    def environment(self) -> dict[str, str]:
        return {
            "FIBER_BACKEND": "slurm",
            "FIBER_SLURM_MODE": self.mode,
            "FIBER_SLURM_FOLDER": str(self.shared),
            "FIBER_SLURM_LOG_FOLDER": str(self.folder / "logs"),
            "FIBER_SLURM_PYTHON": self.stock,
            "FIBER_MEM_PER_JOB": "400",  # the cluster's default is 100
        }

    def nowhere(self) -> dict[str, str]:
        path = self.folder / "nowhere.conf"
        path.write_text(
            "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\n"
            "NodeName=node1 CPUs=1\nPartitionName=main Nodes=ALL Default=YES\n"
        )
        return {"SLURM_CONF": str(path)}

    def wrong(self) -> dict[str, str]:
        return {"FIBER_SLURM_PYTHON": "/nobody/nothing:1"}

    def packages(self) -> dict[str, str]:
        return {"FIBER_SLURM_PYTHON": self._python("full", sys.executable)}

    def _queue(self, *options: str) -> list[str]:
        """Return the numbers of the jobs of this test, the running ones first."""
        rows = slurm_cluster.jobs(*options, fields="%i|%Z")
        return [number for number, folder in rows if folder == str(self.folder)]

    def jobs(self) -> list[str]:
        return self._queue("--states=RUNNING")

    def kill(self, job: str) -> None:
        slurm_cluster.slurm("scancel", "--batch", "--signal=KILL", job, check=False)

    def remove(self, job: str) -> None:
        slurm_cluster.slurm("scancel", job, check=False)

    def describe(self) -> str:
        told = [slurm_cluster.slurm("scontrol", "show", "job", "--details")]
        show = ("scontrol", "write", "batch_script")
        told += [slurm_cluster.slurm(*show, job, "-", check=False) for job in self._queue()]
        paths = [*self.shared.glob("*/jobs-*"), *(self.folder / "logs").iterdir()]
        told += [path.read_text(errors="replace") for path in paths]
        return "\n".join(told)

    def left(self) -> list[str]:
        folders = [str(path) for path in self.shared.iterdir()] if self.shared.exists() else []
        return [*self._queue(), *folders]

    def leaves_nothing(self, patience: float = 10.0) -> None:
        super().leaves_nothing(min(patience, 10.0))

    def forget(self) -> None:
        """Nothing is held."""


class SlurmPool(Slurm):
    """Tasks of allocations that the program makes."""

    name = "slurm-pool"
    mode = "pool"
    only = CORE | {
        "test_processes",
        "test_pipes",
        "test_members_of_a_ring_meet_at_its_address",
        "test_large_arguments_and_results",
        "test_workers_share_a_job_where_they_may",
        "test_a_task_that_fails_fails_alone_and_is_explained",
        "test_a_process_whose_job_is_taken_away_has_ended",
        "test_the_death_of_who_has_something_is_told_to_who_wants_it",
        "test_an_interrupt_is_one_exception",
    }

    def _tasks(self) -> dict[str, tuple[int, int]]:
        """Return the process IDs of keepers and agents, by what Fiber calls the job."""
        found: dict[str, tuple[int, int]] = {}
        for keeper in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                command = keeper.cmdline()
                if "keep" not in command or str(self.shared) not in " ".join(command):
                    continue
                if "srun" in command[0] or not command[0].startswith("/"):
                    continue
                told = keeper.environ()
                agents = [child.pid for child in keeper.children()]
                if agents and not any("keep" in c.cmdline() for c in keeper.children()):
                    job, step, task = (
                        told[f"SLURM_{part}"] for part in ("JOB_ID", "STEP_ID", "PROCID")
                    )
                    found[f"{job}.{step}/{task}"] = keeper.pid, agents[0]
        return found

    def jobs(self) -> list[str]:
        return sorted(self._tasks())

    def kill(self, job: str) -> None:
        self._end(job, 1)

    def remove(self, job: str) -> None:
        self._end(job, 0)

    def _end(self, job: str, which: int) -> None:
        pids = self._tasks().get(job)
        if pids is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[which], signal.SIGKILL)


class SlurmStep(SlurmPool):
    """Steps of an allocation that the program is in."""

    name = "slurm-step"
    mode = "auto"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        told = folder / "allocation"
        self._job = slurm_cluster.slurm(
            *("sbatch", "--parsable", "--ntasks=8", "--mem-per-cpu=400", "--job-name=around"),
            *("--output=/dev/null", f"--wrap=env > {told}.new; mv {told}.new {told}; sleep 600"),
        ).strip()
        until(told.exists, "the allocation")
        self._variables = dict(
            line.split("=", 1) for line in told.read_text().splitlines() if line[:6] == "SLURM_"
        )

    def environment(self) -> dict[str, str]:
        settings = super().environment()
        del settings["FIBER_BACKEND"]  # it is found
        return {**self._variables, **settings}

    def forget(self) -> None:
        slurm_cluster.slurm("scancel", self._job, check=False)


SLURM_SITES = {site.name: site for site in (Slurm, SlurmPool, SlurmStep)}
