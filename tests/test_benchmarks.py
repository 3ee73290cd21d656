"""The benchmark harness, run as its users run it, in tiny runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from benchmarks.rows import ROWS

ROOT = Path(__file__).resolve().parent.parent
FEW = {
    "empty": "Empty tasks",
    "stream": "A stream of empty tasks",
    "apply": "Round trip",
    "sleep": "The sleep test of the Fiber paper",
    "first": "First result",
    "import": "Import",
    "memory": "Memory",
    "cpu": "Processor time of the master",
}
SHARED = {
    "queue": "Small messages through a queue",
    "queue-large": "Large messages through a queue",
    "pipe": "Pipe",
    "lock": "Lock",
    "manager": "Manager",
    "value": "Value",
}
LARGE = {
    "large-arguments": "Large arguments",
    "large-results": "Large results",
    "constant": "One large array for many tasks",
}
MANY = {
    "thousand": "A thousand workers",
    "sleep-64": "The sleep test with 64 workers",
    "sleep-1024": "The sleep test with 1,024 workers",
    "evolution": "Evolution strategies as in the Fiber paper",
}
SIMULATED = {"simulation": "Ten thousand simulated workers"}
DRAWN = {"sleep", "sleep-64", "sleep-1024", "evolution", "simulation"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def run(
    command: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=90,
    )


def benchmark(
    output: Path, *arguments: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the harness to its end, which it must reach within a minute and a half."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(output), *arguments]
    environment = dict(os.environ)
    if path is not None:
        paths = (str(path), environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = run(command, environment)
    assert done.returncode == 0, done.stderr
    return done


def results(output: Path) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(output.with_name("results.json").read_text())["rows"]
    return rows


@linux
@pytest.mark.parametrize(
    ("titles", "peers"),
    [
        (FEW, ("multiprocessing", "fiber")),
        (SHARED, ("multiprocessing", "fiber")),
        (LARGE, ("multiprocessing", "fiber", "joblib")),
        (MANY, ("multiprocessing", "fiber")),
        (SIMULATED, ("fiber",)),
    ],
    ids=["few", "shared", "large", "many", "simulated"],
)
def test_a_quick_run_reports_its_rows(
    tmp_path: Path, titles: dict[str, str], peers: tuple[str, ...]
) -> None:
    output = tmp_path / "RESULTS.md"
    done = benchmark(output, *titles, "--peers", *peers)
    report = output.read_text()
    rows = results(output)
    assert list(rows) == list(titles)
    for name, title in titles.items():
        assert f"## {title} (`{name}`)" in report
        assert not rows[name]["failures"], done.stderr
        for peer in peers:
            if peer == "joblib" and name not in LARGE:
                continue
            assert rows[name]["values"][peer]
            for metric, values in rows[name]["values"][peer].items():
                assert len(values) == 1, (name, peer, metric)
                if metric == "up" and peer != "fiber":
                    assert values == [None]  # who does not tell
                    continue
                # A close may take no time, and an import less than the noise of a start; and what
                # is counted in ticks of the clock may be none.
                may_be_none = name in ("first", "import") or metric.endswith(("cpu", "crowd"))
                assert values[0] > 0 or may_be_none, (name, peer, metric)
        drawn = (tmp_path / "plots" / f"{name}.png").exists()
        assert drawn == (name in DRAWN)
        assert drawn == (f"(plots/{name}.png)" in report)


def test_every_row_is_run_here() -> None:
    assert {*FEW, *SHARED, *LARGE, *MANY, *SIMULATED} == set(ROWS)


@linux
def test_a_row_is_measured_against_an_older_commit(tmp_path: Path) -> None:
    output = tmp_path / "AGAINST.md"
    command = [sys.executable, "-m", "benchmarks.against", "HEAD", "apply", "memory"]
    done = run([*command, "--quick", "--rounds", "2", "--output", str(output)])
    assert done.returncode == 0, done.stderr
    lines = [line for line in output.read_text().splitlines() if line.startswith("| `")]
    assert sum(line.startswith("| `apply` | median, µs |") for line in lines) == 1
    assert sum(line.startswith("| `memory` | master, private, MB |") for line in lines) == 1
    for line in lines:
        before, now, ratio = line.split(" | ")[2:5]
        assert "-" not in (before, now), line
        assert float(ratio) > 0


def test_a_commit_that_is_not_there_is_refused() -> None:
    done = run([sys.executable, "-m", "benchmarks.against", "no-such-commit", "apply"])
    assert done.returncode != 0
    assert "no-such-commit" in done.stderr


@linux
def test_a_short_soak_comes_to_an_end_with_right_results_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "SOAK.md"
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.15", "--workers", "2"]
    done = run([*command, "--output", str(output)])
    report = output.read_text()
    # In seconds everything grows; but nothing may fail, and nothing may stay.
    for wrong in ("the program failed", "left behind", "with the pool closed, "):
        assert wrong not in report.partition("Verdict")[2].partition("\n")[0], done.stderr
    assert "| the program has ended | - | - | 0 files |" in report
    assert (tmp_path / "plots" / "soak.png").exists()


def test_a_rerun_keeps_other_rows_and_what_was_written_by_hand(tmp_path: Path) -> None:
    output = tmp_path / "new" / "RESULTS.md"
    benchmark(output, "apply", "--peers", "multiprocessing")
    before = results(output)["apply"]
    text = output.read_text()
    begin = text.index("<!-- written by hand")
    head, body = text[:begin], text[begin:]
    line, _, rest = body.partition("\n")
    output.write_text(f"{head}{line}\n\nA remark of mine.\n\n{rest[rest.index('<!-- to here') :]}")

    benchmark(output, "import", "--rounds", "2", "--peers", "multiprocessing")
    report = output.read_text()
    assert report.count("A remark of mine.") == 1
    assert "## Round trip (`apply`)" in report
    assert "## Import (`import`)" in report
    assert results(output)["apply"] == before
    assert len(results(output)["import"]["values"]["multiprocessing"]["import"]) == 2


def test_a_peer_that_hangs_costs_its_own_figures_only(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(
        textwrap.dedent(
            """
            import signal
            from benchmarks.peers import Multiprocessing

            class Stuck(Multiprocessing):
                def apply(self, func, argument):
                    while True:
                        signal.pause()
            """
        )
    )
    output = tmp_path / "RESULTS.md"
    peers = ("--peers", "stuck:Stuck", "multiprocessing")
    benchmark(output, "apply", *peers, "--rounds", "2", "--deadline", "3", path=tmp_path)
    row = results(output)["apply"]
    assert row["values"]["stuck:Stuck"]["median"] == [None, None]
    assert all(value > 0 for value in row["values"]["multiprocessing"]["median"])
    assert "not done after 3 s" in output.read_text()


def test_a_row_of_shared_objects_leaves_out_peers_that_have_none(tmp_path: Path) -> None:
    output = tmp_path / "RESULTS.md"
    benchmark(output, "value", "--peers", "multiprocessing", "concurrent.futures")
    row = results(output)["value"]
    assert list(row["values"]) == ["multiprocessing"]
    assert not row["failures"]


def test_messages_that_arrive_changed_give_no_figure(tmp_path: Path) -> None:
    (tmp_path / "careless.py").write_text(
        textwrap.dedent(
            """
            from types import SimpleNamespace
            from benchmarks.peers import Multiprocessing

            class Careless(Multiprocessing):
                @classmethod
                def context(cls):
                    context = super().context()

                    def queue():
                        made = context.Queue()
                        get = made.get
                        made.get = lambda: (get() is not None and bytes(1_000_000)) or None
                        return made

                    return SimpleNamespace(Queue=queue, Pipe=context.Pipe, Process=context.Process)
            """
        )
    )
    output = tmp_path / "RESULTS.md"
    peers = ("--peers", "careless:Careless", "multiprocessing")
    benchmark(output, "queue-large", *peers, "--deadline", "30", path=tmp_path)
    row = results(output)["queue-large"]
    failures = row["failures"]["careless:Careless"]
    for case in ("bytes-to-main", "bytes-to-child", "array-to-main", "array-to-child"):
        assert row["values"]["careless:Careless"][case] == [None]
        assert row["values"]["multiprocessing"][case][0] > 0
        assert f"{case}: exit code 1. RuntimeError: a message is not what was sent" in failures


def test_an_unknown_row_or_peer_is_refused_with_what_there_is(tmp_path: Path) -> None:
    for arguments in (["no-such-row"], ["apply", "--peers", "no-such-peer"]):
        output = tmp_path / "RESULTS.md"
        done = run([sys.executable, "-m", "benchmarks", "--output", str(output), *arguments])
        assert done.returncode == 2
        assert "no-such" in done.stderr
        assert "there are" in done.stderr
        assert not output.exists()
