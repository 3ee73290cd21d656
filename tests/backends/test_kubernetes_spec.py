"""Manifests of pods: the restricted profile, what is asked for, the template, the master's pod."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fiber.backends.base import SECRET_FILE, JobSpec
from fiber.backends.kubernetes import rbac, spec
from fiber.backends.kubernetes.spec import Settings
from fiber.errors import ConfigError
from fiber.resources import Resources

yaml = pytest.importorskip("yaml")

SETTINGS = Settings(owner="abc123", image="python:3.11-slim")
MASTER = {
    "metadata": {"name": "trainer", "uid": "u-1"},
    "spec": {
        "serviceAccountName": "fiber",
        "imagePullSecrets": [{"name": "registry"}],
        "securityContext": {"fsGroup": 2000},
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
            {"name": "other", "emptyDir": {}},
            {"name": "token-x", "secret": {"secretName": "token-x"}},
        ],
        "containers": [
            {
                "name": "main",
                "image": "team/trainer:7",
                "workingDir": "/app",
                "volumeMounts": [
                    {"name": "data", "mountPath": "/data"},
                    {
                        "name": "token-x",
                        "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
                    },
                ],
            },
            {"name": "sidecar", "image": "proxy:1"},
        ],
    },
}


def job(**changes: Any) -> JobSpec:
    plain = JobSpec("worker", ["python3", "-c", "pass"], {"A": "1"}, Resources(), "Ses-1")
    return plain._replace(**changes)


def container_of(pod: Mapping[str, Any]) -> dict[str, Any]:
    found: list[dict[str, Any]] = [c for c in pod["spec"]["containers"] if c["name"] == "fiber"]
    assert len(found) == 1
    return found[0]


def variables(pod: Mapping[str, Any]) -> dict[str, Any]:
    return {v["name"]: v.get("value", v.get("valueFrom")) for v in container_of(pod)["env"]}


def violations(pod: Mapping[str, Any]) -> Iterator[str]:
    """What the "restricted" profile of Kubernetes' Pod Security Standards has against a pod.

    As written at kubernetes.io/docs/concepts/security/pod-security-standards, baseline included.
    """
    inner = pod["spec"]
    outer = inner.get("securityContext") or {}
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if inner.get(name):
            yield name
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    for volume in inner.get("volumes", ()):
        kinds = set(volume) - {"name"}
        if not kinds <= allowed:
            yield f"volume {volume['name']} of kind {kinds}"
    if outer.get("sysctls"):
        yield "sysctls"
    if outer.get("runAsUser") == 0:
        yield "runAsUser of the pod is 0"
    for container in [*inner["containers"], *inner.get("initContainers", ())]:
        name, context = container["name"], container.get("securityContext") or {}
        if context.get("privileged"):
            yield f"{name}: privileged"
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: allowPrivilegeEscalation"
        capabilities = context.get("capabilities") or {}
        if "ALL" not in capabilities.get("drop", ()):
            yield f"{name}: capabilities are not dropped"
        if set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"{name}: capabilities are added"
        if not context.get("runAsNonRoot", outer.get("runAsNonRoot")):
            yield f"{name}: runAsNonRoot"
        if context.get("runAsUser") == 0:
            yield f"{name}: runAsUser is 0"
        profile = context.get("seccompProfile", outer.get("seccompProfile")) or {}
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{name}: seccompProfile"
        if context.get("procMount", "Default") != "Default":
            yield f"{name}: procMount"
        if any("hostPort" in port for port in container.get("ports", ())):
            yield f"{name}: hostPort"


# The restricted profile.


def test_a_pod_keeps_to_the_restricted_profile() -> None:
    pod = spec.pod(job(secret=b"s", resources=Resources(gpu=1)), "p", SETTINGS, "secret-1")
    assert list(violations(pod)) == []
    # An image whose user is root, as that of the stock Python, needs a number here.
    assert pod["spec"]["securityContext"]["runAsUser"] != 0


def test_the_relay_keeps_to_it_too() -> None:
    assert list(violations(spec.relay("r", ["python3"], SETTINGS))) == []


def test_a_pod_of_a_restricted_master_keeps_to_it() -> None:
    settings = SETTINGS._replace(master=spec.master_of(MASTER, 1234, 1234))
    pod = spec.pod(job(), "p", settings)
    assert list(violations(pod)) == []
    assert pod["spec"]["securityContext"]["runAsUser"] == 1234


def test_the_check_itself_finds_what_is_not_restricted() -> None:
    template = {
        "spec": {
            "hostNetwork": True,
            "volumes": [{"name": "etc", "hostPath": {"path": "/etc"}}],
            "securityContext": {"runAsUser": 0, "runAsNonRoot": None},
            "containers": [{"name": "c", "securityContext": {"privileged": True}}],
        }
    }
    found = list(violations(spec.pod(job(), "p", SETTINGS._replace(template=template))))
    assert len(found) == 5


# What is asked for.


@pytest.mark.parametrize(
    ("resources", "requests", "limits"),
    [
        (Resources(), {"cpu": "2", "memory": "300Mi"}, {"memory": "300Mi"}),
        (Resources(cpu=3), {"cpu": "3", "memory": "300Mi"}, {"cpu": "3", "memory": "300Mi"}),
        (
            Resources(cpu=1, memory="1Gi", gpu=2),
            {"cpu": "1", "memory": "1024Mi", "example.com/gpu": "2"},
            {"cpu": "1", "memory": "1024Mi", "example.com/gpu": "2"},
        ),
        (Resources(gpu=0), {"cpu": "2", "memory": "300Mi"}, {"memory": "300Mi"}),
    ],
)
def test_resources(resources: Resources, requests: dict[str, str], limits: dict[str, str]) -> None:
    settings = SETTINGS._replace(cpu=2, memory=300, gpu_resource="example.com/gpu")
    pod = spec.pod(job(resources=resources), "p", settings)
    assert container_of(pod)["resources"] == {"requests": requests, "limits": limits}


def test_nothing_is_limited_that_nobody_limited() -> None:
    assert container_of(spec.pod(job(), "p", SETTINGS))["resources"] == {"requests": {"cpu": "1"}}


def test_a_template_may_ask_for_less_than_a_cpu_where_the_program_asks_for_none() -> None:
    requests = {"cpu": "100m", "memory": "64Mi"}
    template = {"spec": {"containers": [{"name": "any", "resources": {"requests": requests}}]}}
    settings = SETTINGS._replace(template=template)
    assert container_of(spec.pod(job(), "p", settings))["resources"]["requests"] == requests
    asked = container_of(spec.pod(job(resources=Resources(cpu=2)), "p", settings))["resources"]
    assert asked["requests"] == {"cpu": "2", "memory": "64Mi"}
    assert asked["limits"] == {"cpu": "2"}


def test_labels_say_whose_it_is() -> None:
    metadata = spec.pod(job(session="Ses_1."), "p", SETTINGS)["metadata"]
    assert metadata["labels"] == {
        "app.kubernetes.io/managed-by": "fiber",
        "fiber/master": "abc123",
        "fiber/session": "ses-1",
    }
    assert "ownerReferences" not in metadata


def test_the_secret_is_in_a_file_and_nowhere_else() -> None:
    pod = spec.pod(job(secret=b"hush-hush"), "p", SETTINGS, "secret-1")
    text = json.dumps(pod)
    assert "hush" not in text
    assert "aHVzaC1odXNo" not in text
    (volume,) = pod["spec"]["volumes"]
    assert volume["secret"] == {"secretName": "secret-1", "defaultMode": 0o444}
    (mount,) = container_of(pod)["volumeMounts"]
    assert variables(pod)[SECRET_FILE].startswith(mount["mountPath"] + "/")
    body = spec.secret("secret-1", b"hush-hush", "ses", SETTINGS)
    assert body["data"] == {"secret": "aHVzaC1odXNo"}


# The template.


def test_a_template_is_underneath() -> None:
    template = {
        "metadata": {"labels": {"team": "a", "fiber/master": "evil"}, "annotations": {"x": "y"}},
        "spec": {
            "nodeSelector": {"disk": "ssd"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "priorityClassName": "low",
            "restartPolicy": "Always",
            "securityContext": {"runAsUser": 7},
            "volumes": [{"name": "cache", "emptyDir": {}}],
            "containers": [
                {
                    "name": "anything",
                    "image": "wrong",
                    "env": [{"name": "A", "valueFrom": {}}, {"name": "B", "value": "2"}],
                    "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
                    "resources": {"limits": {"ephemeral-storage": "1Gi"}},
                },
                {"name": "sidecar", "image": "proxy"},
            ],
        },
    }
    pod = spec.pod(job(secret=b"s"), "p", SETTINGS._replace(template=template), "secret-1")
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["labels"]["fiber/master"] == "abc123"
    assert pod["metadata"]["annotations"] == {"x": "y"}
    inner = pod["spec"]
    assert inner["nodeSelector"] == {"disk": "ssd"}
    assert inner["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert inner["priorityClassName"] == "low"
    assert inner["restartPolicy"] == "Never"
    assert inner["securityContext"]["runAsUser"] == 7
    assert [volume["name"] for volume in inner["volumes"]] == ["cache", "fiber-secret"]
    assert [container["name"] for container in inner["containers"]] == ["fiber", "sidecar"]
    container = container_of(pod)
    assert container["image"] == "python:3.11-slim"
    assert {"name": "A", "value": "1"} in container["env"]
    assert {"name": "B", "value": "2"} in container["env"]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [
        "/cache",
        "/var/run/fiber",
    ]
    assert container["resources"]["limits"] == {"ephemeral-storage": "1Gi"}


def test_a_template_can_take_away_what_is_usual() -> None:
    template = {
        "spec": {
            "shareProcessNamespace": None,
            "containers": [{"name": "fiber", "securityContext": {"capabilities": None}}],
        }
    }
    pod = spec.pod(job(), "p", SETTINGS._replace(template=template))
    assert "shareProcessNamespace" not in pod["spec"]
    assert container_of(pod)["securityContext"] == {"allowPrivilegeEscalation": False}


@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps])
def test_a_template_in_a_file(write: Any, tmp_path: Path) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"nodeSelector": {"a": "b"}}}
    (tmp_path / "pod.yaml").write_text(write(pod))
    assert spec.load_template(str(tmp_path / "pod.yaml")) == pod
    assert spec.load_template(pod) == pod
    assert spec.load_template(None) == {}


@pytest.mark.parametrize("text", [None, "a: [", "- 1\n", "kind: Deployment\nspec: {}\n", "spec: 3"])
def test_a_template_that_is_none(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "pod.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"pod\.yaml"):
        spec.load_template(str(path))


# The master's pod.


def test_what_the_master_hands_on() -> None:
    master = spec.master_of(MASTER, 1000, 1000)
    settings = SETTINGS._replace(master=master, image=master.image)
    pod = spec.pod(job(), "p", settings)
    assert container_of(pod)["image"] == "team/trainer:7"
    assert container_of(pod)["workingDir"] == "/app"
    assert container_of(pod)["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
    # Not the token, which admission adds again, nor what only the sidecar has.
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["data"]
    assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["spec"]["serviceAccountName"] == "fiber"
    assert pod["spec"]["securityContext"]["fsGroup"] == 2000
    assert [container["name"] for container in pod["spec"]["containers"]] == ["fiber"]


def test_exactly_one_owner() -> None:
    settings = SETTINGS._replace(master=spec.master_of(MASTER, 1000, 1000))
    owner = [{"apiVersion": "v1", "kind": "Pod", "name": "trainer", "uid": "u-1"}]
    for body in (
        spec.pod(job(), "p", settings),
        spec.secret("s", b"x", "ses", settings),
        spec.relay("r", ["python3"], settings),
    ):
        assert body["metadata"]["ownerReferences"] == owner


def test_workers_of_a_master_that_is_root_are_root() -> None:
    """They share its volumes, and so its rights on them."""
    settings = SETTINGS._replace(master=spec.master_of(MASTER, 0, 0))
    pod = spec.pod(job(), "p", settings)
    assert pod["spec"]["securityContext"] == {
        "fsGroup": 2000,
        "runAsUser": 0,
        "runAsGroup": 0,
        "runAsNonRoot": False,
    }
    assert "capabilities" not in container_of(pod)["securityContext"]


def test_the_container_that_is_marked_as_the_pods_own() -> None:
    own = json.loads(json.dumps(MASTER))
    own["metadata"]["annotations"] = {"kubectl.kubernetes.io/default-container": "sidecar"}
    assert spec.master_of(own, 1000, 1000).image == "proxy:1"


# The rights.


def test_the_manifest_is_for_one_namespace_and_grants_no_more_than_is_needed() -> None:
    account, role, binding = yaml.safe_load_all(rbac.manifest("team-a"))
    assert {part["metadata"]["namespace"] for part in (account, role, binding)} == {"team-a"}
    assert binding["subjects"][0] == {
        "kind": "ServiceAccount",
        "name": "fiber",
        "namespace": "team-a",
    }
    rights = {resource: rule["verbs"] for rule in role["rules"] for resource in rule["resources"]}
    assert not any("*" in [resource, *verbs] for resource, verbs in rights.items())
    assert rights["secrets"] == ["create", "delete"]


@pytest.mark.parametrize("name", ["", "Team", "a b", "a\nkind: x", "-a", "x" * 64])
def test_a_namespace_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        rbac.manifest(name)
