"""Queues, locks, values and managers between the master and processes elsewhere."""

import socket
import sys

import fiber

HERE = socket.gethostname()


def work(tasks, results):
    for number in iter(tasks.get, None):
        results.put((number, number * number, socket.gethostname()))


def join(tasks):
    while True:
        tasks.get()
        tasks.task_done()


def echo(one, other):
    for item in iter(one.get, None):
        other.put(item)


def bring(queue, ending):
    """Make a queue here, and hand it out."""
    own = fiber.Queue()
    queue.put(own)
    queue.put(own)
    assert own.get(timeout=60) == "hello"
    own.put("goodbye")
    assert ending.get(timeout=60) == "end"


def use(queue):
    """Use a queue that is neither the master's nor ours."""
    queue.get().put("hello")


def count(value, array, times):
    for _ in range(times):
        with value.get_lock():
            value.value += 1
        with array.get_lock():
            array[1] += 2


def meet(barrier, event, condition, semaphore, lock, results):
    barrier.wait(60)
    with lock, lock, semaphore:
        results.put("in")
    event.wait(60)
    with condition:
        condition.notify_all()


def start(target, *args):
    process = fiber.Process(target=target, args=args)
    process.start()
    return process


def end(*processes):
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def queues():
    tasks, results = fiber.Queue(), fiber.SimpleQueue()
    workers = [start(work, tasks, results) for _ in range(2)]
    for number in range(200):
        tasks.put(number)
    found = [results.get() for _ in range(200)]
    assert sorted(pair[:2] for pair in found) == [(x, x * x) for x in range(200)]
    assert HERE not in {name for _, _, name in found}
    for _ in workers:
        tasks.put(None)
    end(*workers)

    joinable = fiber.JoinableQueue()
    worker = fiber.Process(target=join, args=(joinable,), daemon=True)
    worker.start()
    for number in range(50):
        joinable.put(number)
    joinable.join()
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)

    one, other = fiber.Queue(), fiber.Queue()
    worker = start(echo, one, other)
    large = bytes(range(256)) * (8 << 12)  # 8 MB
    for _ in range(3):
        one.put(large)
    for _ in range(3):
        assert other.get(timeout=60) == large
    one.put(None)
    end(worker)

    queue, ending = fiber.Queue(), fiber.Queue()
    home = start(bring, queue, ending)
    end(start(use, queue))
    brought = queue.get(timeout=60)
    assert brought.get(timeout=60) == "goodbye"
    ending.put("end")
    end(home)


def locks():
    barrier, event, condition = fiber.Barrier(3), fiber.Event(), fiber.Condition()
    semaphore, lock, results = fiber.BoundedSemaphore(1), fiber.RLock(), fiber.Queue()
    args = (barrier, event, condition, semaphore, lock, results)
    workers = [start(meet, *args) for _ in range(2)]
    barrier.wait(60)
    assert [results.get(timeout=60) for _ in workers] == ["in", "in"]
    with condition:
        event.set()
        assert condition.wait(60)
    end(*workers)

    lock = fiber.Lock()
    with lock:
        worker = start(hold, lock, results)
        assert results.get(timeout=60) == "it is held"
    assert results.get(timeout=60) == "it is mine"
    end(worker)


def hold(lock, results):
    assert not lock.acquire(block=False)
    assert not lock.acquire(timeout=0.1)
    results.put("it is held")
    with lock:
        results.put("it is mine")


def values():
    value, array = fiber.Value("i", 5), fiber.Array("d", [1.0, 2.0, 3.0])
    workers = [start(count, value, array, 25) for _ in range(2)]
    count(value, array, 25)
    end(*workers)
    assert value.value == 80
    assert array[:] == [1.0, 152.0, 3.0]


if __name__ == "__main__":
    {"queues": queues, "locks": locks, "values": values}[sys.argv[1]]()
    print("done")
