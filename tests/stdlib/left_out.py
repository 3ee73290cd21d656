"""The tests of CPython's file that are not run, each with the reason.

Only what looks at a private detail of multiprocessing's implementation may stand here. What a user
of multiprocessing could notice stays in; see also `adapted`.
"""

from __future__ import annotations

LEFT_OUT: dict[str, str] = {
    "SemLockTests": "tests the C class that multiprocessing's locks are made of",
    "TestPoolNotLeakOnFailure": "gives the pool a context whose process class is a fake; "
    "Fiber's pool starts its workers without one",
    "TestResourceTracker": "tests the process by which multiprocessing cleans up its semaphores "
    "and shared memory; Fiber has none",
    "TestSimpleQueue.test_closed": "reads the two pipe ends that multiprocessing's SimpleQueue has",
    "WithProcessesTestHeap.test_heap": "checks the lists of free and used blocks inside the heap",
    "WithProcessesTestQueue.test_queue_feeder_on_queue_feeder_error": "overrides a hook of the "
    "feeder thread; Fiber's Queue has none",
}
"""By the qualified name of a test or of a whole class."""


def reason(test_class: str, method: str) -> str | None:
    """Return why a test is left out, None if it is run."""
    return LEFT_OUT.get(test_class) or LEFT_OUT.get(f"{test_class}.{method}")
