# SPDX-License-Identifier: MIT
"""One client: its requests, one after another, and its stream."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from daemon.serve.answers import Answers, Room
from daemon.serve.connection import ClientConnection, Hall, refusal, reply
from daemon.serve.publisher import Stream
from daemon.serve.questions import FAILED, Questions, QueuedQuestion, StopIfGone
from daemon.serve.requests import (
    Hello,
    Lookup,
    News,
    OwnerOf,
    Request,
    Stats,
    Subscribe,
    Usage,
    Who,
    parse_request,
    request_id,
)
from daemon.serve.streams import Streams
from daemon.serve.subscription import Subscription
from daemon.system.rights import Peer
from nlproto.client.frames import PROTOCOL, Kind, encode_json
from nlproto.errors import Error, UsageError
from nlproto.filters.filter import Filter

__all__ = ["MAX_ANSWER", "Desk", "Session"]

MAX_ANSWER = {True: 15 << 20, False: 8 << 20}
"""The most bytes of an answer, for users who see everything and for others."""
_SHORT = 64
"""A filter of so many letters takes 1 ms at most: root's does not wait behind a question."""

log = logging.getLogger(__name__)


class Desk(Hall, Protocol):
    """The part of the server that sessions need (daemon.serve.server.Server)."""

    answers: Answers
    questions: Questions
    streams: Streams

    @property
    def queue_size(self) -> int:
        """Bytes that may wait for one client."""

    def greeting(self) -> dict[str, Any]:
        """What every client learns about this daemon."""

    def figures(self) -> dict[str, Any]:
        """The account, and sizes and losses of every part."""

    def share_out(self) -> None:
        """A subscription came or went: divide the room for queues again."""

    def after_all_records(
        self, stream: Stream, function: Callable[[dict[str, Any] | Error], None], /
    ) -> None:
        """Call `function` when all packets recorded until now were offered to `stream`."""


