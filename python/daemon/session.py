# SPDX-License-Identifier: MIT
"""One client: its requests, its subscription, its bounded queue."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from daemon.requests import (
    Hello,
    Lookup,
    OwnerOf,
    Request,
    Stats,
    Subscribe,
    Unsubscribe,
    Who,
    parse_request,
    request_id,
)
from daemon.rights import Peer
from daemon.streams import Piece, Stream
from nlproto.errors import Error, NoPrivilege, UsageError
from nlproto.frames import (
    DATA_HEAD,
    HEAD,
    MAX_REQUEST,
    MAX_WAITING,
    PROTOCOL,
    Decoder,
    FrameError,
    Kind,
    encode,
    encode_json,
)
from nlproto.processes import Key

if TYPE_CHECKING:
    from daemon.server import Server

__all__ = ["Session"]

_WRITE_HIGH = 256 * 1024
_MAX_TOLD = 1 << 17

_json = msgspec.json.Encoder()
log = logging.getLogger(__name__)


class Session(asyncio.Protocol):
    """Runs in the event loop's thread alone."""

    def __init__(self, server: Server, peer: Peer) -> None:
        self.server = server
        self.peer = peer
        self.uid: int | None = None if server.sees_everything(peer) else peer.uid
        """The only owner this client may see; None: all."""
        self.stream: Stream | None = None
        self.seen = self.matched = self.sent = self.dropped = 0
        self._account_at_start: dict[str, Any] | None = None
        self._transport: asyncio.Transport | None = None
        self._decoder = Decoder(MAX_REQUEST)
        self._queue: deque[tuple[int, Piece]] = deque()
        self._queued = 0
        self._sequence = 0
        self._told: dict[Key, int] = {}
        self._told_dropped = 0
        self._paused = False
        self._slow = 0
        self._begun = False
        """The subscription counts from the account at its start on."""
        self._ending = False

    # Bytes in

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_WRITE_HIGH)
        self.server.joined(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._queue.clear()
        self.server.left(self)

    def data_received(self, data: bytes) -> None:
        replies: list[bytes] = []
        try:
            for kind, payload in self._decoder.feed(data):
                if kind is not Kind.CONTROL:
                    raise FrameError("clients send control frames only")
                reply = self._handle(payload)
                if reply is not None:
                    replies.append(reply)
        except FrameError as error:
            replies.append(_refusal(0, error))
            self._write(b"".join(replies))
            self.close()
            return
        if replies:
            self._write(b"".join(replies))

    def eof_received(self) -> bool:
        return False

    def _handle(self, payload: bytes) -> bytes | None:
        try:
            request = parse_request(payload)
        except UsageError as error:
            return _refusal(request_id(payload), error)
        try:
            return self._answer(request)
        except Error as error:
            return _refusal(request.id, error)
        except Exception:
            log.exception("request %s failed", type(request).__name__)
            return _refusal(request.id, Error("the daemon failed on this request; see its log"))

    def _answer(self, request: Request) -> bytes | None:
        answers = self.server.answers
        if isinstance(request, OwnerOf):
            return _reply(request.id, answers.owner(request, self.uid))
        if isinstance(request, Lookup):
            return _reply(request.id, answers.lookup(request, self.uid))
        if isinstance(request, Who):
            self._ask_later(request)
            return None
        if isinstance(request, Hello):
            return _reply(request.id, self._hello(request))
        if isinstance(request, Stats):
            return _reply(request.id, self.server.stats(self))
        if isinstance(request, Subscribe):
            self._subscribe(request)
        else:
            self._unsubscribe(request)
        return None

    def _hello(self, request: Hello) -> dict[str, Any]:
        if request.protocol != PROTOCOL:
            raise UsageError(
                f"this daemon speaks protocol {PROTOCOL}, not {request.protocol}; "
                "install client and daemon of one release"
            )
        return self.server.greeting() | {"uid": self.peer.uid, "everything": self.uid is None}

    def _ask_later(self, request: Who) -> None:
        if self._slow >= MAX_WAITING:
            raise _Busy(f"{MAX_WAITING} questions of this client wait; read the answers first")
        self._slow += 1
        future = self.server.in_thread(lambda: self.server.answers.who(request, self.uid))

        def done(future: asyncio.Future[dict[str, Any]]) -> None:
            self._slow -= 1
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                reply = _reply(request.id, future.result())
            else:
                if not isinstance(error, Error):
                    log.error("who failed", exc_info=error)
                    error = Error("the daemon failed on this request; see its log")
                reply = _refusal(request.id, error)
            self._write(reply)

        future.add_done_callback(done)

    # The subscription

    def _subscribe(self, request: Subscribe) -> None:
        if self.stream is not None:
            raise UsageError("this connection has a subscription already; unsubscribe first")
        # bytes of packets are for those who could capture them
        snaps = request.snaps and self.uid is None
        self.stream = self.server.streams.join(request.filter, self.uid, self, snaps)
        self.server.after_all_records(lambda account: self._begin(request, account))

    def _begin(self, request: Subscribe, account: dict[str, Any]) -> None:
        if self.stream is None:
            return
        self._begun = True
        self.seen = self.matched = self.sent = self.dropped = 0
        self._told_dropped = 0
        self._sequence = 0
        self._account_at_start = self._shown(account)
        self._write(
            _reply(request.id, {"account": self._account_at_start, "snaps": self.stream.snaps})
        )

    def _shown(self, account: dict[str, Any]) -> dict[str, Any] | None:
        """The daemon's account, for those who may see everybody's packets."""
        return account if self.uid is None else None

    def _unsubscribe(self, request: Unsubscribe) -> None:
        if self.stream is None:
            raise UsageError("this connection has no subscription")
        if self._ending:
            raise UsageError("this subscription is ending already")
        self._ending = True
        self.server.after_all_records(lambda account: self._end(request, account))

    def _end(self, request: Unsubscribe, account: dict[str, Any]) -> None:
        self._ending = False
        if self._transport is None or self.stream is None:
            return
        self._leave()
        self._queue_reply(request, account)

    def _queue_reply(self, request: Unsubscribe, account: dict[str, Any]) -> None:
        """Answer behind the records that wait."""
        if self._queue and self._transport is not None:
            self.server.loop.call_later(0.01, self._queue_reply, request, account)
            return
        fields = {
            "seen": self.seen if self.uid is None else None,
            "matched": self.matched,
            "sent": self.sent,
            "dropped": self.dropped,
            "account_at_start": self._account_at_start,
            "account": self._shown(account),
        }
        self._write(_reply(request.id, fields))

    def _leave(self) -> None:
        if self.stream is not None:
            self.server.streams.leave(self.stream, self)
            self.stream = None
            self._begun = False

    def leave(self) -> None:
        """The connection is gone: give back what it holds."""
        self._leave()

    def offer(self, seen: int, piece: Piece | None) -> None:
        """`seen` records passed, those in `piece` fit; when the queue is full the oldest go."""
        if self._transport is None or not self._begun:
            return
        self.seen += seen
        if piece is None:
            return
        self.matched += piece.count
        limit = self.server.config.client_queue_size
        while self._queue and self._queued + piece.size > limit:
            _, old = self._queue.popleft()
            self._queued -= old.size
            self.dropped += old.count
        self._queue.append((self._sequence, piece))
        self._sequence += 1
        self._queued += piece.size
        self._pump()

    def lose(self, seen: int, matched: int) -> None:
        """Records that could not be offered because the event loop was behind."""
        if self._begun:
            self.seen += seen
            self.matched += matched
            self.dropped += matched

    @property
    def queued_bytes(self) -> int:
        return self._queued

    def tell(self, event: str, **fields: Any) -> None:
        """Send an event frame, unless the client does not read."""
        if not self._paused:
            self._write(encode_json(Kind.EVENT, {"event": event, **fields}))

    def tell_account(self, account: dict[str, Any]) -> None:
        """Send the account of exactly the records that were offered until now."""
        if self._begun and self.uid is None:
            self.tell("account", account=account)

    # Bytes out

    def _pump(self) -> None:
        transport = self._transport
        while self._queue and not self._paused and transport is not None:
            sequence, piece = self._queue.popleft()
            self._queued -= piece.size
            if self.dropped != self._told_dropped:
                lost = self.dropped - self._told_dropped
                self._told_dropped = self.dropped
                event = {"event": "gap", "where": "client", "records": lost}
                transport.write(encode_json(Kind.EVENT, event))
            news = self._untold(piece)
            if news:
                transport.write(encode(Kind.PROCESSES, b"[" + b",".join(news) + b"]"))
            if piece.snaps:
                transport.write(encode(Kind.SNAPS, piece.snaps))
            length = DATA_HEAD.size + len(piece.payload) + HEAD.size - 4
            head = HEAD.pack(length, Kind.DATA, b"\0\0\0") + DATA_HEAD.pack(sequence, self.dropped)
            self.sent += piece.count
            transport.write(head + piece.payload)

    def _untold(self, piece: Piece) -> list[bytes]:
        told = self._told
        if len(told) > _MAX_TOLD:
            told.clear()
        news = []
        for key, generation, encoded in piece.processes:
            if told.get(key) != generation:
                told[key] = generation
                news.append(encoded)
        return news

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def pause_writing(self) -> None:
        self._paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Busy(Error):
    pass


def _reply(number: int, fields: dict[str, Any]) -> bytes:
    try:
        return encode(Kind.CONTROL, _json.encode({"id": number, "ok": True, **fields}))
    except FrameError as error:
        return _refusal(number, error)


def _refusal(number: int, error: Error) -> bytes:
    if isinstance(error, (UsageError, FrameError)):
        code = "usage"
    elif isinstance(error, NoPrivilege):
        code = "denied"
    elif isinstance(error, _Busy):
        code = "busy"
    else:
        code = "failed"
    message = {"id": number, "ok": False, "error": " ".join(str(error).split()), "code": code}
    return encode(Kind.CONTROL, _json.encode(message))
