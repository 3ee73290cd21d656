"""`Process`: a process started through the session, with the interface of multiprocessing's.

    Process.start ─► pickled ─► Session.spawn ─► agent ─► child ─► Process._bootstrap ─► run

It is a `multiprocessing.process.BaseProcess`, so that `active_children`, `current_process`, exit
handling and the libraries that look at them work as they do there; only what starts a process, and
how one hears of its end, is Fiber's.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import context as _mp_context
from multiprocessing import process as _mp_process
from typing import TYPE_CHECKING, Any

from fiber.backends import registry
from fiber.config import config
from fiber.errors import StartError
from fiber.resources import Resources, gpu_environment, meta_of
from fiber.runtime import main, session
from fiber.runtime.agents import Child
from fiber.wire.pickling import dumps

__all__ = ["Popen", "Process", "active_children", "current_process", "parent_process"]

active_children = _mp_process.active_children
current_process = _mp_process.current_process
parent_process = _mp_process.parent_process


def __getattr__(name: str) -> Any:
    """Return what else multiprocessing.process has, such as `BaseProcess`."""
    return getattr(_mp_process, name)


start_method: str | None = None
"""What `set_start_method` was told; a context of that name is the default one."""

_slots = 0  # counts processes that asked for GPUs, to spread them


class Process(_mp_process.BaseProcess):
    """A process; `start` has it run `target(*args, **kwargs)`, or `run` of a subclass.

    As `multiprocessing.Process`, with these differences: functions and classes of `__main__`,
    lambdas and closures need no file that can be imported; a daemonic process may have children,
    for none can be left behind.

    Args:
        group: None, as in multiprocessing.
        target: callable to run.
        name: for people; `Process-N` by default.
        args, kwargs: of the target.
        daemon: end it when this process ends, instead of waiting for it; inherited by default.
    """

    _backend: str | None = None  # a context's; None for the configured one
    _chosen: str | None = None  # likewise, the name of the context that is the default in it
    _start_method: str | None = None

    if TYPE_CHECKING:  # what BaseProcess has, and its stub does not tell
        _popen: Popen | None
        _parent_pid: int
        _target: Callable[..., Any] | None
        _args: tuple[Any, ...]
        _kwargs: dict[str, Any]

        def _check_closed(self) -> None: ...

    def __init__(
        self,
        group: None = None,
        target: Callable[..., Any] | None = None,
        name: str | None = None,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        arguments = dict(kwargs or {})
        super().__init__(group, target, name, tuple(args), arguments, daemon=daemon)

    def start(self) -> None:
        """Start the process and return once it runs.

        Raises:
            StartError: it could not be started; the message says why.
            SerializationError: it could not be pickled.
        """
        self._check_closed()
        if self._popen is not None:
            raise AssertionError("cannot start a process twice")
        if self._parent_pid != os.getpid():
            raise AssertionError("can only start a process object created by current process")
        _forget_ended()
        self._chosen = self._chosen or start_method
        self._popen = Popen(self)
        self._sentinel = None  # the property below makes one when it is asked for
        # What was handed over is the child's; here it may be freed.
        del self._target, self._args, self._kwargs
        _mp_process._children.add(self)  # type: ignore[attr-defined]

    def _bootstrap(self, parent_sentinel: int | None = None) -> int:
        global start_method
        start_method = self._chosen
        code: int = super()._bootstrap(parent_sentinel)  # type: ignore[misc]
        return code

    @property
    def sentinel(self) -> int:
        """A descriptor that is ready when the process has ended, for `connection.wait`."""
        self._check_closed()
        if self._popen is None:
            raise ValueError("process not started")
        return self._popen.sentinel

    def _resources(self) -> Resources:
        return meta_of(self._target or self.run)

    def adopt(self, child: Child) -> None:
        """It was started otherwise, as `child`: let it be seen as if by `start`."""
        self._popen = Popen.of(child)
        self._sentinel = None
        _mp_process._children.add(self)  # type: ignore[attr-defined]

    def release(self) -> None:
        """It has ended: `active_children` need not show it any more."""
        _mp_process._children.discard(self)  # type: ignore[attr-defined]


def _forget_ended() -> None:
    """Forget the processes that have ended, as multiprocessing does when it starts another.

    Not by `poll`, which would look at the sockets once for each of hundreds.
    """
    children: set[Any] = _mp_process._children  # type: ignore[attr-defined]
    for child in list(children):
        popen = child._popen
        ours = isinstance(popen, Popen)
        if popen.child.ended.is_set if ours else popen and popen.poll() is not None:
            children.discard(child)


def _forget_after_fork() -> None:
    """In a child of `os.fork`: the processes are the parent's, not ours to collect or to end."""
    children: set[Any] = _mp_process._children  # type: ignore[attr-defined]
    children -= {child for child in children if isinstance(child, Process)}


os.register_at_fork(after_in_child=_forget_after_fork)


