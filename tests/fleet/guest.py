# SPDX-License-Identifier: MIT
"""In a guest: the module, a daemon, an exporter, and programs that talk and write down the truth.

    python guest.py NUMBER ENGINE SERVER        SERVER: as the exporter takes it

Orders and answers are JSON lines on vmtest's port: {"serve": PORT}, {"ask": [ADDRESS, PORT, N]},
{"told": side}, {"stop": true}.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "vm")]

from vmtest.worker import open_port  # noqa: E402

from fleeting import ASK, SERVE, Program, told  # noqa: E402
from waiting import until  # noqa: E402


def device(number: str) -> str:
    """The network device whose hardware address ends with `number`."""
    for path in Path("/sys/class/net").glob("*/address"):
        if path.read_text().strip().endswith(f":{number}"):
            return path.parent.name
    raise SystemExit(f"no device {number}")


def main() -> None:
    number, engine, server = sys.argv[1:4]
    port = open_port()
    directory = Path("/tmp") / f"fleet-{os.getpid()}"
    directory.mkdir()

    def answer(message: Any) -> None:
        port.write(json.dumps(message).encode() + b"\n")

    subprocess.run(["modprobe", "virtio_net"], check=True)
    for name, address in (("aa", "10.0.2.15/24"), ("bb", f"10.99.0.{number}/24")):
        subprocess.run(["ip", "address", "add", address, "dev", device(name)], check=True)
        subprocess.run(["ip", "link", "set", device(name), "up"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if engine == "module":
        subprocess.run(["insmod", os.environ["PACKET_HUNTER_MODULE"]], check=True)
    path = str(directory / "daemon.sock")
    command = [sys.executable, "-I", "-m", "daemon", "--foreground", "--engine", engine]
    daemon = Program(directory / "daemon.log", [*command, "--socket", path])
    daemon.wait_for("serving", 200)
    words = ("--socket", path, "--spool", str(directory / "spool"), "--host", f"g{number}")
    exporter = Program.of(
        directory / "export.log", "export", *words, "--server", server, "--interval", "1"
    )
    exporter.wait_for(f"engine {engine}", 200)  # it reads the daemon
    programs: dict[str, subprocess.Popen[bytes]] = {}
    answer({"ready": number})
    for line in port:
        order = json.loads(line)
        if "serve" in order:
            _start(programs, "serve", directory, SERVE, order["serve"])
            until(lambda: "ready" in _text(directory / "serve"), 200, "a server")
            answer({"serving": True})
        elif "ask" in order:
            address, to, count = order["ask"]
            _start(programs, "ask", directory, ASK, count, to, "127.0.0.1", address)
            until(lambda: "done" in _text(directory / "ask"), 200, "a client")
            answer({"asked": True})
        elif "told" in order:
            answer({"told": [[*way, pid] for way, pid in told(directory / order["told"]).items()]})
        else:
            break
    for one in programs.values():
        one.kill()
        one.wait()
    status = exporter.stop()
    daemon.stop(signal.SIGTERM)
    answer({"ended": status, "log": exporter.text()[-2000:]})


def _start(programs: dict[str, Any], side: str, directory: Path, code: str, *words: Any) -> None:
    command = [sys.executable, "-c", code, str(directory / side), *map(str, words)]
    programs[side] = subprocess.Popen(command, stdin=subprocess.PIPE)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    main()
