# SPDX-License-Identifier: MIT
"""Packets that a firewall queues, refuses or makes."""

from __future__ import annotations

import os
import select
import socket
import struct

from ..catalog import scenario
from ..stage import Stage, Wire
from ..traffic import (
    TCP,
    UDP,
    V4,
    V6,
    ask,
    bound,
    kill_connection,
    listening,
    playing,
    tcp_client,
    tcp_server,
    udp_echo,
    udp_receiver,
    udp_sender,
)
from ..truth import Worker
from .kernel import COUNT
from .machinery import speaker
from .namespaces import RIGHT_PORT, rules
from .owners import quiet

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
        kill_connection(port)
        quiet()
        for child in (server, daemon):
            child.tell()
    theirs.close()
