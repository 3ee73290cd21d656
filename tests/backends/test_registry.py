"""Backends by name: which is chosen, those of other packages, what is said when one fails."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fiber
from fiber.backends import registry
from fiber.backends.kubernetes import detect
from fiber.backends.local import LocalBackend
from fiber.errors import ConfigError, StartError

Install = Callable[..., None]
RunScript = Callable[..., "subprocess.CompletedProcess[str]"]

NIMBUS = """
from fiber.backends.local import LocalBackend
from fiber.errors import StartError

class Backend(LocalBackend):
    name = "nimbus"
    closed = 0

    def close(self):
        Backend.closed += 1

def broken():
    raise OSError("no sky")

def away():
    raise StartError("the sky does not answer; look up")

def half():
    return object()
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    registry.reset()
    yield
    registry.reset()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """`install(nimbus="Backend")` installs a package with such entry points."""

    def install(**entries: str) -> None:
        site = tmp_path / "site"
        info = site / "fiber_nimbus-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "fiber_nimbus.py").write_text(NIMBUS)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fiber-nimbus\nVersion: 1.0\n")
        lines = [f"{name} = fiber_nimbus:{value}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[fiber.backends]", *lines, ""]))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, "fiber_nimbus", raising=False)

    return install


@pytest.fixture
def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process looks as if it were in a pod."""
    (tmp_path / "token").write_text("x")
    monkeypatch.setattr(detect, "FOLDER", str(tmp_path))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")


@pytest.fixture
def no_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


# Which one.


def test_configuration_comes_before_detection(no_pod: None) -> None:
    assert registry.chosen() == "local"
    fiber.config.default_backend = "docker"
    assert registry.chosen() == "docker"
    fiber.config.backend = "kubernetes"
    assert registry.chosen() == "kubernetes"


def test_a_pod_is_detected(pod: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.in_pod()
    assert registry.chosen() == "kubernetes"
    monkeypatch.setenv("FIBER_BACKEND", "local")
    fiber.reset()
    assert registry.chosen() == "local"


def test_a_pod_without_an_account_is_none(pod: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "FOLDER", "/nowhere")
    assert not registry.in_pod()
    assert registry.chosen() == "local"


def test_an_account_outside_a_pod_is_none(pod: None, no_pod: None) -> None:
    assert registry.chosen() == "local"


@pytest.mark.parametrize("folder", [False, True], ids=["nothing", "a folder of that name"])
def test_in_a_pod_without_the_extra_two_cures_are_named(
    folder: bool, pod: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A path on which there is no kubernetes; a folder so called is no package.
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "kubernetes", raising=False)
    if folder:
        (tmp_path / "kubernetes").mkdir()
    with pytest.raises(ConfigError) as caught:
        registry.chosen()
    message = str(caught.value)
    assert 'pip install "fiber[kubernetes]"' in message
    assert "FIBER_BACKEND=local" in message
    fiber.config.backend = "local"
    assert registry.chosen() == "local"


def test_an_allocation_is_detected(
    no_pod: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert registry.chosen() == "local"  # a container in an allocation, without Slurm's commands
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    assert registry.chosen() == "slurm"
    fiber.config.backend = "local"
    assert registry.chosen() == "local"


# What is said.


def test_an_unknown_name_is_told_with_what_there_is(install: Install) -> None:
    install(nimbus="Backend")
    with pytest.raises(ConfigError) as caught:
        registry.check("cumulus")
    assert str(caught.value) == (
        "There is no backend 'cumulus' (from code): there are local, docker, kubernetes, slurm, "
        "nimbus."
    )
    with pytest.raises(ConfigError, match="did you mean 'nimbus'"):
        registry.check("Nimbos")
    with pytest.raises(ConfigError, match="did you mean 'docker'"):
        fiber.get_context("dokcer")


@pytest.mark.parametrize("key", ["backend", "default_backend"])
def test_an_unknown_name_is_told_with_where_it_stands(
    key: str, no_pod: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"FIBER_{key.upper()}"
    monkeypatch.setenv(variable, "kubernets")
    fiber.reset()
    with pytest.raises(ConfigError, match=f"{variable} in the environment.*mean 'kubernetes'"):
        registry.chosen()


@pytest.mark.parametrize("name", ["docker", "kubernetes"])
def test_a_backend_without_its_extra_says_what_to_install(name: str, run_script: RunScript) -> None:
    done = run_script(
        f"""
import sys
sys.modules[{name!r}] = None  # as if it were not installed
import fiber
from fiber.backends import registry
context = fiber.get_context({name!r})
try:
    registry.get({name!r})
except fiber.ConfigError as error:
    print(error)
