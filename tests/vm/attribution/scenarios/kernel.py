# SPDX-License-Identifier: MIT
"""What the kernel sends by itself, or in the context of a process that has no part in it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import time
from pathlib import Path
from typing import Any

from ..catalog import scenario
from ..stage import Child, Stage, Unable, Wire, call, run, sysctl
from ..traffic import (
    TCP,
    UDP,
    V4,
    V6,
    ask,
    bound,
    listening,
    playing,
    receive_all,
    tcp_client,
    tcp_server,
    udp_echo,
    udp_receiver,
    udp_sender,
)
from ..truth import Worker, identity_of
from .machinery import speaker
from .namespaces import LEFT_PORT, RIGHT_PORT, far_asker, far_echo, router, rules
from .owners import quiet

COUNT = 10
# linux/netfilter/nfnetlink_queue.h
NETLINK_NETFILTER, QUEUE_PACKET, QUEUE_VERDICT, QUEUE_CONFIG = 12, 0x300, 0x301, 0x302
NF_ACCEPT = 1


def netfilter_message(kind: int, attribute: int, payload: bytes) -> bytes:
    """A message to queue 0 with one attribute."""
    body = struct.pack("=BBHHH", 0, 0, 0, 4 + len(payload), attribute) + payload
    body += bytes(-len(body) % 4)
    return struct.pack("=IHHII", 16 + len(body), kind, 1, 0, 0) + body


def queue_daemon(worker: Worker, wire: Wire, hold: int = 0) -> None:
    """Accepts all packets of NFQUEUE 0, as an application firewall does; the first `hold` of them
    when it is told to."""
    held: list[bytes] = []
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    sock.bind((0, 0))
    sock.send(netfilter_message(QUEUE_CONFIG, 1, struct.pack("!BBH", 1, 0, 0)))
    sock.send(netfilter_message(QUEUE_CONFIG, 2, struct.pack("!IB", 0xFFFF, 1)))
    wire.tell("ready")
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.register(wire.end, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poller.poll(30000)}
        if sock.fileno() in ready:
            data = sock.recv(65536)
            # netlink header, nfgenmsg, and first the attribute NFQA_PACKET_HDR
            held.append(data[24:28])
            hold -= 1
            if hold == 0:
                wire.tell("held")
                wire.hear()
            while hold <= 0 and held:
                verdict = struct.pack("!I", NF_ACCEPT) + held.pop(0)
                sock.send(netfilter_message(QUEUE_VERDICT, 2, verdict))
        elif wire.end.fileno() in ready:
            return


@scenario()
def queued_to_user_space(stage: Stage) -> None:
    """NFQUEUE on output: packets go on in the context of the daemon that judged them."""
    rules(
        "table ip t { chain out { type filter hook output priority 0;"
        " meta l4proto { tcp, udp } queue num 0; }; }"
    )
    with playing(stage):
        daemon = stage.spawn("judge", queue_daemon)
        daemon.hear()
        peer = ask(stage.spawn("echo", udp_echo, V4, COUNT))
        sender = stage.spawn("sender", udp_sender, peer, V4, COUNT, True)
        sender.tell()
        server = stage.spawn("server", tcp_server, V4, 2)
        client = stage.spawn("client", tcp_client, ask(server), V4, 2, 3)
        for child in (sender, server, client):
            child.join()
        quiet()
        daemon.tell()


def sends_and_exits(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP)
    worker.claim(sock, out=COUNT, exact=True, flags=["dead"])
    for number in range(COUNT):
        sock.sendto(bytes(number), tuple(peer))
    os._exit(0)


@scenario()
def queued_longer_than_its_sender(stage: Stage) -> None:
    """Judged after the sender's exit, its datagrams are still its own."""
    rules(
        "table ip t { chain out { type filter hook output priority 0;"
        " meta l4proto udp queue num 0; }; }"
    )
    with playing(stage):
        daemon = stage.spawn("judge", queue_daemon, COUNT)
        daemon.hear()
        receiver = stage.spawn("receiver", udp_receiver, V4, "", COUNT)
        stage.spawn("sender", sends_and_exits, ask(receiver)).join()
        daemon.hear()
        daemon.tell()
        receiver.hear()
        receiver.tell()
        daemon.tell()


