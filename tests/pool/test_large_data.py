"""Large arguments and results: they are lent, and a program notices nothing but the speed."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.waiting import until

import fiber
from fiber.runtime import session
from fiber.wire.arena import LEAST

SIZE = 1 << 20
PATIENCE = 30.0

_kept: list[Any] = []


class Array:
    """As a numpy array: its memory travels out of band, and is what it is made of again."""

    def __init__(self, memory: Any) -> None:
        self.memory = memoryview(memory)

    def __reduce_ex__(self, protocol: int) -> Any:
        import pickle

        return Array, (pickle.PickleBuffer(self.memory),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self.memory == other.memory

    __hash__ = None  # type: ignore[assignment]


def make(x: int, size: int = SIZE) -> Array:
    return Array(bytearray([x % 256]) * size)


def first(array: Array) -> int:
    return int(array.memory[0])


def is_all(x: int, array: Array) -> bool:
    return array.memory == bytes([x % 256]) * len(array.memory)


def is_all_of(array: Array, x: int) -> bool:
    return is_all(x, array)


def same(x: Any) -> Any:
    return x


def keep(x: Any) -> int:
    _kept.append(x)
    return os.getpid()


def kept() -> list[int]:
    return [first(array) for array in _kept]


def open_no_more_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # those that are open stay so


def lent_files() -> list[Path]:
    """The files in which the processes of this session lend memory."""
    return list(Path(session.current().memory_folder()).glob("*.lent/*"))


def used() -> int:
    """Bytes of shared memory that the session has."""
    total = 0
    for path in lent_files():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


@pytest.fixture(params=["lent", "sent"])
def way(request: pytest.FixtureRequest) -> str:
    """What is true of data that is lent is true of data that goes over the socket."""
    way: str = request.param
    if way == "sent":
        fiber.config.shared_memory_mb = 0
    return way


def test_it_is_lent_where_it_can_be(way: str, pool: fiber.Pool) -> None:
    assert pool.map(first, [make(x) for x in range(6)]) == list(range(6))
    assert (session.current().arena.backed > 0) == (way == "lent")
    results = pool.map(make, range(6))
    assert all(map(is_all, range(6), results))
    assert (len({path.parent for path in lent_files()}) > 1) == (way == "lent")


@pytest.mark.parametrize("how", ["map", "imap", "imap_unordered"])
@pytest.mark.parametrize("chunksize", [None, 1, 4])
def test_arguments_and_results_arrive(
    way: str, pool: fiber.Pool, how: str, chunksize: int | None
) -> None:
    arguments = [make(x, LEAST - 20 + x) for x in range(40)]
    results = getattr(pool, how)(same, arguments, chunksize)
    assert sorted(bytes(r.memory) for r in results) == [bytes(a.memory) for a in arguments]


def test_an_argument_may_be_written_to_and_nobody_else_sees_it(way: str, pool: fiber.Pool) -> None:
    def change(array: Array) -> set[int]:
        before = set(array.memory[::1000])
        array.memory[:] = b"\xff" * len(array.memory)
        return before

    argument = make(7)
    for _ in range(3):
        assert pool.map(change, [argument] * 12) == [{7}] * 12
    assert is_all(7, argument)


def test_a_result_may_be_written_to(way: str, pool: fiber.Pool) -> None:
    for _ in range(3):
        results = pool.map(make, range(8))
        assert all(map(is_all, range(8), results))
        for result in results:
            result.memory[:] = b"\xff" * SIZE
        assert all(map(is_all, [255] * 8, results))


def test_numpy_arrays_are_as_they_were(way: str, pool: fiber.Pool) -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(SIZE // 4, dtype=numpy.float64).reshape(512, -1)
    frozen = array.copy()
    frozen.flags.writeable = False

    def double(pair: tuple[Any, Any]) -> tuple[Any, Any, list[bool]]:
        pair[0][:] *= 2
        return pair[0], pair[1].T, [a.flags.writeable for a in pair]

    for result, turned, writeable in pool.map(double, [(array, frozen)] * 6):
        assert (result == 2 * array).all()
        assert result.flags.writeable
        assert (turned == array.T).all()
        assert writeable == [True, False]


def test_results_that_are_kept_stay_as_they_were(way: str) -> None:
    with fiber.Pool(2) as pool:
        first_of_all = pool.map(make, range(10))
        for _ in range(5):
            assert all(map(is_all, range(20), pool.map(make, range(20))))
        parts = [result.memory[100:200] for result in first_of_all[:3]]
        pids = pool.pids()
    assert all(map(is_all, range(10), first_of_all))
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    session.shutdown()
    assert all(map(is_all, range(10), first_of_all))
    del first_of_all
    assert parts == [bytes([x]) * 100 for x in range(3)]


def test_an_argument_that_is_kept_stays_as_it_was(way: str) -> None:
    with fiber.Pool(1) as pool:
        pool.map(keep, [make(x) for x in range(5)], chunksize=1)
        for _ in range(5):
            pool.map(first, [make(x) for x in range(100, 120)], chunksize=1)
        assert pool.apply(kept) == list(range(5))


def test_a_result_that_the_next_task_changes_arrives_as_it_was(way: str, pool: fiber.Pool) -> None:
    reused = make(0)

    def fill(x: int) -> Array:
        reused.memory[:] = bytes([x]) * SIZE
        return reused

    for chunksize in (1, 5):
        assert all(map(is_all, range(40), pool.map(fill, range(40), chunksize)))


def test_buffers_of_all_sizes_keep_their_places(way: str, pool: fiber.Pool) -> None:
    sizes = [0, 10, 5000, LEAST - 1, LEAST, 3 * LEAST + 5, 1, LEAST, 4096]
    sent = {n: [make(n + at, size) for at, size in enumerate(sizes)] for n in range(4)}
    assert pool.map(same, sent.values()) == list(sent.values())
    assert pool.apply(same, (sent,)) == sent


def test_a_class_that_asks_for_the_buffers_owner_gets_these_bytes(pool: fiber.Pool) -> None:
    """As in the example of the pickle module's documentation."""

    class Bytes(bytearray):
        def __reduce_ex__(self, protocol: Any) -> Any:
            import pickle

            return type(self)._make, (pickle.PickleBuffer(self),)

        @classmethod
        def _make(cls, obj: Any) -> Any:
            with memoryview(obj) as view:
                obj = view.obj
                return obj if type(obj) is cls else cls(obj)

    sent = [Bytes(bytes([x]) * (LEAST + x)) for x in range(5)]
    assert pool.map(same, sent) == sent


