# SPDX-License-Identifier: MIT
"""Finds the name that a process asked for before it talked to an address.

An answer belongs to the process that asked. That is the owner of the flow to the server. The
question was seen on this flow (dns_questions.py). Behind a DNAT of its own namespace a question
goes elsewhere. There an answer over loopback counts if the socket has sent. A resolver of the
system (systemd-resolved, dnsmasq) asks for others. So its answers serve all processes of its
network namespace that have no answer of their own. If several names have the address, the flow gets
all of them. If nothing is known of the asker, the answer names only the next flow to its address
within 5 s.

A flow gets a name that was known before the flow began, and whose time to live had not ended. The
flow keeps it. The name in a ClientHello belongs to its own flow.
"""

from __future__ import annotations

import socket
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nlproto.overheard.dns import DnsAnswer
from nlproto.overheard.fair_table import FairTable
from nlproto.overheard.names import SEPARATOR, NumberedNames
from nlproto.records.ends import FlowKey, Way, flow_keys
from nlproto.records.wire import among
from nlproto.tables.column_table import mix, random_seed
from nlproto.tables.shares import Payers

__all__ = ["Beginnings", "Domains", "SeenFlows"]

_LIMIT = 1 << 16  # the most addresses that processes asked for
_OF_RESOLVERS = 1 << 14
_FLOWS = 1 << 16
_WAITING = 4096  # the most answers whose asker is not known yet
_ASKERS = 8192
_NAMES = 4  # the most names of one address
_GRACE_NS = 5_000_000_000  # from the end of a name's time to live to the connection that uses it
_RECENT = 512
_SYSTEM_UIDS = 1000  # users of the system have lower numbers
_RESOLVERS = frozenset((b"systemd-resolve", b"dnsmasq", b"unbound", b"named", b"nscd", b"dnsdist",
                        b"pdns_recursor", b"kresd", b"dnscrypt-proxy", b"stubby", b"coredns",
                        b"sssd_nss", b"sssd_be", b"cloudflared", b"dockerd"))  # fmt: skip
_DNS = 53


@dataclass(frozen=True, slots=True)
class _Asked:
    name: str
    asked_ns: int
    until_ns: int
    once: bool = False
    """An answer whose asker nobody knows. It names the first flow to the address, and no other."""


@dataclass(frozen=True, slots=True)
class _Asker:
    tgid: int
    start_ns: int
    netns: int
    is_resolver: bool
    direct: bool
    """Its questions go to the very address and port that answer."""
    payer: int


class Beginnings(Protocol):
    """Remembers when flows began."""

    def note(self, flows: np.ndarray) -> None:
        """Remember when the FLOWs of an array began, if they are new."""

    def first_seen(self, flows: np.ndarray) -> np.ndarray:
        """Return when each FLOW began (uint64, CLOCK_MONOTONIC ns); 0 for a new one."""


class SeenFlows:
    """Beginnings of up to twice `limit` flows."""

    def __init__(self, limit: int = 1 << 15) -> None:
        self._limit = limit
        self._new: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def note(self, flows: np.ndarray) -> None:
        """See Beginnings."""
        if len(self._new) > self._limit:
            self._old, self._new = self._new, {}
        for number, since in zip(flows["hash"].tolist(), flows["first_ns"].tolist(), strict=True):
            if number not in self._new:
                self._new[number] = self._old.get(number, since)

    def first_seen(self, flows: np.ndarray) -> np.ndarray:
        """See Beginnings."""
        numbers = flows["hash"].tolist()
        found = (self._new.get(one) or self._old.get(one, 0) for one in numbers)
        return np.fromiter(found, np.uint64, len(numbers))


