"""Locks, semaphores and their conditions, and events, as their home keeps them.

A permit is handed to whoever waits the longest. A process that dies with a permit gives it back,
and the next that takes it is told. One that ends as it should keeps it, as in multiprocessing, for
somebody else may be meant to release it.

A lock that nobody else waits for is lent: its process may release and acquire it without a word to
the home, until somebody else wants it; then it is recalled. In memory that it shares with the home
the process counts each of these (`Client.counts`): while the count is odd it holds the lock. Next
to the count stands whether it may: it looks there after it has counted, and we look at the count
after we have forbidden it, so that one of us gives way. Whoever uses a lock often may go on with it
for a millisecond while others wait.

A condition lives with its lock: `wait` gives the permit back and queues, `notify` moves waiters to
the queue of the lock, and each is answered when it holds the permit again.
"""

from __future__ import annotations

from time import monotonic

from fiber.runtime.home import Client, Home, Request, Served, settle
from fiber.runtime.loop import Timer

__all__ = ["ServedEvent", "ServedLock"]

_TURN = 0.001  # seconds that a process may go on with a lock that it uses often
_OFTEN = 4  # acquired and released again twice, since it was lent;
_SOON = 0.0003  # or acquired again, by a message, so many seconds after it was released


class _Waiter:
    """Who waits for a permit, and what it is answered when it has it."""

    __slots__ = ("answer", "condition", "request", "slot", "thread")

    def __init__(self, request: Request, thread: int, slot: int) -> None:
        self.request = request
        self.thread = thread
        self.slot = slot  # where in its counts is that of the lock; below 0 if there is none
        self.answer: object = True
        self.condition: int | None = None  # whose `wait` it is in


class _Loan:
    """A lock that is lent to a process.

    Attributes:
        client: the process.
        holder: what was granted to it.
        until: of `monotonic`; then its turn is over.
        recalled: whether it was told that it may not acquire it again.
    """

    def __init__(self, client: Client, holder: tuple[Client, int], slot: int) -> None:
        assert client.counts is not None
        self.client = client
        self.holder = holder
        self.until = monotonic() + _TURN
        self.recalled = False
        self._words = client.counts[slot : slot + 2]
        self._words[0] = self._words[1] = 1

    @property
    def held(self) -> bool:
        """Whether the process holds the lock."""
        return self._words[0] % 2 == 1

    @property
    def left(self) -> float:
        """For how many seconds it may go on, while others wait."""
        return self.until - monotonic() if self._is_frequent else 0.0

    @property
    def _is_frequent(self) -> bool:
        return self._words[0] >= _OFTEN

    def recall(self) -> bool:
        """Let the process not acquire it again; return whether it has done so often."""
        if not self.recalled:
            self.recalled = True
            self._words[1] = 0
            settle()
        return self._is_frequent


