"""The session: one program and all the processes that it starts, on however many machines.

The program's first process is the master. It makes the session at first use, and ends it when it
ends: a folder that only this user can enter, with the sockets and the secret. Every process of the
session has a `Session` of its own, made at first use as well, with its loop, its endpoint and its
agents; they share the folder and the secret.

A process that `os.fork` made is the master of a session of its own. If it only uses what lives in
that of its parent it has no folder, and may end by `os._exit` without leaving one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Container, Iterator, Sequence
from multiprocessing.process import current_process
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from fiber.backends import registry
from fiber.backends.base import JobSpec
from fiber.config import config
from fiber.errors import PeerDied, StartError
from fiber.resources import Resources, thread_environment
from fiber.runtime import folders, logs, main
from fiber.runtime.agents import Agent, Child, standard_streams
from fiber.runtime.endpoint import Endpoint
from fiber.runtime.logs import DEBUG, WARNING, log
from fiber.runtime.loop import Event, Loop
from fiber.runtime.signals import Deferral
from fiber.wire.auth import new_secret
from fiber.wire.channel import Channel

if TYPE_CHECKING:
    from fiber.runtime.descriptors import Descriptor, Loans
    from fiber.runtime.errands import Errands
    from fiber.runtime.home import Home
    from fiber.runtime.orders import Needs
    from fiber.runtime.outside import Outside
    from fiber.runtime.reach import Reach
    from fiber.runtime.refs import Ref, Way
    from fiber.runtime.remote import RemoteAgent
    from fiber.runtime.splice import Splice

__all__ = ["Session", "current", "inherit", "secret", "shutdown"]

_LAST_BYTES = 10.0  # seconds in which the last of a stream to another place must be on its way
_LOOK_AGAIN = 0.005  # seconds


class Session:
    """This process's part of a session.

    Args:
        secret: of the session.
        folder: of the session; None for its master, who makes it.
    """

    def __init__(self, secret: bytes, folder: str | None = None) -> None:
        # Not needed to import Fiber. The first has pickles carry file descriptors from now on.
        import fiber.runtime.descriptors  # noqa: F401
        from fiber.wire.blocks import Blocks, Reader

        self.secret = secret
        self.loop = Loop()
        self._folder = folder
        self._making_folder = threading.Lock()
        self._lock: int | None = None
        """Held by the master from when there is a folder: its end, however it comes, lets go."""
        self._janitor: folders.Janitor | None = None
        self._endpoint: Endpoint | None = None
        self._agents: dict[tuple[str, int], Agent] = {}
        self._remote_agents: set[RemoteAgent] = set()
        self._orders: Outside | Errands | None = None
        """Who has jobs started elsewhere for this process, from when it wants any."""
        self._preparation: dict[str, Any] = {}
        self._home: Home | None = None
        self.blocks = Blocks(self.memory_folder)
        self._memory_hold: int | None = None
        self.reader = Reader()
        self._loans: Loans | None = None
        self._splices: set[Splice] = set()
        """Streams of other places that this process carries."""
        self._ways: dict[str, Way] = {}
        self.refs: WeakValueDictionary[tuple[str, int], Ref] = WeakValueDictionary()
        """References to served objects that this process has, by address and identity."""
        self.users: WeakSet[Ref] = WeakSet()
        """Those that were used; in a child of `os.fork` its parent's as well."""
        self._closing = False

    @property
    def folder(self) -> str:
        """The session's folder, made when it is needed first."""
        if self._folder is None:
            with _undisturbed(), self._making_folder:
                if self._folder is None:
                    self._folder, self._lock = folders.make(self.secret)
                    log(DEBUG, "session in %s", self._folder)
        return self._folder

    @property
    def outside(self) -> Outside | None:
        """What the master does for processes elsewhere, if there are any."""
        return self._orders if self._lock is not None else None  # type: ignore[return-value]

    @property
    def endpoint(self) -> Endpoint:
        """Where others reach this process. Within the loop."""
        if self._endpoint is None:
            name = f"{os.getpid()}.sock"
            self._endpoint = Endpoint(self.loop, os.path.join(self.folder, name), self.secret)
        return self._endpoint

    @property
    def home(self) -> Home:
        """The objects that this process serves. Within the loop."""
        if self._home is None:
            from fiber.runtime.home import Home

            identity = self.identity()
            place = (self.folder, os.getpid())
            self._home = Home(self.loop, self.endpoint, identity["name"], place)
            self._home.own_blocks = self.blocks
            self._home.forgiven = self._was_told_to_end
        return self._home

    @property
    def loans(self) -> Loans:
        """The file descriptors that this process has lent to others. Within the loop."""
        if self._loans is None:
            from fiber.runtime.descriptors import Loans

            self._loans = Loans(self.loop, self.endpoint, self.carry)
        return self._loans

    def carry(self, far: Any, near: Any, can: tuple[bool, bool] = (True, True)) -> None:
        """Carry the bytes of a stream to another place; see `Splice`. Within the loop."""
        from fiber.runtime.splice import Splice

        splice = Splice(self.loop, far, near, can, self._splices.discard)
        if not splice.closed:
            self._splices.add(splice)

    def memory_folder(self) -> str:
        """Return the folder for files that are shared memory, made if it is not there."""
        if self._memory_hold is None:
            self._memory_hold = folders.hold_memory(self.folder)
        return folders.memory_folder(self.folder)

    def keep_clean(self) -> None:
        """See that somebody removes the session's shared memory should this process be killed."""
        cleaned = self._lock is None or any(agent.usable for agent in self._agents.values())
        if not cleaned and self._janitor is None:
            try:
                self._janitor = folders.Janitor(self.folder)
            except OSError as error:
                log(WARNING, "shared memory would stay if this process was killed: %s", error)

    def way(self, address: str) -> Way:
        """Return the way to the home at `address`, which may be this process."""
        way = self._ways.get(address)
        if way is None:
            from fiber.runtime.refs import Here, Peer

            with contextlib.nullcontext() if self.loop.held else self.loop:
                here = self._endpoint is not None and address == self._endpoint.address
                way = Here(self) if here else Peer(self, address)
                way = self._ways.setdefault(address, way)
        return way

    def identity(self) -> dict[str, Any]:
        """Return what this process tells of itself to those whose objects it uses."""
        # While its arguments are unpickled, a process is not yet its own `current_process`.
        name = _inherited.get("name") or current_process().name
        # Whether a process that `os.fork` made ended well, nobody would hear.
        supervised = bool(_inherited.get("supervised") or (_forebears and not _inherited))
        place = self._folder or next(iter(_forebears), "")  # a fork may have no folder
        process = (place, os.getpid())
        return {"name": name, "process": process, "supervised": supervised}

    def known_names(self) -> Container[str] | None:
        """Return what `wire.pickling.dumps` has to know of the main module of other processes."""
        if _inherited:
            return main.missing(_inherited["names"])
        for agent in (*self._agents.values(), *self._remote_agents):
            if agent.ready.is_set and agent.error is None:
                return main.missing(agent.names)
        return None if main.describe() else frozenset()

    def _on_exited(self, child: Child, code: int | None) -> None:
        """A process that we started has ended, which nobody knows yet."""
        if self._home is not None and child.pid is not None:
            process = (child.agent.place, child.pid)
            self._home.read_all(process)
            if child.handed:
                self._home.ended(child.name, process, child.handed, code != 0)

    def _was_told_to_end(self, process: tuple[str, int]) -> bool:
        place, pid = process
        agents = (*self._agents.values(), *self._remote_agents)
        return any(agent.place == place and agent.was_told_to_end(pid) for agent in agents)

    def agent(self, backend: str, resources: Resources) -> Agent:
        """Return an agent of `backend`, ready to start a process with `resources`.

        One that is elsewhere is for that process alone, and ends with it.

        Raises:
            StartError: it did not come up; the message says why.
        """
        self.prepare(backend)
        with self.loop:
            agent = self.agent_soon(backend, resources)
        try:
            self.loop.wait(agent.ready)
        except BaseException:
            if agent.elsewhere and not self.loop.closed:
                with self.loop:
                    agent.close()
            raise
        if agent.error is not None:
            raise StartError(agent.error)
        return agent

    def prepare(self, backend: str) -> None:
        """See that processes of `backend` can be started. Not within the loop.

        Raises:
            ConfigError, StartError: they cannot be; the message says why.
        """
        if not is_elsewhere(backend):
            return
        with _making:
            from fiber.runtime import starting

            if self._orders is None:
                self._orders = starting.orders(self)
            if not self._preparation:
                self._preparation = starting.preparation(self, self._orders)

    def agent_soon(self, backend: str, resources: Resources, processes: int = 1) -> Agent:
        """As `agent`, but it may not be ready yet, or never be. Within the loop.

        One that is elsewhere is for `processes` of them, and stays until it is closed.
        """
        if self._closing:
            return Agent.failed(self.loop, "the session has ended")
        if is_elsewhere(backend):
            return self._order(backend, (resources, processes))
        cpu = resources.cpu or config.cpu_per_job
        key = (backend, cpu)
        agent = self._agents.get(key)
        if agent is None or not agent.usable:
            agent = self._agents[key] = self._submit(backend, cpu)
            agent.on_exited = self._on_exited
        return agent

    def _submit(self, backend: str, cpu: int) -> Agent:
        agent = Agent(self.loop, f"the {backend} agent", self.folder)
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
                "FIBER_INTERNAL_SESSION": self.folder,
                "FIBER_INTERNAL_ADDRESS": self.endpoint.address,
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
        agent.submit(registry.get(backend), spec, self.endpoint, preparation, timeout)
        return agent

    def _order(self, backend: str, needs: Needs) -> Agent:
        """Have a job started elsewhere; return its agent."""
        from fiber.runtime.starting import begin

        assert self._orders is not None
        agent = begin(self, self._orders, backend, needs, self._preparation)
        agent.on_exited = self._on_exited
        self._remote_agents.add(agent)
        return agent

    def forget_agent(self, agent: RemoteAgent) -> None:
        """It has ended."""
        self._remote_agents.discard(agent)

    @property
    def master_address(self) -> str | None:
        """The address of the session's master, None if this process is that."""
        if not _inherited:
            return None
        network = _inherited.get("network")
        if network is not None:
            return str(network.address)
        return f"unix:{self.folder}/{folders.master(self.folder)}.sock"

    @property
    def tls_key(self) -> bytes:
        """The private key of the session's certificate, for those whose jobs shall use it."""
        from fiber.runtime.outside import Outside

        if isinstance(self._orders, Outside):
            return self._orders.key
        return bytes(_inherited.get("tls_key", b""))

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

    def close(self, reason: BaseException | None = None, *, orderly: bool = True) -> None:
        """End this part; the master's end is the end of the session. `reason` as for the loop."""
        if not (self.loop.failed or self.loop.closed):
            self._send_all()
        with self.loop:
            self._closing = True
            for way in self._ways.values():
                way.close(orderly)
            if self._home is not None:
                self._home.close()
            if self._loans is not None:
                self._loans.close()
            for splice in list(self._splices):
                splice.close()
            for agent in (*self._agents.values(), *self._remote_agents):
                agent.close()
            if self._orders is not None:
                self._orders.close()
            if self._endpoint is not None:
                self._endpoint.close()
            self.blocks.close()
            self.reader.close()
            self._let_go_of_memory()
        self.loop.close(reason)
        for agent in self._agents.values():
            agent.collect()
        if self._orders is not None:
            self._orders.collect()
        if self._lock is not None:
            folders.remove(self.folder)
            os.close(self._lock)
        if self._janitor is not None:
            self._janitor.dismiss()

    def _send_all(self) -> None:
        """See that all is on its way that this process has for others."""
        with self.loop:
            self.loop.run_calls()  # finalizers of references, which may have something to send
            for ref in list(self.users):
                try:
                    ref.finish()
                except PeerDied as error:
                    log(WARNING, "what was put into a queue is lost: %s", error)
        for way in list(self._ways.values()):
            way.drain()
        if self._loans is not None and (self._lock is None or self._orders is not None):
            self._loans.linger()
        deadline = monotonic() + _LAST_BYTES
        while monotonic() < deadline:
            with self.loop:
                if all(splice.idle for splice in self._splices):
                    break
            self.loop.wait(Event(), _LOOK_AGAIN)

    def _let_go_of_memory(self) -> None:
        if self._memory_hold is not None:
            os.close(self._memory_hold)
            self._memory_hold = None

    def forget(self) -> None:
        """After `os.fork`, in the child: keep nothing of the parent's session open."""
        self._let_go_of_memory()
        self.loop.forget()
        if self._loans is not None:
            self._loans.forget()
        if self._lock is not None:
            os.close(self._lock)  # our copy; the parent's holds the lock
            self._lock = None
        if self._janitor is not None:
            self._janitor.forget()


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


