"""What the master and the processes that start others through it say to each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fiber.backends.base import JobStatus
from fiber.resources import Resources

__all__ = ["ASK", "JOBS", "ORDER", "REFUSED", "STATUS", "STOP", "Held", "Needs", "Told"]

JOBS = "jobs"
"""What a process that starts others elsewhere asks the endpoint for in its hello."""

ORDER, STOP, STATUS, ASK = range(70, 74)
"""Kinds of frames of that service: all but STATUS go to the master.

    ORDER   number, backend, name, needs, token, address of the owner
    STOP    number
    STATUS  number, `JobStatus`, what the manager calls the job
    ASK     number
"""

REFUSED = "Refused"
"""Reason of the status of a job that the backend did not take; the message says all there is."""

Needs = tuple[Resources, int]
"""What each process of a job asks for, and how many there will be."""

Told = Callable[[JobStatus, str], object]
"""Is told the status of a job, and what its manager calls it."""


class Held(NamedTuple):
    """What whoever ordered a job can do with it.

    Attributes:
        end: ends it.
        ask: has the manager asked how it is, for it has fallen silent.
        name: returns what the manager calls the job now; "" if no more is known than was told.
    """

    end: Callable[[], object]
    ask: Callable[[], object]
    name: Callable[[], str]
