"""Proxies: nested, pickled, registered in all ways, and for how long their objects live."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from tests.managers import targets
from tests.waiting import until

import fiber
from fiber import managers

Run = Callable[..., Any]


# Nested and pickled


def test_proxies_can_be_nested(manager: Any, run: Run) -> None:
    inner = manager.list([1])
    outer = manager.dict(inner=inner, deep=manager.dict(deeper=manager.list()))
    outer["inner"].append(2)
    run(targets.append, outer["deep"]["deeper"], 3)
    assert list(inner) == [1, 2]
    assert outer["deep"]["deeper"][:] == [3]


def test_a_nested_object_outlives_its_proxies(manager: Any) -> None:
    outer = manager.list([manager.list([1]), manager.Lock()])
    until(lambda: manager._number_of_objects() == 2)
    assert outer[0][:] == [1]
    assert outer[1].acquire()
    assert outer[1].acquire(False) is False


def test_nested_in_itself(manager: Any) -> None:
    items = manager.list()
    items.append(items)
    items[0][0][0].append(1)
    assert items[1] == 1


def test_locks_travel_within_containers(manager: Any, run: Run) -> None:
    items = manager.dict(lock=manager.Lock(), queue=manager.Queue())
    assert items["lock"].acquire()
    assert run(targets.read, items, "lock").acquire(False) is False
    run(items["queue"].put, 1)
    assert items["queue"].get(timeout=20) == 1


def test_a_proxy_can_be_pickled_at_any_time(manager: Any) -> None:
    items = manager.list([1])
    again = pickle.loads(pickle.dumps(items))
    again.append(2)
    assert items[:] == [1, 2]
    assert type(again) is type(items)


@pytest.mark.parametrize("authkey", [None, b"a key of its own"])
def test_proxies_are_good_in_workers_of_a_pool(authkey: bytes | None) -> None:
    with managers.SyncManager(authkey=authkey) as manager, fiber.Pool(2) as pool:
        items, lock = manager.dict(), manager.Lock()

        def store(number: int) -> Any:
            with lock:
                items[number] = os.getpid()
            return items

        for same in pool.map(store, range(4)):
            assert sorted(same) == [0, 1, 2, 3]
        assert set(items.values()).isdisjoint({os.getpid()})


def test_proxies_and_managers_come_from_a_queue(manager: Any, run: Run) -> None:
    queue = fiber.Queue()
    queue.put(manager.list([1]))
    assert run(lambda: queue.get(timeout=20)[:]) == [1]


def test_iterators_work_where_the_manager_is_not(manager: Any, run: Run) -> None:
    assert run(targets.iterate, manager.dict(a=1, b=2)) == ["a", "b"]


def test_getvalue_and_copy_return_a_copy(manager: Any) -> None:
    items = manager.list([1])
    for value in (items._getvalue(), copy.deepcopy(items)):
        assert value == [1]
        value.append(2)
    assert items[:] == [1]


def test_str_is_that_of_the_object(manager: Any) -> None:
    items = manager.list([1])
    assert str(items) == "[1]"
    assert repr(items).startswith("<ListProxy object, typeid 'list' at 0x")


def test_a_fork_has_proxies_of_its_own(manager: Any) -> None:
    items = manager.list([1])
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            items.append(2)
            os.write(write, b"done")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 10) == b"done"
    os.close(read)
    os.waitpid(pid, 0)
    items.append(3)
    assert items[:] == [1, 2, 3]


def test_threads_use_a_proxy_at_the_same_time(manager: Any) -> None:
    items = manager.dict()

    def use(name: int) -> None:
        for number in range(50):
            items[name, number] = number
            assert items[name, number] == number

    threads = [threading.Thread(target=use, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(items) == 200


@pytest.mark.parametrize("size", [0, 1, 1 << 12, 1 << 16, 1 << 20, (1 << 24) + 1])
def test_messages_of_any_size(manager: Any, size: int) -> None:
    items = manager.list([b"x" * size])
    assert items[0] == b"x" * size
    items.append(bytearray(size))
    assert items[1] == bytearray(size)


# For how long objects live


def test_an_object_lives_as_long_as_its_proxies(manager: Any) -> None:
    items = [manager.list() for _ in range(10)]
    assert manager._number_of_objects() == 10
    del items[5:]
    until(lambda: manager._number_of_objects() == 5)
    items.clear()
    until(lambda: manager._number_of_objects() == 0)
    assert manager._debug_info() == ""


def test_iterators_go_at_once(manager: Any) -> None:
    items = manager.dict(a=1)
    for _ in range(20):
        assert list(items) == ["a"]
    until(lambda: manager._number_of_objects() == 1)


def test_what_a_killed_process_had_goes_with_it(tools: Any, kill: Callable[[Any], None]) -> None:
    ready, tool = fiber.Event(), tools.Tool()
    process = fiber.Process(target=targets.make_child_and_hang, args=(tool, ready))
    process.start()
    assert ready.wait(20)
    assert tools._number_of_objects() == 2
    kill(process)
    process.join()
    until(lambda: tools._number_of_objects() == 1)
    assert tool.see(1) == 1


def test_an_object_waits_for_who_unpickles_its_proxy(manager: Any) -> None:
    items = manager.list([1])
    data = pickle.dumps(items)
    del items
    manager.list()  # any work for the server
    assert pickle.loads(data)[:] == [1]


# Registered


def test_public_methods_by_default(tools: Any) -> None:
    tool = tools.Tool("a")
    assert tool.pid() == tools._process.pid
    assert not hasattr(tool, "_hidden")
    with pytest.raises(managers.RemoteError, match="not in exposed"):
        tool._callmethod("_hidden")
    with pytest.raises(managers.RemoteError, match="not in exposed"):
        tool._callmethod("__getitem__", (1,))


def test_exposed_methods_only(tools: Any) -> None:
    tool = tools.Exposed("a")
    assert tool._hidden() == "hidden"
    assert not hasattr(tool, "see")


def test_a_proxytype_of_ones_own(tools: Any, run: Run) -> None:
    tool = tools.Special()
    assert type(tool) is targets.ToolProxy
    assert tool.see_twice("x") == 2
    assert run(tool.see_twice, "y") == 4


def test_methods_that_return_proxies(tools: Any, run: Run) -> None:
    tool = tools.Tool()
    child = tool.child("small")
    assert child.see(1) == 1
    tool.see("one")
    tool.all_seen().append("two")
    assert tool.all_seen()[:] == ["one", "two"]
    assert list(tool.count(3)) == [0, 1, 2]
    assert run(lambda: tool.child("other").child("again").see(1)) == 1


def test_an_object_that_is_there_already(tools: Any) -> None:
    first, second = tools.shared(), tools.shared()
    first.see(1)
    assert second.see(2) == 2
    assert tools._number_of_objects() == 1
    del first
    assert second.see(3) == 3
    del second
    until(lambda: tools._number_of_objects() == 0)
    assert tools.shared().see(4) == 4


def test_callables_may_be_lambdas_and_closures(run: Run) -> None:
    start = 5

    class Counter:
        def __init__(self, number: int) -> None:
            self.number = number

        def add(self, number: int) -> int:
            self.number += number
            return self.number

    class Manager(managers.BaseManager):
        pass

    Manager.register("Counter", Counter)
    Manager.register("from_five", lambda: Counter(start))
    with Manager() as manager:
        assert manager.Counter(1).add(1) == 2
        assert run(manager.from_five().add, 1) == 6


def test_lambdas_and_closures_are_arguments_and_results(tools: Any) -> None:
    tool, number = tools.Tool(), 3
    assert tool.call(lambda x: x + number, 4) == 7
    assert tool.call(lambda: lambda: number)() == 3
    with managers.SyncManager() as manager:
        items = manager.dict(add=lambda x: x + number)
        assert items["add"](1) == 4


PROGRAM = """
import fiber, os
from fiber.managers import BaseManager

