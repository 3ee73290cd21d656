"""Proxies: they look like an object that lives in the server of a manager.

    proxy.method(...) ─► _callmethod ─► Remote.call ─► Server ─► the object

Each is a proxy of multiprocessing's as well, so that libraries that look for those find them. What
differs is how the server is reached and how it learns that a proxy is there; see `links` and
`references`. A proxy can be pickled at any time, and is good in every process of the session; of a
manager that is not in the session, in every process that knows the authkey.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from multiprocessing import managers as _mp
from multiprocessing.context import get_spawning_popen
from multiprocessing.process import AuthenticationString  # type: ignore[attr-defined]
from multiprocessing.util import register_after_fork
from typing import TYPE_CHECKING, Any

from fiber.errors import PeerDied
from fiber.managers.links import TOKEN, Remote, is_for_strangers, remote_at
from fiber.managers.references import Reference, Token

__all__ = [
    "AcquirerProxy",
    "ArrayProxy",
    "AutoProxy",
    "BarrierProxy",
    "BasePoolProxy",
    "BaseListProxy",
    "BaseProxy",
    "ConditionProxy",
    "DictProxy",
    "EventProxy",
    "IteratorProxy",
    "ListProxy",
    "MakeProxyType",
    "NamespaceProxy",
    "PoolProxy",
    "RebuildProxy",
    "ValueProxy",
]


class BaseProxy(_mp.BaseProxy):
    """As `multiprocessing.managers.BaseProxy`: the base of all proxies.

    Args:
        token: says where the object is.
        serializer: of the manager.
        manager: the manager, where it is at hand.
        authkey: of the manager, where it is known.
        exposed: names of methods, for functions that make a class of them.
        incref: whether the server has to count this proxy.
        manager_owned: whether this is within the server itself.
    """

    if TYPE_CHECKING:
        _token: Any
        _id: str
        _manager: Any
        _serializer: str
        _authkey: bytes
        _exposed_: tuple[str, ...]
        _isauto: bool
        _auto: Callable[..., BaseProxy]

        def _after_fork(self) -> None: ...

    def __init__(
        self,
        token: Any,
        serializer: str,
        manager: Any = None,
        authkey: bytes | None = None,
        exposed: Any = None,
        incref: bool = True,
        manager_owned: bool = False,
    ) -> None:
        reference: Reference | None = getattr(token, "reference", None)
        self._remote = _remote_of(token, serializer, manager, authkey, reference)
        key = self._remote.key()
        if reference is None:
            with self._remote.failures_told():
                super().__init__(token, serializer, manager, key, exposed, incref, manager_owned)
            return
        self._token, self._id = token, token.id
        self._manager = manager
        self._serializer = serializer
        self._authkey = AuthenticationString(key)
        self._pid = os.getpid()
        register_after_fork(self, BaseProxy._forked)

    def _forked(self) -> None:
        """In a child: the manager is the parent's, but the proxy is ours as well."""
        self._manager = None
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._token.reference.attach()

    def _callmethod(self, methodname: str, args: Any = (), kwds: Any = {}) -> Any:  # noqa: B006
        """Call a method of the object and return a copy of the result.

        Raises:
            what the method raises, with the traceback of the server as its cause.
            RemoteError: what it raised cannot be pickled, or there is no such method.
            PeerDied: the server has ended.
        """
        kind, result = self._remote.call(self._id, methodname, args, kwds)
        if kind == "#RETURN":
            return result
        try:
            return self._result(kind, result)
        finally:
            del result  # an exception would refer to itself, by its traceback and this frame

    def _result(self, kind: str, result: Any) -> Any:
        """Return, or raise, what a reply means that is more than a value."""
        if kind == "#RETURN":
            return result
        if kind == TOKEN:
            return self._new_proxy(*pickle.loads(result[-1]))
        if kind == "#PROXY":
            return self._new_proxy(*result)
        try:
            raise _mp.convert_to_error(kind, result)  # type: ignore[attr-defined]
        finally:
            del result

    def _new_proxy(self, exposed: Any, token: Any, proxytype: Any = None) -> Any:
        """Return a proxy for the result of a method."""
        token.address = self._token.address  # as it is called from here
        registry = getattr(self._manager, "_registry", {})
        if token.typeid in registry:
            proxytype = registry[token.typeid][-1]
        elif proxytype is None:  # of another session, or of multiprocessing
            proxytype = IteratorProxy if token.typeid == "Iterator" else AutoProxy
        facts = {"manager": self._manager, "authkey": self._authkey, "exposed": exposed}
        proxy = proxytype(token, self._serializer, **facts)
        if not isinstance(token, Token):
            self._remote.ask_once("decref", (token.id,))
        return proxy

    def __reduce__(self) -> Any:
        if is_for_strangers():
            return self._reduce_plainly()
        facts: dict[str, Any] = {}
        if get_spawning_popen() is not None:
            facts["authkey"] = self._authkey
        kind: Any = type(self)
        if getattr(self, "_isauto", False):
            kind, facts["exposed"] = self._auto, self._exposed_
        return RebuildProxy, (kind, self._token, self._serializer, facts)

    def _reduce_plainly(self) -> Any:
        """As `__reduce__`, for where there is no Fiber: to one of multiprocessing's proxies."""
        facts: dict[str, Any] = {}
        kind: Any = next(kind for kind in type(self).__mro__ if kind.__module__ == _mp.__name__)
        if kind is _mp.BaseProxy:
            kind, facts["exposed"] = _mp.AutoProxy, getattr(self, "_exposed_", None)  # type: ignore[attr-defined]
        token = _mp.Token(self._token.typeid, self._token.address, self._id)
        rebuild = _mp.RebuildProxy  # type: ignore[attr-defined]
        return rebuild, (kind, token, self._serializer, facts)


