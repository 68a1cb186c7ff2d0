"""How fast experts come from disk into slots on this machine, and what one miss costs.

Experts are read as moelab reads them, each tensor's row by a `preadv` straight into memory that
MLX owns, by 1, 2, 4 and 8 threads. Before each measurement the page cache is asked which share of
the bytes it already holds, and that share is reported with the speed: "cold" and "warm" are what
was found, not what was hoped for.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError
from ..experts.bank import Bank, LayerBank
from ..experts.policies import LRU
from ..experts.residency import Load
from .model import OpenLayer, OpenModel
from .pagecache import Piece, cached_share, drop

THREADS = (1, 2, 4, 8)
ROUNDS = 5
GROUP_BYTES = 256 << 20
"""At most so much is read in one measurement."""
GROUP_EXPERTS = 64
"""And at most so many experts."""
SINGLE_MISSES = 16
"""Experts that are read one by one."""

State = Literal["cold", "warm", "partly cached", "unknown"]


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of several measurements and how far they lie apart."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarises at least one value."""
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True)
class ReadRate:
    """One way of reading experts."""

    threads: int
    wanted: Literal["cold", "warm"]
    """What the page cache was made ready for, where it can be."""
    cached: float | None
    """Share of the bytes that the page cache held before: the median; None if not known."""
    experts: int
    nbytes: int
    """Bytes read each time."""
    gb_per_second: Spread

    @property
    def state(self) -> State:
        """What the page cache was found to be."""
        if self.cached is None:
            return "unknown"
        if self.cached <= 0.1:
            return "cold"
        return "warm" if self.cached >= 0.9 else "partly cached"


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What was found."""

    expert_bytes: int
    """Bytes of one expert on disk."""
    pieces: int
    """Byte ranges that make up one expert."""
    rates: list[ReadRate]
    copy_gb_per_second: Spread
    """From ordinary memory into memory that MLX owns, one thread."""
    miss_warm_ms: Spread
    """One expert into its slot by moelab's own loader, page cache warm."""
    miss_cold_ms: Spread | None
    """The same, page cache cold; None where it could not be made cold, or that is not known."""
    token_warm_ms: Spread
    """All top-k experts of a token into the slots of one layer, page cache warm."""


