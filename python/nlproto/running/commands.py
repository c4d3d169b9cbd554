# SPDX-License-Identifier: MIT
"""Commands that start the programs of this installation, as a person would type them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

__all__ = ["as_root", "from_here"]

_SUDO_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def as_root(program: str, python: str = sys.executable) -> str:
    """Return how root starts "packet-hunter" or "packet-hunterd"; `python` is the interpreter."""
    if shutil.which(program, path=_SUDO_PATH):
        return f"sudo {program}"
    beside = Path(python).with_name(program)
    if not beside.exists():
        module = "daemon" if program.endswith("d") else "hunter"
        return f"sudo {python} -m {module}"
    return f"sudo {from_here(beside)}"


def from_here(path: Path) -> str:
    """Return `path` as one would type it: relative if it is below the current directory."""
    try:
        here = os.path.relpath(path)
    except FileNotFoundError:  # the current directory was removed
        here = ".."
    return str(path) if here.startswith("..") else here
