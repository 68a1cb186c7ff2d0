"""Recordings made up for tests, with a manifest, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from moelab.routing.columns import SCHEMA, typed
from moelab.routing.recording import Recording

LAYERS = (1, 3, 4)


def manifest(experts: int, top_k: int, layers: Sequence[int] = LAYERS) -> dict[str, Any]:
    """What a recording of a made-up model says of itself."""
    return {
        "model": "made up",
        "model_type": "olmoe",
        "fingerprint": "sha256:abc",
        "layers": list(layers),
        "experts": [experts] * len(layers),
        "top_k": [top_k] * len(layers),
        "capacity": experts // 2,
        "on_miss": "load",
        "pins": {str(layer): [] for layer in layers},
        "initial_bank": {str(layer): [] for layer in layers},
        "started": "2026-01-02T03:04:05+00:00",
    }


def routing(
    prompts: Sequence[int],
    decoded: Sequence[int],
    experts: int = 12,
    top_k: int = 3,
    layers: Sequence[int] = LAYERS,
    seed: int = 0,
) -> pd.DataFrame:
    """A routing frame: a run for each prompt, read in one step, then tokens one by one.

    Args:
        prompts: Tokens of each run's prompt.
        decoded: Tokens after it.
        experts: Experts a layer; those with low ids are chosen more often.
        top_k: Experts a token.
        layers: MoE layers.
        seed: Of the choices.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for run, (prompt, more) in enumerate(zip(prompts, decoded, strict=True)):
        for position in range(prompt + more):
            step = 0 if position < prompt else position - prompt + 1
            phase = "prefill" if position < prompt else "decode"
            token = int(rng.integers(100))
            for layer in layers:
                scores = rng.random(experts) - np.arange(experts) / (2 * experts)
                chosen = np.argsort(-scores)[:top_k]
                for rank, expert in enumerate(chosen.tolist()):
                    rows.append(
                        (run, 0, step, position, token, f"t{token}", phase, layer, rank, expert,
                         float(scores[expert]), False, "load", expert, float(scores[expert]))
                    )  # fmt: skip
    columns = pd.DataFrame(rows, columns=list(SCHEMA["routing"])).astype({"token": "category"})
    frame: pd.DataFrame = typed("routing", columns)
    return frame


def recording(frame: pd.DataFrame, experts: int = 12, top_k: int = 3) -> Recording:
    """A finished recording with this routing."""
    made = Recording(
        manifest(experts, top_k, sorted(frame["layer"].unique().tolist())), lambda _: frame
    )
    made.complete()
    return made
