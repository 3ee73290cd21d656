"""What the processes of these tests run.

In a module of its own, and a light one: each child imports it.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from multiprocessing.reduction import ForkingPickler
from typing import Any

import fiber
from fiber.connection import Client, Connection, Listener, Pipe

FOREVER = 3600


def echo(connection: Connection) -> None:
    """Send back what comes, until there is no more."""
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        connection.send(message)


def echo_bytes(connection: Connection) -> None:
    while message := connection.recv_bytes():
        connection.send_bytes(message)


def hold(*things: object) -> None:
    """Keep what was passed, whatever it is, for ever."""
    time.sleep(FOREVER)


def say(connection: Any, message: object) -> None:
    connection.send(message)


def say_and_hold(connection: Connection, message: object, *things: object) -> None:
    connection.send(message)
    time.sleep(FOREVER)


def say_and_close(connection: Connection, message: object, *things: object) -> None:
    connection.send(message)
    connection.close()
    time.sleep(FOREVER)


def say_number(connection: Connection, number: int) -> int:
    connection.send(number)
    return number


def pass_back(connection: Connection) -> Connection:
    """Return a connection as the result of a task."""
    return connection


def new_end() -> Connection:
    """Return an end of a pipe, at the other end of which is a message."""
    ours, theirs = Pipe()
    ours.send("from the worker")
    return theirs


def shout(sock: socket.socket) -> None:
    sock.sendall(b"shouted")


def inodes(pid: int) -> set[int]:
    """Return the sockets and pipes that a process has open."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            about = os.stat(f"/proc/{pid}/fd/{fd}")
        except OSError:  # that of the listing
            continue
        if stat.S_ISSOCK(about.st_mode) or stat.S_ISFIFO(about.st_mode):
            found.add(about.st_ino)
    return found


def say_inodes(connection: Connection, *things: object) -> None:
    connection.send(inodes(os.getpid()))
    connection.recv()


def relay(first: Connection) -> None:
    """Hand every connection that comes to a process of its own."""
    processes = []
    while (connection := first.recv()) is not None:
        processes.append(fiber.Process(target=say, args=(connection, os.getpid())))
        processes[-1].start()
        connection.close()
    for process in processes:
        process.join()


def send_an_end_and_wait(connection: Connection) -> None:
    ours, theirs = Pipe()
    connection.send(theirs)
    theirs.close()
    connection.send(ours.recv() + 1)


def send_an_end_and_leave(connection: Connection) -> None:
    _, theirs = Pipe()
    connection.send(theirs)


def call(address: object, key: bytes | None, message: object) -> None:
    with Client(address, authkey=key) as connection:
        connection.send(message)


def serve(connection: Connection) -> None:
    """Listen, tell where, and send one message back."""
    with Listener() as listener:
        connection.send(listener.address)
        with listener.accept() as accepted:
            accepted.send(accepted.recv() * 2)


kept: list[object] = []


def keep(thing: object) -> None:
    """As the initializer of a pool."""
    kept.append(thing)


def use_kept(number: int) -> int:
    kept[0].send((os.getpid(), number))  # type: ignore[attr-defined]
    return number


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("this cannot be pickled")


class Unloadable:
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


class Registered:
    """Something of a library that registered with ForkingPickler how it is shared."""

    def __init__(self, how: str) -> None:
        self.how = how


ForkingPickler.register(Registered, lambda thing: (Registered, ("shared",)))


def hold_what_comes(control: Connection) -> None:
    """Say that something came, and keep it until something else comes."""
    while True:
        try:
            thing = control.recv()
        except EOFError:
            return
        if thing is not None:
            control.send("got it")
        held[:] = [thing]


held: list[object] = []


def say_what_the_queue_has(queue: Any, control: Connection) -> None:
    queue.get()["end"].send("from the queue")
    control.send("done")


def use_what_comes(control: Connection, name: str) -> None:
    """Exchange names with whoever has the other end of the connection that comes."""
    with control.recv() as connection:
        connection.send(name)
        control.send(connection.recv())
