# SPDX-License-Identifier: MIT
"""The name in a TLS ClientHello (SNI). Source: RFC 8446, 4.1.2 and 5.1; RFC 6066, 3.

QUIC is not read: its first packet is encrypted, though everybody can derive the key.
"""

from __future__ import annotations

import struct

from nlproto.overheard.dns import valid_name

__all__ = ["MAX_HELLO", "server_name"]

MAX_HELLO = 16 << 10
"""How many bytes of a stream's beginning are read."""
_HANDSHAKE, _CLIENT_HELLO, _SERVER_NAME, _HOST_NAME = 22, 1, 0, 0


def server_name(stream: bytes) -> str | None:
    """Return the name in the ClientHello at the beginning of `stream`; "" if it has none.

    None: more of the stream is needed. Other data, or a ClientHello against the rules, has no name.
    """
    message = bytearray()
    at = 0
    while len(stream) >= at + 5:
        kind, major, length = stream[at], stream[at + 1], int.from_bytes(stream[at + 3 : at + 5])
        if kind != _HANDSHAKE or major != 3 or not length:
            return ""
        part = stream[at + 5 : at + 5 + length]
        message += part
        if message[0] != _CLIENT_HELLO if message else False:
            return ""
        if len(message) >= 4:
            size = int.from_bytes(message[1:4])
            if size > MAX_HELLO:
                return ""
            # a tap cuts long packets; the name is mostly before the cut
            whole = len(message) >= 4 + size
            name = _name_in(bytes(message[4 : 4 + size]))
            if name is not None or whole:
                return name or ""
        if len(part) < length:
            break
        at += 5 + length
    if at == 0 and stream and stream[0] != _HANDSHAKE:
        return ""
    return None if len(stream) < MAX_HELLO else ""


def _name_in(hello: bytes) -> str | None:
    """None: the part that is there has no name."""
    try:
        at = 2 + 32  # version, random
        at += 1 + hello[at]  # session
        at += 2 + int.from_bytes(_taken(hello, at, 2))  # ciphers
        at += 1 + hello[at]  # compression
        end = at + 2 + int.from_bytes(_taken(hello, at, 2))
        at += 2
        while at + 4 <= min(end, len(hello)):
            kind, size = struct.unpack_from(">HH", hello, at)
            if kind == _SERVER_NAME:
                return _host(_taken(hello, at + 4, size))
            at += 4 + size
    except IndexError:
        pass
    return None


def _host(names: bytes) -> str:
    """Return the first name of the extension. A second one of its kind is not allowed."""
    if len(names) < 5 or names[2] != _HOST_NAME:
        return ""
    try:
        name = _taken(names, 5, int.from_bytes(names[3:5])).decode("ascii").lower()
    except UnicodeDecodeError:
        return ""
    # an address is no name
    is_name = valid_name(name) and not name.rpartition(".")[2].isdigit()
    return name if is_name else ""


def _taken(data: bytes, at: int, size: int) -> bytes:
    part = data[at : at + size]
    if len(part) < size:
        raise IndexError
    return part
