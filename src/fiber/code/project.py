"""At the master: the modules that are the program's own.

    sys.path ─► folders that are neither Python's nor for installed packages ─► tops
    name of a module ─► how `import` would find it ─► is it in such a folder? ─► Module
    description of the main module ─► main_source ─► Main

Nothing is imported for it. A name leads to a module only where `import` finds it, and no file
outside of these folders is ever read.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import pkgutil
import sys
import zipfile
from collections.abc import Iterable, Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, all_suffixes
from typing import Any, NamedTuple

from fiber.code.finder import Finder
from fiber.code.protocol import Module

__all__ = ["Main", "Project", "is_ours", "main_source"]

_NEVER = frozenset({"__main__", "__mp_main__", "cloudpickle", "fiber"})
"""The main module travels by itself, Fiber in its bundle."""

_INSTALLED = frozenset({"site-packages", "dist-packages"})


class Main(NamedTuple):
    """The main module, to be executed where its file is not.

    Attributes:
        file: what its file is called at home.
        name: by which `python -m` found it, empty if it was started by its file.
        source: its text.
    """

    file: str
    name: str
    source: str


def main_source(description: dict[str, str]) -> Main | None:
    """Return the main module that `fiber.runtime.main.describe` tells of, None if there is none.

    Where it has a `name`, its `__package__` is what stands before the last dot.
    """
    if "name" in description:
        name = description["name"]
        main = sys.modules.get("__main__")
        spec: ModuleSpec | None = getattr(main, "__spec__", None)
        if spec is None or spec.name != name:
            spec = importlib.util.find_spec(name)
        loader: Any = spec.loader if spec is not None else None
        source = loader.get_source(name) if loader is not None else None
        return Main(spec.origin or name, name, source) if spec is not None and source else None
    if "path" in description:
        path = description["path"]
        with open(path, "rb") as file:
            data = file.read()
        try:
            return Main(path, "", importlib.util.decode_source(data))
        except (SyntaxError, UnicodeDecodeError):  # no text: a compiled file
            return None
    return None


class Project:
    """Answers what of the program's own there is. From any thread."""

    def __init__(self) -> None:
        self._listings: dict[str, tuple[int, frozenset[str]]] = {}  # with the folder's time

    def tops(self) -> frozenset[str]:
        """Return the top-level names that may be the project's.

        It lists each folder once; a folder in it may be a package or not, `module` finds out.
        """
        names: set[str] = set()
        for folder in _folders():
            names |= self._listing(folder)
        for mapping in _editable():
            names |= {name.partition(".")[0] for name in mapping}
        # What the standard library has, a project hardly means to replace; if it did, it is loaded.
        names -= {name for name in names & sys.stdlib_module_names if not _replaced(name)}
        for finder in _handed_on():
            names |= finder.tops
        return frozenset(names - _NEVER)

    def _listing(self, folder: str) -> frozenset[str]:
        try:
            changed = os.stat(folder).st_mtime_ns
            known = self._listings.get(folder)
            if known is None or known[0] != changed:
                known = self._listings[folder] = changed, frozenset(_list(folder))
        except (OSError, zipfile.BadZipFile):
            return frozenset()
        return known[1]

    def module(self, name: str, magic: bytes = importlib.util.MAGIC_NUMBER) -> Module | None:
        """Return the project's module `name`, None if there is none of that name.

        Args:
            name: with those of its packages.
            magic: `importlib.util.MAGIC_NUMBER` of the asker, who gets code if it is ours.
        """
        parts = name.split(".")
        if not all(part.isidentifier() for part in parts) or parts[0] in _NEVER:
            return None
        for finder in _handed_on():
            if parts[0] in finder.tops:
                found = finder.module(name)
                if found is not None:
                    return found
        spec = _spec(name)
        return None if spec is None else _module(name, spec, magic)


# Folders ----------------------------------------------------------------------------------------


def _folders() -> list[str]:
    """Return the project's folders among those of sys.path, in its order."""
    found: dict[str, None] = {}
    for entry in list(sys.path):
        folder = os.path.abspath(entry)
        if not _is_foreign(folder) and os.path.exists(folder):
            found[folder] = None
    return list(found)


_STANDARD = os.path.dirname(os.path.abspath(os.__file__))


