"""Resources: what `@meta` accepts, and what a process may use of the machine it is on."""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fiber.resources import (
    THREAD_VARIABLES,
    Resources,
    cpu_count,
    gpu_environment,
    meta,
    meta_of,
    thread_environment,
)

# meta and meta_of


def double(x: int) -> int:
    return 2 * x


@meta(cpu=2, memory="1Gi", gpu=1)
def train(seed: int) -> int:
    return seed + 1


def test_meta_returns_the_function_itself() -> None:
    def work() -> int:
        return 7

    decorated = meta(memory=512)(work)
    assert decorated is work
    assert decorated() == 7
    assert meta_of(work) == Resources(memory=512)


def test_resources_are_typed_plain_and_fixed() -> None:
    needs = meta_of(train)
    assert (needs.cpu, needs.memory, needs.gpu) == (2, 1024, 1)
    assert pickle.loads(pickle.dumps(needs)) == needs
    assert repr(needs) == "Resources(cpu=2, memory=1024, gpu=1)"
    assert Resources() == Resources(None, None, None)
    with pytest.raises(AttributeError):
        needs.cpu = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        needs.cpus = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cpu": 0}, "cpu cannot be 0: it must be a whole number of at least 1"),
        ({"cpu": 1.5}, "cpu cannot be 1.5"),
        ({"cpu": "2"}, "cpu cannot be '2'"),
        ({"cpu": True}, "cpu cannot be True"),
        ({"gpu": -1}, "gpu cannot be -1: it must be a whole number of at least 0"),
        ({"memory": "much"}, "memory cannot be 'much': it must be .*'512Mi'"),
        ({"memory": 0}, "memory cannot be 0"),
    ],
)
def test_a_value_that_does_not_fit(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meta(**given)


def test_an_unknown_resource() -> None:
    with pytest.raises(TypeError, match="no resource 'cpus': the resources are cpu, memory, gpu"):
        meta(cpus=2)


@pytest.mark.parametrize(
    "thing", [type("C", (), {}), functools.partial(double, 1), len, 3, staticmethod(double)]
)
def test_meta_decorates_nothing_but_functions(thing: object) -> None:
    with pytest.raises(TypeError, match="fiber.meta decorates functions, not "):
        meta(cpu=1)(thing)  # type: ignore[type-var]
    assert meta_of(double) == Resources()


class Worker:
    @meta(cpu=3)
    def method(self, x: int) -> int:
        return x

    @staticmethod
    @meta(cpu=4)
    def static(x: int) -> int:
        return x

    @classmethod
    @meta(cpu=5)
    def of_class(cls, x: int) -> int:
        return x

    @meta(cpu=6)
    def __call__(self, x: int) -> int:
        return x


@functools.lru_cache
@meta(cpu=7)
def cached(x: int) -> int:
    return x


def logged(func: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(func)
    def wrapper(*args: int) -> int:
        return func(*args)

    del wrapper.__dict__["__fiber_meta__"]  # wraps has copied it; only __wrapped__ is left
    return wrapper


@pytest.mark.parametrize(
    ("func", "cpu"),
    [
        (Worker().method, 3),
        (Worker.method, 3),
        (Worker.static, 4),
        (Worker.of_class, 5),
        (Worker(), 6),
        (cached, 7),
        (logged(train), 2),
        (functools.partial(train, 1), 2),
        (functools.partial(functools.partial(Worker().method), 1), 3),
        (double, None),
        (len, None),
        ("abc".upper, None),
        (Worker, None),
        (None, None),
    ],
)
def test_meta_is_found_behind_what_wraps_it(func: object, cpu: int | None) -> None:
    assert meta_of(func).cpu == cpu


# thread_environment and gpu_environment


def test_libraries_are_told_their_threads_but_not_what_the_user_set() -> None:
    told = thread_environment(3, {"MKL_NUM_THREADS": "1", "PATH": "/bin"})
    assert {told[name] for name in THREAD_VARIABLES if name in told} == {"3"}
    assert {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"} <= set(told)
    assert "MKL_NUM_THREADS" not in told


def test_a_child_with_other_cpus_does_not_inherit_its_parents_number() -> None:
    user = {"MKL_NUM_THREADS": "1"}
    parent = {**user, **thread_environment(1, user)}
    child = {**parent, **thread_environment(4, parent)}
    assert (child["OMP_NUM_THREADS"], child["MKL_NUM_THREADS"]) == ("4", "1")


def test_a_library_heeds_it() -> None:
    pytest.importorskip("numpy")
    code = """
import numpy, psutil
numpy.ones((200, 200)) @ numpy.ones((200, 200))
print(psutil.Process().num_threads())
"""
    clean = {k: v for k, v in os.environ.items() if k not in THREAD_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **thread_environment(1, clean)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "1"


@pytest.fixture
def four_gpus(tmp_path: Path) -> str:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia7", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    return str(tmp_path)


@pytest.mark.parametrize(
    ("gpu", "slot", "visible"),
    [
        (1, 0, "0"),
        (1, 3, "3"),
        (1, 4, "0"),
        (2, 1, "2,3"),
        (2, 2, "0,1"),
        (3, 1, "3,0,1"),
        (9, 0, "0,1,2,3"),
    ],
)
def test_gpus_are_dealt_out_by_place(gpu: int, slot: int, visible: str, four_gpus: str) -> None:
    assert gpu_environment(gpu, slot, {}, four_gpus) == {"CUDA_VISIBLE_DEVICES": visible}


def test_gpus_are_left_alone(four_gpus: str, tmp_path: Path) -> None:
    assert gpu_environment(None, 0, {}, four_gpus) == {}
    assert gpu_environment(0, 0, {}, four_gpus) == {}
    assert gpu_environment(1, 0, {"CUDA_VISIBLE_DEVICES": ""}, four_gpus) == {}
    assert gpu_environment(1, 0, {}, str(tmp_path / "missing")) == {}
    (tmp_path / "bare").mkdir()
    assert gpu_environment(1, 0, {}, str(tmp_path / "bare")) == {}


# cpu_count


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


Count = Callable[..., int]


@pytest.fixture
def count(tmp_path: Path, eight_cpus: None) -> Count:
    """`cpu_count` on a machine with these lines in /proc/self/cgroup and files under /sys."""

    def count(lines: str, **files: str) -> int:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(lines)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return cpu_count(str(tmp_path / "proc"), str(tmp_path / "cgroup"))

    return count


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("5000 100000", 1),
        ("9900000 100000", 8),
        ("", 8),
        ("nonsense", 8),
    ],
)
def test_cgroup_v2(quota: str, cpus: int, count: Count) -> None:
    assert count("0::/user/job\n", **{"user/job/cpu.max": quota}) == cpus


def test_cgroup_v2_limit_further_up(count: Count) -> None:
    limits = {"a/b/c/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}
    assert count("0::/a/b/c\n", **limits) == 3


@pytest.mark.parametrize("path", ["/kubepods/of/the/host", "/../../elsewhere", "/"])
def test_cgroup_v2_in_a_container(path: str, count: Count) -> None:
    assert count(f"0::{path}\n", **{"cpu.max": "400000 100000"}) == 4


def test_cgroup_v1(count: Count) -> None:
    lines = "5:memory:/x\n4:cpu,cpuacct:/docker/ab\n3:cpuset:/y\n0::/\n"
    files = {
        "cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "250000",
        "cpu,cpuacct/docker/ab/cpu.cfs_period_us": "50000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/x/cpu.cfs_quota_us": "1",
    }
    assert count(lines, **files) == 5


def test_cgroup_v1_under_its_short_name(count: Count) -> None:
    files = {"cpu/cpu.cfs_quota_us": "600000", "cpu/cpu.cfs_period_us": "100000"}
    assert count("1:cpuacct,cpu:/\n", **files) == 6


def test_no_cgroup_at_all(tmp_path: Path, eight_cpus: None) -> None:
    assert cpu_count(str(tmp_path), str(tmp_path)) == 8


def test_this_machine() -> None:
    assert 1 <= cpu_count() <= (os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_affinity() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)
