"""What a pod looks like: pure functions from what is asked to a manifest.

    usual ◄── the master's pod ◄── the template ◄── what this job asks for
    (restricted profile)  (image, volumes, identity)  (all else)  (command, resources, secret)

Each layer lies over the one before it. Dicts are merged key by key, the lists that Kubernetes
itself merges by a key (containers, variables, volumes, mounts) by that key, other lists are
replaced.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fiber.backends.base import SECRET_FILE, JobSpec
from fiber.backends.kubernetes import detect
from fiber.errors import ConfigError

__all__ = [
    "CONTAINER",
    "OWNER",
    "Master",
    "Settings",
    "load_template",
    "master_of",
    "merged",
    "pod",
    "relay",
    "secret",
    "slug",
]

Object = dict[str, Any]

CONTAINER = "fiber"  # the container that the command runs in
OWNER = "fiber/master"  # the label of all that one process has made
SESSION = "fiber/session"
FAREWELL = "FIBER_INTERNAL_FAREWELL"
_LEAVE = "fiber.backends.kubernetes.farewell:leave"
_SECRETS = "/var/run/fiber"  # where the session's secret is mounted
_SECRET_KEY = "secret"
_USER = 1000  # any but root; the image need not know it
# By which key Kubernetes merges the lists of a pod.
_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "ownerReferences": "uid",
}

# What of a template is for the relay's pod, too.
_PLACES = (
    "affinity",
    "imagePullSecrets",
    "nodeSelector",
    "priorityClassName",
    "runtimeClassName",
    "schedulerName",
    "securityContext",
    "tolerations",
)


class Master(NamedTuple):
    """What the pod of the master hands on to its workers.

    Attributes:
        name, uid: of the pod.
        image: of its container.
        pod: the part of a pod's spec that workers get.
        container: the part of a container that workers get.
    """

    name: str
    uid: str
    image: str
    pod: Object
    container: Object


class Settings(NamedTuple):
    """What all pods of a process have in common.

    Attributes:
        owner: identifies the process that makes them.
        image, pull_policy: of the container.
        service_account: that was configured, empty if none was.
        gpu_resource: what a GPU is called in this cluster.
        cpu, memory: what is asked for where a job says nothing; memory in MB, or None.
        template: a pod as a dict.
        master: the pod that this process is in, None if it is in none.
    """

    owner: str
    image: str
    pull_policy: str = ""
    service_account: str = ""
    gpu_resource: str = "nvidia.com/gpu"
    cpu: int = 1
    memory: int | None = None
    template: Mapping[str, Any] = {}  # nobody changes it
    master: Master | None = None


def slug(text: str, length: int) -> str:
    """`text` as a part of a name or label: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:length].strip("-")


def pod(job: JobSpec, name: str, settings: Settings, secret_name: str = "") -> Object:
    """Return the manifest of a job's pod."""
    body = merged(_usual(settings), _handed_on(settings.master))
    body = merged(body, _template(settings.template))
    return merged(body, _asked(job, name, settings, secret_name))


def secret(name: str, value: bytes, session: str, settings: Settings) -> Object:
    """Return the manifest of a session's Secret."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": _metadata(name, session, settings),
        "data": {_SECRET_KEY: base64.b64encode(value).decode()},
    }


def _usual(settings: Settings) -> Object:
    """Underneath of all: what the "restricted" profile of Kubernetes' pod security asks for."""
    environment = []
    if settings.master is None:
        # Nobody has made a home for this user, and "/" is not to be written to.
        environment.append({"name": "HOME", "value": "/tmp"})
    return {
        "spec": {
            # Signals reach the command as they do elsewhere: the first process of a container would
            # ignore them, and would have to bury strangers.
            "shareProcessNamespace": True,
            "enableServiceLinks": False,
            # When the cluster itself deletes a pod, because its owner is gone.
            "terminationGracePeriodSeconds": 5,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": CONTAINER,
                    "env": environment,
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        }
    }


def _handed_on(master: Master | None) -> Object:
    if master is None:
        return {}
    return {"spec": {**master.pod, "containers": [{**master.container, "name": CONTAINER}]}}


