"""Where the damage of a miss action comes from: four runs of the same window.

- full: every expert that the router chooses is computed. The reference.
- constrained: the action, as it runs.
- imposed: the action, with each router seeing what the full model's saw at that token and layer, so
  that ids and weights are the full model's. What is left is the damage of the misses themselves;
  the rest of the constrained damage is that of the re-routing which they cause.
- own: the action, with each token starting from the full model's cache, so that only its own misses
  count; the rest of the constrained damage is inherited by later tokens from earlier ones.

In each of the lossy runs the bank swaps by what that run's own routers ask for. The two shares are
two cuts through the same damage and need not add up to anything. A share below 0 says that the run
did more damage than the constrained one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import numpy as np

from ..errors import SchemaError, StudyError
from ..experts.misses import MissAction
from .intervals import clustered
from .judge import Arm, Reference, judged
from .window import Window

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab

ARMS: tuple[Arm, ...] = get_args(Arm)

SHARES = {"rerouting": "imposed", "inherited": "own"}
"""Share of the constrained damage by name, and the arm that is without it."""

COLUMNS = (
    "document", "domain", "position", "phase", "arm", "kl", "logprob", "logprob_reference",
)  # fmt: skip


def run_arms(
    lab: Lab,
    window: Window,
    reference: Reference,
    on_miss: str | MissAction,
    *,
    swap_budget: int | None = None,
    constrained: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Runs a window's other arms.

    Args:
        lab: The model.
        window: What to run.
        reference: `Reference(lab, window, record=True, arms=True)`.
        on_miss: What happens on a miss.
        swap_budget: Experts a layer that may enter after a step; None for the layer's top-k.
        constrained: What `judge` gave for the same; None runs it.

    Returns:
        A row a judged token and arm ("constrained", "imposed", "own"): `document`, `domain`,
        `position` (int32), `phase`, `arm`, `kl`, `logprob`, `logprob_reference` (float64, nats).

    Raises:
        StudyError: If the reference was made without `arms` and `record`, or the full model's
            routing could not be imposed: for a family whose routing is made in a way not seen.
    """
    import pandas as pd

    frames = []
    for arm in ARMS:
        if arm == "constrained" and constrained is not None:
            frame, routing = constrained, None
        else:
            frame, routing = judged(
                lab, window, reference, on_miss, swap_budget=swap_budget, arm=arm,
                record=arm == "imposed",
            )  # fmt: skip
        if arm == "imposed":
            _check_imposed(lab, window, reference.routing, routing)
        frames.append(frame.assign(arm=arm)[list(COLUMNS)])
    return pd.concat(frames, ignore_index=True)


def shares(arms: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Gives the shares of the damage, by domain and for all.

    `rerouting` = 1 − imposed/constrained and `inherited` = 1 − own/constrained, where each arm
    stands for its KL summed over all tokens. Intervals are clustered by document and stratified by
    domain.

    Args:
        arms: As `run_arms` gives it, of one or more windows.
        level: Of the intervals.

    Returns:
        `domain`, `share` ("rerouting", "inherited"), `mean`, `low`, `high`, `se` (float64),
        `documents` (int64): a row a domain and share, then those of `domain="all"`. NaN where
        nothing was damaged, and interval and error are NaN for one document alone.

    Raises:
        SchemaError: If a column is missing.
    """
    import pandas as pd

    for name in ("document", "domain", "arm", "kl"):
        if name not in arms.columns:
            raise SchemaError(f"The frame of arms has no column {name!r}.")
    sums = arms.groupby(["domain", "document", "arm"], observed=True, sort=False)["kl"].sum()
    damage = sums.unstack("arm").reset_index()
    rows = []
    domains = [str(domain) for domain in damage["domain"].unique()]
    for domain in [*(d for d in domains if len(domains) > 1 or d != "all"), "all"]:
        here = damage if domain == "all" else damage[damage["domain"] == domain]
        for share, arm in SHARES.items():
            rows.append((domain, share, *_share(here, arm, level)))
    columns = ["domain", "share", "mean", "low", "high", "se", "documents"]
    return pd.DataFrame(rows, columns=columns)


def _share(damage: pd.DataFrame, arm: str, level: float) -> tuple[float, ...]:
    # A ratio of sums is a mean of the documents' ratios, weighted by their denominators.
    hurt = damage[damage["constrained"] > 0]
    if not len(hurt):
        return (float("nan"),) * 4 + (len(damage),)
    ratios = hurt.assign(ratio=hurt[arm] / hurt["constrained"])
    row = clustered(ratios, "ratio", weights="constrained", level=level).iloc[0]
    return 1 - row["mean"], 1 - row["high"], 1 - row["low"], row["se"], len(damage)


def choices(routing: pd.DataFrame) -> pd.DataFrame:
    """Returns what routers chose: `token` (0 for the first recorded), `layer`, `expert`, `weight`.

    Tokens are counted and not named by position, so that two recordings of the same tokens agree.
    Slots of weight 0 are not routed.
    """
    token = routing.groupby(["step", "position"], observed=True, sort=True).ngroup()
    found = routing[["layer", "expert", "weight"]].assign(token=token.to_numpy())
    return found[~(found["weight"] == 0)]


def agreement(full: pd.DataFrame, constrained: pd.DataFrame) -> pd.DataFrame:
    """Says how many of its experts each token shares between two routings of the same tokens.

    |E_full ∩ E_constrained| / k, which OLMoE (arXiv 2409.02060, §5.1) calls router saturation.

    Args:
        full: Routing frame of the full run.
        constrained: That of the other run; what its routers chose by themselves.

    Returns:
        A row a token and layer: `token`, `layer`, `agreement` (float64, 0 to 1), `top_k` (int64).
    """
    keys = ["token", "layer"]
    a, b = choices(full), choices(constrained)
    chosen = a.groupby(keys, sort=True).size()
    both = a.merge(b, on=[*keys, "expert"]).groupby(keys, sort=True).size()
    shared = both.reindex(chosen.index, fill_value=0) / chosen
    return shared.rename("agreement").reset_index().assign(top_k=chosen.to_numpy())


def _check_imposed(
    lab: Lab, window: Window, full: pd.DataFrame | None, imposed: pd.DataFrame | None
) -> None:
    """Refuses an imposed run whose routers did not choose as the full model's did."""
    if full is None or imposed is None:
        raise StudyError(
            "To check that the full model's routing was imposed, its own must be recorded: make "
            "the reference with Reference(lab, window, record=True, arms=True)."
        )
    order = ["token", "layer", "expert"]
    a, b = (choices(frame).sort_values(order) for frame in (full, imposed))
    same = len(a) == len(b) and all(
        np.array_equal(a[name].to_numpy(), b[name].to_numpy()) for name in order
    )
    # Unknown weights (NaN) are of families that weigh in another way; their ids are checked.
    if not same or not np.array_equal(a["weight"], b["weight"], equal_nan=True):
        raise StudyError(
            f"The full model's routing could not be imposed on {lab.config['model_type']}: with "
            f"what the full model's routers saw, they chose otherwise in {window.document!r}. "
            "Compare without arms (arms=False)."
        )


def mean_by_arm(arms: pd.DataFrame, by: Sequence[str] = (), *, level: float = 0.95) -> pd.DataFrame:
    """Gives the mean KL of each arm with clustered intervals; see `intervals.clustered`."""
    return clustered(arms, "kl", [*by, "arm"], level=level, limits=(0.0, np.inf))
