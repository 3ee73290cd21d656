"""What the processes of these tests run.

In a module of its own, and a light one: each child imports it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import fiber

FOREVER = 3600


def nothing() -> None:
    pass


def write(path: Path, text: str) -> None:
    path.write_text(text)


def sleep(seconds: float = FOREVER) -> None:
    time.sleep(seconds)


def touch_and_sleep(path: Path) -> None:
    path.touch()
    time.sleep(FOREVER)


def ignore_sigterm(ready: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    touch_and_sleep(ready)


def leave(code: object) -> None:
    sys.exit(code)  # type: ignore[arg-type]


def leave_at_once(code: int) -> None:
    os._exit(code)


def fail(message: str) -> NoReturn:
    raise ValueError(message)


def die(signum: int) -> None:
    os.kill(os.getpid(), signum)


def report(path: Path, *what: str) -> None:
    """Write a line for each of `what`, an expression that is evaluated here."""
    names = {"fiber": fiber, "os": os, "sys": sys, "me": fiber.current_process()}
    path.write_text("".join(f"{eval(text, names)}\n" for text in what))


def square(number: int) -> int:
    return number * number


class Greeter(fiber.Process):
    """A subclass with a constructor and a `run` of its own."""

    def __init__(self, path: Path, whom: str) -> None:
        super().__init__(name=f"greeter of {whom}")
        self.path = path
        self.whom = whom

    def run(self) -> None:
        self.path.write_text(f"hello {self.whom} from {self.name}")


# Processes that start processes ----------------------------------------------------------------


def descend(path: Path, depth: int) -> None:
    """Write this process's ID and its parent's, and have a child do the same, `depth` times."""
    with path.open("a") as file:
        file.write(f"{os.getpid()} {fiber.parent_process().pid}\n")  # type: ignore[union-attr]
    if depth:
        child = fiber.Process(target=descend, args=(path, depth - 1))
        child.start()
        child.join()
        sys.exit(child.exitcode)


def pool_within(path: Path, numbers: list[int]) -> None:
    with fiber.Pool(2) as pool:
        path.write_text(repr(pool.map(square, numbers)))


def square_in_a_process(path_and_number: tuple[Path, int]) -> str:
    path, number = path_and_number
    child = fiber.Process(target=report, args=(path, f"{number} ** 2"))
    child.start()
    child.join()
    return path.read_text()


def square_in_a_pool(number: int) -> list[int]:
    with fiber.Pool(1) as pool:
        return pool.map(square, [number, number + 1])


def start_and_wait(path: Path) -> None:
    """Start a child that sleeps, write its ID, and wait for it."""
    child = fiber.Process(target=sleep)
    child.start()
    path.with_suffix(".new").write_text(str(child.pid))
    path.with_suffix(".new").rename(path)
    child.join()


def count_children(path: Path) -> None:
    before = fiber.active_children()
    child = fiber.Process(target=sleep)
    child.start()
    during = fiber.active_children()
    child.kill()
    child.join()
    path.write_text(repr((len(before), during == [child], len(fiber.active_children()))))


def daemon_with_child(path: Path) -> None:
    child = fiber.Process(target=write, args=(path, "a daemon's child"))
    child.start()
    child.join()


class Counter:
    """Counts; its bound methods are targets too."""

    def __init__(self, start: int) -> None:
        self.value = start

    def write(self, path: Path, step: int = 1) -> None:
        path.write_text(str(self.value + step))

    @classmethod
    def name(cls, path: Path) -> None:
        path.write_text(cls.__name__)

    class Inner:
        @staticmethod
        def write(path: Path) -> None:
            path.write_text("inner")


class Unloadable:
    """Can be pickled, cannot be unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return fail, ("not here",)
