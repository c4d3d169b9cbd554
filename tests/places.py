# SPDX-License-Identifier: MIT
"""Directories of a test that other users may enter."""

from __future__ import annotations

from pathlib import Path

__all__ = ["open_to_all"]


def open_to_all(directory: Path) -> Path:
    """`directory`, which other users may enter now; what is not the tests' own stays as it is.

    pytest closes its directories to others: `directory` and those above it, up to the first that
    all users share (/tmp) or may enter already.
    """
    for part in (directory, *directory.parents):
        mode = part.stat().st_mode
        if mode & 0o005 == 0o005:
            break
        part.chmod(mode & 0o7777 | 0o055)
    return directory
