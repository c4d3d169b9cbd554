# SPDX-License-Identifier: MIT
"""The list of scenarios: each a function that plays on a stage."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .recorder import Recorder
from .stage import Stage

Check = Callable[[np.ndarray, Recorder, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario. ``max_loose``: records that truth may leave to one of several processes
    (multicast receivers, a handover); ``engines``: where it makes sense; ``lossy``: records are
    lost on purpose; ``check``: what else must be true, as a list of faults."""

    name: str
    play: Callable[[Stage], None]
    max_loose: int = 0
    engines: tuple[str, ...] = ("module", "packet")
    lossy: bool = False
    check: Check | None = None

    @property
    def title(self) -> str:
        return (self.play.__doc__ or self.name).strip().splitlines()[0]


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    max_loose: int = 0,
    engines: tuple[str, ...] = ("module", "packet"),
    lossy: bool = False,
    check: Check | None = None,
) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Register the function as the scenario of its name."""

    def register(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
        name = play.__name__
        if name in SCENARIOS:
            raise ValueError(f"two scenarios are called {name}")
        SCENARIOS[name] = Scenario(name, play, max_loose, engines, lossy, check)
        return play

    return register


def load() -> dict[str, Scenario]:
    """All scenarios, in the order of their files and lines."""
    from . import scenarios

    for module in sorted(pkgutil.iter_modules(scenarios.__path__), key=lambda m: m.name):
        importlib.import_module(f"{scenarios.__name__}.{module.name}")
    return SCENARIOS
