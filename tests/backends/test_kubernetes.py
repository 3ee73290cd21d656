"""The kubernetes backend on a real cluster: what every backend does, and failures in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("kubernetes")

from tests.backends import kubernetes_cluster as cluster
from tests.backends.kubernetes_cluster import Namespace, core, until

from fiber.backends.base import BLAMELESS, Backend, Job, JobSpec, JobState, JobStatus
from fiber.backends.kubernetes import KubernetesBackend, rbac
from fiber.config import config
from fiber.errors import StartError
from fiber.resources import Resources
from fiber.testing import BackendConformance

SLEEP = "import time; time.sleep(300)"


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


def spec(program: str, **resources: Any) -> JobSpec:
    return JobSpec(
        "job", ["python3", "-c", program], {}, Resources(**resources), "tests", b"hush-hush"
    )


def status_of(backend: Backend, job: Job, wanted: Callable[[JobStatus], bool]) -> JobStatus:
    def look() -> JobStatus | None:
        (status,) = backend.status([job])
        return status if wanted(status) else None

    found: JobStatus = until(look, f"what is wanted of {backend.status([job])}")
    return found


def running(backend: Backend, *jobs: Job) -> None:
    for job in jobs:
        status_of(backend, job, lambda status: status.state is JobState.RUNNING)


def ended(backend: Backend, job: Job) -> JobStatus:
    (status,) = backend.wait([job], cluster.PATIENCE)
    assert status.state is JobState.ENDED
    return status


class TestConformance(BackendConformance):
    @pytest.fixture
    def backend(self, namespace: Namespace) -> Iterator[Backend]:
        with cluster.new_backend() as made:
            yield made


# What is in the cluster.


def test_requests_and_limits_are_what_was_asked(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    backend.submit([spec(SLEEP, cpu=1, memory=96, gpu=2)])
    (pod,) = namespace.pods()
    (container,) = pod.spec.containers
    wanted = {"cpu": "1", "memory": "96Mi", "nvidia.com/gpu": "2"}
    assert container.resources.requests == container.resources.limits == wanted


def test_the_secret_is_in_no_pod(namespace: Namespace, backend: KubernetesBackend) -> None:
    program = "import os; print(open(os.environ['FIBER_INTERNAL_SECRET_FILE']).read(), os.getuid())"
    (job,) = backend.submit([spec(program)])
    assert ended(backend, job).exit_code == 0
    assert backend.logs(job) == "hush-hush 1000"
    (pod,) = namespace.pods()
    assert "hush" not in str(pod)
    assert len(namespace.secrets()) == 1


def test_close_leaves_nothing(namespace: Namespace, backend: KubernetesBackend) -> None:
    jobs = backend.submit([spec("pass"), spec(SLEEP), spec(SLEEP)])
    running(backend, *jobs[1:])
    backend.kill(jobs[1:2])
    backend.close()
    namespace.becomes_empty()
    assert [status.state for status in backend.status(jobs)] == [JobState.ENDED] * 3


# Failures.


def test_out_of_memory_names_the_limit(namespace: Namespace, backend: KubernetesBackend) -> None:
    program = "x = []\nwhile True: x.append(bytearray(b'x' * 2**20))"
    (job,) = backend.submit([spec(program, memory=64)])
    status = ended(backend, job)
    assert status.reason == "OOMKilled"
    assert status.exit_code == -9
    assert status.node.startswith("node-")
    assert "64Mi" in status.message
    assert "@fiber.meta(memory=" in status.message
    assert job.id in status.message


def test_an_error_tells_its_exit_code_and_its_last_lines(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    (job,) = backend.submit([spec("raise ValueError('out of luck')")])
    status = ended(backend, job)
    assert (status.reason, status.exit_code) == ("Error", 1)
    assert "exit code 1" in status.message
    backend.kill([job])  # and they are still known
    assert backend.logs(job).splitlines()[-1] == "ValueError: out of luck"


def test_unschedulable_pods_wait_and_say_for_what(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    jobs = backend.submit([spec(SLEEP, cpu=1000), spec(SLEEP, cpu=1000), spec("pass")])
    assert ended(backend, jobs[2]).exit_code == 0
    status = status_of(backend, jobs[0], lambda status: status.reason == "Unschedulable")
    assert status.state is JobState.PENDING
    assert "2 of 2 pods wait: insufficient cpu, each asks 1000, the largest free is" in (
        status_of(backend, jobs[1], lambda status: "2 of" in status.message).message
    )


def test_an_image_that_is_not_there_ends_the_job(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    config.init(image="local/no-such-image:1", kubernetes_pull_policy="Never")
    (job,) = backend.submit([spec("pass")])
    status = ended(backend, job)
    assert status.reason == "ImagePull"
    assert "local/no-such-image:1" in status.message
    assert "kubernetes_pull_policy" in status.message
    until(lambda: not namespace.pods(), "no pod that tries for ever")


def test_a_registry_that_does_not_answer_is_waited_for(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    config.init(image="127.0.0.1:1/team/worker:1", kubernetes_pull_policy="Always")
    (job,) = backend.submit([spec("pass")])
    status = status_of(backend, job, lambda status: bool(status.reason))
    assert (status.state, status.reason) == (JobState.PENDING, "ImagePull")
    assert "127.0.0.1:1/team/worker:1" in status.message


def test_a_quota_delays_and_says_so(namespace: Namespace, backend: KubernetesBackend) -> None:
    quota = {"metadata": {"name": "two"}, "spec": {"hard": {"pods": "2"}}}
    core().create_namespaced_resource_quota(namespace.name, quota)
    until(
        lambda: core().read_namespaced_resource_quota("two", namespace.name).status.hard,
        "a quota that is in force",
    )
    jobs = backend.submit([spec(SLEEP) for _ in range(3)])
    statuses = backend.status(jobs)
    (late,) = [
        job for job, status in zip(jobs, statuses, strict=True) if status.reason == "QuotaExceeded"
    ]
    (status,) = backend.status([late])
    assert status.state is JobState.PENDING
    assert namespace.name in status.message
    early = [job for job in jobs if job is not late]
    running(backend, *early)
    backend.kill(early[:1])
    running(backend, late)


def test_a_pod_that_somebody_deletes(namespace: Namespace, backend: KubernetesBackend) -> None:
    forced, gently, ours = backend.submit([spec(SLEEP), spec(SLEEP), spec(SLEEP)])
    running(backend, forced, gently, ours)
    begin = time.monotonic()
    namespace.delete(forced.id)
    status = ended(backend, forced)
    assert time.monotonic() - begin < 2
    assert status.reason == "Deleted"
    assert status.reason in BLAMELESS
    assert "somebody else" in status.message
    namespace.delete(gently.id, grace=5)
    assert ended(backend, gently).reason == "Deleted"
    backend.kill([ours])
    assert ended(backend, ours).reason == ""


def test_evicted_by_the_node(namespace: Namespace, backend: KubernetesBackend) -> None:
    """As the kubelet writes it; a node of the test bed has no memory that could run out."""
    (job,) = backend.submit([spec(SLEEP, cpu=1000)])
    status_of(backend, job, lambda status: status.reason == "Unschedulable")
    said = "The node was low on resource: memory."
    core().patch_namespaced_pod_status(
        job.id,
        namespace.name,
        {"status": {"phase": "Failed", "reason": "Evicted", "message": said}},
    )
    status = ended(backend, job)
    assert status.reason == "Evicted"
    assert status.reason in BLAMELESS
    assert "low on resource: memory" in status.message


def test_preempted_by_a_higher_priority(
    namespace: Namespace, backend: KubernetesBackend, request: pytest.FixtureRequest
) -> None:
    from kubernetes import client

    scheduling = client.SchedulingV1Api(core().api_client)
    name = namespace.name
    scheduling.create_priority_class({"metadata": {"name": name}, "value": 1000})
    request.addfinalizer(lambda: scheduling.delete_priority_class(name))
    node = core().list_node().items[0]
    share = f"{float(node.status.allocatable['cpu']) * 0.6:.1f}"
    config.kubernetes_template = {"spec": {"nodeName": None, "nodeSelector": node_selector(node)}}
    backend.close()
    (job,) = backend.submit([spec(SLEEP, cpu=1)])
    running(backend, job)
    rival = cluster_pod("rival", share, node)
    rival["spec"]["priorityClassName"] = name
    core().create_namespaced_pod(name, rival)
    status = status_of(backend, job, lambda status: status.state is JobState.ENDED)
    assert status.reason == "Preempted"
    assert "preempted" in status.message


def node_selector(node: Any) -> dict[str, str]:
    return {"kubernetes.io/hostname": node.metadata.labels["kubernetes.io/hostname"]}


def cluster_pod(name: str, cpu: str, node: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "spec": {
            "nodeSelector": node_selector(node),
            "containers": [
                {
                    "name": "main",
                    "image": cluster.IMAGE,
                    "command": ["sleep", "300"],
                    "resources": {"requests": {"cpu": cpu}},
                }
            ],
        },
    }


# Refusals.


def refused(backend: Backend, specs: Sequence[JobSpec]) -> str:
    with pytest.raises(StartError) as caught:
        backend.submit(specs)
    return str(caught.value)


def test_a_spec_that_the_cluster_refuses(namespace: Namespace, backend: KubernetesBackend) -> None:
    config.kubernetes_template = {"spec": {"priorityClassName": "no-such-class"}}
    backend.close()
    assert "no-such-class" in refused(backend, [spec("pass"), spec("pass")])
    assert namespace.pods() == []


def test_a_namespace_that_is_not_there(namespace: Namespace) -> None:
    config.kubernetes_namespace = "no-such-namespace"
    with cluster.new_backend() as backend:
        message = refused(backend, [spec("pass")])
        assert "no-such-namespace" in message
        assert "kubernetes_namespace" in message


def test_a_service_account_that_is_not_there(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    config.kubernetes_service_account = "nobody"
    assert "nobody" in refused(backend, [spec("pass")])
    assert namespace.pods() == []


def account_config(namespace: Namespace, path: Any, name: str) -> None:
    """Let this process be a service account of the namespace."""
    import base64

    import yaml

    def token() -> str:
        found = core().list_namespaced_secret(namespace.name).items
        for secret in found:
            about = secret.metadata.annotations or {}
            if about.get("kubernetes.io/service-account.name") == name and secret.data:
                return base64.b64decode(secret.data["token"]).decode()
        return ""

    settings = core().api_client.configuration
    with open(settings.ssl_ca_cert, "rb") as file:
        authority = base64.b64encode(file.read()).decode()
    server = {"server": settings.host, "certificate-authority-data": authority}
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "c", "cluster": server}],
                "users": [{"name": "u", "user": {"token": until(token, f"a token of {name}")}}],
                "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                "current-context": "x",
            }
        )
    )


def test_without_rights_it_says_which_and_how_to_get_them(
    namespace: Namespace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core()  # with the administrator's
    account_config(namespace, tmp_path / "config", "default")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with cluster.new_backend() as backend:
        message = refused(backend, [spec("pass")])
    assert "list pods" in message
    assert f"{rbac.COMMAND} --namespace {namespace.name}" in message


def test_the_manifests_rights_are_enough(
    namespace: Namespace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core()
    cluster.apply_rights(namespace)
    account_config(namespace, tmp_path / "config", "fiber")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    config.kubernetes_relay = "always"
    with cluster.new_backend() as backend:
        jobs = backend.submit([spec("print('here')"), spec(SLEEP), spec(SLEEP, cpu=1000)])
        assert ended(backend, jobs[0]).exit_code == 0
        assert backend.logs(jobs[0]) == "here"
        status = status_of(backend, jobs[2], lambda status: status.reason == "Unschedulable")
        # How much is free only those know who may look at the nodes.
        assert status.message.endswith("insufficient cpu, each asks 1000")
        assert backend.addresses(1)
        namespace.delete(jobs[1].id)
        assert ended(backend, jobs[1]).reason == "Deleted"
    namespace.becomes_empty()


def test_a_secret_that_somebody_deleted_is_made_again(
    namespace: Namespace, backend: KubernetesBackend
) -> None:
    backend.submit([spec(SLEEP)])
    (name,) = namespace.secrets()
    core().delete_namespaced_secret(name, namespace.name)
    assert not namespace.secrets()
    (job,) = backend.submit([spec("pass")])
    assert ended(backend, job).exit_code == 0
    assert namespace.secrets() == [name]
