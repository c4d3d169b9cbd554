# SPDX-License-Identifier: MIT
"""Frames of the daemon's UNIX socket (docs/PROTOCOL.md, "UNIX socket")."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from nlproto.errors import Error

__all__ = [
    "DATA_HEAD",
    "DEFAULT_SOCKET",
    "HEAD",
    "MAX_REPLY",
    "MAX_REQUEST",
    "MAX_WAITING",
    "PROTOCOL",
    "Decoder",
    "FrameError",
    "Kind",
    "encode",
    "encode_json",
    "parse_json",
]

PROTOCOL = 1
"""Version of the daemon's protocol (docs/PROTOCOL.md)."""
DEFAULT_SOCKET = "/run/packet-hunter/daemon.sock"
"""Path of the daemon's socket, unless it is configured."""
MAX_REQUEST = 64 * 1024
"""The most bytes of a frame from a client, without the length."""
MAX_REPLY = 16 * 1024 * 1024
"""The most bytes of a frame from the daemon, without the length."""
MAX_WAITING = 16
"""Requests that a client may send before it reads an answer."""

HEAD = struct.Struct("<IB3s")
"""Bytes that follow the first four, kind, three zeros."""
DATA_HEAD = struct.Struct("<QQ")
"""Sequence of the data frame for this client from 0, records dropped for it so far."""

_ZEROS = b"\0\0\0"
_LENGTH = 4
_REST = HEAD.size - _LENGTH


class FrameError(Error):
    """The other side broke the protocol. The connection cannot be used any more."""


class Kind(enum.IntEnum):
    """What a frame holds (docs/PROTOCOL.md, "Frames")."""

    CONTROL = 1
    DATA = 2
    PROCESSES = 3
    EVENT = 4
    SNAPS = 5
    ENDS = 6
    FLOWS = 7
    NAMES = 8


def encode(kind: Kind, payload: bytes) -> bytes:
    """One frame; `payload` up to MAX_REPLY bytes."""
    if len(payload) + _REST > MAX_REPLY:
        raise FrameError(f"a frame of {len(payload)} bytes is over {MAX_REPLY}; ask for less")
    return HEAD.pack(len(payload) + _REST, kind, _ZEROS) + payload


def encode_json(kind: Kind, value: object) -> bytes:
    """Return a frame of `kind` with `value` as JSON. Raises FrameError when it is too long."""
    return encode(kind, msgspec.json.encode(value))


def parse_json(payload: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The object in a control or event frame. Raises FrameError."""
    try:
        value = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FrameError("a control frame holds one JSON object")
    return value


class Decoder:
    """Cuts a byte stream into frames. Holds at most one incomplete frame of `limit` bytes,

    and the complete frames that nobody has taken yet.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of an incomplete frame."""
        return len(self._buffer)

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """Keep `data` until next() or feed() is called."""
        self._buffer += data

    def next(self) -> tuple[Kind, bytes] | None:
        """(kind, payload) of the first frame, None when none is complete. Raises FrameError."""
        return next(self.feed(b""), None)

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[Kind, bytes]]:
        """Yield (kind, payload) of each frame that `data` completes. Raises FrameError."""
        buffer = self._buffer
        buffer += data
        offset, size = 0, len(buffer)
        try:
            while size - offset >= HEAD.size:
                length, kind, zeros = HEAD.unpack_from(buffer, offset)
                if not _REST <= length <= self._limit:
                    raise FrameError(f"frame length {length} is not in {_REST}..{self._limit}")
                if zeros != _ZEROS:
                    raise FrameError("bytes 5 to 7 of a frame are zero in this version")
                if kind not in _KINDS:
                    raise FrameError(f"unknown frame kind {kind}")
                end = offset + _LENGTH + length
                if end > size:
                    break
                payload = bytes(memoryview(buffer)[offset + HEAD.size : end])
                offset = end
                yield _KINDS[kind], payload
        finally:
            del buffer[:offset]


_KINDS = {kind.value: kind for kind in Kind}
