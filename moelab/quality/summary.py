"""From judged tokens to figures: by domain, position or phase, with clustered intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SchemaError, StudyError
from .clusters import names_of
from .divergence import standardised_shift
from .intervals import clustered

if TYPE_CHECKING:
    import pandas as pd

TOKEN_COLUMNS = {
    "document": "str",
    "domain": "str",
    "position": "int32",
    "phase": "str",
    "token_id": "int32",
    "logprob": "float64",
    "logprob_reference": "float64",
    "kl": "float64",
    "same_top1": "bool",
    "entropy": "float64",
    "entropy_reference": "float64",
}
"""Columns of a frame of judged tokens, and their types."""

NUMBERS = ("logprob", "logprob_reference", "kl", "entropy", "entropy_reference")

PERCENTILES = {
    "kl_median": 0.5, "kl_p90": 0.9, "kl_p95": 0.95, "kl_p99": 0.99, "kl_p999": 0.999,
}  # fmt: skip

FIGURES = (
    "tokens", "documents", "kl_mean", "kl_mean_low", "kl_mean_high", *PERCENTILES, "kl_max",
    "ppl", "ppl_reference", "ln_ppl_ratio", "ln_ppl_ratio_se", "ln_ppl_ratio_low",
    "ln_ppl_ratio_high", "same_top1", "same_top1_low", "same_top1_high", "dp_mean", "dp_rms",
    "entropy_shift", "entropy_shift_dz",
)  # fmt: skip
"""Columns of a summary after those that group."""

ALL = "all"
"""The row of all domains."""


def check_tokens(frame: pd.DataFrame) -> None:
    """Refuses a frame that is none of judged tokens.

    Raises:
        SchemaError: If a column is missing, or has values that it cannot have; names the column.
        StudyError: If there is no row.
    """
    missing = [name for name in TOKEN_COLUMNS if name not in frame.columns]
    if missing:
        raise SchemaError(
            f"The frame of judged tokens has no column {missing[0]!r}; it needs "
            f"{', '.join(TOKEN_COLUMNS)}."
        )
    if not len(frame):
        raise StudyError("The frame of judged tokens has no rows, so nothing can be summarised.")
    for name in NUMBERS:
        if frame[name].dtype.kind != "f":
            raise SchemaError(f"Column {name!r} is {frame[name].dtype}, and must be float64.")
        bad = ~np.isfinite(frame[name].to_numpy())
        if bad.any():
            row = frame.iloc[int(np.flatnonzero(bad)[0])]
            raise SchemaError(
                f"Column {name!r} is {row[name]} at position {row['position']} of "
                f"{row['document']!r}; {int(bad.sum())} values are not finite."
            )
    if frame["same_top1"].dtype != np.bool_:
        raise SchemaError(f"Column 'same_top1' is {frame['same_top1'].dtype}, and must be bool.")
    for name in ("kl", "entropy", "entropy_reference"):
        # Rounding may leave a certain prediction's entropy at -1e-16.
        if (frame[name] < -1e-9).any():
            raise SchemaError(f"Column {name!r} has {frame[name].min():g}; it cannot be below 0.")
    for name in ("logprob", "logprob_reference"):
        if (frame[name] > 1e-9).any():
            raise SchemaError(f"Column {name!r} has {frame[name].max():g}; it cannot be above 0.")


def summarise(
    tokens: pd.DataFrame, by: str | Sequence[str] = "domain", *, level: float = 0.95
) -> pd.DataFrame:
    """Gives the figures of each group of judged tokens.

    - kl_*: KL(full ‖ constrained), nats, with its mean, percentiles (linear) and maximum.
    - ppl, ppl_reference: exp(−mean logprob) of both runs.
    - ln_ppl_ratio: ln(ppl / ppl_reference), the mean of logprob_reference − logprob over tokens,
      with the standard error of these paired differences.
    - same_top1: share of tokens for which both runs have the same likeliest token.
    - dp_mean, dp_rms: change of the true token's probability, constrained − full: its mean, and the
      root of its mean square, as llama.cpp's perplexity tool gives them.
    - entropy_shift, entropy_shift_dz: mean of entropy − entropy_reference, nats; and that mean over
      the differences' standard deviation (Cohen's d_z for pairs), over tokens.

    Intervals (`_low`, `_high`) and the standard error are over documents, paired, and stratified
    by domain: see `moelab.quality.intervals`. They are NaN where each domain has one document.

    Args:
        tokens: A row a judged token; see `moelab.quality.judge.judge`.
        by: Columns that group.
        level: Of the intervals.

    Returns:
        A row a group, in the order in which they first appear: `by`, then `FIGURES`.

    Raises:
        SchemaError: If the frame is none of judged tokens.
        StudyError: If it has no row.
    """
    import pandas as pd

    check_tokens(tokens)
    columns = names_of(by)
    for name in columns:
        if name not in tokens.columns:
            raise SchemaError(f"The frame has no column {name!r} to group by.")
    frame = tokens.assign(
        _ratio=tokens["logprob_reference"] - tokens["logprob"],
        _same=tokens["same_top1"].astype(np.float64),
    )
    kl = clustered(frame, "kl", columns, level=level, limits=(0.0, np.inf))
    ratio = clustered(frame, "_ratio", columns, level=level)
    same = clustered(frame, "_same", columns, level=level, limits=(0.0, 1.0))
    groups = frame.groupby(columns, observed=True, sort=False) if columns else [((), frame)]
    figures = pd.DataFrame([_figures(group) for _, group in groups])
    out = pd.DataFrame(
        {
            **{name: kl[name] for name in columns},
            "tokens": kl["tokens"],
            "documents": kl["documents"],
            "kl_mean": kl["mean"],
            "kl_mean_low": kl["low"],
            "kl_mean_high": kl["high"],
            "ln_ppl_ratio": ratio["mean"],
            "ln_ppl_ratio_se": ratio["se"],
            "ln_ppl_ratio_low": ratio["low"],
            "ln_ppl_ratio_high": ratio["high"],
            "same_top1": same["mean"],
            "same_top1_low": same["low"],
            "same_top1_high": same["high"],
        }
    )
    return pd.concat([out, figures], axis=1)[[*columns, *FIGURES]]


def by_domain_and_all(tokens: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """As `summarise` by domain, with a last row for `domain="all"`."""
    import pandas as pd

    every = summarise(tokens.assign(domain_=ALL), "domain_", level=level)
    every = every.rename(columns={"domain_": "domain"})
    if set(tokens["domain"]) == {ALL}:
        return every
    domains = summarise(tokens, "domain", level=level)
    domains["domain"] = domains["domain"].astype(str)
    return pd.concat([domains, every], ignore_index=True)


def _figures(group: pd.DataFrame) -> dict[str, Any]:
    kl = group["kl"].to_numpy()
    change = np.exp(group["logprob"].to_numpy()) - np.exp(group["logprob_reference"].to_numpy())
    entropy = group["entropy"].to_numpy(), group["entropy_reference"].to_numpy()
    quantiles = np.quantile(kl, list(PERCENTILES.values()))
    return {
        **dict(zip(PERCENTILES, quantiles.tolist(), strict=True)),
        "kl_max": float(kl.max()),
        "ppl": float(np.exp(-group["logprob"].mean())),
        "ppl_reference": float(np.exp(-group["logprob_reference"].mean())),
        "dp_mean": float(change.mean()),
        "dp_rms": float(np.sqrt((change**2).mean())),
        "entropy_shift": float((entropy[0] - entropy[1]).mean()),
        "entropy_shift_dz": standardised_shift(*entropy),
    }
