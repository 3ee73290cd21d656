"""The Kubernetes backend: a job is a pod.

    backend ──► access ──► the API server        every call of the SDK is in access
       ├─ spec      what a pod looks like: the restricted profile, the template, the master's pod
       ├─ creation  pods are made side by side; what is refused for now is tried again
       ├─ watch     one watch for all pods ──► jobs, whose statuses `failures` puts into words
       ├─ reach     where pods find this process; if nowhere, `relay`, `forwarder` and `mux`
       └─ cleaner   the process that removes all of it when this one is killed

`KubernetesBackend` is loaded when it is asked for: `detect` must stay cheap to import, and
`farewell` runs in pods that have Python and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fiber.backends.kubernetes.backend import KubernetesBackend

__all__ = ["KubernetesBackend"]


def __getattr__(name: str) -> object:
    if name == "KubernetesBackend":
        from fiber.backends.kubernetes.backend import KubernetesBackend

        return KubernetesBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
