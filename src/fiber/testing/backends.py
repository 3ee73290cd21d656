"""What every backend does, as tests.

    test ── submit ──► backend ──► job: a tiny Python program
      ▲                                  │ what it found out: its exit code
      └──────── a TCP connection ────────┘ that it has come so far; its end: that it is gone

Each test starts as few jobs as it can, for a job may cost seconds. Everything has a deadline, the
attribute `patience` of the class.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from fiber.backends.base import SECRET_FILE, Backend, Job, JobSpec, JobState, JobStatus
from fiber.errors import StartError
from fiber.resources import Resources

__all__ = ["BackendConformance"]

# Text that shells, templates and careless code would change.
AWKWARD = "two  words, 'one' \"two\" $HOME $(HOME) $$ ${HOME} `id` %s {x} \\n\nline ü€😀 "

# Tells the test, over a connection, that the job has come so far; `call` keeps it open.
PHONE = """
import os, signal, socket, sys, time

def call():
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for address in os.environ["TEST_ADDRESSES"].split():
            host, _, port = address.rpartition(":")
            try:
                line = socket.create_connection((host.strip("[]"), int(port)), 5)
            except OSError:
                continue
            line.settimeout(None)
            line.sendall(os.environ["TEST_NAME"].encode() + b"\\n")
            return line
        time.sleep(0.1)
    sys.exit("none of the addresses leads to the test: " + os.environ["TEST_ADDRESSES"])
