# SPDX-License-Identifier: MIT
"""SHA-256 of the programs that processes run. A thread of its own reads each file once.

When a process is first seen, a descriptor of its file is taken, so that the process may end. This
descriptor (O_PATH) does not open the file. The thread opens it if it is a regular file of a local
file system: no FUSE, no network, no user's overlay. Who opens a file whose server answers no more
cannot even be killed.

Sources: man 5 proc (exe, fdinfo, mountinfo), man 2 open (O_PATH).
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Self

from nlproto.host.netns import NS_GET_USERNS
from nlproto.running.left_behind import LeftBehind

__all__ = ["Hashes"]

_WAITING = 256
"""The most files that wait, each with a descriptor. A process beyond this has no hash."""
_KEPT = 8192
_MAX_FILE = 1 << 30
"""The most bytes of a file; a longer one has no hash."""
_PIECE = 1 << 20
_SHARE = 20
"""Reading takes at most this part of one CPU's time."""
_SAVED_S = 2.0
"""The part that may be saved up, for many programs that start together."""
_FOREIGN = ("fuse", "nfs", "cifs", "smb", "9p", "ceph", "afs", "virtiofs", "autofs")

Told = Callable[[int, int, str, str], None]
"""(tgid, start_ns, exe, hash in hexadecimal) of a process."""


class _Wanted(NamedTuple):
    file: int
    tgid: int
    start_ns: int
    exe: str


class Hashes:
    """A context manager. Its thread calls `told` with the arguments of ask()."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._worker = LeftBehind("hashes of programs", self._work, _WAITING)
        self._known: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._left_s, self._at_s = _SAVED_S, time.monotonic()
        self.left_out = 0
        """How many processes have no hash because too many waited."""

    def __enter__(self) -> Self:
        self._worker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__()

    def ask(self, tgid: int, start_ns: int, exe: str) -> None:
        """Ask for the hash of the program that a process runs now. Never waits."""
        try:
            file = os.open(f"/proc/{tgid}/exe", os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        if not self._worker.add(_Wanted(file, tgid, start_ns, exe)):
            os.close(file)
            self.left_out += 1

    def _work(self, wanted: _Wanted) -> None:
        try:
            if found := self._hash(wanted):
                self._told(wanted.tgid, wanted.start_ns, wanted.exe, found)
        finally:
            os.close(wanted.file)

    def _hash(self, wanted: _Wanted) -> str:
        if not _answers_by_itself(wanted):
            return ""
        path = f"/proc/self/fd/{wanted.file}"
        with open(path, "rb", buffering=0, opener=_opener) as file:
            status = os.fstat(file.fileno())
            key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE:
                return ""
            found = self._known.get(key)
            if found is None:
                import hashlib  # loads OpenSSL, 3.5 MB: only if somebody asks for hashes

                digest = hashlib.sha256()
                size = 0
                while (piece := self._piece(file.read)) and size <= _MAX_FILE:
                    digest.update(piece)
                    size += len(piece)
                after = os.fstat(file.fileno())
                if (after.st_mtime_ns, after.st_ctime_ns, size) != (*key[2:], status.st_size):
                    return ""  # the file was changed meanwhile
                found = digest.hexdigest()
            self._known[key] = found
            self._known.move_to_end(key)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return found

    def _piece(self, read: Callable[[int], bytes]) -> bytes:
        now = time.monotonic()
        self._left_s = min(_SAVED_S, self._left_s + (now - self._at_s) / _SHARE)
        self._at_s = now
        if self._left_s < 0:
            time.sleep(-self._left_s * _SHARE)
        began = time.thread_time()
        piece = read(_PIECE)
        # hashing takes at least as long as reading
        self._left_s -= 2 * (time.thread_time() - began) + len(piece) * 3e-9
        return piece


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def _answers_by_itself(wanted: _Wanted) -> bool:
    """Return whether the file is on a known mount that no program and no network serves."""
    with open(f"/proc/self/fdinfo/{wanted.file}", "rb") as told:
        words = dict(line.split(b":", 1) for line in told.read().splitlines() if b":" in line)
    mount = words.get(b"mnt_id", b"").strip()
    for who in ("self", str(wanted.tgid)):
        try:
            process = os.open(f"/proc/{who}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            kind = _kind_of(mount, process)
            if kind is not None:
                users = kind == "overlay" and _has_users_mounts(process)
                return not users and not kind.startswith(_FOREIGN)
        except OSError:
            continue
        finally:
            os.close(process)
    return False


def _kind_of(mount: bytes, process: int) -> str | None:
    """Return the file system of a mount of `process`, an open /proc/PID; None: it has no such."""
    with open("mountinfo", "rb", opener=lambda *one: os.open(*one, dir_fd=process)) as file:
        for line in file:
            if line.split(b" ", 1)[0] == mount:
                return os.fsdecode(line.partition(b" - ")[2].split(b" ", 1)[0])
    return None


def _has_users_mounts(process: int) -> bool:
    """Return whether the mounts are of a user namespace other than ours.

    There a user can mount an overlay over a file system that his own program serves.
    """
    mounts = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    try:
        owner = fcntl.ioctl(mounts, NS_GET_USERNS)
    finally:
        os.close(mounts)
    try:
        return os.fstat(owner).st_ino != os.stat("/proc/self/ns/user").st_ino
    finally:
        os.close(owner)
