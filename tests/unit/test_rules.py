# SPDX-License-Identifier: MIT
"""The module and engine ebpf follow one state table, and each has code for each of its rules."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULE, PROGRAMS = ROOT / "kmod", ROOT / "bpf"

# What of the table's words each side calls in its code; the same in both unless told otherwise.
STEPS = {
    "creates": r"\buse_(create|take)\(",
    "uses": r"\b(sniffer_)?use\(",
    "receives": r"SNIFFER_F_INHERITED",
    "has it, or does not use it": r"\buse_is_possible\(",
    "was found not to have it": r"stranger",
    "HELD": r"\bowner_set_user\(",
    "the old user joins the past": r"past\[0\] = old",
    "VIA": r"\bowner_refer\(",
    "settled": r"\bsettle\(",
    "HELD by an heir": r"\bowner_inherit\(",
    "an earlier user first": r"past\[i\]",
    "else the child, else the youngest": r"youngest\(",
    "UNHELD": r"\bowner_let_go\(",
    "RELEASED": r"\bowner_release\(",
    "dead": r"\bdead\b",
    "a state that leaves a TIME_WAIT": r"\bwaits\b",
    "a shared table": r"files->count",
    "an io_uring": r"\brings?\b",
    "files were put into a ring": r"\bring_files\b",
    "a ring has a number in place of a descriptor": r"\bring_numbers\b",
    "what no descriptor accounts for": r"\bin_ring\(",
    "a ring lets go of a file later": r"\bdoubt\b",
    "an operation closes a file of a ring": r"io_fixed_fd_remove",
    "an operation replaces a file of a ring": r"io_files_update",
    "AMBIGUOUS while several do": r"\bguess\b",
    "found at load": r"SNIFFER_F_SEEDED",
    "the kernel's servers": r"is_servers\(",
}


def state_table(text: str) -> list[str]:
    """Table and rules at the head of a table file, one line each, spaces made one."""
    head = text[text.index("| state ") : text.index("- an entry outlives its socket")]
    return [" ".join(line.strip(" *").split()) for line in head.splitlines() if line.strip(" *")]


def code_of(directory: Path) -> str:
    """All code of one side, without comments; the prefixes that each has are left out."""
    text = "\n".join(p.read_text() for p in sorted(directory.glob("*.[ch]")))
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return re.sub(r"\b(sniffer_|hooks_|holders_)+(?=[a-z])", "", text)


def test_both_have_one_state_table() -> None:
    assert state_table((MODULE / "owner.c").read_text()) == state_table(
        (PROGRAMS / "table.h").read_text()
    )


def test_each_rule_is_in_both() -> None:
    sides = {"kmod": code_of(MODULE), "bpf": code_of(PROGRAMS)}
    missing = [
        f"{name} lacks: {rule}"
        for rule, pattern in STEPS.items()
        for name, code in sides.items()
        if not re.search(pattern, code)
    ]
    assert not missing


def test_both_know_the_same_calls_about_rings() -> None:
    kept, ours = (
        dict(re.findall(r"\b(RINGS_\w+)\s*= (\d+)", code_of(side))) for side in (MODULE, PROGRAMS)
    )
    assert kept and kept == ours


def test_bounds_are_the_same() -> None:
    programs = (PROGRAMS / "hunter.h").read_text()
    module = "\n".join(path.read_text() for path in MODULE.glob("*.[ch]"))
    kept = re.search(r"#define \w*OWNER_PAST\s+(\d+)", module)
    ours = re.search(r"#define OWNER_PAST\s+(\d+)", programs)
    assert kept and ours and kept[1] == ours[1]
