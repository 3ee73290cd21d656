"""The loop: who waits drives it, nobody hangs, and a Ctrl-C waits for its moment.

What concerns signals runs in a program of its own, for the signals of this one belong to pytest.
"""

from __future__ import annotations

import gc
import os
import random
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.waiting import until

from fiber.runtime.link import Link
from fiber.runtime.loop import Event, Loop
from fiber.runtime.poller import READ
from fiber.wire.channel import Channel
from fiber.wire.framing import Frame

Run = Callable[..., "subprocess.CompletedProcess[str]"]
PATIENCE = 20.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


class Echo:
    """Two links of one loop: what is posted at one end comes back from the other."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.received: list[Frame] = []
        self.arrived: dict[bytes, Event] = {}
        self.lost: list[str] = []
        ours, theirs = (Channel(sock) for sock in socket.socketpair())
        with loop:
            self.near = Link(loop, ours, self._near, lambda: self.lost.append("near"))
            self.far = Link(loop, theirs, self._far, lambda: self.lost.append("far"))

    def _near(self, frame: Frame) -> None:
        self.received.append(frame)
        event = self.arrived.get(bytes(frame.body))
        if event is not None:
            event.set()

    def _far(self, frame: Frame) -> None:
        self.far.post(frame.kind, bytes(frame.body))

    def ask(self, body: bytes, timeout: float | None = PATIENCE) -> bool:
        """Send `body` on its way and wait until it is back."""
        with self.loop:
            event = self.arrived[body] = Event()
            self.near.post(1, body)
        return self.loop.wait(event, timeout)

    def close(self) -> None:
        with self.loop:
            self.near.close()
            self.far.close()


@pytest.fixture
def echo(loop: Loop) -> Iterator[Echo]:
    echo = Echo(loop)
    yield echo
    if not loop.closed:
        echo.close()


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Call `work` with each number, all at once, and return results or exceptions."""
    results: list[Any] = [None] * count

    def one(number: int) -> None:
        try:
            results[number] = work(number)
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=one, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


# Waiting ----------------------------------------------------------------------------------------


def test_who_waits_gets_what_comes(echo: Echo) -> None:
    for number in range(500):
        assert echo.ask(str(number).encode())
    assert [int(bytes(frame.body)) for frame in echo.received] == list(range(500))


def test_an_event_that_is_set_already_does_not_wait(loop: Loop) -> None:
    event = Event()
    with loop:
        event.set()
    assert loop.wait(event)
    assert loop.wait(event, 0)


def test_many_threads_wait_for_the_same_event(loop: Loop) -> None:
    event = Event()
    with loop:
        loop.call_later(0.1, event.set)
    assert in_threads(30, lambda number: loop.wait(event, PATIENCE)) == [True] * 30


def test_many_threads_wait_for_their_own_events(echo: Echo) -> None:
    def work(number: int) -> bool:
        return all(echo.ask(f"{number}.{turn}".encode()) for turn in range(100))

    assert in_threads(12, work) == [True] * 12
    assert len({bytes(frame.body) for frame in echo.received}) == 1_200


def test_when_the_leader_has_what_it_waited_for_another_leads(loop: Loop) -> None:
    """Each event is set by a timer, so somebody must lead until the very last."""
    events = [Event() for _ in range(20)]
    with loop:
        for number, event in enumerate(events):
            loop.call_later(0.02 * (number + 1), event.set)

    def work(number: int) -> float:
        began = time.monotonic()
        assert loop.wait(events[number], PATIENCE)
        return time.monotonic() - began

    for number, took in enumerate(in_threads(20, work)):
        assert isinstance(took, float), took
        assert took < 0.02 * (number + 1) + 1


def test_an_event_set_by_another_thread_wakes_who_leads(loop: Loop) -> None:
    event = Event()
    took: list[float] = []

    def wait() -> None:
        began = time.monotonic()
        loop.wait(event, PATIENCE)
        took.append(time.monotonic() - began)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    until(lambda: loop._polling)
    with loop:
        event.set()
    waiter.join(2 * PATIENCE)
    assert took[0] < PATIENCE / 2


