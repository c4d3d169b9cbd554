# SPDX-License-Identifier: MIT
"""The comment with a packet's owner in a pcapng file, for people and programs.

    packet-hunter: curl.4711 uid=1000 exe=/usr/bin/curl unit=cron.service how=context start_ns=...
    packet-hunter: nobody, no_socket hdr_len=52

A blank separates words. A word with blanks, or with a quotation mark at its beginning, is quoted.
Names are escaped (text.escaped), so that no name can pass for another word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hunter.show.columns import COLUMNS, PEOPLE, TEXTS
from hunter.show.text import escaped, unescaped

__all__ = ["MADE", "comment_of", "is_owner_comment", "read_comment", "word"]

_PREFIX = "packet-hunter: "
_NOBODY = "nobody,"
MADE = " (headers made from the record)"
_MAX = 65_000  # bytes; an option has at most 65,535
_ELSEWHERE = ("time", "pid", "comm", "netns", "interface", "ifindex", "community_id")
"""Columns at the beginning of the comment, or with another place in the file."""
_EARLY = (
    *("uid", "exe", "container", "container_name", "image", "pod", "unit", "how", "flags"),
    *("dir", "proto", "src", "sport", "dst", "dport", "len", "tcp_flags", "hdr_len"),
    *("segments", "start_ns", "ppid", "tid", "creator", "cookie"),
)
_LATE = ("parents", "holders", "cmdline")
_WORDS = (
    *_EARLY,
    *(name for name in COLUMNS if name not in (*_EARLY, *_LATE, *_ELSEWHERE)),
    *_LATE,
)
"""Columns in order after the name. A comment that would be too long loses the last ones first.

A list of processes has a word for each process, "holder=" for holders.
"""
_ONE_OF = {name.removesuffix("s"): name for name in PEOPLE}
_NAMES = TEXTS - {"flags"}
_TOKEN = re.compile(r'(?:"([^"]*)"|([^"\s]\S*))(?: |$)')


def comment_of(values: Mapping[str, Any], made: bool = False) -> str:
    """Return the comment for one row of columns.cells(), without what the packet itself has.

    `made`: the packet's headers are not real.
    """
    pid = values["pid"]
    if pid is None:
        words = [_NOBODY, str(values["how"])]
    else:
        words = [word(f"{escaped(values['comm'] or '')}.{pid}")]
    for name in _WORDS:
        if name in PEOPLE:
            for one in values.get(name) or ():
                words.append(word(f"{name[:-1]}={escaped(str(one['comm']))}.{one['pid']}"))
            continue
        value = values.get(name)
        if value is None or name == "how" and pid is None or name == "segments" and value == 1:
            continue
        if name in _NAMES:
            value = escaped(value)
        elif name == "flags":
            value = value.replace(" ", ",")
        words.append(word(f"{name}={value}"))
    tail = MADE if made else ""
    while len((text := _PREFIX + " ".join(words) + tail).encode()) > _MAX:
        del words[-1]
    return text


def word(text: str) -> str:
    """Return `text`, with names in it escaped, as one word of a comment."""
    if text.startswith('"') or any(map(str.isspace, text)):
        return '"' + text.replace('"', "\\x22") + '"'
    return text


def is_owner_comment(comment: str) -> bool:
    """Return whether comment_of() may have made it; annotate's comments name both ends."""
    return comment.startswith(_PREFIX) and not comment.startswith(
        (_PREFIX + "from ", _PREFIX + "to ")
    )


def read_comment(comment: str) -> tuple[dict[str, Any], bool]:
    """Return what comment_of() was given: names of columns with text, and `made`.

    Raises ValueError.
    """
    made = comment.endswith(MADE)
    tokens = _tokens(comment.removeprefix(_PREFIX).removesuffix(MADE))
    row: dict[str, Any] = {}
    first = next(tokens, "")
    if first == _NOBODY:
        row["how"] = next(tokens, "")
    else:
        comm, dot, pid = first.rpartition(".")
        if not dot:
            raise ValueError("its comment names no process")
        row |= {"comm": unescaped(comm), "pid": pid}
    people: dict[str, list[dict[str, Any]]] = {}
    for word in tokens:
        name, _, value = word.partition("=")
        if name in _ONE_OF:
            comm, _, pid = value.rpartition(".")
            if not (pid.isascii() and pid.isdigit()) or len(pid) > 10:
                raise ValueError(f"its comment names a {name} without a pid")
            one = {"comm": unescaped(comm), "pid": int(pid)}
            people.setdefault(_ONE_OF[name], []).append(one)
        elif name not in _WORDS or name in row:
            raise ValueError(f"its comment has a word {word[:40]!r}")
        elif name == "flags":
            row[name] = value.replace(",", " ")
        else:
            row[name] = unescaped(value) if name in _NAMES else value
    return row | people, made


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError("its comment is damaged")
        yield found[2] if found[1] is None else found[1]
        at = found.end()
