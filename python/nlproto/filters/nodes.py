# SPDX-License-Identifier: MIT
"""What a filter is made of: tests of records, and how they are joined.

A node's `str` is its text form; its `cost` is how many tests it makes; `mask` is one bool a record.
"""

from __future__ import annotations

import fnmatch
import functools
import ipaddress
import operator
import os
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nlproto.filters.view import FilterView, ProcessLike
from nlproto.filters.words import NAME_COST, quote
from nlproto.records import wire

__all__ = [
    "Chain",
    "DomainTest",
    "Equal",
    "Length",
    "Net",
    "Node",
    "Not",
    "OwnerTest",
    "Ports",
    "container_names",
    "matcher",
]

_COMM_MAX = int(wire.lib.SNIFFER_COMM_LEN) - 1


class Node(Protocol):
    """One test, or several joined."""

    def mask(self, view: FilterView) -> np.ndarray:
        """Return a mask: one bool for each record of `view`."""
        ...

    @property
    def cost(self) -> int:
        """How many tests it makes."""
        ...


@dataclass(frozen=True, slots=True)
class Chain:
    """Tests joined by `and` and `or`, from left to right."""

    first: Node
    rest: tuple[tuple[str, Node], ...]

    def __str__(self) -> str:
        words = [_grouped(self.first)]
        for word, node in self.rest:
            words += [word, _grouped(node)]
        return " ".join(words)

    @property
    def cost(self) -> int:
        """See Node."""
        return self.first.cost + sum(node.cost for _, node in self.rest)

    def mask(self, view: FilterView) -> np.ndarray:
        """See Node."""
        result = self.first.mask(view)
        for word, node in self.rest:
            other = node.mask(view)
            result = result & other if word == "and" else result | other
        return result


def _grouped(node: Node) -> str:
    return f"({node})" if isinstance(node, Chain) else str(node)


@dataclass(frozen=True, slots=True)
class Not:
    """The node whose opposite this is."""

    node: Node

    def __str__(self) -> str:
        return f"not {_grouped(self.node)}"

    @property
    def cost(self) -> int:
        """See Node."""
        return self.node.cost

    def mask(self, view: FilterView) -> np.ndarray:
        """See Node."""
        return ~self.node.mask(view)


@dataclass(frozen=True, slots=True)
class Equal:
    """`field` of the record is one of `values`."""

    text: str
    field: str
    values: tuple[int, ...]
    named: bool = False

    def __str__(self) -> str:
        return self.text

    @property
    def cost(self) -> int:
        """See Node."""
        return 1

    def mask(self, view: FilterView) -> np.ndarray:
        """See Node."""
        column = view.column(self.field)
        if len(self.values) == 1:
            result: np.ndarray = column == self.values[0]
        else:  # `how` alone, one byte
            table = np.zeros(256, bool)
            table[list(self.values)] = True
            result = table[column]
        return result & view.named if self.named else result


_SIDES = {
    "src": ("s", operator.or_),
    "dst": ("d", operator.or_),
    "src or dst": ("sd", operator.or_),
    "src and dst": ("sd", operator.and_),
}


def _sided(side: str, text: str) -> str:
    return text if side == "src or dst" else f"{side} {text}"


def _join(join: Callable[[Any, Any], Any], masks: list[np.ndarray]) -> np.ndarray:
    result: np.ndarray = functools.reduce(join, masks)
    return result


@dataclass(frozen=True, slots=True)
class Ports:
    """A port, or a range, of one end or both: as in the packet, or as NAT translates it."""

    side: str
    low: int
    high: int

    def __str__(self) -> str:
        span = f"port {self.low}" if self.low == self.high else f"portrange {self.low}-{self.high}"
        return _sided(self.side, span)

    @property
    def cost(self) -> int:
        """See Node."""
        return 1

    def mask(self, view: FilterView) -> np.ndarray:
        """See Node."""
        ends, join = _SIDES[self.side]
        found = _join(join, [self._end(view.column(f"{end}port")) for end in ends])
        if view.nat is not None:
            became = _join(join, [self._end(view.nat[f"{end}port"]) for end in ends])
            found = found | became & (view.nat["sport"] != 0)
        return found

    def _end(self, ports: np.ndarray) -> np.ndarray:
        result: np.ndarray = (
            ports == self.low
            if self.low == self.high
            else (ports >= self.low) & (ports <= self.high)
        )
        return result


@dataclass(frozen=True, slots=True)
class Net:
    """An address, or a network, of one end or both: as in the packet, or as NAT translates it."""

    side: str
    net: ipaddress.IPv4Network | ipaddress.IPv6Network

    def __str__(self) -> str:
        single = self.net.prefixlen == self.net.max_prefixlen
        return _sided(self.side, f"host {self.net[0]}" if single else f"net {self.net}")

    @property
    def cost(self) -> int:
        """See Node."""
        return 1

    def mask(self, view: FilterView) -> np.ndarray:
        """See Node."""
        ends, join = _SIDES[self.side]
        family = socket.AF_INET if self.net.version == 4 else socket.AF_INET6
        bits = np.frombuffer(self.net.netmask.packed.ljust(16, b"\0"), np.uint64)
        wanted = np.frombuffer(self.net.network_address.packed.ljust(16, b"\0"), np.uint64)

        def inside(words: np.ndarray) -> np.ndarray:
            fits: np.ndarray = (words[:, 0] & bits[0]) == wanted[0]
            if bits[1]:
                fits &= (words[:, 1] & bits[1]) == wanted[1]
            return fits

        result = _join(join, [inside(view.column(f"{end}addr")) for end in ends])
        if view.nat is not None:
            became = _join(join, [inside(view.nat[f"{end}addr"]) for end in ends])
            result = result | became & (view.nat["sport"] != 0)
        result &= view.column("family") == family
        return result