def master_of(own: Mapping[str, Any], user: int, group: int) -> Master:
    """Return what the pod `own`, in which this process runs as `user`, hands on.

    Workers run as the user that the master runs as, for they share its volumes.
    """
    spec, metadata = own["spec"], own["metadata"]
    preferred = metadata.get("annotations", {}).get("kubectl.kubernetes.io/default-container")
    containers: list[Object] = spec["containers"]
    container = next((c for c in containers if c["name"] == preferred), containers[0])
    # Admission mounts each pod's own token again.
    mounts = [m for m in container.get("volumeMounts", ()) if m["mountPath"] != detect.FOLDER]
    mounted = {mount["name"] for mount in mounts}
    context = dict(spec.get("securityContext") or {})
    inner = dict(container.get("securityContext") or {})
    context.update({"runAsUser": user, "runAsGroup": group})
    if user == 0:
        # Not restricted, as the master is not: it may need what it has to read its volumes.
        context.update({"runAsNonRoot": False, "seccompProfile": context.get("seccompProfile")})
        inner.setdefault("capabilities", None)
        inner.setdefault("allowPrivilegeEscalation", None)
    for name in ("runAsUser", "runAsGroup", "runAsNonRoot"):
        inner.pop(name, None)
    shared: Object = {
        "volumes": [v for v in spec.get("volumes", ()) if v["name"] in mounted],
        "imagePullSecrets": spec.get("imagePullSecrets", []),
        "serviceAccountName": spec.get("serviceAccountName", ""),
        "securityContext": context,
    }
    own_container: Object = {"volumeMounts": mounts, "securityContext": inner}
    if container.get("workingDir"):
        own_container["workingDir"] = container["workingDir"]
    return Master(
        name=metadata["name"],
        uid=metadata["uid"],
        image=container["image"],
        pod={key: value for key, value in shared.items() if value},
        container={key: value for key, value in own_container.items() if value},
    )


def _template(template: Mapping[str, Any]) -> Object:
    """The template, its container under our name: the one that is called so, else its first."""
    spec = dict(template.get("spec") or {})
    containers = [dict(container) for container in spec.get("containers") or ()]
    if containers and not any(container.get("name") == CONTAINER for container in containers):
        containers[0]["name"] = CONTAINER
    if containers:
        spec["containers"] = containers
    return {**template, "spec": spec}


