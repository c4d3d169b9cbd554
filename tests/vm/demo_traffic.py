# SPDX-License-Identifier: MIT
"""Traffic for `make demo`: a web server and a DNS-like one here, and clients that live shortly."""

import http.server
import os
import socket
import subprocess
import sys
import threading

WEB, NAMES = 8080, 8053
FETCH = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{WEB}/VERSION').read()"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Says nothing: the packets are what is shown."""


def main() -> None:
    web = http.server.ThreadingHTTPServer(("127.0.0.1", WEB), Quiet)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind(("127.0.0.1", NAMES))
    for _ in range(2):
        subprocess.run([sys.executable, "-c", FETCH], check=True)
        pid = os.fork()
        if pid == 0:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"?", ("127.0.0.1", NAMES))
            os._exit(0)
        question, client = names.recvfrom(100)
        names.sendto(b"!", client)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
