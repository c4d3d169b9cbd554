# SPDX-License-Identifier: MIT
"""sdist and wheel, built in isolation as `pip` and `build` do for anybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLEET = {"backports.zstd", "duckdb", "nats-py", "nkeys", "pyarrow", "pynacl", "tzdata"}
STORED = """
import sys, time, uuid
import numpy as np
from fleet import wire
from fleet.collect.parquet import ParquetStore
from fleet.collect.tables import Received
rows = np.zeros(1, wire.ROW)
rows["family"], rows["protocol"], rows["how"] = 2, 6, 1
rows["first_ns"] = rows["last_ns"] = time.time_ns()
batch = wire.decode(wire.encode_flows(uuid.UUID(int=7).bytes, 1, rows, {}))
ParquetStore(sys.argv[1], 86400.0).write([Received("db1", batch)])
"""


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


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with sdist and wheel."""
    made = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--outdir", str(made), str(tree)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_a_wheel_built_in_isolation_from_the_sdist_runs_in_an_environment_of_its_own(
    dist: Path, tmp_path: Path, version: str
) -> None:
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


def test_the_extra_brings_what_the_fleet_needs_and_the_base_grows_by_nothing(
    dist: Path, tmp_path: Path, version: str
) -> None:
    """Both by name, from a directory of wheels, as docs/FLEET.md writes it."""
    home, store = tmp_path / "venv", tmp_path / "store"
    venv.create(home, with_pip=True)

    def run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(home / "bin" / program), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    def install(what: str) -> set[str]:
        words = ("-m", "pip", "install", "--quiet", "--find-links", str(dist))
        done = run("python", *words, f"{what}=={version}")
        assert done.returncode == 0, done.stdout + done.stderr
        listed = run("python", "-m", "pip", "list", "--format", "freeze").stdout.lower()
        return {line.partition("==")[0].replace("_", "-") for line in listed.splitlines()}

    base = install("packet-hunter")
    assert not {one.replace("_", "-") for one in FLEET} & base
    for program, *words in (["packet-hunter", "fleet", "who"], ["packet-hunter-collect", "x"]):
        lacking = run(program, *words)
        assert lacking.returncode == 1 and lacking.stderr.count("\n") == 1
        assert "pip install 'packet-hunter[fleet]'" in lacking.stderr

    assert base <= (all_ := install("packet-hunter[fleet]"))
    assert FLEET - {"nkeys"} <= all_, all_
    for program in ("export", "collect", "otlp"):
        name = f"packet-hunter-{program}"
        assert run(name, "--version").stdout == f"{name} {version}\n"
    made = run("packet-hunter-export", "--make-nkey", "--nkey", "own.nk", "--host", "web1.example")
    assert made.returncode == 0, made.stderr
    assert run("python", "-I", "-c", STORED, str(store)).stderr == ""
    for question in ("who", "usage", "ends", "map"):
        told = run("packet-hunter", "fleet", question, "--store", str(store), "--json")
        assert json.loads(told.stdout)["total"] == 1, told.stdout + told.stderr
