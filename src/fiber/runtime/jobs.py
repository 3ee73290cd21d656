"""The jobs of one backend, kept by threads of their own, for a manager may take its time.

    loop ─ submit ─► Ticket ─► requests ─► thread ─► Backend.submit ─┐
                                             thread ◄─ Backend.wait ◄─┘
    loop ◄─ told(JobStatus) ◄─ call_soon ◄─────┘

What is asked for in one turn of the loop goes to the manager in one call. Whoever submitted a job
is told of each change of its status, in the loop, up to its end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from fiber.backends.base import Backend, Job, JobSpec, JobState, JobStatus
from fiber.errors import ConfigError, StartError
from fiber.runtime.logs import DEBUG, ERROR, log
from fiber.runtime.loop import Loop
from fiber.runtime.orders import REFUSED

__all__ = ["Jobs", "Ticket"]

_TURN = 0.25  # seconds of one wait, after which new jobs are waited for as well
_ALL_AT_ONCE = 0.002  # seconds in which what else is asked for goes along
_END = 10.0  # seconds that the end of all jobs may take

Told = Callable[[JobStatus], object]
MakeSpec = Callable[[Backend], JobSpec]


class Ticket:
    """A job that was asked for.

    Attributes:
        job: once the manager has accepted it.
        status: the last that was heard of it.
        wanted: whether it may run; if not it is killed as soon as there is something to kill.
    """

    def __init__(self, make: MakeSpec, told: Told) -> None:
        self.make = make
        self.told: Told | None = told
        self.job: Job | None = None
        self.status = JobStatus(JobState.PENDING)
        self.wanted = True


class Jobs:
    """See the module.

    Args:
        loop: of the master.
        find: returns the backend; called in a thread, for it may load a library for that.
    """

    def __init__(self, loop: Loop, find: Callable[[], Backend]) -> None:
        self._loop = loop
        self._find = find
        self._backend: Backend | None = None
        self._asked: queue.SimpleQueue[tuple[str, Ticket] | None] = queue.SimpleQueue()
        self._watched: set[Ticket] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._threads: list[threading.Thread] = []

    def submit(self, make: MakeSpec, told: Told) -> Ticket:
        """Have a job started. Within the loop, as the next one.

        Args:
            make: makes its description, in a thread, when the backend is there.
            told: called with each change of its status.
        """
        ticket = Ticket(make, told)
        if not self._threads:
            for run in (self._serve, self._watch):
                thread = threading.Thread(target=run, name="fiber-jobs", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._asked.put(("submit", ticket))
        return ticket

    def kill(self, ticket: Ticket) -> None:
        """End a job and let the manager forget it; nobody is told any more."""
        ticket.told = None
        ticket.wanted = False
        self._asked.put(("kill", ticket))

    def ask(self, ticket: Ticket) -> None:
        """Have the manager asked how a job is, which has fallen silent."""
        self._asked.put(("ask", ticket))

    # In the first thread

    def _serve(self) -> None:
        while True:
            requests = [self._asked.get()]
            try:
                while True:
                    requests.append(self._asked.get(timeout=_ALL_AT_ONCE))
            except queue.Empty:
                pass
            tickets = {"submit": [], "kill": [], "ask": []}  # type: dict[str, list[Ticket]]
            for request in requests:
                if request is not None:
                    tickets[request[0]].append(request[1])
            try:
                self._submit([ticket for ticket in tickets["submit"] if ticket.wanted])
                self._kill(tickets["kill"])
                self._ask(tickets["ask"])
            except Exception as error:  # a defect of a backend, for which nobody shall wait
                log(ERROR, "a backend failed: %r", error)
                for ticket in tickets["submit"]:
                    self._tell(ticket, JobStatus(JobState.ENDED, message=f"it failed: {error!r}"))
            if None in requests:
                return

    def _submit(self, tickets: Sequence[Ticket]) -> None:
        if not tickets:
            return
        try:
            if self._backend is None:
                self._backend = self._find()
            specs = [ticket.make(self._backend) for ticket in tickets]
            jobs = self._backend.submit(specs)
        except (StartError, ConfigError) as error:
            for ticket in tickets:
                self._tell(ticket, JobStatus(JobState.ENDED, reason=REFUSED, message=str(error)))
            return
        with self._changed:
            for ticket, job in zip(tickets, jobs, strict=True):
                log(DEBUG, "%s is job %s", self._backend.name, job.id)
                ticket.job = job
                self._tell(ticket, ticket.status)  # what it is called: its agent may come first
            self._watched.update(tickets)
            self._changed.notify()

    def _kill(self, tickets: Sequence[Ticket]) -> None:
        with self._changed:
            self._watched.difference_update(tickets)
        jobs = [ticket.job for ticket in tickets if ticket.job is not None]
        if jobs and self._backend is not None:
            self._backend.kill(jobs)

    def _ask(self, tickets: Sequence[Ticket]) -> None:
        """What there is to be heard, the other thread will hear."""
        jobs = [ticket.job for ticket in tickets if ticket.job is not None]
        if jobs and self._backend is not None:
            self._backend.status(jobs)

    # In the second thread

    def _watch(self) -> None:
        while True:
            with self._changed:
                while not self._watched and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                tickets = list(self._watched)
            self._look(tickets)

    def _look(self, tickets: list[Ticket]) -> None:
        assert self._backend is not None
        jobs: list[Any] = [ticket.job for ticket in tickets]
        try:
            statuses = self._backend.wait(jobs, _TURN)
        except Exception as error:
            log(ERROR, "a backend failed: %r", error)
            message = f"its backend failed: {error!r}"
            statuses = [JobStatus(JobState.ENDED, message=message)] * len(jobs)
        for ticket, status in zip(tickets, statuses, strict=True):
            if status != ticket.status:
                self._tell(ticket, self._with_last_words(ticket, status))
            if status.state is JobState.ENDED:
                with self._changed:
                    self._watched.discard(ticket)

    def _tell(self, ticket: Ticket, status: JobStatus) -> None:
        ticket.status = status
        self._loop.call_soon(lambda: ticket.told(status) if ticket.told is not None else None)

    def _with_last_words(self, ticket: Ticket, status: JobStatus) -> JobStatus:
        """Add what a job wrote that failed by itself: it says why, such as that no way led here."""
        if status.state is not JobState.ENDED or status.reason != "Error":
            return status
        try:
            text = self.logs(ticket).strip()
        except Exception as error:
            log(DEBUG, "the log of a job cannot be had: %r", error)
            text = ""
        if not text or text in status.message:
            return status
        return status._replace(message=f"{status.message}\nThe last that it wrote:\n{text}")

    def logs(self, ticket: Ticket) -> str:
        """Return the last lines of a job; asks the manager, so not within the loop."""
        if self._backend is None or ticket.job is None:
            return ""
        return self._backend.logs(ticket.job)

    def close(self) -> None:
        """End all jobs, and have the manager forget the session. Outside the loop."""
        if not self._threads:
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._asked.put(None)
        for thread in self._threads:
            thread.join(_END)
        if self._backend is not None:
            self._backend.close()
