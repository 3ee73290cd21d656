"""Connections and other descriptors that go along with a process which is being started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from tests.connection import targets

import fiber
from fiber.connection import Connection

MakePipe = Callable[..., tuple[Connection, Connection]]
Start = Callable[..., fiber.Process]
Receive = Callable[[Any], Any]
Ended = Callable[[Any], None]

on_linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="looks into /proc")


@pytest.mark.parametrize("way", ["end", "exception", "os._exit", "kill -9"])
def test_the_end_of_the_process_is_seen_at_once(
    way: str, pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    ours, theirs = pipe()
    if way == "kill -9":
        process = start(targets.say_and_hold, theirs, "here")
    else:
        process = start(
            {
                "end": lambda c: c.send("here"),
                "exception": lambda c: (c.send("here"), {}["no such key"]),
                "os._exit": lambda c: (c.send("here"), os._exit(3)),
            }[way],
            theirs,
        )
    theirs.close()
    assert receive(ours) == "here"
    if way == "kill -9":
        process.kill()
    ended(ours)


def test_ends_by_name_by_value_and_within_others(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    named, in_name = pipe()
    given, in_args = pipe()
    closed_over, in_closure = pipe()
    start(targets.say, in_name, 1)
    start(lambda things: things["end"].send(2), {"end": in_args})
    start(lambda: in_closure.send(3))
    for connection in (in_name, in_args, in_closure):
        connection.close()
    assert [receive(c) for c in (named, given, closed_over)] == [1, 2, 3]
    # A pickle by name was tried first for the lambdas: what it had taken along is not kept.
    for connection in (named, given, closed_over):
        ended(connection)


def test_the_child_has_no_copy_but_its_own(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    ours, theirs = pipe()
    # It is pickled by name first, in vain, after it has taken the connection along.
    process = start(targets.say_and_close, theirs, "here", lambda: None)
    theirs.close()
    assert receive(ours) == "here"
    ended(ours)
    assert process.is_alive()


def test_a_subclass_of_process(pipe: MakePipe, receive: Receive, ended: Ended) -> None:
    class Speaker(fiber.Process):
        def __init__(self, connection: Connection) -> None:
            super().__init__()
            self.connection = connection

        def run(self) -> None:
            self.connection.send(type(self).__name__)

    ours, theirs = pipe()
    process = Speaker(theirs)
    process.start()
    theirs.close()
    assert receive(ours) == "Speaker"
    process.join(20)
    with contextlib.suppress(AttributeError):
        process.connection.close()
    ended(ours)


def test_no_sibling_has_a_copy(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    first, first_end = pipe()
    second, second_end = pipe()
    dying = start(targets.say_and_hold, first_end, "first")
    staying = start(targets.say_and_hold, second_end, "second")
    first_end.close()
    second_end.close()
    assert receive(first) == "first"
    assert receive(second) == "second"
    dying.kill()
    ended(first)
    assert not second.poll()
    staying.kill()
    ended(second)


@on_linux
def test_a_hundred_pipes_to_twenty_processes(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pipes = [[pipe(duplex=n % 2 == 0) for n in range(5)] for _ in range(20)]
    given = [{inode(theirs) for _, theirs in group} for group in pipes]
    processes: list[fiber.Process] = []

    def start_one(number: int) -> None:
        (_, end), *others = pipes[number]
        processes.append(start(targets.say_inodes, end, [other for _, other in others]))
        for _, other in pipes[number]:
            other.close()

    threads = [threading.Thread(target=start_one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, group in enumerate(pipes):
        found = receive(group[0][0])
        assert given[number] <= found
        assert not found & set().union(*(given[i] for i in range(20) if i != number))
    agent = psutil.Process(processes[0].pid).parent()
    assert agent is not None
    assert not targets.inodes(agent.pid) & set().union(*given)
    for group in pipes:
        group[0][0].send("go")
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    for group in pipes:
        for ours, _ in group:
            ended(ours)
            ours.close()
    for process in processes:
        process.close()
    # The agent and this process's own part in the session have taken some, but not by the hundred.
    assert len(os.listdir("/proc/self/fd")) < before + 20


def inode(connection: Connection) -> int:
    return os.fstat(connection.fileno()).st_ino


def test_more_descriptors_than_fit_into_one_message(
    pipe: MakePipe, start: Start, receive: Receive
) -> None:
    pairs = [pipe(False) for _ in range(140)]
    control, theirs = pipe()
    everything = [end for pair in pairs for end in pair]
    process = start(count_and_write, theirs, everything)
    assert receive(control) == 280
    for number, (reader, _) in enumerate(pairs):
        assert receive(reader) == number
    process.join(20)
    assert process.exitcode == 0


def count_and_write(control: Connection, everything: list[Connection]) -> None:
    control.send(len(everything))
    for number, writer in enumerate(everything[1::2]):
        writer.send(number)


DROPPED = """
import os, resource, socket
from fiber.wire.channel import Channel

ours, theirs = map(Channel, socket.socketpair())
theirs.takes_fds = True
ours.post(1, b"five", (), [0] * 5)
ours.post(2, b"two", (), [0, 0])
ours.flush()
before = os.listdir("/dev/fd")
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 3, hard))
frames = theirs.read()
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
while len(frames) < 2:
    frames += theirs.read()
