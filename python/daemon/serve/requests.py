# SPDX-License-Identifier: MIT
"""What clients may ask (docs/PROTOCOL.md): types and limits, checked while parsing."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from nlproto.errors import UsageError

__all__ = [
    "Hello",
    "HistoryRequest",
    "Lookup",
    "News",
    "OwnerOf",
    "Request",
    "Stats",
    "Subscribe",
    "Unsubscribe",
    "Usage",
    "Who",
    "parse_request",
    "request_id",
]

Id = Annotated[int, Meta(ge=0, le=2**53)]
Port = Annotated[int, Meta(ge=0, le=65535)]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U64 = Annotated[int, Meta(ge=0)]
Proto = Literal["tcp", "udp"]
AskedHost = Annotated[str, Meta(min_length=1, max_length=64)]
AskedName = Annotated[str, Meta(min_length=1, max_length=256)]
Limit = Annotated[int, Meta(ge=1, le=10_000)]
Nanoseconds = Annotated[int, Meta(ge=0, le=2**63 - 1)]
MAX_THING = 4096
Seconds = Annotated[float, Meta(ge=0, le=1e10)]


class _Base(Struct, tag_field="op", forbid_unknown_fields=True, frozen=True):
    id: Id


AskedEnd = tuple[AskedHost, Port]
"""(address, port)."""


class Hello(_Base, tag="hello", frozen=True):
    protocol: Annotated[int, Meta(ge=0, le=2**31)] = 1


class Stats(_Base, tag="stats", frozen=True):
    pass


class Who(_Base, tag="who", frozen=True):
    port: Port | None = None
    proto: Proto | None = None
    host: AskedHost | None = None
    pid: U32 | None = None
    pname: AskedName | None = None
    domain: AskedName | None = None
    since: Seconds | None = None
    until: Seconds | None = None
    """`since` and `until` are seconds before now."""
    at: Seconds | None = None
    ends: tuple[AskedEnd, AskedEnd] | None = None
    """Both ends of one flow, in either order."""
    seen_until: Seconds | None = None
    """Unix time: last packet then or before. So a client asks for the rest of a long answer."""
    netns: U32 | None = None
    listening: bool = False
    """Only sockets that wait for a peer, and nothing of the past."""
    limit: Limit = 1000


class HistoryRequest(Who, tag="history", frozen=True):
    uid: U32 | None = None


class Usage(_Base, tag="usage", frozen=True):
    by: Literal["process", "unit", "container", "user", "domain"] = "process"
    since: Seconds = 86400.0
    """Seconds before now."""
    limit: Limit = 1000


class News(_Base, tag="news", frozen=True):
    kind: Literal["program", "destination", "listener"]
    since: Seconds
    """Seconds before now: what was first seen since then."""
    unseen: Annotated[float, Meta(ge=86_400, le=1e10)] = 30 * 86_400.0
    """Seconds before `since` in which it was not seen."""
    limit: Limit = 1000
    after: tuple[Nanoseconds, Annotated[str, Meta(max_length=MAX_THING)], U32] | None = None
    """`next` of an answer: this one goes on there."""


class OwnerOf(_Base, tag="owner", frozen=True):
    port: Port
    proto: Proto | None = None
    address: AskedHost | None = None


class LookupKey(Struct, forbid_unknown_fields=True, frozen=True):
    cookie: U64 | None = None
    netns: U32 | None = None
    proto: Proto | None = None
    address: AskedHost | None = None
    port: Port | None = None
    tgid: U32 | None = None
    start_ns: U64 | None = None

    def __post_init__(self) -> None:
        # a check that msgspec's bounds cannot express
        if (self.cookie or 0) >> 64 or (self.start_ns or 0) >> 64:
            raise ValueError("cookie and start_ns have 64 bits")


class Lookup(_Base, tag="lookup", frozen=True):
    keys: Annotated[list[LookupKey], Meta(max_length=1000)]


class Subscribe(_Base, tag="subscribe", frozen=True):
    filter: Annotated[str, Meta(max_length=8192)] = ""
    snaps: bool = False
    flows: bool = False
    """Sums of flows in place of records. Without filter and first bytes."""


class Unsubscribe(_Base, tag="unsubscribe", frozen=True):
    pass


Request = (
    Hello | Stats | Who | HistoryRequest | Usage | News | OwnerOf | Lookup | Subscribe | Unsubscribe
)

_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)


# msgspec passes on what Python's UTF-8 decoder says of a string
_WRONG = (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError)


class _Id(Struct):
    id: Id = 0


_id_decoder = msgspec.json.Decoder(_Id)


def parse_request(payload: bytes) -> Request:
    """The request in a control frame. Raises UsageError."""
    try:
        return _decoder.decode(payload)
    except _WRONG as error:
        raise UsageError(f"bad request: {error}") from None


def request_id(payload: bytes) -> int:
    """Return the id of a request that is otherwise wrong; 0 if it has none."""
    try:
        return _id_decoder.decode(payload).id
    except _WRONG:
        return 0
