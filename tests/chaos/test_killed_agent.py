"""The agent, from which workers and processes are forked, is killed: a new one takes its place."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

import fiber


def kill_agents(agents: Callable[[], list[int]]) -> list[int]:
    killed = agents()
    assert killed
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    return killed


def expect_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    for pid in pids:
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, psutil.Process(pid)
            time.sleep(0.01)


def expect_one(agents: Callable[[], list[int]]) -> int:
    deadline = time.monotonic() + 5
    while len(found := agents()) != 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.005)
    return found[0]


@pytest.mark.parametrize("call", ["map", "imap", "imap_unordered"])
def test_a_call_goes_on_with_a_new_agent(call: str, agents: Callable[[], list[int]]) -> None:
    with fiber.Pool(2, retries=10) as pool:
        results = iter(pool.imap(lambda i: i, range(4)))  # all is up
        assert list(results) == [0, 1, 2, 3]
        workers = pool.pids()
        if call == "map":
            result = pool.map_async(lambda i: (time.sleep(0.0005), i)[1], range(3000))
            killed = kill_agents(agents)
            found = result.get(30)
        else:
            stream = getattr(pool, call)(lambda i: (time.sleep(0.0005), i)[1], range(3000))
            found = [next(stream) for _ in range(100)]
            killed = kill_agents(agents)
            found += list(stream)
        assert (sorted(found) if call == "imap_unordered" else found) == list(range(3000))
        expect_gone([*killed, *workers])
        assert expect_one(agents) not in killed
        assert not set(pool.pids()) & set(workers)


def test_killed_again_and_again(agents: Callable[[], list[int]]) -> None:
    with fiber.Pool(2, retries=20) as pool:
        for _ in range(5):
            result = pool.map_async(lambda i: (time.sleep(0.001), i)[1], range(400))
            pool.apply(abs, (-1,))
            killed = kill_agents(agents)
            assert result.get(30) == list(range(400))
            expect_gone(killed)
            expect_one(agents)


def test_killed_while_the_pool_is_idle(agents: Callable[[], list[int]]) -> None:
    with fiber.Pool(2) as pool:
        pool.map(abs, range(4))
        workers = pool.pids()
        kill_agents(agents)
        expect_gone(workers)
        assert pool.map(abs, range(-100, 0)) == list(range(100, 0, -1))


def test_killed_while_the_pool_ends(agents: Callable[[], list[int]]) -> None:
    pool = fiber.Pool(2)
    result = pool.map_async(lambda i: (time.sleep(0.01), i)[1], range(40))
    pool.apply(abs, (-1,))
    pool.close()
    kill_agents(agents)
    pool.join()
    assert result.get(1) == list(range(40))


def test_terminate_after_the_agent_was_killed(agents: Callable[[], list[int]]) -> None:
    began = time.monotonic()
    with fiber.Pool(2) as pool:
        pool.map(abs, range(4))
        kill_agents(agents)
    pool.join()
    assert time.monotonic() - began < 5


def test_a_process_ends_with_its_agent_and_the_next_one_starts(
    agents: Callable[[], list[int]],
) -> None:
    process = fiber.Process(target=time.sleep, args=(60,))
    process.start()
    killed = kill_agents(agents)
    process.join(5)
    assert process.exitcode == -signal.SIGKILL
    assert not process.is_alive()
    expect_gone([*killed, process.pid])
    after = fiber.Process(target=time.sleep, args=(0,))
    after.start()
    after.join(10)
    assert after.exitcode == 0


def test_a_process_started_right_after_the_kill(agents: Callable[[], list[int]]) -> None:
    """Nobody may have noticed yet: the start succeeds, or says what happened, and never hangs."""
    for _ in range(5):
        first = fiber.Process(target=time.sleep, args=(0,))
        first.start()
        first.join(10)
        kill_agents(agents)
        second = fiber.Process(target=time.sleep, args=(0,))
        try:
            second.start()
        except fiber.StartError:  # it says so
            continue
        second.join(10)
        assert second.exitcode in (0, -signal.SIGKILL)


def test_an_orphan_that_tries_to_survive_is_killed(program: Callable[..., Any]) -> None:
    """Nested processes and pools, deaf to signals, all die with the agent that forked them."""
    running = program(
        """\
import os, signal, sys, time
import fiber

def deaf(depth):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if depth:
        fiber.Process(target=deaf, args=(depth - 1,)).start()
        pool = fiber.Pool(1)
        pool.map_async(time.sleep, [60])
    os.write(1, b'deaf %d\\n' % depth)
    time.sleep(60)

if __name__ == '__main__':
    p = fiber.Process(target=deaf, args=(2,))
    p.start()
    p.join()
    print('code', p.exitcode, flush=True)
    sys.stdin.readline()
""",
        stdin=-1,
    )
    running.wait_for("deaf 0")
    for pid in running.agents():
        os.kill(pid, signal.SIGKILL)
    running.wait_for("code -9")
    expect_gone([process.pid for process in running.processes() if process.pid != running.pid])
    running.process.stdin.close()
    assert running.end(within=5) == 0
    assert running.err == ""
    running.leaves_nothing()
