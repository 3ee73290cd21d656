"""Queue and lock as their home keeps them, and what their clients do without asking.

    rules ─ steps of clients, messages on their way, turns that end ─► ServedQueue, ServedLock

A step of a client is one read or write of the memory that it shares with the home; any of them may
come while the home waits in `settle`. A model keeps the books: no item is lost, doubled or out of
order, no two clients have the lock, and whoever waits has what it waits for in the end.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fiber.runtime.home import Client, Request
from fiber.runtime.loop import Timer
from fiber.served import locks, queue

CLIENTS = 3
SLOT = 4
STEPS = st.lists(st.integers(0, CLIENTS - 1), max_size=6)


class World:
    """In the place of a home, its loop, and the links to clients: nothing moves by itself."""

    def __init__(self) -> None:
        self.loop = self
        self.now = 0.0
        self.timers: list[Timer] = []
        facts = {"name": "home", "process": ("home", 1)}
        self.me = Client(self, None, facts)  # type: ignore[arg-type]

    def monotonic(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], object]) -> Timer:
        self.timers.append(Timer(self.now + seconds, call))
        return self.timers[-1]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer.when <= self.now]
        self.timers = [timer for timer in self.timers if timer.when > self.now]
        for timer in due:
            if timer.call is not None:
                timer.call()

    def forgiven(self, process: tuple[str, int]) -> bool:
        return True


class Remote:
    """A client, with the messages between it and the home, in order both ways."""

    def __init__(self, world: World, number: int) -> None:
        facts = {"name": f"client {number}", "process": ("home", 100 + number)}
        self.client = Client(world, self, facts)  # type: ignore[arg-type]
        self.words = self.client.counts = memoryview(bytearray(64)).cast("Q")
        self.lost = False
        self.up: deque[Callable[[], object]] = deque()
        self.down: deque[Any] = deque()
        self.asks = False

    def post(self, kind: int, body: bytes, buffers: Any = ()) -> None:
        _, error, result = pickle.loads(body)
        assert error is None
        self.down.append(result)

    def drain(self) -> None:
        """All that it has sent is read."""
        while self.up:
            self.up.popleft()()

    def call(self, method: Callable[..., object], *args: object) -> None:
        self.asks = True
        self.up.append(lambda: method(Request(self.client, 1), *args))

    def cast(self, method: Callable[..., object], *args: object) -> None:
        self.up.append(lambda: method(Request(self.client, None), *args))


class Machine(RuleBasedStateMachine):
    """What both have in common."""

    module: Any
    remotes: list[Any]

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.meanwhile: list[int] = []
        self.patches = [
            mock.patch.object(self.module, "settle", self.settle),
            mock.patch.object(self.module, "monotonic", self.world.monotonic),
        ]
        for patch in self.patches:
            patch.start()

    def settle(self) -> None:
        steps, self.meanwhile = self.meanwhile, []
        for number in steps:
            self.remotes[number].step()

    @rule(number=st.integers(0, CLIENTS - 1))
    def step(self, number: int) -> None:
        self.remotes[number].step()

    @rule(number=st.integers(0, CLIENTS - 1), meanwhile=STEPS)
    def read(self, number: int, meanwhile: list[int]) -> None:
        """The home reads a message."""
        self.meanwhile = meanwhile
        if self.remotes[number].up:
            self.remotes[number].up.popleft()()

    @rule(number=st.integers(0, CLIENTS - 1))
    def hear(self, number: int) -> None:
        """A client reads an answer."""
        if self.remotes[number].down and not self.remotes[number].lost:
            self.remotes[number].hear(self.remotes[number].down.popleft())

    @rule(seconds=st.sampled_from([0.0001, 0.001, 0.003]), meanwhile=STEPS)
    def pass_time(self, seconds: float, meanwhile: list[int]) -> None:
        self.meanwhile = meanwhile
        self.world.pass_time(seconds)

    def settle_down(self, rounds: int) -> None:
        """Everything goes on, in turn: each client takes a step in each round, or has an answer."""
        for _ in range(rounds):
            for number, remote in enumerate(self.remotes):
                if not remote.lost:
                    remote.step()
                    self.read(number, [])
                    self.hear(number)
            self.pass_time(0.001, [])

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            for patch in self.patches:
                patch.stop()

    def finish(self) -> None:
        """Look whether all is as it must be in the end."""


class Consumer(Remote):
    """Takes what it is granted, as `queue_ref.QueueRef` does."""

    def __init__(self, world: World, number: int, served: queue.ServedQueue) -> None:
        super().__init__(world, number)
        self.served = served
        self.ready: deque[int] = deque()
        self.end = 0
        self.counted = False  # and has not looked at the limit yet
        self.taken: list[int] = []
        self.want = 1

    def step(self) -> None:
        if self.asks or self.lost:
            return
        if not self.ready:
            self.ask()
            return
        count = self.end - len(self.ready) + 1
        if not self.counted:
            self.words[SLOT] = count
            self.counted = True
        else:
            self.counted = False
            if self.words[SLOT + 1] >= count:
                self.taken.append(self.ready.popleft())
            else:
                self.words[SLOT] = count - 1
                self.ask()

    def ask(self) -> None:
        self.want = min(2 * self.want, 8)
        taken = self.end - len(self.ready)
        self.call(self.served.do_get, self.want, None, SLOT, taken)

    def hear(self, answer: tuple[int, list[int]]) -> None:
        self.asks = False
        start, items = answer
        for _ in range(min(self.end - start, len(self.ready))):
            self.ready.pop()
        self.ready.extend(items)
        self.end = start + len(items)


class QueueMachine(Machine):
    """Several consumers of one queue, of which some die."""

    module = queue

    def __init__(self) -> None:
        super().__init__()
        self.served = queue.ServedQueue(self.world, 0, False)  # type: ignore[arg-type]
        self.remotes = [Consumer(self.world, n, self.served) for n in range(CLIENTS)]
        self.put = 0
        self.mine: list[int] = []
        self.uncertain = 0
        self.returned: set[int] = set()  # what the dead had not taken: others may be further

    @rule(count=st.integers(1, 12))
    def put_some(self, count: int) -> None:
        request = Request(self.world.me, None)
        self.served.do_put(request, list(range(self.put, self.put + count)))
        self.put += count

    @rule(meanwhile=STEPS)
    def take_here(self, meanwhile: list[int]) -> None:
        """A thread of the home takes one, without waiting."""
        self.meanwhile = meanwhile
        request = Request(self.world.me, None)
        self.served.do_get(request, 1, 0.0)
        self.mine += request.result or []

    @precondition(lambda self: sum(remote.lost for remote in self.remotes) < 2)
    @rule(number=st.integers(0, CLIENTS - 1))
    def kill(self, number: int) -> None:
        remote = self.remotes[number]
        if not remote.lost:
            self.uncertain += remote.counted  # whether it had the item, nobody can tell
            remote.lost = True
            remote.up.clear()
            for request in list(self.served._getters):
                if request.client is remote.client:
                    request.withdraw()
            lease = self.served._leases.get(remote.client)
            self.returned |= set(lease.items if lease is not None else [])
            self.served.left(remote.client, died=True)

    @invariant()
    def in_order_and_once(self) -> None:
        lists = [self.mine, *(remote.taken for remote in self.remotes)]
        for taken in lists:
            in_turn = [item for item in taken if item not in self.returned]
            assert in_turn == sorted(in_turn)
        together = [item for taken in lists for item in taken]
        assert len(together) == len(set(together))

    def finish(self) -> None:
        self.settle_down(100 + 5 * self.put)  # two steps for each item, and asking for it
        self.in_order_and_once()
        taken = len(self.mine) + sum(len(remote.taken) for remote in self.remotes)
        assert self.put - self.uncertain <= taken <= self.put


class Holder(Remote):
    """Acquires and releases, as `synchronize.LockRef` does."""

    def __init__(self, world: World, number: int, served: locks.ServedLock) -> None:
        super().__init__(world, number)
        self.served = served
        self.number = number
        self.lent = self.holds = False
        self.counted = ""  # for what, and has not looked whether it may
        self.times = 0
        self.rests = False

    def step(self) -> None:
        if self.asks or self.lost:
            return
        if self.counted:
            self.look()
        elif self.holds:
            self.holds = False
            if self.lent and self.words[SLOT] % 2:
                self.count("release")
            else:
                self.cast(self.served.do_release, self.number)
        elif not self.rests:
            if self.lent and self.words[SLOT] % 2 == 0:
                self.count("acquire")
            else:
                self.ask()

    def count(self, what: str) -> None:
        self.words[SLOT] += 1
        self.counted = what

    def look(self) -> None:
        what, self.counted = self.counted, ""
        if self.words[SLOT + 1]:
            self.holds = what == "acquire"
            self.times += self.holds
            return
        self.lent = False
        if what == "release":
            self.cast(self.served.do_returned, self.number)
        else:
            self.cast(self.served.do_returned)
            self.ask()

    def ask(self) -> None:
        self.call(self.served.do_acquire, self.number, None, SLOT)

    def hear(self, answer: tuple[bool, str, bool]) -> None:
        self.asks = False
        granted, _, self.lent = answer
        assert granted
        self.holds = True
        self.times += 1


class LockMachine(Machine):
    """Several processes that use one lock, of which some die."""

    module = locks

    def __init__(self) -> None:
        super().__init__()
        self.served = locks.ServedLock(self.world, 1, 1)  # type: ignore[arg-type]
        self.remotes = [Holder(self.world, n, self.served) for n in range(CLIENTS)]

    @rule(number=st.integers(0, CLIENTS - 1), rests=st.booleans())
    def rest(self, number: int, rests: bool) -> None:
        """A client goes on to do something else, without the lock."""
        self.remotes[number].rests = rests

    @precondition(lambda self: sum(remote.lost for remote in self.remotes) < 2)
    @rule(number=st.integers(0, CLIENTS - 1))
    def kill(self, number: int) -> None:
        remote = self.remotes[number]
        if not remote.lost:
            remote.drain()  # what it had sent is read, and then the end
            remote.lost = True
            remote.holds = False
            for waiter in list(self.served._waiters):
                if waiter.request.client is remote.client:
                    waiter.request.withdraw()
            self.served.left(remote.client, died=True)

    @invariant()
    def one_holder(self) -> None:
        assert sum(remote.holds for remote in self.remotes) <= 1

    def finish(self) -> None:
        for remote in self.remotes:
            remote.rests = False
        before = [remote.times for remote in self.remotes]
        self.settle_down(400)
        self.one_holder()
        for remote, times in zip(self.remotes, before, strict=True):
            assert remote.lost or remote.times > times + 3


many = settings(
    max_examples=100,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # of a machine that is busy with other things
)
TestQueue = QueueMachine.TestCase
TestQueue.settings = many
TestLock = LockMachine.TestCase
TestLock.settings = many
