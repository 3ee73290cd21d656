"""The handshake: both sides prove themselves, and nothing recorded or altered is worth anything."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fiber.errors import AuthenticationError
from fiber.wire import auth
from fiber.wire.auth import CallerHandshake, ListenerHandshake, new_secret

SECRET = new_secret()
HELLO = 44  # bytes: magic, version, Python, nonce
PROOF = 32


def shake(listener: ListenerHandshake, caller: CallerHandshake) -> tuple[bytes, bytes, bytes]:
    """Let both do all of a handshake; return the three messages."""
    answer = caller.feed(listener.greeting)
    proof = listener.feed(answer)
    assert proof is not None
    assert caller.feed(proof) == b""
    return listener.greeting, answer, proof


def test_two_who_share_the_secret_come_together() -> None:
    caller = CallerHandshake(SECRET)
    messages = shake(ListenerHandshake(SECRET), caller)
    assert caller.done
    assert [len(message) for message in messages] == [HELLO, HELLO + PROOF, PROOF]


def test_the_secret_is_not_among_what_is_sent() -> None:
    for message in shake(ListenerHandshake(SECRET), CallerHandshake(SECRET)):
        assert SECRET not in message
        assert SECRET[:8] not in message


def test_secrets_are_long_and_never_the_same() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert {len(secret) for secret in secrets} == {32}


def test_nothing_of_a_handshake_repeats() -> None:
    messages = [shake(ListenerHandshake(SECRET), CallerHandshake(SECRET)) for _ in range(50)]
    for place in range(3):
        assert len({handshake[place] for handshake in messages}) == 50


@given(st.lists(st.integers(1, HELLO + PROOF), max_size=10))
def test_a_handshake_may_come_in_pieces(cuts: list[int]) -> None:
    listener, caller = ListenerHandshake(SECRET), CallerHandshake(SECRET)

    def pieces(data: bytes) -> list[bytes]:
        places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        return [data[a:b] for a, b in itertools.pairwise(places)]

    answer = b"".join(caller.feed(piece) for piece in pieces(listener.greeting))
    replies = [listener.feed(piece) for piece in pieces(answer)]
    assert replies[:-1] == [None] * (len(replies) - 1)
    assert replies[-1] is not None
    assert not caller.done
    for piece in pieces(replies[-1]):
        assert caller.feed(piece) == b""
    assert caller.done


# Strangers --------------------------------------------------------------------------------------


def test_a_caller_with_another_secret_is_refused() -> None:
    listener = ListenerHandshake(SECRET)
    with pytest.raises(AuthenticationError, match="secret"):
        listener.feed(CallerHandshake(new_secret()).feed(listener.greeting))


def test_a_listener_with_another_secret_is_refused() -> None:
    impostor, caller = ListenerHandshake(new_secret()), CallerHandshake(SECRET)
    caller.feed(impostor.greeting)
    with pytest.raises(AuthenticationError, match="secret"):
        caller.feed(b"\0" * PROOF)
    assert not caller.done


def test_a_recorded_caller_is_worth_nothing() -> None:
    _, answer, _ = shake(ListenerHandshake(SECRET), CallerHandshake(SECRET))
    for _ in range(10):
        with pytest.raises(AuthenticationError, match="secret"):
            ListenerHandshake(SECRET).feed(answer)


def test_a_recorded_listener_is_worth_nothing() -> None:
    greeting, _, proof = shake(ListenerHandshake(SECRET), CallerHandshake(SECRET))
    caller = CallerHandshake(SECRET)
    caller.feed(greeting)
    with pytest.raises(AuthenticationError, match="secret"):
        caller.feed(proof)
    assert not caller.done


def test_a_proof_cannot_be_sent_back_to_who_made_it() -> None:
    """Who has no secret asks one side what to answer to the other: the roles are in the proofs."""
    caller = CallerHandshake(SECRET)
    pretended = ListenerHandshake(new_secret()).greeting
    answer = caller.feed(pretended)
    with pytest.raises(AuthenticationError):
        caller.feed(answer[HELLO:])
    listener = ListenerHandshake(SECRET)
    with pytest.raises(AuthenticationError):
        listener.feed(listener.greeting + answer[HELLO:])


@given(st.integers(0, HELLO + PROOF - 1), st.integers(1, 255))
def test_any_altered_byte_of_the_caller_is_refused(place: int, change: int) -> None:
    listener = ListenerHandshake(SECRET)
    answer = bytearray(CallerHandshake(SECRET).feed(listener.greeting))
    answer[place] ^= change
    with pytest.raises(AuthenticationError):
        listener.feed(bytes(answer))


@given(st.integers(0, HELLO + PROOF - 1), st.integers(1, 255))
def test_any_altered_byte_of_the_listener_is_refused(place: int, change: int) -> None:
    listener, caller = ListenerHandshake(SECRET), CallerHandshake(SECRET)
    greeting = bytearray(listener.greeting)
    if place < HELLO:
        greeting[place] ^= change
        with pytest.raises(AuthenticationError):
            listener.feed(caller.feed(bytes(greeting)))
    else:
        proof = bytearray(listener.feed(caller.feed(bytes(greeting))) or b"")
        proof[place - HELLO] ^= change
        with pytest.raises(AuthenticationError):
            caller.feed(bytes(proof))
    assert not caller.done


@given(st.integers(0, HELLO + PROOF - 1))
def test_a_handshake_that_stops_is_never_done(length: int) -> None:
    listener = ListenerHandshake(SECRET)
    answer = CallerHandshake(SECRET).feed(listener.greeting)
    assert listener.feed(answer[:length]) is None
    assert listener.wants == HELLO + PROOF - length


@given(st.binary(min_size=1, max_size=200))
def test_noise_is_refused_at_its_first_wrong_byte(noise: bytes) -> None:
    listener = ListenerHandshake(SECRET)
    assume(not auth.MAGIC.startswith(noise[: len(auth.MAGIC)]))
    with pytest.raises(AuthenticationError, match="protocol"):
        listener.feed(noise[: listener.wants])


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n", b"\x80\x05", b"SSH-2.0-", bytes(44)])
def test_a_caller_refuses_who_speaks_something_else(greeting: bytes) -> None:
    caller = CallerHandshake(SECRET)
    with pytest.raises(AuthenticationError, match="protocol"):
        caller.feed((greeting * 44)[:HELLO])


# Versions ---------------------------------------------------------------------------------------


def hello_of(version: int, python: tuple[int, int]) -> bytes:
    return struct.pack("!8sHBB32s", auth.MAGIC, version, *python, bytes(32))


def hear_listener(hello: bytes) -> None:
    ListenerHandshake(SECRET).feed(hello + bytes(PROOF))


def hear_caller(hello: bytes) -> None:
    CallerHandshake(SECRET).feed(hello)


@pytest.mark.parametrize("hear", [hear_listener, hear_caller])
def test_another_version_of_the_protocol_is_named(hear: Callable[[bytes], None]) -> None:
    hello = hello_of(auth.VERSION + 41, auth.PYTHON)
    with pytest.raises(AuthenticationError, match=rf"\b{auth.VERSION + 41}\b.*\b{auth.VERSION}\b"):
        hear(hello)


@pytest.mark.parametrize("hear", [hear_listener, hear_caller])
def test_another_python_is_named(hear: Callable[[bytes], None]) -> None:
    ours = rf"{auth.PYTHON[0]}\.{auth.PYTHON[1]}"
    with pytest.raises(AuthenticationError, match=rf"3\.99.*{ours}"):
        hear(hello_of(auth.VERSION, (3, 99)))