"""
WAIT = "line = call(); line.recv(1)\n"

# Its first process ignores the signals that it does not handle, where a job is a container without
# an init; not this one, which is raised by what it does.
SEGFAULT = """
import ctypes, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
ctypes.string_at(0)
"""

Start = Callable[..., "list[Job]"]


class Phone:
    """Listens to jobs that call."""

    def __init__(self, backend: Backend, patience: float) -> None:
        self._patience = patience
        self._listener = socket.create_server(("0.0.0.0" if backend.elsewhere else "127.0.0.1", 0))
        self._lines: list[socket.socket] = []
        self._waiting: dict[str, socket.socket] = {}
        self.addresses = list(backend.addresses(self._listener.getsockname()[1]))

    def answer(self, name: str) -> socket.socket:
        """Return the connection of the job called `name` when it has called."""
        deadline = time.monotonic() + self._patience
        while name not in self._waiting:
            if not self._accept(max(deadline - time.monotonic(), 0.01)):
                pytest.fail(f"the job {name!r} did not call within {self._patience:g} s")
        return self._waiting.pop(name)

    def callers(self, name: str) -> list[socket.socket]:
        """Return the connection of the job called `name` if it has called."""
        while self._accept(0.2):
            pass
        return [line for caller, line in self._waiting.items() if caller == name]

    def _accept(self, timeout: float) -> bool:
        self._listener.settimeout(timeout)
        try:
            line, _ = self._listener.accept()
        except TimeoutError:
            return False
        self._lines.append(line)
        line.settimeout(self._patience)
        said = b""
        with contextlib.suppress(ConnectionError):
            while not said.endswith(b"\n") and (more := line.recv(100)):
                said += more
        self._waiting[said.decode().strip()] = line
        return True

    def close(self) -> None:
        for line in [*self._lines, self._listener]:
            line.close()


def gone(line: socket.socket) -> bool:
    """Whether the other side of `line` ends within its time-out."""
    try:
        return line.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


class BackendConformance:
    """The tests. A subclass, whose name begins with Test, defines the fixture `backend`.

    Attributes:
        patience: seconds that a job may take to run, or to be gone.
        has_logs: whether the backend keeps what jobs wrote; if not, `logs` returns nothing.
        close_ends_jobs: whether `close` also ends jobs that still run. All backends do whose jobs
            would otherwise be left in a manager.
    """

    patience = 60.0
    has_logs = True
    close_ends_jobs = True

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        """The backend to be tested; whoever makes it closes it."""
        raise NotImplementedError(f"{type(self).__name__} must define the fixture 'backend'")

    @pytest.fixture
    def phone(self, backend: Backend) -> Iterator[Phone]:
        """The listener that jobs call."""
        phone = Phone(backend, self.patience)
        yield phone
        phone.close()

    @pytest.fixture
    def start(self, backend: Backend, request: pytest.FixtureRequest) -> Iterator[Start]:
        """Submit programs, in one call: `start("exit(3)", "exit(4)", environment={}, ...)`.

        The first one is called "job-0". What is left of them at the end is killed.
        """
        started: list[Job] = []

        def start(
            *programs: str,
            arguments: Sequence[str] = (),
            environment: Mapping[str, str] | None = None,
            secret: bytes = b"",
        ) -> list[Job]:
            # On a backend whose jobs are not elsewhere it is the whole environment.
            given = {} if backend.elsewhere else dict(os.environ)
            given.update(environment or {})
            if any("call()" in program for program in programs):
                phone: Phone = request.getfixturevalue("phone")
                given["TEST_ADDRESSES"] = " ".join(phone.addresses)
            specs = [
                JobSpec(
                    name=f"job-{number}",
                    command=[*backend.python, "-c", PHONE + program, *arguments],
                    environment={**given, "TEST_NAME": f"job-{number}"},
                    resources=Resources(),
                    session="conformance",
                    secret=secret,
                )
                for number, program in enumerate(programs)
            ]
            jobs = list(backend.submit(specs))
            started.extend(jobs)
            assert len(jobs) == len(specs)
            return jobs

        yield start
        backend.kill(started)

    # Helpers that use the protocol.

    def ends(self, backend: Backend, jobs: Sequence[Job]) -> list[JobStatus]:
        """Return how `jobs` ended; all of them must."""
        deadline = time.monotonic() + self.patience
        statuses = list(backend.status(jobs))
        while open_ := [
            job for job, s in zip(jobs, statuses, strict=True) if s.state is not JobState.ENDED
        ]:
            rest = deadline - time.monotonic()
            assert rest > 0, f"after {self.patience:g} s jobs still have not ended: {statuses}"
            backend.wait(open_, rest)
            statuses = list(backend.status(jobs))
        return statuses

    def runs(self, backend: Backend, jobs: Sequence[Job]) -> None:
        """Wait until all of `jobs` run."""
        deadline = time.monotonic() + self.patience
        while True:
            statuses = backend.status(jobs)
            if all(status.state is JobState.RUNNING for status in statuses):
                return
            ended = [status for status in statuses if status.state is JobState.ENDED]
            assert not ended, f"jobs have ended that should run: {ended}"
            assert time.monotonic() < deadline, f"after {self.patience:g} s: {statuses}"
            time.sleep(0.05)

    # The tests.

    def test_it_says_what_it_is(self, backend: Backend) -> None:
        assert backend.name
        assert backend.elsewhere in (True, False)
        assert len(backend.python) >= 1

    def test_no_jobs_are_fine_too(self, backend: Backend) -> None:
        assert list(backend.submit([])) == []
        assert list(backend.status([])) == []
        backend.terminate([])
        backend.kill([])

    def test_jobs_end_with_their_exit_codes_in_the_order_of_their_specs(
        self, backend: Backend, start: Start
    ) -> None:
        jobs = start("sys.exit(0)", "sys.exit(3)", SEGFAULT, "sys.exit(4)")
        assert len({job.id for job in jobs}) == 4
        assert all(job.id for job in jobs)
        statuses = self.ends(backend, jobs)
        assert [status.exit_code for status in statuses] == [0, 3, -signal.SIGSEGV, 4]
        assert statuses[0].reason == ""
        # Asked for in another order, and again.
        assert [s.exit_code for s in backend.status(jobs[::-1])] == [4, -signal.SIGSEGV, 3, 0]

    def test_a_job_that_runs_is_running(self, backend: Backend, start: Start, phone: Phone) -> None:
        jobs = start(WAIT)
        line = phone.answer("job-0")
        self.runs(backend, jobs)
        (status,) = backend.status(jobs)
        assert status.exit_code is None
        line.sendall(b"x")
        assert self.ends(backend, jobs)[0].exit_code == 0

    def test_wait_returns_when_its_time_is_up(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        jobs = start(WAIT)
        phone.answer("job-0")
        self.runs(backend, jobs)
        begin = time.monotonic()
        (status,) = backend.wait(jobs, 0.3)
        assert 0.25 <= time.monotonic() - begin < self.patience / 2
        assert status.state is JobState.RUNNING

    def test_wait_returns_when_one_has_ended(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        jobs = start(WAIT, WAIT)
        lines = [phone.answer("job-0"), phone.answer("job-1")]
        self.runs(backend, jobs)
        lines[1].sendall(b"x")
        begin = time.monotonic()
        statuses = backend.wait(jobs, self.patience * 2)
        assert time.monotonic() - begin < self.patience
        assert [s.state for s in statuses] == [JobState.RUNNING, JobState.ENDED]
        begin = time.monotonic()
        backend.wait(jobs, self.patience * 2)  # one has ended already
        assert time.monotonic() - begin < self.patience

    def test_command_and_environment_arrive_as_they_are(
        self, backend: Backend, start: Start
    ) -> None:
        wanted = [AWKWARD, "", "--help"]
        program = f"""
