"""Runs test classes of CPython's file in the Pythons of this machine, each in its own process.

    Interpreter.find ─► run(class) ─► python -m tests.stdlib.one ─► Outcome of each method
                            ▲                      │
                            └── the rest, again ───┘  when a test has ended the process

An interpreter gets what a worker gets: its standard library, cloudpickle and Fiber.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import cloudpickle
from tests.stdlib import left_out
from tests.stdlib.suite import ROOT
from tests.test_python_versions import interpreter

NEWEST = 13
SECONDS_OF_A_TEST = 60.0
SECONDS_OF_A_CLASS = 280.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a test: `state` is passed, failed, skipped or left out; `text` says why."""

    state: str
    text: str = ""
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python with the test classes of its own `_test_multiprocessing`.

    Attributes:
        python: path of its executable.
        version: as "3.13".
        classes: names of the test methods, by class.
    """

    python: str
    version: str
    classes: dict[str, list[str]]

    @classmethod
    @functools.cache
    def find(cls, minor: int) -> Interpreter | None:
        """Return CPython 3.`minor`; None if it is not here, or without its tests."""
        own = minor == sys.version_info.minor
        python = sys.executable if own else interpreter(minor)
        if python is None:
            return None
        done = subprocess.run(
            [python, "-s", Path(__file__).with_name("suite.py")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            if "No such file" in done.stderr:  # Linux distributions pack the tests apart
                return None
            raise RuntimeError(done.stderr)
        return cls(python, f"3.{minor}", json.loads(done.stdout)["classes"])

    def run(
        self,
        test_class: str,
        folder: Path,
        methods: list[str] | None = None,
        seconds: float = SECONDS_OF_A_TEST,
    ) -> dict[str, Outcome]:
        """Run a class, or `methods` of it.

        Args:
            test_class: its name.
            folder: for what the run needs; it may be used for many.
            methods: names of tests; all by default.
            seconds: for each test.
        """
        outcomes: dict[str, Outcome] = {}
        waiting = []
        for method in methods or self.classes[test_class]:
            if reason := left_out.reason(test_class, method):
                outcomes[method] = Outcome("left out", reason)
            else:
                waiting.append(method)
        while waiting:
            done = self._run(test_class, waiting, folder, seconds)
            outcomes.update(done)
            waiting = [method for method in waiting if method not in done]
        return outcomes

    def _run(
        self, test_class: str, methods: list[str], folder: Path, seconds: float
    ) -> dict[str, Outcome]:
        """Run `methods` in one process; those that it did not come to are not in the result."""
        with tempfile.TemporaryDirectory(dir=folder, prefix="r") as name:
            results, output, cwd = (Path(name, part) for part in ("results", "output", "cwd"))
            results.touch()
            cwd.mkdir()
            with output.open("wb") as stream:
                process = subprocess.Popen(
                    [
                        *(self.python, "-s", "-m", "tests.stdlib.one", results, str(seconds)),
                        *(test_class, *methods),
                    ],
                    cwd=cwd,
                    env=environment(folder),
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
            late = ""
            try:
                process.wait(SECONDS_OF_A_CLASS)
            except subprocess.TimeoutExpired:
                late = f"the class took more than {SECONDS_OF_A_CLASS:g} s\n"
            finally:
                if process.returncode != 0:  # else leave what it left, to be found
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            lines = [json.loads(line) for line in results.read_text().splitlines()]
            said = output.read_text(errors="replace")[-20_000:]
        outcomes: dict[str, Outcome] = {}
        running = general = ""
        for line in lines:
            method, state = line["test"], line["outcome"]
            if state == "began":
                running = method
            elif method:
                running = ""
                text = line["text"] + (f"\nOutput:\n{said}" if state == "failed" else "")
                outcomes[method] = Outcome(state, text, line["seconds"])
            elif state == "skipped":  # the whole class
                return {name: Outcome(state, line["text"]) for name in methods}
            else:
                general += line["text"]
        if running:
            text = f"{late}the process ended with {process.returncode} within {running}:\n{said}"
            outcomes[running] = Outcome("failed", text, seconds)
        elif general or process.returncode or late or not outcomes:
            # Not the fault of one test: of none can be said that it passed.
            text = f"{late}{general}the process ended with {process.returncode}:\n{said}"
            return {name: Outcome("failed", text) for name in methods}
        return outcomes


def newest() -> int:
    """Return the newest minor version that is here with its tests, besides the running one."""
    return next(
        (
            minor
            for minor in range(NEWEST, 9, -1)
            if minor != sys.version_info.minor and Interpreter.find(minor)
        ),
        sys.version_info.minor,
    )


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a run: nothing to import but Fiber, cloudpickle and the tests."""
    site = folder / "site"
    if not site.exists():
        shutil.copytree(
            Path(cloudpickle.__file__).parent,
            site / "cloudpickle",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    drop = ("PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
    environ = {name: value for name, value in os.environ.items() if name not in drop}
    environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "src", ROOT, site)))
    environ["PYTHONPYCACHEPREFIX"] = str(folder / "pycache")
    return environ
