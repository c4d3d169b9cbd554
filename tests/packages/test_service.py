# SPDX-License-Identifier: MIT
"""The Debian packages on a running Debian: systemd, DKMS, the module, and the way out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from vmtest.kernlog import problems

from packages.machine import Machine
from packages.roots import Root
from waiting import until

UNIT = "packet-hunterd.service"
TRAFFIC = (
    'python3 -c "import socket; a = socket.socket(type=socket.SOCK_DGRAM); '
    "a.bind(('127.0.0.1', 4711)); b = socket.socket(type=socket.SOCK_DGRAM); "
    "[b.sendto(b'x', ('127.0.0.1', 4711)) for _ in range(10)]\""
)


@pytest.fixture(scope="module")
def machine(base: Path, packages: Mapping[str, Path]) -> Iterator[Machine]:
    """A machine on which dpkg installed both packages while it ran. Tests follow its life."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("needs qemu-system-x86_64 (package qemu-system-x86)")
    with Root(base) as root:
        for name in ("packet-hunter", "packet-hunter-dkms"):
            shutil.copy(packages[name], root.path / "srv")
        with Machine(root) as machine:
            machine.run("dpkg -i /srv/packet-hunter*.deb", timeout=900)
            yield machine


def test_systemd_has_started_the_daemon(machine: Machine) -> None:
    assert machine.run(f"systemctl is-enabled {UNIT}").stdout == "enabled\n"
    status = machine.run(f"systemctl is-active {UNIT} || journalctl -u {UNIT}").stdout
    assert status == "active\n"
    user = machine.run(f"ps -o user= -p $(systemctl show -P MainPID {UNIT})").stdout
    assert user.strip().startswith("packet")
    figures = json.loads(machine.run("packet-hunter stats --json").stdout)
    # no module yet, and a kernel with BTF: the unit's capabilities are enough for engine ebpf
    assert figures["engine"] == "ebpf"


def test_systemd_finds_no_fault_in_the_unit_and_little_exposure(machine: Machine) -> None:
    verified = machine.run(f"systemd-analyze verify {UNIT}").stdout
    assert UNIT not in verified
    report = machine.run(f"systemd-analyze security --no-pager {UNIT}").stdout
    [exposure] = re.findall(r"Overall exposure level for \S+: ([\d.]+)", report)
    # bpf(), and sched_setscheduler() of engine packet's reader, cost 0.2
    assert float(exposure) <= 2.7, report


def test_the_module_that_dkms_installed_loads_and_the_daemon_uses_it(
    machine: Machine, version: str
) -> None:
    release = machine.run("uname -r").stdout.strip()
    status = machine.run("dkms status").stdout
    assert f"packet-hunter/{version}, {release}, x86_64: installed" in status
    path = machine.run("modinfo -n sniffer").stdout.strip()
    assert Path(path).parent == Path(f"/lib/modules/{release}/updates/dkms")
    machine.run("dmesg --clear; modprobe sniffer")
    assert machine.run("cat /sys/module/sniffer/version").stdout.strip() == version
    machine.run(f"systemctl restart {UNIT}")
    figures = json.loads(machine.run("packet-hunter stats --json").stdout)
    assert figures["engine"] == "module"
    assert "ok    probes" in machine.run("packet-hunter doctor").stdout


def test_the_daemon_knows_who_owned_a_port_after_its_process_ended(machine: Machine) -> None:
    machine.run(TRAFFIC)
    until(lambda: "python3" in machine.run("packet-hunter who --port 4711 --json; true").stdout)


def _journal(machine: Machine) -> list[dict[str, object]]:
    lines = machine.run(f"journalctl -o json --no-pager -u {UNIT}").stdout.splitlines()
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [one for one in entries if one.get("SYSLOG_IDENTIFIER") == "packet-hunterd"]


def _messages(machine: Machine) -> list[str]:
    return [str(one["MESSAGE"]) for one in _journal(machine)]


def test_reload_reads_the_configuration_again_and_the_journal_has_fields(machine: Machine) -> None:
    machine.run("echo 'max_clients: many' > /etc/packet-hunter/daemon.yaml")
    machine.run(f"systemctl reload {UNIT}")
    until(lambda: any("daemon.yaml:1: max_clients" in one for one in _messages(machine)), 60)
    machine.run("echo 'log_level: debug' > /etc/packet-hunter/daemon.yaml")
    machine.run(f"systemctl reload {UNIT}")
    until(lambda: "configuration read again" in _messages(machine), 60)
    assert machine.run(f"systemctl is-active {UNIT}").stdout == "active\n"
    own = _journal(machine)
    assert {"daemon"} <= {one.get("LOGGER") for one in own}
    assert all("CODE_FILE" in one and "THREAD_NAME" in one for one in own)


def test_sigterm_ends_the_daemon_cleanly(machine: Machine) -> None:
    machine.run(f"systemctl stop {UNIT}")
    shown = machine.run(f"systemctl show -p Result,ExecMainStatus {UNIT}").stdout.split()
    assert set(shown) == {"Result=success", "ExecMainStatus=0"}
    machine.run(f"systemctl start {UNIT}")


def test_purge_unloads_stops_and_leaves_nothing(machine: Machine) -> None:
    machine.run("dpkg --purge packet-hunter packet-hunter-dkms")
    assert machine.run(f"systemctl is-active {UNIT}", check=False).stdout == "inactive\n"
    assert "sniffer" not in machine.run("cat /proc/modules").stdout
    machine.run("! modinfo sniffer")
    left = machine.run(
        "ls -d /etc/packet-hunter /var/lib/packet-hunter /run/packet-hunter /usr/lib/packet-hunter"
        " /usr/src/packet-hunter-* /var/lib/dkms/packet-hunter 2>/dev/null",
        check=False,
    )
    assert left.stdout == ""
    assert "packet-hunter" not in machine.run("getent passwd; getent group").stdout
    assert problems(machine.run("dmesg").stdout.splitlines()) == []
