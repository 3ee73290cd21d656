"""The backends by name, and which of them a process uses.

    a context's name ───────────────────────┐
    config.backend ─► in a pod: kubernetes ─┴► check ─► get ─► fiber.backends.local, .docker, ...
              ─► in an allocation: slurm                 └───► entry points "fiber.backends"
              ─► config.default_backend

A backend is imported and made when it is first asked for, for the SDK that it uses is slow to
import and may be missing. Packages add backends by an entry point of the group `fiber.backends`: a
class or function without arguments that returns one. They are looked up only for a name that is
none of Fiber's own, because that reads the metadata of all that is installed.
"""

from __future__ import annotations

import os
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Final

from fiber.backends.base import Backend
from fiber.config import PARENT, config
from fiber.errors import ConfigError, FiberError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["GROUP", "check", "chosen", "forget", "get", "in_allocation", "in_pod", "names", "reset"]

GROUP: Final = "fiber.backends"
OWN: Final = {
    "local": ("fiber.backends.local", "LocalBackend"),
    "docker": ("fiber.backends.docker", "DockerBackend"),
    "kubernetes": ("fiber.backends.kubernetes", "KubernetesBackend"),
    "slurm": ("fiber.backends.slurm", "SlurmBackend"),
}

_made: dict[str, Backend] = {}
_entries: dict[str, EntryPoint] = {}
_lock = threading.Lock()  # of `_made`: a backend is made once, whichever thread comes first


def chosen() -> str:
    """Return the name of the backend that the configuration asks for, or that is detected."""
    if config.backend is not None:
        return check(config.backend, config.source("backend"))
    if in_pod():
        _require_kubernetes()
        return "kubernetes"
    if in_allocation():
        return "slurm"
    return check(config.default_backend, config.source("default_backend"))


def in_pod() -> bool:
    """Whether this process is in a pod that may talk to its cluster."""
    if "KUBERNETES_SERVICE_HOST" not in os.environ:
        return False  # without importing anything
    from fiber.backends.kubernetes import detect

    return detect.in_pod()


def in_allocation() -> bool:
    """Whether this process is in an allocation of Slurm, and can start steps of it."""
    if "SLURM_JOB_ID" not in os.environ:
        return False  # without importing anything
    from fiber.backends.slurm import detect

    return detect.in_allocation()


def check(name: str, source: str = "code") -> str:
    """Return `name` if it is a backend's.

    Args:
        name: what may be one.
        source: where it comes from, in words.

    Raises:
        ConfigError: it is none; the message says which there are.
    """
    if name in OWN or name in _entries or _inherited(name):
        return name
    if name not in _third_party():
        import difflib

        near = difflib.get_close_matches(name.lower(), names(), n=1)
        hint = f"did you mean {near[0]!r}? There" if near else "there"
        raise ConfigError(
            f"There is no backend {name!r} (from {source}): {hint} are {', '.join(names())}."
        )
    return name


def _inherited(name: str) -> bool:
    # Its parent has the backend and starts processes for it, so that it need not be installed here.
    return name == config.backend and config.source("backend") == PARENT


def names() -> list[str]:
    """Return the names of all backends, those of other packages last."""
    return [*OWN, *(name for name in _third_party() if name not in OWN)]


def get(name: str) -> Backend:
    """Return the backend called `name`, made at its first use.

    Raises:
        ConfigError: there is none, or what it needs is not installed.
        StartError: its manager cannot be reached.
    """
    backend = _made.get(name)
    if backend is not None:
        return backend
    check(name)
    if name not in OWN and name not in _third_party():
        raise ConfigError(
            f"The backend {name!r}, which this process was started by, is not installed here: only "
            f"its parent can use it."
        )
    with _lock:
        if name not in _made:
            _made[name] = _own(name) if name in OWN else _load(_entries[name])
        return _made[name]


def reset() -> None:
    """Close the backends that were made, and forget them and what was looked up."""
    with _lock:
        made = list(_made.values())
        _made.clear()
        _entries.clear()
    errors = []
    for backend in made:
        try:
            backend.close()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def forget(name: str) -> None:
    """Have the backend called `name` made anew at its next use: who has closed it calls this."""
    with _lock:
        _made.pop(name, None)


def _forget_after_fork() -> None:
    # The connections to the managers, and the jobs, are the parent's.
    global _lock
    _lock = threading.Lock()
    _made.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def _own(name: str) -> Backend:
    module, attribute = OWN[name]
    try:
        backend: Backend = getattr(import_module(module), attribute)()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "fiber"):
            raise
        raise ConfigError(
            f"The backend {name!r} needs the package {package!r}, which is not installed: "
            f'run pip install "fiber[{name}]".'
        ) from error
    return backend


def _require_kubernetes() -> None:
    from importlib.util import find_spec

    found = find_spec("kubernetes")
    if found is None or found.origin is None:  # a folder of the project that is called so
        raise ConfigError(
            "This process is in a Kubernetes pod, so that Fiber starts its processes as pods, but "
            "the package 'kubernetes' is not installed: run pip install \"fiber[kubernetes]\", or "
            "set FIBER_BACKEND=local to start them in this pod."
        )


def _third_party() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # slow, and so is what it does

    for entry in entry_points(group=GROUP):
        _entries.setdefault(entry.name, entry)
    return _entries


def _load(entry: EntryPoint) -> Backend:
    where = f"The backend {entry.name!r} of {entry.value}"
    if entry.dist is not None:
        where += f", from the package {entry.dist.name!r},"
    try:
        backend: Backend = entry.load()()
    except FiberError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{where} cannot be made: {type(error).__name__}: {error}. Mend or remove the package, "
            f"or choose another backend."
        ) from error
    missing = [part for part in _parts() if not hasattr(backend, part)]
    if missing:
        raise ConfigError(
            f"{where} is no backend: it lacks {', '.join(missing)} (see fiber.backends.base)."
        )
    return backend


def _parts() -> list[str]:
    methods = [name for name in vars(Backend) if not name.startswith("_")]
    return sorted({*Backend.__annotations__, *methods})