def measure_bandwidth(model: OpenModel, progress: Callable[[], None]) -> Bandwidth:
    """Reads experts of an opened model.

    Args:
        model: The model; nothing of it stays in memory.
        progress: Called after each of `len(THREADS) + 1` parts.

    Raises:
        CheckpointError: If a file cannot be read or is too short.
    """
    groups = _groups(model)
    rates: list[ReadRate] = []
    nbytes = max(sum(p.nbytes for expert in g for p in expert) for g in islice(groups, 1))
    with _Slots(nbytes * 2) as slots:
        for threads in THREADS:
            # Each cold reading is of other experts: where nothing can be dropped from the page
            # cache, these may at least not have been read before.
            rates.append(_rate(groups, slots, threads, "cold"))
            rates.append(_rate(groups, slots, threads, "warm"))
            progress()
        copied = _copy_rate(slots, nbytes)
    layer = model.layers[len(model.layers) // 2]
    warm, cold, token = _misses(layer)
    progress()
    return Bandwidth(
        expert_bytes=model.facts.expert_bytes,
        pieces=len(expert_pieces(layer, 0)),
        rates=sorted(rates, key=lambda rate: (rate.wanted, rate.threads)),
        copy_gb_per_second=copied,
        miss_warm_ms=warm,
        miss_cold_ms=cold,
        token_warm_ms=token,
    )


def expert_pieces(layer: OpenLayer, expert: int) -> list[Piece]:
    """Returns where an expert's bytes are."""
    pieces = []
    for spans in layer.origins.values():
        if len(spans) == 1:
            row = spans[0].nbytes // layer.experts
            step = spans[0].stride or row  # in a pack file the rest of an expert lies between
            pieces.append(Piece(spans[0].path, spans[0].offset + expert * step, row))
        else:
            pieces.append(Piece(spans[expert].path, spans[expert].offset, spans[expert].nbytes))
    return pieces


def _groups(model: OpenModel) -> Iterator[list[list[Piece]]]:
    """Yields groups of experts to read, in random order; starts again when all were had."""
    rng = np.random.default_rng(0)
    every = [(layer, e) for layer in model.layers for e in range(layer.experts)]
    order = [every[i] for i in rng.permutation(len(every))]
    count = min(GROUP_EXPERTS, len(order), max(8, GROUP_BYTES // model.facts.expert_bytes))
    endless = cycle(order)
    while True:
        yield [expert_pieces(layer, expert) for layer, expert in islice(endless, count)]


class _Slots:
    """Memory of MLX's to read into, seen as bytes."""

    def __init__(self, nbytes: int) -> None:
        self.array = mx.ones((nbytes,), mx.uint8)  # ones, so that every page exists
        mx.eval(self.array)
        self.view = np.array(self.array, copy=False)

    def __enter__(self) -> np.ndarray:
        return self.view

    def __exit__(self, *_: object) -> None:
        del self.view, self.array
        mx.clear_cache()


def _rate(
    groups: Iterator[list[list[Piece]]],
    slots: np.ndarray,
    threads: int,
    wanted: Literal["cold", "warm"],
) -> ReadRate:
    speeds, cached = [], []
    experts = nbytes = 0
    for _ in range(ROUNDS):
        group = next(groups)
        pieces = [piece for expert in group for piece in expert]
        if wanted == "cold":
            drop(pieces)
        else:
            _read(group, slots, threads)
        cached.append(cached_share(pieces))
        seconds = _read(group, slots, threads)
        experts, nbytes = len(group), sum(piece.nbytes for piece in pieces)
        speeds.append(nbytes / seconds / 1e9)
    known = [share for share in cached if share is not None]
    share = statistics.median(known) if len(known) == ROUNDS else None
    return ReadRate(threads, wanted, share, experts, nbytes, Spread.of(speeds))


def _read(group: list[list[Piece]], slots: np.ndarray, threads: int) -> float:
    """Reads a group of experts with so many threads; returns the seconds that it took."""
    jobs, at = [], 0
    for pieces in group:
        jobs.append((pieces, at))
        at += sum(piece.nbytes for piece in pieces)
    # Handed out once and not one by one, which would cost more than reading a small expert.
    shares = [jobs[i::threads] for i in range(threads)]
    files = {path: os.open(path, os.O_RDONLY) for path in {p.path for e in group for p in e}}

    def read(share: list[tuple[list[Piece], int]]) -> None:
        for pieces, start in share:
            at = start
            for piece in pieces:
                _fill(files, piece, slots[at : at + piece.nbytes])
                at += piece.nbytes

    try:
        with ThreadPoolExecutor(threads) as pool:
            # Starts the threads, so that this is not timed.
            list(pool.map(time.sleep, [0.001] * threads))
            begin = time.perf_counter()
            list(pool.map(read, shares))
            return time.perf_counter() - begin
    finally:
        for fd in files.values():
            os.close(fd)


def _fill(files: dict[Path, int], piece: Piece, row: np.ndarray) -> None:
    got = 0
    while got < piece.nbytes:
        try:
            more = os.preadv(files[piece.path], [row[got:].data], piece.offset + got)
        except OSError as error:
            raise CheckpointError(f"Reading {piece.path}: {error}") from error
        if more == 0:
            raise CheckpointError(f"{piece.path} ended while an expert was read from it.")
        got += more


def _copy_rate(slots: np.ndarray, nbytes: int) -> Spread:
    source = np.ones(nbytes, np.uint8)
    speeds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        np.copyto(slots[:nbytes], source)
        speeds.append(nbytes / (time.perf_counter() - begin) / 1e9)
    return Spread.of(speeds)


def _misses(layer: OpenLayer) -> tuple[Spread, Spread | None, Spread]:
    """Times moelab's own loader: one expert warm, one cold, one token's experts warm."""
    bank = Bank()
    top_k = layer.site.top_k
    try:
        slots = LayerBank(bank, layer.site, top_k, LRU(), layer.origins)
        rng = np.random.default_rng(1)
        chosen = rng.permutation(layer.experts)[:SINGLE_MISSES].tolist()
        slots.loader.read([Load(0, 0, None)])
        warm, cold = [], []
        for expert in chosen:
            pieces = expert_pieces(layer, expert)
            drop(pieces)
            was_cold = (share := cached_share(pieces)) is not None and share <= 0.1
            first = _timed(slots, [Load(expert, 0, None)])
            if was_cold:
                cold.append(first)
            warm.append(_timed(slots, [Load(expert, 0, None)]))
        loads = [Load(e, slot, None) for slot, e in enumerate(chosen[:top_k])]
        token = [_timed(slots, loads) for _ in range(2 * ROUNDS)]
        all_cold = Spread.of(cold) if len(cold) == len(chosen) else None
        return Spread.of(warm), all_cold, Spread.of(token)
    finally:
        bank.close()


def _timed(slots: LayerBank, loads: Sequence[Load]) -> float:
    begin = time.perf_counter()
    slots.loader.read(loads)
    return (time.perf_counter() - begin) * 1e3
