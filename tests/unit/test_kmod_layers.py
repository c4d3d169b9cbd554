# SPDX-License-Identifier: MIT
"""The module's files: each includes only what lies below it, and none is long."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

KMOD = Path(__file__).parents[2] / "kmod"
LINES_MAX = 500


def includes(path: Path) -> set[str]:
    """Names, without their ends, of the module's files whose headers a file includes."""
    names = re.findall(r'^#include "(\w+)\.h"', path.read_text(), re.MULTILINE)
    return {name for name in names if (KMOD / f"{name}.h").exists()} - {path.stem}


def test_no_circle_of_includes() -> None:
    files = sorted(KMOD.glob("*.[ch]"))
    graph: dict[str, set[str]] = {}
    for path in files:
        graph.setdefault(path.stem, set()).update(includes(path))
    assert len(graph) > 10
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_file_is_long() -> None:
    long = {
        path.name: lines
        for path in KMOD.glob("*.[ch]")
        if (lines := len(path.read_text().splitlines())) > LINES_MAX
    }
    assert not long, f"split by concern what has more than {LINES_MAX} lines"
