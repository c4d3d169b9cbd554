# SPDX-License-Identifier: MIT
"""Translations by NAT in one network namespace: conntrack's events, and its older entries.

The first packet fixes a connection's translation, which never changes. So events of beginning and
end are enough. The kernel leaves out connections that are not translated. Sources: uapi
linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from nlproto.errors import Error, NoPrivilege
from nlproto.kernel.netlink import (
    NLM_F_DUMP,
    SOL_NETLINK,
    Connection,
    Message,
    attributes,
    encode_attribute,
    messages,
    set_receive_buffer,
)
from nlproto.kernel.sockfilter import AD, assemble, attach
from nlproto.running.closing import Closing

__all__ = ["Conntrack", "ConntrackLookup", "End", "ConntrackEvent", "is_there"]

NETLINK_NETFILTER = 12
_NEW_GROUP, _DESTROY_GROUP = 1, 3
_ADD_MEMBERSHIP = 1
_SUBSYSTEM = 1 << 8
_CT_NEW, _CT_GET, _CT_DELETE = _SUBSYSTEM, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_CT_STATS, _STATS_ENTRIES = _SUBSYSTEM | 5, 1
_NFGEN = struct.Struct("=BBH")
_HEAD = 20  # struct nlmsghdr and nfgenmsg
_ORIG, _REPLY, _STATUS, _PROTOINFO, _ID, _ZONE, _STATUS_MASK = 1, 2, 3, 4, 12, 18, 26
_PROTOINFO_TCP, _TCP_STATE = 1, 1
_CLOSING = range(4, 9)  # enum tcp_conntrack: FIN_WAIT to CLOSE
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_ADDRESSES = {socket.AF_INET: (1, 2), socket.AF_INET6: (3, 4)}
_NUMBER, _SPORT, _DPORT = 1, 2, 3
_SRC_NAT, _DST_NAT = 1 << 4, 1 << 5
_U32 = struct.Struct(">I")
_PROTOS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
_MESSAGE = 1 << 13
_NESTED = 1 << 15  # NLA_F_NESTED
_LOOK_NS = 1_000_000_000
_MULTI = 2  # NLM_F_MULTI: of a dump

_LD, _LDX, _LD_X, _TAX = 0x00, 0x01, 0x40, 0x07
_LD_ABS, _JEQ, _JSET = 0x20, 0x15, 0x45
_AD_NLATTR = 12

End = tuple[bytes, int]
"""16 bytes of address, and a port."""
TupleEnds = tuple[bytes, bytes]
"""Source and destination: each end has 16 bytes of address and 2 of port, big-endian."""


def is_there() -> bool:
    """Return whether this kernel translates addresses now. Asking loads no module.

    Where conntrack is a module, NAT is one too, and must be loaded as well.
    """
    conntrack = "/sys/module/nf_conntrack"
    built_in = not os.path.exists(f"{conntrack}/initstate")
    return os.path.exists(conntrack) and (built_in or os.path.exists("/sys/module/nf_nat"))


@dataclass(frozen=True, slots=True)
class ConntrackEvent:
    """A translated connection. `reply` has the ends of its answers as they come.

    `ended`: it has ended. `number` tells it from others of its namespace. `closing`, if asked for:
    it is a TCP connection that has sent a FIN or RST.
    """

    ended: bool
    number: int
    family: int
    proto: int
    zone: int
    original: TupleEnds
    reply: TupleEnds
    closing: bool = field(default=False, compare=False)


def _translated_only() -> list[tuple[int, int, int, int]]:
    """Takes messages whose CTA_STATUS says that an address or port was translated."""
    return assemble(
        [
            (_LDX, 0, 0, _STATUS),
            (_LD, 0, 0, _HEAD),
            (_LD_ABS, 0, 0, AD + _AD_NLATTR),
            (_JEQ, "drop", 0, 0),
            (_TAX, 0, 0, 0),
            (_LD_X, 0, 0, 4),
            (_JSET, "take", "drop", _SRC_NAT | _DST_NAT),
        ],
        _MESSAGE,
    )


class Conntrack:
    """Events of the network namespace in which it is created.

    Raises NoPrivilege without CAP_NET_ADMIN, Error if the kernel cannot report events.
    """

    def __init__(self, receive_bytes: int) -> None:
        self._asking: Connection | None = None
        self._buffer = memoryview(bytearray(_MESSAGE))
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            NETLINK_NETFILTER,
        )
        try:
            attach(self._socket, _translated_only())
            set_receive_buffer(self._socket, receive_bytes)
            self._socket.bind((0, 0))
            for group in (_NEW_GROUP, _DESTROY_GROUP):
                self._socket.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, group)
            self._asking = Connection(NETLINK_NETFILTER)
        except PermissionError:
            self.close()
            raise NoPrivilege("only root can read translations by NAT (CAP_NET_ADMIN)") from None
        except OSError as error:
            self.close()
            raise Error(f"translations by NAT cannot be read: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def read_known(self, limit: int) -> tuple[list[ConntrackEvent], bool]:
        """Return the present entries, at most `limit`, and whether there are more. Raises Error."""
        try:
            return self._read_known(limit)
        except OSError as error:
            raise Error(f"translations by NAT cannot be read: {error.strerror}") from None

    def _read_known(self, limit: int) -> tuple[list[ConntrackEvent], bool]:
        """Kernels from 5.15 on select by a bit, so this asks bit by bit. Older ones report all."""
        assert self._asking is not None
        found: dict[tuple[int, int, int, TupleEnds], ConntrackEvent] = {}
        cut = False
        for bit in (_SRC_NAT, _DST_NAT):
            wanted = encode_attribute(_STATUS, _U32.pack(bit))
            wanted += encode_attribute(_STATUS_MASK, _U32.pack(bit))
            body = _NFGEN.pack(socket.AF_UNSPEC, 0, 0) + wanted
            selected = True
            for message in self._asking.exchange(_CT_GET, NLM_F_DUMP, body):
                status = _status_of(message)
                selected &= bool(status & bit)
                if not status & (_SRC_NAT | _DST_NAT):
                    continue
                if len(found) >= limit:
                    cut = True
                    continue  # the socket is used again: leave nothing in it
                event = _event_of(message)
                if event is not None:
                    found[event.number, event.zone, event.proto, event.original] = event
            if cut or not selected:
                break
        return list(found.values()), cut

    def fileno(self) -> int:
        """Return its descriptor, for poll(2)."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop receiving events."""
        self._socket.close()
        if self._asking is not None:
            self._asking.close()

    def read(self, most: int) -> Iterator[ConntrackEvent | None]:
        """Yield up to `most` waiting events, and None where events were lost for lack of room."""
        for _ in range(most):
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise Error(f"translations by NAT: {error.strerror}") from None
                yield None
                continue
            for message in messages(self._buffer[:size]):
                event = _event_of(message)
                if event is not None:
                    yield event