print([frame.kind for frame in frames], theirs.take_fds(5))
ours.post(3, b"two more", (), [0, 0])
ours.flush()
print(len(theirs.take_fds(2)), [frame.kind for frame in theirs.read()], len(theirs.take_fds(2)))
print(len(os.listdir("/dev/fd")) - len(before))
"""


def test_descriptors_that_the_system_dropped(run_script: Callable[..., Any]) -> None:
    """A process that has too many open gets none, and never those of another frame."""
    done = run_script(DROPPED)
    assert (done.stdout, done.stderr) == ("[1, 2] []\n0 [3] 2\n2\n", "")


@pytest.mark.parametrize("unpickling", [False, True])
def test_a_process_that_does_not_start_keeps_nothing(
    unpickling: bool, pipe: MakePipe, ended: Ended
) -> None:
    ours, theirs = pipe()
    if unpickling:
        process = fiber.Process(target=targets.hold, args=(theirs, targets.Unloadable()))
        process.start()
        theirs.close()
        process.join(20)
        assert process.exitcode == 1
    else:
        process = fiber.Process(target=targets.hold, args=(theirs, targets.Unpicklable()))
        with pytest.raises(fiber.SerializationError):
            process.start()
        theirs.close()
    ended(ours)


def test_a_process_whose_agent_is_gone_keeps_nothing(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    ours, theirs = pipe()
    control, control_end = pipe()
    first = start(targets.say_and_hold, control_end, "up")
    assert receive(control) == "up"
    agent = psutil.Process(first.pid).parent()
    assert agent is not None
    agent.suspend()
    try:
        process = fiber.Process(target=targets.hold, args=(theirs,))
        threading.Timer(0.3, agent.kill).start()
        with pytest.raises(fiber.StartError):
            process.start()
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            agent.send_signal(signal.SIGKILL)
    theirs.close()
    ended(ours)


def test_sockets_and_what_multiprocessing_made_of_descriptors(
    start: Start, receive: Receive
) -> None:
    ours, theirs = socket.socketpair()
    reader, writer = multiprocessing.Pipe(False)
    context = multiprocessing.get_context("spawn")
    queue, lock = context.Queue(), context.Lock()
    with ours, theirs, reader, writer:
        start(targets.shout, theirs)
        start(targets.say, writer, "by a pipe of multiprocessing")
        start(put_with_lock, queue, lock)
        theirs.close()
        writer.close()
        ours.settimeout(20)
        assert ours.recv(100) == b"shouted"
        assert ours.recv(100) == b""
        assert receive(reader) == "by a pipe of multiprocessing"
        with pytest.raises(EOFError):
            reader.recv()
        assert queue.get(timeout=20) == "by a queue of multiprocessing"
    queue.close()
    queue.join_thread()
    queue._reader.close()


def put_with_lock(queue: Any, lock: Any) -> None:
    with lock:
        queue.put("by a queue of multiprocessing")


def test_a_child_hands_on_to_its_own_children(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    ours, theirs = pipe()
    first, first_end = pipe()
    second, second_end = pipe()
    process = start(targets.relay, theirs)
    theirs.close()
    for end in (first_end, second_end):
        ours.send(end)
        end.close()
    ours.send(None)
    assert receive(first) == receive(second) == process.pid
    process.join(20)
    ended(first)
    ended(second)
    ended(ours)


FRESH = """
import os, sys, threading, time
import fiber
from fiber.connection import Pipe

# It cannot be forked: each process is an interpreter of its own.
threading.Thread(target=threading.Event().wait, daemon=True).start()

def speak(connection, message, others):
    connection.send((message, [other.fileno() for other in others]))
    for other in others:
        assert not os.get_inheritable(other.fileno())
    time.sleep(message)

def end_of(connection):
    assert connection.poll(20)
    try:
        connection.recv()
    except EOFError:
        return True

if __name__ == "__main__":
    pipes = [Pipe() for _ in range(3)]
    # The last one stays: it must not have what is the others'.
    times = [0, 0, 3600]
    processes = [
        fiber.Process(target=speak, args=(theirs, seconds, [theirs]))
        for (_, theirs), seconds in zip(pipes, times)
    ]
    for process, (_, theirs) in zip(processes, pipes):
        process.start()
        theirs.close()
    for (ours, _), seconds in zip(pipes, times):
        assert ours.poll(20)
        assert ours.recv()[0] == seconds
    print(end_of(pipes[0][0]), end_of(pipes[1][0]), pipes[2][0].poll(0))
    processes[2].kill()
    print(end_of(pipes[2][0]))
    ours, theirs = Pipe()
    lambda_process = fiber.Process(target=lambda: theirs.send("by value"))
    lambda_process.start()
    theirs.close()
    print(ours.recv(), end_of(ours))
"""


def test_fresh_interpreters_get_them_as_well(run_script: Callable[..., Any]) -> None:
    done = run_script(FRESH)
    assert (done.stdout, done.stderr) == ("True True False\nTrue\nby value True\n", "")
