# SPDX-License-Identifier: MIT
"""Text to filter: pcap-filter(7)'s words and the owner's. language.lark is the grammar."""

from __future__ import annotations

import functools
import ipaddress
import pwd
import re
import socket
from dataclasses import dataclass
from importlib import resources

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput

from nlproto.errors import UsageError
from nlproto.filters.filter import EVERYTHING, Filter
from nlproto.filters.mistakes import (
    FilterError,
    check_depth,
    foreign,
    span,
    suggest,
    syntax_error,
    unknown,
)
from nlproto.filters.nodes import (
    Chain,
    DomainTest,
    Equal,
    Length,
    Net,
    Node,
    Not,
    OwnerTest,
    Ports,
    matcher,
)
from nlproto.filters.words import (
    MAX_COST,
    MAX_LENGTH,
    MAX_NAME,
    NAME_COST,
    NAME_WORDS,
    plain,
    quote,
)
from nlproto.host import netns
from nlproto.records import wire

__all__ = ["parse"]


@functools.cache
def _parser() -> Lark:
    grammar = resources.files("nlproto.filters").joinpath("language.lark").read_text("utf-8")
    return Lark(grammar, parser="lalr", lexer="basic", maybe_placeholders=False)


def parse(text: str, resolve: bool = True, elsewhere: bool = False) -> Filter:
    """Return the filter in `text`.

    `resolve`: look up names of hosts, services, users and network namespaces. Without it names are
    refused, because a server does not ask DNS for its clients. `elsewhere`: the filter is for other
    machines, so names of this machine's users and namespaces are refused. Raises FilterError.
    """
    if len(text) > MAX_LENGTH:
        raise FilterError(f"longer than {MAX_LENGTH} characters: shorten it", text[:40], 0, 40)
    if not text.strip():
        return EVERYTHING
    tokens: list[Token] = []
    try:
        tokens = list(_parser().lex(text))
        check_depth(tokens, text)
        tree = _parser().parse(text)
    except UnexpectedInput as error:
        raise syntax_error(error, tokens, text) from None
    try:
        found = Filter(_Builder(text, resolve, resolve and not elsewhere).chain(tree.children[0]))
    except FilterError as error:  # "port 80 or icmp" reads as port 80 or port icmp
        raise foreign(tokens, text) or error from None
    if found.cost > MAX_COST:
        told = f"{found.cost} tests (a name counts as {NAME_COST})"
        raise FilterError(f"{told}; {MAX_COST} at most: shorten it", text, 0, len(text))
    return found


@dataclass(frozen=True, slots=True)
class _Words:
    """The words before a value. Bare values after it inherit them."""

    proto: Token | None
    side: str
    kind: str


