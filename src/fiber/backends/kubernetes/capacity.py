"""How much room the nodes have, for those who may know it.

    nodes: allocatable  ─┐
    pods of all: requests ┴─► largest_free: of each resource, what the node with most of it has left

Both are the cluster's and not a namespace's, so that a program with the least rights may not look;
then it is None, and the sentence does without.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import Any

from fiber.backends.kubernetes.access import Access, ApiError
from fiber.backends.kubernetes.failures import quantity

__all__ = ["Capacity", "largest_free"]

_FRESH = 10.0  # seconds for which an answer is good enough


class Capacity:
    """Asks for it, not more often than needed."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._lock = threading.Lock()
        self._known: dict[str, float] | None = None
        self._asked = float("-inf")
        self._allowed = True

    def largest_free(self) -> dict[str, float] | None:
        """Return what the node with most of it has free of each resource; None if unknown."""
        with self._lock:
            if self._allowed and time.monotonic() - self._asked > _FRESH:
                try:
                    nodes, pods = self._access.nodes(), self._access.all_pods()
                except ApiError as error:
                    self._allowed = error.status not in (401, 403)
                    self._known = None
                else:
                    self._known = largest_free(nodes, pods)
                self._asked = time.monotonic()
            return self._known


def largest_free(nodes: list[dict[str, Any]], pods: list[dict[str, Any]]) -> dict[str, float]:
    """Return what the node with most of it has free of each resource."""
    used: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for pod in pods:
        for container in pod["spec"]["containers"]:
            for name, amount in ((container.get("resources") or {}).get("requests") or {}).items():
                used[pod["spec"].get("nodeName", "")][name] += quantity(amount)
    largest: dict[str, float] = {}
    for node in nodes:
        if node["spec"].get("unschedulable"):
            continue
        for name, amount in (node["status"].get("allocatable") or {}).items():
            free = quantity(amount) - used[node["metadata"]["name"]][name]
            largest[name] = max(largest.get(name, 0.0), free)
    return largest
