"""A call: a function, its items, and where their results go.

    Call.items ─► take(start, stop) ─► a batch          results ─► sink (see `pool.results`)

The items of a `map` are all there. Those of a stream (`imap`) come from a source, and are let go of
when the results before them are there.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Container, Hashable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fiber.errors import SerializationError
from fiber.pool.protocol import APPLY
from fiber.pool.source import Source
from fiber.wire.arena import LEAST
from fiber.wire.framing import Buffer
from fiber.wire.pickling import (
    PLAIN,
    PROTOCOL,
    SIZED,
    Apart,
    Number,
    Packed,
    dumps,
    kinds_of,
    loads,
)

if TYPE_CHECKING:
    from fiber.pool.constants import Constants

__all__ = [
    "LOOKED_AT",
    "Call",
    "Entangled",
    "Options",
    "Sink",
    "name_of",
    "need_a_look",
    "weight_of",
]

LOOKED_AT = 256
"""Items of a call, at the most, that are searched for what they have in common."""

_FEW = 64  # items with large arguments that make a batch, about


class Entangled(Exception):
    """An item has a part of a constant, which so cannot be sent apart from it."""


class Options(NamedTuple):
    """How a call is run; None for what the pool says.

    Attributes:
        chunk: items that stay together.
        retries: how often an item runs again after its worker died.
        timeout: seconds that an item may take.
    """

    chunk: int = 1
    retries: int | None = None
    timeout: float | None = None


class Sink(Protocol):
    """Where the results of a call go."""

    def deliver(self, start: int, values: list[Any], errors: Mapping[int, BaseException]) -> None:
        """Take results of items from `start` on; `errors` by their place in `values`."""

    def finish(self) -> None:
        """All items are delivered."""

    def abort(self, error: BaseException) -> None:
        """Nothing more will come; `error` says why."""


class Call:
    """A call that is not finished."""

    # What most calls do without is set where it is needed: calls may be as short as a task.

    source: Source | None = None
    fed = 0
    """Items that were read of a stream."""
    told = 0
    """Those of them that the scheduler knows: whole chunks."""
    consumed = 0
    """Results of a stream that were taken."""
    iterator: Any = None
    """A weak reference to who hands out the results of a stream."""
    constants: Constants | None = None
    all_inline = False
    """Whether the constants go with the items after all."""
    keeps: tuple[Any, Packed] | None = None
    """What keeps a function that the workers share, and its own pickle."""

    def __init__(
        self,
        id: int,
        function: Callable[..., Any],
        packed: Packed,
        how: int,
        sink: Sink,
        timeout: float | None,
        chunk: int,
    ) -> None:
        self.id = id
        self.function = function
        self.packed = packed
        self.how = how
        self.sink = sink
        self.timeout = timeout
        self.chunk = chunk
        self.items: list[Any] = []
        self.known_by: set[int] = set()
        """Workers that have the function."""
        self._first = 0  # index of the first of `items`
        self._settled: dict[int, int] = {}  # settled ranges above it

    @property
    def kind(self) -> Hashable:
        """What the function is known by from call to call, without keeping it alive."""
        function = _innermost(self.function)
        return getattr(function, "__code__", None) or getattr(function, "__qualname__", None)

    def describe(self, item: int) -> str:
        """Name an item, for messages."""
        name = name_of(self.function)
        return name if self.how == APPLY else f"item {item} of {name}"

    def take(self, start: int, stop: int) -> list[Any]:
        """Return items."""
        return self.items[start - self._first : stop - self._first]

    def pack(self, items: list[Any], known: Container[str] | None) -> tuple[bytes, list[Any], int]:
        """Pickle items of a batch; return the bytes, the buffers, and how many groups they make.

        As in multiprocessing, only the items of one chunk may share what they refer to: a task that
        changes its argument shall not change that of another which happens to be in its batch.
        """
        if self.how == APPLY:
            ((args, kwargs),) = items
            if bytes in map(type, args):
                items = [(_apart(args, {}, None), kwargs)]
            packed = dumps(items, known)
            return packed.data, list(packed.buffers), 1
        if self.constants is not None and not self.all_inline:
            try:
                return self._pack(items, known, self.constants.number)
            except Entangled:
                self.all_inline = True
        return self._pack(items, known, None)

    def _pack(
        self, items: list[Any], known: Container[str] | None, number: Number | None
    ) -> tuple[bytes, list[Any], int]:
        kinds = kinds_of(items)
        if len(items) <= self.chunk or kinds <= PLAIN:
            if bytes in kinds or tuple in kinds:
                items = _set_apart(items, number)
            packed = dumps(items, known, number=number)
            return packed.data, list(packed.buffers), 1
        chunks = (items[at : at + self.chunk] for at in range(0, len(items), self.chunk))
        groups = [dumps(_set_apart(c, number), known, number=number) for c in chunks]
        data = pickle.dumps([(group.data, len(group.buffers)) for group in groups], PROTOCOL)
        return data, [buffer for group in groups for buffer in group.buffers], len(groups)

    def unpack(
        self,
        start: int,
        packed: Sequence[bytes],
        buffers: Iterable[Sequence[Buffer]],
        errors: dict[int, BaseException],
    ) -> list[Any]:
        """Unpickle results of items from `start` on; what cannot be goes into `errors`."""
        values: list[Any] = []
        for place, its in enumerate(buffers):
            try:
                values.append(loads(packed[place], its))
            except BaseException as error:
                text = f"the result of {self.describe(start + place)}"
                errors[place] = SerializationError(f"{text} cannot be unpickled: {error!r}")
                errors[place].__cause__ = error
                values.append(None)
        return values

    def go_inline(self) -> bool:
        """Send all with the batches from now on; return whether that is new."""
        if self.all_inline or (self.constants is None and self.keeps is None):
            return False
        self.all_inline = True
        if self.keeps is not None:
            self.packed = self.keeps[1]
        return True

    def settle(self, start: int, stop: int) -> None:
        """Let go of items whose results are there, if the call is a stream."""
        if self.source is not None:
            self._settled[start] = stop
            end = self._first
            while end in self._settled:
                end = self._settled.pop(end)
            del self.items[: end - self._first]
            self._first = end


def _set_apart(items: list[Any], number: Number | None) -> list[Any]:
    """Have large bytes among items, or what is in these, travel apart from the pickle of all.

    What has a number does not travel with them.
    """
    kinds = set(map(type, items))
    if bytes not in kinds and (len(items) > _FEW or tuple not in kinds):
        return items
    seen: dict[int, Apart] = {}  # what is one object arrives as one
    return [_apart(item, seen, number) for item in items]


def _apart(value: Any, seen: dict[int, Apart], number: Number | None) -> Any:
    """Return what is to be pickled instead of an item, or of one of its arguments."""
    # No closure that calls itself: that would keep large data until the collector comes.
    if number is not None and number(value) is not None:
        return value
    if type(value) is tuple and any(type(v) is bytes and len(v) >= LEAST for v in value):
        return tuple([_apart(v, seen, number) for v in value])
    if type(value) is bytes and len(value) >= LEAST:
        return seen.setdefault(id(value), Apart(value))
    return value


def _innermost(function: Any) -> Any:
    """Return what a `functools.partial`, or one of those, calls."""
    while type(function) is not FunctionType and hasattr(function, "func"):
        function = function.func
    return function


def name_of(function: Callable[..., Any]) -> str:
    """Return what people call a function."""
    function = _innermost(function)  # the arguments of a partial may be megabytes
    return getattr(function, "__qualname__", None) or repr(function)


def need_a_look(items: Sequence[Any]) -> bool:
    """Whether items may have something large in common; see `pool.constants`."""
    if len(items) < 2:
        return False
    sample = items[:: -(-len(items) // LOOKED_AT)]
    return not kinds_of(sample) <= PLAIN - SIZED


def weight_of(packed: Packed) -> int:
    """Return how many bytes it takes."""
    return len(packed.data) + sum(map(len, packed.buffers))
