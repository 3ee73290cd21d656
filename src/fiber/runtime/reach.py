"""The way to other places, from a process that is not the master.

    stream(path) ─► the gateway of that place, or the master, who brings it
    channel(address) ─► stream ─► handshake, with the very process there ─► Channel

A process knows where the master is, and the master knows the gateways of all other places.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from time import monotonic
from typing import Any, NamedTuple

from fiber.runtime.gateway import Elsewhere, Refused, open_stream
from fiber.wire import channel as wire
from fiber.wire.channel import Channel

__all__ = ["Network", "Reach", "authenticated", "open_directly"]

_DIRECT = 3.0  # seconds in which a gateway must answer that can be reached directly


class Network(NamedTuple):
    """What a process that is not the master knows of the way to it.

    Attributes:
        master: where the master listens, as HOST:PORT, to be tried in turn; empty in its own place.
        address: the master's, as any process's.
        certificate: of the session, as PEM; empty if it is not known, in the master's own place.
    """

    master: tuple[str, ...]
    address: str
    certificate: bytes


class Reach:
    """The way to other places from a process that is not the master. From any thread.

    Args:
        network: how to get to the master.
        secret: of the session.
    """

    def __init__(self, network: Network, secret: bytes) -> None:
        self.network = network
        self._secret = secret
        self._folder = os.path.dirname(network.address.removeprefix("unix:"))
        self._context: Any = None
        self._lock = threading.Lock()
        self._gateways: dict[str, Sequence[str]] = {}  # of other places, by folder
        self._indirect: set[str] = set()  # places that cannot be reached but through the master

    @property
    def context(self) -> Any:
        """TLS's context, made at first use; None in the master's place."""
        with self._lock:
            if self._context is None and self.network.certificate:
                from fiber.wire.tls import client_context

                self._context = client_context(self.network.certificate)
            return self._context

    @property
    def _master(self) -> str:
        """The address that the master's endpoint is connected at from here."""
        return (
            "tcp:" + ",".join(self.network.master) if self.network.master else self.network.address
        )

    def _ask_master(self, path: str, timeout: float, *, redirect: bool = False) -> Any:
        return open_stream(
            self._master, path, self._secret, self.context, timeout, redirect=redirect
        )

    def stream(self, path: str, timeout: float) -> Any:
        """Return a stream, blocking, to the socket at `path` in another place; raises OSError."""
        deadline = monotonic() + timeout
        folder = os.path.dirname(path)
        gateway = self._gateways.get(folder)
        if gateway is None and folder not in self._indirect:
            direct = folder != self._folder and self.context is not None
            try:
                return self._ask_master(path, timeout, redirect=direct)
            except Elsewhere as elsewhere:
                gateway = self._gateways[folder] = elsewhere.addresses
        if gateway is not None:
            direct_time = min(_DIRECT, deadline - monotonic())
            try:
                return open_directly(gateway, path, self._secret, self.context, direct_time)
            except Refused:
                raise
            except OSError:
                self._gateways.pop(folder, None)
                self._indirect.add(folder)
        return self._ask_master(path, deadline - monotonic())

    def channel(self, address: str, timeout: float) -> Channel:
        """Connect to a listener in another place; raises OSError and AuthenticationError."""
        if address == self.network.address:
            return wire.connect(self._master, self._secret, timeout, self.context)
        deadline = monotonic() + timeout
        sock = self.stream(address.removeprefix("unix:"), timeout)
        return authenticated(sock, self._secret, deadline)


def authenticated(sock: Any, secret: bytes, deadline: float) -> Channel:
    """Return the channel on a stream whose other end has proved itself until `deadline`."""
    try:
        return wire.authenticate(sock, secret, deadline)
    except BaseException:
        sock.close()
        raise


def open_directly(
    gateway: Sequence[str], path: str, secret: bytes, context: Any, timeout: float
) -> Any:
    """Return a stream to `path` from the gateway of its own place.

    Raises:
        Refused: nobody listens there.
        OSError: the gateway cannot be reached, or its place is gone.
    """
    return open_stream("tcp:" + ",".join(gateway), path, secret, context, timeout, redirect=False)
