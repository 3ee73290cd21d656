"""A main module that leaves a thread behind cannot be forked: each process gets its interpreter.

Everything must work there as it does elsewhere, only slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.process.programs import GUARDED, UNDER_THE_GUARD, well

Run = Callable[..., Any]

THREAD = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""


def fresh(source: str) -> str:
    return THREAD + source


@pytest.mark.parametrize("source", [GUARDED, UNDER_THE_GUARD], ids=["guarded", "all under guard"])
def test_the_same_program_works(source: str, run_script: Run) -> None:
    assert well(run_script(fresh(source)))


def test_each_process_is_an_interpreter_of_its_own(run_script: Run) -> None:
    done = run_script(
        fresh(
            """
import fiber
def child():
    # Its main module was loaded in it: the thread is there, as in no forked process.
    print(threading.active_count() > 1, __name__, flush=True)
if __name__ == "__main__":
    process = fiber.Process(target=child)
    process.start()
    process.join()
"""
        )
    )
    assert (done.stdout, done.stderr) == ("True __mp_main__\n", "")


def test_exit_codes_and_errors(run_script: Run) -> None:
    done = run_script(
        fresh(
            """
import fiber, os, sys, time

def fail():
    raise ValueError("no luck")

if __name__ == "__main__":
    codes = []
    for target, args in [
        (print, ("printed",)),
        (sys.exit, (7,)),
        (sys.exit, (None,)),
        (os._exit, (5,)),
        (os.abort, ()),
        (fail, ()),
    ]:
        process = fiber.Process(target=target, args=args, name="fresh one")
        process.start()
        pid = process.pid
        process.join()
        codes.append(process.exitcode)
    for end in ("terminate", "kill"):
        process = fiber.Process(target=time.sleep, args=(3600,))
        process.start()
        getattr(process, end)()
        process.join()
        codes.append(process.exitcode)
    print(codes)
"""
        )
    )
    assert done.stdout == "printed\n[0, 7, 0, 5, -6, 1, -15, -9]\n"
    assert "Process fresh one:\nTraceback" in done.stderr
    assert done.stderr.endswith("ValueError: no luck\n")


def test_pids_names_and_parents(run_script: Run) -> None:
    done = run_script(
        fresh(
            """
import fiber, os

def child(parent):
    me, above = fiber.current_process(), fiber.parent_process()
    assert me.name == "given" and me.pid == os.getpid() and me.daemon
    assert above.pid == parent and above.name == "MainProcess" and above.is_alive()
    os._exit(os.getpid() % 251)

if __name__ == "__main__":
    process = fiber.Process(target=child, args=(os.getpid(),), name="given", daemon=True)
    process.start()
    process.join()
    print(process.exitcode == process.pid % 251)
"""
        )
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_grandchildren_and_pools_within(run_script: Run) -> None:
    done = run_script(
        fresh(
            """
import fiber, sys

def square(number):
    return number * number

def descend(depth):
    if not depth:
        with fiber.Pool(1) as pool:
            print(pool.map(square, range(4)), flush=True)
        sys.exit(9)
    process = fiber.Process(target=descend, args=(depth - 1,))
    process.start()
    process.join()
    sys.exit(process.exitcode)

def in_worker(number):
    process = fiber.Process(target=sys.exit, args=(number,))
    process.start()
    process.join()
    return process.exitcode

if __name__ == "__main__":
    process = fiber.Process(target=descend, args=(2,))
    process.start()
    process.join()
    print(process.exitcode)
    with fiber.Pool(2) as pool:
        print(pool.map(in_worker, range(4)))
"""
        )
    )
    assert (done.stdout, done.stderr) == ("[0, 1, 4, 9]\n9\n[0, 1, 2, 3]\n", "")


def test_daemons_end_and_others_are_joined_at_exit(
    run_script: Run, tmp_path: Any, gone: Callable[[int], None]
) -> None:
    done = run_script(
        fresh(
            """
import fiber, os, time

def forever():
    open("pid.new", "w").write(str(os.getpid()))
    os.rename("pid.new", "pid")
    time.sleep(3600)

def slow():
    time.sleep(0.3)
    print("late")

if __name__ == "__main__":
    fiber.Process(target=forever, daemon=True).start()
    while not os.path.exists("pid"):
        time.sleep(0.01)
    fiber.Process(target=slow).start()
"""
        )
    )
    assert (done.stdout, done.stderr, done.returncode) == ("late\n", "", 0)
    gone(int((tmp_path / "pid").read_text()))


def test_nothing_outlives_a_killed_program(
    run_script: Run, tmp_path: Any, gone: Callable[[int], None]
) -> None:
    run_script(
        fresh(
            """
import fiber, os, time

def forever(name):
    open(name + ".new", "w").write(str(os.getpid()))
    os.rename(name + ".new", name)
    time.sleep(3600)

def parent():
    fiber.Process(target=forever, args=("grandchild",)).start()
    forever("child")

if __name__ == "__main__":
    fiber.Process(target=parent).start()
    while not (os.path.exists("child") and os.path.exists("grandchild")):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
"""
        ),
        timeout=20,
    )
    for name in ("child", "grandchild"):
        gone(int((tmp_path / name).read_text()))


def test_environment_folder_and_streams(run_script: Run, tmp_path: Any) -> None:
    (tmp_path / "elsewhere").mkdir()
    done = run_script(
        fresh(
            """
import fiber, os, sys

def child():
    print(os.environ["COLOUR"], os.environ["OMP_NUM_THREADS"], os.path.basename(os.getcwd()))
    print("to stderr", file=sys.stderr)

if __name__ == "__main__":
    os.environ.pop("OMP_NUM_THREADS", None)
    os.chdir("elsewhere")
    for colour in ("red", "blue"):
        os.environ["COLOUR"] = colour
        process = fiber.Process(target=fiber.meta(cpu=2)(child))
        process.start()
        process.join()
"""
        )
    )
    assert done.stdout == "red 2 elsewhere\nblue 2 elsewhere\n"
    assert done.stderr == "to stderr\n" * 2


def test_a_worker_s_death_is_told_with_its_last_words(run_script: Run) -> None:
    done = run_script(
        fresh(
            """
import fiber, os, sys

def die(number):
    if number == 2:
        print("farewell", file=sys.stderr, flush=True)
        os._exit(6)
    return number

if __name__ == "__main__":
    with fiber.Pool(2, retries=0) as pool:
        results = [pool.apply_async(die, (number,)) for number in range(4)]
        for result in results:
            try:
                print(result.get())
            except fiber.WorkerDied as error:
                print("WorkerDied", error.exitcode, "farewell" in error.stderr)
"""
        )
    )
    assert done.stdout == "0\n1\nWorkerDied 6 True\n3\n"
