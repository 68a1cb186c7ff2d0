"""moelab: run a Mixture-of-Experts model with part of its experts in memory, and see what it costs.

The public names are imported when first used, so that `import moelab` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import metrics, plots, widgets
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
    from .quality.compare import compare, noise_floor
    from .quality.comparison import Comparison
    from .quality.generation import compare_generation
    from .quality.recorded import RecordedTexts, record_texts
    from .quality.tasks import Task, run_tasks
    from .routing.curves import Curves, curves
    from .routing.gaps import belady_gap, skew_and_recency
    from .routing.policies import policy_table
    from .routing.recording import Recording, read_recording
    from .routing.recovery import recover
    from .routing.replay import Replay, replay
    from .routing.trace import export_trace, read_trace
    from .study.calibration import Calibration, calibrate
    from .study.cliff import Cliff, cliff
    from .study.comparators import comparators
    from .study.forecast import Forecast, forecast
    from .study.pin_transfer import PinTransfer, pin_transfer
    from .study.price_model import fit_prices
    from .study.price_policy import PricePolicy, compare_policies
    from .study.price_results import Prices
    from .study.prices import price_misses
    from .study.statements import best_set, capacities_within, capacity_within
    from .study.sweep import Sweep, sweep

__version__ = "0.1.0"

_MODULES = ("metrics", "plots", "widgets")

_HOME = {
    "use_openblas": "backend",
    "pack": "checkpoint.pack",
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
    "Session": "oneshot",
    "generate": "oneshot",
    "release": "oneshot",
    "stream_generate": "oneshot",
    "Plan": "planning",
    "plan": "planning",
    "profile": "profiling",
    "compare": "quality.compare",
    "noise_floor": "quality.compare",
    "Comparison": "quality.comparison",
    "compare_generation": "quality.generation",
    "RecordedTexts": "quality.recorded",
    "record_texts": "quality.recorded",
    "Task": "quality.tasks",
    "run_tasks": "quality.tasks",
    "Curves": "routing.curves",
    "curves": "routing.curves",
    "belady_gap": "routing.gaps",
    "skew_and_recency": "routing.gaps",
    "policy_table": "routing.policies",
    "Recording": "routing.recording",
    "read_recording": "routing.recording",
    "recover": "routing.recovery",
    "Replay": "routing.replay",
    "replay": "routing.replay",
    "export_trace": "routing.trace",
    "read_trace": "routing.trace",
    "Calibration": "study.calibration",
    "calibrate": "study.calibration",
    "Cliff": "study.cliff",
    "cliff": "study.cliff",
    "comparators": "study.comparators",
    "Forecast": "study.forecast",
    "forecast": "study.forecast",
    "PinTransfer": "study.pin_transfer",
    "pin_transfer": "study.pin_transfer",
    "fit_prices": "study.price_model",
    "PricePolicy": "study.price_policy",
    "compare_policies": "study.price_policy",
    "Prices": "study.price_results",
    "price_misses": "study.prices",
    "best_set": "study.statements",
    "capacities_within": "study.statements",
    "capacity_within": "study.statements",
    "Sweep": "study.sweep",
    "sweep": "study.sweep",
}

__all__ = [
    "AttachedError",
    "Calibration",
    "CapacityError",
    "CheckpointError",
    "Cliff",
    "ClosedError",
    "Comparison",
    "Curves",
    "Forecast",
    "Lab",
    "MissActionError",
    "MoelabError",
    "NotYetError",
    "PinTransfer",
    "Pins",
    "PinsError",
    "Plan",
    "PolicyError",
    "PricePolicy",
    "Prices",
    "Profile",
    "ProfileError",
    "RecordedTexts",
    "Recording",
    "Replay",
    "ReplayError",
    "SchemaError",
    "Session",
    "StudyError",
    "Sweep",
    "Task",
    "belady_gap",
    "best_set",
    "calibrate",
    "capacities_within",
    "capacity_within",
    "cliff",
    "comparators",
    "compare",
    "compare_generation",
    "compare_policies",
    "curves",
    "discover",
    "export_trace",
    "fit_prices",
    "forecast",
    "generate",
    "load",
    "metrics",
    "noise_floor",
    "pack",
    "pin_transfer",
    "plan",
    "plots",
    "policies",
    "policy_table",
    "price_misses",
    "profile",
    "read_profile",
    "read_recording",
    "read_trace",
    "record_texts",
    "recover",
    "release",
    "replay",
    "run_tasks",
    "skew_and_recency",
    "spread_capacity",
    "stream_generate",
    "sweep",
    "use_openblas",
    "widgets",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'moelab' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
