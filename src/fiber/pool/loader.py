"""The constants of calls, as a worker has them; see `pool.constants`.

    CONSTANTS ─► Loader ─► _Constant ─┬─ same place ──► the file, mapped ─┐
                                      └─ elsewhere ───► a copy of it ─────┴─► load ─► a task's own

A task may change its arguments, and nobody else shall see that. So each gets a copy of its own: it
is unpickled anew, and large buffers are private views of the shared memory, whose pages are copied
by who writes to them.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from fiber.constants import ConstantRef
from fiber.pool.items import Load
from fiber.runtime.refs import lookup
from fiber.runtime.snapshots import map_file, parts
from fiber.wire.framing import Buffer
from fiber.wire.pickling import loads
from fiber.wire.views import Views

__all__ = ["Loader", "Source", "load_function"]

_VIEWED = 1 << 20  # bytes: what is smaller is copied faster than it is mapped


class Source(NamedTuple):
    """Where a worker gets a constant.

    Attributes:
        path: of the file, "" if there is none; for who is in the same place.
        size: of it all, in bytes.
        address, id: of the reference to it, for everybody else.
        fixed: whether it cannot change, so that tasks may have it in common.
    """

    path: str
    size: int
    address: str
    id: int
    fixed: bool


def load_function(*source: Any) -> Any:
    """Return the function, as one of this worker's own."""
    constant = _Constant(Source(*source))
    function = constant.load()
    with contextlib.suppress(TypeError):  # a callable that cannot be referred to weakly
        # In another place, what was fetched is there for the other workers as long as this one is.
        weakref.finalize(function, constant.close).atexit = False
    return function


class _Constant:
    """A constant, as a worker has it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._opened = False
        self._path = ""  # of the file that is mapped
        self._whole: memoryview | None = None
        self._keep: Any = None  # what keeps the file there
        self._value: Any = None
        self._views: Views | None = None
        self._viewed = False  # whether an earlier task's view is not over

    def load(self) -> Any:
        """Return it, as new."""
        if not self._opened:
            self._open()
        if self._value is not None:
            return self._value
        assert self._whole is not None
        data, *buffers = parts(self._whole)
        if buffers:
            data, *buffers = parts(self._private(self._whole))
        value = loads(data, buffers)
        if self._source.fixed:
            self._value = value
        return value

    def close(self) -> None:
        """Let go of it."""
        self._keep = self._whole = self._value = self._views = None

    def _open(self) -> None:
        source = self._source
        if source.path and os.path.exists(source.path):
            self._path, self._whole = source.path, map_file(source.path, source.size)
        else:
            ref = lookup(ConstantRef, source.address, source.id)
            self._whole, copy = ref.open()
            self._keep = ref, copy
            self._path = copy.path if copy is not None else ""
        self._opened = True

    def _private(self, whole: memoryview) -> memoryview:
        """Return a copy of its bytes, which may be one that is made when it is written to."""
        if not self._path or len(whole) < _VIEWED:
            return memoryview(bytearray(whole))
        if self._views is None:
            self._views = Views()
        if any(ended.token for ended in self._views.collect()):
            self._viewed = False
        if self._viewed:  # a task has kept it: the next one needs another mapping
            return self._views.view(self._path, 0, len(whole), False, alone=True)
        view = self._views.view(self._path, 0, len(whole), True)
        self._viewed = True
        return view


class Loader:
    """The constants of the calls that a worker has batches of."""

    def __init__(self) -> None:
        self._calls: dict[int, list[_Constant]] = {}

    def tell(self, call: int, sources: Sequence[Source]) -> None:
        """Batches of a call refer to these."""
        self._calls[call] = [_Constant(Source(*source)) for source in sources]

    def forget(self, call: int) -> None:
        """The call is over."""
        for constant in self._calls.pop(call, ()):
            constant.close()

    def loads_for(self, call: int) -> Load:
        """Return what unpickles the items of a call."""
        constants = self._calls.get(call)
        if constants is None:
            return loads

        def loads_with(data: Buffer, buffers: Sequence[Buffer]) -> Any:
            return _Unpickler(data, buffers, constants).load()

        return loads_with


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: Buffer, buffers: Sequence[Buffer], constants: list[_Constant]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._constants = constants
        self._loaded: dict[int, Any] = {}  # items that travel together may share what they have

    def persistent_load(self, pid: int) -> Any:
        if pid not in self._loaded:
            self._loaded[pid] = self._constants[pid].load()
        return self._loaded[pid]
