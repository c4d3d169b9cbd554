# SPDX-License-Identifier: MIT
"""The words of the filter language, and the limits of one filter."""

from __future__ import annotations

import re

__all__ = [
    "MAX_COST",
    "MAX_DEPTH",
    "MAX_LENGTH",
    "MAX_NAME",
    "NAME_COST",
    "NAME_WORDS",
    "WORDS",
    "plain",
    "quote",
]

MAX_LENGTH = 4096
"""The most characters in a filter."""
MAX_DEPTH = 50
"""How deep parentheses and `not` may be nested."""
MAX_COST = 512
"""The most tests in one filter. A test of NAME_WORDS counts as NAME_COST."""
NAME_WORDS = ("pname", "exe", "cmdline", "container", "pod", "unit", "parent")
"""Words about a process, which a name or pattern follows."""
NAME_COST = 4
"""How many tests a test of NAME_WORDS counts as."""
MAX_NAME = 256
"""The most characters in such a name. The kernel's names have at most 255 bytes."""

WORDS = (
    "tcp udp ip ip6 host net mask port portrange src dst inbound outbound and or not "
    "pid pname uid netns how container unit pod parent cmdline exe domain ifindex less greater"
).split()
"""All words of the language. A name that is one of them must be quoted."""


def quote(value: str) -> str:
    """Return `value` as one word of the language, whatever it contains."""
    if re.fullmatch(r"[\w./:*?\[\]@+-]+", value) and value not in WORDS:
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def plain(token: str) -> str:
    """Return what the word `token` means: the word without its quotes."""
    if token.startswith('"'):
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    return str(token)
