"""The examples as a user runs them: each in a process of its own, small, and judged by its output.

Their runs repeat for a fixed seed, so the numbers asserted here are far from the edge and stay so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEADLINE = 90  # seconds for one example; each needs a few on an idle machine


def run(tmp_path: Path, name: str, *options: str, exit_code: int = 0) -> str:
    """Run an example in an empty folder and return what it printed."""
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{name} did not end within {DEADLINE} s: {process.communicate()[0]}")
    assert process.returncode == exit_code, output
    assert "Traceback" not in output
    return output


def number_after(label: str, output: str) -> float:
    """The number that follows this label in the output."""
    found = re.search(re.escape(label) + r"\s*([-+]?\d+(?:\.\d+)?)", output)
    assert found, f"no {label!r} in: {output}"
    return float(found.group(1))


@pytest.mark.timeout(DEADLINE + 20)
def test_evolution_learns_to_swing_up_and_draws_its_learning_curve(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "evolution.py",
        *("--generations", "12", "--population", "48", "--processes", "2", "--seed", "0"),
    )
    assert number_after("untrained", output) == -500
    assert number_after("learned", output) > -200
    assert number_after("Speed-up:", output) > 0
    progress = re.findall(r"^ +(\d+) +-\d+\.\d +-\d+\.\d +\d+\.\d$", output, re.MULTILINE)
    assert progress == [str(generation) for generation in range(1, 13)]

    png = (tmp_path / "evolution.png").read_bytes()
    assert str(tmp_path / "evolution.png") in output
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 800
    assert height >= 400
    assert 10_000 < len(png) < 1_000_000


@pytest.mark.timeout(DEADLINE + 20)
def test_evolution_says_so_when_it_has_not_learned(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "evolution.py",
        *("--env", "CartPole-v1", "--generations", "1", "--population", "2"),
        exit_code=1,
    )
    assert "CartPole-v1 was not learned" in output


@pytest.mark.timeout(DEADLINE + 20)
def test_evolution_repeats_itself_for_a_seed_whatever_the_number_of_workers(
    tmp_path: Path,
) -> None:
    options = ("--env", "CartPole-v1", "--generations", "4", "--population", "16", "--seed", "7")
    curves = []
    for processes in ("1", "3"):
        output = run(tmp_path, "evolution.py", *options, "--processes", processes, exit_code=1)
        curves.append(re.findall(r"^ +(\d+ +\S+ +\S+) +\S+$", output, re.MULTILINE))
    assert len(curves[0]) == 4
    assert curves[0] == curves[1]


@pytest.mark.timeout(DEADLINE + 20)
def test_pi_is_estimated_by_map_and_by_imap_unordered_alike(tmp_path: Path) -> None:
    output = run(tmp_path, "pi.py", "--points", "4000000", "--processes", "2")
    estimates = re.findall(r"^(?:map|imap_unordered) +pi ≈ (\S+)", output, re.MULTILINE)
    assert len(estimates) == 2
    assert estimates[0] == estimates[1]
    assert float(estimates[0]) == pytest.approx(3.14159, abs=0.004)
    assert "after 50%" in output


@pytest.mark.timeout(DEADLINE + 20)
def test_grid_search_finds_parameters_that_read_digits(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "grid_search.py",
        *("--c", "0.01", "10", "--gamma", "0.01", "1", "--folds", "3", "--processes", "2"),
    )
    assert "12 fits" in output
    assert "Best: C=10, gamma=0.01" in output
    assert number_after("Test accuracy:", output) > 0.95


@pytest.mark.timeout(DEADLINE + 20)
def test_mcmc_finds_the_orbit_and_the_pool_walks_the_same_chain(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        "mcmc.py",
        *("--steps", "300", "--observations", "400", "--processes", "2", "--seed", "0"),
    )
    off = re.findall(r"± (\d+\.\d+) +([-+]\d+\.\d) sd$", output, re.MULTILINE)
    assert len(off) == 6
    assert all(abs(float(sd)) < 4 for _, sd in off), output
    assert all(float(spread) < 1 for spread, _ in off), output
    assert "the same chain" in output
    assert number_after("Speed-up:", output) > 0


@pytest.mark.timeout(DEADLINE + 20)
@pytest.mark.parametrize("members", [1, 3])
def test_ring_average_gives_every_member_the_average(tmp_path: Path, members: int) -> None:
    output = run(
        tmp_path, "ring_average.py", "--processes", str(members), "--size", "200000", "--seed", "0"
    )
    rows = [line.split() for line in output.splitlines()[1:]]
    assert [row[0] for row in rows] == [str(rank) for rank in range(members)]
    before = [float(row[1]) for row in rows]
    assert before == pytest.approx(list(range(members)), abs=0.02)
    for row in rows:
        assert float(row[2]) == pytest.approx(sum(before) / members, abs=1e-3)
        assert float(row[3]) < 1e-9


@pytest.mark.timeout(DEADLINE + 20)
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_ring_torch_learns_the_same_on_any_number_of_members(tmp_path: Path) -> None:
    curves = []
    for members in ("1", "2"):
        output = run(tmp_path, "ring_torch.py", "--processes", members, "--epochs", "4")
        assert f"Every member of {members} has the same network" in output
        numbers = re.findall(r"loss (\d\.\d+) +test accuracy (\d\.\d+)", output)
        curves.append([float(number) for pair in numbers for number in pair])
    assert len(curves[0]) == 8
    assert curves[0][0] > 2 * curves[0][-2]
    assert curves[0][-1] > 0.9
    # Sums over members are rounded in another order.
    assert curves[1] == pytest.approx(curves[0], abs=0.01)
