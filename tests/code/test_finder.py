"""Imports of the project's modules on a Python that has none of its files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tests.code.conftest import Job, Master

from fiber.code import protocol
from fiber.code.finder import Client, Finder
from fiber.wire.channel import Channel

ELSEWHERE = """
import os, pickle, socket, sys

def connect():
    from fiber.wire.auth import CallerHandshake
    from fiber.wire.channel import Channel
    from fiber.wire.tls import TlsSocket, client_context

    host, _, port = os.environ["FIBER_INTERNAL_MASTER"].split()[0].rpartition(":")
    context = client_context(os.environ["FIBER_INTERNAL_CERTIFICATE"].encode())
    sock = TlsSocket(socket.create_connection((host, int(port))), context, server_side=False)
    sock.handshake()
    with open(os.environ["FIBER_INTERNAL_SECRET_FILE"], "rb") as file:
        handshake = CallerHandshake(file.read())
    while not handshake.done:
        sock.sendall(handshake.feed(sock.recv(handshake.wants)))
    channel = Channel(sock)
    channel.send(1, pickle.dumps({"service": "code"}))
    return channel

def main(sock):
    from fiber.code.finder import Client, Finder
    from fiber.wire.channel import Channel

    client = Client(connect, Channel(sock))
    sys.meta_path.insert(0, Finder(os.environ["TOPS"].split(), client.module))
    names = {"__name__": "program", "client": client}
    exec(compile(os.environ["PROGRAM"], "program", "exec"), names)
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], Path]:
    """Write the files of a project into a folder of `sys.path`, and return the folder."""
    folder = tmp_path / "home" / "project"

    def write(files: Mapping[str, str]) -> Path:
        for name, source in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return write


