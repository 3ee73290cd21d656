"""A process that removes the containers of a master that was killed before it could.

    master ── pipe ──► janitor          a byte: all is removed, go home
                          │             its end, or another parent: the master is gone
                          └─► engine: remove what carries the label

Containers end by themselves when their master is gone, and the engine then removes them. This is
for those that cannot: created and not yet started, or with a command that waits for nobody.

It is run by its path and imports nothing of Fiber; the SDK is loaded when it is needed. Its
arguments are the label, the process ID of the master and the master's `sys.path`.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import time
from typing import Any

LOOK = 1.0  # seconds
PATIENCE = 60.0  # seconds, for an engine that does not answer
QUIET = 3  # times that nothing is found: the last request of the master may still be on its way


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    label, parent = sys.argv[1], int(sys.argv[2])
    told = b""
    while True:
        if select.select([0], [], [], LOOK)[0]:
            told = os.read(0, 1)
            break
        # A process that the master forked may hold the other end of the pipe.
        if os.getppid() != parent:
            break
    if not told:
        clean(label)


def clean(label: str) -> None:
    sys.path[:] = sys.argv[3:]
    docker: Any = importlib.import_module("docker")
    deadline = time.monotonic() + PATIENCE
    quiet = 0
    while quiet < QUIET and time.monotonic() < deadline:
        try:
            api = docker.from_env().api
            found = api.containers(all=True, filters={"label": label})
            for container in found:
                remove(docker, api, container["Id"])
            quiet = 0 if found else quiet + 1
        except (docker.errors.DockerException, OSError):
            quiet = 0
        time.sleep(LOOK / 2)


def remove(docker: Any, api: Any, key: str) -> None:
    try:
        api.remove_container(key, force=True, v=True)
    except docker.errors.APIError:
        pass  # it is gone, or being removed


if __name__ == "__main__":
    main()
