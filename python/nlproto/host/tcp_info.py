# SPDX-License-Identifier: MIT
"""The kernel's figures about TCP connections: round trip time and retransmits.

sock_diag reports open connections on request (INET_DIAG_INFO). Of a closed one the kernel reports
the last state once, when it frees the socket (group SKNLGRP_INET_TCP_DESTROY). Sources:
net/ipv4/inet_diag.c, net/core/sock_diag.c, struct tcp_info in linux/tcp.h.
"""

from __future__ import annotations

import contextlib
import errno
import socket

import numpy as np

from nlproto._host import ffi, lib
from nlproto.errors import NoPrivilege
from nlproto.host.sockdiag import INFO, PATIENCE_S, DiagSocket, TcpState, refused
from nlproto.records.wire import dtype_of

__all__ = ["HOST_TCP", "TcpInfo"]

HOST_TCP = dtype_of("host_tcp", ffi)
"""One connection: cookie, netns, rtt_us, retransmits."""

_DESTROYED = {socket.AF_INET: 1, socket.AF_INET6: 3}  # SKNLGRP_INET_TCP_DESTROY, ..._INET6_...
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_ROOM = 4 << 20
"""Room in bytes for closed connections that wait to be read, some 5,000. Others are lost."""
_LEAST = 300
"""The fewest bytes of an answer with tcp_info."""
_OPEN = 0xFFF & ~(
    1 << TcpState.LISTEN | 1 << TcpState.TIME_WAIT | 1 << TcpState.CLOSE | 1 << TcpState.SYN_RECV
)


class TcpInfo(DiagSocket):
    """Figures of the network namespace in which it is created. A context manager, for one thread.

    `ends`: closed() is asked too, which needs CAP_NET_ADMIN. Raises NoPrivilege when the kernel
    refuses sock_diag or the group.
    """

    def __init__(self, ends: bool = True) -> None:
        super().__init__(HOST_TCP, _LEAST)
        try:
            self._socket.bind((0, 0))
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, 33, _ROOM)  # SO_RCVBUFFORCE
            for group in _DESTROYED.values() if ends else ():
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError as error:
            self._socket.close()
            raise NoPrivilege(f"ends of connections are not reported: {error.strerror}") from None
        self._places = ffi.from_buffer("struct host_tcp[]", self._found)
        self._closed: list[np.ndarray] = []
        self.lost = 0
        """How often the kernel had no room for a closed connection."""

    def fileno(self) -> int:
        """Return the descriptor. It is readable when a connection was closed."""
        return self._socket.fileno()

    def closed(self) -> np.ndarray:
        """Return the connections that ended since the last call (HOST_TCP)."""
        self._socket.settimeout(0)
        while True:
            try:
                self._take(self._socket.recv_into(self._buffer))
            except BlockingIOError:
                break
            except OSError as error:
                self._overrun(error)
        self._socket.settimeout(PATIENCE_S)
        found, self._closed = self._closed, []
        return np.concatenate([np.zeros(0, HOST_TCP), *found])

    def open(self) -> np.ndarray:
        """Return the figures of connections that are open now (HOST_TCP). Raises Error."""
        parts = [np.zeros(0, HOST_TCP)]
        for family in _DESTROYED:
            self._send(family, socket.IPPROTO_TCP, True, states=_OPEN, extensions=INFO)
            done = False
            while not done:
                try:
                    size = self._receive()
                except OSError as error:
                    self._overrun(error)
                    continue
                self._take(size)
                read = self._read(size, self._seq)
                done = bool(self._done[0])
                if read < 0 and -read != errno.ENOENT:
                    raise refused(-read)
                parts.append(self._found[: max(0, read)].copy())
        return np.concatenate(parts)

    def _overrun(self, error: OSError) -> None:
        if error.errno != errno.ENOBUFS:
            raise NoPrivilege(f"sock_diag broke: {error.strerror}") from None
        self.lost += 1

    def _take(self, size: int) -> None:
        """Keep the closed connections of a datagram."""
        read = self._read(size, 0)
        if read > 0:
            self._closed.append(self._found[:read].copy())

    def _read(self, size: int, seq: int) -> int:
        return int(
            lib.host_tcp_read(self._view, size, seq, self._places, len(self._found), self._done)
        )
