# SPDX-License-Identifier: MIT
"""Plays scenarios, scores each, and prints one line for it: `python -m attribution.run`.

Exit status 0 when every scenario is exact (module) or was scored (packet, whose accuracy is
only reported). 1 when not, 2 on bad usage. Root only: it makes network namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlproto.errors import Error
from nlproto.records.wire import how_name

from . import truth
from .busy import busy
from .catalog import Scenario, load
from .recorder import Recorder, forget_ebpf
from .score import score
from .stage import CLONE_NEWNET, Stage, Unable, Wire, call, loopback_up, rename
from .workers import BINARIES, compile_workers

SECONDS = 500.0  # then the stage hangs; 150 s may be too short beside other machines, it took 83 s


def play(scenario: Scenario, stage: Stage) -> dict[str, Any]:
    """Play on the stage, in its own process; returns the last message to the runner."""
    try:
        scenario.play(stage)
    except Unable as error:
        return {"unable": str(error)}
    except Exception:
        return {"error": traceback.format_exc()}
    return {"done": True}


def stage_process(
    scenario: Scenario, directory: Path, end: socket.socket, module: str | None, binaries: Path,
    scale: float,
) -> None:  # fmt: skip
    """Body of the process that is the stage; never returns."""
    status = 1
    try:
        rename("stage")
        call("unshare", CLONE_NEWNET)
        loopback_up()
        wire = Wire(end)
        with Stage(directory, wire, module, binaries, scale) as stage:
            wire.tell(play(scenario, stage))
            wire.hear()
        status = 0
    except BaseException:  # noqa: B036 - a forked process must not return into the runner
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def reload_module(path: str) -> None:
    """Unload the module and load it again."""
    subprocess.run(["rmmod", "sniffer"], check=True, timeout=60)
    subprocess.run(["insmod", path], check=True, timeout=60)


def perform(
    scenario: Scenario,
    engine: str,
    binaries: Path,
    module: str | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Play one scenario with an engine attached; returns score, account and faults.

    ``faults`` is empty when every record is right and every sum holds. ``unable`` says why this
    machine cannot play it; ``unplayed`` is true when the scenario broke, so that nothing is known.
    """
    started = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="attribution."))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        stage_process(scenario, directory, theirs, module, binaries, scale)
    theirs.close()
    wire = Wire(ours)
    result: dict[str, Any] = {"name": scenario.name, "engine": engine, "title": scenario.title}
    try:
        result.update(_follow(scenario, engine, module, wire, pid, directory))
    except (EOFError, TimeoutError) as error:
        result.update(unplayed=True, faults=[f"the stage is gone: {error!r}"])
    finally:
        ours.close()
        _reap(pid)
        if not result.get("faults"):
            shutil.rmtree(directory, ignore_errors=True)
        else:
            result["kept"] = str(directory)
    result["seconds"] = round(time.monotonic() - started, 2)
    return result


def _reap(pid: int) -> None:
    for _ in range(100):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)


def _follow(
    scenario: Scenario, engine: str, module: str | None, wire: Wire, pid: int, directory: Path
) -> dict[str, Any]:
    namespaces: set[int] = set()
    recorder: Recorder | None = None
    deadline = time.monotonic() + SECONDS
    try:
        while True:
            if time.monotonic() > deadline:
                return {"faults": [f"no end after {SECONDS:.0f} s"]}
            reading = recorder is not None and not scenario.lossy
            if recorder is not None and reading:
                recorder.read(0.01)
            ready = select.select([wire.end], [], [], 0 if reading else 1)[0]
            if not ready:
                continue
            message = wire.hear()
            if "attach" in message:
                namespaces |= {os.stat(f"/proc/{pid}/ns/net").st_ino}
                namespaces |= {os.stat(path).st_ino for path in message["attach"]}
                recorder = Recorder(engine)
                recorder.__enter__()
                recorder.await_links(namespaces)
                if scenario.lossy:
                    recorder.starve()
                wire.tell()
            elif "reload" in message:
                if engine == "ebpf":
                    forget_ebpf(recorder)
                elif module is not None:
                    reload_module(module)
                wire.tell()
            elif "unable" in message:
                wire.tell()
                return {"unable": message["unable"]}
            elif "error" in message:
                wire.tell()
                fault = "the scenario itself failed: " + message["error"]
                return {"unplayed": True, "faults": [fault]}
            else:
                assert recorder is not None, "the scenario never attached"
                return _judge(scenario, engine, recorder, wire, namespaces, directory)
    finally:
        if recorder is not None:
            recorder.__exit__(None, None, None)


