"""`fiber.put`: one copy of an object for each host, for as long as anybody has a handle of it."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.shared.targets import hide_memory
from tests.waiting import until

import fiber
from fiber.runtime import session, snapshots
from fiber.wire.pickling import Packed

DEADLINE = 20.0
SIZE = 1 << 20  # numbers, of 8 bytes each

Start = Callable[..., fiber.Process]


def files() -> list[str]:
    """The snapshots and copies that are in this session's memory."""
    folder = session.current().memory_folder()
    return [name for name in os.listdir(folder) if name.endswith((".snapshot", ".copy"))]


def tell(handle: fiber.ObjectRef[Any], back: Any) -> None:
    obj = handle.get()
    back.put((float(obj.sum()), handle.get() is obj))


def hold(handle: fiber.ObjectRef[Any], back: Any) -> None:
    """Get the object, and wait for being killed."""
    back.put(float(handle.get().sum()))
    time.sleep(60)


def own(back: Any) -> None:
    back.put(fiber.put(np.ones(SIZE)))
    time.sleep(60)


# What it gives ---------------------------------------------------------------------------------


def test_it_is_as_it_was_when_it_was_put() -> None:
    array = np.arange(SIZE)
    handle = fiber.put({"array": array, "name": "it"})
    array[:] = 0
    found = handle.get()
    assert found["name"] == "it"
    assert found["array"].tolist() == list(range(SIZE))
    assert not array.any()


def test_it_is_the_same_each_time() -> None:
    handle = fiber.put([1, 2, 3])
    assert handle.get() is handle.get()
    other = pickle.loads(pickle.dumps(handle))
    assert other.get() is handle.get()
    assert other == handle
    assert len({other, handle}) == 1
    assert handle != fiber.put([1, 2, 3])


def test_its_memory_cannot_be_written() -> None:
    found = fiber.put(np.zeros(SIZE)).get()
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    copy = found.copy()
    copy[0] = 1


@pytest.mark.parametrize("obj", [None, 0, "text", b"", b"x" * (1 << 20), list(range(100_000))])
def test_anything_can_be_put(obj: Any) -> None:
    assert fiber.put(obj).get() == obj


def test_what_cannot_be_pickled_cannot_be_put() -> None:
    with pytest.raises(fiber.SerializationError, match="a generator cannot be put"):
        fiber.put(x for x in ())
    assert files() == []


def test_a_function_can_be_put(start: Start) -> None:
    offset = np.arange(SIZE)
    handle, back = fiber.put(lambda x: float(offset[x])), fiber.Queue()
    start(lambda: back.put(handle.get()(7)))
    assert back.get(timeout=DEADLINE) == 7.0


def test_a_context_can_put(start: Start) -> None:
    assert fiber.get_context("spawn").put("it").get() == "it"
    assert isinstance(fiber.put("it"), fiber.ObjectRef)


# Where a handle can be -------------------------------------------------------------------------


def test_it_goes_wherever_a_pickle_goes(start: Start) -> None:
    handle, back = fiber.put(np.ones(SIZE)), fiber.Queue()
    start(tell, handle, back)
    assert back.get(timeout=DEADLINE) == (SIZE, True)

    way = fiber.Queue()
    way.put({"nested": [(handle,)]})
    start(lambda: tell(way.get()["nested"][0][0], back))
    assert back.get(timeout=DEADLINE) == (SIZE, True)

    ours, theirs = fiber.Pipe()
    ours.send([handle])
    start(lambda: tell(theirs.recv()[0], back))
    assert back.get(timeout=DEADLINE) == (SIZE, True)

    with fiber.Manager() as manager:
        shared = manager.dict(handle=handle)
        start(lambda: tell(shared["handle"], back))
        assert back.get(timeout=DEADLINE) == (SIZE, True)

    with fiber.Pool(2) as pool:
        assert pool.starmap(total, [(handle, i) for i in range(20)]) == [
            SIZE + i for i in range(20)
        ]
        assert pool.map(functools.partial(total, handle), range(3)) == [SIZE + i for i in range(3)]
        assert list(pool.imap(same, [handle] * 3)) == [handle] * 3
    assert handle.get().sum() == SIZE


