"""`moelab bench forecast`: forecasts of seconds against live runs of other texts.

First the machine and the model are calibrated on shipped calibration texts, and the full model's
routing of calibration texts is recorded; every point is forecast from these. Then the points run
live on texts of the test split, a text a round, all points in random order in each round, and the
medians over rounds are compared with what was foretold. In a live run mlx-lm's own loop reads the
prompt with the bank at its first contents, page cache warm, and decodes the text's next tokens, as
the recordings do: what a model says by itself repeats more, and so loads less.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..machine import Machine, this_machine
from . import pages
from .model import BENCH_MODEL, bench_folder
from .rounds import Contestant, run_rounds

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab

SHARES = (0.125, 0.25, 0.5)
POLICIES = ("lru", "lfu")
LENGTHS = (32, 128)
DECODED = 48
TARGET = 0.15
"""Median relative error that forecasts may have."""

LIMIT_SECONDS = 60
"""For the calibration."""


@dataclass(frozen=True, slots=True)
class ForecastRow:
    """One figure of one point."""

    share: float
    capacity: int
    policy: str
    prompt: int
    """Tokens of the prompt."""
    what: str
    """"decode" (tokens/s) or "first token" (seconds)."""
    predicted: float
    measured: float
    """Median over live runs."""
    low: float
    """The lowest live run."""
    high: float
    """The highest."""
    predicted_loads: float
    """Until the first token, or a decoded token."""
    measured_loads: float
    """Mean over live runs."""

    @property
    def error(self) -> float:
        """|predicted − measured| ÷ measured."""
        return abs(self.predicted - self.measured) / self.measured


@dataclass(frozen=True, slots=True)
class ForecastResult:
    """What `bench_forecast` found."""

    model: str
    rounds: int
    seed: int
    tokens: int
    """Decoded after the first, a run."""
    rows: list[ForecastRow]
    calibration: dict[str, Any]
    """As `moelab.Calibration` has it."""
    machine: Machine
    seconds: dict[str, list[float]] = field(repr=False)
    """Of each point in each round: to the first token, and of all tokens after it."""

    def median_error(self, what: str | None = None) -> float:
        """Returns the median over points, of decoding, of the first token, or of both."""
        return float(np.median([r.error for r in self.rows if what in (None, r.what)]))

    def frame(self, what: str = "decode") -> pd.DataFrame:
        """Returns a row a point, as `moelab.plots.study.forecast` takes it.

        Args:
            what: "decode", in tokens/s, or "first token", in seconds.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "model": self.model, "capacity": r.capacity, "policy": r.policy,
                "prompt": r.prompt, "predicted": r.predicted, "measured": r.measured,
                "error": r.error,
            }
            for r in self.rows
            if r.what == what
        )  # fmt: skip

    def page(self) -> str:
        """Returns the result as Markdown."""
        lines = [
            f"# Forecasts of seconds against live runs: {self.model}",
            "",
            f"Calibrated and recorded on calibration texts, forecast, then run live on test texts: "
            f"{self.rounds} rounds, a text each, points in random order; live figures are medians, "
            f"with the lowest and highest in brackets. Prompts from a bank that is empty at first, "
            f"then {self.tokens} decoded tokens of the text itself; exact, page cache warm. "
            + pages.machine_line(self.machine),
            "",
        ]
        for what in (None, "decode", "first token"):
            error = self.median_error(what)
            lines.append(
                f"- median error, {what or 'all figures'}: {error:.1%} "
                f"({'met' if error < TARGET else 'missed'}: under {TARGET:.0%})"
            )
        lines += [
            "",
            "| experts in memory | policy | prompt | figure | forecast | live | error "
            "| loads forecast | loads live |",
            "|" + "---|" * 9,
        ]
        for r in self.rows:
            decode = r.what == "decode"
            unit, digits = ("tokens/s", 1) if decode else ("s", 3)
            lines.append(
                f"| {r.capacity} ({r.share:.1%}) | {r.policy} | {r.prompt} tokens | {r.what} "
                f"| {r.predicted:.{digits}f} {unit} | {r.measured:.{digits}f} "
                f"[{r.low:.{digits}f}, {r.high:.{digits}f}] | {r.error:.1%} "
                f"| {r.predicted_loads:.1f} | {r.measured_loads:.1f} |"
            )
        lines += [
            "",
            "Loads: experts read until the first token, or for each decoded token, all layers.",
            f"Calibration: {self.calibration['took']:.0f} s, deviation of its own points "
            + ", ".join(f"{k} {v:.1%}" for k, v in self.calibration["residuals"].items())
            + ".",
        ]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Writes `bench-forecast.md` and `bench-forecast.json`, each whole or not at all."""
        pages.save(self, "bench-forecast", folder)


def bench_forecast(
    name_or_path: str | Path = "lab",
    *,
    rounds: int = 5,
    shares: Sequence[float] = SHARES,
    policies: Sequence[str] = POLICIES,
    lengths: Sequence[int] = LENGTHS,
    tokens: int = DECODED,
    seed: int = 0,
    limit_seconds: float = LIMIT_SECONDS,
    progress: bool = True,
) -> ForecastResult:
    """Measures how far forecasts are from live runs of other texts.

    Args:
        name_or_path: `"bench"` or what `moelab.load` takes; the banks of all shares are in memory
            at once.
        rounds: Live runs of each point.
        shares: Shares of the experts in memory.
        policies: Names.
        lengths: Tokens of the prompts.
        tokens: Decoded tokens after the first.
        seed: Of the order and the texts.
        limit_seconds: For the calibration.
        progress: Show bars.
    """
    from ..loading import load
    from ..quality.recorded import record_texts
    from ..study.calibration import calibrate
    from ..study.forecast import Forecast, calibration_texts, forecast
    from ..study.runner import govern

    machine = this_machine()
    name = str(name_or_path)
    folder = bench_folder(name_or_path, progress)
    with ExitStack() as stack:
        labs = {share: stack.enter_context(load(folder, float(share))) for share in shares}
        first = labs[max(shares)]
        # Calibrated at the lengths of a prompt's chunk between the default ones only.
        calibration = calibrate(first, progress=progress, limit_seconds=limit_seconds)
        # One recording serves all lengths: a shorter prompt is the beginning of a longer one.
        texts: Any = calibration_texts(first, max(lengths) + tokens + 2)
        recording = record_texts(
            first, texts, prefix=max(lengths), tokens=tokens + 1, progress=progress
        )
        told: dict[tuple[float, str, int], Forecast] = {}
        for share, lab in labs.items():
            for policy in policies:
                for length in lengths:
                    told[share, policy, length] = forecast(
                        lab, lab.capacities, policy, prompt=length, tokens=tokens,
                        recording=recording, calibration=calibration, progress=False,
                    )  # fmt: skip
        # Only now the other texts.
        prompts = _test_prompts(first, rounds, max(lengths) + tokens + 2, seed)
        runs: dict[tuple[float, str, int], _Runs] = {}
        contestants: dict[str, Contestant] = {}
        for key in told:
            share, policy, length = key
            lab = labs[share]
            runs[key] = _Runs(rounds)

            def run(
                number: int, lab: Lab = lab, policy: str = policy, length: int = length,
                into: _Runs = runs[key],
            ) -> float:  # fmt: skip
                govern(lab, policy, {}, {}, slots=lab.capacities)
                return into.run(lab, prompts[number], length, tokens, number)

            contestants[f"{share:.1%} {policy} {length}"] = run
        run_rounds(contestants, rounds, warmup=0, seed=seed, progress=progress)
        rows = []
        seconds: dict[str, list[float]] = {}
        for key, found in told.items():
            share, policy, length = key
            live = runs[key]
            common: dict[str, Any] = {
                "share": share, "capacity": labs[share].capacity, "policy": policy,
                "prompt": length,
            }  # fmt: skip
            rows.append(ForecastRow(
                **common, what="first token", predicted=found.first_token_seconds,
                predicted_loads=found.prompt_loads, measured_loads=float(live.first_loads.mean()),
                **_middle(live.first),
            ))  # fmt: skip
            rows.append(ForecastRow(
                **common, what="decode", predicted=found.tokens_per_second,
                predicted_loads=found.loads_per_token,
                measured_loads=float(live.loads.mean()) / tokens, **_middle(tokens / live.later),
            ))  # fmt: skip
            label = f"{share:.1%}, {policy}, {length} tokens"
            seconds[f"{label}, first token"] = live.first.tolist()
            seconds[f"{label}, decode"] = live.later.tolist()
    return ForecastResult(
        model=BENCH_MODEL if name == BENCH_MODEL else name,
        rounds=rounds,
        seed=seed,
        tokens=tokens,
        rows=rows,
        # By the name that was asked for: a lab that is opened by its folder is called after it.
        calibration={**asdict(calibration), "model": name},
        machine=machine,
        seconds=seconds,
    )


class _Runs:
    """Live runs of one point, by round."""

    def __init__(self, rounds: int) -> None:
        self.first = np.zeros(rounds)
        self.later = np.zeros(rounds)
        self.first_loads = np.zeros(rounds)
        self.loads = np.zeros(rounds)

    def run(self, lab: Lab, text: list[int], length: int, tokens: int, number: int) -> float:
        """Runs one text; the bank was just brought to its first contents."""
        from ..study.live_run import Live

        live = Live(lab, text, length, tokens)
        self.first[number], self.later[number] = live.first, live.decode_seconds
        self.first_loads[number] = live.first_loads
        self.loads[number] = sum(loads for _, _, loads in live.steps)
        return live.first + live.decode_seconds


def _middle(values: np.ndarray) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    return {"measured": float(np.median(values)), "low": low, "high": high}


def _test_prompts(lab: Lab, rounds: int, least: int, seed: int) -> list[list[int]]:
    """Returns a text of the test split for each round, domains in turn, joined where short."""
    from ..labmodel import DOMAINS, texts

    random = np.random.default_rng(seed)
    found = []
    for number in range(rounds):
        pool = texts(domain=DOMAINS[number % len(DOMAINS)], split="test")
        order = random.permutation(len(pool)).tolist()
        joined, at = pool[order[0]]["text"], 1
        while len(tokens := lab.tokenizer.encode(joined)) < least:
            joined += "\n\n" + pool[order[at % len(order)]]["text"]
            at += 1
        found.append(list(tokens[:least]))
    return found
