"""The real Slurm that tests run on: whether it is there, and what it has of us."""

from __future__ import annotations

import functools
import os
import subprocess

import pytest
from tests import waiting

PATIENCE = 40.0

until = functools.partial(waiting.until, patience=PATIENCE)


def slurm(*command: str, check: bool = True, text: str = "") -> str:
    """Run a command of Slurm as a user would; return what it wrote."""
    ended = subprocess.run(
        command, check=False, input=text, capture_output=True, text=True, timeout=60
    )
    if check and ended.returncode:
        pytest.fail(f"{' '.join(command)} failed: {ended.stderr}")
    return ended.stdout


def probe() -> None:
    """Raise what keeps Slurm from being used."""
    if "SLURM_CONF" not in os.environ:
        raise RuntimeError("SLURM_CONF is not set: source env.sh of the cluster")
    subprocess.run(["scontrol", "ping"], check=True, capture_output=True, timeout=20)


def jobs(*options: str, fields: str = "%i|%T|%j") -> list[list[str]]:
    """Return what squeue shows of Fiber's jobs that have not ended, or of those asked for."""
    out = slurm("squeue", "--noheader", "--array", f"--format={fields}|%j", *options)
    rows = [line.split("|") for line in out.splitlines()]
    return [row[:-1] for row in rows if row[-1].startswith("fiber-")]
