"""What only pods have: nodes, and resources that a cluster gives or refuses."""

from __future__ import annotations

import os

import pytest
from tests.elsewhere.kubernetes_sites import Kubernetes

pytestmark = pytest.mark.parametrize("site", ["kubernetes"], indirect=True)

SPREAD = """
import socket, time
import fiber

def where(_):
    time.sleep(0.05)
    return socket.gethostname()

if __name__ == "__main__":
    with fiber.Pool(4) as pool:
        while len(places := set(pool.map(where, range(16), chunksize=1))) < 4:
            pass
        print("there", flush=True)
        open("wait").read()
        print(sum(pool.map(abs, range(100))))
"""


def test_pods_are_on_several_nodes(site: Kubernetes) -> None:
    os.mkfifo(site.folder / "wait")
    program = site.start(SPREAD)
    program.wait_for("there")
    nodes = {pod.spec.node_name for pod in site.pods()}
    (site.folder / "wait").write_text("")
    assert len(nodes) > 1
    assert program.end() == 0, program.all()
    assert program.lines == ["there", "4950"]


NEEDS = """
import fiber

@fiber.meta(cpu=1, memory="96Mi")
def small(told, release):
    told.put("there")
    release.wait()

@fiber.meta(cpu=1, memory="128Mi", gpu=2)
def accelerated():
    pass

@fiber.meta(memory="64Mi")
def hungry():
    block = b"x" * (500 << 20)

if __name__ == "__main__":
    told, release = fiber.SimpleQueue(), fiber.Event()
    process = fiber.Process(target=small, args=(told, release))
    process.start()
    print(told.get(), flush=True)
    try:
        fiber.Process(target=accelerated).start()
    except fiber.StartError as error:
        print(error, flush=True)
    release.set()
    process.join()

    process = fiber.Process(target=hungry)
    process.start()
    process.join()
    print(process.exitcode)
"""


def test_a_process_asks_for_what_its_function_needs(site: Kubernetes) -> None:
    program = site.start(NEEDS, env={"FIBER_QUEUE_TIMEOUT": "15"})
    program.wait_for("there")

    def asked() -> list[dict[str, dict[str, str]]]:
        found = [pod.spec.containers[0].resources for pod in site.pods()]
        return [{"requests": one.requests, "limits": one.limits} for one in found]

    small = {"cpu": "1", "memory": "96Mi"}
    accelerated = {"cpu": "1", "memory": "128Mi", "nvidia.com/gpu": "2"}
    wanted = [{"requests": one, "limits": one} for one in (small, accelerated)]
    program.wait_until(lambda: len(site.pods()) == 2, "both pods")
    found = asked()
    assert sorted(found, key=str) == sorted(wanted, key=str)

    assert program.end() == 0, program.all()
    _, refused, code = program.lines
    assert "queue_timeout" in refused
    assert "insufficient nvidia.com/gpu" in refused
    assert "asks 2" in refused
    assert code == "-9"
    told = [line for line in program.err.splitlines() if "OOMKilled" in line]
    assert len(told) == 1, program.all()
    (killed,) = told
    assert "64 M" in killed or "64Mi" in killed
    assert "@fiber.meta(memory=" in killed


CROWDED = """
import time
import fiber

@fiber.meta(cpu=2)
def square(x):
    return x * x

if __name__ == "__main__":
    with fiber.Pool(12) as pool:
        print(pool.map(square, range(20)) == [x * x for x in range(20)])
        begin = time.monotonic()
    took = time.monotonic() - begin
    print("left" if took < 8 else took)
    with fiber.Pool(12) as pool:
        print(pool.map(square, range(20)) == [x * x for x in range(20)])
        pool.close()
        pool.join()
    print("joined")
"""


def test_a_pool_does_not_wait_for_pods_that_find_no_room(site: Kubernetes) -> None:
    program = site.run(CROWDED, quiet=False)
    assert program.lines == ["True", "left", "True", "joined"]
    assert "insufficient cpu" in program.err
