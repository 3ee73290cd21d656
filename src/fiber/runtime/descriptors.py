"""File descriptors on their way to other processes of this machine.

    while a process is being started:   duplicate_for_child ─► SPAWN ─► agent ─► child ─► DupFd

    at any other time:   lend ─► Loans, of the process that sends
                           │        ▲
                        a pickle    │ the descriptor, by SCM_RIGHTS, or a relayed stream
                           ▼        ▼
                         claim, where it is unpickled ─► Descriptor

What was lent is kept open until it has been claimed. While the sender has the original open it can
be claimed again, for a function is pickled once for all workers of a pool. Nothing else keeps a
copy, so that the end of a stream is seen as soon as those who use it have closed it.

Sockets and multiprocessing's own connections take the same ways when Fiber pickles them, for its
reducers hand their descriptors to whatever stands for a process that is being started.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import socket
import stat
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

from fiber.errors import AuthenticationError, PeerDied, SerializationError
from fiber.runtime import session as session_module
from fiber.runtime.endpoint import HELLO, Endpoint
from fiber.runtime.link import Link
from fiber.runtime.loop import Event, Loop, Timer
from fiber.runtime.places import connect, is_far
from fiber.wire import pickling
from fiber.wire.channel import Channel
from fiber.wire.framing import Frame

if TYPE_CHECKING:
    from fiber.runtime.splice import Splice

__all__ = ["Descriptor", "DupFd", "Loans", "claim", "going_along", "lend"]

SERVICE = "descriptors"
"""What a caller of the endpoint asks for in its hello."""

HANDED = 64
"""Kind of the one frame that answers: why there is none, or None and the descriptor."""

_LEASE = 60.0  # seconds that a connection is kept for whoever unpickles it
_TIMEOUT = 30.0  # seconds that a lender may take to answer
_LAST_CALL = 2.0  # seconds that a process waits, when it ends, for what it lent to be claimed


class Descriptor:
    """Owns an open file descriptor: it is closed when nobody has this object any more."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def duplicate(cls, fd: int) -> Descriptor:
        """Return one for a duplicate of `fd`."""
        return cls(os.dup(fd))

    def __index__(self) -> int:
        return self._fd

    def detach(self) -> int:
        """Return the file descriptor, which is the caller's to close from now on."""
        fd, self._fd = self._fd, -1
        return fd

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


# While a process is being started -------------------------------------------------------------


class DupFd:
    """Stands, in the pickle of a process object, for a descriptor that goes along with it.

    Args:
        place: which of those that go along.
    """

    def __init__(self, place: int) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return _brought, (self._place,)


_along: dict[int, Descriptor] = {}  # what came along with this process and was not unpickled yet


@contextlib.contextmanager
def going_along(fds: list[int]) -> Iterator[None]:
    """In the child: while its process object is unpickled, `fds` are there for it.

    Those that it does not ask for are closed. They come from an attempt to pickle it that failed.
    """
    _along.update((place, Descriptor(fd)) for place, fd in enumerate(fds))
    try:
        yield
    finally:
        _along.clear()


def _brought(place: int) -> Descriptor:
    return _along.pop(place)


# At any other time ----------------------------------------------------------------------------


class Identity(NamedTuple):
    """Tells whether a number still is the descriptor that it was: numbers are used again."""

    fd: int
    device: int
    inode: int
    access: int

    @classmethod
    def of(cls, fd: int) -> Identity:
        about = os.fstat(fd)
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE  # the ends of a pipe are one inode
        return cls(fd, about.st_dev, about.st_ino, access)


class Lent:
    """What is pickled in the place of a descriptor; unpickled, it is a `Descriptor`."""

    def __init__(self, address: str, number: int, identity: Identity) -> None:
        self._facts = (address, number, tuple(identity))

    def __reduce__(self) -> tuple[Any, ...]:
        return claim, self._facts

    def detach(self) -> int:
        """As if it had been unpickled right here."""
        return claim(*self._facts).detach()


class _Kept:
    """A duplicate that is kept for pickles of it, by their numbers."""

    def __init__(self, duplicate: Descriptor) -> None:
        self.duplicate = duplicate
        self.promised: dict[int, tuple[int, Timer | None]] = {}
        """Which thread made the pickle, and what ends the wait for its claim."""


