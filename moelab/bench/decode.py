"""`moelab bench decode`: what decoding with part of the experts costs, and what it must cost.

Contestants, all exact, in one process on the same prompts: two copies of stock mlx-lm (their
ratio is the noise), labs at several capacities with and without recording, and the limit of this
design. The limit has two parts that no implementation of it can avoid: a model that reads each
layer's expert ids back and does nothing else, and a bare read of the same bytes that the lab read
from disk in that round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..experts.residency import Load
from ..families import find_switches
from ..machine import Machine, this_machine
from . import pages
from .combinations import DEFAULT, Combination, combinations, load_combination
from .model import bench_folder
from .rounds import Contestant, Ratio, ratio, run_rounds

if TYPE_CHECKING:
    from ..experts.loader import ExpertLoader
    from ..lab import Lab

SHARES = (1.0, 0.5, 0.25, 0.125)
"""Capacities that are measured."""

PROMPT_TOKENS = 32
"""Tokens that are prefilled, untimed, before each measured run."""


@dataclass(frozen=True, slots=True)
class CapacityResult:
    """Decoding at one capacity with one policy and one miss action."""

    policy: str
    on_miss: str
    share: float
    capacity: int
    tokens_per_second: float
    """Median over rounds."""
    of_stock: Ratio
    """Speed over stock's."""
    of_limit: Ratio
    """Speed over the limit's: ids read back, which lossy actions need not, and the same bytes."""
    recording: Ratio | None
    """Speed while recording over speed while not; measured for the default policy and action."""
    hit_rate: float | None
    """Share of decode's loads that were avoided: 1 − loads ÷ routed slots. None where a miss is
    not loaded."""
    loads_per_token: float
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """What `bench_decode` measured."""

    model: str
    rounds: int
    tokens: int
    seed: int
    stock_tokens_per_second: float
    stock_again: Ratio
    """A second copy of stock against the first: the noise of this measurement."""
    read_back: Ratio
    """Speed of stock that reads every layer's ids back, over stock's."""
    capacities: list[CapacityResult]
    machine: Machine
    seconds: dict[str, list[float]] = field(repr=False)
    """Every contestant's time in every round. Stock runs again beside each policy and action."""

    def page(self) -> str:
        """Returns the result as Markdown."""
        several = len({(c.policy, c.on_miss) for c in self.capacities}) > 1
        plain = all((c.policy, c.on_miss) == DEFAULT for c in self.capacities)
        exact = all(c.on_miss == "load" for c in self.capacities)
        lines = [
            f"# Decoding with part of the experts: {self.model}",
            "",
            f"{self.rounds} rounds of {self.tokens} tokens in random order, greedy"
            + (", exact; medians " if exact else "; exact where a miss is loaded; medians ")
            + "of paired ratios with 95% bootstrap intervals over rounds. Page cache warm. "
            + pages.machine_line(self.machine),
            "",
            f"- stock mlx-lm: {self.stock_tokens_per_second:.1f} tokens/s",
            f"- a second copy of stock ÷ stock (the noise): {self.stock_again}",
            f"- stock that reads the ids of every layer back ÷ stock: {self.read_back}",
            "",
            ("" if plain else "| policy | on a miss ")
            + "| experts in memory | tokens/s | ÷ stock | ÷ limit "
            + ("| recording ÷ not " if plain else "")
            + "| hits | read a token |",
            "|---" * (7 if plain else 8) + "|",
        ]
        for c in self.capacities:
            lines.append(
                ("" if plain else f"| {c.policy} | {c.on_miss} ")
                + f"| {c.capacity} ({c.share:.1%}) | {c.tokens_per_second:.1f} | {c.of_stock} "
                + f"| {c.of_limit if c.share < 1 else '–'} "
                + (f"| {c.recording or '–'} " if plain else "")
                + (f"| {c.hit_rate:.1%} " if c.hit_rate is not None else "| – ")
                + f"| {c.bytes_per_token / 1e6:.2f} MB in {c.loads_per_token:.1f} loads |"
            )
        lines += [
            "",
            "Limit: stock that reads the ids of every layer back, plus a bare read of the bytes "
            "that the lab read in the same round. At all experts the layers are stock, and there "
            "is nothing to read.",
        ]
        if not exact:
            lines.append(
                "A lossy action waits for no ids: its limit is stock plus that bare read. It loads "
                "between tokens, as its swap budget allows. Speed says nothing about its quality."
            )
        if several:
            lines.append("Every policy and action was measured beside stock, in rounds of its own.")
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes `bench-decode.md` and `bench-decode.json`, each whole or not at all."""
        pages.save(self, "bench-decode", folder)


class ReadBack(nn.Module):
    """A stock switch that first reads its ids: the least that this design must do."""

    def __init__(self, switch: nn.Module) -> None:
        super().__init__()
        self.switch = switch

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Computes as the switch does, after one read-back."""
        mx.eval(indices)
        indices.tolist()
        return self.switch(x, indices)


