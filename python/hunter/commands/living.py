# SPDX-License-Identifier: MIT
"""Checks whether a container, pod or unit of a filter has any process now."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nlproto.filters.filter import Filter
from nlproto.filters.nodes import container_names, matcher
from nlproto.host.cgroups import place_of
from nlproto.host.containers import ContainerFiles
from nlproto.host.procfs import pids

__all__ = ["absent"]

_NAMED = re.compile(r'\b(container|pod|unit) ("(?:[^"\\]|\\.)*"|\S+?)(?=[)\s]|$)')


def absent(
    filter: Filter, proc: Path = Path("/proc"), files: ContainerFiles | None = None
) -> list[str]:
    """Return a line for each container, pod or unit of `filter` without a process."""
    wanted = [(word, _plain(name)) for word, name in _NAMED.findall(str(filter))]
    if not wanted:
        return []
    files = ContainerFiles() if files is None else files
    paths = set(_cgroups(proc))
    lines = []
    for word, name in dict.fromkeys(wanted):
        fits = matcher(name)
        there: dict[str, str] = {}
        found = False
        for path in paths:
            names = list(_names(word, path, name, files))
            found = found or any(map(fits, names))
            if names:
                there[names[0]] = path
        if not found:
            known = ", ".join(sorted(there)[:5]) + (", ..." if len(there) > 5 else "")
            lines.append(
                f"no process is in a {word} {name!r} now; waiting for one"
                + (f" (there are: {known})" if known else "")
            )
    return lines


def _names(word: str, path: str, wanted: str, files: ContainerFiles) -> Iterator[str]:
    """Return the names of the thing with this cgroup path, the best first."""
    place = place_of(path)
    if word == "unit" and place.unit:
        yield from (place.unit, place.unit.rpartition(".")[0])
    elif place.container:
        told = files.find(place.container, path)
        if word == "container":
            yield from container_names(place.container, told.name, wanted)
        elif word == "pod" and told.pod:
            yield from (told.pod, told.pod.partition("/")[2])


def _cgroups(proc: Path) -> Iterator[str]:
    for pid in pids(proc):
        try:
            text = (proc / str(pid) / "cgroup").read_bytes().decode("utf-8", "backslashreplace")
        except OSError:
            continue
        for line in text.split("\n"):
            yield line.split(":", 2)[-1]


def _plain(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1]) if word.startswith('"') else word
