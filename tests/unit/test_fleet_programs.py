# SPDX-License-Identifier: MIT
"""The fleet's programs on the command line, with and without their extra."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_WITHOUT = """
import sys
import tomllib
from pathlib import Path
for name in ("nats", "pyarrow", "duckdb", "backports.zstd", "nkeys"):
    sys.modules[name] = None
from fleet.{0}.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("program", ["export", "collect"])
def test_without_the_extra_one_line_says_what_to_install(program: str, tmp_path: Path) -> None:
    code = _WITHOUT.format(program)
    run = [sys.executable, "-I", "-c", code]
    ended = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "pip install 'packet-hunter[fleet]'" in ended.stderr
    helped = subprocess.run([*run, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "--server" in helped.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--server", "http://x"],
        ["--server", "tls://x:99999"],
        ["--host", "a b"],
        ["--host", "flows.*"],
        ["--host", "a..b"],
        ["--host", "a.>"],
        ["--interval", "0"],
        ["--spool-size", "0"],
    ],
)
def test_mistakes_are_told_and_nothing_begins(arguments: list[str], tmp_path: Path) -> None:
    run = [sys.executable, "-I", "-m", "fleet.export", "--spool", str(tmp_path / "spool")]
    ended = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("packet-hunter-export: ") and ended.stderr.count("\n") == 1
    assert not (tmp_path / "spool").exists()


_LOADED = """
import sys
import tomllib
from pathlib import Path
import daemon.__main__, hunter.__main__, hunter.cli.arguments, hunter.commands.live
names = {name.partition(".")[0] for name in sys.modules}
print(*sorted(names & {"fleet", "nats", "nkeys", "nacl", "pyarrow", "duckdb", "backports"}))
"""


def test_the_base_installation_grows_by_nothing() -> None:
    """Its requirements are these six, and its programs load nothing of the extra."""
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[;]", one)[0] for one in project["dependencies"]}
    assert names == {"cffi", "lark", "msgspec", "numpy", "pyyaml", "rich"}
    extra = {re.split(r"[<>=\[;]", one)[0] for one in project["optional-dependencies"]["fleet"]}
    assert extra == {"nats-py", "pyarrow", "duckdb", "backports.zstd", "tzdata"}
    run = [sys.executable, "-I", "-c", _LOADED]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() == []
    control = (root / "debian" / "control").read_text()
    control = control.partition("Package: packet-hunter-fleet\n")[0]
    assert not re.search("nats|duckdb|python3-nacl", control)
