# SPDX-License-Identifier: MIT
"""A DNS server for tests, over UDP and TCP, and the client that asks it as a resolver does."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Self

__all__ = ["NameServer", "answer", "ask", "encoded", "question"]

A, CNAME, AAAA = 1, 5, 28

Record = tuple[str, int, int, str]
"""owner, type, TTL, address or name."""


def encoded(name: str) -> bytes:
    """`name` as labels, without compression."""
    labels = [label.encode() for label in name.split(".") if label]
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def question(name: str, kind: int = A, number: int = 7) -> bytes:
    return (
        struct.pack(">6H", number, 0x0100, 1, 0, 0, 0) + encoded(name) + struct.pack(">HH", kind, 1)
    )


def answer(asked: bytes, records: Sequence[Record]) -> bytes:
    """The answer to the question `asked`; owners that are the name asked for are compressed."""
    body = b""
    for owner, kind, ttl, value in records:
        if kind == CNAME:
            data = encoded(value)
        else:
            data = socket.inet_pton(socket.AF_INET if kind == A else socket.AF_INET6, value)
        name = b"\xc0\x0c" if encoded(owner) == asked[12:-4].lower() else encoded(owner)
        body += name + struct.pack(">HHIH", kind, 1, ttl, len(data)) + data
    head = asked[:2] + struct.pack(">5H", 0x8180, 1, len(records), 0, 0)
    return head + asked[12:] + body


class NameServer:
    """Serves `zone` (name -> records) at `address`; a context manager.

    `false`: what somebody else would send after the answer, who does not know the question's ID.
    """

    def __init__(
        self,
        zone: Mapping[str, Sequence[Record]],
        address: str = "127.0.0.1",
        port: int = 53,
        false: Mapping[str, Sequence[Record]] | None = None,
    ) -> None:
        self.zone = zone
        self.false = false or {}
        self.address = address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._udp = socket.socket(family, socket.SOCK_DGRAM)
        self._tcp = socket.socket(family, socket.SOCK_STREAM)
        for one in (self._udp, self._tcp):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind((address, port))
        self._tcp.listen()

    def __enter__(self) -> Self:
        for work in (self._serve_udp, self._serve_tcp):
            threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._tcp.shutdown(socket.SHUT_RDWR)
        self._tcp.close()
        self._udp.close()

    def _answer(self, asked: bytes, zone: Mapping[str, Sequence[Record]]) -> bytes:
        name, at = [], 12
        while asked[at]:
            name.append(asked[at + 1 : at + 1 + asked[at]].decode())
            at += 1 + asked[at]
        kind = int.from_bytes(asked[at + 1 : at + 3])
        records = zone.get(".".join(name).lower(), ())
        return answer(asked, [one for one in records if one[1] in (kind, CNAME)])

    def _serve_udp(self) -> None:
        try:
            while True:
                asked, peer = self._udp.recvfrom(4096)
                with suppress(IndexError):  # anything else gets no answer
                    self._udp.sendto(self._answer(asked, self.zone), peer)
                    number = (int.from_bytes(asked[:2]) + 1).to_bytes(2)
                    self._udp.sendto(self._answer(number + asked[2:], self.false), peer)
        except OSError:
            pass

    def _serve_tcp(self) -> None:
        try:
            while True:
                peer, _ = self._tcp.accept()
                with peer:
                    asked = peer.recv(4096)[2:]
                    reply = self._answer(asked, self.zone)
                    whole = struct.pack(">H", len(reply)) + reply
                    for part in (whole[:1], whole[1:20], whole[20:]):  # as slow networks do
                        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        peer.sendall(part)
        except OSError:
            pass


def ask(name: str, kind: int = A, server: str = "127.0.0.1", tcp: bool = False) -> bytes:
    """The answer of `server`, over a socket of its own."""
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as asking:
        asking.settimeout(10)
        asking.connect((server, 53))
        asked = question(name, kind)
        if not tcp:
            asking.send(asked)
            return asking.recv(4096)
        asking.sendall(struct.pack(">H", len(asked)) + asked)
        data = b""
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2]):
            part = asking.recv(4096)
            assert part
            data += part
        return data[2:]
