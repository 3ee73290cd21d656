"""Runs the measurements of a row: rounds, in each all cases, in each case the peers in turn.

    for each round, case, peer:   child process ──► file of JSON lines ──► `Result`

Peers take turns because a machine's speed drifts: figures of one round are neighbours in time, so
their ratios hold even where the figures do not. A child that misses its deadline is killed with its
process group, and its peer sits out the remaining rounds of that case.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers import BEFORE, SPECIAL
from benchmarks.rows import FLOOR, Case, Row

ROOT = Path(__file__).resolve().parent.parent
QUICK_SECONDS = 0.05

# Figures of one row: peer -> metric -> one value a round, None where it is missing.
Values = dict[str, dict[str, list[float | None]]]


@dataclass
class Result:
    """What a row gave."""

    values: Values = field(default_factory=dict)
    failures: dict[str, list[str]] = field(default_factory=dict)  # peer -> what happened


@dataclass(frozen=True)
class Settings:
    """How to run: the same for all rows of a run."""

    rounds: int
    quick: bool
    deadline: float  # seconds for one measurement; rows that are known to take longer have more
    sources: Mapping[str, Path] = field(default_factory=dict)  # of Fiber, if not that of this tree

    def spend(self, row: Row) -> tuple[float, float]:
        """The seconds that a measurement of `row` is told to spend, and those that it may take."""
        seconds = QUICK_SECONDS if self.quick else row.seconds
        return seconds, self.deadline if self.quick else max(self.deadline, row.deadline or 0.0)


def peers_of(row: Row, case: Case, peers: Iterable[str]) -> list[str]:
    """Those of `peers` that are measured in a case of the row, with its floor."""
    only = case.peers or row.peers

    def belongs(peer: str) -> bool:
        peer = "fiber" if peer == BEFORE else peer
        if ":" in peer:
            return True
        if only:
            return peer in only
        return peer not in SPECIAL or (row.starts and peer == "multiprocessing-spawn")

    chosen = [peer for peer in peers if belongs(peer)]
    return [*chosen, FLOOR] if row.floor else chosen


def warm_up(peers: Iterable[str], settings: Settings) -> None:
    """Start and close a pool of each peer once, so that no peer pays for a cold disk."""
    for peer in peers:
        measure("first", "first", peer, 1.0, settings.deadline, settings.sources.get(peer))


def run(row: Row, peers: Iterable[str], settings: Settings, say: Callable[[str], None]) -> Result:
    """Measure a row; `say` is told of each measurement."""
    result = Result()
    out: set[tuple[str, str]] = set()
    seconds, deadline = settings.spend(row)
    for turn in range(settings.rounds):
        for case in row.cases:
            if settings.quick and not case.quick:
                continue
            order = peers_of(row, case, peers)
            # To and fro: who comes first finds the machine as the peer before has left it.
            for peer in reversed(order) if turn % 2 else order:
                columns = result.values.setdefault(peer, {})
                figures: dict[str, float] = {}
                if (case.name, peer) not in out:
                    source = settings.sources.get(peer)
                    figures, failure = measure(row.name, case.name, peer, seconds, deadline, source)
                    if failure:
                        out.add((case.name, peer))
                        result.failures.setdefault(peer, []).append(f"{case.name}: {failure}")
                    figures_said = ", ".join(f"{key} {value:.6g}" for key, value in figures.items())
                    said = "; ".join(filter(None, (figures_said, failure)))
                    say(f"{row.name}, round {turn + 1} of {settings.rounds}, {peer}: {said}")
                for metric in case.metrics:
                    columns.setdefault(metric.key, []).append(figures.get(metric.key))
    return result


def measure(
    row: str, case: str, peer: str, seconds: float, deadline: float, source: Path | None = None
) -> tuple[dict[str, float], str | None]:
    """Run one child; return its figures and, if it failed, one line that says how."""
    with tempfile.TemporaryDirectory(prefix="fiber-benchmark-") as folder:
        figures, errors = Path(folder, "figures"), Path(folder, "errors")
        figures.touch()
        script = str(ROOT / "benchmarks" / "child.py")
        argv = [sys.executable, script, row, case, peer, str(seconds), str(figures)]
        # Files and not pipes: a worker that outlives its master would keep a pipe open.
        with errors.open("wb") as stderr:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=environment(source),
                start_new_session=True,
            )
            try:
                code = child.wait(deadline)
                failure = None if code == 0 else f"{_ending(code)} {_last_line(errors)}".strip()
            except subprocess.TimeoutExpired:
                failure = f"not done after {deadline:g} s, killed. {_last_line(errors)}"
                failure = failure.removesuffix(". ")
            finally:
                if child.returncode is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        lines = [json.loads(line) for line in figures.read_text().splitlines()]
        return {line["metric"]: line["value"] for line in lines}, failure


def environment(source: Path | None = None) -> dict[str, str]:
    """The environment of a child: it finds this package, and Fiber in a source tree."""
    paths = [str(ROOT), str(source or ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _ending(code: int) -> str:
    return f"killed by signal {-code}." if code < 0 else f"exit code {code}."


def _last_line(path: Path) -> str:
    """The last line of an output: of a traceback, the one that says what happened."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "")
