"""Configuration: typed keys, where their values come from, and errors that say so.

    defaults < .fiberconfig < FIBER_<KEY> in the environment < code: init(key=v), config.key = v
    └─────────── read once, at first use ──────────────────┘   └─ at any time, also before ────┘

The keys stand in one table, the class `Config`. A value from code is kept apart from those that
were read, so that `reset` need only forget it. Whatever its source, a value passes through the
parser of its key (see `parsers`) at once; one that does not fit raises `ConfigError`. A child
process reads neither file nor environment: it adopts the values of its parent.

A leaf: every process of a session imports this module, so it stays small and quick to import.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Generic, NamedTuple, NoReturn, TypeVar, overload

from fiber import parsers
from fiber.errors import ConfigError
from fiber.parsers import LEVELS, MEMORY_FORMS, parse_memory

__all__ = ["MEMORY_FORMS", "Config", "config", "parse_memory"]

T = TypeVar("T")

FILE: Final = ".fiberconfig"
PREFIX: Final = "FIBER_"
# The runtime's own variables between parent and child, and those of Fiber's tests; never a key.
NO_KEYS: Final = ("FIBER_INTERNAL_", "FIBER_TEST_")
# The source of what a child process was told.
PARENT: Final = "the parent process"

# Keys of Fiber 0.2 that mean nothing any more, and why.
GONE: Final = {
    "default_image": "it is the same as image now; set image",
    "ipc_active": "Fiber knows itself which side opens a connection; remove it",
    "ipc_admin_master_port": "no fixed port is needed, the system picks a free one; remove it",
    "ipc_admin_worker_port": "workers listen on no port; remove it",
    "merge_output": "what a process prints always reaches your terminal; remove it",
    "use_bash": "it never had an effect; remove it",
    "use_push_queue": "there is one kind of queue now; remove it",
}


class Key(Generic[T]):
    """One key: how its value is read, its default, what is valid and what it is for.

    A key whose default is None also takes None, in text the empty string. A list or a dict is set
    as a whole: whoever reads it gets a copy.
    """

    __slots__ = ("default", "doc", "name", "parse", "valid")

    def __init__(self, parse: Callable[[object], T], default: T, valid: str, doc: str) -> None:
        self.parse = parse
        self.default = default
        self.valid = valid if default is not None else f"{valid}, or None"
        self.doc = doc
        self.name = ""

    def __set_name__(self, owner: type[Config], name: str) -> None:
        self.name = name

    @overload
    def __get__(self, obj: None, owner: type[Config]) -> Key[T]: ...
    @overload
    def __get__(self, obj: Config, owner: type[Config]) -> T: ...
    def __get__(self, obj: Config | None, owner: type[Config]) -> Key[T] | T:
        if obj is None:
            return self
        value: T = _copy(obj._lookup(self.name).value)
        return value

    def __set__(self, obj: Config, value: object) -> None:
        obj.init(**{self.name: value})

    def setting(self, value: object, source: str) -> Setting:
        """`value` checked and typed; `source` is where it came from."""
        if self.default is None and (value is None or value == ""):
            return Setting(None, source)
        try:
            return Setting(self.parse(value), source)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(
                f"The config key {self.name!r} cannot be {value!r} (from {source}): "
                f"it must be {self.valid}."
            ) from None


class Setting(NamedTuple):
    """A value and where it came from."""

    value: Any
    source: str


def _copy(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copy(entry) for key, entry in value.items()}
    return [_copy(entry) for entry in value] if type(value) is list else value


class Config:
    """The configuration of this process; read and set the keys as attributes.

    `fiber.config` is the one that Fiber uses. Names are those of `FIBER_<KEY>` in lower case.
    """

    backend = Key[str | None](
        parsers.text,
        None,
        "the name of a backend, such as 'local'",
        "Backend that starts processes.",
    )
    default_backend = Key[str](
        parsers.text,
        "local",
        "the name of a backend",
        "Backend if none is set and none is detected.",
    )
    image = Key[str | None](
        parsers.text,
        None,
        "the name of a container image",
        "Image that containers are started from.",
    )
    debug = Key[bool](
        parsers.boolean,
        False,
        "true or false (or yes, no, on, off, 1, 0)",
        "Help with debugging Fiber.",
    )
    log_level = Key[int](
        parsers.level,
        LEVELS["warning"],
        f"one of {', '.join(LEVELS)}, or a whole number of at least 0",
        "Least level that Fiber logs.",
    )
    log_file = Key[str | None](
        parsers.path,
        None,
        "the path of a file, or 'stdout'",
        "Where Fiber's log goes; None: stderr.",
    )
    cpu_per_job = Key[int](
        parsers.integer(1),
        1,
        "a whole number of at least 1",
        "CPUs that each process may use; sets the thread counts of numerical libraries.",
    )
    mem_per_job = Key[int | None](
        parse_memory, None, MEMORY_FORMS, "Memory that each process may use, in MB."
    )
    retries = Key[int](
        parsers.integer(0),
        2,
        "a whole number of at least 0",
        "How often a pool's task is run again after its worker died.",
    )
    imap_buffer = Key[int](
        parsers.integer(1),
        4,
        "a whole number of at least 1",
        "Items per worker that imap reads ahead of its results.",
    )
    imap_buffer_mb = Key[int](
        parsers.integer(1),
        64,
        "a whole number of at least 1",
        "Memory that the items read ahead by imap may take, in MB.",
    )
    shared_memory_mb = Key[int | None](
        parsers.integer(0),
        None,
        "a whole number of at least 0",
        "Shared memory that each process may lend to others, in MB; None: half of what is free.",
    )
    workers_per_job = Key[int](
        parsers.integer(1),
        1,
        "a whole number of at least 1",
        "How many workers of a pool share a container, pod or Slurm job.",
    )
    start_timeout = Key[float](
        parsers.seconds,
        60.0,
        "a number of seconds above 0",
        "How long a process may take to start, from when its job runs.",
    )
    queue_timeout = Key[float | None](
        parsers.seconds,
        None,
        "a number of seconds above 0",
        "How long a job may wait in the cluster's queue before it fails.",
    )
    address = Key[str | None](
        parsers.host_and_port,
        None,
        "HOST or HOST:PORT, without a scheme",
        "Where jobs elsewhere reach the master, instead of what the backend finds.",
    )

    docker_network = Key[str | None](
        parsers.text, None, "the name of a network", "Network that containers are in."
    )
    docker_mounts = Key[list[str]](
        parsers.mounts,
        [],
        "a list of 'SOURCE:/TARGET' or 'SOURCE:/TARGET:ro', in text with commas between them",
        "What containers see of this machine's files and of Docker's volumes.",
    )
    docker_environment = Key[dict[str, str]](
        parsers.environment,
        {},
        "a dict of names and values, or text such as 'A=1,B=2' or a JSON object",
        "Further variables of containers.",
    )
    docker_workdir = Key[str | None](
        parsers.container_path,
        None,
        "an absolute path in the container",
        "Working folder in containers; None: that of the image.",
    )
    docker_user = Key[str | None](
        parsers.text_or_number,
        None,
        "a user's name or number, or USER:GROUP",
        "User that containers run as; None: that of the image.",
    )
    docker_options = Key[dict[str, Any]](
        parsers.options,
        {},
        "a dict of text, numbers, truth values, lists and dicts, or a JSON object",
        "Further arguments of containers.create of Docker's SDK.",
    )

    kubernetes_namespace = Key[str | None](
        parsers.text,
        None,
        "the name of a namespace",
        "Namespace of pods; None: the master's own, or that of the kubeconfig.",
    )
    kubernetes_context = Key[str | None](
        parsers.text, None, "the name of a context", "Context of the kubeconfig; None: its own."
    )
    kubernetes_service_account = Key[str | None](
        parsers.text,
        None,
        "the name of a service account",
        "Service account of pods; None: that of the master's pod, if it is in one.",
    )
    kubernetes_gpu_resource = Key[str](
        parsers.text,
        "nvidia.com/gpu",
        "the name of a resource, such as 'nvidia.com/gpu'",
        "What a GPU is called in the cluster.",
    )
    kubernetes_template = Key[dict[str, Any] | str | None](
        parsers.template,
        None,
        "a pod as a dict of plain data or as a JSON object, or the path of a YAML file",
        "Pod that all pods are made from.",
    )
    kubernetes_relay = Key[str](
        parsers.choice("auto", "always", "never"),
        "auto",
        "'auto', 'always' or 'never'",
        "Whether pods reach the master through the API server; auto: if there is no other way.",
    )
    kubernetes_pull_policy = Key[str | None](
        parsers.choice("Always", "IfNotPresent", "Never"),
        None,
        "'Always', 'IfNotPresent' or 'Never'",
        "When nodes fetch the image; None: as the cluster does it.",
    )

    slurm_mode = Key[str](
        parsers.choice("auto", "step", "batch", "pool"),
        "auto",
        "'auto', 'step', 'batch' or 'pool'",
        "What a process is in Slurm: a step of this allocation, a batch job, or a task of one "
        "allocation for all; auto: a step in an allocation, else a batch job.",
    )
    slurm_partition = Key[str | None](
        parsers.text, None, "the name of a partition", "Partition of jobs."
    )
    slurm_account = Key[str | None](
        parsers.text, None, "the name of an account", "Account that jobs are charged to."
    )
    slurm_qos = Key[str | None](parsers.text, None, "the name of a QOS", "QOS of jobs.")
    slurm_time = Key[str | None](
        parsers.text_or_number,
        None,
        "minutes, or a time as Slurm writes it, such as '1:30:00' or '2-00'",
        "Time limit of jobs.",
    )
    slurm_constraint = Key[str | None](
        parsers.text, None, "features of nodes, as Slurm writes them", "What nodes must have."
    )
    slurm_options = Key[list[str]](
        parsers.arguments,
        [],
        "options of sbatch and srun, as text or as a list",
        "Further options of jobs, such as '--reservation=mine --exclusive'.",
    )
    slurm_python = Key[str | None](
        parsers.text,
        None,
        "a command",
        "What runs Python on nodes; None: the interpreter that runs the program.",
    )
    slurm_folder = Key[str](
        parsers.path,
        "~/.fiber",
        "the path of a folder",
        "Folder that this machine and the nodes share: what jobs have to know passes through it.",
    )
    slurm_log_folder = Key[str | None](
        parsers.path,
        None,
        "the path of a folder",
        "Where all logs of jobs are kept; None: those of jobs that failed, in the working folder.",
    )

    __slots__ = ("_adopted", "_code", "_read")

    # What code set; what was read or adopted (None: not yet); which of the two it was. Each change
    # puts a new dict in the place of the old one, so that a thread that reads needs no lock.
    _code: dict[str, Setting]
    _read: dict[str, Setting] | None
    _adopted: bool

    def __init__(self) -> None:
        self._code = {}
        self._read = None
        self._adopted = False

    def init(self, **values: object) -> None:
        """Set keys from code; all of them or, if one is unknown or does not fit, none."""
        self._code = {**self._code, **_settings(values, lambda _: "code")}

    def reset(self) -> None:
        """Forget what code set: back to environment and file, which are read anew at the next use.

        In a child process: back to the values of its parent.
        """
        self._code = {}
        if not self._adopted:
            self._read = None

    def adopt(self, values: Mapping[str, object]) -> None:
        """Take a parent's `as_dict()` instead of environment and file. For a child process."""
        self._read = _settings(values, lambda _: PARENT)
        self._adopted = True
        self._code = {}

    def as_dict(self) -> dict[str, Any]:
        """All keys with their values: plain data, for `adopt` in a child."""
        return {name: _copy(self._lookup(name).value) for name in KEYS}

    def source(self, key: str) -> str:
        """Where the value of `key` comes from, in words."""
        if key not in KEYS:
            _unknown(key, "code")
        return self._lookup(key).source

    def _lookup(self, name: str) -> Setting:
        setting = self._code.get(name)
        if setting is None:
            if self._read is None:
                self._read = {**_file_settings(), **_environment_settings(os.environ)}
            setting = self._read.get(name)
        return setting or Setting(KEYS[name].default, "default")

    def __setattr__(self, name: str, value: object) -> None:
        if name not in KEYS and name not in Config.__slots__:
            _unknown(name, "code")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> NoReturn:
        # Only for what is not there. An AttributeError, because hasattr, copy and others ask too.
        raise AttributeError(_no_such_key(name, "code"), name=name, obj=self)

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"A config key cannot be deleted; set {name!r}, or call reset().")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *KEYS})

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{k}={v!r}' for k, v in self.as_dict().items())})"


KEYS: Final[dict[str, Key[Any]]] = {k: v for k, v in vars(Config).items() if isinstance(v, Key)}


def _settings(values: Mapping[str, object], source: Callable[[str], str]) -> dict[str, Setting]:
    settings = {}
    for name, value in values.items():
        if name not in KEYS:
            _unknown(name, source(name))
        settings[name] = KEYS[name].setting(value, source(name))
    return settings


def _environment_settings(environ: Mapping[str, str]) -> dict[str, Setting]:
    values = {}
    variables = {}
    for variable, value in environ.items():
        if not variable.startswith(PREFIX) or variable.startswith(NO_KEYS):
            continue
        # Fiber_Debug or FIBER_debug is no spelling of FIBER_DEBUG: keep it, to be refused.
        name = variable[len(PREFIX) :]
        name = name.lower() if name.isupper() else name
        if name not in KEYS and name not in GONE and _from_kubernetes(variable):
            continue
        values[name] = value
        variables[name] = f"{variable} in the environment"
    return _settings(values, variables.__getitem__)


def _from_kubernetes(variable: str) -> bool:
    # Kubernetes tells every pod of each service in its namespace by such variables: a service that
    # somebody named "fiber" or "fiber-dashboard" must not end every program there.
    import re

    told = r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
    return re.search(told + "$", variable) is not None


