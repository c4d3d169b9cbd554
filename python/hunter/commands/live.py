# SPDX-License-Identifier: MIT
"""The main command: packets from a source to the terminal, a file, or both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np

from hunter.child.command import Command
from hunter.cli.choice import filter_of
from hunter.cli.options import LiveOptions
from hunter.cli.signals import Stop
from hunter.commands.living import absent
from hunter.save.capturefile import CaptureFile
from hunter.save.save_lines import LINES, LineSaver
from hunter.save.saving import Rotation, Saver, format_of, open_saver, refuse_input
from hunter.show.account import ShownAccount
from hunter.show.columns import columns_of_batch
from hunter.show.lines import LinePrinter, Style
from hunter.show.names import HostNames
from hunter.show.summary import Summary
from hunter.sources.opening import open_source
from hunter.sources.source import Source
from nlproto import Error, UsageError
from nlproto.host import netns
from nlproto.records.batch import NamedBatch

__all__ = ["run"]

_POLL = 0.1  # s within which a signal or the end of a command is noticed


class _Tables:
    """Gives batches to a saver."""

    def __init__(self, saver: Saver, source: Source) -> None:
        self._saver = saver
        self._source = source

    def add(self, batch: NamedBatch) -> None:
        self._saver.add(columns_of_batch(batch, self._source, self._source.holders))


def run(
    options: LiveOptions,
    stop: Stop,
    notify: Callable[[str], None],
) -> int:
    """Show and save until `stop`, -c, --duration or the end of the command behind "--".

    Returns the command's exit code if it ended by itself, else 0. `notify` gets lines for people
    (stderr). Raises Error, BrokenPipeError.
    """
    wanted = filter_of(options.choice)
    shown = ShownAccount()
    with ExitStack() as stack:
        kind = format_of(options.save, options.format) if options.save else ""
        if options.process_blocks and kind != "pcapng":
            raise UsageError("--process-blocks are for pcapng: give --save x.pcapng too")
        refuse_input(options.save or "-", options.origin.read or ())
        # open the source first: if it cannot begin, an old capture is not emptied
        source = stack.enter_context(
            open_source(
                options.origin, options.choice, wanted, notify, first_bytes=kind == "pcapng"
            )
        )
        savers: dict[str, Saver] = {}
        rotation: Rotation | None = None
        if options.save:
            savers[options.save] = rotation = open_saver(
                options.save,
                kind,
                source.first_bytes,
                options.rotate,
                options.keep,
                options.process_blocks,
            )
            stack.callback(rotation.close)
        if options.json:
            savers["standard output"] = LineSaver(CaptureFile("-"), LINES["jsonl"])
        counts: list[Callable[[NamedBatch], None]] = [shown.add]
        takes: list[Callable[[NamedBatch], None]] = [
            _Tables(saver, source).add for saver in savers.values()
        ]
        outputs: dict[str, Saver | LinePrinter] = {**savers}
        if options.print or not (options.save or options.summary or options.json):
            names = stack.enter_context(HostNames())
            own = None if options.origin.read else netns.own()
            style = Style(options.numbers, options.quiet > 0, options.verbose, options.times, own)
            printer = LinePrinter(style, source, source.holders, names)
            outputs["standard output"] = printer
            takes.append(printer.add)
        summary = Summary() if options.summary else None
        if summary is not None:
            counts.append(summary.add)
        silent = options.quiet > 1
        if not silent:
            notify(_greeting(source, options))
        for line in [] if options.origin.read else absent(wanted):
            notify(line)
        reopening = _Reopening(stop, rotation)
        try:
            try:
                return _flow(source, counts, takes, shown, options, reopening, notify)
            finally:
                for saver in savers.values():
                    saver.close()  # a Parquet file is complete only now
        except BrokenPipeError:
            outputs.clear()  # nobody wants them
            raise
        finally:
            account = source.account()
            missing = {name: shown.records - one.rows for name, one in outputs.items()}
            failed = any(missing.values())
            lost = source.lost() or any((account or {}).get("lost", {}).values())
            if not silent or lost or failed:
                done = "shown"
                if options.save and not (options.print or options.json):
                    done = "to be saved" if failed else "saved"
                for line in shown.lines(account, source.lost(), done, missing):
                    notify(line)
            if summary is not None:
                summary.show(source, _output_is_free(options))
            for saver in savers.values():
                if note := getattr(saver, "note", ""):
                    notify(note)


class _Reopening:
    """Decides between two reads of the source: to end, or to go on in a new file."""

    def __init__(self, stop: Stop, saver: Rotation | None) -> None:
        self._stop = stop
        self._saver = saver

    def asked(self) -> bool:
        """Return whether to end. Raises Error if the new file cannot be made."""
        if self._stop.takes_reopen() and self._saver is not None:
            self._saver.reopen()
        return bool(self._stop)


def _output_is_free(options: LiveOptions) -> bool:
    """Return whether standard output is free for the table."""
    return not (options.print or options.json or options.save == "-")


def _greeting(source: Source, options: LiveOptions) -> str:
    where = f"saving to {options.save}" if options.save else "showing"
    if options.summary and not options.save and _output_is_free(options):
        where = "adding up"
    return f"{where} ({source.description}); Ctrl-C ends"


def _flow(
    source: Source,
    counts: Sequence[Callable[[NamedBatch], None]],
    takes: list[Callable[[NamedBatch], None]],
    shown: ShownAccount,
    options: LiveOptions,
    stop: _Reopening,
    notify: Callable[[str], None],
) -> int:
    command: Command | None = None

    def give(batches: Sequence[NamedBatch]) -> bool:
        """Hand batches on; return whether -c is reached. After a failure only count."""
        failure: Error | OSError | None = None
        for batch in batches:
            if options.argv and not options.all:
                own = np.zeros(len(batch.records), bool)  # it failed to start
                if command is not None:
                    own = command.own(batch.records, source)
                shown.pass_over(batch.records[~own])
                batch = NamedBatch(batch.head, batch.records[own], batch.clock)
            if options.count is not None and shown.records + len(batch.records) >= options.count:
                left = options.count - shown.records
                batch = NamedBatch(batch.head, batch.records[:left], batch.clock)
            if len(batch.records):
                for count in counts:
                    count(batch)
                try:
                    for take in takes:
                        take(batch)
                except BrokenPipeError:
                    raise
                except (Error, OSError) as error:
                    failure = error
                    takes.clear()
            if options.count is not None and shown.records >= options.count:
                break
        if failure is not None:
            raise failure
        return options.count is not None and shown.records >= options.count

    full = False
    code = 0
    try:
        command = Command(options.argv, notify, not options.all) if options.argv else None
        try:
            until = None if options.duration is None else time.monotonic() + options.duration
            while not stop.asked():
                left = _POLL if until is None else min(_POLL, until - time.monotonic())
                if left <= 0:
                    break
                batches = source.read(left)
                if batches is None or (full := give(batches)):
                    break
                if command is not None and command.ended:
                    code = command.exit_code
                    break
        finally:
            if command is not None:
                command.end()
    except BrokenPipeError:
        full = True  # nobody reads on: do not show the rest
        raise
    finally:
        rest = source.finish()
        if not full:
            give(rest)
        if command is not None:
            command.close()
    return code
