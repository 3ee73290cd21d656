"""Objects to bytes and raw buffers, and back.

    dumps ─► pickle (C, protocol 5, buffers out of band)
               │ fails: a lambda, a closure, an object of `__main__` that the peer cannot import
               ▼
             ByValuePickler (cloudpickle) ─► Packed ─► loads

A function of `__main__` that travels by value runs in the `__main__` of the process that receives
it: the globals that it uses are set there, so that it shares them with what came before and after
it, as it does at home. A global that the receiver has changed since stays as it is until the sender
binds the name to another object.

What multiprocessing and other libraries have registered with its `ForkingPickler` is heeded in one
of two ways: to share (a tensor, whose receiver sees what the sender writes into it), or only for
what could not be pickled otherwise (a socket).
"""

from __future__ import annotations

import copyreg
import functools
import io
import operator
import pickle
import sys
import types
from collections.abc import Callable, Container, Sequence
from itertools import chain
from multiprocessing import context as _mp_context
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, Protocol

from fiber.errors import SerializationError
from fiber.wire.framing import Buffer

__all__ = ["Apart", "Number", "Packed", "dumps", "is_flat", "kinds_of", "loads", "pieces", "reason"]

PROTOCOL = 5

PLAIN = frozenset({int, float, complex, str, bytes, bool, type(None)})
"""Types of values that cannot change, and that always can be pickled and unpickled."""

SIZED = frozenset({bytes, str})
"""Those of them that may be large."""

_FIXED = PLAIN - SIZED
_CONTAINERS = frozenset({tuple, list, dict})
_FEW = 8  # values in a container, and each of
_SHORT = 64  # bytes at the most, to be flat

_REFUSALS = (pickle.PickleError, TypeError, AttributeError, NotImplementedError, RecursionError)
"""What is raised where something cannot be pickled."""

_IN_BAND = 1 << 12  # bytes: a smaller buffer is cheaper to copy than to keep apart


class Packed(NamedTuple):
    """A pickled object: its bytes, and the buffers that travel beside them."""

    data: bytes
    buffers: Sequence[Buffer]
    by_name: bool = True
    """Whether functions and classes went by their names."""


class Apart:
    """Stands for bytes, or a bytearray, that shall travel out of band; it arrives as these."""

    __slots__ = ("value",)

    def __init__(self, value: bytes | bytearray) -> None:
        self.value = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self.value), (pickle.PickleBuffer(self.value),)


def kinds_of(values: Sequence[object]) -> set[type]:
    """Return the types of the values or, if all are tuples, of what is in these."""
    kinds = set(map(type, values))
    if kinds == {tuple}:  # as arguments of starmap are
        kinds = set(map(type, chain.from_iterable(values)))  # type: ignore[arg-type]
    return kinds


def is_flat(obj: object) -> bool:
    """Whether it is a container of a few short plain values: such can be pickled without ado."""
    kind = type(obj)
    if kind not in _CONTAINERS or len(obj) > _FEW:  # type: ignore[arg-type]
        return False
    for value in obj:  # type: ignore[attr-defined]
        its = type(value)
        if its not in _FIXED and (its not in SIZED or len(value) > _SHORT):
            return False
    return kind is not dict or is_flat(tuple(obj.values()))  # type: ignore[attr-defined]


