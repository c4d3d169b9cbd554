# SPDX-License-Identifier: MIT
"""One client's part of its stream: a bounded queue, and its account."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from daemon.serve.publisher import EncodedPiece, Stream
from nlproto.client.frames import DATA_HEAD, HEAD, Kind, encode, encode_json

__all__ = ["Subscription"]

_MAX_TOLD = 4096
"""How many processes a client is expected to remember. Beyond, details are sent again."""
_NEWS = 64 << 10
"""The most bytes of process details in one frame, unless one process has more."""


class Subscription:
    """For the event loop's thread. Calls `ready()` when there is a frame to send."""

    def __init__(self, ready: Callable[[], None], limit: int) -> None:
        self.stream: Stream | None = None
        self.begun = False
        """Whether records are counted and queued."""
        self.seen = self.matched = self.sent = self.dropped = 0
        self.queued = 0
        """Bytes of what waits, including the piece that is being sent."""
        self.limit = limit
        self._ready = ready
        self._queue: deque[tuple[int, EncodedPiece]] = deque()
        self._sequence = 0
        self._told: set[int] = set()
        self._told_dropped = 0
        self._frames: Iterator[bytes] = iter(())
        self._sending = 0

    def offer(self, seen: int, piece: EncodedPiece | None) -> None:
        """Of `seen` records those in `piece` fit; a full queue drops its oldest."""
        if not self.begun:
            return
        self.seen += seen
        if piece is None:
            return
        self.matched += piece.count
        self._make_room(piece.size)
        self._queue.append((self._sequence, piece))
        self._sequence += 1
        self.queued += piece.size
        self._ready()

    def lose(self, seen: int, matched: int) -> None:
        """Count records that were not offered: this user's filters are too slow for them."""
        if self.begun:
            self.seen += seen
            self.matched += matched
            self.dropped += matched
            self._ready()

    def limit_queue(self, limit: int) -> None:
        """Hold `limit` bytes from now on, or one piece."""
        self.limit = limit
        while len(self._queue) > 1 and self.queued > limit:
            self._drop_oldest()

    def _make_room(self, size: int) -> None:
        while self._queue and self.queued + size > self.limit:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, old = self._queue.popleft()
        self.queued -= old.size
        self.dropped += old.count

    def next_frame(self) -> bytes | None:
        """Return what to send next; None: nothing waits."""
        while True:
            frame = next(self._frames, None)
            if frame is not None:
                return frame
            self.queued -= self._sending
            self._sending = 0
            if not self._queue:
                return self._gap()
            sequence, piece = self._queue.popleft()
            self._sending = piece.size
            self._frames = self._encoded(sequence, piece)

    def clear(self) -> None:
        """The client is gone."""
        self.begun = False
        self._queue.clear()
        self._frames = iter(())
        self.queued = self._sending = 0

    def _encoded(self, sequence: int, piece: EncodedPiece) -> Iterator[bytes]:
        gap = self._gap()
        if gap is not None:
            yield gap
        yield from self._news(piece)
        if piece.ends:
            yield encode(Kind.ENDS, piece.ends)
        if piece.names:
            yield encode(Kind.NAMES, piece.names)
        if piece.first_bytes:
            yield encode(Kind.SNAPS, piece.first_bytes)
        length = DATA_HEAD.size + len(piece.payload) + HEAD.size - 4
        kind = Kind.FLOWS if piece.flows else Kind.DATA
        head = HEAD.pack(length, kind, b"\0\0\0") + DATA_HEAD.pack(sequence, self.dropped)
        self.sent += piece.count
        yield head + piece.payload

    def _gap(self) -> bytes | None:
        """Return an event about records dropped since the last one; None if there are none."""
        lost = self.dropped - self._told_dropped
        if not lost:
            return None
        self._told_dropped = self.dropped
        return encode_json(Kind.EVENT, {"event": "gap", "where": "client", "records": lost})

    def _news(self, piece: EncodedPiece) -> Iterator[bytes]:
        """Return frames with the processes that this client does not know."""
        if len(self._told) > _MAX_TOLD:
            self._told.clear()
        news: list[bytes] = []
        size = 0
        for _, generation, encoded in piece.processes:
            if generation in self._told:
                continue
            self._told.add(generation)
            if news and size + len(encoded) > _NEWS:
                yield encode(Kind.PROCESSES, b"[" + b",".join(news) + b"]")
                news, size = [], 0
            news.append(encoded)
            size += len(encoded) + 1
        if news:
            yield encode(Kind.PROCESSES, b"[" + b",".join(news) + b"]")
