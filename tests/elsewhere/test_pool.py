"""Pools whose workers run elsewhere."""

from __future__ import annotations

import re

from tests.elsewhere.sites import PROGRAMS, Site


def test_all_methods_work(site: Site) -> None:
    assert site.run(PROGRAMS / "pool_calls.py").lines == ["done"]


def test_a_task_that_fails_fails_alone_and_is_explained(site: Site) -> None:
    program = site.run(PROGRAMS / "pool_failures.py", quiet=False)
    assert re.search(
        r"^item 3 of leave ended its worker 3 times; the last one, FiberPoolWorker-\d+ "
        rf"\(process \d+ in {site.kind} \S+\) ended with exit code 7$",
        program.lines[0],
    ), program.all()
    assert program.lines[-1] == "done"
    assert set(program.err.splitlines()) == {"last words"}


UNGUARDED = """
import fiber, socket
offset = 40

def add(x):
    return x + offset

pool = fiber.Pool(2)
print(pool.map(add, range(3)))
with fiber.Pool(1) as other:
    print(other.apply(socket.gethostname) != socket.gethostname())
pool.terminate()
pool.join()
"""


def test_a_program_needs_no_guard(site: Site) -> None:
    assert site.run(UNGUARDED).lines == ["[40, 41, 42]", "True"]


PROJECT = {
    "study/__init__.py": "from .model import Model\n",
    "study/model.py": """
from . import numbers_of

class Model:
    def __init__(self, factor):
        self.factor = factor

    def run(self, x):
        return numbers_of.scale(self.factor, x)

def late(x):
    from .parts.more import double
    return double(x)
""",
    "study/numbers_of.py": "def scale(factor, x):\n    return factor * x\n",
    "study/parts/more.py": "from ..numbers_of import scale\ndef double(x): return scale(2, x)\n",
    "study/__main__.py": """
import sys
import fiber
from . import Model
from .model import late

def apart(x):
    return late(x), sys.argv[1]

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        print(pool.map(Model(3).run, range(3)), pool.map(late, range(3)), pool.map(apart, [5]))
""",
}
USER = """
import fiber
import helpers
from study import Model
from study.model import late

if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        print(pool.map(Model(3).run, range(3)), pool.map(late, range(3)))
        print(pool.map(helpers.half, [2]))
    process = fiber.Process(target=helpers.tell)
    process.start()
    process.join()
"""
HELPERS = """
def half(x): return x / 2

def tell(): print("told")
"""


def test_the_projects_own_packages_come_along(site: Site) -> None:
    program = site.run(USER, files={**PROJECT, "helpers.py": HELPERS})
    assert program.lines == ["[0, 3, 6] [0, 2, 4]", "[1.0]", "told"]


def test_a_package_is_run_as_a_program(site: Site) -> None:
    program = site.run("-m study", "word", files=PROJECT)
    assert program.lines == ["[0, 3, 6] [0, 2, 4] [(10, 'word')]"]


RESOURCES = """
import os, time
import fiber

def threads(_):
    return os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]

@fiber.meta(cpu=2, memory="{memory}")
def eat(megabytes):
    block = b"x" * (megabytes << 20)
    time.sleep(megabytes / 150)  # not all managers notice at once
    return threads(0)

if __name__ == "__main__":
    with fiber.Pool(1) as pool:
        print(pool.apply(threads, (0,)))
    with fiber.Pool(1) as pool:
        print(pool.map(eat, [1, 2]))
        (error,) = pool.map(eat, [600], return_exceptions=True)
        print(type(error).__name__, str(error).splitlines()[0])
"""


def test_what_a_function_needs_is_what_its_workers_have(site: Site) -> None:
    program = site.run(RESOURCES.replace("{memory}", "256Mi"), quiet=False)
    assert program.lines[:2] == ["('1', '1')", "[('2', '2'), ('2', '2')]"]
    assert program.lines[2].startswith("WorkerDied item 0 of eat"), program.lines[2]
    assert "OOMKilled" in program.lines[2]
    assert re.search(r"\b256 ?M", program.lines[2]), program.lines[2]
    assert "@fiber.meta(memory=...)" in program.lines[2]


TOGETHER = """
import os, socket, time
import fiber

def where(_):
    time.sleep(0.05)
    return socket.gethostname(), os.getpid()

if __name__ == "__main__":
    with fiber.Pool(3) as pool:
        while len(found := set(pool.map(where, range(12), chunksize=1))) < 3:
            pass
    print(len({host for host, _ in found}))
"""


