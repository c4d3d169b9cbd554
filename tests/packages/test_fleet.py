# SPDX-License-Identifier: MIT
"""The Debian package of the fleet's programs, which brings libraries that Debian has not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from packages.roots import Root

HOME = "/usr/lib/packet-hunter-fleet"
PROGRAMS = ("packet-hunter-collect", "packet-hunter-export", "packet-hunter-otlp")
# A collector's folder with one flow of one process.
STORED = """
import sys, time, uuid
sys.path[:0] = ["/usr/lib/packet-hunter", "/usr/lib/packet-hunter-fleet"]
import numpy as np
from fleet import wire
from fleet.collect.parquet import ParquetStore
from fleet.collect.tables import Received
rows = np.zeros(1, wire.ROW)
rows["family"], rows["protocol"], rows["how"] = 2, 6, 1
rows["lport"], rows["rport"], rows["packets_out"], rows["bytes_out"] = 40000, 5432, 1, 60
rows["first_ns"] = rows["last_ns"] = time.time_ns()
rows["tgid"], rows["start_ns"], rows["comm"] = 100, 5, b"psql"
batch = wire.decode(wire.encode_flows(uuid.UUID(int=7).bytes, 1, rows, {}))
ParquetStore("/srv/store", 86400.0).write([Received("db1", batch)])
"""


@pytest.fixture
def installed(debian: Root, packages: Mapping[str, Path]) -> Root:
    """A Debian system with the package and what it depends on."""
    debian.run("apt-get install --yes --no-install-recommends python3-nacl tzdata", online=True)
    for name in ("packet-hunter", "packet-hunter-fleet"):
        shutil.copy(packages[name], debian.path / "srv")
    debian.run("dpkg -i /srv/packet-hunter_*.deb")
    done = debian.run("packet-hunter fleet who --since 1h", check=False)
    assert done.returncode == 1 and "packet-hunter-fleet" in done.stdout
    assert len(done.stdout.splitlines()) == 1, done.stdout
    debian.run("dpkg -i /srv/packet-hunter-fleet_*.deb")
    return debian


def test_the_fleet_s_programs_run_and_a_folder_is_asked(installed: Root, version: str) -> None:
    for program in PROGRAMS:
        assert installed.run(f"{program} --version").stdout == f"{program} {version}\n"
        assert installed.run(f"test -e /usr/share/man/man8/{program}.8.gz; echo $?").stdout == "0\n"
    installed.run("packet-hunter-export --make-nkey --nkey /srv/own.nk --host web1.example")
    (installed.path / "srv/stored.py").write_text(STORED)
    installed.run("python3 -I /srv/stored.py")
    for question in ("who", "usage", "ends", "map", "new"):
        told = installed.run(f"packet-hunter fleet {question} --store /srv/store --json").stdout
        assert json.loads(told)["total"] == 1, told
    for unit in ("export", "collect"):
        path = f"/lib/systemd/system/packet-hunter-{unit}.service"
        text = installed.run(f"cat {path} || cat /usr{path}").stdout
        assert f"ExecStart=/usr/bin/packet-hunter-{unit} " in text
        assert installed.run(f"systemd-analyze verify packet-hunter-{unit}.service").stdout == ""


def test_the_base_package_grows_by_nothing_and_finds_nothing(
    installed: Root, packages: Mapping[str, Path]
) -> None:
    base = installed.run("dpkg -L packet-hunter").stdout.splitlines()
    own = installed.run("dpkg -L packet-hunter-fleet").stdout.splitlines()
    assert not [
        path for path in base if HOME in path or "/fleet/" in path.replace("hunter/fleet", "")
    ]
    depends = installed.run("dpkg-query -W -f '${Depends}' packet-hunter").stdout
    assert not [name for name in ("nacl", "pyarrow", "duckdb", "nats") if name in depends]
    modules = [path for path in own if path.endswith((".py", ".so"))]
    assert modules and all(path.startswith(HOME) for path in modules)
    installed.run("cd / && ! python3 -c 'import duckdb' 2>/dev/null")
    installed.run("dpkg --purge packet-hunter-fleet && test ! -e " + HOME)
    assert "packet-hunter-fleet" in installed.run("packet-hunter fleet who", check=False).stdout
