"""The tests of CPython's file that are not run, each with the reason.

Only what looks at a private detail of multiprocessing's implementation may stand here. What a user
of multiprocessing could notice stays in; see also `adapted`.
"""

from __future__ import annotations

LEFT_OUT: dict[str, str] = {
    "TestResourceTracker.test_resource_tracker_reused": "asks for the ID of the process that "
    "cleans up multiprocessing's semaphores; Fiber's locks need no such process",
    "TestResourceTracker.test_resource_tracker_sigkill": "kills that process, and wants a new "
    "lock to warn of it",
    "WithProcessesTestQueue.test_queue_feeder_on_queue_feeder_error": "overrides a private method "
    "of the thread that pickles; Fiber's queue has no such thread, it pickles in `put`",
}
"""By the qualified name of a test or of a whole class."""


def reason(test_class: str, method: str) -> str | None:
    """Return why a test is left out, None if it is run."""
    return LEFT_OUT.get(test_class) or LEFT_OUT.get(f"{test_class}.{method}")