class Session(ClientConnection):
    """A client with its requests and its subscription."""

    def __init__(self, desk: Desk, peer: Peer, user: int, full: bool) -> None:
        super().__init__(desk)
        self._desk = desk
        self.peer = peer
        self.user = user
        """The uid that counts: the peer's, or that of the user to whom it is subordinate."""
        self.uid: int | None = None if full else peer.uid
        """The only owner that this client may see; None: all."""
        self.subscription = self._no_subscription()
        self._dropped_before = 0
        self._account_at_start: dict[str, Any] | None = None
        self._question: QueuedQuestion | None = None
        self._ended: Callable[[], None] | None = None
        """What to do when the queue is empty."""

    def _no_subscription(self) -> Subscription:
        return Subscription(self._pump, self._desk.queue_size)

    @property
    def full(self) -> bool:
        return self.uid is None

    @property
    def dropped(self) -> int:
        """Records of all subscriptions that were dropped because this client read too slowly."""
        return self._dropped_before + self.subscription.dropped

    def _gone(self) -> None:
        if self._question is not None:
            self._desk.questions.cancel(self._question)
        self._leave()
        self.subscription.clear()

    # Requests

    def _handle(self, payload: bytes) -> None:
        try:
            request = parse_request(payload)
        except UsageError as error:
            self._write(refusal(request_id(payload), error))
            return
        self._see_to(request.id, lambda: self._answer(request))

    def _see_to(self, number: int, work: Callable[[], None]) -> None:
        """Run `work`, which answers request `number` now or later. An exception is the answer."""
        try:
            work()
        except Exception as error:
            if not isinstance(error, Error):
                log.exception("a request failed")
                error = Error(FAILED)
            self._finish(refusal(number, error))

    def _answer(self, request: Request) -> None:
        if isinstance(request, OwnerOf) and self._desk.answers.is_cheap(request, self.uid):
            self._write(self._made(request, lambda: None))
        elif isinstance(request, Who | Usage | News | OwnerOf | Lookup):
            self._ask(request.id, lambda stop: self._made(request, stop), self._finish)
        elif isinstance(request, Hello):
            self._write(reply(request.id, self._hello(request)))
        elif isinstance(request, Stats):
            self._write(reply(request.id, self._stats()))
        elif isinstance(request, Subscribe):
            if self.subscription.stream is not None:
                raise UsageError("this connection has a subscription already; unsubscribe first")
            if request.flows and (request.filter or request.snaps):
                raise UsageError("flows come without a filter and without first bytes")
            if self.full and len(request.filter) <= _SHORT:
                self._busy = True
                self._subscribe(request, _parsed(request.filter))
                return
            self._ask(
                request.id,
                lambda stop: _parsed(request.filter),
                lambda filter: self._subscribe(request, filter),
            )
        else:
            self._unsubscribe(request.id)

    def _made(self, request: Who | Usage | News | OwnerOf | Lookup, stop: StopIfGone) -> bytes:
        """Answer in a thread of Questions, unless it is cheap."""
        answers, room = self._desk.answers, Room(MAX_ANSWER[self.full])
        if isinstance(request, OwnerOf):
            fields = answers.owner(request, self.uid, stop, room)
        elif isinstance(request, Usage):
            fields = answers.usage(request, self.uid, stop, room)
        elif isinstance(request, News):
            fields = answers.news(request, self.uid, stop, room)
        elif isinstance(request, Lookup):
            fields = answers.lookup(request, self.uid, stop, room)
        else:
            fields = answers.who(request, self.uid, stop=stop, room=room)
        return reply(request.id, fields)

    def _ask(
        self, number: int, work: Callable[[StopIfGone], Any], done: Callable[[Any], None]
    ) -> None:
        def answered(result: Any) -> None:
            self._question = None
            self._see_to(number, lambda: done(_unless_error(result)))

        self._busy = True
        self._question = QueuedQuestion(self.user, self.full, work, answered)
        self._desk.questions.ask(self._question)

    def _hello(self, request: Hello) -> dict[str, Any]:
        if request.protocol != PROTOCOL:
            raise UsageError(
                f"this daemon speaks protocol {PROTOCOL}, not {request.protocol}; "
                "install client and daemon of one release"
            )
        return self._desk.greeting() | {"uid": self.peer.uid, "everything": self.full}

    def _stats(self) -> dict[str, Any]:
        """Return what this client may know of a process."""
        subscription = self.subscription
        own = {
            "seen": subscription.seen if self.full else None,
            "matched": subscription.matched,
            "sent": subscription.sent,
            "dropped": subscription.dropped,
            "queued_bytes": subscription.queued,
        }
        fields = self._desk.greeting() | {"client": own}
        return fields | self._desk.figures() if self.full else fields

    # The subscription

    def _subscribe(self, request: Subscribe, filter: Filter) -> None:
        subscription = self._no_subscription()
        self._dropped_before = self.dropped
        # only users who could capture them get bytes of packets
        first_bytes = request.snaps and self.full
        streams = self._desk.streams
        subscription.stream = streams.join(
            filter, self.uid, subscription, first_bytes, self.user, request.flows
        )
        self.subscription = subscription
        try:
            self._desk.share_out()
            self._desk.after_all_records(
                subscription.stream,
                lambda account: self._see_to(request.id, lambda: self._begin(request.id, account)),
            )
        except Exception:
            self._leave()
            raise

    def _begin(self, number: int, result: dict[str, Any] | Error) -> None:
        stream = self.subscription.stream
        if stream is None:
            return
        if isinstance(result, Error):
            self._leave()
        account = _unless_error(result)
        self.subscription.begun = True
        self._account_at_start = self._shown(account)
        fields = {"account": self._account_at_start, "snaps": stream.first_bytes}
        self._finish(reply(number, fields))

    def _shown(self, account: dict[str, Any]) -> dict[str, Any] | None:
        """Return the daemon's account, if this client sees everybody's packets."""
        return account if self.full else None

    def _unsubscribe(self, number: int) -> None:
        stream = self.subscription.stream
        if stream is None:
            raise UsageError("this connection has no subscription")
        self._busy = True
        self._desk.after_all_records(
            stream, lambda account: self._see_to(number, lambda: self._end(number, account))
        )

    def _end(self, number: int, result: dict[str, Any] | Error) -> None:
        if self._transport is None:
            return
        subscription = self.subscription
        self._leave()
        account = _unless_error(result)

        def answer() -> None:
            fields = {
                "seen": subscription.seen if self.full else None,
                "matched": subscription.matched,
                "sent": subscription.sent,
                "dropped": subscription.dropped,
                "account_at_start": self._account_at_start,
                "account": self._shown(account),
            }
            self._finish(reply(number, fields))

        self._ended = lambda: self._see_to(number, answer)
        self._pump()

    def _leave(self) -> None:
        subscription = self.subscription
        if subscription.stream is not None:
            self._desk.streams.leave(subscription.stream, subscription)
            subscription.stream = None
            subscription.begun = False
            self._desk.share_out()

    def tell(self, event: str, **fields: Any) -> None:
        """Send an event frame, unless the client does not read."""
        if not self._paused:
            self._write(encode_json(Kind.EVENT, {"event": event, **fields}))

    def tell_account(self, account: dict[str, Any]) -> None:
        """Send the account of exactly the records offered until now."""
        if self.subscription.begun and self.full:
            self.tell("account", account=account)

    def _pump(self) -> None:
        """Send what waits, as far as the client reads. Close the connection if its frames fail."""
        try:
            self._send_waiting()
        except Exception:
            log.exception("a client's frames could not be made; it is let go")
            self.abort()

    def _send_waiting(self) -> None:
        while not self._paused and self._transport is not None:
            frame = self.subscription.next_frame()
            if frame is None:
                if self._ended is not None:
                    ended, self._ended = self._ended, None
                    ended()
                return
            self._write(frame)


def _unless_error(result: Any) -> Any:
    """Return `result`; raise it if it is an Error."""
    if isinstance(result, Error):
        raise result
    return result


def _parsed(text: str) -> Filter:
    from nlproto.filters.parse import (
        parse,
    )  # its grammar takes 4 MB

    return parse(text, resolve=False)
