"""The generated part of docs/multiprocessing.md: what CPython's tests say of Fiber.

results ─► write ─► the page, after the line that begins the generated part
                    read ◄─ the page, for the test that it agrees with the tables
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.stdlib.adapted import HELPERS, MENDED, OTHERWISE, OUTSIDE
from tests.stdlib.left_out import LEFT_OUT
from tests.stdlib.suite import ROOT

if TYPE_CHECKING:
    from tests.stdlib.runner import Outcome

PATH = ROOT / "docs" / "multiprocessing.md"
BEGIN = "<!-- From here on written by `python -m tests.stdlib --write`. -->\n"
KINDS = {
    "Left out": LEFT_OUT,
    "Answered otherwise": OTHERWISE,
    "Looked at from the outside": OUTSIDE,
    "Mended": MENDED,
    "Helpers put in the place of CPython's": HELPERS,
}
STATES = ("passed", "left out", "skipped", "failed")


def write(results: dict[str, dict[str, dict[str, Outcome]]]) -> None:
    """Write the page's generated part from `results[version][class][method]`."""
    own, _, _ = PATH.read_text(encoding="utf-8").partition(BEGIN)
    PATH.write_text(own + BEGIN + generated(results), encoding="utf-8")


def generated(results: dict[str, dict[str, dict[str, Outcome]]]) -> str:
    head = " | ".join(f"{version} {state}" for version in results for state in STATES)
    lines = ["", f"| class | {head} |", "|---" * (1 + len(results) * len(STATES)) + "|"]
    names = sorted({name for classes in results.values() for name in classes})
    lines += [
        row(f"`{name}`", [classes.get(name, {}) for classes in results.values()]) for name in names
    ]
    together = [
        {(name, method): outcome for name in classes for method, outcome in classes[name].items()}
        for classes in results.values()
    ]
    lines.append(row("together", together))
    for title, reasons in KINDS.items():
        lines += ["", f"## {title}", "", *entries(reasons)]
    lines += ["", "## Skipped by CPython", "", *entries(skipped(results))]
    return "\n".join(lines) + "\n"


def row(title: str, versions: list[dict[Any, Outcome]]) -> str:
    cells = []
    for outcomes in versions:
        counts = Counter(outcome.state for outcome in outcomes.values())
        cells += [str(counts[state] or "") for state in STATES]
    return f"| {title} | {' | '.join(cells)} |"


def skipped(results: dict[str, dict[str, dict[str, Outcome]]]) -> dict[str, str]:
    return {
        f"{name}.{method}": outcome.text
        for classes in results.values()
        for name, outcomes in classes.items()
        for method, outcome in outcomes.items()
        if outcome.state == "skipped"
    }


def entries(reasons: dict[str, str]) -> list[str]:
    """Return a line of the page for each name."""
    return [f"* `{name}`: {reasons[name]}" for name in sorted(reasons)]


def rows(text: str) -> set[str]:
    """Return the classes that a page has rows for."""
    return set(re.findall(r"^\| `(\w+)` \|", text, re.M))


def failed(text: str) -> list[str]:
    """Return the classes of which a page says that a test failed."""
    column = slice(STATES.index("failed"), None, len(STATES))
    return [
        name
        for name, counts in re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.M)
        if any(count.strip() for count in counts.split("|")[column])
    ]


def section(text: str, title: str) -> list[str]:
    """Return the entries below a heading of the page."""
    _, _, rest = text.partition(f"\n## {title}\n")
    return re.findall(r"^\* .*$", rest.partition("\n## ")[0], re.M)
