"""Pods are made: side by side, and again when the cluster refused them for now.

    create(jobs) ─► first attempts, some at a time ─► made
                          ├─► refused for good: raised
                          └─► refused for now ─► a thread that tries again ─► made, or the job ends

A quota that is used up refuses all pods alike, so the thread tries one of them, with a growing
pause, and the others only when that one was made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from fiber.backends.kubernetes import failures
from fiber.backends.kubernetes.access import Access, ApiError
from fiber.backends.kubernetes.jobs import KubernetesJob
from fiber.errors import StartError

__all__ = ["Creation", "side_by_side"]

_AT_ONCE = 8
_FIRST, _LAST = 0.25, 8.0  # seconds between two attempts
_ACCOUNT_ATTEMPTS = 8  # for the service account of a new namespace


def side_by_side(
    function: Callable[[KubernetesJob], None], jobs: Sequence[KubernetesJob]
) -> list[BaseException]:
    """Call `function` for each job, some at a time; return what they raised."""
    errors: list[BaseException] = []

    def call(job: KubernetesJob) -> None:
        try:
            function(job)
        except BaseException as error:
            errors.append(error)

    if len(jobs) < 2:
        for job in jobs:
            call(job)
        return errors
    todo = iter(jobs)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                job = next(todo, None)
            if job is None:
                return
            call(job)

    threads = [
        threading.Thread(target=work, name="fiber-kubernetes-call", daemon=True)
        for _ in range(min(_AT_ONCE, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


class Creation:
    """Makes pods.

    Args:
        lock: that of the backend, under which jobs are changed.
        changed: called, under the lock, when a job has changed.
    """

    def __init__(
        self, access: Access, lock: threading.Condition, changed: Callable[[], None]
    ) -> None:
        self._access = access
        self._lock = lock
        self._changed = changed
        self._refused: list[KubernetesJob] = []
        self._thread: threading.Thread | None = None
        self._again = threading.Event()
        self._closed = False

    def create(self, jobs: Sequence[KubernetesJob]) -> None:
        """Try to make the pods of `jobs`; those that are refused for now are tried again.

        Raises:
            StartError: one of them was refused for good.
        """
        refused: list[KubernetesJob] = []

        def attempt(job: KubernetesJob) -> None:
            if not self._attempt(job):
                refused.append(job)

        errors = side_by_side(attempt, jobs)
        if errors:
            raise errors[0]
        with self._lock:
            self._refused += refused
            if self._refused and self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="fiber-kubernetes-create")
                self._thread.daemon = True
                self._thread.start()

    def try_again(self) -> None:
        """A pod is gone: there may be room in the quota."""
        self._again.set()

    def close(self) -> None:
        """Make no more pods."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._again.set()
        if thread is not None:
            thread.join(30)

    def _attempt(self, job: KubernetesJob) -> bool:
        """Return whether the pod is made, or need not be; False if it was refused for now."""
        with self._lock:
            if job.ours or self._closed:
                return True
            job.tried = True
        try:
            for attempt in range(_ACCOUNT_ATTEMPTS):
                try:
                    self._access.create_pod(job.body)
                    break
                except ApiError as error:
                    if not failures.waits_for_account(error) or attempt == _ACCOUNT_ATTEMPTS - 1:
                        raise
                threading.Event().wait(_FIRST)
        except ApiError as error:
            if error.status != 409:  # an answer was lost, and it had been made
                access = self._access
                reason, message = failures.refusal(
                    error, "make pods", access.namespace, access.server
                )
                final = not (error.away or failures.is_quota(error))
                with self._lock:
                    job.refused(reason, message, final=final)
                    self._changed()
                if final:
                    raise StartError(message) from error
                return False
        self._made(job)
        return True

    def _made(self, job: KubernetesJob) -> None:
        with self._lock:
            job.was_created()
            self._changed()
            unwanted = job.ours
        if unwanted:  # it was killed while it was made
            self._access.delete_pod(job.id, 0)

    def _run(self) -> None:
        pause = _FIRST
        while True:
            self._again.wait(pause)
            self._again.clear()
            with self._lock:
                self._refused = [job for job in self._refused if not (job.ours or job.ended)]
                if not self._refused or self._closed:
                    self._thread = None
                    return
                first = self._refused[0]
            try:
                made = self._attempt(first)
            except (StartError, ApiError):
                made = True  # its status says why not
            if not made:
                pause = min(2 * pause, _LAST)
                continue
            with self._lock:
                others = [job for job in self._refused if job is not first]
            refused: list[KubernetesJob] = []

            def attempt(job: KubernetesJob, refused: list[KubernetesJob] = refused) -> None:
                if not self._attempt(job):
                    refused.append(job)

            side_by_side(attempt, others)
            with self._lock:
                known = {id(job) for job in (first, *others)}
                self._refused = refused + [j for j in self._refused if id(j) not in known]
            pause = _FIRST
