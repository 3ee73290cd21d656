"""A grid search with cross-validation over handwritten digits that scikit-learn ships.

Every pair of (parameters, fold) is one task for the Pool. The data does not travel with the tasks:
each worker loads it once.

    python examples/grid_search.py
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import fiber

CS = (0.01, 0.1, 1.0, 10.0, 100.0)
GAMMAS = (0.0001, 0.001, 0.01, 0.1, 1.0)
FOLDS = 5


class Task(NamedTuple):
    """One fit: these parameters, tested on this fold and trained on the others."""

    c: float
    gamma: float
    fold: int
    folds: int


@cache
def digits() -> tuple[Any, Any, Any, Any]:
    """Images and labels to search with, and those kept for the final test; once in each process."""
    images, labels = load_digits(return_X_y=True)
    return tuple(train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels))


def model(c: float, gamma: float) -> Pipeline:
    """What is being tuned."""
    return make_pipeline(StandardScaler(), SVC(C=c, gamma=gamma))


def accuracy(task: Task) -> float:
    """Fit on all folds but one and return the share of that one's digits that were read right."""
    images, _, labels, _ = digits()
    splits = StratifiedKFold(task.folds, shuffle=True, random_state=0).split(images, labels)
    train, test = list(splits)[task.fold]
    fitted = model(task.c, task.gamma).fit(images[train], labels[train])
    return float(fitted.score(images[test], labels[test]))


def main(argv: Sequence[str] | None = None) -> int:
    """Search, show the best parameters, and test the best on digits that no fit has seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--c", type=float, nargs="+", default=CS, help="values of C")
    parser.add_argument("--gamma", type=float, nargs="+", default=GAMMAS, help="values of gamma")
    parser.add_argument("--folds", type=int, default=FOLDS, help="default: %(default)s")
    parser.add_argument("--processes", type=int, help="default: one for each CPU")
    options = parser.parse_args(argv)
    if options.folds < 2:
        parser.error("--folds must be at least 2.")

    tasks = [
        Task(c, gamma, fold, options.folds)
        for c, gamma, fold in product(options.c, options.gamma, range(options.folds))
    ]
    started = time.perf_counter()
    with fiber.Pool(options.processes) as pool:
        scores = pool.map(accuracy, tasks)
    seconds = time.perf_counter() - started
    print(f"{len(tasks)} fits in {seconds:.1f} s ({len(tasks) / seconds:.1f} fits/s)\n")

    by_parameters: dict[tuple[float, float], list[float]] = defaultdict(list)
    for task, score in zip(tasks, scores, strict=True):
        by_parameters[task.c, task.gamma].append(score)
    ranking = sorted(by_parameters.items(), key=lambda item: -float(np.mean(item[1])))
    print("     C     gamma   accuracy over folds")
    for (c, gamma), of_folds in ranking[:5]:
        print(f"{c:6g} {gamma:9g}   {np.mean(of_folds):.4f} ± {np.std(of_folds):.4f}")

    (c, gamma), _ = ranking[0]
    images, test_images, labels, test_labels = digits()
    test_accuracy = model(c, gamma).fit(images, labels).score(test_images, test_labels)
    print(f"\nBest: C={c:g}, gamma={gamma:g}")
    print(f"Test accuracy: {test_accuracy:.4f} on {len(test_labels)} digits kept aside")
    return 0


if __name__ == "__main__":
    sys.exit(main())
