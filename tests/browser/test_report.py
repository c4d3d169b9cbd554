# SPDX-License-Identifier: MIT
"""The report in a real browser, without a network: it draws what it says and asks for nothing.

`make test-browser`; PACKET_HUNTER_PICTURE=docs/report.png keeps the picture.
"""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import pytest

from browsing import BROWSER, OPTIONS
from hunter.show.columns import COLUMNS

pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="chromium is not installed: ./build.sh --browser"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace of its own needs root"),
]

PROCESSES = [
    ("curl", 1201, "/usr/bin/curl", 443, "93.184.216.34"),
    ("nginx", 812, "/usr/sbin/nginx", 40112, "10.0.0.7"),
    ("postgres", 640, "/usr/lib/postgresql/15/bin/postgres", 40218, "10.0.0.9"),
    ("chronyd", 590, "/usr/sbin/chronyd", 123, "162.159.200.1"),
    ("systemd-resolve", 401, "/usr/lib/systemd/systemd-resolved", 53, "1.1.1.1"),
    ("apt", 3000, "/usr/bin/apt", 80, "151.101.2.132"),
    ("<script>x</script>", 3111, "/tmp/a & b", 9000, "10.0.0.9"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("report")
    luck = random.Random(3)
    with open(folder / "capture.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for second in range(90):
            stamp = f"2026-05-28T20:{26 + second // 60}:{second % 60:02}"
            for comm, pid, exe, port, far in PROCESSES:
                for i in range(luck.randint(0, 8) if comm != "apt" or second < 30 else 0):
                    ends = ["10.0.0.1", 50000, far, port]
                    way = luck.choice(("out", "in"))
                    ends = ends if way == "out" else ends[2:] + ends[:2]
                    size = luck.choice((60, 300, 1500))
                    row = [f"{stamp}.{i:06}Z", way, "tcp", *ends, size]
                    rows.writerow([*row, pid, comm, exe, 0, 9, "context"])
            if second % 7 == 0:
                row = [f"{stamp}.900000Z", "fwd", "tcp", "10.0.0.4", 5, "8.8.8.8", 443, 700]
                rows.writerow([*row, "", "", "", "", 9, "forwarded"])
    command = [sys.executable, "-m", "hunter", "report", "capture.csv", "-o", "page.html"]
    subprocess.run(command, check=True, cwd=folder)
    return folder / "page.html"


def browse(page: Path, *options: str) -> tuple[str, str]:
    """Run the browser where there is no network; its standard output and error."""
    profile = page.parent / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    done = subprocess.run(
        ["unshare", "-n", str(BROWSER), *OPTIONS]
        + [f"--user-data-dir={profile}", *options, str(page)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


def colours(path: Path) -> Counter[str]:
    """How often each colour is in a PNG of 8 bits a channel (RFC 2083, filters of section 6)."""
    data, at, packed = path.read_bytes(), 8, b""
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IHDR":
            width, height, depth, kind_of_pixel = struct.unpack_from(">IIBB", data, at + 8)
        elif kind == b"IDAT":
            packed += data[at + 8 : at + 8 + size]
        at += size + 12
    assert depth == 8 and kind_of_pixel in (2, 6)
    step = {2: 3, 6: 4}[kind_of_pixel]
    raw, wide = zlib.decompress(packed), width * step
    before = bytearray(wide)
    found: Counter[str] = Counter()
    for row in range(height):
        start = row * (wide + 1)
        rule, line = raw[start], bytearray(raw[start + 1 : start + 1 + wide])
        for i in range(wide if rule else 0):
            left = line[i - step] if i >= step else 0
            corner = before[i - step] if i >= step else 0
            up = before[i]
            guess = left + up - corner
            near = min((left, up, corner), key=lambda one: abs(guess - one))
            line[i] = (line[i] + (0, left, up, (left + up) // 2, near)[rule]) & 255
        found.update(line[i : i + 3].hex() for i in range(0, wide, step))
        before = line
    return found


def test_the_browser_draws_every_process_in_its_colour(page: Path) -> None:
    picture = page.with_suffix(".png")
    _, told = browse(page, f"--screenshot={picture}")
    assert "Refused" not in told and "CONSOLE" not in told, told
    wanted = os.environ.get("PACKET_HUNTER_PICTURE")
    if wanted:
        shutil.copy(picture, wanted)
    found = colours(picture)
    used = set(re.findall(r'fill="#([0-9a-f]{6})"', page.read_text()))
    assert len(used) >= len(PROCESSES)
    assert {colour for colour in used if found[colour] < 50} == set()


def test_the_browser_reads_the_page_as_it_was_meant(page: Path) -> None:
    document, told = browse(page, "--dump-dom")
    assert "Refused" not in told and "CONSOLE" not in told, told
    assert document.count("<svg") == 2 and document.count("<table") == 3
    assert "<script" not in document
    assert "&lt;script&gt;x&lt;/" in document and "curl.1201" in document
