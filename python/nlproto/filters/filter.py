# SPDX-License-Identifier: MIT
"""The filter language: pcap-filter(7)'s words and the owner's, evaluated over RECORD arrays.

filter.lark is the grammar. A Filter's text form (`str`) has numbers only, so that it means the
same in another program: two filters of one text form are the same filter.
"""

from __future__ import annotations

import fnmatch
import functools
import ipaddress
import operator
import os
import pwd
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nlproto.errors import UsageError
from nlproto.records import wire
from nlproto.tables.column_table import mix, random_seed

if TYPE_CHECKING:
    from lark import Lark, Token, Tree, UnexpectedInput

__all__ = ["EVERYTHING", "WORDS", "Filter", "FilterError", "parse", "quote"]

MAX_LENGTH = 4096
MAX_DEPTH = 50
MAX_COST = 512
"""Tests in one filter; `pname`, `container` and `unit` count as NAME_COST."""
NAME_COST = 4
MAX_NAME = 256
"""Characters of such a name; the kernel's names have at most 255 bytes."""
NETNS_DIR = "/run/netns"

WORDS = (
    "tcp udp ip ip6 host net mask port portrange src dst inbound outbound and or not "
    "pid pname uid netns how container unit ifindex less greater"
).split()

_COMM_MAX = int(wire.lib.SNIFFER_COMM_LEN) - 1


class FilterError(UsageError):
    """A filter that means nothing; `start` and `end` are the columns (from 0) of the culprit."""

    def __init__(self, message: str, text: str, start: int, end: int) -> None:
        super().__init__(f"filter, column {start + 1}: {message}")
        self.text = text
        self.start = start
        self.end = max(end, start + 1)

    def pointer(self) -> str:
        """Return two lines: the filter, and carets below the culprit."""
        shown = "".join(c if c.isprintable() else "?" for c in self.text)
        return f"{shown}\n{' ' * self.start}{'^' * (self.end - self.start)}"


class ProcessLike(Protocol):
    @property
    def exe(self) -> str: ...
    @property
    def container(self) -> str: ...
    @property
    def unit(self) -> str: ...


class KnownProcesses(Protocol):
    """What is known of processes beyond their records (nlproto.tables.processes.Processes)."""

    def get(self, tgid: int, start_ns: int, /) -> ProcessLike | None: ...


class _View:
    """The records that a filter looks at; what several tests need is made once."""

    def __init__(self, records: np.ndarray, details: KnownProcesses | None) -> None:
        self.records = records
        self._details = details
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.records)

    def column(self, name: str) -> np.ndarray:
        """One field; addresses as two numbers of 64 bits."""
        found = self._columns.get(name)
        if found is None:
            found = np.ascontiguousarray(self.records[name])
            if found.ndim == 2:
                found = found.view(np.uint64)
            self._columns[name] = found
        return found

    @functools.cached_property
    def named(self) -> np.ndarray:
        how = self.column("how")
        named: np.ndarray = (how > 0) & (how < wire.lib.SNIFFER_HOW_REASONS)
        return named

    @functools.cached_property
    def processes(self) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str, str, str]]]:
        """Where the named records are, which process each has, and these processes.

        A process is (comm, name of its program, container, unit). Each is looked up once.
        """
        places = np.flatnonzero(self.named)
        records = self.records[places]
        comm = np.ascontiguousarray(records["comm"]).view(np.uint64).reshape(-1, 2)
        identity = mix(
            (records["tgid"].astype(np.uint64), records["start_ns"], comm[:, 0], comm[:, 1]),
            _SEED,
        )
        _, first, belongs = np.unique(identity, return_index=True, return_inverse=True)
        found = []
        for index in first.tolist():
            record = records[index]
            process = None
            if self._details is not None:
                process = self._details.get(int(record["tgid"]), int(record["start_ns"]))
            program = os.path.basename(process.exe) if process is not None else ""
            container = process.container if process is not None else ""
            unit = process.unit if process is not None else ""
            found.append((wire.text(bytes(record["comm"])), program, container, unit))
        return places, belongs, found


_SEED = random_seed()