class LoadLog:
    """Notes what a bank loads, so that the same bytes can be read bare."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, Sequence[Load]]] = []

    def loaded(self, layer: int, loads: Sequence[Load], seconds: Sequence[float]) -> None:
        """See `experts.bank.Watcher`."""
        self.entries.append((layer, loads))

    def bare_read(self, loaders: dict[int, ExpertLoader]) -> tuple[float, int]:
        """Reads the same bytes again, with nothing around it; returns seconds and bytes."""
        reads: list[tuple[int, list[Any], int]] = []
        buffers: dict[int, Any] = {}
        total = 0
        for layer, loads in self.entries:
            for load in loads:
                for fd, offset, nbytes in loaders[layer].pieces(load.expert):
                    buffer = buffers.setdefault(nbytes, np.empty(nbytes, np.uint8).data)
                    reads.append((fd, [buffer], offset))
                    total += nbytes
        begin = time.perf_counter()
        for fd, into, offset in reads:
            os.preadv(fd, into, offset)
        return time.perf_counter() - begin, total


def decode_seconds(model: nn.Module, prompt: list[int], tokens: int) -> float:
    """Prefills a prompt and returns the seconds that decoding `tokens` more takes, greedily."""
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(prompt), model, max_tokens=tokens + 1)
    next(steps)
    begin = time.perf_counter()
    for _ in steps:
        pass
    return time.perf_counter() - begin


def bench_decode(
    name_or_path: str | Path = "lab",
    *,
    rounds: int = 15,
    tokens: int = 64,
    shares: Sequence[float] = SHARES,
    policies: str | Sequence[str] = DEFAULT.policy,
    on_miss: str | Sequence[str] = DEFAULT.on_miss,
    seed: int = 0,
    progress: bool = True,
) -> DecodeResult:
    """Measures decoding at several capacities against stock mlx-lm.

    Args:
        name_or_path: `"bench"` or what `moelab.load` takes; the whole model must fit in memory
            three times beside the labs of one policy and action.
        rounds: Rounds; at least 15 for intervals worth quoting.
        tokens: Decoded tokens a round.
        shares: Shares of the experts in memory. All of them are measured with the default policy
            and action only, since there is nothing to replace.
        policies: Names, or `"all"`.
        on_miss: Names of miss actions, or `"all"`; each is measured with each policy.
        seed: Of the order and the prompts.
        progress: Show a bar.
    """
    import mlx_lm

    wanted = combinations(policies, on_miss)
    machine = this_machine()
    folder = bench_folder(name_or_path, progress)
    first, tokenizer = mlx_lm.load(str(folder))[:2]
    second = mlx_lm.load(str(folder))[0]
    reading = mlx_lm.load(str(folder))[0]
    for site in find_switches(reading, "stock"):
        site.parent[site.key] = ReadBack(site.switch)
    prompts = _prompts(tokenizer, rounds, seed)

    def plain(model: nn.Module) -> Contestant:
        return lambda number: decode_seconds(model, prompts[number], tokens)

    stock = {"stock": plain(first), "stock again": plain(second), "ids read back": plain(reading)}
    results: list[CapacityResult] = []
    all_seconds: dict[str, list[float]] = {}
    every: dict[str, list[np.ndarray]] = {name: [] for name in stock}
    for combination in wanted:
        # One after another, so that the labs of only one are in memory.
        default = combination == DEFAULT
        label = "" if len(wanted) == 1 else f"{combination.policy}, {combination.on_miss}: "
        measured, seconds = _measure(
            folder,
            combination,
            [share for share in shares if default or share < 1],
            stock,
            prompts,
            tokens,
            seed=seed,
            progress=progress,
            label=label,
        )
        results += measured
        all_seconds |= {label + name: times.tolist() for name, times in seconds.items()}
        for name in stock:
            every[name].append(seconds[name])
    whole = {name: np.concatenate(times) for name, times in every.items()}
    return DecodeResult(
        model=str(name_or_path),
        rounds=rounds,
        tokens=tokens,
        seed=seed,
        stock_tokens_per_second=tokens / float(np.median(whole["stock"])),
        stock_again=ratio(whole["stock"], whole["stock again"]),
        read_back=ratio(whole["stock"], whole["ids read back"]),
        capacities=results,
        machine=machine,
        seconds=all_seconds,
    )


def _measure(
    folder: Path,
    combination: Combination,
    shares: Sequence[float],
    stock: dict[str, Contestant],
    prompts: list[list[int]],
    tokens: int,
    *,
    seed: int,
    progress: bool,
    label: str,
) -> tuple[list[CapacityResult], dict[str, np.ndarray]]:
    """Measures one policy and action at every capacity, beside stock."""
    rounds = len(prompts)
    contestants = dict(stock)
    with ExitStack() as stack:
        labs: dict[float, Lab] = {}
        bare: dict[float, np.ndarray] = {}
        counts: dict[float, np.ndarray] = {}
        for share in shares:
            labs[share] = stack.enter_context(load_combination(folder, share, combination))
            bare[share], counts[share] = np.zeros(rounds), np.zeros((rounds, 2))
            contestants[f"{share:.1%}"] = _logged(
                labs[share], prompts, tokens, bare[share], counts[share]
            )
            if combination == DEFAULT:
                recorded = stack.enter_context(load_combination(folder, share, combination))
                contestants[f"{share:.1%} recording"] = _recorded(recorded, prompts, tokens)
        if labs:
            warm(labs[shares[0]])
        seconds = run_rounds(contestants, rounds, seed=seed, progress=progress, label=label)
        results = []
        for share, lab in labs.items():
            taken, loads = seconds[f"{share:.1%}"], float(counts[share][:, 0].mean())
            limit = seconds["stock" if combination.lossy else "ids read back"] + bare[share]
            routed = tokens * sum(site.top_k for site in lab.sites)
            recording = seconds.get(f"{share:.1%} recording")
            results.append(
                CapacityResult(
                    policy=combination.policy,
                    on_miss=combination.on_miss,
                    share=share,
                    capacity=lab.capacity,
                    tokens_per_second=tokens / float(np.median(taken)),
                    of_stock=ratio(seconds["stock"], taken),
                    of_limit=ratio(limit, taken),
                    recording=None if recording is None else ratio(taken, recording),
                    hit_rate=None if combination.lossy else 1 - loads / routed,
                    loads_per_token=loads / tokens,
                    bytes_per_token=float(counts[share][:, 1].mean()) / tokens,
                )
            )
    seconds |= {f"{share:.1%} bare read": times for share, times in bare.items()}
    return results, seconds


def _logged(
    lab: Lab, prompts: list[list[int]], tokens: int, bare: np.ndarray, counts: np.ndarray
) -> Contestant:
    """A lab; after each run, untimed, the bytes of its decoding loads are read bare."""
    bank = lab.attachment.bank
    loaders = {layer.layer: layer.loader for layer in bank.layers}

    def run(number: int) -> float:
        from mlx_lm.generate import generate_step

        steps = generate_step(mx.array(prompts[number]), lab.model, max_tokens=tokens + 1)
        next(steps)
        log = LoadLog()
        bank.watchers.append(log)
        begin = time.perf_counter()
        for _ in steps:
            pass
        taken = time.perf_counter() - begin
        bank.watchers.remove(log)
        bare[number], read = log.bare_read(loaders)
        counts[number] = sum(len(loads) for _, loads in log.entries), read
        return taken

    return run


def _recorded(lab: Lab, prompts: list[list[int]], tokens: int) -> Contestant:
    def run(number: int) -> float:
        with lab.record():
            return decode_seconds(lab.model, prompts[number], tokens)

    return run


def _prompts(tokenizer: Any, rounds: int, seed: int) -> list[list[int]]:
    """Returns a prompt for each round, from the shipped held-out texts."""
    from ..labmodel import texts

    pool = texts(split="calibration")
    random = np.random.default_rng(seed)
    chosen = random.choice(len(pool), size=rounds, replace=len(pool) < rounds)
    return [tokenizer.encode(pool[i]["text"])[:PROMPT_TOKENS] for i in chosen]


def warm(lab: Lab) -> None:
    """Brings the checkpoint's pages into the page cache before anything is timed."""
    for path in lab.shards:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
