"""The results on disk (JSON, all rounds) and the report made from them (Markdown).

Rows are stored with the run that measured them, so that a run of some rows leaves the others alone,
and the report can say where each table comes from. A rerun replaces a row as a whole: figures of
different runs never share a table.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.harness import Result
from benchmarks.rows import BASELINE, COUNTED, FLOOR, ROWS, Metric, Row

BEGIN = "<!-- written by hand from here: a rerun keeps it -->"
END = "<!-- to here -->"

NOTABLE = 0.10  # what the noise of a quiet machine does not make

READING = """\
* Ratios are the figures to trust. They compare neighbours in time; the figures themselves move with
  whatever else the machine does. Where the range in brackets is wide, so is the doubt.
* Empty tasks show what a library costs and no more than that: with tasks of 10 ms and longer most
  of the peers are equal, as the sleep test shows.
* "default chunksize" compares different things: multiprocessing splits a `map` into four chunks for
  each worker before it starts, concurrent.futures and loky send tasks singly, Dask has no chunks.
* The sleep test's floor at 1 ms is above 1.00 because the system wakes a sleeper late. Only what
  lies above the floor is the library's.
* An executor takes all tasks of a stream at once (`submit` for each), so that its master works
  through the whole stream before the first result is read.
* fork shares the master's pages with the workers, so its workers are small until they write.
* multiprocessing's `Lock` and `Value` are memory that the processes of one machine share, and no
  message goes anywhere. Fiber's can be had from other machines, as those of a manager can: for the
  lock, the ratio to the manager's is the one that says something.
"""


def store_path(report: Path) -> Path:
    """Where the results behind a report are kept: RESULTS.md has results.json."""
    return report.with_name(report.stem.lower() + ".json")


def load(path: Path) -> dict[str, Any]:
    """The stored rows by name; empty if there are none yet."""
    if not path.exists():
        return {}
    try:
        rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError) as error:
        raise SystemExit(f"{path} is not a store of results ({error}); move it away.") from None
    return rows


def save(path: Path, rows: dict[str, Any]) -> None:
    # Through a second file: an interrupted run leaves the old results whole.
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def entry(result: Result, run: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a row: its figures and the run they come from."""
    return {"run": run, "values": result.values, "failures": result.failures}


def machine() -> str:
    """Cores, processor and kernel, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kernel = f"{platform.system()} {platform.release().split('-')[0]}"
    return f"{cores} cores, {_processor()}, {kernel}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(source tree)"


def write(path: Path, rows: dict[str, Any]) -> None:
    """Write the report; the part of the old one that was written by hand stays."""
    text = render(rows, _hand_written(path), path.with_name("plots"))
    path.write_text(text, encoding="utf-8")


def _hand_written(path: Path) -> str:
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if BEGIN not in old:
        return READING
    kept, found, _ = old.partition(BEGIN)[2].partition(END)
    if not found:
        raise SystemExit(
            f"{path} has lost the line {END!r}: put it back below the hand-written part."
        )
    return kept.strip("\n") + "\n"


def render(rows: dict[str, Any], reading: str = READING, plots: Path | None = None) -> str:
    """The report of the stored rows, in the catalogue's order; `plots`: the folder of pictures."""
    stored = [(row, rows[name]) for name, row in ROWS.items() if name in rows]
    latest = max((data["run"] for _, data in stored), key=lambda run: str(run["date"]))
    versions = ", ".join(f"{peer} {number}" for peer, number in latest["versions"].items())
    head = f"""\
# Fiber and its peers, measured

Written by `python -m benchmarks` (README.md beside this one says how to check a row); only the part
between the markers is written by hand. All rounds are in the JSON file beside this one.

* Machine: {latest["machine"]}; load average at the start {latest["load"]}
* Python {latest["python"]}; {versions or "no other packages"}
* Date: {latest["date"]}
* Command: `{latest["command"]}`

Each figure is the median of the rounds (least to most). Each measurement is a fresh process; the
peers take turns in every round. *x mp* is the ratio to {BASELINE} (fork) in the same round, the
median over the rounds."""
    parts = [
        head,
        f"## Reading the figures\n\n{BEGIN}\n\n{reading}\n{END}",
        "## Where a peer is better\n\n" + _better(stored),
    ]
    for row, data in stored:
        parts += [f"## {row.title} (`{row.name}`)", row.text, _figures(row, data)]
        if row.panels and plots and (plots / f"{row.name}.png").exists():
            parts += [f"![{row.title}](plots/{row.name}.png)"]
        if data["failures"]:
            failed = data["failures"].items()
            parts += ["\n".join(f"* {_label(row, p)}: {'; '.join(texts)}" for p, texts in failed)]
        parts += [_origin(data["run"], latest)]
    return "\n\n".join(parts) + "\n"


def _better(stored: list[tuple[Row, dict[str, Any]]]) -> str:
    """The figures in which a peer is better than Fiber by more than `NOTABLE`."""
    lines = []
    for row, data in stored:
        ours = data["values"].get("fiber", {})
        others = [peer for peer in data["values"] if peer not in ("fiber", FLOOR)]
        for metric in row.metrics:
            found = []
            for peer in others if metric.ratio else ():
                theirs = data["values"][peer].get(metric.key, [])
                times = costs(metric, theirs, ours.get(metric.key, []))
                if times and statistics.median(times) > 1 + NOTABLE:
                    factor = significant(statistics.median(times))
                    found.append(f"{_label(row, peer)} {factor} times")
            if found:
                lines.append(f"* `{row.name}`, {metric.title}: {', '.join(found)}")
    head = f"By more than {NOTABLE:.0%}, as the median over the rounds says:"
    return "\n".join([head, "", *lines]) if lines else f"Nowhere by more than {NOTABLE:.0%}."


