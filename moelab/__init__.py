"""moelab: run a Mixture-of-Experts model with part of its experts in memory, and see what it costs.

The public names are imported when first used, so that `import moelab` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import (
        AttachedError,
        CapacityError,
        CheckpointError,
        ClosedError,
        MissActionError,
        MoelabError,
        NotYetError,
        PolicyError,
        ReplayError,
    )
    from .experts.policies import policies
    from .experts.spread import spread_capacity
    from .lab import Lab
    from .loading import load
    from .oneshot import Session, generate, release, stream_generate
    from .planning import Plan, plan
    from .routing.recording import Recording, read_recording
    from .routing.replay import Replay, replay

__version__ = "0.1.0"

_HOME = {
    "AttachedError": "errors",
    "CapacityError": "errors",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "MissActionError": "errors",
    "MoelabError": "errors",
    "NotYetError": "errors",
    "PolicyError": "errors",
    "ReplayError": "errors",
    "spread_capacity": "experts.spread",
    "Lab": "lab",
    "load": "loading",
    "Session": "oneshot",
    "generate": "oneshot",
    "release": "oneshot",
    "stream_generate": "oneshot",
    "Plan": "planning",
    "plan": "planning",
    "Recording": "routing.recording",
    "read_recording": "routing.recording",
    "policies": "experts.policies",
    "Replay": "routing.replay",
    "replay": "routing.replay",
}

__all__ = [
    "AttachedError",
    "CapacityError",
    "CheckpointError",
    "ClosedError",
    "Lab",
    "MissActionError",
    "MoelabError",
    "NotYetError",
    "Plan",
    "PolicyError",
    "Recording",
    "Replay",
    "ReplayError",
    "Session",
    "generate",
    "load",
    "plan",
    "policies",
    "read_recording",
    "release",
    "replay",
    "spread_capacity",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moelab' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