def _is_foreign(path: str) -> bool:
    """Whether a path is Python's own or that of an installed package."""
    return _within(path, _STANDARD) or not _INSTALLED.isdisjoint(path.split(os.sep))


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _list(folder: str) -> Iterable[str]:
    """Return the names of modules, and of what may be packages, in a folder or archive."""
    suffixes = tuple(all_suffixes())
    if os.path.isfile(folder):
        with zipfile.ZipFile(folder) as archive:
            entries = {entry.partition("/")[::2] for entry in archive.namelist()}
        files = {(name, bool(rest) or name.endswith(suffixes)) for name, rest in entries}
    else:
        with os.scandir(folder) as found:
            files = {
                (entry.name, entry.name.endswith(suffixes) or entry.is_dir()) for entry in found
            }
    for file, may in files:
        name = file.partition(".")[0] if file.endswith(suffixes) else file
        if may and name.isidentifier():
            yield name


def _editable() -> list[dict[str, str]]:
    """Return what the import hooks of editable installs map: names to files or folders."""
    found = []
    for finder in sys.meta_path:
        module = sys.modules.get(getattr(finder, "__module__", None) or "")
        mapping = getattr(module, "MAPPING", None)
        if isinstance(mapping, dict) and getattr(module, "__name__", "").startswith("__editable__"):
            found.append(mapping)
    return found


def _replaced(name: str) -> bool:
    """Whether a module of the standard library's name is loaded and is the project's."""
    origin = getattr(getattr(sys.modules.get(name), "__spec__", None), "origin", None)
    return origin is not None and is_ours(origin)


def is_ours(path: str) -> bool:
    """Whether a file or folder is in one of the project's folders."""
    path = os.path.abspath(path)
    if _is_foreign(path):
        return False
    if any(_within(path, folder) for folder in _folders()):
        return True
    return any(
        _within(path, place) or path == place + ".py"
        for mapping in _editable()
        for place in mapping.values()
    )


def _handed_on() -> list[Finder]:
    """Return the finders of this process, if it is a worker: what it was given it passes on."""
    return [finder for finder in sys.meta_path if isinstance(finder, Finder)]


# Modules ----------------------------------------------------------------------------------------


def _spec(name: str) -> ModuleSpec | None:
    """Find a module as `import` does, without importing it or its packages."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if isinstance(spec, ModuleSpec) and spec.name == name:
        return spec
    parent = name.rpartition(".")[0]
    if not parent:
        return _search(name, sys.path) or _ask_finders(name)
    path = getattr(sys.modules.get(parent), "__path__", None)  # which a package may have changed
    if path is None:
        package = _spec(parent)
        path = package.submodule_search_locations if package is not None else None
    return None if path is None else _search(name, list(path))


def _search(name: str, path: Sequence[str]) -> ModuleSpec | None:
    """Do what `PathFinder` does, which wants a namespace package's parent to be imported."""
    portions: list[str] = []
    for folder in list(path):
        finder: Any = pkgutil.get_importer(folder or os.getcwd())
        spec: ModuleSpec | None = finder.find_spec(name) if finder is not None else None
        if spec is None:
            continue
        if spec.loader is not None:
            return spec
        portions += spec.submodule_search_locations or ()
    if not portions:
        return None
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = portions
    return spec


def _ask_finders(name: str) -> ModuleSpec | None:
    """Ask the hooks of editable installs."""
    for finder in sys.meta_path:
        if (getattr(finder, "__module__", None) or "").startswith("__editable__"):
            spec = finder.find_spec(name, None)
            if spec is not None:
                return spec
    return None


def _module(name: str, spec: ModuleSpec, magic: bytes) -> Module | None:
    """Return what a spec tells of, if it is the project's."""
    if spec.submodule_search_locations is None:
        path = None
    else:
        path = [os.path.abspath(folder) for folder in spec.submodule_search_locations]
    if path is not None and spec.origin is None:
        ours = [folder for folder in path if is_ours(folder)]
        return Module(name, path=ours) if ours else None
    if spec.origin is None or not spec.has_location or not is_ours(spec.origin):
        return None
    file = os.path.abspath(spec.origin)
    if file.endswith(tuple(EXTENSION_SUFFIXES)):
        return Module(name, file, path, extension=True)
    loader: Any = spec.loader
    code = source = None
    if file.endswith(".py") and hasattr(loader, "get_data"):
        source = loader.get_data(spec.origin)
    if magic == importlib.util.MAGIC_NUMBER and hasattr(loader, "get_code"):
        try:
            code = marshal.dumps(loader.get_code(name))
        except SyntaxError:
            pass  # for whoever imports it, from the source
    return Module(name, file, path, source, code) if source is not None or code else None