def total(handle: fiber.ObjectRef[Any], number: int) -> float:
    return float(handle.get().sum()) + number


def same(obj: Any) -> Any:
    return obj


def test_a_process_may_put_for_others(start: Start) -> None:
    back = fiber.Queue()
    start(own, back)
    handle = back.get(timeout=DEADLINE)
    assert handle.get().sum() == SIZE
    start(tell, handle, back)
    assert back.get(timeout=DEADLINE) == (SIZE, True)


def test_a_fork_has_it_too() -> None:
    handle = fiber.put(np.ones(SIZE))
    handle.get()
    back = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: back.put((handle.get().sum(), fiber.put(3).get()))
    )
    child.start()
    child.join(DEADLINE)
    assert child.exitcode == 0
    assert back.get() == (SIZE, 3)
    back.close()
    child.close()
    assert handle.get().sum() == SIZE


# One copy --------------------------------------------------------------------------------------


class Counted:
    """Says in a file how often it was unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")


def test_a_worker_unpickles_it_once(tmp_path: Path) -> None:
    handle = fiber.put((Counted(str(tmp_path / "count")), bytes(1 << 17)))
    with fiber.Pool(2) as pool:
        pids = set(pool.starmap(pid_with, [(handle, i) for i in range(50)], chunksize=1))
    assert sorted(map(int, (tmp_path / "count").read_text().split())) == sorted(pids)


def pid_with(handle: fiber.ObjectRef[Any], number: int) -> int:
    handle.get()
    return os.getpid()


def meet(handle: fiber.ObjectRef[Any], barrier: Any, back: Any) -> None:
    barrier.wait(DEADLINE)
    back.put((os.getpid(), float(handle.get().sum())))
    barrier.wait(DEADLINE)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_ten_processes_share_one_copy(start: Start, ends_well: Callable[..., None]) -> None:
    handle = fiber.put(np.ones(4 * SIZE))
    barrier, back = fiber.Barrier(11), fiber.Queue()
    processes = [start(meet, handle, barrier, back) for _ in range(10)]
    barrier.wait(DEADLINE)
    found = [back.get(timeout=DEADLINE) for _ in range(10)]
    assert {value for _, value in found} == {4 * SIZE}
    (name,) = files()
    shares = [memory_of(pid, name) for pid, _ in found]
    barrier.wait(DEADLINE)
    ends_well(*processes)
    assert sum(shares) <= 1.01 * 4 * SIZE * 8 / 1024
    assert min(shares) > 0


def memory_of(pid: int, name: str) -> int:
    """Return a process's share, in KB, of the memory of a file."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            ours = line.endswith(name)
        elif ours and words[0] == "Pss:":
            total += int(words[1])
    return total


def test_where_memory_cannot_be_shared_each_has_its_own(start: Start) -> None:
    fiber.config.shared_memory_mb = 0
    handle, back = fiber.put(np.ones(5 * SIZE)), fiber.Queue()
    start(tell, handle, back)
    assert back.get(timeout=DEADLINE) == (5 * SIZE, True)
    assert not handle.get().flags.writeable
    assert files() == []


def test_beyond_the_bound_each_has_its_own() -> None:
    fiber.config.shared_memory_mb = 20
    handles = [fiber.put(np.full(SIZE, number)) for number in range(4)]
    assert len(files()) == 2
    assert [handle.get()[-1] for handle in handles] == [0, 1, 2, 3]
    del handles[0]
    gc.collect()
    handles.append(fiber.put(np.zeros(SIZE)))


def test_who_does_not_see_the_memory_has_its_own(start: Start) -> None:
    handle, back = fiber.put(np.ones(SIZE)), fiber.Queue()

    def look() -> None:
        try:
            hide_memory()
        except OSError:
            back.put((SIZE, True))  # it cannot
        else:
            tell(handle, back)

    start(look)
    assert back.get(timeout=DEADLINE) == (SIZE, True)


# How long it is there --------------------------------------------------------------------------


