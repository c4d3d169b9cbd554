# SPDX-License-Identifier: MIT
"""Generic Netlink: just enough to control sniffer.ko and to receive its groups.

Sources: shared_proto.h, Documentation/userspace-api/netlink/intro.rst, linux/genetlink.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nlproto._host import ffi as host
from nlproto._host import lib as host_lib
from nlproto.errors import Error, NoModule, NoPrivilege
from nlproto.records import wire
from nlproto.records.process_event import ProcessEvent, decode_process
from nlproto.records.wire import ffi, lib
from nlproto.running.closing import Closing

__all__ = [
    "Connection",
    "Family",
    "Listener",
    "Message",
    "Sniffer",
    "attributes",
    "encode_attribute",
    "messages",
    "resolve",
]

NETLINK_GENERIC = 16
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP, NETLINK_DROP_MEMBERSHIP = 1, 2
NETLINK_EXT_ACK = 11
SO_RCVBUFFORCE = 33

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE = 1, 2, 3
NLMSG_MIN_TYPE = 0x10
NLA_TYPE_MASK = 0x3FFF

GENL_ID_CTRL = 0x10
CTRL_CMD_DELFAMILY, CTRL_CMD_GETFAMILY = 2, 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_ATTR_VERSION = 1, 2, 3
CTRL_ATTR_MCAST_GROUPS = 7
CTRL_ATTR_MCAST_GRP_NAME, CTRL_ATTR_MCAST_GRP_ID = 1, 2

_NLMSGHDR = struct.Struct("=IHHII")  # len, type, flags, seq, port
_GENLMSGHDR = struct.Struct("=BBH")  # cmd, version, reserved
_NLATTR = struct.Struct("=HH")  # len, type
_U16, _U32, _U64 = struct.Struct("=H"), struct.Struct("=I"), struct.Struct("=Q")

RECEIVE_BYTES = 16 << 20
_MESSAGE_BYTES = 128 << 10  # a full batch is 32 KiB, a dump's datagram at most as large
_TIMEOUT = 5.0  # s, for an answer of the kernel
_DUMPS = 4  # times that a table which changes meanwhile is asked for

FAMILY = ffi.string(lib.SNIFFER_FAMILY).decode()
PACKETS = ffi.string(lib.SNIFFER_GROUP_PACKETS).decode()
PROCESSES = ffi.string(lib.SNIFFER_GROUP_PROCESSES).decode()
SNAPS = ffi.string(lib.SNIFFER_GROUP_SNAPS).decode()
FLOWS = ffi.string(lib.SNIFFER_GROUP_FLOWS).decode()

NO_MODULE = (
    "sniffer.ko is not loaded, or this is not the initial network namespace:"
    " packet-hunter doctor says how to load it; or use --engine packet"
)
NO_PRIVILEGE = "talking to sniffer.ko needs root (CAP_NET_ADMIN): run it with sudo"


@dataclass(frozen=True, slots=True)
class Message:
    """One Netlink message; `payload` is a view of the datagram it came in."""

    type: int
    flags: int
    seq: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Family:
    """A Generic Netlink family as the kernel numbered it."""

    id: int
    version: int
    groups: Mapping[str, int]


def _align(length: int) -> int:
    return (length + 3) & ~3


def encode_attribute(kind: int, payload: bytes) -> bytes:
    """Return one attribute, padded to 4 bytes."""
    head = _NLATTR.pack(_NLATTR.size + len(payload), kind)
    return head + payload + bytes(_align(len(payload)) - len(payload))


def attributes(buf: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (type without flag bits, payload) of each attribute. Raises Error when malformed."""
    at = 0
    while at < len(buf):
        if len(buf) - at < _NLATTR.size:
            raise Error("malformed Netlink attribute: its header is incomplete")
        length, kind = _NLATTR.unpack_from(buf, at)
        if length < _NLATTR.size or at + length > len(buf):
            raise Error(f"malformed Netlink attribute: length {length} of {len(buf) - at}")
        yield kind & NLA_TYPE_MASK, buf[at + _NLATTR.size : at + length]
        at += _align(length)


