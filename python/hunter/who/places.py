# SPDX-License-Identifier: MIT
"""Keeps of `who`'s findings what runs in a unit, a container or a pod."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hunter.cli.options import WhoOptions
from nlproto.filters.nodes import container_names, matcher

__all__ = ["asks_for_place", "in_place"]

Entry = Mapping[str, Any]


def asks_for_place(options: WhoOptions) -> bool:
    """Return whether in_place() must filter the answer."""
    return any(one is not None for one in (options.unit, options.container, options.pod))


def in_place(
    answer: Mapping[str, Any], options: WhoOptions, notify: Callable[[str], None]
) -> dict[str, Any]:
    """Return the answer without what runs elsewhere. `notify` is called if not all was checked."""
    for what, total, found in (
        ("sockets", answer["owners_total"], answer["owners"]),
        ("flows", answer["total"], answer["flows"]),
    ):
        if total > len(found):
            notify(
                f"of {total:,} {what} the {len(found):,} newest were looked at: ask for less, as"
                " with --port or --since"
            )
    processes = [one for one in answer["processes"] if _runs_there(one, options)]
    keys = {(one["tgid"], one["start_ns"]) for one in processes}
    owners = [one for one in answer["owners"] if _any_of(keys, (one, *one["holders"]))]
    flows = [one for one in answer["flows"] if _any_of(keys, (one,))]
    counts = {"owners_total": len(owners), "total": len(flows)}
    return {**answer, "owners": owners, "flows": flows, "processes": processes, **counts}


def _any_of(keys: set[tuple[int, int]], some: Iterable[Entry]) -> bool:
    return any((one["pid"], one["start_ns"]) in keys for one in some)


def _runs_there(process: Entry, options: WhoOptions) -> bool:
    """Return whether a process fits, as with the filter words unit, container and pod."""
    unit, pod = process.get("unit", ""), process.get("pod", "")
    container, name = process.get("container", ""), process.get("container_name", "")
    asked = (
        # systemctl too accepts "nginx" for "nginx.service"
        (options.unit, (unit, unit.rpartition(".")[0]) if unit else ()),
        (options.pod, (pod, pod.partition("/")[2]) if pod else ()),
        (options.container, container_names(container, name, options.container or "")),
    )
    return all(any(map(matcher(word), found)) for word, found in asked if word is not None)
