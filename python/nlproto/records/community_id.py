# SPDX-License-Identifier: MIT
"""Community ID, by which Zeek, Suricata and others know a flow.

https://github.com/corelight/community-id-spec, version 1 with seed 0.
"""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
from functools import lru_cache

__all__ = ["community_id"]


@lru_cache(1 << 14)
def community_id(
    family: int, proto: int, source: bytes, sport: int, target: bytes, dport: int
) -> str:
    """Return the ID of a TCP or UDP flow. An address has its 4 or 16 bytes; more are ignored."""
    size = 4 if family == socket.AF_INET else 16
    low, high = sorted(((source[:size], sport), (target[:size], dport)))
    text = struct.pack("!H", 0) + low[0] + high[0] + struct.pack("!BBHH", proto, 0, low[1], high[1])
    digest = hashlib.sha1(text, usedforsecurity=False).digest()
    return "1:" + base64.b64encode(digest).decode()
