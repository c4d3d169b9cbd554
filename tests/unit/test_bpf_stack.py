# SPDX-License-Identifier: MIT
"""The programs of bpf/ fit on the stack that kernel 6.1 gives a chain of calls."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "python/nlproto"
STACK, FRAME = 512, 32  # MAX_BPF_STACK; each frame is rounded up (kernel/bpf/verifier.c)
NUMBER = r"0x[0-9a-f]+|\d+"


@dataclass
class Function:
    section: str
    stack: int = 1
    calls: set[str] = field(default_factory=set)


def functions_of(path: Path) -> dict[str, Function]:
    """All functions of an object: how deep each one's own stack is, and what it calls."""
    command = ["llvm-objdump", "-d", "-r", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Function] = {}
    static: dict[int, str] = {}  # instruction in .text -> function
    pending: list[tuple[str, int]] = []
    section = name = copy = before = ""
    for line in text.splitlines():
        if header := re.match(r"Disassembly of section (.*):", line):
            section = header[1]
        elif label := re.match(r"([0-9a-f]+) <(\w+)>:", line):
            if not label[2].startswith("LBB"):
                name = label[2]
                found[name] = Function(section)
                if section == ".text":
                    static[int(label[1], 16) // 8] = name
        elif moved := re.search(r"R_BPF_64_(32|64)\s+(\S+)", line):
            if moved[2] != ".text":
                found[name].calls.add(moved[2])
            elif moved[1] == "32" and (call := re.search(rf"call ({NUMBER})", before)):
                pending.append((name, int(call[1], 0) + 1))
            elif address := re.search(rf"= ({NUMBER}) ll", before):
                pending.append((name, int(address[1], 0) // 8))
        elif name:
            for used in re.finditer(rf"r10 - ({NUMBER})", line):
                found[name].stack = max(found[name].stack, int(used[1], 0))
            if top := re.search(r"(r\d+) = r10\s*$", line):
                copy = top[1]
            if (below := re.search(rf"(r\d+) \+= -({NUMBER})", line)) and below[1] == copy:
                found[name].stack = max(found[name].stack, int(below[2], 0))
        before = line
    for caller, place in pending:
        found[caller].calls.add(static[place])
    return found


@pytest.mark.parametrize(
    "name", ["engines/hunter.bpf.o", "engines/hunter_parts.bpf.o", "kernel/drops.bpf.o"]
)
def test_no_chain_of_calls_needs_more_stack_than_there_is(name: str) -> None:
    found = functions_of(LIBRARY / name)

    @cache
    def deepest(one: str) -> tuple[int, tuple[str, ...]]:
        below = [deepest(other) for other in found[one].calls if other in found]
        depth, chain = max(below, default=(0, ()))
        return depth + -(-found[one].stack // FRAME) * FRAME, (one, *chain)

    assert found
    assert not [deepest(one) for one in found if deepest(one)[0] > STACK]
