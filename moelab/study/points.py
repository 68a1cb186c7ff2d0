"""The points of a sweep: what was asked for, and what it means for one model.

What a user asks for is checked in two steps: names, types and ranges before anything is loaded
(`asked`), and capacities and pins once the model is known, before anything runs (here).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..errors import StudyError
from ..experts.capacity import fixed_capacities
from ..experts.lossy import initial_order
from ..experts.misses import MissAction
from ..experts.pins import Pins, check_room, resolve_pins
from ..experts.policies import make_policy
from ..experts.profile import Profile
from .asked import NO_PINS, Asked, PinsChoice, PolicyChoice, action_label
from .bytes import LayerFacts
from .drawn import drawn_pins


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of a sweep. Every prompt gives it a row."""

    capacity: int
    """Slots a layer; the smallest where layers differ."""
    slots: tuple[int, ...]
    """Slots of each MoE layer."""
    pins: str
    """Label of the pins."""
    policy: PolicyChoice
    action: MissAction
    kv_bits: int | None
    seed: int
    swap_budget: int | None
    pinned: Mapping[int, frozenset[int]]
    """Pinned experts by layer."""
    orders: Mapping[int, Sequence[int]]
    """Experts by layer, in the order in which they fill an empty bank; empty without a profile."""
    key: str
    """16 hexadecimal digits that name all of this."""

    @property
    def on_miss(self) -> str:
        """Label of the miss action."""
        return action_label(self.action)

    @property
    def lossy(self) -> bool:
        """Whether the output may differ from the full model's, so that the model must run."""
        return self.action.lossy

    @property
    def admits(self) -> bool:
        """Whether misses may become resident under the policy."""
        return self.policy.offline or bool(make_policy(self.policy.given)().admits)

    @property
    def initial(self) -> str:
        """What is in the bank at first, in words."""
        pinned = "pins" if any(self.pinned.values()) else ""
        if not self.lossy and self.admits:
            return pinned or "nothing"
        order = "the profile's order" if self.orders else ""
        *some, last = [part for part in (pinned, order, "the lowest ids") if part]
        return ", ".join(some) + (", then " if some else "") + last

    @property
    def title(self) -> str:
        """The point in a few words, for a progress bar."""
        parts = [f"C={self.capacity}", self.on_miss, self.policy.name]
        parts += [f"pins {self.pins}"] if self.pins != NO_PINS else []
        parts += [f"kv {self.kv_bits}"] if self.kv_bits is not None else []
        parts += [f"seed {self.seed}"] if self.seed else []
        return " ".join(parts)


def points_of(
    wanted: Asked, layers: Sequence[LayerFacts], fingerprint: str
) -> tuple[list[Point], int]:
    """Returns the points of a grid for one model.

    Every capacity with every pins, policy, action, cache and, where pins are drawn, seed. Policies
    that know the future have no points for lossy actions.

    Args:
        wanted: From `asked`.
        layers: The model's MoE layers.
        fingerprint: The model's.

    Returns:
        The points, in the order of the lists; and how many were left out, since a policy that
        knows the future cannot run a lossy action.

    Raises:
        CapacityError: If a capacity is none of this model.
        StudyError: If two capacities come to the same slots.
        PinsError: If pins name what is not there, or leave too little room at a capacity.
        ProfileError: If a profile is another model's.
    """
    sites: Any = layers
    slots = _slots(wanted, layers)
    if wanted.profile is not None:
        wanted.profile.check(fingerprint, sites)
    held = {
        (capacity, choice.label, seed): _held(choice, seed, wanted, layers, own, fingerprint)
        for capacity, own in slots.items()
        for choice in wanted.pins
        for seed in (wanted.seeds if choice.drawn is not None else (0,))
    }
    points: list[Point] = []
    left_out = 0
    for capacity, choice, policy, action, bits in itertools.product(
        wanted.capacities, wanted.pins, wanted.policies, wanted.actions, wanted.kv_bits
    ):
        for seed in wanted.seeds if choice.drawn is not None else (0,):
            if policy.offline and action.lossy:
                left_out += 1
                continue
            pinned, orders = held[capacity, choice.label, seed]
            points.append(
                _point(slots[capacity], choice, policy, action, bits, seed, wanted, pinned, orders)
            )
    return points, left_out


def _slots(wanted: Asked, layers: Sequence[LayerFacts]) -> dict[int | float, tuple[int, ...]]:
    sites: Any = layers
    found: dict[int | float, tuple[int, ...]] = {}
    for capacity in wanted.capacities:
        slots = tuple(fixed_capacities(capacity, sites))
        for other, known in found.items():
            if known == slots:
                raise StudyError(
                    f"capacity has {other!r} and {capacity!r}, which are both {slots[0]} experts "
                    "a layer of this model. A point is swept once: leave one out."
                )
        found[capacity] = slots
    return found


def _held(
    choice: PinsChoice,
    seed: int,
    wanted: Asked,
    layers: Sequence[LayerFacts],
    slots: Sequence[int],
    fingerprint: str,
) -> tuple[dict[int, frozenset[int]], Mapping[int, Sequence[int]]]:
    """Returns the pins of a setting, and the profile's order of experts if there is one."""
    profile = wanted.profile
    if choice.drawn is not None:
        pins = drawn_pins({x.layer: x.experts for x in layers}, choice.drawn, seed)
        check_room(pins, layers, slots)
    else:
        pins = resolve_pins(choice.spec, layers, slots, fingerprint=fingerprint)
        if isinstance(choice.spec, Pins):
            profile = cast(Profile, choice.spec.profile)
    return pins, {} if profile is None else profile.orders()


def _point(
    slots: tuple[int, ...],
    choice: PinsChoice,
    policy: PolicyChoice,
    action: MissAction,
    bits: int | None,
    seed: int,
    wanted: Asked,
    pinned: Mapping[int, frozenset[int]],
    orders: Mapping[int, Sequence[int]],
) -> Point:
    named = {
        "slots": slots,
        "pins": [choice.label, {str(k): sorted(v) for k, v in sorted(pinned.items())}],
        "orders": {str(k): list(map(int, v)) for k, v in sorted(orders.items())},
        "policy": [policy.name, policy.digest] if policy.digest else policy.name,
        "action": [action.name, action.settings],
        "kv_bits": bits,
        "seed": seed,
        "swap_budget": wanted.swap_budget if action.lossy else None,
    }
    key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]
    return Point(
        min(slots), slots, choice.label, policy, action, bits, seed,
        wanted.swap_budget if action.lossy else None, pinned, orders, key,
    )  # fmt: skip


def initial_contents(point: Point, layers: Sequence[LayerFacts]) -> dict[int, list[int]] | None:
    """Returns what a replay of an exact point begins with beside the pins, as the bank does.

    None where the bank begins with its pins alone.
    """
    if point.admits:
        return None
    return {
        layer.layer: initial_order(
            cast(Any, layer), point.pinned.get(layer.layer, ()), point.orders.get(layer.layer)
        )
        for layer in layers
    }