class ServedLock(Served):
    """A semaphore; with a value of 1 that is also its most, a lock.

    Args:
        home: where it lives.
        value: how many permits there are.
        most: how many there may ever be; None for no bound.
    """

    def __init__(self, home: Home, value: int, most: int | None) -> None:
        super().__init__(home)
        self._value = value
        self._most = most
        self._waiters: dict[_Waiter, None] = {}  # in the order of their arrival
        self._conditions: dict[int, dict[_Waiter, None]] = {}
        self._holders: list[tuple[Client, int]] = []  # and their threads, oldest first
        self._loan: _Loan | None = None
        self._frequent: set[Client] = set()  # who uses it often
        self._last: Client | None = None  # who gave it back the last,
        self._last_at = 0.0  # and when, of `monotonic`
        self._turn: Timer | None = None  # its end, if somebody waits for that
        self._abandoned = ""  # who died with the permit that is next

    # Called by users

    def do_acquire(
        self, request: Request, thread: int, seconds: float | None, slot: int = -1
    ) -> None:
        """Answer (True, who died with the permit if anybody did, is it lent); False if time is out.

        Args:
            request: the call.
            thread: of the caller's process.
            seconds: how long to wait.
            slot: where in its counts is that of the lock; below 0 if we share no memory.
        """
        waiter = _Waiter(request, thread, slot)
        if self._last is request.client and monotonic() - self._last_at < _SOON:
            self._frequent.add(request.client)
        if self._value == 0 and seconds == 0:
            self._catch_up()
            if self._loan is not None:
                self._recall()
                self._serve()  # those who wait come first
        if request.client.link is not None and request.client.link.lost:
            return  # as it turned out when we caught up
        if self._value > 0:
            self._grant(waiter)
        elif seconds == 0:
            request.answer(False)
        else:
            self._waiters[waiter] = None
            request.on_withdrawn = lambda: self._forget(waiter)
            request.expire(seconds, lambda: self._expire(waiter))
            self._limit_turn()

    def do_release(self, request: Request, thread: int) -> None:
        """Take a permit back: the caller's own, or else the one that is out the longest."""
        if self._loan is not None:
            self._recall()
            self._loan = None
        if self._most is not None and self._value >= self._most:
            raise ValueError("semaphore or lock released too many times")
        self._let_go(request.client, thread)
        self._given_back(request)
        self._give_back()
        request.answer()

    def do_returned(self, request: Request, thread: int | None = None) -> None:
        """A process returns a lock that it was lent; a thread has released it, if that is told."""
        self._given_back(request)
        if self._loan is not None and self._loan.client is request.client:
            self._end_loan()
            self._serve()
        elif (request.client, thread) in self._holders:  # and it was granted anew meanwhile
            self._holders.remove((request.client, thread))  # type: ignore[arg-type]
            self._give_back()

    def do_look(self, request: Request) -> None:
        """Answer how many permits there are, and whether the caller's process has one."""
        self._catch_up()
        value = self._value + (self._loan is not None and not self._loan.held)
        request.answer((value, self._has_one(request.client)))

    def do_wait(
        self,
        request: Request,
        thread: int,
        condition: int,
        seconds: float | None,
        slot: int = -1,
    ) -> None:
        """Give the permit back; answer with one as `do_acquire`, or False first if time is out."""
        if self._loan is not None and self._loan.client is request.client:
            self._loan.recall()
            self._loan = None
        waiter = _Waiter(request, thread, slot)
        waiter.condition = condition
        self._conditions.setdefault(condition, {})[waiter] = None
        request.on_withdrawn = lambda: self._forget(waiter)
        request.expire(seconds, lambda: self._expire(waiter))
        self._let_go(request.client, thread)
        self._give_back()

    def do_notify(self, request: Request, condition: int, most: int | None) -> None:
        """Wake waiters of the condition, the longest first; None for all."""
        self._notify(condition, most)
        request.answer()

    # Within

    def _catch_up(self) -> None:
        """Read what has arrived: a permit that was given back must not seem to be out.

        Whoever gives one back does not wait, and may tell somebody who is faster to ask here.
        """
        for user in list(self.users):
            if user.link is not None:
                user.link.drain()

    def _grant(self, waiter: _Waiter) -> None:
        client = waiter.request.client
        holder = (client, waiter.thread)
        self._value -= 1
        self._holders.append(holder)
        if self._most == 1 and waiter.slot >= 0 and client.counts is not None:
            if not self._waiters:
                self._loan = _Loan(client, holder, waiter.slot)
            elif client in self._frequent:
                self._loan = _Loan(client, holder, waiter.slot)
                if self._turn is None:
                    self._turn = self.home.loop.call_later(_TURN, self._end_turn)
        abandoned, self._abandoned = self._abandoned, ""
        waiter.request.answer((waiter.answer, abandoned, self._loan is not None))

    def _given_back(self, request: Request) -> None:
        self._last, self._last_at = request.client, monotonic()

    def _give_back(self) -> None:
        self._value += 1
        self._serve()

    def _serve(self) -> None:
        while self._value > 0 and self._waiters:
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            self._grant(waiter)

    def _limit_turn(self) -> None:
        """Somebody waits for the lock that is lent, if it is."""
        if self._loan is None or self._turn is not None:
            return
        left = self._loan.left
        if left > 0:
            self._turn = self.home.loop.call_later(left, self._end_turn)
        else:
            self._make_way()

    def _end_turn(self) -> None:
        self._turn = None
        self._make_way()

    def _make_way(self) -> None:
        """Let those go on who wait, now or once the lock is released."""
        if self._waiters and self._loan is not None:
            self._recall()
        self._serve()

    def _recall(self) -> None:
        """Take back the lock that is lent, or else have it returned once it is released."""
        assert self._loan is not None
        if self._loan.recall():
            self._frequent.add(self._loan.client)
        else:
            self._frequent.discard(self._loan.client)
        if not self._loan.held:
            self._end_loan()

    def _end_loan(self) -> None:
        assert self._loan is not None
        self._holders.remove(self._loan.holder)
        self._loan = None
        self._value += 1

    def _has_one(self, client: Client) -> bool:
        """Whether a process holds a permit, and is not only lent it."""
        if self._loan is not None and self._loan.client is client:
            return self._loan.held
        return any(holder is client for holder, _ in self._holders)

    def _let_go(self, client: Client, thread: int) -> None:
        """Forget who had the permit that comes back."""
        holders = self._holders
        if (client, thread) in holders:
            holders.remove((client, thread))
        elif holders:
            mine = [holder for holder in holders if holder[0] is client]
            holders.remove(mine[0] if mine else holders[0])

    def _notify(self, condition: int, most: int | None) -> None:
        asleep = self._conditions.get(condition, {})
        for waiter in list(asleep)[:most]:
            self._wake(waiter)
        self._make_way()

    def _wake(self, waiter: _Waiter) -> None:
        """Let a waiter of a condition queue for its permit."""
        assert waiter.condition is not None
        asleep = self._conditions[waiter.condition]
        del asleep[waiter]
        if not asleep:
            del self._conditions[waiter.condition]
        if waiter.request.timer is not None:
            waiter.request.timer.cancel()
        self._waiters[waiter] = None

    def _expire(self, waiter: _Waiter) -> None:
        if waiter.condition is None:
            del self._waiters[waiter]
            waiter.request.answer(False)
        else:
            waiter.answer = False
            self._wake(waiter)
            self._make_way()

    def _forget(self, waiter: _Waiter) -> None:
        """Nobody waits there any more; a notification that it had goes to another."""
        condition = waiter.condition
        if waiter in self._waiters:
            del self._waiters[waiter]
            if condition is not None and waiter.answer is True:
                self._notify(condition, 1)
        elif condition is not None:
            asleep = self._conditions.get(condition, {})
            asleep.pop(waiter, None)
            if not asleep:
                self._conditions.pop(condition, None)

    def keeps(self, client: Client) -> bool:
        return self._has_one(client)

    def left(self, client: Client, died: bool) -> None:
        self._frequent.discard(client)
        if self._last is client:
            self._last = None
        if self._loan is not None and self._loan.client is client:
            if self._loan.held:
                self._loan = None
            else:
                self._end_loan()
                self._serve()
        if not died:
            return
        mine = [holder for holder in self._holders if holder[0] is client]
        for holder in mine:
            self._holders.remove(holder)
            self._abandoned = str(client)
            self._give_back()


class ServedEvent(Served):
    """A flag that processes wait for."""

    def __init__(self, home: Home) -> None:
        super().__init__(home)
        self._flag = False
        self._waiters: dict[Request, None] = {}

    def do_is_set(self, request: Request) -> None:
        """Answer the flag."""
        request.answer(self._flag)

    def do_set(self, request: Request) -> None:
        """Raise the flag and wake all."""
        self._flag = True
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            waiter.answer(True)
        request.answer()

    def do_clear(self, request: Request) -> None:
        """Lower the flag."""
        self._flag = False
        request.answer()

    def do_wait(self, request: Request, seconds: float | None) -> None:
        """Answer True once the flag is up, False when time is out."""
        if self._flag:
            request.answer(True)
            return
        self._waiters[request] = None
        request.on_withdrawn = lambda: self._waiters.pop(request, None)
        request.expire(seconds, lambda: self._expire(request))

    def _expire(self, request: Request) -> None:
        del self._waiters[request]
        request.answer(False)
