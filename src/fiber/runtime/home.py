"""The home: the objects that this process serves to the other processes of the session.

    Ref.call ─► Peer ─► CALL ─► endpoint ─► Client ─► Home ─► a method of Served ─► Request.answer
                                                                                         │
    Ref.call ◄─ Peer ◄─ REPLY ◄──────────────────────────────────────────────────────────┘

A queue, a lock and their kin live in the process that made them, as a `Served` object; whoever has
been handed one holds a `Ref` to it. In the home itself the same methods are called without a wire.

All methods of served objects run within the loop, so they need no locks; they never block and never
run the user's code. What cannot be answered at once keeps its `Request` and answers it later.

A home knows which process uses which object, and hears when one of them is gone: whether it said
good-bye or died decides what an object makes of it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
from collections.abc import Callable, Collection, Sequence
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from fiber.runtime.link import Link
from fiber.runtime.logs import DEBUG, log
from fiber.runtime.loop import Event, Loop, Timer
from fiber.wire.blocks import Block, Blocks, Reader, remove
from fiber.wire.framing import Buffer, Frame

if TYPE_CHECKING:
    from fiber.runtime.endpoint import Endpoint

__all__ = [
    "ATTACH",
    "CALL",
    "CANCEL",
    "CAST",
    "COUNTS_SIZE",
    "FREE",
    "GOODBYE",
    "LEASE",
    "PAGE",
    "RELEASE",
    "REPLY",
    "SERVICE",
    "Client",
    "Home",
    "Request",
    "Served",
    "settle",
]

SERVICE = "home"
"""What a caller of the endpoint asks for in its hello."""

CALL, CAST, ATTACH, RELEASE, LEASE, CANCEL, PAGE, GOODBYE, REPLY, FREE = range(32, 42)
"""Kinds of frames: the last two come from a home, the others go to it."""

COUNTS_SIZE = 1 << 16
"""Bytes of the memory that a process shares with a home. What is not used of it costs nothing."""

_SETTLED = 5e-6  # seconds in which what one processor has written is there for another to read
_LEASE = 60.0  # seconds that an object without a user is kept once it was pickled


def settle() -> None:
    """Wait until what this process and another have just written is there for both to read.

    By two words of shared memory a process and a home agree on who may go on, without a message:
    each writes its own, then reads the other's. The home waits between the two, so that at least
    one of them sees what the other wrote.
    """
    settled = perf_counter() + _SETTLED
    while perf_counter() < settled:
        pass


class Client:
    """A process that uses objects of this home; `link` is None for the home's own process.

    Attributes:
        name: of the process, for messages.
        process: the place that it is in, and its process ID.
        died: whether it ended without a good-bye.
        supervised: somebody else, such as a pool, makes good for its death.
        counts: memory that it shares with us, two words for each object; see `settle`.
    """

    def __init__(self, home: Home, link: Link | None, facts: dict[str, Any]) -> None:
        self.home = home
        self.link = link
        self.name: str = facts["name"]
        self.process: tuple[str, int] = facts["process"]
        self.supervised: bool = facts.get("supervised", False)
        self.uses: set[Served] = set()
        self.requests: dict[int, Request] = {}  # not answered yet
        self.blocks: set[str] = set()  # that came from it, of shared memory
        self.counts: memoryview | None = None
        self.died = False
        self._dismissed = False

    def __str__(self) -> str:
        return f"{self.name} (process {self.process[1]})"

    @property
    def near(self) -> bool:
        """Whether it is in the home's own place, so that there may be shared memory."""
        return self.process[0] in ("", self.home.me.process[0])

    def on_frame(self, frame: Frame) -> None:
        kind, body, buffers = frame
        if kind == CALL:
            key, target, method, args = pickle.loads(body)
            request = self.requests[key] = Request(self, key)
            request.buffers = buffers
            self.home.call(request, target, method, args)
        elif kind == CAST:
            target, method, args = pickle.loads(body)
            request = Request(self, None)
            request.buffers = buffers
            self.home.call(request, target, method, args)
        elif kind == ATTACH:
            self.home.attach(self, pickle.loads(body))
        elif kind == RELEASE:
            self.home.detach(self, pickle.loads(body))
        elif kind == LEASE:
            self.home.lease(pickle.loads(body))
        elif kind == CANCEL:
            canceled = self.requests.get(pickle.loads(body))
            if canceled is not None:
                canceled.withdraw()
        elif kind == PAGE:
            self._map_page(pickle.loads(body))
        elif kind == GOODBYE:
            self._dismissed = pickle.loads(body)

    def _map_page(self, path: str) -> None:
        with contextlib.suppress(OSError):
            with open(path, "r+b") as file:
                self.counts = memoryview(mmap.mmap(file.fileno(), COUNTS_SIZE)).cast("Q")
            os.unlink(path)

    def on_lost(self) -> None:
        self.home.lost(self, died=not self._dismissed)


