# SPDX-License-Identifier: MIT
"""SECURITY.md: each thing that an attacker may try has tests that hold it, and they exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "SECURITY.md").read_text()


def _section(title: str) -> str:
    return SECURITY.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def _rows() -> list[list[str]]:
    lines = _section("Which test holds each line").split("\n")
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return [["", *row] if len(row) == 2 else row for row in rows[2:]]


def test_every_line_names_tests_that_exist() -> None:
    for row in _rows():
        named = re.findall(r"`(tests/[^`]+)::(test_\w+)`", row[-1])
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), test


def test_everything_that_is_told_has_a_line() -> None:
    told = re.findall(
        r"^- \*\*(.+?)\*\*", _section("What an attacker may try, and what stops it"), re.M
    )
    assert len(told) > 10
    lines = {row[0] for row in _rows()}
    assert {one.rstrip(".") for one in told} == lines - {""}
