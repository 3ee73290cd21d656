"""Strangers at the sockets of a live session: refused, told of once, nothing of theirs unpickled.

Each test has a pool that works while strangers do their worst. What they send ends with a pickle
that would create a file, and an audit hook listens for its name being looked up in this process.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import pickle
import random
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.runtime.strangers import (
    ATTACKS,
    HELLO_SIZE,
    PATIENCE,
    Attack,
    Live,
    call,
    read_exactly,
    read_to_the_end,
    sockets_of,
    warnings_in,
)

import fiber
from fiber.errors import AuthenticationError
from fiber.runtime import endpoint as endpoint_module
from fiber.runtime import session
from fiber.runtime.endpoint import HELLO
from fiber.wire import framing
from fiber.wire.auth import CallerHandshake, ListenerHandshake, new_secret
from fiber.wire.channel import connect
from fiber.wire.framing import FrameError, FrameReader, encode


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_stranger_is_refused_and_told_of_once(
    live: Live, bomb: bytes, caplog: pytest.LogCaptureFixture, attack: Attack
) -> None:
    for _ in range(5):
        with call(live.path) as sock:
            with contextlib.suppress(ConnectionError):
                attack(sock, bomb)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            answer = read_to_the_end(sock)
            assert len(answer) <= HELLO_SIZE, "a stranger got more than a greeting"
    live.goes_on()
    [warning] = warnings_in(caplog)
    assert "refused a connection" in warning
    assert session.secret().hex() not in warning


def test_a_stranger_who_leaves_at_once_disturbs_nobody(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(200):
        call(live.path).close()
    live.goes_on()
    assert len(warnings_in(caplog)) <= 1


@pytest.mark.parametrize("sent", [0, 1, 8, HELLO_SIZE, HELLO_SIZE + 31])
def test_a_stranger_who_stops_half_way_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch,
    live: Live,
    caplog: pytest.LogCaptureFixture,
    sent: int,
) -> None:
    monkeypatch.setattr(endpoint_module, "HANDSHAKE_TIMEOUT", 0.3)
    strangers = [call(live.path) for _ in range(5)]
    began = time.monotonic()
    for sock in strangers:
        answer = CallerHandshake(new_secret()).feed(read_exactly(sock, HELLO_SIZE))
        sock.sendall(answer[:sent])
    for sock in strangers:
        with sock:
            assert read_to_the_end(sock) == b""
    assert time.monotonic() - began < 5
    live.goes_on()
    assert len(warnings_in(caplog)) == 1


def test_a_stranger_who_sends_one_byte_at_a_time_gains_no_time(
    monkeypatch: pytest.MonkeyPatch, live: Live
) -> None:
    monkeypatch.setattr(endpoint_module, "HANDSHAKE_TIMEOUT", 0.5)
    began = time.monotonic()
    with call(live.path) as sock:
        answer = CallerHandshake(new_secret()).feed(read_exactly(sock, HELLO_SIZE))
        with contextlib.suppress(ConnectionError):
            for byte in answer:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)  # the point of the test
        assert read_to_the_end(sock) == b""
    assert time.monotonic() - began < 5


def record(path: str) -> tuple[bytes, bytes]:
    """Have one of the session connect through a proxy; return what both sides said."""
    said = {"caller": b"", "listener": b""}

    def pass_on(source: socket.socket, target: socket.socket, who: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                said[who] += data
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as proxy:
        proxy.bind(f"{folder}/proxy")
        proxy.listen()
        threads: list[threading.Thread] = []

        def serve() -> None:
            caller, _ = proxy.accept()
            with caller, call(path) as listener:
                for way in ((caller, listener, "caller"), (listener, caller, "listener")):
                    threads.append(threading.Thread(target=pass_on, args=way))
                    threads[-1].start()
                for thread in threads:
                    thread.join(PATIENCE)

        server = threading.Thread(target=serve)
        server.start()
        channel = connect(f"unix:{folder}/proxy", session.secret(), PATIENCE)
        channel.send(HELLO, pickle.dumps({"token": "nobody's"}))
        with pytest.raises((EOFError, OSError)):
            channel.read()
        channel.close()
        server.join(PATIENCE)
    return said["caller"], said["listener"]


def test_a_recorded_handshake_is_worth_nothing(
    live: Live, bomb: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caller, listener = record(live.path)
    assert len(caller) > HELLO_SIZE + 32
    assert len(listener) == HELLO_SIZE + 32
    caplog.clear()
    hello = b"".join(bytes(piece) for piece in encode(HELLO, bomb))
    for sent in (caller, caller[: HELLO_SIZE + 32] + hello, listener + caller):
        with call(live.path) as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(sent)
            assert len(read_to_the_end(sock)) == HELLO_SIZE
    live.goes_on()
    assert any("secret" in warning for warning in warnings_in(caplog))


def test_who_belongs_to_the_session_but_is_not_expected_is_refused(live: Live) -> None:
    for hello in ({"token": "guessed"}, {}, {"token": ""}):
        channel = connect(f"unix:{live.path}", session.secret(), PATIENCE)
        channel.send(HELLO, pickle.dumps(hello))
        channel.sock.settimeout(PATIENCE)
        with pytest.raises((EOFError, ConnectionError)):
            channel.read()
        channel.close()
    live.goes_on()


def test_hundreds_of_strangers_at_once_keep_nobody_out(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            stack.enter_context(call(live.path))
        live.goes_on()
        with fiber.Pool(2) as another:
            assert another.map(math.factorial, range(20)) == [math.factorial(n) for n in range(20)]
        live.goes_on()
    assert len(warnings_in(caplog)) == 1


def test_a_rush_of_strangers_keeps_nobody_out(live: Live, start_script: Any) -> None:
    """Another process connects and lets go, as fast as it can, while workers want to get in."""
    rush = start_script(
        """
