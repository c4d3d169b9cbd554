# SPDX-License-Identifier: MIT
"""Tables for people: no blanks at line ends, ASCII where nothing else can be shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich import box
from rich.table import Table

from hunter.show.console import Output


def shown(monkeypatch: pytest.MonkeyPatch, **environment: Any) -> Any:
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    for style in (box.SIMPLE, box.SIMPLE_HEAD):
        table = Table("process", "executable", box=style, title="seen", title_justify="left")
        table.add_row("curl.5", "x" * 40)
        table.add_row("a.6", "")
        Output(file=file, width=90).print(table)
    file.seek(0)
    return file.read()


@pytest.mark.parametrize(
    "environment",
    [
        {"LANG": "C"},
        {"LC_ALL": "C", "LANG": "de_DE.UTF-8"},
        {"LC_CTYPE": "POSIX"},
        {"TERM": "dumb", "LANG": "C.UTF-8"},
    ],
)
def test_where_nothing_else_can_be_shown_it_is_ascii(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(monkeypatch, **environment)
    assert text.isascii() and "---" in text and "|" not in text


def test_elsewhere_lines_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\u2500" in shown(monkeypatch, LANG="C.UTF-8")


@pytest.mark.parametrize("language", ["C", "C.UTF-8"])
def test_no_line_ends_in_blanks(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, LANG=language)
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    assert "curl.5" in text and "seen" in text.splitlines()[0]


@pytest.mark.parametrize("columns", ["0", "1"])
def test_words_are_there_however_narrow_it_is_said_to_be(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    file = io.StringIO()
    Output(file=file).print("daemon 9.8.7")
    assert file.getvalue() == "daemon 9.8.7\n"