class _Node(Protocol):
    def mask(self, view: _View) -> np.ndarray: ...

    @property
    def cost(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter; `str()` is its text form, "" matches everything."""

    root: _Node | None

    def __str__(self) -> str:
        return "" if self.root is None else str(self.root)

    @property
    def cost(self) -> int:
        """How many tests it makes; `pname`, `container` and `unit` count as NAME_COST."""
        return 0 if self.root is None else self.root.cost

    def mask(self, records: np.ndarray, details: KnownProcesses | None = None) -> np.ndarray:
        """Return one bool a record of `records` (RECORD, shape (n,)).

        `details` is asked once for each process, by `pname` (names longer than 15 bytes, names of
        executables), `container` and `unit`; without it these see only what the record says.
        """
        if self.root is None:
            return np.ones(len(records), bool)
        if not len(records):
            return np.zeros(0, bool)
        return self.root.mask(_View(records, details))

    def __and__(self, other: Filter) -> Filter:
        """Return the filter that wants both."""
        if self.root is None or other.root is None:
            return other if self.root is None else self
        return Filter(_Chain(self.root, (("and", other.root),)))


EVERYTHING = Filter(None)


def quote(value: str) -> str:
    """Return `value` as one word of the language, whatever is in it."""
    if re.fullmatch(r"[\w./:*?\[\]@+-]+", value) and value not in WORDS:
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


@dataclass(frozen=True, slots=True)
class _Chain:
    first: _Node
    rest: tuple[tuple[str, _Node], ...]

    def __str__(self) -> str:
        words = [_grouped(self.first)]
        for word, node in self.rest:
            words += [word, _grouped(node)]
        return " ".join(words)

    @property
    def cost(self) -> int:
        return self.first.cost + sum(node.cost for _, node in self.rest)

    def mask(self, view: _View) -> np.ndarray:
        result = self.first.mask(view)
        for word, node in self.rest:
            other = node.mask(view)
            result = result & other if word == "and" else result | other
        return result


def _grouped(node: _Node) -> str:
    return f"({node})" if isinstance(node, _Chain) else str(node)


@dataclass(frozen=True, slots=True)
class _Not:
    node: _Node

    def __str__(self) -> str:
        return f"not {_grouped(self.node)}"

    @property
    def cost(self) -> int:
        return self.node.cost

    def mask(self, view: _View) -> np.ndarray:
        return ~self.node.mask(view)


@dataclass(frozen=True, slots=True)
class _Equal:
    """`field` of the record is one of `values`."""

    text: str
    field: str
    values: tuple[int, ...]
    named: bool = False

    def __str__(self) -> str:
        return self.text

    @property
    def cost(self) -> int:
        return 1

    def mask(self, view: _View) -> np.ndarray:
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
class _Ports:
    side: str
    low: int
    high: int

    def __str__(self) -> str:
        span = f"port {self.low}" if self.low == self.high else f"portrange {self.low}-{self.high}"
        return _sided(self.side, span)

    @property
    def cost(self) -> int:
        return 1

    def mask(self, view: _View) -> np.ndarray:
        ends, join = _SIDES[self.side]
        masks = [self._end(view.column(f"{end}port")) for end in ends]
        return _join(join, masks)

    def _end(self, ports: np.ndarray) -> np.ndarray:
        result: np.ndarray = (
            ports == self.low
            if self.low == self.high
            else (ports >= self.low) & (ports <= self.high)
        )
        return result


@dataclass(frozen=True, slots=True)
class _Net:
    side: str
    net: ipaddress.IPv4Network | ipaddress.IPv6Network

    def __str__(self) -> str:
        single = self.net.prefixlen == self.net.max_prefixlen
        return _sided(self.side, f"host {self.net[0]}" if single else f"net {self.net}")

    @property
    def cost(self) -> int:
        return 1

    def mask(self, view: _View) -> np.ndarray:
        ends, join = _SIDES[self.side]
        family = socket.AF_INET if self.net.version == 4 else socket.AF_INET6
        bits = np.frombuffer(self.net.netmask.packed.ljust(16, b"\0"), np.uint64)
        wanted = np.frombuffer(self.net.network_address.packed.ljust(16, b"\0"), np.uint64)
        masks = []
        for end in ends:
            words = view.column(f"{end}addr")
            fits = (words[:, 0] & bits[0]) == wanted[0]
            if bits[1]:
                fits &= (words[:, 1] & bits[1]) == wanted[1]
            masks.append(fits)
        result: np.ndarray = _join(join, masks) & (view.column("family") == family)
        return result


@dataclass(frozen=True, slots=True)
class _Length:
    """`less` or `greater`: the IP packet has so many bytes at most, or at least."""

    word: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.word} {self.bytes}"

    @property
    def cost(self) -> int:
        return 1

    def mask(self, view: _View) -> np.ndarray:
        sizes = view.column("len")
        result: np.ndarray = sizes <= self.bytes if self.word == "less" else sizes >= self.bytes
        return result


@dataclass(frozen=True, slots=True)
class _OwnerTest:
    """`pname`, `container` or `unit`: a name, or a pattern with * ? [ ]."""

    word: str
    name: str
    fits: Callable[[str], object] = field(compare=False, repr=False)
    """Whether a name is `name` or matches it."""

    def __str__(self) -> str:
        return f"{self.word} {quote(self.name)}"

    @property
    def cost(self) -> int:
        return NAME_COST

    def mask(self, view: _View) -> np.ndarray:
        places, belongs, processes = view.processes
        wanted = (self._is_wanted(*one) for one in processes)
        verdicts = np.fromiter(wanted, bool, len(processes))
        result = np.zeros(len(view), bool)
        result[places] = verdicts[belongs]
        return result

    def _is_wanted(self, comm: str, program: str, container: str, unit: str) -> bool:
        if self.word == "container":
            return bool(container) and _is_container(container, self.name, self.fits)
        if self.word == "unit":  # systemctl too takes "nginx" for "nginx.service"
            return bool(unit) and bool(self.fits(unit) or self.fits(unit.rpartition(".")[0]))
        if self.fits(comm) or program and self.fits(program):
            return True
        return self._is_cut(comm, program)

    def _is_cut(self, comm: str, program: str) -> bool:
        """The kernel keeps 15 bytes of a name; a longer one is settled by the executable."""
        if program or len(comm) + 1 > len(self.name):
            return False
        name = self.name.encode()
        return len(name) > _COMM_MAX and comm.encode() == name[:_COMM_MAX]


def _matcher(name: str) -> Callable[[str], object]:
    """What tells whether a name is `name`, or matches it.

    fnmatch's own cache would keep 32,768 patterns of strangers.
    """
    if any(character in name for character in "*?["):
        return re.compile(fnmatch.translate(name)).match
    return name.__eq__


def is_container(name: str, wanted: str) -> bool:
    """Whether the container `name` ("docker:4f1c0d2e9a3b", "lxc:web") is the one `wanted`.

    That is its name or id, a pattern, or the beginning of an id, as docker and podman take it;
    each with or without the runtime before it.
    """
    return _is_container(name, wanted, _matcher(wanted))


def _is_container(name: str, wanted: str, fits: Callable[[str], object]) -> bool:
    runtime, _, short = name.partition(":")
    if fits(name) or fits(short):
        return True
    asked, colon, rest = wanted.rpartition(":")
    is_id = re.fullmatch("[0-9a-f]{12}", short) and re.fullmatch("[0-9a-f]{1,64}", rest)
    return bool(is_id) and (not colon or asked == runtime) and short.startswith(rest[:12])


@functools.cache
def _parser() -> Lark:
    # here and below: only who parses a filter needs these, and their 5 MB
    from importlib import resources

    from lark import Lark

    grammar = resources.files("nlproto.filters").joinpath("filter.lark").read_text("utf-8")
    return Lark(grammar, parser="lalr", lexer="basic", maybe_placeholders=False)


def parse(text: str, resolve: bool = True) -> Filter:
    """Return the filter in `text`.

    `resolve`: look up names of hosts, services, users and network namespaces; without it they
    are refused (a server does not ask DNS for its clients). Raises FilterError.
    """
    if len(text) > MAX_LENGTH:
        raise FilterError(f"longer than {MAX_LENGTH} characters: shorten it", text[:40], 0, 40)
    if not text.strip():
        return EVERYTHING
    from lark import UnexpectedInput

    try:
        tokens = list(_parser().lex(text))
        _check_depth(tokens, text)
        tree = _parser().parse(text)
    except UnexpectedInput as error:
        raise _syntax_error(error, text) from None
    try:
        found = Filter(_Builder(text, resolve).chain(tree.children[0]))
    except FilterError as error:  # "port 80 or icmp" reads as port 80 or port icmp
        raise _foreign(tokens, text) or error from None
    if found.cost > MAX_COST:
        told = f"{found.cost} tests (a name counts as {NAME_COST})"
        raise FilterError(f"{told}; {MAX_COST} at most: shorten it", text, 0, len(text))
    return found


def _check_depth(tokens: list[Token], text: str) -> None:
    depth = 0
    for token in tokens:
        if token.type in ("LPAR", "NOT"):
            depth += 1
        elif token.type == "RPAR":
            depth -= 1
        elif token.type in ("AND", "OR"):
            continue
        if depth > MAX_DEPTH:
            raise FilterError(
                f"more than {MAX_DEPTH} parentheses or 'not' within each other",
                text,
                *_span(token),
            )


def _span(token: Token) -> tuple[int, int]:
    start = token.start_pos or 0
    return start, token.end_pos or start + len(token)


def _suggest(word: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word.lower(), known, 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


_FOREIGN = {
    **dict.fromkeys(
        "icmp icmp6 igmp arp rarp sctp dccp igrp pim vrrp carp esp ah ether link llc wlan fddi tr"
        " decnet atalk aarp iso stp ipx netbeui vlan mpls pppoed pppoes geneve vxlan lat mopdl"
        " moprc".split(),
        "only TCP and UDP are recorded",
    ),
    **dict.fromkeys(("proto", "protochain"), "write tcp, udp, ip or ip6 alone"),
    **dict.fromkeys(("broadcast", "multicast"), "write 'dst net 224.0.0.0/4' or the address"),
    "gateway": "no link-layer address is recorded",
    "len": "write 'less N' or 'greater N'",
    **dict.fromkeys(("ifname", "on"), "use the option -i IF"),
    **dict.fromkeys(("rnr", "rulenum", "reason", "action", "rset", "ruleset"), "see nft monitor"),
}
"""Words of pcap-filter(7) that are none here, and what to do instead."""

_BYTES = re.compile(r"\b(?:tcp|udp|ip6?|icmp6?|ether|arp|link|wlan)\s*\[[^\]]*\]?")


def _foreign(tokens: list[Token], text: str) -> FilterError | None:
    """What to say of a word of pcap-filter's that stands where ours would; None: there is none."""
    for index, token in enumerate(tokens):
        asked = _FOREIGN.get(str(token)) if token.type == "VALUE" else None
        if asked is not None and not (index and tokens[index - 1].type in _VALUED):
            message = f"pcap-filter's {_plain(token)!r} is not supported: {asked}"
            return FilterError(message, text, *_span(token))
    return _bytes_wanted(text)


def _bytes_wanted(text: str) -> FilterError | None:
    unquoted = re.sub(r'"(?:[^"\\]|\\.)*"', lambda one: " " * len(one[0]), text)
    found = _BYTES.search(unquoted)
    if found is None:
        return None
    message = (
        f"pcap-filter's {found[0]!r} is not supported: the bytes of a packet are not looked at"
    )
    return FilterError(message, text, *found.span())


_VALUED = ("ADDRESS_WORD", "NET", "MASK", "OWNER_WORD", "SRC", "DST")
"""Types of words that want a value after them."""


def _unknown(token: Token, text: str) -> FilterError:
    if token in ("named", "unnamed"):
        return FilterError(f"write 'how {token}'", text, *_span(token))
    hint = _suggest(token, WORDS)
    if not hint and re.fullmatch(r"\d+", token):
        hint = f"; a number needs a word before it, as in 'port {token}' or 'pid {token}'"
    elif not hint and re.fullmatch(r"[0-9a-fA-F:.]+", token):
        hint = f"; an address needs a word before it, as in 'host {token}'"
    elif not hint:
        hint = f"; for the name of a program write 'pname {quote(_plain(token))}'"
    return FilterError(f"unknown word {_plain(token)!r}{hint}", text, *_span(token))


def _plain(token: str) -> str:
    if token.startswith('"'):
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    return str(token)


_EXPECTED = {
    "AND": "'and'", "OR": "'or'", "NOT": "'not'", "LPAR": "'('", "RPAR": "')'",
    "VALUE": "a value", "ADDRESS_WORD": "'host' or 'port'",
}  # fmt: skip


def _syntax_error(error: UnexpectedInput, text: str) -> FilterError:
    from lark import UnexpectedCharacters, UnexpectedToken

    if isinstance(error, UnexpectedCharacters):
        foreign = _bytes_wanted(text)
        if foreign is not None:
            return foreign
        at = error.pos_in_stream or 0
        if text[at] == '"':
            return FilterError("a quote that nothing closes", text, at, len(text))
        return FilterError(f"{text[at]!r} means nothing here", text, at, at + 1)
    assert isinstance(error, UnexpectedToken)
    token = error.token
    tokens = list(_parser().lex(text))
    foreign = _foreign(tokens, text)
    if foreign is not None:
        return foreign
    wanted = error.expected
    if token.type == "$END":
        last = tokens[-1]
        start, end = _span(last)
        if last.type in _VALUED:
            return FilterError(f"'{last}' needs a value after it", text, start, end)
        if last.type in ("AND", "OR", "NOT"):
            return FilterError(f"'{last}' needs something after it", text, start, end)
        return FilterError("a parenthesis that nothing closes", text, text.rindex("("), len(text))
    index = next(i for i, one in enumerate(tokens) if one.start_pos == token.start_pos)
    before = tokens[index - 1] if index else None
    if before is not None and before.type == "VALUE" and not _has_word(tokens, index - 1):
        return _unknown(before, text)
    if token.type == "RPAR":
        message = "')' without '('" if "VALUE" not in wanted else "nothing before ')'"
    elif token.type == "VALUE" and before is not None and before.type != "VALUE":
        return _unknown(token, text)
    elif before is not None and "VALUE" in wanted and token.type != "VALUE" and "NOT" not in wanted:
        message = f"'{before}' needs a value after it; a value that is a word wants quotes"
    elif "AND" in wanted:
        close = _suggest(token, ["and", "or"]) if token.type == "VALUE" else ""
        message = f"'and' or 'or' is missing before {_plain(token)!r}{close}"
    else:
        words = " or ".join(_EXPECTED[name] for name in _EXPECTED if name in wanted)
        message = f"{_plain(token)!r} cannot stand here" + (f"; {words} can" if words else "")
    return FilterError(message, text, *_span(token))


def _has_word(tokens: list[Token], index: int) -> bool:
    """Whether the value at `index` has a word before it, directly or by inheritance."""
    if index and tokens[index - 1].type in _VALUED:
        return True
    return (
        bool(index)
        and tokens[index - 1].type in ("AND", "OR", "NOT")
        and any(token.type in _VALUED for token in tokens[:index])
    )


@dataclass(frozen=True, slots=True)
class _Words:
    """What stood before a value, for the bare values after it."""

    proto: Token | None
    side: str
    kind: str


class _Builder:
    """Nodes from the parse tree, left to right."""

    def __init__(self, text: str, resolve: bool) -> None:
        self._text = text
        self._resolve = resolve
        self._last: _Words | None = None

    def chain(self, tree: Tree[Token] | Token) -> _Node:
        from lark import Token, Tree

        assert isinstance(tree, Tree)
        first, *rest = tree.children
        node = self._term(first)
        if not rest:
            return node
        links = []
        for word, term in zip(rest[::2], rest[1::2], strict=True):
            assert isinstance(word, Token)
            links.append(("and" if word.type == "AND" else "or", self._term(term)))
        return _Chain(node, tuple(links))

    def _term(self, tree: Tree[Token] | Token) -> _Node:
        from lark import Token, Tree

        assert isinstance(tree, Tree)
        if tree.data == "negation":
            return _Not(self._term(tree.children[1]))
        if tree.data == "group":
            return self.chain(tree.children[0])
        if tree.data == "bare":
            value = tree.children[0]
            assert isinstance(value, Token)
            if self._last is None:
                raise _unknown(value, self._text)
            return self._value(self._last, value)
        return self._test(tree)

    def _test(self, tree: Tree[Token]) -> _Node:
        from lark import Tree

        proto: Token | None = None
        side, kind, values = "src or dst", "host", []
        for child in tree.children:
            if isinstance(child, Tree):
                side = self._side(child)
            elif child.type == "PROTO":
                proto = child
            elif child.type == "WAY":
                return self._way(child)
            elif child.type == "VALUE":
                values.append(child)
            elif child.type != "MASK":
                kind = str(child)
        if not values:
            assert proto is not None
            return _proto(proto)
        self._last = _Words(proto, side, kind)
        return self._value(self._last, *values)

    def _side(self, tree: Tree[Token]) -> str:
        from lark import Token

        tokens = [child for child in tree.children if isinstance(child, Token)]
        if len(tokens) == 1:
            return str(tokens[0])
        if tokens[0].type == tokens[2].type:
            raise FilterError(f"'{tokens[0]}' twice", self._text, *_span(tokens[2]))
        return f"src {'and' if tokens[1].type == 'AND' else 'or'} dst"

    def _way(self, token: Token) -> _Node:
        value = wire.lib.SNIFFER_DIR_IN if token == "inbound" else wire.lib.SNIFFER_DIR_OUT
        return _Equal(str(token), "dir", (int(value),))

    def _value(self, words: _Words, value: Token, mask: Token | None = None) -> _Node:
        make = getattr(self, f"_{words.kind}")
        node: _Node = make(words, value) if mask is None else self._masked(words, value, mask)
        return node if words.proto is None else _Chain(_proto(words.proto), (("and", node),))

    def _fail(self, message: str, token: Token) -> FilterError:
        return FilterError(message, self._text, *_span(token))

    # One method a word; the word is the method's name.

    def _host(self, words: _Words, value: Token) -> _Node:
        name = _plain(value)
        try:
            return _Net(words.side, ipaddress.ip_network(name))
        except ValueError:
            if "/" in name:
                raise self._fail(f"{name!r} is a network: write 'net {name}'", value) from None
        if not self._resolve or re.fullmatch(r"[\d.]+|.*:.*", name):
            raise self._fail(f"{name!r} is no address", value)
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._fail(f"no address for {name!r} ({reason})", value) from None
        addresses = sorted({str(one[4][0]).partition("%")[0] for one in found})
        first, *rest = (_Net(words.side, ipaddress.ip_network(one)) for one in addresses)
        return _Chain(first, tuple(("or", one) for one in rest)) if rest else first

    def _net(self, words: _Words, value: Token) -> _Node:
        name = _plain(value)
        if re.fullmatch(r"\d+(\.\d+){0,2}", name):  # "net 10" and "net 192.168", as in pcap-filter
            octets = name.split(".")
            name = ".".join(octets + ["0"] * (4 - len(octets))) + f"/{8 * len(octets)}"
        return _Net(words.side, self._network(name, value))

    def _masked(self, words: _Words, value: Token, mask: Token) -> _Node:
        return _Net(words.side, self._network(f"{_plain(value)}/{_plain(mask)}", value))

    def _network(self, name: str, value: Token) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        try:
            return ipaddress.ip_network(name)
        except ValueError as error:
            raise self._fail(f"no network: {error}", value) from None

    def _port(self, words: _Words, value: Token) -> _Node:
        port = self._port_number(_plain(value), words.proto, value)
        return _Ports(words.side, port, port)

    def _portrange(self, words: _Words, value: Token) -> _Node:
        low, dash, high = _plain(value).partition("-")
        if not dash:
            raise self._fail("a port range is written 'portrange 1000-2000'", value)
        first = self._port_number(low, words.proto, value)
        last = self._port_number(high, words.proto, value)
        if first > last:
            raise self._fail(f"the range begins after its end: write {last}-{first}", value)
        return _Ports(words.side, first, last)

    def _port_number(self, name: str, proto: Token | None, value: Token) -> int:
        if name.isascii() and name.isdigit():
            if int(name) > 65535:
                raise self._fail(f"port {name} is above 65535", value)
            return int(name)
        if self._resolve:
            for kind in [str(proto)] if proto in ("tcp", "udp") else ["tcp", "udp"]:
                try:
                    return socket.getservbyname(name, kind)
                except OSError:
                    continue
        raise self._fail(f"{name!r} is no port", value)

    def _number(self, value: Token, what: str) -> int:
        name = _plain(value)
        if not (name.isascii() and name.isdigit()) or int(name) >= 1 << 32:
            raise self._fail(f"{name!r} is no {what}", value)
        return int(name)

    def _pid(self, words: _Words, value: Token) -> _Node:
        pid = self._number(value, "pid; for a name write 'pname " + quote(_plain(value)) + "'")
        return _Equal(f"pid {pid}", "tgid", (pid,), named=True)

    def _uid(self, words: _Words, value: Token) -> _Node:
        name = _plain(value)
        if self._resolve and not name.isdigit():
            try:
                uid = pwd.getpwnam(name).pw_uid
            except KeyError:
                raise self._fail(f"no user {name!r}", value) from None
        else:
            uid = self._number(value, "uid")
        return _Equal(f"uid {uid}", "uid", (uid,), named=True)

    def _netns(self, words: _Words, value: Token) -> _Node:
        name = _plain(value)
        if self._resolve and not name.isdigit():
            path = name if name.startswith("/") else os.path.join(NETNS_DIR, name)
            try:
                inode = os.stat(path).st_ino
            except (OSError, ValueError):
                raise self._fail(f"no network namespace {name!r} ({path})", value) from None
        else:
            inode = self._number(value, "inode of a network namespace")
        return _Equal(f"netns {inode}", "netns", (inode,))

    def _ifindex(self, words: _Words, value: Token) -> _Node:
        index = self._number(value, "interface index")
        return _Equal(f"ifindex {index}", "ifindex", (index,))

    def _how(self, words: _Words, value: Token) -> _Node:
        name = _plain(value)
        reasons = int(wire.lib.SNIFFER_HOW_REASONS)
        known: dict[str, tuple[int, ...]] = {}
        for how, one in enumerate(wire.HOW_NAMES):
            if one != f"how_{how}":
                known[one] = (how,)
        values = [how for hows in known.values() for how in hows]
        known["named"] = tuple(how for how in values if how < reasons)
        known["unnamed"] = tuple(how for how in values if how >= reasons)
        if name not in known:
            hint = _suggest(name, list(known)) or f"; one of {', '.join(known)}"
            raise self._fail(f"unknown rule or reason {name!r}{hint}", value)
        return _Equal(f"how {name}", "how", known[name])

    def _pname(self, words: _Words, value: Token) -> _Node:
        return self._owner("pname", value)

    def _container(self, words: _Words, value: Token) -> _Node:
        return self._owner("container", value)

    def _owner(self, word: str, value: Token) -> _Node:
        name = _plain(value)
        if len(name) > MAX_NAME:
            raise self._fail(f"a name has at most {MAX_NAME} characters", value)
        return _OwnerTest(word, name, _matcher(name))

    def _unit(self, words: _Words, value: Token) -> _Node:
        return self._owner("unit", value)

    def _less(self, words: _Words, value: Token) -> _Node:
        return _Length("less", self._number(value, "number of bytes"))

    def _greater(self, words: _Words, value: Token) -> _Node:
        return _Length("greater", self._number(value, "number of bytes"))


def _proto(token: Token) -> _Node:
    field, value = {
        "tcp": ("proto", socket.IPPROTO_TCP),
        "udp": ("proto", socket.IPPROTO_UDP),
        "ip": ("family", socket.AF_INET),
        "ip6": ("family", socket.AF_INET6),
    }[str(token)]
    return _Equal(str(token), field, (int(value),))
