# SPDX-License-Identifier: MIT
"""The summary at the end of `make test`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SUMMARY = Path(__file__).parents[1] / "summary.py"
CASES = {
    "passed": '<testcase classname="a" name="steady"/>',
    "again": '<testcase classname="a" name="shaky"/>' * 2,
    "failed": '<testcase classname="a" name="bad"/>'
    '<testcase classname="a" name="bad"><failure/></testcase>',
}


def summary(directory: Path, *kinds: str) -> tuple[int, str]:
    cases = "".join(CASES[kind] for kind in kinds)
    (directory / "host.xml").write_text(f"<testsuites>{cases}</testsuites>")
    command = [sys.executable, str(SUMMARY), str(directory), "host"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_what_passed_only_when_run_again_is_named(tmp_path: Path) -> None:
    status, said = summary(tmp_path, "passed", "again")
    assert status == 0
    assert "2 passed, 0 failed" in said
    assert "AGAIN   a::shaky" in said
    assert "steady" not in said


def test_what_fails_twice_has_failed_once(tmp_path: Path) -> None:
    status, said = summary(tmp_path, "passed", "failed")
    assert status == 1
    assert "1 passed, 1 failed" in said
    assert "FAILED  a::bad" in said
    assert "AGAIN" not in said
