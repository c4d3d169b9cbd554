# SPDX-License-Identifier: MIT
"""Where a scenario plays: network namespaces of its own, and worker processes in them."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .truth import Worker, Writer

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
PR_SET_NAME = 15
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


class Unable(Exception):
    """This machine cannot play the scenario; the message says what it lacks."""


def call(name: str, *arguments: Any) -> int:
    """A libc function; raises OSError when it returns -1."""
    result: int = getattr(LIBC, name)(*arguments)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def enter_netns(path: str) -> None:
    """Move the calling thread into the network namespace at ``path``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        call("setns", descriptor, CLONE_NEWNET)
    finally:
        os.close(descriptor)


def loopback_up() -> None:
    """Set the namespace's loopback interface up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(control, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


def sysctl(name: str, value: object) -> None:
    """Set a sysctl of the caller's network namespace; Unable when this kernel lacks it."""
    path = Path("/proc/sys") / name.replace(".", "/")
    try:
        path.write_text(f"{value}\n")
    except OSError as error:
        raise Unable(f"sysctl {name}={value}: {error.strerror}") from error


def rename(comm: str) -> None:
    """Set the calling thread's comm."""
    call("prctl", PR_SET_NAME, comm.encode()[:15], 0, 0, 0)


def place(descriptors: dict[int, int]) -> None:
    """Give descriptors the numbers that a program after exec expects; they survive it."""
    high = {fcntl.fcntl(old, fcntl.F_DUPFD, 100): new for old, new in descriptors.items()}
    for old, new in high.items():
        os.dup2(old, new, inheritable=True)
        os.close(old)