@pytest.mark.parametrize("company", [0, 5])
def test_a_timeout_is_kept(loop: Loop, company: int) -> None:
    stop = Event()

    def work(number: int) -> float:
        if number:
            loop.wait(stop, PATIENCE)
            return 0.0
        began = time.monotonic()
        assert not loop.wait(Event(), 0.2)
        took = time.monotonic() - began
        with loop:
            stop.set()
        return took

    took = in_threads(company + 1, work)[0]
    assert 0.2 <= took < 1.2


@pytest.mark.parametrize("timeout", [0, -1, 0.0001])
def test_a_timeout_that_is_over_already_returns_at_once(loop: Loop, timeout: float) -> None:
    began = time.monotonic()
    assert not loop.wait(Event(), timeout)
    assert time.monotonic() - began < 1


def test_an_endless_timeout_is_none_also_for_who_does_not_lead(loop: Loop) -> None:
    event = Event()
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            assert loop.wait(event, float("inf"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    while len(loop._sleepers) < 2 and not errors and time.monotonic() < deadline:
        time.sleep(0.001)
    with loop:
        event.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not errors


def test_timers_run_in_their_order_and_not_before_their_time(loop: Loop) -> None:
    ran: list[tuple[int, float]] = []
    done = Event()
    began = time.monotonic()
    with loop:
        for number in random.Random(0).sample(range(10), 10):
            loop.call_later(0.01 * number, lambda n=number: ran.append((n, time.monotonic())))
        cancelled = loop.call_later(0.01, lambda: ran.append((99, 0.0)))
        loop.call_later(0.15, done.set)
        cancelled.cancel()
    assert loop.wait(done, PATIENCE)
    assert [number for number, _ in ran] == list(range(10))
    assert all(when >= began + 0.01 * number for number, when in ran)


def test_a_timer_that_is_set_while_another_waits_is_not_late(loop: Loop) -> None:
    never, soon = Event(), Event()
    waiter = threading.Thread(target=lambda: loop.wait(never, PATIENCE), daemon=True)
    waiter.start()
    until(lambda: loop._polling)
    with loop:
        loop.call_later(0.05, soon.set)
    until(lambda: soon.is_set)
    with loop:
        never.set()
    waiter.join(PATIENCE)
    assert not waiter.is_alive()


# The background ---------------------------------------------------------------------------------


def test_what_comes_is_handled_though_nobody_waits(echo: Echo) -> None:
    for number in range(20):
        with echo.loop:
            echo.near.post(1, str(number).encode())
        until(lambda number=number: len(echo.received) == number + 1)  # type: ignore[misc]


def test_the_background_takes_over_and_yields_again(echo: Echo) -> None:
    for number in range(30):
        assert echo.ask(b"x%d" % number)
        if number % 3 == 0:
            with echo.loop:
                echo.near.post(1, b"alone")
            until(lambda n=number: len(echo.received) == n + 2 + n // 3)  # type: ignore[misc]


def test_a_process_that_idles_takes_no_time(run_script: Run) -> None:
    program = """
import time
from fiber.runtime.loop import Event, Loop
import socket
loop = Loop()
a, b = socket.socketpair()
with loop:
    loop.register(a.fileno(), 1, lambda events: None)
time.sleep(0.2)
began = time.process_time()
time.sleep(1)
assert time.process_time() - began < 0.05, "nobody waits, and it burns time"
began = time.process_time()
loop.wait(Event(), 1)
assert time.process_time() - began < 0.05, "somebody waits, and it burns time"
loop.close()
"""
    done = run_script(program, timeout=20)
    assert done.returncode == 0, done.stderr


# From finalizers --------------------------------------------------------------------------------


def test_a_call_from_any_thread_runs_soon(echo: Echo) -> None:
    ran: list[int] = []
    in_threads(8, lambda number: echo.loop.call_soon(lambda: ran.append(number)))
    until(lambda: sorted(ran) == list(range(8)))


def test_a_finalizer_may_call_within_a_handler(echo: Echo) -> None:
    """The garbage collector runs it with the loop's lock held, by the leader or by another."""
    ran: list[int] = []

    class Garbage:
        def __init__(self) -> None:
            self.me = self

    def litter(number: int) -> None:
        garbage = Garbage()
        weakref.finalize(garbage, echo.loop.call_soon, lambda: ran.append(number))
        del garbage
        gc.collect()

    with echo.loop:
        litter(0)
        for number in range(1, 20):
            echo.loop.call_later(0.002 * number, lambda n=number: litter(n))
    for number in range(20):
        assert echo.ask(b"%d" % number)
    until(lambda: sorted(ran) == list(range(20)))


def test_a_finalizer_of_an_idle_program_is_heard(echo: Echo) -> None:
    time.sleep(0.05)  # not for a result: so that the background sleeps in its poll
    ran = threading.Event()
    echo.loop.call_soon(ran.set)
    assert ran.wait(PATIENCE)


# Signals ----------------------------------------------------------------------------------------

PRELUDE = """
import os, signal, socket, sys, threading, time
from fiber.runtime import loop as loop_module
from fiber.runtime.link import Link
from fiber.runtime.loop import Event, Loop
from fiber.wire.channel import Channel

loop = Loop()
frames = []
arrived = {}
def near(frame):
    frames.append(bytes(frame.body))
    if frames[-1] in arrived:
        arrived[frames[-1]].set()
a, b = (Channel(s) for s in socket.socketpair())
with loop:
    one = Link(loop, a, near, lambda: None)
    two = Link(loop, b, lambda frame: two.post(1, bytes(frame.body)), lambda: None)

def ask(body):
    with loop:
        event = arrived[body] = Event()
        one.post(1, body)
    return loop.wait(event, 20)

def interrupt_in(seconds, signum=signal.SIGINT):
    thread = threading.Timer(seconds, os.kill, (os.getpid(), signum))
    thread.start()
    return thread
"""


def check(run_script: Run, program: str) -> None:
    done = run_script(PRELUDE + program + "\nloop.close()\nprint('end')\n", timeout=40)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("end\n")
    assert done.stderr == ""


def test_an_interrupt_ends_the_wait_once_and_the_loop_goes_on(run_script: Run) -> None:
    check(
        run_script,
        """
for turn in range(5):
    began = time.monotonic()
    interrupt_in(0.05)
    try:
        loop.wait(Event(), 20)
    except KeyboardInterrupt:
        pass
    else:
        sys.exit("not interrupted")
    assert time.monotonic() - began < 2
    assert ask(b"%d" % turn)
assert loop.wait(Event(), 0.1) is False
""",
    )


def test_an_interrupt_ends_the_wait_while_another_thread_leads(run_script: Run) -> None:
    check(
        run_script,
        """
other = Event()
thread = threading.Thread(target=loop.wait, args=(other, 20))
thread.start()
while loop._leader != thread.ident:
    time.sleep(0.001)
for turn in range(5):
    began = time.monotonic()
    interrupt_in(0.05)
    try:
        loop.wait(Event(), 20)
    except KeyboardInterrupt:
        pass
    else:
        sys.exit("not interrupted")
    assert time.monotonic() - began < 2
    assert ask(b"%d" % turn)
with loop:
    other.set()
thread.join(20)
assert not thread.is_alive()
""",
    )


def test_an_interrupt_just_before_the_main_thread_sleeps_is_not_missed(run_script: Run) -> None:
    check(
        run_script,
        """
other = Event()
thread = threading.Thread(target=loop.wait, args=(other, 20))
thread.start()
while loop._leader != thread.ident:
    time.sleep(0.001)
Sleeper = loop_module._Sleeper
class Interrupted(Sleeper):
    def __init__(self):
        super().__init__()
        signal.raise_signal(signal.SIGINT)
loop_module._Sleeper = Interrupted
began = time.monotonic()
try:
    loop.wait(Event(), 20)
except KeyboardInterrupt:
    pass
else:
    sys.exit("not interrupted")
assert time.monotonic() - began < 2
loop_module._Sleeper = Sleeper
with loop:
    other.set()
thread.join(20)
""",
    )


def test_an_interrupt_within_the_loop_waits_until_it_is_left(run_script: Run) -> None:
    check(
        run_script,
        """
reached = False
try:
    with loop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        one.post(1, b"whole")
        reached = True
except KeyboardInterrupt:
    pass
else:
    sys.exit("not interrupted")
assert reached
assert ask(b"after")
assert frames == [b"whole", b"after"]
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
""",
    )


def test_a_handler_that_does_not_raise_lets_the_wait_go_on(run_script: Run) -> None:
    check(
        run_script,
        """
seen = []
signal.signal(signal.SIGINT, lambda signum, frame: seen.append(signum))
event = Event()
with loop:
    loop.call_later(0.6, event.set)
for at in (0.1, 0.2, 0.3):
    interrupt_in(at)
assert loop.wait(event, 20)
assert seen == [signal.SIGINT] * 3
""",
    )


def test_an_alarm_that_raises_keeps_its_exception(run_script: Run) -> None:
    check(
        run_script,
        """
class TooLate(Exception):
    pass
def late(signum, frame):
    raise TooLate
signal.signal(signal.SIGALRM, late)
for turn in range(3):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        loop.wait(Event(), 20)
    except TooLate:
        pass
    else:
        sys.exit("no alarm")
    assert ask(b"%d" % turn)
assert signal.getsignal(signal.SIGALRM) is late
""",
    )


def test_handlers_survive_a_storm_of_signals(run_script: Run) -> None:
    """At any instruction, that of entering and leaving included: no signal, no message is lost."""
    check(
        run_script,
        """
class Alarm(Exception):
    pass
alarms, armed = 0, False
def alarm(signum, frame):
    global alarms, armed
    if armed:  # once, so that none comes while the last one is being caught
        armed = False
        alarms += 1
        raise Alarm
signal.signal(signal.SIGALRM, alarm)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.0007)
end = time.monotonic() + 3
asked = 0
posted = []
def storm():
    global asked
    while time.monotonic() < end:
        asked += 1
        with loop:
            posted.append(b"m%d" % asked)
            one.post(1, posted[-1])
        loop.wait(Event(), 0.001)
while time.monotonic() < end:
    try:
        armed = True
        storm()
        armed = False
    except Alarm:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
assert alarms > 100, alarms
assert ask(b"last")
assert frames == [*posted, b"last"], "a message was lost, or came twice"
assert signal.getsignal(signal.SIGALRM) is alarm
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
seen = alarms
armed = True
interrupt_in(0.05, signal.SIGALRM)
try:
    loop.wait(Event(), 20)
except Alarm:
    pass
assert alarms == seen + 1
interrupt_in(0.05)
try:
    loop.wait(Event(), 20)
except KeyboardInterrupt:
    pass
else:
    sys.exit("SIGINT is not heard any more")
""",
    )


# Defects ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("waiters", [0, 1, 6])
def test_a_handler_that_raises_fails_everybody_and_nobody_hangs(
    loop: Loop, waiters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    read_end, write_end = os.pipe()

    def defect(events: int) -> None:
        raise ZeroDivisionError("a defect")

    with loop:
        loop.register(read_end, 1, defect)
        loop.call_later(0.2, lambda: os.write(write_end, b"x"))
    errors = in_threads(waiters, lambda number: loop.wait(Event(), PATIENCE))
    assert all(isinstance(error, (RuntimeError, ZeroDivisionError)) for error in errors), errors
    until(lambda: loop._failure)
    with pytest.raises(RuntimeError, match="loop") as error:
        loop.wait(Event(), PATIENCE)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    loop.close()
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("waiters", [1, 2, 8])
def test_close_ends_all_waits(waiters: int) -> None:
    for turn in range(15):
        loop = Loop()
        echo = Echo(loop)
        waiting = threading.Semaphore(0)

        def work(number: int, loop: Loop = loop, waiting: Any = waiting, turn: int = turn) -> None:
            if number == waiters:
                for _ in range(waiters):
                    waiting.acquire()
                time.sleep(0.0005 * (turn % 4))
                loop.close()
                return
            waiting.release()
            loop.wait(Event(), PATIENCE)

        *errors, closed = in_threads(waiters + 1, work)
        assert closed is None
        assert [type(error) for error in errors] == [RuntimeError] * waiters, errors
        for link in (echo.near, echo.far):
            link.channel.close()


def test_close_may_be_called_twice_and_waits_after_it_fail() -> None:
    loop = Loop()
    loop.close()
    loop.close()
    with pytest.raises(RuntimeError, match="ended"):
        loop.wait(Event(), PATIENCE)
    loop.call_soon(lambda: None)


def test_a_peer_that_goes_is_told_once(echo: Echo) -> None:
    with echo.loop:
        echo.far.close()
    until(lambda: echo.lost)
    with echo.loop:
        echo.near.post(1, b"into the void")
    assert echo.lost == ["near"]


def test_a_descriptor_that_another_handler_has_closed_is_not_ready_any_more(loop: Loop) -> None:
    """Both are ready at once: whichever is handled first closes the other."""
    ends = [os.pipe(), os.pipe()]
    called: list[int] = []
    both = Event()

    def handler(me: int) -> Callable[[int], None]:
        def handle(events: int) -> None:
            called.append(me)
            for reader, _ in ends:
                loop.unregister(reader)
            both.set()

        return handle

    for _, writer in ends:
        os.write(writer, b"x")
    with loop:
        for me, (reader, _) in enumerate(ends):
            loop.register(reader, READ, handler(me))
        loop.wait_within(both)
    assert loop.wait(both, PATIENCE)
    for fd in (*ends[0], *ends[1]):
        os.close(fd)
    assert len(called) == 1
    assert not loop.failed


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_sent_to_a_peer_that_goes_is_known_to_be_unread(loop: Loop, when: str) -> None:
    sock, theirs = socket.socketpair()
    peer, lost = Channel(theirs), Event()
    with loop:
        link = Link(loop, Channel(sock), lambda frame: None, lost.set)
        if when == "after":
            peer.close()
        link.post(1, b"to whom?")
        link.flush()
        if when == "before":
            peer.close()
    assert loop.wait(lost, PATIENCE)
    assert link.unread


def test_frames_keep_their_order_when_a_handler_drains_its_own_link(loop: Loop) -> None:
    """As a home does that has to know all that its users have sent so far."""
    seen: list[int] = []
    sock, theirs = socket.socketpair()
    peer = Channel(theirs)

    def handle(frame: Frame) -> None:
        seen.append(frame.kind)
        if frame.kind == 1:
            peer.send(4, b"")
            link.drain()
            seen.append(0)

    with loop:
        link = Link(loop, Channel(sock), handle, lambda: seen.append(-1))
        for kind in (1, 2, 3):
            peer.post(kind, b"")
        peer.flush()
        peer.sock.setblocking(True)
        link.drain()
        assert seen == [1, 2, 3, 4, 0]
        link.close()
    peer.close()


def test_a_damaged_frame_costs_its_channel_alone(
    loop: Loop, echo: Echo, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    lost = Event()
    with loop:
        link = Link(loop, Channel(ours), lambda frame: None, lost.set)
    theirs.sendall(b"\xff" * 64)
    assert loop.wait(lost, PATIENCE)
    assert link.lost
    assert echo.ask(b"goes on")
    theirs.close()


def test_a_frame_for_which_there_is_no_memory_costs_its_channel_alone(run_script: Run) -> None:
    check(
        run_script,
        """
import logging, resource
logging.getLogger("fiber").addHandler(logging.NullHandler())
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
ours, theirs = socket.socketpair()
lost = Event()
with loop:
    link = Link(loop, Channel(ours), lambda frame: None, lost.set)
theirs.sendall(bytes([1] + [0] * 7) + (1 << 37).to_bytes(8, "big"))
assert loop.wait(lost, 20)
assert ask(b"goes on")
theirs.close()
""",
    )


# All at once ------------------------------------------------------------------------------------


def test_threads_timers_finalizers_and_closings_all_at_once(loop: Loop) -> None:
    echoes = [Echo(loop) for _ in range(4)]
    end = time.monotonic() + 3

    def work(number: int) -> int:
        chance = random.Random(number)
        echo = echoes[number % 4]
        asked = 0
        while time.monotonic() < end:
            asked += 1
            choice = chance.random()
            if choice < 0.6:
                assert echo.ask(f"{number}/{asked}".encode())
            elif choice < 0.7:
                assert not loop.wait(Event(), chance.random() * 0.003)
            elif choice < 0.8:
                event = Event()
                with loop:
                    loop.call_later(chance.random() * 0.003, event.set)
                assert loop.wait(event, PATIENCE)
            elif choice < 0.9:
                event = Event()
                loop.call_soon(event.set)
                assert loop.wait(event, PATIENCE)
            elif choice < 0.95:
                loop.poll()
            else:
                more = Echo(loop)
                assert more.ask(b"hello")
                more.close()
        return asked

    results = in_threads(10, work)
    assert all(isinstance(result, int) for result in results), results
    for number, echo in enumerate(echoes):
        bodies = [bytes(frame.body) for frame in echo.received]
        assert len(bodies) == len(set(bodies)), f"echo {number} got a message twice"
        echo.close()
