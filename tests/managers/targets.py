"""What the processes of these tests run, in a module of its own that children import."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fiber import managers
from fiber.managers import AsyncManager, BaseManager, BaseProxy

FOREVER = 3600


def report(writer: Any, function: Callable[..., Any], *args: Any) -> None:
    try:
        outcome = function(*args)
    except Exception as error:
        outcome = error
    writer.send(outcome)


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("it takes two")


class Picky(Exception):
    """Has an attribute, which travels."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text, code)
        self.code = code


class Tool:
    """An object of a manager."""

    def __init__(self, name: str = "tool") -> None:
        self.name = name
        self.seen: list[Any] = []
        self._private = "hidden"

    def pid(self) -> int:
        return os.getpid()

    def see(self, item: Any, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        self.seen.append(item)
        return len(self.seen)

    def all_seen(self) -> list[Any]:
        return self.seen

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def fail(self, error: BaseException) -> NoReturn:
        raise error

    def fail_unpicklably(self) -> NoReturn:
        raise Unpicklable(1, 2)

    def lock(self) -> Any:
        return threading.Lock()

    def parts(self) -> list[int]:
        return [1, 2, 3]

    def child(self, name: str) -> Tool:
        return Tool(name)

    def count(self, most: int) -> Iterator[int]:
        yield from range(most)

    def exit(self, code: int) -> NoReturn:
        sys.exit(code)

    def die(self, ready: Path | None = None) -> NoReturn:
        os._exit(7)

    def hang(self, ready: Path) -> None:
        ready.touch()
        time.sleep(FOREVER)

    def _hidden(self) -> str:
        return self._private

    def __getitem__(self, key: Any) -> tuple[str, Any]:
        return self.name, key


class ToolProxy(BaseProxy):
    _exposed_ = ("see", "_hidden")

    def see_twice(self, item: Any) -> Any:
        self._callmethod("see", (item,))
        return self._callmethod("see", (item,))


class ToolManager(BaseManager):
    pass


class AsyncToolManager(AsyncManager):
    pass


_shared = Tool("shared")


def shared() -> Tool:
    return _shared


_RETURNS = {"child": "Tool", "count": "Iterator", "all_seen": "Items"}

for kind in (ToolManager, AsyncToolManager):
    kind.register("Tool", Tool, method_to_typeid=_RETURNS)
    kind.register("shared", shared)
ToolManager.register("Exposed", Tool, exposed=("pid", "_hidden"))
ToolManager.register("Special", Tool, ToolProxy)
ToolManager.register("Items", proxytype=managers.ListProxy, create_method=False)
AsyncToolManager.register("Items", proxytype=managers.AsyncListProxy, create_method=False)
ToolManager.register("Iterator", proxytype=managers.IteratorProxy, create_method=False)

_queue: queue.Queue[Any] = queue.Queue()


def get_queue() -> queue.Queue[Any]:
    return _queue


class QueueManager(BaseManager):
    """The manager of the documentation's example of a remote manager."""


QueueManager.register("get_queue", callable=get_queue)


class QueueClient(BaseManager):
    pass


QueueClient.register("get_queue")


# In other processes


def append(items: Any, item: Any) -> list[Any]:
    items.append(item)
    return list(items)


def read(items: Any, key: Any) -> Any:
    return items[key]


def iterate(items: Any) -> list[Any]:
    return list(iter(items))


def acquire(lock: Any) -> bool:
    return bool(lock.acquire(timeout=10))


def release(lock: Any) -> None:
    lock.release()


def acquire_and_hang(lock: Any, ready: Any) -> None:
    lock.acquire()
    ready.set()
    time.sleep(FOREVER)


def make_child_and_hang(tool: Any, ready: Any) -> None:
    child = tool.child("small")
    assert child.see(1) == 1
    ready.set()
    time.sleep(FOREVER)


def use_until_it_fails(items: Any, ready: Any) -> NoReturn:
    while True:
        assert items[:] == [1]
        ready.set()


def block(proxy: Any, method: str, ready: Any) -> None:
    ready.set()
    getattr(proxy, method)()


def initialize(environment: Any, value: Any) -> None:
    environment["value"] = value


def fail_to_initialize(error: BaseException | int) -> None:
    if isinstance(error, int):
        os._exit(error)
    raise error


def use_manager(daemon: bool = False) -> tuple[int, int]:
    """Start a manager, and use it; return where it ran and where it was used."""
    import fiber

    with fiber.Manager() as manager:
        pid = manager._process.pid
        items = manager.list([1])
        items.append(2)
        assert list(items) == [1, 2]
    return pid, os.getpid()
