# SPDX-License-Identifier: MIT
"""`python -m daemon|hunter` as root where somebody else could plant a module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="is about root")

PYTHON = Path(__file__).resolve().parents[2] / "python"
BOB = 1234
PLANTED = "import posix\nposix.write(2, b'PLANTED\\n')\n"
# What runpy, our own first lines and the programs import, and our own names.
NAMES = [
    *("importlib", "contextlib", "functools", "types", "warnings", "runpy", "os", "stat"),
    *("argparse", "dataclasses", "socket", "json", "asyncio", "errno", "threading", "typing"),
    *("numpy", "cffi", "yaml", "msgspec", "psutil", "lark", "rich"),
]


@pytest.fixture(name="place")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("place")
    place.chmod(0o755)
    return place


def _plant(place: Any) -> None:
    for name in NAMES:
        (place / f"{name}.py").write_text(PLANTED)
    for name in ("daemon", "fleet", "hunter", "nlproto"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text(PLANTED)
        (place / name / "__main__.py").write_text(PLANTED)


def _start(
    module: Any,
    place: Any,
    interpreter: Any = sys.executable,
    environment: Any = None,
    options: Any = (),
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [interpreter, *options, "-m", module, "--help"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _is_refused(done: Any, place: Any) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"others can write '{place}" in done.stderr
    assert "packet-hunter" in done.stderr and "PLANTED" not in done.stderr


PROGRAMS = ["daemon", "hunter", "fleet.export", "fleet.collect", "fleet.otlp"]
each = pytest.mark.parametrize("module", PROGRAMS)
guarded = pytest.mark.skipif(
    not Path(sysconfig.get_path("purelib"), "packet-hunter.pth").exists(),
    reason="packet-hunter.pth is not installed: ./build.sh",
)


@guarded
@each
def test_nothing_planted_in_a_directory_that_others_can_write_runs(module: Any, place: Any) -> None:
    _plant(place)
    os.chown(place, BOB, BOB)
    _is_refused(_start(module, place), place)
    os.chown(place, 0, 0)
    place.chmod(0o1777)
    _is_refused(_start(module, place), place)


@guarded
@each
def test_a_directory_above_that_others_can_write_is_refused(module: Any, place: Any) -> None:
    inner = place / "inner"
    inner.mkdir()
    _plant(inner)
    place.chmod(0o777)
    _is_refused(_start(module, inner), place)


@guarded
@each
@pytest.mark.parametrize("name", ["importlib.py", "contextlib.py", "argparse.py", "hunter"])
def test_one_foreign_module_in_roots_directory_is_refused(
    module: Any, place: Any, name: str
) -> None:
    _plant(place)
    os.chown(place / name, BOB, BOB)
    _is_refused(_start(module, place), place / name)


@guarded
@each
def test_another_place_on_the_path_is_refused(module: Any, place: Any) -> None:
    (place / "safe").mkdir()
    (place / "loose").mkdir(mode=0o755)
    (place / "loose").chmod(0o777)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(place / "loose")}
    for options in ((), ("-P",)):
        done = _start(module, place / "safe", environment=environment, options=options)
        _is_refused(done, place / "loose")


@guarded
def test_other_modules_of_ours_are_guarded_too(place: Any) -> None:
    _plant(place)
    place.chmod(0o777)
    for module in ("nlproto.kernel.loading", "hunter.save.writer"):
        _is_refused(_start(module, place), place)


@each
def test_nothing_is_imported_from_the_current_directory(module: Any, place: Any) -> None:
    for name in ("argparse", "asyncio", "numpy"):
        (place / f"{name}.py").write_text(PLANTED)
    done = _start(module, place)
    assert done.returncode == 0, done.stderr
    assert "PLANTED" not in done.stderr


@each
def test_a_safe_directory_is_no_obstacle(module: Any, place: Any) -> None:
    assert _start(module, place).returncode == 0


@each
def test_the_isolated_interpreter_starts_anywhere(module: Any, place: Any) -> None:
    _plant(place)
    place.chmod(0o777)
    for option in ("-I", "-P"):
        done = _start(module, place, options=(option,))
        assert done.returncode == 0, done.stderr
        assert "PLANTED" not in done.stderr


@each
def test_other_programs_of_this_interpreter_are_not_concerned(module: Any, place: Any) -> None:
    (place / f"{module}.txt").write_text("[]")
    place.chmod(0o777)
    done = subprocess.run(
        [sys.executable, "-m", "json.tool", f"{module}.txt"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@each
def test_without_the_file_in_site_packages_our_first_lines_refuse(
    module: Any, place: Any, tmp_path: Path
) -> None:
    """What the interpreter and runpy import before is then beyond us; all else is not."""
    copy = tmp_path / "python"
    shutil.copytree(PYTHON, copy, ignore=shutil.ignore_patterns("__pycache__", "build"))
    before = {"importlib", "contextlib", "functools", "types", "warnings"}
    _plant(place)
    for name in (*before, "daemon", "fleet", "hunter", "nlproto"):
        shutil.rmtree(place / name, ignore_errors=True)
        (place / f"{name}.py").unlink(missing_ok=True)
    (place / "nlproto.py").write_text(PLANTED)
    place.chmod(0o777)
    site = sysconfig.get_path("purelib")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{copy}:{site}"}
    base = getattr(sys, "_base_executable", sys.executable)
    _is_refused(_start(module, place, base, environment), place)
