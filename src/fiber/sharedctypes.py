"""ctypes objects in shared memory, with `multiprocessing.sharedctypes`' interface.

    Value ─► Synchronized ─┬─► a lock
                           └─► RawValue: a ctypes object ─► BufferWrapper ─► memory (fiber.heap)

They can be pickled at any time, by any pickler: what travels is where their memory is.
"""

from __future__ import annotations

import copyreg
import ctypes
import sys
import weakref
from multiprocessing import sharedctypes as _mp
from typing import TYPE_CHECKING, Any, TypeVar

from fiber.heap import BufferWrapper

__all__ = [
    "Array",
    "RawArray",
    "RawValue",
    "Synchronized",
    "SynchronizedArray",
    "SynchronizedBase",
    "SynchronizedString",
    "Value",
    "copy",
    "synchronized",
    "typecode_to_type",
]

typecode_to_type: dict[str, Any] = _mp.typecode_to_type  # type: ignore[attr-defined]
make_property: Any = _mp.make_property  # type: ignore[attr-defined]

_T = TypeVar("_T")


def RawValue(typecode_or_type: Any, *args: Any) -> Any:
    """Return a ctypes object in shared memory.

    Args:
        typecode_or_type: a ctypes type, or one of `array`'s letters for it.
        args: for its constructor.

    Raises:
        OSError: there is no room for it.
    """
    type_ = typecode_to_type.get(typecode_or_type, typecode_or_type)
    value = _new_value(type_)
    value.__init__(*args)
    return value


def RawArray(typecode_or_type: Any, size_or_initializer: Any) -> Any:
    """Return a ctypes array in shared memory.

    Args:
        typecode_or_type: of its elements, as for `RawValue`.
        size_or_initializer: how many, all zero; or a sequence with their values.

    Raises:
        OSError: there is no room for it.
    """
    type_ = typecode_to_type.get(typecode_or_type, typecode_or_type)
    if isinstance(size_or_initializer, int):
        return _new_value(type_ * size_or_initializer)
    array = _new_value(type_ * len(size_or_initializer))
    array.__init__(*size_or_initializer)
    return array


def Value(typecode_or_type: Any, *args: Any, lock: Any = True, ctx: Any = None) -> Any:
    """Return a ctypes object in shared memory, with a lock.

    Args:
        typecode_or_type, args: as for `RawValue`.
        lock: the lock to use; True or None for a new `RLock`, False for none: a `RawValue`.
        ctx: the context that the new lock is of.
    """
    return _with_lock(RawValue(typecode_or_type, *args), lock, ctx)


def Array(
    typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True, ctx: Any = None
) -> Any:
    """Return a ctypes array in shared memory, with a lock.

    Args:
        typecode_or_type, size_or_initializer: as for `RawArray`.
        lock, ctx: as for `Value`.
    """
    return _with_lock(RawArray(typecode_or_type, size_or_initializer), lock, ctx)


def _with_lock(raw: Any, lock: Any, ctx: Any) -> Any:
    if lock is False:
        return raw
    if lock in (True, None):
        lock = _new_lock(ctx)
    if not hasattr(lock, "acquire"):
        raise AttributeError(f"{lock!r} has no method 'acquire'")
    return synchronized(raw, lock, ctx)


def _new_lock(ctx: Any) -> Any:
    if ctx is not None:
        return ctx.RLock()
    from fiber.synchronize import RLock

    return RLock()


def copy(obj: _T) -> _T:
    """Return a copy of a ctypes object, in shared memory of its own."""
    new: Any = _new_value(type(obj))
    ctypes.pointer(new)[0] = obj
    return new  # type: ignore[no-any-return]


