"""Where the workers of a pool live: the agents that fork them.

    Crew ─ take ─► Berths ─┬─ on this machine: the session's one agent
                           └─ elsewhere: an agent with a free berth, or another job
    Crew ─ leave, trim ─► an agent whose berths are all empty ends, and its job with it

Elsewhere a job has as many berths as `workers_per_job` or the backend says, and asks for as much as
they need together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fiber.errors import StartError
from fiber.resources import Resources
from fiber.runtime.agents import Agent
from fiber.runtime.loop import Event
from fiber.runtime.session import Session

if TYPE_CHECKING:
    from fiber.runtime.remote import RemoteAgent

__all__ = ["Berths"]


class Berths:
    """See the module. Within the loop, save where it is made.

    Args:
        session: of this process.
        backend: of the pool.
        resources: of each worker.
        workers: how many there will be at first.
        on_ending: called with an agent that was asked to end, by its manager perhaps.

    Attributes:
        names: what the main module has that the agents loaded.
        elsewhere: whether the workers are apart from this process.

    Raises:
        StartError: no process can be started; the message says why.
    """

    def __init__(
        self,
        session: Session,
        backend: str,
        resources: Resources,
        workers: int,
        on_ending: Callable[[Agent], object],
    ) -> None:
        self._session = session
        self._backend = backend
        self._resources = resources
        self._on_ending = on_ending
        self._each = 1
        self._used: dict[RemoteAgent, int] = {}
        self._free: dict[RemoteAgent, None] = {}  # those of them that have a free berth
        self.elsewhere = session.agency.is_elsewhere(backend)
        if self.elsewhere:
            session.agency.prepare(backend)
            self._each = session.agency.share(backend, resources, workers)
            with session.loop:
                for _ in range(-(-workers // self._each)):
                    self._order()
            self.names = self._wait_for_one()
        else:
            self.names = session.agency.get(backend, resources).names

    def _order(self) -> RemoteAgent:
        agent = self._session.agency.soon(self._backend, self._resources, self._each)
        agent.kept = True  # type: ignore[attr-defined]
        agent.on_ending = lambda: self._on_ending(agent)  # type: ignore[attr-defined]
        self._used[agent] = 0  # type: ignore[index]
        self._free[agent] = None  # type: ignore[index]
        return agent  # type: ignore[return-value]

    def _wait_for_one(self) -> frozenset[str]:
        """Wait until workers can be started in one of the agents; return the names it has."""
        loop = self._session.loop
        try:
            while True:
                with loop:
                    agents = list(self._used)
                    ready = [agent for agent in agents if agent.ready.is_set and agent.usable]
                    if ready:
                        return ready[0].names
                    if all(agent.error is not None for agent in agents):
                        raise StartError(agents[0].error)
                    settled = Event()
                    for agent in agents:
                        agent.settled = settled
                loop.wait(settled)
        except BaseException:
            if not loop.closed:
                with loop:
                    self.close()
            self._session.agency.check_open()
            raise

    def take(self) -> Agent:
        """Return an agent for one more worker; it may not be ready yet, or never be."""
        if not self.elsewhere:
            return self._session.agency.soon(self._backend, self._resources)
        agent = self._free_one() or self._order()
        self._used[agent] += 1
        if self._used[agent] == self._each:
            self._free.pop(agent, None)
        return agent

    def _free_one(self) -> RemoteAgent | None:
        """Return an agent with a free berth, if there is one: one that is ready before others."""
        found = None
        for agent in self._free:
            if agent.usable:
                if agent.ready.is_set:  # there a worker is up at once
                    return agent
                found = found or agent
        return found

    def filled(self, workers: int) -> int:
        """Return how many workers there are room for in the jobs that `workers` take."""
        return -(-workers // self._each) * self._each if self.elsewhere else workers

    def leave(self, agent: Agent) -> None:
        """A worker has ended."""
        if agent in self._used:
            self._used[agent] -= 1
            self._free[agent] = None

    def trim(self) -> None:
        """End the agents that have no worker."""
        for agent in [a for a in self._free if not self._used[a]]:
            del self._used[agent], self._free[agent]
            agent.dismiss()

    def close(self) -> None:
        """End them all."""
        agents = list(self._used)
        self._used.clear()
        self._free.clear()
        for agent in agents:
            agent.close()
