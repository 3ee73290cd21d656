"""Barriers: as threading and multiprocessing have them, and among processes."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.objects import actors
from tests.waiting import until

import fiber
import fiber.synchronize

DEADLINE = 20.0
MOMENT = 0.15  # seconds, of a wait that shall run out
Broken = threading.BrokenBarrierError

multiprocessing.Barrier(1)  # its shared memory stays for good: let it be there before any test


@pytest.fixture(params=[fiber, multiprocessing], ids=["fiber", "multiprocessing"])
def mp(request: pytest.FixtureRequest) -> Any:
    return request.param


def passes(barrier: Any, aside: Callable[..., Any], *args: Any) -> list[int]:
    waiting = [aside(barrier.wait, *args) for _ in range(barrier.parties)]
    return sorted(each.result() for each in waiting)


def test_each_has_a_place(mp: Any, aside: Callable[..., Any]) -> None:
    barrier = mp.Barrier(3)
    for args in ((), (None,), (DEADLINE,)):  # and it can be used again
        assert passes(barrier, aside, *args) == [0, 1, 2]
    alone = mp.Barrier(1)
    assert [alone.wait(), alone.wait(0), alone.wait(timeout=5)] == [0, 0, 0]


def test_what_it_tells(mp: Any, aside: Callable[..., Any]) -> None:
    barrier = mp.Barrier(3)
    assert (barrier.parties, barrier.n_waiting, barrier.broken) == (3, 0, False)
    waiting = [aside(barrier.wait) for _ in range(2)]
    until(lambda: barrier.n_waiting == 2)
    assert all(each.runs for each in waiting)
    assert sorted([barrier.wait(), *(each.result() for each in waiting)]) == [0, 1, 2]
    until(lambda: barrier.n_waiting == 0)
    assert not barrier.broken


def test_the_action_comes_first(mp: Any, aside: Callable[..., Any]) -> None:
    acted: list[int] = []
    seen: list[int] = []

    def action() -> None:
        time.sleep(0.02)
        acted.append(len(acted))

    barrier = mp.Barrier(3, action=action)

    def wait() -> None:
        for count in range(1, 6):
            barrier.wait()
            seen.append(len(acted) - count)  # the next action waits for us

    for each in [aside(wait) for _ in range(3)]:
        each.result()
    assert (acted, seen) == ([0, 1, 2, 3, 4], [0] * 15)


def test_an_action_that_fails_breaks_it(mp: Any, aside: Callable[..., Any]) -> None:
    barrier = mp.Barrier(3, lambda: 1 // 0)
    waiting = [aside(barrier.wait) for _ in range(3)]
    errors = []
    for each in waiting:
        with pytest.raises((ZeroDivisionError, Broken)) as caught:
            each.result()
        errors.append(caught.type)
    assert sorted(errors, key=str) == sorted([ZeroDivisionError, Broken, Broken], key=str)
    assert barrier.broken
    with pytest.raises(Broken):
        barrier.wait()
    barrier.reset()
    assert not barrier.broken


@pytest.mark.parametrize("how", ["abort", "reset"])
def test_abort_and_reset(mp: Any, how: str, aside: Callable[..., Any]) -> None:
    barrier = mp.Barrier(3)
    getattr(barrier, how)()
    barrier.reset()
    waiting = [aside(barrier.wait) for _ in range(2)]
    until(lambda: barrier.n_waiting == 2)
    getattr(barrier, how)()
    for each in waiting:
        with pytest.raises(Broken):
            each.result()
    until(lambda: barrier.n_waiting == 0)
    assert barrier.broken == (how == "abort")
    if barrier.broken:
        began = time.monotonic()
        with pytest.raises(Broken):
            barrier.wait(DEADLINE)
        assert time.monotonic() - began < 5
        barrier.reset()
    assert passes(barrier, aside) == [0, 1, 2]


def test_time_out(mp: Any, aside: Callable[..., Any]) -> None:
    for barrier, args in (
        (mp.Barrier(2), (MOMENT,)),
        (mp.Barrier(2, timeout=MOMENT), ()),
        (mp.Barrier(2, None, MOMENT), ()),
        (mp.Barrier(2, timeout=DEADLINE), (MOMENT,)),
    ):
        began = time.monotonic()
        with pytest.raises(Broken):
            barrier.wait(*args)
        assert MOMENT * 0.95 <= time.monotonic() - began < 5
        assert barrier.broken
        barrier.reset()
        assert passes(barrier, aside, DEADLINE) == [0, 1]


def test_who_is_late_breaks_it_for_all(mp: Any, aside: Callable[..., Any]) -> None:
    barrier = mp.Barrier(3)
    patient = aside(barrier.wait, DEADLINE)
    hasty = aside(barrier.wait, MOMENT)
    for each in (patient, hasty):
        with pytest.raises(Broken):
            each.result(5)


@pytest.mark.parametrize("action", [None, lambda: time.sleep(0.03)])
def test_more_who_wait_than_parties(mp: Any, action: Any, aside: Callable[..., Any]) -> None:
    barrier = mp.Barrier(2, action)
    waiting = [aside(barrier.wait, DEADLINE) for _ in range(10)]
    assert sorted(each.result() for each in waiting) == [0] * 5 + [1] * 5


def test_number_of_parties() -> None:
    for parties in (0, -1):
        with pytest.raises(ValueError, match="1 party or more"):
            fiber.Barrier(parties)


def test_the_error_is_threading_s() -> None:
    assert fiber.synchronize.BrokenBarrierError is Broken


# Among processes -------------------------------------------------------------------------------


def test_processes_and_threads_pass_together(
    start: Callable[..., Any], aside: Callable[..., Any]
) -> None:
    barrier, back = fiber.Barrier(5), fiber.Queue()
    for _ in range(3):
        start(actors.pass_barrier, barrier, back, 20)
    threads = [aside(actors.pass_barrier, barrier, back, 20) for _ in range(2)]
    for thread in threads:
        thread.result()
    places: dict[int, list[int]] = {}
    for _ in range(100):
        number, place = back.get(timeout=DEADLINE)
        places.setdefault(number, []).append(place)
    assert [sorted(places[number]) for number in range(20)] == [[0, 1, 2, 3, 4]] * 20


def test_one_process_acts_before_the_others_go_on(start: Callable[..., Any]) -> None:
    acted, back = fiber.Queue(), fiber.Queue()
    barrier = fiber.Barrier(3, lambda: acted.put(fiber.current_process().pid))

    def wait() -> None:
        for number in range(1, 11):
            barrier.wait(DEADLINE)
            back.put(acted.qsize() >= number)

    processes = [start(wait) for _ in range(3)]
    assert [back.get(timeout=DEADLINE) for _ in range(30)] == [True] * 30
    pids = [acted.get_nowait() for _ in range(10)]
    assert acted.empty()
    assert set(pids) <= {process.pid for process in processes}


def test_an_action_that_fails_in_a_process(start: Callable[..., Any]) -> None:
    def fail() -> None:
        raise ArithmeticError("of the action")

    barrier, back = fiber.Barrier(3, fail), fiber.Queue()

    def wait() -> None:
        try:
            barrier.wait(DEADLINE)
        except Exception as error:
            back.put((type(error).__name__, str(error)))

    for _ in range(3):
        start(wait)
    said = sorted(back.get(timeout=DEADLINE) for _ in range(3))
    assert said[0] == ("ArithmeticError", "of the action")
    assert said[1] == said[2] == ("BrokenBarrierError", "its action failed")
    assert barrier.broken


def test_broken_from_another_process(start: Callable[..., Any]) -> None:
    for how, why in (("abort", "it was aborted"), ("reset", "it was reset")):
        barrier, back = fiber.Barrier(3), fiber.Queue()
        for _ in range(2):
            start(actors.pass_barrier, barrier, back, 1)
        until(lambda barrier=barrier: barrier.n_waiting == 2)
        start(actors.call, barrier, how).join(DEADLINE)
        assert [back.get(timeout=DEADLINE) for _ in range(2)] == [(0, why)] * 2
        assert barrier.broken == (how == "abort")


def test_time_outs_in_other_processes(start: Callable[..., Any]) -> None:
    barrier, back = fiber.Barrier(3), fiber.Queue()
    start(actors.pass_barrier, barrier, back, 1)
    start(actors.pass_barrier, barrier, back, 1, MOMENT)
    assert [back.get(timeout=DEADLINE) for _ in range(2)] == [(0, "a wait ran out of time")] * 2
    barrier = fiber.Barrier(2, timeout=MOMENT)  # which goes along
    start(actors.pass_barrier, barrier, back, 1)
    assert back.get(timeout=DEADLINE) == (0, "a wait ran out of time")
