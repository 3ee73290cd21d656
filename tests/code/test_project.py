"""What of a program is its own, and that nothing else is served."""

from __future__ import annotations

import importlib
import importlib.util
import json
import marshal
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest

from fiber.code import protocol
from fiber.code.finder import Finder
from fiber.code.project import Project, is_ours, main_source
from fiber.code.protocol import Module
from fiber.code.server import Server

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file below tmp_path; the folder `home` in it is put into `sys.path`."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.syspath_prepend(str(home))

    def write(name: str, source: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        importlib.invalidate_caches()
        return path

    return write


def test_tops_are_modules_and_what_may_be_packages(write: Write) -> None:
    for name in ("alone.py", "package/__init__.py", "space/inner.py", "notes.txt", "no-name.py"):
        write(f"home/{name}")
    write(f"home/fast{EXTENSION_SUFFIXES[0]}")
    write("home/.hidden/x.py")
    tops = Project().tops()
    assert {"alone", "package", "space", "fast"} <= tops
    assert {"notes", "no-name", ".hidden", "hidden", "inner"}.isdisjoint(tops)


def test_tops_are_neither_pythons_nor_installed(write: Write) -> None:
    write("home/json.py")  # not imported: the standard library's is loaded
    write("home/cloudpickle.py")
    assert "json" in sys.modules
    tops = Project().tops()
    assert {"json", "os", "pytest", "numpy", "fiber", "cloudpickle", "__main__"}.isdisjoint(tops)


def test_a_module_that_replaces_one_of_python_counts_when_it_is_loaded(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("home/this.py", "X = 1\n")
    assert "this" not in Project().tops()
    monkeypatch.delitem(sys.modules, "this", raising=False)
    module = importlib.import_module("this")
    assert module.X == 1
    try:
        assert "this" in Project().tops()
        found = Project().module("this")
        assert found is not None
        assert found.source == b"X = 1\n"
    finally:
        del sys.modules["this"]


def test_tops_of_a_full_home_are_listed_once(write: Write, tmp_path: Path) -> None:
    write("home/deep/very/deep/module.py")
    for number in range(3000):
        (tmp_path / "home" / f"file{number}.dat").touch()
    project = Project()
    tops = project.tops()
    assert "deep" in tops
    assert not any(name.startswith("file") for name in tops)
    write("home/later.py")
    assert "later" in project.tops()


def test_modules_are_found_without_being_imported(write: Write) -> None:
    write("home/package/__init__.py", "raise RuntimeError")
    inner = write("home/package/inner/deep.py", "X = 'ä'\n")
    alone = write("home/alone.py", "raise RuntimeError")
    project = Project()
    package = project.module("package")
    assert package is not None
    assert package.path == [str(alone.parent / "package")]
    module = project.module("alone")
    assert module is not None
    assert (module.file, module.path) == (str(alone), None)
    assert module.source == b"raise RuntimeError"
    space = project.module("package.inner")
    assert space == Module("package.inner", None, [str(inner.parent)])
    deep = project.module("package.inner.deep")
    assert deep is not None
    assert deep.source == "X = 'ä'\n".encode()
    assert deep.code is not None
    names: dict[str, object] = {}
    exec(marshal.loads(deep.code), names)
    assert names["X"] == "ä"
    assert {"package", "alone", "package.inner"}.isdisjoint(sys.modules)


def test_code_is_for_the_same_magic_only(write: Write) -> None:
    write("home/alone.py", "X = 1\n")
    module = Project().module("alone", b"none")
    assert module is not None
    assert module.code is None


def test_what_does_not_compile_is_sent_as_it_is(write: Write) -> None:
    write("home/wrong.py", "def (")
    module = Project().module("wrong")
    assert module is not None
    assert (module.source, module.code) == (b"def (", None)


def test_a_compiled_extension_is_answered_as_such(write: Write) -> None:
    path = write(f"home/package/fast{EXTENSION_SUFFIXES[0]}")
    write("home/package/__init__.py")
    module = Project().module("package.fast")
    assert module == Module("package.fast", str(path), extension=True)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "..secret", "alone.", "/etc/passwd", "../secret", "alone/../../secret",
        "package...secret", "package.__init__.", "a\0b", "secret", "package.secret", "json", "os",
        "sys", "zipimport", "pytest", "numpy", "numpy.linalg", "fiber", "fiber.config", "__main__",
        "cloudpickle", "nothing", "lib", "lib.site_packages", "package.deeper.than.it.goes",
    ],
)  # fmt: skip
def test_nothing_else_is_served(name: str, write: Write) -> None:
    write("home/package/__init__.py")
    write("home/alone.py")
    write("secret.py", "SECRET = 1")
    assert Project().module(name) is None


