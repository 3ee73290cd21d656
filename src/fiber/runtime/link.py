"""A channel in the loop: frames out at the end of a turn, frames in to a handler.

    post ─► outbox ─ end of the turn ─► flush ─► socket ─► read ─► inbox ─► on_frame
                                                   └─ its end, or a damaged frame ─► on_lost

All of it within the loop, which tells when the socket is ready.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from fiber.runtime.logs import ERROR, log
from fiber.runtime.loop import Event, Loop
from fiber.runtime.poller import READ, WRITE
from fiber.wire.channel import Channel
from fiber.wire.framing import Frame, FrameError

__all__ = ["Link"]

_LARGE = 1 << 13  # bytes, to pack which takes longer than to send them


class Link:
    """A channel in the loop.

    Args:
        loop: which one.
        channel: it is made non-blocking, and closed by `close`.
        on_frame: called with each frame.
        on_lost: called once when the peer is gone or sent what is no frame.
    """

    def __init__(
        self,
        loop: Loop,
        channel: Channel,
        on_frame: Callable[[Frame], Any],
        on_lost: Callable[[], Any],
    ) -> None:
        self.channel = channel
        self.lost = False
        self.unread = False
        """Whether the peer went without having read all that was sent, as far as that is known."""
        self._loop = loop
        self.on_frame = on_frame
        self.on_lost = on_lost
        self.sent: Event | None = None  # to be set when everything posted is on its way
        self._inbox: deque[Frame] = deque()  # read, and not handled yet
        self._waits_to_send = False
        self._broken = False  # nothing goes out any more; what came in is still read
        channel.sock.setblocking(False)
        loop.register(channel.fileno(), READ, self._ready)

    def post(self, kind: int, body: bytes, buffers: Any = (), fds: Any = ()) -> None:
        """Send a frame at the end of this turn; into the void if the peer is gone.

        A large one goes at once, so that the peer is at work while others get theirs.
        """
        if self._broken or self.lost:
            return
        self.channel.post(kind, body, buffers, fds)
        if len(body) < _LARGE:
            self._loop.send_soon(self)
        else:
            self.flush()

    def enclose(self, kind: int, body: bytes) -> None:
        """Send a frame along with the next that is posted; on its own it is not worth the way."""
        if not (self._broken or self.lost):
            self.channel.post(kind, body)

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be sent, or ever will be."""
        return self.lost or self._broken or self.channel.idle

    def flush(self) -> None:
        """Send what can be sent now."""
        if self.lost or self._broken:
            return
        try:
            sent = self.channel.flush()
        except OSError:
            self._broken = self.unread = sent = True  # the next read need not say so again
        if sent == self._waits_to_send:
            self._waits_to_send = not sent
            events = READ if sent else READ | WRITE
            self._loop.modify(self.channel.fileno(), events)
        if self.sent is not None and sent:
            self.sent.set()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self.flush()
        if events & READ and not self.lost:
            self._read()

    def _read(self) -> bool:
        """Handle what one `recv` brings; return whether there may be more."""
        if self._inbox and not self._handle():  # a handler of this link drains it
            return False
        try:
            self._inbox.extend(self.channel.read())
        except BlockingIOError:
            return False
        except FrameError as error:
            log(ERROR, "a channel is closed, for its peer sent a damaged frame: %s", error)
            self._lose()
            return False
        except (EOFError, OSError) as error:
            self.unread = self.unread or isinstance(error, ConnectionResetError)
            self._lose()
            return False
        return self._handle()

    def _handle(self) -> bool:
        """Handle, in their order, the frames that have come; return whether the link is there."""
        while self._inbox:
            self.on_frame(self._inbox.popleft())
            if self.lost:
                self._inbox.clear()
        return not self.lost

    def drain(self) -> None:
        """Handle all that has arrived, to the end."""
        while not self.lost and self._read():
            pass

    def release(self) -> Any:
        """Give up the socket: send what was posted, and return it for another use.

        The peer must wait for what was posted last, so that none of what it sends has been read.
        """
        self.flush()
        self.lost = True
        self._loop.unregister(self.channel.fileno())
        return self.channel.sock

    def _lose(self) -> None:
        self.close()
        self.on_lost()

    def close(self) -> None:
        """Close the channel; `on_lost` is not called."""
        if not self.lost:
            self.lost = True
            self._loop.unregister(self.channel.fileno())
            self.channel.close()
            if self.sent is not None:
                self.sent.set()
