# SPDX-License-Identifier: MIT
"""What is known of the far ends of records, from this process, a daemon or a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Protocol

import numpy as np

from nlproto.records.wire import lib

__all__ = [
    "MAPPED",
    "TRANSLATED",
    "Ends",
    "FlowKey",
    "NoEnds",
    "ToldEnds",
    "Translated",
    "Way",
    "as_translated",
    "flow_keys",
    "is_incoming",
    "of_flows",
    "record_keys",
]

_TOLD = 1 << 16
MAPPED = bytes(10) + b"\xff\xff"
"""The prefix of an IPv4 address in an IPv6 socket (::ffff:a.b.c.d)."""

Way = tuple[int, int, int, bytes, int, bytes, int]
"""netns, proto, family, local address (16 bytes), local port, remote address, remote port."""
FlowKey = tuple[int, int, Way]
"""tgid, start_ns, way."""
Translated = tuple[bytes, int, bytes, int]
"""What NAT made of both ends: local address (16 bytes), local port, remote address and port."""

TRANSLATED = np.dtype(
    [("saddr", "u8", (2,)), ("daddr", "u8", (2,)), ("sport", "u2"), ("dport", "u2")]
)
"""The translated addresses of a packet; all 0: none are known."""


class Ends(Protocol):
    """Answers about records: RECORD, shape (n,)."""

    def domain_of(self, key: FlowKey) -> str:
        """Return the names that the flows' owners asked for, "" for none."""
        ...

    def domains(self, records: np.ndarray) -> list[str]:
        """Return the name for each record's flow."""
        ...

    def text(self, number: int) -> str:
        """Return the name of a number in a FLOW's `domain`; "" for none."""
        ...

    def for_own(self) -> Ends:
        """Return what a user may know who sees only their own packets."""
        ...

    def translations(self, records: np.ndarray) -> np.ndarray | None:
        """Return TRANSLATED, shape (n,); None: nothing is known of any record."""
        ...

    def translated(self, flows: np.ndarray) -> dict[FlowKey, Translated]:
        """Return what NAT makes of the ends of `flows` (FLOW), of those that it is known of."""
        ...


def record_keys(records: np.ndarray) -> Iterator[FlowKey]:
    """Yield the key of each RECORD's flow: (tgid, start_ns, way)."""
    fields = ("dir", "tgid", "start_ns", "netns", "proto", "family", "sport", "dport")
    columns = [records[name].tolist() for name in fields]
    sources = np.ascontiguousarray(records["saddr"]).tobytes()
    targets = np.ascontiguousarray(records["daddr"]).tobytes()
    for at, (way, tgid, start, netns, proto, family, sport, dport) in enumerate(
        zip(*columns, strict=True)
    ):
        place = slice(16 * at, 16 * at + 16)
        one, other = (sources[place], sport), (targets[place], dport)
        near, far = (other, one) if way == lib.SNIFFER_DIR_IN else (one, other)
        yield tgid, start, (netns, proto, family, *near, *far)


def flow_keys(flows: np.ndarray) -> Iterator[FlowKey]:
    """Yield the key of each FLOW."""
    near = np.ascontiguousarray(flows["laddr"]).tobytes()
    far = np.ascontiguousarray(flows["raddr"]).tobytes()
    fields = ("tgid", "start_ns", "netns", "proto", "family", "lport", "rport")
    columns = [flows[name].tolist() for name in fields]
    for at, (tgid, start, netns, proto, family, lport, rport) in enumerate(
        zip(*columns, strict=True)
    ):
        place = slice(16 * at, 16 * at + 16)
        yield tgid, start, (netns, proto, family, near[place], lport, far[place], rport)


def is_incoming(records: np.ndarray) -> list[bool]:
    """Return for each RECORD whether the local end is the target."""
    found: list[bool] = (records["dir"] == lib.SNIFFER_DIR_IN).tolist()
    return found


