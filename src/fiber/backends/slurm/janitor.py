"""A process that ends the jobs of a master that was killed before it could.

    master ── pipe ──► janitor          "bye": all is done, go home
                          │             "step PID": an srun that is to be ended too
                          │             its end, or another parent: the master is gone
                          └─► the shared folder, the sruns, all jobs of that name

Agents end by themselves when their master is gone, and keepers with their input. This is for jobs
that wait in the queue and for commands that wait for nobody. In an allocation that is cancelled it
has the time that Slurm gives to processes before it kills them.

It is run by its path and imports nothing of Fiber.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time

LOOK = 1.0  # seconds
GRACE = 3.0  # seconds that keepers have to end what they run
PATIENCE = 600.0  # seconds, for a controller that does not answer
QUIET = 3  # times that nothing is found: the last request of the master may still be on its way


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    name, folder, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
    told = b""
    while True:
        if select.select([0], [], [], LOOK)[0]:
            data = os.read(0, 65536)
            if not data:
                break
            told += data
            if told.endswith(b"bye\n"):
                return
        # A process that the master forked may hold the other end of the pipe.
        elif os.getppid() != parent:
            break
    for line in told.decode().splitlines():
        if line.startswith("step "):
            end_step(int(line.split()[1]))
    shutil.rmtree(folder, ignore_errors=True)
    cancel(name)


def end_step(pid: int) -> None:
    try:
        with open(f"/proc/{pid}/comm") as file:
            if file.read().strip() == "srun":
                os.kill(pid, signal.SIGTERM)
    except OSError:
        pass  # it has ended


def cancel(name: str) -> None:
    began = time.monotonic()
    deadline = began + PATIENCE
    quiet = 0
    while quiet < QUIET and time.monotonic() < deadline:
        which = (f"--user={os.getuid()}", f"--name={name}")
        found = call("squeue", *which, "--noheader", "--format=%A")
        if found is None:
            quiet = 0
        elif not found.strip():
            quiet += 1
        else:
            quiet = 0
            if time.monotonic() < began + GRACE:
                running = "--state=RUNNING"  # for one that waits it tries again for a minute
                call("scancel", *which, running, "--batch", "--signal=USR2")  # see `keeper`
            else:
                call("scancel", *which, "--full", "--signal=KILL")
            call("scancel", *which)
        time.sleep(LOOK / 2)


def call(*command: str) -> str | None:
    """Return what a command wrote, None if it failed."""
    try:
        ended = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout if ended.returncode == 0 else None


if __name__ == "__main__":
    main()
