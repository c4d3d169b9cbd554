# SPDX-License-Identifier: MIT
"""The kernels under test, from Debian's suites: downloaded and unpacked, never installed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "KERNELS",
    "Kernel",
    "Unavailable",
    "UnpackedKernel",
    "cache_directory",
    "proxy_options",
    "unpack",
]

TOOLCHAIN = ("gcc", "make", "binutils", "mawk", "dash", "coreutils", "grep", "sed", "sparse")


class Unavailable(Exception):
    """This kernel cannot be had now; the message says why, in one line."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel to test on: where Debian keeps it.

    `suite` is the suite its packages and compiler come from, `pockets` further suites of the same
    archive to take them from, `version` the infix of its meta-packages.
    """

    name: str
    suite: str
    pockets: tuple[str, ...] = ()
    version: str = ""

    @property
    def series(self) -> str:
        """What its release must begin with: the name up to the suite that tells it from others."""
        return self.name.partition("-")[0]

    def packages(self) -> tuple[str, ...]:
        infix = f"{self.version}-" if self.version else ""
        return (f"linux-image-{infix}amd64", f"linux-headers-{infix}amd64")


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("5.10", "bullseye"),
        Kernel("6.1", "bookworm"),
        Kernel("6.12-deb12", "bookworm", version="6.12"),
        Kernel("6.12-deb13", "trixie"),
        Kernel("7.2", "sid"),
        Kernel("7.3", "trixie", pockets=("trixie-backports",)),
    )
}


@dataclass(frozen=True, slots=True)
class UnpackedKernel:
    """A kernel in the cache: its root directory, and its release as `uname -r` tells it."""

    name: str
    root: Path
    release: str

    @property
    def image(self) -> Path:
        return self.root / "boot" / f"vmlinuz-{self.release}"


def cache_directory() -> Path:
    """PACKET_HUNTER_CACHE, or packet-hunter in the user's cache directory."""
    chosen = os.environ.get("PACKET_HUNTER_CACHE")
    if chosen:
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "packet-hunter"


def unpack(kernel: Kernel, cache: Path) -> UnpackedKernel:
    """The kernel from the cache, or downloaded into it first (about 20 s, 0.8 GB).

    :raises Unavailable: it is not in the cache, and the mirror has it no more or cannot be reached.
    """
    root = cache / "kernels" / kernel.name
    root.parent.mkdir(parents=True, exist_ok=True)
    with _locked(root.with_suffix(".lock")):
        if not root.is_dir():
            _download(kernel, root)
    return _unpacked(kernel, root)


def _unpacked(kernel: Kernel, root: Path) -> UnpackedKernel:
    images = sorted((root / "boot").glob("vmlinuz-*"), reverse=True)
    for image in images:
        release = image.name.removeprefix("vmlinuz-")
        built = (root / "lib/modules" / release / "build").is_symlink()
        if built and release.startswith(f"{kernel.series}."):
            return UnpackedKernel(kernel.name, root, release)
    found = ", ".join(image.name.removeprefix("vmlinuz-") for image in images) or "none"
    raise Unavailable(
        f"{kernel.name}: Debian {(kernel.suite, *kernel.pockets)[-1]} had no such kernel with"
        f" headers (but {found}); once the mirror has it, remove {root}"
    )


def _download(kernel: Kernel, root: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise Unavailable("mmdebstrap is not installed; ./build.sh --test-tools installs it")
    print(f"vmtest: downloading kernel {kernel.name} (Debian {kernel.suite})", file=sys.stderr)
    started = time.monotonic()
    for attempt in (1, 2):
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f"{kernel.name}.") as scratch:
            target = Path(scratch) / "root"
            target.mkdir()
            error = _unpack_packages(kernel, target)
            if error is None:
                _finish(target)
                target.rename(root)
                print(f"vmtest: took {time.monotonic() - started:.0f} s", file=sys.stderr)
                return
        if attempt == 1:
            print(f"vmtest: {error}; trying once more", file=sys.stderr)
    raise Unavailable(f"{kernel.name}: {error}")


def _unpack_packages(kernel: Kernel, target: Path) -> str | None:
    """Returns None, or why it failed.

    mmdebstrap writes a tar file and we unpack it as ourselves: the same way with and without root,
    and files that their user can delete.
    """
    command = [
        "mmdebstrap",
        "--variant=extract",
        f"--include={','.join((*kernel.packages(), *TOOLCHAIN))}",
        # A frozen mirror, as companies keep them, serves expired Release files.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        *proxy_options(),
        *(_pocket_option(kernel.suite, pocket) for pocket in kernel.pockets),
        kernel.suite,
        "-",
        *filter(None, [os.environ.get("PACKET_HUNTER_MIRROR")]),
    ]
    untar = ["tar", "-x", "-C", str(target), "--no-same-owner", "--exclude=./dev/*"]
    with tempfile.TemporaryFile() as log:
        pack = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert pack.stdout is not None
        unpacked = subprocess.run(untar, stdin=pack.stdout, stderr=subprocess.PIPE, text=True)
        pack.stdout.close()
        failed = pack.wait() != 0
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    if failed:
        errors = [line for line in lines if re.match(r"(E:|W: Fail|Err)", line)]
        return f"mmdebstrap {kernel.suite}: {(errors or lines or ['failed'])[0].strip()}"
    if unpacked.returncode != 0:
        return f"tar: {unpacked.stderr.strip().splitlines()[-1]}"
    return None


def _pocket_option(suite: str, pocket: str) -> str:
    """Adds a pocket to the sources mmdebstrap chose, whatever mirror that is.

    Backports are pinned low by their archive; here the newest kernel is what is asked for, with
    what it needs of its own suite, and the compiler may come from either.
    """
    script = (
        f'sed -n "s/ {suite} / {pocket} /p" "$1"/etc/apt/sources.list'
        f' > "$1"/etc/apt/sources.list.d/{pocket}.list;'
        f' printf "Package: linux-*\\nPin: release n={pocket}\\nPin-Priority: 900\\n"'
        ' > "$1"/etc/apt/preferences.d/pocket'
    )
    return f"--setup-hook={script}"


def proxy_options() -> Iterator[str]:
    """mmdebstrap does not read the host's apt configuration: hand on its proxies."""
    if shutil.which("apt-config") is None:
        return
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True).stdout
    for line in dump.splitlines():
        if re.match(r'Acquire::(http|https)::proxy "[^"]+";', line, re.IGNORECASE):
            yield f"--aptopt={line.rstrip(';')}"


def _finish(root: Path) -> None:
    """What maintainer scripts would have done, as far as a build needs it."""
    # From Debian 13 on only base-files, which nothing here asks for, has these links.
    for name in ("bin", "sbin", "lib", "lib64"):
        if not os.path.lexists(root / name) and (root / "usr" / name).is_dir():
            (root / name).symlink_to(f"usr/{name}")
    for name, target in (("usr/bin/awk", "mawk"), ("usr/bin/sh", "dash"), ("bin/sh", "dash")):
        link = root / name
        if not os.path.lexists(link) and link.parent.is_dir():
            link.symlink_to(target)
    for name in ("proc", "dev", "tmp", "src", "boot"):
        (root / name).mkdir(exist_ok=True)
    # 7.x comes with its image among its modules.
    for image in (root / "lib/modules").glob("*/vmlinuz"):
        shutil.copy(image, root / "boot" / f"vmlinuz-{image.parent.name}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One download at a time of the same kernel, however many runs want it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
