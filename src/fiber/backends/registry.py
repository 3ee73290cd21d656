"""The backends by name, and which of them a process uses.

The choice is a context's, else the configuration's `backend`, else its `default_backend`.
"""

from __future__ import annotations

from fiber.backends.base import Backend
from fiber.config import config
from fiber.errors import ConfigError

__all__ = ["NAMES", "check", "chosen", "get"]

NAMES = ("local",)

_made: dict[str, Backend] = {}


def chosen() -> str:
    """Return the name of the backend that the configuration asks for."""
    return check(config.backend or config.default_backend)


def check(name: str) -> str:
    """Return `name` if it is a backend's; raises `ConfigError` otherwise."""
    if name not in NAMES:
        raise ConfigError(f"there is no backend {name!r}; there are: {', '.join(NAMES)}")
    return name


def get(name: str) -> Backend:
    """Return the backend called `name`, made at its first use."""
    if name not in _made:
        check(name)
        from fiber.backends.local import LocalBackend

        _made[name] = LocalBackend()
    return _made[name]