# The session of this process -------------------------------------------------------------------

_current: Session | None = None
_inherited: dict[str, Any] = {}
_making = threading.Lock()
_abandoned: list[Session] = []  # of our parent: not to be finalized here
_forebears: dict[str, bytes] = {}  # folders of sessions that `os.fork` took us from, and secrets


def current() -> Session:
    """Return the session of this process, made at its first use."""
    global _current
    if _current is not None and not _current.loop.failed:
        return _current
    main.check_loaded()
    with _making:
        if _current is None or _current.loop.failed:
            # Last of all at exit: multiprocessing's exit function ends and joins children before.
            from multiprocessing import util

            util.Finalize(None, _shutdown_at_exit, exitpriority=-100)
            with _undisturbed():
                _current = _take_part() if _inherited else _begin()
        return _current


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off signals: a Ctrl-C in the middle would leave a folder that nobody removes."""
    deferral = Deferral(lambda: None)
    deferral.enter()
    try:
        yield
    finally:
        deferral.leave()


def _begin() -> Session:
    """Begin a session, as its master."""
    logs.configure()
    return Session(new_secret())


def _take_part() -> Session:
    """Take part in the session that this process was started in."""
    session = Session(_inherited["secret"], _inherited["folder"])
    with session.loop:
        channel = Channel(_inherited["socket"])
        agent = Agent.inherited(session.loop, channel, _inherited["names"], _inherited["folder"])
        agent.on_exited = session._on_exited
    session._agents[_inherited["key"]] = agent
    return session


def is_elsewhere(backend: str) -> bool:
    """Whether processes of `backend` run apart from this one.

    Raises:
        ConfigError, StartError: there is no such backend, or it cannot be used.
    """
    if backend == "local":
        return False
    # Processes that are elsewhere themselves have not what talks to a manager.
    return "network" in _inherited or registry.get(backend).elsewhere


def reach() -> Reach | Outside:
    """Return how this process reaches sockets in other places.

    Raises:
        OSError: it has no way to any.
    """
    from fiber.runtime.reach import Network, Reach

    session = current()
    if session.outside is not None:
        return session.outside
    if not _inherited:
        raise FileNotFoundError(2, "the place of that process is gone")
    network = _inherited.get("network") or Network((), str(session.master_address), b"")
    if "reach" not in _inherited:
        _inherited["reach"] = Reach(network, _inherited["secret"])
    found: Reach = _inherited["reach"]
    return found


def loans_at(address: str) -> Loans | None:
    """Return what was lent at `address` if that is in this process."""
    loans = None if _current is None else _current._loans
    return loans if loans is not None and loans.address == address else None


def known_names() -> Container[str] | None:
    """As `Session.known_names`; a process without a session has nobody who could lack a name."""
    if _current is not None:
        return _current.known_names()
    return main.missing(_inherited["names"]) if _inherited else None


def secret() -> bytes:
    """Return the secret of the session that this process belongs to."""
    inherited: bytes | None = _inherited.get("secret")
    return current().secret if inherited is None else inherited


def folder() -> str:
    """Return the folder of the session that this process belongs to."""
    inherited: str | None = _inherited.get("folder")
    return current().folder if inherited is None else inherited


def host() -> str:
    """Return the address of the host of this place, "" in the master's own place."""
    return str(_inherited.get("host", ""))


