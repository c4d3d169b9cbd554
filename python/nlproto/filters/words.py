# SPDX-License-Identifier: MIT
"""The words of the filter language, and how much of it one filter may be."""

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
"""Characters of a filter's text."""
MAX_DEPTH = 50
"""Parentheses and `not` within each other."""
MAX_COST = 512
"""Tests in one filter; those of NAME_WORDS count as NAME_COST."""
NAME_WORDS = ("pname", "exe", "cmdline", "container", "pod", "unit", "parent")
"""Words for what is known of a process, each with a name or pattern behind it."""
NAME_COST = 4
MAX_NAME = 256
"""Characters of such a name; the kernel's names have at most 255 bytes."""

WORDS = (
    "tcp udp ip ip6 host net mask port portrange src dst inbound outbound and or not "
    "pid pname uid netns how container unit pod parent cmdline exe ifindex less greater"
).split()


def quote(value: str) -> str:
    """Return `value` as one word of the language, whatever is in it."""
    if re.fullmatch(r"[\w./:*?\[\]@+-]+", value) and value not in WORDS:
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def plain(token: str) -> str:
    """Return what the word `token` means: without its quotes, if it has some."""
    if token.startswith('"'):
        return re.sub(r"\\(.)", r"\1", token[1:-1])
    return str(token)