class Loans:
    """Keeps what this process has lent. All methods within the loop, save `linger` and `forget`.

    Args:
        loop: of this process.
        endpoint: where it is asked for.
        carry: of the session, for streams to other places.
    """

    def __init__(self, loop: Loop, endpoint: Endpoint, carry: Callable[..., Splice]) -> None:
        self._carry = carry
        self.address = endpoint.address
        self.loop = loop
        self._kept: dict[Identity, _Kept] = {}
        self._links: set[Link] = set()
        self._readers: dict[Identity, Splice] = {}  # of pipes, in other places
        self._settled = Event()
        endpoint.serve(SERVICE, self._arrived)

    def lend(self, fd: int, number: int, lease: float | None) -> Lent:
        """Keep a duplicate of `fd` for `lease` seconds, None for as long as this process lives."""
        identity = Identity.of(fd)
        kept = self._kept.get(identity)
        if kept is None:
            kept = self._kept[identity] = _Kept(Descriptor.duplicate(fd))
        timer = None
        if lease is not None:
            timer = self.loop.call_later(lease, lambda: self._settle(identity, number))
        kept.promised[number] = (get_ident(), timer)
        return Lent(self.address, number, identity)

    def _settle(self, identity: Identity, number: int) -> None:
        """Nobody will claim that one any more."""
        kept = self._kept.get(identity)
        if kept is None:
            return
        _, timer = kept.promised.pop(number, (0, None))
        if timer is not None:
            timer.cancel()
        if not kept.promised:
            del self._kept[identity]
            if not self._kept:
                self._settled.set()

    def withdraw(self, mark: int) -> None:
        """What this thread lent after number `mark` is for a pickle that was never made."""
        me = get_ident()
        for identity, kept in list(self._kept.items()):
            for number, (thread, _) in list(kept.promised.items()):
                if number > mark and thread == me:
                    self._settle(identity, number)

    def hand_out(self, number: int, identity: Identity) -> Descriptor:
        """Return the descriptor of a pickle.

        Raises:
            LookupError: it is not there any more.
            OSError: the system is out of descriptors.
        """
        kept = self._kept.get(identity)
        if kept is not None:
            self._settle(identity, number)
            if identity not in self._kept:
                return kept.duplicate
            return Descriptor.duplicate(kept.duplicate.__index__())
        try:
            again = Descriptor.duplicate(identity.fd)
        except OSError as error:
            raise LookupError from error
        # Where a socket has no inode, nothing would tell it from another of the same number.
        if not identity.inode or Identity.of(again.__index__())[1:] != identity[1:]:
            raise LookupError
        return again

    def _arrived(self, link: Link, hello: dict[str, Any]) -> None:
        handed: list[Descriptor] = []
        error: Exception | None = None
        elsewhere = hello["elsewhere"]
        try:
            handed.append(self.hand_out(hello["number"], Identity(*hello["identity"])))
            if elsewhere:
                self._refuse_another(Identity(*hello["identity"]))
        except (LookupError, OSError) as why:
            error = why if isinstance(why, OSError) else LookupError()
        except SerializationError as why:
            error = why
            handed.clear()

        def lost() -> None:
            self._links.discard(link)
            handed.clear()  # not before: macOS loses what is closed before it has arrived

        link.on_frame, link.on_lost = _ignore, lost
        if handed and elsewhere:
            link.post(HANDED, pickle.dumps(error))
            self._relay(link.release(), handed[0], Identity(*hello["identity"]))
            return
        self._links.add(link)
        link.post(HANDED, pickle.dumps(error), (), handed)

    def _refuse_another(self, identity: Identity) -> None:
        """Refuse to have a pipe read in two other places.

        Each takes what there is as it comes, and does not leave it to who wants to read next.
        """
        reader = self._readers.get(identity)
        if reader is not None and (reader.took or not reader.closed):
            raise SerializationError(
                "this end of a pipe is or was read in another container or on another machine, "
                "where what is for this process may have gone to: use a Queue of Fiber's for "
                "several readers (concurrent.futures.ProcessPoolExecutor has such pipes: use "
                "fiber.Pool)"
            )

    def _relay(self, far: Any, descriptor: Descriptor, identity: Identity) -> None:
        """Have a process of another place use a descriptor of ours, by a stream to it."""
        from fiber.runtime.splice import Pipe

        fd = descriptor.detach()
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            self._carry(far, socket.socket(fileno=fd))
            return
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        splice = self._carry(far, Pipe(fd), (access != os.O_WRONLY, access != os.O_RDONLY))
        if access == os.O_RDONLY:
            self._readers[identity] = splice

    def linger(self) -> None:
        """Wait, when the process is about to end, for what it lent to be claimed, but not long."""
        with self.loop:
            self._settled = Event()
            if not self._kept:
                return
        self.loop.wait(self._settled, _LAST_CALL)

    def close(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        for link in self._links:
            link.close()
        self._links.clear()

    def forget(self) -> None:
        """After `os.fork`, in the child: what was lent is the parent's to keep."""
        self._kept.clear()


def _ignore(frame: Frame) -> None:
    """Whoever has claimed a descriptor has nothing else to say."""


def lend(fd: int, lease: float | None = _LEASE) -> Lent:
    """Keep a duplicate of `fd` for whoever unpickles what this returns.

    Args:
        fd: an open file descriptor, which stays the caller's.
        lease: seconds that it is kept, if nobody claims it; None for as long as this process lives.
    """
    session = session_module.current()
    with _within(session.loop):
        _carrier.made += 1
        return session.loans.lend(fd, _carrier.made, lease)


def claim(address: str, number: int, identity: tuple[int, ...]) -> Descriptor:
    """Get what was lent from the process that lent it; may be called within the loop.

    A process of another place, which can be given no descriptor, gets a stream of its own that is
    relayed by the lender. It lasts as long as both of them live.

    Args:
        address: of the lender's endpoint.
        number: of the pickle.
        identity: of the descriptor, as the lender has it.

    Raises:
        PeerDied: the lender has ended, or does not answer.
        ConnectionError: it has it no more.
    """
    try:
        loans = session_module.loans_at(address)
        if loans is not None:
            with _within(loans.loop):
                return loans.hand_out(number, Identity(*identity))
        return _claim_from(address, {"number": number, "identity": identity})
    except LookupError:
        raise ConnectionError(
            "what was sent is gone: its sender has closed it, and it had been received already, "
            f"or was not received within {_LEASE:g} seconds"
        ) from None


def _claim_from(address: str, facts: dict[str, Any]) -> Descriptor:
    frames: list[Frame] = []
    elsewhere = is_far(address.removeprefix("unix:"))
    try:
        channel = connect(address, _TIMEOUT)
        if elsewhere:
            return _claim_stream(channel, facts)
        try:
            channel.takes_fds = True
            channel.sock.settimeout(_TIMEOUT)
            channel.send(HELLO, pickle.dumps({"service": SERVICE, "elsewhere": False, **facts}))
            while not frames:
                frames = channel.read()
            error = pickle.loads(frames[0].body)
            if error is not None:
                raise error
            for fd in channel.take_fds(1):
                return Descriptor(fd)
        finally:
            channel.close()
    except (OSError, EOFError, AuthenticationError) as error:
        raise PeerDied(
            f"the process that sent a connection or its like cannot be asked for it: {error}"
        ) from error
    raise OSError(errno.EMFILE, "this process has too many open files (see ulimit -n)")


def _claim_stream(channel: Channel, facts: dict[str, Any]) -> Descriptor:
    """Get a stream of our own to a descriptor of a process in another place."""
    from fiber.runtime.gateway import read_frame

    try:
        channel.sock.settimeout(_TIMEOUT)
        channel.send(HELLO, pickle.dumps({"service": SERVICE, "elsewhere": True, **facts}))
        error = pickle.loads(read_frame(channel.sock)[1])
        if error is not None:
            raise error
        near, ours = socket.socketpair()
        session = session_module.current()
        with _within(session.loop):
            session.carry(channel.sock, near)
        return Descriptor(ours.detach())
    except BaseException:
        channel.close()
        raise


def _within(loop: Loop) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if loop.held else loop


class _Carrier:
    """To multiprocessing's reducers it is a process being started, which takes descriptors along.

    Attributes:
        made: number of the last that was lent.
    """

    made = 0

    @staticmethod
    def DupFd(lent: Lent) -> Lent:
        return lent

    @staticmethod
    def duplicate_for_child(fd: int) -> Lent:
        return lend(fd, None)  # multiprocessing keeps them as long

    def withdraw(self, mark: int) -> None:
        if mark == self.made:
            return
        session = session_module.current()
        with _within(session.loop):
            session.loans.withdraw(mark)


_carrier = _Carrier()
pickling.carrier = _carrier