import collections, socket, sys
held = collections.deque()
print("begin", flush=True)
while True:
    try:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(1)
        sock.connect(sys.argv[1])
    except OSError:
        continue
    held.append(sock)
    if len(held) > 200:
        held.popleft().close()
""",
        live.path,
    )
    assert rush.stdout.readline() == "begin\n"
    for _ in range(3):
        with fiber.Pool(2) as another:
            result = another.map_async(math.factorial, range(20))
            assert result.get(PATIENCE) == [math.factorial(n) for n in range(20)]
    assert rush.poll() is None
    rush.kill()
    rush.wait()


# From outside -----------------------------------------------------------------------------------

PROGRAM = """
import sys, time
import fiber

def square(x):
    return x * x

def nested(pipe_path):
    with fiber.Pool(1) as pool:
        assert pool.map(square, range(10)) == [x * x for x in range(10)]
        open(pipe_path, "w").close()
        while True:
            assert pool.map(square, range(500)) == [x * x for x in range(500)]

if __name__ == "__main__":
    child = fiber.Process(target=nested, args=("nested-is-up",))
    child.start()
    with fiber.Pool(2) as pool:
        print("up", flush=True)
        while True:
            assert pool.map(square, range(500)) == [x * x for x in range(500)]
            assert child.is_alive()
            print("right", flush=True)
