# SPDX-License-Identifier: MIT
"""Which services talk to which: connections summed up by what both ends belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fleet.collect.rollup import network_of

__all__ = ["service_map"]


def service_map(found: Iterable[Mapping[str, Any]], by: str) -> list[dict[str, Any]]:
    """Return sums of what ends() found, most bytes first.

    {"client", "server": names, "service": port, "protocol", "connections", "bytes", "ambiguous",
    "reason"}. An end that is not known is its domain, else its network, and `reason` says why.
    """
    sums: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in found:
        client, server = one["client"], one["server"]
        known = client or server
        names = [_name(side, by) if side else _far(known) for side in (client, server)]
        port = server["lport"] if server else client["rport"]
        key = (*names, port, one["protocol"], one["reason"], one["ambiguous"])
        row = sums.setdefault(
            key,
            {
                "client": names[0],
                "server": names[1],
                "service": port,
                "protocol": one["protocol"],
                "connections": 0,
                "bytes": 0,
                "ambiguous": one["ambiguous"],
                "reason": one["reason"],
            },
        )
        row["connections"] += 1
        row["bytes"] += known["bytes_out"] + known["bytes_in"]
    return sorted(sums.values(), key=lambda row: -row["bytes"])


def _name(side: Mapping[str, Any], by: str) -> str:
    """What the end belongs to; where it is none of that kind, its program."""
    value = {
        "process": side["program"],
        "host": side["host"],
        "unit": side["unit"],
        "container": side["container_name"] or side["container"],
        "pod": side["pod"],
        "user": side["user"],
    }[by]
    return str(value or side["program"] or side["how"])


def _far(side: Mapping[str, Any]) -> str:
    if side["domain"]:
        return str(side["domain"])
    try:
        return network_of(side["raddr"])
    except ValueError:  # what a hostile machine calls an address
        return str(side["raddr"])
