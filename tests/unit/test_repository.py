# SPDX-License-Identifier: MIT
"""What holds for the tree as a whole: one version, no machine's paths, a licence on each file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from waiting import there

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tracked() -> dict[str, Any]:
    """Texts of the files that git knows, by name."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        try:
            texts[name] = (ROOT / name).read_text()
        except (FileNotFoundError, UnicodeDecodeError):
            continue
    return texts


def test_the_version_is_written_in_one_place(tracked: dict[str, Any]) -> None:
    version = tracked["VERSION"].strip()
    alone = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.])")
    history = {"VERSION", "CHANGELOG.md"}
    repeated = [name for name, text in tracked.items() if alone.search(text)]
    assert [name for name in repeated if name not in history] == []


def test_the_newest_change_is_unreleased_or_of_this_version(tracked: dict[str, Any]) -> None:
    newest = there(re.search(r"^## (\S+)", tracked["CHANGELOG.md"], re.MULTILINE)).group(1)
    assert newest in {"Unreleased", tracked["VERSION"].strip()}


def test_the_workspace_names_no_path_of_one_machine() -> None:
    files = sorted((ROOT / ".vscode").glob("*.json"))
    assert {file.name for file in files} >= {"tasks.json", "launch.json", "c_cpp_properties.json"}
    for file in files:
        text = file.read_text()
        json.loads(text)
        absolute = r'"(/[^"]*|[A-Z]:\\[^"]*|[^"]*/(?:home|root|usr|lib)/[^"]*)"'
        assert re.findall(absolute, text) == []


def test_each_source_file_begins_with_its_licence(tracked: dict[str, Any]) -> None:
    sources = (".py", ".c", ".h", ".sh", ".service", ".sysusers", ".tmpfiles", "Makefile", "Kbuild")
    bare = [
        name
        for name, text in tracked.items()
        if name.endswith(sources) and "SPDX-License-Identifier:" not in text[:400]
    ]
    assert bare == []


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_make_clean_leaves_a_tree_that_git_calls_clean(
    tracked: dict[str, Any], tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)

    def git(*arguments: Any) -> Any:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tree, capture_output=True, text=True, check=True
        )
        return done.stdout

    git("init", "-q")
    git("add", "-f", ".")
    git("commit", "-q", "-m", "tree")
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs .venv, which ./build.sh makes")
    made = subprocess.run(
        ["make", "-C", "python", f"PYTHON={python}"], cwd=tree, capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert list((tree / "python/nlproto").glob("_wire*.so"))
    for litter in ("kmod/sniffer.ko", "kmod/.main.o.cmd", "dist/a.whl", "tests/__pycache__/a.pyc"):
        (tree / litter).parent.mkdir(parents=True, exist_ok=True)
        (tree / litter).write_text("")
    # Without kernel headers `make -C kmod clean` cannot ask Kbuild.
    cleaned = subprocess.run(["make", "clean"], cwd=tree, capture_output=True, text=True)
    assert cleaned.returncode == 0, cleaned.stdout + cleaned.stderr
    left = git("status", "--porcelain", "--ignored").splitlines()
    assert left == []
