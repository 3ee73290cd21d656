"""What the tests of the pool have their workers do; free of pytest, so that workers start fast."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import fiber

_numbers = itertools.count()
_kept: Any = None


# Plain work ------------------------------------------------------------------------------------


def square(x: Any) -> Any:
    return x * x


def same(x: Any) -> Any:
    return x


def show(*args: object, **kwargs: object) -> str:
    return f"{args} {sorted(kwargs.items())}"


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def pid_of(x: object = None) -> int:
    return os.getpid()


def stamp(x: Any) -> tuple[int, int, Any]:
    """Return the process, how many stamps it made before, and `x`."""
    return os.getpid(), next(_numbers), x


def wait_for(path: str, x: Any = None) -> Any:
    """Return `x` as soon as there is a file at `path`."""
    deadline = time.monotonic() + 30
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            raise RuntimeError(f"nobody made {path}")
        time.sleep(0.002)
    return x


def log_and(path: str, func: Callable[[Any], Any], x: Any) -> Any:
    """Note in a file that `x` is about to be run, then run it."""
    log(path, x)
    return func(x)


def log(path: str, x: Any) -> Any:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{x!r}\n".encode())
    os.close(fd)
    return x


class Scaler:
    """Callable in several ways."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, x: int) -> int:
        return self.factor * x

    def scale(self, x: int) -> int:
        return self.factor * x

    @classmethod
    def thrice(cls, x: int) -> int:
        return cls(3).scale(x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scaler) and other.factor == self.factor

    __hash__ = None  # type: ignore[assignment]


def threads_of_numerics(x: object = None) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


@fiber.meta(cpu=2)
def threads_of_two(x: object = None) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


@fiber.meta(cpu=3)
def threads_of_three(x: object = None) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def map_inside(n: int) -> list[int]:
    with fiber.Pool(1) as pool:
        return pool.map(square, range(n))


# Initializers ----------------------------------------------------------------------------------


def keep(*values: Any) -> None:
    global _kept
    _kept = values


def kept(x: object = None) -> Any:
    return _kept


def kept_sizes(x: object = None) -> list[int]:
    return [len(value) for value in _kept]


def log_and_raise(path: str) -> None:
    log(path, os.getpid())
    raise LookupError("no luck here")


def log_and_leave(path: str, how: str) -> None:
    log(path, os.getpid())
    print("the initializer says goodbye", file=sys.stderr, flush=True)
    if how == "os._exit":
        os._exit(7)
    sys.exit(7)


# Exceptions ------------------------------------------------------------------------------------


class Custom(Exception):
    """Has arguments and an attribute of its own."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)
        self.code = code


class Unpicklable(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Unloadable(Exception):
    """Pickles, but its constructor wants another number of arguments than it kept."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class Evil(Exception):
    """Can be pickled and unpickled in the worker, but not in the process that made it."""

    def __init__(self, text: str, home: int, kind: str) -> None:
        super().__init__(text, home, kind)
        if os.getpid() == home:
            raise KeyboardInterrupt if kind == "interrupt" else ValueError("not at home")


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot even say what it is")


class Plain(BaseException):
    """Neither Exception nor one of those that Python knows."""


def raise_custom(x: Any) -> Any:
    raise Custom(42, f"about {x}")


def raise_with_cause(x: Any) -> Any:
    try:
        {}["missing"]
    except KeyError as error:
        raise ValueError(f"around {x}") from error


def raise_with_notes(x: Any) -> Any:
    error = ValueError("noted")
    error.__notes__ = ["first note", "second note"]
    raise error


def raise_with_attribute(x: Any) -> Any:
    error = ValueError("extra")
    error.position = x
    raise error


def fail_at(kind: str, place: int, x: int) -> int:
    if x == place:
        raise make_error(kind)
    return x


def make_error(kind: str) -> BaseException:
    return {
        "value": lambda: ValueError("bad value"),
        "custom": lambda: Custom(1, "x"),
        "unpicklable": lambda: Unpicklable("holds a lock"),
        "unloadable": lambda: Unloadable("one", "other"),
        "mute": Mute,
        "exit": lambda: SystemExit(3),
        "interrupt": KeyboardInterrupt,
        "stop": lambda: StopIteration("a value"),
        "generator exit": GeneratorExit,
        "plain": lambda: Plain("of no family"),
        "recursion": lambda: RecursionError("too deep"),
        "memory": lambda: MemoryError("too much"),
        "os": lambda: FileNotFoundError(2, "No such file", "/nowhere"),
    }[kind]()


def evil_at(home: int, kind: str, place: int, x: int) -> int:
    if x == place:
        raise Evil("evil", home, kind)
    return x


# What cannot travel ----------------------------------------------------------------------------


class LoadsOnlyHere:
    """Unpickles in the process `home` and nowhere else, or everywhere but there."""

    def __init__(self, home: int, here: bool, kind: str = "value") -> None:
        self.facts = (home, here, kind)

    def __reduce__(self) -> Any:
        return _load_here, self.facts


def _load_here(home: int, here: bool, kind: str) -> LoadsOnlyHere:
    if (os.getpid() == home) is not here:
        raise make_error(kind)
    return LoadsOnlyHere(home, here, kind)


class LoadKills:
    """Ends a process that unpickles it, if that is not `home`."""

    def __init__(self, home: int) -> None:
        self.home = home

    def __reduce__(self) -> Any:
        return _exit_elsewhere, (self.home,)


def _exit_elsewhere(home: int) -> LoadKills:
    if os.getpid() != home:
        os._exit(9)
    return LoadKills(home)


