"""Jobs of a backend: one call for what is asked for together, and every change told in the loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from fiber.backends.base import Backend, JobSpec, JobState, JobStatus
from fiber.errors import StartError
from fiber.resources import Resources
from fiber.runtime.jobs import Jobs
from fiber.runtime.loop import Event, Loop

PATIENCE = 20.0
ACCEPTED = JobStatus(JobState.PENDING)


class Job:
    def __init__(self, id: str) -> None:
        self.id = id
        self.status = JobStatus(JobState.PENDING)


class Manager:
    """A backend whose jobs do what the test says."""

    name = "manager"
    elsewhere = True
    python = ("python3",)

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.jobs: dict[str, Job] = {}
        self.calls: list[list[str]] = []
        self.killed: list[str] = []
        self.closed = False
        self.refuses: Exception | None = None
        self.waits = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def submit(self, specs: Sequence[JobSpec]) -> list[Job]:
        if self.refuses is not None:
            raise self.refuses
        self.calls.append([spec.name for spec in specs])
        jobs = [Job(spec.name) for spec in specs]
        self.jobs.update({job.id: job for job in jobs})
        return jobs

    def set(self, id: str, status: JobStatus) -> None:
        with self.changed:
            self.jobs[id].status = status
            self.changed.notify_all()

    def status(self, jobs: Sequence[Job]) -> list[JobStatus]:
        return [job.status for job in jobs]

    def wait(self, jobs: Sequence[Job], timeout: float) -> list[JobStatus]:
        self.waits.set()
        assert self.answers.wait(PATIENCE)
        with self.changed:
            ended = lambda: any(job.status.state is JobState.ENDED for job in jobs)  # noqa: E731
            self.changed.wait_for(ended, timeout)
            return self.status(jobs)

    def terminate(self, jobs: Sequence[Job]) -> None:
        """Not called by `Jobs`."""

    def kill(self, jobs: Sequence[Job]) -> None:
        self.killed += [job.id for job in jobs]

    def logs(self, job: Job, lines: int = 20) -> str:
        return f"the last words of {job.id}"

    def addresses(self, port: int) -> list[str]:
        return [f"127.0.0.1:{port}"]

    def close(self) -> None:
        self.closed = True


class Told:
    """What was told of a job, and a way to wait for more."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.statuses: list[JobStatus] = []
        self.event = Event()

    def __call__(self, status: JobStatus) -> None:
        self.statuses.append(status)
        self.event.set()

    def wait(self, until: Callable[[JobStatus], bool]) -> JobStatus:
        while not (self.statuses and until(self.statuses[-1])):
            assert self.loop.wait(self.event, PATIENCE), self.statuses
            with self.loop:
                self.event = Event()
                if self.statuses and until(self.statuses[-1]):
                    break
        return self.statuses[-1]


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def manager() -> Manager:
    return Manager()


@pytest.fixture
def jobs(loop: Loop, manager: Manager) -> Iterator[Jobs]:
    jobs = Jobs(loop, lambda: manager)
    yield jobs
    jobs.close()


def named(name: str) -> Callable[[Backend], JobSpec]:
    return lambda backend: JobSpec(name, [*backend.python], {}, Resources())


def ended(status: JobStatus) -> bool:
    return status.state is JobState.ENDED


def running(status: JobStatus) -> bool:
    return status.state is JobState.RUNNING


def test_what_is_asked_for_together_is_one_call(loop: Loop, manager: Manager, jobs: Jobs) -> None:
    told = [Told(loop) for _ in range(20)]
    with loop:
        for number, heard in enumerate(told):
            jobs.submit(named(f"job-{number}"), heard)
    while len(manager.jobs) < 20:
        loop.wait(Event(), 0.01)
    for number in range(20):
        manager.set(f"job-{number}", JobStatus(JobState.RUNNING))
    for heard in told:
        heard.wait(running)
    assert manager.calls == [[f"job-{number}" for number in range(20)]]


def test_changes_are_told_up_to_the_end(loop: Loop, manager: Manager, jobs: Jobs) -> None:
    told = Told(loop)
    with loop:
        jobs.submit(named("one"), told)
    waiting = JobStatus(JobState.PENDING, reason="Unschedulable", message="no room")
    while "one" not in manager.jobs:
        loop.wait(Event(), 0.01)
    manager.set("one", waiting)
    assert told.wait(lambda status: status.reason == "Unschedulable") == waiting
    manager.set("one", JobStatus(JobState.RUNNING, node="n1"))
    told.wait(running)
    end = JobStatus(JobState.ENDED, exit_code=137, reason="OOMKilled", node="n1")
    manager.set("one", end)
    assert told.wait(ended) == end
    assert told.statuses[0] == ACCEPTED
    assert told.statuses[1:] == [waiting, JobStatus(JobState.RUNNING, node="n1"), end]