def keep_clean() -> None:
    """See that somebody removes this session's shared memory should its master be killed."""
    session = _current
    if session is not None:
        with _making:  # one thread at a time
            session.keep_clean()


def known_folders() -> list[str]:
    """Return the folders of this process's session, if it has one, and of its forebears'."""
    own = _current._folder if _current is not None else _inherited.get("folder")
    return [*filter(None, [own]), *_forebears]


def secret_for(address: str) -> bytes:
    """Return the secret of the session that `address` belongs to: ours, or a forebear's."""
    for folder, key in _forebears.items():
        if address.startswith(f"unix:{folder}/"):
            return key
    return secret()


def inherit(**facts: Any) -> None:
    """In a process that an agent forked: take part in the session that it belongs to."""
    global _current
    _current = None
    _inherited.update(facts)


_handing = threading.local()


@contextlib.contextmanager
def handing() -> Iterator[set[int]]:
    """Collect, in this thread, the objects of our home that are pickled meanwhile."""
    handed: set[int] = set()
    _handing.handed = handed
    try:
        yield handed
    finally:
        _handing.handed = None


def hand(target: int) -> None:
    """An object of our home is being pickled."""
    handed: set[int] | None = getattr(_handing, "handed", None)
    if handed is not None:
        handed.add(target)


