# SPDX-License-Identifier: MIT
"""The daemon's client: questions, and a stream of named records (docs/PROTOCOL.md)."""

from __future__ import annotations

import math
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from nlproto.client.frames import (
    DATA_HEAD,
    DEFAULT_SOCKET,
    MAX_REPLY,
    PROTOCOL,
    Decoder,
    FrameError,
    Kind,
    encode_json,
    parse_json,
)
from nlproto.client.told import ToldEnd
from nlproto.errors import DaemonBusy, Error, NoDaemon, NoPrivilege, UsageError, VersionMismatch
from nlproto.records import wire
from nlproto.records.batch import NamedBatch
from nlproto.records.clock import Clock
from nlproto.running.closing import Closing
from nlproto.running.commands import as_root
from nlproto.tables.flows import decode_flows
from nlproto.tables.processes import Process

__all__ = [
    "AccountEvent",
    "DaemonClient",
    "DaemonEvent",
    "EndsEvent",
    "ClientEvent",
    "ProcessesEvent",
    "FirstBytesEvent",
    "NamesEvent",
    "StreamBatch",
]


@dataclass(frozen=True, slots=True)
class StreamBatch:
    """The records of one data frame; or, of a flows frame, `batch.flows` and no records."""

    batch: NamedBatch
    seq: int
    """Of the data frame, from 0; a gap means that whole frames were dropped for this client."""
    dropped: int
    """Records, or flows, dropped for this client so far, because it read too slowly."""


@dataclass(frozen=True, slots=True)
class ProcessesEvent:
    """Details of processes that the records after it name."""

    processes: list[Process]


@dataclass(frozen=True, slots=True)
class FirstBytesEvent:
    """The first bytes of packets whose records come next."""

    batch: wire.FirstBytesBatch


@dataclass(frozen=True, slots=True)
class EndsEvent:
    """Names of far ends of packets whose records come next."""

    ends: list[ToldEnd]


@dataclass(frozen=True, slots=True)
class NamesEvent:
    """Names of far ends, by the numbers in `domain` of the flows that come next."""

    names: dict[int, str]


@dataclass(frozen=True, slots=True)
class DaemonEvent:
    """Something that happened: `name` is gap, module_gone, module_back, packet_gone or bye."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AccountEvent:
    """The daemon's account of exactly the records before it. For users who see all, each second."""

    account: dict[str, Any]


_NO_RECORDS = np.empty(0, wire.RECORD)
_PIPELINED = 128
"""Requests sent without waiting. Up to twice as many may be under way."""

ClientEvent = (
    StreamBatch
    | ProcessesEvent
    | FirstBytesEvent
    | EndsEvent
    | NamesEvent
    | DaemonEvent
    | AccountEvent
)
"""What a subscription brings, in the order in which the daemon sent it."""

_ERRORS: Mapping[str, type[Error]] = {"usage": UsageError, "denied": NoPrivilege}