class Popen:
    """The life of one started process, as `BaseProcess` wants to see it."""

    method = "fiber"

    def __init__(self, process: Process) -> None:
        self._sentinel: tuple[int, int] | None = None
        self.returncode: int | None = None
        self._session = session.current()
        resources = process._resources()
        cpu = resources.cpu or config.cpu_per_job
        agent = self._session.agency.get(process._backend or registry.chosen(), resources)
        self._takes_fds = agent.takes_fds
        self._fds: list[Any] = []  # of `Descriptor`
        try:
            with session.handing() as handed:
                data = pickle_process(process, self, agent.names)
            with self._session.loop:
                self.child = self._session.agency.spawn(
                    agent,
                    process.name,
                    data,
                    cpu=cpu,
                    extra_environment={} if agent.elsewhere else gpus_of(resources),
                    fds=self._fds,
                )
                self.child.handed = handed
            self._session.loop.wait(self.child.started)
        except BaseException:
            if agent.elsewhere and not self._session.loop.closed:
                with self._session.loop:
                    agent.close()  # it was for this process alone
            raise
        finally:
            self._fds.clear()
        if self.child.error is not None and self.child.pid is None:
            raise StartError(f"process {process.name} did not start: {self.child.error}")

    @property
    def pid(self) -> int | None:
        """Its real process ID; None if it has not started yet."""
        return self.child.pid

    @classmethod
    def of(cls, child: Child) -> Popen:
        """Return what stands for a process that was started by other means. Within the loop."""
        popen = cls.__new__(cls)
        popen._sentinel = popen.returncode = None
        popen._session = session.current()
        popen.child = child
        return popen

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code, None if it runs."""
        if self.returncode is None:
            if not self.child.ended.is_set and not self._session.loop.closed:
                self._session.loop.poll()
            if self.child.ended.is_set:
                self.returncode = self.child.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end, at most `timeout` seconds; return the exit code, None if it runs."""
        if self.returncode is None and not self._session.loop.closed:
            self._session.loop.wait(self.child.ended, timeout)
        return self.poll()

    def _signal(self, signum: int) -> None:
        loop = self._session.loop
        if self.returncode is None and not loop.closed:
            if loop.held:  # a finalizer, run by the collector while this thread does Fiber's I/O
                loop.call_soon(lambda: self.child.signal(signum))
                return
            with loop:
                self.child.signal(signum)

    def interrupt(self) -> None:
        """Send SIGINT."""
        self._signal(signal.SIGINT)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    @property
    def sentinel(self) -> int:
        """A descriptor that is ready when the process has ended; made when it is asked for."""
        if self._sentinel is None:
            read_end, write_end = os.pipe()
            self._sentinel = (read_end, write_end)
            with self._session.loop:
                if self.child.ended.is_set:
                    self._close_writing()
                else:
                    self.child.on_ended = self._close_writing
        return self._sentinel[0]

    def _close_writing(self) -> None:
        assert self._sentinel is not None
        read_end, write_end = self._sentinel
        if write_end >= 0:
            # A fork of this process may have a copy, so that closing alone would not tell.
            with contextlib.suppress(BrokenPipeError):
                os.write(write_end, b"\0")
            os.close(write_end)
            self._sentinel = (read_end, -1)

    def duplicate_for_child(self, fd: int) -> Any:
        """Have a duplicate of `fd` go along with the process; return what `DupFd` wants."""
        from fiber.runtime.descriptors import Descriptor, lend

        if not self._takes_fds:
            return lend(fd)
        self._fds.append(Descriptor.duplicate(fd))
        return len(self._fds) - 1

    @staticmethod
    def DupFd(place: Any) -> Any:
        """Return what stands for a descriptor that goes along, as multiprocessing asks for it."""
        from fiber.runtime.descriptors import DupFd

        return DupFd(place) if isinstance(place, int) else place

    def close(self) -> None:
        """Free what is held for the process."""
        if self._session.loop.held:
            self._free()
            return
        with self._session.loop:  # which may be about to close the writing end itself
            self._free()

    def _free(self) -> None:
        if self._sentinel is not None:
            self._close_writing()
            os.close(self._sentinel[0])
            self._sentinel = None

    def __del__(self) -> None:
        self._free()  # nobody else has it any more, the loop included


def gpus_of(resources: Resources) -> dict[str, str]:
    """Return the environment that gives a process the GPUs it asks for, spread over the machine."""
    global _slots
    if not resources.gpu:
        return {}
    _slots += 1
    return gpu_environment(resources.gpu, _slots - 1, os.environ)


def pickle_process(process: Process, popen: object, names: frozenset[str]) -> bytes:
    """Pickle a process object for a child whose main module has `names`."""
    # multiprocessing's own objects may be pickled only while a process is being started.
    _mp_context.set_spawning_popen(popen)  # type: ignore[arg-type]
    try:
        packed = dumps(process, main.missing(names), share=True)
    finally:
        _mp_context.set_spawning_popen(None)
    return pickle.dumps((packed.data, [bytearray(buffer) for buffer in packed.buffers]))
