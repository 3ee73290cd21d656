"""Who has references to the objects of a manager, and for how long the server keeps them.

    Token ─► Reference ─► home of the server: Referent ─► one count in the server's table

In a session, a proxy holds a reference as a lock or a queue does (see `runtime.home`). So the
server hears when a process is gone that had proxies, however it went; an object whose proxy is
being pickled waits for whoever unpickles it; and a proxy can ask for the manager's authkey, for
whoever is in the session may know it. Proxies of other sessions, and those of multiprocessing, are
counted as there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from multiprocessing import managers as _mp
from time import monotonic
from typing import Any

from fiber.errors import PeerDied
from fiber.managers.links import is_ours
from fiber.runtime import session
from fiber.runtime.home import Home, Request, Served
from fiber.runtime.refs import Ref, lookup

__all__ = ["Reference", "Referent", "Referents", "Token", "reference_to"]

_DELIVERY = 60.0  # seconds that an object waits for who asked for it


class Referent(Served):
    """Stands, in the home of a server, for an object of its manager.

    Args:
        home: of the server's process.
        ident: of the object, within the server.
        authkey: of the manager.
        forget: called with this when nobody has a reference any more.
    """

    def __init__(
        self, home: Home, ident: str, authkey: bytes, forget: Callable[[Referent], object]
    ) -> None:
        self._leased_until = self._awaited_until = 0.0
        self._deliveries = 0  # references on their way to who asked for them
        super().__init__(home)
        self.ident = ident
        self._authkey = authkey
        self._forget = forget

    @property
    def leased_until(self) -> float:
        """Until when it is kept without a user."""
        return max(self._leased_until, self._awaited_until)

    @leased_until.setter
    def leased_until(self, when: float) -> None:
        self._leased_until = when

    def deliver(self) -> None:
        """A reference goes to somebody, who will tell when it has arrived."""
        self._deliveries += 1
        self._awaited_until = monotonic() + _DELIVERY

    def do_arrived(self, request: Request) -> None:
        """It has: without a user, the object need not be kept any more on its account."""
        self._deliveries -= 1
        if not self._deliveries:
            self._awaited_until = 0.0
        request.answer()

    def do_authkey(self, request: Request) -> None:
        """Answer the manager's authkey."""
        request.answer(bytes(self._authkey))

    def dropped(self) -> None:
        self._forget(self)


class Reference(Ref):
    """A process's reference to an object of a manager."""

    def __reduce__(self) -> tuple[Any, ...]:
        self.lease()
        return reference_to, (self.address, self.id)


def reference_to(address: str, target: int) -> Reference | None:
    """Return this process's reference to an object, None if it is of another session."""
    return lookup(Reference, address, target) if is_ours(address) else None


class Delivery:
    """A reference that is pickled, once, for a client that has asked for it."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    @property
    def facts(self) -> tuple[str, int]:
        """Address and identity."""
        return self._reference.address, self._reference.id

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, self.facts


def _arrived(address: str, target: int) -> Reference:
    reference = lookup(Reference, address, target)
    with contextlib.suppress(PeerDied):  # its first use will tell
        reference.cast("arrived")
    return reference


class Token(_mp.Token):
    """Says where an object of a manager is, and keeps it there.

    Attributes:
        server: the manager and its process, for messages.
        reference: None where references are counted in multiprocessing's way.
    """

    __slots__ = ("reference", "server")

    def __init__(
        self,
        typeid: str,
        address: Any,
        id: str,
        server: str = "",
        reference: Reference | Delivery | None = None,
    ) -> None:
        super().__init__(typeid, address, id)
        self.server = server
        self.reference = reference

    def __getstate__(self) -> Any:
        return self.typeid, self.address, self.id, self.server, self.reference

    def __setstate__(self, state: Any) -> None:
        self.typeid, self.address, self.id, self.server, self.reference = state


class Referents:
    """The referents of a server.

    Args:
        authkey: of the manager.
        incref, decref: change the server's count of references to an ident.
        forget: called, within the loop, with an ident that the server is to count down.
    """

    def __init__(
        self,
        authkey: bytes,
        incref: Callable[[str], object],
        decref: Callable[[str], object],
        forget: Callable[[str], object],
    ) -> None:
        self._authkey = authkey
        self._incref = incref
        self._decref = decref
        self._forget = forget
        self._referents: dict[str, Referent] = {}

    def deliver(self, ident: str) -> Delivery:
        """Return a reference to the object, for a client; its referent is made if there is none."""
        self._incref(ident)
        current = session.current()
        with current.loop:
            home = current.home
            referent = self._referents.get(ident)
            known = referent is not None
            if referent is None:
                referent = Referent(home, ident, self._authkey, self._dropped)
                self._referents[ident] = referent
                home.add(referent)
            referent.deliver()
            address = home.endpoint.address
        if known:
            self._decref(ident)
        return Delivery(lookup(Reference, address, referent.id))

    def _dropped(self, referent: Referent) -> None:
        if self._referents.get(referent.ident) is referent:
            del self._referents[referent.ident]
        self._forget(referent.ident)
