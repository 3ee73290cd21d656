"""What a pool's master and its workers lend each other: large buffers stay where they are.

    buffers ─► pack ─► a frame that says where they are ─► unpack ─► views ─► arrays of the user
       ▲                                                                          │
    arena ◄─ taken_back ◄─ RETURN: these are over ◄─ returns ◄────────────────────┘

Each side has one of these: an arena of its own, and views of what the other lends. What finds no
room in the arena is sent as it is. Who dies gives back all that it had.

A frame with buffers that were lent has `LENT` in its kind and a table before its other buffers.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Hashable, Sequence

from fiber.wire.arena import LEAST, Arena, Loan
from fiber.wire.framing import Buffer, Frame
from fiber.wire.pickling import PROTOCOL
from fiber.wire.views import Views

__all__ = ["LENT", "Lending", "arena_name"]

LENT = 0x80
"""Added to the kind of a frame."""


def arena_name(process: int | None) -> str:
    """Return the name of the arena of a worker, by its process ID."""
    return f"{process}-worker"


class Lending:
    """See the module.

    Args:
        arena: where to lend from.

    Attributes:
        arena: the same.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._borrowed = False  # whether anything ever was
        self._views = Views()
        self._loans: dict[Hashable, set[int]] = {}  # what others have of ours
        self._folders: dict[Hashable, str] = {}  # of their arenas
        self._unseen: list[tuple[Hashable, int]] = []  # loans that no view was made of

    # What we lend ------------------------------------------------------------------------------

    def lend(self, reader: Hashable, buffer: Buffer) -> Loan | None:
        """Copy a buffer to where `reader` can see it, if it is worth it and there is room."""
        size = len(buffer)
        loan = self.arena.lend([buffer], size) if size >= LEAST else None
        if loan is not None:
            self._loans.setdefault(reader, set()).add(loan.id)
        return loan

    def hold(self, reader: Hashable, buffers: Sequence[Buffer]) -> list[Buffer | Loan]:
        """Return the buffers as they are now, for `pack`: lent to `reader`, or copied."""
        held: list[Buffer | Loan] = []
        try:
            held.extend(self.lend(reader, buffer) or bytes(buffer) for buffer in buffers)
        except BaseException:
            self._take_back(reader, held)
            raise
        return held

    def _take_back(self, reader: Hashable, held: Sequence[Buffer | Loan]) -> None:
        """Nobody was told of what is lent among these."""
        for loan in held:
            if type(loan) is Loan:
                self._loans[reader].discard(loan.id)
                self.arena.take_back(loan.id)

    def pack(
        self, reader: Hashable, kind: int, buffers: Sequence[Buffer | Loan]
    ) -> tuple[int, list[Buffer]]:
        """Return the kind and the buffers of a frame for `reader`, with as few bytes as can be."""
        table: list[tuple[int, Loan]] = []
        others: list[Buffer] = []
        for place, buffer in enumerate(buffers):
            try:
                loan = buffer if type(buffer) is Loan else self.lend(reader, buffer)  # type: ignore[arg-type]
            except BaseException:
                self._take_back(reader, [its for _, its in table])
                raise
            if loan is not None:
                table.append((place, loan))
            else:
                others.append(buffer)  # type: ignore[arg-type]
        if not table:
            return kind, others
        entries = [(place, *loan) for place, loan in table]
        return kind | LENT, [pickle.dumps(entries, PROTOCOL), *others]

    def taken_back(self, reader: Hashable, body: Buffer) -> None:
        """A RETURN came from `reader`."""
        loans = self._loans.get(reader, set())
        for id, forked in pickle.loads(body):
            if id in loans:
                loans.remove(id)
                self.arena.take_back(id, forked=forked)

    # What others lend us -----------------------------------------------------------------------

    def unpack(self, owner: Hashable, frame: Frame) -> Frame:
        """Return the frame as it was packed, with views of what `owner` lends.

        Raises:
            OSError: that cannot be seen; the message says why.
        """
        self._borrowed = True
        table, *others = frame.buffers
        loans = {place: Loan(*loan) for place, *loan in pickle.loads(table)}
        rest = iter(others)
        buffers: list[Buffer] = []
        for place in range(len(loans) + len(others)):
            loan = loans.get(place)
            if loan is None:
                buffers.append(next(rest))
                continue
            try:
                buffers.append(self._see(owner, loan))
            except OSError:
                self._unseen += [(owner, its.id) for at, its in loans.items() if at >= place]
                raise
        return Frame(frame.kind & ~LENT, frame.body, buffers)

    def _see(self, owner: Hashable, loan: Loan) -> Buffer:
        try:
            view = self._views.view(loan.path, loan.offset, loan.size, (owner, loan.id))
        except (OSError, ValueError, ImportError):  # no room for a mapping perhaps, or no ctypes
            copy = bytearray(loan.size)
            with open(loan.path, "rb", buffering=0) as file:
                file.seek(loan.offset)
                if file.readinto(copy) != loan.size:
                    raise OSError(f"{loan.path} is shorter than was said") from None
            self._unseen.append((owner, loan.id))
            return copy
        self._folders[owner] = os.path.dirname(loan.path)
        return view

    @property
    def holding(self) -> bool:
        """Whether we have, or had until now, something of others."""
        return self._borrowed and bool(self._views or self._unseen)

    @property
    def ended(self) -> bool:
        """Whether something can be returned."""
        return self._borrowed and (self._views.ended or bool(self._unseen))

    def returns(self) -> dict[Hashable, bytes]:
        """Return, by owner, the bodies of the RETURNs that are due."""
        due: dict[Hashable, list[tuple[int, bool]]] = {}
        while self._unseen:
            owner, id = self._unseen.pop()
            due.setdefault(owner, []).append((id, False))
        for (owner, id), forked in self._views.collect():
            due.setdefault(owner, []).append((id, forked))
        return {owner: pickle.dumps(loans, PROTOCOL) for owner, loans in due.items()}

    # Both --------------------------------------------------------------------------------------

    def gone(self, other: Hashable) -> None:
        """A reader or owner is dead. What was seen of its memory stays as long as it is used."""
        for id in self._loans.pop(other, ()):
            self.arena.take_back(id, forked=True)  # which nobody tells any more
        folder = self._folders.pop(other, None)
        if folder is not None:
            self._views.forget(folder)
