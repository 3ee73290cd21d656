"""The Kubernetes backend: a job is a pod.

    submit ─► creation ─► API server ─► watch ─► jobs ─► status, wait
    terminate, kill ─► deletion, again later where the API server is away
    addresses ─► reach ─► the relay, if pods cannot reach this process
    close ─► deletes all by its label; `cleaner` does, if this process is killed

What a process has in the cluster is its *life*: it begins with the first use, ends with `close`,
and all that it makes bears its label.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from fiber.backends.base import Job, JobSpec, JobState, JobStatus
from fiber.backends.kubernetes import capacity, detect, failures, spec
from fiber.backends.kubernetes.access import Access, ApiError, Place
from fiber.backends.kubernetes.cleaner import Cleaner
from fiber.backends.kubernetes.creation import Creation, side_by_side
from fiber.backends.kubernetes.jobs import KubernetesJob
from fiber.backends.kubernetes.reach import Relay, bracketed, own_addresses
from fiber.backends.kubernetes.watch import Watch
from fiber.config import config
from fiber.errors import StartError

__all__ = ["KubernetesBackend"]

_AWAY = 5.0  # seconds of silence after which nothing is known of what runs
_CLOSE = 10.0  # seconds to delete what there is; after that it is the cleaner's work
_GRACE = 30  # seconds that a job has to end when it is terminated
_AGAIN = 1.0  # seconds between two attempts to delete

_log = logging.getLogger("fiber")


class KubernetesBackend:
    """Starts jobs as pods.

    Raises:
        ModuleNotFoundError: Kubernetes' client is not installed.
        StartError: no cluster is configured.
    """

    name = "kubernetes"
    elsewhere = True
    python: Sequence[str] = ("python3",)

    def __init__(self) -> None:
        self._place = Place(config.kubernetes_context, config.kubernetes_namespace or "")
        self._access = Access(self._place)
        self._lock = threading.Lock()
        self._current: _Life | None = None
        _backends.add(self)

    def submit(self, specs: Sequence[JobSpec]) -> list[Job]:
        """Make a pod for each spec."""
        return list(self._life().submit(specs))

    def status(self, jobs: Sequence[Job]) -> list[JobStatus]:
        """Return what the watch has brought."""
        life = self._current
        ours = [_ours(job) for job in jobs]
        return [job.status for job in ours] if life is None else life.status(ours)

    def wait(self, jobs: Sequence[Job], timeout: float) -> list[JobStatus]:
        """Wait until the watch says that one of the pods has ended."""
        life = self._current
        if life is None:
            return self.status(jobs)
        return life.wait([_ours(job) for job in jobs], timeout)

    def terminate(self, jobs: Sequence[Job]) -> None:
        """Delete the pods, with the time that they have to end."""
        if self._current is not None:
            self._current.delete([_ours(job) for job in jobs], grace=_GRACE)

    def kill(self, jobs: Sequence[Job]) -> None:
        """Delete the pods at once."""
        if self._current is not None:
            self._current.delete([_ours(job) for job in jobs], grace=0)

    def logs(self, job: Job, lines: int = 20) -> str:
        """Return the last lines that the pod wrote."""
        life = self._current
        return life.logs(_ours(job), lines) if life is not None else _ours(job).log or ""

    def addresses(self, port: int) -> list[str]:
        """Return this pod's address, or find out where pods reach this machine."""
        return self._life().addresses(port)

    def close(self) -> None:
        """Delete all pods and Secrets that this process has made."""
        with self._lock:
            life, self._current = self._current, None
        if life is not None:
            life.close()

    def _life(self) -> _Life:
        with self._lock:
            if self._current is None:
                self._current = _Life(self._access)
            return self._current

    def _forget(self) -> None:
        """After `os.fork`, in the child: threads and pods are the parent's."""
        self._lock = threading.Lock()
        life, self._current = self._current, None
        if life is not None:
            life.forget()
            self._access = Access(self._place)


