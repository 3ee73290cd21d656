"""What the tests of served objects share: processes that are ended, and waits that end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fiber

DEADLINE = 20.0


@pytest.fixture
def start() -> Iterator[Callable[..., fiber.Process]]:
    """`start(target, *args, **kwargs)`: a running process; killed after the test."""
    started: list[fiber.Process] = []

    def begin(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fiber.Process:
        process = fiber.Process(target=target, args=args, kwargs=kwargs)
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            if process.is_alive():
                os.kill(process.pid, signal.SIGCONT)  # type: ignore[arg-type]
        process.join(DEADLINE)
    started.clear()  # each holds on to its session


@pytest.fixture
def ends_well() -> Callable[..., None]:
    """Wait for the end of processes; fail unless each has the exit code 0."""

    def wait(*processes: fiber.Process, within: float = DEADLINE) -> None:
        deadline = time.monotonic() + within
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        assert [process.exitcode for process in processes] == [0] * len(processes)

    return wait


class Running:
    """A call that runs in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self._call = call
        self._args = args
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call(*self._args)
        except BaseException as error:
            self._error = error

    @property
    def runs(self) -> bool:
        return self._thread.is_alive()

    def result(self, within: float = DEADLINE) -> Any:
        """Return what the call returned, or raise what it raised; fail if it takes longer."""
        self._thread.join(within)
        if self._thread.is_alive():
            pytest.fail(f"{self._call} {self._args} still waits after {within:g} s")
        if self._error is not None:
            raise self._error
        return self._value


@pytest.fixture
def aside() -> Callable[..., Running]:
    """`aside(call, *args)` runs it in a thread; `.result(within)` waits for it."""
    return Running
