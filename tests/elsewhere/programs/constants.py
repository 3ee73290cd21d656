"""Objects that each place fetches once: by handles, and as what the tasks of a call share."""

import functools
import glob
import os
import pickle
import signal
import time

import fiber
from fiber.runtime import session
from fiber.served.constant import ServedConstant

SIZE = 8 << 20
WORKERS = 2
fetched = 0  # bytes that were read of what lives in this process


class Data:
    """Bytes that travel beside their pickle, as those of an array."""

    def __init__(self, data):
        self.data = memoryview(data)

    def __reduce__(self):
        return Data, (pickle.PickleBuffer(self.data),)


def watch():
    read = ServedConstant.do_read

    def do_read(self, request, start, stop):
        global fetched
        fetched += stop - start
        read(self, request, start, stop)

    ServedConstant.do_read = do_read


def copies(_=None):
    return len(glob.glob(os.path.join(session.current().memory_folder(), "*.copy")))


def use(handle, barrier):
    barrier.wait(60)
    data = handle.get().data
    assert handle.get().data is data
    assert data.readonly
    barrier.wait(60)
    return os.getpid(), sum(data[:: 1 << 12])


def end(_):
    os.kill(os.getpid(), signal.SIGKILL)


def change(data, number):
    data = data.data
    found = sum(data[:: 1 << 12])
    data[0], data[1 << 12] = 77, number  # which nobody else shall see
    return found


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def bring(queue, ending):
    queue.put(fiber.put(Data(b"\1" * SIZE)))
    assert ending.get(timeout=60) == "end"


def handles(pool):
    global fetched
    handle, barrier = fiber.put(Data(b"\1" * SIZE)), fiber.Barrier(WORKERS)
    found = pool.starmap(use, [(handle, barrier)] * WORKERS, chunksize=1)
    assert len({pid for pid, _ in found}) == WORKERS
    assert {total for _, total in found} == {SIZE >> 12}
    assert SIZE < fetched < SIZE + (1 << 16), fetched
    assert pool.apply(copies) == 1

    # The next ones find it there, also in the place of one that was killed.
    assert isinstance(pool.map(end, [0], retries=0, return_exceptions=True)[0], fiber.WorkerDied)
    barrier = fiber.Barrier(WORKERS)  # the other breaks if the dead one had not yet let go of it
    found = pool.starmap(use, [(handle, barrier)] * WORKERS, chunksize=1)
    assert {total for _, total in found} == {SIZE >> 12}
    assert SIZE < fetched < SIZE + (1 << 16), fetched

    del handle
    until(lambda: pool.apply(copies) == 0)
    fetched = 0


def constants(pool):
    global fetched
    data = Data(bytearray(b"\1" * SIZE))
    assert set(pool.starmap(change, [(data, i) for i in range(60)])) == {SIZE >> 12}
    assert SIZE < fetched < SIZE + (1 << 16), fetched
    fetched = 0
    assert len(pool.map(functools.partial(change, data), range(30), chunksize=1)) == 30
    assert SIZE < fetched < SIZE + (1 << 16), fetched
    until(lambda: pool.apply(copies) == 0)


def others():
    """What another process has put is fetched from there."""
    queue, ending = fiber.Queue(), fiber.Queue()
    process = fiber.Process(target=bring, args=(queue, ending))
    process.start()
    handle = queue.get(timeout=60)
    assert sum(handle.get().data[:: 1 << 12]) == SIZE >> 12
    other = pickle.dumps(handle)
    ending.put("end")
    process.join(60)
    assert process.exitcode == 0
    del handle
    try:
        pickle.loads(other).get()
    except fiber.PeerDied:
        return
    raise AssertionError("its owner is gone")


if __name__ == "__main__":
    watch()
    fiber.config.workers_per_job = WORKERS
    with fiber.Pool(WORKERS) as pool:
        handles(pool)
        constants(pool)
    others()
    print("done")
