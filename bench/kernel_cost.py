# SPDX-License-Identifier: MIT
"""What the module costs everybody, in instructions: python bench/kernel_cost.py [--rounds N]

A guest with one processor under `-icount shift=2` plays bench/workload.c: without the module, with
it, with one reader of its records or flows. It compares them with tcpdump, nethogs, engine ebpf and
a module that sends each packet by unicast (bench/unicast). In the guest a nanosecond is a quarter
of an instruction, however busy this machine is. Sender, receiver and reader share the processor,
so all of it is counted.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from vmtest.build import BuildFailed, build_module, make
from vmtest.guest import Guest, GuestLost
from vmtest.kernels import KERNELS, Unavailable, UnpackedKernel, cache_directory, unpack

from results import ROOT, put, table

SHIFT = 2
CONFIGURATIONS = {
    "unloaded": "module not loaded",
    "tcpdump": "tcpdump -i lo -w /dev/null",
    "nethogs": "nethogs -t -a -d 1",
    "ebpf": "engine ebpf, one reader",
    "unicast": "one message a packet, one reader",
    "loaded": "loaded, nobody listens",
    "reader": "loaded, one reader",
    "flows": "loaded, one reader of flows",
}
WORKLOADS = {
    "udp": "UDP datagram sent and received (2 records)",
    "tcp": "TCP connection: open, a byte each way, close",
    "rr": "request and answer on a TCP connection (2 processes)",
    "socket": "socket() and close()",
    "close": "open() and close() of a file",
    "fork": "fork() and exit",
    "fork-files": "fork() and exit with 10,000 open files",
    "fork-sockets": "fork() and exit with 10,000 open sockets",
    "make": "make -j2 of twelve C files",
}
SCRIPT = """\
PYTHON="{python}" sh bench/kernel_guest.sh "$PACKET_HUNTER_SHARED" {rounds} {configurations} \\
    >"$PACKET_HUNTER_SHARED/shown" 2>"$PACKET_HUNTER_SHARED/errors"
echo $? >"$PACKET_HUNTER_SHARED/status"
"""
Figures = dict[str, dict[str, list[float]]]


def measure(module: Path | None, rounds: int, configurations: list[str]) -> tuple[Figures, str]:
    """Instructions an operation by configuration and workload, each round; the kernel's release.

    :param module: a sniffer.ko to measure instead of this tree's.
    :raises GuestLost: with what went wrong in the guest.
    """
    kernel = unpack(KERNELS["6.1"], cache_directory())
    module = module or build_module(ROOT, kernel, cache_directory())
    script = SCRIPT.format(
        python=sys.executable, rounds=rounds, configurations=" ".join(configurations)
    )
    guest = Guest(
        kernel, ["sh", "-c", script], cpus=1, directory=ROOT, qemu=[f"-icount shift={SHIFT}"]
    )
    with guest:
        shutil.copy(module, guest.shared / "sniffer.ko")
        shutil.copy(build_unicast(kernel), guest.shared / "unicast.ko")
        for program in ("workload", "reader", "ring_reader"):
            compile_c(ROOT / "bench" / f"{program}.c", guest.shared / program)
        try:
            guest.receive(3600)  # it says nothing: this ends when the guest does
        except GuestLost as lost:
            if not (guest.shared / "status").exists():
                raise lost from None
        if (guest.shared / "status").read_text().strip() != "0":
            raise GuestLost((guest.shared / "errors").read_text())
        shown = (guest.shared / "shown").read_text()
    figures: Figures = defaultdict(lambda: defaultdict(list))
    for line in shown.splitlines():
        configuration, workload, nanoseconds = line.split()
        figures[workload][configuration].append(float(nanoseconds) / (1 << SHIFT))
    return figures, kernel.release


def build_unicast(kernel: UnpackedKernel) -> Path:
    """The module of bench/unicast."""
    tree = cache_directory() / "modules" / kernel.name / "unicast"
    shutil.copytree(ROOT / "bench" / "unicast", tree, dirs_exist_ok=True)
    make(kernel, tree, ["modules"])
    return tree / "unicast.ko"


def compile_c(source: Path, target: Path) -> None:
    command = ["cc", "-O2", "-Wall", "-o", str(target.with_suffix(".new")), str(source)]
    subprocess.run(command, check=True)
    target.with_suffix(".new").rename(target)


def report(figures: Figures, configurations: list[str]) -> str:
    """The table, and how far the rounds are apart."""
    rows, spreads = [], []
    for workload, title in WORKLOADS.items():
        medians = {c: statistics.median(figures[workload][c]) for c in configurations}
        base = medians[configurations[0]]
        cells = [f"{base:,.0f}"]
        for configuration in configurations[1:]:
            more = medians[configuration] - base
            cells.append(f"{more:+,.0f} ({100 * more / base:+.1f} %)")
        rows.append([title, *cells])
        for values in figures[workload].values():
            spreads.append((max(values) - min(values)) / 2 / statistics.median(values))
    header = ["instructions an operation", *(CONFIGURATIONS[c] for c in configurations)]
    rounds = len(figures["udp"][configurations[0]])
    return (
        f"{table(header, rows)}\n\n"
        f"Median of {rounds} rounds. Half the distance between the rounds' least and most is"
        f" {100 * statistics.median(spreads):.2f} % of it (median), {100 * max(spreads):.1f} %"
        " at most."
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument(
        "--only", nargs="+", choices=CONFIGURATIONS, help="these columns; RESULTS.md stays as it is"
    )
    parser.add_argument("--module", type=Path, help="another sniffer.ko; RESULTS.md stays as it is")
    arguments = parser.parse_args()
    configurations = arguments.only or list(CONFIGURATIONS)
    for tool in ("tcpdump", "nethogs"):
        if tool in configurations and shutil.which(tool) is None:
            print(f"bench: no column for {tool}: apt install {tool}", file=sys.stderr)
            configurations.remove(tool)
    try:
        figures, release = measure(arguments.module, arguments.rounds, configurations)
    except (Unavailable, BuildFailed, GuestLost) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    body = report(figures, configurations)
    if arguments.module or arguments.only:
        print(body)
        return 0
    put(
        "Cost of the module",
        "make bench-kernel",
        body,
        kernel=f"Linux {release} in QEMU, one processor, -icount shift={SHIFT}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
