"""Where pods find this process: directly, or through a relay.

    in a pod:  its own address
    outside:   this machine's addresses ─► a relay pod tries them ─┬─► those that answered
                                                                   └─► the relay's own address

Only a pod can say what a pod can reach, so the relay tries before it relays; if it is not needed,
it ends, and tells through its termination message what it found.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fiber.backends.base import JobState
from fiber.backends.kubernetes import failures, spec
from fiber.backends.kubernetes.access import Access, ApiError
from fiber.backends.kubernetes.forwarder import Forwarder
from fiber.backends.kubernetes.spec import Settings
from fiber.errors import StartError

__all__ = ["Relay", "bracketed", "own_addresses"]

_PORT, _CONTROL = 7070, 7071  # of the relay's pod, which has them for itself
_REPORT = "/dev/termination-log"
_CONNECT = 2.0  # seconds that the relay gives each address
_LOOK_AGAIN = 0.05


def own_addresses(access: Access) -> list[str]:
    """Return this machine's addresses that pods may know, the likeliest first."""
    found: list[str] = []
    with contextlib.suppress(OSError):
        found.append(access.source_address())
    found += _interfaces()
    with contextlib.suppress(OSError):
        names = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        found += [str(address[0]) for *_, address in names]
    useless = ("127.", "169.254.", "::1", "fe80:")
    return [host for host in dict.fromkeys(found) if not host.startswith(useless)]


def _interfaces() -> list[str]:
    """The IPv4 addresses of the network interfaces; none where the system has another way."""
    if sys.platform != "linux":
        return []
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                ask = struct.pack("256s", name.encode()[:15])
                found.append(socket.inet_ntoa(fcntl.ioctl(sock, 0x8915, ask)[20:24]))
    return found  # SIOCGIFADDR


class Relay:
    """A pod that tries to reach this process and, if it cannot, relays to it.

    Args:
        name: of the pod.
        port: of this process.
        candidates: addresses to be tried, none if it is to relay in any case.
    """

    def __init__(
        self, access: Access, settings: Settings, name: str, port: int, candidates: list[str]
    ) -> None:
        self._access = access
        self.name = name
        self._port = port
        self._forwarder: Forwarder | None = None
        self._pod: Mapping[str, Any] | None = None
        self._gone = False
        self._changed = threading.Event()
        about = {
            "candidates": candidates,
            "timeout": _CONNECT,
            "report": _REPORT,
            "port": _PORT,
            "control": _CONTROL,
        }
        program = Path(__file__).with_name("mux.py").read_text("utf-8")
        command = ["python3", "-c", program, json.dumps(about)]
        self._body = spec.relay(name, command, settings)

    def start(self) -> None:
        """Make the pod.

        Raises:
            ApiError: it was refused.
        """
        self._access.create_pod(self._body)

    def seen(self, pod: Mapping[str, Any]) -> None:
        """The watch has brought the pod as it is now."""
        self._pod = pod
        self._changed.set()

    def vanished(self) -> None:
        """The pod is there no more."""
        self._gone = True
        self._changed.set()

    @property
    def is_there(self) -> bool:
        """Whether it relays, as far as is known."""
        if self._forwarder is None or self._gone or self._pod is None:
            return False
        return failures.read(self._pod).state is JobState.RUNNING

    def addresses(self, timeout: float) -> list[str]:
        """Wait until it has found out, and return where pods reach this process.

        Raises:
            StartError: the pod does not start, or there is no port-forward to it.
        """
        deadline = time.monotonic() + timeout
        message = "it was not started yet"
        while time.monotonic() < deadline:
            self._changed.wait(_LOOK_AGAIN * 10)
            self._changed.clear()
            if self._gone:
                raise StartError(f"The relay, pod {self.name}, was deleted by somebody else")
            if self._pod is None:
                continue
            status = failures.read(self._pod)
            message = status.message or message
            if status.state is JobState.ENDED:
                return self._found(self._pod, status.message)
            if status.state is JobState.RUNNING:
                if self._forwarder is None:
                    self._forwarder = Forwarder(self._access, self.name, _CONTROL, self._port)
                if self._forwarder.wait(_LOOK_AGAIN):
                    host = self._pod["status"]["podIP"]
                    return [bracketed(host, _PORT)]
                self._changed.set()
                message = self._why_not() or message
        raise StartError(
            f"The relay, pod {self.name}, through which pods would reach this program, was not "
            f"ready within {timeout:g} s: {message}"
        )

    def _found(self, pod: Mapping[str, Any], message: str) -> list[str]:
        containers = pod["status"].get("containerStatuses") or [{}]
        ended = (containers[0].get("state") or {}).get("terminated") or {}
        if ended.get("exitCode") == 0 and ended.get("message"):
            return list(json.loads(ended["message"]))
        raise StartError(
            f"The relay, through which pods would reach this program, failed: {message}"
        )

    def _why_not(self) -> str:
        """Why there is no port-forward yet; raises `StartError` if there will be none."""
        assert self._forwarder is not None
        error = self._forwarder.error
        if isinstance(error, ApiError) and error.status in (401, 403):
            access = self._access
            message = f'cannot get resource "pods/portforward" ({error.message})'
            denied = ApiError(error.status, error.reason, message)
            raise StartError(
                failures.refusal(denied, "forward a port", access.namespace, access.server)[1]
            ) from error
        return str(error) if error is not None else ""

    def close(self) -> None:
        """End the port-forward; the pod is deleted with all others."""
        if self._forwarder is not None:
            self._forwarder.close()
            self._forwarder = None


def bracketed(host: str, port: int) -> str:
    """HOST:PORT, as it is written for IPv6 too."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
