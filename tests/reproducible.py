# SPDX-License-Identifier: MIT
"""make reproducible: each build of this commit gives the same files, byte for byte.

    .venv/bin/python tests/reproducible.py [PART ...]        python, bpf, debian; all that can be

Builds twice: in directories whose names differ in length, at different times of files, with
another umask, locale and time zone. Prints the hash of each file; 1 when two differ. Debian's
packages want the build dependencies of debian/control (without them the part is left out, and
said so).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {
    "a": {"LC_ALL": "C", "TZ": "UTC", "PYTHONHASHSEED": "1"},
    "another-place/of-another-length": {
        "LC_ALL": "C.UTF-8",
        "TZ": "Asia/Kolkata",
        "PYTHONHASHSEED": "2",
    },
}
"""Where it is built, and with what environment."""


def tree(where: Path, age: float) -> None:
    """What git knows of this tree, as files of `age` seconds."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, where / name
        if not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target, follow_symlinks=False)
        os.utime(target, (time.time() - age,) * 2, follow_symlinks=False)


def run(words: list[str], where: Path, environment: dict[str, str], umask: int) -> None:
    done = subprocess.run(
        words,
        cwd=where,
        env=os.environ | environment,
        umask=umask,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout.decode(errors='replace')[-3000:]}")


def python(where: Path, environment: dict[str, str], umask: int) -> Iterator[Path]:
    """Source archive and wheel."""
    dist = where / "dist"
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist)]
    for what in ("--sdist", "--wheel"):
        run([*words, what], where, environment, umask)
    yield from dist.iterdir()


def bpf(where: Path, environment: dict[str, str], umask: int) -> Iterator[Path]:
    """The programs of engine ebpf, and those that count drops."""
    run(["make", "-s", "-C", "bpf"], where, environment, umask)
    yield from (where / "python/nlproto").glob("*/*.bpf.o")


def debian(where: Path, environment: dict[str, str], umask: int) -> Iterator[Path]:
    """Source and binary packages."""
    run(["sh", "debian/build", "packages"], where, environment, umask)
    for path in (where / "packages").iterdir():
        if path.suffix not in (".buildinfo", ".changes"):  # they say where and when
            yield path


def _debian_lacks() -> str:
    if shutil.which("dpkg-checkbuilddeps") is None:
        return "no dpkg-checkbuilddeps"
    asked = subprocess.run(
        ["dpkg-checkbuilddeps", "debian/control"], cwd=ROOT, capture_output=True, text=True
    )
    return asked.stderr.strip()


PARTS: dict[str, Callable[[Path, dict[str, str], int], Iterator[Path]]] = {
    "python": python,
    "bpf": bpf,
    "debian": debian,
}


def main() -> int:
    wanted = sys.argv[1:] or list(PARTS)
    if "debian" in wanted and (lacks := _debian_lacks()):
        print(f"left out: debian ({lacks})")
        wanted.remove("debian")
    epoch = subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    differ = 0
    for part in wanted:
        hashes: list[dict[str, str]] = []
        for number, (place, environment) in enumerate(PLACES.items()):
            with tempfile.TemporaryDirectory() as scratch:
                where = Path(scratch, place)
                tree(where, age=number * 86_400.0)
                made = PARTS[part](
                    where, environment | {"SOURCE_DATE_EPOCH": epoch}, (0o022, 0o077)[number]
                )
                hashes.append(
                    {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in made}
                )
        for name in sorted(hashes[0].keys() | hashes[1].keys()):
            one, other = (found.get(name, "not made") for found in hashes)
            differ += one != other
            print(f"{one}  {name}" + ("" if one == other else f"   DIFFERS: {other}"))
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
