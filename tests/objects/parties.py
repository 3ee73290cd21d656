"""What the processes of `test_killed_parties` do, over and over, until one of them is killed."""

from __future__ import annotations

import os
from typing import Any

from tests.objects.actors import DEADLINE

import fiber


def put_on(q: Any, me: int, begun: Any) -> None:
    """Put (me, 0), (me, 1) and so on without end."""
    number = 0
    while True:
        q.put((me, number))
        number += 1
        if number == 10:
            begun.set()


def take_on(q: Any, taken: Any, begun: Any) -> None:
    """Take items and write down in shared memory which they were: a bit for each."""
    begun.set()
    while (number := q.get()) is not None:
        taken[number] = 1


def hold_on(lock: Any, inside: Any, rounds: Any, faults: Any, begun: Any) -> None:
    """Hold the lock again and again; count a fault if another that lives is inside as well."""
    me = os.getpid()
    while True:
        with lock:
            if inside.value and is_alive(inside.value):
                faults.value += 1
            inside.value = me
            rounds.value += 1
            inside.value = 0
        begun.set()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def meet_on(barrier: Any, begun: Any, back: Any) -> None:
    """Meet again and again; tell what came instead."""
    try:
        while True:
            barrier.wait()
            begun.set()
    except Exception as error:
        back.put(error)


def make_and_stay(kind: str, out: Any, stay: Any) -> None:
    """Be the home of an object, of which nobody gets what they wait for."""
    obj: Any = {
        "get": fiber.Queue,
        "get of SimpleQueue": fiber.SimpleQueue,
        "put": lambda: fiber.Queue(1),
        "join": fiber.JoinableQueue,
        "acquire": fiber.Lock,
        "wait of Event": fiber.Event,
        "wait of Barrier": lambda: fiber.Barrier(2),
        "wait of Condition": fiber.Condition,
    }[kind]()
    if kind in ("put", "join"):
        obj.put("full")
    if kind == "acquire":
        obj.acquire()
    out.put(obj)
    stay.wait(DEADLINE)


def wait_on(obj: Any, how: str, ready: Any, back: Any) -> None:
    """Wait for an object, and tell what came instead."""
    try:
        if how == "put":
            ready.set()
            obj.put("more")
        elif how == "wait of Condition":
            with obj:
                ready.set()
                obj.wait()
        else:
            ready.set()
            getattr(obj, how.split()[0])()
        back.put("came")
    except Exception as error:
        back.put(error)


def take_one_and_stay(q: Any, taken: Any) -> None:
    q.get()
    taken.set()
    while True:
        q.get()