def supervise() -> None:
    """This process is looked after by another, such as a pool, that makes good for its death."""
    _inherited["supervised"] = True


def shutdown(reason: BaseException | None = None, *, orderly: bool = True) -> None:
    """End this process's part in the session, and all that it started; it may begin anew.

    Args:
        reason: what those shall raise who still wait.
        orderly: whether the process ends as it should; if not, it lets go of the locks it holds.
    """
    global _current
    with _making:
        session, _current = _current, None
    if session is not None:
        with _undisturbed():
            session.close(reason, orderly=orderly)


def _shutdown_at_exit() -> None:
    # Daemonic threads that still wait end without a word: threading ignores SystemExit.
    shutdown(SystemExit("the program ended"), orderly=_is_orderly(sys.exc_info()[1]))


def _is_orderly(error: BaseException | None) -> bool:
    """Whether a process that ends with `error` on its way ends as it should."""
    return error is None or (isinstance(error, SystemExit) and error.code in (None, 0))


def _forget_after_fork() -> None:
    """In a child of `os.fork`: the session is the parent's; this process may make its own."""
    global _current, _making
    _making = threading.Lock()
    if _inherited:
        _forebears[_inherited["folder"]] = _inherited["secret"]
    if _current is not None:
        if _current._folder is not None:
            _forebears[_current._folder] = _current.secret
        _current.forget()
        _abandoned.append(_current)
    _current = None
    _inherited.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
