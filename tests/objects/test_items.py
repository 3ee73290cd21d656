"""What can be put into a queue, how it arrives, and what cannot be put."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.objects import actors

import fiber

DEADLINE = 20.0
Pair = collections.namedtuple("Pair", "one other")

MAKES: dict[str, Callable[..., Any]] = {
    "Queue": fiber.Queue,
    "Queue of 2": lambda: fiber.Queue(2),
    "SimpleQueue": fiber.SimpleQueue,
}


@pytest.fixture(params=MAKES)
def q(request: pytest.FixtureRequest) -> Any:
    return MAKES[request.param]()


PLAIN: list[Any] = [
    *(0, -1, 2**63, -(2**200), 10**6000, 1.5, float("inf"), 3j, True, None),
    *("", "text", "ü€😀", "\ud800", "x" * 20_000, b"", b"bytes", b"x" * 20_000),
    *((), (1,), (1, 2.5, None), ("a", (1, [2])), [], [1, [2]], {}, {"a": {1, 2}}),
    *(bytearray(b"x" * 10), bytearray(b"x" * 200_000), range(3), slice(1, 2), ..., int, len),
    *(frozenset({1}), collections.OrderedDict(a=1), collections.Counter("aab")),
]


def test_values_arrive_as_they_were(q: Any, start: Callable[..., Any]) -> None:
    back = fiber.Queue()
    start(actors.send_back, q, back, len(PLAIN))
    for value in PLAIN:
        q.put(value)
        found = back.get(timeout=DEADLINE)
        assert type(found) is type(value)
        assert found == value
    q.put(float("nan"))  # and in this process
    assert str(q.get()) == "nan"


def test_bytes_of_ten_megabytes(q: Any, start: Callable[..., Any]) -> None:
    back = fiber.Queue()
    start(actors.send_back, q, back, 2)
    for value in (bytes(range(250)) * 40_000, bytearray(range(250)) * 40_000):
        q.put(value)
        found = back.get(timeout=DEADLINE)
        assert type(found) is type(value)
        assert found == value


def test_what_is_changed_after_put_is_not_changed_in_the_queue(
    q: Any, start: Callable[..., Any]
) -> None:
    np = pytest.importorskip("numpy")
    array, data, some = np.zeros(200_000), bytearray(200_000), [0]
    for value in (array, data, some):
        q.put(value)
        value[:] = [1] * len(value)
        found = q.get()
        assert not any(found)
        found[0] = 5  # and the other way round
        assert value[0] == 1
    back = fiber.Queue()

    def put_and_change() -> None:
        value = np.zeros(2_000_000)
        for _ in range(5):
            back.put(value)
            value[:] += 1

    start(put_and_change)
    for number in range(5):
        found = back.get(timeout=DEADLINE)
        assert (found == number).all()


def test_arrays(q: Any, start: Callable[..., Any]) -> None:
    """They can be written to, as with multiprocessing, small and large, whatever their order."""
    np = pytest.importorskip("numpy")
    back = fiber.Queue()
    arrays = [
        *(np.arange(5), np.arange(200_000.0), np.arange(90_000.0).reshape(300, 300).T),
        *(np.arange(100_000)[::3], np.array([]), np.array(3.0), np.array(["a", None, {}])),
        *(np.zeros((2, 0, 3)), np.asfortranarray(np.ones((400, 100)))),
        *(np.zeros(3000, [("a", int), ("b", "S3")]), np.zeros(100, "M8[s]")),
    ]
    start(actors.write_into, q, back, len(arrays))
    for array in arrays:
        q.put(array)
        found = back.get(timeout=DEADLINE)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert np.array_equal(found, array)
        assert found.flags.f_contiguous or not array.flags.f_contiguous
        here = fiber.Queue()
        here.put(array)
        found = here.get()
        assert np.array_equal(found, array)
        found[...] = found  # here as well


def test_lambdas_closures_and_local_classes(q: Any, start: Callable[..., Any]) -> None:
    step = 5

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    back = fiber.Queue()
    start(actors.call_and_send_back, q, back, 3)
    for function, answer in ((lambda: 4, 4), (lambda: step + 1, 6), (lambda: Local(7).value, 7)):
        q.put(function)
        assert back.get(timeout=DEADLINE) == answer
    q.put(Local(3))
    assert q.get().value == 3
    q.put(Pair(1, 2))
    assert q.get() == Pair(1, 2)


IN_MAIN = """
import dataclasses, enum, fiber

