"""What the tasks of a call have in common is sent once, and each task has it for itself."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.pool import tasks

import fiber
from fiber.runtime import session

DEADLINE = 20.0
SIZE = 1 << 19  # numbers, of 8 bytes each


def files() -> list[str]:
    folder = session.current().memory_folder()
    return [name for name in os.listdir(folder) if name.endswith(".snapshot")]


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Nothing of what is shared stays, once the calls are done."""
    yield
    deadline = time.monotonic() + DEADLINE
    while files() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert files() == []


pytestmark = pytest.mark.usefixtures("nothing_stays")


class Counted:
    """Counts how often it is pickled."""

    pickled = 0

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce__(self) -> Any:
        Counted.pickled += 1
        return Counted, (self.data,)


@pytest.fixture
def counted() -> Counted:
    Counted.pickled = 0
    return Counted("x" * (1 << 17))


# How often it is sent --------------------------------------------------------------------------


def test_an_item_that_comes_again_is_pickled_once(pool: fiber.Pool, counted: Counted) -> None:
    assert pool.map(tasks.length, [counted] * 50) == [1 << 17] * 50
    assert Counted.pickled == 1


@pytest.mark.parametrize("chunksize", [None, 1, 7])
def test_an_argument_that_tasks_share_is_pickled_once(
    pool: fiber.Pool, counted: Counted, chunksize: int | None
) -> None:
    items = [(counted, number) for number in range(50)]
    assert pool.starmap(tasks.length, items, chunksize) == [1 << 17] * 50
    assert Counted.pickled == 1
    assert pool.starmap_async(tasks.length, items, chunksize).get() == [1 << 17] * 50
    assert Counted.pickled == 2


@pytest.mark.parametrize("wrap", [lambda x, i: (i, x), lambda x, i: {"it": x, "i": i}, tasks.Job])
def test_so_is_what_is_in_a_container(
    pool: fiber.Pool, counted: Counted, wrap: Callable[..., Any]
) -> None:
    assert pool.map(tasks.length_within, [wrap(counted, i) for i in range(30)]) == [1 << 17] * 30
    assert Counted.pickled == 1


def test_several_are_sent_once_each(pool: fiber.Pool) -> None:
    Counted.pickled = 0
    several = [Counted("x" * (100_000 + number)) for number in range(5)]
    items = [(several[number % 5], number) for number in range(1000)]
    expected = [100_000 + number % 5 for number in range(1000)]
    assert pool.starmap(tasks.length, items) == expected
    assert Counted.pickled == 5


def test_a_call_pickles_anew(pool: fiber.Pool) -> None:
    """For what was changed in between must show."""
    array = np.zeros(SIZE)
    for number in range(3):
        array[:] = number
        assert pool.starmap(tasks.first_of, [(array, i) for i in range(10)]) == [number] * 10


def test_the_content_is_that_of_the_moment(pool: fiber.Pool) -> None:
    array = np.zeros(SIZE)
    pool.map(tasks.nap, [0.001] * 4)
    result = pool.starmap_async(tasks.first_of, [(array, i) for i in range(100)])
    array[:] = 1
    assert result.get() == [0] * 100


def test_the_values_of_a_stream_are_sent_as_they_come(pool: fiber.Pool) -> None:
    """A generator may yield the same array with another content."""
    array = np.zeros(SIZE)

    def stream() -> Iterator[Any]:
        for number in range(20):
            array[0] = number
            yield array
            array[0] = -1

    for results in (pool.imap(tasks.first_of, stream()), pool.map(tasks.first_of, [array] * 3)):
        list(results)
    assert list(pool.imap(len, [array] * 5)) == [SIZE] * 5


@pytest.mark.parametrize("how", ["map", "imap", "starmap"])
def test_a_large_function_is_there_once(pool: fiber.Pool, how: str) -> None:
    array = np.arange(SIZE)
    functions = [functools.partial(tasks.first_of, array), lambda x: int(array[x])]
    items = [(3,)] * 10 if how == "starmap" else [3] * 10
    for function, expected in zip(functions, (0, 3), strict=True):
        assert list(getattr(pool, how)(function, items)) == [expected] * 10


def test_ten_workers_share_one_file(tmp_path: Path) -> None:
    array = np.ones(4 * SIZE)
    with fiber.Pool(10) as pool:
        pool.map(tasks.nap, [0.01] * 40)
        result = pool.starmap_async(
            tasks.shares_memory, [(array, str(tmp_path / "go"), i) for i in range(10)], 1
        )
        deadline = time.monotonic() + DEADLINE
        while len(list(tmp_path.iterdir())) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        (tmp_path / "go").touch()
        shares = result.get()
        assert len({pid for pid, _ in shares}) == 10
    size = array.nbytes // 1024
    assert sum(share for _, share in shares) <= 1.1 * size


# That each has it for itself -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1 << 14, SIZE])
@pytest.mark.parametrize("chunksize", [None, 1])
def test_what_a_task_writes_no_other_sees(
    pool: fiber.Pool, size: int, chunksize: int | None
) -> None:
    array = np.zeros(size)
    items = [(array, number) for number in range(100)]
    assert pool.starmap(tasks.scribble, items, chunksize) == [0] * 100
    assert not array.any()


def test_within_a_chunk_items_share_as_they_do_in_multiprocessing(
    make_pool: Callable[..., Any],
) -> None:
    array = np.zeros(SIZE)
    with make_pool(2) as pool:
        items = [(array, number) for number in range(8)]
        assert pool.starmap(tasks.scribble, items, 4) == [0, 1, 1, 1] * 2


