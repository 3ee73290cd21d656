"""Room for open files: hundreds of workers are hundreds of sockets."""

from __future__ import annotations

import contextlib
import os
import resource

from fiber.errors import StartError

__all__ = ["make_room"]

_OTHERS = 128  # descriptors for all else that a program and Fiber have open
_DESCRIPTORS = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


def make_room(workers: int, here: int, agent: int) -> None:
    """See that this process can have as many files open as `workers` take.

    Args:
        workers: how many there will be.
        here: descriptors of this process that each takes.
        agent: descriptors of the agent that each takes, if it is on this machine.

    Raises:
        StartError: the system does not allow it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _is_enough(soft, workers * max(here, agent) + 2 * _OTHERS):  # the common case, in a hurry
        return
    taken = len(os.listdir(_DESCRIPTORS))
    wanted = taken + workers * here + _OTHERS
    most = max(wanted, workers * agent + _OTHERS)
    if not _is_enough(hard, most):
        raise StartError(
            f"{workers} workers need {most} open files, and this process may have {hard} at the "
            "most; raise that limit (ulimit -Hn, LimitNOFILE of systemd, nofile of a container), "
            "or ask for fewer workers"
        )
    if not _is_enough(soft, wanted):
        with contextlib.suppress(ValueError, OSError):  # macOS has another limit, hidden below
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _is_enough(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted
