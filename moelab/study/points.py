"""The points of a sweep: what was asked for, checked, and what it means for one model.

What a user asks for is checked in two steps: names, types and ranges before anything is loaded
(`asked`), and capacities and pins once the model is known, before anything runs (`points_of`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from ..errors import CapacityError, PinsError, StudyError
from ..experts.capacity import fixed_capacities
from ..experts.lossy import initial_order
from ..experts.misses import ACTIONS, MissAction, checked_budget, resolve_action
from ..experts.pins import Pins, check_room, resolve_pins, with_profile
from ..experts.policies import REPLAY_ONLY, make_policy
from ..experts.profile import Profile
from ..experts.profile_file import read_profile
from .bytes import LayerFacts

_T = TypeVar("_T")

RANDOM = "random:"
"""What a drawn set of pins begins with: `"random:8"` draws 8 experts a layer."""

NO_PINS = "none"


@dataclass(frozen=True, slots=True)
class PinsChoice:
    """Pins as they were asked for."""

    label: str
    """What the frame calls them."""
    spec: Any = None
    """As `moelab.load` takes it; None also where they are drawn."""
    drawn: int | None = None
    """Experts a layer to draw."""


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """A policy as it was asked for."""

    name: str
    given: Any
    """What `moelab.replay` and `make_policy` take."""

    @property
    def offline(self) -> bool:
        """It needs to know the future, so it is for replays only."""
        return self.name in REPLAY_ONLY


@dataclass(frozen=True, slots=True)
class Asked:
    """A sweep's lists, checked as far as that goes without a model."""

    capacities: tuple[int | float, ...]
    pins: tuple[PinsChoice, ...]
    policies: tuple[PolicyChoice, ...]
    actions: tuple[MissAction, ...]
    kv_bits: tuple[int | None, ...]
    seeds: tuple[int, ...]
    swap_budget: int | None
    profile: Profile | None
    """Decides what fills a bank that begins full, where the pins bring no profile."""


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


def action_label(action: MissAction) -> str:
    """Returns an action's name, with its settings where they are not the defaults."""
    if action == ACTIONS[action.name]():
        return action.name
    settings = ", ".join(f"{key}={value:g}" for key, value in action.settings.items())
    return f"{action.name}({settings})"


# -- what was asked for --------------------------------------------------------------------


def asked(
    *,
    capacity: Any,
    pins: Any = None,
    policy: Any = "lru",
    on_miss: Any = "load",
    kv_bits: Any = None,
    seeds: Any = 0,
    swap_budget: Any = None,
    profile: Any = None,
) -> Asked:
    """Checks a sweep's lists; a single value stands for a list of one.

    Raises:
        StudyError: If a list is empty, has a value twice, or a value of no such kind.
        PolicyError: If there is no such policy.
        MissActionError: If there is no such action, or the swap budget is none.
        PinsError: If pins are of no such kind.
        ProfileError: If a profile cannot be read.
    """
    capacities = _listed("capacity", capacity, _checked_capacity, "an int that counts experts")
    policies = _listed("policy", policy, _policy, "a policy's name", key=lambda p: p.name)
    actions = _listed("on_miss", on_miss, resolve_action, "an action's name", key=action_label)
    bits = _listed("kv_bits", kv_bits, _bits, "8, 4 or None")
    drawn_by = _listed("seeds", seeds, _seed, "an int from 0 on")
    choices = _listed("pins", _pin_list(pins), _pins, "pins", key=lambda p: p.label)
    if all(a.lossy for a in actions) and all(p.offline for p in policies):
        names = " and ".join(p.name for p in policies)
        raise StudyError(
            f"{names} know the future, so they can be replayed for on_miss='load' only, and every "
            "action that was asked for is lossy. Add 'load', or a policy that a model can run with."
        )
    if isinstance(profile, str | Path):
        profile = read_profile(profile)
    if profile is not None and not isinstance(profile, Profile):
        raise StudyError(f"profile is a moelab.Profile or the path of one, got {profile!r:.60}.")
    budget = checked_budget(swap_budget)
    return Asked(capacities, choices, policies, actions, bits, drawn_by, budget, profile)


def _listed(
    name: str,
    value: Any,
    check: Callable[[Any], _T],
    kind: str,
    *,
    key: Callable[[_T], Any] | None = None,
) -> tuple[_T, ...]:
    """Returns the checked values of a list, or of one value."""
    many = isinstance(value, list | tuple | set | frozenset | range | np.ndarray)
    values = list(value) if many else [value]
    if not values:
        raise StudyError(f"{name} is an empty list, so there is no point. Give at least {kind}.")
    found = [check(item) for item in values]
    seen: dict[Any, Any] = {}
    for item, given in zip(found, values, strict=True):
        what = item if key is None else key(item)
        what = (type(what), what)  # 1 expert and 1.0 of all differ
        if what in seen:
            more = " Give (label, pins) pairs with labels that differ." if name == "pins" else ""
            raise StudyError(
                f"{name} has {given!r:.60} twice ({seen[what]!r:.60} is the same). A point is "
                f"swept once: leave one out.{more}"
            )
        seen[what] = given
    return tuple(found)


