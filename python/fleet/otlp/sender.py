# SPDX-License-Identifier: MIT
"""Posts what the daemon's flows did to an OTLP/HTTP receiver, and says what it did not take.

A receiver that is away or busy is asked again. Meanwhile sums of each flow wait in memory, at most
MOST of them; what is beyond is lost and counted. Nothing is kept on disk: for that there is
fleet.export.
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
"""Flows that wait for a receiver."""
_AT_ONCE = 500  # records in a request
_TIMEOUT = 10.0  # s
_AGAIN = (429, 502, 503, 504)
"""What OTLP/HTTP calls retryable."""
_ANSWER = 1 << 16

log = logging.getLogger(__name__)


class Unavailable(Error):
    """The receiver takes nothing now."""


class Refused(Error):
    """The receiver will not take this, now or later."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would become a GET without its records."""

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
    """Where records go. `headers`: what each request has beside its own, as a key."""

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
    """What a partial success leaves out; an answer that says nothing means all was taken."""
    try:
        told = json.loads(answer or b"{}")
        return int(told.get("partialSuccess", {}).get("rejectedLogRecords", 0))
    except (ValueError, AttributeError, TypeError, RecursionError):
        return 0


@dataclass(slots=True)
class Sender:
    """Runs until stop(). Rows taken = `sent` + `refused` + `lost` + those that wait."""

    source: FlowSource
    receiver: Receiver
    host: str
    interval: float
    """Seconds: what a flow did in so many is one record."""
    stopping: threading.Event
    sent: int = 0
    refused: int = 0
    """Records that the receiver would not take."""
    lost: int = 0
    """That did not fit into memory, or were left at the end."""

    def run(self) -> None:
        """Send. Raises Error when the daemon refuses us."""
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
        """Send what waits. Raises Unavailable; then it waits on."""
        with self.source.lock:
            flows = self.source.deltas.take()
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
