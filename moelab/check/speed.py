"""Memory and tokens per second with the bank, beside stock where the whole model fits as well.

Lab and stock take turns in one process on the same prompt and the same number of tokens. Each
round of the lab starts from an empty bank, so rounds are alike. A first round of each, not timed,
records hits and compares what the two models computed.
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..experts.capacity import Capacity, available_memory
from ..lab import Lab
from ..loading import load
from .bandwidth import Spread
from .pagecache import Piece, cached_share

PROMPT_TOKENS = 128
ROUNDS = 5
FEW_ROUNDS, ENOUGH_SECONDS = 3, 20.0
"""After so many rounds and seconds no new one is begun,"""
BUDGET_SECONDS = 60.0
"""nor after so many seconds, however few the rounds were."""
COMFORT = 0.6
"""Stock runs beside the lab if both take at most this share of the memory that there is."""
TOLERANCE = 0.03
"""How far memory may be from what was asked for."""

SPEED_PARTS = 3
"""How often `measure_speed` calls its `progress`."""

TEXT = """A model of many experts asks, for every word it reads or writes, a few of them for their
opinion, and lets the others rest. Which few, is decided anew in each layer. How do I list the files
of a folder by size? Use `ls -lS`. If a baker has 24 eggs and needs 3 for each cake, she can bake 8
cakes. def mean(values): return sum(values) / len(values). En un lugar de la Mancha, de cuyo nombre
no quiero acordarme, no ha mucho tiempo que vivía un hidalgo. """


@dataclass(frozen=True, slots=True)
class Memory:
    """What the weights and the work on them took, in bytes."""

    trunk: int
    """Everything but the routed experts."""
    experts: int
    """Slots, and the experts of layers that hold all of theirs."""
    promised: int
    """The trunk and capacity × the size of one expert, over all layers."""
    loading: int
    """By how much MLX's memory in use grew when the model was loaded."""
    work: int
    """The most that prefill and decode took on top of it."""
    stock_work: int | None
    """The same of stock; None if it was not run."""
    full: int
    """What the whole model would take."""

    @property
    def deviation(self) -> float:
        """How far the memory in use is from the promise, as a share of the promise."""
        return self.loading / self.promised - 1

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        return abs(self.deviation) <= TOLERANCE

    @property
    def work_kept(self) -> bool | None:
        """Whether the work took no more than stock's; None if that was not run."""
        if self.stock_work is None:
            return None
        return self.work <= self.stock_work + TOLERANCE * self.promised


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast one model ran."""

    prefill: Spread
    """Prompt tokens a second, until the first new token was there."""
    decode: Spread
    """New tokens a second after the first."""


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast the model ran with the bank, and what the bank did."""

    capacity: list[int]
    """Slots of each layer."""
    chosen: str
    """Why this capacity."""
    prompt_tokens: int
    tokens: int
    """New tokens each round."""
    lab: Rates
    stock: Rates | None
    """None if stock was not run."""
    stock_not_run: str | None
    """Why not."""
    hit_prefill: float
    """Share of the prompt's (token, expert) pairs whose expert was in memory."""
    hit_decode: float
    loads_per_token: float
    """Experts read from disk for each new token, over all layers."""
    read_share: float
    """Share of decoding time that the model waited for experts to be read, in one round."""
    cached: float | None
    """Share of the experts' bytes that the page cache held before the timed rounds."""
    same_tokens: bool | None
    """Lab and stock wrote the same tokens; None if stock was not run."""
    same_bits: bool | None
    """And the probabilities of all tokens had the same bits at each step."""


@dataclass(frozen=True, slots=True)
class _Run:
    first_token: float
    """When the first token came, by `time.perf_counter`."""
    prefill: float
    decode: float
    tokens: list[int]
    digest: str
    work: int


def measure_speed(
    name_or_path: str | Path,
    capacity: Capacity,
    chosen: str,
    *,
    tokens: int,
    full_bytes: int,
    sample: list[Piece],
    progress: Callable[[], None],
) -> tuple[Memory, Speed]:
    """Loads the model with a bank and runs it.

    Args:
        name_or_path: See `moelab.load`.
        capacity: See `moelab.load`.
        chosen: Why this capacity; for the report.
        tokens: New tokens a round.
        full_bytes: What the whole model takes.
        sample: Some experts' places on disk, to ask the page cache about.
        progress: Called after each of 3 parts.
    """
    gc.collect()
    mx.clear_cache()
    free = available_memory()
    before = mx.get_active_memory()
    lab = load(name_or_path, capacity)
    try:
        gc.collect()
        mx.clear_cache()
        loading = mx.get_active_memory() - before
        progress()
        prompt = _prompt(lab.tokenizer)
        both = full_bytes + lab.memory().total
        why_not = None
        if both > COMFORT * free.nbytes:
            why_not = (
                f"the whole model and the bank together take {both / 1e9:.1f} GB, and that is more "
                f"than {COMFORT:.0%} of the {free.nbytes / 1e9:.1f} GB there are ({free.source})"
            )
        stock = None if why_not else _load_stock(lab.path)
        memory, speed = _measure(
            lab, stock, prompt, tokens, sample=sample, loading=loading, progress=progress
        )
    finally:
        lab.close()
    return (
        Memory(**memory, full=full_bytes),
        Speed(**speed, chosen=chosen, stock_not_run=why_not),
    )


