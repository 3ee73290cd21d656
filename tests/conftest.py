"""What all tests share: nothing may be left behind, and no setting of the machine reaches a test.

After each test the session of this process is ended, and then no process, thread, file descriptor,
session folder or shared memory may be there that was not there before. What ends by itself has a
moment to do so; what is still there then is named, and ended where it is a process.

The run marks its environment, and everything that it starts inherits the mark; so a process that
lost its parent is still found, and other runs on this machine are not mistaken for ours. Containers
carry the mark as a label.

Engines that are not there are skipped, unless they have to be there: `FIBER_TEST_ENGINES` names
those, with commas between them: "docker,kubernetes".
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
MARK = "TESTS_OF_FIBER"
RUN = f"{os.getpid()}-{time.time_ns()}"
PATIENCE = 5.0
# Who made a block of shared memory: fiber-<uid>-<pid>-..., tests-<pid>, torch_<pid>_...
MAKER = re.compile(r"(?:fiber-\w+-|tests-|torch_)(\d+)")
# Read before the fixture that clears FIBER_ variables.
REQUIRED = {name for name in os.environ.get("FIBER_TEST_ENGINES", "").split(",") if name}
DOCKER_SOCKET = "/var/run/docker.sock"

settings.register_profile("fiber", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("fiber")


def pytest_configure(config: pytest.Config) -> None:
    os.environ[MARK] = RUN
    # Session folders of this run go where no other run puts any. The name is short, because a Unix
    # socket's path is at most about 100 bytes. pytest's own folders stay where they are.
    usual = tempfile.gettempdir()
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", usual)
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="ft-", dir=usual)
    tempfile.tempdir = None
    config.add_cleanup(lambda: shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True))
    config.add_cleanup(lambda: [_kill(pid) for pid in _processes()])
    # What a shell runs in the background ignores these, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    # multiprocessing, which some tests compare with, keeps this process and its pipe for good.
    resource_tracker.ensure_running()


# What is there now, each thing with a name for people.


def _processes() -> dict[object, str]:
    """Descendants of this process, and processes that carry this run's mark."""
    me = psutil.Process()
    found = {process.pid: process for process in me.children(recursive=True)}
    for pid in _marked():
        if pid != me.pid and pid not in found:
            with contextlib.suppress(psutil.Error):
                found[pid] = psutil.Process(pid)
    named: dict[object, str] = {}
    for process in found.values():
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline()) or process.name()
            named[process.pid, process.create_time()] = (
                f"process {process.pid} ({process.status()}): {words[:200]}"
            )
    return named


def _marked() -> list[int]:
    wanted = f"{MARK}={RUN}"
    pids = []
    for pid in psutil.pids():
        try:
            if sys.platform == "linux":  # psutil's way takes three times as long
                with open(f"/proc/{pid}/environ", "rb") as file:
                    marked = wanted.encode() in file.read().split(b"\0")
            else:
                marked = psutil.Process(pid).environ().get(MARK) == RUN
        except (OSError, psutil.Error):
            continue
        if marked:
            pids.append(pid)
    return pids


def _threads() -> dict[object, str]:
    return {t.ident: f"thread {t.name} (daemon={t.daemon})" for t in threading.enumerate()}


def _descriptors() -> dict[object, str]:
    folder = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
    named: dict[object, str] = {}
    for fd in os.listdir(folder):
        try:
            target = os.readlink(f"{folder}/{fd}")
        except FileNotFoundError:  # the one that listed the folder
            continue
        except OSError:
            target = ""
        named[fd, target] = f"file descriptor {fd}: {target}"
    return named


def _folders() -> dict[object, str]:
    return {p.name: f"session folder {p}" for p in Path(tempfile.gettempdir()).glob("fiber-*")}


def _shared_memory() -> dict[object, str]:
    try:
        names = os.listdir("/dev/shm")
    except OSError:
        return {}
    return {name: f"shared memory /dev/shm/{name}" for name in names if not _of_others(name)}


def _of_others(name: str) -> bool:
    """Whether shared memory is that of a living process that is none of this run."""
    # A semaphore of multiprocessing, which Fiber has none of; the store of a cluster that starts.
    if name.startswith(("sem.mp-", "k8s-ci-")):
        return True
    told = MAKER.match(name)
    pids = {int(told[1])} if told else _users(name)
    pids = {pid for pid in pids if pid != os.getpid() and psutil.pid_exists(pid)}
    return bool(pids) and not pids <= set(_marked())


def _users(name: str) -> set[int]:
    """Return the processes that have shared memory mapped whose name does not tell its maker."""
    pids = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if f"/dev/shm/{name}\n" in Path(f"/proc/{pid}/maps").read_text():
                pids.add(pid)
    return pids


