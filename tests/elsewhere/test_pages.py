"""The pages on engines: their programs run there, and a cluster takes their manifests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.backends import kubernetes_cluster as cluster
from tests.backends import slurm_cluster
from tests.elsewhere.sites import SITES, Site
from tests.test_docs import ROOT, RunScript, manifests, matches

Engine = Callable[[str, Callable[[], None]], None]


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


def told(code: str) -> list[str]:
    """What a program says in comments that it prints."""
    return re.findall(r"^ *print\(.*\)  # (.*)$", code, re.M)


@pytest.fixture
def docker(engine: Engine, clean_environ: None, tmp_path: Path) -> Iterator[Site]:
    engine("docker", SITES["docker"].probe)
    site = SITES["docker"](tmp_path)
    yield site
    site.close()
    site.forget()


@pytest.mark.parametrize("code", programs("docker.md"))
def test_a_program_of_the_docker_page_runs(docker: Site, code: str) -> None:
    done = docker.run(code)
    assert told(code)
    assert matches(done.out, told(code)), done.all()


@pytest.fixture
def namespace(engine: Engine, clean_environ: None) -> Iterator[cluster.Namespace]:
    engine("kubernetes", cluster.probe)
    with cluster.new_namespace() as namespace:
        yield namespace


@pytest.mark.parametrize("code", programs("kubernetes.md"))
def test_a_program_of_the_kubernetes_page_runs(
    namespace: cluster.Namespace, run_script: RunScript, code: str
) -> None:
    settings = {
        "FIBER_IMAGE": cluster.IMAGE,
        "FIBER_KUBERNETES_NAMESPACE": namespace.name,
        "FIBER_KUBERNETES_PULL_POLICY": "IfNotPresent",
    }
    done = run_script(code, env=settings, timeout=90)
    assert done.returncode == 0, done.stderr
    assert told(code)
    assert matches(done.stdout, told(code)), done.stdout
    assert done.stderr == ""
    namespace.becomes_empty()


def test_the_cluster_takes_the_pods_of_the_kubernetes_page(namespace: cluster.Namespace) -> None:
    cluster.apply_rights(namespace)
    cluster.until(
        lambda: len(cluster.core().list_namespaced_service_account(namespace.name).items) == 2,
        "both service accounts",
    )
    master, template = manifests()
    template["metadata"] = {"name": "of-the-template"}
    template["spec"]["containers"][0]["image"] = cluster.IMAGE
    for pod in (master, template):
        made = cluster.core().create_namespaced_pod(namespace.name, pod, dry_run="All")
        assert made.metadata.name == pod["metadata"]["name"]
    assert not namespace.pods()


def test_the_master_of_the_kubernetes_page_runs_its_program(
    namespace: cluster.Namespace,
) -> None:
    """With what pip would install in its image, and this Fiber by a volume: none is published."""
    cluster.apply_rights(namespace)
    core = cluster.core()
    code = programs("kubernetes.md")[-1]
    core.create_namespaced_config_map(
        namespace.name, {"metadata": {"name": "program"}, "data": {"program.py": code}}
    )
    master, _ = manifests()
    [container] = master["spec"]["containers"]
    container["image"] = cluster.master_image()
    container["command"][-1] = container["command"][-1].rpartition("&& ")[2]
    container["env"].append({"name": "PYTHONPATH", "value": "/source"})
    container["volumeMounts"].append({"name": "source", "mountPath": "/source"})
    source = {"name": "source", "hostPath": {"path": str(ROOT / "src")}}
    master["spec"]["volumes"].append(source)
    core.create_namespaced_pod(namespace.name, master)

    def ended() -> bool:
        phase = core.read_namespaced_pod("master", namespace.name).status.phase
        return phase in ("Succeeded", "Failed")

    cluster.until(ended, "the master has ended", patience=90)
    log = core.read_namespaced_pod_log("master", namespace.name)
    assert matches(log, told(code)), log
    namespace.delete("master")
    namespace.becomes_empty()


def shells(page: str) -> list[str]:
    return re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


@pytest.fixture
def login(
    engine: Engine, clean_environ: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A user's folder with the program of the page, where `python` is the one of these tests."""
    engine("slurm", slurm_cluster.probe)
    (tmp_path / "program.py").write_text(programs("slurm.md")[0])
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def run_as_user(folder: Path, command: str) -> str:
    done = subprocess.run(
        command, check=False, shell=True, cwd=folder, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def left_clean(folder: Path) -> None:
    slurm_cluster.until(lambda: not slurm_cluster.jobs(), "no job is left")
    assert not list((folder / ".fiber").iterdir())
    assert not list(folder.glob("fiber-*.log"))


def test_the_batch_script_of_the_slurm_page(login: Path) -> None:
    (script,) = [block for block in shells("slurm.md") if block.startswith("#!")]
    (submit,) = [block for block in shells("slurm.md") if block.startswith("sbatch")]
    (login / "program.sh").write_text(script)
    run_as_user(login, submit.replace("sbatch", "sbatch --wait"))
    (log,) = login.glob("slurm-*.out")
    assert matches(log.read_text(), told(programs("slurm.md")[0])), log.read_text()
    left_clean(login)


@pytest.mark.parametrize("first", ["salloc", "FIBER_BACKEND"])
def test_the_interactive_commands_of_the_slurm_page(login: Path, first: str) -> None:
    (command,) = [block for block in shells("slurm.md") if block.startswith(first)]
    out = run_as_user(login, command)
    assert matches(out, told(programs("slurm.md")[0])), out
    left_clean(login)
