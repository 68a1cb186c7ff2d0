"""`moelab bench swap`: what filling one slot costs, against the number of slots C.

An expert is read straight into its slot, so the cost should not depend on C; a bank that made a
new array for every change would copy all C experts. Two things are timed, since a lazy copy would
hide in the second: the fill alone, and the fill with the first computation that uses the slot.

In each round every C is measured, in random order, on the same experts; the median of a round's
fills counts, so that one that the system interrupted does not. A straight line through a
round's points gives how much more a fill costs at the largest C than at the smallest; the median
of that over rounds, with its interval, is the verdict. Page cache warm.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from ..display import size
from ..experts.residency import Load
from ..machine import Machine, this_machine
from . import pages
from .decode import warm
from .model import BENCH_MODEL, bench_folder
from .rounds import Contestant, Interval, median_interval, run_rounds

if TYPE_CHECKING:
    from ..experts.bank import LayerBank
    from ..families import SwitchSite

FLAT = 0.1
"""A cost that changes by less than this share from the smallest to the largest C is flat."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How a cost changes with C."""

    microseconds: list[float]
    """Median cost of one slot, for each C."""
    slope: Interval
    """Microseconds more for each further slot."""
    growth: Interval
    """Of the fitted line: cost at the largest C over cost at the smallest, minus 1."""

    @property
    def verdict(self) -> str:
        """Whether the cost grows, as far as the interval says."""
        if self.growth.low > FLAT:
            return "grows with C"
        if self.growth.high >= FLAT:
            return "not certain"
        return "flat" if self.growth.low > -FLAT else "does not grow"


