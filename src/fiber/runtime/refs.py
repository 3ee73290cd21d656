"""References to served objects, and the links to the homes that serve them.

    Lock, Queue, ... ─► Ref ─► Here, in the home itself ──────────► Home
                            └► Peer, elsewhere ─► its endpoint ─► Home

There is one `Ref` for each object in a process, however often the object was unpickled there. When
it is collected the home hears of it. A `Peer` is the link to one home, shared by all references to
its objects. If a home is gone, every call that waits for it, and every later one, raises
`PeerDied`.
"""

from __future__ import annotations

import mmap
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, TypeVar

from fiber.errors import AuthenticationError, PeerDied
from fiber.runtime import session as session_module
from fiber.runtime.endpoint import HELLO
from fiber.runtime.home import (
    ATTACH,
    CALL,
    CANCEL,
    CAST,
    COUNTS_SIZE,
    FREE,
    GOODBYE,
    LEASE,
    PAGE,
    RELEASE,
    REPLY,
    SERVICE,
    Request,
    Served,
)
from fiber.runtime.link import Link
from fiber.runtime.loop import Event, Loop
from fiber.runtime.places import connect, is_here
from fiber.runtime.session import Session
from fiber.wire.framing import Buffer, Frame

__all__ = ["GRACE", "Ref", "lookup", "serve"]

_CONNECT_TIMEOUT = 30.0  # seconds
_LAST_WORDS = 2.0  # seconds that the last that was sent may take to arrive
GRACE = 2.0
"""Seconds by which a home may be late with the answer "time is out"."""


Accept = Callable[[Any, Sequence[Buffer]], Any]


class _Call:
    """A call under way to another process's home; a `Request` stands for one to our own."""

    __slots__ = ("accept", "buffers", "done", "error", "failed", "key", "result", "undo")

    def __init__(self, key: int) -> None:
        self.key = key
        self.done: Event = Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self.buffers: Sequence[Buffer] = ()
        self.undo: Callable[[Any], object] | None = None
        self.accept: Accept | None = None
        self.failed: Callable[[], object] | None = None


class Here:
    """The way to the home of this process."""

    works = True
    near = True

    def __init__(self, session: Session) -> None:
        self.loop = session.loop
        self.home = session.home
        self._counts: dict[int, int] = {}

    def connect(self) -> None:
        """There is nothing to do."""

    def begin(
        self,
        target: int,
        method: str,
        args: tuple[Any, ...],
        buffers: Sequence[Buffer],
        accept: Accept | None = None,
    ) -> Request:
        request = Request(self.home.me, None)
        request.accept = accept
        request.done = Event()
        request.buffers = buffers
        self.home.call(request, target, method, args)
        return request

    def cast(
        self, target: int, method: str, args: tuple[Any, ...], buffers: Sequence[Buffer]
    ) -> None:
        request = Request(self.home.me, None)
        request.buffers = buffers
        self.home.call(request, target, method, args)

    def abandon(self, call: Any, undo: Callable[[Any], object] | None) -> None:
        if call.done.is_set:
            if undo is not None and call.error is None:
                undo(call.result)
        else:
            call.withdraw()

    def attach(self, target: int) -> None:
        count = self._counts[target] = self._counts.get(target, 0) + 1
        if count == 1:
            self.home.attach(self.home.me, target)

    def release(self, target: int) -> None:
        self._counts[target] -= 1
        if not self._counts[target]:
            del self._counts[target]
            self.home.detach(self.home.me, target)

    def lease(self, target: int) -> None:
        self.home.lease(target)

    def drain(self) -> None:
        """Nothing is ever on its way."""

    def close(self, orderly: bool) -> None:
        """The home closes with the session."""


