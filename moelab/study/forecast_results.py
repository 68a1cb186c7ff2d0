"""The `Forecast`, and the arithmetic that makes one of a cut routing and a calibration.

mlx-lm's loop makes the next pass before it gives a token, so that the first token waits for two
passes where a layer is partial, since such a pass waits for its own ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..display import facts_html, facts_text, size
from .bytes import ModelFacts
from .calibration_results import Calibration
from .forecast_passes import played_steps

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Forecast:
    """What `forecast` foretells: means over the runs of the recording.

    Attributes:
        first_token_seconds: Until the first token is given, bank at its first contents.
        tokens_per_second: Of the tokens after it.
        bytes_per_token: Read from the files for each of them.
        prompt_bytes: Read until the first token.
        hit_rate: Share of routed slots while decoding whose expert was resident.
        bytes: Memory of the weights: trunk and slots. Key-value cache and buffers come on top.
        loads_per_token: Experts read for each decoded token, in all layers.
        prompt_loads: Experts read until the first token, in all layers.
        by_run: A row a run of the recording: `run`, `first_token_seconds`, `tokens_per_second`,
            `prompt_loads`, `loads`, `tokens`.
        frame: A row a phase ("first token", "decode") and part ("compute", "loads"): `phase`,
            `part`, `seconds` (of the first token; of one decoded token), `loads`, `bytes`.
        settings: What was assumed.
        calibration: What the seconds are from.
    """

    first_token_seconds: float
    tokens_per_second: float
    bytes_per_token: float
    prompt_bytes: float
    hit_rate: float
    bytes: int
    loads_per_token: float
    prompt_loads: float
    by_run: pd.DataFrame = field(repr=False)
    frame: pd.DataFrame = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    calibration: Calibration = field(repr=False)

    def _facts(self) -> dict[str, str]:
        told = self.settings
        seconds = self.frame.set_index(["phase", "part"])["seconds"]
        ends = [self.by_run[n].agg(["min", "max"]) for n in ("first_token_seconds",
                                                             "tokens_per_second")]  # fmt: skip
        pinned = f", {told['pinned']} pinned" if told["pinned"] else ""
        return {
            "model": told["model"],
            "bank": f"{told['slots']} of {told['experts']} experts a layer, {told['policy']}"
            f"{pinned}, page cache {told['page_cache']}",
            "memory": f"{size(self.bytes)} of weights",
            "first token": f"{self.first_token_seconds:.3f} s for {told['prompt']} tokens "
            f"(texts: {ends[0]['min']:.3f} to {ends[0]['max']:.3f}), of it "
            f"{seconds['first token', 'loads']:.3f} s for {self.prompt_loads:.0f} loads, "
            f"{size(round(self.prompt_bytes))}",
            "decoding": f"{self.tokens_per_second:.1f} tokens/s "
            f"(texts: {ends[1]['min']:.1f} to {ends[1]['max']:.1f}); "
            f"{seconds['decode', 'compute'] * 1e3:.2f} ms compute and "
            f"{seconds['decode', 'loads'] * 1e3:.2f} ms loads a token",
            "read a token": f"{size(round(self.bytes_per_token))} in {self.loads_per_token:.1f} "
            f"loads, {self.hit_rate:.1%} hits",
            "routing": f"{told['routing']}, {len(self.by_run)} texts",
            **({"beware": "; ".join(told["extrapolated"])} if told["extrapolated"] else {}),
        }

    def __repr__(self) -> str:
        return facts_text("Forecast", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Forecast", self._facts())


def forecast_from(
    stepped: pd.DataFrame,
    facts: ModelFacts,
    slots: Sequence[int],
    policy: Any,
    pinned: Mapping[int, Sequence[int] | frozenset[int]],
    calibration: Calibration,
    *,
    page_cache: str = "warm",
    settings: Mapping[str, Any] | None = None,
) -> Forecast:
    """The arithmetic of a forecast; see `forecast`.

    Args:
        stepped: From `steps_of_prompt`.
        facts: Of the model.
        slots: Of each layer.
        policy: As in `moelab.replay`.
        pinned: Experts by layer.
        calibration: The seconds.
        page_cache: As in `forecast`.
        settings: What the result says of itself.
    """
    import pandas as pd

    banks = dict(zip((x.layer for x in facts.layers), slots, strict=True))
    experts = {x.layer: x.experts for x in facts.layers}
    partial = {layer for layer, c in banks.items() if c < experts[layer]}
    share = len(partial) / len(banks)
    # A model without partial layers does not wait for the pass after the one that is asked for.
    passes = 2 if partial else 1
    nbytes = {x.layer: x.disk_bytes for x in facts.layers}
    rows, sums = [], []
    for run, part in stepped.groupby("run", sort=True):
        steps = played_steps(part, policy, banks, pinned, experts, partial, nbytes)
        chunks, alone = steps[steps["chunk"]], steps[~steps["chunk"]]
        lead, later = alone.iloc[:passes], alone.iloc[2:]
        cold = (calibration.cold_load or 0.0) if page_cache == "cold" else 0.0
        parts = {}
        chunk = calibration.prefill_seconds(
            chunks["tokens"].to_numpy(), chunks["needed"].to_numpy(), chunks["loads"].to_numpy(),
            chunks["swept"].to_numpy(), partial=share,
        ) if len(chunks) else (np.zeros(0), np.zeros(0))  # fmt: skip
        for name, group in (("first", lead), ("decode", later)):
            parts[name] = calibration.decode_seconds(
                group["context"].to_numpy(), group["missing"].to_numpy(),
                group["loads"].to_numpy(), partial=share,
            )  # fmt: skip
        before = pd.concat([chunks, lead])
        compute = float(np.sum(chunk[0]) + np.sum(parts["first"][0]))
        loads = float(np.sum(chunk[1]) + np.sum(parts["first"][1]) + cold * before["new"].sum())
        decode = float(np.sum(parts["decode"][0]))
        reading = float(np.sum(parts["decode"][1]) + cold * later["new"].sum())
        count = len(later)
        rows.append({
            "run": run, "first_token_seconds": compute + loads,
            "tokens_per_second": count / (decode + reading) if decode + reading else math.inf,
            "prompt_loads": int(before["loads"].sum()), "loads": int(later["loads"].sum()),
            "tokens": count,
        })  # fmt: skip
        sums.append({
            "first_compute": compute, "first_loads": loads, "decode_compute": decode,
            "decode_loads": reading, "prompt_bytes": before["bytes"].sum(),
            "bytes": later["bytes"].sum(), "routed": later["routed"].sum(),
            "hits": later["hits"].sum(),
        })  # fmt: skip
    by_run, total = pd.DataFrame(rows), pd.DataFrame(sums)
    count, runs = int(by_run["tokens"].sum()), len(by_run)
    seconds = float(total["decode_compute"].sum() + total["decode_loads"].sum())
    prompt_loads, loads = float(by_run["prompt_loads"].mean()), float(by_run["loads"].sum())
    prompt_bytes, read = float(total["prompt_bytes"].mean()), float(total["bytes"].sum())
    table = [
        ("first token", "compute", total["first_compute"].sum() / runs, 0.0, 0.0),
        ("first token", "loads", total["first_loads"].sum() / runs, prompt_loads, prompt_bytes),
        ("decode", "compute", total["decode_compute"].sum() / count, 0.0, 0.0),
        ("decode", "loads", total["decode_loads"].sum() / count, loads / count, read / count),
    ]
    return Forecast(
        first_token_seconds=float(by_run["first_token_seconds"].mean()),
        tokens_per_second=count / seconds if seconds else math.inf,
        bytes_per_token=read / count,
        prompt_bytes=prompt_bytes,
        hit_rate=float(total["hits"].sum() / total["routed"].sum()),
        bytes=facts.slots_bytes(slots) + facts.trunk,
        loads_per_token=loads / count,
        prompt_loads=prompt_loads,
        by_run=by_run,
        frame=pd.DataFrame(table, columns=["phase", "part", "seconds", "loads", "bytes"]),
        settings=dict(settings or {}),
        calibration=calibration,
    )
