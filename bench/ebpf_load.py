# SPDX-License-Identifier: MIT
"""How long engine ebpf takes to load, and what the verifier has to do: python bench/ebpf_load.py

Here and in an emulated guest. Where this kernel lets nobody trace its functions, it loads the
programs of the parts alone. The guest loads both, so what the whole takes here follows from the
ratio: processor time of one and the same work, emulated and bare.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from vmtest.guest import Guest, GuestLost
from vmtest.kernels import KERNELS, Unavailable, cache_directory, unpack

from nlproto.engines.bpf_programs import OBJECT, PARTS, choose_programs
from nlproto.kernel.bpf import NoBpf, Object
from results import ROOT, put, table

ROUNDS = 3
GUEST = """\
PYTHONPATH="{path}" "{python}" bench/ebpf_load.py --here >"$PACKET_HUNTER_SHARED/shown" \\
    2>"$PACKET_HUNTER_SHARED/errors"
echo $? >"$PACKET_HUNTER_SHARED/status"
"""
Loaded = dict[str, object]


def load(path: Path) -> Loaded | None:
    """Seconds of the processor from opening an object to its unloading; instructions verified."""
    before = _processor()
    opened = Object(path)
    try:
        choose_programs(opened, whole=path == OBJECT)
        opened.load()
    except (NoBpf, OSError):
        return None
    else:
        verified = {n: p.figures()[1] for n, p in opened.programs.items() if p.fd >= 0}
    finally:
        opened.close()
    return {"seconds": _processor() - before, "verified": verified}


def _processor() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def here() -> dict[str, Loaded]:
    """The quickest of some rounds for each object that this kernel takes."""
    found = {}
    for name, path in (("whole", OBJECT), ("parts", PARTS)):
        rounds = [one for one in (load(path) for _ in range(ROUNDS)) if one is not None]
        if rounds:
            found[name] = min(rounds, key=lambda one: float(str(one["seconds"])))
    return found


def in_guest(kernel_name: str) -> tuple[dict[str, Loaded], str]:
    """The same in a guest; its kernel's release."""
    kernel = unpack(KERNELS[kernel_name], cache_directory())
    script = GUEST.format(
        python=sys.executable, path=":".join(str(ROOT / d) for d in ("python", "tests/vm", "bench"))
    )
    with Guest(kernel, ["sh", "-c", script], cpus=1, directory=ROOT) as guest:
        try:
            guest.receive(1800)  # it says nothing: this ends when the guest does
        except GuestLost as lost:
            if not (guest.shared / "status").exists():
                raise lost from None
        if (guest.shared / "status").read_text().strip() != "0":
            raise GuestLost((guest.shared / "errors").read_text())
        found: dict[str, Loaded] = json.loads((guest.shared / "shown").read_text())
    return found, kernel.release


def report(bare: dict[str, Loaded], guest: dict[str, Loaded], release: str) -> str:
    """Both tables, and what follows."""
    rows = []
    for name in ("parts", "whole"):
        cells = [name]
        for one in (bare.get(name), guest.get(name)):
            cells.append("refused" if one is None else f"{float(str(one['seconds'])):.2f} s")
        verified = guest[name]["verified"]
        assert isinstance(verified, dict)
        cells += [f"{sum(verified.values()):,}", str(len(verified))]
        rows.append(cells)
    text = table(["object", "here", f"{release}, emulated", "verified", "programs"], rows)
    if "parts" in bare and "parts" in guest and "whole" in guest:
        ratio = float(str(guest["parts"]["seconds"])) / float(str(bare["parts"]["seconds"]))
        whole = float(str(guest["whole"]["seconds"])) / ratio
        text += (
            f"\n\nSeconds of the processor. Emulated is {ratio:.1f} times here for the same object:"
            f" the whole one would take some {whole:.2f} s here."
        )
    verified = guest["whole"]["verified"]
    assert isinstance(verified, dict)
    most = sorted(verified.items(), key=lambda item: -item[1])[:12]
    lines = [[f"`{name}`", f"{count:,}"] for name, count in most]
    return f"{text}\n\n{table(['program', 'instructions verified'], lines)}"


def main() -> int:
    """Command line."""
    if sys.argv[1:] == ["--here"]:
        print(json.dumps(here()))
        return 0
    try:
        guest, release = in_guest("6.1")
    except (Unavailable, GuestLost) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    put("Loading engine ebpf", "make bench-load", report(here(), guest, release))
    return 0


if __name__ == "__main__":
    sys.exit(main())
