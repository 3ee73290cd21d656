"""The master of pods: in the cluster and outside, cut off, killed, and without its API server."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("kubernetes")

from tests.backends import kubernetes_cluster as cluster
from tests.backends.kubernetes_cluster import Namespace, core, until

from fiber.backends.base import JobSpec, JobState
from fiber.backends.kubernetes import KubernetesBackend
from fiber.config import config
from fiber.resources import Resources

SLEEP = "import time; time.sleep(300)"
SOON = 30.0  # seconds in which nothing may be left of a master that was killed

# A master: submits jobs that connect to it, answers each, and reports.
MASTER = """
import json, socket, sys, time
from fiber.backends.base import JobSpec
from fiber.backends.kubernetes import KubernetesBackend
from fiber.config import config
from fiber.resources import Resources

settings, worker, count, after = json.loads(sys.argv[1])
config.init(**settings)
backend = KubernetesBackend()
listener = socket.create_server(("0.0.0.0", 0))
listener.settimeout(60)
addresses = backend.addresses(listener.getsockname()[1])
jobs = backend.submit(
    [JobSpec("w", ["python3", "-c", worker, *addresses], {}, Resources(), "s", b"x")] * count
)
said = []
while len(said) < count:
    line, _ = listener.accept()
    with line, line.makefile("rwb") as file:
        if words := file.readline():  # the relay only looks whether it gets through
            said.append(json.loads(words))
            file.write(b"thanks\\n")
report = {"addresses": addresses, "said": said, "jobs": [job.id for job in jobs]}
print(json.dumps(report), flush=True)
exec(after)
"""
CALL = """
import json, os, socket, sys
def call():
    for address in sys.argv[1:]:
        host, port = address.rsplit(":", 1)
        try:
            return socket.create_connection((host, int(port)), 5)
        except OSError:
            pass
    sys.exit("no way to the master")
"""
WORKER = (
    CALL
    + """
line = call()
line.sendall(json.dumps([os.getuid(), os.environ.get("HOSTNAME")]).encode() + b"\\n")
assert line.recv(10) == b"thanks\\n"
import time
time.sleep(300)
"""
)


@pytest.fixture
def namespace(engine: Any, clean_environ: None) -> Iterator[Namespace]:
    engine("kubernetes", cluster.probe)
    with cluster.new_namespace() as made:
        cluster.configure(made)
        yield made


@pytest.fixture
def backend(namespace: Namespace) -> Iterator[KubernetesBackend]:
    with cluster.new_backend() as made:
        yield made


def settings(namespace: Namespace, **more: Any) -> dict[str, Any]:
    return {
        "image": cluster.IMAGE,
        "kubernetes_namespace": namespace.name,
        "kubernetes_pull_policy": "IfNotPresent",
        **more,
    }


def spec(program: str, *arguments: str) -> JobSpec:
    return JobSpec("w", ["python3", "-c", program, *arguments], {}, Resources(), "tests", b"x")


def running(backend: KubernetesBackend, *jobs: Any) -> None:
    until(
        lambda: all(s.state is JobState.RUNNING for s in backend.status(jobs)), "all jobs running"
    )


def report_of(master: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a master outside reported."""
    assert master.stdout is not None
    assert master.stderr is not None
    line = master.stdout.readline()
    assert line, master.stderr.read()
    found: dict[str, Any] = json.loads(line)
    return found


def cleaned_up(namespace: Namespace, folder: Path) -> None:
    """Wait until nothing is left of a master in `folder`, and who removed it has ended."""
    namespace.becomes_empty(SOON)

    def cleaners() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if "kubernetes.cleaner" in words and str(folder) in words:
                    found.append(process)
        return found

    until(lambda: not cleaners(), "the process that cleans up has ended")


# Outside.


