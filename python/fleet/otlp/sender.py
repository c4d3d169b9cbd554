# SPDX-License-Identifier: MIT
"""Posts the daemon's flows to an OTLP/HTTP receiver, and reports what it did not take.

If the receiver is away or busy, it is tried again. Meanwhile the sums of at most MOST flows wait in
memory. Beyond that, flows are lost and counted. Nothing is kept on disk; fleet.export does that.
"""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any

import numpy as np

from fleet.export.source import FlowSource
from fleet.otlp.record import record_of, request_of
from nlproto.errors import Error

__all__ = ["MOST", "Receiver", "Refused", "Sender", "Unavailable"]

MOST = 200_000
"""The most flows that wait for a receiver."""
_AT_ONCE = 500  # records in a request
_TIMEOUT = 10.0  # s
_AGAIN = (429, 502, 503, 504)
"""The retryable status codes of OTLP/HTTP."""
_ANSWER = 1 << 16

log = logging.getLogger(__name__)


class Unavailable(Error):
    """The receiver takes nothing now."""


class Refused(Error):
    """The receiver refuses this, now and later."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the POST would become a GET without its records."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Message | http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


class Receiver:
    """The receiver. `headers`: additional ones for each request, such as a key."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self.url = url
        own = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        self._headers = {**headers, **own}
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, body: Mapping[str, Any]) -> int:
        """Send one request; return how many of its records were rejected.

        Raises Unavailable, Refused.
        """
        data = gzip.compress(json.dumps(body).encode(), 1)
        request = urllib.request.Request(self.url, data, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=_TIMEOUT) as reply:
                return _rejected(reply.read(_ANSWER))
        except urllib.error.HTTPError as error:
            error.close()
            line = f"{self.url} answers {error.code} ({error.reason})"
            raise (Unavailable if error.code in _AGAIN else Refused)(line) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise Unavailable(f"{self.url} takes nothing ({reason})") from None


def _rejected(answer: bytes) -> int:
    """Return how many records a partial success left out. An empty answer means none."""
    try:
        told = json.loads(answer or b"{}")
        return int(told.get("partialSuccess", {}).get("rejectedLogRecords", 0))
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return 0


@dataclass(slots=True)
class Sender:
    """Runs until stop(). Rows taken = `sent` + `refused` + `lost` + those that wait."""

    source: FlowSource
    receiver: Receiver
    host: str
    interval: float
    """Seconds of one record."""
    stopping: threading.Event
    sent: int = 0
    refused: int = 0
    """Records that the receiver refused."""
    lost: int = 0
    """Records without room in memory, or left at the end."""

    def run(self) -> None:
        """Send. Raises Error if the daemon refuses us."""
        complained = ""
        while not self.stopping.wait(self.interval):
            if self.source.failure is not None:
                raise self.source.failure
            try:
                self.flush()
                complained = ""
            except Unavailable as error:
                if str(error) != complained:
                    log.warning("%s; asked again", complained := str(error))
        self.source.__exit__(None, None, None)
        try:
            self.flush()
        except Unavailable as error:
            with self.source.lock:
                self.lost += len(self.source.deltas.take())
            log.warning("%s", error)

    def flush(self) -> None:
        """Send what waits. Raises Unavailable; then it still waits."""
        with self.source.lock:
            flows = self.source.deltas.take(None if self.stopping.is_set() else time.time_ns())
            names = self.source.deltas.names_of(np.unique(flows["domain"]))
        at = 0
        try:
            while at < len(flows):
                some = flows[at : at + _AT_ONCE]
                self._post(some, names)
                at += len(some)
        except Unavailable:
            left = flows[at:]
            lost = max(0, len(left) - MOST)  # the oldest
            self.lost += lost
            with self.source.lock:
                self.source.deltas.give_back(left[lost:])
            raise

    def _post(self, flows: np.ndarray, names: Mapping[int, str]) -> None:
        now = time.time_ns()
        with self.source.lock:
            known = [self.source.process(int(f["tgid"]), int(f["start_ns"])) for f in flows]
        records = [
            record_of(flow, process, names.get(int(flow["domain"]), ""), now)
            for flow, process in zip(flows, known, strict=True)
        ]
        try:
            rejected = self.receiver.post(request_of(self.host, records))
        except Refused as error:
            log.error("%s: %d records are refused", error, len(records))
            rejected = len(records)
        rejected = min(max(rejected, 0), len(records))
        self.refused += rejected
        self.sent += len(records) - rejected
