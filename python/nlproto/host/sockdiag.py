# SPDX-License-Identifier: MIT
"""sock_diag: the kernel's TCP and UDP sockets of one network namespace, in bulk or one by tuple.

Sources: man 7 sock_diag, net/ipv4/inet_diag.c, net/ipv4/udp_diag.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence

import numpy as np

from nlproto._host import ffi, lib
from nlproto.errors import Error, NoPrivilege
from nlproto.records.wire import dtype_of
from nlproto.running.closing import Closing

__all__ = [
    "ALL_STATES",
    "ANY",
    "HOST_SOCKET",
    "DiagSocket",
    "SockDiag",
    "TcpState",
    "refused",
]

NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _REQUEST, _DUMP = 20, 0x1, 0x300
_HEAD = struct.Struct("=IHHIIBBBxI")  # struct nlmsghdr and inet_diag_req_v2
_SOCKET_ID = struct.Struct("=2s2s16s16sIQ")  # struct inet_diag_sockid
_REQUEST_BYTES = _HEAD.size + _SOCKET_ID.size
_NO_COOKIE = 0xFFFFFFFFFFFFFFFF
_LASTING = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EINVAL, errno.ENOENT}
_LASTING |= {errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EOPNOTSUPP}
"""The kernel lacks sock_diag, or something forbids it. All else passes, as a lack of memory."""
PATIENCE_S = 5.0
"""The longest time for an answer."""
_BUFFER = 64 << 10
ANY = bytes(16)
"""No address, of either family."""
ALL_STATES = 0xFFFFFFFF
"""Bits of TcpState, for a dump of every socket."""

HOST_SOCKET = dtype_of("host_socket", ffi)
"""One socket: cookie, inode, uid, ifindex, sport, dport, family, proto, state, saddr, daddr, drops:
packets that the kernel dropped at it (sk_drops), mostly since its receive buffer had no room."""

INFO = 1 << 1
"""INET_DIAG_INFO, as idiag_ext has it: struct tcp_info."""
_MEMORY = 1 << 6  # INET_DIAG_SKMEMINFO: of a dump alone, since udp_diag has little room elsewhere

PROTOCOLS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
FAMILIES = (socket.AF_INET, socket.AF_INET6)


class TcpState:
    """Values of HOST_SOCKET's `state` (include/net/tcp_states.h)."""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LISTEN = 10


