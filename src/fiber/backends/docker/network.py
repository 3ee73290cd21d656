"""Where containers reach this process.

    engine and network                          addresses, the best first
    ──────────────────────────────────────────────────────────────────────────────────────────
    Docker Desktop                              host.docker.internal
    this process is in a container itself       its address in the network of the jobs, then
    a bridge on Linux                           host.docker.internal, the network's gateway, then
    any; rootless engines know nothing else     the addresses of this machine
    the host's network                          127.0.0.1, then the addresses of this machine

`host.docker.internal` is made known to every container (`host-gateway`), as it is by itself on
Docker Desktop.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from fiber.config import config
from fiber.errors import StartError

__all__ = ["hosts", "network_name", "own_container"]

INTERNAL = "host.docker.internal"


def own_container(api: Any, errors: Any) -> dict[str, Any] | None:
    """Return what the engine says of the container that this process is in, if it is in one."""
    if not os.path.exists("/.dockerenv") and "/containers/" not in _read("/proc/self/mountinfo"):
        return None
    for name in _own_names():
        try:
            found: dict[str, Any] = api.inspect_container(name)
        except errors.NotFound:
            continue  # a container of another engine
        return found
    return None


def _own_names() -> Iterator[str]:
    yield from re.findall(r"/containers/([0-9a-f]{64})/hostname", _read("/proc/self/mountinfo"))
    yield socket.gethostname()


def network_name(own: dict[str, Any] | None) -> str | None:
    """Return the network of the jobs: the configured one, or that of this process's container."""
    options = config.docker_options
    configured = config.docker_network or options.get("network") or options.get("network_mode")
    if configured or own is None:
        return configured
    mode = own["HostConfig"]["NetworkMode"]
    if mode == "host":
        return "host"
    return next(iter(own["NetworkSettings"]["Networks"]), None)


def hosts(
    api: Any, errors: Any, url: str, network: str | None, own: dict[str, Any] | None
) -> list[str]:
    """Return the hosts by which containers in `network` reach this process.

    Raises:
        StartError: the network does not exist, or leads nowhere.
    """
    if network == "none":
        raise StartError(
            "Containers in the network 'none' cannot reach their master: set docker_network to "
            "another, or to None."
        )
    if "Docker Desktop" in str(api.info().get("OperatingSystem")) and own is None:
        return [INTERNAL]
    found: list[str] = []
    if network == "host":
        found.append("127.0.0.1")
    elif network is None or not network.startswith("container:"):
        details = _inspect(api, errors, network or "bridge")
        if own is not None:
            place = own["NetworkSettings"]["Networks"].get(network or "bridge") or {}
            found.append(place.get("IPAddress") or "")
        else:
            found.append(INTERNAL)
            found += [_gateway(pool) for pool in (details["IPAM"]["Config"] or ())]
    remote = urlsplit(url).hostname if "://" in url and not url.startswith("http+") else None
    if remote is not None and remote not in ("localhost", "127.0.0.1"):
        found.insert(0, _address_towards(remote))  # the gateway is that of another machine
    found += _own_addresses()
    return list(dict.fromkeys(filter(None, found)))


def _inspect(api: Any, errors: Any, network: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = api.inspect_network(network)
    except errors.NotFound:
        raise StartError(
            f"There is no network {network!r} in the Docker engine: create it with `docker network "
            f"create {network}`, or set docker_network to one that `docker network ls` shows."
        ) from None
    return found


def _gateway(pool: dict[str, str]) -> str:
    # The default bridge does not always say it, but if it is of this machine, we have that address.
    if pool.get("Gateway"):
        return pool["Gateway"]
    with contextlib.suppress(KeyError, ValueError, StopIteration):
        first = next(ipaddress.ip_network(pool["Subnet"]).hosts())
        own = _address_towards(str(first))
        return own if ipaddress.ip_address(own) in ipaddress.ip_network(pool["Subnet"]) else ""
    return ""


def _own_addresses() -> list[str]:
    found = [_address_towards("192.0.2.1")]  # any address outside: that of the default route
    with contextlib.suppress(OSError):
        found += socket.gethostbyname_ex(socket.gethostname())[2]
    return [address for address in found if not address.startswith("127.")]


def _address_towards(host: str) -> str:
    # Connecting a UDP socket sends nothing: it only chooses the route.
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
