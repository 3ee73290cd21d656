"""What Slurm does to jobs while a program works: no result is lost, and the reason is told."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.backends.slurm_cluster import probe, slurm, until
from tests.elsewhere.sites import Program
from tests.elsewhere.slurm_sites import SLURM_SITES, Slurm, SlurmPool

CONF = os.environ.get("SLURM_CONF", "")
BASE = Path(CONF).parent.parent

MAP = """
import fiber, os, sys, time

SECONDS, WORKERS = float(sys.argv[1]), int(sys.argv[2])

def work(x):
    with open("ran", "a") as file:
        file.write(f"{x}\\n")
    time.sleep(SECONDS)
    if x == 5_000 and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), 9)
    return x * x

if __name__ == "__main__":
    with fiber.Pool(WORKERS) as pool:
        results = pool.imap(work, range(10_000))
        found = [next(results) for _ in range(20)]
        print("begun", flush=True)
        found += results
    assert found == [x * x for x in range(10_000)]
    print("all", flush=True)
"""


@pytest.fixture(params=["slurm", "slurm-pool"])
def site(
    request: pytest.FixtureRequest,
    engine: Callable[..., None],
    clean_environ: None,
    tmp_path: Path,
) -> Iterator[Slurm]:
    engine("slurm", probe)
    site = SLURM_SITES[request.param](tmp_path)
    yield site
    site.close()
    site.leaves_nothing()


def begin(site: Slurm, seconds: float = 0.002, workers: int = 3, **options: str) -> Program:
    program = site.start(MAP, str(seconds), str(workers), env=options)
    program.wait_for("begun")
    return program


def finish(program: Program, patience: float = 100) -> None:
    assert program.end(patience) == 0, program.all()
    assert program.lines == ["begun", "all"]
    assert "Traceback" not in program.err, program.err


def allocations(site: Slurm) -> list[str]:
    return [job for job in Slurm.jobs(site) if job]


def test_jobs_that_are_cancelled(site: Slurm) -> None:
    program = begin(site, 0.005)
    chance = random.Random(1)
    for _ in range(3):
        jobs = until(lambda: program.exit_code is not None or allocations(site), "a job")
        if jobs is True:
            break
        slurm("scancel", chance.choice(jobs))
        time.sleep(1)
    finish(program)
    assert "was cancelled (scancel, or an administrator)" in program.err


def test_a_worker_that_is_killed(site: Slurm) -> None:
    program = begin(site)
    finish(program)
    assert (site.folder / "killed").exists()


@pytest.fixture
def fail(site: Slurm) -> Iterator[Callable[[str], None]]:
    """Have a node fail: its daemon, and all that it has started, are killed; it comes back."""
    failed: list[str] = []

    def fail(name: str) -> None:
        failed.append(name)
        os.kill(int((BASE / f"run/slurmd.{name}.pid").read_text()), signal.SIGKILL)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("slurmstepd"):
                    family = process.children(recursive=True)
                    if any(_node_of(child) == name for child in family):
                        for member in [process, *family]:
                            member.kill()

    yield fail
    for name in failed:
        (BASE / f"run/slurmd.{name}.pid").unlink(missing_ok=True)
        null = subprocess.DEVNULL
        subprocess.run(
            ["slurmd", "-N", name, "-f", CONF],
            check=True,
            stdin=null,
            stdout=null,
            stderr=null,
            env={key: value for key, value in os.environ.items() if key != "TESTS_OF_FIBER"},
            start_new_session=True,
        )
        # Else Slurm takes up to two minutes until it asks again whether jobs have ended there that
        # were cancelled in its absence.
        change = ("scontrol", "update", f"NodeName={name}")
        slurm(*change, "State=DOWN", "Reason=test", check=False)
        slurm(*change, "State=RESUME", check=False)
        until(functools.partial(_is_back, name), f"{name} is back", patience=60)


def _node_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("SLURMD_NODENAME", "")
    return ""


def _is_back(node: str) -> bool:
    state = slurm("sinfo", "--noheader", f"--nodes={node}", "--format=%T").split()[0]
    return state in ("idle", "mixed", "allocated")


def _node(site: Slurm) -> str:
    """Return a node that a job of the test is on."""
    told = slurm("squeue", "--noheader", "--format=%N", f"--jobs={allocations(site)[0]}")
    return slurm("scontrol", "show", "hostnames", told.strip()).split()[0]


def test_a_node_that_fails(site: Slurm, fail: Callable[[str], None]) -> None:
    program = begin(site, 0.005)
    fail(_node(site))
    finish(program)


def test_a_node_that_is_drained(site: Slurm) -> None:
    program = begin(site)
    name = _node(site)
    slurm("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=test")
    try:
        slurm("scancel", allocations(site)[0])
        finish(program)
    finally:
        slurm("scontrol", "update", f"NodeName={name}", "State=RESUME")


LONG = """
import fiber, os, time

