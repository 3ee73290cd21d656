"""Objects on their way: by name where the peer finds them, else by value; buffers beside them.

What is said of `__main__` is shown with two programs: one packs into a file, the other unpacks.
"""

from __future__ import annotations

import array
import functools
import pickle
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiber.errors import SerializationError
from fiber.wire.pickling import PLAIN, dumps, kinds_of, loads

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def back(obj: Any) -> Any:
    """Send `obj` on its way and return what arrives."""
    packed = dumps(obj)
    return loads(packed.data, packed.buffers)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


@given(values)
def test_values_arrive_equal(value: object) -> None:
    assert back(value) == value


def test_a_lambda_travels() -> None:
    assert back(lambda x: x + 1)(1) == 2


def test_a_closure_travels_with_what_it_closes_over() -> None:
    words = ["a", "b"]

    def count(more: int = 3, *, less: int = 0) -> int:
        """Count."""
        return len(words) + more - less

    count.label = "kept"  # type: ignore[attr-defined]
    there = back(count)
    assert there() == 5
    assert there(less=5) == 0
    assert there.__doc__ == "Count."
    assert there.label == "kept"
    words.append("not seen over there")
    assert there() == 5


def test_a_recursive_closure_travels() -> None:
    def factorial(n: int) -> int:
        return 1 if n < 2 else n * factorial(n - 1)

    assert back(factorial)(10) == 3_628_800


def test_closures_that_call_each_other_travel() -> None:
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n != 0 and even(n - 1)

    assert back(even)(10)
    assert not back(odd)(10)


def test_a_class_within_a_function_travels() -> None:
    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def doubled(self) -> Point:
            return type(self)(2 * self.x)

    assert back(Point(4)).doubled().x == 8


def test_partials_and_methods_travel() -> None:
    assert back(functools.partial(lambda a, b: a - b, b=1))(3) == 2
    assert back("abc".upper)() == "ABC"
    assert back(functools.partial(pow, 2))(5) == 32


def test_the_same_object_stays_the_same() -> None:
    shared: list[Any] = []
    shared.append(shared)
    first, second = back((shared, shared))
    assert first is second
    assert first[0] is first


# Buffers ----------------------------------------------------------------------------------------


def test_large_arrays_travel_beside_the_pickle() -> None:
    numpy = pytest.importorskip("numpy")
    sent = numpy.arange(100_000, dtype="float64")
    packed = dumps({"weights": sent, "also": sent[::2]})
    assert len(packed.data) < 2_000 + sent.nbytes // 2
    assert sent.nbytes in [len(buffer) for buffer in packed.buffers]
    arrived = loads(packed.data, [bytearray(buffer) for buffer in packed.buffers])
    assert (arrived["weights"] == sent).all()
    assert (arrived["also"] == sent[::2]).all()


def test_arrays_are_not_copied_and_can_be_written_to() -> None:
    numpy = pytest.importorskip("numpy")
    sent = numpy.zeros(1_000)
    [buffer] = dumps(sent).buffers
    sent[0] = 7
    assert bytes(buffer) == sent.tobytes()
    memory = bytearray(buffer)
    arrived = loads(dumps(sent).data, [memory])
    arrived[1] = 8
    assert memory == arrived.tobytes()


def test_a_column_major_array_travels() -> None:
    numpy = pytest.importorskip("numpy")
    sent = numpy.asfortranarray(numpy.arange(1200).reshape(30, 40))
    packed = dumps(sent)
    assert packed.buffers
    arrived = loads(packed.data, [bytearray(buffer) for buffer in packed.buffers])
    assert (arrived == sent).all()


def test_arrays_within_a_closure_travel_beside_it() -> None:
    numpy = pytest.importorskip("numpy")
    weights = numpy.ones(50_000)
    packed = dumps(lambda: weights.sum() + 0)
    assert sum(map(len, packed.buffers)) == weights.nbytes
    assert len(packed.data) < 5_000
    assert loads(packed.data, [bytearray(buffer) for buffer in packed.buffers])() == 50_000


def test_a_bytearray_may_travel_out_of_band() -> None:
    sent = bytearray(b"x" * 100_000)
    packed = dumps(pickle.PickleBuffer(sent))
    assert len(packed.data) < 100
    [buffer] = packed.buffers
    sent[0:1] = b"y"
    assert bytes(buffer[:2]) == b"yx"
    assert bytes(loads(packed.data, packed.buffers)) == bytes(sent)


def test_buffers_keep_their_order_and_small_ones_go_with_the_rest() -> None:
    sent = [bytes([65 + n]) * n * 3000 for n in range(5)]
    packed = dumps([pickle.PickleBuffer(data) for data in sent])
    assert [len(buffer) for buffer in packed.buffers] == [6000, 9000, 12000]
    assert [bytes(b) for b in loads(packed.data, packed.buffers)] == sent


def test_a_buffer_of_wide_items_counts_its_bytes() -> None:
    packed = dumps(pickle.PickleBuffer(array.array("d", [1.0, 2.0] * 500)))
    assert [len(buffer) for buffer in packed.buffers] == [8000]


def test_the_first_try_leaves_no_buffers_behind() -> None:
    """By name fails after the array was seen; by value sees it again: it must not travel twice."""
    numpy = pytest.importorskip("numpy")
    packed = dumps((numpy.ones(1_000), lambda: 1))
    assert len(packed.buffers) == 1


# What cannot travel -----------------------------------------------------------------------------


class Stubborn:
    def __reduce__(self) -> tuple[Any, ...]:
        raise RuntimeError("I stay here")


class Silent:
    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(SerializationError, match="lock"):
        dumps({"a": [threading.Lock()]})
    with pytest.raises(SerializationError, match="TypeError") as error:
        dumps(Silent())
    assert isinstance(error.value.__cause__, TypeError)
    with pytest.raises(TypeError):
        dumps(threading.get_ident for _ in range(3))


