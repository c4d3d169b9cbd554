# SPDX-License-Identifier: MIT
"""A little traffic on loopback for `make run` without a terminal: loopback_traffic.py SECONDS."""

import socket
import sys
import threading
import time


def answer(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(connection.recv(1000))


def main() -> None:
    end = time.monotonic() + float(sys.argv[1])
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=answer, args=(server,), daemon=True).start()
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    while time.monotonic() < end:
        with socket.create_connection(server.getsockname()) as client:
            client.sendall(b"hello")
            client.recv(1000)
        receiver.sendto(b"datagram", receiver.getsockname())
        receiver.recv(100)
        time.sleep(0.5)


if __name__ == "__main__":
    main()
