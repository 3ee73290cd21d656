"""SharedMemory and ShareableList: shared by name, with multiprocessing too; nothing is left."""

from __future__ import annotations

import gc
import os
import pickle
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory as mp_shared_memory
from typing import Any

import numpy as np
import pytest
from tests.shared import targets

import fiber
from fiber.runtime import folders, session
from fiber.shared_memory import ShareableList, SharedMemory


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a block, which the test need not unlink."""
    name = f"tests-{os.getpid()}-{time.time_ns()}"
    yield name
    try:
        SharedMemory(name).unlink()
    except FileNotFoundError:
        pass


def run(target: Callable[..., Any], *args: Any) -> None:
    process = fiber.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def exists(name: str) -> bool:
    try:
        SharedMemory(name).close()
    except FileNotFoundError:
        return False
    return True


def entries() -> list[str]:
    return [n for n in os.listdir(session.folder()) if n.startswith(folders.ENTRY)]


def test_processes_write_to_a_block() -> None:
    block = SharedMemory(create=True, size=100)
    run(targets.write_by_name, block.name, b"by name")
    assert bytes(block.buf[:7]) == b"by name"
    run(targets.write, block, b"itself ")
    assert bytes(block.buf[:7]) == b"itself "
    block.close()
    block.unlink()
    with pytest.raises(FileNotFoundError):
        block.unlink()


def test_tasks_write_to_a_block() -> None:
    block = SharedMemory(create=True, size=800)
    view = np.frombuffer(block.buf)

    def square(i: int) -> None:
        np.frombuffer(block.buf)[i] = i * i

    with fiber.Pool(2) as pool:
        pool.map(square, range(100))
    assert (view == np.arange(100) ** 2).all()
    block.unlink()


def test_a_process_that_attached_ends_and_the_block_stays(name: str) -> None:
    block = SharedMemory(name, create=True, size=10)
    run(targets.write_by_name, name, b"abc")
    assert exists(name)
    block.close()
    assert exists(name)


def test_a_process_that_created_ends_and_the_block_stays(name: str) -> None:
    run(targets.create, name)
    block = SharedMemory(name)
    assert bytes(block.buf[:3]) == b"abc"
    run(targets.unlink, name)
    assert not exists(name)
    assert entries() == []


def test_blocks_go_with_the_session(name: str) -> None:
    SharedMemory(name, create=True, size=10)
    run(targets.create, name + "c")
    assert exists(name)
    session.shutdown()
    assert not exists(name)
    assert not exists(name + "c")


def test_an_untracked_block_does_not(name: str) -> None:
    SharedMemory(name, create=True, size=10, track=False)
    assert entries() == []
    session.shutdown()
    assert exists(name)


def test_somebody_elses_block_of_that_name_does_not(name: str) -> None:
    SharedMemory(name, create=True, size=10)
    theirs = mp_shared_memory.SharedMemory(name)
    theirs.unlink()
    theirs.close()
    theirs = mp_shared_memory.SharedMemory(name, create=True, size=20)
    session.shutdown()
    assert exists(name)
    theirs.unlink()
    theirs.close()


def test_a_name_can_be_used_again(name: str) -> None:
    for size in (10, 20):
        block = SharedMemory(name, create=True, size=size)
        with pytest.raises(FileExistsError):
            SharedMemory(name, create=True, size=size)
        os.unlink(f"/dev/shm/{name}") if size == 10 else block.unlink()
        assert not exists(name)
    assert entries() == []


def test_multiprocessing_finds_it(name: str) -> None:
    block = SharedMemory(name, create=True, size=10)
    theirs = mp_shared_memory.SharedMemory(name)
    theirs.buf[:2] = b"hi"
    assert bytes(block.buf[:2]) == b"hi"
    assert isinstance(block, mp_shared_memory.SharedMemory)
    theirs.unlink()
    theirs.close()


def test_no_resource_tracker(run_script: Callable[..., Any]) -> None:
    done = run_script(
        """\
from multiprocessing import resource_tracker
import fiber
from fiber.shared_memory import ShareableList, SharedMemory

def use(block):
    SharedMemory(block.name).close()
    SharedMemory(create=True, size=10)
    assert resource_tracker._resource_tracker._pid is None

if __name__ == "__main__":
    block, items = SharedMemory(create=True, size=10), ShareableList([1])
    process = fiber.Process(target=use, args=(block,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert resource_tracker._resource_tracker._pid is None
    items.shm.unlink()
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_view_at_the_end_of_a_program(run_script: Callable[..., Any]) -> None:
    done = run_script(
        """\
import numpy
from fiber.shared_memory import SharedMemory
block = SharedMemory(create=True, size=80)
view = numpy.frombuffer(block.buf)
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_view_outlives_its_block() -> None:
    block = SharedMemory(create=True, size=80)
    view = np.frombuffer(block.buf)
    view[:] = 3.0
    block.unlink()
    del block
    gc.collect()
    assert view.sum() == 30.0


def test_no_room(name: str) -> None:
    with pytest.raises(OSError, match="cannot get 70,368,744,177,664 bytes .*: No space"):
        SharedMemory(name, create=True, size=1 << 46)
    assert not exists(name)
    assert entries() == []


def test_wrong_arguments() -> None:
    for wrong in ({"size": -1}, {"create": True}, {}, {"create": True, "size": -1}):
        with pytest.raises(ValueError):
            SharedMemory(**wrong)


def test_pickled_at_any_time() -> None:
    block = SharedMemory(create=True, size=10)
    again = pickle.loads(pickle.dumps(block))
    again.buf[0] = 7
    assert block.buf[0] == 7
    assert type(again) is SharedMemory
    block.unlink()


def test_lists() -> None:
    items = ShareableList([1, 2.5, "three", b"four", None, True])
    assert type(items.shm) is SharedMemory
    run(targets.set_item, items, 2, "drei")
    assert list(items) == [1, 2.5, "drei", b"four", None, True]
    with fiber.Pool(1) as pool:
        assert pool.apply(targets.set_item, (items, 0, 9))[:2] == [9, 2.5]
    assert items[0] == 9
    again = ShareableList(name=items.shm.name)
    again[1] = 0.5
    assert items[1] == 0.5
    assert isinstance(items, mp_shared_memory.ShareableList)
    items.shm.unlink()


def test_lists_go_with_the_session(name: str) -> None:
    ShareableList(range(5), name=name)
    session.shutdown()
    assert not exists(name)
