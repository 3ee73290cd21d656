"""Managers: their own process is elsewhere, and so are some who use them."""

import queue
import socket

import fiber
from fiber.managers import AsyncManager, BaseManager

HERE = socket.gethostname()


class Counter:
    def __init__(self, start):
        self.value = start

    def add(self, number):
        self.value += number
        return self.value

    def where(self):
        return socket.gethostname()


class OwnManager(BaseManager):
    pass


OwnManager.register("Counter", Counter)


class OwnAsync(AsyncManager):
    pass


OwnAsync.register("Counter", Counter)


def change(numbers, names, space, lock, box):
    with lock:
        numbers.append(3)
        names["who"] = socket.gethostname()
        space.y = space.x + 1
    box.put("from elsewhere")


def add(counter):
    return counter.add(5)


if __name__ == "__main__":
    with fiber.Manager() as manager:
        numbers, names = manager.list([1, 2]), manager.dict(a=1)
        space, lock, box = manager.Namespace(x=6), manager.Lock(), manager.Queue()
        child = fiber.Process(target=change, args=(numbers, names, space, lock, box))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert list(numbers) == [1, 2, 3]
        assert names["who"] not in (None, HERE)
        assert space.y == 7
        assert box.get(timeout=60) == "from elsewhere"
        try:
            box.get(timeout=0.05)
            raise AssertionError("it should be empty")
        except queue.Empty:
            pass
        nested = manager.list([manager.dict(deep=1)])
        nested[0]["deep"] = 2
        assert nested[0]["deep"] == 2
        try:
            names["nothing"]
            raise AssertionError("no KeyError")
        except KeyError:
            pass
        with manager.Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]

    with OwnManager() as own:
        counter = own.Counter(10)
        assert counter.where() != HERE
        with fiber.Pool(1) as pool:
            assert pool.apply(add, (counter,)) == 15
        assert counter.add(1) == 16

    with OwnAsync() as asynchronous:
        counters = [asynchronous.Counter(number) for number in range(3)]
        results = [counter.add(1) for counter in counters]
        assert [result.get() for result in results] == [1, 2, 3]
    print("done")
