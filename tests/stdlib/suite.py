"""CPython's own tests of multiprocessing, executed with Fiber in the place of multiprocessing.

    test/_test_multiprocessing.py ─► outline ─► the classes and methods that there are
                                  └► load ─► a namespace, in which multiprocessing is fiber

The text is that of the running interpreter, and is executed as it stands; only what it imports
differs. `import multiprocessing` gives it Fiber, at the top of the file and within functions alike,
and where it writes a program into a string, that program imports Fiber as well. The modules that
others see under the name of multiprocessing stay what they are.

Run as a program, prints the outline as JSON.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import re
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

FILE = Path(sysconfig.get_path("stdlib")) / "test" / "_test_multiprocessing.py"
ROOT = Path(__file__).resolve().parent.parent.parent
FROM, TO = "multiprocessing", "fiber"


def outline() -> dict[str, list[str]]:
    """Return the names of the methods of each test class, as they are after mixing in.

    A class `_TestQueue` becomes `WithProcessesTestQueue` and the like, one for each of its types.
    """
    tree = ast.parse(FILE.read_bytes())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found: dict[str, list[str]] = {}
    for node in classes.values():
        methods = sorted(
            child.name
            for child in node.body
            if isinstance(child, ast.FunctionDef) and child.name.startswith("test")
        )
        bases = {ast.unparse(base) for base in node.bases}
        if methods and "BaseTestCase" in bases:
            types_ = _allowed_types(node) or _allowed_types(classes["BaseTestCase"])
            for kind in types_:
                found[f"With{kind.capitalize()}{node.name[1:]}"] = methods
        elif methods and "unittest.TestCase" in bases:
            found[node.name] = methods
    return dict(sorted(found.items()))


def _allowed_types(node: ast.ClassDef) -> tuple[str, ...]:
    for child in node.body:
        if isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "ALLOWED_TYPES":
            value: tuple[str, ...] = ast.literal_eval(child.value)
            return value
    return ()


def load(name: str) -> dict[str, Any]:
    """Execute the file as module `name` and return its namespace, test classes mixed in.

    A name that Fiber lacks does not stop this: what stands for it fails when it is used.
    """
    tree = _Programs(name).visit(ast.parse(FILE.read_bytes()))
    namespace: dict[str, Any] = {
        "__name__": name,
        "__file__": str(FILE),
        "__builtins__": {**vars(builtins), "__import__": _import},
    }
    _Missing.tolerated = True
    try:
        exec(compile(tree, str(FILE), "exec", dont_inherit=True), namespace)
    finally:
        _Missing.tolerated = False
    namespace[FROM] = importlib.import_module(TO)
    mixed: dict[str, Any] = {"__name__": name}
    namespace["install_tests_in_module_dict"](mixed, "spawn")
    return {**namespace, **mixed}


def _import(
    name: str,
    globals: dict[str, Any] | None = None,
    locals: dict[str, Any] | None = None,
    fromlist: tuple[str, ...] | None = (),
    level: int = 0,
) -> Any:
    """`__import__` for the file: Fiber instead of multiprocessing, all else as ever."""
    if level or name.partition(".")[0] != FROM:
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    name = TO + name[len(FROM) :]
    try:
        module = builtins.__import__(name, globals, locals, fromlist or (), 0)
    except ImportError:
        if not _Missing.tolerated:
            raise
    return _Tolerant(name if fromlist else TO) if _Missing.tolerated else module


class _Missing(type):
    """A class that stands for something that Fiber lacks, so that the file can be executed."""

    tolerated = False

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(f"{cls.__name__}.{name}")

    def __call__(cls, *args: object, **kwargs: object) -> Any:
        if not _Missing.tolerated:
            raise AttributeError(f"there is no {cls.__name__}")
        return cls


def _missing(name: str) -> _Missing:
    return _Missing(name, (), {})


class _Tolerant(types.ModuleType):
    """A module of Fiber that has all names while the file is being executed, see `_Missing`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        try:
            value = getattr(importlib.import_module(self.__name__), name)
        except (ImportError, AttributeError):
            if not _Missing.tolerated:
                raise
            return _missing(path)
        is_part = _Missing.tolerated and isinstance(value, types.ModuleType)
        return _Tolerant(value.__name__) if is_part else value


def with_fiber(program: str, cases: str = "tests.stdlib.cases") -> str:
    """Have the text of a program import Fiber, wherever it is run and with what flags."""
    import cloudpickle

    import fiber

    folders = [Path(module.__file__).parent.parent for module in (cloudpickle, fiber)]
    paths = list(dict.fromkeys(map(str, [ROOT, *folders])))
    prefix = f"import sys; sys.path[:0] = {paths}; "
    for pattern, imports in (
        (rf"import {FROM}(?=\.| as )", f"import {TO}"),
        (rf"import {FROM}\b(?!\.| as )", f"import {TO} as {FROM}"),
        (rf"from {FROM}\b", f"from {TO}"),
        (r"from test\._test_multiprocessing\b", f"from {cases}"),
    ):
        program = re.sub(rf"(?m)^(\s*){pattern}", rf"\1{prefix}{imports}", program)
    return program


class _Programs(ast.NodeTransformer):
    """Has programs and names of modules in strings be of Fiber."""

    def __init__(self, cases: str) -> None:
        self._cases = cases

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str):
            name = re.fullmatch(rf"{FROM}((\.\w*)*)", node.value)  # such as a target of mock.patch
            node.value = TO + name[1] if name else with_fiber(node.value, self._cases)
        return node


if __name__ == "__main__":
    print(json.dumps({"version": sys.version_info[:3], "classes": outline()}))
