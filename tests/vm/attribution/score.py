# SPDX-License-Identifier: MIT
"""Compare every captured record with the truth of the processes that made the traffic.

A record's own cookie, inode or reason is never used to find the claim it is held against:
only netns, protocol, local and remote endpoint, direction, length and time, which a packet
has without any attribution.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .truth import Claim

TICK_NS = 10_000_000
PROTOCOLS = {6: "tcp", 17: "udp"}
FLAGS = {"shared": 1, "inherited": 2, "seeded": 4, "dead": 8, "kernel": 16, "ambiguous": 32,
         "copy": 64}  # fmt: skip
DIR_IN, DIR_OUT, DIR_FWD = 1, 2, 3
TCP_FIN, TCP_SYN, TCP_RST = 1, 2, 4
EXAMPLES = 3
BEFORE = 8


@dataclass(slots=True)
class Score:
    """Outcome of one scenario. ``unnamed`` are records that truth can name; ``rightly_unnamed``
    those it cannot, with the reason truth expects."""

    packets: int = 0
    right: int = 0
    wrong: int = 0
    wrong_told: int = 0
    """Of the wrong: flagged AMBIGUOUS, so that the reader was told to doubt them."""
    wrong_reason: int = 0
    """Of the wrong: nobody is named, but for another reason than the true one."""
    unnamed: Counter[str] = field(default_factory=Counter)
    rightly_unnamed: Counter[str] = field(default_factory=Counter)
    unclaimed: int = 0
    loose: int = 0
    cookie_wrong: int = 0
    comm_wrong: int = 0
    flag_wrong: int = 0
    how: Counter[str] = field(default_factory=Counter)
    count_wrong: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            name: dict(value) if isinstance(value := getattr(self, name), Counter) else value
            for name in self.__slots__
        }

    def faults(self, max_loose: int) -> list[str]:
        """What keeps this from being exact, one line each; empty when it is."""
        lines = []
        for name in ("wrong", "unclaimed", "cookie_wrong", "comm_wrong", "flag_wrong"):
            if getattr(self, name):
                lines.append(f"{name.replace('_', ' ')}: {getattr(self, name)}")
        if self.unnamed:
            lines.append(f"nameable but unnamed: {dict(self.unnamed)}")
        if self.loose > max_loose:
            lines.append(f"truth too loose for {self.loose} records (allowed {max_loose})")
        return lines + self.count_wrong


def address(record: np.void, name: str) -> str:
    """Address of a record as text."""
    raw = bytes(record[name].tobytes())
    return str(ipaddress.ip_address(raw[:4] if record["family"] == 2 else raw))


def describe(record: np.void, how: str) -> str:
    """One record on one line, for a finding."""
    direction = {DIR_IN: "in", DIR_OUT: "out", DIR_FWD: "fwd"}.get(int(record["dir"]), "?")
    return (
        f"{direction} {PROTOCOLS.get(int(record['proto']), '?')} "
        f"{address(record, 'saddr')}.{record['sport']} > {address(record, 'daddr')}."
        f"{record['dport']} len {record['len']} tcp_flags {int(record['tcp_flags']):#x} "
        f"t {record['time_ns']} cookie {record['cookie']} inode {record['inode']} "
        f"-> tgid {record['tgid']} start {int(record['start_ns']) // TICK_NS} "
        f"comm {bytes(record['comm']).rstrip(bytes(1))!r} how {how} flags {int(record['flags']):#x}"
    )


def matches(claim: Claim, record: np.void) -> bool:
    """Whether the claim speaks of this packet."""
    direction = int(record["dir"])
    if {DIR_IN: "i", DIR_OUT: "o", DIR_FWD: "f"}[direction] not in claim.dirs:
        return False
    if not claim.t0 <= int(record["time_ns"]) < claim.t1:
        return False
    if claim.lens and int(record["len"]) not in claim.lens:
        return False
    local, remote = ("d", "s") if direction == DIR_IN else ("s", "d")
    if claim.rport and claim.rport != int(record[f"{remote}port"]):
        return False
    if claim.raddr and claim.raddr != address(record, f"{remote}addr"):
        return False
    return not (claim.laddr and claim.laddr != address(record, f"{local}addr"))


def score(
    records: np.ndarray,
    claims: Iterable[Claim],
    how_name: Callable[[int], str],
    *,
    comm: bool = True,
    counts: bool = True,
    asks_later: bool = False,
) -> Score:
    """Hold each record (dtype RECORD, already of the scenario's namespaces) against the claims.

    ``comm`` compares names. ``counts`` also demands each packet that truth counted (not to
    be asked of a capture that has lost some). ``asks_later``: the engine looks for sockets
    after the packet; its ``socket_gone`` says that none is there, not that one was.
    """
    result = Score(packets=len(records))
    connections = _Connections(records)
    by_endpoint: dict[tuple[int, str, int], list[Claim]] = defaultdict(list)
    claims = list(claims)
    for claim in claims:
        if asks_later and "no_socket" in claim.reasons:
            claim = replace(claim, reasons=(*claim.reasons, "socket_gone"))
        by_endpoint[claim.netns, claim.proto, claim.lport].append(claim)
    seen: Counter[tuple[str, int]] = Counter()

    for number, record in enumerate(records):
        how = how_name(int(record["how"]))
        result.how[how] += 1
        port = int(record["dport" if record["dir"] == DIR_IN else "sport"])
        key = (int(record["netns"]), PROTOCOLS.get(int(record["proto"]), "?"), port)
        socketless = connections.follow(number, record, how)
        found = [claim for claim in by_endpoint.get(key, ()) if matches(claim, record)]
        if socketless and found:
            seen[found[0].ident, int(record["dir"])] += 1
            result.rightly_unnamed[how] += 1
            continue
        if not found:
            result.unclaimed += 1
            _example(result, "unclaimed", record, how, [])
            continue
        best = max(claim.specificity for claim in found)
        found = [claim for claim in found if claim.specificity == best]
        if len({(claim.pid, claim.start) for claim in found if claim.pid}) > 1:
            result.loose += 1
        remote = int(record["sport" if record["dir"] == DIR_IN else "dport"])
        # An accepted socket's cookie is on packets from before its accept(), too.
        family = [c for c in by_endpoint[key] if c.rport in (0, remote)]
        cookies = set().union(*(c.cookies for c in family))
        known = len(result.examples)
        _judge(result, record, how, found, cookies if found[0].cookies else set(), seen, comm)
        if len(result.examples) > known:
            result.examples += _before(records[:number], record, how_name)

    if counts:
        for claim in claims:
            for name, direction, wanted in (("out", DIR_OUT, claim.out), ("in", DIR_IN, claim.in_)):
                got = seen[claim.ident, direction]
                if got < wanted or (claim.exact and got != wanted):
                    sign = "" if claim.exact else "at least "
                    result.count_wrong.append(
                        f"{claim.role} pid {claim.pid} {claim.proto} port {claim.lport}: "
                        f"{got} records {name}, {sign}{wanted} true"
                    )
    return result


def _connection(record: np.void) -> tuple[object, ...]:
    """Namespace, local and remote end of a record's packet."""
    ends = ("d", "s") if record["dir"] == DIR_IN else ("s", "d")
    return (
        int(record["netns"]),
        *((address(record, f"{end}addr"), int(record[f"{end}port"])) for end in ends),
    )


class _Connections:
    """Which TCP connections have no socket any more, by the packets alone, in order of time.

    A reset ends a connection in every state (RFC 9293, 3.5.2), TIME_WAIT included (RFC 1337,
    unless net.ipv4.tcp_rfc1337 is set); a SYN that goes out begins a new one. What arrives in
    between finds no socket. Unless it is a reset the stack answers it with one (RFC 9293,
    3.10.7.1). There is no socket for that either.

    Data for a socket that was closed resets the connection (RFC 1122, 4.2.2.13). Linux ends that
    socket first and sends the reset then (tcp_rcv_state_process). So on a second processor a
    packet may find no socket just before the reset.
    """

    def __init__(self, records: np.ndarray) -> None:
        self._ended: set[tuple[object, ...]] = set()
        self._closed: set[tuple[object, ...]] = set()
        self._unanswered: Counter[tuple[object, ...]] = Counter()
        self._before_reset = _before_own_reset(records)

    def follow(self, number: int, record: np.void, how: str) -> bool:
        """Whether `how` says rightly that record `number`, after those before, has no socket."""
        if record["proto"] != 6:
            return False
        connection = _connection(record)
        reset = bool(record["tcp_flags"] & TCP_RST)
        if record["dir"] == DIR_OUT:
            if record["tcp_flags"] & TCP_SYN:
                self._ended.discard(connection)
                self._closed.discard(connection)
                del self._unanswered[connection]
            if record["tcp_flags"] & TCP_FIN:
                self._closed.add(connection)
            if reset and record["tgid"] and connection in self._closed:
                self._ended.add(connection)
            if not (reset and how == "no_socket" and self._unanswered[connection]):
                return False
            self._unanswered[connection] -= 1
            return True
        ending = number in self._before_reset and connection in self._closed
        socketless = how == "no_socket" and (ending or connection in self._ended)
        if socketless and not reset:
            self._unanswered[connection] += 1
        if reset:
            self._ended.add(connection)
        return socketless


def _before_own_reset(records: np.ndarray) -> set[int]:
    """Which records came in between a socket's last packet and the reset that it answers with."""
    tcp, out = records["proto"] == 6, records["dir"] == DIR_OUT
    resets = tcp & out & (records["tcp_flags"] & TCP_RST != 0) & (records["tgid"] != 0)
    near = tcp & ~out & np.isin(records["dport"], records["sport"][resets])
    found, coming = set(), set()
    for number in np.flatnonzero(resets | near)[::-1]:
        record = records[number]
        connection = _connection(record)
        if resets[number]:
            coming.add(connection)
        elif record["tgid"]:
            coming.discard(connection)
        elif connection in coming:
            found.add(int(number))
    return found


def _before(records: np.ndarray, record: np.void, how_name: Callable[[int], str]) -> list[str]:
    """The last packets between the same two ports before `record`, one line each."""
    ports = np.sort(np.stack([records["sport"], records["dport"]]), axis=0)
    wanted = np.sort([record["sport"], record["dport"]])
    same = (ports.T == wanted).all(axis=1) & (records["proto"] == record["proto"])
    near = records[same & (records["netns"] == record["netns"])][-BEFORE:]
    return [f"  before: {describe(one, how_name(int(one['how'])))}" for one in near]


def _judge(
    result: Score,
    record: np.void,
    how: str,
    found: list[Claim],
    cookies: set[int],
    seen: Counter[tuple[str, int]],
    comm: bool,
) -> None:
    direction = int(record["dir"])
    owner = (int(record["tgid"]), int(record["start_ns"]) // TICK_NS)
    if not owner[0]:
        right = [claim for claim in found if how in claim.reasons]
        seen[(right or found)[0].ident, direction] += 1
        if right:
            result.rightly_unnamed[how] += 1
        elif any(claim.pid for claim in found):
            result.unnamed[how] += 1
            _example(result, "unnamed", record, how, found)
        else:
            result.wrong += 1
            result.wrong_reason += 1
            _example(result, "wrong reason", record, how, found)
        return
    right = [claim for claim in found if claim.pid and (claim.pid, claim.start) == owner]
    if not right:
        seen[found[0].ident, direction] += 1
        result.wrong += 1
        told = bool(int(record["flags"]) & FLAGS["ambiguous"])
        result.wrong_told += told
        _example(result, "wrong, flagged" if told else "WRONG", record, how, found)
        return
    claim = right[0]
    seen[claim.ident, direction] += 1
    result.right += 1
    if cookies and record["cookie"] and int(record["cookie"]) not in cookies:
        result.cookie_wrong += 1
        _example(result, "cookie wrong", record, how, right)
    if comm and bytes(record["comm"]).rstrip(b"\0").decode(errors="replace") not in {
        c.comm for c in right
    }:
        result.comm_wrong += 1
        _example(result, "comm wrong", record, how, right)
    for flag in claim.flags:
        wanted, bit = not flag.startswith("not-"), FLAGS[flag.removeprefix("not-")]
        if bool(int(record["flags"]) & bit) != wanted:
            result.flag_wrong += 1
            _example(result, f"flag wanted: {flag}", record, how, right)


def _example(result: Score, what: str, record: np.void, how: str, claims: list[Claim]) -> None:
    kind = f"{what} {how} {int(record['dir'])}"
    result.kinds[kind] += 1
    if result.kinds[kind] <= EXAMPLES:
        wanted = ", ".join(
            f"{c.role} pid {c.pid} start {c.start} comm {c.comm} cookies {sorted(c.cookies)}"
            if c.pid
            else f"nobody: {'/'.join(c.reasons)}"
            for c in claims[:3]
        )
        result.examples.append(f"{what}: {describe(record, how)} | true: {wanted or 'no claim'}")
