"""`moelab.calibrate`: what a token, a chunk of a prompt and a load cost, here and for this model.

Prompts from the shipped calibration texts run in mlx-lm's own loop at a few capacities, and after
each prompt the text's next tokens are decoded, whatever the model would have said. A linear model
of the seconds is then fitted to what the bank did: a least absolute deviation fit of relative
errors, none of whose parts may be negative. Layers that hold all their experts are stock and wait
for nothing, so that they are measured by themselves.

Nothing in here is known beforehand: every figure is from this machine and this checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StudyError
from ..experts.memory import available_memory
from ..lab import Lab
from .calibration_fit import fitted_parts
from .calibration_results import PARTS, Calibration
from .calibration_runs import Observations, observe
from .page_cache import cold_load, warm
from .runner import govern, left_as_found

__all__ = ["LENGTHS", "Calibration", "calibrate", "opened"]

LENGTHS = (16, 64, 256)
SHARES = (0.25, 0.5)


def calibrate(
    model: Lab | str | Path,
    *,
    lengths: Sequence[int] = LENGTHS,
    progress: bool = True,
    limit_seconds: float = 60,
) -> Calibration:
    """Measures what tokens, chunks and loads cost on this machine with this model.

    Args:
        model: A lab, which is left as it was found, or what `moelab.load` takes.
        lengths: Tokens of the prompts.
        progress: Show a bar.
        limit_seconds: No further point is begun that is expected to end later than this; the least
            that a fit needs is measured in any case. Loading a model is not counted.

    Returns:
        The calibration. Save it to use it again on the same machine.

    Raises:
        StudyError: If lengths or limit are out of range, or the lab is being recorded.
    """
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int) or length < 2:
            raise StudyError(f"lengths are ints from 2 on, got {length!r}.")
    if len(set(lengths)) < 2:
        raise StudyError(f"lengths must be two or more, to tell tokens apart; got {lengths!r}.")
    if not limit_seconds > 0:
        raise StudyError(f"limit_seconds must be above 0, got {limit_seconds!r}.")
    with opened(model, SHARES[0]) as lab, left_as_found(lab):
        from ..machine import this_machine

        machine = asdict(this_machine())
        begin = time.perf_counter()
        lab.set_on_miss("load", swap_budget=None)
        seen = Observations()
        sizes = [site.experts for site in lab.sites]
        for slots in dict.fromkeys(
            tuple(max(s.top_k, math.ceil(share * s.experts)) for s in lab.sites)
            for share in SHARES
        ):  # fmt: skip
            seen.capacities.append(list(slots))
        seen.capacities = [c for c in seen.capacities if all(np.less(c, sizes))]
        share = cold = None
        if seen.capacities:
            govern(lab, "lru", {}, {}, slots=seen.capacities[0])
            share = warm(lab, limit_seconds / 6)
        whole = sum(
            sum(array.nbytes for _, _, array in site.tensors()) for site in lab.sites
        ) - lab.memory().slots  # fmt: skip
        # Asked now, when the bank has its smallest size, and not of the system alone: a container
        # may have less.
        if not seen.capacities or 1.5 * whole < available_memory().nbytes:
            seen.capacities.append(sizes)
        observe(lab, seen, sorted(set(lengths)), begin + limit_seconds, progress)
        if seen.capacities[0] != sizes:
            govern(lab, "lru", {}, {}, slots=seen.capacities[0])
            cold = cold_load(lab)
        parts, spread, residuals = _fitted(seen)
        return Calibration(
            model=lab.name, fingerprint=lab.fingerprint, layers=len(lab.sites),
            **parts, cold_load=cold, warm_share=share, longest=seen.longest, spread=spread,
            residuals=residuals, observations={k: len(v) for k, v in seen.rows.items()},
            took=time.perf_counter() - begin, machine=machine,
        )  # fmt: skip


def _fitted(
    seen: Observations,
) -> tuple[dict[str, dict[str, float] | None], dict[str, list[float]], dict[str, float]]:
    """Returns parts, spread and residuals as `Calibration` has them."""
    parts: dict[str, dict[str, float] | None] = {}
    spread: dict[str, list[float]] = {}
    residuals: dict[str, float] = {}
    for phase, names in PARTS.items():
        rows = np.array(seen.rows[phase], float)
        if not len(rows):
            parts[phase] = None
            continue
        runs = np.array(seen.runs[phase])
        fitted, ranges, residuals[phase] = fitted_parts(rows[:, 1:], rows[:, 0], runs)
        parts[phase] = dict(zip(names, fitted.tolist(), strict=True))
        for name, pair in zip(names, ranges.tolist(), strict=True):
            spread[f"{phase}.{name}"] = pair
    return parts, spread, residuals


@contextlib.contextmanager
def opened(model: Lab | str | Path, capacity: Any) -> Iterator[Lab]:
    """Gives the lab, or loads the model.

    Raises:
        StudyError: If the lab is being recorded.
    """
    if isinstance(model, Lab):
        model._check_open()
        if model.sessions:
            raise StudyError(
                "The lab is being recorded, and measuring changes its capacity. Leave the "
                "`with lab.record()` block first."
            )
        yield model
        return
    from ..loading import load

    with load(model, capacity) as lab:
        yield lab
