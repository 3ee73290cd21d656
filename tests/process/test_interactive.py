"""Functions and classes of an interactive session and of a notebook."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0
# Makes the terminal that is its standard input its own, so that Ctrl-C there is a signal.
CONTROL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
CONTROL += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
QUIET = {"TERM": "dumb", "PYTHON_BASIC_REPL": "1", "PYTHONSTARTUP": "", "PYTHONUNBUFFERED": ""}


class Terminal:
    """An interpreter at a terminal of its own."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", CONTROL, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env={**os.environ, **QUIET, "PYTHONPATH": str(ROOT / "src")},
            start_new_session=True,
        )
        os.close(theirs)
        self.read_to_prompt()

    def read_to_prompt(self, prompt: str = ">>> ") -> str:
        """Return what is written before the next prompt."""
        text = ""
        deadline = time.monotonic() + DEADLINE
        while not text.endswith(prompt):
            if not select.select([self._fd], [], [], max(0, deadline - time.monotonic()))[0]:
                pytest.fail(f"no prompt came; this did:\n{text}")
            try:
                text += os.read(self._fd, 4096).decode()
            except OSError:  # Linux's way to say that the other end is closed
                pytest.fail(f"the interpreter ended after this:\n{text}")
            text = text.replace("\r\n", "\n")
        return text[: -len(prompt)]

    def type(self, text: str) -> str:
        """Type a statement; return what it prints, without its echo."""
        lines = text.strip("\n").splitlines()
        many = len(lines) > 1
        for number, line in enumerate([*lines, ""] if many else lines):
            os.write(self._fd, line.encode() + b"\n")
            last = number == len(lines) if many else True
            answer = self.read_to_prompt(">>> " if last else "... ")
        return answer.partition("\n")[2]

    def leave(self) -> int:
        """Type the end of the input; return the exit code."""
        os.write(self._fd, b"\x04")
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        try:
            if self.process.poll() is None:
                self.leave()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait(DEADLINE)
            os.close(self._fd)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments, cwd=tmp_path))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_an_interactive_session(terminal: Callable[..., Terminal]) -> None:
    python = terminal("-q")
    python.type("import fiber")
    python.type("def child(word):\n    print('child says', word)")
    python.type("process = fiber.Process(target=child, args=('hello',))")
    python.type("process.start()")
    # The prompt may come before what the child prints or after it; join so that it is there.
    python.type("process.join()")
    assert python.type("process.exitcode") == "0\n"
    python.type("pool = fiber.Pool(2)")
    python.type("def f(n):\n    return n + 1")
    assert python.type("pool.map(f, range(3))") == "[1, 2, 3]\n"
    python.type("class P:\n    def __init__(self, x):\n        self.x = x")
    python.type("def g(p):\n    assert isinstance(p, P)\n    return P(-p.x)")
    assert python.type("r = pool.map(g, [P(1)]); type(r[0]) is P, r[0].x") == "(True, -1)\n"
    assert python.type("pool.map(lambda n: f(n) * 2, range(3))") == "[2, 4, 6]\n"
    python.type("def f(n):\n    return n + 100")
    assert python.type("pool.map(f, range(3))") == "[100, 101, 102]\n"
    assert python.type("pool.map(lambda n: f(n) * 2, range(3))") == "[200, 202, 204]\n"
    assert python.type("pool.terminate()") == ""
    assert python.leave() == 0


def test_what_a_process_prints_reaches_the_terminal(terminal: Callable[..., Terminal]) -> None:
    python = terminal("-q")
    python.type("import fiber")
    python.type("def child(word):\n    print('child says', word)")
    python.type("process = fiber.Process(target=child, args=('hello',))")
    assert "child says hello\n" in python.type("process.start(); process.join()")


