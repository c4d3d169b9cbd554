# SPDX-License-Identifier: MIT
"""The peer of a UNIX socket, and what it may see."""

from __future__ import annotations

import errno
import grp
import socket
import struct
from dataclasses import dataclass

__all__ = ["Peer", "group_id", "peer_of"]

_SO_PEERGROUPS = 59  # asm-generic/socket.h; not in Python's socket module
_UCRED = struct.Struct("iII")  # struct ucred, unix(7)
_MAX_GROUPS = 65536  # NGROUPS_MAX


@dataclass(frozen=True, slots=True)
class Peer:
    """Credentials of a client at the time it connected, in the daemon's user namespace."""

    pid: int
    uid: int
    groups: frozenset[int]

    def sees_everything(self, gid: int | None) -> bool:
        """Return whether it is root or a member of group `gid`."""
        return self.uid == 0 or (gid is not None and gid in self.groups)


def peer_of(connection: socket.socket) -> Peer:
    """Return the peer's credentials (SO_PEERCRED) with all its groups (SO_PEERGROUPS, Linux 4.13).

    SO_PEERCRED alone has only the primary group.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    return Peer(pid, uid, frozenset((gid, *_supplementary(connection))))


def _supplementary(connection: socket.socket) -> tuple[int, ...]:
    size = 256
    while size <= _MAX_GROUPS * 4:
        try:
            raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, size)
        except OSError as error:
            if error.errno == errno.ERANGE:
                size *= 4
                continue
            return ()
        return struct.unpack(f"{len(raw) // 4}I", raw)
    return ()


def group_id(name: str) -> int | None:
    """Return the gid of a group; None if there is no such group."""
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        return None
