"""What processes print reaches the user, as multiprocessing's do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]
BUFFERED = {"PYTHONUNBUFFERED": ""}  # whatever this machine's setting is


def test_both_streams_reach_pipes(run_script: Run) -> None:
    done = run_script(
        """
import fiber, sys

def child():
    print("to stdout")
    print("to stderr", file=sys.stderr)

if __name__ == "__main__":
    process = fiber.Process(target=child)
    process.start()
    process.join()
"""
    )
    assert (done.stdout, done.stderr) == ("to stdout\n", "to stderr\n")


def test_both_streams_reach_files(run_script: Run, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        run_script(
            """
import fiber, os

def child():
    print("printed")
    os.write(1, b"written\\n")
    os.system("echo from a command; echo its errors >&2")

if __name__ == "__main__":
    fiber.Process(target=child).start()
""",
            env=BUFFERED,
            stdout=out,
            stderr=err,
        )
    # The child's buffer goes out at its end, after what went past it: as in multiprocessing.
    assert (tmp_path / "out").read_text() == "written\nfrom a command\nprinted\n"
    assert (tmp_path / "err").read_text() == "its errors\n"


def test_flushed_output_keeps_its_order(run_script: Run) -> None:
    done = run_script(
        """
import fiber, subprocess

def say(what):
    print(what, flush=True)

if __name__ == "__main__":
    for number in range(5):
        print("parent", number, flush=True)
        process = fiber.Process(target=say, args=(f"child {number}",))
        process.start()
        process.join()
        print("parent again", number, flush=True)
"""
    )
    expected = [f"{who} {n}" for n in range(5) for who in ("parent", "child", "parent again")]
    assert done.stdout.splitlines() == expected


def test_what_the_parent_has_not_flushed_is_printed_once(run_script: Run) -> None:
    done = run_script(
        """
import fiber

def say(what):
    print(what)

if __name__ == "__main__":
    print("parent, buffered")
    for number in range(3):
        process = fiber.Process(target=say, args=(number,))
        process.start()
        process.join()
""",
        env=BUFFERED,
    )
    assert sorted(done.stdout.splitlines()) == ["0", "1", "2", "parent, buffered"]


def test_what_the_main_module_prints_on_loading_is_not_printed_by_each_child(
    run_script: Run,
) -> None:
    done = run_script(
        """
import fiber
print("module", __name__)

def nothing(): pass

if __name__ == "__main__":
    for _ in range(3):
        process = fiber.Process(target=nothing)
        process.start()
        process.join()
""",
        env=BUFFERED,
    )
    # The agent loads it once; no child prints the same buffer again.
    assert sorted(done.stdout.splitlines()) in (
        ["module __main__", "module __mp_main__"],
        ["module __main__"],
    )


def test_a_stream_redirected_by_dup2_is_that_of_the_next_child(
    run_script: Run, tmp_path: Path
) -> None:
    done = run_script(
        """
import fiber, os

def say(what):
    print(what, flush=True)

def run(what):
    process = fiber.Process(target=say, args=(what,))
    process.start()
    process.join()

if __name__ == "__main__":
    run("before")
    kept = os.dup(1)
    file = os.open("file", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    run("into the file")
    os.dup2(kept, 1)
    run("after")
"""
    )
    assert done.stdout == "before\nafter\n"
    assert (tmp_path / "file").read_text() == "into the file\n"


def test_a_child_that_redirects_its_stream_leaves_the_parent_s_alone(
    run_script: Run, tmp_path: Path
) -> None:
    done = run_script(
        """
import fiber, os

def redirect():
    os.dup2(os.open("file", os.O_WRONLY | os.O_CREAT), 1)
    print("child")

if __name__ == "__main__":
    process = fiber.Process(target=redirect)
    process.start()
    process.join()
    print("parent")
"""
    )
    assert done.stdout == "parent\n"
    assert (tmp_path / "file").read_text() == "child\n"


def test_closed_streams_are_no_reason_not_to_start(run_script: Run, tmp_path: Path) -> None:
    run_script(
        """
import fiber, os

def child(path):
    print("into the void")
    open(path, "w").close()

if __name__ == "__main__":
    os.close(1)
    os.close(2)
    process = fiber.Process(target=child, args=("done",))
    process.start()
    process.join()
    os._exit(process.exitcode)
"""
    )
    assert (tmp_path / "done").exists()


def test_the_streams_end_with_the_program(start_script: Run) -> None:
    # Whoever reads them to their end would wait for a process that holds them longer.
    program = start_script(
        """
import fiber

def nothing(): pass

if __name__ == "__main__":
    fiber.Process(target=nothing).start()
    print("end")
"""
    )
    out, err = program.communicate(timeout=20)
    assert (out, err) == ("end\n", "")


def test_a_child_does_not_read_the_parent_s_input(run_script: Run) -> None:
    done = run_script(
        """
import fiber, sys

def read():
    print(repr(sys.stdin.read()), flush=True)

if __name__ == "__main__":
    process = fiber.Process(target=read)
    process.start()
    process.join()
    print(repr(sys.stdin.read()))
""",
        input="for the parent",
    )
    assert done.stdout == "''\n'for the parent'\n"


def test_a_long_line_of_output_arrives_whole(run_script: Run) -> None:
    done = run_script(
        """
import fiber

def much():
    print("x" * 1_000_000)

if __name__ == "__main__":
    fiber.Process(target=much).start()
"""
    )
    assert done.stdout == "x" * 1_000_000 + "\n"


def test_a_reader_that_went_away_is_the_child_s_trouble_alone(start_script: Run) -> None:
    read_end, write_end = os.pipe()
    program = start_script(
        """
import fiber, sys

def much():
    print("x" * 1_000_000, flush=True)

if __name__ == "__main__":
    process = fiber.Process(target=much)
    process.start()
    process.join()
    print(process.exitcode, file=sys.stderr)
""",
        stdout=write_end,
    )
    os.close(write_end)
    os.close(read_end)
    assert program.stdout is None
    _, err = program.communicate(timeout=20)
    assert "BrokenPipeError" in err
    assert err.splitlines()[-1] == "1"


def test_output_reaches_a_terminal(start_script: Run) -> None:
    import pty

    ours, theirs = pty.openpty()
    program: subprocess.Popen[str] = start_script(
        """
import fiber, os

def child():
    print("terminal:", os.isatty(1), os.isatty(2), flush=True)

if __name__ == "__main__":
    fiber.Process(target=child).start()
""",
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    assert program.wait(20) == 0
    assert os.read(ours, 1000) == b"terminal: True True\r\n"
    os.close(ours)