@pytest.mark.parametrize("share", [False, True])
def test_what_an_object_itself_raises_comes_as_it_is(share: bool) -> None:
    """As with multiprocessing, whose users may catch it by its type."""
    with pytest.raises(RuntimeError, match="I stay here"):
        dumps(Stubborn(), share=share)


def test_what_is_nested_too_deep_is_an_error_and_no_crash() -> None:
    deep: list[Any] = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(SerializationError, match=r"[Rr]ecursion"):
        dumps(deep)
    while deep:
        deep = deep[0]


def test_buffers_with_gaps_are_refused() -> None:
    with pytest.raises(SerializationError, match="contiguous"):
        dumps(pickle.PickleBuffer(memoryview(b"abcdef")[::2]))


def test_kinds_of_values_and_of_arguments_are_known() -> None:
    assert kinds_of([1, 2.0, "a", b"b", None, True, 1j]) == PLAIN
    assert kinds_of([(1, "a"), (None,), ()]) == {int, str, type(None)}
    assert kinds_of([(1,), 2]) == {tuple, int}
    assert kinds_of([]) == set()

    class Number(int):
        pass

    assert not kinds_of([1, Number(1)]) <= PLAIN


# Functions of `__main__` ------------------------------------------------------------------------

RECEIVER = """
import pickle, sys
from fiber.wire.pickling import loads

limit = "the receiver's own"
for data, buffers in pickle.load(open("packed", "rb")):
    loads(data, buffers)()
"""


def exchange(run_script: Run, sender: str, receiver: str = RECEIVER) -> list[str]:
    """Run a program that sends by value, and one that calls what came; return what it printed."""
    head = "from fiber.wire.pickling import dumps\nmessages = []\n"
    head += "def send(obj): messages.append(tuple(dumps(obj, frozenset()))[:2])\n"
    tail = "\nimport pickle\npickle.dump(messages, open('packed', 'wb'))\n"
    sent = run_script(head + sender + tail, name="sender.py", timeout=20)
    assert sent.returncode == 0, sent.stderr
    received = run_script(receiver, name="receiver.py", timeout=20)
    assert received.returncode == 0, received.stderr
    return received.stdout.split()


def test_a_function_of_the_main_module_brings_the_globals_that_it_uses(run_script: Run) -> None:
    sender = """
import math
factor = 3
unused = open(__file__)

def helper(x):
    return factor * x

def task():
    print(helper(2), math.floor(2.5), [helper(x) for x in range(3)][2])

send(task)
"""
    assert exchange(run_script, sender) == ["6", "2", "6"]


def test_functions_that_arrive_one_after_the_other_share_their_globals(run_script: Run) -> None:
    sender = """
count = 0

def increase():
    global count
    count += 1

def show():
    print(count)

for function in (increase, increase, show, increase, show):
    send(function)
"""
    assert exchange(run_script, sender) == ["2", "3"]


def test_a_global_that_the_sender_binds_anew_arrives_anew(run_script: Run) -> None:
    sender = """
state = {"n": 1}

def change():
    state["n"] += 10

def show():
    print(state["n"])

send(change)
send(show)
state = {"n": 2}
send(show)
"""
    assert exchange(run_script, sender) == ["11", "2"]


def test_a_global_that_the_receiver_has_of_its_own_gives_way(run_script: Run) -> None:
    sender = """
limit = 5

def show():
    print(limit)

send(show)
"""
    assert exchange(run_script, sender) == ["5"]


def test_recursive_functions_of_the_main_module_travel(run_script: Run) -> None:
    sender = """
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

def task(n=4, *, more=2) -> "annotated":
    "Document."
    print(fibonacci(10), even(n), odd(more), task.__doc__, task.__annotations__["return"])

send(task)
"""
    assert exchange(run_script, sender) == ["55", "True", "False", "Document.", "annotated"]


def test_classes_of_the_main_module_travel(run_script: Run) -> None:
    sender = """
import dataclasses, enum

class Colour(enum.Enum):
    RED = 1

@dataclasses.dataclass
class Base:
    x: int
    def name(self):
        return type(self).__name__

class Derived(Base):
    def name(self):
        return "my" + super().name()

def task(value=Derived(3), colour=Colour.RED):
    print(value.name(), value.x, isinstance(value, Derived), colour is Colour.RED)

send(task)
send(lambda: print(isinstance(Derived(1), Base)))
"""
    assert exchange(run_script, sender) == ["myDerived", "3", "True", "True", "True"]


def test_what_the_receiver_knows_goes_by_name(run_script: Run) -> None:
    program = """
from fiber.wire.pickling import dumps

def here():
    return 1

class Here:
    def method(self):
        return 2

by_name = len(dumps(here).data)
assert dumps(here, frozenset({"here"})).data.count(b"here") == 1
assert by_name < 50 < len(dumps(here, frozenset()).data)
assert len(dumps(Here(), frozenset({"Here"})).data) < 80 < len(dumps(Here(), frozenset()).data)
assert b"here" in dumps([here, Here.method], frozenset({"here", "Here"})).data
print("right")
"""
    done = run_script(program, timeout=20)
    assert done.stdout == "right\n", done.stderr


def test_a_function_defined_again_is_sent_as_it_is_now(run_script: Run) -> None:
    sender = """
def answer():
    return 1

def task():
    print(answer())

send(task)

def answer():
    return 2

send(task)
"""
    assert exchange(run_script, sender) == ["1", "2"]


def test_this_file_needs_no_program_of_its_own(tmp_path: Path) -> None:
    """Functions of modules that both sides import travel by name."""
    assert len(dumps(exchange).data) < 100
    assert back(exchange) is exchange
