# SPDX-License-Identifier: MIT
"""Traffic whose truth is known: four processes, UDP and TCP over loopback; prints it as JSON.

Each process says itself who it is. All of them have exited when this ends.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

DATAGRAMS = 50
MESSAGES = 20


def udp_receiver(pipe: Connection) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        pipe.send({"pid": os.getpid(), "port": sock.getsockname()[1]})
        for _ in range(DATAGRAMS):
            sock.recv(2048)


def udp_sender(pipe: Connection, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", port))
        pipe.send({"pid": os.getpid(), "port": sock.getsockname()[1]})
        for size in range(1, DATAGRAMS + 1):
            sock.send(b"x" * size)


def tcp_server(pipe: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send({"pid": os.getpid(), "port": listener.getsockname()[1]})
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb", buffering=0) as stream:
            for line in stream:
                stream.write(line)


def tcp_client(pipe: Connection, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        pipe.send({"pid": os.getpid(), "port": connection.getsockname()[1]})
        with connection.makefile("rwb", buffering=0) as stream:
            for number in range(MESSAGES):
                stream.write(b"%d\n" % number)
                stream.readline()


def start(target: Any, *arguments: Any) -> tuple[multiprocessing.Process, dict[str, int]]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=target, args=(theirs, *arguments))
    process.start()
    return process, ours.recv()


def main() -> None:
    began = time.time()
    receiver, udp_to = start(udp_receiver)
    sender, udp_from = start(udp_sender, udp_to["port"])
    server, tcp_to = start(tcp_server)
    client, tcp_from = start(tcp_client, tcp_to["port"])
    for process in (sender, receiver, client, server):
        process.join(60)
        if process.exitcode != 0:
            sys.exit(f"traffic.py: {process} failed")
    truth = {
        "began": began,
        "ended": time.time(),
        "exe": os.path.realpath(sys.executable),
        "uid": os.getuid(),
        "netns": os.stat("/proc/self/ns/net").st_ino,
        "datagrams": DATAGRAMS,
        "messages": MESSAGES,
        "udp": {"from": udp_from, "to": udp_to},
        "tcp": {"from": tcp_from, "to": tcp_to},
    }
    json.dump(truth, sys.stdout)


if __name__ == "__main__":
    main()
