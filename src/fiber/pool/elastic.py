"""Sizes the crew of a pool that was given a range of workers, as `Pool(processes=(2, 50))`.

    items wait and nobody is free ─► a moment ─► are they still? ─► Crew.resize, up
    workers idle, again and again ─► Scheduler.age ─► Retire ─► Crew.resize, down

A pool grows by as many workers as would be of use, all at once, so that jobs elsewhere are ordered
in one call, and shrinks one by one. Who is to go the scheduler decides, for it alone knows that a
worker has nothing to do. All of it runs within the session's loop.
"""

from __future__ import annotations

from collections.abc import Callable

from fiber.config import config
from fiber.pool.crew import Crew
from fiber.pool.scheduler import Scheduler
from fiber.runtime.loop import Loop, Timer

__all__ = ["Elastic"]

_MOMENT = 0.05  # seconds that items have to wait; in which most short calls are done
_WORTH = 0.1  # seconds of work that are worth another worker on this machine
_WORTH_ELSEWHERE = 1.0  # seconds of work that are worth another job
_AGES = 4  # looks at who is idle, in the time after which one ends


class Elastic:
    """See the module.

    Args:
        loop: of the session.
        scheduler: knows what waits, and who is idle.
        crew: is sized.
        act: called when workers were added, or the scheduler has something to be done.
    """

    def __init__(
        self, loop: Loop, scheduler: Scheduler, crew: Crew, act: Callable[[], object]
    ) -> None:
        self._loop = loop
        self._scheduler = scheduler
        self._crew = crew
        self._act = act
        self._least, self._most = crew.settings.least, crew.settings.processes
        self._growing: Timer | None = None
        self._aging: Timer | None = None
        self._quiet = 0  # looks in a row that found nothing waiting
        self._stopped = False

    def look(self) -> None:
        """Something has changed: see whether workers are wanted."""
        crew = self._crew
        if self._stopped or crew.gone.is_set:
            return
        if self._growing is None and crew.target < self._most and self._scheduler.short:
            self._growing = self._loop.call_later(_MOMENT, self._grow)
            if not crew.target:  # nobody is there who could be done in a moment
                self._resize(1)
        if self._aging is None and crew.target > self._least:
            seconds = config.pool_idle_timeout / _AGES
            self._aging = self._loop.call_later(seconds, self._age)

    def _grow(self) -> None:
        self._growing = None
        worth = _WORTH_ELSEWHERE if self._crew.elsewhere else _WORTH
        more = self._scheduler.shortage(worth)
        if more and not self._crew.coming:  # here one is there in a moment
            self._resize(min(self._most, self._crew.up + more))
        self.look()

    def _resize(self, target: int) -> None:
        if target > self._crew.target:  # that includes those that start
            self._crew.resize(min(self._most, self._crew.fitting(target)))
            self._act()

    def _age(self) -> None:
        self._aging = None
        self._scheduler.age(_AGES + 1, self._crew.target - self._least)
        self._quiet = 0 if self._scheduler.waiting else self._quiet + 1
        if self._quiet > _AGES:
            self._crew.call_off(self._crew.target - self._least)
        self._act()
        self.look()

    def stop(self) -> None:
        """The pool has ended."""
        self._stopped = True
        for timer in (self._growing, self._aging):
            if timer is not None:
                timer.cancel()
