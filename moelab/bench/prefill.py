"""`moelab bench prefill`: how long the first token takes with part of the experts in memory.

Each round draws a prompt of each length and times, in random order, stock mlx-lm twice (their
ratio is the noise) and a lab at each capacity, all in one process. A lab's bank is emptied first,
so this is a first prompt; the page cache is warm. The limit is stock's own time plus a bare read
of the bytes that the lab read; one that overlaps reading and computing can be under it.

A chunk of a prompt must read no expert twice, whatever the capacity: that is counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..display import size
from ..experts.residency import Load
from ..machine import Machine, this_machine
from . import pages
from .decode import LoadLog, warm
from .model import bench_folder
from .rounds import Contestant, Ratio, ratio, run_rounds

if TYPE_CHECKING:
    from ..lab import Lab

SHARES = (0.5, 0.25, 0.125)
"""Capacities that are measured."""

LENGTHS = (64, 256, 1024)
"""Tokens of the prompts."""

TARGET = 1.3
"""Times stock's that the first token may take."""


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """The first token of a prompt of one length at one capacity."""

    tokens: int
    share: float
    capacity: int
    stock_seconds: float
    """Median over rounds."""
    seconds: float
    """Median over rounds."""
    of_stock: Ratio
    """Time over stock's: 1 is as fast, 2 takes twice as long."""
    limit: Ratio
    """The limit's time over stock's."""
    stock_again: Ratio
    """Stock's second time over its first: the noise."""
    loads: float
    """Experts read for a prompt, all layers; mean over rounds."""
    bytes_read: float
    """Their bytes."""
    most_reads: int
    """How often an expert was read within one chunk, at most; 1 is right."""

    @property
    def verdict(self) -> str:
        """Whether the target was met, as far as the interval says."""
        if self.of_stock.high <= TARGET:
            return "met"
        return "missed" if self.of_stock.low > TARGET else "not certain"


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """What `bench_prefill` measured."""

    model: str
    rounds: int
    seed: int
    chunk: int
    """Prompt tokens a forward pass."""
    rows: list[PrefillRow]
    machine: Machine
    seconds: dict[str, list[float]] = field(repr=False)
    """Every contestant's time in every round, by length and contestant."""

    def page(self) -> str:
        """Returns the result as Markdown."""
        lines = [
            f"# The first token with part of the experts: {self.model}",
            "",
            f"{self.rounds} rounds in random order, exact, chunks of at most {self.chunk} tokens; "
            "times as multiples of stock mlx-lm's in the same round, medians with 95% bootstrap "
            "intervals over rounds. The bank is empty at first, the page cache warm. "
            + pages.machine_line(self.machine),
            "",
            "| prompt | experts in memory | stock | time ÷ stock | limit ÷ stock "
            f"| stock ÷ itself | read | most reads a chunk | target ≤ {TARGET} |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.tokens} tokens | {r.capacity} ({r.share:.1%}) | {r.stock_seconds:.3f} s "
            f"| {r.of_stock} | {r.limit} | {r.stock_again} "
            f"| {size(round(r.bytes_read))} in {r.loads:.0f} loads | {r.most_reads} | {r.verdict} |"
            for r in self.rows
        ]
        lines += [
            "",
            "Limit: stock's time plus a bare read of the bytes that the lab read in the same "
            "round. Most reads a chunk: how often one expert of one layer was read within one "
            "forward pass, at most.",
        ]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes `bench-prefill.md` and `bench-prefill.json`, each whole or not at all."""
        pages.save(self, "bench-prefill", folder)


class ChunkLog(LoadLog):
    """Notes loads, and how often each expert was read in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.chunk = 0
        self.reads: Counter[tuple[int, int, int]] = Counter()
        """By chunk, layer and expert."""

    def progress(self, done: int, total: int) -> None:
        """Told by mlx-lm after each chunk."""
        self.chunk += 1

    def loaded(self, layer: int, loads: Sequence[Load], seconds: Sequence[float]) -> None:
        """See `experts.bank.Watcher`."""
        super().loaded(layer, loads, seconds)
        self.reads.update((self.chunk, layer, load.expert) for load in loads)

    @property
    def most_reads(self) -> int:
        """How often an expert was read within one chunk, at most."""
        return max(self.reads.values(), default=0)


@contextmanager
def watching(lab: Lab, log: LoadLog) -> Iterator[None]:
    """Tells `log` of the lab's loads meanwhile."""
    watchers = lab.attachment.bank.watchers
    watchers.append(log)
    try:
        yield
    finally:
        watchers.remove(log)