def messages(buf: memoryview) -> Iterator[Message]:
    """Yield each message of a datagram. Raises Error when malformed."""
    at = 0
    while at < len(buf):
        if len(buf) - at < _NLMSGHDR.size:
            raise Error("malformed Netlink message: its header is incomplete")
        length, kind, flags, seq, _ = _NLMSGHDR.unpack_from(buf, at)
        if length < _NLMSGHDR.size or at + length > len(buf):
            raise Error(f"malformed Netlink message: length {length} of {len(buf) - at}")
        yield Message(kind, flags, seq, buf[at + _NLMSGHDR.size : at + length])
        at += _align(length)


def _generic(payload: memoryview) -> tuple[int, memoryview]:
    """Return command and attributes of a Generic Netlink message's payload."""
    if len(payload) < _GENLMSGHDR.size:
        raise Error("malformed Generic Netlink message: its header is incomplete")
    return payload[0], payload[_GENLMSGHDR.size :]


def _error_code(message: Message) -> int:
    """Return the errno in NLMSG_ERROR or NLMSG_DONE, 0 for success."""
    if len(message.payload) < 4:
        return 0
    return -int.from_bytes(message.payload[:4], "little", signed=True)


def _receive(sock: socket.socket, buffer: memoryview) -> memoryview:
    """Return the next datagram, a part of `buffer`; OSError as recvmsg(2)."""
    size, _, bits, _ = sock.recvmsg_into([buffer])
    if bits & socket.MSG_TRUNC:
        raise Error(f"a message of the kernel is longer than {len(buffer)} bytes")
    return buffer[:size]


class Connection(Closing):
    """A Netlink socket for requests and their answers; a context manager."""

    def __init__(self, protocol: int = NETLINK_GENERIC) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        self._socket.bind((0, 0))
        self._seq = 0
        self._buffer = memoryview(bytearray(_MESSAGE_BYTES))
        self._room = host.from_buffer("uint8_t[]", self._buffer)

    def close(self) -> None:
        """Close its socket."""
        self._socket.close()

    def exchange(self, kind: int, flags: int, body: bytes) -> Iterator[Message]:
        """Send one message and yield its answers; each is overwritten by the next.

        Raises OSError with the kernel's errno, Error for a malformed or missing answer.
        """
        self._seq += 1
        size = _NLMSGHDR.size + len(body)
        head = _NLMSGHDR.pack(size, kind, NLM_F_REQUEST | flags, self._seq, 0)
        request = head + body
        while True:
            size = host_lib.host_exchange(
                self._socket.fileno(),
                request,
                len(request),
                self._room,
                _MESSAGE_BYTES,
                int(_TIMEOUT * 1000),
            )
            request = b""
            if size == -errno.ETIMEDOUT:
                raise Error(f"the kernel did not answer within {_TIMEOUT:.0f} s")
            if size == -errno.EMSGSIZE:
                raise Error(f"a message of the kernel is longer than {_MESSAGE_BYTES} bytes")
            if size < 0:
                raise OSError(-size, os.strerror(-size))
            for message in messages(self._buffer[:size]):
                if message.seq != self._seq:
                    continue  # left over from a request that timed out
                if message.type == NLMSG_DONE and message.flags & NLM_F_DUMP_INTR:
                    yield message
                if message.type in (NLMSG_ERROR, NLMSG_DONE):
                    code = _error_code(message)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield message

    def request(
        self,
        family: int,
        command: int,
        payload: bytes = b"",
        *,
        version: int = 1,
        dump: bool = False,
    ) -> list[tuple[int, dict[int, bytes]]]:
        """Send a Generic Netlink command and return its answers as (command, attributes).

        If a table changed during a dump, the kernel says that entries may be missing. Then the dump
        is repeated a few times, and an entry may be returned twice, the later one last. Raises what
        exchange() raises.
        """
        flags = NLM_F_DUMP if dump else NLM_F_ACK
        body = _GENLMSGHDR.pack(command, version, 0) + payload
        answers: list[tuple[int, dict[int, bytes]]] = []
        for _ in range(_DUMPS):
            interrupted = False
            for message in self.exchange(family, flags, body):
                interrupted |= bool(message.flags & NLM_F_DUMP_INTR)
                if message.type == family:
                    kind, rest = _generic(message.payload)
                    answers.append((kind, {key: bytes(data) for key, data in attributes(rest)}))
            if not interrupted:
                break
        return answers