def dumps(
    obj: object,
    known: Container[str] | None = None,
    *,
    share: bool = False,
    number: Number | None = None,
    apart: int = _IN_BAND,
    within: dict[int, Any] | None = None,
) -> Packed:
    """Pickle `obj`, with its large buffers left out of band.

    Args:
        obj: anything; lambdas and closures are fine.
        known: the names that the receiver's `__main__` has, None if it has all of ours. Functions
            and classes of `__main__` that it lacks are sent whole instead of by name.
        share: heed all that is registered with `ForkingPickler`. Such a pickle may be good for one
            receiver only, and only while this process lives.
        number: returns the number by which the receiver knows an object, or None; such objects are
            left out, and it must unpickle by a `pickle.Unpickler` of its own.
        apart: bytes from which on a buffer is kept out of band.
        within: is given all objects in `obj` that could occur in another one, by their identity.

    Raises:
        SerializationError: it cannot be pickled; the message says what and why. An exception of
            another kind, from the object's own `__reduce__` perhaps, comes as it is.
    """
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Say whether it goes in band."""
        raw = buffer.raw()
        if raw.nbytes < apart:
            return True
        buffers.append(raw)
        return False

    if known is None:
        mark = carrier.made
        try:
            if share:
                return Packed(b"".join(_dump_by_name(obj, keep)), buffers)
            if number is not None:
                return Packed(_dump_numbered(obj, number, keep), buffers)
            if within is not None:
                return Packed(_dump_remembering(obj, within, keep), buffers)
            return Packed(pickle.dumps(obj, PROTOCOL, buffer_callback=keep), buffers)
        except Exception:
            buffers.clear()  # what cannot go by name may still go by value
            carrier.withdraw(mark)
    data = b"".join(_dump_by_value(obj, known, share, keep, number, within))
    return Packed(data, buffers, by_name=False)


def pieces(obj: object, known: Container[str] | None = None) -> list[Buffer]:
    """Pickle `obj` as `dumps` does, to share, but into one stream; return it in pieces.

    Large pieces are not copied: they are the object's own memory.
    """
    kind = type(obj)
    if kind in PLAIN and (kind not in SIZED or len(obj) < _IN_BAND):  # type: ignore[arg-type]
        return [pickle.dumps(obj, PROTOCOL)]
    if is_flat(obj):
        return [pickle.dumps(obj, PROTOCOL)]
    if known is None:
        mark = carrier.made
        try:
            return _dump_by_name(obj, None)
        except Exception:
            carrier.withdraw(mark)
    return _dump_by_value(obj, known, True, None)


def loads(data: Buffer, buffers: Sequence[Buffer] = ()) -> Any:
    """Return the object that `dumps` packed; raises what its unpickling raises."""
    return pickle.loads(data, buffers=buffers)


def reason(error: BaseException) -> str:
    """Return the words of `error`, with its type where they do not tell."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Sink:
    """Takes what a pickler writes; large bytes come as the objects that have them."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: list[Buffer] = []

    def write(self, piece: Any) -> None:
        if type(piece) is pickle.PickleBuffer:
            piece = piece.raw()
        elif type(piece) is memoryview:  # of a string, which it does not keep alive
            piece = bytes(piece)
        self.pieces.append(piece)


Keep = Callable[[pickle.PickleBuffer], Any] | None
Number = Callable[[Any], int | None]
"""Returns the number by which a receiver knows an object, None if it does not."""


def _dump_by_name(obj: object, keep: Keep) -> list[Buffer]:
    sink = _Sink()
    pickler = pickle.Pickler(sink, PROTOCOL, buffer_callback=keep)
    pickler.dispatch_table = _table(share=True)
    pickler.dump(obj)
    return sink.pieces


class _Numbering(pickle.Pickler):
    number: Number

    def persistent_id(self, obj: Any) -> int | None:
        return self.number(obj)


def _dump_numbered(obj: object, number: Number, keep: Keep) -> bytes:
    file = io.BytesIO()
    pickler = _Numbering(file, PROTOCOL, buffer_callback=keep)
    pickler.number = number
    pickler.dump(obj)
    return file.getvalue()


def _dump_remembering(obj: object, within: dict[int, Any], keep: Keep) -> bytes:
    file = io.BytesIO()
    pickler = pickle.Pickler(file, PROTOCOL, buffer_callback=keep)
    pickler.dump(obj)
    _remember(pickler, within)
    return file.getvalue()


def _remember(pickler: Any, within: dict[int, Any]) -> None:
    within.update({identity: part for identity, (_, part) in pickler.memo.copy().items()})


def _dump_by_value(
    obj: object,
    known: Container[str] | None,
    share: bool,
    keep: Keep,
    number: Number | None = None,
    within: dict[int, Any] | None = None,
) -> list[Buffer]:
    sink = _Sink()
    mark = carrier.made
    try:
        kind = _pickler_class() if number is None else _numbering_class()
        pickler = kind(sink, known, share, keep)
        pickler.number = number
        pickler.dump(obj)
        if within is not None:
            _remember(pickler, within)
    except BaseException as error:
        carrier.withdraw(mark)
        if isinstance(error, _REFUSALS):
            raise SerializationError(reason(error)) from error
        raise
    return sink.pieces


# What is registered with ForkingPickler --------------------------------------------------------


class Carrier(Protocol):
    """Has file descriptors travel with pickles; it looks to reducers like a process being started.

    Attributes:
        made: number of the last pickle that it keeps one for.
    """

    made: int

    def withdraw(self, mark: int) -> None:
        """Keep none for the pickles that this thread made after number `mark`: they failed."""


class _NoCarrier:
    made = 0

    def withdraw(self, mark: int) -> None:
        pass


carrier: Carrier = _NoCarrier()
"""Set by `runtime.descriptors`."""

_reducers: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
_NATIVE = {  # registered for the Pythons in which pickle could not do it
    functools.partial,
    types.MethodType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
}


def _table(*, share: bool, by_value: bool = False) -> dict[type, Callable[[Any], Any]]:
    """Return a dispatch table with what is registered now."""
    return _make_table(share, by_value, len(_reducers), len(copyreg.dispatch_table))


@functools.lru_cache(maxsize=4)
def _make_table(share: bool, by_value: bool, *sizes: int) -> dict[type, Callable[[Any], Any]]:
    kinds = _reducers.keys() - _NATIVE
    if share:
        table = {**copyreg.dispatch_table, **dict.fromkeys(kinds, reduce_as_registered)}
    else:
        table = {**dict.fromkeys(kinds, _reduce_if_needed), **copyreg.dispatch_table}
    return {**table, **_pickler_class().dispatch_table} if by_value else table


def reduce_as_registered(obj: Any) -> Any:
    """Reduce an object as `ForkingPickler` would; its file descriptors are lent."""
    reduce = _reducers[type(obj)]
    if _mp_context.get_spawning_popen() is not None:
        return reduce(obj)
    _mp_context.set_spawning_popen(carrier)  # type: ignore[arg-type]
    try:
        return reduce(obj)
    finally:
        _mp_context.set_spawning_popen(None)


def _reduce_if_needed(obj: Any) -> Any:
    try:
        return obj.__reduce_ex__(PROTOCOL)
    except TypeError:
        return reduce_as_registered(obj)


# By value --------------------------------------------------------------------------------------


_class: Any = None


def _pickler_class() -> Any:
    """Return ByValuePickler; it is made at first use, for importing cloudpickle takes a while."""
    global _class
    if _class is not None:
        return _class
    import cloudpickle

    class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        """Pickles functions and classes by value where a name would not be found."""

        def __init__(
            self, file: _Sink, known: Container[str] | None, share: bool, keep: Keep
        ) -> None:
            self.dispatch_table = _table(share=share, by_value=True)
            super().__init__(file, protocol=PROTOCOL, buffer_callback=keep)
            self._main = sys.modules["__main__"].__dict__
            self._known = known

        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, types.FunctionType):
                if obj.__globals__ is self._main:
                    if self._is_known(obj):
                        return obj.__qualname__
                    return _reduce_main_function(obj)
            elif isinstance(obj, type) and obj.__module__ in ("__main__", "__mp_main__"):
                if self._is_known(obj):
                    return obj.__qualname__
                reduced = self._reduce_class(obj)
                if isinstance(reduced, tuple):
                    make, args, *state = reduced
                    return (_make_main_class, (obj.__qualname__, make, args), *state)
                return reduced
            elif isinstance(obj, type):
                return self._reduce_class(obj)
            return super().reducer_override(obj)

        def _reduce_class(self, obj: type) -> Any:
            if "ctypes" in sys.modules:
                if obj.__module__ == "_ctypes" and issubclass(obj, type):
                    return type, (_of_ctypes(obj),)
                if _is_array_type(obj):
                    return operator.mul, (obj._type_, obj._length_)  # type: ignore[attr-defined]
            reduced = super().reducer_override(obj)
            if isinstance(reduced, tuple) and hasattr(obj, "_fields_"):
                # A structure of ctypes is given its layout once, and makes its fields of that.
                make, (kind, name, bases, first, *others), (members, slots), *rest = reduced
                members = {k: v for k, v in members.items() if type(v).__name__ != "CField"}
                layout = {name: members.pop(name) for name in _LAYOUT if name in members}
                args = (kind, name, bases, {**first, **layout}, *others)
                return (make, args, (members, slots), *rest)
            return reduced

        def _is_known(self, obj: Any) -> bool:
            """Whether the receiver finds `obj` in its `__main__` by name."""
            found: Any = sys.modules["__main__"]
            names = obj.__qualname__.split(".")
            if self._known is not None and names[0] not in self._known:
                return False
            for name in names:
                found = getattr(found, name, None)
            return found is obj

    _class = ByValuePickler
    return _class


@functools.cache
def _numbering_class() -> Any:
    """Return the same class that leaves out what has a number."""

    class Numbering(_pickler_class()):  # type: ignore[misc]
        def persistent_id(self, obj: Any) -> int | None:
            number: Number = self.number
            return number(obj)

    return Numbering


def _is_array_type(obj: type) -> bool:
    """Whether it is such a class as `ctypes.c_int * 3`, which has no name to go by."""
    import ctypes

    if not issubclass(obj, ctypes.Array) or obj is ctypes.Array:
        return False
    element: Any = obj._type_
    return obj is element * obj._length_


_LAYOUT = ("_pack_", "_anonymous_", "_fields_")


def _of_ctypes(metaclass: type) -> Any:
    """Return a class of ctypes whose class is `metaclass`, which itself has no name to go by."""
    import ctypes

    kinds: list[Any] = [ctypes.Structure, ctypes.Union, ctypes.Array]
    kinds += [ctypes._SimpleCData, ctypes._Pointer, ctypes._CFuncPtr]  # type: ignore[attr-defined]
    return next(kind for kind in kinds if type(kind) is metaclass)


def _reduce_main_function(function: types.FunctionType) -> tuple[Any, ...]:
    main = function.__globals__
    names = sorted(_global_names(function.__code__) & main.keys())
    state = {
        "globals": [(name, id(main[name]), main[name]) for name in names],
        "top": main.get(function.__name__) is function,
        "attributes": function.__dict__,
        "defaults": function.__defaults__,
        "kwdefaults": function.__kwdefaults__,
        "annotations": getattr(function, "__annotations__", None) or {},
        "doc": function.__doc__,
    }
    made_of = (function.__code__, function.__name__, function.__qualname__, function.__closure__)
    return _make_main_function, made_of, state, None, None, _set_main_function


def _global_names(code: types.CodeType) -> set[str]:
    """Return the names of globals that `code` and the functions within it use."""
    import dis

    operations = {"LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
    names = {i.argval for i in dis.get_instructions(code) if i.opname in operations}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _make_main_function(
    code: types.CodeType, name: str, qualname: str, closure: tuple[types.CellType, ...] | None
) -> types.FunctionType:
    function = types.FunctionType(code, sys.modules["__main__"].__dict__, name, None, closure)
    function.__qualname__ = qualname
    function.__module__ = "__main__"
    return function


_received: dict[str, int] = {}  # global name -> identity, at its sender, of the object we set


def _set_main_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    main = sys.modules["__main__"].__dict__
    for name, identity, value in state["globals"]:
        if name not in main or _received.get(name) != identity:
            main[name] = value
            _received[name] = identity
    if state["top"]:
        main[function.__name__] = function
    function.__dict__.update(state["attributes"])
    function.__defaults__ = state["defaults"]
    function.__kwdefaults__ = state["kwdefaults"]
    function.__annotations__ = state["annotations"]
    function.__doc__ = state["doc"]


def _make_main_class(qualname: str, make: Callable[..., type], args: tuple[Any, ...]) -> type:
    made = make(*args)
    if "." not in qualname:
        setattr(sys.modules["__main__"], qualname, made)
    return made
