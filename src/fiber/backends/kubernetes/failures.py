"""What became of a pod, in words: from the API server's objects to statuses and sentences.

    a pod's manifest and status ─► read ─► JobStatus: state, exit code, reason, node, sentence
    an error of the API server  ─► refusal, quota, away ─► a sentence with the cure

Pure functions. What needs memory (who deleted it, since when it waits) is told to them.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from fiber.backends.base import JobState, JobStatus
from fiber.backends.kubernetes.access import ApiError
from fiber.backends.kubernetes.rbac import COMMAND
from fiber.backends.kubernetes.spec import CONTAINER

__all__ = [
    "gone",
    "image_problem",
    "is_hopeless",
    "is_quota",
    "quantity",
    "read",
    "refusal",
    "unschedulable",
    "waits_for_account",
]

Object = Mapping[str, Any]

_IMAGE = frozenset(
    {
        "ErrImagePull",
        "ImagePullBackOff",
        "ErrImageNeverPull",
        "InvalidImageName",
        "ImageInspectError",
        "RegistryUnavailable",
    }
)
_HOPELESS_IMAGE = frozenset({"ErrImageNeverPull", "InvalidImageName"})
_HOPELESS_WORDS = re.compile(
    r"not found|manifest unknown|does not exist|denied|unauthorized|invalid reference", re.I
)
# What the container could not be made from; the kubelet would try for ever.
_HOPELESS_CONTAINER = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
)
# The words for a pod's end in its status and its conditions, and ours for them.
_TAKEN = {
    "Evicted": "Evicted",
    "EvictionByEvictionAPI": "Evicted",
    "TerminationByKubelet": "Evicted",
    "Preempting": "Preempted",
    "PreemptionByScheduler": "Preempted",
    "PreemptionByKubeScheduler": "Preempted",
    "DeletionByTaintManager": "NodeLost",
    "DeletionByPodGC": "NodeLost",
    "NodeLost": "NodeLost",
    "NodeShutdown": "Shutdown",
    "Shutdown": "Shutdown",
    "Terminated": "Shutdown",
}


def read(pod: Object, *, ours: bool = False) -> JobStatus:
    """Return the status of a pod that the API server knows; `ours`: we have asked to delete it."""
    status, node = pod.get("status") or {}, (pod.get("spec") or {}).get("nodeName") or ""
    name = pod["metadata"]["name"]
    deleted = bool(pod["metadata"].get("deletionTimestamp"))
    phase = status.get("phase", "Pending")
    container = _container(status)
    state = container.get("state") or {}
    ended = state.get("terminated")
    taken, said = _taken(status)
    if ended is not None or phase in ("Succeeded", "Failed"):
        code = _exit_code(ended) if ended is not None else None
        reason = (ended or {}).get("reason") or ""
        if reason == "OOMKilled":
            return JobStatus(JobState.ENDED, code, reason, node, _out_of_memory(pod, node))
        if taken:
            return JobStatus(
                JobState.ENDED, code, taken, node, _taken_away(name, node, taken, said)
            )
        if deleted and not ours:
            return gone(name, node, code)
        if code == 0 or ours:
            return JobStatus(JobState.ENDED, code, "", node)
        return JobStatus(
            JobState.ENDED, code, *_failed(name, node, code, reason, status, ended or {})
        )
    if _is_lost(status) and not ours:
        taken = taken or "NodeLost"
        return JobStatus(JobState.ENDED, None, taken, node, _taken_away(name, node, taken, said))
    if phase == "Unknown" and not ours:
        message = _taken_away(name, node, "NodeLost", said)
        return JobStatus(JobState.ENDED, None, "NodeLost", node, message)
    if state.get("running") is not None:
        return JobStatus(JobState.RUNNING, node=node)
    return _waiting(pod, node, state.get("waiting") or {})


def gone(name: str, node: str, code: int | None = None, reason: str = "Deleted") -> JobStatus:
    """Return the status of a pod that was there, and that somebody else took away."""
    return JobStatus(JobState.ENDED, code, reason, node, _taken_away(name, node, reason, ""))


def image_problem(image: str, reason: str, said: str) -> str:
    """What to say of an image that a node cannot get."""
    if reason == "ErrImageNeverPull":
        what = "is not on the node, and its pull policy is Never"
        cure = "load it there, or set kubernetes_pull_policy"
    elif reason == "InvalidImageName":
        what, cure = "has no valid name", "correct the config key image"
    else:
        what = "cannot be pulled" + (f" ({_short(said)})" if said else "")
        cure = (
            "correct the config key image, push it, or give the service account or the pod "
            "template an image pull secret"
        )
    return f"the image {image} {what}: {cure}"


def is_hopeless(reason: str, said: str) -> bool:
    """Whether trying again cannot help to get an image."""
    return reason in _HOPELESS_IMAGE or bool(_HOPELESS_WORDS.search(said))


def unschedulable(
    waiting: int, of: int, asked: Object, said: str, largest: Mapping[str, float] | None
) -> str:
    """What to say of pods that no node takes.

    Args:
        waiting, of: so many of so many pods.
        asked: the requests of each.
        said: by the scheduler.
        largest: what the node with most of it has free of each resource; None: nobody may know.
    """
    lacking = list(dict.fromkeys(re.findall(r"[Ii]nsufficient ([\w./-]*\w)", said)))
    pods = f"{waiting} of {of} pods wait" if of > 1 else "the pod waits"
    if not lacking:
        return f"{pods}: {_short(said)}"
    parts = []
    for name in lacking:
        part = f"insufficient {name}"
        if name in asked:
            part += f", {'each' if of > 1 else 'it'} asks {asked[name]}"
        if largest is not None and name in largest:
            part += f", the largest free is {_amount(name, largest[name])}"
        parts.append(part)
    return f"{pods}: {'; '.join(parts)}"


def is_quota(error: ApiError) -> bool:
    """Whether a quota was the reason."""
    return error.status == 403 and "exceeded quota" in error.message


def waits_for_account(error: ApiError) -> bool:
    """Whether a namespace is so new that its service accounts are not there yet."""
    return error.status == 403 and "error looking up service account" in error.message


def refusal(error: ApiError, doing: str, namespace: str, server: str) -> tuple[str, str]:
    """Return reason and sentence for an error of the API server while `doing` something."""
    said = _short(error.message)
    if error.status == 401:
        return "Unauthorized", (
            f"The cluster {server} does not accept this program's credentials ({said}): "
            f"log in again, or set kubernetes_context"
        )
    denied = re.search(r'cannot (\w+) resource "([\w/]+)"', error.message)
    if denied:
        return "Forbidden", (
            f"Not allowed to {denied[1]} {denied[2]} in the namespace {namespace} ({said}): "
            f"`{COMMAND} --namespace {namespace}` prints what grants it"
        )
    if is_quota(error):
        return "QuotaExceeded", f"the quota of the namespace {namespace} is used up: {said}"
    if error.status == 403:
        return "Forbidden", f"The cluster refused to {doing}: {said}"
    if error.status == 404:
        return "NotFound", (
            f"Cannot {doing}, {said}: create the namespace {namespace}, or set kubernetes_namespace"
        )
    if error.away:
        return "Unreachable", (
            f"The API server {server} does not answer ({said}): see that the cluster runs and that "
            f"KUBECONFIG or kubernetes_context names it"
        )
    return error.reason or "Invalid", f"The cluster refused to {doing}: {said}"


def quantity(text: object) -> float:
    """Return a quantity as a number: "250m", "1.5", "2Gi", "512"."""
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    if match is None:
        return 0.0
    scale = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    scale.update({"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40})
    return float(match[1]) * scale.get(match[2], 1.0)


def _container(status: Object) -> Object:
    found: Sequence[Object] = status.get("containerStatuses") or ()
    return next((c for c in found if c.get("name") == CONTAINER), {})


def _exit_code(ended: Object) -> int | None:
    code = ended.get("exitCode")
    if ended.get("signal"):
        return -int(ended["signal"])
    if code is None:
        return None
    if code > 128 and code - 128 in set(signal.Signals):
        return 128 - int(code)  # as shells write a signal
    return int(code)


def _taken(status: Object) -> tuple[str, str]:
    """Who took the pod away, in one word and in the cluster's words; empty if nobody did."""
    for condition in status.get("conditions") or ():
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            word = _TAKEN.get(condition.get("reason", ""))
            if word:
                return word, condition.get("message", "")
    word = _TAKEN.get(status.get("reason") or "")
    return (word, status.get("message") or "") if word else ("", "")


