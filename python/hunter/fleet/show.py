# SPDX-License-Identifier: MIT
"""The answers of `hunter fleet` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from hunter.cli.options import FleetOptions
from hunter.show.console import TextRow, put
from hunter.show.text import plain
from hunter.show.units import amount
from nlproto.records.wire import PROTO_NAMES, lib

__all__ = ["closing", "flow_text", "process_text", "rows"]

_NAMES = 8
"""Machines that are named at the end."""
_NUMBERS = ("flows", "packets", "bytes", "received", "sent", "machines", "connections")


def rows(console: Console, options: FleetOptions, found: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of a question."""
    heads, make = {
        "who": (("machine", "process", "flow", "packets", "bytes", "last", "how"), _who),
        "ends": (("client", "flow", "server", "bytes", "last"), _ends),
        "map": (("client", "server", "service", "connections", "bytes", "why"), _map),
        "new": (("machine", "process", "new", "first"), _new),
        "usage": (
            (options.by or "process", "machines", "flows", "packets", "received", "sent"),
            _usage,
        ),
    }[options.question]
    if found:
        put(console, options.question, heads, [make(one) for one in found], _NUMBERS)


def closing(
    console: Console, total: int, shown: int, hosts: Sequence[Any], truncated: bool
) -> None:
    """Print what the answer does not have: rows, machines, records."""
    if not shown:
        console.print("nothing in that time")
    if total > shown:
        console.print(f"{total - shown:,} more: --limit {total}", style="dim")
    if truncated:
        console.print("the daemon has more flows than it returned: ask for less time", style="dim")
    for what, some in (
        (
            "silent for two minutes, or not read by their exporters",
            [one for one in hosts if one.silent_s],
        ),
        ("lost records", [one for one in hosts if one.lost]),
    ):
        if some:
            names = ", ".join(plain(one.name) for one in some[:_NAMES])
            more = f" and {len(some) - _NAMES} more" if len(some) > _NAMES else ""
            console.print(f"{what}: {names}{more} ({len(some)} of {len(hosts)} machines)")


def process_text(one: Mapping[str, Any]) -> str:
    """A process, and what it runs in."""
    name = one.get("program") or one.get("comm")
    if not one["tgid"]:
        return f"- ({plain(one['how'] or '')})"
    place = one["container_name"] or one["container"] or one["unit"] or ""
    text = f"{plain(name or '')}.{one['tgid']}"
    return f"{text} {plain(place)[:40]}" if place else text


def flow_text(one: Mapping[str, Any], protocol: int) -> str:
    """Both addresses of a flow as its own end sees them."""
    name = PROTO_NAMES.get(protocol, str(protocol))
    near, far = plain(one["laddr"] or ""), plain(one["raddr"] or "")
    return f"{name} {near}.{one['lport']} <> {far}.{one['rport']}"


def _time(ns: int) -> str:
    return f"{datetime.fromtimestamp(ns / 1e9):%m-%d %H:%M:%S}"


def _bytes(count: int) -> str:
    return amount(count, "bin-bytes")


def _who(one: Mapping[str, Any]) -> TextRow:
    flow = flow_text(one, one["protocol"])
    if one["nat_laddr"]:
        became = (one["nat_laddr"], one["nat_lport"], one["nat_raddr"], one["nat_rport"])
        flow += " (NAT: {}.{} <> {}.{})".format(*(plain(str(part)) for part in became))
    how = plain(one["how"] or "") + (" AMBIGUOUS" if one["flags"] & lib.SNIFFER_F_AMBIGUOUS else "")
    owner = Text(process_text(one), style="bold green" if one["tgid"] else "yellow")
    packets = one["packets_in"] + one["packets_out"]
    return [
        plain(one["host"]),
        owner,
        flow + (f" [{plain(one['domain'])}]" if one["domain"] else ""),
        f"{packets:,}",
        _bytes(one["bytes_in"] + one["bytes_out"]),
        _time(one["last_ns"]),
        how,
    ]


def _side(one: Mapping[str, Any] | None, row: Mapping[str, Any]) -> Text:
    if one is None:
        why = "several machines fit: AMBIGUOUS" if row["ambiguous"] else f"- ({row['reason']})"
        return Text(why, style="yellow")
    flag = " AMBIGUOUS" if one["flags"] & lib.SNIFFER_F_AMBIGUOUS else ""
    return Text(f"{plain(one['host'])} {process_text(one)}{flag}", style="bold green")


def _ends(one: Mapping[str, Any]) -> TextRow:
    known = one["client"] or one["server"]
    return [
        _side(one["client"], one),
        flow_text(known, one["protocol"]),
        _side(one["server"], one),
        _bytes(known["bytes_in"] + known["bytes_out"]),
        _time(known["last_ns"]),
    ]


def _map(one: Mapping[str, Any]) -> TextRow:
    return [
        plain(one["client"]),
        plain(one["server"]),
        f"{PROTO_NAMES.get(one['protocol'], one['protocol'])} {one['service']}",
        f"{one['connections']:,}",
        _bytes(one["bytes"]),
        "AMBIGUOUS" if one["ambiguous"] else one["reason"] or "",
    ]


def _new(one: Mapping[str, Any]) -> TextRow:
    what = [plain(str(one[name])) for name in ("remote", "service") if name in one]
    return [
        plain(one["host"]),
        plain(one["program"] or ""),
        " port ".join(what) if len(what) > 1 else "port " + what[0] if what else "program",
        _time(one["first_ns"]),
    ]


def _usage(one: Mapping[str, Any]) -> TextRow:
    name = Text(plain(one["name"] or "-"), style="bold green" if one["name"] else "yellow")
    packets = one["packets_in"] + one["packets_out"]
    sizes = (_bytes(one["bytes_in"]), _bytes(one["bytes_out"]))
    return [name, f"{one['hosts']:,}", f"{one['flows']:,}", f"{packets:,}", *sizes]
