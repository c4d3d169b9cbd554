# SPDX-License-Identifier: MIT
"""The whole daemon's memory with 1,000 to 1,000,000 flows: python bench/memory_cost.py

Each size is a daemon of its own, as packet-hunterd starts it, whose engine reads from a pipe:
flows of 200 processes, both directions, from all 28,232 local ports that a machine gives its
clients by default. Memory is read when all flows are known and free memory was given back once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SIZES = (1_000, 10_000, 100_000, 300_000, 1_000_000)
TRIMMED = 12.0  # s
COLUMNS = "VmRSS", "RssAnon", "VmHWM"


def resident() -> dict[str, float]:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return {name: int(status[name].split()[0]) / 1024 for name in COLUMNS}


def serve(flows: int) -> None:
    """In a process of its own: read flows from stdin, tell the memory, end."""
    import daemon.__main__  # all that packet-hunterd imports  # noqa: F401
    from daemon import service
    from daemon.history.recorder import Recorder
    from daemon.system.config import Config
    from daemon_engine import Piped

    start = resident()
    recorders: list[Recorder] = []

    class Known(Recorder):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            recorders.append(self)

    def watch() -> None:
        while not recorders or len(recorders[0].history) < flows:
            time.sleep(0.1)
        time.sleep(TRIMMED)
        print(json.dumps({"start": start, "end": resident()}), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    vars(service).update(Recorder=Known, open_engine=lambda *_, **__: Piped(sys.stdin.buffer))
    with tempfile.TemporaryDirectory() as directory:
        config = Config(engine="module", socket=f"{directory}/s", history_flows=max(flows, 200_000))
        threading.Thread(target=watch, daemon=True).start()
        service.Service(lambda: config, {}, foreground=True).run()


def measure(flows: int) -> dict[str, dict[str, float]]:
    from daemon_engine import make_batches

    command = [sys.executable, __file__, "--serve", str(flows)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        for raw in make_batches(flows):
            child.stdin.write(len(raw).to_bytes(4, "little") + raw)
        child.stdin.close()
        told: dict[str, dict[str, float]] = json.loads(child.stdout.readline())
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("sizes", type=int, nargs="*", default=SIZES)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    from results import put, table

    rows = []
    for flows in options.sizes:
        told = measure(flows)
        each = (told["end"]["VmRSS"] - told["start"]["VmRSS"]) * (1 << 20) / flows
        figures = (told["start"]["VmRSS"], *(told["end"][name] for name in COLUMNS))
        rows.append([f"{flows:,}", *(f"{figure:.1f}" for figure in figures), f"{each:,.0f}"])
        print(rows[-1], file=sys.stderr)
    header = ["flows", "all imported, MiB", "resident", "of that anonymous", "peak", "bytes a flow"]
    words = __doc__.partition("\n\n")[2].strip()
    put("Memory", "make bench-memory", f"{words}\n\n{table(header, rows)}")


if __name__ == "__main__":
    main()