@dataclass(frozen=True, slots=True)
class Length:
    """`less` or `greater`: the size of the IP packet in bytes."""

    word: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.word} {self.bytes}"

    @property
    def cost(self) -> int:
        """See Node."""
        return 1

    def mask(self, view: FilterView) -> np.ndarray:
        """See Node."""
        sizes = view.column("len")
        result: np.ndarray = sizes <= self.bytes if self.word == "less" else sizes >= self.bytes
        return result


@dataclass(frozen=True, slots=True)
class OwnerTest:
    """A word of NAME_WORDS: a name, or a pattern with * ? [ ]."""

    word: str
    name: str
    fits: Callable[[str], object] = field(compare=False, repr=False)
    """Return whether a name is `name`, or matches it."""

    def __str__(self) -> str:
        return f"{self.word} {quote(self.name)}"

    @property
    def cost(self) -> int:
        """See Node."""
        return NAME_COST

    def mask(self, view: FilterView) -> np.ndarray:
        """See Node."""
        places, belongs, processes = view.processes
        wanted = (self.is_wanted(*one) for one in processes)
        verdicts = np.fromiter(wanted, bool, len(processes))
        result = np.zeros(len(view), bool)
        result[places] = verdicts[belongs]
        return result

    def is_wanted(self, comm: str, process: ProcessLike | None) -> bool:
        """Return whether a process fits. `comm` is the kernel's name for it."""
        if self.word == "pname":
            program = "" if process is None else os.path.basename(process.exe)
            if self.fits(comm) or program and self.fits(program):
                return True
            return self._is_cut(comm, program)
        return process is not None and any(map(self.fits, self._names(process)))

    def _names(self, process: ProcessLike) -> Iterator[str]:
        """Return the process's names, in each way that people may write them."""
        match self.word:
            case "container":
                yield from container_names(process.container, process.container_name, self.name)
            case "unit" if process.unit:  # systemctl too accepts "nginx" for "nginx.service"
                yield from (process.unit, process.unit.rpartition(".")[0])
            case "pod" if process.pod:
                yield from (process.pod, process.pod.partition("/")[2])
            case "parent":
                for one in process.parents:
                    yield from (one.comm, str(one.pid))
            case "exe" if process.exe:
                yield from (process.exe, os.path.basename(process.exe))
            case "cmdline" if process.cmdline:
                # some words of it are enough
                yield self.name if self.name in process.cmdline else process.cmdline

    def _is_cut(self, comm: str, program: str) -> bool:
        """The kernel keeps 15 bytes of a name. For a longer one compare the executable."""
        if program or len(comm) + 1 > len(self.name):
            return False
        name = self.name.encode("utf-8", "backslashreplace")  # bytes from a shell may be no UTF-8
        return len(name) > _COMM_MAX and comm.encode("utf-8", "replace") == name[:_COMM_MAX]


@dataclass(frozen=True, slots=True)
class DomainTest:
    """`domain`: the far end's name is this name, or lies below it, or matches the pattern."""

    name: str
    fits: Callable[[str], object] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"domain {quote(self.name)}"

    @property
    def cost(self) -> int:
        """See Node."""
        return NAME_COST

    def mask(self, view: FilterView) -> np.ndarray:
        """See Node."""
        verdicts = {domain: self.is_wanted(domain) for domain in set(view.domains)}
        return np.fromiter((verdicts[one] for one in view.domains), bool, len(view))

    def is_wanted(self, domains: str) -> bool:
        """Return whether one of the names fits; "|" separates them."""
        below = f".{self.name}"
        return bool(domains) and any(
            self.fits(one) or one.endswith(below) for one in domains.split("|")
        )


def matcher(name: str) -> Callable[[str], object]:
    """Return a function that says whether a name is `name`, or matches it.

    The cache of fnmatch would keep 32,768 patterns of other users.
    """
    if any(character in name for character in "*?["):
        return re.compile(fnmatch.translate(name)).match
    return name.__eq__


def container_names(container: str, name: str, wanted: str) -> Iterator[str]:
    """Yield the names of a container ("docker:4f1c0d2e9a3b", "lxc:web") that has a `name`.

    These are its id and its name, each with or without the runtime before it. If `wanted` is the
    beginning of the id, `wanted` is one too, as for docker and podman.
    """
    if not container:
        return
    runtime, _, short = container.partition(":")
    yield from (container, short)
    if name:
        yield from (name, f"{runtime}:{name}")
    asked, colon, rest = wanted.rpartition(":")
    is_id = re.fullmatch("[0-9a-f]{12}", short) and re.fullmatch("[0-9a-f]{1,64}", rest)
    if is_id and (not colon or asked == runtime) and short.startswith(rest[:12]):
        yield wanted