class Request:
    """One call of a method of a served object, until it is answered.

    Attributes:
        client: who asks.
        buffers: raw buffers that came with the call.
        done: set when it is answered; only for calls from the home's own process.
        accept: of these as well: given the answer, it returns what is to be taken for it.
        on_withdrawn: called when nobody waits for the answer any more.
    """

    __slots__ = (
        "accept",
        "buffers",
        "client",
        "done",
        "error",
        "key",
        "on_withdrawn",
        "result",
        "timer",
    )

    def __init__(self, client: Client, key: int | None) -> None:
        self.client = client
        self.key = key
        self.buffers: Sequence[Buffer] = ()
        self.done: Event | None = None
        self.accept: Callable[[Any, Sequence[Buffer]], Any] | None = None
        self.on_withdrawn: Callable[[], object] | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.timer: Timer | None = None

    def answer(self, result: object = None, buffers: Sequence[Buffer] = ()) -> None:
        """Answer it; `buffers` go beside the result."""
        self._answer(result, None, buffers)

    def fail(self, error: BaseException) -> None:
        """Have the caller raise `error`."""
        self._answer(None, error, ())

    def _answer(
        self, result: object, error: BaseException | None, buffers: Sequence[Buffer]
    ) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.on_withdrawn = None
        link = self.client.link
        if link is None:
            if self.accept is not None and error is None:
                result = self.accept(result, buffers)
            self.result, self.error, self.buffers = result, error, buffers
            if self.done is not None:
                self.done.set()
        elif self.key is not None:
            self.client.requests.pop(self.key, None)
            link.post(REPLY, pickle.dumps((self.key, error, result)), buffers)
        elif error is not None:
            log(DEBUG, "a message of %s was of no use: %s", self.client, error)

    def expire(self, seconds: float | None, call: Callable[[], object]) -> None:
        """Have `call` run in so many seconds, if it is not answered before; None: never."""
        if seconds is not None:
            self.timer = self.client.home.loop.call_later(max(seconds, 0.0), call)

    def withdraw(self) -> None:
        """Nobody waits for it any more; it is answered nevertheless."""
        if self.on_withdrawn is not None:
            self.on_withdrawn()
        self._answer(None, None, ())


class Served:
    """An object of this home.

    Its methods named `do_...` can be called by every user, with a `Request` and arguments that are
    plain values; an exception that one raises is raised where it was called.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.id = int.from_bytes(os.urandom(8), "big")
        self.users: set[Client] = set()
        self.kept: set[Client] = set()  # those without a reference, see `keeps`
        self.met: set[tuple[str, int]] = set()  # the processes that ever used it
        self.leased_until = 0.0  # of `time.monotonic`; it may be in a pickle under way

    def keeps(self, client: Client) -> bool:
        """Whether `client`'s end matters to it even when that has no reference any more."""
        return False

    def left(self, client: Client, died: bool) -> None:
        """`client` uses it no more, because it has let go of it, has ended, or has died."""

    def dropped(self) -> None:
        """Nobody can reach it any more: let go of what it holds."""


