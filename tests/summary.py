# SPDX-License-Identifier: MIT
"""The end of `make test`: summary.py DIRECTORY TIERS reads the tiers' results.

Prints every skip with its reason, and every test that passed only when it was run again. Prints
also the tiers that `make test` leaves out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

TIERS = ("unit", "host", "vm", "attribution", "ebpf", "links")
NOT_RUN = (
    "test-matrix",
    "test-kasan",
    "test-vagrant",
    "test-browser",
    "test-packages",
    "test-bare",
    "fuzz",
    "nonsense",
    "soak",
    "bench",
    "bench-accuracy",
)


def main() -> int:
    """Prints the summary; 1 when a test failed or a tier left no result."""
    directory, chosen = Path(sys.argv[1]), sys.argv[2].split()
    passed = failed = skipped = 0
    print("\n=== summary")
    if "lint" in chosen:
        lint = (directory / "lint").read_text().strip()
        passed, failed = (1, 0) if lint == "passed" else (0, 1)
        print(f"{'lint':12} {lint}")
    for tier in TIERS:
        if tier not in chosen:
            continue
        path = directory / f"{tier}.xml"
        if not path.exists():
            print(f"{tier:12} left no result")
            failed += 1
            continue
        runs: dict[tuple[str | None, str | None], list[ElementTree.Element]] = {}
        for case in ElementTree.parse(path).iter("testcase"):
            runs.setdefault((case.get("classname"), case.get("name")), []).append(case)
        cases = [each[-1] for each in runs.values()]
        skips = [case for case in cases if case.find("skipped") is not None]
        bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
        again = [each[-1] for each in runs.values() if len(each) > 1 and each[-1] not in bad]
        good = len(cases) - len(skips) - len(bad)
        if not cases:
            bad = [ElementTree.Element("testcase", name="no test was collected")]
        print(f"{tier:12} {good} passed, {len(bad)} failed, {len(skips)} skipped")
        for case in bad:
            print(f"  FAILED  {case.get('classname', '')}::{case.get('name')}")
        for case in again:
            print(f"  AGAIN   {case.get('classname', '')}::{case.get('name')}: failed, then passed")
        for case in skips:
            mark = case.find("skipped")
            reason = mark.get("message", "") if mark is not None else ""
            print(f"  skipped {case.get('name')}: {reason}")
        passed, failed, skipped = passed + good, failed + len(bad), skipped + len(skips)
    left_out = [f"test-{tier}" for tier in TIERS if tier not in chosen]
    print(f"not run: {', '.join(f'make {name}' for name in (*left_out, *NOT_RUN))}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
