"""What an event costs in the bank's bookkeeping: `python -m tests.support.cost`.

512 experts, top-10, 208 slots, steps of one token: `begin`, `admit` with the policy's part in
both, `arrived` and `end`; no reading. Microseconds an event: the tenth percentile over stretches
of 100 events, the best of three runs, since another process can only make it slower.
"""

from __future__ import annotations

import time

import numpy as np

import moelab
from moelab.experts.policies import Future, MinForced, make_policy
from moelab.experts.residency import Residency

EXPERTS, TOP_K, SLOTS, EVENTS, STRETCH = 512, 10, 208, 4000, 100


def events(skew: float, seed: int = 0) -> list[list[int]]:
    """Top-k drawn without replacement, expert e with weight (e + 1)^−skew."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(EVENTS, EXPERTS)) - skew * np.log(np.arange(1, EXPERTS + 1))
    return np.sort(np.argpartition(-scores, TOP_K)[:, :TOP_K], axis=1).tolist()


def cost(bank: Residency, stream: list[list[int]]) -> tuple[float, float]:
    """Returns microseconds and loads an event."""
    loads, taken = 0, []
    begin = time.perf_counter()
    for number, needed in enumerate(stream, 1):
        misses = bank.begin(needed)
        if misses:
            for load in bank.admit(needed, misses):
                bank.arrived(load)
            loads += len(misses)
        bank.end()
        if number % STRETCH == 0:
            now = time.perf_counter()
            taken.append((now - begin) / STRETCH * 1e6)
            begin = now
    return float(np.quantile(taken, 0.1)), loads / len(stream)


def main() -> None:
    for kind, skew in (("uniform", 0.0), ("skewed", 0.9)):
        stream = events(skew)
        for name in moelab.policies()["name"]:
            if name == "min":  # no part of a bank
                continue
            found = []
            for _ in range(3):
                policy = MinForced(Future(stream)) if name == "min_forced" else make_policy(name)()
                bank = Residency(SLOTS, policy)
                for load in bank.fill(range(SLOTS), TOP_K):
                    bank.arrived(load)
                found.append(cost(bank, stream))
            micros, loads = min(found)
            print(f"{kind:8} {name:12} {micros:5.1f} µs an event, {loads:.2f} loads")  # noqa: T201


if __name__ == "__main__":
    main()
