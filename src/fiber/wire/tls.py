"""TLS 1.3 under a channel, for what travels between hosts.

    make_certificate ─► certificate, key ─► server_context ─► TlsSocket of the listener
                              │                                     ▲
                              └──────────► client_context ─► TlsSocket of the caller

The certificate is the session's own: its master makes it, its workers trust it and no other. TLS
keeps what travels secret and whole; who the peer is, the handshake in `auth` proves, inside of it.
To import this loads no OpenSSL: a program on one machine never needs it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from fiber.errors import AuthenticationError, StartError
from fiber.wire.framing import Buffer

if TYPE_CHECKING:
    import ssl

__all__ = ["TlsSocket", "client_context", "make_certificate", "server_context", "tune"]

_YEARS = 5  # longer than any session
_JOIN = 1 << 16  # bytes of small pieces that are joined for one send
_SEND = 1 << 18  # bytes of a large piece that are sent at a time
_SO_NWRITE = 0x1024  # macOS: bytes that were not acknowledged; `socket` does not know it
_RECEIVE = 1 << 20  # bytes that one `recv_into` takes at the most
_OPTIONS = {
    # A peer that vanished without a word, as a machine does that lost its power: an idle
    # connection notices in 10 + 3 * 5 seconds. With bytes on their way it takes the system longer;
    # no limit is set for that, for it would end connections to peers too that are there but read
    # nothing for so long. Agents give signs of life instead.
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPALIVE": 10,  # macOS's name for the one above
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
}
_FOREIGN = {  # OpenSSL's names for how it notices that a peer speaks something else
    "BAD_RECORD_TYPE",
    "HTTPS_PROXY_REQUEST",
    "HTTP_REQUEST",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LAYER_FAILURE",
    "TLSV1_ALERT_PROTOCOL_VERSION",
    "UNEXPECTED_MESSAGE",
    "UNSUPPORTED_PROTOCOL",
    "WRONG_SSL_VERSION",
    "WRONG_VERSION_NUMBER",
}

_T = TypeVar("_T")


def tune(sock: socket.socket) -> None:
    """Have a TCP socket send at once, and notice when its peer vanishes."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):  # what a system does not know, it does without
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


# Certificates and contexts ----------------------------------------------------------------------


def make_certificate() -> tuple[bytes, bytes]:
    """Return a new self-signed certificate and its private key, both as PEM.

    Raises:
        StartError: the package `cryptography` is missing.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise StartError(
            "connections between machines are encrypted, and to make the session's certificate "
            "needs the package cryptography, which is not installed here: pip install cryptography"
        ) from error
    import datetime as dt

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fiber")])
    day = dt.timedelta(days=1)
    now = dt.datetime.now(dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)  # a worker's clock may be behind
        .not_valid_after(now + _YEARS * 365 * day)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def server_context(certificate: bytes, key: bytes) -> ssl.SSLContext:
    """Return the context of a listener that shows `certificate`; both as PEM."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes, and a ticket would come in the way of a reader
    with _file(key + b"\n" + certificate) as path:
        context.load_cert_chain(path)
    return context