class ConntrackLookup(Closing):
    """Asks for one connection at a time of the network namespace it is made in.

    What cannot be asked is not known. `again`: made before this kernel translated addresses, it
    looks every second whether it does now. It looks in the namespace of the thread that asks.
    """

    def __init__(self, now_ns: Callable[[], int], again: bool) -> None:
        self._now_ns = now_ns
        self._again = again
        self._looked_ns = 0
        self._asking: Connection | None = None
        self._empty: bool | None = None
        """Whether the kernel follows no connection; None: not asked since begin()."""
        self._open()

    def close(self) -> None:
        """Close its Netlink socket."""
        if self._asking is not None:
            self._asking.close()

    def begin(self) -> None:
        """Packets have come since the last one was asked for."""
        self._empty = None

    def _is_empty(self, asking: Connection) -> bool:
        if self._empty is None:
            try:
                found = next(asking.exchange(_CT_STATS, 0, _NFGEN.pack(0, 0, 0)))
                entries = dict(attributes(found.payload[_NFGEN.size :]))[_STATS_ENTRIES]
                self._empty = not any(entries)
            except (OSError, Error, StopIteration, KeyError):
                self._empty = False
        return self._empty

    def _open(self) -> None:
        self._looked_ns = self._now_ns()
        if is_there():
            with suppress(OSError):
                self._asking = Connection(NETLINK_NETFILTER)

    def ends(self, proto: int, family: int, near: End, far: End) -> tuple[End, End] | None:
        """Return the ends that the socket of a packet between these has, where NAT changes them.

        None: it changes nothing, or nobody can tell.
        """
        if self._asking is None and self._again and self._now_ns() - self._looked_ns > _LOOK_NS:
            self._open()
        if self._asking is None or family not in _ADDRESSES or self._is_empty(self._asking):
            return None
        # the kernel finds a connection by either of its tuples
        one, other = _ADDRESSES[socket.AddressFamily(family)]
        size = 4 if family == socket.AF_INET else 16
        ip = encode_attribute(one, far[0][:size]) + encode_attribute(other, near[0][:size])
        ports = encode_attribute(_NUMBER, bytes([proto]))
        ports += encode_attribute(_SPORT, far[1].to_bytes(2))
        ports += encode_attribute(_DPORT, near[1].to_bytes(2))
        parts = encode_attribute(_TUPLE_IP | _NESTED, ip)
        parts += encode_attribute(_TUPLE_PROTO | _NESTED, ports)
        body = _NFGEN.pack(family, 0, 0) + encode_attribute(_ORIG | _NESTED, parts)
        try:
            found = next(self._asking.exchange(_CT_GET, 0, body), None)
        except (OSError, Error):  # there is none
            return None
        event = None if found is None else _event_of(found)
        if event is None:
            return None
        asked = far[0] + far[1].to_bytes(2), near[0] + near[1].to_bytes(2)
        if event.original == asked:
            near_end, far_end = event.reply
        elif event.reply == asked:
            near_end, far_end = event.original
        else:
            return None
        if (far_end, near_end) == asked:
            return None
        return _as_end(near_end), _as_end(far_end)


