"""CPython's own tests of multiprocessing, against Fiber: one test here for each class of theirs.

They run in the interpreter that runs this, and in the newest other one of this machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.stdlib import page
from tests.stdlib.left_out import LEFT_OUT
from tests.stdlib.runner import SECONDS_OF_A_CLASS, Interpreter, newest

MINORS = sorted({sys.version_info.minor, newest()})
FOUND = [found for found in map(Interpreter.find, MINORS) if found is not None]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stdlib")


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_OF_A_CLASS + 60)
@pytest.mark.parametrize(
    ("python", "name"),
    [
        pytest.param(python, name, id=f"{python.version}-{name}")
        for python in FOUND
        for name in python.classes
    ],
)
def test_class(python: Interpreter, name: str, folder: Path) -> None:
    outcomes = python.run(name, folder)
    assert outcomes.keys() == set(python.classes[name])
    failed = {m: outcome.text for m, outcome in outcomes.items() if outcome.state == "failed"}
    assert not failed, "\n\n".join(f"{name}.{m}: {text}" for m, text in failed.items())
    if all(outcome.state in ("skipped", "left out") for outcome in outcomes.values()):
        pytest.skip("; ".join(sorted({outcome.text for outcome in outcomes.values()})))


def test_the_tests_of_cpython_are_here() -> None:
    if not FOUND:
        pytest.skip("these Pythons come without their tests")
    assert all(len(python.classes) > 50 for python in FOUND)


def test_what_is_left_out_is_there_to_be_left_out() -> None:
    if not FOUND:
        pytest.skip("these Pythons come without their tests")
    there = {name for python in FOUND for name in python.classes}
    there |= {f"{n}.{m}" for python in FOUND for n, ms in python.classes.items() for m in ms}
    assert set(LEFT_OUT) - there == set()


@pytest.mark.parametrize("python", FOUND, ids=lambda python: python.version)
def test_the_page_has_a_row_for_each_class(python: Interpreter) -> None:
    assert set(python.classes) - page.rows(page.PATH.read_text(encoding="utf-8")) == set()


def test_the_page_tells_of_no_failure() -> None:
    assert page.failed(page.PATH.read_text(encoding="utf-8")) == []


def test_the_page_tells_what_is_left_out_and_why() -> None:
    text = page.PATH.read_text(encoding="utf-8")
    for title, reasons in page.KINDS.items():
        assert page.section(text, title) == page.entries(reasons)
