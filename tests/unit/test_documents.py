# SPDX-License-Identifier: MIT
"""Documents: what they name is there, and the worked packet can be followed."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from nlproto.records import wire
from waiting import there

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    *("README.md", "ARCHITECTURE.md", "SECURITY.md", "CONTRIBUTING.md", "vagrant/README.md"),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)


def known_files() -> set[str]:
    """What git has, and each end of such a path."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True
    )
    names = done.stdout.split()
    return {"/".join(name.split("/")[at:]) for name in names for at in range(name.count("/") + 1)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_functions_that_are_named_are_there(name: str) -> None:
    text, there_are = (ROOT / name).read_text(), known_files()
    assert set(re.findall(r"`([\w./]+\.(?:py|c|h|sh))`", text)) <= there_are
    for function, where in re.findall(r"`([\w.]+)\(\)` in `([\w/]+\.(?:c|py))`", text):
        assert defines(where, function), f"{function} in {where}"


def defines(where: str, name: str) -> bool:
    """Whether a file of C or Python has the function `name`; Class.method in Python."""
    path = next(ROOT / place / where for place in ("", "python") if (ROOT / place / where).exists())
    if path.suffix in (".c", ".h"):
        return re.search(rf"^[^\s#/][^;]*\b{name}\(", path.read_text(), re.MULTILINE) is not None
    holder, _, method = name.rpartition(".")
    tree = ast.parse(path.read_text())
    nodes = [one for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name == holder]
    functions = (ast.FunctionDef, ast.ClassDef)
    return any(
        isinstance(one, functions) and one.name == method
        for node in (nodes if holder else [tree])
        for one in ast.walk(node)
    )


def test_the_worked_packet_can_be_followed() -> None:
    """Each step names a function that its file has, and fields that a record or its head has."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \| ?(.*) ?\|$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 19))
    fields = {*there(wire.RECORD.names), *there(wire.BATCH.names)}
    checked = set()
    for _, step, fills in rows:
        places = re.findall(r"`([\w./]+\.(?:py|c|h))`", step)
        for name in re.findall(r"`([\w.]+)\(\)`", step):
            if places:
                assert any(defines(place, name) for place in places), (name, places)
                checked.add(name)
        named = re.findall(r"`(\w+)`", fills)
        assert {one for one in named if one.islower()} <= fields, fills
    assert len(checked) >= 12


def test_the_glossary_has_each_word_of_the_project_in_order() -> None:
    glossary = (ROOT / "ARCHITECTURE.md").read_text().partition("## Glossary")[2].partition("##")[0]
    words = re.findall(r"^\| ([a-z ,]+) \| \S", glossary, re.MULTILINE)[1:]
    assert words == sorted(words)
    assert {*"account copy holder owner seeded settled tail user via".split()} <= {*words}
