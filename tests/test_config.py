"""Configuration: typed values, four sources in their order, and errors that say where to look."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from fiber.config import GONE, KEYS, Config, parse_memory
from fiber.errors import ConfigError

OPTIONS = {"shm_size": "1g", "dns": ["9.9.9.9"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / ".fiberconfig"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults() -> None:
    assert Config().as_dict() == {
        "backend": None,
        "default_backend": "local",
        "image": None,
        "debug": False,
        "log_level": 30,
        "log_file": None,
        "cpu_per_job": 1,
        "mem_per_job": None,
        "retries": 2,
        "imap_buffer": 4,
        "imap_buffer_mb": 64,
        "shared_memory_mb": None,
        "workers_per_job": 1,
        "start_timeout": 60.0,
        "queue_timeout": None,
        "address": None,
        "docker_network": None,
        "docker_mounts": [],
        "docker_environment": {},
        "docker_workdir": None,
        "docker_user": None,
        "docker_options": {},
        "kubernetes_namespace": None,
        "kubernetes_context": None,
        "kubernetes_service_account": None,
        "kubernetes_gpu_resource": "nvidia.com/gpu",
        "kubernetes_template": None,
        "kubernetes_relay": "auto",
        "kubernetes_pull_policy": None,
        "slurm_mode": "auto",
        "slurm_partition": None,
        "slurm_account": None,
        "slurm_qos": None,
        "slurm_time": None,
        "slurm_constraint": None,
        "slurm_options": [],
        "slurm_python": None,
        "slurm_folder": "~/.fiber",
        "slurm_log_folder": None,
    }
    assert Config().source("retries") == "default"


def test_code_over_environment_over_file_over_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, "retries = 5\nimage = a\ncpu_per_job = 3\n")
    monkeypatch.setenv("FIBER_CPU_PER_JOB", "4")
    monkeypatch.setenv("FIBER_IMAGE", "b")
    config = Config()
    config.init(image="c")
    assert (config.retries, config.cpu_per_job, config.image) == (5, 4, "c")
    assert config.source("retries") == f"{path}, line 1"
    assert config.source("cpu_per_job") == "FIBER_CPU_PER_JOB in the environment"
    assert config.source("image") == "code"
    assert config.source("debug") == "default"
    config.reset()
    assert config.image == "b"


def test_reset_reads_environment_and_file_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config()
    assert config.retries == 2
    monkeypatch.setenv("FIBER_RETRIES", "7")
    write(folder, "debug = yes")
    assert (config.retries, config.debug) == (2, False)
    config.reset()
    assert (config.retries, config.debug) == (7, True)


def test_setting_an_attribute() -> None:
    config = Config()
    config.mem_per_job = "2Gi"
    config.log_level = "debug"
    config.start_timeout = 5
    assert (config.mem_per_job, config.log_level, config.start_timeout) == (2048, 10, 5.0)
    with pytest.raises(ConfigError, match="'retries' cannot be -1"):
        config.retries = -1
    with pytest.raises(ConfigError, match="did you mean 'retries'"):
        config.retry = 1
    assert config.retries == 2


def test_init_sets_all_or_nothing() -> None:
    config = Config()
    with pytest.raises(ConfigError, match="'retries' cannot be 'many' .from code"):
        config.init(image="x", retries="many")
    assert config.image is None


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("backend", " docker ", "docker"),
        ("backend", "", None),
        ("debug", "false", False),
        ("debug", "True", True),
        ("debug", "0", False),
        ("debug", "on", True),
        ("log_level", "Error", 40),
        ("log_level", "15", 15),
        ("log_file", "stdout", "stdout"),
        ("log_file", "", None),
        ("cpu_per_job", "8", 8),
        ("mem_per_job", "512", 512),
        ("mem_per_job", "1.5Gi", 1536),
        ("mem_per_job", "", None),
        ("retries", "0", 0),
        ("imap_buffer_mb", "1", 1),
        ("start_timeout", "0.5", 0.5),
        ("workers_per_job", "16", 16),
        ("queue_timeout", "", None),
        ("queue_timeout", "3600", 3600.0),
        ("address", "master.example.org:7000", "master.example.org:7000"),
        ("address", "10.0.0.1", "10.0.0.1"),
        ("address", "[fd00::1]:7000", "[fd00::1]:7000"),
        ("address", "fd00::1", "fd00::1"),
        ("docker_network", "jobs", "jobs"),
        ("docker_mounts", "/data:/data:ro, cache:/c,", ["/data:/data:ro", "cache:/c"]),
        ("docker_mounts", "", []),
        ("docker_environment", "A=1, B=x=y,C=", {"A": "1", "B": "x=y", "C": ""}),
        ("docker_environment", '{"A": "1,2"}', {"A": "1,2"}),
        ("docker_environment", "", {}),
        ("docker_workdir", "/srv", "/srv"),
        ("docker_user", "1000:100", "1000:100"),
        ("docker_options", '{"shm_size": "1g", "dns": ["9.9.9.9"]}', OPTIONS),
        ("docker_options", "", {}),
        ("kubernetes_namespace", "team", "team"),
        ("kubernetes_template", "pod.yaml", "pod.yaml"),
        ("kubernetes_template", '{"spec": {"priority": 1}}', {"spec": {"priority": 1}}),
        ("kubernetes_relay", "Never", "never"),
        ("kubernetes_pull_policy", "ifnotpresent", "IfNotPresent"),
        ("kubernetes_pull_policy", "", None),
    ],
)
def test_text_becomes_a_typed_value(
    key: str, given: str, value: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"FIBER_{key.upper()}", given)
    from_environment = getattr(Config(), key)
    monkeypatch.delenv(f"FIBER_{key.upper()}")
    write(folder, f"{key} = {given}")
    from_file = getattr(Config(), key)
    assert from_environment == from_file == value
    assert type(from_environment) is type(from_file) is type(value)


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("backend", 3),
        ("default_backend", ""),
        ("default_backend", None),
        ("debug", "maybe"),
        ("debug", None),
        ("log_level", "loud"),
        ("log_level", -1),
        ("log_file", 7),
        ("cpu_per_job", 0),
        ("cpu_per_job", 1.5),
        ("cpu_per_job", True),
        ("cpu_per_job", "two"),
        ("cpu_per_job", None),
        ("mem_per_job", "12 parsecs"),
        ("mem_per_job", 0),
        ("retries", -1),
        ("imap_buffer", 0),
        ("start_timeout", 0),
        ("start_timeout", "nan"),
        ("start_timeout", "inf"),
        ("start_timeout", []),
        ("workers_per_job", 0),
        ("queue_timeout", 0),
        ("address", "http://host"),
        ("address", "host:"),
        ("address", "host:0"),
        ("address", "host:port"),
        ("address", "host:65536"),
        ("address", ":7000"),
        ("address", "[fd00::1"),
        ("address", "[fd00::1]7000"),
        ("address", "a host"),
        ("docker_mounts", "/data"),
        ("docker_mounts", "/data:data"),
        ("docker_mounts", ["/data:/data:rx"]),
        ("docker_mounts", [":/data"]),
        ("docker_mounts", {"/data": "/data"}),
        ("docker_mounts", None),
        ("docker_environment", "A"),
        ("docker_environment", "=1"),
        ("docker_environment", "{"),
        ("docker_environment", ["A=1"]),
        ("docker_environment", {"A": None}),
        ("docker_environment", {"A=B": "1"}),
        ("docker_workdir", "srv"),
        ("docker_user", 1.5),
        ("docker_options", "shm_size=1g"),
        ("docker_options", "[1]"),
        ("docker_options", {"init": object}),
        ("docker_options", {1: 2}),
        ("kubernetes_gpu_resource", None),
        ("kubernetes_template", ["pod.yaml"]),
        ("kubernetes_relay", "sometimes"),
        ("kubernetes_relay", None),
        ("kubernetes_pull_policy", "sometimes"),
    ],
)
def test_a_bad_value_is_named_with_what_is_valid(key: str, given: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Config().init(**{key: given})
    message = str(caught.value)
    assert f"{key!r} cannot be {given!r} (from code): it must be " in message
    assert "\n" not in message


def test_a_bad_value_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBER_CPU_PER_JOB", "two")
    config = Config()
    with pytest.raises(ConfigError) as caught:
        _ = config.image
    assert str(caught.value) == (
        "The config key 'cpu_per_job' cannot be 'two' (from FIBER_CPU_PER_JOB in the environment): "
        "it must be a whole number of at least 1."
    )


def test_a_bad_value_in_the_file(folder: Path) -> None:
    path = write(folder, "# mine\n\nretries: lots\n")
    with pytest.raises(ConfigError) as caught:
        _ = Config().retries
    assert f"'lots' (from {path}, line 3)" in str(caught.value)


def test_unknown_keys_of_each_source(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"'imap_bufer' \(from code\): did you mean 'imap_buffer'"
    ):
        Config().init(imap_bufer=3)
    with pytest.raises(ConfigError, match=r"the keys are backend, .*start_timeout, .*\."):
        Config().init(zzz=3)
    monkeypatch.setenv("FIBER_RETRY", "3")
    with pytest.raises(ConfigError, match="FIBER_RETRY in the environment.*did you mean 'retries'"):
        _ = Config().debug
    monkeypatch.delenv("FIBER_RETRY")
    path = write(folder, "[default]\nlogfile = x\n")
    with pytest.raises(ConfigError) as caught:
        _ = Config().debug
    assert f"(from {path}, line 2): did you mean 'log_file'?" in str(caught.value)


def test_the_case_of_a_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBER_Debug", "1")
    with pytest.raises(ConfigError, match="FIBER_Debug in the environment.*did you mean 'debug'"):
        _ = Config().debug


def test_variables_that_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBER_INTERNAL_SESSION", "x")
    monkeypatch.setenv("FIBER_TEST_ENGINES", "docker")
    # What Kubernetes tells pods of services named "fiber" and "fiber-dashboard".
    monkeypatch.setenv("FIBER_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("FIBER_SERVICE_PORT_HTTP", "80")
    monkeypatch.setenv("FIBER_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("FIBER_DASHBOARD_PORT_80_TCP_ADDR", "10.0.0.1")
    assert Config().retries == 2


@pytest.mark.parametrize("key", GONE)
def test_a_key_of_the_old_fiber_says_why_it_is_gone(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for use in (lambda: Config().init(**{key: 1}), lambda: setattr(Config(), key, 1)):
        with pytest.raises(ConfigError, match=rf"{key!r} \(from code\) is gone: .*; (remove|set) "):
            use()
    monkeypatch.setenv(f"FIBER_{key.upper()}", "1")
    with pytest.raises(ConfigError, match=f"FIBER_{key.upper()} in the environment.* is gone"):
        _ = Config().retries


@pytest.mark.parametrize("head", ["", "[default]\n", "\ufeff", "; old\n[DEFAULT]\n\n"])
def test_the_file_with_and_without_its_section(head: str, folder: Path) -> None:
    write(
        folder,
        f"{head}# a comment\nBackend = docker\n  image=a/b:1\n; debug = yes\nretries : 1\n"
        "docker_environment: A=1",
    )
    config = Config()
    assert (config.backend, config.image, config.retries) == ("docker", "a/b:1", 1)
    assert config.docker_environment == {"A": "1"}
    assert config.debug is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[kubernetes]\n", "section .kubernetes. .*line 1"),
        ("debug\n", "line 1, is 'debug': write it as 'key = value'"),
        ("debug = 1\ndebug = 0\n", "'debug' stands twice .* line 1 and line 2"),
    ],
)
def test_a_file_that_is_wrong_in_form(text: str, message: str, folder: Path) -> None:
    write(folder, text)
    with pytest.raises(ConfigError, match=message):
        _ = Config().debug


def test_a_file_that_is_no_text(folder: Path) -> None:
    (folder / ".fiberconfig").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="fiberconfig cannot be read"):
        _ = Config().debug


def test_an_error_comes_again_until_it_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    monkeypatch.setenv("FIBER_RETRIES", "x")
    for _ in range(2):
        with pytest.raises(ConfigError):
            _ = config.retries
    monkeypatch.setenv("FIBER_RETRIES", "1")
    assert config.retries == 1


def test_importing_and_setting_never_read_what_may_be_wrong() -> None:
    code = "import fiber.config as module, sys; sys.modules['fiber.config'].config.init(retries=1)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FIBER_NONSENSE": "1"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0


def test_a_child_adopts_its_parents_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = Config()
    parent.init(mem_per_job="1Gi", log_level="info", retries=0)
    values = pickle.loads(pickle.dumps(parent.as_dict()))
    # Neither of these is the child's business: it may run elsewhere.
    monkeypatch.setenv("FIBER_NONSENSE", "1")
    write(folder, "retries = 9")
    child = Config()
    child.init(image="left over from the template")
    child.adopt(values)
    assert child.as_dict() == parent.as_dict()
    assert child.source("retries") == "the parent process"
    child.retries = 4
    assert child.as_dict() == {**parent.as_dict(), "retries": 4}
    child.reset()
    assert child.as_dict() == parent.as_dict()


def test_lists_and_dicts_go_to_children_whatever_they_were_made_of(folder: Path) -> None:
    class Mount(dict[str, object]):
        """As the types of Docker's SDK, which a child may not have."""

    parent = Config()
    parent.init(
        docker_mounts=("./data:/data", "~:/home/me:ro"),
        docker_environment={"THREADS": 2},
        docker_options={"mounts": [Mount(Target="/x")], "sizes": (1, 2)},
        kubernetes_template={"spec": {"containers": [{"name": "fiber"}]}},
    )
    assert parent.docker_mounts == [f"{folder}/data:/data", f"{Path.home()}:/home/me:ro"]
    assert parent.docker_environment == {"THREADS": "2"}
    data = pickle.dumps(parent.as_dict())
    assert b"Mount" not in data
    child = Config()
    child.adopt(pickle.loads(data))
    assert child.as_dict() == parent.as_dict()
    assert child.docker_options == {"mounts": [{"Target": "/x"}], "sizes": [1, 2]}


