"""Turns steps into rows, once their arrays have been computed.

A step's ids, weights and logits are lazy, or in flight, when its forward pass returns. They are
kept for two more steps and read then: by that time mlx-lm's own loop has evaluated them, so
reading them waits for nothing.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from . import loop
from .steps import LayerEvent, Step
from .store import Rows, Store

LAG = 2
"""Steps that are kept before they are read."""

SMALL = 64
"""Up to so many ids, plain Python is faster than numpy."""


@dataclass(slots=True)
class RunState:
    """One cache's life, as far as it was seen."""

    number: int
    cache_id: int | None = None
    parts: tuple[Any, ...] = ()
    """Weak references to the cache's parts, by which it is known again. Nothing here keeps a
    cache alive."""
    steps: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    """Tokens so far, by sequence."""
    logits: dict[int, np.ndarray] = field(default_factory=dict)
    """The last token's logits, by sequence: the next token was drawn from them."""


class Recorder:
    """Listens to a lab's steps and fills a store.

    Args:
        store: Where rows go.
        experts: Largest number of experts of any layer.
        prompt_logprobs: Keep what prompt tokens' log-probabilities need.
    """

    def __init__(self, store: Store, experts: int, *, prompt_logprobs: bool = False) -> None:
        self.wants_logits = prompt_logprobs
        self._store = store
        self._experts = experts
        self._waiting: deque[Step] = deque()
        self._runs: list[RunState] = []
        self._batches: list[tuple[weakref.ref[Any], RunState]] = []

    @property
    def runs(self) -> int:
        """Runs seen so far."""
        return len(self._runs)

    def stepped(self, step: Step) -> None:
        """See `StepListener`."""
        if step.events:
            self._waiting.append(step)
        while len(self._waiting) > LAG:
            self._settle(self._waiting[0])
            self._waiting.popleft()

    def finish(self) -> None:
        """Reads what is still waiting."""
        while self._waiting:
            self._settle(self._waiting[0])
            self._waiting.popleft()
        for run in self._runs:
            run.logits.clear()

    def _settle(self, step: Step) -> None:
        if step.serial <= self._store.last_step:
            return  # an interrupt came between adding its rows and forgetting it
        rows, length = step.inputs.shape
        run = self._run_of(step)
        sequences = list(step.loop.sequences or range(rows))
        ids = np.array(step.inputs).reshape(rows, length)
        if step.offset is not None and rows == 1:
            run.positions[sequences[0]] = step.offset
        starts = np.array([run.positions.get(s, 0) for s in sequences])
        phases = np.full((rows, length), step.loop.rest_phase, np.uint8)
        phases[:, 0] = step.loop.first_phase
        lengths = np.full(rows, length)
        if step.loop.lengths is not None:
            lengths = np.array(step.loop.lengths)
            phases[np.arange(length) >= lengths[:, None]] = loop.PADDING
        logprob, entropy = self._surprise(step, run, sequences, ids, lengths)
        count = rows * length
        routing, layers = _routing_rows(step.events, count, self._experts)
        self._store.add(
            step.serial,
            Rows(
                tokens={
                    "run": np.full(count, run.number),
                    "sequence": np.repeat(sequences, length),
                    "step": np.full(count, run.steps),
                    "position": (starts[:, None] + np.arange(length)).ravel(),
                    "token_id": ids.ravel(),
                    "phase": phases.ravel(),
                    "logprob": logprob.ravel(),
                    "entropy": entropy.ravel(),
                    "seconds": np.full(count, step.seconds / count),
                    "layers": np.full(count, layers),
                },
                routing=routing,
                loads=_load_rows(step),
            ),
        )
        run.steps += 1
        for sequence, start, real in zip(sequences, starts, lengths, strict=True):
            run.positions[sequence] = int(start + real)

    def _surprise(
        self, step: Step, run: RunState, sequences: list[int], ids: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns log-probability and entropy (nats) of the tokens of a step, NaN if unknown."""
        rows, length = ids.shape
        logprob = np.full((rows, length), np.nan, np.float32)
        entropy = np.full((rows, length), np.nan, np.float32)
        logits = step.logits
        inner = self.wants_logits or step.loop.all_rows
        wanted = step.loop.first_phase == loop.DECODE or self.wants_logits
        if logits is not None:
            one = inner or logits.shape[1] == 1
            logits = (logits if one else logits[:, -1:]).astype(mx.float32)
        values = None if logits is None else np.array(logits, copy=False)
        for row, sequence in enumerate(sequences):
            before = run.logits.pop(sequence, None)
            if before is not None and wanted:
                logprob[row, 0], entropy[row, 0] = _score(before, int(ids[row, 0]))
            if values is None:
                continue
            if inner:
                for i in range(1, int(lengths[row])):
                    logprob[row, i], entropy[row, i] = _score(values[row, i - 1], int(ids[row, i]))
            last = int(lengths[row]) - 1 if inner else 0
            if last >= 0:
                # A copy where the view would hold on to every row.
                run.logits[sequence] = values[row, last].copy() if inner else values[row, last]
        return logprob, entropy

    def _run_of(self, step: Step) -> RunState:
        """Finds the run that a step belongs to, or begins one."""
        if step.loop.batch is not None:
            self._batches = [(ref, run) for ref, run in self._batches if ref() is not None]
            for ref, run in self._batches:
                if ref() is step.loop.batch:
                    return run
            run = self._begin(None)
            self._batches.append((weakref.ref(step.loop.batch), run))
            return run
        if step.cache is None:
            return self._begin(None)
        for run in reversed(self._runs):
            if run.cache_id == id(step.cache) and _goes_on(run, step):
                run.parts = _references(step.cache)
                return run
        return self._begin(step.cache)

    def _begin(self, cache: Any) -> RunState:
        known = None if cache is None else id(cache)
        run = RunState(len(self._runs), known, _references(cache))
        self._runs.append(run)
        return run


def _goes_on(run: RunState, step: Step) -> bool:
    """Tells a cache that lives on from a new one that happens to be at the same address."""
    if step.offset is not None and 0 < step.offset == run.positions.get(0):
        return True  # its parts may be new: they are exchanged when a cache is quantised
    return any(ref() is part for ref, part in zip(run.parts, step.cache, strict=False))


def _references(cache: Any) -> tuple[Any, ...]:
    return tuple(weakref.ref(part) for part in cache or ())


def _score(logits: np.ndarray, token: int) -> tuple[float, float]:
    """Returns log-probability of a token and entropy of the distribution, in nats.

    Args:
        logits: float32 (vocabulary,).
        token: The token's id.
    """
    top = float(logits.max())
    # exp(-700) is 0 in float32, and 0 · -700 is 0 where 0 · -inf would be NaN.
    shifted = np.maximum(logits - top, -700.0)
    weights = np.exp(shifted)
    total = float(weights.sum(dtype=np.float64))
    log_total = np.log(total)
    return float(logits[token]) - top - log_total, log_total - float(weights @ shifted) / total


def _routing_rows(
    events: list[LayerEvent], count: int, experts: int
) -> tuple[dict[str, np.ndarray], int]:
    """Returns a step's routing columns, flat, and the number of layers that it reached."""
    ids = [np.asarray(event.ids).reshape(count, -1) for event in events]
    return {
        "expert": np.concatenate(ids, axis=1).ravel(),
        "weight": _weights(events, ids),
        "miss": np.concatenate(
            [_missed(i, e.missing, experts) for i, e in zip(ids, events, strict=True)], axis=1
        ).ravel(),
    }, len(events)


def _weights(events: list[LayerEvent], ids: list[np.ndarray]) -> np.ndarray:
    known = [e.weights for e in events if isinstance(e.weights, mx.array)]
    if len(known) == len(events) and all(w.dtype == mx.float32 for w in known):
        # On a CPU each is there already, and looking at it is cheaper than a graph operation.
        values = [np.array(w, copy=False).reshape(i.shape) for w, i in zip(known, ids, strict=True)]
        return np.concatenate(values, axis=1).ravel()
    # numpy has no bfloat16: one conversion for all layers.
    parts = [
        e.weights.astype(mx.float32).reshape(i.shape)
        if isinstance(e.weights, mx.array)
        else mx.full(i.shape, float("nan"))
        for e, i in zip(events, ids, strict=True)
    ]
    return np.array(mx.concatenate(parts, axis=1)).ravel()


def _missed(ids: np.ndarray, missing: frozenset[int] | None, experts: int) -> np.ndarray:
    if not missing:
        return np.zeros(ids.shape, np.uint8)
    if ids.size <= SMALL:
        flat = [expert in missing for expert in ids.ravel().tolist()]
        return np.array(flat, np.uint8).reshape(ids.shape)
    table = np.zeros(experts, np.uint8)
    table[list(missing)] = 1
    return table[ids]


def _load_rows(step: Step) -> dict[str, np.ndarray]:
    """Returns a step's load columns; each load belongs to the first token that asked for it."""
    count = step.inputs.size
    events = {event.layer: event for event in step.events}
    token_row: list[int] = []
    layers: list[int] = []
    experts: list[int] = []
    seconds: list[float] = []
    for layer, loads, times in step.loads:
        first = {}
        if count > 1 and layer in events:
            flat = np.asarray(events[layer].ids).reshape(count, -1)
            values, index = np.unique(flat, return_index=True)
            first = dict(zip(values.tolist(), (index // flat.shape[1]).tolist(), strict=True))
        for load, taken in zip(loads, times, strict=True):
            token_row.append(first.get(load.expert, 0))
            layers.append(layer)
            experts.append(load.expert)
            seconds.append(taken)
    return {
        "token_row": np.array(token_row, np.int64),
        "layer": np.array(layers, np.uint16),
        "expert": np.array(experts, np.uint16),
        "seconds": np.array(seconds, np.float32),
    }