class Wire:
    """A line of JSON messages between a worker and its stage; not an Internet socket."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def tell(self, message: object = None) -> None:
        """Send one message."""
        self.end.send(json.dumps(message).encode())

    def hear(self, timeout: float = 60) -> Any:
        """Wait for one message; raises EOFError when the other side has gone."""
        self.end.settimeout(timeout)
        data = self.end.recv(65536)
        if not data:
            raise EOFError("the other side has gone")
        return json.loads(data)


@dataclass(slots=True)
class Child:
    """A running worker."""

    role: str
    pid: int
    wire: Wire
    status: int | None = None

    def tell(self, message: object = None) -> None:
        self.wire.tell(message)

    def hear(self) -> Any:
        """Wait for its next message. Unable, with its own words, when it was."""
        try:
            message = self.wire.hear()
        except EOFError:
            raise RuntimeError(f"worker {self.role} ended too early") from None
        if isinstance(message, dict) and "unable" in message:
            raise Unable(message["unable"])
        return message

    def join(self) -> int:
        """Wait for its end; returns the exit status."""
        if self.status is None:
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
            self.wire.end.close()
        return self.status


@dataclass(frozen=True, slots=True)
class Netns:
    """A further network namespace, kept by a process that sleeps in it."""

    pid: int
    inode: int

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    def run(self, *command: str) -> None:
        """Run a command in it."""
        run("nsenter", f"--net={self.path}", *command)


def run(*command: str, data: str | None = None) -> str:
    """Run a set-up command; Unable when it is missing or fails, with its own words."""
    try:
        done = subprocess.run(command, input=data, capture_output=True, text=True, timeout=120)
    except FileNotFoundError as error:
        raise Unable(f"{command[0]} is not installed") from error
    if done.returncode:
        raise Unable(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


class Stage:
    """A scenario's namespaces and workers; a context manager that ends what is left of them.

    It lives in a process of its own, already in a fresh network namespace.
    """

    def __init__(
        self, directory: Path, control: Wire, module: str | None, binaries: Path, scale: float
    ) -> None:
        self.directory = directory
        self.writer = Writer(directory / "truth")
        self.control = control
        self.module = module
        self.binaries = binaries
        self.scale = scale
        self.children: list[Child] = []
        self.keepers: list[int] = []
        self.netns = os.stat("/proc/self/ns/net").st_ino
        self.worker = Worker("stage", self.writer)
        self.attached = False

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            if child.status is None:
                os.kill(child.pid, 9)
                child.join()
        for pid in self.keepers:
            os.kill(pid, 9)
            os.waitpid(pid, 0)

    def attach(self) -> None:
        """From here on the engine records; namespaces made later may be unknown to it."""
        if not self.attached:
            self.attached = True
            self.control.tell({"attach": [f"/proc/{p}/ns/net" for p in self.keepers]})
            self.control.hear()

    def reload(self) -> None:
        """Load the module again while sockets exist: they are then older than it."""
        self.control.tell({"reload": True})
        self.control.hear()

    def namespace(self) -> Netns:
        """Make a further network namespace, its loopback up."""
        ready, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                call("unshare", CLONE_NEWNET)
                loopback_up()
                rename("keeper")
                os.write(done, b"x")
                while True:
                    time.sleep(1000)
            finally:
                os._exit(1)
        os.close(done)
        if os.read(ready, 1) != b"x":
            os.waitpid(pid, 0)
            raise Unable("no further network namespace can be made")
        os.close(ready)
        self.keepers.append(pid)
        return Netns(pid, os.stat(f"/proc/{pid}/ns/net").st_ino)

    def beside(self) -> Netns:
        """A further namespace, behind veth: 10.9.0.1 on ve0 is here, 10.9.0.2 on ve1 there."""
        other = self.namespace()
        self.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
        return other

    def veth(self, right: Netns, names: tuple[str, str], *addresses: tuple[str, str]) -> None:
        """Connect this namespace with another by a veth pair; pairs of addresses, with prefix.

        One process a namespace: under emulation each costs most of a second.
        """
        batches = [
            [f"addr add {pair[side]} dev {name}{' nodad' * (':' in pair[side])}"
             for pair in addresses] + [f"link set {name} up"]
            for side, name in enumerate(names)
        ]  # fmt: skip
        add = f"link add {names[0]} type veth peer name {names[1]} netns {right.pid}"
        run("ip", "-batch", "-", data="\n".join([add, *batches[0], ""]))
        enter = ("nsenter", f"--net={right.path}")
        run(*enter, "ip", "-batch", "-", data="\n".join([*batches[1], ""]))

    def spawn(
        self,
        role: str,
        work: Callable[..., None],
        *arguments: Any,
        netns: Netns | None = None,
        keep: Sequence[socket.socket] = (),
    ) -> Child:
        """Fork a worker that runs ``work(worker, wire, *arguments)`` under comm ``role``.

        ``keep`` is closed in this process afterwards: the worker has inherited it.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            ours.close()
            self._be(role, work, Wire(theirs), arguments, netns)
        theirs.close()
        for sock in keep:
            sock.close()
        child = Child(role, pid, Wire(ours))
        self.children.append(child)
        return child

    def _be(
        self,
        role: str,
        work: Callable[..., None],
        wire: Wire,
        arguments: Sequence[Any],
        netns: Netns | None,
    ) -> None:
        status = 1
        try:
            for other in self.children:
                if other.status is None:
                    other.wire.end.close()
            rename(role)
            if netns is not None:
                enter_netns(netns.path)
            work(Worker(role, self.writer), wire, *arguments)
            status = 0
        except Unable as error:
            wire.tell({"unable": str(error)})
        except BaseException:  # noqa: B036 - a forked worker must never return into the stage
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def program(self, name: str) -> str:
        """Path of a compiled C worker."""
        path = self.binaries / name
        if not path.exists():
            raise Unable(f"C worker {name} is not compiled")
        return str(path)

    def command(self, role: str, name: str, *arguments: object) -> Child:
        """Start a C worker; it inherits descriptor 3 (truth file) and 4 (wire)."""
        path = self.program(name)
        truth = str(self.writer.path)

        def become(_: Worker, wire: Wire) -> None:
            place({wire.end.fileno(): 4})
            os.execv(path, [role[:15], truth, *map(str, arguments)])

        return self.spawn(role, become)

    def join(self) -> None:
        """Wait for all workers; raises when one of them failed."""
        bad = [f"{child.role} ({child.join()})" for child in self.children if child.join()]
        if bad:
            raise RuntimeError("workers failed: " + ", ".join(bad))
