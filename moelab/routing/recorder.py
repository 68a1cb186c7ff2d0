"""Turns steps into rows, once their arrays have been computed.

A step's ids, weights and logits are lazy, or in flight, when its forward pass returns. They are
read when the second pass after it begins: by that time mlx-lm's own loop has evaluated them, so
reading them waits for nothing, and MLX is busy with the pass in between.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..experts.event import LayerEvent
from . import loop
from .outcomes import outcome_of
from .steps import Step, parts_of
from .store import TOKEN, Rows, Store

LAG = 2
"""Steps that are kept before they are read."""

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    steps: int = 0
    positions: dict[int, int] = field(default_factory=dict)
    """Tokens so far, by sequence."""
    logits: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)
    """Logits that the next token may be drawn from, by sequence: rows for consecutive positions,
    and the position of the first of them. More than one row only where tokens were drafted."""


@dataclass(slots=True)
class RunState:
    """One cache's life, as far as it was seen."""

    number: int
    cache_id: int | None = None
    parts: tuple[weakref.ref[Any], ...] = ()
    """The cache's parts, by which it is known again. Nothing here keeps a cache alive."""
    types: tuple[type, ...] = ()
    now: Progress = Progress()
    following: tuple[int, Progress] | None = None
    """What holds once the step of this serial number is in the store: an interrupt may come at
    any time, and rows and progress must agree after it."""

    def is_of(self, cache: Any) -> bool:
        """Whether `cache` is plainly this run's: one look, for the step after a step."""
        same = type(cache) is list and len(cache) == len(self.parts) and id(cache) == self.cache_id
        return same and bool(cache) and self.parts[0]() is cache[0]


