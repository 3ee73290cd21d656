"""What a task can do wrong."""

import os
import signal
import sys
import threading
import time
import traceback

import fiber


class OwnError(Exception):
    def __init__(self, code, text):
        super().__init__(code, text)
        self.code = code


def fail(x):
    if x == 3:
        raise OwnError(x, "three")  # the line of the traceback
    return x


def leave(x):
    if x == 3:
        print("last words", file=sys.stderr)
        os._exit(7)
    return x


def kill(x):
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def crash(x):
    return threading.Lock() if x == 3 else x


def sleep(x):
    time.sleep(x)
    return x


if __name__ == "__main__":
    with fiber.Pool(2) as pool:
        try:
            pool.map(fail, range(5))
        except OwnError as error:
            code = error.code
            text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        assert code == 3
        assert 'raise OwnError(x, "three")  # the line of the traceback' in text, text

        found = pool.map(leave, range(5), return_exceptions=True)
        assert found[:3] + found[4:] == [0, 1, 2, 4]
        assert isinstance(found[3], fiber.WorkerDied)
        assert "item 3 of leave ended its worker 3 times" in str(found[3]), found[3]
        assert "ended with exit code 7" in str(found[3]), found[3]
        assert "last words" in str(found[3]), found[3]
        print(str(found[3]).splitlines()[0])

        found = pool.map(kill, range(5), return_exceptions=True)
        assert "SIGKILL" in str(found[3]), found[3]

        found = pool.map(crash, range(5), return_exceptions=True)
        assert found[:3] + found[4:] == [0, 1, 2, 4]
        assert isinstance(found[3], fiber.SerializationError), found[3]
        assert "lock" in str(found[3])

    with fiber.Pool(2, timeout=1.5) as pool:
        found = pool.map(sleep, [0, 600, 0], return_exceptions=True)
        assert [found[0], found[2]] == [0, 0]
        assert isinstance(found[1], fiber.TaskTimeout), found[1]
    print("done")
