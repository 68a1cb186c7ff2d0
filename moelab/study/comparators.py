"""What the same bytes buy otherwise: rows of whole models, to stand beside a sweep's.

Two comparators, see `whole`: every expert at fewer bits, and the model without its least used
experts. Both are judged on the same windows against the same exact run as a sweep's points, and
their rows have a sweep's columns, so that the frames can be joined and compared at equal bytes.

Which experts are least used is read off a profile. It must be of other texts than those that are
judged: the calibration texts, unless a profile is given. Use is counted in tokens or in gate
weight; REAP also weighs how large an expert's output is (arXiv 2510.13999), which a profile does
not know, so a published pruned model may do better than the one here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import StudyError
from ..experts.capacity import fixed_capacities
from ..experts.profile import Profile
from ..prompt_texts import Prompts
from ..quality.divergence import CONSTRAINED, check_finite, diverge
from ..quality.judge import Reference, exactly, one_pass, quantised, run_prefix
from ..quality.window import documents_of, few_of_each, windows_of
from .bytes import cache_bytes, facts_of
from .local import blocks
from .rows import COLUMNS, checked_rows, window_key
from .runner import measured
from .sweep import GIVEN, SPLITS
from .whole import Whole, fewer_bits, pruned

if TYPE_CHECKING:
    import pandas as pd

    from ..lab import Lab
    from ..quality.window import Window

NONE = "none"
"""Policy and pins of a model without a bank."""

Worth = Literal["counts", "mass"]

Opened = Callable[["Lab"], contextlib.AbstractContextManager[Whole]]


def comparators(
    lab: Lab,
    prompts: Prompts = None,
    *,
    bits: int | Sequence[int] = (2, 3),
    capacity: Sequence[int | float] = (),
    profile: Profile | None = None,
    worth: Worth = "counts",
    prefix: int = 48,
    tokens: int = 40,
    exact_prefix: bool = True,
    kv_bits: int | None = None,
    split: str | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Judges whole models of fewer bytes as a sweep judges its points.

    Args:
        lab: The model, of any capacity; its bank gives the exact reference. Afterwards it is as it
            was, its bank reset. Beside it, one comparator's experts are in memory at a time.
        prompts: As in `moelab.sweep`: None takes the shipped texts of a split.
        bits: For each, the whole model with its experts at so many bits (`on_miss` "whole_2bit").
        capacity: For each, the model with so many experts a layer and no others (`on_miss`
            "pruned"): ints, or floats for shares, as in `moelab.load`.
        profile: Says which experts stay; None profiles the shipped calibration texts.
        worth: Keep those that most tokens chose ("counts"), or those with most gate weight
            ("mass").
        prefix: Tokens before the judged ones.
        tokens: Judged tokens a prompt.
        exact_prefix: The full model reads the prefix, as it does for a sweep's lossy points; False
            lets the comparator read it, as it would in use, and says so in `on_miss`.
        kv_bits: Bits of the key-value cache after the prefix: 8, 4 or None.
        split: What the prompts are of, as in `moelab.sweep`: "calibration", "selection" or "test".
            For the shipped texts "selection" unless given.
        progress: Show a progress bar.

    Returns:
        A row a comparator and prompt, with the columns of a sweep's frame: `policy` and `pins` are
        "none", `capacity` is the experts a layer, every routed slot is a hit, nothing is read.
        `bytes_slots` are the comparator's experts, `bytes_trunk` is the trunk, less the router's
        rows of removed experts.

    Raises:
        StudyError: If nothing is asked for, a list has a value twice or one that cannot be had, a
            prompt is too short, or a logit is NaN or infinite.
        CapacityError: If a capacity is none of this model.
        ProfileError: If the profile is another model's.
        MoelabError: While the lab is being recorded.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    wanted = _wanted(lab, bits, capacity, profile, worth)
    if split is not None and split not in SPLITS:
        raise StudyError(f"split must be one of {', '.join(SPLITS)} or None, got {split!r:.60}.")
    windows = _windows(lab, prompts, split, prefix, tokens)
    split = split or ("selection" if prompts is None else GIVEN)
    facts = facts_of(lab)
    routed = sum(layer.top_k for layer in facts.layers)
    rows: list[list[dict[str, Any]]] = [[] for _ in wanted]
    bar = tqdm(
        total=(len(wanted) + 1) * len(windows), unit="prompt", disable=not progress, leave=False
    )
    with bar:
        # A block at a time: each prompt's exact run and its cache are held until it was judged.
        for block in blocks(windows):
            references = []
            bar.set_description("full model")
            for window in block:
                references.append(Reference(lab, window))
                bar.update()
            for (named, opened), mine in zip(wanted, rows, strict=True):
                with opened(lab) as whole:
                    bar.set_description(f"{whole.kind} C={min(whole.experts)}")
                    for window, reference in zip(block, references, strict=True):
                        quality, cache = _judged(lab, window, reference, exact_prefix, kv_bits)
                        mine.append({
                            **_columns(whole, named, exact_prefix, kv_bits),
                            "domain": window.domain, "prompt": window.document,
                            "tokens": window.judged, "prefix": window.prefix,
                            "bytes": whole.expert_bytes + whole.trunk_bytes + cache,
                            "bytes_cache": cache, "routed": routed * window.judged,
                            "hits": routed * window.judged, **quality, "split": split,
                            "fingerprint": facts.fingerprint, "window": window_key(window),
                        })  # fmt: skip
                        bar.update()
    frame = pd.DataFrame([row for mine in rows for row in mine])
    return checked_rows(frame[list(COLUMNS)], "The comparators' frame")


def kept_experts(profile: Profile, slots: Mapping[int, int], worth: Worth) -> dict[int, list[int]]:
    """Returns the most used experts of each layer, ascending.

    Args:
        profile: How experts were used.
        slots: How many stay, by layer.
        worth: "counts": those that most tokens chose, then those in most prompts, then the lowest
            ids. "mass": those with most gate weight summed over tokens, then the lowest ids.

    Raises:
        StudyError: If the profile does not know.
    """
    found = {}
    for layer, count in slots.items():
        if worth == "counts":
            order = profile.order(layer)
        else:
            mass = np.sum([use.mass[layer] for use in profile.uses], axis=0)
            if not profile.uses or np.isnan(mass).any():
                raise StudyError(
                    "The profile does not know the gate weights (worth='mass'). Make it with "
                    "moelab.profile, or take worth='counts'."
                )
            order = np.lexsort((np.arange(len(mass)), -mass)).tolist()
        found[layer] = sorted(order[:count])
    return found


def _wanted(
    lab: Lab,
    bits: int | Sequence[int],
    capacity: Sequence[int | float],
    profile: Profile | None,
    worth: Worth,
) -> list[tuple[dict[str, Any], Opened]]:
    """Returns what to judge: what names it, and how to put it in the lab's place."""
    few: list[int] = _listed("bits", bits)
    cut: list[int | float] = _listed("capacity", capacity)
    if not few and not cut:
        raise StudyError("There is nothing to compare with: give bits, capacity or both.")
    if worth not in ("counts", "mass"):
        raise StudyError(f"worth must be 'counts' or 'mass', got {worth!r}.")
    found: list[tuple[dict[str, Any], Opened]] = [({"bits": one}, _fewer(one)) for one in few]
    slots = [dict(zip((s.layer for s in lab.sites), fixed_capacities(one, lab.sites), strict=True))
             for one in cut]  # fmt: skip
    if slots:
        if profile is None:
            from ..profiling import profile as make_profile

            profile = _exact_profile(lab, make_profile)
        profile.check(lab.fingerprint, lab.sites)
    for one in slots:
        assert profile is not None
        kept = kept_experts(profile, one, worth)
        found.append(({"kept": {str(k): v for k, v in kept.items()}}, _without(kept)))
    return found


