"""Managers of other programs: of plain multiprocessing, and of other sessions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.managers import targets
from tests.waiting import until

import fiber
from fiber import managers

AUTHKEY = b"of both"

PLAIN = """
import multiprocessing
import multiprocessing.managers as managers
import queue, sys
try:
    import fiber
except ImportError:
    pass
else:
    sys.exit("it was to be plain")
"""


class Program:
    """A program that reads lines from its standard input, and answers each with a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def ask(self, text: str = "") -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(text, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().rstrip("\n")


@pytest.fixture
def plain(start_script: Callable[..., Any], tmp_path: Path) -> Callable[..., Program]:
    """`plain(source, *args)` starts a program that cannot import Fiber."""

    def start(source: str, *args: object) -> Program:
        script = tmp_path / "plain.py"
        script.write_text(PLAIN + textwrap.dedent(source))
        # Without site there is no installed package, and -I keeps the environment away.
        runner = f"import os, sys; os.execv({sys.executable!r}, {[sys.executable, '-I', '-S']!r}"
        runner += f" + {[str(script), *map(str, args)]!r})"
        return Program(start_script(runner, name="runner.py", stdin=subprocess.PIPE))

    return start


@pytest.fixture(params=["tcp", "unix"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return ("127.0.0.1", 0) if request.param == "tcp" else str(tmp_path / "s")


# A server of multiprocessing

SERVER = """
    class Manager(managers.SyncManager):
        pass

    class Tool:
        def fail(self):
            raise ZeroDivisionError("no")
        def lock(self):
            import _thread
            return _thread.allocate_lock()
        def count(self, most):
            yield from range(most)
        def parts(self):
            return [1, 2]

    Manager.register("Tool", Tool, method_to_typeid={"count": "Iterator", "parts": "Parts"})
    Manager.register("Parts", proxytype=managers.ListProxy, create_method=False)

    if __name__ == "__main__":
        input()
        address = sys.argv[1:]
        address = (address[0], int(address[1])) if len(address) == 2 else address[0]
        server = Manager(address, b"of both").get_server()
        print(repr(server.address), flush=True)
        server.serve_forever()
"""


class Manager(managers.SyncManager):
    pass


Manager.register("Tool", method_to_typeid={"count": "Iterator"})


@pytest.fixture
def server(plain: Callable[..., Program], address: Any) -> Iterator[tuple[Any, Program]]:
    program = plain(SERVER, *([address] if isinstance(address, str) else address))
    manager = Manager(eval(program.ask()), AUTHKEY)
    manager.connect()
    yield manager, program
    manager._remote.close()  # pytest still holds the manager, and so its connection


def test_containers_of_a_plain_server(server: Any) -> None:
    manager, _ = server
    items = manager.dict(a=1)
    items["inner"] = manager.list([1])
    items["inner"].append(2)
    assert items["inner"][:] == [1, 2]
    assert list(items) == ["a", "inner"]
    space = manager.Namespace(x=1)
    assert (space.x, manager.Value("i", 2).value, manager.Array("i", [3])[0]) == (1, 2, 3)


def test_locks_and_queues_of_a_plain_server(server: Any, in_thread: Callable[..., Any]) -> None:
    manager, _ = server
    lock, items, event = manager.Lock(), manager.Queue(), manager.Event()
    assert type(lock) is managers.AcquirerProxy
    with lock:
        assert in_thread(lock.acquire, False).result(20) is False
    with pytest.raises(RuntimeError, match="release unlocked lock"):
        lock.release()
    items.put("x")
    assert items.get() == "x"
    waiting = in_thread(event.wait, 20)
    event.set()
    assert waiting.result(20) is True
    reentrant = manager.RLock()
    assert reentrant.acquire()
    assert reentrant.acquire()


def test_proxies_that_a_plain_server_returns(server: Any) -> None:
    manager, _ = server
    tool = manager.Tool()
    assert list(tool.count(3)) == [0, 1, 2]
    assert tool.parts()[:] == [1, 2]


def test_exceptions_of_a_plain_server(server: Any) -> None:
    manager, _ = server
    tool = manager.Tool()
    with pytest.raises(ZeroDivisionError, match="no"):
        tool.fail()
    with pytest.raises(managers.RemoteError, match="Unserializable"):
        tool.lock()
    with pytest.raises(KeyError):
        manager.dict()["nothing"]


def test_a_plain_server_counts_our_proxies(server: Any) -> None:
    manager, _ = server
    items = [manager.list() for _ in range(3)]
    assert manager._number_of_objects() == 3
    del items
    until(lambda: manager._number_of_objects() == 0)


def test_processes_share_a_plain_server(server: Any, run: Callable[..., Any]) -> None:
    manager, _ = server
    items = manager.list([1])
    assert run(targets.append, items, 2) == [1, 2]  # the authkey goes along with the process


def test_a_plain_server_that_is_killed(server: Any) -> None:
    manager, program = server
    items = manager.list([1])
    program.process.send_signal(signal.SIGKILL)
    program.process.wait(20)
    for call in (lambda: items[:], manager.list, manager.Tool):
        with pytest.raises(fiber.PeerDied, match=r"the manager at .* has ended"):
            call()


# A server of Fiber

CLIENT = """
    class Manager(managers.SyncManager):
        pass

    Manager.register("Tool", proxytype=managers.MakeProxyType(
        "Tool", ("see", "fail", "fail_unpicklably", "child", "count", "call")))
    Manager.register("Parts", proxytype=managers.ListProxy, create_method=False)
    Manager.register("get_queue")

    if __name__ == "__main__":
        # Without this, multiprocessing could not use proxies that it gets from within others.
        multiprocessing.current_process().authkey = b"of both"
        manager = Manager(eval(input()))
        manager.connect()
        print("connected", flush=True)
        while True:
            text = input()
            try:
                exec(text)
            except Exception as error:
                result = error
            print(repr(result), flush=True)
"""


class Tools(managers.SyncManager):
    pass


Tools.register("Tool", targets.Tool, method_to_typeid={"child": "Tool", "count": "Iterator"})
Tools.register("get_queue", callable=targets.get_queue)


@pytest.fixture
def client(plain: Callable[..., Program], address: Any) -> Iterator[tuple[Program, Any]]:
    with Tools(address, AUTHKEY) as manager:
        program = plain(CLIENT)
        assert program.ask(repr(manager.address)) == "connected"
        yield program, manager
    manager.join()


def test_a_plain_client_uses_containers(client: Any) -> None:
    program, _ = client
    ask = program.ask
    ask("result = items = manager.dict(a=1)")
    ask("result = items.update(b=manager.list([1]))")
    ask("result = items['b'].append(2)")
    assert ask("result = items['a'], items['b'][:], list(items)") == "(1, [1, 2], ['a', 'b'])"


def test_a_plain_client_uses_locks_and_queues(client: Any) -> None:
    ask = client[0].ask
    ask("result = lock = manager.Lock()")
    assert ask("result = lock.acquire(), lock.acquire(False), lock.release()") == (
        "(True, False, None)"
    )
    assert ask("result = lock.release()") == "RuntimeError('release unlocked lock')"
    assert ask("items = manager.Queue(); items.put('x'); result = items.get()") == "'x'"
    assert ask("result = items.get_nowait()") == "Empty()"
    assert ask("event = manager.Event(); result = event.wait(0.01)") == "False"


def test_a_plain_client_gets_proxies_and_exceptions(client: Any) -> None:
    ask = client[0].ask
    ask("result = tool = manager.Tool('a')")
    assert ask("result = list(tool.count(3)), tool.child('b').see(1)") == "([0, 1, 2], 1)"
    assert ask("result = tool.fail(ZeroDivisionError('no'))") == "ZeroDivisionError('no')"
    assert "in fail\n" in ask("result = str(result.__cause__)").replace("\\n", "\n")
    assert "RemoteError" in ask("result = tool.fail_unpicklably()")
    assert "RemoteError" in ask("result = tool._callmethod('_hidden')")


def test_both_kinds_of_clients_share_an_object(client: Any) -> None:
    program, manager = client
    ours = manager.get_queue()
    ours.put("from Fiber")
    program.ask("result = theirs = manager.get_queue()")
    assert program.ask("result = theirs.get()") == "'from Fiber'"
    program.ask("result = theirs.put('from multiprocessing')")
    assert ours.get() == "from multiprocessing"


def test_nested_proxies_among_both_kinds_of_clients(client: Any) -> None:
    """What one client puts into an object of the manager, as a proxy, the other can use."""
    program, manager = client
    ours = manager.get_queue()
    ours.put(manager.list([1]))
    program.ask("theirs = manager.get_queue(); result = items = theirs.get()")
    program.ask("result = items.append(2)")
    assert program.ask("result = items[:]") == "[1, 2]"
    program.ask("result = theirs.put(manager.dict(a=1))")
    items = ours.get()
    items["b"] = 2
    assert items.copy() == {"a": 1, "b": 2}


def test_a_plain_clients_proxies_are_counted(client: Any) -> None:
    program, manager = client
    program.ask("result = items = [manager.list() for _ in range(3)]")
    assert manager._number_of_objects() == 3
    program.ask("result = None; del items")
    until(lambda: manager._number_of_objects() == 0)


def test_a_plain_client_that_is_killed_does_not_disturb(client: Any) -> None:
    program, manager = client
    program.process.stdin.write("result = manager.get_queue().get()\n")
    program.process.stdin.flush()
    program.process.send_signal(signal.SIGKILL)
    program.process.wait(20)
    assert manager.list([1])[:] == [1]


# Servers in this process, and in other sessions


def test_a_server_in_this_process() -> None:
    server = Tools(("127.0.0.1", 0), AUTHKEY).get_server()

    def serve() -> None:
        with pytest.raises(SystemExit):
            server.serve_forever()

    thread = threading.Thread(target=serve)
    thread.start()
    manager = Tools(server.address, AUTHKEY)
    try:
        deadline = time.monotonic() + 20
        while not hasattr(fiber.current_process(), "_manager_server"):
            assert time.monotonic() < deadline
        manager.connect()
        assert manager.list([1])[:] == [1]
        assert manager.Tool().pid() == os.getpid()
    finally:
        server.stop_event.set()
        thread.join(20)
        server.listener.close()
        del fiber.current_process()._manager_server  # type: ignore[attr-defined]
    assert not thread.is_alive()


OTHER = """
import fiber, sys
from fiber.managers import SyncManager

if __name__ == "__main__":
    manager = SyncManager(eval(input()), b"of both")
    manager.connect()
    print("connected", flush=True)
    items, lock, number = manager.dict(), manager.Lock(), 3
    items["nested"] = manager.list([1])
    items["function"] = lambda x: x + number
    with fiber.Pool(1) as pool:
        try:
            pool.apply(items["nested"].append, (2,))
        except fiber.SerializationError as error:
            print(error, flush=True)
    fiber.current_process().authkey = b"of both"  # as multiprocessing wants it, too
    with fiber.Pool(1) as pool:
        pool.apply(items["nested"].append, (2,))
    print(type(lock).__name__, items["nested"][:], items["function"](4), flush=True)
    input()
"""


def test_a_program_of_another_session(start_script: Callable[..., Any], address: Any) -> None:
    with managers.SyncManager(address, AUTHKEY) as manager:
        program = Program(start_script(OTHER, stdin=subprocess.PIPE))
        assert program.ask(repr(manager.address)) == "connected"
        told = program.process.stdout.readline()
        assert re.search(r"the manager at .* has another authkey than this process", told)
        assert program.process.stdout.readline() == "AcquirerProxy [1, 2] 7\n"
        program.ask()
    manager.join()


def test_another_serializer() -> None:
    with targets.QueueManager(("127.0.0.1", 0), AUTHKEY, "xmlrpclib") as manager:
        client = targets.QueueClient(manager.address, AUTHKEY, "xmlrpclib")
        client.connect()
        client.get_queue().put((1, "two", None, 2.5, "drei €"))
        assert manager.get_queue().get() == [1, "two", None, 2.5, "drei €"]
        with pytest.raises(Exception, match="cannot marshal"):
            client.get_queue().put(time.sleep)
        with pytest.raises(managers.RemoteError):
            client.get_queue().get_nowait()
    with pytest.raises(fiber.PeerDied):
        client.get_queue()
    manager.join()


def test_connecting_where_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError):
        managers.SyncManager(("127.0.0.1", 1)).connect()
    with pytest.raises(FileNotFoundError):
        managers.SyncManager(str(tmp_path / "s")).connect()
