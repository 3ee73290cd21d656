"""What became of pods, in words: from what the API server says to what people read."""

from __future__ import annotations

from typing import Any

import pytest

from fiber.backends.base import BLAMELESS, JobState
from fiber.backends.kubernetes import failures
from fiber.backends.kubernetes.access import ApiError
from fiber.backends.kubernetes.capacity import largest_free
from fiber.backends.kubernetes.jobs import KubernetesJob


def pod(
    phase: str = "Running",
    state: dict[str, Any] | None = None,
    deleted: bool = False,
    conditions: dict[str, tuple[str, str, str]] | None = None,
    **status: Any,
) -> dict[str, Any]:
    """A pod on node n1, whose container is in `state`; conditions: type: (status, reason, text)."""
    metadata: dict[str, Any] = {"name": "p1", "uid": "u1"}
    if deleted:
        metadata["deletionTimestamp"] = "2024-01-01T00:00:00Z"
    container = {
        "name": "fiber",
        "image": "team/image:1",
        "resources": {"limits": {"memory": "512Mi"}, "requests": {"cpu": "1"}},
    }
    containers = [
        {"name": "sidecar", "state": {"terminated": {"exitCode": 1}}},
        {"name": "fiber", "state": state or {}},
    ]
    return {
        "metadata": metadata,
        "spec": {"nodeName": "n1", "containers": [container]},
        "status": {
            "phase": phase,
            "containerStatuses": containers,
            "conditions": [
                {"type": kind, "status": value, "reason": reason, "message": text}
                for kind, (value, reason, text) in (conditions or {}).items()
            ],
            **status,
        },
    }


def terminated(code: int, reason: str = "Error", **more: Any) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "reason": reason, **more}}


RUNNING = {"running": {"startedAt": "2024-01-01T00:00:00Z"}}
NOT_READY = {"Ready": ("False", "", ""), "ContainersReady": ("True", "", "")}


@pytest.mark.parametrize(
    ("given", "state"),
    [
        (pod("Pending"), JobState.PENDING),
        (pod("Pending", {"waiting": {"reason": "ContainerCreating"}}), JobState.PENDING),
        (pod("Running", RUNNING), JobState.RUNNING),
        # Deleted by somebody, and given time to end: it still runs.
        (pod("Running", RUNNING, deleted=True), JobState.RUNNING),
        (pod("Succeeded", terminated(0, "Completed")), JobState.ENDED),
    ],
)
def test_states(given: dict[str, Any], state: JobState) -> None:
    status = failures.read(given)
    assert (status.state, status.reason, status.message) == (state, "", "")


@pytest.mark.parametrize(
    ("code", "wanted", "text"),
    [
        (3, 3, "exit code 3"),
        (139, -11, "SIGSEGV"),
        (143, -15, "SIGTERM"),
        (128, 128, "exit code 128"),
        (250, 250, "exit code 250"),
    ],
)
def test_exit_codes(code: int, wanted: int, text: str) -> None:
    status = failures.read(pod("Failed", terminated(code)))
    assert (status.state, status.exit_code, status.reason) == (JobState.ENDED, wanted, "Error")
    assert text in status.message
    assert "pod p1 on node n1" in status.message


