# SPDX-License-Identifier: MIT
"""sdist and wheel: what is in them, and that the one builds from the other."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def build(kind: Any, source: Any, out: Any) -> Any:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = Path(out).iterdir()
    return made


def test_the_sdist_has_the_header_and_a_working_wheel_is_built_from_it(tmp_path: Path) -> None:
    # From a copy: other builds of this tree may run at the same time.
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "python", "*.toml", "setup.py", "MANIFEST.in",
         "VERSION", "shared_proto.h", "README.md"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = [name for name in listed.stdout.split("\0") if name]
    if not names:  # an unpacked sdist is no git repository
        names = [str(path.relative_to(ROOT)) for path in ROOT.glob("python/**/*") if path.is_file()]
        names += ["pyproject.toml", "setup.py", "MANIFEST.in", "VERSION", "shared_proto.h"]
    for name in names:
        if (ROOT / name).is_file() and not name.endswith(".so"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())

    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
        if hasattr(tarfile, "data_filter"):  # not in Debian 12's Python 3.11.2
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(tmp_path / "unpacked")
    assert {
        "shared_proto.h",
        "VERSION",
        "python/nlproto/native/ring.c",
        "python/build_wire.py",
    } <= inside

    version = (ROOT / "VERSION").read_text().strip()
    wheel = build("wheel", tmp_path / "unpacked" / f"packet_hunter-{version}", tmp_path / "wheel")
    assert wheel.name.startswith(f"packet_hunter-{version}-cp311-abi3-")
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
        archive.extractall(tmp_path / "site")
        scripts = {
            name.rpartition("/")[2]: archive.read(name).decode().splitlines()[-1]
            for name in files
            if "/scripts/" in name
        }
    assert {"nlproto/_wire.abi3.so", "nlproto/_host.abi3.so", "nlproto/py.typed"} <= files
    assert {
        name.split("/")[0] for name in files if ".dist-info/" not in name and ".data/" not in name
    } == {
        "nlproto",
        "daemon",
        "fleet",
        "hunter",
        "packet-hunter.pth",
    }
    fleet = {f"packet-hunter-{one}" for one in ("export", "collect", "otlp")}
    assert scripts.keys() == {"packet-hunter", "packet-hunterd"} | fleet
    assert scripts["packet-hunter-export"].endswith('/python" -I -m fleet.export "$@"')
    assert scripts["packet-hunter"].endswith('/python" -I -m hunter "$@"')
    assert scripts["packet-hunterd"].endswith('/python" -I -m daemon "$@"')

    code = "import nlproto.records.wire as w; print(w.__file__, w.RECORD.itemsize)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert done.stdout.split() == [str(tmp_path / "site/nlproto/records/wire.py"), "128"]
