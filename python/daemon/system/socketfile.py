# SPDX-License-Identifier: MIT
"""The file of the daemon's UNIX socket: one daemon for each path."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import stat

from daemon.system.directory import HeldDirectory
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.errors import Error, NoPrivilege
from nlproto.running.surroundings import missing

__all__ = ["SocketFile"]

_BACKLOG = 4096  # what the kernel allows, by default

log = logging.getLogger(__name__)


class SocketFile:
    """A bound, listening UNIX socket at `path`. A lock on `path`.lock makes it ours alone.

    Raises Error if a live daemon has it or if something else than a socket is there. Raises
    NoPrivilege if the directory may not be written. On exit the socket's file is removed. The
    lock's file stays: without it two daemons could each hold a lock.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = -1
        self._place: HeldDirectory | None = None
        self._mine: os.stat_result | None = None
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    def __enter__(self) -> SocketFile:
        try:
            self._place = HeldDirectory(self.path, os.path.dirname(DEFAULT_SOCKET), 0o755)
            self._take_lock(self._place)
            self._remove_stale(self._place)
            self._mine = self._place.bind(self.socket, 0o666)  # credentials decide about access
            self.socket.listen(_BACKLOG)
        except OSError as error:
            self._release()
            if lacking := missing(error):
                raise lacking from None
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise NoPrivilege(
                    f"{self.path}: {error.strerror}; run as root or choose another --socket"
                ) from None
            raise Error(
                f"{self.path}: {error.strerror or error}; choose another --socket"
            ) from None
        except BaseException:
            self._release()
            raise
        return self

    def _take_lock(self, place: HeldDirectory) -> None:
        self._lock = place.open_file(0o600, ".lock")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            by = f" (pid {holder})" if holder.isdigit() else ""
            raise Error(
                f"a daemon{by} already serves {self.path}; stop it first or choose another --socket"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _remove_stale(self, place: HeldDirectory) -> None:
        found = place.stat()
        if found is None:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise Error(
                f"{self.path} exists and is no socket; remove it or choose another --socket"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(place.path)
            except (ConnectionRefusedError, FileNotFoundError):
                pass
            else:
                raise Error(f"another program listens on {self.path}; choose another --socket")
        log.info("taking over the stale socket %s", self.path)
        place.unlink()

    def __exit__(self, *_: object) -> None:
        if self._place is not None:
            self._place.unlink(self._mine)
        self._release()

    def _release(self) -> None:
        self.socket.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._place is not None:
            self._place.close()
