# SPDX-License-Identifier: MIT
"""Names packets without the module: their socket by sock_diag or /proc/net, its holder by /proc.

The socket is asked for by the packet's own tuple at a flow's first packet, so what counts is
how soon that is. A TCP socket that was closed before belonged to its listener's owner, if a
listener accepted it: `how` listener, flagged AMBIGUOUS. Any other is `socket_gone`, which says
that none was there when it was asked for. `no_socket` is said only of a SYN that was refused.
"""

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nlproto.engines.listeners import Listeners
from nlproto.engines.packet_flows import (
    FollowedConnection,
    PacketFlow,
    PacketGroup,
    fill,
    follow,
    groups_of,
    keys_of,
    tuple_of,
)
from nlproto.host import procfs
from nlproto.host.holders import Holders
from nlproto.host.procfs import Owner
from nlproto.host.sockdiag import SockDiag, TcpState
from nlproto.host.socket_lookup import ANY, SocketLookup, Tuple, mapped, tuple_of_socket
from nlproto.records.clock import Clock
from nlproto.records.wire import lib
from nlproto.running.budget import Budget

__all__ = ["FLOW_LIMIT", "LATE_NS", "PacketNames"]

TTL_NS = 200_000_000
"""How long an owner is believed at most before socket and holder are looked at again."""
_SOON_NS = 20_000_000  # and as early as this while there is time for it
_SOON_SHARE, _SOON_SAVED_NS = 4, 100_000_000
# A port can be another process's as soon as a UDP socket is closed; TCP begins with a SYN.
_LINGER_NS = {socket.IPPROTO_UDP: 50_000_000, socket.IPPROTO_TCP: 1_000_000_000}
_FORGET_NS = 10_000_000_000
LATE_NS = 1_000_000_000
"""Who waited as long is not asked about: others wait behind it."""
_LATE_ASKED = 8  # known flows that are asked about all the same: those with most of the packets
_CLOSING_NS = 200_000_000  # from a descriptor's end to its socket's, on a busy machine
FLOW_LIMIT = 262144
_SYN, _ACK = 2, 16
_NOT_ACCEPTED = {TcpState.ESTABLISHED, TcpState.SYN_RECV, TcpState.CLOSE_WAIT}
_GUESS = lib.SNIFFER_F_DEAD | lib.SNIFFER_F_AMBIGUOUS
_SHARED = lib.SNIFFER_F_SHARED | lib.SNIFFER_F_AMBIGUOUS


