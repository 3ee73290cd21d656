"""Memory that is lent is recycled, bounded, given up when idle; and when it is full nobody dies."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fiber.wire import arena as module
from fiber.wire.arena import LEAST, Arena, Loan, remove

MB = 1 << 20


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in shared memory, or on disk where there is none."""
    import shutil
    import tempfile

    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    path = Path(tempfile.mkdtemp(prefix="test-arena-", dir=base))
    yield path
    shutil.rmtree(path)


def lend(arena: Arena, data: bytes) -> Loan | None:
    return arena.lend([data], len(data))


def lent(arena: Arena, data: bytes) -> Loan:
    loan = lend(arena, data)
    assert loan is not None
    return loan


def read(loan: Loan) -> bytes:
    with open(loan.path, "rb") as file:
        file.seek(loan.offset)
        return file.read(loan.size)


def used(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_what_is_lent_is_there(memory: Path) -> None:
    arena = Arena(lambda: str(memory), "a")
    whole = arena.lend([b"ab" * MB, b"c"], 2 * MB + 1)
    assert whole is not None
    others = [lent(arena, bytes([n]) * (LEAST + n)) for n in range(20)]
    assert read(whole) == b"ab" * MB + b"c"
    assert [read(loan) for loan in others] == [bytes([n]) * (LEAST + n) for n in range(20)]
    assert all(loan.offset % 4096 == 0 for loan in others)
    arena.close()
    assert list(memory.iterdir()) == []


def test_blocks_are_used_again_the_last_one_first(memory: Path) -> None:
    arena = Arena(lambda: str(memory), "a")
    first, second = lent(arena, bytes(MB)), lent(arena, bytes(MB))
    for loan in (first, second):
        arena.take_back(loan.id)
    again = lent(arena, bytes(MB - 1))
    assert again[1:3] == second[1:3]
    assert again.id not in (first.id, second.id)
    arena.close()


def test_there_is_a_bound(memory: Path) -> None:
    arena = Arena(lambda: str(memory), "a", lambda: 4 * MB)
    loans = [lent(arena, bytes(MB)) for _ in range(4)]
    assert lend(arena, bytes(MB)) is None
    assert arena.backed == arena.lent == 4 * MB
    arena.take_back(loans.pop().id)
    loans.append(lent(arena, bytes(MB)))
    assert lend(arena, bytes(5 * MB)) is None
    for loan in loans:
        arena.take_back(loan.id)
    assert lent(arena, bytes(3 * MB))  # what was idle of another size made room
    assert arena.lent == 3 * MB
    assert used(memory) <= arena.backed <= 4 * MB
    arena.close()


def test_nothing_is_lent_if_nothing_may_be(memory: Path) -> None:
    asked = []

    def folder() -> str:
        asked.append(1)
        return str(memory)

    arena = Arena(folder, "a", lambda: 0)
    assert lend(arena, bytes(MB)) is None
    assert not asked  # which would make it
    assert list(memory.iterdir()) == []
    arena.close()


def test_what_is_idle_is_given_up_and_what_is_needed_stays(memory: Path) -> None:
    arena = Arena(lambda: str(memory), "a")
    loans = [lent(arena, bytes([n]) * MB) for n in range(10)]
    kept = loans.pop(3)
    for loan in loans:
        arena.take_back(loan.id)
    assert arena.tick()  # they were in use since the last one
    assert arena.backed == 10 * MB
    for _ in range(3):
        busy = [lent(arena, bytes(MB)) for _ in range(2)]
        for loan in busy:
            arena.take_back(loan.id)
        assert arena.tick()
    assert arena.backed == 3 * MB  # the two, and what is kept
    assert used(memory) == 3 * MB
    assert read(kept) == bytes([3]) * MB
    arena.take_back(kept.id)
    arena.tick()
    assert not arena.tick()
    assert arena.backed == arena.lent == used(memory) == 0
    assert read(lent(arena, b"x" * MB)) == b"x" * MB
    arena.close()


def test_what_a_fork_may_see_is_not_written_to_again(memory: Path) -> None:
    arena = Arena(lambda: str(memory), "a")
    loans = [lent(arena, bytes(MB)) for _ in range(3)]
    with open(loans[0].path, "rb") as file:  # as the fork sees it
        arena.take_back(loans[0].id, forked=True)
        others = [lent(arena, b"x" * MB) for _ in range(5)]
        file.seek(loans[0].offset)
        assert file.read(MB) == bytes(MB)
        for loan in loans[1:]:
            arena.take_back(loan.id)
        assert not os.path.exists(loans[0].path)
        file.seek(loans[0].offset)
        assert file.read(MB) == bytes(MB)
    for loan in others:
        arena.take_back(loan.id)
    arena.tick()
    assert not arena.tick()
    assert arena.backed == arena.lent == 0
    arena.close()


def test_a_fork_keeps_no_more_than_what_it_may_see(memory: Path) -> None:
    arena = Arena(lambda: str(memory), "a")
    loans = [lent(arena, bytes([n]) * MB) for n in range(6)]
    arena.take_back(loans[5].id)
    arena.take_back(loans[0].id, forked=True)
    assert arena.backed == used(memory) == 5 * MB
    arena.take_back(loans[1].id)
    arena.take_back(loans[2].id, forked=True)
    assert arena.backed == used(memory) == 4 * MB
    assert [read(loans[n])[:1] for n in (0, 2, 3, 4)] == [b"\0", b"\2", b"\3", b"\4"]
    for n in (3, 4):
        arena.take_back(loans[n].id)
    assert arena.backed == arena.lent == used(memory) == 0
    assert not arena.tick()
    arena.close()


def test_a_piece_that_cannot_be_copied_costs_no_memory(memory: Path) -> None:
    arena = Arena(lambda: str(memory), "a")
    with pytest.raises(BufferError):
        arena.lend([memoryview(bytes(2 * MB))[::2]], MB)  # type: ignore[list-item]
    arena.tick()
    assert not arena.tick()
    assert arena.backed == arena.lent == 0
    arena.close()


def test_memory_that_is_full_of_what_is_idle_is_used(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena(lambda: str(memory), "a")
    loans = [lent(arena, bytes(MB)) for _ in range(4)]
    for loan in loans[1:]:
        arena.take_back(loan.id)
    real = os.posix_fallocate

    def small(fd: int, offset: int, size: int) -> None:
        if used(memory) + size > 4 * MB:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", small)
    assert read(lent(arena, b"x" * 2 * MB)) == b"x" * 2 * MB
    assert read(loans[0]) == bytes(MB)
    arena.close()


def test_memory_that_is_full_is_no_more_than_a_no(
    memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = Arena(lambda: str(memory), "a")
    kept = lent(arena, b"x" * MB)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert lend(arena, bytes(MB)) is None
    assert arena.backed == MB
    monkeypatch.setattr(module, "_REST", 0.0)  # it is tried again, after a while
    assert lend(arena, bytes(MB)) is not None
    assert read(kept) == b"x" * MB
    arena.close()


def test_a_folder_that_cannot_be_had_is_a_no() -> None:
    def none() -> str:
        raise FileNotFoundError(2, "no")

    assert lend(Arena(none, "a"), bytes(MB)) is None


def test_others_remove_what_a_dead_process_lent(memory: Path) -> None:
    lent(Arena(lambda: str(memory), "7"), bytes(MB))
    lent(Arena(lambda: str(memory), "77"), bytes(MB))
    remove(str(memory), "7")
    assert [path.name for path in memory.iterdir()] == ["77.lent"]
    remove(str(memory), "7")


def test_what_comes_back_after_the_end_is_no_error(memory: Path) -> None:
    arena = Arena(lambda: str(memory), "a")
    loan = lent(arena, bytes(MB))
    arena.close()
    arena.take_back(loan.id)
    assert not arena.tick()


@pytest.mark.parametrize("size", [LEAST, LEAST + 1, 8_000_000, 8 * MB, (1 << 30) + 1])
def test_a_block_is_little_more_than_what_it_is_for(size: int) -> None:
    capacity = module._capacity(size)
    assert size <= capacity <= size * 1.13 + 4096
    assert capacity % 4096 == 0
