"""`moelab bench load`: how fast experts come from disk into slots, against a bare read.

One layer's bank is filled with experts drawn at random, by moelab's own loader and by nothing but
`os.preadv` of the same byte ranges into memory of the same size, by the same number of threads:
from the checkpoint itself and from a pack file, with the page cache cold and warm. Both read the
same experts in the same round.

Warm means that the ranges were *read* before, after having been dropped: pages that are in memory
because the file was just written may be held in smaller pieces, which are slower to copy.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from ..check.pagecache import Piece, cached_share, drop
from ..display import size
from ..errors import CheckpointError
from ..experts.bank import Bank, LayerBank
from ..experts.loader import ExpertLoader
from ..experts.policies import LRU
from ..experts.readers import Files
from ..experts.residency import Load
from ..experts.source import Origins, find_origins
from ..machine import Machine, this_machine
from .model import BENCH_MODEL, bench_folder
from .rounds import Contestant, Ratio, ratio, run_rounds

THREADS = (1, 2, 4, 8)
"""Numbers of reading threads that are measured."""

EXPERTS = 64
"""Experts an event, or half of the layer's."""

State = Literal["cold", "warm"]


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One way of reading."""

    source: str
    """"checkpoint" or "pack file"."""
    cache: State
    """The page cache before each read."""
    threads: int
    gb_per_second: float
    """Of the loader: median over rounds."""
    raw_gb_per_second: float
    """Of the bare read with as many threads."""
    of_raw: Ratio
    """Speed over the bare read's with as many threads."""
    of_best_raw: Ratio
    """Speed over that of the bare read with the number of threads that suits it best."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What `bench_load` measured."""

    model: str
    rounds: int
    seed: int
    experts: int
    """Experts an event."""
    expert_bytes: int
    ranges: dict[str, int]
    """Byte ranges of one expert, by source."""
    cold_cached: float | None
    """Largest share of the bytes that was in memory before a cold read; None if nobody knows."""
    rows: list[LoadRow]
    machine: Machine
    seconds: dict[str, list[float]] = field(repr=False)
    """Every contestant's time in every round."""

    @property
    def was_cold(self) -> bool:
        """Whether the page cache was known to be cold when it was meant to be."""
        return self.cold_cached is not None and self.cold_cached <= 0.1

    def page(self) -> str:
        """Returns the result as Markdown."""
        m = self.machine
        ranges = ", ".join(f"{n} in the {source}" for source, n in self.ranges.items())
        lines = [
            f"# Experts from disk into slots: {self.model}",
            "",
            f"{self.rounds} rounds in random order, {self.experts} experts of "
            f"{size(self.expert_bytes)} each time, drawn anew each round; byte ranges an expert: "
            f"{ranges}. Medians; ratios are paired by round, with 95% bootstrap intervals. "
            f"{m.chip}, {m.cores} cores, {m.system}, MLX on {m.backend}, mlx {m.versions['mlx']}; "
            f"other programs used {m.busy:.0%} of the processor just before.",
            "",
            "| read from | page cache | threads | loader GB/s | raw GB/s | loader ÷ raw "
            "| loader ÷ best raw |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            if row.cache == "warm" or self.was_cold:
                lines.append(
                    f"| {row.source} | {row.cache} | {row.threads} | {row.gb_per_second:.2f} "
                    f"| {row.raw_gb_per_second:.2f} | {row.of_raw} | {row.of_best_raw} |"
                )
        lines += [
            "",
            "Raw: `os.preadv` of the same ranges, one call each, by as many threads; best raw: by "
            "the number of threads that suits it best.",
        ]
        if not self.was_cold:
            known = (
                "whether it did cannot be known here"
                if self.cold_cached is None
                else f"up to {self.cold_cached:.0%} of the bytes stayed in it"
            )
            lines += ["", f"Cold is not shown: the page cache was asked to forget, and {known}."]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes `bench-load.md` and `bench-load.json`, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in {
            "bench-load.md": self.page() + "\n",
            "bench-load.json": json.dumps(asdict(self), indent=1) + "\n",
        }.items():
            made = folder / f".{name}.{os.getpid()}"
            made.write_text(text)
            made.replace(folder / name)


def bench_load(
    name_or_path: str | Path = BENCH_MODEL,
    *,
    rounds: int = 15,
    threads: Sequence[int] = THREADS,
    seed: int = 0,
    progress: bool = True,
) -> LoadResult:
    """Measures how fast experts are read into slots, against a bare read of the same bytes.

    A pack file is made if there is none.

    Args:
        name_or_path: `"bench"`, which is made on demand, or see `moelab.load`.
        rounds: Rounds; at least 15 for intervals worth quoting.
        threads: Numbers of reading threads.
        seed: Of the order and the experts.
        progress: Show bars.

    Raises:
        CheckpointError: If the model or its pack file cannot be read or made.
    """
    machine = this_machine()
    folder = bench_folder(name_or_path, progress)
    with ExitStack() as stack:
        layer, sources = _open(folder)
        stack.callback(layer.bank.close)
        chosen = _choose(layer, rounds, seed)
        contestants: dict[str, Contestant] = {}
        cached: list[float | None] = []
        ranges: dict[str, int] = {}
        # The same kind of memory as the slots, every page of which exists.
        held = mx.ones((len(chosen[0]) * layer.loader.expert_disk_bytes,), mx.uint8)
        mx.eval(held)
        buffer = np.array(held, copy=False)
        for source, origins in sources.items():
            for number in threads:
                files = Files(number)
                stack.callback(files.close)
                loader = _loader(layer, origins, files)
                ranges[source] = len(loader.pieces(0))
                pool = stack.enter_context(ThreadPoolExecutor(number))
                list(pool.map(time.sleep, [0.001] * number))  # the threads are there before
                states: tuple[State, ...] = ("cold", "warm")
                for state in states:
                    prepare = _prepare(loader, state, chosen, cached)
                    name = f"{source}, {state}, {number}"
                    contestants[name] = _by_loader(loader, chosen, prepare)
                    contestants[f"{name}, raw"] = _bare(
                        loader, chosen, prepare, pool, number, buffer
                    )
        seconds = run_rounds(contestants, rounds, seed=seed, progress=progress)
    nbytes = len(chosen[0]) * layer.loader.expert_disk_bytes
    known = [share for share in cached if share is not None]
    return LoadResult(
        model=str(name_or_path),
        rounds=rounds,
        seed=seed,
        experts=len(chosen[0]),
        expert_bytes=layer.loader.expert_disk_bytes,
        ranges=ranges,
        cold_cached=max(known) if known and len(known) == len(cached) else None,
        rows=_rows(seconds, list(sources), threads, nbytes),
        machine=machine,
        seconds={name: times.tolist() for name, times in seconds.items()},
    )


def _rows(
    seconds: dict[str, np.ndarray], sources: Sequence[str], threads: Sequence[int], nbytes: int
) -> list[LoadRow]:
    """Sums up: a row for each source, state of the page cache and number of threads."""
    rows = []
    states: tuple[State, ...] = ("cold", "warm")
    for source in sources:
        for state in states:
            raw = {n: seconds[f"{source}, {state}, {n}, raw"] for n in threads}
            best = min(raw.values(), key=lambda times: float(np.median(times)))
            for n in threads:
                taken = seconds[f"{source}, {state}, {n}"]
                rows.append(
                    LoadRow(
                        source=source,
                        cache=state,
                        threads=n,
                        gb_per_second=nbytes / float(np.median(taken)) / 1e9,
                        raw_gb_per_second=nbytes / float(np.median(raw[n])) / 1e9,
                        of_raw=ratio(raw[n], taken),
                        of_best_raw=ratio(best, taken),
                    )
                )
    return rows


def _open(folder: Path) -> tuple[LayerBank, dict[str, Origins]]:
    """Returns the bank of a layer in the middle, and where its experts can be read from."""
    from ..checkpoint.headers import read_headers
    from ..checkpoint.provenance import load_traced
    from ..families import find_switches

    spans = read_headers(folder)
    model, config, trace = load_traced(folder)
    sites = find_switches(model, config["model_type"])
    site = sites[len(sites) // 2]
    sources: dict[str, Origins] = {}
    with suppress(CheckpointError):  # some families can be read from a pack file only
        sources["checkpoint"] = find_origins(folder, [site], trace, spans, packed=False)[0]
    sources["pack file"] = find_origins(folder, [site], trace, spans, packed=True)[0]
    capacity = max(site.top_k, min(EXPERTS, site.experts // 2))
    return LayerBank(Bank(), site, capacity, LRU(), sources["pack file"]), sources


def _choose(layer: LayerBank, rounds: int, seed: int) -> list[list[Load]]:
    """Draws the experts of each round, in ascending order as the bank asks, and their slots."""
    random = np.random.default_rng(seed)
    chosen = []
    for _ in range(rounds):
        experts = sorted(random.permutation(layer.experts)[: layer.capacity].tolist())
        slots = random.permutation(layer.capacity).tolist()
        chosen.append([Load(e, slot, None) for e, slot in zip(experts, slots, strict=True)])
    return chosen


def _loader(layer: LayerBank, origins: Origins, files: Files) -> ExpertLoader:
    """A loader into the layer's slots, from elsewhere and with threads of its own."""
    rows = {tensor.name: tensor for tensor in layer.loader.tensors}
    return ExpertLoader(
        files, {key: replace(rows[".".join(key)], spans=spans) for key, spans in origins.items()}
    )


def _prepare(
    loader: ExpertLoader, state: State, chosen: list[list[Load]], cached: list[float | None]
) -> Callable[[int], None]:
    """Makes the page cache what it is to be before a read of a round's experts."""
    read_before: set[int] = set()

    def prepare(number: int) -> None:
        loads = chosen[number]
        pieces = [
            Piece(path, offset, tensor.disk_bytes)
            for load in loads
            for tensor in loader.tensors
            for path, offset in [tensor.place(load.expert)]
        ]
        if state == "cold" or number not in read_before:
            drop(pieces)
        read_before.add(number)
        if state == "cold":
            cached.append(cached_share(pieces))
        else:
            loader.read(loads)

    return prepare


def _by_loader(
    loader: ExpertLoader, chosen: list[list[Load]], prepare: Callable[[int], None]
) -> Contestant:
    def run(number: int) -> float:
        prepare(number)
        begin = time.perf_counter()
        loader.read(chosen[number])
        return time.perf_counter() - begin

    return run


def _bare(
    loader: ExpertLoader,
    chosen: list[list[Load]],
    prepare: Callable[[int], None],
    pool: ThreadPoolExecutor,
    threads: int,
    buffer: np.ndarray,
) -> Contestant:
    def read(share: list[tuple[int, memoryview, int]]) -> None:
        for fd, into, offset in share:
            if os.preadv(fd, [into], offset) != len(into):
                raise CheckpointError(f"A bare read at byte {offset} came back short.")

    def run(number: int) -> float:
        prepare(number)
        jobs = []
        at = 0
        for load in chosen[number]:
            for fd, offset, nbytes in loader.pieces(load.expert):
                jobs.append((fd, buffer[at : at + nbytes].data, offset))
                at += nbytes
        # Handed out once and not one by one: nothing but the reads is to cost time.
        shares = [jobs[i::threads] for i in range(threads)]
        begin = time.perf_counter()
        if threads == 1:
            read(jobs)
        else:
            list(pool.map(read, shares))
        return time.perf_counter() - begin

    return run
