"""How the user's `__main__` comes to be in another process.

    describe (at home) ─► load (there, as `__mp_main__`) ─► its names ─► missing (at home)

As multiprocessing's spawn does, the main module is executed again under the name `__mp_main__`, so
that `if __name__ == "__main__":` keeps the program from running twice. A program without that guard
would start its own processes while it is being loaded: loading ends right there, and what the
module has by then is kept. What it lacks travels by value (see `wire.pickling`), as does everything
of a notebook or an interactive session, which have no file to load.
"""

from __future__ import annotations

import importlib.util
import io
import linecache
import os
import sys
import types
from collections.abc import Container
from multiprocessing import process as _process
from typing import Any

__all__ = ["check_loaded", "describe", "load", "load_source", "missing"]

_loading = False


class _Unguarded(BaseException):
    """Ends the loading of a main module that begins to start processes."""


def describe() -> dict[str, str]:
    """Return what `load` needs: a module's name, a file's path, or nothing if there is none."""
    module = sys.modules["__main__"]
    name = getattr(getattr(module, "__spec__", None), "name", None)
    if name is not None:
        # A folder or package run by its __main__.py cannot be loaded under another name.
        return {} if name.rpartition(".")[2] == "__main__" else {"name": name}
    path = getattr(module, "__file__", None)
    if path is None or hasattr(sys, "ps1") or not os.path.isfile(_absolute(path)):
        return {}
    return {"path": _absolute(path)}


def _absolute(path: str) -> str:
    home = getattr(_process, "ORIGINAL_DIR", None)
    return os.path.join(home, path) if home else os.path.abspath(path)


def load(description: dict[str, str]) -> frozenset[str]:
    """Execute the main module that `description` tells of; return the names that it has then.

    Raises what the module raises, SystemExit included.
    """
    if not description:
        return frozenset()
    module = types.ModuleType("__mp_main__")
    if "name" in description:
        spec = importlib.util.find_spec(description["name"])
        if spec is None or spec.loader is None:
            raise ImportError(f"there is no module {description['name']} to load")
        code = spec.loader.get_code(spec.name)  # type: ignore[attr-defined]
        module.__spec__, module.__package__, module.__file__ = spec, spec.parent, spec.origin
    else:
        path = description["path"]
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        module.__file__ = path
    return _execute(module, code)


def load_source(file: str, name: str, source: str) -> frozenset[str]:
    """As `load`, where the file is not.

    Args:
        file: what it is called at home.
        name: by which `python -m` found it, empty if it did not.
        source: its text.
    """
    module = types.ModuleType("__mp_main__")
    module.__file__ = file
    module.__package__ = name.rpartition(".")[0]
    # So tracebacks show its lines; with no time of the file, they are never out of date.
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    return _execute(module, compile(source, file, "exec", dont_inherit=True))


def _execute(module: types.ModuleType, code: Any) -> frozenset[str]:
    global _loading
    previous = sys.modules["__main__"]
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    _loading = True
    try:
        exec(code, module.__dict__)
    except _Unguarded:
        pass
    except BaseException:
        sys.modules["__main__"] = previous
        raise
    finally:
        _loading = False
    return frozenset(module.__dict__)


def check_loaded() -> None:
    """Call this before starting a process: a main module that is just being loaded ends there."""
    if _loading:
        raise _Unguarded


_compared: tuple[frozenset[str], int, bool] = (frozenset(), -1, False)


def missing(names: frozenset[str]) -> Container[str] | None:
    """Return None if `names` are all of our `__main__` that can travel by name, else `names`."""
    global _compared
    main: dict[str, Any] = sys.modules["__main__"].__dict__
    compared, size, lacks = _compared
    if compared is not names or size != len(main):
        lacks = any(
            name not in names
            for name, value in list(main.items())
            if isinstance(value, (types.FunctionType, type))
            and value.__module__ in ("__main__", "__mp_main__")
        )
        _compared = (names, len(main), lacks)
    return names if lacks else None
