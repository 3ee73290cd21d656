"""joblib's multiprocessing backend takes a context, and so does what is built on joblib."""

import os

import numpy as np
from joblib import Parallel, delayed

import fiber


def square(x):
    return x * x, os.getpid()


def total(array):
    return float(array.sum()), type(array).__name__


def fail(x):
    raise ValueError(f"no {x}")


if __name__ == "__main__":
    with Parallel(n_jobs=2, backend=fiber.get_context("spawn")) as parallel:
        squares, pids = zip(*parallel(delayed(square)(i) for i in range(100)), strict=True)
        print("squares:", sum(squares), os.getpid() not in pids)
        # Large arrays are memory-mapped by joblib, not sent.
        print("totals:", parallel(delayed(total)(np.ones(500_000)) for _ in range(2)))
        try:
            parallel(delayed(fail)(i) for i in [0])
        except ValueError as error:
            print("raised:", error)