@dataclasses.dataclass
class Point:
    x: int
    def moved(self, by=1):
        return Point(self.x + by)

class Colour(enum.Enum):
    RED = 1

class Odd(Exception):
    def __init__(self, what, *, why):
        super().__init__(what)
        self.why = why
    def __reduce__(self):
        return make_odd, (self.args[0], self.why)

def make_odd(what, why):
    return Odd(what, why=why)

def double(x):
    return 2 * x

def child(q, back):
    while (item := q.get()) is not None:
        back.put(("seen", type(item).__name__, item))
        if isinstance(item, Point):
            assert type(item) is Point, "another class of that name"
            back.put(item.moved())

def main():
    for q in (fiber.Queue(), fiber.Queue(2), fiber.SimpleQueue(), fiber.JoinableQueue()):
        back = fiber.Queue()
        process = fiber.Process(target=child, args=(q, back))
        process.start()
        q.put(Point(1))
        assert back.get(timeout=10) == ("seen", "Point", Point(1))
        assert back.get(timeout=10) == Point(2)
        q.put(Colour.RED)
        assert back.get(timeout=10)[2] is Colour.RED
        q.put(Point)
        assert back.get(timeout=10)[2] is Point
        q.put(double)
        assert back.get(timeout=10)[2] is double
        q.put(Odd("what", why="so"))
        assert back.get(timeout=10)[2].why == "so"
        @dataclasses.dataclass
        class Late:
            y: int
        q.put(Late(2))
        assert back.get(timeout=10)[2].y == 2
        q.put(lambda: double(4))
        assert back.get(timeout=10)[2]() == 8
        q.put(None)
        process.join()
        assert process.exitcode == 0
    print("all is well")

if __name__ == "__main__":
    main()
"""


def test_what_a_script_defines(run_script: Callable[..., Any]) -> None:
    done = run_script(IN_MAIN)
    assert (done.stdout, done.stderr, done.returncode) == ("all is well\n", "", 0)


# What goes wrong -------------------------------------------------------------------------------


class Refuses:
    def __reduce__(self) -> Any:
        raise ArithmeticError("not me")


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (threading.Lock, fiber.SerializationError, "lock"),
    (lambda: [1, [threading.Lock()]], fiber.SerializationError, "lock"),
    (lambda: (x for x in ()), fiber.SerializationError, "generator"),
    (Refuses, ArithmeticError, "not me"),  # the object's own
]


def test_what_cannot_be_pickled_raises_in_put(q: Any) -> None:
    q.put("before")
    for make, error, text in REFUSED:
        with pytest.raises(error, match=text):
            q.put(make())
    q.put("after")
    assert [q.get(), q.get()] == ["before", "after"]
    assert q.empty()


def test_it_takes_no_place_of_a_bounded_queue() -> None:
    q = fiber.JoinableQueue(1)
    for _ in range(3):
        with pytest.raises(fiber.SerializationError):
            q.put(threading.Lock(), timeout=DEADLINE)
    q.put("item", timeout=DEADLINE)
    assert q.get() == "item"
    q.task_done()
    q.join()


def test_what_cannot_be_unpickled_raises_in_get(q: Any, start: Callable[..., Any]) -> None:
    back = fiber.Queue()
    for _ in range(2):
        q.put(actors.Unloadable())
        with pytest.raises(ArithmeticError, match="not here"):
            q.get()
    start(actors.try_to_get, q, back, 3)
    for item in ("before", actors.Unloadable(), "after"):
        q.put(item)
    assert [back.get(timeout=DEADLINE) for _ in range(3)] == [
        "before",
        "ArithmeticError('not here')",
        "after",
    ]
    assert q.empty()


def test_a_pickle_that_uses_the_queue(q: Any) -> None:
    """Methods that pickle run before anything of the queue is in use."""
    q.put(actors.PutsFirst(q))
    assert q.get() == "first"
    assert q.get() == "made"


def test_slow_pickles_hold_nobody_up(start: Callable[..., Any], aside: Callable[..., Any]) -> None:
    q = fiber.Queue()
    began = threading.Event()
    enough = threading.Event()

    class Slow:
        def __reduce__(self) -> Any:
            began.set()
            assert enough.wait(DEADLINE)
            return str, ("slow",)

    putting = aside(q.put, Slow())
    assert began.wait(DEADLINE)
    started = time.monotonic()
    q.put("quick")
    assert q.get(timeout=DEADLINE) == "quick"
    assert time.monotonic() - started < 5
    enough.set()
    putting.result()
    assert q.get(timeout=DEADLINE) == "slow"
