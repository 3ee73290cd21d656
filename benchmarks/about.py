"""What is said of a run: the machine, the versions, the command; and what goes on meanwhile."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Any

from benchmarks import harness, report

# Where a peer's module, and its version, is found; those of the standard library need no entry.
DISTRIBUTIONS = {
    "fiber": "fiber",
    "loky": "loky",
    "joblib": "joblib",
    "ray": "ray",
    "dask": "distributed",
}


def installed(peer: str) -> bool:
    """Whether a peer is here; if not, that is said."""
    name = DISTRIBUTIONS.get(peer)
    if name is None or find_spec(name) is not None:
        return True
    say(f"skipped {peer}: not installed (pip install {name})")
    return False


def describe(
    peers: list[str], settings: harness.Settings, argv: list[str], module: str = "benchmarks"
) -> dict[str, Any]:
    """The run, as it is stored with each of its rows."""
    load = f"{os.getloadavg()[0]:.2f}"
    # The place of the output says nothing about the figures.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output")
    _, said = parser.parse_known_args(argv)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", module, *said]),
        "machine": report.machine(),
        "load": load,
        "python": platform.python_version(),
        "versions": {
            peer: report.version(DISTRIBUTIONS[peer]) for peer in peers if peer in DISTRIBUTIONS
        },
        "rounds": settings.rounds,
        "quick": settings.quick,
    }


def say(text: str) -> None:
    """Tell who waits for the run."""
    print(text, file=sys.stderr, flush=True)
