"""Eviction by expected price: who leaves is who would cost least to miss.

Under a lossy action a miss is not read, it is paid for in quality. So an expert is worth keeping
for what it costs to miss it once, times the chance that it is asked for again. The first is learned
on the calibration split (`price_by_expert`), the second is what a policy for exact banks evicts by.
The variant is chosen on the selection split, and the judgement is made on the test split, against
LRU and LFRU at the same bytes (`compare_policies`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..display import facts_html, facts_text
from ..errors import PolicyError, StudyError
from ..experts.policies import LFRU
from ..quality.intervals import clustered, simultaneous
from ..quality.window import documents_of
from .price_model import fit_prices

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

    from ..lab import Lab
    from ..prompt_texts import Prompts
    from ..routing.recording import Recording
    from .price_results import Prices

Reuse = Literal["lfru", "lru"]
"""How the chance of reuse is guessed: f/(a + 1), or 1/(a + 1); f are the events that used the
expert so far, a those since its last use."""

RECORDED = ("ln weight", "depth", "(depth − ½)²", "rank")
"""Predictors of a price that a recording knows."""

VARIANTS: tuple[tuple[Reuse, float], ...] = (("lfru", 1.0), ("lfru", 0.5), ("lru", 1.0))
"""What `compare_policies` chooses from: the chance of reuse, and a power of the price."""


class PricePolicy(LFRU):
    """Evicts the lowest expected price × chance of reuse.

    Args:
        prices: By layer, the expected price of one miss of each expert, (experts,), above 0. Only
            their ratios matter.
        reuse: How the chance of reuse is guessed. With equal prices the policy is LFRU, or LRU
            but for its order among equals.
        power: Power of the price; 0 leaves it out.

    Raises:
        PolicyError: If there are no prices, one is not a number above 0, or reuse is none of the
            two.
    """

    def __init__(
        self, prices: Mapping[int, ArrayLike], reuse: Reuse = "lfru", power: float = 1.0
    ) -> None:
        super().__init__()
        if reuse not in get_args(Reuse):
            raise PolicyError(f"reuse must be 'lfru' or 'lru', got {reuse!r}.")
        if not 0 <= power < np.inf:
            raise PolicyError(f"power is a finite number from 0 up, got {power!r}.")
        if not prices:
            raise PolicyError("The policy needs a price of every expert, by layer, and has none.")
        self.name = f"price_{reuse}" + ("" if power == 1 else f"^{power:g}")
        self._reuse = reuse
        self._table: Mapping[int, np.ndarray] = {}
        self._price: np.ndarray | None = None
        table = {}
        for layer, given in prices.items():
            values = np.asarray(given, np.float64)
            if values.ndim != 1 or not np.isfinite(values).all() or (values <= 0).any():
                raise PolicyError(
                    f"The prices of layer {layer} must be a finite number above 0 for each expert."
                )
            table[layer] = (values / values.max()) ** power
        self._table = table
        self.digest = _digest(table)
        """Names the prices, so that a sweep takes no rows of others for its own."""

    def placed(self, layer: int) -> None:
        """Takes the prices of its layer."""
        if layer not in self._table:
            raise PolicyError(
                f"The policy has prices of layers {sorted(self._table)}, and none of {layer}."
            )
        self._price, self._table = self._table[layer], {}

    def _scores(self) -> np.ndarray:
        if self._price is None:
            raise PolicyError(
                "A price policy must be told its layer before it evicts: policy.placed(layer)."
            )
        held = np.frombuffer(self._held)
        age = self._now + 1 - np.frombuffer(self._last)
        value = held / age if self._reuse == "lfru" else np.where(np.isinf(held), np.inf, 1 / age)
        known = min(len(value), len(self._price))
        value[:known] *= self._price[:known]
        return np.asarray(value)


def price_by_expert(
    prices: Prices,
    routing: Recording | pd.DataFrame,
    action: str,
    *,
    experts: Mapping[int, int] | None = None,
    predictors: Sequence[str] = RECORDED,
) -> dict[int, np.ndarray]:
    """Expects a price for one miss of each expert, over its recorded uses.

    A model of the sampled prices (`fit_prices`) is applied to every recorded routed slot, and the
    expected prices are averaged by layer and expert. Both should be of the calibration split.

    Args:
        prices: Prices of forced misses.
        routing: A recording of an exact run, or its `routing`.
        action: The miss action.
        experts: Experts of each layer; taken from a recording where it is one.
        predictors: As for `fit_prices`; only those that a recording knows.

    Returns:
        By layer, float64 (experts,), nats. An expert that was never used has the mean of its
        layer's experts that were.

    Raises:
        StudyError: If a layer has no prices, or a predictor is none that a recording knows.
    """
    import pandas as pd

    frame: pd.DataFrame
    if isinstance(routing, pd.DataFrame):
        frame = routing
    else:
        frame, run = routing.routing, routing.run
        experts = dict(zip(run["layers"], run["experts"], strict=True))
    unknown = [name for name in predictors if name not in RECORDED]
    if unknown:
        raise StudyError(
            f"A recording does not know {unknown[0]!r}; a price by expert can be expected from "
            f"{', '.join(map(repr, RECORDED))}."
        )
    model = fit_prices(prices.frame, action=action, predictors=predictors, resamples=2)
    depths = prices.frame.groupby("layer")["depth"].first()
    lacking = sorted({int(layer) for layer in frame["layer"].unique()} - set(depths.index))
    if lacking:
        raise StudyError(
            f"No miss was forced in layers {lacking}, so nothing is known of their prices. Sample "
            "more misses a text."
        )
    used = frame[frame["weight"] > 0]
    rows = used[["layer", "expert", "rank", "weight"]].assign(
        depth=used["layer"].map(depths).to_numpy()
    )
    rows["expected"] = model.expected(rows)
    found = {}
    for layer in sorted(int(n) for n in rows["layer"].unique()):
        part = rows[rows["layer"] == layer]
        means = part.groupby("expert")["expected"].mean()
        count = int(part["expert"].max()) + 1 if experts is None else experts[layer]
        found[layer] = np.full(count, float(means.mean()))
        found[layer][means.index.to_numpy()] = means.to_numpy()
    return found


@dataclass(frozen=True, eq=False, repr=False)
class PolicyComparison:
    """How the price policy does against others at the same bytes.

    Attributes:
        chosen: Name of the variant that did best on the selection split, by miss action.
        selection: A row a miss action and policy: `on_miss`, `policy`, `kl_mean` (nats a token,
            all capacities together) on the selection split.
        frame: The test split's rows; see `Sweep.frame`.
        summary: A row a miss action, capacity and baseline on the test split: `on_miss`,
            `capacity`, `baseline`, `bytes`, `kl_price`, `kl_baseline` (nats a token), `gain`
            (kl_baseline − kl_price: above 0 the price policy is better), `low`, `high`
            (simultaneous 95% intervals over documents, all rows together), `verdict` ("better",
            "worse" or "not told apart").
        settings: Splits, windows and the variants.
    """

    chosen: Mapping[str, str]
    selection: pd.DataFrame
    frame: pd.DataFrame
    summary: pd.DataFrame
    settings: Mapping[str, Any]

    @property
    def wins(self) -> bool:
        """Whether the price policy is better than every baseline somewhere, and worse nowhere."""
        verdicts = self.summary["verdict"]
        everywhere = self.summary.groupby(["on_miss", "capacity"])["verdict"]
        return bool((verdicts != "worse").all() and everywhere.agg(_all_better).any())

    @property
    def statement(self) -> str:
        """Whether it wins, in words, with the figures."""
        told = []
        for row in self.summary.itertuples():
            told.append(
                f"{row.on_miss} at {row.capacity} against {row.baseline}: {row.kl_price:.4f} "
                f"against {row.kl_baseline:.4f} nats a token, gain {row.gain:+.4f} "
                f"({row.low:+.4f} to {row.high:+.4f}), {row.verdict}"
            )
        verdict = "wins" if self.wins else "does not win"
        return (
            f"Eviction by expected price {verdict} at equal bytes on the test texts "
            f"(95% simultaneous intervals over documents). {'; '.join(told)}."
        )

    def _facts(self) -> dict[str, str]:
        facts = {
            "chosen": ", ".join(f"{action}: {name}" for action, name in self.chosen.items()),
            "judged on": f"{self.frame['prompt'].nunique()} documents",
            "verdict": "it wins" if self.wins else "it does not win",
        }
        for row in self.summary.itertuples():
            facts[f"{row.on_miss}, {row.capacity}, {row.baseline}"] = (
                f"gain {row.gain:+.4f} nats a token ({row.low:+.4f} to {row.high:+.4f}), "
                f"{row.verdict}"
            )
        return facts

    def __repr__(self) -> str:
        return facts_text("PolicyComparison", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("PolicyComparison", self._facts())


def compare_policies(
    model: Lab | str | Path,
    tables: Mapping[str, Mapping[int, ArrayLike]],
    capacity: int | float | Sequence[int | float],
    *,
    selection: Prompts = None,
    test: Prompts = None,
    variants: Sequence[tuple[Reuse, float]] = VARIANTS,
    baselines: Sequence[str] = ("lru", "lfru"),
    out: str | Path | None = None,
    **options: Any,
) -> PolicyComparison:
    """Judges eviction by expected price against other policies, by KL at the same bytes.

    Args:
        model: A lab, or what `moelab.load` takes.
        tables: By miss action, the expected price of each expert; from `price_by_expert` on the
            calibration split.
        capacity: Experts a layer, one or several.
        selection: Texts to choose the variant by; None for the shipped ones.
        test: Texts to judge by, others; None for the shipped ones.
        variants: Chances of reuse and powers of the price to choose from.
        baselines: Policies to judge against.
        out: A folder for both sweeps' rows, which then go on where they were cut off.
        **options: More of `moelab.sweep`: prefix, tokens, swap_budget, profile, progress, …

    Returns:
        What was found.

    Raises:
        StudyError: If there is no table, variant or baseline; the policies' bytes differ; or a
            text is in both splits.
    """
    import pandas as pd

    from .sweep import sweep

    for name, value in (("tables", tables), ("variants", variants), ("baselines", baselines)):
        if not len(value):
            raise StudyError(f"{name} is empty, so there is nothing to compare.")
    splits = {"selection": selection, "test": test}
    named = [{d.name for d in documents_of(t, split=s)[0]} for s, t in splits.items()]
    if shared := sorted(named[0] & named[1]):
        raise StudyError(
            f"{len(shared)} texts are in both splits, such as {shared[0]!r}: a policy is judged on "
            "texts that it was not chosen by. Give texts with names of their own."
        )
    chosen: dict[str, str] = {}
    told, frames = [], []
    for action, table in tables.items():
        policies = {p.name: p for p in (PricePolicy(table, *variant) for variant in variants)}
        others = [name for name in baselines if name not in policies]
        place = None if out is None else Path(out) / f"{action}-{_digest(table)}"
        given = {"on_miss": action, **options}
        tried = sweep(
            model, capacity, policy=[*policies.values(), *others], prompts=selection,
            split="selection", out=None if place is None else place / "selection", **given,
        ).frame  # fmt: skip
        means = _means(tried)
        chosen[action] = next(name for name in means["policy"] if name in policies)
        judged = sweep(
            model, capacity, policy=[policies[chosen[action]], *others], prompts=test,
            split="test", out=None if place is None else place / "test", **given,
        ).frame  # fmt: skip
        told.append(means)
        frames.append(judged)
    frame = pd.concat(frames, ignore_index=True)
    settings = {"variants": list(variants), "baselines": list(baselines), **options}
    summary = judge_policies(frame, chosen, baselines)
    return PolicyComparison(chosen, pd.concat(told, ignore_index=True), frame, summary, settings)


def judge_policies(
    frame: pd.DataFrame, chosen: Mapping[str, str], baselines: Sequence[str]
) -> pd.DataFrame:
    """Pairs policies document by document; see `PolicyComparison.summary`.

    Args:
        frame: A sweep's rows.
        chosen: The policy to judge, by miss action.
        baselines: The policies to judge it against.

    Raises:
        StudyError: If a policy lacks documents that another has, or their bytes differ.
    """
    import pandas as pd

    keys = ["on_miss", "capacity", "domain", "prompt"]
    rows = []
    for action, name in chosen.items():
        mine = frame[(frame["on_miss"] == action) & (frame["policy"] == name)]
        for baseline in baselines:
            other = frame[(frame["on_miss"] == action) & (frame["policy"] == baseline)]
            both = mine.merge(other, on=keys, suffixes=("", "_other"))
            if not len(mine) == len(other) == len(both) or not len(both):
                raise StudyError(
                    f"{name!r} and {baseline!r} were not judged on the same documents and "
                    f"capacities under {action!r}, so they cannot be paired."
                )
            if (both["bytes"] != both["bytes_other"]).any():
                raise StudyError(f"{name!r} and {baseline!r} do not take the same bytes.")
            rows.append(
                both[[*keys, "tokens", "bytes"]].assign(
                    baseline=baseline, kl_price=both["kl_mean"], kl_baseline=both["kl_mean_other"],
                    gain=both["kl_mean_other"] - both["kl_mean"],
                )
            )  # fmt: skip
    pairs = pd.concat(rows, ignore_index=True)
    by = ["on_miss", "capacity", "baseline"]
    shape: dict[str, Any] = {"cluster": "prompt", "weights": "tokens"}
    found = simultaneous(pairs, "gain", by, **shape).rename(columns={"mean": "gain"})
    for name in ("kl_price", "kl_baseline"):
        found[name] = clustered(pairs, name, by, **shape)["mean"].to_numpy()
    sizes = pairs.groupby(by, sort=False)["bytes"].max()
    found["bytes"] = [int(sizes[key]) for key in zip(*(found[c] for c in by), strict=True)]
    found["verdict"] = np.select(
        [found["low"] > 0, found["high"] < 0], ["better", "worse"], "not told apart"
    )
    columns = [*by, "bytes", "kl_price", "kl_baseline", "gain", "low", "high", "documents"]
    return found[[*columns, "verdict"]]


def _means(frame: pd.DataFrame) -> pd.DataFrame:
    sums = frame.groupby(["on_miss", "policy"], sort=False)[["kl_sum", "tokens"]].sum()
    told = (sums["kl_sum"] / sums["tokens"]).rename("kl_mean").reset_index()
    return told.sort_values("kl_mean", kind="stable", ignore_index=True)


def _all_better(verdicts: pd.Series) -> bool:
    return bool((verdicts == "better").all())


def _digest(table: Mapping[int, ArrayLike]) -> str:
    found = hashlib.sha256()
    for layer in sorted(table):
        found.update(np.asarray(table[layer], np.float64).tobytes())
    return found.hexdigest()[:8]
