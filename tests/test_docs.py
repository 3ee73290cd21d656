"""Every Python program in README and docs is run, and every path that they name is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PROGRAMS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S), 1)
]

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("code", PROGRAMS)
def test_a_program_of_the_documentation_runs(code: str, run_script: RunScript) -> None:
    done = run_script(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    told = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.M)
    assert not told or matches(done.stdout, told), done.stdout
    assert matches(done.stderr, re.findall(r"^ *# stderr: (.*)$", code, re.M)), done.stderr


def matches(text: str, lines: list[str]) -> bool:
    """Whether a program printed these lines, in which "…" is anything."""
    pattern = "".join(re.escape(line).replace("…", ".*") + "\n" for line in lines)
    return re.fullmatch(pattern, text) is not None


def test_the_failing_task_of_the_readme_fails_as_it_says(run_script: RunScript) -> None:
    (code,) = [p.values[0] for p in PROGRAMS if "os._exit(7)" in str(p.values[0])]
    lines = run_script(str(code)).stdout.splitlines()
    assert [lines[0], lines[1], lines[2], lines[4]] == ["0", "1", "2", "4"]
    assert lines[3].startswith("WorkerDied('item 3 of risky ended its worker 3 times; the last one")
    assert "ended with exit code 7" in lines[3]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_documentation_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_setting_is_documented() -> None:
    from fiber.config import KEYS

    text = (ROOT / "docs" / "configuration.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(KEYS)
