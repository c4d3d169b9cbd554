# SPDX-License-Identifier: MIT
"""Since when programs, destinations and listeners are known, for `watch`.

A table in the history's database, with a row for each user and thing. Times are times of day.
"""

from __future__ import annotations

import socket
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from daemon.history.schema import signed
from nlproto.errors import Error
from nlproto.overheard.names import is_of_resolver
from nlproto.records.wire import PROTO_NAMES, address_text, text
from nlproto.tables.flows import address_bytes
from nlproto.tables.port_owner import PortOwner

__all__ = [
    "KINDS",
    "After",
    "Sighting",
    "Sightings",
    "known_since",
    "listeners",
    "note",
    "seen_first",
    "shorten",
]

KINDS = ("program", "destination", "listener")
MOST = 100_000
"""The most rows. Beyond it the user with most rows loses those not seen for longest."""
_PAUSE_NS = 86_400_000_000_000
"""What was not seen for so long appears again; the row keeps when it was seen before."""
_NEVER = -1

Sighting = tuple[str, str, int, int, int, int, int, str]
"""kind, name, uid, first and last seen (ns since 1970), pid, its start_ns, details."""

After = tuple[int, str, int]
"""The place of a finding: first seen (ns since 1970), name, uid."""

_NOTE = f"""
INSERT INTO sightings (kind, name, uid, first, last, tgid, start_ns, about, before)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, {_NEVER})
ON CONFLICT (kind, name, uid) DO UPDATE SET
    before = CASE WHEN excluded.first - last > {_PAUSE_NS} THEN last ELSE before END,
    first = CASE WHEN excluded.first - last > {_PAUSE_NS} THEN excluded.first ELSE first END,
    last = max(last, excluded.last)
"""
_SEEN_FIRST = f"""
SELECT kind, name, uid, first, last, tgid, start_ns, about, before FROM sightings AS one
WHERE kind = ? AND first >= ? AND (before = {_NEVER} OR first - before >= ?)
    AND (? IS NULL OR uid = ?) AND (first, name, uid) > (?, ?, ?)
    AND (? IS NOT NULL OR NOT EXISTS (
        SELECT 1 FROM sightings AS other WHERE other.kind = one.kind AND other.name = one.name
        AND other.uid <> one.uid AND (other.first < one.first AND other.last > one.first - ?
        OR other.first = one.first AND other.uid < one.uid)))
ORDER BY first, name, uid LIMIT ?
"""
_MOST_OF = "SELECT uid, count(*) FROM sightings GROUP BY uid ORDER BY 2 DESC LIMIT 1"
_DELETE = """
DELETE FROM sightings WHERE rowid IN
    (SELECT rowid FROM sightings WHERE uid = ? ORDER BY last LIMIT ?)
"""


class Sightings(Protocol):
    """The part of the database that this needs (daemon.history.store.Store)."""

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]: ...

    def snapshot(self) -> AbstractContextManager[tuple[sqlite3.Connection, Any]]: ...


def note(
    writer: sqlite3.Connection,
    flows: np.ndarray,
    listeners: Iterable[Sighting],
    text_of: Callable[[int], str],
) -> None:
    """Enter what these FLOWs of the history, and listeners, show. Inside a transaction."""
    named = flows[flows["tgid"] != 0]
    for kind in (_programs(named), _destinations(named, text_of), listeners):
        writer.executemany(_NOTE, kind)


def _programs(flows: np.ndarray) -> Iterator[Sighting]:
    for some in _alike(flows, flows[["uid", "comm"]]):
        yield _sighting("program", text(bytes(some["comm"][0])), some, "")


def _destinations(flows: np.ndarray, text_of: Callable[[int], str]) -> Iterator[Sighting]:
    """Return far ends with the lower port: as a rule that is the service."""
    flows = flows[(flows["forwarded"] == 0) & (flows["rport"] < flows["lport"])]
    for some in _alike(flows, flows[["uid", "family", "raddr", "domain"]]):
        flow = some[0]
        number = int(flow["domain"])
        # a name that a resolver asked for others is not for everybody
        name = "" if not number or is_of_resolver(number) else text_of(number)
        name = name or address_text(int(flow["family"]), address_bytes(flow["raddr"]))
        proto = PROTO_NAMES.get(int(flow["proto"]), str(int(flow["proto"])))
        yield _sighting("destination", name, some, f"{proto} {int(flow['rport'])}")