def refused(worker: Worker, wire: Wire, peer: tuple[str, int], host: str) -> None:
    sock = bound(V6 if ":" in host else V4, TCP, host)
    worker.claim(sock, in_=1)
    try:
        sock.connect(tuple(peer))
    except ConnectionRefusedError:
        return
    raise RuntimeError("not refused")


@scenario()
def rejected_by_firewall(stage: Stage) -> None:
    """A firewall's RST is nobody's, even when a process here listens on that port."""
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"),
               ("10.9.0.1/24", "10.9.0.2/24"), ("fd09::1/64", "fd09::2/64"))  # fmt: skip
    reject = f"tcp dport {RIGHT_PORT} reject with tcp reset;"
    rules(
        "table inet t { chain out { type filter hook output priority 0;"
        f' oifname "ve0" {reject} }};'
        f' chain in {{ type filter hook input priority 0; iifname "lo" {reject} }}; }}'
    )
    with playing(stage):
        # it is asked nothing: each packet that seems to be its own is the firewall's
        server = listening(V6, "::", RIGHT_PORT)
        stage.worker.claim_nobody(
            proto="tcp", lport=RIGHT_PORT, reasons=("no_socket",), out=4, exact=True
        )
        for host, near in (("10.9.0.2", "10.9.0.1"), ("127.0.0.1", "127.0.0.1"),
                           ("fd09::2", "fd09::1"), ("::1", "::1")):  # fmt: skip
            stage.spawn("refused", refused, (host, RIGHT_PORT), near).join()
        server.close()