class Peer:
    """The link to the home of another process. Within the loop, save `connect`."""

    def __init__(self, session: Session, address: str) -> None:
        self.loop: Loop = session.loop
        self.address = address
        self.error: PeerDied | None = None
        self._who = "process " + os.path.basename(address).partition(".")[0]
        self._session = session
        self._link: Link | None = None
        self._connecting = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._keys = 0
        self._counts: dict[int, int] = {}
        self._page: memoryview | None = None
        self._slots = 0
        self.near = is_here(address.removeprefix("unix:"))
        """Whether it is in this place, so that there may be shared memory."""
        self.hasty = False
        """Whether the process may end without waiting until all that was posted is on its way."""

    @property
    def works(self) -> bool:
        """Whether the home can be reached, as far as that is known."""
        return self.error is None

    @property
    def connected(self) -> bool:
        """Whether there is, or was, a link."""
        return self._link is not None or self.error is not None

    def connect(self) -> None:
        """Connect, if that was not done; not within the loop.

        Raises:
            PeerDied: the home is gone.
        """
        if not self.connected:
            with self._connecting:
                if not self.connected:
                    self._connect()
        if self.error is not None:
            raise self._died() from None

    def _connect(self) -> None:
        try:
            channel = connect(self.address, _CONNECT_TIMEOUT)
        except (OSError, AuthenticationError) as error:
            why = getattr(error, "strerror", None) or str(error)
            self.error = PeerDied(
                f"{self._who}, in which this object lives, cannot be reached: {why}"
            )
            return
        hello = {"service": SERVICE, **self._session.identity()}
        try:
            channel.send(HELLO, pickle.dumps(hello))
        except OSError:
            pass  # reading will tell
        with self.loop:
            self._link = Link(self.loop, channel, self._on_frame, self._on_lost)

    def _died(self) -> PeerDied:
        assert self.error is not None
        return PeerDied(*self.error.args)

    def _post(self, kind: int, body: object, buffers: Sequence[Buffer] = ()) -> None:
        if self.error is not None:
            raise self._died()
        assert self._link is not None
        self._link.post(kind, pickle.dumps(body), buffers)

    def begin(
        self,
        target: int,
        method: str,
        args: tuple[Any, ...],
        buffers: Sequence[Buffer],
        accept: Accept | None = None,
    ) -> _Call:
        self._keys += 1
        call = _Call(self._keys)
        call.accept = accept
        self._post(CALL, (call.key, target, method, args), buffers)
        self._calls[call.key] = call
        return call

    def cast(
        self, target: int, method: str, args: tuple[Any, ...], buffers: Sequence[Buffer]
    ) -> None:
        self._post(CAST, (target, method, args), buffers)

    def abandon(self, call: Any, undo: Callable[[Any], object] | None) -> None:
        if call.done.is_set:
            if undo is not None and call.error is None:
                undo(call.result)
        elif self.error is None:
            call.undo = undo  # for an answer that is on its way
            self._post(CANCEL, call.key)

    def attach(self, target: int) -> None:
        count = self._counts[target] = self._counts.get(target, 0) + 1
        if count == 1 and self._link is not None and self.error is None:
            self._post(ATTACH, target)

    def release(self, target: int) -> None:
        self._counts[target] -= 1
        if not self._counts[target]:
            del self._counts[target]
            if self._link is not None and self.error is None:
                self._post(RELEASE, target)

    def lease(self, target: int) -> None:
        if self._link is not None and self.error is None:
            self._post(LEASE, target)

    def _on_frame(self, frame: Frame) -> None:
        body = pickle.loads(frame.body)
        if frame.kind == REPLY:
            key, error, result = body
            call = self._calls.pop(key, None)
            if call is None:
                return
            call.buffers = frame.buffers
            if call.accept is not None and error is None:
                result = call.accept(result, frame.buffers)
            if call.undo is None:
                call.error, call.result = error, result
            elif error is None:
                call.undo(result)
            if call.failed is not None and error is not None:
                call.failed()
            call.done.set()
        elif frame.kind == FREE:
            self._session.blocks.take_back(body)

    def _on_lost(self) -> None:
        self._fail(PeerDied(f"{self._who}, in which this object lived, has ended"))

    def _fail(self, error: PeerDied) -> None:
        self.error = self.error or error
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.error = self._died()
            if call.failed is not None:
                call.failed()
            call.done.set()

    def counter(self) -> tuple[memoryview | None, int]:
        """Return counts that the home shares, and the index of two of them to use.

        They are in a file that both map. If that cannot be, None and a number below 0; whichever
        the number is, it is not given out again.
        """
        with self._connecting:
            if self._page is None:
                self._page = self._make_page()
            self._slots += 2
            if self._page is None or self._slots > len(self._page):
                return None, -self._slots
            return self._page, self._slots - 2

    def _make_page(self) -> memoryview | None:
        # In the folder of its session, for a process that `os.fork` made may have none.
        if not self.near:
            return None
        folder = os.path.dirname(self.address.removeprefix("unix:"))
        path = os.path.join(folder, f"{os.getpid()}-{os.urandom(4).hex()}.page")
        try:
            with open(path, "x+b") as file:
                file.truncate(COUNTS_SIZE)
                page = mmap.mmap(file.fileno(), COUNTS_SIZE)
        except OSError:
            return None  # no room, or no folder: a queue can do without
        with self.loop:
            self._post(PAGE, path)
        return memoryview(page).cast("Q")

    def drain(self) -> None:
        """Wait, outside the loop, until all that was posted is on its way."""
        if self._link is not None and not self.hasty:
            self.loop.drain(self._link)

    def close(self, orderly: bool) -> None:
        """Say good-bye; `orderly` tells that this process did not fail."""
        if self._link is not None and not self._link.lost:
            self._link.post(GOODBYE, pickle.dumps(orderly))
            self._link.flush()
            self._link.channel.deliver(_LAST_WORDS)
            self._link.close()
        self._page = None
        self._fail(PeerDied("this process's part in the session has ended"))