def _alike(flows: np.ndarray, keys: np.ndarray) -> Iterator[np.ndarray]:
    """Return FLOWs of one key, the first seen first."""
    if not len(flows):
        return
    packed = np.ascontiguousarray(keys)
    raw = np.array([one.tobytes() for one in packed])
    order = np.lexsort((flows["first_ns"], raw))
    edges = np.flatnonzero(raw[order][1:] != raw[order][:-1]) + 1
    for part in np.split(order, edges):
        yield flows[part]


def _sighting(kind: str, name: str, flows: np.ndarray, about: str) -> Sighting:
    flow = flows[0]
    times = int(flow["first_ns"]), int(flows["last_ns"].max())
    owner = int(flow["tgid"]), signed(int(flow["start_ns"]))
    return (kind, name, int(flow["uid"]), *times, *owner, about)


def listeners(owners: Iterable[PortOwner], now_ns: int) -> Iterator[Sighting]:
    """Yield sockets that wait for a peer, without UDP clients on a random port."""
    low, high = _ephemeral()
    for one in owners:
        if one.proto == socket.IPPROTO_UDP and low <= one.port <= high:
            continue
        name = f"{PROTO_NAMES.get(one.proto, one.proto)} {one.address}.{one.port}"
        owner = one.tgid, signed(one.start_ns)
        yield ("listener", f"{name} {one.comm}", one.uid, now_ns, now_ns, *owner, name)


def _ephemeral() -> tuple[int, int]:
    try:
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999


def seen_first(
    store: Sightings,
    kind: str,
    since_ns: int,
    unseen_ns: int,
    uid: int | None,
    limit: int,
    after: After | None = None,
) -> tuple[list[dict[str, Any]], list[After]]:
    """Return what was seen since then, and not for `unseen_ns` before, oldest first; their places.

    `uid`: seen of this user, regardless of others; None: of anybody. `after`: go on behind this
    place. Raises Error.
    """
    place = (-1, "", 0) if after is None else after
    values = (kind, since_ns, unseen_ns, uid, uid, *place, uid, unseen_ns, limit)
    try:
        with store.snapshot() as (reader, _):
            rows = reader.execute(_SEEN_FIRST, values).fetchall()
    except sqlite3.Error as error:
        raise Error(f"the history cannot answer: {error}") from None
    things = [
        {
            "kind": found,
            "name": name,
            "uid": owner,
            "first": first / 1e9,
            "last": last / 1e9,
            "pid": tgid,
            "start_ns": struct.unpack("<Q", struct.pack("<q", start_ns))[0],
            "about": about,
            "before": None if before == _NEVER else before / 1e9,
        }
        for found, name, owner, first, last, tgid, start_ns, about, before in rows
    ]
    return things, [(first, name, owner) for _, name, owner, first, *_ in rows]


def known_since(store: Sightings) -> float:
    """Return the Unix time since which there are sightings. Raises Error."""
    try:
        with store.snapshot() as (reader, _):
            (began,) = reader.execute("SELECT began FROM sightings_began").fetchone()
    except sqlite3.Error as error:
        raise Error(f"the history cannot answer: {error}") from None
    return float(began)


def shorten(store: Sightings, most: int = MOST) -> None:
    """Keep the table in its bounds. Raises Error."""
    with store.transaction() as writer:
        (total,) = writer.execute("SELECT count(*) FROM sightings").fetchone()
        while total > most:
            uid, count = writer.execute(_MOST_OF).fetchone()
            goes = min(count, max(1, count // 4, total - most if count == total else 1))
            total -= writer.execute(_DELETE, (uid, goes)).rowcount