def test_it_goes_with_the_last_handle(start: Start) -> None:
    handle = fiber.put(np.ones(SIZE))
    assert len(files()) == 1
    other = pickle.loads(pickle.dumps(handle))
    del handle
    gc.collect()
    assert other.get().sum() == SIZE
    found = other.get()
    del other
    gc.collect()
    until(lambda: not files(), "the end of the file")
    assert found.sum() == SIZE  # as long as anybody has it


def test_who_only_had_it_keeps_nothing(start: Start) -> None:
    with fiber.Pool(2) as pool:
        for number in range(5):
            handle = fiber.put(np.full(SIZE, number))
            found = pool.map(at_end, [handle] * 8, chunksize=1)
            del handle
            assert set(found) == {number}
            gc.collect()
            until(lambda: not files(), "the end of the file")
        assert pool.map(mapped, range(8), chunksize=1) == [0] * 8


def at_end(handle: fiber.ObjectRef[Any]) -> int:
    return int(handle.get()[-1])


def mapped(_: int) -> int:
    """Return how many snapshots this process has mapped, when it has had time to hear of ends."""
    deadline = time.monotonic() + DEADLINE
    while (count := Path("/proc/self/maps").read_text().count(".snapshot")) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.01)
    return count


def test_who_is_killed_has_no_handle_any_more(start: Start) -> None:
    handle, back = fiber.put(np.ones(SIZE)), fiber.Queue()
    readers = [start(hold, handle, back) for _ in range(3)]
    assert [back.get(timeout=DEADLINE) for _ in readers] == [SIZE] * 3
    del handle
    gc.collect()
    for reader in readers[:2]:
        os.kill(reader.pid, signal.SIGKILL)  # type: ignore[arg-type]
        reader.join(DEADLINE)
    assert len(files()) == 1
    os.kill(readers[2].pid, signal.SIGKILL)  # type: ignore[arg-type]
    until(lambda: not files(), "the end of the file")


def test_the_death_of_its_owner_is_told(start: Start) -> None:
    back = fiber.Queue()
    owner = start(own, back)
    handle = back.get(timeout=DEADLINE)
    data = pickle.dumps(handle)
    other = start(own, back)
    known = back.get(timeout=DEADLINE)
    assert known.get().sum() == SIZE
    for process in (owner, other):
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join(DEADLINE)
    with pytest.raises(fiber.PeerDied, match="has ended"):
        handle.get()
    with pytest.raises(fiber.PeerDied):
        pickle.loads(data).get()
    assert known.get().sum() == SIZE  # for it was here
    until(lambda: not files(), "the end of the files")


def test_an_owner_that_ends_takes_it_along(start: Start) -> None:
    back = fiber.Queue()

    def put_and_end() -> None:
        back.put(fiber.put(np.ones(SIZE)))
        back.get(timeout=DEADLINE)

    owner = start(put_and_end)
    handle = back.get(timeout=DEADLINE)
    back.put("end")
    owner.join(DEADLINE)
    with pytest.raises(fiber.PeerDied):
        handle.get()
    assert files() == []


