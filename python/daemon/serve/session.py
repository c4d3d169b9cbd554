# SPDX-License-Identifier: MIT
"""One client: its requests, one after another, and what is sent to it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from daemon.serve.answers import Room
from daemon.serve.questions import Question, Stop
from daemon.serve.requests import (
    Hello,
    Lookup,
    OwnerOf,
    Request,
    Stats,
    Subscribe,
    Who,
    parse_request,
    request_id,
)
from daemon.serve.subscription import Subscription
from daemon.system.rights import Peer
from nlproto.client.frames import (
    MAX_REQUEST,
    PROTOCOL,
    Decoder,
    FrameError,
    Kind,
    encode,
    encode_json,
)
from nlproto.errors import Error, NoPrivilege, UsageError
from nlproto.filters.filter import Filter, parse

if TYPE_CHECKING:
    from daemon.serve.server import Server

__all__ = ["MAX_ANSWER", "MAX_BUFFERED", "Session", "WRITE_HIGH"]

WRITE_HIGH = 64 << 10
"""Bytes that the transport may hold before a client counts as one that does not read."""
MAX_BUFFERED = MAX_REQUEST + 4
"""Bytes of requests that wait; nothing is read while there are more."""
MAX_ANSWER = {True: 15 << 20, False: 8 << 20}
"""Bytes of an answer, for who sees everything and for others."""
_TURN = 0.001  # s

_json = msgspec.json.Encoder()
log = logging.getLogger(__name__)


class Session(asyncio.BufferedProtocol):
    """Runs in the event loop's thread alone.

    Requests are answered in order, one at a time: while a question waits for its turn, or a client
    does not read, no further request of this client is looked at.
    """

    def __init__(self, server: Server, peer: Peer, user: int) -> None:
        self.server = server
        self.peer = peer
        self.user = user
        """The uid that counts: the peer's, or that of the user whom it is subordinate to."""
        self.uid: int | None = None if server.sees_everything(peer) else peer.uid
        """The only owner this client may see; None: all."""
        self.subscription = self._no_subscription()
        self._dropped_before = 0
        self._account_at_start: dict[str, Any] | None = None
        self._transport: asyncio.Transport | None = None
        self._decoder = Decoder(MAX_REQUEST)
        self._question: Question | None = None
        self._busy = False
        """A request is under way; the next one waits."""
        self._ended: Callable[[], None] | None = None
        """What remains to be done when the queue is empty."""
        self._paused = False
        self._deaf = False
        self._ending = False
        self._replies: list[bytes] | None = None
        """Of the turn that this session has; they are sent together."""
        self._answer_waits = False
        self._read_last: tuple[int, float] | None = None
        """Bytes of an answer that are left to be read, and since when."""

    def _no_subscription(self) -> Subscription:
        return Subscription(self._pump, self.server.config.client_queue_size)

    @property
    def full(self) -> bool:
        return self.uid is None

    @property
    def dropped(self) -> int:
        """Records of all subscriptions that this client was too slow for."""
        return self._dropped_before + self.subscription.dropped

    # Bytes in

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._question is not None:
            self.server.questions.cancel(self._question)
        self._leave()
        self.subscription.clear()
        self.server.left(self)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.server.buffer

    def buffer_updated(self, count: int) -> None:
        self._decoder.add(memoryview(self.server.buffer)[:count])
        if self._decoder.pending > MAX_BUFFERED:
            self._listen(False)
        self.server.wants_turn(self)

    def eof_received(self) -> bool:
        return False

    def _listen(self, wanted: bool) -> None:
        """Read what the client sends, or leave it where it is."""
        if self._transport is None or self._transport.is_closing() or wanted != self._deaf:
            return
        self._deaf = not wanted
        if wanted:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    @property
    def fd(self) -> int:
        """Its socket's descriptor while nothing is read from it, else -1."""
        if self._transport is None or not self._deaf:
            return -1
        return int(self._transport.get_extra_info("socket").fileno())

    def take_turn(self) -> bool:
        """Handle requests for a moment; whether there are more to handle now."""
        until = time.monotonic() + _TURN
        self._replies = []
        try:
            while not self._busy and not self._paused and not self._ending:
                frame = self._decoder.next()
                if frame is None:
                    self._listen(True)
                    return False
                if frame[0] is not Kind.CONTROL:
                    raise FrameError("clients send control frames only")
                self._handle(frame[1])
                if time.monotonic() > until:
                    return True
        except FrameError as error:
            self._write(_refusal(0, error))
            self._ending = True
        finally:
            replies, self._replies = self._replies, None
            if replies:
                self._write(b"".join(replies))
            if self._ending:
                self.close()
        return False

    def _finish(self, reply: bytes) -> None:
        """Answer the request that is under way; now the next one may come."""
        self._write(reply)
        self._answer_waits = self._paused
        self._busy = False
        self.server.wants_turn(self)

    # Requests

    def _handle(self, payload: bytes) -> None:
        try:
            request = parse_request(payload)
        except UsageError as error:
            self._write(_refusal(request_id(payload), error))
            return
        try:
            self._answer(request)
        except Error as error:
            self._write(_refusal(request.id, error))
        except Exception:
            log.exception("request %s failed", type(request).__name__)
            self._write(_refusal(request.id, Error(_FAILED)))

    def _answer(self, request: Request) -> None:
        if isinstance(request, OwnerOf) and self.server.answers.is_cheap(request):
            self._write(self._made(request, lambda: None))
        elif isinstance(request, Who | OwnerOf | Lookup):
            self._ask(request.id, lambda stop: self._made(request, stop), self._finish)
        elif isinstance(request, Hello):
            self._write(_reply(request.id, self._hello(request)))
        elif isinstance(request, Stats):
            self._write(_reply(request.id, self.server.stats(self)))
        elif isinstance(request, Subscribe):
            if self.subscription.stream is not None:
                raise UsageError("this connection has a subscription already; unsubscribe first")
            self._ask(
                request.id,
                lambda stop: parse(request.filter, resolve=False),
                lambda filter: self._subscribe(request, filter),
            )
        else:
            self._unsubscribe(request.id)

    def _made(self, request: Who | OwnerOf | Lookup, stop: Stop) -> bytes:
        """In a thread of Questions, unless it is cheap."""
        answers, room = self.server.answers, Room(MAX_ANSWER[self.full])
        if isinstance(request, OwnerOf):
            fields = answers.owner(request, self.uid, stop, room)
        elif isinstance(request, Lookup):
            fields = answers.lookup(request, self.uid, stop, room)
        else:
            fields = answers.who(request, self.uid, stop=stop, room=room)
        return _reply(request.id, fields)

    def _ask(self, number: int, work: Callable[[Stop], Any], done: Callable[[Any], None]) -> None:
        def answered(result: Any) -> None:
            self._question = None
            try:
                if isinstance(result, Error):
                    raise result
                done(result)
            except Error as error:
                self._finish(_refusal(number, error))

        self._busy = True
        self._question = Question(self.user, self.full, work, answered)
        self.server.questions.ask(self._question)

    def _hello(self, request: Hello) -> dict[str, Any]:
        if request.protocol != PROTOCOL:
            raise UsageError(
                f"this daemon speaks protocol {PROTOCOL}, not {request.protocol}; "
                "install client and daemon of one release"
            )
        return self.server.greeting() | {"uid": self.peer.uid, "everything": self.full}

    # The subscription

    def _subscribe(self, request: Subscribe, filter: Filter) -> None:
        subscription = self._no_subscription()
        self._dropped_before = self.dropped
        # bytes of packets are for those who could capture them
        snaps = request.snaps and self.full
        streams = self.server.streams
        subscription.stream = streams.join(filter, self.uid, subscription, snaps, self.user)
        self.subscription = subscription
        self.server.share_out()
        self.server.after_all_records(
            subscription.stream, lambda account: self._begin(request.id, account)
        )

    def _begin(self, number: int, account: dict[str, Any]) -> None:
        stream = self.subscription.stream
        if stream is None:
            return
        self.subscription.begun = True
        self._account_at_start = self._shown(account)
        reply = {"account": self._account_at_start, "snaps": stream.snaps}
        self._finish(_reply(number, reply))

    def _shown(self, account: dict[str, Any]) -> dict[str, Any] | None:
        """The daemon's account, for those who may see everybody's packets."""
        return account if self.full else None

    def _unsubscribe(self, number: int) -> None:
        stream = self.subscription.stream
        if stream is None:
            raise UsageError("this connection has no subscription")
        self._busy = True
        self.server.after_all_records(stream, lambda account: self._end(number, account))

    def _end(self, number: int, account: dict[str, Any]) -> None:
        if self._transport is None:
            return
        subscription = self.subscription
        self._leave()

        def answer() -> None:
            fields = {
                "seen": subscription.seen if self.full else None,
                "matched": subscription.matched,
                "sent": subscription.sent,
                "dropped": subscription.dropped,
                "account_at_start": self._account_at_start,
                "account": self._shown(account),
            }
            self._finish(_reply(number, fields))

        self._ended = answer
        self._pump()

    def _leave(self) -> None:
        subscription = self.subscription
        if subscription.stream is not None:
            self.server.streams.leave(subscription.stream, subscription)
            subscription.stream = None
            subscription.begun = False
            self.server.share_out()

    def tell(self, event: str, **fields: Any) -> None:
        """Send an event frame, unless the client does not read."""
        if not self._paused:
            self._write(encode_json(Kind.EVENT, {"event": event, **fields}))

    def tell_account(self, account: dict[str, Any]) -> None:
        """Send the account of exactly the records that were offered until now."""
        if self.subscription.begun and self.full:
            self.tell("account", account=account)

    # Bytes out

    def _pump(self) -> None:
        while not self._paused and self._transport is not None:
            frame = self.subscription.next_frame()
            if frame is None:
                if self._ended is not None:
                    ended, self._ended = self._ended, None
                    ended()
                return
            self._write(frame)

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
        """Whether this client has read nothing of an answer for `patience` s."""
        if not self._answer_waits:
            return False
        if self._read_last is None or self._read_last[0] != self.unread:
            self._read_last = self.unread, now
        return now - self._read_last[1] > patience

    def pause_writing(self) -> None:
        self._paused = True
        self.server.slow.add(self)

    def resume_writing(self) -> None:
        self._paused = self._answer_waits = False
        self._read_last = None
        self.server.slow.discard(self)
        self._pump()
        self.server.has_read(self)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


_FAILED = "the daemon failed on this request; see its log"


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
    else:
        code = "failed"
    message = {"id": number, "ok": False, "error": " ".join(str(error).split()), "code": code}
    return encode(Kind.CONTROL, _json.encode(message))
