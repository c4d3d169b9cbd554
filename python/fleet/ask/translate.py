# SPDX-License-Identifier: MIT
"""Translates a filter to a condition of SQL over flows with details of their owners.

A flow fits if one of its packets would: an outgoing, incoming or forwarded one. So each test is
written for each of these ways. Source and target mean what they mean on one host. Text of a
filter or a machine is never part of a statement, only a value. The filter's own code tries names
and patterns, on each different name in the store.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from fleet.ask.store import FlowStore
from nlproto.errors import UsageError
from nlproto.filters.nodes import (
    Chain,
    DomainTest,
    Equal,
    Net,
    Node,
    Not,
    OwnerTest,
    Ports,
)
from nlproto.records import wire

__all__ = ["is_inside", "translate"]

_OUT, _IN, _PASSED = (
    int(getattr(wire.lib, f"SNIFFER_DIR_{name}")) for name in ("OUT", "IN", "FWD")
)
_WAYS = {
    _OUT: "NOT forwarded AND packets_out > 0",
    _IN: "NOT forwarded AND packets_in > 0",
    _PASSED: "forwarded AND packets_out > 0",
    -_PASSED: "forwarded AND packets_in > 0",
}
"""The ways of packets, and which flows have some. The last one: forwarded backwards."""
_ENDS = {"src": ("s",), "dst": ("d",), "src or dst": ("s", "d"), "src and dst": ("s", "d")}
_OWNER_COLUMNS = {
    "exe": ("exe",),
    "cmdline": ("cmdline",),
    "container": ("container", "container_name"),
    "pod": ("pod",),
    "unit": ("unit",),
}


def translate(store: FlowStore, root: Node) -> tuple[str, dict[str, Any]]:
    """Return a condition over wanted.NAMED, and its values. Raises UsageError."""
    made = _Translation(store)
    texts = {way: made.of(root, way) for way in _WAYS}
    if len(set(texts.values())) == 1:
        return texts[_OUT], made.words
    return (
        "(" + " OR ".join(f"{_WAYS[way]} AND {text}" for way, text in texts.items()) + ")",
        made.words,
    )


def is_inside(store: FlowStore, text: str, words: dict[str, Any]) -> Callable[[str], str]:
    """Return a function that makes a condition of a column of addresses. Raises UsageError."""
    try:
        net = ip_network(text, strict=False)
    except ValueError:
        raise UsageError(f"'{text}' is neither an IP address nor a network") from None
    inside = _Translation(store, words).addresses(net)
    return lambda column: f"coalesce({column} IN {inside}, false)"


@dataclass(frozen=True, slots=True)
class _Parent:
    pid: int
    comm: str


@dataclass(frozen=True, slots=True)
class _Told:
    """A process as a filter sees it; "" for the unknown."""

    exe: str = ""
    cmdline: str = ""
    container: str = ""
    container_name: str = ""
    pod: str = ""
    unit: str = ""
    parents: tuple[_Parent, ...] = ()


class _Translation:
    """Collects conditions and their values."""

    def __init__(self, store: FlowStore, words: dict[str, Any] | None = None) -> None:
        self.words: dict[str, Any] = {} if words is None else words
        self._store = store
        self._numbers = itertools.count(len(self.words))
        self._made: dict[Any, str] = {}

    def of(self, node: Node, way: int) -> str:
        """Return the condition for a flow's packets of one way, in parentheses."""
        match node:
            case Chain():
                text = self.of(node.first, way)
                for word, other in node.rest:  # from left to right: both bind equally
                    text = f"({text} {'AND' if word == 'and' else 'OR'} {self.of(other, way)})"
                return text
            case Not():
                return f"(NOT {self.of(node.node, way)})"
            case Equal():
                return self._equal(node, way)
            case Ports():
                return self._sided(node.side, way, "port", self._port(node))
            case Net():
                return self._net(node, way)
            case OwnerTest():
                return self._once(node, lambda: self._owner(node))
            case DomainTest():
                return self._once(node, lambda: self._domain(node))
        raise UsageError(f"'{node}' is about single packets: the fleet has only flows")

    def _value(self, value: Any) -> str:
        name = f"f{next(self._numbers)}"
        self.words[name] = value
        return f"${name}"

    def _once(self, key: Any, make: Callable[[], str]) -> str:
        """The same text for each way."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _equal(self, node: Equal, way: int) -> str:
        named = " AND tgid <> 0" if node.named else ""
        match node.field:
            case "dir":
                return "true" if node.values == (abs(way),) and way > 0 else "false"
            case "how":
                names = [wire.HOW_NAMES[value] for value in node.values]
                return self._once(node, lambda: self._among("how", names))
            case "proto":
                column = "protocol"
            case "family":
                six = node.values == (int(socket.AF_INET6),)
                return f"({'' if six else 'NOT '}contains(coalesce(laddr, ''), ':'))"
            case "tgid" | "uid" | "netns":
                column = node.field
            case _:
                raise UsageError(f"'{node}': the fleet's flows do not have that")
        return self._once(
            node, lambda: f"(coalesce({column} = {self._value(node.values[0])}, false){named})"
        )

    def _among(self, column: str, values: Iterable[str]) -> str:
        return f"coalesce({column} IN (SELECT unnest({self._value(list(values))})), false)"

    def _sided(self, side: str, way: int, kind: str, test: Callable[[str], str]) -> str:
        """A test of one end or both, as in the packet or as translated by NAT."""
        local = "s" if way in (_OUT, _PASSED) else "d"
        join = " AND " if side == "src and dst" else " OR "
        columns = sorted(("l" if end == local else "r") + kind for end in _ENDS[side])
        own = join.join(map(test, columns))
        became = join.join(test(f"nat_{column}") for column in columns)
        return f"(({own}) OR (nat_laddr IS NOT NULL AND ({became})))"

    def _port(self, node: Ports) -> Callable[[str], str]:
        low = self._once(("low", node.low), lambda: self._value(node.low))
        if node.low == node.high:
            return lambda column: f"coalesce({column} = {low}, false)"
        high = self._once(("high", node.high), lambda: self._value(node.high))
        return lambda column: f"coalesce({column} BETWEEN {low} AND {high}, false)"

    def _net(self, node: Net, way: int) -> str:
        inside = self._once(("net", node.net), lambda: self.addresses(node.net))
        return self._sided(
            node.side, way, "addr", lambda column: f"coalesce({column} IN {inside}, false)"
        )

    def addresses(self, net: IPv4Network | IPv6Network) -> str:
        """Return the store's addresses that are in `net`, for `IN`."""
        if net.prefixlen == net.max_prefixlen:
            family = socket.AF_INET if net.version == 4 else socket.AF_INET6
            return f"({self._value(socket.inet_ntop(family, net[0].packed))})"
        columns = ("laddr", "raddr", "nat_laddr", "nat_raddr")
        found = self._store.rows(
            " UNION ".join(f"SELECT DISTINCT {column} AS a FROM flow" for column in columns)
        )
        inside = [row["a"] for row in found if row["a"] is not None and _is_in(row["a"], net)]
        return f"(SELECT unnest({self._value(inside)}))"

    def _domain(self, node: DomainTest) -> str:
        return self._among("domain", filter(node.is_wanted, self._texts("domain", "flow")))

    def _owner(self, node: OwnerTest) -> str:
        if node.word == "pname":
            text = self._program(node)
        elif node.word == "parent":
            found = self._store.rows("SELECT DISTINCT parents FROM proc WHERE parents IS NOT NULL")
            fits = [
                one
                for row in found
                if node.is_wanted("", _Told(parents=tuple(_parents(one := row["parents"]))))
            ]
            text = f"coalesce(parents IN (SELECT unnest({self._value(fits)}::VARCHAR[][])), false)"
        else:
            text = self._known(node, _OWNER_COLUMNS[node.word])
        return f"(tgid <> 0 AND {text})"

    def _known(self, node: OwnerTest, columns: tuple[str, ...]) -> str:
        """A word for one or two columns of a process."""
        texts = [f"coalesce({column}, '')" for column in columns]
        names = ", ".join(f"{text} AS {name}" for text, name in zip(texts, columns, strict=True))
        rows = self._store.rows(f"SELECT DISTINCT {names} FROM proc")
        fits = [list(row.values()) for row in rows if node.is_wanted("", _Told(**row))]
        if len(columns) == 1:
            return self._among(texts[0], [value for [value] in fits])
        values = f"(SELECT unnest({self._value(fits)}::VARCHAR[][]))"
        return f"([{', '.join(texts)}] IN {values})"

    def _program(self, node: OwnerTest) -> str:
        """The kernel's name, or the executable's; of a cut name its beginning."""
        comms = self._texts("comm", "flow")
        exes = self._texts("exe", "proc")
        own = [one for one in comms if node.fits(one)]
        by_exe = [one for one in exes if (name := os.path.basename(one)) and node.fits(name)]
        text = f"{self._among('comm', own)} OR {self._among('exe', by_exe)}"
        cut = [one for one in comms if not node.fits(one) and node.is_wanted(one, None)]
        if cut:
            text += f" OR (coalesce(exe, '') = '' AND {self._among('comm', cut)})"
        return f"({text})"

    def _texts(self, column: str, view: str) -> list[str]:
        found = self._store.rows(f"SELECT DISTINCT {column} AS a FROM {view}")
        return [row["a"] for row in found if row["a"] is not None]


def _parents(told: Iterable[str]) -> Iterator[_Parent]:
    """ "pid comm", the nearest first."""
    for one in told:
        pid, _, comm = one.partition(" ")
        if pid.isascii() and pid.isdigit():
            yield _Parent(int(pid[:20]), comm)


def _is_in(address: str, net: IPv4Network | IPv6Network) -> bool:
    family = socket.AF_INET if net.version == 4 else socket.AF_INET6
    try:
        packed = socket.inet_pton(family, address)
    except (OSError, ValueError):  # of the other family, or any text from a hostile machine
        return False
    bits = 8 * len(packed)
    number = int.from_bytes(packed, "big")
    return number >> (bits - net.prefixlen) == int(net.network_address) >> (bits - net.prefixlen)
