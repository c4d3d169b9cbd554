# SPDX-License-Identifier: MIT
"""Whether a container or unit that a filter names has any process now."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

from nlproto.filters.filter import Filter
from nlproto.filters.nodes import is_container
from nlproto.host.procfs import container_of, pids, unit_of

__all__ = ["absent"]

_NAMED = re.compile(r'\b(container|unit) ("(?:[^"\\]|\\.)*"|\S+?)(?=[)\s]|$)')


def absent(filter: Filter, proc: Path = Path("/proc")) -> list[str]:
    """Return one line for each container or unit in `filter` that no process is in."""
    wanted = [(word, _plain(name)) for word, name in _NAMED.findall(str(filter))]
    if not wanted:
        return []
    paths = set(_cgroups(proc))
    lines = []
    for word, name in dict.fromkeys(wanted):
        if word == "container":
            there = {place for path in paths if (place := container_of(path))}
            found = any(is_container(place, name) for place in there)
        else:
            there = {place for path in paths if (place := unit_of(path))}
            found = any(
                fnmatch.fnmatchcase(place, name)
                or fnmatch.fnmatchcase(place.rpartition(".")[0], name)
                for place in there
            )
        if not found:
            known = ", ".join(sorted(there)[:5]) + (", ..." if len(there) > 5 else "")
            lines.append(
                f"no process is in a {word} {name!r} now; waiting for one"
                + (f" (there are: {known})" if known else "")
            )
    return lines


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
