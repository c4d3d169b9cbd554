# SPDX-License-Identifier: MIT
"""How a program of this installation is started by root: what is told can be typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nlproto.running import commands
from nlproto.running.commands import as_root


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A python with our two programs beside it, and none where sudo looks."""
    monkeypatch.setattr(commands, "_SUDO_PATH", str(tmp_path / "system"))
    for name in ("venv/python", "venv/packet-hunter", "venv/packet-hunterd"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch(0o755)
    return tmp_path


def test_a_program_beside_python_is_named_by_its_path(
    environment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = str(environment / "venv/python")
    assert as_root("packet-hunterd", python) == f"sudo {environment}/venv/packet-hunterd"
    monkeypatch.chdir(environment)
    assert as_root("packet-hunter", python) == "sudo venv/packet-hunter"


def test_without_such_a_program_python_runs_the_package(environment: Any) -> None:
    python = str(environment / "python")
    assert as_root("packet-hunterd", python) == f"sudo {python} -m daemon"
    assert as_root("packet-hunter", python) == f"sudo {python} -m hunter"


def test_an_installed_program_needs_no_path(environment: Any) -> None:
    (environment / "system").mkdir()
    (environment / "system/packet-hunter").touch(0o755)
    assert as_root("packet-hunter", str(environment / "venv/python")) == "sudo packet-hunter"
