"""`SyncManager`: a manager for the usual objects, as `fiber.Manager()` returns it.

    manager.dict() ─► a proxy of a dictionary in the server
    manager.Lock() ─► made in the server, handed out by value: a lock of Fiber (see `objects`)

Clients of other sessions, and those of multiprocessing, get proxies of locks and queues of threads.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from multiprocessing import managers as _mp
from typing import Any

from fiber.managers import proxies
from fiber.managers.base import BaseManager
from fiber.managers.objects import KINDS

__all__ = ["Array", "Namespace", "SyncManager", "Value"]

Array = _mp.Array  # type: ignore[attr-defined]
Namespace = _mp.Namespace
Value = _mp.Value  # type: ignore[attr-defined]


class SyncManager(BaseManager, _mp.SyncManager):
    """As `multiprocessing.managers.SyncManager`, with its types and `SimpleQueue`.

    Locks, semaphores, conditions, events, barriers and queues are Fiber's own, and live in the
    process of the manager: a process that is killed does not keep a lock, or take an item with it.
    """


def _pool(*args: Any, **kwds: Any) -> Any:
    """Return a pool; its master is the server."""
    from fiber.pool import Pool

    return Pool(*args, **kwds)


def _by_value(typeid: str) -> None:
    """Let what is of this type be handed out by value, where that can be."""
    by_proxy: Callable[..., Any] = getattr(SyncManager, typeid)

    def create(self: BaseManager, /, *args: Any, **kwds: Any) -> Any:
        remote = self._server()
        if not remote.kind().ours:
            return by_proxy(self, *args, **kwds)
        return remote.ask("make", (typeid, *args), kwds)

    create.__name__ = typeid
    create.__doc__ = KINDS[typeid].__doc__
    setattr(SyncManager, typeid, create)


_REGISTER = SyncManager.register
_REGISTER("Queue", queue.Queue)
_REGISTER("JoinableQueue", queue.Queue)
_REGISTER("SimpleQueue", queue.SimpleQueue)
_REGISTER("Event", threading.Event, proxies.EventProxy)
_REGISTER("Lock", threading.Lock, proxies.AcquirerProxy)
_REGISTER("RLock", threading.RLock, proxies.AcquirerProxy)
_REGISTER("Semaphore", threading.Semaphore, proxies.AcquirerProxy)
_REGISTER("BoundedSemaphore", threading.BoundedSemaphore, proxies.AcquirerProxy)
_REGISTER("Condition", threading.Condition, proxies.ConditionProxy)
_REGISTER("Barrier", threading.Barrier, proxies.BarrierProxy)
_REGISTER("Pool", _pool, proxies.PoolProxy)
_REGISTER("list", list, proxies.ListProxy)
_REGISTER("dict", dict, proxies.DictProxy)
_REGISTER("Value", Value, proxies.ValueProxy)
_REGISTER("Array", Array, proxies.ArrayProxy)
_REGISTER("Namespace", Namespace, proxies.NamespaceProxy)
_REGISTER("Iterator", proxytype=proxies.IteratorProxy, create_method=False)
_REGISTER("AsyncResult", create_method=False)

for _typeid in KINDS:
    _by_value(_typeid)
