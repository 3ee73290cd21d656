"""Places: which sockets of the session are here, and connecting to one wherever it is.

    connect(address) ─┬─ here ─────────► Unix socket
                      └─ elsewhere ────► `runtime.reach`

A place is a folder of the session on one host: the master's own, or that of an agent elsewhere. An
address is `unix:` and a path that is nowhere twice, for there is a random part in the name of each
place.
"""

from __future__ import annotations

import os

from fiber.runtime import folders
from fiber.runtime import session as session_module
from fiber.wire import channel as wire
from fiber.wire.channel import Channel

__all__ = ["connect", "is_far", "is_here", "join"]


def is_here(path: str) -> bool:
    """Whether the socket at `path` is in this place, or was."""
    folder = os.path.dirname(path)
    return folder in session_module.known_folders() or os.path.isdir(folder)


def is_far(path: str) -> bool:
    """Whether `path` is that of a socket in another place."""
    return folders.is_place(os.path.dirname(path)) and not is_here(path)


def connect(address: str, timeout: float) -> Channel:
    """Connect to a listener of this session, wherever it is; return the channel, blocking.

    Args:
        address: `unix:PATH`.
        timeout: seconds until the channel must be open.

    Raises:
        AuthenticationError: the listener is not of this session.
        OSError: nobody listens there, or it did not answer in time.
    """
    if is_here(address.removeprefix("unix:")):
        return wire.connect(address, session_module.secret_for(address), timeout)
    return session_module.reach().channel(address, timeout)


def join(path: str, timeout: float) -> int:
    """Return a file descriptor of a stream to the socket at `path` in another place.

    What it stands for is carried by this process's loop; raises OSError.
    """
    import socket

    far = session_module.reach().stream(path, timeout)
    ours, theirs = socket.socketpair()
    session = session_module.current()
    with session.loop:
        session.carry(far, theirs)
    return ours.detach()
