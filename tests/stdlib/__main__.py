"""Runs CPython's tests of multiprocessing against Fiber: python -m tests.stdlib [options] [NAME...]

NAMEs are test classes, or tests as CLASS.METHOD; all by default. With --write, which takes all, the
table of docs/multiprocessing.md is written anew.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.stdlib import page
from tests.stdlib.runner import SECONDS_OF_A_TEST, Interpreter, Outcome, newest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stdlib", description=__doc__)
    parser.add_argument("names", nargs="*", default=["*"], metavar="NAME")
    parser.add_argument("--minor", type=int, action="append", help="of the Python, such as 13")
    parser.add_argument("--seconds", type=float, default=SECONDS_OF_A_TEST, help="for a test")
    parser.add_argument("--write", action="store_true", help=f"write {page.PATH.name}")
    parser.add_argument("-v", "--verbose", action="store_true", help="name each test")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, Outcome]]] = {}
    for minor in options.minor or [sys.version_info.minor, newest()]:
        python = Interpreter.find(minor)
        if python is None:
            parser.error(f"there is no Python 3.{minor} with its tests on this machine")
        with tempfile.TemporaryDirectory(prefix="fs-") as folder:
            results[python.version] = run(python, options, Path(folder))
    if options.write:
        page.write(results)
    failed = [
        f"{version} {name}.{method}"
        for version, classes in results.items()
        for name, outcomes in classes.items()
        for method, outcome in outcomes.items()
        if outcome.state == "failed"
    ]
    print(f"{len(failed)} failed", *failed, sep="\n  ")
    return bool(failed)


def run(
    python: Interpreter, options: argparse.Namespace, folder: Path
) -> dict[str, dict[str, Outcome]]:
    results: dict[str, dict[str, Outcome]] = {}
    for name, methods in python.classes.items():
        wanted = [
            method
            for method in methods
            if any(
                fnmatch.fnmatchcase(text, pattern)
                for pattern in options.names
                for text in (name, f"{name}.{method}")
            )
        ]
        if wanted:
            results[name] = python.run(name, folder, wanted, options.seconds)
            report(python, name, results[name], options.verbose)
    return results


def report(python: Interpreter, name: str, outcomes: dict[str, Outcome], verbose: bool) -> None:
    counts = Counter(outcome.state for outcome in outcomes.values())
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(f"{python.version} {name}: {said} ({seconds:.0f} s)", flush=True)
    texts: dict[str, list[str]] = {}  # what failed alike is told once
    for method, outcome in outcomes.items():
        if verbose:
            print(f"    {outcome.state:8} {outcome.seconds:6.2f} s {method}")
        if outcome.state in ("failed", "skipped"):
            texts.setdefault(f"{outcome.state}: {outcome.text.strip()}", []).append(method)
    for text, methods in texts.items():
        print(f"    {', '.join(methods)} {text}".replace("\n", "\n        "))


if __name__ == "__main__":
    sys.exit(main())
