"""A process from its start to its end, as multiprocessing has it."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
from tests.process import targets
from tests.waiting import until

import fiber


@pytest.fixture
def sleeper() -> Iterator[fiber.Process]:
    process = fiber.Process(target=targets.sleep)
    process.start()
    yield process
    with contextlib.suppress(ValueError):  # the test has closed it
        process.kill()
        process.join()
        process.close()


def finished(process: fiber.Process) -> int | None:
    """Start `process`, join it, return its exit code."""
    process.start()
    process.join(30)
    return process.exitcode


def said(path: Path, *what: str, **options: Any) -> list[str]:
    """What a process finds the expressions `what` to be."""
    process = fiber.Process(target=targets.report, args=(path, *what), **options)
    assert finished(process) == 0
    return path.read_text().splitlines()


def test_a_process_runs_its_target_with_its_arguments(tmp_path: Path) -> None:
    path = tmp_path / "said"
    process = fiber.Process(target=targets.write, args=[path], kwargs={"text": "done"})
    assert finished(process) == 0
    assert path.read_text() == "done"


def test_pid_and_ident_are_the_real_process_id(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    process = fiber.Process(target=targets.report, args=(path, "os.getpid()", "me.pid", "me.ident"))
    assert process.pid is None
    assert process.ident is None
    process.start()
    pid = process.pid
    process.join(30)
    assert path.read_text().split() == [str(pid)] * 3
    assert process.ident == process.pid == pid != os.getpid()


def test_run_runs_the_target_here(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    fiber.Process(target=targets.report, args=(path, "os.getpid()")).run()
    assert path.read_text() == f"{os.getpid()}\n"


def test_a_process_without_a_target_does_nothing() -> None:
    assert finished(fiber.Process()) == 0


def test_a_subclass_overrides_run(tmp_path: Path) -> None:
    path = tmp_path / "greeting"
    assert finished(targets.Greeter(path, "you")) == 0
    assert path.read_text() == "hello you from greeter of you"


def test_group_must_be_none() -> None:
    with pytest.raises(AssertionError):
        fiber.Process(group="a group")  # type: ignore[arg-type]


# Names, daemons, keys --------------------------------------------------------------------------


def test_names_count_up_and_may_be_changed(tmp_path: Path) -> None:
    first, second = fiber.Process(), fiber.Process()
    prefix, number = first.name.split("-")
    assert prefix == "Process"
    assert second.name == f"Process-{int(number) + 1}"
    first.name = "changed"
    assert first.name == "changed"
    assert said(tmp_path / "name", "me.name", name="given") == ["given"]


def test_a_name_must_be_text() -> None:
    with pytest.raises(AssertionError):
        fiber.Process().name = 3  # type: ignore[assignment]


def test_daemon_is_known_in_the_child_and_fixed_once_started(tmp_path: Path) -> None:
    assert fiber.Process().daemon is False
    assert said(tmp_path / "flag", "me.daemon", daemon=True) == ["True"]
    process = fiber.Process(target=targets.sleep)
    process.daemon = True
    process.start()
    with pytest.raises(AssertionError):
        process.daemon = False
    process.kill()
    process.join()


def test_authkey_is_inherited(tmp_path: Path) -> None:
    ours = bytes(fiber.current_process().authkey)
    assert said(tmp_path / "ours", "bytes(me.authkey)") == [repr(ours)]
    process = fiber.Process(target=targets.report, args=(tmp_path / "its", "bytes(me.authkey)"))
    process.authkey = b"another"
    assert finished(process) == 0
    assert (tmp_path / "its").read_text() == "b'another'\n"


def test_authkey_is_not_pickled_outside_of_a_start() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(fiber.current_process().authkey)


def test_repr_tells_the_state(sleeper: fiber.Process) -> None:
    assert "initial" in repr(fiber.Process())
    assert f"pid={sleeper.pid}" in repr(sleeper)
    assert "started" in repr(sleeper)
    sleeper.terminate()
    sleeper.join()
    assert "stopped exitcode=-SIGTERM" in repr(sleeper)
    sleeper.close()
    assert "closed" in repr(sleeper)


# Exit codes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"), [(None, 0), (0, 0), (1, 1), (7, 7), (255, 255), (True, 1), ("words", 1)]
)
def test_exitcode_of_sys_exit(code: object, expected: int, capfd: Any) -> None:
    assert finished(fiber.Process(target=targets.leave, args=(code,))) == expected
    assert capfd.readouterr().err == ("words\n" if code == "words" else "")


def test_exitcode_of_os_exit() -> None:
    assert finished(fiber.Process(target=targets.leave_at_once, args=(5,))) == 5


def test_an_exception_is_exit_code_1_with_a_traceback_on_stderr(capfd: Any) -> None:
    process = fiber.Process(target=targets.fail, args=("no such luck",), name="unlucky")
    assert finished(process) == 1
    err = capfd.readouterr().err
    assert err.startswith("Process unlucky:\nTraceback (most recent call last):\n")
    assert "in fail\n" in err
    assert err.endswith("ValueError: no such luck\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGSEGV])
def test_exitcode_of_a_signal_is_negative(signum: int) -> None:
    assert finished(fiber.Process(target=targets.die, args=(signum,))) == -signum


def test_exitcode_is_none_until_the_end(sleeper: fiber.Process) -> None:
    assert fiber.Process().exitcode is None
    assert sleeper.exitcode is None
    assert sleeper.is_alive()
    sleeper.kill()
    sleeper.join()
    assert sleeper.exitcode == -signal.SIGKILL
    assert not sleeper.is_alive()


def test_exitcode_is_there_without_a_join() -> None:
    process = fiber.Process(target=targets.leave, args=(3,))
    process.start()
    assert until(lambda: process.exitcode, "an exit code") == 3
    assert not process.is_alive()


def test_the_exit_code_is_that_of_a_signal_from_elsewhere(sleeper: fiber.Process) -> None:
    assert sleeper.pid is not None
    os.kill(sleeper.pid, signal.SIGHUP)
    sleeper.join(30)
    assert sleeper.exitcode == -signal.SIGHUP


# Ending ----------------------------------------------------------------------------------------


def test_terminate_sends_sigterm_and_kill_sigkill(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = fiber.Process(target=targets.ignore_sigterm, args=(ready,))
    process.start()
    until(ready.exists)
    process.terminate()
    process.join(0.2)
    assert process.is_alive()
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def test_terminate_and_kill_of_one_that_ended_do_nothing() -> None:
    process = fiber.Process(target=targets.nothing)
    assert finished(process) == 0
    process.terminate()
    process.kill()
    assert process.exitcode == 0


def test_join_returns_after_its_timeout(sleeper: fiber.Process) -> None:
    for timeout in (0, -1, 0.1):
        began = time.monotonic()
        assert sleeper.join(timeout) is None
        assert time.monotonic() - began < 5
        assert sleeper.exitcode is None
    sleeper.kill()
    sleeper.join()
    sleeper.join()
    assert sleeper.exitcode == -signal.SIGKILL


def test_several_threads_may_join_one_process(sleeper: fiber.Process) -> None:
    codes: list[int | None] = []

    def join() -> None:
        sleeper.join()
        codes.append(sleeper.exitcode)

    threads = [threading.Thread(target=join) for _ in range(5)]
    for thread in threads:
        thread.start()
    sleeper.terminate()
    for thread in threads:
        thread.join(30)
    assert codes == [-signal.SIGTERM] * 5


def test_the_sentinel_is_ready_when_the_process_has_ended(sleeper: fiber.Process) -> None:
    assert connection.wait([sleeper.sentinel], 0) == []
    sleeper.kill()
    assert connection.wait([sleeper.sentinel], 30) == [sleeper.sentinel]
    sleeper.join()
    assert connection.wait([sleeper.sentinel], 0) == [sleeper.sentinel]


def test_sentinels_of_several_processes_are_waited_for_together() -> None:
    processes = [fiber.Process(target=targets.sleep) for _ in range(3)]
    for process in processes:
        process.start()
    left = {process.sentinel: process for process in processes}
    assert len(left) == 3
    for process in (processes[1], processes[2], processes[0]):
        process.terminate()
        (ready,) = connection.wait(list(left), 30)
        assert left.pop(ready) is process  # type: ignore[call-overload]
        assert process.exitcode == -signal.SIGTERM
        process.join()
        process.close()


def test_the_sentinel_of_one_that_ended_long_ago_is_ready() -> None:
    process = fiber.Process(target=targets.nothing)
    assert finished(process) == 0
    assert connection.wait([process.sentinel], 30) == [process.sentinel]


# Misuse ----------------------------------------------------------------------------------------


def test_starting_twice_is_refused(sleeper: fiber.Process) -> None:
    with pytest.raises(AssertionError, match="cannot start a process twice"):
        sleeper.start()
    sleeper.kill()
    sleeper.join()
    with pytest.raises(AssertionError, match="cannot start a process twice"):
        sleeper.start()


@pytest.mark.parametrize("what", ["join", "sentinel", "terminate", "kill"])
def test_what_needs_a_started_process_is_refused_before(what: str) -> None:
    process = fiber.Process()
    assert not process.is_alive()
    expected = {"join": AssertionError, "sentinel": ValueError}.get(what, AttributeError)
    with pytest.raises(expected):
        getattr(process, what)()


def test_closing_a_running_process_is_refused(sleeper: fiber.Process) -> None:
    with pytest.raises(ValueError, match="Cannot close a process while it is still running"):
        sleeper.close()
    sleeper.kill()
    sleeper.join()
    sleeper.close()
    sleeper.close()
    for use in (
        sleeper.join,
        sleeper.is_alive,
        sleeper.start,
        sleeper.terminate,
        lambda: sleeper.exitcode,
        lambda: sleeper.pid,
        lambda: sleeper.sentinel,
    ):
        with pytest.raises(ValueError, match="process object is closed"):
            use()


def test_a_process_that_was_never_started_can_be_closed() -> None:
    process = fiber.Process()
    process.close()
    with pytest.raises(ValueError, match="process object is closed"):
        process.start()


# What may be a target --------------------------------------------------------------------------


def test_bound_methods_are_targets(tmp_path: Path) -> None:
    counter = targets.Counter(41)
    path = tmp_path / "value"
    assert finished(fiber.Process(target=counter.write, args=(path,))) == 0
    assert path.read_text() == "42"
    assert finished(fiber.Process(target=targets.Counter.name, args=(path,))) == 0
    assert path.read_text() == "Counter"
    assert finished(fiber.Process(target=targets.Counter.Inner.write, args=(path,))) == 0
    assert path.read_text() == "inner"


def test_partials_lambdas_and_closures_are_targets(tmp_path: Path) -> None:
    path = tmp_path / "text"
    word = "closed over"

    def closure() -> None:
        path.write_text(word)

    partial = functools.partial(targets.write, path, text="partial")
    for target, expected in [
        (partial, "partial"),
        (lambda: path.write_text("lambda"), "lambda"),
        (closure, "closed over"),
    ]:
        assert finished(fiber.Process(target=target)) == 0
        assert path.read_text() == expected


def test_a_class_defined_in_a_function_is_a_target(tmp_path: Path) -> None:
    class Local(fiber.Process):
        def run(self) -> None:
            self.path.write_text(type(self).__name__)  # type: ignore[attr-defined]

    process = Local()
    process.path = tmp_path / "name"  # type: ignore[attr-defined]
    assert finished(process) == 0
    assert process.path.read_text() == "Local"  # type: ignore[attr-defined]


def test_a_change_in_the_child_stays_there() -> None:
    counter = targets.Counter(1)

    def change() -> None:
        counter.value += 1
        raise SystemExit(counter.value)

    assert finished(fiber.Process(target=change)) == 2
    assert counter.value == 1


def test_arrays_travel_to_the_child(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(1_000_000)
    path = tmp_path / "sum"
    process = fiber.Process(target=lambda a: path.write_text(str(a.sum())), args=(array,))
    assert finished(process) == 0
    assert int(path.read_text()) == array.sum()


def test_many_processes_one_after_the_other_leave_nothing_open() -> None:
    assert finished(fiber.Process(target=targets.nothing)) == 0
    before = len(os.listdir("/dev/fd"))
    for _ in range(30):
        process = fiber.Process(target=targets.nothing)
        assert finished(process) == 0
        assert process.sentinel
        process.close()
    assert len(os.listdir("/dev/fd")) == before
