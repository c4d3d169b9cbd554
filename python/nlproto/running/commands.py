# SPDX-License-Identifier: MIT
"""How a person starts the programs of this installation: a command that works when it is typed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

__all__ = ["as_root"]

_SUDO_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def as_root(program: str, python: str = sys.executable) -> str:
    """Return how root starts "packet-hunter" or "packet-hunterd"; `python` is who runs now."""
    if shutil.which(program, path=_SUDO_PATH):
        return f"sudo {program}"
    beside = Path(python).with_name(program)
    if not beside.exists():
        module = "daemon" if program.endswith("d") else "hunter"
        return f"sudo {python} -m {module}"
    here = os.path.relpath(beside)
    return f"sudo {beside if here.startswith('..') else here}"
