# SPDX-License-Identifier: MIT
"""/proc: socket tables, and facts about processes. The start time is checked before and after.

Sources: man 5 proc, net/ipv4/tcp_ipv4.c (get_tcp4_sock), fs/proc/array.c (do_task_stat).
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import socket
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nlproto._host import ffi, lib
from nlproto.errors import UsageError
from nlproto.host import cgroups
from nlproto.host.cgroups import container_of, unit_of
from nlproto.host.sockdiag import HOST_SOCKET
from nlproto.records.process_event import command_line
from nlproto.records.wire import MAX_TEXT, bounded, dtype_of
from nlproto.running.budget import UserBudgets
from nlproto.running.descriptors import or_error

__all__ = [
    "Births",
    "CMDLINE_MODES",
    "Identity",
    "Owner",
    "Parent",
    "ProcessDetails",
    "add_held",
    "are_held",
    "container_of",
    "details",
    "held_sockets",
    "identity",
    "is_process",
    "owner",
    "owners",
    "parent",
    "parents",
    "pids",
    "same_start",
    "socket_inodes",
    "still_held",
    "tables",
    "unit_of",
    "user_name",
]

PROC = Path("/proc")
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
CMDLINE_MODES = ("full", "program", "off")
"""What is kept of a command line: all, its first word, nothing."""
_HELD_AT_ONCE, _HELD_EACH, _MAX_HELD = 4096, 64, 1 << 21
_MANY = 256
_INITIAL_PIDNS = 0xEFFFFFFC  # include/linux/proc_ns.h
"""With more processes a second thread is worth it."""
HELD = dtype_of("host_held", ffi)
"""A process's descriptor of a socket: inode, pid, fd."""
_OWNER = dtype_of("host_owner", ffi)
_NOBODY = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a process, safe from reuse of its pid; `start_ticks` as in /proc/PID/stat."""

    tgid: int
    start_ticks: int

    @property
    def start_ns(self) -> int:
        """Start since boot in ns, as exact as ticks are (10 ms): compare with same_start()."""
        return self.start_ticks * TICK_NS


@dataclass(frozen=True, slots=True)
class Owner:
    """A process as a record names it; `uid` is the real one."""

    identity: Identity
    comm: bytes
    uid: int


@dataclass(frozen=True, slots=True)
class Parent:
    """A parent of a process, direct or not."""

    pid: int
    comm: str


@dataclass(frozen=True, slots=True)
class ProcessDetails:
    """What /proc says about a living process; empty fields are unknown (kernel threads)."""

    tgid: int
    start_ns: int
    comm: str
    exe: str
    cmdline: str
    ppid: int
    uid: int
    user: str
    cgroup: str
    unit: str
    container: str
    parents: tuple[Parent, ...] = ()


def same_start(start_ns: int, ticks: int) -> bool:
    """Return whether a record's start_ns is the start time `ticks` of /proc/PID/stat."""
    return start_ns // TICK_NS == ticks


def pids(proc: Path = PROC) -> list[int]:
    """Return the thread-group ids of all visible processes, in the order of /proc.

    Raises Error when no file descriptor is left.
    """
    with or_error():
        return [int(name) for name in os.listdir(proc) if name.isdecimal()]


_GONE = (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EPERM)


def _read(path: str, limit: int = 8192) -> bytes:
    """Return the first `limit` bytes of a file of /proc in one read, which gives all there is."""
    buffer = ffi.new("char[]", limit)
    read = lib.host_read(os.fsencode(path), buffer, limit)
    if read < 0:
        with or_error():
            raise OSError(-read, os.strerror(-read), path)
    return bytes(ffi.buffer(buffer, read))


def _stat(pid: int, proc: Path) -> tuple[bytes, int, int] | None:
    """Return comm, start ticks and ppid; None if there is no such process."""
    found = ffi.new("struct host_owner *", {"pid": pid})
    error = -lib.host_stat(bytes(proc), found)
    if error in _GONE:
        return None
    if error:
        with or_error():
            raise OSError(error, os.strerror(error), f"{proc}/{pid}/stat")
    return ffi.buffer(found.comm)[: found.comm_len], found.start_ticks, found.ppid


def identity(pid: int, proc: Path = PROC) -> Identity | None:
    """Return the identity of `pid`; None if there is no such process."""
    found = _stat(pid, proc)
    return Identity(pid, found[1]) if found else None