def first_token_seconds(
    model: nn.Module, prompt: list[int], chunk: int, log: ChunkLog | None = None
) -> float:
    """Returns the seconds until mlx-lm's loop gives the first token, greedily."""
    from mlx_lm.generate import generate_step

    begin = time.perf_counter()
    steps = generate_step(
        mx.array(prompt), model, max_tokens=1, prefill_step_size=chunk,
        **({} if log is None else {"prompt_progress_callback": log.progress}),
    )  # fmt: skip
    next(steps)
    taken = time.perf_counter() - begin
    steps.close()
    return taken


def bench_prefill(
    name_or_path: str | Path = "lab",
    *,
    rounds: int = 7,
    lengths: Sequence[int] = LENGTHS,
    shares: Sequence[float] = SHARES,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PrefillResult:
    """Measures the time to the first token at several capacities against stock mlx-lm.

    Args:
        name_or_path: `"bench"` or what `moelab.load` takes; the whole model must fit in memory
            beside the labs.
        rounds: Rounds for each length; at least 5.
        lengths: Tokens of the prompts; at least 2.
        shares: Shares of the experts in memory.
        chunk: Prompt tokens a forward pass; None for the lab's own (as in mlx-lm).
        seed: Of the order and the prompts.
        progress: Show a bar.
    """
    import mlx_lm

    from ..lab import PREFILL_STEP
    from ..loading import load

    chunk = PREFILL_STEP if chunk is None else chunk
    machine = this_machine()
    folder = bench_folder(name_or_path, progress)
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    rows: list[PrefillRow] = []
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        labs = {share: stack.enter_context(load(folder, float(share))) for share in shares}
        warm(next(iter(labs.values())))
        for length in lengths:
            prompts = _prompts(tokenizer, rounds, length, seed)
            tallies = {share: _Tally(rounds) for share in shares}

            def stock(number: int, prompts: list[list[int]] = prompts) -> float:
                return first_token_seconds(model, prompts[number], chunk)

            contestants: dict[str, Contestant] = {"stock": stock, "stock again": stock}
            for share, lab in labs.items():
                contestants[f"{share:.1%}"] = _lab(lab, prompts, chunk, tallies[share])
            seconds = run_rounds(
                contestants, rounds, seed=seed, progress=progress, label=f"{length} tokens, "
            )
            for share, lab in labs.items():
                tally, taken = tallies[share], seconds[f"{share:.1%}"]
                rows.append(
                    PrefillRow(
                        tokens=length,
                        share=share,
                        capacity=lab.capacity,
                        stock_seconds=float(np.median(seconds["stock"])),
                        seconds=float(np.median(taken)),
                        of_stock=ratio(taken, seconds["stock"]),
                        limit=ratio(seconds["stock"] + tally.bare, seconds["stock"]),
                        stock_again=ratio(seconds["stock again"], seconds["stock"]),
                        loads=float(tally.loads.mean()),
                        bytes_read=float(tally.nbytes.mean()),
                        most_reads=int(tally.most_reads.max()),
                    )
                )
                times[f"{length} tokens, {share:.1%} bare read"] = tally.bare.tolist()
            times |= {f"{length} tokens, {n}": t.tolist() for n, t in seconds.items()}
    return PrefillResult(
        model=str(name_or_path),
        rounds=rounds,
        seed=seed,
        chunk=chunk,
        rows=rows,
        machine=machine,
        seconds=times,
    )


class _Tally:
    """What a lab read, by round."""

    def __init__(self, rounds: int) -> None:
        self.bare = np.zeros(rounds)
        self.loads = np.zeros(rounds)
        self.nbytes = np.zeros(rounds)
        self.most_reads = np.zeros(rounds, int)


def _lab(lab: Lab, prompts: list[list[int]], chunk: int, tally: _Tally) -> Contestant:
    loaders = {layer.layer: layer.loader for layer in lab.attachment.bank.layers}

    def run(number: int) -> float:
        lab.reset()
        log = ChunkLog()
        with watching(lab, log):
            taken = first_token_seconds(lab.model, prompts[number], chunk, log)
        tally.bare[number], tally.nbytes[number] = log.bare_read(loaders)
        tally.loads[number] = sum(log.reads.values())
        tally.most_reads[number] = log.most_reads
        return taken

    return run


def _prompts(tokenizer: Any, rounds: int, length: int, seed: int) -> list[list[int]]:
    """Returns a prompt for each round: as much of the shipped held-out texts as it takes."""
    from ..labmodel import texts

    pool = texts(split="calibration")
    random = np.random.default_rng([seed, length])
    prompts: list[list[int]] = []
    for _ in range(rounds):
        tokens: list[int] = []
        while len(tokens) < length:
            tokens += tokenizer.encode(pool[random.integers(len(pool))]["text"])
        prompts.append(tokens[:length])
    return prompts