def work(x):
    while not os.path.exists("go"):
        time.sleep(0.05)
    return x

if __name__ == "__main__":
    with fiber.Pool(3) as pool:
        result = pool.map_async(work, range(3), chunksize=1)
        while min(pool.stats().ready, pool.stats().running) < 3:
            time.sleep(0.01)
        print("begun", flush=True)
        assert result.get() == [0, 1, 2]
        print("all", flush=True)
"""


def test_preempted_jobs_are_not_to_blame(site: Slurm) -> None:
    # A task that was charged with two of them would fail.
    program = site.start(LONG, env={"FIBER_RETRIES": "1"})
    program.wait_for("begun")
    for _ in range(2):
        before = set(site.jobs())
        assert len(before) == 3
        other = slurm("sbatch", "--parsable", "-phigh", "-n8", "-o/dev/null", "--wrap=sleep 1")
        program.wait_until(lambda: len(set(site.jobs()) - before) == 3, "three other jobs")  # noqa: B023
        slurm("scancel", other.strip(), check=False)
    (site.folder / "go").touch()
    finish(program)
    assert "was preempted by Slurm for a job of higher priority" in program.err


def test_a_controller_that_is_away(site: Slurm) -> None:
    program = begin(site, 0.004)
    controller = int((BASE / "run/slurmctld.pid").read_text())
    os.kill(controller, signal.SIGSTOP)
    began = time.monotonic()
    try:
        ran = site.folder / "ran"
        before = ran.stat().st_size
        until(lambda: ran.stat().st_size > before + 5_000, "work goes on", patience=15)
        assert program.exit_code is None, program.all()
        time.sleep(max(0.0, began + 30 - time.monotonic()))
    finally:
        os.kill(controller, signal.SIGCONT)
    finish(program)


EAT = """
import fiber

def work(x):
    if x == 5_000:
        block = bytearray(900 << 20)
        import time; time.sleep(30)
    return x

if __name__ == "__main__":
    with fiber.Pool(3) as pool:
        found = pool.map(work, range(10_000), return_exceptions=True)
    wrong = [value for x, value in enumerate(found) if value != x]
    assert len(wrong) == 1 and found.index(wrong[0]) == 5_000, wrong
    print(type(wrong[0]).__name__, wrong[0])
"""


def test_a_task_that_uses_too_much_memory_fails_alone(site: Slurm) -> None:
    program = site.run(EAT, quiet=False, patience=100, env={"FIBER_RETRIES": "0"})
    assert re.search(r"WorkerDied item 5000 of work", program.out), program.all()
    assert "OOMKilled: it used more memory than its limit of 400 MB" in program.out
    assert "@fiber.meta(memory=...)" in program.out


@pytest.mark.parametrize("site", ["slurm-pool"], indirect=True)
def test_of_workers_that_share_a_task_the_one_that_eats_is_killed(site: Slurm) -> None:
    settings = {"FIBER_RETRIES": "0", "FIBER_WORKERS_PER_JOB": "2"}
    program = site.run(EAT.replace("Pool(3)", "Pool(4)"), quiet=False, patience=100, env=settings)
    assert re.search(r"WorkerDied item 5000 of work", program.out), program.all()
    assert "was OOMKilled: it used more memory than its limit of 800 MB" in program.out
    assert "ended by SIGKILL" not in program.err, program.err


def test_workers_leave_before_their_time_is_up(site: Slurm) -> None:
    # Slurm sends the warning 30 seconds before the end of the minute, or somewhat earlier.
    program = site.start(MAP, "0.02", "4", env={"FIBER_SLURM_TIME": "1", "FIBER_RETRIES": "0"})
    (site.folder / "killed").touch()
    finish_late(program)
    ran = (site.folder / "ran").read_text().split()
    assert sorted(map(int, ran)) == list(range(10_000))  # each once: no worker was killed at one


def finish_late(program: Program) -> None:
    assert program.end(115) == 0, program.all()
    assert program.lines == ["begun", "all"], program.all()


REFUSED = """
import fiber