def test_bytes_and_bytearrays(way: str, pool: fiber.Pool) -> None:
    sizes = [0, 10, LEAST - 1, LEAST, SIZE]
    for kind in (bytes, bytearray):
        sent = [kind([n]) * size for n, size in enumerate(sizes)]
        for result in (pool.map(same, sent), [pool.apply(same, (x,)) for x in sent]):
            assert result == sent
            assert {type(x) for x in result} == {kind}
        lengths = pool.starmap(lambda a, b: (type(b), len(a) + len(b)), [(b"", x) for x in sent])
        assert lengths == [(kind, size) for size in sizes]
    big = bytes(SIZE)
    assert pool.map(lambda pair: pair[0] is pair[1], [(big, big)] * 4) == [True] * 4
    assert pool.map(same, [big, None, 3, "x" * SIZE, [big]]) == [big, None, 3, "x" * SIZE, [big]]


def test_a_function_with_large_data(way: str, pool: fiber.Pool) -> None:
    table = make(3)
    for _ in range(3):
        assert pool.map(lambda x: first(table) + x, range(100)) == list(range(3, 103))


# What is lent comes back -----------------------------------------------------------------------


def test_memory_is_used_again(pool: fiber.Pool) -> None:
    for _ in range(30):
        pool.map(first, [make(x) for x in range(8)])
        assert all(map(is_all, range(8), pool.map(make, range(8))))
    assert session.current().arena.backed <= 8 * SIZE
    assert used() <= 8 * SIZE + 2 * 8 * SIZE


def wait_for(array: Array, go: Path | None) -> int:
    if go is not None:
        until(go.exists)
    return first(array)


def test_an_argument_is_given_back_before_its_batch_is_done(tmp_path: Path) -> None:
    go = tmp_path / "go"
    arena = session.current().arena
    with fiber.Pool(1) as pool:
        result = pool.starmap_async(wait_for, [(make(0), None), (make(1), go)], chunksize=2)
        until(lambda: arena.lent == SIZE)
        assert not result.ready()
        go.touch()
        assert result.get(PATIENCE) == [0, 1]


def test_it_goes_back_to_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiber.wire.arena.TICK", 0.05)  # here; workers take their own time
    with fiber.Pool(2) as pool:
        results = pool.map(make, range(8))
        pool.map(first, results)
        own = session.current().arena
        until(lambda: own.backed == 0)
        assert used() >= 8 * SIZE  # the results that we have
        del results
        until(lambda: used() == 0)
        assert all(map(is_all, range(8), pool.map(make, range(8))))


