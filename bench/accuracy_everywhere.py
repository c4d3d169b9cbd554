# SPDX-License-Identifier: MIT
"""make bench-accuracy: tools side by side, and all scenarios: here, and in a guest with the module.

The workload is bench/accuracy_workload.py: a small service host and many processes that live for
one request; here also a web server with thousands of requests (accuracy_http.py).
`accuracy_everywhere.py [guest] [here]`; both by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vmtest.build import BuildFailed, build_module
from vmtest.guest import Guest, GuestLost
from vmtest.kernels import KERNELS, Unavailable, cache_directory, unpack

import accuracy_http
from accuracy import Row, table
from results import ROOT, put

PACKAGES = {"nethogs": "nethogs", "tcplife": "libbpf-tools", "tcpdump": "tcpdump"}
HERE = ("ebpf", "packet", "nethogs", "ss", "psutil", "tcplife", "tcpconnect")
SCRIPT = """\
cd "$PACKET_HUNTER_SHARED" && insmod ./sniffer.ko && export PYTHONPATH={path} &&
{python} -m accuracy --json compared >said 2>&1
{python} -m attribution.run --engine module --module ./sniffer.ko --json scenarios >>said 2>&1
echo done >status
"""
COMMAND = "make bench-accuracy"


def install() -> None:
    """The tools that are missing, as root; else says how."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    os.environ["PATH"] = path
    missing = sorted({p for tool, p in PACKAGES.items() if not shutil.which(tool, path=path)})
    if os.geteuid() != 0:
        wanted = f" apt-get install -y {' '.join(missing)} &&" if missing else ""
        raise SystemExit(f"bench: needs root; run: sudo sh -c '{wanted} {COMMAND}'")
    if missing:
        print(f"bench: installing {' '.join(missing)}", file=sys.stderr)
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def in_guest() -> tuple[list[Row], dict[str, int], str]:
    """Rows of the comparison, sums of the scenarios, the guest's kernel."""
    kernel = unpack(KERNELS["6.1"], cache_directory())
    module = build_module(ROOT, kernel, cache_directory())
    path = ":".join(str(ROOT / name) for name in ("python", "tests/vm", "bench"))
    script = SCRIPT.format(path=path, python=sys.executable)
    with Guest(kernel, ["sh", "-c", script], parallel=True, directory=ROOT) as guest:
        shutil.copy(module, guest.shared / "sniffer.ko")
        try:
            guest.receive(3600)  # it says nothing: this ends when the guest does
        except GuestLost as lost:
            if not (guest.shared / "status").exists():
                raise lost from None
        try:
            rows = [Row(**one) for one in json.loads((guest.shared / "compared").read_text())]
            sums = read_sums(guest.shared / "scenarios")
        except FileNotFoundError:
            raise GuestLost((guest.shared / "said").read_text()[-2000:]) from None
    return rows, sums, kernel.release


def read_sums(path: Path) -> dict[str, int]:
    found: Any = json.loads(path.read_text())
    return {str(name): int(value) for name, value in found["total"].items()}


def here() -> tuple[list[Row], dict[str, int]]:
    """The same on the running kernel, which has no module of ours."""
    with tempfile.TemporaryDirectory() as directory:
        compared, scenarios = Path(directory) / "compared", Path(directory) / "scenarios"
        tools = [word for tool in HERE for word in ("--tool", tool)]
        run = [sys.executable, "-m"]
        subprocess.run([*run, "accuracy", *tools, "--json", compared], check=True)
        words = ["--engine", "packet", "--json", str(scenarios)]
        subprocess.run([*run, "attribution.run", *words], stdout=subprocess.DEVNULL)
        rows = [Row(**one) for one in json.loads(compared.read_text())]
        return rows, read_sums(scenarios)


def put_sections(
    where: str, kernel: str, engine: str, rows: list[Row], sums: dict[str, int]
) -> None:
    command = f"{COMMAND} WHERE={where}"
    explained = (
        "tcpdump says which packets there were, the processes say themselves whose they are. One"
        " run a tool;\na tool is credited with all it said during the run, also for packets before."
        " tcplife and tcpconnect\nare bcc's, from Debian's libbpf-tools. Most of the bytes are one"
        " transfer of 3 MB: who misses that\nconnection loses most of them."
    )
    put(
        f"Accuracy beside other tools: {where}",
        command,
        f"{table(rows)}\n\n{explained}",
        kernel=kernel,
    )
    words = (
        "scenarios", "packets", "right", "wrong", "wrong_told", "wrong_reason", "unnamed",
        "rightly_unnamed",
    )  # fmt: skip
    lines = [
        "| engine | scenarios | records | right | wrong | of these flagged ambiguous | of these"
        " nobody, but another reason | nameable, unnamed | rightly unnamed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| {engine} | {' | '.join(str(sums[word]) for word in words)} |",
        "",
        "Almost every scenario of tests/vm/attribution is short-lived on purpose: engine packet's"
        " worst case.",
    ]
    put(f"All scenarios, engine {engine}", command, "\n".join(lines), kernel=kernel)


def put_http(result: accuracy_http.Result) -> None:
    """The web server's section."""
    explained = (
        "`python3 -m http.server` and one curl after another over loopback: each packet is seen at"
        " both ends.\nWho accepted a connection that is gone is its listener's owner, flagged as a"
        " guess; a curl that is gone\nbefore its socket was asked about is nobody."
    )
    body = f"{accuracy_http.table(result)}\n\n{explained}"
    put("A busy web server, engine packet", f"{COMMAND} WHERE=here", body)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Accuracy, side by side, into bench/RESULTS.md.")
    parser.add_argument("where", nargs="*", metavar="guest|here", default=["guest", "here"])
    where = parser.parse_args().where
    install()
    try:
        if "guest" in where:
            rows, sums, release = in_guest()
            kernel = f"Linux {release} in QEMU, emulated, 2 processors"
            put_sections("guest", kernel, "module", rows, sums)
        if "here" in where:
            rows, sums = here()
            put_sections("here", f"Linux {platform.release()}", "packet", rows, sums)
            put_http(accuracy_http.measure())
    except (Unavailable, BuildFailed, GuestLost) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
