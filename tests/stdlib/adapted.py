"""What stands in the place of helpers and tests of CPython that look inside multiprocessing.

A helper that looks inside is replaced, and the tests that use it are run. A test that looks inside
but tests what a user can see is written anew, so that it looks from the outside. What Fiber answers
otherwise, on purpose, is tested as Fiber answers it.
"""

from __future__ import annotations

import contextlib
import glob
import os
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.stdlib import suite

import fiber

HELPERS: dict[str, str] = {}
OUTSIDE: dict[str, str] = {}
OTHERWISE: dict[str, str] = {}
MENDED: dict[str, str] = {}
"""Why, by the qualified name of a helper, of a test that looks from the outside, of a test that
Fiber answers otherwise, of a test whose own fault newer versions of CPython have mended."""

_functions: dict[str, Callable[..., Any]] = {}

PATIENCE = 30.0


def adapt(
    reasons: dict[str, str], name: str, reason: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put a function in the place of `name`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        reasons[name] = reason
        _functions[name] = function
        return function

    return register


# Helpers


@adapt(HELPERS, "setUpModule", "also looks at the process objects that multiprocessing keeps")
def _set_up_module() -> None:
    fiber.set_forkserver_preload([])
    fiber.set_start_method("spawn", force=True)
    fiber.get_logger().setLevel(fiber.util.SUBWARNING)
    # What these register once, to be run at exit, would be news to the tests of finalizers.
    fiber.util.get_temp_dir()
    fiber.RLock()


@adapt(
    HELPERS, "tearDownModule", "looks at the process objects that multiprocessing keeps, and warns"
)
def _tear_down_module() -> None:
    pass


@adapt(HELPERS, "BaseMixin.setUpClass", "as setUpModule, for a class")
def _set_up_class(cls: type) -> None:
    pass


@adapt(HELPERS, "BaseMixin.tearDownClass", "as tearDownModule, for a class")
def _tear_down_class(cls: type) -> None:
    pass


@adapt(
    HELPERS, "_TestCondition.check_invariant", "reads the semaphores that a Condition is made of"
)
def _check_invariant(self: Any, condition: object) -> None:
    pass


@adapt(HELPERS, "_TestImportStar.get_module_names", "lists the files of multiprocessing")
def _get_module_names(self: Any) -> list[str]:
    folder = os.path.dirname(fiber.__file__)
    files = [Path(path).stem for path in glob.glob(os.path.join(glob.escape(folder), "*.py"))]
    public = [f"fiber.{name}" for name in files if not name.startswith("_")]
    # The test takes this one from the list.
    return [*public, "fiber", "fiber.popen_spawn_win32"]


# Tests of what a user can see, that look for it inside


def leave_note(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()


def pid_of_worker(_: int) -> int:
    return os.getpid()


@adapt(
    OUTSIDE,
    "WithProcessesTestPool.test_make_pool",
    "counts Pool._pool; here the workers are counted",
)
def _make_pool(self: Any) -> None:
    for wrong in (-1, 0):
        with self.assertRaises(ValueError):  # noqa: PT027 - no pytest in there
            self.Pool(wrong)
    with tempfile.TemporaryDirectory() as folder:
        pool = self.Pool(3, leave_note, (folder,))
        try:
            deadline = time.monotonic() + PATIENCE
            while len(os.listdir(folder)) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
        finally:
            pool.close()
            pool.join()
        assert len(os.listdir(folder)) == 3


@adapt(
    OUTSIDE,
    "_TestPool.test_resource_warning",
    "sets Pool._state; here a running pool is let go of",
)
def _resource_warning(self: Any) -> None:
    from test.support import gc_collect, warnings_helper

    if self.TYPE == "manager":
        self.skipTest("test not applicable to manager")
    pool = self.Pool(1)
    pool.apply(pid_of_worker, (0,))
    with warnings_helper.check_warnings(("unclosed running", ResourceWarning)):
        del pool
        gc_collect()


@adapt(
    OUTSIDE,
    "_TestPoolWorkerLifetime.test_pool_worker_lifetime",
    "reads Pool._pool and refills it; here the tasks tell who ran them",
)
def _pool_worker_lifetime(self: Any) -> None:
    pool = fiber.Pool(3, maxtasksperchild=10)
    results = [pool.apply_async(pid_of_worker, (i,)) for i in range(100)]
    tasks = Counter(result.get(PATIENCE) for result in results)
    assert sum(tasks.values()) == 100
    assert max(tasks.values()) <= 10
    pool.close()
    pool.join()


@adapt(
    OUTSIDE,
    "MiscTestCase.test_spawn_sys_executable_none_allows_import",
    "imports the module multiprocessing.spawn; here all of Fiber is imported",
)
def _import_without_executable(self: Any) -> None:
    from test.support import script_helper

    names = [f"fiber.{name}" for name in fiber._MODULES]
    program = suite.with_fiber(
        "import sys\nsys.executable = None\nimport multiprocessing\n"
        f"import importlib\nfor name in {names}: importlib.import_module(name)\n"
    )
    _, _, err = script_helper.assert_python_ok("-c", program)
    assert err == b""


@adapt(
    OUTSIDE,
    "TestPoolNotLeakOnFailure.test_release_unused_processes",
    "gives the pool a context whose processes are fakes; here real ones are started, until one "
    "cannot be",
)
def _release_unused_processes(self: Any) -> None:
    from unittest import mock

    from fiber.runtime.agency import Agency

    spawn, count = Agency.spawn, 0

    def fail_at_last(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError("Manually induced OSError")
        return spawn(*args, **kwargs)

    with mock.patch.object(Agency, "spawn", fail_at_last):
        with self.assertRaisesRegex(OSError, "Manually induced OSError"):  # noqa: PT027
            fiber.Pool(5)
        deadline = time.monotonic() + PATIENCE
        while fiber.active_children() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert count == 4
    assert fiber.active_children() == []


@adapt(
    OUTSIDE,
    "TestSimpleQueue.test_closed",
    "reads the two ends of the pipe that the queue is; here the closed queue is used",
)
def _closed_simple_queue(self: Any) -> None:
    queue = fiber.SimpleQueue()
    queue.close()
    for use in (queue.get, queue.empty, lambda: queue.put(1)):
        with self.assertRaises(OSError):  # noqa: PT027
            use()


def left_by_killed_program(code: str) -> str:
    """End a program that has a `block` of shared memory; return the errors that were printed.

    It is an error that its block stays.
    """
    program = suite.with_fiber(
        "import time\n"
        "import multiprocessing\n"
        "from multiprocessing import shared_memory\n"
        "block = shared_memory.SharedMemory(create=True, size=10)\n"
        f"{code}\n"
        "print(block.name, flush=True)\n"
        "time.sleep(100)\n"
    )
    command = [sys.executable, "-E", "-c", program]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        fiber.shared_memory.SharedMemory(name).close()
        process.terminate()
        _, errors = process.communicate(timeout=PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            fiber.shared_memory.SharedMemory(name).close()
        except FileNotFoundError:
            return errors
        time.sleep(0.01)
    return f"{name} is still there\n{errors}"


@adapt(
    OUTSIDE,
    "_TestSharedMemory.test_shared_memory_cleaned_after_process_termination",
    "also asks for the warning of multiprocessing's resource tracker; Fiber cleans up in silence",
)
def _cleaned_after_termination(self: Any) -> None:
    assert left_by_killed_program("") == ""


@adapt(
    OUTSIDE,
    "TestResourceTracker.test_resource_tracker",
    "reads the private names of semaphores; here a killed program has shared memory and locks",
)
def _resources_after_termination(self: Any) -> None:
    program = (
        "other = shared_memory.SharedMemory(create=True, size=10)\n"
        "other.unlink()\n"
        "lock, value = multiprocessing.Lock(), multiprocessing.Value('i')\n"
        "lock.acquire()"
    )
    assert left_by_killed_program(program) == ""


# Tests that Fiber answers otherwise, and not worse


@adapt(
    OTHERWISE,
    "TestNoForkBomb.test_noforkbomb",
    "a program without `if __name__ == '__main__'` runs, by whatever start method",
)
def _no_fork_bomb(self: Any) -> None:
    from test.support import script_helper

    source = suite.FILE.with_name("mp_fork_bomb.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bomb.py")
        path.write_text(suite.with_fiber(source), encoding="utf-8")
        _, out, err = script_helper.assert_python_ok(str(path), fiber.get_start_method())
    assert (out.rstrip(), err) == (b"123", b"")


@adapt(
    OTHERWISE,
    "TestStartMethod.test_mixed_startmethod",
    "a Queue of the context `fork` travels to processes of any context; multiprocessing refuses it",
)
def _mixed_start_method(self: Any) -> None:
    methods = fiber.get_all_start_methods()
    for queue_method in methods:
        for process_method in methods:
            queue = fiber.get_context(queue_method).Queue()
            process = fiber.get_context(process_method).Process(target=queue.put, args=(1,))
            process.start()
            assert queue.get(timeout=PATIENCE) == 1
            process.join()
            assert process.exitcode == 0


def double(x: int) -> int:
    return 2 * x


def numbers_and_an_error(count: int) -> Iterator[int]:
    yield from range(count)
    raise LookupError


@adapt(
    OTHERWISE,
    "WithProcessesTestPool.test_imap_handle_iterable_exception",
    "when the iterable raises, the results of all items before come first; multiprocessing loses "
    "those of the last chunk",
)
def _imap_of_iterable_that_raises(self: Any) -> None:
    for count in (0, 3, 7):
        for chunksize in (1, 2, 4):
            results = self.pool.imap(double, numbers_and_an_error(count), chunksize)
            assert [next(results) for _ in range(count)] == [2 * x for x in range(count)]
            with self.assertRaises(LookupError):  # noqa: PT027
                next(results)


class Unpicklable:
    def __reduce__(self) -> Any:
        raise AttributeError


@adapt(
    OTHERWISE,
    "_TestSharedMemory.test_shared_memory_tracking",
    "a block stays when a process ends that only attached to it; multiprocessing removes it, with "
    "a warning",
)
def _tracking(self: Any) -> None:
    from test.support import script_helper

    program = suite.with_fiber(
        "import sys\n"
        "from multiprocessing import shared_memory\n"
        "shared_memory.SharedMemory(sys.argv[1], track=True).close()\n"
    )
    block = fiber.shared_memory.SharedMemory(create=True, size=10)
    try:
        _, _, err = script_helper.assert_python_ok("-c", program, block.name)
        fiber.shared_memory.SharedMemory(block.name).close()
    finally:
        block.close()
        block.unlink()
    assert err == b""


def unpicklable() -> Unpicklable:
    return Unpicklable()


@adapt(
    OTHERWISE,
    "_TestPoolWorkerErrors.test_unpickleable_result",
    "a lambda can be a result; here it is an object that cannot be pickled",
)
def _unpicklable_result(self: Any) -> None:
    from fiber.pool import MaybeEncodingError

    pool = fiber.Pool(2)
    for _ in range(20):  # which is more than there are workers to lose
        told: list[Any] = []
        result = pool.apply_async(unpicklable, error_callback=told.append)
        with self.assertRaises(MaybeEncodingError):  # noqa: PT027
            result.get(PATIENCE)
        (error,) = told
        assert isinstance(error, MaybeEncodingError)
        assert error.exc is not None
        assert error.value is not None
    assert pool.apply(lambda: lambda: 42)() == 42
    pool.close()
    pool.join()


@adapt(
    OTHERWISE,
    "WithProcessesTestQueue.test_queue_feeder_donot_stop_onexc",
    "what cannot be pickled raises in `put`; multiprocessing only prints it and goes on",
)
def _put_of_what_cannot_be_pickled(self: Any) -> None:
    for maxsize in (0, 1):
        queue = self.Queue(maxsize)
        with self.assertRaises(fiber.SerializationError):  # noqa: PT027
            queue.put(Unpicklable())
        queue.put(True, timeout=PATIENCE)
        assert queue.qsize() == 1
        assert queue.get(timeout=PATIENCE) is True
        assert queue.empty()
        queue.close()
        queue.join_thread()


# Tests that were wrong


@adapt(
    MENDED,
    "WithThreadsTestPool.test_terminate",
    "a thread cannot be ended, so 3.11's test hangs, with multiprocessing too, if one has begun "
    "its sleep of five minutes; this is the test of later versions, where it sleeps for a second",
)
def _terminate_threads(self: Any) -> None:
    pool = self.Pool(3)
    pool.map_async(time.sleep, [1] * 10_000, chunksize=1)
    time.sleep(0.2)
    pool.terminate()
    pool.join()


def put_in_place(namespace: dict[str, Any]) -> None:
    """Replace what is adapted in a namespace of `suite.load`."""
    for name, function in _functions.items():
        owner, _, attribute = name.rpartition(".")
        if not owner:
            namespace[attribute] = function
            continue
        with contextlib.suppress(KeyError, AttributeError):  # other versions have other tests
            test_class = namespace[owner]
            is_method = isinstance(getattr(test_class, attribute), types.MethodType)
            setattr(test_class, attribute, classmethod(function) if is_method else function)
