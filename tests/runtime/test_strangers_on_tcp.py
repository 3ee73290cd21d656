"""Strangers at the TCP port of a live session, which is open once processes elsewhere are wanted.

As in `test_strangers`, but from other hosts, and through TLS. Who knows the secret is no stranger;
still it shall not get anything but what belongs to the session, and break nothing but its own link.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.strangers import (
    ATTACKS,
    HELLO_SIZE,
    PATIENCE,
    Attack,
    Live,
    read_exactly,
    warnings_in,
)

from fiber.code import protocol
from fiber.errors import AuthenticationError
from fiber.runtime import endpoint as endpoint_module
from fiber.runtime import session
from fiber.runtime.endpoint import HELLO
from fiber.runtime.gateway import open_stream
from fiber.runtime.orders import ORDER
from fiber.runtime.outside import Outside
from fiber.wire import channel as wire
from fiber.wire.auth import CallerHandshake, new_secret
from fiber.wire.channel import Channel, authenticate
from fiber.wire.framing import HEADER, encode
from fiber.wire.tls import client_context, make_certificate

PROOF = 32
ALERT = 7  # bytes of what TLS says before it closes

Sock = Any  # a socket, plain or under TLS


class Port:
    """Of a session that is ready for processes elsewhere; none need be there."""

    def __init__(self) -> None:
        self.session = session.current()
        with self.session.loop:
            self._outside = Outside(self.session)
        self.number = self._outside.port
        self.certificate = self._outside.certificate
        self.context = client_context(self.certificate)
        self.address = f"tcp:127.0.0.1:{self.number}"
        self.secret = self.session.secret

    def plain(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.number), PATIENCE)

    def tls(self, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
        return (context or self.context).wrap_socket(self.plain())

    def channel(self) -> Channel:
        """Connect as a process of the session does."""
        return wire.connect(self.address, self.secret, PATIENCE, self.context)

    def close(self) -> None:
        with self.session.loop:
            self._outside.close()

    def let_in(self) -> None:
        """See that one of the session gets in."""
        self.channel().close()


@pytest.fixture
def port(live: Live) -> Iterator[Port]:
    port = Port()
    yield port
    port.close()


def read_to_the_end(sock: Sock) -> bytes:
    """Return all that comes until the other side closes; fails if it does not."""
    data = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while piece := sock.recv(1 << 16):
            data += piece
    return data


def closes(channel: Channel) -> bool:
    """Whether the other side closes, without a word more; fails if it does nothing."""
    channel.sock.settimeout(PATIENCE)
    try:
        while True:
            channel.read()
    except (EOFError, ConnectionError):
        return True
    finally:
        channel.close()


def frame(kind: int, body: bytes) -> bytes:
    return b"".join(bytes(piece) for piece in encode(kind, body))


def hello(**facts: object) -> bytes:
    return frame(HELLO, pickle.dumps(facts))


# Who does not know the secret ------------------------------------------------------------------

PLAIN = [attack for attack in ATTACKS if not {"read_exactly"} & set(attack.__code__.co_names)]


@pytest.mark.parametrize("attack", PLAIN, ids=lambda attack: attack.__name__)
def test_who_does_not_speak_tls_is_refused(
    live: Live, port: Port, bomb: bytes, caplog: pytest.LogCaptureFixture, attack: Attack
) -> None:
    for _ in range(5):
        with port.plain() as sock:
            with contextlib.suppress(ConnectionError):
                attack(sock, bomb)
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
            assert len(read_to_the_end(sock)) <= ALERT
    live.goes_on()
    port.let_in()
    [warning] = warnings_in(caplog)
    assert "refused a connection" in warning


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_who_has_no_secret_is_refused_under_tls_as_well(
    live: Live, port: Port, bomb: bytes, caplog: pytest.LogCaptureFixture, attack: Attack
) -> None:
    for _ in range(5):
        with port.tls() as sock:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                attack(sock, bomb)
            assert len(read_to_the_end(sock)) <= HELLO_SIZE, "a stranger got more than a greeting"
    live.goes_on()
    port.let_in()
    [warning] = warnings_in(caplog)
    assert "refused a connection" in warning
    assert port.secret.hex() not in warning


def test_a_certificate_of_the_callers_own_helps_nobody(
    live: Live, port: Port, bomb: bytes, tmp_path: Path
) -> None:
    certificate, key = make_certificate()
    (tmp_path / "own.pem").write_bytes(key + certificate)
    context = client_context(port.certificate)
    context.load_cert_chain(tmp_path / "own.pem")
    with port.tls(context) as sock:
        read_exactly(sock, HELLO_SIZE)
        sock.sendall(bomb.ljust(HELLO_SIZE + PROOF, b"\0"))
        assert read_to_the_end(sock) == b""
    live.goes_on()


def test_who_expects_another_certificate_does_not_show_its_proof(live: Live, port: Port) -> None:
    """So that somebody in the middle learns nothing."""
    other, _ = make_certificate()
    with pytest.raises(AuthenticationError, match="another certificate"):
        wire.connect(port.address, port.secret, PATIENCE, client_context(other))
    live.goes_on()
    port.let_in()


def test_older_versions_of_tls_are_refused(live: Live, port: Port) -> None:
    context = client_context(port.certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError), port.tls(context):
        pass
    live.goes_on()
    port.let_in()


def first_flight(context: ssl.SSLContext) -> bytes:
    """Return what a client of TLS says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 1.0])
