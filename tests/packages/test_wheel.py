# SPDX-License-Identifier: MIT
"""sdist and wheel, built in isolation as `pip` and `build` do for anybody."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git knows, without anything built."""
    target = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def test_a_wheel_built_in_isolation_from_the_sdist_runs_in_an_environment_of_its_own(
    tree: Path, tmp_path: Path, version: str
) -> None:
    dist = tmp_path / "dist"
    build = [sys.executable, "-m", "build", "--outdir", str(dist), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "shared_proto.h",
        "VERSION",
        "python/build_wire.py",
        "python/nlproto/native/host.c",
    } <= names
    [wheel] = dist.glob("*.whl")
    assert version in wheel.name

    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", str(wheel)]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    # The current directory and PYTHONPATH are not looked into; a link works, as pipx makes one.
    for name in ("hunter", "daemon", "nlproto"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('raise SystemExit("a foreign package")\n')
    clean = {**os.environ, "PYTHONPATH": str(tmp_path)}
    (tmp_path / "links").mkdir()
    for command in ("packet-hunter", "packet-hunterd"):
        (tmp_path / "links" / command).symlink_to(home / "bin" / command)
        shown = subprocess.run(
            [str(tmp_path / "links" / command), "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=clean,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
        assert f"usage: {command}" in shown.stdout
    wire = "from nlproto.records import wire; print(wire.RECORD.itemsize)"
    words = [str(home / "bin/python"), "-I", "-c", wire]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "128\n"
