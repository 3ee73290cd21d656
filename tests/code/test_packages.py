"""What the image lacks of third-party packages, told in one table."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fiber.code.packages import Difference, compare, table

Install = Callable[..., None]
LOADED = "\nimport json\nfrom fiber.code import packages\nprint(json.dumps(packages.loaded()))\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for installed packages; in the path of this process and of programs."""
    folder = tmp_path / "lib" / "site-packages"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def install(site: Path) -> Install:
    """Install a package as pip would: `install("Name", "1.0", {"file.py": source})`."""

    def install(
        name: str,
        version: str,
        files: dict[str, str],
        requires: tuple[str, ...] = (),
        kind: str = "dist-info",
    ) -> None:
        info = site / f"{name.replace('-', '_')}-{version}.{kind}"
        info.mkdir()
        for file, source in files.items():
            path = site / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        if kind == "egg-info":
            tops = {file.partition("/")[0].removesuffix(".py") for file in files}
            (info / "top_level.txt").write_text("\n".join(tops))
            return
        lines = [f"{file},sha256=x,1" for file in files]
        (info / "RECORD").write_text("\n".join([*lines, f"{info.name}/RECORD,,"]))
        needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n{needs}\nWords.\n")

    return install


@pytest.fixture
def loaded(
    run_script: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[[str], dict[str, str]]:
    """Return what a program has loaded."""

    def loaded(program: str) -> dict[str, str]:
        done = run_script(program + LOADED)
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout)
        return found

    return loaded


Loaded = Callable[[str], dict[str, str]]


def test_what_is_imported_is_found_under_the_name_of_pip(install: Install, loaded: Loaded) -> None:
    install("Plain", "1.2", {"plain/__init__.py": "import needed"})
    install("needed", "0.1", {"needed.py": ""})
    install("Other-Name", "3.0.dev1", {"differs/__init__.py": "", "differs/deep.py": ""})
    install("unused", "5", {"unused.py": ""})
    assert loaded("import plain, differs.deep") == {
        "needed": "0.1",
        "other-name": "3.0.dev1",
        "plain": "1.2",
    }


def test_an_import_within_a_function_counts(install: Install, loaded: Loaded) -> None:
    install("plain", "1.2", {"plain/__init__.py": ""})
    assert loaded("def f():\n    import plain\nf()") == {"plain": "1.2"}


def test_parts_of_a_namespace_are_told_apart(install: Install, loaded: Loaded) -> None:
    install("company-one", "1", {"company/one/__init__.py": ""})
    install("company-two", "2", {"company/deep/two.py": ""})
    install("company-three", "3", {"company/three/__init__.py": ""})
    found = loaded("import company.one, company.deep.two")
    assert found == {"company-one": "1", "company-two": "2"}


def test_packages_of_the_old_kind(install: Install, loaded: Loaded) -> None:
    install("Old_One", "1.1-py3.11", {"ancient/__init__.py": ""}, kind="egg-info")
    assert loaded("import ancient") == {"old-one": "1.1"}


def test_what_only_tools_need_is_left_out(install: Install, loaded: Loaded) -> None:
    install("docker", "7", {"docker/__init__.py": "import helper"}, requires=("helper>=2",))
    install("helper", "2.1", {"helper.py": "import below"}, requires=('below; python_version>"3"',))
    install("below", "0.4", {"below.py": "def f(): pass\nclass C: pass"})
    install("own", "1", {"own.py": "import helper"})
    hidden = "__import__('docker'); __import__('own')\n"
    assert loaded(hidden) == {"own": "1"}
    assert loaded(hidden + "from below import f") == {"own": "1", "below": "0.4"}
    assert loaded(hidden + "import helper as h") == {"own": "1", "helper": "2.1"}
    assert loaded("import docker") == {"docker": "7"}


def test_what_a_module_of_the_project_uses_counts(
    install: Install, loaded: Loaded, tmp_path: Path
) -> None:
    install("kubernetes", "30", {"kubernetes/__init__.py": ""})
    (tmp_path / "ours.py").write_text("import kubernetes")
    assert loaded("import ours") == {"kubernetes": "30"}


def test_fiber_is_never_among_them(loaded: Loaded) -> None:
    assert loaded("import fiber, cloudpickle, fiber.pool.worker") == {}


def test_compare(install: Install, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("Same-Name", "1.0", {})
    install("other", "2.0", {})
    install("local", "2.1.0+cu121", {})
    install("missing_not", "1", {})
    monkeypatch.setattr(sys, "path", [str(site)])
    importlib.invalidate_caches()
    wanted = {"same-name": "1.0", "other": "2.1", "local": "2.1.0+cpu", "absent": "3"}
    assert compare(wanted) == [Difference("absent", "3", None), Difference("other", "2.1", "2.0")]
    assert compare({}) == []


def test_the_first_of_two_counts(
    install: Install, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("twice", "2.0", {})
    (tmp_path / "user" / "twice-1.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", ["/nonexistent", str(tmp_path / "user"), str(site)])
    assert compare({"twice": "1.0"}) == []


def test_the_table() -> None:
    differences = [Difference("numpy", "2.1.0", None), Difference("torch", "2.3+cpu", "2.2")]
    *rows, advice = table(differences, "the image python:3.11").splitlines()
    assert rows == [
        "package  here     there",
        "numpy    2.1.0    missing",
        "torch    2.3+cpu  2.2",
    ]
    assert "the image python:3.11 does not have them" in advice
    assert advice.endswith("`pip install numpy==2.1.0 torch==2.3`.")
