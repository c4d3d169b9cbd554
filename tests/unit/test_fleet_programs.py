# SPDX-License-Identifier: MIT
"""The fleet's programs on the command line, with and without their extra."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fleet.export.spool import Pending, Spool
from waiting import patient

_WITHOUT = """
import sys
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
def test_an_exporter_s_mistakes_are_told_and_nothing_begins(
    arguments: list[str], tmp_path: Path
) -> None:
    run = [sys.executable, "-I", "-m", "fleet.export", "--spool", str(tmp_path / "spool")]
    ended = subprocess.run([*run, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("packet-hunter-export: ") and ended.stderr.count("\n") == 1
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--keep", "nan"],
        ["--keep", "40", "--keep-sums", "30"],
        ["--keep", "1e300", "--keep-sums", "1e300"],
        ["--interval", "41"],
        ["--replicas", "0"],
        ["--clickhouse", "ftp://x"],
    ],
)
def test_a_collector_s_mistakes_are_told(arguments: list[str], tmp_path: Path) -> None:
    run = [sys.executable, "-I", "-m", "fleet.collect", str(tmp_path / "store"), *arguments]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("packet-hunter-collect: ") and ended.stderr.count("\n") == 1


def test_a_second_exporter_does_not_take_the_spool_of_the_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1 << 20)
    run = [sys.executable, "-I", "-m", "fleet.export", "--spool", str(tmp_path)]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "another exporter uses it" in ended.stderr and ended.stderr.count("\n") == 1
    spool.put([lambda sequence: Pending(sequence, 1, 5, b"kept")])
    spool.close()
    assert Spool(tmp_path, 1 << 20).totals().spooled == 5


@pytest.mark.parametrize("years", [-20, 0, 20])
def test_the_gap_between_two_exporters_is_right_wherever_the_clock_was_set(
    tmp_path: Path, years: int
) -> None:
    spool = Spool(tmp_path, 1 << 20)
    spool.put([lambda sequence: Pending(sequence, 1, 5, b"kept")])
    spool._database.execute(
        "UPDATE last_put SET boot = boot - 100, real = real - 100 + ?", (years * 365 * 86400,)
    )
    spool.close()
    assert 100_000 <= Spool(tmp_path, 1 << 20).totals().gap_ms < 100_000 + patient(60) * 1000


@pytest.mark.parametrize("tear", [lambda _: b"x" * 20_000, lambda data: data[: len(data) // 2]])
def test_a_damaged_spool_is_set_aside_and_its_numbers_are_not_used_again(
    tmp_path: Path, tear: Callable[[bytes], bytes]
) -> None:
    spool = Spool(tmp_path, 1 << 20)
    before = spool.put([lambda sequence: Pending(sequence, 1, 5, b"x" * 50_000)])
    spool.close()
    spool.path.write_bytes(tear(spool.path.read_bytes()))
    again = Spool(tmp_path, 1 << 20)
    assert again.damaged is not None and again.damaged.exists()
    [made] = again.put([lambda sequence: Pending(sequence, 1, 7, b"new")])
    assert made.sequence > before[0].sequence and again.totals().closes
    again.close()
    assert Spool(tmp_path, 1 << 20).damaged is None


_LOADED = """
import sys
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


_SAYS = """
import logging, sys
from fleet.options import exit_code
from nlproto.errors import Error

def run():
    logging.warning("%s: %s", sys.argv[1], "refused")
    raise Error(sys.argv[1])

sys.exit(exit_code("packet-hunter-collect", run))
"""


def test_what_a_server_says_reaches_no_terminal_and_begins_no_line() -> None:
    hostile = "no\x1b[2J\npacket-hunter-collect: all is well\u202e\udc9b"
    run = [sys.executable, "-c", _SAYS, hostile]
    ended = subprocess.run(run, capture_output=True, text=True)
    lines = ended.stderr.splitlines()
    assert len(lines) == 2 and all(one.isprintable() for one in lines)
    assert all(one.startswith("packet-hunter-collect: no\\x1b[2J\\x0a") for one in lines)