class Recorder:
    """Listens to a lab's steps and fills a store.

    Args:
        store: Where rows go.
        experts: Largest number of experts of any layer.
        prompt_logprobs: Keep what prompt tokens' log-probabilities need.
        problems: Gets a text for whatever could not be recorded; a warning says it as well.
    """

    def __init__(
        self,
        store: Store,
        experts: int,
        *,
        prompt_logprobs: bool = False,
        problems: list[str] | None = None,
    ) -> None:
        self.wants_logits = prompt_logprobs
        self.problems: list[str] = [] if problems is None else problems
        self._store = store
        self._experts = experts
        self._layers = [layer for layer, _ in store.layout]
        self._score = _Scorer()
        self._waiting: deque[Step] = deque()
        self._runs: list[RunState] = []
        """Those whose cache is still alive, or was when the last one began."""
        self._begun = 0
        self._batches: list[tuple[weakref.ref[Any], RunState]] = []

    def begins(self, step: Step) -> None:
        """See `StepListener`."""
        self._waiting.append(step)
        while len(self._waiting) > LAG:
            self._settle_first()

    def finish(self) -> None:
        """Reads what is still waiting, and forgets the caches. May be called again."""
        while self._waiting:
            self._settle_first()
        self._runs.clear()
        self._batches.clear()

    def _settle_first(self) -> None:
        step = self._waiting[0]
        try:
            # After an interrupt its rows may be there already.
            if step.events and step.serial > self._store.last_step:
                self._settle(step)
        except Exception as error:
            # Whatever this is, the model that is being recorded goes on.
            self._problem(f"A forward pass could not be recorded: {error!r}")
        self._waiting.popleft()

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)
            warnings.warn(text, stacklevel=2)

    def _settle(self, step: Step) -> None:
        rows, length = step.inputs.shape
        view = step.loop
        run = self._run_of(step)
        self._commit(run)
        sequences = list(view.sequences) if view.sequences else list(range(rows))
        starts = _starts(step, run, sequences)
        reals = [length] * rows if view.lengths is None else list(view.lengths)
        routing = self._routing_rows(step, rows * length)
        tokens = np.empty((rows, length), TOKEN)
        # What all tokens share first; one assignment of a record is cheaper than ten of a field.
        tokens[:] = (
            run.number, sequences[0], run.now.steps, starts[0], 0, view.rest_phase, NAN, NAN,
            step.seconds / (rows * length), len(step.events),
        )  # fmt: skip
        tokens["token_id"] = np.array(step.inputs, copy=False)
        tokens["phase"][:, 0] = view.first_phase
        if rows * length > 1:
            tokens["sequence"] = np.array(sequences)[:, None]
            tokens["position"] = np.array(starts)[:, None] + np.arange(length)
            padding = np.arange(length) >= np.array(reals)[:, None]
            tokens["phase"][padding] = loop.PADDING
        followed = self._surprise(step, run, sequences, starts, reals, tokens)
        loads = self._load_rows(step) if step.loads else None
        positions, logits = dict(run.now.positions), dict(run.now.logits)
        for sequence, start, real in zip(sequences, starts, reals, strict=True):
            positions[sequence] = start + real
            if real:  # a row of padding leaves what the sequence's next token is drawn from
                logits.pop(sequence, None)
        logits.update(followed)
        run.following = (step.serial, Progress(run.now.steps + 1, positions, logits))
        self._store.add(step.serial, Rows(tokens.reshape(-1), routing, loads))
        self._commit(run)

    def _commit(self, run: RunState) -> None:
        if run.following is not None and run.following[0] <= self._store.last_step:
            run.now = run.following[1]

    def _surprise(
        self,
        step: Step,
        run: RunState,
        sequences: list[int],
        starts: list[int],
        reals: list[int],
        tokens: np.ndarray,
    ) -> dict[int, tuple[int, np.ndarray]]:
        """Fills in log-probability and entropy, and returns the logits that stay for later."""
        view = step.loop
        inner = self.wants_logits or view.all_rows
        wanted = self.wants_logits or view.first_phase == loop.DECODE
        values = None
        # Without a cache no later pass goes on from here.
        if step.logits is not None and (inner or step.cache is not None):
            logits = step.logits if inner or step.logits.shape[1] == 1 else step.logits[:, -1:]
            values = _float32(logits)
        followed: dict[int, tuple[int, np.ndarray]] = {}
        for row, (sequence, start, real) in enumerate(zip(sequences, starts, reals, strict=True)):
            first, before = run.now.logits.get(sequence, (0, None))
            if real and wanted and before is not None and 0 <= start - first < len(before):
                tokens["logprob"][row, 0], tokens["entropy"][row, 0] = self._score(
                    before[start - first], int(tokens["token_id"][row, 0])
                )
            if values is None or not real:
                continue
            if inner:
                for i in range(1, real):
                    tokens["logprob"][row, i], tokens["entropy"][row, i] = self._score(
                        values[row, i - 1], int(tokens["token_id"][row, i])
                    )
            if view.all_rows:  # of a few drafts, any may be the last that is accepted
                followed[sequence] = (start + 1, values[row])
            elif inner:  # a copy, since a view would hold on to every row
                followed[sequence] = (start + real, values[row, real - 1 : real].copy())
            else:
                followed[sequence] = (start + real, values[row])
        return followed

    def _routing_rows(self, step: Step, count: int) -> np.ndarray:
        """Returns a step's routed slots by token, layer and rank as the router gave them."""
        events = step.events
        if [event.layer for event in events] != self._layers[: len(events)]:
            raise ValueError(f"layers ran in the order {[event.layer for event in events]}")
        # np.array, since np.asarray takes five times as long over an MLX array.
        ids = [np.array(event.ids, copy=False).reshape(count, -1) for event in events]
        flat = _joined(ids)
        records = np.empty(flat.size, self._store.slot)
        records["expert"] = flat
        records["weight"] = weights = self._weights(step, ids)
        records["miss"] = 0
        if any(event.missing for event in events):
            records["miss"] = _missed(events, ids, self._experts)
        if self._store.lossy:
            _fill_outcomes(records, events, ids, weights, self._experts)
        return records

    def _weights(self, step: Step, ids: list[np.ndarray]) -> np.ndarray:
        known = [event.weights for event in step.events if event.weights is not None]
        if len(known) == len(ids) and all(w.dtype == mx.float32 for w in known):
            # On a CPU each is there already; looking at it is cheaper than a graph operation.
            pairs = zip(known, ids, strict=True)
            return _joined([np.array(w, copy=False).reshape(i.shape) for w, i in pairs])
        unknown = [e.layer for e in step.events if e.weights is None]
        if unknown and step.ended:
            self._problem(
                f"The weights of layers {unknown} are not known and recorded as NaN: their block "
                "does not multiply the experts' outputs by one factor each, or does it in a way "
                "that moelab does not see."
            )
        # numpy has no bfloat16: one conversion for all layers.
        parts = [
            mx.full(i.shape, NAN)
            if event.weights is None
            else event.weights.astype(mx.float32).reshape(i.shape)
            for event, i in zip(step.events, ids, strict=True)
        ]
        return np.array(mx.concatenate(parts, axis=1)).ravel()

    def _load_rows(self, step: Step) -> np.ndarray:
        """Returns a step's loads; each belongs to the first token that asked for it."""
        count, base = step.inputs.size, len(self._store)
        events = {} if count == 1 else {event.layer: event for event in step.events}
        rows: list[tuple[int, int, int, float]] = []
        for layer, loads, times in step.loads:
            first: dict[int, int] = {}
            if layer in events:
                flat = np.asarray(events[layer].ids).reshape(count, -1)
                values, index = np.unique(flat, return_index=True)
                first = dict(zip(values.tolist(), (index // flat.shape[1]).tolist(), strict=True))
            for load, taken in zip(loads, times, strict=True):
                rows.append((base + first.get(load.expert, 0), layer, load.expert, taken))
        return np.array(rows, self._store.load)

    def _run_of(self, step: Step) -> RunState:
        """Finds the run that a step belongs to, or begins one."""
        batch = step.loop.batch
        if batch is not None:
            for ref, run in self._batches:
                if ref() is batch:
                    return run
            self._batches = [(ref, run) for ref, run in self._batches if ref() is not None]
            run = self._begin([], None)
            self._batches.append((weakref.ref(batch), run))
            return run
        if self._runs and self._runs[-1].is_of(step.cache):
            return self._runs[-1]
        parts = [part for part in parts_of(step.cache) if type(part).__weakrefoffset__]
        if not parts:
            return self._begin([], None)
        for run in reversed(self._runs):
            known = [ref() for ref in run.parts]
            if all(a is b for a, b in zip(known, parts, strict=False)):
                return run
            if _goes_on(run, known, parts, step):
                _know(run, parts, step.cache)
                return run
        return self._begin(parts, step.cache)

    def _begin(self, parts: list[Any], cache: Any) -> RunState:
        # Runs whose cache is gone can go on no more.
        self._runs = [run for run in self._runs if any(ref() is not None for ref in run.parts)]
        run = RunState(self._begun)
        self._begun += 1
        if parts:
            _know(run, parts, cache)
            self._runs.append(run)
        return run


def _know(run: RunState, parts: list[Any], cache: Any) -> None:
    run.cache_id = id(cache)
    run.parts = tuple(weakref.ref(part) for part in parts)
    run.types = tuple(type(part) for part in parts)


def _goes_on(run: RunState, known: list[Any], parts: list[Any], step: Step) -> bool:
    """Tells a cache that lives on, with other parts, from a new one."""
    if any(a is b for a in known if a is not None for b in parts):
        return True
    # All parts are exchanged when a cache is quantised. A new list that happens to be where a
    # freed one was has parts of the same types.
    exchanged = run.types != tuple(type(part) for part in parts)
    same_place = run.cache_id == id(step.cache)
    held = run.now.positions.get(0, 0)
    return exchanged and same_place and isinstance(step.offset, int) and step.offset == held > 0


def _starts(step: Step, run: RunState, sequences: list[int]) -> list[int]:
    """Returns the tokens that each sequence had in the cache before a step."""
    offset = step.offset
    if isinstance(offset, int):
        return [offset] * len(sequences)
    if offset is not None and any(s not in run.now.positions for s in sequences):
        # Only where a sequence is new: while a prompt is padded, a batch's cache counts that too.
        given = [max(n, 0) for n in np.array(offset).reshape(-1).tolist()]
        if len(given) == len(sequences):
            return [run.now.positions.get(s, n) for s, n in zip(sequences, given, strict=True)]
    return [run.now.positions.get(s, 0) for s in sequences]


def _float32(logits: mx.array) -> np.ndarray:
    return np.array(logits.astype(mx.float32), copy=False)


class _Scorer:
    """Scores tokens against logits, in memory of its own.

    The memory is kept because a fresh piece for every token was the most expensive part of a
    recording: freed at once, it is handed back to the system and asked for again (0.5 ms a token
    beside a busy MLX, measured here; 0.015 ms without).
    """

    def __init__(self) -> None:
        self._shifted = self._weights = np.empty(0, np.float32)

    def __call__(self, logits: np.ndarray, token: int) -> tuple[float, float]:
        """Returns log-probability of a token and entropy of the distribution, in nats.

        Args:
            logits: float32 (vocabulary,).
            token: The token's id; -1 if it has none.
        """
        if self._shifted.shape != logits.shape:
            self._shifted, self._weights = np.empty_like(logits), np.empty_like(logits)
        shifted = np.subtract(logits, logits.max(), out=self._shifted)
        weights = np.exp(shifted, out=self._weights)
        total = float(weights.sum())
        with np.errstate(invalid="ignore"):
            mean = float(np.dot(weights, shifted)) / total
        if mean != mean:  # 0 · -inf: such a token adds nothing
            mean = float(np.dot(weights, np.maximum(shifted, -700.0))) / total
        log_total = float(np.log(total))
        return (NAN if token < 0 else float(shifted[token]) - log_total), log_total - mean


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    """Joins the layers' (tokens, top-k), a token's values together, flat."""
    first = arrays[0]
    if len(first) == 1 and all(a.dtype == first.dtype and a.flags.c_contiguous for a in arrays):
        return np.frombuffer(b"".join(arrays), first.dtype)  # type: ignore[arg-type]
    return np.concatenate(arrays, axis=1).ravel()


def _fill_outcomes(
    records: np.ndarray,
    events: list[LayerEvent],
    ids: list[np.ndarray],
    weights: np.ndarray,
    experts: int,
) -> None:
    count, begin = len(ids[0]), 0
    factors = weights.reshape(count, -1)
    parts = []
    for event, layer in zip(events, ids, strict=True):
        end = begin + layer.shape[1]
        parts.append(outcome_of(event, layer, factors[:, begin:end], experts))
        begin = end
    for name in ("computed", "applied", "outcome"):
        records[name] = np.concatenate([getattr(p, name) for p in parts], axis=1).ravel()


def _missed(events: list[LayerEvent], ids: list[np.ndarray], experts: int) -> np.ndarray:
    """Tells, flat as `_joined` does, which of the ids were missing."""
    if len(ids[0]) == 1:  # plain Python is faster than numpy for a few
        flat: list[bool] = []
        for event, layer in zip(events, ids, strict=True):
            missing = event.missing or ()
            flat += [expert in missing for expert in layer[0].tolist()]
        return np.array(flat)
    parts = []
    for event, layer in zip(events, ids, strict=True):
        table = np.zeros(max(experts, int(layer.max()) + 1), np.uint8)
        table[list(event.missing or ())] = 1
        parts.append(table[layer])
    return _joined(parts)