def _as_end(end: bytes) -> End:
    return end[:16], int.from_bytes(end[16:])


def _status_of(message: Message) -> int:
    for kind, payload in attributes(message.payload[_NFGEN.size :]):
        if kind == _STATUS:
            return int(_U32.unpack(payload)[0])
    return 0


def _event_of(message: Message) -> ConntrackEvent | None:
    """Return None for entries without ports, or of no connection."""
    if message.type not in (_CT_NEW, _CT_DELETE):
        return None
    family = message.payload[0]
    found = dict(attributes(message.payload[_NFGEN.size :]))
    if family not in _ADDRESSES or not {_ORIG, _REPLY} <= found.keys():
        return None
    original, reply = _tuple_of(family, found[_ORIG]), _tuple_of(family, found[_REPLY])
    if original is None or reply is None:
        return None
    return ConntrackEvent(
        message.type == _CT_DELETE,
        int.from_bytes(found.get(_ID, b"")),
        family,
        original[0],
        int.from_bytes(found.get(_ZONE, b"")),
        original[1],
        reply[1],
        bool(message.flags & _MULTI) and _is_closing(found.get(_PROTOINFO)),
    )


def _is_closing(payload: memoryview | None) -> bool:
    tcp = {} if payload is None else dict(attributes(payload))
    state = dict(attributes(tcp[_PROTOINFO_TCP])) if _PROTOINFO_TCP in tcp else {}
    return int.from_bytes(state.get(_TCP_STATE, b"")) in _CLOSING


def _tuple_of(family: int, payload: memoryview) -> tuple[int, TupleEnds] | None:
    parts = dict(attributes(payload))
    if not {_TUPLE_IP, _TUPLE_PROTO} <= parts.keys():
        return None
    ip, proto = dict(attributes(parts[_TUPLE_IP])), dict(attributes(parts[_TUPLE_PROTO]))
    number = int.from_bytes(proto.get(_NUMBER, b""))
    source, target = _ADDRESSES[socket.AddressFamily(family)]
    if number not in _PROTOS or not {_SPORT, _DPORT} <= proto.keys():
        return None
    if source not in ip or target not in ip:
        return None
    one = bytes(ip[source]).ljust(16, b"\0") + proto[_SPORT]
    other = bytes(ip[target]).ljust(16, b"\0") + proto[_DPORT]
    return number, (one, other)
