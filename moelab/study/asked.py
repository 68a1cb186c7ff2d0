"""What a sweep was asked for: its lists, checked as far as that goes without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..errors import CapacityError, PinsError, StudyError
from ..experts.misses import ACTIONS, MissAction, checked_budget, resolve_action
from ..experts.pins import Pins, with_profile
from ..experts.policies import REPLAY_ONLY, make_policy
from ..experts.profile import Profile
from ..experts.profile_file import read_profile

_T = TypeVar("_T")

RANDOM = "random:"
"""What a drawn set of pins begins with: `"random:8"` draws 8 experts a layer."""

NO_PINS = "none"
"""Label of no pins."""


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
    digest: str = ""
    """Tells policies of one name apart, where a policy has such an attribute."""

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


def action_label(action: MissAction) -> str:
    """Returns an action's name, with its settings where they are not the defaults."""
    if action == ACTIONS[action.name]():
        return action.name
    settings = ", ".join(f"{key}={value:g}" for key, value in action.settings.items())
    return f"{action.name}({settings})"


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
    made = make_policy(value)()
    return PolicyChoice(str(made.name), value, str(getattr(made, "digest", "")))


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