def parent(pid: int, proc: Path = PROC) -> int:
    """Return the parent's pid; 0 if there is none, or no such process."""
    found = _stat(pid, proc)
    return found[2] if found else 0


_MAX_PARENTS = 16


def parents(pid: int, start_ns: int, proc: Path = PROC) -> tuple[Parent, ...]:
    """Return `pid` and its parents up to init, at most _MAX_PARENTS, as they are now.

    `start_ns` is the child's. A process that began later has reused a parent's pid: the list ends
    there.
    """
    found: list[Parent] = []
    born = start_ns // TICK_NS
    while pid > 0 and len(found) < _MAX_PARENTS:
        one = _stat(pid, proc)
        if one is None or one[1] > born:
            break
        found.append(Parent(pid, bounded(one[0])))
        _, born, pid = one
    return tuple(found)


def owner(pid: int, proc: Path = PROC) -> Owner | None:
    """Return `pid` as an owner: identity, comm and real uid; None if it has gone."""
    return next(iter(owners((pid,), proc)), None)


def owners(some: Sequence[int], proc: Path = PROC) -> list[Owner]:
    """Return those of `some` that run, as owners. One call without Python's lock."""
    if not some:
        return []
    found = np.zeros(len(some), _OWNER)
    found["pid"] = some
    lib.host_owners(bytes(proc), ffi.from_buffer("struct host_owner[]", found), len(found))
    there = found[found["comm_len"] != _NOBODY]
    names = zip(*(there[name].tolist() for name in ("pid", "start_ticks", "uid")), strict=True)
    comms = zip(there["comm"], there["comm_len"].tolist(), strict=True)
    return [
        Owner(Identity(pid, ticks), comm.tobytes()[:size], uid)
        for (pid, ticks, uid), (comm, size) in zip(names, comms, strict=True)
    ]


def still_held(inode: int, held: Mapping[int, int], proc: Path = PROC) -> dict[int, int]:
    """Return those of `held` {pid: descriptor} that have the socket `inode` at that descriptor."""
    if not held:
        return {}
    found = np.zeros(len(held), HELD)
    found["inode"], found["pid"], found["fd"] = inode, list(held), list(held.values())
    there = found[are_held(found, proc)]
    return dict(zip(there["pid"].tolist(), there["fd"].tolist(), strict=True))


def are_held(some: np.ndarray, proc: Path = PROC) -> np.ndarray:
    """Return for each HELD whether it is so: one bool each. One call without Python's lock."""
    found = some.copy()
    lib.host_still_held(bytes(proc), ffi.from_buffer("struct host_held[]", found), len(found))
    held: np.ndarray = found["pid"] != 0
    return held


class Births:
    """Knows the number of the newest process or thread, long before a list of /proc would.

    For any thread. 0 if the kernel does not say.
    """

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._seen: tuple[int, int] | None = None
        self._since_ns = 0
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(proc / "loadavg", os.O_RDONLY | os.O_CLOEXEC)
            self._finalizer = weakref.finalize(self, os.close, self._fd)

    def close(self) -> None:
        """Close the descriptor. From then on last() is 0."""
        if self._fd >= 0:
            self._fd = -1
            self._finalizer()

    def last(self) -> int:
        """Return the number. Takes 2 microseconds."""
        try:
            return int(os.pread(self._fd, 128, 0).split()[-1])
        except (OSError, IndexError, ValueError):
            return 0

    def census(self) -> tuple[int, int] | None:
        """Return how many processes there are and the newest; None if the kernel does not say."""
        newest = self.last()
        return (os.stat(self._proc).st_nlink, newest) if newest else None

    def none_since(self, at_ns: int, now_ns: int) -> bool:
        """Return whether calls since before `at_ns` say that no process has come or gone."""
        seen = self.census()
        if seen is None or seen != self._seen:
            self._seen, self._since_ns = seen, now_ns
        return seen is not None and self._since_ns < at_ns


def is_inside(proc: Path = PROC) -> bool:
    """Return whether there may be processes that `proc` does not show, as from a container."""
    try:
        return os.stat(proc / "self" / "ns" / "pid").st_ino != _INITIAL_PIDNS
    except FileNotFoundError:  # a kernel without pid namespaces
        return False
    except OSError:
        return True


