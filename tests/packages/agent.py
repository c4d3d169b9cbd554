# SPDX-License-Identifier: MIT
"""In the guest of machine.py: runs the shell commands that come over a virtio-serial port."""

import json
import subprocess

PORT = "/dev/virtio-ports/packet-hunter"

with open(PORT, "r+b", buffering=0) as port:
    port.write(b'{"ready": true}\n')
    pending = b""
    while True:
        pending += port.read(65536)
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            done = subprocess.run(
                ["/bin/sh", "-c", json.loads(line)["run"]],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output = done.stdout.decode(errors="replace")
            answer = json.dumps({"code": done.returncode, "output": output}).encode() + b"\n"
            while answer:
                answer = answer[port.write(answer) :]
