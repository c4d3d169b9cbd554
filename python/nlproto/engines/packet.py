# SPDX-License-Identifier: MIT
"""Engine `packet`: AF_PACKET and sock_diag, for machines where the module cannot be loaded.

It cannot tell
- who had a socket that closed before its first packet was looked up, as of a short-lived process;
- which of several holders has sent;
- that this host receives its own multicast, because no tap sees these copies.
Where this host translates addresses (NAT), it asks conntrack for the ends that a socket knows. It
sees packets before the firewall (in) and after it (out), and fragments unassembled.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nlproto.engines.namespaces import CapturedNamespaces
from nlproto.engines.packet_names import FLOW_LIMIT, LATE_NS, PacketNames
from nlproto.engines.ring import Frames, PacketRing
from nlproto.errors import Error, NoPrivilege
from nlproto.host import netns, procfs
from nlproto.host.holders import Holders
from nlproto.host.netns import Interfaces, LocalAddresses
from nlproto.host.sockdiag import SockDiag
from nlproto.kernel.conntrack import ConntrackLookup
from nlproto.records import wire
from nlproto.records.clock import Clock
from nlproto.records.wire import SNAP, Batch, FirstBytesBatch, PacketBytes, lib
from nlproto.running import descriptors
from nlproto.running.budget import Patience, UserBudgets
from nlproto.running.closing import Closing
from nlproto.running.descriptors import Wakeup
from nlproto.running.supervise import Failures
from nlproto.running.urgency import Urgency

__all__ = ["PacketEngine"]

RING_BYTES = 16 << 20
_OTHER_RING_BYTES = 2 << 20  # for each of the first namespaces of our own user namespace
_LARGE_RINGS = 32
_OTHER_FLOWS, _SMALL_FLOWS = 1 << 15, 1 << 12  # remembered flows, in a namespace with such a ring
_SMALL_RING_BYTES = 1 << 19  # for all others: 16 + 64 + 112 MiB at most
_LOOK_SHARE = 100  # the time between two walks is at least this many times the last one's
_WALK_NS = 1_000_000_000  # between two walks of all descriptors that nobody requested
_TRY_AGAIN_S = 0.1
_REFRESH_NS = 1_000_000_000
_ROUNDS = 16  # the most ring reads in one read(), so that the caller gets a turn in a flood,
_ROUNDS_NS = 50_000_000  # and the longest time of them
_AT_ONCE = 8192
"""Packets taken out of a ring before any is named: lookups take time, and the ring fills."""
_BATCH = 1024
"""The most records of a batch: who has no room for it loses all of them."""
_SOON_NS, _CAUGHT_UP_NS = 50_000_000, 200_000_000
"""The longest time for lookups while others wait: in a read, and in catch_up()."""
_USER_SHARE, _USERS_SHARE, _USER_SAVED_NS = 4, 3, 1_000_000_000
"""Parts of the time, for lookups in the namespaces of one user and of all users but root."""
_SYN, _ACK = 2, 16


@dataclass(slots=True)
class _Capture:
    """Everything of one network namespace. Created inside it."""

    capture: PacketRing
    diag: SockDiag | None
    interfaces: Interfaces
    addresses: LocalAddresses
    names: PacketNames
    nat: ConntrackLookup
    large: bool = False
    """Whether its ring is one of the larger ones."""
    told: bool = False
    """Whether its losses were reported."""

    def close(self) -> None:
        self.capture.close()
        self.interfaces.close()
        self.nat.close()
        if self.diag is not None:
            self.diag.close()


class PacketEngine(Closing):
    """Captures in every network namespace that it may enter. See nlproto.engines.engine.Engine.

    Batches have its own `instance`, and CPU 0. If a ring had no room, record_seq has a gap; the
    account counts it as lost in "socket". Raises NoPrivilege without CAP_NET_RAW.
    """

    name = "packet"
    group = "packets"

    def __init__(
        self,
        notify: Callable[[str], None],
        *,
        proc: Path = procfs.PROC,
        everywhere: bool = True,
        sock_diag: bool = True,
        ring_bytes: int = RING_BYTES,
        now_ns: Callable[[], int] = time.monotonic_ns,
        holders: Holders | None = None,
        finder: netns.Finder | None = None,
    ) -> None:
        self._notify = notify
        self._proc = proc
        self._use_diag = sock_diag
        self._now_ns = now_ns
        self._urgency = Urgency(now_ns)
        self._holders = Holders(proc, now_ns) if holders is None else holders
        self._owns_holders = holders is None
        self._failures = Failures("engine packet")
        self._places: dict[int, _Capture] = {}
        self._poll = select.poll()
        self._wakeup = Wakeup()
        self._wakeup.register(self._poll)
        self._by_fd: dict[int, _Capture] = {}
        self._batch_seq = self._record_seq = 0
        self._packets = self._skipped = self._dropped = 0
        self._walk_again_ns = 0
        self._users = UserBudgets(_USER_SHARE, _USERS_SHARE, _USER_SAVED_NS, now_ns)
        self._heard = False
        """Packets came since the last walk."""
        self._large_rings = 0
        self._rings_lock = threading.Lock()
        """Guards the number of large rings: many threads open some, and one gives them back."""
        self._wants_first_bytes = False
        self._from_ns = 0
        self._roots: list[PacketRing] = []
        """The rings of our own network namespace, and of root's."""
        self.awaited: Callable[[], bool] = lambda: False
        self.instance = time.time_ns()
        self._own = netns.own(proc)
        self._add(self._own, self._open(self._own, proc / "self" / "ns" / "net", ring_bytes))
        self._others = CapturedNamespaces(
            self._open_other, self._own, notify, proc, finder, self.wake
        )
        self.opening = self._position()
        self.closing: np.ndarray = np.zeros(0, wire.TAIL)
        try:
            if everywhere:
                self._others.start()
            self._take_changes()
            self._holders.walk(only_first=True)  # all must be known before packets come
            if not self._holders.complete:
                notify(f"the sockets of some processes cannot be read: {self._remedy()}")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close rings, sockets and namespaces."""
        self._urgency.rest()
        self._others.close(self._places.values())
        if self._owns_holders:
            self._holders.close()
        self._wakeup.close()
        self._places.clear()
        self._by_fd.clear()

    def _remedy(self) -> str:
        if procfs.is_inside(self._proc):
            return "this is a container (a pid namespace); run it outside, or with --pid=host"
        if os.geteuid():
            return "run it as root"
        return "it needs CAP_SYS_PTRACE"

    # Network namespaces

    def _open(
        self, inode: int, path: Path, ring_bytes: int, flow_limit: int = FLOW_LIMIT
    ) -> _Capture:
        def make() -> _Capture:
            with contextlib.ExitStack() as undo:
                capture = undo.enter_context(PacketRing(inode, ring_bytes))
                interfaces = undo.enter_context(Interfaces())
                diag = self._open_diag() if self._use_diag else None
                addresses = LocalAddresses(interfaces, self._now_ns)
                net = path.parent.parent / "net"
                nat = ConntrackLookup(self._now_ns, inode == self._own)
                local = addresses.is_local
                names = PacketNames(
                    diag, self._holders, local, self._now_ns, net, flow_limit, nat, inode
                )
                undo.pop_all()
                return _Capture(capture, diag, interfaces, addresses, names, nat)

        if inode != self._own:
            return netns.run_inside(path, inode, make)
        try:
            return make()
        except OSError as error:
            raise Error(f"engine packet cannot start: {error.strerror}; try again") from error

    def _open_other(self, inode: int, path: Path, ours: bool) -> _Capture:
        """Runs in threads of CapturedNamespaces."""
        with self._rings_lock:
            large = ours and self._large_rings < _LARGE_RINGS
            self._large_rings += large
        size = (_OTHER_RING_BYTES, _OTHER_FLOWS) if large else (_SMALL_RING_BYTES, _SMALL_FLOWS)
        try:
            place = self._open(inode, path, *size)
        except BaseException:
            self._leave_room(large)
            raise
        place.large = large
        return place

    def _leave_room(self, large: bool) -> None:
        with self._rings_lock:
            self._large_rings -= large

    def _take_changes(self) -> None:
        """Start reading new namespaces, and stop reading those that will be closed."""
        changes = list(self._others.changes())
        for inode, place in changes:
            if place is not None:
                self._add(inode, place)
                continue
            gone = self._places.pop(inode)
            self._by_fd.pop(gone.capture.fileno(), None)
            self._poll.unregister(gone.capture)
            self._leave_room(gone.large)
            self._others.give_back(gone)
        if changes or not self._roots:
            places = self._places.values()
            self._roots = [place.capture for place in places if not self._owner_of(place)]

    def _add(self, inode: int, place: _Capture) -> None:
        self._places[inode] = place
        self._by_fd[place.capture.fileno()] = place
        self._poll.register(place.capture, select.POLLIN)

    def _open_diag(self) -> SockDiag | None:
        diag = SockDiag()
        try:
            diag.dump()
        except NoPrivilege as error:
            diag.close()
            self._notify(f"{error}; falling back to /proc/net, which is slower to see sockets")
            self._use_diag = False
            return None
        return diag

    def _walk(self, now: int) -> None:
        """Learn all holders: a search for one socket ends at the first holders that it finds."""
        if now >= self._walk_again_ns and self._holders.due():
            self._holders.walk_beside(0)
            self._walk_again_ns = now + max(_WALK_NS, _LOOK_SHARE * self._holders.walk_took_ns)
            self._heard = False

    # Engine

    def read(self, timeout: float) -> Iterator[Batch | FirstBytesBatch]:
        """See Engine."""
        now = self._now_ns()
        self._urgency.look()
        self._take_changes()
        if self._heard:  # without listeners nobody needs the holders
            try:
                self._walk(now)
            except descriptors.NoDescriptors as error:  # known flows go on
                self._walk_again_ns = now + _WALK_NS
                self._failures.add(error)
            # a walk that may not begin yet is tried again soon
            timeout = min(timeout, max(_TRY_AGAIN_S, (self._walk_again_ns - now) / 1e9))
        polled = self._poll.poll(timeout * 1000)
        ready = [fd for fd, _event in polled if not self._wakeup.clear(fd)]
        if not ready:
            return
        now = self._now_ns()
        self._heard = True
        places = self._in_order(self._by_fd[fd] for fd in ready)
        own, others = (self._patience(time_ns) for time_ns in (_SOON_NS, 2 * _SOON_NS))
        for _ in range(_ROUNDS):
            got = False
            for place in places:
                patience = own if place.capture.netns == self._own else others
                events = self._read_place(place, patience)
                got = got or bool(events)
                yield from events
            if not got or self._now_ns() - now > _ROUNDS_NS:
                return

    def _in_order(self, places: Iterable[_Capture]) -> list[_Capture]:
        """Return our own network namespace first, then root's, then others'."""
        own = self._own
        return sorted(places, key=lambda one: (one.capture.netns != own, self._owner_of(one) != 0))

    def _patience(self, soon_ns: int) -> Patience:
        def others_wait() -> bool:
            return self.awaited() or any(ring.fills for ring in self._roots)

        return Patience(soon_ns, LATE_NS, others_wait, self._now_ns)

    def _read_place(
        self,
        place: _Capture,
        patience: Patience,
        until_ns: int | None = None,
        late_ns: int = LATE_NS,
    ) -> list[Batch | FirstBytesBatch]:
        before = place.capture.skipped
        frames = place.capture.read(self._wants_first_bytes, _AT_ONCE)
        if _has_syn(frames.records):
            # An answer follows in a moment, and says whether anybody listened.
            frames = frames.with_more(place.capture.read(self._wants_first_bytes))
        records, to_all = frames.records, frames.to_all
        self._skipped += place.capture.skipped - before
        self._packets += place.capture.skipped - before
        self._count_drops(place)
        if not len(records):
            return []
        records["seq"] = np.arange(len(records))  # for now the number of the frame
        taken = records["time_ns"] >= self._from_ns
        if until_ns is not None:
            taken &= records["time_ns"] < until_ns
        if not taken.all():
            records, to_all = records[taken], to_all[taken]
        place.addresses.refresh(_REFRESH_NS)
        if len(place.addresses.duplicating):
            once = ~np.isin(records["ifindex"], place.addresses.duplicating)
            records, to_all = records[once], to_all[once]
        uid = self._owner_of(place)
        late_ns = late_ns if self._users.allows(uid) else 0
        try:
            with self._users.spend(uid):
                records = place.names.name(records, to_all, late_ns, patience.is_over)
        except Exception as error:  # one process's flood must not cost others their packets
            self._failures.add(error, "naming")
            records["how"][records["how"] == 0] = lib.SNIFFER_HOW_NOT_PROBED
        if not len(records):
            return []
        copies = np.count_nonzero(records["flags"] & lib.SNIFFER_F_COPY)
        self._packets += len(records) - int(copies)
        found: list[Batch | FirstBytesBatch] = []
        for at in range(0, len(records), _BATCH):
            found += self._batch(records[at : at + _BATCH], frames)
        return found

    def _batch(self, records: np.ndarray, frames: Frames) -> list[Batch | FirstBytesBatch]:
        """Number records. The first bytes of their packets come first."""
        first = self._record_seq
        self._record_seq += len(records)
        frame = records["seq"].copy()
        records["seq"] = np.arange(first, self._record_seq, dtype=np.uint64).astype(np.uint32)
        head = self._head(first, len(records))
        self._batch_seq += 1
        if frames.first_bytes is None:
            return [Batch(head, records)]
        return [_first_bytes(head, records, frames.first_bytes[frame]), Batch(head, records)]

    def _owner_of(self, place: _Capture) -> int:
        """Return the user whose namespace it is."""
        inode = place.capture.netns
        uid = 0 if inode == self._own else self._others.owner(inode)
        return netns.UNKNOWN_OWNER if uid is None else uid

    def _count_drops(self, place: _Capture) -> None:
        """Put a gap into record_seq for each packet that a ring had no room for."""
        dropped = place.capture.drops()
        if dropped and not place.told:
            place.told = True
            own = place.capture.netns == self._own
            self._notify(
                f"packets of network namespace {place.capture.netns} are lost: its ring of"
                f" {place.capture.ring_bytes >> 10} KiB was full"
                + ("; -B KIB (daemon.yaml: ring_size) makes it larger" if own else "")
            )
        self._dropped += dropped
        self._record_seq += dropped
        self._packets += dropped

    def _head(self, first: int, count: int) -> np.void:
        clock, mono = Clock.now(), time.monotonic_ns()
        heads = np.zeros(1, wire.BATCH)
        heads["version"] = lib.SNIFFER_VERSION
        heads["record_size"] = wire.RECORD.itemsize
        heads["count"] = count
        heads["instance"] = self.instance
        heads["batch_seq"] = self._batch_seq
        heads["record_seq"] = first
        heads["packets"] = self._packets
        heads["skipped"] = self._skipped
        heads["mono_ns"] = mono
        heads["real_ns"] = clock.real_ns(mono)
        heads["boot_ns"] = clock.boot_ns(mono)
        head: np.void = heads[0]
        return head

    def wake(self) -> None:
        """See Engine."""
        self._wakeup.wake()

    def want_first_bytes(self, wanted: bool) -> bool:
        """See Engine."""
        self._wants_first_bytes = wanted
        return True

    def want_packets(self, wanted: bool) -> None:
        """Do nothing: this engine has no sums of flows."""

    def _position(self) -> np.ndarray:
        """Return how far the stream is, as TAIL."""
        tail = np.zeros(1, wire.TAIL)
        tail["batch_seq"], tail["record_seq"] = self._batch_seq, self._record_seq
        tail["packets"], tail["skipped"] = self._packets, self._skipped
        return tail

    def begin(self) -> int:
        """See Engine."""
        self.opening = self._position()
        self._from_ns = time.monotonic_ns()
        return self._from_ns

    def catch_up(self, until_ns: int | None = None) -> Iterator[Batch | FirstBytesBatch]:
        """See Engine."""
        self._take_changes()
        # later packets belong to the next call: a flood must not hold us here
        places = self._in_order(self._places.values())
        waiting = [(place, place.capture.waiting()) for place in places]
        patience = Patience(_CAUGHT_UP_NS, LATE_NS, lambda: True, self._now_ns)
        for place, count in waiting:
            end = place.capture.frames_read + count
            while place.capture.frames_read < end:
                self._urgency.look()
                late_ns = 0 if patience.is_over() else LATE_NS
                yield from self._read_place(place, patience, until_ns, late_ns)
            self._count_drops(place)
        self.closing = self._position()

    def finish(self, until_ns: int | None = None) -> Iterator[Batch | FirstBytesBatch]:
        """See Engine."""
        yield from self.catch_up(until_ns)

    def stats(self) -> dict[str, object]:
        """See Engine."""
        return {
            "engine": self.name,
            "instance": self.instance,
            "packets": self._packets,
            "skipped": self._skipped,
            "records": self._record_seq - self._dropped,
            "lost_socket": self._dropped,
            "network_namespaces": len(self._places),
            "network_namespaces_left_out": self._others.left_out,
            "sock_diag": self._use_diag,
        }


def _has_syn(records: np.ndarray) -> bool:
    """Return whether one of the packets begins a TCP connection."""
    syn = records["tcp_flags"] & (_SYN | _ACK) == _SYN
    return bool(np.any(syn & (records["dir"] == lib.SNIFFER_DIR_IN)))


def _first_bytes(head: np.void, records: np.ndarray, frames: np.ndarray) -> FirstBytesBatch:
    """Return the first bytes of the packets of `records`. Copies of a datagram have them too."""
    heads = np.zeros(len(records), SNAP)
    for name in ("time_ns", "seq", "cpu", "len"):
        heads[name] = records[name]
    heads["caplen"] = frames["caplen"]
    found = zip(heads, frames["data"], frames["caplen"].tolist(), strict=True)
    return FirstBytesBatch(
        head, tuple(PacketBytes(one, data[:size].tobytes()) for one, data, size in found)
    )
