"""moelab: run a Mixture-of-Experts model with part of its experts in memory, and see what it costs.

The public names are imported when first used, so that `import moelab` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import use_openblas
    from .checkpoint.pack import pack
    from .discovery import discover
    from .errors import (
        AttachedError,
        CapacityError,
        CheckpointError,
        ClosedError,
        MissActionError,
        MoelabError,
        NotYetError,
        PinsError,
        PolicyError,
        ProfileError,
        ReplayError,
        SchemaError,
        StudyError,
    )
    from .experts.pins import Pins
    from .experts.policies import policies
    from .experts.profile import Profile
    from .experts.profile_file import read_profile
    from .experts.spread import spread_capacity
    from .lab import Lab
    from .loading import load
    from .oneshot import Session, generate, release, stream_generate
    from .planning import Plan, plan
    from .profiling import profile
    from .routing.recording import Recording, read_recording
    from .routing.replay import Replay, replay

__version__ = "0.1.0"

_HOME = {
    "discover": "discovery",
    "AttachedError": "errors",
    "CapacityError": "errors",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "MissActionError": "errors",
    "MoelabError": "errors",
    "NotYetError": "errors",
    "PinsError": "errors",
    "PolicyError": "errors",
    "ProfileError": "errors",
    "ReplayError": "errors",
    "SchemaError": "errors",
    "StudyError": "errors",
    "Pins": "experts.pins",
    "policies": "experts.policies",
    "Profile": "experts.profile",
    "read_profile": "experts.profile_file",
    "spread_capacity": "experts.spread",
    "Lab": "lab",
    "load": "loading",
    "pack": "checkpoint.pack",
    "Session": "oneshot",
    "generate": "oneshot",
    "release": "oneshot",
    "stream_generate": "oneshot",
    "Plan": "planning",
    "plan": "planning",
    "profile": "profiling",
    "Recording": "routing.recording",
    "read_recording": "routing.recording",
    "Replay": "routing.replay",
    "replay": "routing.replay",
    "use_openblas": "backend",
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
    "Pins",
    "PinsError",
    "Plan",
    "PolicyError",
    "Profile",
    "ProfileError",
    "Recording",
    "Replay",
    "ReplayError",
    "SchemaError",
    "Session",
    "StudyError",
    "discover",
    "generate",
    "load",
    "pack",
    "plan",
    "policies",
    "profile",
    "read_profile",
    "read_recording",
    "release",
    "replay",
    "spread_capacity",
    "stream_generate",
    "use_openblas",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moelab' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
