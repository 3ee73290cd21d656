"""What the master and the processes that start others through it say to each other."""

from __future__ import annotations

from collections.abc import Callable

from fiber.backends.base import JobStatus
from fiber.resources import Resources

__all__ = ["JOBS", "ORDER", "REFUSED", "STATUS", "STOP", "Needs", "Told"]

JOBS = "jobs"
"""What a process that starts others elsewhere asks the endpoint for in its hello."""

ORDER, STOP, STATUS = range(70, 73)
"""Kinds of frames of that service: the first two go to the master.

    ORDER   number, backend, name, needs, token, address of the owner
    STOP    number
    STATUS  number, `JobStatus`, what the manager calls the job
"""

REFUSED = "Refused"
"""Reason of the status of a job that the backend did not take; the message says all there is."""

Needs = tuple[Resources, int]
"""What each process of a job asks for, and how many there will be."""

Told = Callable[[JobStatus, str], object]
"""Is told the status of a job, and what its manager calls it."""
