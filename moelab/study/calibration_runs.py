"""What a calibration is fitted to: timed runs of texts at a few capacities, in rounds.

Each text is run from an empty bank and, where some layer is partial, its prompt once more with the
bank full of it. Layers that hold all their experts are stock and wait for nothing, so that they are
measured by themselves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from ..lab import Lab
from .calibration_results import PARTS
from .live_run import Live
from .runner import govern

ROUNDS = 3
DECODED = 32
STRETCH = 8
"""Decoded tokens that are one observation: a single token's time is mostly noise."""


@dataclass
class Observations:
    """What was seen at some capacities."""

    capacities: list[list[int]] = field(default_factory=list)
    """Slots of each layer."""
    rows: dict[str, list[list[float]]] = field(default_factory=lambda: {p: [] for p in PARTS})
    """By phase: seconds, then what there was of each part, as `PARTS` has them."""
    runs: dict[str, list[int]] = field(default_factory=lambda: {p: [] for p in PARTS})
    """Which run each observation is of."""
    longest: int = 0
    """Tokens of the longest chunk."""

    def note(self, phase: str, run: int, row: list[float]) -> None:
        """Adds an observation."""
        self.rows[phase].append(row)
        self.runs[phase].append(run)


def observe(
    lab: Lab, seen: Observations, lengths: list[int], end: float, progress: bool
) -> None:  # fmt: skip
    """Runs texts at each of `seen.capacities`, in rounds, and notes what they took.

    Args:
        lab: Loads what it misses; is left at the last capacity.
        seen: Where observations go.
        lengths: Tokens of the prompts, ascending, two or more.
        end: When to stop, as `time.perf_counter` has it. The first round has two lengths of each
            capacity in any case.
        progress: Show a bar.
    """
    from tqdm.auto import tqdm

    texts = _token_streams(lab, max(lengths) + DECODED + 2)
    costs: dict[int, float] = {}
    number = 0
    bar = tqdm(
        total=ROUNDS * len(seen.capacities) * len(lengths),
        desc="calibrate", unit="run", disable=not progress, leave=False,
    )  # fmt: skip
    sizes = [site.experts for site in lab.sites]
    with bar:
        for turn in range(ROUNDS):
            for slots in seen.capacities:
                if turn and time.perf_counter() > end:
                    return
                govern(lab, "lru", {}, {}, slots=slots)
                whole = slots == sizes
                # The first pass after a change of slots is slow, and does not count.
                Live(lab, texts[0], lengths[0], 1)
                for place, length in enumerate(lengths):
                    bar.update()
                    # Before it is known, a prompt's time is taken to grow as its tokens do.
                    known = costs.get(length) or max(
                        (c * length / n for n, c in costs.items()), default=0.0
                    )
                    late = time.perf_counter() + known > end
                    if late and (turn or place > 1):
                        continue
                    text = texts[number % len(texts)]
                    number += 1
                    begin = time.perf_counter()
                    lab.reset()
                    first = Live(lab, text, length, DECODED)
                    # The same routing with a bank that is full of it: fewer loads.
                    second = None if whole else Live(lab, text, length, 1)
                    costs[length] = time.perf_counter() - begin
                    _note(seen, lab, length, first, second, whole)


def _note(
    seen: Observations, lab: Lab, length: int, first: Live, second: Live | None, whole: bool
) -> None:
    """Adds observations of one prompt, from an empty bank and perhaps once more."""
    prefix = "whole_" if whole else ""
    number = len(set(seen.runs[f"{prefix}decode"]))
    slots = {site.layer: c for site, c in zip(lab.sites, lab.capacities, strict=True)}
    for at in range(0, len(first.steps) - STRETCH + 1, STRETCH):
        part = first.steps[at : at + STRETCH]
        seconds = sum(s for s, _, _ in part)
        context = sum(length + 1 + at + i for i in range(STRETCH))
        row = [seconds, STRETCH, context]
        if not whole:
            row += [sum(m for _, m, _ in part), sum(n for _, _, n in part)]
        seen.note(f"{prefix}decode", number, row)
    for run in (first, second):
        # Of one chunk that began with an empty bank, every expert was loaded, once.
        if run is None or len(run.chunks) != 1:
            continue
        seconds, tokens, loads = run.chunks[0]
        seen.longest = max(seen.longest, tokens)
        row = [seconds, 1, tokens]
        if not whole:
            needed = first.chunks[0][2]
            swept = sum(n > slots[layer] for layer, n in needed.items())
            row += [needed.total(), loads.total(), swept]
        seen.note(f"{prefix}prefill", len(seen.rows[f"{prefix}prefill"]), row)


def _token_streams(lab: Lab, length: int) -> list[list[int]]:
    """Returns token streams of the shipped calibration texts, a few a domain."""
    from ..labmodel import DOMAINS, texts

    random = np.random.default_rng(0)
    found: list[list[int]] = []
    for domain in DOMAINS * 2:
        pool = texts(domain=domain, split="calibration")
        tokens: list[int] = []
        for i in random.permutation(len(pool)).tolist():
            tokens += lab.tokenizer.encode(pool[i]["text"])
            if len(tokens) >= length:
                break
        while len(tokens) < length:
            tokens = tokens + tokens
        found.append(tokens[:length])
    return found
