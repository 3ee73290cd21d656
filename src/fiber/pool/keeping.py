"""What a pool's master keeps for its workers while batches and results are under way.

    batch ─► pack ─► buffers are lent, if the worker sees them ─► RETURN, or its end ─► given back
    results ─► unpack ─► views of what the worker lends ─► the user lets go ─► RETURN
    handles in a batch ─► keep ─► until its worker has them

Who has lent what to whom is in `pool.lending`. All of it within the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

from fiber.pool import protocol
from fiber.pool.crew import Worker
from fiber.pool.lending import Lending, arena_name
from fiber.runtime import folders
from fiber.runtime.loop import Timer
from fiber.runtime.session import Session
from fiber.wire import arena
from fiber.wire.framing import Buffer, Frame

__all__ = ["Keeping"]

_LOOK = 1.0  # seconds between looks whether the user has let go of results
_ARRIVES = 0.5  # seconds that a message to a home takes at the most, while nothing is stuck


class Keeping:
    """See the module.

    Args:
        session: of this process.
        workers: of the pool, by number.
        under_way: returns the numbers of the batches that workers have.
    """

    def __init__(
        self,
        session: Session,
        workers: Mapping[int, Worker],
        under_way: Callable[[], Container[int]],
    ) -> None:
        self._session = session
        self._workers = workers
        self._under_way = under_way
        self._lending = Lending(session.arena)
        self._blind: set[int] = set()  # workers that do not see what is lent to them
        self._looking: Timer | None = None
        self._handles: dict[int, tuple[list[Any], bool]] = {}
        """Of constants, by the batch that they are in; whether it was under way lately."""

    # What is lent ------------------------------------------------------------------------------

    def pack(self, worker: Worker, kind: int, buffers: list[Buffer]) -> tuple[int, list[Buffer]]:
        """Return the kind and the buffers of a frame for a worker."""
        if not buffers or worker.child.agent.elsewhere or worker.id in self._blind:
            return kind, buffers
        packed, left = self._lending.pack(worker.id, kind, buffers)
        if packed != kind:
            self._session.tend_arena()
        return packed, left

    def unpack(self, worker: Worker, frame: Frame) -> Frame:
        """Return a worker's frame with what it has lent; raises OSError if that cannot be seen."""
        frame = self._lending.unpack(worker.id, frame)
        self._look_soon()
        return frame

    def taken_back(self, worker: Worker, frame: Frame) -> None:
        """A worker returns what it was lent."""
        self._lending.taken_back(worker.id, frame.body)

    def is_blind(self, worker: Worker) -> None:
        """A worker does not see what is lent to it: from now on it is sent all."""
        self._blind.add(worker.id)

    def give_back(self) -> None:
        """Return to workers what the user has let go of."""
        if self._lending.ended:
            for owner, body in self._lending.returns().items():
                worker = self._workers.get(owner)  # type: ignore[call-overload]
                if worker is not None:
                    worker.post(protocol.RETURN, body)

    def down(self, worker: Worker) -> None:
        """A worker has ended, and what it sent was read."""
        self._lending.gone(worker.id)
        self._blind.discard(worker.id)
        if not worker.child.agent.elsewhere:
            memory = folders.memory_folder(self._session.folder)
            arena.remove(memory, arena_name(worker.child.pid))

    def _look_soon(self) -> None:
        if self._looking is None:
            self._looking = self._session.loop.call_later(_LOOK, self._look)

    def _look(self) -> None:
        """Give back what the user has let go of, which nothing tells."""
        self._looking = None
        self.give_back()
        if self._lending.holding and self._workers:
            self._look_soon()

    # Handles -----------------------------------------------------------------------------------

    def keep(self, batch: int, handles: list[Any]) -> None:
        """Keep constants until a worker has unpickled the batch, and said so to their homes."""
        if not self._handles:
            self._session.loop.call_later(_ARRIVES, self._drop)
        self._handles[batch] = (handles, True)

    def _drop(self) -> None:
        """Drop those of batches that are done, and were already the last time."""
        under_way = self._under_way()
        self._handles = {
            batch: (handles, batch in under_way)
            for batch, (handles, fresh) in self._handles.items()
            if fresh or batch in under_way
        }
        if self._handles:
            self._session.loop.call_later(_ARRIVES, self._drop)