@pytest.mark.parametrize(
    ("given", "reason", "words"),
    [
        (pod("Failed", terminated(137, "OOMKilled")), "OOMKilled", ["512Mi", "memory="]),
        (
            pod("Failed", reason="Evicted", message="The node was low on resource: memory."),
            "Evicted",
            ["low on resource: memory"],
        ),
        (
            pod("Failed", terminated(137), reason="Preempting", message="to admit critical pod"),
            "Preempted",
            ["higher priority"],
        ),
        (
            pod(
                "Failed",
                terminated(137),
                deleted=True,
                conditions={"DisruptionTarget": ("True", "PreemptionByScheduler", "by rival")},
            ),
            "Preempted",
            ["by rival"],
        ),
        (
            pod(
                "Failed",
                terminated(143),
                deleted=True,
                conditions={"DisruptionTarget": ("True", "EvictionByEvictionAPI", "drained")},
            ),
            "Evicted",
            ["drained"],
        ),
        (pod("Failed", terminated(137), reason="NodeShutdown"), "Shutdown", ["shut down"]),
        (pod("Running", RUNNING, conditions=NOT_READY), "NodeLost", ["n1", "does not answer"]),
        (
            pod("Running", RUNNING, deleted=True, conditions=NOT_READY),
            "NodeLost",
            ["does not answer"],
        ),
        (pod("Unknown", RUNNING), "NodeLost", ["does not answer"]),
        (pod("Failed", terminated(137), deleted=True), "Deleted", ["somebody else"]),
        (
            pod("Failed", terminated(127, "ContainerCannotRun", message='exec: "x": not found')),
            "StartError",
            ['exec: "x": not found'],
        ),
        (
            pod("Failed", terminated(137), reason="DeadlineExceeded"),
            "DeadlineExceeded",
            ["activeDeadlineSeconds"],
        ),
        (pod("Failed", reason="OutOfcpu", message="Pod was rejected"), "OutOfcpu", ["rejected"]),
    ],
)
def test_ends(given: dict[str, Any], reason: str, words: list[str]) -> None:
    status = failures.read(given)
    assert (status.state, status.reason) == (JobState.ENDED, reason)
    for word in words:
        assert word in status.message


def test_what_this_process_ended_has_no_reason() -> None:
    status = failures.read(pod("Failed", terminated(143), deleted=True), ours=True)
    assert (status.exit_code, status.reason, status.message) == (-15, "", "")


def test_tasks_are_not_charged_for_what_was_taken_away() -> None:
    assert {"Deleted", "Evicted", "NodeLost", "Preempted", "Shutdown"} <= BLAMELESS


@pytest.mark.parametrize(
    ("reason", "said", "ends"),
    [
        ("ErrImageNeverPull", "not present with pull policy of Never", True),
        ("InvalidImageName", "couldn't parse image reference", True),
        ("ErrImagePull", "manifest for team/image:1 not found: manifest unknown", True),
        ("ErrImagePull", "pull access denied for team/image", True),
        ("ErrImagePull", "dial tcp 127.0.0.1:443: connect: connection refused", False),
        ("ImagePullBackOff", 'Back-off pulling image "team/image:1"', False),
    ],
)
def test_images(reason: str, said: str, ends: bool) -> None:
    given = pod("Pending", {"waiting": {"reason": reason, "message": said}})
    status = failures.read(given)
    assert status.reason == "ImagePull"
    assert status.state is (JobState.ENDED if ends else JobState.PENDING)
    assert "team/image:1" in status.message


def test_an_image_is_waited_for_a_minute_and_its_first_error_is_told() -> None:
    def tried(reason: str, said: str) -> dict[str, Any]:
        return pod("Pending", {"waiting": {"reason": reason, "message": said}})

    job = KubernetesJob("p1", {})
    job.seen(tried("ErrImagePull", "no route to host"), 100.0)
    job.seen(tried("ImagePullBackOff", "Back-off pulling image"), 130.0)
    assert job.status.state is JobState.PENDING
    assert "no route to host" in job.status.message
    job.seen(tried("ImagePullBackOff", "Back-off pulling image"), 161.0)
    assert job.ended
    assert "no route to host" in job.status.message


def test_a_node_that_does_not_notice_its_pod_is_lost() -> None:
    job = KubernetesJob("p1", {})
    job.seen(pod("Pending"), 100.0)
    job.look(159.0)
    assert job.status.state is JobState.PENDING
    job.seen(pod("Pending"), 150.0)
    job.look(161.0)
    assert (job.status.state, job.status.reason) == (JobState.ENDED, "NodeLost")
    assert "n1" in job.status.message

    pulls = KubernetesJob("p1", {})
    pulls.seen(pod("Pending"), 100.0)
    pulls.seen(pod("Pending", startTime="2024-01-01T00:00:00Z"), 150.0)
    pulls.look(1000.0)
    assert pulls.status.state is JobState.PENDING

    waits = pod("Pending")
    del waits["spec"]["nodeName"]
    queued = KubernetesJob("p1", {})
    queued.seen(waits, 100.0)
    queued.look(1000.0)
    assert queued.status.state is JobState.PENDING