def _judge(
    scenario: Scenario, engine: str, recorder: Recorder, wire: Wire, namespaces: set[int],
    directory: Path,
) -> dict[str, Any]:  # fmt: skip
    everything = recorder.finish()
    faults = recorder.faults(everything, scenario.lossy)
    wire.tell()
    claims = truth.load(directory / "truth")
    namespaces |= {claim.netns for claim in claims}
    records = everything[[int(netns) in namespaces for netns in everything["netns"]]]
    # Engine packet reads names from /proc, later: only who, not under which name, is held
    # against it.
    result = score(
        records,
        claims,
        how_name,
        comm=engine != "packet",
        counts=not scenario.lossy,
        asks_later=engine == "packet",
    )
    checks = [] if scenario.check is None else scenario.check(records, recorder, directory)
    return {
        **result.as_dict(),
        "account": recorder.summary(),
        "faults": faults + result.faults(scenario.max_loose) + checks,
    }


def line(result: dict[str, Any]) -> str:
    """One scenario for people."""
    name = result["name"]
    if "unable" in result:
        return f"{name:32} SKIP  {result['unable']}"
    verdict = "FAIL" if result["faults"] else "ok"
    if "packets" not in result:
        return f"{name:32} {verdict:5} {'; '.join(result['faults'])}"
    unnamed = " ".join(f"{k} {v}" for k, v in result["unnamed"].items()) or "0"
    rightly = " ".join(f"{k} {v}" for k, v in result["rightly_unnamed"].items())
    return (
        f"{name:32} {verdict:5} packets {result['packets']:5} right {result['right']:5} "
        f"wrong {result['wrong']:3} unnamed {unnamed}"
        + (f" rightly unnamed {rightly}" if rightly else "")
        + f"  ({result['seconds']} s)"
    )


def total(results: list[dict[str, Any]]) -> dict[str, int]:
    """Sums over scenarios."""
    played = [r for r in results if "packets" in r]
    return {
        "scenarios": len(played),
        "failed": sum(bool(r.get("faults")) for r in results),
        "unable": sum("unable" in r for r in results),
        "packets": sum(r["packets"] for r in played),
        "right": sum(r["right"] for r in played),
        "wrong": sum(r["wrong"] for r in played),
        "wrong_told": sum(r["wrong_told"] for r in played),
        "wrong_reason": sum(r["wrong_reason"] for r in played),
        "unnamed": sum(sum(r["unnamed"].values()) for r in played),
        "rightly_unnamed": sum(sum(r["rightly_unnamed"].values()) for r in played),
    }


def report(result: dict[str, Any], say: Callable[..., None]) -> None:
    """Print one result, with what is wrong with it."""
    say(line(result), flush=True)
    if "packets" in result:
        for text in (*result["faults"], *result["examples"]):
            say(f"    {text}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="attribution.run", description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("module", "ebpf", "packet"), required=True)
    parser.add_argument("--only", action="append", metavar="NAME", help="may be repeated")
    parser.add_argument("--repeat", type=int, default=1, metavar="N")
    parser.add_argument("--load", action="store_true", help="two busy processes a CPU meanwhile")
    parser.add_argument("--scale", type=float, default=1.0, help="of the big scenarios, 0..1")
    parser.add_argument("--module", metavar="KO", help="sniffer.ko, for scenarios that reload it")
    parser.add_argument("--binaries", type=Path, default=BINARIES, help="of the C workers")
    parser.add_argument("--json", type=Path, metavar="OUT", help="all results, '-' for stdout")
    parser.add_argument("--list", action="store_true", help="names and titles, then exit")
    return parser.parse_args()


def main() -> int:
    """Command line."""
    arguments = _arguments()
    scenarios = load()
    if arguments.list:
        for scenario in scenarios.values():
            print(f"{scenario.name:32} {scenario.title}")
        return 0
    unknown = set(arguments.only or ()) - set(scenarios)
    if unknown:
        print(f"no such scenario: {', '.join(sorted(unknown))} (see --list)", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("attribution needs root: it makes network namespaces", file=sys.stderr)
        return 1
    say: Callable[..., None] = print
    if arguments.json == Path("-"):
        say = lambda *words, **options: print(*words, **{**options, "file": sys.stderr})  # noqa: E731
    binaries = compile_workers(arguments.binaries)
    results: list[dict[str, Any]] = []
    try:
        with busy(2 if arguments.load else 0):
            for round_number in range(arguments.repeat):
                for name in arguments.only or scenarios:
                    scenario = scenarios[name]
                    asked = "module" if arguments.engine == "ebpf" else arguments.engine
                    # its ring is too large to be starved here: tests/host/test_engine_ebpf.py
                    if asked not in scenario.engines or (
                        asked != arguments.engine
                        and (scenario.lossy or name.startswith("late_reader_"))
                    ):
                        continue
                    result = perform(
                        scenario, arguments.engine, binaries, arguments.module, arguments.scale
                    )
                    results.append({**result, "round": round_number})
                    report(result, say)
    except Error as error:
        print(error, file=sys.stderr)
        return 1
    sums = total(results)
    say(" ".join(f"{name} {value}" for name, value in sums.items()))
    if arguments.json:
        text = json.dumps({"total": sums, "results": results}, indent=1)
        if arguments.json == Path("-"):
            print(text)
        else:
            arguments.json.write_text(text)
    broken = [r for r in results if r.get("faults")]
    if arguments.engine == "packet":
        broken = [r for r in broken if "packets" not in r]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
