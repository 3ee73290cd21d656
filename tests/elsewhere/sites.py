"""Where the programs of these tests have their processes: a site; each engine has one or more.

    test ─► site.run("a program") ─► master: python script.py ─► FIBER_BACKEND ─► containers, pods
      ▲                                 │ what it prints                                 │
      └──────── Program ◄───────────────┘           site.jobs, kill, remove ─────────────┘

The tests know of a site what is here, and nothing of its engine. A new one is a subclass, and an
entry in `SITES`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests import waiting

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
IMAGE = f"local/python:{sys.version_info[0]}.{sys.version_info[1]}"
"""A stock Python: it has nothing of Fiber, and no packages."""
MARK = "TESTS_OF_FIBER"
PATIENCE = 60.0
"""Seconds for what takes one or two where nothing else runs."""


CORE = frozenset(
    {
        "test_all_methods_work",
        "test_a_pool_in_a_worker_of_a_pool",
        "test_served_objects",
        "test_managers",
        "test_workers_that_are_taken_away_cost_no_result",
        "test_a_master_that_is_killed_leaves_nothing",
    }
)
"""The tests for each way to have processes on an engine; one of its ways runs all."""


until = functools.partial(waiting.until, patience=PATIENCE)


class Program:
    """A user's program, which is the master; its streams go to files."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        number = len(list(folder.glob("out-*")))
        self._out, self._err = folder / f"out-{number}", folder / f"err-{number}"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    @property
    def lines(self) -> list[str]:
        """What it printed."""
        return self.out.splitlines()

    @property
    def exit_code(self) -> int | None:
        """Negative for a signal; None while it runs."""
        return self._process.poll()

    def wait_for(self, text: str) -> None:
        """Wait until it has printed `text`."""
        self.wait_until(lambda: text in self.out, f"{text!r} printed")

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until `condition`; fail if it has ended before, or that takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.exit_code is not None and not condition():
                pytest.fail(f"It has ended, and not: {what}. {self.all()}")
            if time.monotonic() > deadline:
                self._dump()
                pytest.fail(f"After {PATIENCE:g} s still not: {what}. {self.all()}")
            time.sleep(0.02)

    def end(self, patience: float = PATIENCE) -> int:
        """Wait until it has ended by itself; return its exit code."""
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._dump()
            pytest.fail(f"After {patience:g} s it is still there. {self.all()}")

    def _dump(self) -> None:
        """Have it write where it hangs, and end."""
        self.signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)

    def all(self) -> str:
        """Return all that is known of it, for a test that fails."""
        return f"Exit code: {self.exit_code}\nIts output:\n{self.out}\nIts errors:\n{self.err}"

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def interrupt(self) -> None:
        """Send SIGINT to its group of processes, as a terminal does for Ctrl-C."""
        os.killpg(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it by SIGKILL, if it runs, and wait for that."""
        self._process.kill()
        self._process.wait()


class Site(ABC):
    """See the module.

    Args:
        folder: where the program's files go.
    """

    name = ""
    backend = ""
    kind = ""
    """What a job is called in messages."""
    lag = 0.0
    """Seconds that the engine may take to hear of the end of jobs that have ended."""
    only: frozenset[str] | None = None
    """The names of the tests that are run there; None: all."""
    image = IMAGE
    """What is said to lack packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs: list[Program] = []

    @staticmethod
    @abstractmethod
    def probe() -> None:
        """Raise what keeps the engine from being used."""

    # Programs

    @abstractmethod
    def environment(self) -> dict[str, str]:
        """Return the settings of a program, as variables."""

    @abstractmethod
    def nowhere(self) -> dict[str, str]:
        """Return further settings, with which the engine is looked for where there is none."""

    def wrong(self) -> dict[str, str]:
        """Return further settings, with which there is no Python: it is said to be in "nothing"."""
        return {"FIBER_IMAGE": "nobody/nothing:1"}

    @abstractmethod
    def packages(self) -> dict[str, str]:
        """Return further settings, with which jobs have the packages of these tests."""

    def start(
        self,
        source: str | Path,
        *args: str,
        files: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Program:
        """Start a program.

        Args:
            source: its text, or a file that has it; or `-m` and the name of a module.
            args: of the program.
            files: texts that are to be beside it, by their paths.
            env: further variables.
        """
        for path, text in (files or {}).items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(text)
        what = source.split() if isinstance(source, str) and source.startswith("-m ") else []
        if not what:
            script = self.folder / f"script{len(self._programs)}.py"
            script.write_text(source if isinstance(source, str) else source.read_text())
            what = [script.name]
        command = [sys.executable, "-X", "faulthandler", *what, *args]
        program = self.master(command, {**self.environment(), **(env or {})})
        self._programs.append(program)
        return program

    def master(self, command: list[str], settings: Mapping[str, str]) -> Program:
        """Start the program's first process: on this machine."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **settings}
        return Program(command, self.folder, environment)

    def run(
        self,
        source: str | Path,
        *args: str,
        exit_code: int = 0,
        quiet: bool = True,
        patience: float = PATIENCE,
        **options: Any,
    ) -> Program:
        """Run a program to its end, which must be as told, and silent on standard error if `quiet`.

        Nothing of it may be left, as far as the engine has heard.
        """
        program = self.start(source, *args, **options)
        assert program.end(patience) == exit_code, program.all()
        assert not (quiet and program.err), program.all()
        self.leaves_nothing(self.lag)
        return program

    def close(self) -> None:
        """End the programs that a failed test left."""
        for program in self._programs:
            program.kill()

    @abstractmethod
    def forget(self) -> None:
        """Close the connection to the engine."""

    # What the engine has

    @abstractmethod
    def jobs(self) -> list[str]:
        """Return the names of the containers or pods of this test that run."""

    @abstractmethod
    def kill(self, job: str) -> None:
        """Kill what runs in a job, as somebody else would; nothing happens if it has ended."""

    @abstractmethod
    def remove(self, job: str) -> None:
        """Take a job away, as somebody else would; nothing happens if it is gone."""

    @abstractmethod
    def describe(self) -> str:
        """Return all that the engine shows of the jobs of this test, logs included."""

    @abstractmethod
    def left(self) -> list[str]:
        """Return what the engine has of this test: jobs, running or not, and what is theirs."""

    def leaves_nothing(self, patience: float = 30.0) -> None:
        """Fail unless all is gone in time."""
        until(lambda: not self.left(), lambda: f"{self.left()} gone", patience=patience)


class Docker(Site):
    """Containers of the engine of this machine."""

    name = backend = "docker"
    kind = "container"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.label = f"{MARK}.test=docker-{time.time_ns()}"
        self._client = _docker_client()

    @staticmethod
    def probe() -> None:
        client = _docker_client()
        try:
            client.api.inspect_image(IMAGE)
        finally:
            client.close()

    def environment(self) -> dict[str, str]:
        own, _, value = self.label.partition("=")
        labels = {own: value, MARK: os.environ[MARK]}
        return {
            "FIBER_BACKEND": "docker",
            "FIBER_IMAGE": IMAGE,
            "FIBER_DOCKER_OPTIONS": json.dumps({"labels": labels}),
        }

    def nowhere(self) -> dict[str, str]:
        return {"DOCKER_HOST": f"unix://{self.folder}/none.sock"}

    def packages(self) -> dict[str, str]:
        return {
            "FIBER_DOCKER_MOUNTS": f"{sysconfig.get_path('purelib')}:/packages:ro",
            "FIBER_DOCKER_ENVIRONMENT": "PYTHONPATH=/packages",
        }

    def _list(self, **filters: str) -> list[str]:
        wanted = {"label": self.label, **filters}
        found = self._client.api.containers(all=True, filters=wanted)
        return [container["Names"][0].lstrip("/") for container in found]

    def jobs(self) -> list[str]:
        return self._list(status="running")

    def kill(self, job: str) -> None:
        import docker

        with contextlib.suppress(docker.errors.APIError):
            self._client.api.kill(job)

    def remove(self, job: str) -> None:
        import docker

        with contextlib.suppress(docker.errors.APIError):
            self._client.api.remove_container(job, force=True)

    def describe(self) -> str:
        api = self._client.api
        told = []
        for job in self.jobs():
            told.append(json.dumps(api.inspect_container(job)))
            told.append(json.dumps(api.top(job)))
            told.append(api.logs(job).decode(errors="replace"))
        return "\n".join(told)

    def left(self) -> list[str]:
        return self._list()

    def forget(self) -> None:
        self._client.close()


def _docker_client() -> Any:
    import docker

    return docker.DockerClient("unix:///var/run/docker.sock")


SITES: dict[str, type[Site]] = {"docker": Docker}
