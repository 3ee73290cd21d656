"""`python -m benchmarks.startup docker|kubernetes|slurm [--workers N] [--rounds N] ...`.

How long a pool takes until all of its workers are ready, against what the engine itself needs for
as many bare containers, pods or jobs; in turns, in one run. It prints a table in Markdown: the
figures in RESULTS.md are from there.

On Slurm a bare job is Python that connects to this program: by one `sbatch --array`, and by one
`srun -n`. A cluster of fewer CPUs than workers has to be told that it may share them. On one whose
nodes have 4000 MB, as a partition `bench` with OverSubscribe=FORCE:60:

    --options "--partition=bench --overcommit --cpus-per-task=1 --nodes=4 --mem=3900M"
    --job-options "--nodes=1 --mem=75M"
"""

from __future__ import annotations

import argparse
import shlex
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial

import fiber
from fiber.runtime import session

LOOK_AGAIN = 0.01  # seconds
DEADLINE = 180.0  # seconds
SLEEP = ["sleep", "600"]


def pool(backend: str, workers: int, each: int | None) -> float:
    """Return the seconds from `Pool(workers)` until all are ready; `each` of them share a job."""
    fiber.init(workers_per_job=each, start_timeout=DEADLINE)
    began = time.monotonic()
    with fiber.get_context(backend).Pool(workers) as pool:
        while pool.stats().ready < workers:
            _check(began)
            time.sleep(LOOK_AGAIN)
        return time.monotonic() - began


def bare_docker(workers: int, image: str) -> float:
    """Return the seconds that the engine needs for as many containers, eight at a time."""
    label = f"fiber-bare={uuid.uuid4().hex}"
    began = time.monotonic()
    command = ["docker", "run", "--detach", "--rm", "--label", label, image, *SLEEP]
    waiting = [command] * workers
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        _check(began)
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < 8:
            running.append(subprocess.Popen(waiting.pop(), stdout=subprocess.DEVNULL))
        time.sleep(LOOK_AGAIN)
    took = time.monotonic() - began
    found = subprocess.check_output(["docker", "ps", "-q", "--filter", f"label={label}"], text=True)
    assert len(found.split()) == workers
    subprocess.check_call(["docker", "kill", *found.split()], stdout=subprocess.DEVNULL)
    return took


def bare_kubernetes(workers: int, image: str) -> float:
    """Return the seconds that the cluster needs until as many bare pods run."""
    from kubernetes import client, config, watch

    config.load_kube_config()
    core = client.CoreV1Api()
    namespace = fiber.config.kubernetes_namespace or "default"
    label = f"fiber-bare={uuid.uuid4().hex}"
    key, value = label.split("=")
    began = time.monotonic()
    for number in range(workers):
        container = {"name": "bare", "image": image, "command": SLEEP}
        container["resources"] = {"requests": {"cpu": "1m"}}
        body = {
            "metadata": {"name": f"bare-{value[:8]}-{number}", "labels": {key: value}},
            "spec": {
                "containers": [container],
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 0,
            },
        }
        core.create_namespaced_pod(namespace, body)
    running: set[str] = set()
    events = watch.Watch().stream(
        core.list_namespaced_pod, namespace, label_selector=label, timeout_seconds=int(DEADLINE)
    )
    for event in events:
        if event["object"].status.phase == "Running":
            running.add(event["object"].metadata.name)
        if len(running) == workers:
            break
    took = time.monotonic() - began
    assert len(running) == workers
    core.delete_collection_namespaced_pod(namespace, label_selector=label, grace_period_seconds=0)
    while core.list_namespaced_pod(namespace, label_selector=label).items:
        _check(began)
        time.sleep(0.1)
    return took


def slurm_pool(workers: int, each: int | None, mode: str, options: str) -> float:
    """As `pool`, in one of Slurm's modes, and in a session of its own: a session has one mode."""
    session.shutdown()
    fiber.init(slurm_mode=mode, slurm_options=options)
    return pool("slurm", workers, each)


CALL = "import socket, sys; s = socket.create_connection(sys.argv[1:3]); s.recv(1)"


def bare_slurm(workers: int, way: str, given: str) -> float:
    """Return the seconds until as many bare jobs, or tasks of a step, have connected."""
    with socket.create_server(("", 0), backlog=workers) as server:
        address = [socket.gethostname(), str(server.getsockname()[1])]
        call = [sys.executable, "-I", "-S", "-c", CALL, *address]
        options = ["--job-name=bare", *shlex.split(given)]
        began = time.monotonic()
        step = None
        if way == "srun":
            step = subprocess.Popen(["srun", f"--ntasks={workers}", *options, *call])
        else:
            script = "#!/bin/sh\nexec " + shlex.join(call)
            array = [f"--array=0-{workers - 1}", "--output=/dev/null"]
            command = ["sbatch", "--parsable", *array, *options]
            subprocess.run(command, input=script, text=True, check=True, stdout=subprocess.DEVNULL)
        server.settimeout(DEADLINE)
        lines = [server.accept()[0] for _ in range(workers)]
        took = time.monotonic() - began
        for line in lines:
            line.close()
    if step is not None:
        step.wait()
    while subprocess.check_output(["squeue", "--noheader", "--name=bare"]):
        _check(began)
        time.sleep(0.1)
    return took


def _check(began: float) -> None:
    if time.monotonic() - began > DEADLINE:
        sys.exit(f"not ready within {DEADLINE:g} seconds")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("backend", choices=["docker", "kubernetes", "slurm"])
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", help="of a stock Python; for containers and pods")
    parser.add_argument("--options", default="", help="further options of srun and sbatch")
    parser.add_argument("--job-options", default="", help="and of a batch job for one worker")
    parser.add_argument("--only", default="", help="kinds whose names contain this, and bare ones")
    options = parser.parse_args()
    workers = options.workers
    fiber.init(image=options.image, cpu_per_job=1)
    kinds: dict[str, Callable[[], float]] = {}
    if options.backend == "slurm":
        for_all = options.options
        for_one = f"{for_all} {options.job_options}"
        kinds["bare: one srun -n"] = lambda: bare_slurm(workers, "srun", for_all)
        kinds["bare: one sbatch --array"] = lambda: bare_slurm(workers, "array", for_one)
        for each, which in ((None, ""), (10, ", ten workers in a task"), (1, ", each in a task")):
            kinds[f"Pool, one allocation for all{which}"] = partial(
                slurm_pool, workers, each, "pool", for_all
            )
        kinds["Pool, a batch job for each worker"] = partial(
            slurm_pool, workers, 1, "batch", for_one
        )
    else:
        bare = bare_docker if options.backend == "docker" else bare_kubernetes
        kinds["bare"] = lambda: bare(workers, options.image)
        kinds["Pool, a job for each worker"] = lambda: pool(options.backend, workers, 1)
        kinds["Pool, ten workers in a job"] = lambda: pool(options.backend, workers, 10)
    kinds = {
        kind: measure
        for kind, measure in kinds.items()
        if kind.startswith("bare") or options.only in kind
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind, measure in kinds.items():
            seconds[kind].append(measure())
            print(f"{kind}: {seconds[kind][-1]:.2f} s", file=sys.stderr)
    reference = statistics.median(seconds[next(iter(kinds))])
    print(f"| {workers} on {options.backend} | median | least | most | ratio to the first |")
    print("|---|---|---|---|---|")
    for kind, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"| {kind} | {middle:.2f} s | {min(values):.2f} s | {max(values):.2f} s "
            f"| {middle / reference:.2f} |"
        )


if __name__ == "__main__":
    main()
