# SPDX-License-Identifier: MIT
"""A Question as SQL over the history's file."""

from __future__ import annotations

from typing import Any

from daemon.history.memory import Question, network_words

__all__ = ["conditions", "ways"]


def ways(question: Question) -> list[tuple[list[str], list[Any]]]:
    """Conditions and values that exclude each other, each with an index of its own."""
    if question.ends is not None:
        words = "lport = ? AND rport = ? AND family = ? AND laddr = ? AND raddr = ?"
        (family, one, port), (_, other, far) = question.ends
        ways = [(port, far, family, one, other), (far, port, family, other, one)]
        return [([words], list(way)) for way in dict.fromkeys(ways)]
    if question.port is not None:
        port = question.port
        return [(["lport = ?"], [port]), (["rport = ? AND lport <> ?"], [port, port])]
    return [([], [])]


def conditions(question: Question) -> tuple[list[str], list[Any]]:
    """Return what every row must fit, as SQL and its values; the end of the time is not in it."""
    wheres: list[str] = []
    values: list[Any] = []
    for name, value in (
        ("proto", question.proto),
        ("tgid", question.pid),
        ("comm", question.comm),
        ("uid", question.uid),
        ("netns", question.netns),
    ):
        if value is not None:
            wheres.append(f"{name} = ?")
            values.append(value)
    if question.uid is not None:
        wheres.append("tgid <> 0")
    if question.ends is not None and question.port is not None:
        wheres.append("? IN (lport, rport)")
        values.append(question.port)
    if question.since_ns is not None:
        wheres.append("last_ns >= ?")
        values.append(question.since_ns)
    if question.until_ns is not None:
        wheres.append("first_ns <= ?")
        values.append(question.until_ns)
    if question.at_ns is not None:
        wheres.append("first_ns <= ? AND last_ns >= ?")
        values += [question.at_ns, question.at_ns]
    if question.host is not None:
        family, _, _ = network_words(question.host)
        low = question.host.network_address.packed.ljust(16, b"\0")
        high = question.host.broadcast_address.packed.ljust(16, b"\0")
        near = "raddr BETWEEN ? AND ? OR forwarded AND laddr BETWEEN ? AND ?"
        wheres.append(f"family = ? AND ({near})")
        values += [family, low, high, low, high]
    return wheres, values
