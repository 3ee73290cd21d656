"""The memory of this container or pod: its limit, and whether the kernel has killed for it.

When a container's memory is used up the kernel kills one of its processes, often not the first one.
The manager then knows nothing of it; but the control group counts, and the agent reads that.
"""

from __future__ import annotations

import contextlib
import re

__all__ = ["kills", "limit"]

_V1 = "/sys/fs/cgroup/memory"
_V2 = "/sys/fs/cgroup"


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path) as file:
        return file.read()
    return ""


def kills() -> int:
    """Return how often the kernel has killed a process of this control group for its memory."""
    text = _read(f"{_V2}/memory.events") or _read(f"{_V1}/memory.oom_control")
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def limit() -> int | None:
    """Return the memory that this control group may use, in MB of 2**20 bytes; None if any."""
    text = (_read(f"{_V2}/memory.max") or _read(f"{_V1}/memory.limit_in_bytes")).strip()
    # Version 1 says "no limit" by a number that is next to 2**63.
    return int(text) >> 20 if text.isdecimal() and int(text) < 1 << 62 else None
