"""Servers and clients that are killed, at any point."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.managers import targets
from tests.waiting import until

import fiber
from fiber import managers

Kill = Callable[[Any], None]
InThread = Callable[..., Any]

SOON = 10.0  # seconds


def died(manager: Any) -> str:
    """Return a pattern of the message that the manager has ended."""
    process = manager._process
    return rf"^the manager {re.escape(process.name)} \(process {process.pid}\) has ended$"


# The server


def test_a_killed_server(manager: Any, kill: Kill) -> None:
    items, text = manager.dict(), died(manager)
    items["a"] = 1
    kill(manager)
    for call in (
        lambda: items["a"],
        lambda: items.update(b=1),
        manager.list,
        manager.Lock,
    ):
        with pytest.raises(fiber.PeerDied, match=text) as caught:
            call()
        assert isinstance(caught.value, EOFError)
        assert isinstance(caught.value, ConnectionError)
    manager.shutdown()


def test_a_killed_server_that_nobody_had_called(manager: Any, kill: Kill) -> None:
    text = died(manager)
    kill(manager)
    with pytest.raises(fiber.PeerDied, match=text):
        manager.list()


def test_a_server_that_is_killed_between_request_and_reply(
    tools: Any, kill: Kill, in_thread: InThread, tmp_path: Path
) -> None:
    tool, ready, text = tools.Tool(), tmp_path / "ready", died(tools)
    call = in_thread(tool.hang, ready)
    until(ready.exists)
    began = time.monotonic()
    kill(tools)
    with pytest.raises(fiber.PeerDied, match=text):
        call.result(SOON)
    assert time.monotonic() - began < SOON


def test_a_method_that_ends_the_server(tools: Any) -> None:
    tool, text = tools.Tool(), died(tools)
    with pytest.raises(fiber.PeerDied, match=text):
        tool.die()


def test_a_server_that_is_killed_while_it_makes_an_object(
    in_thread: InThread, kill: Kill, tmp_path: Path
) -> None:
    ready = tmp_path / "ready"

    class Manager(managers.BaseManager):
        pass

    Manager.register("Tool", lambda: targets.Tool().hang(ready))
    with Manager() as manager:
        text = died(manager)
        call = in_thread(manager.Tool)
        until(ready.exists)
        kill(manager)
        with pytest.raises(fiber.PeerDied, match=text):
            call.result(SOON)
    manager.join()


@pytest.mark.parametrize(
    ("typeid", "args", "method"),
    [
        ("Queue", (), "get"),
        ("Event", (), "wait"),
        ("Semaphore", (0,), "acquire"),
        ("Barrier", (2,), "wait"),
    ],
)
def test_a_killed_server_ends_the_waits_for_what_it_had(
    manager: Any, kill: Kill, in_thread: InThread, typeid: str, args: Any, method: str
) -> None:
    made, entered = getattr(manager, typeid)(*args), threading.Event()

    def wait() -> None:
        entered.set()
        getattr(made, method)()

    call = in_thread(wait)
    assert entered.wait(SOON)
    kill(manager)
    with pytest.raises(fiber.PeerDied):
        call.result(SOON)


def test_a_killed_server_is_noticed_in_other_processes(manager: Any, kill: Kill) -> None:
    items, ready, text = manager.list([1]), fiber.Event(), died(manager)
    reader, writer = fiber.Pipe(duplex=False)
    process = fiber.Process(
        target=targets.report, args=(writer, targets.use_until_it_fails, items, ready)
    )
    with reader, writer:
        process.start()
        assert ready.wait(SOON)
        kill(manager)
        assert reader.poll(SOON)
        error = reader.recv()
    process.join()
    process.close()
    assert isinstance(error, fiber.PeerDied)
    assert re.match(text, str(error))


def test_a_proxy_that_is_unpickled_when_the_server_is_gone(manager: Any, kill: Kill) -> None:
    text = died(manager)
    with fiber.Pool(1) as pool:
        items = manager.list([1])
        kill(manager)
        with pytest.raises(fiber.PeerDied, match=text):
            pool.apply(len, (items,))


def test_another_manager_takes_the_place_of_one_that_was_killed(kill: Kill, tmp_path: Path) -> None:
    address = str(tmp_path / "s")
    first = managers.SyncManager(address=address)
    first.start()
    items = first.list([1])
    kill(first)
    os.unlink(address)
    with managers.SyncManager(address=address) as second:
        others = second.list([2])
        assert others[:] == [2]
        with pytest.raises(fiber.PeerDied):
            items[:]
        assert others[:] == [2]
    first.shutdown()
    first.join()
    second.join()


PROGRAM = """
import fiber, sys, time

