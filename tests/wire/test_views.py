"""Views of a file: private, writable, exact, and known to be over when the last object goes."""

from __future__ import annotations

import gc
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fiber.wire import views as module
from fiber.wire.views import PAGE, Ended, Views


@pytest.fixture
def block(tmp_path: Path) -> Path:
    path = tmp_path / "block"
    path.write_bytes(b"a" * PAGE + b"b" * PAGE + b"c" * 100)
    return path


def tokens(views: Views) -> list[Any]:
    return [ended.token for ended in views.collect()]


def test_a_view_is_of_exactly_its_bytes(block: Path) -> None:
    views = Views()
    view = views.view(str(block), PAGE, 10, 1)
    assert bytes(view) == b"b" * 10
    assert view.format == "B"
    assert not view.readonly
    assert len(memoryview(view.obj)) == 10  # as classes look at it that use `memoryview.obj`


def test_what_is_written_stays_here_and_goes_with_the_view(block: Path) -> None:
    views = Views()
    path = str(block)
    before = block.read_bytes()
    view = views.view(path, 0, 10, 1)
    view[:] = b"z" * 10
    assert bytes(view) == b"z" * 10
    assert block.read_bytes() == before
    del view
    assert tokens(views) == [1]
    assert bytes(views.view(path, 0, 10, 2)) == b"a" * 10


def test_the_owner_may_write_anew_once_a_view_is_over(block: Path) -> None:
    views = Views()
    with open(block, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        for turn in range(20):
            memory[:10] = bytes([turn]) * 10
            view = views.view(str(block), 0, 10, turn)
            assert bytes(view) == bytes([turn]) * 10
            if turn % 3 == 0:
                view[5] = 255
            del view
            assert tokens(views) == [turn]


def test_a_view_lasts_as_long_as_anything_looks_into_it(block: Path) -> None:
    views = Views()
    view = views.view(str(block), 0, 10, "token")
    part = memoryview(view)[2:4].toreadonly()
    view.release()
    del view
    assert not views.ended
    assert views.collect() == []
    assert len(views) == 1
    assert bytes(part) == b"aa"
    del part
    assert views.ended
    assert views.collect() == [Ended("token", False)]
    assert len(views) == 0


def test_an_array_holds_its_view(block: Path) -> None:
    numpy = pytest.importorskip("numpy")
    views = Views()
    array = numpy.frombuffer(views.view(str(block), PAGE, 80, 7), dtype=numpy.uint8)
    assert array.flags.writeable
    part = array[3:5]
    del array
    gc.collect()
    assert tokens(views) == []
    part[0] = 1
    assert part.tolist() == [1, ord("b")]
    del part
    assert tokens(views) == [7]


def test_a_view_outlives_its_file_and_who_made_it(block: Path) -> None:
    views = Views()
    view = views.view(str(block), 2 * PAGE, 100, 1)
    views.forget(str(block))
    views.close()
    block.unlink()
    del views
    assert bytes(view) == b"c" * 100


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_is_forgotten_is_not_heard_of_and_not_kept_open(
    block: Path, tmp_path: Path, first: bool
) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(PAGE))
    views = Views()
    kept, *others = [views.view(str(block), n * PAGE, 10, n) for n in range(3)]
    its = views.view(str(other), 0, 10, "other")
    if first:
        others.pop()
    views.forget(str(block))
    others.clear()
    del its
    assert tokens(views) == ["other"]
    assert len(views) == 0
    assert bytes(kept) == b"a" * 10
    del kept
    assert not [line for line in maps() if line.endswith(str(block))]


def test_views_that_are_alone_do_not_see_each_other(block: Path) -> None:
    views = Views()
    one = views.view(str(block), 0, 10, 1, alone=True)
    two = views.view(str(block), 0, 10, 2, alone=True)
    one[:] = b"z" * 10
    assert bytes(two) == b"a" * 10
    del one
    assert tokens(views) == [1]


