"""Starting processes elsewhere from a process that is not the master: the master sees to it.

    Errands.order ─ ORDER ─► the master's `Outside` ─► job ─► its agent connects to this process
                  ◄─ STATUS ─

Only the master need have what talks to the cluster manager, and the right to.
"""

from __future__ import annotations

import itertools
import pickle

from fiber.backends.base import JobState, JobStatus
from fiber.runtime.endpoint import HELLO
from fiber.runtime.link import Link
from fiber.runtime.loop import Loop
from fiber.runtime.orders import ASK, JOBS, ORDER, STATUS, STOP, Held, Needs, Told
from fiber.wire.channel import Channel
from fiber.wire.framing import Frame

__all__ = ["Errands"]


class Errands:
    """Orders jobs from the master; within the loop.

    Args:
        loop: of this process.
        channel: to the master's endpoint.
    """

    def __init__(self, loop: Loop, channel: Channel) -> None:
        channel.send(HELLO, pickle.dumps({"service": JOBS}))
        self._link = Link(loop, channel, self._on_frame, self._on_lost)
        self._numbers = itertools.count()
        self._told: dict[int, Told] = {}

    def order(
        self, backend: str, name: str, needs: Needs, token: str, owner: str, told: Told
    ) -> Held:
        """As `Outside.order`."""
        number = next(self._numbers)
        self._told[number] = told
        order = (number, backend, name, needs, token, owner)
        self._link.post(ORDER, pickle.dumps(order))

        def stop() -> None:
            if self._told.pop(number, None) is not None:
                self._link.post(STOP, pickle.dumps((number,)))

        def ask() -> None:
            if number in self._told:
                self._link.post(ASK, pickle.dumps((number,)))

        return Held(stop, ask, lambda: "")

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == STATUS:
            number, status, job = pickle.loads(frame.body)
            told = self._told.get(number)
            if told is not None:
                told(status, job)

    def _on_lost(self) -> None:
        told, self._told = self._told, {}
        for tell in told.values():
            tell(JobStatus(JobState.ENDED, message="the master, which sees to it, is gone"), "")

    def close(self) -> None:
        """Close the link; what was started through it ends."""
        self._link.close()

    def collect(self) -> None:
        """Nothing is left to do: the master ends the jobs."""
