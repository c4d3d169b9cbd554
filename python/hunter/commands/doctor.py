# SPDX-License-Identifier: MIT
"""hunter doctor: says what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hunter.cli.options import DoctorOptions
from hunter.show.text import plain
from nlproto import Error
from nlproto.client.client import DaemonClient
from nlproto.engines.bpf_programs import why_in_parts
from nlproto.errors import NoPrivilege
from nlproto.kernel.bpf import NoBpf
from nlproto.kernel.drop_reasons import DropReasons
from nlproto.kernel.loading import advice
from nlproto.kernel.netlink import Sniffer
from nlproto.records.wire import lib
from nlproto.running.foreign import foreign_packages

__all__ = ["Finding", "examine", "run"]

MODULE = Path("/sys/module/sniffer")
PROBES = tuple(sorted(name for name in dir(lib) if name.startswith("SNIFFER_PROBE_")))


@dataclass(frozen=True, slots=True)
class Finding:
    """`state` is ok, note (works, but less well) or bad; `text` says what to do next."""

    state: str
    subject: str
    text: str


def run(options: DoctorOptions) -> None:
    """Print a line for each subject. Raises Error if something is bad."""
    findings = list(examine(options.socket, options.socket_given))
    for finding in findings:
        print(f"{finding.state:4}  {finding.subject:8}  {plain(finding.text)}")
    bad = [finding.subject for finding in findings if finding.state == "bad"]
    if bad:
        raise Error(f"something is wrong with: {', '.join(bad)}")


def examine(socket: str, needed: bool = False, module: Path = MODULE) -> Iterator[Finding]:
    """Check each part in turn. `needed`: it is bad if no daemon serves `socket`."""
    checks: dict[str, Callable[[], Finding]] = {
        "packages": _python,
        "module": lambda: _module(module),
        "probes": lambda: _probes(module),
        "ebpf": lambda: _ebpf(module),
        "drops": _drops,
        "daemon": lambda: _daemon(socket, needed),
    }
    for subject, check in checks.items():
        try:
            yield check()
        except Exception as error:  # the user needs the other answers too
            yield Finding("bad", subject, f"cannot be checked: {type(error).__name__}: {error}")


def _python() -> Finding:
    foreign = foreign_packages()
    if foreign:
        return Finding("bad", "packages", "; ".join(foreign))
    return Finding("ok", "packages", f"Python {platform.python_version()}, no foreign package")


def _module(module: Path) -> Finding:
    if not module.exists():
        return Finding(
            "note",
            "module",
            f"not loaded; {advice().text}",
        )
    version = module / "version"
    text = f"loaded, version {version.read_text().strip() if version.exists() else 'unknown'}"
    return Finding("ok", "module", text)


def _probes(module: Path) -> Finding:
    if not module.exists():
        return Finding("note", "probes", "belong to the module, which is not loaded")
    try:
        with Sniffer() as sniffer:
            info = sniffer.info()
    except NoPrivilege:
        return Finding("note", "probes", "only root can see which fire: sudo packet-hunter doctor")
    except Error as error:
        return Finding("bad", "probes", str(error))
    registered, firing = int(info["probes_registered"]), int(info["probes_firing"])
    if not info["canary"]:
        return Finding(
            "bad",
            "probes",
            "kprobes do not fire: sysctl kernel.ftrace_enabled=1, and 1 into"
            " /sys/kernel/debug/kprobes/enabled",
        )
    missing = [name for name in PROBES if not registered & getattr(lib, name)]
    seen = f"{registered.bit_count()} registered, {firing.bit_count()} seen to fire"
    if missing:
        names = ", ".join(name.removeprefix("SNIFFER_PROBE_").lower() for name in missing)
        return Finding("note", "probes", f"{seen}; this kernel lacks {names}")
    return Finding("ok", "probes", seen)


def _ebpf(module: Path) -> Finding:
    if module.exists():
        return Finding("ok", "ebpf", "not needed: the module is loaded")
    if os.geteuid() != 0:
        return Finding("note", "ebpf", "only root can see if it runs: sudo packet-hunter doctor")
    try:
        parts = why_in_parts()
    except NoBpf as error:
        return Finding("note", "ebpf", f"cannot run: {error}")
    if parts:
        return Finding("note", "ebpf", parts)
    return Finding("ok", "ebpf", "runs: names are exact without the module")


def _drops() -> Finding:
    if os.geteuid() != 0:
        return Finding("note", "drops", "only root can see if they have reasons")
    try:
        DropReasons().close()
    except NoBpf as error:
        return Finding("note", "drops", f"are counted without a reason: {error}")
    return Finding("ok", "drops", "the kernel says why it drops a packet")


def _daemon(socket: str, needed: bool) -> Finding:
    try:
        with DaemonClient(socket) as client:
            figures = client.stats()
    except Error as error:
        state = "bad" if needed or os.path.exists(socket) else "note"
        return Finding(state, "daemon", str(error))
    text = f"pid {figures.get('pid', '?')}, engine {figures.get('engine', '?')}"
    clients = figures.get("clients")
    if isinstance(clients, Mapping):  # root and the group get the answer
        connected = clients.get("connected", "?")
        text += f", {connected} client{'' if connected == 1 else 's'}"
    return Finding("ok", "daemon", text)
