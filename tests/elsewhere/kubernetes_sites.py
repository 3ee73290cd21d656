"""Pods as the place of the tests' processes: reached directly, through the relay, and from a pod.

    kubernetes         master here ─────────────────────────────► pods
    kubernetes-relay   master cut off ─► API server ─► relay ◄─── pods
    kubernetes-in-pod  master in a pod ─────────────────────────► pods

Each test has a namespace of its own. The pods are on several nodes, and ask for little, so that
many have room at the same time.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.backends import kubernetes_cluster as cluster
from tests.backends.kubernetes_cluster import core
from tests.elsewhere.sites import CORE, PATIENCE, ROOT, Program, Site, until

_NOT_BEGUN, _NOT_FOUND = 400, 404


class Kubernetes(Site):
    """Pods of a master on this machine, which they reach directly."""

    name = backend = "kubernetes"
    kind = "pod"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._stack = contextlib.ExitStack()
        self.namespace = self._stack.enter_context(cluster.new_namespace())

    @staticmethod
    def probe() -> None:
        cluster.probe()

    def template(self) -> dict[str, Any]:
        """Return what all pods are made from."""
        spread = {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"app.kubernetes.io/managed-by": "fiber"}},
        }
        container = {"name": "fiber", "resources": {"requests": {"cpu": "1m"}}}
        return {"spec": {"topologySpreadConstraints": [spread], "containers": [container]}}

    def environment(self) -> dict[str, str]:
        return {
            "FIBER_BACKEND": "kubernetes",
            "FIBER_IMAGE": cluster.IMAGE,
            "FIBER_KUBERNETES_NAMESPACE": self.namespace.name,
            "FIBER_KUBERNETES_PULL_POLICY": "Never",  # the nodes have it, or nobody has
            "FIBER_KUBERNETES_TEMPLATE": json.dumps(self.template()),
        }

    def nowhere(self) -> dict[str, str]:
        path = self.folder / "kubeconfig"
        about = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
            "users": [{"name": "u", "user": {"token": "none"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        path.write_text(json.dumps(about))
        return {"KUBECONFIG": str(path)}

    def packages(self) -> dict[str, str]:
        template = self.template()
        volume = {"name": "packages", "hostPath": {"path": sysconfig.get_path("purelib")}}
        mount = {"name": "packages", "mountPath": "/packages", "readOnly": True}
        (container,) = template["spec"]["containers"]
        container["volumeMounts"] = [mount]
        container["env"] = [{"name": "PYTHONPATH", "value": "/packages"}]
        template["spec"]["volumes"] = [volume]
        return {"FIBER_KUBERNETES_TEMPLATE": json.dumps(template)}

    # What the cluster has

    def pods(self) -> list[Any]:
        """Return the pods of jobs: neither relays nor masters."""
        return [pod for pod in self.namespace.pods() if not _is_other(pod.metadata.name)]

    def jobs(self) -> list[str]:
        return [
            pod.metadata.name
            for pod in self.pods()
            if pod.status.phase == "Running" and pod.metadata.deletion_timestamp is None
        ]

    def kill(self, job: str) -> None:
        """By the container engine of its node, as the kernel does when memory runs out."""
        pod = self._unless_gone(lambda: core().read_namespaced_pod(job, self.namespace.name))
        if pod is not None and pod.spec.node_name is not None:
            self.kill_on(pod.spec.node_name, job)

    def kill_on(self, node: str, job: str) -> None:
        """Kill what runs in a job, of which the API server need not be asked."""
        labels = [
            f"io.kubernetes.pod.namespace={self.namespace.name}",
            f"io.kubernetes.pod.name={job}",
            "io.kubernetes.container.name=fiber",
        ]
        cluster.kill_containers(node, *labels)

    def remove(self, job: str) -> None:
        self._unless_gone(lambda: self.namespace.delete(job))

    def _unless_gone(self, ask: Callable[[], Any]) -> Any:
        from kubernetes.client import ApiException

        try:
            return ask()
        except ApiException as error:
            if error.status != _NOT_FOUND:
                raise
            return None

    def describe(self) -> str:
        told = []
        for pod in self.pods():
            told.append(json.dumps(core().api_client.sanitize_for_serialization(pod)))
            told.append(self.log(pod.metadata.name))
        events = core().list_namespaced_event(self.namespace.name)
        told.append(json.dumps(core().api_client.sanitize_for_serialization(events)))
        return "\n".join(told)

    def log(self, pod: str) -> str:
        """Return what a pod wrote; nothing if it has not begun."""
        from kubernetes.client import ApiException

        try:
            text: str = core().read_namespaced_pod_log(pod, self.namespace.name)
        except ApiException as error:
            if error.status not in (_NOT_BEGUN, _NOT_FOUND):
                raise
            return ""
        return text

    def left(self) -> list[str]:
        return [what for what in self.namespace.left() if not _is_other(what, "pod master")]

    def forget(self) -> None:
        self._stack.close()


def _is_other(name: str, *starts: str) -> bool:
    return name.startswith(starts or ("fiber-relay", "master"))


class Relay(Kubernetes):
    """Pods of a master that only the API server leads to."""

    name = "kubernetes-relay"
    only = CORE | {
        "test_large_arguments_and_results",
        "test_pipes",
        "test_the_death_of_who_has_something_is_told_to_who_wants_it",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            self._prefix = self._stack.enter_context(cluster.cut_off())
        except BaseException:
            self.forget()
            raise

    def master(self, command: list[str], settings: Mapping[str, str]) -> Program:
        return super().master([*self._prefix, *command], settings)


class InPod(Kubernetes):
    """Pods of a master that is in a pod itself, with the rights of the manifest alone."""

    name = "kubernetes-in-pod"
    only = CORE

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            cluster.apply_rights(self.namespace)
            cluster.master_image()
        except BaseException:
            self.forget()
            raise
        folder.chmod(0o777)  # the master is another user

    def environment(self) -> dict[str, str]:
        # All else is found out in the pod.
        wanted = ("FIBER_KUBERNETES_PULL_POLICY", "FIBER_KUBERNETES_TEMPLATE")
        settings = super().environment()
        return {name: settings[name] for name in wanted}

    def master(self, command: list[str], settings: Mapping[str, str]) -> Program:
        return PodProgram(command, self.folder, settings, self.namespace)


class PodProgram(Program):
    """A program that is the master in a pod; its streams go to files of the node."""

    def __init__(
        self,
        command: list[str],
        folder: Path,
        environment: Mapping[str, str],
        namespace: cluster.Namespace,
    ) -> None:
        number = len(list(folder.glob("out-*")))
        self._out, self._err = folder / f"out-{number}", folder / f"err-{number}"
        self._out.touch()
        self._err.touch()
        for path in (self._out, self._err):
            path.chmod(0o666)
        self._namespace = namespace
        self.pod = f"master-{number}"
        # Not the first process of its container, for that cannot be killed from inside. (Kubernetes
        # makes one dollar of two.)
        program = shlex.join(["python3", *command[1:]])
        inner = f"echo $$$$ >pid-{number}; exec {program} >out-{number} 2>err-{number}"
        # A kubelet may take long to tell of an end.
        tell = f"code=$?; echo $code >told; mv told exit-{number}; exit $code"
        container = {
            "name": "main",
            "image": cluster.master_image(),
            "imagePullPolicy": "IfNotPresent",
            "workingDir": str(folder),
            "command": ["sh", "-c", f"sh -c {shlex.quote(inner)}; {tell}"],
            "env": [
                {"name": name, "value": value}
                for name, value in {"PYTHONPATH": "/source", **environment}.items()
            ],
            "volumeMounts": [
                {"name": "source", "mountPath": "/source", "readOnly": True},
                {"name": "project", "mountPath": str(folder)},
            ],
        }
        body = {
            "metadata": {"name": self.pod},
            "spec": {
                "restartPolicy": "Never",
                "serviceAccountName": "fiber",
                "securityContext": {"runAsUser": 1000, "runAsGroup": 1000},
                "volumes": [
                    {"name": "source", "hostPath": {"path": str(ROOT / "src")}},
                    {"name": "project", "hostPath": {"path": str(folder)}},
                ],
                "containers": [container],
            },
        }
        self._pid, self._exit = folder / f"pid-{number}", folder / f"exit-{number}"
        self._exit_code: int | None = None
        self._asked = 0.0
        core().create_namespaced_pod(namespace.name, body)

    @property
    def exit_code(self) -> int | None:
        if self._exit_code is None and self._exit.exists():
            code = int(self._exit.read_text())
            self._exit_code = code if code < 128 else 128 - code  # a signal, as the shell has it
        if self._exit_code is None and time.monotonic() - self._asked > 1:
            self._asked = time.monotonic()
            if self.pod not in [pod.metadata.name for pod in self._namespace.pods()]:
                self._exit_code = -signal.SIGKILL  # deleted
        return self._exit_code

    def end(self, patience: float = PATIENCE) -> int:
        deadline = time.monotonic() + patience
        while self.exit_code is None:
            if time.monotonic() > deadline:
                self._dump()
                pytest.fail(f"After {patience:g} s it is still there. {self.all()}")
            time.sleep(0.05)
        return self.exit_code

    def _dump(self) -> None:
        self.signal(signal.SIGABRT)
        until(lambda: self.exit_code is not None, "ended by SIGABRT", patience=10)

    def signal(self, number: int) -> None:
        from kubernetes.stream import stream

        command = ["kill", f"-{int(number)}", self._pid.read_text().strip()]
        line = stream(
            core().connect_get_namespaced_pod_exec,
            self.pod,
            self._namespace.name,
            command=command,
            stderr=True,
            stdin=False,
            stdout=True,
            tty=False,
            _preload_content=False,
        )
        line.run_forever(timeout=10)
        said = line.read_all()
        line.close()
        line.sock.shutdown()  # which `close` leaves out if the other side was first
        assert not said, said

    def interrupt(self) -> None:
        self.signal(signal.SIGINT)

    def kill(self) -> None:
        if self.exit_code is None:
            self.signal(signal.SIGKILL)
            until(lambda: self.exit_code is not None, f"{self.pod} has ended")


KUBERNETES_SITES = {site.name: site for site in (Kubernetes, Relay, InPod)}
