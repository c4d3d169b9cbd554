# SPDX-License-Identifier: MIT
"""What `who` found, summed up by name, unit, container, user, far host or port (--by)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from hunter.cli.options import WhoOptions
from hunter.show import names
from hunter.show.console import TextRow, put
from hunter.show.programs import place
from hunter.show.text import plain
from hunter.who.who_show import clock, service_of, without_legs

__all__ = ["show_groups", "summed"]

_ROWS = 50
_COUNTS = ("processes", "sockets now", "flows", "packets", "bytes", "resent", "failed", "reset")
_COLUMNS = (*_COUNTS, "first", "last")
_RARE = ("resent", "failed", "reset")
_FIELDS = (
    *("processes", "sockets", "flows", "packets", "bytes"),
    *("retransmits", "failed", "resets"),
)

_ENDS = ("netns", "proto", "local", "lport", "remote", "rport")
"""One flow. Its first packets have the listener's cookie, the others the accepted socket's."""

Entry = Mapping[str, Any]


@dataclass(slots=True)
class _Group:
    pids: set[tuple[int, int]] = field(default_factory=set)
    sockets: set[tuple[Any, ...]] = field(default_factory=set)
    flows: set[tuple[Any, ...]] = field(default_factory=set)
    packets: int = 0
    bytes: int = 0
    retransmits: int | None = None
    failed: int = 0
    resets: int = 0
    first: float | None = None
    last: float | None = None

    def add_flow(self, flow: Entry) -> None:
        self.flows.add(tuple(flow[name] for name in _ENDS))
        self.packets += flow["packets_in"] + flow["packets_out"]
        self.bytes += flow["bytes_in"] + flow["bytes_out"]
        if flow.get("retransmits") is not None:
            self.retransmits = (self.retransmits or 0) + flow["retransmits"]
        self.failed += flow.get("outcome") in ("refused", "unanswered")
        self.resets += flow.get("outcome") in ("reset", "aborted")
        self.first = min(self.first or flow["first"], flow["first"])
        self.last = max(self.last or flow["last"], flow["last"])


def summed(answer: Mapping[str, Any], options: WhoOptions) -> dict[str, Any]:
    """Return the sums of op "who"'s reply: most bytes first, then most sockets."""
    processes = {(one["tgid"], one["start_ns"]): one for one in answer["processes"]}
    groups: dict[str, _Group] = {}
    for entry in (*answer["owners"], *without_legs(answer["flows"])):
        process = processes.get((entry["pid"], entry["start_ns"]))
        name = _name(entry, process, options)
        if name is None:
            continue
        group = groups.setdefault(name, _Group())
        if entry["pid"] is not None:
            group.pids.add((entry["pid"], entry["start_ns"]))
        if "how" in entry:
            group.add_flow(entry)
        else:
            ends = (entry["address"], entry["port"], entry["remote"], entry["rport"])
            group.sockets.add((entry["netns"], entry["cookie"], entry["proto"], *ends))
    ordered = sorted(groups.items(), key=lambda one: (-one[1].bytes, -len(one[1].sockets), one[0]))
    return {
        "by": options.by,
        "groups": [
            {
                "name": name,
                "processes": len(group.pids),
                "sockets": len(group.sockets),
                "flows": len(group.flows),
                "packets": group.packets,
                "bytes": group.bytes,
                "retransmits": group.retransmits,
                "failed": group.failed,
                "resets": group.resets,
                "first": group.first,
                "last": group.last,
            }
            for name, group in ordered[: options.limit]
        ],
        "groups_total": len(ordered),
        "owners_total": answer["owners_total"],
        "total": answer["total"],
        "truncated": answer["truncated"],
        "since": answer["since"],
    }


def _name(entry: Entry, process: Entry | None, options: WhoOptions) -> str | None:
    """Return the group's name; "" if it has none, None: it belongs to no group."""
    known = process or {}
    match options.by:
        case "name":
            return str(entry["comm"])
        case "unit":
            return str(known.get("unit", ""))
        case "container":
            container, name = known.get("container", ""), known.get("container_name", "")
            return place(container, name, known.get("pod", ""), "")
        case "user":
            return "" if entry["uid"] is None else names.user(entry["uid"])
        case "host":
            return None if entry["remote"] is None else str(entry["remote"])
        case _:
            local, remote = service_of(
                entry["port" if "port" in entry else "lport"], entry["rport"], options.port
            )
            return f"{entry['proto']} {remote if local is None else local}"


def show_groups(
    answer: Mapping[str, Any], console: Console, now: float, options: WhoOptions
) -> None:
    """Print the sums as a table."""
    sums = summed(answer, options)
    rows: list[TextRow] = []
    limit = options.limit or _ROWS
    for one in sums["groups"][:limit]:
        times = ["" if one[name] is None else clock(one[name], now) for name in ("first", "last")]
        counts = [one[name] for name in _FIELDS]
        name = Text(plain(one["name"]) or "-", style="bold green" if one["name"] else "yellow")
        rows.append([name, *(f"{count:,}" if count else "" for count in counts), *times])
    if not rows:
        console.print("nobody")
        return
    columns = (str(options.by), *_COLUMNS)
    used = [at for at, name in enumerate(columns) if name not in _RARE or any(r[at] for r in rows)]
    shown = [[row[at] for at in used] for row in rows]
    put(console, f"by {options.by}", [columns[at] for at in used], shown, _COUNTS)
    more = sums["groups_total"] - len(rows)
    if more > 0:
        console.print(f"{more:,} more: --limit {sums['groups_total']}", style="dim")
    for what, total, found in (
        ("sockets", sums["owners_total"], answer["owners"]),
        ("flows", sums["total"], answer["flows"]),
    ):
        if total > len(found):
            console.print(
                f"of {total:,} {what} these are the {len(found):,} newest: ask for less, as with"
                " --port or --since",
                style="dim",
            )
