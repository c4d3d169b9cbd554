# SPDX-License-Identifier: MIT
"""Which places root's Python may import from."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from nlproto.guard import others_can_write, started_module

root_only = pytest.mark.skipif(os.getuid() != 0, reason="changes owners: needs root")
BOB = 1234


@pytest.fixture(name="place")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("project")
    place.chmod(0o755)
    return place


def test_a_directory_of_root_alone_is_safe() -> None:
    assert others_can_write("/usr", {}) is None


def test_a_directory_for_all_is_unsafe_although_sticky(place: Any) -> None:
    place.chmod(0o1777)
    assert others_can_write(str(place), {}) == str(place)


@root_only
def test_the_owner_must_be_root_or_the_user_behind_sudo(place: Any) -> None:
    os.chown(place, BOB, BOB)
    sudo = {"SUDO_UID": str(BOB), "SUDO_GID": str(BOB)}
    assert others_can_write(str(place), {})
    assert others_can_write(str(place), {"SUDO_UID": "999"})
    assert others_can_write(str(place), sudo) is None
    place.chmod(0o775)
    assert others_can_write(str(place), sudo) is None
    assert others_can_write(str(place), {"SUDO_UID": str(BOB), "SUDO_GID": "5"})
    place.chmod(0o777)
    assert others_can_write(str(place), sudo)


@root_only
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o755])
def test_a_directory_above_that_others_can_write_is_unsafe(place: Any, mode: int) -> None:
    inner = place / "a" / "b"
    inner.mkdir(parents=True)
    assert others_can_write(str(inner), {}) is None
    if mode == 0o755:
        os.chown(place, BOB, BOB)
    else:
        os.chown(place, 0, BOB)
        place.chmod(mode)
    assert others_can_write(str(inner), {}) == str(place)


@root_only
def test_a_sticky_directory_above_is_safe_for_what_is_there_and_roots(place: Any) -> None:
    place.chmod(0o1777)
    (place / "roots").mkdir(mode=0o755)
    (place / "bobs").mkdir()
    os.chown(place / "bobs", BOB, BOB)
    assert others_can_write(str(place / "roots"), {}) is None
    assert others_can_write(str(place / "bobs"), {}) == str(place / "bobs")
    assert others_can_write(str(place / "not-yet-there"), {}) == str(place)


@root_only
def test_every_link_on_the_way_counts(place: Any) -> None:
    (place / "safe").mkdir()
    (place / "loose").mkdir()
    (place / "loose" / "link").symlink_to(place / "safe")
    (place / "link").symlink_to("loose/link")
    assert others_can_write(str(place / "link"), {}) is None
    (place / "loose").chmod(0o777)
    assert others_can_write(str(place / "link"), {}) == str(place / "loose")
    (place / "loose").chmod(0o1777)
    os.lchown(place / "loose" / "link", BOB, BOB)
    assert others_can_write(str(place / "link"), {}) == str(place / "loose" / "link")
    (place / "circle").symlink_to("circle")
    others_can_write(str(place / "circle"), {})


def _plant_module(place: Any) -> Any:
    (place / "argparse.py").write_text("")
    return place / "argparse.py"


def _plant_package(place: Any) -> Any:
    (place / "hunter").mkdir()
    (place / "hunter" / "__init__.py").write_text("")
    return place / "hunter"


def _plant_extension(place: Any) -> Any:
    (place / "select.abi3.so").write_text("")
    return place / "select.abi3.so"


def _plant_bytecode(place: Any) -> Any:
    (place / "__pycache__").mkdir()
    return place / "__pycache__"


def _plant_part_of_a_package(place: Any) -> Any:
    (place / "hunter" / "cli").mkdir(parents=True)
    for name in ("__init__", "cli/__init__", "cli/options"):
        (place / "hunter" / f"{name}.py").write_text("")
    return place / "hunter" / "cli" / "options.py"


def _plant_beside_a_dangling_link(place: Any) -> Any:
    for number in range(20):
        (place / f".#{number}.py").symlink_to("user@host.123")
    return _plant_module(place)


def _plant_what_may_become_a_package(place: Any) -> Any:
    (place / "yaml").mkdir()
    return place / "yaml"


def _plant_a_link_through_another_directory(place: Any) -> Any:
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "target").write_text("")
    (place / "socket.py").symlink_to("elsewhere/target")
    return place / "elsewhere"


def _plant_link(place: Any) -> Any:
    (place / "target").write_text("")
    (place / "socket.py").symlink_to("target")
    return place / "target"


PLANTS = [
    *(_plant_module, _plant_package, _plant_extension, _plant_link, _plant_bytecode),
    *(_plant_part_of_a_package, _plant_beside_a_dangling_link, _plant_what_may_become_a_package),
    _plant_a_link_through_another_directory,
]


@root_only
@pytest.mark.parametrize("plant", PLANTS)
def test_a_module_of_somebody_else_in_roots_directory_is_unsafe(place: Any, plant: Any) -> None:
    planted = plant(place)
    assert others_can_write(str(place), {}) is None
    os.chown(planted, BOB, BOB)
    assert str(place) in str(others_can_write(str(place), {}))
    os.chown(planted, 0, 0)
    planted.chmod(0o777)
    assert str(place) in str(others_can_write(str(place), {}))


@root_only
def test_what_no_import_finds_does_not_matter(place: Any) -> None:
    (place / "notes.txt").write_text("")
    (place / "home").mkdir()
    for name in ("notes.txt", "home"):
        os.chown(place / name, BOB, BOB)
    assert others_can_write(str(place), {}) is None


@pytest.mark.parametrize(
    ("words", "module"),
    [
        ("-m daemon --help", "daemon"),
        ("-mdaemon", "daemon"),
        ("-W ignore -Bm hunter", "hunter"),
        ("-Wignore -X dev -bb -m hunter.__main__", "hunter.__main__"),
        ("--check-hash-based-pycs always -m daemon", "daemon"),
        ("-m pytest -m daemon", "pytest"),
        ("script.py -m daemon", None),
        ("-c 1 -m daemon", None),
        ("-W -m daemon", None),
        ("- -m daemon", None),
        ("-m", None),
        ("", None),
    ],
)
def test_the_module_is_found_as_the_interpreter_finds_it(words: str, module: str | None) -> None:
    assert started_module([sys.executable, *words.split()]) == module
