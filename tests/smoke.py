"""A plain program that uses the main things of Fiber; other versions of Python run it.

It needs the standard library, cloudpickle and fiber, and prints "smoke ok" at its end.
"""

from __future__ import annotations

import sys
from typing import Any

import fiber


def square(x: int) -> int:
    return x * x


def fail(x: int) -> int:
    raise ValueError(f"no {x} today")


def leave(code: int) -> None:
    sys.exit(code)


def processes() -> None:
    process = fiber.Process(target=leave, args=(3,), name="leaver")
    process.start()
    process.join(60)
    assert process.exitcode == 3, process


def error_of(pool: Any, item: int) -> str:
    try:
        pool.map(fail, [item])
    except ValueError as error:
        return str(error)
    return "the task's exception did not arrive"


def pools() -> None:
    offset = 10
    with fiber.Pool(2) as pool:
        assert pool.map(square, range(100)) == [x * x for x in range(100)]
        assert list(pool.imap(lambda x: x + offset, range(100))) == list(range(10, 110))
        assert sorted(pool.imap_unordered(square, range(10))) == [x * x for x in range(10)]
        assert pool.apply(square, (7,)) == 49
        assert error_of(pool, 5) == "no 5 today"
        assert pool.map(square, [3]) == [9]


if __name__ == "__main__":
    processes()
    pools()
    print("smoke ok")
