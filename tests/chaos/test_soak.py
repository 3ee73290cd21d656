"""A minute of everything at once, from several threads, while workers are killed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

SOURCE = """\
import contextlib, faulthandler, gc, os, random, signal, sys, threading, time
import psutil
import fiber

SECONDS = float(sys.argv[1])
if __name__ == '__main__':
    faulthandler.dump_traceback_later(SECONDS + 30, exit=True)  # it hangs: say where
me = psutil.Process()
over = threading.Event()
counts = {}
failures = []

def square(x):
    return x * x

def brief(x):
    time.sleep(0.0005)
    return x * x

def blob(size):
    return bytes(size)

def raises(x):
    raise KeyError(x)

def each(f, n):
    return [f(x) for x in range(n)]

def op_map(pool, r):
    n, f = r.randrange(300), r.choice([square, brief])
    assert pool.map(f, range(n), r.choice([None, 1, 7])) == each(square, n)

def op_imap(pool, r):
    n = r.randrange(300)
    assert list(pool.imap(brief, range(n))) == each(square, n)

def op_imap_unordered(pool, r):
    n = r.randrange(300)
    assert sorted(pool.imap_unordered(square, range(n))) == each(square, n)

def op_abandon(pool, r):
    stream = pool.imap(square, iter(int, 1))
    for _ in range(r.randrange(50)):
        assert next(stream) == 0

def op_apply(pool, r):
    n = r.randrange(1000)
    assert pool.apply(square, (n,)) == n * n

def op_many(pool, r):
    results = [pool.apply_async(square, (i,)) for i in range(50)]
    assert [x.get(60) for x in results] == each(square, 50)

def op_blobs(pool, r):
    sizes = [r.randrange(1 << 18) for _ in range(8)]
    assert list(map(len, pool.map(blob, sizes))) == sizes

def op_starmap(pool, r):
    assert pool.starmap(pow, [(i, 2) for i in range(100)]) == each(square, 100)

def op_raises(pool, r):
    try:
        pool.map(raises, range(5))
    except KeyError as error:
        assert error.args == (0,)
    else:
        raise AssertionError('nothing raised')

def op_late(pool, r):
    results = pool.map(time.sleep, [0, 0, 5], timeout=0.3, return_exceptions=True)
    assert results[:2] == [None, None] and isinstance(results[2], fiber.TaskTimeout), results

def op_pool(pool, r):
    with fiber.Pool(r.choice([1, 2]), retries=20) as short:
        assert short.map(square, range(20)) == each(square, 20)

def op_process(pool, r):
    code = r.randrange(3)
    p = fiber.Process(target=sys.exit, args=(code,))
    p.start()
    p.join(60)
    assert p.exitcode == code
    p.close()

OPERATIONS = [value for name, value in list(globals().items()) if name.startswith('op_')]
RARE = {op_late, op_pool, op_process}

def work(seed, pools):
    r = random.Random(seed)
    while not over.is_set():
        operation = r.choice(OPERATIONS)
        if operation in RARE and r.random() < 0.7:
            continue
        try:
            operation(r.choice(pools), r)
        except BaseException as error:
            failures.append(f'{operation.__name__}: {type(error).__name__}: {error}')
            over.set()
            raise
        counts[operation.__name__] = counts.get(operation.__name__, 0) + 1

def kill(pools):
    r = random.Random(99)
    while not over.wait(r.uniform(0.1, 0.3)):
        pids = r.choice(pools).pids()
        if pids:
            with contextlib.suppress(ProcessLookupError):
                pid = r.choice(pids)
                if r.random() < 0.3:
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(0.05)
                os.kill(pid, signal.SIGKILL)
                counts['killed'] = counts.get('killed', 0) + 1

def measure():
    gc.collect()
    return me.memory_info().rss / 2**20, me.num_fds(), me.num_threads()

def main():
    pools = [fiber.Pool(2, retries=20), fiber.Pool(2, retries=20, maxtasksperchild=200)]
    threads = [threading.Thread(target=work, args=(i, pools)) for i in range(3)]
    threads.append(threading.Thread(target=kill, args=(pools,)))
    for thread in threads:
        thread.start()
    begin = time.monotonic()
    samples = []
    while time.monotonic() < begin + SECONDS and not over.wait(SECONDS / 30):
        samples.append(measure())
    over.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), 'a thread hangs'
    for pool in pools:
        pool.close()
        pool.join()
    print(counts)
    print('failures', failures)
    third = len(samples) // 3
    for name, values in zip(('memory', 'fds', 'threads'), zip(*samples)):
        print(name, max(values[third:2 * third]), max(values[2 * third:]))
    print('end', measure()[1])

if __name__ == '__main__':
    main()
"""


@pytest.mark.slow
def test_a_minute_of_everything(program: Callable[..., Any]) -> None:
    running = program(SOURCE, "60")
    assert running.end(within=100) == 0, running.out + running.err
    print(running.out)
    assert "failures []" in running.out
    assert running.err == ""

    def of(name: str) -> list[float]:
        found = re.search(rf"^{name} (.*)$", running.out, re.MULTILINE)
        assert found is not None
        return [float(number) for number in found[1].split()]

    # The last third against the middle one: by then all that is ever cached is there.
    middle, last = of("memory")
    assert last < middle + 16, f"memory grew from {middle:.0f} to {last:.0f} MiB"
    middle, last = of("fds")
    assert last < middle + 20, f"open descriptors grew from {middle} to {last}"
    counts = eval(running.out.splitlines()[0])
    assert len(counts) == 13, counts
    assert counts["killed"] > 100
    running.leaves_nothing()
