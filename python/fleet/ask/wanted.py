# SPDX-License-Identifier: MIT
"""What a question is about, as a condition of SQL and its values."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

from fleet.ask.store import Store
from nlproto.errors import UsageError

__all__ = ["CLIENT", "NAMED", "Wanted", "condition"]

CLIENT = "coalesce(f.initiated, (f.lport, f.laddr) > (f.rport, f.raddr))"
"""Whether this end asked: where nobody told us, the end with the higher port."""

NAMED = f"""
    SELECT f.*, p.name AS program, p.exe, p.cmdline, p.ppid, p.parents, p.user, p.unit, p.container,
        p.container_name, p.image, p.pod, p.namespace, {CLIENT} AS client
    FROM flow f LEFT JOIN proc p USING (host, boot, tgid, start_ns)
"""
"""Flows with the details of their owners."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """All that is given must fit. `on`: the machine; `host`: the other end's address or network."""

    port: int | None = None
    proto: str | None = None
    host: str | None = None
    on: str | None = None
    pid: int | None = None
    pname: str | None = None
    user: str | None = None
    unit: str | None = None
    container: str | None = None
    pod: str | None = None
    domain: str | None = None


_SAME = {
    "on": "host = $on",
    "pid": "tgid = $pid",
    "pname": "$pname IN (program, comm)",
    "unit": "$unit IN (unit, regexp_replace(unit, '\\.service$', ''))",
    "container": "container_name = $container OR starts_with(container, $container)",
    "pod": "pod = $pod",
    "port": "$port IN (lport, rport, nat_lport, nat_rport)",
    "domain": "domain = $domain OR ends_with(domain, '.' || $domain)",
}


def condition(store: Store, wanted: Wanted) -> tuple[str, dict[str, Any]]:
    """Return a condition over NAMED's columns and its values. Raises UsageError."""
    words: dict[str, Any] = {}
    parts = ["true"]
    for name, text in _SAME.items():
        value = getattr(wanted, name)
        if value is not None:
            parts.append(f"({text})")
            words[name] = value.lower().rstrip(".") if name == "domain" else value
    if wanted.proto is not None:
        parts.append(f"protocol = {17 if wanted.proto == 'udp' else 6}")
    if wanted.user is not None:
        parts.append('("user" = $user OR CAST(uid AS VARCHAR) = $user)')
        words["user"] = wanted.user
    if wanted.host is not None:
        parts.append(
            "(raddr IN (SELECT unnest($far)) OR nat_raddr IN (SELECT unnest($far))"
            " OR forwarded AND laddr IN (SELECT unnest($far)))"
        )
        words["far"] = _addresses(store, wanted.host)
    return " AND ".join(parts), words


def _addresses(store: Store, text: str) -> list[str]:
    """Those addresses of the store that are in a network."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise UsageError(f"'{text}' is neither an IP address nor a network") from None
    if network.num_addresses == 1:
        return [str(network.network_address)]
    found = store.rows(
        "SELECT DISTINCT raddr AS a FROM flow UNION SELECT DISTINCT nat_raddr FROM flow"
        " UNION SELECT DISTINCT laddr FROM flow WHERE forwarded"
    )
    return [row["a"] for row in found if _is_inside(row["a"], network)]


def _is_inside(address: str | None, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address) in network
    except ValueError:  # what a hostile machine calls an address
        return False
