# SPDX-License-Identifier: MIT
"""What is known of the far ends of records, whoever knows it: this process, a daemon or a file."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from nlproto.records.wire import lib

__all__ = ["Ends", "FlowKey", "NoEnds", "ToldEnds", "Way", "record_keys"]

_TOLD = 1 << 16

Way = tuple[int, int, int, bytes, int, bytes, int]
"""netns, proto, family, local address (16 bytes), local port, remote address, remote port."""
FlowKey = tuple[int, int, Way]
"""tgid, start_ns, way."""


class Ends(Protocol):
    """For records: RECORD, shape (n,)."""

    def domain_of(self, key: FlowKey) -> str:
        """Return the name that the flow's owner asked for, "" for none."""
        ...

    def domains(self, records: np.ndarray) -> list[str]:
        """Return that of each record's flow."""
        ...

    def text(self, number: int) -> str:
        """Return the name by the number that a FLOW has in `domain`, "" for none."""
        ...

    def for_own(self) -> Ends:
        """Return what who sees only their own packets may know."""
        ...


def record_keys(records: np.ndarray) -> Iterator[FlowKey]:
    """Yield the key of each record's flow: (tgid, start_ns, way)."""
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


class NoEnds:
    """Nothing is known."""

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


class ToldEnds:
    """What a daemon or a file told; at most 65,536 flows, those told longest ago go."""

    def __init__(self) -> None:
        self._domains: OrderedDict[FlowKey, str] = OrderedDict()

    def tell(self, key: FlowKey, domain: str) -> None:
        """Remember it; "" forgets."""
        if domain:
            self._domains[key] = domain
            self._domains.move_to_end(key)
            if len(self._domains) > _TOLD:
                self._domains.popitem(last=False)
        elif self._domains:
            self._domains.pop(key, None)

    def domain_of(self, key: FlowKey) -> str:
        """See Ends."""
        return self._domains.get(key, "")

    def text(self, number: int) -> str:
        """See Ends."""
        return ""

    def for_own(self) -> Ends:
        """See Ends."""
        return self

    def domains(self, records: np.ndarray) -> list[str]:
        """See Ends."""
        if not self._domains:
            return [""] * len(records)
        return [self._domains.get(key, "") for key in record_keys(records)]
