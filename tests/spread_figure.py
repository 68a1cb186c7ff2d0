"""Does a spread of slots by use beat the same number in every layer, on prompts held out?

`python -m tests.spread_figure` prints a table for the lab model. Slots are spread by the uses
counted on texts of the split "calibration"; hits are counted on texts of "test", decoded token by
token under LRU by the bank's own `Residency`, each text from the bank that the calibration texts
left. The routing of an exact run is the same at every capacity, so each text runs once. For two
texts the live bank runs as well and must count the same hits.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np
import pandas as pd

import moelab
from moelab import labmodel
from moelab.experts.policies import LRU
from moelab.experts.residency import Residency
from moelab.lab import Lab

Routing = np.ndarray
"""Expert ids, (tokens, layers, top-k)."""

Banks = list[Residency]


def routing(lab: Lab, tokens: Sequence[int]) -> Routing:
    """Runs a text once and returns what the routers chose."""
    with lab.record() as recording:
        mx.eval(lab.model(mx.array([list(tokens)])))
    frame = recording.routing.sort_values(["position", "layer", "rank"])
    return frame["expert"].to_numpy().reshape(len(tokens), len(lab.sites), -1)


def usage(texts: Sequence[Routing], experts: int) -> pd.DataFrame:
    """Counts uses, a row for each expert of each layer."""
    ids = np.concatenate(texts)
    counts = [np.bincount(ids[:, i].ravel(), minlength=experts) for i in range(ids.shape[1])]
    return pd.DataFrame(
        {
            "layer": np.repeat(np.arange(len(counts)), experts),
            "expert": np.tile(np.arange(experts), len(counts)),
            "count": np.concatenate(counts),
        }
    )


def decode(banks: Banks, text: Routing) -> int:
    """Serves a text token by token; returns the routed slots that were hits."""
    hits = 0
    for token in text:
        for bank, ids in zip(banks, token, strict=True):
            needed = sorted(ids.tolist())
            misses = bank.begin(needed)
            for load in bank.admit(needed, misses):
                bank.arrived(load)
            hits += len(needed) - len(misses)
    return hits


def static_hits(table: pd.DataFrame, capacities: Sequence[int], text: Routing) -> int:
    """Returns the hits where each layer holds its most used experts and nothing changes."""
    hits = 0
    for layer, slots in enumerate(capacities):
        counts = table.loc[table["layer"] == layer, "count"].to_numpy()
        hits += int(np.isin(text[:, layer], np.argsort(-counts, kind="stable")[:slots]).sum())
    return hits


def warmed(capacities: Sequence[int], texts: Sequence[Routing]) -> Banks:
    """Banks as the calibration texts leave them."""
    banks = [Residency(capacity, LRU()) for capacity in capacities]
    for text in texts:
        decode(banks, text)
    return banks


def live_hits(capacities: Mapping[int, int], tokens: Sequence[int]) -> int:
    """Decodes a text with the live bank, from empty; returns the routed slots that were hits."""
    from mlx_lm.models.cache import make_prompt_cache

    with moelab.load("lab", capacities) as lab:
        cache = make_prompt_cache(lab.model)
        with lab.record() as recording:
            for token in tokens:
                mx.eval(lab.model(mx.array([[token]]), cache=cache))
    return int(recording.routing["hit"].sum())


def compare(
    calibration: Sequence[Routing], test: Sequence[Routing], each: int, experts: int, top_k: int
) -> tuple[dict[int, int], np.ndarray]:
    """Hit rates of every test text with `each` slots a layer and with as many, spread.

    Returns:
        The spread; hit rates, float64 (4, texts): LRU uniform and spread, static uniform and
        spread.
    """
    layers = test[0].shape[1]
    table = usage(calibration, experts)
    spread = moelab.spread_capacity(table, each * layers, top_k=top_k)
    rates, fixed = [], []
    for capacities in ([each] * layers, list(spread.values())):
        banks = warmed(capacities, calibration)
        rates.append([decode(copy.deepcopy(banks), text) / text.size for text in test])
        fixed.append([static_hits(table, capacities, text) / text.size for text in test])
    return spread, np.array([*rates, *fixed])


def main(tokens: int = 128, calibration_texts: int = 4, test_texts: int = 8) -> str:
    """Returns the table; counts of texts are for each domain."""
    from scipy import stats

    with moelab.load("lab", 1.0) as lab:
        parts: dict[str, list[tuple[list[int], Routing]]] = {}
        for split, count in (("calibration", calibration_texts), ("test", test_texts)):
            chosen = [t for d in labmodel.DOMAINS for t in labmodel.texts(d, split)[:count]]
            ids = [lab.tokenizer.encode(text["text"])[:tokens] for text in chosen]
            parts[split] = [(text, routing(lab, text)) for text in ids]
        experts, top_k = lab.sites[0].experts, lab.sites[0].top_k
    calibration, test = ([r for _, r in parts[split]] for split in ("calibration", "test"))
    lines = [
        f"{len(calibration)} calibration and {len(test)} test texts of {tokens} tokens",
        "slots a layer | spread by layer | LRU hits uniform | spread | difference (95%, points) | "
        "static hits uniform | spread | difference (95%, points)",
    ]
    for each in (8, 12, 16, 24, 32, 48):
        spread, rates = compare(calibration, test, each, experts, top_k)
        cells = [str(each), " ".join(map(str, spread.values()))]
        for uniform, ours in (rates[:2], rates[2:]):
            gain = 100 * (ours - uniform)
            half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
            low, high = gain.mean() - half, gain.mean() + half
            cells += [f"{uniform.mean():.2%}", f"{ours.mean():.2%}",
                      f"{gain.mean():+.2f} ({low:+.2f} to {high:+.2f})"]  # fmt: skip
        lines.append(" | ".join(cells))
        if each == 16:
            for text, chosen_ids in (parts["test"][0], parts["test"][-1]):
                banks = [Residency(c, LRU()) for c in spread.values()]
                assert live_hits(spread, text) == decode(banks, chosen_ids), "the live bank differs"
            lines.append("(the live bank counted the same hits as this replay, for two texts)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(main() + "\n")