def resolve(connection: Connection, name: str) -> Family:
    """Return the family called `name`.

    Raises FileNotFoundError when the kernel has none, Error when it does not describe it.
    """
    wanted = encode_attribute(CTRL_ATTR_FAMILY_NAME, name.encode() + b"\0")
    answers = connection.request(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, wanted)
    if not answers:
        raise Error(f"the kernel did not describe the Netlink family {name}")
    found = answers[0][1]
    groups: dict[str, int] = {}
    for _, group in attributes(memoryview(found.get(CTRL_ATTR_MCAST_GROUPS, b""))):
        values = dict(attributes(group))
        label = wire.text(bytes(values[CTRL_ATTR_MCAST_GRP_NAME]))
        groups[label] = _U32.unpack(values[CTRL_ATTR_MCAST_GRP_ID])[0]
    (family_id,) = _U16.unpack(found[CTRL_ATTR_FAMILY_ID])
    (version,) = _U32.unpack(found[CTRL_ATTR_VERSION])
    return Family(family_id, version, groups)


def _resolve_sniffer(connection: Connection) -> Family:
    try:
        return resolve(connection, FAMILY)
    except FileNotFoundError:
        raise NoModule(NO_MODULE) from None


class Sniffer(Closing):
    """Commands of sniffer.ko; a context manager.

    Every call raises NoModule if the module is not loaded, NoPrivilege without CAP_NET_ADMIN in the
    initial user namespace. Returned arrays and structs have the dtypes of wire.py.
    """

    def __init__(self) -> None:
        self._connection = Connection()
        try:
            self._family = _resolve_sniffer(self._connection)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close its socket; the module stays."""
        self._connection.close()

    def _ask(
        self, command: int, payload: bytes = b"", dump: bool = False
    ) -> list[tuple[int, dict[int, bytes]]]:
        for attempt in range(2):
            try:
                return self._connection.request(self._family.id, command, payload, dump=dump)
            except PermissionError:
                raise NoPrivilege(NO_PRIVILEGE) from None
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EOPNOTSUPP) and attempt == 0:
                    before = self._family.id
                    self._family = _resolve_sniffer(self._connection)
                    if self._family.id != before:
                        continue  # the module was loaded again, with another number
                if error.errno == errno.ENOENT:
                    raise
                raise Error(
                    f"sniffer.ko refused the command: {os.strerror(error.errno or 0)}"
                ) from error
        raise NoModule(NO_MODULE)

    def _one(self, command: int, attribute: int, payload: bytes = b"") -> bytes:
        for _, found in self._ask(command, payload):
            if attribute in found:
                return found[attribute]
        raise Error(
            "sniffer.ko answered without the attribute asked for: install all parts of one release"
        )

    def info(self) -> np.void:
        """Return INFO: versions, limits, table sizes, which probes fire."""
        return wire.decode_struct(
            self._one(lib.SNIFFER_CMD_GET_INFO, lib.SNIFFER_A_INFO), wire.INFO
        )

    def counters(self) -> np.void:
        """Return COUNTERS, summed over CPUs since load."""
        return wire.decode_struct(
            self._one(lib.SNIFFER_CMD_GET_COUNTERS, lib.SNIFFER_A_COUNTERS), wire.COUNTERS
        )

    def flush(self) -> np.ndarray:
        """Make every CPU send its messages. Return TAIL for each: how far its stream is."""
        return wire.decode_array(self._one(lib.SNIFFER_CMD_FLUSH, lib.SNIFFER_A_TAILS), wire.TAIL)

    def flush_flows(self) -> np.ndarray:
        """As flush(), but for group flows: FLOW_TAILs."""
        return wire.decode_array(
            self._one(lib.SNIFFER_CMD_FLUSH, lib.SNIFFER_A_FLOW_TAILS), wire.FLOW_TAIL
        )

    def socket(self, cookie: int) -> tuple[np.void, np.ndarray] | None:
        """Return (SOCKET, HOLDER array) from the owner table; None if the cookie is unknown."""
        payload = encode_attribute(lib.SNIFFER_A_COOKIE, _U64.pack(cookie))
        try:
            answers = self._ask(lib.SNIFFER_CMD_GET_SOCKET, payload)
        except FileNotFoundError:
            return None
        return next(map(_socket_of, answers), None)

    def sockets(self) -> list[tuple[np.void, np.ndarray]]:
        """Return the whole owner table as (SOCKET, HOLDER array)."""
        answers = map(_socket_of, self._ask(lib.SNIFFER_CMD_GET_SOCKET, dump=True))
        return list({int(answer[0]["cookie"]): answer for answer in answers}.values())

    def processes(self) -> list[ProcessEvent]:
        """Return the whole process table, each as an event SNIFFER_EVENT_DUMP."""
        answers = self._ask(lib.SNIFFER_CMD_GET_PROCESS, dump=True)
        events = (decode_process(found[lib.SNIFFER_A_PROCESS]) for _, found in answers)
        return list({(event.tgid, event.start_ns): event for event in events}.values())


def _socket_of(answer: tuple[int, dict[int, bytes]]) -> tuple[np.void, np.ndarray]:
    found = answer[1]
    return (
        wire.decode_struct(found.get(lib.SNIFFER_A_SOCKET, b""), wire.SOCKET),
        wire.decode_array(found.get(lib.SNIFFER_A_HOLDERS, b""), wire.HOLDER),
    )


class Listener(Closing):
    """Receives sniffer.ko's multicast groups; a context manager.

    Only sequences show loss: ENOBUFS is ignored. Raises NoModule, NoPrivilege at the start,
    NoModule also from recv() when the module is unloaded.
    """

    def __init__(
        self,
        groups: tuple[str, ...] = (PACKETS,),
        notify: Callable[[str], None] | None = None,
        receive_bytes: int = RECEIVE_BYTES,
    ) -> None:
        with Connection() as connection:
            self._family = _resolve_sniffer(connection)
            control = resolve(connection, "nlctrl")
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC
        )
        try:
            self._socket.setblocking(False)
            self.receive_bytes = set_receive_buffer(self._socket, receive_bytes, notify)
            self._socket.bind((0, 0))
            for group in groups:
                self.join(group)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, control.groups["notify"])
        except BaseException:
            self._socket.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._buffer = memoryview(bytearray(_MESSAGE_BYTES))

    def join(self, group: str) -> None:
        """Become a member of a group. From any thread, like leave(). Raises NoPrivilege, Error."""
        if group not in self._family.groups:
            raise Error(f"this sniffer.ko has no group '{group}': install all parts of one release")
        try:
            number = self._family.groups[group]
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, number)
        except PermissionError:
            raise NoPrivilege(NO_PRIVILEGE) from None

    def leave(self, group: str) -> None:
        """Leave a group. Does nothing if the module has gone."""
        with contextlib.suppress(OSError):
            number = self._family.groups[group]
            self._socket.setsockopt(SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, number)

    def close(self) -> None:
        """Leave the groups and close the socket."""
        self._socket.close()

    def fileno(self) -> int:
        """Return the descriptor of its socket, for poll(2)."""
        return self._socket.fileno()

    def recv(self, timeout: float) -> tuple[int, memoryview] | None:
        """Return (command, payload of its attribute) of the next message, None after `timeout` s.

        The payload is a view of the one receive buffer: the next call overwrites it.
        """
        while True:
            try:
                datagram = _receive(self._socket, self._buffer)
            except BlockingIOError:
                if not timeout or not self._poll.poll(timeout * 1000):
                    return None
                timeout = 0
                continue
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    continue
                raise
            for message in messages(datagram):
                if message.type == self._family.id:
                    command, rest = _generic(message.payload)
                    for _, payload in attributes(rest):
                        return command, payload
                elif message.type == GENL_ID_CTRL:
                    self._check_control(message)

    def _check_control(self, message: Message) -> None:
        command, rest = _generic(message.payload)
        if command == CTRL_CMD_DELFAMILY:
            found = dict(attributes(rest))
            if wire.text(bytes(found.get(CTRL_ATTR_FAMILY_NAME, b""))) == FAMILY:
                raise NoModule("sniffer.ko was unloaded: packet-hunter doctor says how to load it")


def set_receive_buffer(
    sock: socket.socket, wanted: int, notify: Callable[[str], None] | None = None
) -> int:
    """Give `sock` a receive buffer of `wanted` bytes, or as much as is allowed. Return its size."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, wanted)
    except PermissionError:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)
    got = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2  # the kernel doubles it
    if got < wanted and notify is not None:
        notify(
            f"receive buffer is {got} bytes instead of {wanted}, bursts may be lost:"
            f" sudo sysctl net.core.rmem_max={wanted}"
        )
    return got
