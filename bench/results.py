# SPDX-License-Identifier: MIT
"""bench/RESULTS.md: each benchmark replaces its own section and leaves the others alone."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("RESULTS.md")


def put(title: str, command: str, body: str, *, kernel: str = "", path: Path = RESULTS) -> None:
    """Replace section ``title``, or add it at the end.

    :param command: what repeats the figures.
    :param body: Markdown without headings of the second level.
    :param kernel: what the figures come from, when not from the running kernel.
    """
    heading = f"## {title}\n"
    text = path.read_text() if path.exists() else "# Measured\n"
    where = kernel or f"Linux {platform.release()}"
    facts = (
        f"`{command}` on {machine()}, {where}; {time.strftime('%Y-%m-%d')}, commit {commit()},"
        f" load {os.getloadavg()[0]:.1f}."
    )
    section = f"{heading}\n{facts}\n\n{body.strip()}\n"
    found = re.search(rf"^{re.escape(heading)}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found:
        after = text[found.end() :]
        text = text[: found.start()] + section + ("\n" + after if after else "")
    else:
        text = f"{text.rstrip()}\n\n{section}"
    path.write_text(text)
    print(f"{path.relative_to(ROOT)}: {title}\n\n{body.strip()}\n", flush=True)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """Processors and memory, as the kernel tells them."""
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{os.cpu_count()} x {found[1] if found else platform.machine()}, {memory:.0f} GiB"


def commit() -> str:
    """Short hash of the tree, with a mark when files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+changes"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"
