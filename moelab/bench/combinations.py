"""Which policies and miss actions a benchmark runs, and labs that are set up so."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import NotYetError

if TYPE_CHECKING:
    from ..lab import Lab


class Combination(NamedTuple):
    """How a lab replaces experts and what it does on a miss."""

    policy: str = "lru"
    on_miss: str = "load"

    @property
    def lossy(self) -> bool:
        """Whether its output is an approximation."""
        return self.on_miss != "load"


DEFAULT = Combination()


def combinations(policies: str | Sequence[str], actions: str | Sequence[str]) -> list[Combination]:
    """Returns every policy with every action.

    Args:
        policies: Names in a list or with commas between them; `"all"` for all that a model can
            run with.
        actions: Likewise.
    """
    return [
        Combination(policy, action)
        for policy in _names(policies, _known_policies)
        for action in _names(actions, _known_actions)
    ]


def load_combination(folder: Path, share: float, combination: Combination) -> Lab:
    """Loads a lab; an unknown policy or action is `moelab.load`'s to refuse."""
    from ..loading import load

    options: dict[str, Any] = combination._asdict() if combination != DEFAULT else {}
    if not options.keys() <= inspect.signature(load).parameters.keys():
        raise NotYetError("moelab.load takes no policy and no on_miss yet.")
    return load(folder, float(share), **options)


def _names(given: str | Sequence[str], known: Any) -> list[str]:
    names = [n.strip() for n in given.split(",")] if isinstance(given, str) else list(given)
    return known() if names == ["all"] else list(dict.fromkeys(n for n in names if n))


def _known_policies() -> list[str]:
    import moelab

    try:
        frame = moelab.policies()
    except AttributeError as error:
        raise NotYetError("moelab lists no policies yet: give their names.") from error
    return frame.loc[frame["live"], "name"].tolist()


def _known_actions() -> list[str]:
    try:
        return list(import_module("moelab.experts.misses").ACTIONS)
    except ModuleNotFoundError as error:
        raise NotYetError("moelab lists no miss actions yet: give their names.") from error
