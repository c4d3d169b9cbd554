# SPDX-License-Identifier: MIT
"""Beginnings of TCP streams, joined from segments in any order; bounded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

__all__ = ["TcpStreams"]

_SEGMENTS = 32  # the most of one stream that wait for an earlier segment
_WRAP = 1 << 32


@dataclass(slots=True)
class _Stream:
    next_seq: int
    data: bytearray = field(default_factory=bytearray)
    early: dict[int, bytes] = field(default_factory=dict)


class TcpStreams:
    """At most `limit` streams of `most` bytes each. The longest silent one is dropped first."""

    def __init__(self, limit: int, most: int) -> None:
        self._limit = limit
        self._most = most
        self._streams: OrderedDict[Hashable, _Stream] = OrderedDict()

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._streams

    def begin(self, key: Hashable, seq: int) -> None:
        """Begin stream `key`; its first byte has sequence number `seq`."""
        self._streams[key] = _Stream(seq % _WRAP)
        self._streams.move_to_end(key)
        if len(self._streams) > self._limit:
            self._streams.popitem(last=False)

    def end(self, key: Hashable) -> None:
        """Forget a stream."""
        self._streams.pop(key, None)

    def add(self, key: Hashable, seq: int, payload: bytes) -> bytearray | None:
        """Add a segment; return the bytes in order so far. The caller may delete the first ones.

        None: the stream is not known, or has grown too large and is dropped.
        """
        stream = self._streams.get(key)
        if stream is None:
            return None
        self._streams.move_to_end(key)
        stream.early[seq] = payload
        while stream.early:
            for at in stream.early:
                behind = (stream.next_seq - at) % _WRAP  # bytes of it that came before
                if behind < _WRAP // 2:
                    break
            else:
                break
            new = stream.early.pop(at)[behind:]
            stream.data += new
            stream.next_seq = (stream.next_seq + len(new)) % _WRAP
        waiting = sum(map(len, stream.early.values()))
        if len(stream.early) > _SEGMENTS or len(stream.data) + waiting > self._most:
            self.end(key)
            return None
        return stream.data
