"""The agents of this process: started when they are needed, told what to start, ended with it.

Process, Pool ─► get ─┬─ here ──────► Agent, one for all processes of a backend and CPU count
                      └─ elsewhere ─► RemoteAgent, one for each job, ordered as `starting` says
              ─► spawn ─► Child
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any

from fiber.backends import base, registry
from fiber.backends.base import JobSpec
from fiber.config import config
from fiber.errors import StartError
from fiber.resources import Resources, thread_environment
from fiber.runtime import logs, main
from fiber.runtime.agents import Agent, Child, standard_streams
from fiber.runtime.loop import Event

if TYPE_CHECKING:
    from fiber.runtime.descriptors import Descriptor
    from fiber.runtime.errands import Errands
    from fiber.runtime.orders import Needs
    from fiber.runtime.outside import Outside
    from fiber.runtime.remote import RemoteAgent
    from fiber.runtime.session import Session

__all__ = ["Agency"]


class Agency:
    """See the module. Within the loop, save `get`, `prepare`, `share`, `check_open` and `collect`.

    Args:
        session: of this process.
        far: whether this process is elsewhere itself.
        on_exited: called with each process that has ended, and its exit code.

    Attributes:
        orders: who has jobs started elsewhere for this process, from when it wants any.
    """

    def __init__(
        self, session: Session, far: bool, on_exited: Callable[[Child, int | None], object]
    ) -> None:
        self._session = session
        self._far = far
        self._on_exited = on_exited
        self._agents: dict[tuple[str, int], Agent] = {}
        self._remote_agents: set[RemoteAgent] = set()
        self.orders: Outside | Errands | None = None
        self._preparation: dict[str, Any] = {}
        self._preparing = threading.Lock()
        self._closing = False

    def inherit(self, key: tuple[str, int], agent: Agent) -> None:
        """Use the agent that forked this process for what its `key` says."""
        agent.on_exited = self._on_exited
        self._agents[key] = agent

    @property
    def usable(self) -> bool:
        """Whether there is an agent on this machine, which sees to it that nothing is left."""
        return any(agent.usable for agent in self._agents.values())

    def names(self) -> Container[str] | None:
        """Return what `wire.pickling.dumps` has to know of the main module of our processes."""
        for agent in (*self._agents.values(), *self._remote_agents):
            if agent.ready.is_set and agent.error is None:
                return main.missing(agent.names)
        return None if main.describe() else frozenset()

    def told_to_end(self, process: tuple[str, int]) -> bool:
        """Whether that process, of a place and with an ID there, was sent a signal by us."""
        place, pid = process
        agents = (*self._agents.values(), *self._remote_agents)
        return any(agent.place == place and agent.was_told_to_end(pid) for agent in agents)

    def is_elsewhere(self, backend: str) -> bool:
        """Whether processes of `backend` run apart from this one.

        Raises:
            ConfigError, StartError: there is no such backend, or it cannot be used.
        """
        if backend == "local":
            return False
        # Processes that are elsewhere themselves have not what talks to a manager.
        return self._far or registry.get(backend).elsewhere

    def get(self, backend: str, resources: Resources) -> Agent:
        """Return an agent of `backend`, ready to start a process with `resources`.

        One that is elsewhere is for that process alone, and ends with it.

        Raises:
            StartError: it did not come up; the message says why.
        """
        self.prepare(backend)
        with self._session.loop:
            agent = self.soon(backend, resources)
        try:
            self._session.loop.wait(agent.ready)
        except BaseException:
            if agent.elsewhere and not self._session.loop.closed:
                with self._session.loop:
                    agent.close()
            raise
        if agent.error is not None:
            self.check_open()
            raise StartError(agent.error)
        return agent

    def check_open(self) -> None:
        """Raise why the session has ended, or is just ending, if it is; not within the loop.

        A daemonic thread that was starting something as the program ended shall end without a word.
        """
        if self._closing:
            self._session.loop.wait(Event())

    def prepare(self, backend: str) -> None:
        """See that processes of `backend` can be started. Not within the loop.

        Raises:
            ConfigError, StartError: they cannot be; the message says why.
        """
        if not self.is_elsewhere(backend):
            return
        with self._preparing:
            from fiber.runtime import starting

            if self.orders is None:
                self.orders = starting.orders(self._session)
            if not self._preparation:
                self._preparation = starting.preparation(self._session, self.orders)

    def share(self, backend: str, resources: Resources, workers: int) -> int:
        """Return how many workers of a pool are to share a job. Not within the loop."""
        if config.workers_per_job is not None:
            return config.workers_per_job
        # Who is elsewhere itself cannot ask the backend.
        return 1 if self._far else base.share(registry.get(backend), resources, workers)

    def soon(self, backend: str, resources: Resources, processes: int = 1) -> Agent:
        """As `get`, but it may not be ready yet, or never be. Within the loop.

        One that is elsewhere is for `processes` of them, and stays until it is closed.
        """
        if self._closing:
            return Agent.failed(self._session.loop, "the session has ended")
        if self.is_elsewhere(backend):
            return self._order(backend, (resources, processes))
        cpu = resources.cpu or config.cpu_per_job
        key = (backend, cpu)
        agent = self._agents.get(key)
        if agent is None or not agent.usable:
            agent = self._agents[key] = self._submit(backend, cpu)
            agent.on_exited = self._on_exited
        return agent

    def _submit(self, backend: str, cpu: int) -> Agent:
        agent = Agent(self._session.loop, f"the {backend} agent", self._session.folder)
        package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        from multiprocessing import util  # not needed to import Fiber, and slow

        flags = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
        program = (
            # The folder that the program happens to be started in shall not hide modules.
            f"import sys; sys.path = [*filter(None, sys.path), {package!r}]; "
            "from fiber.runtime.agent import main; main()"
        )
        spec = JobSpec(
            name=agent.name,
            command=[sys.executable, *flags, "-c", program],
            environment={
                **environment(cpu),
                "FIBER_INTERNAL_SESSION": self._session.folder,
                "FIBER_INTERNAL_ADDRESS": self._session.endpoint.address,
            },
            resources=Resources(cpu=cpu),
        )
        preparation = {
            "sys_path": list(sys.path),
            "argv": list(sys.argv),
            "cwd": _current_folder(),
            "main": main.describe(),
            "modules": sorted(name for name in sys.modules if name.startswith("fiber.")),
            "key": (backend, cpu),
        }
        timeout = config.start_timeout
        agent.submit(registry.get(backend), spec, self._session.endpoint, preparation, timeout)
        return agent

    def _order(self, backend: str, needs: Needs) -> Agent:
        """Have a job started elsewhere; return its agent."""
        from fiber.runtime.starting import begin

        assert self.orders is not None
        agent = begin(self._session, self.orders, backend, needs, self._preparation)
        agent.on_exited = self._on_exited
        self._remote_agents.add(agent)
        return agent

    def forget(self, agent: RemoteAgent) -> None:
        """It has ended."""
        self._remote_agents.discard(agent)

    def spawn(
        self,
        agent: Agent,
        name: str,
        process: bytes,
        *,
        cpu: int = 1,
        extra_environment: dict[str, str] | None = None,
        capture_stderr: bool = False,
        ignore_interrupt: bool = False,
        fds: Sequence[Descriptor] = (),
    ) -> Child:
        """Have `agent` start a process. Within the loop.

        Args:
            agent: one of this session's, ready.
            name: for messages.
            process: a pickled `Process` object.
            cpu: how many CPUs it uses.
            extra_environment: variables of its own.
            capture_stderr: keep the last lines that it writes to its standard error.
            ignore_interrupt: let it ignore SIGINT.
            fds: what goes along with it; let go of when it is sent.
        """
        extra = extra_environment or {}
        request = {
            "cpu": cpu,
            "environment": extra if agent.elsewhere else {**environment(cpu), **extra},
            "cwd": _current_folder(),
            "sys_path": list(sys.path),
            "argv": list(sys.argv),
            "config": {**config.as_dict(), **agent.settings},
            "logging": logs.of_multiprocessing(),
            "parent": os.getpid(),
            "process": process,
            "capture_stderr": capture_stderr,
            "ignore_interrupt": ignore_interrupt or _ignores_interrupt(),
            "by_value": "cloudpickle" in sys.modules,
        }
        streams = [] if agent.elsewhere else standard_streams()
        return agent.spawn(name, request, [*streams, *fds])

    def interrupt(self) -> None:
        """Send SIGINT to all processes elsewhere."""
        for agent in list(self._remote_agents):
            agent.signal(signal.SIGINT)

    def close(self) -> None:
        """Let all of them end."""
        self._closing = True
        for agent in (*self._agents.values(), *self._remote_agents):
            agent.close()
        if self.orders is not None:
            self.orders.close()

    def collect(self) -> None:
        """Wait, outside the loop, until their jobs have ended."""
        for agent in self._agents.values():
            agent.collect()
        if self.orders is not None:
            self.orders.collect()


def environment(cpu: int) -> dict[str, str]:
    """Return this process's environment with the thread counts that `cpu` CPUs call for."""
    return {**os.environ, **thread_environment(cpu, os.environ)}


def _current_folder() -> str:
    """Return the current folder, "" if it was removed: no reason to fail."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _ignores_interrupt() -> bool:
    """Whether this process was told to ignore Ctrl-C, as programs in the background are."""
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN
