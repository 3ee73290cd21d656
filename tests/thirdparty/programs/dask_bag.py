"""Dask's process scheduler takes any executor as its pool."""

import os
from concurrent.futures import ProcessPoolExecutor

import dask
import dask.bag

import fiber


def square(x):
    return x * x, os.getpid()


if __name__ == "__main__":
    executor = ProcessPoolExecutor(2, mp_context=fiber.get_context("spawn"))
    dask.config.set(scheduler="processes", pool=executor)
    bag = dask.bag.from_sequence(range(100), npartitions=8)
    squares, pids = zip(*bag.map(square).compute(), strict=True)
    print("bag:", sum(squares), os.getpid() not in pids)
    print("lambda:", bag.map(lambda x: x + 1).sum().compute())
    executor.shutdown()
