# SPDX-License-Identifier: MIT
"""Tests of what is shipped: wheel, sdist, DKMS, Debian packages, in systems made for them.

They want root, mmdebstrap, QEMU and, the first time, the package mirror: `make test-packages`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent.parent
for directory in (TESTS.parent, TESTS.parent / "vm"):
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))

from vmtest.kernels import Unavailable  # noqa: E402

from packages.roots import SUITES, Root, base_root  # noqa: E402


@pytest.fixture(scope="session", params=SUITES)
def base(request: pytest.FixtureRequest) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root to make a Debian system")
    try:
        return base_root(str(request.param))
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def debian(base: Path) -> Iterator[Root]:
    """A Debian system of one test's own."""
    with Root(base) as root:
        yield root


@pytest.fixture(scope="session")
def source_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with packet-hunter_*.dsc and its tar file."""
    if shutil.which("dpkg-source") is None:
        pytest.skip("needs dpkg-source (package dpkg-dev)")
    target = tmp_path_factory.mktemp("source")
    build = [str(ROOT / "debian" / "build"), "--source-only", str(target)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture(scope="session")
def build_root(base: Path, source_package: Path) -> Iterator[Root]:
    """A Debian system in whose /src dpkg-buildpackage built the packages."""
    with Root(base) as root:
        shutil.copytree(source_package, root.path / "src")
        root.run("cd /src && dpkg-source -x *.dsc tree && cd tree && dpkg-buildpackage -us -uc")
        yield root


@pytest.fixture(scope="session")
def packages(build_root: Root) -> dict[str, Path]:
    """Package name -> .deb file."""
    return {file.name.split("_")[0]: file for file in (build_root.path / "src").glob("*.deb")}


@pytest.fixture(scope="session")
def version() -> str:
    return (ROOT / "VERSION").read_text().strip()