"""


def folder_of(pid: int) -> Path:
    [folder] = Path(tempfile.gettempdir()).glob(f"fiber-*-{pid}-*")
    return folder


def end(program: subprocess.Popen[str]) -> str:
    """Kill the master; return what was written to standard error until the last one had ended."""
    program.kill()
    return program.communicate(timeout=PATIENCE)[1]


def test_every_socket_of_a_program_refuses(start_script: Any, tmp_path: Path, bomb: bytes) -> None:
    """That of a process that was started and has a pool of its own as well."""
    program: subprocess.Popen[str] = start_script(PROGRAM)
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "nested-is-up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    paths = sockets_of(folder_of(program.pid))
    assert len(paths) == 2
    for path in paths:
        for attack in ATTACKS * 3:
            with call(path) as sock:
                with contextlib.suppress(ConnectionError):
                    attack(sock, bomb)
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
                assert len(read_to_the_end(sock)) <= HELLO_SIZE
    for _ in range(20):
        assert program.stdout.readline() == "right\n"
    lines = end(program).splitlines()
    refusals = [line for line in lines if "refused a connection" in line]
    assert len(refusals) == len(set(refusals)), "a refusal was told of twice"
    assert 2 <= len(refusals) <= 12


def test_only_the_user_can_enter_and_the_secret_is_nowhere_to_be_seen(
    start_script: Any, tmp_path: Path
) -> None:
    program: subprocess.Popen[str] = start_script(PROGRAM)
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "nested-is-up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    folder = folder_of(program.pid)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.stat().st_uid == os.getuid()
    secret = (folder / "secret").read_bytes()
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert len(secret) == 32
    forms = [
        secret[:16],
        secret.hex().encode()[:32],
        base64.b64encode(secret)[:20],
        base64.urlsafe_b64encode(secret)[:20],
        repr(secret)[2:20].encode(),
    ]
    processes = [program.pid, *(p.pid for p in psutil.Process(program.pid).children(True))]
    assert len(processes) >= 5, "master, agent, child and three workers were expected"
    seen = 0
    for pid in processes:
        for what in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                shown = Path(f"/proc/{pid}/{what}").read_bytes()
                assert not [form for form in forms if form in shown], f"secret in {what} of {pid}"
                seen += bool(shown)
    assert seen or sys.platform != "linux"
    end(program)


# Fuzzing ----------------------------------------------------------------------------------------

FUZZ_SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
"""Each test goes on for half of it at least, and to its number: a million altered inputs in all."""

HANDSHAKES, FRAMES = 250_000, 800_000


def mutate(data: bytes, chance: random.Random) -> tuple[bytes, int]:
    """Return `data` with something wrong, and how many of its first bytes are as they were."""
    place = chance.randrange(len(data))
    how = chance.random()
    if how < 0.4:
        changed = data[place] ^ chance.randrange(1, 256)
        return data[:place] + bytes([changed]) + data[place + 1 :], place
    if how < 0.55:
        return data[:place] + chance.randbytes(chance.randrange(1, 20)) + data[place:], place
    if how < 0.7:
        return data[:place] + data[place + chance.randrange(1, 20) :], place
    if how < 0.8:
        size = min(8, len(data) - place)
        return data[:place] + b"\xff" * size + data[place + size :], place
    if how < 0.9:
        return data[:place] + chance.randbytes(len(data) - place), place
    return data[:place], place


@pytest.mark.slow
@pytest.mark.timeout(120 + 2 * FUZZ_SECONDS)
def test_no_altered_handshake_gets_in(bomb: bytes) -> None:
    chance = random.Random(os.environ.get("FUZZ_SEED", "1"))
    secret = new_secret()
    end = time.monotonic() + FUZZ_SECONDS / 2
    done = 0
    recorded = CallerHandshake(secret).feed(ListenerHandshake(secret).greeting)
    while done < HANDSHAKES or time.monotonic() < end:
        listener = ListenerHandshake(secret)
        right = recorded
        if done % 4 == 0:
            recorded = right = CallerHandshake(secret).feed(listener.greeting)
        sent = mutate(right, chance)[0] + bomb
        if sent.startswith(right):
            continue
        done += 1
        try:
            while sent and listener.wants > 0:
                step = min(listener.wants, chance.randrange(1, 100))
                piece, sent = sent[:step], sent[step:]
                assert listener.feed(piece) is None, "a stranger got in"
        except AuthenticationError:
            pass


@pytest.mark.slow
@pytest.mark.timeout(120 + 2 * FUZZ_SECONDS)
def test_no_altered_frame_does_harm(bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes, frames before the damage are whole, and the only error is a FrameError."""
    monkeypatch.setattr(framing, "MAX_SIZE", 1 << 16)  # memory is not what is tested here
    chance = random.Random(os.environ.get("FUZZ_SEED", "1"))
    end = time.monotonic() + FUZZ_SECONDS / 2
    done = refused = 0
    while done < FRAMES or time.monotonic() < end:
        messages = [
            (
                chance.randrange(256),
                chance.randbytes(chance.randrange(30)) + bomb,
                [chance.randbytes(chance.randrange(9)) for _ in range(chance.randrange(3))],
            )
            for _ in range(chance.randrange(1, 4))
        ]
        ends: list[int] = []
        stream = b""
        for message in messages:
            stream += b"".join(bytes(piece) for piece in encode(*message))
            ends.append(len(stream))
        for _ in range(20):
            altered, intact = mutate(stream, chance)
            reader = FrameReader(None)  # type: ignore[arg-type]  # `feed` needs no socket
            cut = chance.randrange(len(altered) + 1)
            frames = []
            try:
                frames += reader.feed(altered[:cut])
                frames += reader.feed(altered[cut:])
            except FrameError:
                refused += 1
            else:
                whole = sum(end <= intact for end in ends)
                got = [(f.kind, bytes(f.body), [bytes(b) for b in f.buffers]) for f in frames]
                assert got[:whole] == messages[:whole]
            done += 1
    assert refused > 100


@pytest.mark.slow
@pytest.mark.timeout(120 + 2 * FUZZ_SECONDS)
def test_thousands_of_altered_handshakes_disturb_nobody(
    live: Live, bomb: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(os.environ.get("FUZZ_SEED", "1"))
    hello = b"".join(bytes(piece) for piece in encode(HELLO, bomb))
    end = time.monotonic() + FUZZ_SECONDS / 2
    done = 0
    held: list[socket.socket] = []
    while done < 4_000 or time.monotonic() < end:
        sock = call(live.path)
        held.append(sock)
        answer = CallerHandshake(session.secret()).feed(read_exactly(sock, HELLO_SIZE))
        sent = mutate(answer, chance)[0] + hello
        if sent.startswith(answer):
            continue
        with contextlib.suppress(ConnectionError):
            sock.sendall(sent)
        done += 1
        if len(held) > 100:
            held.pop(chance.randrange(len(held))).close()
    for sock in held:
        sock.close()
    live.goes_on()
    assert len(warnings_in(caplog)) <= 12
