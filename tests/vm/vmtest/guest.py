# SPDX-License-Identifier: MIT
"""A virtual machine that runs a kernel under test on the host's own (read-only) root file system.

virtme-ng boots it. Orders and answers go over a virtio-serial port of our own, one JSON document a
line. So nothing the guest prints can disturb them. What it prints, and the kernel's console, is
kept for the story of a guest that was lost.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .kernels import UnpackedKernel

__all__ = ["PORT", "Guest", "GuestLost"]

PORT = "packet-hunter"
BOOT_SECONDS = 600.0  # 15 s on an idle machine, eight times that on a crowded one
PRINTED_LINES = 2000

# Drivers of emulated hardware that no test uses: 3 s of the boot.
UNUSED = "ahci,bochs,i2c_i801,iTCO_wdt,kvm_amd,kvm_intel,lpc_ich,powernow_k8,psmouse,sr_mod"

# The guest's root is the host's, read anew at each use. That costs seconds of each start of
# Python. The command gets the same files through the guest's page cache instead. A layer in
# memory above them takes what it writes.
START = """\
set -e
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 PACKET_HUNTER_SHARED={shared}
mkdir /run/host /run/written /run/root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 host /run/host
mount -t tmpfs written /run/written
mkdir /run/written/upper /run/written/work
mount -t overlay -o lowerdir=/run/host,upperdir=/run/written/upper,workdir=/run/written/work \\
    root /run/root
mkdir -p /run/root{shared} /run/root/lib/modules
for directory in proc sys dev run lib/modules; do
    mount --rbind "/$directory" "/run/root/$directory"
done
mount --bind {shared} /run/root{shared}
# Not chroot: in one, the kernel lets nobody make a user namespace.
exec unshare --mount sh -c \\
    'cd /run/root && pivot_root . mnt && cd "$1" && shift && exec "$@"' sh {directory} {command}
"""


class GuestLost(Exception):
    """The guest panicked, hung or did not boot; the message ends with its console."""


class Guest:
    """One booted kernel that runs one command, which talks to us through PORT.

    `append` is added to the kernel command line, `qemu` to QEMU's. Emulated processors take turns
    unless `parallel`. Files in `shared` can be written by both sides (in the guest:
    $PACKET_HUNTER_SHARED).
    """

    def __init__(
        self,
        kernel: UnpackedKernel,
        command: Sequence[str],
        *,
        append: str = "",
        memory: str = "2G",
        cpus: int = 2,
        parallel: bool = False,
        directory: Path | None = None,
        qemu: Sequence[str] = (),
    ) -> None:
        self.kernel = kernel
        self._command = list(command)
        self._append = append
        self._memory = memory
        self._cpus = cpus
        self._parallel = parallel
        self._directory = directory or Path.cwd()
        self._options = list(qemu)

    def __enter__(self) -> Guest:
        self._scratch = tempfile.TemporaryDirectory(prefix="packet-hunter-vm.")
        scratch = Path(self._scratch.name)
        self._printed: deque[str] = deque(maxlen=PRINTED_LINES)
        self.shared = scratch / "shared"
        self.shared.mkdir()
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(scratch / "port"))
            listener.listen(1)
            listener.settimeout(30)
            # QEMU opens what this is several times: a pipe, where nothing is overwritten.
            self._process = subprocess.Popen(
                self._qemu(scratch),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env={**os.environ, "PATH": _path()},
                start_new_session=True,
                text=True,
                errors="replace",
            )
            self._reader = threading.Thread(target=self._keep_printed, name="guest output")
            self._reader.start()
            self._port = self._accept(listener)
        except BaseException:
            self.__exit__()
            raise
        finally:
            listener.close()
        self._unread = b""
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_port"):
            self._port.close()
        if hasattr(self, "_process"):
            try:
                self._process.wait(15 if sys.exc_info()[0] is None else 0)
            except subprocess.TimeoutExpired:
                self._kill()
            self._reader.join()
        self._scratch.cleanup()

    def send(self, message: Any) -> None:
        """Gives an order.

        :raises GuestLost: nobody is there to take it.
        """
        try:
            self._port.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise GuestLost(self._story("the guest is gone")) from error

    def receive(self, timeout: float, slower: Callable[[], float] = lambda: 1.0) -> Any:
        """The next answer, within `timeout` seconds times `slower()`, which is asked at the end.

        :raises GuestLost: none came, or the guest is gone.
        """
        began, wait = time.monotonic(), timeout
        while b"\n" not in self._unread:
            self._port.settimeout(max(0.001, began + wait - time.monotonic()))
            try:
                data = self._port.recv(1 << 16)
            except TimeoutError as error:
                before, wait = wait, timeout * slower()
                if wait > 1.1 * before:
                    continue
                self._kill()
                waited = time.monotonic() - began
                raise GuestLost(self._story(f"no answer within {waited:.0f} s")) from error
            except OSError as error:
                raise GuestLost(self._story("the guest is gone")) from error
            if not data:
                raise GuestLost(self._story("the guest is gone (kernel panic?)"))
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def printed(self, lines: int = PRINTED_LINES) -> str:
        """The last lines of the kernel's console and of what the command printed."""
        return "\n".join(list(self._printed)[-lines:])

    def _keep_printed(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._printed.append(line.rstrip())

    def _story(self, what: str) -> str:
        return f"{what} (kernel {self.kernel.release})\n{self.printed(100)}"

    def _kill(self) -> None:
        if self._process.poll() is None:
            # A group of our own making: vng, virtme-run and QEMU.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _accept(self, listener: socket.socket) -> socket.socket:
        try:
            return listener.accept()[0]
        except TimeoutError as error:
            self._kill()
            raise GuestLost(self._story("QEMU did not start")) from error

    def _qemu(self, scratch: Path) -> list[str]:
        devices = [
            f"-chardev socket,id=hunter,path={scratch / 'port'}",
            "-device virtio-serial-pci",
            f"-device virtserialport,name={PORT},chardev=hunter",
            "-fsdev local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
            "-device virtio-9p-pci,fsdev=host,mount_tag=host",
        ]
        # The kernel command line, where vng puts a command, ends at 2048 characters.
        (self.shared / "start").write_text(
            START.format(
                shared=self.shared,
                directory=shlex.quote(str(self._directory)),
                command=shlex.join(self._command),
            )
        )
        acceleration = []
        if os.environ.get("PACKET_HUNTER_KVM") != "1":
            acceleration.append("--disable-kvm")
            # QEMU 7.2 with a host thread a processor may keep a translation of text that another
            # processor has just patched: when probes go under traffic, int3 is run for ever after.
            if not self._parallel:
                devices.append("-accel tcg,thread=single")
        return [
            "vng",
            *acceleration,
            "--run",
            str(self.kernel.image),
            *("--user", "root", "--memory", self._memory, "--cpus", str(self._cpus)),
            *("--verbose", "--force-9p"),
            f"--append=loglevel=5 module_blacklist={UNUSED} {self._append}".strip(),
            f"--rwdir={self.shared}",
            *(f"--qemu-opts={option}" for option in (*devices, *self._options)),
            "--",
            f"sh {self.shared}/start",
        ]


def _path() -> str:
    """vng calls virtme-run by name: both are in the virtual environment that runs us."""
    here = str(Path(sys.executable).parent)
    path = f"{here}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if shutil.which("vng", path=path) is None:
        raise GuestLost("vng (virtme-ng) is not installed; ./build.sh --test-tools installs it")
    return path
