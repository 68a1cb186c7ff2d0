"""How far two distributions over the next token are apart, from their logits.

Everything is computed in float64 from the float32 logits, row by row. Figures are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import StudyError

BLOCK = 1 << 20
"""Logits that are turned to float64 at a time: several times 8 MB."""

REFERENCE, CONSTRAINED = "reference", "constrained"
"""What the two runs are called."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Two runs' predictions of the same tokens; one value a token in each array."""

    logprob: np.ndarray
    """Of the true token in the constrained run; float64, nats."""
    logprob_reference: np.ndarray
    """Of the true token in the reference; float64, nats."""
    kl: np.ndarray
    """KL(reference ‖ constrained) = Σ p (ln p − ln q); float64, nats; 0 for equal logits."""
    same_top1: np.ndarray
    """Both have the same likeliest token, the lowest id where several are; bool."""
    entropy: np.ndarray
    """Of the constrained run's distribution; float64, nats."""
    entropy_reference: np.ndarray
    """Of the reference's distribution; float64, nats."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns log-probabilities, float64, for logits of (…, vocabulary)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def diverge(reference: np.ndarray, constrained: np.ndarray, wanted: np.ndarray) -> Divergence:
    """Compares two runs' predictions.

    Args:
        reference: Logits of the full model, (rows, vocabulary), float32, finite.
        constrained: Logits of the other run, the same shape.
        wanted: The true tokens' ids, (rows,), int.

    Raises:
        StudyError: If the vocabularies differ in size.
    """
    if reference.shape != constrained.shape:
        raise StudyError(
            f"The reference predicts {reference.shape[-1]} tokens and the constrained model "
            f"{constrained.shape[-1]}: their distributions cannot be compared. Take a reference "
            "with the same vocabulary."
        )
    rows = len(wanted)
    step = max(1, BLOCK // max(1, reference.shape[-1]))
    parts = [
        _block(reference[at : at + step], constrained[at : at + step], wanted[at : at + step])
        for at in range(0, rows, step)
    ]
    return Divergence(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _block(p: np.ndarray, q: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, ...]:
    rows = np.arange(len(wanted))
    logp, logq = log_softmax(p), log_softmax(q)
    chances = np.exp(logp)
    # Rounding leaves some -1e-17 where the two all but agree; a divergence is never negative.
    kl = np.maximum((chances * (logp - logq)).sum(-1), 0.0)
    kl[(p == q).all(-1)] = 0.0
    return (
        logq[rows, wanted],
        logp[rows, wanted],
        kl,
        p.argmax(-1) == q.argmax(-1),  # the first of several
        -(np.exp(logq) * logq).sum(-1),
        -(chances * logp).sum(-1),
    )


def standardised_shift(constrained: np.ndarray, reference: np.ndarray) -> float:
    """Returns d_z, the mean of the paired differences over their standard deviation.

    Cohen's d for paired samples, with n − 1 in the standard deviation. 0 where nothing differs;
    NaN where one pair differs, or all differ by the same.
    """
    difference = np.asarray(constrained, np.float64) - np.asarray(reference, np.float64)
    if not difference.any():
        return 0.0
    if len(difference) < 2 or (spread := float(difference.std(ddof=1))) == 0:
        return float("nan")
    return float(difference.mean() / spread)


def check_finite(logits: np.ndarray, *, document: str, first_position: int, run: str) -> None:
    """Refuses logits that are no numbers, rather than averaging them.

    Args:
        logits: (rows, vocabulary).
        document: The text's name.
        first_position: Place in the text of the token that the first row predicts.
        run: "reference" or "constrained".

    Raises:
        StudyError: If a logit is NaN or infinite; names document, position and run.
    """
    bad = ~np.isfinite(logits).all(-1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        values = logits[row][~np.isfinite(logits[row])]
        kinds = " and ".join(sorted({"NaN" if np.isnan(v) else "infinite" for v in values[:1000]}))
        raise StudyError(
            f"The {run} run has {kinds} logits for the token at position {first_position + row} "
            f"of {document!r} ({len(values)} of {logits.shape[-1]}): they can be neither compared "
            "nor averaged. Look at the model there, or leave the text out."
        )