def test_lists_and_dictionaries_are_its_own_too(pool: fiber.Pool) -> None:
    data = {"numbers": list(range(50_000)), "seen": []}
    seen = pool.starmap(tasks.append, [(data, number) for number in range(30)], chunksize=1)
    assert seen == [1] * 30
    assert data["seen"] == []


def test_what_a_task_keeps_stays_as_it_was(pool: fiber.Pool) -> None:
    array = np.zeros(SIZE)
    kept = pool.starmap(tasks.keep_and_show, [(array, number) for number in range(1, 13)], 1)
    for number, (first, others) in enumerate(kept, 1):
        assert first == 0
        assert others[-1] == number
        assert others == sorted(set(others))


def test_a_task_may_return_what_it_was_given(pool: fiber.Pool) -> None:
    array = np.arange(SIZE)
    for number, (same, own) in enumerate(
        pool.starmap(tasks.give_back, [(array, number) for number in range(20)])
    ):
        assert own == number
        assert same[0] == number
        assert same[1:].tolist() == array[1:].tolist()


# When something is not as usual ----------------------------------------------------------------


def test_a_killed_worker_costs_nothing(pool: fiber.Pool, tmp_path: Path) -> None:
    array = np.ones(SIZE)
    items = [(array, str(tmp_path / str(number))) for number in range(20)]
    assert pool.starmap(tasks.die_once, items, chunksize=1) == [SIZE] * 20


def test_without_shared_memory_it_works_too() -> None:
    fiber.config.shared_memory_mb = 0
    array = np.zeros(SIZE)
    with fiber.Pool(2) as pool:
        assert pool.starmap(tasks.scribble, [(array, i) for i in range(20)], 1) == [0] * 20
        assert pool.map(functools.partial(tasks.first_of, array), range(4)) == [0] * 4
        assert files() == []


def test_what_cannot_be_pickled_fails_where_it_is(pool: fiber.Pool) -> None:
    found = pool.map(tasks.same, [(x for x in ())] * 2 + [1], return_exceptions=True)
    assert [type(value) for value in found] == [fiber.SerializationError] * 2 + [int]


def test_handles_in_what_is_shared_arrive(pool: fiber.Pool) -> None:
    handle = fiber.put(np.ones(SIZE))
    shared = [handle, "x" * (1 << 17)]
    assert pool.starmap(tasks.total_of_first, [(shared, i) for i in range(10)]) == [SIZE] * 10


def test_a_call_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    array = np.ones(SIZE)
    with fiber.Pool(2) as pool:
        items = [(array, str(tmp_path / "never")) for _ in range(4)]
        pool.starmap_async(tasks.wait_with, items)
        assert len(files()) == 1
    assert files() == []


class Model:
    def __init__(self) -> None:
        self.params = [0.0] * 20_000


class Optimiser:
    def __init__(self, params: list[float]) -> None:
        self.params = params

    def step(self) -> None:
        self.params[0] += 1


def train(model: Model, optimiser: Optimiser, number: int) -> float:
    optimiser.step()
    return model.params[0]


def test_constants_that_have_something_in_common_have_it_in_the_task(pool: fiber.Pool) -> None:
    model = Model()
    items = [(model, Optimiser(model.params), number) for number in range(6)]
    assert pool.starmap(train, items, 1) == [1.0] * 6
    same = Optimiser(model.params)
    assert pool.starmap(train, [(model, same, number) for number in range(6)], 1) == [1.0] * 6


class Node:
    def __init__(self, tree: Tree) -> None:
        self.tree = tree


class Tree:
    def __init__(self) -> None:
        self.blob = [0.0] * 20_000
        self.nodes = [Node(self) for _ in range(6)]


def is_in_its_tree(node: Node) -> bool:
    return any(node is other for other in node.tree.nodes)


def test_an_item_within_a_constant_is_in_it_for_its_task(pool: fiber.Pool) -> None:
    assert pool.map(is_in_its_tree, Tree().nodes, 1) == [True] * 6


def has(array: Any, named: dict[str, Any], number: int) -> bool:
    return named["array"] is array


def test_an_array_and_what_has_it_arrive_as_they_were(pool: fiber.Pool) -> None:
    array = np.zeros(50_000)
    named = {"array": array}
    assert pool.starmap(has, [(array, named, number) for number in range(6)], 1) == [True] * 6


def refuse(*args: object) -> None:
    raise ValueError("this cannot be loaded")


class Refuses:
    def __reduce__(self) -> tuple[Any, ...]:
        return refuse, ()


def second(pair: tuple[Any, Any]) -> Any:
    return pair[1]


def test_what_cannot_be_loaded_beside_a_constant_fails_alone() -> None:
    array = np.zeros(50_000)
    with fiber.Pool(1, maxtasksperchild=1) as pool:
        items = [(array, Refuses()), (array, 1), (array, 2)]
        first, *others = pool.map(second, items, 1, return_exceptions=True)
        assert isinstance(first, fiber.SerializationError)
        assert others == [1, 2]
        assert pool.map(second, [(array, 3), (array, 4)], 1) == [3, 4]


class Meta(type):
    def __eq__(cls, other: object) -> Any:
        raise ArithmeticError("types like this one are not compared")

    def __hash__(cls) -> int:
        return 0


class Unusual(metaclass=Meta):
    pass


class Lazy:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not yet")

    def __reduce__(self) -> tuple[Any, ...]:
        return Lazy, ()


def name_of(item: object) -> str:
    return type(item).__name__


@pytest.mark.parametrize("kind", [Unusual, Lazy])
def test_unusual_objects_are_no_obstacle(pool: fiber.Pool, kind: Callable[[], object]) -> None:
    assert pool.map(name_of, [kind(), kind()], 1) == [kind.__name__] * 2  # type: ignore[attr-defined]
