# SPDX-License-Identifier: MIT
"""Posts findings as JSON. An unreachable receiver costs bounded time and memory."""

from __future__ import annotations

import http.client
import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Self
from urllib.parse import urlsplit

from nlproto.errors import UsageError

__all__ = ["Webhook"]

_QUEUE = 1000
_TIMEOUT_S = 5.0
_PAUSES_S = (0.2, 1.0, 3.0)
"""Seconds before the second try, the third, the last."""
_FINISH_S = 5.0
_END: Mapping[str, Any] = {}


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: a finding goes only where the user said."""

    def redirect_request(self, *_: Any) -> None:
        return None


_open = urllib.request.build_opener(_Stay).open


class Webhook:
    """A thread that POSTs each finding to `url`. A context manager.

    A finding without room, or not taken in four tries, is counted and reported. Raises UsageError
    if `url` is no http or https address.
    """

    def __init__(self, url: str, notify: Callable[[str], None]) -> None:
        try:
            parts = urlsplit(url)
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            fits = False
        if not fits or any(not "!" <= character <= "~" for character in url):
            raise UsageError("--webhook is an address, as in https://hooks.example.org/net")
        self._url = url
        self._host = parts.hostname
        self._notify = notify
        self._queue: queue.Queue[Mapping[str, Any]] = queue.Queue(_QUEUE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._post_all, name="webhook", daemon=True)
        self._told = False
        self.failed = 0
        """How many findings nobody took."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()

    def put(self, finding: Mapping[str, Any]) -> None:
        """Post it soon."""
        try:
            self._queue.put_nowait(finding)
        except queue.Full:
            self._fail("too many wait")

    def finish(self) -> bool:
        """Wait, for a limited time, until all is posted. Returns whether all was taken."""
        try:
            self._queue.put(_END, timeout=_FINISH_S)
        except queue.Full:
            pass
        self._thread.join(_FINISH_S)
        self._stopping.set()
        left = self._queue.qsize() if self._thread.is_alive() else 0
        if self.failed + left:
            self._notify(f"webhook {self._host}: {self.failed + left:,} findings were not taken")
        return not self.failed + left

    def _post_all(self) -> None:
        while (finding := self._queue.get()) is not _END:
            body = json.dumps(finding).encode()
            for pause in (*_PAUSES_S, 0.0):
                error = self._post(body)
                if not error:
                    self._told = False
                    break
                if self._stopping.wait(pause):
                    return
            else:
                self._fail(error)

    def _post(self, body: bytes) -> str:
        """Return why it was not taken; "" if it was."""
        headers = {"Content-Type": "application/json", "User-Agent": "packet-hunter"}
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with _open(request, timeout=_TIMEOUT_S):
                return ""
        except urllib.error.HTTPError as error:
            error.close()
            return f"answers {error.code}"
        except urllib.error.URLError as error:
            return str(error.reason)
        except (OSError, ValueError, http.client.HTTPException) as error:
            return str(error) or type(error).__name__

    def _fail(self, why: str) -> None:
        self.failed += 1
        if not self._told:
            self._told = True
            self._notify(f"webhook {self._host}: {why}; the finding is not taken")
