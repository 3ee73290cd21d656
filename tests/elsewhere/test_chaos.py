"""Engines that fail in the midst of the work: what is there once is there once, in order."""

from __future__ import annotations

import re
import time

import pytest
from tests.backends import kubernetes_cluster as cluster
from tests.elsewhere.kubernetes_sites import InPod, Kubernetes, PodProgram
from tests.elsewhere.sites import Site, until

on_pods = pytest.mark.parametrize("site", ["kubernetes"], indirect=True)

AGAIN = """
import socket
import fiber

def work(told, release):
    told.put(socket.gethostname())
    release.wait()
    return "done"

if __name__ == "__main__":
    told, release = fiber.SimpleQueue(), fiber.Event()
    with fiber.Pool(1, retries=1) as pool:
        result = pool.apply_async(work, (told, release))
        for _ in range(4):
            print(told.get(), flush=True)
        release.set()
        print(result.get())
"""


@pytest.mark.parametrize("site", ["docker", "kubernetes"], indirect=True)
def test_no_attempt_is_charged_for_what_somebody_took_away(site: Site) -> None:
    program = site.start(AGAIN)
    for number in range(3):  # one attempt more would be allowed
        program.wait_until(lambda n=number: len(program.lines) > n, f"attempt {number}")
        site.remove(program.lines[number])  # it is called as its host
        program.wait_until(lambda n=number: len(program.lines) > n + 1, f"attempt {number + 1}")
    assert program.end() == 0, program.all()
    assert len(set(program.lines[:4])) == 4
    assert program.lines[4] == "done"


# Slow enough that what goes wrong does so in the midst of it.
MAP = """
import socket, time
import fiber

def work(x):
    time.sleep(0.01)
    return x * x

def where(_):
    time.sleep(0.05)
    return socket.gethostname()

if __name__ == "__main__":
    with fiber.Pool(6) as pool:
        places = set()
        while len(places) < 6:
            places.update(pool.map(where, range(24), chunksize=1))
        print("places", *places, flush=True)
        found = []
        for result in pool.imap(work, range(10_000)):
            found.append(result)
            if len(found) % 100 == 0:
                print("results", len(found), flush=True)
        assert found == [x * x for x in range(10_000)]
        print("all", flush=True)
        # All workers are there again.
        deadline = time.monotonic() + 150
        while len(places := set(pool.map(where, range(24), chunksize=1))) < 6:
            assert time.monotonic() < deadline, places
        print("places", *places, flush=True)
"""


@on_pods
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_goes_away_costs_no_result(site: Kubernetes) -> None:
    program = site.start(MAP, env={"FIBER_LOG_LEVEL": "info"})
    program.wait_for("results 100")
    gone = {pod.metadata.name for pod in site.pods() if pod.spec.node_name == "node-2"}
    assert gone
    with cluster.without_node(2):
        assert program.end(200) == 0, program.all()
        site.leaves_nothing()
    assert "all" in program.lines
    begin, end = (set(line.split()[1:]) for line in program.lines if line.startswith("places"))
    assert gone < begin
    assert not gone & end
    for pod in gone:
        assert pod in program.err  # it was told
    assert "Traceback" not in program.err, program.err


@on_pods
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_the_api_server_work_goes_on(site: Kubernetes) -> None:
    def results() -> int:
        return max(map(int, re.findall(r"results (\d+)", program.out)))

    program = site.start(MAP, env={"FIBER_LOG_LEVEL": "info"})
    program.wait_for("results 100")
    killed = {pod.metadata.name: pod.spec.node_name for pod in site.pods()[:2]}
    with cluster.without_api_server():
        back = time.monotonic() + 20
        for job, node in killed.items():
            site.kill_on(node, job)
        early = results()
        until(lambda: results() > early + 500, "more results")
        until(lambda: time.monotonic() > back, "20 seconds without")
    assert program.end(150) == 0, program.all()
    site.leaves_nothing()
    assert "all" in program.lines
    begin, end = (set(line.split()[1:]) for line in program.lines if line.startswith("places"))
    assert set(killed) <= begin
    assert not set(killed) & end
    assert begin & end  # the others have never stopped
    assert "Traceback" not in program.err, program.err


FAMILY = """
import fiber, time

def nap(x):
    time.sleep(600)

def family(event):
    child = fiber.Process(target=nap, args=(0,))
    child.start()
    event.set()
    child.join()

if __name__ == "__main__":
    event = fiber.Event()
    process = fiber.Process(target=family, args=(event,))
    process.start()
    event.wait()
    print("begun", flush=True)
    process.join()
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("site", ["kubernetes-in-pod"], indirect=True)
def test_a_masters_pod_that_is_deleted_leaves_nothing(site: InPod) -> None:
    program = site.start(FAMILY)
    assert isinstance(program, PodProgram)
    program.wait_for("begun")
    program.wait_until(lambda: len(site.jobs()) == 2, "both pods running")
    site.namespace.delete(program.pod)
    until(
        lambda: all("being deleted" in what for what in site.left()),
        lambda: f"the cluster deletes {site.left()}",
        patience=30,
    )
    # An old kubelet sometimes takes most of a minute to let go of a pod that has ended.
    site.leaves_nothing(90)
