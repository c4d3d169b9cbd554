# SPDX-License-Identifier: MIT
"""Rows as documents of the Elastic Common Schema, and back.

https://www.elastic.co/guide/en/ecs/: one event for each packet. Columns without a field in the
schema are under `packet_hunter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["document", "is_document", "row_of"]

_FIELDS = {
    "time": "@timestamp",
    "dir": "network.direction",
    "proto": "network.transport",
    "src": "source.ip",
    "sport": "source.port",
    "dst": "destination.ip",
    "dport": "destination.port",
    "nat_src": "source.nat.ip",
    "nat_sport": "source.nat.port",
    "nat_dst": "destination.nat.ip",
    "nat_dport": "destination.nat.port",
    "len": "network.bytes",
    "segments": "network.packets",
    "community_id": "network.community_id",
    "pid": "process.pid",
    "comm": "process.name",
    "exe": "process.executable",
    "cmdline": "process.command_line",
    "sha256": "process.hash.sha256",
    "ppid": "process.parent.pid",
    "tid": "process.thread.id",
    "uid": "user.id",
    "container": "container.id",
    "container_name": "container.name",
    "image": "container.image.name",
}
_OWN = "packet_hunter"
_DIRECTIONS = {"in": "ingress", "out": "egress"}
_BACK = {ecs: name for name, ecs in _DIRECTIONS.items()}
_EVENT = {"kind": "event", "category": ["network"], "type": ["info"], "dataset": "packet_hunter"}
_VERSION = "8.11.0"


def document(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event of one row of columns.cells(), without unknown values."""
    found: dict[str, Any] = {"@timestamp": values["time"], "ecs": {"version": _VERSION}}
    found["event"] = _EVENT
    found["network"] = {"type": "ipv6" if ":" in values["src"] else "ipv4"}
    for name, value in values.items():
        if value is None:
            continue
        if name == "dir":
            value = _DIRECTIONS.get(value, value)
        elif name == "uid":
            value = str(value)  # a keyword of the schema
        _put(found, _FIELDS.get(name, f"{_OWN}.{name}"), value)
    return found


def _put(found: dict[str, Any], path: str, value: Any) -> None:
    *above, last = path.split(".")
    for step in above:
        found = found.setdefault(step, {})
    found[last] = value


def is_document(values: Mapping[str, Any]) -> bool:
    """Return whether document() may have made it."""
    return "ecs" in values and isinstance(values.get(_OWN), dict)


def row_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row that document() was given, without unknown values."""
    row: dict[str, Any] = dict(found[_OWN])
    for name, path in _FIELDS.items():
        value: Any = found
        for step in path.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        if value is not None:
            row[name] = value
    if isinstance(way := row.get("dir"), str):
        row["dir"] = _BACK.get(way, way)
    return row
