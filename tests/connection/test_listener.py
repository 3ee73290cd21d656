"""Listener and Client, among themselves and with plain multiprocessing on the other side."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection as mp_connection
from typing import Any

import pytest
from tests.connection import targets

import fiber
from fiber.connection import Client, Connection, Listener, arbitrary_address

Start = Callable[..., fiber.Process]
Receive = Callable[[Any], Any]
MakePipe = Callable[..., tuple[Connection, Connection]]

FAMILIES = ["AF_UNIX", "AF_INET"]
KEY = b"a secret of both"


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("family", FAMILIES)
def test_processes_meet(family: str, key: bytes | None, start: Start, receive: Receive) -> None:
    with Listener(family=family, authkey=key) as listener:
        start(targets.call, listener.address, key, ["hello", family])
        with listener.accept() as connection:
            assert type(connection) is Connection
            assert receive(connection) == ["hello", family]
            with pytest.raises(EOFError):
                connection.recv()


def test_the_listener_in_another_process(pipe: MakePipe, start: Start, receive: Receive) -> None:
    control, theirs = pipe()
    start(targets.serve, theirs)
    with Client(receive(control)) as connection:
        assert type(connection) is Connection
        connection.send(21)
        assert receive(connection) == 42


def test_by_default_it_is_a_socket_in_a_folder_of_the_session() -> None:
    with Listener() as listener:
        assert listener.address.startswith(fiber.runtime.session.current().folder + "/")
        assert stat.S_ISSOCK(os.stat(listener.address).st_mode)
        assert stat.S_IMODE(os.stat(os.path.dirname(listener.address)).st_mode) == 0o700
        with Listener() as another:
            assert another.address != listener.address
    addresses = [arbitrary_address("AF_UNIX") for _ in range(3)]
    assert len(set(addresses)) == 3
    assert not any(map(os.path.exists, addresses))


def test_addresses_of_ones_own(tmp_path: Any) -> None:
    path = str(tmp_path / "socket")
    with Listener(path) as listener:
        assert listener.address == path
        with pytest.raises(OSError):
            Listener(path)
        with Client(path), listener.accept():
            pass
    assert not os.path.exists(path)
    with Listener(("localhost", 0)) as listener:
        host, port = listener.address
        assert (host, port > 0) == ("127.0.0.1", True)
        with Client(("localhost", port), "AF_INET") as client, listener.accept():
            local = socket.socket(fileno=os.dup(client.fileno()))
            with local:
                assert listener.last_accepted == local.getsockname()
    assert arbitrary_address("AF_INET") == ("localhost", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="abstract addresses are Linux's")
def test_abstract_addresses() -> None:
    with (
        Listener(f"\0fiber-test-{os.getpid()}") as listener,
        Client(listener.address) as client,
        listener.accept() as connection,
    ):
        client.send(1)
        assert connection.recv() == 1


def test_it_is_closed() -> None:
    listener = Listener()
    address = listener.address
    assert listener.last_accepted is None
    listener.close()
    listener.close()
    assert not os.path.exists(address)
    with pytest.raises(OSError, match="listener is closed"):
        listener.accept()
    with pytest.raises(OSError):
        Client(address)


def test_close_ignores_a_file_that_is_gone() -> None:
    listener = Listener()
    os.unlink(listener.address)
    listener.close()


def test_a_listener_may_outlive_the_session() -> None:
    listener = Listener()
    fiber.runtime.session.shutdown()
    assert not os.path.exists(listener.address)
    listener.close()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Listener(family="AF_PIPE"),
        lambda: Listener(r"\\.\test"),
        lambda: Client(r"\\.\test"),
        lambda: Client(7),
    ],
)
def test_what_is_no_address(wrong: Callable[[], object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        wrong()


def test_keys_are_bytes() -> None:
    with pytest.raises(TypeError, match="byte string"):
        Listener(authkey="text")  # type: ignore[arg-type]
    with Listener() as listener, pytest.raises(TypeError, match="byte string"):
        Client(listener.address, authkey="text")  # type: ignore[arg-type]


def test_who_does_not_know_the_key_is_refused(start: Start, receive: Receive) -> None:
    with Listener(authkey=KEY) as listener:
        caller = start(targets.call, listener.address, b"another", "let me in")
        with pytest.raises(fiber.AuthenticationError):
            listener.accept()
        caller.join(20)
        assert caller.exitcode == 1
        start(targets.call, listener.address, KEY, "let me in")  # it goes on listening
        with listener.accept() as connection:
            assert receive(connection) == "let me in"


def test_a_backlog(start: Start) -> None:
    with Listener(backlog=8) as listener:
        callers = [Client(listener.address) for _ in range(8)]
        for number, caller in enumerate(callers):
            caller.send(number)
        found = set()
        for caller in callers:
            with listener.accept() as connection:
                found.add(connection.recv())
            caller.close()
    assert found == set(range(8))


# With plain multiprocessing on the other side ---------------------------------------------------

CALLER = """
import sys
from multiprocessing.connection import Client