def test_who_stops_half_way_into_tls_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch, live: Live, port: Port, part: float
) -> None:
    monkeypatch.setattr(endpoint_module, "HANDSHAKE_TIMEOUT", 0.3)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(port.plain()) for _ in range(5)]
        for sock in strangers:
            said = first_flight(port.context)
            sock.sendall(said[: int(part * len(said))])
        for sock in strangers:
            read_to_the_end(sock)  # with all of it, there is an answer to it
    assert time.monotonic() - began < 5
    live.goes_on()


def test_who_sends_one_byte_at_a_time_gains_no_time(
    monkeypatch: pytest.MonkeyPatch, live: Live, port: Port
) -> None:
    monkeypatch.setattr(endpoint_module, "HANDSHAKE_TIMEOUT", 0.5)
    began = time.monotonic()
    with port.plain() as sock:
        with contextlib.suppress(ConnectionError):
            for byte in first_flight(port.context):
                sock.sendall(bytes([byte]))
                time.sleep(0.02)  # the point of the test
        assert len(read_to_the_end(sock)) <= ALERT
    with port.tls() as sock:
        answer = CallerHandshake(new_secret()).feed(read_exactly(sock, HELLO_SIZE))
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            for byte in answer:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)
        assert read_to_the_end(sock) == b""
    assert time.monotonic() - began < 10
    live.goes_on()


def test_of_too_many_handshakes_the_oldest_goes(
    monkeypatch: pytest.MonkeyPatch, live: Live, port: Port
) -> None:
    monkeypatch.setattr(endpoint_module, "MAX_HANDSHAKES", 4)
    with contextlib.ExitStack() as stack:
        oldest = stack.enter_context(port.plain())
        others = [stack.enter_context(port.plain()) for _ in range(4)]
        assert len(read_to_the_end(oldest)) <= ALERT
        for sock in others:
            sock.settimeout(0.05)
            with pytest.raises(TimeoutError):
                sock.recv(1)