@dataclass(frozen=True, slots=True)
class SwapResult:
    """What `bench_swap` measured."""

    model: str
    rounds: int
    fills: int
    """Fills of one capacity in one round."""
    seed: int
    experts: int
    expert_bytes: int
    """Read for one expert."""
    capacities: list[int]
    fill: Growth
    use: Growth
    """The fill and the first computation that uses it."""
    machine: Machine
    seconds: dict[str, list[float]] = field(repr=False)
    """Every contestant's time in every round: the median of its fills."""

    def page(self) -> str:
        """Returns the result as Markdown."""
        lines = [
            f"# Filling one slot against the number of slots: {self.model}",
            "",
            f"{self.rounds} rounds of {self.fills} fills in random order, one expert of "
            f"{size(self.expert_bytes)} each, page cache warm; medians, with 95% bootstrap "
            "intervals over rounds. If a fill rewrote all C slots, its cost would grow "
            f"{self.capacities[-1] / self.capacities[0]:.0f}-fold. "
            + pages.machine_line(self.machine),
            "",
            "| C | a fill | GB/s | a fill and its first use |",
            "|---|---|---|---|",
        ]
        for c, fill, use in zip(
            self.capacities, self.fill.microseconds, self.use.microseconds, strict=True
        ):
            speed = self.expert_bytes / fill / 1e3
            lines.append(
                f"| {c} of {self.experts} | {fill:,.1f} µs | {speed:.2f} | {use:,.1f} µs |"
            )
        for name, found in (("A fill", self.fill), ("A fill and its first use", self.use)):
            lines += [
                "",
                f"{name}: {found.verdict}. From C = {self.capacities[0]} to "
                f"{self.capacities[-1]} it changes by {100 * found.growth.median:+.1f}% "
                f"[{100 * found.growth.low:+.1f}%, {100 * found.growth.high:+.1f}%] "
                f"({found.slope.median:+.3f} [{found.slope.low:+.3f}, {found.slope.high:+.3f}] µs "
                "a slot).",
            ]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes `bench-swap.md` and `bench-swap.json`, each whole or not at all."""
        pages.save(self, "bench-swap", folder)


def capacities_for(top_k: int, experts: int) -> list[int]:
    """Returns the C that are measured: from top-k up by doubling, to one under all experts.

    With all experts a layer is stock, and no slot is ever filled.
    """
    found = [top_k]
    while 2 * found[-1] < experts - 1:
        found.append(2 * found[-1])
    return found if found[-1] == experts - 1 else [*found, experts - 1]


def growth(capacities: Sequence[int], microseconds: np.ndarray) -> Growth:
    """Fits a line to each round's costs over C, by least squares.

    Args:
        capacities: Ascending.
        microseconds: Cost of one slot, float64 (rounds, capacities).
    """
    c = np.asarray(capacities, float)
    away = c - c.mean()
    slopes = (microseconds * away).sum(axis=1) / (away**2).sum()
    first = microseconds.mean(axis=1) + slopes * away[0]
    return Growth(
        microseconds=np.median(microseconds, axis=0).tolist(),
        slope=median_interval(slopes),
        growth=median_interval(slopes * (c[-1] - c[0]) / first),
    )


def bench_swap(
    name_or_path: str | Path = BENCH_MODEL,
    *,
    rounds: int = 15,
    fills: int = 32,
    capacities: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SwapResult:
    """Measures what filling one slot costs at several capacities.

    Args:
        name_or_path: `"bench"` or what `moelab.load` takes. All the banks are in memory at once,
            which together takes about twice the model.
        rounds: Rounds; at least 15 for intervals worth quoting.
        fills: Fills of each capacity in a round.
        capacities: C to measure; None doubles from top-k up.
        seed: Of the order and of the experts.
        progress: Show a bar.
    """
    from ..loading import load

    machine = this_machine()
    folder = bench_folder(name_or_path, progress)
    with ExitStack() as stack:
        layers: dict[int, LayerBank] = {}
        if capacities is None:
            with load(folder, 0.5) as lab:
                capacities = capacities_for(lab.sites[0].top_k, lab.sites[0].experts)
        for c in capacities:
            lab = stack.enter_context(load(folder, int(c)))
            layers[c] = lab.attachment.bank.layers[0]
        warm(lab)
        site = lab.sites[0]
        random = np.random.default_rng(seed)
        # The same experts for every C; slots in turn, so that every slot is used.
        experts = [random.integers(site.experts, size=fills).tolist() for _ in range(rounds)]
        contestants: dict[str, Contestant] = {}
        for c, layer in layers.items():
            contestants[f"C={c} fill"] = _fills(layer, experts)
            contestants[f"C={c} fill and use"] = _uses(layer, experts, site)
        seconds = run_rounds(contestants, rounds, seed=seed, progress=progress)

        def costs(kind: str) -> np.ndarray:
            return np.stack([seconds[f"C={c} {kind}"] for c in layers], axis=1) * 1e6

        return SwapResult(
            model=str(name_or_path),
            rounds=rounds,
            fills=fills,
            seed=seed,
            experts=site.experts,
            expert_bytes=layers[capacities[0]].loader.expert_disk_bytes,
            capacities=list(capacities),
            fill=growth(capacities, costs("fill")),
            use=growth(capacities, costs("fill and use")),
            machine=machine,
            seconds={name: times.tolist() for name, times in seconds.items()},
        )


def _fills(layer: LayerBank, experts: list[list[int]]) -> Contestant:
    """Fills slots with a round's experts, one after another; nothing else is in flight."""

    def run(number: int) -> float:
        taken = []
        for i, expert in enumerate(experts[number]):
            load = [Load(expert, i % layer.capacity, None)]
            begin = time.perf_counter()
            layer.loader.read(load)
            taken.append(time.perf_counter() - begin)
        return float(np.median(taken))

    return run


def _uses(layer: LayerBank, experts: list[list[int]], site: SwitchSite) -> Contestant:
    """Fills a slot, then lets one token use it and the next top-k − 1, over and over."""
    width = next(iter(site.projections.values())).input_dims
    x = mx.random.normal((1, 1, width), key=mx.random.key(0))
    mx.eval(x)

    def run(number: int) -> float:
        taken = []
        for i, expert in enumerate(experts[number]):
            slots = mx.array([[[(i + k) % layer.capacity for k in range(site.top_k)]]], mx.uint32)
            mx.eval(slots)
            begin = time.perf_counter()
            layer.loader.read([Load(expert, i % layer.capacity, None)])
            mx.eval(layer.switch(x, slots))
            taken.append(time.perf_counter() - begin)
        return float(np.median(taken))

    return run
