# SPDX-License-Identifier: MIT
"""Builds the module against an unpacked kernel, with the compiler of that kernel's suite."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .kernels import UnpackedKernel

__all__ = ["Build", "BuildFailed", "build_module", "make"]

SOURCES = ("kmod", "shared_proto.h", "VERSION")


class BuildFailed(Exception):
    """The compiler's own words."""


@dataclass(frozen=True, slots=True)
class Build:
    """A built module, and the lines in which the compiler warned."""

    module: Path
    warnings: tuple[str, ...]


def build_module(source: Path, kernel: UnpackedKernel, cache: Path) -> Build:
    """sniffer.ko of the tree `source` for `kernel`; an unchanged source is built once.

    :raises BuildFailed: with the log.
    """
    key = _fingerprint(source, kernel)
    kept = cache / "modules" / kernel.name / key
    if not (kept / "sniffer.ko").exists():
        with tempfile.TemporaryDirectory(prefix="packet-hunter-build.") as scratch:
            tree = Path(scratch)
            copy_sources(source, tree)
            log = make(kernel, tree / "kmod", ["modules"])
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "log").write_text(log)
            shutil.copy(tree / "kmod" / "sniffer.ko", kept / "sniffer.ko.new")
            (kept / "sniffer.ko.new").rename(kept / "sniffer.ko")
    log = (kept / "log").read_text()
    return Build(kept / "sniffer.ko", tuple(re.findall(r"^.*\bwarning:.*$", log, re.MULTILINE)))


def copy_sources(source: Path, target: Path) -> None:
    """What the module is built from, without anything that was built before."""
    for name in SOURCES:
        if (source / name).is_dir():
            built = shutil.ignore_patterns("*.o", "*.ko", "*.mod*", "*.cmd", "Module.symvers")
            shutil.copytree(source / name, target / name, ignore=built)
        elif (source / name).exists():
            shutil.copy(source / name, target / name)


def make(kernel: UnpackedKernel, directory: Path, arguments: Iterable[str]) -> str:
    """Runs the kernel's Kbuild on `directory` inside the kernel's own root; returns its output.

    :raises BuildFailed: with the output, if make fails.
    """
    # objtool of 7.x wants /proc, gcc wants /dev/null. All mounts end with the namespace.
    script = (
        'mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount --bind "$2" "$1/src"'
        ' && root=$1 && shift 2 && exec chroot "$root" make -j"$(nproc)" "$@"'
    )
    command = ["unshare", "--mount", "--pid", "--fork"]
    if os.geteuid() != 0:
        command.append("--map-root-user")
    command += ["sh", "-c", script, "sh", str(kernel.root), str(directory.parent)]
    command += ["-C", f"/lib/modules/{kernel.release}/build", f"M=/src/{directory.name}"]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    done = subprocess.run(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    if done.returncode != 0:
        raise BuildFailed(f"module does not build for {kernel.release}:\n{done.stdout}")
    return done.stdout


def _fingerprint(source: Path, kernel: UnpackedKernel) -> str:
    digest = hashlib.sha256(kernel.release.encode())
    for name in SOURCES:
        path = source / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and (file.suffix in {"", ".c", ".h"} or file == path):
                digest.update(str(file.relative_to(source)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
