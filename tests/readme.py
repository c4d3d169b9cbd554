# SPDX-License-Identifier: MIT
"""The commands of README.md, block by block, as a reader pastes them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["blocks"]

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(text: str | None = None) -> list[list[str]]:
    """Indented blocks as lists of lines; a session that shows its output (`$ ...`) is none."""
    found: list[list[str]] = []
    current: list[str] = []
    for line in [*(text or README.read_text()).splitlines(), ""]:
        if line.startswith("    "):
            current.append(line[4:])
        elif current:
            found.append(current)
            current = []
    return [block for block in found if not block[0].startswith("$ ")]
