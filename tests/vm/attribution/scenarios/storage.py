# SPDX-License-Identifier: MIT
"""Disks over the network: the kernel's own sockets, or a process's that the kernel uses."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time
from pathlib import Path

from ..catalog import scenario
from ..stage import Stage, Wire, call, run
from ..traffic import (
    TCP,
    V4,
    ask,
    bound,
    listening,
    playing,
    receive_all,
)
from ..truth import Worker
from .owners import quiet

# linux/nbd.h
NBD_SET_SOCK, NBD_SET_BLKSIZE, NBD_SET_SIZE, NBD_DO_IT, NBD_DISCONNECT, NBD_SET_TIMEOUT = (
    0xAB00, 0xAB01, 0xAB02, 0xAB03, 0xAB08, 0xAB09,
)  # fmt: skip
SYS_IO_URING_SETUP = 425
NBD_REQUEST, NBD_CMD_DISC, NBD_REPLY_MAGIC = struct.Struct(">IHHQQI"), 2, 0x67446698


NVMET = Path("/sys/kernel/config/nvmet")


def nvme_target(port: int) -> None:
    """An NVMe over TCP target on 127.0.0.1 without a disk, in the caller's network namespace."""
    run("modprobe", "nvmet-tcp")
    if not NVMET.is_dir():
        run("mount", "-t", "configfs", "none", "/sys/kernel/config")
    subsystem, place = NVMET / "subsystems" / f"s{port}", NVMET / "ports" / str(port)
    for directory in (subsystem, place):
        directory.mkdir()
    for name, value in (
        ("adrfam", "ipv4"), ("traddr", "127.0.0.1"), ("trsvcid", port), ("trtype", "tcp"),
    ):  # fmt: skip
        (place / f"addr_{name}").write_text(f"{value}\n")
    (place / "subsystems" / subsystem.name).symlink_to(subsystem)


def nvme_target_away(port: int) -> None:
    subsystem, place = NVMET / "subsystems" / f"s{port}", NVMET / "ports" / str(port)
    (place / "subsystems" / subsystem.name).unlink()
    place.rmdir()
    subsystem.rmdir()


def initiator(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, in_=3, out=4)
    sock.connect(tuple(peer))
    # ICReq (NVMe/TCP transport specification): type, flags, hlen, pdo, plen, then 120 zeros
    sock.sendall(struct.pack("<BBBBI", 0, 0, 128, 0, 128) + bytes(120))
    if len(receive_all(sock, 128)) != 128:
        raise RuntimeError("no ICResp")
    sock.close()


def makes_target(worker: Worker, wire: Wire, port: int) -> None:
    nvme_target(port)
    wire.tell()
    wire.hear()
    nvme_target_away(port)


@scenario()
def storage_target_in_kernel(stage: Stage) -> None:
    """NVMe over TCP: the kernel serves on sockets made in the context of its configurer."""
    with playing(stage):
        maker = stage.spawn("maker", makes_target, 4420)
        maker.hear()
        stage.worker.claim_nobody(proto="tcp", lport=4420, reasons=("kernel",), in_=8, out=6)
        for _ in range(2):
            stage.spawn("initiator", initiator, ("127.0.0.1", 4420)).join()
        time.sleep(0.5)  # a kworker closes its end, while the listener tells whose that is
        maker.tell()


def disk_server(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=5, out=5)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    peer.settimeout(60)
    while head := receive_all(peer, NBD_REQUEST.size):
        _, _, command, handle, _, length = NBD_REQUEST.unpack(head)
        if command == NBD_CMD_DISC:
            break
        peer.sendall(struct.pack(">IIQ", NBD_REPLY_MAGIC, 0, handle) + bytes(length))
    peer.close()


def attacher(
    worker: Worker, wire: Wire, peer: tuple[str, int], disk: str, reasons: tuple[str, ...]
) -> None:
    sock = bound(V4, TCP)
    if reasons:
        worker.claim_nobody(proto="tcp", lport=sock.getsockname()[1], reasons=reasons, in_=5, out=5)
    else:
        worker.claim(sock, out=5, in_=5)
    sock.connect(tuple(peer))
    sock.setblocking(True)
    device = os.open(disk, os.O_RDWR)
    fcntl.ioctl(device, NBD_SET_BLKSIZE, 4096)
    fcntl.ioctl(device, NBD_SET_SIZE, 1 << 20)
    fcntl.ioctl(device, NBD_SET_TIMEOUT, 2)  # udev may still read when it is disconnected
    hand_to_disk(device, sock.fileno())
    sock.close()  # the kernel has it now
    wire.tell()
    wire.hear()
    fcntl.ioctl(device, NBD_DO_IT)


def hand_to_disk(device: int, descriptor: int) -> None:
    """Give the disk its socket, once nobody (udev, blkid) has the disk of before open."""
    for _ in range(200):
        try:
            fcntl.ioctl(device, NBD_SET_SOCK, descriptor)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("the disk stays in use")


def makes_ring() -> None:
    """Make the caller a user of io_uring, who may use sockets without a descriptor."""
    call("syscall", SYS_IO_URING_SETUP, 8, ctypes.create_string_buffer(120))


def reads_disk(worker: Worker, wire: Wire, disk: str) -> None:
    makes_ring()
    device = os.open(disk, os.O_RDONLY)
    for number in range(4):
        os.pread(device, 4096, number << 16)
    os.posix_fadvise(device, 0, 0, os.POSIX_FADV_DONTNEED)


def disk_read(stage: Stage, disk: str, reasons: tuple[str, ...]) -> None:
    run("modprobe", "nbd")
    server = stage.spawn("server", disk_server)
    if not reasons:
        stage.attach()
    owner = stage.spawn("attacher", attacher, ask(server), disk, reasons)
    owner.hear()
    if reasons:
        quiet()
        stage.reload()
    with playing(stage):
        owner.tell()
        started = Path("/sys/block", Path(disk).name, "pid")
        while not started.exists():  # who reads earlier may wait for ever, and NBD for the reader
            time.sleep(0.05)
        for _ in range(2):
            stage.spawn("reader", reads_disk, disk).join()
        quiet()
        makes_ring()
        device = os.open(disk, os.O_RDWR)
        fcntl.ioctl(device, NBD_DISCONNECT)
        os.close(device)


@scenario()
def network_block_device(stage: Stage) -> None:
    """NBD: a process gives its socket to the kernel, which sends when others read the disk."""
    disk_read(stage, "/dev/nbd3", ())


@scenario(engines=("module",))
def network_block_device_unknown(stage: Stage) -> None:
    """The same, the socket older than the module: who reads the disk has no part in it."""
    disk_read(stage, "/dev/nbd4", ("predates", "socket_gone"))
