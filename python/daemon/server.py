# SPDX-License-Identifier: MIT
"""The UNIX socket: one daemon a path, any number of clients."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import nlproto
from daemon.answers import Answers
from daemon.config import Config
from daemon.place import Place
from daemon.rights import Peer, group_id, peer_of
from daemon.session import Session
from daemon.streams import Streams
from nlproto.errors import Error, NoPrivilege
from nlproto.frames import DEFAULT_SOCKET, PROTOCOL
from nlproto.pipeline import NamedBatch
from nlproto.supervise import Failures

__all__ = ["Server", "SocketFile"]

T = TypeVar("T")
_BACKLOG = 256
_ACCOUNT = 1.0  # s between two accounts for those who subscribed
_SHARE = 8
"""A user without rights may have at most one in so many of the connections."""

log = logging.getLogger(__name__)


class SocketFile:
    """A bound, listening UNIX socket at `path`, ours alone by a lock on `path`.lock.

    Raises Error when a live daemon has it or something else than a socket is there, NoPrivilege
    when the directory may not be written. On exit the socket's file is removed; the lock's file
    stays, since removing it would let two daemons hold a lock each.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = -1
        self._place: Place | None = None
        self._mine: os.stat_result | None = None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    def __enter__(self) -> SocketFile:
        try:
            self._place = Place(self.path, os.path.dirname(DEFAULT_SOCKET), 0o755)
            self._take_lock(self._place)
            self._remove_stale(self._place)
            self._mine = self._place.bind(self.socket, 0o666)  # access is decided by credentials
            self.socket.listen(_BACKLOG)
        except OSError as error:
            self._release()
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise NoPrivilege(
                    f"{self.path}: {error.strerror}; run as root or choose another --socket"
                ) from None
            raise Error(
                f"{self.path}: {error.strerror or error}; choose another --socket"
            ) from None
        except BaseException:
            self._release()
            raise
        return self

    def _take_lock(self, place: Place) -> None:
        self._lock = place.open_file(0o600, ".lock")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            by = f" (pid {holder})" if holder.isdigit() else ""
            raise Error(
                f"a daemon{by} already serves {self.path}; stop it first or choose another --socket"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _remove_stale(self, place: Place) -> None:
        found = place.stat()
        if found is None:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise Error(
                f"{self.path} exists and is no socket; remove it or choose another --socket"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(place.path)
            except (ConnectionRefusedError, FileNotFoundError):
                pass
            else:
                raise Error(f"another program listens on {self.path}; choose another --socket")
        log.info("taking over the stale socket %s", self.path)
        place.unlink()

    def __exit__(self, *_: object) -> None:
        if self._place is not None:
            self._place.unlink(self._mine)
        self._release()

    def _release(self) -> None:
        self.socket.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._place is not None:
            self._place.close()


class Server:
    """Serves `answers` and streams on a bound socket; belongs to the event loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        answers: Answers,
        config: Config,
        figures: Callable[[], dict[str, Any]],
    ) -> None:
        self.loop = loop
        self.answers = answers
        self.config = config
        self._figures = figures
        self.streams = Streams(answers.pipeline, self._post, config.max_filters)
        self.sessions: set[Session] = set()
        self.refused = 0
        self._dropped_before = 0
        self._gid = group_id(config.group)
        self._executor = ThreadPoolExecutor(1, "questions")
        self._tasks: list[asyncio.Task[None]] = []
        self._started = time.time()

    def start(self, listener: socket.socket) -> None:
        self._tasks = [
            self.loop.create_task(self._accept(listener)),
            self.loop.create_task(self._tell_accounts()),
        ]

    async def stop(self) -> None:
        """Say bye, give clients a moment to take what waits for them, close."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        account = self._account(settled=True)
        for session in tuple(self.sessions):
            session.tell_account(account)
            session.tell("bye")
            session.close()
        deadline = self.loop.time() + 1.0
        while self.sessions and self.loop.time() < deadline:
            await asyncio.sleep(0.01)
        for session in tuple(self.sessions):
            session.abort()
        await asyncio.sleep(0)
        self._executor.shutdown(wait=True, cancel_futures=True)

    def reconfigure(self, config: Config) -> None:
        self.config = config
        self.streams.max_filters = config.max_filters
        self._gid = group_id(config.group)

    async def _accept(self, listener: socket.socket) -> None:
        # not asyncio.start_unix_server: credentials decide before a session exists
        failures = Failures("accept")
        while True:
            try:
                connection, _ = await self.loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left: who waits is served when one is
                failures.add(error)
                await asyncio.sleep(0.5)
                continue
            try:
                peer = peer_of(connection)
                if not self._has_room(peer):
                    self.refused += 1
                    connection.close()
                    continue
                await self.loop.connect_accepted_socket(lambda: Session(self, peer), connection)  # noqa: B023
            except OSError as error:
                log.debug("client lost while it connected: %s", error)
                connection.close()

    async def _tell_accounts(self) -> None:
        """What a client goes by when this daemon dies without a word."""

        def tell(account: dict[str, Any]) -> None:
            for session in tuple(self.sessions):
                session.tell_account(account)

        while True:
            await asyncio.sleep(_ACCOUNT)
            if any(session.stream is not None for session in self.sessions):
                self.after_all_records(tell)

    def _has_room(self, peer: Peer) -> bool:
        if len(self.sessions) >= self.config.max_clients:
            return False
        if self.sees_everything(peer):
            return True
        mine = sum(1 for session in self.sessions if session.peer.uid == peer.uid)
        return mine < max(1, self.config.max_clients // _SHARE)

    def sees_everything(self, peer: Peer) -> bool:
        return peer.sees_everything(self._gid)

    def joined(self, session: Session) -> None:
        self.sessions.add(session)

    def left(self, session: Session) -> None:
        session.leave()
        self.sessions.discard(session)
        self._dropped_before += session.dropped

    def publish(self, batch: NamedBatch) -> None:
        """Worker thread: hand a batch to all subscribers."""
        self.streams.publish(batch)

    def announce(self, event: str, **fields: Any) -> None:
        """Any thread: tell every subscriber."""

        def tell() -> None:
            for session in tuple(self.sessions):
                if session.stream is not None:
                    session.tell(event, **fields)

        self._post(tell)

    def _post(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self.loop.call_soon_threadsafe(function)

    def after_all_records(self, function: Callable[[dict[str, Any]], None]) -> None:
        """Call `function` in the loop once all packets recorded until now were offered.

        It gets the account of exactly these.
        """

        def passed() -> None:
            account = self._account(settled=True)
            self._post(lambda: function(account))

        self.answers.pipeline.barrier(passed)

    def in_thread(self, function: Callable[[], T]) -> asyncio.Future[T]:
        return self.loop.run_in_executor(self._executor, function)

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

    def stats(self, session: Session) -> dict[str, Any]:
        """What this client may know."""
        own = {
            "seen": session.seen if session.uid is None else None,
            "matched": session.matched,
            "sent": session.sent,
            "dropped": session.dropped,
            "queued_bytes": session.queued_bytes,
        }
        fields = self.greeting() | {"client": own}
        return fields if session.uid is not None else fields | self.figures()

    def figures(self) -> dict[str, Any]:
        """The account, and sizes and losses of every part. Any thread."""
        sessions = tuple(self.sessions)
        clients = {
            "connected": len(sessions),
            "refused": self.refused,
            "filters": len(self.streams),
            "queued_bytes": sum(one.queued_bytes for one in sessions),
            "dropped": self._dropped_before + sum(one.dropped for one in sessions),
        }
        return {"account": self._account(), "clients": clients} | self._figures()
