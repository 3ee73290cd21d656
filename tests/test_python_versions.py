"""Fiber runs on every Python that it says it supports: a smoke test of those found here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cloudpickle
import pytest

ROOT = Path(__file__).resolve().parent.parent
MINORS = [minor for minor in range(10, 15) if minor != sys.version_info.minor]


def candidates(minor: int) -> list[Path]:
    name = f"python3.{minor}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    folders = sorted((pyenv / "versions").glob("*/bin"))
    folders += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    return [folder / name for folder in folders if os.access(folder / name, os.X_OK)]


def interpreter(minor: int) -> str | None:
    """The first that really is CPython 3.`minor`: a pyenv shim may stand for one not installed."""
    code = (
        "import sys; print(sys.implementation.name, *sys.version_info[:2]); print(sys.executable)"
    )
    for path in candidates(minor):
        try:
            done = subprocess.run(
                [path, "-c", code], capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        lines = done.stdout.splitlines()
        if done.returncode == 0 and len(lines) == 2 and lines[0] == f"cpython 3 {minor}":
            return lines[1]
    return None


def test_the_range_is_that_of_the_project() -> None:
    declared = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert declared is not None
    assert min(*MINORS, sys.version_info.minor) == int(declared[1])


@pytest.mark.parametrize("minor", MINORS, ids=lambda minor: f"3.{minor}")
def test_smoke(minor: int, tmp_path: Path) -> None:
    python = interpreter(minor)
    if python is None:
        pytest.skip(f"no Python 3.{minor} on this machine")
    # All that it gets besides its standard library: cloudpickle, which is pure Python, and fiber.
    shutil.copytree(
        Path(cloudpickle.__file__).parent,
        tmp_path / "site" / "cloudpickle",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    drop = ("PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
    environ = {name: value for name, value in os.environ.items() if name not in drop}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(tmp_path / "site")])
    environ["PYTHONPYCACHEPREFIX"] = str(tmp_path / "pycache")
    done = subprocess.run(
        [python, "-s", "-W", "error", ROOT / "tests" / "smoke.py"],
        env=environ,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "smoke ok\n"), done.stdout + done.stderr
    assert done.stderr == ""