class _Builder:
    """Makes nodes from the parse tree, left to right."""

    def __init__(self, text: str, resolve: bool, here: bool) -> None:
        self._text = text
        self._resolve = resolve
        self._here = here
        """Refuse names of users and namespaces: they are this machine's."""
        self._last: _Words | None = None

    def chain(self, tree: Tree[Token] | Token) -> Node:
        assert isinstance(tree, Tree)
        first, *rest = tree.children
        node = self._term(first)
        if not rest:
            return node
        links = []
        for word, term in zip(rest[::2], rest[1::2], strict=True):
            assert isinstance(word, Token)
            links.append(("and" if word.type == "AND" else "or", self._term(term)))
        return Chain(node, tuple(links))

    def _term(self, tree: Tree[Token] | Token) -> Node:
        assert isinstance(tree, Tree)
        if tree.data == "negation":
            return Not(self._term(tree.children[1]))
        if tree.data == "group":
            return self.chain(tree.children[0])
        if tree.data == "bare":
            value = tree.children[0]
            assert isinstance(value, Token)
            if self._last is None:
                raise unknown(value, self._text)
            return self._value(self._last, value)
        return self._test(tree)

    def _test(self, tree: Tree[Token]) -> Node:
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
        tokens = [child for child in tree.children if isinstance(child, Token)]
        if len(tokens) == 1:
            return str(tokens[0])
        if tokens[0].type == tokens[2].type:
            raise FilterError(f"'{tokens[0]}' twice", self._text, *span(tokens[2]))
        return f"src {'and' if tokens[1].type == 'AND' else 'or'} dst"

    def _way(self, token: Token) -> Node:
        value = wire.lib.SNIFFER_DIR_IN if token == "inbound" else wire.lib.SNIFFER_DIR_OUT
        return Equal(str(token), "dir", (int(value),))

    def _value(self, words: _Words, value: Token, mask: Token | None = None) -> Node:
        node: Node
        if words.kind in NAME_WORDS:
            node = self._owner(words.kind, value)
        elif mask is not None:
            node = self._masked(words, value, mask)
        else:
            node = getattr(self, f"_{words.kind}")(words, value)
        return node if words.proto is None else Chain(_proto(words.proto), (("and", node),))

    def _fail(self, message: str, token: Token) -> FilterError:
        return FilterError(message, self._text, *span(token))

    def _domain(self, words: _Words, value: Token) -> Node:
        name = plain(value).lower().rstrip(".")
        if not name or len(name) > MAX_NAME:
            raise self._fail(f"a name has 1 to {MAX_NAME} characters", value)
        return DomainTest(name, matcher(name))

    def _owner(self, word: str, value: Token) -> Node:
        name = plain(value)
        if len(name) > MAX_NAME:
            raise self._fail(f"a name has at most {MAX_NAME} characters", value)
        return OwnerTest(word, name, matcher(name))

    # One method for each word, with the word's name.

    def _host(self, words: _Words, value: Token) -> Node:
        name = plain(value)
        try:
            return Net(words.side, ipaddress.ip_network(name))
        except ValueError:
            if "/" in name:
                raise self._fail(f"{name!r} is a network: write 'net {name}'", value) from None
        if not self._resolve or re.fullmatch(r"[\d.]+|.*:.*", name):
            raise self._fail(f"{name!r} is no address", value)
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self._fail(f"no address for {name!r} ({reason})", value) from None
        addresses = sorted({str(one[4][0]).partition("%")[0] for one in found})
        first, *rest = (Net(words.side, ipaddress.ip_network(one)) for one in addresses)
        return Chain(first, tuple(("or", one) for one in rest)) if rest else first

    def _net(self, words: _Words, value: Token) -> Node:
        name = plain(value)
        if re.fullmatch(r"\d+(\.\d+){0,2}", name):  # "net 10" and "net 192.168", as in pcap-filter
            octets = name.split(".")
            name = ".".join(octets + ["0"] * (4 - len(octets))) + f"/{8 * len(octets)}"
        return Net(words.side, self._network(name, value))

    def _masked(self, words: _Words, value: Token, mask: Token) -> Node:
        return Net(words.side, self._network(f"{plain(value)}/{plain(mask)}", value))

    def _network(self, name: str, value: Token) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        try:
            return ipaddress.ip_network(name)
        except ValueError as error:
            raise self._fail(f"no network: {error}", value) from None

    def _port(self, words: _Words, value: Token) -> Node:
        port = self._port_number(plain(value), words.proto, value)
        return Ports(words.side, port, port)

    def _portrange(self, words: _Words, value: Token) -> Node:
        low, dash, high = plain(value).partition("-")
        if not dash:
            raise self._fail("a port range is written 'portrange 1000-2000'", value)
        first = self._port_number(low, words.proto, value)
        last = self._port_number(high, words.proto, value)
        if first > last:
            raise self._fail(f"the range begins after its end: write {last}-{first}", value)
        return Ports(words.side, first, last)

    def _port_number(self, name: str, proto: Token | None, value: Token) -> int:
        if name.isascii() and name.isdigit():
            if int(name) > 65535:
                raise self._fail(f"port {name} is above 65535", value)
            return int(name)
        if self._resolve:
            for kind in [str(proto)] if proto in ("tcp", "udp") else ["tcp", "udp"]:
                try:
                    return socket.getservbyname(name, kind)
                except (OSError, ValueError):  # bytes of a shell may be no text
                    continue
        raise self._fail(f"{name!r} is no port", value)

    def _number(self, value: Token, what: str) -> int:
        name = plain(value)
        if not (name.isascii() and name.isdigit()) or int(name) >= 1 << 32:
            raise self._fail(f"{name!r} is no {what}", value)
        return int(name)

    def _pid(self, words: _Words, value: Token) -> Node:
        pid = self._number(value, "pid; for a name write 'pname " + quote(plain(value)) + "'")
        return Equal(f"pid {pid}", "tgid", (pid,), named=True)

    def _uid(self, words: _Words, value: Token) -> Node:
        name = plain(value)
        if self._here and not name.isdigit():
            try:
                uid = pwd.getpwnam(name).pw_uid
            except (KeyError, ValueError):
                raise self._fail(f"no user {name!r}", value) from None
        else:
            uid = self._number(value, "uid")
        return Equal(f"uid {uid}", "uid", (uid,), named=True)

    def _netns(self, words: _Words, value: Token) -> Node:
        if self._here:
            try:
                inode = netns.find(plain(value)).netns
            except UsageError as error:
                raise self._fail(str(error), value) from None
        else:
            inode = self._number(value, "inode of a network namespace")
        return Equal(f"netns {inode}", "netns", (inode,))

    def _ifindex(self, words: _Words, value: Token) -> Node:
        index = self._number(value, "interface index")
        return Equal(f"ifindex {index}", "ifindex", (index,))

    def _how(self, words: _Words, value: Token) -> Node:
        name = plain(value)
        reasons = int(wire.lib.SNIFFER_HOW_REASONS)
        known: dict[str, tuple[int, ...]] = {}
        for how, one in enumerate(wire.HOW_NAMES):
            if one != f"how_{how}":
                known[one] = (how,)
        values = [how for hows in known.values() for how in hows]
        known["named"] = tuple(how for how in values if how < reasons)
        known["unnamed"] = tuple(how for how in values if how >= reasons)
        if name not in known:
            hint = suggest(name, list(known)) or f"; one of {', '.join(known)}"
            raise self._fail(f"unknown rule or reason {name!r}{hint}", value)
        return Equal(f"how {name}", "how", known[name])

    def _less(self, words: _Words, value: Token) -> Node:
        return Length("less", self._number(value, "number of bytes"))

    def _greater(self, words: _Words, value: Token) -> Node:
        return Length("greater", self._number(value, "number of bytes"))


def _proto(token: Token) -> Node:
    field, value = {
        "tcp": ("proto", socket.IPPROTO_TCP),
        "udp": ("proto", socket.IPPROTO_UDP),
        "ip": ("family", socket.AF_INET),
        "ip6": ("family", socket.AF_INET6),
    }[str(token)]
    return Equal(str(token), field, (int(value),))