KILLED = """
import os, signal, sys
import numpy as np
import fiber
from fiber.runtime import session

def use(handle):
    return float(handle.get().sum())

if __name__ == "__main__":
    handle = fiber.put(np.ones(1 << 17))
    if sys.argv[1] == "pool":
        pool = fiber.Pool(2)
        pool.map(use, [handle] * 4)
    print(session.current().memory_folder(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["alone", "pool"])
def test_a_master_that_is_killed_leaves_nothing(how: str, start_script: Callable[..., Any]) -> None:
    program = start_script(KILLED, how)
    folder = program.stdout.readline().strip()
    assert folder
    program.wait(DEADLINE)
    until(lambda: not os.path.exists(folder), "the end of the session's memory")


def test_many_come_and_go() -> None:
    for number in range(200):
        assert fiber.put(np.full(1 << 14, number)).get()[0] == number
    gc.collect()
    session.current().loop.poll()
    assert len(files()) <= 1


# Copies, of other places ------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path) -> Iterator[snapshots.Snapshot]:
    (tmp_path / "home").mkdir()
    packed = Packed(b"pickle", [bytes(range(256)) * 4096, b"", b"x" * 5000])
    made = snapshots.Snapshot(packed, lambda: str(tmp_path / "home"))
    yield made
    made.free()


def copy_of(snapshot: snapshots.Snapshot, folder: Path, reads: Any) -> snapshots.Copy:
    def read(start: int, stop: int) -> bytes:
        reads.write(f"{stop - start}\n")
        reads.flush()
        time.sleep(0.05)  # so that others come meanwhile
        return bytes(snapshot.memory[start:stop])

    folder.mkdir(exist_ok=True)
    return snapshots.Copy(str(folder), "0" * 16, snapshot.size, read)


def test_a_snapshot_is_fetched_once_for_a_place(
    snapshot: snapshots.Snapshot, tmp_path: Path, start: Start, ends_well: Callable[..., None]
) -> None:
    place, log = tmp_path / "place", tmp_path / "reads"
    barrier = fiber.Barrier(6)

    def fetch() -> None:
        barrier.wait(DEADLINE)
        with log.open("a") as reads:
            copy = copy_of(snapshot, place, reads)
        assert copy.memory == snapshot.memory
        assert [bytes(part[:6]) for part in snapshots.parts(copy.memory)] == [
            b"pickle",
            b"\0\1\2\3\4\5",
            b"",
            b"xxxxxx",
        ]
        barrier.wait(DEADLINE)
        copy.let_go()

    ends_well(*[start(fetch) for _ in range(6)])
    assert sum(map(int, log.read_text().split())) == snapshot.size
    assert list(place.iterdir()) == []


def test_who_is_killed_while_fetching_is_replaced(
    snapshot: snapshots.Snapshot, tmp_path: Path, start: Start
) -> None:
    place, log = tmp_path / "place", tmp_path / "reads"

    def stuck(*_: int) -> bytes:
        log.write_text("stuck\n")
        time.sleep(60)
        return b""

    place.mkdir()
    victim = start(lambda: snapshots.Copy(str(place), "0" * 16, snapshot.size, stuck))
    until(log.exists)
    os.kill(victim.pid, signal.SIGKILL)  # type: ignore[arg-type]
    with log.open("a") as reads:
        copy = copy_of(snapshot, place, reads)
    assert copy.memory == snapshot.memory
    copy.let_go()
    assert list(place.iterdir()) == []


def test_a_place_does_not_wait_for_ever(
    snapshot: snapshots.Snapshot,
    tmp_path: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor for a process that was stopped while it fetched."""
    place, log = tmp_path / "place", tmp_path / "reads"
    monkeypatch.setattr(snapshots, "_PATIENCE", 0.2)

    def stuck(*_: int) -> bytes:
        log.write_text("stuck\n")
        time.sleep(60)
        return b""

    place.mkdir()
    start(lambda: snapshots.Copy(str(place), "0" * 16, snapshot.size, stuck))
    until(log.exists)
    with log.open("a") as reads, pytest.raises(TimeoutError):
        copy_of(snapshot, place, reads)


def test_copies_of_the_dead_are_swept(
    snapshot: snapshots.Snapshot, tmp_path: Path, start: Start
) -> None:
    place, log, ready = tmp_path / "place", tmp_path / "reads", fiber.Event()

    def fetch() -> None:
        with log.open("a") as reads:
            copy = copy_of(snapshot, place, reads)
        ready.set()
        time.sleep(60)
        copy.let_go()

    victim = start(fetch)
    assert ready.wait(DEADLINE)
    snapshots.sweep(str(place))
    assert len(list(place.iterdir())) == 1
    os.kill(victim.pid, signal.SIGKILL)  # type: ignore[arg-type]
    victim.join(DEADLINE)
    snapshots.sweep(str(place))
    assert list(place.iterdir()) == []


def test_a_reader_that_fails_leaves_nothing(snapshot: snapshots.Snapshot, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()

    def fail(*_: int) -> bytes:
        raise fiber.PeerDied("it is gone")

    with pytest.raises(fiber.PeerDied):
        snapshots.Copy(str(place), "0" * 16, snapshot.size, fail)
    assert list(place.iterdir()) == []