def closes(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    worker.claim(sock, remote=sock.getpeername()[:2], any_address=True, in_=1, out=1)


def accept_two(
    worker: Worker, wire: Wire, stage: Stage, family: int, host: str = "", port: int = 0
) -> None:
    sock = listening(family, host, port)
    claim = worker.claim(sock, any_address=True, in_=5, out=3)
    wire.tell(sock.getsockname()[:2])
    first, _ = sock.accept()
    second, _ = sock.accept()
    worker.also(claim, first)
    worker.also(claim, second)
    quiet()
    stage.spawn("child", closes, first, keep=[first]).join()
    wire.tell("closed")
    wire.hear()
    second.sendall(b"late")


def connect_twice(
    worker: Worker, wire: Wire, peer: tuple[str, int], family: int, host: str = ""
) -> None:
    one, two = bound(family, TCP, host), bound(family, TCP, host)
    worker.claim(one, in_=2, out=3)
    worker.claim(two, in_=2, out=3)
    one.connect(tuple(peer))
    two.connect(tuple(peer))
    wire.tell("connected")
    wire.hear()
    one.sendall(b"late")
    two.close()
    wire.tell("closed")
    wire.hear()


def close_and_send(server: Child, client: Child) -> None:
    """Each end closes one connection, and the other end sends on it then."""
    client.hear()
    server.hear()
    client.tell()
    client.hear()
    server.tell()
    server.join()
    client.tell()


@scenario()
def tcp_data_after_close(stage: Stage) -> None:
    """Data for a socket that is closed, its FIN still under way: the RST is the closer's."""
    rules(
        "table inet t { chain out { type filter hook output priority 0;"
        " tcp flags & fin == fin drop; }; }"
    )
    with playing(stage):
        for family in (V4, V6):
            server = stage.spawn("server", accept_two, stage, family)
            close_and_send(server, stage.spawn("client", connect_twice, ask(server), family))


@scenario()
def tcp_data_after_close_behind_nat(stage: Stage) -> None:
    """The same at a service's address (as kube-proxy's), which NAT changes on the way out."""
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
    run("ip", "route", "add", "default", "via", "10.9.0.2")
    rules(
        "table ip t {"
        " chain nat { type nat hook output priority -100;"
        " ip daddr 10.8.0.1 tcp dport 80 dnat to 10.9.0.1:8080; };"
        " chain out { type filter hook output priority 0;"
        " tcp flags & fin == fin drop; }; }"
    )
    with playing(stage):
        server = stage.spawn("server", accept_two, stage, V4, "10.9.0.1", 8080)
        server.hear()
        peer = ("10.8.0.1", 80)
        close_and_send(server, stage.spawn("client", connect_twice, peer, V4, "10.9.0.1"))


def closes_first(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    claim = worker.claim(sock, any_address=True, in_=3, out=2)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    peer.close()
    sock.close()
    wire.hear()
    worker.end(claim)


def successor(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = listening(V4, *peer)
    claim = worker.claim(sock, any_address=True, in_=4, out=2)
    wire.tell("ready")
    accepted, _ = sock.accept()
    worker.also(claim, accepted)
    receive_all(accepted, 5)


def returning(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    claim = worker.claim(sock, in_=2, out=3)
    sock.connect(tuple(peer))
    receive_all(sock, 1)
    name = sock.getsockname()
    sock.close()
    wire.tell("closed")
    wire.hear()
    worker.end(claim)
    sock = bound(V4, TCP, *name)
    worker.claim(sock, in_=2, out=3)
    sock.connect(tuple(peer))
    sock.sendall(b"again")


@scenario()
def tcp_time_wait_reopened(stage: Stage) -> None:
    """A SYN for a connection in TIME_WAIT goes to who listens now, not to who had it."""
    with playing(stage):
        first = stage.spawn("first", closes_first)
        peer = ask(first)
        client = stage.spawn("client", returning, peer)
        client.hear()
        quiet()
        first.tell()
        first.join()
        stage.spawn("second", successor, peer).hear()
        client.tell()


def defers(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, TCP)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    sock.listen(8)
    claim = worker.claim(sock, any_address=True, in_=2, out=1, has_cookie=False)
    wire.tell(sock.getsockname())
    wire.hear()
    sock.close()
    worker.end(claim)


def listens_after(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    wire.hear()
    sock = listening(V4, *peer)
    worker.claim(sock, any_address=True, in_=1, out=1)
    wire.tell("ready")
    wire.hear()


def speaks_late(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    worker.claim(sock, in_=2, out=3)
    sock.connect(tuple(peer))
    wire.tell("connected")
    wire.hear()
    sock.sendall(b"late")
    select.select([sock], [], [], 30)


@scenario()
def tcp_listener_replaced(stage: Stage) -> None:
    """A listener closes in the midst of a handshake: what still comes is its successor's."""
    with playing(stage):
        first = stage.spawn("first", defers)
        peer = ask(first)
        second = stage.spawn("second", listens_after, peer)
        client = stage.spawn("client", speaks_late, peer)
        client.hear()
        first.tell()
        first.join()
        second.tell()
        second.hear()
        client.tell()
        client.join()
        second.tell()


@scenario()
def udp_encapsulation(stage: Stage) -> None:
    """IP in UDP (fou): the inner packets are the applications', the outer ones the kernel's."""
    other = stage.namespace()
    stage.veth(other, ("ve0", "ve1"), ("10.9.0.1/24", "10.9.0.2/24"))
    run("modprobe", "fou")
    run("modprobe", "ipip")
    text = (
        "fou add port 5555 ipproto 4\n"
        "link add fo type ipip local {} remote {} encap fou encap-sport 42001 encap-dport 5555\n"
        "addr add {}/24 dev fo\nlink set fo up\n"
    )
    run("ip", "-batch", "-", data=text.format("10.9.0.1", "10.9.0.2", "10.7.0.1"))
    run("nsenter", f"--net={other.path}", "ip", "-batch", "-",
        data=text.format("10.9.0.2", "10.9.0.1", "10.7.0.2"))  # fmt: skip
    with playing(stage):
        for netns in (stage.netns, other.inode):
            stage.worker.claim_nobody(
                proto="udp", lport=5555, netns=netns, dirs="i", reasons=("kernel",), in_=COUNT
            )
            stage.worker.claim_nobody(
                proto="udp", lport=42001, netns=netns, dirs="o", reasons=("kernel",), out=COUNT
            )
        stage.spawn("far", far_echo, "10.7.0.2", RIGHT_PORT, COUNT, netns=other).hear()
        stage.spawn("near", far_asker, "10.7.0.1", LEFT_PORT, ("10.7.0.2", RIGHT_PORT), 50)


# linux/ip_vs.h
IP_VS_ADD, IP_VS_ADD_DESTINATION = 64 + 1024 + 64 + 2, 64 + 1024 + 64 + 7


def virtual_server(host: str, port: int, real: tuple[str, int]) -> None:
    """ipvsadm -A -t HOST:PORT -s rr; ipvsadm -a -t HOST:PORT -r REAL -m."""
    run("modprobe", "ip_vs_rr")
    service = struct.pack(
        "@H2x4s2s2xI16sIII", socket.IPPROTO_TCP, socket.inet_aton(host),
        struct.pack("!H", port), 0, b"rr", 0, 0, 0xFFFFFFFF,
    )  # fmt: skip
    destination = struct.pack(
        "@4s2s2xIiII", socket.inet_aton(real[0]), struct.pack("!H", real[1]), 0, 1, 0, 0
    )
    with socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_RAW) as control:
        control.setsockopt(socket.IPPROTO_IP, IP_VS_ADD, service)
        control.setsockopt(socket.IPPROTO_IP, IP_VS_ADD_DESTINATION, service + destination)


def balanced_client(worker: Worker, wire: Wire, host: str, port: int, peer: Any) -> None:
    sock = bound(V4, TCP, host, port)
    worker.claim(sock, in_=3, out=4)
    sock.connect(tuple(peer))
    sock.sendall(b"talk!")
    receive_all(sock, 5)


@scenario()
def load_balanced(stage: Stage) -> None:
    """IPVS sends on what came in: forwarded, though a process here has the client's port."""
    left, right = router(stage)
    real = ("10.9.2.2", 8080)
    virtual_server("10.9.1.1", 80, real)
    with playing(stage):
        decoy = listening(V4, "0.0.0.0", LEFT_PORT)
        for one, two in ((LEFT_PORT, 8080), (80, LEFT_PORT)):
            stage.worker.claim_nobody(
                proto="tcp", lport=one, rport=two, dirs="f", reasons=("forwarded",), out=0
            )
        server = stage.spawn("server", fixed_server, *real, netns=right)
        server.hear()
        client = stage.spawn(
            "client", balanced_client, "10.9.1.2", LEFT_PORT, ("10.9.1.1", 80), netns=left
        )
        client.join()
        server.join()
        decoy.close()


def fixed_server(worker: Worker, wire: Wire, host: str, port: int) -> None:
    sock = listening(V4, host, port)
    claim = worker.claim(sock, any_address=True, in_=4, out=3)
    wire.tell("ready")
    peer, _ = sock.accept()
    worker.also(claim, peer)
    while data := peer.recv(100):
        peer.sendall(data)


def migrating(worker: Worker, wire: Wire, port: int, accepts: int) -> None:
    sock = socket.socket(V4, TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.settimeout(30)
    sock.bind(("127.0.0.1", port))
    sock.listen(16)
    wire.tell(sock.getsockname())
    wire.hear()
    claim = worker.claim(sock, any_address=True, in_=accepts, has_cookie=False)
    if accepts == 0:
        sock.close()
        worker.end(claim)
        return
    wire.tell("ready")
    wire.hear()
    for _ in range(accepts):
        peer, _ = sock.accept()
        receive_all(peer, 5)


def connects_early(worker: Worker, wire: Wire, peer: tuple[str, int], count: int) -> None:
    socks = []
    for _ in range(count):
        sock = bound(V4, TCP)
        worker.claim(sock, in_=1, out=3)
        sock.connect(tuple(peer))
        socks.append(sock)
    wire.tell("connected")
    wire.hear()
    try:
        for sock in socks:
            sock.sendall(b"early")
        wire.tell("sent")
    except ConnectionError:
        wire.tell("reset")
    wire.hear()


@scenario()
def tcp_queue_migrated(stage: Stage) -> None:
    """tcp_migrate_req: connections nobody had accepted go from a closed listener to another."""
    sysctl("net.ipv4.tcp_migrate_req", 1)
    with playing(stage):
        first = stage.spawn("first", migrating, 0, 0)
        peer = ask(first)
        # until it closes, all are the first one's
        claim = stage.worker.claim_port(
            peer[1], proto="tcp", dirs="io", in_=8, out=4, owner=identity_of(first.pid)
        )
        client = stage.spawn("client", connects_early, peer, 4)
        client.hear()
        second = stage.spawn("second", migrating, peer[1], 4)
        second.hear()
        quiet()
        stage.worker.end(claim)
        first.tell()
        first.join()
        second.tell()
        second.hear()
        client.tell()
        if client.hear() == "reset":  # 5.10 of Debian
            raise Unable("this kernel has the sysctl tcp_migrate_req, but nothing behind it")
        second.tell()
        second.join()
        client.tell()


def leaves_behind(
    worker: Worker, wire: Wire, peer: tuple[str, int], link: socket.socket, other: socket.socket
) -> None:
    other.close()
    sock = bound(V4, TCP)
    worker.claim(sock, in_=1, out=3)
    sock.connect(tuple(peer))
    socket.send_fds(link, [b"take it"], [sock.fileno()])
    sock.close()
    link.close()
    wire.tell("left")
    wire.hear()


def throws_away(worker: Worker, wire: Wire, link: socket.socket, other: socket.socket) -> None:
    other.close()
    wire.hear()
    link.close()


@scenario()
def tcp_closed_by_a_stranger(stage: Stage) -> None:
    """The last reference waits in a UNIX socket that another process closes: not its FIN."""
    with playing(stage):
        peer = ask(stage.spawn("server", tcp_server, V4, 1))
        left, right = socket.socketpair(socket.AF_UNIX)
        stranger = stage.spawn("stranger", throws_away, right, left)
        client = stage.spawn("client", leaves_behind, peer, left, right)
        left.close()
        right.close()
        client.hear()
        stranger.tell()
        stranger.join()
        client.tell()


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
    """NVMe over TCP: the kernel serves on sockets made in the context of who configured it."""
    with playing(stage):
        maker = stage.spawn("maker", makes_target, 4420)
        maker.hear()
        stage.worker.claim_nobody(proto="tcp", lport=4420, reasons=("kernel",), in_=8, out=6)
        for _ in range(2):
            stage.spawn("initiator", initiator, ("127.0.0.1", 4420)).join()
        time.sleep(0.5)  # a kworker closes its end, while the listener tells whose that is
        maker.tell()


def puts_into_queue(worker: Worker, wire: Wire, link: socket.socket, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    sock.connect(tuple(peer))
    socket.send_fds(link, [b"x"], [sock.fileno()])
    wire.tell(sock.getsockname()[1])


@scenario(engines=("module",))
def queued_while_unknown(stage: Stage) -> None:
    """NFQUEUE and a socket that the module could not know, in flight since before: nobody's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    server = stage.spawn("server", speaker)
    client = stage.spawn("client", puts_into_queue, ours, ask(server))
    port = client.hear()
    client.join()
    quiet()
    stage.reload()
    rules(
        "table ip t { chain out { type filter hook output priority 0;"
        " meta l4proto tcp queue num 0; }; }"
    )
    with playing(stage):
        daemon = stage.spawn("judge", queue_daemon)
        daemon.hear()
        stage.worker.claim_nobody(
            proto="tcp", lport=port, reasons=("predates",), in_=1, out=2, exact=True
        )
        server.tell()
        server.hear()
        server.tell("speak")
        quiet()
        run("ss", "-K", "sport", "=", f":{port}")
        quiet()
        for child in (server, daemon):
            child.tell()
    theirs.close()


# linux/nbd.h
NBD_SET_SOCK, NBD_SET_BLKSIZE, NBD_SET_SIZE, NBD_DO_IT, NBD_DISCONNECT, NBD_SET_TIMEOUT = (
    0xAB00, 0xAB01, 0xAB02, 0xAB03, 0xAB08, 0xAB09,
)  # fmt: skip
SYS_IO_URING_SETUP = 425
NBD_REQUEST, NBD_CMD_DISC, NBD_REPLY_MAGIC = struct.Struct(">IHHQQI"), 2, 0x67446698


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
    fcntl.ioctl(device, NBD_SET_SOCK, sock.fileno())
    sock.close()  # the kernel has it now
    wire.tell()
    wire.hear()
    fcntl.ioctl(device, NBD_DO_IT)


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
