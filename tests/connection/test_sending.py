"""Connections and other descriptors that are sent to processes which are there already."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.connection import targets

import fiber
from fiber.connection import Connection, Pipe
from fiber.runtime.descriptors import Descriptor, lend

MakePipe = Callable[..., tuple[Connection, Connection]]
Start = Callable[..., fiber.Process]
Receive = Callable[[Any], Any]
Ended = Callable[[Any], None]


def test_through_a_pipe(pipe: MakePipe, start: Start, receive: Receive, ended: Ended) -> None:
    control, theirs = pipe()
    process = start(targets.send_an_end_and_wait, theirs)
    theirs.close()
    given = receive(control)
    assert type(given) is Connection
    with given:
        given.send(41)
        assert receive(control) == 42
        process.join(20)
        ended(given)
    ended(control)


@pytest.mark.parametrize("duplex", [True, False])
def test_what_it_can_do_goes_with_it(
    duplex: bool, pipe: MakePipe, start: Start, receive: Receive
) -> None:
    control, theirs = pipe()
    start(targets.echo, theirs)
    one, other = pipe(duplex)
    control.send([one, other])
    for original, copied in zip((one, other), receive(control), strict=True):
        with copied:
            assert (copied.readable, copied.writable) == (original.readable, original.writable)
            assert os.path.sameopenfile(copied.fileno(), original.fileno())
            assert not os.get_inheritable(copied.fileno())


def test_the_sender_keeps_no_copy(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    control, theirs = pipe()
    start(targets.hold_what_comes, theirs)
    theirs.close()
    one, other = pipe()
    control.send(other)
    other.close()
    assert receive(control) == "got it"
    assert not one.poll(0.1)  # the receiver has it
    control.send(None)  # which closes it
    ended(one)


def test_as_argument_and_result_of_a_task(pipe: MakePipe, receive: Receive, ended: Ended) -> None:
    one, other = pipe()
    with fiber.Pool(2) as pool:
        returned = pool.apply(targets.pass_back, (other,))
        assert returned.fileno() != other.fileno()
        returned.send("through the result")
        assert receive(one) == "through the result"
        returned.close()
        made = pool.apply(targets.new_end)
        assert receive(made) == "from the worker"
        ended(made)  # the worker's own end is dropped with the task
        made.close()
        pairs = [(other, number) for number in range(200)]
        assert pool.starmap(targets.say_number, pairs, chunksize=1) == list(range(200))
        assert sorted(receive(one) for _ in range(200)) == list(range(200))
        other.close()
        ended(one)  # though the workers are there


def test_a_closure_for_many_workers(pipe: MakePipe, receive: Receive) -> None:
    one, other = pipe()

    def use(number: int) -> int:
        time.sleep(0.05)  # so that each worker has some
        other.send(os.getpid())
        return number

    with fiber.Pool(3) as pool:
        assert pool.map(use, range(9), chunksize=1) == list(range(9))
    assert len({receive(one) for _ in range(9)}) == 3


def test_for_the_initializer_of_a_pool(pipe: MakePipe, receive: Receive) -> None:
    one, other = pipe()
    with fiber.Pool(3, targets.keep, (other,), maxtasksperchild=1) as pool:
        assert pool.map(targets.use_kept, range(9), chunksize=1) == list(range(9))
    found = [receive(one) for _ in range(9)]
    assert len({pid for pid, _ in found}) == 9
    assert sorted(number for _, number in found) == list(range(9))


def test_a_socket_for_the_workers_of_a_pool() -> None:
    """As servers do it: several processes accept from one socket."""
    with socket.create_server(("localhost", 0)) as listener, fiber.Pool(2) as pool:
        address = listener.getsockname()
        results = pool.map_async(lambda _: listener.accept()[0].send(b"hello"), range(4), 1)
        for _ in range(4):
            with socket.create_connection(address, 20) as sock:
                assert sock.recv(10) == b"hello"
        assert results.get(20) == [5] * 4


def test_unpickled_where_it_was_pickled(pipe: MakePipe, receive: Receive, ended: Ended) -> None:
    one, other = pipe()
    data = pickle.dumps(other)
    with pickle.loads(data) as again:
        again.send(1)
        assert receive(one) == 1
    with copy.copy(other) as again:
        again.send(2)
        assert receive(one) == 2
    with pickle.loads(data) as again:
        other.close()
        again.send(3)
        assert receive(one) == 3
    ended(one)


def test_what_is_gone_is_an_error(pipe: MakePipe) -> None:
    one, other = pipe()
    data = pickle.dumps(other)
    other.close()
    pickle.loads(data).close()
    with pytest.raises(ConnectionError, match="its sender has closed it"):
        pickle.loads(data)
    assert one.poll(20)


def test_a_number_that_is_used_again_is_not_taken_for_it(pipe: MakePipe) -> None:
    one, other = pipe()
    data = pickle.dumps(other)
    fd = other.fileno()
    other.close()
    pickle.loads(data).close()
    strangers = [os.dup2(one.fileno(), fd)] if fd != one.fileno() else []
    try:
        with pytest.raises(ConnectionError):
            pickle.loads(data)
    finally:
        for stranger in strangers:
            os.close(stranger)
    reader, writer = os.pipe()
    data = pickle.dumps(Connection(reader, writable=False))  # dropped, and so closed
    pickle.loads(data).close()
    assert os.dup2(writer, reader) == reader  # the same pipe, but its other end
    try:
        with pytest.raises(ConnectionError):
            pickle.loads(data)
    finally:
        os.close(reader)
        os.close(writer)


def test_many_pickles_cost_one_descriptor(pipe: MakePipe) -> None:
    _, other = pipe()
    before = os.listdir("/dev/fd")
    data = [pickle.dumps(other) for _ in range(2000)]
    assert len(os.listdir("/dev/fd")) < len(before) + 20
    other.close()
    for one in data:
        pickle.loads(one).close()


def test_what_nobody_claims_is_closed_after_its_lease(pipe: MakePipe, ended: Ended) -> None:
    one, other = pipe()
    data = pickle.dumps(lend(other.fileno(), 0.3))
    other.close()
    assert not one.poll(0.1)
    ended(one)
    with pytest.raises(ConnectionError, match="not received within"):
        pickle.loads(data)


def test_what_cannot_be_pickled_leaves_nothing_behind(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    control, theirs = pipe()
    start(targets.hold_what_comes, theirs)
    one, other = pipe()
    with pytest.raises(fiber.SerializationError):
        control.send([other, targets.Unpicklable()])
    other.close()
    ended(one)
    # By name first, which fails at the lambda; then by value. The receiver has the only copy.
    one, other = pipe()
    control.send([other, lambda: None])
    other.close()
    assert receive(control) == "got it"
    control.send(None)
    ended(one)


@pytest.mark.parametrize("end", ["exit", "kill -9"])
def test_a_sender_that_is_gone(end: str, pipe: MakePipe, start: Start, receive: Receive) -> None:
    control, theirs = pipe()
    process = start(
        {"exit": targets.send_an_end_and_leave, "kill -9": targets.send_an_end_and_wait}[end],
        theirs,
    )
    theirs.close()
    assert control.poll(20)
    if end == "kill -9":
        os.kill(process.pid or 0, signal.SIGKILL)
    process.join(20)
    assert not process.is_alive()
    began = time.monotonic()
    with pytest.raises(fiber.PeerDied, match="cannot be asked for it"):
        control.recv()
    assert time.monotonic() - began < 10


def test_a_sender_that_ends_waits_a_moment_for_who_receives(
    pipe: MakePipe, start: Start, ended: Ended
) -> None:
    control, theirs = pipe()
    process = start(targets.send_an_end_and_leave, theirs)
    assert control.poll(20)
    with control.recv() as given:
        ended(given)  # its other end was closed with the process
    process.join(20)
    assert process.exitcode == 0


def test_a_receiver_that_is_killed(
    pipe: MakePipe, start: Start, receive: Receive, ended: Ended
) -> None:
    control, theirs = pipe()
    process = start(targets.hold_what_comes, theirs)
    one, other = pipe()
    control.send(other)
    other.close()
    assert receive(control) == "got it"
    process.kill()
    ended(one)


def test_sockets_and_connections_of_multiprocessing(
    pipe: MakePipe, start: Start, receive: Receive
) -> None:
    control, theirs = pipe()
    start(targets.echo, theirs)
    one, other = socket.socketpair()
    reader, writer = multiprocessing.Pipe(False)
    with one, other, reader, writer:
        control.send({"socket": other, "writer": writer, "lambda": lambda: None})
        other.close()
        writer.close()
        with contextlib.ExitStack() as stack:
            received = receive(control)
            sock = stack.enter_context(received["socket"])
            again = stack.enter_context(received["writer"])
            sock.sendall(b"by a socket")
            again.send("by a connection")
            assert type(again) is multiprocessing.connection.Connection
        one.settimeout(20)
        assert one.recv(100) == b"by a socket"
        control.send("next")  # the echo lets go of the message before
        assert one.recv(100) == b""
        assert receive(reader) == "by a connection"
        with pytest.raises(EOFError):
            reader.recv()
    # No thread of multiprocessing's was needed, to which each process would have to connect.
    assert not [thread for thread in threading.enumerate() if "_serve" in thread.name]


def test_through_a_queue(pipe: MakePipe, start: Start, receive: Receive, ended: Ended) -> None:
    control, theirs = pipe()
    queue = fiber.Queue()
    start(targets.say_what_the_queue_has, queue, theirs)
    one, other = pipe()
    queue.put({"end": other})
    other.close()
    assert receive(one) == "from the queue"
    ended(one)
    assert receive(control) == "done"


def test_through_what_is_of_multiprocessing(pipe: MakePipe, receive: Receive, ended: Ended) -> None:
    """Within a session, its picklers will do as well."""
    one, other = pipe()
    reader, writer = multiprocessing.Pipe(False)
    with reader, writer:
        writer.send(other)
        other.close()
        with receive(reader) as given:
            given.send(1)
    assert receive(one) == 1
    ended(one)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_to_a_fork(pipe: MakePipe, receive: Receive, ended: Ended) -> None:
    """A child of os.fork is no part of the session, but knows whom to ask."""
    control, theirs = pipe()
    one, other = pipe()
    data = pickle.dumps(other)
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            other.close()
            one.close()
            if theirs.recv() == "go":
                pickle.loads(data).send("from the fork")
                code = 0
        os._exit(code)
    other.close()
    theirs.close()
    control.send("go")
    assert receive(one) == "from the fork"
    ended(one)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_keeps_nothing_of_what_was_lent(pipe: MakePipe, ended: Ended) -> None:
    hold, held = pipe()
    one, other = pipe()
    data = pickle.dumps(other)
    pid = os.fork()
    if pid == 0:
        for connection in (one, other, hold):
            connection.close()
        with contextlib.suppress(EOFError):
            held.recv()
        os._exit(0)
    other.close()
    pickle.loads(data).close()
    ended(one)
    hold.close()
    held.close()
    assert os.waitpid(pid, 0)[1] == 0


def test_strangers_get_nothing(pipe: MakePipe) -> None:
    _, other = pipe()
    data = pickle.dumps(other)
    program = (
        "import sys, pickle\n"
        "from fiber.runtime import descriptors\n"
        "descriptors._TIMEOUT = 0.5\n"
        "try: pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "except ConnectionError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, data.hex()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "does not know this session's secret" in done.stdout or "closed" in done.stdout
    pickle.loads(data).close()


def test_a_descriptor_has_one_owner() -> None:
    reader, writer = os.pipe()
    owner = Descriptor(reader)
    again = Descriptor.duplicate(reader)
    assert owner.detach() == reader
    del owner
    os.close(reader)
    os.set_blocking(again.__index__(), False)
    with pytest.raises(BlockingIOError):
        os.read(again.__index__(), 1)
    del again
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"nobody reads it")
    os.close(writer)


def test_ends_of_one_pipe_go_to_both_sides(pipe: MakePipe, start: Start, receive: Receive) -> None:
    """Two processes that know nothing of each other are connected by a third."""
    first, first_end = pipe()
    second, second_end = pipe()
    start(targets.use_what_comes, first_end, "one")
    start(targets.use_what_comes, second_end, "other")
    one, other = Pipe()
    first.send(one)
    second.send(other)
    one.close()
    other.close()
    assert receive(first) == "other"
    assert receive(second) == "one"
