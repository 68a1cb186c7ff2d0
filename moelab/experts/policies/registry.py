"""The policies by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import PolicyError
from .base import Policy
from .counts import LCP, LFRU, LFU, LFUAgeing
from .minimum import Min, MinForced
from .queues import LRU, S3FIFO, LeastStale, Sieve, Static

if TYPE_CHECKING:
    import pandas as pd

PolicyMaker = Callable[[], Policy]
"""Makes a fresh policy for a layer."""

REPLAY_ONLY = (Min.name, MinForced.name)
"""Policies that need the future."""

_BOTH: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (LRU, LFU, LFUAgeing, LFRU, LCP, Sieve, S3FIFO, LeastStale, Static)
}
_TOLD = {
    "lru": ("Evicts the least recently used expert.", "textbook"),
    "lfu": ("Evicts the expert used in the fewest events so far.", "textbook"),
    "lfu_da": (
        "LFU in the cache, plus the highest priority that was evicted: old counts fade.",
        "Arlitt et al. 1999",
    ),
    "lfru": ("Evicts the lowest uses ÷ (events since the last use + 1).", "arXiv 2608.07911"),
    "lcp": ("Evicts the lowest uses · 0.25^(events since the last use ÷ 128).", "mlx-moe"),
    "sieve": (
        "FIFO with a visited bit; a hand clears bits and evicts the first expert without.",
        "Zhang et al., NSDI 2024",
    ),
    "s3_fifo": (
        "A small FIFO that newcomers must outlive, a main FIFO, and a memory of who left.",
        "Yang et al., SOSP 2023; libCacheSim",
    ),
    "least_stale": (
        "Evicts what this pass did not use, oldest entry first.",
        "SpecMD, arXiv 2602.03921",
    ),
    "static": ("Pins and initial contents stay; other experts are read each time.", "mlx-moe"),
    "min": (
        "Knows the future and may refuse to admit: no policy needs fewer loads.",
        "Belady 1966",
    ),
    "min_forced": (
        "Knows the future and admits every miss: the gap to min is what admission is worth.",
        "arXiv 2608.07911",
    ),
}
_METHODS = ("sized", "used", "evict", "admitted", "sweep_order", "resync")


def make_policy(policy: Any) -> PolicyMaker:
    """Returns what makes a fresh policy for each layer.

    Args:
        policy: A name; a class or function that makes a policy when called without arguments; or
            a policy, of which each layer gets a deep copy.

    Raises:
        PolicyError: If there is no policy of that name, if it is for replay only, or if the object
            lacks something of `moelab.experts.policies.Policy`.
    """
    if isinstance(policy, str):
        if policy in REPLAY_ONLY:
            raise PolicyError(
                f"policy {policy!r} needs to know the future, so it is for moelab.replay only. "
                f"A model can run with: {', '.join(_BOTH)}."
            )
        if policy not in _BOTH:
            raise PolicyError(
                f"There is no policy {policy!r}. Known: {', '.join(_BOTH)}; for moelab.replay "
                f"also {' and '.join(REPLAY_ONLY)}. An object of your own may be given too."
            )
        return _BOTH[policy]
    makes = isinstance(policy, type) or not hasattr(policy, "evict")
    if makes and callable(policy):
        maker: PolicyMaker = policy
        try:
            made: Any = maker()
        except TypeError as error:
            raise PolicyError(
                f"policy must be a name, a policy, or what makes one without arguments, and "
                f"{policy!r} could not be called so: {error}"
            ) from error
    else:
        # A copy now, so that what the caller does to the object later changes nothing.
        made = copy.deepcopy(policy)
        maker = lambda: copy.deepcopy(made)  # noqa: E731
    lacks = [name for name in ("name", "admits", *_METHODS) if not hasattr(made, name)]
    if lacks:
        raise PolicyError(
            f"A policy must have {', '.join(lacks)}, and {policy!r} lacks "
            f"{'it' if len(lacks) == 1 else 'them'}. Derive from "
            "moelab.experts.policies.PolicyBase, which has defaults for most."
        )
    return maker


def policies() -> pd.DataFrame:
    """Returns the replacement policies, a row each.

    Returns:
        `name` (what to give as `policy=`), `what` it does, `live` (False: for `moelab.replay`
        only) and `source`. Exact definitions are in the classes' documentation.
    """
    import pandas as pd

    return pd.DataFrame(
        [(name, what, name not in REPLAY_ONLY, source) for name, (what, source) in _TOLD.items()],
        columns=["name", "what", "live", "source"],
    )
