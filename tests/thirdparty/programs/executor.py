"""concurrent.futures' ProcessPoolExecutor takes its processes, queues and locks from a context."""

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import fiber

greeting = None


def prepare(word):
    global greeting
    greeting = word


def greet(name):
    return f"{greeting} {name}", os.getpid()


def fail(x):
    raise ValueError(f"no {x}")


def die(x):
    os._exit(3)


if __name__ == "__main__":
    context = fiber.get_context("spawn")
    names = [f"number {i}" for i in range(50)]
    with ProcessPoolExecutor(
        2, mp_context=context, initializer=prepare, initargs=("hello",)
    ) as executor:
        words, pids = zip(*executor.map(greet, names, chunksize=5), strict=True)
        print("map:", words[0], "…", words[-1], os.getpid() not in pids)
        futures = [executor.submit(pow, i, 2) for i in range(100)]
        print("submit:", sum(future.result() for future in as_completed(futures)))
        print("raised:", repr(executor.submit(fail, 7).exception()))

    executor = ProcessPoolExecutor(2, mp_context=fiber.get_context("spawn"))
    try:
        executor.submit(die, 1).result()
    except BrokenProcessPool as error:
        print("broken:", type(error).__name__)
    executor.shutdown()
