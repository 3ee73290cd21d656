"""A process that cannot start says so, and why; and the program can go on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.process import targets

import fiber

Run = Callable[..., Any]


def test_what_cannot_be_pickled_is_named() -> None:
    process = fiber.Process(target=targets.write, args=(threading.Lock(), "text"))
    with pytest.raises(fiber.SerializationError, match=r"cannot pickle '_thread.lock' object"):
        process.start()
    assert not process.is_alive()
    assert process.exitcode is None
    assert fiber.active_children() == []


def test_a_serialization_error_is_a_type_error_as_pickle_s() -> None:
    with pytest.raises(TypeError):
        fiber.Process(target=(lambda lock: lambda: lock)(threading.Lock())).start()


def test_after_a_failed_start_others_start() -> None:
    with pytest.raises(fiber.SerializationError):
        fiber.Process(target=print, args=(threading.Lock(),)).start()
    process = fiber.Process(target=targets.nothing)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_an_argument_that_cannot_be_unpickled_ends_the_process_alone(capfd: Any) -> None:
    process = fiber.Process(target=print, args=(targets.Unloadable(),), name="unlucky")
    process.start()
    process.join(30)
    assert process.exitcode == 1
    err = capfd.readouterr().err
    assert "unlucky" in err
    assert "ValueError: not here" in err


def test_a_python_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(fiber.StartError, match=r"/no/such/python.*[Nn]o such file"):
        fiber.Process(target=targets.nothing).start()
    monkeypatch.undo()
    process = fiber.Process(target=targets.nothing)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_a_python_that_ends_at_once_is_reported_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(fiber.StartError, match="exit code 3"):
        fiber.Process(target=targets.nothing).start()


def test_a_start_that_takes_too_long_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexec sleep 3600\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    fiber.config.start_timeout = 0.3
    began = time.monotonic()
    with pytest.raises(fiber.StartError, match=r"0\.3 seconds \(start_timeout\)"):
        fiber.Process(target=targets.nothing).start()
    assert time.monotonic() - began < 5


def test_a_start_error_is_a_process_error_of_multiprocessing() -> None:
    import multiprocessing

    assert issubclass(fiber.StartError, multiprocessing.ProcessError)


def test_a_main_module_that_fails_in_the_child_is_shown(run_script: Run) -> None:
    done = run_script(
        """
import fiber, sys

def child(): pass

if __name__ == "__mp_main__":
    raise RuntimeError("only at home")
if __name__ == "__main__":
    for _ in range(2):
        try:
            fiber.Process(target=child).start()
        except fiber.StartError as error:
            print("StartError", "RuntimeError: only at home" in str(error), "line 7" in str(error))
"""
    )
    assert (done.stdout, done.stderr, done.returncode) == ("StartError True True\n" * 2, "", 0)


@pytest.mark.parametrize(
    ("statement", "shown"),
    [
        ("sys.exit(3)", "SystemExit: 3"),
        ("os._exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), 9)", "SIGKILL|signal 9|exit code -9"),
        ("import a_module_that_is_nowhere", "ModuleNotFoundError.*a_module_that_is_nowhere"),
    ],
)
def test_a_main_module_that_ends_in_the_child_is_reported(
    statement: str, shown: str, run_script: Run
) -> None:
    done = run_script(
        f"""
import fiber, os, re, sys
if __name__ == "__mp_main__":
    {statement}
if __name__ == "__main__":
    try:
        fiber.Process(target=print).start()
    except fiber.StartError as error:
        print("StartError", bool(re.search({shown!r}, str(error), re.DOTALL)) or error)
"""
    )
    assert (done.stdout, done.returncode) == ("StartError True\n", 0)


def test_a_main_module_that_never_loads_is_given_up(run_script: Run) -> None:
    done = run_script(
        """
import fiber, time
if __name__ == "__mp_main__":
    time.sleep(3600)
if __name__ == "__main__":
    fiber.config.start_timeout = 1
    try:
        fiber.Process(target=print).start()
    except fiber.StartError as error:
        print("StartError", "start_timeout" in str(error))
""",
        timeout=20,
    )
    assert done.stdout == "StartError True\n"


def test_an_unhandled_start_error_ends_the_program_with_its_words(run_script: Run) -> None:
    done = run_script(
        """
import fiber
if __name__ == "__mp_main__":
    raise RuntimeError("only at home")
fiber.Process(target=print).start()
""",
        timeout=20,
    )
    assert done.returncode == 1
    assert "fiber.errors.StartError: " in done.stderr
    assert "RuntimeError: only at home" in done.stderr


def test_an_unknown_backend_is_named() -> None:
    fiber.config.backend = "nimbus"
    with pytest.raises(ValueError, match="nimbus"):
        fiber.Process(target=targets.nothing).start()


def test_an_agent_that_was_killed_is_replaced() -> None:
    import psutil

    sleeper = fiber.Process(target=targets.sleep)
    sleeper.start()
    children = psutil.Process().children()
    (agent,) = [child for child in children if "fiber.runtime.agent" in " ".join(child.cmdline())]
    agent.kill()
    sleeper.join(30)
    assert sleeper.exitcode == -9
    process = fiber.Process(target=targets.nothing)
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_too_many_processes_are_refused_by_name(run_script: Run) -> None:
    # A limit on the number of this user's processes does not hold for root, one on memory does.
    done = run_script(
        """
import fiber, resource, time

def wait():
    time.sleep(3600)

if __name__ == "__main__":
    first = fiber.Process(target=wait, daemon=True)
    first.start()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, hard))
    started = []
    try:
        for _ in range(100):
            started.append(fiber.Process(target=wait, daemon=True))
            started[-1].start()
            started[-1].sentinel
    except OSError as error:
        print("OSError", error.errno)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    process = fiber.Process(target=print, args=("still works",))
    process.start()
    process.join()
"""
    )
    assert (done.stdout, done.stderr, done.returncode) == ("OSError 24\nstill works\n", "", 0)
