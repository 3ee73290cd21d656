"""Starting, connecting, ending; and the errors of those who do so in the wrong order."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from tests.managers import targets
from tests.waiting import until

import fiber
from fiber import managers

Run = Callable[..., Any]


def test_the_server_is_a_process_in_the_session(manager: Any) -> None:
    process = manager._process
    assert process.name == f"SyncManager-{process.name.partition('-')[2]}"
    assert process in fiber.active_children()
    assert os.path.dirname(manager.address) == fiber.runtime.session.folder()


def test_it_ends_with_the_block() -> None:
    with fiber.Manager() as manager:
        process, address = manager._process, manager.address
        assert manager.list([1])[:] == [1]
    assert process.exitcode == 0
    assert not os.path.exists(address)


def test_starting_twice(manager: Any) -> None:
    for call in (manager.start, manager.get_server):
        with pytest.raises(fiber.ProcessError, match=r"SyncManager-.* was started before"):
            call()


def test_starting_again_after_the_end() -> None:
    manager = managers.SyncManager()
    with manager:
        pass
    for call in (manager.start, manager.get_server, manager.__enter__):
        with pytest.raises(fiber.ProcessError, match="was shut down"):
            call()


def test_shutting_down_twice() -> None:
    manager = fiber.Manager()
    manager.shutdown()
    manager.shutdown()
    manager.join()
    manager.join()


def test_shutting_down_what_was_not_started() -> None:
    managers.SyncManager().shutdown()


def test_shutting_down_a_server_of_somebody_else(manager: Any) -> None:
    other = managers.SyncManager(address=manager.address)
    other.connect()
    assert other.list([1])[:] == [1]
    with pytest.raises(fiber.ProcessError, match="only by the manager that started it"):
        other.shutdown()
    assert manager.list()[:] == []


@pytest.mark.parametrize("error", [fiber.ProcessError, AssertionError, ValueError])
def test_using_what_was_not_started(error: type[Exception]) -> None:
    for call in (
        managers.SyncManager().list,
        managers.SyncManager().Lock,
        lambda: managers.SharedMemoryManager().SharedMemory(1),
    ):
        with pytest.raises(error, match="was not started"):
            call()


def test_using_what_was_shut_down() -> None:
    with fiber.Manager() as manager:
        items, lock = manager.list(), manager.Lock()
    with pytest.raises(fiber.ProcessError, match=r"SyncManager-.* was shut down"):
        manager.dict()
    with pytest.raises(fiber.PeerDied, match=r"SyncManager-.* was shut down"):
        items.append(1)
    with pytest.raises(fiber.PeerDied):
        lock.acquire()
    assert "'__str__()' failed" in str(items)


def test_a_manager_that_is_let_go_of_ends() -> None:
    manager = fiber.Manager()
    items, process = manager.list([1]), manager._process
    del manager
    gc.collect()
    assert items[:] == [1]  # it has the manager
    del items
    gc.collect()
    until(lambda: process.exitcode is not None)


def test_a_manager_in_a_worker_and_in_a_daemonic_process(run: Run) -> None:
    with fiber.Pool(1) as pool:
        ran, used = pool.apply(targets.use_manager)
    assert len({ran, used, os.getpid()}) == 3
    reader, writer = fiber.Pipe(duplex=False)
    process = fiber.Process(target=targets.report, args=(writer, targets.use_manager), daemon=True)
    with reader, writer:
        process.start()
        ran, used = reader.recv()
    process.join()
    process.close()
    assert len({ran, used, os.getpid()}) == 3


def test_a_manager_in_a_thread(in_thread: Callable[..., Any]) -> None:
    assert in_thread(targets.use_manager).result(20)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver", "local"])
def test_a_manager_of_a_context(method: str) -> None:
    context = fiber.get_context(method)
    with context.Manager() as manager:
        assert isinstance(manager._process, context.Process)
        assert manager.list([1])[:] == [1]


# Initializers


def test_an_initializer_runs_in_the_server(manager: Any) -> None:
    facts = manager.dict()
    other = managers.SyncManager()
    other.start(targets.initialize, (facts, "x"))
    other.shutdown()
    assert facts["value"] == "x"


def test_an_initializer_must_be_callable() -> None:
    with pytest.raises(TypeError, match="initializer must be a callable"):
        managers.SyncManager().start(1)  # type: ignore[arg-type]


def test_an_initializer_that_raises(capfd: pytest.CaptureFixture[str]) -> None:
    manager = managers.SyncManager()
    with pytest.raises(targets.Picky) as caught:
        manager.start(targets.fail_to_initialize, (targets.Picky("no", 5),))
    assert caught.value.code == 5
    assert "in fail_to_initialize" in str(caught.value.__cause__)
    assert capfd.readouterr().err == ""
    assert fiber.active_children() == []
    manager.start()  # it may be tried again
    manager.shutdown()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (3, "ended with exit code 3 before it could be used"),
        (SystemExit(4), "could not start: SystemExit: 4"),
    ],
)
def test_an_initializer_that_ends_the_process(error: Any, text: str) -> None:
    with pytest.raises(fiber.StartError, match=rf"the manager SyncManager-.* {text}"):
        managers.SyncManager().start(targets.fail_to_initialize, (error,))


def test_an_address_that_is_taken(manager: Any) -> None:
    with pytest.raises(OSError, match="Address already in use"):
        managers.SyncManager(address=manager.address).start()


def test_an_address_of_ones_own(tmp_path: Any) -> None:
    address = str(tmp_path / "s")
    with managers.SyncManager(address=address) as manager:
        assert manager.address == address
        assert manager.list([1])[:] == [1]
    assert not os.path.exists(address)


# Signals


def test_ctrl_c_does_not_end_it(manager: Any) -> None:
    os.kill(manager._process.pid, signal.SIGINT)
    assert manager.list([1])[:] == [1]


def test_a_server_that_does_not_answer_is_ended() -> None:
    manager = managers.SyncManager(shutdown_timeout=0.2)
    manager.start()
    process: Any = manager._process
    os.kill(process.pid, signal.SIGSTOP)
    began = time.monotonic()
    manager.shutdown()
    assert time.monotonic() - began < 10
    assert process.exitcode == -signal.SIGKILL


def test_an_interrupted_call_does_not_spoil_the_next(tools: Any) -> None:
    tool = tools.Tool()
    tool.see(0)

    def interrupt(*_: object) -> None:
        raise TimeoutError("by a signal")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(TimeoutError, match="by a signal"):
            tool.see("late", 0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert tool.call(lambda: "the answer to this") == "the answer to this"


def test_a_finalizer_may_call_in_the_midst_of_a_call(manager: Any) -> None:
    items, inner = manager.list(), manager.list()

    class Appends:
        def __reduce__(self) -> Any:
            inner.append(1)  # as a finalizer would that the collector runs
            return int, ()

    items.append(Appends())
    assert (items[:], inner[:]) == ([0], [1])


# Exceptions of methods


@pytest.fixture
def tool(tools: Any) -> Iterator[Any]:
    return tools.Tool()


def test_an_exception_has_its_type_and_the_servers_traceback(tool: Any) -> None:
    with pytest.raises(targets.Picky) as caught:
        tool.fail(targets.Picky("no", 5))
    assert caught.value.code == 5
    cause = caught.value.__cause__
    assert isinstance(cause, fiber.errors.RemoteTraceback)
    assert "in fail\n" in str(cause)
    assert "raise error" in str(cause)
    assert "server.py" not in str(cause)


def test_an_exception_that_cannot_travel(tool: Any) -> None:
    with pytest.raises(managers.RemoteError) as caught:
        tool.fail_unpicklably()
    assert "in fail_unpicklably\n" in str(caught.value)
    assert "it takes two" in str(caught.value)


def test_a_result_that_cannot_be_pickled(tool: Any) -> None:
    with pytest.raises(managers.RemoteError, match="Unserializable message"):
        tool.lock()
    assert tool.see(1) == 1


def test_a_method_that_exits(tool: Any) -> None:
    with pytest.raises(managers.RemoteError, match="SystemExit: 3"):
        tool.exit(3)
    assert tool.see(1) == 1


def test_an_argument_that_cannot_be_pickled(tool: Any) -> None:
    with pytest.raises(fiber.SerializationError):
        tool.see(threading.Lock())
    assert tool.see(1) == 1


def test_exceptions_of_constructors(tools: Any) -> None:
    with pytest.raises(managers.RemoteError, match="unexpected keyword"):
        tools.Tool(nothing=1)
    assert tools.Tool().see(1) == 1


def test_an_exception_is_not_kept_alive_by_itself(tool: Any) -> None:
    import weakref

    gc.disable()
    try:
        try:
            tool.fail(targets.Picky("no"))
        except targets.Picky as error:
            watched = weakref.ref(error)
        assert watched() is None
    finally:
        gc.enable()


# Nobody gets in


def test_a_stranger_does_not_get_in(manager: Any) -> None:
    other = managers.SyncManager(address=manager.address, authkey=b"guessed")
    with pytest.raises(fiber.AuthenticationError):
        other.connect()
    connection = fiber.connection.Client(manager.address)
    with connection:
        connection.recv_bytes()
        connection.send_bytes(b"0" * 20)
        assert connection.recv_bytes() == b"#FAILURE#"
        with pytest.raises((EOFError, OSError)):
            connection.recv_bytes()
    assert manager.list([1])[:] == [1]


def test_the_server_ends_with_the_session() -> None:
    manager = fiber.Manager()
    process: Any = manager._process
    fiber.runtime.session.shutdown()
    until(lambda: not psutil.pid_exists(process.pid))
    manager.shutdown()
