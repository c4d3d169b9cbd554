# SPDX-License-Identifier: MIT
"""One reader of engine ebpf, for bench/kernel_guest.sh: ebpf_reader.py RING_READER.

Says "joined" once the programs run; then bench/ring_reader.c takes the records until all of it is
killed, as bench/reader.c takes the module's: what Python does to them is no cost of the kernel's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from nlproto.engines.ebpf import RING_BYTES, EbpfEngine

with EbpfEngine(print) as engine:
    if not engine.whole:
        sys.exit("only parts run")
    ring = os.dup(engine._object.map_fd("ring"))
    command = [sys.argv[1], str(ring), str(RING_BYTES)]
    with subprocess.Popen(command, pass_fds=[ring]) as reader:
        print("joined", flush=True)
        while reader.poll() is None:
            time.sleep(1.0)
            engine._collect()
