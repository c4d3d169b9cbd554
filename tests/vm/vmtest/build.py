# SPDX-License-Identifier: MIT
"""Builds the module against an unpacked kernel, with the compiler of that kernel's suite."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .kernels import UnpackedKernel, enter

__all__ = ["BuildFailed", "build_module", "build_planted", "copy_sources", "make"]

SOURCES = ("kmod", "shared_proto.h", "VERSION")


class BuildFailed(Exception):
    """The compiler's own words."""


def build_module(source: Path, kernel: UnpackedKernel, cache: Path) -> Path:
    """sniffer.ko of the tree `source` for `kernel`; an unchanged source is built once.

    :raises BuildFailed: with the log; a warning is a failure.
    """
    key = _fingerprint(source, kernel)
    kept = cache / "modules" / kernel.name / key
    if not (kept / "sniffer.ko").exists():
        with tempfile.TemporaryDirectory(prefix="packet-hunter-build.") as scratch:
            tree = Path(scratch)
            copy_sources(source, tree)
            log = make(kernel, tree / "kmod", ["modules"])
            if re.search(r"\bwarning:", log, re.IGNORECASE):
                raise BuildFailed(f"module builds with warnings for {kernel.release}:\n{log}")
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / "kmod" / "sniffer.ko", kept / "sniffer.ko.new")
            (kept / "sniffer.ko.new").rename(kept / "sniffer.ko")
    return kept / "sniffer.ko"


def build_planted(directory: Path, kernel: UnpackedKernel, cache: Path) -> Path:
    """planted.ko, the bugs that a debug kernel has to find, from `directory`.

    :raises BuildFailed: with the log.
    """
    source = directory / "planted.c"
    key = hashlib.sha256(kernel.release.encode() + source.read_bytes()).hexdigest()[:16]
    kept = cache / "modules" / kernel.name / key
    if not (kept / "planted.ko").exists():
        with tempfile.TemporaryDirectory(prefix="packet-hunter-build.") as scratch:
            tree = Path(scratch) / "planted"
            shutil.copytree(directory, tree)
            make(kernel, tree, ["modules"])
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / "planted.ko", kept / "planted.ko.new")
            (kept / "planted.ko.new").rename(kept / "planted.ko")
    return kept / "planted.ko"


def copy_sources(source: Path, target: Path) -> None:
    """What the module is built from, without anything that was built before."""
    for name in SOURCES:
        if (source / name).is_dir():
            built = shutil.ignore_patterns("*.o", "*.ko", "*.mod*", "*.cmd", "Module.symvers")
            shutil.copytree(source / name, target / name, ignore=built)
        elif (source / name).exists():
            shutil.copy(source / name, target / name)


def make(
    kernel: UnpackedKernel,
    directory: Path,
    arguments: Iterable[str],
    replaced: Mapping[str, Path] | None = None,
) -> str:
    """Runs the kernel's Kbuild on `directory` inside the kernel's own root; returns its output.

    `replaced` shows other files in place of some of the kernel's.

    :raises BuildFailed: with the output, if make fails.
    """
    command = ["make", f"-j{os.cpu_count()}", "-C", f"/lib/modules/{kernel.release}/build"]
    done = enter(
        kernel.root,
        [*command, f"M=/src/{directory.name}", *arguments],
        {"/src": directory.parent, **(replaced or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        raise BuildFailed(f"module does not build for {kernel.release}:\n{done.stdout}")
    return str(done.stdout)


def _fingerprint(source: Path, kernel: UnpackedKernel) -> str:
    digest = hashlib.sha256(kernel.release.encode())
    for name in SOURCES:
        path = source / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file() and (file.suffix in {"", ".c", ".h"} or file == path):
                digest.update(str(file.relative_to(source)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