class PacketNames:
    """Names the records of one network namespace. One thread at a time.

    `diag` is None where sock_diag is refused: then /proc/net in `net` is read, for a quarter
    of the time at most. `is_local(family, address)` tells whether 16 bytes are this host's address.
    Some `flow_limit` flows are remembered, of some 500 bytes each.
    """

    def __init__(
        self,
        diag: SockDiag | None,
        holders: Holders,
        is_local: Callable[[int, bytes], bool],
        now_ns: Callable[[], int],
        net: Path = procfs.PROC / "self" / "net",
        flow_limit: int = FLOW_LIMIT,
    ) -> None:
        self._flow_limit = flow_limit
        self._sockets = SocketLookup(diag, now_ns, net)
        self._holders = holders
        self._listeners = Listeners(self._sockets, holders, now_ns)
        self._is_local = is_local
        self._now_ns = now_ns
        self._unheld: dict[int, int] = {}
        self._flows: dict[bytes, PacketFlow] = {}
        self._ends: dict[tuple[int, int, bytes], PacketFlow] = {}
        self._soon = Budget(_SOON_SHARE, _SOON_SAVED_NS, now_ns)

    def name(self, records: np.ndarray, to_all: np.ndarray, late_ns: int = LATE_NS) -> np.ndarray:
        """Fill in owners and reasons; return the records to deliver (RECORD, shape (n,)).

        A packet for several sockets (`to_all`) becomes one record each, further ones flagged as
        copies. Forwarded packets, tapped on the way in and again on the way out, become one.
        Packets that waited for `late_ns` are named by what is known, at little cost.
        """
        late = self._now_ns() - records["time_ns"].astype(np.int64) > late_ns
        if not late.any():
            return self._name(records, to_all)
        those = records[late]
        keep, ask = self._name_late(those, to_all[late])
        asked = late.copy()
        asked[late] = ask
        now = ~late | asked
        rest = self._name(records[now], to_all[now]) if now.any() else records[:0]
        return np.concatenate([those[keep & ~ask], rest])

    def _name_late(self, records: np.ndarray, to_all: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Name by what is known of flows; which records to deliver, and which to ask about."""
        out = records["dir"] == lib.SNIFFER_DIR_OUT
        raw, size = (keys := keys_of(records, out)).tobytes(), keys.itemsize
        syns = records["tcp_flags"] & (_SYN | _ACK) == _SYN
        flows: dict[bytes, list[int]] = {}
        for row in range(len(records)):
            flows.setdefault(raw[row * size : (row + 1) * size], []).append(row)
        records["how"] = lib.SNIFFER_HOW_NOT_PROBED
        passing = np.zeros(len(records), bool)
        doubtful: list[list[int]] = []
        for key, rows in flows.items():
            known, one = self._flows.get(key), tuple_of(keys[rows[0]])
            if not self._is_local(one.family, one.local):
                passing[rows] = known is None or not (known.cookie or known.inode)
            tcp = one.proto == socket.IPPROTO_TCP
            if tcp and (known is None or syns[rows].any()):
                # who began it was not looked for, so it may be no present listener's either
                sent_ns = int(records["time_ns"][rows[0]])
                unseen = FollowedConnection(sent_ns, active=True)
                how = lib.SNIFFER_HOW_NOT_PROBED
                self._flows[key] = PacketFlow(self._now_ns(), how, connection=unseen)
                continue
            if known is None or not known.settled or to_all[rows[0]]:
                continue
            if int(records["time_ns"][rows[0]]) - known.checked_ns < TTL_NS:
                fill(records, rows, known)
            else:
                doubtful.append(rows)
        self._forget(self._now_ns())
        records["how"][passing] = lib.SNIFFER_HOW_FORWARDED
        records["dir"][passing & ~out] = lib.SNIFFER_DIR_FWD
        ask = np.zeros(len(records), bool)
        for rows in sorted(doubtful, key=len, reverse=True)[:_LATE_ASKED]:
            ask[rows] = True
        return ~(passing & out), ask

    def _name(self, records: np.ndarray, to_all: np.ndarray) -> np.ndarray:
        outward = records["dir"] == lib.SNIFFER_DIR_OUT
        keys = keys_of(records, outward)
        keep = np.ones(len(records), bool)
        copies: list[np.ndarray] = []
        named: list[tuple[list[int], Tuple, PacketFlow]] = []
        groups = groups_of(records, keys, outward, to_all)
        # Who has just begun a connection may end first, and has no listener to stand for it.
        groups.sort(key=lambda group: not (group.syn and group.out and group.first))
        for group in groups:
            rows, out = group.rows, group.out
            one = tuple_of(keys[rows[0]])
            if group.to_all and one.proto == socket.IPPROTO_UDP:
                copies += self._name_all(records, rows, one)
                continue
            forwarded = not self._is_local(one.family, one.local)
            if forwarded and not out:
                records["dir"][rows] = lib.SNIFFER_DIR_FWD
                records["how"][rows] = lib.SNIFFER_HOW_FORWARDED
                continue
            flow = self._flow(group, one, records, forwarded)
            if forwarded and not flow.cookie and not flow.inode:
                keep[rows] = False
                continue
            named.append((rows, one, flow))
        # What takes long comes last: meanwhile others close what they have.
        for rows, one, flow in named:
            if flow.unheld:
                self._look_further(one, flow)
            self._doubt(flow)
            fill(records, rows, flow)
        if copies:
            records = np.concatenate([records, *copies])
            keep = np.concatenate([keep, np.ones(len(records) - len(keep), bool)])
        return records if keep.all() else records[keep]

    def _doubt(self, flow: PacketFlow) -> None:
        """Flag who shares a UDP port with others: which of their sockets it was is not told."""
        row, flow.row = flow.row, None
        if row is None or flow.owner is None or row["proto"] != socket.IPPROTO_UDP or row["dport"]:
            return
        rivals = self._sockets.rivals(row)
        others = zip(rivals["inode"].tolist(), rivals["uid"].tolist(), strict=True)
        for inode, uid in {one for one in others if one[0] not in (0, flow.inode)}:
            holders = self._holders.find_soon(inode, uid)
            if not holders or any(one.identity != flow.owner.identity for one in holders):
                flow.flags |= lib.SNIFFER_F_AMBIGUOUS
                return

    def _flow(
        self, group: PacketGroup, one: Tuple, records: np.ndarray, forwarded: bool
    ) -> PacketFlow:
        now = self._now_ns()
        known = self._flows.get(group.key)
        sent_ns = int(records["time_ns"][group.rows[0]])
        connection = None
        if one.proto == socket.IPPROTO_TCP:
            connection = follow(known, group, records[group.rows], sent_ns)
            if connection.refused:
                how = lib.SNIFFER_HOW_NO_SOCKET
                found = self._flows[group.key] = PacketFlow(now, how, connection=connection)
                return found
        if known is not None and not group.syn and known.settled:
            age, allowed = now - known.checked_ns, self._soon.allows()
            forked = self._holders.may_be_inherited(known.inode, known.checked_ns)
            known.flags |= lib.SNIFFER_F_AMBIGUOUS if forked and not allowed else 0
            fresh = (age < _SOON_NS and not forked) or (age < TTL_NS and not allowed)
            if fresh:
                return known
        with self._soon.spend():
            # what has the tuple now is the next connection's, if this one is over
            gone = PacketFlow(now, lib.SNIFFER_HOW_SOCKET_GONE)
            found = gone if group.over else self._ask(one, now, sent_ns)
            if known is not None and not group.syn:
                found = self._linger(known, found, one.proto, sent_ns)
            if one.proto == socket.IPPROTO_UDP:
                found = self._remember_end(one, found, sent_ns)
            elif connection is not None:
                found.connection = connection
                if found.owner is None and not forwarded:
                    self._take_listener(one, found, connection)
                elif found.owner is not None and not connection.owned:
                    connection.owned = True
                    if connection.listener is not None:
                        self._listeners.accepted(connection.listener, found.owner)
        self._forget(now)
        self._flows[group.key] = found
        return found

    def _remember_end(self, one: Tuple, found: PacketFlow, sent_ns: int) -> PacketFlow:
        """A client that asked several servers may be gone before the last is looked up."""
        end = (one.proto, one.lport, one.local)
        before = self._ends.get(end)
        if found.owner is not None:
            self._ends[end] = found
        elif before is not None:
            found = self._linger(before, found, one.proto, sent_ns)
        return found

    def _linger(self, known: PacketFlow, found: PacketFlow, proto: int, sent_ns: int) -> PacketFlow:
        """The last owner for packets that were under way when the socket went.

        Without a socket those tapped shortly after it was last seen; for as long as the kernel
        still keeps a closed connection (cookie the same), whatever it sends is its last owner's.
        """
        if found.owner is not None or known.owner is None:
            return found
        if known.how == lib.SNIFFER_HOW_LISTENER:
            return found  # the listener is asked about anew
        same = known.cookie != 0 and known.cookie == found.cookie
        late = sent_ns - known.checked_ns >= _LINGER_NS[proto]
        if not same and (late or found.cookie):
            return found
        known.flags |= lib.SNIFFER_F_DEAD
        late = sent_ns - known.checked_ns > _SOON_NS
        if proto == socket.IPPROTO_UDP or found.inode or late:
            # A UDP port may have a new owner, and what was open may have been passed on.
            known.flags |= lib.SNIFFER_F_AMBIGUOUS
        known.settled, known.unheld = False, found.unheld
        if same:
            known.checked_ns = found.checked_ns
        return known

    def _take_listener(self, one: Tuple, found: PacketFlow, connection: FollowedConnection) -> None:
        """Name who accepted, or will accept, a connection without a socket of a process's own."""
        if connection.active or connection.owned or found.how == lib.SNIFFER_HOW_KERNEL:
            return
        listening = found.row is not None and int(found.row["state"]) == TcpState.LISTEN
        there = found.row is not None and not listening
        if not there and not connection.began_ns and not connection.answered:
            return  # nothing says that there was a connection: a probe, an answer to a reset
        waits = False
        if found.row is not None and there:
            waits = int(found.row["state"]) in _NOT_ACCEPTED and not found.inode
        if (before := (now := connection.listener)) is None or waits:
            now = self._listeners.of(one, connection.began_ns, found.row if listening else None)
        listener = now or before
        connection.listener = before or now
        # A connection that waits may have moved to another listener (net.ipv4.tcp_migrate_req).
        moved = waits and before is not None and (now is None or now.inode != before.inode)
        if listener is None:
            return
        found.owner, found.how = listener.owner, lib.SNIFFER_HOW_LISTENER
        found.flags = 0 if waits else _GUESS
        if moved or not listener.sure:
            found.flags |= lib.SNIFFER_F_AMBIGUOUS
        if listener.shared:
            found.flags |= _SHARED
        found.settled = not waits

    def _forget(self, now: int) -> None:
        if len(self._flows) <= self._flow_limit:
            return
        limit = now - _FORGET_NS
        self._flows = {key: flow for key, flow in self._flows.items() if flow.checked_ns > limit}
        self._ends = {key: flow for key, flow in self._ends.items() if flow.checked_ns > limit}
        if len(self._flows) > self._flow_limit * 3 // 4:  # or the next flow would be as dear
            self._flows.clear()
            self._ends.clear()

    def _ask(self, one: Tuple, now: int, sent_ns: int) -> PacketFlow:
        """The socket of the packet's own, with who holds it; a listener is not that."""
        if (row := self._sockets.find(one)) is not None and int(row["state"]) != TcpState.LISTEN:
            return self._held(row, now, sent_ns, self._listeners.likely(one))
        return PacketFlow(now, lib.SNIFFER_HOW_SOCKET_GONE, row=row)

    def _look_further(self, one: Tuple, flow: PacketFlow) -> None:
        """Search all processes for the holder of a socket, unless it is just being closed."""
        flow.unheld = False
        again = self._sockets.find(one)
        if again is None or int(again["inode"]) != flow.inode:
            if flow.owner is None:
                flow.how = lib.SNIFFER_HOW_SOCKET_GONE
            return
        owners = self._holders.find_anywhere(flow.inode, int(again["uid"]))
        if owners or flow.owner is None:
            self._own(flow, owners)
        nobody = not owners and flow.owner is None and flow.how == lib.SNIFFER_HOW_SOCKET_GONE
        if nobody and self._stays(flow):
            flow.how, flow.flags = lib.SNIFFER_HOW_KERNEL, lib.SNIFFER_F_KERNEL

    def _stays(self, flow: PacketFlow) -> bool:
        """Whether nobody held the socket for a while: one that is being closed goes soon."""
        if len(self._unheld) > self._flow_limit:
            self._unheld.clear()
        first = self._unheld.setdefault(flow.inode, flow.checked_ns)
        return flow.checked_ns - first > _CLOSING_NS

    def _held(
        self, row: np.void, now: int, sent_ns: int, likely: tuple[int, ...] = ()
    ) -> PacketFlow:
        """Return who holds a socket (HOST_SOCKET)."""
        inode = int(row["inode"])
        flow = PacketFlow(now, lib.SNIFFER_HOW_SOCKET_GONE, 0, int(row["cookie"]), inode, row=row)
        flow.sent_ns = sent_ns
        if not inode:
            return flow
        self._own(flow, self._holders.find_soon(inode, int(row["uid"]), likely))
        flow.unheld = flow.owner is None
        return flow

    def _own(self, flow: PacketFlow, owners: tuple[Owner, ...]) -> None:
        sent_ns = Clock.now().boot_ns(flow.sent_ns)
        there = tuple(one for one in owners if one.identity.start_ns <= sent_ns)
        if owners and not there:  # who began later: of another connection, or of one passed on
            flow.how = lib.SNIFFER_HOW_SOCKET_GONE
            return
        if there:
            flow.owner, flow.flags = there[0], 0
            if flow.connection is not None:
                flow.connection.owned = True
            flow.how = lib.SNIFFER_HOW_DIAG if self._sockets.by_diag else lib.SNIFFER_HOW_PROC
            flow.settled = True
            if len(there) > 1:
                flow.flags |= _SHARED  # which of them uses it is not to be seen from outside
        else:
            gone, unknown = lib.SNIFFER_HOW_SOCKET_GONE, lib.SNIFFER_HOW_NOT_PROBED
            flow.how = gone if self._holders.exhaustive else unknown

    def _name_all(self, records: np.ndarray, rows: list[int], one: Tuple) -> list[np.ndarray]:
        """Name a datagram for everybody; return the copies for its second receiver and further."""
        sent_ns = int(records["time_ns"][rows[0]])
        receivers = self._receivers(one)
        flows = [self._held(found, self._now_ns(), sent_ns) for found in receivers]
        for flow, found in zip(flows, receivers, strict=True):
            if flow.unheld:
                self._own(flow, self._holders.find_anywhere(flow.inode, int(found["uid"])))
        if not flows:
            records["how"][rows] = lib.SNIFFER_HOW_SOCKET_GONE
            return []
        copies = []
        for flow in flows[1:]:
            copy = records[rows]
            copy["flags"] |= lib.SNIFFER_F_COPY
            fill(copy, list(range(len(rows))), flow)
            copies.append(copy)
        fill(records, rows, flows[0])
        return copies

    def _receivers(self, one: Tuple) -> list[np.void]:
        """UDP sockets that a datagram to a group or to all reaches.

        By default each socket bound to the port gets what any of this host joined
        (IP_MULTICAST_ALL); who joined what is not to be seen from outside.
        """
        found = []
        for row in self._sockets.bound(one.proto, one.lport):
            tuple_ = tuple_of_socket(row)
            local = tuple_.local == ANY or tuple_.local in (one.local, mapped(one.local))
            remote = not tuple_.rport or (
                tuple_.rport == one.rport and tuple_.remote in (one.remote, mapped(one.remote))
            )
            family = tuple_.family == one.family or tuple_.family == socket.AF_INET6
            if local and remote and family:
                found.append(row)
        return found