def costs(metric: Metric, base: list[float | None], values: list[float | None]) -> list[float]:
    """How many times worse `values` are than `base`, for each round that has both."""
    pairs = [(a, b) for a, b in zip(base, values, strict=False) if a and b]
    return [a / b if metric.more_is_better else b / a for a, b in pairs]


def _origin(run: dict[str, Any], latest: dict[str, Any]) -> str:
    """One line on the run of a row: what differs from the run at the head of the report."""
    count = run["rounds"]
    text = f"{count} round{'s' if count > 1 else ''}, {run['date']}"
    text += "".join(
        f"; {run[key]}" for key in ("machine", "command", "python") if run[key] != latest[key]
    )
    older = {
        peer: number
        for peer, number in run["versions"].items()
        if latest["versions"].get(peer, number) != number
    }
    text += "".join(f"; {peer} {number}" for peer, number in older.items())
    if run["quick"]:
        text += "; **a quick run: it shows that the harness works, not how fast anything is**"
    return f"<sub>{text}</sub>"


def _figures(row: Row, data: dict[str, Any]) -> str:
    values = data["values"]
    shown = [m for m in row.metrics if any(m.key in columns for columns in values.values())]
    if row.tall:
        return table(_tall(row, shown, values) if len(values) > 1 else _by_case(row, values))
    header = ["peer"]
    for metric in shown:
        header += [f"{metric.title}, {metric.unit}" if metric.unit else metric.title]
        header += [heading for heading, _ in _ratios(row, metric)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for peer, columns in values.items():
        line = [_label(row, peer)]
        for metric in shown:
            figures = columns.get(metric.key, [])
            line += [figure(figures, metric)]
            for _, base in _ratios(row, metric):
                line += [_ratio(figures, values.get(base, {}).get(metric.key, []))]
        lines.append(line)
    return table(lines)


def _tall(row: Row, shown: list[Metric], values: dict[str, Any]) -> list[list[str]]:
    """The table with a line for each metric: the peers stand side by side."""
    ratios = {peer: peer != BASELINE and BASELINE in values for peer in values}
    header = ["figure"]
    for peer in values:
        header += [_label(row, peer), "x mp"] if ratios[peer] else [_label(row, peer)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for metric in shown:
        line = [f"{metric.title}, {metric.unit}" if metric.unit else metric.title]
        for peer, columns in values.items():
            figures = columns.get(metric.key, [])
            line += [figure(figures, metric)]
            if ratios[peer]:
                base = values[BASELINE].get(metric.key, [])
                line += [_ratio(figures, base) if metric.ratio else ""]
        lines.append(line)
    return lines


def _by_case(row: Row, values: dict[str, Any]) -> list[list[str]]:
    """The table of one peer alone: a line for each case."""
    ((peer, columns),) = values.items()
    metrics = row.cases[0].metrics
    header = [_label(row, peer), *(f"{m.title}, {m.unit}" if m.unit else m.title for m in metrics)]
    lines = [header, ["---"] + ["---:"] * len(metrics)]
    for case in row.cases:
        if any(metric.key in columns for metric in case.metrics):
            shown = [figure(columns.get(metric.key, []), metric) for metric in case.metrics]
            lines.append([case.title or case.name, *shown])
    return lines


def table(lines: list[list[str]]) -> str:
    """A table in Markdown; the second line is the one under the headings."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratios(row: Row, metric: Metric) -> list[tuple[str, str]]:
    """The headings of the ratios that follow a metric, and to whom they are."""
    ratios = [("x mp", BASELINE)] if metric.ratio else []
    return [*ratios, ("x floor", FLOOR)] if row.against_floor else ratios


def _label(row: Row, peer: str) -> str:
    if peer == FLOOR:
        return f"*{row.floor}*"
    return "multiprocessing (spawn)" if peer == "multiprocessing-spawn" else peer


def figure(values: list[float | None], metric: Metric) -> str:
    """The median, and the range if there is one."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if len(known) == 1:
        return _number(known[0], metric.unit)
    low, middle, high = (
        _number(value, metric.unit) for value in (min(known), statistics.median(known), max(known))
    )
    return f"{middle} ({low} to {high})" if low != high else middle


def _ratio(values: list[float | None], base: list[float | None]) -> str:
    ratios = [a / b for a, b in zip(values, base, strict=False) if a is not None and b]
    return significant(statistics.median(ratios)) if ratios else "-"


def _number(value: float, unit: str) -> str:
    if unit in COUNTED and value >= 1e6:
        return f"{significant(value / 1e6)}M"
    if unit in COUNTED and value >= 1e3:
        return f"{significant(value / 1e3)}k"
    return significant(value)


def significant(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.05, 36.8, 183, 10960; a count stays whole."""
    if value == int(value):
        return str(int(value))
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
