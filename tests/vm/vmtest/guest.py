# SPDX-License-Identifier: MIT
"""A virtual machine that runs a kernel under test on the host's own (read-only) root file system.

virtme-ng boots it. Orders and answers go over a virtio-serial port of our own, one JSON document a
line, so that nothing the guest prints can disturb them; the kernel's console goes to a file.
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .kernels import UnpackedKernel

__all__ = ["PORT", "Guest", "GuestLost"]

PORT = "packet-hunter"
BOOT_SECONDS = 300.0


class GuestLost(Exception):
    """The guest panicked, hung or did not boot; the message ends with its console."""


class Guest:
    """One booted kernel that runs one command, which talks to us through PORT.

    `append` is added to the kernel command line. Files in `shared` can be written by both sides
    (in the guest: $PACKET_HUNTER_SHARED).
    """

    def __init__(
        self,
        kernel: UnpackedKernel,
        command: Sequence[str],
        *,
        append: str = "",
        memory: str = "2G",
        cpus: int = 2,
        directory: Path | None = None,
    ) -> None:
        self.kernel = kernel
        self._command = list(command)
        self._append = append
        self._memory = memory
        self._cpus = cpus
        self._directory = directory or Path.cwd()

    def __enter__(self) -> Guest:
        self._scratch = tempfile.TemporaryDirectory(prefix="packet-hunter-vm.")
        scratch = Path(self._scratch.name)
        self.console = scratch / "console"
        self.output = scratch / "output"
        self.shared = scratch / "shared"
        self.shared.mkdir()
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(scratch / "port"))
            listener.listen(1)
            listener.settimeout(30)
            with self.output.open("wb") as output:
                self._process = subprocess.Popen(
                    self._qemu(scratch),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=self._directory,
                    env={**os.environ, "PATH": _path()},
                    start_new_session=True,
                )
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
                # A group of our own making: vng, virtme-run and QEMU.
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._scratch.cleanup()

    def send(self, message: Any) -> None:
        """Gives an order.

        :raises GuestLost: nobody is there to take it.
        """
        try:
            self._port.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise GuestLost(self._story("the guest is gone")) from error

    def receive(self, timeout: float) -> Any:
        """The next answer, within `timeout` seconds.

        :raises GuestLost: none came, or the guest is gone.
        """
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            self._port.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._port.recv(1 << 16)
            except TimeoutError as error:
                self._kill()
                raise GuestLost(self._story(f"no answer within {timeout:.0f} s")) from error
            except OSError as error:
                raise GuestLost(self._story("the guest is gone")) from error
            if not data:
                raise GuestLost(self._story("the guest is gone (kernel panic?)"))
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def console_tail(self, lines: int = 60) -> str:
        """The end of the kernel's console, and of what the guest's processes printed."""
        parts = []
        for name, path in (("console", self.console), ("output", self.output)):
            text = path.read_text(errors="replace") if path.exists() else ""
            tail = "\n".join(text.replace("\r", "").splitlines()[-lines:])
            parts.append(f"--- {name}\n{tail}")
        return "\n".join(parts)

    def _story(self, what: str) -> str:
        return f"{what} (kernel {self.kernel.release})\n{self.console_tail()}"

    def _kill(self) -> None:
        if self._process.poll() is None:
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
            f"-serial file:{self.console}",
        ]
        # Warnings and worse reach the console, for the story of a panic; the rest is in dmesg.
        inner = "; ".join(
            (
                "dmesg -n 5",
                "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "export HOME=/root LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1",
                f"export PACKET_HUNTER_SHARED={self.shared}",
                f"cd {shlex.quote(str(self._directory))}",
                shlex.join(self._command),
            )
        )
        acceleration = [] if os.environ.get("PACKET_HUNTER_KVM") == "1" else ["--disable-kvm"]
        return [
            "vng",
            *acceleration,
            "--run",
            str(self.kernel.image),
            *("--user", "root", "--memory", self._memory, "--cpus", str(self._cpus)),
            f"--append=console=ttyS1 {self._append}".strip(),
            f"--rwdir={self.shared}",
            *(f"--qemu-opts={option}" for option in devices),
            "--",
            inner,
        ]


def _path() -> str:
    """vng calls virtme-run by name: both are in the virtual environment that runs us."""
    here = str(Path(sys.executable).parent)
    path = f"{here}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if shutil.which("vng", path=path) is None:
        raise GuestLost("vng (virtme-ng) is not installed; ./build.sh --test-tools installs it")
    return path