class DaemonClient(Closing):
    """One connection to the daemon. Not for several threads at once.

    Raises NoDaemon if there is no daemon or it goes away, VersionMismatch if it is of another
    release. Raises UsageError if it refuses the request, NoPrivilege if this user may not
    make it. Raises Error for any other failure.
    """

    def __init__(
        self, path: str | os.PathLike[str] = DEFAULT_SOCKET, timeout: float = 10.0
    ) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout
        self.daemon: dict[str, Any] = {}
        """The daemon's answer to hello: version, protocol, engine, pid, uid, everything."""
        self.account: dict[str, Any] = {}
        """The account of the last subscription, once unsubscribe() has returned."""
        self._decoder = Decoder(MAX_REPLY)
        self._replies: dict[int, dict[str, Any]] = {}
        self._events: deque[ClientEvent] = deque()
        self._next_id = 1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # with a timeout of Python's, connect(2) fails at once if many clients wait
        seconds = int(timeout)
        limit = struct.pack("ll", seconds, max(1, int((timeout - seconds) * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            self._socket.connect(self.path)
        except BlockingIOError:
            self._socket.close()
            raise DaemonBusy(
                f"{self.path} took no connection in {timeout:g} s: too many wait there; try again"
            ) from None
        except OSError as error:
            self._socket.close()
            raise NoDaemon(
                f"no daemon answers at {self.path} ({error.strerror or error}); "
                f"start it with: {as_root('packet-hunterd')}"
            ) from None
        try:
            self.daemon = self.request("hello", protocol=PROTOCOL)
        except UsageError as error:  # the caller is not to blame
            self.close()
            raise VersionMismatch(str(error)) from None
        except NoDaemon:  # there is a daemon: the caller must not go on as if there were none
            self.close()
            raise DaemonBusy(
                f"{self.path} closed the connection at once: the daemon has all the clients that"
                " it takes (max_clients), or is ending; try again"
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection. A second call does nothing."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor of its socket, for poll(2)."""
        return self._socket.fileno()

    # Questions

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send one request and return its reply without "id" and "ok"; None fields are left out."""
        (number,) = self._send([(op, fields)])
        return self._reply(number)

    def pipeline(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Send small requests without waiting for each reply; replies in the order of requests."""
        waiting: deque[int] = deque()
        replies = []
        for at in range(0, len(requests), _PIPELINED):
            waiting.extend(self._send(requests[at : at + _PIPELINED]))
            while len(waiting) > _PIPELINED:
                replies.append(self._reply(waiting.popleft()))
        return replies + [self._reply(number) for number in waiting]

    def who(
        self,
        *,
        port: int | None = None,
        proto: str | None = None,
        host: str | None = None,
        pid: int | None = None,
        pname: str | None = None,
        domain: str | None = None,
        since: float | None = None,
        until: float | None = None,
        at: float | None = None,
        seen_until: float | None = None,
        netns: int | None = None,
        listening: bool | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Return who owns, or owned, the traffic that fits all conditions.

        `since`, `until`: seconds before now; `at`, `seen_until`: Unix time in seconds; flows last
        seen then or before: for the rest of a truncated answer; `proto`: "tcp" or "udp";
        `host`: address or network; `netns`: inode; `listening`: only sockets that wait for a peer.
        The reply has "owners" (sockets there now), "flows" (of the history, last seen first),
        "total" and "truncated". Its "processes" are Process as dicts.
        """
        return self.request(
            "who",
            port=port,
            proto=proto,
            host=host,
            pid=pid,
            pname=pname,
            domain=domain,
            since=since,
            until=until,
            at=at,
            seen_until=seen_until,
            netns=netns,
            listening=listening,
            limit=limit,
        )

    def owner(
        self, port: int, proto: str | None = None, address: str | None = None
    ) -> dict[str, Any]:
        """Return the processes with a socket on local `port`.

        The reply has "owners" (netns, proto, address, holders of each) and "truncated".
        """
        return self.request("owner", port=port, proto=proto, address=address)

    def lookup(self, keys: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
        """Return the owners of many sockets or processes, in the order of `keys`; None: not known.

        A key is {"cookie": int}, {"netns", "proto", "address", "port"} (local end), or
        {"tgid", "start_ns"}; at most 1000. What has no room in one answer is asked for again. An
        owner with more holders than an answer has room for has the last seen, and "holders_cut".
        """
        reply = self.request("lookup", keys=list(keys))
        owners: list[dict[str, Any] | None] = reply["owners"]
        half = len(keys) // 2
        if reply["truncated"] and half:
            return self.lookup(keys[:half]) + self.lookup(keys[half:])
        if reply["truncated"] and owners:
            if owners[0] is None:
                raise Error("the daemon's answer has no room for one owner; ask with op owner")
            owners[0]["holders_cut"] = True
        return owners

    def usage(
        self, *, by: str = "process", since: float = 86400.0, limit: int = 1000
    ) -> dict[str, Any]:
        """Return sums of the flows that had packets in the last `since` seconds, most bytes first.

        `by`: process, unit, container, user or domain.
        """
        return self.request("usage", by=by, since=since, limit=limit)

    def news(
        self,
        kind: str,
        *,
        since: float,
        unseen: float = 2592000.0,
        limit: int = 1000,
        after: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        """Return what was seen in the last `since` seconds, but not for `unseen` seconds before.

        `kind`: program, destination or listener. The reply has "news", "processes", "since" (Unix
        time since which the daemon knows) and "truncated". Then "next" is `after` of a question
        that goes on.
        """
        return self.request("news", kind=kind, since=since, unseen=unseen, limit=limit, after=after)

    def stats(self) -> dict[str, Any]:
        """Return the account, queues, engine and table sizes, as far as this user may see them."""
        return self.request("stats")

    # The stream

    def subscribe(self, filter: str = "") -> Iterator[ClientEvent]:
        """Subscribe at once; return an iterator of events until the daemon says bye."""
        self.start(filter)
        return self.events()

    def start(
        self, filter: str = "", first_bytes: bool = False, flows: bool = False
    ) -> dict[str, Any]:
        """Subscribe; the reply's "account" is the daemon's at that moment.

        `first_bytes`: ask for the first bytes of packets too. The reply's "snaps" says whether they
        come. `flows`: get sums of each flow several times a second, in place of records. This costs
        the machine no more than the daemon alone. It takes neither `filter` nor `first_bytes`.
        """
        return self.request(
            "subscribe", filter=filter, snaps=first_bytes or None, flows=flows or None
        )

    def events(self) -> Iterator[ClientEvent]:
        """Yield events of the subscription as they come. Raises NoDaemon when the daemon dies."""
        while True:
            for event in self.read(None):
                yield event
                if isinstance(event, DaemonEvent) and event.name == "bye":
                    return

    def read(self, timeout: float | None) -> list[ClientEvent]:
        """Return the events that are there, or that come within `timeout` seconds (None: wait)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._events:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                left = 0.0
            if not self._receive(left):
                break
        events = list(self._events)
        self._events.clear()
        return events

    def unsubscribe(self) -> dict[str, Any]:
        """End the subscription. Returns when every record on its way has arrived.

        Records that came meanwhile are returned by the next read(0). The reply, also kept in
        `account`: "matched", "sent" and "dropped" records of this subscription, and the daemon's
        "account" at its start and its end.
        """
        self.account = self.request("unsubscribe")
        return self.account

    # Bytes

    def _send(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> range:
        """Send requests; return their ids."""
        numbers = range(self._next_id, self._next_id + len(requests))
        self._next_id = numbers.stop
        frames = []
        for number, (op, fields) in zip(numbers, requests, strict=True):
            message = {"id": number, "op": op}
            message.update((key, value) for key, value in fields.items() if value is not None)
            frames.append(encode_json(Kind.CONTROL, message))
        try:
            self._socket.settimeout(self.timeout)
            self._socket.sendall(b"".join(frames))
        except OSError as error:
            raise self._gone(error) from None
        return numbers

    def _reply(self, number: int) -> dict[str, Any]:
        deadline = time.monotonic() + self.timeout
        while number not in self._replies:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Error(
                    f"the daemon at {self.path} did not answer in {self.timeout:g} s; try again"
                )
            self._receive(left)
        reply = self._replies.pop(number)
        reply.pop("id")
        if reply.pop("ok"):
            return reply
        raise _ERRORS.get(reply.get("code", ""), Error)(reply.get("error", "the daemon refused"))

    def _gone(self, error: object) -> NoDaemon:
        return NoDaemon(f"the daemon at {self.path} has gone ({error}); is it still running?")

    def _receive(self, timeout: float | None) -> bool:
        """Read once. Returns whether anything came in time."""
        ready = select.poll()  # select(2) knows no descriptor above 1023
        ready.register(self._socket, select.POLLIN)
        if not ready.poll(None if timeout is None else math.ceil(timeout * 1000)):
            return False
        try:
            data = self._socket.recv(1 << 20)
        except OSError as error:
            raise self._gone(error) from None
        if not data:
            raise self._gone("it closed the connection")
        for kind, payload in self._decoder.feed(data):
            self._take(kind, payload)
        return True

    def _take(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.CONTROL:
            reply = parse_json(payload)
            number = reply.get("id")
            if not isinstance(number, int) or "ok" not in reply:
                raise FrameError(str(reply.get("error", "the daemon sent a reply without id")))
            self._replies[number] = reply
        elif kind is Kind.DATA:
            seq, dropped = DATA_HEAD.unpack_from(payload)
            batch = wire.decode_batch(memoryview(payload)[DATA_HEAD.size :])
            records = np.array(batch.records)
            named = NamedBatch(batch.head, records, Clock.from_head(batch.head))
            self._events.append(StreamBatch(named, seq, dropped))
        elif kind is Kind.FLOWS:
            seq, dropped = DATA_HEAD.unpack_from(payload)
            head, flows = decode_flows(memoryview(payload)[DATA_HEAD.size :])
            named = NamedBatch(head, _NO_RECORDS, Clock.from_head(head), flows)
            self._events.append(StreamBatch(named, seq, dropped))
        elif kind is Kind.NAMES:
            names = msgspec.json.decode(payload, type=dict[int, str])
            self._events.append(NamesEvent(names))
        elif kind is Kind.PROCESSES:
            self._events.append(ProcessesEvent(msgspec.json.decode(payload, type=list[Process])))
        elif kind is Kind.SNAPS:
            self._events.append(FirstBytesEvent(wire.decode_first_bytes(payload)))
        elif kind is Kind.ENDS:
            self._events.append(EndsEvent(msgspec.json.decode(payload, type=list[ToldEnd])))
        else:
            fields = parse_json(payload)
            name = str(fields.pop("event", ""))
            account = fields.get("account")
            if name == "account" and isinstance(account, dict):
                self._events.append(AccountEvent(account))
            else:
                self._events.append(DaemonEvent(name, fields))
