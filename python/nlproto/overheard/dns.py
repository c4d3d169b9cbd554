# SPDX-License-Identifier: MIT
"""Questions to DNS servers, and answers: the addresses of a name. The bytes come from strangers.

Only records that give addresses are read: A, AAAA and CNAME in class IN. Each name is read once and
is bounded. A pointer may only lead backwards, so no message makes a loop. Source: RFC 1035, 4.1.
"""

from __future__ import annotations

import re
import socket
import struct
from dataclasses import dataclass

__all__ = [
    "MAX_NAME",
    "DnsAnswer",
    "DnsQuestion",
    "MalformedDns",
    "parse",
    "question",
    "valid_name",
]

MAX_NAME = 253
"""The most characters of a domain name (RFC 1035, without the last dot)."""
_MAX_RECORDS = 256  # the most that are read in one message
_MAX_ADDRESSES = 64  # the most that are kept of one message
_MAX_POINTERS = 16  # the most in one name
_MAX_TTL = 7 * 86400  # s; a longer time to live is cut to this
_HEAD = struct.Struct(">6H")
_QUESTION = struct.Struct(">HH")
_RECORD = struct.Struct(">HHIH")
_A, _CNAME, _AAAA, _ANY, _IN = 1, 5, 28, 255, 1
_RESPONSE, _OPCODE, _RCODE = 0x8000, 0x7800, 0x000F
_SIZES = {_A: (socket.AF_INET, 4), _AAAA: (socket.AF_INET6, 16)}
_LABEL = re.compile(rb"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}"
                   r"[a-z0-9_])?)*")  # fmt: skip


class MalformedDns(ValueError):
    """The bytes are no answer with addresses."""


@dataclass(frozen=True, slots=True)
class DnsQuestion:
    """The one question in a message; an answer repeats it. `kind` is the type of record."""

    number: int
    """The transaction ID."""
    name: bytes
    kind: int


@dataclass(frozen=True, slots=True)
class DnsAnswer:
    """`name` is the name asked for, in lower case; `addresses` are (family, 16 bytes, TTL in s).

    An address behind CNAMEs has the smallest TTL on the way to it.
    """

    name: str
    addresses: tuple[tuple[int, bytes, int], ...]


def valid_name(name: str) -> bool:
    """Return whether `name` can be a host's: lower case, digits, hyphens, underscores, dots."""
    return len(name) <= MAX_NAME and _NAME.fullmatch(name) is not None


def question(message: bytes, answer: bool = False) -> DnsQuestion:
    """Return the question in a message; `answer`: it must be an answer. Raises MalformedDns."""
    return _question(message, answer)[0]


def _question(message: bytes, answer: bool) -> tuple[DnsQuestion, int]:
    """Return also where it ends."""
    if len(message) < _HEAD.size:
        raise MalformedDns("too short")
    number, flags, questions, _, _, _ = _HEAD.unpack_from(message)
    if bool(flags & _RESPONSE) != answer or flags & _OPCODE or questions != 1:
        raise MalformedDns("not one question, or no answer to one")
    try:
        asked, at = _name(message, _HEAD.size)
        kind, its_class = _QUESTION.unpack_from(message, at)
    except (IndexError, struct.error):
        raise MalformedDns("ends within the question") from None
    if kind not in (_A, _AAAA, _ANY) or its_class != _IN or not asked:
        raise MalformedDns("no question for an address")
    return DnsQuestion(number, asked, kind), at + _QUESTION.size


def parse(message: bytes) -> DnsAnswer:
    """Return what an answer says about the one name that was asked for.

    A message that ends early (a fragment, a cut capture) gives what it has. Raises MalformedDns.
    """
    to, at = _question(message, answer=True)
    asked = to.name
    _, flags, _, answers, _, _ = _HEAD.unpack_from(message)
    if flags & _RCODE:
        raise MalformedDns("an error")
    aliases: dict[bytes, tuple[bytes, int]] = {}
    found: list[tuple[bytes, int, bytes, int]] = []
    try:
        for _ in range(min(answers, _MAX_RECORDS)):
            owner, at = _name(message, at)
            kind, its_class, ttl, size = _RECORD.unpack_from(message, at)
            at += _RECORD.size
            data, at = message[at : at + size], at + size
            if at > len(message):
                break
            ttl = 0 if ttl >> 31 else min(ttl, _MAX_TTL)
            if its_class != _IN:
                continue
            if kind == _CNAME:
                target, end = _name(message, at - size)
                if end != at:
                    raise MalformedDns("an alias that is longer than its record")
                aliases.setdefault(owner, (target, ttl))
            elif kind in _SIZES:
                family, length = _SIZES[kind]
                if size != length:
                    raise MalformedDns("an address of a wrong length")
                found.append((owner, family, data.ljust(16, b"\0"), ttl))
    except (IndexError, struct.error):
        pass  # it ends early
    return DnsAnswer(asked.decode("ascii"), _reached(asked, aliases, found))


def _reached(
    asked: bytes,
    aliases: dict[bytes, tuple[bytes, int]],
    found: list[tuple[bytes, int, bytes, int]],
) -> tuple[tuple[int, bytes, int], ...]:
    """Return the addresses that the name asked for leads to, through its aliases."""
    way: dict[bytes, int] = {}
    name, ttl = asked, _MAX_TTL
    while name not in way:
        way[name] = ttl
        if name not in aliases:
            break
        name, own = aliases[name]
        ttl = min(ttl, own)
    known: dict[tuple[int, bytes], int] = {}
    for owner, family, raw, ttl in found:
        if owner in way and len(known) < _MAX_ADDRESSES:
            known.setdefault((family, raw), min(ttl, way[owner]))
    return tuple((family, raw, ttl) for (family, raw), ttl in known.items())


def _name(message: bytes, at: int) -> tuple[bytes, int]:
    """Return (the lower-case name at `at`, where the rest begins). Raises Malformed, IndexError."""
    labels: list[bytes] = []
    size, behind, least = 0, -1, at
    for _ in range(_MAX_POINTERS + MAX_NAME):
        length = message[at]
        if length & 0xC0 == 0xC0:
            target = (length & 0x3F) << 8 | message[at + 1]
            behind = at + 2 if behind < 0 else behind
            if target >= least:
                raise MalformedDns("a pointer that does not lead backwards")
            at = least = target
            continue
        if length & 0xC0:
            raise MalformedDns("an unknown kind of label")
        at += 1
        if not length:
            return b".".join(labels), at if behind < 0 else behind
        label = message[at : at + length].lower()
        if len(label) < length:
            raise IndexError
        size += length + 1
        if size > MAX_NAME + 1 or _LABEL.fullmatch(label) is None:
            raise MalformedDns("a name that no host has")
        labels.append(label)
        at += length
    raise MalformedDns("a name without an end")
