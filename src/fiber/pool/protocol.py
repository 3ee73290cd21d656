"""What a pool's master and its workers say to each other.

    master ─ INITIALIZE, BATCH, FORGET, STOP ─► worker
    master ◄─ UP, INITIALIZER_FAILED, RESULTS, UNLOADABLE ─ worker

Bodies are pickled tuples of plain values, but for the most frequent one, BATCH. What belongs to
the user travels inside them as bytes that were pickled apart, so that what cannot be unpickled
costs its own item and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from fiber.errors import RemoteError, RemoteTraceback
from fiber.wire.framing import Buffer
from fiber.wire.pickling import dumps, loads

__all__ = [
    "APPLY",
    "BATCH",
    "BATCH_HEAD",
    "FORGET",
    "INITIALIZE",
    "INITIALIZER_FAILED",
    "MAP",
    "RESULTS",
    "STARMAP",
    "STOP",
    "UNLOADABLE",
    "UP",
    "BatchHead",
    "decode_exception",
    "encode_exception",
    "split",
]

INITIALIZE, BATCH, FORGET, STOP, UP, INITIALIZER_FAILED, RESULTS, UNLOADABLE = range(2, 10)
"""Kinds of frames.

    INITIALIZE          packed (initializer, initargs), or nothing
    BATCH               a `BatchHead`, the packed function if it has one, the packed items; then
                        the buffers of both
    FORGET              call
    STOP                -
    UP                  -
    INITIALIZER_FAILED  exception
    RESULTS             batch, returned, seconds, values or None, packed values, numbers of their
                        buffers, {position: exception}; then buffers
    UNLOADABLE          batch, exception
"""

MAP, STARMAP, APPLY = range(3)
"""How a function is called: with the item, with its elements, or with (args, kwargs)."""

BATCH_HEAD = struct.Struct("!QQIIIBBIQ")


class BatchHead(NamedTuple):
    """The fixed part of a BATCH: which items, and how the body is cut."""

    batch: int
    call: int
    chunk: int
    items: int
    groups: int
    """Pickles that hold them; if there are several, in a list with the numbers of their buffers."""
    how: int
    careful: bool
    function_buffers: int
    function_size: int
    """Bytes of the packed function, 0 if the worker knows it already."""


def encode_exception(error: BaseException, skip: int = 1) -> tuple[bytes, str]:
    """Return an exception as bytes that can be unpickled, and its traceback as text.

    Args:
        error: as it was caught.
        skip: how many of the traceback's outermost frames are Fiber's own.
    """
    import traceback  # only failures need it

    frames = error.__traceback__
    for _ in range(skip):
        frames = frames.tb_next if frames is not None else None
    text = "".join(traceback.format_exception(type(error), error, frames))
    if isinstance(error, Exception):
        try:
            data = dumps(error)
            whole = dumps((data.data, [bytes(b) for b in data.buffers])).data
            if type(_load_exception(whole)) is type(error):
                return whole, text
        except BaseException:
            pass  # it cannot travel as itself: the stand-in below tells all of it
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    try:
        message = f"{name}: {error}"
    except BaseException:
        message = name
    stand_in = dumps(RemoteError(message, name, text)).data
    return dumps((stand_in, [])).data, text


def _load_exception(whole: Buffer) -> Any:
    data, buffers = loads(whole)
    return loads(data, buffers)


def decode_exception(encoded: tuple[bytes, str]) -> BaseException:
    """Return the exception that was encoded, with its remote traceback as its cause."""
    whole, text = encoded
    try:
        error: BaseException = _load_exception(whole)
        if not isinstance(error, BaseException):
            raise TypeError(f"it became a {type(error).__name__}")
    except BaseException as problem:  # a user's code ran, and it may raise anything
        last = text.rstrip().rpartition("\n")[2]
        error = RemoteError(f"{last} (it could not be unpickled here: {problem})", "", text)
    error.__cause__ = RemoteTraceback(text)
    return error


def split(buffers: Sequence[Buffer], counts: Sequence[int]) -> list[Sequence[Buffer]]:
    """Cut `buffers` into consecutive parts of these sizes."""
    parts, at = [], 0
    for count in counts:
        parts.append(buffers[at : at + count])
        at += count
    return parts
