"""The process that a pool's worker lives in, as `current_process` shows it there."""

from __future__ import annotations

from fiber.pool import worker
from fiber.process import Process
from fiber.runtime import session

__all__ = ["WorkerProcess"]


class WorkerProcess(Process):
    """Runs a worker for the master at `address` that expects `token`."""

    def __init__(self, number: int, address: str, token: str) -> None:
        super().__init__(name=f"FiberPoolWorker-{number}", daemon=True)
        self._address = address
        self._token = token

    def run(self) -> None:
        """Work until the master says stop."""
        session.supervise()
        worker.run(self._address, self._token)
