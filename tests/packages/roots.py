# SPDX-License-Identifier: MIT
"""A Debian system in a directory: made once into the cache, used through throw-away overlays."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from vmtest.kernels import Unavailable, cache_directory, proxy_options

__all__ = ["UPGRADE", "Completed", "Root", "base_root"]

Completed = subprocess.CompletedProcess[str]

SUITE = "bookworm"
# The headers of the kernel that this system is upgraded to, downloaded and not installed.
NEXT_KERNEL = "/srv/next-kernel"
NEXT_HEADERS = "linux-headers-6.12-amd64"

MACHINE = "systemd-sysv dbus udev kmod initramfs-tools linux-image-amd64 linux-headers-amd64"
BUILDING = "build-essential fakeroot debhelper dh-python lintian python3-dev python3-setuptools"
BUILDING += " python3-cffi dkms dh-dkms openssl"
RUNNING = "python3-cffi-backend python3-numpy python3-psutil python3-yaml python3-rich python3-lark"
RUNNING += " iproute2 procps adduser mokutil"
PACKAGES = tuple(f"{MACHINE} {BUILDING} {RUNNING}".split())

# Only what a virtual machine needs to mount its root: half a minute less at each boot.
INITRAMFS_LIST = (
    'mkdir -p "$1"/etc/initramfs-tools/conf.d'
    ' && printf "MODULES=list\\nCOMPRESS=gzip\\n" > "$1"/etc/initramfs-tools/conf.d/machine'
)
INITRAMFS_MODULES = (
    'printf "virtio_pci\\nvirtio_blk\\next4\\n" >> "$1"/etc/initramfs-tools/modules'
    ' && chroot "$1" update-initramfs -u -k all'
)
DOWNLOAD_NEXT = (
    f'mkdir -p "$1"{NEXT_KERNEL}/partial && chroot "$1" apt-get install --yes --download-only'
    f" -o Dir::Cache::archives={NEXT_KERNEL} {NEXT_HEADERS}"
)
UPGRADE = (
    f"apt-get install --yes --no-download -o Dir::Cache::archives={NEXT_KERNEL} {NEXT_HEADERS}"
)
"""Installs that kernel's headers, and the kernel."""


def base_root() -> Path:
    """Debian 12 with kernel, systemd and all that builds packages; about 3 minutes, 2 GB, once.

    :raises Unavailable: it is not in the cache and cannot be made now.
    """
    recipe = repr((SUITE, PACKAGES, INITRAMFS_LIST, INITRAMFS_MODULES, DOWNLOAD_NEXT))
    name = f"{SUITE}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    root = cache_directory() / "packages" / name
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            _make(root)
    return root


def _make(root: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise Unavailable("mmdebstrap is not installed; ./build.sh --test-tools installs it")
    print(f"packages: making a Debian {SUITE} system in {root}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="making.") as scratch:
        target = Path(scratch) / "root"
        command = [
            "mmdebstrap",
            "--variant=apt",
            f"--include={','.join(PACKAGES)}",
            '--aptopt=Acquire::Check-Valid-Until "false"',
            '--aptopt=APT::Install-Recommends "false"',
            *proxy_options(),
            f"--essential-hook={INITRAMFS_LIST}",
            f"--customize-hook={INITRAMFS_MODULES}",
            f"--customize-hook={DOWNLOAD_NEXT}",
            "--skip=cleanup/apt/lists",
            SUITE,
            str(target),
            *filter(None, [os.environ.get("PACKET_HUNTER_MIRROR")]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise Unavailable(f"mmdebstrap {SUITE}: {(lines or ['failed'])[-1]}\n{done.stderr}")
        target.rename(root)


class Root:
    """A copy of `base` that may be changed and is forgotten (context manager, needs root).

    An overlay: it costs no more than what changes.
    """

    def __init__(self, base: Path) -> None:
        self._base = base

    def __enter__(self) -> Root:
        self._scratch = tempfile.TemporaryDirectory(prefix="packet-hunter-root.")
        scratch = Path(self._scratch.name)
        for name in ("changes", "work", "merged"):
            (scratch / name).mkdir()
        self.path = scratch / "merged"
        options = f"lowerdir={self._base},upperdir={scratch}/changes,workdir={scratch}/work"
        mount = ["mount", "-t", "overlay", "-o", options, "packet-hunter", str(self.path)]
        try:
            subprocess.run(mount, check=True, capture_output=True, text=True)
        except BaseException:
            self._scratch.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", str(self.path)], check=True)
        self._scratch.cleanup()

    def run(self, command: str, *, check: bool = True) -> Completed:
        """Runs a shell command in it; all it started ends with it. It cannot reach the network.

        :raises AssertionError: it failed, unless `check` is false; with its output.
        """
        inside = (
            'mount -t proc proc "$1/proc" && mount -t sysfs -o ro sys "$1/sys"'
            ' && mount --rbind /dev "$1/dev" && exec chroot "$1" /bin/sh -c "$2"'
        )
        wrapper = ["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "--kill-child"]
        done = subprocess.run(
            [*wrapper, "sh", "-c", inside, "sh", str(self.path), command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": "/root",
                "LC_ALL": "C.UTF-8",
                "DEBIAN_FRONTEND": "noninteractive",
            },
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}")
        return done
