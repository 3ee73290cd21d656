"""A thousand workers on one machine: all take part, none is large, and half may die at once."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.pool import tasks

import fiber

WORKERS = 1024
VICTIMS = 500

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="its /proc and limits are needed")


def run(*words: object, seconds: float) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_thousand_workers(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4 * WORKERS:
        pytest.skip(f"this system allows a process no more than {hard} open files")
    program = Path(__file__).with_name("thousand.py")
    told = json.loads(run(program, WORKERS, VICTIMS, tmp_path / "gate", seconds=600))
    assert len(set(told["pids"])) == WORKERS
    assert told["took_part"] == told["pids"]
    memory = told["memory"]
    assert memory[-1] < 8 << 20, f"{memory[-1]} bytes; the median is {memory[WORKERS // 2]}"
    assert told["right"]
    assert told["died"] == VICTIMS
    assert (told["waiting"], told["running"], told["failed"]) == (0, 0, 0)
    assert told["done"] == 21 * WORKERS  # each once
    assert len(set(told["after"])) == WORKERS
    assert len(set(told["after"]) & set(told["pids"])) == WORKERS - VICTIMS


def test_a_pool_that_the_system_has_no_room_for_is_refused(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import resource
            import fiber

            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
            if __name__ == "__main__":
                try:
                    fiber.Pool(1000)
                except fiber.StartError as error:
                    print(error)
                with fiber.Pool((1, 100)) as pool:
                    print(sum(pool.map(abs, range(10))))
            """
        )
    )
    said = run(program, seconds=60)
    assert "1000 workers need 3128 open files, and this process may have 512" in said
    assert said.splitlines()[-1] == "45"


@pytest.mark.slow
def test_hundreds_of_processes_at_once() -> None:
    queue = fiber.SimpleQueue()
    go = fiber.Event()
    processes = [fiber.Process(target=tasks.meet, args=(i, go, queue)) for i in range(300)]
    for process in processes:
        process.start()
    go.set()
    assert sorted(queue.get() for _ in processes) == list(range(300))
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} == {0}