def test_an_exception_at_the_prompt_does_not_harm_the_pool(
    terminal: Callable[..., Terminal],
) -> None:
    python = terminal("-q")
    python.type("import fiber; pool = fiber.Pool(2)")
    assert "ZeroDivisionError" in python.type("pool.map(lambda n: 1 / n, range(3))")
    assert python.type("pool.map(lambda n: n + 1, range(3))") == "[1, 2, 3]\n"
    # Left without closing the pool: nothing may keep the interpreter.
    assert python.leave() == 0


def test_a_script_that_becomes_interactive(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(
        """
import fiber
class P:
    def __init__(self, x):
        self.x = x
def g(p):
    assert isinstance(p, P)
    return P(-p.x)
if __name__ == "__main__":
    pool = fiber.Pool(1)
    print(type(pool.map(g, [P(1)])[0]) is P)
"""
    )
    python = terminal("-i", "script.py")
    assert python.type("type(pool.map(g, [P(1)])[0]) is P") == "True\n"
    python.type("def h(p):\n    assert isinstance(p, P)\n    return P(p.x * 10)")
    assert python.type("r = pool.map(h, [P(1)]); type(r[0]) is P, r[0].x") == "(True, 10)\n"
    assert python.leave() == 0


def test_ctrl_c_at_the_prompt_leaves_the_session_usable(terminal: Callable[..., Terminal]) -> None:
    python = terminal("-q")
    python.type("import fiber, time; pool = fiber.Pool(2)")
    assert python.type("pool.map(abs, [-1])") == "[1]\n"
    os.write(python._fd, b"print('be' + 'gun', flush=True); pool.map(time.sleep, [3600] * 2)\n")
    python.read_to_prompt("begun\n")
    os.write(python._fd, b"\x03")
    assert python.read_to_prompt().endswith("KeyboardInterrupt\n")
    assert python.type("fiber.Pool(1).map(abs, [-1])") == "[1]\n"


# A notebook ------------------------------------------------------------------------------------


class Notebook:
    """A real Jupyter kernel; `run` runs a cell and returns what it printed and its value."""

    def __init__(self, cwd: Path) -> None:
        from jupyter_client.manager import KernelManager

        self._manager = KernelManager()
        # The kernel of the interpreter that runs this test, wherever other kernels are installed.
        self._manager.kernel_spec.argv[0] = sys.executable  # type: ignore[union-attr]
        self._manager.start_kernel(
            cwd=str(cwd),
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "IPYTHONDIR": str(cwd)},
        )
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=DEADLINE)

    def run(self, cell: str) -> str:
        said: list[str] = []

        def hear(message: dict[str, dict[str, object]]) -> None:
            content = message["content"]
            kind = message["header"]["msg_type"]
            if kind == "stream":
                said.append(str(content["text"]))
            elif kind == "execute_result":
                said.append(str(content["data"]["text/plain"]))  # type: ignore[index]

        reply = self._client.execute_interactive(cell, output_hook=hear, timeout=DEADLINE)
        content = reply["content"]
        if content["status"] != "ok":
            said.append(f"{content['ename']}: {content['evalue']}")
        return "".join(said)

    def interrupt(self) -> None:
        """Press the stop button; from a thread of its own."""
        from jupyter_core.utils import ensure_event_loop

        self._manager.interrupt_kernel()
        ensure_event_loop().close()

    def close(self) -> None:
        from jupyter_core.utils import ensure_event_loop

        self._client.stop_channels()
        self._manager.shutdown_kernel(now=False)
        self._manager.cleanup_resources()
        self._client.context.destroy(linger=0)
        self._manager.context.destroy(linger=0)
        ensure_event_loop().close()  # jupyter_client keeps one for each thread, for good


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    pytest.importorskip("jupyter_client")
    pytest.importorskip("ipykernel")
    opened = Notebook(tmp_path)
    yield opened
    opened.close()


