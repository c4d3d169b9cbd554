# SPDX-License-Identifier: MIT
"""Rates of processes, their flows and their far ends, second by second."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from nlproto.records import ends, wire
from nlproto.records.batch import NamedBatch
from nlproto.tables.attempts import Attempts
from nlproto.tables.flows import address_bytes, summarize
from nlproto.tables.outcome import RST

__all__ = ["HISTORY", "FlowRate", "TrafficMeter", "ProcessRate", "RateKey", "Rates"]

HISTORY = 12  # ticks that a sparkline shows
KEPT_S = 60.0  # how long a live view keeps a process after its last packet
MAX_FLOWS = 50_000

RateKey = tuple[int, int, int]
"""(tgid, start_ns, 0) of a process, (0, 0, how) of packets without one."""
FlowWay = tuple[int, ...]
"""netns, proto, local port, remote port, local and remote address as two numbers each."""

FarEnd = tuple[int, str]
"""Network namespace and address. In each namespace it may be another host."""


ShownEnds = tuple[str, int, str, int]
"""Local address and port, remote address and port."""


@dataclass(slots=True)
class TrafficMeter:
    """Bytes sent and received: since the last tick, in a second, and in all."""

    sent: int = 0
    received: int = 0
    packets: int = 0
    sent_rate: float = 0.0
    received_rate: float = 0.0
    last_s: float = 0.0
    _sent_before: int = 0
    _received_before: int = 0

    def add(self, sent: int, received: int, packets: int, now_s: float) -> None:
        self.sent += sent
        self.received += received
        self.packets += packets
        self.last_s = now_s

    def tick(self, seconds: float) -> None:
        """Turn the bytes since the last tick into rates, in bytes a second."""
        self.sent_rate = (self.sent - self._sent_before) / seconds
        self.received_rate = (self.received - self._received_before) / seconds
        self._sent_before, self._received_before = self.sent, self.received

    @property
    def rate(self) -> float:
        return self.sent_rate + self.received_rate

    @property
    def total(self) -> int:
        return self.sent + self.received


@dataclass(slots=True)
class FlowRate:
    """One flow of one process, in one network namespace; addresses are text."""

    netns: int
    proto: str
    local: str
    lport: int
    remote: str
    rport: int
    key: ends.FlowKey
    """The key for its far end's name (nlproto.records.ends)."""
    meter: TrafficMeter = field(default_factory=TrafficMeter)
    cookie: int = 0
    """The kernel's number of its socket; 0: not known."""
    became: ShownEnds | None = None
    """What NAT makes of both ends; None: nothing that is known."""

    def translated(self) -> tuple[str, str]:
        """Return what NAT makes of the local and of the remote end; "" where it is the same."""
        if self.became is None:
            return "", ""
        near, lport, far, rport = self.became
        return (
            "" if (near, lport) == (self.local, self.lport) else f"{near}.{lport}",
            "" if (far, rport) == (self.remote, self.rport) else f"{far}.{rport}",
        )


@dataclass(slots=True)
class ProcessRate:
    """One process, or all packets that are unnamed for one reason."""

    key: RateKey
    comm: str
    uid: int | None
    raw_comm: bytes = b""
    meter: TrafficMeter = field(default_factory=TrafficMeter)
    flows: dict[FlowWay, FlowRate] = field(default_factory=dict)
    failed: int = 0
    """Connections that it tried to open, refused or unanswered."""
    resets: int = 0
    """Flows with a reset, by either side, of each tick."""
    sent_history: deque[float] = field(default_factory=lambda: deque([0.0] * HISTORY, HISTORY))
    received_history: deque[float] = field(default_factory=lambda: deque([0.0] * HISTORY, HISTORY))

    @property
    def pid(self) -> int | None:
        return self.key[0] or None

    def remotes(self) -> dict[FarEnd, TrafficMeter]:
        """Return the far ends, with their flows added up."""
        found: dict[FarEnd, TrafficMeter] = {}
        for flow in self.flows.values():
            end = found.setdefault((flow.netns, flow.remote), TrafficMeter())
            end.sent += flow.meter.sent
            end.received += flow.meter.received
            end.packets += flow.meter.packets
            end.sent_rate += flow.meter.sent_rate
            end.received_rate += flow.meter.received_rate
            end.last_s = max(end.last_s, flow.meter.last_s)
        return found