address = sys.argv[1] if len(sys.argv) == 2 else (sys.argv[1], int(sys.argv[2]))
with Client(address, authkey=b"a secret of both") as connection:
    connection.send(["from multiprocessing", b"x" * 1_000_000])
    print(connection.recv(), len(connection.recv_bytes()), connection.recv().shape_of_it)
    try:
        connection.recv()
    except EOFError:
        print("end")
"""

LISTENER = """
import sys
from multiprocessing.connection import Listener

with Listener(family=sys.argv[1], authkey=b"a secret of both") as listener:
    print(*(listener.address if sys.argv[1] == "AF_INET" else [listener.address]), flush=True)
    with listener.accept() as connection:
        connection.send({"from": "multiprocessing"})
        while (message := connection.recv()) is not None:
            connection.send_bytes(repr(message).encode())
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_multiprocessing_calls(
    family: str, start_script: Callable[..., subprocess.Popen[str]], receive: Receive
) -> None:
    with Listener(family=family, authkey=KEY) as listener:
        address = listener.address
        words = [address] if family == "AF_UNIX" else [address[0], str(address[1])]
        process = start_script(CALLER, *words)
        with listener.accept() as connection:
            assert receive(connection) == ["from multiprocessing", b"x" * 1_000_000]
            connection.send(("from fiber", 1))
            connection.send_bytes(bytes(2_000_000))
            # A class of this module means nothing there: by value it does.
            connection.send(shaped())
        out, err = process.communicate(timeout=30)
    assert (out, err) == ("('from fiber', 1) 2000000 round\nend\n", "")


def shaped() -> object:
    class Shape:
        shape_of_it = "round"

    return Shape()


@pytest.mark.parametrize("family", FAMILIES)
def test_multiprocessing_listens(
    family: str, start_script: Callable[..., subprocess.Popen[str]], receive: Receive
) -> None:
    process = start_script(LISTENER, family)
    assert process.stdout is not None
    words = process.stdout.readline().split()
    address = words[0] if family == "AF_UNIX" else (words[0], int(words[1]))
    with Client(address, authkey=KEY) as connection:
        assert receive(connection) == {"from": "multiprocessing"}
        for message in (1, "x" * 100_000, [b"y" * 20_000, 0.5]):
            connection.send(message)
            assert connection.poll(20)
            assert connection.recv_bytes() == repr(message).encode()
        connection.send(None)
    assert process.wait(20) == 0


def test_their_key_is_wrong(start_script: Callable[..., subprocess.Popen[str]]) -> None:
    process = start_script(LISTENER, "AF_UNIX")
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    with pytest.raises(multiprocessing.AuthenticationError):
        Client(address, authkey=b"wrong")
    assert process.wait(20) == 1


def test_the_end_of_who_called_is_seen(receive: Receive) -> None:
    with Listener() as listener:
        caller = mp_connection.Client(listener.address)
        with listener.accept() as connection:
            caller.close()
            assert connection.poll(20)
            with pytest.raises(EOFError):
                connection.recv()


# What is left behind ----------------------------------------------------------------------------

LISTENING = """
import os, sys, time
import fiber
from fiber.connection import Listener

def listen(there):
    with Listener() as listener:
        there.send(listener.address)
        time.sleep(3600)

if __name__ == "__main__":
    listener = Listener()
    here, there = fiber.Pipe()
    process = fiber.Process(target=listen, args=(there,))
    process.start()
    print(listener.address, here.recv(), flush=True)
    time.sleep(3600)
"""


def test_kill_9_leaves_no_socket(start_script: Callable[..., subprocess.Popen[str]]) -> None:
    process = start_script(LISTENING)
    assert process.stdout is not None
    addresses = process.stdout.readline().split()
    assert len(addresses) == 2
    assert all(os.path.exists(address) for address in addresses)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    deadline = time.monotonic() + 20
    while any(os.path.exists(os.path.dirname(address)) for address in addresses):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_accept_in_a_thread_is_ended_by_a_caller() -> None:
    """The way to end an `accept`, as in multiprocessing."""
    with Listener() as listener:
        accepted: list[Connection] = []
        thread = threading.Thread(target=lambda: accepted.append(listener.accept()), daemon=True)
        thread.start()
        with Client(listener.address):
            thread.join(20)
            assert not thread.is_alive()
        with contextlib.closing(accepted[0]), pytest.raises(EOFError):
            accepted[0].recv()
