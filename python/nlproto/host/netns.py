# SPDX-License-Identifier: MIT
"""Network namespaces: which there are, work inside one, its addresses and interfaces.

Sources: man 7 network_namespaces, man 2 setns, man 7 rtnetlink.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from nlproto._host import ffi, lib
from nlproto.errors import Error, NoPrivilege, UsageError
from nlproto.host import procfs
from nlproto.kernel.netlink import NLM_F_DUMP, Connection, attributes
from nlproto.running import descriptors
from nlproto.running.closing import Closing
from nlproto.running.descriptors import or_error

__all__ = [
    "MAX_OTHERS",
    "UNKNOWN_OWNER",
    "Finder",
    "Interfaces",
    "LocalAddresses",
    "Namespace",
    "choose",
    "find",
    "own",
    "owner",
    "owner_or_unknown",
    "paths",
    "room",
    "run_inside",
]

T = TypeVar("T")

NAMED = Path("/run/netns")
MAX_OTHERS = 255
"""The most namespaces beside our own."""
UNKNOWN_OWNER = -1
"""In place of the uid that a namespace belongs to."""

_YOUNG_NS = 2_000_000_000
"""A process that will enter another namespace does so soon after its birth."""
_ROUND_NS, _SHARE = 1_000_000_000, 500
"""Reading all others takes at least so long, and at most this part of the time."""
_FEW = 256  # new numbers of processes are tried one by one, others mean a list of all
_LIST_NS, _LIST_SHARE = 1_000_000_000, 1000  # between two such lists, and of the time
_SAME_NS = 240_000_000  # for so long an answer stands while no process comes or goes
_MISS_NS = 50_000_000  # between two readings of addresses for one that is not known
_NAMES_NS = 5_000_000_000  # between two readings of names that have not changed

NS_GET_USERNS, NS_GET_PARENT, NS_GET_OWNER_UID = 0xB701, 0xB702, 0xB704
_UID = struct.Struct("=I")

RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR = 16, 18, 20, 22
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFLA_LINKINFO, IFLA_INFO_KIND, IFLA_INFO_SLAVE_KIND = 18, 1, 4
_IFADDRMSG_BYTES, _IFINFOMSG_BYTES = 8, 16
_INDEX = struct.Struct("=4xi")  # ifi_index in struct ifinfomsg

# Ports of these hand every packet up to the device above, which has the addresses.
_DUPLICATING_PORTS = {"bridge", "bond", "team", "openvswitch"}


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace that a user named in some way."""

    netns: int
    """Its inode."""
    since_s: float = 0.0
    """Unix time since which this namespace surely has this number."""


_MAX_PID = 1 << 22
"""PID_MAX_LIMIT (include/linux/threads.h); inodes of namespaces begin near 0xEFFFFFF8."""


def find(name: str) -> Namespace:
    """Return the namespace of a name (ip netns), a path, a pid or an inode. Raises UsageError."""
    path = name if name.startswith("/") else NAMED / name
    with suppress(OSError, ValueError):
        status = os.stat(path)
        if status.st_dev == os.stat(procfs.PROC / "self/ns/net").st_dev:
            # the inode of a mounted name lives as long as the name
            return Namespace(status.st_ino, status.st_ctime if os.path.ismount(path) else 0.0)
    if not (name.isascii() and name.isdigit()):
        raise UsageError(f"netns {name}: no network namespace at {path}")
    number = int(name)
    try:
        inode = os.stat(f"{procfs.PROC}/{number}/ns/net").st_ino
    except OSError:
        if number <= _MAX_PID or number >= 1 << 32:
            raise UsageError(
                f"netns {name}: no process {name} whose network namespace can be seen"
            ) from None
        return Namespace(number)
    return Namespace(inode, _started_s(number))


def _started_s(pid: int) -> float:
    found = procfs.identity(pid)
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot + found.start_ns / 1e9 if found else 0.0


def own(proc: Path = Path("/proc")) -> int:
    """Return the inode of this process's network namespace."""
    return os.stat(proc / "self" / "ns" / "net").st_ino


