# SPDX-License-Identifier: MIT
"""A Question as SQL for the history's database."""

from __future__ import annotations

from typing import Any

from daemon.history.memory import Question, network_words

__all__ = ["conditions", "ways"]


def ways(question: Question) -> list[tuple[list[str], list[Any]]]:
    """Alternative conditions that exclude each other, with their values. Each uses an index."""
    if question.ends is not None:
        (family, one, port), (_, other, far) = question.ends
        found = dict.fromkeys([(port, far, family, one, other), (far, port, family, other, one)])
        seen = "lport = ? AND rport = ? AND family = ? AND laddr = ? AND raddr = ?"
        became = (
            "nat_lport <> 0 AND nat_lport = ? AND nat_rport = ? AND family = ?"
            " AND nat_laddr = ? AND nat_raddr = ?"
        )
        return [([words], list(way)) for words in (seen, became) for way in found]
    if question.port is not None:
        port = question.port
        became = "nat_lport <> 0 AND nat_lport = ? AND ? NOT IN (lport, rport)"
        its_far = "nat_lport <> 0 AND nat_rport = ? AND ? NOT IN (nat_lport, lport, rport)"
        return [
            (["lport = ?"], [port]),
            (["rport = ? AND lport <> ?"], [port, port]),
            ([became], [port, port]),
            ([its_far], [port, port]),
        ]
    return [([], [])]


def conditions(question: Question) -> tuple[list[str], list[Any]]:
    """Return what every row must fit, as SQL and values; without the end of the time."""
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
    if question.domains is not None:
        wheres.append(f"domain IN ({', '.join('?' * len(question.domains))})")
        values += [one - (one >> 63 << 64) for one in question.domains]
    if question.uid is not None:
        wheres.append("tgid <> 0")
    if question.ends is not None and question.port is not None:
        wheres.append("? IN (lport, rport, nat_lport, nat_rport)")
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
        near = " OR ".join(
            f"{nat}raddr BETWEEN ? AND ? OR forwarded AND {nat}laddr BETWEEN ? AND ?"
            for nat in ("", "nat_")
        )
        wheres.append(f"family = ? AND ({near})")
        values += [family, *(low, high) * 4]
    return wheres, values
