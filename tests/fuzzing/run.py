# SPDX-License-Identifier: MIT
"""make fuzz: each target for some seconds, guided by coverage; exit 1 and the input when one fails.

run.py [SECONDS [NAME ...]]   600 seconds each; names: targets.py, and "native" (C, ASan and UBSan)

Corpora are kept and kept small, in ~/.cache/packet-hunter/fuzz. An input that fails is left there
too, and its path printed: run.py 0 NAME FILE tries it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import targets

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "packet-hunter" / "fuzz"
NATIVE = "native"
_INPUT_BYTES = 4096
_KEPT = 2000
"""Inputs that a corpus keeps, the smallest."""
_OPTIONS = ("-timeout=20", "-rss_limit_mb=2048", f"-max_len={_INPUT_BYTES}", "-print_final_stats=1")


def command(name: str) -> list[str]:
    """Return what runs a target; the C one is compiled. Raises CalledProcessError."""
    if name != NATIVE:
        return [sys.executable, str(HERE / "guided.py"), name]
    program = CACHE / "native.program"
    compile_native(program)
    return [str(program)]


def compile_native(program: Path) -> None:
    """Compile native.c with libFuzzer and sanitizers (clang). Raises CalledProcessError."""
    source = HERE.parents[1]
    sources = [source / f"python/nlproto/native/{name}.c" for name in ("ring", "diag", "host")]
    subprocess.run(
        [
            *("clang", "-g", "-O1", "-fsanitize=fuzzer,address,undefined"),
            "-fno-sanitize-recover=undefined",
            *(f"-I{source}", f"-I{source / 'python/nlproto/native'}"),
            *(str(HERE / "native.c"), *map(str, sources), "-o", str(program)),
        ],
        check=True,
    )


def seeds(name: str) -> list[bytes]:
    """Good input to begin with."""
    if name != NATIVE:
        return list(targets.SEEDS[name]())
    return [bytes([which]) + bytes(one) for which in range(3) for one in (60, 4, 400)]


def fuzz(name: str, seconds: int) -> bool:
    """Run one target; whether nothing was found."""
    corpus, found = CACHE / name, CACHE / f"{name}.found"
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(data)
    run = command(name)
    log = CACHE / f"{name}.log"
    with open(log, "wb") as output:
        done = subprocess.run(
            [*run, f"-max_total_time={seconds}", f"-artifact_prefix={found}/", *_OPTIONS, corpus],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    for large in sorted(corpus.iterdir(), key=lambda one: one.stat().st_size)[_KEPT:]:
        large.unlink()
    executed = next(
        (
            w.split()[-1]
            for w in log.read_text(errors="replace").splitlines()
            if w.startswith("stat::number_of_executed_units")
        ),
        "?",
    )
    bad = done.returncode != 0
    print(f"{name}: {executed} inputs, {'FAILED, see ' + str(log) if bad else 'nothing found'}")
    for one in sorted(found.iterdir()):
        print(f"  {one}")
    sys.stdout.flush()
    return not bad


def main() -> int:
    """Run what the command line names."""
    words = sys.argv[1:]
    seconds = int(words[0]) if words else 600
    if seconds == 0:
        targets.run(words[1], Path(words[2]).read_bytes())
        return 0
    os.environ.setdefault("PYTHONPATH", str(HERE.parents[1] / "python"))
    names = words[1:] or [*targets.TARGETS, NATIVE]
    return 0 if all([fuzz(name, seconds) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
