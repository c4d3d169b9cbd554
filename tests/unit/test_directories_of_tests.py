# SPDX-License-Identifier: MIT
"""Directories of tests that other users may enter."""

from __future__ import annotations

from pathlib import Path

from places import open_to_all


def test_what_all_users_share_stays_as_it_is(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "shared/own"
    own.mkdir(parents=True)
    shared.chmod(0o1777)
    own.chmod(0o700)
    assert open_to_all(own) == own
    assert [part.stat().st_mode & 0o7777 for part in (own, shared)] == [0o755, 0o1777]
