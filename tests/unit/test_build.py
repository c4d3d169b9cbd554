# SPDX-License-Identifier: MIT
"""build.sh, make clean and make deb: what they say when there is something to say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: Any, cwd: Any = ROOT, **environment: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_each_word_and_is_no_failure(word: str) -> None:
    done = run("./build.sh", word)
    assert done.returncode == 0 and done.stderr == ""
    text = (ROOT / "build.sh").read_text()
    words = set(re.findall(r"^(--[a-z-]+)\)", text, re.MULTILINE)) | {"clean", "distclean"}
    assert all(f"./build.sh {one} " in done.stdout for one in words)
    assert "---" not in done.stdout and "set -eu" not in done.stdout


def test_an_unknown_word_is_bad_usage() -> None:
    done = run("./build.sh", "--wrong")
    assert done.returncode == 2 and "--help" in done.stderr


def test_clean_names_what_it_keeps_and_distclean_removes_it(tmp_path: Path) -> None:
    tree, cache = tmp_path / "tree", tmp_path / "cache"
    tree.mkdir()
    shutil.copy2(ROOT / "build.sh", tree)
    for name in ("kernels", "modules", "mine"):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_text("x")
    kept = run("./build.sh", "clean", cwd=tree, PACKET_HUNTER_CACHE=str(cache))
    assert kept.returncode == 0 and f"kept {cache} (" in kept.stderr, kept.stderr
    assert "make distclean" in kept.stderr and (cache / "kernels/file").exists()
    gone = run("./build.sh", "distclean", cwd=tree, PACKET_HUNTER_CACHE=str(cache))
    assert gone.returncode == 0, gone.stderr
    assert [path.name for path in cache.iterdir()] == ["mine"]  # nothing but our own


@pytest.mark.skipif(shutil.which("dpkg-checkbuilddeps") is None, reason="needs dpkg-dev")
def test_make_deb_names_the_packages_that_apt_get_installs(tmp_path: Path) -> None:
    if run("dpkg-checkbuilddeps", "debian/control").returncode == 0:
        pytest.skip("all build dependencies are installed")
    done = run("debian/build", str(tmp_path))
    assert done.returncode == 1
    line = re.search(r"run: sudo apt-get update && sudo apt-get install -y (.*)$", done.stderr)
    assert line, done.stderr
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name) for name in line[1].split())
    assert "compat" not in line[1] and "sequence" not in line[1]
