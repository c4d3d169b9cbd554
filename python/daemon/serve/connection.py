# SPDX-License-Identifier: MIT
"""One client's connection: frames in and out, and how many may wait."""

from __future__ import annotations

import asyncio
import select
import socket
import time
from typing import Any, Protocol

import msgspec

from nlproto.client.frames import MAX_REQUEST, Decoder, FrameError, Kind, encode
from nlproto.errors import Error, NoPrivilege, UsageError

__all__ = ["MAX_BUFFERED", "WRITE_HIGH", "ClientConnection", "Hall", "has_gone", "refusal", "reply"]

WRITE_HIGH = 64 << 10
"""Bytes in the transport from which on a client counts as one that does not read."""
MAX_BUFFERED = MAX_REQUEST + 4
"""Bytes of waiting requests from which on nothing more is read."""
_TURN = 0.001  # s

_json = msgspec.json.Encoder()


class Hall(Protocol):
    """Where all connections belong (daemon.serve.server.Server)."""

    buffer: bytearray
    """The buffer that all connections read into, one at a time."""

    def wants_turn(self, connection: Any, /) -> None:
        """The connection has something to do."""

    def falls_behind(self, connection: Any, /) -> None:
        """Its client does not read what was written."""

    def catches_up(self, connection: Any, /) -> None:
        """Its client has read what was written."""

    def has_read(self, connection: Any, /) -> None:
        """It may take requests again, unless it still has requests that wait."""

    def left(self, connection: Any, /) -> None:
        """It is closed."""


class ClientConnection(asyncio.BufferedProtocol):
    """Runs only in the event loop's thread.

    Requests are handled in order, one at a time. While one is under way, or the client does not
    read, the next one waits.
    """

    def __init__(self, hall: Hall) -> None:
        self._hall = hall
        self._transport: asyncio.Transport | None = None
        self._decoder = Decoder(MAX_REQUEST)
        self._busy = False
        """A request is under way; the next one waits."""
        self._paused = False
        self._deaf = False
        self._ending = False
        self._heard_all = False
        """The client sends nothing more: when the last request is answered, this ends."""
        self._replies: list[bytes] | None = None
        """Frames of this turn, which are sent together."""
        self._answer_waits = False
        self._read_last: tuple[int, float] | None = None
        """Bytes of an answer that are not yet read, and since when."""

    def _handle(self, payload: bytes) -> None:
        """Take one request. Raises FrameError to end the connection."""
        raise NotImplementedError

    def _pump(self) -> None:
        """Send what waits, as far as the client reads."""
        raise NotImplementedError

    def _gone(self) -> None:
        """The client has gone, or was disconnected."""
        raise NotImplementedError

    # Bytes in

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        try:
            self._gone()
        finally:
            self._hall.left(self)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._hall.buffer

    def buffer_updated(self, count: int) -> None:
        self._decoder.add(memoryview(self._hall.buffer)[:count])
        if self._decoder.pending > MAX_BUFFERED:
            self._listen(False)
        self._hall.wants_turn(self)

    def eof_received(self) -> bool:
        """Return whether to stay: the client has ended its requests only, and waits for answers."""
        self._heard_all = True
        self._hall.wants_turn(self)
        return not has_gone(self.fd)

    def _listen(self, wanted: bool) -> None:
        """Read what the client sends, or leave it in the socket."""
        if self._transport is None or self._transport.is_closing() or self._heard_all:
            return
        if wanted != self._deaf:
            return
        self._deaf = not wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    @property
    def fd(self) -> int:
        """Return its socket's descriptor while nothing is read from it, else -1."""
        if self._transport is None or not (self._deaf or self._heard_all):
            return -1
        return int(self._transport.get_extra_info("socket").fileno())

    def take_turn(self) -> bool:
        """Handle requests for a moment. Returns whether there are more."""
        until = time.monotonic() + _TURN
        self._replies = []
        try:
            while not self._busy and not self._paused and not self._ending:
                frame = self._decoder.next()
                if frame is None:
                    self._ending = self._heard_all
                    self._listen(True)
                    return False
                if frame[0] is not Kind.CONTROL:
                    raise FrameError("clients send control frames only")
                self._handle(frame[1])
                if time.monotonic() > until:
                    return True
        except FrameError as error:
            self._write(refusal(0, error))
            self._ending = True
        finally:
            replies, self._replies = self._replies, None
            if replies:
                self._write(b"".join(replies))
            if self._ending:
                self.close()
        return False

    def _finish(self, reply: bytes) -> None:
        """Answer the request under way. Then the next one may come."""
        self._write(reply)
        self._answer_waits = self._paused
        self._busy = False
        self._hall.wants_turn(self)

    # Bytes out

    def _write(self, data: bytes) -> None:
        if self._replies is not None:
            self._replies.append(data)
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def unread(self) -> int:
        """Bytes written that the client has not read; those in its socket do not count."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def is_stuck(self, now: float, patience: float) -> bool:
        """Return whether this client has read nothing of an answer for `patience` s."""
        if not self._answer_waits:
            return False
        if self._read_last is None or self._read_last[0] != self.unread:
            self._read_last = self.unread, now
        return now - self._read_last[1] > patience

    def pause_writing(self) -> None:
        self._paused = True
        self._hall.falls_behind(self)

    def resume_writing(self) -> None:
        self._paused = self._answer_waits = False
        self._read_last = None
        self._hall.catches_up(self)
        self._pump()
        self._hall.has_read(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def has_gone(connection: int | socket.socket) -> bool:
    """Return whether the other end is closed, and not only ended what it sends."""
    poll = select.poll()
    poll.register(connection, 0)  # POLLHUP is always reported
    return bool(poll.poll(0))


def reply(number: int, fields: dict[str, Any]) -> bytes:
    try:
        return encode(Kind.CONTROL, _json.encode({"id": number, "ok": True, **fields}))
    except FrameError as error:
        return refusal(number, error)


def refusal(number: int, error: Error) -> bytes:
    if isinstance(error, (UsageError, FrameError)):
        code = "usage"
    elif isinstance(error, NoPrivilege):
        code = "denied"
    else:
        code = "failed"
    message = {"id": number, "ok": False, "error": " ".join(str(error).split()), "code": code}
    return encode(Kind.CONTROL, _json.encode(message))
