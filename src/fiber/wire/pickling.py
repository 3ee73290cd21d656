"""Objects to bytes and raw buffers, and back.

    dumps ─► pickle (C, protocol 5, buffers out of band)
               │ fails: a lambda, a closure, an object of `__main__` that the peer cannot import
               ▼
             ByValuePickler (cloudpickle) ─► Packed ─► loads

A function of `__main__` that travels by value runs in the `__main__` of the process that receives
it: the globals that it uses are set there, so that it shares them with what came before and after
it, as it does at home. A global that the receiver has changed since stays as it is until the sender
binds the name to another object.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections.abc import Callable, Container, Sequence
from itertools import chain
from typing import Any, NamedTuple

from fiber.errors import SerializationError
from fiber.wire.framing import Buffer

__all__ = ["Packed", "dumps", "is_plain", "loads", "reason"]

PROTOCOL = 5

PLAIN = frozenset({int, float, complex, str, bytes, bool, type(None)})
"""Types of values that cannot change, and that always can be pickled and unpickled."""

_IN_BAND = 1 << 12  # bytes: a smaller buffer is cheaper to copy than to keep apart


class Packed(NamedTuple):
    """A pickled object: its bytes, and the buffers that travel beside them."""

    data: bytes
    buffers: Sequence[Buffer]
    by_name: bool = True
    """Whether functions and classes went by their names."""


def is_plain(values: Sequence[object]) -> bool:
    """Whether all are numbers, strings or None, or all are tuples of these."""
    kinds = set(map(type, values))
    if kinds == {tuple}:  # as arguments of starmap are
        kinds = set(map(type, chain.from_iterable(values)))  # type: ignore[arg-type]
    return kinds <= PLAIN


def dumps(obj: object, known: Container[str] | None = None) -> Packed:
    """Pickle `obj`, with its large buffers left out of band.

    Args:
        obj: anything; lambdas and closures are fine.
        known: the names that the receiver's `__main__` has, None if it has all of ours. Functions
            and classes of `__main__` that it lacks are sent whole instead of by name.

    Raises:
        SerializationError: it cannot be pickled; the message says what and why.
    """
    buffers: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        """Say whether it goes in band."""
        raw = buffer.raw()
        if raw.nbytes < _IN_BAND:
            return True
        buffers.append(raw)
        return False

    if known is None:
        try:
            return Packed(pickle.dumps(obj, PROTOCOL, buffer_callback=keep), buffers)
        except Exception:
            buffers.clear()  # what cannot go by name may still go by value
    try:
        data = _dumps_by_value(obj, known, keep)
    except Exception as error:
        raise SerializationError(reason(error)) from error
    return Packed(data, buffers, by_name=False)


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


def _dumps_by_value(
    obj: object, known: Container[str] | None, buffer_callback: Callable[[pickle.PickleBuffer], Any]
) -> bytes:
    file = io.BytesIO()
    _pickler_class()(file, known, buffer_callback).dump(obj)
    return file.getvalue()


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
            self,
            file: io.BytesIO,
            known: Container[str] | None,
            buffer_callback: Callable[[pickle.PickleBuffer], Any],
        ) -> None:
            super().__init__(file, protocol=PROTOCOL, buffer_callback=buffer_callback)
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
                reduced = super().reducer_override(obj)
                if isinstance(reduced, tuple):
                    make, args, *state = reduced
                    return (_make_main_class, (obj.__qualname__, make, args), *state)
                return reduced
            return super().reducer_override(obj)

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


# Functions and classes of `__main__`, by value -------------------------------------------------


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
