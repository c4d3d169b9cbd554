# SPDX-License-Identifier: MIT
"""DKMS, the real one, over a life with two kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmtest.build import copy_sources

from packages.roots import UPGRADE, Root

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def machine(debian: Root) -> Root:
    """A Debian system with this tree in /srv/tree, and nothing added to DKMS."""
    tree = debian.path / "srv" / "tree"
    tree.mkdir()
    copy_sources(ROOT, tree)
    (tree / "dkms.conf").write_bytes((ROOT / "dkms.conf").read_bytes())
    return debian


def test_dkms_adds_builds_installs_survives_a_kernel_upgrade_and_removes(
    machine: Root, version: str
) -> None:
    name = f"packet-hunter/{version}"
    first = only(kernels(machine))

    machine.run("dkms add /srv/tree")
    assert f"{name}: added" in machine.run("dkms status").stdout
    machine.run(f"dkms build {name} -k {first}")
    assert f"{name}, {first}, x86_64: built" in machine.run("dkms status").stdout
    machine.run(f"dkms install {name} -k {first}")
    assert f"{name}, {first}, x86_64: installed" in machine.run("dkms status").stdout
    assert module_of(machine, first) == (version, first)

    # dpkg calls DKMS for headers that arrive; the module must be there before the first boot.
    machine.run(UPGRADE)
    second = only(kernels(machine) - {first})
    assert f"{name}, {second}, x86_64: installed" in machine.run("dkms status").stdout
    assert module_of(machine, second) == (version, second)
    assert module_of(machine, first) == (version, first)

    machine.run(f"dkms remove {name} --all")
    assert machine.run("dkms status").stdout.strip() == ""
    assert list((machine.path / "lib/modules").rglob("sniffer.ko*")) == []
    for kernel in (first, second):
        machine.run(f"! modinfo -k {kernel} sniffer")


def test_dkms_signs_with_the_key_that_secure_boot_will_ask_for(machine: Root, version: str) -> None:
    kernel = only(kernels(machine))
    machine.run(f"dkms add /srv/tree && dkms install packet-hunter/{version} -k {kernel}")

    built = machine.run(f"modinfo -k {kernel} -F sig_key sniffer").stdout.strip()
    serial = machine.run(
        "openssl x509 -inform DER -in /var/lib/dkms/mok.pub -noout -serial"
    ).stdout.strip()
    assert built.replace(":", "") == serial.removeprefix("serial=")
    assert (machine.path / "var/lib/dkms/mok.key").stat().st_mode & 0o077 == 0


def test_dkms_signs_with_a_key_of_ones_own(machine: Root, version: str) -> None:
    kernel = only(kernels(machine))
    name = f"packet-hunter/{version}"
    machine.run(f"dkms add /srv/tree && dkms install {name} -k {kernel}")

    machine.run(
        "mkdir -p /root/keys /etc/dkms/framework.conf.d && cd /root/keys"
        " && openssl req -new -x509 -newkey rsa:2048 -nodes -days 100 -subj '/CN=a key of my own/'"
        "    -keyout module.key -outform DER -out module.der"
        " && echo mok_signing_key=$PWD/module.key > /etc/dkms/framework.conf.d/own.conf"
        " && echo mok_certificate=$PWD/module.der >> /etc/dkms/framework.conf.d/own.conf"
    )
    machine.run(f"dkms build {name} --force -k {kernel} && dkms install {name} --force -k {kernel}")
    signer = machine.run(f"modinfo -k {kernel} -F signer sniffer").stdout
    assert signer == "a key of my own\n"


def kernels(machine: Root) -> set[str]:
    """Releases of the kernels whose headers are installed."""
    # The links are absolute: from out here they lead nowhere.
    directories = (machine.path / "lib/modules").iterdir()
    return {place.name for place in directories if (place / "build").is_symlink()}


def module_of(machine: Root, kernel: str) -> tuple[str, str]:
    """Version and kernel release of the module that modprobe would load."""
    path = machine.run(f"modinfo -k {kernel} -n sniffer").stdout.strip()
    assert path.startswith(f"/lib/modules/{kernel}/updates/dkms/sniffer.ko")
    fields = [
        machine.run(f"modinfo -k {kernel} -F {field} sniffer").stdout.split()[0]
        for field in ("version", "vermagic")
    ]
    return fields[0], fields[1]


def only(things: set[str]) -> str:
    [thing] = things
    return thing
