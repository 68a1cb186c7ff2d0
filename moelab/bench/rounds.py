"""Paired measurement: every contestant once a round, in random order, compared within the round.

Machines drift: other work, heat, caches. Contestants that run within a second of one another see
the same machine, so times are compared inside a round and only the ratios are summed up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
"""Bootstrap resamples of the rounds."""

Contestant = Callable[[int], float]
"""Runs one round, given its number, and returns the seconds that count."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A median over rounds with its 95% bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


Ratio = Interval
"""A median of ratios that were paired by round."""


def run_rounds(
    contestants: Mapping[str, Contestant],
    rounds: int,
    *,
    warmup: int = 1,
    seed: int = 0,
    progress: bool = True,
    label: str = "",
) -> dict[str, np.ndarray]:
    """Runs all contestants for so many rounds, in a new random order each round.

    Args:
        contestants: By name.
        rounds: Rounds that count.
        warmup: Rounds before them that do not.
        seed: Of the order.
        progress: Show a bar.
        label: Stands before each contestant's name in the bar.

    Returns:
        Seconds by contestant, float64 (rounds,).
    """
    from tqdm.auto import tqdm

    random = np.random.default_rng(seed)
    names = list(contestants)
    seconds = {name: np.zeros(rounds) for name in names}
    bar = tqdm(total=(rounds + warmup) * len(names), disable=not progress, unit="run", leave=False)
    with bar:
        for number in range(-warmup, rounds):
            for index in random.permutation(len(names)):
                name = names[index]
                bar.set_description(label + name)
                taken = contestants[name](number % rounds)
                if number >= 0:
                    seconds[name][number] = taken
                bar.update()
    return seconds


def ratio(reference: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray) -> Ratio:
    """Compares speeds: the reference's time over the measured one's, so 1 is as fast.

    Args:
        reference: Seconds by round.
        measured: Seconds by round, same rounds.
    """
    return median_interval(np.asarray(reference, float) / np.asarray(measured, float))


def median_interval(values: np.ndarray) -> Interval:
    """Returns the median of one value a round, float64 (rounds,), with its bootstrap interval."""
    random = np.random.default_rng(0)
    draws = random.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return Interval(float(np.median(values)), float(low), float(high))