class Home:
    """See the module. All methods within the loop."""

    def __init__(self, loop: Loop, endpoint: Endpoint, name: str, process: tuple[str, int]) -> None:
        self.loop = loop
        self.endpoint = endpoint
        self.me = Client(self, None, {"name": name, "process": process})
        self.clients: set[Client] = set()
        self.objects: dict[int, Served] = {}
        self.forgiven: Callable[[tuple[str, int]], bool] = lambda process: False
        """Whether the process with that ID was told to end, so that its death is no surprise."""
        self.own_blocks: Blocks | None = None
        self.reader = Reader()
        self._blocks: dict[str, Client] = {}  # that wait to be read, and whose they are
        self._dropping: dict[Served, Timer] = {}
        endpoint.serve(SERVICE, self._arrived)

    def _arrived(self, link: Link, hello: dict[str, Any]) -> None:
        client = Client(self, link, hello)
        self.clients.add(client)
        link.on_frame, link.on_lost = client.on_frame, client.on_lost

    def add(self, served: Served) -> None:
        """Serve it from now on."""
        self.objects[served.id] = served

    def call(self, request: Request, target: int, method: str, args: tuple[Any, ...]) -> None:
        """Have an object do something."""
        served = self.objects.get(target)
        if served is None:
            request.fail(LookupError("gone"))
            return
        if served not in request.client.uses:
            self.attach(request.client, target)
        try:
            getattr(served, "do_" + method)(request, *args)
        except Exception as error:  # be it a refusal or a defect, it is for the caller to know
            request.fail(error)

    def block_came(self, client: Client, block: Block) -> None:
        """A block is here to be read."""
        client.blocks.add(block.path)
        self._blocks[block.path] = client

    def block_read(self, block: Block) -> None:
        """It was read: its owner may use it again, and if it is gone, so is the block."""
        client = self._blocks.pop(block.path, None)
        if client is None or client is self.me:
            if self.own_blocks is not None:
                self.own_blocks.take_back(block.path)
        elif client in self.clients and client.link is not None:
            client.link.post(FREE, pickle.dumps(block.path))
        else:
            self._remove(block.path)

    def _remove(self, path: str) -> None:
        self.reader.forget(path)
        remove(path)

    def attach(self, client: Client, target: int) -> None:
        """`client` has a reference to the object."""
        served = self.objects.get(target)
        if served is not None:
            served.users.add(client)
            served.kept.discard(client)
            served.met.add(client.process)
            client.uses.add(served)
            timer = self._dropping.pop(served, None)
            if timer is not None:
                timer.cancel()

    def detach(self, client: Client, target: int) -> None:
        """`client` has none any more."""
        served = self.objects.get(target)
        if served is None:
            return
        if served.keeps(client):
            served.kept.add(client)
            self._drop_if_unused(served)
        else:
            self._leave(client, served, died=False)

    def ended(
        self, name: str, process: tuple[str, int], targets: Collection[int], died: bool
    ) -> None:
        """A process has ended that was given objects when it was started.

        Args:
            name, process: of the process, as `Client` has them.
            targets: the objects. Those that it has never used hear from here that it died.
            died: whether it did.
        """
        client = Client(self, None, {"name": name, "process": process})
        for target in targets:
            served = self.objects.get(target)
            if served is not None:
                if died and process not in served.met:
                    served.left(client, died=True)
                served.met.discard(process)  # another process may have that ID one day

    def lease(self, target: int) -> None:
        """Keep the object for a while, for a pickle of it is under way."""
        served = self.objects.get(target)
        if served is not None:
            served.leased_until = monotonic() + _LEASE

    def read_all(self, process: tuple[str, int]) -> None:
        """The process has ended: read all that it sent, before anybody learns of its end."""
        self.endpoint.drain()  # of its hello, perhaps
        for client in list(self.clients):
            if client.process == process and client.link is not None:
                client.link.drain()

    def lost(self, client: Client, died: bool) -> None:
        """The process is gone."""
        self.clients.discard(client)
        client.died = died
        for request in list(client.requests.values()):
            request.withdraw()
        for served in list(client.uses):
            self._leave(client, served, died)
        for path in client.blocks - self._blocks.keys():
            self._remove(path)

    def _leave(self, client: Client, served: Served, died: bool) -> None:
        served.users.discard(client)
        served.kept.discard(client)
        client.uses.discard(served)
        served.left(client, died)
        self._drop_if_unused(served)

    def _drop_if_unused(self, served: Served) -> None:
        if served.users == served.kept and served not in self._dropping:
            left = served.leased_until - monotonic()
            if left <= 0:
                self._drop(served)
            else:
                drop = lambda: self._drop(served)  # noqa: E731
                self._dropping[served] = self.loop.call_later(left, drop)

    def _drop(self, served: Served) -> None:
        self._dropping.pop(served, None)
        if served.users == served.kept:
            for client in served.kept:
                client.uses.discard(served)
            self.objects.pop(served.id, None)
            served.dropped()

    def close(self) -> None:
        """Let go of everything; users hear of it by the end of their links."""
        for client in list(self.clients):
            if client.link is not None:
                client.link.close()
            client.counts = None
        self.clients.clear()
        for served in self.objects.values():
            served.dropped()
        self.objects.clear()
        self.reader.close()