def _measure(
    lab: Lab,
    stock: nn.Module | None,
    prompt: list[int],
    tokens: int,
    *,
    sample: list[Piece],
    loading: int,
    progress: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    lab.reset()
    with lab.record() as recording, _waiting(lab) as waited:
        first = _run(lab.model, prompt, tokens, digest=True)
    stock_first = None if stock is None else _run(stock, prompt, tokens, digest=True)
    progress()
    cached = cached_share(sample)
    rounds: list[_Run] = []
    stock_rounds: list[_Run] = []
    begin = time.perf_counter()
    while _goes_on(len(rounds), time.perf_counter() - begin):
        lab.reset()
        # Each goes first in turn, so that neither has the better part of what changes meanwhile.
        turn = [(lab.model, rounds)]
        if stock is not None:
            turn.append((stock, stock_rounds))
        for model, done in turn[:: -1 if len(rounds) % 2 else 1]:
            done.append(_run(model, prompt, tokens))
    progress()
    use = lab.memory()
    experts = {layer.layer: layer.loader.expert_disk_bytes for layer in lab.attachment.bank.layers}
    promised = use.trunk + sum(
        slots * experts[site.layer]
        if site.layer in experts
        else sum(array.nbytes for _, _, array in site.tensors())
        for site, slots in zip(lab.sites, lab.capacities, strict=True)
    )
    rates = recording.misses("phase").set_index("phase")["slots"]
    decoded = set(recording.tokens.loc[recording.tokens["phase"] == "decode", "step"])
    loads = recording.loads[recording.loads["step"].isin(decoded)]
    steps = max(len(decoded), 1)
    memory = {
        "trunk": use.trunk,
        "experts": use.slots + use.resident_experts,
        "promised": promised,
        "loading": loading,
        "work": max(run.work for run in rounds),
        "stock_work": max((run.work for run in stock_rounds), default=None),
    }
    same_tokens = None if stock_first is None else stock_first.tokens == first.tokens
    speed = {
        "capacity": lab.capacities,
        "prompt_tokens": len(prompt),
        "tokens": tokens,
        "lab": _rates(rounds, len(prompt), tokens),
        "stock": _rates(stock_rounds, len(prompt), tokens) if stock_rounds else None,
        "hit_prefill": 1 - float(rates.get("prefill", 0.0)),
        "hit_decode": 1 - float(rates.get("decode", 0.0)),
        "loads_per_token": len(loads) / steps,
        "read_share": waited(first.first_token) / first.decode,
        "cached": cached,
        "same_tokens": same_tokens,
        "same_bits": None if stock_first is None else stock_first.digest == first.digest,
    }
    return memory, speed


def _goes_on(rounds: int, seconds: float) -> bool:
    if rounds == 0:
        return True
    if rounds >= FEW_ROUNDS and seconds > ENOUGH_SECONDS:
        return False
    return rounds < ROUNDS and seconds < BUDGET_SECONDS


@contextmanager
def _waiting(lab: Lab) -> Iterator[Callable[[float], float]]:
    """Times every wait for experts; gives a function: seconds waited since some moment."""
    waits: list[tuple[float, float]] = []

    def timed(load_experts: Callable[[Any], None]) -> Callable[[Any], None]:
        def wait(loads: Any) -> None:
            begin = time.perf_counter()
            load_experts(loads)
            waits.append((begin, time.perf_counter() - begin))

        return wait

    layers = lab.attachment.bank.layers
    for layer in layers:
        vars(layer)["load"] = timed(layer.load)
    try:
        yield lambda since: sum(seconds for begin, seconds in waits if begin >= since)
    finally:
        for layer in layers:
            vars(layer).pop("load", None)


def _rates(rounds: list[_Run], prompt: int, tokens: int) -> Rates:
    return Rates(
        Spread.of([prompt / run.prefill for run in rounds]),
        Spread.of([(tokens - 1) / run.decode for run in rounds]),
    )


def _prompt(tokenizer: Any) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < PROMPT_TOKENS:
        tokens += tokenizer.encode(TEXT, add_special_tokens=False)
    return tokens[:PROMPT_TOKENS]


def _load_stock(folder: Path) -> nn.Module:
    from mlx_lm.utils import load_model

    model: nn.Module = load_model(folder)[0]
    return model


def _run(model: nn.Module, prompt: list[int], tokens: int, *, digest: bool = False) -> _Run:
    """Generates greedily by mlx-lm's own loop, past any end-of-text token."""
    from mlx_lm.generate import generate_step, generation_stream, wired_limit

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seen = hashlib.sha256()
    written, times = [], []
    with wired_limit(model, [generation_stream]):
        begin = time.perf_counter()
        for token, logprobs in generate_step(mx.array(prompt), model, max_tokens=tokens):
            times.append(time.perf_counter())
            written.append(int(token))
            if digest:
                seen.update(np.array(logprobs.view(mx.uint16), copy=False).tobytes())
        work = mx.get_peak_memory() - before
    return _Run(times[0], times[0] - begin, times[-1] - times[0], written, seen.hexdigest(), work)
