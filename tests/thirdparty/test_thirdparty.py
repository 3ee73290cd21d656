"""Libraries that were written for multiprocessing, handed Fiber as docs/third-party.md says."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "third-party.md"
PROGRAMS = Path(__file__).resolve().parent / "programs"

RunProgram = Callable[..., list[str]]

pytestmark = pytest.mark.timeout(110)


def needs(*libraries: str) -> pytest.MarkDecorator:
    """Skip a test where a library is not installed."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


# Libraries that take a pool, or its map.


@needs("emcee")
def test_emcee_walks_the_same_chain_in_a_pool(run_program: RunProgram) -> None:
    same, means = run_program("emcee_sampler.py")
    assert same == "same chain: True"
    assert [float(mean) for mean in means.split()[1:]] == pytest.approx([1, -2, 3], abs=0.5)


@needs("dynesty")
def test_dynesty_finds_the_evidence_with_a_pool(run_program: RunProgram) -> None:
    assert run_program("dynesty_sampler.py") == ["evidence: True"]


@needs("scipy")
def test_scipy_finds_the_same_with_the_map_of_a_pool(run_program: RunProgram) -> None:
    assert run_program("scipy_optimize.py") == [
        "differential_evolution: 2.0 -1.0 True",
        "brute: 1.0 -2.0 True",
        "quad_vec: 1.0 1.0",
    ]


@needs("deap")
def test_deap_evolves_the_same_population_with_a_pool(run_program: RunProgram) -> None:
    same, best = run_program("deap_onemax.py")
    assert same == "same population: True"
    assert float(best.removeprefix("best: ")) > 30


@needs("pandas")
def test_frames_and_arrays_come_back_as_from_one_process(run_program: RunProgram) -> None:
    assert run_program("pandas_groups.py") == [
        "rows: 30000 shares: 1.0 1.0 1.0",
        "arrays: True",
    ]


@needs("tqdm")
def test_tqdm_counts_and_its_workers_share_its_lock(run_program: RunProgram) -> None:
    first, *items, last = run_program("tqdm_bars.py")
    assert first == "imap: 41541750 True"
    assert sorted(items) == sorted(f"item {i}" for i in range(20))
    assert last == "process_map: 2470 True"


@needs("pathos")
def test_pathos_maps_on_the_pool_it_is_given(run_program: RunProgram) -> None:
    # What it wants of a pool is that of `multiprocess`, which can pickle more.
    assert run_program("pathos_pool.py", instead="multiprocess") == [
        "map: [4, 10, 18]",
        "imap: [0, 1, 4, 9, 16]",
        "uimap: [0, 1, 4, 9, 16]",
        "amap: [0, 1, 4, 9, 16]",
        "pipe: 42",
    ]


# Libraries that take a context, or the module.


def test_an_executor_has_its_processes_from_a_context(run_program: RunProgram) -> None:
    assert run_program("executor.py") == [
        "map: hello number 0 … hello number 49 True",
        "submit: 328350",
        "raised: ValueError('no 7')",
        "broken: BrokenProcessPool",
    ]


@needs("dask")
def test_dask_computes_in_an_executor(run_program: RunProgram) -> None:
    assert run_program("dask_bag.py") == ["bag: 328350 True", "lambda: 5050"]


@needs("joblib", "numpy")
def test_joblib_maps_in_a_context(run_program: RunProgram) -> None:
    assert run_program("joblib_parallel.py") == [
        "squares: 328350 True",
        "totals: [(500000.0, 'memmap'), (500000.0, 'memmap')]",
        "raised: no 0",
    ]


@needs("sklearn")
def test_scikit_learn_finds_the_same_in_processes(run_program: RunProgram) -> None:
    assert run_program("sklearn_search.py") == ["same: True", "best: {'C': 10, 'gamma': 0.001}"]


def test_records_of_processes_reach_one_handler(run_program: RunProgram) -> None:
    assert run_program("logging_queue.py") == [
        "records: 63",
        *(f"{n} True failed {n} ZeroDivisionError: division by zero" for n in range(3)),
    ]


@needs("gymnasium")
class TestGymnasium:
    def test_environments_in_processes_play_as_in_one(self, run_program: RunProgram) -> None:
        assert run_program("gymnasium_async.py", "same") == [
            *(["same: 0 0 0"] * 4),
            "attributes: (1, 2)",
        ]

    def test_an_error_of_an_environment_is_raised(self, run_program: RunProgram) -> None:
        assert run_program("gymnasium_async.py", "error") == [
            "raised: the env fell over",
            "alive: False",
        ]

    def test_a_step_that_is_late_is_a_timeout(self, run_program: RunProgram) -> None:
        assert run_program("gymnasium_async.py", "late") == [
            "late: The call to `step_wait` has timed out after 0.01 second(s).",
            "alive: False",
        ]

    def test_a_semaphore_limits_concurrent_steps(self, run_program: RunProgram) -> None:
        assert run_program("gymnasium_async.py", "limit") == ["one by one: True 3"]


@needs("stable_baselines3")
def test_stable_baselines_trains_the_same_model(run_program: RunProgram) -> None:
    assert run_program("stable_baselines.py") == [
        "environments: 2 steps: 256",
        "exit codes: 0 0",
        "environments: 2 steps: 256",
        "same weights: True",
    ]


@needs("torch")
class TestTorch:
    def test_a_loader_loads_epochs_in_two_processes(self, run_program: RunProgram) -> None:
        assert run_program("torch_loader.py", "map") == [
            "epoch 0: 70210 True True True 2",
            "epoch 0: 70210 True True True 2",
            "epoch 1: 70210 True True True 2",
        ]

    def test_a_loader_streams_the_parts_of_its_workers(self, run_program: RunProgram) -> None:
        assert run_program("torch_loader.py", "stream") == ["stream: True"]

    def test_an_error_of_a_dataset_is_raised(self, run_program: RunProgram) -> None:
        assert run_program("torch_loader.py", "error") == ["raised: ValueError: item 0 is broken"]

    def test_a_worker_that_dies_is_reported(self, run_program: RunProgram) -> None:
        (line,) = run_program("torch_loader.py", "killed")
        assert re.match(r"killed: DataLoader worker \(pid.* (killed by|exited unexpected)", line)

    def test_a_model_in_shared_memory_is_shared(self, run_program: RunProgram) -> None:
        assert run_program("torch_shared.py") == [
            "exit codes: 0 0",
            "seeds: [0, 1]",
            "sent back: True",
            "shared: True",
        ]


# The page.

ROWS = [
    pytest.param(line, program, id=program)
    for line, program in re.findall(
        r"^\|.*?\| `([^`]+)` \|.*?\(\.\./tests/thirdparty/programs/([\w.]+)\) \|$",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
]


def test_each_program_is_a_row_of_the_page_and_each_row_is_a_program() -> None:
    named = [row.values[1] for row in ROWS]
    assert set(named) == {path.name for path in PROGRAMS.glob("*.py")}
    table = [text for text in PAGE.read_text().splitlines() if text.startswith("| [")]
    assert len(table) == len(ROWS)


@pytest.mark.parametrize(("line", "program"), ROWS)
def test_a_line_of_the_page_is_one_that_its_program_runs(line: str, program: str) -> None:
    code = [text.strip() for text in (PROGRAMS / program).read_text(encoding="utf-8").splitlines()]
    assert line in code
    source = (PROGRAMS.parent / "test_thirdparty.py").read_text(encoding="utf-8")
    assert f'run_program("{program}"' in source
