# SPDX-License-Identifier: MIT
"""The Debian packages: what dpkg-buildpackage makes of this tree."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from packages.roots import Root


@pytest.fixture
def installed(debian: Root, packages: Mapping[str, Path]) -> Root:
    """A Debian system with both packages."""
    put(debian, packages)
    debian.run("dpkg -i /srv/packet-hunter*.deb")
    return debian


def test_lintian_finds_no_error(build_root: Root) -> None:
    done = build_root.run(
        "cd /src && lintian --allow-root --tag-display-limit 0 --fail-on error"
        " packet-hunter_*_*.changes",
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_second_build_elsewhere_gives_the_same_packages(build_root: Root) -> None:
    """Another directory, umask, time zone and day; the first one was that of the builder."""
    build_root.run(
        "mkdir -p /second/place && cd /second/place && cp /src/*.dsc /src/*.tar.* . &&"
        " dpkg-source -x *.dsc another-tree && cd another-tree && umask 077 &&"
        " TZ=Asia/Kolkata LC_ALL=C.UTF-8 dpkg-buildpackage -us -uc -b"
    )
    places = (build_root.path / "src", build_root.path / "second/place")
    one, other = (
        {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in place.glob("*.deb")}
        for place in places
    )
    assert one and one == other


def test_commands_run_isolated_and_prefer_their_own_packages(installed: Root) -> None:
    trap = 'raise SystemExit("a foreign package was imported")\n'
    paths = installed.run("python3 -c 'import sys; print(*sys.path)'").stdout.split()
    places = [path.lstrip("/") for path in paths if path.endswith("dist-packages")] + ["tmp"]
    assert len(places) >= 3
    for place in places:
        for name in ("daemon", "hunter", "nlproto", "msgspec"):
            package = installed.path / place / name
            package.mkdir(parents=True)
            (package / "__init__.py").write_text(trap)
    for command in ("packet-hunter --help", "packet-hunterd --help"):
        done = installed.run(f"cd /tmp && PYTHONPATH=/tmp {command}")
        assert "usage: packet-hunter" in done.stdout


def test_the_commands_know_their_version(installed: Root, version: str) -> None:
    for command in ("packet-hunter", "packet-hunterd"):
        assert installed.run(f"{command} --version").stdout == f"{command} {version}\n"


def test_no_python_of_ours_is_where_other_programs_look(installed: Root) -> None:
    files = installed.run("dpkg -L packet-hunter").stdout.splitlines()
    python = [file for file in files if file.endswith((".py", ".so"))]
    assert python
    assert {file for file in python if not file.startswith("/usr/lib/packet-hunter/")} == set()
    installed.run("cd / && ! python3 -c 'import nlproto'")


def test_every_module_of_the_package_imports(installed: Root) -> None:
    # textual, pyarrow and prometheus_client are suggested at most.
    script = (
        "import sys, pkgutil, importlib; sys.path.insert(0, '/usr/lib/packet-hunter')\n"
        "optional = {'textual', 'pyarrow', 'prometheus_client'}\n"
        "for top in ('nlproto', 'daemon', 'hunter'):\n"
        "    path = importlib.import_module(top).__path__\n"
        "    for module in pkgutil.walk_packages(path, top + '.'):\n"
        "        try:\n"
        "            importlib.import_module(module.name)\n"
        "        except ModuleNotFoundError as error:\n"
        "            if error.name.split('.')[0] not in optional: raise\n"
    )
    (installed.path / "srv/import.py").write_text(script)
    installed.run("python3 -I /srv/import.py")


def test_purge_leaves_nothing(debian: Root, packages: Mapping[str, Path]) -> None:
    put(debian, packages)
    before = everything(debian)
    told = debian.run("dpkg -i /srv/packet-hunter*.deb").stdout
    assert "failed" not in told.lower(), told
    assert everything(debian) - before
    debian.run("mkdir -p /var/lib/packet-hunter && touch /var/lib/packet-hunter/history.db")
    debian.run("packet-hunter --help > /dev/null")
    debian.run("dpkg --purge packet-hunter packet-hunter-dkms")
    assert everything(debian) - before == set()
    assert "packet-hunter" not in debian.run("getent passwd; getent group").stdout
    assert debian.run("dkms status").stdout.strip() == ""


def everything(root: Root) -> set[str]:
    """Every file, less the records that dpkg, DKMS and depmod keep of what they did."""
    skip = r"^/\(proc\|sys\|dev\|tmp\|run\|var/log\|var/cache\|var/lib/dpkg\|var/lib/systemd\)/"
    listing = root.run(f"find / -xdev | grep -v '{skip}'").stdout.splitlines()
    keys = {"/var/lib/dkms/mok.key", "/var/lib/dkms/mok.pub"}
    # Running a program may make Python compile Debian's own packages.
    return {
        line
        for line in listing
        if line not in keys and not (line.startswith("/usr/lib/python3") and "__pycache__" in line)
    }


def put(root: Root, packages: Mapping[str, Path]) -> None:
    for name in ("packet-hunter", "packet-hunter-dkms"):
        shutil.copy(packages[name], root.path / "srv")