def as_translated(became: Translated, incoming: bool) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Return a flow's other ends as TRANSLATED of one of its packets."""
    near, lport, far, rport = became
    if incoming:
        near, lport, far, rport = far, rport, near, lport
    return np.frombuffer(near, np.uint64, 2), np.frombuffer(far, np.uint64, 2), lport, rport


def of_flows(translated: np.ndarray, records: np.ndarray) -> list[Translated | None]:
    """Return what TRANSLATED says of each record's flow."""
    found: list[Translated | None] = []
    columns = [translated[name].tolist() for name in ("sport", "dport")]
    sources, targets = (translated[name].tobytes() for name in ("saddr", "daddr"))
    for at, (sport, dport, incoming) in enumerate(zip(*columns, is_incoming(records), strict=True)):
        place = slice(16 * at, 16 * at + 16)
        near, far = (sources[place], sport), (targets[place], dport)
        if incoming:
            near, far = far, near
        found.append((*near, *far) if sport else None)
    return found


class NoEnds:
    """Knows nothing."""

    def domain_of(self, key: FlowKey) -> str:
        """See Ends."""
        return ""

    def text(self, number: int) -> str:
        """See Ends."""
        return ""

    def for_own(self) -> Ends:
        """See Ends."""
        return self

    def domains(self, records: np.ndarray) -> list[str]:
        """See Ends."""
        return [""] * len(records)

    def translations(self, records: np.ndarray) -> np.ndarray | None:
        """See Ends."""
        return None

    def translated(self, flows: np.ndarray) -> dict[FlowKey, Translated]:
        """See Ends."""
        return {}


class ToldEnds:
    """What a daemon or a file said about at most 65,536 flows. The oldest are forgotten."""

    def __init__(self) -> None:
        self._told: OrderedDict[FlowKey, tuple[str, Translated | None]] = OrderedDict()
        self._translated: set[FlowKey] = set()

    def tell(self, key: FlowKey, domain: str, became: Translated | None = None) -> None:
        """Remember name and translation of a flow's ends; with neither, forget the flow."""
        if domain or became is not None:
            self._told[key] = domain, became
            self._told.move_to_end(key)
            if len(self._told) > _TOLD:
                self._translated.discard(self._told.popitem(last=False)[0])
        elif self._told:
            self._told.pop(key, None)
        if became is not None:
            self._translated.add(key)
        else:
            self._translated.discard(key)

    def forget_others(self, records: np.ndarray, told: Collection[FlowKey]) -> None:
        """End the translation of all flows of these RECORDs that are not among `told`."""
        if not self._translated:
            return
        for key in record_keys(records):
            domain, became = self.told(key)
            if became is not None and key not in told:
                self.tell(key, domain)

    def told(self, key: FlowKey) -> tuple[str, Translated | None]:
        """Return what tell() was given."""
        return self._told.get(key, ("", None))

    def domain_of(self, key: FlowKey) -> str:
        """See Ends."""
        return self.told(key)[0]

    def text(self, number: int) -> str:
        """See Ends."""
        return ""

    def for_own(self) -> Ends:
        """See Ends."""
        return self

    def domains(self, records: np.ndarray) -> list[str]:
        """See Ends."""
        if not self._told:
            return [""] * len(records)
        return [self.domain_of(key) for key in record_keys(records)]

    def translations(self, records: np.ndarray) -> np.ndarray | None:
        """See Ends."""
        if not self._translated:
            return None
        found = np.zeros(len(records), TRANSLATED)
        incoming = is_incoming(records)
        for at, key in enumerate(record_keys(records)):
            _, became = self.told(key)
            if became is not None:
                found[at] = as_translated(became, incoming[at])
        return found if found["sport"].any() else None

    def translated(self, flows: np.ndarray) -> dict[FlowKey, Translated]:
        """See Ends."""
        if not self._translated:
            return {}
        keys = self._translated.intersection(flow_keys(flows))
        return {key: became for key in keys if (became := self.told(key)[1]) is not None}
