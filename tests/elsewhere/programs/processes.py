"""Processes elsewhere: their ends, their children, and what they print."""

import os
import signal
import socket
import sys
import time

import fiber
from fiber import connection

HERE = socket.gethostname()


def leave(code):
    sys.exit(code)


def fail():
    raise ValueError("as it should")


def sleep():
    time.sleep(600)


def deaf(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(600)


def abort():
    os.kill(os.getpid(), signal.SIGUSR1)


def family(results, depth):
    results.put((depth, socket.gethostname(), fiber.parent_process().pid, os.getpid()))
    if depth:
        child = fiber.Process(target=family, args=(results, depth - 1))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert fiber.active_children() == []


def parent_of_daemon(results):
    child = fiber.Process(target=sleep, daemon=True)
    child.start()
    results.put(child.pid)


def who(results):
    me = fiber.current_process()
    results.put((me.name, me.daemon, me.authkey == results.get(), sys.argv[1:]))


if __name__ == "__main__":
    three, failed, killed, patient, stubborn, signalled = (
        fiber.Process(target=leave, args=(3,)),
        fiber.Process(target=fail),
        fiber.Process(target=sleep),
        fiber.Process(target=sleep),
        fiber.Process(target=deaf, args=(ready := fiber.Event(),)),
        fiber.Process(target=abort),
    )
    everyone = [three, failed, killed, patient, stubborn, signalled]
    assert {process.exitcode for process in everyone} == {None}
    for process in everyone:
        process.start()
    assert len({process.pid for process in everyone if process.pid is not None}) >= 1
    assert sorted(p.name for p in fiber.active_children())[-1] == "Process-6"
    for process in (three, failed, signalled):
        process.join(60)
    assert (three.exitcode, failed.exitcode, signalled.exitcode) == (3, 1, -signal.SIGUSR1)
    assert not three.is_alive()
    patient.join(0.05)
    assert patient.is_alive()
    assert patient.exitcode is None
    assert connection.wait([patient.sentinel, killed.sentinel], 0.05) == []
    killed.kill()
    assert connection.wait([patient.sentinel, killed.sentinel], 60) == [killed.sentinel]
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    patient.terminate()
    patient.join(60)
    assert patient.exitcode == -signal.SIGTERM
    assert ready.wait(60)
    stubborn.terminate()
    stubborn.join(0.3)
    assert stubborn.is_alive()
    stubborn.kill()
    stubborn.join(60)
    assert stubborn.exitcode == -signal.SIGKILL
    assert fiber.active_children() == []

    results = fiber.Queue()
    child = fiber.Process(target=family, args=(results, 2))
    child.start()
    told = [results.get(timeout=60) for _ in range(3)]
    child.join(60)
    assert child.exitcode == 0
    assert [depth for depth, *_ in told] == [2, 1, 0]
    places = [place for _, place, *_ in told]
    assert len({*places, HERE}) == 4, places
    assert told[0][2] == os.getpid()
    assert told[1][2] == told[0][3]

    child = fiber.Process(target=parent_of_daemon, args=(results,))
    child.start()
    assert results.get(timeout=60)
    child.join(60)
    assert child.exitcode == 0

    questions = fiber.Queue()
    questions.put(bytes(fiber.current_process().authkey))
    child = fiber.Process(target=who, args=(questions,), name="somebody", daemon=True)
    child.start()
    child.join(60)
    assert questions.get(timeout=60) == ("somebody", True, True, sys.argv[1:])
    print("done")