def _checked_capacity(value: Any) -> int | float:
    if isinstance(value, np.integer | np.floating):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise StudyError(
            "A sweep's capacity is an int (experts a layer) or a float (a share of them), the "
            f"same for every layer, got {value!r:.60}."
        )
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise CapacityError(
                f"A capacity given as a float is a share between 0 and 1, got {value}. Give an "
                "int to count experts."
            )
    elif value < 1:
        raise CapacityError(f"A capacity counts experts, from a layer's top-k on, got {value}.")
    return value


def _policy(value: Any) -> PolicyChoice:
    if isinstance(value, str) and value in REPLAY_ONLY:
        return PolicyChoice(value, value)
    return PolicyChoice(str(make_policy(value)().name), value)


def _bits(value: Any) -> int | None:
    if value is None or (value in (4, 8) and not isinstance(value, bool)):
        return None if value is None else int(value)
    raise StudyError(f"kv_bits are 8, 4, or None for the model's own type, got {value!r:.60}.")


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise StudyError(f"A seed is an int from 0 on, got {value!r:.60}.")
    return int(value)


def _pin_list(value: Any) -> Any:
    """Tells one labelled pair from a tuple of pins, and refuses a list of ids."""
    if isinstance(value, tuple) and _is_pair(value):
        return [value]
    if isinstance(value, list | tuple | set | frozenset | range | np.ndarray):
        ids = [v for v in value if isinstance(v, int | np.integer) and not isinstance(v, bool)]
        if ids:
            raise PinsError(
                f"pins are a list of settings to try, got expert ids ({ids[0]}, …). To pin the "
                f"same experts in every layer, give [[{ids[0]}, …]]."
            )
    return value


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and not (
        isinstance(value[1], str) and value[1].startswith(RANDOM) and value[0].startswith(RANDOM)
    )  # fmt: skip


def _pins(value: Any) -> PinsChoice:
    label: str | None = None
    if _is_pair(value):
        label, value = value
        if not label:
            raise PinsError("The label of pins is empty. Give a name that charts can show.")
    if isinstance(value, PinsChoice):
        return value
    if value is None:
        return PinsChoice(label or NO_PINS)
    if isinstance(value, str) and value.startswith(RANDOM):
        number = value[len(RANDOM) :]
        if not number.isdecimal() or int(number) < 1:
            raise PinsError(
                f"Drawn pins are '{RANDOM}' and how many experts a layer, from 1 on, such as "
                f"'{RANDOM}8', got {value!r:.60}."
            )
        return PinsChoice(label or value, drawn=int(number))
    name = ""
    if isinstance(value, str | Path):
        name = f" of {Path(value).stem}"
    elif isinstance(value, Pins) and isinstance(value.profile, str | Path):
        name = f" of {Path(value.profile).stem}"
    spec = with_profile(value)
    if isinstance(spec, Pins):
        which = f"top={spec.top}" if spec.top is not None else f"share={spec.share:g}"
        return PinsChoice(label or f"{which}{name}{' fit' if spec.fit else ''}", spec)
    if not isinstance(spec, Mapping) and not isinstance(spec, Iterable):
        raise PinsError(
            "Pins of a sweep are None, moelab.Pins(…), a profile, a mapping from layer to ids, "
            f"'{RANDOM}N', or a (label, pins) pair, got {value!r:.60}."
        )
    return PinsChoice(label or "by hand", spec if isinstance(spec, Mapping) else list(spec))


# -- what it means for a model -------------------------------------------------------------


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
        pins = drawn_pins(choice.drawn, seed, layers)
        check_room(pins, layers, slots)
    else:
        pins = resolve_pins(choice.spec, layers, slots, fingerprint=fingerprint)
        if isinstance(choice.spec, Pins):
            profile = cast(Profile, choice.spec.profile)
    return pins, {} if profile is None else profile.orders()


def drawn_pins(count: int, seed: int, layers: Sequence[LayerFacts]) -> dict[int, frozenset[int]]:
    """Draws pins: in each layer `count` experts without replacement, every set as likely.

    A layer's draw depends on the seed and the layer only.

    Raises:
        PinsError: If a layer has fewer experts.
    """
    found = {}
    for layer in layers:
        if count > layer.experts:
            raise PinsError(
                f"'{RANDOM}{count}' is more than the {layer.experts} experts of layer "
                f"{layer.layer}."
            )
        random = np.random.default_rng([seed, layer.layer])
        found[layer.layer] = frozenset(random.choice(layer.experts, count, replace=False).tolist())
    return found


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
        "policy": policy.name,
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