class _Engine(http.client.HTTPConnection):
    """The Docker engine of this machine: asked without its SDK, which takes long to import."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(DOCKER_SOCKET)


def _ask_engine(method: str, path: str) -> list[Any]:
    engine = _Engine("docker")
    try:
        engine.request(method, path)
        found = json.loads(engine.getresponse().read() or b"[]")
    except OSError:  # a test may have it away
        return []
    finally:
        engine.close()
    return found if isinstance(found, list) else []


def _containers() -> dict[object, str]:
    """Containers with this run's mark, or of a session of a process of this run."""
    if _engines.get("docker") != "":  # not asked for yet, or it does not answer
        return {}
    filters = quote(json.dumps({"label": ["fiber.session"]}))
    found = _ask_engine("GET", f"/containers/json?all=1&filters={filters}")
    ours = {str(pid) for pid in (*_marked(), os.getpid())} if found else set()
    named: dict[object, str] = {}
    for container in found:
        labels = container["Labels"]
        if labels.get(MARK) == RUN or labels["fiber.session"].partition("-")[0] in ours:
            named[container["Id"]] = f"container {container['Names']} ({container['Status']})"
    return named


def _everything() -> dict[object, str]:
    kinds = (_processes, _threads, _descriptors, _folders, _shared_memory, _containers)
    return {(kind, key): name for kind in kinds for key, name in kind().items()}


def _kill(key: object) -> None:
    pid, created = key  # type: ignore[misc]
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.create_time() == created:
            process.kill()


def _shutdown() -> None:
    session = sys.modules.get("fiber.runtime.session")
    if session is not None:
        session.shutdown()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = _everything()
    yield
    _shutdown()
    deadline = time.monotonic() + PATIENCE
    left = {k: v for k, v in _everything().items() if k not in before}
    while left and time.monotonic() < deadline:
        gc.collect()  # a traceback may hold what would have been closed
        time.sleep(0.02)
        left = {k: v for k, v in _everything().items() if k not in before}
    for kind, key in left:  # type: ignore[misc]
        if kind is _processes:
            _kill(key)
        if kind is _containers:
            _ask_engine("DELETE", f"/containers/{key}?force=1&v=1")
    if left:
        names = "\n  and ".join(left.values())
        pytest.fail(f"{PATIENCE:g} s after the test there is still {names}", pytrace=False)


# Whether engines are there, by name: "" if so, else why not.
_engines: dict[str, str] = {}


@pytest.fixture(scope="session")
def engine() -> Callable[[str, Callable[[], None]], None]:
    """`engine(name, probe)`: go on if `probe` raises nothing; else skip, or fail if it must be."""

    def require(name: str, probe: Callable[[], None]) -> None:
        if name not in _engines:
            try:
                probe()
                _engines[name] = ""
            except Exception as error:
                _engines[name] = f"{type(error).__name__}: {error}"
        if _engines[name] and name in REQUIRED:
            pytest.fail(f"FIBER_TEST_ENGINES asks for {name}: {_engines[name]}", pytrace=False)
        if _engines[name]:
            pytest.skip(f"no {name} answers here: {_engines[name]}")

    return require


@pytest.fixture(autouse=True)
def clean_environ(nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No FIBER_ variable of the machine reaches a test, and no setting of a test the next one."""
    for name in [name for name in os.environ if name.startswith("FIBER_")]:
        monkeypatch.delenv(name)
    yield
    module = sys.modules.get("fiber.config")
    if module is not None:
        module.config.reset()


@pytest.fixture
def start_script(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Write a program into tmp_path and start it in a process group of its own.

    `start(source, *args, env={}, python=sys.executable, name="script.py", **popen)`; standard
    output and error are pipes. What is left of the group at the end of the test is killed.
    """
    started: list[subprocess.Popen[str]] = []

    def start(
        source: str,
        *args: str,
        env: Mapping[str, str] | None = None,
        python: str = sys.executable,
        name: str = "script.py",
        **popen: object,
    ) -> subprocess.Popen[str]:
        path = tmp_path / name
        path.write_text(source, encoding="utf-8")
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "cwd": tmp_path,
            "env": {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                **(env or {}),
            },
            **popen,
        }
        process = subprocess.Popen(
            [python, str(path), *args], text=True, start_new_session=True, **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        _end_group(process)


@pytest.fixture
def run_script(
    start_script: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program to its end: `run(source, *args, timeout=60, input=None, ...)`, see above.

    Fails, with what the program wrote, when it or anybody who holds its output takes longer.
    """

    def run(
        source: str, *args: str, timeout: float = 60, input: str | None = None, **options: object
    ) -> subprocess.CompletedProcess[str]:
        if input is not None:
            options["stdin"] = subprocess.PIPE
        process = start_script(source, *args, **options)
        try:
            out, err = process.communicate(input, timeout=timeout)
        except subprocess.TimeoutExpired:
            late = "the program" if process.poll() is None else "a process that it left behind"
        else:
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)
        out, err = _end_group(process)
        pytest.fail(
            f"After {timeout:g} s {late} is still there.\nIts output:\n{out}\nIts errors:\n{err}"
        )

    return run


def _end_group(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Kill the group of `process`, which leads it, and return what it wrote that nobody read."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        if any(stream and not stream.closed for stream in (process.stdout, process.stderr)):
            out, err = process.communicate(timeout=PATIENCE)
            return out or "", err or ""
    except (subprocess.TimeoutExpired, ValueError):
        pass  # a process of another group holds the pipes, or they were read to their end
    finally:
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()
        process.wait(PATIENCE)
    return "", ""