sys.exit(1 if os.environ.get("AWKWARD") != {AWKWARD!r} else 0
         or 2 if os.environ.get("EMPTY") != "" else 0
         or 3 if sys.argv[1:] != {wanted!r} else 0)
"""
        jobs = start(program, arguments=wanted, environment={"AWKWARD": AWKWARD, "EMPTY": ""})
        # 1: the variable AWKWARD; 2: the variable EMPTY; 3: the arguments.
        assert self.ends(backend, jobs)[0].exit_code == 0

    def test_the_secret_is_in_its_file_and_nowhere_else(
        self, backend: Backend, start: Start
    ) -> None:
        secret = b"\0sesame-" + os.urandom(16).hex().encode()
        program = """
import hashlib
with open(os.environ["SECRET_FILE"], "rb") as file:
    secret = file.read()
seen = repr(sorted(os.environ.items())) + repr(sys.orig_argv)
sys.exit(1 if hashlib.sha256(secret).hexdigest() != os.environ["TEST_DIGEST"] else 0
         or 2 if secret.decode()[1:] in seen else 0
         or 3 if os.stat(os.environ["SECRET_FILE"]).st_mode & 0o022 else 0)
""".replace("SECRET_FILE", SECRET_FILE)
        digest = hashlib.sha256(secret).hexdigest()
        jobs = start(program, environment={"TEST_DIGEST": digest}, secret=secret)
        # 1: the file holds something else; 2: it can be seen; 3: others may write to the file.
        assert self.ends(backend, jobs)[0].exit_code == 0

    def test_terminate_is_a_sigterm_for_the_command(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        jobs = start(handler + WAIT, WAIT)
        phone.answer("job-0")
        phone.answer("job-1")
        self.runs(backend, jobs)
        backend.terminate(jobs[:1])
        assert self.ends(backend, jobs[:1])[0].exit_code == 42
        assert backend.status(jobs)[1].state is JobState.RUNNING

    def test_kill_ends_jobs_whatever_they_do(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        jobs = start(deaf + WAIT, WAIT, WAIT)
        lines = [phone.answer(f"job-{number}") for number in range(3)]
        backend.kill(jobs[:2])
        assert gone(lines[0])
        assert gone(lines[1])
        assert [s.state for s in self.ends(backend, jobs[:2])] == [JobState.ENDED] * 2
        lines[2].sendall(b"x")  # the other one goes on
        assert self.ends(backend, jobs[2:])[0].exit_code == 0

    def test_jobs_that_have_ended_can_be_terminated_and_killed(
        self, backend: Backend, start: Start
    ) -> None:
        jobs = start("sys.exit(5)")
        assert self.ends(backend, jobs)[0].exit_code == 5
        for _ in range(2):
            backend.terminate(jobs)
            backend.kill(jobs)
        (status,) = backend.status(jobs)
        assert (status.state, status.exit_code) == (JobState.ENDED, 5)
        (status,) = backend.wait(jobs, self.patience)
        assert (status.state, status.exit_code) == (JobState.ENDED, 5)

    def test_logs_are_the_last_lines_of_both_streams(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        program = """
