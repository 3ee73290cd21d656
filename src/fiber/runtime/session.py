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
import sys
import threading
from collections.abc import Container, Iterator
from multiprocessing.process import current_process
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from fiber.config import config
from fiber.errors import PeerDied
from fiber.runtime import folders, logs, main
from fiber.runtime.agency import Agency
from fiber.runtime.agents import Agent, Child
from fiber.runtime.endpoint import Endpoint
from fiber.runtime.logs import DEBUG, WARNING, log
from fiber.runtime.loop import Event, Loop, Timer
from fiber.runtime.signals import Deferral
from fiber.wire import arena
from fiber.wire.auth import new_secret
from fiber.wire.channel import Channel

if TYPE_CHECKING:
    from fiber.runtime.descriptors import Loans
    from fiber.runtime.home import Home
    from fiber.runtime.outside import Outside
    from fiber.runtime.reach import Reach
    from fiber.runtime.refs import Ref, Way
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
        self.agency = Agency(self, "network" in _inherited, self._on_exited)
        self._home: Home | None = None
        self.blocks = Blocks(self.memory_folder)
        self.arena = arena.Arena(self.memory_folder, str(os.getpid()), memory_limit)
        self._tending: Timer | None = None
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
        if self._lock is None:
            return None
        return self.agency.orders  # type: ignore[return-value]  # a master has no errands

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
            self._home.forgiven = self.agency.told_to_end
        return self._home

    @property
    def loans(self) -> Loans:
        """The file descriptors that this process has lent to others. Within the loop."""
        if self._loans is None:
            from fiber.runtime.descriptors import Loans

            self._loans = Loans(self.loop, self.endpoint, self.carry)
        return self._loans

    def carry(self, far: Any, near: Any, can: tuple[bool, bool] = (True, True)) -> Splice:
        """Carry the bytes of a stream to another place; see `Splice`. Within the loop."""
        from fiber.runtime.splice import Splice

        splice = Splice(self.loop, far, near, can, self._splices.discard)
        if not splice.closed:
            self._splices.add(splice)
        return splice

    def memory_folder(self) -> str:
        """Return the folder for files that are shared memory, made if it is not there."""
        if self._memory_hold is None:
            self._memory_hold = folders.hold_memory(self.folder)
        return folders.memory_folder(self.folder)

    def tend_arena(self) -> None:
        """Have the arena give up what is not needed. Within the loop."""
        if self._tending is None:
            self._tending = self.loop.call_later(arena.TICK, self._tend_arena)

    def _tend_arena(self) -> None:
        self._tending = None
        if self.arena.tick():
            self.tend_arena()

    def keep_clean(self) -> None:
        """See that somebody removes what the session has here should this process be killed."""
        folder = self.folder  # which is made now if there was none
        cleaned = self._lock is None or self.agency.usable
        if not cleaned and self._janitor is None:
            try:
                self._janitor = folders.Janitor(folder)
            except OSError as error:
                log(WARNING, "files would stay if this process was killed: %s", error)

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
        return self.agency.names()

    def _on_exited(self, child: Child, code: int | None) -> None:
        """A process that we started has ended, which nobody knows yet."""
        if self._folder is not None and not child.agent.elsewhere:
            arena.remove(folders.memory_folder(self._folder), str(child.pid))
        if self._home is not None and child.pid is not None:
            process = (child.agent.place, child.pid)
            self._home.read_all(process)
            if child.handed:
                self._home.ended(child.name, process, child.handed, code != 0)
        if code != 0 and not child.agent.elsewhere and self._folder is not None:
            from fiber.runtime import snapshots

            snapshots.sweep(folders.memory_folder(self._folder))

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

        if isinstance(self.agency.orders, Outside):
            return self.agency.orders.key
        return bytes(_inherited.get("tls_key", b""))

    def close(self, reason: BaseException | None = None, *, orderly: bool = True) -> None:
        """End this part; the master's end is the end of the session. `reason` as for the loop."""
        if not (self.loop.failed or self.loop.closed):
            self._send_all()
        with self.loop:
            for way in self._ways.values():
                way.close(orderly)
            if self._home is not None:
                self._home.close()
            if self._loans is not None:
                self._loans.close()
            for splice in list(self._splices):
                splice.close()
            self.agency.close()
            if self._endpoint is not None:
                self._endpoint.close()
            self.blocks.close()
            self.arena.close()
            self.reader.close()
            self._let_go_of_memory()
        self.loop.close(reason)
        self.agency.collect()
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
        if self._loans is not None and (self._lock is None or self.agency.orders is not None):
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


def memory_limit() -> int | None:
    """Return the bytes that this process may lend to others, None for what there is room for."""
    megabytes = config.shared_memory_mb
    return None if megabytes is None else megabytes << 20


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
            heed_interrupts()
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
        session.agency.inherit(_inherited["key"], agent)
    return session


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


def program() -> Any:
    """Return the main module's file, name and source, as a process elsewhere was told them."""
    return _inherited.get("program")


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


@contextlib.contextmanager
def lending(refs: list[Any]) -> Iterator[None]:
    """Add to `refs`, in this thread, the constants whose handles are pickled meanwhile.

    They are kept by who does this until the handles have arrived: they need no tickets.
    """
    _handing.refs = refs
    try:
        yield
    finally:
        _handing.refs = None


def lend(ref: Any) -> bool:
    """A handle of a constant is being pickled: whether somebody will keep it; see `lending`."""
    refs: list[Any] | None = getattr(_handing, "refs", None)
    if refs is None:
        return False
    refs.append(ref)
    return True


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


def heed_interrupts(_: object = None) -> None:
    """Have a Ctrl-C that ends this process end those that it started elsewhere."""
    from multiprocessing import util

    util.Finalize(None, _pass_on_interrupt, exitpriority=100)


def _pass_on_interrupt() -> None:
    """Before the processes are joined: a terminal's Ctrl-C reaches only those that are here."""
    interactive = hasattr(sys, "ps1")  # it was of a line long ago
    error = sys.exc_info()[1] or (None if interactive else getattr(sys, "last_value", None))
    if isinstance(error, KeyboardInterrupt) and _current is not None:
        with _current.loop:
            _current.agency.interrupt()


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
