"""What a pool's master pickles for its workers besides items: functions, and what is sent once.

    function ─► pack ─► share ─► Packed, as it travels with the first batch to each worker
    items ─► constants_of ─► Constants, which many of them have in common

All but the last function's pickle is made anew for each call; nothing here is within the loop.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from fiber.errors import SerializationError
from fiber.pool.calls import name_of, need_a_look, weight_of
from fiber.runtime import session
from fiber.wire.arena import LEAST
from fiber.wire.pickling import Packed, dumps

if TYPE_CHECKING:
    from fiber.pool.constants import Constants

__all__ = ["Packer"]


class Packer:
    """See the module.

    Args:
        known: returns what `wire.pickling.dumps` has to know of the workers' main module.
    """

    def __init__(self, known: Callable[[], Container[str] | None]) -> None:
        self._known = known
        self._last: tuple[Any, Packed] = (None, Packed(b"", ()))

    def pack(self, function: Callable[..., Any]) -> Packed:
        """Pickle a function for the workers; raises SerializationError."""
        known = self._known()
        last, packed = self._last  # one reading: another thread may put its own there
        if known is None and function is last:
            return packed
        try:
            packed = dumps(function, known)
        except SerializationError as error:
            raise SerializationError(
                f"the function {name_of(function)} cannot be sent to the workers: {error}"
            ) from error.__cause__
        if packed.by_name and isinstance(function, types.FunctionType):
            self._last = (function, packed)  # a name stays the same: no need to pickle it again
        return packed

    def share(self, packed: Packed) -> tuple[Packed, Any]:
        """Return a function as it shall travel, and what keeps it, its own pickle included."""
        if weight_of(packed) < LEAST:
            return packed, None
        from fiber.pool.constants import share_function  # not needed to import Fiber

        shared, keeps = share_function(packed, _memory_folder)
        return shared, (keeps, packed)

    def constants_of(self, how: int, items: list[Any]) -> Constants | None:
        """Return what is to be sent once of all that the items have, None if there is nothing."""
        if not need_a_look(items):
            return None
        from fiber.pool.constants import constants_of  # not needed to import Fiber

        return constants_of(how, items, self._known(), _memory_folder)


def _memory_folder() -> str:
    return session.current().memory_folder()