def test_a_status_that_is_final_stays() -> None:
    job = KubernetesJob("p1", {})
    job.seen(pod("Failed", terminated(3)), 0.0)
    before = job.status
    job.seen(pod("Failed", terminated(3), deleted=True), 1.0)
    job.vanished()
    assert job.status == before


def test_a_watch_that_is_faster_than_the_answer() -> None:
    waiting = pod("Pending", conditions={"PodScheduled": ("False", "Unschedulable", "0/3 nodes")})
    job = KubernetesJob("p1", {})
    job.seen(waiting, 0.0)
    job.was_created()
    assert job.status.reason == "Unschedulable"


# Scheduling.


def test_what_keeps_pods_waiting() -> None:
    said = "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 3 Insufficient cpu."
    asked = {"cpu": "1", "nvidia.com/gpu": "2"}
    free = {"cpu": 0.9, "nvidia.com/gpu": 0.0}
    assert failures.unschedulable(8, 20, asked, said, free) == (
        "8 of 20 pods wait: insufficient nvidia.com/gpu, each asks 2, the largest free is 0; "
        "insufficient cpu, each asks 1, the largest free is 0.9"
    )
    assert failures.unschedulable(1, 1, {"memory": "2048Mi"}, "Insufficient memory", None) == (
        "the pod waits: insufficient memory, it asks 2048Mi"
    )
    taints = "0/3 nodes are available: 3 node(s) had taint {gpu: x}, that the pod didn't tolerate."
    assert failures.unschedulable(2, 2, {}, taints, None) == (f"2 of 2 pods wait: {taints[:-1]}")


def test_the_largest_free() -> None:
    nodes = [
        {
            "metadata": {"name": name},
            "spec": {"unschedulable": cordoned},
            "status": {"allocatable": {"cpu": cpu, "memory": "4Gi"}},
        }
        for name, cpu, cordoned in (("a", "2", False), ("b", "1900m", False), ("c", "64", True))
    ]
    pods = [
        {
            "spec": {
                "nodeName": name,
                "containers": [{"resources": {"requests": {"cpu": cpu, "memory": "1Gi"}}}],
            }
        }
        for name, cpu in (("a", "1500m"), ("b", "0.5"), ("b", "0.5"))
    ]
    found = largest_free(nodes, pods)
    assert found["cpu"] == pytest.approx(0.9)
    assert found["memory"] == 3 * 2**30


# Errors of the API server.


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (
            ApiError(
                403,
                "Forbidden",
                'pods is forbidden: User "system:serviceaccount:x:y" cannot create resource "pods" '
                'in API group "" in the namespace "x"',
            ),
            "Forbidden",
            ["create pods", "`fiber kubernetes manifest --namespace team`"],
        ),
        (
            ApiError(403, "Forbidden", 'pods "p" is forbidden: violates PodSecurity "restricted"'),
            "Forbidden",
            ["make pods", "PodSecurity"],
        ),
        (
            ApiError(403, "Forbidden", 'pods "p" is forbidden: exceeded quota: two, requested: 1'),
            "QuotaExceeded",
            ["team", "exceeded quota: two"],
        ),
        (ApiError(401, "Unauthorized", "Unauthorized"), "Unauthorized", ["credentials"]),
        (ApiError(404, "NotFound", 'namespaces "team" not found'), "NotFound", ["team"]),
        (ApiError(0, "Unreachable", "refused"), "Unreachable", ["https://c:6443", "KUBECONFIG"]),
        (ApiError(503, "ServiceUnavailable", "starting"), "Unreachable", ["starting"]),
        (ApiError(422, "Invalid", "spec.containers: Required"), "Invalid", ["spec.containers"]),
    ],
)
def test_refusals(error: ApiError, reason: str, words: list[str]) -> None:
    found, message = failures.refusal(error, "make pods", "team", "https://c:6443")
    assert found == reason
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "number"),
    [("250m", 0.25), ("1.5", 1.5), ("2Gi", 2 * 2**30), ("512", 512), ("1k", 1000), ("?", 0)],
)
def test_quantities(text: str, number: float) -> None:
    assert failures.quantity(text) == number
