# SPDX-License-Identifier: MIT
"""Compressed captures: in bounded memory, and to the last byte that is good."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import shutil
import subprocess
import sys
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from damage import CHANGES, PORTS, UDP, changed, ipv4
from hunter.formats import pcapng
from hunter.formats.captures import read_capture
from hunter.formats.compression import KINDS
from hunter.formats.inputs import Input
from hunter.formats.rows import read_rows
from nlproto import Error


def zstd(data: Any) -> Any:
    module = pytest.importorskip(
        "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    )
    return module.compress(data)


def lz4(data: Any) -> Any:
    return pytest.importorskip("lz4.frame").compress(data)


PACK = {"gzip": gzip.compress, "zstd": zstd, "lz4": lz4, "xz": lzma.compress, "bzip2": bz2.compress}
TEXT = b"".join(b"%d\n" % (i * 7919 % 100_003) for i in range(50_000))


@cache
def packed(kind: Any) -> Any:
    return PACK[kind](TEXT)


def read(path: Any, piece: int = 10_000) -> tuple[Any, ...]:
    """(what was read, the Error that ended it or None)."""
    parts = []
    try:
        with Input(str(path)) as source:
            while part := source.file.read(piece):
                parts.append(part)
            source.check()
    except Error as error:
        assert "\n" not in str(error)
        return b"".join(parts), str(error)
    return b"".join(parts), None


@pytest.mark.parametrize("kind", PACK)
def test_all_members_are_read_and_padding_is_passed_over(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(packed(kind) + PACK[kind](b"more") + bytes(8) + PACK[kind](b"end"))
    assert read(path) == (TEXT + b"moreend", None)
    path.write_bytes(packed(kind) + bytes(200_000))
    assert read(path) == (TEXT, None)


@pytest.mark.parametrize("kind", PACK)
def test_cut_data_are_read_to_the_cut(kind: str, tmp_path: Path) -> None:
    path, data = tmp_path / "x", packed(kind)
    path.write_bytes(data[: len(data) * 2 // 3])
    found, error = read(path)
    assert TEXT.startswith(found) and error.endswith("the compressed data end in the middle")
    assert len(found) > 10_000 or kind == "bzip2"  # one block of bzip2 is 900 kB
    path.write_bytes(data[:-1])
    found, again = read(path)
    assert TEXT.startswith(found) and again == error


@pytest.mark.parametrize("kind", PACK)
@settings(max_examples=40)
@given(changes=CHANGES)
def test_damage_is_an_error_of_one_line(
    kind: str, tmp_path_factory: pytest.TempPathFactory, changes: Any
) -> None:
    path = tmp_path_factory.mktemp("x") / "x"
    path.write_bytes(changed(packed(kind), changes))
    read(path)


@pytest.mark.parametrize("kind", PACK)
def test_a_bomb_is_unpacked_by_pieces(kind: str, tmp_path: Path) -> None:
    """32 MiB of one byte, of some kB: never more of it than was asked for, and a window."""
    path, size = tmp_path / "x", 32 << 20
    path.write_bytes(PACK[kind](bytes(size)))
    assert path.stat().st_size < size // 200
    tracemalloc.start()
    try:
        with Input(str(path)) as source:
            count = 0
            while part := source.file.read(1 << 16):
                count += len(part)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == size and peak < 16 << 20


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"comm": "x" * 500_000}, "a text is longer than can be"),
        ({"parents": [{"pid": 1, "comm": "x" * 500_000}]}, "a text is longer than can be"),
        ({"holders": [{"pid": 1, "comm": "x"}] * 2000}, "holders.list.element.pid is larger"),
    ],
)
def test_a_bomb_of_parquet_does_not_fill_the_memory(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """A text that many rows have is in the file once; a row has few people."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path, rows = tmp_path / "x.parquet", 64
    table = {name: [value] * rows for name, value in ({"time": "", "dir": "in"} | values).items()}
    importlib.import_module("pyarrow.parquet").write_table(arrow.table(table), path)
    with Input(str(path)) as source, pytest.raises(Error, match=words):
        list(read_rows(source))


def test_compressed_parquet_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    monkeypatch.setattr("hunter.formats.rows._MAX_CHUNK", 1 << 20)
    path = tmp_path / "x.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1" + bytes(16 << 20)))
    with Input(str(path)) as source, pytest.raises(Error, match="compressed more than"):
        list(read_rows(source))


@pytest.mark.parametrize("tool", ["gzip", "zstd", "lz4", "xz", "bzip2"])
def test_what_the_tools_write_is_read(tool: str, tmp_path: Path) -> None:
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    if tool in ("zstd", "lz4"):
        PACK[tool](b"")
    flow = bytes(12) + b"\x08\x00" + ipv4(UDP) + PORTS
    capture = pcapng.section_header("x") + pcapng.interface_description("lo", 1)
    capture += pcapng.enhanced_packet(0, 1, flow, len(flow)) * 1000
    done = subprocess.run([tool, "-c"], input=capture, capture_output=True, check=True)
    (tmp_path / "x").write_bytes(done.stdout)
    with Input(str(tmp_path / "x")) as source:
        assert len(list(source.checked(read_capture(source.file, "x")))) == 1002


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
def test_without_the_library_the_tool_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "lz4.frame" if kind == "lz4" else "backports.zstd"
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "backports" if kind == "zstd" else "lz4", None)
    monkeypatch.setitem(sys.modules, "compression", None)
    magic = next(one.magic for one in KINDS if one.name == kind)
    (tmp_path / "x").write_bytes(magic + bytes(50))
    with pytest.raises(Error, match=rf"compressed with {kind}: run {kind}cat on it and read from"):
        Input(str(tmp_path / "x"))