@pytest.mark.filterwarnings("default")  # those of jupyter_client are not ours
def test_a_notebook(notebook: Notebook) -> None:
    run = notebook.run
    assert run("import fiber\npool = fiber.Pool(2)") == ""

    # Functions, lambdas, closures.
    run("def helper(n):\n    return n + 1\ndef f(n):\n    return helper(n)")
    assert run("pool.map(f, range(3))") == "[1, 2, 3]"
    assert run("pool.map(lambda n: helper(n) * 2, range(3))") == "[2, 4, 6]"
    run("def outer(step):\n    def inner(n):\n        return helper(n) + step\n    return inner")
    assert run("pool.map(outer(10), range(3))") == "[11, 12, 13]"

    # A helper is changed between two calls on the same pool, and a variable.
    run("def helper(n):\n    return n + 100")
    assert run("pool.map(f, range(3))") == "[100, 101, 102]"
    run("scale = 2\ndef g(n):\n    return n * scale")
    assert run("pool.map(g, range(3))") == "[0, 2, 4]"
    run("scale = 3")
    assert run("pool.map(g, range(3))") == "[0, 3, 6]"

    # Classes keep their identity both ways; a class that is defined anew is another one.
    run("class P:\n    def __init__(self, x):\n        self.x = x")
    run("def h(p):\n    assert isinstance(p, P), type(p)\n    return P(-p.x)")
    again = "r = pool.map(h, [P(1), P(2)])\n([type(p) is P for p in r], [p.x for p in r])"
    assert run(again) == "([True, True], [-1, -2])"
    assert run(again) == "([True, True], [-1, -2])"
    run("class P:\n    def __init__(self, x):\n        self.x = x * 10")
    assert run(again) == "([True, True], [-100, -200])"

    # A subclass of Process, and what it prints.
    run("class W(fiber.Process):\n    def run(self):\n        raise SystemExit(helper(5))")
    assert run("w = W(); w.start(); w.join(); w.exitcode") == "105"

    # An error is its own, of a class of the notebook.
    run("class Trouble(Exception):\n    pass\ndef t(n):\n    raise Trouble(n)")
    assert run("pool.map(t, [7])") == "Trouble: 7"
    caught = "try:\n    pool.map(t, [7])\nexcept Trouble as e:\n    print('caught', e.args)"
    assert run(caught) == "caught (7,)\n"
    assert run("pool.terminate(); pool.join()") == ""


@pytest.mark.filterwarnings("default")
def test_an_initializer_in_a_notebook_sets_a_global(notebook: Notebook) -> None:
    run = notebook.run
    run("import fiber\nstate = None")
    run("def begin(value):\n    global state\n    state = value")
    run("def use(n):\n    return state + n")
    run("pool = fiber.Pool(2, begin, (100,))")
    assert run("pool.map(use, range(4))") == "[100, 101, 102, 103]"
    assert run("pool.map(lambda n: state * n, range(3))") == "[0, 100, 200]"
    assert run("print(state)") == "None\n"


@pytest.mark.filterwarnings("default")
def test_a_count_kept_in_a_worker_of_a_notebook_lives_on(notebook: Notebook) -> None:
    run = notebook.run
    run("import fiber\ncount = 0\npool = fiber.Pool(1)")
    run("def tick(_):\n    global count\n    count += 1\n    return count")
    assert run("pool.map(tick, range(3))") == "[1, 2, 3]"
    assert run("pool.map(tick, range(3))") == "[4, 5, 6]"
    assert run("count") == "0"
    # Bound anew at home, it is sent anew.
    run("count = 50")
    assert run("pool.map(tick, range(2))") == "[51, 52]"


@pytest.mark.filterwarnings("default")
def test_an_interrupted_notebook_goes_on(notebook: Notebook) -> None:
    run = notebook.run
    run("import fiber, time\npool = fiber.Pool(2)")
    assert run("pool.map(abs, [-1])") == "[1]"
    timer = threading.Timer(1, notebook.interrupt)
    timer.start()
    assert run("pool.map(time.sleep, [3600] * 4)").startswith("KeyboardInterrupt")
    timer.join()
    assert run("with fiber.Pool(1) as other: print(other.map(abs, [-1]))") == "[1]\n"