for number in range(100):
    print("line", number)
sys.stdout.flush()
print("an error ü", file=sys.stderr, flush=True)
"""
        jobs = start(program + "call().recv(1); print('the end')")
        line = phone.answer("job-0")
        if self.has_logs:
            # Nobody promises an order between the two streams.
            deadline = time.monotonic() + self.patience
            while "an error ü" not in backend.logs(jobs[0], 200) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert "line 99" in backend.logs(jobs[0], 200).splitlines()  # while it runs
        line.sendall(b"x")
        self.ends(backend, jobs)
        lines = backend.logs(jobs[0], 3).splitlines()
        if self.has_logs:
            assert lines[-1] == "the end", lines
            assert len(lines) == 3, lines
            everything = backend.logs(jobs[0], 200).splitlines()
            assert {"line 0", "line 99", "an error ü", "the end"} <= set(everything), everything
            assert len(backend.logs(jobs[0]).splitlines()) == 20
        else:
            assert lines == []

    def test_many_jobs_in_one_call(self, backend: Backend, start: Start) -> None:
        jobs = start(*(f"sys.exit({code})" for code in range(10)))
        assert [status.exit_code for status in self.ends(backend, jobs)] == list(range(10))

    def test_calls_may_come_from_several_threads(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        codes: list[int | None] = []

        def user(code: int) -> None:
            codes.append(self.ends(backend, start(f"sys.exit({code})"))[0].exit_code)

        threads = [threading.Thread(target=user, args=(code,)) for code in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * self.patience)
        assert sorted(codes, key=str) == [1, 2, 3]

    def test_a_command_that_is_not_there_is_told(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        program = "no-such-program-of-fiber"
        start(WAIT)
        other = phone.answer("job-0")
        environment = {"TEST_ADDRESSES": " ".join(phone.addresses), "TEST_NAME": "sibling"}
        sibling = [*backend.python, "-c", PHONE + WAIT]
        specs = [
            JobSpec("sibling", sibling, environment, Resources(), "conformance"),
            JobSpec("missing", [program, "x"], {}, Resources(), "conformance"),
        ]
        told = ""
        jobs: Sequence[Job] = ()
        try:
            jobs = backend.submit(specs)
        except StartError as error:
            told = str(error)
        else:  # the manager finds out when it starts the job
            try:
                (status,) = self.ends(backend, jobs[1:])
                assert status.exit_code != 0
                assert status.reason
                told = status.message
            finally:
                backend.kill(jobs)
        assert program in told
        # Refused or killed: of that call nothing runs any more, the other goes on.
        assert all(gone(line) for line in phone.callers("sibling"))
        other.sendall(b"x")
        assert gone(other)

    def test_addresses_lead_to_this_process(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        assert phone.addresses
        for address in phone.addresses:
            host, colon, port = address.rpartition(":")
            assert host
            assert colon
            assert 0 < int(port) < 65536
        jobs = start("line = call(); line.sendall(line.recv(5).upper())\n")
        line = phone.answer("job-0")
        line.sendall(b"hello")
        assert line.recv(5) == b"HELLO"
        assert self.ends(backend, jobs)[0].exit_code == 0

    def test_nothing_is_left_after_close(
        self, backend: Backend, start: Start, phone: Phone
    ) -> None:
        jobs = start(WAIT, "sys.exit(3)")
        line = phone.answer("job-0")
        self.ends(backend, jobs[1:])
        if not self.close_ends_jobs:
            backend.kill(jobs[:1])
        backend.close()
        assert gone(line)
        statuses = backend.status(jobs)
        assert [status.state for status in statuses] == [JobState.ENDED] * 2
        assert statuses[1].exit_code == 3
        backend.close()  # there may be nothing to close