def is_process(number: int) -> bool:
    """Return whether it is a living process and not another thread: /proc shows both."""
    try:
        os.close(os.pidfd_open(number))
    except OSError:
        return False
    return True


def held_sockets(some: Sequence[int], proc: Path = PROC) -> tuple[np.ndarray, bool]:
    """Return which sockets the processes `some` hold (HELD), and whether all could be read.

    It runs without Python's lock, and with many processes on two processors, because milliseconds
    matter.
    """
    if len(some) < _MANY:
        return _held_sockets(some, proc)
    middle = len(some) // 2
    other: list[tuple[np.ndarray, bool]] = []
    beside = threading.Thread(
        target=lambda: other.append(_held_sockets(some[middle:], proc)), name="held", daemon=True
    )
    beside.start()
    found, asked = _held_sockets(some[:middle], proc)
    beside.join()
    for more, told in other:
        return np.concatenate((found, more)), asked and told
    return found, False


def _held_sockets(some: Sequence[int], proc: Path) -> tuple[np.ndarray, bool]:
    try:
        directory = os.open(proc, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return np.zeros(0, HELD), False
    try:
        pids = np.array(some, np.uint32)
        refused = ffi.new("uint32_t *")
        room = min(max(_HELD_AT_ONCE, _HELD_EACH * len(some)), _MAX_HELD)
        while True:
            found = np.zeros(room, HELD)
            read = lib.host_held_sockets(
                directory,
                ffi.from_buffer("uint32_t[]", pids),
                len(pids),
                ffi.from_buffer("struct host_held[]", found),
                room,
                refused,
            )
            if read < room or room >= _MAX_HELD:
                return found[:read].copy(), not refused[0]
            room = min(room * 8, _MAX_HELD)
    finally:
        os.close(directory)


def add_held(by_inode: dict[int, dict[int, int]], sockets: np.ndarray) -> None:
    """Enter who holds `sockets` (HELD, maybe a million) as {inode: {pid: descriptor}}."""
    for inode, pid, fd in sockets.tolist():
        if inode in by_inode:
            by_inode[inode][pid] = fd
        else:
            by_inode[inode] = {pid: fd}


def socket_inodes(pid: int, proc: Path = PROC) -> dict[int, int] | None:
    """Return the sockets that `pid` holds, as {inode: descriptor}.

    None if it may not be read (another user's); empty if it has gone.
    """
    held, asked = held_sockets([pid], proc)
    if not asked:
        return None
    return dict(zip(held["inode"].tolist(), held["fd"].tolist(), strict=True))


def tables(net: Path = PROC / "self" / "net") -> np.ndarray:
    """Return the sockets (HOST_SOCKET, cookie 0) in {tcp,udp}{,6} of a /proc/PID/net directory.

    A table that this kernel lacks (IPv6 switched off) is left out.
    """
    rows: list[tuple[object, ...]] = []
    for name, family, proto in (
        ("tcp", socket.AF_INET, socket.IPPROTO_TCP),
        ("tcp6", socket.AF_INET6, socket.IPPROTO_TCP),
        ("udp", socket.AF_INET, socket.IPPROTO_UDP),
        ("udp6", socket.AF_INET6, socket.IPPROTO_UDP),
    ):
        with contextlib.suppress(OSError), open(net / name, "rb") as lines:
            next(lines, None)
            for line in lines:
                with contextlib.suppress(ValueError, IndexError):
                    rows.append(_row(line.split(), family, proto))
    found = np.zeros(len(rows), HOST_SOCKET)
    for index, row in enumerate(rows):
        found[index] = row
    return found


def _row(fields: list[bytes], family: int, proto: int) -> tuple[object, ...]:
    """Return a line of /proc/net/tcp as HOST_SOCKET. Raises ValueError, IndexError."""
    saddr, sport = _endpoint(fields[1])
    daddr, dport = _endpoint(fields[2])
    state, uid, inode = _number(fields[3], 16, 8), _number(fields[7]), _number(fields[9], 10, 64)
    drops = _number(fields[12]) if proto == socket.IPPROTO_UDP and len(fields) > 12 else 0
    return 0, inode, uid, 0, sport, dport, family, proto, state, 0, saddr, daddr, drops, 0


def _number(digits: bytes, base: int = 10, bits: int = 32) -> int:
    number = int(digits, base)
    if number < 0 or number >> bits:
        raise ValueError(f"{number} has more than {bits} bits")
    return number


def _endpoint(field: bytes) -> tuple[list[int], int]:
    """Return the address (16 octets) and port of "0100007F:0016": words in the host's order."""
    words, port = field.split(b":")
    octets = b"".join(
        _number(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8)
    )
    if len(octets) not in (4, 16):
        raise ValueError(f"an address of {len(octets)} bytes")
    return list(octets.ljust(16, b"\0")), _number(port, 16, 16)


def details(
    pid: int, start_ns: int, cmdline: str = "program", proc: Path = PROC
) -> ProcessDetails | None:
    """Return what /proc says about the process (pid, start_ns); None if it has gone.

    `cmdline`: "full" with all arguments (they may hold secrets), "program" the first word only,
    "off" nothing. Raises UsageError for another word.
    """
    if cmdline not in CMDLINE_MODES:
        raise UsageError(f"cmdline '{cmdline}': it is one of {', '.join(CMDLINE_MODES)}")
    found, ppid = owner(pid, proc), parent(pid, proc)
    if found is None or not same_start(start_ns, found.identity.start_ticks):
        return None
    exe = arguments = hierarchy = ""
    path = b""
    with contextlib.suppress(OSError):
        exe = bounded(os.readlink(f"{proc}/{pid}/exe".encode()).removesuffix(b" (deleted)"))
    if cmdline != "off":
        with contextlib.suppress(OSError):
            raw = _command_lines.read(f"{proc}/{pid}/cmdline", found.uid)
            arguments = command_line(raw, cmdline)
    with contextlib.suppress(OSError):
        hierarchy, path = cgroups.path_of(_read(f"{proc}/{pid}/cgroup", _CGROUP_BYTES))
    if identity(pid, proc) != found.identity:
        return None
    place = cgroups.place_of(os.fsdecode(path), cgroups.only_root_makes(hierarchy))
    return ProcessDetails(
        tgid=pid,
        start_ns=start_ns,
        comm=bounded(found.comm),
        exe=exe,
        cmdline=arguments,
        ppid=ppid,
        uid=found.uid,
        user=user_name(found.uid),
        cgroup=bounded(path),
        unit=bounded(os.fsencode(place.unit)),
        container=bounded(os.fsencode(place.container)),
        parents=parents(ppid, start_ns, proc),
    )


_CMDLINE_BYTES = MAX_TEXT + 1  # the kernel shows no more
_PATIENCE_MS = 500
_WAIT_SHARE, _WAITS_SHARE, _WAIT_SAVED_NS = 50, 20, 1_000_000_000
"""Parts of the time: for the command lines of one user, and of all users but root."""


class _CommandLines:
    """A process can keep who reads its command line waiting for ever; see native/patient.c.

    That costs the names of programs of its user, and others little. Any thread.
    """

    def __init__(self) -> None:
        self._users = UserBudgets(_WAIT_SHARE, _WAITS_SHARE, _WAIT_SAVED_NS, time.monotonic_ns)

    def read(self, path: str, uid: int) -> bytes:
        """Return /proc/PID/cmdline of a process of `uid`. Raises OSError."""
        if uid == 0:
            return _read(path, _CMDLINE_BYTES)
        if not self._users.allows(uid):
            raise TimeoutError
        buffer = ffi.new("char[]", _CMDLINE_BYTES)
        began = time.monotonic_ns()
        read = lib.host_read_patiently(os.fsencode(path), buffer, _CMDLINE_BYTES, _PATIENCE_MS)
        if time.monotonic_ns() - began > _PATIENCE_MS * 100_000:
            self._users.charge(uid, time.monotonic_ns() - began)
        if read < 0:
            raise OSError(-read, os.strerror(-read), path)
        return bytes(ffi.buffer(buffer, read))


_command_lines = _CommandLines()
_CGROUP_BYTES = 128 << 10  # a path of 4 KiB for each hierarchy; v2 has the last line


def user_name(uid: int) -> str:
    """Return the user's name, or the number if there is none. May wait for a directory service."""
    try:
        return bounded(os.fsencode(pwd.getpwuid(uid).pw_name))
    except (KeyError, OSError, ValueError):
        return str(uid)
