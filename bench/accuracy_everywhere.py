# SPDX-License-Identifier: MIT
"""make bench-accuracy: tools side by side, and all scenarios: here, and in a guest with the module.

The two run one after the other; `--together` saves time and is less fair to tools that poll.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vmtest.build import BuildFailed, build_module
from vmtest.guest import Guest, GuestLost
from vmtest.kernels import KERNELS, Unavailable, cache_directory, unpack

from accuracy import Row, table
from results import ROOT, put

PACKAGES = {"nethogs": "nethogs", "tcplife": "libbpf-tools", "tcpdump": "tcpdump"}
HERE = ("packet", "nethogs", "ss", "psutil", "tcplife", "tcpconnect")
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
    module = build_module(ROOT, kernel, cache_directory()).module
    path = ":".join(str(ROOT / name) for name in ("python", "tests/vm", "bench"))
    script = SCRIPT.format(path=path, python=sys.executable)
    with Guest(kernel, ["sh", "-c", script], directory=ROOT) as guest:
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


def scenario_line(engine: str, kernel: str, sums: dict[str, int]) -> str:
    cells = [str(sums[n]) for n in ("scenarios", "packets", "right", "wrong", "unnamed")]
    return f"| {engine} | {kernel} | {' | '.join(cells)} | {sums['rightly_unnamed']} |"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Accuracy, side by side, into bench/RESULTS.md.")
    parser.add_argument("--together", action="store_true", help="guest and host at once")
    arguments = parser.parse_args()
    install()
    own = platform.release()
    try:
        with ThreadPoolExecutor(2 if arguments.together else 1) as pool:
            guest, host = pool.submit(in_guest), pool.submit(here)
            guest_rows, guest_sums, release = guest.result()
            rows, sums = host.result()
    except (Unavailable, BuildFailed, GuestLost) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    how = " Guest and host ran at once." if arguments.together else ""
    command = COMMAND + (" ARGUMENTS=--together" if arguments.together else "")
    kernels = f"Linux {release} and {own}"
    body = f"""\
The workload is bench/accuracy_workload.py: a small service host and many processes that live for
one request. tcpdump says which packets there were, the processes say themselves whose they are.
One run a tool; a tool is credited with all it said during the run, also for packets before.
tcplife and tcpconnect are bcc's, from Debian's libbpf-tools.{how}

Linux {release} in QEMU (emulated, 2 processors):

{table(guest_rows)}

Linux {own}, not emulated, where no module can be loaded:

{table(rows)}

Most of the bytes are one transfer of 3 MB: who misses that connection loses most of them."""
    put("Accuracy beside other tools", command, body, kernel=kernels)
    lines = [
        "| engine | kernel | scenarios | records | right | wrong | nameable, unnamed "
        "| rightly unnamed |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        scenario_line("module", f"{release}, emulated", guest_sums),
        scenario_line("packet", own, sums),
    ]
    body = "\n".join(lines) + (
        "\n\nAlmost every scenario is short-lived on purpose: this is engine packet's worst case."
        " Its\nwrong owners are sockets that several processes hold, and SO_REUSEPORT."
    )
    put("All scenarios of tests/vm/attribution", command, body, kernel=kernels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
