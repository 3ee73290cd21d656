"""`python -m benchmarks.against COMMIT [ROW ...] [--rounds N] [--output FILE]`.

Fiber as it is against Fiber as it was: the rows are measured in turns with the source of an older
commit, which plays a peer called "before", and the table says what has become slower.

    git archive COMMIT src ─► a temporary folder ─► PYTHONPATH of the children of "before"
                                                    ▲
    harness.run(row, ["fiber", "before"]) ──────────┘

Both run the same measurements of this tree. What the older source does not have, as `fiber.put`,
has no figure there.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import io
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import about, harness, report
from benchmarks.peers import BEFORE
from benchmarks.report import NOTABLE
from benchmarks.rows import ROWS, Metric, Row


@contextlib.contextmanager
def source(commit: str) -> Iterator[Path]:
    """The source tree of a commit, in a temporary folder."""
    git = ["git", "-C", str(harness.ROOT)]
    done = subprocess.run(
        [*git, "archive", "--format=tar", commit, "src"], check=False, capture_output=True
    )
    if done.returncode:
        raise SystemExit(f"there is no source of {commit!r}: {done.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="fiber-before-") as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        compileall.compile_dir(folder, quiet=1)  # as the tree beside it is
        yield Path(folder) / "src"


def hash_of(commit: str) -> str:
    """The commit's short hash."""
    command = ["git", "-C", str(harness.ROOT), "rev-parse", "--short", commit]
    return subprocess.check_output(command, text=True).strip()


def lines(row: Row, result: harness.Result) -> list[list[str]]:
    """The lines of a row's table: each figure before and now, their ratio, and what that means."""
    now, before = result.values.get("fiber", {}), result.values.get(BEFORE, {})
    found = []
    for metric in row.metrics:
        pair = before.get(metric.key, []), now.get(metric.key, [])
        if any(value is not None for values in pair for value in values):
            ratio, word = compare(metric, *pair)
            title = f"{metric.title}, {metric.unit}" if metric.unit else metric.title
            shown = [report.figure(values, metric) for values in pair]
            found.append([f"`{row.name}`", title, *shown, ratio, word])
    return found


def compare(metric: Metric, before: list[float | None], now: list[float | None]) -> tuple[str, str]:
    """The ratio of the two, the median over the rounds; and a word if it is notable."""
    costs = report.costs(metric, before, now)
    if not costs:
        return "-", ""
    middle = statistics.median(costs)
    text = report.significant(1 / middle if metric.more_is_better else middle)
    # All rounds agree, or it may be chance.
    if middle > 1 + NOTABLE and min(costs) > 1:
        return text, "**slower**" if metric.ratio else "**more**"
    if middle < 1 / (1 + NOTABLE) and max(costs) < 1:
        return text, "faster" if metric.ratio else "less"
    return text, "as it was"


def render(table: list[list[str]], failures: list[str], run: dict[str, Any]) -> str:
    """The report."""
    head = ["row", "figure", f"before ({run['before']})", f"now ({run['now']})", "now / before", ""]
    rule = ["---", "---", "---:", "---:", "---:", "---"]
    slower = sum("**" in line[-1] for line in table)
    count = f"{run['rounds']} round{'s' if run['rounds'] > 1 else ''}"
    text = f"""\
Written by `{run["command"]}` on {run["date"]}; {run["machine"]}; Python {run["python"]}.
{count}, the two in turns; each figure is the median (least to most), the ratio is the median of
those of each round. *Slower* or *faster*: by more than {NOTABLE:.0%}, and in every round."""
    parts = [
        "# Before and after",
        text,
        f"Of {len(table)} figures {slower} are worse than before.",
        report.table([head, rule, *table]),
    ]
    if failures:
        parts.append("\n".join(f"* {failure}" for failure in failures))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against")
    parser.add_argument("commit", help="the one before, as git names it")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny runs, only printed")
    parser.add_argument("--deadline", type=float, default=90.0)
    default = harness.ROOT / "benchmarks" / "AGAINST.md"
    parser.add_argument("--output", type=Path, help="default benchmarks/AGAINST.md")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    output: Path | None = options.output or (None if options.quick else default)
    table: list[list[str]] = []
    failures: list[str] = []
    with source(options.commit) as tree:
        peers = {"fiber": harness.ROOT / "src", BEFORE: tree}
        settings = harness.Settings(
            max(1, options.rounds), options.quick, options.deadline, sources=peers
        )
        run = about.describe(["fiber"], settings, argv, "benchmarks.against")
        run |= {"before": hash_of(options.commit), "now": hash_of("HEAD")}
        harness.warm_up(peers, settings)
        for name in options.rows or ROWS:
            result = harness.run(ROWS[name], peers, settings, about.say)
            table += lines(ROWS[name], result)
            for peer, texts in result.failures.items():
                failures += [f"`{name}`, {peer}: {text}" for text in texts]
            text = render(table, failures, run)
            if output:  # after each row, as the others do
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(text, encoding="utf-8")
    print(f"wrote {output}" if output else text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
