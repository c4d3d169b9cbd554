# SPDX-License-Identifier: MIT
"""Names packets without the module: their socket by sock_diag or /proc/net, its holder by /proc.

The socket is asked for by the packet's own tuple at a flow's first packet, so what counts is
how soon that is: a socket closed before stays unnamed, and says so.
"""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import procfs
from .budget import Budget
from .errors import NoPrivilege
from .holders import Holders
from .procfs import Owner
from .sockdiag import HOST_SOCKET, SockDiag, TcpState
from .wire import lib

__all__ = ["PacketNames"]

TTL_NS = 200_000_000
"""How long an owner is believed at most before socket and holder are looked at again."""
_SOON_NS = 20_000_000  # and as early as this while there is time for it
_SOON_SHARE, _SOON_SAVED_NS = 4, 100_000_000
_TABLE_SHARE, _TABLE_SAVED_NS = 4, 500_000_000  # of the time, for reading /proc/net
# A port can be another process's as soon as a UDP socket is closed; TCP begins with a SYN.
_LINGER_NS = {socket.IPPROTO_UDP: 50_000_000, socket.IPPROTO_TCP: 1_000_000_000}
_FORGET_NS = 10_000_000_000
_CLOSING_NS = 200_000_000  # from a descriptor's end to its socket's, on a busy machine
_FLOW_LIMIT = 262144
_SYN, _RST, _ACK = 2, 4, 16
_NOT_ACCEPTED = {TcpState.ESTABLISHED, TcpState.SYN_RECV, TcpState.CLOSE_WAIT}
_MAPPED = bytes(10) + b"\xff\xff"
_ANY = bytes(16)

_KEY = np.dtype(
    {
        "names": ["proto", "family", "lport", "rport", "local", "remote"],
        "formats": ["u1", "u1", "u2", "u2", ("u1", (16,)), ("u1", (16,))],
    }
)
_COMM = lib.SNIFFER_COMM_LEN


@dataclass(frozen=True, slots=True)
class Tuple:
    """One flow as this host sees it; addresses as the 16 bytes of a record."""

    proto: int
    family: int
    local: bytes
    lport: int
    remote: bytes
    rport: int


@dataclass(slots=True)
class _Flow:
    checked_ns: int
    how: int
    flags: int = 0
    cookie: int = 0
    inode: int = 0
    owner: Owner | None = None
    settled: bool = False
    """Whether the answer may be kept for TTL_NS; else the next packet asks again."""


def _mapped(address: bytes) -> bytes:
    """Return ::ffff:a.b.c.d, by which a dual-stack socket knows an IPv4 address."""
    return _MAPPED + address[:4]