def test_hundreds_of_half_handshakes_keep_nobody_out(
    live: Live, port: Port, caplog: pytest.LogCaptureFixture
) -> None:
    said = first_flight(port.context)
    with contextlib.ExitStack() as stack:
        for number in range(400):
            sock = stack.enter_context(port.plain())
            with contextlib.suppress(ConnectionError):
                sock.sendall(said[: number * len(said) // 400])
        port.let_in()
        live.goes_on()
    port.let_in()
    assert len(warnings_in(caplog)) == 1


def test_who_resets_the_connection_before_it_is_accepted_disturbs_nobody(
    live: Live, port: Port, caplog: pytest.LogCaptureFixture
) -> None:
    """As a scan for open ports does."""
    for _ in range(5):
        with port.session.loop:  # nothing is accepted meanwhile
            for _ in range(20):
                sock = port.plain()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
        live.goes_on()
        port.let_in()
    assert len(warnings_in(caplog)) <= 1


def test_a_rush_of_strangers_keeps_nobody_out(live: Live, port: Port, start_script: Any) -> None:
    """Another process connects and lets go, as fast as it can, while others want to get in."""
    rush = start_script(
        """
import collections, socket, sys
held = collections.deque()
print("begin", flush=True)
while True:
    try:
        held.append(socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1))
    except OSError:
        continue
    if len(held) > 200:
        held.popleft().close()
""",
        str(port.number),
    )
    assert rush.stdout.readline() == "begin\n"
    for _ in range(5):
        port.let_in()
    live.goes_on()
    assert rush.poll() is None
    rush.kill()
    rush.wait()


class Recorder:
    """Stands between a caller and the port, and keeps what the caller sends."""

    def __init__(self, port: Port) -> None:
        self.said = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, args=(port,))
        self._thread.start()

    def _serve(self, port: Port) -> None:
        caller, _ = self._listener.accept()
        with caller, port.plain() as there:

            def back() -> None:
                with contextlib.suppress(OSError):
                    while data := there.recv(1 << 16):
                        caller.sendall(data)
                    caller.shutdown(socket.SHUT_RDWR)

            thread = threading.Thread(target=back)
            thread.start()
            with contextlib.suppress(OSError):
                while data := caller.recv(1 << 16):
                    self.said += data
                    there.sendall(data)
            thread.join(PATIENCE)

    def end(self) -> None:
        self._thread.join(PATIENCE)
        self._listener.close()


def test_a_recorded_tls_session_is_worth_nothing(live: Live, port: Port) -> None:
    recorder = Recorder(port)
    channel = wire.connect(recorder.address, port.secret, PATIENCE, port.context)
    channel.send(HELLO, pickle.dumps({"token": "nobody's"}))
    assert closes(channel)
    recorder.end()
    assert port.secret not in recorder.said
    assert b"nobody's" not in recorder.said
    assert len(recorder.said) > 300
    answers = set()
    for _ in range(3):
        with port.plain() as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(recorder.said)
            # The listener's part of TLS, under keys that nobody knows.
            answers.add(read_to_the_end(sock))
    assert len(answers) == 3
    live.goes_on()


def test_a_recorded_proof_is_worth_nothing(
    live: Live, port: Port, bomb: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with port.tls() as sock:
        caller = CallerHandshake(port.secret)
        said = caller.feed(read_exactly(sock, HELLO_SIZE))
        sock.sendall(said)
        caller.feed(read_exactly(sock, PROOF))
        assert caller.done  # it was a good one
    for _ in range(3):
        with port.tls() as sock:
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                sock.sendall(said + frame(HELLO, bomb))
            assert len(read_to_the_end(sock)) <= HELLO_SIZE
    live.goes_on()
    assert any("secret" in warning for warning in warnings_in(caplog))


def test_what_comes_right_behind_a_wrong_proof_is_not_looked_at(
    live: Live, port: Port, bomb: bytes
) -> None:
    """In one record of TLS with the proof, so that it is decrypted together with that."""
    with port.tls() as sock:
        said = CallerHandshake(new_secret()).feed(read_exactly(sock, HELLO_SIZE))
        sock.sendall(said + frame(HELLO, bomb) + frame(HELLO, bomb))
        assert read_to_the_end(sock) == b""
    live.goes_on()


# Who knows it ----------------------------------------------------------------------------------

GARBAGE = {
    "random bytes": random.Random(1).randbytes(5_000),
    "a huge length": HEADER.pack(HELLO, 0, (1 << 64) - 1),
    "no pickle": frame(HELLO, b"\x80\x05 no pickle"),
    "half a pickle": frame(HELLO, pickle.dumps({"service": "code"})[:-3]),
    "a pickle of what is not here": frame(HELLO, b"cno_such_module\nno_such_name\n."),
    "no dictionary": frame(HELLO, pickle.dumps([1, 2, 3])),
    "an empty one": hello(),
    "a list for a token": hello(token=[1]),
    "a list for a service": hello(service=[1]),
    "another kind of frame": frame(77, pickle.dumps({"service": "code"})),
    "no such service": hello(service="nonsense"),
    "a gateway without a path": hello(service="gateway"),
    "a number for a path": hello(service="gateway", to=5, redirect=False),
    "bytes for a path": hello(service="gateway", to=b"/tmp/x", redirect=False),
    "an end within a path": hello(service="gateway", to="/tmp/a\0b", redirect=False),
    "a place without a name": hello(service="places"),
    "a place without a gateway": hello(service="places", place="/tmp/fiber-x", gateway=None),
    "an object's user without a name": hello(service="home"),
    "a loan without a number": hello(service="descriptors", elsewhere=True),
    "no order": hello(service="jobs") + frame(ORDER, b"no pickle"),
    "half an order": hello(service="jobs") + frame(ORDER, pickle.dumps((1, "docker"))),
    "no question": hello(service="code") + random.Random(2).randbytes(100),
}


def test_garbage_costs_the_link_that_it_comes_by_and_nothing_else(live: Live, port: Port) -> None:
    held = port.channel()
    held.send(HELLO, pickle.dumps({"service": "code"}))
    for what, sent in GARBAGE.items():
        for _ in range(3):
            channel = port.channel()
            with contextlib.suppress(ConnectionError):
                channel.sock.sendall(sent)
            assert closes(channel), what
        live.goes_on()
        held.send(protocol.MODULE, b"\0\0\0\0no_such_module")
        assert [bytes(answer.body) for answer in held.read()] == [b""], f"suffered by {what}"
    held.close()


def paths_outside(folder: str, victim: Path) -> list[str]:
    link = Path(folder) / "link.sock"
    link.symlink_to(victim)
    beside = Path(folder).parent / victim.name
    return [
        str(victim),
        f"{folder}/../{victim.name}",
        f"{folder}/x/../../{beside.name}",
        f"{folder}/../{Path(folder).name}/link.sock",
        str(link),
        folder,
        f"{folder}/",
        f"{folder}/..",
        f"{folder}/secret",
        f"../{victim.name}",
        "",
        "\0abstract",
        f"{folder}/none.sock",
        "/tmp/fiber-0-1-0123456789abcdef/1.sock",
        f"{folder}//link.sock",
        folder + "/" + "x" * 5_000,
    ]


@pytest.fixture
def victim(port: Port) -> Iterator[tuple[Path, socket.socket]]:
    """A socket that is none of the session's, beside its folder."""
    path = Path(port.session.folder).parent / "victim.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        sock.setblocking(False)
        yield path, sock
    path.unlink()


@pytest.mark.parametrize("redirect", [False, True])
def test_the_gateway_leads_to_the_sessions_own_sockets_only(
    live: Live, port: Port, victim: tuple[Path, socket.socket], redirect: bool
) -> None:
    path, listener = victim
    for wanted in paths_outside(port.session.folder, path):
        with pytest.raises(OSError):
            open_stream(
                port.address, wanted, port.secret, port.context, PATIENCE, redirect=redirect
            )
        with pytest.raises(BlockingIOError):
            listener.accept()
    live.goes_on()
    stream = open_stream(port.address, live.path, port.secret, port.context, PATIENCE)
    channel = authenticate(stream, port.secret, time.monotonic() + PATIENCE)
    channel.send(HELLO, pickle.dumps({"service": "code"}))
    channel.send(protocol.MODULE, b"\0\0\0\0no_such_module")
    assert [bytes(answer.body) for answer in channel.read()] == [b""]
    channel.close()


def test_who_gets_through_the_gateway_has_to_prove_itself_again(
    live: Live, port: Port, bomb: bytes
) -> None:
    stream = open_stream(port.address, live.path, port.secret, port.context, PATIENCE)
    stream.settimeout(PATIENCE)
    read_exactly(stream, HELLO_SIZE)
    stream.sendall(bomb.ljust(HELLO_SIZE + PROOF, b"\0"))
    assert read_to_the_end(stream) == b""
    stream.close()
    live.goes_on()


NAMES = [
    "os",
    "os.path",
    "ssl",
    "pytest",
    "psutil",
    "docker",
    "fiber",
    "fiber.config",
    "__main__",
    "__mp_main__",
    "",
    ".",
    "..",
    "..hidden",
    ".ours",
    "ours.",
    "ours..hidden",
    "../hidden",
    "ours/../../hidden",
    "ours/hidden",
    "/etc/passwd",
    "..secret",
    "hidden",
    "ours\0",
    "ours\nhidden",
    "ours.py",
    "ours.__class__",
]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a module, in a folder that has a module beside it."""
    (tmp_path / "hidden.py").write_text("SECRET = 'not to be told'\n")
    (tmp_path / "secret").write_text("not to be told")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "ours.py").write_text("ANSWER = 42\n")
    monkeypatch.syspath_prepend(folder)
    return folder


def test_only_modules_of_the_project_are_told(live: Live, port: Port, project: Path) -> None:
    channel = port.channel()
    channel.send(HELLO, pickle.dumps({"service": "code"}))

    def ask(kind: int, body: bytes) -> tuple[int, bytes]:
        channel.send(kind, body)
        while not (answers := channel.read()):
            pass
        [answer] = answers
        return answer.kind, bytes(answer.body)

    kind, body = ask(protocol.MODULE, b"\0\0\0\0ours")
    found = protocol.unpack(body)
    assert kind == protocol.MODULE
    assert found is not None
    assert found.source == b"ANSWER = 42\n"
    for name in NAMES:
        kind, body = ask(protocol.MODULE, b"\0\0\0\0" + name.encode())
        assert kind == protocol.REFUSED or protocol.unpack(body) is None, name
        assert b"not to be told" not in body
    for asked in (b"", b"\0", b"\0\0\0\0\xff\xfe", b"\0\0\0\0" + b"a." * 2_000 + b"a"):
        kind, body = ask(protocol.MODULE, asked)
        assert kind == protocol.REFUSED or body == b""
    for kind in (0, HELLO, 77, protocol.REFUSED, 255):
        assert ask(kind, pickle.dumps("x"))[0] == protocol.REFUSED
    assert ask(protocol.MODULE, b"\0\0\0\0ours")[1], "it is answered no more"
    channel.close()
    live.goes_on()


# Fuzzing ---------------------------------------------------------------------------------------


def alter(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    how: list[Callable[[], bytes]] = [
        lambda: data[:place] + bytes([data[place] ^ chance.randrange(1, 256)]) + data[place + 1 :],
        lambda: data[:place] + chance.randbytes(chance.randrange(1, 20)) + data[place:],
        lambda: data[:place] + chance.randbytes(len(data) - place),
        lambda: data[:place],
    ]
    return chance.choice(how)()


def test_altered_handshakes_of_both_kinds_disturb_nobody(
    live: Live, port: Port, bomb: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(1)
    with contextlib.ExitStack() as held:
        for number in range(300):
            if number % 2:
                sock: Sock = held.enter_context(port.plain())
                sent = alter(first_flight(port.context), chance)
            else:
                sock = held.enter_context(port.tls())
                right = CallerHandshake(port.secret).feed(read_exactly(sock, HELLO_SIZE))
                sent = alter(right, chance) + frame(HELLO, bomb)
                if sent.startswith(right):
                    continue
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                sock.sendall(sent)
        live.goes_on()
        port.let_in()
    live.goes_on()
    assert len(warnings_in(caplog)) <= 12
