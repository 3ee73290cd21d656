"""Locks, semaphores and their conditions, and events, as their home keeps them.

A permit is handed to whoever waits the longest. A process that dies with a permit gives it back,
and the next that takes it is told. One that ends as it should keeps it, as in multiprocessing, for
somebody else may be meant to release it.

A condition lives with its lock: `wait` gives the permit back and queues, `notify` moves waiters to
the queue of the lock, and each is answered when it holds the permit again.
"""

from __future__ import annotations

from fiber.runtime.home import Client, Home, Request, Served

__all__ = ["ServedEvent", "ServedLock"]


class _Waiter:
    """Who waits for a permit, and what it is answered when it has it."""

    __slots__ = ("answer", "condition", "request", "thread")

    def __init__(self, request: Request, thread: int) -> None:
        self.request = request
        self.thread = thread
        self.answer: object = True
        self.condition: int | None = None  # whose `wait` it is in


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
        self._abandoned = ""  # who died with the permit that is next

    # Called by users

    def do_acquire(self, request: Request, thread: int, seconds: float | None) -> None:
        """Answer (True, who died with the permit if anybody did); False when time is out."""
        waiter = _Waiter(request, thread)
        if self._value == 0 and seconds == 0:
            self._catch_up()
        if self._value > 0:
            self._grant(waiter)
        elif seconds == 0:
            request.answer(False)
        else:
            self._waiters[waiter] = None
            request.on_withdrawn = lambda: self._forget(waiter)
            request.expire(seconds, lambda: self._expire(waiter))

    def do_release(self, request: Request, thread: int) -> None:
        """Take a permit back: the caller's own, or else the one that is out the longest."""
        if self._most is not None and self._value >= self._most:
            raise ValueError("semaphore or lock released too many times")
        self._let_go(request.client, thread)
        self._give_back()
        request.answer()

    def do_look(self, request: Request) -> None:
        """Answer how many permits there are, and whether the caller's process has one."""
        self._catch_up()
        mine = any(client is request.client for client, _ in self._holders)
        request.answer((self._value, mine))

    def do_wait(self, request: Request, thread: int, condition: int, seconds: float | None) -> None:
        """Give the permit back; answer with one as `do_acquire`, or False first if time is out."""
        waiter = _Waiter(request, thread)
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
        self._value -= 1
        self._holders.append((waiter.request.client, waiter.thread))
        abandoned, self._abandoned = self._abandoned, ""
        waiter.request.answer((waiter.answer, abandoned))

    def _give_back(self) -> None:
        self._value += 1
        self._serve()

    def _serve(self) -> None:
        while self._value > 0 and self._waiters:
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            self._grant(waiter)

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
        self._serve()

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
            self._serve()

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
        return any(holder is client for holder, _ in self._holders)

    def left(self, client: Client, died: bool) -> None:
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
