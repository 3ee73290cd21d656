"""The generated part of docs/multiprocessing.md: what CPython's tests say of Fiber.

results ─► write ─► the page, after the line that begins the generated part
                    read ◄─ the page, for the test that it agrees with the tables
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from tests.stdlib.adapted import ADAPTED
from tests.stdlib.left_out import LEFT_OUT
from tests.stdlib.suite import ROOT

if TYPE_CHECKING:
    from tests.stdlib.runner import Outcome

PATH = ROOT / "docs" / "multiprocessing.md"
BEGIN = "<!-- From here on written by `python -m tests.stdlib --write`. -->\n"
STATES = ("passed", "left out", "skipped", "failed")


def write(results: dict[str, dict[str, dict[str, Outcome]]]) -> None:
    """Write the page's generated part from `results[version][class][method]`."""
    own, _, _ = PATH.read_text(encoding="utf-8").partition(BEGIN)
    PATH.write_text(own + BEGIN + generated(results), encoding="utf-8")


def generated(results: dict[str, dict[str, dict[str, Outcome]]]) -> str:
    head = " | ".join(f"{version} {state}" for version in results for state in STATES)
    lines = ["", f"| class | {head} |", "|---" * (1 + len(results) * len(STATES)) + "|"]
    names = sorted({name for classes in results.values() for name in classes})
    for name in names:
        cells = []
        for classes in results.values():
            counts = Counter(outcome.state for outcome in classes.get(name, {}).values())
            cells += [str(counts[state] or "") for state in STATES]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", "## Left out", "", *entries(LEFT_OUT)]
    for title, reasons in by_kind({name: reason for name, (reason, _) in ADAPTED.items()}).items():
        lines += ["", f"## {title}", "", *entries(reasons)]
    lines += ["", "## Skipped by CPython", "", *entries(skipped(results))]
    return "\n".join(lines) + "\n"


def skipped(results: dict[str, dict[str, dict[str, Outcome]]]) -> dict[str, str]:
    return {
        f"{name}.{method}": outcome.text
        for classes in results.values()
        for name, outcomes in classes.items()
        for method, outcome in outcomes.items()
        if outcome.state == "skipped"
    }


def by_kind(adapted: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return what is adapted below its headings: whole tests, and helpers of tests."""
    tests = {n: r for n, r in adapted.items() if n.rpartition(".")[2].startswith("test")}
    helpers = {name: reason for name, reason in adapted.items() if name not in tests}
    return {"Answered otherwise": tests, "Helpers put in the place of CPython's": helpers}


def entries(reasons: dict[str, str]) -> list[str]:
    """Return a line of the page for each name."""
    return [f"* `{name}`: {reasons[name]}" for name in sorted(reasons)]


def rows(text: str) -> set[str]:
    """Return the classes that a page has rows for."""
    return set(re.findall(r"^\| `(\w+)` \|", text, re.M))


def section(text: str, title: str) -> list[str]:
    """Return the entries below a heading of the page."""
    _, _, rest = text.partition(f"\n## {title}\n")
    return re.findall(r"^\* .*$", rest.partition("\n## ")[0], re.M)
