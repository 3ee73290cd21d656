"""The handshake that every stream of a session opens with.

    listener ──── magic, version, Python, nonce ────────────────────────► caller
    listener ◄─── magic, version, Python, nonce, proof of the caller ──── caller
    listener ──── proof of the listener ────────────────────────────────► caller

A proof is the HMAC-SHA256, under the session's secret, of the prover's role and both hellos. Both
sides prove themselves; a recorded handshake is worth nothing, for each nonce is used once. Nothing
that a peer sends is looked at before it has proved itself, save these few bytes of fixed size.

The state machines are pure: bytes in, bytes out.
"""

from __future__ import annotations

import os
import struct
import sys

from fiber.errors import AuthenticationError

__all__ = ["CallerHandshake", "ListenerHandshake", "new_secret"]

MAGIC = b"\xf1fiber\r\n"
VERSION = 1
_HELLO = struct.Struct("!8sHBB32s")
_PROOF = 32
PYTHON = sys.version_info[:2]


def new_secret() -> bytes:
    """Return a new secret for a session: 32 random bytes."""
    return os.urandom(32)


def _hello() -> bytes:
    return _HELLO.pack(MAGIC, VERSION, *PYTHON, os.urandom(32))


def _proof(secret: bytes, role: bytes, listener: bytes, caller: bytes) -> bytes:
    import hmac  # loads OpenSSL, which to import Fiber needs not

    return hmac.digest(secret, role + listener + caller, "sha256")


def _same(proof: bytes, wanted: bytes) -> bool:
    import hmac

    return hmac.compare_digest(proof, wanted)


def _check_hello(hello: bytes) -> None:
    magic, version, major, minor, _ = _HELLO.unpack(hello)
    if magic != MAGIC:
        raise AuthenticationError("it does not speak Fiber's protocol")
    if version != VERSION:
        raise AuthenticationError(f"it speaks version {version} of the protocol, not {VERSION}")
    if (major, minor) != PYTHON:
        ours = f"{PYTHON[0]}.{PYTHON[1]}"
        raise AuthenticationError(
            f"it runs Python {major}.{minor}, not {ours}: code does not pass between the two"
        )


class _Handshake:
    """Collects what comes until the peer's message of known size is whole."""

    def __init__(self, secret: bytes, expects: int) -> None:
        self._secret = secret
        self._expects = expects
        self._received = b""

    @property
    def wants(self) -> int:
        """How many more bytes the peer has to send."""
        return self._expects - len(self._received)


class ListenerHandshake(_Handshake):
    """The side that listens; send `greeting` first, then feed it what comes."""

    def __init__(self, secret: bytes) -> None:
        super().__init__(secret, _HELLO.size + _PROOF)
        self.greeting = _hello()

    def feed(self, data: bytes) -> bytes | None:
        """Return the last message to send once the caller has proved itself, until then None.

        Raises:
            AuthenticationError: the caller is not of this session; the message says why.
        """
        self._received += data
        if self.wants > 0:
            if not self._received.startswith(MAGIC[: len(self._received)]):
                raise AuthenticationError("it does not speak Fiber's protocol")
            return None
        hello, proof = self._received[: _HELLO.size], self._received[_HELLO.size :]
        _check_hello(hello)
        wanted = _proof(self._secret, b"caller", self.greeting, hello)
        if not _same(proof, wanted):
            raise AuthenticationError("it does not know this session's secret")
        return _proof(self._secret, b"listener", self.greeting, hello)


class CallerHandshake(_Handshake):
    """The side that connects; feed it what comes and send what it answers until `done`."""

    def __init__(self, secret: bytes) -> None:
        super().__init__(secret, _HELLO.size)
        self._greeting = b""
        self._ours = _hello()
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Return what to send next, perhaps nothing.

        Raises:
            AuthenticationError: the listener is not of this session; the message says why.
        """
        self._received += data
        if self.wants > 0:
            return b""
        received, self._received = self._received, b""
        if not self._greeting:
            _check_hello(received)
            self._greeting, self._expects = received, _PROOF
            return self._ours + _proof(self._secret, b"caller", received, self._ours)
        wanted = _proof(self._secret, b"listener", self._greeting, self._ours)
        if not _same(received, wanted):
            raise AuthenticationError("it does not know this session's secret")
        self.done = True
        return b""
