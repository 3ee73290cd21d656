"""The real cluster of the tests: a namespace for each test, and what the tests look at in it.

`KUBECONFIG` names it; nodes have the image local/python:X.Y, a stock Python without Fiber.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import waiting

from fiber.backends.kubernetes import rbac
from fiber.backends.kubernetes.backend import KubernetesBackend
from fiber.config import config

VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
IMAGE = f"local/python:{VERSION}"
ROOT = Path(__file__).resolve().parents[2]
BEDS = Path(os.environ.get("TEST_BEDS", ROOT.parent / "shared" / "testbeds"))
TEST_BED = Path(os.environ.get("K8S_DIR", "/var/cache/k8s-ci")) / "cluster"
PATIENCE = 60.0

if "KUBECONFIG" not in os.environ and (TEST_BED / "admin.kubeconfig").exists():
    os.environ["KUBECONFIG"] = str(TEST_BED / "admin.kubeconfig")


@functools.cache
def core() -> Any:
    """The client of the administrator."""
    kubernetes = pytest.importorskip("kubernetes")
    configuration = type.__call__(kubernetes.client.Configuration)
    kubernetes.config.load_kube_config(
        os.environ.get("KUBECONFIG"), client_configuration=configuration
    )
    return kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(configuration))


def probe() -> None:
    """Raise what keeps the tests from using the cluster."""
    nodes = core().list_node(_request_timeout=5).items
    ready = [
        n for n in nodes for c in n.status.conditions if (c.type, c.status) == ("Ready", "True")
    ]
    assert ready, "none of its nodes is ready"


until = functools.partial(waiting.until, patience=PATIENCE)


class Namespace:
    """A namespace, and what tests do in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def pods(self) -> list[Any]:
        return list(core().list_namespaced_pod(self.name).items)

    def secrets(self) -> list[str]:
        found = core().list_namespaced_secret(self.name).items
        return [s.metadata.name for s in found if s.type == "Opaque"]

    def delete(self, pod: str, grace: int = 0) -> None:
        core().delete_namespaced_pod(pod, self.name, grace_period_seconds=grace)

    def left(self) -> list[str]:
        """What is there, in words."""
        pods = [
            f"pod {pod.metadata.name} ({pod.status.phase}, "
            f"{'being deleted' if pod.metadata.deletion_timestamp else 'not deleted'})"
            for pod in self.pods()
        ]
        return pods + [f"Secret {name}" for name in self.secrets()]

    def becomes_empty(self, patience: float = PATIENCE) -> None:
        """Wait until there is neither a pod nor a Secret."""
        until(lambda: not self.left(), lambda: f"empty, but for {self.left()}", patience=patience)


def takes_pods(namespace: str, account: str = "default") -> bool:
    """Whether pods of a service account can be made: its first moments are too early."""
    container = {"name": "probe", "image": IMAGE}
    inner = {"serviceAccountName": account, "containers": [container]}
    body = {"metadata": {"name": "probe"}, "spec": inner}
    from kubernetes.client import ApiException

    try:
        core().create_namespaced_pod(namespace, body, dry_run="All")
    except ApiException:
        return False
    return True


@contextlib.contextmanager
def new_namespace() -> Iterator[Namespace]:
    """Make a namespace, and delete it with all that is in it."""
    name = f"fiber-test-{os.urandom(4).hex()}"
    core().create_namespace({"metadata": {"name": name}})
    try:
        until(lambda: takes_pods(name), f"the service account of {name} is there")
        yield Namespace(name)
    finally:
        # Again if need be: the API server may be away just now.
        until(lambda: _deleted(name), f"the namespace {name} is deleted")
        core().api_client.rest_client.pool_manager.clear()  # no connection is left open


def _deleted(namespace: str) -> bool:
    """Have a namespace deleted with all that is in it; return whether that was accepted."""
    try:
        core().delete_collection_namespaced_pod(namespace, grace_period_seconds=0)
        core().delete_namespace(namespace)
    except Exception:  # `until` fails if it stays so
        return False
    return True


def apply_rights(namespace: Namespace) -> None:
    """Apply the manifest that the package ships."""
    import yaml
    from kubernetes import client

    rights = client.RbacAuthorizationV1Api(core().api_client)
    account, role, binding = yaml.safe_load_all(rbac.manifest(namespace.name))
    core().create_namespaced_service_account(namespace.name, account)
    rights.create_namespaced_role(namespace.name, role)
    rights.create_namespaced_role_binding(namespace.name, binding)
    until(lambda: takes_pods(namespace.name, "fiber"), "the service account is there")


