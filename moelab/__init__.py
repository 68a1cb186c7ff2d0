"""moelab: run a Mixture-of-Experts model with part of its experts in memory, and see what it costs.

The public names are imported when first used, so that `import moelab` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import use_openblas
    from .errors import (
        AttachedError,
        CapacityError,
        CheckpointError,
        ClosedError,
        MoelabError,
        NotYetError,
    )
    from .lab import Lab
    from .loading import load
    from .oneshot import Session, generate, release, stream_generate
    from .routing.recording import Recording, read_recording

__version__ = "0.1.0"

_HOME = {
    "AttachedError": "errors",
    "CapacityError": "errors",
    "CheckpointError": "errors",
    "ClosedError": "errors",
    "MoelabError": "errors",
    "NotYetError": "errors",
    "Lab": "lab",
    "load": "loading",
    "Session": "oneshot",
    "generate": "oneshot",
    "release": "oneshot",
    "stream_generate": "oneshot",
    "Recording": "routing.recording",
    "read_recording": "routing.recording",
    "use_openblas": "backend",
}

__all__ = [
    "AttachedError",
    "CapacityError",
    "CheckpointError",
    "ClosedError",
    "Lab",
    "MoelabError",
    "NotYetError",
    "Recording",
    "Session",
    "generate",
    "load",
    "read_recording",
    "release",
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