def test_workers_share_a_job_where_they_may(site: Site) -> None:
    assert site.run(TOGETHER, env={"FIBER_WORKERS_PER_JOB": "2"}).lines == ["2"]


# A package of the master's that the image has not, as anybody has installed some.
LACKING = """
import fiber
import psutil

def count(_):
    return psutil.cpu_count()

if __name__ == "__main__":
    try:
        with fiber.Pool(2) as pool:
            print(pool.map(count, range(2)))
    except Exception as error:
        print(type(error).__name__)
        print(error)
"""


def test_what_the_image_lacks_is_told_in_a_table(site: Site) -> None:
    program = site.run(LACKING, quiet=False)
    told = program.out + program.err
    assert re.search(r"^psutil +[\d.]+ +missing$", told, re.M), told
    assert f"{site.image} does not have them so" in told
    assert "pip install psutil==" in told
    assert "ModuleNotFoundError: No module named 'psutil'" in told
    assert told.count("Traceback") <= 1, program.all()
    assert len(told.splitlines()) < 40, told


LARGE = """
import hashlib
import fiber

SIZE = 64 << 20

def turn(block):
    return block[::-1]

def make(byte):
    return bytes([byte]) * SIZE

def digest(block):
    return hashlib.sha256(block).hexdigest()

if __name__ == "__main__":
    block = bytes(range(256)) * (SIZE // 256)
    with fiber.Pool(2) as pool:
        assert pool.apply(digest, (block,)) == digest(block)
        assert pool.apply(turn, (block,)) == turn(block)
        assert [digest(found) for found in pool.imap(make, [1, 2])] == [
            digest(make(1)), digest(make(2))]
    print("done")
"""


def test_large_arguments_and_results(site: Site) -> None:
    assert site.run(LARGE, patience=100).lines == ["done"]


PRINTING = """
import sys
import fiber

def say(number):
    print("out", number, "x" * 300)
    print("err", number, "y" * 300, file=sys.stderr)
    sys.stdout.write("a line ")
    sys.stdout.write("in pieces\\n")
    return number

def unended():
    sys.stdout.write("no end of line")

if __name__ == "__main__":
    with fiber.Pool(3) as pool:
        pool.map(say, range(300))
        pool.close()
        pool.join()
    process = fiber.Process(target=unended)
    process.start()
    process.join()
"""


def test_what_workers_print_arrives_in_whole_lines(site: Site) -> None:
    program = site.run(PRINTING, quiet=False)
    out, err = program.lines, program.err.splitlines()
    assert sorted(out[:-1]) == sorted(
        [f"out {number} {'x' * 300}" for number in range(300)] + ["a line in pieces"] * 300
    )
    assert out[-1] == "no end of line"
    assert sorted(err) == sorted(f"err {number} {'y' * 300}" for number in range(300))


NESTED = """
import socket
import fiber

def square(x):
    return x * x, socket.gethostname()

def sums(n):
    with fiber.Pool(2) as pool:
        found = pool.map(square, range(n))
    return sum(x for x, _ in found), {place for _, place in found} | {socket.gethostname()}

if __name__ == "__main__":
    process = None
    with fiber.Pool(1) as pool:
        total, places = pool.apply(sums, (10,))
    print(total, socket.gethostname() in places)
"""


def test_a_pool_in_a_worker_of_a_pool(site: Site) -> None:
    assert site.run(NESTED).lines == ["285 False"]


# Whoever imports a library with threads of its own cannot be forked.
THREADED = """
import os, threading, time
import fiber

threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

def threads(x):
    import helpers
    return helpers.half(x), os.environ["OMP_NUM_THREADS"]

def tell(queue, text):
    print("printed")
    queue.put(text)

if __name__ == "__main__":
    import helpers
    with fiber.Pool(2) as pool:
        print(pool.map(threads, [2, 4]), pool.map(helpers.half, [6]))
    queue = fiber.Queue()
    process = fiber.Process(target=tell, args=(queue, "told"))
    process.start()
    print(queue.get())
    process.join()
"""


def test_a_main_module_that_starts_threads(site: Site) -> None:
    program = site.run(THREADED, files={"helpers.py": HELPERS})
    assert program.lines[0] == "[(1.0, '1'), (2.0, '1')] [3.0]"
    assert sorted(program.lines[1:]) == ["printed", "told"]
