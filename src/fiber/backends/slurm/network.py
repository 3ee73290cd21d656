"""Where jobs reach this process: its addresses, the best first.

    towards the controller, its names, all interfaces ─► addresses, to be tried in turn

Nodes of a cluster often have several networks, and this machine an address in each. Nobody can tell
from here which of them leads to whom, so a job tries them all.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import socket
import struct
import sys

__all__ = ["hosts"]

_SIOCGIFADDR = 0x8915
_SIOCGIFFLAGS = 0x8913
_UP, _LOOPBACK = 0x1, 0x8
# Of containers and virtual machines: they lead nowhere from other machines, and cost time.
_BRIDGES = ("br-", "cni", "docker", "lxc", "lxd", "podman", "veth", "virbr")


def hosts() -> list[str]:
    """Return the hosts by which nodes may reach this process."""
    name = socket.gethostname()
    found = [_towards(_controller()), _towards("192.0.2.1"), *_of_name(name), *_interfaces()]
    found = [address for address in dict.fromkeys(found) if address and not _local(address)]
    # The name may mean another address on a node than here; if there is no network at all, all
    # nodes are this machine.
    return [*found, name] if found else ["127.0.0.1"]


def _controller() -> str:
    """Return the host of Slurm's controller, if a file here tells it."""
    path = os.environ.get("SLURM_CONF") or "/etc/slurm/slurm.conf"
    with contextlib.suppress(OSError), open(path, errors="replace") as file:
        wanted = re.search(r"(?im)^\s*(?:SlurmctldHost|ControlMachine)\s*=\s*(\S+)", file.read())
        if wanted:
            name, _, address = wanted[1].partition("(")
            return address.rstrip(")") or name
    return ""


def _towards(host: str) -> str:
    # Connecting a UDP socket sends nothing: it only chooses the route.
    if not host:
        return ""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _of_name(name: str) -> list[str]:
    try:
        return socket.gethostbyname_ex(name)[2]
    except OSError:
        return []


def _interfaces() -> list[str]:
    """Return the addresses of all networks that this machine is in."""
    found = []
    if sys.platform == "linux":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                if name.startswith(_BRIDGES):
                    continue
                request = struct.pack("256s", name.encode()[:15])
                with contextlib.suppress(OSError):
                    flags = fcntl.ioctl(probe, _SIOCGIFFLAGS, request)
                    (bits,) = struct.unpack_from("H", flags, 16)
                    if bits & _UP and not bits & _LOOPBACK:
                        data = fcntl.ioctl(probe, _SIOCGIFADDR, request)
                        found.append(socket.inet_ntoa(data[20:24]))
    return found


def _local(address: str) -> bool:
    place = ipaddress.ip_address(address)
    return place.is_loopback or place.is_link_local
