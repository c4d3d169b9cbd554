# SPDX-License-Identifier: MIT
"""python -m vmtest.demo (make demo): the module at work in a throw-away virtual machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from .build import BuildFailed, build_module
from .guest import Guest, GuestLost
from .kernels import KERNELS, Unavailable, cache_directory, unpack

ROOT = Path(__file__).parents[3]
SCRIPT = """\
sh tests/vm/demo.sh "$PACKET_HUNTER_SHARED/sniffer.ko" >"$PACKET_HUNTER_SHARED/shown" 2>&1
echo $? >"$PACKET_HUNTER_SHARED/status"
"""


def main() -> int:
    """Boots, runs tests/vm/demo.sh, prints what it showed; its exit status, 1 when it never ran."""
    try:
        kernel = unpack(KERNELS["6.1"], cache_directory())
        module = build_module(ROOT, kernel, cache_directory())
        fast = os.access("/dev/kvm", os.R_OK | os.W_OK)
        long = "half a minute" if fast else "without /dev/kvm: some minutes"
        print(f"demo: booting Linux {kernel.release} in QEMU ({long})", file=sys.stderr)
        with Guest(kernel, ["sh", "-c", SCRIPT], directory=ROOT) as guest:
            # the guest takes seconds to boot, the copy an instant
            shutil.copy(module, guest.shared / "sniffer.ko")
            try:
                guest.receive(600)  # it says nothing: this ends when the guest does
            except GuestLost as lost:
                if not (guest.shared / "status").exists():
                    raise lost from None
            print((guest.shared / "shown").read_text(errors="replace"), end="")
            return int((guest.shared / "status").read_text())
    except (Unavailable, BuildFailed, GuestLost) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
