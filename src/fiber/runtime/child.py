"""What a started process does before the user's code, and after it.

Forked by the agent, it finds the main module loaded and everything else in the agent's memory. In a
fresh interpreter it reads the same facts from the socket that it inherited, and loads the main
module itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from fiber.config import config
from fiber.runtime import descriptors, logs, session
from fiber.runtime import main as main_module

__all__ = ["flush", "prepare", "run", "run_fresh", "start_fresh"]

_PR_SET_PDEATHSIG = 1
_SIZE = struct.Struct("!Q")

_prctl: Callable[[int, int], int] | None = None


def prepare(modules: Iterable[str]) -> None:
    """Load `modules`, what of Fiber the master has loaded: children will need much of it."""
    global _prctl
    for name in modules:
        importlib.import_module(name)
    if sys.platform == "linux":
        import ctypes

        _prctl = ctypes.CDLL(None).prctl


def run(
    facts: dict[str, Any],
    request: dict[str, Any],
    upstream: socket.socket,
    streams: list[int],
    fds: list[int],
) -> int:
    """Run the requested process here; return its exit code.

    Args:
        facts: of the session, from the agent.
        request: see `Session.spawn`.
        upstream: the connection to the agent, which also tells it that this process lives.
        streams: standard output and error, unless they are in place.
        fds: the descriptors that go along with the process object.
    """
    if _prctl is not None:
        # The agent kills us when our parent is gone; should the agent itself be killed, the
        # kernel does.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != facts["agent"]:
            return 1
    resource.setrlimit(resource.RLIMIT_NOFILE, facts["limit"])
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # as CPython does for `random`: or all would be alike
    for number, fd in enumerate(streams, 1):
        os.dup2(fd, number)
        os.close(fd)
    if request["ignore_interrupt"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    elif signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # the agent's; no handler of the user's
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The agent blocked these for the moment of the fork.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGALRM))
    if os.environ != request["environment"]:
        os.environ.clear()
        os.environ.update(request["environment"])
    sys.path[:] = request["sys_path"]
    sys.argv[:] = request["argv"]
    with contextlib.suppress(OSError):  # as mp: a folder that is gone is no reason to fail
        os.chdir(request["cwd"])
    config.adopt(request["config"])
    logs.configure(child=True)
    if request["logging"] is not None:
        logs.adopt(*request["logging"])
    session.inherit(
        folder=facts["folder"],
        secret=facts["secret"],
        names=facts["names"],
        key=facts["key"],
        name=request["name"],
        socket=upstream,
        **facts.get("elsewhere", {}),
    )
    if request["capture_stderr"]:
        faulthandler.enable(file=2, all_threads=False)
    try:
        data, buffers = pickle.loads(request["process"])
        with descriptors.going_along(fds):
            process = pickle.loads(data, buffers=buffers)
    except Exception:
        print(f"fiber: the process {request['name']} cannot be unpickled:", file=sys.stderr)
        traceback.print_exc()
        return 1
    from multiprocessing import util

    # What is registered by now is forgotten by `_bootstrap`, as after any fork.
    util.register_after_fork(session, session.heed_interrupts)
    code: int
    sentinel = _parent_sentinel(request["parent"], upstream)
    if sys.version_info >= (3, 13):
        # Since then it is for whoever starts a process to see that it runs its exit functions.
        import atexit

        atexit._clear()  # those of the agent
        atexit.register(util._exit_function)
        try:
            code = process._bootstrap(parent_sentinel=sentinel)
        finally:
            atexit._run_exitfuncs()
    else:
        code = process._bootstrap(parent_sentinel=sentinel)
    session.shutdown(orderly=code == 0)
    return code


def _parent_sentinel(parent: int, upstream: socket.socket) -> int:
    """Return a descriptor that is ready once the parent is gone."""
    try:
        return os.pidfd_open(parent)
    except (AttributeError, OSError):
        return os.dup(upstream.fileno())


def flush() -> None:
    """Flush the standard streams before `os._exit`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


# In a fresh interpreter ------------------------------------------------------------------------


def start_fresh(
    finding: str,
    facts: dict[str, Any],
    request: dict[str, Any],
    ours: socket.socket,
    theirs: socket.socket,
    fds: list[int],
) -> int:
    """In the agent: start an interpreter that runs the requested process; return its ID.

    Args:
        finding: the program by which it finds Fiber.
        facts, request: as for `run`.
        ours, theirs: the connection between the agent and the process.
        fds: standard output and error, and what goes along.
    """
    import subprocess
    from multiprocessing import util

    flags = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
    program = f"{finding}\nfrom fiber.runtime.child import run_fresh; run_fresh({theirs.fileno()})"
    popen = subprocess.Popen(
        [sys.executable, *flags, "-c", program],
        env=request["environment"],
        stdin=subprocess.DEVNULL,
        stdout=fds[0],
        stderr=fds[1],
        pass_fds=[theirs.fileno(), *fds[2:]],
    )
    popen.returncode = 0  # the agent reaps it
    data = pickle.dumps((facts, request, fds[2:]))
    ours.sendall(_SIZE.pack(len(data)) + data)
    return popen.pid


def run_fresh(fd: int) -> None:
    """In the interpreter that `start_fresh` started: run the requested process."""
    upstream = socket.socket(fileno=fd)
    os.set_inheritable(fd, False)
    with upstream.makefile("rb") as file:
        (size,) = _SIZE.unpack(file.read(_SIZE.size))
        facts, request, fds = pickle.loads(file.read(size))
    for fd in fds:
        os.set_inheritable(fd, False)
    code = 1
    try:
        prepare(facts["modules"])
        sys.path[:] = request["sys_path"]
        sys.argv[:] = request["argv"]
        if "elsewhere" in facts:
            from fiber.runtime.elsewhere import load

            facts["names"] = load(facts)
        else:
            facts["names"] = main_module.load(facts["main"])
        code = run(facts, request, upstream, [], fds)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        flush()
        os._exit(code)