def _file_settings() -> dict[str, Setting]:
    path = os.path.abspath(FILE)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {path} cannot be read: {error}.") from error
    values: dict[str, str] = {}
    lines: dict[str, str] = {}
    for number, name, value in _entries(text, path):
        if name in values:
            raise ConfigError(
                f"The config key {name!r} stands twice in {path}, in {lines[name]} and "
                f"line {number}: remove one."
            )
        values[name] = value
        lines[name] = f"line {number}"
    return _settings(values, lambda name: f"{path}, {lines[name]}")


def _entries(text: str, path: str) -> Iterator[tuple[int, str, str]]:
    # By hand and not by configparser, which knows no line numbers, wants a section, and takes 5 ms.
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line[0] in "#;" or line.lower() == "[default]":
            continue
        if line[0] == "[":
            raise ConfigError(
                f"The section {line} (from {path}, line {number}) means nothing to Fiber: "
                f"write the keys without a section, or under [default]."
            )
        # Whichever comes first; the other may be in the value.
        separator = min("=:", key=lambda sign: (line + sign).index(sign))
        name, found, value = line.partition(separator)
        if not found:
            raise ConfigError(f"{path}, line {number}, is {line!r}: write it as 'key = value'.")
        yield number, name.strip().lower(), value.strip()


def _unknown(name: str, source: str) -> NoReturn:
    raise ConfigError(_no_such_key(name, source))


def _no_such_key(name: str, source: str) -> str:
    if name in GONE:
        return f"The config key {name!r} (from {source}) is gone: {GONE[name]}."
    import difflib

    near = difflib.get_close_matches(name.lower(), KEYS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(KEYS)}."
    return f"There is no config key {name!r} (from {source}): {hint}"


config: Final = Config()
