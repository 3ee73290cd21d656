"""What the tests of chaos share: a killer of workers, and programs that are watched from outside.

A program is a script of its own, in a session of its own, whose environment carries a mark. All
that it starts inherits the mark, so that whatever outlives it is found and named, orphans included.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

MARK = "CHAOS_OF_FIBER"


class Program:
    """A running script; its streams go to files, so that no orphan can hold up their reader."""

    def __init__(self, process: subprocess.Popen[str], mark: str, out: Path, err: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.began = time.monotonic()
        self._mark = f"{MARK}={mark}".encode()
        self._out = out
        self._err = err
        self._memory = set(_shared_memory())

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for(self, text: str, within: float = 30.0) -> None:
        """Wait until it has printed `text`."""
        deadline = time.monotonic() + within
        while text not in self.out:
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(
                    f"The program (exit code {self.process.poll()}) did not print {text!r} within "
                    f"{within:g} s.\nIts output:\n{self.out}\nIts errors:\n{self.err}"
                )
            time.sleep(0.002)

    def interrupt(self) -> None:
        """Send SIGINT to its process group, as a terminal does for Ctrl-C."""
        os.killpg(self.pid, signal.SIGINT)

    def end(self, within: float) -> int:
        """Wait until it has ended by itself; return its exit code."""
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(
                f"After {within:g} s the program is still there.\n"
                f"Its output:\n{self.out}\nIts errors:\n{self.err}"
            )

    def processes(self) -> list[psutil.Process]:
        """Return the living processes that carry its mark."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(pid))
        return found

    def agents(self) -> list[int]:
        """Return the process IDs of its agents, those of its workers (the same program) not."""
        return agents_of(self.pid)

    def left(self, *, folder: bool = True) -> list[str]:
        """Return what there is of it, each thing with a name."""
        names = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())[:120]
                names.append(f"process {process.pid} ({process.status()}): {command}")
        if folder:
            names += [str(path) for path in self.folders()]
        memory = [name for name in _shared_memory() if name not in self._memory]
        return names + [f"/dev/shm/{name}" for name in memory if not self._is_of_others(name)]

    def _is_of_others(self, name: str) -> bool:
        """Whether shared memory (fiber-<uid>-<pid>-...) is that of a living process not of it."""
        pid = int(name.split("-")[2])
        return psutil.pid_exists(pid) and pid not in [process.pid for process in self.processes()]

    def folders(self) -> list[Path]:
        """Return the session folder of the program, if it is there."""
        found = Path(tempfile.gettempdir()).glob(f"fiber-{os.getuid()}-{self.pid}-*")
        return [path for folder in found for path in (folder, *folder.iterdir())]

    def leaves_nothing(self, within: float = 5.0, *, folder: bool = True) -> None:
        """Fail unless all of it is gone in time."""
        deadline = time.monotonic() + within
        while left := self.left(folder=folder):
            if time.monotonic() > deadline:
                for process in self.processes():
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                names = "\n  and ".join(left)
                pytest.fail(
                    f"{within:g} s after the program's end there is still {names}\n"
                    f"Its output:\n{self.out}\nIts errors:\n{self.err}"
                )
            time.sleep(0.02)


@pytest.fixture
def program(
    start_script: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> Iterator[Callable[..., Program]]:
    """Start a watched program: `program(source, *args, env={}, **popen)`."""
    started: list[Program] = []

    def start(source: str, *args: str, env: dict[str, str] | None = None, **popen: Any) -> Program:
        number = len(started)
        mark = f"{os.getpid()}-{time.time_ns()}"
        out, err = tmp_path / f"out{number}", tmp_path / f"err{number}"
        with out.open("w") as out_file, err.open("w") as err_file:
            options = {"stdout": out_file, "stderr": err_file, **popen}
            process = start_script(
                source, *args, env={**(env or {}), MARK: mark}, name=f"script{number}.py", **options
            )
        started.append(Program(process, mark, out, err))
        return started[-1]

    yield start
    for each in started:
        for process in each.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for path in Path(tempfile.gettempdir()).glob(f"fiber-{os.getuid()}-{each.pid}-*"):
            shutil.rmtree(path, ignore_errors=True)


def agents_of(pid: int) -> list[int]:
    """Return the process IDs of the agents that process `pid` started."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            if "fiber.runtime.agent" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


@pytest.fixture
def agents() -> Callable[[], list[int]]:
    """Return the process IDs of this process's own agents."""
    return lambda: agents_of(os.getpid())


def _shared_memory() -> list[str]:
    with contextlib.suppress(OSError):
        return [name for name in os.listdir("/dev/shm") if name.startswith("fiber")]
    return []


class Killer:
    """A thread that kills a random worker of a pool, again and again.

    Attributes:
        kills: process IDs of those that it killed.
    """

    def __init__(self, pool: Any, every: float, freeze: float) -> None:
        self.kills: list[int] = []
        self._pool = pool
        self._every = every
        self._freeze = freeze
        self._enough = threading.Event()
        self._random = random.Random(7)
        self._thread = threading.Thread(target=self._run, name="killer")

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._enough.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._enough.wait(self._every * self._random.uniform(0.5, 1.5)):
            pids = self._pool.pids()
            if not pids:
                continue
            pid = self._random.choice(pids)
            with contextlib.suppress(ProcessLookupError):
                if self._freeze:
                    os.kill(pid, signal.SIGSTOP)
                    self._enough.wait(self._freeze)
                os.kill(pid, signal.SIGKILL)
                self.kills.append(pid)


@pytest.fixture
def killer() -> Callable[..., Killer]:
    """Kill workers while a block runs: `with killer(pool, every=0.15, freeze=0.0) as k: ...`.

    With `freeze`, each is stopped for so many seconds before.
    """

    def make(pool: Any, every: float = 0.15, freeze: float = 0.0) -> Killer:
        return Killer(pool, every, freeze)

    return make
