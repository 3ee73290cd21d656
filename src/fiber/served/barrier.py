"""A barrier, as its home keeps it.

It breaks, as `threading.Barrier` does, by `abort`, a time-out or a failing action, and also when a
process dies that uses it: the others would wait for it for ever.
"""

from __future__ import annotations

from fiber.runtime.home import Client, Home, Request, Served

__all__ = ["ServedBarrier"]


class ServedBarrier(Served):
    """Releases its waiters when there are `parties` of them.

    Args:
        home: where it lives.
        parties: how many it waits for.
        acts: whether one of them is to act before the others go on.
    """

    def __init__(self, home: Home, parties: int, acts: bool) -> None:
        super().__init__(home)
        self._parties = parties
        self._acts = acts
        self._waiters: dict[Request, None] = {}
        self._held: dict[Request, None] = {}  # those who wait for the one who acts
        self._actor: Client | None = None
        self._broken = ""  # why

    def do_wait(self, request: Request, seconds: float | None) -> None:
        """Answer the caller's place (0 to parties - 1); "act" to whoever shall act first.

        The answer ("broken", why) has the caller raise BrokenBarrierError.
        """
        if self._broken:
            request.answer(("broken", self._broken))
            return
        self._waiters[request] = None
        request.on_withdrawn = lambda: self._withdraw(request)
        request.expire(seconds, lambda: self._break("a wait ran out of time"))
        self._release()

    def _release(self) -> None:
        """Let the next go on, if they are all there and those before them have gone."""
        if self._actor is not None or len(self._waiters) < self._parties:
            return
        waiters = list(self._waiters)[: self._parties]
        for waiter in waiters:
            del self._waiters[waiter]
        if self._acts:
            last = waiters.pop()
            self._held = dict.fromkeys(waiters)
            self._actor = last.client
            for waiter in waiters:
                waiter.on_withdrawn = lambda waiter=waiter: self._held.pop(waiter, None)
                if waiter.timer is not None:
                    waiter.timer.cancel()
            last.answer("act")
        else:
            for place, waiter in enumerate(waiters):
                waiter.answer(place)

    def do_acted(self, request: Request, failed: bool) -> None:
        """The action is done."""
        self._actor = None
        if failed:
            self._break("its action failed")
        else:
            held, self._held = self._held, {}
            for place, waiter in enumerate(held):
                waiter.answer(place)
        request.answer(self._parties - 1)
        self._release()

    def do_reset(self, request: Request) -> None:
        """Back to the empty state; whoever waits gets BrokenBarrierError."""
        self._break("it was reset")
        self._broken = ""
        request.answer()

    def do_abort(self, request: Request) -> None:
        """Break it."""
        self._break("it was aborted")
        request.answer()

    def do_look(self, request: Request) -> None:
        """Answer how many wait, and whether it is broken."""
        request.answer((len(self._waiters), bool(self._broken)))

    def _break(self, why: str) -> None:
        self._broken = self._broken or why
        waiters = [*self._waiters, *self._held]
        self._waiters, self._held = {}, {}
        for waiter in waiters:
            waiter.answer(("broken", why))

    def _withdraw(self, request: Request) -> None:
        """Somebody was interrupted while it waited: as in threading, that breaks the barrier."""
        if self._waiters.pop(request, True) is None:
            client = request.client
            self._break(f"{client} has died" if client.died else "a party was interrupted")

    def left(self, client: Client, died: bool) -> None:
        if died or client is self._actor:
            self._break(f"{client} has died")
