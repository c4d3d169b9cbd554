# SPDX-License-Identifier: MIT
"""The subject of a question, as a condition of SQL and its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fleet.ask.store import FlowStore
from fleet.ask.translate import is_inside, translate
from nlproto.filters.filter import EVERYTHING, Filter

__all__ = ["CLIENT", "NAMED", "Wanted", "condition"]

CLIENT = "coalesce(initiated, (lport, laddr) > (rport, raddr))"
"""Whether this end began. If no machine knows, the end with the higher port did."""

NAMED = f"""
    SELECT f.*, p.name AS program, p.exe, p.cmdline, p.ppid, p.parents, p.user, p.unit, p.container,
        p.container_name, p.image, p.pod, p.namespace, {CLIENT} AS client
    FROM flow f LEFT JOIN proc p USING (host, boot, tgid, start_ns)
"""
"""Flows with the details of their owners."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Conditions that must all hold."""

    filter: Filter = EVERYTHING
    """A filter for the packets of a flow."""
    on: str | None = None
    """The machine."""
    host: str | None = None
    """Address or network of the other end."""
    user: str | None = None
    """Name or uid, as the machine knows it."""


def condition(store: FlowStore, wanted: Wanted) -> tuple[str, dict[str, Any]]:
    """Return a condition over NAMED's columns and its values; "true" if all flows fit.

    Raises UsageError.
    """
    parts: list[str] = []
    words: dict[str, Any] = {}
    if wanted.filter.root is not None:
        text, words = translate(store, wanted.filter.root)
        parts.append(text)
    if wanted.on is not None:
        parts.append("host = $on")
        words["on"] = _sound(wanted.on)
    if wanted.user is not None:
        parts.append('("user" = $user OR CAST(uid AS VARCHAR) = $user)')
        words["user"] = _sound(wanted.user)
    if wanted.host is not None:
        inside = is_inside(store, wanted.host, words)
        parts.append(
            f"({inside('raddr')} OR {inside('nat_raddr')} OR forwarded AND {inside('laddr')})"
        )
    return " AND ".join(parts) or "true", words


def _sound(text: str) -> str:
    """Return text that the database takes: bytes from a shell may be no UTF-8."""
    return text.encode("utf-8", "replace").decode()