def client_context(certificate: bytes) -> ssl.SSLContext:
    """Return the context of a caller that trusts `certificate`, PEM, and no other.

    Names of hosts are not looked at: the same listener has many, and the certificate says it all.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # It signs nothing but itself, and so is no authority: it is trusted as what it is.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate.decode("ascii"))
    return context


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[str]:
    """A file with `data` for a moment, for `ssl` loads keys from files only."""
    # A Python that was built for old systems has no memfd_create.
    if sys.platform == "linux" and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        fd = os.memfd_create("fiber-tls")  # never on a disk
        path = f"/proc/self/fd/{fd}"
    else:
        fd, path = tempfile.mkstemp(prefix="fiber-tls-")  # that only this user can read
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            yield path
    finally:
        if not path.startswith("/proc/"):
            os.unlink(path)


# The socket -------------------------------------------------------------------------------------


class TlsSocket:
    """A connected TCP socket under TLS, to be used as the socket itself; it takes `sock` over.

    It raises what a plain socket would. It never says goodbye in TLS's own way, and does not wait
    for it from the peer: the end of the stream is the end. Frames have sizes, so one that was cut
    off is known; and a fork's copy of the connection can be closed without harm to the other.

    One thread may read while another sends. OpenSSL allows one at a time and would sleep within,
    so the socket below never blocks; who shall wait does so here, without the lock.

    Args:
        sock: connected; `tune` is applied to it.
        context: of `client_context` or `server_context`.
        server_side: whether it is the listener's.

    Raises:
        OSError: the peer is gone already; `sock` is closed.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._timeout = sock.gettimeout()
        try:
            tune(sock)
            sock.setblocking(False)
            self._ssl = context.wrap_socket(
                sock,
                server_side=server_side,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,  # they are told from resets here
            )
        except OSError:
            sock.close()
            raise
        self.family = self._ssl.family
        self.wants_write = False
        """Whether what raised BlockingIOError last waits to send rather than to receive."""
        self._lock = threading.RLock()
        self._unsent: Buffer | None = None  # what OpenSSL wants to be given again
        self._error: Exception | None = None  # to be raised by the next read
        self._ended = False  # nothing more will come

    def handshake(self) -> None:
        """Do TLS's handshake, or the next part of it if the socket does not block.

        Raises:
            BlockingIOError: the peer has to answer first; call again when the socket is ready to
                receive, or to send if `wants_write`.
            AuthenticationError: the listener shows another certificate than the pinned one.
            OSError: the peer is gone, or does not speak TLS 1.3; the message says which.
        """
        self._do(self._ssl.do_handshake)

    # Receiving ---------------------------------------------------------------------------------

    def recv(self, size: int) -> bytes:
        """Return what the current record still holds, or the next one; b"" at the end."""
        if self._ended or self._error is not None:
            self._check()
            return b""
        try:
            return self._do(self._ssl.recv, size)
        except _End:
            self._ended = True
            return b""

    def recv_into(self, buffer: Buffer) -> int:
        """Fill `buffer` from the record that is here, or from all those that have come."""
        if self._ended or self._error is not None:
            self._check()
            return 0
        # Who drains a record must come to an end, so then it is no more than that.
        several = not self._ssl.pending()
        try:
            count = self._do(self._ssl.recv_into, buffer)
        except _End:
            self._ended = True
            return 0
        if several and count < len(buffer):
            with memoryview(buffer) as view:
                count = self._receive_more(view, count)
        return count

    def _receive_more(self, view: memoryview, count: int) -> int:
        """Go on filling `view` from `count` with records that have come; return how far it is."""
        while count < min(len(view), _RECEIVE):
            try:
                with self._lock:
                    more = self._ssl.recv_into(view[count:])
            except OSError as error:
                plain = _plain(error)
                if isinstance(plain, _End):
                    self._ended = True
                elif not isinstance(plain, BlockingIOError):
                    self._error = plain  # for the next read: what came before it counts
                break
            if not more:
                self._ended = True
                break
            count += more
        return count

    def _check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._ended = True
            raise error

    def pending(self) -> int:
        """How many bytes are here already, which no poll of the descriptor shows."""
        return self._ssl.pending()

    # Sending -----------------------------------------------------------------------------------

    # OpenSSL encrypts a record before it knows whether it can be sent. When it cannot, it has to be
    # given the same bytes again, and at least as many. So `_unsent` keeps them: a caller that comes
    # again after BlockingIOError comes with the same bytes, though cut in another way.

    def send(self, data: Buffer) -> int:
        """Send the first of `data`; return how many bytes went."""
        if self._unsent is not None:
            return self._send(self._unsent)
        if len(data) > _SEND:
            data = memoryview(data)[:_SEND]
        return self._send(data) if data else 0

    def sendmsg(self, buffers: Sequence[Buffer]) -> int:
        """Send the first of what `buffers` hold together; return how many bytes went."""
        if self._unsent is not None:
            return self._send(self._unsent)
        if len(buffers[0]) >= _JOIN:
            return self.send(buffers[0])
        pieces: list[Buffer] = []
        room = _JOIN
        for piece in buffers:
            if len(piece) >= room:
                pieces.append(memoryview(piece)[:room])
                break
            pieces.append(piece)
            room -= len(piece)
        joined = b"".join(pieces)
        return self._send(joined) if joined else 0

    def sendall(self, data: Buffer) -> None:
        """Send all of `data`, on a socket that blocks."""
        with memoryview(data) as view:
            at = 0
            while at < len(view):
                at += self.send(view[at:])

    def _send(self, data: Buffer) -> int:
        self._unsent = data
        count = self._do(self._ssl.send, data)
        self._unsent = None
        return count

    def deliver(self, timeout: float) -> bool:
        """Wait until the peer's system has all that was sent; return whether it has.

        Before a close, or the end of the process, if the peer may have sent something that was not
        read: TCP then resets the connection, and drops what is still on its way.
        """
        deadline = monotonic() + timeout
        pause = 0.0005
        while self._undelivered():
            if monotonic() + pause > deadline:
                return False
            sleep(pause)
            pause = min(2 * pause, 0.02)
        return True

    def half_close(self) -> None:
        """Tell the peer that nothing more comes; what it sends can only be thrown away then."""
        with contextlib.suppress(OSError):
            self._ssl.shutdown(socket.SHUT_WR)

    def _undelivered(self) -> int:
        """How many bytes the peer's system has not acknowledged."""
        if sys.platform == "darwin":
            return self._ssl.getsockopt(socket.SOL_SOCKET, _SO_NWRITE)
        import fcntl
        import termios

        size = fcntl.ioctl(self._ssl.fileno(), termios.TIOCOUTQ, bytes(4))
        return int.from_bytes(size, sys.byteorder)

    # Waiting -----------------------------------------------------------------------------------

    def _do(self, call: Callable[..., _T], *args: Any) -> _T:
        """Call, and again as often as it is to wait for the peer."""
        deadline: float | None = None
        while True:
            try:
                with self._lock:
                    return call(*args)
            except OSError as error:
                plain = _plain(error)
                try:
                    if not isinstance(plain, BlockingIOError):
                        raise plain from None
                    self.wants_write = _wants_write(error)
                    if self._timeout == 0:
                        raise plain from None
                finally:
                    # Or it would keep, until the collector comes, what it went through: the frames
                    # of whoever led the loop, with all that the user's function has.
                    del plain
            if self._timeout is not None and deadline is None:
                deadline = monotonic() + self._timeout
            self._wait(deadline)

    def _wait(self, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._ssl.fileno(), select.POLLOUT if self.wants_write else select.POLLIN)
        if deadline is None:
            poll.poll()
        elif not poll.poll(max(0.0, deadline - monotonic()) * 1000):
            raise TimeoutError("the peer did not answer in time")

    def setblocking(self, flag: bool) -> None:
        """As a socket's."""
        self._timeout = None if flag else 0.0

    def settimeout(self, timeout: float | None) -> None:
        """As a socket's."""
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        """As a socket's."""
        return self._timeout

    # The rest ----------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Return the descriptor, which is that of the socket taken over; -1 when it is closed."""
        return self._ssl.fileno()

    def getsockname(self) -> Any:
        """Return our own address."""
        return self._ssl.getsockname()

    def getpeername(self) -> Any:
        """Return the peer's address."""
        return self._ssl.getpeername()

    def close(self) -> None:
        """Close the socket."""
        self._ssl.close()


