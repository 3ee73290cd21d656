"""TCP under TLS: a channel like any other, for peers of the session only, secret on the wire."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fiber.errors import AuthenticationError, StartError
from fiber.runtime.link import Link
from fiber.runtime.loop import Event, Loop
from fiber.wire import channel as channel_module
from fiber.wire.auth import ListenerHandshake, new_secret
from fiber.wire.channel import Channel, connect
from fiber.wire.framing import Frame, encode
from fiber.wire.tls import TlsSocket, client_context, make_certificate, server_context, tune

PATIENCE = 20.0
SECRET = new_secret()
CERTIFICATE, KEY = make_certificate()
Sockets = tuple[TlsSocket, TlsSocket]


@pytest.fixture(autouse=True)
def nothing_is_closed_by_the_collector() -> Iterator[None]:
    """A socket that nobody closed is a ResourceWarning, and so an error: let it show here."""
    yield
    gc.collect()


def tcp_pair(host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        ours = socket.create_connection(listener.getsockname()[:2], PATIENCE)
        theirs, _ = listener.accept()
    theirs.settimeout(PATIENCE)
    return ours, theirs


def handshake(ours: TlsSocket, theirs: TlsSocket) -> None:
    thread = threading.Thread(target=theirs.handshake)
    thread.start()
    ours.handshake()
    thread.join(PATIENCE)
    assert not thread.is_alive()


@pytest.fixture
def pair() -> Iterator[Sockets]:
    """A caller and a listener, connected, blocking with a time-out."""
    plain = tcp_pair()
    ours = TlsSocket(plain[0], client_context(CERTIFICATE), server_side=False)
    theirs = TlsSocket(plain[1], server_context(CERTIFICATE, KEY), server_side=True)
    handshake(ours, theirs)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


class End:
    """A link that collects what comes, with an event for when it is complete."""

    def __init__(self, loop: Loop, sock: TlsSocket) -> None:
        self.loop = loop
        self.frames: list[Frame] = []
        self.lost = Event()
        self._wanted = 0
        self._event = Event()
        with loop:
            self.link = Link(loop, Channel(sock), self._frame, self.lost.set)

    def _frame(self, frame: Frame) -> None:
        self.frames.append(frame)
        if len(self.frames) >= self._wanted:
            self._event.set()

    def wait(self, count: int) -> list[Frame]:
        """Return the frames once there are `count`."""
        with self.loop:
            self._wanted, self._event = count, Event()
            if len(self.frames) >= count:
                self._event.set()
            event = self._event
        assert self.loop.wait(event, PATIENCE), f"{len(self.frames)} of {count} frames came"
        return self.frames

    def close(self) -> None:
        with self.loop:
            self.link.close()


@pytest.fixture
def ends(loop: Loop, pair: Sockets) -> Iterator[tuple[End, End]]:
    ours, theirs = (End(loop, sock) for sock in pair)
    yield ours, theirs
    ours.close()
    theirs.close()


def read(channel: Channel, count: int) -> list[Frame]:
    frames: list[Frame] = []
    while len(frames) < count:
        frames += channel.read()
    return frames


# In the loop ------------------------------------------------------------------------------------


def test_small_frames_go_both_ways(loop: Loop, ends: tuple[End, End]) -> None:
    ours, theirs = ends
    for number in range(300):
        with loop:
            ours.link.post(1, str(number).encode(), [b"buffer"])
        frame = theirs.wait(number + 1)[-1]
        with loop:
            theirs.link.post(2, bytes(frame.body))
        assert bytes(ours.wait(number + 1)[-1].body) == str(number).encode()


def test_large_frames_go_both_ways_at_once(loop: Loop, ends: tuple[End, End]) -> None:
    ours, theirs = ends
    one, other = os.urandom(64 << 20), os.urandom(64 << 20)
    with loop:
        ours.link.post(1, b"one", [one])
        theirs.link.post(2, other)
        ours.link.post(3, b"behind")
    assert [frame.kind for frame in theirs.wait(2)] == [1, 3]
    assert theirs.frames[0].buffers[0] == one
    assert bytes(ours.wait(1)[0].body) == other


def test_many_small_frames_go_in_order(loop: Loop, ends: tuple[End, End]) -> None:
    ours, theirs = ends
    with loop:
        for number in range(20_000):
            ours.link.post(number % 256, str(number).encode() * (number % 5 + 1))
    frames = theirs.wait(20_000)
    wanted = [str(number).encode() * (number % 5 + 1) for number in range(20_000)]
    assert [bytes(frame.body) for frame in frames] == wanted


@pytest.mark.parametrize("size", [5_000, 9_000, 30_000, 100_000])
def test_nothing_stays_behind_in_a_record(loop: Loop, ends: tuple[End, End], size: int) -> None:
    """The rest of a record, with the frames after a large one, is decrypted and shows in no poll.

    The last of these frames are in one record with the end of the large one, nothing follows.
    """
    ours, theirs = ends
    with loop:
        ours.link.post(1, b"head", [bytes(size)])
        for number in range(40):
            ours.link.post(2, str(number).encode())
    frames = theirs.wait(41)
    assert len(frames[0].buffers[0]) == size
    assert [int(bytes(frame.body)) for frame in frames[1:]] == list(range(40))


def test_buffers_of_all_sizes_arrive_whole(loop: Loop, ends: tuple[End, End]) -> None:
    ours, theirs = ends
    sizes = [0, 1, 4_000, 4_097, 16_383, 16_384, 16_385, 20_000, 65_535, 65_537, 300_000, 1_200_000]
    buffers = [os.urandom(size) for size in sizes for _ in range(3)]
    with loop:
        for _ in range(3):
            ours.link.post(1, b"", buffers)
            ours.link.post(2, b"small")
    frames = theirs.wait(6)
    assert [frame.kind for frame in frames] == [1, 2] * 3
    for frame in frames[::2]:
        assert [bytes(buffer) for buffer in frame.buffers] == buffers


def test_the_end_of_the_peer_is_the_end_of_the_link(loop: Loop, ends: tuple[End, End]) -> None:
    ours, theirs = ends
    with loop:
        ours.link.post(1, b"last words")
    theirs.wait(1)
    ours.close()
    assert loop.wait(theirs.lost, PATIENCE)


# The socket -------------------------------------------------------------------------------------


def test_it_speaks_tls_1_3_and_nothing_else(pair: Sockets) -> None:
    assert {sock._ssl.version() for sock in pair} == {"TLSv1.3"}
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    plain, theirs = tcp_pair()
    listener = TlsSocket(theirs, server_context(CERTIFICATE, KEY), server_side=True)

    def call() -> None:
        with pytest.raises(OSError):
            old.wrap_socket(plain)

    thread = threading.Thread(target=call)
    thread.start()
    with pytest.raises(ConnectionError, match=r"does not speak TLS 1\.3"):
        listener.handshake()
    listener.close()
    thread.join(PATIENCE)
    plain.close()


def test_what_a_full_socket_does_not_take_is_sent_later_and_once(pair: Sockets) -> None:
    ours, theirs = (Channel(sock) for sock in pair)
    pair[0].setblocking(False)
    pair[1].setblocking(False)
    sent = [(n % 200, os.urandom(n * 997 % 90_000), [os.urandom(n * 31)]) for n in range(200)]
    received: list[Frame] = []
    blocked, at = 0, 0
    deadline = time.monotonic() + PATIENCE
    while len(received) < len(sent):
        assert time.monotonic() < deadline
        while at < len(sent):  # the outbox grows while OpenSSL waits for what it had begun
            ours.post(*sent[at])
            at += 1
            if not ours.flush():
                blocked += 1
                break
        ours.flush()
        with contextlib.suppress(BlockingIOError):
            received += theirs.read()
    assert blocked > 5
    assert [(f.kind, bytes(f.body), [bytes(f.buffers[0])]) for f in received[:]] == sent


def test_what_openssl_had_begun_is_finished_however_it_is_cut_now(pair: Sockets) -> None:
    ours, theirs = pair
    ours.setblocking(False)
    pieces = [b"a" * 1_000, b"b" * 1_000, b"c" * 1_000]
    filled = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            filled += ours.sendmsg(pieces)
    received = bytearray()
    while len(received) < filled:
        received += theirs.recv(1 << 14)
    ours.settimeout(PATIENCE)
    sent = ours.send(pieces[0])  # the first of what it had begun
    ours.sendall(b"".join(pieces)[sent:])
    while len(received) < filled + 3_000:
        received += theirs.recv(1 << 14)
    assert received == b"".join(pieces) * (filled // 3_000 + 1)


def test_one_thread_reads_while_others_send(pair: Sockets) -> None:
    """Blocking channels, as workers have: who waits for a frame keeps nobody from sending."""
    ours, theirs = (Channel(sock) for sock in pair)
    lock = threading.Lock()
    count, body = 600, os.urandom(50_000)

    def send(channel: Channel, number: int) -> None:
        for _ in range(count):
            with lock if channel is ours else contextlib.nullcontext():
                channel.send(number, body)

    answers: list[Frame] = []
    reader = threading.Thread(target=lambda: answers.extend(read(ours, count)))
    reader.start()
    senders = [
        threading.Thread(target=send, args=arguments)
        for arguments in [(ours, 1), (ours, 2), (theirs, 3)]
    ]
    for sender in senders:
        sender.start()
    frames = read(theirs, 2 * count)
    for thread in [*senders, reader]:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert sorted(frame.kind for frame in frames) == [1] * count + [2] * count
    assert all(bytes(frame.body) == body for frame in frames + answers)


def test_a_reader_that_waits_does_not_hold_the_line(pair: Sockets) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(ours.recv(100)))
    reader.start()
    for _ in range(50):  # while it waits, or is about to
        ours.sendall(b"question")
        time.sleep(0.001)
    theirs.sendall(b"answer")
    reader.join(PATIENCE)
    assert got == [b"answer"]


def test_time_outs_are_those_of_a_socket(pair: Sockets) -> None:
    ours, _ = pair
    ours.settimeout(0.05)
    with pytest.raises(TimeoutError):
        ours.recv(10)
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        ours.recv(10)
    with pytest.raises(BlockingIOError):
        ours.recv_into(bytearray(10_000))
    assert not ours.wants_write
    with pytest.raises(BlockingIOError):
        ours.sendall(bytes(1 << 28))
    assert ours.wants_write


def test_a_handshake_that_waits_says_for_what() -> None:
    plain = tcp_pair()
    ours = TlsSocket(plain[0], client_context(CERTIFICATE), server_side=False)
    theirs = TlsSocket(plain[1], server_context(CERTIFICATE, KEY), server_side=True)
    ours.setblocking(False)
    theirs.setblocking(False)
    done: set[TlsSocket] = set()
    waited = 0
    deadline = time.monotonic() + PATIENCE
    while len(done) < 2:
        assert time.monotonic() < deadline
        for sock in {ours, theirs} - done:
            try:
                sock.handshake()
            except BlockingIOError:
                assert not sock.wants_write
                waited += 1
            else:
                done.add(sock)
    assert waited
    theirs.send(b"hello")
    ours.settimeout(PATIENCE)
    assert ours.recv(100) == b"hello"
    ours.close()
    theirs.close()


def test_a_peer_that_goes_without_a_word_is_an_end_of_file(pair: Sockets) -> None:
    ours, theirs = pair
    theirs.sendall(b"x" * 50_000)
    theirs.close()  # which sends no close_notify
    into = bytearray(80_000)
    count = 0
    while more := ours.recv_into(memoryview(into)[count:]):
        count += more
    assert count == 50_000
    assert ours.recv(10) == b""
    assert ours.recv(10) == b""


def test_a_peer_that_is_cut_off_is_an_error_after_what_came_before(pair: Sockets) -> None:
    ours, theirs = pair
    theirs.sendall(b"x" * 40_000)
    wait_until_readable(ours, 40_000)
    theirs._ssl.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()  # so it is reset
    assert ours.recv_into(bytearray(100_000)) == 40_000
    with pytest.raises(ConnectionResetError):
        ours.recv_into(bytearray(100_000))
    assert ours.recv(10) == b""
    with pytest.raises(OSError):
        ours.sendall(bytes(1 << 26))


def test_what_was_delivered_outlasts_a_close_with_something_unread(pair: Sockets) -> None:
    ours, theirs = pair
    ours.sendall(b"never read")
    wait_until_readable(theirs, 10)
    theirs.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += theirs.send(bytes(10_000))
    assert not theirs.deliver(0.05)
    received = bytearray()
    while len(received) < sent:
        received += ours.recv(1 << 14)
    theirs.settimeout(PATIENCE)
    rest = 10_000 - theirs.send(bytes(10_000))  # what it had begun
    assert rest == 0
    theirs.sendall(b"last words")
    assert theirs.deliver(PATIENCE)
    theirs.close()
    assert ours.recv(1 << 14) + ours.recv(1 << 14) == bytes(10_000) + b"last words"


def wait_until_readable(sock: TlsSocket, count: int) -> None:
    """Wait until the kernel has what becomes `count` bytes: peeking leaves it there."""
    deadline = time.monotonic() + PATIENCE
    while len(socket.socket.recv(sock._ssl, 1 << 20, socket.MSG_PEEK)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_record_that_was_altered_ends_the_connection(pair: Sockets) -> None:
    ours, theirs = pair
    socket.socket.send(theirs._ssl, b"\x17\x03\x03\x00\x20" + os.urandom(32))  # past TLS
    with pytest.raises(ConnectionError, match="broken"):
        ours.recv(100)


def test_a_fork_that_closes_its_copy_harms_nobody(pair: Sockets) -> None:
    ours, theirs = pair
    pid = os.fork()
    if not pid:
        ours.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    ours.sendall(b"still here")
    assert theirs.recv(100) == b"still here"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_it_keeps_what_the_socket_was(host: str) -> None:
    ours, theirs = tcp_pair(host)
    facts = ours.fileno(), ours.family, ours.getsockname(), ours.getpeername()
    sock = TlsSocket(ours, client_context(CERTIFICATE), server_side=False)
    assert (sock.fileno(), sock.family, sock.getsockname(), sock.getpeername()) == facts
    assert sock.gettimeout() == PATIENCE
    sock.close()
    assert sock.fileno() == -1
    theirs.close()


def test_both_sides_notice_a_peer_that_vanished(pair: Sockets) -> None:
    for sock in pair:
        options = sock._ssl
        assert options.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if sys.platform == "linux":
            assert options.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
            # A peer that reads nothing for long is no dead peer: no limit for that.
            assert not options.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    left, right = socket.socketpair()
    tune(left)  # no TCP: nothing to do
    left.close()
    right.close()


# Certificates -----------------------------------------------------------------------------------


def test_a_missing_cryptography_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(StartError, match="pip install cryptography"):
        make_certificate()


@pytest.mark.parametrize("memfd", [True, False])
def test_the_key_is_left_in_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memfd: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    server_context(CERTIFICATE, KEY)
    assert list(tmp_path.iterdir()) == []


def test_import_of_fiber_and_of_this_loads_no_openssl() -> None:
    code = "import sys, fiber, fiber.wire.tls; print('ssl' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


# Connecting -------------------------------------------------------------------------------------


class Listener:
    """Serves callers in a thread, one after the other, as an endpoint would.

    Args:
        work: what to do with each connection; it is closed afterwards.
        host: where to listen.
    """

    def __init__(self, work: Callable[[socket.socket], object], host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._sock = socket.create_server((host, 0), family=family)
        self._sock.settimeout(0.02)
        self.port = self._sock.getsockname()[1]
        self.errors: queue.Queue[BaseException] = queue.Queue()
        self.callers = 0
        self._work = work
        self._closing = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._closing:
            try:
                peer, _ = self._sock.accept()
            except TimeoutError:
                continue
            self.callers += 1
            peer.settimeout(PATIENCE)
            try:
                self._work(peer)
            except Exception as error:
                self.errors.put(error)
            finally:
                peer.close()

    def close(self) -> None:
        self._closing = True
        self._thread.join(2 * PATIENCE)
        self._sock.close()
        assert not self._thread.is_alive()


Listening = Callable[..., Listener]


@pytest.fixture
def listening() -> Iterator[Listening]:
    listeners: list[Listener] = []

    def listen(work: Callable[[socket.socket], object], host: str = "127.0.0.1") -> Listener:
        listeners.append(Listener(work, host))
        return listeners[-1]

    yield listen
    for listener in listeners:
        listener.close()


def member(
    secret: bytes = SECRET, certificate: bytes = CERTIFICATE, key: bytes = KEY, echoes: int = 1
) -> Callable[[socket.socket], None]:
    """A listener of the session, which sends back each frame that comes."""

    def serve(plain: socket.socket) -> None:
        sock = TlsSocket(plain, server_context(certificate, key), server_side=True)
        try:
            sock.handshake()
            shake = ListenerHandshake(secret)
            sock.sendall(shake.greeting)
            while (proof := shake.feed(sock.recv(shake.wants))) is None:
                pass
            # In one record with the proof: what follows must not be lost by who connects.
            sock.sendall(proof + b"".join(bytes(piece) for piece in encode(9, b"welcome")))
            channel = Channel(sock)
            for _ in range(echoes):
                [frame] = read(channel, 1)
                channel.send(frame.kind, bytes(frame.body))
        finally:
            sock.close()

    return serve


def meet(address: str, **options: Any) -> None:
    """Connect and exchange a frame."""
    channel = connect(address, SECRET, PATIENCE, client_context(CERTIFICATE), **options)
    try:
        assert channel.sock.gettimeout() is None
        channel.sock.settimeout(PATIENCE)
        [welcome] = read(channel, 1)
        assert bytes(welcome.body) == b"welcome"
        channel.send(1, b"hello")
        [frame] = read(channel, 1)
        assert bytes(frame.body) == b"hello"
    finally:
        channel.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "named"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "localhost"), ("::1", "[::1]")]
)
def test_connect_over_tcp(listening: Listening, host: str, named: str) -> None:
    listener = listening(member(), host)
    meet(f"tcp:{named}:{listener.port}")
    assert listener.errors.empty()


def test_another_certificate_is_refused(listening: Listening) -> None:
    listener = listening(member(SECRET, *make_certificate()))
    with pytest.raises(AuthenticationError, match=rf"127\.0\.0\.1:{listener.port}.*certificate"):
        connect(f"tcp:127.0.0.1:{listener.port}", SECRET, PATIENCE, client_context(CERTIFICATE))
    error = listener.errors.get(timeout=PATIENCE)
    assert isinstance(error, ConnectionError)
    assert "refused" in str(error)
    assert listener.callers == 1  # it would not get any better


def test_a_certificate_without_its_key_is_worth_nothing() -> None:
    _, other_key = make_certificate()
    with pytest.raises(ssl.SSLError):
        server_context(CERTIFICATE, other_key)


def test_the_certificate_alone_does_not_make_a_member(listening: Listening) -> None:
    listener = listening(member(new_secret()))
    with pytest.raises((AuthenticationError, OSError)):
        connect(f"tcp:127.0.0.1:{listener.port}", SECRET, 1, client_context(CERTIFICATE))
    assert isinstance(listener.errors.get(timeout=PATIENCE), AuthenticationError)


@pytest.mark.parametrize(
    "words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", bytes(99)]
)
def test_a_listener_without_tls_is_refused(listening: Listening, words: bytes) -> None:
    listener = listening(lambda sock: (sock.sendall(words), sock.recv(1000)))
    with pytest.raises(OSError, match=rf":{listener.port}: it does not speak TLS"):
        connect(f"tcp:127.0.0.1:{listener.port}", SECRET, 0.3, client_context(CERTIFICATE))


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xf1fiber\r\n" * 9])
def test_a_caller_without_tls_is_refused(words: bytes) -> None:
    plain, theirs = tcp_pair()
    listener = TlsSocket(theirs, server_context(CERTIFICATE, KEY), server_side=True)
    plain.sendall(words)
    with pytest.raises(ConnectionError, match="does not speak TLS"):
        listener.handshake()
    listener.close()
    plain.close()


def test_the_next_host_is_tried_when_nobody_listens_at_the_first(listening: Listening) -> None:
    listener = listening(member())
    meet(f"tcp:127.0.0.1:{free_port()},127.0.0.1:{listener.port}")


def test_the_next_host_is_tried_when_the_first_is_somebody_else(listening: Listening) -> None:
    """Private addresses mean another machine elsewhere."""
    other, listener = listening(member(SECRET, *make_certificate())), listening(member())
    meet(f"tcp:127.0.0.1:{other.port},127.0.0.1:{listener.port}")
    assert other.callers == 1


def test_the_next_host_is_tried_when_the_first_says_nothing(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "_PATIENCE", 0.1)
    silent, listener = (
        listening(lambda sock: sock.recv(10_000) and sock.recv(1)),
        listening(member()),
    )
    meet(f"tcp:127.0.0.1:{silent.port},127.0.0.1:{listener.port}")
    assert silent.callers == 1


def test_a_host_that_comes_up_late_is_tried_again(listening: Listening) -> None:
    ports = free_port(), free_port()
    done: list[BaseException | None] = []

    class Server(threading.Thread):
        def run(self) -> None:
            with socket.create_server(("127.0.0.1", ports[1])) as sock:
                sock.settimeout(PATIENCE)
                peer, _ = sock.accept()
                peer.settimeout(PATIENCE)
                member()(peer)
                done.append(None)

    server = Server()
    late = threading.Timer(0.3, server.start)
    late.start()
    meet(f"tcp:127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}")
    late.join(PATIENCE)
    server.join(PATIENCE)
    assert done == [None]


def test_where_nobody_is_each_host_is_named_with_what_happened() -> None:
    first, second = free_port(), free_port()
    began = time.monotonic()
    with pytest.raises(OSError) as caught:
        connect(
            f"tcp:127.0.0.1:{first},no.such.host.invalid:{second}",
            SECRET,
            0.3,
            client_context(CERTIFICATE),
        )
    assert time.monotonic() - began < PATIENCE
    assert f"127.0.0.1:{first}: connection refused" in str(caught.value)
    assert f"no.such.host.invalid:{second}: " in str(caught.value)


def test_a_listener_that_says_nothing_is_given_up(listening: Listening) -> None:
    listener = listening(lambda sock: sock.recv(10_000) and sock.recv(1))
    began = time.monotonic()
    with pytest.raises(OSError, match="no answer"):
        connect(f"tcp:127.0.0.1:{listener.port}", SECRET, 0.3, client_context(CERTIFICATE))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "address", ["tcp:", "tcp:host", "tcp:host:", "tcp::5000", "tcp:host:99999", "tcp:::1:5000"]
)
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(ValueError, match="no address"):
        connect(address, SECRET, 1, client_context(CERTIFICATE))


def test_tcp_without_a_certificate_is_no_way() -> None:
    with pytest.raises(ValueError, match="certificate"):
        connect(f"tcp:127.0.0.1:{free_port()}", SECRET, 1)


# On the wire ------------------------------------------------------------------------------------


class Tap:
    """Carries bytes between a caller and a port, and keeps a copy of all of them."""

    def __init__(self, port: int) -> None:
        self.seen = bytearray()
        self._port = port

    def __call__(self, caller: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as listener:
            back = threading.Thread(target=self._carry, args=(listener, caller))
            back.start()
            self._carry(caller, listener)
            back.join(PATIENCE)
            assert not back.is_alive()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.seen += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def test_who_listens_on_the_wire_learns_nothing(listening: Listening) -> None:
    listener = listening(member())
    tap = Tap(listener.port)
    address = f"tcp:127.0.0.1:{listening(tap).port}"
    channel = connect(address, SECRET, PATIENCE, client_context(CERTIFICATE))
    channel.sock.settimeout(PATIENCE)
    read(channel, 1)
    payload = b"a payload that is easily found " * 100
    channel.send(1, payload)
    [frame] = read(channel, 1)
    assert bytes(frame.body) == payload
    channel.close()
    seen = bytes(tap.seen)
    assert len(seen) > 2 * len(payload)  # it was there, and back
    for secret in (SECRET, SECRET[:8], b"easily", b"fiber", b"welcome"):
        assert secret not in seen
    assert CERTIFICATE not in seen


def test_a_record_that_is_altered_on_its_way_is_noticed(listening: Listening) -> None:
    class Forger(Tap):
        def _carry(self, source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    if len(data) > 10_000:
                        data = data[:-1] + bytes([data[-1] ^ 1])
                    target.sendall(data)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)

    listener = listening(member())
    address = f"tcp:127.0.0.1:{listening(Forger(listener.port)).port}"
    channel = connect(address, SECRET, PATIENCE, client_context(CERTIFICATE))
    channel.sock.settimeout(PATIENCE)
    read(channel, 1)
    channel.send(1, bytes(16_000))
    error = listener.errors.get(timeout=PATIENCE)
    assert isinstance(error, ConnectionError)
    assert "broken" in str(error)
    channel.close()
