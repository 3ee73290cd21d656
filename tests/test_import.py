"""Importing fiber is cheap, for every process of a session pays for it.

How many milliseconds it takes is the row `import` of the benchmarks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"docker", "google", "kubernetes", "matplotlib", "numpy", "pandas", "rich", "torch"}
# Of the standard library: what takes milliseconds, and is loaded when it is needed.
SLOW = {
    *("asyncio", "concurrent", "dataclasses", "email", "hashlib", "http", "inspect", "json"),
    *("logging", "random", "shutil", "ssl", "subprocess", "tempfile", "urllib", "uuid", "zipfile"),
}


def run(code: str, pycache: Path) -> str:
    # With compiled files, as an installed package has them, whatever this machine's settings are.
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environ, "PYTHONPYCACHEPREFIX": str(pycache)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def test_import_brings_in_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import fiber\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    assert not (HEAVY | SLOW) & set(run(code, tmp_path).split())


@pytest.mark.parametrize("statement", ["import fiber", "from fiber import *"])
def test_import_starts_nothing_and_says_nothing(statement: str, tmp_path: Path) -> None:
    code = f"{statement}\nimport threading, os; print(threading.active_count(), os.listdir('.'))"
    assert run(f"import os; os.chdir({str(tmp_path)!r})\n{code}", tmp_path / "c") == "1 ['c']\n"