def test_that_it_is_accepted_is_told_while_the_manager_is_asked_for_others(
    loop: Loop, manager: Manager, jobs: Jobs
) -> None:
    told = Told(loop)
    manager.answers.clear()
    with loop:
        jobs.submit(named("first"), Told(loop))
    assert manager.waits.wait(PATIENCE)
    called: list[str] = []
    with loop:
        ticket = jobs.submit(
            named("second"), lambda status: (called.append(ticket.job.id), told(status))
        )
    told.wait(lambda status: status == ACCEPTED)
    assert called == ["second"]
    manager.answers.set()


def test_a_refusal_is_the_end_of_all_that_were_asked_for(
    loop: Loop, manager: Manager, jobs: Jobs
) -> None:
    manager.refuses = StartError("you may not create pods")
    told = [Told(loop), Told(loop)]
    with loop:
        for heard in told:
            jobs.submit(named("x"), heard)
    for heard in told:
        assert heard.wait(ended).message == "you may not create pods"


def test_a_defect_of_a_backend_is_told_and_not_waited_for(
    loop: Loop, manager: Manager, jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    manager.refuses = ZeroDivisionError("a defect")
    told, later = Told(loop), Told(loop)
    with loop:
        jobs.submit(named("x"), told)
    assert "a defect" in told.wait(ended).message
    assert "a defect" in caplog.text
    manager.refuses = None
    with loop:
        jobs.submit(named("y"), later)
    while "y" not in manager.jobs:
        loop.wait(Event(), 0.01)
    manager.set("y", JobStatus(JobState.RUNNING))
    later.wait(running)


def test_who_is_killed_is_told_nothing_more(loop: Loop, manager: Manager, jobs: Jobs) -> None:
    killed, other = Told(loop), Told(loop)
    with loop:
        ticket = jobs.submit(named("killed"), killed)
        jobs.submit(named("other"), other)
    while len(manager.jobs) < 2:
        loop.wait(Event(), 0.01)
    with loop:
        jobs.kill(ticket)
    while manager.killed != ["killed"]:
        loop.wait(Event(), 0.01)
    manager.set("killed", JobStatus(JobState.ENDED))
    manager.set("other", JobStatus(JobState.ENDED))
    other.wait(ended)
    assert killed.statuses in ([], [ACCEPTED])


def test_who_is_not_wanted_any_more_is_never_submitted(
    loop: Loop, manager: Manager, jobs: Jobs
) -> None:
    told = Told(loop)
    with loop:
        jobs.kill(jobs.submit(named("unwanted"), told))
        jobs.submit(named("wanted"), told)
    while "wanted" not in manager.jobs:
        loop.wait(Event(), 0.01)
    assert manager.calls == [["wanted"]]


def test_the_end_closes_the_backend(loop: Loop, manager: Manager) -> None:
    jobs = Jobs(loop, lambda: manager)
    with loop:
        ticket = jobs.submit(named("one"), lambda status: None)
    while "one" not in manager.jobs or ticket.job is None:
        loop.wait(Event(), 0.01)
    assert jobs.logs(ticket) == "the last words of one"
    with loop:
        jobs.kill(ticket)
    jobs.close()
    assert manager.killed == ["one"]
    assert manager.closed


def test_of_a_job_that_failed_by_itself_the_last_words_are_told(
    loop: Loop, manager: Manager, jobs: Jobs
) -> None:
    failed, deleted = Told(loop), Told(loop)
    with loop:
        jobs.submit(named("failed"), failed)
        jobs.submit(named("deleted"), deleted)
    while "deleted" not in manager.jobs:
        loop.wait(Event(), 0.01)
    manager.set("failed", JobStatus(JobState.ENDED, 1, "Error", message="It failed."))
    manager.set("deleted", JobStatus(JobState.ENDED, -9, "Deleted", message="It is gone."))
    status = failed.wait(ended)
    assert status.message == "It failed.\nThe last that it wrote:\nthe last words of failed"
    assert deleted.wait(ended).message == "It is gone."
