"""Every Python program in README and docs is run, and every path that they name is there.

Those of the pages on engines are run on these, see `tests.elsewhere.test_pages`; their manifests
are looked at here as far as that can be done without a cluster.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fiber.backends.base import JobSpec
from fiber.backends.kubernetes import rbac, spec
from fiber.resources import Resources

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
ENGINES = {"docker.md", "kubernetes.md", "slurm.md"}
PROGRAMS = [
    pytest.param(code, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name not in ENGINES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S), 1)
]

RunScript = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("code", PROGRAMS)
def test_a_program_of_the_documentation_runs(code: str, run_script: RunScript) -> None:
    done = run_script(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    told = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.M)
    assert not told or matches(done.stdout, told), done.stdout
    assert matches(done.stderr, re.findall(r"^ *# stderr: (.*)$", code, re.M)), done.stderr


def matches(text: str, lines: list[str]) -> bool:
    """Whether a program printed these lines, in which "…" is anything."""
    pattern = "".join(re.escape(line).replace("…", ".*") + "\n" for line in lines)
    return re.fullmatch(pattern, text) is not None


def test_the_failing_task_of_the_readme_fails_as_it_says(run_script: RunScript) -> None:
    (code,) = [p.values[0] for p in PROGRAMS if "os._exit(7)" in str(p.values[0])]
    lines = run_script(str(code)).stdout.splitlines()
    assert [lines[0], lines[1], lines[2], lines[4]] == ["0", "1", "2", "4"]
    assert lines[3].startswith("WorkerDied('item 3 of risky ended its worker 3 times; the last one")
    assert "ended with exit code 7" in lines[3]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_documentation_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_setting_is_documented() -> None:
    from fiber.config import KEYS

    text = (ROOT / "docs" / "configuration.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(KEYS)


def manifests() -> list[Any]:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]


def test_the_master_of_the_documentation_is_a_pod_with_the_rights_of_the_manifest() -> None:
    master, _ = manifests()
    assert (master["apiVersion"], master["kind"]) == ("v1", "Pod")
    account, _, binding = yaml.safe_load_all(rbac.manifest("default"))
    assert master["spec"]["serviceAccountName"] == account["metadata"]["name"]
    assert binding["subjects"][0]["name"] == account["metadata"]["name"]
    [container] = master["spec"]["containers"]
    volumes = {volume["name"] for volume in master["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_template_of_the_documentation_gets_into_pods(tmp_path: Path) -> None:
    _, template = manifests()
    path = tmp_path / "pod.yaml"
    path.write_text(yaml.safe_dump(template))
    settings = spec.Settings("owner", "an-image", template=spec.load_template(str(path)))
    job = JobSpec("a job", ["python3"], {"OURS": "1"}, Resources())
    pod = spec.pod(job, "name", settings)
    [container] = pod["spec"]["containers"]
    assert container["image"] == "an-image"
    assert {"name": "MODEL", "value": "large"} in container["env"]
    assert {"name": "OURS", "value": "1"} in container["env"]
    for key in ("nodeSelector", "tolerations", "volumes"):
        assert pod["spec"][key] == template["spec"][key]


@pytest.mark.parametrize("page", sorted(ENGINES))
def test_settings_that_a_page_names_are_there(page: str) -> None:
    """In text as `key`, in shells as FIBER_KEY."""
    from fiber.config import KEYS

    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`((?:docker|kubernetes|slurm)_\w+)`", text))
    named |= {name.lower() for name in re.findall(r"\bFIBER_([A-Z_]+)", text)}
    assert named
    assert named <= set(KEYS)
