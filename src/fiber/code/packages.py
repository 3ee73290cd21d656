"""Third-party packages: they come from the image, and this says what it lacks.

    master: sys.modules ─► loaded ─► {name: version} ─► worker: compare ─► table ─► the user

Packages are named as pip names them. Both sides look at the names of the folders that pip leaves
beside what it installs; files are read only where the name of a module is not that of its package
(`yaml` is of PyYAML), for in a large environment that takes a while.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import NamedTuple

__all__ = ["Difference", "compare", "loaded", "table"]

_TOOLS = frozenset(
    {
        # What Fiber itself has at the master only, and gives to workers by itself.
        "cloudpickle", "cryptography", "docker", "fiber", "google-auth", "kubernetes", "rich",
        # What a program runs in.
        "coverage", "debugpy", "ipykernel", "ipython", "jupyter-client", "pip", "pytest",
        "pytest-timeout", "setuptools", "wheel",
    }
)  # fmt: skip
"""Packages that are loaded for Fiber's sake or around the program, not by it."""


class Difference(NamedTuple):
    """A package that is not there as it is here.

    Attributes:
        package: its name.
        here: the version at the master.
        there: the version at the worker, None if it is missing.
    """

    package: str
    here: str
    there: str | None


class _Installed(NamedTuple):
    """A package that is installed: its name and version, and the folder that tells of it."""

    name: str
    version: str
    info: str


def loaded() -> dict[str, str]:
    """Return the versions of the installed packages that the program has imported, by name.

    What only Fiber or the tools around the program need is left out, unless a module of the
    program has it among its names.
    """
    sites = _sites()
    modules = _imported(sites)
    packages = [package for site in sites for package in _installed(site)]
    owners = _owners(modules, packages)
    tools = _closure(owners.values())
    if tools:
        used = _used()
        tools -= {owner.name for name, owner in owners.items() if name.partition(".")[0] in used}
    return {
        owner.name: owner.version
        for owner in sorted(owners.values())
        if owner.name not in tools and owner.name not in ("fiber", "cloudpickle")
    }


def compare(wanted: Mapping[str, str]) -> list[Difference]:
    """Return what of `wanted`, a result of `loaded`, is missing here or has another version.

    What follows a plus sign in a version, as in 2.1.0+cpu, may differ.
    """
    here: dict[str, str] = {}
    for entry in reversed(sys.path):  # the first one counts
        here.update((package.name, package.version) for package in _installed(entry))
    differences = []
    for name, version in sorted(wanted.items()):
        found = here.get(name)
        if found is None or found.partition("+")[0] != version.partition("+")[0]:
            differences.append(Difference(name, version, found))
    return differences


def table(differences: Sequence[Difference], where: str) -> str:
    """Return the differences as text; `where` is what was looked into: `the image python:3.11`."""
    rows = [("package", "here", "there")]
    rows += [(name, here, there or "missing") for name, here, there in differences]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]
    command = " ".join(f"{name}=={here.partition('+')[0]}" for name, here, _ in differences)
    lines.append(
        f"The program has these packages here, and {where} does not have them so: what needs them "
        f"may fail there. Take one that has them, or add them with `pip install {command}`."
    )
    return "\n".join(lines)


# What is installed -------------------------------------------------------------------------------


def _sites() -> list[str]:
    """Return the folders for installed packages."""
    found: dict[str, None] = {}
    for entry in sys.path:
        if not {"site-packages", "dist-packages"}.isdisjoint(entry.split(os.sep)):
            found[os.path.abspath(entry)] = None
    return list(found)


def _installed(folder: str) -> list[_Installed]:
    """Return the packages in a folder, as pip and its like name what they leave beside them."""
    found = []
    try:
        entries = os.listdir(folder or ".")
    except OSError:
        return []
    for entry in entries:
        stem, dot, kind = entry.rpartition(".")
        if kind in ("dist-info", "egg-info") and dot:
            name, _, version = stem.partition("-")
            if version:
                if kind == "egg-info":
                    version = re.sub(r"-py\d.*", "", version)
                found.append(_Installed(_normal(name), version, os.path.join(folder, entry)))
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# What the program has imported -------------------------------------------------------------------


def _imported(sites: Sequence[str]) -> dict[str, str]:
    """Return the files, relative to their site, of the topmost modules that are no namespaces."""
    files: dict[str, str] = {}
    modules = dict(sys.modules)
    for name, module in modules.items():
        parent = name.rpartition(".")[0]
        if parent and _file(modules.get(parent)) is not None:
            continue  # its package stands for it
        if name.startswith("_"):
            continue  # something that a package has beside what it is known by
        file = _file(module)
        for site in sites:
            if file is not None and file.startswith(site + os.sep):
                files[name] = os.path.relpath(file, site)
                break
    return files


def _file(module: object) -> str | None:
    file = getattr(module, "__file__", None)
    return file if isinstance(file, str) else None


def _owners(modules: Mapping[str, str], packages: Iterable[_Installed]) -> dict[str, _Installed]:
    """Return the packages to which modules belong, as far as that can be told."""
    by_name: dict[str, _Installed] = {}
    for package in packages:
        by_name.setdefault(package.name, package)
    found = {name: by_name.pop(_normal(name)) for name in modules if _normal(name) in by_name}
    rest = {name: file for name, file in modules.items() if name not in found}
    for package in by_name.values():
        if not rest:
            break
        for name in _owned(rest, package):
            found[name] = package
            del rest[name]
    return found


def _owned(modules: Mapping[str, str], package: _Installed) -> list[str]:
    """Return which of the modules are in a package's list of files."""
    record = _read(package.info, "RECORD")
    if record:
        record = b"\n" + record
        return [
            name
            for name, file in modules.items()
            if b"\n%b," % file.replace(os.sep, "/").encode() in record
        ]
    tops = _read(package.info, "top_level.txt").decode(errors="replace").split()
    return [name for name in modules if name in tops]


def _read(folder: str, file: str) -> bytes:
    try:
        with open(os.path.join(folder, file), "rb") as opened:
            return opened.read()
    except OSError:
        return b""


def _closure(packages: Iterable[_Installed]) -> set[str]:
    """Return those that are tools, or that tools require."""
    by_name = {package.name: package for package in packages}
    found: set[str] = set()
    todo = [name for name in by_name if name in _TOOLS]
    while todo:
        name = todo.pop()
        if name in by_name and name not in found:
            found.add(name)
            todo += _required(by_name[name])
    return found


def _required(package: _Installed) -> list[str]:
    """Return the names of what a package requires, extras left out."""
    head = _read(package.info, "METADATA").partition(b"\n\n")[0].decode(errors="replace")
    return [
        _normal(match[1])
        for match in re.finditer(r"^Requires-Dist: *([\w.-]+)(.*)$", head, re.MULTILINE)
        if "extra" not in match[2]
    ]


def _used() -> set[str]:
    """Return the top-level names of what the program's own modules have among their names."""
    from fiber.code.project import is_ours

    tops: set[str] = set()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "fiber":
            continue
        file = _file(module)
        if name == "__main__" or (file is not None and is_ours(file)):
            for value in list(vars(module).values()):
                if isinstance(value, ModuleType):
                    tops.add(value.__name__.partition(".")[0])
                elif isinstance(value, (type, FunctionType)):
                    tops.add(str(value.__module__).partition(".")[0])
    return tops
