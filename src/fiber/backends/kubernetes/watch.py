"""One watch for all pods of this process.

    list ─► watch ─► watch ... ─► too old (410), or the API server is away ─► list ─► ...
      └───────┴─► on_pods: what there is, in each answer        on_gone: what is there no more

A list tells what there is, and so what is there no more; the watch goes on from its version. While
the API server is away, what it said last stands, and `away` says since when.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from fiber.backends.kubernetes.access import Access, ApiError, Watching

__all__ = ["Watch"]

Object = dict[str, Any]

_FIRST, _LAST = 0.25, 8.0  # seconds between two attempts to reach the API server


class Watch:
    """Follows the pods that a label selects, in a thread.

    Args:
        on_pod: called with each pod that is new or has changed.
        on_gone: called with the last that is known of pods that are there no more.

    Raises:
        ApiError: the pods cannot be listed.
    """

    def __init__(
        self,
        access: Access,
        selector: str,
        on_pod: Callable[[Object], None],
        on_gone: Callable[[list[Object]], None],
    ) -> None:
        self._access = access
        self._selector = selector
        self._on_pod = on_pod
        self._on_gone = on_gone
        self._pods: dict[str, Object] = {}
        self._version = ""
        self._open: Watching | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._away: float | None = None
        self._list()
        self._thread = threading.Thread(target=self._run, name="fiber-kubernetes-watch")
        self._thread.daemon = True
        self._thread.start()

    @property
    def away(self) -> float | None:
        """Since when the API server does not answer (of `time.monotonic`), None if it does."""
        return self._away

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        with self._lock:
            if self._open is not None:
                self._open.stop()
        self._thread.join(10)

    def _run(self) -> None:
        pause = _FIRST
        while not self._stop.is_set():
            try:
                if not self._version:
                    self._list()
                self._watch()
                pause = _FIRST
            except ApiError as error:
                if error.status == 410:
                    self._version = ""  # what was in between is known to nobody any more
                    continue
                if self._away is None:
                    self._away = time.monotonic()
                # The version is kept: after a short outage the watch goes on where it was.
                self._stop.wait(pause)
                pause = min(2 * pause, _LAST)

    def _list(self) -> None:
        pods, version = self._access.pods(self._selector)
        self._away = None
        there = {pod["metadata"]["uid"] for pod in pods}
        gone = [pod for uid, pod in self._pods.items() if uid not in there]
        for pod in gone:
            del self._pods[pod["metadata"]["uid"]]
        if gone:
            self._on_gone(gone)
        for pod in pods:
            self._seen(pod)
        self._version = version

    def _watch(self) -> None:
        watching = self._access.watch_pods(self._selector, self._version)
        with self._lock:
            if self._stop.is_set():
                watching.close()
                return
            self._open = watching
        self._away = None
        try:
            for event in watching:
                self._handle(event)
        finally:
            with self._lock:
                self._open = None

    def _handle(self, event: Object) -> None:
        kind, pod = event["type"], event["object"]
        if kind == "ERROR":
            raise ApiError(
                int(pod.get("code") or 0), pod.get("reason") or "", pod.get("message") or ""
            )
        self._version = pod["metadata"]["resourceVersion"]
        if kind == "DELETED":
            # Its last state may say why, as that of a pod whose node is lost.
            self._seen(pod)
            self._pods.pop(pod["metadata"]["uid"], None)
            self._on_gone([pod])
        elif kind in ("ADDED", "MODIFIED"):
            self._seen(pod)

    def _seen(self, pod: Object) -> None:
        metadata = pod["metadata"]
        # Of thousands of pods, only what is asked for is kept.
        metadata.pop("managedFields", None)
        self._pods[metadata["uid"]] = pod
        self._on_pod(pod)
