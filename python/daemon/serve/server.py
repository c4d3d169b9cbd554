# SPDX-License-Identifier: MIT
"""Serves any number of clients: access, turns, and what all of them share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import nlproto
from daemon.serve.answers import Answers
from daemon.serve.bounds import ANSWER_BYTES, STREAM_BYTES, Bounds, bounds_of
from daemon.serve.connection import has_gone
from daemon.serve.publisher import Lane, Stream
from daemon.serve.questions import FAILED, Questions, QueuedQuestion
from daemon.serve.session import MAX_ANSWER, Session
from daemon.serve.streams import Streams
from daemon.sharing.allowance import FILTERS, QUESTIONS, REQUESTS, Allowance
from daemon.sharing.quota import Quota
from daemon.sharing.turns import Turns
from daemon.system.config import Config
from daemon.system.rights import Peer, group_id, peer_of
from nlproto._host import ffi, lib
from nlproto.client.frames import PROTOCOL
from nlproto.errors import Error
from nlproto.records.batch import NamedBatch
from nlproto.running.supervise import Failures
from nlproto.running.urgency import Urgency
from nlproto.tables.shares import Payers

__all__ = ["Server"]

_AT_ONCE = 256
"""The most connections that are accepted in one go,"""
_AT_FIRST = 8
"""and while it is not known whose are refused: that costs the loop more."""
_REFUSED = 0.01  # s without accepting after some were refused: it must not cost others their time
_SHUT = 0.05  # s for which a uid without room has none, even if one of its clients leaves
_AGAIN = 0.1  # s to the next try after a failure
_MOST_SHUT = 64
"""Uids without room whose connections are closed at once."""
_READ = 16 << 10
"""Bytes read from a client at once."""
_ACCOUNT = 1.0  # s between two accounts for subscribers
_LOOK, _ALONE = 0.25, 1.0  # s between two checks for clients that have gone or do not read
_TOGETHER = 0.02  # s for which questions of users with limited rights wait for each other
_STUCK = 30.0
"""s after which a client is disconnected that reads nothing of an answer."""
_PATIENCE = 1.0
"""s for waiting frames of clients when the daemon ends; twice, if need be."""
_COMPLAIN = 60.0  # s between two log entries about the same

AccountTaker = Callable[[dict[str, Any] | Error], None]
"""Gets the account when all earlier records have left, or the error."""

log = logging.getLogger(__name__)


class Server:
    """Serves `answers` and streams on a bound socket. For the event loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        answers: Answers,
        config: Config,
        figures: Callable[[], dict[str, Any]],
        bounds: Bounds | None = None,
    ) -> None:
        self.loop = loop
        self.answers = answers
        self.config = config
        self.bounds = bounds or bounds_of(config)
        self.streams = Streams(
            answers.pipeline, self._post, config.max_filters, STREAM_BYTES, Allowance(FILTERS)
        )
        self.questions = Questions(loop, self._may_answer, Allowance(QUESTIONS))
        self.buffer = bytearray(_READ)
        """The buffer that all sessions read into, one at a time."""
        self.slow: set[Session] = set()
        """Sessions with more to send than their clients read."""
        self.refused = 0
        self.stuck = 0
        self._places: Quota[Session | Arrival] = Quota(config.max_clients)
        self._sessions: set[Session] = set()
        self._arrivals: set[Arrival] = set()
        self._accepted = ffi.new("int[]", _AT_ONCE)
        self._shut: set[int] = set()
        """Uids that had no room, until a client leaves; then a moment longer."""
        self._room = False
        """Whether a client has left since the last look at that."""
        self._shut_at = 0.0
        self._payers = Payers()
        self._failures = Failures("clients")
        self._turns: Turns[Session | Arrival] = Turns(loop, Allowance(REQUESTS), self._failures)
        self._waiting: list[tuple[Stream, AccountTaker]] = []
        """Functions of users with limited rights that wait until all records have passed."""
        self._figures = figures
        self._dropped_before = 0
        self._gid = group_id(config.group)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listener: socket.socket | None = None
        self._complained = -_COMPLAIN
        self._started = time.time()

    def start(self, listener: socket.socket) -> None:
        self.streams.__enter__()
        self._listen(listener)
        self._task(self._tell_accounts())
        self._task(self._look_after())

    async def stop(self) -> None:
        """Publish what waits, say bye, give clients a moment to read, close."""
        if self._listener is not None:
            self.loop.remove_reader(self._listener.fileno())
            self._listener = None
        for arrival in tuple(self._arrivals):
            self.turn_away(arrival)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.questions.end()
        await self.loop.run_in_executor(None, self.streams.stop, _PATIENCE)
        account = self._account(settled=True)
        for session in tuple(self._sessions):
            session.tell_account(account)
            session.tell("bye")
            session.close()
        deadline = self.loop.time() + _PATIENCE
        while self._sessions and self.loop.time() < deadline:
            await asyncio.sleep(0.01)
        for session in tuple(self._sessions):
            session.abort()
        await asyncio.sleep(0)

    def reconfigure(self, config: Config) -> None:
        self.config = config
        self.streams.reconfigure(config.max_filters)
        self._places.total = config.max_clients
        self._shut.clear()
        self._gid = group_id(config.group)
        self.share_out()

    def _task(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # # Access

    def _listen(self, listener: socket.socket) -> None:
        # not asyncio.start_unix_server: credentials decide before a session exists
        self._listener = listener
        # by its number: asyncio makes a text of a socket that it does not know yet
        self.loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            self._take_all(listener)
        except Exception as error:  # the next one is there at once: nothing else would be done
            self._failures.add(error, "accepting")
            self._rest(listener, "see the failure in this log")

    def _take_all(self, listener: socket.socket) -> None:
        """Accept all that wait, so that nobody fills the socket's queue for others."""
        self._payers.refresh()
        if self._room and self.loop.time() - self._shut_at > _SHUT:
            self._room = False
            self._shut.clear()
        shut, refused_there = list(self._shut), ffi.new("uint32_t *")
        group = -1 if self._gid is None else self._gid
        most = _AT_ONCE if shut else _AT_FIRST
        found = lib.host_accept(
            listener.fileno(), self._accepted, most, shut, len(shut), group, refused_there
        )
        self.refused += refused_there[0]
        if found < 0:
            if -found != errno.EAGAIN:
                self._rest(listener, os.strerror(-found))
            return
        refused = [fd for fd in ffi.unpack(self._accepted, found) if not self._may_stay(fd)]
        if refused:
            self.refused += len(refused)
            lib.host_close(refused, len(refused))
        if refused or refused_there[0]:
            self._pause(listener, _REFUSED)

    def _rest(self, listener: socket.socket, error: str) -> None:
        """No descriptors or no memory: clients that connect wait a little longer."""
        if self.loop.time() > self._complained + _COMPLAIN:
            self._complained = self.loop.time()
            log.warning("no client can connect at present: %s", error)
        self._pause(listener, _AGAIN)

    def _pause(self, listener: socket.socket, seconds: float) -> None:
        self.loop.remove_reader(listener.fileno())

        def again() -> None:
            if self._listener is not None:
                self._listen(listener)

        self.loop.call_later(seconds, again)

    def _may_stay(self, fd: int) -> bool:
        try:
            return self._admit(fd)
        except Exception as error:  # the others accepted with it are still served
            self._failures.add(error, "accepting")
            return False

    def _admit(self, fd: int) -> bool:
        """Decide whether the connection may stay. It is served in its user's turn."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
        try:
            peer = peer_of(connection)
        except OSError as error:
            log.debug("client lost while it connected: %s", error)
            connection.detach()
            return False
        user, full = self._payers.of_one(peer.uid), peer.sees_everything(self._gid)
        counted = None if full else user
        if not self._places.has_room(counted):
            connection.detach()
            if not full and len(self._shut) < _MOST_SHUT:
                self._shut.add(peer.uid)
                self._shut_at = self.loop.time()
            return False
        arrival = Arrival(self, connection, peer, user, full)
        self._arrivals.add(arrival)
        self._places.take(arrival, counted)
        self.wants_turn(arrival)
        return True

    def serve(self, arrival: Arrival) -> None:
        """Give a connection its session, unless its client has gone."""
        if has_gone(arrival.connection):
            self.turn_away(arrival)
            return
        self._arrivals.discard(arrival)
        self._places.give_back(arrival)
        session = Session(self, arrival.peer, arrival.user, arrival.full)
        self._places.take(session, None if session.full else session.user)
        self._sessions.add(session)
        self._task(self._connect(session, arrival.connection))

    def turn_away(self, arrival: Arrival) -> None:
        self._arrivals.discard(arrival)
        self._places.give_back(arrival)
        self._room = True
        self._turns.discard(arrival)
        arrival.connection.close()

    async def _connect(self, session: Session, connection: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(lambda: session, connection)
        except BaseException as error:
            self.left(session)
            connection.close()
            if not isinstance(error, OSError):
                raise
            log.debug("client lost while it connected: %s", error)

    @property
    def queue_size(self) -> int:
        """Bytes that may wait for one client."""
        return self.config.client_queue_size

    def left(self, session: Session, /) -> None:
        self.slow.discard(session)
        if session in self._sessions:
            self._sessions.discard(session)
            self._places.give_back(session)
            self._room = True
            self._dropped_before += session.dropped
        self._turns.discard(session)
        self.questions.pump()

    # # Turns

    def wants_turn(self, session: Session | Arrival, /) -> None:
        """The session has something to do. Users take turns."""
        self._turns.add(session)

    def falls_behind(self, session: Session, /) -> None:
        self.slow.add(session)

    def catches_up(self, session: Session, /) -> None:
        self.slow.discard(session)

    def has_read(self, session: Session, /) -> None:
        self.wants_turn(session)
        self.questions.pump()

    def _may_answer(self, question: QueuedQuestion) -> bool:
        """Return whether unread answers leave room for another one."""
        everybodys = own = MAX_ANSWER[question.full]
        for session in self.slow:
            if session.full == question.full:
                everybodys += session.unread
                own += session.unread if session.user == question.user else 0
        return everybodys <= ANSWER_BYTES and own <= ANSWER_BYTES // (1 if question.full else 4)

    async def _look_after(self) -> None:
        """Close clients that have gone while nothing was read from them, or that do not read."""
        urgency = Urgency()
        while True:
            await asyncio.sleep(_LOOK if self._sessions else _ALONE)
            urgency.look()  # whoever waits, waits for this thread
            try:
                self._let_go()
            except Exception as error:
                self._failures.add(error, "looking after clients")

    def _let_go(self) -> None:
        for session in _hung_up(self._sessions):
            session.abort()
        for session in tuple(self.slow):
            if session.is_stuck(self.loop.time(), _STUCK):
                self.stuck += 1
                session.abort()

    def share_out(self) -> None:
        """Give each user's clients an equal part of the room for queues."""
        for full in (True, False):
            users: dict[int, list[Session]] = {}
            for session in self._sessions:
                if session.full == full and session.subscription.stream is not None:
                    users.setdefault(session.user, []).append(session)
            for sessions in users.values():
                part = self.bounds.client_queues // 2 // len(users) // len(sessions)
                for session in sessions:
                    session.subscription.limit_queue(min(part, self.config.client_queue_size))

    # # From other threads

    async def _tell_accounts(self) -> None:
        """Send accounts: a client needs its last one if this daemon dies."""

        def tell(lane: Lane, account: dict[str, Any] | Error) -> None:
            if not isinstance(account, Error):
                for session in tuple(self._sessions):
                    stream = session.subscription.stream
                    if stream is not None and stream.lane is lane:
                        session.tell_account(account)

        while True:
            await asyncio.sleep(_ACCOUNT)
            streams = [one.subscription.stream for one in self._sessions if one.full]
            # records and flows go different ways
            lanes = {id(one.lane): one for one in streams if one is not None}
            for stream in lanes.values():
                self.after_all_records(stream, partial(tell, stream.lane))

    def publish(self, batch: NamedBatch) -> None:
        """Hand a batch to all subscribers. Worker thread."""
        self.streams.publish(batch)

    def announce(self, event: str, **fields: Any) -> None:
        """Send an event to every subscriber. Any thread."""

        def tell() -> None:
            for session in tuple(self._sessions):
                if session.subscription.stream is not None:
                    session.tell(event, **fields)

        self._post(tell)

    def _post(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self.loop.call_soon_threadsafe(function)

    def after_all_records(self, stream: Stream, function: AccountTaker, /) -> None:
        """Call `function` in the loop when all packets recorded until now were offered to `stream`.

        It gets the account of exactly these, or the Error that says why there is none.
        """

        if stream.uid is None:
            self._barrier([(stream, function)])
            return
        # each call empties the engine: so not one for each of many requests
        self._waiting.append((stream, function))
        if len(self._waiting) == 1:
            self.loop.call_later(_TOGETHER, self._barrier, self._waiting)

    def _barrier(self, waiting: list[tuple[Stream, AccountTaker]]) -> None:
        if waiting is self._waiting:
            self._waiting = []

        def passed() -> None:
            account: dict[str, Any] | Error
            try:
                account = self._account(settled=True)
            except Exception as error:  # each waiting function is called
                self._failures.add(error, "the account")
                account = Error(FAILED)
            for stream, function in waiting:
                self.streams.mark(stream, partial(function, account))

        self.answers.pipeline.barrier(passed)

    # Figures

    def greeting(self) -> dict[str, Any]:
        return {
            "protocol": PROTOCOL,
            "version": nlproto.__version__,
            "pid": os.getpid(),
            "engine": self.answers.pipeline.engine.name,
            "started": self._started,
        }

    def _account(self, settled: bool = False) -> dict[str, Any]:
        pipeline = self.answers.pipeline
        with pipeline.account_lock:
            return pipeline.account.as_dict(settled)

    def figures(self) -> dict[str, Any]:
        """Return the account, and sizes and losses of every part. Any thread."""
        sessions = tuple(self._sessions)
        clients = {
            "connected": len(sessions),
            "max": self.config.max_clients,
            "for_others": self._places.for_others,
            "refused": self.refused,
            "stuck": self.stuck,
            "queued_bytes": sum(one.subscription.queued for one in sessions),
            "dropped": self._dropped_before + sum(one.dropped for one in sessions),
            "questions_waiting": self.questions.waiting,
            "questions_cancelled": self.questions.cancelled,
        } | self.streams.figures()
        own = {"account": self._account(), "clients": clients, "memory": self.bounds.as_dict()}
        return own | self._figures()


@dataclass(eq=False, slots=True)
class Arrival:
    """A connection that has a place and waits to be served."""

    server: Server
    connection: socket.socket
    peer: Peer
    user: int
    full: bool

    def take_turn(self) -> bool:
        self.server.serve(self)
        return False

    def abort(self) -> None:
        self.server.turn_away(self)


def _hung_up(sessions: Iterable[Session]) -> list[Session]:
    """Return the sessions that are not read from and whose client has closed its end."""
    poll = select.poll()
    by_fd = {session.fd: session for session in sessions if session.fd >= 0}
    for fd in by_fd:
        poll.register(fd, 0)  # POLLHUP is always reported
    return [by_fd[fd] for fd, events in poll.poll(0) if events] if by_fd else []