def _is_lost(status: Object) -> bool:
    """Whether the node of a running pod is gone: its controller then marks the pod as not ready.

    The containers are still said to be ready, for nobody was there to say otherwise; that tells it
    from a container that has ended.
    """
    states = {c["type"]: c["status"] for c in status.get("conditions") or ()}
    not_ready = states.get("Ready") == "False" and states.get("ContainersReady") == "True"
    return status.get("phase") == "Running" and not_ready


def _waiting(pod: Object, node: str, waiting: Object) -> JobStatus:
    status = pod.get("status") or {}
    reason, said = waiting.get("reason") or "", waiting.get("message") or ""
    if reason in _IMAGE:
        ended = is_hopeless(reason, said)
        state = JobState.ENDED if ended else JobState.PENDING
        return JobStatus(state, None, "ImagePull", node, image_problem(_image(pod), reason, said))
    if reason in _HOPELESS_CONTAINER:
        message = f"pod {pod['metadata']['name']} cannot be started: {_short(said) or reason}"
        if "non-root" in said or "run as root" in said:
            message += "; set runAsUser in the security context of kubernetes_template"
        return JobStatus(JobState.ENDED, None, reason, node, message)
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return JobStatus(
                JobState.PENDING, None, "Unschedulable", "", condition.get("message") or ""
            )
    return JobStatus(JobState.PENDING, node=node)


