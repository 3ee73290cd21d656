"""The methods of a pool."""

import os
import socket
import threading

import fiber

HERE = socket.gethostname()
ready = "nobody has called the initializer"


def prepare(word):
    global ready
    ready = word


def square(x):
    return x * x


def add(x, y=0, *, z=0):
    return x + y + z


def where(_):
    return socket.gethostname()


def word(_):
    return ready


def pid(_):
    return socket.gethostname(), os.getpid()


if __name__ == "__main__":
    with fiber.Pool(2, prepare, ("ready",)) as pool:
        assert pool.map(square, range(1000)) == [x * x for x in range(1000)]
        assert pool.map(square, []) == []
        assert list(pool.imap(square, range(100), chunksize=7)) == [x * x for x in range(100)]
        assert sorted(pool.imap_unordered(square, range(100))) == [x * x for x in range(100)]
        assert pool.starmap(add, [(1, 2), (3, 4)]) == [3, 7]
        assert pool.apply(add, (1,), {"y": 2, "z": 3}) == 6
        assert set(pool.map(word, range(20))) == {"ready"}

        places = set(pool.map(where, range(100), chunksize=1))
        assert HERE not in places, places
        assert len(places) <= 2, places

        offset = 10
        assert pool.map(lambda x: x + offset, range(3)) == [10, 11, 12]

        class Local:
            def __init__(self, value):
                self.value = value

            def __call__(self, x):
                return Local(self.value * x)

        assert [found.value for found in pool.map(Local(7), range(3))] == [0, 7, 14]

        heard, done = [], threading.Event()
        result = pool.map_async(square, range(3), callback=lambda r: (heard.append(r), done.set()))
        assert result.get(60) == [0, 1, 4]
        assert result.successful()
        assert done.wait(60)
        assert heard == [[0, 1, 4]]
        failed = threading.Event()
        pool.apply_async(square, ("x",), error_callback=lambda e: (heard.append(e), failed.set()))
        assert failed.wait(60)
        assert isinstance(heard[1], TypeError)

    with fiber.Pool(1, maxtasksperchild=2) as pool:
        assert len(set(pool.map(pid, range(6), chunksize=1))) == 3
    print("done")