def _remote_of(
    token: Any,
    serializer: str,
    manager: Any,
    authkey: bytes | None,
    reference: Reference | None,
) -> Remote:
    """Return the server of a proxy."""
    remote: Remote | None = getattr(manager, "_remote", None)
    if remote is None:
        if authkey is None and manager is not None:
            authkey = manager._authkey
        remote = remote_at(token.address, serializer, authkey, getattr(token, "server", ""))
        if remote.authkey is None and reference is not None:
            with contextlib.suppress(PeerDied):  # its first use will tell
                remote.authkey = reference.call("authkey")
    return remote


def RebuildProxy(func: Any, token: Any, serializer: str, kwds: dict[str, Any]) -> Any:
    """Return a proxy that was pickled."""
    if getattr(token, "reference", None) is None:
        return _mp.RebuildProxy(func, token, serializer, kwds)  # type: ignore[attr-defined]
    return func(token, serializer, **kwds)


# Classes of proxies -----------------------------------------------------------------------------


_types: dict[tuple[str, tuple[str, ...], type], Any] = {}


def MakeProxyType(name: str, exposed: Iterable[str], base: type[BaseProxy] = BaseProxy) -> Any:
    """Return a class of proxies with these methods.

    Args:
        name: of the class.
        exposed: names of the methods.
        base: which class it extends.
    """
    key = (name, tuple(exposed), base)
    if key not in _types:
        methods = {method: _method(method) for method in key[1]}
        made: Any = type(name, (base,), methods)
        made._exposed_ = key[1]
        # As if it were defined where this is called, so that it can be pickled by its name.
        made.__module__ = sys._getframe(1).f_globals.get("__name__", __name__)
        _types[key] = made
    return _types[key]


def _method(name: str) -> Callable[..., Any]:
    def method(self: BaseProxy, /, *args: Any, **kwds: Any) -> Any:
        return self._callmethod(name, args, kwds)

    method.__name__ = method.__qualname__ = name
    return method


def AutoProxy(
    token: Any,
    serializer: str,
    manager: Any = None,
    authkey: bytes | None = None,
    exposed: Any = None,
    incref: bool = True,
    manager_owned: bool = False,
) -> BaseProxy:
    """Return a proxy with all methods that its object exposes; arguments as `BaseProxy`."""
    return auto_proxy(
        BaseProxy, token, serializer, manager, authkey, exposed, incref, manager_owned
    )


def auto_proxy(
    base: type[BaseProxy],
    token: Any,
    serializer: str,
    manager: Any,
    authkey: bytes | None,
    exposed: Any,
    incref: bool,
    manager_owned: bool,
) -> BaseProxy:
    """As `AutoProxy`, of a class that extends `base`."""
    if exposed is None:
        reference: Reference | None = getattr(token, "reference", None)
        remote = _remote_of(token, serializer, manager, authkey, reference)
        exposed = remote.ask("get_methods", (_mp.Token(token.typeid, token.address, token.id),))
    kind = MakeProxyType(f"AutoProxy[{token.typeid}]", exposed, base)
    proxy: BaseProxy = kind(
        token,
        serializer,
        manager=manager,
        authkey=authkey,
        incref=incref,
        manager_owned=manager_owned,
    )
    proxy._isauto = True
    return proxy


BaseProxy._auto = staticmethod(AutoProxy)


class IteratorProxy(BaseProxy, _mp.IteratorProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's; of a generator, or another iterator."""


class AcquirerProxy(BaseProxy, _mp.AcquirerProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's; of a lock or a semaphore of the threads of the server."""


class ConditionProxy(AcquirerProxy, _mp.ConditionProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's; of a `threading.Condition`."""


class EventProxy(BaseProxy, _mp.EventProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's; of a `threading.Event`."""


class BarrierProxy(BaseProxy, _mp.BarrierProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's; of a `threading.Barrier`."""


class NamespaceProxy(BaseProxy, _mp.NamespaceProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's: its attributes are those of an object in the server."""


class ValueProxy(BaseProxy, _mp.ValueProxy):  # type: ignore[type-arg]
    """As multiprocessing's: `value` is that of an object in the server."""


class BaseListProxy(BaseProxy, _mp.BaseListProxy):  # type: ignore[type-arg]
    """As multiprocessing's; the base of `ListProxy`."""


class ListProxy(BaseListProxy, _mp.ListProxy):  # type: ignore[type-arg]
    """As multiprocessing's; of a list."""


class DictProxy(BaseProxy, _mp.DictProxy):  # type: ignore[type-arg]
    """As multiprocessing's; of a dictionary."""


class ArrayProxy(BaseProxy, _mp.ArrayProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's; of an `array.array`."""


class BasePoolProxy(BaseProxy, _mp.BasePoolProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's; the base of `PoolProxy`."""


class PoolProxy(BasePoolProxy, _mp.PoolProxy):  # type: ignore[name-defined,misc]
    """As multiprocessing's; of a pool whose master is the server."""
