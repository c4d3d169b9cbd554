# SPDX-License-Identifier: MIT
"""How the module gets into the kernel: the advice fits the machine that it is given on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nlproto.kernel import loading
from nlproto.kernel.loading import advice

RELEASE = "6.1.0-1-test"


@pytest.fixture
def machine(tmp_path: Path) -> Any:
    """A root with a kernel that takes modules, and a source tree."""
    root = tmp_path / "root"
    put(root / "proc/modules")
    put(root / "tree/kmod/Kbuild")
    return root


def put(path: Path, text: str | bytes = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def build(machine: Any, release: Any = RELEASE, end: bytes = b"") -> None:
    put(machine / "tree/kmod/sniffer.ko", f"vermagic={release} SMP\0".encode() + end)


def told(machine: Any, tree: str = "tree") -> Any:
    return advice(machine, RELEASE, machine / tree)


def test_a_module_that_is_built_is_loaded_with_insmod(machine: Any) -> None:
    build(machine)
    found = told(machine)
    assert found.command == f"insmod {machine}/tree/kmod/sniffer.ko"
    assert found.text == f"load it: sudo {found.command}"


def test_an_installed_module_is_loaded_with_modprobe(machine: Any) -> None:
    put(machine / f"lib/modules/{RELEASE}/modules.dep", "updates/dkms/sniffer.ko.xz:\n")
    assert told(machine).command == "modprobe sniffer"


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("sys/module/sniffer/version", "1", "it is loaded"),
        ("proc/sys/kernel/modules_disabled", "1\n", "until a restart"),
        (".dockerenv", "", "on the host"),
        ("run/.containerenv", "", "on the host"),
        ("run/systemd/container", "lxc", "on the host"),
        ("sys/kernel/security/lockdown", "none [integrity] confidentiality\n", "SECURE-BOOT"),
        ("sys/module/module/parameters/sig_enforce", "Y\n", "SECURE-BOOT"),
    ],
)
def test_nothing_is_advised_that_cannot_be_done(
    path: str, text: str, words: str, machine: Any
) -> None:
    build(machine)
    put(machine / path, text)
    found = told(machine)
    assert words in found.text and found.command == "" and "insmod" not in found.text


def test_a_kernel_without_modules_is_not_offered_any(machine: Any) -> None:
    build(machine)
    put(machine / f"lib/modules/{RELEASE}/modules.dep", "updates/dkms/sniffer.ko:\n")
    os.unlink(machine / "proc/modules")
    assert told(machine) == loading.Advice("this kernel takes no modules (no /proc/modules)")


def test_a_signed_module_is_loaded_under_lockdown(machine: Any) -> None:
    build(machine, end=b"~Module signature appended~\n")
    put(machine / "sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    assert told(machine).command.startswith("insmod ")


def test_a_module_that_is_not_built_is_built_first_where_headers_are(machine: Any) -> None:
    (machine / f"lib/modules/{RELEASE}/build").mkdir(parents=True)
    found = told(machine)
    assert found.text.startswith("build and load it: ./build.sh && sudo insmod ")
    build(machine, "6.1.0-0-old")
    assert "is for Linux 6.1.0-0-old, this is 6.1.0-1-test: build" in told(machine).text


def test_without_headers_and_a_package_of_them_it_is_said_that_it_cannot_be_built(
    machine: Any,
) -> None:
    found = told(machine)  # apt-get knows no such release
    assert "cannot be built here" in found.text and "insmod" not in found.text


def test_sources_without_a_build_are_dkms_and_without_sources_a_package(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_source_tree", lambda: None)
    assert "packet-hunter-dkms" in advice(machine, RELEASE).text
    (machine / "usr/src/packet-hunter-1").mkdir(parents=True)
    assert "dkms autoinstall" in advice(machine, RELEASE).text


def test_scripts_get_the_same_line() -> None:
    command = [sys.executable, "-m", "nlproto.kernel.loading"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{advice().text}\n"