def test_a_dict_that_was_read_is_a_copy() -> None:
    config = Config()
    config.docker_environment["A"] = "unchecked"
    config.docker_mounts.append("unchecked")
    template = {"spec": {"containers": [{"name": "a"}]}}
    config.kubernetes_template = template
    template["spec"]["containers"][0]["name"] = "b"
    config.kubernetes_template["spec"]["containers"][0]["name"] = "c"
    config.as_dict()["kubernetes_template"]["spec"].clear()
    assert config.kubernetes_template == {"spec": {"containers": [{"name": "a"}]}}
    assert (config.docker_environment, config.docker_mounts) == ({}, [])
    assert (Config().docker_environment, Config().docker_mounts) == ({}, [])


def test_reading_what_is_no_key() -> None:
    config = Config()
    assert not hasattr(config, "nonsense")
    with pytest.raises(AttributeError, match="did you mean 'image'"):
        _ = config.imag
    with pytest.raises(ConfigError, match="did you mean 'image'"):
        config.source("imag")
    with pytest.raises(AttributeError, match="cannot be deleted"):
        del config.image


def test_each_key_says_what_it_is_for() -> None:
    assert all(key.doc.endswith(".") and key.valid for key in KEYS.values())
    assert set(KEYS) <= set(dir(Config()))
    assert "retries=2" in repr(Config())


@pytest.mark.parametrize(
    ("given", "mb"),
    [
        (512, 512),
        ("512", 512),
        ("512Mi", 512),
        ("2Gi", 2048),
        ("2 GiB", 2048),
        ("1Ti", 1024**2),
        ("1.5G", 1431),  # 1,500,000,000 bytes, rounded up
        ("100M", 96),
        ("1kb", 1),
        ("1.048576M", 1),
    ],
)
def test_memory_is_read_as_mb(given: object, mb: int) -> None:
    assert parse_memory(given) == mb


@pytest.mark.parametrize(
    "given",
    [
        "",
        "Mi",
        ".Mi",
        "1.2.3Gi",
        "-1Gi",
        "nanGi",
        "1e3M",
        "5 apples",
        "0Gi",
        0,
        -5,
        1.5,
        None,
        True,
    ],
)
def test_what_is_no_memory(given: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        parse_memory(given)
