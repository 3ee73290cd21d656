"""Functions and classes of `__main__`, in each way that there is to run a program.

Each way runs the same program: what it defines must be found by its processes, and an object that
comes home must be of the class that it was.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.process.programs import GUARDED, IN_A_FUNCTION, UNDER_THE_GUARD, UNGUARDED, well

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[..., Any]


@pytest.fixture
def python(tmp_path: Path) -> Run:
    """Run `python *arguments` in tmp_path."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **options,
        )

    return run


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(GUARDED, id="guarded"),
        pytest.param(UNGUARDED, id="unguarded"),
        pytest.param(UNDER_THE_GUARD, id="all under the guard"),
        pytest.param(IN_A_FUNCTION, id="in a function"),
    ],
)
def test_a_script(source: str, run_script: Run) -> None:
    assert well(run_script(source))


@pytest.mark.parametrize("source", [GUARDED, UNGUARDED], ids=["guarded", "unguarded"])
def test_a_module_of_a_package(source: str, python: Run, tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "other.py").write_text("NUMBER = 1\n")
    (package / "mod.py").write_text("from .other import NUMBER\n" + source)
    assert well(python("-m", "pkg.mod"))


@pytest.mark.parametrize("source", [GUARDED, UNGUARDED], ids=["guarded", "unguarded"])
def test_a_package_with_a_main(source: str, python: Run, tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(source)
    assert well(python("-m", "pkg"))


def test_a_folder_with_a_main(python: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(GUARDED)
    assert well(python("folder"))


def test_a_zip_file_with_a_main(python: Run, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "program.pyz", "w") as file:
        file.writestr("__main__.py", GUARDED)
    assert well(python("program.pyz"))


@pytest.mark.parametrize("source", [GUARDED, UNGUARDED], ids=["guarded", "unguarded"])
def test_a_command_line(source: str, python: Run) -> None:
    assert well(python("-c", source))


@pytest.mark.parametrize("source", [GUARDED, UNGUARDED], ids=["guarded", "unguarded"])
def test_standard_input(source: str, python: Run) -> None:
    assert well(python("-", input=source))


def test_a_script_run_by_runpy(python: Run, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(GUARDED)
    assert well(python("-c", "import runpy; runpy.run_path('script.py', run_name='__main__')"))


def test_isolated_mode(python: Run, tmp_path: Path) -> None:
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
    (tmp_path / "script.py").write_text(path + GUARDED)
    assert well(python("-I", "script.py"))


# Without a guard -------------------------------------------------------------------------------


def test_an_unguarded_program_runs_once(run_script: Run) -> None:
    done = run_script(
        """
import fiber
def child():
    print("child", flush=True)
print("before", __name__, flush=True)
process = fiber.Process(target=child)
process.start()
process.join()
print("after", __name__, flush=True)
"""
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.endswith("__mp_main__")] == [
        "before __main__",
        "child",
        "after __main__",
    ]
    assert "after __mp_main__" not in lines
    assert (done.stderr, done.returncode) == ("", 0)


def test_what_an_unguarded_program_defines_after_its_first_process_is_found(
    run_script: Run,
) -> None:
    done = run_script(
        """
import fiber
process = fiber.Process(target=print, args=("first",))
process.start()
process.join()

class Late:
    def __init__(self, word):
        self.word = word

def late(thing):
    assert isinstance(thing, Late)
    return Late(thing.word.upper())

with fiber.Pool(1) as pool:
    (result,) = pool.map(late, [Late("word")])
print(type(result) is Late, result.word)
"""
    )
    assert (done.stdout, done.stderr) == ("first\nTrue WORD\n", "")


def test_a_try_around_an_unguarded_start_does_not_start_twice(run_script: Run) -> None:
    done = run_script(
        """
import fiber
def child():
    print("child", flush=True)
try:
    process = fiber.Process(target=child)
    process.start()
    process.join()
except Exception as error:
    print("caught", error, flush=True)
finally:
    pass
"""
    )
    assert (done.stdout, done.stderr) == ("child\n", "")


def test_an_unguarded_pool_with_an_initializer_that_sets_a_global(run_script: Run) -> None:
    done = run_script(
        """
import fiber
state = None

def begin(value):
    global state
    state = value

def use(number):
    return state + number

with fiber.Pool(2, begin, (100,)) as pool:
    print(pool.map(use, range(3)))
print(state)
"""
    )
    assert (done.stdout, done.stderr) == ("[100, 101, 102]\nNone\n", "")


def test_a_global_set_under_the_guard_is_not_the_child_s(run_script: Run) -> None:
    # As multiprocessing's spawn: the child's module is loaded, not copied.
    done = run_script(
        """
import fiber
value = "as loaded"
def show():
    print(value, flush=True)
if __name__ == "__main__":
    value = "changed"
    process = fiber.Process(target=show)
    process.start()
    process.join()
"""
    )
    assert done.stdout == "as loaded\n"


def test_in_a_process_name_is_not_main(run_script: Run) -> None:
    done = run_script(
        """
import fiber, sys
def show():
    print(__name__, sys.modules["__main__"].__name__, flush=True)
if __name__ == "__main__":
    process = fiber.Process(target=show)
    process.start()
    process.join()
"""
    )
    assert done.stdout.split()[0] == "__mp_main__"


# Where the script is ---------------------------------------------------------------------------


def test_a_program_that_changes_its_folder_before_the_first_start(
    python: Run, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "neighbour.py").write_text("WORD = 'neighbour'\n")
    (tmp_path / "script.py").write_text(
        """
import os, fiber
from neighbour import WORD

def child():
    print(WORD, os.path.basename(os.getcwd()), flush=True)

if __name__ == "__main__":
    os.chdir("elsewhere")
    process = fiber.Process(target=child)
    process.start()
    process.join()
    print(process.exitcode)
"""
    )
    done = python("script.py")
    assert (done.stdout, done.stderr) == ("neighbour elsewhere\n0\n", "")


def test_a_program_that_changes_its_folder_before_it_imports_fiber(
    python: Run, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "script.py").write_text(
        """
import os
os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), "elsewhere"))
import fiber

def child():
    print(os.path.basename(os.getcwd()), flush=True)

if __name__ == "__main__":
    process = fiber.Process(target=child)
    process.start()
    process.join()
    print(process.exitcode)
"""
    )
    done = python("script.py")
    assert (done.stdout, done.stderr) == ("elsewhere\n0\n", "")


def test_a_script_that_deletes_itself(run_script: Run) -> None:
    done = run_script(
        """
import os, fiber
os.unlink(__file__)

def child(word):
    print(word, flush=True)

if __name__ == "__main__":
    process = fiber.Process(target=child, args=("still here",))
    process.start()
    process.join()
"""
    )
    assert (done.stdout, done.stderr) == ("still here\n", "")


def test_a_name_with_spaces_and_umlauts(run_script: Run) -> None:
    assert well(run_script(GUARDED, name="mein schönes Skript.py"))


def test_a_script_without_a_suffix(run_script: Run) -> None:
    assert well(run_script(GUARDED, name="script"))