def synchronized(obj: Any, lock: Any = None, ctx: Any = None) -> SynchronizedBase[Any]:
    """Return `obj`, a ctypes object, with a lock: the one given, or a new `RLock`."""
    assert not isinstance(obj, _mp.SynchronizedBase), "object already synchronized"
    if isinstance(obj, ctypes._SimpleCData):
        return Synchronized(obj, lock, ctx)
    if isinstance(obj, ctypes.Array):
        if obj._type_ is ctypes.c_char:
            return SynchronizedString(obj, lock, ctx)
        return SynchronizedArray(obj, lock, ctx)
    kind = type(obj)
    wrapper = _wrappers.get(kind)
    if wrapper is None:
        members = {name: make_property(name) for name, *_ in _fields(kind)}
        wrapper = _wrappers[kind] = type(
            f"Synchronized{kind.__name__}", (SynchronizedBase,), members
        )
    return wrapper(obj, lock, ctx)  # type: ignore[no-any-return]


_wrappers: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


def _fields(kind: type) -> list[Any]:
    """Return the fields of a Structure or Union, with those that it inherits."""
    return [field for base in kind.__mro__ for field in vars(base).get("_fields_", ())]


# Memory and pickling ---------------------------------------------------------------------------


def _new_value(type_: Any) -> Any:
    """Return an object of `type_` in new memory, all zero."""
    wrapper = BufferWrapper(ctypes.sizeof(type_))
    value = _rebuild(type_, (), wrapper)
    if not wrapper.zeroed:
        ctypes.memset(ctypes.addressof(value), 0, ctypes.sizeof(value))
    return value


def _rebuild(type_: Any, lengths: tuple[int, ...], wrapper: BufferWrapper) -> Any:
    """Return an object of `type_`, or an array of arrays of them, in the memory of `wrapper`."""
    for length in lengths:
        type_ = type_ * length
    # The table that all picklers use. It is by type, and all objects of the type are looked up.
    copyreg.pickle(type_, reduce_ctype)
    value = type_.from_buffer(wrapper.create_memoryview())
    value._wrapper = wrapper
    return value


def reduce_ctype(obj: Any) -> Any:
    """Tell picklers how to rebuild a ctypes object: in shared memory, by where that is."""
    wrapper = getattr(obj, "_wrapper", None)
    if not isinstance(wrapper, BufferWrapper):
        return obj.__reduce_ex__(2)  # in this process's memory: by its value
    if sys._getframe(1).f_globals.get("__name__") == "copy":  # the module, which asks here as well
        return type(obj).from_buffer_copy, (bytes(obj),)
    type_: Any = type(obj)
    lengths: list[int] = []
    # Types of arrays have names by which nobody finds them.
    while issubclass(type_, ctypes.Array) and type_ is type_._type_ * type_._length_:
        lengths.append(type_._length_)
        type_ = type_._type_
    return _rebuild, (type_, tuple(reversed(lengths)), wrapper)


def rebuild_ctype(type_: Any, wrapper: BufferWrapper, length: int | None) -> Any:
    """As multiprocessing's: an object of `type_`, or an array of `length` of them."""
    return _rebuild(type_, () if length is None else (length,), wrapper)


# With locks ------------------------------------------------------------------------------------

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import (
        Synchronized,
        SynchronizedArray,
        SynchronizedBase,
        SynchronizedString,
    )
else:

    class SynchronizedBase(_mp.SynchronizedBase):
        """A ctypes object in shared memory, with a lock."""

        def __init__(self, obj, lock=None, ctx=None):
            super().__init__(obj, lock or _new_lock(ctx), ctx)

        def __reduce__(self):
            return synchronized, (self._obj, self._lock)

    class Synchronized(SynchronizedBase, _mp.Synchronized):
        """A number or character; `value` is read and set under the lock."""

    class SynchronizedArray(SynchronizedBase, _mp.SynchronizedArray):
        """An array; items and slices are read and set under the lock."""

    class SynchronizedString(SynchronizedArray, _mp.SynchronizedString):
        """An array of `c_char`; `value` and `raw` are read and set under the lock."""
