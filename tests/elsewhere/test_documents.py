"""The programs of the README and examples, unchanged."""

from __future__ import annotations

import re

import pytest
from tests.elsewhere.sites import ROOT, Site

README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("code", [pytest.param(c, id=str(n)) for n, c in enumerate(README, 1)])
def test_a_program_of_the_readme_runs_on_a_stock_image(site: Site, code: str) -> None:
    program = site.run(code)
    assert program.lines
    for said in re.findall(r"^ *print\(.*\)  # (.*)$", code, re.M):
        assert said in program.lines


EXAMPLES = {
    "pi.py": ("--points", "200000"),
    "ring_average.py": ("--size", "20000"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_where_its_packages_are(site: Site, name: str) -> None:
    source = ROOT / "examples" / name
    program = site.run(source, "--processes", "2", *EXAMPLES[name], env=site.packages())
    assert program.lines
