# SPDX-License-Identifier: MIT
"""What is wrong with a filter, where, and what was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from lark import Token
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from nlproto.errors import UsageError
from nlproto.filters.words import MAX_DEPTH, WORDS, plain, quote

__all__ = [
    "FilterError",
    "check_depth",
    "foreign",
    "span",
    "suggest",
    "syntax_error",
    "unknown",
]


class FilterError(UsageError):
    """A filter without a meaning. `start` and `end` are the columns (from 0) of the mistake."""

    def __init__(self, message: str, text: str, start: int, end: int) -> None:
        super().__init__(f"filter, column {start + 1}: {message}")
        self.text = text
        self.start = start
        self.end = max(end, start + 1)

    def pointer(self) -> str:
        """Return two lines: the filter, and carets below the mistake."""
        shown = "".join(c if c.isprintable() else "?" for c in self.text)
        return f"{shown}\n{' ' * self.start}{'^' * (self.end - self.start)}"


def span(token: Token) -> tuple[int, int]:
    """Return where `token` is in the text: its first column, and the column after its last."""
    start = token.start_pos or 0
    return start, token.end_pos or start + len(token)


def suggest(word: str, known: list[str]) -> str:
    """Return "; did you mean ...?" with the nearest of `known`, or "" if none is near."""
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
"""Words of pcap-filter(7) that this language lacks, and what to do instead."""

_BYTES = re.compile(r"\b(?:tcp|udp|ip6?|icmp6?|ether|arp|link|wlan)\s*\[[^\]]*\]?")


def foreign(tokens: Sequence[Token], text: str) -> FilterError | None:
    """Return what to say about a word of pcap-filter(7) that is none here; None: nothing."""
    for index, token in enumerate(tokens):
        asked = _FOREIGN.get(str(token)) if token.type == "VALUE" else None
        if asked is not None and not (index and tokens[index - 1].type in _VALUED):
            message = f"pcap-filter's {plain(token)!r} is not supported: {asked}"
            return FilterError(message, text, *span(token))
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
"""Types of words that a value must follow."""


def unknown(token: Token, text: str) -> FilterError:
    """Return what to say about a value that has no word before it."""
    if token in ("named", "unnamed"):
        return FilterError(f"write 'how {token}'", text, *span(token))
    hint = suggest(token, WORDS)
    if not hint and re.fullmatch(r"\d+", token):
        hint = f"; a number needs a word before it, as in 'port {token}' or 'pid {token}'"
    elif not hint and re.fullmatch(r"[0-9a-fA-F:.]+", token):
        hint = f"; an address needs a word before it, as in 'host {token}'"
    elif not hint:
        hint = f"; for the name of a program write 'pname {quote(plain(token))}'"
    return FilterError(f"unknown word {plain(token)!r}{hint}", text, *span(token))


def check_depth(tokens: Sequence[Token], text: str) -> None:
    """Raise FilterError if parentheses are nested deeper than the parser may recurse."""
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
                *span(token),
            )


_EXPECTED = {
    "AND": "'and'", "OR": "'or'", "NOT": "'not'", "LPAR": "'('", "RPAR": "')'",
    "VALUE": "a value", "ADDRESS_WORD": "'host' or 'port'",
}  # fmt: skip


def syntax_error(error: UnexpectedInput, tokens: Sequence[Token], text: str) -> FilterError:
    """Return what is wrong with `text`. `tokens` are its words, if it has only words."""
    if isinstance(error, UnexpectedCharacters):
        found = _bytes_wanted(text)
        if found is not None:
            return found
        at = error.pos_in_stream or 0
        if text[at] == '"':
            return FilterError("an unclosed quote", text, at, len(text))
        return FilterError(f"{text[at]!r} means nothing here", text, at, at + 1)
    assert isinstance(error, UnexpectedToken)
    token = error.token
    found = foreign(tokens, text)
    if found is not None:
        return found
    wanted = error.expected
    if token.type == "$END":
        last = tokens[-1]
        start, end = span(last)
        if last.type in _VALUED:
            return FilterError(f"'{last}' needs a value after it", text, start, end)
        if last.type in ("AND", "OR", "NOT"):
            return FilterError(f"'{last}' needs something after it", text, start, end)
        return FilterError("an unclosed parenthesis", text, text.rindex("("), len(text))
    index = next(i for i, one in enumerate(tokens) if one.start_pos == token.start_pos)
    before = tokens[index - 1] if index else None
    if before is not None and before.type == "VALUE" and not _has_word(tokens, index - 1):
        return unknown(before, text)
    if token.type == "RPAR":
        message = "')' without '('" if "VALUE" not in wanted else "nothing before ')'"
    elif token.type == "VALUE" and before is not None and before.type != "VALUE":
        return unknown(token, text)
    elif before is not None and "VALUE" in wanted and token.type != "VALUE" and "NOT" not in wanted:
        message = f"'{before}' needs a value after it; a value that is a word wants quotes"
    elif "AND" in wanted:
        close = suggest(token, ["and", "or"]) if token.type == "VALUE" else ""
        message = f"'and' or 'or' is missing before {plain(token)!r}{close}"
    else:
        words = " or ".join(_EXPECTED[name] for name in _EXPECTED if name in wanted)
        message = f"{plain(token)!r} cannot stand here" + (f"; {words} can" if words else "")
    return FilterError(message, text, *span(token))


def _has_word(tokens: Sequence[Token], index: int) -> bool:
    """Return whether the value at `index` has a word before it, its own or an inherited one."""
    if index and tokens[index - 1].type in _VALUED:
        return True
    return (
        bool(index)
        and tokens[index - 1].type in ("AND", "OR", "NOT")
        and any(token.type in _VALUED for token in tokens[:index])
    )