@pytest.mark.parametrize("name", ["_DROPS", "_was_written"])
def test_without_the_systems_help_all_the_same_holds(
    block: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(module, name, (lambda *_: True) if name == "_was_written" else False)
    test_what_is_written_stays_here_and_goes_with_the_view(block)
    test_the_owner_may_write_anew_once_a_view_is_over(block)


def test_what_was_written_goes_if_no_descriptor_is_left_to_look_for_it(block: Path) -> None:
    views = Views()
    view = views.view(str(block), 0, 10, 1)
    view[:] = b"z" * 10
    del view
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert tokens(views) == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert bytes(views.view(str(block), 0, 10, 2)) == b"a" * 10


def test_what_was_written_is_not_seen_again_if_it_cannot_be_dropped(
    block: Path, run_script: Callable[..., Any]
) -> None:
    program = """
import ctypes, sys
from fiber.wire.views import Views

views = Views()
view = views.view(sys.argv[1], 0, 10, 1)
view[:] = b"z" * 10
if ctypes.CDLL(None).mlockall(1):
    sys.exit("locked memory is not allowed here")
del view
print([ended.token for ended in views.collect()], bytes(views.view(sys.argv[1], 0, 10, 2)))
"""
    done = run_script(program, str(block))
    if "not allowed" in done.stderr:
        pytest.skip("memory cannot be locked here")
    assert done.stdout == "[1] b'aaaaaaaaaa'\n", done.stderr


def test_what_was_written_goes_where_faults_are_not_counted(
    block: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_faults", lambda: 0)
    test_what_is_written_stays_here_and_goes_with_the_view(block)


def test_files_that_are_not_used_are_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_MAPS", 3)
    views = Views()
    kept = []
    for number in range(10):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * PAGE)
        view = views.view(str(path), 0, PAGE, number)
        if number < 2:
            kept.append(view)
        del view
        views.collect()
    assert sum(os.path.dirname(line.split()[-1]) == str(tmp_path) for line in maps()) == 5
    assert [view[0] for view in kept] == [0, 1]


def test_there_is_a_bound_on_files_with_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_most_maps", lambda: 3)
    views = Views()
    paths = [tmp_path / str(number) for number in range(6)]
    for path in paths:
        path.write_bytes(path.name.encode() * 2 * PAGE)
        views.view(str(path), 0, PAGE, path.name)  # those without a view make room
        views.collect()
    kept = [views.view(str(path), 0, PAGE, path.name) for path in paths[:3]]
    with pytest.raises(OSError, match="too many"):
        views.view(str(paths[3]), 0, PAGE, "3")
    other = views.view(str(paths[2]), PAGE, PAGE, "more of it")
    views.forget(str(paths[0]))
    with pytest.raises(OSError, match="too many"):  # it is still there
        views.view(str(paths[3]), 0, PAGE, "3")
    kept.pop(0)
    assert bytes(views.view(str(paths[3]), 0, 1, "3")) == b"3"
    assert bytes(other[:1]) == b"2"


def test_the_bound_leaves_descriptors_to_others() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1000, hard), hard))
    try:
        assert module._UNTRACKED or module._most_maps() == min(1000, hard) // 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_folder_is_forgotten_with_its_files(tmp_path: Path) -> None:
    views = Views()
    paths = [tmp_path / name / "1" for name in ("gone", "gone2")]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(bytes(PAGE))
    kept = [views.view(str(path), 0, PAGE, path.parent.name) for path in paths]
    views.forget(str(tmp_path / "gone"))
    assert len(views) == 1
    kept.clear()
    assert tokens(views) == ["gone2"]
    assert not [line for line in maps() if line.endswith(str(paths[0]))]


def maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()


def test_a_fork_is_told_of_and_gives_nothing_back(
    block: Path, run_script: Callable[..., Any]
) -> None:
    program = """
import os, sys
from fiber.wire.views import Views

views = Views()
early = views.view(sys.argv[1], 0, 10, "early")
late = None
pid = os.fork()
if pid == 0:
    del early
    os._exit(len(views.collect()) + len(views))
late = views.view(sys.argv[1], 4096 * 0, 10, "late")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
del early, late
print(sorted(views.collect()))
"""
    done = run_script(program, str(block))
    assert done.stdout == (
        "0\n[Ended(token='early', forked=True), Ended(token='late', forked=False)]\n"
    ), done.stderr


@pytest.mark.parametrize("offset", [1, PAGE - 1])
def test_a_view_begins_with_a_page(block: Path, offset: int) -> None:
    with pytest.raises(ValueError, match="page"):
        Views().view(str(block), offset, 10, 1)


def test_what_is_not_there_is_told(block: Path, tmp_path: Path) -> None:
    views = Views()
    with pytest.raises(FileNotFoundError):
        views.view(str(tmp_path / "none"), 0, 10, 1)
    with pytest.raises(ValueError, match="small"):
        views.view(str(block), 2 * PAGE, 101, 1)
    assert len(views) == 0