class PacketNames:
    """Names the records of one network namespace. One thread at a time.

    `diag` is None where sock_diag is refused: then /proc/net in `net` is read, for a quarter
    of the time at most. `is_local(family, address)` tells whether 16 bytes are this host's address.
    """

    def __init__(
        self,
        diag: SockDiag | None,
        holders: Holders,
        is_local: Callable[[int, bytes], bool],
        now_ns: Callable[[], int],
        net: Path = procfs.PROC / "self" / "net",
    ) -> None:
        self._diag = diag
        self._holders = holders
        self._is_local = is_local
        self._now_ns = now_ns
        self._net = net
        self._unheld: dict[int, int] = {}
        self._flows: dict[bytes, _Flow] = {}
        self._ends: dict[tuple[int, int, bytes], _Flow] = {}
        self._soon = Budget(_SOON_SHARE, _SOON_SAVED_NS, now_ns)
        self._table: dict[Tuple, np.void] = {}
        self._table_budget = Budget(_TABLE_SHARE, _TABLE_SAVED_NS, now_ns)
        self._bound: dict[int, tuple[int, np.ndarray]] = {}

    def name(self, records: np.ndarray, to_all: np.ndarray) -> np.ndarray:
        """Fill in owners and reasons; return the records to deliver.

        A packet for several sockets (`to_all`) becomes one record each, further ones flagged as
        copies. Forwarded packets, tapped on the way in and again on the way out, become one.
        """
        outward = records["dir"] == lib.SNIFFER_DIR_OUT
        keys = np.zeros(len(records), _KEY)
        keys["proto"], keys["family"] = records["proto"], records["family"]
        keys["lport"] = np.where(outward, records["sport"], records["dport"])
        keys["rport"] = np.where(outward, records["dport"], records["sport"])
        column = outward[:, np.newaxis]
        keys["local"] = np.where(column, records["saddr"], records["daddr"])
        keys["remote"] = np.where(column, records["daddr"], records["saddr"])
        raw, size = keys.tobytes(), _KEY.itemsize
        groups: dict[tuple[bytes, bool, bool], list[int]] = {}
        for index, (out, every) in enumerate(zip(outward.tolist(), to_all.tolist(), strict=True)):
            key = raw[index * size : (index + 1) * size]
            groups.setdefault((key, out, every), []).append(index)
        keep = np.ones(len(records), bool)
        copies: list[np.ndarray] = []
        for (key, out, every), rows in groups.items():
            one = _tuple_of(keys[rows[0]])
            if every and one.proto == socket.IPPROTO_UDP:
                copies += self._name_all(records, rows, one)
                continue
            forwarded = not self._is_local(one.family, one.local)
            if forwarded and not out:
                records["dir"][rows] = lib.SNIFFER_DIR_FWD
                records["how"][rows] = lib.SNIFFER_HOW_FORWARDED
                continue
            flags = records["tcp_flags"][rows]
            fresh = bool(np.any(flags & (_SYN | _ACK) == _SYN))
            flow = self._flow(key, one, out, fresh, int(records["time_ns"][rows[0]]))
            if forwarded and not flow.cookie and not flow.inode:
                keep[rows] = False
                continue
            self._fill(records, rows, flow)
            if out and flow.owner is None and one.proto == socket.IPPROTO_TCP:
                resets = np.array(rows)[flags & _RST != 0]
                records["how"][resets] = lib.SNIFFER_HOW_NO_SOCKET
        if copies:
            records = np.concatenate([records, *copies])
            keep = np.concatenate([keep, np.ones(len(records) - len(keep), bool)])
        return records if keep.all() else records[keep]

    def _fill(self, records: np.ndarray, rows: list[int], flow: _Flow) -> None:
        records["how"][rows] = flow.how
        records["cookie"][rows] = flow.cookie
        records["inode"][rows] = flow.inode
        records["flags"][rows] |= flow.flags
        if flow.owner is not None:
            records["tgid"][rows] = flow.owner.identity.tgid
            records["start_ns"][rows] = flow.owner.identity.start_ns
            records["uid"][rows] = flow.owner.uid
            records["comm"][rows] = flow.owner.comm[:_COMM]

    def _flow(self, key: bytes, one: Tuple, out: bool, fresh: bool, sent_ns: int) -> _Flow:
        now = self._now_ns()
        known = self._flows.get(key)
        if known is not None and not fresh and known.settled:
            age = now - known.checked_ns
            if age < _SOON_NS or (age < TTL_NS and not self._soon.allows()):
                return known
        with self._soon.spend():
            found = self._ask(one, out, now)
        if found.owner is None and known is not None and not fresh:
            if not found.cookie and known.how == lib.SNIFFER_HOW_SOCKET_GONE:
                found.how = known.how  # it sent something, so there was one
            found = self._linger(known, found, one.proto, now, sent_ns)
        end = (one.proto, one.lport, one.local)
        if one.proto == socket.IPPROTO_UDP:
            before = self._ends.get(end)
            if found.owner is None and before is not None:
                # A client that asked several servers and is gone before the last is looked up.
                found = self._linger(before, found, one.proto, now, sent_ns)
            elif found.owner is not None:
                self._ends[end] = found
        if len(self._flows) > _FLOW_LIMIT:
            self._forget(now)
        self._flows[key] = found
        return found

    def _linger(self, known: _Flow, found: _Flow, proto: int, now: int, sent_ns: int) -> _Flow:
        """The last owner for packets that were under way when the socket went.

        Without a socket those tapped shortly after it was last seen; for as long as the kernel
        still keeps a closed connection (cookie the same), whatever it sends is its last owner's.
        """
        same = known.cookie != 0 and known.cookie == found.cookie
        if known.owner is None or not (same or sent_ns - known.checked_ns < _LINGER_NS[proto]):
            return found
        if found.cookie and not same:
            return found
        known.flags |= lib.SNIFFER_F_DEAD
        known.settled = False
        if same:
            known.checked_ns = now
        return known

    def _forget(self, now: int) -> None:
        limit = now - _FORGET_NS
        self._flows = {key: flow for key, flow in self._flows.items() if flow.checked_ns > limit}
        self._ends = {key: flow for key, flow in self._ends.items() if flow.checked_ns > limit}
        if len(self._flows) > _FLOW_LIMIT:
            self._flows.clear()
            self._ends.clear()

    def _ask(self, one: Tuple, out: bool, now: int) -> _Flow:
        found = self._find(one)
        listening = False
        if found is not None and not found["inode"] and one.proto == socket.IPPROTO_TCP:
            if int(found["state"]) in _NOT_ACCEPTED:
                listener = self._find(Tuple(one.proto, one.family, one.local, one.lport, _ANY, 0))
                if listener is not None and listener["inode"]:
                    found, listening = listener, True
        if found is None:
            reason = lib.SNIFFER_HOW_SOCKET_GONE if out else lib.SNIFFER_HOW_NO_SOCKET
            return _Flow(now, reason)
        listening = listening or int(found["state"]) == TcpState.LISTEN
        flow = self._held(found, now)
        if flow.inode and flow.how == lib.SNIFFER_HOW_SOCKET_GONE:
            again = self._find(one)
            if again is not None and int(again["inode"]) == flow.inode and self._stays(flow):
                flow.how, flow.flags = lib.SNIFFER_HOW_KERNEL, lib.SNIFFER_F_KERNEL
        if listening:
            # The socket that accept() makes will be another one, perhaps another process's.
            flow.cookie = flow.inode = 0
            if flow.flags & lib.SNIFFER_F_SHARED:
                flow.flags |= lib.SNIFFER_F_AMBIGUOUS
        flow.settled = flow.owner is not None and not listening
        return flow

    def _stays(self, flow: _Flow) -> bool:
        """Whether nobody held the socket for a while: one that is being closed goes soon."""
        if len(self._unheld) > _FLOW_LIMIT:
            self._unheld.clear()
        first = self._unheld.setdefault(flow.inode, flow.checked_ns)
        return flow.checked_ns - first > _CLOSING_NS

    def _held(self, found: np.void, now: int) -> _Flow:
        """Return who holds a socket (HOST_SOCKET)."""
        inode = int(found["inode"])
        flow = _Flow(now, lib.SNIFFER_HOW_SOCKET_GONE, 0, int(found["cookie"]), inode)
        if not inode:
            return flow
        owners = self._holders.find(inode)
        if owners:
            flow.owner = owners[0]
            flow.how = lib.SNIFFER_HOW_DIAG if self._diag is not None else lib.SNIFFER_HOW_PROC
            if len(owners) > 1:
                flow.flags |= lib.SNIFFER_F_SHARED
        elif not self._holders.exhaustive:
            flow.how = lib.SNIFFER_HOW_NOT_PROBED
        return flow

    def _find(self, one: Tuple) -> np.void | None:
        if self._diag is not None:
            try:
                return self._diag.find(
                    one.proto, one.family, one.local, one.lport, one.remote, one.rport
                )
            except NoPrivilege:
                self._diag = None
        found = self._look_up(one)
        if found is None and self._table_budget.allows():
            self._read_tables()
            found = self._look_up(one)
        return found

    def _read_tables(self) -> None:
        with self._table_budget.spend():
            self._table = {_tuple_of_socket(row): row for row in procfs.tables(self._net)}

    def _look_up(self, one: Tuple) -> np.void | None:
        """The socket in /proc/net's tables that the kernel would choose: most exact first."""
        forms = [(one.family, one.local, one.remote)]
        if one.family == socket.AF_INET:
            remote = _mapped(one.remote) if one.rport else _ANY
            forms.append((socket.AF_INET6, _mapped(one.local), remote))
        for connected in (True, False):
            for family, local, remote in forms:
                for address in (local, _ANY):
                    peer = (remote, one.rport) if connected else (_ANY, 0)
                    found = self._table.get(Tuple(one.proto, family, address, one.lport, *peer))
                    if found is not None:
                        return found
        return None

    def _name_all(self, records: np.ndarray, rows: list[int], one: Tuple) -> list[np.ndarray]:
        """Name a datagram for everybody; return the copies for its second receiver and further."""
        flows = [self._held(found, self._now_ns()) for found in self._receivers(one)]
        if not flows:
            records["how"][rows] = lib.SNIFFER_HOW_NO_SOCKET
            return []
        copies = []
        for flow in flows[1:]:
            copy = records[rows]
            copy["flags"] |= lib.SNIFFER_F_COPY
            self._fill(copy, list(range(len(rows))), flow)
            copies.append(copy)
        self._fill(records, rows, flows[0])
        return copies

    def _receivers(self, one: Tuple) -> list[np.void]:
        """UDP sockets that a datagram to a group or to all reaches.

        By default each socket bound to the port gets what any of this host joined
        (IP_MULTICAST_ALL); who joined what is not to be seen from outside.
        """
        now = self._now_ns()
        asked, sockets = self._bound.get(one.lport, (0, np.zeros(0, HOST_SOCKET)))
        if now - asked >= TTL_NS:
            if len(self._bound) > 1024:
                self._bound.clear()
            sockets = self._bound_to(one.lport)
            self._bound[one.lport] = (now, sockets)
        found = []
        for row in sockets:
            tuple_ = _tuple_of_socket(row)
            local = tuple_.local == _ANY or tuple_.local in (one.local, _mapped(one.local))
            remote = not tuple_.rport or (
                tuple_.rport == one.rport and tuple_.remote in (one.remote, _mapped(one.remote))
            )
            family = tuple_.family == one.family or tuple_.family == socket.AF_INET6
            if local and remote and family:
                found.append(row)
        return found

    def _bound_to(self, port: int) -> np.ndarray:
        if self._diag is not None:
            try:
                return self._diag.dump((socket.IPPROTO_UDP,), lport=port)
            except NoPrivilege:
                self._diag = None
        table = procfs.tables(self._net)
        bound: np.ndarray = table[(table["proto"] == socket.IPPROTO_UDP) & (table["sport"] == port)]
        return bound


def _tuple_of(key: np.void) -> Tuple:
    return Tuple(
        int(key["proto"]),
        int(key["family"]),
        key["local"].tobytes(),
        int(key["lport"]),
        key["remote"].tobytes(),
        int(key["rport"]),
    )


def _tuple_of_socket(row: np.void) -> Tuple:
    return Tuple(
        int(row["proto"]),
        int(row["family"]),
        row["saddr"].tobytes(),
        int(row["sport"]),
        row["daddr"].tobytes(),
        int(row["dport"]),
    )