def return_at(kind: str, home: int, place: int, x: int) -> Any:
    if x != place:
        return x
    if kind == "lock":
        return threading.Lock()
    if kind == "generator":
        return (i for i in range(3))
    if kind == "deep":
        nested: Any = []
        for _ in range(100_000):
            nested = [nested]
        return nested
    return LoadsOnlyHere(home, here=False, kind=kind)


# Ways to die -----------------------------------------------------------------------------------


def _exhaust_memory() -> None:
    """Run on a null pointer, as C code does that does not look at what malloc returns."""
    limit_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    ctypes.memset(libc.malloc(1 << 40), 1, 1 << 20)


def limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 31, hard))


class _Bottomless:
    def __repr__(self) -> str:
        return repr(self)


def _overflow_stack() -> None:
    sys.setrecursionlimit(1 << 30)
    repr(_Bottomless())


DEATHS: dict[str, tuple[Callable[[], object], int]] = {
    "exit code 0": (lambda: os._exit(0), 0),
    "exit code 3": (lambda: os._exit(3), 3),
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    "SIGTERM": (lambda: os.kill(os.getpid(), signal.SIGTERM), -signal.SIGTERM),
    "null pointer": (lambda: ctypes.string_at(0), -signal.SIGSEGV),
    "stack": (_overflow_stack, -signal.SIGSEGV),
    "memory": (_exhaust_memory, -signal.SIGSEGV),
    "abort": (os.abort, -signal.SIGABRT),
}


def die_at(kind: str, places: tuple[int, ...], x: int) -> int:
    if x in places:
        print(f"last words of {x}", file=sys.stderr, flush=True)
        DEATHS[kind][0]()
        time.sleep(30)  # a signal may take its time
    return x


def ask_for_too_much(x: int) -> int:
    soft = resource.getrlimit(resource.RLIMIT_AS)
    limit_memory()
    try:
        return len(bytearray(1 << 40))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, soft)


def leave_grandchild(path: str, dies: bool, x: int) -> int:
    """Fork a process that holds all descriptors of this worker and lives on."""
    if x == 5:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
            os._exit(0)
        log(path, pid)
        if dies:
            os._exit(3)
    return x


def close_descriptors(x: int) -> int:
    if x == 5:
        os.closerange(3, 4096)
    return x


def chatter(x: int) -> int:
    """Write a megabyte to each stream, past Python's own buffers too."""
    line = (f"{x} " * 40)[:79] + "\n"
    for stream in (sys.stdout, sys.stderr):
        stream.write(line * (1 << 13))
        stream.flush()
    return x


def chatter_and_die(x: int) -> int:
    chatter(x)
    print("and so it ends", file=sys.stderr, flush=True)
    os._exit(3)


def leave_thread(x: int) -> int:
    threading.Thread(target=time.sleep, args=(60,)).start()
    return x


def ignore_signals(path: str, x: int) -> int:
    """Hang where only SIGKILL helps."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log(path, x)
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def hang_at(place: int, x: int) -> int:
    if x == place:
        time.sleep(60)
    return x


def wait_at(place: int, flag: str, x: int) -> int:
    """Take a millisecond; item `place` takes until the file `flag` is there, a minute at most."""
    deadline = time.monotonic() + 60
    while x == place and not os.path.exists(flag) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.001)
    return x


def nap_at(place: int, long: float, short: float, x: int) -> int:
    time.sleep(long if x == place else short)
    return x


def big(size: int, x: int) -> bytes:
    return x.to_bytes(8, "little") + bytes(size - 8)


# What the tasks of a call have in common -------------------------------------------------------


def length(counted: Any, _: object = None) -> int:
    return len(counted.data)


def length_within(item: Any) -> int:
    return len((item["it"] if isinstance(item, dict) else item[1]).data)


def first_of(array: Any, _: object = None) -> int:
    return int(array[0])


def scribble(array: Any, number: int) -> int:
    """Return how many of some numbers are not 0, and change all of these."""
    some = array[:: max(len(array) // 7, 1)]
    found = int(bool(some.any()))
    some[:] = number + 1
    return found


def append(data: dict[str, list[int]], number: int) -> int:
    data["seen"].append(number)
    return len(data["seen"])


_arrays: list[Any] = []


def keep_and_show(array: Any, number: int) -> tuple[int, list[int]]:
    first = int(array[0])
    array[0] = number
    _arrays.append(array)
    return first, [int(kept[0]) for kept in _arrays]


def give_back(array: Any, number: int) -> tuple[Any, int]:
    array[0] = number
    return array, number


def die_once(array: Any, path: str) -> int:
    """End this worker, the first time that it is called with `path`."""
    if not os.path.exists(path):
        with open(path, "w"):
            pass
        if path.endswith(("3", "7")):
            os.kill(os.getpid(), signal.SIGKILL)
    return int(array.sum())


def shares_memory(array: Any, path: str, number: int) -> tuple[int, int]:
    """Return this worker and its share, in KB, of what the array is in, when all have read it."""
    array.sum()
    with open(f"{path}-{number}", "w"):
        pass
    wait_for(path)
    total, ours = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            words = line.split()
            if "-" in words[0]:
                ours = ".snapshot" in line
            elif ours and words[0] == "Pss:":
                total += int(words[1])
    return os.getpid(), total


def total_of_first(shared: list[Any], _: int) -> float:
    return float(shared[0].get().sum())


def wait_with(array: Any, path: str) -> None:
    wait_for(path)
