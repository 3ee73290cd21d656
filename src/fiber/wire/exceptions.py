"""Exceptions to bytes and back, with the remote traceback; what cannot travel has a stand-in."""

from __future__ import annotations

from typing import Any

from fiber.errors import RemoteError, RemoteTraceback
from fiber.wire.framing import Buffer
from fiber.wire.pickling import dumps, loads

__all__ = ["decode", "encode"]


def encode(error: BaseException, skip: int = 1) -> tuple[bytes, str]:
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
            if type(_load(whole)) is type(error):
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


def _load(whole: Buffer) -> Any:
    data, buffers = loads(whole)
    return loads(data, buffers)


def decode(encoded: tuple[bytes, str]) -> BaseException:
    """Return the exception that was encoded, with its remote traceback as its cause."""
    whole, text = encoded
    try:
        error: BaseException = _load(whole)
        if not isinstance(error, BaseException):
            raise TypeError(f"it became a {type(error).__name__}")
    except BaseException as problem:  # a user's code ran, and it may raise anything
        last = text.rstrip().rpartition("\n")[2]
        error = RemoteError(f"{last} (it could not be unpickled here: {problem})", "", text)
    error.__cause__ = RemoteTraceback(text)
    return error
