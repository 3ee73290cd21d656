"""A Ctrl-C while a process waits for an object: KeyboardInterrupt, and nothing is lost or held."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from tests.objects import actors

import fiber

DEADLINE = 20.0

CASES = [
    ("Queue", "get"),
    ("Queue of 3", "get"),
    ("JoinableQueue", "get(timeout)"),
    ("SimpleQueue", "get"),
    ("Queue of 3", "put"),
    ("JoinableQueue", "join"),
    ("Lock", "acquire"),
    ("RLock", "acquire(timeout)"),
    ("Semaphore", "acquire"),
    ("Condition", "wait"),
    ("Condition of Lock", "wait(timeout)"),
    ("Event", "wait"),
    ("Barrier", "wait"),
]


class Waiter:
    """A child that waits for an object, which lives here or there."""

    def __init__(self, start: Callable[..., Any], kind: str, how: str, theirs: bool) -> None:
        self.ready, self.told, self.stay = fiber.Event(), fiber.Queue(), fiber.Event()
        rest = (how, self.ready, self.told, self.stay)
        if theirs:
            out = fiber.Queue()
            self.process = start(actors.serve_and_wait, kind, how, out, *rest[1:])
            self.obj = out.get(timeout=DEADLINE)
        else:
            self.obj = actors.KINDS[kind]()
        prepare(self.obj, kind, how)
        if theirs:
            self.stay.set()
        else:
            self.process = start(actors.wait_and_tell, self.obj, *rest)
        assert self.ready.wait(DEADLINE)
        self._ps = psutil.Process(self.process.pid)

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + DEADLINE
        while self._ps.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def said(self) -> tuple[str, Any]:
        said: tuple[str, Any] = self.told.get(timeout=DEADLINE)
        return said

    def leave(self) -> None:
        self.stay.set()
        self.process.join(DEADLINE)
        assert self.process.exitcode == 0


def prepare(obj: Any, kind: str, how: str) -> None:
    """Put it into a state in which others wait."""
    if how == "put":
        for number in range(3):
            obj.put(number)
    elif how == "join":
        obj.put("undone")
    elif how.startswith("acquire"):
        obj.acquire()


def fulfil(obj: Any, kind: str, how: str) -> None:
    """Do what the waiter waits for."""
    if how.startswith("get"):
        obj.put("item")
    elif how == "put":
        assert obj.get(timeout=DEADLINE) == 0
    elif how == "join":
        obj.task_done()
    elif how.startswith("acquire"):
        obj.release()
    elif kind == "Event":
        obj.set()
    elif kind == "Barrier":
        obj.wait()
    else:
        with obj:
            obj.notify()


def nobody_waits(obj: Any, kind: str, how: str) -> None:
    """Fail unless the object is as if nobody had waited for it."""
    if how.startswith("get"):
        obj.put("next")
        assert obj.get() == "next"
        assert obj.empty()
    elif how == "put":
        assert [obj.get(timeout=DEADLINE) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(queue.Empty):
            obj.get(timeout=0.05)
    elif how == "join":
        obj.task_done()
        obj.join()
    elif how.startswith("acquire"):
        obj.release()
        assert obj.acquire(timeout=DEADLINE)
        assert "Semaphore" not in kind or obj.get_value() == 0
        obj.release()
    elif kind == "Event":
        assert not obj.is_set()
    elif kind == "Barrier":  # as with threading: the others would wait for it for ever
        assert obj.broken
    else:
        with obj:
            obj.notify()
            assert obj.wait(0) is False


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
@pytest.mark.parametrize(("kind", "how"), CASES)
def test_an_interrupted_wait_leaves_no_trace(
    kind: str, how: str, theirs: bool, start: Callable[..., Any]
) -> None:
    waiter = Waiter(start, kind, how, theirs)
    time.sleep(0.02)  # most likely it waits now; if not yet, it is interrupted as well
    waiter.interrupt()
    assert waiter.said() == ("interrupted", None)
    nobody_waits(waiter.obj, kind, how)
    waiter.leave()


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize(
    ("kind", "theirs"), [("Queue", False), ("Queue", True), ("Queue of 3", False)]
)
def test_an_item_that_comes_with_the_interrupt_is_not_lost(
    kind: str, theirs: bool, size: int, start: Callable[..., Any]
) -> None:
    for _ in range(5):
        waiter = Waiter(start, kind, "get", theirs)
        time.sleep(0.02)
        waiter.freeze()
        waiter.obj.put(bytes(size))
        waiter.interrupt()
        waiter.thaw()
        said, item = waiter.said()
        if said == "interrupted":
            item = waiter.obj.get(timeout=5)
        assert item == bytes(size)
        assert waiter.obj.empty()
        waiter.leave()


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "theirs"])
@pytest.mark.parametrize("kind", ["Lock", "Semaphore", "Condition"])
def test_a_lock_that_comes_with_the_interrupt_is_not_left_held(
    kind: str, theirs: bool, start: Callable[..., Any], aside: Callable[..., Any]
) -> None:
    for _ in range(5):
        how = "wait" if kind == "Condition" else "acquire"
        waiter = Waiter(start, kind, how, theirs)
        time.sleep(0.02)
        waiter.freeze()
        if theirs:  # the answer will come when it thaws
            fulfilling = aside(fulfil, waiter.obj, kind, how)
            time.sleep(0.05)
        else:
            fulfil(waiter.obj, kind, how)
        waiter.interrupt()
        waiter.thaw()
        if theirs:
            fulfilling.result()
        said, _ = waiter.said()
        if said == "came" and how == "acquire":
            assert not waiter.obj.acquire(timeout=0.05)
        else:
            assert waiter.obj.acquire(timeout=DEADLINE)
            waiter.obj.release()
        waiter.leave()


def test_full_means_that_it_was_not_put(start: Callable[..., Any]) -> None:
    """Also when the process that the queue lives in was stopped meanwhile."""
    waiter = Waiter(start, "Queue of 3", "put", True)
    assert waiter.obj.get(timeout=DEADLINE) == 0
    assert waiter.said() == ("came", None)
    assert waiter.obj.get(timeout=DEADLINE) == 1
    waiter.freeze()
    began = time.monotonic()
    with pytest.raises(queue.Full):
        waiter.obj.put("ours", timeout=0.05)
    assert time.monotonic() - began < 5
    waiter.thaw()
    assert [waiter.obj.get(timeout=DEADLINE) for _ in range(2)] == [2, "theirs"]
    with pytest.raises(queue.Empty):
        waiter.obj.get(timeout=0.1)
    waiter.leave()


def test_full_means_that_it_never_will_be_put(
    start: Callable[..., Any], aside: Callable[..., Any]
) -> None:
    """Also when it waited for room in a home that was stopped, and that then finds room first."""
    waiter = Waiter(start, "Queue of 3", "put", True)
    assert waiter.obj.get(timeout=DEADLINE) == 0
    assert waiter.said() == ("came", None)
    late = aside(waiter.obj.put, "ours", True, 0.3)
    time.sleep(0.1)
    waiter.freeze()
    first = aside(waiter.obj.get, True, DEADLINE)
    with pytest.raises(queue.Full):
        late.result(within=5)
    waiter.thaw()
    assert first.result() == 1
    assert [waiter.obj.get(timeout=DEADLINE) for _ in range(2)] == [2, "theirs"]
    with pytest.raises(queue.Empty):
        waiter.obj.get(timeout=0.1)
    waiter.leave()


BLOCKED = """
import fiber, signal, sys, time

def child(call, ready):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback
    ready.release()
    call()

def main():
    full = fiber.Queue(1)
    full.put(1)
    lock = fiber.Lock()
    lock.acquire()
    ready = fiber.Semaphore(0)
    calls = [fiber.Queue().get, lambda: full.put(2), lock.acquire,
             fiber.Event().wait, fiber.Barrier(9).wait]
    for call in calls:
        fiber.Process(target=child, args=(call, ready)).start()
    for _ in calls:
        assert ready.acquire(timeout=20)
    print("ready", flush=True)
    {wait}

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    "wait",
    ["fiber.Queue().get()", "lock.acquire()", "fiber.Event().wait()", "fiber.Barrier(2).wait(50)"],
)
def test_ctrl_c_ends_a_program_whose_processes_all_wait(
    wait: str, start_script: Callable[..., Any]
) -> None:
    process = start_script(BLOCKED.format(wait=wait))
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert out == ""
    assert err.count("KeyboardInterrupt") == 1
    assert process.returncode == -signal.SIGINT
