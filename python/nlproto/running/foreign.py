# SPDX-License-Identifier: MIT
"""Finds other people's packages with the names of ours."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

__all__ = ["foreign_packages"]


def foreign_packages() -> list[str]:
    """Return one line for each of `daemon` and `hunter` that is not the package beside this one.

    PyPI has other packages with both names. Two distributions in one environment overwrite each
    other.
    """
    ours = Path(__file__).resolve().parents[2]
    lines = []
    for name in ("daemon", "hunter"):
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            found = None
        if found is None:
            continue
        places = list(found.submodule_search_locations or [found.origin or ""])
        strange = [place for place in places if Path(place).resolve().parent != ours]
        strange += [
            str(Path(place, mark))
            for place in places
            for mark in _FOREIGN_FILES[name]
            if os.path.exists(Path(place, mark))  # False if one may not look
        ]
        if strange:
            lines.append(
                f"{strange[0]} is another project's {name!r}: install packet-hunter in an"
                " environment of its own (pipx install packet-hunter)"
            )
    return lines


# Files that python-daemon and PyPI's hunter put into a directory of the same name.
_FOREIGN_FILES = {
    "daemon": ("daemon.py", "pidfile.py", "runner.py"),
    "hunter": ("actions.py", "predicates.py", "tracer.py"),
}
