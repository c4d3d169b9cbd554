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
from collections.abc import Sequence
from pathlib import Path

from vmtest.kernels import Unavailable, cache_directory, proxy_options

__all__ = ["SUITES", "UPGRADE", "Completed", "Root", "bare_root", "base_root"]

Completed = subprocess.CompletedProcess[str]

SUITES = {"bookworm": "linux-headers-6.12-amd64", "trixie": "linux-headers-cloud-amd64"}
"""Debian -> the headers of the kernel it is upgraded to, downloaded and not installed."""

NEXT_KERNEL = "/srv/next-kernel"

MACHINE = "systemd-sysv dbus udev kmod initramfs-tools linux-image-amd64 linux-headers-amd64"
BUILDING = "build-essential fakeroot debhelper dh-python lintian python3-dev python3-setuptools"
BUILDING += " python3-cffi dkms dh-dkms openssl clang llvm libbpf-dev"
RUNNING = "python3-cffi-backend python3-numpy python3-yaml python3-rich python3-lark"
RUNNING += " iproute2 procps adduser mokutil libbpf1"
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
    f" -o Dir::Cache::archives={NEXT_KERNEL} "
)
# How this machine reaches Debian's mirror and PyPI, whose certificate authorities it trusts.
ONLINE_FILES = ("etc/resolv.conf", "etc/hosts", "etc/pip.conf", "etc/ssl/certs")
ONLINE_NAMES = ("PIP_CERT", "PIP_INDEX_URL", "SSL_CERT", "http_proxy", "https_proxy", "no_proxy")

UPGRADE = f"dpkg -i {NEXT_KERNEL}/*.deb"
"""Installs that kernel's headers, and the kernel."""


def base_root(suite: str) -> Path:
    """A Debian with kernel, systemd and all that builds packages; about 3 minutes, 2 GB, once.

    :raises Unavailable: it is not in the cache and cannot be made now.
    """
    download = DOWNLOAD_NEXT + SUITES[suite]
    recipe = repr((suite, PACKAGES, INITRAMFS_LIST, INITRAMFS_MODULES, download))
    name = f"{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    root = cache_directory() / "packages" / name
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            _make(root, suite, download)
    return root


def bare_root(suite: str) -> Path:
    """A Debian without anything but what `git clone` needs; 300 MB, once.

    :raises Unavailable: it is not in the cache and cannot be made now.
    """
    root = cache_directory() / "packages" / f"bare-{suite}"
    root.parent.mkdir(parents=True, exist_ok=True)
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.is_dir():
            _debootstrap(root, suite, ["--variant=minbase", "--include=git,ca-certificates"])
    return root


def _make(root: Path, suite: str, download: str) -> None:
    options = [
        "--variant=apt",
        f"--include={','.join(PACKAGES)}",
        '--aptopt=APT::Install-Recommends "false"',
        f"--essential-hook={INITRAMFS_LIST}",
        f"--customize-hook={INITRAMFS_MODULES}",
        f"--customize-hook={download}",
        "--skip=cleanup/apt/lists",
    ]
    _debootstrap(root, suite, options)


def _debootstrap(root: Path, suite: str, options: Sequence[str]) -> None:
    if shutil.which("mmdebstrap") is None:
        raise Unavailable("mmdebstrap is not installed; ./build.sh --test-tools installs it")
    print(f"packages: making a Debian {suite} system in {root}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix="making.") as scratch:
        target = Path(scratch) / "root"
        command = [
            "mmdebstrap",
            *options,
            '--aptopt=Acquire::Check-Valid-Until "false"',
            *proxy_options(),
            suite,
            str(target),
            *filter(None, [os.environ.get("PACKET_HUNTER_MIRROR")]),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
            raise Unavailable(f"mmdebstrap {suite}: {(lines or ['failed'])[-1]}\n{done.stderr}")
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

    def run(self, command: str, *, check: bool = True, online: bool = False) -> Completed:
        """Runs a shell command in it; all it started ends with it.

        It cannot reach the network, unless `online`: then apt and pip there are set up as here.

        :raises AssertionError: it failed, unless `check` is false; with its output.
        """
        files = " ".join(ONLINE_FILES if online else ())
        # Not chroot: in one, the kernel lets nobody make a user namespace.
        inside = (
            'cd "$1" && mount -t proc proc proc && mount -t sysfs $3 sys sys'
            " && mount --rbind /dev dev"
            f" && for file in {files}; do"
            '   [ -e "/$file" ] || continue; [ -d "$file" ] || touch "$file";'
            '   mount --rbind "/$file" "$file" || exit 1;'
            " done && pivot_root . mnt && umount -l mnt && cd /"
            ' && exec /bin/sh -c "$2"'
        )
        wrapper = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child"]
        wrapper += [] if online else ["--net"]
        sysfs = "" if online else "-oro"
        here = {name: value for name, value in os.environ.items() if name.startswith(ONLINE_NAMES)}
        done = subprocess.run(
            [*wrapper, "sh", "-c", inside, "sh", str(self.path), command, sysfs],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={
                **(here if online else {}),
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": "/root",
                "LC_ALL": "C.UTF-8",
                "DEBIAN_FRONTEND": "noninteractive",
            },
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{command}: exit {done.returncode}\n{done.stdout}")
        return done
