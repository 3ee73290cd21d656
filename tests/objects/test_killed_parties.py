"""Whoever is killed, at whatever moment: all others have a result or a clear error within 5 s.

Managers that are killed are in tests/managers/test_deaths.py, ends of pipes in tests/connection.
"""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import time
from collections.abc import Callable
from threading import BrokenBarrierError
from typing import Any

import pytest
from tests.objects import parties
from tests.waiting import until

import fiber

DEADLINE = 20.0
WITHIN = 5.0  # seconds from the death
ROUNDS = 6

Start = Callable[..., fiber.Process]
Aside = Callable[..., Any]


def kill(process: fiber.Process) -> None:
    """Kill a process as the system might: `Process.kill` is no surprise to anybody."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def kill_at_random() -> Callable[[fiber.Process], None]:
    """Kill a process at a moment that nobody has chosen."""
    moments = random.Random()

    def wait_and_kill(process: fiber.Process) -> None:
        time.sleep(moments.uniform(0, 0.1))
        kill(process)

    return wait_and_kill


@pytest.mark.parametrize("kind", [fiber.Queue, fiber.SimpleQueue, lambda: fiber.Queue(5)])
def test_a_producer(
    kind: Callable[[], Any], start: Start, aside: Aside, kill_at_random: Callable[..., None]
) -> None:
    """What it has put comes whole and in order; whoever waits for more is told of its death."""
    for _ in range(ROUNDS):
        q, begun = kind(), fiber.Event()
        victim = start(parties.put_on, q, 0, begun)
        taken: list[Any] = []

        def take(q: Any = q, taken: list[Any] = taken) -> None:
            while True:
                taken.append(q.get())

        taking = aside(take)
        assert begun.wait(DEADLINE)
        kill_at_random(victim)
        with pytest.raises(fiber.PeerDied, match=victim.name):
            taking.result(WITHIN)
        assert taken == [(0, number) for number in range(len(taken))]


def test_a_producer_that_others_outlive(start: Start, kill_at_random: Callable[..., None]) -> None:
    """They go on, and lose nothing."""
    q, begun = fiber.Queue(), [fiber.Event(), fiber.Event()]
    victim, other = (start(parties.put_on, q, me, begun[me]) for me in range(2))
    for each in begun:
        assert each.wait(DEADLINE)
    kill_at_random(victim)
    last = [-1, -1]
    deadline = time.monotonic() + WITHIN
    while last[1] < 1_000 or victim.is_alive():
        me, number = q.get(timeout=max(0.0, deadline - time.monotonic()))
        assert number == last[me] + 1
        last[me] = number
    other.kill()


@pytest.mark.parametrize("bound", [0, 4])
def test_a_consumer(
    bound: int, start: Start, aside: Aside, kill_at_random: Callable[..., None]
) -> None:
    """Only what it took is gone, and at most the one that it was about to write down.

    What it had been granted ahead goes back, at the end perhaps when nobody is left to take it.
    """
    count = 400 if bound else 20_000
    for _ in range(ROUNDS):
        q = fiber.Queue(bound)
        lists = [fiber.RawArray("b", count) for _ in range(3)]
        begun = [fiber.Event() for _ in lists]
        victim, *others = (
            start(parties.take_on, q, taken, event)
            for taken, event in zip(lists, begun, strict=True)
        )
        for each in begun:
            assert each.wait(DEADLINE)

        def put(q: Any = q) -> None:
            for number in range(count):
                q.put(number)
            for _ in range(3):  # the victim may live to take its own
                q.put(None)

        putting = aside(put)
        kill_at_random(victim)
        putting.result(WITHIN)
        for other in others:
            other.join(WITHIN)
        assert [other.exitcode for other in others] == [0, 0]
        times = [sum(taken) for taken in zip(*map(bytes, lists), strict=True)]
        left = []
        while not q.empty():
            left.append(q.get_nowait())
        assert left.count(None) <= 1
        for number in filter(lambda each: each is not None, left):
            times[number] += 1
        assert max(times) == 1
        assert times.count(0) <= 1


def test_a_consumer_that_owed_a_mark(start: Start, aside: Aside) -> None:
    q, taken = fiber.JoinableQueue(), fiber.Event()
    victim = start(parties.take_one_and_stay, q, taken)
    q.put("item")
    joining = aside(q.join)
    assert taken.wait(DEADLINE)
    assert joining.runs
    kill(victim)
    with pytest.raises(fiber.PeerDied, match=rf"{victim.name}.*died with 1 item that"):
        joining.result(WITHIN)


def test_a_producer_that_waits_for_room(start: Start) -> None:
    """Its item is not put later, and those who wait behind it go on."""
    q, begun = fiber.Queue(5), fiber.Event()
    victim = start(parties.put_on, q, 0, begun)
    until(q.full)
    time.sleep(0.02)  # it may be waiting by now
    kill(victim)
    victim.join(WITHIN)
    assert [q.get(timeout=WITHIN) for _ in range(5)] == [(0, number) for number in range(5)]
    with pytest.raises(queue.Empty):
        q.get_nowait()


@pytest.mark.parametrize("kind", ["Lock", "RLock", "BoundedSemaphore"])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_the_holder_of_a_lock(
    kind: str, others: int, start: Start, kill_at_random: Callable[..., None]
) -> None:
    """It is free again; at no time do two that live hold it."""
    for _ in range(ROUNDS):
        lock = getattr(fiber, kind)(*[1] * (kind == "BoundedSemaphore"))
        inside, faults = fiber.RawValue("q"), fiber.RawValue("q")
        rounds = [fiber.RawValue("q") for _ in range(1 + others)]
        begun = [fiber.Event() for _ in rounds]
        victim, *rest = (
            start(parties.hold_on, lock, inside, count, faults, event)
            for count, event in zip(rounds, begun, strict=True)
        )
        for each in begun:
            assert each.wait(DEADLINE)
        kill_at_random(victim)
        died = time.monotonic()
        before = [count.value for count in rounds]
        for count, was in zip(rounds[1:], before[1:], strict=True):
            until(lambda count=count, was=was: count.value > was + 10)
        assert lock.acquire(timeout=WITHIN)
        assert time.monotonic() - died < WITHIN
        assert faults.value == 0
        lock.release()
        for process in rest:
            process.kill()


def test_a_holder_that_ends_with_a_lock_that_it_released(start: Start) -> None:
    """The lock was lent to it, and is free."""

    def use(lock: Any) -> None:
        for _ in range(5):
            with lock:
                pass

    lock = fiber.Lock()
    for _ in range(3):
        start(use, lock).join(WITHIN)
        assert lock.acquire(timeout=WITHIN)
        lock.release()


def test_a_member_of_a_barrier(start: Start, kill_at_random: Callable[..., None]) -> None:
    for _ in range(ROUNDS):
        barrier, back = fiber.Barrier(3), fiber.Queue()
        begun = [fiber.Event() for _ in range(3)]
        victim, *_ = (start(parties.meet_on, barrier, event, back) for event in begun)
        for each in begun:
            assert each.wait(DEADLINE)
        kill_at_random(victim)
        for _ in range(2):
            error = back.get(timeout=WITHIN)
            assert isinstance(error, BrokenBarrierError)
            assert victim.name in str(error)


@pytest.mark.parametrize(
    "how",
    [
        "get",
        "get of SimpleQueue",
        "put",
        "join",
        "acquire",
        "wait of Event",
        "wait of Barrier",
        "wait of Condition",
    ],
)
def test_the_home_of_an_object(how: str, start: Start) -> None:
    """All who wait for the object are told, and so is who asks later."""
    out, back, stay = fiber.Queue(), fiber.Queue(), fiber.Event()
    home = start(parties.make_and_stay, how, out, stay)
    obj = out.get(timeout=DEADLINE)
    ready = [fiber.Event(), fiber.Event()]
    for each in ready[: 1 if how == "wait of Barrier" else 2]:
        start(parties.wait_on, obj, how, each, back)
        assert each.wait(DEADLINE)
    time.sleep(0.02)  # they may be waiting by now
    kill(home)
    for _ in ready[: 1 if how == "wait of Barrier" else 2]:
        error = back.get(timeout=WITHIN)
        assert isinstance(error, fiber.PeerDied), error
        assert str(error) == f"process {home.pid}, in which this object lived, has ended"
    start(parties.wait_on, obj, how, ready[0], back)
    assert isinstance(back.get(timeout=WITHIN), fiber.PeerDied)