def _listed(name: str, values: Any) -> list[Any]:
    """Returns a list's values; a single value stands for a list of one."""
    found = list(values) if isinstance(values, Iterable) else [values]
    if len({(type(value), value) for value in found}) < len(found):
        raise StudyError(f"{name} has a value twice: {found!r}.")
    return found


def _exact_profile(lab: Lab, make: Callable[..., Profile]) -> Profile:
    with exactly(lab):
        return make(lab, progress=False)


def _fewer(bits: int) -> Opened:
    return lambda lab: fewer_bits(lab, bits)


def _without(kept: Mapping[int, Sequence[int]]) -> Opened:
    return lambda lab: pruned(lab, kept)


def _windows(
    lab: Lab, prompts: Prompts, split: str | None, prefix: int, tokens: int
) -> list[Window]:
    """As a sweep takes them, so that rows of both can be compared."""
    given: Any
    given, _ = documents_of(prompts, split=split or "selection")
    if prompts is None:
        given = few_of_each(lab.tokenizer, given, least=prefix + tokens + 1, each=len(given))
    return windows_of(lab.tokenizer, given, prefix=prefix, tokens=tokens, called="prompts")


def _judged(
    lab: Lab, window: Window, reference: Reference, exact_prefix: bool, kv_bits: int | None
) -> tuple[dict[str, float], int]:
    """Judges what stands in the lab's place; returns the quality columns and the cache's bytes."""
    cache = reference.cache() if exact_prefix else run_prefix(lab.model, window)
    cache = quantised(cache, kv_bits)
    parts = []
    for at, (fed, wanted) in enumerate(zip(window.fed, window.wanted, strict=True)):
        logits = one_pass(lab.model, [fed], cache)
        check_finite(
            logits, document=window.document, first_position=window.positions[at], run=CONSTRAINED
        )
        parts.append(diverge(reference.logits(at, at + 1), logits, np.array([wanted])))
    columns = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("kl", "logprob", "logprob_reference", "same_top1")
    )
    return measured(*columns), cache_bytes(cache)


def _columns(
    whole: Whole, named: Mapping[str, Any], exact_prefix: bool, kv_bits: int | None
) -> dict[str, Any]:
    """Returns the columns that all prompts of a comparator share."""
    key = json.dumps(
        {"kind": whole.kind, **named, "exact_prefix": exact_prefix, "kv_bits": kv_bits},
        sort_keys=True,
    )
    return {
        "capacity": min(whole.experts),
        "policy": NONE,
        "on_miss": whole.kind if exact_prefix else f"{whole.kind}(own prefix)",
        "pins": NONE,
        "kv_bits": float("nan") if kv_bits is None else float(kv_bits),
        "seed": 0,
        "initial": "all of its experts",
        "swap_budget": 0,
        "bytes_slots": whole.expert_bytes,
        "bytes_low_bit": 0,
        "bytes_trunk": whole.trunk_bytes,
        "hit_rate": 1.0,
        "loads": 0,
        "bytes_read": 0,
        "source": "run",
        "point": hashlib.sha256(key.encode()).hexdigest()[:16],
    }
