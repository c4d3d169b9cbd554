# SPDX-License-Identifier: MIT
"""The HTML report: complete, self-contained, and no name in it acts."""

from __future__ import annotations

import csv
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hunter.show.columns import COLUMNS

HOSTILE = [
    "<script>alert(1)</script>",
    "</svg><b>",
    '" onload="x',
    "[/red]",
    "\\x1b[2J",
    "${title}",
]


def write(path: Any, comms: Any) -> None:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for i, comm in enumerate(comms):
            stamp = f"2026-05-28T20:26:{i % 60:02}.123456Z"
            row = [stamp, "out", "tcp", "10.0.0.1", 50000, f"10.0.0.{i + 2}", 443, 100 * (i + 1)]
            rows.writerow([*row, i + 100, comm, "/usr/bin/" + comm, 0, 9, "context"])
        unnamed = ["2026-05-28T20:26:40.000000Z", "fwd", "udp", "::1", 1, "::2", 2, 50]
        rows.writerow([*unnamed, "", "", "", "", 9, "forwarded"])


def report(source: Any, target: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hunter", "report", source, "-o", target],
        capture_output=True,
        text=True,
    )


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.attributes: list[Any] = []
        self.text: list[Any] = []

    def handle_starttag(self, tag: Any, attributes: Any) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: Any) -> None:
        self.text.append(data)


def test_a_report_has_pictures_and_tables_and_loads_nothing(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", ["curl", "nginx"])
    done = report(tmp_path / "x.csv", tmp_path / "x.html")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "x.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == 2 and page.tags.count("table") == 3
    assert "rect" in page.tags and "path" in page.tags
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href")]
    words = " ".join(page.text)
    assert "curl.100" in words and "nginx.101" in words and "/usr/bin/curl" in words
    assert "3 packets" in words and "66.7 % of them named" in words and "forwarded" in words


def test_equal_addresses_of_two_namespaces_are_two_far_ends(tmp_path: Path) -> None:
    with open(tmp_path / "x.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        rows.writeheader()
        for pid, netns in ((100, 11), (101, 12)):
            row: dict[str, Any] = {
                "time": "2026-05-28T20:26:01.123456Z",
                "dir": "out",
                "proto": "tcp",
            }
            row |= {"src": "10.0.0.1", "sport": 5000, "dst": "127.0.0.1", "dport": 80, "len": 60}
            rows.writerow(
                row | {"pid": pid, "comm": "web", "uid": 0, "netns": netns, "how": "diag"}
            )
    assert report(tmp_path / "x.csv", tmp_path / "x.html").returncode == 0
    page = Page()
    page.feed((tmp_path / "x.html").read_text())
    ends = {text for text in page.text if text.startswith("127.0.0.1")}
    assert ends == {"127.0.0.1 netns 11", "127.0.0.1 netns 12"}
    assert not [text for text in page.text if "web.100" in text and "web.101" in text]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_only_text(name: str, tmp_path: Path) -> None:
    write(tmp_path / "x.csv", [name])
    assert report(tmp_path / "x.csv", tmp_path / "x.html").returncode == 0
    page = Page()
    page.feed((tmp_path / "x.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags
    assert "onload" not in dict(page.attributes)
    assert any(name[:15] in text for text in page.text)


def test_an_empty_or_foreign_file_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(COLUMNS) + "\n")
    (tmp_path / "b.csv").write_text("something,else\n1,2\n")
    for name, words in (("a.csv", "holds no packets"), ("b.csv", "no capture of packet-hunter")):
        done = report(tmp_path / name, tmp_path / "x.html")
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "x.html").exists()


def test_what_nat_changes_has_a_table_and_otherwise_there_is_none(tmp_path: Path) -> None:
    write(tmp_path / "x.csv", ["curl"])
    assert report(tmp_path / "x.csv", tmp_path / "x.html").returncode == 0
    assert "NAT" not in (tmp_path / "x.html").read_text()
    with open(tmp_path / "x.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        rows.writeheader()
        row: dict[str, Any] = {"time": "2026-05-28T20:26:01.123456Z", "dir": "out", "proto": "tcp"}
        row |= {"src": "10.88.0.2", "sport": 80, "dst": "10.77.0.2", "dport": 5000, "len": 60}
        row |= {"nat_src": "10.77.0.1", "nat_sport": 8080, "nat_dst": "10.77.0.2"}
        row |= {"nat_dport": 5000, "pid": 100, "comm": "web", "uid": 0, "netns": 9, "how": "diag"}
        rows.writerow(row)
    assert report(tmp_path / "x.csv", tmp_path / "x.html").returncode == 0
    page = Page()
    page.feed((tmp_path / "x.html").read_text())
    at = page.text.index("10.88.0.2.80")
    assert page.text[at - 1 : at + 3] == ["web.100", "10.88.0.2.80", "10.77.0.1.8080", "60 B"]
    assert "10.77.0.2.5000" not in page.text
