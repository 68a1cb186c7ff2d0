"""What routing asks of a bank: union of experts a step, missed mass, experts of all prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import StudyError
from . import chance
from .choices import PADDING, choices
from .frames import (
    Array,
    Experts,
    column,
    experts_by_layer,
    frame_of,
    known_experts,
    manifest,
    names,
    tidy,
)

if TYPE_CHECKING:
    import pandas as pd

Slots = int | Mapping[int, int] | None
"""Experts of a layer that are in memory: of every layer, by layer, or None for the recording's."""


def universal_experts(
    routing: Any, theta: float = 0.5, *, phase: str | None = None, experts: Experts = None
) -> pd.DataFrame:
    """Gives the share of experts that are active in at least θ of the prompts (mlx-moe).

    A prompt is a document where the frame has a column `document`, else a sequence of a run. An
    expert is active in it if any of its tokens chose it.

    Args:
        routing: A recording, its `routing`, or what `labelled` gives.
        theta: θ, above 0, at most 1.
        phase: Only this phase; None for all, each apart.
        experts: Experts of the layers; None for what the recording says, else the highest id + 1.

    Returns:
        A row a domain, phase and layer: `prompts`, `tokens` (int64), `universal` (float64: of all
        experts), `chance` (uniform routing of prompts as long as these).

    Raises:
        SchemaError: If the frame is not as moelab writes it.
        StudyError: If θ is out of range.
    """
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta <= 1:
        raise StudyError(f"theta= is a share of the prompts, above 0 and at most 1; got {theta!r}.")
    rows = []
    for layer in choices(routing, phase=phase, experts=experts):
        _, prompt, lengths = np.unique(layer.text, return_inverse=True, return_counts=True)
        row, expert = layer.slots()
        active = np.zeros((len(lengths), layer.experts), np.bool_)
        active[prompt[row], expert] = True
        least = math.ceil(theta * len(lengths) - 1e-9)
        one = [1 - (1 - layer.top_k / layer.experts) ** int(n) for n in lengths]
        rows.append(
            {
                **layer.key,
                "prompts": len(lengths),
                "tokens": len(layer.ids),
                "universal": float((active.sum(0) >= least).mean()),
                "chance": chance.at_least(one, least),
            }
        )
    return tidy(rows, ("domain", "phase", "layer", "prompts", "tokens", "universal", "chance"))


