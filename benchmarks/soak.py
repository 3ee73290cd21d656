"""`python -m benchmarks.soak [--minutes 30] [--workers 4] [--output FILE]`.

A long run under load, with workers that are killed at random: does anything grow, and is the shared
memory gone at the end?

    soak ── starts ──► load (see there) ──► its workers
      ▲ ◄── a line of JSON a step ──┘
      └──── /proc, /dev/shm: a sample every few seconds, from outside, so that nothing is disturbed

It writes a report with a picture beside it, and ends with exit code 1 if the verdict is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness, report
from benchmarks.measure import descendants

WARM_UP = 0.2  # of the time: caches and blocks fill, and the slope is not looked at
FLAT = 0.10  # growth, of the mean, in the time that is looked at, that is within what it varies
LEAST = 4.0  # MB that are always within that
PATIENCE = 180.0  # seconds after the load in which the program must have ended
MEMORY = Path("/dev/shm")
STEPS = {"load": "under load", "idle": "with no work", "closed": "with the pool closed"}


class Sample(NamedTuple):
    """The program at one moment; sizes in MB."""

    seconds: float
    step: str
    rss: float
    uss: float
    tree: float  # PSS of all its processes
    mapped: float  # of that, shared memory
    files: float  # what its files in /dev/shm take
    processes: int
    threads: int
    descriptors: int


def sample(pid: int, began: float, step: str) -> Sample | None:
    """Look at the program; None if it has just ended."""
    try:
        own = _sizes(pid)
        threads = len(os.listdir(f"/proc/{pid}/task"))
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, StopIteration):
        return None
    tree, mapped, count = own["Pss"], own["Pss_Shmem"], 1
    for other in descendants(pid):
        try:
            sizes = _sizes(other)
        except (OSError, StopIteration):
            continue  # it was killed since
        tree, mapped, count = tree + sizes["Pss"], mapped + sizes["Pss_Shmem"], count + 1
    private = own["Private_Clean"] + own["Private_Dirty"]
    seconds = time.monotonic() - began
    files = shared_files(pid)
    memory = (own["Rss"], private, tree, mapped, files)
    return Sample(seconds, step, *memory, count, threads, descriptors)


def _sizes(pid: int) -> dict[str, float]:
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        next(lines)
        fields = (line.split() for line in lines)
        return {key.rstrip(":"): int(size) / 1024 for key, size, *_ in fields}


def shared_files(pid: int) -> float:
    """MB that files in shared memory take which belong to the session of that master."""
    blocks = 0
    for folder in MEMORY.glob(f"fiber-*-{pid}-*"):
        for path in (folder, *folder.rglob("*")):
            try:
                blocks += path.lstat().st_blocks
            except OSError:
                continue
    return blocks * 512 / 2**20


def left_over(pid: int) -> list[str]:
    """What is left in shared memory and among temporary files of the session of that master."""
    places = (MEMORY, Path(os.environ.get("TMPDIR", "/tmp")))
    return [str(path) for place in places for path in place.glob(f"fiber-*-{pid}-*")]


def run(minutes: float, workers: int) -> dict[str, Any]:
    """Run the load to its end; return the samples, what was done, and what was left."""
    argv = [sys.executable, "-m", "benchmarks.load", str(60 * minutes), str(workers)]
    every = max(0.5, min(5.0, 60 * minutes / 100))
    began = time.monotonic()
    samples: list[Sample] = []
    done: dict[str, int] = {}
    step = "load"
    child = subprocess.Popen(
        argv, cwd=harness.ROOT, env=harness.environment(), stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        while True:
            if time.monotonic() - began > 60 * minutes + PATIENCE:
                return _outcome(samples, done, child.pid, f"not done {PATIENCE:g} s after the load")
            if select.select([child.stdout], [], [], every)[0]:
                line = child.stdout.readline()
                if not line:
                    break
                told = json.loads(line)
                step, done = told["step"], told["done"]
                if step == "load":
                    print(f"{time.monotonic() - began:.0f} s: {done}", file=sys.stderr, flush=True)
            seen = sample(child.pid, began, step)
            if seen is not None:
                samples.append(seen)
        code = child.wait(PATIENCE)
    finally:
        child.kill()
        child.wait()
    return _outcome(samples, done, child.pid, f"exit code {code}" if code else "")


def _outcome(samples: list[Sample], done: dict[str, int], pid: int, failure: str) -> dict[str, Any]:
    return {"samples": samples, "done": done, "left": left_over(pid), "failure": failure}


def trend(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """How far the straight line that fits best rises from the first to the last, and how sure."""
    line = statistics.linear_regression(xs, ys)
    rest = [y - line.intercept - line.slope * x for x, y in zip(xs, ys, strict=True)]
    return line.slope * (xs[-1] - xs[0]), statistics.pstdev(rest) * (12 / len(xs)) ** 0.5


class Growth(NamedTuple):
    """How a figure went while there was load."""

    title: str
    unit: str
    mean: float
    most: float
    hourly: float  # growth, an hour
    flat: bool


def growths(samples: list[Sample]) -> list[Growth]:
    """How each figure went, the warm-up left out."""
    load = [seen for seen in samples if seen.step == "load"]
    load = [seen for seen in load if seen.seconds >= WARM_UP * load[-1].seconds]
    if len(load) < 3:
        raise SystemExit("too few samples: let it run for longer (--minutes)")
    times = [seen.seconds for seen in load]
    found = []
    for key, title, unit, least in (
        ("uss", "master, private", "MB", LEAST),
        ("rss", "master, RSS", "MB", LEAST),
        ("tree", "all processes, PSS", "MB", 4 * LEAST),
        ("mapped", "shared memory that they map", "MB", 4 * LEAST),
        ("files", "files in /dev/shm", "MB", 4 * LEAST),
        ("threads", "threads of the master", "", 3.0),
        ("descriptors", "descriptors of the master", "", 8.0),
    ):
        values = [float(getattr(seen, key)) for seen in load]
        rise, error = trend(times, values)
        mean = statistics.mean(values)
        flat = rise < max(FLAT * mean, least) + 2 * error
        hourly = rise * 3600 / (times[-1] - times[0])
        found.append(Growth(title, unit, mean, max(values), hourly, flat))
    return found


def verdict(outcome: dict[str, Any], rows: list[Growth]) -> list[str]:
    """What is wrong; nothing, if all is well."""
    samples: list[Sample] = outcome["samples"]
    wrong = [f"the program failed: {outcome['failure']}"] if outcome["failure"] else []
    growing = [row for row in rows if not row.flat]
    wrong += [f"{row.title} grows by {row.hourly:.1f} {row.unit} an hour" for row in growing]
    if outcome["left"]:
        wrong.append(f"left behind: {', '.join(outcome['left'])}")
    closed = [seen for seen in samples if seen.step == "closed"]
    if closed and max(closed[-1].mapped, closed[-1].files) > 1.0:
        last = closed[-1]
        wrong.append(
            f"with the pool closed, {last.files:.1f} MB are in /dev/shm and {last.mapped:.1f} MB "
            "are mapped"
        )
    return wrong


def render(
    outcome: dict[str, Any], rows: list[Growth], wrong: list[str], about: dict[str, Any]
) -> str:
    """The report."""
    samples: list[Sample] = outcome["samples"]
    acts = ", ".join(f"{count:,} x {name}" for name, count in sorted(outcome["done"].items()))
    lines = [
        "# Soak",
        "",
        f"Written by `{about['command']}` on {about['date']}; {about['machine']}; Python",
        f"{platform.python_version()}. What runs is in `benchmarks/load.py`.",
        "",
        f"{about['minutes']:g} minutes of load on {about['workers']} workers: {acts}.",
        "The results were compared with what they should be. The first fifth of the time is left",
        "out of what follows.",
        "",
        "**Verdict: " + ("; ".join(wrong) if wrong else "flat, and nothing is left") + ".**",
        "",
        "| figure | mean | most | growth an hour | |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        unit = f", {row.unit}" if row.unit else ""
        end = "flat" if row.flat else "**grows**"
        figures = f"{row.mean:.1f} | {row.most:.1f} | {row.hourly:+.1f}"
        lines += [f"| {row.title}{unit} | {figures} | {end} |"]
    lines += [
        "",
        "| step | master, private, MB | mapped, MB | /dev/shm, MB | threads | descriptors |",
    ]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for step, title in STEPS.items():
        seen = [sample for sample in samples if sample.step == step]
        if seen:
            last = seen[-1]
            memory = f"{last.uss:.1f} | {last.mapped:.1f} | {last.files:.1f}"
            lines += [f"| {title} | {memory} | {last.threads} | {last.descriptors} |"]
    lines += [f"| the program has ended | - | - | {len(outcome['left'])} files | - | - |"]
    return "\n".join(lines) + "\n"


def draw(samples: list[Sample], path: Path) -> None:
    """Draw the samples."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.5))
    minutes = [seen.seconds / 60 for seen in samples]
    for key, label in (
        ("uss", "master, private"),
        ("tree", "all processes, PSS"),
        ("mapped", "shared memory mapped"),
        ("files", "files in /dev/shm"),
    ):
        axis.plot(minutes, [getattr(seen, key) for seen in samples], label=label, linewidth=1)
    axis.set_xlabel("minutes")
    axis.set_ylabel("MB")
    axis.set_ylim(bottom=0)
    axis.grid(True, alpha=0.2)
    axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=4)
    default = harness.ROOT / "benchmarks" / "SOAK.md"
    parser.add_argument("--output", type=Path, default=default, help="default benchmarks/SOAK.md")
    options = parser.parse_args(argv)
    about = {
        "command": " ".join(["python -m benchmarks.soak", f"--minutes {options.minutes:g}"]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": report.machine(),
        "minutes": options.minutes,
        "workers": options.workers,
    }
    outcome = run(options.minutes, options.workers)
    rows = growths(outcome["samples"])
    wrong = verdict(outcome, rows)
    text = render(outcome, rows, wrong, about)
    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = output.with_name("plots") / "soak.png"
    draw(outcome["samples"], picture)
    output.write_text(text + "\n![The soak](plots/soak.png)\n", encoding="utf-8")
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
