"""Pins: experts that never leave the bank, from a profile or by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PinsError
from .profile import THRESHOLD, Layer, Profile
from .profile_file import read_profile


@dataclass(frozen=True, slots=True)
class Pins:
    """Which of a profile's experts to pin. Give either `share` or `top`.

    Raises:
        PinsError: If neither or both are given, or one is out of range.
    """

    profile: Profile | str | Path
    """The profile, or its file."""
    share: float | None = None
    """Pins every expert that was used in at least this share of the prompts, 0 to 1."""
    top: int | None = None
    """Pins so many experts a layer, the most used ones first (`Profile.order`)."""
    fit: bool = False
    """Where there are too many for the capacity, keep the most used that fit instead of raising."""

    def __post_init__(self) -> None:
        if (self.share is None) == (self.top is None):
            raise PinsError(
                "Pins from a profile need either share= (experts used in at least that share of "
                "the prompts) or top= (so many experts a layer), "
                f"got share={self.share!r} and top={self.top!r}."
            )
        if self.share is not None and not (_is_real(self.share) and 0 <= self.share <= 1):
            raise PinsError(f"share is a share of prompts between 0 and 1, got {self.share!r}.")
        if self.top is not None and not (_is_int(self.top) and self.top >= 0):
            raise PinsError(f"top counts experts a layer: an int from 0 on, got {self.top!r}.")


PinsLike = Pins | Profile | str | Path | Mapping[int, Iterable[int]] | Iterable[int] | None
"""What a user may give as pins; see `resolve_pins`."""


def resolve_pins(
    spec: PinsLike, sites: Sequence[Layer], capacities: Sequence[int], *, fingerprint: str
) -> dict[int, frozenset[int]]:
    """Turns what a user gives as pins into the experts to pin in each layer.

    Args:
        spec: One of

            - None: no pins;
            - a mapping from layer to ids, or one list of ids for every layer;
            - `Pins`: by prompt share or by top K from a profile;
            - a `Profile`, or the path of one: `Pins(profile, share=0.5)`.
        sites: The model's MoE layers.
        capacities: Slots of each of `sites`.
        fingerprint: The model's, which a profile must have.

    Returns:
        For every layer its pins, which may be none. Of a layer's C slots at least top-k are left
        for others, unless it holds all its experts, where pins change nothing.

    Raises:
        PinsError: If it is no such value, names a layer or expert that the model lacks, or pins
            too many.
        ProfileError: If the profile is damaged or another model's.
    """
    spec = with_profile(spec)
    if spec is None:
        return {site.layer: frozenset() for site in sites}
    if isinstance(spec, Pins):
        return _from_profile(spec, sites, capacities, fingerprint)
    pins = _by_hand(spec, sites)
    check_room(pins, sites, capacities)
    return pins


def with_profile(spec: PinsLike) -> PinsLike:
    """Returns pins whose profile is read, so that its order is to be had as well.

    A profile, or the path of one, becomes `Pins` whose `profile` is a `Profile`, and so does `Pins`
    over a path; pins by hand stay as they are.

    Raises:
        ProfileError: If the profile cannot be read.
    """
    if isinstance(spec, str | Path | Profile):
        spec = Pins(spec, share=THRESHOLD)
    if isinstance(spec, Pins) and not isinstance(spec.profile, Profile):
        return replace(spec, profile=read_profile(spec.profile))
    return spec


def check_room(
    pins: Mapping[int, frozenset[int]], sites: Sequence[Layer], capacities: Sequence[int]
) -> None:
    """Raises unless every layer has room for its pins, for instance after a change of capacity.

    Raises:
        PinsError: If a layer has more than C − top-k pins and fewer slots than experts.
    """
    _refuse_too_many(pins, sites, capacities, "Pin fewer, or hold more experts.")


def room(site: Layer, capacity: int) -> int:
    """Returns how many experts of a layer may be pinned."""
    return site.experts if capacity >= site.experts else capacity - site.top_k


def _from_profile(
    spec: Pins, sites: Sequence[Layer], capacities: Sequence[int], fingerprint: str
) -> dict[int, frozenset[int]]:
    profile = spec.profile
    assert isinstance(profile, Profile)
    profile.check(fingerprint, sites)
    pins: dict[int, frozenset[int]] = {}
    for site, capacity in zip(sites, capacities, strict=True):
        chosen: list[int] = []
        if site.layer in profile.experts:
            order = profile.order(site.layer)
            if spec.top is not None:
                chosen = order[: spec.top]
            else:
                assert spec.share is not None
                shares = profile.shares(site.layer)
                # Used in most prompts first, since that is what they are pinned for.
                order = sorted(order, key=lambda e, s=shares: -s[e])  # type: ignore[misc]
                chosen = [expert for expert in order if shares[expert] >= spec.share]
        if spec.fit:
            chosen = chosen[: room(site, capacity)]
        pins[site.layer] = frozenset(chosen)
    if spec.top is not None:
        limited = [room(s, c) for s, c in zip(sites, capacities, strict=True) if c < s.experts]
        advice = f"The largest top that fits every layer is {min(limited, default=0)}."
    else:
        advice = _share_that_fits(profile, sites, capacities)
    _refuse_too_many(pins, sites, capacities, f"{advice} Or pass fit=True for the most used.")
    return pins


def _share_that_fits(profile: Profile, sites: Sequence[Layer], capacities: Sequence[int]) -> str:
    """Says which share pins few enough experts in every layer."""
    beyond = 0.0  # the highest share of an expert for which some layer has no room
    for site, capacity in zip(sites, capacities, strict=True):
        if site.layer in profile.experts:
            shares = np.sort(profile.shares(site.layer))[::-1]
            limit = room(site, capacity)
            if limit < len(shares):
                beyond = max(beyond, float(shares[limit]))
    least = (math.floor(beyond * 1000) + 1) / 1000
    if least > 1:
        return "No share fits every layer: too many experts were used in every prompt. Take top=."
    return f"The smallest share that fits every layer is {least:g}."


def _by_hand(spec: Any, sites: Sequence[Layer]) -> dict[int, frozenset[int]]:
    experts = {site.layer: site.experts for site in sites}
    if isinstance(spec, Mapping):
        for layer in spec:
            if not _is_int(layer) or layer not in experts:
                raise PinsError(
                    f"pins name layer {layer!r}, and the model's MoE layers are "
                    f"{_listed(list(experts))}."
                )
        given = {layer: _ids(spec.get(layer, ()), f" for layer {layer}") for layer in experts}
    else:
        given = dict.fromkeys(experts, _ids(spec, ""))
    for layer, ids in given.items():
        lacking = sorted(expert for expert in ids if not 0 <= expert < experts[layer])
        if lacking:
            raise PinsError(
                f"pins name expert {lacking[0]} in layer {layer}, which has experts 0 to "
                f"{experts[layer] - 1}."
            )
    return given


def _ids(value: Any, where: str) -> frozenset[int]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise PinsError(
            "pins are a mapping from layer to expert ids, one list of ids for every layer, "
            f"moelab.Pins(profile, …), or a profile or its path; got {value!r:.60}{where}."
        )
    ids = list(value)
    for expert in ids:
        if not _is_int(expert):
            raise PinsError(f"Pinned experts are ids (ints), got {expert!r:.60}{where}.")
    return frozenset(int(expert) for expert in ids)


def _refuse_too_many(
    pins: Mapping[int, frozenset[int]],
    sites: Sequence[Layer],
    capacities: Sequence[int],
    advice: str,
) -> None:
    excess = [
        (len(pins.get(site.layer, ())) - room(site, capacity), site, capacity)
        for site, capacity in zip(sites, capacities, strict=True)
    ]
    most, site, capacity = max(excess, key=lambda entry: entry[0])
    if most > 0:
        count = len(pins[site.layer])
        raise PinsError(
            f"{count} pins in layer {site.layer} are {most} too many: of its {capacity} slots "
            f"{site.top_k} must stay free for a token's other experts (its top-k), so that at most "
            f"{room(site, capacity)} can be pinned. {advice}"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)


def _listed(values: Sequence[int]) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:4], "…", *texts[-2:]])
