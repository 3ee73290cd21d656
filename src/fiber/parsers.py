"""Parsers of the configuration: from what somebody wrote to the value of a key.

    "512Mi", "A=1,B=2", "yes", a dict, a path ─► parser ─► int, dict, bool, text
                                                    └────► ValueError or TypeError: it does not fit

What a parser returns it also takes, for a child process reads its parent's values anew, and it is
plain data: text, numbers, truth values, lists and dicts of them, which every Python can unpickle.

A leaf, as `config`, which every process of a session imports: small and quick to import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from operator import index
from typing import Any, Final

__all__ = [
    "LEVELS",
    "MEMORY_FORMS",
    "arguments",
    "boolean",
    "choice",
    "container_path",
    "environment",
    "host_and_port",
    "integer",
    "level",
    "mounts",
    "options",
    "parse_memory",
    "path",
    "seconds",
    "template",
    "text",
    "text_or_number",
]

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

# Bytes in a unit, as Kubernetes writes them: Mi is 2**20, M is 10**6.
UNITS: Final = {
    **{name: 1000**power for power, name in enumerate("kmgt", start=1)},
    **{name + "b": 1000**power for power, name in enumerate("kmgt", start=1)},
    **{name + "i": 1024**power for power, name in enumerate("kmgt", start=1)},
    **{name + "ib": 1024**power for power, name in enumerate("kmgt", start=1)},
}
MEMORY_FORMS: Final = "a whole number of MB, such as 512, or text such as '512Mi', '2Gi' or '1.5G'"


def parse_memory(value: object) -> int:
    """The memory that `value` asks for, in MB of 2**20 bytes, rounded up.

    Raises:
        ValueError: it is none of the forms in `MEMORY_FORMS`, or less than a byte.
    """
    if not isinstance(value, str):
        return integer(1)(value)
    wanted = value.strip().lower()
    number = wanted.rstrip("bgikmt")
    unit = wanted[len(number) :]
    if not unit:
        return integer(1)(wanted)
    # float() would also take "nan", "1e3" and "1_0".
    if unit not in UNITS or not number.strip().replace(".", "", 1).isdecimal():
        raise ValueError(value)
    size = float(number) * UNITS[unit]
    if size < 1:
        raise ValueError(value)
    return -int(-size // 2**20)


# Numbers and words.


def integer(least: int) -> Callable[[object], int]:
    """Return the parser of whole numbers of at least `least`."""

    def parse(value: object) -> int:
        if isinstance(value, bool):
            raise ValueError(value)
        # index() takes numpy's integers too, and refuses 2.5.
        number = int(value) if isinstance(value, str) else index(value)  # type: ignore[arg-type]
        if number < least:
            raise ValueError(value)
        return number

    return parse


def seconds(value: object) -> float:
    """A time above 0."""
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(value)  # type: ignore[arg-type]
    if not 0 < number < float("inf"):
        raise ValueError(value)
    return number


def boolean(value: object) -> bool:
    """A truth value, or a word for one."""
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "on": True, "1": True}
    words.update({"false": False, "no": False, "off": False, "0": False})
    try:
        return words[str(value).strip().lower()]
    except KeyError:
        raise ValueError(value) from None


def level(value: object) -> int:
    """A level of `logging`, by name or number."""
    if isinstance(value, str) and value.strip().lower() in LEVELS:
        return LEVELS[value.strip().lower()]
    return integer(0)(value)


def choice(*words: str) -> Callable[[object], str]:
    """Return the parser of one of `words`, in whatever case."""

    def parse(value: object) -> str:
        for word in words:
            if text(value).lower() == word.lower():
                return word
        raise ValueError(value)

    return parse


def text(value: object) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(value)
    return value.strip()


def text_or_number(value: object) -> str:
    """Text, or a whole number as text."""
    return text(value) if isinstance(value, str) else str(integer(0)(value))


def path(value: object) -> str:
    """The path of a file."""
    return text(os.fspath(value))  # type: ignore[call-overload]


def container_path(value: object) -> str:
    """An absolute path, of a folder in a container."""
    found = path(value)
    if not found.startswith("/"):
        raise ValueError(value)
    return found


def host_and_port(value: object) -> str:
    """HOST or HOST:PORT; the address of an IPv6 host with a port stands in brackets."""
    found = text(value)
    host, colon, port = found.rpartition(":")
    if found.startswith("["):
        host, bracket, port = found[1:].partition("]")
        if not bracket or port[:1] not in ("", ":"):
            raise ValueError(value)
        colon, port = port[:1], port[1:]
    elif not colon or ":" in host:  # a name, or an IPv6 address without a port
        host, colon, port = found, "", ""
    if not host or any(sign.isspace() or sign in "/[]@?#" for sign in host):
        raise ValueError(value)
    if colon and not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(value)
    return found


# Lists and dicts; in text as lists with commas, or as JSON.


def arguments(value: object) -> list[str]:
    """Arguments of a command: a list of them, or text as a shell takes it."""
    if isinstance(value, str):
        import shlex  # rarely needed

        return shlex.split(value)
    if not isinstance(value, list | tuple):
        raise TypeError(value)
    return [text(part) for part in value]


def mounts(value: object) -> list[str]:
    """Mounts of containers, each SOURCE:TARGET or SOURCE:TARGET:ro.

    A source that begins with "." or "~" is made absolute, for a child reads it elsewhere.
    """
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise TypeError(value)
    return [_mount(mount) for mount in value]


def _mount(value: object) -> str:
    source, target, *mode = (part.strip() for part in text(value).split(":"))
    if not source or not target.startswith("/") or mode not in ([], ["ro"], ["rw"]):
        raise ValueError(value)
    if source[0] in ".~":
        source = os.path.abspath(os.path.expanduser(source))
    return ":".join([source, target, *mode])


def environment(value: object) -> dict[str, str]:
    """Variables with their values: a dict, its JSON, or A=1,B=2."""
    if isinstance(value, str):
        value = _mapping(value) if value.lstrip().startswith("{") else _pairs(value)
    if not isinstance(value, Mapping):
        raise TypeError(value)
    found = {}
    for name, given in value.items():
        if "=" in text(name) or not isinstance(given, str | int | float):
            raise ValueError(value)
        found[text(name)] = str(given)
    return found


def _pairs(value: str) -> dict[str, str]:
    found = {}
    for part in value.split(","):
        name, equals, given = part.partition("=")
        if equals:
            found[name] = given.strip()
        elif part.strip():
            raise ValueError(value)
    return found


def options(value: object) -> dict[str, Any]:
    """A dict of plain data, or its JSON; other mappings and sequences become dicts and lists."""
    if isinstance(value, str):
        value = _mapping(value) if value.strip() else {}
    if not isinstance(value, Mapping):
        raise TypeError(value)
    found: dict[str, Any] = _plain(value)
    return found


def template(value: object) -> dict[str, Any] | str:
    """A dict of plain data, its JSON, or the path of a file."""
    if isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{")):
        return options(value)
    return path(value)


def _mapping(value: str) -> object:
    import json  # rarely needed

    return json.loads(value)


def _plain(value: object) -> Any:
    # Objects of an SDK that are dicts become dicts: a child may have no such SDK.
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(value)
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(value)