def load_template(value: object) -> Object:
    """Return the configured template: a dict, or the path of a YAML or JSON file.

    Raises:
        ConfigError: there is no such file, or no pod in it.
    """
    if value is None or value == "":
        return {}
    source = "kubernetes_template"
    if not isinstance(value, Mapping):
        import yaml  # comes with Kubernetes' client

        source = str(value)
        try:
            with open(source, encoding="utf-8") as file:
                value = yaml.safe_load(file)
        except (OSError, ValueError, yaml.YAMLError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(
                f"The pod template {source} (kubernetes_template) cannot be read: {text}"
            ) from error
    if isinstance(value, Mapping) and value.get("kind") == "PodTemplate":
        value = value.get("template")
    good = isinstance(value, Mapping) and isinstance(value.get("spec", {}), Mapping)
    if not good or value.get("kind", "Pod") != "Pod":  # type: ignore[attr-defined]
        raise ConfigError(
            f"The pod template in {source} is no pod: it must be a mapping with 'metadata' or "
            f"'spec', as in a manifest of kind Pod"
        )
    return json.loads(json.dumps(value, default=str))  # type: ignore[no-any-return]


def _asked(job: JobSpec, name: str, settings: Settings, secret_name: str) -> Object:
    """On top of all: what this job asks for."""
    environment: list[Object] = [
        {"name": key, "value": _literal(value)} for key, value in job.environment.items()
    ]
    environment += [
        {"name": detect.POD, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": detect.NAMESPACE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
        {"name": FAREWELL, "value": _LEAVE},
    ]
    container: Object = {
        "name": CONTAINER,
        "image": settings.image,
        "command": [_literal(word) for word in job.command],
        "args": [],
        "env": environment,
        "resources": _resources(job, settings),
    }
    spec: Object = {"restartPolicy": "Never", "containers": [container]}
    if settings.pull_policy:
        container["imagePullPolicy"] = settings.pull_policy
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if secret_name:
        environment += [
            {"name": SECRET_FILE, "value": f"{_SECRETS}/{_SECRET_KEY}"},
            {"name": detect.SECRET, "value": secret_name},
        ]
        volume = {"secretName": secret_name, "defaultMode": 0o444}
        spec["volumes"] = [{"name": "fiber-secret", "secret": volume}]
        mount = {"name": "fiber-secret", "mountPath": _SECRETS, "readOnly": True}
        container["volumeMounts"] = [mount]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(name, job.session, settings),
        "spec": spec,
    }


def _literal(text: str) -> str:
    """Kubernetes would put variables in for what looks like $(NAME), and one $ for two."""
    return text.replace("$", "$$")


def _resources(job: JobSpec, settings: Settings) -> Object:
    needs = job.resources
    requests: Object = {}
    limits: Object = {}
    if needs.cpu is not None:
        requests["cpu"] = limits["cpu"] = str(needs.cpu * job.processes)
    elif not _template_asks_for_cpu(settings.template):  # it may use what is free
        requests["cpu"] = str(settings.cpu * job.processes)
    memory = needs.memory or settings.memory
    if memory is not None:
        requests["memory"] = limits["memory"] = f"{memory * job.processes}Mi"
    if needs.gpu:
        requests[settings.gpu_resource] = limits[settings.gpu_resource] = str(
            needs.gpu * job.processes
        )
    return {"requests": requests, **({"limits": limits} if limits else {})}


def _template_asks_for_cpu(template: Mapping[str, Any]) -> bool:
    """Whether the template says how much of a CPU, perhaps less than one, a pod asks for."""
    containers = _template(template)["spec"].get("containers", ())
    ours: Object = next((one for one in containers if one.get("name") == CONTAINER), {})
    resources = ours.get("resources") or {}
    return any("cpu" in (resources.get(kind) or {}) for kind in ("requests", "limits"))


def _metadata(name: str, session: str, settings: Settings) -> Object:
    labels = {"app.kubernetes.io/managed-by": "fiber", OWNER: settings.owner}
    if slug(session, 63):
        labels[SESSION] = slug(session, 63)
    metadata: Object = {"name": name, "labels": labels}
    if settings.master is not None:
        # One and no more: with two, the cluster would wait until both are gone.
        metadata["ownerReferences"] = [
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": settings.master.name,
                "uid": settings.master.uid,
            }
        ]
    return metadata


def relay(name: str, command: Sequence[str], settings: Settings) -> Object:
    """Return the manifest of the relay's pod, which goes where the template wants pods to go."""
    template = _template(settings.template)
    spec = template["spec"]
    placed = {
        "metadata": template.get("metadata") or {},
        "spec": {key: spec[key] for key in _PLACES if key in spec},
    }
    container: Object = {
        "name": CONTAINER,
        "image": settings.image,
        "command": [_literal(word) for word in command],
        "resources": {
            "requests": {"cpu": "50m", "memory": "64Mi"},
            "limits": {"memory": "512Mi"},
        },
    }
    if settings.pull_policy:
        container["imagePullPolicy"] = settings.pull_policy
    ours: Object = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": _metadata(name, "", settings),
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [container],
        },
    }
    if settings.service_account:  # its image pull secrets
        ours["spec"]["serviceAccountName"] = settings.service_account
    return merged(merged(_usual(settings), placed), ours)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Object:
    """Lay one manifest over another. None removes what is underneath."""
    result: Object = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            result[key] = merged(below if isinstance(below, Mapping) else {}, value)
        elif isinstance(value, list) and key in _KEYS:
            result[key] = _merged_list(below if isinstance(below, list) else [], value, key)
        else:
            result[key] = value
    return result


def _merged_list(under: list[Object], over: list[Object], kind: str) -> list[Object]:
    key = _KEYS[kind]
    entries = {entry.get(key): entry for entry in under}
    for entry in over:
        name = entry.get(key)
        # A variable or a volume has one source, so it replaces the one of its name as a whole.
        below = entries.get(name, {}) if kind in ("containers", "initContainers") else {}
        entries[name] = merged(below, entry)
    return list(entries.values())
