# SPDX-License-Identifier: MIT
"""The rows of docs/PROOF.md: what failed is named, and each piece has one row."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm"))

from vmtest import proof  # noqa: E402
from vmtest.kernels import KERNELS  # noqa: E402


def test_what_failed_is_named(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    cases = (
        '<testcase name="good"/><testcase name="bad"><failure/></testcase>'
        '<testcase name="worse"><error/></testcase><testcase name="not"><skipped/></testcase>'
    )
    results.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert proof.words(results) == "2 failed, 1 passed, 1 skipped (bad, worse)"


def test_a_row_is_replaced_and_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "PROOF.md"
    proof.put(["`make test-long`", "attacks", "6.1", "a", "2026-01-01", "1 failed"], path)
    proof.put(["`make test-long`", "cycles", "6.1", "a", "2026-01-01", "1 passed"], path)
    proof.put(["`make test-long`", "attacks", "6.1", "b", "2026-01-02", "1 passed"], path)
    rows = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        "| `make test-long` | attacks | 6.1 | b | 2026-01-02 | 1 passed |",
        "| `make test-long` | cycles | 6.1 | a | 2026-01-01 | 1 passed |",
    ]


def test_each_piece_is_of_a_kernel_and_of_tests_that_exist() -> None:
    for pieces in proof.PIECES.values():
        for piece in pieces.values():
            assert piece.kernel in KERNELS
            for path in piece.tests:
                if path.startswith("tests/"):
                    assert (proof.ROOT / path).exists(), path
        assert len({piece.what for piece in pieces.values()}) == len(pieces)
