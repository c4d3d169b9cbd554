# SPDX-License-Identifier: MIT
"""python -m vmtest.matrix [KERNEL...] (make test-matrix): tests/vm on each kernel, and one table.

A row is a kernel, a column what became of it there. A kernel that the mirror no longer carries has
its row as well, and fails the matrix: take it out of KERNELS, or name a mirror that has it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from .build import BuildFailed, build_module
from .kernels import KERNELS, MATRIX, Unavailable, cache_directory, unpack
from .kernlog import COMPLAINT

__all__ = ["COLUMNS", "Row", "main", "read_results", "table"]

ROOT = Path(__file__).parents[3]
COLUMNS = (
    *("kernel", "release", "build", "load", "attribution", "unload", "others", "ebpf", "dmesg"),
)
NO_EBPF = {"5.10"}
"""Kernels on which engine ebpf does not run (README)."""
# The files whose tests have a column of their own; the rest of tests/vm is "others".
GUEST_LOST = re.compile(r"^(the guest is gone|no answer within|QEMU did not start)", re.MULTILINE)
FILES = {"test_module": "load", "test_attribution": "attribution", "test_unload": "unload"}
RUNS = (
    ("module", ("tests/vm", "--ignore=tests/vm/proof"), FILES),
    ("ebpf", ("tests/vm/test_attribution.py",), {"test_attribution": "ebpf"}),
)
"""Engine, what is run with it, and the columns of its files."""


@dataclass(slots=True)
class Row:
    """One kernel: a word or two for each column, and what else must be said about it."""

    cells: dict[str, str]
    failed: bool = False
    notes: list[str] = field(default_factory=list)


def try_kernel(name: str) -> Row:
    """Gets it, builds for it, runs tests/vm on it."""
    row = Row({"kernel": name})
    try:
        kernel = unpack(KERNELS[name], cache_directory())
        row.cells["release"] = kernel.release
        build_module(ROOT, kernel, cache_directory())
        row.cells["build"] = "ok"
    except Unavailable as error:
        row.cells["release"], row.failed = "not to be had", True
        row.notes.append(str(error))
        return row
    except BuildFailed as error:
        row.cells["build"], row.failed = "FAILED", True
        row.notes.append(str(error))
        return row
    for engine, tests, files in RUNS:
        if engine == "ebpf" and name in NO_EBPF:
            continue
        with tempfile.TemporaryDirectory(prefix="packet-hunter-matrix.") as scratch:
            results = Path(scratch) / "results.xml"
            command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={results}", *tests]
            environment = {
                **os.environ,
                "PACKET_HUNTER_KERNEL": name,
                "PACKET_HUNTER_ENGINE": engine,
            }
            code = subprocess.run(command, cwd=ROOT, env=environment).returncode
            if not results.exists():
                row.notes.append(f"pytest left no result, exit {code}")
            else:
                read_results(results, row, files)
        row.failed |= code != 0
    return row


def read_results(path: Path, row: Row, files: Mapping[str, str] = FILES) -> None:
    """Counts a JUnit file's tests into the columns of `row` that `files` says, or "others".

    A complaint of the kernel counts under dmesg, not against the test that it followed.
    """
    columns = [*files.values(), *(["others"] if len(files) > 1 else [])]
    counts = {column: {"passed": 0, "failed": 0, "skipped": 0} for column in columns}
    complaints = lost = 0
    for case in ElementTree.parse(path).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        faults = [*case.iter("failure"), *case.iter("error")]
        lost += any(GUEST_LOST.search("".join(fault.itertext())) is not None for fault in faults)
        of_kernel = [fault for fault in faults if COMPLAINT in "".join(fault.itertext())]
        skip = case.find("skipped")
        outcome = "passed"
        if len(faults) > len(of_kernel):
            outcome = "failed"
            row.notes.append(f"FAILED  {case.get('name')}")
        elif skip is not None:
            outcome = "skipped"
            row.notes.append(f"skipped {case.get('name')}: {skip.get('message', '')}")
        if of_kernel:
            complaints += 1
            row.notes.append(f"dmesg   {case.get('name')}")
        counts[files.get(file, "others")][outcome] += 1
    for column, count in counts.items():
        row.cells[column] = _words(count)
        row.failed |= not count["passed"] or count["failed"] > 0
    found = [f"{complaints} complaints"] * bool(complaints) + [f"{lost} guests lost"] * bool(lost)
    before = row.cells.get("dmesg", "clean")
    row.cells["dmesg"] = ", ".join([before] * (before != "clean") + found) or "clean"
    row.failed |= bool(found)


def _words(count: dict[str, int]) -> str:
    """`78 ok`, `77 of 78 ok, 1 skipped`, `77 of 78 ok, 1 FAILED`; `none ran` is a failure too."""
    total = sum(count.values())
    if not total:
        return "none ran"
    words = f"{count['passed']} ok" if count["passed"] == total else f"{count['passed']} of {total}"
    for outcome, said in (("skipped", "skipped"), ("failed", "FAILED")):
        words += f", {count[outcome]} {said}" if count[outcome] else ""
    return words


def table(rows: Sequence[Row]) -> str:
    """The rows in columns, then their notes."""
    cells = [COLUMNS, *([row.cells.get(column, "-") for column in COLUMNS] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(COLUMNS))]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    for row in rows:
        if row.notes:
            text += ["", f"{row.cells['kernel']}:", *(f"  {note}" for note in row.notes)]
    return "\n".join(text)


def main() -> int:
    """All kernels, or those named; 0 when every row is whole."""
    names = sys.argv[1:] or list(MATRIX)
    for name in names:
        if name not in KERNELS:
            print(f"matrix: no kernel {name!r}; there are {', '.join(KERNELS)}", file=sys.stderr)
            return 2
    rows = []
    for name in names:
        print(f"=== {name}", flush=True)
        started = time.monotonic()
        rows.append(try_kernel(name))
        print(f"=== {name} took {time.monotonic() - started:.0f} s\n{table(rows[-1:])}", flush=True)
    print(f"\n{table(rows)}")
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
