# SPDX-License-Identifier: MIT
"""Names packets without the module. sock_diag or /proc/net finds the socket, /proc its holder.

A flow's first packet has its socket looked up by its tuple, as soon as possible. A TCP socket that
has closed by then was its listener's owner's, if a listener accepted it: `how` is `listener`,
flagged AMBIGUOUS. Else the lookup found none: `socket_gone`. `no_socket` is a refused SYN.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from nlproto.engines.listeners import Listeners
from nlproto.engines.packet_groups import (
    FollowedConnection,
    PacketFlow,
    PacketGroup,
    fill,
    follow,
    group_packets,
    keys_of,
    tuple_of_key,
)
from nlproto.engines.past_holders import PastHolders
from nlproto.errors import Error
from nlproto.host import procfs
from nlproto.host.holders import Holders
from nlproto.host.procfs import Owner
from nlproto.host.sockdiag import SockDiag, TcpState
from nlproto.host.socket_lookup import Rivals, SocketLookup, Tuple
from nlproto.kernel.conntrack import ConntrackLookup
from nlproto.records.clock import Clock
from nlproto.records.wire import lib
from nlproto.running.budget import Budget

__all__ = ["FLOW_LIMIT", "LATE_NS", "PacketNames"]

TTL_NS = 200_000_000
"""How long an owner stays valid at most. Then socket and holder are looked up again."""
_SOON_NS = 20_000_000  # and this early while there is time for it
_SOON_SHARE, _SOON_SAVED_NS = 4, 100_000_000
# UDP: another process can get a closed socket's port at once. TCP: a connection needs a SYN.
_LINGER_NS = {socket.IPPROTO_UDP: 50_000_000, socket.IPPROTO_TCP: 1_000_000_000}
_FORGET_NS = 10_000_000_000
LATE_NS = 1_000_000_000
"""Older packets are not looked up: others wait behind them."""
_LATE_ASKED = 8  # known flows of theirs that are: those with most packets
FLOW_LIMIT = 262144
"""The most flows whose owners are remembered."""
_RECEIVERS = 64
"""The most sockets for which a multicast packet is recorded, each time: users can open any number.
With more of them, these are ambiguous."""
_SYN, _ACK = 2, 16
_NOT_ACCEPTED = {TcpState.ESTABLISHED, TcpState.SYN_RECV, TcpState.CLOSE_WAIT}
_GUESS = lib.SNIFFER_F_DEAD | lib.SNIFFER_F_AMBIGUOUS
_SHARED = lib.SNIFFER_F_SHARED | lib.SNIFFER_F_AMBIGUOUS


class PacketNames:
    """Names the records of one network namespace. For one thread at a time.

    `diag` is None where sock_diag is refused: then /proc/net in `net` is read, for a quarter of the
    time at most, while it is of namespace `inode`. `is_local(family, address)` tells whether 16
    bytes are this host's address. `nat` tells what this host makes of a packet's ends. Some
    `flow_limit` flows are remembered, of some 500 bytes each.
    """

    def __init__(
        self,
        diag: SockDiag | None,
        holders: Holders,
        is_local: Callable[[int, bytes], bool],
        now_ns: Callable[[], int],
        net: Path = procfs.PROC / "self" / "net",
        flow_limit: int = FLOW_LIMIT,
        nat: ConntrackLookup | None = None,
        inode: int = 0,
    ) -> None:
        self._nat = nat
        self._flow_limit = flow_limit
        self._sockets = SocketLookup(diag, now_ns, net, inode)
        self._holders = holders
        self._listeners = Listeners(self._sockets, holders, now_ns)
        self._is_local = is_local
        self._now_ns = now_ns
        self._past = PastHolders(flow_limit)
        self._flows: dict[bytes, PacketFlow] = {}
        self._ends: dict[tuple[int, int, bytes], PacketFlow] = {}
        self._soon = Budget(_SOON_SHARE, _SOON_SAVED_NS, now_ns)

    def name(
        self,
        records: np.ndarray,
        to_all: np.ndarray,
        late_ns: int = LATE_NS,
        over: Callable[[], bool] = lambda: False,
    ) -> np.ndarray:
        """Fill in owners and reasons. Returns the records to deliver (RECORD, shape (n,)).

        A packet for several sockets (`to_all`) becomes a record each, the first and its copies. A
        forwarded packet is tapped on its way in and out, and becomes one record.

        What is known of their flows names packets that have waited for `late_ns`. It names the
        others as soon as the time for lookups is `over`.
        """
        self._holders.meet_newest()  # whoever was born later has sent none of these
        late = self._now_ns() - records["time_ns"].astype(np.int64) > late_ns
        if not late.any():
            return self._name(records, to_all, over)
        those = records[late]
        keep, ask = self._name_late(those, to_all[late])
        now = ~late
        now[late] = ask
        rest = self._name(records[now], to_all[now], over) if now.any() else records[:0]
        return np.concatenate([those[keep & ~ask], rest])

    def _name_late(self, records: np.ndarray, to_all: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Name by what is known of flows. Returns which records to deliver, which to look up."""
        out = records["dir"] == lib.SNIFFER_DIR_OUT
        raw, size = (keys := keys_of(records, out)).tobytes(), keys.itemsize
        times = records["time_ns"].tolist()
        syns = records["tcp_flags"] & (_SYN | _ACK) == _SYN
        flows: dict[bytes, list[int]] = {}
        for row in range(len(records)):
            flows.setdefault(raw[row * size : (row + 1) * size], []).append(row)
        records["how"] = lib.SNIFFER_HOW_NOT_PROBED
        passing = np.zeros(len(records), bool)
        doubtful: list[list[int]] = []
        named: list[tuple[list[int], PacketFlow]] = []
        now = self._now_ns()
        for key, rows in flows.items():
            known, one = self._flows.get(key), tuple_of_key(key)
            if not self._is_local(one.family, one.local):
                passing[rows] = known is None or not (known.cookie or known.inode)
            tcp = one.proto == socket.IPPROTO_TCP
            if tcp and (known is None or syns[rows].any()):
                # Nobody looked who began it, so a present listener may have come later.
                unseen = FollowedConnection(times[rows[0]], active=True)
                self._flows[key] = PacketFlow(now, lib.SNIFFER_HOW_NOT_PROBED, connection=unseen)
            elif known is None or not known.settled or to_all[rows[0]]:
                continue
            elif times[rows[-1]] - known.checked_ns >= TTL_NS:
                doubtful.append(rows)
            elif known.how == lib.SNIFFER_HOW_FORWARDED:
                passing[rows] = True
            else:
                if self._holders.may_be_inherited(known.inode, known.checked_ns):
                    known.flags |= lib.SNIFFER_F_AMBIGUOUS
                named.append((rows, known))
        fill(records, named)
        self._forget(now)
        records["how"][passing] = lib.SNIFFER_HOW_FORWARDED
        records["dir"][passing & ~out] = lib.SNIFFER_DIR_FWD
        ask = np.zeros(len(records), bool)
        for rows in sorted(doubtful, key=len, reverse=True)[:_LATE_ASKED]:
            ask[rows] = True
        return ~(passing & out), ask

    def _name(
        self, records: np.ndarray, to_all: np.ndarray, over: Callable[[], bool]
    ) -> np.ndarray:
        with self._holders.beside.waiting_until(over):
            return self._name_now(records, to_all, over)

    def _name_now(
        self, records: np.ndarray, to_all: np.ndarray, over: Callable[[], bool]
    ) -> np.ndarray:
        outward = records["dir"] == lib.SNIFFER_DIR_OUT
        keys = keys_of(records, outward)
        keep = np.ones(len(records), bool)
        copies: list[np.ndarray] = []
        named: list[tuple[list[int], Tuple, PacketFlow]] = []
        groups = group_packets(records, keys, outward, to_all)
        # Who has just begun a connection may end first, and has no listener to stand for it.
        groups.sort(key=lambda group: not (group.syn and group.out and group.first))
        self._doubt_who_left(groups)
        self._ask_together([] if over() else groups)
        for group in groups:
            rows, out = group.rows, group.out
            one = tuple_of_key(group.key)
            if group.to_all and one.proto == socket.IPPROTO_UDP:
                copies += self._name_all(records, rows, one, over)
                continue
            forwarded = not self._is_local(one.family, one.local)
            if forwarded and not out:
                records["dir"][rows] = lib.SNIFFER_DIR_FWD
                records["how"][rows] = lib.SNIFFER_HOW_FORWARDED
                continue
            flow = self._flow(group, one, records, forwarded, over())
            if forwarded and not flow.cookie and not flow.inode:
                keep[rows] = False
                continue
            if flow.how == lib.SNIFFER_HOW_FORWARDED:
                # translated on its way: one record, as of any forwarded packet
                keep[rows] = not out
                records["dir"][rows] = lib.SNIFFER_DIR_FWD
            named.append((rows, one, flow))
        # Slow searches come last: meanwhile others close their sockets.
        for _, one, flow in named:
            try:
                if flow.unheld and not over():
                    self._look_further(one, flow)
                self._doubt(flow, over)
            except Error:  # as in _flow()
                flow.settled = False
                flow.flags |= lib.SNIFFER_F_AMBIGUOUS
                if flow.owner is None:
                    flow.how = lib.SNIFFER_HOW_NOT_PROBED
        fill(records, [(rows, flow) for rows, _, flow in named])
        self._forget(self._now_ns())
        if copies:
            records = np.concatenate([records, *copies])
            keep = np.concatenate([keep, np.ones(len(records) - len(keep), bool)])
        return records if keep.all() else records[keep]

    def _doubt_who_left(self, groups: Iterable[PacketGroup]) -> None:
        """Look flows up again whose process has their socket no more: others may have the port."""
        known: dict[tuple[int, int], list[PacketFlow]] = {}
        for group in groups:
            flow = self._flows.get(group.key)
            if flow is not None and flow.settled and flow.owner is not None and flow.inode:
                known.setdefault((flow.inode, flow.owner.identity.tgid), []).append(flow)
        for one in self._holders.have_left(list(known)) if known else ():
            for flow in known[one]:
                flow.settled = flow.how == lib.SNIFFER_HOW_LISTENER

    def _ask_together(self, groups: Iterable[PacketGroup]) -> None:
        """Ask for the sockets that _flow() will want, with one call: each is a fight for a lock."""
        oldest_ns = self._now_ns() - (_SOON_NS if self._soon.allows() else TTL_NS)
        asked = []
        for group in groups:
            known = self._flows.get(group.key)
            settled = known is not None and known.settled and known.checked_ns > oldest_ns
            if not group.to_all and not group.over and (group.syn or not settled):
                one = tuple_of_key(group.key)
                if group.out or self._is_local(one.family, one.local):
                    asked.append(one)
        if self._nat is not None:
            self._nat.begin()
        with self._soon.spend():
            self._sockets.ask_together(asked)

    def _doubt(self, flow: PacketFlow, over: Callable[[], bool]) -> None:
        """Flag records of a UDP port with several sockets: nothing says which one it was."""
        row, flow.row, rivals, flow.rivals = flow.row, None, flow.rivals, None
        if row is None or flow.owner is None or row["proto"] != socket.IPPROTO_UDP or row["dport"]:
            return
        rivals = rivals or (None if over() else self._sockets.rivals_then(row, flow.sent_ns))
        rivals = rivals or Rivals(set(), [])
        owner = flow.owner.identity
        doubtful = not all(self._past.only(inode, owner.tgid) for inode in rivals.gone)
        for inode, uid in () if doubtful or over() else rivals.present:
            holders = () if over() else self._holders.find_soon(inode, uid)
            if doubtful := not holders or any(one.identity != owner for one in holders):
                break
        if (hurried := over()) or doubtful:  # or there was no time to look at all
            flow.flags |= lib.SNIFFER_F_AMBIGUOUS
            flow.settled &= not hurried

    def _flow(
        self, group: PacketGroup, one: Tuple, records: np.ndarray, forwarded: bool, hurried: bool
    ) -> PacketFlow:
        """`hurried`: there is no time for a lookup."""
        now = self._now_ns()
        known = self._flows.get(group.key)
        connection = None
        if one.proto == socket.IPPROTO_TCP:
            connection = follow(known, group)
            if connection.refused:
                how = lib.SNIFFER_HOW_NO_SOCKET
                found = self._flows[group.key] = PacketFlow(now, how, connection=connection)
                return found
        if known is not None and not group.syn and known.settled:
            age, allowed = now - known.checked_ns, self._soon.allows()
            forked = self._holders.may_be_inherited(known.inode, known.checked_ns)
            known.flags |= lib.SNIFFER_F_AMBIGUOUS if forked and not allowed else 0
            fresh = (age < _SOON_NS and not forked) or (age < TTL_NS and not allowed)
            last_ns = int(records["time_ns"][group.rows[-1]]) if hurried else 0
            if fresh or (hurried and last_ns - known.checked_ns < TTL_NS):
                return known
        found = PacketFlow(now, lib.SNIFFER_HOW_NOT_PROBED, connection=connection)
        if not hurried:
            # without an answer, as for lack of memory, the next packet asks again
            with contextlib.suppress(Error), self._soon.spend():
                found = self._look_up(group, one, now, known, connection, forwarded)
        elif known is not None and not group.syn:
            found = self._linger(known, found, one.proto, group.sent_ns)
        self._flows[group.key] = found
        return found

    def _look_up(
        self,
        group: PacketGroup,
        one: Tuple,
        now: int,
        known: PacketFlow | None,
        connection: FollowedConnection | None,
        forwarded: bool,
    ) -> PacketFlow:
        # if this connection is over, the next one has the tuple now
        gone = PacketFlow(now, lib.SNIFFER_HOW_SOCKET_GONE)
        found = gone if group.over else self._ask(one, now, group.sent_ns)
        if not forwarded and not group.over and not found.inode and not found.cookie:
            one, found = self._ask_behind_nat(one, found, group.sent_ns)
        if found.how == lib.SNIFFER_HOW_FORWARDED:
            return found
        if known is not None and not group.syn:
            found = self._linger(known, found, one.proto, group.sent_ns)
        if one.proto == socket.IPPROTO_UDP:
            found = self._remember_end(one, found, group.sent_ns)
        elif connection is not None:
            found.connection = connection
            if found.owner is None and not forwarded:
                self._take_listener(one, found, connection)
            elif found.owner is not None and not connection.owned:
                connection.owned = True
                if connection.listener is not None:
                    self._listeners.accepted(connection.listener, found.owner)
        return found

    def _remember_end(self, one: Tuple, found: PacketFlow, sent_ns: int) -> PacketFlow:
        """A client that asked several servers may be gone before its last socket is looked up."""
        end = (one.proto, one.lport, one.local)
        before = self._ends.get(end)
        if found.owner is not None:
            self._ends[end] = found
        elif before is not None:
            found = self._linger(before, found, one.proto, sent_ns)
        return found

    def _linger(self, known: PacketFlow, found: PacketFlow, proto: int, sent_ns: int) -> PacketFlow:
        """Return the last owner, for packets that were under way when the socket closed.

        Without a socket: for packets tapped shortly after it was last seen. While the kernel keeps
        a closed connection (same cookie), its last owner has all that it sends.
        """
        if found.owner is not None or known.owner is None:
            return found
        if known.how == lib.SNIFFER_HOW_LISTENER:
            return found  # the listener is looked up again
        same = known.cookie != 0 and known.cookie == found.cookie
        late = sent_ns - known.checked_ns >= _LINGER_NS[proto]
        if not same and (late or found.cookie):
            return found
        known.flags |= lib.SNIFFER_F_DEAD
        late = sent_ns - known.checked_ns > _SOON_NS
        if proto == socket.IPPROTO_UDP or found.inode or late:
            # A UDP port may have a new owner, and an open socket may have been passed on.
            known.flags |= lib.SNIFFER_F_AMBIGUOUS
        known.settled, known.unheld = False, found.unheld
        if same:
            known.checked_ns = found.checked_ns
        return known

    def _take_listener(self, one: Tuple, found: PacketFlow, connection: FollowedConnection) -> None:
        """Name the process that accepted, or will accept, a connection whose socket nobody has."""
        if connection.active or connection.owned or found.how == lib.SNIFFER_HOW_KERNEL:
            return
        listening = found.row is not None and int(found.row["state"]) == TcpState.LISTEN
        there = found.row is not None and not listening
        if not there and not connection.began_ns and not connection.answered:
            return  # no sign of a connection: it was a probe, or an answer to a reset
        waits = False
        if found.row is not None and there:
            waits = int(found.row["state"]) in _NOT_ACCEPTED and not found.inode
        if (before := (now := connection.listener)) is None or waits:
            now = self._listeners.of(one, connection.began_ns, found.row if listening else None)
        listener = now or before
        connection.listener = before or now
        # It may have moved to another listener (net.ipv4.tcp_migrate_req).
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
        if len(self._flows) > self._flow_limit * 3 // 4:  # or the next flow would cost as much
            self._flows.clear()
            self._ends.clear()

    def _ask(self, one: Tuple, now: int, sent_ns: int) -> PacketFlow:
        """Return the packet's own socket and its holders. A listener is not its own socket."""
        if (row := self._sockets.find(one)) is not None and int(row["state"]) != TcpState.LISTEN:
            # first, while there is time: they may close while holders are searched
            rivals = self._sockets.rivals_then(row, sent_ns) if self._soon.allows() else None
            found = self._held(row, now, sent_ns, self._listeners.likely(one))
            found.rivals = rivals
            return found
        return PacketFlow(now, lib.SNIFFER_HOW_SOCKET_GONE, row=row)

    def _ask_behind_nat(
        self, one: Tuple, found: PacketFlow, sent_ns: int
    ) -> tuple[Tuple, PacketFlow]:
        """The same by the ends that its socket knows, where this host translates addresses."""
        ends = None
        if self._nat is not None:
            near, far = (one.local, one.lport), (one.remote, one.rport)
            ends = self._nat.ends(one.proto, one.family, near, far)
        if ends is None:
            return one, found
        other = Tuple(one.proto, one.family, *ends[0], *ends[1])
        if not self._is_local(other.family, other.local):
            return one, PacketFlow(found.checked_ns, lib.SNIFFER_HOW_FORWARDED, settled=True)
        found = self._ask(other, found.checked_ns, sent_ns)
        found.ends = other
        return other, found

    def _look_further(self, one: Tuple, flow: PacketFlow) -> None:
        """Search all processes for a socket's holder, unless it is just being closed."""
        flow.unheld = False
        again = self._sockets.find(flow.ends or one)
        if again is None or int(again["inode"]) != flow.inode:
            if flow.owner is None:
                flow.how = lib.SNIFFER_HOW_SOCKET_GONE
            return
        owners = self._holders.find_anywhere(flow.inode, int(again["uid"]))
        if owners or flow.owner is None:
            self._own(flow, owners)
        nobody = not owners and flow.owner is None and flow.how == lib.SNIFFER_HOW_SOCKET_GONE
        if nobody and self._past.nobody_stays(flow.inode, flow.checked_ns):
            flow.how, flow.flags = lib.SNIFFER_HOW_KERNEL, lib.SNIFFER_F_KERNEL

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
        if owners and not there:  # these began later
            flow.how = lib.SNIFFER_HOW_SOCKET_GONE
            return
        if there:
            flow.owner, flow.flags = there[0], 0
            if flow.connection is not None:
                flow.connection.owned = True
            flow.how = lib.SNIFFER_HOW_DIAG if self._sockets.by_diag else lib.SNIFFER_HOW_PROC
            flow.settled = True
            if len(there) > 1:
                flow.flags |= _SHARED  # from outside nobody sees which of them uses it
            pids = [one.identity.tgid for one in owners]
            if self._past.has_been_left(flow.inode, pids, self._now_ns(), flow.sent_ns):
                flow.flags |= lib.SNIFFER_F_AMBIGUOUS
        else:
            gone, unknown = lib.SNIFFER_HOW_SOCKET_GONE, lib.SNIFFER_HOW_NOT_PROBED
            flow.how = gone if self._holders.exhaustive else unknown

    def _name_all(
        self, records: np.ndarray, rows: list[int], one: Tuple, over: Callable[[], bool]
    ) -> list[np.ndarray]:
        """Name a datagram for all receivers; return the copies for all but the first."""
        sent_ns = int(records["time_ns"][rows[0]])
        try:
            receivers = self._sockets.receivers(one)
        except Error:  # as in _flow()
            records["how"][rows] = lib.SNIFFER_HOW_NOT_PROBED
            return []
        more, receivers = len(receivers) > _RECEIVERS, receivers[:_RECEIVERS]
        flows = [self._held(found, self._now_ns(), sent_ns) for found in receivers]
        for flow, found in zip(flows, receivers, strict=True):
            if flow.unheld and not over():
                self._own(flow, self._holders.find_anywhere(flow.inode, int(found["uid"])))
        if not flows:
            records["how"][rows] = lib.SNIFFER_HOW_SOCKET_GONE
            return []
        for flow in flows:
            flow.flags |= lib.SNIFFER_F_AMBIGUOUS if more else 0
        copies = []
        for flow in flows[1:]:
            copy = records[rows]
            copy["flags"] |= lib.SNIFFER_F_COPY
            fill(copy, [(list(range(len(rows))), flow)])
            copies.append(copy)
        fill(records, [(rows, flows[0])])
        return copies
