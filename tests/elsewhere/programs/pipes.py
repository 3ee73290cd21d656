"""Pipes between the master and processes elsewhere, and among these."""

import fiber
from fiber import connection


def echo(end):
    while True:
        try:
            end.send(end.recv())
        except EOFError:
            break
    end.close()


def leave(end):
    end.send_bytes(b"last words")


def read(end, results):
    total = 0
    while True:
        try:
            total += len(end.recv_bytes())
        except EOFError:
            break
    results.put(total)


def write(end):
    for _ in range(8):
        end.send_bytes(bytes(1 << 20))
    end.close()


def start(target, *args):
    process = fiber.Process(target=target, args=args)
    process.start()
    return process


def end(*processes):
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(processes)


if __name__ == "__main__":
    ours, theirs = fiber.Pipe()
    child = start(echo, theirs)
    theirs.close()
    large = bytes(range(256)) * (8 << 12)  # 8 MB
    for item in ("hello", {"a": [1, 2]}, large):
        ours.send(item)
        assert ours.recv() == item
    assert not ours.poll()
    ours.close()
    end(child)

    reader, writer = fiber.Pipe(duplex=False)
    child = start(leave, writer)
    writer.close()
    assert reader.poll(60)
    assert reader.recv_bytes() == b"last words"
    try:
        reader.recv_bytes()
        raise AssertionError("no end of file")
    except EOFError:
        pass
    end(child)

    reader, writer = fiber.Pipe(duplex=False)
    results = fiber.Queue()
    children = [start(read, reader, results), start(write, writer)]
    reader.close()
    writer.close()
    assert results.get(timeout=60) == 8 << 20
    end(*children)

    pairs = [fiber.Pipe() for _ in range(3)]
    children = [start(leave, theirs) for _, theirs in pairs]
    for _, theirs in pairs:
        theirs.close()
    waiting = [ours for ours, _ in pairs]
    while waiting:
        for found in connection.wait(waiting, 60):
            assert found.recv_bytes() == b"last words"
            waiting.remove(found)
    end(*children)
    print("done")
