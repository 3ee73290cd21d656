"""What a pool's master and its workers say to each other.

    master ─ INITIALIZE, MARKS, CONSTANTS, BATCH, FORGET, RETURN, STOP ─► worker
    master ◄─ UP, INITIALIZER_FAILED, RESULTS, UNLOADABLE, UNMARKED, BLIND, STRANGE, RETURN ─ worker

Bodies are pickled tuples of plain values, but for the most frequent one, BATCH. What belongs to
the user travels inside them as bytes that were pickled apart, so that what cannot be unpickled
costs its own item and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from fiber.wire.framing import Buffer

__all__ = [
    "APPLY",
    "BATCH",
    "BATCH_HEAD",
    "BLIND",
    "CONSTANTS",
    "FORGET",
    "INITIALIZE",
    "INITIALIZER_FAILED",
    "MAP",
    "MARKS",
    "RESULTS",
    "RETURN",
    "STARMAP",
    "STOP",
    "STRANGE",
    "UNLOADABLE",
    "UNMARKED",
    "UP",
    "BatchHead",
    "split",
]

INITIALIZE, BATCH, FORGET, STOP, UP, INITIALIZER_FAILED, RESULTS, UNLOADABLE = range(2, 10)
MARKS, RETURN, BLIND, CONSTANTS, STRANGE, UNMARKED = range(10, 16)
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
    MARKS               path, place; see `pool.marks`
    UNMARKED            -, it cannot mark what it is at
    CONSTANTS           call, sources; see `pool.constants`
    RETURN              loans that are over; see `pool.lending`
    BLIND               batch, whose buffers cannot be seen where the master has put them
    STRANGE             batch, whose function did not get here: it came with one that was BLIND
"""

MAP, STARMAP, APPLY = range(3)
"""How a function is called: with the item, with its elements, or with (args, kwargs)."""

BATCH_HEAD = struct.Struct("!QQIIIIBBIQ")


class BatchHead(NamedTuple):
    """The fixed part of a BATCH: which items, and how the body is cut."""

    batch: int
    call: int
    chunk: int
    hold: int
    """Milliseconds of the batch after which what waits behind its running item is given back."""
    items: int
    groups: int
    """Pickles that hold them; if there are several, in a list with the numbers of their buffers."""
    how: int
    careful: bool
    function_buffers: int
    function_size: int
    """Bytes of the packed function, 0 if the worker knows it already."""


def split(buffers: Sequence[Buffer], counts: Sequence[int]) -> list[Sequence[Buffer]]:
    """Cut `buffers` into consecutive parts of these sizes."""
    parts, at = [], 0
    for count in counts:
        parts.append(buffers[at : at + count])
        at += count
    return parts
