"""Resources: what a function asks for, and what this process may use.

    @fiber.meta(cpu=2, memory="1Gi")   ──►  meta_of(func)  ──►  Resources  ──►  a backend's job
                                                                │
                    thread_environment, gpu_environment  ◄──────┘   variables of the process

A number of CPUs cannot be enforced on every backend, but numerical libraries start a thread for
each CPU they see. Telling them keeps eight workers on eight CPUs from running 64 threads; it must
be in the environment before such a library is loaded.

A leaf: it knows nothing of sessions, pools or backends.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from operator import index
from types import FunctionType, MethodType
from typing import Final, NamedTuple, TypeVar

from fiber.config import MEMORY_FORMS, parse_memory

__all__ = ["Resources", "cpu_count", "gpu_environment", "meta", "meta_of", "thread_environment"]

F = TypeVar("F", bound=Callable[..., object])

# Read by the libraries when they are loaded.
THREAD_VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
)
# Names those that Fiber set, so that a child with another number of CPUs does not take its parent's
# for the user's.
OURS: Final = "FIBER_INTERNAL_THREAD_VARIABLES"


class _Fields(NamedTuple):
    cpu: int | None = None
    memory: int | None = None
    gpu: int | None = None


class Resources(_Fields):
    """What a process needs. None: nothing was asked, the configuration or the backend decides.

    Attributes:
        cpu: number of CPUs, at least 1.
        memory: MB (of 2**20 bytes); given as a number or as text such as "512Mi".
        gpu: number of GPUs.
    """

    __slots__ = ()

    def __new__(
        cls, cpu: int | None = None, memory: int | str | None = None, gpu: int | None = None
    ) -> Resources:
        return super().__new__(
            cls,
            None if cpu is None else _count("cpu", cpu, least=1),
            None if memory is None else _memory(memory),
            None if gpu is None else _count("gpu", gpu, least=0),
        )


def _count(name: str, value: object, least: int) -> int:
    try:
        number: int = -1 if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < least:
        raise ValueError(
            f"{name} cannot be {value!r}: it must be a whole number of at least {least}."
        )
    return number


def _memory(value: object) -> int:
    try:
        return parse_memory(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"memory cannot be {value!r}: it must be {MEMORY_FORMS}.") from None


def meta(**resources: object) -> Callable[[F], F]:
    """Say what a function needs of the process that runs it.

        @fiber.meta(cpu=2, memory="1Gi", gpu=1)
        def train(seed): ...

    The function itself is returned; a `Process` or `Pool` that runs it reads what it needs.

    Args:
        cpu: number of CPUs, at least 1; sets the thread counts of numerical libraries.
        memory: MB, or text such as "512Mi", "2Gi", "1.5G".
        gpu: number of GPUs.

    Raises:
        TypeError: an unknown resource, or something else than a function is decorated.
        ValueError: a value that does not fit.
    """
    unknown = [name for name in resources if name not in Resources._fields]
    if unknown:
        raise TypeError(
            f"fiber.meta knows no resource {unknown[0]!r}: the resources are "
            f"{', '.join(Resources._fields)}."
        )
    needs = Resources(**resources)  # type: ignore[arg-type]  # Resources checks them

    def decorate(func: F) -> F:
        if not isinstance(func, FunctionType):
            hint = "write it on a method of the class" if isinstance(func, type) else _HINT
            raise TypeError(f"fiber.meta decorates functions, not {func!r}: {hint}.")
        func.__fiber_meta__ = needs  # type: ignore[attr-defined]
        return func

    return decorate


_HINT: Final = "write @fiber.meta(...) directly above its def, below other decorators"


def meta_of(func: object) -> Resources:
    """What `func` was decorated to need, through methods, `partial`, wrappers and callables."""
    seen = set()
    while id(func) not in seen:
        seen.add(id(func))
        if isinstance(func, FunctionType):
            needs = func.__dict__.get("__fiber_meta__")
            if isinstance(needs, Resources):
                return needs
        if isinstance(func, MethodType):
            func = func.__func__
        elif isinstance(func, partial):
            func = func.func
        elif not isinstance(func, type) and "__wrapped__" in getattr(func, "__dict__", ()):
            func = func.__dict__["__wrapped__"]
        elif not isinstance(func, (type, FunctionType)):
            # An instance whose class defines __call__.
            func = getattr(type(func), "__call__", func)  # noqa: B004
    return Resources()


def thread_environment(cpu: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that hold numerical libraries to `cpu` threads, but for those that the user set.

    To be added to `environ`, the environment that the process would start with.
    """
    ours = environ.get(OURS, "").split()
    free = [name for name in THREAD_VARIABLES if name not in environ or name in ours]
    return {**dict.fromkeys(free, str(cpu)), OURS: " ".join(free)}


def gpu_environment(
    gpu: int | None, slot: int, environ: Mapping[str, str], devices: str = "/dev"
) -> dict[str, str]:
    """The variable that shows `gpu` of this machine's GPUs to the process in place `slot`.

    Places take turns: with four GPUs and two asked for, places 0, 1, 2 get GPUs 0-1, 2-3, 0-1.
    Nothing is set where none is asked for or there, nor over what the user set.
    """
    if not gpu or "CUDA_VISIBLE_DEVICES" in environ:
        return {}
    try:
        found = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir(devices))
    except OSError:
        return {}
    if not found:
        return {}
    # By position and not by the number of the device file: a container may have only /dev/nvidia3,
    # which CUDA calls 0.
    chosen = [(slot * gpu + i) % found for i in range(min(gpu, found))]
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen))}


def cpu_count(proc: str = "/proc", cgroup: str = "/sys/fs/cgroup") -> int:
    """How many CPUs this process may use: affinity and cgroup quota, not those of the host."""
    count = _schedulable()
    for quota in _quotas(proc, cgroup):
        count = min(count, quota)
    return max(count, 1)


def _schedulable() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13; heeds PYTHON_CPU_COUNT too
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(proc: str, cgroup: str) -> list[int]:
    """The CPU quotas of this process's control groups and all above them, rounded up."""
    quotas = []
    for line in _read(f"{proc}/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2; beside version 1 it is mounted in unified/
            roots = [cgroup, f"{cgroup}/unified"]
            quota_of = _quota_v2
        elif "cpu" in controllers.split(","):
            roots = [f"{cgroup}/{controllers}", f"{cgroup}/cpu"]
            quota_of = _quota_v1
        else:
            continue
        # In a container the path may be the host's, which is not there; its own group is then the
        # root. A limit holds for all groups below, so every folder on the way up counts.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for root in roots:
            for depth in range(len(parts), -1, -1):
                quota = quota_of("/".join([root, *parts[:depth]]))
                if quota is not None:
                    quotas.append(quota)
    return quotas


def _quota_v2(folder: str) -> int | None:
    fields = _read(f"{folder}/cpu.max").split()
    return _rounded(*fields) if len(fields) == 2 else None


def _quota_v1(folder: str) -> int | None:
    return _rounded(_read(f"{folder}/cpu.cfs_quota_us"), _read(f"{folder}/cpu.cfs_period_us"))


def _rounded(quota: str, period: str) -> int | None:
    try:
        time, every = int(quota), int(period)
    except ValueError:  # "max", or no such file
        return None
    return -(-time // every) if time > 0 and every > 0 else None


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
