# SPDX-License-Identifier: MIT
"""The file with a seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nlproto.errors import Error

keys = pytest.importorskip("fleet.keys", reason="needs the extra: fleet")


def test_a_seed_is_read_as_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "host.nk"
    keys.make(str(path))
    assert keys.read(str(path)) == path.read_text().strip()


@pytest.mark.parametrize("content", [b"", b"rate: 1", b"\xff", b"SUAB", b"A" * 58, b"S" * 100_000])
def test_a_file_that_is_no_seed_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "host.nk"
    path.write_bytes(content)
    with pytest.raises(Error, match=f"^cannot read the nkey in {path}: "):
        keys.read(str(path))
