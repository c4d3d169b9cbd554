# SPDX-License-Identifier: MIT
"""The main command: packets from a source to the terminal, a file, or both."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Protocol

from hunter.account import Shown
from hunter.arguments import filter_of
from hunter.capturefile import CaptureFile
from hunter.columns import columns
from hunter.lines import LinePrinter, Style
from hunter.names import Names
from hunter.save_jsonl import JsonSaver
from hunter.saving import Saver, format_of, open_saver
from hunter.source import Source, open_source
from hunter.summary import Summary
from nlproto import Error, netns
from nlproto.pipeline import NamedBatch

__all__ = ["Stop", "run"]

_POLL = 0.1  # s, how soon a signal or the end of a command is noticed


class Stop(Protocol):
    """Whether to end (hunter.signals.Stop)."""

    def __bool__(self) -> bool: ...


class _Tables:
    """Gives batches to a saver."""

    def __init__(self, saver: Saver, source: Source) -> None:
        self._saver = saver
        self._source = source

    def add(self, batch: NamedBatch) -> None:
        self._saver.add(columns(batch, self._source, self._source.holders))


def run(
    options: argparse.Namespace,
    argv: Sequence[str],
    stop: Stop,
    notify: Callable[[str], None],
) -> None:
    """Show and save until `stop`, -c, --duration or the end of the command `argv`.

    `notify` gets lines for people (stderr). Raises Error, BrokenPipeError.
    """
    wanted = filter_of(options)
    shown = Shown()
    with ExitStack() as stack:
        kind = options.kind = format_of(options.save, options.format) if options.save else ""
        # the source first: an old capture is not emptied for one that cannot begin
        source = stack.enter_context(open_source(options, wanted, notify))
        saver = None
        if options.save:
            saver = open_saver(options.save, kind, source.snaps, options.rotate, options.keep)
            stack.callback(saver.close)
        takes: list[Callable[[NamedBatch], None]] = [shown.add]
        if saver is not None:
            takes.append(_Tables(saver, source).add)
        if options.json:
            takes.append(_Tables(JsonSaver(CaptureFile("-")), source).add)
        elif options.print or not options.save:
            names = stack.enter_context(Names())
            style = Style(
                options.numbers,
                options.quiet,
                options.verbose,
                options.times,
                not options.read,
                netns.own(),
            )
            takes.append(LinePrinter(style, source, source.holders, names).add)
        summary = Summary() if options.summary else None
        if summary is not None:
            takes.append(summary.add)
        notify(_greeting(source, options))
        try:
            _flow(source, takes, shown, options, argv, stop, notify)
        finally:
            if summary is not None:
                summary.show(source)
            for line in shown.lines(source.account(), source.lost()):
                notify(line)


def _greeting(source: Source, options: argparse.Namespace) -> str:
    where = f"saving to {options.save}" if options.save else "showing"
    return f"{where} ({source.description}); Ctrl-C ends"


def _flow(
    source: Source,
    takes: Sequence[Callable[[NamedBatch], None]],
    shown: Shown,
    options: argparse.Namespace,
    argv: Sequence[str],
    stop: Stop,
    notify: Callable[[str], None],
) -> None:
    def give(batches: Sequence[NamedBatch]) -> bool:
        """Hand batches on; whether -c is reached."""
        for batch in batches:
            if options.count is not None and shown.records + len(batch.records) >= options.count:
                left = options.count - shown.records
                batch = NamedBatch(batch.head, batch.records[:left], batch.clock)
            if len(batch.records):
                for take in takes:
                    take(batch)
            if options.count is not None and shown.records >= options.count:
                return True
        return False

    full = False
    try:
        command = _start(argv) if argv else None
        try:
            until = None if options.duration is None else time.monotonic() + options.duration
            while not stop:
                left = _POLL if until is None else min(_POLL, until - time.monotonic())
                if left <= 0:
                    break
                batches = source.read(left)
                if batches is None or (full := give(batches)):
                    break
                if command is not None and command.poll() is not None:
                    break
        finally:
            if command is not None:
                _end(command, notify)
    except BrokenPipeError:
        full = True  # nobody reads on: the rest need not be shown
        raise
    finally:
        rest = source.finish()
        if not full:
            give(rest)


def _start(argv: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(argv)
    except OSError as error:
        raise Error(f"cannot run {argv[0]}: {error.strerror}; is it installed?") from None


def _end(command: subprocess.Popen[bytes], notify: Callable[[str], None]) -> None:
    if command.poll() is None:
        command.terminate()
        try:
            command.wait(3)
        except subprocess.TimeoutExpired:
            command.kill()
            command.wait()
    elif command.returncode:
        what = f"exit code {command.returncode}"
        if command.returncode < 0:
            what = f"signal {-command.returncode}"
        notify(f"the command ended with {what}")