class Domains:
    """One thread feeds and asks it; number_of() is for any thread. `names` keeps the texts."""

    def __init__(
        self,
        names: NumberedNames,
        beginnings: Beginnings | None = None,
        payers: Payers | None = None,
    ) -> None:
        self.names = names
        self.beginnings: Beginnings = SeenFlows() if beginnings is None else beginnings
        self._payers = Payers() if payers is None else payers
        self._seed = random_seed()
        self._asked: FairTable[tuple[int, int, int, bytes], list[_Asked]] = FairTable(_LIMIT)
        self._resolved: FairTable[tuple[int, int, bytes], list[_Asked]] = FairTable(_OF_RESOLVERS)
        self._waiting: OrderedDict[Way, list[tuple[DnsAnswer, int, bool]]] = OrderedDict()
        self._askers: FairTable[Way, _Asker] = FairTable(_ASKERS)
        self._sent: OrderedDict[int, None] = OrderedDict()
        self._hellos: OrderedDict[Way, tuple[str, int]] = OrderedDict()
        self._flows: OrderedDict[FlowKey, int] = OrderedDict()
        self._known = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._asked) + len(self._resolved)

    # # Incoming facts

    def add_answer(self, way: Way, answer: DnsAnswer, time_ns: int, asked: bool = True) -> None:
        """The server at the remote end of `way` answered; `asked`: a question seen on this way."""
        if not answer.addresses:
            return
        asker = self._askers.get(way)
        if asker is not None:
            self._keep(asker, answer, time_ns, asked)
            return
        waiting = self._waiting.setdefault(way, [])
        if len(waiting) < _NAMES:
            waiting.append((answer, time_ns, asked))
        _bound(self._waiting, _WAITING)

    def add_hello(self, way: Way, name: str, time_ns: int) -> None:
        """The client at the local end of `way` asked for `name`."""
        self._hellos[way] = name, time_ns
        _bound(self._hellos, _WAITING)

    def _keep(self, asker: _Asker, answer: DnsAnswer, time_ns: int, asked: bool) -> None:
        if asker.direct and not asked:
            return
        for family, raw, ttl in answer.addresses:
            lasts_ns = ttl * 1_000_000_000 if asker.tgid else 0
            until_ns = time_ns + lasts_ns + _GRACE_NS
            new = _Asked(answer.name, time_ns, until_ns, once=not asker.tgid)
            if asker.is_resolver:
                # whoever asked: one domain's names take no room of others
                place, zone = (asker.netns, family, raw), ".".join(answer.name.split(".")[-2:])
                found = self._resolved.get(place) or []
                self._resolved.put(place, found, zone)
            else:
                key = asker.tgid, asker.start_ns, family, raw
                found = self._asked.get(key) or []
                self._asked.put(key, found, asker.payer)
            found[:] = [one for one in found if one.name != new.name][: _NAMES - 1]
            found.insert(0, new)
            self._recent.add(int(self._hashes(np.frombuffer(raw, np.uint64).reshape(1, 2))[0]))
        if len(self._recent) > _RECENT:
            everything = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._known = np.union1d(self._known, everything)
            self._recent.clear()
            if len(self._known) > 2 * (_LIMIT + _OF_RESOLVERS):
                self._rebuild()

    def _rebuild(self) -> None:
        raws = [key[3] for key in self._asked] + [key[2] for key in self._resolved]
        words = np.frombuffer(b"".join(raws), np.uint64).reshape(-1, 2)
        self._known = np.unique(self._hashes(words))

    def _hashes(self, words: np.ndarray) -> np.ndarray:
        return mix((words[:, 0], words[:, 1]), self._seed)

    # Flows

    def stamp(self, flows: np.ndarray) -> None:
        """Learn which processes ask, and fill in `domain` of FLOWs where it is known."""
        self.beginnings.note(flows)
        self._learn(flows)
        if not (self._recent or len(self._known) or self._hellos):
            return
        hashes = self._hashes(flows["raddr"])
        maybe = among(hashes, self._known)
        if self._recent:
            maybe |= among(hashes, np.fromiter(self._recent, np.uint64, len(self._recent)))
        if self._hellos:
            maybe |= (flows["rport"] == 443) & (flows["proto"] == socket.IPPROTO_TCP)
        rows = np.flatnonzero(maybe & (flows["tgid"] != 0) & (flows["forwarded"] == 0))
        if not len(rows):
            return
        some = flows[rows]
        first = self.beginnings.first_seen(some)
        first = np.where(first, np.minimum(first, some["first_ns"]), some["first_ns"])
        found = [
            self._name(key, since)
            for key, since in zip(flow_keys(some), first.tolist(), strict=True)
        ]
        flows["domain"][rows] = found

    def _learn(self, flows: np.ndarray) -> None:
        near = flows["laddr"].view(np.uint8).reshape(len(flows), 16)
        sends = (near[:, 0] == 127) & (flows["packets_out"] != 0) & (flows["cookie"] != 0)
        for cookie in flows["cookie"][sends & (flows["family"] == socket.AF_INET)].tolist():
            self._sent[cookie] = None
        _bound(self._sent, _ASKERS)
        rows = np.flatnonzero((flows["rport"] == _DNS) & (flows["forwarded"] == 0))
        if not len(rows):
            return
        some = flows[rows]
        payers = self._payers.of(some["uid"]).tolist()
        for key, row, payer in zip(flow_keys(some), some, payers, strict=True):
            # behind a DNAT of its own namespace a socket sends to another port
            if not row["packets_out"] and int(row["cookie"]) not in self._sent:
                continue
            tgid, start_ns, way = key
            uid = int(row["uid"])
            # the engine was too late for this asker: treat it like a resolver for a moment
            is_resolver = not tgid or uid < _SYSTEM_UIDS and bytes(row["comm"]) in _RESOLVERS
            before = self._askers.get(way)
            direct = bool(row["packets_out"]) or (before is not None and before.direct)
            asker = _Asker(tgid, start_ns, way[0], is_resolver, direct, payer)
            self._askers.put(way, asker, payer)
            for waited in self._waiting.pop(way, ()):
                self._keep(asker, *waited)

    def _name(self, key: FlowKey, since_ns: int) -> int:
        """Return the number of the name of a flow that began at `since_ns`."""
        number = self._flows.get(key, 0)
        hello = self._hellos.get(key[2])
        if hello is not None and hello[1] >= since_ns:
            number = self.names.number(hello[0])
            del self._hellos[key[2]]
        elif not number:
            number = self._by_answers(key, since_ns)
        if number:
            self._flows[key] = number
            self._flows.move_to_end(key)
            _bound(self._flows, _FLOWS)
        return number

    def _by_answers(self, key: FlowKey, since_ns: int) -> int:
        tgid, start_ns, way = key
        own = self._asked.get((tgid, start_ns, way[2], way[5])) or ()
        for one in own:  # the latest first
            if one.asked_ns <= since_ns <= one.until_ns:
                return self.names.number(one.name)
        resolved = self._resolved.get((way[0], way[2], way[5])) or []
        fitting = [one for one in resolved if one.asked_ns <= since_ns <= one.until_ns]
        resolved[:] = [one for one in resolved if not (one.once and one in fitting)]
        candidates = [one.name for one in fitting]
        return self.names.number(SEPARATOR.join(candidates), of_resolver=True)

    def number_of(self, key: FlowKey) -> int:
        """Return the number of a flow's name, 0: none. Any thread."""
        return self._flows.get(key, 0)

    @property
    def any_named(self) -> bool:
        """Return whether any flow has a name."""
        return bool(self._flows)

    def counts(self) -> Counter[str]:
        """Return sizes, for stats."""
        return Counter(addresses=len(self), flows=len(self._flows), evicted=self._asked.evicted)


def _bound(table: OrderedDict, limit: int) -> None:  # type: ignore[type-arg]
    while len(table) > limit:
        table.popitem(last=False)
