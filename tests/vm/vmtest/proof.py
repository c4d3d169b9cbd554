# SPDX-License-Identifier: MIT
"""python -m vmtest.proof kasan|long [PIECE...]: what takes long, and docs/PROOF.md of its results.

A piece is some tests on a kernel; its row says what became of it last, with commit and date.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

__all__ = ["PIECES", "Piece", "main", "put"]

ROOT = Path(__file__).parents[3]
PROOF = ROOT / "docs" / "PROOF.md"
VM, DEEP = "tests/vm", "tests/vm/proof"
SUITE = (VM, f"--ignore={DEEP}", f"--ignore={VM}/test_attribution.py")


@dataclass(frozen=True, slots=True)
class Piece:
    """`tests` on `kernel`, with `settings` in the environment."""

    what: str
    kernel: str
    tests: tuple[str, ...]
    settings: dict[str, str] = field(default_factory=dict)


LONG = {"PACKET_HUNTER_LONG": "1"}
PIECES = {
    "kasan": {
        "detectors": Piece(
            "planted bugs are found", "6.1-debug", (f"{DEEP}/test_detectors.py",)
        ),
        "stress": Piece(
            "stress of two minutes", "6.1-debug", (f"{VM}/test_stress.py",),
            {"PACKET_HUNTER_STRESS": "120"},
        ),
        "failures": Piece(
            "allocations fail, each of a load and those of the hot path", "6.1-debug",
            (f"{DEEP}/test_failures.py",), LONG,
        ),
        "malformed": Piece(
            "broken packets, random control messages", "6.1-debug", (f"{DEEP}/test_malformed.py",)
        ),
        "cycles": Piece(
            "20 loads and unloads under churn", "6.1-debug", (f"{VM}/test_unload.py",),
            {"PACKET_HUNTER_CYCLES": "20"},
        ),
        "races": Piece(
            "data races (KCSAN): a planted one, stress of two minutes, loads under churn",
            "6.1-races",
            (f"{DEEP}/test_detectors.py", f"{VM}/test_stress.py", f"{VM}/test_unload.py"),
            {"PACKET_HUNTER_STRESS": "120", "PACKET_HUNTER_CYCLES": "10"},
        ),
        "attack": Piece("attacks, in small", "6.1-debug", (f"{DEEP}/test_attack.py",)),
        "suite": Piece("tests/vm", "6.1-debug", SUITE),
        "attribution": Piece("all scenarios", "6.1-debug", (f"{VM}/test_attribution.py",)),
    },
    "long": {
        "cycles": Piece(
            "200 loads and unloads under churn", "6.1", (f"{VM}/test_unload.py",),
            {"PACKET_HUNTER_CYCLES": "200"},
        ),
        "programs": Piece(
            "50 loads and unloads of engine ebpf's programs under churn", "6.1",
            (f"{DEEP}/test_programs_cycle.py",), {"PACKET_HUNTER_CYCLES": "50"},
        ),
        "sockets": Piece(
            "1,000,000 short sockets", "6.1", (f"{VM}/test_table.py", "-k", "short_sockets"),
            {"PACKET_HUNTER_SOCKETS": "1000000"},
        ),
        "malformed": Piece(
            "100,000 broken packets each, and control messages", "6.1",
            (f"{DEEP}/test_malformed.py",), LONG,
        ),
        "attack": Piece("attacks in full", "6.1", (f"{DEEP}/test_attack.py",), LONG),
        "passive": Piece(
            "traffic the same to the byte", "6.1", (f"{DEEP}/test_passive.py",), LONG
        ),
    },
}  # fmt: skip
HEAD = """\
# Proof

What takes too long for `make test`, and what became of it last. `make test-kasan` and
`make test-long` write these rows; `PIECES="stress failures"` plays some. What failed is named.

| command | what | kernel | commit | date | result |
| --- | --- | --- | --- | --- | --- |
"""


def play(piece: Piece) -> tuple[bool, str]:
    """Runs it; whether all passed, and a cell of words."""
    with tempfile.TemporaryDirectory(prefix="packet-hunter-proof.") as scratch:
        results = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", *piece.tests]
        environment = {**os.environ, **piece.settings, "PACKET_HUNTER_KERNEL": piece.kernel}
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        minutes = (time.monotonic() - started) / 60
        if not results.exists():
            return False, f"pytest left no result, exit {code}"
        return code == 0, f"{words(results)}; {minutes:.0f} min"


def words(results: Path) -> str:
    """`23 passed, 1 failed (name)` of a JUnit file."""
    count: Counter[str] = Counter()
    failed = []
    for case in ElementTree.parse(results).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            count["failed"] += 1
            failed.append(case.get("name", "?"))
        else:
            count["skipped" if case.find("skipped") is not None else "passed"] += 1
    text = ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items()))
    return f"{text} ({', '.join(failed)})" if failed else text


def put(cells: list[str], path: Path = PROOF) -> None:
    """Replaces the row with these first two cells, or adds it at the end."""
    text = path.read_text() if path.exists() else HEAD
    line = f"| {' | '.join(cells)} |\n"
    row = re.compile(rf"^\| {re.escape(cells[0])} \| {re.escape(cells[1])} \|.*\n", re.MULTILINE)
    if row.search(text):
        text = row.sub(lambda _: line, text)
    else:
        text += line
    path.write_text(text)


def commit() -> str:
    """Short hash of the tree, marked when files differ from it."""
    command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+changes"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> int:
    """Plays the pieces of one command, or those named; 0 when all passed."""
    name, *wanted = sys.argv[1:] or ["?"]
    pieces = PIECES.get(name, {})
    if not pieces or not set(wanted) <= set(pieces):
        known = {command: sorted(found) for command, found in PIECES.items()}
        print(f"proof: there are {known}", file=sys.stderr)
        return 2
    whole = True
    for piece in (pieces[one] for one in wanted or pieces):
        made = commit()  # before it runs: files may change meanwhile
        passed, said = play(piece)
        whole &= passed
        date = time.strftime("%Y-%m-%d")
        put([f"`make test-{name}`", piece.what, piece.kernel, made, date, said])
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
