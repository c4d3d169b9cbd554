# SPDX-License-Identifier: MIT
"""The C workers: compiled when their source is newer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "c"
BINARIES = Path(__file__).parents[3] / "build" / "attribution"


def compile_workers(into: Path) -> Path:
    """Compile the C workers that are missing or older than their source; returns the directory."""
    into.mkdir(parents=True, exist_ok=True)
    header = (SOURCES / "truth.h").stat().st_mtime
    for source in sorted(SOURCES.glob("*.c")):
        target = into / source.stem
        if target.exists() and target.stat().st_mtime > max(header, source.stat().st_mtime):
            continue
        partial = into / f"{source.stem}.{os.getpid()}"
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-o", partial, source, "-lpthread"], check=True, timeout=300
        )
        partial.rename(target)
    return into