@functools.cache
def master_image() -> str:
    """Return the image of masters in pods, made if it is not there: it has what they import."""
    name = f"local/fiber-master:{VERSION}"
    here = ["docker", "image", "inspect", name]
    if subprocess.run(here, check=False, capture_output=True).returncode != 0:
        recipe = f"FROM {IMAGE}\nRUN pip install --quiet cloudpickle cryptography kubernetes\n"
        _run(["docker", "build", "--quiet", "--tag", name, "-"], recipe, 300)
    # The first node is this Docker; the others have their own, and may be newer than the image.
    _run(["bash", str(BEDS / "kubernetes" / "load.sh"), name], "", 120)
    return name


def _run(command: list[str], text: str, timeout: float) -> None:
    done = subprocess.run(
        command,
        check=False,
        input=text,
        text=True,
        capture_output=True,
        env=_unmarked(),
        timeout=timeout,
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"


def _unmarked() -> dict[str, str]:
    """The environment, without the run's mark and folder: for what stays after the run."""
    return {k: v for k, v in os.environ.items() if k not in ("TESTS_OF_FIBER", "TMPDIR")}


@contextlib.contextmanager
def cut_off() -> Iterator[list[str]]:
    """Make a place where only the API server can be reached, and nobody gets in.

    As behind NAT or a firewall. A command that has before it what is returned runs there.
    """
    if os.getuid() != 0:
        pytest.skip("only root can make a network namespace")
    name = f"fiber-{os.urandom(3).hex()}"
    host, guest = f"{name}h"[:15], f"{name}g"[:15]
    net = f"10.77.{os.urandom(1)[0]}"
    server = core().api_client.configuration.host.rsplit("//", 1)[1].rsplit(":", 1)[0]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", host, "type", "veth", "peer", "name", guest, "netns", name)
        ip("addr", "add", f"{net}.1/30", "dev", host)
        ip("link", "set", host, "up")
        ip("-n", name, "link", "set", "lo", "up")
        ip("-n", name, "addr", "add", f"{net}.2/30", "dev", guest)
        ip("-n", name, "link", "set", guest, "up")
        ip("-n", name, "route", "add", f"{server}/32", "via", f"{net}.1")
        for rule in (
            "-A INPUT -i lo -j ACCEPT",
            "-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
            "-A INPUT -j DROP",
        ):
            ip("netns", "exec", name, "iptables", "-w", *rule.split())
        yield ["ip", "netns", "exec", name]
    finally:
        ip("netns", "del", name)  # and with it its end of the cable, and so the other one


def service(name: str) -> int:
    """Return the process ID of a part of the test bed; the test is skipped elsewhere."""
    if not (BEDS / "kubernetes" / "up.sh").exists():
        pytest.skip(f"there is no {BEDS}/kubernetes/up.sh, which would start it again")
    try:
        return int((TEST_BED / "pids" / name).read_text())
    except OSError:
        pytest.skip("the cluster is not the test bed's, whose parts may be ended")


def kill_containers(node: str, *labels: str) -> None:
    """Kill containers of a node of the test bed by its own Docker engine."""
    import docker

    service("apiserver")  # a test bed is needed
    folder = Path("/var") if node == "node-1" else TEST_BED / node
    engine = docker.DockerClient(f"unix://{folder}/run/docker.sock")
    try:
        for container in engine.api.containers(filters={"label": list(labels)}):
            with contextlib.suppress(docker.errors.APIError):  # it has ended just now
                engine.api.kill(container["Id"])
    finally:
        engine.close()


@contextlib.contextmanager
def without_node(number: int) -> Iterator[None]:
    """Have a node of the test bed gone: neither its kubelet nor its containers run."""
    kubelet, engine = service(f"kubelet-{number}"), service(f"dockerd-{number}")
    os.kill(kubelet, signal.SIGKILL)
    try:
        kill_containers(f"node-{number}")
        os.kill(engine, signal.SIGKILL)
        yield
    finally:
        bring_back()


@contextlib.contextmanager
def without_api_server() -> Iterator[None]:
    """Have the API server of the test bed away."""
    os.kill(service("apiserver"), signal.SIGKILL)
    try:
        yield
    finally:
        bring_back()


def bring_back() -> None:
    """Start again what was ended of the test bed."""
    nodes = len(list((TEST_BED / "pids").glob("kubelet-*")))
    for attempt in range(3):  # it can be run again, and sometimes has to be
        done = subprocess.run(
            [BEDS / "kubernetes" / "up.sh"],
            check=attempt == 2,
            timeout=120,
            env={**_unmarked(), "K8S_NODES": str(nodes)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        if done.returncode == 0:
            return


def configure(namespace: Namespace) -> None:
    """Let the backend use a namespace, and the image that the nodes have."""
    config.init(
        image=IMAGE, kubernetes_namespace=namespace.name, kubernetes_pull_policy="IfNotPresent"
    )


@contextlib.contextmanager
def new_backend() -> Iterator[KubernetesBackend]:
    backend = KubernetesBackend()
    try:
        yield backend
    finally:
        backend.close()