""",
        env={"KUBECONFIG": "/nowhere"},
    )
    line = done.stdout.removesuffix("\n")
    assert line.startswith(f"The backend {name!r} needs the package {name!r}, "), done.stderr
    assert line.endswith(f'which is not installed: run pip install "fiber[{name}]".')
    assert "\n" not in line


# Those of other packages.


def test_a_backend_of_another_package(install: Install) -> None:
    install(nimbus="Backend")
    backend = registry.get("nimbus")
    assert backend.name == "nimbus"
    assert registry.get("nimbus") is backend
    assert type(backend).__module__ == "fiber_nimbus"
    assert registry.get("local") is not backend


def test_the_names_of_fibers_own_are_taken(install: Install) -> None:
    install(local="Backend")
    assert type(registry.get("local")) is LocalBackend
    assert registry.names().count("local") == 1


@pytest.mark.parametrize(
    ("value", "message", "cause"),
    [
        ("missing", "AttributeError: .*'missing'", AttributeError),
        ("broken", "OSError: no sky", OSError),
        ("half", "is no backend: it lacks addresses, close, ", type(None)),
    ],
)
def test_a_backend_of_another_package_that_fails(
    value: str, message: str, cause: type, install: Install
) -> None:
    install(nimbus=value)
    with pytest.raises(ConfigError, match=f"'nimbus' of fiber_nimbus:{value}.*{message}") as caught:
        registry.get("nimbus")
    assert isinstance(caught.value.__cause__, cause)
    assert "'fiber-nimbus'" in str(caught.value)


def test_what_a_backend_says_itself_is_left_as_it_is(install: Install) -> None:
    install(nimbus="away")
    with pytest.raises(StartError, match="^the sky does not answer; look up$"):
        registry.get("nimbus")


def test_reset_closes_what_was_made(install: Install) -> None:
    install(nimbus="Backend")
    backend = registry.get("nimbus")
    registry.reset()
    assert type(backend).closed == 1  # type: ignore[attr-defined]
    assert registry.get("nimbus") is not backend


def test_one_backend_is_made_for_all_threads(install: Install) -> None:
    from concurrent.futures import ThreadPoolExecutor

    install(nimbus="Backend")
    with ThreadPoolExecutor(8) as threads:
        assert len({id(b) for b in threads.map(registry.get, ["nimbus"] * 64)}) == 1


def test_a_fork_makes_backends_of_its_own() -> None:
    backend = registry.get("local")
    pid = os.fork()
    if pid == 0:
        os._exit(registry.get("local") is backend)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_fibers_own_names_need_no_metadata(run_script: RunScript) -> None:
    done = run_script(
        """
import sys
import fiber
from fiber.backends import registry
before = set(sys.modules)
fiber.get_context("docker"), fiber.get_context("kubernetes"), fiber.get_context("local")
registry.get(registry.chosen())
new = set(sys.modules) - before
print(sorted(name for name in new if name.startswith(("docker", "kubernetes", "importlib.meta"))))
"""
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_child_knows_its_parents_backend_by_name_alone(run_script: RunScript) -> None:
    done = run_script(
        """
import fiber
from fiber.backends import registry
fiber.config.adopt({"backend": "nimbus"})
print(registry.chosen(), fiber.get_context("nimbus").backend)
for name in ("nimbus", "other"):
    try:
        registry.get(name)
    except fiber.ConfigError as error:
        print(error)
"""
    )
    assert done.stdout.splitlines() == [
        "nimbus nimbus",
        (
            "The backend 'nimbus', which this process was started by, is not installed here: only "
            "its parent can use it."
        ),
        "There is no backend 'other' (from code): there are local, docker, kubernetes, slurm.",
    ], done.stderr


# Contexts.


@pytest.mark.parametrize("name", ["local", "docker", "kubernetes", "nimbus", "my.other-cloud"])
def test_there_is_one_context_for_each_backend(name: str, install: Install) -> None:
    install(**{"nimbus": "Backend", "my.other-cloud": "Backend"})
    context = fiber.get_context(name)
    assert fiber.get_context(name) is context
    assert context.get_context() is context
    assert pickle.loads(pickle.dumps(context)) is context
    assert pickle.loads(pickle.dumps(context.Process)) is context.Process
    assert (context.backend, context.get_start_method()) == (name, name)
    assert issubclass(context.Process, fiber.Process)
    assert context.Process.__name__ == f"{name.capitalize()}Process"
    others = {fiber.get_context(other).Process for other in ("spawn", "fork", "forkserver")}
    assert context.Process not in others


def test_what_was_pickled_is_read_where_the_backend_is_not_installed(
    install: Install, run_script: RunScript
) -> None:
    install(nimbus="Backend")
    context = fiber.get_context("nimbus")
    data = pickle.dumps((context, context.Process))
    done = run_script(
        f"""
import pickle
context, process = pickle.loads({data!r})
print(context.backend, process is context.Process, process.__name__)
"""
    )
    assert done.stdout == "nimbus True NimbusProcess\n", done.stderr


def test_processes_of_two_backends_side_by_side(install: Install, no_pod: None) -> None:
    install(nimbus="Backend")
    fiber.config.backend = "docker"  # which contexts of a name have nothing to do with
    queue = fiber.get_context("local").SimpleQueue()
    for name in ("local", "nimbus"):
        process = fiber.get_context(name).Process(target=queue.put, args=(name,))
        process.start()
        process.join(30)
        assert process.exitcode == 0
    assert {queue.get(), queue.get()} == {"local", "nimbus"}


def test_a_pool_of_a_backend_of_another_package(install: Install) -> None:
    install(nimbus="Backend")
    with fiber.get_context("nimbus").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]


@pytest.mark.parametrize("name", ["local", "docker", "kubernetes", "nimbus"])
def test_a_backend_as_start_method(name: str, install: Install, run_script: RunScript) -> None:
    install(nimbus="Backend")
    done = run_script(
        f"""
import fiber
fiber.set_start_method({name!r})
print(fiber.get_start_method(), fiber.config.backend, fiber.get_context().backend)
""",
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == f"{name} {name} {name}\n", done.stderr
