"""`python -m benchmarks [ROW ...] [--peers ...] [--rounds N] [--quick] [--output FILE]`.

Run it from the root of the repository, on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import about, harness, plots, report
from benchmarks.peers import PEERS
from benchmarks.rows import ROWS


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time Fiber and its peers in turn and write the report.",
        epilog="rows: " + ", ".join(f"{row.name} ({row.title.lower()})" for row in ROWS.values()),
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to measure (default: all)")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=list(PEERS),
        metavar="PEER",
        help=f"default: those installed of {', '.join(PEERS)}; MODULE:CLASS is your own adapter",
    )
    parser.add_argument("--rounds", type=int, help="rounds (default 5, with --quick 1)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny runs that show that the harness works; only printed unless --output is given",
    )
    parser.add_argument(
        "--deadline", type=float, default=90.0, help="seconds for one measurement (default 90)"
    )
    parser.add_argument("--output", type=Path, help="the report (default benchmarks/RESULTS.md)")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if unknown := [name for name in options.peers if ":" not in name and name not in PEERS]:
        parser.error(f"no peer {', '.join(unknown)}; there are {', '.join(PEERS)}, MODULE:CLASS")

    sys.path.insert(0, str(harness.ROOT / "src"))  # as the children see it
    peers = [peer for peer in dict.fromkeys(options.peers) if about.installed(peer)]
    rounds = options.rounds or (1 if options.quick else 5)
    settings = harness.Settings(max(1, rounds), options.quick, options.deadline)
    output: Path | None = options.output
    if output is None and not options.quick:
        output = harness.ROOT / "benchmarks" / "RESULTS.md"

    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    run = about.describe(peers, settings, argv)
    stored = report.load(report.store_path(output)) if output else {}
    if not options.quick:
        harness.warm_up(peers, settings)
    for name in options.rows or ROWS:
        stored[name] = report.entry(harness.run(ROWS[name], peers, settings, about.say), run)
        if output:  # after each row: what an interrupted run has measured is not lost
            report.save(report.store_path(output), stored)
            plots.draw(ROWS[name], stored[name], output.with_name("plots"))
            report.write(output, stored)
    print(f"wrote {output}" if output else report.render(stored))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