def _image(pod: Object) -> str:
    containers = pod["spec"]["containers"]
    return str(next((c["image"] for c in containers if c["name"] == CONTAINER), ""))


def _out_of_memory(pod: Object, node: str) -> str:
    containers = pod["spec"]["containers"]
    ours: Object = next((c for c in containers if c["name"] == CONTAINER), {})
    limit = ((ours.get("resources") or {}).get("limits") or {}).get("memory")
    what = f"more than its memory limit {limit}" if limit else "the memory of its node up"
    return (
        f"pod {pod['metadata']['name']}{_on(node)} used {what}: "
        f"give it more with @fiber.meta(memory=...)"
    )


def _taken_away(name: str, node: str, reason: str, said: str) -> str:
    pod = f"pod {name}{_on(node)}"
    detail = f": {_short(said)}" if said else ""
    if reason == "Evicted":
        return f"{pod} was evicted{detail}"
    if reason == "Preempted":
        return f"{pod} was preempted by pods of a higher priority{detail}"
    if reason == "NodeLost":
        return f"{pod} is lost, its node does not answer{detail}"
    if reason == "Shutdown":
        return f"{pod} ended as its node was shut down{detail}"
    return f"{pod} was deleted by somebody else"


def _failed(
    name: str, node: str, code: int | None, reason: str, status: Object, ended: Object
) -> tuple[str, str, str]:
    """Return reason, node and sentence for a command that failed, or that never ran."""
    said = ended.get("message") or status.get("message") or ""
    word = status.get("reason") or reason or "Error"
    how = "ended" if code is None else _ending(code)
    if word in ("ContainerCannotRun", "StartError"):
        how = "cannot run its command, is python3 in its image?"
        word = "StartError"
    elif word == "DeadlineExceeded":
        how = "ran longer than activeDeadlineSeconds of its template allows"
    message = f"pod {name}{_on(node)} {how}" + (f" ({_short(said)})" if said else "")
    return word, node, message


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _on(node: str) -> str:
    return f" on node {node}" if node else ""


def _amount(name: str, value: float) -> str:
    if name in ("memory", "ephemeral-storage"):
        return f"{value / 2**20:.0f}Mi"
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _short(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 400 else text[:400] + "..."