class Account:
    def __init__(self, owner):
        self.owner = owner
    def who(self):
        return self.owner
    def apply(self, function):
        return function(self)
    def own(self):
        return Money(5)

class Money:
    def __init__(self, amount):
        self.amount = amount

class Bank(BaseManager):
    pass

def describe(account):
    return f"account of {account.owner}"

def main():
    with Bank() as bank:
        account = bank.Account("Bob")
        print(account.who(), account.apply(describe), account.own().amount)
        account = bank.account()
        print(account.apply(lambda account: account.owner), account.apply(Late().__call__))

GUARD
"""

LATE = """
    Bank.register("Account", Account)
    Bank.register("account", lambda: Account("nobody"))

    class Late:
        def __call__(self, account):
            return type(self).__name__

    main()
"""


def test_classes_and_functions_of_the_main_module(run_script: Callable[..., Any]) -> None:
    source = PROGRAM.replace("GUARD", 'if __name__ == "__main__":' + LATE)
    done = run_script(source)
    assert (done.stdout, done.stderr) == ("Bob account of Bob 5\nnobody Late\n", "")


def test_classes_and_functions_of_an_interactive_session(run_script: Callable[..., Any]) -> None:
    source = PROGRAM.replace("GUARD", "if True:" + LATE)
    done = run_script(f"exec({source!r})", name="typed.py")
    assert (done.stdout, done.stderr) == ("Bob account of Bob 5\nnobody Late\n", "")


def test_making_types_of_proxies() -> None:
    made = managers.MakeProxyType("Made", ("pid", "see"))
    assert made is managers.MakeProxyType("Made", ("pid", "see"))
    assert (made.__name__, made.__module__) == ("Made", __name__)
    assert issubclass(made, managers.BaseProxy)

    class Manager(managers.BaseManager):
        pass

    Manager.register("Tool", targets.Tool, made)
    with Manager() as manager:
        assert manager.Tool().see(1) == 1
