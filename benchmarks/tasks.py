"""What the workers run: a module of its own, so that every peer can pickle it by name."""

import os
import time


def nothing(_: object) -> None:
    """The empty task."""


def sleep(seconds: float) -> None:
    """A task of a known length that needs no processor."""
    time.sleep(seconds)


def whoami(seconds: float) -> int:
    """The worker's process id, after a pause in which the other workers can take their share."""
    time.sleep(seconds)
    return os.getpid()
