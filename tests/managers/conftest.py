"""Fixtures of the managers' tests."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import psutil
import pytest
from tests.managers import targets
from tests.waiting import until

import fiber
from fiber import managers

DEADLINE = 20.0


@pytest.fixture
def manager() -> Iterator[managers.SyncManager]:
    with fiber.Manager() as manager:
        yield manager
    manager.join()


@pytest.fixture
def tools() -> Iterator[Any]:
    """A manager of `targets.Tool`s."""
    with targets.ToolManager() as manager:
        yield manager
    manager.join()


@pytest.fixture
def run() -> Callable[..., Any]:
    """`run(function, *args)` returns what the function returns in a process of its own."""

    def run(function: Callable[..., Any], *args: Any) -> Any:
        reader, writer = fiber.Pipe(duplex=False)
        process = fiber.Process(target=targets.report, args=(writer, function, *args))
        with reader:
            process.start()
            writer.close()
            assert reader.poll(DEADLINE), f"{function} took more than {DEADLINE:g} s"
            outcome = reader.recv()
        process.join(DEADLINE)
        process.close()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return run


@pytest.fixture
def in_thread() -> Iterator[Callable[..., Future[Any]]]:
    """`in_thread(call, *args)` runs a call in a thread; its outcome is a Future's."""
    threads: list[threading.Thread] = []

    def start(call: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def body() -> None:
            try:
                future.set_result(call(*args))
            except BaseException as error:
                future.set_exception(error)

        threads.append(threading.Thread(target=body, daemon=True))
        threads[-1].start()
        return future

    yield start
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive(), "a call did not end"


@pytest.fixture
def kill() -> Callable[[Any], None]:
    """`kill(manager)` kills its process, and `kill(process)` one, and waits until it is gone."""

    def kill(victim: Any) -> None:
        pid = getattr(victim, "_process", victim).pid
        os.kill(pid, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(pid), f"the end of process {pid}")

    return kill
