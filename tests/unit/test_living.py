# SPDX-License-Identifier: MIT
"""A container or unit that a filter names and no process is in: said at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hunter.commands.living import absent
from nlproto.filters.parse import parse

ID = "0123456789ab" + "0" * 52


@pytest.fixture
def proc(tmp_path: Path) -> Any:
    for pid, path in enumerate((f"/docker/{ID}", "/system.slice/nginx.service", "/"), 10):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cgroup").write_text(f"1:name=systemd:{path}\n0::{path}\n")
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp",
        "container 0123",
        "container docker:0123",
        "unit nginx",
        'unit "ngi*"',
        "not unit nginx",
    ],
)
def test_those_that_are_there_are_not_spoken_of(text: str, proc: Any) -> None:
    assert absent(parse(text), proc) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("container 0124", "no process is in a container '0124' now"),
        ("tcp and (container web or port 80)", "container 'web' now"),
        ('container "a b"', "container 'a b' now"),
        ("unit apache", "unit 'apache' now; waiting for one (there are: nginx.service)"),
    ],
)
def test_those_that_are_not_are_named_with_what_there_is(text: str, words: str, proc: Any) -> None:
    [line] = absent(parse(text), proc)
    assert words in line
