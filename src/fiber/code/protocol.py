"""What a worker asks its master for, and what it is answered.

    request                                        answer
    BUNDLE  4 bytes of magic ────────────────────► BUNDLE   see `bundle`
    MODULE  4 bytes of magic, the module's name ─► MODULE   `pack`ed
                                                   REFUSED  a sentence that says why

The magic is `importlib.util.MAGIC_NUMBER`: compiled code is sent along where both have the same.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BUNDLE", "MODULE", "REFUSED", "Module", "pack", "unpack"]

BUNDLE = 101
MODULE = 102
REFUSED = 103


class Module(NamedTuple):
    """A module of the project.

    Attributes:
        name: with those of its packages.
        file: where the master has it; None for a namespace package.
        path: where the master has a package's modules; None if it is no package.
        source: as in the file; None if it has none.
        code: marshalled, for the asker's Python; None if there is none.
        extension: whether it is compiled, so that only its name can be told.
    """

    name: str
    file: str | None = None
    path: Sequence[str] | None = None
    source: bytes | None = None
    code: bytes | None = None
    extension: bool = False


def pack(module: Module | None) -> bytes:
    """Return the body of an answer to MODULE; None says that it is none of the project's."""
    return b"" if module is None else zlib.compress(pickle.dumps(tuple(module)), 1)


def unpack(body: bytes) -> Module | None:
    """Return what was packed."""
    return Module(*pickle.loads(zlib.decompress(body))) if body else None