def work(x):
    pass

if __name__ == "__main__":
    for start in (lambda: fiber.Process(target=work, args=(1,)).start(), lambda: fiber.Pool(2)):
        try:
            start()
        except fiber.StartError as error:
            print(error)
        else:
            print("started")
"""


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"FIBER_CPU_PER_JOB": "3"}, "node configuration is not available"),
        ({"FIBER_MEM_PER_JOB": "9000"}, "Memory specification can not be satisfied"),
        ({"FIBER_SLURM_PARTITION": "nowhere"}, "Invalid partition name"),
        ({"FIBER_SLURM_CONSTRAINT": "fast"}, "Invalid feature specification"),
        ({"FIBER_SLURM_OPTIONS": "--ntasks=40"}, "it can never run (PartitionConfig)"),
    ],
)
def test_what_can_never_run_fails_at_once(
    site: Slurm, settings: dict[str, str], words: str
) -> None:
    if isinstance(site, SlurmPool) and "FIBER_SLURM_OPTIONS" in settings:
        pytest.skip("the number of tasks is Fiber's own there")
    program = site.run(REFUSED, env=settings, quiet=False)
    assert len(program.lines) == 2, program.all()
    for line in program.lines:
        assert words.lower() in line.lower(), program.all()
    assert "started" not in program.lines


HELD = """
import fiber
if __name__ == "__main__":
    process = fiber.Process(target=print, args=("ran",))
    process.start()
    process.join()
"""


def test_a_job_that_waits_says_what_for(site: Slurm) -> None:
    program = site.start(HELD, env={"FIBER_SLURM_OPTIONS": "--hold"})
    until(lambda: "JobHeldUser" in program.err, "the reason", patience=30)
    assert "`scontrol release` lets it go" in program.err
    (job,) = site._queue()
    slurm("scontrol", "release", job)
    assert program.end() == 0, program.all()
    assert program.lines == ["ran"]


def test_a_requeued_job_is_another(
    engine: Callable[..., None], clean_environ: None, tmp_path: Path
) -> None:
    engine("slurm", probe)
    site = Slurm(tmp_path)
    program = begin(site, 0.005, FIBER_SLURM_OPTIONS="--requeue")
    (site.folder / "killed").touch()
    job = allocations(site)[0]
    slurm("scontrol", "requeue", job)
    finish(program)
    site.leaves_nothing()
    assert "was put back into the queue by Slurm" in program.err


INSIDE = """
import fiber, os, time

if __name__ == "__main__":
    with fiber.Pool(3) as pool:
        result = pool.map_async(time.sleep, [600] * 6)
        pool.apply_async(print)
        process = fiber.Process(target=time.sleep, args=(600,))
        process.start()
        open("begun", "w").close()
        result.get()
"""


def test_a_master_whose_job_is_cancelled_leaves_nothing(
    engine: Callable[..., None], clean_environ: None, tmp_path: Path
) -> None:
    engine("slurm", probe)
    site = Slurm(tmp_path)
    (tmp_path / "inside.py").write_text(INSIDE)
    source = Path(__file__).resolve().parents[2] / "src"
    job = slurm(
        *("sbatch", "--parsable", "--ntasks=4", "--nodes=2", "--mem-per-cpu=400"),
        *("--job-name=fiber-master", f"--chdir={tmp_path}", "--output=master.log"),
        f"--wrap=PYTHONPATH={source} FIBER_SLURM_FOLDER={site.shared} exec {sys.executable} "
        "inside.py",
    ).strip()
    try:
        until((tmp_path / "begun").exists, "the master has begun")
        slurm("scancel", job)
        site.leaves_nothing(10)
    finally:
        slurm("scancel", job, check=False)
    log = (tmp_path / "master.log").read_text()
    assert "CANCELLED" in log
