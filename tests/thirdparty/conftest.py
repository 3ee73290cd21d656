"""Runs the programs of this folder: libraries that were written for multiprocessing, with Fiber.

Each program runs with Fiber and, as a check of the program and of what is expected of it, with
multiprocessing in Fiber's place. Nothing is imported here, for some of the libraries leave threads.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).resolve().parent / "programs"
DEADLINE = 90  # seconds for one program; each needs a few on an idle machine
IMPORT = "import fiber\n"

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]
RunProgram = Callable[..., list[str]]


@pytest.fixture(params=["fiber", pytest.param("multiprocessing", marks=pytest.mark.slow)])
def run_program(request: pytest.FixtureRequest, run_script: RunScript) -> RunProgram:
    """Run a program with Fiber or multiprocessing; return the lines that it printed.

    `run(name, *args, instead="multiprocessing")`; `instead` is what takes Fiber's place.
    """

    def run(name: str, *args: str, instead: str = "multiprocessing") -> list[str]:
        source = (PROGRAMS / name).read_text(encoding="utf-8")
        assert IMPORT in source
        if request.param != "fiber":
            source = source.replace(IMPORT, f"import {instead} as fiber\n")
        # What a library deprecates is not what is tested; whatever else is said is. What processes
        # write at the same time shows at once.
        env = {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
        done = run_script(source, *args, timeout=DEADLINE, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        return done.stdout.splitlines()

    return run