def test_a_bound_that_is_reached_by_what_is_kept() -> None:
    fiber.config.shared_memory_mb = 2
    with fiber.Pool(2) as pool:
        results = [*pool.map(make, range(40)), *pool.imap(make, range(40))]
        assert all(map(is_all, [*range(40), *range(40)], results))
        assert used() == 2 * 2 << 20
        for x in range(12):
            pool.apply(keep, (make(x),))
        assert session.current().arena.lent == 2 << 20
        assert used() == 3 * 2 << 20


def test_shared_memory_that_is_full(tmp_path: Path) -> None:
    """As in a container, with the least that engines give it, and less."""
    program = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import fiber
from tests.pool.test_large_data import make, first, is_all

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        for _ in range(3):
            results = pool.map(make, range(24))
            assert all(map(is_all, range(24), results))
            assert pool.map(first, results) == list(range(24))
        about = os.statvfs("/dev/shm")
        print(about.f_blocks - about.f_bfree > 0)
        with open("/dev/shm/other", "wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
        results = pool.map(make, range(24))
        assert all(map(is_all, range(24), results))
    print("done")
"""
    script = tmp_path / "program.py"
    script.write_text(program)
    inner = f"mount -t tmpfs -o size=8m none /dev/shm && exec {sys.executable} {script}"
    command = ["unshare", "-m", "sh", "-c", inner]
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    if (
        not shutil.which("unshare")
        or subprocess.run(probe, check=False, capture_output=True).returncode
    ):
        pytest.skip("file systems cannot be mounted here")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\ndone\n", done.stderr
    assert done.stderr == ""


def test_a_worker_that_cannot_open_files_gets_it_sent() -> None:
    with fiber.Pool(1, initializer=open_no_more_files) as pool:
        assert pool.map(first, [make(x) for x in range(20)]) == list(range(20))
        table = make(5)
        assert pool.map(functools.partial(is_all_of, table), [5] * 20) == [True] * 20
        assert session.current().arena.lent == 0


def is_array(x: Any) -> bool:
    return isinstance(x, Array)


def test_a_function_that_came_with_what_a_worker_cannot_open_gets_there() -> None:
    with fiber.Pool(1, initializer=open_no_more_files) as pool:
        pool.map(is_array, range(1000))  # it is fast: several batches are sent at once
        items = [make(0), *range(5000)]
        assert pool.map(is_array, items) == [True] + [False] * 5000


def test_a_worker_asks_for_a_function_that_it_has_not_got() -> None:
    import pickle
    import socket

    from fiber.pool import protocol
    from fiber.pool.lending import Lending
    from fiber.pool.worker import Worker
    from fiber.wire.arena import Arena
    from fiber.wire.channel import Channel

    ours, theirs = map(Channel, socket.socketpair())
    with contextlib.closing(ours), contextlib.closing(theirs):
        head = protocol.BATCH_HEAD.pack(7, 1, 1, 20, 1, 1, protocol.MAP, False, 0, 0)
        ours.send(protocol.BATCH, head + pickle.dumps([1]))
        ours.send(protocol.STOP, b"")
        Worker(theirs, Lending(Arena(str, "", lambda: 0))).work()
        (answer,) = ours.read()
        assert (answer.kind, pickle.loads(answer.body)) == (protocol.STRANGE, 7)


def tick_fast() -> None:
    from fiber.pool import worker

    worker.TICK = 0.1


def test_a_busy_worker_gives_up_what_the_user_has_let_go_of(tmp_path: Path) -> None:
    go = tmp_path / "go"
    with fiber.Pool(1, initializer=tick_fast) as pool:
        array = pool.apply(make, (1,))
        busy = pool.apply_async(until, (go.exists,))
        assert used() > 0
        del array
        until(lambda: used() == 0)
        assert not busy.ready()
        go.touch()
        busy.get(PATIENCE)


def test_results_that_cannot_be_copied_cost_no_memory(tmp_path: Path) -> None:
    from fiber.pool.lending import Lending
    from fiber.wire.arena import Arena

    arena = Arena(lambda: str(tmp_path), "a")
    lending = Lending(arena)
    good, torn = bytes(SIZE), memoryview(bytes(2 * SIZE))[::2]
    for attempt in (lending.hold, lambda *args: lending.pack(args[0], 1, args[1])):
        with pytest.raises(BufferError):
            attempt(None, [good, torn])
        assert arena.lent == 0
    arena.close()


# Forks and deaths ------------------------------------------------------------------------------


def test_a_fork_of_a_task_sees_its_argument_as_it_was(tmp_path: Path) -> None:
    out, go = tmp_path / "out", tmp_path / "go"

    def leave(array: Array) -> None:
        if os.fork() == 0:
            with contextlib.suppress(BaseException):
                deadline = time.monotonic() + PATIENCE
                while not go.exists() and time.monotonic() < deadline:
                    time.sleep(0.005)
                out.write_bytes(bytes(array.memory))
            os._exit(0)

    with fiber.Pool(1) as pool:
        pool.apply(leave, (make(9),))
        for _ in range(5):
            pool.map(first, [make(1)] * 5)
        assert session.current().arena.lent <= SIZE
        go.touch()
        until(lambda: out.exists() and out.stat().st_size == SIZE)
        assert out.read_bytes() == bytes([9]) * SIZE


def test_a_fork_of_a_task_sees_its_argument_when_its_worker_was_killed(tmp_path: Path) -> None:
    out, go = tmp_path / "out", tmp_path / "go"

    def leave(array: Array) -> int:
        if os.fork() == 0:
            with contextlib.suppress(BaseException):
                until(go.exists)
                out.write_bytes(bytes(array.memory))
            os._exit(0)
        return keep(array)

    with fiber.Pool(1) as pool:
        pid = pool.apply(leave, (make(9),))
        os.kill(pid, signal.SIGKILL)
        until(lambda: bool(pool.pids()) and pid not in pool.pids())
        until(lambda: session.current().arena.lent == 0)
        assert pool.map(first, [make(x) for x in range(5)]) == list(range(5))
        go.touch()
        until(lambda: out.exists() and out.stat().st_size == SIZE)
        assert out.read_bytes() == bytes([9]) * SIZE


def test_a_worker_that_ends_gives_back_what_it_was_lent() -> None:
    arena = session.current().arena
    with fiber.Pool(1) as pool:
        assert pool.map(first, [make(x) for x in range(4)]) == list(range(4))
        pool.close()
        pool.join()
    assert arena.lent == 0
    assert arena.backed == used() > 0  # it is there for the next


def test_a_fork_of_the_master_sees_results_as_they_were(pool: fiber.Pool) -> None:
    results = pool.map(make, range(5))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        good = all(map(is_all, range(5), results))
        results.clear()
        gc.collect()
        os._exit(0 if good else 1)
    os.close(reader)
    del results
    for _ in range(5):
        pool.map(make, range(100, 110))
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_workers_that_are_killed_leave_no_memory(pool: fiber.Pool) -> None:
    pool.map(keep, [make(x) for x in range(8)], chunksize=1)
    results = pool.map(make, range(8))
    pids = pool.pids()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    again = pool.map(make, range(8))  # by others
    until(lambda: not set(pids) & set(pool.pids()))
    until(lambda: session.current().arena.lent == 0)
    names = {path.parent.name for path in lent_files()}
    assert not names & {f"{pid}-worker.lent" for pid in pids}
    assert all(map(is_all, range(8), results))
    assert all(map(is_all, range(8), again))


def test_random_kills_cost_no_result_and_no_memory() -> None:
    fiber.config.shared_memory_mb = 16
    most = 0
    with fiber.Pool(3, retries=1000) as pool:
        kept: list[Array] = []
        calls = [(make(x), x) for x in range(50)]
        for round in range(8):
            results: Iterator[Any] = pool.imap(_turn, calls)
            for at, result in enumerate(results):
                assert is_all(at + 1, result)
                if at % 10 == 0:
                    kept.append(result)
                if at % 17 == round:
                    with contextlib.suppress(IndexError, ProcessLookupError):
                        os.kill(pool.pids()[at % 3], signal.SIGKILL)
                most = max(most, session.current().arena.backed)
            assert used() <= 5 * 16 << 20
        assert [first(array) for array in kept] == [x + 1 for x in range(0, 50, 10)] * 8
        own = session.current().arena
        until(lambda: own.lent == 0)
        assert 0 < most <= 16 << 20


def _turn(call: tuple[Array, int]) -> Array:
    array, x = call
    assert is_all(x, array)
    array.memory[:] = bytes([x + 1]) * len(array.memory)
    return array
