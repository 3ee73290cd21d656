"""At the worker: imports the project's modules from the master.

    import name ─► Finder: is it the project's? ─► fetch ─► Client ─► MODULE ─► master
                     │                               └─ once for each name ─┘
                     ├─ the image has the very same file: that one
                     └─ else Loader: what came over the wire

Names that are none of the project's are not asked for. Modules keep the file names that they have
at home, so tracebacks read as there; their lines come from the loader.
"""

from __future__ import annotations

import importlib.util
import linecache
import marshal
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, ModuleType

from fiber.code.protocol import MODULE, REFUSED, Module, unpack
from fiber.errors import AuthenticationError
from fiber.wire.channel import Channel

__all__ = ["Client", "Finder"]

_PATIENCE = 60.0  # seconds for an answer: the master may be busy, but it may also be cut off


class Finder:
    """A finder for `sys.meta_path`, to be put first.

    Args:
        tops: the top-level names that may be the project's, see `Project.tops`.
        fetch: returns the module of a name, None if it is none of the project's. From any thread.
    """

    def __init__(self, tops: Iterable[str], fetch: Callable[[str], Module | None]) -> None:
        self.tops = frozenset(tops)
        self._fetch = fetch
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """Return what the master has by that name; it is asked once."""
        try:
            return self._modules[name]
        except KeyError:
            module = self._modules[name] = self._fetch(name)
            return module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Say how to import `name`, None if it is none of the project's."""
        if name.partition(".")[0] not in self.tops:
            return None
        module = self.module(name)
        if module is None:
            return None
        there = PathFinder.find_spec(name, path)
        if module.extension:
            if there is None:
                raise ImportError(
                    f"{name} is a compiled extension of the project ({module.file}): such cannot "
                    "be sent, so the image must have it",
                    name=name,
                    path=module.file,
                )
            return there
        if module.file is None:
            return _namespace(module, there)
        if there is not None and _same(module, there):
            return there  # so that the files beside it are found as well
        spec = ModuleSpec(name, Loader(module), origin=module.file)  # type: ignore[arg-type]
        spec.has_location = True
        if module.path is not None:
            spec.submodule_search_locations = list(module.path)
        return spec


def _namespace(module: Module, there: ModuleSpec | None) -> ModuleSpec:
    """Return a namespace package that has the master's portions and those of the image."""
    spec = ModuleSpec(module.name, None, is_package=True)
    portions = list(module.path or ())
    if there is not None and there.loader is None:
        portions += there.submodule_search_locations or ()
    spec.submodule_search_locations = portions
    return spec


def _same(module: Module, there: ModuleSpec) -> bool:
    """Whether the image has the same file."""
    is_package = there.submodule_search_locations is not None
    if not there.has_location or not there.origin or is_package != (module.path is not None):
        return False
    try:
        with open(there.origin, "rb") as file:
            return file.read() == module.source
    except OSError:
        return False


class Loader:
    """Executes a module that came over the wire."""

    def __init__(self, module: Module) -> None:
        assert module.file is not None
        self._module = module
        self.path = module.file

    def create_module(self, spec: ModuleSpec) -> None:
        """Have it made as usual."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute it."""
        if os.path.exists(self.path):  # the image has another by that name: show the lines of ours
            source = self.get_source(self._module.name) or ""
            lines = source.splitlines(keepends=True)
            linecache.cache[self.path] = len(source), None, lines, self.path
        exec(self.get_code(self._module.name), module.__dict__)

    def is_package(self, name: str) -> bool:
        """As in importlib.abc.InspectLoader."""
        return self._module.path is not None

    def get_filename(self, name: str) -> str:
        """As in importlib.abc.ExecutionLoader."""
        return self.path

    def get_source(self, name: str) -> str | None:
        """As in importlib.abc.InspectLoader."""
        source = self._module.source
        return None if source is None else importlib.util.decode_source(source)

    def get_code(self, name: str) -> CodeType:
        """As in importlib.abc.InspectLoader."""
        module = self._module
        if module.code is not None:
            code: CodeType = marshal.loads(module.code)
            return code
        assert module.source is not None
        return compile(module.source, self.path, "exec", dont_inherit=True)


class Client:
    """Asks the master for modules, over one connection for all threads.

    A forked child opens its own when it first needs one.

    Args:
        connect: opens a connection for questions of code, blocking.
        channel: one that is open already.
    """

    def __init__(self, connect: Callable[[], Channel], channel: Channel | None = None) -> None:
        self._connect = connect
        self._channel = channel
        self._lock = threading.Lock()
        self._asking = 0  # the thread that does
        ref = weakref.ref(self)

        def forked() -> None:
            client = ref()
            if client is not None:
                client._forked()

        os.register_at_fork(after_in_child=forked)

    def module(self, name: str) -> Module | None:
        """Return the project's module `name`, None if there is none: `fetch` of a Finder.

        Raises:
            ImportError: the master cannot be asked.
        """
        try:
            kind, body = self.ask(MODULE, importlib.util.MAGIC_NUMBER + name.encode())
        except (OSError, EOFError, AuthenticationError) as error:
            reason = str(error) or "it closed the connection"
            raise ImportError(
                f"the project's module {name} cannot be fetched from the master: {reason}",
                name=name,
            ) from error
        if kind == REFUSED:
            raise ImportError(
                f"the master could not send the project's module {name}: {body.decode()}", name=name
            )
        return unpack(body)

    def ask(self, kind: int, body: bytes) -> tuple[int, bytes]:
        """Ask a question of any kind and return the answer's kind and body.

        Raises:
            OSError, EOFError: the master cannot be asked.
        """
        me = threading.get_ident()
        if self._asking == me:
            # A signal handler, or a finalizer, in the midst of our own question.
            channel = self._connect()
            try:
                return _exchange(channel, kind, body)
            finally:
                channel.close()
        with self._lock:
            self._asking = me
            try:
                return self._ask(kind, body)
            finally:
                self._asking = 0

    def _ask(self, kind: int, body: bytes) -> tuple[int, bytes]:
        for channel in (self._channel, None):
            if channel is None:
                channel = self._channel = self._connect()
                fresh = True
            else:
                fresh = False
            try:
                return _exchange(channel, kind, body)
            except BaseException as error:
                # What is still to come on it belongs to a question that nobody asks any more.
                self._channel = None
                channel.close()
                if fresh or not isinstance(error, (OSError, EOFError)):
                    raise
        raise AssertionError

    def close(self) -> None:
        """Close the connection; another question opens a new one."""
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _forked(self) -> None:
        """In the child: the connection is the parent's, and so may be who holds the lock."""
        self._lock = threading.Lock()
        self._asking = 0
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()


def _exchange(channel: Channel, kind: int, body: bytes) -> tuple[int, bytes]:
    channel.sock.settimeout(_PATIENCE)
    channel.send(kind, body)
    while True:
        for frame in channel.read():
            return frame.kind, bytes(frame.body)
