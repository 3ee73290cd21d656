"""Whether this process is in a pod, and what it knows of it. Cheap to import: no SDK.

Where a service account is mounted, its files tell the namespace; the pod's name is its host name.
"""

from __future__ import annotations

import os

__all__ = ["FOLDER", "NAMESPACE", "POD", "SECRET", "in_pod", "own_namespace", "own_pod"]

FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"

# Variables of the pods that this backend makes.
POD = "FIBER_INTERNAL_POD"
NAMESPACE = "FIBER_INTERNAL_NAMESPACE"
SECRET = "FIBER_INTERNAL_SECRET_NAME"


def in_pod() -> bool:
    """Whether this process is in a pod that can talk to its API server."""
    return "KUBERNETES_SERVICE_HOST" in os.environ and os.path.exists(f"{FOLDER}/token")


def own_namespace() -> str:
    """Return the namespace of the pod that this process is in, empty if it is not known."""
    try:
        with open(f"{FOLDER}/namespace", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return os.environ.get(NAMESPACE, "")


def own_pod() -> str:
    """Return the name of the pod that this process is in."""
    import socket

    names = (os.environ.get(name) for name in (POD, "POD_NAME", "HOSTNAME"))
    return next(filter(None, names), "") or socket.gethostname()
