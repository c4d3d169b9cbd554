# SPDX-License-Identifier: MIT
"""One reader of engine ebpf, for bench/kernel_guest.sh: says "joined", then reads until killed."""

from __future__ import annotations

from nlproto.engines.ebpf import EbpfEngine

with EbpfEngine(print) as engine:
    print("joined" if engine.whole else "only parts run", flush=True)
    while engine.whole:
        for _ in engine.read(1.0):
            pass
