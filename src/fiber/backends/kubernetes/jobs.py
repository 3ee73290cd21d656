"""A job of this backend: what is known of its pod, and what this process did to it.

    creation ─► created, refused ─┐
    watch ─► seen, vanished ──────┼─► KubernetesJob.status ─► backend.status
    backend ─► ours ──────────────┘

Once a job has ended, its status never changes again: what the cluster does to the pod afterwards,
such as its removal, says nothing of the job. All of it is called under the lock of the backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fiber.backends.base import JobState, JobStatus
from fiber.backends.kubernetes import failures

__all__ = ["KubernetesJob"]

_PULLS = 60.0  # seconds for which a registry may fail
_NOTICE = 60.0  # seconds that a node may take to notice a pod that it was given


class KubernetesJob:
    """A pod, or one that shall be.

    Attributes:
        body: the manifest that it is made from.
        tried: whether the API server was asked to make it, so that it may be there.
        ours: whether this process asked to delete it.
        status: how it is.
        gone: whether the pod is known to be there no more.
        log: its last lines, if they were asked for.
    """

    def __init__(self, name: str, body: dict[str, Any]) -> None:
        self._name = name
        self.body = body
        self.tried = False
        self.created = False
        self.ours = False
        self.status = JobStatus(JobState.PENDING)
        self.gone = False
        self.log: str | None = None
        self._uid = ""
        self._node = ""
        self._said = ""  # of its image, when it was first tried to pull
        self._pulled: float | None = None
        self._given: float | None = None  # to a node that has not noticed it yet

    @property
    def id(self) -> str:
        """The name of its pod."""
        return self._name

    @property
    def uid(self) -> str:
        """What the cluster calls its pod, empty as long as it has not been seen."""
        return self._uid

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.status.state is JobState.ENDED

    @property
    def requests(self) -> Mapping[str, Any]:
        """What its container asks for."""
        return self.body["spec"]["containers"][0]["resources"]["requests"]  # type: ignore[no-any-return]

    def refused(self, reason: str, message: str, *, final: bool) -> None:
        """The API server did not make the pod, for now or for good."""
        if not self.ended:
            state = JobState.ENDED if final else JobState.PENDING
            self.status = JobStatus(state, None, reason, "", message)

    def was_created(self) -> None:
        """The API server has made the pod."""
        if not self.created and not self.ended:  # the watch may have brought it before the answer
            self.status = JobStatus(JobState.PENDING)
        self.created = True

    def would_be_deleted(self, pod: Mapping[str, Any]) -> bool:
        """Whether the pod as it is now has ended because somebody deleted it."""
        open_ = not (self.ended or self.ours)
        return open_ and failures.read(pod).reason == "Deleted"

    def seen(self, pod: Mapping[str, Any], now: float, taken: str = "") -> None:
        """The watch has brought the pod as it is now; `taken`: who deleted it, if that is known."""
        self.created = True
        self._uid = pod["metadata"]["uid"]
        if self.ended:
            return
        status = failures.read(pod, ours=self.ours)
        self._node = status.node or self._node
        unnoticed = self._node and not pod["status"].get("startTime")
        self._given = (self._given or now) if unnoticed else None
        if status.reason == "Deleted" and taken:
            status = failures.gone(self._name, self._node, status.exit_code, taken)
        if status.reason == "ImagePull" and status.state is JobState.PENDING:
            status = self._waiting_for_image(pod, status, now)
        self.status = status

    def _waiting_for_image(
        self, pod: Mapping[str, Any], status: JobStatus, now: float
    ) -> JobStatus:
        """The kubelet tries again and again, and says why only in between."""
        if "Back-off" not in status.message:
            self._said = status.message
        if self._pulled is None:
            self._pulled = now
        state = JobState.ENDED if now - self._pulled > _PULLS else JobState.PENDING
        return status._replace(state=state, message=self._said or status.message)

    def look(self, now: float) -> None:
        """See whether the node that it was given to is there: for long the cluster says nothing."""
        if (
            self._given is not None
            and now - self._given > _NOTICE
            and not (self.ended or self.ours)
        ):
            self.status = failures.gone(self._name, self._node, None, "NodeLost")

    def vanished(self, reason: str = "Deleted") -> None:
        """The pod is there no more; `reason`: who took it, if it was not this process."""
        self.gone = True
        if self.ended:
            return
        if self.ours:
            self.status = JobStatus(JobState.ENDED, None, "", self._node)
        else:
            self.status = failures.gone(self._name, self._node, None, reason)
