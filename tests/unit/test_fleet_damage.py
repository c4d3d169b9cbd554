# SPDX-License-Identifier: MIT
"""Questions to a folder with a damaged file, and what a question leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fleet_rows import BEGIN, RANGE, Folder, S
from hunter.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "store")


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _other_pages(data: bytes) -> bytes:
    """The footer is whole."""
    return data[:8] + bytes(one ^ 0x5A for one in data[8 : len(data) // 3]) + data[len(data) // 3 :]


@pytest.mark.parametrize("kind", ["flows", "procs", "account", "rollup"])
@pytest.mark.parametrize("tear", [_half, _other_pages, lambda _: b"", lambda _: b"x" * 5000])
def test_a_damaged_file_is_named_in_one_line(
    folder: Folder,
    kind: str,
    tear: Callable[[bytes], bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.time_ns", lambda: RANGE.until_ns)
    for number in range(300):  # so that a third of a file is pages
        folder.flow("a", f"10.0.0.1:{40000 + number}", f"10.0.{number}.2:443", f"curl{number}")
    folder.account("a")
    folder.rollup("a", "curl", "10.0.0.0/24", 443, True, BEGIN - 48 * 3600 * S)
    folder.write()
    [path] = folder.path.glob(f"{kind}/hour=*/part-*.parquet")
    path.write_bytes(tear(path.read_bytes()))
    assert main(["fleet", "new", "--store", str(folder.path), "--since", "10m"]) == 1
    shown, told = capsys.readouterr()
    assert not shown and told.startswith(f"packet-hunter: {path} is ")
    assert told.endswith("; move it away\n") and told.count("\n") == 1


def test_a_question_leaves_nothing_where_it_is_asked(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit into memory has a directory of its own, for its user alone."""
    elsewhere, scratch = tmp_path / "elsewhere", tmp_path / "scratch"
    for one in (elsewhere, scratch):
        one.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    folder.flow("a", "10.0.0.1:40000", "10.0.0.2:443", "curl")
    with folder.open() as store:
        store.rows("SET memory_limit = '40MB'")
        many = "SELECT hash(range) AS a, hash(range + 1) AS b FROM range(4000000)"
        store.rows(f"CREATE TEMP TABLE many AS {many}")
        [made] = scratch.iterdir()
        assert made.stat().st_mode & 0o777 == 0o700 and list(made.iterdir())
    assert not list(scratch.iterdir()) and not list(elsewhere.iterdir())
