# SPDX-License-Identifier: MIT
"""A virtual machine that boots a Root from its own disk, with its own systemd, in QEMU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from packages.roots import Completed, Root

__all__ = ["Machine", "MachineLost"]

BOOT_SECONDS = 400.0
AGENT = Path(__file__).with_name("agent.py")
UNIT = """\
[Unit]
After=multi-user.target
[Service]
ExecStart=/usr/bin/python3 /srv/agent.py
Environment=HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive
Restart=no
[Install]
WantedBy=graphical.target multi-user.target
"""


class MachineLost(Exception):
    """It did not boot, or is gone; the message ends with its console."""


class Machine:
    """What `root` holds now, booted (context manager). Nothing it does comes back to `root`."""

    def __init__(self, root: Root) -> None:
        self._root = root

    def __enter__(self) -> Machine:
        self._scratch = tempfile.TemporaryDirectory(prefix="packet-hunter-machine.")
        scratch = Path(self._scratch.name)
        self._console = scratch / "console"
        path = self._root.path
        shutil.copy(AGENT, path / "srv" / "agent.py")
        (path / "etc/systemd/system/agent.service").write_text(UNIT)
        self._root.run("systemctl enable agent.service")
        (path / "etc/fstab").write_text("/dev/vda / ext4 defaults 0 0\n")
        (path / "etc/hostname").write_text("machine\n")
        disk = scratch / "disk"
        make = ["mke2fs", "-q", "-t", "ext4", "-d", str(path), str(disk), "4G"]
        subprocess.run(make, check=True, capture_output=True)
        [kernel] = (path / "boot").glob("vmlinuz-*")
        initrd = path / "boot" / kernel.name.replace("vmlinuz", "initrd.img")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(scratch / "port"))
        listener.listen(1)
        listener.settimeout(60)
        words = "root=/dev/vda rw console=ttyS0 quiet"
        accelerator = "kvm" if os.environ.get("PACKET_HUNTER_KVM") == "1" else "tcg"
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", accelerator, "-cpu", "max", "-smp", "2"),
                *("-m", "2G", "-nic", "none", "-display", "none", "-no-reboot"),
                *("-kernel", str(kernel), "-initrd", str(initrd), "-append", words),
                *("-drive", f"file={disk},if=virtio,format=raw,cache=unsafe"),
                *("-chardev", f"socket,id=port,path={scratch / 'port'}"),
                *("-device", "virtio-serial-pci"),
                *("-device", "virtserialport,name=packet-hunter,chardev=port"),
                *("-serial", f"file:{self._console}"),
            ],
            stdin=subprocess.DEVNULL,
        )
        try:
            self._port = listener.accept()[0]
            self._unread = b""
            self._answer(BOOT_SECONDS)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        finally:
            listener.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        if hasattr(self, "_port"):
            self._port.close()
        self._scratch.cleanup()

    def run(self, command: str, *, check: bool = True, timeout: float = 300) -> Completed:
        """Runs a shell command as root.

        :raises AssertionError: it failed, unless `check` is false; with its output.
        :raises MachineLost: no answer within `timeout` seconds.
        """
        self._port.sendall(json.dumps({"run": command}).encode() + b"\n")
        answer = self._answer(timeout)
        if check and answer["code"] != 0:
            raise AssertionError(f"{command}: exit {answer['code']}\n{answer['output']}")
        return subprocess.CompletedProcess(command, answer["code"], answer["output"])

    def _answer(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            self._port.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._port.recv(1 << 16)
            except TimeoutError:
                raise MachineLost(f"no answer in {timeout:.0f} s\n{self._tail()}") from None
            if not data:
                raise MachineLost(f"the machine is gone\n{self._tail()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _tail(self) -> str:
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return "\n".join(text.splitlines()[-60:])
