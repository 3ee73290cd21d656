"""A process sees its parent's surroundings as they are when it is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.process import targets

import fiber

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@pytest.fixture
def said(tmp_path: Path) -> Callable[..., list[str]]:
    def ask(*what: str) -> list[str]:
        path = tmp_path / "said"
        process = fiber.Process(target=targets.report, args=(path, *what))
        process.start()
        process.join(30)
        assert process.exitcode == 0
        return path.read_text().splitlines()

    return ask


def test_the_next_process_sees_a_changed_environment(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    what = "os.environ.get('COLOUR')"
    assert said(what) == ["None"]
    monkeypatch.setenv("COLOUR", "grün")
    assert said(what) == ["grün"]
    monkeypatch.setenv("COLOUR", "")
    assert said(what) == [""]
    monkeypatch.delenv("COLOUR")
    assert said(what) == ["None"]


def test_the_environment_is_that_of_commands_too(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said("os.getpid()")
    monkeypatch.setenv("COLOUR", "blue")
    assert said("os.popen('echo $COLOUR').read().strip()") == ["blue"]


def test_a_change_of_the_environment_in_a_process_stays_there(
    said: Callable[..., list[str]],
) -> None:
    assert said("os.environ.setdefault('COLOUR', 'red')") == ["red"]
    assert said("os.environ.get('COLOUR')") == ["None"]
    assert "COLOUR" not in os.environ


def test_the_next_process_sees_a_changed_folder(
    said: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said("os.getcwd()") == [os.getcwd()]
    monkeypatch.chdir(tmp_path)
    assert said("os.getcwd()") == [str(tmp_path)]


def test_the_next_process_sees_a_changed_path_and_arguments(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said("sys.argv == " + repr(sys.argv)) == ["True"]
    monkeypatch.setattr(sys, "argv", ["program", "--option"])
    monkeypatch.syspath_prepend("/nowhere")
    assert said("sys.argv", "sys.path[0]") == ["['program', '--option']", "/nowhere"]


def test_a_process_gets_the_configuration(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fiber.config.retries = 7
    assert said("fiber.config.retries") == ["7"]
    fiber.config.retries = 8
    assert said("fiber.config.retries") == ["8"]


def test_no_secret_is_in_the_environment_or_on_a_command_line(
    said: Callable[..., list[str]],
) -> None:
    names, command = said(
        "[name for name in os.environ if name.startswith('FIBER_INTERNAL_') "
        "and name != 'FIBER_INTERNAL_THREAD_VARIABLES']",
        "open('/proc/self/cmdline').read()" if sys.platform == "linux" else "''",
    )
    assert names == "[]"
    from fiber.runtime import session

    assert session.secret().hex() not in command


# Thread counts ---------------------------------------------------------------------------------


@pytest.fixture
def no_thread_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.endswith(("_NUM_THREADS", "_MAX_THREADS", "_MAXIMUM_THREADS")):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_thread_counts")
def test_numerical_libraries_use_one_thread(said: Callable[..., list[str]]) -> None:
    assert said(*[f"os.environ[{name!r}]" for name in THREADS]) == ["1", "1", "1"]
    assert not set(THREADS) & os.environ.keys()


@pytest.mark.usefixtures("no_thread_counts")
def test_the_user_s_thread_count_is_kept(
    said: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert said(*[f"os.environ[{name!r}]" for name in THREADS]) == ["5", "1", "1"]


@pytest.mark.usefixtures("no_thread_counts")
def test_the_thread_count_follows_the_configuration(said: Callable[..., list[str]]) -> None:
    assert said("os.environ['OMP_NUM_THREADS']") == ["1"]
    fiber.config.cpu_per_job = 3
    assert said("os.environ['OMP_NUM_THREADS']") == ["3"]


@pytest.mark.usefixtures("no_thread_counts")
def test_the_thread_count_follows_meta(tmp_path: Path) -> None:
    path = tmp_path / "count"

    @fiber.meta(cpu=2)
    def two() -> None:
        nested = fiber.Process(target=targets.report, args=(path, "os.environ['OMP_NUM_THREADS']"))
        nested.start()
        nested.join()
        with path.open("a") as file:
            file.write(os.environ["OMP_NUM_THREADS"])

    process = fiber.Process(target=two)
    process.start()
    process.join(30)
    # Its child asked for nothing and gets the default.
    assert path.read_text() == "1\n2"


@pytest.mark.usefixtures("no_thread_counts")
def test_the_thread_count_of_a_subclass_follows_meta_of_its_run(tmp_path: Path) -> None:
    path = tmp_path / "count"

    class Two(fiber.Process):
        @fiber.meta(cpu=2)
        def run(self) -> None:
            path.write_text(os.environ["OMP_NUM_THREADS"])

    process = Two()
    process.start()
    process.join(30)
    assert path.read_text() == "2"


@pytest.mark.usefixtures("no_thread_counts")
def test_the_user_s_thread_count_wins_over_meta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    path = tmp_path / "count"

    @fiber.meta(cpu=2)
    def two() -> None:
        path.write_text(os.environ["OMP_NUM_THREADS"] + os.environ["MKL_NUM_THREADS"])

    process = fiber.Process(target=two)
    process.start()
    process.join(30)
    assert path.read_text() == "52"


@pytest.mark.usefixtures("no_thread_counts")
def test_a_library_loaded_by_the_main_module_has_the_thread_count(
    run_script: Callable[..., object],
) -> None:
    # The variables must be there before the module is loaded in which the library is imported.
    done = run_script(
        """
import fiber, os
seen = os.environ.get("OMP_NUM_THREADS")

@fiber.meta(cpu=2)
def two():
    print(seen)

def one():
    print(seen)

if __name__ == "__main__":
    for target in (one, two, one):
        process = fiber.Process(target=target)
        process.start()
        process.join()
"""
    )
    assert done.stdout.split() == ["1", "2", "1"]  # type: ignore[attr-defined]