class _Life:
    """What this process has in the cluster, from the first use of the backend to its end.

    Raises:
        StartError: the API server does not answer, or does not allow it.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        owner = os.urandom(5).hex()
        self._selector = f"{spec.OWNER}={owner}"
        self._lock = threading.Condition()
        self._jobs: dict[str, KubernetesJob] = {}
        self._secrets: dict[str, tuple[bytes, str]] = {}
        self._secrets_lock = threading.Lock()
        self._reached: dict[int, list[str]] = {}  # where pods reach a port directly
        self._count = 0
        self._relays: dict[int, Relay] = {}
        self._relay_lock = threading.Lock()
        self._undeleted: list[tuple[KubernetesJob, int]] = []
        self._deleting: threading.Thread | None = None
        self._closed = threading.Event()
        self._capacity = capacity.Capacity(access)
        try:
            self._settings = _settings(access, owner)
            self._creation = Creation(access, self._lock, self._lock.notify_all)
            self._watch = Watch(access, self._selector, self._seen, self._gone)
        except ApiError as error:
            raise StartError(self._words(error, "list pods")) from error
        try:
            self._cleaner: Cleaner | None = Cleaner(access.place, self._selector)
        except OSError as error:
            self._watch.close()
            raise StartError(
                f"The process that cleans up after this one cannot be started: {error.strerror}"
            ) from error

    def _words(self, error: ApiError, doing: str) -> str:
        access = self._access
        return failures.refusal(error, doing, access.namespace, access.server)[1]

    # jobs

    def submit(self, specs: Sequence[JobSpec]) -> list[KubernetesJob]:
        jobs = []
        secrets = {one.session: self._secret(one) for one in specs if one.secret}
        for one in specs:
            secret = secrets[one.session] if one.secret else ""
            with self._lock:
                self._count += 1
                number = self._count
            name = f"{self._prefix(one.session)}-{number}"
            jobs.append(KubernetesJob(name, spec.pod(one, name, self._settings, secret)))
        with self._lock:
            self._jobs.update((job.id, job) for job in jobs)
        try:
            self._creation.create(jobs)
        except BaseException:
            self.delete(jobs, grace=0)
            raise
        return jobs

    def _prefix(self, session: str) -> str:
        # Two programs may have sessions of the same name; the owner tells them apart.
        return f"fiber-{spec.slug(session, 30) or 'job'}-{self._settings.owner[:4]}".replace(
            "--", "-"
        )

    def _secret(self, one: JobSpec) -> str:
        """Return the name of the session's Secret, made at its first job.

        And again if it is gone: a pod that thought that this process had died may have removed it.
        """
        with self._secrets_lock:
            known, name = self._secrets.get(one.session, (b"", ""))
            first = known != one.secret
            if first:
                name = f"{self._prefix(one.session)}-secret-{os.urandom(3).hex()}"
                if self._cleaner is not None:
                    self._cleaner.remember(name)
            try:
                self._access.create_secret(
                    spec.secret(name, one.secret, one.session, self._settings)
                )
            except ApiError as error:
                if first:
                    raise StartError(self._words(error, "make a Secret")) from error
                # It is there, or nobody can tell now.
            self._secrets[one.session] = one.secret, name
            return name

    def status(self, jobs: Sequence[KubernetesJob]) -> list[JobStatus]:
        with self._lock:
            statuses = [self._status(job) for job in jobs]
        if any(status.reason == "Unschedulable" for status in statuses):
            statuses = [
                self._explained(job, status) if status.reason == "Unschedulable" else status
                for job, status in zip(jobs, statuses, strict=True)
            ]
        return statuses

    def _status(self, job: KubernetesJob) -> JobStatus:
        away = self._watch.away
        if away is None:
            job.look(time.monotonic())
        if job.ended or not job.created or away is None or time.monotonic() - away < _AWAY:
            return job.status
        message = f"the API server {self._access.server} does not answer"
        return JobStatus(JobState.UNKNOWN, None, "Unreachable", job.status.node, message)

    def _explained(self, job: KubernetesJob, status: JobStatus) -> JobStatus:
        with self._lock:
            alive = [job for job in self._jobs.values() if not job.ended]
            waiting = sum(job.status.reason == "Unschedulable" for job in alive)
        message = failures.unschedulable(
            waiting, len(alive), job.requests, status.message, self._capacity.largest_free()
        )
        return status._replace(message=message)

    def wait(self, jobs: Sequence[KubernetesJob], timeout: float) -> list[JobStatus]:
        with self._lock:
            self._lock.wait_for(lambda: any(job.ended for job in jobs), timeout)
        return self.status(jobs)

    def delete(self, jobs: Sequence[KubernetesJob], grace: int) -> None:
        with self._lock:
            todo = []
            for job in jobs:
                # One that has ended keeps its pod, and with it its log, until it is killed.
                if job.gone or (grace and (job.ended or job.ours)):
                    continue
                job.ours = True
                if job.tried:
                    todo.append(job)
                else:
                    job.vanished()
            self._lock.notify_all()

        def attempt(job: KubernetesJob) -> None:
            if job.status.exit_code and job.log is None:
                self.logs(job, 20)  # soon there is none
            try:
                self._access.delete_pod(job.id, grace)
            except ApiError as error:
                if not error.away:
                    raise
                self._delete_later(job, grace)
                return
            if grace == 0:
                with self._lock:
                    job.vanished()
                    self._lock.notify_all()
                self._creation.try_again()

        errors = side_by_side(attempt, todo)
        for error in errors:
            if isinstance(error, ApiError):
                raise StartError(self._words(error, "delete pods")) from error
            raise error

    def _delete_later(self, job: KubernetesJob, grace: int) -> None:
        with self._lock:
            if grace == 0:
                job.vanished()  # for the program it has ended; the pod will follow
                self._lock.notify_all()
            self._undeleted.append((job, grace))
            if self._deleting is None and not self._closed.is_set():
                self._deleting = threading.Thread(
                    target=self._delete_again, name="fiber-kubernetes-delete", daemon=True
                )
                self._deleting.start()

    def _delete_again(self) -> None:
        while not self._closed.wait(_AGAIN):
            with self._lock:
                if not self._undeleted:
                    self._deleting = None
                    return
                todo, self._undeleted = self._undeleted, []
            for job, grace in todo:
                try:
                    self._access.delete_pod(job.id, grace)
                except ApiError as error:
                    if error.away:
                        with self._lock:
                            self._undeleted.append((job, grace))

    def logs(self, job: KubernetesJob, lines: int) -> str:
        if not job.gone and job.created:
            try:
                text = self._access.log(job.id, lines)
            except ApiError:
                pass
            else:
                job.log = text
        return "\n".join((job.log or "").splitlines()[-lines:])

    # what the watch brings

    def _seen(self, pod: dict[str, Any]) -> None:
        name = pod["metadata"]["name"]
        unwanted, taken = None, ""
        with self._lock:
            job = self._jobs.get(name)
        uid = pod["metadata"]["uid"]
        if job is not None and job.would_be_deleted(pod):
            taken = self._taken_by().get(uid, "")
        with self._lock:
            if job is not None and not job.gone:
                job.seen(pod, time.monotonic(), taken)
                going_on = pod["status"].get("phase") not in ("Succeeded", "Failed")
                if job.ended and not job.ours and job.status.exit_code is None and going_on:
                    unwanted = job  # it has ended for us, and the cluster would go on trying
                    job.ours = True
                self._lock.notify_all()
        for relay in list(self._relays.values()):
            if relay.name == name:
                relay.seen(pod)
        if unwanted is not None:
            with contextlib.suppress(ApiError):
                self._access.delete_pod(name, 0)

    def _gone(self, pods: list[dict[str, Any]]) -> None:
        with self._lock:
            jobs = [self._jobs.get(pod["metadata"]["name"]) for pod in pods]
            unknown = [job for job in jobs if job and not (job.ended or job.ours)]
        reasons = self._taken_by() if unknown else {}
        with self._lock:
            for job in jobs:
                if job is not None:
                    job.vanished(reasons.get(job.uid, "Deleted"))
            self._lock.notify_all()
        names = {pod["metadata"]["name"] for pod in pods}
        for relay in list(self._relays.values()):
            if relay.name in names:
                relay.vanished()
        self._creation.try_again()

    def _taken_by(self) -> dict[str, str]:
        """Who deleted which pods (by uid), as far as the cluster's events say."""
        found = {}
        for event, reason in (("Preempted", "Preempted"), ("TaintManagerEviction", "NodeLost")):
            with contextlib.suppress(ApiError):
                for entry in self._access.events(f"reason={event}"):
                    found[entry["involvedObject"].get("uid", "")] = reason
        return found

    # addresses

    def addresses(self, port: int) -> list[str]:
        if self._settings.master is not None:
            return [bracketed(self._access.source_address(), port)]
        mode = config.kubernetes_relay
        direct = [bracketed(host, port) for host in own_addresses(self._access)]
        if mode == "never":
            if not direct:
                raise StartError(
                    "This machine has no address that pods could reach: set the config key "
                    "address, or kubernetes_relay to 'auto'"
                )
            return direct
        with self._relay_lock:
            if port in self._reached:
                return self._reached[port]
            relay = self._relays.get(port)
            if relay is not None and not relay.is_there:
                self._drop_relay(port)
                relay = None
            if relay is None:
                relay = self._start_relay(port, direct if mode == "auto" else [])
            try:
                found = relay.addresses(config.start_timeout)
            except StartError:
                self._drop_relay(port)
                raise
            if not relay.is_there:
                self._drop_relay(port)  # pods reach us without it
                self._reached[port] = found
            return found

    def _start_relay(self, port: int, candidates: list[str]) -> Relay:
        with self._lock:
            self._count += 1
            name = f"fiber-relay-{self._settings.owner}-{self._count}"
        relay = Relay(self._access, self._settings, name, port, candidates)
        self._relays[port] = relay
        try:
            relay.start()
        except ApiError as error:
            del self._relays[port]
            raise StartError(self._words(error, "make the relay's pod")) from error
        return relay

    def _drop_relay(self, port: int) -> None:
        relay = self._relays.pop(port)
        relay.close()
        with contextlib.suppress(ApiError):  # else it goes at the end
            self._access.delete_pod(relay.name, 0)

    # the end

    def close(self) -> None:
        self._closed.set()
        self._creation.close()
        for relay in self._relays.values():
            relay.close()
        with self._lock:
            deleting = self._deleting
        if deleting is not None:
            deleting.join(30)
        clean = self._delete_all()
        self._watch.close()
        with self._lock:
            for job in self._jobs.values():
                job.ours = True
                job.vanished()
            self._lock.notify_all()
        self._access.close()
        if self._cleaner is not None:
            if clean:
                self._cleaner.dismiss()
            else:
                self._cleaner.leave()
            self._cleaner = None

    def _delete_all(self) -> bool:
        """Return whether nothing is left that the cluster would let us delete."""
        deadline = time.monotonic() + _CLOSE
        while True:
            try:
                for _, name in self._secrets.values():
                    self._access.delete_secret(name)
                self._access.delete_pods(self._selector)
                return True
            except ApiError as error:
                if not error.away:
                    _log.warning("%s", self._words(error, "delete pods"))
                    return False
                if time.monotonic() > deadline:
                    _log.warning(
                        "%s; its pods will be deleted when it does",
                        self._words(error, "delete pods"),
                    )
                    return False
                time.sleep(_AGAIN)

    def forget(self) -> None:
        if self._cleaner is not None:
            self._cleaner.forget()
            self._cleaner = None


def _settings(access: Access, owner: str) -> spec.Settings:
    """What all pods have in common, from the configuration and from the master's own pod.

    Raises:
        ApiError: the master's pod cannot be read.
    """
    master = None
    if access.in_pod:
        try:
            own = access.pod(detect.own_pod())
            master = spec.master_of(own, os.getuid(), os.getgid())
        except ApiError as error:
            if error.status != 404:  # a pod whose host name is not its own
                raise
    version = ".".join(map(str, sys.version_info[:2]))
    return spec.Settings(
        owner=owner,
        image=config.image or (master.image if master else f"python:{version}-slim"),
        pull_policy=config.kubernetes_pull_policy or "",
        service_account=config.kubernetes_service_account or "",
        gpu_resource=config.kubernetes_gpu_resource,
        cpu=config.cpu_per_job,
        memory=config.mem_per_job,
        template=spec.load_template(config.kubernetes_template),
        master=master,
    )


def _ours(job: Job) -> KubernetesJob:
    assert isinstance(job, KubernetesJob)
    return job


_backends: weakref.WeakSet[KubernetesBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_backends):
        backend._forget()


os.register_at_fork(after_in_child=_after_fork)
