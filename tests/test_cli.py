"""The command `fiber`, as a shell runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fiber

Command = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`command(*arguments, env={})` runs `python -m fiber` in an empty folder."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fiber", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100", **(env or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_the_version(command: Command) -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"fiber {fiber.__version__}\n")


def test_the_installed_command_is_the_same() -> None:
    script = Path(sys.executable).with_name("fiber")
    done = subprocess.run(
        [script, "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"fiber {fiber.__version__}\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["config", "kubernetes", "FIBER_BACKEND"]),
        (["config"], ["where that comes from"]),
        (["kubernetes"], ["manifest"]),
        (["kubernetes", "manifest"], ["--namespace", "kubectl apply -f -"]),
    ],
)
def test_help(arguments: list[str], words: list[str], command: Command) -> None:
    done = command(*arguments, "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in words), done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["kubernetes"], "required: COMMAND"),
        (["start"], "invalid choice: 'start'"),
        (["config", "--colour"], "unrecognized arguments: --colour"),
        (["kubernetes", "manifest", "--namespace", "My Team"], "'My Team' cannot be a namespace"),
        (["kubernetes", "manifest", "--namespace", ""], "'' cannot be a namespace"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, command: Command) -> None:
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_config_tells_where_each_value_comes_from(tmp_path: Path, command: Command) -> None:
    (tmp_path / ".fiberconfig").write_text("retries = 7\ndocker_environment = A=1\n")
    done = command("config", env={"FIBER_LOG_LEVEL": "debug", "FIBER_BACKEND": "docker"})
    assert done.returncode == 0, done.stderr
    rows = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"retries = 7 ({tmp_path}/.fiberconfig, line 1)" in rows
    assert f'docker_environment = {{"A": "1"}} ({tmp_path}/.fiberconfig, line 2)' in rows
    assert "log_level = debug (FIBER_LOG_LEVEL in the environment)" in rows
    assert "image = none (default)" in rows
    assert rows[-1] == "Processes start on the backend 'docker'."
    assert {row.split(" = ")[0] for row in rows[:-2]} == set(fiber.config.as_dict())


def test_config_says_which_backend_there_is_not(command: Command) -> None:
    done = command("config", env={"FIBER_BACKEND": "dokcer"})
    assert done.returncode == 1
    assert "backend " in done.stdout
    assert done.stderr.startswith("fiber: There is no backend 'dokcer' (from FIBER_BACKEND in the")
    assert done.stderr.count("\n") == 1


def test_a_wrong_setting_is_one_sentence(command: Command) -> None:
    done = command("config", env={"FIBER_RETRIES": "many"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "fiber: The config key 'retries' cannot be 'many' (from FIBER_RETRIES in the environment): "
        "it must be a whole number of at least 0.\n"
    )


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "fiber", "config"],
            stdout=gone,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    ("arguments", "environment", "namespace"),
    [
        ([], {}, "default"),
        ([], {"FIBER_KUBERNETES_NAMESPACE": "team"}, "team"),
        (["-n", "other"], {"FIBER_KUBERNETES_NAMESPACE": "team"}, "other"),
    ],
)
def test_the_manifest_is_yaml_for_the_namespace(
    arguments: list[str], environment: dict[str, str], namespace: str, command: Command
) -> None:
    import yaml

    done = command("kubernetes", "manifest", *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    assert {entry["kind"] for entry in objects} == {"ServiceAccount", "Role", "RoleBinding"}
    assert {entry["metadata"]["namespace"] for entry in objects} == {namespace}


def test_the_manifest_needs_no_sdk(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['kubernetes'] = sys.modules['yaml'] = None\n"
        "from fiber.cli import main; sys.exit(main(['kubernetes', 'manifest']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kind: Role" in done.stdout
