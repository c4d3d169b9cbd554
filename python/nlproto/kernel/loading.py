# SPDX-License-Identifier: MIT
"""How sniffer.ko gets into this machine's kernel, or why it cannot.

python -m nlproto.kernel.loading prints the one line that every program shows.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nlproto.running.commands import from_here

__all__ = ["Advice", "advice"]

_SIGNED = (
    b"~Module signature appended~\n"  # the file's last bytes: include/linux/module_signature.h
)
_CONTAINER_MARKS = (".dockerenv", "run/.containerenv", "run/systemd/container")


@dataclass(frozen=True, slots=True)
class Advice:
    """`command` loads the module, "" if no command can. `text` is one line for people."""

    text: str
    command: str = ""


def advice(root: Path = Path("/"), release: str | None = None, tree: Path | None = None) -> Advice:
    """Return how to load the module on this machine.

    `root`: where its /proc, /sys and /lib are; `release`: the running kernel's; `tree`: the source
    tree, by default the one with this file, if it is in one.
    """
    release = release or os.uname().release
    tree = tree or _source_tree()
    barrier = _barrier(root)
    if barrier:
        return Advice(barrier)
    modules = root / "lib/modules" / release
    if re.search(r"/sniffer\.ko", _read(modules / "modules.dep")):
        return Advice("load it: sudo modprobe sniffer", "modprobe sniffer")
    if tree is not None:
        return _from_tree(root, tree, release, (modules / "build").exists())
    if any((root / "usr/src").glob("packet-hunter-*")):
        return Advice("build and load it: sudo dkms autoinstall && sudo modprobe sniffer")
    return Advice("install packet-hunter-dkms, or build it from the source tree (README)")


def _barrier(root: Path) -> str:
    """Return why no module can be loaded, however it is built; "" if one can."""
    if (root / "sys/module/sniffer").exists():
        return "it is loaded; only the initial network namespace reaches it"
    if not (root / "proc/modules").exists():
        return "this kernel takes no modules (no /proc/modules)"
    if _read(root / "proc/sys/kernel/modules_disabled").strip() == "1":
        return "no module can be loaded until a restart (sysctl kernel.modules_disabled is 1)"
    if any((root / mark).exists() for mark in _CONTAINER_MARKS):
        return "this is a container: load it on the host"
    return ""


def _from_tree(root: Path, tree: Path, release: str, headers: bool) -> Advice:
    built = tree / "kmod/sniffer.ko"
    try:
        raw = built.read_bytes()
    except OSError:
        raw = b""
    shown = from_here(built)
    found = re.search(rb"vermagic=([^ \0]+)", raw)
    built_for = found[1].decode("ascii", "replace") if found else ""
    if raw and built_for in ("", release):
        if _wants_signature(root) and not raw.endswith(_SIGNED):
            return Advice(
                f"this kernel takes signed modules only: sign {shown} (docs/SECURE-BOOT.md)"
            )
        return Advice(f"load it: sudo insmod {shown}", f"insmod {shown}")
    if not headers and not _has_package(f"linux-headers-{release}"):
        return Advice(
            f"it cannot be built here: Linux {release} has no headers in /lib/modules, and no"
            f" package linux-headers-{release} is known"
        )
    why = f"{shown} is for Linux {built_for}, this is {release}: " if raw else ""
    return Advice(f"{why}build and load it: ./build.sh && sudo insmod {shown}")


def _wants_signature(root: Path) -> bool:
    lockdown = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/security/lockdown"))
    enforced = _read(root / "sys/module/module/parameters/sig_enforce").strip()
    return enforced == "Y" or (lockdown is not None and lockdown[1] != "none")


def _has_package(name: str) -> bool:
    """Return whether apt-get could install it; False without apt-get."""
    command = ["/usr/bin/apt-cache", "show", "--no-all-versions", name]  # PATH is not asked: root
    try:
        return not subprocess.run(command, capture_output=True, timeout=10).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def _source_tree() -> Path | None:
    tree = Path(__file__).resolve().parents[3]
    return tree if (tree / "kmod/Kbuild").exists() else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


if __name__ == "__main__":
    print(advice().text)
