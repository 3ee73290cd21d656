"""Managers: objects that live in a process of their own, and proxies of them in any other.

    manager.dict() ─► `base` ─► the server makes a dictionary ─► a proxy of it (`proxies`)
    proxy[key]     ─► `links` ─► a thread of the server runs the method ─► its result

The interface is `multiprocessing.managers`', and so is what goes over the wire: a client or a
server may be a program of plain multiprocessing that knows the address and the authkey.

    base          `BaseManager`: starts a server, or connects to one
    sync          `SyncManager`, the usual types; `objects`, those that are handed out by value
    asynchronous  `AsyncManager`: methods return handles
    shared        `SharedMemoryManager`
    proxies       what stands for an object; `references` keep it there
    server        keeps the objects; `links` lead to it
"""

from __future__ import annotations

from multiprocessing import managers as _mp
from typing import Any

from fiber.managers.asynchronous import (
    AsyncArrayProxy,
    AsyncAutoProxy,
    AsyncBaseProxy,
    AsyncDictProxy,
    AsyncIteratorProxy,
    AsyncListProxy,
    AsyncManager,
    AsyncNamespaceProxy,
    AsyncPoolProxy,
    AsyncValueProxy,
    Handle,
)
from fiber.managers.base import BaseManager, State
from fiber.managers.proxies import (
    AcquirerProxy,
    ArrayProxy,
    AutoProxy,
    BarrierProxy,
    BaseListProxy,
    BasePoolProxy,
    BaseProxy,
    ConditionProxy,
    DictProxy,
    EventProxy,
    IteratorProxy,
    ListProxy,
    MakeProxyType,
    NamespaceProxy,
    PoolProxy,
    RebuildProxy,
    ValueProxy,
)
from fiber.managers.references import Token
from fiber.managers.server import Server
from fiber.managers.shared import SharedMemoryManager, SharedMemoryServer
from fiber.managers.sync import Array, Namespace, SyncManager, Value

RemoteError = _mp.RemoteError

__all__ = [
    "AcquirerProxy",
    "Array",
    "ArrayProxy",
    "AsyncArrayProxy",
    "AsyncAutoProxy",
    "AsyncBaseProxy",
    "AsyncDictProxy",
    "AsyncIteratorProxy",
    "AsyncListProxy",
    "AsyncManager",
    "AsyncNamespaceProxy",
    "AsyncPoolProxy",
    "AsyncValueProxy",
    "AutoProxy",
    "BarrierProxy",
    "BaseListProxy",
    "BaseManager",
    "BasePoolProxy",
    "BaseProxy",
    "ConditionProxy",
    "DictProxy",
    "EventProxy",
    "Handle",
    "IteratorProxy",
    "ListProxy",
    "MakeProxyType",
    "Namespace",
    "NamespaceProxy",
    "PoolProxy",
    "RebuildProxy",
    "RemoteError",
    "Server",
    "SharedMemoryManager",
    "SharedMemoryServer",
    "State",
    "SyncManager",
    "Token",
    "Value",
    "ValueProxy",
]


def __getattr__(name: str) -> Any:
    """Return what else multiprocessing.managers has."""
    return getattr(_mp, name)