class DiagSocket(Closing):
    """A sock_diag socket of the network namespace in which it is created, with room for a datagram.

    An answer becomes `kind` (a dtype) and has at least `least` bytes. Raises NoPrivilege when the
    kernel refuses it (seccomp, no tcp_diag or udp_diag), and Error when it has no answer now.
    """

    def __init__(self, kind: np.dtype[np.void], least: int) -> None:
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
            )
        except OSError as error:
            raise refused(error.errno or 0) from None
        self._socket.settimeout(PATIENCE_S)
        self._seq = 0
        self._buffer = bytearray(_BUFFER)
        self._view = ffi.from_buffer("uint8_t[]", self._buffer)
        self._done = ffi.new("int *")
        self._found = np.zeros(_BUFFER // least, kind)

    def close(self) -> None:
        """Close its Netlink socket."""
        self._socket.close()

    def _send(
        self,
        family: int,
        proto: int,
        dump: bool,
        local: bytes = ANY,
        lport: int = 0,
        remote: bytes = ANY,
        rport: int = 0,
        ifindex: int = 0,
        states: int = ALL_STATES,
        extensions: int = 0,
    ) -> None:
        request = self._make(
            family, proto, dump, local, lport, remote, rport, ifindex, states, extensions
        )
        try:
            self._socket.send(request)
        except OSError as error:
            raise refused(error.errno or 0) from None

    def _make(
        self,
        family: int,
        proto: int,
        dump: bool,
        local: bytes,
        lport: int,
        remote: bytes,
        rport: int,
        ifindex: int,
        states: int = ALL_STATES,
        extensions: int = 0,
    ) -> bytes:
        """Return the next request."""
        self._seq = self._seq % 0xFFFFFFFF + 1  # the kernel always reports 0
        if proto == socket.IPPROTO_UDP and not dump:
            # udp_dump_one() takes source and destination of an incoming packet.
            local, lport, remote, rport = remote, rport, local, lport
        flags = _REQUEST | (_DUMP if dump else 0)
        head = _HEAD.pack(
            _REQUEST_BYTES, _BY_FAMILY, flags, self._seq, 0, family, proto, extensions, states
        )
        ports = lport.to_bytes(2), rport.to_bytes(2)
        return head + _SOCKET_ID.pack(*ports, local, remote, ifindex, _NO_COOKIE)

    def _receive(self) -> int:
        """Return the size of the next datagram, which is in the buffer."""
        try:
            return self._socket.recv_into(self._buffer)
        except TimeoutError:
            raise _no_answer() from None


class SockDiag(DiagSocket):
    """TCP and UDP sockets. A context manager. If sock_diag is refused, /proc/net is the fallback.

    Raises NoPrivilege and Error as DiagSocket does.
    """

    def __init__(self) -> None:
        # The smallest answer takes 88 bytes of a datagram. There is room for three.
        super().__init__(HOST_SOCKET, 24)
        self._sockets = ffi.from_buffer("struct host_socket[]", self._found)

    def _ask(self, request: bytes, proto: int, most: int) -> int:
        """Send a request (empty: none). Returns how many sockets self._found has now.

        Or -errno.
        """
        read = lib.host_diag_ask(
            self._socket.fileno(), request, len(request), self._view, _BUFFER, self._seq, proto,
            self._sockets, most, self._done, int(PATIENCE_S * 1000),
        )  # fmt: skip
        if read < 0 and -read != errno.ENOENT:
            self._drain()
        if read == -errno.ETIMEDOUT:
            raise _no_answer()
        return int(read)

    def _drain(self) -> None:
        """Receive what is left of a request that failed: its answers take the next one's room."""
        while True:
            try:
                self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # which is told once
                    return

    def dump(
        self,
        protos: tuple[int, ...] = PROTOCOLS,
        families: tuple[int, ...] = FAMILIES,
        lport: int = 0,
        states: int = ALL_STATES,
    ) -> np.ndarray:
        """Return all sockets (HOST_SOCKET), or those bound to local port `lport`.

        `states`: a bit for each TcpState that is wanted. Listeners alone are found fast.
        """
        parts = []
        for proto in protos:
            for family in families:
                request = self._make(
                    family, proto, True, ANY, lport, ANY, 0, 0, states, extensions=_MEMORY
                )
                self._done[0] = 0
                while not self._done[0]:
                    read = self._ask(request, proto, len(self._found))
                    if read < 0:
                        raise refused(-read)
                    parts.append(self._found[:read].copy())
                    request = b""
        return np.concatenate(parts) if parts else np.zeros(0, HOST_SOCKET)

    def find(
        self,
        proto: int,
        family: int,
        local: bytes,
        lport: int,
        remote: bytes = ANY,
        rport: int = 0,
        ifindex: int = 0,
    ) -> np.void | None:
        """Return the socket (HOST_SOCKET) that would get a packet from remote to local, or None.

        Addresses are the 16 bytes of a record. Without `remote` it finds a TCP listener.
        """
        request = self._make(family, proto, False, local, lport, remote, rport, ifindex)
        read = self._ask(request, proto, 1)
        if read > 0:
            found: np.void = self._found[:1].copy()[0]
            return found
        if read in (0, -errno.ENOENT):
            return None
        raise refused(-read)

    def find_many(
        self, ends: Sequence[tuple[int, int, bytes, int, bytes, int]]
    ) -> list[np.void | None]:
        """Do find() for each of `ends` (proto, family, local, lport, remote, rport) in one call.

        The list is shorter if there are many, or if the kernel has no answer now.
        """
        ends = ends[: len(self._found)]
        requests = b"".join(
            self._make(family, proto, False, local, lport, remote, rport, 0)
            for proto, family, local, lport, remote, rport in ends
        )
        results = ffi.new("int[]", len(ends))
        count = lib.host_diag_find(
            self._socket.fileno(), requests, _REQUEST_BYTES, len(ends), self._view, _BUFFER,
            self._sockets, results, int(PATIENCE_S * 1000),
        )  # fmt: skip
        read = ffi.unpack(results, count) if count else []
        if read and read[-1] < 0 and -read[-1] != errno.ENOENT:
            self._drain()
            del read[-1]
        rows = self._found[: len(read)].copy()
        return [row if there > 0 else None for row, there in zip(rows, read, strict=True)]


def _no_answer() -> Error:
    return Error(f"sock_diag did not answer within {PATIENCE_S:.0f} s")


def refused(code: int) -> Error:
    """Return the exception for an errno of sock_diag: NoPrivilege if it will not pass."""
    if code in _LASTING:
        return NoPrivilege(f"sock_diag is refused here: {os.strerror(code)}")
    return Error(f"sock_diag has no answer now: {os.strerror(code)}; try again")