class _End(ConnectionResetError):
    """The peer closed its end: to a reader no error."""


def _tells_resets() -> bool:
    import ssl

    return ssl.OPENSSL_VERSION_INFO >= (3,)


def _wants_write(error: OSError) -> bool:
    import ssl

    return isinstance(error, ssl.SSLWantWriteError)


def _plain(error: OSError) -> Exception:
    """Return what a plain socket would raise instead."""
    import ssl

    if not isinstance(error, ssl.SSLError):
        return error
    if isinstance(error, (ssl.SSLWantReadError, ssl.SSLWantWriteError)):
        return BlockingIOError(errno.EAGAIN, "the peer has to do something first")
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationError(
            "it shows another certificate than this session's: it is another program, or somebody "
            f"who intercepts the connection ({error.verify_message})"
        )
    if isinstance(error, ssl.SSLEOFError):
        # A reset comes without a reason. OpenSSL 1 gives none for either.
        kind = ConnectionResetError if not error.reason and _tells_resets() else _End
        return kind(errno.ECONNRESET, "the peer closed the connection")
    name = error.reason or str(error)
    reason = name.lower().replace("_", " ")
    if name in _FOREIGN:
        return ConnectionError(f"it does not speak TLS 1.3 ({reason})")
    if "ALERT" in name:
        return ConnectionError(f"the peer refused the encrypted connection ({reason})")
    return ConnectionError(f"the encrypted connection is broken ({reason})")
