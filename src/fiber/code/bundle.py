"""Fiber in one piece, for jobs whose image has none or another version.

    installed packages ─► content_hash ─► FIBER_INTERNAL_CODE of a job ─► has it the same?
             └──────────► bundle ─► bootstrap's finder ─► import fiber          no ◄─┘

cloudpickle goes along: what it packed, only the same version is sure to unpack.

A process that got Fiber as a bundle itself passes it on as it came.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import marshal
import os
import re
import threading
import zlib
from typing import Any

__all__ = ["PACKAGES", "bundle", "content_hash"]

PACKAGES = ("cloudpickle", "fiber")

_AT_MASTERS = re.compile(r"fiber\.(backends\.\w+\.|cli|testing|__main__)")
"""What a job hardly ever imports: of these, the source will do."""

_LEVEL = 6  # of compression; 9 takes three times as long for one percent less
_lock = threading.Lock()


def content_hash() -> str:
    """Return what identifies this Fiber: the SHA-256 of the paths and contents of its modules."""
    loader = _bundled()
    if loader is not None:
        return str(loader.hash)
    with _lock:
        return _content_hash()


def bundle(magic: bytes) -> bytes:
    """Return Fiber for a Python whose `importlib.util.MAGIC_NUMBER` is `magic`.

    It is a marshalled and compressed dictionary: by the name of each module, whether it is a
    package, its file, its source, and its code, marshalled; this is None for a Python of another
    magic, and where it is hardly ever wanted.
    """
    loader = _bundled()
    if loader is not None:
        return bytes(loader.data)
    with _lock:  # by hundreds at once: made once
        return _bundle(magic == importlib.util.MAGIC_NUMBER)


def _bundled() -> Any:
    """Return the loader of the bundle that this process got Fiber from, None if it is installed."""
    import fiber

    loader = fiber.__spec__.loader
    return loader if hasattr(loader, "data") else None


@functools.cache
def _files() -> list[tuple[str, str, bool, str, bytes]]:
    """Return of each module: relative path, name, whether it is a package, file, source."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue  # cloudpickle is missing: what needs it says so
        root = spec.submodule_search_locations[0]
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for file in files:
                if not file.endswith(".py"):
                    continue
                path = os.path.join(folder, file)
                parts = [package, *os.path.relpath(path, root)[:-3].split(os.sep)]
                relative = "/".join(parts)
                is_package = parts[-1] == "__init__"
                with open(path, "rb") as opened:
                    source = opened.read()
                name = ".".join(parts[:-1] if is_package else parts)
                found.append((relative, name, is_package, path, source))
    return sorted(found)


@functools.cache
def _content_hash() -> str:
    digest = hashlib.sha256()
    for relative, _, _, _, source in _files():
        digest.update(b"%b\0%d\0%b" % (relative.encode(), len(source), source))
    return digest.hexdigest()


@functools.cache
def _bundle(with_code: bool) -> bytes:
    from importlib.machinery import SourceFileLoader

    modules = {}
    for _, name, is_package, path, source in _files():
        code = None
        if with_code and not _AT_MASTERS.match(name):
            # By way of the cache of compiled files. Each is marshalled by itself, so that a worker
            # unpacks those only that it imports.
            compiled = SourceFileLoader(name, path).get_code(name)
            code = marshal.dumps(compiled) if compiled is not None else None
        modules[name] = (is_package, path, importlib.util.decode_source(source), code)
    return zlib.compress(marshal.dumps(modules), _LEVEL)