Way = Here | Peer


class Ref:
    """This process's reference to one served object; `lookup` and `serve` make them.

    Attributes:
        address: of the home.
        id: of the object.
    """

    def __init__(self, address: str, target: int) -> None:
        self.address = address
        self.id = target
        self._session: Session | None = None
        self._way: Way | None = None
        self._attached: Way | None = None
        _all.add(self)

    def finish(self) -> None:
        """This process's part in the session ends: send what was kept back. Within the loop."""

    def renew(self) -> None:
        """This process is the child of one that had the reference: forget what was its alone."""

    @property
    def way(self) -> Way:
        """How to reach the home, from where this process is now."""
        session = session_module.current()
        if session is not self._session:
            if self._session is not None:
                self.renew()
            self._session = session
            self._way = session.way(self.address)
            session.users.add(self)
        assert self._way is not None
        return self._way

    @property
    def session(self) -> Session:
        """This process's part in the session, as of the last use of `way`."""
        assert self._session is not None
        return self._session

    @property
    def loop(self) -> Loop:
        return self.way.loop

    def attach(self) -> None:
        """Let the home know that this process has the object, if it can be told right now."""
        way = self.way
        if way.loop.held:
            way.attach(self.id)
        else:
            try:
                way.connect()
            except PeerDied:
                pass  # whoever uses it will be told
            with way.loop:
                way.attach(self.id)
        self._attached = way

    def call(
        self,
        method: str,
        *args: Any,
        buffers: Sequence[Buffer] = (),
        timeout: float | None = None,
        undo: Callable[[Any], object] | None = None,
    ) -> Any:
        """Have the object do something, and return what it answers.

        Args:
            method: its name, without `do_`.
            args: plain values.
            buffers: raw buffers to go with them.
            timeout: seconds after which the home itself would answer; if it does not, being stopped
                perhaps, None is returned a moment later.
            undo: called, within the loop, with a result that nobody takes, because an exception
                such as KeyboardInterrupt ended the wait for it.

        Raises:
            PeerDied: the home is gone.
        """
        call = self.call_for(method, args, buffers, timeout, undo)
        return None if call is None else call.result

    def call_for(
        self,
        method: str,
        args: tuple[Any, ...],
        buffers: Sequence[Buffer] = (),
        timeout: float | None = None,
        undo: Callable[[Any], object] | None = None,
        accept: Accept | None = None,
    ) -> Any:
        """As `call`, but return the whole call, with `result` and `buffers`; None if it is late.

        Args:
            accept: given, within the loop, the answer and its buffers; what it returns is taken
                for the answer.
        """
        way = self.way
        way.connect()
        loop = way.loop
        deadline = None if timeout is None else monotonic() + timeout + GRACE
        call: Any = None
        try:
            with loop:
                call = way.begin(self.id, method, args, buffers, accept)
                loop.wait_within(call.done, deadline)
            while not call.done.is_set:
                left = None if deadline is None else deadline - monotonic()
                if not loop.wait(call.done, left):
                    with loop:
                        if not call.done.is_set:
                            way.abandon(call, undo)
                            return None
        except BaseException:
            if call is not None and not loop.closed and not loop.failed:
                with loop:
                    way.abandon(call, undo)
            raise
        if call.error is not None:
            if isinstance(call.error, LookupError):
                raise PeerDied("this object is gone: no process had kept a reference to it")
            raise call.error
        return call

    def begin(
        self,
        method: str,
        *args: Any,
        accept: Callable[[Any, Any], Any],
        failed: Callable[[], object] | None = None,
    ) -> Callable[[], None]:
        """Have the object do something, and do not wait: its answer goes to `accept`, in the loop.

        Args:
            method, args: as for `call`.
            accept: called with the answer and its buffers.
            failed: called, within the loop as well, if there will be no answer.

        Returns:
            What tells the home, from anywhere, that the answer is not wanted any more.

        Raises:
            PeerDied: the home is known to be gone.
        """
        way = self.way
        way.connect()
        with way.loop:
            call = way.begin(self.id, method, args, (), accept)
            if isinstance(call, _Call):
                call.failed = failed
            elif call.error is not None and failed is not None:  # at once, for it is here
                failed()
        return lambda: way.loop.call_soon(lambda: way.abandon(call, None))

    def cast(self, method: str, *args: Any, buffers: Sequence[Buffer] = ()) -> None:
        """Have the object do something, and do not wait for it.

        Raises:
            PeerDied: the home is known to be gone.
        """
        way = self.way
        way.connect()
        with way.loop:
            way.cast(self.id, method, args, buffers)

    def lease(self) -> None:
        """A pickle of it is being made: the object shall wait for whoever unpickles it."""
        way = self.way
        if isinstance(way, Here):
            session_module.hand(self.id)
        if way.loop.held:
            way.lease(self.id)
        else:
            with way.loop:
                way.lease(self.id)

    def __del__(self) -> None:
        way = self._attached
        if way is not None and not way.loop.closed and way.loop.pid == os.getpid():
            target = self.id
            way.loop.call_soon(lambda: way.release(target))


_all: weakref.WeakSet[Ref] = weakref.WeakSet()


def _renew_after_fork() -> None:
    """In a child of `os.fork`: what is under way, or held, is the parent's."""
    for ref in list(_all):
        ref.renew()
        ref._session = ref._way = ref._attached = None


os.register_at_fork(after_in_child=_renew_after_fork)


RefType = TypeVar("RefType", bound=Ref)


def lookup(kind: type[RefType], address: str, target: int) -> RefType:
    """Return this process's reference to an object, made if there is none yet."""
    session = session_module.current()
    ref = session.refs.get((address, target))
    if ref is None:
        ref = kind(address, target)
        ref = session.refs.setdefault((address, target), ref)
        ref.attach()
    assert isinstance(ref, kind)
    return ref


def serve(kind: type[RefType], make: Callable[..., Served], *args: Any) -> RefType:
    """Make an object that this process serves, by `make(home, *args)`; return a reference."""
    session = session_module.current()
    with session.loop:
        home = session.home
        served = make(home, *args)
        home.add(served)
        address = home.endpoint.address
    return lookup(kind, address, served.id)