def inner(queue):
    with fiber.Manager() as manager:
        queue.put((manager._process.pid, manager.address))
        time.sleep(3600)

if __name__ == "__main__":
    queue = fiber.Queue()
    manager = fiber.Manager()
    pool = manager.Pool(1)
    process = fiber.Process(target=inner, args=(queue,))
    process.start()
    pid, address = queue.get()
    print(manager._process.pid, manager.address, pid, address, flush=True)
    pool.apply(time.sleep, (3600,))
"""


def test_managers_end_when_the_program_is_killed(start_script: Callable[..., Any]) -> None:
    program = start_script(PROGRAM)
    one, path, other, other_path = program.stdout.readline().split()
    assert os.path.exists(path)
    assert os.path.exists(other_path)
    program.send_signal(signal.SIGKILL)
    for pid in (one, other):
        until(lambda pid=pid: not psutil.pid_exists(int(pid)), f"the end of {pid}")
    until(lambda: not os.path.exists(os.path.dirname(path)), "the end of the folder")


def test_nothing_is_left_of_a_manager_that_is_not_shut_down(
    run_script: Callable[..., Any],
) -> None:
    done = run_script(
        "import fiber\n"
        "if __name__ == '__main__':\n"
        "    manager = fiber.Manager()\n"
        "    items = manager.list([1, 2])\n"
        "    print(manager._process.pid, manager.address, sum(items))\n"
    )
    pid, path, total = done.stdout.split()
    assert (total, done.stderr, done.returncode) == ("3", "", 0)
    assert not psutil.pid_exists(int(pid))
    assert not os.path.exists(os.path.dirname(path))


def test_an_interrupted_program_ends_with_its_manager(start_script: Callable[..., Any]) -> None:
    program = start_script(
        "import fiber, time\n"
        "if __name__ == '__main__':\n"
        "    manager = fiber.Manager()\n"
        "    print(manager._process.pid, flush=True)\n"
        "    manager.Queue().get()\n"
    )
    pid = int(program.stdout.readline())
    os.killpg(program.pid, signal.SIGINT)
    _, err = program.communicate(timeout=30)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert err.count("Traceback") == 1
    assert not psutil.pid_exists(pid)


# Clients


@pytest.mark.parametrize("typeid", ["Lock", "RLock", "Semaphore", "BoundedSemaphore"])
def test_a_killed_process_does_not_keep_a_lock(manager: Any, kill: Kill, typeid: str) -> None:
    lock, ready = getattr(manager, typeid)(), manager.Event()
    process = fiber.Process(target=targets.acquire_and_hang, args=(lock, ready))
    process.start()
    assert ready.wait(SOON)
    assert lock.acquire(False) is False
    kill(process)
    assert lock.acquire(timeout=SOON)
    process.join()


def test_a_killed_consumer_takes_no_item_with_it(manager: Any, kill: Kill) -> None:
    items, ready = manager.Queue(), manager.Event()
    process = fiber.Process(target=targets.block, args=(items, "get", ready))
    process.start()
    assert ready.wait(SOON)
    kill(process)
    items.put(1)
    assert items.get(timeout=SOON) == 1
    process.join()


def test_a_killed_client_does_not_disturb_the_server(
    tools: Any, kill: Kill, tmp_path: Path
) -> None:
    tool, paths = tools.Tool(), [tmp_path / str(number) for number in range(3)]
    for path in paths:
        process = fiber.Process(target=tool.hang, args=(path,))
        process.start()
        until(path.exists)
        kill(process)
        process.join()
    assert tool.see(1) == 1


def test_a_client_that_is_killed_in_the_middle_of_a_message(manager: Any) -> None:
    connection: Any = fiber.connection.Client(manager.address, authkey=bytes(manager._authkey))
    with connection:
        os.write(connection.fileno(), b"\0\0\1\0half")
    other: Any = multiprocessing.connection.Client(manager.address, authkey=bytes(manager._authkey))
    with other:
        other.send_bytes(b"no pickle")
        kind, text = other.recv()
    assert kind == "#TRACEBACK"
    assert "Unpickling" in text
    assert manager.list([1])[:] == [1]
