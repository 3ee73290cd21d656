"""The last thing that a pod does when its master is gone: it deletes itself.

    FIBER_INTERNAL_FAREWELL ─► leave ─► (alone: DELETE the session's Secret,) DELETE this pod

While the master's pod, or a process on the master's machine, is there to clean up, this is not
needed. It is for the master's container that died with all that was in it. Standard library only:
the image has nothing else. Most service accounts may not do it; then the pod just ends.
"""

from __future__ import annotations

import json
import os
import ssl
import urllib.request

from fiber.backends.kubernetes import detect

__all__ = ["leave"]

_TIMEOUT = 3.0  # seconds


def leave(*, alone: bool = True) -> None:
    """Delete the pod that this process is in, if that is allowed.

    Args:
        alone: the master is gone, so that nobody needs the session's Secret: delete it as well.
    """
    try:
        if not detect.in_pod() or not os.environ.get(detect.POD):
            return
        secret = os.environ.get(detect.SECRET)
        if secret and alone:
            _delete("secrets", secret)
        _delete("pods", os.environ[detect.POD])
    except Exception:  # the pod ends in any case, and nobody is left to read of it
        pass


def _delete(kind: str, name: str) -> None:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    namespace = os.environ.get(detect.NAMESPACE) or detect.own_namespace()
    with open(f"{detect.FOLDER}/token", encoding="utf-8") as file:
        token = file.read().strip()
    request = urllib.request.Request(
        f"https://{host}:{port}/api/v1/namespaces/{namespace}/{kind}/{name}",
        data=json.dumps({"gracePeriodSeconds": 0}).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        method="DELETE",
    )
    # The API server is never behind the proxy that a pod's variables may name.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(
            context=ssl.create_default_context(cafile=f"{detect.FOLDER}/ca.crt")
        ),
    )
    try:
        opener.open(request, timeout=_TIMEOUT).close()
    except OSError:  # no right, no answer, or it is gone already: the other one may still work
        pass
