"""The memory of this job: its limit, and whether somebody has killed a process for it.

    control group of the container or pod ─┬─► kills, limit
    record of a keeper, on Slurm ──────────┘

When a container's memory is used up the kernel kills one of its processes, often not the first one.
The manager then knows nothing of it; but the control group counts, and the agent reads that. Where
it is no kernel's work, the one who does it keeps a record of the same form.
"""

from __future__ import annotations

import contextlib
import re

__all__ = ["RECORD", "heed", "kills", "limit"]

RECORD = "FIBER_INTERNAL_MEMORY_RECORD"
"""The variable by which a keeper names its record."""

_V1 = "/sys/fs/cgroup/memory"
_V2 = "/sys/fs/cgroup"


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path) as file:
        return file.read()
    return ""


_record = ""


def heed(record: str) -> None:
    """Read what is written at the path `record`, too."""
    global _record
    _record = record


def kills() -> int:
    """Return how often a process of this job was killed for its memory."""
    text = _read(f"{_V2}/memory.events") or _read(f"{_V1}/memory.oom_control")
    return sum(map(int, re.findall(r"(?m)^oom_kill (\d+)$", f"{text}\n{_read(_record)}")))


def limit() -> int | None:
    """Return the memory that this job may use, in MB of 2**20 bytes; None if any."""
    told = re.search(r"(?m)^limit (\d+)$", _read(_record))
    if told:
        return int(told[1])
    text = (_read(f"{_V2}/memory.max") or _read(f"{_V1}/memory.limit_in_bytes")).strip()
    # Version 1 says "no limit" by a number that is next to 2**63.
    return int(text) >> 20 if text.isdecimal() and int(text) < 1 << 62 else None