def missed_mass(
    routing: Any, *, phase: str | None = None, capacity: Slots = None, experts: Experts = None
) -> pd.DataFrame:
    """Gives the gate weight of missed experts, summed, for each token and layer.

    Args:
        routing: As for `universal_experts`; rows of rejected drafts are left out.
        phase: As for `universal_experts`.
        capacity: Experts in memory, for `chance`; None for what the recording says.
        experts: As for `universal_experts`.

    Returns:
        A row a token and layer: `domain`, `phase`, `layer`, `run`, `sequence`, `position`,
        `missed` (float64: Σ of the gate weights of missed experts), `total` (Σ of all), `share`
        (their ratio), `chance` (a bank that knows nothing: 1 − C/E; NaN where C is not known).

    Raises:
        SchemaError: As for `universal_experts`, and if a weight is not known (NaN).
        StudyError: If `capacity` does not fit.
    """
    import pandas as pd

    columns = ["domain", "phase", "layer", "run", "sequence", "position", "missed", "total",
               "share", "chance"]  # fmt: skip
    parts = []
    layers = choices(routing, phase=phase, experts=experts, extra=("weight", "hit"))
    slots = _slots(routing, capacity, {layer.layer: layer.experts for layer in layers})
    for layer in layers:
        assert layer.weights is not None and layer.hits is not None
        missed = np.where(layer.hits, 0.0, layer.weights).sum(1)
        total = layer.weights.sum(1)
        parts.append(
            pd.DataFrame(
                {
                    **layer.key,
                    "run": layer.run.astype(np.int32),
                    "sequence": layer.sequence.astype(np.int32),
                    "position": layer.position.astype(np.int32),
                    "missed": missed,
                    "total": total,
                    "share": missed / np.where(total > 0, total, np.nan),
                    "chance": 1 - slots.get(layer.layer, math.nan) / layer.experts,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)[columns] if parts else tidy([], columns)


def regime_ratio(
    routing: Any, capacity: Slots = None, *, phase: str | None = None, experts: Experts = None
) -> pd.DataFrame:
    """Gives the union of the experts of a step ÷ capacity (arXiv 2608.07911), for each step.

    Above 1 the step's experts do not fit in memory together and are swept. Here drafts count,
    rejected or not: they asked for their experts. Padding is left out. A pass whose tokens are of
    several phases (the prompt's last with the first drafts) is a step of the earlier one.

    Args:
        routing: As for `universal_experts`.
        capacity: Experts of a layer in memory; None for what the recording says.
        phase: As for `universal_experts`.
        experts: As for `universal_experts`.

    Returns:
        A row a phase, layer, run and step: `phase`, `layer`, `run`, `step`, `tokens`, `union`,
        `capacity` (int64), `ratio` (float64), `chance` (uniform routing of so many tokens).

    Raises:
        SchemaError: As for `universal_experts`.
        StudyError: If no capacity is known, or it does not fit.
    """
    frame = frame_of(routing)
    held = {n: column(frame, n, "id") for n in ("run", "sequence", "step", "position", "layer",
                                                "expert")}  # fmt: skip
    held["phase"], phases = names(frame, "phase")
    order_of = {"prefill": 0, "decode": 1}
    code = np.array([order_of.get(name, 2 + i) for i, name in enumerate(phases)], np.int64)
    real = np.array([name != PADDING for name in phases], np.bool_)[held["phase"]]
    if not real.any():
        return tidy([], _REGIME)
    held = {name: values[real] for name, values in held.items()}
    present = sorted({phases[i] for i in np.unique(held["phase"])})
    if phase is not None and phase not in present:
        raise StudyError(
            f"There is no phase {phase!r} in the routing frame; it has {', '.join(present)}."
        )
    highest = {int(n): int(held["expert"][held["layer"] == n].max())
               for n in np.unique(held["layer"])}  # fmt: skip
    sizes = experts_by_layer(highest, experts, known_experts(routing))
    slots = _slots(routing, capacity, sizes)
    if not slots:
        raise StudyError("The recording says no capacity, so capacity= must.")
    return _regimes(held, phases, code, sizes, slots, phase)


_REGIME = ("phase", "layer", "run", "step", "tokens", "union", "capacity", "ratio", "chance")


def _regimes(
    held: Mapping[str, Array],
    phases: list[str],
    code: Array,
    sizes: Mapping[int, int],
    slots: Mapping[int, int],
    phase: str | None,
) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(dict(held)).assign(order=code[held["phase"]])
    by = ["run", "step", "layer"]
    frame["token"] = frame["sequence"] * (int(frame["position"].max()) + 1) + frame["position"]
    found = frame.groupby(by, as_index=False).agg(
        order=("order", "min"), tokens=("token", "nunique"), union=("expert", "nunique"),
        routed=("expert", "size"),
    )  # fmt: skip
    name_of = {int(c): name for c, name in zip(code, phases, strict=True)}
    found["phase"] = found["order"].map(name_of)
    found["capacity"] = found["layer"].map(slots)
    found["ratio"] = found["union"] / found["capacity"]
    number = found["layer"].map(sizes)
    k = found["routed"] / found["tokens"]
    found["chance"] = number * (1 - (1 - k / number) ** found["tokens"]) / found["capacity"]
    if phase is not None:
        found = found[found["phase"] == phase]
    found = found.sort_values(["order", "layer", "run", "step"], ignore_index=True)
    return found[list(_REGIME)]


def _slots(routing: Any, capacity: Slots, sizes: Mapping[int, int]) -> dict[int, int]:
    """Returns the slots of each layer; nothing where nobody says."""
    run = manifest(routing)
    if capacity is None:
        if "capacity" not in run:
            return {}
        told = run["capacity"]
        capacity = (
            dict(zip(run["layers"], told, strict=True)) if isinstance(told, list) else int(told)
        )
    found = (
        {n: capacity[n] for n in sizes if n in capacity}
        if isinstance(capacity, Mapping)
        else (dict.fromkeys(sizes, capacity))
    )
    lacking = [layer for layer in sizes if layer not in found]
    if lacking:
        raise StudyError(f"capacity= says nothing of layers {lacking}.")
    for layer, slots in found.items():
        whole = isinstance(slots, int | np.integer) and not isinstance(slots, bool)
        if not whole or not 1 <= slots <= sizes[layer]:
            raise StudyError(
                f"capacity= of layer {layer} must be between 1 and {sizes[layer]} (its experts), "
                f"got {slots!r}."
            )
    return found