class Rates:
    """Everything that top shows. At most MAX_FLOWS flows; the longest idle are dropped first.

    A process without packets for `kept_s` seconds is dropped.
    """

    def __init__(self, kept_s: float = KEPT_S) -> None:
        self._kept_s = kept_s
        self.processes: dict[RateKey, ProcessRate] = {}
        self.evicted = 0
        self._attempts = Attempts()
        self._flow_count = 0

    def __iter__(self) -> Iterator[ProcessRate]:
        return iter(self.processes.values())

    def tick(
        self,
        batches: Iterable[NamedBatch],
        now_s: float,
        seconds: float,
        became: Mapping[ends.FlowKey, ends.Translated] = MappingProxyType({}),
    ) -> None:
        """Take what came in the last `seconds`; `now_s` is of any steady clock.

        `became`: what NAT makes of the ends of some flows among it.
        """
        parts = [batch.records for batch in batches if len(batch.records)]
        if parts:
            self._add(summarize(np.concatenate(parts)), now_s, became)
        for process in list(self.processes.values()):
            process.meter.tick(seconds)
            process.sent_history.append(process.meter.sent_rate)
            process.received_history.append(process.meter.received_rate)
            for flow in process.flows.values():
                meter = flow.meter
                # most flows are idle, and keep their zeros
                if meter.last_s == now_s or meter.sent_rate or meter.received_rate:
                    meter.tick(seconds)
            if process.meter.last_s + self._kept_s < now_s:
                self._flow_count -= len(process.flows)
                del self.processes[process.key]
        if self._flow_count > MAX_FLOWS:
            self._evict()

    def _add(
        self, flows: np.ndarray, now_s: float, became: Mapping[ends.FlowKey, ends.Translated]
    ) -> None:
        local = flows["laddr"].tolist()
        remote = flows["raddr"].tolist()
        columns = [flows[name].tolist() for name in _FIELDS]
        for index, (
            tgid,
            start,
            how,
            uid,
            comm,
            netns,
            proto,
            family,
            lport,
            rport,
            *sums,
        ) in enumerate(zip(*columns, strict=True)):
            process = self._process(tgid, start, how, uid, comm)
            packets_in, bytes_in, packets_out, bytes_out, opened, cookie, tcp_in, tcp_out = sums
            process.resets += bool((tcp_in | tcp_out) & RST)
            process.meter.add(bytes_out, bytes_in, packets_in + packets_out, now_s)
            name = (netns, proto, lport, rport, *local[index], *remote[index])
            flow = process.flows.get(name)
            if flow is None:
                near = address_bytes(flows["laddr"][index])
                far = address_bytes(flows["raddr"][index])
                flow = FlowRate(
                    netns,
                    wire.PROTO_NAMES.get(proto, str(proto)),
                    wire.address_text(family, near),
                    lport,
                    wire.address_text(family, far),
                    rport,
                    (tgid, start, (netns, proto, family, near, lport, far, rport)),
                )
                process.flows[name] = flow
                self._flow_count += 1
            flow.meter.add(bytes_out, bytes_in, packets_in + packets_out, now_s)
            flow.cookie = cookie or flow.cookie
            found = became.get(flow.key) if became else None
            if found is not None:
                flow.became = _shown(family, found)
            elif opened:  # another connection, which is not translated
                flow.became = None

        for attempt in self._attempts.take(flows, int(now_s * 1e9)):
            owner = self.processes.get((attempt.tgid, attempt.start_ns, 0))
            if owner is not None:
                owner.failed += 1

    def _process(self, tgid: int, start: int, how: int, uid: int, comm: bytes) -> ProcessRate:
        key = (tgid, start, 0) if tgid else (0, 0, how)
        process = self.processes.get(key)
        if process is None:
            name = wire.text(comm) if tgid else wire.how_name(how).replace("_", " ")
            process = ProcessRate(key, name, uid if tgid else None, raw_comm=comm)
            self.processes[key] = process
        elif comm != process.raw_comm and tgid and comm:
            process.comm, process.raw_comm = wire.text(comm), comm
        return process

    def _evict(self) -> None:
        everything = [
            (flow.meter.last_s, process, name)
            for process in self.processes.values()
            for name, flow in process.flows.items()
        ]
        everything.sort(key=lambda one: one[0])
        for _, process, name in everything[: len(everything) - MAX_FLOWS * 3 // 4]:
            del process.flows[name]
            self._flow_count -= 1
            self.evicted += 1


_FIELDS = (
    "tgid",
    "start_ns",
    "how",
    "uid",
    "comm",
    "netns",
    "proto",
    "family",
    "lport",
    "rport",
    "packets_in",
    "bytes_in",
    "packets_out",
    "bytes_out",
    "opened",
    "cookie",
    "tcp_in",
    "tcp_out",
)


def _shown(family: int, became: ends.Translated) -> ShownEnds:
    near, lport, far, rport = became
    return wire.address_text(family, near), lport, wire.address_text(family, far), rport