def test_an_environment_within_the_project_is_not_the_projects(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("home/env/lib/python3/site-packages/third.py")
    monkeypatch.syspath_prepend(str(tmp_path / "home/env/lib/python3/site-packages"))
    assert "third" not in Project().tops()
    assert Project().module("third") is None
    assert Project().module("env") is not None  # a folder of the project, as `import` sees it
    assert Project().module("env.lib.python3") is not None


def test_pythons_own_is_not_the_projects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(sys.base_prefix)  # as when Python is installed in one's home
    assert not is_ours(sysconfig.get_path("stdlib") + "/json/__init__.py")
    assert Project().module("json") is None


def test_a_changed_path_of_a_package_is_followed(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("home/extended/__init__.py", "")
    write("home/plugins/extra.py", "X = 2\n")
    module = ModuleType("extended")
    module.__path__ = [str(tmp_path / "home/plugins")]
    monkeypatch.setitem(sys.modules, "extended", module)
    found = Project().module("extended.extra")
    assert found is not None
    assert found.source == b"X = 2\n"
    module.__path__ = [str(tmp_path)]
    write("secret.py", "SECRET = 1")
    assert Project().module("extended.secret") is None


def test_modules_of_an_archive(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "home" / "program.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped.py", "X = 3\n")
        file.writestr("zippack/__init__.py", "")
        file.writestr("zippack/inner.py", "Y = 4\n")
    monkeypatch.syspath_prepend(str(archive))
    project = Project()
    assert {"zipped", "zippack"} <= project.tops()
    module = project.module("zippack.inner")
    assert module is not None
    assert module.source == b"Y = 4\n"


def test_an_editable_install_by_an_import_hook(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("elsewhere/mapped/__init__.py", "X = 5\n")
    write("elsewhere/mapped/inner.py", "Y = 6\n")
    write("elsewhere/other.py")
    # As setuptools writes it.
    hook = ModuleType("__editable___mapped_1_0_finder")
    vars(hook)["MAPPING"] = {"mapped": str(tmp_path / "elsewhere/mapped")}

    class _EditableFinder:
        @classmethod
        def find_spec(cls, name: str, path: object = None, target: object = None) -> object:
            if name != "mapped":
                return None
            file = tmp_path / "elsewhere/mapped/__init__.py"
            return importlib.util.spec_from_file_location(name, file)

    _EditableFinder.__module__ = hook.__name__
    monkeypatch.setitem(sys.modules, hook.__name__, hook)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, _EditableFinder])
    project = Project()
    assert "mapped" in project.tops()
    found = project.module("mapped.inner")
    assert found is not None
    assert found.source == b"Y = 6\n"
    assert project.module("other") is None


def test_a_worker_passes_on_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Module("given", "/home/given.py", None, b"X = 1\n")
    finder = Finder({"given"}, lambda name: given if name == "given" else None)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert "given" in Project().tops()
    assert Project().module("given") is given
    assert Project().module("given.nothing") is None


# The main module --------------------------------------------------------------------------------

MAIN = """
import json, sys
from fiber.code.project import Project, main_source
from fiber.runtime.main import describe
main = main_source(describe())
module = Project().module("package.near")
print(json.dumps([main, module is not None]))
"""


def test_the_main_module_of_a_file(tmp_path: Path, run_script: Callable[..., object]) -> None:
    done = run_script(MAIN)
    (file, name, source), _ = json.loads(done.stdout)  # type: ignore[attr-defined]
    assert (file, name, source) == (str(tmp_path / "script.py"), "", MAIN)


def test_the_main_module_of_a_package(tmp_path: Path, run_script: Callable[..., object]) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "near.py").touch()
    (package / "module.py").write_text("from . import near\n" + MAIN)
    starter = (
        "import runpy; runpy.run_module('package.module', run_name='__main__', alter_sys=True)"
    )
    done = run_script(starter)
    (file, name, source), near = json.loads(done.stdout)  # type: ignore[attr-defined]
    assert (file, name) == (str(package / "module.py"), "package.module")
    assert source.startswith("from . import near\n")
    assert near


def test_other_encodings_and_no_source_at_all(write: Write) -> None:
    path = write("home/latin.py")
    path.write_bytes("# coding: latin-1\nX = 'ä'\n".encode("latin-1"))
    main = main_source({"path": str(path)})
    assert main is not None
    assert main.source.endswith("X = 'ä'\n")
    compiled = write("home/compiled.pyc")
    compiled.write_bytes(importlib.util.MAGIC_NUMBER + bytes(range(256)))
    assert main_source({"path": str(compiled)}) is None
    assert main_source({}) is None


# The server -------------------------------------------------------------------------------------


def test_answers_are_kept(write: Write) -> None:
    path = write("home/alone.py", "X = 1\n")
    server = Server(Project())
    question = importlib.util.MAGIC_NUMBER + b"alone"
    kind, first = server.answer(protocol.MODULE, question)
    assert kind == protocol.MODULE
    module = protocol.unpack(first)
    assert module is not None
    assert (module.name, module.source) == ("alone", b"X = 1\n")
    path.write_text("X = 2  # all workers of a program shall have the same\n")
    assert server.answer(protocol.MODULE, question)[1] is first
    magic = importlib.util.MAGIC_NUMBER
    assert server.answer(protocol.BUNDLE, magic)[1] is server.answer(protocol.BUNDLE, magic)[1]


def test_no_question_raises(write: Write, tmp_path: Path) -> None:
    server = Server(Project())
    assert server.answer(protocol.MODULE, b"") == (protocol.MODULE, b"")
    assert server.answer(protocol.MODULE, b"abcdnothing") == (protocol.MODULE, b"")
    kind, reason = server.answer(protocol.MODULE, b"abcd\xff\xfe")
    assert kind == protocol.REFUSED
    kind, reason = server.answer(99, b"")
    assert (kind, b"kind 99" in reason) == (protocol.REFUSED, True)
    (tmp_path / "home" / "dangling.py").symlink_to(tmp_path / "nothing")
    assert server.answer(protocol.MODULE, b"abcddangling") == (protocol.MODULE, b"")