@pytest.fixture
def run(job: Job) -> Run:
    """Run a program in a job that has a Finder for some top-level names: `run(program, tops)`."""

    def run(
        program: str, *tops: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        settings = {"PROGRAM": program, "TOPS": " ".join(tops), **(environment or {})}
        flags = ("-S",) if "PYTHONPATH" in settings else ("-I", "-S")
        return job(ELSEWHERE, settings, flags=flags)

    return run


PACKAGE = {
    "sim/__init__.py": "from .core import step\nfrom . import tools\n",
    "sim/core.py": "from .tools.deep import twice\n\ndef step(x):\n    return twice(x) + 1\n",
    "sim/tools/__init__.py": "",
    "sim/tools/deep.py": "from ..data import SCALE\n\ndef twice(x):\n    return SCALE * x\n",
    "sim/data.py": "SCALE = 2\n",
}


def test_a_package_with_relative_imports(
    project: Callable[..., Path], run: Run, master: Master
) -> None:
    folder = project(PACKAGE)
    done = run(
        "import sim, sim.tools.deep\n"
        "print(sim.step(20), sim.__file__, sim.__path__, sim.__spec__.name, sim.__package__)\n"
        "print(sim.tools.deep.__spec__.parent)\n",
        "sim",
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"41 {folder}/sim/__init__.py ['{folder}/sim'] sim sim"
    assert second == "sim.tools"
    asked = master.modules_asked()
    assert sorted(asked) == ["sim", "sim.core", "sim.data", "sim.tools", "sim.tools.deep"]
    assert len(master.hellos) == 1  # by the connection that brought Fiber


def test_a_namespace_package_joins_what_the_image_has(
    project: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    project({"company/mine/__init__.py": "NAME = 'mine'\n"})
    theirs = tmp_path / "image" / "company" / "theirs.py"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("NAME = 'theirs'\n")
    done = run(
        "import company.mine, company.theirs\nprint(company.mine.NAME, company.theirs.NAME)",
        "company",
        environment={"PYTHONPATH": str(tmp_path / "image")},
    )
    assert done.stdout == "mine theirs\n", done.stderr


FAILS = {
    "broken.py": '''"""A module of the project."""


def fails(x):
    """Fail."""
    y = x - 1
    return 1 / y  # this very line
'''
}


def test_a_traceback_shows_the_lines(project: Callable[..., Path], run: Run) -> None:
    folder = project(FAILS)
    # Master and job are on one machine here, so the files go when the master has read them.
    program = f"import broken, os\nos.rename({str(folder)!r}, {str(folder)!r} + '-away')\n"
    done = run(program + "broken.fails(1)", "broken")
    assert done.returncode == 1
    assert f'File "{folder}/broken.py", line 7, in fails\n' in done.stderr
    assert "    return 1 / y  # this very line\n" in done.stderr


def test_an_other_file_in_its_place_does_not_lend_its_lines(
    project: Callable[..., Path], run: Run
) -> None:
    folder = project(FAILS)
    done = run(
        "import importlib.util\n"
        "spec = importlib.util.find_spec('broken')\n"
        f"with open({str(folder / 'broken.py')!r}, 'w') as file:\n"
        "    file.write('# what the image has\\n' * 9)\n"
        "import broken\nbroken.fails(1)",
        "broken",
    )
    assert "    return 1 / y  # this very line\n" in done.stderr
    assert "what the image has" not in done.stderr


def test_source_reload_and_pickle(project: Callable[..., Path], run: Run) -> None:
    project(
        {
            "shapes.py": "COUNT = []\nclass Square:\n    side = 2\n\n    def area(self):\n"
            "        return self.side ** 2\n"
        }
    )
    done = run(
        "import importlib, inspect, pickle, shapes\n"
        "print(inspect.getsource(shapes.Square.area).strip().splitlines()[-1].strip())\n"
        "print(inspect.getsource(shapes.Square).splitlines()[1].strip())\n"
        "print(inspect.getsource(shapes).splitlines()[0])\n"
        "print(pickle.loads(pickle.dumps(shapes.Square())).area())\n"
        "shapes.COUNT.append(1)\n"
        "print(importlib.reload(shapes) is shapes, shapes.COUNT)\n",
        "shapes",
    )
    assert done.returncode == 0, done.stderr
    lines = ["return self.side ** 2", "side = 2", "COUNT = []", "4", "True []"]
    assert done.stdout.splitlines() == lines


def test_what_raises_while_it_is_imported_raises_here(
    project: Callable[..., Path], run: Run
) -> None:
    project({"wrong.py": "def f(:\n", "raises.py": "raise KeyError('as at home')\n"})
    done = run(
        "for name in 'wrong', 'raises', 'wrong':\n"
        "    try:\n        __import__(name)\n"
        "    except Exception as error:\n        print(type(error).__name__, error)\n",
        "wrong",
        "raises",
    )
    first, second, third = done.stdout.splitlines()
    assert first.startswith("SyntaxError")
    assert "wrong.py, line 1" in first
    assert second == "KeyError 'as at home'"
    assert third == first


def test_what_is_missing_is_missing_at_once(
    project: Callable[..., Path], run: Run, master: Master
) -> None:
    project(PACKAGE)
    done = run(
        "import importlib\n"
        "for name in 'numpyy', 'numpyy', 'sim.nothing', 'sim.nothing', 'json.nothing':\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n        print(error.name)\n",
        "sim",
    )
    assert done.stdout.split() == ["numpyy", "numpyy", "sim.nothing", "sim.nothing", "json.nothing"]
    asked = master.modules_asked()
    assert "numpyy" not in asked
    assert "json" not in asked
    assert asked.count("sim.nothing") == 1


def test_a_compiled_extension_is_named(
    project: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    from importlib.machinery import EXTENSION_SUFFIXES

    project({f"fast{EXTENSION_SUFFIXES[0]}": "", "uses.py": "import fast\n"})
    done = run("import uses", "fast", "uses")
    assert done.returncode == 1
    assert "ImportError: fast is a compiled extension of the project" in done.stderr
    assert "the image must have it" in done.stderr


def test_the_same_file_in_the_image_is_used(
    project: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    project({"same.py": "X = 1\n", "other.py": "X = 'of the program'\n"})
    image = tmp_path / "image"
    image.mkdir()
    (image / "same.py").write_text("X = 1\n")
    (image / "other.py").write_text("X = 'of the image'\n")
    done = run(
        "import same, other\nprint(same.__file__, other.X)",
        "same",
        "other",
        environment={"PYTHONPATH": str(image)},
    )
    assert done.stdout == f"{image}/same.py of the program\n", done.stderr


def test_in_forks_and_threads(project: Callable[..., Path], run: Run, master: Master) -> None:
    files = {f"part{number}.py": f"NUMBER = {number}\n" for number in range(24)}
    project({**files, "late.py": "NAME = 'late'\n", "again.py": ""})
    done = run(
        "import os, threading, importlib\n"
        "found = []\n"
        "def load(k):\n"
        "    for n in range(24):\n"
        "        found.append(importlib.import_module(f'part{(n + k) % 24}').NUMBER)\n"
        "threads = [threading.Thread(target=load, args=(6 * k,)) for k in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert sorted(found) == sorted(4 * list(range(24)))\n"
        "pids = []\n"
        "for _ in range(3):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        import late\n"
        "        os._exit(7 if late.NAME == 'late' else 1)\n"
        "    pids.append(pid)\n"
        "import again\n"  # the connection is still the parent's own
        "print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])\n"
        "import late\n",
        *(name.removesuffix(".py") for name in files),
        "late",
        "again",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[7, 7, 7]\n"
    assert len(master.hellos) == 1 + 3
    assert master.modules_asked().count("late") == 4


def test_a_fork_while_a_thread_asks(project: Callable[..., Path], run: Run) -> None:
    project({f"part{number}.py": "" for number in range(200)} | {"late.py": ""})
    done = run(
        "import os, threading, importlib\n"
        "def load():\n"
        "    for n in range(200):\n"
        "        importlib.import_module(f'part{n}')\n"
        "thread = threading.Thread(target=load); thread.start()\n"
        "codes = []\n"
        "while thread.is_alive() and len(codes) < 30:\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        import late\n"
        "        os._exit(7)\n"
        "    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "thread.join()\n"
        "assert codes and set(codes) == {7}, codes\n",
        "late",
        *(f"part{number}" for number in range(200)),
    )
    assert done.returncode == 0, done.stderr


def test_a_signal_handler_may_import_amid_a_question(
    project: Callable[..., Path], run: Run
) -> None:
    project({"slow.py": "", "handler.py": "DONE = True\n"})
    done = run(
        "import signal, os\n"
        "from fiber.code import finder\n"
        "exchange = finder._exchange\n"
        "def interrupted(channel, kind, body):\n"
        "    if body.endswith(b'slow'):\n"
        "        os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return exchange(channel, kind, body)\n"
        "finder._exchange = interrupted\n"
        "def handle(*_):\n"
        "    import handler\n"
        "    print(handler.DONE)\n"
        "signal.signal(signal.SIGUSR1, handle)\n"
        "import slow\n",
        "slow",
        "handler",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"


def test_a_broken_connection_is_opened_again(
    project: Callable[..., Path], run: Run, master: Master
) -> None:
    project({"first.py": "", "second.py": "X = 5\n"})
    done = run(
        "import first, socket\n"
        "client._channel.sock.shutdown(socket.SHUT_RDWR)\n"
        "import second\nprint(second.X)\n",
        "first",
        "second",
    )
    assert done.stdout == "5\n", done.stderr
    assert len(master.hellos) == 2


def test_a_master_that_is_gone_is_told(project: Callable[..., Path], run: Run) -> None:
    project({"first.py": ""})
    done = run(
        "import os, socket\n"
        "client._channel.sock.shutdown(socket.SHUT_RDWR)\n"
        "os.environ['FIBER_INTERNAL_MASTER'] = '127.0.0.1:1'\n"
        "import first\n",
        "first",
    )
    assert done.returncode == 1
    message = "ImportError: the project's module first cannot be fetched from the master: "
    assert message in done.stderr


def test_a_refusal_is_an_import_error() -> None:
    class Refuses(Client):
        def ask(self, kind: int, body: bytes) -> tuple[int, bytes]:
            return protocol.REFUSED, b"PermissionError: not for you"

    def no_connection() -> Channel:
        raise AssertionError

    finder = Finder({"name"}, Refuses(no_connection).module)
    with pytest.raises(ImportError, match="name: PermissionError: not for you"):
        finder.find_spec("name")
    assert "name" not in sys.modules
