# SPDX-License-Identifier: MIT
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from daemon.history.store import Store
from remembering import Clocks

# A busy machine is no failure.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> str:
    """Where a history's database may be."""
    return str(tmp_path / "history.db")


@pytest.fixture(name="clocks")
def _clocks() -> Clocks:
    return Clocks()


@pytest.fixture(name="store")
def _store(path: str, clocks: Clocks) -> Iterator[Store]:
    store = Store(path, moment=clocks)
    yield store
    store.close()


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sealed hours have several groups of rows even when they are short."""
    monkeypatch.setattr("daemon.history.sealed._GROUP", 16)
