"""One squeue for all that this process has in Slurm, as seldom as will do.

    thread: squeue --name=... ─► rows ─► take(rows)
                          └─► Away ─► away, since when

It asks often after something has changed or was asked for, and then less and less. Who wants to
know at once, because a job is silent, calls `hurry`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from fiber.backends.slurm import commands
from fiber.backends.slurm.states import FIELDS, Row, parse

__all__ = ["Poller"]

_FIRST = 0.25  # seconds between two questions, at first
_LAST = 20.0  # in the end
_GROWTH = 1.5


class Poller:
    """See the module.

    Args:
        name: of the jobs.
        take: called with what squeue says, None if it does not answer; returns whether that is new.
        idle: whether there is nothing to be asked; then nobody is.
    """

    def __init__(
        self, name: str, take: Callable[[list[Row] | None], bool], idle: Callable[[], bool]
    ) -> None:
        self.away: tuple[float, str] | None = None
        """Since when the controller has not answered, and its command's words."""
        self._name = name
        self._take = take
        self._idle = idle
        self._condition = threading.Condition()
        self._hurried = False
        self._closed = False
        self._asked_at = 0.0
        self._thread = threading.Thread(target=self._run, name="fiber-slurm-poll", daemon=True)

    def hurry(self) -> None:
        """Something may have changed: ask soon."""
        with self._condition:
            if self._thread.ident is None and not self._closed:
                self._thread.start()
            self._hurried = True
            self._condition.notify()

    def close(self) -> None:
        """Ask no more."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join(1.0)  # a command may hang for as long as the controller is away

    def _run(self) -> None:
        pause = _FIRST
        while True:
            with self._condition:
                if not self._hurried:
                    self._condition.wait(None if self._idle() else pause)
                if self._hurried:
                    pause = _FIRST
                    rest = self._asked_at + _FIRST - time.monotonic()
                    if rest > 0:
                        self._condition.wait_for(lambda: self._closed, rest)
                    self._hurried = False
                if self._closed:
                    return
                if self._idle():
                    continue
            pause = _FIRST if self._ask() else min(pause * _GROWTH, _LAST)
            self._asked_at = time.monotonic()

    def _ask(self) -> bool:
        try:
            text = commands.run(
                "squeue",
                f"--user={os.getuid()}",
                f"--name={self._name}",
                "--noheader",
                "--array",
                "--states=all",
                f"--Format={FIELDS}",
            )
        except (commands.Away, commands.Refused) as error:
            if self.away is None:
                self.away = time.monotonic(), commands.plain(str(error))
            return self._take(None)
        was_away, self.away = self.away, None
        return self._take(parse(text)) or was_away is not None