def test_a_master_outside_that_is_killed_leaves_nothing(
    namespace: Namespace, tmp_path: Path, start_script: Callable[..., subprocess.Popen[str]]
) -> None:
    about = [settings(namespace), WORKER, 3, "time.sleep(300)"]
    master = start_script(MASTER, json.dumps(about))
    report = report_of(master)
    assert len(report["said"]) == 3
    assert len(namespace.secrets()) == 1
    master.send_signal(signal.SIGKILL)
    cleaned_up(namespace, tmp_path)


def test_a_fork_that_outlives_the_master_keeps_nobody_from_cleaning_up(
    namespace: Namespace, tmp_path: Path, start_script: Callable[..., subprocess.Popen[str]]
) -> None:
    fork = "import os; os.fork(); time.sleep(300)"
    master = start_script(MASTER, json.dumps([settings(namespace), WORKER, 1, fork]))
    report_of(master)
    until(lambda: len(psutil.Process(master.pid).children()) == 2, "the fork and who cleans up")
    master.send_signal(signal.SIGKILL)
    cleaned_up(namespace, tmp_path)


def test_a_program_that_just_ends_leaves_nothing(
    namespace: Namespace,
    tmp_path: Path,
    run_script: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    about = [settings(namespace), WORKER, 1, "sys.exit(0)"]
    assert run_script(MASTER, json.dumps(about)).returncode == 0
    cleaned_up(namespace, tmp_path)


def test_directly_where_pods_reach_this_machine(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        found = backend.addresses(port)
        assert found
        assert all(address.endswith(f":{port}") for address in found)
        listener.settimeout(cluster.PATIENCE)
        while True:  # the relay's attempts, which said nothing
            line, _ = listener.accept()
            line.settimeout(5)
            with line:
                if line.recv(1) == b"":
                    break
    until(lambda: not namespace.pods(), "the relay that is not needed is gone")


@pytest.fixture
def laptop(engine: Any, tmp_path: Path) -> Iterator[str]:
    """A Python that runs where only the API server can be reached, and nobody gets in."""
    engine("kubernetes", cluster.probe)
    with cluster.cut_off() as command:
        wrapper = tmp_path / "python"
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(command)} {sys.executable} "$@"\n')
        wrapper.chmod(0o755)
        yield str(wrapper)


def test_a_master_that_pods_cannot_reach_is_reached_through_a_relay(
    namespace: Namespace,
    laptop: str,
    tmp_path: Path,
    start_script: Callable[..., subprocess.Popen[str]],
) -> None:
    about = [settings(namespace), WORKER, 5, "time.sleep(300)"]
    master = start_script(MASTER, json.dumps(about), python=laptop)
    report = report_of(master)
    assert len(report["said"]) == 5
    (relay,) = [pod for pod in namespace.pods() if "relay" in pod.metadata.name]
    assert report["addresses"] == [f"{relay.status.pod_ip}:7070"]
    master.send_signal(signal.SIGKILL)
    cleaned_up(namespace, tmp_path)


def echo(listener: socket.socket, count: int) -> threading.Thread:
    """Send back what `count` connections bring."""

    def serve(line: socket.socket) -> None:
        with line:
            while data := line.recv(65536):
                line.sendall(data)

    def accept() -> None:
        threads = []
        for _ in range(count):
            line, _ = listener.accept()
            threads.append(threading.Thread(target=serve, args=(line,)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    thread = threading.Thread(target=accept)
    thread.start()
    return thread


def test_the_relay_carries_many_connections_and_large_amounts(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    config.kubernetes_relay = "always"
    program = CALL + (
        """
import hashlib, threading
def one():
    line = call()
    data = os.urandom(2_000_000)
    sender = threading.Thread(target=lambda: (line.sendall(data), line.shutdown(1)))
    sender.start()
    got = b"".join(iter(lambda: line.recv(65536), b""))
    sender.join()
    good.append(got == data)
good = []
threads = [threading.Thread(target=one) for _ in range(20)]
for thread in threads: thread.start()
for thread in threads: thread.join()
sys.exit(0 if good == [True] * 20 else 1)
"""
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = backend.addresses(listener.getsockname()[1])
        thread = echo(listener, 20)
        (job,) = backend.submit([spec(program, *found)])
        (status,) = backend.wait([job], cluster.PATIENCE)
        assert status.exit_code == 0, backend.logs(job)
        thread.join(cluster.PATIENCE)


# Without the API server.


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_without_the_api_server_work_goes_on_and_new_pods_come_when_it_is_back(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    config.kubernetes_relay = "always"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(cluster.PATIENCE)
        port = listener.getsockname()[1]
        found = backend.addresses(port)
        program = CALL + "line = call(); line.sendall(b'x'); line.recv(1); sys.exit(7)"
        jobs = backend.submit([spec(program, *found), spec(SLEEP)])
        running(backend, *jobs)
        early, _ = listener.accept()
        with early:
            assert early.recv(1) == b"x"
            os.kill(cluster.service("apiserver"), signal.SIGKILL)
            try:
                until(
                    lambda: backend.status(jobs)[1].state is JobState.UNKNOWN,
                    "the job's state is unknown",
                )
                (status,) = backend.status(jobs[1:])
                assert status.reason == "Unreachable"
                assert backend.logs(jobs[1]) == ""
                (late,) = backend.submit([spec(program, *found)])
                (status,) = backend.status([late])
                assert (status.state, status.reason) == (JobState.PENDING, "Unreachable")
                backend.kill(jobs[1:])  # it will be done
                assert backend.status(jobs)[1].state is JobState.ENDED
            finally:
                cluster.bring_back()
            running(backend, late)
        until(lambda: jobs[1].id not in [pod.metadata.name for pod in namespace.pods()], "deleted")
        # The connections through the relay are lost with the port-forward, and it is opened again.
        again, _ = listener.accept()
        with again:
            assert again.recv(1) == b"x"
            again.sendall(b"y")
        (status,) = backend.wait([late], cluster.PATIENCE)
        assert status.exit_code == 7


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_node_that_goes_away(namespace: Namespace, backend: KubernetesBackend) -> None:
    config.kubernetes_template = {"spec": {"nodeSelector": {"kubernetes.io/hostname": "node-3"}}}
    backend.close()
    (job,) = backend.submit([spec(SLEEP)])
    running(backend, job)
    os.kill(cluster.service("kubelet-3"), signal.SIGKILL)
    try:
        (status,) = backend.wait([job], 120)
        assert (status.state, status.reason) == (JobState.ENDED, "NodeLost")
        assert "node-3" in status.message
    finally:
        cluster.bring_back()


# In a pod.


@pytest.fixture
def master_pod(namespace: Namespace) -> Callable[..., Any]:
    """Start `MASTER` in a pod, with the rights of the manifest; return what it reported."""
    cluster.apply_rights(namespace)

    def start(
        worker: str, after: str, *, count: int = 2, user: int = 1000, command: str = ""
    ) -> dict[str, Any]:
        about = json.dumps([{"kubernetes_pull_policy": "IfNotPresent"}, worker, count, after])
        shell = command or 'exec python3 -c "$0" "$1"'
        volume = {"name": "source", "hostPath": {"path": str(cluster.ROOT / "src")}}
        body = {
            "metadata": {"name": "master"},
            "spec": {
                "restartPolicy": "Never",
                "serviceAccountName": "fiber",
                "securityContext": {"runAsUser": user, "runAsGroup": user},
                "volumes": [volume],
                "containers": [
                    {
                        "name": "main",
                        "image": cluster.master_image(),
                        "imagePullPolicy": "IfNotPresent",
                        "workingDir": "/tmp",
                        "command": ["sh", "-c", shell, MASTER, about],
                        "env": [{"name": "PYTHONPATH", "value": "/source"}],
                        "volumeMounts": [{"name": "source", "mountPath": "/source"}],
                    }
                ],
            },
        }
        core().create_namespaced_pod(namespace.name, body)

        def report() -> Any:
            pod = core().read_namespaced_pod("master", namespace.name)
            if pod.status.phase == "Pending":
                return None
            text = core().read_namespaced_pod_log("master", namespace.name)
            assert pod.status.phase == "Running" or text.startswith("{"), text
            return json.loads(text.splitlines()[0]) if text.startswith("{") else None

        found: dict[str, Any] = until(report, "the master's report")
        return found

    return start


@pytest.mark.slow
@pytest.mark.timeout(300)  # it may be the first, which makes the image; and its waits add up
def test_a_master_in_a_pod(namespace: Namespace, master_pod: Callable[..., Any]) -> None:
    report = master_pod(WORKER, "time.sleep(300)")
    own = core().read_namespaced_pod("master", namespace.name)
    assert [address.rsplit(":", 1)[0] for address in report["addresses"]] == [own.status.pod_ip]
    assert sorted(name for _, name in report["said"]) == sorted(report["jobs"])
    assert {user for user, _ in report["said"]} == {1000}
    workers = [pod for pod in namespace.pods() if pod.metadata.name != "master"]
    for pod in workers:
        (owner,) = pod.metadata.owner_references
        assert (owner.kind, owner.name, owner.uid) == ("Pod", "master", own.metadata.uid)
        (container,) = pod.spec.containers
        assert container.image == cluster.master_image()
        assert "/source" in [mount.mount_path for mount in container.volume_mounts]
        assert pod.spec.service_account_name == "fiber"
    # Its death is that of all that it owns, by the cluster itself.
    namespace.delete("master")
    until(
        lambda: all("being deleted" in what for what in namespace.left()),
        lambda: f"the cluster deletes {namespace.left()}",
        patience=SOON,
    )
    # An old kubelet sometimes takes most of a minute to let go of a pod that has ended.
    namespace.becomes_empty(90)


def test_a_master_that_is_root_in_its_pod(
    namespace: Namespace, master_pod: Callable[..., Any]
) -> None:
    report = master_pod(WORKER, "backend.close()", user=0)
    assert {user for user, _ in report["said"]} == {0}
    until(lambda: [pod.metadata.name for pod in namespace.pods()] == ["master"], "only the master")
    assert namespace.secrets() == []


def test_the_masters_process_dies_in_its_pod(
    namespace: Namespace, master_pod: Callable[..., Any]
) -> None:
    master_pod(
        WORKER, "import os; os.kill(os.getpid(), 9)", command='python3 -c "$0" "$1"; sleep 300'
    )
    until(
        lambda: [pod.metadata.name for pod in namespace.pods()] == ["master"],
        "no workers",
        patience=SOON,
    )
    assert namespace.secrets() == []
    (master,) = namespace.pods()
    assert master.status.phase == "Running"


def test_workers_whose_masters_container_died_delete_themselves(
    namespace: Namespace, master_pod: Callable[..., Any]
) -> None:
    """With the container ends the process that would clean up; the pod, which owns them, stays."""
    worker = WORKER.replace(
        "import time\ntime.sleep(300)",
        "while line.recv(1): pass\n"
        "import importlib, time\n"
        "time.sleep(1)\n"
        "module, name = os.environ['FIBER_INTERNAL_FAREWELL'].split(':')\n"
        "getattr(importlib.import_module(module), name)()\n"
        "time.sleep(300)",
    ).replace("line = call()", "sys.path.insert(0, '/source'); line = call()")
    master_pod(worker, "import os; os._exit(9)")
    until(
        lambda: [pod.metadata.name for pod in namespace.pods()] == ["master"],
        "no workers",
        patience=SOON,
    )
    assert namespace.secrets() == []
    (master,) = namespace.pods()
    assert master.status.phase == "Failed"