def paths(proc: Path = procfs.PROC, named: Path = NAMED) -> dict[int, Path]:
    """Return every network namespace that can be seen, as {inode: a path to open}.

    Namespaces without a process and without a name in /run/netns cannot be seen. Raises Error if no
    file descriptor is left.
    """
    return Finder(proc, named).paths()


class Finder:
    """Finds network namespaces again and again, at little cost. For any thread.

    A process is read when it is new, and some more times while it is young. After that it is read
    in turn, because it may enter another namespace. A list of all tells now and then who has gone.
    """

    def __init__(
        self,
        proc: Path = procfs.PROC,
        named: Path = NAMED,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._proc = proc
        self._named = named
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._births = procfs.Births(proc)
        self._alive: tuple[int, int] | None = None
        """The last census: since then nobody has come."""
        self._listed: tuple[int, int] | None = None
        """That when all processes were listed."""
        self._list_again_ns = 0
        """When they may be listed again although few have come."""
        self._of: dict[int, int] = {}
        """Maps each process to its namespace; 0: it may not be read."""
        self._young: dict[int, int] = {}
        """Processes that were new a moment ago, and since when."""
        self._waiting: deque[int] = deque()
        """Processes in the order of their turn."""
        self._looked_ns = now_ns()
        self._cost_ns = 1
        """What it takes to read one process."""
        self._names: dict[int, Path] = {}
        self._named_ns = (0, 0)
        """When the names last changed, and when they were last read."""
        self._first: dict[int, int] = {}
        """Maps each namespace to a process in it."""
        self._told_ns = -_SAME_NS

    def close(self) -> None:
        """Close its descriptor. From then on each look lists all processes."""
        self._births.close()

    def paths(self) -> dict[int, Path]:
        """See paths()."""
        with self._lock:
            now = self._now_ns()
            alive = self._births.census()
            changed = alive is None or alive != self._alive
            if not changed and alive != self._listed and now >= self._list_again_ns:
                changed = True
            if not (changed or self._young) and now - self._told_ns < _SAME_NS:
                return self._known()
            self._told_ns = now
            listed = changed and self._count(now, alive)
            some = list(self._young) + self._next(now)
            self._young = {pid: at for pid, at in self._young.items() if now - at < _YOUNG_NS}
            if self._ask(some) or listed:
                self._first = {}
                for pid, inode in self._of.items():
                    self._first.setdefault(inode, pid)
            self._read_names(now)
            return self._known()

    def _known(self) -> dict[int, Path]:
        first = {inode: self._proc / f"{pid}/ns/net" for inode, pid in self._first.items() if inode}
        return self._names | first

    def _count(self, now: int, alive: tuple[int, int] | None) -> bool:
        """Learn who has come. Returns whether it has listed all, which tells who has gone.

        `alive`: the census before.
        """
        before, self._alive = self._alive, alive
        newest = before[1] if before else 0
        came = alive[1] - newest if alive and newest else -1
        listed = not 0 <= came <= _FEW or now >= self._list_again_ns
        if not listed:
            numbers = range(newest + 1, newest + came + 1)
            new = [pid for pid in numbers if pid not in self._of and procfs.is_process(pid)]
            self._of |= dict.fromkeys(new, 0)
        else:
            began = self._now_ns()
            pids = procfs.pids(self._proc)
            self._listed = alive
            self._list_again_ns = now + max(_LIST_NS, _LIST_SHARE * (self._now_ns() - began))
            new = [pid for pid in pids if pid not in self._of]
            self._of = {pid: self._of.get(pid, 0) for pid in pids}
            self._young = {pid: at for pid, at in self._young.items() if pid in self._of}
        self._young |= dict.fromkeys(new, now)
        self._waiting.extend(new)
        return listed

    def _next(self, now: int) -> list[int]:
        """Return whose turn it is to be read again."""
        passed = max(0, now - self._looked_ns)
        due = min(len(self._of) * passed // _ROUND_NS, passed // _SHARE // self._cost_ns)
        if due:  # else the time is saved up
            self._looked_ns = now
        some: list[int] = []
        for _ in range(min(len(self._waiting), due)):
            pid = self._waiting.popleft()
            if pid in self._of:
                self._waiting.append(pid)
                if pid not in self._young:
                    some.append(pid)
        return some

    def _ask(self, pids: list[int]) -> bool:
        """Read their namespaces. Returns whether one left a namespace that it stood for."""
        if not pids:
            return False
        began = self._now_ns()
        inodes = ffi.new("uint64_t[]", len(pids))
        lib.host_net_namespaces(bytes(self._proc), pids, len(pids), inodes)
        self._cost_ns = max(1, (self._now_ns() - began) // len(pids))
        left = False
        for pid, inode in zip(pids, ffi.unpack(inodes, len(pids)), strict=True):
            before = self._of[pid]
            if before != inode:
                self._of[pid] = inode
                left |= self._first.get(before) == pid
                self._first.setdefault(inode, pid)
        return left

    def _read_names(self, now: int) -> None:
        """Read the names if they have changed, and now and then: a name comes before its mount."""
        try:
            changed_ns = os.stat(self._named).st_mtime_ns
        except OSError:
            self._names, self._named_ns = {}, (0, 0)
            return
        before_ns, read_ns = self._named_ns
        young = time.time_ns() - changed_ns < _YOUNG_NS
        if not young and changed_ns == before_ns and now - read_ns < _NAMES_NS:
            return
        self._named_ns = changed_ns, now
        self._names = {}
        try:
            with or_error():
                entries = list(self._named.iterdir())
            nsfs = os.stat(self._proc / "self" / "ns" / "net").st_dev
        except OSError:
            return
        for entry in entries:
            with suppress(OSError):
                status = entry.stat()
                if status.st_dev == nsfs:
                    self._names[status.st_ino] = entry


def _open(path: Path, inode: int) -> int:
    """Open a namespace for its descriptor. Raises FileNotFoundError if another one is there now.

    What was a process's is another's when its pid is used again, and a name can be given anew.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if os.fstat(handle).st_ino != inode:
        os.close(handle)
        raise FileNotFoundError(errno.ENOENT, f"network namespace {inode} is there no more", path)
    return handle


def owner(path: Path, inode: int, proc: Path = Path("/proc")) -> int | None:
    """Return which uid owns the namespace `inode`, which was found at `path`.

    None if it belongs to our own user namespace. The owner is the uid that made the outermost user
    namespace around it. Inside, a user has more ids, and can make more user namespaces with them.
    Raises OSError if that may not be asked or if it has ended.
    """
    ours = os.stat(proc / "self" / "ns" / "user").st_ino
    handle = _open(path, inode)
    try:
        handle = _related(handle, NS_GET_USERNS)
        uid: int | None = None
        while os.fstat(handle).st_ino != ours:
            (uid,) = _UID.unpack(fcntl.ioctl(handle, NS_GET_OWNER_UID, bytes(_UID.size)))
            try:
                handle = _related(handle, NS_GET_PARENT)
            except PermissionError:  # ours is not one of its parents
                break
        return uid
    finally:
        os.close(handle)


def owner_or_unknown(path: Path, inode: int, proc: Path = Path("/proc")) -> int | None:
    """Return what owner() returns; UNKNOWN_OWNER if the namespace has ended or may not be asked."""
    try:
        return owner(path, inode, proc)
    except OSError:
        return UNKNOWN_OWNER


def _related(handle: int, request: int) -> int:
    """Exchange the descriptor of a namespace for that of a related one."""
    other = fcntl.ioctl(handle, request)
    os.close(handle)
    return other


def room() -> int:
    """Return how many namespaces beside our own the descriptors are enough for."""
    return descriptors.namespaces(MAX_OTHERS + 1) - 1


def choose(owners: Mapping[int, int | None], held: Collection[int], limit: int) -> set[int]:
    """Return which `limit` namespaces of {inode: owner()} get a place.

    Those of our own user namespace and root's come first, then one of each uid in turn. Among a
    uid's namespaces, those with a place (`held`) keep it.
    """
    by_uid: dict[int | None, list[int]] = {}
    for inode in sorted(owners, key=lambda one: one not in held):
        by_uid.setdefault(owners[inode] or None, []).append(inode)
    chosen = set(by_uid.pop(None, [])[:limit])
    turn = 0
    while len(chosen) < limit and by_uid:
        for uid in list(by_uid):
            if turn >= len(by_uid[uid]):
                del by_uid[uid]
            elif len(chosen) < limit:
                chosen.add(by_uid[uid][turn])
        turn += 1
    return chosen


def run_inside(path: Path, inode: int, work: Callable[[], T]) -> T:
    """Run work() in a thread of its own, inside the namespace `inode` found at `path`.

    Returns its result. Sockets made in there stay there. Raises FileNotFoundError if the namespace
    is not there any more, NoPrivilege without CAP_SYS_ADMIN. Raises Error if no thread can be
    made, and what work() raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            handle = _open(path, inode)
            try:
                code = -lib.host_setns_net(handle)
            finally:
                os.close(handle)
            if code == errno.EPERM:
                raise NoPrivilege(f"entering a network namespace: {os.strerror(code)}")
            if code:
                raise OSError(code, os.strerror(code))
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter, name="netns")
    try:
        thread.start()
    except RuntimeError as error:  # TasksMax=, ulimit -u
        raise Error(f"{error}: raise the limit of tasks, or end some") from None
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class Interfaces(Closing):
    """rtnetlink of the network namespace in which it is created. A context manager."""

    def __init__(self) -> None:
        self._connection = Connection(socket.NETLINK_ROUTE)

    def close(self) -> None:
        """Close its Netlink socket."""
        self._connection.close()

    def _dump(self, kind: int, body: int) -> Iterator[memoryview]:
        for message in self._connection.exchange(kind, NLM_F_DUMP, bytes(body)):
            yield message.payload

    def addresses(self) -> set[bytes]:
        """Return this host's addresses as 16 bytes each, IPv4 in the first four."""
        found: set[bytes] = set()
        for payload in self._dump(RTM_GETADDR, _IFADDRMSG_BYTES):
            values = dict(attributes(payload[_IFADDRMSG_BYTES:]))
            address = values.get(IFA_LOCAL, values.get(IFA_ADDRESS))
            if address is not None:
                found.add(bytes(address).ljust(16, b"\0"))
        return found

    def duplicating(self) -> set[int]:
        """Return interfaces whose packets a tap sees again on another interface.

        These are ports of bridges, bonds and teams, and VRF devices, whose ports have the
        addresses.
        """
        found: set[int] = set()
        for payload in self._dump(RTM_GETLINK, _IFINFOMSG_BYTES):
            (index,) = _INDEX.unpack_from(payload)
            values = dict(attributes(payload[_IFINFOMSG_BYTES:]))
            info = dict(attributes(values.get(IFLA_LINKINFO, memoryview(b""))))
            kind = bytes(info.get(IFLA_INFO_KIND, b"")).rstrip(b"\0").decode("ascii", "replace")
            port = bytes(info.get(IFLA_INFO_SLAVE_KIND, b"")).rstrip(b"\0")
            if port.decode("ascii", "replace") in _DUPLICATING_PORTS or kind == "vrf":
                found.add(index)
        return found


class LocalAddresses:
    """Local addresses and twice-tapped interfaces of a network namespace, read when stale."""

    def __init__(self, interfaces: Interfaces, now_ns: Callable[[], int]) -> None:
        self._interfaces = interfaces
        self._now_ns = now_ns
        self._read_ns = 0
        self._addresses: set[bytes] = set()
        self.duplicating: np.ndarray = np.zeros(0, np.uint32)
        """Numbers of the interfaces whose packets another one has too."""
        self.refresh()

    def refresh(self, older_ns: int = 0) -> None:
        """Read them again if the last time is so long ago."""
        now = self._now_ns()
        if now - self._read_ns < older_ns:
            return
        self._read_ns = now
        with suppress(Error, OSError):
            self._addresses = self._interfaces.addresses()
            self.duplicating = np.array(sorted(self._interfaces.duplicating()), np.uint32)

    def is_local(self, family: int, address: bytes) -> bool:
        """Return whether the `family`'s `address` (4 or 16 bytes) is one of this namespace."""
        if family == socket.AF_INET:
            first = address[0]
            if first == 127 or first >= 224 or not any(address):
                return True
        elif address[0] == 0xFF:
            return True
        if address in self._addresses:
            return True
        self.refresh(_MISS_NS)
        return address in self._addresses
